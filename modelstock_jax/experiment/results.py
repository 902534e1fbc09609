"""What a run leaves to read: the table, the figures, one file of metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import plain, write_text
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.models import checkpoint_io, formats
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.formats import HuggingFace
from modelstock_jax.reporting import figures
from modelstock_jax.reporting.figures import layer_rows, ratio_summary
from modelstock_jax.reporting.metrics import read_metrics
from modelstock_jax.reporting.model_card import model_card
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
    left = [
        name
        for name in ("results.md", "results.json", "figures", "model")
        if (workdir / name).exists()
    ]
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


# The merged model as directories that other programs open.


def check_export(config: ConfigDict, pretrained: Checkpoint) -> None:
    """Asks every layout of `config.export.formats` whether it can hold the model, weights unseen.

    Raises:
      UserError: if a layout is not known or cannot; before anything is trained.
    """
    for layout in _layouts(config):
        try:
            formats.writable(layout).describe(pretrained)
        except UserError as error:
            raise UserError(f"export.formats: {error}") from None


def export(
    directory: Path,
    config: ConfigDict,
    pretrained: Checkpoint,
    params: PyTree,
    class_names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, Mapping[str, float]] | None,
    command: str,
) -> None:
    """Writes merged weights with head, labels, tokenizer and a model card.

    Args:
      directory: of Hugging Face's layout; every other that `config.export.formats` names is written
        beside it, in `directory`_LAYOUT. Each is written whole or not at all, and left alone where
        it exists.
      config: the run's options.
      pretrained: the anchor; the text tower and the tokenizer are taken from it.
      params: {"image_tower", "head"}, merged; NumPy arrays.
      class_names: of the head.
      rows: results of this model and of the anchor, for the card.
      ratios: `figures.ratio_summary` of the last merge, or None.
      command: how the run was started.
    """
    card = model_card(
        name=f"{config.pretrained}, fine-tuned on {_data(config)}",
        method=rows[-1]["method"],
        anchor=config.pretrained,
        fingerprint=pretrained.fingerprint,
        num_replicas=config.num_replicas,
        unit=config.merge.unit,
        rows=rows,
        ratios=ratios,
        command=command,
    )
    checkpoint = pretrained.with_replica(params, tuple(class_names))
    for layout in _layouts(config):
        place = directory
        if layout != HuggingFace.name:
            place = directory.with_name(f"{directory.name}_{layout}")
        if not place.exists():
            checkpoint_io.save(place, checkpoint, format=layout, texts={"README.md": card})


def _data(config: ConfigDict) -> str:
    """What it was fine-tuned on, by name; of anyone's own images, their directory's."""
    data = config.data
    return Path(data.root).name if data.name == "folder" else data.name


def _layouts(config: ConfigDict) -> list[str]:
    return list(dict.fromkeys((HuggingFace.name, *config.export.formats)))
