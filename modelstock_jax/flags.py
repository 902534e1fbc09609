"""Command-line flags, --config with its overrides, and old names of options.

A user error prints one line and exits with code 1.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import runpy
import shlex
import sys
import textwrap
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
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
# {flag of other programs: flags here}
_OTHER_FLAGS = {
    "train": "--mode=train",
    "eval": "--mode=eval",
    "evaluate": "--mode=eval",
    "output_dir": "--workdir",
    "resume": "--workdir",
}
# {option, or beginning of options: (option that selects a method, methods that read the option)}
_APPLIES_ONLY_TO = {
    "optimizer.b1": ("optimizer.name", ("adamw",)),
    "optimizer.b2": ("optimizer.name", ("adamw",)),
    "optimizer.eps": ("optimizer.name", ("adamw",)),
    "optimizer.momentum": ("optimizer.name", ("sgd",)),
    "optimizer.projection.norm": ("optimizer.projection.name", ("ftp", "tpgm")),
    "optimizer.projection.learning_rate": ("optimizer.projection.name", ("ftp", "tpgm")),
    "optimizer.projection.k": ("optimizer.projection.name", ("ftp",)),
    "optimizer.projection.steps": ("optimizer.projection.name", ("tpgm",)),
    "data.validation_fraction": ("data.name", ("folder",)),
    "data.test_fraction": ("data.name", ("folder",)),
    "objective.car_ft_alpha": ("objective.name", ("car_ft",)),
    "objective.l2_sp_": ("objective.name", ("l2_sp",)),
    "objective.probe_": ("objective.name", ("lp_ft",)),
    "search.": ("task", ("learning_rate",)),
    "pretrain.": ("task", ("pretrain",)),
}
_DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "default.py"
# Groups of sizes, as in the config.json of a model.
_SIZES_OF_A_MODEL = "pretrain.clip."
_HELP = {"--help", "-help", "-h", "--h", "-?"}
# {beginning of absl's reason: what the value of the flag is not}
_WRONG_TYPES = {
    "invalid literal for int()": "an integer",
    "could not convert string to float": "a number",
    "('Non-boolean argument to boolean flag'": "true or false",
}


def parse(argv: list[str]) -> list[str]:
    """Parse absl's flags, and --config with its overrides; exit if they are wrong, or for --help.

    Args:
      argv: program name and arguments

    Returns:
      the program name and the arguments that are not flags
    """
    logging.set_verbosity(logging.FATAL)  # libraries also raise what they log
    try:
        config_flags.DEFINE_config_file("config", "configs/glyphs.py", "The experiment.")
        if not _HELP.isdisjoint(argv):
            print(_help(argv[0]))
            sys.exit(0)
        rest = flags.FLAGS(argv)
        config = flags.FLAGS.config.to_dict()  # the config file is read on first use
        _check_names(config, _config_path(argv))
        return rest
    except OSError as error:
        sys.exit(f"error: --config: {_missing_file(error, _config_path(argv))}")
    except flags.Error as error:  # the error of a config file that raises includes a traceback
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if isinstance(error, flags.UnrecognizedFlagError):
            sys.exit(f"error: {_unknown_flag(error.flagname)}")
        flag = lines[0].split(": Error whilst")[0] + ": " if len(lines) > 1 else ""
        reason = lines[-1].split("Error: ")[-1]
        sys.exit(f"error: {_wrong_type(lines[0]) or _wrong_type(flag + reason) or flag + reason}")
    except (AttributeError, ImportError, KeyError, SyntaxError, TypeError, ValueError) as error:
        if reason := _error_in_file(error, _config_path(argv)):
            sys.exit(f"error: {reason}")
        reason = " ".join(str(getattr(error.args[0], "args", error.args)[0]).split())
        sys.exit(f"error: {_unknown_option(reason, argv)} {_ALL_OPTIONS}")
    except Exception as error:
        if reason := _error_in_file(error, _config_path(argv)):
            sys.exit(f"error: {reason}")
        raise


def check_command(arguments: Sequence[str]) -> None:
    """Exit with one line if the flags of launch.py contradict each other; jax is not needed.

    Args:
      arguments: arguments that are not flags
    """
    values, config = flags.FLAGS, flags.FLAGS.config
    if arguments:
        name = arguments[0].removeprefix("config.").partition("=")[0]
        known = name in flags.FLAGS or name in _options(config.to_dict())
        prefix = "--" if name in flags.FLAGS else "--config."
        hint = f" (did you mean {prefix}{arguments[0].removeprefix('config.')}?)" if known else ""
        sys.exit(
            f"error: unknown argument {arguments[0]!r}{hint}; every option starts with --, and "
            "has no space around ="
        )
    if values.checkpoint and values.mode == "train":
        sys.exit(
            f"error: --checkpoint is for evaluation: pass --mode=eval"
            f" --checkpoint={values.checkpoint}; training starts from --config.pretrained"
        )
    if values.mode == "eval" and not values.checkpoint:
        sys.exit("error: --mode=eval needs --checkpoint=DIR, or the id of a model on the hub")
    if values.device_memory is not None and not values["dry-run"].value:
        sys.exit("error: --device_memory is for the plan of a run: add --dry-run")
    if values.device_memory is not None and not 0 < values.device_memory < math.inf:
        sys.exit(f"error: --device_memory={values.device_memory:g}: pass the GB of a device")
    if values.mode == "eval" and values["dry-run"].value:
        sys.exit("error: --dry-run is for training; remove it, or --mode=eval")
    for argument in sys.argv[1:]:
        name = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if name and (reason := _inapplicable(name[1], config)):
            sys.exit(f"error: --config.{name[1]} {reason}")


def _inapplicable(name: str, config: Any) -> str:
    """Return why an option has no effect with the other options; "" if it has one.

    Example:
      >>> from configs.default import get_config
      >>> _inapplicable("optimizer.momentum", get_config())
      "applies only to optimizer.name='sgd', not 'adamw'"
    """
    for option, (selector, values) in _APPLIES_ONLY_TO.items():
        if name == option or (option[-1] in "._" and name.startswith(option)):
            group, _, last = selector.rpartition(".")
            value = (config[group] if group else config)[last]
            if value not in values:
                choices = " or ".join(repr(choice) for choice in values)
                return f"applies only to {selector}={choices}, not {value!r}"
    return ""


def _help(program: str) -> str:
    """Return the docstring of the program and its flags."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "flags:"]
    own = flags.FLAGS.get_key_flags_for_module(program)
    width = max(len(flag.name) for flag in own) + 4
    config = ("config", "Config file of the experiment (default: configs/glyphs.py).")
    for name, text in [config, *((flag.name, flag.help) for flag in own)]:
        indent = " " * (width + 2)
        lines.append(textwrap.fill(text, 100, initial_indent=f"  --{name}".ljust(width + 2),
                                   subsequent_indent=indent))  # fmt: skip
    lines += ["", "Every flag with a value is written --FLAG=VALUE. --helpfull lists the flags of"]
    return "\n".join([*lines[:-1], lines[-1] + " all libraries."])


