"""Arguments as users type them: spellings, old names, recipes, paths with ~, adapters; help."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.cli import RENAMED, parsers
from modelstock_jax.checkpoint_merge.options import DTYPES
from modelstock_jax.registry import COMMANDS
from modelstock_jax.tensor_files.writer import write_tensors
from tests.checkpoint_merge.small import factors
from tests.checkpoint_merge.typed import load, tensors, trio, write

REQUIRED = {"wise_ft": ["--alpha", "0.5"], "slerp": ["--t", "0.5"]}


@pytest.mark.parametrize(
    ("typed", "method"),
    [
        ("model_stock", "model_stock"),
        ("model-stock", "model_stock"),
        ("Model-Stock", "model_stock"),
        ("MODEL_STOCK", "model_stock"),
        ("task_arithmetic", "task_arithmetic"),
        ("Ties", "ties"),
        ("TIES", "ties"),
        ("weighted-model-stock", "weighted_model_stock"),
        ("wise_ft", "wise_ft"),
        ("wiseft", "wise_ft"),
        ("WiSE-FT", "wise_ft"),
        ("Linear", "linear"),
        ("SLERP", "slerp"),
        ("uniform_mean", "uniform_mean"),
        ("mean", "uniform_mean"),
        ("average", "uniform_mean"),
    ],
)
def test_methods(say, tmp_path, typed, method):
    paths = trio(tmp_path)
    for text in ([f"--method={typed}"], ["--method", typed]):
        out = tmp_path / f"out{len(text)}"
        result = say("merge", *paths, "--out", out, *text, *REQUIRED.get(method, []))
        assert result.status == 0, result.err
        assert load(out / "merge_report.json")["options"]["method"] == method


@pytest.mark.parametrize("typed", ["dare_tise", "stok", "", "model stock"])
def test_an_unknown_method_lists_all_methods(say, tmp_path, typed):
    result = say("merge", *trio(tmp_path), "--out", tmp_path / "out", "--method", typed)
    assert result.status == 2 and "--method" in result.err and result.err.count("\n") == 1
    assert all(method.command in result.err for method in COMMANDS.values())


OLD_METHODS = {
    "stock": "model-stock",
    "Stock": "model-stock",
    "weighted-stock": "weighted-model-stock",
    "weighted_stock": "weighted-model-stock",
    "uniform": "uniform-mean",
    "weighted": "linear",
}


@pytest.mark.parametrize("typed", OLD_METHODS)
def test_an_old_method_name_is_an_error_with_the_new_name(say, tmp_path, typed):
    result = say("merge", *trio(tmp_path), "--out", tmp_path / "out", f"--method={typed}")
    assert result.status == 2 and result.err.count("\n") == 1
    assert result.err.startswith(f"error: --method: {typed!r} is now {OLD_METHODS[typed]!r} ")
    assert not (tmp_path / "out").exists()


def test_every_old_option_is_listed():
    assert RENAMED == {
        "--excluded": "--unmerged-from",
        "--tied": "--tied-head",
        "--missing": "--missing-tensors",
        "--vocabulary": "--vocab-mismatch",
        "--digest": "--checksum",
    }


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_option_is_an_error_with_the_new_name(say, old):
    for typed in ([old, "base"], [f"{old}=base"]):
        result = say("merge", "BASE", "FT1", "FT2", "--out", "out", *typed)
        assert result.status == 2 and result.err.count("\n") == 1
        assert result.err.startswith(f"error: {old}: renamed to {RENAMED[old]} ")


@pytest.mark.parametrize("old", RENAMED)
def test_compare_answers_an_old_option_with_the_new_name_too(say, old):
    result = say("compare", "BASE", "FT1", "FT2", old, "base")
    assert result.status == 2 and result.err.count("\n") == 1
    assert re.match(f"error: {old}.* {RENAMED[old]}[ ,]", result.err), result.err


@pytest.mark.parametrize("option", ["--vocab-mismatch", "--missing-tensors", "--head"])
@pytest.mark.parametrize("command", ["merge", "compare"])
def test_the_old_value_refuse_is_an_error_with_the_new_value(say, command, option):
    result = say(command, "BASE", "FT1", "FT2", option, "refuse")
    assert result.status == 2 and result.err.count("\n") == 1
    assert result.err.startswith(f"error: {option}: 'refuse' is now 'error' ")


def test_an_old_value_is_renamed_only_where_it_was_valid(say):
    result = say("merge", "BASE", "FT1", "FT2", "--out", "out", "--tied-head", "refuse")
    assert result.status == 2 and "choose one of keep, untie" in result.err


@pytest.mark.parametrize(
    ("typed", "code"),
    [
        *((name, code) for name, code in DTYPES.items()),
        ("bf16", "BF16"),
        ("BF16", "BF16"),
        ("torch.bfloat16", "BF16"),
        ("fp16", "F16"),
        ("half", "F16"),
        ("torch.float16", "F16"),
        ("torch.half", "F16"),
        ("fp32", "F32"),
        ("float", "F32"),
        ("Float32", "F32"),
        ("f32", "F32"),
        ("double", "F64"),
        ("fp8", "F8_E4M3"),
        ("float8_e4m3", "F8_E4M3"),
    ],
)
def test_dtypes(say, tmp_path, typed, code):
    paths, out = trio(tmp_path, {"config.json": {"model_type": "llama"}}), tmp_path / "out"
    assert say("merge", *paths, "--out", out, "--dtype", typed).status == 0
    raw = (out / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {code}
    name = next(name for name, c in DTYPES.items() if c == code)
    assert load(out / "config.json")["torch_dtype"] == name


@pytest.mark.parametrize("typed", ["int8", "bf17", "4bit", ""])
def test_an_unknown_dtype(say, tmp_path, typed):
    result = say("merge", *trio(tmp_path), "--out", tmp_path / "out", "--dtype", typed)
    assert result.status == 2 and "bfloat16" in result.err and result.err.count("\n") == 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Home directory with models and a recipe; the working directory is another one."""
    root = tmp_path / "home"
    paths = trio(root)
    (root / "r.yml").write_text(
        "merge_method: model_stock\nbase_model: ~/base\ndtype: bf16\n"
        "models: [{model: ~/ft1}, {model: ~/ft2}]\n"
    )
    (root / "abs.yaml").write_text((root / "r.yml").read_text().replace("~", str(root)))
    monkeypatch.setenv("HOME", str(root))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return root, paths


