"""README.md of an exported model: where it comes from and how it was merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from modelstock_jax import __version__
from modelstock_jax.registry import PAPER
from modelstock_jax.reporting.tables import Row, label, markdown_table

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def model_card(
    *,
    name: str,
    method: str,
    anchor: str,
    fingerprint: str,
    num_replicas: int,
    unit: str,
    rows: Sequence[Row] = (),
    ratios: Mapping[str, Mapping[str, float]] | None = None,
    command: str | None = None,
) -> str:
    """The model card's text; the same arguments give the same text (no clock).

    Args:
      name: the model's, as the title.
      method: a key of `registry.ROWS`, or a name of your own.
      anchor: what was fine-tuned, as a reader knows it (a path's last part or a hub name).
      fingerprint: of the anchor's weights (`Checkpoint.fingerprint`).
      num_replicas: N.
      unit: the merge unit.
      rows: results to show, as `rows.make_row` gives them.
      ratios: as `figures.ratio_summary` gives them.
      command: what was typed.

    Returns:
      Markdown with YAML front matter.
    """
    front = {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "merge", "model-stock", "modelstock-jax"],
    }
    lines = ["---"]
    # A JSON string or list is YAML too, and needs no rules for quoting.
    lines += [f"{key}: {json.dumps(value)}" for key, value in front.items()]
    lines += ["---", "", f"# {name}", ""]
    lines += [
        f"{label({'method': method, 'num_replicas': num_replicas})}: {num_replicas} fine-tuned "
        f"copies of {anchor}, merged toward their centre by the method of {PAPER}.",
        "",
        "| | |",
        "|---|---|",
        f"| anchor | {anchor} |",
        f"| fingerprint of the anchor's weights | `{fingerprint}` |",
        f"| replicas | {num_replicas} |",
        f"| merge unit | {unit} |",
        "",
    ]
    if ratios:
        lines += ["## Ratios", "", "t = 0 is the anchor, t = 1 the mean of the replicas.", ""]
        lines += ["| | units | median | quartiles |", "|---|---:|---:|---:|"]
        lines += [
            f"| {kind} | {value['count']} | {value['median']:.3f} "
            f"| {value['low']:.3f} to {value['high']:.3f} |"
            for kind, value in ratios.items()
        ]
        lines.append("")
    if rows:
        lines += ["## Results", "", markdown_table(rows)]
    lines += ["## Made by", ""]
    if command:
        lines += ["```", command, "```", ""]
    lines.append(", ".join(f"{package} {number}" for package, number in installed().items()))
    return "\n".join(lines) + "\n"


def installed() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"modelstock_jax": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # Not installed by a packager: nothing to say.
            continue
    return found
