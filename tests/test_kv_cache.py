# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Cache writes: every layout, dtype and kind of scale, bit for bit against a plain reference."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_arrays import Exported, Storage, contiguous, in_stream_of, stored
from mrv1 import _core, ops
from mrv1.errors import InvalidArgumentError
from mrv1.ops._native import forget

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
BF16 = np.dtype(ml_dtypes.bfloat16)
FORMATS = {
    "fp8_e4m3": (np.dtype(ml_dtypes.float8_e4m3fn), np.float32(448)),
    "fp8_e5m2": (np.dtype(ml_dtypes.float8_e5m2), np.float32(57344)),
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
POISON = 0xA5
FAST_DIMS = (64, 80, 96, 128, 256)
KINDS = ("none", "tensor", "head", "token")


def encode(values: np.ndarray, inverse: np.ndarray, kv_cache_dtype: str) -> np.ndarray:
    """Codes of float32 values times inverse scales: ml_dtypes rounds, here it saturates."""
    dtype, most = FORMATS[kv_cache_dtype]
    with np.errstate(all="ignore"):
        scaled = np.clip(values * inverse, -most, most)
        codes: np.ndarray = scaled.astype(dtype).view(np.uint8)
    codes[np.isnan(scaled)] = 0x7F
    return codes


def token_scales(values: np.ndarray, kv_cache_dtype: str) -> np.ndarray:
    """A scale of each head of each token."""
    magnitudes = np.where(np.isfinite(values), np.abs(values), np.float32(0))
    scales: np.ndarray = np.maximum(
        magnitudes.max(-1) / FORMATS[kv_cache_dtype][1], np.float32(2.0**-126)
    )
    return scales


def special_values(dtype: np.dtype, kv_cache_dtype: str) -> np.ndarray:
    """What rounding, saturation and scales must get right, in units of a scale of 1."""
    format_dtype, most = FORMATS[kv_cache_dtype]
    with np.errstate(all="ignore"):
        codes = np.arange(256, dtype=np.uint8).view(format_dtype).astype(np.float32)
        finite = np.unique(codes[np.isfinite(codes)])
        ties = (finite[1:] + finite[:-1]) / 2
        exact = np.concatenate([finite, ties, [most * np.float32(1.0625), np.float32(1e30)]])
        near = np.concatenate([exact, np.nextafter(exact, -np.inf), np.nextafter(exact, np.inf)])
        limits = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-38, 3e38])
        tiny = ml_dtypes.finfo(dtype)
        own = np.float32([tiny.max, tiny.smallest_subnormal, tiny.tiny, -tiny.max])
        return np.concatenate([near, limits, own]).astype(np.float32).astype(dtype)


def drawn_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype,
                 kv_cache_dtype: str) -> np.ndarray:  # fmt: skip
    """Some ordinary, some of any bits, some special."""
    count = int(np.prod(shape))
    size = dtype.itemsize
    kind = rng.integers(0, 4, count)
    ordinary = (rng.standard_normal(count) * 10.0 ** rng.uniform(-3, 3)).astype(np.float32)
    values = ordinary.astype(dtype)
    bits = rng.integers(0, 2 ** (8 * size), count, dtype=np.uint64).astype(UNSIGNED[size])
    values = np.where(kind == 1, bits.view(dtype), values)
    special = special_values(dtype, kv_cache_dtype)
    values = np.where(kind == 2, special[rng.integers(0, len(special), count)], values)
    if rng.random() < 0.5:  # whole heads of ordinary values: their scales are, too
        values = ordinary.astype(dtype)
    return values.astype(dtype).reshape(shape)


