# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Programs: wiring checks, the fusion pass, the buffer plan, cuts and dumps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrv1 import _core
from mrv1.config import ModelConfig
from mrv1.errors import InvalidArgumentError
from mrv1.loader import wire_model


@pytest.fixture
def config(models_dir: Path) -> ModelConfig:
    return ModelConfig.from_dir(models_dir / "qwen3-tied")


def test_wiring_has_one_op_a_line(config: ModelConfig) -> None:
    program = wire_model(config, "float32", fusion=False)
    per_layer = [
        "rms_norm", "linear", "qk_norm", "rope", "cache_write", "paged_attention", "linear", "add",
        "rms_norm", "linear", "silu_mul", "linear", "add",
    ]  # fmt: skip
    expected = ["embedding", *per_layer, *per_layer, "rms_norm", "gather_rows", "linear"]
    assert program.op_names == expected
    text = program.dump()
    assert text.count("paged_attention(") == 2
    assert "model.layers.1.mlp.gate_proj.weight+model.layers.1.mlp.up_proj.weight" in text
    dot = program.dump("dot")
    assert dot.startswith("digraph") and dot.count("->") > 20
    with pytest.raises(InvalidArgumentError, match="text or dot"):
        program.dump("svg")


def test_fusion_replaces_each_pattern(config: ModelConfig) -> None:
    program = wire_model(config, "float32", fusion=False)
    counts = dict(program.fuse())
    # The first norm reads the embedding, not a sum; every other one is fused with its residual.
    assert counts == {
        "qk_norm + rope + cache_write": 2,
        "rope + cache_write": 0,
        "residual + rms_norm": 4,
        "linear + gated_mul": 2,
        "linear + moe_route": 0,
    }
    assert "add" not in program.op_names and "silu_mul" not in program.op_names
    assert sum(dict(program.fuse()).values()) == 0  # nothing is left to do


def test_llama_fuses_without_qk_norm(models_dir: Path) -> None:
    config = ModelConfig.from_dir(models_dir / "llama3-tied")
    counts = dict(wire_model(config, "float32", fusion=False).fuse())
    assert counts["rope + cache_write"] == config.num_hidden_layers


def test_logits_are_capped_in_place() -> None:
    programs = []
    for softcap in (0.0, 30.0):
        program = _core.Program("bfloat16")
        head = program.weight("head", False, 16, [("head", 1000)])
        program.logits(program.input("x", 16), head, softcap)
        programs.append(program)
    assert programs[1].op_names == [*programs[0].op_names, "soft_cap"]
    assert programs[0].plan(8, 4)[0] == programs[1].plan(8, 4)[0]


def test_fusion_keeps_values_that_are_read_elsewhere() -> None:
    program = _core.Program("float32")
    weight = program.weight("w", False, 16, [("w", 64)])
    x = program.input("x", 16)
    gate_up = program.linear(x, weight)
    program.output(program.silu_mul(gate_up))
    program.output(gate_up)  # still wanted: fusing would lose it
    assert dict(program.fuse())["linear + gated_mul"] == 0


def test_cuts_stand_at_attention_stage_and_collective_marks(config: ModelConfig) -> None:
    for fusion in (False, True):
        program = wire_model(config, "float32", fusion=fusion)
        cuts = program.cuts
        kinds = [kind for kind, _ in cuts]
        assert kinds.count("attention") == 2
        assert kinds.count("stage") == 2
        assert kinds.count("collective") == 4
        for kind, op in cuts:
            if kind == "attention":
                assert program.op_names[op] == "paged_attention"
            if kind == "collective":
                assert program.op_names[op - 1] == "linear"


def values_overlap(program: _core.Program, max_tokens: int, max_logits: int) -> tuple[int, int]:
    """Checks the plan; returns its bytes and the bytes if nothing were shared."""
    arena, offsets = program.plan(max_tokens, max_logits)
    ranges = program.live_ranges(max_tokens, max_logits)
    last = len(program.op_names)
    outputs = max(i for i, (first, _, _) in enumerate(ranges) if first >= 0)
    live = []
    for value, ((first, end, size), offset) in enumerate(zip(ranges, offsets, strict=True)):
        if first < 0 and end < 0:
            continue  # fused away
        assert offset >= 0 and offset % 256 == 0 and offset + size <= arena
        live.append((first, last if value == outputs else end, offset, size))
    for i, (first, end, offset, size) in enumerate(live):
        for other_first, other_end, other_offset, other_size in live[:i]:
            in_time = first < other_end and other_first < end
            in_space = offset < other_offset + other_size and other_offset < offset + size
            assert not (in_time and in_space)
    return arena, sum(size for _, _, _, size in live)


