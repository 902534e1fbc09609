"""Report (merge_report.json) and model card (README.md) of a merged checkpoint.

The report contains the inputs, the options and all measurements of a merge. Neither file contains
timestamps.
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
from modelstock_jax.checkpoint_merge.adapter_plan import AdapterPlan
from modelstock_jax.checkpoint_merge.executor import MergeResult
from modelstock_jax.checkpoint_merge.hf_config import CONFIG, read_config
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.plan import Plan
from modelstock_jax.checkpoint_merge.sources import MODULES, PIPELINE
from modelstock_jax.merging.tensor_roles import ROLES, role
from modelstock_jax.registry import COMMANDS
from modelstock_jax.reporting.model_card import (
    heading,
    installed,
    listed_versions,
    made_by,
    table,
)
from modelstock_jax.tensor_files.hub import HUB_ID

FORMAT = 2
PACKAGES = ("numpy", "ml_dtypes")
# These options do not change the result.
_WITHOUT_EFFECT = ("checksum", "threads", "window_bytes")
# Outcomes whose name in the report is not its label with `_` for spaces.
_OUTCOME_LABELS = {
    "clamped": "clamped to 0",
    "fallback_to_eq3": "fallback to eq. 3",
    "non_finite": "non-finite",
}
_UNIT_LABELS = {
    "tensor": "each tensor",
    "layer": "each layer (q, k and v joined)",
    "filter": "each output channel",
    "head": "each attention head",
    "block": "each transformer block or residual block",
    "global": "the entire model",
}


def report_document(
    plan: Plan, result: MergeResult, checksums: Sequence[Mapping[str, str]], command: str
) -> dict[str, Any]:
    """Return the content of merge_report.json; equal merges give equal documents.

    Args:
      plan: plan of the merge
      result: result of the merge
      checksums: file name -> checksum (`crc32:...`) for each input, the base first; empty if not
        computed
      command: command line of the merge

    Returns:
      Plain values. `units` has a row per merged tensor; `not_merged` lists the other tensors, each
      with the source of its values and the reason.
    """
    inputs = [
        {"model": source.label, "bytes": source.num_bytes, "files": dict(files),
         "notes": list(source.notes),
         **({"parts": [part.label for part in source.parts]} if source.parts else {})}
        for source, files in zip(plan.sources, checksums, strict=True)
    ]  # fmt: skip
    document = {
        "format": FORMAT,
        "base": inputs[0] if plan.anchored else None,
        "models": inputs[1:],
        "options": result_options(plan.options),
        "units": result.rows,
        "outcomes": result.outcomes,
        "ratios": ratio_summary(result.rows),
        "predicted_distance": result.distance,
        "anchor_rounding": plan.rounding,
        "not_merged": [
            {"name": name, "source": tensor.action, "reason": tensor.reason}
            for name, tensor in plan.tensors.items() if tensor.action != "merge"
        ],
        "notes": list(plan.notes),
        "outputs": result.checksums,
        "command": command,
        "versions": package_versions(),
    }  # fmt: skip
    if isinstance(plan, AdapterPlan):
        document["adapter"] = {
            "base_model": plan.config.get("base_model_name_or_path") or None,
            **adapter_summary(result.rows),
        }  # fmt: skip
    return document


def adapter_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the ranks and dtypes of a merged adapter, and the errors of its updates.

    Args:
      rows: rows of the report

    Returns:
      `rank`: min and max; `dtypes`; `truncation_error` of the maximum rank and `rounding_error` of
      the dtype, each with max, median and the tensor with the max. The errors are the Frobenius
      norm of the error of a tensor's update, divided by the norm of the update.

    Example:
      >>> row = {"name": "q", "rank": 8, "dtype": "float32", "rounding_error": 0.0}
      >>> adapter_summary([row | {"truncation_error": 0.25}])["truncation_error"]
      {'max': 0.25, 'median': 0.25, 'tensor': 'q'}
    """
    rows = [row for row in rows if "rank" in row]
    if not rows:
        return {}
    ranks = [row["rank"] for row in rows]
    summary: dict[str, Any] = {
        "rank": {"min": min(ranks), "max": max(ranks)},
        "dtypes": sorted({row["dtype"] for row in rows}),
    }
    for key in ("truncation_error", "rounding_error"):
        worst = max(rows, key=lambda row: row[key])
        median = statistics.median(row[key] for row in rows)
        summary[key] = {"max": worst[key], "median": median, "tensor": worst["name"]}
    return summary


