"""Every method of the registry works in every interface that names methods."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.lines import Line2D
from matplotlib.text import Text

import modelstock_jax
from configs.default import get_config
from modelstock_jax import merging
from modelstock_jax.checkpoint_merge import methods, recipe, report
from modelstock_jax.checkpoint_merge.cli import parsers
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.errors import UserError
from modelstock_jax.registry import COMMANDS, METHODS, OPENED_ROWS, RENAMED_COMMANDS, ROWS
from modelstock_jax.reporting.style import COLORS
from modelstock_jax.reporting.tables import label
from modelstock_jax.training.merge_step import check_merge
from tests.merging.trees import replicas

NEEDED = {"alpha": 0.5, "t": 0.5}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
on_the_command_line = pytest.mark.parametrize("name", COMMANDS)
in_recipes = pytest.mark.parametrize("method", [m for m in METHODS.values() if m.mergekit])


def options_of(method):
    return {name: NEEDED[name] for name in method.options if name in NEEDED}


@every_method
def test_the_library_has_the_function(method):
    assert method.module or method.on_command_line, "no interface has it"
    if not method.module:
        return
    function = getattr(merging, method.name)
    assert function is getattr(modelstock_jax, method.name)
    assert function.__module__ == f"modelstock_jax.merging.{method.module}"
    for module in (merging, modelstock_jax):
        assert method.name in module.__all__ and method.name in dir(module)


@on_the_command_line
def test_the_command_line_accepts_every_spelling(name):
    method = COMMANDS[name]
    parse = parsers()[1]["merge"].parse
    spellings = [name, name.upper(), method.command, method.mergekit, *method.aliases]
    for spelling in filter(None, spellings):
        assert parse(["B", "F", "--out", "o", "--method", spelling]).method == name, spelling
        assert Options(method=spelling, **options_of(method)).method == name, spelling


@pytest.mark.parametrize("old", RENAMED_COMMANDS)
def test_an_old_name_is_an_error_that_names_the_new_one(old, capsys):
    new = RENAMED_COMMANDS[old]
    assert new in COMMANDS
    for spelling in (old, old.replace("_", "-"), old.capitalize()):
        with pytest.raises(UserError, match=new.replace("_", "-")):
            Options(method=spelling)
        with pytest.raises(SystemExit):
            parsers()[1]["merge"].parse(["B", "F", "--out", "o", "--method", spelling])
        assert new.replace("_", "-") in capsys.readouterr().err


@on_the_command_line
def test_no_two_methods_have_the_same_spelling(name):
    def spellings(method):
        return {s.replace("-", "_") for s in (method.name, method.mergekit, *method.aliases) if s}

    of_this = spellings(COMMANDS[name])
    assert not of_this & RENAMED_COMMANDS.keys()
    for other in COMMANDS.values():
        assert other is COMMANDS[name] or not of_this & spellings(other)


@on_the_command_line
def test_a_file_merge_has_a_solver(name):
    method = COMMANDS[name]
    assert callable(methods.solver(Options(method=name, **options_of(method)), method.min_models))
    fields = {field.name for field in dataclasses.fields(Options)}
    assert set(method.options) <= fields


@pytest.mark.parametrize("name", [name for name, method in COMMANDS.items() if method.rule])
def test_a_file_merge_by_a_rule_equals_the_library(name):
    w0, w = replicas({"w": (4,)}, 2)
    deltas = (w["w"] - w0["w"]).astype(np.float64)
    unit = SimpleNamespace(gram=lambda: (deltas @ deltas.T)[..., None], is_scalar=np.array([False]))
    (coefficients,) = methods.solver(Options(method=name), 2)(unit).solution.coefficient.T
    merged, _ = getattr(merging, name)(w0, w)
    # Sums of float32 values near 1, some of which cancel: a unit in the last place of the terms.
    np.testing.assert_allclose(merged["w"], w0["w"] + coefficients @ deltas, rtol=0, atol=2.0**-23)


@on_the_command_line
def test_the_model_card_names_the_method(name):
    description = report._method({"options": {"method": name}, "base": {"model": "b"}})
    assert description == COMMANDS[name].description != ""


@in_recipes
def test_a_mergekit_recipe_selects_the_method(method):
    values = {"weight": 1.0, "density": 0.5, "t": 0.5}
    parameters = {key: values[key] for key in method.mergekit_keys if key in values}
    parsed = recipe.parse(
        {
            "merge_method": method.mergekit,
            "base_model": "b",
            "models": [{"model": f"m{i}"} for i in range(2 if method.name == "nuslerp" else 1)],
            "parameters": parameters,
        }
    )
    assert parsed.options["method"] == method.name


@every_method
def test_the_row_has_a_label(method):
    row = {"method": method.name, "num_replicas": 2, "alpha": 0.5, "of": "uniform_mean"}
    assert ROWS[method.name] is method.style
    assert label(row) == method.style.label.format(n=2, of="the uniform mean", alpha=0.5)
    assert method.style.short.format(n=2)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_can_be_drawn(row):
    style = ROWS[row]
    Line2D([0], [0], marker=style.marker, color=COLORS[style.color])
    assert Text(text=style.short).get_text()


@every_method
def test_methods_with_a_periodic_row_are_accepted_as_merge_method(method):
    config = get_config().merge
    with config.unlocked():
        config.update({"method": method.name, "carry_noise": "off"})
    if method.periodic:
        check_merge(config)
        assert ROWS[method.periodic_row] is method.periodic and method.module
    else:
        with pytest.raises(
            modelstock_jax.UserError, match="merge.method=.*model_stock, uniform_mean"
        ):
            check_merge(config)


def test_no_two_methods_share_a_name():
    for field in ("name", "mergekit"):
        names = [name for method in METHODS.values() if (name := getattr(method, field))]
        assert len(set(names)) == len(names), field


def test_no_two_rows_share_a_marker_of_the_same_color():
    """Except anchors, which are one model, and the two linear probes."""
    same = {row: "zero_shot" for row in OPENED_ROWS} | {"linear_probe": "probed"}
    rows: dict[tuple[str, str], set[str]] = {}
    for row, style in ROWS.items():
        rows.setdefault((style.color, style.marker), set()).add(same.get(row, row))
    assert all(len(names) == 1 for names in rows.values()), rows
