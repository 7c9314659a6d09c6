# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What the native side of `mrv1.ops` asks of Python: devices, streams and other libraries' arrays.

No other library is imported here: an array's own is loaded already, and is found by its name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from mrv1 import _core, tuning
from mrv1.errors import InvalidArgumentError

# Distributions whose arrays are defined in a module of another name.
_PACKAGES = {"jaxlib": "jax.numpy"}
_IMMUTABLE = ("jax", "jaxlib")


def _root(array: object) -> str:
    return type(array).__module__.partition(".")[0]


class Host:
    """Answers to the native side.

    Args:
        num_threads: Of the CPU's kernels; 0 takes the cores this process may use.
    """

    ndarray = np.ndarray
    uint8 = np.uint8
    uint16 = np.uint16
    empty = staticmethod(np.empty)

    def __init__(self, num_threads: int = 0) -> None:
        self._num_threads = num_threads

    def open_device(self, kind: str, ordinal: int) -> _core.Device:
        """The device that arrays of it are worked on by; asked for once."""
        return tuning.make_device(kind, num_threads=self._num_threads, ordinal=ordinal)

    @staticmethod
    def dtype(name: str) -> np.dtype:
        """A dtype of outputs for inputs of NumPy."""
        if name in ("float32", "float16", "int32"):
            return np.dtype(name)
        import ml_dtypes

        found: np.dtype = np.dtype(getattr(ml_dtypes, name))
        return found

    @staticmethod
    def importer(array: Any) -> Callable[[object], object] | None:
        """`from_dlpack` of the library that an array is of, asked for once a type."""
        if hasattr(array, "__array_namespace__"):
            found = getattr(array.__array_namespace__(), "from_dlpack", None)
        else:
            module = sys.modules.get(_PACKAGES.get(_root(array), _root(array)))
            found = getattr(module, "from_dlpack", None)
        if found is None:
            return None
        importer: Callable[[object], object] = found
        return importer

    def is_mutable(self, array: object) -> bool:
        """Whether an op may write to arrays of a type; asked for once."""
        return _root(array) not in _IMMUTABLE

    def current_stream(self, array: object, ordinal: int) -> object:
        """The stream that the array's library works in on a GPU; None if it has no such notion."""
        root = _root(array)
        module: Any = sys.modules.get(root)
        if root == "torch":
            return module.cuda.current_stream(ordinal).cuda_stream
        if root == "cupy":
            with module.cuda.Device(ordinal):
                return module.cuda.get_current_stream()
        return None


def check_threads(value: object) -> int:
    """A number of threads, for `set_num_threads`.

    Raises:
        InvalidArgumentError: It is no integer of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1024:
        raise InvalidArgumentError(
            field="num_threads", value=value, allowed="an integer in [0, 1024]"
        )
    return value
