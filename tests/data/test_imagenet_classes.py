"""ImageNet's class lists match their sources; readers of the files of its shifts."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from modelstock_jax.data import imagenet
from modelstock_jax.data.prompts import read_templates
from modelstock_jax.data.published_sets import CLASS_LISTS, IMAGENET
from modelstock_jax.errors import UserError

OPEN_CLIP = "open_clip_torch==3.3.0"
A_CLASSES, R_CLASSES = imagenet.CLASSES["a"], imagenet.CLASSES["r"]


@pytest.mark.parametrize(
    ("items", "checksum"),
    [
        # Checksums of the items, one per line. The slow test compares the first two with OPEN_CLIP.
        (imagenet.CLASS_NAMES, "8800e39242cbed4c6889376e20a49cfdaf4f84a773a6686d15c3b39972ef94c4"),
        (imagenet.TEMPLATES, "717aaf1055595d318aa456669c0de6675d883ccebfa70ca12ff890b7aab710cb"),
        (imagenet.WNIDS, "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15"),
        (
            [imagenet.WNIDS[i] for i in A_CLASSES],
            "9826a24166e74ce62fb87b27889874ca26917542c745712309d6e25855d63bc2",
        ),
        (
            [imagenet.WNIDS[i] for i in R_CLASSES],
            "a6a0729f7a99230280639cab6e51e01485a3b41a676ea35621a501c9d6e83ca4",
        ),
    ],
    ids=["class names", "templates", "wnids", "A", "R"],
)
def test_lists_equal_the_published_ones(items, checksum):
    text = "".join(f"{item}\n" for item in items)
    assert hashlib.sha256(text.encode()).hexdigest() == checksum


def test_wnids_equal_those_of_tensorflow_datasets():
    # Located without an import, because the import takes seconds.
    package = Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
    labels = (package / "datasets/imagenet2012/labels.txt").read_text().split()
    assert tuple(labels) == imagenet.WNIDS


@pytest.mark.slow
def test_names_and_templates_equal_those_of_open_clip(tmp_path):
    """Download only the wheel; nothing is installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    fetched = subprocess.run(
        [*command, "--dest", str(tmp_path), OPEN_CLIP], capture_output=True, text=True, timeout=300
    )
    assert fetched.returncode == 0, f"{OPEN_CLIP} could not be fetched: {fetched.stderr}"
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        tree = ast.parse(files.read("open_clip/zero_shot_metadata.py"))
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(values["IMAGENET_CLASSNAMES"]) == imagenet.CLASS_NAMES
    # lambda c: f'a photo of a {c}.'
    templates = tuple(
        "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in item.body.values)
        for item in values["OPENAI_IMAGENET_TEMPLATES"].elts
    )
    assert templates == imagenet.TEMPLATES


def test_known_classes():
    names, wnids = imagenet.CLASS_NAMES, imagenet.WNIDS
    assert (names[0], wnids[0], names[999], wnids[999]) == (
        "tench",
        "n01440764",
        "toilet paper",
        "n15075141",
    )
    assert (names[207], wnids[207]) == ("Golden Retriever", "n02099601")
    assert names[134] == "crane bird" and names[517] == "construction crane"
    assert len(set(wnids)) == 1000 and list(wnids) == sorted(wnids)


def test_two_pairs_of_names_are_equal_as_published():
    names = imagenet.CLASS_NAMES
    assert [i for i in range(1000) if names.count(names[i]) > 1] == [657, 744, 836, 837]


def test_templates_can_be_read_from_a_file():
    assert read_templates(CLASS_LISTS / "imagenet_templates.txt") == imagenet.TEMPLATES
    assert len(imagenet.TEMPLATES) == 80


def test_subsets_agree_with_the_published_counts():
    for name, classes in (("a", A_CLASSES), ("r", R_CLASSES)):
        assert len(set(classes)) == IMAGENET[name].published.classes == 200
        assert list(classes) == sorted(classes) and 0 <= classes[0] and classes[-1] < 1000
    assert A_CLASSES != R_CLASSES
    # Goldfinch, box turtle, goldfish.
    both = [tuple(i in classes for classes in (A_CLASSES, R_CLASSES)) for i in (11, 37, 1)]
    assert both == [(True, True), (True, False), (False, True)]


def test_published_counts():
    order = ("validation", "v2", "r", "sketch", "a", "objectnet")
    assert [IMAGENET[name].published.classes for name in order] == [1000, 1000, 200, 1000, 200, 113]
    assert [IMAGENET[name].published.images for name in order] == [
        *(50_000, 10_000, 30_000, 50_889, 7_500, 18_574)
    ]


