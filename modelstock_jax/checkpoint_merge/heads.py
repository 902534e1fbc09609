"""Attention heads of a model, from its config.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modelstock_jax.checkpoint_merge.config import read_config
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import read_json

# Where a saved config leaves its defaults out: transformers' CLIPVisionConfig and CLIPTextConfig.
_CLIP = {"vision_config": 12, "text_config": 8}
OPEN_CLIP_HEAD_WIDTH = 64


def num_heads(directory: Path | None, names: Iterable[str]) -> int | dict[str, int]:
    """Query heads as `units.assign` takes them: one number, or beginning of a name -> number.

    Read from `num_attention_heads` (of the vision and the text config where there are two), or
    from OpenCLIP's `open_clip_config.json`.

    Args:
      directory: of the base model; None for a single file.
      names: of its tensors, to find where the image tower begins.

    Raises:
      UserError: they cannot be known.
    """
    vision, text = _known(directory) if directory else (None, None)
    if text is None:
        where = f"{directory}/config.json" if directory else "a single file"
        raise UserError(
            f"unit 'head': {where} does not say how many attention heads there are; give "
            "--num-heads 12, or --num-heads vision_model=12,text_model=8"
        )
    if vision is None:
        return text
    towers = {prefix for name in names if (prefix := _vision_prefix(name))}
    return {"": text} | dict.fromkeys(sorted(towers), vision)


def parse_num_heads(text: str) -> int | dict[str, int]:
    """Reads `12` or `vision_model=12,text_model=8`.

    Example:
      >>> parse_num_heads("12"), parse_num_heads("visual=12,=8")
      (12, {'visual': 12, '': 8})
    """
    try:
        if "=" not in text:
            return int(text)
        pairs = (part.split("=") for part in text.split(","))
        return {prefix.strip(): int(number) for prefix, number in pairs}
    except ValueError:
        raise UserError(f"--num-heads {text!r}: expected 12, or vision=12,text=8") from None


def _known(directory: Path) -> tuple[int | None, int | None]:
    """Heads of the image tower (None where there is none) and of the rest."""
    config = read_config(directory) or {}
    if (number := _count(config.get("num_attention_heads"))) is not None:
        return None, number
    clip = str(config.get("model_type", "")).startswith("clip")
    found = [
        _count(_object(config.get(key)).get("num_attention_heads", default if clip else None))
        for key, default in _CLIP.items()
    ]
    if found[1] is not None:
        return found[0], found[1]
    if (path := directory / "open_clip_config.json").is_file():
        config = _object(_object(read_json(path)).get("model_cfg"))
        vision, text = _object(config.get("vision_cfg")), _object(config.get("text_cfg"))
        head_width = _count(vision.get("head_width")) or OPEN_CLIP_HEAD_WIDTH
        if (width := _count(vision.get("width"))) is not None:
            return width // head_width, _count(text.get("heads"))
    return None, None


def _vision_prefix(name: str) -> str | None:
    parts = name.split(".")
    for i, part in enumerate(parts[:3]):
        if part.startswith("vis"):
            return ".".join(parts[: i + 1])
    return None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if whole else None
