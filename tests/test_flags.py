"""A user error after `python launch.py` is one line, printed at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.default import get_config
from modelstock_jax import flags
from modelstock_jax.fileio import flatten

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch.py"
OPTIONS = flatten(get_config().to_dict())


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(("argument", "message"), [
    ("--config.num_replica=3", " num_replica;.* num_replicas"),
    ("--config.merge.evry=3", " merge.evry;.* merge.every"),
    ("--config.foo=3", " foo .*docs/configuration.md"),
    ("--config.optimizer=sgd", "--config.optimizer .*group"),
    ("--config.optimizer.lr=1", r" optimizer\.lr;.* optimizer\.learning_rate\?"),
    ("--config.epochs=two", "error: --config.epochs=two: not an integer$"),
    ("--num_processes=two", "error: --num_processes=two: not an integer$"),
    ("--config.optimizer.b1=two", r"error: --config\.optimizer\.b1=two: not a number$"),
    ("--config.compare=maybe", r"error: --config\.compare=maybe: not true or false$"),
    ("--config=configs/vitl41.py", " configs/vitl41.py in "),
    ("--config=configs/vitl41.py", "configs/vitl41.py .*configs/vitl14.py"),
    ("--config=/nowhere.py", "--config: .* /nowhere.py .*choose one of .*configs/vitl14.py"),
    ("--config=configs/nope.py", " configs/nope.py in .*; choose one of configs/cifar10.py, "),
    ("--config=vitl14.py", r" vitl14\.py in .*; did you mean configs/vitl14\.py\?$"),
    ("--config=configs/vitl14.py:strnog", ":strnog.*:plain, :strong"),
    ("--confg=configs/vitl14.py", r"error: unknown flag --confg \(did you mean --config\?\)$"),
    ("--dry_run", r"error: unknown flag --dry_run \(did you mean --dry-run\?\)$"),
    ("--epochs=3", r"error: unknown flag --epochs \(did you mean --config\.epochs\?\)$"),
    ("--batch-size=3", r"unknown flag --batch-size \(did you mean --config\.batch_size\?\)$"),
    ("--zzz", "error: unknown flag --zzz$"),
    ("--checkpoint=runs/b32/model", "--mode=eval --checkpoint=runs/b32/model"),
    ("--config.log_every=3", r"--config\.log_every .*--config\.log_every_steps "),
    ("--noconfig.data.real", r"--config\.data\.real .*--config\.data\.real_labels "),
    ("-config.lr=3", r" lr; did you mean optimizer\.learning_rate\?"),
    ("--config.EPOCHS=3", r" EPOCHS; did you mean epochs\?"),
    ("--config.batch-size=3", r" batch-size; did you mean batch_size\?"),
    ("--config.optimizer.learning-rate=3", r" did you mean optimizer\.learning_rate\?"),
    ("--config.workdir=x", r" workdir; did you mean --workdir\?"),
    ("--config.batch_size=1OO", r"--config\.batch_size=1OO: not an integer \(.* 100,"),
    ("--config.optimizer.learning_rate=le-4", r"=le-4: not a number \(.* 1e-4,"),
    ("--config.epochs==", r"--config\.epochs=.* without spaces$"),
    ("--config.objective.car_ft_alpha=2", r"\.car_ft_alpha .* objective\.name='car_ft', not 'cros"),
    ("--config.optimizer.momentum=0", r"\.momentum .* optimizer\.name='sgd', not 'adamw'$"),
    ("--config=configs", r"configs in .*; choose one of .*configs/vitl14\.py"),
    ("--config=vitl14", r" vitl14 in .*; did you mean configs/vitl14\.py\?$"),
    ("--config=configs/vitL14.py", r" configs/vitL14\.py in .*; did you mean configs/vitl14"),
    ("--workdr=x", r"--workdr \(did you mean --workdir\?\)$"),
    ("--eval", r"unknown flag --eval \(did you mean --mode=eval\?\)$"),
    ("--device_memory=24", r"--device_memory .*--dry-run$"),
    ("--dry-run --device_memory=0", r"--device_memory=0: .* GB"),
    ("--dry-run --device_memory=nan", r"--device_memory=nan: .* GB"),
    ("--mode=eval", r"--checkpoint=DIR"),
    ("epochs=3", r"'epochs=3' \(did you mean --config\.epochs=3\?\)"),
    ("--config.watch.policy=stop", r"--config\.watch\.policy .*--config\.monitor\.on_non_finite "),
])  # fmt: skip
def test_an_error_is_one_line(argument, message):
    completed = run(LAUNCH, "--workdir=/dev/null/nowhere", *argument.split())
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr.count("\n") == 1
    assert completed.stderr.startswith("error: ") and "Errno" not in completed.stderr
    assert re.search(message, completed.stderr)


def renamed_options():
    """(old name, current name) of every option that `flags.RENAMED` renames."""
    pairs = []
    for old, new in flags.RENAMED.items():
        if old.endswith("."):
            names = [name.removeprefix(new) for name in OPTIONS if name.startswith(new)]
            assert names, old
            pairs += [(old + name, new + name) for name in names]
        else:
            pairs.append((old, new))
    # An exact name comes before a prefix such as "watch.": the first match counts.
    return {new: (old, new) for old, new in reversed(pairs)}.values()


@pytest.mark.parametrize(("old", "new"), renamed_options())
def test_an_old_name_is_answered_with_the_current_one(old, new):
    assert new in OPTIONS and old not in OPTIONS
    argv = ["launch.py", "--config.epochs=1", f"--config.{old}=x"]
    # What ml_collections raises for an option that does not exist.
    reason = repr(old.rpartition(".")[2])
    assert flags._unknown_option(reason, argv) == f"--config.{old} is now --config.{new}"


def test_every_entry_of_the_table_is_tested():
    tested = {old for old, _ in renamed_options()}
    for old in flags.RENAMED:
        assert old in tested or any(name.startswith(old) for name in tested), old


def test_names_in_files_are_renamed_and_back():
    old = {"watch.policy": "stop", "merge.method": "stock", "data.loading.prefetch": 2, "seed": 0}
    new = {
        "monitor.on_non_finite": "stop",
        "merge.method": "model_stock",
        "data.loader.prefetch": 2,
        "seed": 0,
    }
    assert flags.current_names(old) == flags.current_names(new) == new
    assert flags.first_names(new) == old


def test_help_lists_the_flags_of_the_program_and_exits_with_0():
    completed = run(LAUNCH, "--help")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert "--config.epochs=4" in completed.stdout
    assert "docs/configuration.md" in completed.stdout
    for flag in ("--config ", "--workdir ", "--mode ", "--dry-run ", "--device_memory "):
        assert f"\n  {flag}" in completed.stdout
    assert completed.stdout.count("\n") <= 30 and "--alsologtostderr" not in completed.stdout
    assert "--alsologtostderr" in run(LAUNCH, "--helpfull").stdout


def test_mistakes_on_the_command_line_are_found_before_jax_is_imported():
    program = "import runpy, sys; sys.argv = ['launch.py', '--mode=eval']\n"
    program += "try: runpy.run_path('launch.py', run_name='__main__')\n"
    program += "finally: print('jax' in sys.modules)"
    completed = run("-c", program)
    assert completed.returncode == 1 and "--checkpoint" in completed.stderr
    assert completed.stdout == "False\n"


def test_config_precedes_its_options():
    completed = run(LAUNCH, "--config.epochs=3", "--config=configs/vitb32.py")
    assert re.fullmatch(r"error: --config\.epochs precedes --config: .*\n", completed.stderr)


@pytest.mark.parametrize(("lines", "message"), [
    ("c.optimizer.learning_rte = 1", r"own\.py sets optimizer\.learning_rte.* optimizer\.learning"),
    ("c.epoch = 3", r"own\.py sets epoch.* did you mean epochs\?"),
    ("c.zzz = 3", r"own\.py sets zzz, which is not an option"),
    ("c.accumulate_steps = 3", r"accumulate_steps is now gradient_accumulation_steps"),
    ("c.epochs = '3'", r"own\.py: epochs must be of type int, not of type str"),
    ("c.optimizer = 3", r"own\.py: optimizer must be a group of options"),
    ("c.foo.bar = 3", r"own\.py, line 4: .*foo"),
    ("import nothere", r"own\.py, line 4: .*nothere"),
    ("1 / 0", r"own\.py, line 4: ZeroDivisionError"),
    ("assert not c.epochs, 'set it'", r"own\.py, line 4: AssertionError: set it"),
    ("open('/nowhere.txt')", r"own\.py reads /nowhere\.txt"),
    ("c = c.to_dict()", r"own\.py: get_config\(\) must return a ConfigDict"),
    ("c = None", r"own\.py: get_config\(\) returns nothing"),
    ("(", r"own\.py, line 4: "),
])  # fmt: skip
def test_a_mistake_in_a_config_file_is_one_line(lines, message, tmp_path):
    path = tmp_path / "own.py"
    head = "from configs import glyphs\ndef get_config():\n    c = glyphs.get_config()\n    "
    path.write_text(f"{head}{lines}\n    return c\n")
    completed = run(LAUNCH, f"--config={path}", "--dry-run")
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr.count("\n") == 1 and re.search(message, completed.stderr)


def test_a_config_file_needs_get_config(tmp_path):
    (tmp_path / "own.py").write_text("config = {}\n")
    completed = run(LAUNCH, f"--config={tmp_path / 'own.py'}")
    assert re.fullmatch(r"error: .*own\.py: .* get_config\(\)\n", completed.stderr)


def test_every_inapplicable_option_exists():
    config = get_config()
    for option, (selector, values) in flags._APPLIES_ONLY_TO.items():
        assert any(name == option or name.startswith(option) for name in OPTIONS), option
        reason = flags._inapplicable(next(n for n in OPTIONS if n.startswith(option)), config)
        applies = OPTIONS[selector] in values
        assert (reason == "") == applies and (applies or selector in reason)


def test_a_suggestion_of_the_studies():
    completed = run("-m", "studies", "--seeds=4")
    assert re.fullmatch(r"error: .*--seeds .*--num_seeds\?\)\n", completed.stderr)


def test_the_default_workdir_has_the_name_of_the_config(tmp_path):
    """Otherwise a second experiment would use the workdir of the first."""
    (tmp_path / "own.py").write_text("from configs.glyphs import get_config\n")
    (tmp_path / "runs").touch()
    completed = run(LAUNCH, "--config=own.py", cwd=tmp_path)
    assert completed.returncode == 1 and "--workdir=runs/own: " in completed.stderr


def test_another_project_may_have_its_own_default_config(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "default.py").write_text("raise SystemExit('of another project')\n")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    program += "from modelstock_jax.flags import *; parse(sys.argv)"
    config = f"--config={ROOT / 'configs' / 'glyphs.py'}"
    assert run("-c", program, config, cwd=tmp_path).returncode == 0
    completed = run("-c", program, config, "--config.epoch=3", cwd=tmp_path)
    assert "did you mean epochs?" in completed.stderr


def test_config_arguments_can_be_typed_again():
    program = "import sys; from modelstock_jax.flags import *; parse(sys.argv); "
    program += "print(config_arguments(sys.argv[1:]))"
    arguments = [
        "fig1",
        "--config",
        "configs/glyphs.py",
        "--config.compute.remat",
        "fig2",
        "--noconfig.data.check_counts",
        "--config.seed",
        "3",
        "--config.data.name=glyphs",
    ]
    completed = run("-c", program, *arguments)
    expected = [
        "--config=configs/glyphs.py",
        "--config.compute.remat",
        "--noconfig.data.check_counts",
        "--config.seed=3",
        "--config.data.name=glyphs",
    ]
    assert completed.stdout == f"{expected}\n", completed.stderr