def test_error_names_an_unknown_wnid():
    assert imagenet.class_indices([]) == ()
    assert imagenet.class_indices(iter(["n15075141", "n01440764"])) == (999, 0)
    with pytest.raises(UserError, match="1,000 classes: n00000001, images;"):
        imagenet.class_indices(["n01440764", "n00000001", "images"])
    with pytest.raises(UserError, match="0, 1, 2, 3, 4 and 2 more"):
        imagenet.class_indices(map(str, range(7)))


@pytest.fixture
def mappings(tmp_path):
    """Write the four files of ObjectNet's `mappings` in their format, with made-up content.

    The names of label i are on line (7 i + 3) mod 1000.
    """
    lines = [(7 * label + 3) % 1000 for label in range(1000)]
    names = {line: f"thing {label}, entity {label}" for label, line in enumerate(lines)}
    classes = {f"Class {i}": f"thing {i}, entity {i}" for i in range(113)}
    classes["Class 5"] = "thing 905, entity 905; thing 5, entity 5; thing 605, entity 605"
    folders = {f"class_{i}": f"Class {i}" for i in reversed(range(313))}
    files = {
        "folder_to_objectnet_label.json": folders,
        "objectnet_to_imagenet_1k.json": classes,
        "pytorch_to_imagenet_2012_id.json": {str(i): line for i, line in enumerate(lines)},
    }
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value, indent=2))
    text = "".join(f"{names[line]}\n" for line in range(1000))
    (tmp_path / "imagenet_to_label_2012_v2").write_text(text)
    return tmp_path


def test_objectnet(mappings):
    classes = imagenet.objectnet_classes(mappings)
    assert len(classes) == 113 and list(classes) == sorted(classes)
    assert classes["class_5"] == (5, 605, 905)
    assert {k: v for k, v in classes.items() if k != "class_5"} == {
        f"class_{i}": (i,) for i in range(113) if i != 5
    }


def changed(mappings, file, change):
    path = mappings / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("objectnet_to_imagenet_1k", lambda x: x | {"New": "a"}, "'New' .*folder_to_"),
        (
            "objectnet_to_imagenet_1k",
            lambda x: x | {"Class 7": "unheard of"},
            "'Class 7': 'unheard of' .*0 lines .*imagenet_to_label_2012_v2",
        ),
        (
            "objectnet_to_imagenet_1k",
            lambda x: x | {"Class 7": x["Class 8"]},
            "'Class 8' .*class 8 .*'Class 7'",
        ),
        (
            "objectnet_to_imagenet_1k",
            lambda x: {k: v for k, v in x.items() if k != "Class 9"},
            "112 classes.* 113",
        ),
        ("objectnet_to_imagenet_1k", list, "JSON object"),
        ("folder_to_objectnet_label", lambda x: x | {"more": "Class 3"}, "'Class 3' .*fold"),
        ("pytorch_to_imagenet_2012_id", lambda x: x | {"0": 4}, "lines 0 .*999"),
        ("pytorch_to_imagenet_2012_id", lambda x: x | {"1000": 4}, "keys '0' .*'999'"),
    ],
)
def test_inconsistent_objectnet_files(mappings, file, change, message):
    changed(mappings, f"{file}.json", change)
    with pytest.raises(UserError, match=message) as error:
        imagenet.objectnet_classes(mappings)
    assert f"{mappings / file}.json" in str(error.value)


def test_missing_or_duplicate_objectnet_names(mappings):
    path = mappings / "imagenet_to_label_2012_v2"
    lines = path.read_text().splitlines(keepends=True)
    lines[(7 * 500 + 3) % 1000] = lines[(7 * 8 + 3) % 1000]
    path.write_text("".join(lines))
    with pytest.raises(UserError, match="'thing 8, entity 8' .*2 lines"):
        imagenet.objectnet_classes(mappings)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="999 lines.* 1,000"):
        imagenet.objectnet_classes(mappings)
    path.unlink()
    with pytest.raises(UserError, match="imagenet_to_label_2012_v2: "):
        imagenet.objectnet_classes(mappings)


def test_real(tmp_path):
    path = tmp_path / "real.json"
    items = [f"[{i % 1000}, {(i + 1) % 1000}]" if i % 3 else "[]" for i in range(50_000)]

    def write(items):
        path.write_text(f"[{', '.join(items)}]")

    write(items)
    read = imagenet.real_labels(path)
    assert len(read) == 50_000 and read[:3] == ((), (1, 2), (2, 3)) and read[999] == ()
    for item in ("3", "[1000]", "[-1]", "[true]", '["1"]', "[1.0]"):
        write([*items[:7], item, *items[8:]])
        with pytest.raises(UserError, match="item 7 .* 0 .*999"):
            imagenet.real_labels(path)
    write(items[:-1])
    with pytest.raises(UserError, match="49,999 items.*50,000"):
        imagenet.real_labels(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="dict.*50,000"):
        imagenet.real_labels(path)
