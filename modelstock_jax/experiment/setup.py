"""Prepare a run or an evaluation: options, data, pretrained model, classifier."""

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
from modelstock_jax.data.views import check_resize_on
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.options import check_options
from modelstock_jax.fileio import flatten, to_json_types
from modelstock_jax.models import checkpoint_io, formats
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.formats import CONFIG
from modelstock_jax.models.model import config_from_dict, resize_positions
from modelstock_jax.models.preprocessor import PREPROCESSOR_FILES, Preprocessor
from modelstock_jax.models.published import PUBLISHED, Sizes
from modelstock_jax.models.tokenizer import tokenize
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.tensor_files.reader import read_json
from modelstock_jax.training import multihost
from modelstock_jax.training.classifier import Classifier, anchor_classifier
from modelstock_jax.training.compilation_cache import use_compilation_cache
from modelstock_jax.training.launcher import set_cpu_devices
from modelstock_jax.training.sharding import batch_sharding, local_indices
from modelstock_jax.training.stages import pretraining_batches, pretraining_task
from modelstock_jax.training.step_fns import StepFunctions
from modelstock_jax.training.trainer import Trainer

_DATA = Path(glyphs.__file__).parent
# Pretrained by configs/glyph_pretrain.py with seeds 0 and 1.
BUNDLED = {"glyph-clip": _DATA / "clip", "glyph-clip-1": _DATA / "clip_1"}


def check_and_set_up(config: ConfigDict, **more: Any) -> None:
    """Check the options and set up JAX; call it before any file is opened.

    Args:
      config: options of the run
      **more: other values that must be equal on every process, by the name of their flag

    Raises:
      UserError: an option is invalid, or a process was started with other options
    """
    check_options(config)
    set_cpu_devices(config)
    use_compilation_cache(config.compute.compilation_cache)
    check_same_on_all_processes(config, **more)


class OpenedExperiment(NamedTuple):
    """Inputs of a run.

    Attributes:
      pretrained: checkpoint of `config.pretrained`
      data: training, validation and test data
      anchor: classifier of the image tower and its head
    """

    pretrained: Checkpoint
    data: Benchmark
    anchor: Classifier


def open_experiment(
    config: ConfigDict, heads: Path | None, *, training: bool = True
) -> OpenedExperiment:
    """Open the inputs of a run or an evaluation.

    Args:
      config: options of the run
      heads: cache directory of zero-shot heads; None computes the head each time
      training: False if the training images are not needed, see `benchmark.load`

    Raises:
      UserError: an input is missing or does not match the others
    """
    check_data(config, training=training)
    pretrained = open_anchor(config)
    data = open_data(config, training=training)
    return OpenedExperiment(pretrained, data, classify(config, pretrained, data, heads))


def check_data(config: ConfigDict, *, training: bool = True) -> None:
    """Check that the data exists; call it before a model is downloaded.

    Raises:
      UserError: the first missing dataset
    """
    if missing := benchmark.missing(config.data, training=training):
        more = f" ({len(missing) - 1} more: --dry-run lists all)" if missing[1:] else ""
        raise UserError(missing[0] + more)


def open_data(config: ConfigDict, *, training: bool = True) -> Benchmark:
    """Open the data of `config.data`; only process 0 writes a cache of decoded images."""
    load = partial(benchmark.load, config.data, training=training)
    return multihost.main_process_first(load) if config.data.decoded_cache_dir else load()


def classify(
    config: ConfigDict, pretrained: Checkpoint, data: Benchmark, heads: Path | None
) -> Classifier:
    """Return `pretrained` as a classifier; process 0 caches a zero-shot head in `heads`."""
    make = partial(anchor_classifier, config, pretrained, data, heads)
    return multihost.main_process_first(make) if pretrained.head is None and heads else make()


def open_anchor(config: ConfigDict) -> Checkpoint:
    """Return the checkpoint of `config.pretrained`, resized to `config.image_size` if it is set.

    Raises:
      UserError: as `open_pretrained`, the size does not match the patches or the data, or the
        device cannot resize with the checkpoint's filter
    """
    checkpoint, size = open_pretrained(config.pretrained), _image_size(config)
    check_resize_on(config.data.resize_on, checkpoint.preprocessor.resample)
    if not size:
        return checkpoint
    model, params = resize_positions(checkpoint.params, checkpoint.config, size)
    pixels = checkpoint.preprocessor.with_image_size(size)
    return dataclasses.replace(checkpoint, config=model, params=params, preprocessor=pixels)


def open_pretrained(name: str) -> Checkpoint:
    """Read a checkpoint.

    Args:
      name: value of `config.pretrained`: a directory, a hub id or the name of a bundled checkpoint

    Raises:
      UserError: no such checkpoint, or it is not a complete checkpoint of a supported model
    """
    return checkpoint_io.load(BUNDLED.get(name, name))


