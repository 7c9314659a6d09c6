# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What two-batch overlap gains and hides, over the tokens of a step.

    python benchmarks/overlap.py --figure prefill --shape llama3-8b --tensor-parallel-size 2 \
        --tokens 256,1024,4096,16384 --json overlap.json

Each size is measured with whole steps and with halves, in turns, on runners of the same process:
`off_ms` and `on_ms` are medians. Kernels are then traced, which slows them down: `collective_ms` is
the time of collectives in whole steps on the first GPU, `hidden_share` the share of it that halves
hide (`off_ms - on_ms` over it), and `beside_share` the share of the halves' own collectives beside
which other kernels ran. `MRV1_TBO_MIN_PREFILL_TOKENS` and `MRV1_TBO_MIN_DECODE_TOKENS` are to be
set by where `gain` is safely above 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mrv1 import bench, bench_decode, bench_prefill, envs, shapes
from mrv1._cupti import KernelTrace, open_cupti
from mrv1.bench_overlap import Overlap, kernel_events, overlap_of
from mrv1.bench_trace import logged_steps, write_trace
from mrv1.config import ModelConfig
from mrv1.env_report import commit
from mrv1.errors import InternalError
from mrv1.loader import LoadedModel, RunnerOptions
from mrv1.random_model import random_runner

PROMPT = 1024  # tokens at most; a step has as many prompts as fill it
STEPS = 32  # of decoding


def open_model(arguments: argparse.Namespace, values: dict[str, object], mode: str) -> LoadedModel:
    """A runner of the shape whose steps are whole (mode 0) or halves (mode 1)."""
    options: RunnerOptions
    if arguments.figure == "prefill":
        batches = [-(-tokens // PROMPT) for tokens in arguments.tokens]
        options = bench_prefill.prefill_options(
            arguments.device, "bfloat16", batches, [min(PROMPT, max(arguments.tokens))]
        )
        options = dataclasses.replace(options, max_num_batched_tokens=max(arguments.tokens))
    else:
        options = bench_decode.decode_options(
            arguments.device, "bfloat16", arguments.tokens, [arguments.context], STEPS
        )
    options = dataclasses.replace(
        options,
        tensor_parallel_size=arguments.tensor_parallel_size,
        expert_parallel=arguments.expert_parallel,
        data_parallel_size=arguments.data_parallel_size,
    )
    os.environ["MRV1_USE_TBO"] = mode
    model = random_runner(ModelConfig.from_values(values), options)
    if arguments.figure == "decode":
        for runner in model.data_runners:
            runner.fill_kv_random(0)
    return model


def measure(
    arguments: argparse.Namespace, model: LoadedModel, tokens: int, repeats: int
) -> list[float]:
    """Milliseconds of steps of so many tokens."""
    if arguments.figure == "prefill":
        batch, context = -(-tokens // PROMPT), min(tokens, PROMPT)
        timing = bench_prefill.measure_prefill(model, batch, context, repeats)
        return [timing.step_ms]
    run = bench_decode.DecodeRun(model, tokens, arguments.context)
    try:
        return list(run.measure(STEPS)[0])
    finally:
        run.close()


def trace(
    arguments: argparse.Namespace, model: LoadedModel, tokens: int, path: Path | None = None
) -> Overlap:
    """Of one step on the first GPU, from the kernels of some; writes those of all to `path`."""
    before = model.runner.stats()["batches"]
    with KernelTrace() as kernels, logged_steps(model) as logs:
        measure(arguments, model, tokens, 1)
        for device in model.devices:
            device.synchronize()
    if kernels.dropped:
        raise InternalError(f"CUPTI had no room for {kernels.dropped} records")
    if path is not None:
        events = kernel_events(kernels.kernels, logs)
        write_trace(path, logs, model.pipeline_parallel_size, events)
    steps = model.runner.stats()["batches"] - before
    ordinal = model.device.ordinal
    found = overlap_of([kernel for kernel in kernels.kernels if kernel.device == ordinal])
    return Overlap(
        *(value / steps for value in (found.collective_ms, found.hidden_ms, found.compute_ms))
    )


def record_of(
    arguments: argparse.Namespace, off: LoadedModel, on: LoadedModel, tokens: int
) -> dict[str, Any]:
    """What is timed of one number of tokens."""
    times: dict[str, list[float]] = {"off": [], "on": []}
    for _ in range(arguments.repeats):
        for name, model in (("off", off), ("on", on)):
            times[name] += measure(arguments, model, tokens, 1)
    off_ms, on_ms = (statistics.median(times[name]) for name in ("off", "on"))
    return {
        "figure": arguments.figure,
        "shape": arguments.shape,
        "device": bench.describe_device(off.device),
        "tp": off.tensor_parallel_size,
        "dp": off.data_parallel_size,
        "ep": len(off.devices) if arguments.expert_parallel else 1,
        "processors": envs.TBO_PROCESSORS.get(),
        "tokens": tokens,
        "off_ms": round(off_ms, 4),
        "on_ms": round(on_ms, 4),
        "gain": round(off_ms / on_ms - 1, 4),
        "halves_mb": round(on.runner.memory_plan["two_batch"] / 1e6, 1),
        "commit": arguments.commit or commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }


def traced_of(
    arguments: argparse.Namespace, off: LoadedModel, on: LoadedModel, record: dict[str, Any]
) -> dict[str, float]:
    """What is traced of the number of tokens of a record."""
    whole = trace(arguments, off, record["tokens"])
    halves = trace(arguments, on, record["tokens"], arguments.trace)
    found = {"collective_ms": round(whole.collective_ms, 4)}
    if whole.collective_ms > 0:
        saved = record["off_ms"] - record["on_ms"]
        found["hidden_share"] = round(saved / whole.collective_ms, 4)
    found["beside_share"] = round(halves.hidden_share, 4)
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Measures, prints a line a size, and writes the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", choices=("prefill", "decode"), default="prefill")
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--layers", type=int, help="cut the shape to so many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--expert-parallel", action="store_true")
    parser.add_argument(
        "--tokens",
        default="256,1024,4096,8192",
        help="of a step, on each rank with requests of its own",
    )
    parser.add_argument("--context", type=int, default=1024, help="of decoding requests")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--trace", type=Path, help="write the last size's steps in halves, for Perfetto"
    )
    parser.add_argument("--commit", help="what the records name, outside of a checkout")
    arguments = parser.parse_args(given)
    arguments.tokens = [int(tokens) for tokens in arguments.tokens.split(",")]
    if arguments.device == "cuda":
        open_cupti()  # before minutes go into what cannot be traced
    arguments.shape, values = shapes.shape_config(arguments.shape, arguments.layers)
    off, on = (open_model(arguments, values, mode) for mode in ("0", "1"))
    records = [record_of(arguments, off, on, tokens) for tokens in arguments.tokens]
    if off.device.kind == "cuda":  # after all timings, which it may lengthen
        for record in records:
            record |= traced_of(arguments, off, on, record)
    for record in records:
        print(json.dumps(record))
    for model in (off, on):
        model.close()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
