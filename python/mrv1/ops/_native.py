# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The native side of `mrv1.ops`, which all calls of a process share."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

from mrv1 import _core, envs
from mrv1.ops._host import Host, check_threads

# An array with __dlpack__, or one of NumPy; what a call returns is of its first array's kind.
Array: TypeAlias = Any
PackedWeight = _core.PackedWeight

_native: _core.Ops | None = None
_num_threads = 0


def native() -> _core.Ops:
    """The calls of the native side, which begins with the first of them."""
    global _native
    if _native is None:
        _native = _core.Ops(
            Host(_num_threads),
            sync_launches=envs.SYNC.get(),
            check_slots=envs.CHECK_SLOTS.get(),
        )
    return _native


def forget() -> None:
    """Lets go of the native side: the next call begins anew, with the environment as it is then."""
    global _native
    _native = None


# Threads and GPUs are the parent's: a child opens its own.
os.register_at_fork(after_in_child=forget)


def set_num_threads(num_threads: int) -> None:
    """Sets how many threads later calls use on the CPU; 0 takes the cores this process may use.

    Raises:
        InvalidArgumentError: It is not in [0, 1024].
    """
    global _num_threads
    _num_threads = check_threads(num_threads)
    forget()