def adapter_texts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the ranks of a merged adapter, and the errors of its updates, as pairs of texts.

    An error of float32, below 1e-6, is left out.

    Args:
      summary: from `adapter_summary`

    Example:
      >>> adapter_texts({})
      []
    """
    if "rank" not in summary:
        return []
    low, high = summary["rank"]["min"], summary["rank"]["max"]
    texts = [("rank", str(high) if low == high else f"{low} to {high}")]
    causes = {
        "truncation_error": ("truncation", "by --rank"),
        "rounding_error": ("rounding", f"to {' and '.join(summary['dtypes'])}"),
    }
    for key, (name, cause) in causes.items():
        error = summary[key]
        if error["max"] > 1e-6:
            texts.append((
                name,
                f"relative error of an update {cause}: median {error['median']:.2g}, max "
                f"{error['max']:.2g} in {error['tensor']}",
            ))  # fmt: skip
    return texts


def result_options(options: Options) -> dict[str, Any]:
    """Return method, unit, and the other options that change the result and are not defaults."""
    default = Options()
    values = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options) if field.name not in _WITHOUT_EFFECT
    }  # fmt: skip
    always = ("method", "unit")
    return {k: v for k, v in values.items() if k in always or v != getattr(default, k)}


def ratio_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return count, min, median and max of the ratios by role, over tensors that have a ratio.

    Example:
      >>> rows = [{"name": f"layers.{i}.mlp.w", "cosine": 0.5, "ratio": i / 4} for i in range(4)]
      >>> ratio_summary(rows)["all"]
      {'tensors': 4, 'min': 0.0, 'median': 0.375, 'max': 0.75}
    """
    ratios: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["cosine"] is not None and row["ratio"] is not None:
            ratios["all"].append(row["ratio"])
            ratios[role(row["name"])].append(row["ratio"])
    return {
        name: {
            "tensors": len(ratios[name]),
            "min": min(ratios[name]),
            "median": statistics.median(ratios[name]),
            "max": max(ratios[name]),
        }
        for name in ("all", *ROLES) if name in ratios
    }  # fmt: skip


def outcome_label(name: str) -> str:
    """Return the label of an outcome of the report.

    Example:
      >>> outcome_label("clamped"), outcome_label("one_model_changed")
      ('clamped to 0', 'one model changed')
    """
    return _OUTCOME_LABELS.get(name, name.replace("_", " "))