@given(tokens=st.integers(1, 3000), rows=st.integers(1, 300), fusion=st.booleans())
def test_plan_shares_no_bytes_between_live_values(tokens: int, rows: int, fusion: bool) -> None:
    models = Path(__file__).parent / "data" / "models"
    config = ModelConfig.from_dir(models / "qwen3-tied")
    program = wire_model(config, "bfloat16", fusion=fusion)
    arena, unshared = values_overlap(program, tokens, rows)
    assert arena < unshared


def test_plan_is_exact_and_linear_in_its_limits(config: ModelConfig) -> None:
    program = wire_model(config, "bfloat16", fusion=True)
    sizes = [program.plan(256 * n, 256 * n)[0] for n in (1, 2, 4)]
    assert sizes[1] == 2 * sizes[0] and sizes[2] == 4 * sizes[0]


def test_memory_plan_adds_up(config: ModelConfig, native_device: _core.Device) -> None:
    program = wire_model(config, "float32", fusion=True)
    native = _core.RunnerConfig()
    native.max_num_seqs, native.max_num_batched_tokens = 4, 64
    native.max_model_len, native.num_blocks = 128, 9
    plan = _core.ModelRunner.plan_memory(program, native, native_device)
    heads, dim = config.num_key_value_heads, config.head_dim
    assert plan["per_block"] == 2 * 16 * heads * dim * 4 * config.num_hidden_layers
    assert plan["activations"] >= program.plan(64, 4)[0]
    runner = _core.ModelRunner(native_device, program, native)
    assert runner.memory_plan == plan
    runner.close()


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (lambda p, x, w: p.linear(x, p.weight("m", False, 9, [("m", 3)])), "9 columns, x has 8"),
        (lambda p, x, w: p.rms_norm(x, p.weight("v", True, 1, [("v", 7)]), 1e-6), "8 elements"),
        (lambda p, x, w: p.rms_norm(x, w, 1e-6), "must be a vector"),
        (lambda p, x, w: p.add(x, p.input("y", 4)), "differ in shape"),
        (lambda p, x, w: p.silu_mul(p.input("y", 3)), "even number"),
        (lambda p, x, w: p.gelu_mul(p.input("y", 3)), r"\[gelu_mul\].*even number"),
        (lambda p, x, w: p.embedding(w, float("inf")), "scale must be finite"),
        (lambda p, x, w: p.weight("m", False, 8, [("m", 8)], 1.0), "must have offset 0"),
        (lambda p, x, w: p.weight("v", True, 1, [("v", 8)], float("nan")), "offset of 'v'"),
        (lambda p, x, w: p.logits(x, w, -1.0), "softcap must be positive"),
        (lambda p, x, w: p.add(x, 99), "no value 99"),
        (lambda p, x, w: p.linear(x, 99), "no weight 99"),
        (lambda p, x, w: p.embedding(-1), "no weight -1"),
        (lambda p, x, w: p.weight("w", False, 4, []), "is empty"),
        (lambda p, x, w: p.rope_table([]), "inv_freq is empty"),
        (
            lambda p, x, w: p.attention(
                x, num_heads=3, num_kv_heads=2, head_dim=8, kv_layer=0, scale=1.0
            ),
            "do not divide",
        ),
        (
            lambda p, x, w: p.attention(
                x, num_heads=1, num_kv_heads=1, head_dim=12, kv_layer=0, scale=1.0
            ),
            "multiple of 8",
        ),
        (
            lambda p, x, w: p.attention(
                x, num_heads=1, num_kv_heads=1, head_dim=8, kv_layer=0, scale=1.0
            ),
            "the heads need 24",
        ),
        (
            lambda p, x, w: p.attention(
                p.input("q", 24), num_heads=1, num_kv_heads=1, head_dim=8, kv_layer=0, scale=1.0,
                q_norm=0,
            ),
            "go together",
        ),
    ],
)  # fmt: skip
def test_wiring_errors_name_the_op(wire, message: str) -> None:  # type: ignore[no-untyped-def]
    program = _core.Program("float32")
    weight = program.weight("w", False, 8, [("w", 8)])
    x = program.input("x", 8)
    with pytest.raises(InvalidArgumentError, match=message):
        wire(program, x, weight)


def test_program_dtype_is_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="float32 or bfloat16"):
        _core.Program("float16")
    with pytest.raises(InvalidArgumentError, match="not one of"):
        _core.Program("int3")


def test_rope_frequencies_of_llama3_have_three_bands(models_dir: Path) -> None:
    from mrv1.rope import rope_frequencies

    config = ModelConfig.from_dir(models_dir / "llama3-tied")
    scaled = rope_frequencies(config.rope, config.head_dim)
    plain = 1.0 / config.rope.theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    ratio = scaled / plain
    assert (ratio > 0.999).any()
    assert np.isclose(ratio, 1 / config.rope.factor, rtol=1e-3).any()
    assert ((ratio < 0.98) & (ratio > 1.02 / config.rope.factor)).any()
