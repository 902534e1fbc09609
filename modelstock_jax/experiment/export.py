"""The exported model of a run: which of its models it is, its directories and its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.models import checkpoint_io, formats
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.formats import HuggingFace
from modelstock_jax.reporting.model_card import model_card
from modelstock_jax.reporting.tables import read_results

WHICH = ("merged", "after_training", "best")
_IDENTITY = ("method", "of", "alpha", "unit", "replica", "seed")

Row = Mapping[str, Any]


def check_which(config: ConfigDict) -> None:
    """Check before anything is opened that the run has the model of `export.which`.

    Raises:
      UserError: the run has no replicas trained without merging, or no images to validate on
    """
    which, data = config.export.which, config.data
    merges = str(config.merge.every) != "never"
    if which == "after_training" and merges and not config.compare:
        raise UserError(
            "export.which='after_training' needs the replicas trained without merging; set "
            "--config.compare=True or --config.export.which=merged"
        )
    if which == "best" and data.name not in ("glyphs", "folder") and not data.held_out_per_class:
        raise UserError(_no_validation("data.held_out_per_class=26"))


def check_validation(config: ConfigDict, data: Benchmark) -> None:
    """Check before training that `export.which='best'` has validation images.

    Raises:
      UserError: there are none
    """
    if config.export.which == "best" and not len(data.validation):
        raise UserError(_no_validation("data.validation_fraction=0.1"))


def _no_validation(option: str) -> str:
    return (
        "export.which='best' compares models on held-out in-distribution images, but there are no "
        f"validation images; set --config.{option} or --config.export.which=merged"
    )


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


def exported_row(which: str, rows: Sequence[Row], merges: bool) -> int | None:
    """Return the index of the exported model's row; None if there is no merged model to export.

    Args:
      which: option `export.which`
      rows: rows of the first seed
      merges: whether the run merges during training; its merged model is then the last row

    Example:
      >>> rows = [{"method": "single_model", "validation": 91.0},
      ...         {"method": "model_stock", "validation": 92.0}, {"method": "periodic_model_stock"}]
      >>> exported_row("after_training", rows, True), exported_row("merged", rows, True)
      (1, 2)
      >>> exported_row("best", rows[:2], False), exported_row("merged", rows[:2], False)
      (1, None)
    """
    if which == "best":
        return max(range(len(rows)), key=lambda index: rows[index]["validation"])
    if which == "after_training":
        stocks = (row["method"] == "model_stock" and not row.get("unit") for row in rows)
        return next((index for index, is_stock in enumerate(stocks) if is_stock), None)
    return len(rows) - 1 if merges else None


def export(
    workdir: Path,
    config: ConfigDict,
    pretrained: Checkpoint,
    params: PyTree,
    class_names: Sequence[str],
    rows: Sequence[Row],
    ratios: Mapping[str, Mapping[str, Mapping[str, float]]],
    command: str,
) -> None:
    """Write a model with its head, labels, tokenizer and a model card.

    A directory that exists is not changed if the results of the run, next to it, mark an equal row.

    Args:
      workdir: directory of the run; each of its `directories` is written atomically
      config: options of the run
      pretrained: the anchor, with the text tower and the tokenizer
      params: {"image_tower", "head"}, NumPy arrays
      class_names: class names of the head
      rows: results of the anchor and of this model, for the model card
      ratios: title -> `figures.ratio_summary` of a merge, for the model card
      command: command that started the run
    """
    overwrite = not _is_exported(workdir, rows[-1])
    if overwrite:  # A run that is killed before the new results are written exports again.
        (workdir / "results.json").unlink(missing_ok=True)
    checkpoint = pretrained.with_replica(params, tuple(class_names))
    for name, path in directories(workdir, config).items():
        if path.exists() and not overwrite:
            continue
        card = model_card(
            name=f"{config.pretrained}, fine-tuned on {_dataset_name(config)}",
            row=rows[-1],
            anchor=config.pretrained,
            anchor_checksum=pretrained.checksum,
            num_replicas=config.num_replicas,
            unit=config.merge.unit,
            model_type=pretrained.config.model_type,
            for_transformers=name == HuggingFace.name,
            rows=rows,
            synthetic=config.data.name == "glyphs",
            ratios=ratios,
            command=command,
        )
        texts = {"README.md": card}
        checkpoint_io.save(path, checkpoint, format=name, overwrite=overwrite, texts=texts)


def directories(workdir: Path, config: ConfigDict) -> dict[str, Path]:
    """Return the directory of the exported model in each format."""
    return {
        name: workdir / ("model" if name == HuggingFace.name else f"model_{name}")
        for name in _formats(config)
    }


def _is_exported(workdir: Path, row: Row) -> bool:
    """Whether the results in `workdir` mark this row, with the same accuracies and distances.

    Results of older versions mark the last row.
    """
    try:
        rows = read_results(workdir)["rows"]
    except UserError:
        return False
    rows = [r for r in rows if r.get("seed") == row.get("seed")]
    before = next((r for r in rows if r.get("exported")), rows[-1] if rows else {})
    # A measure differs if `runs` was removed and the models were trained with another config.
    measures = (before.keys() & row.keys()) - {"exported"}
    return all(before.get(name) == row.get(name) for name in {*_IDENTITY, *measures})


def _dataset_name(config: ConfigDict) -> str:
    """Return the name of the dataset; for a folder of images, the name of the folder."""
    data = config.data
    return Path(data.root).name if data.name == "folder" else data.name


def _formats(config: ConfigDict) -> list[str]:
    return list(dict.fromkeys((HuggingFace.name, *config.export.formats)))
