# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Linears with NVFP4 weights at sizes that GPU kernels cut in different ways."""

from __future__ import annotations

import numpy as np
import pytest

from mrv1 import _core
from test_nvfp4 import E4M3, Stored, exact, load, rounded, wire

TOKENS = (1, 2, 7, 8, 9, 16, 17, 32, 33, 129)


def product(
    device: _core.Device,
    stored: Stored,
    segments: list[int],
    given: np.ndarray,
    *,
    gated: bool = False,
    bias: np.ndarray | None = None,
    invariant: bool = False,
) -> np.ndarray:
    """Of bfloat16 rows."""
    cols = stored.codes.shape[1] * 2
    program, x, weight = wire("bfloat16", segments, cols)
    rows = sum(segments)
    added = program.weight("b", True, 1, [("b", rows)]) if bias is not None else -1
    out = program.linear(x, weight, bias=added)
    if gated:
        out = program.silu_mul(out)
    program.output(out)
    if gated:
        assert dict(program.fuse())["linear + gated_mul"] == (bias is None)
    session = _core.ProgramSession(device, program, max_tokens=len(given))
    session.set_options(batch_invariant=invariant)
    load(session, weight, stored)
    if bias is not None:
        session.load_weight(added, bias)
    session.set_value(x, given)
    session.run(1, len(given))
    result = session.value(out, len(given))
    session.close()
    return result


