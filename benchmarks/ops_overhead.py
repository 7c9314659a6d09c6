# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What a call of a single op costs the caller: small arrays, so that the work is next to nothing.

    python benchmarks/ops_overhead.py [--device cuda] [--calls 20000] [--json overhead.json]

A line per op and kind of arrays (NumPy on the CPU, mrv1's own on a GPU, torch if it is installed),
in microseconds a call: the least over rounds, as whatever else runs only adds. On a GPU calls are
queued, and waited for once a round.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mrv1 import _core, bench, memory, ops, tuning
from mrv1.env_report import commit

ROUNDS = 10
ROWS, COLS = 4, 64

Call = Callable[[], object]


def arrays() -> dict[str, np.ndarray]:
    """What the calls below take, by name."""
    rng = np.random.default_rng(0)
    table = np.arange(1, 5, dtype=np.int32).reshape(ROWS, 1)
    return {
        "x": rng.standard_normal((ROWS, COLS), np.float32),
        "out": np.zeros((ROWS, COLS), np.float32),
        "gain": np.ones(COLS, np.float32),
        "weight": rng.standard_normal((COLS, COLS), np.float32),
        "q": rng.standard_normal((ROWS, 2, 32), np.float32),
        "cache": rng.standard_normal((8, 16, 2, 32), np.float32),
        "value": rng.standard_normal((8, 16, 2, 32), np.float32),
        "table": table,
        "starts": np.arange(ROWS + 1, dtype=np.int32),
        "lens": np.full(ROWS, 8, np.int32),
        "slots": np.arange(16, 16 + ROWS, dtype=np.int32),
        "temperature": np.full(ROWS, 0.7, np.float32),
    }


def calls(a: dict[str, Any]) -> Iterator[tuple[str, Call]]:
    """The calls that are timed."""
    packed = ops.pack_linear(a["weight"])
    yield "add", lambda: ops.add(a["x"], a["x"])
    yield "rms_norm", lambda: ops.rms_norm(a["x"], a["gain"])
    yield "rms_norm, out=", lambda: ops.rms_norm(a["x"], a["gain"], out=a["out"])
    yield "linear", lambda: ops.linear(a["x"], packed)
    yield (
        "reshape_and_cache_flash",
        lambda: ops.reshape_and_cache_flash(a["q"], a["q"], a["cache"], a["value"], a["slots"]),
    )
    yield (
        "paged_attention",
        lambda: ops.paged_attention(
            a["q"], a["cache"], a["value"], a["table"], a["lens"], a["starts"]
        ),
    )
    yield "sample", lambda: ops.sample(a["x"], temperature=a["temperature"], top_k=8)


def kinds(device: str) -> Iterator[tuple[str, Callable[[np.ndarray], Any], Call]]:
    """Name of a kind of arrays, how to make one, how to wait for the device."""
    if device == "cpu":
        yield "numpy", np.copy, lambda: None
    else:
        native = tuning.make_device("cuda")

        def put(values: np.ndarray) -> Any:
            pinned = memory.pinned(values.shape, values.dtype, native)
            pinned.numpy()[...] = values
            return pinned.device()

        done = memory.pinned((1,), np.float32, native)
        probe = put(np.zeros((1, 1), np.float32))

        def wait() -> None:
            # The stream that calls run in is the writer of what they return.
            done.fence(ops.add(probe, probe).__cuda_array_interface__["stream"])
            done.wait()

        yield "mrv1", put, wait
    if importlib.util.find_spec("torch") is not None:
        import torch

        if device == "cpu":
            yield "torch", lambda values: torch.from_numpy(values.copy()), lambda: None
        elif torch.cuda.is_available():
            yield "torch", lambda v: torch.from_numpy(v).cuda(), torch.cuda.synchronize


def microseconds(call: Call, wait: Call, count: int) -> float:
    """Least time of a call over the rounds."""
    for _ in range(count // ROUNDS):
        call()
    wait()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(count // ROUNDS):
            call()
        best = min(best, (time.perf_counter() - start) / (count // ROUNDS))
        wait()
    return best * 1e6


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--calls", type=int, default=20000, help="of each op (default: 20000)")
    parser.add_argument("--json", help="write the record")
    parser.add_argument("--commit", help="what the record names, outside of a checkout")
    arguments = parser.parse_args()
    if arguments.json is not None:
        bench.check_writable(arguments.json)
    if arguments.device == "cuda" and not _core.cuda_available():
        parser.error(_core.cuda_describe())
    # More threads than one would be woken up for nothing.
    ops.set_num_threads(1)
    figures: dict[str, dict[str, float]] = {}
    for kind, put, wait in kinds(arguments.device):
        made = {name: put(values) for name, values in arrays().items()}
        for name, call in calls(made):
            took = microseconds(call, wait, max(arguments.calls, ROUNDS))
            figures.setdefault(kind, {})[name] = round(took, 2)
            print(f"{kind:6} {name:24} {took:6.2f} us")
    if arguments.json is None:
        return
    device = tuning.make_device(arguments.device)
    record = {
        "figure": "ops_overhead",
        "device": bench.describe_device(device),
        "versions": bench.versions(),
        "commit": arguments.commit or commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "calls": arguments.calls,
        "us_per_call": figures,
    }
    device.close()
    Path(arguments.json).write_text(json.dumps([record], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
