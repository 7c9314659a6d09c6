# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What counts as a CUDA stream where a caller names one."""

from __future__ import annotations

from typing import Protocol


class SupportsCudaStream(Protocol):
    """A stream of another library, such as cuda.core, or an mrv1 device."""

    def __cuda_stream__(self) -> tuple[int, int]:
        """Returns the version of the protocol, 0, and the handle."""
        ...


# A stream, its handle, or None for one that mrv1 makes.
Stream = SupportsCudaStream | int | None
