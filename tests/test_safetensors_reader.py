# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Reading and refusing safetensors headers and shard indices; the safetensors package writes."""

from __future__ import annotations

import json
import os
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from model_files import safetensors_bytes
from mrv1.errors import Mrv1Error, WeightError
from mrv1.safetensors_reader import MAX_HEADER_BYTES, TensorInfo, read_checkpoint, read_header

if TYPE_CHECKING:
    from pathlib import Path

Array = npt.NDArray[Any]

NUMPY_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}


def load(info: TensorInfo) -> Array:
    """Returns the array that an entry points at."""
    data = info.path.read_bytes()[info.offset : info.offset + info.nbytes]
    return np.frombuffer(data, NUMPY_DTYPES[info.dtype]).reshape(info.shape)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(sorted(NUMPY_DTYPES)),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        max_size=6,
    ),
    st.none() | st.dictionaries(st.text("ab", max_size=3), st.text("cd", max_size=3)),
)
def test_reads_what_the_package_writes(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, list[int]]],
    metadata: dict[str, str] | None,
) -> None:
    rng = np.random.default_rng(7)
    arrays: dict[str, Array] = {}
    for name, (dtype, shape) in tensors.items():
        arrays[name] = rng.integers(0, 2, shape).astype(NUMPY_DTYPES[dtype])
    path = tmp_path_factory.mktemp("round") / "model.safetensors"
    # Without tensors, safetensors 0.8 writes empty metadata as something that it cannot read.
    save_file(arrays, path, metadata if arrays else metadata or None)
    found = read_header(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        info = found[name]
        assert (info.name, info.dtype, info.path) == (name, tensors[name][0], path)
        assert info.nbytes == array.nbytes
        np.testing.assert_array_equal(load(info), array, strict=True)
    assert read_checkpoint(path) == found
    assert read_checkpoint(path.parent) == found


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("BF16", [3], 6),
        ("F8_E4M3", [5], 5),
        ("F8_E5M2", [5], 5),
        ("F8_E8M0", [5], 5),
        ("F4", [2, 3], 3),
        ("F6_E2M3", [4], 3),
        ("C64", [2], 16),
        ("F64", [], 8),
        ("I64", [0, 2**62], 0),
    ],
)
def test_dtypes_that_numpy_has_not(
    dtype: str, shape: list[int], nbytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    header = {"w": entry(dtype, shape, [0, nbytes])}
    path.write_bytes(safetensors_bytes(header, bytes(nbytes)))
    info = read_header(path)["w"]
    offset = 8 + len(json.dumps(header))
    assert info == TensorInfo("w", dtype, tuple(shape), path, offset, nbytes)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = {
        "c": entry("U8", [2], [3, 5]),
        "b": entry("U8", [0], [3, 3]),
        "a": entry("U8", [3], [0, 3]),
        "__metadata__": {"format": "pt"},
    }
    path.write_bytes(safetensors_bytes(header, b"abcde"))
    assert list(read_header(path)) == ["a", "b", "c"]


BAD_SHAPES: tuple[Any, ...] = (6, "6", [6.0], [-6], [True], [2**63], [[6]], [None], [1] * 65, {})
SHAPE = "a list of at most 64 integers in [0, 2**63)"
OFFSETS = "two integers in [0, 2**63), the second not less"


@pytest.mark.parametrize(
    ("header", "buffer_size", "tensor", "field", "allowed"),
    [
        ({"w": None}, 0, "w", "entry", "an object"),
        ({"w": [1]}, 0, "w", "entry", "an object"),
        ({"w": {**entry(), "strides": [3, 1]}}, 24, "w", "key", "dtype, shape or data_offsets"),
        ({"w": {"shape": [], "data_offsets": [0, 4]}}, 4, "w", "dtype", "one of BOOL"),
        ({"w": entry("f32")}, 24, "w", "dtype", "one of BOOL"),
        ({"w": entry(["F32"])}, 24, "w", "dtype", "one of BOOL"),
        ({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "w", "shape", SHAPE),
        *[({"w": entry(shape=shape)}, 24, "w", "shape", SHAPE) for shape in BAD_SHAPES],
        ({"w": entry(shape=[2**40, 2**40])}, 24, "w", "shape", "a shape of less than 2**63 bytes"),
        ({"w": entry(shape=[2**62, 4, 0])}, 0, "w", "shape", "a shape of less than 2**63 bytes"),
        ({"w": {"dtype": "F32", "shape": [1]}}, 4, "w", "data_offsets", OFFSETS),
        *[
            ({"w": entry(offsets=offsets)}, 24, "w", "data_offsets", OFFSETS)
            for offsets in (24, [24], [0, 24, 24], [0.0, 24], [-24, 0], [24, 0], [0, 2**63], "ab")
        ],
        ({"w": entry(offsets=[0, 23])}, 23, "w", "data_offsets", "24 bytes apart"),
        ({"w": entry(shape=[2, 4])}, 24, "w", "data_offsets", "32 bytes apart"),
        ({"w": entry("F4", [3], [0, 1])}, 1, "w", "data_offsets", "1.5 bytes apart"),
        ({"w": entry(offsets=[8, 32])}, 32, "w", "data_offsets", "from 0 on"),
        ({"v": entry(), "w": entry(offsets=[20, 44])}, 44, "w", "data_offsets", "from 24 on"),
        ({"v": entry(), "w": entry(offsets=[28, 52])}, 52, "w", "data_offsets", "from 24 on"),
        ({"v": entry(), "w": entry()}, 24, "w", "data_offsets", "from 24 on"),
        ({"w": entry()}, 23, None, "file size", "where the last tensor ends"),
        ({"w": entry()}, 25, None, "file size", "where the last tensor ends"),
        ({}, 1, None, "file size", "where the last tensor ends"),
        ({"__metadata__": []}, 0, None, "__metadata__", "an object"),
        ({"__metadata__": {"a": 1}}, 0, None, "__metadata__['a']", "a string"),
    ],
)
def test_refused_headers(
    header: object,
    buffer_size: int,
    tensor: str | None,
    field: str,
    allowed: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(buffer_size)))
    with pytest.raises(WeightError) as caught:
        read_header(path)
    error = caught.value
    assert isinstance(error, Mrv1Error)
    assert isinstance(error, ValueError)
    assert (error.path, error.tensor, error.field) == (str(path), tensor, field)
    assert error.allowed is not None
    assert allowed in error.allowed
    assert str(path) in str(error)


def with_length(length: int, rest: bytes) -> bytes:
    return length.to_bytes(8, "little") + rest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated: 0 bytes"),
        (b"\2\0\0\0\0\0\0", "is truncated: 7 bytes"),
        (with_length(2, b""), "header length = 2: must be in"),
        (with_length(3, b"{}"), "header length = 3: must be in"),
        (with_length(0, b"{}"), "header length = 0: must be in"),
        (with_length(2**64 - 1, b"{}"), "header length = 18446744073709551615: must be in"),
        (with_length(2, b"[]"), "header = .*must be JSON that starts with"),
        (with_length(3, b" {}"), "header = .*must be JSON that starts with"),
        (with_length(2, b"{{"), "is not valid JSON"),
        (with_length(4, b"{}{}"), "is not valid JSON"),
        (with_length(14, b'{"a":1, "a":2}'), "the key 'a' occurs twice"),
        (with_length(9, b'{"a":NaN}'), "NaN is not a JSON number"),
        (with_length(7, b'{"\xff":1}'), "is not UTF-8"),
        (with_length(12, b'{"\\udfff":1}'), "lone surrogate"),
        (with_length(20_005, b'{"a":' + b"[" * 20_000), "nested too deeply"),
        (with_length(4_000_007, b'{"a":[' + b"0," * 2_000_000 + b"0"), "more than 2000000 JSON"),
    ],
)
def test_refused_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightError, match=message) as caught:
        read_header(path)
    assert caught.value.path == str(path)


