"""ImageNet: its classes and prompts, and what its shifts keep of them."""

from modelstock_jax.data.imagenet.sets import (
    A_CLASSES,
    CLASS_NAMES,
    PUBLISHED,
    R_CLASSES,
    TEMPLATES,
    WNIDS,
    Published,
    class_indices,
    objectnet_classes,
    real_labels,
)

__all__ = [
    "A_CLASSES",
    "CLASS_NAMES",
    "PUBLISHED",
    "R_CLASSES",
    "TEMPLATES",
    "WNIDS",
    "Published",
    "class_indices",
    "objectnet_classes",
    "real_labels",
]
