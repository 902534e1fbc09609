"""What a run or an evaluation begins with: its data, its pretrained model, its classifier."""

from __future__ import annotations

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

from modelstock_jax.data import benchmark
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.options import check_options
from modelstock_jax.experiment.pretrained import open_anchor
from modelstock_jax.fileio import flat, plain
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.training import multihost
from modelstock_jax.training.classifier import Classifier, anchor_classifier
from modelstock_jax.training.launcher import use_cores
from modelstock_jax.training.step_fns import use_compilation_cache


def prepare(config: ConfigDict, **more: Any) -> None:
    """Checks the options and sets up JAX; call it before anything is opened or computed.

    Args:
      config: the run's options.
      **more: what else must be the same on every process, by the flag's name.

    Raises:
      UserError: for an option that cannot be meant, or a process that was started otherwise.
    """
    check_options(config)
    use_cores(config)
    use_compilation_cache(config.compute.compilation_cache)
    check_same(config, **more)


class Opened(NamedTuple):
    """What a run begins with.

    Attributes:
      pretrained: the checkpoint of `config.pretrained`.
      data: where to train and to measure.
      anchor: the image tower under its head.
    """

    pretrained: Checkpoint
    data: Benchmark
    anchor: Classifier


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
    return multihost.main_first(load) if config.data.cache else load()


def classify(
    config: ConfigDict, pretrained: Checkpoint, data: Benchmark, heads: Path | None
) -> Classifier:
    """`pretrained` as a classifier; a zero-shot head is made by process 0 and kept in `heads`."""
    make = partial(anchor_classifier, config, pretrained, data, heads)
    return multihost.main_first(make) if pretrained.head is None and heads else make()


def open_all(config: ConfigDict, heads: Path | None) -> Opened:
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
    return Opened(pretrained, data, classify(config, pretrained, data, heads))


# All processes of a run are given the same: config, command line and code.


def check_same(config: ConfigDict, **more: Any) -> None:
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
    one_does = bool(multihost.anywhere(bool(differing)))
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
    padded = np.zeros(multihost.agree(len(data)), np.uint8)
    padded[: len(data)] = data[: len(padded)]
    return multihost_utils.broadcast_one_to_all(padded).astype(np.uint8).tobytes().decode()
