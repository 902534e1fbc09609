"""Headers that lie: each is one clear line, at once, whatever the bytes."""

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


def whole(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(code="F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"w": {"dtype": code, "shape": list(shape), "data_offsets": list(offsets), **more}}


def two(first, second) -> dict:
    entry = {"dtype": "U8", "shape": [4]}
    return {"a": {**entry, "data_offsets": first}, "b": {**entry, "data_offsets": second}}


EIGHT = bytes(8)
GOOD = whole(one(), EIGHT)
# The file, and what must be said of it.
HOSTILE = {
    "empty": (b"", "empty"),
    "three bytes": (b"abc", "3 bytes"),
    "cut in the header": (GOOD[:20], " 61 .* 12"),
    "cut in the data": (GOOD[:-1], "'w' .* 77.* 76"),
    "longer than the format allows": (whole(b"{}", length=10**9), " 1000000000 .* 100000000"),
    "exabytes": (whole(b"{}", length=2**64 - 1), " 18446744073709551615 "),
    "not UTF-8": (whole(b'{"\xff\xfe": 1}'), "UTF-8"),
    "half a surrogate": (whole(b'{"\\ud800":{}}'), "UTF-8"),
    "not JSON": (whole(b"{nonsense}"), "JSON: "),
    "NaN": (whole(b'{"w": NaN}'), "JSON: NaN"),
    "a pickle": (whole(b"\x80\x04cos\nsystem\n."), "JSON object"),
    "a list": (whole([1]), "JSON object"),
    "a space first": (whole(b" {}"), "JSON object"),
    "a number": (whole(b"1"), "JSON object"),
    "the same name twice": (
        whole(
            b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
            b'"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "'w' twice",
    ),
    "a key of a tensor twice": (
        whole(b'{"w":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "'dtype' tw",
    ),
    "nested deeply": (whole(b'{"w":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "nested"),
    "overlap": (whole(two([0, 4], [2, 6]), bytes(6)), "'b' overlaps"),
    "twice the same place": (whole(two([0, 4], [0, 4]), bytes(4)), "'b' overlaps"),
    "a hole": (whole(two([0, 4], [5, 9]), bytes(9)), "'b' .*hole"),
    "a hole at first": (whole(one(offsets=(1, 9)), bytes(9)), "'w' .*hole"),
    "beyond the end": (whole(one(shape=(3,), offsets=(0, 12)), EIGHT), "'w' .* 82.* 78"),
    "bytes after the last": (whole(one(), bytes(9)), r"\(1 bytes"),
    "backwards": (whole(one(offsets=(8, 0)), EIGHT), r"8 bytes, .*\[8, 0\] .*-8"),
    "negative": (whole(one(offsets=(-8, 0)), EIGHT), r"data_offsets \[-8, 0\] .*numbers"),
    "three offsets": (whole(one(offsets=(0, 4, 8)), EIGHT), r"data_offsets \[0, 4, 8\] .*numbers"),
    "offsets of text": (
        whole(one(offsets=("0", "8")), EIGHT),
        r"data_offsets \['0', '8'\] .*numbers",
    ),
    "a fraction": (whole(one(offsets=(0, 8.0)), EIGHT), r"data_offsets \[0, 8.0\] .*numbers"),
    "wrong size": (whole(one(shape=(3,)), EIGHT), r"F32\[3\] .*12 bytes"),
    "overflow": (whole(one(shape=(2**32, 2**32, 4)), EIGHT), "size .*F32"),
    "overflow, then nothing": (whole(one(shape=(2**63, 2**63, 0)), EIGHT), "size .*F32"),
    "a negative length": (whole(one(shape=(-2,)), EIGHT), "shape .*numbers"),
    "a shape of truth": (whole(one(shape=(True, 2)), EIGHT), "shape .*numbers"),
    "a huge number": (whole(b'{"w":' + b"9" * 5000 + b"}"), "JSON: "),
    "a large number": (whole(one(shape=(10**30,)), EIGHT), "shape .*numbers"),
    "65 axes": (whole(one(shape=(1,) * 65, offsets=(0, 4)), bytes(4)), "65 axes"),
    "half a byte": (whole(one("F4", (3,), (0, 1)), b"1"), r"bytes: F4\[3\]"),
    "unknown dtype": (whole(one("F33"), EIGHT), "dtype 'F33'"),
    "dtype of a list": (whole(one(["F32"]), EIGHT), r"dtype \['F32'\]"),
    "no dtype": (whole({"w": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), "'w': .*dtype"),
    "a tensor of null": (whole({"w": None}), "'w': .*object"),
    "metadata of numbers": (whole({"__metadata__": {"a": 1}}), "__metadata__ .*text"),
    "metadata of text": (whole({"__metadata__": "a"}), "__metadata__ .*text"),
    "a name with line ends": (whole({"a\nb\x1b[31m": None}), r"tensor 'a\\nb\\x1b\[31m'"),
}


@pytest.mark.parametrize(("content", "said"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_is_one_line(tmp_path, content, said):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_header(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    assert len(line) < 400


def test_a_good_header(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    entry = read_header(path).tensors["w"]
    assert (entry.code, entry.shape, entry.stop - entry.start) == ("F32", (2,), 8)
    assert entry.stop == len(GOOD)
    header = {
        "__metadata__": {"é": "x"},
        **one(),
        "none": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [8, 8], "later": 1},
    }
    path.write_bytes(whole(header, EIGHT))
    assert read_header(path).metadata == {"é": "x"} and len(read_header(path).tensors) == 2
    with pytest.raises(UserError, match="gone: .*No such file"):
        read_header(tmp_path / "gone")


def test_a_large_hostile_header_takes_bounded_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole(b'{"w":[' + b"[]," * (10**7) + b"[]]}"))
    tracemalloc.start()
    with pytest.raises(UserError, match="header .*too large"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * path.stat().st_size  # the text itself, and no objects of it


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
    """Files of random bytes, of random headers, and whole ones with a few bytes changed."""
    if draw(st.booleans()):
        length = draw(st.one_of(st.none(), st.integers(0, 2**64 - 1)))
        return whole(draw(_bytes), draw(st.binary(max_size=20)), length)
    changed = bytearray(whole(two([0, 4], [4, 8]), EIGHT))
    for place in draw(st.lists(st.integers(0, len(changed) - 1), max_size=4)):
        changed[place] = draw(st.integers(0, 255))
    return bytes(changed)[: draw(st.integers(0, len(changed)))]


def _accepts(path) -> bool:
    """Whether the format's own reader takes a file."""
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
        assert _accepts(path), "stricter readers refuse this file"
    assert time.monotonic() - begin < 1


@given(_files())
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_bytes_crash_the_reader(tmp_path, content):
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
def test_no_bytes_crash_the_reader_at_length(tmp_path, content):
    _fuzz(tmp_path / "f.safetensors", content)
