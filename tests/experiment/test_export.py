"""The exported model of a run: directories, model card, and checks before training."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from configs import default
from modelstock_jax.errors import UserError
from modelstock_jax.experiment import export, results
from modelstock_jax.experiment.export import check_export, exported_row
from modelstock_jax.experiment.options import check_options
from modelstock_jax.models import checkpoint_io
from modelstock_jax.reporting.tables import make_row, write_results
from tests.models import small
from tests.models.all_formats import CHECKPOINT, with_head, with_tokenizer


def config_of(*export_formats: str):
    config = default.get_config()
    config.pretrained = "org/anchor"
    config.export.formats = export_formats
    return config


def test_merged_model_is_exported_in_every_requested_format(tmp_path):
    anchor, tuned = with_tokenizer(tmp_path / "anchor"), with_head()
    rows = [
        make_row("zero_shot", id=51.25, shifts={"v2": 40.0}),
        make_row("periodic_model_stock", id=63.5, shifts={"v2": 44.75}, num_replicas=2, cost=2),
    ]
    ratios = {"first": {"weights": {"count": 9, "median": 0.625, "low": 0.5, "high": 0.75}}}
    arguments = (
        config_of("open_clip", "hugging_face", "openai"),
        anchor,
        tuned.replica(),
        tuned.labels,
        rows,
        ratios,
        "python launch.py --workdir=runs/b32",
    )
    export.export(tmp_path, *arguments)
    directories = {
        "hugging_face": "model",
        "open_clip": "model_open_clip",
        "openai": "model_openai",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*directories.values(), "anchor"])
    for name, directory in directories.items():
        loaded = checkpoint_io.load(tmp_path / directory)
        assert (loaded.format, loaded.labels) == (name, tuned.labels)
        assert loaded.checksum == tuned.checksum
        assert checkpoint_io.has_tokenizer(loaded)
        assert export.directories(tmp_path, arguments[0])[name] == tmp_path / directory
        card = (tmp_path / directory / "README.md").read_text()
        for text in (
            "org/anchor",  # The anchor and the checksum of its weights.
            anchor.checksum,
            "Model Stock",  # Method, ratios, accuracies.
            "0.625",
            "63.50",
            "44.75",
            "51.25",
            "python launch.py --workdir=runs/b32",  # Command and versions.
            f"numpy {np.__version__}",
            "modelstock_jax ",
        ):
            assert text in card, text
        # Only the files of the Hugging Face format can be loaded by transformers.
        assert ("from_pretrained" in card) == (name == "hugging_face")


def test_directory_is_replaced_only_if_the_results_mark_another_row(tmp_path):
    anchor, tuned = with_tokenizer(tmp_path / "anchor"), with_head()
    rows = [
        make_row("zero_shot", id=51.25, shifts={}),
        make_row("model_stock", id=64.0, shifts={}, seed=0, num_replicas=2),
        make_row("periodic_model_stock", id=63.5, shifts={}, seed=0, num_replicas=2),
    ]
    card = tmp_path / "model" / "README.md"

    def write(row) -> bool:
        """Export a row, and return whether the directory was written."""
        if card.exists():
            card.write_text("edited")
        arguments = (config_of(), anchor, tuned.replica(), tuned.labels, [rows[0], row], {}, "")
        export.export(tmp_path, *arguments)
        return card.read_text() != "edited"

    assert write(rows[2]) and write(rows[2]), "without results, the exported row is unknown"
    # Results of an older version mark no row: they exported the last one.
    write_results(tmp_path, rows)
    assert not write(rows[2]) and (tmp_path / "results.json").exists()
    assert write(rows[1]) and not (tmp_path / "results.json").exists()
    write_results(tmp_path, [rows[0], rows[1] | {"exported": True}, rows[2]])
    assert not write(rows[1])
    assert not write(rows[1] | {"validation": 90.0}), "results before which='best' lack it"
    assert write(rows[1] | {"distance_to_anchor": 2.0}), "`runs` was removed, and trained again"
    write_results(tmp_path, [rows[0], rows[1] | {"exported": True}, rows[2]])
    assert write(rows[2])


def test_best_row_has_the_highest_accuracy_on_validation_images():
    def row(method, validation, **more):
        return make_row(method, id=more.pop("id", 1.0), shifts={}, validation=validation, **more)

    rows = [row("single_model", 90.0, id=99.0), row("uniform_mean", 91.0), row("model_stock", 91.0)]
    rows += [row("model_stock", 90.5, unit="layer"), row("periodic_model_stock", 89.0, id=99.0)]
    assert exported_row("best", rows, merges=True) == 1, "the first of equal accuracies"
    assert exported_row("after_training", rows, merges=True) == 2
    assert exported_row("merged", rows, merges=True) == 4
    assert exported_row("merged", rows[:4], merges=False) is None
    assert exported_row("after_training", rows[:1], merges=False) is None, "a single replica"


def test_ratios_of_a_card_are_those_of_merges_that_explain_the_model(tmp_path):
    def line(epoch, ratio):
        names = {"merge/ratio/w.kernel": ratio, "merge/cosine/w.kernel": 0.5}
        return json.dumps({"step": epoch, "merge/epoch": epoch, **names}) + "\n"

    def medians(row, document, lines=""):
        (tmp_path / "runs/merged").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/merged/metrics.jsonl").write_text(lines)
        found = results.merge_ratios(tmp_path, "merged", {"method": row}, document)
        return {title: summary["kernels"]["median"] for title, summary in found.items()}

    compared = {"geometry": [{"name": "w.kernel", "cosine": 0.5, "ratio": 0.7}]}
    three = line(1, 0.6) + line(2, 0.9) + line(3, 1.0)
    after = "merge after training"
    periodic = {"first merge (epoch 1)": 0.6, "last merge (epoch 3)": 1.0}
    assert medians("periodic_model_stock", compared, three) == {**periodic, after: 0.7}
    assert medians("periodic_model_stock", {}, three) == periodic
    assert medians("periodic_model_stock", {}, line(1, 0.6)) == {"only merge (epoch 1)": 0.6}
    assert medians("model_stock", compared, three) == {after: 0.7}
    assert medians("model_stock", {}, line(3, 0.8)) == {after: 0.8}
    assert medians("uniform_mean", compared, three) == {}
    shutil.rmtree(tmp_path / "runs")  # A run without merging has no such log.
    assert results.merge_ratios(tmp_path, "merged", {"method": "model_stock"}, compared)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"export.which": "after_training", "compare": False}, "--config.compare=True"),
        ({"export.which": "best", "data.name": "cifar10"}, "held_out_per_class"),
    ],
)
def test_run_without_the_model_to_export_is_an_error_before_training(changes, words):
    config = default.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match="export.which") as error:
        check_options(config)
    assert words in str(error.value)
    config.export.which = "merged"
    check_options(config)


def test_only_a_model_of_a_row_is_named_as_a_result(tmp_path, capsys):
    """A model of an earlier `export.which` remains, if the new one has no model to export."""
    (tmp_path / "model").mkdir()
    row = make_row("single_model", id=64.0, shifts={})
    results.show(tmp_path, config_of(), [row])
    assert not capsys.readouterr().out.endswith("model\n")
    results.show(tmp_path, config_of(), [row | {"exported": True}])
    assert capsys.readouterr().out.endswith(": model\n")


def test_best_needs_validation_images():
    data = SimpleNamespace(validation=())
    config = default.get_config()
    export.check_validation(config, data)
    config.export.which = "best"
    with pytest.raises(UserError, match="export.which.*validation_fraction"):
        export.check_validation(config, data)


def test_export_errors_are_raised_before_training():
    with pytest.raises(UserError, match="export.formats: .*'onnx'.*hugging_face"):
        check_export(config_of("onnx"), CHECKPOINT)
    with pytest.raises(UserError, match="export.formats: OpenAI.*num_attention_heads .*3"):
        check_export(config_of("hugging_face", "openai"), small.checkpoint(small.config()))
    check_export(config_of("hugging_face", "open_clip", "openai"), CHECKPOINT)
