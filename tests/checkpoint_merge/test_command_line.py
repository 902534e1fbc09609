"""Standard streams that are closed, full or not UTF-8, and options that are misspelt."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from modelstock_jax.checkpoint_merge.cli import main, parsers
from modelstock_jax.errors import near
from modelstock_jax.registry import COMMANDS
from modelstock_jax.tensor_files.reader import TensorFiles
from tests.checkpoint_merge.engine import SHAPES
from tests.checkpoint_merge.small import llama, llama_shapes

ROOT = Path(__file__).parents[2]
# Drawing takes longer than all else, and is the same on every stream.
RUN = """
import sys
from modelstock_jax.checkpoint_merge import commands
from modelstock_jax.checkpoint_merge.cli import main
commands.PlotProcess.finish = lambda drawing: None
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base and two fine-tunes in a directory whose name is not ASCII; never written to."""
    return [str(path) for path in llama(tmp_path_factory.mktemp("modèles"))]


def shell(redirection: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs the command with redirections of a shell; standard error comes from a file, too."""
    words = shlex.join([sys.executable, "-c", RUN, *map(str, arguments)])
    return subprocess.run(
        ["bash", "-c", f"{words} {redirection}"],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"PYTHONUNBUFFERED": ""} | environment,
        timeout=120,
    )


def is_merged(out: Path) -> bool:
    report = json.loads((out / "merge_report.json").read_text())
    names = {path.name for path in out.parent.iterdir() if path.name.startswith(".")}
    return set(TensorFiles(out)) == set(llama_shapes()) and bool(report["units"]) and not names


@pytest.mark.parametrize(("redirection", "said", "options"), [
    (">&-", "", ["--json"]), (">&- 2>&-", "", []), ("<&- >&- 2>&-", "", []),
    ("1</dev/null", "Bad file descriptor", []), (">/dev/full", "No space left on device", []),
    (">/dev/full", "No space left on device", ["--json"]), (">/dev/full 2>/dev/full", "", []),
    ("| true", "", []), ("| true", "", ["--json"]),
])  # fmt: skip
def test_a_merge_is_kept_whatever_becomes_of_its_output(
    models, tmp_path, redirection, said, options
):
    out = tmp_path / "out"
    ended = "; exit ${PIPESTATUS[0]}"
    done = shell(redirection + ended, "merge", *models, "--out", out, *options)
    error = done.stderr.decode()
    assert done.returncode == 0 and is_merged(out), error
    assert "Traceback" not in error and "Exception" not in error
    notes = [line for line in error.splitlines() if line.startswith("note: ")]
    assert len(notes) == bool(said) and all(said in note for note in notes), error


@pytest.mark.parametrize(("redirection", "status", "said", "options"), [
    (">&- 2>&-", 0, "", []), (">/dev/full 2>/dev/full", 1, "", []), ("| true", 1, "", []),
    (">/dev/full", 1, "No space left on device", []), ("1</dev/null", 1, "Bad file descriptor", []),
    (">/dev/full", 1, "No space left on device", ["--json"]),
])  # fmt: skip
def test_a_comparison_that_cannot_be_shown(models, redirection, status, said, options):
    done = shell(redirection + "; exit ${PIPESTATUS[0]}", "compare", *models, *options)
    error = done.stderr.decode()
    assert done.returncode == status, error
    assert "Traceback" not in error and "Exception" not in error
    errors = [line for line in error.splitlines() if line.startswith("error")]
    assert len(errors) == bool(said) and all(said in line for line in errors), error


