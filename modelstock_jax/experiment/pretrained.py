"""The pretrained model of a run: opened, or made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from modelstock_jax.data import glyphs
from modelstock_jax.errors import UserError
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.config import CLIPConfig, Preprocessor, TextConfig, VisionConfig
from modelstock_jax.models.tokenizer import tokenize
from modelstock_jax.models.transformer import resize_positions
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.tensor_files.reader import read_json
from modelstock_jax.training import multihost
from modelstock_jax.training.sharding import batch_sharding, held
from modelstock_jax.training.stages import pretraining_batches, pretraining_task
from modelstock_jax.training.step_fns import Programs
from modelstock_jax.training.trainer import Trainer

_DATA = Path(glyphs.__file__).parent
# Pretrained by configs/glyph_pretrain.py with seeds 0 and 1.
BUNDLED = {"glyph-clip": _DATA / "clip", "glyph-clip-1": _DATA / "clip_1"}
_WIDE_VISION = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
)
_WIDE_TEXT = TextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
# Sizes (Radford et al. 2021, table 20) of models whose files need not be here to plan a run.
PUBLISHED = {
    "openai/clip-vit-base-patch32": CLIPConfig(),
    "openai/clip-vit-base-patch16": CLIPConfig(VisionConfig(patch_size=16)),
    "openai/clip-vit-large-patch14": CLIPConfig(_WIDE_VISION, _WIDE_TEXT, 768),
    "openai/clip-vit-large-patch14-336": CLIPConfig(
        dataclasses.replace(_WIDE_VISION, image_size=336), _WIDE_TEXT, 768
    ),
}


def open_pretrained(name: str) -> Checkpoint:
    """Reads the checkpoint that `config.pretrained` names: a directory, or a bundled one.

    Raises:
      UserError: if there is no such directory, or it is not a whole CLIP checkpoint.
    """
    return checkpoint_io.load(BUNDLED.get(name, name))


def open_anchor(config: ConfigDict) -> Checkpoint:
    """The checkpoint of `config.pretrained`, moved to `config.image_size` where one is given.

    Raises:
      UserError: as `open_pretrained`, or if the size does not fit the patches or the data.
    """
    checkpoint, size = open_pretrained(config.pretrained), _image_size(config)
    if not size:
        return checkpoint
    clip, params = resize_positions(checkpoint.params, checkpoint.config, size)
    pixels = dataclasses.replace(checkpoint.preprocessor, image_size=size)
    return dataclasses.replace(checkpoint, config=clip, params=params, preprocessor=pixels)


def sizes(config: ConfigDict) -> CLIPConfig:
    """Sizes of the model that `open_anchor` would give; no weight is read.

    Raises:
      UserError: if the model is neither here nor one of those whose sizes are known by name.
    """
    clip, size = _sizes(config.pretrained), _image_size(config)
    if not size:
        return clip
    return dataclasses.replace(clip, vision=dataclasses.replace(clip.vision, image_size=size))


def _image_size(config: ConfigDict) -> int:
    if config.image_size and config.data.name == "glyphs":
        raise UserError(f"image_size={config.image_size}: the glyphs are drawn in one size; use 0")
    return config.image_size


def _sizes(name: str) -> CLIPConfig:
    directory = _here(name)
    if directory is None:
        if name in PUBLISHED:
            return PUBLISHED[name]
        raise UserError(f"{missing_checkpoint(name)[0]}; its sizes are not known without it")
    path = directory / "config.json"
    if not path.is_file():
        return open_pretrained(name).config  # Another layout says them elsewhere.
    try:
        return CLIPConfig.from_dict(read_json(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def missing_checkpoint(name: str) -> list[str]:
    """What stands between `config.pretrained` and its weights, with the way out; none if here."""
    directory = _here(name)
    if directory is not None:
        if any(directory.glob("*.safetensors")):
            return []
        return [f"pretrained={name}: {directory} has no .safetensors file; fetch it again"]
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        repository, _, revision = name.partition("@")
        command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
        return [f"pretrained={name}: not on this machine; `{command}` fetches it, or the run does"]
    return [f"pretrained={name}: no such directory; give a checkpoint's, or a name on the hub"]


def _here(name: str) -> Path | None:
    """The checkpoint's directory, where it need not be fetched first."""
    path = Path(BUNDLED.get(name, name))
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download  # Half a second: only for names on the hub.

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):
        return None


def pretrain(config: ConfigDict, workdir: Path, timeline: Timeline) -> Path:
    """Pretrains a CLIP from scratch and writes it to `workdir`/model, unless it is there.

    Returns:
      The checkpoint's directory.
    """
    model = workdir / "model"
    if multihost.agree(model.exists()):
        return model
    clip = CLIPConfig.from_dict(config.pretrain.clip.to_dict())
    pixels = Preprocessor((0.5,) * 3, (0.25,) * 3, clip.vision.image_size)
    tokenizer = BUNDLED.get(config.pretrain.tokenizer, Path(config.pretrain.tokenizer))
    length = clip.text.max_position_embeddings
    programs = Programs(config, pretraining_task(config, clip, pixels))

    def batches(start: int):
        _, examples = held(batch_sharding(programs.mesh), (1, config.batch_size))
        return pretraining_batches(
            config, clip, lambda texts: tokenize(tokenizer, texts, length), start, examples
        )

    name = f"seed_{config.seed}/pretrain"
    state = Trainer(config, programs, batches, workdir, name, timeline).run().state
    params = jax.tree.map(lambda x: x[0], multihost.whole(state.params))
    if multihost.is_main():
        with timeline.phase("export"):
            checkpoint_io.save(model, Checkpoint(clip, params, pixels, tokenizer))
    multihost.barrier("pretrained model")
    return model
