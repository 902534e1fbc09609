"""Model Stock in JAX: fine-tune a few copies of a pretrained model, merge them toward their centre.

The public names are resolved when they are first used: `import modelstock_jax` does not import jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MERGING = "modelstock_jax.merging"
_HOME = {
    "Distances": _MERGING,
    "NonFiniteError": _MERGING,
    "Policy": _MERGING,
    "Stats": _MERGING,
    "UserError": "modelstock_jax.errors",
    "check_finite": _MERGING,
    "constant_ratio": _MERGING,
    "model_stock": _MERGING,
    "model_stock_carried": _MERGING,
    "report": _MERGING,
    "stack_replicas": _MERGING,
    "total_distance": _MERGING,
    "uniform_mean": _MERGING,
    "weighted_model_stock": _MERGING,
    "wise_ft": _MERGING,
    "zero_noise": _MERGING,
}

__all__ = [
    "Distances",
    "NonFiniteError",
    "Policy",
    "Stats",
    "UserError",
    "check_finite",
    "constant_ratio",
    "model_stock",
    "model_stock_carried",
    "report",
    "stack_replicas",
    "total_distance",
    "uniform_mean",
    "weighted_model_stock",
    "wise_ft",
    "zero_noise",
]

if TYPE_CHECKING:  # For editors and type checkers, which do not run __getattr__.
    from modelstock_jax.errors import UserError
    from modelstock_jax.merging import (
        Distances,
        NonFiniteError,
        Policy,
        Stats,
        check_finite,
        constant_ratio,
        model_stock,
        model_stock_carried,
        report,
        stack_replicas,
        total_distance,
        uniform_mean,
        weighted_model_stock,
        wise_ft,
        zero_noise,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # So that the next look-up does not come here.
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
