"""The pretrained model as a classifier: what every replica starts from."""

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
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import classifier, encode_image, encode_text
from modelstock_jax.models.config import CLIPConfig, Preprocessor
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

PUBLISHED_TEMPLATES = 80  # CLIP's prompts for ImageNet: what a run is planned for without its data.
_TRAINED = ("text_tower", "logit_scale")


@dataclass(frozen=True)
class Classifier:
    """The pretrained model as a classifier: the anchor of every merge.

    Attributes:
      params: {"image_tower", "head"}, the head from text prompts.
      apply: (params, images float [B, H, W, 3]) -> logits [B, K].
      normalize: images uint8 -> float, by the checkpoint's mean and standard deviation; knows
        their size.
      num_heads: attention heads of the image tower.
      fingerprint: of the checkpoint that it comes from; "" where there is none.
      text: the checkpoint's text side, where it has one.
    """

    params: PyTree
    apply: Callable[[PyTree, jax.Array], jax.Array]
    normalize: Preprocessor
    num_heads: int
    fingerprint: str = ""
    text: TextSide | None = None

    def initial_params(self, config: ConfigDict) -> PyTree:
        """What `config.objective` trains, at its start: FLYP's towers and scale, or `params`."""
        if config.objective.name != "flyp":
            return self.params
        text = require_text(self.text, config.objective.name)
        return {"image_tower": self.params["image_tower"], **text.params}

    def classify(self, params: PyTree) -> PyTree:
        """{"image_tower", "head"} of what was trained: FLYP's head is made by its text tower."""
        if "head" in params:
            return params
        text = require_text(self.text, "flyp")
        return {"image_tower": params["image_tower"], "head": text.head(params)}


def anchor_classifier(
    config: ConfigDict, checkpoint: Checkpoint, data: Benchmark, heads: Path | None = None
) -> Classifier:
    """The image tower of `checkpoint` under its own head, the zero-shot one or a random one.

    A random head is N(0, 1 / E) and, as all seeds of a run share their anchor, of `config.seed`.

    Args:
      config: the run's options.
      checkpoint: the model.
      data: its class names and templates make the zero-shot head.
      heads: where heads of the text tower are kept from run to run; None makes them each time.

    Raises:
      UserError: if the checkpoint's head has other classes than the data.
    """
    head = checkpoint.head
    if config.objective.head == "random":
        size = checkpoint.config.projection_dim, len(data.class_names)
        drawn = np.random.default_rng(config.seed).standard_normal(size) / size[0] ** 0.5
        head = {"kernel": drawn.astype(np.float32), "bias": np.zeros(size[1], np.float32)}
    elif head is None:
        head = text_head(
            "zero_shot",
            checkpoint,
            data.class_names,
            data.templates,
            heads,
            allow_repeats=_repeats(config),
        )
    elif head["bias"].shape != (len(data.class_names),):
        raise UserError(
            f"{checkpoint.directory}: its head has {head['bias'].shape[0]} classes, the data "
            f"{len(data.class_names)}"
        )
    params = {"image_tower": checkpoint.params["image_tower"], "head": head}
    made = make_classifier(config, checkpoint.config, params, checkpoint.preprocessor)
    text = TextSide(
        checkpoint,
        data.class_names,
        data.templates,
        Compute.of(config.compute),
        allow_repeats=_repeats(config),
        heads=heads,
    )
    return replace(made, fingerprint=checkpoint.fingerprint, text=text)


def _repeats(config: ConfigDict) -> bool:
    # A published list may give two classes one name, as ImageNet's does; a user's may not.
    return not config.data.class_names


def make_classifier(
    config: ConfigDict, clip: CLIPConfig, params: PyTree, normalize: Preprocessor
) -> Classifier:
    """A classifier that computes as `config.compute` says; its weights may be shapes alone."""
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
    """The zero-shot head or the head of contexts; its progress is shown where it is made.

    Args:
      kind: which of the two.
      checkpoint: as this and the other arguments are for `zero_shot.zero_shot_head`.
      class_names: K names.
      templates: T prompts.
      heads: where it is kept from run to run; None makes it each time.
      allow_repeats: whether two classes may have one name.

    Returns:
      {"kernel" [E, C], "bias" [C]}, float32, C = K or T.

    Raises:
      UserError: as `zero_shot.zero_shot_head`, or if `heads` cannot be written.
    """
    plain, cached, name = {
        "zero_shot": (zero_shot_head, cached_zero_shot_head, "zero-shot head"),
        "context": (context_head, cached_context_head, "context head"),
    }[kind]
    make = plain if heads is None else partial(cached, heads)
    with contextlib.ExitStack() as stack:
        bar: list[Progress] = []

        def progress(done: int, total: int) -> None:
            if not bar:  # Nothing is shown where the head is read.
                shown = jax.process_index() == 0
                bar.append(
                    stack.enter_context(Progress(name, total, unit="prompts", enabled=shown))
                )
            bar[0].update(done)

        return make(
            checkpoint, class_names, templates, allow_repeats=allow_repeats, progress=progress
        )


