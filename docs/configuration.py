"""Writes docs/configuration.md from configs/default.py: its comments are the meanings.

python docs/configuration.py
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE, PAGE = ROOT / "configs/default.py", ROOT / "docs/configuration.md"
_HEAD = """\
# Configuration

<!-- Written by `python docs/configuration.py` from configs/default.py: edit that file. -->

Every option, its default and its meaning. A file of `configs/` sets what differs; the command line
overrides both: `python launch.py --config=configs/glyphs.py --config.merge.every=100`. A tuple is
written in quotes: `--config.data.shifts="('v2','sketch')"`. An option that there is not is refused.

The last column says whether the same command may go on in its workdir after a change: *yes*: no
result depends on it; *rounding*: results may differ in the last bits, and it takes
`--allow_config_change`; *place*: so does another path to the same thing; empty: no, another
workdir is needed.
"""


class Entry(NamedTuple):
    """Options that one comment explains."""

    options: tuple[tuple[str, str], ...]  # name from `config.` on, its default as written
    meaning: str


class Group(NamedTuple):
    """A `ConfigDict` of options; "" is the top."""

    name: str
    meaning: str
    entries: tuple[Entry, ...]


def groups(source: str) -> list[Group]:
    """The options of a config file in its order, each with the comment above it.

    A line without a comment right below another option belongs to that one's comment.
    """
    lines = source.splitlines()
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    meanings: dict[str, str] = {"": ""}
    entries: dict[str, list[Entry]] = {"": []}
    previous = 0  # the last line of the statement before
    for node in function.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        name = ast.unparse(node.targets[0]).removeprefix("config.")
        comment = _comment_above(lines, node.lineno)
        if ast.unparse(node.value) == "ConfigDict()":
            meanings[name], entries[name] = comment, []
        else:
            group = name.rpartition(".")[0]
            option = (name, _default(node.value))
            if not comment and previous == node.lineno - 1 and entries[group]:
                last = entries[group].pop()
                entries[group].append(last._replace(options=(*last.options, option)))
            else:
                entries[group].append(Entry((option,), comment))
        previous = node.end_lineno
    return [Group(name, meanings[name], tuple(entries[name])) for name in entries]


def _comment_above(lines: list[str], line: int) -> str:
    found = []
    while lines[line - 2].strip().startswith("#"):
        line -= 1
        found.append(lines[line - 1].strip().removeprefix("#").strip())
    return " ".join(reversed(found))


def _default(value: ast.expr) -> str:
    text = ast.unparse(value)
    if isinstance(value, ast.Call):  # One option a name, or the sizes of a model.
        return '`""` each' if "fromkeys" in text else "see configs/default.py"
    if isinstance(value, ast.BinOp):
        return f"`{eval(text)}`"
    return f"`{text}`".replace("'", '"')


def page(source: str) -> str:
    """The page, as Markdown."""
    from modelstock_jax.experiment.options import option

    shown = {None: "", "ignored": "yes", "numerical": "numerical", "path": "path"}
    parts = [_HEAD]
    for group in groups(source):
        title = f"`{group.name}`" if group.name else "The run"
        parts.append(f"\n## {title}\n\n" + (f"{_cell(group.meaning)}\n\n" if group.meaning else ""))
        if not group.entries:
            continue
        parts.append("| option | default | meaning | may change |\n|---|---|---|---|\n")
        for entry in group.entries:
            changes = [shown[option(name).resume] for name, _ in entry.options]
            cells = [
                "<br>".join(f"`{name}`" for name, _ in entry.options),
                "<br>".join(default for _, default in entry.options),
                _cell(entry.meaning),
                changes[0] if len(set(changes)) == 1 else "<br>".join(changes),
            ]
            parts.append("| " + " | ".join(cells) + " |\n")
    return "".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(SOURCE.read_text()))
    print(PAGE)
