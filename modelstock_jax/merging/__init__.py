"""Merging of fine-tuned weights: the paper's section 3.

Names are resolved when first used: units and the ratio algebra need no JAX, and a command line
must not wait for its import.
"""

import importlib

from modelstock_jax.registry import FUNCTIONS

_HOMES = {
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
        "TWASubspace",
        "twa_coefficients",
        "twa_init",
        "twa_params",
        "twa_span",
    ),
    "engine": ("Stats", "check_finite", "outcome_counts", "report", "total_distance"),
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
    "gram": ("stack_replicas",),
    "rules": ("NonFiniteError", "UnitOutcome"),
    "soups": ("GreedySoup", "Trial", "greedy_soup"),
    # Not model_stock.py: a submodule would take the function's name in this package.
    "stock": ("init_noise",),
    "units": ("UNITS", "assign", "output_axis"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_HOME |= {name: method.module for name, method in FUNCTIONS.items()}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return __all__
