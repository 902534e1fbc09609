"""ImageNet: its classes and prompts, and what its shifts keep of them."""

from modelstock_jax.data.imagenet.classes import (
    A_CLASSES,
    CLASS_NAMES,
    R_CLASSES,
    TEMPLATES,
    WNIDS,
    class_indices,
)
from modelstock_jax.data.imagenet.objectnet import objectnet_classes
from modelstock_jax.data.imagenet.published import PUBLISHED, Published
from modelstock_jax.data.imagenet.real import real_labels

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
