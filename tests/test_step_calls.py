# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What a steady step asks of the driver, and the layer over CUPTI that tells.

On a GPU the driver's calls are counted by CUPTI, those of libraries among them. What the layer
makes of the library's answers is tested everywhere, with a stand-in for the library.
"""

from __future__ import annotations

import collections
import ctypes
import re
from collections.abc import Iterator
from typing import Any

import pytest

from mrv1 import _cupti, shapes
from mrv1._cupti import ApiCalls, Cupti, KernelFront, KernelTrace
from mrv1.bench_decode import DecodeRun, decode_options
from mrv1.config import ModelConfig
from mrv1.errors import DeviceError
from mrv1.random_model import random_runner

STEPS = 40
SMALL: dict[str, object] = {
    **shapes.shape_config("qwen3-0.6b", 2)[1],
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def steady(device: str) -> Iterator[DecodeRun]:
    """Rows that have decoded for a while, with more steps to come than a test runs."""
    model = random_runner(
        ModelConfig.from_values(SMALL), decode_options(device, "bfloat16", [3], [24], 4 * STEPS)
    )
    run = DecodeRun(model, 3, 24)
    run.measure(8)
    yield run
    run.close()
    model.runner.close()
    model.device.close()


def test_a_steady_step_waits_copies_and_allocates_nothing(steady: DecodeRun, device: str) -> None:
    before = steady.runner.stats()
    steady.measure(STEPS)
    after = steady.runner.stats()
    grown = {name: after[name] - before[name] for name in after}
    assert (grown["steps"], grown["batches"]) == (STEPS, STEPS)
    assert (grown["waits"], grown["copies"], grown["allocations"]) == (0, 0, 0)
    if device == "cuda":
        assert grown["steps_full"] == grown["graph_launches"] == STEPS
        assert grown["kernel_launches"] == 0


def test_the_driver_is_called_once_a_step(steady: DecodeRun, device: str) -> None:
    library = FakeLibrary() if device == "cpu" else None
    with ApiCalls(None if library is None else Cupti(library)) as calls:
        steady.measure(STEPS)
    kinds = _cupti.count_kinds(calls.counts)
    # Looking whether a step has failed, every few milliseconds, holds nothing up.
    del kinds["query"], kinds["other"]
    assert kinds == ({} if device == "cpu" else {"graph launch": STEPS}), calls.counts


def test_all_work_of_a_step_is_in_its_graph(steady: DecodeRun, device: str) -> None:
    library = FakeLibrary() if device == "cpu" else None
    with KernelTrace(None if library is None else Cupti(library)) as trace:
        steady.measure(STEPS)
        steady.runner.row_state(0)  # waits for the device, by a copy of its own
    assert trace.dropped == 0
    assert trace.copies == (0 if device == "cpu" else 1)
    by_launch = collections.Counter(kernel.launch for kernel in trace.kernels)
    assert all(kernel.graph != 0 for kernel in trace.kernels)
    assert len(by_launch) == (0 if device == "cpu" else STEPS)
    assert len(set(by_launch.values())) <= 1  # the same kernels every time


# --- the layer, over a library that is played ----------------------------------------------------


class FakeFunction:
    """A function of the library; ctypes' attributes can be set on it."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> int:
        return self._function(*arguments) or 0


class FakeLibrary:
    """Plays CUPTI: hands out records and calls that a test puts in."""

    def __init__(self, version: int = 130001) -> None:
        self.version = version
        self.enabled: list[int] = []
        self.records: list[ctypes.Structure] = []
        self.names = {514: b"cuGraphLaunch", 126: b"cuStreamSynchronize"}
        self.failing: str | None = None
        self.dropped = 0
        self.subscriber: Any = None
        self._next = 0

    def __getattr__(self, name: str) -> FakeFunction:
        if not name.startswith("cupti"):
            raise AttributeError(name)
        snake = re.sub(r"([A-Z])", r"_\1", name.removeprefix("cupti")).lower()
        method = getattr(type(self), f"on{snake}", None)
        function = FakeFunction(
            lambda *arguments: 999 if name == self.failing else method and method(self, *arguments)
        )
        setattr(self, name, function)
        return function

    def on_get_version(self, version: Any) -> None:
        version._obj.value = self.version

    def on_get_result_string(self, status: int, text: Any) -> None:
        text._obj.value = b"CUPTI_ERROR_UNKNOWN" if status == 999 else None

    def on_get_callback_name(self, domain: int, number: int, name: Any) -> None:
        assert domain == 1
        name._obj.value = self.names[number]

    def on_activity_enable(self, kind: int) -> None:
        self.enabled.append(kind)

    def on_activity_disable(self, kind: int) -> None:
        self.enabled.remove(kind)

    def on_activity_register_callbacks(self, request: Any, complete: Any) -> None:
        self.buffers = (request, complete)

    def on_activity_flush_all(self, forced: int) -> None:
        assert forced == 1
        request, complete = self.buffers
        buffer, size, most = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t(9)
        request(ctypes.byref(buffer), ctypes.byref(size), ctypes.byref(most))
        assert buffer.value is not None
        assert buffer.value % 8 == 0
        assert size.value >= 1 << 20
        assert most.value == 0
        complete(None, 0, buffer, size, 1)
        self._next = 0

    def on_activity_get_next_record(self, _: int, __: int, record: Any) -> int:
        if self._next == len(self.records):
            return 12
        record._obj.value = ctypes.addressof(self.records[self._next])
        self._next += 1
        return 0

    def on_activity_get_num_dropped_records(self, _: Any, __: int, dropped: Any) -> None:
        dropped._obj.value = self.dropped

    def on_subscribe(self, subscriber: Any, callback: Any, _: Any) -> None:
        subscriber._obj.value = 77
        self.subscriber = callback

    def on_enable_domain(self, enable: int, subscriber: Any, domain: int) -> None:
        assert (subscriber.value, domain) == (77, 1)
        self.enabled += [-1] if enable else []
        if not enable:
            self.enabled.remove(-1)

    def call(self, number: int) -> None:
        """As the driver would: on the way in and on the way out."""
        for site in (0, 1):
            data = (ctypes.c_uint32 * 18)(site)
            self.subscriber(None, 1, number, ctypes.addressof(data))


