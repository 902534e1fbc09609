"""What a run or an evaluation begins with: options, data, pretrained model, classifier."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from modelstock_jax.data import benchmark, glyphs
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.options import check_options
from modelstock_jax.fileio import flat, plain
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.config import CLIPConfig, Preprocessor, TextConfig, VisionConfig
from modelstock_jax.models.tokenizer import tokenize
from modelstock_jax.models.transformer import resize_positions
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.tensor_files.reader import read_json
from modelstock_jax.training import multihost
from modelstock_jax.training.classifier import Classifier, anchor_classifier
from modelstock_jax.training.launcher import set_cpu_devices
from modelstock_jax.training.sharding import batch_sharding, local_indices
from modelstock_jax.training.stages import pretraining_batches, pretraining_task
from modelstock_jax.training.step_fns import StepFunctions, use_compilation_cache
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


def check_and_set_up(config: ConfigDict, **more: Any) -> None:
    """Checks the options and sets up JAX; call it before anything is opened or computed.

    Args:
      config: the run's options.
      **more: what else must be the same on every process, by the flag's name.

    Raises:
      UserError: for an option that cannot be meant, or a process that was started otherwise.
    """
    check_options(config)
    set_cpu_devices(config)
    use_compilation_cache(config.compute.compilation_cache)
    check_same_on_all_processes(config, **more)


class OpenedExperiment(NamedTuple):
    """What a run begins with.

    Attributes:
      pretrained: the checkpoint of `config.pretrained`.
      data: where to train and to measure.
      anchor: the image tower under its head.
    """

    pretrained: Checkpoint
    data: Benchmark
    anchor: Classifier


def open_experiment(config: ConfigDict, heads: Path | None) -> OpenedExperiment:
    """All that a run begins with.

    Args:
      config: the run's options.
      heads: where zero-shot heads are kept; None makes them each time.

    Raises:
      UserError: if something of it is not there, or does not fit.
    """
    check_data(config)
    pretrained = open_anchor(config)
    data = open_data(config)
    return OpenedExperiment(pretrained, data, classify(config, pretrained, data, heads))


def check_data(config: ConfigDict) -> None:
    """Refuses data that is not there: to be asked before a model is fetched.

    Raises:
      UserError: for the first set that is missing.
    """
    if lacking := benchmark.missing(config.data):
        more = f" ({len(lacking) - 1} more: --dry-run lists all)" if lacking[1:] else ""
        raise UserError(lacking[0] + more)


def open_data(config: ConfigDict) -> Benchmark:
    """The data of `config.data`; a cache of decoded images is written by process 0 alone."""
    load = partial(benchmark.load, config.data)
    return multihost.main_process_first(load) if config.data.decoded_cache_dir else load()


def classify(
    config: ConfigDict, pretrained: Checkpoint, data: Benchmark, heads: Path | None
) -> Classifier:
    """`pretrained` as a classifier; a zero-shot head is made by process 0 and kept in `heads`."""
    make = partial(anchor_classifier, config, pretrained, data, heads)
    return multihost.main_process_first(make) if pretrained.head is None and heads else make()


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


def open_pretrained(name: str) -> Checkpoint:
    """Reads the checkpoint that `config.pretrained` names: a directory, or a bundled one.

    Raises:
      UserError: if there is no such directory, or it is not a whole CLIP checkpoint.
    """
    return checkpoint_io.load(BUNDLED.get(name, name))


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
    if multihost.broadcast_from_main(model.exists()):
        return model
    clip = CLIPConfig.from_dict(config.pretrain.clip.to_dict())
    pixels = Preprocessor((0.5,) * 3, (0.25,) * 3, clip.vision.image_size)
    tokenizer = BUNDLED.get(config.pretrain.tokenizer, Path(config.pretrain.tokenizer))
    length = clip.text.max_position_embeddings
    programs = StepFunctions(config, pretraining_task(config, clip, pixels))

    def batches(start: int):
        _, examples = local_indices(batch_sharding(programs.mesh), (1, config.batch_size))
        return pretraining_batches(
            config, clip, lambda texts: tokenize(tokenizer, texts, length), start, examples
        )

    name = f"seed_{config.seed}/pretrain"
    state = Trainer(config, programs, batches, workdir, name, timeline).run().state
    params = jax.tree.map(lambda x: x[0], multihost.to_host(state.params))
    if multihost.is_main():
        with timeline.phase("export"):
            checkpoint_io.save(model, Checkpoint(clip, params, pixels, tokenizer))
    multihost.barrier("pretrained model")
    return model


def check_same_on_all_processes(config: ConfigDict, **more: Any) -> None:
    """Compares this process's config and code with those of process 0; free with one process.

    Args:
      config: the run's options.
      **more: what else must be the same, by the flag's name.

    Raises:
      UserError: on every process if one differs; on that one it says in what.
    """
    if jax.process_count() == 1:
        return
    ours = flat({"config": plain(config.to_dict()), "code": _code(), **more})
    theirs = json.loads(_from_main(json.dumps(ours, sort_keys=True)))
    differing = [
        f"{key} is {ours.get(key)!r}, there {theirs.get(key)!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if json.dumps(ours.get(key)) != json.dumps(theirs.get(key))
    ]
    one_does = bool(multihost.any_process(bool(differing)))
    if differing:
        raise UserError(
            f"process {jax.process_index()} was not started as process 0 was: "
            f"{'; '.join(differing)}; give all the same command and the same code"
        )
    if one_does:
        raise UserError(
            "not all processes were started with the same config and code: the line of the one "
            "that differs says in what"
        )


def _code() -> dict[str, str]:
    """Digest of this package's files, and the versions that decide what is computed."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy", "grain")}
    return {"modelstock_jax": digest.hexdigest()[:16], **versions}


def _from_main(text: str) -> str:
    data = np.frombuffer(text.encode(), np.uint8)
    padded = np.zeros(multihost.broadcast_from_main(len(data)), np.uint8)
    padded[: len(data)] = data[: len(padded)]
    return multihost_utils.broadcast_one_to_all(padded).astype(np.uint8).tobytes().decode()
