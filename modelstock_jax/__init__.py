"""Model Stock in JAX: fine-tune a few copies of a pretrained model, merge them toward their centre.

    merged, stats = model_stock(pretrained, stack_replicas([finetuned_a, finetuned_b]))

takes any pytrees of weights; docs/library.md has each method, `modelstock merge` does it on files,
and `python launch.py` trains the copies.

The public names are resolved when they are first used: `import modelstock_jax` does not import jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Average",
    "Distances",
    "GreedySoup",
    "NonFiniteError",
    "Policy",
    "Stats",
    "UserError",
    "check_finite",
    "constant_ratio",
    "ema",
    "greedy_soup",
    "model_stock",
    "model_stock_carried",
    "report",
    "slerp",
    "stack_replicas",
    "swa",
    "swad",
    "task_arithmetic",
    "thin_shell",
    "ties",
    "total_distance",
    "twa_coefficients",
    "twa_init",
    "twa_params",
    "twa_span",
    "uniform_mean",
    "weighted_model_stock",
    "wise_ft",
    "zero_noise",
]

# Where each is defined; what the merges need is in one room.
_HOME = dict.fromkeys(__all__, "modelstock_jax.merging") | {"UserError": "modelstock_jax.errors"}

if TYPE_CHECKING:  # For editors and type checkers, which do not run __getattr__.
    from modelstock_jax.errors import UserError
    from modelstock_jax.merging import (
        Average,
        Distances,
        GreedySoup,
        NonFiniteError,
        Policy,
        Stats,
        check_finite,
        constant_ratio,
        ema,
        greedy_soup,
        model_stock,
        model_stock_carried,
        report,
        slerp,
        stack_replicas,
        swa,
        swad,
        task_arithmetic,
        thin_shell,
        ties,
        total_distance,
        twa_coefficients,
        twa_init,
        twa_params,
        twa_span,
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
