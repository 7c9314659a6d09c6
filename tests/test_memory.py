# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Pinned arrays: views outlive their owners, and reuse waits for the fences."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from mrv1 import _core, memory
from mrv1.errors import ClosedError, InvalidArgumentError, OutOfMemoryError
from slow_work import SlowWork


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "int8",
        "bool",
        np.float64,
        np.dtype("uint16"),
        ml_dtypes.bfloat16,
    ],
)
@pytest.mark.parametrize("shape", [(3, 5), 7, (), (0, 4), (2, 1, 3)])
def test_shape_and_dtype(native_device: _core.Device, dtype: object, shape: object) -> None:
    array = memory.pinned(shape, dtype, native_device)  # type: ignore[arg-type]
    expected = np.zeros(shape, dtype=memory.resolve_array_dtype(dtype))  # type: ignore[arg-type, call-overload]
    view = array.numpy()
    assert view.shape == expected.shape == array.shape
    assert view.dtype == expected.dtype == array.dtype
    assert view.nbytes == array.nbytes
    assert (view == expected).all()
    assert view.flags.writeable
    on_device = array.device()
    assert on_device.shape == array.shape
    assert on_device.dtype == array.dtype.name
    assert on_device.nbytes == array.nbytes
    assert on_device.ptr != 0


@pytest.mark.parametrize(
    "field, shape, dtype",
    [
        ("shape", -1, "float32"),
        ("shape", (2, True), "float32"),
        ("shape", (2, 1.5), "float32"),
        ("shape", (2**30, 2**30), "float32"),
        ("dtype", 3, "float33"),
        ("dtype", 3, "float8_none"),
        ("dtype", 3, object),
        ("dtype", 3, ">f4"),
        ("dtype", 3, "datetime64[s]"),
        ("dtype", 3, "int4"),
        ("dtype", 3, [("a", "f4")]),
    ],
)
def test_refused(native_device: _core.Device, field: str, shape: object, dtype: object) -> None:
    with pytest.raises(InvalidArgumentError, match=field):
        memory.pinned(shape, dtype, native_device)  # type: ignore[arg-type]


def test_too_large_is_an_out_of_memory_error(native_device: _core.Device) -> None:
    with pytest.raises(OutOfMemoryError, match="pinned array"):
        memory.pinned(2**47, "float64", native_device)


def test_device_by_name(device: str) -> None:
    with memory.pinned(3, "int32", device) as array:
        assert array.device().__dlpack_device__()[0] == (1 if device == "cpu" else 2)


def test_views_outlive_their_owner(device: str) -> None:
    array = memory.pinned((64, 1024), "int32", device)
    view = array.numpy()
    part = view[3, 5:10]
    view[:] = 7
    array.close()
    del array, view
    gc.collect()
    assert (part == 7).all()
    part[:] = 8
    assert (part == 8).all()


def test_use_after_close(native_device: _core.Device) -> None:
    array = memory.pinned(4, "float32", native_device)
    view, on_device = array.numpy(), array.device()
    array.close()
    array.close()
    for use in (array.numpy, array.device, array.fence, array.wait, array.is_free):
        with pytest.raises(ClosedError, match="is closed"):
            use()
    with pytest.raises(ClosedError), array.write():
        pass
    view[:] = 1.0
    assert on_device.nbytes == 16


def test_memory_is_freed_with_the_last_view() -> None:
    # 100 times 64 MB would show.
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            """
import pathlib
from mrv1 import _core, memory
device = _core.Device("cpu", num_threads=1)
for round in range(100):
    array = memory.pinned(64 << 20, "uint8", device)
    view = array.numpy()
    view[:] = 1
    if round % 2: array.close()
    del array
    part = view[5:]
    del view
    assert part[0] == 1
# Of this process alone: getrusage also counts what it was forked from.
status = pathlib.Path("/proc/self/status").read_text()
assert int(status.split("VmHWM:")[1].split()[0]) < 600 << 10, status
""",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr


def test_write_waits_for_the_fence(native_device: _core.Device) -> None:
    array = memory.pinned(1 << 10, "int32", native_device)
    assert array.is_free()
    with SlowWork(native_device) as work:
        for _ in range(3):
            work.start()
            array.fence(work.stream)
            with array.write() as view:
                assert work.has_ended()
                view += 1
            assert array.is_free()
    assert (array.numpy() == 3).all()


