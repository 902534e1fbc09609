"""Rows, means over seeds, tables and results.json."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from modelstock_jax.errors import UserError
from modelstock_jax.reporting import tables
from modelstock_jax.reporting.tables import make_row, mean_and_error, summarize
from tests.reporting import made_up

ROW = {
    "method",
    "id",
    "shifts",
    "avg_shifts",
    "seed",
    "cost",
    "distance_to_anchor",
    "predicted_distance",
}


def test_standard_error_by_hand():
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, variance 14 / 2 = 7, error sqrt(7 / 3).
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(7 / 3), rel=1e-12)  # rounding of float64


def test_replicas_of_a_seed_are_averaged_before_the_error():
    rows = [
        make_row("single_model", id=x, shifts={"v2": 1.0}, seed=seed)
        for seed, x in [(0, 10.0), (0, 30.0), (1, 40.0), (1, 60.0)]
    ]
    (summary,) = summarize(rows)
    assert summary.num_seeds == 2
    assert summary.id == (35.0, 15.0)  # 20 and 50: mean 35, deviation 21.2, error 15


def test_labels_distinguish_merge_units_and_numbers_of_replicas():
    def row(**more):
        return make_row("model_stock", id=1, shifts={"v2": 1}, seed=0, **more)

    rows = [row(num_replicas=2), row(num_replicas=3), row(num_replicas=2, unit="filter")]
    stock = "Model Stock, after training"
    names = [summary.label for summary in summarize(rows)]
    assert names == [f"{stock}, N = 2", f"{stock}, N = 3", f"{stock}, unit filter"]


def test_one_seed_has_no_error():
    assert summarize(made_up.rows())[1].id.error is None


def test_average_is_the_unweighted_mean_of_the_shifts():
    assert make_row("uniform_mean", id=1, shifts={"a": 1, "b": 2, "c": 6})["avg_shifts"] == 3.0
    assert make_row("uniform_mean", id=1, shifts={})["avg_shifts"] is None


def test_results_json_round_trip_without_timestamps(tmp_path):
    rows = made_up.rows(range(2))
    tables.write_results(tmp_path / "a", rows, config={"lr": 1e-3})
    tables.write_results(tmp_path / "b", rows, config={"lr": 1e-3})
    for name in ("results.json", "results.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["results.json", "results.md"]
    document = tables.read_results(tmp_path / "a")
    assert document["rows"] == rows and document["config"] == {"lr": 1e-3}
    assert all(set(row) >= ROW for row in document["rows"])
    text = (tmp_path / "a" / "results.json").read_text()
    assert text == json.dumps(document, indent=1) + "\n"
    assert list(document) == sorted(document) and list(document["rows"][0]) == sorted(ROW)
    for shifts in [entry["shifts"] for name in ("rows", "summary") for entry in document[name]]:
        assert list(shifts) == ["v2", "r", "a", "sketch", "objectnet", "digits"]
    assert not any(word in text for word in ("time", "date", "clock"))
    stock = next(s for s in document["summary"] if s["method"] == "model_stock")
    ids = [row["id"] for row in rows if row["method"] == "model_stock"]
    assert stock["id"]["mean"] == pytest.approx(np.mean(ids), rel=1e-12)  # float64 rounding
    assert stock["id"]["error"] == pytest.approx(abs(ids[0] - ids[1]) / 2, rel=1e-9)
    assert stock["shifts"]["v2"]["error"] > 0


def test_markdown_marks_the_best_and_shows_every_column():
    def row(method, id, v2, r, **more):
        return make_row(method, id=id, shifts={"v2": v2, "other": r}, seed=0, **more)

    rows = [
        row("uniform_mean", 70.0, 50.0, 30.0, num_replicas=2, cost=2),
        row("model_stock", 69.0, 54.0, 30.01, cost=2),
        row("wise_ft", 69.0, 1.0, 2.0, alpha=0.1, of="uniform_mean"),
        row("wise_ft", 69.0, 1.0, 2.0, alpha=0.5, of="uniform_mean"),
    ]
    lines = tables.markdown_table(rows).splitlines()
    assert lines[0] == "| method | ID | avg. shifts | IN-V2 | other | fine-tuning runs |"
    assert lines[2] == "| Uniform mean of 2 replicas | **70.00** | 40.00 | 50.0 | **30.0** | 2 |"
    assert lines[3] == (  # The printed values of the last shift tie.
        "| Model Stock, after training | 69.00 | **42.01** | **54.0** | **30.0** | 2 |"
    )
    assert lines[4].startswith("| WiSE-FT of the uniform mean, α = 0.5 |") and lines[5] == ""
    assert "seeds" not in lines[6]
    assert "0.1 |" in tables.markdown_table(rows, wise_ft_alphas=None)


def test_headings_of_distances_and_shifts():
    row = make_row(
        "model_stock",
        id=1.0,
        shifts=dict.fromkeys(made_up.SHIFTS, 1.0),
        cost=2,
        distance_to_anchor=1.0,
        predicted_distance=1.0,
    )
    heading = tables.markdown_table([row]).splitlines()[0]
    # The order of the paper's Table 3, then ObjectNet, which that table omits, and other shifts.
    assert heading == (
        "| method | ID | avg. shifts | IN-V2 | IN-R | IN-A | IN-Sketch | ObjectNet | digits | "
        "L2 distance to anchor | predicted distance to center | fine-tuning runs |"
    )


def test_exported_row_is_marked():
    rows = made_up.rows(range(2))
    assert "exported" not in tables.markdown_table(rows)
    chosen = [row for row in rows if row["method"] == "model_stock" and row["seed"] == 0]
    chosen[0]["exported"] = True
    text = tables.markdown_table(rows)
    assert text.count("(exported)") == text.count("after training (exported)") == 1
    assert text.splitlines()[-1].endswith("of the first seed.")
    marked = [s.method for s in summarize(rows) if s.exported]
    assert marked == ["model_stock"]
    for width in (60, 200):
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=True, no_color=True)
        tables.screen_table(rows, console=console)
        assert "(exported)" in " ".join(out.getvalue().split()), width


def test_accuracy_on_validation_images_is_the_last_column():
    rows = [make_row("model_stock", id=1.0, shifts={"v2": 1.0}, cost=2, validation=91.25)]
    lines = tables.markdown_table(rows).splitlines()
    assert lines[0].endswith(" fine-tuning runs | validation |") and "| 91.25 |" in lines[2]
    assert "held-out" in lines[-1]


def test_caption_explains_the_columns_that_are_shown():
    def caption(shifts=("v2",), cost=None, synthetic=False, **more):
        shifts = dict.fromkeys(shifts, 1.0)
        row = make_row("model", id=1.0, shifts=shifts, seed=None, cost=cost, **more)
        return tables.markdown_table([row], synthetic=synthetic).splitlines()[-1]

    average = (
        'Top-1 accuracy in %. "avg. shifts" is the mean over the out-of-distribution (OOD) sets.'
    )
    assert caption(shifts=()) == "Top-1 accuracy in %."
    assert caption() == average
    assert caption(distance_to_anchor=1.0) == (
        f"{average} L2 distances are over all merged weights."
    )
    assert caption(distance_to_anchor=1.0, predicted_distance=1.0, cost=2) == (
        f"{average} L2 distances are over all merged weights. The distance to the center is "
        'predicted from the angles. "fine-tuning runs" is the training cost in fine-tunings of one '
        "model."
    )
    assert caption(synthetic=True) == (
        f"{average} IN-V2 is a synthetic counterpart of the paper's OOD sets."
    )
    assert caption(shifts=("v2", "digits", "a"), synthetic=True) == (
        f"{average} IN-V2 and IN-A are synthetic counterparts of the paper's OOD sets."
    )
    assert caption(shifts=("digits",), synthetic=True) == average


def test_markdown_shows_the_error_and_the_number_of_seeds():
    text = tables.markdown_table(made_up.rows(range(4)))
    assert "± standard error over 4 seeds" in text and text.count(" ± ") == 15


@pytest.mark.parametrize(("terminal", "width"), [(False, 40), (True, 200)])
def test_screen_table_shows_all_columns_if_they_fit(terminal, width):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, no_color=True)
    tables.screen_table(made_up.rows(), console=console)
    text = out.getvalue()
    assert "…" not in text
    assert all(name in text for name in [*made_up.HEADINGS, "avg. shifts", "Model Stock, periodic"])


@pytest.mark.parametrize(
    ("width", "shown", "hidden"),
    [
        (100, ["L2 distance", "predicted"], ["Sketch"]),
        (80, ["L2 distance"], ["Sketch", "predicted"]),
        (70, [], ["Sketch", "predicted", "L2 distance"]),
    ],
)
def test_narrow_terminal_shows_the_average_without_the_shifts(width, shown, hidden):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, no_color=True)
    tables.screen_table(made_up.rows(range(4)), console=console)
    text = out.getvalue()
    table = text[: text.index("Top-1")]
    for words in ["ID", "avg. shifts", "fine-tuning", *shown]:
        assert words in table, words
    assert not any(words in table for words in hidden)
    assert "…" not in text and "results.md" in text


def test_error_if_the_directory_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/results.md"):
        tables.write_results(tmp_path / "file", made_up.rows())


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"rows": 3}', '{"rows": [1]}'])
def test_error_if_the_file_is_not_a_results_file(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="results.json"):
        tables.read_results(tmp_path)
