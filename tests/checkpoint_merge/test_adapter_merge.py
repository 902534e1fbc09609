"""Adapters merged into an adapter: its model is that of the complete merge, without the base."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.adapter_config import merged_config, rank_keys
from modelstock_jax.checkpoint_merge.adapter_merge import Factored, combine, factor_gram
from modelstock_jax.checkpoint_merge.adapter_plan import Update
from modelstock_jax.checkpoint_merge.adapter_sources import AdapterSource
from modelstock_jax.checkpoint_merge.kernels import UnitLayout
from modelstock_jax.checkpoint_merge.lora import Adapter
from modelstock_jax.checkpoint_merge.methods import Solved
from modelstock_jax.merging import rules
from modelstock_jax.merging.units import UnitView
from modelstock_jax.tensor_files.reader import TensorFiles
from tests.checkpoint_merge.small import LLAMA, adapter, llama_shapes, save, weights

SHAPES = llama_shapes()
ATTENTION = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in ("q", "k", "v", "o")]
MLP = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
START = "base_model.model."


def factors(modules, rank, seed, dtype=np.float32) -> dict[str, np.ndarray]:
    """Factors whose updates partly agree between seeds."""
    common, own = np.random.default_rng(9), np.random.default_rng(seed)

    def values(*shape):
        shared = common.standard_normal((24, 24))[: shape[0], : shape[1]]
        return (0.2 * (shared + 0.6 * own.standard_normal(shape))).astype(dtype)

    tensors = {}
    for module in modules:
        out, inner = SHAPES[f"{module}.weight"]
        embedding = "embed" in module
        kind, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        out, inner = (inner, out) if embedding else (out, inner)
        tensors[f"{START}{module}.{kind}A{end}"] = values(rank, inner)
        tensors[f"{START}{module}.{kind}B{end}"] = values(out, rank)
    return tensors


@pytest.fixture
def base(tmp_path):
    """Its weights are as large as the updates, so that rounding of the weights hides no error."""
    return save(tmp_path / "base", weights(SHAPES), LLAMA)


@pytest.fixture
def adapters(tmp_path):
    """Three adapters of unequal ranks, scales and tensors."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    embedding = ["model.embed_tokens"]
    modules = [ATTENTION + MLP + embedding, ATTENTION[:5] + embedding, ATTENTION + MLP[:1]]
    how = [
        {"r": 3, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 4, "use_rslora": True, "alpha_pattern": {"k_proj": 6}},
        {"r": 2, "lora_alpha": 5},
    ]
    return [
        adapter(
            tmp_path / f"a{i + 1}",
            factors(modules[i], how[i]["r"], seed=i + 1),
            target_modules=[*names, *(["embed_tokens"] if i < 2 else [])],
            task_type="CAUSAL_LM",
            **how[i],
        )
        for i in range(3)
    ]


def tensors(path: Path) -> dict[str, np.ndarray]:
    files = TensorFiles(path)
    return {name: files[name] for name in files}


