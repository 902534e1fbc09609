"""Write the results of a run: table, figures and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.experiment.export import directories
from modelstock_jax.experiment.workdir import changed_options
from modelstock_jax.fileio import to_json_types, write_text
from modelstock_jax.reporting import figures
from modelstock_jax.reporting.figures import layer_rows, ratio_summary
from modelstock_jax.reporting.metrics import read_metrics
from modelstock_jax.reporting.tables import read_results, screen_table, write_results

Document = Mapping[str, Any]
Row = Mapping[str, Any]

_FILES = ("results.md", "results.json", "figures")


def write(workdir: Path, config: ConfigDict, documents: Sequence[Document]) -> None:
    """Write results.json, results.md, metrics.jsonl and the figures; print the table.

    Args:
      workdir: directory of the run
      config: options of the run, stored in results.json
      documents: the anchor's, then one per seed: {"rows": ..., and "geometry", the
        `merging.report` of replicas trained without merging, if they were trained}
    """
    rows = [row for document in documents for row in document["rows"]]
    synthetic = config.data.name == "glyphs"
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
    # The last file to be written: a run is finished when it exists, see `finished`.
    write_results(workdir, rows, synthetic=synthetic, config=to_json_types(config.to_dict()))
    show(workdir, config, rows)


def show(workdir: Path, config: ConfigDict, rows: Sequence[Row]) -> None:
    """Print the table and the names of the files with results."""
    screen_table(rows, synthetic=config.data.name == "glyphs")
    # A model of an earlier export.which may exist.
    names = (*_FILES, "model") if any(row.get("exported") for row in rows) else _FILES
    written = [name for name in names if (workdir / name).exists()]
    print(f"results in {workdir}: {', '.join(written)}")


def finished(workdir: Path, config: ConfigDict) -> list[Row] | None:
    """Return the rows of a fine-tuning run that is finished with this config, else None.

    Options that change no result may differ, see `workdir.changed_options`.

    Args:
      workdir: directory of the run
      config: options of the run
    """
    if config.task != "finetune":
        return None
    try:
        document = read_results(workdir)
        started = dict(json.loads((workdir / "config.json").read_text()))
    except (UserError, OSError, TypeError, ValueError):
        return None
    rows, files = document["rows"], [workdir / name for name in (*_FILES, "metrics.jsonl")]
    if any(row.get("exported") for row in rows):
        files += directories(workdir, config).values()
    same = document.get("config") == started and not changed_options(
        started, to_json_types(config.to_dict())
    )
    return rows if same and all(file.exists() for file in files) else None


def merge_ratios(
    workdir: Path, run: str, row: Mapping[str, Any], document: Document
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the ratios of the merges that explain a model: title -> `figures.ratio_summary`.

    At a late merge during training the ratios are close to 1, because the replicas share the
    updates before the merge before it. Therefore the first merge is also returned, and the merge
    after training if the run has one. A model that is not a Model Stock has no ratios.

    Args:
      workdir: directory of the experiment
      run: the run that merges during training, for example seed_0/merged
      row: row of the model
      document: results of its seed
    """
    after_training = row["method"] == "model_stock" and not row.get("unit")
    during_training = row["method"].startswith(("periodic_", "model_stock_carried"))
    if not (after_training or during_training):
        return {}
    ratios, history = {}, []
    if during_training or "geometry" not in document:
        history = _merge_history(read_metrics(workdir / "runs" / run))
    if during_training and history:
        ends = {"only": history[0]}
        if len(history) > 1:
            ends = {"first": history[0], "last": history[-1]}
        for title, merge in ends.items():
            ratios[f"{title} merge (epoch {merge['epoch']:g})"] = merge["ratios"]
    if "geometry" in document:
        ratios["merge after training"] = ratio_summary(document["geometry"])
    elif after_training and history:  # merge.every = 'end' without `compare`
        ratios["merge after training"] = history[-1]["ratios"]
    return ratios


def _gather_metrics(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """Write one metrics.jsonl of all runs; each line has the name of its run."""
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
    """Return one entry per merge for `figures.ratio_over_merges`."""
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
