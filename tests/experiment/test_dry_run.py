"""`--dry-run`: sizes and missing inputs of a run, without reading, training or writing."""

from __future__ import annotations

import json
import re
import shutil
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import folder, glyphs, vitl14
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.dry_run import (
    abstract_step_functions,
    disk_use,
    dry_run,
    missing_space,
)
from modelstock_jax.experiment.setup import missing_checkpoint, open_anchor, sizes
from modelstock_jax.models.preprocessor import PREPROCESSOR_FILE
from modelstock_jax.training.cost_analysis import device_bytes, memory, temporary_bytes
from modelstock_jax.training.step_fns import StepFunctions
from tests.experiment import small_run
from tests.training import tiny

# Compiling takes most of the time of a dry run; it is tested below with real programs.
NO_COMPILING = (
    "import jax; from modelstock_jax.training.step_fns import StepFunctions; "
    "StepFunctions.lower = lambda self, batch: {'step': jax.jit(lambda x: x).lower(1.0)}; "
)
LAUNCH = "import runpy, sys; sys.argv[0] = 'x'; runpy.run_path('launch.py', run_name='__main__')"


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    return small_run.save_anchor(tmp_path_factory.mktemp("anchor") / "clip")


def small(anchor):
    config = glyphs.get_config()
    config.pretrained, config.batch_size, config.epochs = str(anchor), 512, 2
    return config


def test_run_without_missing_inputs(anchor, tmp_path, capsys, monkeypatch):
    cheap = {"step": jax.jit(lambda x: x).lower(1.0)}
    monkeypatch.setattr(StepFunctions, "lower", lambda self, batch: cheap)
    assert dry_run(small(anchor), tmp_path / "run") == []
    printed = capsys.readouterr().out
    for words in (
        "glyphs: 4,096",
        "62 classes",
        "image uint8 [2, 512, 24, 24, 3], label int32 [2, 512]",
        "image [1, 128, 24, 24, 3]",
        "replica 2 x data 4 ",
        "16 in 2 epochs",
        "2 merges",
        "unit tensor",
        "0.002 in 2 steps",
        "peak of a merge",
        "optimizer state",
        "nothing is missing",
    ):
        assert words in printed, (words, printed)
    assert printed.index("nothing is missing") < printed.index("image tower")
    compiling = printed.index("compiling the train step for 8 devices ...")
    assert printed.index("estimated") < compiling < printed.index("compiled the step")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def not_compiled(monkeypatch):
    def fail(self, batch):
        raise AssertionError("compiles")

    monkeypatch.setattr(StepFunctions, "lower", fail)


def test_a_device_is_asked_about_without_compiling(anchor, tmp_path, capsys, not_compiled):
    config = small(anchor)
    config.mesh.replica = config.mesh.data = 1
    assert dry_run(config, tmp_path / "run", device_memory=1.0) == []
    assert "fits in 1 GB: needs " in capsys.readouterr().out
    (problem,) = dry_run(config, tmp_path / "run", device_memory=0.01)
    assert problem.startswith("does not fit in 0.01 GB: needs ")
    printed = capsys.readouterr().out
    assert problem.split(";")[0] in printed and "missing" in printed
    options = re.findall(r"fits with .*--config\.gradient_accumulation_steps=(\d+)", printed)
    assert options and "--config.compute.remat=True" in printed, printed
    # With these options it fits.
    config.gradient_accumulation_steps = int(options[0])
    assert dry_run(config, tmp_path / "run", device_memory=0.01) == []
    (problem,) = dry_run(config, tmp_path / "run", device_memory=0.0001)
    assert "no option was found" in capsys.readouterr().out


