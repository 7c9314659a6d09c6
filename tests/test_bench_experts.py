# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Benchmarks of models with experts: what a step reads of them, and the op by itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from golden_data import load_golden
from mrv1 import bench, cli, shapes
from mrv1.config import ModelConfig
from mrv1.models.experts import ExpertsConfig
from test_bench import check_record


def test_costs_of_experts_by_hand() -> None:
    """A batch reads the experts that it is expected to go through, and computes top_k a token."""
    name, values = shapes.shape_config("qwen3-30b-a3b", 2)
    config = ModelConfig.from_values(values)
    assert name == "qwen3-30b-a3b/2-layers" and isinstance(config, ExpertsConfig)
    one = 3 * 2048 * 768  # weights of an expert
    for batch, read in ((1, 8.0), (2, 15.5), (32, 111.77), (10_000, 128.0)):
        costs = bench.decode_costs(config, "bfloat16", batch, 0)
        experts = [cost for cost in costs if cost.experts is not None]
        assert [cost.name for cost in experts] == ["moe_experts"] * 4  # gate and up, down
        assert all(cost.experts == pytest.approx(read, rel=1e-4) for cost in experts)
        read_bytes = sum(cost.read_bytes for cost in experts)
        assert read_bytes == pytest.approx(2 * read * one * 2, rel=1e-4)
        assert sum(cost.operations for cost in experts) == 2 * 2 * batch * 8 * one
        assert sum(cost.name.endswith("gate.weight") for cost in costs) == 2
    # Micro-batches of 16 requests: each stage reads for each of them what those go through.
    spread = bench.decode_costs(config, "bfloat16", 32, 0, micro_batches=2)
    assert [cost.experts for cost in spread if cost.experts] == pytest.approx(
        [128 * (1 - (120 / 128) ** 16)] * 4
    )
    timing = bench.Timing(32, 1024, 1.0, 1.0, 1.0)
    costs = bench.decode_costs(config, "bfloat16", 32, 1024)
    record = bench.make_record("decode", name, "cpu: a", "bfloat16", timing, costs)
    check_record(record)
    assert record["experts"] == 111.77
    assert "111.8" in bench.format_table([record])
    # Two requests at first, then one: steps of 5, 2 and 1 tokens.
    mix = bench.mix_costs(config, "bfloat16", [(3, 2), (2, 3)])
    expected = sum(bench.distinct_experts(128, 8, tokens) for tokens in (5, 2, 1)) / 3
    assert [cost.experts for cost in mix if cost.experts] == pytest.approx([expected] * 4)


def test_costs_of_ranks_with_requests_of_their_own_by_hand() -> None:
    """Each has half of the requests, and of the experts that the tokens of both choose."""
    values = shapes.shape_config("qwen3-30b-a3b", 2)[1]
    config = ModelConfig.from_values(values)
    costs = bench.decode_costs(config, "bfloat16", 32, 1024)
    own = bench.decode_costs(config, "bfloat16", 16, 1024)
    shared = bench.shared_costs(costs, ranks=1, micro_batches=1, data_ranks=2)
    for cost, half in zip(shared, own, strict=True):
        assert cost.operations == half.operations
        if cost.experts is None:
            assert cost == half  # whole weights, and the rank's own keys and values
        else:
            assert cost.experts == pytest.approx(111.77, rel=1e-4)
    one = 3 * 2048 * 768 * 2
    experts = sum(cost.read_bytes for cost in shared if cost.experts is not None)
    assert experts == pytest.approx(2 * 111.77 / 2 * one, rel=1e-4)
    timing = bench.Timing(32, 1024, 1.0, 1.0, 1.0)
    rates = bench.Rates(4000.0, 700e3)
    record = bench.make_record("decode", "a", "b", "bfloat16", timing, costs, rates, data_ranks=2)
    assert record["floor_ms"] == pytest.approx(bench.floor_ms(shared, rates), abs=1e-6)
    whole = bench.make_record("decode", "a", "b", "bfloat16", timing, costs, rates)
    assert record["floor_ms"] < (whole["floor_ms"] or 0) < 2 * record["floor_ms"]


def test_expected_experts_are_those_of_random_choices() -> None:
    rng = np.random.default_rng(5)
    for experts, top_k, tokens in ((128, 8, 1), (128, 8, 32), (8, 2, 3), (11, 11, 2)):
        found = [
            len({e for _ in range(tokens) for e in rng.choice(experts, top_k, replace=False)})
            for _ in range(200)
        ]
        expected = bench.distinct_experts(experts, top_k, tokens)
        assert np.mean(found) == pytest.approx(expected, rel=0.03)


def test_op_measures_the_experts_of_a_layer(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "op", "--device", device, "--steps", "2", "--read-mb", "1"]
    arguments += ["--context", "16"]
    mixtral = ["--model", str(load_golden("mixtral").model_dir)]
    options = ["--ops", "experts,o_proj", "--batch", "1,6", "--json", str(path)]
    assert cli.main([*arguments, *mixtral, *options]) == 0
    records = json.loads(path.read_text())
    assert [(record["op"], record["batch"]) for record in records] == [
        *[("o_proj", batch) for batch in (1, 6)],
        *[("experts", batch) for batch in (1, 6)],
    ]
    for record in records:
        check_record(record)
        assert ("experts" in record) == (record["op"] == "experts")
    assert records[2]["experts"] == 2.0
    assert records[3]["experts"] == pytest.approx(bench.distinct_experts(8, 2, 6), abs=0.5)
    capsys.readouterr()
    # What a model has none of is refused by name.
    for name, op in (("qwen3-tied", "experts"), ("mixtral", "gate_up_proj")):
        model = ["--model", str(load_golden(name).model_dir)]
        assert cli.main([*arguments, *model, "--ops", op, "--batch", "1"]) == cli.EXIT_ERROR
        assert f"--ops = '{op}'" in capsys.readouterr().err


def test_decode_of_a_model_with_experts_has_a_floor(device: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "decode", "--model", str(load_golden("ernie4_5_moe").model_dir)]
    arguments += ["--device", device, "--batch", "1,5", "--context", "16", "--steps", "2"]
    assert cli.main([*arguments, "--read-mb", "1", "--json", str(path)]) == 0
    for record, batch in zip(json.loads(path.read_text()), (1, 5), strict=True):
        check_record(record)
        assert record["experts"] == pytest.approx(bench.distinct_experts(11, 3, batch), abs=0.01)
        assert record["floor_ms"] > 0
