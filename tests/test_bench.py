# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Benchmarks: records and floors, the native probes, saved random models, and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from mrv1 import _core, bench, bench_cli, bench_kv, bench_op, bench_sampler, cli, shapes, tuning
from mrv1.bench_decode import DecodeRun, decode_options, idle_share, measure_decode
from mrv1.bench_mix import MixRequest, measure_mix, mix_options, mix_requests
from mrv1.bench_peers import add_peers, read_peers
from mrv1.bench_prefill import measure_prefill, prefill_chunks, prefill_options
from mrv1.config import ModelConfig
from mrv1.engine import Engine
from mrv1.env_report import commit
from mrv1.errors import InvalidArgumentError, OutOfMemoryError
from mrv1.loader import RunnerOptions, load_model
from mrv1.models.experts import ExpertsConfig
from mrv1.random_model import RANGE, byte_tokenizer, random_runner, save_random_model
from mrv1.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20

# A small shape: 7 x 10^5 weights.
SMALL: dict[str, object] = {
    **shapes.shape_config("qwen3-0.6b", 2)[1],
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PEER_STEPS = (("slow", 900.0), ("fast", 500.0))
# Peak resident memory of the script's process, in bytes.
PEAK = """
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
"""


def documented_keys() -> tuple[set[str], set[str]]:
    """The keys of the two tables of docs/benchmarks.md: every record's, and some records'."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    records = text.split("## Records")[1].split("\n## ")[0]
    first, second = records.split("Some have these as well")
    find = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
    return set(find.findall(first)), set(find.findall(second))


def check_record(record: dict[str, Any]) -> None:
    required, optional = documented_keys()
    assert required <= record.keys() <= required | optional
    nullable = {"floor_ms", "host_us", "read_gb_s", "peak_memory_mb", "commit"} | optional
    for key, value in record.items():
        assert value is not None or key in nullable, key
        assert value is None or isinstance(value, str | int | float), f"{key} is not flat"
    assert record["step_ms"] > 0
    assert record["figure"] in get_args(bench.Figure)
    if record.get("x_floor") is not None and record["floor_ms"] > 1e-3:  # not lost in rounding
        ratio = record["step_ms"] / record["floor_ms"]
        assert record["x_floor"] == pytest.approx(ratio, rel=1e-2, abs=1e-3)
    assert ("peer_name" in record) == ("times_peer" in record)
    assert (record.get("counts") is False) == ("fault" in record)
    assert -0.01 < record.get("idle_share", 0.0) < 1
    if record["figure"] != "mix":
        tokens = record["batch"] * (record["context"] if record["figure"] == "prefill" else 1)
        rate = 1e3 * tokens / record["step_ms"]
        assert record["tokens_per_s"] == pytest.approx(rate, rel=1e-2)
    assert "/" not in record["shape"] or record["shape"].endswith("-layers")


def check_table(text: str, records: list[dict[str, Any]]) -> None:
    lines = text.splitlines()
    assert lines[0].startswith("figure")
    # Last lines say what does not count.
    faults = {record["fault"] for record in records if "fault" in record}
    assert len(lines) == 1 + len(records) + len(faults)


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of the small shape."""
    return save_random_model(tmp_path_factory.mktemp("models") / "small", SMALL)


def test_the_documented_keys_are_the_code_s() -> None:
    assert documented_keys() == (set(bench.REQUIRED_KEYS), set(bench.OPTIONAL_KEYS))


def test_decode_prints_a_table_and_writes_records(
    small_dir: Path, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "decode", "--model", str(small_dir), "--device", device]
    arguments += ["--batch", "1,3", "--context", "40,100", "--steps", "6", "--read-mb", "4"]
    trace = tmp_path / "trace.json"
    assert cli.main([*arguments, "--json", str(path), "--trace", str(trace)]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert {event["args"]["requests"] for event in slices} == {3}
    assert len(slices) == (6 if device == "cpu" else 500)
    assert all(event["dur"] > 0 for event in slices)
    records = json.loads(path.read_text())
    assert [(r["batch"], r["context"]) for r in records] == [(1, 40), (3, 40), (1, 100), (3, 100)]
    for record in records:
        check_record(record)
        assert record["shape"] == "small"
        assert record["kv_cache_dtype"] == "auto"
        assert ("idle_share" in record) == (device == "cuda")
        assert record["graph_mode"] == ("full" if device == "cuda" else "eager")
        assert not {"pp", "tp", "stage_waits"} & record.keys()
        assert 0 < record["host_us"] < 1e4
        assert record["floor_ms"] > 0
        assert record["read_share"] > 0
    check_table(capsys.readouterr().out, records)


@pytest.mark.parametrize("figure", ["decode", "prefill", "mix", "op"])
def test_figures_take_an_fp8_cache(
    small_dir: Path, device: str, tmp_path: Path, figure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records say so, and floors are those of its codes and scales."""
    path = tmp_path / "out.json"
    arguments = ["bench", figure, "--model", str(small_dir), "--device", device, "--read-mb", "4"]
    if figure == "mix":
        arguments += ["--requests", "1"]
    else:
        arguments += ["--batch", "2", "--context", "100", "--steps", "2"]
    if figure == "op":
        arguments += ["--ops", "attention"]
    floors = {}
    for name in ("auto", "fp8_e4m3", "fp8_e5m2"):
        assert cli.main([*arguments, "--kv-cache-dtype", name, "--json", str(path)]) == 0
        (record,) = json.loads(path.read_text())
        check_record(record)
        assert record["kv_cache_dtype"] == name
        assert record.get("scale") == (None if name == "auto" else "dynamic")
        floors[name] = record["read_share"] * record["read_gb_s"] * record["step_ms"]
        assert (name in capsys.readouterr().out) == (name != "auto")
    if figure == "op" and device == "cpu":  # a GPU's share is too small for its digits
        # The cache is all that is read: 64 codes and a scale, or 64 of bfloat16.
        for name in ("fp8_e4m3", "fp8_e5m2"):
            assert floors[name] / floors["auto"] == pytest.approx((64 + 4) / 128, rel=0.02)


def test_records_name_the_commit_and_the_peer(
    small_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, peers = tmp_path / "out.json", tmp_path / "peers.json"
    figure = {"figure": "decode", "shape": "small", "context": 40, "kv_cache_dtype": "auto"}
    figures = [{**figure, "name": name, "batch": 2, "step_ms": ms} for name, ms in PEER_STEPS]
    peers.write_text(json.dumps({"device": "cpu", "dtype": "bfloat16", "figures": figures}))
    arguments = ["bench", "decode", "--model", str(small_dir), "--device", "cpu", "--steps", "2"]
    arguments += ["--batch", "1,2", "--context", "40", "--read-mb", "4", "--commit", "abc"]
    assert cli.main([*arguments, "--peers", str(peers), "--json", str(path)]) == 0
    first, second = json.loads(path.read_text())
    assert (first["commit"], second["commit"]) == ("abc", "abc")
    assert "peer_name" not in first
    assert (second["peer_name"], second["peer_step_ms"]) == ("fast", 500.0)
    assert second["times_peer"] > 1
    assert "peer ms" in capsys.readouterr().out
    assert cli.main([*arguments, "--peers", str(tmp_path / "none.json")]) == cli.EXIT_ERROR


def test_prefill_prints_a_table_and_writes_records(
    small_dir: Path, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "prefill", "--model", str(small_dir), "--device", device]
    arguments += ["--batch", "1,3", "--context", "40,200", "--read-mb", "4"]
    assert cli.main([*arguments, "--json", str(path)]) == 0
    records = json.loads(path.read_text())
    assert [(r["batch"], r["context"]) for r in records] == [(1, 40), (3, 40), (1, 200), (3, 200)]
    for record in records:
        check_record(record)
        assert record["figure"] == "prefill"
        assert 0 < record["host_us"] < 1e5
        assert record["floor_ms"] > 0
        assert record["read_share"] > 0
    check_table(capsys.readouterr().out, records)


def test_prefill_chunks_are_full_and_cover_the_prompts() -> None:
    assert prefill_chunks(1, 5, 8) == [[(0, 5)]]
    assert prefill_chunks(2, 4, 8) == [[(0, 4), (1, 4)]]
    assert prefill_chunks(3, 5, 4) == [[(0, 4)], [(0, 1), (1, 3)], [(1, 2), (2, 2)], [(2, 3)]]


def test_prefill_runs_all_chunks_and_leaves_nothing(device: str) -> None:
    options = dataclasses.replace(
        prefill_options(device, "bfloat16", [3], [21]), max_num_batched_tokens=8
    )
    model = random_runner(ModelConfig.from_values(SMALL), options)
    before = model.runner.stats()["steps"]
    timing = measure_prefill(model, 3, 21, 2)
    # One chunk to warm up, and twice 63 tokens by 8.
    assert model.runner.stats()["steps"] - before == 1 + 2 * 8
    assert (timing.batch, timing.context, timing.tokens) == (3, 21, 63)
    assert model.runner.free_rows == 3
    model.runner.close()
    model.device.close()


def test_mix_draws_the_published_workload() -> None:
    random.seed(0)
    prompts = [
        [random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)
    ]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    drawn = mix_requests(151936)
    assert [request.prompt_token_ids for request in drawn] == prompts
    assert [request.max_tokens for request in drawn] == lengths
    assert sum(len(request.prompt_token_ids) for request in drawn) == 142_827
    assert sum(request.max_tokens for request in drawn) == 133_966
    assert mix_requests(151936, 3) == drawn[:3]
    small = mix_requests(1000)
    assert [request.max_tokens for request in small] == lengths
    assert [len(request.prompt_token_ids) for request in small] == [len(p) for p in prompts]
    assert {token for request in small for token in request.prompt_token_ids} == set(range(1000))
    # More are drawn as if the benchmark had so many: all prompts, then all lengths.
    more = mix_requests(151936, 300)
    assert [request.prompt_token_ids for request in more[:256]] == prompts
    assert len(more) == 300
    assert [request.max_tokens for request in more[:256]] != lengths
    for count in (0, 4097):
        with pytest.raises(InvalidArgumentError, match="requests"):
            mix_requests(1000, count)


@pytest.mark.parametrize("from_directory", [True, False])
def test_mix_writes_a_record(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_directory: bool
) -> None:
    monkeypatch.setitem(shapes._CONFIGS, "qwen3-0.6b", {**SMALL, "num_hidden_layers": 1})
    path = tmp_path / "out.json"
    arguments = ["bench", "mix", "--shape", "qwen3-0.6b", "--requests", "2", "--json", str(path)]
    if from_directory:
        arguments += ["--save", str(tmp_path / "saved")]
    assert cli.main([*arguments, "--device", device]) == 0
    (record,) = json.loads(path.read_text())
    check_record(record)
    assert (record["figure"], record["batch"], record["context"]) == ("mix", 2, 0)
    assert 0 < record["floor_ms"] < 10 * record["step_ms"]
    assert 0 < record["host_us"] < 1e4
    # The second request ends first: from then on a step makes one token.
    per_step = record["tokens_per_s"] * record["step_ms"] / 1e3
    first, second = (request.max_tokens for request in mix_requests(1000, 2))
    assert first > second
    assert 1 < per_step <= 1.001 * (first + second) / first


def test_mix_runs_every_request_to_its_end(device: str) -> None:
    requests = [MixRequest([7] * 20, 3), MixRequest([8] * 5, 9)]
    model = random_runner(ModelConfig.from_values(SMALL), mix_options(device, "bfloat16", requests))
    with Engine.from_model(model, Tokenizer(byte_tokenizer())) as engine:
        timing = measure_mix(engine, requests)
        stats = engine.stats()
        engine.check_idle()
    # The warm-up's prompt has 16 tokens.
    assert stats["prefill_tokens"] == 16 + 25
    assert timing.tokens is not None
    # The first may have ended before the other came.
    assert 1 <= timing.tokens <= 12 / 9
    assert (model.max_num_seqs, model.max_model_len) == (2, 23)


def test_op_measures_each_op(
    small_dir: Path, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "op", "--model", str(small_dir), "--device", device, "--batch", "1,2"]
    arguments += ["--steps", "2", "--read-mb", "1", "--json", str(path)]
    assert cli.main([*arguments, "--context", "33"]) == 0
    records = json.loads(path.read_text())
    ops = [op for op in bench_op.OPS if op != "experts"]  # of which the model has none
    assert [record["op"] for record in records] == [op for op in ops for _ in range(2)]
    assert [record["batch"] for record in records] == [1, 2] * len(ops)
    for record in records:
        check_record(record)
        assert record["figure"] == "op"
        assert record["context"] == (33 if record["op"] == "attention" else 0)
    assert "gate_up_proj" in capsys.readouterr().out
    options = ["--ops", "attention,o_proj", "--lengths", "even,log-uniform", "--context", "17,40"]
    assert cli.main([*arguments, *options]) == 0
    records = json.loads(path.read_text())
    for record in records:
        check_record(record)
    uneven = [round(np.mean(bench_op.request_lengths("log-uniform", batch, 0))) for batch in (1, 2)]
    assert [(r["op"], r.get("lengths"), r["context"]) for r in records] == [
        *[("o_proj", None, 0)] * 2,
        *[("attention", None, context) for context in (17, 17, 40, 40)],
        *[("attention", "log-uniform", context) for context in uneven],
    ]
    if device == "cpu":
        assert cli.main([*arguments, "--backend", "flashinfer"]) == cli.EXIT_ERROR
        assert "--backend" in capsys.readouterr().err
    else:
        options = ["--ops", "attention", "--context", "40", "--backend", "native,flashinfer"]
        assert cli.main([*arguments, *options]) == 0
        records = json.loads(path.read_text())
        assert [record["backend"] for record in records] == ["native", "flashinfer"] * 2
        assert not any("attention" in record.get("fault", "") for record in records)


def test_lengths_of_requests() -> None:
    assert bench_op.request_lengths("even", 3, 7) == [7, 7, 7]
    assert bench_op.request_lengths("one-long", 3, 7) == [65536, 512, 512]
    drawn = bench_op.request_lengths("log-uniform", 4000, 7)
    assert drawn == bench_op.request_lengths("log-uniform", 4000, 7)
    assert 1 <= min(drawn) < 8
    assert 30000 < max(drawn) <= 32768
    # As many in each octave.
    assert np.histogram(np.log2(drawn), bins=15, range=(0, 15))[0].min() > 200


def test_attention_is_measured_over_what_the_lengths_say(native_device: _core.Device) -> None:
    config = ModelConfig.from_values(SMALL)
    ((backend, cost, timing, fault),) = bench_op.measure_attention(
        native_device, config, "bfloat16", [1, 40, 16], 2, 1 << 16
    )
    assert (backend, timing.batch, timing.context) == ("native", 3, 19)
    assert cost == bench.attention_cost(config, "bfloat16", 1, 57)
    assert timing.step_ms > 0
    assert fault is None


def test_the_command_s_names_are_the_code_s() -> None:
    assert bench_cli.OPS == bench_op.OPS
    assert bench_cli.LENGTHS == bench_op.LENGTHS
    assert tuple(bench_op.BACKENDS) == bench_cli.BACKENDS


def test_json_that_exists_is_kept_until_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    bench.check_writable(path)
    assert not path.exists()
    path.write_text("mine")
    bench.check_writable(path)
    assert path.read_text() == "mine"
    for refused in (tmp_path, path / "inside", "a\0b"):
        with pytest.raises(InvalidArgumentError, match="cannot be written"):
            bench.check_writable(refused)


def test_shape_with_save_and_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes._CONFIGS, "qwen3-0.6b", SMALL)
    path = tmp_path / "out.json"
    arguments = ["bench", "decode", "--shape", "qwen3-0.6b", "--layers", "1", "--batch", "1"]
    arguments += ["--context", "16", "--steps", "2", "--read-mb", "1", "--json", str(path)]
    saved = tmp_path / "saved"
    assert cli.main([*arguments, "--save", str(saved), "--device", "cpu"]) == 0
    (record,) = json.loads(path.read_text())
    check_record(record)
    assert record["shape"] == "qwen3-0.6b/1-layers"
    assert ModelConfig.from_dir(saved).num_hidden_layers == 1
    # Not over what is there already.
    assert cli.main([*arguments, "--save", str(saved), "--device", "cpu"]) == cli.EXIT_ERROR


def test_committed_results_follow_the_schema() -> None:
    compared = set()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        records = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(records, list)
        assert records, path
        for record in records:
            check_record(record)
            # Of a commit that anyone can check out.
            assert record["commit"] is not None
            assert not record["commit"].endswith("-dirty"), path
            if record["figure"] == "decode" and "peer" in record:
                compared.add((record["peer"], record["batch"]))
    peers = {peer for peer, _ in compared}
    assert len(peers) >= 2
    assert compared >= {(peer, batch) for peer in peers for batch in (1, 8)}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        # Parameters of the public models, from their published sizes.
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
        ("qwen2.5-0.5b", 494_032_768),
        ("mistral-7b", 7_241_732_096),
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-3-1b", 999_885_952),
        ("ernie-4.5-0.3b", 360_748_032),
        ("phi-4-mini", 3_836_021_760),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("mixtral-8x7b", 46_702_792_704),
        ("ernie-4.5-21b-a3b", 21_825_437_888),
    ],
)
def test_shapes_have_the_size_of_their_models(name: str, weights: int) -> None:
    config = ModelConfig.from_values(shapes.shape_config(name)[1])
    costs = bench.decode_costs(config, "bfloat16", 1, 0)
    vectors = sum(cost.read_bytes for cost in costs if cost.operations == 0) - (
        2 * config.hidden_size  # the embedding's row
    )
    matrices = sum(cost.operations for cost in costs) // 2
    if isinstance(config, ExpertsConfig):
        # One token goes through some of the experts.
        routed = sum(cost.operations for cost in costs if cost.experts is not None) // 2
        matrices += routed * config.num_experts // config.num_experts_per_tok - routed
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert matrices + vectors // 4 + embedding == weights


def test_costs_and_floor_by_hand() -> None:
    config = ModelConfig.from_values(SMALL)
    costs = {cost.name: cost for cost in bench.decode_costs(config, "bfloat16", 3, 10)}
    # 3 requests x 10 tokens x (keys, values) x 2 heads x 64 x 2 bytes.
    assert costs["attention"] == bench.OpCost("attention", 3 * 10 * 2 * 2 * 64 * 2, 30 * 4 * 4 * 64)
    assert costs["embedding"] == bench.OpCost("embedding", 3 * 128 * 2, 0)
    assert costs["logits"] == bench.OpCost("logits", 1000 * 128 * 2, 2 * 3 * 1000 * 128)
    down = costs["model.layers.1.mlp.down_proj.weight"]
    assert (down.read_bytes, down.operations) == (128 * 256 * 2, 2 * 3 * 128 * 256)
    # One op that is bound by reads (2 ms) and one by arithmetic (3 ms).
    rates = bench.Rates(read_gb_s=10.0, gflops=100.0)
    pair = [bench.OpCost("a", 20_000_000, 1000), bench.OpCost("b", 1000, 300_000_000)]
    assert bench.floor_ms(pair, rates) == pytest.approx(5.0)
    assert bench.floor_ms([costs["attention"]] * 2, rates) == pytest.approx(
        2 * bench.floor_ms([costs["attention"]], rates)
    )


def test_costs_of_an_fp8_cache_by_hand() -> None:
    """A byte an element and, where each token has scales, 4 a head."""
    config = ModelConfig.from_values(SMALL)
    exact = bench.decode_costs(config, "bfloat16", 3, 10)
    for scales, head_bytes in (("static", 64), ("dynamic", 68)):
        cache = bench.CacheFormat("fp8_e4m3", scales)
        costs = bench.decode_costs(config, "bfloat16", 3, 10, cache)
        for cost, other in zip(costs, exact, strict=True):
            if cost.name == "attention":
                other = dataclasses.replace(other, read_bytes=3 * 10 * 2 * 2 * head_bytes)
            assert cost == other
        prefill = {c.name: c for c in bench.prefill_costs(config, "bfloat16", 3, 10, cache)}
        mix = {c.name: c for c in bench.mix_costs(config, "bfloat16", [(10, 1)] * 3, cache)}
        assert prefill["attention"] == mix["attention"]
        assert prefill["attention"].read_bytes == 3 * 10 * 2 * 2 * head_bytes


def test_prefill_costs_by_hand() -> None:
    config = ModelConfig.from_values(SMALL)
    found = bench.prefill_costs(config, "bfloat16", 3, 10)
    costs = {cost.name: cost for cost in found}
    # Keys and values once; 1 + 2 + ... + 10 pairs a prompt, two products of 64 for each of 4 heads.
    assert costs["attention"] == bench.OpCost(
        "attention", 3 * 10 * 2 * 2 * 64 * 2, 3 * 55 * 2 * 2 * 4 * 64
    )
    assert sum(cost.name == "attention" for cost in found) == 2
    assert costs["embedding"] == bench.OpCost("embedding", 30 * 128 * 2, 0)
    assert costs["logits"] == bench.OpCost("logits", 1000 * 128 * 2, 2 * 3 * 1000 * 128)
    down = costs["model.layers.1.mlp.down_proj.weight"]
    assert (down.read_bytes, down.operations) == (128 * 256 * 2, 2 * 30 * 128 * 256)
    untied = ModelConfig.from_values({**SMALL, "tie_word_embeddings": False})
    assert costs["logits"] in bench.prefill_costs(untied, "bfloat16", 3, 10)
    # A prompt of one token is a decode step over itself.
    assert bench.prefill_costs(config, "float32", 4, 1) == bench.decode_costs(
        config, "float32", 4, 1
    )


def test_cache_writes(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "kv_write", "--device", device, "--json", str(path), "--read-mb", "4"]
    arguments += ["--tokens", "1,9", "--kv-heads", "2", "--group", "3", "--head-dim", "64"]
    arguments += ["--layout", "NHD,HND", "--caches", "auto,fp8_e4m3/dynamic", "--steps", "2"]
    arguments += ["--launches", "plain,overlapped"]
    assert cli.main(arguments) == 0
    records = json.loads(path.read_text())
    assert len(records) == 2 * 2 * 2 * 2 * 2
    for record in records:
        check_record(record)
        assert (record["heads"], record["kv_heads"], record["head_dim"]) == (6, 2, 64)
        assert record["shape"] == "6+2x64" and record["tokens"] == record["batch"]
        size = 2 if record["cache_dtype"] == "auto" else 1
        scale = 4 if record["scale"] == "dynamic" else 0
        assert record["scale"] == ("none" if record["cache_dtype"] == "auto" else "dynamic")
        moved = 2 * 2 * (64 * (2 + size) + scale) + 4
        if record["op"] == "rope_write":
            # Packed rows are read once and q and k heads stored; positions are read.
            moved += 2 * 6 * 64 * 2 + 2 * 64 * 2 + 4
            again = 2 * 64 * 2
            assert record["x_separate_bytes"] == pytest.approx((moved + again) / moved, rel=1e-3)
            assert record["separate_us"] > 0
        assert record["gb_s"] == pytest.approx(
            moved * record["tokens"] / record["us"] / 1e3, rel=0.02, abs=0.02
        )
        assert record["read_gb_s"] > 0 and record["copy_gb_s"] > 0
    check_table(capsys.readouterr().out, records)
    assert {record["layout"] for record in records} == {"NHD", "HND"}
    assert {record["launches"] for record in records} == {"plain", "overlapped"}
    for wrong in (["--shape", "demo"], ["--kv-cache-dtype", "fp8_e4m3"], ["--batch", "1"]):
        assert cli.main(["bench", "kv_write", "--device", device, *wrong]) != 0


def test_decode_attention(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "decode_attention", "--device", device, "--json", str(path)]
    arguments += ["--kv-heads", "2", "--group", "3", "--head-dim", "64", "--layout", "NHD,HND"]
    arguments += ["--batch", "3", "--context", "40,100", "--steps", "2", "--read-mb", "4"]
    assert cli.main(arguments) == 0
    records = json.loads(path.read_text())
    assert len(records) == 2 * 3 * 2
    for record in records:
        check_record(record)
        assert record["shape"] == "6+2x64" and record["batch"] == 3
        size = 2 * 64 if record["cache_dtype"] == "auto" else 64
        scale = 4 if record["scale"] == "dynamic" else 0
        moved = 3 * record["context"] * 2 * 2 * (size + scale)
        assert record["gb_s"] == pytest.approx(moved / record["us"] / 1e3, rel=0.02, abs=0.02)
        share = record["gb_s"] / record["read_gb_s"]
        assert record["read_share"] == pytest.approx(share, rel=0.02, abs=0.01)
        assert record["copy_gb_s"] > 0
    check_table(capsys.readouterr().out, records)
    assert [record["context"] for record in records] == [40, 100] * 6
    assert {record["scale"] for record in records} == {"none", "static", "dynamic"}
    wrongs = (["--shape", "demo"], ["--writes", "write"], ["--dtype", "float32"])
    for wrong in wrongs:
        assert cli.main(["bench", "decode_attention", "--device", device, *wrong]) != 0


def test_sampler(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "sampler", "--device", device, "--json", str(path), "--read-mb", "4"]
    arguments += ["--batch", "1,3", "--vocab", "1000,4097", "--steps", "2"]
    assert cli.main(arguments) == 0
    records = json.loads(path.read_text())
    assert len(records) == 2 * 2 * len(bench_sampler.CASES)
    for record in records:
        check_record(record)
        assert record["shape"] == f"vocabulary {record['vocab']}"
        assert record["us"] == pytest.approx(1e3 * record["step_ms"], rel=1e-2)
        floor = 4 * record["batch"] * record["vocab"] / record["read_gb_s"] / 1e6
        assert record["floor_ms"] == pytest.approx(floor, rel=0.02, abs=1e-6)
        assert record["floor_us"] > 0
    check_table(capsys.readouterr().out, records)
    assert [record["case"] for record in records[:4]] == list(bench_sampler.CASES)
    for wrong in (["--shape", "demo"], ["--context", "5"], ["--dtype", "bfloat16"]):
        assert cli.main(["bench", "sampler", "--device", device, *wrong]) != 0


@pytest.mark.parametrize("case", bench_sampler.CASES)
def test_the_sampler_that_is_timed_draws(device: str, case: str) -> None:
    """Rows draw tokens of their own, the same ones each time, and such as the case allows."""
    spec = bench_sampler.case_spec(case, 4099)
    with_device = tuning.make_device(device)
    probe = _core.SampleProbe(with_device, 64, 4099, spec, copies=2)
    try:
        probe.time_runs(1)
        tokens = probe.tokens().tolist()
        again = _core.SampleProbe(with_device, 64, 4099, spec, copies=2)
        again.time_runs(1)
        assert again.tokens().tolist() == tokens
        again.close()
    finally:
        probe.close()
        with_device.close()
    assert all(0 <= token < 4099 for token in tokens) and len(set(tokens)) > 32
    if case == "all":
        assert set(tokens) <= set(spec.allowed_token_ids) - set(spec.stop_ids)
        assert not {word[0] for word in spec.bad_words if len(word) == 1} & set(tokens)


def test_the_sampler_s_probe_names_what_is_wrong() -> None:
    with contextlib.closing(tuning.make_device("cpu")) as device:
        spec = bench_sampler.case_spec("greedy", 100)
        for batch, vocab, copies, match in (
            (0, 100, 1, "batch is 0 and copies 1"),
            (1, 100, 0, "copies 0; both must be positive"),
            (1, 0, 1, "vocab_size is 0"),
            (1, 50, 1, "outside"),
        ):
            with pytest.raises(InvalidArgumentError, match=match):
                _core.SampleProbe(device, batch, vocab, spec, copies)
        spec.prompt_len = 0
        with pytest.raises(InvalidArgumentError, match="prompt_len is 0"):
            _core.SampleProbe(device, 1, 100, spec)
        probe = _core.SampleProbe(device, 1, 100, bench_sampler.case_spec("greedy", 100))
        with contextlib.closing(probe):
            assert probe.logits_address(0) != 0
            with pytest.raises(InvalidArgumentError, match="copy 1 is outside"):
                probe.logits_address(1)
            with pytest.raises(InvalidArgumentError, match="on a GPU only"):
                probe.time_reads()


def test_names_of_the_command_are_the_figure_s() -> None:
    assert tuple(bench_kv.FORMATS) == bench_cli.CACHES
    assert bench_kv.LAYOUTS == bench_cli.LAYOUTS and bench_kv.WRITES == bench_cli.WRITES
    assert bench_kv.LAUNCHES == bench_cli.LAUNCHES and bench_sampler.CASES == bench_cli.CASES


@pytest.mark.parametrize("count", [3 * MIB // 8 + 5, 9 * MIB // 8 + 2049])
def test_read_probe_reads_every_byte(native_device: _core.Device, count: int) -> None:
    probe = _core.ReadProbe(native_device, 8 * count + 7)
    assert probe.bytes == 8 * count
    words = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for _ in range(2):
        assert probe.run() > 0
        assert probe.checksum == int(words.sum(dtype=np.uint64))
    probe.close()
    with pytest.raises(InvalidArgumentError, match="bytes"):
        _core.ReadProbe(native_device, 100)
    assert probe_copies(native_device, count)
    with pytest.raises(OutOfMemoryError, match="bytes"):
        _core.ReadProbe(native_device, 1 << 50)


def probe_copies(device: _core.Device, count: int) -> bool:
    """Whether the second half is the first after a copy; the last of an odd count stays."""
    probe = _core.ReadProbe(device, 8 * count)
    assert probe.copy() > 0
    probe.run()
    words = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    half = count // 2
    words[half : 2 * half] = words[:half]
    same = probe.checksum == int(words.sum(dtype=np.uint64))
    probe.close()
    return same


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize(
    ("kv_cache_dtype", "scales"),
    [("auto", "none"), ("fp8_e4m3", "tensor"), ("fp8_e4m3", "token")],
)
def test_backends_of_attention_agree(
    native_device: _core.Device, kv_cache_dtype: str, scales: str, tokens_first: bool
) -> None:
    native, flashinfer = _core.AttentionBackend.NATIVE, _core.AttentionBackend.FLASHINFER
    probe = _core.AttentionProbe(
        native_device, [700, 1, 33, 90], num_heads=8, num_kv_heads=2, head_dim=128,
        kv_cache_dtype=kv_cache_dtype, scales=scales, tokens_first=tokens_first,
    )  # fmt: skip
    if native_device.kind == "cpu" or scales == "token":
        assert not probe.supports(flashinfer)  # it has no kernel for either
    if probe.supports(flashinfer):
        probe.time_runs(native, 1)
        expected = probe.output()
        probe.time_runs(flashinfer, 1)
        size = np.abs(expected).max()
        assert np.abs(probe.output() - expected).max() <= 0.02 * size
    probe.close()


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize(
    ("kv_cache_dtype", "scales", "head_bytes"),
    [("auto", "none", 128), ("fp8_e4m3", "tensor", 64), ("fp8_e4m3", "head", 64),
     ("fp8_e4m3", "token", 68), ("fp8_e5m2", "token", 68)],
)  # fmt: skip
def test_attention_probe(
    native_device: _core.Device,
    kv_cache_dtype: str,
    scales: str,
    head_bytes: int,
    tokens_first: bool,
) -> None:
    options: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    probe = _core.AttentionProbe(
        native_device, [1, 40, 100], kv_cache_dtype=kv_cache_dtype, scales=scales,
        tokens_first=tokens_first, copies=2, **options,
    )  # fmt: skip
    assert probe.read_bytes == 2 * 141 * 2 * head_bytes
    assert probe.supports(_core.AttentionBackend.NATIVE)
    times = probe.time_runs(_core.AttentionBackend.NATIVE, 3)
    assert len(times) == 3
    assert min(times) > 0
    out = probe.output().reshape(3, 4, 64)
    # Queries of a head over one token: its value, the same for all that share it.
    np.testing.assert_array_equal(out[0, 0], out[0, 1])
    assert np.isfinite(out).all()
    assert 0 < np.abs(out[1:]).max() < np.abs(out[0]).max() <= 1.0
    probe.close()
    with pytest.raises(InvalidArgumentError, match="scales"):
        _core.AttentionProbe(
            native_device, [1], kv_cache_dtype=kv_cache_dtype,
            scales="none" if scales != "none" else "token", **options,
        )  # fmt: skip
    with pytest.raises(InvalidArgumentError, match="tokens"):
        _core.AttentionProbe(native_device, [0], **options)


def test_rates_that_do_not_count_say_so() -> None:
    h200 = "NVIDIA H200"
    assert bench.read_counts(h200, 4570.0, 8 << 30) is True
    assert bench.read_counts(h200, 4199.0, 8 << 30) is False
    assert bench.read_counts(h200, 4570.0, 1 << 30) is False  # may have come from a cache
    assert bench.read_counts("cpu: something", 35.0, 1 << 30) is None
    timing = bench.Timing(1, 1024, 2.0, 1.0, 10.0, idle_share=0.004)
    costs = [bench.OpCost("a", 4_000_000, 0)]
    tables = []
    for rate, counts in ((4000.0, False), (4500.0, True)):
        rates = bench.Rates(rate, 790e3, counts)
        record = bench.make_record("decode", "demo", h200, "bfloat16", timing, costs, rates)
        check_record(record)
        assert record["counts"] is counts
        assert record["x_floor"] == pytest.approx(2.0 / (4.0 / rate))
        tables.append(bench.format_table([record]))
    assert tables[0].splitlines()[-1] == "Does not count: the plain read reached 4000.0 GB/s only."
    assert "0.4 %" in tables[0]
    assert "count" not in tables[1]
    # Columns without a value are left out.
    assert "peer" not in tables[1]


def test_time_runs_is_the_time_of_runs(native_device: _core.Device) -> None:
    program = _core.Program("bfloat16")
    x = program.input("x", 32)
    weight = program.weight("weight", False, 32, [("weight", 16)])
    result = program.linear(x, weight)
    program.output(result)
    session = _core.ProgramSession(native_device, program, max_tokens=4)
    session.fill_weight(weight, 0, 0.5)
    session.set_value(x, np.ones((4, 32), np.float32))
    seconds = session.time_runs(1, 4, repeats=3)
    assert len(seconds) == 3
    assert all(0 < value < 1 for value in seconds)
    timed = session.value(result, 4)
    assert np.abs(timed).max() > 0
    session.run(1, 4)
    np.testing.assert_array_equal(session.value(result, 4), timed)
    with pytest.raises(InvalidArgumentError, match="limits"):
        session.time_runs(1, 5)
    session.close()


def test_mix_costs_by_hand() -> None:
    config = ModelConfig.from_values(SMALL)
    # One prompt of 3 tokens with 2 to follow, one of 2 with 4: 4 + 5 tokens computed, 6 drawn.
    costs = {cost.name: cost for cost in bench.mix_costs(config, "bfloat16", [(3, 2), (2, 4)])}
    per_token = 2 * 2 * 64 * 2
    # Read: 3 + 4, and 2 + 3 + 4 + 5; attended: 1 + ... + 4, and 1 + ... + 5.
    assert costs["attention"] == bench.OpCost("attention", 21 * per_token, 25 * 4 * 4 * 64)
    assert costs["embedding"] == bench.OpCost("embedding", 9 * 128 * 2, 0)
    assert costs["logits"] == bench.OpCost("logits", 4 * 1000 * 128 * 2, 2 * 6 * 1000 * 128)
    down = costs["model.layers.1.mlp.down_proj.weight"]
    assert (down.read_bytes, down.operations) == (4 * 128 * 256 * 2, 2 * 9 * 128 * 256)


def test_idle_share_by_hand() -> None:
    assert idle_share([(0, 90), (100, 200), (200, 290)]) == pytest.approx(10 / 290)
    assert idle_share([(5, 25)]) == 0.0


def test_peers_are_set_beside_what_is_the_same(tmp_path: Path) -> None:
    timing = bench.Timing(64, 1024, 4.0, 1.0, 10.0)
    made = {
        shape: bench.make_record("decode", shape, "NVIDIA H200", "bfloat16", timing)
        for shape in ("qwen3-0.6b", "llama3-8b", "qwen3-8b")
    }
    mix = bench.make_record(
        "mix", "llama3-8b", "NVIDIA H200", "bfloat16", bench.Timing(256, 0, 10.0, 1.0, 1.0, 193.0)
    )
    elsewhere = bench.make_record("decode", "llama3-8b", "cpu: a", "bfloat16", timing)
    records = [*made.values(), mix, elsewhere]
    peers = read_peers(ROOT / "benchmarks" / "peers" / "h200_vllm.json")
    add_peers(records, peers)
    for record in records:
        check_record(record)
    assert made["llama3-8b"]["peer_step_ms"] == 7.66
    assert made["llama3-8b"]["times_peer"] == pytest.approx(7.66 / 4.0)
    assert made["qwen3-0.6b"]["peer_step_ms"] == 3.74
    assert (mix["peer_tokens_per_s"], mix["times_peer"]) == (9650.0, 2.0)
    assert "peer_name" not in made["qwen3-8b"]
    assert "peer_name" not in elsewhere
    assert "7.660" in bench.format_table(records)
    # The best of several versions.
    one = bench.make_record(
        "decode", "qwen3-0.6b", "NVIDIA H200", "bfloat16", bench.Timing(1, 1024, 1.0, 1.0, 1.0)
    )
    add_peers([one], peers)
    assert one["peer_step_ms"] == 1.63
    assert "best of" in one["peer_name"]
    path = tmp_path / "peers.json"
    for text in ("", "[]", '{"device": "a", "dtype": "b", "figures": [{"name": "c"}]}'):
        path.write_text(text)
        with pytest.raises(InvalidArgumentError, match="peers"):
            read_peers(path)


def test_committed_peers_have_figures_of_known_shapes() -> None:
    paths = list((ROOT / "benchmarks" / "peers").glob("*.json"))
    assert paths
    for path in paths:
        for peer in read_peers(path):
            assert peer.figure in ("decode", "prefill", "mix")
            assert peer.shape in shapes.NAMES
            assert (peer.context == 0) == (peer.figure == "mix")
        assert json.loads(path.read_text())["source"]


def test_profile_takes_a_step_apart(
    small_dir: Path, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "profile", "--model", str(small_dir), "--device", device]
    arguments += ["--batch", "3", "--context", "40", "--steps", "5", "--read-mb", "1"]
    status = cli.main([*arguments, "--json", str(path)])
    printed = capsys.readouterr()
    if device == "cpu":
        assert status == cli.EXIT_ERROR
        assert "--device cuda" in printed.err
        return
    assert status == 0
    records = {record["op"]: record for record in json.loads(path.read_text())}
    for record in records.values():
        check_record(record)
        assert record["batch"] == 3
    # Each weight's product once a layer, whichever kernels it takes; one step of bookkeeping.
    products = {name for op in records for name in op.split(" + ")}
    assert products >= {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "logits", "attention"}
    assert products >= {"apply", "infer_params", "embedding", "norm", "sample", "advance"}
    assert "other" not in products
    assert records["attention"]["kernels"] >= 2
    assert "5 steps:" in printed.out


def test_fill_kv_random_is_what_attention_reads(models_dir: Path, device: str) -> None:
    def logits(seed: int | None) -> np.ndarray:
        options = RunnerOptions(device=device, max_num_seqs=1, num_kv_blocks=4)
        model = load_model(models_dir / "qwen3-tied", options, progress=False)
        if seed is not None:
            model.runner.fill_kv_random(seed)
        spec = _core.RowSpec()
        spec.token_ids = list(range(20, 40))
        spec.prompt_len = 20
        spec.num_computed = 19
        spec.block_ids = [[1, 2]]
        row, _ = model.runner.add_row(spec)
        model.runner.result(model.runner.execute([(row, 1)]))
        values = model.runner.logits(0)
        model.runner.close()
        model.device.close()
        return values

    empty, first, again, other = logits(None), logits(1), logits(1), logits(2)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - empty).max() > 1e-3
    assert np.abs(first - other).max() > 1e-3


def test_decode_run_counts_its_context(device: str) -> None:
    options = decode_options(device, "bfloat16", [2], [1, 21], 10)
    assert options.max_model_len is not None
    assert options.max_model_len >= (21 + 3 if device == "cpu" else 500)
    model = random_runner(ModelConfig.from_values(SMALL), options)
    for context, counted in ((21, 21), (1, 5)):
        run = DecodeRun(model, 2, context)
        assert run.length == counted
        milliseconds, host_us = run.measure(3)
        assert len(milliseconds) == len(host_us) == 3
        seq_lens = model.runner.infer_params()["seq_lens"]
        assert list(seq_lens[:2]) == [counted + 2] * 2
        assert 0 <= run.idle_share(3) < 1
        run.close()
    assert model.runner.free_rows == 2
    timing = measure_decode(model, 2, 21, 3)
    assert (timing.batch, timing.context) == (2, 21)
    assert timing.step_ms > 0
    assert (timing.idle_share is None) == (device == "cpu")
    assert model.runner.free_rows == 2
    model.runner.close()
    model.device.close()


def test_saved_model_is_a_model(tmp_path: Path, device: str) -> None:
    whole = save_random_model(tmp_path / "whole", SMALL, seed=5)
    shards = save_random_model(tmp_path / "shards", SMALL, seed=5, shard_bytes=300_000)
    other = save_random_model(tmp_path / "other", SMALL, seed=6)
    files = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    places = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    with (
        safe_open(whole / "model.safetensors", "np") as one,
        safe_open(shards / places[name], "np") as part,
        safe_open(other / "model.safetensors", "np") as different,
    ):
        assert set(one.keys()) == set(places)
        values = one.get_tensor(name)
        assert values.dtype == ml_dtypes.bfloat16
        assert values.shape == (256, 128)
        np.testing.assert_array_equal(values, part.get_tensor(name))
        assert (values != different.get_tensor(name)).any()
        values = values.astype(np.float32)
        assert np.abs(values).max() <= RANGE
        assert values.std() == pytest.approx(0.02, rel=0.05)
        norm = one.get_tensor("model.norm.weight").astype(np.float32)
        assert 0.89 < norm.min() < norm.max() < 1.11
    for directory in (whole, shards):
        model = load_model(directory, RunnerOptions(device=device), progress=False)
        model.runner.close()
        model.device.close()
    text = "Grüße, 世界\n"
    tokenizer = Tokenizer.from_dir(whole, 1000)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_saving_is_refused_where_it_would_overwrite_or_not_fit(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(InvalidArgumentError, match="new or empty"):
        save_random_model(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(InvalidArgumentError, match="cannot be written"):
        save_random_model(tmp_path / "precious" / "inside", SMALL)
    with pytest.raises(InvalidArgumentError, match="vocab_size"):
        save_random_model(
            tmp_path / "model", {**SMALL, "vocab_size": 100, "eos_token_id": 2, "bos_token_id": 1}
        )


def test_commit_is_this_checkout_s() -> None:
    found = commit()
    root = Path(bench.__file__).resolve().parent.parent.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert found in (head, f"{head}-dirty")
    else:
        assert found is None


def test_memory_stays_near_the_weights(tmp_path: Path) -> None:
    config = {
        **shapes.shape_config("qwen3-0.6b", 6)[1],
        "vocab_size": 32000,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    directory = save_random_model(tmp_path / "model", config)
    script = f"""{PEAK}
from mrv1 import LLM, SamplingParams
with LLM({str(directory)!r}, device="cpu", max_num_seqs=4, max_model_len=512) as llm:
    llm.generate(["hello"] * 4, SamplingParams(max_tokens=8, ignore_eos=True))
    plan, blocks = llm.model.runner.memory_plan, llm.model.num_kv_blocks
    print(peak(), plan["weights"], plan["per_block"] * blocks)
"""

    def output(code: str) -> list[int]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return [int(part) for part in done.stdout.split()]

    (empty,) = output(PEAK + "print(peak())")
    peak, weights, kv = output(script)
    assert weights > 250e6
    assert peak - empty <= 1.2 * weights + kv, f"{peak=} {empty=} {weights=} {kv=}"
