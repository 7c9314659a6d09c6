# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What CUPTI, the CUDA toolkit's profiling library, says of a region: its kernels and its calls.

    with KernelTrace() as trace:
        ...
    for kernel in trace.kernels: ...

    with ApiCalls() as calls:
        ...
    calls.counts["cuGraphLaunch"]

Structures are read by the offsets of cupti_activity.h and cupti_callbacks.h.
"""

from __future__ import annotations

import abc
import collections
import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, NamedTuple

from mrv1.errors import DeviceError

# CUDA 11.8. From there on kernel records share the front that is read here; the offsets were
# compared with the structures CUpti_ActivityKernel6 to 10.
_MIN_VERSION: Final = 18
_MAJORS: Final = (13, 12)
_KIND_CONCURRENT_KERNEL: Final = 10
_COPY_KINDS: Final = (1, 2)  # memory copies and fills
_KINDS: Final = (_KIND_CONCURRENT_KERNEL, *_COPY_KINDS)
_NO_MORE_RECORDS: Final = 12  # CUPTI_ERROR_MAX_LIMIT_REACHED
_FLUSH_FORCED: Final = 1
_DOMAIN_DRIVER: Final = 1
_SITE_ENTER: Final = 0
_BUFFER_BYTES: Final = 4 << 20
_BUFFER_ALIGNMENT: Final = 8


class KernelFront(ctypes.Structure):
    """The front of CUpti_ActivityKernel, up to the last field that is needed."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("cache_config", ctypes.c_uint8),
        ("shared_memory_config", ctypes.c_uint8),
        ("registers_per_thread", ctypes.c_uint16),
        ("partitioned_cache_requested", ctypes.c_uint32),
        ("partitioned_cache_executed", ctypes.c_uint32),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("completed", ctypes.c_uint64),
        ("device_id", ctypes.c_uint32),
        ("context_id", ctypes.c_uint32),
        ("stream_id", ctypes.c_uint32),
        ("grid", ctypes.c_int32 * 3),
        ("block", ctypes.c_int32 * 3),
        ("static_shared_memory", ctypes.c_int32),
        ("dynamic_shared_memory", ctypes.c_int32),
        ("local_memory_per_thread", ctypes.c_uint32),
        ("local_memory_total", ctypes.c_uint32),
        ("correlation_id", ctypes.c_uint32),
        ("grid_id", ctypes.c_int64),
        ("name", ctypes.c_char_p),
        ("reserved", ctypes.c_void_p),
        ("queued", ctypes.c_uint64),
        ("submitted", ctypes.c_uint64),
        ("launch_type", ctypes.c_uint8 * 4),
        ("shared_memory_executed", ctypes.c_uint32),
        ("graph_node_id", ctypes.c_uint64),
        ("shared_memory_limit_config", ctypes.c_uint32),
        ("graph_id", ctypes.c_uint32),
    )


class Kernel(NamedTuple):
    """One kernel that ran. Times are of the GPU, in nanoseconds."""

    name: str
    start: int
    end: int
    launch: int  # the same for all kernels of one launch of a graph
    graph: int  # 0 if it was not launched by a graph
    node: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    device: int  # ordinal


_RequestBuffer = ctypes.CFUNCTYPE(
    None,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.POINTER(ctypes.c_size_t),
)
_CompleteBuffer = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)
_ApiCallback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p
)

_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cuptiGetVersion": (ctypes.POINTER(ctypes.c_uint32),),
    "cuptiGetResultString": (ctypes.c_uint32, ctypes.POINTER(ctypes.c_char_p)),
    "cuptiActivityRegisterCallbacks": (_RequestBuffer, _CompleteBuffer),
    "cuptiActivityEnable": (ctypes.c_uint32,),
    "cuptiActivityDisable": (ctypes.c_uint32,),
    "cuptiActivityFlushAll": (ctypes.c_uint32,),
    "cuptiActivityGetNextRecord": (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_void_p),
    ),
    "cuptiActivityGetNumDroppedRecords": (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.POINTER(ctypes.c_size_t),
    ),
    "cuptiSubscribe": (ctypes.POINTER(ctypes.c_void_p), _ApiCallback, ctypes.c_void_p),
    "cuptiUnsubscribe": (ctypes.c_void_p,),
    "cuptiEnableDomain": (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32),
    "cuptiGetCallbackName": (ctypes.c_uint32, ctypes.c_uint32, ctypes.POINTER(ctypes.c_char_p)),
}


