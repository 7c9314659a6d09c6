# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""GPUs and streams by way of cuda.core, of NVIDIA's CUDA Python.

    stream = mrv1.cuda.create_stream()
    runner = mrv1.ModelRunner("dir", device="cuda", stream=stream)  # all steps run in that stream

Nothing else of mrv1 needs cuda.core: `pip install "mrv1[cuda]"`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mrv1.errors import DeviceError, InvalidArgumentError, Mrv1Error

if TYPE_CHECKING:
    from cuda.core import Stream

__all__ = ["GpuInfo", "create_stream", "current_stream", "devices"]


@dataclasses.dataclass(frozen=True)
class GpuInfo:
    """A GPU of this machine.

    Attributes:
        ordinal: Its number among those that this process sees.
        name: As the driver gives it.
        compute_capability: (major, minor).
        total_bytes: Its memory.
        free_bytes: What a new allocation could take now.
    """

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


def _cuda_core() -> Any:
    try:
        import cuda.core
    except ImportError as error:
        raise DeviceError(
            'mrv1.cuda needs the package cuda-core: pip install "mrv1[cuda]", or '
            f'pip install "cuda-core[cu13]" ({error})'
        ) from None
    return cuda.core


@contextlib.contextmanager
def _current(ordinal: int) -> Iterator[Any]:
    """Makes a GPU current for a block, and the one before it afterwards."""
    core = _cuda_core()
    with _translated():
        count = len(core.Device.get_all_devices())
    if isinstance(ordinal, bool) or not isinstance(ordinal, int) or not 0 <= ordinal < count:
        raise InvalidArgumentError(
            field="ordinal", value=ordinal, allowed=f"the number of one of {count} GPUs"
        )
    with _translated():
        before = core.Device()
        device = core.Device(ordinal)
        device.set_current()
        try:
            yield device
        finally:
            if before.device_id != ordinal:
                before.set_current()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """What cuda.core raises where there is no driver, or the driver refuses, as DeviceError."""
    try:
        yield
    except Mrv1Error:
        raise
    except Exception as error:
        raise DeviceError(f"cuda.core: {type(error).__name__}: {error}") from error


def devices() -> list[GpuInfo]:
    """Returns the GPUs that this process sees, in the order of their numbers.

    Raises:
        DeviceError: cuda.core is not installed, or there is no driver.
    """
    core = _cuda_core()
    with _translated():
        ordinals = [device.device_id for device in core.Device.get_all_devices()]
    return [_describe(ordinal) for ordinal in ordinals]


def _describe(ordinal: int) -> GpuInfo:
    from cuda.bindings import runtime

    with _current(ordinal) as device:
        status, free, total = runtime.cudaMemGetInfo()
        if status != runtime.cudaError_t.cudaSuccess:
            raise DeviceError(f"cudaMemGetInfo of GPU {ordinal} failed: {status.name}")
        capability = device.compute_capability
        return GpuInfo(
            ordinal=ordinal,
            name=device.name,
            compute_capability=(capability.major, capability.minor),
            total_bytes=total,
            free_bytes=free,
        )


def create_stream(ordinal: int = 0) -> Stream:
    """Makes a stream of a GPU; it ends with the object.

    Raises:
        DeviceError: cuda.core is not installed, or there is no driver.
        InvalidArgumentError: There is no such GPU.
    """
    with _current(ordinal) as device:
        return device.create_stream()


def current_stream(ordinal: int = 0) -> Stream:
    """Returns the default stream of a GPU, in which CUDA work runs unless somebody says otherwise.

    Raises:
        DeviceError: cuda.core is not installed, or there is no driver.
        InvalidArgumentError: There is no such GPU.
    """
    with _current(ordinal) as device:
        return device.default_stream