def outcome_counts(outcomes: Mapping[str, int]) -> str:
    """Return the number of units per outcome as text, the most frequent outcome first.

    Example:
      >>> outcome_counts({"scalar": 1, "interpolated": 1200})
      '1,200 interpolated, 1 scalar'
    """
    ordered = sorted(outcomes.items(), key=lambda item: -item[1])
    return ", ".join(f"{count:,} {outcome_label(name)}" for name, count in ordered)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that the values depend on."""
    python = platform.python_version()
    return {"modelstock_jax": __version__, "python": python, **installed(PACKAGES)}


def model_card(document: Mapping[str, Any], *, name: str, library: str | None) -> str:
    """Return README.md of a merged checkpoint: a model card for the Hugging Face hub.

    Args:
      document: content of the report, from `report_document`
      name: title of the model
      library: `library_name` in the metadata, from the function of that name; None to omit it

    Returns:
      Markdown with YAML front matter.
    """
    inputs = [*filter(None, [document["base"]]), *document["models"]]
    method, unit = document["options"]["method"], document["options"]["unit"]
    names = [hub_id(x) for source in inputs for x in source.get("parts", [source["model"]])]
    adapter = document.get("adapter")
    bases = sorted({n for n in names if n}, key=names.index) or None
    if adapter is not None:
        bases = adapter["base_model"]
    lines = heading(name, {
        "library_name": library,
        "base_model": bases,
        "base_model_relation": None if bases is None else "adapter" if adapter else "merge",
        "tags": ["merge", "model-stock", "modelstock-jax"]
        if "stock" in method else ["merge", "modelstock-jax"],
    })  # fmt: skip
    lines += [
        f"{merged_models(document, '`')}, merged by {_method(document)}. "
        f"Merge unit: {_UNIT_LABELS[unit]}.",
        "",
        *_setup(document, inputs),
        "",
        *_adapter(document),
        "## Ratios",
        "",
        *_ratios(document),
    ]
    if document["base"] is not None if adapter is None else "rank" in adapter:
        quantity = "Angle and norm" if len(document["models"]) > 1 else "Norm"
        lines += [
            f"![{quantity} of each tensor's update by depth in the network](angles.png)",
            "",
            "`merge_report.json` contains the angle, ratio and outcome of every tensor.",
            "",
        ]
    notes = [*document["notes"], *(note for source in inputs for note in source["notes"])]
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    lines += made_by(document["command"])
    files = [(f"`{source['model']}`", source["files"]) for source in inputs]
    lines += table(["file", "checksum"], (
        [f"{model}: {file}", f"`{checksum}`"]
        for model, checksums in [*files, ("this model", document["outputs"])]
        for file, checksum in checksums.items()
    ))  # fmt: skip
    return "\n".join([*lines, "", listed_versions(document["versions"])]) + "\n"


def merged_models(document: Mapping[str, Any], quote: str = "") -> str:
    """Return the number of merged models and their base, if there is one.

    Example:
      >>> merged_models({"models": [1, 2], "base": None})
      '2 models'
      >>> merged_models({"models": [1], "base": {"model": "b"}})
      '1 fine-tune of b'
    """
    count, base = len(document["models"]), document["base"]
    models = f"{count} {_model(document)}{'s' if count > 1 else ''}"
    return models if base is None else f"{models} of {quote}{base['model']}{quote}"


def hub_id(label: str) -> str | None:
    """Return the repository of an input on the hub; None for a path.

    Example:
      >>> hub_id("org/name@main"), hub_id("./run1/model")
      ('org/name', None)
    """
    match = HUB_ID.fullmatch(label.split("+")[0])
    return match["repo"] if match and not Path(match["repo"]).exists() else None


def library_name(directory: Path) -> str | None:
    """Return the library that opens a checkpoint, by the files next to its tensors."""
    config = read_config(directory) or {}
    if "_class_name" in config:
        return "diffusers"
    if "pretrained_cfg" in config:
        return "timm"
    libraries = {
        PIPELINE: "diffusers",
        MODULES: "sentence-transformers",
        "open_clip_config.json": "open_clip",
        "adapter_config.json": "peft",
        CONFIG: "transformers",
    }
    return next((name for file, name in libraries.items() if (directory / file).is_file()), None)


def _value(value: Any) -> str:
    text = json.dumps(value)
    return f"`{text}`" if len(text) < 200 else "per tensor; see `merge_report.json`"


def _setup(document: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the models and of the options that are not defaults."""
    rows = [
        [f"{_model(document)} {i}" if i else "base", f"`{source['model']}`"]
        for i, source in enumerate(inputs, 0 if document["base"] else 1)
    ]
    others = {k: v for k, v in document["options"].items() if k not in ("method", "unit")}
    rows += [[key.replace("_", " "), _value(v)] for key, v in others.items()]
    return table(["", ""], rows)


def _method(document: Mapping[str, Any]) -> str:
    text = COMMANDS[document["options"]["method"]].description
    if document.get("adapter") is not None:
        return text.replace("fine-tuned models", "adapters")
    return text if document["base"] else text.replace("fine-tuned models", "models")


def _adapter(document: Mapping[str, Any]) -> list[str]:
    """Return the section of a merged adapter."""
    texts = adapter_texts(document.get("adapter") or {})
    return ["## Adapter", "", *table(["", ""], texts), ""] if texts else []


def _model(document: Mapping[str, Any]) -> str:
    if document.get("adapter") is not None:
        return "adapter"
    return "model" if document["base"] is None else "fine-tune"


def _ratios(document: Mapping[str, Any]) -> list[str]:
    method, alpha = (document["options"].get(key) for key in ("method", "alpha"))
    if document["ratios"]:
        lines = ["t = 0 is the base, t = 1 the mean of the fine-tunes.", ""]
        lines += table(["", "tensors", "min", "median", "max"], (
            [kind, v["tensors"], *(f"{v[key]:.3f}" for key in ("min", "median", "max"))]
            for kind, v in document["ratios"].items()
        ), numbers=True)  # fmt: skip
    elif document["base"] is None or not COMMANDS[method].has_ratio:
        lines = ["This method has no ratio."]
    elif method == "wise_ft":
        lines = [f"t = {alpha:g} for every tensor."]
    else:
        lines = ["No tensor has an angle."]
    counts = f"Units by outcome: {outcome_counts(document['outcomes']) or 'none'}."
    if count := len(document["not_merged"]):
        counts += f" Not merged: {count} tensor{'s' if count > 1 else ''}."
    return [*lines, "", counts, ""]
