# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Decode attention by itself, by cache format, layout and lengths, beside plain reads.

    python benchmarks/decode_attention.py --device cuda --json decode_attention.json

A call is the attention of one layer: one token for each request, over keys and values that lie in
mixed blocks of 16. A run is one graph of calls over as many caches as hold --working-set bytes, and
`us` the median of --repeats runs, divided by the calls. The plan of the batch, which a step makes
once for all its layers, is not in it. `gb_s` counts what a call must read: keys, values and scales.

`flashinfer_us` is the time of FlashInfer's decode kernel on the same inputs in the same process;
for an FP8 cache with a scale a token, on the same codes with one scale for all.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mrv1 import _core, bench, tuning
from mrv1.env_report import commit

BLOCK_SIZE: Final = 16
# (batch, context): those of at least 0.5 GB in bfloat16 first.
EVEN: Final = ((256, 1024), (64, 8192), (64, 1024))
ONE_LONG: Final = [65536] + [512] * 255
FORMATS: Final = (("auto", "none"), ("fp8_e4m3", "tensor"), ("fp8_e4m3", "token"))
SCALE_NAMES: Final = {"none": "none", "tensor": "static", "head": "static", "token": "dynamic"}
# Of the largest value, that the results of two backends may differ by.
TOLERANCE: Final = 0.05


