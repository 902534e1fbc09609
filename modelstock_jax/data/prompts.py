"""Class names and prompt templates from files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import read_json


class _Entry(NamedTuple):
    location: str
    text: str


def read_class_names(path: str | os.PathLike[str], num_classes: int) -> tuple[str, ...]:
    r"""Read class names in the order of the labels.

    Args:
      path: a .txt file (UTF-8, one name per line) or a .json file (a list of strings)
      num_classes: K, the number of classes of the dataset

    Returns:
      K distinct names: two classes with the same name would get the same classifier.

    Raises:
      UserError: the file does not exist, is not UTF-8 or is empty; a line is empty; a name occurs
        twice (the message has both locations); or the number of names is not K

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "pets.txt"
      >>> _ = path.write_text("cat\ndog\n")
      >>> read_class_names(path, 2)
      ('cat', 'dog')
    """
    names = _read(Path(path), "class name")
    if len(names) != num_classes:
        raise UserError(
            f"{path}: {_count(len(names), 'class name')}, but the data has {num_classes:,} "
            "classes; give one name per class, in the order of the labels"
        )
    return names


def read_templates(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read prompt templates.

    Args:
      path: a .txt file (UTF-8, one template per line) or a .json file (a list of strings); '{}'
        is replaced by the class name

    Returns:
      The distinct templates.

    Raises:
      UserError: as in `read_class_names`, or a template has no '{}'
    """
    return _read(Path(path), "template")


def _read(path: Path, noun: str) -> tuple[str, ...]:
    entries = _json(path, noun) if path.suffix == ".json" else _lines(path)
    if not entries:
        raise UserError(f"{path}: contains no {noun}")
    locations: dict[str, str] = {}
    issues = []
    for location, text in entries:
        if not text:
            issues.append(f"{location} is empty")
        elif text in locations:
            issues.append(f"{text!r} occurs in {locations[text]} and {location}")
        elif noun == "template" and "{}" not in text:
            issues.append(f"{location} has no '{{}}' for the class name: {text!r}")
        locations.setdefault(text, location)
    if issues:
        more = f"; and {len(issues) - 5} more" if len(issues) > 5 else ""
        raise UserError(f"{path}: {'; '.join(issues[:5])}{more}")
    return tuple(entry.text for entry in entries)


def _lines(path: Path) -> list[_Entry]:
    if path.suffix != ".txt":
        raise UserError(f"{path}: give a .txt file with one item per line, or a .json file")
    try:
        # utf-8-sig: editors on Windows start a file with a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None
    lines = text.rstrip().split("\n") if text.strip() else []
    return [_Entry(f"line {number}", line.strip()) for number, line in enumerate(lines, 1)]


def _json(path: Path, noun: str) -> list[_Entry]:
    items = read_json(path)
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{path}: not a JSON list of strings, each a {noun}")
    return [_Entry(f"item {number}", item.strip()) for number, item in enumerate(items, 1)]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
