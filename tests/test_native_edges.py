# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Edges of programs and sessions: sizes that overflow, values without bytes, calls that fail."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mrv1 import _core
from mrv1.errors import InvalidArgumentError, OutOfMemoryError

Wire = Callable[[_core.Program], object]
HEADS = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "scale": 1.0}


def matrix(program: _core.Program, rows: int, cols: int) -> int:
    return program.weight("m", False, cols, [("m", rows)])


def vector(program: _core.Program, size: int) -> int:
    return program.weight("v", True, 1, [("v", size)])


def logits_of(program: _core.Program, cols: int) -> int:
    """Float32 logits [rows that are sampled, cols]."""
    return program.logits(program.input("x", 8), matrix(program, cols, 8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (lambda p: p.add(*[logits_of(p, 8)] * 2), r"\[add\].*one row a token"),
        (lambda p: p.add(p.input("y", 8), logits_of(p, 8)), r"\[add\].*one row a token"),
        (
            lambda p: p.add(*[p.input("y", 8, logits_rows=True)] * 2),
            r"\[add\].*one row a token",
        ),
        (
            lambda p: p.linear(p.input("y", 8), matrix(p, 8, 8), residual=logits_of(p, 8)),
            r"\[linear\].*one row a token",
        ),
        (
            lambda p: p.linear(
                p.input("y", 8, logits_rows=True), matrix(p, 8, 8), residual=p.input("r", 8)
            ),
            r"\[linear\].*one row a token",
        ),
    ],
)
def test_only_token_rows_are_added(dtype: str, wire: Wire, message: str) -> None:
    program = _core.Program(dtype)
    with pytest.raises(InvalidArgumentError, match=message):
        wire(program)
    assert "add" not in program.op_names


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (lambda p: matrix(p, 2**31 + 1, 1), "1 to 2"),
        (lambda p: matrix(p, -1, 1), "1 to 2"),
        (lambda p: matrix(p, 1, 2**31 + 1), "too large"),
        (lambda p: matrix(p, 2**31, 2**31), "too large"),
        (lambda p: p.weight("m", False, 4, [("a", 2**31), ("b", 1)]), "too large"),
        (lambda p: p.weight("m", False, 4, [("a", 2**63 - 1)] * 3), "1 to 2"),
        (lambda p: p.weight("v", True, 2, [("v", 8)]), "must have 1 column"),
        (lambda p: p.input("x", 2**31 + 1), "cols must be in"),
        (lambda p: p.rope_table([1.0] * 129), "at most 128"),
        (lambda p: p.rope_table([1.0, float("nan")]), "finite"),
        (lambda p: p.rope_table([1.0], float("inf")), "factor must be finite"),
        (
            # 3 * 2**28 heads of 16: the columns are 0 in 32 bits.
            lambda p: p.attention(
                p.input("q", 24), num_heads=2**28, num_kv_heads=2**28, head_dim=16, kv_layer=0,
                scale=1.0,
            ),
            "at most 65536",
        ),
        (
            lambda p: p.attention(
                p.input("q", 24), **HEADS, kv_layer=0, q_norm=vector(p, 8), k_norm=vector(p, 8),
                eps=-1.0,
            ),
            "eps",
        ),
    ],
)  # fmt: skip
def test_sizes_are_bounded(wire: Wire, message: str) -> None:
    program = _core.Program("float32")
    with pytest.raises(InvalidArgumentError, match=message):
        wire(program)
    assert program.op_names == []


def test_the_largest_sizes_are_accepted() -> None:
    program = _core.Program("float32")
    matrix(program, 2**31, 1)
    matrix(program, 1, 2**31)
    matrix(program, 2**23, 2**23)
    heads = {"num_heads": 65536, "num_kv_heads": 65536, "head_dim": 256}
    out = program.attention(
        program.input("q", 3 * 2**24), **heads, kv_layer=0, scale=1.0,
        rope=program.rope_table([1.0] * 128),
    )  # fmt: skip
    assert program.live_ranges(1, 1)[out][2] == 2**26


def test_plans_are_bounded() -> None:
    program = _core.Program("float32")
    program.input("x", 2**31)
    assert program.plan(2**15, 1)[0] == 2**48
    for tokens in (2**15 + 1, 2**31, 2**62):
        with pytest.raises(InvalidArgumentError, match="too large"):
            program.plan(tokens, 1)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_requests": 2**16 + 1},
        {"max_tokens": 2**31 - 1},
        {"max_logits": 0},
        {"num_blocks": 2**31 - 1},
        {"block_size": 4097},
        {"max_blocks": 2**24 + 1},
        {"max_position": 2**40},
        {"max_position": -1},
    ],
)
def test_session_limits_are_bounded(native_device: _core.Device, limits: dict[str, int]) -> None:
    program = _core.Program("float32")
    program.rope_table([1.0])
    name = next(iter(limits))
    with pytest.raises(InvalidArgumentError, match=rf"\[session\] {name} must be in"):
        _core.ProgramSession(native_device, program, **limits)


# --- calls that fail leave the program as it was --------------------------------------------------


def state_of(program: _core.Program) -> tuple[list[str], int, str]:
    """Ops, number of values, dump."""
    return program.op_names, len(program.plan(1, 1)[1]), program.dump()


