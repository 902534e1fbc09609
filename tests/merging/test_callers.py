"""Trees as callers have them: callable modules, typed keys, scalars, other containers, mistakes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.core
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.merging import (
    distances,
    ema,
    greedy_soup,
    mean_model,
    model_stock,
    random_point,
    stack_replicas,
    swa,
    swad,
    twa_coefficients,
    twa_init,
    twa_params,
    twa_span,
    uniform_mean,
)

VALUES = (1.0, 2.0, 6.0)
MAX_MESSAGE = 300


def message_of(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and not message.endswith("."), message
    assert len(message) <= MAX_MESSAGE, (len(message), message)
    return message


# Callable trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """As a module of equinox: a pytree of arrays that must not be called."""

    weight: Any

    def __call__(self):
        raise AssertionError("the module was called")


class Model(nnx.Module):
    def __init__(self, value):
        self.kernel = nnx.Param(jnp.full((2, 3), value))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(int(value)))

    def __call__(self):
        raise AssertionError("the module was called")


def first_leaf(tree):
    return next(x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))


def near(goal):
    return lambda tree: -abs(float(jnp.mean(first_leaf(tree))) - goal)


MODELS = {
    "dataclass": lambda value: Module(jnp.full(3, value)),
    "numpy": lambda value: Module(np.full(3, value, np.float32)),
    "nnx module": Model,
    "nnx state": lambda value: nnx.state(Model(value)),
    "FrozenDict": lambda value: flax.core.freeze({"w": jnp.full(3, value)}),
}


@pytest.mark.parametrize("with_anchor", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_a_callable_tree_is_a_tree(kind, with_anchor):
    models = [MODELS[kind](value) for value in VALUES]
    soup = greedy_soup(models[1] if with_anchor else None, models, near(1.5))
    assert soup.ingredients == (0, 1) and type(soup.params) is type(models[0])
    np.testing.assert_array_equal(first_leaf(soup.params), np.full_like(first_leaf(models[0]), 1.5))


@pytest.mark.parametrize("kind", MODELS)
def test_merges_and_averages_of_callable_trees(kind):
    models = [MODELS[kind](value) for value in VALUES]
    merged, stats = uniform_mean(models[0], stack_replicas(models[1:]))
    assert jax.tree.structure(merged) == jax.tree.structure(models[0])
    assert type(stats.ratio) is type(merged) and float(first_leaf(merged).max()) == 4.0
    average = swa()
    state = average.update(average.init(models[0]), models[1])
    assert float(first_leaf(average.value(state, models[0])).max()) == 1.5


class Loader:
    def __init__(self, value):
        self.value = value

    def __call__(self):
        return {"w": jnp.full(3, self.value)}


LOADERS = {
    "function": lambda value: lambda: Loader(value)(),
    "partial": lambda value: functools.partial(lambda value: Loader(value)(), value),
    "object": Loader,
    "bound method": lambda value: Loader(value).__call__,
    # A pytree with an array, but made to be called.
    "Partial": lambda value: jax.tree_util.Partial(lambda v: {"w": v}, jnp.full(3, value)),
    "of a module": lambda value: lambda: Module(jnp.full(3, value)),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_function_is_a_loader(kind):
    soup = greedy_soup(None, [LOADERS[kind](value) for value in VALUES], near(1.5))
    assert soup.ingredients == (0, 1)
    np.testing.assert_array_equal(first_leaf(soup.params), np.full(3, 1.5))


def bound_linen_module():
    layer = flax.linen.Dense(3)
    return layer.bind(layer.init(jax.random.key(0), jnp.ones((1, 2))))


@pytest.mark.parametrize(
    "candidate,expected",
    [
        (bound_linen_module(), "candidate 0 .* Dense and needs arguments.*variables"),
        (lambda path: path, "candidate 0 .*function without arguments"),
        (jax.tree_util.Partial(lambda w, x: x, jnp.ones(3)), "Partial and needs arguments"),
        ({"w": jnp.ones(3), "activation": jax.nn.relu}, "'activation' is of type .*only arrays"),
        (lambda: None, "candidate 0 .*no tensor"),
        ("model.npz", "candidate 0 .* is of type str"),
    ],
)
def test_candidates_that_are_neither(candidate, expected):
    with pytest.raises(UserError, match=expected):
        greedy_soup(None, [candidate], near(0.0))


def test_an_error_inside_a_loader_is_not_hidden():
    def load():
        raise TypeError("made up")

    with pytest.raises(TypeError, match="made up"):
        greedy_soup(None, [load], near(0.0))


# Typed keys, and other leaves

IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


def with_key(value, seed=0, implementation="threefry2x32"):
    key = jax.random.key(seed, impl=implementation)
    return {
        "w": jnp.full(3, value) * jnp.array([1.0, 2.0, 3.0]),
        "key": key,
        "keys": jax.random.split(key, 2),
    }


def assert_same_keys(found, expected):
    for name in ("key", "keys"):
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(
            jax.random.key_data(found[name]), jax.random.key_data(expected[name])
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_typed_keys_are_copied_from_the_anchor(implementation):
    anchor = with_key(1.0, 7, implementation)
    stacked = stack_replicas([with_key(v, 1, implementation) for v in VALUES[1:]])
    assert stacked["key"].shape == (2,) and stacked["keys"].shape == (2, 2)
    for merge in (model_stock, jax.jit(model_stock)):
        merged, stats = merge(anchor, stacked)
        assert_same_keys(merged, anchor)
        assert jax.tree.structure(stats.ratio) == jax.tree.structure(anchor)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), anchor)
    merged, _ = jax.vmap(model_stock, in_axes=(0, None))(both, stacked)
    assert_same_keys(merged, both)


def test_typed_keys_in_analyses():
    center, models = with_key(1.0), stack_replicas([with_key(v, 5) for v in VALUES])
    np.testing.assert_allclose(
        distances(center, models), (np.array(VALUES) - 1) * 14**0.5, rtol=1e-6
    )
    assert_same_keys(mean_model(models), with_key(0.0, 5))
    noise = {"w": jnp.array(2.0), "key": jnp.array(0.0), "keys": jnp.array(0.0)}
    point = random_point(jax.random.key(0), center, noise)
    assert_same_keys(point, center)
    assert float(jnp.linalg.norm(point["w"] - center["w"])) == pytest.approx(2.0, rel=1e-5)


def test_a_greedy_soup_takes_keys_from_the_anchor_or_the_best_candidate():
    models = [with_key(v, seed) for seed, v in enumerate(VALUES)]

    def score(tree):
        return -abs(float(tree["w"][0]) - 1.5)

    assert_same_keys(greedy_soup(None, models, score).params, models[0])
    assert_same_keys(greedy_soup(with_key(0.0, 9), models, score).params, with_key(0.0, 9))


@pytest.mark.parametrize("average", [ema(0.5), swa(), swad(2, 3)])
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
def test_averages_copy_the_last_keys(average, jit):
    state = average.init(with_key(1.0, 1))
    for seed, value in enumerate(VALUES, 2):
        state = jit(average.update)(state, with_key(value, seed))
        if hasattr(average, "validate"):
            state = jit(average.validate)(state, 1.0)
    averaged = jit(average.value)(state, with_key(0.0))
    assert_same_keys(averaged, with_key(0.0, 4))
    assert 1.0 < float(averaged["w"][0]) < 6.0


def test_twa_copies_the_last_keys():
    solutions = [with_key(v, seed) for seed, v in enumerate(VALUES[:2])]
    solutions[1]["w"] = jnp.array([1.0, 0.0, 0.0])
    span = twa_span(stack_replicas(solutions))
    mean = twa_params(span, twa_init(span))
    assert_same_keys(mean, solutions[1])
    np.testing.assert_allclose(mean["w"], [1.0, 1.0, 1.5], rtol=1e-6)


def test_a_split_model_with_dropout():
    graph, pretrained = nnx.split(Model(1.0))
    finetuned = stack_replicas([nnx.split(Model(v))[1] for v in VALUES[1:]])
    merged, _ = model_stock(pretrained, finetuned)
    model = nnx.merge(graph, merged)
    expected = nnx.merge(graph, pretrained).dropout.rngs.key[...]
    np.testing.assert_array_equal(
        jax.random.key_data(model.dropout.rngs.key[...]), jax.random.key_data(expected)
    )


def test_keys_of_different_implementations_are_not_stacked():
    models = [with_key(1.0, 0, implementation) for implementation in IMPLEMENTATIONS[:2]]
    message = message_of(lambda: stack_replicas(models))
    assert "key (key<fry> and key<rbg>)" in message and "replica 1" in message


SCALARS = {
    "Python float": (2.0, jnp.float32),
    "Python int": (2, jnp.int32),
    "Python bool": (True, jnp.bool_),
    "NumPy int64": (np.int64(2), jnp.int32),
    "NumPy float64": (np.float64(2.0), jnp.float32),
    "array of shape []": (np.array(2, np.uint8), jnp.uint8),
    "int4": (jnp.array(2, jnp.int4), jnp.int4),
    "uint4": (jnp.array(2, jnp.uint4), jnp.uint4),
    "float8": (jnp.array(2, jnp.float8_e4m3fn), jnp.float8_e4m3fn),
    "float8 without zero": (jnp.array(2, jnp.float8_e8m0fnu), jnp.float8_e8m0fnu),
    "float4": (jnp.array(2, jnp.float4_e2m1fn), jnp.float4_e2m1fn),
}


@pytest.mark.parametrize("kind", SCALARS)
def test_scalars_and_narrow_dtypes(kind):
    value, dtype = SCALARS[kind]
    tree = {"w": np.arange(3.0, dtype=np.float32), "x": value, "none": None}
    other = tree | {"w": tree["w"] + 1}
    merged, _ = uniform_mean(tree, stack_replicas([other, other]))
    average = swa()
    averaged = average.value(average.update(average.init(tree), other), tree)
    soup = greedy_soup(tree, [tree, other], lambda t: float(t["w"][0])).params
    span = twa_span(stack_replicas([tree, tree | {"w": np.ones(3, np.float32)}]))
    for found in (merged, averaged, soup, twa_params(span, twa_init(span))):
        assert isinstance(found["x"], jax.Array) and found["x"].dtype == dtype
        assert float(found["x"].astype(jnp.float32)) == float(value) and found["none"] is None


@pytest.mark.parametrize(
    "leaf,expected",
    [
        (jax.ShapeDtypeStruct((2,), jnp.float32), "ShapeDtypeStruct, which has a shape but no"),
        ("text", "of type str; .*only arrays"),
        (jnp.zeros(2, jnp.complex64), "dtype complex64; use a floating, integer or boolean dtype"),
        (1j, "dtype complex128; use"),
        (2**40, "integers beyond int32; enable jax_enable_x64"),
        (np.array([1, 2**31]), "integers beyond int32"),
        (np.datetime64("2020-01-01"), "dtype datetime64"),
        (jax.nn.relu, "of type .*only arrays"),
        (object(), "of type object; .*only arrays"),
    ],
)
def test_leaves_that_cannot_be_merged_are_named(leaf, expected):
    wrong, right = {"a": {"b": leaf}}, {"a": {"b": jnp.zeros(2)}}
    average = ema(0.5)
    calls = {
        "pretrained": lambda: model_stock(wrong, right),
        "finetuned": lambda: model_stock(right, wrong),
        "replica 1": lambda: stack_replicas([right, wrong]),
        "candidate 0": lambda: greedy_soup(None, [wrong], near(0.0)),
        "pretrained ": lambda: greedy_soup(wrong, [right], near(0.0)),
        "params": lambda: average.init(wrong),
        "params ": lambda: average.update(average.init(right), wrong),
        "params  ": lambda: average.value(average.init(right), wrong),
        "solutions": lambda: twa_span(wrong),
    }
    for side, call in calls.items():
        with pytest.raises(UserError, match=f"^{side.strip()}.*: tensor 'a.b' .*{expected}"):
            call()


def test_arrays_in_host_memory():
    def host(value):
        device = jax.devices()[0]
        sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        return {"w": jax.device_put(jnp.full(3, value), sharding), "n": jnp.int32(1)}

    models = [host(value) for value in VALUES]
    stacked = stack_replicas(models[1:])
    mixed = stack_replicas([models[1], {"w": jnp.full(3, 6.0), "n": 1}])
    np.testing.assert_array_equal(mixed["w"], stacked["w"])
    for merge in (uniform_mean, jax.jit(uniform_mean)):
        assert merge(models[0], stacked)[0]["w"].tolist() == [4.0] * 3
    average = swa()
    for update in (average.update, jax.jit(average.update)):
        state = update(average.init(models[0]), models[1])
        assert average.value(state, models[0])["w"].tolist() == [1.5] * 3
    assert greedy_soup(models[0], models, near(1.5)).params["w"].tolist() == [1.5] * 3


# Integers and other scalars

INTEGERS = (np.int64, np.int32, np.uint8, np.array, jnp.asarray)


@pytest.mark.parametrize("integer", INTEGERS)
def test_integers_of_other_types(integer):
    def value_of(average):
        state = average.init({"w": jnp.zeros(1)})
        for value in (2.0, 4.0, 9.0):
            state = average.update(state, {"w": jnp.array([value])})
        return average.value(state, {"w": jnp.zeros(1)})["w"].tolist()

    assert value_of(swa(integer(1), integer(2))) == value_of(swa(1, 2)) == [5.5]
    assert value_of(swad(integer(1), integer(2), r=integer(2))) == value_of(swad(1, 2, 2.0))
    scores = [integer(3), integer(5)]
    soup = greedy_soup(None, [{"w": jnp.ones(1)}] * 2, lambda t: 5, scores=scores)
    assert soup.ingredients == (1,) and isinstance(soup.score, float)


@pytest.mark.parametrize(
    "call,expected",
    [
        (lambda: swa(1.5), "start must be an integer, not 1.5"),
        (lambda: swa(0, np.float32(2)), "period must be an integer, not"),
        (lambda: swad(n_s=2.0), "n_s must be an integer"),
        (lambda: swad(n_e="6"), "n_e must be an integer, not '6'"),
        (lambda: swad(n_e=np.ones(2, int)), "n_e must be an integer"),
        (lambda: greedy_soup(None, [{"w": jnp.ones(1)}], near(0), scores=3.0), "1 number"),
    ],
)
def test_other_values_are_errors(call, expected):
    assert expected in message_of(call)


# Trees that differ: one short line

LONG = "a_very_long_name_of_a_module." * 12


def many(prefix="", suffix="", shape=(2,), num=500):
    return {f"{prefix}{k:03d}{suffix}": np.ones(shape, np.float32) for k in range(num)}


PAIRS = {
    "names": (many("a"), many("b"), "differ in structure; only in"),
    "long names": (many(LONG), many("b" + LONG, "z"), "and 499 more; only in"),
    "shapes": (many(), many(shape=(3,)), "000"),
    "shapes of many axes": (many(shape=(1,) * 30), many(shape=(1,) * 29 + (2,)), "000"),
    "long names and shapes": (many(LONG), many(LONG, shape=(3,)), "and 499 more"),
    "line breaks": (many("a\n" * 200), many("b"), "and 499 more"),
    "kinds": (many(), {k: v.astype(int) for k, v in many().items()}, "000 (float"),
    "containers": ({"a": many()}, {"a": flax.core.freeze(many())}, "at 'a': dict and FrozenDict"),
    "long containers": ({LONG: many()}, {LONG: flax.core.freeze(many())}, "dict and FrozenDict"),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_trees_that_differ(kind):
    a, b, expected = PAIRS[kind]
    stacked = jax.tree.map(lambda x: np.stack([x, x]), b)
    average = swa()
    for call in (
        lambda: stack_replicas([a, b]),
        lambda: model_stock(a, stacked),
        lambda: average.update(average.init(a), b),
        lambda: average.value(average.init(a), b),
        lambda: jax.eval_shape(average.update, jax.eval_shape(average.init, a), b),
        lambda: greedy_soup(a, [b], near(0.0)),
        lambda: greedy_soup(None, [a, b], near(0.0), scores=[2.0, 1.0]),
    ):
        assert expected in message_of(call)


def test_long_names_in_other_messages():
    complete = many(LONG)
    wrong = dict(complete)
    wrong[next(iter(wrong))] = "text"
    not_finite = {k: v * np.nan for k, v in complete.items()}
    lengths = {k: np.ones((2 + i, 2), np.float32) for i, k in enumerate(complete)}
    message_of(lambda: model_stock(wrong, lengths))
    assert message_of(lambda: model_stock(complete, lengths)).endswith("and 499 more")
    message_of(lambda: stack_replicas([wrong]))
    message_of(lambda: greedy_soup(None, [not_finite], near(0.0)))


def test_different_lengths_of_the_replica_axis_are_named():
    w0 = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}
    w = {"a": np.ones((2, 2)), "b": np.ones((3, 2)), "c": np.ones((3, 2))}
    assert message_of(lambda: model_stock(w0, w)).endswith("2 in a, 3 in b")


def test_containers_that_differ():
    graph, state = nnx.split(Model(1.0))
    pure = nnx.to_pure_dict(state)
    assert "at the root: dict and State; convert one, for example with flax.nnx.to_pure" in (
        message_of(lambda: stack_replicas([pure, state]))
    )
    training, evaluating = Model(1.0), Model(1.0)
    evaluating.eval()
    assert "at 'dropout': both are Dropout, but their static fields differ (train and eval" in (
        message_of(lambda: stack_replicas([training, evaluating]))
    )
    array, module = jnp.ones(2), Module(jnp.ones(2))
    with_none = {"layers": [array, None]}
    assert "at 'layers': list and tuple; convert one" in message_of(
        lambda: stack_replicas([{"layers": [array]}, {"layers": (array,)}])
    )
    assert "at 'layers': list and list" not in message_of(
        lambda: stack_replicas([with_none, {"layers": [array]}])
    )
    assert "at '0': Module and dict; convert one" in message_of(
        lambda: stack_replicas([[module], [{"weight": array}]])
    )


# Averages: trees and shapes are those of init

AVERAGES = {"ema": lambda: ema(0.5), "swa": swa, "swad": lambda: swad(1, 1)}
OTHERS = {
    "one element": ({"w": np.ones(1, np.float32)}, r"w \(\(3,\) and \(1,\)\)"),
    "another axis": ({"w": np.ones((2, 3), np.float32)}, r"w \(\(3,\) and \(2, 3\)\)"),
    "no axis": ({"w": np.float32(1)}, r"w \(\(3,\) and \(\)\)"),
    "integers": ({"w": np.ones(3, int)}, r"kind of dtype of: w \(floating and integer\)"),
    "another name": ({"v": np.ones(3, np.float32)}, "only in the state: w; only in params: v"),
    "another container": ([np.ones(3, np.float32)], "the state: w"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_other_trees_is_an_error(name, kind):
    average, (other, expected) = AVERAGES[name](), OTHERS[kind]
    state = average.init({"w": jnp.ones(3)})
    for call in (average.update, average.value, jax.jit(average.update), jax.jit(average.value)):
        with pytest.raises(UserError, match=expected):
            call(state, other)


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_another_dtype(name):
    average = AVERAGES[name]()
    state = average.update(average.init({"w": jnp.ones(3)}), {"w": jnp.full(3, 2, jnp.bfloat16)})
    assert jax.tree.leaves(state)[0].dtype == jnp.float32
    assert average.value(state, {"w": jnp.zeros(3, jnp.float16)})["w"].dtype == jnp.float16


def test_other_shapes_of_losses_and_coordinates():
    average = swad()
    state = average.init({"w": jnp.ones(3)})
    assert "loss must be a scalar, not an array of shape (1,)" in message_of(
        lambda: average.validate(state, jnp.ones(1))
    )
    span = twa_span({"w": jnp.eye(2)})
    for shape in ((), (1,), (3,), (2, 1)):
        assert "coordinates must have shape (2,)" in message_of(
            lambda shape=shape: twa_coefficients(span, jnp.ones(shape))
        )
    assert "leading axes of equal length" in message_of(
        lambda: twa_span({"w": jnp.eye(2), "n": jnp.int32(2)})
    )


# Sequences of trees


def objects(*trees):
    array = np.empty(len(trees), object)
    array[:] = trees
    return array


SEQUENCES = {
    "list": lambda *trees: list(trees),
    "tuple": lambda *trees: trees,
    "generator": lambda *trees: (tree for tree in trees),
    "object array": objects,
    "dict values": lambda *trees: dict(enumerate(trees)).values(),
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences_of_trees(kind):
    sequence, trees = SEQUENCES[kind], [{"w": np.full(2, v, np.float32)} for v in VALUES]
    assert stack_replicas(sequence(*trees))["w"].shape == (3, 2)
    assert greedy_soup(None, sequence(*trees), near(1.5)).ingredients == (0, 1)
    assert "stack_replicas(finetuned)" in message_of(
        lambda: model_stock(trees[0], sequence(*trees))
    )
    # Also if a model is itself a list, a tuple or an array.
    for model in (lambda t: [t, t], lambda t: (t, t), lambda t: t["w"]):
        models = [model(tree) for tree in trees]
        assert "stack_replicas(finetuned)" in message_of(
            lambda models=models: model_stock(models[0], sequence(*models))
        )


def test_a_list_may_be_a_model():
    layers = [np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)]
    merged, _ = uniform_mean([x[0] for x in layers], layers)
    assert [x.tolist() for x in merged] == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    "tree",
    [
        {"w": np.ones(2)},
        flax.core.freeze({"w": np.ones(2)}),
        Module(np.ones(2)),
        Model(1.0),
        nnx.state(Model(1.0)),
        nnx.List([Model(1.0)]),
        dataclasses.make_dataclass("Empty", [])(),
        np.ones((2, 2)),
        jnp.ones((2, 2)),
        1.0,
        None,
        "text",
    ],
)
def test_a_tree_instead_of_a_sequence(tree):
    assert "stack_replicas([a, b])" in message_of(lambda: stack_replicas(tree))
    assert "not the result of stack_replicas" in message_of(
        lambda: greedy_soup(None, tree, near(0.0))
    )


def test_a_named_tuple_is_one_tree():
    state = ema(0.5).init({"w": jnp.ones(2)})
    assert "stack_replicas([a, b])" in message_of(lambda: stack_replicas(state))


def test_trees_as_several_arguments():
    tree = {"w": np.ones(2)}
    assert "stack_replicas([a, b])" in message_of(lambda: stack_replicas(tree, tree))
