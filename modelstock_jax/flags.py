"""Command-line flags, --config with its overrides, and old names of options.

A user error prints one line and exits with code 1.
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

from modelstock_jax.errors import listed, most_similar
from modelstock_jax.fileio import flatten
from modelstock_jax.registry import RENAMED_METHODS

_ALL_OPTIONS = "(all options: docs/configuration.md)"

# {old name: current name}. A name that ends in "." renames all options that begin with it; the
# first match counts. On the command line an old name is an error that reports the current name. In
# files (config.json of a workdir, the ledger of the studies) old names are accepted.
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
# {current name of an option: {old value: current value}}
RENAMED_VALUES: dict[str, dict[Any, Any]] = {"merge.method": RENAMED_METHODS}
# {name of an option in other libraries: name here}
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
# {beginning of absl's reason: what the value of the flag is not}
_WRONG_TYPES = {
    "invalid literal for int()": "an integer",
    "could not convert string to float": "a number",
    "('Non-boolean argument to boolean flag'": "true or false",
}


def parse(argv: list[str]) -> list[str]:
    """Parse absl's flags, and --config with its overrides; exit if they are wrong.

    Args:
      argv: program name and arguments

    Returns:
      the program name and the arguments that are not flags
    """
    try:
        config_flags.DEFINE_config_file("config", "configs/glyphs.py", "The experiment.")
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.keys()  # the config file is read on first use
        return rest
    except OSError as error:
        sys.exit(f"error: --config: {_missing_file(error)}")
    except flags.Error as error:  # the error of a config file that raises includes a traceback
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        flag = lines[0].split(": Error whilst")[0] + ": " if len(lines) > 1 else ""
        if group := re.match(r"flag --config\.([\w.]+)=.* as a ConfigDict", lines[0]):
            sys.exit(
                f"error: --config.{group[1]} is a group of options, not an option {_ALL_OPTIONS}"
            )
        if isinstance(error, flags.UnrecognizedFlagError):
            sys.exit(f"error: {_unknown_flag(error.flagname)}")
        reason = lines[-1].split("Error: ")[-1]
        sys.exit(f"error: {_wrong_type(lines[0]) or flag + reason}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(getattr(error.args[0], "args", error.args)[0]).split())
        sys.exit(f"error: {_unknown_option(reason, argv)} {_ALL_OPTIONS}")


def _unknown_flag(name: str) -> str:
    """Return the message for an unknown flag, with a similar flag or option of --config if any."""
    similar = most_similar(f"--{name}", (f"--{known}" for known in flags.FLAGS))
    if not similar and (option := _similar_option(name)):
        similar = f"--config.{option}"
    return f"unknown flag --{name}" + (f" (did you mean {similar}?)" if similar else "")


def _wrong_type(reason: str) -> str:
    """Return the message for a value that does not have the type of its flag; else ''."""
    for words, kind in _WRONG_TYPES.items():
        if match := re.match(rf"flag (--[^\s=]+=.*): {re.escape(words)}", reason):
            return f"{match[1]}: not {kind}"
    return ""


def _unknown_option(reason: str, argv: Sequence[str]) -> str:
    """Return the message for an unknown option of --config: its current name, or a similar one."""
    for argument in argv:
        typed = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if typed and (new := _current_name(typed[1])) != typed[1]:
            return f"--config.{typed[1]} is now --config.{new}"
    group = reason.strip("'\"")
    if f"{group}." in RENAMED:
        return f"--config: the group config.{group} is now config.{RENAMED[f'{group}.'][:-1]}"
    return f"--config has no such option: {_misspelled_option(reason, argv)}"


def run_name(config: str) -> str:
    """Return the default name of a run, from the path of its config file.

    Example:
      >>> run_name("configs/vitl14.py:strong")
      'vitl14-strong'
    """
    return Path(config).name.replace(".py", "").replace(":", "-")


def config_arguments(argv: Sequence[str]) -> list[str]:
    """Return the arguments of a command line that set the config, quoted for a shell.

    Args:
      argv: arguments without the program name. The flags must be parsed before, so that boolean
        flags are recognized.

    Example:
      >>> config_arguments(["fig1", "--config", "my config.py", "--config.seed=3"])
      ["'--config=my config.py'", '--config.seed=3']
    """
    arguments, rest = [], iter(argv)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if re.fullmatch(r"--?(no)?config(\.[\w.]+)?", name):
            is_complete = equals or _is_boolean(name.lstrip("-"))
            arguments.append(
                shlex.quote(argument if is_complete else f"{argument}={next(rest, '')}")
            )
    return arguments


def _is_boolean(name: str) -> bool:
    return name.startswith("no") or bool(name in flags.FLAGS and flags.FLAGS[name].boolean)


def _missing_file(error: OSError) -> str:
    """Return the message for a missing config file, with a similar path or all configs."""
    reason = str(error).splitlines()[-1].strip()
    match = re.search(r"No such file or directory: '(.+)'", reason)
    if not match:
        return reason
    path = Path(match[1])
    configs = sorted(os.fspath(file) for file in Path("configs").glob("[!_]*.py"))
    files = {Path(file).stem: file for file in configs}
    if path.parent != Path():  # the working directory contains other programs
        files |= {file.stem: os.fspath(file) for file in path.parent.glob("[!_]*.py")}
    # Compare only the names: paths have a directory in common.
    similar = difflib.get_close_matches(path.stem, files, 1)
    if similar:
        hint = f"; did you mean {files[similar[0]]}?"
    else:
        hint = f"; choose one of {listed(configs, max_items=30)}" if configs else ""
    return f"no file {path} in {os.getcwd()}{hint}"


def _misspelled_option(reason: str, argv: Sequence[str]) -> str:
    """Return the unknown option as it was typed, with its groups, and a similar option if any."""
    match = re.match(r"'(\w+)'(?: Did you mean \"(\w+)\")?", reason)
    if match is None:
        return reason
    for argument in argv:
        option = argument.removeprefix("--config.").partition("=")[0]
        if argument.startswith("--config.") and match[1] in option.split("."):
            similar = option.replace(match[1], match[2]) if match[2] else ""
            similar = _similar_option(option) or similar
            return option + (f"; did you mean {similar}?" if similar else "")
    return reason


def _similar_option(name: str) -> str:
    """Return the option of --config with this name, this last part, or a synonym of it; else ''."""
    try:
        options = flatten(runpy.run_path("configs/default.py")["get_config"]().to_dict())
    except OSError:
        return ""
    group, _, last = name.replace("-", "_").rpartition(".")
    last = _SYNONYMS.get(last, last)
    candidates = [option for option in options if option.startswith(f"{group}.")] or list(options)
    matches = [option for option in candidates if option == last or option.endswith(f".{last}")]
    return min(matches, key=lambda option: option.count("."), default="")


def current_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with current names and values.

    Args:
      options: {name: value} from a file of this or an earlier version

    Example:
      >>> current_names({"watch.policy": "stop", "merge.method": "stock"})
      {'monitor.on_non_finite': 'stop', 'merge.method': 'model_stock'}
    """
    current = {}
    for name, value in options.items():
        name = _current_name(name)
        current[name] = _rename_value(value, RENAMED_VALUES.get(name, {}))
    return current


def first_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with the names and values of the first version: inverts `current_names`.

    Args:
      options: {name: value} with current names and values
    """
    first = {}
    for name, value in options.items():
        old_values = {new: old for old, new in RENAMED_VALUES.get(name, {}).items()}
        name = _rename(name, ((new, old) for old, new in RENAMED.items()))
        first[name] = _rename_value(value, old_values)
    return first


def _current_name(name: str) -> str:
    return _rename(name, RENAMED.items())


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for before, after in pairs:
        if name == before or (before.endswith(".") and name.startswith(before)):
            return after + name[len(before) :]
    return name


def _rename_value(value: Any, names: Mapping[Any, Any]) -> Any:
    if isinstance(value, list):
        return [_rename_value(item, names) for item in value]
    return names.get(value, value)