def test_a_dry_run_that_cannot_be_shown_is_an_error(models, tmp_path):
    done = shell(">/dev/full", "merge", *models, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 1 and done.stderr.startswith(b"error: ")
    assert b"No space left on device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_mistakes_with_closed_streams_keep_their_status(models, tmp_path):
    for redirection in (">&- 2>&-", ">/dev/full 2>/dev/full"):
        for status, options in ((1, ["--alpha", "0.5"]), (2, ["--methd", "x"])):
            done = shell(redirection, "merge", *models, "--out", tmp_path / "out", *options)
            assert done.returncode == status and not (tmp_path / "out").exists()
    for option in ("--help", "--version"):
        assert b"Traceback" not in shell(">/dev/full", option).stderr


def test_no_file_of_a_merge_gets_the_number_of_a_closed_stream(models, tmp_path):
    """A message of a library on standard error would be written into it."""
    seen = tmp_path / "seen"
    code = RUN.replace(
        "commands.PlotProcess.finish = ",
        f"""
import os
real = os.open
def call(path, *args, **kwargs):
    number = real(path, *args, **kwargs)
    if str(path) != os.devnull:
        open({str(seen)!r}, "a").write(f"{{number}} {{path}}\\n")
    return number
os.open = call
commands.PlotProcess.finish = """,
    )
    words = shlex.join(
        [sys.executable, "-c", code, "merge", *models, "--out", str(tmp_path / "out")]
    )
    subprocess.run(["bash", "-c", f"{words} <&- >&- 2>&-"], cwd=ROOT, check=True, timeout=120)
    numbers = {int(line.split()[0]) for line in seen.read_text().splitlines()}
    assert is_merged(tmp_path / "out") and len(numbers) > 1 and min(numbers) > 2


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["ascii", "latin-1", "C"],
)
@pytest.mark.parametrize("command", ["merge", "compare"])
def test_streams_that_are_not_utf8(models, tmp_path, environment, command):
    options = ["--out", tmp_path / "ôut–…"] if command == "merge" else []
    for more in ([], ["--json"]):
        done = shell("", command, *models, *options, *more, **environment)
        assert done.returncode == 0, done.stderr
        said = done.stdout.decode("latin-1") + done.stderr.decode("latin-1")
        assert "Traceback" not in said and ("m" in said and "down_proj" in said or not more)
        if command == "merge":
            assert is_merged(tmp_path / "ôut–…")
            options = [*options[:2], "--overwrite"]
    # A name that is not there is one line on every stream, too.
    done = shell("", command, models[0], models[1], "/ôther–", *options[:2], **environment)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert b"ther" in done.stderr


def test_bars_of_progress_on_a_terminal_that_is_not_utf8(models, tmp_path):
    """On a terminal rich draws with lines and bars that ASCII lacks."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", RUN, "merge", *models, "--out", str(tmp_path / "out")], cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "TERM": "xterm"},
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
    ) as merge:  # fmt: skip
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # How a terminal ends.
            while piece := os.read(ours, 1000):
                shown += piece
    os.close(ours)
    assert merge.returncode == 0 and is_merged(tmp_path / "out"), shown
    assert b"Traceback" not in shown and b"21 interpolated" in shown and b"\x1b[" in shown
    assert shown.isascii()


def test_names_that_are_not_text(models, tmp_path):
    """Bytes that are no UTF-8 in a path: shown as escapes, in the summary and in the card."""
    base = os.fsdecode(os.fsencode(tmp_path / "b") + b"\xff")
    os.symlink(models[0], base)
    for command in (
        ["merge", base, *models[1:], "--out", str(tmp_path / "out")],
        ["compare", base, *models[1:]],
    ):
        done = shell("", *command)
        assert done.returncode == 0, done.stderr
    assert r"b\udcff" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    # The same name in a locale that has no such letters is in the card as it is on the disk.
    done = shell(
        "",
        "merge",
        *models,
        "--out",
        tmp_path / "other",
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )
    assert done.returncode == 0 and models[0] in (tmp_path / "other/README.md").read_text("utf-8")


# What is typed -> the noun of what must be said of it.
FOREIGN = {
    **dict.fromkeys(
        ("--device", "--cuda", "--gpu", "--gpus", "--multi-gpu", "--device-map"), "accelerator"
    ),
    "--trust-remote-code": "code",
    "--trust_remote_code": "code",
    "--lazy-unpickle": "tensors",
    "--low-cpu-memory": "tensors",
    "--copy-tokenizer": "tokenizer",
    "--no-copy-tokenizer": "tokenizer",
    "--out-shard-size": "--max-shard-size",
    "--write-model-card": "card",
    "--allow-crimes": "models",
    "--base-model": "BASE",
    "--base": "BASE",
    "--models": "BASE FT1 FT2",
    **dict.fromkeys(("--output", "-o", "--output-dir", "--out-path"), "--out"),
    "--weight": "--weights",
    "--lambda": "--scale",
    "--num-threads": "--threads",
}


@pytest.fixture
def say(capsys):
    """What is said of an option, in one line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and not out and err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize(("option", "said"), FOREIGN.items(), ids=FOREIGN)
