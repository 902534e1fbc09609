"""DARE in JAX: its random elements, its formulas, and the same weights as `modelstock merge`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from modelstock_jax import dare_linear, dare_ties
from modelstock_jax.checkpoint_merge.cli import parsers
from modelstock_jax.checkpoint_merge.commands import merge as merge_files
from modelstock_jax.errors import UserError
from modelstock_jax.merging import philox
from tests.merging.trees import replicas

W0, W = replicas({"a.weight": (8, 12), "b": (5,)}, 2)
N = 2


def sparse(name, density, seed=0, rescale=True):
    """Return the sparse task vectors of one tensor, by NumPy's generator, [N, n]."""
    d = W[name].astype(np.float64).reshape(N, -1) - W0[name].astype(np.float64).ravel()
    words = [philox.range_of_words(0, d.shape[1], philox.key(seed, i, name)) for i in range(N)]
    kept = np.stack(words) < np.array(density)[:, None] * 2.0**32
    return np.where(kept, d / np.array(density)[:, None] if rescale else d, 0)


@pytest.mark.parametrize("rescale", [True, False])
def test_the_linear_sum(rescale):
    density, weights = (0.5, 0.8), np.array([0.6, 0.9])
    merged, stats = dare_linear(W0, W, density, weights=weights, scale=0.7, seed=3, rescale=rescale)
    for name, w0 in W0.items():
        total = (weights[:, None] * sparse(name, density, 3, rescale)).sum(axis=0)
        np.testing.assert_allclose(merged[name].ravel(), w0.ravel() + 0.7 * total, rtol=1e-6)
        assert float(stats.ratio[name]) == pytest.approx(0.7)


@pytest.mark.parametrize("normalize", [True, False])
def test_elected_signs(normalize):
    weights = np.array([[0.6], [0.9]])
    merged, _ = dare_ties(W0, W, 0.6, weights=weights.ravel(), normalize=normalize)
    for name, w0 in W0.items():
        terms = weights * sparse(name, (0.6, 0.6))
        agree = np.sign(terms) == np.where(terms.sum(axis=0) >= 0, 1, -1)
        divisor = (agree * weights).sum(axis=0) if normalize else 1
        total = (terms * agree).sum(axis=0) / np.where(divisor == 0, 1, divisor)
        np.testing.assert_allclose(merged[name].ravel(), w0.ravel() + total, rtol=1e-6)


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
def test_the_command_line_writes_the_same_weights(tmp_path, method):
    from safetensors.numpy import load_file, save_file

    save_file(W0, tmp_path / "base.safetensors")
    for i in range(N):
        save_file(
            {k: np.ascontiguousarray(x[i]) for k, x in W.items()}, tmp_path / f"{i}.safetensors"
        )
    models = [str(tmp_path / f"{name}.safetensors") for name in ("base", 0, 1)]
    argv = [*models, "--out", str(tmp_path / "out"), "--method", method, "--density", "0.5,0.9"]
    argv += ["--weights", "0.3,0.4", "--seed", "7"]
    merge_files(parsers()[1]["merge"].parse(argv), argv)
    written = load_file(tmp_path / "out/model.safetensors")
    function = {"dare-linear": dare_linear, "dare-ties": dare_ties}[method]
    merged, _ = function(W0, W, (0.5, 0.9), weights=(0.3, 0.4), seed=7)
    for name in W0:
        # Float64 sums in another order, rounded to float32.
        np.testing.assert_array_max_ulp(np.asarray(merged[name]), written[name], 1)


def test_the_same_elements_on_any_devices():
    w0, w = replicas({"w": (16, 8)}, 2)
    mesh = Mesh(np.array(jax.devices()).reshape(2, -1), ("x", "y"))
    want, _ = dare_linear(w0, w, 0.5)
    placed = [
        jax.device_put(tree, NamedSharding(mesh, spec))
        for tree, spec in ((w0, P("x", "y")), (w, P(None, "x", "y")))
    ]
    for function in (dare_linear, jax.jit(lambda w0, w: dare_linear(w0, w, 0.5))):
        merged, _ = function(*placed, *([0.5] if function is dare_linear else []))
        np.testing.assert_array_equal(merged["w"], want["w"])


def test_the_complete_task_vectors_on_average():
    w0, w = {"w": jnp.zeros(40_000)}, {"w": jnp.ones((1, 40_000))}
    merged = np.asarray(dare_linear(w0, w, 0.3)[0]["w"])
    kept = merged != 0
    # Five standard deviations of a binomial.
    assert abs(kept.mean() - 0.3) < 5 * (0.3 * 0.7 / 40_000) ** 0.5
    np.testing.assert_allclose(merged[kept], 1 / 0.3, rtol=1e-6)
    all_kept, _ = dare_linear(w0, w, 1.0)
    np.testing.assert_array_equal(all_kept["w"], w["w"][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\]"),
        ({"density": (0.1, 0.2, 0.3)}, "2 values"),
        ({"weights": 0.5}, r"weights must be one number per replica, shape \(2,\)"),
        ({"weights": (0.5, np.nan)}, "weights must be finite"),
        ({"scale": (1.0, 2.0)}, "scale must be a number"),
        ({"weights": ["1", "2"]}, "weights must be a number"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"seed": None}, "seed must be an integer"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        dare_linear(W0, W, **{"density": 0.5, **options})


def test_a_traced_density():
    with pytest.raises(UserError, match="density is static"):
        jax.jit(lambda density: dare_linear(W0, W, density))(0.5)
