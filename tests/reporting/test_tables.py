"""Rows, means over seeds, tables, results.json."""

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


def test_replicas_of_one_seed_are_averaged_before_the_error():
    rows = [
        make_row("single_model", id=x, shifts={"V2": 1.0}, seed=seed)
        for seed, x in [(0, 10.0), (0, 30.0), (1, 40.0), (1, 60.0)]
    ]
    (summary,) = summarize(rows)
    assert summary.num_seeds == 2
    assert summary.id == (35.0, 15.0)  # 20 and 50: mean 35, deviation 21.2, error 15


def test_merge_units_and_numbers_of_replicas_are_told_apart():
    def row(**more):
        return make_row("model_stock", id=1, shifts={"V2": 1}, seed=0, **more)

    rows = [row(num_replicas=2), row(num_replicas=3), row(num_replicas=2, unit="filter")]
    stock = "Model Stock, after training"
    names = [summary.label for summary in summarize(rows)]
    assert names == [f"{stock}, N = 2", f"{stock}, N = 3", f"{stock}, unit filter"]


def test_one_seed_has_no_error():
    assert summarize(made_up.rows())[1].id.error is None


def test_average_is_the_plain_mean_of_the_shifts():
    assert make_row("uniform_mean", id=1, shifts={"a": 1, "b": 2, "c": 6})["avg_shifts"] == 3.0
    assert make_row("uniform_mean", id=1, shifts={})["avg_shifts"] is None


def test_results_json_round_trip_and_no_clock(tmp_path):
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
    assert text == json.dumps(document, sort_keys=True, indent=1) + "\n"
    assert not any(word in text for word in ("time", "date", "clock"))
    stock = next(s for s in document["summary"] if s["method"] == "model_stock")
    ids = [row["id"] for row in rows if row["method"] == "model_stock"]
    assert stock["id"]["mean"] == pytest.approx(np.mean(ids), rel=1e-12)  # float64 rounding
    assert stock["id"]["error"] == pytest.approx(abs(ids[0] - ids[1]) / 2, rel=1e-9)
    assert stock["shifts"]["V2"]["error"] > 0


def test_markdown_marks_the_best_and_shows_every_column():
    rows = [
        make_row(
            "uniform_mean", id=70.0, shifts={"V2": 50.0, "R": 30.0}, seed=0, num_replicas=2, cost=2
        ),
        make_row("model_stock", id=69.0, shifts={"V2": 54.0, "R": 30.01}, seed=0, cost=2),
        make_row(
            "wise_ft", id=69.0, shifts={"V2": 1.0, "R": 2.0}, seed=0, alpha=0.1, of="uniform_mean"
        ),
        make_row(
            "wise_ft", id=69.0, shifts={"V2": 1.0, "R": 2.0}, seed=0, alpha=0.5, of="uniform_mean"
        ),
    ]
    lines = tables.markdown_table(rows).splitlines()
    assert lines[0] == "| method | ID | V2 | R | avg shifts | cost |"
    assert lines[2] == "| Mean of 2 replicas | **70.00** | 50.0 | **30.0** | 40.00 | 2 |"
    assert lines[3] == (  # R ties as printed
        "| Model Stock, after training | 69.00 | **54.0** | **30.0** | **42.01** | 2 |"
    )
    assert lines[4].startswith("| WiSE-FT of the mean, α = 0.5 |") and lines[5] == ""
    assert "seeds" not in lines[6]
    assert "0.1 |" in tables.markdown_table(rows, wise_ft_alphas=None)


def test_what_stands_below_speaks_of_the_columns_that_are_there():
    def said(cost=None, **more):
        row = make_row("model", id=1.0, shifts={"v2": 1.0}, seed=None, cost=cost, **more)
        return tables.markdown_table([row]).splitlines()[-1]

    assert said() == "Top-1 accuracy in %."
    assert said(distance_to_anchor=1.0) == (
        "Top-1 accuracy in %; distances of weights: to the anchor."
    )
    assert said(distance_to_anchor=1.0, predicted_distance=1.0, cost=2) == (
        "Top-1 accuracy in %; distances of weights: to the anchor, and to the center as the angles "
        "predict it; cost in fine-tunings of one model."
    )


def test_markdown_says_the_error_and_over_what():
    text = tables.markdown_table(made_up.rows(range(4)))
    assert "± standard error over 4 seeds" in text and text.count(" ± ") == 15


@pytest.mark.parametrize(("terminal", "width"), [(False, 40), (True, 200)])
def test_screen_table_shows_all_where_there_is_room(terminal, width):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, no_color=True)
    tables.screen_table(made_up.rows(), console=console)
    text = out.getvalue()
    assert "…" not in text
    assert all(name in text for name in [*made_up.SHIFTS, "avg shifts", "Model Stock, periodic"])


def test_narrow_terminal_keeps_the_average():
    out = io.StringIO()
    console = Console(file=out, width=90, force_terminal=True)
    tables.screen_table(made_up.rows(), console=console)
    text = out.getvalue()
    assert "Sketch" not in text and "avg shifts" in text and "results.md" in text


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/results.json"):
        tables.write_results(tmp_path / "file", made_up.rows())


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_foreign_results_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="results.json"):
        tables.read_results(tmp_path)
