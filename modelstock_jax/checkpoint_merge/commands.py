"""Commands of `modelstock`: from the parsed arguments to the printed result."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from modelstock_jax.checkpoint_merge import display, hf_config, quantization
from modelstock_jax.checkpoint_merge.adapter_merge import run_adapter
from modelstock_jax.checkpoint_merge.adapter_plan import AdapterPlan, plan_adapter
from modelstock_jax.checkpoint_merge.adapter_sources import open_adapters
from modelstock_jax.checkpoint_merge.display import PlotProcess
from modelstock_jax.checkpoint_merge.executor import MergeResult, measure, run
from modelstock_jax.checkpoint_merge.layer_stack import Layers, stacked
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.output import check_out
from modelstock_jax.checkpoint_merge.plan import Plan, make_plan
from modelstock_jax.checkpoint_merge.recipe import LayerRange, Recipe, options_of, read_recipe
from modelstock_jax.checkpoint_merge.report import (
    library_name,
    model_card,
    ratio_summary,
    report_document,
)
from modelstock_jax.checkpoint_merge.run_average import average_recipe
from modelstock_jax.checkpoint_merge.sources import Source, open_source
from modelstock_jax.checkpoint_merge.vocabulary import align
from modelstock_jax.errors import UserError
from modelstock_jax.fileio import to_json_types, write_json, write_text
from modelstock_jax.merging.attention_names import projections
from modelstock_jax.registry import COMMANDS
from modelstock_jax.reporting.progress import ByteProgress

REPORT, MODEL_CARD, FIGURE = "merge_report.json", "README.md", "angles.png"
# `compare` writes no model, so these mismatches are not errors.
_LENIENT = {"vocab_mismatch": "base", "missing_tensors": "base", "tied_head": "untie"}
_RECIPE_SUFFIXES = (".yml", ".yaml")


def merge(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run `modelstock merge`.

    Args:
      arguments: parsed arguments
      argv: arguments as typed; the report contains them

    Raises:
      UserError: an option, a model or the output directory is not valid
    """
    _merge(_models(arguments), arguments, argv)


