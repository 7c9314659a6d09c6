# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Figures of the paged KV cache's kernels: `kv_write`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Final, Literal

from mrv1 import _core, bench
from mrv1.bench import Bandwidth, CacheFormat, Figure, Record, Timing
from mrv1.llm import peak_memory_mb

Layout = Literal["NHD", "HND"]
LAYOUTS: Final[tuple[Layout, ...]] = ("NHD", "HND")
# "write" is reshape_and_cache_flash; "rope_write" turns q and k heads in the same launch.
WRITES: Final = ("write", "rope_write")

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
        repeats: Runs; their median is the time.
        working_set: Bytes that a run touches, if 256 launches can; on a GPU its caches are emptied
            before each.
        bandwidth: Of the same run.

    Yields:
        A record for each number of tokens and each kind of write.
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
            for write in writes:
                seconds = statistics.median(probe.time(write, repeats))
                timing = Timing(count, 0, 1e3 * seconds, None, peak_memory_mb())
                moved = write_bytes(write, count, geometry, dtype, cache, False)
                record = kv_record(
                    "kv_write", described, dtype, geometry, cache, timing, moved, bandwidth
                )
                record["op"], record["tokens"] = write, count
                if write != "write":
                    apart = statistics.median(probe.time("separate", repeats))
                    record["separate_us"] = round(1e6 * apart, 4)
                    twice = write_bytes(write, count, geometry, dtype, cache, True)
                    record["x_separate_bytes"] = round(twice / moved, 4)
                yield record
        finally:
            probe.close()
