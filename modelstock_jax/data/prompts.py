"""Class names and prompt templates from a user's files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import read_json


class _Entry(NamedTuple):
    place: str
    text: str


def read_class_names(path: str | os.PathLike[str], num_classes: int) -> tuple[str, ...]:
    r"""Class names, in the order of the labels.

    Args:
      path: a .txt file (UTF-8, a name a line) or a .json file (a list of texts).
      num_classes: K, the data's number of classes.

    Returns:
      K names, all different: two classes of one name would get one classifier.

    Raises:
      UserError: no such file, not UTF-8, empty, an empty line, a name that stands twice (with both
        places), or another number of names than K.

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
            "classes; give one name a class, in the order of the labels"
        )
    return names


def read_templates(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Prompt templates.

    Args:
      path: a .txt file (UTF-8, a template a line) or a .json file (a list of texts); '{}' stands
        for the class name.

    Returns:
      The templates, all different.

    Raises:
      UserError: as `read_class_names`, or a template without '{}'.
    """
    return _read(Path(path), "template")


def _read(path: Path, what: str) -> tuple[str, ...]:
    entries = _json(path, what) if path.suffix == ".json" else _lines(path)
    if not entries:
        raise UserError(f"{path}: holds no {what}")
    places: dict[str, str] = {}
    problems = []
    for place, text in entries:
        if not text:
            problems.append(f"{place} is empty")
        elif text in places:
            problems.append(f"{text!r} stands at {places[text]} and {place}")
        elif what == "template" and "{}" not in text:
            problems.append(f"{place} has no '{{}}' where the class name goes: {text!r}")
        places.setdefault(text, place)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path}: {'; '.join(problems[:5])}{more}")
    return tuple(entry.text for entry in entries)


def _lines(path: Path) -> list[_Entry]:
    if path.suffix != ".txt":
        raise UserError(f"{path}: a list is a .txt file, an item a line, or a .json file")
    try:
        # Editors of Windows begin a file with a byte order mark.
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


def _json(path: Path, what: str) -> list[_Entry]:
    items = read_json(path)
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{path}: not a JSON list of texts, each a {what}")
    return [_Entry(f"item {number}", item.strip()) for number, item in enumerate(items, 1)]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
