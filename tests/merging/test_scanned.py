"""Tensors that stack layers: `scan_axes` merges each layer as if it were separate."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.merging import (
    assign,
    constant_ratio,
    cosines,
    init_noise,
    lines,
    model_stock,
    model_stock_carried,
    monosoup,
    norms,
    random_point,
    slerp,
    task_arithmetic,
    thin_shell,
    ties,
    uniform_mean,
    weighted_model_stock,
    wise_ft,
)
from modelstock_jax.merging.units import joined
from tests.merging.reference import allowed, equation_3
from tests.merging.trees import replicas

HEADS, SIZE, WIDTH, LAYERS = 2, 3, 4, 5
LAYER = {
    **{f"attn.{name}.kernel": (WIDTH, HEADS, SIZE) for name in ("query", "key", "value")},
    **{f"attn.{name}.bias": (HEADS, SIZE) for name in ("query", "key", "value")},
    "attn.out.kernel": (HEADS, SIZE, WIDTH),
    "attn.out.bias": (WIDTH,),
    "mlp.kernel": (WIDTH, 6),
    "norm.scale": (WIDTH,),
}
QKV = {kind: [f"attn.{n}.{kind}" for n in ("query", "key", "value")] for kind in ("kernel", "bias")}


def _own_unit(name, shape):
    assert shape == LAYER.get(name.removeprefix("layers."), shape)  # the shape of one layer
    return "attention" if "attn" in name else None


UNITS = {"tensor": "tensor", "layer": "layer", "filter": "filter", "head": "head", "own": _own_unit}


def _pieces(unit):
    """Return the units of one layer, as lists of (name, index), and their index in the ratios."""
    whole = [[(name, ...)] for name in LAYER]
    groups = {
        "tensor": [],
        "layer": [[(name, ...) for name in names] for names in QKV.values()],
        "own": [[(name, ...) for name in LAYER if "attn" in name]],
        "filter": [
            *([(n, np.s_[:, h])] for n in QKV["kernel"] for h in range(HEADS)),
            *([(n, np.s_[h])] for n in QKV["bias"] for h in range(HEADS)),
            *([("attn.out.kernel", np.s_[..., c])] for c in range(WIDTH)),
            *([("mlp.kernel", np.s_[:, c])] for c in range(6)),
        ],
        "head": [
            *(
                [*((n, np.s_[:, h]) for n in QKV["kernel"]), ("attn.out.kernel", np.s_[h])]
                for h in range(HEADS)
            ),
            *([(n, np.s_[h]) for n in QKV["bias"]] for h in range(HEADS)),
        ],
    }[unit]
    covered = {name for group in groups for name, _ in group}
    return groups + [piece for piece in whole if piece[0][0] not in covered]


def _trees(axis):
    """Return the tree of one model with stacked layers, that of two replicas, and the layers."""
    layers = [replicas(LAYER, 2, seed, cosine=0.1 + 0.15 * seed) for seed in range(LAYERS)]
    embed = replicas({"embed": (7, WIDTH)}, 2)
    stacked0, stacked = dict(embed[0]), dict(embed[1])
    for name, shape in LAYER.items():
        position = min(axis, len(shape))
        stacked0[f"layers.{name}"] = np.stack([w0[name] for w0, _ in layers], position)
        stacked[f"layers.{name}"] = np.stack([w[name] for _, w in layers], 1 + position)
    return stacked0, stacked, layers


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("unit", UNITS)
def test_stacked_layers_are_merged_as_separate_layers(unit, axis):
    w0, w, layers = _trees(axis)
    merged, stats = model_stock(w0, w, unit=UNITS[unit], scan_axes={"layers": axis})
    for number, (layer0, layer) in enumerate(layers):
        for piece in _pieces(unit):
            parts0 = [layer0[name][index] for name, index in piece]
            parts = [[replica[name][index] for name, index in piece] for replica in _split(layer)]
            ravel = [np.concatenate([x.ravel() for x in row]) for row in (parts0, *parts)]
            _, ratio, expected = equation_3(ravel[0], np.stack(ravel[1:]))
            found = [
                np.take(np.asarray(merged[f"layers.{name}"]), number, axis)[index].ravel()
                for name, index in piece
            ]
            error = np.abs(np.concatenate(found).astype(np.float64) - expected)
            assert (error <= allowed(ravel[0], np.stack(ravel[1:]), expected)).all(), piece
            _check_ratios(stats.ratio, number, piece, ratio, unit, axis)
        alone, _ = model_stock(layer0, layer, unit=UNITS[unit])
        for name, expected in alone.items():
            found = np.take(np.asarray(merged[f"layers.{name}"]), number, axis)
            np.testing.assert_array_max_ulp(found, np.asarray(expected), 1)
    assert stats.ratio["embed"].shape == ((WIDTH,) if unit == "filter" else ())


def _split(layer):
    return [{name: x[k] for name, x in layer.items()} for k in range(2)]


def _check_ratios(ratios, number, piece, expected, unit, axis):
    for name, index in piece:
        found = np.asarray(ratios[f"layers.{name}"])
        # Under `filter` the unit axes are in the order of the tensor's: heads first in [H, L, ...].
        heads_first = unit == "filter" and axis == 1 and name in QKV["bias"]
        found = np.take(found, number, -1 if heads_first else 0)
        position = [i for i in (index if isinstance(index, tuple) else (index,)) if type(i) is int]
        assert found[tuple(position)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("unit", ["tensor", "layer"])
def test_without_the_option_all_layers_share_one_angle(unit):
    w0, w, layers = _trees(0)
    _, stats = model_stock(w0, w, unit=unit)
    name = "mlp.kernel"
    assert stats.ratio[f"layers.{name}"].shape == ()
    together = [np.concatenate([np.ravel(x[k]) for x, *_ in [(y[name],) for _, y in layers]])
                for k in range(2)]  # fmt: skip
    start = np.concatenate([y[name].ravel() for y, _ in layers])
    _, ratio, _ = equation_3(start, np.stack(together))
    assert float(stats.ratio[f"layers.{name}"]) == pytest.approx(ratio, abs=1e-6)


METHODS = {
    "ties": lambda w0, w, **how: ties(w0, w, 0.5, **how),
    "slerp": slerp,
    "monosoup": monosoup,
    "lines": lambda w0, w, **how: lines(w0, w, 0.5, **how),
    "weighted_model_stock": weighted_model_stock,
    "constant_ratio": constant_ratio,
    "uniform_mean": uniform_mean,
    "wise_ft": lambda w0, w, **how: wise_ft(w0, w, 0.5, **how),
    "task_arithmetic": lambda w0, w, **how: task_arithmetic(w0, w, 0.5, **how),
    "model_stock_carried": model_stock_carried,
    "anchor_rounding": lambda w0, w, **how: model_stock(
        jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), w0),
        w,
        anchor_rounding="correct",
        dtype=jnp.float32,
        **how,
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_accepts_any_axis(method):
    # Under `head`, the output kernel [H, L, head dim, D] has its unit axes in the other order.
    results = []
    for axis in (0, 1):
        w0, w, _ = _trees(axis)
        call = functools.partial(METHODS[method], unit="head", scan_axes={"layers": axis})
        merged, stats, *_ = call(w0, w)
        results.append(
            (
                {n: x if n == "embed" else np.moveaxis(x, axis, 0) for n, x in merged.items()},
                stats.ratio,
                stats.outcome,
            )
        )
        traced, *_ = jax.jit(call)(w0, w)
        jax.tree.map(np.testing.assert_array_equal, traced, merged)
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_measures_and_noise_have_an_axis_of_layers():
    w0, w, layers = _trees(1)
    how = {"unit": "tensor", "scan_axes": {"layers": 1}}
    name = "layers.mlp.kernel"
    expected = np.stack(
        [np.linalg.norm((y - x).reshape(2, -1), axis=1) for x, y in
         ((a["mlp.kernel"], b["mlp.kernel"]) for a, b in layers)], axis=1
    )  # fmt: skip
    np.testing.assert_allclose(norms(w0, w, **how)[name], expected, rtol=1e-6)
    assert cosines(w0, w, **how)[name].shape == (2, 2, LAYERS)
    assert init_noise(w0, **how)[name].shape == (LAYERS,)
    four = jax.tree.map(lambda x: np.concatenate([x, x + 1e-3]), w)
    assert thin_shell(w0, four, **how)[name].radius.shape == (4, LAYERS)
    distances = jax.tree.map(lambda d: d[0], norms(w0, w, **how))
    point = random_point(jax.random.key(0), w0, distances, **how)
    found = np.linalg.norm((point[name] - w0[name]).swapaxes(1, 2).reshape(-1, LAYERS), axis=0)
    np.testing.assert_allclose(found, distances[name], rtol=1e-5)


def test_block_is_one_unit_per_layer():
    shapes = [(f"decoder.layers.{n}", (LAYERS, *s)) for n, s in LAYER.items()] + [("norm", (4,))]
    views = assign(shapes, "block", scan_axes={"decoder.layers": 0})
    assert {v.key for v in views[:-1]} == {"decoder.layers"} and views[-1].key == "norm"
    assert {v.unit_shape for v in views[:-1]} == {(LAYERS,)} and joined(views) == 1
    # A stack of two different layers, as in models with alternating attentions.
    shapes = [
        (f"stack.layers_{k}.{n}", (*s[:1], LAYERS, *s[1:]))
        for n, s in LAYER.items()
        for k in (0, 1)
    ]
    views = assign(shapes, "block", scan_axes={"": 1})
    assert {v.key for v in views} == {"stack.layers_0", "stack.layers_1"}
    shapes = [(name, (LAYERS, *shape)) for name, shape in LAYER.items()]
    assert {v.key for v in assign(shapes, "block", scan_axes={"": 0})} == {"(root)"}


def test_heads_of_two_axes_and_pytorch_layout():
    torch = {f"layers.attn.{n}_proj.weight": (LAYERS, 6, 4) for n in "qkv"}
    torch["layers.attn.out_proj.weight"] = (LAYERS, 4, 6)
    how = {"num_heads": 2, "filter_axis": 0}
    views = assign(list(torch.items()), "head", scan_axes={"layers": -3}, **how)
    assert {v.unit_shape for v in views} == {(LAYERS, 2)} and len({v.key for v in views}) == 1
    middle = [(n, (s[1], s[0], s[2])) for n, s in torch.items()]
    views = assign(middle, "head", scan_axes={"": 1}, **how)
    assert {v.unit_shape for v in views} == {(LAYERS, 2)} and [v.swapped for v in views] == [
        True, True, True, False,
    ]  # fmt: skip
    by_filter = assign(middle, "filter", scan_axes={"": 1}, filter_axis=0)
    assert by_filter[0].unit_shape == (6, LAYERS)
    one = assign([("a.kernel", (1, LAYERS, 4))], "filter", scan_axes={"": 1}, filter_axis=0)
    assert one[0].unit_shape == (1, LAYERS)


@pytest.mark.parametrize(
    "scan_axes,unit,message",
    [
        ({"layer": 0}, "tensor", "scan_axes.*'layer'.*'layers.attn"),
        ({"layers": 0, "blocks": 0}, "tensor", "scan_axes.*'blocks'"),
        ({"layers": 3}, "tensor", r"scan_axes\['layers'\] = 3 .*'layers.attn.query.bias'"),
        ({"": 1}, "tensor", r"scan_axes\[''\] = 1 .*'scale'"),
        ({"layers": -4}, "tensor", r"scan_axes\['layers'\] = -4"),
        ({"layers": True}, "tensor", "integer, not True"),
        ({"layers": "0"}, "tensor", "integer, not '0'"),
        (0, "tensor", "mapping.*not 0"),
        ({"layers": 0}, "global", "'global'.*scan_axes"),
        (
            {"layers.attn.query": 0},
            lambda *_: "all",
            "'all'.*different numbers of layers.*query.*key",
        ),
    ],
)
def test_errors(scan_axes, unit, message):
    names = [f"layers.attn.{name}.bias" for name in ("query", "key", "value")]
    shapes = [*((name, (5, 2, 3)) for name in names), ("scale", (3,))]
    with pytest.raises(UserError, match=message):
        assign(shapes, unit, scan_axes=scan_axes)
