"""Standard streams that are closed, full or not UTF-8, and misspelled options."""

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
from modelstock_jax.errors import suggest
from modelstock_jax.registry import COMMANDS
from modelstock_jax.tensor_files.reader import TensorFiles
from tests.checkpoint_merge.engine import SHAPES
from tests.checkpoint_merge.small import llama, llama_shapes

ROOT = Path(__file__).parents[2]
# The figure is slow to draw and does not depend on the streams.
RUN = """
import sys
from modelstock_jax.checkpoint_merge import commands
from modelstock_jax.checkpoint_merge.cli import main
commands.PlotProcess.finish = lambda plot: None
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two fine-tunes in a directory with a non-ASCII name; tests do not change them."""
    return [str(path) for path in llama(tmp_path_factory.mktemp("modèles"))]


def shell(redirection: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run the command in a shell with redirections."""
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


@pytest.mark.parametrize(("redirection", "message", "options"), [
    (">&-", "", ["--json"]), (">&- 2>&-", "", []), ("<&- >&- 2>&-", "", []),
    ("1</dev/null", "Bad file descriptor", []), (">/dev/full", "No space left on device", []),
    (">/dev/full", "No space left on device", ["--json"]), (">/dev/full 2>/dev/full", "", []),
    ("| true", "", []), ("| true", "", ["--json"]),
])  # fmt: skip
def test_a_merge_succeeds_if_its_summary_cannot_be_printed(
    models, tmp_path, redirection, message, options
):
    out = tmp_path / "out"
    status = "; exit ${PIPESTATUS[0]}"
    process = shell(redirection + status, "merge", *models, "--out", out, *options)
    error = process.stderr.decode()
    assert process.returncode == 0 and is_merged(out), error
    assert "Traceback" not in error and "Exception" not in error
    notes = [line for line in error.splitlines() if line.startswith("note: ")]
    assert len(notes) == bool(message) and all(message in note for note in notes), error


@pytest.mark.parametrize(("redirection", "status", "message", "options"), [
    (">&- 2>&-", 0, "", []), (">/dev/full 2>/dev/full", 1, "", []), ("| true", 1, "", []),
    (">/dev/full", 1, "No space left on device", []), ("1</dev/null", 1, "Bad file descriptor", []),
    (">/dev/full", 1, "No space left on device", ["--json"]),
])  # fmt: skip
def test_a_comparison_that_cannot_be_printed_is_an_error(
    models, redirection, status, message, options
):
    process = shell(redirection + "; exit ${PIPESTATUS[0]}", "compare", *models, *options)
    error = process.stderr.decode()
    assert process.returncode == status, error
    assert "Traceback" not in error and "Exception" not in error
    errors = [line for line in error.splitlines() if line.startswith("error")]
    assert len(errors) == bool(message) and all(message in line for line in errors), error


def test_a_dry_run_that_cannot_be_printed_is_an_error(models, tmp_path):
    process = shell(">/dev/full", "merge", *models, "--out", tmp_path / "out", "--dry-run")
    assert process.returncode == 1 and process.stderr.startswith(b"error: ")
    assert b"No space left on device" in process.stderr
    assert not (tmp_path / "out").exists()


def test_errors_with_closed_streams_have_the_same_exit_status(models, tmp_path):
    for redirection in (">&- 2>&-", ">/dev/full 2>/dev/full"):
        for status, options in ((1, ["--alpha", "0.5"]), (2, ["--methd", "x"])):
            process = shell(redirection, "merge", *models, "--out", tmp_path / "out", *options)
            assert process.returncode == status and not (tmp_path / "out").exists()
    for option in ("--help", "--version"):
        assert b"Traceback" not in shell(">/dev/full", option).stderr


def test_no_file_of_a_merge_gets_the_descriptor_of_a_closed_stream(models, tmp_path):
    """Otherwise a library's message on standard error would be written into the file."""
    log = tmp_path / "log"
    code = RUN.replace(
        "commands.PlotProcess.finish = ",
        f"""
import os
real = os.open
def call(path, *args, **kwargs):
    number = real(path, *args, **kwargs)
    if str(path) != os.devnull:
        open({str(log)!r}, "a").write(f"{{number}} {{path}}\\n")
    return number
os.open = call
commands.PlotProcess.finish = """,
    )
    words = shlex.join(
        [sys.executable, "-c", code, "merge", *models, "--out", str(tmp_path / "out")]
    )
    subprocess.run(["bash", "-c", f"{words} <&- >&- 2>&-"], cwd=ROOT, check=True, timeout=120)
    numbers = {int(line.split()[0]) for line in log.read_text().splitlines()}
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
    for json_option in ([], ["--json"]):
        process = shell("", command, *models, *options, *json_option, **environment)
        assert process.returncode == 0, process.stderr
        text = process.stdout.decode("latin-1") + process.stderr.decode("latin-1")
        assert "Traceback" not in text
        assert "m" in text and "down_proj" in text or not json_option
        if command == "merge":
            assert is_merged(tmp_path / "ôut–…")
            options = [*options[:2], "--overwrite"]
    # The error for a missing model is one line on every stream.
    process = shell("", command, models[0], models[1], "/ôther–", *options[:2], **environment)
    assert process.returncode == 1 and process.stderr.count(b"\n") == 1
    assert b"ther" in process.stderr


def test_progress_bars_on_a_terminal_that_is_not_utf8(models, tmp_path):
    """On a terminal rich draws lines and bars that are not ASCII."""
    main_fd, terminal_fd = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", RUN, "merge", *models, "--out", str(tmp_path / "out")], cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "TERM": "xterm"},
        stdin=subprocess.DEVNULL, stdout=terminal_fd, stderr=terminal_fd,
    ) as merge:  # fmt: skip
        os.close(terminal_fd)
        shown = b""
        with contextlib.suppress(OSError):  # Reading from a closed terminal is an error.
            while piece := os.read(main_fd, 1000):
                shown += piece
    os.close(main_fd)
    assert merge.returncode == 0 and is_merged(tmp_path / "out"), shown
    assert b"Traceback" not in shown and b"21 interpolated" in shown and b"\x1b[" in shown
    assert shown.isascii()


