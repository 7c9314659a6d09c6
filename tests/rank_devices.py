# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Devices of the ranks of a group: GPUs where there are several, else streams of the CPU."""

from __future__ import annotations

import contextlib
from typing import TypeVar

import pytest

from mrv1 import _core
from mrv1.errors import DeviceError


class RankDevices:
    """A device a rank."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind, self.size = kind, size
        self.devices = [
            _core.Device(kind, num_threads=1, ordinal=rank if kind == "cuda" else 0)
            for rank in range(size)
        ]

    def close(self) -> None:
        for device in self.devices:
            device.close()


def gpu_count() -> int:
    """GPUs that there are, up to 8."""
    count = 0
    with contextlib.suppress(DeviceError):
        while count < 8:
            _core.Device("cuda", ordinal=count).close()
            count += 1
    return count


_Ranks = TypeVar("_Ranks", bound=RankDevices)


def open_ranks(made: type[_Ranks], device: str, size: int) -> _Ranks:
    """Devices of `size` ranks; skips where there are some GPUs, but not as many."""
    gpus = gpu_count() if device == "cuda" else 0
    kind = "cuda" if gpus >= 2 else "cpu"
    if kind == "cuda" and gpus < size:
        pytest.skip(f"there are {gpus} GPUs")
    return made(kind, size)
