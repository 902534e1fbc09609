"""Plans: sizes, files and notes known before tensors are read, and all problems in one error."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.executor import run
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.plan import make_plan
from modelstock_jax.checkpoint_merge.sources import open_source
from modelstock_jax.errors import UserError
from tests.checkpoint_merge.engine import SHAPES, merge, models, numbers, plan, save, total

TIED = {"model_type": "llama", "tie_word_embeddings": True}
UNTIED = {"model_type": "llama", "tie_word_embeddings": False}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_the_default_is_one_thread_per_core_on_any_system(monkeypatch):
    assert Options().num_threads == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert Options().num_threads == os.cpu_count()


def test_a_plan_counts_bytes_files_and_tensors(tmp_path):
    planned = plan(save(tmp_path, models()), max_shard_bytes=3000)
    size = 4 * total()
    assert (planned.bytes_read, planned.bytes_written) == (2 * 3 * size, size)
    assert (
        sorted(n for shard in planned.shards for n in shard)
        == sorted(SHAPES)
        == list(planned.tensors)
    )
    assert all(sum(planned.tensors[n].num_bytes for n in shard) <= 3000 for shard in planned.shards)
    assert planned.files[0] == f"model-00001-of-{len(planned.shards):05d}.safetensors"
    assert {t.action for t in planned.tensors.values()} == {"merge"} and planned.notes == ()
    assert plan(save(tmp_path, models())).files == ("model.safetensors",)


def test_a_unit_that_joins_nothing_is_a_note(tmp_path):
    paths = save(tmp_path, models())
    attentions = plan(paths, unit="layer")
    assert not any("'layer'" in note for note in attentions.notes)
    without = [{n: x for n, x in m.items() if "attn" not in n} for m in models()]
    (note,) = plan(save(tmp_path, without), unit="layer").notes
    assert note.startswith("unit 'layer' found no attention") and "\n" not in note


def test_the_checksum_of_a_plan_depends_on_inputs_and_options(tmp_path):
    paths = save(tmp_path, models())
    checksums = {
        plan(paths).checksum,
        plan(paths, unit="filter").checksum,
        plan(paths[:2] + [paths[2]] * 2).checksum,
        plan([paths[1], paths[0], paths[2]]).checksum,
    }
    assert len(checksums) == 4
    assert plan(paths, threads=1, window_bytes=5).checksum in checksums
    save(tmp_path, models(seed=1))
    assert plan(paths).checksum not in checksums


def test_all_problems_are_in_one_error(tmp_path):
    base, first, second = (dict(m) for m in models())
    del first["model.norm.weight"], first["logit_scale"]
    second["extra.weight"] = np.zeros(2, np.float32)
    second["patch.conv.weight"] = np.zeros((6, 3, 2, 3), np.float32)
    with pytest.raises(UserError) as caught:
        plan(save(tmp_path, [base, first, second]))
    message = str(caught.value)
    assert re.search(
        "logit_scale, model.norm.weight are missing in .*ft1 .*--missing-tensors base copies them",
        message,
    )
    assert re.search("extra.weight is in .*ft2 .*base .*--missing-tensors base leaves it", message)
    assert "patch.conv.weight " in message and "[6, 3, 2, 3]" in message
    assert "--exclude 'patch.conv.weight'" in message
    assert "\n" not in message


def test_a_comparison_leaves_out_tensors_of_other_shapes(tmp_path):
    base, first, second = (dict(m) for m in models())
    second["model.norm.weight"] = np.zeros(3, np.float32)
    sources = [open_source(str(path)) for path in save(tmp_path, [base, first, second])]
    planned = make_plan(sources[0], sources[1:], Options(), lenient=True)
    (note,) = [note for note in planned.notes if "model.norm.weight " in note]
    assert note.endswith("; it is left out") and "[3]" in note


def test_missing_tensors_may_come_from_the_base(tmp_path):
    base, first, second = (dict(m) for m in models())
    del first["model.norm.weight"]
    second["extra.weight"] = np.zeros(2, np.float32)
    out, report = merge(tmp_path, [base, first, second], missing_tensors="base")
    assert sorted(out) == sorted(SHAPES)
    np.testing.assert_array_equal(out["model.norm.weight"], base["model.norm.weight"])
    planned = plan([tmp_path / n for n in ("base", "ft1", "ft2")], missing_tensors="base")
    assert "ft1 lacks it" in planned.tensors["model.norm.weight"].reason
    percent = 100 * 16 / total()
    assert (
        len(planned.notes) == 2
        and f"ft1 lacks model.norm.weight: {percent:.2g} %" in planned.notes[0]
    )
    assert "extra.weight of" in planned.notes[1] and "left out" in planned.notes[1]


@pytest.mark.parametrize(
    ("wrong", "pattern"),
    [
        ({"method": "stok"}, "--method: 'stok' .*stock, "),
        ({"method": "stock"}, "--method: 'stock' .*'model-stock'"),
        ({"unit": "row"}, "--unit: 'row' .*tensor, "),
        ({"dtype": "int8"}, "--dtype: 'int8' .*float64, "),
        ({"head": "refuse"}, "--head: 'refuse' .*'error'"),
        ({"alpha": 0.5}, "--alpha .*model-stock.* wise-ft"),
        ({"method": "wise_ft"}, "wise-ft .*--alpha"),
        ({"method": "wise_ft", "alpha": 1.5}, r"--alpha: .*\[0, 1\].* 1.5"),
        ({"method": "slerp", "t": {"w": 2.0}}, r"--t: .*\[0, 1\].* 2.0"),
        ({"method": "ties", "density": 0}, r"--density: .*\(0, 1\].* 0"),
        ({"method": "ties", "density": (0.5, 2)}, r"--density: .*\[0, 1\].* 2"),
        ({"method": "linear", "weights": (1, float("nan"))}, "--weights: .*nan"),
        ({"unmerged_from": "model:0"}, "--unmerged-from: .*base, mean or model:1"),
        ({"max_shard_bytes": 0}, "--max-shard-size: .*1"),
        ({"num_heads": 4}, "--num-heads .*--unit head"),
        ({"unit": "filter", "num_heads": 4}, "--num-heads .*--unit head"),
        ({"method": "ties", "anchor_rounding": "correct"}, "--anchor-rounding .*model-stock"),
    ],
)
def test_invalid_options(wrong, pattern):
    with pytest.raises(UserError, match=pattern):
        Options(**wrong)


@pytest.mark.parametrize(
    ("wrong", "pattern"),
    [
        ({"method": "slerp", "t": 0.5}, "slerp .*1 .*2 .*3"),
        ({"method": "linear", "weights": (1, 2)}, "weights .*2 .*3"),
        ({"method": "linear", "weights": (1, -2, 1)}, "weights .* 0"),
        ({"unmerged_from": "model:4"}, "--unmerged-from .*model:4.*:3"),
        ({"include": ("nothing.*",)}, "--include"),
        ({"unit": "head"}, "'head' .*num_heads"),
    ],
)
def test_options_that_do_not_fit_the_models(tmp_path, wrong, pattern):
    with pytest.raises(UserError, match=pattern):
        plan(save(tmp_path, models(number=3)), **wrong)


def test_one_fine_tune_is_too_few_for_an_angle(tmp_path):
    with pytest.raises(UserError, match="model-stock .*2 or more .*1"):
        plan(save(tmp_path, models(number=1)))


@pytest.mark.parametrize(
    ("unmerged_from", "expected"),
    [
        ("base", lambda g, n: g[0][n]),
        ("mean", lambda g, n: (numbers(g[1][n]) + numbers(g[2][n])) / 2),
        ("model:2", lambda g, n: g[2][n]),
    ],
)
def test_patterns(tmp_path, unmerged_from, expected):
    tensors = models()
    out, report = merge(
        tmp_path,
        tensors,
        include=("model.*",),
        exclude=("*.k_proj.*", "*norm*"),
        unmerged_from=unmerged_from,
    )
    left = {n for n in SHAPES if not n.startswith("model.") or "k_proj" in n or "norm" in n}
    assert {row["name"] for row in report.rows} == set(SHAPES) - left
    for name in left:
        np.testing.assert_array_equal(out[name], expected(tensors, name).astype(np.float32))


def heads(tied_base, tied_first, equal=True):
    """Return a base and two fine-tunes; the base and the first fine-tune may tie their heads."""
    rng = np.random.default_rng(3)
    tensors = [dict(m) for m in models({EMBEDDING: (10, 4)})]
    for model, tied in zip(tensors, (tied_base, tied_first, tied_base), strict=True):
        if not tied:
            model[HEAD] = model[EMBEDDING].copy()
            if not equal:
                model[HEAD] += rng.standard_normal((10, 4)).astype(np.float32)
    return tensors


def test_a_tied_head_stays_tied_if_a_fine_tune_stores_an_equal_head(tmp_path):
    paths = save(tmp_path, heads(True, False), [TIED, UNTIED, TIED])
    planned = plan(paths)
    assert list(planned.tensors) == [EMBEDDING] and planned.auxiliary_files.changes == {}
    assert re.search(f"{HEAD}: .*tied to {EMBEDDING}", planned.notes[0])


def test_a_separately_trained_head_is_an_error_or_untied(tmp_path):
    tensors = heads(True, False, equal=False)
    paths = save(tmp_path, tensors, [TIED, UNTIED, TIED])
    with pytest.raises(UserError, match="lm_head.weight .*ft1 .*--tied-head untie"):
        plan(paths)
    planned = plan(paths, tied_head="untie")
    assert planned.tensors[HEAD].names == (EMBEDDING, HEAD, EMBEDDING)
    report = run(planned, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert {row["name"] for row in report.rows} == {EMBEDDING, HEAD}


def test_a_fine_tune_without_the_head_of_an_untied_base(tmp_path):
    tensors = heads(False, True, equal=False)
    planned = plan(save(tmp_path, tensors, [UNTIED, TIED, UNTIED]))
    assert (
        planned.tensors[HEAD].names == (HEAD, EMBEDDING, HEAD)
        and planned.auxiliary_files.changes == {}
    )
    assert "model.embed_tokens.weight" in planned.notes[0]
    with pytest.raises(UserError, match="lm_head.weight is missing in .*ft1 "):
        plan(save(tmp_path, tensors, [UNTIED, UNTIED, UNTIED]))


def vocabularies(base, first, second):
    tensors = models({EMBEDDING: (12, 4), "w": (3, 3)})
    return [
        {**m, EMBEDDING: m[EMBEDDING][:rows]}
        for m, rows in zip(tensors, (base, first, second), strict=True)
    ]


@pytest.mark.parametrize(
    ("rows", "vocab_mismatch", "length", "rest"),
    [
        ((10, 12, 11), "base", 10, None),
        ((10, 12, 11), "longest", 12, 1),
        ((12, 10, 12), "base", 12, 0),
        ((12, 10, 12), "longest", 12, 0),
        ((10, 11, 8), "base", 10, 0),
    ],
)
def test_rows_in_common(tmp_path, rows, vocab_mismatch, length, rest):
    tensors = vocabularies(*rows)
    paths = save(tmp_path, tensors, [{"vocab_size": n} for n in rows])
    with pytest.raises(UserError, match="model.embed_tokens.weight .*--vocab-mismatch base"):
        plan(paths)
    planned = plan(paths, vocab_mismatch=vocab_mismatch)
    run(planned, tmp_path / "out")
    out, common = tmp_path / "out", min(rows)
    from modelstock_jax.tensor_files.reader import TensorFiles

    merged = TensorFiles(out)[EMBEDDING]
    cut = [{**m, EMBEDDING: m[EMBEDDING][:common]} for m in tensors]
    alone, _ = merge(tmp_path / "cut", cut)
    np.testing.assert_array_equal(merged[:common], alone[EMBEDDING])
    assert len(merged) == length
    if rest is not None:
        np.testing.assert_array_equal(merged[common:], tensors[rest][EMBEDDING][common:])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == length
    assert re.search(f" {common} (common )?rows ", planned.notes[0])


def test_equal_integers_are_copied_and_others_are_an_error(tmp_path):
    tensors = [dict(m, lengths=np.arange(5), flags=np.array([True, False])) for m in models()]
    out, report = merge(tmp_path, tensors)
    np.testing.assert_array_equal(out["lengths"], np.arange(5))
    assert out.dtype("flags") == np.bool_ and "flags" not in {r["name"] for r in report.rows}
    tensors[1]["lengths"] = np.arange(5)[::-1].copy()
    with pytest.raises(UserError, match="lengths .*I64 .*mean.*--exclude 'lengths'"):
        merge(tmp_path / "other", tensors)
    out, _ = merge(tmp_path / "excluded", tensors, exclude=("lengths",), unmerged_from="model:1")
    np.testing.assert_array_equal(out["lengths"], tensors[1]["lengths"])
    tensors[1]["lengths"] = np.arange(5).astype(np.float32)
    with pytest.raises(UserError, match="lengths .*I64 .*/base, .*/ft2 "):
        merge(tmp_path / "third", tensors)


def test_a_buffer_that_some_models_lack_is_not_a_problem(tmp_path):
    tensors = [dict(m) for m in models()]
    tensors[1]["model.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    out, _ = merge(tmp_path, tensors)
    assert sorted(out) == sorted(SHAPES)


def test_empty_tensors_are_copied(tmp_path):
    tensors = [dict(m, none=np.zeros((0, 4), np.float32)) for m in models()]
    assert merge(tmp_path, tensors)[0]["none"].shape == (0, 4)
