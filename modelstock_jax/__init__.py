"""Model Stock in JAX: fine-tune a few copies of a pretrained model, merge them toward their centre.

The public names are resolved when they are first used: `import modelstock_jax` does not import jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "MergeStats": "modelstock_jax.merging",
    "NonFiniteError": "modelstock_jax.merging",
    "UserError": "modelstock_jax.errors",
    "check_finite": "modelstock_jax.merging",
    "constant_ratio": "modelstock_jax.merging",
    "model_stock": "modelstock_jax.merging",
    "model_stock_carried": "modelstock_jax.merging",
    "report": "modelstock_jax.merging",
    "stack_replicas": "modelstock_jax.merging",
    "total_distance": "modelstock_jax.merging",
    "uniform_mean": "modelstock_jax.merging",
    "weighted_model_stock": "modelstock_jax.merging",
    "wise_ft": "modelstock_jax.merging",
}

__all__ = [
    "MergeStats",
    "NonFiniteError",
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
]

if TYPE_CHECKING:  # For editors and type checkers, which do not run __getattr__.
    from modelstock_jax.errors import UserError
    from modelstock_jax.merging import (
        MergeStats,
        NonFiniteError,
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
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # So that the next look-up does not come here.
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
