"""Class names and templates from files, and errors in these files."""

from __future__ import annotations

import json

import pytest

from modelstock_jax.data.prompts import read_class_names, read_templates
from modelstock_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"tabby cat\ndog\n"),
        ("a.txt", b"tabby cat\ndog"),
        ("a.txt", b"\xef\xbb\xbftabby cat \r\n dog\r\n\r\n\n"),
        ("a.json", b'["tabby cat", "dog"]'),
    ],
)
def test_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_class_names(tmp_path / name, 2) == ("tabby cat", "dog")


def test_other_scripts_and_line_separators(tmp_path):
    # U+2028 is not a line end in a text file.
    (tmp_path / "a.txt").write_text("хлеб\npain\u2028grillé\n", encoding="utf-8")
    assert read_class_names(tmp_path / "a.txt", 2) == ("хлеб", "pain\u2028grillé")


def test_templates(tmp_path):
    (tmp_path / "t.txt").write_text("a {}.\nthe {} of {}\n")
    assert read_templates(tmp_path / "t.txt") == ("a {}.", "the {} of {}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "class name"),
        (b" \n\n", "class name"),
        (b"cat\n\ndog\n", "line 2 .*empty"),
        (b"cat\ndog\ncat\n dog\n", "'cat' .*line 1 and line 3; 'dog' .*line 2 an"),
        (b"x\n" * 9, "and 3 more$"),
        (b"cat\n", "1 class name, .*3 classes"),
        (b"a\nb\nc\nd\n", "4 class names, .*3 classes"),
        ("café\n".encode("latin-1"), r"UTF-8 \(byte 3: "),
    ],
)
def test_wrong_text_files(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_class_names(tmp_path / "a.txt", 3)
    assert str(error.value).startswith(str(tmp_path / "a.txt")) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"0": "cat"}, "JSON list .*strings"),
        (["cat", 3], "JSON list .*strings"),
        ([], "class name"),
        (["cat", "dog", "cat"], "'cat' .*item 1 and item 3"),
    ],
)
def test_wrong_json_files(tmp_path, value, message):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        read_class_names(tmp_path / "a.json", 3)


def test_other_errors(tmp_path):
    (tmp_path / "t.txt").write_text("a {}.\na photo of {c}.\n")
    with pytest.raises(UserError, match=r"line 2 .*'\{\}' .*: 'a photo of \{c\}\.'"):
        read_templates(tmp_path / "t.txt")
    for name, message in (
        ("gone.txt", "gone.txt: "),
        ("gone.json", "gone.json: "),
        ("a.csv", "a.csv: .*.txt .*.json"),
    ):
        with pytest.raises(UserError, match=message):
            read_templates(tmp_path / name)
    (tmp_path / "broken.json").write_text('["cat"')
    with pytest.raises(UserError, match="broken.json: .*JSON"):
        read_templates(tmp_path / "broken.json")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="folder.txt: "):
        read_templates(tmp_path / "folder.txt")
