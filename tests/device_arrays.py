# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Arrays of any strides in memory that the device under test addresses, without another library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mrv1 import _core, memory

# DLPack's codes of element types.
_CODES = {
    np.dtype(np.int32): 0,
    np.dtype(np.int64): 0,
    np.dtype(np.uint8): 1,
    np.dtype(np.float16): 2,
    np.dtype(np.float32): 2,
    np.dtype(ml_dtypes.bfloat16): 4,
    np.dtype(ml_dtypes.float8_e4m3fn): 10,
    np.dtype(ml_dtypes.float8_e5m2): 12,
}


class DLTensor(ctypes.Structure):
    """An array as DLPack describes it; dlpack.h has the fields."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor."""


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [
    ("tensor", DLTensor),
    ("manager", ctypes.c_void_p),
    ("deleter", _Deleter),
]
_keep = _Deleter(lambda managed: None)  # the exporting object owns everything
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Exported:
    """An array that has DLPack and nothing else. Strides count elements."""

    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: Any,
        device: str,
        owner: object = None,
    ) -> None:
        self.shape = tuple(shape)
        self._strides = tuple(strides)
        self._address, self._owner = address, owner
        self._dtype = np.dtype(dtype)
        self._device = (2, 0) if device == "cuda" else (1, 0)
        self._exports: list[object] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **options: Any) -> object:
        dims = max(len(self.shape), 1)
        shape, strides = (
            (ctypes.c_int64 * dims)(*self.shape),
            (ctypes.c_int64 * dims)(*self._strides),
        )
        tensor = DLTensor(
            self._address, *self._device, len(self.shape), _CODES[self._dtype],
            8 * self._dtype.itemsize, 1, shape, strides, 0,
        )  # fmt: skip
        managed = _Managed(tensor, None, _keep)
        self._exports.append((managed, shape, strides))
        return _new_capsule(ctypes.addressof(managed), b"dltensor", None)


class Storage:
    """Bytes that host and device address, and arrays in them."""

    def __init__(self, nbytes: int, device: _core.Device) -> None:
        self._device = device
        self._pinned = memory.pinned(nbytes + 64, np.uint8, device)
        whole: Any = self._pinned.numpy()
        skip = -whole.ctypes.data % 64
        self.bytes: np.ndarray = whole[skip : skip + nbytes]
        self._address = self._pinned.device().ptr + skip

    def array(
        self, shape: Sequence[int], strides: Sequence[int], dtype: Any, offset: int = 0
    ) -> Any:
        """For an op: one of NumPy on the CPU. Strides and offset count elements."""
        dtype = np.dtype(dtype)
        if self._device.kind == "cpu":
            return self.view(shape, strides, dtype, offset)
        address = self._address + offset * dtype.itemsize
        return Exported(address, shape, strides, dtype, "cuda", self._pinned)

    def wait(self, stream: Any = None) -> None:
        """For what is in a stream, which is that of the bytes' own device by default."""
        self._pinned.fence(stream)
        self._pinned.wait()

    def view(
        self, shape: Sequence[int], strides: Sequence[int], dtype: Any, offset: int = 0
    ) -> np.ndarray:
        """For the host."""
        dtype = np.dtype(dtype)
        return np.ndarray(
            tuple(shape),
            dtype,
            self.bytes,
            offset * dtype.itemsize,
            tuple(stride * dtype.itemsize for stride in strides),
        )


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in C order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def stored(values: np.ndarray, device: _core.Device) -> Any:
    """The values in memory of the device, as an array for an op."""
    storage = Storage(max(values.nbytes, 1), device)
    storage.bytes[: values.nbytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return storage.array(values.shape, contiguous(values.shape), values.dtype)


def in_stream_of(device: _core.Device) -> dict[str, Any]:
    """Options of a call of an op that `device.synchronize()` waits for."""
    return {"stream": device.stream} if device.kind == "cuda" else {}


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as activations of the dtype hold them."""
    if dtype == "float32":
        return values
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)
