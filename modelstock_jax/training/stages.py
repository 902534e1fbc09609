"""Stages before and after fine-tuning: pretraining, linear probing (LP-FT) and TPGM."""

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
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.model import encode_image, encode_text, init
from modelstock_jax.models.preprocessor import Preprocessor
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

RENDER_BATCH = 512  # images per call of the compiled renderer


def linear_probe(
    config: ConfigDict, anchor: Classifier, data: Benchmark, workdir: Path
) -> Classifier:
    """Train only the head: the first phase of LP-FT (Kumar et al. 2022).

    The second phase is an ordinary fine-tuning from the returned model. The probed model is also
    the anchor of the replicas, and all seeds of a run share it, as in Model Soups. A stopped run
    resumes in the phase in which it stopped.

    Args:
      config: options of the run; `objective.probe_epochs` and `objective.probe_learning_rate`
        replace those of the second phase, and `merge`, `per_replica` and `projection` are ignored
      anchor: the model that the probe starts from
      data: provides the training set
      workdir: the probe is stored in workdir/runs/probe

    Returns:
      the anchor with the probed head, or the anchor itself if the objective is not `lp_ft`
    """
    check_method(config)
    if config.objective.name != "lp_ft":
        return anchor
    probe_config = single_replica_config(config)
    probe_config.objective.name = "linear_probe"
    probe_config.epochs = config.objective.probe_epochs
    probe_config.optimizer.learning_rate = config.objective.probe_learning_rate
    probe_config.optimizer.decay_to_pretrained = 0.0
    probe_config.optimizer.projection.name = "none"
    state = make_trainer(probe_config, anchor, data, workdir, "probe").run().state
    head = jax.tree.map(lambda x: x[0], multihost.to_host(state.params["head"]))
    return replace(anchor, params=anchor.params | {"head": head})


def check_validation_images(config: ConfigDict, data: Benchmark) -> None:
    """Check, before the training, that there are enough images for what follows it.

    Raises:
      UserError: TPGM is used, and the validation set has fewer images than a batch
    """
    batch_size, count = config.batch_size, len(data.validation)
    if config.optimizer.projection.name == "tpgm" and count < batch_size:
        raise UserError(
            "optimizer.projection.name='tpgm' needs at least one batch of validation images: "
            f"batch_size={batch_size}, but there are {count} validation images; lower batch_size "
            "or hold out more images (data.held_out_per_class, or the folder val)"
        )


def apply_tpgm(config: ConfigDict, anchor: Classifier, data: Benchmark, replicas: PyTree) -> PyTree:
    """Project each replica with TPGM after training; validation images determine the radii.

    Args:
      config: options of the run; `optimizer.projection` is used
      anchor: the model that the replicas were trained from
      data: provides the validation set, which is transformed like training images
      replicas: leaves [R, ...], NumPy arrays

    Returns:
      the projected replicas, or the replicas themselves if the projection is not `tpgm`

    Raises:
      UserError: see `check_validation_images`
    """
    projection, batch_size = config.optimizer.projection, config.batch_size
    if projection.name != "tpgm":
        return replicas
    check_validation_images(config, data)
    normalize, projected = anchor.normalize, []
    loss_fn = cross_entropy(anchor.apply, normalize)
    transforms = train_transforms(config, normalize.image_size, normalize.resample)
    for r, transform in enumerate(transforms):
        batches = train_batches(
            data.validation,
            batch_size=batch_size,
            seed=config.seed,
            num_replicas=1,
            start_step=0,
            transform=transform,
            loader=LoaderOptions(**config.data.loader),
        )
        params, _ = trainable_projection(
            lambda params, batch: loss_fn(params, batch)[0],
            jax.tree.map(lambda x, r=r: x[r], replicas),
            anchor.params,
            ({name: x[0] for name, x in b.items()} for b in islice(batches, projection.steps)),
            learning_rate=projection.learning_rate,
            norm=projection.norm,
        )
        projected.append(jax.device_get(params))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *projected)


def pretraining_task(
    config: ConfigDict,
    clip: CLIPConfig,
    preprocessor: Preprocessor,
) -> Task:
    """Return the task of pretraining CLIP from scratch with its contrastive loss.

    The data is the broad distribution of the synthetic benchmark (`pretraining_batches`).

    Args:
      config: options of the run; `pretrain.num_steps` and `batch_size` set its length
      clip: sizes of the towers
      preprocessor: converts pixels to the image tower's input

    Raises:
      UserError: if `batch_size` does not divide the renderer's batch, or gradients are to be
        accumulated, which would change the loss
    """
    if config.gradient_accumulation_steps != 1:
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}: pretraining "
            "compares every image with every text of a batch, so the batch cannot be split; set "
            "gradient_accumulation_steps=1"
        )
    if RENDER_BATCH % config.batch_size:
        raise UserError(
            f"batch_size={config.batch_size} does not divide {RENDER_BATCH}, the number of glyphs "
            f"rendered at once; set a power of two up to {RENDER_BATCH}"
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
        num_heads=clip.num_heads,
    )


def pretraining_batches(
    config: ConfigDict,
    clip: CLIPConfig,
    tokenize: Callable[[list[str]], np.ndarray],
    start: int,
    examples: np.ndarray,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield endless {"image" uint8 [1, b, H, W, 3], "text" int32 [1, b, L]} from step `start`.

    Args:
      config: options of the run; its seed and batch size are used
      clip: sizes of the towers
      tokenize: captions -> int32 [M, L]
      start: step of the first batch
      examples: the b of B batch rows that this process's devices store

    Raises:
      UserError: if a token id is not in the text tower's vocabulary
    """
    # One seed per rendered chunk, so that the step number alone restores the stream.
    step, steps_per_chunk = start, RENDER_BATCH // config.batch_size
    while True:
        chunk, first = divmod(step, steps_per_chunk)
        images, captions = glyphs.pretraining_batch(config.seed * 2**32 + chunk, RENDER_BATCH)
        ids = tokenize(captions)
        # The embedding lookup would silently clamp such an id to the last row.
        if ids.max() >= clip.text.vocab_size:
            raise UserError(
                f"pretrain.clip.text_config.vocab_size={clip.text.vocab_size}, but the tokenizer "
                f"returned id {ids.max()}; set it to the size of the tokenizer's vocabulary"
            )
        for k in range(first, steps_per_chunk):
            rows = k * config.batch_size + examples
            yield {"image": images[None, rows], "text": ids[None, rows]}
            step += 1
