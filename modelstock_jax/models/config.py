"""Sizes of image models, as in config.json: what every architecture has, and its checks."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.param_mapping import Row, linear_head

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "relu")
# Checkpoints converted before 2023 have eos_token_id 2 regardless of their tokenizer. It is not a
# token but a flag: pool at the highest id.
LEGACY_EOS_TOKEN_ID = 2
MAX_SIZE = 2**31 - 1  # largest index of an array

_KINDS: dict[Any, Any] = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
    "int | None": (int, type(None)),
}
_SIZES = "tuple[int, ...]"


def take(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the entries of `values` that are fields of `cls`, with their types checked.

    Args:
      cls: a dataclass
      values: entries of a config.json
      where: name of the config, for error messages

    Returns:
      Field name -> value; lists of integers become tuples

    Raises:
      UserError: a value of the wrong type, or a float that is too large
    """
    taken: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name not in values or not (field.type in _KINDS or field.type == _SIZES):
            continue
        value: Any = values[field.name]
        if field.type == _SIZES:
            fits = isinstance(value, list | tuple) and all(type(size) is int for size in value)
            kind = "a list of integers"
        else:
            fits = isinstance(value, _KINDS[field.type])
            fits = fits and isinstance(value, bool) <= (field.type == "bool")
            kind = field.type
        if not fits:
            raise UserError(f"{where}: {field.name} must be {kind}, not {value!r}")
        convert = {"float": float, _SIZES: tuple}.get(field.type)
        try:
            taken[field.name] = convert(value) if convert else value
        except OverflowError:  # An integer of hundreds of digits.
            raise UserError(f"{where}: {field.name} is too large for a float") from None
    return taken


