"""Generate docs/configuration.md from the comments of configs/default.py.

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

This page lists every option with its default and meaning. The other files of `configs/` set only
what differs. The command line overrides both:
`python launch.py --config=configs/glyphs.py --config.merge.every=100`. Write a tuple in quotes:
`--config.data.shifts="('v2','sketch')"`. Unknown options are an error.

The column "change on resume" tells whether the same command can resume in its workdir after the
option has changed:

| value | meaning |
|---|---|
| ignored | Yes. No result depends on the option. |
| extends | Yes. A finished run adds the new results or exported models. |
| numerical | Only with `--allow_config_change`. The results may differ in the last bits. |
| path | Only with `--allow_config_change`, and only if the new path has the same content. |
| (empty) | No. Use another workdir. |
"""


class Entry(NamedTuple):
    """Options that share one comment.

    Attributes:
      options: (name without `config.`, default as Markdown) of each option
      meaning: the comment
    """

    options: tuple[tuple[str, str], ...]
    meaning: str


class Group(NamedTuple):
    """A `ConfigDict` of options.

    Attributes:
      name: name without `config.`; "" for the options at the top level
      meaning: the comment above the group
      entries: its options in the order of the file
    """

    name: str
    meaning: str
    entries: tuple[Entry, ...]


def groups(source: str) -> list[Group]:
    """Return the options of a config file in its order, each with the comment above it.

    An option without a comment shares the comment of the option on the line directly above it.
    """
    lines = source.splitlines()
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    meanings: dict[str, str] = {"": ""}
    entries: dict[str, list[Entry]] = {"": []}
    previous = 0  # last line of the previous statement
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
    comment = []
    while lines[line - 2].strip().startswith("#"):
        line -= 1
        comment.append(lines[line - 1].strip().removeprefix("#").strip())
    return " ".join(reversed(comment))


def _default(value: ast.expr) -> str:
    text = ast.unparse(value)
    if isinstance(value, ast.Call):  # One option per name, or the sizes of a model.
        return '`""` each' if "fromkeys" in text else "see configs/default.py"
    if isinstance(value, ast.BinOp):
        return f"`{eval(text)}`"
    return f"`{text}`".replace("'", '"')


def page(source: str) -> str:
    """Return the page as Markdown."""
    from modelstock_jax.experiment.options import option

    parts = [_HEAD]
    for group in groups(source):
        title = f"`{group.name}`" if group.name else "The run"
        parts.append(f"\n## {title}\n\n" + (f"{_cell(group.meaning)}\n\n" if group.meaning else ""))
        if not group.entries:
            continue
        parts.append("| option | default | meaning | change on resume |\n|---|---|---|---|\n")
        for entry in group.entries:
            changes = [option(name).resume or "" for name, _ in entry.options]
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
