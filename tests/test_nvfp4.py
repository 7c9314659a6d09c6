# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""NVFP4: conversions bit for bit, and linear layers whose weights are stored so."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mrv1 import _core
from mrv1.errors import InvalidArgumentError, WeightError

Array = np.ndarray
E2M1 = ml_dtypes.float4_e2m1fn
E4M3 = ml_dtypes.float8_e4m3fn
BLOCK = 16
KINDS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def unpack(codes: Array) -> Array:
    """Codes [rows, cols / 2] as one code an element."""
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)


def exact(codes: Array, scales: Array) -> Array:
    """code * block scale as float64 [rows, cols]."""
    values = unpack(codes).view(E2M1).astype(np.float64)
    return values * np.repeat(scales.view(E4M3).astype(np.float64), BLOCK, axis=1)


def quantise(values: Array, dtype: str, global_scale: float) -> tuple[Array, ...]:
    data = np.ascontiguousarray(values.astype(KINDS[dtype])).view(np.uint8).reshape(-1)
    return _core.quantize_nvfp4(data, dtype, values.shape[1], global_scale)


def reference(values: Array, global_scale: np.float32) -> tuple[Array, Array]:
    """Codes, one an element, and block scales of float32 values."""
    blocks = values.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        wanted = largest / (np.float32(6) * global_scale)
        scales = np.minimum(wanted, np.float32(448)).astype(E4M3)
        # A block that is not zero keeps a scale that is not.
        scales = np.where(scales.view(np.uint8) == 0, np.uint8(1), scales.view(np.uint8))
        scales = np.where(largest == 0, np.uint8(0), scales)
        steps = scales.view(E4M3).astype(np.float32)[:, None] * global_scale
        scaled = np.where(steps == 0, np.float32(0), blocks / steps)
    codes = np.clip(scaled, -6, 6).astype(E2M1).view(np.uint8)
    codes = np.where(steps == 0, np.uint8(0), codes)
    return codes.reshape(values.shape), scales.reshape(values.shape[0], -1)


