"""Elementwise methods against loops over complete tensors in float64, and in any pieces."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import elementwise, kernels
from modelstock_jax.checkpoint_merge.elementwise import Place
from modelstock_jax.checkpoint_merge.executor import run
from modelstock_jax.checkpoint_merge.kernels import UnitLayout
from modelstock_jax.errors import UserError
from modelstock_jax.merging import philox
from tests.checkpoint_merge.engine import SHAPES, deltas, merge, models, numbers, plan, save
from tests.merging.reference import ties as ties_reference


def flat(model, name):
    return numbers(model[name]).reshape(-1)


def largest(delta, keep, drop=0):
    """The task vector with the `keep` largest elements after the `drop` largest; the rest is 0."""
    order = np.argsort(-np.abs(delta), kind="stable")
    sparse = np.zeros_like(delta)
    chosen = order[drop : drop + keep]
    sparse[chosen] = delta[chosen]
    return sparse


def uniform(name, model, count, seed=0):
    """The uniform numbers of the elements of a tensor."""
    return philox.words(np.arange(count, dtype=np.uint64), philox.key(seed, model, name)) / 2.0**32


def dare(delta, name, model, density, rescale=True, seed=0):
    kept = uniform(name, model, delta.size, seed) < density
    return np.where(kept, delta / (density if rescale else 1), 0)


def della(delta, name, model, density, epsilon, seed=0):
    row = SHAPES[name][-1] if SHAPES[name] else 1
    p = np.empty(delta.shape)
    for a in range(0, delta.size, row):
        for i in range(a, a + row):
            smaller = sum(abs(delta[j]) < abs(delta[i]) for j in range(a, a + row))
            relative = smaller / (row - 1) if row > 1 else 0.5
            p[i] = density - epsilon + 2 * epsilon * relative
    return np.where(uniform(name, model, delta.size, seed) < p, delta / p, 0)


def combine(w0, sparse, weights, scale=1.0, *, elect=False, normalize=False):
    merged = np.zeros_like(w0)
    for e in range(w0.size):
        terms = [weight * s[e] for weight, s in zip(weights, sparse, strict=True)]
        total, divisor = 0.0, 0.0
        sign = 1 if sum(terms) >= 0 else -1
        for weight, term in zip(weights, terms, strict=True):
            if not elect or term * sign > 0:
                total, divisor = total + term, divisor + weight
        merged[e] = total / divisor if normalize and divisor else total
    return w0 + scale * merged


def breadcrumbs(d, density, gamma):
    kept, dropped = int(density * d.size), int(gamma * d.size)
    return largest(d, kept, min(dropped, d.size - kept))


def rescaled(sparse, delta):
    """Sparse task vector with the sum of magnitudes of the complete one."""
    total = np.abs(sparse).sum()
    return sparse * (np.abs(delta).sum() / total if total > 1e-7 else 1)


def sce(w0, d, fraction):
    variance = d.var(axis=0)
    keep = int(np.count_nonzero(variance) * fraction) if fraction < 1 else variance.size
    chosen = np.zeros(variance.size, bool)
    chosen[np.argsort(-variance, kind="stable")[:keep]] = True
    d = np.where(chosen, d, 0)
    squares = (d**2).sum(axis=1)
    weights = squares / squares.sum() if squares.sum() else np.full(len(d), 1 / len(d))
    agree = np.where(d.sum(axis=0) >= 0, d > 0, d < 0)  # Without the weights.
    divisor = (agree * weights[:, None]).sum(axis=0)
    return w0 + combine(np.zeros_like(w0), d * agree, weights) / np.maximum(divisor, 1e-6)


def ram(w0, d, epsilon, rate=0.0, limit=0.0):
    changed = np.abs(d) > epsilon
    count = changed.sum(axis=0)
    unique = (changed & (count == 1)).sum(axis=1)
    shared = (changed & (count > 1)).sum(axis=1)
    factor = 1 + rate * np.minimum(shared / np.maximum(unique, epsilon), limit)
    merged = np.zeros_like(w0)
    for e in range(w0.size):
        for i in range(len(d)):
            if changed[i, e]:
                merged[e] += d[i, e] * (factor[i] if count[e] == 1 else 1 / count[e])
    return w0 + merged


def fusion(w0, d, row):
    softmax = [np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) + 1e-8
               for x in ((w0 + d[0]).reshape(-1, row), w0.reshape(-1, row))]  # fmt: skip
    divergence = (softmax[0] * np.log(softmax[0] / softmax[1])).sum(axis=1, keepdims=True)
    importance = (np.abs(d[0]).reshape(-1, row) * np.maximum(divergence, 0)).reshape(-1)
    ordered = np.sort(importance)
    q1, q2, q3 = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(importance >= q2 + 1.5 * (q3 - q1), w0 + d[0], w0)


ONE = (1.0, 1.0, 1.0)
CASES = {
    "dare_linear": ({"density": 0.4}, lambda w0, d, n: combine(
        w0, [dare(x, n, i, 0.4) for i, x in enumerate(d)], ONE)),
    "dare_linear weighted": (
        {"density": (0.4, 0.7, 1), "weights": (0.5, -1, 2), "scale": 0.8, "seed": 5,
         "normalize": True, "parameters": {"rescale": False}},
        lambda w0, d, n: combine(
            w0, [dare(x, n, i, (0.4, 0.7, 1)[i], False, 5) for i, x in enumerate(d)],
            (0.5, -1, 2), 0.8, normalize=True)),
    "dare_ties": ({"density": 0.6, "weights": (1, 2, 0.5)}, lambda w0, d, n: combine(
        w0, [dare(x, n, i, 0.6) for i, x in enumerate(d)], (1, 2, 0.5), elect=True)),
    "della": ({"density": 0.5, "seed": 3, "weights": (1, 2, 0.5)}, lambda w0, d, n: combine(
        w0, [della(x, n, i, 0.5, 0.15, 3) for i, x in enumerate(d)], (1, 2, 0.5), elect=True,
        normalize=True)),
    "della_linear": ({"density": 0.5, "parameters": {"epsilon": (0.1, 0.2, 0.3)}},
        lambda w0, d, n: combine(w0, [della(x, n, i, 0.5, (0.1, 0.2, 0.3)[i])
                                      for i, x in enumerate(d)], ONE)),
    "breadcrumbs": ({"density": 0.5, "parameters": {"gamma": 0.1}}, lambda w0, d, n: combine(
        w0, [breadcrumbs(x, 0.5, 0.1) for x in d], ONE)),
    "breadcrumbs few": ({"density": 0.95, "parameters": {"gamma": 0.2}}, lambda w0, d, n: combine(
        w0, [breadcrumbs(x, 0.95, 0.2) for x in d], ONE)),
    "breadcrumbs_ties": (
        {"density": 0.3, "weights": (1, 2, 0.5), "parameters": {"gamma": 0.05, "rescale": True}},
        lambda w0, d, n: combine(w0, [rescaled(breadcrumbs(x, 0.3, 0.05), x) for x in d],
                                 (1, 2, 0.5), elect=True)),
    "ties": ({"density": 0.3, "parameters": {"rescale": True}}, lambda w0, d, n: combine(
        w0, [rescaled(largest(x, max(1, round(0.3 * x.size))), x) for x in d], ONE, elect=True,
        normalize=True)),
    "sce": ({}, lambda w0, d, n: sce(w0, d, 1)),
    "sce some": ({"parameters": {"select_topk": 0.3}}, lambda w0, d, n: sce(w0, d, 0.3)),
    "ram": ({"parameters": {"epsilon": 0.05}}, lambda w0, d, n: ram(w0, d, 0.05)),
    "ramplus_tl": ({"parameters": {"epsilon": 0.1, "r": 0.3}, "alpha": 0.5},
                   lambda w0, d, n: ram(w0, d, 0.1, 0.3, 0.5)),
    "nearswap": ({"t": 0.03}, lambda w0, d, n: w0 + np.sign(d[0]) * np.minimum(abs(d[0]), 0.03)),
    "arcee_fusion": ({}, lambda w0, d, n: fusion(w0, d, SHAPES[n][-1] if SHAPES[n] else 1)),
}  # fmt: skip


def inputs_of(method, dtype=np.float32):
    return models(number=1 if method in ("nearswap", "arcee_fusion") else 3, dtype=dtype)


@pytest.mark.parametrize("case", CASES)
def test_methods(tmp_path, case):
    method, (options, reference) = case.split()[0], CASES[case]
    inputs = inputs_of(method)
    out, report = merge(tmp_path, inputs, method=method, **options)
    assert set(report.outcomes) == {"fixed_ratio"}
    assert all(row["ratio"] is row["predicted_distance"]["merged"] is None for row in report.rows)
    for name in SHAPES:
        expected = reference(flat(inputs[0], name), deltas(inputs, name), name)
        # Half a unit in the last place of float32, and the roundings of float64 sums.
        np.testing.assert_allclose(flat(out, name), expected, rtol=2**-24, atol=1e-13)


PIECES = [(2**28, 2**18), (1, 2**18), (1, 37), (2**28, 100)]


@pytest.mark.parametrize("case", CASES)
def test_pieces_and_threads_do_not_change_a_byte(tmp_path, monkeypatch, case):
    method, (options, _) = case.split()[0], CASES[case]
    paths = save(tmp_path, inputs_of(method, ml_dtypes.bfloat16))
    cut, written = UnitLayout.cut, []
    for k, (window, length) in enumerate(PIECES):
        monkeypatch.setattr(
            UnitLayout, "cut", lambda self, _, row=1, length=length: cut(self, length, row)
        )
        planned = plan(paths, window_bytes=window, threads=1 + k % 2, method=method, **options)
        report = run(planned, tmp_path / f"out{k}")
        assert report.bytes_read == planned.bytes_read
        written.append((tmp_path / f"out{k}" / "model.safetensors").read_bytes())
    assert len(set(written)) == 1


def test_pieces_have_complete_rows():
    layout = UnitLayout(1, 1000, 1000)
    assert layout.cut(300, 100) == [(0, 300), (300, 600), (600, 900), (900, 1000)]
    assert layout.cut(300, 250) == layout.cut(30, 250) == [
        (0, 250), (250, 500), (500, 750), (750, 1000)
    ]  # fmt: skip


def test_values_that_differ_by_tensor(tmp_path):
    inputs = models(number=2)
    density = {name: (0.5, 1.0) if "mlp" in name else (0.0, 0.3) for name in SHAPES}
    weights = {name: (0.3, 0.7) if "layers.0" in name else (1.0, -1.0) for name in SHAPES}
    out, report = merge(tmp_path, inputs, method="ties", density=density, weights=weights)
    planned = plan(save(tmp_path / "again", inputs), method="ties", density=density)
    assert report.bytes_read == planned.bytes_read
    for name in SHAPES:
        w0, d = flat(inputs[0], name), deltas(inputs, name)
        keep = [max(1, round(p * w0.size)) if p else 0 for p in density[name]]
        sparse = [largest(x, k) for x, k in zip(d, keep, strict=True)]
        expected = combine(w0, sparse, weights[name], elect=True, normalize=True)
        np.testing.assert_allclose(flat(out, name), expected, rtol=2**-24, atol=1e-13)


SIZE = 2**20


def reduce_all(w0, d, row=1):
    return lambda function: function(w0, d, Place("w", 0, row))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("epsilon", [None, 0.05])
def test_distribution_of_random_elements(density, epsilon):
    """Kept share, mean and variance of DARE and DELLA, to five standard errors."""
    rng = np.random.default_rng(0)
    delta = np.tile(rng.standard_normal(1024) + 0.3, SIZE // 1024)
    epsilons = None if epsilon is None else np.array([epsilon])
    random = elementwise.RandomElements(0, np.array([density]), True, epsilons)
    (sparse,) = random(delta[None], Place("w", 0, 1024))
    ranks = np.abs(delta[:1024]).argsort().argsort() / 1023
    p = np.tile(density + (epsilon or 0) * (2 * ranks - 1), SIZE // 1024)
    kept = (sparse != 0).mean()
    assert abs(kept - density) < 5 * np.sqrt(density * (1 - density) / SIZE)
    variance = (delta**2 * (1 - p) / p).mean()  # of one element, as it is kept or not
    assert abs(sparse.mean() - delta.mean()) < 5 * np.sqrt(variance / SIZE)
    squares = ((sparse - delta) ** 2).mean()
    spread = np.sqrt((delta**4 * ((1 - p) ** 4 / p**3 + 1 - p)).mean() / SIZE)
    assert squares == pytest.approx(variance, abs=5 * spread)
    # Elements of one position, whatever their rank, are kept independently of each other.
    by_row = (sparse != 0).reshape(-1, 1024)
    assert abs((by_row[:-1] & by_row[1:]).mean() - (p[:1024] ** 2).mean()) < 5e-3


@pytest.mark.parametrize("count", [2, 3, 1000])
def test_kth_largest_is_exact(count):
    rng = np.random.default_rng(count)
    values = rng.standard_normal((3, count)) * 10.0 ** rng.integers(-300, 300, (3, count))
    ranks = [1, count, (count + 1) // 2]
    bits = elementwise.kth_largest(reduce_all(values[0], values), lambda _, d, __: d, ranks)
    expected = [np.sort(np.abs(v))[-k] for v, k in zip(values, ranks, strict=True)]
    assert bits.view(np.float64).tolist() == expected


def test_memory_is_bounded(tmp_path, monkeypatch):
    """No array is longer than a piece for each model: thresholds are measured by histograms."""
    shapes = {"w": (2048, 1024)}
    paths = save(tmp_path, models(shapes, number=2))
    longest, real = [0], elementwise.magnitude

    def magnitude(values):
        longest[0] = max(longest[0], values.size)
        return real(values)

    monkeypatch.setattr(elementwise, "magnitude", magnitude)
    run(plan(paths, method="breadcrumbs", density=0.5), tmp_path / "out")
    assert 0 < longest[0] <= 4 * kernels.PIECE


@pytest.mark.parametrize(("options", "pattern"), [
    ({"method": "dare_ties", "unit": "filter"}, "--unit filter .*dare-ties"),
    ({"method": "della", "density": 0.9}, "epsilon: .*0.9 .*0.15"),
    ({"method": "della", "density": (0.5, 0.2), "parameters": {"epsilon": (0.1, 0.3)}},
     "epsilon: .*0.2 .*0.3"),
    ({"method": "ties", "seed": 1}, "--seed .*ties.*dare-linear, dare-ties"),
    ({"method": "ties", "parameters": {"gamma": 0.1}}, "gamma: .*ties .*rescale"),
    ({"method": "breadcrumbs", "parameters": {"gama": 0.1}}, "gama: .*'gamma'"),
    ({"method": "breadcrumbs", "parameters": {"gamma": 2}}, r"gamma: .*\[0, 1\]"),
    ({"method": "breadcrumbs", "parameters": {"rescale": 1}}, "rescale: .*true or false"),
    ({"method": "breadcrumbs", "density": 0.5, "parameters": {"gamma": (0.1,) * 3}},
     "gamma has 3 values"),
    ({"method": "karcher", "parameters": {"max_iter": 0}}, "max_iter: .*1"),
    ({"method": "nearswap", "t": 0.1}, "nearswap .*1"),
    ({"method": "nearswap"}, "nearswap .*--t"),
    ({"method": "ram", "parameters": {"epsilon": -1}}, "epsilon: "),
    ({"method": "ram", "parameters": {"epsilon": (1, 2)}}, "epsilon: .*one value"),
    ({"method": "karcher", "parameters": {"max_iter": (1, 2)}}, "max_iter: .*one value"),
    ({"method": "karcher", "parameters": {"max_iter": float("inf")}}, "max_iter: .*integer"),
    ({"method": "linear", "weights": {n: (0, 0) if "norm" in n else (1, 1) for n in SHAPES}},
     "sum of --weights is 0 for .*norm"),
    ({"method": "multislerp", "weights": (1, -1)}, "sum of --weights is 0"),
    ({"method": "slerp", "t": -1}, r"--t: .*\[0, 1\]"),
])  # fmt: skip
def test_invalid_options(tmp_path, options, pattern):
    with pytest.raises(UserError, match=pattern):
        plan(save(tmp_path, models(number=2)), **options)


def test_ties_with_all_elements_is_the_reference_of_the_paper(tmp_path):
    inputs = models(number=3)
    out, _ = merge(tmp_path, inputs, method="dare_ties", normalize=True)
    for name in SHAPES:
        w0, tuned = flat(inputs[0], name), [flat(model, name) for model in inputs[1:]]
        expected = ties_reference(w0, tuned, [w0.size] * 3)
        np.testing.assert_allclose(flat(out, name), expected, rtol=2**-24, atol=1e-13)


def test_another_seed_is_another_merge(tmp_path):
    """Its random elements differ, and an interrupted merge with another seed is not resumed."""
    paths = save(tmp_path, models(number=2))
    plans = [plan(paths, method="dare_linear", density=0.5, seed=seed) for seed in (0, 1, 0)]
    assert plans[0].checksum == plans[2].checksum != plans[1].checksum
    for k, planned in enumerate(plans):
        run(planned, tmp_path / f"out{k}")
    files = [(tmp_path / f"out{k}" / "model.safetensors").read_bytes() for k in range(3)]
    assert files[0] == files[2] != files[1]


def test_a_tensor_without_weights_is_that_of_the_base(tmp_path):
    """Lists of weights may be 0 for all models at one layer."""
    inputs = models(number=2)
    weights = {name: (0.0, 0.0) if "layers.0" in name else (0.3, 0.7) for name in SHAPES}
    out, _ = merge(tmp_path, inputs, method="ties", weights=weights)
    for name in SHAPES:
        w0, d = flat(inputs[0], name), deltas(inputs, name)
        expected = combine(w0, d, weights[name], elect=True, normalize=True)
        np.testing.assert_allclose(flat(out, name), expected, rtol=2**-24, atol=1e-13)
        assert "layers.0" not in name or (flat(out, name) == w0).all()
