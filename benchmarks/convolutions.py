"""Time of convolutions, and of training steps of convolutional nets, by vmap and by map.

    python benchmarks/convolutions.py --json convolutions.json

Layers: forward and backward pass of a convolution as this package computes it (windows x matrix;
of a depthwise convolution, the sum of shifted inputs) and by `jax.lax.conv_general_dilated`, each
alone, for two replicas by `vmap`, and for two replicas in the loop of `jax.lax.map`. Steps: the
package's own training step (`training.step_fns.StepFunctions`) of a small ResNet and ConvNeXt with
two replicas, on one device and on two. All ways of a case take turns. Needs jax, flax, optax and
ml_collections. On a CPU the two devices are simulated, and share its cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Before JAX is imported; it has no effect on a GPU.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import models  # noqa: E402
from benchmarks.turns import conditions, ratio, table, take_turns, write_json  # noqa: E402
from modelstock_jax.models.compute import Compute  # noqa: E402
from modelstock_jax.models.config import ModelConfig  # noqa: E402
from modelstock_jax.models.convnext import ConvNeXtConfig  # noqa: E402
from modelstock_jax.models.convolution import Convolution, Depthwise  # noqa: E402
from modelstock_jax.models.model import classifier, init  # noqa: E402
from modelstock_jax.models.resnet import ResNetConfig  # noqa: E402
from modelstock_jax.training.cost_analysis import temporary_bytes  # noqa: E402
from modelstock_jax.training.losses import cross_entropy  # noqa: E402
from modelstock_jax.training.sharding import put_batch  # noqa: E402
from modelstock_jax.training.step_fns import StepFunctions, Task  # noqa: E402

CLASSES = 10
# Kind, channels and side of the images of a layer; window 3, of a depthwise convolution 7.
LAYERS = (
    ("convolution", 64, 28),
    ("convolution", 256, 7),
    ("depthwise", 64, 28),
    ("depthwise", 256, 7),
)
NETS: dict[str, ModelConfig] = {
    "resnet": ResNetConfig(
        embedding_size=32, hidden_sizes=(64, 128, 256), depths=(1, 1, 1), image_size=64
    ),
    "convnext": ConvNeXtConfig(hidden_sizes=(32, 64, 128), depths=(1, 1, 1), image_size=64),
}
# Replica mode, and devices along the replica and the data axis of the mesh.
STEPS = (("map", 1, 1), ("vmap", 1, 1), ("vmap", 2, 1), ("map", 1, 2), ("vmap", 1, 2))


def layer_ways(kind: str, channels: int) -> dict[str, tuple[dict, Callable]]:
    """Return name -> (parameters, apply(params, x)) of a layer, with equal parameters."""
    rngs, depthwise = nnx.Rngs(0), kind == "depthwise"
    if depthwise:
        layer: nnx.Module = Depthwise(channels, 7, Compute(), rngs)
    else:
        layer = Convolution(channels, channels, 3, Compute(), rngs)
    graph, state = nnx.split(layer)
    params = nnx.to_pure_dict(state)
    size, inputs = (7, 1) if depthwise else (3, channels)

    def by_lax(params: dict, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            params["kernel"].reshape(size, size, inputs, channels),
            window_strides=(1, 1),
            padding=((size // 2,) * 2,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels if depthwise else 1,
        )
        return y + params["bias"][None, None, None] if depthwise else y

    ours = "shifted sums" if depthwise else "windows x matrix"
    return {ours: (params, lambda p, x: nnx.merge(graph, p)(x)), "lax": (params, by_lax)}


def gradient(apply: Callable) -> Callable:
    """Return the gradient of half the squared norm of a layer's output, by all inputs."""
    return jax.grad(lambda params, x: (apply(params, x) ** 2).sum() / 2, argnums=(0, 1))


def measure_layer(case: tuple[str, int, int], args) -> list[dict]:
    """Return one row per way of a layer and per way to run replicas."""
    kind, channels, side = case
    x = np.random.default_rng(0).standard_normal((args.batch, side, side, channels), np.float32)
    runs, rows = {}, []
    for way, (params, apply) in layer_ways(kind, channels).items():
        one = gradient(apply)
        pair = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), (params, x))
        for replicas, function, inputs in (
            ("one", one, (params, x)),
            ("vmap", jax.vmap(one), pair),
            ("map", lambda *both, one=one: jax.lax.map(lambda each: one(*each), both), pair),
        ):
            rows.append({"layer": kind, "channels": channels, "side": side, "way": way,
                         "replicas": replicas})  # fmt: skip
            runs[f"{way}, {replicas}"] = repeated(jax.jit(function), jax.device_put(inputs))
    seconds = take_turns(runs, args.rounds, args.seconds)
    return [row | {"seconds": seconds[f"{row['way']}, {row['replicas']}"]} for row in rows]


