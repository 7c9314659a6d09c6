# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What of collectives runs beside other kernels, for kernels that are written by hand."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from mrv1 import _core, bench_decode, cli, shapes
from mrv1._cupti import Kernel
from mrv1.bench_overlap import common, kernel_events, merged, overlap_of, within, without
from mrv1.random_model import save_random_model
from test_expert_parallel import CONFIG

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def kernel(name: str, start: float, end: float, device: int = 0) -> Kernel:
    return Kernel(name, int(start * 1e6), int(end * 1e6), 1, 0, 0, (1, 1, 1), (1, 1, 1), device)


# Of a step in halves, in milliseconds.
KERNELS = [
    ("apply_kernel", 0, 1),
    ("linear_kernel", 1, 4),
    ("two_shot_kernel", 2, 5),  # of one half, beside the linear and the norm of the other
    ("rms_norm_kernel", 4.5, 6),
    ("moe_dispatch_kernel", 5.5, 8),
    ("moe_combine_kernel", 7, 9),  # begins before the one in front of it has ended
    ("nvjet_tst_128x256", 8.5, 10),
]


def test_spans_are_merged_and_cut() -> None:
    assert merged([(5, 7), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 7)]
    assert common([(0, 4), (5, 7)], [(1, 2), (3, 6), (8, 9)]) == [(1, 2), (3, 4), (5, 6)]
    assert merged([]) == common([], [(0, 1)]) == []
    assert within([(0, 4), (5, 7), (9, 11)], 3, 10) == [(3, 4), (5, 7), (9, 10)]
    assert within([(0, 4), (5, 7)], 4, 5) == []
    assert without([(0, 10), (11, 12)], [(0, 2), (4, 5), (9, 11)]) == [(2, 4), (5, 9), (11, 12)]
    assert without([(1, 2)], [(0, 3)]) == []


def test_the_hidden_share_is_that_of_collectives() -> None:
    kernels = [
        kernel("linear_kernel", 0, 2),
        kernel("two_shot_kernel", 1, 4),  # half of what follows it, and the end of the linear
        kernel("rms_norm_kernel", 3.5, 5),
        kernel("one_shot_kernel", 5, 6),  # alone
        kernel("nvjet_tst_128x256", 7, 9),
        kernel("moe_wgmma_kernel", 9, 10),
        kernel("moe_dispatch_kernel", 10, 11),
        kernel("moe_combine_kernel", 11, 12),
    ]
    found = overlap_of(kernels)
    assert found.collective_ms == pytest.approx(6)
    assert found.hidden_ms == pytest.approx(1.5)
    assert found.compute_ms == pytest.approx(6.5)
    assert found.hidden_share == pytest.approx(1.5 / 6)
    assert overlap_of([]).hidden_share == 0


def test_what_nccl_carries_is_a_collective() -> None:
    name = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<(unsigned long)4096>)"
    spans = [("meeting_kernel", 0, 1), (name, 1, 3), ("linear_kernel", 2, 5)]
    found = overlap_of([kernel(*each) for each in spans])
    assert (found.collective_ms, found.hidden_ms, found.compute_ms) == (3, 1, 3)


def step(begin_ms: float, number: int) -> _core.StepTime:
    time = _core.StepTime()
    time.begin_ns, time.end_ns, time.step = int(begin_ms * 1e6), int((begin_ms + 10) * 1e6), number
    return time


def test_traces_show_what_the_figures_say() -> None:
    """Of two GPUs, whose clocks are not CUPTI's, the second a quarter slower."""
    kernels = [kernel(*each) for each in KERNELS]
    kernels += [kernel(name, 7 + 1.25 * start, 7 + 1.25 * end, 1) for name, start, end in KERNELS]
    logs = [[step(80, 1), step(100, 2)], [step(90, 1), step(110, 2)]]
    events = kernel_events(kernels, logs)
    for rank, begin_ms in ((0, 100), (1, 110)):
        found: dict[str, list[Any]] = {}
        names = {}
        for event in (event for event in events if event["pid"] == 1 + rank):
            if event["name"] == "thread_name":
                names[event["tid"]] = event["args"]["name"]  # type: ignore[index]
            elif event["ph"] == "X":
                found.setdefault(names[event["tid"]], []).append(event)
        overlap = overlap_of([each for each in kernels if each.device == rank])
        shares = found.pop("collectives: hidden or exposed")

        def total_ms(kind: str, slices: list[Any] = shares) -> float:
            return sum(event["dur"] for event in slices if event["name"] == kind) / 1e3

        assert total_ms("hidden") == pytest.approx(overlap.hidden_ms)
        exposed = overlap.collective_ms - overlap.hidden_ms
        assert total_ms("exposed") == pytest.approx(exposed) and exposed > 0
        # No two slices of a track at once, and nothing is lost.
        assert set(found) == {"collectives", "collectives (2)", "other kernels"}
        for slices in (shares, *found.values()):
            slices.sort(key=lambda event: event["ts"])
            for one, other in itertools.pairwise(slices):
                assert one["ts"] + one["dur"] <= other["ts"] + 1e-6
        assert sum(map(len, found.values())) == len(KERNELS)
        # The first kernel begins with the last step; the first step is 0.
        assert found["other kernels"][0]["name"] == "apply_kernel"
        assert found["other kernels"][0]["ts"] == pytest.approx((begin_ms - 80) * 1e3)
        (sums, *_) = found["collectives"]
        assert sums["name"] == "two_shot_kernel"
        if rank == 0:
            assert sums["args"] == {"hidden_us": 2500.0, "exposed_us": 500.0}
    assert kernel_events([], logs) == []
    assert len(kernel_events(kernels, [[], []])) == len(events)


def test_decode_writes_kernels_into_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trace:
        dropped = 0

        def __init__(self) -> None:
            self.kernels: list[Kernel] = []

        def __enter__(self) -> Trace:
            return self

        def __exit__(self, *_: object) -> None:
            self.kernels = [kernel(*each, 1) for each in KERNELS]

    monkeypatch.setattr(bench_decode, "KernelTrace", Trace)
    model, file = save_random_model(tmp_path / "model", CONFIG), tmp_path / "trace.json"
    arguments = ["bench", "decode", "--model", str(model), "--device", "cpu", "--batch", "2"]
    arguments += ["--context", "20", "--steps", "9", "--read-mb", "4", "--trace", str(file)]
    arguments += ["--tensor-parallel-size", "2"]
    for can, groups, steps in ((False, {0}, 9), (True, {0, 2}, 9 + bench_decode.TRACED_STEPS)):
        if can:
            monkeypatch.setattr(bench_decode, "_can_trace_kernels", lambda _: True)
        assert cli.main(arguments) == 0
        events = json.loads(file.read_text())["traceEvents"]
        assert {event["pid"] for event in events} == groups
        for rank in range(2):
            slices = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (0, rank)]
            assert len(slices) == steps


def test_records_name_the_commit_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("overlap", BENCHMARKS / "overlap.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(shapes, "shape_config", lambda *_: ("tiny", CONFIG))
    monkeypatch.setenv("MRV1_USE_TBO", "0")  # the script sets it
    file = tmp_path / "records.json"
    arguments = ["--device", "cpu", "--tokens", "8", "--repeats", "1", "--json", str(file)]
    script.main([*arguments, "--commit", "0123abc"])
    (record,) = json.loads(file.read_text())
    assert (record["commit"], record["shape"], record["tokens"]) == ("0123abc", "tiny", 8)


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_takes_a_commit(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert ('"--commit"' in text) == ('"--json"' in text)
