"""MonoSoup and LiNeS on files: the same weights as the library and as float64 NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax import lines, monosoup
from modelstock_jax.checkpoint_merge import singular_directions
from modelstock_jax.checkpoint_merge.executor import run
from modelstock_jax.errors import UserError
from tests.checkpoint_merge.engine import (
    SHAPES,
    deltas,
    merge,
    models,
    numbers,
    plan,
    rounding,
    rows,
    save,
)
from tests.merging.test_single_model import soup_of_matrix

MATRICES = [name for name, shape in SHAPES.items() if len(shape) > 1]


def expected(inputs, name):
    d, shape = deltas(inputs, name).mean(axis=0), SHAPES[name]
    if len(shape) > 1:
        d = soup_of_matrix(d.reshape(shape[0], -1))
    return numbers(inputs[0][name]) + d.reshape(shape)


def low_rank(inputs, rank=2):
    """Replace the updates of the matrices by ones whose effective rank is low."""
    rng = np.random.default_rng(1)
    for model in inputs[1:]:
        for name in MATRICES:
            w0 = inputs[0][name]
            columns = w0.size // len(w0)
            d = rng.standard_normal((len(w0), rank)) @ rng.standard_normal((rank, columns))
            noise = 0.02 * rng.standard_normal((len(w0), columns))
            model[name] = (numbers(w0) + 0.1 * (d + noise).reshape(w0.shape)).astype(w0.dtype)
    return inputs


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_monosoup_of_every_shape(tmp_path, number, dtype):
    inputs = low_rank(models(number=number, dtype=dtype))
    out, report = merge(tmp_path, inputs, method="monosoup")
    for name in SHAPES:
        want = expected(inputs, name)
        error = np.abs(numbers(out[name]) - want)
        # Rounded once; 1e-9 for sums in another order.
        assert (error <= 0.5 * rounding(dtype, want) + 1e-9).all(), name
    row = rows(report)[MATRICES[0]]
    assert row["ratio"] is None and row["outcome"] == "fixed_ratio"
    soup, kept = (
        np.linalg.norm(expected(inputs, MATRICES[0]) - numbers(inputs[k][MATRICES[0]]))
        for k in (0, 1)
    )
    assert soup > 0 and kept > 0


def test_monosoup_is_that_of_the_library(tmp_path):
    inputs = low_rank(models(number=2))
    out, _ = merge(tmp_path, inputs, method="monosoup")
    stacked = {name: np.stack([model[name] for model in inputs[1:]]) for name in SHAPES}
    merged, _ = monosoup(inputs[0], stacked, filter_axis=0)
    for name in SHAPES:
        np.testing.assert_array_max_ulp(np.asarray(merged[name]), np.asarray(out[name]), 1)


def test_panels_and_threads(tmp_path, monkeypatch):
    """A wide matrix is multiplied with itself panel by panel; the bytes read are as planned."""
    shapes = {"wide": (37, 300), "tall": (300, 37), "long": (1, 5000), "vector": (50,)}
    inputs = models(shapes)
    paths, written = save(tmp_path, inputs), []
    for k, (panel, block, threads) in enumerate([(2**26, 512, 1), (2**26, 512, 2), (2**13, 7, 2)]):
        monkeypatch.setattr(singular_directions, "_PANEL", panel)
        monkeypatch.setattr(singular_directions, "_BLOCK", block)
        planned = plan(paths, method="monosoup", threads=threads)
        report = run(planned, tmp_path / f"out{k}")
        assert report.bytes_read == planned.bytes_read
        written.append((tmp_path / f"out{k}" / "model.safetensors").read_bytes())
    assert singular_directions.num_passes((37, 300)) == 14
    assert written[0] == written[1]
    for k in (0, 2):
        out = plan([tmp_path / f"out{k}", paths[0]], method="passthrough").base
        for name, shape in shapes.items():
            d = deltas(inputs, name).mean(axis=0)
            d = soup_of_matrix(d.reshape(shape[0], -1)) if len(shape) > 1 else d
            want = numbers(inputs[0][name]) + d.reshape(shape)
            count = int(np.prod(shape))
            found = out.read(name, 0, count).reshape(shape)
            np.testing.assert_allclose(found, want, rtol=2**-23, atol=1e-9)


def test_an_unmoved_matrix_is_that_of_the_fine_tune(tmp_path):
    shapes = {"a": (20, 30), "b": (30, 20)}
    base, ft = models(shapes, number=1, dtype=np.float64, size=1e-9)
    paths = save(tmp_path, [base, ft])
    planned = plan(paths, method="monosoup")
    assert run(planned, tmp_path / "out").bytes_read == planned.bytes_read
    out = plan([tmp_path / "out", paths[0]], method="passthrough").base
    for name in shapes:
        np.testing.assert_allclose(out.read(name, 0, 600), ft[name].ravel(), rtol=1e-15, atol=1e-16)


def test_lines_by_layer(tmp_path):
    inputs = models(number=2)
    out, report = merge(tmp_path, inputs, method="lines", alpha=0.2, parameters={"beta": 0.5})
    stacked = {name: np.stack([model[name] for model in inputs[1:]]) for name in SHAPES}
    merged, _ = lines(inputs[0], stacked, 0.2, beta=0.5)
    for name in SHAPES:
        last = "layers.1" in name or name in ("model.norm.weight", "logit_scale")
        ratio = 0.7 if last else 0.2
        want = numbers(inputs[0][name]) + ratio * deltas(inputs, name).mean(axis=0).reshape(
            SHAPES[name]
        )
        assert rows(report)[name]["ratio"] == pytest.approx(ratio)
        np.testing.assert_allclose(numbers(out[name]), want, rtol=2**-23, atol=1e-9)
        np.testing.assert_array_max_ulp(np.asarray(merged[name]), np.asarray(out[name]), 1)
    by_default = plan(save(tmp_path / "x", inputs), method="lines", alpha=0.2)
    report = run(by_default, tmp_path / "default")
    assert rows(report)["model.norm.weight"]["ratio"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "monosoup", "unit": "layer"}, "monosoup.*--unit tensor, not layer"),
        ({"method": "lines"}, "--method lines requires --alpha"),
        ({"method": "lines", "alpha": 0.5, "parameters": {"beta": np.inf}}, "beta.*finite"),
        ({"method": "lines", "alpha": 0.5}, "number of a block.*'a'"),
    ],
)
def test_errors(tmp_path, options, message):
    paths = save(tmp_path, models({"a": (4, 4)}))
    with pytest.raises(UserError, match=message):
        plan(paths, **options)


def test_the_memory_of_a_plan(tmp_path):
    paths = save(tmp_path, models({"a": (300, 200), "b": (2,)}))
    soup, stock = (plan(paths, method=method).memory for method in ("monosoup", "model_stock"))
    assert soup - stock == 40 * 200**2
