"""The merged model as a directory that other programs open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.clip import weights
from modelstock_jax.clip.checkpoint import Checkpoint
from modelstock_jax.reporting.model_card import model_card

PyTree = Any


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
    """Writes merged weights in Hugging Face's layout, with head, labels and a model card.

    Args:
      directory: written whole or not at all; left alone where it exists.
      config: the run's options.
      pretrained: the anchor; the text tower and the tokenizer are taken from it.
      params: {"image_tower", "head"}, merged.
      class_names: of the head.
      rows: results of this model and of the anchor, for the card.
      ratios: `layers.ratio_summary` of the last merge, or None.
      command: how the run was started.
    """
    if directory.exists():
        return
    merged = jax.tree.map(np.asarray, jax.device_get(params))
    card = model_card(
        name=f"{config.pretrained}, fine-tuned on {config.data.name}",
        method=rows[-1]["method"],
        anchor=config.pretrained,
        fingerprint=pretrained.fingerprint,
        num_replicas=config.num_replicas,
        unit=config.merge.unit,
        rows=rows,
        ratios=ratios,
        command=command,
    )
    weights.save(
        directory, pretrained.with_replica(merged, tuple(class_names)), texts={"README.md": card}
    )
