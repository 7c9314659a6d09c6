# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Streams of single ops, how long arrays live, and arrays of a library by DLPack's C functions."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from device_arrays import DLTensor, Exported, Storage, contiguous, stored
from mrv1 import _core, ops
from mrv1.errors import InvalidArgumentError

Array = np.ndarray
CHAIN = 60  # ops that are queued before the host looks


class Recorded(Exported):
    """An array of another library, which notes the streams that it was asked for."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.streams: list[object] = []

    def __dlpack__(self, **options: Any) -> object:
        self.streams.append(options.get("stream"))
        return super().__dlpack__(**options)


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned; `tensor` begins with the fields of DLTensor."""


_Delete = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


_Versioned._fields_ = (
    ("major", ctypes.c_uint32),
    ("minor", ctypes.c_uint32),
    ("manager", ctypes.c_void_p),
    ("deleter", _Delete),
    ("flags", ctypes.c_uint64),
    ("tensor", DLTensor),
)


class Exchanged(Recorded):
    """An array whose type has DLPack's table of C functions, as torch's has."""

    requires_grad = False
    current: int | None = None  # handle of the library's current stream

    def __del__(self) -> None:
        managed = getattr(self, "managed", None)
        if managed is not None:
            Exchanged.deleted += 1
            managed.contents.deleter(ctypes.cast(managed, ctypes.c_void_p))

    deleted = 0


def _lend(array: Any, out: int) -> int:
    lent = ctypes.cast(out, ctypes.POINTER(DLTensor)).contents
    dims = len(array.shape)
    sizes = ((ctypes.c_int64 * dims)(*array.shape), (ctypes.c_int64 * dims)(*array._strides))
    array._exports.append(sizes)
    lent.data, lent.byte_offset = array._address - 8, 8
    lent.device_type, lent.device_id = array._device
    lent.ndim, lent.code, lent.bits, lent.lanes = dims, 2, 32, 1
    lent.shape, lent.strides = (ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in sizes)
    return 0


def _take(managed: int, out: int) -> int:
    held = ctypes.cast(managed, ctypes.POINTER(_Versioned))
    tensor = held.contents.tensor
    array = Exchanged(
        tensor.data,
        tensor.shape[: tensor.ndim],
        tensor.strides[: tensor.ndim],
        np.float32,
        "cuda" if tensor.device_type == 2 else "cpu",
    )
    array.managed = held  # type: ignore[attr-defined]
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(array))
    ctypes.cast(out, ctypes.POINTER(ctypes.c_void_p))[0] = id(array)
    return 0


def _current(_type: int, _number: int, out: int) -> int:
    ctypes.cast(out, ctypes.POINTER(ctypes.c_void_p))[0] = Exchanged.current
    return 0


_FUNCTIONS = (
    ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_take),
    ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(_lend),
    ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)(_current),
)
_TABLE = (ctypes.c_void_p * 7)(
    1 | 3 << 32, None, None, None,
    *(ctypes.cast(function, ctypes.c_void_p).value for function in _FUNCTIONS),
)  # fmt: skip
_NAME = b"dlpack_exchange_api"  # which a capsule does not copy
_new_capsule = ctypes.pythonapi.PyCapsule_New
Exchanged.__dlpack_c_exchange_api__ = _new_capsule(  # type: ignore[attr-defined]
    ctypes.addressof(_TABLE), _NAME, None
)


def as_kind(kind: type[Exported], values: Array, device: _core.Device) -> Any:
    """The values as an array of this class, in memory of the device."""
    storage = Storage(values.nbytes, device)
    storage.view(values.shape, contiguous(values.shape), values.dtype)[...] = values
    address = storage.bytes.ctypes.data if device.kind == "cpu" else storage._address
    return kind(
        address, values.shape, contiguous(values.shape), values.dtype, device.kind, owner=storage
    )


@pytest.fixture
def streams(device: str) -> Iterator[list[Any]]:
    """Streams besides the one that a call takes by itself: owners of them on a GPU, else None."""
    if device == "cpu":
        yield [None, None]
        return
    # What was allocated in a stream keeps its owner.
    yield [_core.Device("cuda") for _ in range(2)]


def handle(stream: Any) -> int:
    """Of an owner of a stream."""
    number: int = stream.__cuda_stream__()[1]
    return number


