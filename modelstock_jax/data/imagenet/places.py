"""Where ImageNet and its shifts lie on a disk."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from modelstock_jax.errors import UserError

SHIFTS = ("v2", "r", "sketch", "objectnet", "a")

PLACES = {
    "train": ("train", "imagenet/train", "imagenet2012_train", "imagenet2012"),
    "validation": ("val", "imagenet/val", "imagenet2012_validation", "imagenet2012"),
    "v2": (
        "imagenetv2-matched-frequency-format-val",
        "imagenetv2-matched-frequency",
        "imagenet_v2/matched-frequency",
        "imagenet_v2",
    ),
    "r": ("imagenet-r", "imagenet_r"),
    "sketch": ("imagenet-sketch", "sketch", "imagenet_sketch"),
    "objectnet": ("objectnet-1.0", "objectnet"),
    "a": ("imagenet-a", "imagenet_a"),
    "real": ("real.json", "imagenet2012_real"),
}
"""Where each set is looked for below `data.root`; the first that is there is taken."""


def places(config: ConfigDict) -> dict[str, Path | None]:
    """Where each set that a config asks for lies, None where it was not found.

    Args:
      config: the `data` group of `configs/default.py`.

    Raises:
      UserError: a name that is no set's.
    """
    if unknown := [name for name in config.shifts if name not in SHIFTS]:
        raise UserError(f"data.shifts: no shift {unknown[0]!r}; ImageNet's are {', '.join(SHIFTS)}")
    names = ["train", "validation", *(config.shifts or SHIFTS), *["real"] * bool(config.real)]
    return {name: _place(config, name) for name in names}


def _place(config: ConfigDict, name: str) -> Path | None:
    root = Path(config.root).expanduser()
    named = config.paths.get(name)
    found = (root / place for place in ([named] if named else PLACES[name]))
    return next((path for path in found if path.exists()), None)


def missing_sets(config: ConfigDict) -> list[str]:
    """One line for each set that is asked for and is not there."""
    return [
        f"data.paths.{name}={config.paths[name]}: nothing there"
        if config.paths.get(name)
        else f"no {' or '.join(PLACES[name])} in data.root={config.root}; "
        f"give --config.data.paths.{name}=PATH"
        + (", or leave it out of data.shifts" if name in SHIFTS else "")
        for name, place in places(config).items()
        if place is None
    ]
