"""All processes of a run are given the same: config, command line and code."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import flat, plain
from modelstock_jax.training import multihost


def check_same(config: ConfigDict, **more: Any) -> None:
    """Compares this process's config and code with those of process 0; free with one process.

    Args:
      config: the run's options.
      **more: what else must be the same, by the flag's name.

    Raises:
      UserError: on every process if one differs; on that one it says in what.
    """
    if jax.process_count() == 1:
        return
    ours = flat({"config": plain(config.to_dict()), "code": _code(), **more})
    theirs = json.loads(_from_main(json.dumps(ours, sort_keys=True)))
    differing = [
        f"{key} is {ours.get(key)!r}, there {theirs.get(key)!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if json.dumps(ours.get(key)) != json.dumps(theirs.get(key))
    ]
    one_does = bool(multihost.anywhere(bool(differing)))
    if differing:
        raise UserError(
            f"process {jax.process_index()} was not started as process 0 was: "
            f"{'; '.join(differing)}; give all the same command and the same code"
        )
    if one_does:
        raise UserError(
            "not all processes were started with the same config and code: the line of the one "
            "that differs says in what"
        )


def _code() -> dict[str, str]:
    """Digest of this package's files, and the versions that decide what is computed."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy", "grain")}
    return {"modelstock_jax": digest.hexdigest()[:16], **versions}


def _from_main(text: str) -> str:
    data = np.frombuffer(text.encode(), np.uint8)
    padded = np.zeros(multihost.agree(len(data)), np.uint8)
    padded[: len(data)] = data[: len(padded)]
    return multihost_utils.broadcast_one_to_all(padded).astype(np.uint8).tobytes().decode()