def average(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run `modelstock average`: a linear merge with weights from the steps of the checkpoints.

    Args:
      arguments: parsed arguments
      argv: arguments as typed; the report contains them

    Raises:
      UserError: an option, a model or the output directory is not valid
    """
    weights, ema, schedule = arguments.of_average, arguments.ema, arguments.schedule
    recipe = average_recipe(arguments.models, weights=weights, ema=ema, schedule=schedule)
    _merge(recipe, arguments, argv)


def _merge(recipe: Recipe, arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    arguments.out = _output_directory(arguments)
    plan = _plan_merge(recipe, _typed_options(arguments))
    messages, notes = Console(stderr=True), [*recipe.notes, *_notes(plan)]
    _print_notes(notes, messages)
    if arguments.dry_run:
        _print_plan(plan, arguments, notes)
        return
    document, result = _write_merge(plan, arguments, shlex.join(["modelstock", *argv]), messages)
    if arguments.json:
        _print_json(document | {"out": arguments.out, "seconds": result.seconds})
    else:
        display.show_merge(document, result, arguments.out, Console())


def compare(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run `modelstock compare`.

    Args:
      arguments: parsed arguments
      argv: arguments as typed; not used

    Raises:
      UserError: an option or a model is not valid
    """
    del argv
    arguments.plot = arguments.plot and os.path.expanduser(arguments.plot)
    if arguments.plot and Path(arguments.plot).suffix != ".png":
        raise UserError(f"--plot {arguments.plot}: the name of the figure must end in .png")
    recipe = _models(arguments)
    options = _typed_options(arguments)
    base, finetuned = _open_models(recipe, options)
    plan = make_plan(base, finetuned, _complete_options(_LENIENT | options, base), lenient=True)
    messages = Console(stderr=True)
    _print_notes(_notes(plan), messages)
    with ByteProgress("comparing", messages) as progress:
        result = measure(plan, progress=progress)
    summary = ratio_summary(result.rows)
    if arguments.plot:
        plot = PlotProcess(0)
        plot.begin(Path(arguments.plot), result.rows)
        plot.finish()
        messages.print(
            f"figure written to {arguments.plot}", highlight=False, markup=False, soft_wrap=True
        )
    if arguments.json:
        _print_json({
            "base": base.label, "models": [source.label for source in finetuned],
            "unit": plan.options.unit, "units": result.rows, "ratios": summary,
            "outcomes": result.outcomes, "predicted_distance": result.distance,
            "anchor_rounding": plan.rounding, "notes": _notes(plan),
        })  # fmt: skip
    else:
        display.show_comparison(result.rows, summary, Console())


def _plan_merge(recipe: Recipe, options: dict[str, Any]) -> Plan:
    """Open the models and plan their merge.

    Args:
      recipe: models, and the options that a recipe file sets
      options: options that were typed
    """
    if conflicts := sorted(options.keys() & (recipe.options.keys() | recipe.settings.keys())):
        raise UserError(
            f"the recipe already sets {conflicts[0]}; remove the option, or change the recipe"
        )
    if options.get("as_adapter"):
        return _plan_adapter(recipe, options)
    base, finetuned = _open_models(recipe, options)
    if recipe.tokenizer is not None:
        base, *finetuned = align(
            [base, *finetuned], recipe.tokenizer, anchored=recipe.base is not None
        )
    return make_plan(
        base,
        finetuned,
        _complete_options({**options_of(recipe, list(base.tensors)), **options}, base),
        anchored=recipe.base is not None,
    )


def _plan_adapter(recipe: Recipe, options: dict[str, Any]) -> AdapterPlan:
    """Open adapters, with or without their base, and plan their merge into one adapter."""
    unsupported = {
        "values that differ by layer or filter": recipe.settings,
        "slices": recipe.slices is not None,
        "tokenizer": recipe.tokenizer is not None,
    }
    for name in (name for name, is_set in unsupported.items() if is_set):
        raise UserError(
            f"--as-adapter does not support {name} of a recipe; remove them, or remove "
            "--as-adapter to write a complete model"
        )
    options = {**recipe.options, **options}
    checked = Options(**options)  # Before any file is opened.
    _check_given_once(recipe, checked.method)
    read_as = quantization.as_weights if checked.dequantize else quantization.as_stored
    base, adapters = open_adapters(recipe.base, recipe.models, read_as)
    return plan_adapter(
        base, adapters, checked if base is None else _complete_options(options, base)
    )


def _write_merge(
    plan: Plan, arguments: argparse.Namespace, command: str, messages: Console
) -> tuple[dict[str, Any], MergeResult]:
    """Write the merged checkpoint with its report, model card and figure.

    Args:
      plan: plan of the merge
      arguments: parsed arguments
      command: command line for the report
      messages: console for the progress

    Returns:
      The content of the report, and the result.
    """
    documents: list[dict[str, Any]] = []
    name = Path(os.path.abspath(arguments.out)).name
    # Without a base there are no angles and no norms, except those of adapters.
    has_angles = plan.anchored or plan.options.as_adapter
    plot = PlotProcess(plan.bytes_read if has_angles else 0)
    execute: Callable[..., MergeResult] = run_adapter if isinstance(plan, AdapterPlan) else run

    def measured(directory: Path, rows: list[dict[str, Any]]) -> None:
        if has_angles and rows:
            plot.begin(directory / FIGURE, rows)

    def finish(directory: Path, result: MergeResult) -> None:
        document = report_document(plan, result, [get() for get in checksums], command)
        _write_report(directory, document, name)
        if has_angles and result.rows:
            plot.finish()
        documents.append(document)

    with ThreadPoolExecutor(1) as pool:
        checksums = _start_checksums(plan, pool)
        try:
            with ByteProgress("merging", messages) as progress:
                result = execute(
                    plan,
                    arguments.out,
                    overwrite=arguments.overwrite,
                    progress=progress,
                    measured=measured,
                    finish=finish,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            plot.close()
    return documents[0], result


def _output_directory(arguments: argparse.Namespace) -> str | None:
    """Return the directory to write; None for a dry run without --out."""
    out = arguments.out and os.path.expanduser(arguments.out)
    if not out and not arguments.dry_run:
        raise UserError("--out DIR is missing; give the directory to write the merged model to")
    if (out or "").endswith(".safetensors"):
        raise UserError(
            f"--out {out}: the output is a directory that contains model.safetensors; give a name "
            "that does not end in .safetensors"
        )
    return out


def _notes(plan: Plan) -> list[str]:
    """Return the notes about the models, then those about the plan."""
    return [*(note for source in plan.sources for note in source.notes), *plan.notes]


def _print_notes(notes: Iterable[str], messages: Console) -> None:
    for note in notes:
        messages.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _models(arguments: argparse.Namespace) -> Recipe:
    """Return the models, from a recipe file or as typed."""
    models = arguments.models
    path = getattr(arguments, "recipe", None)
    recipes = [
        text
        for text in models
        if text.endswith(_RECIPE_SUFFIXES) and not os.path.isdir(os.path.expanduser(text))
    ]
    if recipes and "recipe" not in arguments:
        raise UserError(
            f"{recipes[0]}: only modelstock merge accepts a recipe; give BASE FT1 FT2 ..."
        )
    if recipes and path is None:
        if models[0] != recipes[0]:
            raise UserError(
                f"{recipes[0]}: a recipe must be the first argument: modelstock merge RECIPE DIR"
            )
        path, *models = models
        if len(models) == 1 and not arguments.out:  # As in `mergekit-yaml RECIPE DIR`.
            arguments.out, models = models[0], []
    no_base = getattr(arguments, "no_base", False)
    if path:
        if no_base:
            raise UserError("--no-base does not apply to a recipe; remove base_model from it")
        if models:
            raise UserError(
                "a recipe already names the models; give either --recipe or BASE FT1 FT2, not both"
            )
        return read_recipe(os.path.expanduser(path))
    if len(models) < 2 - no_base:
        required = (
            "the models: M1 M2" if no_base else "the base model and its fine-tunes: BASE FT1 FT2"
        )
        raise UserError(f"give {required} ...")
    if no_base:
        return Recipe(None, tuple(models), {})
    return Recipe(models[0], tuple(models[1:]), {})


def _typed_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were typed, as arguments of `Options`."""
    fields = {field.name for field in dataclasses.fields(Options)}
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items() if name in fields
    }  # fmt: skip
    if "num_heads" in options:
        options["num_heads"] = hf_config.parse_num_heads(options["num_heads"])
    if "parameters" in options:
        options["parameters"] = dict(options["parameters"])
    if len(options.get("density", ())) == 1:
        options["density"] = options["density"][0]
    return options


def _complete_options(options: dict[str, Any], base: Source) -> Options:
    if options.get("unit") == "head" and "num_heads" not in options:
        # Without an attention, the number of heads is not what is missing: the plan says so.
        if projections({name: info.shape for name, info in base.tensors.items()}):
            options["num_heads"] = hf_config.num_heads(base.directory, base.tensors)
    return Options(**options)


def _open_models(recipe: Recipe, options: Mapping[str, Any]) -> tuple[Source, list[Source]]:
    """Open the base and the fine-tunes; a model that is given twice is an error."""
    _check_given_once(recipe, {**recipe.options, **options}.get("method", "model_stock"))
    read_as = quantization.as_weights if options.get("dequantize") else quantization.as_stored
    if recipe.slices is not None:
        base, *models = _open_slices(recipe.slices, read_as)
        return base, models if recipe.base is not None else [base, *models]
    base = open_source(recipe.base or recipe.models[0], read_as=read_as)
    return base, [open_source(model, base, read_as) for model in recipe.models]


def _open_slices(
    slices: Sequence[Sequence[LayerRange]], read_as: Callable[[Source], Source]
) -> list[Source]:
    """Open the models of a recipe with slices: complete models, or layers of several."""
    opened: dict[str, Source] = {}
    for layers in (x for piece in slices for x in piece):
        if layers.model not in opened:
            opened[layers.model] = open_source(
                layers.model, next(iter(opened.values()), None), read_as
            )
    return [
        stacked([Layers(opened[x.model], x.start, x.stop) for x in ranges])
        for ranges in zip(*slices, strict=True)
    ]


def _check_given_once(recipe: Recipe, method: str) -> None:
    if recipe.slices is not None and len(recipe.slices) > 1:
        return  # A slice has each model once, but several slices may differ.

    def identity(label: str) -> str:
        path = os.path.expanduser(label)
        return os.path.realpath(path) if os.path.exists(path) else label

    models = [identity(label) for label in recipe.models]
    # A linear mean may also list its base as one of the models.
    if recipe.base is not None and recipe.options.get("method") != "linear":
        if (base := identity(recipe.base)) in models:
            raise UserError(
                f"{recipe.models[models.index(base)]} is given as the base and as a fine-tune; "
                "give each model once"
            )
    for number, label in enumerate(recipe.models):
        if models[number] in models[:number]:
            reason = (
                "two copies agree completely, so the merge would trust their update fully (t = 1); "
                if COMMANDS[method].rule
                else ""
            )
            raise UserError(f"{label} is given twice: {reason}give each model once")


def _start_checksums(plan: Plan, pool: ThreadPoolExecutor) -> list[Callable[[], dict[str, str]]]:
    """Return a function per input that returns its checksums.

    CRC-32 is computed from what the merge reads; SHA-256 is computed in the pool at the same time.
    A base of which only names and shapes are read has none.
    """
    is_unread = isinstance(plan, AdapterPlan) and plan.anchored and not plan.reads_base
    sources, kind = plan.sources[1:] if is_unread else plan.sources, plan.options.checksum
    unread: list[Callable[[], dict[str, str]]] = [dict] * is_unread
    if kind == "sha256":
        return unread + [pool.submit(source.checksums, kind).result for source in sources]
    for source in sources:
        source.watch()
    return unread + [source.checksums for source in sources]


def _write_report(directory: Path, document: dict[str, Any], name: str) -> None:
    write_json(directory / REPORT, document)
    card = model_card(document, name=name, library=library_name(directory))
    write_text(directory / MODEL_CARD, card)


def _print_plan(plan: Plan, arguments: argparse.Namespace, notes: Sequence[str]) -> None:
    if arguments.out:
        check_out(plan, arguments.out, overwrite=arguments.overwrite)
    if not arguments.json:
        display.show_plan(plan, arguments.out, Console())
        return
    _print_json({
        "base": plan.base.label if plan.anchored else None,
        "models": [source.label for source in plan.finetuned],
        "tensors": [
            {"name": name, "shape": t.shape, "code": t.code, "action": t.action, "reason": t.reason}
            for name, t in plan.tensors.items()
        ],
        "files": dict(zip(plan.files, map(list, plan.shards), strict=True)),
        "bytes_read": plan.bytes_read, "bytes_written": plan.bytes_written,
        "memory": plan.memory, "notes": list(notes),
    })  # fmt: skip


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(to_json_types(value), sort_keys=True, indent=1) + "\n")
