# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Benchmarks of what passes between ranks, on ranks of the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrv1 import bench, cli
from mrv1.config import ModelConfig
from mrv1.random_model import save_random_model
from test_bench import check_record, check_table
from test_expert_parallel import CONFIG


def test_sums_over_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "all_reduce", "--device", "cpu", "--json", str(path), "--ranks", "4"]
    assert cli.main([*arguments, "--message-kb", "1,8", "--steps", "2"]) == 0
    records = json.loads(path.read_text())
    assert [record["message_bytes"] for record in records] == [1024, 8192]
    for record in records:
        check_record(record)
        assert (record["tp"], record["shape"], record["backend"]) == (4, "4 ranks", "auto")
        assert "fault" not in record
        assert record["gb_s"] == pytest.approx(
            record["message_bytes"] / record["us"] / 1e3, rel=0.02, abs=0.01
        )
    check_table(capsys.readouterr().out, records)
    for wrong in (["--kernels", "nccl"], ["--ranks", "1"], ["--ranks", "9"], ["--shape", "demo"]):
        assert cli.main(["bench", "all_reduce", "--device", "cpu", *wrong]) != 0


def test_messages_between_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "stage_send", "--device", "cpu", "--json", str(path), "--ranks", "3"]
    assert cli.main([*arguments, "--message-kb", "1,8", "--steps", "2"]) == 0
    records = json.loads(path.read_text())
    assert [(record["message_bytes"], record["backend"]) for record in records] == [
        (count, backend) for count in (1024, 8192) for backend in ("stage_send", "copy")
    ]
    for record in records:
        check_record(record)
        assert (record["pp"], record["shape"]) == (3, "3 stages")
        assert "fault" not in record
        assert record["gb_s"] == pytest.approx(
            record["message_bytes"] / record["us"] / 1e3, rel=0.02, abs=0.01
        )
    check_table(capsys.readouterr().out, records)
    for wrong in (["--kernels", "auto"], ["--ranks", "1"], ["--shape", "demo"]):
        assert cli.main(["bench", "stage_send", "--device", "cpu", *wrong]) != 0


def test_tokens_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "expert_exchange", "--device", "cpu", "--json", str(path), "--ranks", "3"]
    assert cli.main([*arguments, "--tokens", "1,5", "--steps", "2"]) == 0
    records = json.loads(path.read_text())
    assert [(record["batch"], record["backend"]) for record in records] == [
        (count, part) for count in (1, 5) for part in ("dispatch", "combine", "both")
    ]
    for record in records:
        check_record(record)
        assert (record["ep"], record["shape"], record["blocks"]) == (3, "3 ranks", 32)
        assert "fault" not in record
        # A row goes to two other ranks at most, with 8 ids and 8 weights.
        most = record["batch"] * 2 * (2048 * 2 + 64) * (2 if record["backend"] == "both" else 1)
        assert 0 <= record["message_bytes"] <= most
    dispatch, combine, both = (record["message_bytes"] for record in records[3:])
    assert 0 < combine < dispatch and both == pytest.approx(dispatch + combine, abs=1)
    check_table(capsys.readouterr().out, records)
    for wrong in (["--kernels", "auto"], ["--ranks", "1"], ["--shape", "demo"]):
        assert cli.main(["bench", "expert_exchange", "--device", "cpu", *wrong]) != 0


@pytest.mark.parametrize("figure", ["decode", "prefill"])
def test_ranks_with_requests_of_their_own(
    figure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_random_model(tmp_path / "model", CONFIG)
    path = tmp_path / "out.json"
    arguments = ["bench", figure, "--model", str(model), "--device", "cpu", "--json", str(path)]
    arguments += ["--context", "20", "--steps", "3", "--read-mb", "4"]
    arguments += ["--expert-parallel", "--data-parallel-size", "3"]
    assert cli.main([*arguments, "--batch", "7"]) != 0
    assert "a multiple of --data-parallel-size = 3" in capsys.readouterr().err
    assert cli.main([*arguments, "--batch", "6"]) == 0
    (record,) = json.loads(path.read_text())
    check_record(record)
    # Two requests on each.
    assert (record["batch"], record["ep"], record["tbo"]) == (6, 3, 0)
    tokens = 6 if figure == "decode" else 6 * 20
    assert record["experts"] == round(bench.distinct_experts(7, 3, tokens), 2)
    costs = bench.decode_costs if figure == "decode" else bench.prefill_costs
    context = 21 if figure == "decode" else 20  # of the second of three steps
    whole = costs(ModelConfig.from_values(CONFIG), "float32", 6, context)
    rates = bench.Rates(record["read_gb_s"], record["gflops"])
    shared = bench.shared_costs(whole, 1, 1, data_ranks=3)
    assert record["floor_ms"] == pytest.approx(bench.floor_ms(shared, rates), rel=1e-2)
    check_table(capsys.readouterr().out, [record])


def test_a_workload_of_such_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are of all ranks together, as are its requests."""
    monkeypatch.setenv("MRV1_USE_TBO", "1")
    model = save_random_model(tmp_path / "model", {**CONFIG, "max_position_embeddings": 4096})
    path = tmp_path / "out.json"
    arguments = ["bench", "mix", "--model", str(model), "--device", "cpu", "--json", str(path)]
    arguments += ["--requests", "3", "--read-mb", "4"]
    assert cli.main([*arguments, "--expert-parallel", "--data-parallel-size", "2"]) == 0
    (record,) = json.loads(path.read_text())
    check_record(record)
    assert (record["batch"], record["ep"], record["tbo"]) == (3, 2, 1)
    assert record["floor_ms"] > 0 and 0 < record["experts"] <= 7
