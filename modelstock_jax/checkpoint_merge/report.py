"""What is left beside merged tensors: merge_report.json, and README.md, the model card.

The report holds everything that a merge measured and was made of. Neither file holds a clock.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock_jax import __version__
from modelstock_jax.checkpoint_merge.executor import MergeResult
from modelstock_jax.checkpoint_merge.hf_config import CONFIG, read_config
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.plan import Plan
from modelstock_jax.checkpoint_merge.sources import MODULES, PIPELINE
from modelstock_jax.merging.units import ROLES, role
from modelstock_jax.registry import COMMANDS
from modelstock_jax.reporting.model_card import (
    heading,
    installed,
    listed_versions,
    made_by,
    table,
)
from modelstock_jax.tensor_files.hub import HUB_ID

FORMAT = 1
PACKAGES = ("numpy", "ml_dtypes")
# These leave the result as it is.
_NOT_WHAT = ("checksum", "threads", "window_bytes")


def document(
    plan: Plan, report: MergeResult, digests: Sequence[Mapping[str, str]], command: str
) -> dict[str, Any]:
    """The report as JSON holds it; the same merge gives the same document.

    Args:
      plan: of the merge.
      report: of the merge.
      digests: file name -> digest (`crc32:...`) of each input, the base first; empty where not
        computed.
      command: what was typed.

    Returns:
      Plain values: `units` has a row a tensor, `not_merged` the others and why.
    """
    inputs = [
        {"model": source.label, "bytes": source.num_bytes, "files": dict(files),
         "notes": list(source.notes)}
        for source, files in zip((plan.base, *plan.finetuned), digests, strict=True)
    ]  # fmt: skip
    return {
        "format": FORMAT,
        "base": inputs[0] if plan.anchored else None,
        "models": inputs[1:],
        "options": asked(plan.options),
        "units": report.rows,
        "outcomes": report.outcomes,
        "ratios": ratios(report.rows),
        "predicted_distance": report.distance,
        "anchor_rounding": plan.rounding,
        "not_merged": [
            {"name": name, "takes": tensor.action, "reason": tensor.reason}
            for name, tensor in plan.tensors.items() if tensor.action != "merge"
        ],
        "notes": list(plan.notes),
        "outputs": report.checksums,
        "command": command,
        "versions": versions(),
    }  # fmt: skip


def asked(options: Options) -> dict[str, Any]:
    """The options that make the result, those left at their default but for method and unit."""
    default = Options()
    values = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options) if field.name not in _NOT_WHAT
    }  # fmt: skip
    keep = ("method", "unit")
    return {k: v for k, v in values.items() if k in keep or v != getattr(default, k)}


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Count, least, median and largest ratio of the tensors that have one, by role.

    Example:
      >>> rows = [{"name": f"layers.{i}.mlp.w", "cosine": 0.5, "ratio": i / 4} for i in range(4)]
      >>> ratios(rows)["all"]
      {'tensors': 4, 'min': 0.0, 'median': 0.375, 'max': 0.75}
    """
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["cosine"] is not None and row["ratio"] is not None:
            found["all"].append(row["ratio"])
            found[role(row["name"])].append(row["ratio"])
    return {
        name: {
            "tensors": len(found[name]),
            "min": min(found[name]),
            "median": statistics.median(found[name]),
            "max": max(found[name]),
        }
        for name in ("all", *ROLES) if name in found
    }  # fmt: skip


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    python = platform.python_version()
    return {"modelstock_jax": __version__, "python": python, **installed(PACKAGES)}


# README.md of a merged checkpoint: a model card that Hugging Face's hub reads.


def card(document: Mapping[str, Any], *, name: str, library: str | None) -> str:
    """The card's text.

    Args:
      document: as `document` gives it.
      name: the model's title.
      library: `library_name` for the metadata, as `library_name` finds it; None leaves it out.

    Returns:
      Markdown with YAML front matter.
    """
    inputs = [*filter(None, [document["base"]]), *document["models"]]
    method, unit = document["options"]["method"], document["options"]["unit"]
    names = [hub_id(source["model"]) for source in inputs]
    lines = heading(name, {
        "library_name": library,
        "base_model": sorted({n for n in names if n}, key=names.index) or None,
        "base_model_relation": "merge" if any(names) else None,
        "tags": ["merge", "model-stock", "modelstock-jax"]
        if "stock" in method else ["merge", "modelstock-jax"],
    })  # fmt: skip
    lines += [
        f"{merged(document, '`')}, merged by {_method(document)}; {_unit(unit)} for itself.",
        "",
        *_setup(document, inputs),
    ]
    lines += ["", "## Ratios", ""]
    lines += _ratios(document)
    if document["base"] is not None:
        drawn = "Angle and norm" if len(document["models"]) > 1 else "Norm"
        lines += [
            f"![{drawn} of each tensor's update over the depth of the network](angles.png)",
            "",
            "Every tensor's angle, ratio and policy: `merge_report.json`.",
            "",
        ]
    notes = [*document["notes"], *(note for source in inputs for note in source["notes"])]
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    lines += made_by(document["command"])
    files = [(f"`{source['model']}`", source["files"]) for source in inputs]
    lines += table(["file", "checksum"], (
        [f"{model}: {file}", f"`{digest}`"]
        for model, digests in [*files, ("this model", document["outputs"])]
        for file, digest in digests.items()
    ))  # fmt: skip
    return "\n".join([*lines, "", listed_versions(document["versions"])]) + "\n"


