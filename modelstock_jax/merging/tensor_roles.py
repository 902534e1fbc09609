"""Role of a tensor and its position in a model, from its name, for reports and figures.

Merge units do not depend on this module: its patterns accept more names than a unit may join. It
needs neither arrays nor JAX.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from os.path import commonprefix
from typing import NamedTuple

# Roles of tensors, in the order of tables and legends.
ROLES = ("attention", "MLP", "norms", "biases", "embeddings and head", "convolutions", "other")

# The first pattern that matches a name determines its role.
_ROLES = (
    (
        "norms",
        re.compile(
            r"(?i:norm)|(?:^|[._])ln(?:[._]|$)|ln_\w+|\bbn\d*\b|layer_scale|\bgrn\b|"
            r"downsampling_layer\.0\."
        ),
    ),
    ("biases", re.compile(r"bias$|_b$")),
    ("attention", re.compile(r"att(?:n|ention)|[._][qkv]_?proj|\bto_[qkv]\b|\bpool\.\w+_proj")),
    (
        "MLP",
        re.compile(r"mlp|feed_?forward|\bff\b|\bffn\b|fc\d|experts|dense|c_proj|c_fc|\bpwconv\d"),
    ),
    (
        "embeddings and head",
        re.compile(
            r"embed|wte|wpe|lm_head|classifier|projection|head|\bproj$|"
            r"\bpool\.probe$|^image_tower\.\w+_tokens?$|\bstem\.kernel"
        ),
    ),
    # Kernels of ConvNeXt and ResNet only: convolutions of other models are in "other".
    (
        "convolutions",
        re.compile(
            r"\bdwconv\.|\bdepthwise\.|\blayer\.\d+\.convolution|"
            r"\bshortcut\.(?:convolution|kernel)|\bblock_\d+\.conv\d|\bdownsampling_layer\.1\.|"
            r"\bdownsample_\d+\.conv\b"
        ),
    ),
)
# Takes any number as the block index. This is enough for figures, but too loose for merge units.
_BLOCK_INDEX = re.compile(r"(?P<tower>.*?)\.(?:block_)?(?P<block>\d+)(?:\.|$)")
# ConvNeXt and ResNet number their blocks from 0 in each stage.
_STAGE = re.compile(
    r"(?P<tower>(?:.*?\.)?stages)\.(?P<stage>\d+)\.(?:(?:layers|blocks)\.(?P<block>\d+)(?:\.|$))?"
)
# This project numbers a downsampling layer by the block that follows it.
_DOWNSAMPLING = re.compile(r"(?P<parent>(?:.*\.)?)downsample_(?P<block>\d+)\.")
_BEFORE_BLOCKS = re.compile(
    r"embed|wte|wpe|patch|conv1|conv_in|pre_l|ln_pre|class_token|time_|"
    r"\bmask_token|\bregister_tokens|\bstem\d*(?:_norm)?\.|\bshared\.weight|"
    r"\b(?:cls|reg|dist)_token|\bconv\d+\.|\bfeature_(?:extractor|projection)\b"
)
_AFTER_BLOCKS = re.compile(r"embed_out|unembed")


def role(name: str) -> str:
    """Return the role of a tensor (one of `ROLES`) from its name.

    Example:
      >>> role("model.layers.3.self_attn.q_proj.weight"), role("h.0.ln_1.weight")
      ('attention', 'norms')
      >>> role("encoder.layer.0.attention.output.LayerNorm.bias")
      'norms'
    """
    return next((role for role, pattern in _ROLES if pattern.search(name)), "other")


class BlockPosition(NamedTuple):
    """Position of a tensor in a model.

    Attributes:
      tower: name prefix of the tower
      depth: index of the block in the tower; -1 before the blocks, inf after them
    """

    tower: str
    depth: float


def block_position(names: Sequence[str], in_blocks: Collection[str] = ()) -> list[BlockPosition]:
    """Return the tower (the name before the first number) and the block index of each tensor.

    The index runs through all stages of a ConvNeXt or a ResNet; a downsampling layer has that of
    the block after it. A tensor without a number is placed before or after the blocks of the tower
    with the longest common name prefix.

    Args:
      names: names of all tensors of a model
      in_blocks: names of tensors that are in a block for certain; if there are any, other numbers
        than those of their towers (`classifier.0`) are no blocks

    Returns:
      one `BlockPosition` per tensor, in order

    Example:
      >>> names = ["model.embed.weight", "model.layers.0.w", "model.layers.1.w", "model.norm.w"]
      >>> [p.depth for p in block_position(names)]
      [-1.0, 0.0, 1.0, inf]
      >>> names = [f"stages.{stage}.layers.{layer}.w" for stage in (0, 1) for layer in (0, 1)]
      >>> [p.depth for p in block_position(names)]
      [0.0, 1.0, 2.0, 3.0]
    """
    numbered = _numbered(names)
    blocks = defaultdict(set)
    certain = {p.tower for p, name in zip(numbered, names, strict=True) if p and name in in_blocks}
    for position in filter(None, numbered):
        if not certain or position.tower in certain:
            blocks[position.tower].add(position.depth)
    towers = [tower for tower, indices in blocks.items() if len(indices) > 1] or list(blocks)
    return [
        position
        if position is not None and position.tower in towers
        else _without_number(name, towers)
        for name, position in zip(names, numbered, strict=True)
    ]


def _numbered(names: Sequence[str]) -> list[BlockPosition | None]:
    """Return the position of each tensor whose name contains the number of a block, else None."""
    stages = [_STAGE.match(name) for name in names]
    sizes: dict[str, Counter] = defaultdict(Counter)  # tower -> stage -> number of blocks
    for match in stages:
        if match and match["block"]:
            size = sizes[match["tower"]]
            size[int(match["stage"])] = max(size[int(match["stage"])], int(match["block"]) + 1)
    positions: list[BlockPosition | None] = []
    for name, match in zip(names, stages, strict=True):
        if match and match["tower"] in sizes:
            stage, tower = int(match["stage"]), match["tower"]
            before = sum(size for other, size in sizes[tower].items() if other < stage)
            positions.append(BlockPosition(tower, float(before + int(match["block"] or 0))))
        elif match := _BLOCK_INDEX.match(name):
            positions.append(BlockPosition(match["tower"], float(match["block"])))
        else:
            positions.append(None)
    return positions


def _without_number(name: str, towers: Sequence[str]) -> BlockPosition:
    """Return the position of a tensor that is in no block."""
    if match := _DOWNSAMPLING.match(name):
        if (tower := f"{match['parent']}blocks") in towers:
            return BlockPosition(tower, float(match["block"]))
    nearest = max(towers, key=lambda tower: len(commonprefix((tower, name))), default="")
    is_before = _BEFORE_BLOCKS.search(name) and not _AFTER_BLOCKS.search(name)
    return BlockPosition(nearest, -1.0 if is_before else math.inf)
