# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Where libraries of NVIDIA are found that the native code opens at run time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from mrv1 import envs

# Value of MRV1_CUBLASLT and MRV1_NCCL that runs without the library.
NO_LIBRARY: Final = "none"
NCCL: Final = "libnccl.so.2"


def library_names(library: str) -> list[str]:
    """Names to open a library by, in order: for the loader, then the paths in wheels.

    The wheels of the CUDA libraries keep them where the loader does not look.
    """
    names = [library]
    for entry in dict.fromkeys(sys.path):
        found = sorted(Path(entry or ".").glob(f"nvidia/*/lib/{library}"))
        names += [str(path.resolve()) for path in found]
    return names


def nccl_names() -> list[str]:
    """Names to open NCCL by, in order: MRV1_NCCL alone, or all; none to run without it."""
    chosen = envs.NCCL.get()
    if chosen is None:
        return library_names(NCCL)
    return [] if chosen == NO_LIBRARY else [chosen]
