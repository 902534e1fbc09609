"""Model Stock in JAX: fine-tune copies of a pretrained model, and merge them toward their center.

    merged, stats = model_stock(pretrained, stack_replicas([finetuned_a, finetuned_b]))

accepts any pytrees of weights. docs/library.md describes all methods. `modelstock merge` merges
checkpoint files, and `python launch.py` trains the copies.

Public names are imported on first use: `import modelstock_jax` does not import JAX.
"""

from typing import TYPE_CHECKING, Any

from modelstock_jax import merging
from modelstock_jax.errors import UserError
from modelstock_jax.registry import FUNCTIONS

if TYPE_CHECKING:  # editors and type checkers do not run __getattr__
    from modelstock_jax.merging import (
        Average,
        Distances,
        GreedySoup,
        NonFiniteError,
        Stats,
        UnitOutcome,
        check_finite,
        decay_weights,
        ema,
        ema_weights,
        greedy_soup,
        init_noise,
        report,
        stack_replicas,
        swa,
        swad,
        thin_shell,
        total_distance,
        twa_coefficients,
        twa_init,
        twa_params,
        twa_span,
        weighted_average,
    )
    from modelstock_jax.merging.baselines import *  # noqa: F403
    from modelstock_jax.merging.stock import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "Average",
    "Distances",
    "GreedySoup",
    "NonFiniteError",
    "Stats",
    "UnitOutcome",
    "UserError",
    "check_finite",
    "decay_weights",
    "ema",
    "ema_weights",
    "greedy_soup",
    "init_noise",
    "report",
    "stack_replicas",
    "swa",
    "swad",
    "thin_shell",
    "total_distance",
    "twa_coefficients",
    "twa_init",
    "twa_params",
    "twa_span",
    "weighted_average",
]
__all__ += FUNCTIONS


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(merging, name)
    globals()[name] = value  # later lookups skip __getattr__
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