class Result:
    """Memory for a result of float32 that the host reads in the order of a stream."""

    def __init__(self, shape: tuple[int, ...], device: _core.Device) -> None:
        self.storage = Storage(4 * int(np.prod(shape)), device)
        self.storage.bytes[:] = 0xFF
        self.array = self.storage.array(shape, contiguous(shape), np.float32)
        self._shape = shape

    def read(self, stream: Any) -> Array:
        self.storage.wait(stream)
        return self.storage.view(self._shape, contiguous(self._shape), np.float32).copy()


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_results_go_from_stream_to_stream(native_device: _core.Device, streams: list[Any]) -> None:
    """Each op waits for the one that wrote its input, wherever that ran; nobody keeps inputs."""
    x, gain = values(256, 512), values(512, seed=1)
    result = Result(x.shape, native_device)
    kept = stored(gain, native_device)
    array = stored(x, native_device)
    for i in range(CHAIN):
        # The array before is let go of while the op that reads it is queued.
        array = ops.rms_norm(array, kept, stream=streams[i % 2])
    ops.rms_norm(array, kept, out=result.array, stream=streams[0])
    got = result.read(streams[0])
    one = np.asarray(ops.rms_norm(x, gain))
    for _ in range(CHAIN):
        one = np.asarray(ops.rms_norm(one, gain))
    np.testing.assert_allclose(got, one, rtol=1e-3, atol=1e-3)


def test_a_library_is_asked_for_the_stream_of_the_call(
    native_device: _core.Device, streams: list[Any]
) -> None:
    x = as_kind(Recorded, values(4, 8), native_device)
    result = Result((4, 8), native_device)
    ops.add(x, x, out=result.array, stream=streams[1])
    asked = [None] * 2 if streams[1] is None else [handle(streams[1])] * 2
    assert x.streams == asked
    np.testing.assert_array_equal(result.read(streams[1]), 2 * values(4, 8))


def test_inputs_live_until_the_stream_has_passed(
    device: str, native_device: _core.Device, streams: list[Any]
) -> None:
    big = ops.pack_linear(stored(values(1024, 1024), native_device))
    busy = stored(values(32, 1024), native_device)
    for _ in range(CHAIN):
        ops.linear(busy, big, stream=streams[0])
    x = as_kind(Recorded, values(4, 8), native_device)
    gone = weakref.ref(x)
    result = Result((4, 8), native_device)
    ops.add(x, x, out=result.array, stream=streams[0])
    del x
    gc.collect()
    # On the CPU the call has done its work.
    assert (gone() is None) == (device == "cpu")
    np.testing.assert_array_equal(result.read(streams[0]), 2 * values(4, 8))
    small = stored(values(1, 8), native_device)
    ops.add(small, small, stream=streams[0])
    gc.collect()
    assert gone() is None


def test_results_may_go_before_they_are_done(
    native_device: _core.Device, streams: list[Any]
) -> None:
    """Memory of a result that nobody holds is given to the next one in stream order only."""
    weight = values(256, 256, seed=2) / 16
    packed = ops.pack_linear(stored(weight, native_device))
    rows = [values(64, 256, seed=seed) for seed in range(CHAIN)]
    results = [Result((64, 256), native_device) for _ in rows]
    inputs = [stored(row, native_device) for row in rows]
    for array, result in zip(inputs, results, strict=True):
        product = ops.linear(
            ops.linear(array, packed, stream=streams[0]), packed, stream=streams[0]
        )
        ops.add(product, product, out=result.array, stream=streams[0])
        del product
    for row, result in zip(rows, results, strict=True):
        expected = 2 * (row @ weight.T.astype(np.float64) @ weight.T.astype(np.float64))
        np.testing.assert_allclose(result.read(streams[0]), expected, rtol=1e-2, atol=1e-2)


def test_arrays_by_the_functions_of_dlpack(native_device: _core.Device, streams: list[Any]) -> None:
    """In the library's current stream, without a call of its __dlpack__; results are its own."""
    Exchanged.current = None if streams[0] is None else handle(streams[0])
    x = as_kind(Exchanged, values(4, 8), native_device)
    deleted = Exchanged.deleted
    total = ops.add(x, x)
    assert isinstance(total, Exchanged)
    assert total.shape == (4, 8)
    assert x.streams == []
    result = Result((4, 8), native_device)
    ops.add(total, x, out=result.array, stream=streams[0])
    np.testing.assert_array_equal(result.read(streams[0]), 3 * values(4, 8))
    del total
    gc.collect()
    ops.add(x, x, out=result.array, stream=streams[0])  # lets go of what is done with
    assert Exchanged.deleted == deleted + 1
    # What would lose a gradient is the library's to refuse.
    x.requires_grad = True
    ops.add(x, x)
    assert x.streams != []


def test_another_stream_than_the_current_one_takes_the_handshake(
    device: str, native_device: _core.Device, streams: list[Any]
) -> None:
    if device == "cpu":
        with pytest.raises(InvalidArgumentError, match="stream must be None"):
            ops.add(values(1, 8), values(1, 8), stream=5)
        return
    Exchanged.current = handle(streams[0])
    x = as_kind(Exchanged, values(4, 8), native_device)
    result = Result((4, 8), native_device)
    ops.add(x, x, out=result.array, stream=streams[1])
    assert x.streams == [handle(streams[1])] * 2
    np.testing.assert_array_equal(result.read(streams[1]), 2 * values(4, 8))
