# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Finds the tensors of a checkpoint in safetensors files; reads headers only.

A safetensors file is an unsigned 64-bit little-endian length N, a JSON object of N bytes, and the
tensors' bytes ("buffer"). The object maps each tensor's name to its dtype, shape and data_offsets
[begin, end) in the buffer; "__metadata__" may map strings to strings. The tensors cover the buffer
without holes or overlap, and the buffer reaches to the end of the file.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from mrv1._files import FileError, open_regular, parse_json, read_exactly, read_file
from mrv1.errors import MISSING, WeightError

if TYPE_CHECKING:
    from collections.abc import Mapping

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"

# Bits of an element. Types below a byte are packed; a tensor still is a whole number of bytes.
DTYPE_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}

# The format's own limit of a header.
MAX_HEADER_BYTES: Final = 100_000_000
MAX_INDEX_BYTES: Final = 100_000_000
# About 150,000 tensors a file; bounds the memory of a parsed header to a few hundred MB.
MAX_JSON_VALUES: Final = 2_000_000
MAX_SHARDS: Final = 10_000
MAX_RANK: Final = 64
_MAX_INT64: Final = 2**63 - 1
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        name: Its name.
        dtype: The format's name of its dtype, a key of `DTYPE_BITS`.
        shape: Its dimensions; the data is row-major and little-endian.
        path: The file.
        offset: Position of its first byte from the start of the file, not necessarily aligned.
        nbytes: Number of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Returns all tensors of a checkpoint by name.

    Args:
        path: A model directory, with model.safetensors or model.safetensors.index.json and its
            shards, or one safetensors file. A directory with both is read as the single file.
            Tensors of a shard that the index does not map to that shard are left out.

    Raises:
        WeightError: A file is missing, damaged or breaks a rule of the format.
    """
    root = Path(path)
    if not root.is_dir():
        return read_header(root)
    if os.path.lexists(root / SINGLE_NAME):
        return read_header(root / SINGLE_NAME)
    if os.path.lexists(root / INDEX_NAME):
        return _read_shards(root)
    raise WeightError(f"holds neither {SINGLE_NAME} nor {INDEX_NAME}", path=root)


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Returns the tensors of one safetensors file by name, in the order of their bytes.

    Raises:
        WeightError: The file is missing, damaged or breaks a rule of the format.
    """
    file_path = Path(path)
    try:
        with open_regular(file_path) as file:
            file_size = os.fstat(file.fileno()).st_size
            if file_size < 8:
                raise WeightError(f"is truncated: {file_size} bytes", path=file_path)
            header_size = int.from_bytes(read_exactly(file, 8), "little")
            limit = min(file_size - 8, MAX_HEADER_BYTES)
            if not 2 <= header_size <= limit:
                raise WeightError(
                    path=file_path,
                    field="header length",
                    value=header_size,
                    allowed=f"in [2, {limit}], the file holds {file_size} bytes",
                )
            data = read_exactly(file, header_size)
        if not data.startswith(b"{"):
            raise WeightError(
                path=file_path, field="header", value=data[:8], allowed='JSON that starts with "{"'
            )
        header = parse_json(data, MAX_JSON_VALUES)
    except FileError as problem:
        raise WeightError(str(problem), path=file_path) from None
    # A JSON text that starts with a brace is an object.
    assert isinstance(header, dict)
    _check_metadata(file_path, header.pop("__metadata__", {}))
    buffer_start = 8 + header_size
    tensors = [_tensor(file_path, name, entry, buffer_start) for name, entry in header.items()]
    return _check_coverage(file_path, tensors, buffer_start, file_size)


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict):
        raise WeightError(path=path, field="__metadata__", value=metadata, allowed="an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            field = f"__metadata__[{key[:80]!r}]"
            raise WeightError(path=path, field=field, value=value, allowed="a string")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_INT64


def _tensor(path: Path, name: str, entry: object, buffer_start: int) -> TensorInfo:
    """Returns one entry of a header, checked on its own."""

    def error(field: str, value: object, allowed: str) -> WeightError:
        return WeightError(path=path, tensor=name, field=field, value=value, allowed=allowed)

    if not isinstance(entry, dict):
        raise error("entry", entry, "an object")
    for key in entry:
        if key not in _FIELDS:
            raise error("key", key, "dtype, shape or data_offsets")
    dtype = entry.get("dtype", MISSING)
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise error("dtype", dtype, f"one of {', '.join(DTYPE_BITS)}")
    shape = entry.get("shape", MISSING)
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        raise error("shape", shape, f"a list of at most {MAX_RANK} integers in [0, 2**63)")
    offsets = entry.get("data_offsets", MISSING)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_size, offsets))
        or offsets[0] > offsets[1]
    ):
        raise error("data_offsets", offsets, "two integers in [0, 2**63), the second not less")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if bits > 8 * _MAX_INT64:
            raise error("shape", shape, "a shape of less than 2**63 bytes")
    begin, end = offsets
    if bits != 8 * (end - begin):
        allowed = f"{bits / 8:g} bytes apart, as {dtype} and shape {shape} need"
        raise error("data_offsets", offsets, allowed)
    return TensorInfo(name, dtype, tuple(shape), path, buffer_start + begin, end - begin)


def _check_coverage(
    path: Path, tensors: list[TensorInfo], buffer_start: int, file_size: int
) -> dict[str, TensorInfo]:
    """Checks that the tensors cover the buffer without holes or overlap; returns them by name."""
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = buffer_start
    for tensor in tensors:
        if tensor.offset != position:
            raise WeightError(
                path=path,
                tensor=tensor.name,
                field="data_offsets",
                value=[tensor.offset - buffer_start, tensor.offset - buffer_start + tensor.nbytes],
                allowed=f"from {position - buffer_start} on: no hole and no overlap",
            )
        position += tensor.nbytes
    if position != file_size:
        raise WeightError(
            path=path,
            field="file size",
            value=file_size,
            allowed=f"{position}, where the last tensor ends",
        )
    return {tensor.name: tensor for tensor in tensors}


def _read_shards(root: Path) -> dict[str, TensorInfo]:
    index_path = root / INDEX_NAME
    try:
        index = parse_json(read_file(index_path, MAX_INDEX_BYTES), MAX_JSON_VALUES)
    except FileError as problem:
        raise WeightError(str(problem), path=index_path) from None
    weight_map = index.get("weight_map", MISSING) if isinstance(index, dict) else MISSING
    if not isinstance(weight_map, dict):
        raise WeightError(
            path=index_path, field="weight_map", value=weight_map, allowed="an object"
        )
    shards: dict[str, dict[str, TensorInfo]] = {}
    result: dict[str, TensorInfo] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_safe_name(shard):
            raise WeightError(
                path=index_path,
                tensor=name,
                field="weight_map",
                value=shard,
                allowed="the relative path of a .safetensors file inside the directory",
            )
        if shard not in shards:
            if len(shards) == MAX_SHARDS:
                raise WeightError(f"names more than {MAX_SHARDS} files", path=index_path)
            shards[shard] = read_header(root / shard)
        if name not in shards[shard]:
            raise WeightError(f"is not in {shard}", path=index_path, tensor=name)
        result[name] = shards[shard][name]
    return result


def _is_safe_name(name: str) -> bool:
    """Whether a shard's name stays inside the directory. What a symbolic link does is fine."""
    path = PurePosixPath(name)
    return (
        name.endswith(".safetensors")
        and len(name) <= 1024
        and not path.is_absolute()
        and ".." not in path.parts
        and not any(mark in name for mark in ("\\", ":", "\0"))
    )