@pytest.mark.parametrize(
    "typed",
    [
        ["{root}/r.yml", "--out", "x"],
        ["{root}/r.yml", "x"],
        ["{root}/abs.yaml", "x"],
        ["--recipe", "~/r.yml", "--out", "x"],
        ["--recipe=~/r.yml", "--out", "x"],
        ["~/r.yml", "--out", "x"],
        ["x", "~/r.yml"],
        ["--out", "x", "{root}/r.yml"],
        ["--recipe", "{root}/r.yml", "x"],
    ],
)
def test_a_recipe(say, home, tmp_path, typed):
    root, paths = home
    result = say("merge", *(text.format(root=root) for text in typed))
    # Only the first argument may be a recipe, and --recipe excludes models as arguments.
    wrong = typed[0] == "x" or typed[-1] == "x" and typed[0] == "--recipe" and len(typed) == 3
    assert (result.status == 0) != wrong, result.err
    if wrong:
        assert "recipe" in result.err and result.err.count("\n") == 1
        return
    report = load(tmp_path / "work/x/merge_report.json")
    assert report["options"]["dtype"] == "bfloat16" and len(report["models"]) == 2
    direct = say("merge", *paths, "--out", "direct", "--dtype", "bfloat16")
    assert direct.status == 0
    assert (tmp_path / "work/direct/model.safetensors").read_bytes() == (
        tmp_path / "work/x/model.safetensors"
    ).read_bytes()


def test_a_recipe_and_models_are_an_error(say, home):
    root, paths = home
    result = say("merge", root / "r.yml", *paths, "--out", "x")
    assert result.status == 1 and "--recipe" in result.err
    result = say("merge", root / "gone.yml", "--out", "x")
    assert result.status == 1 and "gone.yml" in result.err and result.err.count("\n") == 1
    result = say("merge", root / "gone.yml", "x")
    assert result.status == 1 and "gone.yml" in result.err
    result = say("merge", root / "r.yml")
    assert result.status == 1 and "--out DIR" in result.err
    result = say("compare", root / "r.yml", "x")
    assert result.status == 1 and "r.yml" in result.err


@pytest.mark.parametrize("out", ["--out=~/x", "--out ~/x", "--out=$HOME/x"])
def test_paths_with_a_tilde(say, home, tmp_path, out, monkeypatch):
    """A shell expands $HOME after `=`, but not ~."""
    root, _ = home
    typed = out.replace("$HOME", str(root)).split()
    result = say("merge", "~/base", "~/ft1", "~/ft2/model.safetensors", *typed)
    assert result.status == 0, result.err
    assert (root / "x/model.safetensors").is_file()
    assert list((tmp_path / "work").iterdir()) == []
    assert say("compare", "~/base", "~/ft1", "~/ft2", "--plot", "~/angles.png").status == 0
    assert (root / "angles.png").is_file()


def test_one_fine_tune(say, home):
    result = say("merge", "~/base", "~/ft1", "--out", "x")
    assert result.status == 1 and "--method wise-ft --alpha 0.5" in result.err
    assert result.err.count("\n") == 1
    assert (
        say(
            "merge", "~/base", "~/ft1", "--out", "x", "--method", "wise_ft", "--alpha", "0.5"
        ).status
        == 0
    )
    result = say("compare", "~/base", "~/ft1")
    assert result.status == 1 and "wise" not in result.err and "2 or more" in result.err
    for typed in (["~/base"], []):
        result = say("merge", *typed, "--out", "y")
        assert result.status == 1 and "BASE FT1 FT2" in result.err


@pytest.mark.parametrize(("method", "required"), [("wise_ft", "--alpha 0.5"), ("slerp", "--t 0.5")])
def test_a_method_without_its_required_option(say, home, method, required):
    result = say("merge", "~/base", "~/ft1", "--out", "x", "--method", method)
    assert result.status == 1 and required in result.err


