# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Profiles: which op a kernel belongs to, and what its time is."""

from __future__ import annotations

import collections
import re
from pathlib import Path

import pytest

from mrv1 import bench, cli, shapes
from mrv1._cupti import Kernel
from mrv1.bench_profile import (
    assign,
    costs_by_label,
    format_profile,
    kernel_kind,
    kernel_kinds,
    label_costs,
    step_ops,
    take_apart,
    weight_label,
)
from mrv1.config import ModelConfig
from mrv1.errors import InternalError
from mrv1.loader import RunnerOptions, wire_model, wire_ranks

CONFIG = ModelConfig.from_values(shapes.shape_config("qwen3-0.6b", 2)[1])

FRONT = ["apply_kernel", "infer_params_kernel", "infer_tokens_kernel", "plan_kernel"]
LAYER = [
    "rms_norm_kernel",
    "mma_kernel",
    "qkv_prepare_kernel",
    "native_attention_kernel",
    "merge_kernel",
    "nvjet_tst_64x8",
    "rms_norm_kernel",
    "linear_skinny_kernel",
    "mma_kernel",
]
BACK = ["rms_norm_kernel", "gather_rows_kernel", "wgmma_kernel", "scan_kernel", "finish_kernel"]
BACK += ["advance_kernel"]
NAMES = [*FRONT, "embedding_kernel", *LAYER, *LAYER, *BACK]
LAYER_LABELS = [
    "norm",
    "qkv_proj",
    "qkv_prepare",
    "attention",
    "attention",
    "o_proj",
    "norm",
    "gate_up_proj",
    "down_proj",
]
LABELS = [
    *["apply", "infer_params", "infer_params", "plan_attention", "embedding"],
    *LAYER_LABELS * 2,
    *["norm", "gather_rows", "logits", "sample", "sample", "advance"],
]


def test_weights_have_the_names_of_tables() -> None:
    stacked = "model.layers.0.self_attn."
    names = [f"{stacked}{part}_proj.weight" for part in "qkv"]
    assert weight_label("+".join(names)) == "qkv_proj"
    assert weight_label("a.mlp.gate_proj.weight+a.mlp.up_proj.weight") == "gate_up_proj"
    assert weight_label("a.mlp.down_proj.weight") == "down_proj"
    assert weight_label("logits") == "logits"


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "llama3-8b"])
def test_every_op_of_a_program_has_a_place(shape: str) -> None:
    config = ModelConfig.from_values(shapes.shape_config(shape, 2)[1])
    for fusion in (True, False):
        ops = step_ops(wire_model(config, "bfloat16", fusion=fusion))
        labels = [op.label for op in ops if op.kind == "linear"]
        layer = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        assert labels == [*layer, *layer, "logits"]
        assert ops[0].label == "apply"
        assert ops[-1].label == "advance"
    costs = costs_by_label(bench.decode_costs(config, "bfloat16", 4, 100))
    assert {"logits", "attention", "norm", *labels} <= costs.keys()
    assert len(costs["norm"]) == 5


def test_kernels_are_assigned_by_their_place() -> None:
    ops = step_ops(wire_model(CONFIG, "bfloat16"))
    assert assign(ops, NAMES) == LABELS
    assert kernel_kind("merge_kernel") is None


