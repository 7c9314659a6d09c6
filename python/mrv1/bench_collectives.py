# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figures `all_reduce`, `stage_send` and `expert_exchange`: what passes between ranks."""

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
from mrv1.parallel import Shard

# How sums travel, see `_core.CollectiveProbe`.
KERNELS: Final = ("auto", "one_shot", "two_shot", "nccl")
_MAX_RANKS: Final = 8
# Bytes of the values of a graph, and calls of it: enough that its start does not count.
_GRAPH_BYTES: Final = 64 << 20
_MOST_CALLS: Final = 100
_LEAST_CALLS: Final = 2
# A GPU that did nothing for a while comes back to its clocks in the course of milliseconds.
_WARM_SECONDS: Final = 0.2
# The same of tokens on their way to experts, which a step has just written.
_EXCHANGE_BYTES: Final = 8 << 20
# Of Qwen3 30B-A3B.
_HIDDEN: Final = 2048
_EXPERTS: Final = 128
_TOP_K: Final = 8


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


def measure_expert_exchange(
    devices: Sequence[_core.Device],
    dtype: str,
    tokens: Sequence[int],
    blocks: Sequence[int],
    repeats: int,
) -> Iterator[Record]:
    """Times the way of tokens to the ranks of their experts, and back, several in one graph.

    Sizes are those of Qwen3 30B-A3B, and every token's experts are drawn at random.

    Args:
        devices: One a rank.
        dtype: "float32" or "bfloat16".
        tokens: Of a rank.
        blocks: Thread blocks of a GPU that each kernel takes.
        repeats: Runs; their median is the time.

    Yields:
        Three records for each: of `moe_dispatch`, of `moe_combine`, and of one after the other.
    """
    on_gpus = devices[0].kind == "cuda"
    size = len(devices)
    row_bytes = _HIDDEN * bench.element_size(dtype)
    draw = np.random.default_rng(0)
    for count in tokens:
        calls = min(_MOST_CALLS, max(1, _EXCHANGE_BYTES // (count * row_bytes)))
        if not on_gpus:
            calls = _LEAST_CALLS
        keys = draw.random((size, calls, count, _EXPERTS), np.float32)
        experts = np.argpartition(keys, _TOP_K, axis=-1)[..., :_TOP_K].astype(np.int32)
        values = draw.integers(-8, 8, (size, calls, count, _HIDDEN), np.int8).astype(np.float32)
        weights = np.full(experts.shape, 1 / _TOP_K, np.float32)
        owners = _owners(experts, size)
        goes = np.stack([(owners == rank).any(-1) for rank in range(size)], axis=-1)
        # Of the rank that sends most: a row to each other rank that has an expert of it.
        others = np.array([np.delete(goes[rank], rank, axis=-1).sum() for rank in range(size)])
        sent = int(others.max()) / calls
        for number in blocks:
            for part in ("dispatch", "combine", "both"):
                probe = _core.ExpertProbe(
                    list(devices),
                    tokens=[count] * size,
                    hidden=_HIDDEN,
                    top_k=_TOP_K,
                    num_experts=_EXPERTS,
                    region_rows=count,
                    calls=calls,
                    dtype=dtype,
                    part=part,
                    blocks=number,
                )
                try:
                    for rank in range(size):
                        probe.set_tokens(rank, values[rank], experts[rank], weights[rank])
                    end = time.monotonic() + (_WARM_SECONDS if on_gpus else 0.0)
                    probe.run()
                    while time.monotonic() < end:
                        probe.run()
                    seconds = statistics.median(probe.time(repeats, 10 if on_gpus else 1))
                    # Small integers: what every rank that had a token has sent back adds up.
                    right = part != "both" or all(
                        np.array_equal(
                            probe.result(rank), values[rank] * goes[rank].sum(-1)[..., None]
                        )
                        for rank in range(size)
                    )
                finally:
                    probe.close()
                timing = Timing(count, 0, 1e3 * seconds, None, peak_memory_mb())
                device = bench.describe_device(devices[0])
                shape = f"{size} ranks"
                record = bench.make_record("expert_exchange", shape, device, dtype, timing)
                record["ep"], record["backend"] = size, part
                record["blocks"] = number
                # Ids and weights go with a token, its sum comes alone.
                there = row_bytes + 8 * _TOP_K if part != "combine" else 0
                back = row_bytes if part != "dispatch" else 0
                record["message_bytes"] = round(sent * (there + back))
                record["us"] = round(1e6 * seconds, 4)
                record["gb_s"] = round(record["message_bytes"] / seconds / 1e9, 2)
                if not right:
                    record["counts"], record["fault"] = False, "a token came back wrong"
                yield record


def _owners(experts: np.ndarray, size: int) -> np.ndarray:
    """The ranks that have these experts."""
    shares = [Shard(rank, size, expert_parallel=True).own_experts(_EXPERTS) for rank in range(size)]
    owners: np.ndarray = np.repeat(np.arange(size), [len(share) for share in shares])
    return np.take(owners, experts)