def check_sizes(where: str, config: Any, skip: Sequence[str] = ()) -> None:
    """Check that all sizes of a config are positive, and its activation is supported.

    Args:
      where: name of the config, for error messages
      config: a dataclass
      skip: names of fields that may have any finite value

    Raises:
      UserError: a value out of range, an unknown activation, or a width that the heads do not
        divide
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in skip:
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{where}: {field.name} must be finite, not {value}")
        elif field.type in ("int", "float", _SIZES):
            check_size(where, field.name, value)
    heads = getattr(config, "num_attention_heads", 1)
    if heads > 1 and config.hidden_size % heads:
        raise UserError(
            f"{where}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{heads}"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act {config.hidden_act!r} is not supported; choose one of "
            f"{', '.join(ACTIVATIONS)}"
        )


def check_size(where: str, name: str, value: float | tuple[int, ...]) -> None:
    """Raise a UserError unless a size, or each of several, is positive and below `MAX_SIZE`."""
    sizes = value if isinstance(value, tuple) else (value,)
    # The comparison is False for NaN, which JSON may contain.
    if not sizes or not all(0 < size <= MAX_SIZE for size in sizes):
        raise UserError(f"{where}: {name} must be positive and at most {MAX_SIZE}, not {value}")


class ModelConfig(abc.ABC):
    """Sizes of an image model, and how to build it; a frozen dataclass per `model_type`.

    Attributes:
      model_type: as in config.json
      prefix: beginning of the tensor names in a file with a classifier, such as 'vit.'; '' if the
        model has no classifier in its file
      classifier: beginning of the names of the classifier, such as 'classifier.'; '' if the model
        has none in its file
      base_class: transformers' class of the model without a classifier
      classifier_class: transformers' class with a classifier; '' if there is none
      unit_features: whether the head is applied to features of norm 1
      resizes_images: whether images may have another size than `image_size` without notice: the
        model interpolates its position embeddings at every call, or has none
      is_convolutional: whether the tower contains convolutions other than patches
      antialias: of the interpolation of position embeddings
      base_only: parts that a file with a classifier does not contain
    """

    model_type: ClassVar[str]
    prefix: ClassVar[str] = ""
    classifier: ClassVar[str] = ""
    base_class: ClassVar[str]
    classifier_class: ClassVar[str] = ""
    unit_features: ClassVar[bool] = False
    resizes_images: ClassVar[bool] = False
    is_convolutional: ClassVar[bool] = False
    antialias: ClassVar[bool] = False
    base_only: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abc.abstractmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read the dictionary of a config.json.

        Raises:
          UserError: a value of the wrong type, impossible sizes, or an option that this model does
            not implement
        """

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the config.json that transformers opens, without `architectures`."""

    @property
    @abc.abstractmethod
    def image_size(self) -> int:
        """Side of the images of the pretrained model, in pixels."""

    @property
    @abc.abstractmethod
    def num_channels(self) -> int:
        """Color channels of an image."""

    @property
    @abc.abstractmethod
    def feature_size(self) -> int:
        """Width E of the features, which is the input width of the head."""

    @property
    def num_heads(self) -> int:
        """Attention heads of the image tower; 1 without attention."""
        return 1

    @property
    @abc.abstractmethod
    def num_blocks(self) -> int:
        """Blocks of all towers."""

    @property
    def min_side(self) -> int:
        """Smallest side of an image in pixels: the patch size of a transformer."""
        return 1

    @property
    def multiple_of(self) -> int:
        """Number that must divide the sides of an image."""
        return 1

    @abc.abstractmethod
    def describe(self) -> str:
        """Return the sizes of the image tower in words, for a dry run."""

    def with_image_size(self, size: int) -> Self:
        """Return the config for images of another size.

        Raises:
          UserError: the size does not fit the patches
        """
        return dataclasses.replace(self, image_size=size)  # pyrefly: ignore [bad-specialization]

    @abc.abstractmethod
    def image_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """Create the image tower: images [B, H, W, C] -> features [B, E]."""

    def model(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """Create the complete model; its attribute `image_tower` is that of `image_tower`."""
        return ImageModel(self, compute, rngs)

    @abc.abstractmethod
    def rows(self, column: str = "hugging_face") -> list[Row]:
        """Return the table of tensor names of the model without a classifier.

        Args:
          column: a checkpoint format; all models have 'hugging_face'

        Raises:
          UserError: the model cannot be stored in this format
        """

    def stored_head(self, names: Collection[str]) -> list[Row]:
        """Return the rows of the classifier that a file contains, by its tensor names.

        A file may lack tensors of these rows: one tensor of a classifier is enough.

        Returns:
          Rows with paths that start with 'head'; none if the file has no classifier
        """
        return linear_head(self.classifier) if has_prefix(names, self.classifier) else []

    def head_rows(self, head: Mapping[str, Any] | None) -> list[Row]:
        """Return the rows with which a head is stored in the model's file; else none."""
        return linear_head(self.classifier) if head is not None and self.classifier else []

    def classifier_name(self, head: Mapping[str, Any]) -> str:
        """Return transformers' class of the model with this head."""
        return self.classifier_class

    def logits(self, features: jax.Array, head: Mapping[str, Any]) -> jax.Array:
        """Return logits [B, K] = features [B, E] W + b of a head {"kernel", "bias"}."""
        # The head is small: full float32 costs nothing, and TF32 would be visible in the logits.
        precision = jax.lax.Precision.HIGHEST
        return jax.numpy.matmul(features, head["kernel"], precision=precision) + head["bias"][None]