def merged(document: Mapping[str, Any], quote: str = "") -> str:
    """What was merged: the number of models, and of which base where there is one.

    Example:
      >>> merged({"models": [1, 2], "base": None}), merged({"models": [1], "base": {"model": "b"}})
      ('2 models', '1 fine-tune of b')
    """
    count, base = len(document["models"]), document["base"]
    what = f"{count} {_model(document)}{'s' if count > 1 else ''}"
    return what if base is None else f"{what} of {quote}{base['model']}{quote}"


def hub_id(label: str) -> str | None:
    """The hub's name of an input, or None for a path.

    Example:
      >>> hub_id("org/name@main"), hub_id("./run1/model")
      ('org/name', None)
    """
    found = HUB_ID.fullmatch(label.split("+")[0])
    return found["repo"] if found and not Path(found["repo"]).exists() else None


def library_name(directory: Path) -> str | None:
    """The library that opens a checkpoint, by the files next to its tensors."""
    config = read_config(directory) or {}
    if "_class_name" in config:
        return "diffusers"
    if "pretrained_cfg" in config:
        return "timm"
    known = {
        PIPELINE: "diffusers",
        MODULES: "sentence-transformers",
        "open_clip_config.json": "open_clip",
        CONFIG: "transformers",
    }
    return next((name for file, name in known.items() if (directory / file).is_file()), None)


def _value(value: Any) -> str:
    text = json.dumps(value)
    return f"`{text}`" if len(text) < 200 else "by tensor, see `merge_report.json`"


def _setup(document: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the models and of the options that are not at their defaults."""
    rows = [
        [f"{_model(document)} {i}" if i else "base", f"`{source['model']}`"]
        for i, source in enumerate(inputs, 0 if document["base"] else 1)
    ]
    others = {k: v for k, v in document["options"].items() if k not in ("method", "unit")}
    rows += [[key.replace("_", " "), _value(v)] for key, v in others.items()]
    return table(["", ""], rows)


def _method(document: Mapping[str, Any]) -> str:
    text = COMMANDS[document["options"]["method"]].description
    return text if document["base"] else text.replace("fine-tunes", "models")


def _model(document: Mapping[str, Any]) -> str:
    return "model" if document["base"] is None else "fine-tune"


def _ratios(document: Mapping[str, Any]) -> list[str]:
    lines = ["t = 0 is the base, t = 1 the mean of the fine-tunes.", ""]
    method, alpha = (document["options"].get(key) for key in ("method", "alpha"))
    if document["ratios"]:
        lines += table(["", "tensors", "least", "median", "largest"], (
            [kind, v["tensors"], *(f"{v[key]:.3f}" for key in ("min", "median", "max"))]
            for kind, v in document["ratios"].items()
        ), numbers=True)  # fmt: skip
    else:
        none = document["base"] is None or method in ("ties", "slerp", "task_arithmetic")
        lines[:2] = [
            "This method has no ratio."
            if none
            else f"t = {alpha:g} for every tensor."
            if method == "wise_ft"
            else "No tensor has an angle."
        ]
    policies = ", ".join(
        f"{name.replace('_', ' ')} {n}"
        for name, n in sorted(document["outcomes"].items(), key=lambda item: -item[1])
    )
    lines += ["", f"Units by policy: {policies or 'none'}."]
    if left := len(document["not_merged"]):
        lines[-1] += f" Not merged: {left} tensor{'s' if left > 1 else ''}."
    return [*lines, ""]


def _unit(unit: str) -> str:
    return {
        "tensor": "each tensor",
        "layer": "each layer (q, k and v joined)",
        "filter": "each output channel",
        "head": "each attention head",
        "block": "each transformer block",
        "global": "the whole model",
    }[unit]
