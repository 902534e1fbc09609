"""Packages that a part of this project needs: an error names the extra that installs them.

The merge of files needs no extra. pyproject.toml lists the packages of each extra.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable

from modelstock_jax.errors import listed

# Imports of the library, and of a program that trains or evaluates, at their start. Packages that
# only some runs need are imported later.
_IMPORTS = {
    "jax": ("jax",),
    "train": (
        *("jax", "flax", "optax", "orbax", "grain", "ml_collections", "absl", "simplejpeg"),
        "PIL",
    ),
}
# What to install for training on a CPU; there is no release yet, so all are installed from a clone.
_INSTALL = {"train": "'.[cpu]' (NVIDIA GPU: cuda12 or cuda13 instead of cpu; TPU: tpu)"}


def require(extra: str, names: Iterable[str] = (), *, is_program: bool = False) -> None:
    """Raise an error if packages of an extra are missing.

    Args:
      extra: name of the extra in pyproject.toml
      names: names of the imports, if the caller does not need all of the extra
      is_program: end the process with one line instead of an exception. `python -m` always does.

    Raises:
      ImportError: a package is missing

    Example:
      >>> require("jax")
      >>> require("jax", ["jaxx"])
      Traceback (most recent call last):
      ...
      ImportError: not installed: jaxx; in a clone of modelstock_jax, run pip install -e '.[jax]'
    """
    missing = [name for name in names or _IMPORTS[extra] if importlib.util.find_spec(name) is None]
    if not missing:
        return
    what = _INSTALL.get(extra, f"'.[{extra}]'")
    message = (
        f"not installed: {listed(missing)}; in a clone of modelstock_jax, run pip install -e {what}"
    )
    # sys.argv[0] is -m while Python looks for the program, which imports the package around it.
    if is_program or sys.argv[:1] == ["-m"]:
        sys.exit(f"error: {message}")
    raise ImportError(message) from None