def record(kind: int, name: bytes = b"", start: int = 0, end: int = 0) -> KernelFront:
    return KernelFront(
        kind=kind,
        name=name,
        start=start,
        end=end,
        correlation_id=5,
        graph_id=2,
        graph_node_id=1 << 33,
        grid=(4, 5, 6),
        block=(128, 1, 1),
    )


def test_records_are_read_where_the_headers_put_them() -> None:
    # offsetof() of CUpti_ActivityKernel6 to 10, of CUDA 11.8 to 13.0.
    expected = {"start": 16, "end": 24, "stream_id": 48, "grid": 52, "block": 64}
    expected |= {"correlation_id": 92, "name": 104, "graph_node_id": 144, "graph_id": 156}
    assert {name: getattr(KernelFront, name).offset for name in expected} == expected
    assert ctypes.sizeof(KernelFront) == 160


def test_a_trace_takes_kernels_and_counts_copies() -> None:
    library = FakeLibrary()
    library.dropped = 3
    kernels = [record(10, b"second", 30, 40), record(10, b"_ZN4mrv15firstEv", 10, 35)]
    library.records = [kernels[0], record(1), record(2), record(17), kernels[1]]
    with KernelTrace(Cupti(library)) as trace:
        assert sorted(library.enabled) == [1, 2, 10]
        with pytest.raises(DeviceError, match="already"), KernelTrace(Cupti(library)):
            pass
    assert library.enabled == []
    assert [kernel.name for kernel in trace.kernels] == ["_ZN4mrv15firstEv", "second"]
    first = trace.kernels[0]
    assert (first.start, first.end, first.launch, first.graph) == (10, 35, 5, 2)
    assert (first.node, first.grid, first.block) == (1 << 33, (4, 5, 6), (128, 1, 1))
    assert (trace.copies, trace.dropped) == (2, 3)


def test_what_fails_inside_of_a_trace_is_raised_at_its_end() -> None:
    library = FakeLibrary()
    library.failing = "cuptiActivityGetNextRecord"
    message = r"cuptiActivityGetNextRecord failed: CUPTI_ERROR_UNKNOWN \(999\)"
    with pytest.raises(DeviceError, match=message), KernelTrace(Cupti(library)):
        pass
    assert library.enabled == []
    with KernelTrace(Cupti(FakeLibrary())) as trace:  # the next one is not in its way
        pass
    assert trace.kernels == []


def test_calls_are_counted_once_by_name() -> None:
    library = FakeLibrary()
    with ApiCalls(Cupti(library)) as calls:
        for number in (514, 514, 126):
            library.call(number)
        assert calls.take() == {"cuGraphLaunch": 2, "cuStreamSynchronize": 1}
        library.call(514)
    assert calls.counts == {"cuGraphLaunch": 1}
    assert library.enabled == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cuGraphLaunch", "graph launch"),
        ("cuLaunchKernelEx", "kernel launch"),
        ("cuStreamSynchronize", "wait"),
        ("cuCtxSynchronize_v2", "wait"),
        ("cuMemAlloc_v2", "allocation"),
        ("cuMemFreeAsync", "allocation"),
        ("cuMemHostAlloc", "allocation"),
        ("cuMemcpyHtoDAsync_v2", "copy"),
        ("cuMemsetD8Async", "copy"),
        ("cuStreamQuery", "query"),
        ("cuCtxGetDevice", "other"),
    ],
)
def test_calls_have_kinds(name: str, kind: str) -> None:
    assert _cupti.call_kind(name) == kind
    assert _cupti.count_kinds(collections.Counter({name: 3})) == {kind: 3}


def test_a_library_that_is_too_old_or_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="version 17 is too old"):
        Cupti(FakeLibrary(version=17))
    monkeypatch.setattr(_cupti, "_opened", None)
    monkeypatch.setenv("CUDA_HOME", "/no/such/toolkit")
    tried = _cupti.candidates()
    assert tried[:2] == ["libcupti.so.13", "libcupti.so.12"]
    assert "/no/such/toolkit/extras/CUPTI/lib64/libcupti.so.13" in tried
    monkeypatch.setattr(_cupti, "candidates", lambda: ["/no/such/a.so", "/no/such/b.so"])
    with pytest.raises(DeviceError, match=r"nvidia-cuda-cupti.*/no/such/a\.so, /no/such/b\.so"):
        _cupti.open_cupti()


def test_kernel_names_are_shortened() -> None:
    anonymous = "_ZN4mrv112_GLOBAL__N_115rms_norm_kernelIfLi8EEEvPKfPfi"
    assert _cupti.short_name(anonymous) == "rms_norm_kernel"
    assert _cupti.short_name("_ZN4mrv112apply_kernelEv") == "apply_kernel"
    assert _cupti.short_name("nvjet_sm90_tst_64x8") == "nvjet_sm90_tst_64x8"
    assert _cupti.short_name("_Zwhat") == "_Zwhat"
