"""The model card (README.md) of an exported model: its origin and how it was merged.

`checkpoint_merge` builds the card of a merge of files from the same functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from modelstock_jax import __version__
from modelstock_jax.registry import PAPER
from modelstock_jax.reporting.tables import label, markdown_table

_ZERO_SHOT = ("clip", "siglip")  # Models that classify from texts.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def model_card(
    *,
    name: str,
    method: str,
    anchor: str,
    anchor_checksum: str,
    num_replicas: int,
    unit: str,
    model_type: str = "clip",
    rows: Sequence[Mapping[str, Any]] = (),
    synthetic: bool = False,
    ratios: Mapping[str, Mapping[str, float]] | None = None,
    command: str | None = None,
) -> str:
    """Return the model card; equal arguments give equal text (no timestamps).

    Args:
      name: title of the card
      method: key of `registry.ROWS`, or another name
      anchor: name of the pretrained model: last part of a path, or a hub id
      anchor_checksum: checksum of the anchor's weights (`Checkpoint.checksum`)
      num_replicas: N
      unit: merge unit
      model_type: as in config.json
      rows: rows of `tables.make_row` to show
      synthetic: whether the rows are results of the synthetic benchmark
      ratios: result of `figures.ratio_summary`
      command: command that produced the model

    Returns:
      Markdown with YAML front matter
    """
    lines = heading(name, {
        "library_name": "transformers",
        "pipeline_tag": ("zero-shot-" if model_type in _ZERO_SHOT else "") + "image-classification",
        "tags": [model_type, "merge", "model-stock", "modelstock-jax"],
    })  # fmt: skip
    lines += [
        f"{label({'method': method, 'num_replicas': num_replicas})}: {num_replicas} fine-tuned "
        f"copies of {anchor}, merged toward their center by the method of {PAPER}.",
        "",
    ]
    lines += table(["", ""], [
        ["anchor", anchor],
        ["checksum of the anchor's weights", f"`{anchor_checksum}`"],
        ["replicas", num_replicas],
        ["merge unit", unit],
    ])  # fmt: skip
    lines.append("")
    if ratios:
        lines += [
            "## Ratios",
            "",
            "t = 0 is the anchor and t = 1 is the mean of the replicas.",
            "",
        ]
        lines += table(["", "units", "median", "quartiles"], (
            [kind, v["count"], f"{v['median']:.3f}", f"{v['low']:.3f} to {v['high']:.3f}"]
            for kind, v in ratios.items()
        ), numbers=True)  # fmt: skip
        lines.append("")
    if rows:
        lines += ["## Results", "", markdown_table(rows, synthetic=synthetic)]
    lines += made_by(command)
    lines.append(listed_versions({"modelstock_jax": __version__, **installed(PACKAGES)}))
    return "\n".join(lines) + "\n"


def heading(name: str, front: Mapping[str, Any]) -> list[str]:
    """Return the lines of the YAML front matter, without None values, and of the title.

    Args:
      name: title
      front: front matter
    """
    # A JSON string or list is valid YAML and needs no quoting rules.
    fields = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value is not None]
    return ["---", *fields, "---", "", f"# {name}", ""]


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = False
) -> list[str]:
    """Return the lines of a Markdown table.

    Args:
      columns: headings, may be empty
      rows: rows of cells
      numbers: whether to align all columns except the first to the right

    Example:
      >>> table(["", "t"], [["head", 0.9]], numbers=True)
      ['| | t |', '|---|---:|', '| head | 0.9 |']
    """
    rule = "|---|" + ("---:|" if numbers else "---|") * (len(columns) - 1)
    head = "|" + "".join(f" {column} |" if column else " |" for column in columns)
    return [head, rule, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def made_by(command: str | None) -> list[str]:
    """Return the first lines of the section with the command, if known, and the versions."""
    return ["## Made by", "", *(["```", command, "```", ""] if command else [])]


def listed_versions(versions: Mapping[str, str]) -> str:
    """Return the versions in one line."""
    return ", ".join(f"{package} {number}" for package, number in versions.items())


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # Not installed as a package: no version.
            continue
    return versions
