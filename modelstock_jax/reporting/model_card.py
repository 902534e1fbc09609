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
# The head of these models is a separate file, which transformers does not read.
_WITH_HEAD = """\
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import cached_file

name = "."  # This directory, or its name on the Hugging Face hub.
model = AutoModel.from_pretrained(name).eval()
processor = AutoImageProcessor.from_pretrained(name)
head = load_file(cached_file(name, "head.safetensors"))
pixels = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    features = {features}
    features = torch.nn.functional.normalize(features)
logits = features @ head["weight"].T + head["bias"]
print(model.config.id2label[logits.argmax().item()])"""
_CLASSIFIER = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

name = "."  # This directory, or its name on the Hugging Face hub.
model = AutoModelForImageClassification.from_pretrained(name).eval()
processor = AutoImageProcessor.from_pretrained(name)
pixels = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    logits = model(**pixels).logits
print(model.config.id2label[logits.argmax().item()])"""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def model_card(
    *,
    name: str,
    row: Mapping[str, Any],
    anchor: str,
    anchor_checksum: str,
    num_replicas: int,
    unit: str,
    model_type: str = "clip",
    for_transformers: bool = True,
    rows: Sequence[Mapping[str, Any]] = (),
    synthetic: bool = False,
    ratios: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    command: str | None = None,
) -> str:
    """Return the model card; equal arguments give equal text (no timestamps).

    Args:
      name: title of the card
      row: row of the results of this model, see `tables.make_row`
      anchor: name of the pretrained model: last part of a path, or a hub id
      anchor_checksum: checksum of the anchor's weights (`Checkpoint.checksum`)
      num_replicas: N
      unit: merge unit
      model_type: as in config.json
      for_transformers: whether transformers can load the directory
      rows: rows of `tables.make_row` to show
      synthetic: whether the rows are results of the synthetic benchmark
      ratios: title of a merge -> result of `figures.ratio_summary`
      command: command that produced the model

    Returns:
      Markdown with YAML front matter
    """
    lines = heading(name, {
        "library_name": "transformers" if for_transformers else "open_clip",
        "pipeline_tag": ("zero-shot-" if model_type in _ZERO_SHOT else "") + "image-classification",
        "tags": [model_type, "merge", "model-stock", "modelstock-jax"],
    })  # fmt: skip
    lines += [_origin(row, anchor, num_replicas), ""]
    lines += table(["", ""], [
        ["anchor", anchor],
        ["checksum of the anchor's weights", f"`{anchor_checksum}`"],
        ["replicas", num_replicas],
        ["merge unit", unit],
        ["row in the results of the run", label(row)],
        ["seed", row.get("seed")],
    ])  # fmt: skip
    lines.append("")
    if for_transformers:
        lines += _use(model_type)
    if ratios:
        lines += _ratios(ratios)
    if rows:
        lines += ["## Results", "", markdown_table(rows, wise_ft_alphas=None, synthetic=synthetic)]
    lines += made_by(command)
    lines.append(listed_versions({"modelstock_jax": __version__, **installed(PACKAGES)}))
    return "\n".join(lines) + "\n"


def _origin(row: Mapping[str, Any], anchor: str, num_replicas: int) -> str:
    """Return the first sentence: how the model was made."""
    name = label({"num_replicas": num_replicas, **row})
    if row.get("cost") == 1:
        return f"{name}: a fine-tuned copy of {anchor}."
    copies = f"{num_replicas} fine-tuned copies of {anchor}"
    if "model_stock" not in row["method"]:
        return f"{name}: {copies}, merged."
    return f"{name}: {copies}, merged toward their center by the method of {PAPER}."


def _use(model_type: str) -> list[str]:
    """Return the section with a program that classifies an image with transformers."""
    program = _WITH_HEAD if model_type in _ZERO_SHOT else _CLASSIFIER
    features = "model.vision_model(**pixels).pooler_output"
    if model_type == "clip":
        features = f"model.visual_projection({features})"
    needs = (
        "With torch, transformers and pillow installed, run this program in the model's directory, "
        "next to an image of yours:"
    )
    lines = ["```python", program.format(features=features), "```"]
    return ["## Classify an image", "", needs, "", *lines, ""]


def _ratios(ratios: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Return the section with the ratios of the merges."""
    lines = [
        "## Ratios",
        "",
        "Median of the ratio t (quartiles in parentheses). t = 0 is the anchor and t = 1 is the "
        "mean of the replicas.",
        "",
    ]
    if len(ratios) > 1:
        lines[2] += (
            " At a late merge during training, t is close to 1, because the replicas restart from "
            "the previous merged model and share its update; the first merge and a merge after "
            "training show the differences between the tensors."
        )
    kinds = dict.fromkeys(kind for summary in ratios.values() for kind in summary)
    counts = {kind: v["count"] for summary in ratios.values() for kind, v in summary.items()}
    lines += table(["", "units", *ratios], (
        [kind, counts[kind], *(_quartiles(summary.get(kind)) for summary in ratios.values())]
        for kind in kinds
    ), numbers=True)  # fmt: skip
    return [*lines, ""]


def _quartiles(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "–"
    return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


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
