"""README.md of an exported model: where it comes from and how it was merged.

The card of a merge of files is made of the same parts: front matter, tables, and what made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from modelstock_jax import __version__
from modelstock_jax.registry import PAPER
from modelstock_jax.reporting.tables import label, markdown_table

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def model_card(
    *,
    name: str,
    method: str,
    anchor: str,
    fingerprint: str,
    num_replicas: int,
    unit: str,
    rows: Sequence[Mapping[str, Any]] = (),
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
      rows: results to show, as `tables.make_row` gives them.
      ratios: as `figures.ratio_summary` gives them.
      command: what was typed.

    Returns:
      Markdown with YAML front matter.
    """
    lines = heading(name, {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "merge", "model-stock", "modelstock-jax"],
    })  # fmt: skip
    lines += [
        f"{label({'method': method, 'num_replicas': num_replicas})}: {num_replicas} fine-tuned "
        f"copies of {anchor}, merged toward their center by the method of {PAPER}.",
        "",
    ]
    lines += table(["", ""], [
        ["anchor", anchor],
        ["fingerprint of the anchor's weights", f"`{fingerprint}`"],
        ["replicas", num_replicas],
        ["merge unit", unit],
    ])  # fmt: skip
    lines.append("")
    if ratios:
        lines += ["## Ratios", "", "t = 0 is the anchor, t = 1 the mean of the replicas.", ""]
        lines += table(["", "units", "median", "quartiles"], (
            [kind, v["count"], f"{v['median']:.3f}", f"{v['low']:.3f} to {v['high']:.3f}"]
            for kind, v in ratios.items()
        ), numbers=True)  # fmt: skip
        lines.append("")
    if rows:
        lines += ["## Results", "", markdown_table(rows)]
    lines += made_by(command)
    lines.append(listed_versions({"modelstock_jax": __version__, **installed(PACKAGES)}))
    return "\n".join(lines) + "\n"


def heading(name: str, front: Mapping[str, Any]) -> list[str]:
    """Lines of the YAML front matter, without what is None, and of the title."""
    # A JSON string or list is YAML too, and needs no rules for quoting.
    fields = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value is not None]
    return ["---", *fields, "---", "", f"# {name}", ""]


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = False
) -> list[str]:
    """Lines of a Markdown table.

    Args:
      columns: headings; they may be empty.
      rows: of cells.
      numbers: whether all columns but the first stand to the right.

    Example:
      >>> table(["", "t"], [["head", 0.9]], numbers=True)
      ['| | t |', '|---|---:|', '| head | 0.9 |']
    """
    rule = "|---|" + ("---:|" if numbers else "---|") * (len(columns) - 1)
    head = "|" + "".join(f" {column} |" if column else " |" for column in columns)
    return [head, rule, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def made_by(command: str | None) -> list[str]:
    """Lines of the section that ends with versions: what was typed, where it is known."""
    return ["## Made by", "", *(["```", command, "```", ""] if command else [])]


def listed_versions(versions: Mapping[str, str]) -> str:
    """Versions on one line."""
    return ", ".join(f"{package} {number}" for package, number in versions.items())


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of packages that a result depends on."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # Not installed by a packager: nothing to say.
            continue
    return found
