# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Benchmarks of pipelines: traces, shares of waiting, and what each rank must do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mrv1 import _core, bench, cli, shapes
from mrv1.bench_mix import MixRequest, measure_mix, mix_options
from mrv1.bench_peers import PeerFigure, add_peers
from mrv1.bench_trace import StepLogs, stage_waits, wait_share, write_trace
from mrv1.config import ModelConfig
from mrv1.engine import Engine
from mrv1.errors import InvalidArgumentError
from mrv1.random_model import byte_tokenizer, random_runner
from mrv1.tokenizer import Tokenizer
from serving_tools import need_ranks
from test_bench import SMALL, check_record


def step_time(step: int, begin: int, end: int, waited: int, rows: int) -> _core.StepTime:
    time = _core.StepTime()
    time.step, time.begin_ns, time.end_ns, time.waited_ns = step, begin, end, waited
    time.requests, time.tokens, time.mode = rows, 2 * rows, _core.StepMode.FULL
    time.cut_token = 3 if rows == 3 else 0
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
    assert slices[0]["args"]["halves"] == "3 + 3"
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


def test_decode_over_stages(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_ranks(device, 2)
    monkeypatch.setitem(shapes._CONFIGS, "qwen3-0.6b", SMALL)
    path, trace = tmp_path / "out.json", tmp_path / "trace.json"
    arguments = ["bench", "decode", "--shape", "qwen3-0.6b", "--device", device, "--batch", "1,3"]
    arguments += ["--context", "20", "--steps", "6", "--read-mb", "4"]
    arguments += ["--pipeline-parallel-size", "2", "--json", str(path), "--trace", str(trace)]
    assert cli.main(arguments) == 0
    records = json.loads(path.read_text())
    assert [(record["batch"], record["pp"]) for record in records] == [(1, 2), (3, 2)]
    for record in records:
        check_record(record)
        assert "tp" not in record
        # Figures of other engines are of one device.
        same = (record["shape"], record["batch"], record["context"], record["dtype"], "auto")
        add_peers([record], [PeerFigure("other", record["device"], "decode", *same, step_ms=1.0)])
        assert "peer_name" not in record
        shares = [float(share) for share in record["stage_waits"].split(",")]
        assert len(shares) == 2
        # How much it is follows from when threads run: values may be there before a stage looks.
        assert all(0 <= share < 1 for share in shares)
    # A step has two micro-batches, of two rows and of one.
    events = json.loads(trace.read_text())["traceEvents"]
    steps = 6 if device == "cpu" else 500
    for rank in (0, 1):
        rows = [e["args"]["requests"] for e in events if e["ph"] == "X" and e["tid"] == rank]
        assert rows == [2, 1] * steps


def test_mix_over_stages(device: str) -> None:
    need_ranks(device, 2)
    requests = [MixRequest([7] * (20 + index), 3 + index) for index in range(6)]
    options = dataclasses.replace(
        mix_options(device, "bfloat16", requests, max_num_seqs=4), pipeline_parallel_size=2
    )
    model = random_runner(ModelConfig.from_values(SMALL), options)
    logs: StepLogs = []
    with Engine.from_model(model, Tokenizer(byte_tokenizer())) as engine:
        timing = measure_mix(engine, requests, logs)
    assert len(timing.stage_waits) == len(logs) == 2
    first, last = ([(step.step, step.tokens) for step in steps] for steps in logs)
    assert first == last
    # The last token of an output is never computed.
    tokens = sum(len(request.prompt_token_ids) + request.max_tokens - 1 for request in requests)
    assert sum(step.tokens for step in logs[0]) >= tokens - 6 * model.block_size
    assert max(step.requests for step in logs[0]) <= 4


def test_figures_of_one_device_refuse_stages(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "op", "--shape", "qwen3-0.6b", "--device", "cpu"]
    assert cli.main([*arguments, "--pipeline-parallel-size", "2"]) != 0
    assert "--pipeline-parallel-size" in capsys.readouterr().err
