"""The merged model as directories that other programs open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.models import checkpoint_io, formats
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.formats import HuggingFace
from modelstock_jax.reporting.model_card import model_card

PyTree = Any


def check(config: ConfigDict, pretrained: Checkpoint) -> None:
    """Asks every layout of `config.export.layouts` whether it can hold the model, weights unseen.

    Raises:
      UserError: if a layout is not known or cannot; before anything is trained.
    """
    for layout in _layouts(config):
        try:
            formats.writable(layout).describe(pretrained)
        except UserError as error:
            raise UserError(f"export.layouts: {error}") from None


def export(
    directory: Path,
    config: ConfigDict,
    pretrained: Checkpoint,
    params: PyTree,
    class_names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, Mapping[str, float]] | None,
    command: str,
) -> None:
    """Writes merged weights with head, labels, tokenizer and a model card.

    Args:
      directory: of Hugging Face's layout; every other that `config.export.layouts` names is written
        beside it, in `directory`_LAYOUT. Each is written whole or not at all, and left alone where
        it exists.
      config: the run's options.
      pretrained: the anchor; the text tower and the tokenizer are taken from it.
      params: {"image_tower", "head"}, merged; NumPy arrays.
      class_names: of the head.
      rows: results of this model and of the anchor, for the card.
      ratios: `figures.ratio_summary` of the last merge, or None.
      command: how the run was started.
    """
    card = model_card(
        name=f"{config.pretrained}, fine-tuned on {_data(config)}",
        method=rows[-1]["method"],
        anchor=config.pretrained,
        fingerprint=pretrained.fingerprint,
        num_replicas=config.num_replicas,
        unit=config.merge.unit,
        rows=rows,
        ratios=ratios,
        command=command,
    )
    checkpoint = pretrained.with_replica(params, tuple(class_names))
    for layout in _layouts(config):
        place = directory
        if layout != HuggingFace.name:
            place = directory.with_name(f"{directory.name}_{layout}")
        if not place.exists():
            checkpoint_io.save(place, checkpoint, layout=layout, texts={"README.md": card})


def _data(config: ConfigDict) -> str:
    """What it was fine-tuned on, by name; of anyone's own images, their directory's."""
    data = config.data
    return Path(data.root).name if data.name == "folder" else data.name


def _layouts(config: ConfigDict) -> list[str]:
    return list(dict.fromkeys((HuggingFace.name, *config.export.layouts)))
