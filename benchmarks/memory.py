"""Memory of a step and a merge, as `--dry-run` predicts it and as measured.

    python benchmarks/memory.py --config=configs/vitb32.py --config.compute.dtype=float32 \
        --config.batch_size=32

Uses random weights and images at the config's true sizes; prints one JSON object. On a CPU (Linux)
it measures the growth of the process's resident memory since before the first array, separately for
the steps and for the merge. On a GPU or TPU it measures the allocator's peak on a device over both.
With --workdir it also saves the state with Orbax and checks that it is restored bitwise.
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
from benchmarks.gpu_checks import is_restored_bitwise  # noqa: E402
from modelstock_jax.experiment.dry_run import abstract_step_functions  # noqa: E402
from modelstock_jax.training.cost_analysis import memory  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_integer("steps", 2, "Number of steps (default: 2).")
flags.DEFINE_string("workdir", None, "Directory to save and restore the state in (default: none).")


def resident(key: str) -> int:
    """Return resident bytes of this process: 'VmRSS' is the current value, 'VmHWM' the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", status).group(1))


def reset_peak() -> int:
    """Return the process's peak so far, and reset it."""
    time.sleep(0.5)  # The temporaries of a program are freed shortly after its results are ready.
    peak = resident("VmHWM")
    ctypes.CDLL(None).malloc_trim(0)  # Returns freed memory to the system.
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def draw(shapes, seed: int):
    """Create random arrays on the devices, with values small enough for finite steps."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    normal = jax.jit(
        lambda key, leaf: 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype),
        static_argnums=1,
    )
    arrays = []
    for key, leaf in zip(keys, leaves, strict=True):
        arrays.append(normal(key, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)))
    return tree.unflatten(arrays)


def random_batch(batch, seed: int):
    """Return images and labels on the devices, sharded like those of `put_batch`."""
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
    programs, sizes = abstract_step_functions(config)
    batch = programs.abstract_batch(sizes.image_size)
    lowered = programs.lower(batch)
    compiled = {name: program.compile() for name, program in lowered.items()}
    predicted = memory(programs, compiled, batch)
    del lowered
    on_cpu = jax.default_backend() == "cpu"
    peaks = [reset_peak()] if on_cpu else []  # Compiling leaves much freed memory.
    before = resident("VmRSS")

    programs.anchor = jax.device_put(draw(programs.task.params, 0), programs.params_sharding)
    # As in the middle of a run, there is a merged model of an earlier merge.
    state, merged, _ = compiled["merge"](programs.anchor, programs.init_state(0))
    jax.block_until_ready((state, merged))
    measured, losses = {}, []
    if on_cpu:
        peaks.append(reset_peak())
    for step in range(FLAGS.steps):
        state, metrics = compiled["step"](
            state, random_batch(batch, step), programs.step_constants(programs.anchor, merged)
        )
        losses.append(metrics["loss"].tolist())
    jax.block_until_ready(state)
    if on_cpu:
        peaks.append(reset_peak())
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
        "parts": dataclasses.asdict(predicted),
        "predicted": {name: getattr(predicted, name) for name in measured},
        "measured": measured,
        "ratio": {name: size / getattr(predicted, name) for name, size in measured.items()},
        "losses": losses,
    }
    if FLAGS.workdir:
        report["restored_bit_for_bit"] = is_restored_bitwise(Path(FLAGS.workdir), state, merged)
    report["peak_resident"] = max([*peaks, resident("VmHWM")])
    print(json.dumps(report))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/vitb32.py", "Config of the run.")
    app.run(main)