def test_the_fraction_of_a_gpu_that_jax_allocates(
    anchor, tmp_path, capsys, not_compiled, monkeypatch
):
    config = small(anchor)
    dry_run(config, tmp_path / "run", device_memory=1.0)
    assert "allocates 750.0 MB" in capsys.readouterr().out
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    dry_run(config, tmp_path / "run", device_memory=1.0)
    assert "allocates 900.0 MB" in capsys.readouterr().out
    for value in ("abc", "0", "-1", "nan"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", value)
        with pytest.raises(UserError, match=f"MEM_FRACTION={value} "):
            dry_run(config, tmp_path / "run", device_memory=1.0)


def test_an_accelerator_is_compared_with_its_own_memory(anchor, tmp_path, capsys, monkeypatch):
    cheap = {"step": jax.jit(lambda x: x).lower(1.0)}
    monkeypatch.setattr(StepFunctions, "lower", lambda self, batch: cheap)
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    (problem,) = dry_run(small(anchor), tmp_path / "run")
    assert "does not fit in this device" in problem


def test_missing_inputs_of_a_folder_are_all_listed(tmp_path, capsys):
    config = folder.get_config()
    config.pretrained = str(tmp_path / "clip")
    missing = dry_run(config, tmp_path / "run")
    assert len(missing) == 2 and "clip" in missing[0] and "--config.data.root=DIR" in missing[1]
    assert "missing 2: " in capsys.readouterr().out


def test_programs_are_compiled_at_the_same_time(anchor, tmp_path, monkeypatch):
    both, program = threading.Barrier(2, timeout=60), jax.jit(lambda x: x).lower(1.0)

    def compile_():
        both.wait()
        return program.compile()

    lowered = dict.fromkeys(("step", "merge"), SimpleNamespace(compile=compile_))
    monkeypatch.setattr(StepFunctions, "lower", lambda self, batch: lowered)
    assert dry_run(small(anchor), tmp_path / "run") == []

    def fail():
        raise UserError("of a compiler")

    lowered["merge"] = SimpleNamespace(compile=fail)
    lowered["step"] = program
    with pytest.raises(UserError, match="of a compiler"):
        dry_run(small(anchor), tmp_path / "run")


def test_files_of_names_and_templates(anchor, tmp_path, capsys, monkeypatch):
    cheap = {"step": jax.jit(lambda x: x).lower(1.0)}
    monkeypatch.setattr(StepFunctions, "lower", lambda self, batch: cheap)
    config, names = small(anchor), tmp_path / "names.txt"
    config.data.class_names, config.data.templates = str(names), "/nonexistent.json"
    missing = dry_run(config, tmp_path / "run")
    assert missing[0].startswith(f"data.class_names: {names}: no such file; ")
    assert missing[1].startswith("data.templates: /nonexistent.json: no such file; ")
    printed = capsys.readouterr().out
    assert f"missing 1: {missing[0]}" in printed and "2 missing inputs, listed above" in printed
    names.write_text("one\n")
    config.data.templates = ""
    (line,) = dry_run(config, tmp_path / "run")
    assert "1 class name, but the data has 62 classes" in line


def test_trained_text_tower(anchor, tmp_path, capsys, monkeypatch):
    config = small(anchor)
    config.objective.name = "flyp"
    programs, sizes = abstract_step_functions(config)
    towers = 4 * sum(x.size for x in jax.tree.leaves(programs.task.params))
    # Both towers and the scale: the checkpoint has nothing else to export.
    assert disk_use(config, programs, sizes.model).model == towers
    cheap = {"step": jax.jit(lambda x: x).lower(1.0)}
    monkeypatch.setattr(StepFunctions, "lower", lambda self, batch: cheap)
    assert dry_run(config, tmp_path / "run") == []
    printed = capsys.readouterr().out
    for words in ("computes the head; trained", "8 features, 62 classes"):
        assert words in printed, (words, printed)


def test_invalid_option(anchor, tmp_path):
    config = small(anchor)
    config.export.formats = ("huggingface",)
    with pytest.raises(UserError, match="export.formats='huggingface'"):
        dry_run(config, tmp_path / "run")
    config = small(anchor)
    config.num_replicas = 1
    with pytest.raises(UserError, match="num_replicas=1: a merge needs .*merge.every=never"):
        dry_run(config, tmp_path / "run")


def test_everything_missing_is_listed_with_how_to_fix_it(anchor, tmp_path):
    bare = tmp_path / "clip"
    bare.mkdir()
    shutil.copy(anchor / "config.json", bare)
    code, output = small_run.finish(
        "--config=configs/vitb32.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.pretrained={bare}",
        "--config.batch_size=64",
        "--config.epochs=2",
        "--dry-run",
        program=("-c", NO_COMPILING + LAUNCH),
    )
    assert code == 1 and "Traceback" not in output, output
    for words in (
        " 1: pretrained=",
        ".safetensors",
        " 2: data.root ",
        "--config.data.root=DIR",
        "1,281,167",
        "1,000 classes",
        "20,018",
        "40,036 in 2 epochs",
        "2 merges",
        "unit layer",
    ):
        assert words in output, (words, output)
    assert not (tmp_path / "run").exists()


def test_hub_id_is_planned_without_its_files(monkeypatch):
    def not_found(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr("huggingface_hub.snapshot_download", not_found)
    config = vitl14.get_config()
    assert sizes(config).model.num_tokens == 257
    config.image_size = 448
    assert sizes(config).model.num_tokens == 1025
    config.pretrained = name = "openai/clip-vit-large-patch14-336"
    config.image_size = 0
    assert sizes(config).model.num_tokens == 577
    assert "`hf download openai/clip-vit-large-patch14-336`" in missing_checkpoint(name)[0]
    assert "--revision v2" in missing_checkpoint("some/clip@v2")[0]
    with pytest.raises(UserError, match="some/clip.*sizes"):
        config.pretrained = "some/clip"
        sizes(config)
    assert "../clip" in missing_checkpoint("../clip")[0]


def test_error_if_the_disk_is_too_small(anchor, monkeypatch, tmp_path):
    config = small(anchor)
    programs, sizes = abstract_step_functions(config)
    disk = disk_use(config, programs, sizes.model)
    replica = 4 * sum(x.size for x in jax.tree.leaves(programs.task.params))
    # Weights and two Adam moments of two replicas; keys and counters are a few bytes.
    assert disk.merged == replica and 6 * replica <= disk.state <= 6 * replica + 100
    # Two runs with an anchor and three states each, two merged models, and the exported model.
    assert disk.run == 2 * (replica + 3 * disk.state) + 2 * replica + disk.model
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk.run - 1))
    (line,) = missing_space(tmp_path / "a" / "b", disk)
    assert "--workdir" in line and "checkpoint.keep" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk.run))
    assert missing_space(tmp_path, disk) == []