# What an objective takes from the text tower: contexts, and captions of each image's class.


@dataclass(frozen=True, eq=False)
class TextSide:
    """The text tower beside an image tower in training; computed when it is first asked for.

    Attributes:
      checkpoint: the pretrained model.
      class_names: K names.
      templates: T prompts, {} stands for the class name.
      compute: of both towers.
      allow_repeats: see `zero_shot.zero_shot_head`.
      heads: where `contexts` is kept from run to run; None makes it each time.
    """

    checkpoint: Checkpoint
    class_names: Sequence[str]
    templates: Sequence[str]
    compute: Compute
    allow_repeats: bool = False
    heads: Path | None = None

    @property
    def params(self) -> PyTree:
        """{"text_tower", "logit_scale"}, pretrained."""
        return {name: self.checkpoint.params[name] for name in _TRAINED}

    @cached_property
    def contexts(self) -> PyTree:
        """The classifier of contexts {"kernel" [E, T], "bias" [T]}, for CAR-FT."""
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
        """Token ids int32 [K, T, L] of every class and template, L the longest's length."""
        ids = prompt_ids(self.checkpoint, self.class_names, self.templates)
        # A text is pooled at its end, which sees nothing of what follows.
        end = end_of_text(jnp.asarray(ids), self.checkpoint.config.text.eos_token_id)
        return ids[:, : 1 + int(end.max())].reshape(len(self.class_names), len(self.templates), -1)

    def encode_image(self, tower: PyTree, images: jax.Array) -> jax.Array:
        """Features [B, E] of normalized images, not normalized."""
        return encode_image(self.checkpoint.config, tower, images, self.compute)

    def encode_text(self, tower: PyTree, ids: jax.Array) -> jax.Array:
        """Features [B, E] of token ids [B, L], not normalized."""
        return encode_text(self.checkpoint.config, tower, ids, self.compute)

    def head(self, params: PyTree) -> PyTree:
        """The zero-shot head {"kernel" [E, K], "bias" [K]} of a tuned text tower and scale."""
        own = {name: jax.device_get(params[name]) for name in _TRAINED}
        tuned = dataclasses.replace(self.checkpoint, params=self.checkpoint.params | own)
        return zero_shot_head(
            tuned, self.class_names, self.templates, allow_repeats=self.allow_repeats
        )


class AbstractTextSide(TextSide):
    """The text side of a run that is planned: weights are shapes, there is no tokenizer."""

    @cached_property
    def contexts(self) -> PyTree:
        """Zeros in the shape of the published templates."""
        size = self.checkpoint.config.projection_dim
        return {
            "kernel": np.zeros((size, PUBLISHED_TEMPLATES), np.float32),
            "bias": np.zeros(PUBLISHED_TEMPLATES, np.float32),
        }

    @cached_property
    def prompts(self) -> np.ndarray:
        """Zeros of the tower's whole length."""
        length = self.checkpoint.config.text.max_position_embeddings
        return np.zeros((len(self.class_names), PUBLISHED_TEMPLATES, length), np.int32)


def require_text(text: TextSide | None, objective: str) -> TextSide:
    """The text side of a model, for an objective that cannot do without.

    Raises:
      UserError: if the model has none.
    """
    if text is None:
        raise UserError(
            f"objective.name={objective!r} needs the text tower, and this model has none; choose "
            "another"
        )
    return text


def with_captions(
    key: jax.Array, batch: dict[str, jax.Array], prompts: np.ndarray
) -> dict[str, jax.Array]:
    """A batch with "text" int32 [B, L]: a prompt of each image's class, one template drawn each.

    Args:
      key: jax key.
      batch: {"label": int32 [B], ...}.
      prompts: int32 [K, T, L].

    >>> prompts = np.arange(3, dtype=np.int32).repeat(8).reshape(3, 4, 2)
    >>> batch = {"label": jnp.array([2, 0])}
    >>> with_captions(jax.random.key(0), batch, prompts)["text"].tolist()
    [[2, 2], [0, 0]]
    """
    template = jax.random.randint(key, batch["label"].shape, 0, prompts.shape[1])
    return batch | {"text": jnp.asarray(prompts)[batch["label"], template]}