def test_padding_after_the_header_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_length(8, b"{}      "))
    assert read_header(path) == {}


def test_a_large_claim_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(with_length(MAX_HEADER_BYTES + 1, b"{"))
        file.truncate(2 * MAX_HEADER_BYTES)
    tracemalloc.start()
    try:
        with pytest.raises(WeightError, match="header length = 100000001: must be in"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_truncated_files(cut: int, tmp_path: Path) -> None:
    content = save({"a": np.zeros(9, np.float32), "b": np.zeros((2, 2), np.int64)})
    path = tmp_path / "a.safetensors"
    path.write_bytes(content[: min(cut, len(content) - 1)])
    with pytest.raises(WeightError, match=r"a\.safetensors"):
        read_header(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="there is no such file"):
        read_checkpoint(tmp_path / "nothing")
    with pytest.raises(WeightError, match="holds neither"):
        read_checkpoint(tmp_path)
    with pytest.raises(WeightError, match="is not a regular file"):
        read_header(tmp_path)
    with pytest.raises(WeightError, match="cannot be opened"):
        read_header(tmp_path / ("x" * 5000))
    with pytest.raises(WeightError, match="cannot be opened"):
        read_header(tmp_path / "a\0b")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match="is not a regular file"):
        read_checkpoint(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards, one of them a symbolic link, as in a download cache."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "sub").mkdir()
    save_file({"a": np.arange(3, dtype=np.int32), "x": np.zeros(2)}, tmp_path / "blob")
    (directory / "model-1.safetensors").symlink_to(tmp_path / "blob")
    save_file(
        {"b": np.arange(4, dtype=np.float16), "x": np.ones(2)}, directory / "sub/2.safetensors"
    )
    write_index(
        directory,
        {"b": "sub/2.safetensors", "a": "model-1.safetensors", "x": "sub/2.safetensors"},
    )
    return directory


def write_index(directory: Path, weight_map: object, **others: object) -> None:
    text = json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map, **others})
    (directory / "model.safetensors.index.json").write_text(text)