def test_experts_are_one_op_of_several_kernels() -> None:
    config = ModelConfig.from_values(shapes.shape_config("qwen3-30b-a3b", 2)[1])
    ops = step_ops(wire_model(config, "bfloat16"))
    layer = [*LAYER[:7], "linear_skinny_kernel", "route_by_count_kernel", "count_kernel"]
    layer += ["place_kernel", "moe_wgmma_kernel", "moe_wgmma_kernel", "sum_kernel"]
    labels = [*LAYER_LABELS[:7], "gate", "moe_route", *["moe_experts"] * 5]
    names = [*FRONT, "embedding_kernel", *layer, *layer, *BACK]
    assert assign(ops, names) == [*LABELS[:5], *labels * 2, *LABELS[-6:]]
    costs = costs_by_label(bench.decode_costs(config, "bfloat16", 1, 100))
    assert {"gate", "moe_experts", "o_proj"} <= costs.keys()
    read = sum(cost.read_bytes for cost in costs["moe_experts"])
    assert read == 2 * 8 * 3 * 2048 * 768 * 2  # eight experts in each of two layers


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_expert_is_no_linear(ranks: int) -> None:
    """The only one, or the only one of a rank."""
    values = {**shapes.shape_config("qwen3-30b-a3b", 1)[1], "num_experts": ranks}
    config = ModelConfig.from_values({**values, "num_experts_per_tok": 1})
    options = RunnerOptions(tensor_parallel_size=ranks, expert_parallel=ranks > 1)
    (program, *_) = wire_ranks(config, "bfloat16", options).programs
    labels = [op.label for op in step_ops(program)]
    assert [label for label in labels if label.endswith("_proj")] == ["qkv_proj", "o_proj"]
    assert labels.count("moe_experts") == 1
    read = [cost.read_bytes for cost in bench.decode_costs(config, "bfloat16", 8, 100)]
    costs = costs_by_label(bench.decode_costs(config, "bfloat16", 8, 100))
    assert "moe_experts" in costs and "gate_up_proj" not in costs and min(read) > 0


def test_products_of_nvfp4_are_of_linears_or_of_experts() -> None:
    config = ModelConfig.from_values(shapes.shape_config("qwen3-30b-a3b", 1)[1])
    ops = step_ops(wire_model(config, "bfloat16"))
    layer = [name.replace("linear_skinny_kernel", "fp4_stream_kernel") for name in LAYER[:7]]
    layer += ["mma_kernel", "route_by_count_kernel"]
    layer += ["place_kernel", "fp4_stream_kernel", "fp4_stream_kernel", "sum_kernel"]
    labels = [*LAYER_LABELS[:7], "gate", "moe_route", *["moe_experts"] * 4]
    names = [*FRONT, "embedding_kernel", *layer, *BACK]
    assert assign(ops, names) == [*LABELS[:5], *labels, *LABELS[-6:]]


def test_what_nccl_carries_is_of_the_collective() -> None:
    """Ranks meet first; tokens go out behind moe_dispatch, and sums come before moe_combine."""
    config = ModelConfig.from_values(shapes.shape_config("qwen3-30b-a3b", 1)[1])
    options = RunnerOptions(data_parallel_size=2, expert_parallel=True)
    ops = step_ops(wire_ranks(config, "bfloat16", options).programs[0])
    messages = ["meeting_kernel", "ncclDevKernel_SendRecv"]
    layer = [*LAYER[:7], "linear_skinny_kernel", "route_by_count_kernel"]
    layer += ["moe_dispatch_kernel", *messages, "moe_wgmma_kernel", "sum_kernel"]
    layer += [*messages, "moe_combine_kernel"]
    labels = [*LAYER_LABELS[:7], "gate", "moe_route", *["moe_dispatch"] * 3]
    labels += [*["moe_experts"] * 2, *["moe_combine"] * 3]
    names = [*FRONT, "embedding_kernel", *layer, *BACK]
    assert assign(ops, names) == [*LABELS[:5], *labels, *LABELS[-6:]]
    columns = ["meeting_kernel", "ncclDevKernel_AllGather_RING_LL"]
    assert kernel_kinds(columns) == ["all_gather"] * 2


def test_what_ranks_send_each_other_is_an_op() -> None:
    options = RunnerOptions(tensor_parallel_size=2)
    ops = step_ops(wire_ranks(CONFIG, "bfloat16", options).programs[0])
    names = [*FRONT, "embedding_kernel", "one_shot_kernel"]
    for _ in range(2):
        names += [*LAYER[:6], "one_shot_kernel", *LAYER[6:], "two_shot_kernel"]
    names += [*BACK[:3], "gather_packets_kernel", *BACK[3:]]
    counts = collections.Counter(assign(ops, names))
    assert (counts["all_reduce"], counts["all_gather"], counts["o_proj"]) == (5, 1, 2)