def sizes(config: ConfigDict) -> Sizes:
    """Return the sizes of the model of `open_anchor` without reading weights.

    Raises:
      UserError: the model is not on this machine and not one of `PUBLISHED`, or the device cannot
        resize with its filter
    """
    sizes, size = _sizes(config.pretrained, config.data.resize_on), _image_size(config)
    return Sizes(sizes.model.with_image_size(size), size) if size else sizes


def _image_size(config: ConfigDict) -> int:
    if config.image_size and config.data.name == "glyphs":
        raise UserError(
            f"image_size={config.image_size}: the synthetic images have one size; use 0"
        )
    return config.image_size


def _sizes(name: str, resize_on: str) -> Sizes:
    directory = _local_directory(name)
    if directory is None:
        if name in PUBLISHED:
            return PUBLISHED[name]
        raise UserError(f"{missing_checkpoint(name)[0]}; its sizes are unknown without its files")
    path = directory / CONFIG
    if not path.is_file():
        config = open_pretrained(name).config  # Other formats store the sizes elsewhere.
        return Sizes(config, config.image_size)
    try:
        config = config_from_dict(read_json(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    size = config.image_size
    # Without the weights, the other files may be missing too.
    if any((directory / name).is_file() for name in PREPROCESSOR_FILES):
        preprocessor = Preprocessor.read(directory)
        check_resize_on(resize_on, preprocessor.resample)
        size = preprocessor.image_size
    return Sizes(config.with_image_size(size) if config.is_convolutional else config, size)


def tensor_names(name: str) -> list[str] | None:
    """Return the tensor names of a checkpoint on this machine; None if it is not here.

    Args:
      name: value of `config.pretrained`
    """
    directory = _local_directory(name)
    if directory is None or not any(directory.glob("*.safetensors")):
        return None
    return list(formats.WRITABLE["hugging_face"].open(directory))


def missing_checkpoint(name: str) -> list[str]:
    """Return what is missing to read the weights, with how to fix it; empty if nothing is.

    Args:
      name: value of `config.pretrained`
    """
    directory = _local_directory(name)
    if directory is not None:
        if any(directory.glob("*.safetensors")):
            return []
        return [f"pretrained={name}: {directory} has no .safetensors file; download it again"]
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        repository, _, revision = name.partition("@")
        command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
        return [
            f"pretrained={name}: not on this machine; the run downloads it, or `{command}` does now"
        ]
    return [f"pretrained={name}: no such directory; pass the directory of a checkpoint or a hub id"]


def _local_directory(name: str) -> Path | None:
    """Return the directory of a checkpoint; None if it must be downloaded first."""
    path = Path(BUNDLED.get(name, name))
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download  # Takes half a second: only for hub ids.

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):
        return None


def pretrain(config: ConfigDict, workdir: Path, timeline: Timeline) -> Path:
    """Pretrain a CLIP from scratch and write it to `workdir`/model, unless it exists.

    Returns:
      directory of the checkpoint
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
    """Check that all processes have the same config and code; does nothing with one process.

    Args:
      config: options of the run
      **more: other values that must be equal, by the name of their flag

    Raises:
      UserError: on every process if one differs; the process that differs lists the differences
    """
    if jax.process_count() == 1:
        return
    own = flatten({"config": to_json_types(config.to_dict()), "code": _code(), **more})
    main = json.loads(_from_main(json.dumps(own, sort_keys=True)))
    differences = [
        f"{key} is {own.get(key)!r}, on process 0 {main.get(key)!r}"
        for key in sorted(own.keys() | main.keys())
        if json.dumps(own.get(key)) != json.dumps(main.get(key))
    ]
    any_differs = bool(multihost.any_process(bool(differences)))
    if differences:
        raise UserError(
            f"process {jax.process_index()} was started differently from process 0: "
            f"{'; '.join(differences)}; start every process with the same command and code"
        )
    if any_differs:
        raise UserError(
            "not all processes were started with the same config and code; the error of the "
            "process that differs lists the differences"
        )


def _code() -> dict[str, str]:
    """Return a checksum of this package's files, and the versions that results depend on."""
    checksum, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        checksum.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy", "grain")}
    return {"modelstock_jax": checksum.hexdigest()[:16], **versions}


def _from_main(text: str) -> str:
    data = np.frombuffer(text.encode(), np.uint8)
    padded = np.zeros(multihost.broadcast_from_main(len(data)), np.uint8)
    padded[: len(data)] = data[: len(padded)]
    return multihost_utils.broadcast_one_to_all(padded).astype(np.uint8).tobytes().decode()
