# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Host memory that the GPU reads and writes in place, and when the host may touch it again.

    with mrv1.memory.pinned((4, 1024), "float32", device="cuda") as buffer:
        with buffer.write() as array:  # waits for the GPU work that still uses the memory
            array[:] = 1.0
        launch(kernel, buffer.device(), stream)
        buffer.fence(stream)  # in use until what is in the stream now has ended

What `numpy()` and `device()` give keeps the memory alive; it is freed with the last of them, once
all fences have passed. On the CPU the same calls work on plain memory.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mrv1 import _core
from mrv1._closing import Closing
from mrv1._streams import Stream, SupportsCudaStream
from mrv1.errors import ClosedError, InvalidArgumentError
from mrv1.loader import resolve_device

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["PinnedArray", "PinnedRing", "Stream", "SupportsCudaStream", "pinned"]

# Names that are dtypes of ml_dtypes, which is needed for these only.
_EXTRA_DTYPES = ("bfloat16", "float8_")


def resolve_array_dtype(dtype: DTypeLike) -> np.dtype[np.generic]:
    """Returns a NumPy dtype; names such as "bfloat16" are looked up in ml_dtypes.

    Raises:
        InvalidArgumentError: There is no such dtype, or a device has no arrays of it.
    """
    if isinstance(dtype, str) and dtype.startswith(_EXTRA_DTYPES):
        try:
            import ml_dtypes
        except ImportError:
            raise InvalidArgumentError(
                "needs the package ml_dtypes", field="dtype", value=dtype
            ) from None
        dtype = getattr(ml_dtypes, dtype, dtype)
    try:
        resolved = np.dtype(dtype)
    except TypeError:
        raise InvalidArgumentError(
            field="dtype", value=dtype, allowed="a dtype of NumPy or ml_dtypes"
        ) from None
    if not resolved.isnative or resolved.hasobject or resolved.subdtype or resolved.names:
        raise InvalidArgumentError(field="dtype", value=dtype, allowed="a plain, native dtype")
    return resolved


def _resolve_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise InvalidArgumentError(
                field="shape", value=shape, allowed="an integer of at least 0, or several"
            )
    if math.prod(size for size in sizes if size > 0) >= 2**48:
        raise InvalidArgumentError(field="shape", value=shape, allowed="less than 2**48 elements")
    return sizes


def _open_device(device: _core.Device | str | None) -> _core.Device:
    if isinstance(device, _core.Device):
        return device
    return _core.Device(resolve_device(device), num_threads=1)


