"""OpenCLIP's checkpoint format: OpenAI's tensor names and a separate config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.models.checkpoint import Checkpoint, CompleteFormat
from modelstock_jax.models.clip import CLIPConfig, require_clip
from modelstock_jax.models.config import LEGACY_EOS_TOKEN_ID, MAX_SIZE, TextConfig, VisionConfig
from modelstock_jax.models.preprocessor import CLIP_MEAN, CLIP_STD, Preprocessor
from modelstock_jax.tensor_files.reader import SINGLE, TensorFiles, read_json
from modelstock_jax.tensor_files.writer import write_tensors

CONFIG = "open_clip_config.json"
_RESIZING = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}


class OpenCLIP(CompleteFormat):
    """`open_clip_config.json` and `open_clip_model.safetensors` (or `model.safetensors`)."""

    name = "open_clip"
    column = "openai"
    file = "open_clip_model.safetensors"
    weights = (file, SINGLE)

    def locate(self, path: Path) -> Path | None:
        """Return the first of the two file names that exists."""
        return next((path / name for name in self.weights if (path / name).is_file()), None)

    def sizes(self, path: Path, files: TensorFiles) -> tuple[CLIPConfig, Preprocessor]:
        """Read `model_cfg` and `preprocess_cfg`."""
        raw = read_json(path / CONFIG)
        try:
            config = read_model(section(raw, "model_cfg"))
            return config, _read_preprocessor(raw, config.vision.image_size)
        except UserError as error:
            raise UserError(f"{path / CONFIG}: {error}") from None

    def describe(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return one config with both parts."""
        model, pixels = (
            write_model(require_clip(checkpoint.config, self.name)),
            checkpoint.preprocessor,
        )
        if not pixels.resizes_as_clip:
            raise UserError(
                "this format stores only CLIP's resizing of images (short side, bicubic); choose "
                "hugging_face"
            )
        statistics = {"mean": list(pixels.mean), "std": list(pixels.std)}
        return {CONFIG: {"model_cfg": model, "preprocess_cfg": {**statistics, **_RESIZING}}}

    def write(
        self, directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int
    ) -> None:
        """Write one file of any size: OpenCLIP reads no shards."""
        write_tensors(directory / self.file, tensors)


def _read_preprocessor(raw: dict[str, Any], image_size: int) -> Preprocessor:
    """Read `preprocess_cfg`; absent values are CLIP's."""
    given = section({"preprocess_cfg": {}, **raw}, "preprocess_cfg")
    given = {key: value for key, value in given.items() if value is not None}
    check_unsupported(given, _RESIZING, "preprocess_cfg", ("mean", "std", "size"))
    try:
        mean, std = (
            tuple(float(x) for x in given.get(key, default))
            for key, default in (("mean", CLIP_MEAN), ("std", CLIP_STD))
        )
    except (TypeError, ValueError):
        raise UserError("preprocess_cfg: mean and std must be lists of numbers") from None
    if len(mean) != 3:
        raise UserError(f"preprocess_cfg: mean {mean} must have 3 values")
    try:
        return Preprocessor(mean, std, image_size)
    except UserError as error:
        raise UserError(f"preprocess_cfg: {error}") from None