@dataclasses.dataclass
class Layout:
    """Where elements of two arrays of one shape lie in one storage."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offsets: tuple[int, int]
    elements: int


def layout_of(
    shape: tuple[int, ...], order: tuple[int, ...], level: int, pads: list[int], shift: int
) -> Layout:
    """Dimensions by ascending stride, with gaps; the second array begins inside dimension `level`.

    Level 0 packs keys and values by head, level len(order) sets one array behind the other.
    """
    strides, step, beside = [0] * len(shape), 1, 0
    for place, (dim, pad) in enumerate(zip(order, pads, strict=True)):
        strides[dim] = step
        step = step * shape[dim] + pad
        if place == level:
            beside, step = step, 2 * step
    return Layout(shape, tuple(strides), (shift, shift + beside), step + shift)


@dataclasses.dataclass
class Case:
    dtype: np.dtype
    kv_cache_dtype: str  # auto or of FORMATS
    kind: str
    cache: Layout
    scales: Layout | None
    key: np.ndarray
    value: np.ndarray
    slots: np.ndarray
    static: tuple[np.ndarray, np.ndarray] | None
    gaps: tuple[int, int]  # elements between tokens of key, of value
    shift: int
    typed: bool  # FP8 by the arrays' dtype, not by kv_cache_dtype


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([F32, BF16, F16]))
    kind = draw(st.sampled_from(KINDS))
    kv_cache_dtype = "auto" if kind == "none" else draw(st.sampled_from(list(FORMATS)))
    heads = draw(st.sampled_from([1, 2, 3, 4, 8, 32]))
    fast = st.sampled_from(FAST_DIMS)
    dim = draw(st.one_of(fast, st.integers(1, 32).map(lambda n: 8 * n)))
    block_size, blocks = draw(st.integers(1, 17)), draw(st.integers(1, 5))
    tokens = draw(st.integers(0, 12))
    aligned = draw(st.booleans())

    def gaps(count: int) -> list[int]:
        one = st.sampled_from([0, 16]) if aligned else st.integers(0, 3)
        return [draw(one) for _ in range(count)]

    def shift() -> int:
        return 0 if aligned else draw(st.integers(0, 7))

    order = (3, *draw(st.permutations([0, 1, 2])))
    cache = layout_of(
        (blocks, block_size, heads, dim), order, draw(st.integers(0, 3)), gaps(4), shift()
    )
    scales, static = None, None
    if kind == "token":
        scales = layout_of(
            (blocks, block_size, heads), tuple(draw(st.permutations([0, 1, 2]))),
            draw(st.integers(0, 2)), [draw(st.integers(0, 3)) for _ in range(3)], 0,
        )  # fmt: skip
    elif kind != "none":
        shape = draw(st.sampled_from([(), (1,)])) if kind == "tensor" else (heads,)
        power = st.integers(-8, 8).map(lambda n: 2.0**n)
        any_scale = st.floats(2.0**-126, 2.0**127, width=32)
        drawn = [
            np.float32([draw(st.one_of(power, any_scale)) for _ in range(int(np.prod(shape)))])
            for _ in range(2)
        ]
        static = (drawn[0].reshape(shape), drawn[1].reshape(shape))
    num_slots = blocks * block_size
    written = min(tokens, num_slots)
    slots = rng.permutation(num_slots)[:written]
    if written and draw(st.booleans()):
        slots = np.unique(np.concatenate([slots[1:], [num_slots - 1]]))
        slots = np.concatenate([slots, np.full(written - len(slots), -1)])
    slots = np.where(rng.random(written) < draw(st.sampled_from([0.0, 0.3])), -1, slots)
    own = "fp8_e4m3" if kind == "none" else kv_cache_dtype
    extra = draw(st.integers(0, 2))  # tokens without a slot
    shape3 = (written + extra, heads, dim)
    return Case(
        dtype, kv_cache_dtype, kind, cache, scales,
        drawn_values(rng, shape3, dtype, own), drawn_values(rng, shape3, dtype, own),
        slots.astype(draw(st.sampled_from([np.int32, np.int64]))), static,
        (gaps(1)[0], gaps(1)[0]), shift(), draw(st.booleans()),
    )  # fmt: skip


def poisoned(nbytes: int, device: _core.Device) -> Storage:
    storage = Storage(nbytes, device)
    storage.bytes[...] = POISON
    return storage


def pair(storage: Storage, layout: Layout, dtype: Any) -> tuple[Any, Any]:
    first, second = (
        storage.array(layout.shape, layout.strides, dtype, offset) for offset in layout.offsets
    )
    return first, second


def views(storage: Storage, layout: Layout, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = (
        storage.view(layout.shape, layout.strides, dtype, offset) for offset in layout.offsets
    )
    return first, second


def source(values: np.ndarray, gap: int, shift: int, device: _core.Device) -> Any:
    """Tokens with a gap after each."""
    strides = list(contiguous(values.shape))
    strides[0] += gap
    elements = shift + values.shape[0] * strides[0]
    storage = poisoned(max(elements, 1) * values.dtype.itemsize, device)
    storage.view(values.shape, strides, values.dtype, shift)[...] = values
    return storage.array(values.shape, strides, values.dtype, shift)


class Caches:
    """A poisoned cache with its scales, and what should be in it."""

    def __init__(self, case: Case, device: _core.Device) -> None:
        self.case = case
        self.is_fp8 = case.kind != "none"
        self.dtype = np.dtype(np.uint8) if self.is_fp8 else case.dtype
        self.storage = poisoned(case.cache.elements * self.dtype.itemsize, device)
        self.expected = Storage.__new__(Storage)
        self.expected.bytes = self.storage.bytes.copy()
        shown = self.dtype
        if self.is_fp8 and case.typed:
            shown = FORMATS[case.kv_cache_dtype][0]
        self.arrays = pair(self.storage, case.cache, shown)
        self.options: dict[str, Any] = {
            "kv_cache_dtype": "auto" if case.typed else case.kv_cache_dtype
        }
        if case.scales is not None:
            self.scales = poisoned(case.scales.elements * 4, device)
            self.expected_scales = Storage.__new__(Storage)
            self.expected_scales.bytes = self.scales.bytes.copy()
            given = pair(self.scales, case.scales, np.float32)
            self.options.update(k_scale=given[0], v_scale=given[1])
        elif case.static is not None:
            self.options.update(
                k_scale=stored(case.static[0], device), v_scale=stored(case.static[1], device)
            )

    def write(self, key: np.ndarray, value: np.ndarray) -> None:
        """Says what should be written of [tokens, heads, head_dim]."""
        case = self.case
        targets = views(self.expected, case.cache, UNSIGNED[self.dtype.itemsize])
        scale_targets = (
            views(self.expected_scales, case.scales, np.float32) if case.scales is not None else ()
        )
        block_size = case.cache.shape[1]
        for side, values in enumerate((key, value)):
            for token, slot in enumerate(case.slots):
                if slot < 0:
                    continue
                place = divmod(int(slot), block_size)
                if not self.is_fp8:
                    targets[side][place] = values[token].view(UNSIGNED[self.dtype.itemsize])
                    continue
                wide = values[token].astype(np.float32)
                if case.static is not None:
                    scale = np.broadcast_to(case.static[side], (wide.shape[0],))
                else:
                    scale = token_scales(wide, case.kv_cache_dtype)
                    scale_targets[side][place] = scale
                inverse = np.float32(1) / scale
                targets[side][place] = encode(wide, inverse[:, None], case.kv_cache_dtype)

    def check(self) -> None:
        np.testing.assert_array_equal(self.storage.bytes, self.expected.bytes)
        if self.case.scales is not None:
            np.testing.assert_array_equal(self.scales.bytes, self.expected_scales.bytes)


@pytest.fixture
def stream(native_device: _core.Device) -> dict[str, Any]:
    return in_stream_of(native_device)


@settings(max_examples=300)
@given(case=cases())
def test_written_bits_are_those_of_the_reference(
    native_device: _core.Device, stream: dict[str, Any], case: Case
) -> None:
    caches = Caches(case, native_device)
    ops.reshape_and_cache_flash(
        source(case.key, case.gaps[0], case.shift, native_device),
        source(case.value, case.gaps[1], case.shift, native_device),
        *caches.arrays,
        stored(case.slots, native_device),
        **caches.options,
        **stream,
    )
    native_device.synchronize()
    caches.write(case.key, case.value)
    caches.check()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("kv_cache_dtype", list(FORMATS))
@pytest.mark.parametrize("scale", [1.0, 0.125, 3.7, 2.0**-126, 3e38, "token"])
def test_every_rounding(
    native_device: _core.Device,
    stream: dict[str, Any],
    dtype: np.dtype,
    kv_cache_dtype: str,
    scale: float | str,
) -> None:
    """All values of 16 bits; of 32, those at and beside every boundary, and many others."""
    if dtype.itemsize == 2:
        values = np.arange(2**16, dtype=np.uint16).view(dtype)
        if scale == "token":  # values of one size together, so that scales are of all sizes
            values = values.reshape(2, -1).T.reshape(-1).copy()
    else:
        rng = np.random.default_rng(0)
        special = special_values(dtype, kv_cache_dtype)
        random = rng.integers(0, 2**32, 2**16 - len(special), dtype=np.uint64)
        values = np.concatenate([special, random.astype(np.uint32).view(dtype)])
        if scale == "token":
            values = values[np.argsort(np.abs(np.nan_to_num(values)), kind="stable")]
    tokens, heads, dim = 64, 8, 128
    layout = layout_of((4, 16, heads, dim), (3, 2, 1, 0), 4, [0] * 4, 0)
    layout = dataclasses.replace(layout, offsets=(0, layout.elements), elements=2 * layout.elements)
    static, scales = None, None
    if scale == "token":
        scales = layout_of((4, 16, heads), (1, 2, 0), 2, [0] * 3, 0)
    else:
        static = (np.float32([scale]), np.float32([scale]))
    key = values.reshape(tokens, heads, dim)
    case = Case(
        dtype, kv_cache_dtype, "token" if scale == "token" else "tensor", layout, scales, key,
        key[::-1].copy(), np.arange(tokens, dtype=np.int32), static, (0, 0), 0, True,
    )  # fmt: skip
    caches = Caches(case, native_device)
    ops.reshape_and_cache_flash(
        stored(case.key, native_device), stored(case.value, native_device), *caches.arrays,
        stored(case.slots, native_device), **caches.options, **stream,
    )  # fmt: skip
    native_device.synchronize()
    caches.write(case.key, case.value)
    caches.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "dim"), [(F32, 128), (F16, 128), *((BF16, dim) for dim in FAST_DIMS)]
)
def test_many_tokens(
    native_device: _core.Device, stream: dict[str, Any], dtype: np.dtype, kind: str, dim: int
) -> None:
    """Enough of them for the kernels that keep several pieces in flight."""
    heads, block_size = 5, 16
    tokens = -(-(2**18 + 1000) // (heads * dim // 8))
    blocks = -(-tokens // block_size)
    rng = np.random.default_rng(dim)
    kv_cache_dtype = "auto" if kind == "none" else "fp8_e4m3"
    layout = layout_of((blocks, block_size, heads, dim), (3, 1, 2, 0), 2, [0] * 4, 0)
    scales = layout_of((blocks, block_size, heads), (1, 2, 0), 1, [0] * 3, 0)
    static = None
    if kind in ("tensor", "head"):
        count = 1 if kind == "tensor" else heads
        static = (rng.uniform(0.01, 1, count).astype(F32), rng.uniform(0.01, 1, count).astype(F32))
    slots = rng.permutation(blocks * block_size)[:tokens].astype(np.int64)
    slots[rng.random(tokens) < 0.1] = -1
    base = rng.standard_normal((tokens, heads, dim), dtype=np.float32)
    case = Case(
        dtype, kv_cache_dtype, kind, layout, scales if kind == "token" else None,
        base.astype(dtype), (-3 * base[::-1]).astype(dtype), slots, static, (8, 0), 0, True,
    )  # fmt: skip
    caches = Caches(case, native_device)
    ops.reshape_and_cache_flash(
        source(case.key, 8, 0, native_device), stored(case.value, native_device), *caches.arrays,
        stored(case.slots, native_device), **caches.options, **stream,
    )  # fmt: skip
    native_device.synchronize()
    place = (slots[slots >= 0] // block_size, slots[slots >= 0] % block_size)
    targets = views(caches.expected, layout, UNSIGNED[caches.dtype.itemsize])
    for side, values in enumerate((case.key, case.value)):
        written = values[slots >= 0]
        if kind == "none":
            targets[side][place] = written.view(UNSIGNED[dtype.itemsize])
            continue
        wide = written.astype(np.float32)
        if static is not None:
            scale = np.broadcast_to(static[side], wide.shape[:2])
        else:
            scale = token_scales(wide, kv_cache_dtype)
            views(caches.expected_scales, scales, np.float32)[side][place] = scale
        inverse = (np.float32(1) / scale)[..., None]
        targets[side][place] = encode(wide, inverse, kv_cache_dtype)
    caches.check()


@settings(max_examples=150)
@given(case=cases().filter(lambda case: case.dtype != F16), seed=st.integers(0, 2**32 - 1),
       parts=st.sampled_from(["norm", "rope", "both", "neither"]), interleaved=st.booleans(),
       in_place=st.booleans(),
       turned=st.one_of(st.just(1.0), st.sampled_from([0.25, 0.5]), st.floats(0, 1)))  # fmt: skip
def test_fused_write_has_the_bits_of_its_parts(
    native_device: _core.Device,
    stream: dict[str, Any],
    case: Case,
    seed: int,
    parts: str,
    interleaved: bool,
    in_place: bool,
    turned: float,
) -> None:
    rng = np.random.default_rng(seed)
    tokens, kv_heads, dim = len(case.slots), case.key.shape[1], case.key.shape[2]
    if tokens == 0:
        return
    heads = {"num_heads": 2 * kv_heads, "num_kv_heads": kv_heads}
    query = rng.standard_normal((tokens, 2 * kv_heads, dim)).astype(case.dtype)
    qkv = np.concatenate([query, case.key[:tokens], case.value[:tokens]], axis=1)
    qkv = qkv.reshape(tokens, -1)
    options: dict[str, Any] = {}
    norms = {
        name: stored(rng.standard_normal(dim).astype(F32), native_device)
        for name in ("q_norm", "k_norm")
    }
    pairs = max(1, round(turned * (dim // 2)))
    angles = rng.uniform(0, 6, (8, pairs))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(F32)
    rope = {
        "cos_sin": stored(table, native_device),
        "positions": stored(rng.integers(0, 8, tokens).astype(np.int32), native_device),
        "interleaved": interleaved,
    }
    slots = stored(case.slots, native_device)
    bits = UNSIGNED[case.dtype.itemsize]

    def rows() -> tuple[Any, np.ndarray]:
        storage = poisoned(qkv.nbytes, native_device)
        shape = (qkv.shape, contiguous(qkv.shape), case.dtype)
        return storage.array(*shape), storage.view(*shape)

    def filled() -> tuple[Any, np.ndarray]:
        array, view = rows()
        view.view(bits)[...] = qkv.view(bits)
        return array, view

    separate = Caches(case, native_device)
    array, _ = filled()
    if parts in ("norm", "both"):
        result, view = rows()
        ops.qk_norm(array, **norms, **heads, out=result, **stream)
        array = result
        options.update(norms)
    if parts in ("rope", "both"):
        result, view = rows()
        ops.rope(array, **rope, **heads, out=result, **stream)
        array = result
        options.update(rope)
    ops.cache_write(
        array, *separate.arrays, slots, num_heads=2 * kv_heads, **separate.options, **stream
    )

    fused = Caches(case, native_device)
    array, view_fused = filled()
    out, view_out = (array, view_fused) if in_place else rows()
    ops.qkv_prepare(
        array, **options, **heads, key_cache=fused.arrays[0], value_cache=fused.arrays[1],
        slot_mapping=slots, **fused.options, out=out, **stream,
    )  # fmt: skip
    native_device.synchronize()
    np.testing.assert_array_equal(fused.storage.bytes, separate.storage.bytes)
    if case.scales is not None:
        np.testing.assert_array_equal(fused.scales.bytes, separate.scales.bytes)
    if parts == "neither":
        separate.write(case.key, case.value)
        separate.check()
        np.testing.assert_array_equal(view_out.view(bits), qkv.view(bits))
    else:
        np.testing.assert_array_equal(view_out.view(bits), view.view(bits))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3"])
def test_offsets_beyond_31_bits(
    device: str,
    native_device: _core.Device,
    stream: dict[str, Any],
    tmp_path: Path,
    kv_cache_dtype: str,
) -> None:
    """Blocks 2**30 elements of bfloat16, or 2**31 of FP8, apart: written, copied and read."""
    heads, dim, block_size = 2, 64, 4
    is_fp8 = kv_cache_dtype != "auto"
    dtype = np.dtype(np.uint8) if is_fp8 else BF16
    step = 2**31 // dtype.itemsize
    block = block_size * heads * dim
    shape, strides = (3, block_size, heads, dim), (step, heads * dim, dim, 1)
    row = 64  # elements of bfloat16
    rows = 2 * 2**30 // row + 64
    values = np.random.default_rng(0).standard_normal((4, heads, dim)).astype(BF16)
    slots = np.int32([2 * block_size, 3 * block_size - 1, block_size + 1, 0])
    if device == "cpu":
        sparse = tmp_path / "cache"
        sparse.touch()
        os.truncate(sparse, rows * row * 2)
        with sparse.open("r+b") as file:
            whole = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)

        def side(offset: int) -> Any:
            byte_strides = tuple(stride * dtype.itemsize for stride in strides)
            return np.ndarray(shape, dtype, whole, offset * dtype.itemsize, byte_strides)
    else:
        zero = stored(np.zeros((1, row), BF16), native_device)
        index = stored(np.zeros(rows, np.int32), native_device)
        reserved: Any = ops.gather_rows(zero, index, **stream)

        def side(offset: int) -> Any:
            address = reserved.ptr + offset * dtype.itemsize
            return Exported(address, shape, strides, dtype, "cuda", reserved)

    options: dict[str, Any] = {}
    if is_fp8:
        scale = stored(np.float32([0.5]), native_device)
        options = {"kv_cache_dtype": kv_cache_dtype, "k_scale": scale, "v_scale": scale}
    ops.reshape_and_cache_flash(
        stored(values, native_device), stored(-values, native_device), side(0), side(block),
        stored(slots, native_device), **options, **stream,
    )  # fmt: skip
    for sign, beside in ((1, 0), (-1, block)):
        for token, slot in enumerate(map(int, slots)):
            start = (slot // block_size) * step + slot % block_size * heads * dim + beside
            nbytes = heads * dim * dtype.itemsize
            begin = start * dtype.itemsize
            if device == "cpu":
                found = whole[begin : begin + nbytes]
            else:
                first, count = begin // (2 * row), nbytes // (2 * row)
                storage = Storage(nbytes, native_device)
                ops.gather_rows(
                    Exported(reserved.ptr, (rows, row), (row, 1), BF16, "cuda"),
                    stored(np.arange(first, first + count, dtype=np.int32), native_device),
                    out=storage.array((count, row), (row, 1), BF16), **stream,
                )  # fmt: skip
                native_device.synchronize()
                found = storage.bytes
            want = (sign * values[token]).reshape(-1)
            if is_fp8:
                want = encode(want.astype(np.float32), np.float32(2), kv_cache_dtype)
            np.testing.assert_array_equal(found, want.view(np.uint8))

    kept = values.astype(np.float32)
    if is_fp8:
        kept = encode(kept, np.float32(2), kv_cache_dtype).view(FORMATS[kv_cache_dtype][0])
        kept = kept.astype(np.float32) / 2
    expected = np.zeros((3 * block_size, heads, dim), np.float32)
    expected[slots] = kept
    expected[block_size : 2 * block_size] = expected[2 * block_size :]
    ops.copy_blocks(side(0), side(block), [(2, 1)], **options, **stream)
    outs = [Storage(expected.nbytes, native_device) for _ in range(2)]
    key_out, value_out = (
        out.array(expected.shape, contiguous(expected.shape), F32) for out in outs
    )
    ops.gather_blocks(
        side(0), side(block), stored(np.int32([0, 1, 2]), native_device), dtype="float32",
        key_out=key_out, value_out=value_out, **options, **stream,
    )  # fmt: skip
    query = np.random.default_rng(1).standard_normal((1, heads, dim)).astype(BF16)
    result = Storage(query.nbytes, native_device)
    ops.paged_attention(
        stored(query, native_device), side(0), side(block),
        stored(np.int32([[1, 2]]), native_device), stored(np.int32([8]), native_device),
        stored(np.int32([0, 1]), native_device),
        out=result.array(query.shape, contiguous(query.shape), BF16), **options, **stream,
    )  # fmt: skip
    native_device.synchronize()
    for out, sign in zip(outs, (1, -1), strict=True):
        assert np.array_equal(out.view(expected.shape, contiguous(expected.shape), F32),
                              sign * expected)  # fmt: skip
    seen = expected[block_size:].astype(np.float64)
    scores = np.einsum("hd,thd->ht", query[0].astype(np.float64), seen) * dim**-0.5
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    exact = -np.einsum("ht,thd->hd", weights, seen)
    found = result.view(exact.shape, contiguous(exact.shape), BF16).astype(np.float64)
    assert np.abs(found - exact).max() < 0.01 * np.abs(exact).max()


def test_other_libraries_arrays_of_fp8(native_device: _core.Device, stream: dict[str, Any]) -> None:
    """By DLPack's types, on whichever device."""
    storage = Storage(512, native_device)
    address = storage._address
    dtype = np.dtype(ml_dtypes.float8_e4m3fn)
    shape = (2, 4, 2, 8)
    key, value = (
        Exported(address + 256 * side, shape, contiguous(shape), dtype, native_device.kind)
        for side in range(2)
    )
    values = np.arange(16, dtype=np.float32).reshape(1, 2, 8)
    scales = stored(np.float32([1.0]), native_device)
    ops.reshape_and_cache_flash(
        stored(values, native_device), stored(values, native_device), key, value,
        stored(np.int32([5]), native_device), k_scale=scales, v_scale=scales, **stream,
    )  # fmt: skip
    native_device.synchronize()
    assert (storage.bytes[80:96].view(dtype).astype(F32) == np.arange(16)).all()
    assert (storage.bytes[336:352].view(dtype).astype(F32) == np.arange(16)).all()


