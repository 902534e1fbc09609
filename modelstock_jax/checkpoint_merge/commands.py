"""The commands of `modelstock`, from what was typed to what is shown."""

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
from modelstock_jax.checkpoint_merge.display import PlotProcess
from modelstock_jax.checkpoint_merge.executor import MergeResult, measure, run
from modelstock_jax.checkpoint_merge.hf_config import read_config
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.output import check_out
from modelstock_jax.checkpoint_merge.plan import Plan, make_plan
from modelstock_jax.checkpoint_merge.recipe import Recipe, read_recipe, schedule
from modelstock_jax.checkpoint_merge.report import card, document, library_name, ratios
from modelstock_jax.checkpoint_merge.sources import Source, open_source
from modelstock_jax.errors import UserError
from modelstock_jax.fileio import plain, write_json, write_text
from modelstock_jax.reporting.progress import ByteProgress

REPORT, CARD, PICTURE = "merge_report.json", "README.md", "angles.png"
# A comparison writes no model: what some models lack need not stand in its way.
_LENIENT = {"vocab_mismatch": "base", "missing_tensors": "base", "tied_head": "untie"}
_RECIPES = (".yml", ".yaml")


def merge(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """`modelstock merge`."""
    recipe = _recipe(arguments)
    arguments.out = _out(arguments)
    asked = _asked(arguments)
    if clash := sorted(asked.keys() & recipe.options.keys()):
        raise UserError(f"{clash[0]} is in the recipe; leave the option out, or change it there")
    base, finetuned = _open(recipe, asked)
    _check_layers(recipe.layers, base)
    if recipe.t is not None:
        asked["t"] = schedule(recipe.t, list(base.tensors))
    plan = make_plan(
        base,
        finetuned,
        _options({**recipe.options, **asked}, base),
        anchored=recipe.base is not None,
    )
    messages, notes = Console(stderr=True), [*recipe.notes, *_notes(plan)]
    _tell(notes, messages)
    if arguments.dry_run:
        _print_plan(plan, arguments, notes)
        return
    command = "modelstock " + shlex.join(argv)
    documents: list[dict[str, Any]] = []
    name = Path(os.path.abspath(arguments.out)).name
    drawing = PlotProcess(plan.bytes_read if plan.anchored else 0)

    def measured(directory: Path, rows: list[dict[str, Any]]) -> None:
        if plan.anchored:  # Without a base there are no angles and norms to draw.
            drawing.begin(directory / PICTURE, rows)

    def finish(directory: Path, report: MergeResult) -> None:
        made = document(plan, report, [digests() for digests in inputs], command)
        _write(directory, made, name)
        if plan.anchored:
            drawing.finish()
        documents.append(made)

    with ThreadPoolExecutor(1) as hashing:
        inputs = _checksums((base, *finetuned), plan.options.checksum, hashing)
        try:
            with ByteProgress("merging", messages) as meter:
                report = run(
                    plan,
                    arguments.out,
                    overwrite=arguments.overwrite,
                    progress=meter,
                    measured=measured,
                    finish=finish,
                )
        except BaseException:
            hashing.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            drawing.close()
    if arguments.json:
        _print_json(documents[0] | {"out": arguments.out, "seconds": report.seconds})
    else:
        display.show_merge(documents[0], report, arguments.out, Console())


def compare(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """`modelstock compare`."""
    del argv
    arguments.plot = arguments.plot and os.path.expanduser(arguments.plot)
    if arguments.plot and Path(arguments.plot).suffix != ".png":
        raise UserError(f"--plot {arguments.plot}: give a name that ends in .png")
    recipe = _recipe(arguments)
    asked = _asked(arguments)
    base, finetuned = _open(recipe, asked)
    plan = make_plan(base, finetuned, _options(_LENIENT | asked, base), lenient=True)
    messages = Console(stderr=True)
    _tell(_notes(plan), messages)
    with ByteProgress("comparing", messages) as meter:
        report = measure(plan, progress=meter)
    summary = ratios(report.rows)
    if arguments.plot:
        drawing = PlotProcess(0)
        drawing.begin(Path(arguments.plot), report.rows)
        drawing.finish()
    if arguments.json:
        _print_json({
            "base": base.label, "models": [source.label for source in finetuned],
            "unit": plan.options.unit, "units": report.rows, "ratios": summary,
            "outcomes": report.outcomes, "predicted_distance": report.distance,
            "anchor_rounding": plan.rounding, "notes": _notes(plan),
        })  # fmt: skip
    else:
        display.show_comparison(report.rows, summary, Console())


def _out(arguments: argparse.Namespace) -> str | None:
    """The directory to write; None for a plan alone."""
    out = arguments.out and os.path.expanduser(arguments.out)
    if not out and not arguments.dry_run:
        raise UserError("--out DIR is missing: the directory to write the merged model to")
    if (out or "").endswith(".safetensors"):
        raise UserError(
            f"--out {out}: a directory is made, with model.safetensors in it; give a "
            "name for it that does not end so"
        )
    return out


def _notes(plan: Plan) -> list[str]:
    """What a user should know of the models, then of the plan."""
    return [
        *(note for source in (plan.base, *plan.finetuned) for note in source.notes),
        *plan.notes,
    ]


def _tell(notes: Iterable[str], messages: Console) -> None:
    for note in notes:
        messages.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """The models, from the recipe's file or as they were typed."""
    models = arguments.models
    path = getattr(arguments, "recipe", None)
    recipes = [
        text
        for text in models
        if text.endswith(_RECIPES) and not os.path.isdir(os.path.expanduser(text))
    ]
    if recipes and "recipe" not in arguments:
        raise UserError(f"{recipes[0]}: a recipe is for modelstock merge; give BASE FT1 FT2 ...")
    if recipes and path is None:
        if models[0] != recipes[0]:
            raise UserError(f"{recipes[0]}: a recipe comes first: modelstock merge RECIPE DIR")
        path, *models = models
        if len(models) == 1 and not arguments.out:  # As `mergekit-yaml RECIPE DIR`.
            arguments.out, models = models[0], []
    if path:
        if models:
            raise UserError("a recipe names the models itself: give --recipe or BASE FT1 FT2")
        return read_recipe(os.path.expanduser(path))
    if len(models) < 2:
        raise UserError("give BASE and the models that were fine-tuned from it: BASE FT1 FT2 ...")
    return Recipe(models[0], tuple(models[1:]), {})


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were typed, as `Options` takes them."""
    fields = {field.name for field in dataclasses.fields(Options)}
    asked: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items() if name in fields
    }  # fmt: skip
    if "num_heads" in asked:
        asked["num_heads"] = hf_config.parse_num_heads(asked["num_heads"])
    if len(asked.get("density", ())) == 1:
        asked["density"] = asked["density"][0]
    return asked


def _options(asked: dict[str, Any], base: Source) -> Options:
    if asked.get("unit") == "head" and "num_heads" not in asked:
        asked["num_heads"] = hf_config.num_heads(base.directory, base.tensors)
    return Options(**asked)


def _open(recipe: Recipe, asked: Mapping[str, Any]) -> tuple[Source, list[Source]]:
    """Opens base and fine-tunes; a model that is given twice would count twice."""
    seen: set[str] = set()
    # A recipe of a linear mean may list its base: there that is a model like the others.
    alone = recipe.options.get("method") == "linear"
    for label in recipe.models if alone or recipe.base is None else (recipe.base, *recipe.models):
        path = os.path.expanduser(label)
        place = os.path.realpath(path) if os.path.exists(path) else label
        if place in seen:
            raise UserError(
                f"{label} is given twice; its angle with itself is 0, so the merge "
                "would take it for certain: give each model once"
            )
        seen.add(place)
    read_as = quantization.as_weights if asked.get("dequantize") else quantization.as_stored
    anchor = open_source(recipe.base or recipe.models[0], read_as=read_as)
    return anchor, [open_source(model, anchor, read_as) for model in recipe.models]


def _check_layers(layers: int | None, base: Source) -> None:
    if layers is None:
        return
    number = (read_config(base.directory) or {}).get("num_hidden_layers")
    if number is not None and number != layers:
        raise UserError(
            f"the recipe's slices end at layer {layers}, {base.label} has {number}: "
            "only the whole model is merged; give models instead of slices"
        )


def _checksums(
    sources: Sequence[Source], kind: str, beside: ThreadPoolExecutor
) -> list[Callable[[], dict[str, str]]]:
    """Ways to the digests of each input: CRC-32 of what the merge reads, SHA-256 beside it."""
    if kind == "sha256":
        return [beside.submit(source.checksums, kind).result for source in sources]
    for source in sources:
        source.watch()
    return [source.checksums for source in sources]


def _write(directory: Path, made: dict[str, Any], name: str) -> None:
    """Writes report and card into the finished directory."""
    write_json(directory / REPORT, made)
    library = library_name(directory)
    write_text(directory / CARD, card(made, name=name, library=library))


def _print_plan(plan: Plan, arguments: argparse.Namespace, notes: Sequence[str]) -> None:
    if arguments.out:
        check_out(plan, arguments.out, overwrite=arguments.overwrite)
    if not arguments.json:
        display.show_plan(plan, arguments.out or "(no --out)", Console())
        return
    _print_json({
        "base": plan.base.label if plan.anchored else None,
        "models": [source.label for source in plan.finetuned],
        "tensors": [
            {"name": name, "shape": t.shape, "code": t.code, "takes": t.action, "reason": t.reason}
            for name, t in plan.tensors.items()
        ],
        "files": dict(zip(plan.files, map(list, plan.shards), strict=True)),
        "bytes_read": plan.bytes_read, "bytes_written": plan.bytes_written,
        "memory": plan.memory, "notes": list(notes),
    })  # fmt: skip


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(plain(value), sort_keys=True, indent=1) + "\n")