def test_all_codes_times_all_scales_are_exact() -> None:
    codes, scales = np.meshgrid(np.arange(16, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    packed = np.repeat(codes.reshape(-1, 1) * np.uint8(17), BLOCK // 2, axis=1)
    got = _core.dequantize_nvfp4(packed, scales.reshape(-1, 1), BLOCK, 1.0)
    with np.errstate(invalid="ignore"):
        expected = exact(packed, scales.reshape(-1, 1))
    np.testing.assert_array_equal(got, expected)
    finite = np.isfinite(expected)
    assert finite.sum() == (256 - 2) * 16 * BLOCK
    assert (got.astype(ml_dtypes.bfloat16).astype(np.float32) == got)[finite].all()
    assert (np.signbit(got) == np.signbit(expected))[finite].all()


MIDDLES = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -5.0, -0.0])


def resized(values: Array) -> Array:
    return np.resize(values, (4, BLOCK - 1))


# Blocks whose scale is 1, as they hold a 6: what is left is the conversion of single values.
@given(values=hnp.arrays(np.float32, (4, BLOCK - 1), elements=st.floats(-6, 6, width=32)))
@example(resized(MIDDLES))
@example(resized(np.nextafter(MIDDLES, np.float32(9))))
@example(resized(np.nextafter(MIDDLES, np.float32(-9))))
def test_values_go_to_the_nearest_code_and_ties_to_the_even_one(values: Array) -> None:
    values = np.concatenate([values, np.full((4, 1), 6, np.float32)], axis=1)
    codes, scales, *_ = quantise(values, "float32", 1.0)
    assert (scales.view(E4M3).astype(np.float32) == 1).all()
    np.testing.assert_array_equal(unpack(codes), values.astype(E2M1).view(np.uint8))


@given(
    values=hnp.arrays(np.float32, (3, 2 * BLOCK), elements=st.floats(-1e4, 1e4, width=32)),
    global_scale=st.sampled_from([1.0, 2.0**-9, 0.3, 3e-5, 1e-38, 0.0]),
    dtype=st.sampled_from(sorted(KINDS)),
)
# Blocks below the smallest scale, and far above the largest.
@example(np.full((3, 2 * BLOCK), 1e-6, np.float32), 1.0, "float32")
@example(np.full((3, 2 * BLOCK), 1e4, np.float32), 2.0**-9, "float32")
def test_quantisation_has_the_bits_of_its_definition(
    values: Array, global_scale: float, dtype: str
) -> None:
    held = values.astype(KINDS[dtype]).astype(np.float32)
    codes, scales, squared_errors, squares, largest = quantise(values, dtype, global_scale)
    expected, expected_scales = reference(held, np.float32(global_scale))
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(unpack(codes), expected)
    back = _core.dequantize_nvfp4(codes, scales, values.shape[1], global_scale)
    np.testing.assert_array_equal(
        back, exact(codes, scales).astype(np.float32) * np.float32(global_scale)
    )
    errors = (back - held).astype(np.float64)
    assert squared_errors == pytest.approx((errors**2).sum(), rel=1e-9)
    assert squares == pytest.approx((held.astype(np.float64) ** 2).sum(), rel=1e-9)
    assert largest == np.abs(back - held).max()


def test_a_global_scale_leaves_no_block_saturated() -> None:
    values = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    largest = _core.largest_magnitude(values.view(np.uint8).reshape(-1), "float32")
    assert largest == np.abs(values).max()
    scale = _core.nvfp4_global_scale(largest)
    _, scales, squared_errors, squares, _ = quantise(values, "float32", scale)
    assert scales.view(E4M3).astype(np.float32).max() == 448
    assert 0.08 < (squared_errors / squares) ** 0.5 < 0.11


def test_a_value_that_is_not_a_number_is_seen() -> None:
    values = np.float32([1, np.nan, 2])
    assert np.isnan(_core.largest_magnitude(values.view(np.uint8), "float32"))
    values[1] = -np.inf
    assert _core.largest_magnitude(values.view(np.uint8), "float32") == np.inf


# --- linear ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Stored:
    """A random weight in NVFP4 and its exact values, float64 [rows, cols]."""

    codes: Array
    scales: Array
    global_scales: list[float]
    values: Array

    @classmethod
    def random(cls, rng: np.random.Generator, segments: list[int], cols: int) -> Stored:
        rows = sum(segments)
        codes = rng.integers(0, 256, (rows, cols // 2), dtype=np.uint8)
        scales = rng.uniform(0.02, 2, (rows, cols // BLOCK)).astype(E4M3).view(np.uint8)
        global_scales = [float(np.float32(each)) for each in rng.uniform(0.01, 1, len(segments))]
        rows_scale = np.repeat(global_scales, segments)[:, None]
        return cls(codes, scales, global_scales, exact(codes, scales) * rows_scale)


def wire(dtype: str, segments: list[int], cols: int) -> tuple[_core.Program, int, int]:
    program = _core.Program(dtype)
    x = program.input("x", cols)
    parts = [(f"w{place}", rows) for place, rows in enumerate(segments)]
    weight = program.weight("w", False, cols, parts, nvfp4=True)
    return program, x, weight


def load(session: _core.ProgramSession, weight: int, stored: Stored) -> None:
    ones = [1.0] * len(stored.global_scales)
    session.load_nvfp4(weight, stored.codes, stored.scales, stored.global_scales, ones)


def rounded(values: Array, dtype: str) -> Array:
    return values.astype(np.float32).astype(KINDS[dtype]).astype(np.float64)


def check_close(actual: Array, expected: Array, terms: Array, dtype: str) -> None:
    """Errors of a rounding to the dtype, and of sums in float32 whose terms add up to `terms`."""
    rounding = {"float32": 2.0**-23, "bfloat16": 2.0**-8}[dtype]
    allowed = rounding * np.abs(expected) + 1e-6 * terms
    assert (np.abs(actual - expected) <= allowed).all(), (np.abs(actual - expected) / allowed).max()


@given(
    segments=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    blocks=st.integers(1, 40),
    tokens=st.integers(1, 70),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    with_bias=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
@example([128], 64, 200, "bfloat16", False, False, 0)
@example([5, 11], 33, 3, "bfloat16", True, False, 0)
@example([48], 17, 1, "float32", True, True, 0)
def test_linear_against_float64(
    native_device: _core.Device,
    segments: list[int],
    blocks: int,
    tokens: int,
    dtype: str,
    with_bias: bool,
    wide: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    rows, cols = sum(segments), blocks * BLOCK
    program, x, weight = wire(dtype, segments, cols)
    stored = Stored.random(rng, segments, cols)
    bias = program.weight("b", True, 1, [("b", rows)]) if with_bias else -1
    out = program.linear(x, weight, bias=bias, wide=wide)
    program.output(out)
    session = _core.ProgramSession(native_device, program, max_tokens=tokens)
    load(session, weight, stored)
    given_x = rng.standard_normal((tokens, cols))
    added = rng.standard_normal(rows)
    if with_bias:
        session.load_weight(bias, added.astype(np.float32))
    session.set_value(x, given_x.astype(np.float32))
    session.set_value(out, np.full((tokens, rows), np.nan, np.float32))
    session.run(1, tokens)
    held = rounded(given_x, dtype)
    expected, terms = held @ stored.values.T, np.abs(held) @ np.abs(stored.values.T)
    if with_bias:
        expected += added.astype(np.float32)
        terms += np.abs(added)
    check_close(session.value(out, tokens), expected, terms, "float32" if wide else dtype)
    session.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("half", "cols"), [(32, 64), (128, 512), (48, 272)])
@pytest.mark.parametrize("tokens", [1, 19])
def test_gate_and_up_may_differ_in_their_global_scales(
    native_device: _core.Device, dtype: str, half: int, cols: int, tokens: int
) -> None:
    rng = np.random.default_rng(half)
    stored = Stored.random(rng, [half, half], cols)
    stored.values[half:] *= 64
    stored.global_scales[1] *= 64
    given_x = rng.standard_normal((tokens, cols)).astype(np.float32)
    results = []
    for fuse in (False, True):
        program, x, weight = wire(dtype, [half, half], cols)
        product = program.linear(x, weight)
        out = program.silu_mul(product)
        program.output(out)
        if fuse:
            program.fuse()
            assert program.op_names == ["linear_silu_mul"]
        session = _core.ProgramSession(native_device, program, max_tokens=tokens)
        load(session, weight, stored)
        session.set_value(x, given_x)
        session.run(1, tokens)
        results.append(session.value(out, tokens))
        session.close()
    np.testing.assert_array_equal(*results)
    parts = rounded(given_x, dtype) @ stored.values.T
    gate, up = parts[:, :half], parts[:, half:]
    expected = gate / (1 + np.exp(-gate)) * up
    error = np.linalg.norm(results[0] - expected) / np.linalg.norm(expected)
    assert error < {"float32": 2e-6, "bfloat16": 1e-2}[dtype]


@pytest.mark.parametrize(("rows", "cols"), [(80, 96), (33, 1040)])
def test_a_row_does_not_depend_on_its_batch(
    native_device: _core.Device, rows: int, cols: int
) -> None:
    rng = np.random.default_rng(rows)
    stored = Stored.random(rng, [rows], cols)
    program, x, weight = wire("bfloat16", [rows], cols)
    out = program.linear(x, weight)
    program.output(out)
    session = _core.ProgramSession(native_device, program, max_tokens=256)
    session.set_options(batch_invariant=True)
    load(session, weight, stored)
    given_x = rng.standard_normal((256, cols)).astype(np.float32)
    whole = None
    for tokens in (256, 193, 65, 20, 7, 1):
        session.set_value(x, given_x[:tokens])
        session.run(1, tokens)
        got = session.value(out, tokens)
        whole = got if whole is None else whole
        np.testing.assert_array_equal(got, whole[:tokens])
    session.close()


def test_scales_that_are_not_numbers_are_refused(native_device: _core.Device) -> None:
    program, x, weight = wire("bfloat16", [16], 16)
    program.output(program.linear(x, weight))
    session = _core.ProgramSession(native_device, program)
    stored = Stored.random(np.random.default_rng(0), [16], 16)
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(WeightError, match="global scale of 'w0' is .*finite"):
            session.load_nvfp4(weight, stored.codes, stored.scales, [wrong], [1.0])
        with pytest.raises(WeightError, match="scale of activations of 'w0' is .*finite"):
            session.load_nvfp4(weight, stored.codes, stored.scales, [1.0], [wrong])
    with pytest.raises(InvalidArgumentError, match="needs 128 bytes of codes and 16 of block"):
        session.load_nvfp4(weight, stored.codes[:8], stored.scales, [1.0], [1.0])
    session.close()


def test_what_cannot_be_in_nvfp4_is_refused() -> None:
    program = _core.Program("bfloat16")
    with pytest.raises(InvalidArgumentError, match="24 columns, must be a multiple of 16"):
        program.weight("w", False, 24, [("w", 8)], nvfp4=True)
    with pytest.raises(InvalidArgumentError, match="vector and cannot be NVFP4"):
        program.weight("w", True, 1, [("w", 8)], nvfp4=True)
    with pytest.raises(InvalidArgumentError, match="columns from 8 on"):
        program.weight("w", False, 16, [("w", 8)], slices=[(8, 0, 32, 8)], nvfp4=True)
    table = program.weight("w", False, 16, [("w", 8)], nvfp4=True)
    with pytest.raises(InvalidArgumentError, match="'w' must not be NVFP4"):
        program.embedding(table)