def repeated(function: Callable, inputs: tuple) -> Callable[[int], None]:
    """Return a function for `take_turns`."""

    def run(count: int) -> None:
        outputs = None
        for _ in range(count):
            outputs = function(*inputs)
        jax.block_until_ready(outputs)

    return run


def make_programs(net: str, mode: str, replica: int, data: int, batch_size: int) -> StepFunctions:
    """Return the step functions of two replicas of a net, as training compiles them."""
    model, config = NETS[net], models.run_config("tiny")
    config.batch_size, config.compute.replica_mode = batch_size, mode
    config.mesh.replica, config.mesh.data = replica, data
    head = {
        "kernel": np.zeros((model.feature_size, CLASSES), np.float32),
        "bias": np.zeros(CLASSES, np.float32),
    }
    params = {"image_tower": init(model, jax.random.key(0))["image_tower"], "head": head}
    task = Task(
        params=jax.tree.map(np.asarray, params),
        loss_fn=cross_entropy(classifier(model), lambda images: images / np.float32(255)),
        steps_per_epoch=1000,
        num_steps=10_000,
        num_heads=1,
        augment=lambda key, batch: batch,
    )
    return StepFunctions(config, task)


def measure_steps(net: str, args) -> list[dict]:
    """Return one row per replica mode and mesh of a net."""
    rng, side = np.random.default_rng(0), NETS[net].image_size
    batch = {
        "image": rng.integers(0, 256, (2, args.batch, side, side, 3), np.uint8),
        "label": rng.integers(0, CLASSES, (2, args.batch)).astype(np.int32),
    }
    runs, rows = {}, []
    for mode, replica, data in STEPS:
        if replica * data > jax.device_count():
            continue
        programs = make_programs(net, mode, replica, data, args.batch)
        way = f"{mode}, mesh {replica} x {data}"
        runs[way], step = steps(programs, batch)
        rows.append({"net": net, "way": way, "devices": replica * data,
                     "temporary_bytes": temporary_bytes(step)})  # fmt: skip
    seconds = take_turns(runs, args.rounds, args.seconds)
    return [row | {"seconds": seconds[row["way"]]} for row in rows]


def steps(programs: StepFunctions, batch: dict) -> tuple[Callable[[int], None], Any]:
    """Return a function for `take_turns`, and the compiled step."""
    constants, placed = programs.step_constants(), put_batch(programs.mesh, batch)
    step = programs.train_step.lower(programs.abstract_state, placed, constants).compile()
    states = [programs.init_state(0)]

    def run(count: int) -> None:
        for _ in range(count):  # A step donates the state.
            state, metrics = step(states.pop(), placed, constants)
            states.append(state)
        jax.block_until_ready((states, metrics))

    return run, step


def layer_cells(rows: list[dict]) -> list[dict[str, str]]:
    """Return rows of the table of layers: one per way, with the time relative to lax's."""
    cells = []
    lax = {row["replicas"]: row["seconds"] for row in rows if row["way"] == "lax"}
    for way in dict.fromkeys(row["way"] for row in rows):
        same = {row["replicas"]: row for row in rows if row["way"] == way}
        first = same["one"]
        line = {
            "layer": first["layer"],
            "input": f"{first['side']} x {first['side']} x {first['channels']}",
            "way": way,
        }
        for replicas, row in same.items():
            line |= {
                f"{replicas}, ms": f"{1000 * statistics.median(row['seconds']):.3g}",
                f"{replicas} / lax": f"{ratio(row['seconds'], lax[replicas]):.2f}",
            }
        cells.append(line)
    return cells


def step_cells(rows: list[dict]) -> list[dict[str, str]]:
    """Return rows of the table of steps, with the time relative to the first way."""
    return [
        {
            "net": row["net"],
            "replicas": row["way"],
            "devices": str(row["devices"]),
            "ms per step": f"{1000 * statistics.median(row['seconds']):.4g}",
            "time / first": f"{ratio(row['seconds'], rows[0]['seconds']):.2f}",
            "temporaries per device, MB": f"{row['temporary_bytes'] / 1e6:.0f}",
        }
        for row in rows
    ]


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["layers", "steps"])
    parser.add_argument("--batch", type=int, default=8, help="batch size per replica (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="minimum time of a turn (default: 0.5)"
    )
    parser.add_argument("--json", type=Path, help="output file with all values")
    args = parser.parse_args(argv)
    results: dict[str, Any] = conditions(
        jax.devices()[0].device_kind, ("jax", "jaxlib", "flax", "optax", "numpy")
    )
    cases = [
        *(("layers", layer_cells, partial(measure_layer, case)) for case in LAYERS),
        *(("steps", step_cells, partial(measure_steps, net)) for net in NETS),
    ]
    for part, cells, measure in cases:
        if part in args.parts:
            rows = measure(args)
            results.setdefault(part, []).extend(rows)
            print(table(cells(rows)), flush=True)
            write_json(args.json, results)


if __name__ == "__main__":
    main()
