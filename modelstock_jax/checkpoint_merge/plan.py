"""What a merge will do, known from headers alone: tensors, files, bytes, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.merging.units import Part


class TensorInfo(Protocol):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    code: str


class Source(Protocol):
    """One model, as the engine sees it; `sources.open_source` makes them."""

    label: str  # as the user typed it
    directory: Path | None  # of config and tokenizer files
    tensors: dict[str, TensorInfo]
    num_bytes: int
    files: Sequence[Path]  # their sizes and times tell whether a killed merge may go on

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor; thread-safe."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """One tensor of the output.

    Attributes:
        name: Its name.
        shape: Of the output.
        code: Dtype that is written, as in a safetensors header.
        action: ``merge``, ``mean``, ``base`` or ``model:1`` (taken whole from the first fine-tune).
        reason: Why it is not merged by the rule; empty where it is.
        part: Its part in a merge unit, of the rows that are merged; None where it is not merged.
        rows: Rows (of axis 0) that are merged, where models differ in them; else None.
        rest: The model that gives the other rows: 0 the base, 1 the first fine-tune.
        names: The tensor's name in the base and in each fine-tune; None where it has none.
    """

    name: str
    shape: tuple[int, ...]
    code: str
    action: str
    reason: str = ""
    part: Part | None = None
    rows: int | None = None
    rest: int = 0
    names: tuple[str | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """A merge, before anything of it is done.

    Attributes:
        base: The anchor.
        finetuned: The models that are merged toward it.
        options: As asked.
        tensors: By name, sorted.
        shards: Names of the tensors of each output file.
        files: Name of each output file.
        bytes_read: Bytes of tensors that will be read, second passes included.
        bytes_written: Bytes of tensors that will be written.
        memory: Upper estimate of the process's peak, bytes.
        companion: The model whose config and tokenizer files are copied: 0 the base.
        config: Entries of config.json that the merge changes (``tie_word_embeddings``, ...).
        notes: What a user should know: tied weights, vocabulary, what is left out.
        fingerprint: Of inputs, options and tensors; a killed merge goes on only where it is equal.
    """

    base: Source
    finetuned: tuple[Source, ...]
    options: Options
    tensors: dict[str, Planned]
    shards: tuple[tuple[str, ...], ...]
    files: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    memory: int
    companion: int
    config: dict[str, object]
    notes: tuple[str, ...]
    fingerprint: str


def make_plan(base: Source, finetuned: Sequence[Source], options: Options) -> Plan:
    """Plans a merge of models, or says everything that stands in its way at once.

    Headers suffice but for integers (which must be equal everywhere to be copied) and weights that
    may be tied.

    Raises:
        UserError: All problems, one a line.
    """
    raise NotImplementedError
