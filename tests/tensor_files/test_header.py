"""Invalid headers: each raises a one-line error immediately, whatever the bytes."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import read_header


def file_bytes(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one_tensor(code="F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"w": {"dtype": code, "shape": list(shape), "data_offsets": list(offsets), **more}}


def two_tensors(first, second) -> dict:
    entry = {"dtype": "U8", "shape": [4]}
    return {"a": {**entry, "data_offsets": first}, "b": {**entry, "data_offsets": second}}


EIGHT = bytes(8)
VALID = file_bytes(one_tensor(), EIGHT)
# Content of the file, and a pattern that the message must match.
INVALID = {
    "empty": (b"", "empty"),
    "three bytes": (b"abc", "3 bytes"),
    "truncated header": (VALID[:20], " 61 .* 12"),
    "truncated data": (VALID[:-1], "'w' .* 77.* 76"),
    "header over the limit": (file_bytes(b"{}", length=10**9), " 1000000000 .* 100000000"),
    "exabytes": (file_bytes(b"{}", length=2**64 - 1), " 18446744073709551615 "),
    "not UTF-8": (file_bytes(b'{"\xff\xfe": 1}'), "UTF-8"),
    "lone surrogate": (file_bytes(b'{"\\ud800":{}}'), "UTF-8"),
    "not JSON": (file_bytes(b"{nonsense}"), "JSON: "),
    "NaN": (file_bytes(b'{"w": NaN}'), "JSON: NaN"),
    "a pickle": (file_bytes(b"\x80\x04cos\nsystem\n."), "JSON object"),
    "a list": (file_bytes([1]), "JSON object"),
    "a space first": (file_bytes(b" {}"), "JSON object"),
    "a number": (file_bytes(b"1"), "JSON object"),
    "duplicate name": (
        file_bytes(
            b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
            b'"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "'w' twice",
    ),
    "duplicate key of a tensor": (
        file_bytes(b'{"w":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "'dtype' tw",
    ),
    "deeply nested": (file_bytes(b'{"w":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "nested"),
    "overlap": (file_bytes(two_tensors([0, 4], [2, 6]), bytes(6)), "'b' overlaps"),
    "same offsets twice": (file_bytes(two_tensors([0, 4], [0, 4]), bytes(4)), "'b' overlaps"),
    "gap": (file_bytes(two_tensors([0, 4], [5, 9]), bytes(9)), "'b' .*gap"),
    "gap at the start": (file_bytes(one_tensor(offsets=(1, 9)), bytes(9)), "'w' .*gap"),
    "beyond the end": (
        file_bytes(one_tensor(shape=(3,), offsets=(0, 12)), EIGHT),
        "'w' .* 82.* 78",
    ),
    "trailing bytes": (file_bytes(one_tensor(), bytes(9)), r"\(1 bytes"),
    "backwards": (file_bytes(one_tensor(offsets=(8, 0)), EIGHT), r"8 bytes, .*\[8, 0\] .*-8"),
    "negative": (
        file_bytes(one_tensor(offsets=(-8, 0)), EIGHT),
        r"data_offsets \[-8, 0\] .*integers",
    ),
    "three offsets": (
        file_bytes(one_tensor(offsets=(0, 4, 8)), EIGHT),
        r"data_offsets \[0, 4, 8\] .*integers",
    ),
    "offsets of text": (
        file_bytes(one_tensor(offsets=("0", "8")), EIGHT),
        r"data_offsets \['0', '8'\] .*integers",
    ),
    "float offset": (
        file_bytes(one_tensor(offsets=(0, 8.0)), EIGHT),
        r"data_offsets \[0, 8.0\] .*integers",
    ),
    "wrong size": (file_bytes(one_tensor(shape=(3,)), EIGHT), r"F32\[3\] .*12 bytes"),
    "overflow": (file_bytes(one_tensor(shape=(2**32, 2**32, 4)), EIGHT), "size .*F32"),
    "overflow with an empty axis": (
        file_bytes(one_tensor(shape=(2**63, 2**63, 0)), EIGHT),
        "size .*F32",
    ),
    "a negative length": (file_bytes(one_tensor(shape=(-2,)), EIGHT), "shape .*integers"),
    "a boolean length": (file_bytes(one_tensor(shape=(True, 2)), EIGHT), "shape .*integers"),
    "integer of 5000 digits": (file_bytes(b'{"w":' + b"9" * 5000 + b"}"), "JSON: "),
    "length over 2^64": (file_bytes(one_tensor(shape=(10**30,)), EIGHT), "shape .*integers"),
    "65 axes": (file_bytes(one_tensor(shape=(1,) * 65, offsets=(0, 4)), bytes(4)), "65 axes"),
    "half a byte": (file_bytes(one_tensor("F4", (3,), (0, 1)), b"1"), r"size .*bits: F4\[3\]"),
    "unknown dtype": (file_bytes(one_tensor("F33"), EIGHT), "dtype 'F33'"),
    "list as dtype": (file_bytes(one_tensor(["F32"]), EIGHT), r"dtype \['F32'\]"),
    "no dtype": (file_bytes({"w": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), "'w': .*dtype"),
    "null as tensor": (file_bytes({"w": None}), "'w': .*object"),
    "metadata with numbers": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__ .*text"),
    "metadata is text": (file_bytes({"__metadata__": "a"}), "__metadata__ .*text"),
    "a name with newlines": (file_bytes({"a\nb\x1b[31m": None}), r"tensor 'a\\nb\\x1b\[31m'"),
}


@pytest.mark.parametrize(("content", "message"), INVALID.values(), ids=INVALID.keys())
def test_invalid_header_error_is_one_line(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_header(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    assert len(line) < 400


def test_valid_header(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(VALID)
    entry = read_header(path).tensors["w"]
    assert (entry.code, entry.shape, entry.stop - entry.start) == ("F32", (2,), 8)
    assert entry.stop == len(VALID)
    header = {
        "__metadata__": {"é": "x"},
        **one_tensor(),
        "none": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [8, 8], "later": 1},
    }
    path.write_bytes(file_bytes(header, EIGHT))
    assert read_header(path).metadata == {"é": "x"} and len(read_header(path).tensors) == 2
    with pytest.raises(UserError, match="gone: .*No such file"):
        read_header(tmp_path / "gone")


def test_large_invalid_header_uses_bounded_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(b'{"w":[' + b"[]," * (10**7) + b"[]]}"))
    tracemalloc.start()
    with pytest.raises(UserError, match="header .*too many entries"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * path.stat().st_size  # the text itself, no parsed objects


_numbers = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([2**32, 2**63, 2**64, 10**40]),
    st.booleans(),
    st.none(),
    st.floats(),
    st.text(max_size=2),
)
_entries = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.one_of(st.sampled_from(["F32", "BF16", "U8", "F4", "Q8"]), _numbers),
            "shape": st.one_of(st.lists(_numbers, max_size=4), _numbers),
            "data_offsets": st.one_of(st.lists(_numbers, max_size=3), _numbers),
        },
    ),
)
_headers = st.dictionaries(
    st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=3)),
    _entries,
    max_size=4,
).map(lambda header: json.dumps(header).encode())
_bytes = st.one_of(st.binary(max_size=60), _headers)


@st.composite
def _files(draw):
    """Files of random bytes, with random headers, and valid files with a few bytes changed."""
    if draw(st.booleans()):
        length = draw(st.one_of(st.none(), st.integers(0, 2**64 - 1)))
        return file_bytes(draw(_bytes), draw(st.binary(max_size=20)), length)
    changed = bytearray(file_bytes(two_tensors([0, 4], [4, 8]), EIGHT))
    for index in draw(st.lists(st.integers(0, len(changed) - 1), max_size=4)):
        changed[index] = draw(st.integers(0, 255))
    return bytes(changed)[: draw(st.integers(0, len(changed)))]


def _accepts(path) -> bool:
    """Whether the reader of the safetensors library accepts a file."""
    try:
        with safe_open(path, framework="numpy"):
            return True
    except (SafetensorError, UnicodeDecodeError):
        return False


def _fuzz(path, content):
    path.write_bytes(content)
    begin = time.monotonic()
    try:
        header = read_header(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(0 <= e.start <= e.stop <= len(content) for e in header.tensors.values())
        assert _accepts(path), "the safetensors library rejects this file"
    assert time.monotonic() - begin < 1


@given(_files())
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_bytes_do_not_crash_the_reader(tmp_path, content):
    _fuzz(tmp_path / "f.safetensors", content)


@pytest.mark.slow
@given(_files())
@settings(
    max_examples=8_000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_many_random_files_do_not_crash_the_reader(tmp_path, content):
    _fuzz(tmp_path / "f.safetensors", content)
