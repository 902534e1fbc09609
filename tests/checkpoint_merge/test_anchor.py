"""Check that the base is the anchor: stored coarser, not the first model, or unrelated."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_directory_tensors
from tests.checkpoint_merge.engine import deltas
from tests.checkpoint_merge.small import adapter, factors

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
SHAPES = {f"layers.{i}.mlp.{n}.weight": (96, 96) for i in range(3) for n in ("up", "down")}
SHAPES |= {f"layers.{i}.norm.weight": (96,) for i in range(3)}
SHAPES["classifier.weight"] = (10, 96)
COSINE, RATIO = 0.3, 0.46  # Of the task vectors: t = 2 cos / (1 + cos).


def trained(base, size, cosine, number=2, seed=1):
    """Return fine-tunes whose task vectors have relative norm `size` and cosine `cosine`."""
    rng = np.random.default_rng(seed)
    common = {n: rng.standard_normal(w.shape) for n, w in base.items()}
    return [
        {
            n: (
                w
                + size
                * np.sqrt(np.mean(w**2))
                * (cosine**0.5 * common[n] + (1 - cosine) ** 0.5 * rng.standard_normal(w.shape))
            )
            for n, w in base.items()
        }
        for _ in range(number)
    ]


def original(seed=0):
    """Return a base that was never rounded, in float64."""
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s) / 8 for n, s in SHAPES.items()}


def cast(model, dtype):
    return {n: w.astype(dtype) for n, w in model.items()}


def save(root, models):
    paths = []
    for k, model in enumerate(models):
        path = root / str(k)
        path.mkdir(parents=True)
        write_directory_tensors(path, model)
        paths.append(path)
    return paths


def run(paths, out, *options):
    return main(["merge", *map(str, paths), "--out", str(out), *options])


def report(out):
    return json.loads((out / "merge_report.json").read_text())


def median_ratio(document):
    return float(np.median([u["ratio"] for u in document["units"] if len(u["shape"]) == 2]))


@pytest.mark.parametrize("dtype", [BF16, np.float16])
def test_a_base_rounded_after_the_training(tmp_path, capsys, dtype):
    """Its rounding error is common to all task vectors and makes the ratio far too high."""
    base = original()
    # Updates of a third of the rounding error: that of bfloat16 is 2^-9 of a weight on average.
    size = {BF16: 1.0e-3, np.float16: 1.25e-4}[dtype]
    tuned = [cast(m, np.float32) for m in trained(base, size, COSINE)]
    paths = save(tmp_path, [cast(base, dtype), *tuned])
    assert run(paths, tmp_path / "raw") == 0
    err = capsys.readouterr().err
    assert "--anchor-rounding correct" in err
    assert median_ratio(report(tmp_path / "raw")) > 0.8
    assert run(paths, tmp_path / "out", "--anchor-rounding", "correct") == 0
    found = report(tmp_path / "out")
    # 9,216 elements: the cosine's standard error is 0.01, and |e|^2 is known to 1.5 %.
    assert abs(median_ratio(found) - RATIO) < 0.06
    assert found["anchor_rounding"]["exact"] is False
    assert abs(found["anchor_rounding"]["corrected_ratio"] - RATIO) < 0.06
    assert found["options"]["anchor_rounding"] == "correct"


def test_the_median_ratio_leaves_out_kernels_without_an_angle(tmp_path):
    base = original()
    tuned = [cast(m, np.float32) for m in trained(base, 1.0e-3, COSINE)]
    paths = save(tmp_path / "all", [cast(base, BF16), *tuned])
    assert run(paths, tmp_path / "out") == 0
    ratio = report(tmp_path / "out")["anchor_rounding"]["ratio"]
    frozen = cast(cast(base, BF16), np.float32)
    names = [name for name, shape in SHAPES.items() if len(shape) == 2]
    for model in tuned:
        for name in names[1:]:  # most kernels unchanged: an undefined cosine is not a cosine of 1
            model[name] = frozen[name]
    paths = save(tmp_path / "most", [cast(base, BF16), *tuned])
    assert run(paths, tmp_path / "one") == 0
    found = report(tmp_path / "one")["anchor_rounding"]
    assert abs(found["ratio"] - ratio) < 0.05 and ratio < 0.95


def test_the_correction_is_the_known_energy(tmp_path):
    """The float64 reference: G - sum (half ulp)^2 / 3, equation 3, and the same sum of models."""
    base = original()
    tuned = [cast(m, np.float32) for m in trained(base, 3e-3, 0.6)]
    models = [cast(base, BF16), *tuned]
    paths = save(tmp_path, models)
    assert run(paths, tmp_path / "out", "--anchor-rounding", "correct", "--dtype", "float32") == 0
    rows = {u["name"]: u for u in report(tmp_path / "out")["units"]}
    merged = TensorFiles(tmp_path / "out")
    for name in SHAPES:
        w0, d = models[0][name].astype(np.float64), deltas(models, name)
        half = 2.0 ** (np.floor(np.log2(np.abs(w0))) - 8)
        gram = d @ d.T - (half**2).sum() / 3
        cosine = gram[0, 1] / np.sqrt(gram[0, 0] * gram[1, 1])
        ratio = max(0.0, 2 * cosine / (1 + cosine))
        assert abs(rows[name]["ratio"] - ratio) < 1e-6
        expected = w0 + ratio * d.mean(axis=0).reshape(w0.shape)
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("cosine", [0.1, 0.3, 0.6])
def test_a_base_that_training_started_from_is_exact(tmp_path, capsys, cosine):
    """A bfloat16 model trained in float32: the plain ratio is right, a correction is wrong."""
    base = cast(original(), BF16)
    wide = {n: w.astype(np.float64) for n, w in base.items()}
    paths = save(tmp_path, [base, *(cast(m, np.float32) for m in trained(wide, 1e-3, cosine))])
    assert run(paths, tmp_path / "out") == 0
    assert "--anchor-rounding" not in capsys.readouterr().err
    found = report(tmp_path / "out")
    assert found["anchor_rounding"]["exact"] is True
    assert abs(median_ratio(found) - 2 * cosine / (1 + cosine)) < 0.04
    assert run(paths, tmp_path / "no", "--anchor-rounding", "correct") == 1
    err = capsys.readouterr().err
    assert "--anchor-rounding correct" in err and str(paths[0]) in err
    assert not (tmp_path / "no").exists()


def test_tensors_that_did_not_move_are_untouched(tmp_path):
    """Tensors frozen in float32 before the rounding and tensors frozen after it are unchanged."""
    base = original()
    tuned = [cast(m, np.float32) for m in trained(base, 1e-3, COSINE)]
    rounded = cast(base, BF16)
    for k in (0, 1):
        tuned[k]["layers.0.mlp.up.weight"] = base["layers.0.mlp.up.weight"].astype(np.float32)
        tuned[k]["layers.1.norm.weight"] = rounded["layers.1.norm.weight"].astype(np.float32)
    paths = save(tmp_path, [rounded, *tuned])
    assert run(paths, tmp_path / "out", "--anchor-rounding", "correct", "--dtype", "float32") == 0
    merged = TensorFiles(tmp_path / "out")
    np.testing.assert_array_equal(
        merged["layers.1.norm.weight"], rounded["layers.1.norm.weight"].astype(np.float32)
    )
    # All fine-tunes are equal: the result is their weights, which the base rounded.
    name = "layers.0.mlp.up.weight"
    np.testing.assert_allclose(merged[name], tuned[0][name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("unit", ["tensor", "filter", "global"])
@pytest.mark.parametrize(("size", "cosine"), [(3e-4, 0.9), (1e-3, 0.0), (1e-3, 0.5), (0.1, 0.2)])
def test_ratios_stay_in_range(tmp_path, size, cosine, unit):
    base = original()
    paths = save(
        tmp_path, [cast(base, BF16), *(cast(m, np.float32) for m in trained(base, size, cosine, 3))]
    )
    assert run(paths, tmp_path / "out", "--anchor-rounding", "correct", "--unit", unit) == 0
    ratios = [u["ratio"] for u in report(tmp_path / "out")["units"]]
    assert all(0 <= ratio <= 1 for ratio in ratios)


def test_adapters_have_no_rounding_error_of_their_base(tmp_path, capsys):
    base = cast(original(), BF16)
    (path,) = save(tmp_path, [base])
    adapters = [
        adapter(tmp_path / f"lora{k}", factors("layers.0.mlp.up", 96, 96, seed=k)) for k in (1, 2)
    ]
    assert run([path, *adapters], tmp_path / "out") == 0
    assert "--anchor-rounding" not in capsys.readouterr().err
    assert report(tmp_path / "out")["anchor_rounding"] is None


def test_a_base_with_the_dtype_of_its_fine_tunes(tmp_path, capsys):
    base = original()
    paths = save(tmp_path, [cast(m, BF16) for m in (base, *trained(base, 0.05, COSINE))])
    assert run(paths, tmp_path / "out") == 0
    assert capsys.readouterr().err.count("note:") == 0
    assert run(paths, tmp_path / "more", "--anchor-rounding", "correct") == 0
    assert "note: --anchor-rounding correct" in capsys.readouterr().err


@pytest.mark.parametrize("related", [True, False])
def test_models_without_a_common_base(tmp_path, capsys, related):
    """Their task vectors have a cosine of 0.5, so the angle has no meaning."""
    tuned = trained(original(seed=7), 0.05, COSINE) if related else [original(8), original(9)]
    paths = save(tmp_path, [cast(m, np.float32) for m in (original(), *tuned)])
    assert run(paths, tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert all(f"note: {path} " in err for path in paths[1:]) and err.count(" 1.4 ") == 2
    cosines = [u["cosine"] for u in report(tmp_path / "out")["units"] if len(u["shape"]) == 2]
    assert np.median(cosines) > 0.4


@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("cosine", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("index", [1, 2])
def test_a_base_that_is_not_the_first(tmp_path, capsys, number, cosine, index):
    base = original()
    models = [cast(m, np.float32) for m in trained(base, 0.02, cosine, number)]
    models.insert(index, cast(base, np.float32))
    paths = save(tmp_path, models)
    assert run(paths, tmp_path / "out", "--dry-run") == 0
    err = capsys.readouterr().err
    if cosine == 0.5:  # All models are equally far from each other.
        assert "note:" not in err
    else:
        assert f"note: {paths[index]} " in err and str(paths[0]) in err


@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("cosine", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("size", [1e-3, 0.02, 0.3])
def test_a_true_base_gets_no_note(tmp_path, capsys, number, cosine, size):
    base = original(seed=number)
    paths = save(
        tmp_path, [cast(m, np.float32) for m in (base, *trained(base, size, cosine, number))]
    )
    assert run(paths, tmp_path / "out", "--dry-run") == 0
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("lengths", [(1.0, 1.3), (1.0, 2.0), (1.0, 3.0), (1.0, 1.1, 1.5)])
@pytest.mark.parametrize("cosine", [0.2, 0.4, 0.8])
def test_fine_tunes_of_unequal_learning_rates_get_no_note(tmp_path, capsys, lengths, cosine):
    """Another model may be equally far from the others by chance, but not in every tensor."""
    base, rng = original(), np.random.default_rng(4)
    tuned = trained(base, 0.02, cosine, len(lengths))
    tuned = [
        {n: base[n] + length * rng.uniform(0.85, 1.15) * (w - base[n]) for n, w in m.items()}
        for m, length in zip(tuned, lengths, strict=True)
    ]
    paths = save(tmp_path, [cast(m, np.float32) for m in (base, *tuned)])
    assert run(paths, tmp_path / "out", "--dry-run") == 0
    assert "note:" not in capsys.readouterr().err


def test_a_head_that_did_not_start_from_the_bases(tmp_path, capsys):
    """The base is a zero-shot CLIP, but the fine-tunes started from a linear probe."""
    base, probe = original(), np.random.default_rng(3).standard_normal((10, 96))
    tuned = trained(base, 0.02, COSINE)
    for k, model in enumerate(tuned):
        rng = np.random.default_rng(k)
        model["classifier.weight"] = probe + 0.02 * rng.standard_normal(probe.shape)
    paths = save(tmp_path, [cast(m, np.float32) for m in (base, *tuned)])
    assert run(paths, tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert "note: classifier.weight " in err and err.count("note:") == 1
    assert (
        run(paths, tmp_path / "mean", "--exclude", "classifier.weight", "--unmerged-from", "mean")
        == 0
    )
    mean = np.mean([m["classifier.weight"].astype(np.float32) for m in tuned], axis=0)
    np.testing.assert_allclose(
        TensorFiles(tmp_path / "mean")["classifier.weight"], mean, rtol=0, atol=1e-6
    )


def test_layers_that_were_replaced(tmp_path, capsys):
    base = original()
    tuned = trained(base, 0.02, COSINE)
    for model in tuned:
        model["layers.1.mlp.up.weight"] = base["layers.2.mlp.up.weight"]
    paths = save(tmp_path, [cast(m, np.float32) for m in (base, *tuned)])
    assert run(paths, tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert err.count("note: layers.1.mlp.up.weight ") == err.count("note:") == 2


@pytest.mark.parametrize(("first", "second"), [(0, 2), (1, 2)])
def test_a_copy_of_a_model_is_a_note(tmp_path, capsys, first, second):
    """The copy has another path: the same path twice is an error."""
    base = original()
    models = [cast(m, np.float32) for m in (base, *trained(base, 0.02, COSINE))]
    models[second] = models[first]
    paths = save(tmp_path, models)
    assert run(paths, tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert f"note: {paths[second]} " in err and str(paths[first]) in err
    assert err.count("note:") == 1


def test_an_update_that_the_output_would_round_away(tmp_path, capsys):
    base = cast(original(), BF16)
    wide = {n: w.astype(np.float64) for n, w in base.items()}
    tuned = [cast(m, np.float32) for m in trained(wide, 2e-4, 0.9)]
    paths = save(tmp_path, [base, *tuned])
    assert run(paths, tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert "--dtype float32" in err
    assert run(paths, tmp_path / "wide", "--dtype", "float32") == 0
    assert "--dtype float32" not in capsys.readouterr().err


@pytest.mark.parametrize(("size", "noted"), [(1e-3, True), (3e-2, False)])
def test_fine_tunes_that_are_coarser_than_the_base(tmp_path, capsys, size, noted):
    """They rounded the same base alike: their task vectors have the rounding error in common."""
    base = original()
    tuned = trained({n: w.astype(np.float32).astype(np.float64) for n, w in base.items()}, size, 0)
    paths = save(tmp_path, [cast(base, np.float32), *(cast(m, BF16) for m in tuned)])
    assert run(paths, tmp_path / "out") == 0
    assert (str(paths[0]) in capsys.readouterr().err) is noted
    assert (median_ratio(report(tmp_path / "out")) > 0.3) is noted


def test_a_dry_run_and_a_comparison_print_the_note_too(tmp_path, capsys):
    paths = save(tmp_path, [cast(m, np.float32) for m in (original(), original(8), original(9))])
    assert run(paths, tmp_path / "out", "--dry-run") == 0
    assert f"note: {paths[1]} " in capsys.readouterr().err
    assert main(["compare", *map(str, paths)]) == 0
    assert f"note: {paths[1]} " in capsys.readouterr().err


def test_the_sample_of_large_tensors_is_spread_over_them(tmp_path, capsys):
    """The update of a tensor is found although its beginning was frozen before the rounding."""
    shape = {"w": (600, 1000)}
    base = {"w": np.random.default_rng(0).standard_normal(shape["w"])}
    tuned = trained(base, 1e-3, COSINE)
    for model in tuned:
        model["w"][:100] = base["w"][:100]
    paths = save(tmp_path, [cast(base, BF16), *(cast(m, np.float32) for m in tuned)])
    assert run(paths, tmp_path / "out") == 0
    assert "--anchor-rounding correct" in capsys.readouterr().err
