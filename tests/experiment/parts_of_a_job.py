"""Program of one of several processes: calls the functions of `multihost`, prints the results."""

from __future__ import annotations

import json
import os
import signal
import time

from absl import app, flags, logging

from modelstock_jax.training.launcher import distributed_session

flags.DEFINE_string("coordinator_address", None, "")
flags.DEFINE_integer("num_processes", None, "")
flags.DEFINE_integer("process_id", None, "")
flags.DEFINE_string("mistake", "", "")
flags.DEFINE_string("workdir", "", "")
FLAGS = flags.FLAGS


def main(_) -> None:
    logging.set_verbosity(logging.FATAL)  # As in launch.py.
    number = FLAGS.process_id
    out = os.fdopen(os.dup(1), "w")  # print() is silent on all processes except the first.
    with distributed_session(FLAGS.coordinator_address, FLAGS.num_processes, number):
        if FLAGS.mistake == "other config":
            different_configs(number)
        elif FLAGS.mistake == "lost":
            kill_process_0(number)
        elif FLAGS.mistake == "late":
            json.dump(late_sum(number), out)
            out.flush()
        else:
            json.dump(call_all(number), out)
            out.flush()


def call_all(number: int) -> dict:
    """Return the results of each function on this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from modelstock_jax.evaluation import make_evaluator
    from modelstock_jax.training import multihost
    from modelstock_jax.training.launcher import PreemptionHandler
    from modelstock_jax.training.sharding import (
        batch_sharding,
        device_put_global,
        local_indices,
        make_global_array,
        make_mesh,
        put_batch,
    )
    from tests.test_evaluation import CLASSES, apply, image_set

    print("only process 0 prints", number)
    results = {
        "devices": jax.device_count(),
        "main": multihost.is_main(),
        "broadcast": [
            multihost.broadcast_from_main(7 + number),
            multihost.broadcast_from_main(bool(number)),
        ],
        "any_process": [bool(multihost.any_process(flag)) for flag in (number == 1, False)],
    }
    meshes = {"(2, 2)": (2, 2), "(1, 4)": (1, 4)}
    for name, sizes in meshes.items():
        mesh = make_mesh(*sizes, num_replicas=2, batch_size=8)
        rows, columns = local_indices(batch_sharding(mesh), (2, 8))
        batch = np.arange(16 * 3).reshape(2, 8, 3)
        placed = put_batch(mesh, {"x": batch[np.ix_(rows, columns)]})["x"]
        results[name] = {
            "local_indices": [rows.tolist(), columns.tolist()],
            "to_host": np.array_equal(multihost.to_host({"x": placed})["x"], batch),
            "device_put_global": np.array_equal(
                multihost.to_host(device_put_global(batch, batch_sharding(mesh))), batch
            ),
            "shape": make_global_array(
                batch_sharding(mesh), batch[np.ix_(rows, columns)], (2, 8)
            ).shape,
        }
        evaluate = make_evaluator(apply, lambda x: x.astype(jnp.float32), mesh, 6)
        params = {"head": {"bias": np.linspace(-20, 20, CLASSES, dtype=np.float32)}}
        progress = []
        sets = [image_set(13), image_set(1), image_set(8, (1, 4, 5))]
        results[name] |= {"accuracy": evaluate(params, sets, progress.append), "progress": progress}
    results["restored"] = restored(FLAGS.workdir)
    with PreemptionHandler() as preemption:
        stops = []
        for step in range(1, 7):
            if step == 3 and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            stops.append(preemption.should_stop(step))
    return results | {"should_stop": stops}


def restored(directory: str) -> list[bool]:
    """Return whether a state that was saved on one mesh is restored on each of two meshes."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from modelstock_jax.training import multihost
    from modelstock_jax.training.checkpoints import Checkpoints
    from modelstock_jax.training.sharding import device_put_global, make_mesh

    values = {
        "bias": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "step": np.int32(4),
        "count": np.array([7, 8], np.int32),
        "sharded": np.arange(16, dtype=np.float32),
    }
    specs = {"bias": ("replica",), "step": (), "count": ("replica",), "sharded": ("data",)}

    def placed(replica: int, data: int, tree):
        mesh = make_mesh(replica, data, num_replicas=2, batch_size=8)
        shardings = {n: NamedSharding(mesh, PartitionSpec(*spec)) for n, spec in specs.items()}
        return device_put_global(tree, shardings)

    equal = []
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, placed(2, 2, values))
        checkpoints.wait()
        for shape in ((2, 2), (1, 4)):
            got = checkpoints.restore(1, placed(*shape, jax.tree.map(np.zeros_like, values)))
            restored_values = multihost.to_host(got)
            equal.append(
                all(np.array_equal(restored_values[name], values[name]) for name in values)
            )
    return equal


def different_configs(number: int) -> None:
    """Check configs of which process 1 has another learning rate."""
    from configs import glyphs
    from modelstock_jax.experiment.setup import check_same_on_all_processes

    config = glyphs.get_config()
    config.optimizer.learning_rate += number
    check_same_on_all_processes(config, workdir="run")


def kill_process_0(number: int) -> None:
    """Kill process 0, the hardest case, while the other process waits for it."""
    from modelstock_jax.training import multihost

    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    multihost.barrier("never")


def late_sum(number: int) -> float:
    """Sum over the data axis; process 1 starts later than Gloo's timeout for joining them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from modelstock_jax.training import multihost
    from modelstock_jax.training.sharding import make_mesh

    mesh = make_mesh(2, 2, num_replicas=2, batch_size=8)
    multihost.warm_up_collectives(mesh)
    if number == 1:
        time.sleep(33)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    parts = jax.make_array_from_callback((2,), sharding, lambda index: np.array([1.0, 2.0])[index])
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(parts)
    return float(total.addressable_data(0))


if __name__ == "__main__":
    app.run(main)