def candidates() -> list[str]:
    """Where libcupti is looked for, in this order."""
    names = [f"libcupti.so.{major}" for major in _MAJORS]
    found = list(names)
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        for name in names:
            # Wheels of CUDA 13 share one directory; older ones have one a library.
            found += sorted(str(path) for path in Path(root).glob(f"*/lib/{name}"))
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for home in (*homes, "/usr/local/cuda"):
        if home:
            for directory in ("extras/CUPTI/lib64", "lib64", "lib"):
                found += [str(Path(home) / directory / name) for name in names]
    return list(dict.fromkeys(found))


def _kernel(front: KernelFront) -> Kernel:
    return Kernel(
        name=(front.name or b"?").decode(errors="replace"),
        start=front.start,
        end=front.end,
        launch=front.correlation_id,
        graph=front.graph_id,
        node=front.graph_node_id,
        grid=tuple(front.grid),
        block=tuple(front.block),
        device=front.device_id,
    )


class Cupti:
    """The library, with its results checked.

    Args:
        library: As ctypes opened it, or what stands in for it.

    Raises:
        DeviceError: It is too old.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = ctypes.c_uint32
        version = ctypes.c_uint32()
        self.call("cuptiGetVersion", ctypes.byref(version))
        self.version = version.value
        if self.version < _MIN_VERSION:
            raise DeviceError(
                f"[cupti] API version {self.version} is too old, {_MIN_VERSION} (CUDA 11.8) is the "
                "first that is known"
            )

    def call(self, name: str, *arguments: Any, allowed: int = 0) -> int:
        """Calls a function of the library; returns its status, which is 0 or `allowed`.

        Raises:
            DeviceError: It returned another status.
        """
        status = int(getattr(self._library, name)(*arguments))
        if status not in (0, allowed):
            text = ctypes.c_char_p()
            self._library.cuptiGetResultString(status, ctypes.byref(text))
            reason = "unknown error" if text.value is None else text.value.decode()
            raise DeviceError(f"[cupti] {name} failed: {reason} ({status})")
        return status

    def read(self, buffer: int, size: int) -> tuple[list[Kernel], int]:
        """The records of a buffer that CUPTI filled: kernels, and how many copies."""
        kernels: list[Kernel] = []
        copies = 0
        record = ctypes.c_void_p()
        while not self.call(
            "cuptiActivityGetNextRecord",
            buffer,
            size,
            ctypes.byref(record),
            allowed=_NO_MORE_RECORDS,
        ):
            address = record.value or 0
            kind = ctypes.c_uint32.from_address(address).value
            if kind == _KIND_CONCURRENT_KERNEL:
                kernels.append(_kernel(KernelFront.from_address(address)))
            elif kind in _COPY_KINDS:
                copies += 1
        return kernels, copies

    def callback_name(self, domain: int, number: int) -> str:
        """Name of the function that a callback is about."""
        name = ctypes.c_char_p()
        self.call("cuptiGetCallbackName", domain, number, ctypes.byref(name))
        return "?" if name.value is None else name.value.decode()


_opened: Cupti | None = None


def open_cupti() -> Cupti:
    """Opens the library, once for the process.

    Raises:
        DeviceError: It is not there; says where it was looked for.
    """
    global _opened
    if _opened is None:
        tried = candidates()
        for path in tried:
            try:
                library = ctypes.CDLL(path)
            except OSError:
                continue
            _opened = Cupti(library)
            break
        else:
            raise DeviceError(
                "[cupti] CUPTI was not found; it is part of the CUDA toolkit and of the package "
                f"nvidia-cuda-cupti. Tried: {', '.join(tried)}"
            )
    return _opened


class _Region(abc.ABC):
    """What is measured from `with` to its end; one at a time in a process."""

    def __init__(self, cupti: Cupti | None = None) -> None:
        self._cupti = open_cupti() if cupti is None else cupti

    @abc.abstractmethod
    def _begin(self) -> None:
        """Starts measuring."""

    @abc.abstractmethod
    def _end(self) -> None:
        """Ends it, whether or not the region failed."""

    def __enter__(self) -> Any:
        self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()


class KernelTrace(_Region):
    """Records every kernel of the process, those inside of graphs one by one.

    Work must have ended before the region ends. Tracing adds nearly a microsecond to each kernel.

    Attributes:
        kernels: In the order of their starts; after the region.
        copies: How often memory was copied or filled, inside of graphs too; after the region.
        dropped: Records that CUPTI had no room for.
    """

    _active: ClassVar[KernelTrace | None] = None
    # CUPTI keeps the functions, and each buffer until it is complete.
    _callbacks: ClassVar[tuple[Any, Any] | None] = None
    _buffers: ClassVar[dict[int, Any]] = {}

    def __init__(self, cupti: Cupti | None = None) -> None:
        super().__init__(cupti)
        self.kernels: list[Kernel] = []
        self.copies = 0
        self.dropped = 0
        self._error: Exception | None = None

    def _begin(self) -> None:
        if KernelTrace._active is not None:
            raise DeviceError("[cupti] another region is traced already")
        if KernelTrace._callbacks is None:
            KernelTrace._callbacks = (
                _RequestBuffer(KernelTrace._request),
                _CompleteBuffer(KernelTrace._complete),
            )
        self._cupti.call("cuptiActivityRegisterCallbacks", *KernelTrace._callbacks)
        KernelTrace._active = self
        try:
            for kind in _KINDS:
                self._cupti.call("cuptiActivityEnable", kind)
        except DeviceError:
            KernelTrace._active = None
            raise

    def _end(self) -> None:
        try:
            self._cupti.call("cuptiActivityFlushAll", _FLUSH_FORCED)
            for kind in _KINDS:
                self._cupti.call("cuptiActivityDisable", kind)
        finally:
            KernelTrace._active = None
        if self._error is not None:
            raise self._error
        self.kernels.sort(key=lambda kernel: (kernel.start, kernel.end))

    @staticmethod
    def _request(buffer: Any, size: Any, max_records: Any) -> None:
        trace = KernelTrace._active
        if trace is None:  # no room: CUPTI drops the records
            buffer[0], size[0], max_records[0] = None, 0, 0
            return
        memory = ctypes.create_string_buffer(_BUFFER_BYTES + _BUFFER_ALIGNMENT)
        address = ctypes.addressof(memory)
        address += -address % _BUFFER_ALIGNMENT
        KernelTrace._buffers[address] = memory
        buffer[0], size[0], max_records[0] = address, _BUFFER_BYTES, 0

    @staticmethod
    def _complete(context: int | None, stream: int, buffer: int, _: int, valid: int) -> None:
        trace = KernelTrace._active
        if trace is not None:
            trace._take(context, stream, buffer, valid)
        KernelTrace._buffers.pop(buffer, None)

    def _take(self, context: int | None, stream: int, buffer: int, valid: int) -> None:
        # An exception must not cross CUPTI's frames: it is raised when the region ends.
        try:
            if valid:
                kernels, copies = self._cupti.read(buffer, valid)
                self.kernels += kernels
                self.copies += copies
            dropped = ctypes.c_size_t()
            self._cupti.call(
                "cuptiActivityGetNumDroppedRecords", context, stream, ctypes.byref(dropped)
            )
            self.dropped += dropped.value
        except Exception as error:
            self._error = error


class ApiCalls(_Region):
    """Counts calls of the driver's API by name, those of libraries and of the runtime included.

    Attributes:
        counts: Calls since the region began or `take` was called, by name: "cuGraphLaunch".
    """

    def __init__(self, cupti: Cupti | None = None) -> None:
        super().__init__(cupti)
        self.counts: collections.Counter[str] = collections.Counter()
        self._names: dict[int, str] = {}
        self._subscriber = ctypes.c_void_p()
        self._callback: Callable[..., None] = _ApiCallback(self._on_call)

    def _begin(self) -> None:
        self._cupti.call("cuptiSubscribe", ctypes.byref(self._subscriber), self._callback, None)
        self._cupti.call("cuptiEnableDomain", 1, self._subscriber, _DOMAIN_DRIVER)

    def _end(self) -> None:
        self._cupti.call("cuptiEnableDomain", 0, self._subscriber, _DOMAIN_DRIVER)
        self._cupti.call("cuptiUnsubscribe", self._subscriber)

    def take(self) -> collections.Counter[str]:
        """Returns the counts so far and begins anew."""
        counts, self.counts = self.counts, collections.Counter()
        return counts

    def _on_call(self, _: int | None, domain: int, number: int, data: int) -> None:
        # CUpti_CallbackData begins with the site.
        if ctypes.c_uint32.from_address(data).value != _SITE_ENTER:
            return
        name = self._names.get(number)
        if name is None:
            name = self._names[number] = self._cupti.callback_name(domain, number)
        self.counts[name] += 1


# Kinds of calls that a steady step is judged by. The first that fits counts.
_CALL_KINDS: Final = (
    ("graph launch", ("cuGraphLaunch",)),
    ("kernel launch", ("cuLaunch",)),
    ("allocation", ("cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemHostRegister")),
    (
        "allocation",
        ("cuMemHostUnregister", "cuMemCreate", "cuMemRelease", "cuMemMap", "cuMemUnmap"),
    ),
    ("allocation", ("cuMemAddress", "cuArray", "cuMipmappedArray", "cuMemPoolTrim")),
    ("copy", ("cuMemcpy", "cuMemset", "cuMemPrefetch", "cuMemBatch", "cuMemDecompress")),
    ("query", ("cuStreamQuery", "cuEventQuery")),
)


def call_kind(name: str) -> str:
    """Sorts a call of the driver's API.

    Returns:
        "graph launch", "kernel launch", "allocation", "copy", "query", "wait" or "other".
    """
    for kind, prefixes in _CALL_KINDS:
        if name.startswith(prefixes):
            return kind
    return "wait" if "Synchronize" in name else "other"


def count_kinds(counts: collections.Counter[str]) -> collections.Counter[str]:
    """Calls by their kinds."""
    kinds: collections.Counter[str] = collections.Counter()
    for name, count in counts.items():
        kinds[call_kind(name)] += count
    return kinds


def demangle(name: str) -> str:
    """A C++ function's name without its parameters, or the name itself if it is none."""
    if not name.startswith("_Z"):
        return name
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        libc = ctypes.CDLL(None)
        function = library.__cxa_demangle
    except (OSError, AttributeError):
        return name
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    libc.free.argtypes = [ctypes.c_void_p]
    status = ctypes.c_int()
    text = function(name.encode(), None, None, ctypes.byref(status))
    if not text or status.value != 0:
        return name
    try:
        return (ctypes.string_at(text) or b"").decode(errors="replace")
    finally:
        libc.free(text)


def short_name(name: str) -> str:
    """A kernel's name for tables: demangled, without namespaces, templates and parameters."""
    text = demangle(name).replace("(anonymous namespace)::", "")
    if text == name:
        return name
    # A template's instance is printed with its return type in front.
    text = text.removeprefix("void ")
    depth, kept = 0, []
    for char in text:
        if char == "(" and depth == 0:
            break
        depth += (char == "<") - (char == ">")
        if depth == 0 and char != ">":
            kept.append(char)
    return "".join(kept).rsplit("::", 1)[-1]
