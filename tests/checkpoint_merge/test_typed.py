"""What people type: other spellings, recipes, paths with ~, adapters; help on one screen."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.cli import parsers
from modelstock_jax.checkpoint_merge.options import DTYPES
from modelstock_jax.registry import COMMANDS
from modelstock_jax.tensor_files.writer import write_tensors
from tests.checkpoint_merge.small import factors
from tests.checkpoint_merge.typed import load, tensors, trio, write

NEEDED = {"wise_ft": ["--alpha", "0.5"], "slerp": ["--t", "0.5"]}


@pytest.mark.parametrize(
    ("typed", "method"),
    [
        ("model_stock", "model_stock"),
        ("model_stock", "model_stock"),
        ("model-stock", "model_stock"),
        ("Stock", "model_stock"),
        ("MODEL_STOCK", "model_stock"),
        ("task_arithmetic", "task_arithmetic"),
        ("Ties", "ties"),
        ("TIES", "ties"),
        ("weighted_stock", "weighted_model_stock"),
        ("wise_ft", "wise_ft"),
        ("wiseft", "wise_ft"),
        ("WiSE-FT", "wise_ft"),
        ("Linear", "linear"),
        ("SLERP", "slerp"),
        ("uniform_mean", "uniform_mean"),
        ("mean", "uniform_mean"),
    ],
)
def test_methods(say, tmp_path, typed, method):
    paths = trio(tmp_path)
    for text in ([f"--method={typed}"], ["--method", typed]):
        out = tmp_path / f"out{len(text)}"
        said = say("merge", *paths, "--out", out, *text, *NEEDED.get(method, []))
        assert said.status == 0, said.err
        assert load(out / "merge_report.json")["options"]["method"] == method


@pytest.mark.parametrize("typed", ["dare_ties", "stok", "", "model stock"])
def test_a_method_that_is_not_there(say, tmp_path, typed):
    said = say("merge", *trio(tmp_path), "--out", tmp_path / "out", "--method", typed)
    assert said.status == 2 and "--method" in said.err and said.err.count("\n") == 1
    assert all(method in said.err for method in COMMANDS)


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
def test_a_dtype_that_is_not_there(say, tmp_path, typed):
    said = say("merge", *trio(tmp_path), "--out", tmp_path / "out", "--dtype", typed)
    assert said.status == 2 and "bfloat16" in said.err and said.err.count("\n") == 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with models in it, a recipe of them, and another working directory."""
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
    said = say("merge", *(text.format(root=root) for text in typed))
    # Only the first name may be a recipe, and with --recipe the models are not typed.
    wrong = typed[0] == "x" or typed[-1] == "x" and typed[0] == "--recipe" and len(typed) == 3
    assert (said.status == 0) != wrong, said.err
    if wrong:
        assert "recipe" in said.err and said.err.count("\n") == 1
        return
    report = load(tmp_path / "work/x/merge_report.json")
    assert report["options"]["dtype"] == "bfloat16" and len(report["models"]) == 2
    direct = say("merge", *paths, "--out", "direct", "--dtype", "bfloat16")
    assert direct.status == 0
    assert (tmp_path / "work/direct/model.safetensors").read_bytes() == (
        tmp_path / "work/x/model.safetensors"
    ).read_bytes()


def test_a_recipe_with_models_next_to_it(say, home):
    root, paths = home
    said = say("merge", root / "r.yml", *paths, "--out", "x")
    assert said.status == 1 and "--recipe" in said.err
    said = say("merge", root / "gone.yml", "--out", "x")
    assert said.status == 1 and "gone.yml" in said.err and said.err.count("\n") == 1
    said = say("merge", root / "gone.yml", "x")
    assert said.status == 1 and "gone.yml" in said.err
    said = say("merge", root / "r.yml")
    assert said.status == 1 and "--out DIR" in said.err
    said = say("compare", root / "r.yml", "x")
    assert said.status == 1 and "r.yml" in said.err


@pytest.mark.parametrize("out", ["--out=~/x", "--out ~/x", "--out=$HOME/x"])
def test_paths_with_a_tilde(say, home, tmp_path, out, monkeypatch):
    """A shell does not expand ~ behind `=`; $HOME it does."""
    root, _ = home
    typed = out.replace("$HOME", str(root)).split()
    said = say("merge", "~/base", "~/ft1", "~/ft2/model.safetensors", *typed)
    assert said.status == 0, said.err
    assert (root / "x/model.safetensors").is_file()
    assert list((tmp_path / "work").iterdir()) == []
    assert say("compare", "~/base", "~/ft1", "~/ft2", "--plot", "~/angles.png").status == 0
    assert (root / "angles.png").is_file()


