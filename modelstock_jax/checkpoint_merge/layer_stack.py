"""Models that consist of layers of other models: the slices of a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelstock_jax.checkpoint_merge.consistency import config_disagreements
from modelstock_jax.checkpoint_merge.hf_config import flat, read_config
from modelstock_jax.checkpoint_merge.sources import Source
from modelstock_jax.checkpoint_merge.token_ids import read_vocabulary
from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging.tensor_roles import block_position

# Keys of config.json that contain the number of layers.
_NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# Keys that select layers by their number: with other numbers they may mean other layers.
_BY_NUMBER = re.compile(
    r"first_k_dense_replace|num_dense_layers|decoder_sparse_step|encoder_sparse_step|"
    r"max_window_layers|(?:prefix_dense_)?sliding_window_pattern|full_attention_interval|"
    r"\w*layer_(?:period|offset|freq|step|interval|start_index|end_index|indices|ids)|"
    r"\w*every_n_layers|cross_attention_layers|moe_layers|mlp_only_layers|attn_layers|"
    r"num_kv_shared_layers|cross_layer_interval"
)


class Layers(NamedTuple):
    """A range of layers of an opened model.

    Attributes:
      source: the model
      start: first layer
      stop: end
    """

    source: Source
    start: int
    stop: int


class _Stack(NamedTuple):
    """The tensors of a model by their place.

    Attributes:
      prefix: name of the layers' tensors up to the number
      layers: of each layer: name after the number -> complete name
      before: names of the tensors before the layers
      after: names of the tensors after them
    """

    prefix: str
    layers: list[dict[str, str]]
    before: list[str]
    after: list[str]


class StackedSource(Source):
    """Layers of other models, numbered from 0, as one model.

    Tensors before the layers (embeddings) are those of the first range's model, tensors after them
    (final norm, head) those of the last one's. The config is the first one's, with the new number
    of layers.

    Args:
      ranges: the layers, in order

    Raises:
      UserError: a model has no such layers, or the models do not fit together
    """

    def __init__(self, ranges: Sequence[Layers]):
        self.parts = tuple(dict.fromkeys(part.source for part in ranges))
        first = self.parts[0]
        self.label = ", ".join(f"{part.source.label}[{part.start}:{part.stop}]" for part in ranges)
        self.directory, self.components = first.directory, first.components
        self.notes = [note for part in self.parts for note in part.notes]
        self.ranges = tuple(ranges)
        self.derivation = [
            [self.parts.index(part.source), part.start, part.stop] for part in ranges
        ]
        stacks = {part: _stack(part) for part in self.parts}
        self._origin: dict[str, tuple[Source, str]] = {}
        last = ranges[-1].source
        self._origin |= {name: (first, name) for name in stacks[first].before}
        self._origin |= {name: (last, name) for name in stacks[last].after}
        self.num_layers = 0
        for part in ranges:
            self._add_layers(part, stacks[part.source], stacks[first].prefix)
        self.tensors = {name: s.tensors[stored] for name, (s, stored) in self._origin.items()}
        self.formed = frozenset(n for n, (s, stored) in self._origin.items() if stored in s.formed)
        is_alone = len(self.parts) == 1
        self.aliases = {
            name: stored
            for name, stored in (first.aliases if is_alone else {}).items()
            if self._origin.get(stored) == (first, stored)
        }
        for part in self.parts[1:]:
            _check_fit(first, part, stacks)
        _check_tokens(first, last)
        self._check_config(stacks[first])

    def _add_layers(self, part: Layers, stack: _Stack, prefix: str) -> None:
        if part.stop > len(stack.layers):
            raise UserError(
                f"layer_range [{part.start}, {part.stop}]: {part.source.label} has "
                f"{len(stack.layers)} layers"
            )
        for layer in stack.layers[part.start : part.stop]:
            for suffix, name in layer.items():
                self._origin[f"{prefix}{self.num_layers}{suffix}"] = part.source, name
            self.num_layers += 1

    def _check_config(self, stack: _Stack) -> None:
        """Check that the config does not depend on the number of a layer."""
        config = flat(read_config(self.directory) or {})
        lists = [
            key for key, value in config.items() if isinstance(value, list) and _per_layer(key)
        ]
        if len({frozenset(layer) for layer in stack.layers}) > 1 and not lists:
            raise UserError(
                f"slices: the layers of {self.parts[0].label} have different tensors, and its "
                "config does not list their kinds; such models cannot be sliced"
            )
        by_number = [key for key, x in config.items() if x and _selects_layers(key, config)]
        if by_number:
            self.notes.append(
                f"{self.label}: check {listed(by_number, 4)} in config.json, which selects layers "
                "by their number in the original model"
            )

    @property
    def tokenizer_directory(self) -> Path | None:
        """The directory of the tokenizer: that of the first model."""
        return self.parts[0].tokenizer_directory

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        return tuple(dict.fromkeys(path for part in self.parts for path in part.files))

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read elements [start, stop), as `Source.read`."""
        source, stored = self._origin[name]
        return source.read(stored, start, stop, out)

    def stored_dtype(self, name: str) -> np.dtype:
        """Return the dtype in which a tensor is stored."""
        source, stored = self._origin[name]
        return source.stored_dtype(stored)

    def half_ulp_squares(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return the maximum squared rounding error of the elements [start, stop), float64."""
        source, stored = self._origin[name]
        return source.half_ulp_squares(stored, start, stop)

    def note(self, name: str, start: int, values: np.ndarray) -> None:
        """Do nothing: not all layers of a file are read, or some of them twice."""

    def watch(self) -> None:
        """Do nothing: `checksums` reads the files."""

    def checksums(self, kind: str = "crc32") -> dict[str, str]:
        """Return the checksum of each file of each model."""
        if len(self.parts) == 1:
            return self.parts[0].checksums(kind)
        return {
            f"{part.label}: {path}": checksum
            for part in self.parts
            for path, checksum in part.checksums(kind).items()
        }

    def config_values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of a config that depend on the layers, with their new values.

        Args:
          config: config of the first model
        """
        values: dict[str, Any] = {}
        own = flat(config)
        number = next((own[key] for key in own if _is_number(key)), None)
        for key, value in own.items():
            if _is_number(key) and value == number:
                values[key] = self.num_layers
            elif isinstance(value, list) and len(value) == number and _per_layer(key):
                values[key] = self._rearranged(key)
        return {key: value for key, value in values.items() if value != own[key]}

    def _rearranged(self, key: str) -> list[Any]:
        """Return a list of the config with one entry per layer, for the layers of this model."""
        entries: list[Any] = []
        for part in self.ranges:
            config = flat(read_config(part.source.directory) or {})
            entries += config.get(key, [])[part.start : part.stop]
        if len(entries) != self.num_layers:
            raise UserError(f"slices: not every model has {key} in its config for all layers")
        return entries


def stacked(ranges: Sequence[Layers]) -> Source:
    """Return a model of the layers; the model itself if these are all its layers in order."""
    source = ranges[0].source
    numbers = [i for part in ranges for i in range(part.start, part.stop)]
    if all(part.source is source for part in ranges):
        if numbers == list(range(len(_stack(source).layers))):
            return source
    return StackedSource(ranges)


def _stack(source: Source) -> _Stack:
    names = list(source.tensors)
    positions = block_position(names)
    towers = sorted({p.tower for p in positions if math.isfinite(p.depth) and p.depth >= 0})
    if len(towers) != 1:
        found = f"it has {listed(towers, 4)}" if towers else "it has none"
        raise UserError(f"{source.label}: slices require one stack of layers; {found}")
    pattern = re.compile(rf"({re.escape(towers[0])}\.(?:block_)?)(\d+)(.*)")
    layers: dict[int, dict[str, str]] = {}
    prefix = ""
    for name, position in zip(names, positions, strict=True):
        if not 0 <= position.depth < math.inf:
            continue
        match = pattern.fullmatch(name)
        if match is None or int(match[2]) != position.depth:
            raise UserError(f"{source.label}: slices require layers that are numbered from 0")
        prefix = match[1]
        layers.setdefault(int(match[2]), {})[match[3]] = name
    if sorted(layers) != list(range(len(layers))):
        raise UserError(f"{source.label}: slices require layers that are numbered from 0")
    pairs = list(zip(names, positions, strict=True))
    return _Stack(
        prefix,
        [layers[i] for i in range(len(layers))],
        [name for name, position in pairs if position.depth < 0],
        [name for name, position in pairs if position.depth == math.inf],
    )


def _check_fit(first: Source, part: Source, stacks: Mapping[Source, _Stack]) -> None:
    """Check that two models have the same tensors around the layers, shapes and config."""

    def shapes(source: Source) -> dict[str, tuple[int, ...]]:
        stack = stacks[source]
        layers = {suffix: name for layer in stack.layers for suffix, name in layer.items()}
        named = layers | {name: name for name in (*stack.before, *stack.after)}
        return {key: source.tensors[name].shape for key, name in named.items()}

    ours, theirs = shapes(first), shapes(part)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            pair = (list(x[key]) if key in x else "missing" for x in (ours, theirs))
            values = " and ".join(str(x) for x in pair)
            raise UserError(
                f"slices: {key.lstrip('.')} is {values} in {first.label} and {part.label}; their "
                "layers do not fit together"
            )
    # The number of layers and the kind of each layer are written for the layers of this model.
    different = [
        key
        for key in config_disagreements(first, part)
        if not _is_number(key) and not _per_layer(key)
    ]
    if different:
        raise UserError(
            f"slices: the configs of {first.label} and {part.label} differ in "
            f"{listed(different, 4)}; their layers do not fit together"
        )


def _check_tokens(first: Source, last: Source) -> None:
    """Check that the rows of the embedding and of the head, of two models, mean the same tokens."""
    directories = first.tokenizer_directory, last.tokenizer_directory
    if first is last or None in directories:
        return
    ours, theirs = (read_vocabulary(path) for path in directories if path is not None)
    for i in sorted(ours.keys() & theirs.keys()):
        if ours[i] != theirs[i]:
            raise UserError(
                f"slices: the tokenizers disagree: id {i} is {ours[i]!r} in {first.label}, whose "
                f"embedding is written, and {theirs[i]!r} in {last.label}, whose head is written; "
                "end with a slice of the first model"
            )


def _is_number(key: str) -> bool:
    return key.rpartition(".")[2] in _NUM_LAYERS


def _selects_layers(key: str, config: Mapping[str, Any]) -> bool:
    """Return whether a key of a config selects layers by their number."""
    last = key.rpartition(".")[2]
    if last == "max_window_layers" and config.get("use_sliding_window") is False:
        return False
    return _BY_NUMBER.fullmatch(last) is not None


def _per_layer(key: str) -> bool:
    """Return whether a list of a config has one entry per layer."""
    last = key.rpartition(".")[2]
    is_named = "layer" in last or "block" in last or last.endswith("_pattern")
    return is_named and _BY_NUMBER.fullmatch(last) is None
