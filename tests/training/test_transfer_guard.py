"""`monitor.transfer_guard='disallow'`: the training loop has no implicit transfer, and none passes.

On a CPU, JAX sees only transfers to the device. Transfers to the host are therefore counted here.
"""

from __future__ import annotations

import dataclasses
import traceback

import jax
import numpy as np
import pytest

from modelstock_jax.training import trainer as trainer_module
from modelstock_jax.training.step_fns import StepFunctions
from modelstock_jax.training.trainer import Trainer
from tests.training import linear

HYPER = {"learning_rate": np.array([1e-2, 2e-2]), "num_steps": np.array([8, 6])}


def make_trainer(workdir, hyper=HYPER, **changes) -> Trainer:
    config = linear.config(monitor__transfer_guard="disallow", **changes)
    fns = linear.step_functions(config)
    fns = StepFunctions(config, dataclasses.replace(fns.task, hyper=hyper))
    return Trainer(config, fns, lambda start: linear.batches(config, start), workdir, "run")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compute__replica_mode": "vmap", "mesh__replica": 2, "mesh__data": 2},
        {"monitor__on_non_finite": "restore_last_merge", "optimizer__projection__name": "ftp"},
    ],
)
def test_a_run_has_no_implicit_transfer(tmp_path, changes):
    assert make_trainer(tmp_path, **changes).run().merged is not None


def put_on_device(mesh, batch):
    return batch  # NumPy arrays: the call of the jitted step would transfer them.


def test_an_implicit_transfer_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "put_batch", put_on_device)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        make_trainer(tmp_path).run()


def test_it_is_allowed_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "put_batch", put_on_device)
    linear.trainer(tmp_path).run()


def test_metrics_are_read_by_explicit_transfers(tmp_path, monkeypatch):
    """On a GPU, `np.asarray` and `float` of an array on the device are implicit transfers."""
    array, inside, implicit = type(jax.numpy.zeros(1)), [], []
    read, device_get, asarray = array._value.fget, jax.device_get, np.asarray

    def count(value):
        guarded = jax.config.jax_transfer_guard == "disallow" and not inside
        if guarded and isinstance(value, jax.Array):
            implicit.append("".join(traceback.format_stack(limit=6)))

    def counted_device_get(tree):
        inside.append(tree)
        try:
            return device_get(tree)
        finally:
            inside.pop()

    monkeypatch.setattr(array, "_value", property(lambda self: (count(self), read(self))[1]))
    monkeypatch.setattr(np, "asarray", lambda x, *a, **k: (count(x), asarray(x, *a, **k))[1])
    monkeypatch.setattr(jax, "device_get", counted_device_get)
    make_trainer(tmp_path).run()
    assert not implicit, implicit[0]