class Refusals:
    """A good call whose arguments are changed one at a time."""

    def __init__(self, device: _core.Device) -> None:
        self.device = device
        self.cache = poisoned(2 * 3 * 4 * 2 * 8, device)
        self.shape = (3, 4, 2, 8)
        self.scale = stored(np.float32([0.5]), device)
        self.options = in_stream_of(device)

    def side(self, offset: int, strides: tuple[int, ...] = (64, 16, 8, 1), **changed: Any) -> Any:
        shape = changed.get("shape", self.shape)
        return self.cache.array(shape, strides, changed.get("dtype", np.uint8), offset)

    def call(self, **changed: Any) -> None:
        key = stored(np.ones((3, 2, 8), F32), self.device)
        arguments: dict[str, Any] = {
            "key": key, "value": key, "key_cache": self.side(0), "value_cache": self.side(192),
            "slot_mapping": stored(np.int32([0, -1, 11]), self.device),
            "kv_cache_dtype": "fp8_e4m3", "k_scale": self.scale, "v_scale": self.scale,
        }  # fmt: skip
        ops.reshape_and_cache_flash(**{**arguments, **changed}, **self.options)


def test_what_does_not_fit_is_refused(native_device: _core.Device) -> None:
    fit = Refusals(native_device)
    other = stored(np.float32([0.5, 0.5, 0.5]), native_device)
    tokens = Storage(4 * 48, native_device)
    both = tokens.array((3, 4, 2), (8, 2, 1), np.float32)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("value_cache overlaps key_cache", {"value_cache": fit.side(0)}),
        ("value_cache overlaps key_cache", {"value_cache": fit.side(63)}),
        ("overlap or interleave", {
            "key_cache": fit.side(0, (63, 16, 8, 1)), "value_cache": fit.side(192, (63, 16, 8, 1)),
        }),
        ("overlap or interleave", {
            "key_cache": fit.side(0, (64, 8, 8, 1)), "value_cache": fit.side(192, (64, 8, 8, 1)),
        }),
        ("other strides than key_cache", {"value_cache": fit.side(192, (64, 8, 32, 1))}),
        ("stride 2 in head_dim", {"key_cache": fit.side(0, (64, 16, 8, 2))}),
        ("stride 0 in dimension 1", {"key_cache": fit.side(0, (64, 0, 8, 1))}),
        ("kv_cache_dtype must say which", {"kv_cache_dtype": "auto"}),
        ("must be auto, fp8_e4m3 or fp8_e5m2", {"kv_cache_dtype": "fp8"}),
        ("key_cache is float8_e5m2; must be float8_e4m3fn", {
            "key_cache": fit.side(0, dtype=FORMATS["fp8_e5m2"][0]),
        }),
        ("value_cache is of another dtype", {
            "value_cache": fit.side(192, dtype=FORMATS["fp8_e4m3"][0]),
        }),
        ("v_scale is missing", {"v_scale": None}),
        ("k_scale is missing", {"k_scale": None}),
        ("k_scale must be of shape", {"k_scale": other, "v_scale": other}),
        ("v_scale must have the shape of k_scale", {"v_scale": both}),
        ("v_scale overlaps k_scale", {"k_scale": both, "v_scale": both}),
        ("key_cache is float32; must be float8_e4m3fn", {
            "key_cache": stored(np.zeros((3, 4, 2, 8), F32), native_device),
        }),
        ("must be int32 or int64", {
            "slot_mapping": stored(np.float32([0, 1, 2]), native_device),
        }),
        ("slot_mapping has 4 entries", {
            "slot_mapping": stored(np.int32([0, 1, 2, 3]), native_device),
        }),
        ("must have the shape|must be \\[3, 2, 8\\]", {
            "value": stored(np.ones((2, 2, 8), F32), native_device),
        }),
        ("key_cache has 2 heads of 8", {
            "key": stored(np.ones((3, 1, 8), F32), native_device),
            "value": stored(np.ones((3, 1, 8), F32), native_device),
        }),
    ]  # fmt: skip
    for message, changed in wrong:
        with pytest.raises(InvalidArgumentError, match=message):
            fit.call(**changed)
    plain = {"kv_cache_dtype": "auto"}
    whole = Storage(4 * 3 * 64 * 2, native_device)
    sides = {
        f"{name}_cache": whole.array((3, 4, 2, 8), (64, 16, 8, 1), F32, 192 * side)
        for side, name in enumerate(("key", "value"))
    }
    with pytest.raises(InvalidArgumentError, match="only an FP8 cache has scales"):
        fit.call(**plain, **sides)
    native_device.synchronize()
    assert (fit.cache.bytes == POISON).all()


