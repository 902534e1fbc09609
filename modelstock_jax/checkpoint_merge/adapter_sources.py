"""Open the LoRA adapters that are merged into one adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from modelstock_jax.checkpoint_merge.lora import CONFIG, WEIGHTS, Adapter, is_adapter
from modelstock_jax.checkpoint_merge.sources import (
    PATTERNS,
    TOKENIZERS,
    AdaptedSource,
    Source,
    open_source,
)
from modelstock_jax.checkpoint_merge.tensor_names import TensorInfo, renames
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.checksums import checksum_file
from modelstock_jax.tensor_files.hub import resolve


class AdapterSource(Source):
    """A LoRA adapter as an input of a merge into an adapter: its factors, without a base.

    Args:
      label: the text that the user typed
      adapter: the opened adapter
      notes: notes about this input for the report

    Attributes:
      adapter: the opened adapter
    """

    def __init__(self, label: str, adapter: Adapter, notes: Sequence[str] = ()):
        self.label, self.adapter = label, adapter
        self.directory: Path | None = adapter.directory
        self.components: dict[str, str] = {"": "adapter_model"}
        self.aliases, self.tensors, self.formed = {}, {}, frozenset()
        self.notes = list(notes)

    @property
    def files(self) -> tuple[Path, ...]:
        """The two files of the adapter."""
        return (self.adapter.directory / WEIGHTS, self.adapter.directory / CONFIG)

    @property
    def tokenizer_directory(self) -> Path | None:
        """The directory of the adapter if it contains a tokenizer."""
        directory = self.adapter.directory
        return directory if any((directory / name).is_file() for name in TOKENIZERS) else None

    def watch(self) -> None:
        """Do nothing: adapters are small, so `checksums` reads them."""

    def checksums(self, kind: str = "crc32") -> dict[str, str]:
        """Return the checksums of the two files."""
        return {path.name: f"{kind}:{checksum_file(path, kind)}" for path in self.files}


def open_adapters(
    base: str | None, labels: Sequence[str], read_as: Callable[[Source], Source]
) -> tuple[Source | None, list[AdapterSource]]:
    """Open adapters, and check them against their base if it is given.

    With a base, the tensors of the adapters get the names of the base. Without one, they must have
    equal names in all adapters.

    Args:
      base: label of the base; None to merge without it
      labels: labels of the adapters: a directory, a hub id, or `BASE+ADAPTER`
      read_as: applied to the base as it is stored (`quantization.as_weights`)

    Returns:
      The base, if there is one, and the adapters.

    Raises:
      UserError: an input is no LoRA adapter, or does not fit the base or the other adapters
    """
    base = base or _shared_base(labels)
    if base is None:
        sources = [AdapterSource(label, Adapter(_directory(label, None))) for label in labels]
        _check_equal_names(sources)
        return None, sources
    path = Path(os.path.expanduser(base))
    if path.is_dir() and is_adapter(path):
        raise UserError(
            f"{base} is an adapter; pass the base first, or pass --no-base to merge only adapters"
        )
    opened = open_source(base, read_as=read_as)
    sources = []
    for label in labels:
        adapter = Adapter(_directory(label, base))
        # It checks names and shapes, and gives the tensors the names of the base.
        adapted = AdaptedSource(label, opened, adapter, shared_base=True)
        sources.append(AdapterSource(label, adapter, adapted.notes))
    return opened, sources


def _shared_base(labels: Sequence[str]) -> str | None:
    """Return MODEL if all labels are `MODEL+ADAPTER` with the same model, else None."""
    parts = [label.split("+") for label in labels if not os.path.exists(os.path.expanduser(label))]
    models = {first for first, *adapters in parts if adapters}
    is_shared = len(models) == 1 and len(parts) == len(labels)
    return models.pop() if is_shared and all(len(x) == 2 for x in parts) else None


def _directory(label: str, base: str | None) -> Path:
    """Return the directory of the adapter that a label names."""
    text = os.path.expanduser(label)
    model, *adapters = [text] if os.path.exists(text) else text.split("+")
    if adapters and (len(adapters) > 1 or base is None or model != os.path.expanduser(base)):
        raise UserError(
            f"{label}: --as-adapter requires one adapter of BASE; remove --as-adapter to write a "
            "complete model"
        )
    directory = resolve(os.path.expanduser(adapters[0]) if adapters else model, PATTERNS)
    if not (directory / CONFIG).is_file():
        raise UserError(
            f"{label}: no {CONFIG}; --as-adapter requires LoRA adapters, remove it to write a "
            "complete model"
        )
    return directory


def _check_equal_names(sources: Sequence[AdapterSource]) -> None:
    """Raise an error if two adapters probably name the same tensors by different prefixes."""
    first = _infos(sources[0])
    for source in sources[1:]:
        found = renames(first, _infos(source), partial=True)
        for name, other in found.names.items():
            if name.endswith(f".{other}") or other.endswith(f".{name}"):
                raise UserError(
                    f"{sources[0].label} and {source.label} have different names for tensors "
                    f"({name}, {other}); pass BASE, whose names they get"
                )


def _infos(source: AdapterSource) -> Mapping[str, TensorInfo]:
    return {name: TensorInfo(shape, "F32") for name, shape in source.adapter.shapes().items()}
