"""The layouts in which a CLIP checkpoint may lie on disk, and which one a path is in."""

from __future__ import annotations

from pathlib import Path

from modelstock_jax.clip.layouts import hugging_face, open_clip
from modelstock_jax.clip.layouts.hugging_face import HuggingFace
from modelstock_jax.clip.layouts.layout import Layout, WholeLayout
from modelstock_jax.clip.layouts.model_soups import ModelSoups, is_fine_tuned
from modelstock_jax.clip.layouts.open_clip import OpenCLIP
from modelstock_jax.clip.layouts.openai import OpenAI
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import read_json

WRITABLE: dict[str, WholeLayout] = {
    layout.name: layout for layout in (HuggingFace(), OpenCLIP(), OpenAI())
}
READABLE: dict[str, Layout] = {**WRITABLE, ModelSoups.name: ModelSoups()}


def writable(name: str) -> WholeLayout:
    """The layout of that name; a UserError that lists all where there is none."""
    if name not in WRITABLE:
        raise UserError(f"layout {name!r} is not known; write in one of {', '.join(WRITABLE)}.")
    return WRITABLE[name]


def readable(name: str) -> Layout:
    """The layout of that name; a UserError that lists all where there is none."""
    if name not in READABLE:
        raise UserError(f"layout {name!r} is not known; read one of {', '.join(READABLE)}.")
    return READABLE[name]


def described(path: Path) -> list[Layout]:
    """The layouts whose config lies in a directory, in the order in which they are tried.

    Hugging Face's comes first: where a repository holds a model in several layouts, as LAION's do,
    it is the one that says most.

    Args:
        path: A directory, or a file, in which there is no config.

    Returns:
        Layouts; none where only the names of the tensors can tell.
    """
    found: list[Layout] = []
    config = path / hugging_face.CONFIG
    is_open_clip = (path / open_clip.CONFIG).is_file()
    raw = read_json(config) if config.is_file() and is_open_clip else None
    # Beside OpenCLIP's config, timm's repositories have one of their own, with no model_type.
    timms = is_open_clip and not (isinstance(raw, dict) and "model_type" in raw)
    if config.is_file() and not timms:
        found.append(WRITABLE[HuggingFace.name])
    if is_open_clip:
        found.append(WRITABLE[OpenCLIP.name])
    return found


def named(path: Path) -> Layout:
    """The layout that the names of a path's tensors tell, where no config lies beside them."""
    files = READABLE[OpenAI.name].open(path)
    return READABLE[ModelSoups.name if is_fine_tuned(files) else OpenAI.name]
