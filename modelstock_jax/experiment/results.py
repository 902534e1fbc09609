"""What a run leaves to read: the table, the figures, one file of metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from modelstock_jax.fileio import plain, write_text
from modelstock_jax.reporting import figures
from modelstock_jax.reporting.figures import layer_rows, ratio_summary
from modelstock_jax.reporting.metrics import read_metrics
from modelstock_jax.reporting.tables import screen_table, write_results

Document = Mapping[str, Any]


def write(workdir: Path, config: ConfigDict, documents: Sequence[Document]) -> None:
    """Writes results.json, results.md, metrics.jsonl and the figures; prints the table.

    Args:
      workdir: the run's directory.
      config: the run's options, kept in results.json.
      documents: {"rows": ..., "geometry": report of the unmerged replicas, where there is one},
        the anchor's first, then one a seed.
    """
    rows = [row for document in documents for row in document["rows"]]
    write_results(workdir, rows, config=plain(config.to_dict()))
    logs = _gather_metrics(workdir)
    folder = workdir / "figures"
    figures.id_against_shifts(rows, folder / "id_against_shifts.png")
    reports = [document["geometry"] for document in documents if "geometry" in document]
    if reports:
        figures.angle_by_layer(layer_rows(reports), folder / "angle_by_layer.png")
    histories = {run: history for run, lines in logs.items() if (history := _merge_history(lines))}
    if histories:
        first = dict(list(histories.items())[:1])
        figures.ratio_over_merges(first, folder / "ratio_over_epochs.png")
    screen_table(rows)
    left = [name for name in ("results.md", "results.json", "figures", "model")
            if (workdir / name).exists()]
    print(f"in {workdir}: {', '.join(left)}")


def last_ratios(workdir: Path, run: str) -> dict[str, dict[str, float]] | None:
    """Ratios of a run's last merge by kind of tensor, as `figures.ratio_summary` gives them."""
    history = _merge_history(read_metrics(workdir / "runs" / run))
    return history[-1]["ratios"] if history else None


def _gather_metrics(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """One metrics.jsonl of all runs, each line with its run's name."""
    runs = workdir / "runs"
    logs = {
        path.parent.relative_to(runs).as_posix(): read_metrics(path.parent)
        for path in sorted(runs.rglob("metrics.jsonl"))
    }
    lines = [
        json.dumps({"run": run, **entry}, sort_keys=True)
        for run, log in logs.items()
        for entry in log
    ]
    write_text(workdir / "metrics.jsonl", "".join(line + "\n" for line in lines))
    return logs


def _merge_history(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry a merge, as `figures.ratio_over_merges` takes them."""
    history = []
    for line in lines:
        if "merge/epoch" not in line:
            continue
        prefix = "merge/ratio/"
        report = [
            {
                "name": name.removeprefix(prefix),
                "ratio": ratio,
                "cosine": line[name.replace("/ratio/", "/cosine/")],
            }
            for name, ratio in line.items()
            if name.startswith(prefix)
        ]
        history.append({"epoch": line["merge/epoch"], "ratios": ratio_summary(report)})
    return history
