"""What an objective takes from the text tower: contexts, and captions of each image's class."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import encode_image, encode_text
from modelstock_jax.models.transformer import Compute, end_of_text
from modelstock_jax.models.zero_shot import (
    cached_context_head,
    cached_zero_shot_head,
    context_head,
    prompt_ids,
    zero_shot_head,
)
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.training.hosts.distributed import main_first

PyTree = Any
PUBLISHED_TEMPLATES = 80  # CLIP's prompts for ImageNet: what a run is planned for without its data.
_TRAINED = ("text_tower", "logit_scale")


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
        return main_first(make) if self.heads else make()

    @cached_property
    def prompts(self) -> np.ndarray:
        """Token ids int32 [K, T, L] of every class and template, L the longest's length."""
        ids = prompt_ids(self.checkpoint, self.class_names, self.templates)
        # A text is pooled at its end, which sees nothing of what follows.
        end = end_of_text(jnp.asarray(ids), self.checkpoint.config.text.eos_token_id)
        return ids[:, : 1 + int(end.max())].reshape(len(self.class_names), len(self.templates), -1)

    def encode_image(self, tower: PyTree, images: jax.Array) -> jax.Array:
        """Features [B, E] of normalised images, not normalised."""
        return encode_image(self.checkpoint.config, tower, images, self.compute)

    def encode_text(self, tower: PyTree, ids: jax.Array) -> jax.Array:
        """Features [B, E] of token ids [B, L], not normalised."""
        return encode_text(self.checkpoint.config, tower, ids, self.compute)

    def head(self, params: PyTree) -> PyTree:
        """The zero-shot head {"kernel" [E, K], "bias" [K]} of a tuned text tower and scale."""
        own = {name: jax.device_get(params[name]) for name in _TRAINED}
        tuned = dataclasses.replace(self.checkpoint, params=self.checkpoint.params | own)
        return zero_shot_head(
            tuned, self.class_names, self.templates, allow_repeats=self.allow_repeats
        )


def needed(text: TextSide | None, objective: str) -> TextSide:
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
