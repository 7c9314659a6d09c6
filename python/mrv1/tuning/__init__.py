# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What the linear op of a GPU needs from outside: cuBLASLt and the tuning tables.

The tables beside this file are what was measured on the cards named; docs/tuning.md describes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from mrv1 import _core, _libraries, envs
from mrv1.errors import DeviceError

# What the native code was built for; a later major version has other structures.
LIBRARY = "libcublasLt.so.13"
NO_LIBRARY = _libraries.NO_LIBRARY


class LinearOptions(TypedDict):
    """Arguments of `_core.Device.configure_linear`."""

    libraries: list[str]
    table_dirs: list[str]
    use_library: bool
    tune: bool


def library_names() -> list[str]:
    """Names to open cuBLASLt by, in order: MRV1_CUBLASLT alone, or all; none to run without it."""
    chosen = envs.CUBLASLT.get()
    if chosen is not None:
        return [] if chosen == NO_LIBRARY else [chosen]
    return _libraries.library_names(LIBRARY)


def linear_options() -> LinearOptions:
    """The choices of this environment."""
    return LinearOptions(
        libraries=library_names(),
        table_dirs=[
            str(Path(envs.TUNE_DIR.get()).expanduser()),
            str(Path(__file__).resolve().parent),
        ],
        use_library=envs.CUBLASLT.get() != NO_LIBRARY,
        tune=envs.TUNE.get(),
    )


def make_device(
    kind: str, *, num_threads: int = 0, ordinal: int = 0, stream: object = None
) -> _core.Device:
    """Returns a device whose linears are ready: cuBLASLt is open and the tables are read.

    Args:
        kind: As `_core.Device`.
        num_threads: As `_core.Device`.
        ordinal: As `_core.Device`.
        stream: As `_core.Device`.

    Raises:
        InvalidArgumentError: A variable of the environment or a tuning table holds what is not
            allowed.
        DeviceError: No such device, or cuBLASLt was not found; the message has every name tried.
    """
    device = _core.Device(kind, num_threads=num_threads, ordinal=ordinal, stream=stream)
    if kind == "cuda":
        try:
            device.configure_linear(**linear_options())
        except BaseException:
            device.close()
            raise
    return device


def describe_library() -> str:
    """One line on cuBLASLt for the environment report."""
    if envs.CUBLASLT.get() == NO_LIBRARY:
        return "not used: MRV1_CUBLASLT=none"
    if not _core.cuda_built():
        return "not used: built without CUDA"
    try:
        return _core.cublaslt_describe(library_names())
    except DeviceError as error:
        return " ".join(str(error).split())
