"""What a study starts from: a CLIP, or a tower that is pretrained with labels when first named."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax.clip.preprocessor import Preprocessor
from modelstock_jax.clip.transformer import Compute
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.glyphs.pretraining import broad_set
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.pretrained import open_anchor
from modelstock_jax.studies.work.tree_file import read_tree, write_tree
from modelstock_jax.studies.work.turns import claim
from modelstock_jax.tensor_files.writer import new_directory
from modelstock_jax.towers import tower
from modelstock_jax.training.classifier import Classifier, anchor_classifier
from modelstock_jax.training.finetune import alone, finetuning_programs, finetuning_trainer

PyTree = Any
PREFIX = "tower:"
# How a tower is pretrained; chosen before any was fine-tuned.
NUM_IMAGES = 20_480
RECIPE = {
    "objective.name": "cross_entropy",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 2e-3,
    "optimizer.weight_decay": 0.05,
    "optimizer.warmup_fraction": 0.05,
    "epochs": 12,
    "batch_size": 256,
}


def opener(config: ConfigDict) -> Callable[[Benchmark, Path], Classifier]:
    """(data, workdir) -> the anchor that `config.pretrained` names: a CLIP, or `tower:NAME`.

    Raises:
      UserError: if there is no such model, or a tower is to see other images than the glyphs.
    """
    name = config.pretrained
    if not name.startswith(PREFIX):
        checkpoint = open_anchor(config)
        return lambda data, workdir: anchor_classifier(config, checkpoint, data, workdir / "heads")
    if config.data.name != "glyphs":
        raise UserError(
            f"pretrained={name}: towers are pretrained on the glyphs' broad world; "
            f"data.name={config.data.name!r} needs a CLIP"
        )
    tower.tower(name.removeprefix(PREFIX))
    return partial(_tower, config)


def _tower(config: ConfigDict, data: Benchmark, workdir: Path) -> Classifier:
    name = config.pretrained
    architecture = name.removeprefix(PREFIX)
    start = Classifier(
        params=tower.init(architecture, len(data.class_names), jax.random.key(0)),
        apply=tower.classifier(architecture, Compute.of(config.compute)),
        normalize=Preprocessor((0.5,) * 3, (0.25,) * 3, tower.IMAGE_SIZE),
        num_heads=tower.TOWERS[architecture].num_heads,
    )
    path = workdir / "towers" / architecture / "model.safetensors"
    with claim(workdir / "locks", f"tower-{architecture}", wait=True):
        if not path.is_file():
            params = _pretrain(config, start, data, workdir, name)
            with new_directory(path.parent) as beside:
                write_tree(beside / path.name, params)
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
    return dataclasses.replace(start, params=read_tree(path), fingerprint=fingerprint)


def _pretrain(
    config: ConfigDict, start: Classifier, data: Benchmark, workdir: Path, name: str
) -> PyTree:
    one = alone(config)
    one.update_from_flattened_dict(RECIPE)
    one.seed = 0
    broad = dataclasses.replace(data, train=broad_set(NUM_IMAGES))
    programs = finetuning_programs(one, start, broad)
    place, title = name.replace(":", "_"), f"{name}: pretraining"
    trainer = finetuning_trainer(one, start, broad, programs, workdir, place, title=title)
    return jax.tree.map(lambda x: x[0], jax.device_get(trainer.run().state.params))
