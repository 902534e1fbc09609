"""CIFAR-10 and CIFAR-100: their classes and prompts, and the sets on a disk."""

from modelstock_jax.data.cifar.sets import (
    CIFAR,
    TEMPLATES,
    Cifar,
    CifarSets,
    missing_sets,
    open_sets,
)

__all__ = ["CIFAR", "TEMPLATES", "Cifar", "CifarSets", "missing_sets", "open_sets"]
