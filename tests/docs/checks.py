"""Check commands with the parsers of their programs; nothing is run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from modelstock_jax.checkpoint_merge.cli import parsers
from studies.catalog import STUDIES
from tests.docs.blocks import ROOT, simple_commands

# Programs of others; their options are not checked.
OTHERS = {"git", "cd", "for", "hf", "python", "source", "tensorboard", "tfds"}


def launch(arguments: Sequence[str]) -> str | None:
    """The error of `python launch.py ARGUMENTS`; None if it would start."""
    return _flags(ROOT / "launch.py", arguments)


def studies(arguments: Sequence[str]) -> str | None:
    """The error of `python -m studies ARGUMENTS`."""
    names = [a for a in arguments if not a.startswith("--")]
    if unknown := [name for name in names if name not in (*STUDIES, "all")]:
        return f"no study {unknown[0]}"
    options = [a for a in arguments if a.startswith("--")]
    return _flags(ROOT / "studies/__main__.py", options)


def _flags(program: Path, arguments: Sequence[str]) -> str | None:
    """Parse as `flags.parse` does, with separate flags: two programs share some names."""
    known, argv = flags.FlagValues(), [program.name, *arguments]
    for node in ast.walk(ast.parse(program.read_text())):
        name = getattr(getattr(node, "func", None), "attr", "")
        if isinstance(node, ast.Call) and name.startswith("DEFINE_"):
            getattr(flags, name)(*map(ast.literal_eval, node.args), flag_values=known)
    try:
        with warnings.catch_warnings():  # ml_collections reads a config file in an old way.
            warnings.simplefilter("ignore", DeprecationWarning)
            config_flags.DEFINE_config_file("config", "configs/glyphs.py", "", known, sys_argv=argv)
            rest = known(argv)
            known.config.keys()
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        return " ".join(str(error).split())[-200:]
    return f"{rest[1]} is no flag" if rest[1:] else None


def modelstock(arguments: Sequence[str]) -> str | None:
    """The error of `modelstock ARGUMENTS`."""
    top, known = parsers()
    try:
        if arguments[:1] and arguments[0] in known and "--help" not in arguments:
            known[arguments[0]].parse(list(arguments[1:]))
        else:
            top.parse_args(list(arguments))
    except SystemExit as end:
        return None if end.code == 0 else f"exit status {end.code}"
    return None


def make(arguments: Sequence[str]) -> str | None:
    """Each argument is a target or sets a variable."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lost = [a for a in arguments if "=" not in a and a not in targets]
    return f"no target {lost[0]}" if lost else None


def pip(arguments: Sequence[str]) -> str | None:
    """Requirement files and extras exist."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for option, value in zip(arguments, arguments[1:], strict=False):
        if option == "-r" and not (ROOT / value).is_file():
            return f"no file {value}"
        extras = re.fullmatch(r"\.\[([\w,]+)\]", value) if option == "-e" else None
        if extras and (lost := set(extras[1].split(",")) - known.keys()):
            return f"no extra {min(lost)}"
    return None


def uvx(arguments: Sequence[str]) -> str | None:
    """The command of this directory's package is checked."""
    if arguments[:3] != ["--from", ".", "modelstock"]:
        return "not --from . modelstock"
    return modelstock(arguments[3:])


def paths(arguments: Sequence[str]) -> str | None:
    """Named files of this repository exist."""
    lost = [
        a
        for a in arguments
        if re.fullmatch(r"(tests|benchmarks|docs|notebooks|modelstock_jax)/[\w/.-]+", a)
        and not (ROOT / a).exists()
    ]
    return f"no file {lost[0]}" if lost else None


def _module(name: str, arguments: Sequence[str]) -> str | None:
    if name == "modelstock_jax":
        return modelstock(arguments)
    if name == "studies":
        return studies(arguments)
    if name.partition(".")[0] not in ("modelstock_jax", "tests", "benchmarks"):
        return None
    if not importlib.util.find_spec(name):
        return f"no module {name}"
    parser = {
        "modelstock_jax.data": "modelstock_jax.data.__main__",
        "modelstock_jax.models.convert": "modelstock_jax.models.convert",
    }.get(name)
    if parser and len(arguments) > 1:  # Else it is only named.
        try:
            importlib.import_module(parser)._parser().parse_args(list(arguments))
        except SystemExit as end:
            return f"exit status {end.code}" if end.code else None
    return None


_PROGRAMS: dict[str, Callable[[Sequence[str]], str | None]] = {
    "modelstock": modelstock,
    "make": make,
    "pip": pip,
    "uvx": uvx,
    "pytest": paths,
    "ruff": paths,
}


def wrong(command: str) -> str | None:
    """The error of a command, as a line; None if its program accepts it."""
    words = shlex.split(command)
    while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] in ("do", "done", "wait")):
        words.pop(0)  # What stands before a command.
    if not words:
        return None
    program, arguments = words[0].rpartition("/")[2], words[1:]
    if program == "srun" and "python" in arguments:
        program, arguments = "python", arguments[arguments.index("python") + 1 :]
    if program == "python" and arguments[:1] == ["launch.py"]:
        return launch(arguments[1:])
    if program == "python" and arguments[:2] == ["-m", "pip"]:
        return pip(arguments[2:])
    if program == "python" and arguments[:1] == ["-m"]:
        return _module(arguments[1], arguments[2:]) or paths(arguments)
    if program == "python" and arguments and arguments[0].endswith(".py"):
        return None if (ROOT / arguments[0]).is_file() else f"no file {arguments[0]}"
    if program == "gcloud":  # What it starts on the hosts.
        inner = [a.partition("=")[2] for a in arguments if a.startswith("--command=")]
        return next(filter(None, map(wrong, (c for i in inner for c in simple_commands(i)))), None)
    if program in _PROGRAMS:
        return _PROGRAMS[program](arguments)
    return None if program in OTHERS else f"what is {program!r}?"
