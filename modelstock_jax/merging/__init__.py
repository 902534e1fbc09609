"""Merging of fine-tuned weights: section 3 of the paper.

| module | contents |
|---|---|
| `geometry` | cosine, ratio (equations 2 and 3), predicted distances, shells, from a Gram matrix |
| `rules` | merge rules: from a Gram matrix to coefficients |
| `units` | merge units: which elements share an angle |
| `attention_names` | names of attentions and blocks |
| `tensor_roles` | role and depth of a tensor, for reports and figures |
| `gram` | the two passes over a tensor |
| `trees` | stacking of replicas; names of the leaves; checks of the trees |
| `engine` | the engine of every merge |
| `stats` | measures of a merge, reports, check for NaN and infinity |
| `summaries` | short texts of states and statistics |
| `placement` | devices and shardings of the arrays |
| `stock` | `model_stock` and its extensions |
| `baselines` | other merge methods: mean, WiSE-FT, task arithmetic, TIES, SLERP |
| `trimming` | TIES on the weights |
| `averaging` | averages along one run: EMA, SWA, SWAD, with given weights |
| `run_weights` | weights of the checkpoints of one run: EMA, learning-rate decay |
| `twa` | trainable weight averaging |
| `dare` | DARE |
| `single_model` | MonoSoup and LiNeS |
| `update_scaling` | factors of MonoSoup and LiNeS |
| `philox` | random numbers of elements |
| `spherical` | means on a sphere |
| `soups` | greedy soup |
| `analysis` | angles, norms, distances, planes and shells of models |
| `anchor_rounding` | correction for an anchor in a coarser dtype |

Names are imported on first use, because the command line needs `units` and `geometry` but must not
wait for the import of JAX.
"""

import importlib

from modelstock_jax.extras import require
from modelstock_jax.registry import FUNCTIONS

_EXPORTS = {
    "analysis": (
        "cosines",
        "distance",
        "distances",
        "mean_model",
        "norms",
        "thin_shell",
        "Plane",
        "plane_coordinates",
        "plane_point",
        "plane_through",
        "random_point",
    ),
    "averaging": (
        "Average",
        "ema",
        "swa",
        "SWAD",
        "swad",
        "weighted_average",
    ),
    "geometry": (
        "COSINE_UNDEFINED",
        "DISTANCE_UNDEFINED",
        "Distances",
        "Shell",
        "angle",
        "cosine",
        "mean_distance",
        "num_averaged",
        "predicted_distances",
        "ratio",
        "shell",
        "squared_norms",
        "true_distance",
    ),
    "trees": ("stack_replicas",),
    "run_weights": ("decay_weights", "ema_weights"),
    "twa": ("TWASubspace", "twa_coefficients", "twa_init", "twa_params", "twa_span"),
    "rules": ("NonFiniteError", "UnitOutcome"),
    "soups": ("GreedySoup", "Trial", "greedy_soup"),
    "stats": ("Stats", "check_finite", "outcome_counts", "report", "total_distance"),
    # The module is not named model_stock.py: it would hide the function of this name.
    "stock": ("init_noise",),
    "units": ("UNITS", "assign", "joined", "output_axis"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
_MODULE_OF |= {name: method.module for name, method in FUNCTIONS.items()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    except ModuleNotFoundError:
        require("jax")
        raise


def __dir__():
    return __all__
