"""Is a command one that the programs take? Parsed by their own parsers; nothing is run."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from modelstock_jax.checkpoint_merge.arguments import parsers
from tests.docs.blocks import ROOT

# Programs of others, whose options are not ours to know.
OTHERS = {"git", "cd", "for", "done", "do", "wait", "srun", "gcloud", "hf", "python", "sbatch"}


def launch(arguments: Sequence[str]) -> str | None:
    """What is wrong with `python launch.py ARGUMENTS`; None where it would start."""
    return _flags("launch", [argument for argument in arguments])


def studies(arguments: Sequence[str]) -> str | None:
    """The same of `python -m modelstock_jax.studies`."""
    from modelstock_jax.studies.catalogue import STUDIES

    names = [a for a in arguments if not a.startswith("--")]
    if unknown := [name for name in names if name not in (*STUDIES, "all")]:
        return f"no study {unknown[0]}"
    return _flags("modelstock_jax.studies.__main__", [a for a in arguments if a.startswith("--")])


def _flags(module: str, arguments: list[str]) -> str | None:
    """Parses flags and --config as `command_line.parse` does, apart from the process's own."""
    argv, known = [module, *arguments], flags.FlagValues()
    for flag in flags.FLAGS.get_key_flags_for_module(importlib.import_module(module)):
        if flag.name != "config":
            known[flag.name] = copy.deepcopy(flag)
    config_flags.DEFINE_config_file("config", "configs/glyphs.py", "", known, sys_argv=argv)
    try:
        rest = known(argv)
        known.config.keys()
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        return " ".join(str(error).split())[-200:]
    return f"{rest[1]} is no flag" if rest[1:] else None


def modelstock(arguments: Sequence[str]) -> str | None:
    """What is wrong with `modelstock ARGUMENTS`."""
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
    """Each argument is a target, or a variable that is set."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lost = [a for a in arguments if "=" not in a and a not in targets]
    return f"no target {lost[0]}" if lost else None


def pip(arguments: Sequence[str]) -> str | None:
    """Requirement files are there, and so are the extras."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for option, value in zip(arguments, arguments[1:], strict=False):
        if option == "-r" and not (ROOT / value).is_file():
            return f"no file {value}"
        extra = re.fullmatch(r"\.\[(\w+)\]", value) if option == "-e" else None
        if extra and extra[1] not in known:
            return f"no extra {extra[1]}"
    return None


def paths(arguments: Sequence[str]) -> str | None:
    """Files of this repository that are named are there."""
    lost = [a for a in arguments
            if re.fullmatch(r"(tests|benchmarks|docs|notebooks|modelstock_jax)/[\w/.-]+", a)
            and not (ROOT / a).exists()]
    return f"no file {lost[0]}" if lost else None


def _module(name: str, arguments: Sequence[str]) -> str | None:
    if name == "modelstock_jax":
        return modelstock(arguments)
    if name == "modelstock_jax.studies":
        return studies(arguments)
    if name.partition(".")[0] not in ("modelstock_jax", "tests", "benchmarks"):
        return None
    if not importlib.util.find_spec(name):
        return f"no module {name}"
    parser = {"modelstock_jax.data": "modelstock_jax.data.__main__",
              "modelstock_jax.clip.convert": "modelstock_jax.clip.convert"}.get(name)
    if parser:
        try:
            importlib.import_module(parser)._parser().parse_args(list(arguments))
        except SystemExit as end:
            return f"exit status {end.code}" if end.code else None
    return None


_PROGRAMS: dict[str, Callable[[Sequence[str]], str | None]] = {
    "modelstock": modelstock,
    "make": make,
    "pip": pip,
    "pytest": paths,
    "ruff": paths,
}


def wrong(command: str) -> str | None:
    """What is wrong with a command, as a line; None where its program would take it."""
    # $name and <placeholder> stand for what a reader puts there.
    words = shlex.split(re.sub(r"<[^>]*>", "PLACEHOLDER", command), comments=True)
    while words and ("=" in words[0].split("/")[0] or words[0] in ("do", "then", "srun", "done")
                     or (words[0].startswith("--") and "launch.py" in words)):
        words.pop(0)  # VARIABLE=value before a command, and what starts one.
    words = [word for word in words if word != "&"]
    if "python" not in (words[:1] or [""])[0] and "python" in words:
        words = words[words.index("python"):]
    if not words:
        return None
    program, arguments = words[0].rpartition("/")[2], words[1:]
    if program == "python" and arguments[:1] == ["launch.py"]:
        return launch(arguments[1:])
    if program == "python" and arguments[:2] == ["-m", "pip"]:
        return pip(arguments[2:])
    if program == "python" and arguments[:1] == ["-m"]:
        return _module(arguments[1], arguments[2:]) or paths(arguments)
    if program == "python" and arguments and (arguments[0].endswith(".py")):
        return None if (ROOT / arguments[0]).is_file() else f"no file {arguments[0]}"
    if program in _PROGRAMS:
        return _PROGRAMS[program](arguments)
    return None if program in OTHERS else f"what is {program!r}?"