def test_a_product_of_several_kernels_is_one_op() -> None:
    ops = step_ops(wire_model(CONFIG, "bfloat16"))
    place = NAMES.index("linear_skinny_kernel")
    # One with a kernel of no kind behind it, then a run that cannot be divided.
    names = [*NAMES[: place + 1], "splitk_end", *NAMES[place + 1 :]]
    labels = assign(ops, names)
    assert labels[place : place + 3] == ["gate_up_proj", "gate_up_proj", "down_proj"]
    names[place + 1] = "gemm_end"
    labels = assign(ops, names)
    assert labels[place : place + 3] == ["gate_up_proj + down_proj"] * 3
    assert len(label_costs(labels[place], {"down_proj": [bench.OpCost("a", 1, 1)]})) == 1


def test_an_op_without_a_kernel_is_passed_over() -> None:
    ops = step_ops(wire_model(CONFIG, "bfloat16"))
    for gone in ("qkv_prepare_kernel", "gather_rows_kernel", "plan_kernel"):
        kept = [index for index, name in enumerate(NAMES) if name != gone]
        assert assign(ops, [NAMES[index] for index in kept]) == [LABELS[index] for index in kept]
    # What is in no program belongs to what it follows.
    assert assign(ops, ["memset", *NAMES, "gated_mul_kernel"]) == ["other", *LABELS, "advance"]


def kernel(name: str, start: int, end: int, launch: int, node: int, graph: int = 1) -> Kernel:
    return Kernel(name, start, end, launch, graph, node, (1, 1, 1), (32, 1, 1), 0)


def test_times_add_up_to_the_step() -> None:
    ops = step_ops(wire_model(CONFIG, "bfloat16"))
    kernels = [kernel("outside", 0, 5, 1, 0, graph=0)]
    for launch, begin in ((7, 1_000), (8, 101_000)):
        for node, name in enumerate(NAMES):
            # Each begins a microsecond before the one before it has ended, save one: a gap.
            start = begin + 2_000 * node + (500 if name == "scan_kernel" else -1_000)
            kernels.append(kernel(name, start, begin + 2_000 * (node + 1), launch, node))
    profile = take_apart(ops, kernels[::-1], 0.06)
    count = len(NAMES)
    assert profile.steps == 2
    assert profile.span_us == pytest.approx(2 * count + 1)
    assert profile.gaps_us == pytest.approx(0.5)
    assert profile.between_us == pytest.approx(100 - 2 * count - 1)
    assert sum(op.own_us for op in profile.ops) == pytest.approx(profile.span_us)
    times = {op.label: op for op in profile.ops}
    assert (times["attention"].kernels, times["attention"].busy_us) == (4, pytest.approx(12))
    assert times["attention"].own_us == pytest.approx(8)
    assert times["attention"].names == {"native_attention_kernel": 4, "merge_kernel": 4}
    assert times["apply"].own_us == pytest.approx(3)
    costs = bench.decode_costs(CONFIG, "bfloat16", 8, 1088)
    text = format_profile(profile, costs, bench.Rates(4570.0, 790e3))
    lines = text.splitlines()
    assert len(lines) == 1 + len(profile.ops) + 1
    assert "native_attention_kernel, merge_kernel" in text
    assert lines[-1].startswith("2 steps: 59.0 us")
    with pytest.raises(InternalError, match="graph"):
        take_apart(ops, kernels[:1], 0.06)


@pytest.mark.parametrize(
    ("file", "kind"), [("linear_tiled.cu", "linear"), ("moe_tiled.cu", "moe_experts")]
)
def test_tiled_kernels_say_what_they_multiply(file: str, kind: str) -> None:
    source = (Path(__file__).parents[1] / "src/cuda" / file).read_text(encoding="utf-8")
    (name,) = set(re.findall(r"\b\w*tiled_kernel\b", source))
    assert kernel_kind(name) == kind


def test_stages_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "profile", "--shape", shapes.DEMO, "--device", "cuda"]
    assert cli.main([*arguments, "--pipeline-parallel-size", "2"]) == cli.EXIT_ERROR
    message = capsys.readouterr().err
    assert "--pipeline-parallel-size = 2" in message
    assert "1 for the figure profile" in message
