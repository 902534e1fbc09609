"""Where a tensor stands in its network and what it does there, by its name."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from os.path import commonprefix
from typing import NamedTuple

# In the order of tables and legends.
ROLES = ("attention", "MLP", "norms", "biases", "embeddings and head", "other")
_BLOCK = re.compile(r"(?P<tower>.*?)\.(?:block_)?(?P<block>\d+)(?:\.|$)")
_BEFORE = re.compile(r"embed|wte|wpe|patch|conv1|conv_in|pre_l|ln_pre|class_token|time_")

_PATTERNS = (
    ("norms", re.compile(r"norm|(?:^|[._])ln(?:[._]|$)|ln_\w+|\bbn\d*\b|layer_scale")),
    ("biases", re.compile(r"bias$|_b$")),
    ("attention", re.compile(r"att(?:n|ention)|[._][qkv]_?proj|\bto_[qkv]\b")),
    ("MLP", re.compile(r"mlp|feed_?forward|\bff\b|\bffn\b|fc\d|experts|dense|c_proj|c_fc")),
    (
        "embeddings and head",
        re.compile(r"embed|wte|wpe|lm_head|classifier|projection|head|\bproj$"),
    ),
)
# At the end of a network: a block's number before it is another layer's.
_CLASSIFIER = re.compile(
    r"(?!.*\.\d+\..*)(?:.*[./])?(?:\w*classifi\w*|score|heads?|fc|qa_outputs|last_linear|"
    r"pre_logits|logits)\.(?:.*\.)?(?:weight|bias)|(?:.*\.)?classifier\.\d+\.(?:weight|bias)|"
    r"head\.safetensors:.*"
)


class Place(NamedTuple):
    """A tensor's tower, and its depth there."""

    tower: str
    depth: float  # the block's number; -1 before the blocks, inf after them


def place(names: Sequence[str]) -> list[Place]:
    """Gives each tensor its tower (what stands before the first number) and its block there.

    A tensor with no number goes before or after the blocks of the tower whose name is most alike.

    Args:
      names: of all tensors of a model.

    Returns:
      A `Place` for each, in order.

    Example:
      >>> names = ["model.embed.weight", "model.layers.0.w", "model.layers.1.w", "model.norm.w"]
      >>> [p.depth for p in place(names)]
      [-1.0, 0.0, 1.0, inf]
    """
    found = [_BLOCK.match(name) for name in names]
    blocks = defaultdict(set)
    for match in found:
        if match:
            blocks[match["tower"]].add(match["block"])
    towers = [tower for tower, numbers in blocks.items() if len(numbers) > 1] or list(blocks)
    places = []
    for name, match in zip(names, found, strict=True):
        if match and match["tower"] in towers:
            places.append(Place(match["tower"], float(match["block"])))
        else:
            nearest = max(towers, key=lambda tower: len(commonprefix((tower, name))), default="")
            places.append(Place(nearest, -1.0 if _BEFORE.search(name) else math.inf))
    return places


def role(name: str) -> str:
    """What a tensor does: attention, MLP, norms, biases, ..., by its name.

    Example:
      >>> role("model.layers.3.self_attn.q_proj.weight"), role("h.0.ln_1.weight")
      ('attention', 'norms')
    """
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")


def is_classifier(name: str) -> bool:
    """Whether a name is that of a classification head.

    Example:
        >>> is_classifier("head.safetensors:weight"), is_classifier("vit.encoder.layer.0.fc.weight")
        (True, False)
    """
    return _CLASSIFIER.fullmatch(name) is not None