# OpenCLIP's defaults of keys that the towers do not implement. Any other value, and any unknown
# key, is an error.
_BLOCK = {
    "ls_init_value": None,
    "output_tokens": False,
    "act_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "final_ln_after_pool": False,
}
_VISION = {
    **_BLOCK,
    "timm_model_name": None,
    "attentional_pool": False,
    "no_ln_pre": False,
    "global_average_pool": False,  # This and the next key: earlier releases.
    "input_patchnorm": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
}
_TEXT = {
    **_BLOCK,
    "hf_model_name": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "proj_bias": False,
    "proj_type": "linear",
    "tokenizer_mode": None,
    "tokenizer_kwargs": None,
}
_MODEL = {
    "custom_text": False,
    "multimodal_cfg": None,
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
}
# Keys that do not affect inference, or only if a key above is set.
_IDLE = (
    *("patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "pad_id", "hf_tokenizer_name"),
    *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop"),
    *("timm_drop_path", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    *("cast_dtype", "output_dict", "init_logit_scale", "fill_color"),
)
_HEAD_WIDTH, _MLP_RATIO, _EPS, _CLIP_VOCABULARY = 64, 4.0, 1e-5, 49408


def read_model(model: dict[str, Any]) -> CLIPConfig:
    """Convert `model_cfg` to our config.

    Args:
      model: `model_cfg`

    Returns:
      The configuration

    Raises:
      UserError: a key or value that the towers do not implement, or of a wrong type
    """
    vision, text = section(model, "vision_cfg"), section(model, "text_cfg")
    if isinstance(vision.get("layers"), list):
        raise UserError(
            "vision_cfg.layers is a list (a ResNet); only vision transformers are supported"
        )
    check_unsupported(
        model, _MODEL, "model_cfg", ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg")
    )
    sizes = ("layers", "width", "mlp_ratio", "norm_kwargs")
    check_unsupported(
        vision, _VISION, "vision_cfg", (*sizes, "head_width", "patch_size", "image_size")
    )
    text_sizes = (*sizes, "heads", "context_length", "vocab_size", "pool_type", "eos_id")
    check_unsupported(text, _TEXT, "text_cfg", text_sizes)
    if not isinstance(quick := model.get("quick_gelu", False), bool):
        raise UserError(f"model_cfg.quick_gelu must be true or false, not {quick!r}")
    activation = "quick_gelu" if quick else "gelu"
    image = _tower(vision, "vision_cfg", 768, activation)
    words = _tower(text, "text_cfg", 512, activation)
    vocabulary = _positive_int(text, "vocab_size", _CLIP_VOCABULARY, "text_cfg")
    if vocabulary != _CLIP_VOCABULARY:  # Another tokenizer, which the config does not describe.
        words |= {"pad_token_id": None, "bos_token_id": None}
    return CLIPConfig(
        VisionConfig(
            **image,
            num_attention_heads=image["hidden_size"]
            // _positive_int(vision, "head_width", _HEAD_WIDTH, "vision_cfg"),
            image_size=_positive_int(vision, "image_size", 224, "vision_cfg"),
            patch_size=_positive_int(vision, "patch_size", 16, "vision_cfg"),
        ),
        TextConfig(
            **words,
            num_attention_heads=_positive_int(text, "heads", 8, "text_cfg"),
            vocab_size=vocabulary,
            max_position_embeddings=_positive_int(text, "context_length", 77, "text_cfg"),
            eos_token_id=_end(text),
        ),
        projection_dim=_positive_int(model, "embed_dim", None, "model_cfg"),
    )


def write_model(config: CLIPConfig) -> dict[str, Any]:
    """Convert our config to `model_cfg`; keys at their defaults are omitted.

    Args:
      config: sizes

    Returns:
      JSON

    Raises:
      UserError: OpenCLIP cannot represent the config
    """
    vision, text = config.vision, config.text
    if vision.hidden_act != text.hidden_act:
        raise UserError(
            f"OpenCLIP supports one activation for both towers, not {vision.hidden_act} and "
            f"{text.hidden_act}; choose hugging_face"
        )
    if vision.hidden_act not in ("quick_gelu", "gelu"):
        raise UserError(
            f"OpenCLIP supports the activations quick_gelu and gelu, not {vision.hidden_act}; "
            "choose hugging_face"
        )
    if vision.num_channels != 3:
        raise UserError(
            f"OpenCLIP supports 3 channels, not {vision.num_channels}; choose hugging_face"
        )
    image = {
        "image_size": vision.image_size,
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "patch_size": vision.patch_size,
        **_shared(vision),
    }
    words = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        **_shared(text),
    }
    if image["head_width"] == _HEAD_WIDTH:
        del image["head_width"]
    if not text.pools_at_highest_id:
        words |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    if text.vocab_size != _CLIP_VOCABULARY:
        # With any name OpenCLIP reads the tokenizer files next to this file.
        words["hf_tokenizer_name"] = "."
    quick = {"quick_gelu": True} if vision.hidden_act == "quick_gelu" else {}
    shared = {"embed_dim": config.projection_dim, **quick}
    return {**shared, "vision_cfg": image, "text_cfg": words}


def section(raw: Any, key: str) -> dict[str, Any]:
    """Return a dictionary of the config; a UserError if it is none."""
    value = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(value, dict):
        raise UserError(f"{key} must be a dictionary, not {value!r}")
    return value


def check_unsupported(
    values: dict[str, Any], neutral: dict[str, Any], where: str, known: tuple[str, ...]
) -> None:
    """Raise a UserError that names all keys of `values` that the towers do not implement."""
    unsupported = [
        f"{where}.{key} = {value!r}"
        for key, value in values.items()
        if key not in (*known, *_IDLE)
        and not (key in neutral and (value == neutral[key] or not (value or neutral[key])))
    ]
    if unsupported:
        raise UserError(f"not supported by these towers: {', '.join(unsupported)}")


def _positive_int(values: dict[str, Any], key: str, default: int | None, where: str) -> int:
    value = values.get(key, default)
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        value = value[0]  # both sides of a square
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIZE:
        raise UserError(f"{where}.{key} must be a positive integer, not {value!r}")
    return value


def _tower(values: dict[str, Any], where: str, width: int, activation: str) -> dict[str, Any]:
    width = _positive_int(values, "width", width, where)
    ratio, norm = values.get("mlp_ratio", _MLP_RATIO), values.get("norm_kwargs") or {}
    eps: Any = norm.get("eps", _EPS) if isinstance(norm, dict) and set(norm) <= {"eps"} else None
    for key, value in (("mlp_ratio", ratio), ("norm_kwargs.eps", eps)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            given = values.get(key.partition(".")[0])
            raise UserError(f"{where}.{key} must be a single positive number, not {given!r}")
    return {
        "hidden_size": width,
        "intermediate_size": int(width * ratio),
        "num_hidden_layers": _positive_int(values, "layers", 12, where),
        "hidden_act": activation,
        "layer_norm_eps": float(eps),
    }


def _shared(tower: VisionConfig | TextConfig) -> dict[str, Any]:
    """Return the keys that OpenCLIP omits if they have the default."""
    width, inner = tower.hidden_size, tower.intermediate_size
    keys: dict[str, Any] = {}
    if inner != int(width * _MLP_RATIO):
        # OpenCLIP rounds the product down; adding 1/2 protects it from rounding of the division.
        ratio = inner / width
        keys["mlp_ratio"] = ratio if int(width * ratio) == inner else (inner + 0.5) / width
    if tower.layer_norm_eps != _EPS:
        keys["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    return keys


def _end(text: dict[str, Any]) -> int:
    """Return our eos_token_id; 2 means the highest id."""
    pool, end = text.get("pool_type", "argmax"), text.get("eos_id", LEGACY_EOS_TOKEN_ID)
    if pool == "argmax":
        return LEGACY_EOS_TOKEN_ID
    if pool != "eos" or isinstance(end, bool) or not isinstance(end, int):
        raise UserError(f"text_cfg.pool_type is {pool!r} (eos_id {end!r}), not 'argmax' or 'eos'")
    if end == LEGACY_EOS_TOKEN_ID:
        raise UserError(
            "text_cfg: pool_type 'eos' with eos_id 2 is not supported: 2 means the highest id"
        )
    return end
