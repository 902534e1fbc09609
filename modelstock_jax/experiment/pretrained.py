"""The pretrained model of a run: opened, or made."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.clip import weights
from modelstock_jax.clip.checkpoint import Checkpoint
from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.clip.preprocessor import Preprocessor
from modelstock_jax.clip.zero_shot import tokenize
from modelstock_jax.data import glyphs
from modelstock_jax.training.loop import Trainer
from modelstock_jax.training.pretrain import pretraining_batches, pretraining_task
from modelstock_jax.training.programs import Programs

_DATA = Path(glyphs.__file__).parent
BUNDLED = {"glyph-clip": _DATA / "clip"}


def open_pretrained(name: str) -> Checkpoint:
    """Reads the checkpoint that `config.pretrained` names: a directory, or a bundled one.

    Raises:
      UserError: if there is no such directory, or it is not a whole CLIP checkpoint.
    """
    return weights.load(BUNDLED.get(name, name))


def pretrain(config: ConfigDict, workdir: Path) -> Path:
    """Pretrains a CLIP from scratch and writes it to `workdir`/model, unless it is there.

    Returns:
      The checkpoint's directory.
    """
    model = workdir / "model"
    if model.exists():
        return model
    clip = CLIPConfig.from_dict(config.pretrain.clip.to_dict())
    pixels = Preprocessor((0.5,) * 3, (0.25,) * 3, clip.vision.image_size)
    tokenizer = BUNDLED.get(config.pretrain.tokenizer, Path(config.pretrain.tokenizer))
    length = clip.text.max_position_embeddings
    programs = Programs(config, pretraining_task(config, clip, pixels))

    def batches(start: int):
        return pretraining_batches(
            config, clip, lambda texts: tokenize(tokenizer, texts, length), start
        )

    trainer = Trainer(config, programs, batches, workdir, f"seed_{config.seed}/pretrain")
    state = trainer.run().state
    params = jax.tree.map(lambda x: np.asarray(x[0]), state.params)
    return weights.save(model, Checkpoint(clip, params, pixels, tokenizer))