def test_options_of_other_tools(say, option, said):
    for typed in ([option, "x"], [f"{option}=x"], [option]):
        line = say("merge", "B", "F1", "F2", "--out", "o", *typed)
        start = f"error: {option}: "
        assert line.startswith(start) and said in line.removeprefix(start)


def test_an_option_that_a_command_lacks_is_not_advised(say):
    assert "--out " not in say("compare", "B", "F1", "F2", "--output", "o")
    assert "--device: " in say("compare", "B", "F1", "F2", "--device", "cpu")


def test_no_option_of_ours_is_said_to_be_of_another_tool(say):
    """Whoever adds an option that is in the table removes it there."""
    from modelstock_jax.checkpoint_merge.cli import elsewhere

    for parser in parsers()[1].values():
        for option in parser._option_string_actions:
            assert elsewhere(option, parser._option_string_actions) is None, option


@pytest.mark.parametrize(("typed", "meant"), [
    ("--methd", "--method"), ("--Method", "--method"), ("--max_shard_size", "--max-shard-size"),
    ("--shrad-size", None), ("--max-shard", "--max-shard-size"), ("--exlude", "--exclude"),
    ("--dtyp", "--dtype"), ("--overwite", "--overwrite"), ("--over", "--overwrite"),
    ("--out-file", "--out"), ("--num-head", "--num-heads"), ("--unit-size", "--unit"),
    ("--out-dtype", "--dtype"), ("--wieghts", "--weights"), ("--dryrun", "--dry-run"),
    ("--outlier-threshold", None), ("--verbose", None), ("--quiet", None), ("--tau", None),
    ("--prompt", None), ("--recursive", None), ("--no", None), ("--q", None),
    ("--strength", None), ("--layers", None), ("--revision", None), ("--evaluate", None),
])  # fmt: skip
def test_an_option_is_suggested_only_where_it_is_meant(say, typed, meant):
    line = say("merge", "B", "F1", "F2", "--out", "o", typed, "x")
    assert f"unknown option {typed}" in line
    assert f"did you mean {meant!r}" in line if meant else "did you mean" not in line


def test_no_option_breaks_the_line(say):
    assert r"unknown option '--a\nb'" in say("merge", "B", "F1", "F2", "--out", "o", "--a\nb")


@pytest.mark.parametrize(("word", "known", "meant"), [
    ("dtpe", ["dtype", "models", "slices"], "dtype"),
    ("base_modle", ["base_model", "models"], "base_model"),
    ("parameter", ["parameters", "models"], "parameters"),
    ("tokenizer", ["dtype", "models", "slices"], ""),
    ("TIES", COMMANDS, "ties"), ("task_arithmetics", COMMANDS, "task_arithmetic"),
    ("dare_ties", COMMANDS, ""), ("della_linear", COMMANDS, ""), ("karcher", COMMANDS, ""),
    ("breadcrumbs", COMMANDS, ""),
    ("layers.0.self_attn.q_proj.weight", SHAPES, "model.layers.0.self_attn.q_proj.weight"),
    ("model.layer.0.self_attn.q_proj.weight", SHAPES, "model.layers.0.self_attn.q_proj.weight"),
    ("layer.0.self_attn.q_proj.weight", SHAPES, ""),
    ("model.layers.7.self_attn.q_proj.weight", SHAPES, ""),
    ("model.layers.10.self_attn.q_proj.weight", SHAPES, ""),
    ("model.layers.0.self_attn.z_proj.weight", SHAPES, ""),
    ("model.layers.0.mlp.down_proj.weight", SHAPES, ""),
    ("h.100.weight", ["h.10.weight"], ""), ("h.w1", ["h.w"], ""),
    ("visual.proj.weight", SHAPES, ""), ("weight", SHAPES, ""),
    (3, COMMANDS, ""), ("", COMMANDS, ""), ("x", [], ""),
])  # fmt: skip
def test_names_keys_and_methods(word, known, meant):
    assert near(word, known) == (f" (did you mean {meant!r}?)" if meant else "")
