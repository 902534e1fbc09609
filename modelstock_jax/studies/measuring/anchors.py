"""What a study starts from: a CLIP, or a tower that is pretrained with labels when it is needed."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.glyphs.captions import broad_set
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.pretrained import open_anchor
from modelstock_jax.models import tower
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.config import Preprocessor
from modelstock_jax.models.transformer import Compute
from modelstock_jax.studies.measuring.runs import digest, training_digest
from modelstock_jax.studies.measuring.tree_file import read_tree, write_tree
from modelstock_jax.studies.measuring.turns import claim
from modelstock_jax.tensor_files.writer import new_directory
from modelstock_jax.training.classifier import Classifier, anchor_classifier
from modelstock_jax.training.finetune import alone, finetuning_programs, finetuning_trainer

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


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A pretrained model that is loaded, or made, when its weights are first asked for.

    Attributes:
      outline: the model; its weights may be shapes alone.
      load: -> the model with its weights.
    """

    outline: Classifier
    load: Callable[[], Classifier]


def opener(config: ConfigDict) -> Callable[[Benchmark, Path], Anchor]:
    """(data, workdir) -> the anchor that `config.pretrained` names: a CLIP, or `tower:NAME`.

    Raises:
      UserError: if there is no such model, or a tower is to see other images than the glyphs.
    """
    name = config.pretrained
    if not name.startswith(PREFIX):
        checkpoint = open_anchor(config)
        return partial(_clip, config, checkpoint)
    if config.data.name != "glyphs":
        raise UserError(
            f"pretrained={name}: towers are pretrained on the glyphs' broad world; "
            f"data.name={config.data.name!r} needs a CLIP"
        )
    tower.tower(name.removeprefix(PREFIX))
    return partial(_tower, config)


def _clip(config: ConfigDict, checkpoint: Checkpoint, data: Benchmark, workdir: Path) -> Anchor:
    opened = anchor_classifier(config, checkpoint, data, workdir / "heads")
    return Anchor(opened, lambda: opened)


def _tower(config: ConfigDict, data: Benchmark, workdir: Path) -> Anchor:
    """As a run, a tower is known by all that its weights depend on, not by their bits."""
    name = config.pretrained.removeprefix(PREFIX)
    init = partial(tower.init, name, len(data.class_names), jax.random.key(0))
    recipe, shapes = _recipe(config), jax.eval_shape(init)
    sizes = [list(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    outline = Classifier(
        params=shapes,
        apply=tower.classifier(name, Compute.of(config.compute)),
        normalize=Preprocessor((0.5,) * 3, (0.25,) * 3, tower.IMAGE_SIZE),
        num_heads=tower.TOWERS[name].num_heads,
        fingerprint=training_digest(recipe, digest([name, NUM_IMAGES, sizes])),
    )

    @functools.cache
    def load() -> Classifier:
        place = f"{name}-{outline.fingerprint}"
        path = workdir / "towers" / place / "model.safetensors"
        with claim(workdir / "locks", f"tower-{place}", wait=True):
            if not path.is_file():
                start = dataclasses.replace(outline, params=init(), fingerprint="")
                _pretrain(recipe, start, data, workdir, path)
        return dataclasses.replace(outline, params=read_tree(path))

    return Anchor(outline, load)


def _recipe(config: ConfigDict) -> ConfigDict:
    one = alone(config)
    one.update_from_flattened_dict(RECIPE)
    one.seed = 0
    return one


def _pretrain(
    recipe: ConfigDict, start: Classifier, data: Benchmark, workdir: Path, path: Path
) -> None:
    broad = dataclasses.replace(data, train=broad_set(NUM_IMAGES))
    programs = finetuning_programs(recipe, start, broad)
    title = f"{recipe.pretrained}: pretraining"
    name = path.parent.name
    trainer = finetuning_trainer(recipe, start, broad, programs, workdir, name, title=title)
    params = jax.tree.map(lambda x: x[0], jax.device_get(trainer.run().state.params))
    with new_directory(path.parent) as beside:
        write_tree(beside / path.name, params)
    shutil.rmtree(trainer.workdir)  # What is left of it are the optimizer's moments.
