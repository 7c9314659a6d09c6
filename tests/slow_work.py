# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Work on a device that takes long enough for a test to look at it while it runs."""

from __future__ import annotations

from types import TracebackType

import numpy as np

from mrv1 import _core


class SlowWork:
    """Queues work of some milliseconds: in a stream of torch if it is there, else by a thread.

    Without torch nothing of the package queues work and returns, so the work is then done before
    `start` returns: waits are still made, but have nothing to wait for.

    Attributes:
        stream: The stream of the work, for fences; None on the CPU.
    """

    def __init__(self, device: _core.Device) -> None:
        self.stream: object = None
        self._torch = None
        if device.kind == "cuda":
            try:
                import torch
            except ImportError:
                return
            self._torch = torch
            self.stream = torch.cuda.Stream().cuda_stream
            self._external = torch.cuda.ExternalStream(self.stream)
            self._event = torch.cuda.Event()
            self._data = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()

    def start(self) -> None:
        if self._torch is None:
            np.ones(1 << 20).sum()
            return
        with self._torch.cuda.stream(self._external):
            for value in range(100):
                self._data.fill_(value)
            self._event.record()

    def has_ended(self) -> bool:
        return self._torch is None or self._event.query()

    def __enter__(self) -> SlowWork:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._torch is not None:
            self._torch.cuda.synchronize()