def test_one_fine_tune(say, home):
    said = say("merge", "~/base", "~/ft1", "--out", "x")
    assert said.status == 1 and "--method wise-ft --alpha 0.5" in said.err
    assert said.err.count("\n") == 1
    assert (
        say(
            "merge", "~/base", "~/ft1", "--out", "x", "--method", "wise_ft", "--alpha", "0.5"
        ).status
        == 0
    )
    said = say("compare", "~/base", "~/ft1")
    assert said.status == 1 and "wise_ft" not in said.err and "2 or more" in said.err
    for typed in (["~/base"], []):
        said = say("merge", *typed, "--out", "y")
        assert said.status == 1 and "BASE FT1 FT2" in said.err


@pytest.mark.parametrize(("option", "needs"), [("wise_ft", "--alpha 0.5"), ("slerp", "--t 0.5")])
def test_a_method_without_its_number(say, home, option, needs):
    said = say("merge", "~/base", "~/ft1", "--out", "x", "--method", option)
    assert said.status == 1 and needs in said.err


def kohya(kind):
    rng = np.random.default_rng(0)
    names = {
        "text": "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "unet": "lora_unet_down_blocks_0_attentions_0_proj_in",
        "te1": "lora_te1_x",
    }
    start = names[kind]
    return {
        f"{start}.lora_down.weight": rng.standard_normal((2, 8)).astype(np.float32),
        f"{start}.lora_up.weight": rng.standard_normal((8, 2)).astype(np.float32),
        f"{start}.alpha": np.float32(2),
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


@pytest.mark.parametrize("where", ["file", "directory", "first"])
@pytest.mark.parametrize("kind", LORA)
def test_a_lora_file_of_another_library_is_named(say, home, kind, where):
    root, _ = home
    content, named = LORA[kind]
    names = {"peft": "adapter_model.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}
    path = write(root / "lora", {names.get(kind, "my_lora.safetensors"): content})
    if where == "file":
        path = next(path.iterdir())
    models = ["~/base", path, "~/ft2"] if where != "first" else [path, "~/ft1", "~/ft2"]
    said = say("merge", *models, "--out", "x")
    assert said.status == 1 and str(path) in said.err and said.err.count("\n") == 1
    assert named in said.err, said.err


def test_an_adapter_as_base_and_a_file_behind_a_plus(say, home):
    root, _ = home
    (root / "lora").mkdir()
    write_tensors(root / "lora/adapter_model.safetensors", PEFT)
    (root / "lora/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 3})
    )
    said = say("merge", "~/lora", "~/ft1", "~/ft2", "--out", "x")
    assert said.status == 1 and f"{root}/lora " in said.err and "BASE" in said.err
    said = say("merge", "~/base", "~/base+~/lora", "~/ft2", "--out", "x")
    assert said.status == 0, said.err
    (first, _) = load(root.parent / "work/x/merge_report.json")["models"]
    assert first["model"] == f"{root}/base+{root}/lora"
    assert say("merge", "~/base", "~/lora", "~/ft2", "--out", "y").status == 0
    for name, value in tensors(root.parent / "work/x").items():
        np.testing.assert_array_equal(value, tensors(root.parent / "work/y")[name])
    said = say("merge", "~/base", "~/base+~/lora/adapter_model.safetensors", "~/ft2", "--out", "z")
    assert said.status == 1 and "adapter_config.json" in said.err
    # The adapter's file in a directory that has its config: give the directory.
    said = say("merge", "~/base", "~/lora/adapter_model.safetensors", "~/ft2", "--out", "z")
    assert said.status == 1 and "save_pretrained" in said.err


@pytest.mark.parametrize(("command", "most"), [("merge", 60), ("compare", 45)])
def test_help_fits_one_screen(command, most, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = parsers()[1][command].format_help().splitlines()
    assert len(lines) <= most
    assert [line for line in lines if len(line) > 80] == []
    assert any(line.startswith("examples:") for line in lines)


def test_help_says_every_option_and_value():
    for parser in parsers()[1].values():
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            if action.option_strings:
                assert action.option_strings[0] in text and action.help
                for value in action.choices or ():
                    default = {"error", "keep"} | set(DTYPES)
                    assert str(value) in text or value in default, (action.dest, value)


def test_every_example_of_the_help_is_read():
    top, commands = parsers()
    for name, parser in commands.items():
        for line in parser.format_help().splitlines():
            if line.startswith(f"  modelstock {name} "):
                words = line.replace("'", "").split(" > ")[0].split()[2:]
                assert parser.parse(words).models


def test_the_command_in_a_shell(home, tmp_path):
    """`python -m modelstock_jax` with a recipe, as mergekit-yaml is called."""
    root, _ = home
    done = subprocess.run(
        [sys.executable, "-m", "modelstock_jax", "merge", str(root / "r.yml"), "x", "--dry-run"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"HOME": str(root), "PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0 and "to write" in done.stdout, done.stderr