class PinnedArray(Closing):
    """An array in host memory that the device addresses too.

    The host must not touch what the device still reads, nor read what it still writes: `fence`
    tells the array of such work, and `write` and `wait` wait for it.

    Attributes:
        shape: Its dimensions; the elements lie in C order.
        dtype: Of its elements.
        nbytes: Bytes of all elements.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        dtype: DTypeLike,
        device: _core.Device | str | None = None,
    ) -> None:
        self.shape = _resolve_shape(shape)
        self.dtype = resolve_array_dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        memory = _core.PinnedMemory(_open_device(device), self.nbytes)
        memory.device([0], self.dtype.name)  # refuses what DLPack cannot describe
        self._memory = memory

    def numpy(self) -> NDArray[np.generic]:
        """The array as the host sees it; no copy. Whoever writes to it waits first, see `write`.

        Raises:
            ClosedError: The array was closed.
        """
        bytes_view = self._memory.host()
        array: NDArray[np.generic] = bytes_view.view(self.dtype).reshape(self.shape)
        return array

    def device(self) -> _core.DeviceArray:
        """The array as the device sees it, for libraries that take DLPack; no copy.

        Raises:
            ClosedError: The array was closed.
        """
        return self._memory.device(list(self.shape), self.dtype.name)

    def fence(self, stream: Stream = None) -> None:
        """Declares that work which is in a stream now uses the memory until it has ended.

        Several fences, of any streams, hold together. On the CPU there is only its own stream.

        Args:
            stream: An object with `__cuda_stream__`, a handle, or None for the device's own stream.

        Raises:
            ClosedError: The array was closed.
            InvalidArgumentError: `stream` is no stream.
            DeviceError: The GPU refused it, or work before it failed.
        """
        self._memory.fence(stream)

    def is_free(self) -> bool:
        """Whether all fences have passed.

        Raises:
            ClosedError: The array was closed.
        """
        return self._memory.is_free()

    def wait(self) -> None:
        """Waits until all fences have passed: the device has read, and has written, what it should.

        Raises:
            ClosedError: The array was closed.
            DeviceError: The work failed.
        """
        self._memory.wait()

    @contextlib.contextmanager
    def write(self) -> Iterator[NDArray[np.generic]]:
        """Waits until the device uses the memory no more, and yields the array to be written.

        Raises:
            ClosedError: The array was closed.
            DeviceError: The work that was waited for failed.
        """
        self.wait()
        yield self.numpy()

    def close(self) -> None:
        """Lets go of the memory; the array cannot be used any more, views that exist still can."""
        self._memory.close()


def pinned(
    shape: int | Sequence[int],
    dtype: DTypeLike,
    device: _core.Device | str | None = None,
) -> PinnedArray:
    """Makes a zeroed array in host memory that a device addresses too.

    Args:
        shape: Its dimensions.
        dtype: A dtype of NumPy or ml_dtypes, or its name, "bfloat16" and "float8_e4m3fn" included.
        device: A device, whose stream is then the one that `fence` means by default; or "cpu",
            "cuda", "auto", or None to ask MRV1_DEVICE.

    Raises:
        InvalidArgumentError: A shape or dtype that there cannot be.
        OutOfMemoryError: There is not as much memory that can be pinned.
        DeviceError: No such device.
    """
    return PinnedArray(shape, dtype, device)


class PinnedRing(Closing):
    """Arrays that are handed out in turn, each only once the device is done with it.

    with ring.next(stream) as buffer:
        with buffer.write() as array:
            array[:] = values
        launch(kernel, buffer.device(), stream)

    The end of the block fences the array by `stream`, so an array is free when the device has
    passed that point, and never because others were handed out since. Any thread may call it.
    """

    def __init__(
        self,
        count: int,
        shape: int | Sequence[int],
        dtype: DTypeLike,
        device: _core.Device | str | None = None,
    ) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InvalidArgumentError(field="count", value=count, allowed="at least 1")
        shared = _open_device(device)
        # In the order in which they were given back.
        self._idle = [PinnedArray(shape, dtype, shared) for _ in range(count)]
        self._count = count
        self._closed = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @contextlib.contextmanager
    def next(self, stream: Stream = None) -> Iterator[PinnedArray]:
        """Yields an array that nobody uses, after a wait if need be, and fences it at the end.

        Args:
            stream: The stream of the work that is queued in the block.

        Raises:
            InvalidArgumentError: All arrays are in blocks that have not ended.
            ClosedError: The ring was closed.
        """
        array = self._take()
        try:
            array.wait()
            yield array
        finally:
            try:
                # An error may have come after work was queued.
                array.fence(stream)
            finally:
                self._give_back(array)

    def _take(self) -> PinnedArray:
        with self._lock:
            if self._closed:
                raise ClosedError("the ring of pinned arrays is closed")
            if not self._idle:
                raise InvalidArgumentError(
                    f"all {self._count} arrays of the ring are in use; end a block of next() first"
                )
            # The first that is free, else the one that was given back first.
            place = next((i for i, array in enumerate(self._idle) if array.is_free()), 0)
            return self._idle.pop(place)

    def _give_back(self, array: PinnedArray) -> None:
        with self._lock:
            if self._closed:
                array.close()
            else:
                self._idle.append(array)

    def close(self) -> None:
        """Closes the arrays; one that is in a block now when that block ends."""
        with self._lock:
            self._closed = True
            for array in self._idle:
                array.close()
            self._idle.clear()
