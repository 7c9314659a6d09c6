# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Benchmarks of pipelines: traces, shares of waiting, and what each rank must do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrv1 import _core, bench
from mrv1.bench_trace import stage_waits, wait_share, write_trace
from mrv1.errors import InvalidArgumentError


def step_time(step: int, begin: int, end: int, waited: int, rows: int) -> _core.StepTime:
    time = _core.StepTime()
    time.step, time.begin_ns, time.end_ns, time.waited_ns = step, begin, end, waited
    time.requests, time.tokens, time.mode = rows, 2 * rows, _core.StepMode.FULL
    return time


def test_shares_of_waiting_and_a_trace_by_hand(tmp_path: Path) -> None:
    first = [step_time(4, 1000, 2000, 900, 3), step_time(5, 2500, 4000, 600, 2)]
    second = [
        step_time(4, 1500, 2500, 50, 3),
        step_time(5, 2600, 4500, 300, 2),
        step_time(6, 5000, 6500, 700, 1),
    ]
    # What was waited for before the first step's end does not count.
    assert wait_share(first) == 600 / 2000
    assert wait_share(second) == 1000 / 4000
    assert wait_share(first[:1]) == wait_share([]) == 0
    assert stage_waits([first, second], 2) == [0.3, 0.25]
    assert stage_waits([first, second], 1) == [0.275]
    path = tmp_path / "trace.json"
    write_trace(path, [first, second], 2)
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["rank 0, stage 0", "rank 1, stage 1"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [(e["tid"], e["name"], e["ts"], e["dur"]) for e in slices] == [
        (0, "step 4", 0, 1),
        (0, "step 5", 1.5, 1.5),
        (1, "step 4", 0.5, 1),
        (1, "step 5", 1.6, 1.9),
        (1, "step 6", 4, 1.5),
    ]
    assert slices[1]["args"] == {"requests": 2, "tokens": 4, "mode": "full", "waited_us": 0.6}
    with pytest.raises(InvalidArgumentError, match="trace"):
        write_trace(tmp_path / "none" / "trace.json", [], 1)


def test_costs_of_ranks_and_stages_by_hand() -> None:
    weight, attention = bench.OpCost("logits", 1200, 2400), bench.OpCost("attention", 600, 120)
    shared = bench.shared_costs([weight, attention], ranks=2, micro_batches=3)
    # Three micro-batches read a third of the weights each, and share the rest.
    assert shared == [bench.OpCost("logits", 600, 400), bench.OpCost("attention", 100, 20)]
    (once, _) = bench.shared_costs([weight, attention], 2, 3, once=True)
    assert once == bench.OpCost("logits", 200, 400)
    assert bench.shared_costs([weight, attention], 1, 1) == [weight, attention]
