# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figures `all_reduce` and `stage_send`: what passes between ranks, by itself."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from mrv1 import _core, _libraries, bench
from mrv1.bench import Record, Timing
from mrv1.errors import DeviceError, InvalidArgumentError
from mrv1.llm import peak_memory_mb

# How sums travel, see `_core.CollectiveProbe`.
KERNELS: Final = ("auto", "one_shot", "two_shot", "nccl")
_MAX_RANKS: Final = 8
# Bytes of the values of a graph, and calls of it: enough that its start does not count.
_GRAPH_BYTES: Final = 64 << 20
_MOST_CALLS: Final = 100
_LEAST_CALLS: Final = 2
# A GPU that did nothing for a while comes back to its clocks in the course of milliseconds.
_WARM_SECONDS: Final = 0.2


def open_ranks(kind: str, count: int | None) -> list[_core.Device]:
    """Devices of the ranks of a group.

    Args:
        kind: "cpu" or "cuda".
        count: Of ranks; None is all GPUs, up to 8, or two ranks of the CPU.

    Raises:
        DeviceError: There are not as many GPUs.
        InvalidArgumentError: `count` is not 2 to 8.
    """
    if count is not None and not 2 <= count <= _MAX_RANKS:
        raise InvalidArgumentError(field="--ranks", value=count, allowed=f"2 to {_MAX_RANKS}")
    if kind == "cpu":
        return [_core.Device("cpu", num_threads=1) for _ in range(count or 2)]
    devices: list[_core.Device] = []
    with contextlib.suppress(DeviceError):
        while len(devices) < (count or _MAX_RANKS):
            devices.append(_core.Device("cuda", ordinal=len(devices)))
    if len(devices) < (count or 2):
        for device in devices:
            device.close()
        raise DeviceError(f"[bench] {count or 2} ranks need as many GPUs: {_core.cuda_describe()}")
    return devices


def measure_all_reduce(
    devices: Sequence[_core.Device],
    dtype: str,
    message_bytes: Sequence[int],
    kernels: Sequence[str],
    repeats: int,
) -> Iterator[Record]:
    """Times sums over all ranks, several in one graph, each of values of its own.

    Args:
        devices: One a rank.
        dtype: "float32" or "bfloat16".
        message_bytes: What a rank gives to a sum.
        kernels: Of `KERNELS`; other than "auto" on GPUs only.
        repeats: Runs; their median is the time.

    Yields:
        A record for each size and kind of kernels.
    """
    size = bench.element_size(dtype)
    # Small integers, whose sums are exact in either dtype.
    most = 256 // len(devices)
    on_gpus = devices[0].kind == "cuda"
    for count in message_bytes:
        calls = min(_MOST_CALLS, max(_LEAST_CALLS, _GRAPH_BYTES // count))
        if not on_gpus:
            calls = _LEAST_CALLS
        cols = max(count // size, 1)
        shape = (len(devices), calls, 1, cols)
        values = np.random.default_rng(0).integers(-most, most, shape, np.int16)
        parts = values.astype(np.float32)
        sums = parts.sum(axis=0)
        for name in kernels:
            probe = _core.CollectiveProbe(
                list(devices),
                "all_reduce",
                rows=1,
                cols=cols,
                calls=calls,
                dtype=dtype,
                kernels=name,
                nccl=_libraries.nccl_names() if name == "nccl" else [],
            )
            try:
                for rank, part in enumerate(parts):
                    probe.set_values(rank, part)
                end = time.monotonic() + (_WARM_SECONDS if on_gpus else 0.0)
                probe.run()
                while time.monotonic() < end:
                    probe.run()
                seconds = statistics.median(probe.time(repeats, 10 if on_gpus else 1))
                right = all(
                    np.array_equal(probe.result(rank), sums) for rank in range(len(devices))
                )
            finally:
                probe.close()
            timing = Timing(1, 0, 1e3 * seconds, None, peak_memory_mb())
            device = bench.describe_device(devices[0])
            record = bench.make_record("all_reduce", f"{len(devices)} ranks", device, dtype, timing)
            record["tp"], record["message_bytes"] = len(devices), cols * size
            record["backend"] = name
            record["us"] = round(1e6 * seconds, 4)
            record["gb_s"] = round(cols * size / seconds / 1e9, 2)
            if not right:
                record["counts"], record["fault"] = False, f"a sum by {name} was wrong"
            yield record


def measure_stage_send(
    devices: Sequence[_core.Device],
    dtype: str,
    message_bytes: Sequence[int],
    repeats: int,
) -> Iterator[Record]:
    """Times messages from stage to stage, several in one graph, and copies of as many bytes.

    Args:
        devices: One a stage.
        dtype: "float32" or "bfloat16".
        message_bytes: Of a message.
        repeats: Runs; their median is the time.

    Yields:
        Two records for each size, of the backends `stage_send` and `copy`.
    """
    size = bench.element_size(dtype)
    on_gpus = devices[0].kind == "cuda"
    for count in message_bytes:
        calls = min(_MOST_CALLS, max(_LEAST_CALLS, _GRAPH_BYTES // count))
        if not on_gpus:
            calls = _LEAST_CALLS
        cols = max(count // size, 1)
        # Small integers, which either dtype holds.
        drawn = np.random.default_rng(0).integers(-256, 256, (calls, 1, cols), np.int16)
        values = drawn.astype(np.float32)
        for backend in ("stage_send", "copy"):
            probe = _core.StageSendProbe(
                list(devices),
                rows=1,
                cols=cols,
                calls=calls,
                dtype=dtype,
                copies=backend == "copy",
            )
            try:
                probe.set_values(values)
                end = time.monotonic() + (_WARM_SECONDS if on_gpus else 0.0)
                probe.run()
                while time.monotonic() < end:
                    probe.run()
                seconds = statistics.median(probe.time(repeats, 10 if on_gpus else 1))
                # Copies of several stages wait for nobody, so that only the first one's is known.
                last = len(devices) if backend == "stage_send" else 2
                right = all(
                    np.array_equal(probe.received(rank), values[-1]) for rank in range(1, last)
                )
            finally:
                probe.close()
            timing = Timing(1, 0, 1e3 * seconds, None, peak_memory_mb())
            device = bench.describe_device(devices[0])
            shape = f"{len(devices)} stages"
            record = bench.make_record("stage_send", shape, device, dtype, timing)
            record["pp"], record["message_bytes"] = len(devices), cols * size
            record["backend"] = backend
            record["us"] = round(1e6 * seconds, 4)
            record["gb_s"] = round(cols * size / seconds / 1e9, 2)
            if not right:
                record["counts"], record["fault"] = False, "a message was wrong"
            yield record
