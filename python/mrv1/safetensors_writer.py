# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint of safetensors files, of any size, as its bytes come."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Final

from mrv1.safetensors_reader import DTYPE_BITS, INDEX_NAME, SINGLE_NAME

SHARD_BYTES: Final = 4 * 10**9


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor that is to be written.

    Attributes:
        name: Its name.
        dtype: As `TensorInfo`.
        shape: Its dimensions.
        pieces: Yields its bytes, row-major and little-endian. Called once, in the order of tensors.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[memoryview]]

    @property
    def nbytes(self) -> int:
        """Number of its bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def write_checkpoint(
    root: Path,
    tensors: Sequence[NewTensor],
    advance: Callable[[int], object],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors into one file, or into several and an index.

    Args:
        root: The directory.
        tensors: In their order.
        advance: Called with the number of bytes after each piece.
        shard_bytes: Size of a file from which on the next is begun.
    """
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE_NAME]
    for name, shard in zip(names, shards, strict=True):
        with (root / name).open("wb") as file:
            _write_header(file, shard)
            for tensor in shard:
                written = 0
                for piece in tensor.pieces():
                    file.write(piece)
                    written += len(piece)
                    advance(len(piece))
                assert written == tensor.nbytes, tensor.name
    if len(shards) > 1:
        places = {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = sum(tensor.nbytes for tensor in tensors)
        write_json(root / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": places})


def write_json(path: Path, values: object) -> None:
    """Writes a JSON file as people read it."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_header(file: IO[bytes], tensors: Sequence[NewTensor]) -> None:
    """Writes what precedes the data: a length and a JSON object, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
