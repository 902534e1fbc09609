"""What comes before and after the replicas' training: pretraining, linear probe, learned radii."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data import glyphs
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.loader import LoaderOptions, train_batches
from modelstock_jax.errors import UserError
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.models.clip import encode_image, encode_text, init
from modelstock_jax.models.config import CLIPConfig, Preprocessor
from modelstock_jax.models.transformer import Compute
from modelstock_jax.training import multihost
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.finetune import (
    check_method,
    make_trainer,
    single_replica_config,
    train_transforms,
)
from modelstock_jax.training.losses import cross_entropy, flyp
from modelstock_jax.training.projections import trainable_projection
from modelstock_jax.training.step_fns import Task


def linear_probe(
    config: ConfigDict, anchor: Classifier, data: Benchmark, workdir: Path
) -> Classifier:
    """The first phase of LP-FT (Kumar et al. 2022): the head alone, the tower as it is.

    The second phase is a fine-tuning like any other, from what this returns.
    The probed model is then the replicas' anchor too, and so is shared by all seeds of a run, as
    Model Soups share theirs. A run that was stopped in either phase goes on there.

    Args:
      config: the run's options; `objective.probe_epochs` and `probe_learning_rate` are used in
        place of the second phase's, and no option of `merge`, `per_replica` or `projection`.
      anchor: where the probe starts.
      data: its training set.
      workdir: the probe lies in workdir/runs/probe.

    Returns:
      The anchor under the probed head, or the anchor itself where the objective is not `lp_ft`.
    """
    check_method(config)
    if config.objective.name != "lp_ft":
        return anchor
    one = single_replica_config(config)
    one.objective.name = "linear_probe"
    one.epochs = config.objective.probe_epochs
    one.optimizer.learning_rate = config.objective.probe_learning_rate
    one.optimizer.decay_to_pretrained = 0.0
    one.optimizer.projection.name = "none"
    state = make_trainer(one, anchor, data, workdir, "probe").run().state
    head = jax.tree.map(lambda x: x[0], multihost.to_host(state.params["head"]))
    return replace(anchor, params=anchor.params | {"head": head})


def apply_tpgm(config: ConfigDict, anchor: Classifier, data: Benchmark, replicas: PyTree) -> PyTree:
    """TPGM after training: each replica within radii that validation images choose.

    Args:
      config: the run's options; `optimizer.projection` is used.
      anchor: what the replicas were trained from.
      data: its validation set, seen through the training's views.
      replicas: [R, ...] a leaf, NumPy arrays.

    Returns:
      The projected replicas, or the replicas themselves where the projection is not `tpgm`.

    Raises:
      UserError: if the validation set has fewer images than a batch.
    """
    rules, size = config.optimizer.projection, config.batch_size
    if rules.name != "tpgm":
        return replicas
    if len(data.validation) < size:
        raise UserError(
            f"optimizer.projection.name='tpgm' learns on validation images; {size} make a batch, "
            f"and there are {len(data.validation)}: lower batch_size or set data.held_out_per_class"
        )
    loss_fn = cross_entropy(anchor.apply, anchor.normalize)
    held = []
    for r, view in enumerate(train_transforms(config, anchor.normalize.image_size)):
        batches = train_batches(
            data.validation,
            batch_size=size,
            seed=config.seed,
            num_replicas=1,
            start_step=0,
            transform=view,
            loader=LoaderOptions(**config.data.loader),
        )
        projected, _ = trainable_projection(
            lambda params, batch: loss_fn(params, batch)[0],
            jax.tree.map(lambda x, r=r: x[r], replicas),
            anchor.params,
            ({name: x[0] for name, x in b.items()} for b in islice(batches, rules.steps)),
            learning_rate=rules.learning_rate,
            norm=rules.norm,
        )
        held.append(jax.device_get(projected))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *held)


# Pretraining a small CLIP from scratch by image-text contrast, as a `Task` of the same loop.


RENDER_BATCH = 512  # what the renderer is compiled for


def pretraining_task(
    config: ConfigDict,
    clip: CLIPConfig,
    preprocessor: Preprocessor,
) -> Task:
    """CLIP's own objective on the broad glyph world, from its own initial weights.

    Args:
      config: the run's options; `pretrain.num_steps` and `batch_size` set its length.
      clip: sizes of the towers.
      preprocessor: how pixels become the image tower's input.

    Raises:
      UserError: if the batch size does not divide what is rendered at once, or the batch is to
        be cut in parts, which would be another loss.
    """
    if config.gradient_accumulation_steps != 1:
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}: pretraining compares every image with "
            "every text of a batch, which parts of it cannot; use 1"
        )
    if RENDER_BATCH % config.batch_size:
        raise UserError(
            f"batch_size={config.batch_size} does not divide {RENDER_BATCH}, the number of "
            "glyphs rendered at once; use a power of two up to that"
        )
    compute = Compute.of(config.compute)
    return Task(
        params=init(clip, jax.random.key(config.seed)),
        augment=lambda key, batch: batch,
        loss_fn=flyp(
            lambda tower, images: encode_image(clip, tower, images, compute),
            lambda tower, ids: encode_text(clip, tower, ids, compute),
            preprocessor,
        ),
        steps_per_epoch=config.pretrain.num_steps,
        num_steps=config.pretrain.num_steps,
        num_heads=clip.vision.num_attention_heads,
    )


def pretraining_batches(
    config: ConfigDict,
    clip: CLIPConfig,
    tokenize: Callable[[list[str]], np.ndarray],
    start: int,
    examples: np.ndarray,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless {"image" uint8 [1, b, H, W, 3], "text" int32 [1, b, L]} from step `start` on.

    Args:
      config: its seed and batch size are used.
      clip: sizes of the towers.
      tokenize: captions -> int32 [M, L].
      start: the first batch's step.
      examples: b of a batch's B places that this process's devices hold.

    Raises:
      UserError: if a caption has a token that the text tower does not know.
    """
    # Chunk c of seed s is drawn from one number, so that a step number alone restores the stream.
    step, a_chunk = start, RENDER_BATCH // config.batch_size
    while True:
        chunk, first = divmod(step, a_chunk)
        images, captions = glyphs.pretraining_batch(config.seed * 2**32 + chunk, RENDER_BATCH)
        ids = tokenize(captions)
        # An embedding's look-up would clamp such an id to the last row without a word.
        if ids.max() >= clip.text.vocab_size:
            raise UserError(
                f"pretrain.clip.text_config.vocab_size={clip.text.vocab_size}, but the tokenizer "
                f"gives id {ids.max()}; set it to the size of the tokenizer's vocabulary"
            )
        for part in range(first, a_chunk):
            rows = part * config.batch_size + examples
            yield {"image": images[None, rows], "text": ids[None, rows]}
            step += 1
