"""Memory of a step and a merge, as `--dry-run` says it and as it is measured.

    python benchmarks/memory.py --config=configs/vitb32.py --config.compute.dtype=float32 \
        --config.batch_size=32

Random weights and images at the config's true sizes; prints one JSON object. On a CPU (Linux) the
measure is the growth of the process's resident memory over what it was before the first array, for
steps and for a merge apart; on a GPU or TPU it is the allocator's peak on a device over both. With
--workdir it also saves the state through Orbax and restores it bit for bit.
"""

import ctypes
import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).parents[1]))
from modelstock_jax.experiment.dry_run import abstract_programs  # noqa: E402
from modelstock_jax.training.checkpoints import Checkpoints  # noqa: E402
from modelstock_jax.training.cost_analysis import memory  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_integer("steps", 2, "Steps to measure.")
flags.DEFINE_string("workdir", None, "Where to save and restore the state; nowhere by default.")


def resident(key: str) -> int:
    """Bytes of this process, 'VmRSS' now or 'VmHWM' at the most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", status).group(1))


def forget_peak() -> int:
    """The process's peak so far; the next one is counted from now on."""
    time.sleep(0.5)  # A program's results are there a moment before its temporaries are freed.
    peak = resident("VmHWM")
    ctypes.CDLL(None).malloc_trim(0)  # What was freed, and not yet given back, is no one's.
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def draw(shapes, seed: int):
    """Random arrays made in place, small enough that a step changes and does not break them."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    make = jax.jit(
        lambda key, like: 0.02 * jax.random.normal(key, like.shape, like.dtype),
        static_argnums=1,
    )
    arrays = []
    for key, leaf in zip(keys, leaves, strict=True):
        arrays.append(make(key, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)))
    return tree.unflatten(arrays)


def random_batch(batch, seed: int):
    """Images and labels on the devices, as `put_batch` leaves them."""
    rng = np.random.default_rng(seed)
    return {
        "image": jax.device_put(
            rng.integers(0, 256, batch["image"].shape, np.uint8), batch["image"].sharding
        ),
        "label": jax.device_put(
            rng.integers(0, 1000, batch["label"].shape, np.int32), batch["label"].sharding
        ),
    }


def main(argv):
    config = FLAGS.config
    logging.set_verbosity(logging.ERROR)
    programs, clip = abstract_programs(config)
    batch = programs.abstract_batch(clip.vision.image_size)
    lowered = programs.lower(batch)
    compiled = {name: program.compile() for name, program in lowered.items()}
    need = memory(programs, compiled, batch)
    del lowered
    on_cpu = jax.default_backend() == "cpu"
    peaks = [forget_peak()] if on_cpu else []  # Compiling frees much that is not given back.
    before = resident("VmRSS")

    programs.anchor = jax.device_put(draw(programs.task.params, 0), programs.params_sharding)
    # As in the middle of a run: there is a merged model from the merge before.
    state, merged, _ = compiled["merge"](programs.anchor, programs.init_state(0))
    jax.block_until_ready((state, merged))
    measured, losses = {}, []
    if on_cpu:
        peaks.append(forget_peak())
    for step in range(FLAGS.steps):
        state, metrics = compiled["step"](
            state, random_batch(batch, step), programs.step_constants(programs.anchor, merged)
        )
        losses.append(metrics["loss"].tolist())
    jax.block_until_ready(state)
    if on_cpu:
        peaks.append(forget_peak())
        measured["step"] = peaks[-1] - before
    state, merged, _ = compiled["merge"](programs.anchor, state)
    jax.block_until_ready(merged)
    if on_cpu:
        measured["merge"] = resident("VmHWM") - before
    else:
        measured["peak"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    assert np.isfinite(losses).all(), losses
    report = {
        "config": str(config.pretrained),
        "device": jax.devices()[0].device_kind,
        "batch": list(batch["image"].shape),
        "execution": programs.replica_mode,
        "parts": dataclasses.asdict(need),
        "predicted": {name: getattr(need, name) for name in measured},
        "measured": measured,
        "ratio": {name: size / getattr(need, name) for name, size in measured.items()},
        "losses": losses,
    }
    if FLAGS.workdir:
        report["restored_bit_for_bit"] = saved_and_restored(Path(FLAGS.workdir), state, merged)
    report["peak_resident"] = max([*peaks, resident("VmHWM")])
    print(json.dumps(report))


def saved_and_restored(workdir: Path, state, merged) -> bool:
    """Saves the state and the merged model as a run does; whether all of it comes back."""
    tree = {"merged": merged, "state": {k: v for k, v in state._asdict().items() if v is not None}}
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(int(state.step), tree)
        checkpoints.wait()
        back = checkpoints.restore(int(state.step), tree)
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), tree, back)
    return all(jax.tree.leaves(same)) and len(jax.tree.leaves(same)) > 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/vitb32.py", "The run to measure.")
    app.run(main)
