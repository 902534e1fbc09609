"""Run as one of several processes: asks every part of `multihost` and prints what it says."""

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
    logging.set_verbosity(logging.FATAL)  # As launch.py does.
    number = FLAGS.process_id
    out = os.fdopen(os.dup(1), "w")  # The job silences print() on all processes but the first.
    with distributed_session(FLAGS.coordinator_address, FLAGS.num_processes, number):
        if FLAGS.mistake == "other config":
            different_configs(number)
        elif FLAGS.mistake == "lost":
            lose_one(number)
        elif FLAGS.mistake == "late":
            json.dump(met_late(number), out)
            out.flush()
        else:
            json.dump(said(number), out)
            out.flush()


def said(number: int) -> dict:
    """What each door says here."""
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

    print("nobody but process 0 prints", number)
    answers = {
        "devices": jax.device_count(),
        "main": multihost.is_main(),
        "agreed": [
            multihost.broadcast_from_main(7 + number),
            multihost.broadcast_from_main(bool(number)),
        ],
        "anywhere": [bool(multihost.any_process(flag)) for flag in (number == 1, False)],
    }
    meshes = {"(2, 2)": (2, 2), "(1, 4)": (1, 4)}
    for name, sizes in meshes.items():
        mesh = make_mesh(*sizes, num_replicas=2, batch_size=8)
        rows, places = local_indices(batch_sharding(mesh), (2, 8))
        batch = np.arange(16 * 3).reshape(2, 8, 3)
        placed = put_batch(mesh, {"x": batch[np.ix_(rows, places)]})["x"]
        answers[name] = {
            "held": [rows.tolist(), places.tolist()],
            "whole": np.array_equal(multihost.to_host({"x": placed})["x"], batch),
            "spread": np.array_equal(
                multihost.to_host(device_put_global(batch, batch_sharding(mesh))), batch
            ),
            "placed": make_global_array(
                batch_sharding(mesh), batch[np.ix_(rows, places)], (2, 8)
            ).shape,
        }
        evaluate = make_evaluator(apply, lambda x: x.astype(jnp.float32), mesh, 6)
        params = {"head": {"bias": np.linspace(-20, 20, CLASSES, dtype=np.float32)}}
        seen = []
        sets = [image_set(13), image_set(1), image_set(8, (1, 4, 5))]
        answers[name] |= {"accuracy": evaluate(params, sets, seen.append), "seen": seen}
    answers["restored"] = restored(FLAGS.workdir)
    with PreemptionHandler() as interruption:
        granted = []
        for step in range(1, 7):
            if step == 3 and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            granted.append(interruption.should_stop(step))
    return answers | {"granted": granted}


def restored(directory: str) -> list[bool]:
    """Whether a state that was saved on one mesh comes back on others, here where it lies."""
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
        "cut": np.arange(16, dtype=np.float32),
    }
    specs = {"bias": ("replica",), "step": (), "count": ("replica",), "cut": ("data",)}

    def placed(replica: int, data: int, tree):
        mesh = make_mesh(replica, data, num_replicas=2, batch_size=8)
        shardings = {n: NamedSharding(mesh, PartitionSpec(*spec)) for n, spec in specs.items()}
        return device_put_global(tree, shardings)

    found = []
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, placed(2, 2, values))
        checkpoints.wait()
        for shape in ((2, 2), (1, 4)):
            got = checkpoints.restore(1, placed(*shape, jax.tree.map(np.zeros_like, values)))
            whole = multihost.to_host(got)
            found.append(all(np.array_equal(whole[name], values[name]) for name in values))
    return found


def different_configs(number: int) -> None:
    """Process 1 has another learning rate."""
    from configs import glyphs
    from modelstock_jax.experiment.setup import check_same_on_all_processes

    config = glyphs.get_config()
    config.optimizer.learning_rate += number
    check_same_on_all_processes(config, workdir="there")


def lose_one(number: int) -> None:
    """Process 0, whose loss is the hardest, is killed while the other waits for it."""
    from modelstock_jax.training import multihost

    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    multihost.barrier("never")


def met_late(number: int) -> float:
    """A sum over the data axis, to which process 1 comes later than Gloo waits to join them."""
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
    split = NamedSharding(mesh, PartitionSpec("data"))
    parts = jax.make_array_from_callback((2,), split, lambda index: np.array([1.0, 2.0])[index])
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(parts)
    return float(total.addressable_data(0))


if __name__ == "__main__":
    app.run(main)
