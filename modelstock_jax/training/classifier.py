"""The pretrained model as a classifier, the anchor that every replica starts from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.model import classifier, encode_image, encode_text
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.models.transformer import Compute, end_of_text
from modelstock_jax.models.zero_shot import (
    cached_context_head,
    cached_zero_shot_head,
    context_head,
    prompt_ids,
    zero_shot_head,
)
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.training.multihost import main_process_first

PUBLISHED_TEMPLATES = 80  # CLIP's prompts for ImageNet; assumed by a dry run, which has no data
_TRAINED = ("text_tower", "logit_scale")


@dataclass(frozen=True)
class Classifier:
    """The pretrained model as a classifier: the anchor of every merge.

    Attributes:
      params: {"image_tower", "head"}
      apply: (params, images float [B, H, W, 3]) -> logits [B, K]
      normalize: images uint8 -> float, with the checkpoint's mean and standard deviation; its
        `image_size` is the size of the images
      num_heads: attention heads of the image tower
      checksum: checksum of the pretrained checkpoint; "" if there is none
      text: the text tower of the checkpoint, or None
    """

    params: PyTree
    apply: Callable[[PyTree, jax.Array], jax.Array]
    normalize: Preprocessor
    num_heads: int
    checksum: str = ""
    text: TextSide | None = None

    def initial_params(self, config: ConfigDict) -> PyTree:
        """Return the parameters to train: `params`, or both towers and the scale for FLYP."""
        if config.objective.name != "flyp":
            return self.params
        text = require_text(self.text, config.objective.name)
        return {"image_tower": self.params["image_tower"], **text.params}

    def classify(self, params: PyTree) -> PyTree:
        """Convert trained parameters to {"image_tower", "head"}.

        FLYP trains no head: it is computed with the trained text tower.
        """
        if "head" in params:
            return params
        text = require_text(self.text, "flyp")
        return {"image_tower": params["image_tower"], "head": text.head(params)}


def anchor_classifier(
    config: ConfigDict, checkpoint: Checkpoint, data: Benchmark, heads: Path | None = None
) -> Classifier:
    """Return the classifier of a checkpoint: its image tower with a head.

    The head is random if `objective.head='random'`. Otherwise it is the checkpoint's own head, or
    the zero-shot head if the checkpoint has none. A random head is drawn from N(0, 1 / E) with
    `config.seed`: all seeds of a run share one anchor.

    Args:
      config: options of the run
      checkpoint: the pretrained model
      data: provides the class names and templates of the zero-shot head
      heads: cache directory for heads of the text tower; None computes them every time

    Raises:
      UserError: if the checkpoint's head and the data have different numbers of classes
    """
    head = checkpoint.head
    if config.objective.head == "random":
        size = checkpoint.config.projection_dim, len(data.class_names)
        kernel = np.random.default_rng(config.seed).standard_normal(size) / size[0] ** 0.5
        head = {"kernel": kernel.astype(np.float32), "bias": np.zeros(size[1], np.float32)}
    elif head is None:
        head = text_head(
            "zero_shot",
            checkpoint,
            data.class_names,
            data.templates,
            heads,
            allow_repeats=_allow_repeats(config),
        )
    elif head["bias"].shape != (len(data.class_names),):
        raise UserError(
            f"{checkpoint.directory}: the head has {head['bias'].shape[0]} classes, but the data "
            f"has {len(data.class_names)}; choose another pretrained or data.name"
        )
    params = {"image_tower": checkpoint.params["image_tower"], "head": head}
    anchor = make_classifier(config, checkpoint.config, params, checkpoint.preprocessor)
    text = TextSide(
        checkpoint,
        data.class_names,
        data.templates,
        Compute.of(config.compute),
        allow_repeats=_allow_repeats(config),
        heads=heads,
    )
    return replace(anchor, checksum=checkpoint.checksum, text=text)


def _allow_repeats(config: ConfigDict) -> bool:
    # ImageNet's published list has classes of the same name; a user's list must not.
    return not config.data.class_names


def make_classifier(
    config: ConfigDict, clip: CLIPConfig, params: PyTree, normalize: Preprocessor
) -> Classifier:
    """Return a classifier with the options of `config.compute`; `params` may be shapes."""
    return Classifier(
        params=params,
        apply=classifier(clip, Compute.of(config.compute)),
        normalize=normalize,
        num_heads=clip.vision.num_attention_heads,
    )


def text_head(
    kind: Literal["zero_shot", "context"],
    checkpoint: Checkpoint,
    class_names: Sequence[str],
    templates: Sequence[str],
    heads: Path | None,
    *,
    allow_repeats: bool,
) -> PyTree:
    """Return the zero-shot head or the context head. Show progress if it must be computed.

    Args:
      kind: 'zero_shot' (one column per class) or 'context' (one column per template)
      checkpoint: the pretrained model
      class_names: K names
      templates: T prompts, with {} in place of the class name
      heads: cache directory; None computes the head every time
      allow_repeats: whether several classes may have the same name

    Returns:
      {"kernel" [E, C], "bias" [C]}, float32, C = K or T

    Raises:
      UserError: see `zero_shot.zero_shot_head`; also if `heads` cannot be written
    """
    uncached, cached, title = {
        "zero_shot": (zero_shot_head, cached_zero_shot_head, "zero-shot head"),
        "context": (context_head, cached_context_head, "context head"),
    }[kind]
    make = uncached if heads is None else partial(cached, heads)
    with contextlib.ExitStack() as stack:
        bar: list[Progress] = []

        def progress(done: int, total: int) -> None:
            if not bar:  # Created at the first call: a cached head makes no call.
                main = jax.process_index() == 0
                bar.append(
                    stack.enter_context(Progress(title, total, unit="prompts", enabled=main))
                )
            bar[0].update(done)

        return make(
            checkpoint, class_names, templates, allow_repeats=allow_repeats, progress=progress
        )


@dataclass(frozen=True, eq=False)
class TextSide:
    """The text tower of a model in training, for objectives that use it.

    `contexts` and `prompts` are computed at their first use.

    Attributes:
      checkpoint: the pretrained model
      class_names: K names
      templates: T prompts, with {} in place of the class name
      compute: arithmetic of both towers
      allow_repeats: see `zero_shot.zero_shot_head`
      heads: cache directory for `contexts`; None computes them every time
    """

    checkpoint: Checkpoint
    class_names: Sequence[str]
    templates: Sequence[str]
    compute: Compute
    allow_repeats: bool = False
    heads: Path | None = None

    @property
    def params(self) -> PyTree:
        """The pretrained {"text_tower", "logit_scale"}."""
        return {name: self.checkpoint.params[name] for name in _TRAINED}

    @cached_property
    def contexts(self) -> PyTree:
        """The context head {"kernel" [E, T], "bias" [T]}, for CAR-FT."""
        make = partial(
            text_head,
            "context",
            self.checkpoint,
            self.class_names,
            self.templates,
            self.heads,
            allow_repeats=self.allow_repeats,
        )
        return main_process_first(make) if self.heads else make()

    @cached_property
    def prompts(self) -> np.ndarray:
        """Token ids int32 [K, T, L] of every class and template; L is the longest length."""
        ids = prompt_ids(self.checkpoint, self.class_names, self.templates)
        # The end token is pooled. Attention is causal, so that tokens after it have no effect.
        end = end_of_text(jnp.asarray(ids), self.checkpoint.config.text.eos_token_id)
        return ids[:, : 1 + int(end.max())].reshape(len(self.class_names), len(self.templates), -1)

    def encode_image(self, tower: PyTree, images: jax.Array) -> jax.Array:
        """Return features [B, E] of normalized images; the features are not normalized."""
        return encode_image(self.checkpoint.config, tower, images, self.compute)

    def encode_text(self, tower: PyTree, ids: jax.Array) -> jax.Array:
        """Return features [B, E] of token ids [B, L]; they are not normalized."""
        return encode_text(self.checkpoint.config, tower, ids, self.compute)

    def head(self, params: PyTree) -> PyTree:
        """Return the zero-shot head {"kernel" [E, K], "bias" [K]} of a trained text tower."""
        trained = {name: jax.device_get(params[name]) for name in _TRAINED}
        tuned = dataclasses.replace(self.checkpoint, params=self.checkpoint.params | trained)
        return zero_shot_head(
            tuned, self.class_names, self.templates, allow_repeats=self.allow_repeats
        )


class AbstractTextSide(TextSide):
    """The text tower in a dry run: parameters are shapes, and there is no tokenizer."""

    @cached_property
    def contexts(self) -> PyTree:
        """Zeros, with the shape for the published templates."""
        size = self.checkpoint.config.projection_dim
        return {
            "kernel": np.zeros((size, PUBLISHED_TEMPLATES), np.float32),
            "bias": np.zeros(PUBLISHED_TEMPLATES, np.float32),
        }

    @cached_property
    def prompts(self) -> np.ndarray:
        """Zeros, with the maximum length of the text tower."""
        length = self.checkpoint.config.text.max_position_embeddings
        return np.zeros((len(self.class_names), PUBLISHED_TEMPLATES, length), np.int32)


def require_text(text: TextSide | None, objective: str) -> TextSide:
    """Return the text tower for an objective that needs it.

    Raises:
      UserError: if the model has no text tower
    """
    if text is None:
        raise UserError(
            f"objective.name={objective!r} needs a text tower, and this model has none; choose "
            "another objective.name"
        )
    return text


def with_captions(
    key: jax.Array, batch: dict[str, jax.Array], prompts: np.ndarray
) -> dict[str, jax.Array]:
    """Add "text" int32 [B, L] to a batch: a prompt of each image's class with a random template.

    Args:
      key: PRNG key
      batch: {"label": int32 [B], ...}
      prompts: int32 [K, T, L]

    Example:
      >>> prompts = np.arange(3, dtype=np.int32).repeat(8).reshape(3, 4, 2)
      >>> batch = {"label": jnp.array([2, 0])}
      >>> with_captions(jax.random.key(0), batch, prompts)["text"].tolist()
      [[2, 2], [0, 0]]
    """
    template = jax.random.randint(key, batch["label"].shape, 0, prompts.shape[1])
    return batch | {"text": jnp.asarray(prompts)[batch["label"], template]}
