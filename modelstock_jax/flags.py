"""Command-line flags and --config; names that options had before.

A mistake of the user is one line and exit code 1.
"""

from __future__ import annotations

import difflib
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from modelstock_jax.fileio import flat
from modelstock_jax.registry import RENAMED_METHODS

_ALL = "(all options: docs/configuration.md)"

# {old name: name now}; "old." renames every option that begins with it; the first match counts.
# An old name on the command line is an error that tells the new one. In files (a workdir's
# config.json, the studies' ledger) it is read.
RENAMED = {
    "accumulate_steps": "gradient_accumulation_steps",
    "log_every": "log_every_steps",
    "data.held_out": "data.held_out_per_class",
    "data.real": "data.real_labels",
    "data.validation_share": "data.validation_fraction",
    "data.test_share": "data.test_fraction",
    "data.loading.": "data.loader.",
    "data.cache": "data.decoded_cache_dir",
    "data.cache_short_side": "data.decoded_cache_short_side",
    "optimizer.final_fraction": "optimizer.final_lr_fraction",
    "compute.attention": "compute.attention_impl",
    "compute.execution": "compute.replica_mode",
    "checkpoint.every": "checkpoint.save_every_steps",
    "watch.policy": "monitor.on_non_finite",
    "watch.max_events": "monitor.max_non_finite_steps",
    "watch.": "monitor.",
    "export.layouts": "export.formats",
}
# {option by its name now: {old value: value now}}
RENAMED_VALUES: dict[str, dict[Any, Any]] = {"merge.method": RENAMED_METHODS}
# What other libraries call an option.
_SYNONYMS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "beta1": "b1",
    "beta2": "b2",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "bs": "batch_size",
    "grad_accum_steps": "gradient_accumulation_steps",
    "grad_clip": "clip_norm",
    "max_grad_norm": "clip_norm",
    "model": "pretrained",
    "data_dir": "data.root",
}


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
        reason = lines[-1].split("Error: ")[-1]
        if (unknown := re.search(r"Unknown command line flag '([\w.-]+)'", reason)) and (
            meant := _option_for(unknown[1])
        ):
            reason = f"--{unknown[1]} is not a flag; did you mean --config.{meant}?"
        sys.exit(f"error: {flag}{reason}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        for argument in argv:
            option = argument.removeprefix("--config.").partition("=")[0]
            if argument.startswith("--config.") and (new := _current_name(option)) != option:
                sys.exit(f"error: --config.{option} is now --config.{new} {_ALL}")
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
            meant = _option_for(option) or meant
            return option + (f"; did you mean {meant}?" if meant else "")
    return reason


def _option_for(name: str) -> str:
    """The option of --config with this name, or with this last part, or with a synonym of it."""
    try:
        options = flat(runpy.run_path("configs/default.py")["get_config"]().to_dict())
    except OSError:
        return ""
    group, _, last = name.replace("-", "_").rpartition(".")
    last = _SYNONYMS.get(last, last)
    within = [option for option in options if option.startswith(f"{group}.")] or list(options)
    same = [option for option in within if option == last or option.endswith(f".{last}")]
    return min(same, key=lambda option: option.count("."), default="")


def current_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values as they are now.

    Args:
      options: {name: value} from a file that this or an earlier version wrote

    Example:
      >>> current_names({"watch.policy": "stop", "merge.method": "stock"})
      {'monitor.on_non_finite': 'stop', 'merge.method': 'model_stock'}
    """
    found = {}
    for name, value in options.items():
        name = _current_name(name)
        found[name] = _revalued(value, RENAMED_VALUES.get(name, {}))
    return found


def first_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values as they were in the first files: the inverse of `current_names`.

    Args:
      options: {name: value} as they are now
    """
    found = {}
    for name, value in options.items():
        old_values = {new: old for old, new in RENAMED_VALUES.get(name, {}).items()}
        name = _renamed(name, ((new, old) for old, new in RENAMED.items()))
        found[name] = _revalued(value, old_values)
    return found


def _current_name(name: str) -> str:
    return _renamed(name, RENAMED.items())


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for before, after in pairs:
        if name == before or (before.endswith(".") and name.startswith(before)):
            return after + name[len(before) :]
    return name


def _revalued(value: Any, names: Mapping[Any, Any]) -> Any:
    if isinstance(value, list):
        return [_revalued(one, names) for one in value]
    return names.get(value, value)