def has_kv_layer(program: _core.Program, device: _core.Device) -> bool:
    """Whether the program has a KV layer 0."""
    session = _core.ProgramSession(device, program)
    try:
        session.cache(0, False)
    except InvalidArgumentError:
        return False
    return True


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rope": 5}, "no rope table 5"),
        ({"rope": 0}, "takes at most 4"),
        ({"q_norm": 9, "k_norm": 9}, "no weight 9"),
        ({"q_norm": 0, "k_norm": 1}, "vector of 8"),
        ({"q_norm": 0, "k_norm": 0, "rope": 5}, "no rope table 5"),
        ({"kv_layer": 65536}, "out of range"),
        ({"window": -1}, "window"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"softcap": -1.0}, "softcap must be positive"),
    ],
)
def test_attention_fails_before_it_changes_the_program(
    native_device: _core.Device, bad: dict[str, int], message: str
) -> None:
    program = _core.Program("float32")
    good_norm, bad_norm = vector(program, 8), vector(program, 7)
    assert (good_norm, bad_norm) == (0, 1)
    program.rope_table([1.0] * 8)
    rope = program.rope_table([1.0] * 4)
    qkv = program.input("qkv", 24)
    before = state_of(program)
    with pytest.raises(InvalidArgumentError, match=message):
        program.attention(qkv, **{"kv_layer": 0, **HEADS, **bad})
    assert state_of(program) == before
    assert not has_kv_layer(program, native_device)
    program.attention(qkv, **HEADS, kv_layer=0, rope=rope, q_norm=0, k_norm=0)
    assert program.op_names == ["qk_norm", "rope", "cache_write", "paged_attention"]
    assert has_kv_layer(program, native_device)


@pytest.mark.parametrize(
    ("residual", "message"),
    [(99, "no value 99"), (1, "differ in shape: 8 and 4")],
)
def test_linear_fails_before_it_changes_the_program(residual: int, message: str) -> None:
    program = _core.Program("float32")
    x, _ = program.input("x", 8), program.input("narrow", 4)
    weight = matrix(program, 8, 8)
    before = state_of(program)
    with pytest.raises(InvalidArgumentError, match=message):
        program.linear(x, weight, residual=residual)
    assert state_of(program) == before
    program.linear(x, weight, residual=x)
    assert program.op_names == ["linear", "add"]


def test_logits_fail_before_they_change_the_program() -> None:
    program = _core.Program("float32")
    x = program.input("x", 8)
    wrong, vectors, right = matrix(program, 16, 9), vector(program, 8), matrix(program, 16, 8)
    before = state_of(program)
    for weight, message in ((wrong, "has 9 columns, x has 8"), (vectors, "'v'"), (99, "99")):
        with pytest.raises(InvalidArgumentError, match=message):
            program.logits(x, weight)
        assert state_of(program) == before
    program.logits(x, right)
    assert program.op_names == ["gather_rows", "linear"]


# --- values that have no bytes of their own -------------------------------------------------------


def gated(dtype: str = "float32") -> tuple[_core.Program, int, int, int]:
    """x, x W^T, silu_mul of it: the last is the output."""
    program = _core.Program(dtype)
    x = program.input("x", 16)
    gate_up = program.linear(x, matrix(program, 64, 16))
    out = program.silu_mul(gate_up)
    program.output(out)
    return program, x, gate_up, out


@pytest.mark.parametrize("fused", [False, True])
def test_values_whose_bytes_are_reused_are_refused(
    native_device: _core.Device, fused: bool
) -> None:
    program, x, gate_up, out = gated()
    if fused:
        assert dict(program.fuse())["linear + gated_mul"] == 1
    session = _core.ProgramSession(native_device, program, max_tokens=3)
    for value in (x, out):
        session.set_value(value, np.ones(3, np.float32))
        assert session.value(value, 1).size == (16 if value == x else 32)
    for use in (
        lambda: session.value(gate_up, 1),
        lambda: session.set_value(gate_up, np.ones(1, np.float32)),
    ):
        with pytest.raises(InvalidArgumentError, match="neither an input nor an output"):
            use()
    for value in (-1, 99):
        with pytest.raises(InvalidArgumentError, match="no value"):
            session.value(value, 1)
    for rows in (-1, 4):
        with pytest.raises(InvalidArgumentError, match=r"outside \[0, 3\]"):
            session.value(out, rows)


def test_values_that_were_fused_away_cannot_be_read() -> None:
    program, _, gate_up, out = gated()
    program.fuse()
    before = state_of(program)
    for use in (program.output, program.silu_mul, program.gather_rows):
        with pytest.raises(InvalidArgumentError, match=f"value {gate_up} was fused away"):
            use(gate_up)
    assert state_of(program) == before
    program.add(out, out)  # what was kept can still be read
    assert program.op_names == ["linear_silu_mul", "add"]


def test_values_that_a_fused_op_still_writes_can_be_read(native_device: _core.Device) -> None:
    program = _core.Program("float32")
    x = program.input("x", 8)
    total = program.add(x, x)
    normed = program.rms_norm(total, vector(program, 8), 1e-6)
    program.output(normed)
    assert dict(program.fuse())["residual + rms_norm"] == 1
    program.output(total)
    session = _core.ProgramSession(native_device, program)
    session.load_weight(0, np.ones(8, np.float32))
    session.set_value(x, np.full(8, 2.0, np.float32))
    session.run(1, 1)
    assert (session.value(total, 1) == 4.0).all()
    assert np.allclose(session.value(normed, 1), 1.0)


def test_the_largest_weight_is_an_out_of_memory_error(native_device: _core.Device) -> None:
    large = _core.Program("float32")
    large.output(large.embedding(matrix(large, 2**23, 2**23)))
    with pytest.raises(OutOfMemoryError, match="weight m"):
        _core.ProgramSession(native_device, large)


def test_dump_names_the_inputs() -> None:
    program, x, _, _ = gated("bfloat16")
    assert program.dump().startswith(f"%{x} = input x : tokens x 16 bfloat16\n")
    dot = program.dump("dot")
    assert f'in{x} [label="x"' in dot and f"in{x} -> op0" in dot and "op0 -> op1" in dot
