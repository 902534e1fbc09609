"""Write the results of a run: table, figures, metrics and the exported model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import to_json_types, write_text
from modelstock_jax.merging.trees import PyTree
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
    """Write results.json, results.md, metrics.jsonl and the figures; print the table.

    Args:
      workdir: directory of the run
      config: options of the run, stored in results.json
      documents: the anchor's, then one per seed: {"rows": ..., and "geometry", the
        `merging.report` of replicas trained without merging, if they were trained}
    """
    rows = [row for document in documents for row in document["rows"]]
    synthetic = config.data.name == "glyphs"
    write_results(workdir, rows, synthetic=synthetic, config=to_json_types(config.to_dict()))
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
    screen_table(rows, synthetic=synthetic)
    written = [
        name
        for name in ("results.md", "results.json", "figures", "model")
        if (workdir / name).exists()
    ]
    print(f"results in {workdir}: {', '.join(written)}")


def last_ratios(workdir: Path, run: str) -> dict[str, dict[str, float]] | None:
    """Return `figures.ratio_summary` of a run's last merge; None without a merge.

    Args:
      workdir: directory of the experiment
      run: name of the run, for example seed_0/merged
    """
    history = _merge_history(read_metrics(workdir / "runs" / run))
    return history[-1]["ratios"] if history else None


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


def check_export(config: ConfigDict, pretrained: Checkpoint) -> None:
    """Check before training that every format of `export.formats` supports the model.

    Args:
      config: options of the run
      pretrained: the anchor; its weights are not read

    Raises:
      UserError: a format is unknown or does not support the model
    """
    for name in _formats(config):
        try:
            formats.writable(name).describe(pretrained)
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
    """Write the merged model with its head, labels, tokenizer and a model card.

    Args:
      directory: output in Hugging Face's format; every other format of `config.export.formats` is
        written to `directory`_FORMAT. Each is written atomically and skipped if it exists
      config: options of the run
      pretrained: the anchor, with the text tower and the tokenizer
      params: {"image_tower", "head"}, merged NumPy arrays
      class_names: class names of the head
      rows: results of the anchor and of this model, for the model card
      ratios: `figures.ratio_summary` of the last merge, or None
      command: command that started the run
    """
    card = model_card(
        name=f"{config.pretrained}, fine-tuned on {_dataset_name(config)}",
        method=rows[-1]["method"],
        anchor=config.pretrained,
        anchor_checksum=pretrained.checksum,
        num_replicas=config.num_replicas,
        unit=config.merge.unit,
        model_type=pretrained.config.model_type,
        rows=rows,
        synthetic=config.data.name == "glyphs",
        ratios=ratios,
        command=command,
    )
    checkpoint = pretrained.with_replica(params, tuple(class_names))
    for name in _formats(config):
        path = directory
        if name != HuggingFace.name:
            path = directory.with_name(f"{directory.name}_{name}")
        if not path.exists():
            checkpoint_io.save(path, checkpoint, format=name, texts={"README.md": card})


def _dataset_name(config: ConfigDict) -> str:
    """Return the name of the dataset; for a folder of images, the name of the folder."""
    data = config.data
    return Path(data.root).name if data.name == "folder" else data.name


def _formats(config: ConfigDict) -> list[str]:
    return list(dict.fromkeys((HuggingFace.name, *config.export.formats)))