def expected_product(
    stored: Stored, given: np.ndarray, gated: bool, bias: np.ndarray | None = None
) -> np.ndarray:
    sums = rounded(given, "bfloat16") @ stored.values.T
    if bias is not None:
        sums += bias
    if not gated:
        return sums
    gate, up = np.split(rounded(sums, "bfloat16"), 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def check_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Each row, within what rounding its elements to bfloat16 twice may change."""
    error = np.linalg.norm(actual - expected, axis=-1)
    assert (error <= 2.0**-8 * np.linalg.norm(expected, axis=-1)).all(), error.max()


@pytest.mark.parametrize(
    ("rows", "cols", "gated"),
    [
        (16, 144, False),
        (1040, 272, False),
        (4096, 128, False),
        (6144, 80, False),
        (8192, 272, False),
        (64, 1040, True),
        (8448, 208, True),
    ],
)
def test_few_rows(native_device: _core.Device, rows: int, cols: int, gated: bool) -> None:
    rng = np.random.default_rng(rows)
    segments = [rows // 2, rows // 2] if gated else [rows]
    stored = Stored.random(rng, segments, cols)
    given = rng.standard_normal((max(TOKENS), cols)).astype(np.float32)
    expected = expected_product(stored, given, gated)
    program, x, weight = wire("bfloat16", segments, cols)
    out = program.linear(x, weight)
    if gated:
        out = program.silu_mul(out)
    program.output(out)
    assert dict(program.fuse())["linear + gated_mul"] == gated
    session = _core.ProgramSession(native_device, program, max_tokens=max(TOKENS))
    load(session, weight, stored)
    for tokens in TOKENS:
        session.set_value(x, given[:tokens])
        session.run(1, tokens)
        check_close(session.value(out, tokens), expected[:tokens])
    session.close()


@pytest.mark.parametrize("segments", [[256], [128, 128], [96, 48, 112], [7, 9]])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("equal_scales", [False, True])
def test_many_rows(
    native_device: _core.Device, segments: list[int], with_bias: bool, equal_scales: bool
) -> None:
    rng = np.random.default_rng(len(segments))
    stored = Stored.random(rng, segments, 528)
    if equal_scales:
        own = np.repeat(stored.global_scales, segments)[:, None]
        stored.values *= stored.global_scales[0] / own
        stored.global_scales = stored.global_scales[:1] * len(segments)
    bias = rng.standard_normal(sum(segments)).astype(np.float32) if with_bias else None
    given = rng.standard_normal((307, 528)).astype(np.float32)
    for gated in (False, segments == [128, 128]):
        result = product(native_device, stored, segments, given, gated=gated, bias=bias)
        check_close(result, expected_product(stored, given, gated, bias))


@pytest.mark.parametrize("gated", [False, True])
def test_a_weight_larger_than_its_copy_may_be(
    device: str, native_device: _core.Device, gated: bool
) -> None:
    """Copies in bfloat16 take 256 MiB at most. Both ways to compute it must agree."""
    rows, cols = (16416, 8192) if device == "cuda" else (416, 256)
    rng = np.random.default_rng(1)
    stored = Stored(
        codes=rng.integers(0, 256, (rows, cols // 2), dtype=np.uint8),
        scales=rng.integers(0x20, 0x30, (rows, cols // 16), dtype=np.uint8),
        global_scales=[0.5, 0.25],
        values=np.empty(0),
    )
    segments = [rows // 2, rows // 2]
    given = rng.standard_normal((270, cols)).astype(np.float32)
    copied = product(native_device, stored, segments, given, gated=gated)
    streamed = product(native_device, stored, segments, given, gated=gated, invariant=True)
    assert np.abs(streamed).max() > 0
    check_close(copied, streamed.astype(np.float64))


def test_every_block_scale(native_device: _core.Device) -> None:
    """Each of the 127 with each code, exactly: one column of x at a time."""
    scales = np.repeat(np.arange(127, dtype=np.uint8)[:, None], 2, axis=1)
    codes = np.tile(np.uint8([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]), (127, 2))
    stored = Stored(codes, scales, [1.0], exact(codes, scales))
    given = np.eye(32, dtype=np.float32)
    np.testing.assert_array_equal(
        product(native_device, stored, [127], given), stored.values.T.astype(np.float32)
    )
    assert np.isfinite(scales.view(E4M3).astype(np.float32)).all()


def test_a_weight_is_loaded_again(native_device: _core.Device) -> None:
    rng = np.random.default_rng(3)
    program, x, weight = wire("bfloat16", [24, 40], 272)
    out = program.linear(x, weight)
    program.output(out)
    session = _core.ProgramSession(native_device, program, max_tokens=4)
    given = rng.standard_normal((4, 272)).astype(np.float32)
    session.set_value(x, given)
    for _ in range(2):
        stored = Stored.random(rng, [24, 40], 272)
        load(session, weight, stored)
        session.run(1, 4)
        check_close(session.value(out, 4), expected_product(stored, given, False))
    session.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("hidden", "width"), [(64, 48), (128, 16), (272, 80), (512, 192)])
@pytest.mark.parametrize("tokens", [1, 9, 70, 260])
def test_experts(
    native_device: _core.Device, dtype: str, hidden: int, width: int, tokens: int
) -> None:
    """Many rows take other kernels than few, and those of batch-invariant steps."""
    count, top_k = 5, 2
    rng = np.random.default_rng(hidden)
    program = _core.Program(dtype)
    x = program.input("x", hidden)
    experts = program.input("experts", top_k, dtype="int32")
    shares = program.input("shares", top_k, dtype="float32")
    halves = [(f"{expert}.{half}", width) for expert in range(count) for half in ("gate", "up")]
    gate_up = program.weight("gate_up", False, hidden, halves, matrices=count, nvfp4=True)
    rows = [(f"{expert}.down", hidden) for expert in range(count)]
    down = program.weight("down", False, width, rows, matrices=count, nvfp4=True)
    out = program.moe_experts(x, experts, shares, gate_up, down)
    program.output(out)
    session = _core.ProgramSession(native_device, program, max_tokens=tokens)
    first = Stored.random(rng, [width] * 2 * count, hidden)
    second = Stored.random(rng, [hidden] * count, width)
    load(session, gate_up, first)
    load(session, down, second)
    given = rng.standard_normal((tokens, hidden)) / hidden
    chosen = np.array([rng.permutation(count)[:top_k] for _ in range(tokens)])
    given_shares = rng.random((tokens, top_k), np.float32)
    for value, data in ((x, given), (experts, chosen), (shares, given_shares)):
        session.set_value(value, data.astype(np.float32))
    sums = rounded(given, dtype) @ first.values.T
    gate, up = np.moveaxis(sums.reshape(tokens, count, 2, width), 2, 0)
    inner = gate / (1 + np.exp(-gate)) * up
    terms = np.einsum("tew,ehw->teh", inner, second.values.reshape(count, hidden, width))
    picked = np.take_along_axis(terms, chosen[:, :, None], axis=1)
    expected = (given_shares[:, :, None] * picked).sum(axis=1)
    allowed = {"float32": 5e-6, "bfloat16": 1e-2}[dtype]
    for invariant in (False, True):
        session.set_options(batch_invariant=invariant)
        session.run(1, tokens)
        error = np.linalg.norm(session.value(out, tokens) - expected, axis=-1)
        assert (error <= allowed * np.linalg.norm(expected, axis=-1)).all()
    session.close()
