"""What a plan says before anything is read, and what it refuses, all at once."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.executor import run
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.errors import UserError
from tests.checkpoint_merge.engine import SHAPES, merge, models, numbers, plan, save, total

TIED = {"model_type": "llama", "tie_word_embeddings": True}
UNTIED = {"model_type": "llama", "tie_word_embeddings": False}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_threads_are_the_cores_on_any_system(monkeypatch):
    assert Options().num_threads == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert Options().num_threads == os.cpu_count()


def test_a_plan_counts_bytes_files_and_tensors(tmp_path):
    made = plan(save(tmp_path, models()), max_shard_bytes=3000)
    size = 4 * total()
    assert (made.bytes_read, made.bytes_written) == (2 * 3 * size, size)
    assert sorted(n for shard in made.shards for n in shard) == sorted(SHAPES) == list(made.tensors)
    assert all(sum(made.tensors[n].num_bytes for n in shard) <= 3000 for shard in made.shards)
    assert made.files[0] == f"model-00001-of-{len(made.shards):05d}.safetensors"
    assert {t.action for t in made.tensors.values()} == {"merge"} and made.notes == ()
    assert plan(save(tmp_path, models())).files == ("model.safetensors",)


def test_the_fingerprint_follows_inputs_and_options(tmp_path):
    places = save(tmp_path, models())
    seen = {
        plan(places).checksum,
        plan(places, unit="filter").checksum,
        plan(places[:2] + [places[2]] * 2).checksum,
        plan([places[1], places[0], places[2]]).checksum,
    }
    assert len(seen) == 4
    assert plan(places, threads=1, window_bytes=5).checksum in seen
    save(tmp_path, models(seed=1))
    assert plan(places).checksum not in seen


def test_all_problems_at_once(tmp_path):
    base, first, second = (dict(m) for m in models())
    del first["model.norm.weight"], first["logit_scale"]
    second["extra.weight"] = np.zeros(2, np.float32)
    second["patch.conv.weight"] = np.zeros((6, 3, 2, 3), np.float32)
    with pytest.raises(UserError) as caught:
        plan(save(tmp_path, [base, first, second]))
    said = str(caught.value)
    assert re.search("ft1 .*logit_scale, model.norm.weight .*--missing base", said)
    assert re.search("base .*ft2 .*extra.weight .*--missing base", said)
    assert "patch.conv.weight " in said and "[6, 3, 2, 3]" in said
    assert "\n" not in said


def test_missing_tensors_may_come_from_the_base(tmp_path):
    base, first, second = (dict(m) for m in models())
    del first["model.norm.weight"]
    second["extra.weight"] = np.zeros(2, np.float32)
    out, report = merge(tmp_path, [base, first, second], missing_tensors="base")
    assert sorted(out) == sorted(SHAPES)
    np.testing.assert_array_equal(out["model.norm.weight"], base["model.norm.weight"])
    made = plan([tmp_path / n for n in ("base", "ft1", "ft2")], missing_tensors="base")
    assert "ft1 lacks it" in made.tensors["model.norm.weight"].reason
    share = 100 * 16 / total()
    assert len(made.notes) == 2 and f"ft1 lacks model.norm.weight: {share:.2g} %" in made.notes[0]
    assert "extra.weight of" in made.notes[1] and "left out" in made.notes[1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "stok"}, "'stok' .*stock, "),
        ({"unit": "row"}, "'row' .*tensor, "),
        ({"dtype": "int8"}, "'int8' .*float64, "),
        ({"alpha": 0.5}, "'model_stock' .*alpha"),
        ({"method": "wise_ft"}, "'wise-ft' .*alpha"),
        ({"method": "wise_ft", "alpha": 1.5}, r"alpha .*\[0, 1\].* 1.5"),
        ({"method": "slerp", "t": {"w": 2.0}}, r"t .*\[0, 1\].* 2.0"),
        ({"method": "ties", "density": 0}, r"density .*\(0, 1\].* 0"),
        ({"method": "ties", "density": (0.5, 2)}, r"density .*\(0, 1\].* 2"),
        ({"method": "linear", "weights": (1, float("nan"))}, "weights .*nan"),
        ({"unmerged_from": "model:0"}, "unmerged.from .*base, mean or model:1"),
        ({"max_shard_bytes": 0}, "max_shard_bytes .*1"),
    ],
)
def test_options_that_mean_nothing(wrong, said):
    with pytest.raises(UserError, match=said):
        Options(**wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "slerp", "t": 0.5}, "'slerp' .*1 .*2 .*3"),
        ({"method": "linear", "weights": (1, 2)}, "2 weights .*3"),
        ({"method": "linear", "weights": (1, -2, 1)}, "weights .* 0"),
        ({"unmerged_from": "model:4"}, "unmerged.from .*model:4.* 3"),
        ({"include": ("nothing.*",)}, "--include"),
        ({"unit": "head"}, "'head' .*num_heads"),
    ],
)
def test_options_that_do_not_fit_the_models(tmp_path, wrong, said):
    with pytest.raises(UserError, match=said):
        plan(save(tmp_path, models(number=3)), **wrong)


def test_one_fine_tune_is_too_few_for_an_angle(tmp_path):
    with pytest.raises(UserError, match="'model_stock' .*2 or more .*1"):
        plan(save(tmp_path, models(number=1)))


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [
        ("base", lambda g, n: g[0][n]),
        ("mean", lambda g, n: (numbers(g[1][n]) + numbers(g[2][n])) / 2),
        ("model:2", lambda g, n: g[2][n]),
    ],
)
def test_patterns(tmp_path, excluded, expected):
    given = models()
    out, report = merge(
        tmp_path,
        given,
        include=("model.*",),
        exclude=("*.k_proj.*", "*norm*"),
        unmerged_from=excluded,
    )
    left = {n for n in SHAPES if not n.startswith("model.") or "k_proj" in n or "norm" in n}
    assert {row["name"] for row in report.rows} == set(SHAPES) - left
    for name in left:
        np.testing.assert_array_equal(out[name], expected(given, name).astype(np.float32))


def heads(tied_base, tied_first, equal=True):
    """A base, a fine-tune that may tie its head or store it, and one that stores it."""
    rng = np.random.default_rng(3)
    given = [dict(m) for m in models({EMBEDDING: (10, 4)})]
    for model, tied in zip(given, (tied_base, tied_first, tied_base), strict=True):
        if not tied:
            model[HEAD] = model[EMBEDDING].copy()
            if not equal:
                model[HEAD] += rng.standard_normal((10, 4)).astype(np.float32)
    return given


def test_a_tied_head_stays_tied_where_a_fine_tune_stores_it_equal(tmp_path):
    places = save(tmp_path, heads(True, False), [TIED, UNTIED, TIED])
    made = plan(places)
    assert list(made.tensors) == [EMBEDDING] and made.auxiliary_files.changes == {}
    assert f"{HEAD}: kept tied to {EMBEDDING}" in made.notes[0]


def test_a_fine_tune_that_trained_its_head_is_refused_or_untied(tmp_path):
    given = heads(True, False, equal=False)
    places = save(tmp_path, given, [TIED, UNTIED, TIED])
    with pytest.raises(UserError, match="lm_head.weight .*ft1 .*--tied untie"):
        plan(places)
    made = plan(places, tied_head="untie")
    assert made.tensors[HEAD].names == (EMBEDDING, HEAD, EMBEDDING)
    report = run(made, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert {row["name"] for row in report.rows} == {EMBEDDING, HEAD}


def test_a_fine_tune_without_the_head_of_an_untied_base(tmp_path):
    given = heads(False, True, equal=False)
    made = plan(save(tmp_path, given, [UNTIED, TIED, UNTIED]))
    assert (
        made.tensors[HEAD].names == (HEAD, EMBEDDING, HEAD) and made.auxiliary_files.changes == {}
    )
    assert "model.embed_tokens.weight" in made.notes[0]
    with pytest.raises(UserError, match="ft1 .*lm_head.weight"):
        plan(save(tmp_path, given, [UNTIED, UNTIED, UNTIED]))


def vocabularies(base, first, second):
    given = models({EMBEDDING: (12, 4), "w": (3, 3)})
    return [
        {**m, EMBEDDING: m[EMBEDDING][:rows]}
        for m, rows in zip(given, (base, first, second), strict=True)
    ]


@pytest.mark.parametrize(
    ("rows", "vocabulary", "length", "rest"),
    [
        ((10, 12, 11), "base", 10, None),
        ((10, 12, 11), "longest", 12, 1),
        ((12, 10, 12), "base", 12, 0),
        ((12, 10, 12), "longest", 12, 0),
        ((10, 11, 8), "base", 10, 0),
    ],
)
def test_rows_in_common(tmp_path, rows, vocabulary, length, rest):
    given = vocabularies(*rows)
    places = save(tmp_path, given, [{"vocab_size": n} for n in rows])
    with pytest.raises(UserError, match="model.embed_tokens.weight .*--vocabulary base"):
        plan(places)
    made = plan(places, vocab_mismatch=vocabulary)
    run(made, tmp_path / "out")
    out, common = tmp_path / "out", min(rows)
    from modelstock_jax.tensor_files.reader import TensorFiles

    merged = TensorFiles(out)[EMBEDDING]
    cut = [{**m, EMBEDDING: m[EMBEDDING][:common]} for m in given]
    alone, _ = merge(tmp_path / "cut", cut)
    np.testing.assert_array_equal(merged[:common], alone[EMBEDDING])
    assert len(merged) == length
    if rest is not None:
        np.testing.assert_array_equal(merged[common:], given[rest][EMBEDDING][common:])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == length
    assert f" {common} rows " in made.notes[0]


def test_integers_that_agree_are_copied_and_others_refused(tmp_path):
    given = [dict(m, lengths=np.arange(5), flags=np.array([True, False])) for m in models()]
    out, report = merge(tmp_path, given)
    np.testing.assert_array_equal(out["lengths"], np.arange(5))
    assert out.dtype("flags") == np.bool_ and "flags" not in {r["name"] for r in report.rows}
    given[1]["lengths"] = np.arange(5)[::-1].copy()
    with pytest.raises(UserError, match="lengths .*I64 .*mean.*--exclude 'lengths'"):
        merge(tmp_path / "other", given)
    out, _ = merge(tmp_path / "excluded", given, exclude=("lengths",), unmerged_from="model:1")
    np.testing.assert_array_equal(out["lengths"], given[1]["lengths"])
    given[1]["lengths"] = np.arange(5).astype(np.float32)
    with pytest.raises(UserError, match="lengths .*I64 .*/base, .*/ft2 "):
        merge(tmp_path / "third", given)


def test_a_buffer_that_some_models_lack_is_no_problem(tmp_path):
    given = [dict(m) for m in models()]
    given[1]["model.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    out, _ = merge(tmp_path, given)
    assert sorted(out) == sorted(SHAPES)


def test_empty_tensors_stay(tmp_path):
    given = [dict(m, none=np.zeros((0, 4), np.float32)) for m in models()]
    assert merge(tmp_path, given)[0]["none"].shape == (0, 4)
