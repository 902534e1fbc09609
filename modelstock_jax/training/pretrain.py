"""Pretraining a small CLIP from scratch by image-text contrast, as a `Task` of the same loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data import glyphs
from modelstock_jax.errors import UserError
from modelstock_jax.models.clip import encode_image, encode_text, init
from modelstock_jax.models.config import CLIPConfig, Preprocessor
from modelstock_jax.models.transformer import Compute
from modelstock_jax.training.methods.objectives import contrastive
from modelstock_jax.training.programs import Task

RENDERED_AT_ONCE = 512  # what the renderer is compiled for


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
    if config.accumulate_steps != 1:
        raise UserError(
            f"accumulate_steps={config.accumulate_steps}: pretraining compares every image with "
            "every text of a batch, which parts of it cannot; use 1"
        )
    if RENDERED_AT_ONCE % config.batch_size:
        raise UserError(
            f"batch_size={config.batch_size} does not divide {RENDERED_AT_ONCE}, the number of "
            "glyphs rendered at once; use a power of two up to that"
        )
    compute = Compute.of(config.compute)
    return Task(
        params=init(clip, jax.random.key(config.seed)),
        augment=lambda key, batch: batch,
        loss_fn=contrastive(
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
    step, a_chunk = start, RENDERED_AT_ONCE // config.batch_size
    while True:
        chunk, first = divmod(step, a_chunk)
        images, captions = glyphs.pretraining_batch(config.seed * 2**32 + chunk, RENDERED_AT_ONCE)
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