def test_memory_equals_the_bytes_on_a_device(tmp_path):
    # The same run as in test_training_merge_equals_the_librarys, which is compiled only once.
    meshed = {"mesh__replica": 2, "mesh__data": 4}
    programs = tiny.trainer(tmp_path, epochs=1, merge__every="end", **meshed).step_functions
    batch = programs.abstract_batch(12)
    compiled = {name: lowered.compile() for name, lowered in programs.lower(batch).items()}
    use = memory(programs, compiled, batch)
    state = programs.init_state(0)

    def on_first_device(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert use.params == on_first_device(state.params) and use.opt_state == on_first_device(
        state.opt_state
    )
    assert use.anchor == use.merged == on_first_device(programs.anchor) == use.params
    assert use.batch == device_bytes(batch) == 4 * (12 * 12 * 3 + 4)
    assert use.gradients <= use.step_temporary
    assert (
        use.peak
        == max(use.step, use.merge)
        > use.total
        == 5 * use.anchor + (use.opt_state - 2 * use.params)
    )


def test_donated_buffers_are_not_counted_twice():
    x = jax.ShapeDtypeStruct((1 << 16,), np.float32)
    added = {
        donated: jax.jit(lambda x: x + 1, donate_argnums=donated).lower(x).compile()
        for donated in ((), (0,))
    }
    assert temporary_bytes(added[()]) >= 4 * x.size > temporary_bytes(added[(0,)])


def test_model_is_resized_to_another_image_size(anchor):
    config = vitl14.get_config()
    config.pretrained, config.image_size = str(anchor), 36
    resized = open_anchor(config)
    assert resized.config == sizes(config).model and resized.preprocessor.image_size == 36
    assert resized.params["image_tower"]["position_embedding"].shape == (10, 12)
    config.image_size = 30
    with pytest.raises(UserError, match="30.*patch_size"):
        open_anchor(config)
    config.data.name = "glyphs"
    with pytest.raises(UserError, match="image_size=30"):
        sizes(config)


def test_the_resize_before_the_crop_is_scaled_with_the_image_size(anchor, tmp_path):
    shutil.copytree(anchor, tmp_path / "clip")
    path = tmp_path / "clip" / PREPROCESSOR_FILE
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"size": {"shortest_edge": 32}, "resample": 2}))
    config = vitl14.get_config()
    config.pretrained, config.image_size = str(tmp_path / "clip"), 36
    resized = open_anchor(config).preprocessor
    assert (resized.image_size, resized.short_side, resized.resample) == (36, 48, 2)


def test_a_filter_that_the_device_lacks_is_an_error_before_weights_are_read(anchor, tmp_path):
    path = tmp_path / PREPROCESSOR_FILE
    for name in ("config.json", PREPROCESSOR_FILE):
        shutil.copy(anchor / name, tmp_path / name)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 0}))
    config = vitl14.get_config()
    config.pretrained = str(tmp_path)
    assert sizes(config).image_size == 24
    config.data.resize_on = "device"
    with pytest.raises(UserError, match="data.resize_on"):
        sizes(config)


def test_pretraining_has_no_dry_run():
    config = glyphs.get_config()
    config.task = "pretrain"
    with pytest.raises(UserError, match="--dry-run.*pretrain"):
        dry_run(config, "runs/none")
