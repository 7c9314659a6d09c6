# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Figures of the paged KV cache's kernels: `kv_write` and `decode_attention`."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import numpy as np

from mrv1 import _core, bench
from mrv1.bench import Bandwidth, CacheFormat, Figure, Record, Timing
from mrv1.llm import peak_memory_mb

Layout = Literal["NHD", "HND"]
LAYOUTS: Final[tuple[Layout, ...]] = ("NHD", "HND")
# "write" is reshape_and_cache_flash; "rope_write" turns q and k heads in the same launch.
WRITES: Final = ("write", "rope_write")
# Of the largest value, that results of two backends may differ by.
_TOLERANCE: Final = 0.05
# As in a step, where a kernel may start before the one before it ends, or as single ops are called.
LAUNCHES: Final = ("overlapped", "plain")

# Formats of a cache by the names that `--caches` takes.
FORMATS: Final = {
    "auto": CacheFormat(),
    **{
        f"{dtype}/{scales}": CacheFormat(dtype, scales)
        for dtype in ("fp8_e4m3", "fp8_e5m2")
        for scales in ("static", "dynamic")
    },
}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Heads and layout of one layer's cache.

    Attributes:
        kv_heads: Key heads.
        group: Query heads of each.
        head_dim: Elements of a head.
        layout: What lies between blocks and elements: tokens of heads, or heads of tokens.
        block_size: Tokens of a block.
    """

    kv_heads: int
    group: int = 4
    head_dim: int = 128
    layout: Layout = "HND"
    block_size: int = 16

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group


def kv_record(
    figure: Figure,
    device: str,
    dtype: str,
    geometry: Geometry,
    cache: CacheFormat,
    timing: Timing,
    moved_bytes: int,
    bandwidth: Bandwidth,
) -> Record:
    """A record of a kernel that is bound by memory.

    Args:
        figure: Which.
        device: What it ran on.
        dtype: Of the activations.
        geometry: Of the cache.
        cache: What it holds.
        timing: Of a launch.
        moved_bytes: What a launch must read and write.
        bandwidth: Of the same run.
    """
    shape = f"{geometry.heads}+{geometry.kv_heads}x{geometry.head_dim}"
    record = bench.make_record(figure, shape, device, dtype, timing, cache=cache)
    bench.set_bandwidth(record, bandwidth)
    record["heads"] = geometry.heads
    record["kv_heads"] = geometry.kv_heads
    record["head_dim"] = geometry.head_dim
    record["layout"] = geometry.layout
    record["cache_dtype"] = cache.kv_cache_dtype
    record["scale"] = cache.kv_scales
    record["us"] = round(1e3 * timing.step_ms, 4)
    record["gb_s"] = round(moved_bytes / timing.step_ms / 1e6, 2)
    return record


def write_bytes(
    write: str, tokens: int, geometry: Geometry, dtype: str, cache: CacheFormat, separate: bool
) -> int:
    """Bytes that a write reads and stores, slots included.

    Args:
        write: One of `WRITES`.
        tokens: Of a launch.
        geometry: Of the cache.
        dtype: Of the activations.
        cache: What it holds.
        separate: Whether rotary embedding and write are two launches.
    """
    head = geometry.head_dim * bench.element_size(dtype)
    kv_bytes = 2 * geometry.kv_heads * (head + cache.head_bytes(geometry.head_dim, dtype)) + 4
    if write == "write":
        return tokens * kv_bytes
    # Query and key heads are read, turned and stored; keys and values are read again if separate.
    turned = 2 * (geometry.heads + geometry.kv_heads) * head + 4
    again = 0 if separate else geometry.kv_heads * head
    return tokens * (turned + kv_bytes - again)


def measure_writes(
    device: _core.Device,
    dtype: str,
    geometry: Geometry,
    cache: CacheFormat,
    tokens: Sequence[int],
    writes: Sequence[str],
    launches: Sequence[str],
    repeats: int,
    working_set: int,
    bandwidth: Bandwidth,
) -> Iterator[Record]:
    """Times cache writes, each launch from and to memory of its own.

    Args:
        device: Where.
        dtype: Of the activations, "float32" or "bfloat16".
        geometry: Of the cache.
        cache: What it holds.
        tokens: Of a launch.
        writes: Of `WRITES`.
        launches: Of `LAUNCHES`.
        repeats: Runs; their median is the time.
        working_set: Bytes that a run touches, if 256 launches can; on a GPU its caches are emptied
            before each.
        bandwidth: Of the same run.

    Yields:
        A record for each number of tokens, kind of write and kind of launch.
    """
    described = bench.describe_device(device)
    for count in tokens:
        probe = _core.CacheWriteProbe(
            device,
            count,
            geometry.heads,
            geometry.kv_heads,
            geometry.head_dim,
            dtype,
            cache.kv_cache_dtype,
            cache.kv_scales,
            geometry.layout,
            geometry.block_size,
            working_set,
        )
        try:
            for write, launch in itertools.product(writes, launches):
                overlap = launch == "overlapped"
                seconds = statistics.median(probe.time(write, repeats, overlap))
                timing = Timing(count, 0, 1e3 * seconds, None, peak_memory_mb())
                moved = write_bytes(write, count, geometry, dtype, cache, False)
                record = kv_record(
                    "kv_write", described, dtype, geometry, cache, timing, moved, bandwidth
                )
                record["op"], record["tokens"], record["launches"] = write, count, launch
                if write != "write":
                    apart = statistics.median(probe.time("separate", repeats, overlap))
                    record["separate_us"] = round(1e6 * apart, 4)
                    twice = write_bytes(write, count, geometry, dtype, cache, True)
                    record["x_separate_bytes"] = round(twice / moved, 4)
                yield record
        finally:
            probe.close()


def measure_attention(
    device: _core.Device,
    geometry: Geometry,
    cache: CacheFormat,
    lengths: Sequence[int],
    repeats: int,
    working_set: int,
    bandwidth: Bandwidth,
) -> Record:
    """Times decode attention of one layer by itself, in bfloat16.

    Where FlashInfer has a kernel it is timed on the same inputs; for scales of tokens on the same
    codes with one scale for all.

    Args:
        device: Where.
        geometry: Of the cache.
        cache: What it holds.
        lengths: Cached tokens of each request.
        repeats: Runs; their median is the time.
        working_set: Bytes that a run reads, at least, unless that takes more than 256 caches.
        bandwidth: Of the same run.
    """
    native, other = _core.AttentionBackend.NATIVE, _core.AttentionBackend.FLASHINFER
    probe = _attention_probe(device, geometry, cache, lengths, working_set)
    try:
        seconds = statistics.median(probe.time_runs(native, repeats))
        moved = probe.read_bytes
    finally:
        probe.close()
    context = round(sum(lengths) / len(lengths))
    timing = Timing(len(lengths), context, 1e3 * seconds, None, peak_memory_mb())
    record = kv_record(
        "decode_attention",
        bench.describe_device(device),
        "bfloat16",
        geometry,
        cache,
        timing,
        moved,
        bandwidth,
    )
    record["read_share"] = round(record["gb_s"] / bandwidth.read_gb_s, 4)
    static = cache if cache.kv_scales == "none" else dataclasses.replace(cache, kv_scales="static")
    probe = _attention_probe(device, geometry, static, lengths, working_set)
    try:
        if not probe.supports(other):
            return record
        probe.time_runs(native, 1)
        expected = probe.output()
        record["flashinfer_us"] = round(1e6 * statistics.median(probe.time_runs(other, repeats)), 4)
        off = float(np.abs(probe.output() - expected).max())
    finally:
        probe.close()
    if not off <= _TOLERANCE * float(np.abs(expected).max()):
        record["counts"] = False
        record["fault"] = f"attention by FlashInfer is off by {off:.3g} from the native one"
    return record


def _attention_probe(
    device: _core.Device,
    geometry: Geometry,
    cache: CacheFormat,
    lengths: Sequence[int],
    working_set: int,
) -> _core.AttentionProbe:
    head = cache.head_bytes(geometry.head_dim, "bfloat16")
    read_bytes = 2 * sum(lengths) * geometry.kv_heads * head
    return _core.AttentionProbe(
        device,
        list(lengths),
        num_heads=geometry.heads,
        num_kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        kv_cache_dtype=cache.kv_cache_dtype,
        scales={"none": "none", "static": "tensor", "dynamic": "token"}[cache.kv_scales],
        tokens_first=geometry.layout == "NHD",
        block_size=geometry.block_size,
        copies=max(1, min(256, -(-working_set // read_bytes))),
    )