@pytest.mark.parametrize("wide", [np.int32, np.int64])
def test_slots_and_scales_are_checked(
    device: str,
    native_device: _core.Device,
    monkeypatch: pytest.MonkeyPatch,
    wide: Any,
) -> None:
    """Always on the CPU, by a switch on a GPU."""
    if device == "cuda":
        monkeypatch.setenv("MRV1_CHECK_SLOTS", "1")
        forget()
    fit = Refusals(native_device)
    try:
        for message, slots in (
            ("slot_mapping\\[1\\] is -2", [0, -2, 1]),
            ("slot_mapping\\[2\\] is 12; slots must be in \\[0, 12\\)", [0, 1, 12]),
            ("names slot 3 twice", [3, -1, 3]),
            ("names slot 5 twice", [5, 4, 5]),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                fit.call(slot_mapping=stored(np.array(slots, wide), native_device))
        for bad in (0.0, -1.0, np.nan, np.inf, 2.0**-127):
            with pytest.raises(InvalidArgumentError, match="k_scale\\[0\\] is .*finite"):
                fit.call(k_scale=stored(np.float32([bad]), native_device))
        if wide is np.int64:
            with pytest.raises(InvalidArgumentError, match="is 4294967296"):
                fit.call(slot_mapping=stored(np.int64([0, 1, 2**32]), native_device))
        assert (fit.cache.bytes == POISON).all()
        fit.call(slot_mapping=stored(np.array([11, -1], wide), native_device))
        native_device.synchronize()
    finally:
        forget()


def test_read_only_scales_of_tokens_are_refused() -> None:
    """Arrays of NumPy, which are the CPU's whatever device is under test."""
    fit = Refusals(_core.Device("cpu", 1))
    scales = np.zeros((2, 3, 4, 2), F32)
    fit.call(k_scale=scales[0], v_scale=scales[1])
    assert scales[:, 0, 0].all() and not scales[:, 1].any()
    scales.setflags(write=False)
    with pytest.raises(InvalidArgumentError, match="k_scale is read-only"):
        fit.call(k_scale=scales[0], v_scale=scales[1])


def test_all_orders_of_dimensions_at_once(
    native_device: _core.Device, stream: dict[str, Any]
) -> None:
    """Keys and values packed at each level, in each order: what was written is what lies there."""
    values = np.arange(2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8)
    for order in itertools.permutations(range(3)):
        for level in range(4):
            layout = layout_of((2, 4, 3, 8), (3, *order), level, [0] * 4, 0)
            storage = poisoned(layout.elements * 4, native_device)
            ops.reshape_and_cache_flash(
                stored(values, native_device), stored(-values, native_device),
                *pair(storage, layout, F32), stored(np.int32([7, 0]), native_device),
                **stream,
            )  # fmt: skip
            native_device.synchronize()
            key, value = views(storage, layout, F32)
            assert (key[1, 3] == values[0]).all() and (key[0, 0] == values[1]).all()
            assert (value[1, 3] == -values[0]).all() and (value[0, 0] == -values[1]).all()