def written(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors and the config of an adapter."""
    return tensors(path / "adapter_model.safetensors"), json.loads(
        (path / "adapter_config.json").read_text()
    )


def report(path: Path) -> dict:
    return json.loads((path / "merge_report.json").read_text())


def run(say, *arguments):
    result = say("merge", *arguments)
    assert result.status == 0, result.err
    return result


def assert_equals_complete_merge(say, tmp_path, base, adapters, *options, model=()):
    """Check the adapter, applied to the base, against the merge of complete models.

    The merged weights are rounded to float32 (6e-8), and so are the weights from which the complete
    merge computes the updates; sums of float32 products have an error of 2e-7.
    """
    run(say, base, *adapters, *options, *model, "--out", tmp_path / "complete")
    run(say, base, *adapters, *options, "--as-adapter", "--out", tmp_path / "out")
    run(say, base, tmp_path / "out", "--method", "passthrough", "--out", tmp_path / "applied")
    expected, applied = tensors(tmp_path / "complete"), tensors(tmp_path / "applied")
    assert expected.keys() == applied.keys()
    start = tensors(base)
    for name, value in expected.items():
        limit = 1e-6 * np.abs(value).max()
        np.testing.assert_allclose(applied[name], value, rtol=0, atol=limit, err_msg=name)
    changed = {n for n, x in expected.items() if n in start and np.abs(x - start[n]).max() > 1e-3}
    return expected, changed


METHODS = {
    "model-stock": [],
    "weighted-model-stock": [],
    "uniform-mean": [],
    "linear": ["--weights", "1,2,3"],
    "wise-ft": ["--alpha", "0.4"],
    "task-arithmetic": ["--weights", "0.5,-0.25,1", "--scale", "1.5"],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unit", ["tensor", "filter"])
def test_equals_the_complete_merge(say, tmp_path, base, adapters, method, unit):
    options = ["--method", method, *METHODS[method], "--unit", unit]
    _, changed = assert_equals_complete_merge(say, tmp_path, base, adapters, *options)
    assert len(changed) == 11
    rows, complete = (
        {row["name"]: row for row in report(tmp_path / name)["units"]}
        for name in ("out", "complete")
    )
    for name, row in rows.items():
        for key in ("cosine", "ratio", "norms", "outcome", "num_units"):
            expected = complete[name][key]
            assert row[key] == (expected if isinstance(expected, str | None) else
                                pytest.approx(expected, rel=1e-5)), (name, key)  # fmt: skip


@pytest.mark.parametrize("unit", ["layer", "head", "block", "global"])
def test_units_of_several_tensors(say, tmp_path, base, adapters, unit):
    assert_equals_complete_merge(say, tmp_path, base, adapters, "--unit", unit)
    keys = {row["unit"] for row in report(tmp_path / "out")["units"]}
    assert len(keys) == {"layer": 7, "head": 5, "block": 3, "global": 1}[unit]


@pytest.mark.parametrize("unit", ["tensor", "filter", "layer", "block", "global"])
def test_without_the_base_the_files_are_identical(say, tmp_path, base, adapters, unit):
    run(say, base, *adapters, "--unit", unit, "--as-adapter", "--out", tmp_path / "with")
    run(say, "--no-base", *adapters, "--unit", unit, "--as-adapter", "--out", tmp_path / "without")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = (tmp_path / x / name for x in ("with", "without"))
        assert first.read_bytes() == second.read_bytes(), name
    with_base, without = report(tmp_path / "with"), report(tmp_path / "without")
    assert with_base["units"] == without["units"] and without["base"] is None
    assert all((tmp_path / x / "angles.png").exists() for x in ("with", "without"))
    assert with_base["base"]["files"] == {}  # Only names and shapes are read.


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_fan_in_fan_out(say, tmp_path, shape):
    name = "h.0.attn.c_attn"
    base = save(tmp_path / "base", weights({f"{name}.weight": shape, "h.0.ln.weight": (8,)}))
    rng = np.random.default_rng(0)
    paths = [
        adapter(
            tmp_path / f"a{rank}",
            {
                f"{START}{name}.lora_A.weight": rng.random((rank, shape[0])).astype(np.float32),
                f"{START}{name}.lora_B.weight": rng.random((shape[1], rank)).astype(np.float32),
            },
            r=rank, fan_in_fan_out=True, target_modules=["c_attn"],
        )
        for rank in (2, 3)
    ]  # fmt: skip
    for unit in ("tensor", "filter"):
        out = tmp_path / unit
        out.mkdir()
        assert_equals_complete_merge(say, out, base, paths, "--unit", unit)
        assert written(out / "out")[1]["fan_in_fan_out"] is True


def random_update(rng, shape, view, transposed, ranks):
    """A plan of a tensor, its factors in each adapter, and the complete matrices as stored."""
    size = shape[::-1] if transposed else shape
    factors = [
        Factored(rng.standard_normal((size[0], r)), rng.standard_normal((r, size[1])))
        if r else None
        for r in ranks
    ]  # fmt: skip
    total = sum(ranks)
    update = Update(
        "w", shape, view, (), "A", "B", size, total, total, transposed, "F32"
    )  # fmt: skip
    zero = np.zeros(size)
    complete = [zero if x is None else x.b @ x.a for x in factors]
    return update, factors, [d.T if transposed else d for d in complete]


VIEWS = {
    "tensor": UnitView("w", (6, 8), (0, 1)),
    "rows": UnitView("w", (6, 8), (1,)),
    "columns": UnitView("w", (6, 8), (0,)),
    "heads of rows": UnitView("w", (3, 2, 8), (1, 2)),
    "heads of columns": UnitView("w", (6, 2, 4), (0, 2)),
    "heads of a fused projection": UnitView("w", (3, 2, 1, 8), (0, 2, 3)),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_gram_and_sum_are_those_of_the_complete_matrices(view, transposed):
    rng = np.random.default_rng(1)
    view = VIEWS[view]
    update, factors, complete = random_update(rng, (6, 8), view, transposed, (2, 0, 3))
    layout = UnitLayout.of(view)
    gram = factor_gram(factors, update, layout)
    by_unit = np.stack([d.reshape(view.view) for d in complete])
    axes = tuple(1 + axis for axis in view.axes)
    for i in range(3):
        for j in range(3):
            expected = (by_unit[i] * by_unit[j]).sum(tuple(a - 1 for a in axes)).ravel()
            np.testing.assert_allclose(gram[i, j], expected, rtol=1e-12, atol=1e-12)
    values = rng.standard_normal((3, layout.units))
    solution = rules.fixed_coefficients(gram, np.zeros(layout.units, bool), np.ones(3))
    solved = Solved(solution._replace(coefficient=values), gram)
    merged = combine(factors, update, layout, solved)
    spread = [layout.spread(v, 0, 48) for v in values]
    expected = sum(c * d.ravel() for c, d in zip(spread, complete, strict=True)).reshape(6, 8)
    product = merged.b @ merged.a
    np.testing.assert_allclose(product.T if transposed else product, expected, atol=1e-12)


def test_factors_of_the_first_adapter_are_exact(say, tmp_path, adapters):
    """B is multiplied in float64 and rounded once; A is copied."""
    run(say, "--no-base", *adapters, "--method", "uniform-mean", "--as-adapter",
        "--out", tmp_path / "out")  # fmt: skip
    merged, config = written(tmp_path / "out")
    inputs = [Adapter(path) for path in adapters]
    module = ATTENTION[1]
    a = [x.files[f"{START}{module}.lora_A.weight"] for x in inputs]
    b = [
        (x.files[f"{START}{module}.lora_B.weight"].astype(np.float64)
         * x.factors[f"{module}.weight"].scale * (1 / 3)).astype(np.float32)
        for x in inputs
    ]  # fmt: skip
    np.testing.assert_array_equal(merged[f"{START}{module}.lora_A.weight"], np.concatenate(a))
    np.testing.assert_array_max_ulp(
        merged[f"{START}{module}.lora_B.weight"], np.concatenate(b, axis=1), maxulp=1
    )
    assert config["r"] == config["lora_alpha"] == 9 and config["use_rslora"] is False
    again = Adapter(tmp_path / "out")
    assert {factors.scale for factors in again.factors.values()} == {1.0}
    row = next(r for r in report(tmp_path / "out")["units"] if r["name"] == f"{module}.weight")
    assert row["rank"] == row["total_rank"] == 9 and row["truncation_error"] == 0
    assert 0 < row["rounding_error"] < 2**-24


@pytest.mark.parametrize("unit", ["tensor", "filter"])
def test_rank_is_the_best_approximation(say, tmp_path, adapters, unit):
    common = ["--no-base", *adapters, "--as-adapter", "--unit", unit, "--dtype", "float64"]
    run(say, *common, "--out", tmp_path / "exact")
    result = run(say, *common, "--rank", "2", "--out", tmp_path / "out")
    exact, cut = (Adapter(tmp_path / name) for name in ("exact", "out"))
    rows = {row["name"]: row for row in report(tmp_path / "out")["units"]}
    assert rows.keys() == exact.factors.keys() == cut.factors.keys()
    for name, row in rows.items():
        shape = exact.shape(name)
        complete, low = (x.delta(name, 0, shape[0] * shape[1]).reshape(shape) for x in (exact, cut))
        singular = np.linalg.svd(complete, compute_uv=False)
        error = np.linalg.norm(singular[2:]) / np.linalg.norm(singular)
        assert row["truncation_error"] == pytest.approx(error, rel=1e-9) and error > 0.01
        found = np.linalg.norm(low - complete) / np.linalg.norm(complete)
        assert found == pytest.approx(error, rel=1e-6)
        assert row["rank"] == 2 < row["total_rank"]
    summary = report(tmp_path / "out")["adapter"]["truncation_error"]
    assert summary["max"] == max(row["truncation_error"] for row in rows.values())
    assert f"by --rank: median {summary['median']:.2g}, max {summary['max']:.2g}" in result.out
    config = written(tmp_path / "out")[1]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})


def test_rank_above_the_sum_changes_nothing(say, tmp_path, adapters):
    common = ["--no-base", *adapters, "--as-adapter"]
    run(say, *common, "--out", tmp_path / "exact")
    run(say, *common, "--rank", "9", "--out", tmp_path / "out")
    first, second = (tmp_path / n / "adapter_model.safetensors" for n in ("exact", "out"))
    assert first.read_bytes() == second.read_bytes()
    assert report(tmp_path / "out")["adapter"]["truncation_error"]["max"] == 0


def test_rank_is_at_most_that_of_the_matrix(say, tmp_path):
    """Two adapters of rank 10 of a matrix with 8 rows: the sum of ranks is 20."""
    module = ATTENTION[1]  # [8, 16]
    paths = [
        adapter(tmp_path / f"a{i}", factors([module], 10, i), r=10, target_modules=["k_proj"])
        for i in (1, 2)
    ]
    run(say, "--no-base", *paths, "--as-adapter", "--rank", "12", "--out", tmp_path / "out")
    assert written(tmp_path / "out")[1]["r"] == 8
    (row,) = report(tmp_path / "out")["units"]
    assert row["rank"] == 8 and row["truncation_error"] == pytest.approx(0, abs=1e-12)


def test_rounding_to_bfloat16_is_stated(say, tmp_path):
    paths = [
        adapter(
            tmp_path / f"a{i}", factors(ATTENTION, 3, i, ml_dtypes.bfloat16),
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        )
        for i in (1, 2)
    ]  # fmt: skip
    common = ["--no-base", *paths, "--as-adapter"]
    result = run(say, *common, "--out", tmp_path / "rounded")
    run(say, *common, "--dtype", "float32", "--out", tmp_path / "exact")
    exact, rounded = (Adapter(tmp_path / name) for name in ("exact", "rounded"))
    for row in report(tmp_path / "rounded")["units"]:
        name, count = row["name"], row["shape"][0] * row["shape"][1]
        complete = exact.delta(name, 0, count)
        error = np.linalg.norm(rounded.delta(name, 0, count) - complete) / np.linalg.norm(complete)
        assert row["rounding_error"] == pytest.approx(error, rel=1e-3)
        assert 1e-4 < error < 2**-8 and row["dtype"] == "bfloat16"
    text = "relative error of an update to bfloat16: median"
    assert text in result.out and text in (tmp_path / "rounded" / "README.md").read_text()
    assert text not in (tmp_path / "exact" / "README.md").read_text()
    assert {exact.files.code(name) for name in exact.files} == {"F32"}


def test_default_dtype_of_unequal_inputs_is_float32(say, tmp_path):
    paths = [
        adapter(tmp_path / f"a{i}", factors(MLP, 2, i, dtype), r=2, target_modules=["down_proj"])
        for i, dtype in ((1, ml_dtypes.bfloat16), (2, np.float16))
    ]
    run(say, "--no-base", *paths, "--as-adapter", "--out", tmp_path / "out")
    assert {x.dtype for x in written(tmp_path / "out")[0].values()} == {np.dtype(np.float32)}


def test_a_value_beyond_float16_is_an_error(say, tmp_path):
    paths = [
        adapter(tmp_path / f"a{i}", factors(MLP, 2, i, np.float16), r=2, lora_alpha=10**6)
        for i in (1, 2)
    ]
    result = say("merge", "--no-base", *paths, "--as-adapter", "--out", tmp_path / "out")
    assert "lora_B.weight: a merged value exceeds the range of float16" in result.err
    assert not (tmp_path / "out").exists()


# Configs.


def test_patterns_are_where_the_rank_differs():
    keys = rank_keys({"m.h.1.q": 4, "m.h.2.q": 8, "h.1.q": 8, "x.m.h.1.q": 8})
    # `x.m.h.1.q` ends with `m.h.1.q`: without its pattern, before the shorter one, it gets rank 4.
    expected = {r"x\.m\.h\.1\.q": 8, r"m\.h\.1\.q": 4}
    assert keys == {"r": 8, "lora_alpha": 8, "rank_pattern": expected, "alpha_pattern": expected}
    assert list(keys["rank_pattern"]) == list(expected)
    tied = rank_keys({"a.q": 2, "b.q": 4})
    assert tied["r"] == 4 and tied["rank_pattern"] == {r"a\.q": 2}


def pattern(*names):
    return "|".join(map(re.escape, names))


Q0, Q1, V0, V1 = (f"model.layers.{i}.self_attn.{p}_proj" for p in "qv" for i in (0, 1))


@pytest.mark.parametrize(("first", "second", "expected"), [
    # The same modules and names: as they are, also if they are an expression or a range of layers.
    (([Q0, Q1], ["q_proj"], {}), ([Q0, Q1], ["q_proj"], {}), ["q_proj"]),
    (([Q0], ".*0.*q_proj", {}), ([Q0], ".*0.*q_proj", {}), ".*0.*q_proj"),
    (([Q0], ["q_proj"], {"layers_to_transform": [0]}),
     ([Q0], ["q_proj"], {"layers_to_transform": [0]}), ["q_proj"]),
    # Each has all modules that it names: the union.
    (([Q0, Q1], ["q_proj"], {}), ([V0, V1], ["v_proj"], {}), ["q_proj", "v_proj"]),
    # `q_proj` and `v_proj` would match modules without factors: a pattern of complete names.
    (([Q0], ["q_proj"], {"layers_to_transform": [0]}), ([Q0, Q1], ["q_proj"], {}),
     pattern(Q0, Q1)),
    (([Q0], ".*0.*q_proj", {}), ([V0, V1], ["v_proj"], {}), pattern(Q0, V0, V1)),
    (([Q0], ["q_proj"], {}), ([Q1, V1], ["q_proj", "v_proj"], {}), pattern(Q0, Q1, V1)),
])  # fmt: skip
def test_target_modules(tmp_path, first, second, expected):
    inputs = []
    for i, (modules, targets, more) in enumerate((first, second)):
        path = adapter(tmp_path / str(i), factors(modules, 3, i), target_modules=targets, **more)
        inputs.append(AdapterSource(str(i), Adapter(path)))
    merged = sorted({*first[0], *second[0]})
    config = merged_config(inputs, 0, [set(first[0]), set(second[0])], dict.fromkeys(merged, 6), [])
    assert config["target_modules"] == expected
    is_kept = first[1:] == second[1:]
    assert bool(config.get("layers_to_transform")) == (is_kept and bool(first[2]))


def test_excluded_modules_are_not_named(say, tmp_path, base, adapters):
    run(
        say, base, *adapters, "--as-adapter", "--exclude", "*.layers.0.*", "--out", tmp_path / "out"
    )
    merged, config = written(tmp_path / "out")
    assert not any("layers.0" in name for name in merged)
    chosen = [m for m in ATTENTION + MLP if re.fullmatch(config["target_modules"], m)]
    assert MLP[1] in chosen and not any("layers.0" in name for name in chosen)
    # PEFT compares a name in a list with the end of a module's name, a text with all of it.
    assert not re.fullmatch(config["target_modules"], f"other.{MLP[1]}")
    excluded = [x for x in report(tmp_path / "out")["not_merged"] if "layers.0" in x["name"]]
    assert len(excluded) == 5 and {x["reason"] for x in excluded} == {"excluded by pattern"}


def test_keys_of_training(say, tmp_path, adapters):
    path = adapters[0] / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"lora_dropout": 0.1, "init_lora_weights": "gaussian", "inference_mode": False}
    path.write_text(json.dumps(config))
    run(say, "--no-base", *adapters, "--as-adapter", "--out", tmp_path / "out")
    merged = written(tmp_path / "out")[1]
    assert (merged["lora_dropout"], merged["init_lora_weights"]) == (0.0, True)
    assert merged["inference_mode"] is True and merged["task_type"] == "CAUSAL_LM"


# Tensors that adapters store in full.


@pytest.fixture
def full(tmp_path, base):
    """Adapters with a bias, and with a head: only the first two have the head."""
    start, paths = weights(SHAPES), []
    norm, head = "model.layers.0.input_layernorm", "lm_head"
    for i in (1, 2, 3):
        rng = np.random.default_rng(i)
        common = np.random.default_rng(0)
        more = {}
        for name in [f"{module}.weight" for module in ([norm, head] if i < 3 else [norm])]:
            shape = SHAPES[name]
            update = 0.1 * (common.standard_normal(shape) + rng.standard_normal(shape))
            more[START + name] = start[name] + update.astype(np.float32)
        paths.append(
            adapter(
                tmp_path / f"full{i}", factors(ATTENTION[:4], 3, i) | more,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                modules_to_save=["lm_head", "input_layernorm"],
            )
        )  # fmt: skip
    return paths


@pytest.mark.parametrize(("method", "unit"), [
    ("model-stock", "tensor"), ("model-stock", "filter"), ("model-stock", "global"),
    ("linear", "tensor"), ("task-arithmetic", "filter"),
])  # fmt: skip
def test_tensors_that_are_stored_in_full(say, tmp_path, base, full, method, unit):
    options = ["--unit", unit, "--method", method]
    _, changed = assert_equals_complete_merge(say, tmp_path, base, full, *options)
    assert {"lm_head.weight", "model.layers.0.input_layernorm.weight"} <= changed
    config = written(tmp_path / "out")[1]
    assert config["modules_to_save"] == ["lm_head", "input_layernorm"]
    assert report(tmp_path / "out")["base"]["files"] != {}  # Its weights are read.


def test_a_mean_of_full_tensors_needs_no_base(say, tmp_path, base, full):
    for name, given in (("with", [base]), ("without", ["--no-base"])):
        run(say, *given, *full[:2], "--method", "linear", "--weights", "1,2", "--as-adapter",
            "--out", tmp_path / name)  # fmt: skip
    first, second = (tmp_path / n / "adapter_model.safetensors" for n in ("with", "without"))
    assert first.read_bytes() == second.read_bytes()


def test_a_new_classifier_is_averaged_on_request(say, tmp_path, base):
    paths = []
    for i in (1, 2):
        score = {f"{START}score.weight": np.full((2, 16), i, np.float32)}
        paths.append(adapter(tmp_path / f"a{i}", factors(MLP, 2, i) | score, r=2,
                             target_modules=["down_proj"], modules_to_save=["score"]))  # fmt: skip
    arguments = [base, *paths, "--as-adapter", "--out", tmp_path / "out"]
    result = say("merge", *arguments)
    assert "score.weight" in result.err and "--head finetuned" in result.err
    run(say, *arguments, "--head", "finetuned")
    merged, config = written(tmp_path / "out")
    np.testing.assert_array_equal(merged[f"{START}score.weight"], np.full((2, 16), 1.5))
    assert config["modules_to_save"] == ["score"]


def test_copies_of_the_embedding_next_to_its_factors(say, tmp_path, base, adapters):
    """PEFT saves the embedding of the base if it has factors."""
    embedding = weights(SHAPES)["model.embed_tokens.weight"]
    for path in adapters[:2]:
        copy = {f"{START}model.embed_tokens.base_layer.weight": embedding}
        values = tensors(path / "adapter_model.safetensors") | copy
        adapter(path, values, **json.loads((path / "adapter_config.json").read_text()))
    assert_equals_complete_merge(say, tmp_path, base, adapters)
    assert not any("base_layer" in name for name in written(tmp_path / "out")[0])
    arguments = ["--as-adapter", "--overwrite", "--out", tmp_path / "out"]
    result = say("merge", "--no-base", *adapters, *arguments)
    assert (
        "model.embed_tokens.weight is stored in full next to its factors; pass BASE" in result.err
    )
    values[f"{START}model.embed_tokens.base_layer.weight"] = embedding + 1
    adapter(path, values, **json.loads((path / "adapter_config.json").read_text()))
    result = say("merge", base, *adapters, *arguments)
    assert "has factors and is not that of the base" in result.err


# Commands, files and errors.


def edited(path: Path, **config) -> None:
    values = json.loads((path / "adapter_config.json").read_text()) | config
    (path / "adapter_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(("options", "message"), [
    (["--method", "ties"], "--as-adapter does not apply to --method ties"),
    (["--method", "slerp", "--t", "0.5"], "--as-adapter does not apply to --method slerp"),
    (["--method", "linear", "--weights", "1,1,1", "--no-normalize"], "sum 3, which also scales"),
    (["--vocab-mismatch", "base"], "--vocab-mismatch does not apply to --as-adapter: "),
    (["--max-shard-size", "1GB"], "--max-shard-size does not apply to --as-adapter: "),
    (["--unmerged-from", "mean"], "--unmerged-from does not apply to --as-adapter: "),
    (["--anchor-rounding", "correct"], "--anchor-rounding does not apply to --as-adapter: "),
    (["--rank", "0"], "--rank: must be at least 1"),
    (["--config-from", "base"], "--config-from base does not apply to --as-adapter"),
    (["--config-from", "model:4"], "there are 3 adapters"),
    (["--weights", "1,2", "--method", "linear"], "--weights has 2 values"),
    (["--exclude", "*"], "no tensor is left to merge"),
    (["--include", "*.lm_head.*"], "no tensor is left to merge"),
])  # fmt: skip
def test_options_that_do_not_apply(say, tmp_path, base, adapters, options, message):
    result = say("merge", base, *adapters, "--as-adapter", *options, "--out", tmp_path / "out")
    assert message in result.err and not (tmp_path / "out").exists()


def test_inputs_that_do_not_apply(say, tmp_path, base, adapters):
    out = ["--as-adapter", "--out", tmp_path / "out"]
    complete = save(tmp_path / "complete", weights(SHAPES, 1), LLAMA)
    cases = {
        "is an adapter; pass the base first, or pass --no-base": [*adapters, *out],
        "no adapter_config.json; --as-adapter requires LoRA adapters": [
            base, adapters[0], complete, *out],
        "--as-adapter requires one adapter of BASE": [
            base, f"{base}+{adapters[0]}+{adapters[1]}", adapters[2], *out],
        "--rank applies to --as-adapter only": [base, *adapters, "--rank", 2, *out[1:]],
        "--unit head requires the shapes of all attentions; pass BASE": [
            "--no-base", *adapters, "--unit", "head", "--num-heads", 4, *out],
        "--head applies to the base, but there is none; pass BASE": [
            "--no-base", *adapters, "--head", "finetuned", *out],
        "is given twice": [base, adapters[0], adapters[0], *out],
        "the output directory is the input": [base, *adapters, "--as-adapter", "--overwrite",
                                              "--out", adapters[0]],
    }  # fmt: skip
    for message, arguments in cases.items():
        result = say("merge", *arguments)
        assert result.status == 1 and message in result.err, result.err


@pytest.mark.parametrize(("config", "message"), [
    ({"bias": "foo"}, "bias is 'foo', not one of none, all, lora_only"),
    ({"task_type": ["a"]}, "task_type is ['a'], not a name"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', not a list of names"),
    ({"rank_pattern": {"(": 3}}, "a key of rank_pattern or alpha_pattern is not a regular"),
])  # fmt: skip
def test_invalid_configs(say, tmp_path, base, adapters, config, message):
    edited(adapters[1], **config)
    for arguments in ([base, *adapters, "--as-adapter"], [base, *adapters]):
        result = say("merge", *arguments, "--out", tmp_path / "out")
        assert result.status == 1 and message in result.err, result.err


def test_factors_in_one_adapter_and_a_full_tensor_in_another(say, tmp_path, base, adapters):
    name = MLP[0]
    full = tensors(adapters[1] / "adapter_model.safetensors")
    full[f"{START}{name}.weight"] = weights(SHAPES, 1)[f"{name}.weight"]
    config = json.loads((adapters[1] / "adapter_config.json").read_text())
    adapter(adapters[1], full, **(config | {"modules_to_save": ["down_proj"]}))
    for models in ([base, *adapters], ["--no-base", *adapters]):
        result = say("merge", *models, "--as-adapter", "--out", tmp_path / "out")
        assert f"{name}.weight has factors in one adapter and is trained in full" in result.err


def test_only_full_tensors_are_left(say, tmp_path, base, full):
    include = ["--include", "*norm*", "--include", "*.bias"]
    result = say("merge", base, *full, "--as-adapter", *include, "--out", tmp_path / "out")
    assert "no tensor with factors is left" in result.err


def test_configs_must_agree(say, tmp_path, base, adapters):
    out = ["--as-adapter", "--overwrite", "--out", tmp_path / "out"]
    edited(adapters[1], base_model_name_or_path="org/other")
    result = say("merge", "--no-base", *adapters, *out)
    assert "the adapters have different bases: 'base' in" in result.err
    run(say, base, *adapters, *out)
    run(say, "--no-base", *adapters, "--config-from", "model:2", *out)
    assert written(tmp_path / "out")[1]["base_model_name_or_path"] == "org/other"
    assert 'base_model: "org/other"' in (tmp_path / "out" / "README.md").read_text()
    edited(adapters[2], task_type="SEQ_CLS")
    result = say("merge", base, *adapters, *out)
    assert "task_type differs between the adapters (CAUSAL_LM, SEQ_CLS)" in result.err
    edited(adapters[1], base_model_name_or_path="org/base")
    edited(adapters[2], task_type="CAUSAL_LM")
    result = run(say, "--no-base", *adapters, *out)
    assert any("name their base differently (base, org/base)" in note for note in result.notes)
    edited(adapters[2], task_type="CAUSAL_LM", megatron_core="other")
    result = run(say, base, *adapters, *out)
    assert any("megatron_core of adapter_config.json" in note for note in result.notes)


def test_names_with_other_prefixes(say, tmp_path, base, adapters):
    """With BASE they get its names; without it the names must be equal."""
    values = tensors(adapters[1] / "adapter_model.safetensors")
    renamed = {name.replace("model.model.", "model.", 1): x for name, x in values.items()}
    adapter(adapters[1], renamed, **json.loads((adapters[1] / "adapter_config.json").read_text()))
    assert_equals_complete_merge(say, tmp_path, base, adapters[:2])
    assert all(name.startswith(f"{START}model.") for name in written(tmp_path / "out")[0])
    out = ["--as-adapter", "--overwrite", "--out", tmp_path / "out"]
    result = say("merge", "--no-base", *adapters, *out)
    assert "have different names for tensors" in result.err and "pass BASE" in result.err
    # The second adapter is the only one with some tensors: no adapter names all of them.
    result = say("merge", base, adapters[2], adapters[1], *out)
    assert "names modules differently" in result.err


def test_layouts_and_shapes_must_agree(say, tmp_path, adapters):
    out = ["--no-base", *adapters, "--as-adapter", "--out", tmp_path / "out"]
    edited(adapters[1], fan_in_fan_out=True)
    result = say("merge", *out)
    assert "fan_in_fan_out differs between the adapters" in result.err
    edited(adapters[1], fan_in_fan_out=False)
    values = tensors(adapters[1] / "adapter_model.safetensors")
    values[f"{START}{ATTENTION[0]}.lora_A.weight"] = np.ones((4, 17), np.float32)
    adapter(adapters[1], values, **json.loads((adapters[1] / "adapter_config.json").read_text()))
    result = say("merge", *out)
    assert f"{ATTENTION[0]}.weight differs in shape" in result.err and "[16, 17]" in result.err


def test_full_tensors_that_need_the_base(say, tmp_path, full):
    common = ["--as-adapter", "--out", tmp_path / "out"]
    result = say("merge", "--no-base", *full[:2], *common)
    assert "lm_head.weight is stored in full by an adapter and needs the base" in result.err
    result = say("merge", "--no-base", *full, "--method", "uniform-mean", *common)
    assert "lm_head.weight" in result.err and "not by all of them" in result.err
    assert "input_layernorm" not in result.err  # All three have it.


@pytest.mark.parametrize("unit", ["tensor", "filter"])
def test_non_finite_factors(say, tmp_path, adapters, unit):
    values = tensors(adapters[1] / "adapter_model.safetensors")
    stored = f"{START}{ATTENTION[0]}.lora_B.weight"
    values[stored][1, 2] = np.nan
    adapter(adapters[1], values, **json.loads((adapters[1] / "adapter_config.json").read_text()))
    common = ["--no-base", *adapters, "--unit", unit, "--as-adapter", "--out", tmp_path / "out"]
    result = say("merge", *common)
    assert f"{adapters[1]}: tensor {stored!r} contains NaN or infinity" in result.err
    assert f"--exclude '{ATTENTION[0]}.weight'" in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a1", "a2", "a3"]
    run(say, *common, "--exclude", f"{ATTENTION[0]}.weight")


def test_blocks_without_names_of_their_attention(say, tmp_path, base):
    paths = [adapter(tmp_path / f"a{i}", factors(MLP + [Q0], 3, i)) for i in (1, 2)]
    common = [*paths, "--unit", "block", "--as-adapter", "--out", tmp_path / "out"]
    result = say("merge", "--no-base", *common)
    assert f"the block of {MLP[1]}.weight is unknown" in result.err
    run(say, base, *common)


def test_dry_run_json_and_unchanged_inputs(say, tmp_path, base, adapters):
    before = {p: p.read_bytes() for path in (base, *adapters) for p in path.rglob("*.*")}
    arguments = [base, *adapters, "--as-adapter", "--out", tmp_path / "out"]
    result = run(say, *arguments, "--dry-run")
    assert "11 merged" in result.out and "adapter 3" in result.out
    plan = json.loads(run(say, *arguments, "--dry-run", "--json").out)
    assert plan["files"].keys() == {"adapter_model.safetensors"}
    assert not (tmp_path / "out").exists()
    document = json.loads(run(say, *arguments, "--json").out)
    assert document["adapter"]["rank"] == {"min": 3, "max": 9}
    assert document["adapter"]["base_model"] == "base"
    result = say("merge", *arguments)
    assert "exists already" in result.err
    run(say, *arguments, "--overwrite")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "merge_report.json", "README.md",
        "angles.png",
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'library_name: "peft"' in card and "3 adapters of `" in card
    assert "base_model_relation" in card and "--as-adapter" in card
    assert before == {p: p.read_bytes() for p in before}


def test_recipes(say, tmp_path, base, adapters):
    text = f"merge_method: model_stock\nbase_model: {base}\nmodels:\n"
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text + "".join(f"- model: {base}+{path}\n" for path in adapters))
    run(say, recipe, "--as-adapter", "--out", tmp_path / "out")
    run(say, base, *adapters, "--as-adapter", "--out", tmp_path / "typed")
    first, second = (tmp_path / n / "adapter_model.safetensors" for n in ("out", "typed"))
    assert first.read_bytes() == second.read_bytes()
    # Without base_model, the base is that of all models.
    models = "".join(f"- model: {base}+{path}\n  parameters: {{weight: 1}}\n" for path in adapters)
    recipe.write_text(f"merge_method: linear\nmodels:\n{models}")
    run(say, recipe, "--as-adapter", "--out", tmp_path / "linear")
    models = models.replace("weight: 1", "weight: [1, 2]")
    recipe.write_text(f"merge_method: linear\nmodels:\n{models}")
    result = say("merge", recipe, "--as-adapter", "--out", tmp_path / "more")
    assert "--as-adapter does not support values that differ by layer or filter" in result.err


def test_tokenizer_files_of_the_adapters(say, tmp_path, adapters):
    for path, template in ((adapters[1], "one"), (adapters[2], "two")):
        (path / "tokenizer_config.json").write_text("{}")
        (path / "chat_template.jinja").write_text(template)
    (adapters[2] / "tokenizer_config.json").write_text('{"x": 1}')
    common = ["--no-base", *adapters, "--as-adapter"]
    result = run(say, *common, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "one"
    assert any("tokenizer_config.json" in note for note in result.notes)
    run(say, *common, "--tokenizer-from", "model:3", "--out", tmp_path / "third")
    assert (tmp_path / "third" / "chat_template.jinja").read_text() == "two"
    result = say("merge", *common, "--tokenizer-from", "model:1", "--out", tmp_path / "no")
    assert "no adapter with tokenizer files" in result.err


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_attentions_whose_keys_have_no_factors(say, tmp_path, unit):
    """BERT's names are those of an attention only if query, key and value all exist."""
    layer = "encoder.layer.0."
    names = [f"{layer}attention.self.{part}" for part in ("query", "key", "value")]
    names.append(f"{layer}output.dense")
    base = save(tmp_path / "base", weights({f"{name}.weight": (8, 8) for name in names}))
    rng = np.random.default_rng(0)
    paths = []
    for i in (1, 2):
        values = {
            f"{START}{name}.lora_{side}.weight": rng.random(shape).astype(np.float32)
            for name in (names[0], *names[2:]) for side, shape in (("A", (2, 8)), ("B", (8, 2)))
        }  # fmt: skip
        paths.append(adapter(tmp_path / f"a{i}", values, r=2))
    assert_equals_complete_merge(say, tmp_path, base, paths, "--unit", unit)
    run(say, "--no-base", *paths, "--unit", unit, "--as-adapter", "--out", tmp_path / "without")
    first, second = (tmp_path / n / "adapter_model.safetensors" for n in ("out", "without"))
    assert first.read_bytes() == second.read_bytes()
    keys = [row["unit"] for row in report(tmp_path / "without")["units"]]
    assert len(set(keys)) == {"layer": 2, "block": 1}[unit]