def _unknown_flag(name: str) -> str:
    """Return the message for an unknown flag, with a similar flag or option of --config if any."""
    similar = _OTHER_FLAGS.get(name, "")
    similar = similar or most_similar(f"--{name}", (f"--{known}" for known in flags.FLAGS))
    if not similar and (option := _similar_option(name)):
        similar = f"--config.{option}"
    return f"unknown flag --{name}" + (f" (did you mean {similar}?)" if similar else "")


def _wrong_type(reason: str) -> str:
    """Return the message for a value that does not have the type of its flag; else ''."""
    if group := re.match(r"flag --config\.([\w.]+)=.* as a ConfigDict", reason):
        return f"--config.{group[1]} is a group of options, not an option {_ALL_OPTIONS}"
    if early := re.match(r"Found (--config\.\S+) in argv before a value for --config", reason):
        return f"{early[1].partition('=')[0]} precedes --config: pass --config=FILE first"
    if match := re.match(r"flag (--config=.*): Could not override field '([\w.]+)'", reason):
        types = re.findall(r"<class '(?:\w+\.)*(\w+)'>", reason)
        kinds = [{"ConfigDict": "a group of options"}.get(k, f"of type {k}") for k in types]
        return f"{match[1]}: {match[2]} must be {kinds[-1]}, not {kinds[0]}"
    for words, kind in _WRONG_TYPES.items():
        if match := re.match(rf"flag (--[^\s=]+)=(.*): {re.escape(words)}", reason):
            digits = match[2].translate(str.maketrans("OolI", "0011"))
            is_number = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", digits)
            hint = (
                f" (did you mean {digits}, with digits?)"
                if is_number and digits != match[2]
                else ""
            )
            if match[2] == "=":
                hint = f"; write {match[1]}=VALUE without spaces"
            return f"{match[1]}={match[2]}: not {kind}{hint}"
    return ""


