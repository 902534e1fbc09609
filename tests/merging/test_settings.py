"""Every function of trees under the settings of JAX that callers choose.

A case is a function of (pretrained, finetuned). To add a function, add a line to `CASES`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from modelstock_jax import merging
from modelstock_jax.merging import ema, greedy_soup, stack_replicas, swa, swad
from tests.merging.trees import replicas

KEY = jax.random.key(3)
UNIT_NOISE = {"kernel": jnp.float32(0.5), "scale": jnp.zeros(()), "count": jnp.zeros(())}
# Arguments on the device: a test of transfers must not make them itself.
X, Y, DECAY = jnp.float32(0.25), jnp.float32(0.5), 0.75


def average_of(make: Callable, pretrained: Any, finetuned: Any) -> Any:
    """Return the state and the value of an average along the replicas."""
    average = make()
    state = average.init(pretrained)
    for params in unstacked(finetuned):
        state = average.update(state, params)
        if hasattr(average, "validate"):
            state = average.validate(state, X)
    return state, average.value(state, pretrained)


@partial(jax.jit, static_argnums=1)
def _replica(tree, k):
    return jax.tree.map(lambda x: x[k], tree)


def unstacked(tree: Any) -> list:
    return [_replica(tree, k) for k in range(3)]


def score(tree: Any) -> float:
    return -float(np.asarray(jax.device_get(tree["kernel"]), np.float64).mean() ** 2)


def soup_of(pretrained, finetuned):
    return greedy_soup(pretrained, unstacked(finetuned), score)[:2]


def plane_of(pretrained, finetuned):
    first, second, _ = unstacked(finetuned)
    plane = merging.plane_through(pretrained, first, second)
    return (
        plane,
        merging.plane_coordinates(plane, finetuned),
        merging.plane_point(plane, X, Y),
    )


def span_of(pretrained, finetuned):
    del pretrained
    span = merging.twa_span(finetuned)
    start = merging.twa_init(span)
    return (
        span,
        start,
        merging.twa_params(span, start),
        merging.twa_coefficients(span, start),
    )


MERGES: dict[str, Callable] = {
    "model_stock": merging.model_stock,
    "model_stock by filter": partial(merging.model_stock, unit="filter"),
    "model_stock corrected": partial(merging.model_stock, anchor_rounding="correct"),
    "weighted_model_stock": merging.weighted_model_stock,
    "model_stock_carried": merging.model_stock_carried,
    "uniform_mean": merging.uniform_mean,
    "wise_ft": partial(merging.wise_ft, alpha=0.3),
    "constant_ratio": merging.constant_ratio,
    "constant_ratio at 0.3": partial(merging.constant_ratio, ratio=0.3),
    "task_arithmetic": partial(merging.task_arithmetic, scale=0.4),
    "task_arithmetic of three": partial(merging.task_arithmetic, scale=(0.4, 0.1, -0.2)),
    "ties": partial(merging.ties, density=0.5, scale=0.7),
    "slerp": merging.slerp,
    "dare_linear": partial(merging.dare_linear, density=0.5, scale=0.7),
    "dare_ties": partial(merging.dare_ties, density=0.5, normalize=True),
    "monosoup": merging.monosoup,
    "lines": partial(merging.lines, alpha=0.3, layer_of=lambda name: len(name) % 2),
}
ANALYSES: dict[str, Callable] = {
    "distance": lambda w0, w: merging.distance(w0, unstacked(w)[0]),
    "distances": merging.distances,
    "norms": merging.norms,
    "cosines": merging.cosines,
    "thin_shell": lambda w0, w: merging.thin_shell(w0, join(w, w)),
    "thin_shell by tensor": lambda w0, w: merging.thin_shell(w0, join(w, w), unit="tensor"),
    "mean_model": lambda w0, w: merging.mean_model(w),
    "plane": plane_of,
    "random_point": lambda w0, w: merging.random_point(KEY, w0, UNIT_NOISE | keys_noise(w0)),
}
OWN: dict[str, Callable] = {
    "stack_replicas": lambda w0, w: stack_replicas([w0, *unstacked(w)]),
    "ema": partial(average_of, lambda: ema(DECAY)),
    "swa": partial(average_of, lambda: swa(1, 2)),
    "swad": partial(average_of, lambda: swad(1, 2, 1.5)),
    "twa": span_of,
    "greedy_soup": soup_of,
}
CASES = OWN | MERGES | ANALYSES
# A search in Python, with a score that is no function of JAX.
TRACED = {name: case for name, case in CASES.items() if name != "greedy_soup"}


@jax.jit
def join(a, b):
    """Six models, of which no two are equal."""
    return jax.tree.map(
        lambda x, y: jnp.concatenate([x, -2 * y]) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        a,
        jax.tree.map(lambda x: x[::-1], b),
    ) | {"count": jnp.zeros(6, jnp.int32)}


def keys_noise(pretrained):
    return {"key": UNIT_NOISE["scale"]} if "key" in pretrained else {}


def without_key(tree):
    return jax.tree.map(
        lambda x: {k: v for k, v in x.items() if k != "key"} if isinstance(x, dict) else x,
        tree,
        is_leaf=lambda x: isinstance(x, dict),
    )


def models(dtype=jnp.float32, with_key=False):
    """Return an anchor and three replicas on the device; one tensor is narrower than the other."""
    w0, w = replicas({"kernel": (3, 4), "scale": (4,)}, 3)
    w0 |= {"scale": w0["scale"].astype(jnp.bfloat16), "count": np.int32(3)}
    w |= {"scale": w["scale"].astype(jnp.bfloat16), "count": np.int32([5, 6, 7])}
    w0, w = jax.device_put((w0, w))
    w0["kernel"], w["kernel"] = w0["kernel"].astype(dtype), w["kernel"].astype(dtype)
    if with_key:
        w0, w = w0 | {"key": KEY}, w | {"key": jax.random.split(KEY, 3)}
    return w0, w


def numbers(tree):
    """Return the leaves as NumPy arrays of at least float32; of typed keys, their data."""

    def to_numpy(x):
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        x = np.asarray(x)
        return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x

    return [to_numpy(x) for x in jax.tree.leaves(tree)]


def as_trees(tree):
    """Replace `Stats` by its trees: the number of its rows depends on the dtypes."""

    def expand(x):
        if not isinstance(x, merging.Stats):
            return x
        return x.cosine, x.ratio, x.norm, x.predicted_distance, x.outcome, x.finite

    return jax.tree.map(expand, tree, is_leaf=lambda x: isinstance(x, merging.Stats))


def assert_equal(found, expected, rtol=3e-6, atol=1e-6):
    found, expected = as_trees(found), as_trees(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(numbers(found), numbers(expected), strict=True):
        assert x.dtype == y.dtype or x.dtype.kind == y.dtype.kind == "f"
        # bfloat16 rounds values that are close to a tie either way.
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


_EXPECTED: dict[str, Any] = {}


def expected(name):
    if name not in _EXPECTED:
        _EXPECTED[name] = CASES[name](*models())
    return _EXPECTED[name]


SETTINGS = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no jit": jax.disable_jit,
    "NaN checks": lambda: jax.debug_nans(True),
    "no implicit transfers": lambda: jax.transfer_guard("disallow"),
    "leak checks": jax.checking_leaks,
    "float64": lambda: jax.enable_x64(True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s != "leak checks"])
def test_eager(setting, name):
    w0, w = models()
    unstacked(w), join(w, w)  # compiled outside of the setting
    with SETTINGS[setting]():
        found = CASES[name](w0, w)
    assert_equal(found, expected(name))


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s != "no jit"])
def test_jitted(setting, name):
    w0, w = models()
    with SETTINGS[setting]():
        found = jax.jit(TRACED[name])(w0, w)
    assert_equal(found, expected(name))


@pytest.mark.parametrize("name", CASES)
def test_float64_weights(name, x64):
    w0, w = models(jnp.float64)
    found = CASES[name](w0, w)
    narrow = CASES[name](*models())
    assert any(x.dtype == np.float64 for x in numbers(found)), "nothing was computed in float64"
    if name == "random_point":  # the random numbers depend on the dtype
        change = jnp.linalg.norm(found["kernel"] - w0["kernel"])
        assert float(change) == pytest.approx(0.5, rel=1e-6)
        return
    assert_equal(found, narrow, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_typed_keys(name):
    w0, w = models(with_key=True)
    if name.startswith("thin_shell"):
        w = join(w, w) | {"key": jax.random.split(KEY, 6)}
        assert merging.thin_shell(w0, w).radius.shape == (6,)
        return
    found = CASES[name](w0, w)
    # Everything else is as it is without the key.
    assert_equal(numbers(without_key(found)), numbers(expected(name)))
    if name in TRACED:
        assert_equal(jax.jit(TRACED[name])(w0, w), found)


@pytest.mark.parametrize("name", TRACED)
def test_ahead_of_time(name):
    compiled = jax.jit(TRACED[name]).lower(*models()).compile()
    assert_equal(compiled(*models()), expected(name))


@pytest.mark.parametrize("name", TRACED)
def test_exported_and_read_again(name):
    args = models()
    exported = export.export(jax.jit(TRACED[name]))(*args)
    again = export.deserialize(exported.serialize())
    assert_equal(again.call(*args), expected(name))


@pytest.mark.parametrize("name", TRACED)
def test_vmapped(name):
    w0, w = models()
    both = jax.tree.map(lambda x: jnp.stack([x, x]), (w0, w))
    found = jax.vmap(TRACED[name])(*both)
    assert_equal(jax.tree.map(lambda x: x[1], found), expected(name))


def copied(tree):
    """Return the numbers of a copy: a NumPy view of an array would keep its buffer alive."""
    return numbers(jax.tree.map(jnp.copy, tree))


AVERAGES = {"ema": ema(DECAY), "swa": swa(1, 2), "swad": swad(1, 2, 1.5)}


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("name", AVERAGES)
def test_donated_states(name, jit):
    """No buffer is in a state twice, or both in a state and in weights or a value."""
    average = AVERAGES[name]
    step = jax.jit(average.update, donate_argnums=0)
    w0, w = models(with_key=True)
    state, values = average.init(w0), [(w0, copied(w0))]
    for params in unstacked(w):
        value = average.value(state, w0)
        values += [(params, copied(params)), (value, copied(value))]
        state = step(state, params)
        if not jit:  # an eager update, whose result is donated next
            state = average.update(state, params)
        if hasattr(average, "validate"):
            state = jax.jit(average.validate, donate_argnums=0)(state, X)
    value = average.value(state, w0)
    before = copied(state)
    donate(value)
    values.append((state, before))
    check_unchanged(values)
    values.pop()
    donate(state)
    check_unchanged(values)


def donate(tree):
    jax.jit(lambda t: jax.tree.map(jnp.copy, t), donate_argnums=0)(tree)


def check_unchanged(values):
    for tree, before in values:
        for found, number in zip(numbers(tree), before, strict=True):
            np.testing.assert_array_equal(found, number)


@pytest.mark.parametrize("name", AVERAGES)
def test_states_do_not_see_later_changes_of_numpy_weights(name):
    params, other = ({"w": aligned(np.float32), "n": aligned(np.int32)} for _ in range(2))
    average = AVERAGES[name]
    started = average.init(params)
    states = [started, average.update(started, other)]
    for array in (*params.values(), *other.values()):
        array[:] = 7
    for state in states:
        for array in average.value(state, params).values():
            assert array.tolist() == [1] * 64


def test_results_do_not_see_later_changes_of_numpy_weights():
    w0, other = ({"w": aligned(np.float32), "n": aligned(np.int32)} for _ in range(2))
    stacked = {name: np.stack([x, x]) for name, x in w0.items()}
    soups = [greedy_soup(anchor, [other], lambda t: 0.0).params for anchor in (w0, None)]
    results = [merging.uniform_mean(w0, stacked)[0], *soups]
    for array in (*w0.values(), *other.values()):
        array[:] = 7
    for result in results:
        assert [x.tolist() for x in result.values()] == [[1] * 64] * 2


def aligned(dtype):
    """Return 64 ones at an address whose memory JAX may share on a CPU."""
    memory = np.zeros(64 * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + 64 * 4].view(dtype)
    array[:] = 1
    return array


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("name", AVERAGES)
def test_the_state_is_the_carry_of_a_scan(name, x64):
    average = AVERAGES[name]

    def step(state, params):
        state = average.update(state, params)
        if hasattr(average, "validate"):
            state = average.validate(state, jnp.float32(1.0))
        return state, None

    with jax.enable_x64(x64):
        w0, w = models()
        state, _ = jax.lax.scan(step, average.init(w0), w)
        averaged = average.value(state, w0)
    assert_equal(averaged, average_of(lambda: average, w0, w)[1])