class ImageModel(nnx.Module):
    """The complete model of a config without other parts than an image tower."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs):
        self.image_tower = config.image_tower(compute, rngs)


def has_prefix(names: Collection[str], prefix: str) -> bool:
    """Return whether a tensor name starts with `prefix`; False for an empty prefix."""
    return bool(prefix) and any(name.startswith(prefix) for name in names)


class DualEncoderConfig(ModelConfig):
    """Sizes of a model with an image tower and a text tower in one space.

    Attributes:
      text_params: parameters besides the image tower; FLYP trains them
      lower_case: whether texts are lower-cased before they are tokenized
      sigmoid: whether the model was pretrained with the sigmoid loss instead of softmax
    """

    text_params: ClassVar[tuple[str, ...]] = ("text_tower", "logit_scale")
    lower_case: ClassVar[bool] = False
    sigmoid: ClassVar[bool] = False
    unit_features = True

    @property
    @abc.abstractmethod
    def vision(self) -> VisionConfig:
        """Sizes of the image tower."""

    @property
    @abc.abstractmethod
    def text(self) -> TextConfig:
        """Sizes of the text tower."""

    @property
    def image_size(self) -> int:
        """See `ModelConfig`."""
        return self.vision.image_size

    @property
    def num_channels(self) -> int:
        """See `ModelConfig`."""
        return self.vision.num_channels

    @property
    def num_heads(self) -> int:
        """See `ModelConfig`."""
        return self.vision.num_attention_heads

    @property
    def num_blocks(self) -> int:
        """See `ModelConfig`."""
        return self.vision.num_hidden_layers + self.text.num_hidden_layers

    @property
    def min_side(self) -> int:
        """See `ModelConfig`."""
        return self.vision.patch_size

    def describe(self) -> str:
        """See `ModelConfig`."""
        return describe_transformer(self.vision, self.num_tokens)

    @property
    @abc.abstractmethod
    def num_tokens(self) -> int:
        """Tokens of an image of the configured size."""

    def with_image_size(self, size: int) -> Self:
        """See `ModelConfig`."""
        vision = dataclasses.replace(self.vision, image_size=size)
        return dataclasses.replace(self, vision=vision)  # pyrefly: ignore [bad-specialization]

    @abc.abstractmethod
    def text_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """Create the text tower: token ids [B, L] -> features [B, E]."""

    @abc.abstractmethod
    def text_lengths(self, ids: np.ndarray) -> np.ndarray:
        """Return how many tokens of each text [B, L] determine its features, int [B]."""

    @abc.abstractmethod
    def check_ids(self, ids: np.ndarray, where: Any) -> None:
        """Check the ids of a tokenizer.

        Raises:
          UserError: the tokenizer does not match the text tower
        """


def check_stages(hidden_sizes: Sequence[int], depths: Sequence[int]) -> None:
    """Raise a UserError unless there is one width and one depth per stage."""
    if len(hidden_sizes) != len(depths):
        raise UserError(
            f"config: hidden_sizes {hidden_sizes} and depths {depths} must have one value per stage"
        )


def describe_transformer(tower: Any, num_tokens: int) -> str:
    """Return layers, width, image size and tokens of a vision transformer in words."""
    side = tower.image_size
    return (
        f"{tower.num_hidden_layers} layers of width {tower.hidden_size}, images {side} x {side}, "
        f"patch size {tower.patch_size}, {num_tokens} tokens"
    )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image tower; names and defaults as in Hugging Face's `vision_config` of CLIP.

    Example:
      >>> VisionConfig(image_size=224, patch_size=32).grid
      7
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_sizes("vision_config", self)
        check_image_size("vision_config", self.image_size, self.patch_size)

    @property
    def grid(self) -> int:
        """Patches along a side of an image of the configured size."""
        return self.image_size // self.patch_size


def check_image_size(where: str, image_size: int, min_side: int) -> None:
    """Raise a UserError if an image of the configured size has no patch."""
    if image_size < min_side:
        raise UserError(
            f"{where}: image_size {image_size} is smaller than {min_side}, the side of a patch of "
            "the last stage"
        )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower; names and defaults as in Hugging Face's `text_config` of CLIP.

    Example:
      >>> TextConfig().max_position_embeddings
      77
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        check_sizes("text_config", self, skip=("eos_token_id",))

    @property
    def pools_at_highest_id(self) -> bool:
        """Whether the end-of-text token has the highest id, so that argmax(ids) finds it."""
        return self.eos_token_id in (LEGACY_EOS_TOKEN_ID, self.vocab_size - 1)
