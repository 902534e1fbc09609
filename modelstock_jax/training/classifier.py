"""The pretrained model as a classifier, the anchor that every replica starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import re
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
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import DualEncoderConfig, ModelConfig
from modelstock_jax.models.model import classifier, encode_image, encode_text
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.models.zero_shot import (
    cached_context_head,
    cached_zero_shot_head,
    context_head,
    prompt_ids,
    zero_shot_head,
)
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.training.multihost import main_process_first

RGB = 3  # channels of the images of every dataset
TEXT_OBJECTIVES = ("car_ft", "flyp")
PUBLISHED_TEMPLATES = 80  # CLIP's prompts for ImageNet; assumed by a dry run, which has no data


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
      row: row of this anchor in the results table, one of `registry.OPENED_ROWS`: 'pretrained' is
        the model's own classifier, unless it has a text tower too
      model: sizes of the model; None for a forward pass that is not one of `models`
    """

    params: PyTree
    apply: Callable[[PyTree, jax.Array], jax.Array]
    normalize: Preprocessor
    num_heads: int
    checksum: str = ""
    text: TextSide | None = None
    row: str = "zero_shot"
    model: ModelConfig | None = None

    def initial_params(self, config: ConfigDict) -> PyTree:
        """Return the parameters to train: `params`, or the parameters of both towers for FLYP."""
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

    The head is random if `objective.head='random'`. Otherwise it is the checkpoint's own head if
    its class names agree with those of the data; or, if it has none, the zero-shot head of its text
    tower. A model with neither starts a linear probe (`objective.name='lp_ft'`) from a random head.
    A random head is drawn from N(0, 1 / E) with `config.seed`: all seeds of a run share one anchor.

    Args:
      config: options of the run
      checkpoint: the pretrained model
      data: provides the class names and templates of the zero-shot head
      heads: cache directory for heads of the text tower; None computes them every time

    Raises:
      UserError: the checkpoint's head has other classes than the data, the checkpoint has neither a
        head nor a text tower, the objective needs a text tower, or see `make_classifier`
    """
    text = None
    if isinstance(checkpoint.config, DualEncoderConfig):
        text = TextSide(
            checkpoint,
            data.class_names,
            data.templates,
            Compute.of(config.compute),
            allow_repeats=_allow_repeats(config),
            heads=heads,
        )
    if config.objective.name in TEXT_OBJECTIVES:
        # Before the head: how to fix a missing head would be no help here.
        require_text(text, config.objective.name)
    row, head = _initial_head(config, checkpoint, data, heads)
    params = {"image_tower": checkpoint.params["image_tower"], "head": head}
    anchor = make_classifier(config, checkpoint.config, params, checkpoint.preprocessor)
    return replace(anchor, checksum=checkpoint.checksum, text=text, row=row)


def _initial_head(
    config: ConfigDict, checkpoint: Checkpoint, data: Benchmark, heads: Path | None
) -> tuple[str, PyTree]:
    """Return the row of the anchor and its head, by the rules of `anchor_classifier`."""
    objective, has_text = config.objective, isinstance(checkpoint.config, DualEncoderConfig)
    names, head = data.class_names, checkpoint.head
    difference = None if head is None else head_difference(checkpoint, names)
    usable = has_text if head is None else difference is None
    # The head of a dual encoder with other classes is the mistake of a user: it has no other use.
    probed = objective.name == "lp_ft" and not usable and not has_text
    if objective.head == "random" or probed:
        head = _random_head(checkpoint.config.feature_size, len(names), config.seed)
        return "random_head", head
    where = checkpoint.directory or config.pretrained
    way = "set objective.head='random'"
    ways = f"{way}, or objective.name='lp_ft' to train a head first"
    if difference is not None:
        way = way if has_text else ways
        raise UserError(f"{where}: {difference}; choose another pretrained or data.name, or {way}")
    if head is not None:
        return "zero_shot" if has_text else "pretrained", head
    if not has_text:
        raise UserError(
            f"{where}: a {checkpoint.config.model_type} model without a classifier has no text "
            f"tower for a zero-shot head; {ways}"
        )
    zero_shot = text_head(
        "zero_shot",
        checkpoint,
        names,
        data.templates,
        heads,
        allow_repeats=_allow_repeats(config),
    )
    return "zero_shot", zero_shot


def _random_head(features: int, classes: int, seed: int) -> PyTree:
    kernel = np.random.default_rng(seed).standard_normal((features, classes)) / features**0.5
    return {"kernel": kernel.astype(np.float32), "bias": np.zeros(classes, np.float32)}


# Lists of at least this many classes are published ones, whose wording differs.
_LONG_LIST = 100


def head_difference(checkpoint: Checkpoint, class_names: Sequence[str]) -> str | None:
    """Return how the classes of a checkpoint's head differ from those of the data, or None.

    Names are compared without case and punctuation, and a name may be a list of synonyms ('tench,
    Tinca tinca'). Every label must name its class. In a list of 100 classes or more, half of the
    labels may have another wording: of ImageNet's 1,000 WordNet lemmas, 822 contain CLIP's name.
    But the first name of none may be a name of another class, as in another order of the classes.
    A head without labels is compared by its number of classes alone.

    Args:
      checkpoint: has a head
      class_names: of the data, by label
    """
    head, labels = checkpoint.head or {}, checkpoint.labels
    count = head["bias"].shape[0]
    if count != len(class_names):
        return f"the head has {count} classes, but the data has {len(class_names)}"
    if labels is None:
        return None
    own, data = _synonyms(labels), _synonyms(class_names)
    differing = [k for k in range(count) if not set(own[k]) & set(data[k])]
    names = {name for row in data for name in row}
    moved = [k for k in differing if own[k][0] in names]
    allowed = count // 2 if count >= _LONG_LIST else 0
    if not moved and len(differing) <= allowed:
        return None
    k = (moved or differing)[0]
    return f"class {k} of the head is {labels[k]!r}, but of the data {class_names[k]!r}"


def _synonyms(labels: Sequence[str]) -> list[list[str]]:
    """Return the names of each label, in lower case, without punctuation where that is unique."""
    plain = [
        [re.sub(r"[\W_]+", " ", name).strip().lower() for name in label.split(",")]
        for label in labels
    ]
    written = len({label.strip() for label in labels})
    if len(set(map(tuple, plain))) < written or not all(map(all, plain)):
        return [[label.strip()] for label in labels]  # 'C' and 'C++', or '+' and '-'.
    return plain


def _allow_repeats(config: ConfigDict) -> bool:
    # ImageNet's published list has classes of the same name; a user's list must not.
    return not config.data.class_names


def make_classifier(
    config: ConfigDict, model: ModelConfig, params: PyTree, normalize: Preprocessor
) -> Classifier:
    """Return a classifier with the options of `config.compute`; `params` may be shapes.

    Raises:
      UserError: the model's images are not RGB, as those of all datasets are
    """
    if model.num_channels != RGB:
        raise UserError(
            f"pretrained={config.pretrained}: the model has images of {model.num_channels} "
            f"channel(s), but the data has {RGB}; choose another pretrained"
        )
    return Classifier(
        params=params,
        apply=classifier(model, Compute.of(config.compute)),
        normalize=normalize,
        num_heads=model.num_heads,
        model=model,
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
        """The pretrained {"text_tower", "logit_scale"}, and for SigLIP "logit_bias"."""
        return {name: self.checkpoint.params[name] for name in self.config.text_params}

    @property
    def config(self) -> DualEncoderConfig:
        """Sizes of the model."""
        return self.checkpoint.dual_encoder

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
        length = int(self.config.text_lengths(ids).max())
        return ids[:, :length].reshape(len(self.class_names), len(self.templates), -1)

    def encode_image(self, tower: PyTree, images: jax.Array) -> jax.Array:
        """Return features [B, E] of normalized images; the features are not normalized."""
        return encode_image(self.config, tower, images, self.compute)

    def encode_text(self, tower: PyTree, ids: jax.Array) -> jax.Array:
        """Return features [B, E] of token ids [B, L]; they are not normalized."""
        return encode_text(self.config, tower, ids, self.compute)

    def head(self, params: PyTree) -> PyTree:
        """Return the zero-shot head {"kernel" [E, K], "bias" [K]} of a trained text tower."""
        trained = {name: jax.device_get(params[name]) for name in self.config.text_params}
        tuned = dataclasses.replace(self.checkpoint, params=self.checkpoint.params | trained)
        return zero_shot_head(
            tuned, self.class_names, self.templates, allow_repeats=self.allow_repeats
        )


class AbstractTextSide(TextSide):
    """The text tower in a dry run: parameters are shapes, and there is no tokenizer."""

    @cached_property
    def contexts(self) -> PyTree:
        """Zeros, with the shape for the published templates."""
        size = self.config.feature_size
        return {
            "kernel": np.zeros((size, PUBLISHED_TEMPLATES), np.float32),
            "bias": np.zeros(PUBLISHED_TEMPLATES, np.float32),
        }

    @cached_property
    def prompts(self) -> np.ndarray:
        """Zeros, with the maximum length of the text tower."""
        length = self.config.text.max_position_embeddings
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