def test_fences_add_up(native_device: _core.Device) -> None:
    array = memory.pinned(4, "int32", native_device)
    with SlowWork(native_device) as work:
        work.start()
        array.fence(work.stream)
        # That of an idle stream does not take the place of the other's.
        with SlowWork(native_device) as idle:
            if idle.stream != work.stream:
                array.fence(idle.stream)
        array.wait()
        assert work.has_ended()


def test_closing_and_forgetting_wait_for_the_device(native_device: _core.Device) -> None:
    array = memory.pinned(4, "int32", native_device)
    with SlowWork(native_device) as work:
        work.start()
        array.fence(work.stream)
        array.close()
        del array
        assert work.has_ended()


def test_streams_that_are_none(native_device: _core.Device, device: str) -> None:
    array = memory.pinned(4, "int32", native_device)
    for wrong in ("stream", 1.5, object(), -1):
        with pytest.raises(InvalidArgumentError, match="stream"):
            array.fence(wrong)  # type: ignore[arg-type]

    class Odd:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (1, 0)

    with pytest.raises(InvalidArgumentError, match="version"):
        array.fence(Odd())
    if device == "cpu":
        with pytest.raises(InvalidArgumentError, match="stream"):
            array.fence(5)
    else:
        array.fence(native_device)
        array.fence(native_device.stream)
        array.fence(0)
        array.wait()


def test_ring_hands_out_each_array_once(native_device: _core.Device) -> None:
    with memory.PinnedRing(3, 8, "int32", native_device) as ring:
        assert len(ring) == 3
        with ring.next() as first, ring.next() as second, ring.next() as third:
            assert len({id(first), id(second), id(third)}) == 3
            with pytest.raises(InvalidArgumentError, match="all 3"), ring.next():
                pass
        seen = set()
        for _ in range(12):
            with ring.next() as array:
                seen.add(id(array))
                with array.write() as view:
                    view += 1
        assert len(seen) > 1
    with pytest.raises(ClosedError), ring.next():
        pass
    with pytest.raises(ClosedError):
        first.numpy()


def test_ring_prefers_what_is_free(native_device: _core.Device) -> None:
    ring = memory.PinnedRing(2, 8, "int32", native_device)
    with SlowWork(native_device) as work:
        with ring.next(work.stream) as busy:
            work.start()
        was_free = busy.is_free()  # at once on the CPU, where this work does not go on
        with ring.next(work.stream) as other:
            assert other is not busy or was_free
        # Both are in use now, so that the next one waits.
        with ring.next(work.stream):
            assert work.has_ended()


def test_ring_keeps_an_array_of_a_block_that_failed(native_device: _core.Device) -> None:
    ring = memory.PinnedRing(1, 8, "int32", native_device)
    with pytest.raises(RuntimeError, match="mine"), ring.next():
        raise RuntimeError("mine")
    with ring.next() as array:
        ring.close()
        array.numpy()[:] = 1
    with pytest.raises(ClosedError):
        array.numpy()


@pytest.mark.parametrize("count", [0, -1, True, 1.0])
def test_ring_counts(native_device: _core.Device, count: object) -> None:
    with pytest.raises(InvalidArgumentError, match="count"):
        memory.PinnedRing(count, 8, "int32", native_device)  # type: ignore[arg-type]


def test_ring_in_threads(native_device: _core.Device) -> None:
    ring = memory.PinnedRing(4, 64, "int64", native_device)
    errors: list[str] = []

    def use(number: int) -> None:
        for _ in range(50):
            with ring.next() as array, array.write() as view:
                view[:] = number
                time.sleep(0.0002)
                if not (view == number).all():
                    errors.append("shared")

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_the_memory_alone() -> None:
    child = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            """
import os
from mrv1 import _core, memory
from mrv1.errors import ForkError
array = memory.pinned(4, "int32", "cpu")
view, on_device = array.numpy(), array.device()
if os.fork() == 0:
    for use in (array.numpy, array.wait, on_device.__dlpack_device__):
        try:
            use()
        except ForkError:
            continue
        os._exit(1)
    del array, view, on_device
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
view[:] = 1
array.wait()
""",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