def kohya(kind):
    rng = np.random.default_rng(0)
    names = {
        "text": "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "unet": "lora_unet_down_blocks_0_attentions_0_proj_in",
        "te1": "lora_te1_x",
    }
    prefix = names[kind]
    return {
        f"{prefix}.lora_down.weight": rng.standard_normal((2, 8)).astype(np.float32),
        f"{prefix}.lora_up.weight": rng.standard_normal((8, 2)).astype(np.float32),
        f"{prefix}.alpha": np.float32(2),
    }


PEFT = factors("model.layers.0.self_attn.q_proj", 8, 8)
DIFFUSERS = {k.replace("base_model.model.", "unet."): x for k, x in PEFT.items()}
LORA = {
    "kohya": (kohya("text"), "kohya"),
    "kohya unet": (kohya("unet"), "kohya"),
    "kohya te1": (kohya("te1"), "kohya"),
    "peft": (PEFT, "adapter_config.json"),
    "diffusers": (DIFFUSERS, "adapter_config.json"),
    "diffusers up/down": (
        {
            k.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): x
            for k, x in DIFFUSERS.items()
        },
        "PEFT",
    ),
    **{
        name: ({f"unet.mid.{name}": np.ones((2, 8), np.float32)}, "PEFT")
        for name in (
            "processor.to_q_lora.down.weight",
            "processor.qkv_lora1.up.weight",
            "hada_w1_a",
            "lokr_w1",
            "ia3_l",
            "oft_blocks",
        )
    },
}


@pytest.mark.parametrize("position", ["file", "directory", "first"])
@pytest.mark.parametrize("kind", LORA)
def test_the_error_for_a_lora_file_of_another_library_names_its_format(say, home, kind, position):
    root, _ = home
    content, format_name = LORA[kind]
    names = {"peft": "adapter_model.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}
    path = write(root / "lora", {names.get(kind, "my_lora.safetensors"): content})
    if position == "file":
        path = next(path.iterdir())
    models = ["~/base", path, "~/ft2"] if position != "first" else [path, "~/ft1", "~/ft2"]
    result = say("merge", *models, "--out", "x")
    assert result.status == 1 and str(path) in result.err and result.err.count("\n") == 1
    assert format_name in result.err, result.err


def test_an_adapter_as_base_and_as_a_file_after_plus(say, home):
    root, _ = home
    (root / "lora").mkdir()
    write_tensors(root / "lora/adapter_model.safetensors", PEFT)
    (root / "lora/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 3})
    )
    result = say("merge", "~/lora", "~/ft1", "~/ft2", "--out", "x")
    assert result.status == 1 and f"{root}/lora " in result.err and "BASE" in result.err
    result = say("merge", "~/base", "~/base+~/lora", "~/ft2", "--out", "x")
    assert result.status == 0, result.err
    (first, _) = load(root.parent / "work/x/merge_report.json")["models"]
    assert first["model"] == f"{root}/base+{root}/lora"
    assert say("merge", "~/base", "~/lora", "~/ft2", "--out", "y").status == 0
    for name, value in tensors(root.parent / "work/x").items():
        np.testing.assert_array_equal(value, tensors(root.parent / "work/y")[name])
    result = say(
        "merge", "~/base", "~/base+~/lora/adapter_model.safetensors", "~/ft2", "--out", "z"
    )
    assert result.status == 1 and "adapter_config.json" in result.err
    # If the directory of the file has the config, the error suggests the directory.
    result = say("merge", "~/base", "~/lora/adapter_model.safetensors", "~/ft2", "--out", "z")
    assert result.status == 1 and "save_pretrained" in result.err


@pytest.mark.parametrize(("command", "max_lines"), [("merge", 60), ("compare", 45)])
def test_help_fits_one_screen(command, max_lines, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = parsers()[1][command].format_help().splitlines()
    assert len(lines) <= max_lines
    assert [line for line in lines if len(line) > 80] == []
    assert any(line.startswith("examples:") for line in lines)


def test_help_lists_every_option_and_value():
    for parser in parsers()[1].values():
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            if action.option_strings:
                assert action.option_strings[0] in text and action.help
                for value in action.choices or ():
                    shown = COMMANDS[value].command if action.dest == "method" else str(value)
                    default = {"error", "keep"} | set(DTYPES)
                    assert shown in text or value in default, (action.dest, value)


def test_every_example_of_the_help_parses():
    top, commands = parsers()
    for name, parser in commands.items():
        for line in parser.format_help().splitlines():
            if line.startswith(f"  modelstock {name} "):
                words = line.replace("'", "").split(" > ")[0].split()[2:]
                assert parser.parse(words).models


def test_the_command_in_a_shell(home, tmp_path):
    """`python -m modelstock_jax` with a recipe, in the form of mergekit-yaml."""
    root, _ = home
    process = subprocess.run(
        [sys.executable, "-m", "modelstock_jax", "merge", str(root / "r.yml"), "x", "--dry-run"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"HOME": str(root), "PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path)},
    )
    assert process.returncode == 0 and "to write" in process.stdout, process.stderr