def _config_path(argv: Sequence[str]) -> str:
    """Return the config file of a command line that need not be valid."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return (value if equals else following).partition(":")[0]
    return "configs/glyphs.py"


def _error_in_file(error: BaseException, path: str) -> str:
    """Return the message of an error that the config file raises, with its line; else ''."""
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    if "has no attribute 'get_config'" in text:
        return f"--config={path}: the file has no function get_config()"
    if text.startswith("'NoneType' object has no attribute"):
        return f"--config={path}: get_config() returns nothing; end it with `return config`"
    if text.startswith(("'dict' object has no attribute", "FrozenConfigDict is immutable")):
        return f"--config={path}: get_config() must return a ConfigDict of ml_collections"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if Path(frame.filename).resolve() == Path(path).resolve()]  # fmt: skip
    return f"{path}, line {lines[-1]}: {type(error).__name__}: {text}" if lines else ""


def _check_names(config: Mapping[str, Any], path: str) -> None:
    """Exit if the config file sets a name that is not an option."""
    try:
        known = _options(_default_config())
    except OSError:  # the package was installed without the configs
        return
    for name in _options(config):
        if name in known:
            continue
        if (new := _current_name(name)) != name:
            sys.exit(f"error: {path}: {name} is now {new}; rename it")
        similar = _similar_option(name)
        hint = f"; did you mean {similar}?" if similar else ""
        sys.exit(f"error: {path} sets {name}, which is not an option{hint} {_ALL_OPTIONS}")


def _options(config: Mapping[str, Any]) -> list[str]:
    """Return the names of all options; the sizes of a model are not options."""
    return [name for name in flatten(config) if not name.startswith(_SIZES_OF_A_MODEL)]


def _default_config() -> dict[str, Any]:
    return runpy.run_path(os.fspath(_DEFAULT_CONFIG))["get_config"]().to_dict()


def _unknown_option(reason: str, argv: Sequence[str]) -> str:
    """Return the message for an unknown option of --config: its current name, or a similar one."""
    for argument in argv:
        typed = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if typed and (new := _current_name(typed[1])) != typed[1]:
            return f"--config.{typed[1]} is now --config.{new}"
    group = reason.strip("'\"")
    if f"{group}." in RENAMED:
        new = RENAMED[f"{group}."][:-1]
        return f"--config: the group config.{group} is now config.{new}"
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


def _missing_file(error: OSError, config: str) -> str:
    """Return the message for a missing config file, with a similar path or all configs.

    Args:
      error: error of ml_collections, which is the same if the config file opens a missing file
      config: path of the config file
    """
    reason = str(error).splitlines()[-1].strip()
    match = re.search(r"(?:No such file or|Is a) directory: '(.+)'", reason)
    if not match:
        return reason
    path = Path(match[1])
    if Path(config).is_file():
        return f"{config} reads {path}, which does not exist"
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
    for argument in argv:
        typed = re.match(r"--?config\.([\w.-]+)", argument)
        if typed is None or not (match and match[1] in typed[1].split(".") or "-" in typed[1]):
            continue
        option = typed[1]
        if option in flags.FLAGS:
            return f"{option}; did you mean --{option}?"
        similar = option.replace(match[1], match[2]) if match and match[2] else ""
        similar = _similar_option(option) or similar
        return option + (f"; did you mean {similar}?" if similar else "")
    return reason


def _similar_option(name: str) -> str:
    """Return the option of --config with this name, this last part, or a synonym of it; else ''."""
    try:
        options = _options(_default_config())
    except OSError:
        return ""
    group, _, last = name.replace("-", "_").lower().rpartition(".")
    last = _SYNONYMS.get(last, last)
    candidates = [option for option in options if option.startswith(f"{group}.")] or options
    matches = [option for option in candidates if option == last or option.endswith(f".{last}")]
    if not matches:
        close = difflib.get_close_matches(last, [x.rpartition(".")[2] for x in candidates], 1, 0.75)
        matches = [option for option in candidates if option.rpartition(".")[2] in close]
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