def test_names_that_are_not_text(models, tmp_path):
    """Paths that are not UTF-8 appear as escapes in the summary and in the model card."""
    base = os.fsdecode(os.fsencode(tmp_path / "b") + b"\xff")
    os.symlink(models[0], base)
    for command in (
        ["merge", base, *models[1:], "--out", str(tmp_path / "out")],
        ["compare", base, *models[1:]],
    ):
        process = shell("", *command)
        assert process.returncode == 0, process.stderr
    assert r"b\udcff" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    # In a locale without these letters, the card contains the name as on the disk.
    process = shell(
        "",
        "merge",
        *models,
        "--out",
        tmp_path / "other",
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )
    assert process.returncode == 0 and models[0] in (tmp_path / "other/README.md").read_text(
        "utf-8"
    )


# Option as typed -> word that the error must contain.
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
    """Run the command with an option that is an error; return the error, which is one line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and not out and err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize(("option", "word"), FOREIGN.items(), ids=FOREIGN)
def test_options_of_other_tools(say, option, word):
    for typed in ([option, "x"], [f"{option}=x"], [option]):
        line = say("merge", "B", "F1", "F2", "--out", "o", *typed)
        start = f"error: {option}: "
        assert line.startswith(start) and word in line.removeprefix(start)


def test_no_error_suggests_an_option_that_the_command_lacks(say):
    assert "--out " not in say("compare", "B", "F1", "F2", "--output", "o")
    assert "--device: " in say("compare", "B", "F1", "F2", "--device", "cpu")


def test_no_option_of_this_command_is_in_the_tables_of_other_options():
    """A new option must be removed from the tables of options of other tools and old options."""
    from modelstock_jax.checkpoint_merge.cli import advice_on

    for parser in parsers()[1].values():
        for option in parser._option_string_actions:
            assert advice_on(option, parser._option_string_actions) is None, option


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
def test_an_option_is_suggested_only_if_it_is_similar(say, typed, meant):
    line = say("merge", "B", "F1", "F2", "--out", "o", typed, "x")
    assert f"unknown option {typed}" in line
    assert f"did you mean {meant!r}" in line if meant else "did you mean" not in line


def test_an_option_with_a_line_break_is_escaped(say):
    assert r"unknown option '--a\nb'" in say("merge", "B", "F1", "F2", "--out", "o", "--a\nb")


@pytest.mark.parametrize(("word", "known", "meant"), [
    ("dtpe", ["dtype", "models", "slices"], "dtype"),
    ("base_modle", ["base_model", "models"], "base_model"),
    ("parameter", ["parameters", "models"], "parameters"),
    ("tokenizer", ["dtype", "models", "slices"], ""),
    ("TIES", COMMANDS, "ties"), ("task_arithmetics", COMMANDS, "task_arithmetic"),
    ("dare_tise", COMMANDS, "dare_ties"), ("della_linaer", COMMANDS, "della_linear"),
    ("regmean", COMMANDS, ""), ("consensus", COMMANDS, ""),
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
def test_suggestions_for_names_keys_and_methods(word, known, meant):
    assert suggest(word, known) == (f" (did you mean {meant!r}?)" if meant else "")