def test_shards(sharded: Path) -> None:
    found = read_checkpoint(sharded)
    assert sorted(found) == ["a", "b", "x"]
    assert found["a"].path == sharded / "model-1.safetensors"
    np.testing.assert_array_equal(load(found["a"]), np.arange(3, dtype=np.int32))
    # The index says which of two tensors of the same name is meant.
    np.testing.assert_array_equal(load(found["x"]), np.ones(2))
    save_file({"single": np.ones(1)}, sharded / "model.safetensors")
    assert list(read_checkpoint(sharded)) == ["single"]


@pytest.mark.parametrize(
    "shard",
    [
        "../blob.safetensors",
        "sub/../../blob.safetensors",
        "/tmp/blob.safetensors",
        "C:\\blob.safetensors",
        "sub\\2.safetensors",
        "a\0.safetensors",
        "model-1.bin",
        "",
        ".",
        None,
        1,
        ["model-1.safetensors"],
        "x" * 2000 + ".safetensors",
    ],
)
def test_refused_shard_names(shard: object, sharded: Path) -> None:
    save_file({"a": np.ones(1)}, sharded.parent / "blob.safetensors")
    write_index(sharded, {"a": shard})
    with pytest.raises(WeightError, match="inside the directory") as caught:
        read_checkpoint(sharded)
    assert (caught.value.tensor, caught.value.field) == ("a", "weight_map")


def test_refused_indices(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    for content, message in (
        (b"", "is not valid JSON"),
        (b"[]", "weight_map is missing: must be an object"),
        (b"{}", "weight_map is missing: must be an object"),
        (b'{"weight_map": []}', "must be an object"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "occurs twice"),
    ):
        index.write_bytes(content)
        with pytest.raises(WeightError, match=message) as caught:
            read_checkpoint(sharded)
        assert caught.value.path == str(index)
    write_index(sharded, {"b": "model-1.safetensors"})
    with pytest.raises(WeightError, match=r"tensor 'b': is not in model-1\.safetensors"):
        read_checkpoint(sharded)
    write_index(sharded, {"b": "model-9.safetensors"})
    with pytest.raises(WeightError, match=r"model-9\.safetensors: there is no such file"):
        read_checkpoint(sharded)
    (sharded / "sub" / "2.safetensors").write_bytes(b"123")
    write_index(sharded, {"b": "sub/2.safetensors"})
    with pytest.raises(WeightError, match=r"2\.safetensors: is truncated"):
        read_checkpoint(sharded)
