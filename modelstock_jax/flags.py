"""Flags and --config of the programs that take them; a mistake is one line and exit code 1."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

_ALL = "(all of them: docs/configuration.md)"


def parse(argv: list[str]) -> list[str]:
    """Reads absl's flags, and --config with its overrides.

    Args:
      argv: the program's name and its arguments.

    Returns:
      The program's name and the arguments that are no flags.
    """
    try:
        config_flags.DEFINE_config_file("config", "configs/glyphs.py", "The experiment.")
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.keys()  # The file is read when it is first used.
        return rest
    except OSError as error:
        sys.exit(f"error: --config: {_no_file(error)}")
    except flags.Error as error:  # A config file that raises brings its traceback.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        flag = lines[0].split(": Error whilst")[0] + ": " if len(lines) > 1 else ""
        if group := re.match(r"flag --config\.([\w.]+)=.* as a ConfigDict", lines[0]):
            sys.exit(f"error: --config.{group[1]} is a group of options, not one {_ALL}")
        sys.exit(f"error: {flag}{lines[-1].split('Error: ')[-1]}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(getattr(error.args[0], "args", error.args)[0]).split())
        sys.exit(f"error: --config has no such option: {_misspelt(reason, argv)} {_ALL}")


def run_name(config: str) -> str:
    """What a run is called after its config file.

    Example:
      >>> run_name("configs/vitl14.py:strong")
      'vitl14-strong'
    """
    return Path(config).name.replace(".py", "").replace(":", "-")


def config_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments of a command line that say what the config is, for a shell.

    Args:
      argv: without the program's name; its flags are parsed, so that a switch is known as one.

    Example:
      >>> config_arguments(["fig1", "--config", "my config.py", "--config.seed=3"])
      ["'--config=my config.py'", '--config.seed=3']
    """
    typed, rest = [], iter(argv)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if re.fullmatch(r"--?(no)?config(\.[\w.]+)?", name):
            whole = equals or _is_switch(name.lstrip("-"))
            typed.append(shlex.quote(argument if whole else f"{argument}={next(rest, '')}"))
    return typed


def _is_switch(name: str) -> bool:
    return name.startswith("no") or bool(name in flags.FLAGS and flags.FLAGS[name].boolean)


def _no_file(error: OSError) -> str:
    """A path that is none, with one that is there and looks like it."""
    reason = str(error).splitlines()[-1].strip()
    found = re.search(r"No such file or directory: '(.+)'", reason)
    if not found:
        return reason
    path = found[1]
    there = [os.fspath(near) for near in Path(path).parent.glob("*.py") if near.stem != "__init__"]
    close = difflib.get_close_matches(path, there, 1)
    return f"no file {path} in {os.getcwd()}" + (f"; did you mean {close[0]}?" if close else "")


def _misspelt(reason: str, argv: list[str]) -> str:
    """The option as it was typed, groups and all, and the one that was probably meant."""
    found = re.match(r"'(\w+)'(?: Did you mean \"(\w+)\")?", reason)
    if found is None:
        return reason
    for argument in argv:
        option = argument.removeprefix("--config.").partition("=")[0]
        if argument.startswith("--config.") and found[1] in option.split("."):
            meant = option.replace(found[1], found[2]) if found[2] else ""
            return option + (f"; did you mean {meant}?" if meant else "")
    return reason