def workloads(device: str) -> list[tuple[str, list[int]]]:
    """Name and cached tokens of each request."""
    if device == "cpu":
        return [("even", [256] * 4)]
    batch = len(ONE_LONG)
    return [
        *(("even", [context] * batch) for batch, context in EVEN),
        ("one-long", ONE_LONG),
        ("even", [sum(ONE_LONG) // batch] * batch),
    ]


def probe_of(
    device: _core.Device, lengths: Sequence[int], working_set: int, **options: Any
) -> _core.AttentionProbe:
    """Caches of one kind, as many as fill `working_set` bytes."""
    shape = {name: options[name] for name in ("num_kv_heads", "head_dim")}
    element = 1 if options["kv_cache_dtype"].startswith("fp8") else 2
    each = 2 * sum(lengths) * shape["num_kv_heads"] * shape["head_dim"] * element
    copies = max(1, min(256, -(-working_set // each)))
    return _core.AttentionProbe(
        device, list(lengths), block_size=BLOCK_SIZE, copies=copies, **options
    )


def median_us(probe: _core.AttentionProbe, backend: _core.AttentionBackend, repeats: int) -> float:
    return 1e6 * statistics.median(probe.time_runs(backend, repeats))


def flashinfer_us(
    device: _core.Device,
    probe: _core.AttentionProbe,
    lengths: Sequence[int],
    arguments: argparse.Namespace,
    options: dict[str, Any],
) -> float | None:
    """Its time, or None where it has no kernel."""
    of_tokens = options["scales"] == "token"
    other = probe
    if of_tokens:
        one_scale = options | {"scales": "tensor"}
        other = probe_of(device, lengths, arguments.working_set << 20, **one_scale)
    try:
        if not other.supports(_core.AttentionBackend.FLASHINFER):
            return None
        other.time_runs(_core.AttentionBackend.NATIVE, 1)
        own = other.output()
        time = median_us(other, _core.AttentionBackend.FLASHINFER, arguments.repeats)
        off = float(np.abs(other.output() - own).max())
        assert off <= TOLERANCE * float(np.abs(own).max()), f"FlashInfer is off by {off:.3g}"
        return time
    finally:
        if of_tokens:
            other.close()


def bandwidths(device: _core.Device, read_bytes: int) -> tuple[float, float]:
    """Plain read and copy, best of 10, in 10^9 bytes a second."""
    probe = _core.ReadProbe(device, min(read_bytes, device.memory()[0] // 2))
    try:
        read = min(probe.run() for _ in range(10))
        copy = min(probe.copy() for _ in range(10))
        return probe.bytes / read / 1e9, probe.bytes // 16 * 16 / copy / 1e9
    finally:
        probe.close()


def measure(device: _core.Device, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    read_gb_s, copy_gb_s = bandwidths(device, arguments.read_mb << 20)
    counts = bench.read_counts(device.name, read_gb_s, arguments.read_mb << 20)
    records = []
    for name, lengths in workloads(device.kind):
        for kv_heads in arguments.kv_heads:
            for kv_cache_dtype, scales in FORMATS:
                for layout in arguments.layout:
                    options = {
                        "num_heads": arguments.heads,
                        "num_kv_heads": kv_heads,
                        "head_dim": arguments.head_dim,
                        "kv_cache_dtype": kv_cache_dtype,
                        "scales": scales,
                        "tokens_first": layout == "NHD",
                    }
                    probe = probe_of(device, lengths, arguments.working_set << 20, **options)
                    try:
                        us = median_us(probe, _core.AttentionBackend.NATIVE, arguments.repeats)
                        other_us = flashinfer_us(device, probe, lengths, arguments, options)
                        gb_s = probe.read_bytes / us / 1e3
                    finally:
                        probe.close()
                    record: dict[str, Any] = {
                        "figure": "decode_attention",
                        "device": bench.describe_device(device),
                        "batch": len(lengths),
                        "context": round(sum(lengths) / len(lengths)),
                        "lengths": name,
                        "heads": arguments.heads,
                        "kv_heads": kv_heads,
                        "head_dim": arguments.head_dim,
                        "layout": layout,
                        "cache_dtype": kv_cache_dtype,
                        "scale": SCALE_NAMES[scales],
                        "us": round(us, 2),
                        "gb_s": round(gb_s, 1),
                        "read_gb_s": round(read_gb_s, 1),
                        "copy_gb_s": round(copy_gb_s, 1),
                        "read_share": round(gb_s / read_gb_s, 3),
                    }
                    if other_us is not None:
                        record["flashinfer_us"] = round(other_us, 2)
                        record["times_flashinfer"] = round(us / other_us, 3)
                    if counts is not None:
                        record["counts"] = counts
                    records.append(record)
                    show(record)
    return records


def show(record: dict[str, Any]) -> None:
    beside = ""
    if "flashinfer_us" in record:
        beside = f"  FlashInfer {record['flashinfer_us']} us, x {record['times_flashinfer']}"
    print(
        f"{record['batch']} x {record['context']} {record['lengths']}, "
        f"{record['heads']}/{record['kv_heads']} heads of {record['head_dim']}, "
        f"{record['layout']}, {record['cache_dtype']} {record['scale']}: {record['us']} us, "
        f"{record['gb_s']} GB/s, {100 * record['read_share']:.1f} % of read{beside}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode attention by itself.")
    parser.add_argument(
        "--device", default=None, help="cpu or cuda (default: a GPU if there is one)"
    )
    parser.add_argument("--heads", type=int, default=32, help="query heads (default: 32)")
    parser.add_argument(
        "--kv-heads", type=int, nargs="+", default=[32, 8, 4], help="(default: 32 8 4)"
    )
    parser.add_argument("--head-dim", type=int, default=128, help="(default: 128)")
    parser.add_argument(
        "--layout", choices=("HND", "NHD"), nargs="+", default=["HND", "NHD"],
        help="(default: both)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=20, help="runs (default: 20)")
    parser.add_argument(
        "--working-set", type=int, default=None, metavar="MB",
        help="of a run, at least (default: 2048; on the CPU 64)",
    )  # fmt: skip
    parser.add_argument(
        "--read-mb", type=int, default=None, help="of the plain read (default: 8192; CPU: 1024)"
    )
    parser.add_argument("--json", help="write the records")
    parser.add_argument("--commit", help="what the records name, outside of a checkout")
    arguments = parser.parse_args()
    if arguments.json is not None:
        bench.check_writable(arguments.json)
    kind = arguments.device or ("cuda" if _core.cuda_available() else "cpu")
    device = tuning.make_device(kind)
    on_cpu = device.kind == "cpu"
    arguments.working_set = arguments.working_set or (64 if on_cpu else 2048)
    arguments.read_mb = arguments.read_mb or bench.READ_BYTES[device.kind] >> 20
    try:
        records = measure(device, arguments)
    finally:
        device.close()
    common = {
        "versions": bench.versions(),
        "commit": arguments.commit or commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }
    if arguments.json is not None:
        text = json.dumps([record | common for record in records], indent=1)
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
