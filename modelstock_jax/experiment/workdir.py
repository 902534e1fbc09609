"""A run's directory: whose it is, and where its parts lie."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.reporting.files import plain, write_json

# More seeds may be added to a finished run, and what is only shown may change.
HARMLESS = (
    "num_seeds",
    "log_every",
    "checkpoint.every",
    "checkpoint.keep",
    "export.layouts",
    "data.check_counts",
    "data.loading.threads",
    "data.loading.workers",
    "data.loading.prefetch",
)


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes the directory, or checks that what is in it was made with the same config.

    Raises:
      UserError: if it cannot be written or holds the run of another config; names the keys.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make --workdir={workdir}: {error.strerror}; choose another"
        ) from error
    now = _flat(plain(config.to_dict()))
    if not path.exists():
        write_json(path, config.to_dict())
        return
    try:
        before = _flat(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; choose another --workdir") from error
    changed = [
        f"{key} was {before.get(key, 'absent')!r}, is {now.get(key, 'absent')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in HARMLESS
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}); "
            "choose another --workdir, or give the old values to go on with it"
        )
    write_json(path, config.to_dict())


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
