# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Moves of KV blocks, and what a batch's lengths say: every layout against NumPy, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_arrays import Storage, contiguous, in_stream_of, stored
from mrv1 import _core, memory, ops
from mrv1.errors import InvalidArgumentError
from test_kv_cache import Layout, layout_of

EXAMPLES = 40
FLOATS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
FP8 = {
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


class Cache:
    """A cache of random bits and of any layout, on the device and as the host sees it.

    Attributes:
        args: key_cache and value_cache for an op.
        options: Its kv_cache_dtype, k_scale and v_scale.
        sides: Views of keys and values, [blocks, block_size, heads, dim].
        scales: Views of the scales of tokens, or static ones by head; empty without any.
        stores: All bytes.
    """

    def __init__(self, draw: st.DrawFn, device: _core.Device, rng: np.random.Generator) -> None:
        name = draw(st.sampled_from([*FLOATS, *FP8]))
        self.dtype = FLOATS[name] if name in FLOATS else FP8[name]
        self.kind = "none" if name in FLOATS else draw(st.sampled_from(["tensor", "head", "token"]))
        blocks, size = draw(st.integers(2, 7)), draw(st.integers(1, 9))
        heads, dim = (
            draw(st.sampled_from([1, 2, 3, 8])),
            8 * draw(st.sampled_from([1, 2, 3, 8, 16])),
        )
        self.shape = (blocks, size, heads, dim)
        self.stores: list[Storage] = []
        self.scales: list[np.ndarray] = []
        arrays, self.sides = self._place(draw, device, rng, self.shape, self.dtype)
        self.args = tuple(arrays)
        self.options: dict[str, Any] = {}
        if self.kind == "none":
            return
        self.options["kv_cache_dtype"] = name
        if self.kind == "token":
            arrays, self.scales = self._place(draw, device, rng, self.shape[:3], FLOATS["float32"])
            for scales in self.scales:
                scales[...] = rng.uniform(0.01, 2.0, scales.shape)
        else:
            count = 1 if self.kind == "tensor" else heads
            self.scales = [rng.uniform(0.01, 2.0, count).astype(np.float32) for _ in range(2)]
            arrays = [stored(scales, device) for scales in self.scales]
        self.options["k_scale"], self.options["v_scale"] = arrays

    def _place(
        self,
        draw: st.DrawFn,
        device: _core.Device,
        rng: np.random.Generator,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> tuple[list[Any], list[np.ndarray]]:
        dims = range(3)
        order = tuple(draw(st.permutations(dims)))
        if len(shape) == 4:
            order = (3, *order)
        pads = [0, *draw(st.lists(st.sampled_from([0, 0, 1, 8]), min_size=3, max_size=3))]
        level = draw(st.integers(len(order) - 3, len(order) - 1))
        shift = draw(st.sampled_from([0, 0, 1, 8]))
        layout: Layout = layout_of(shape, order, level, pads[-len(order) :], shift)
        storage = Storage(layout.elements * dtype.itemsize, device)
        storage.bytes[:] = rng.integers(0, 256, len(storage.bytes), dtype=np.uint8)
        self.stores.append(storage)
        places = [(shape, layout.strides, dtype, offset) for offset in layout.offsets]
        return [storage.array(*p) for p in places], [storage.view(*p) for p in places]

    def bytes(self) -> list[np.ndarray]:
        return [storage.bytes.copy() for storage in self.stores]

    def block_parts(self) -> list[np.ndarray]:
        """Views of what belongs to blocks, as unsigned integers."""
        parts = [*self.sides, *(self.scales if self.kind == "token" else [])]
        return [part.view(f"u{part.dtype.itemsize}") for part in parts]

    def values(self, side: int) -> np.ndarray:
        """Elements in float32, [blocks, block_size, heads, dim]."""
        with np.errstate(invalid="ignore"):
            found: np.ndarray = self.sides[side].astype(np.float32)
            if self.kind != "none":
                found = found * (self.scales[side][..., None])
        return found


def pairs(draw: st.DrawFn, blocks: int) -> list[tuple[int, int]]:
    """Copies between blocks but the null block; no target is a source."""
    ids = draw(st.permutations(range(1, blocks)))
    targets = ids[: draw(st.integers(0, len(ids) - 1))]
    sources = ids[len(targets) :]
    return [(draw(st.sampled_from(sources)), target) for target in targets]


def wait(device: _core.Device) -> None:
    if device.kind == "cuda":
        device.synchronize()


@settings(max_examples=EXAMPLES)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_copy_blocks(native_device: _core.Device, data: st.DataObject, seed: int) -> None:
    cache = Cache(data.draw, native_device, np.random.default_rng(seed))
    mapping = pairs(data.draw, cache.shape[0])
    before = cache.bytes()
    expected = [part.copy() for part in cache.block_parts()]
    for part in expected:
        for source, target in mapping:
            part[target] = part[source]
    ops.copy_blocks(*cache.args, mapping, **cache.options, **in_stream_of(native_device))
    wait(native_device)
    check_blocks(cache, expected, before, [target for _, target in mapping])


def check_blocks(
    cache: Cache, expected: list[np.ndarray], before: list[np.ndarray], written: list[int]
) -> None:
    """Blocks are what they should be, and no byte outside of those written has changed."""
    for part, should in zip(cache.block_parts(), expected, strict=True):
        assert np.array_equal(part, should)
    after = cache.bytes()
    for storage, old in zip(cache.stores, before, strict=True):
        storage.bytes[:] = old
    for part, should in zip(cache.block_parts(), expected, strict=True):
        part[written] = should[written]
    for storage, found in zip(cache.stores, after, strict=True):
        assert np.array_equal(storage.bytes, found), "bytes outside of the blocks were written"


@settings(max_examples=EXAMPLES)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_zero_blocks(native_device: _core.Device, data: st.DataObject, seed: int) -> None:
    cache = Cache(data.draw, native_device, np.random.default_rng(seed))
    ids = data.draw(st.lists(st.integers(0, cache.shape[0] - 1), max_size=5))
    before = cache.bytes()
    expected = [part.copy() for part in cache.block_parts()]
    for part in expected:
        part[ids] = 0
    ops.zero_blocks(*cache.args, ids, **cache.options, **in_stream_of(native_device))
    wait(native_device)
    check_blocks(cache, expected, before, ids)


@settings(max_examples=EXAMPLES)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_gather_blocks(native_device: _core.Device, data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = Cache(data.draw, native_device, rng)
    blocks, size, heads, dim = cache.shape
    ids = np.int32(data.draw(st.lists(st.integers(0, blocks - 1), min_size=1, max_size=6)))
    tokens = data.draw(st.one_of(st.none(), st.integers(0, len(ids) * size)))
    is_fp8 = cache.kind != "none"
    name = data.draw(st.sampled_from([*FLOATS, *([] if is_fp8 else [None])]))
    dtype = cache.dtype if name is None else FLOATS[name]
    count = len(ids) * size if tokens is None else tokens
    outs = [Storage(max(1, count * heads * dim * dtype.itemsize), native_device) for _ in range(2)]
    shape = (count, heads, dim)
    before = cache.bytes()
    found = ops.gather_blocks(
        *cache.args,
        stored(ids, native_device),
        num_tokens=tokens,
        dtype=name,
        key_out=outs[0].array(shape, contiguous(shape), dtype),
        value_out=outs[1].array(shape, contiguous(shape), dtype),
        **cache.options,
        **in_stream_of(native_device),
    )
    assert len(found) == 2
    wait(native_device)
    for side, out in enumerate(outs):
        got = out.view(shape, contiguous(shape), dtype)
        if dtype == cache.dtype:
            expected = cache.sides[side][ids].reshape(-1, heads, dim)[:count]
            unsigned = f"u{dtype.itemsize}"
            assert np.array_equal(got.view(unsigned), expected.view(unsigned))
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            expected = cache.values(side)[ids].reshape(-1, heads, dim)[:count].astype(dtype)
        assert np.array_equal(got.astype(np.float32), expected.astype(np.float32), equal_nan=True)
    assert all(map(np.array_equal, before, cache.bytes()))


def test_gather_blocks_makes_its_results(native_device: _core.Device) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 3, 4, 2, 8)).astype(np.float32)
    sides = [stored(side, native_device) for side in values]
    ids = stored(np.int32([2, 0]), native_device)
    made = ops.gather_blocks(*sides, ids, num_tokens=5, **in_stream_of(native_device))
    wait(native_device)
    for found, side in zip(made, values, strict=True):
        expected = side[[2, 0]].reshape(8, 2, 8)[:5]
        assert np.array_equal(array_to_host(found, native_device), expected)


@settings(max_examples=EXAMPLES)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_swap_blocks_out_and_in(
    native_device: _core.Device, data: st.DataObject, seed: int
) -> None:
    """Out to pinned memory, the blocks overwritten, and back to others."""
    rng = np.random.default_rng(seed)
    dtype = data.draw(st.sampled_from([*FLOATS.values(), *FP8.values(), np.dtype(np.int32)]))
    inner = data.draw(st.sampled_from([(4, 2, 8), (1,), (3, 5), (2, 16, 64)]))
    blocks, gap = data.draw(st.integers(1, 200)), data.draw(st.sampled_from([0, 1, 24]))
    step = int(np.prod(inner)) + gap
    shape, strides = (blocks, *inner), (step, *contiguous(inner))
    near = Storage(blocks * step * dtype.itemsize, native_device)
    near.bytes[:] = rng.integers(0, 256, len(near.bytes), dtype=np.uint8)
    cache = near.array(shape, strides, dtype)
    view = near.view(shape, strides, dtype).view(f"u{dtype.itemsize}")
    host_shape = (blocks + 2, *inner)
    far = memory.pinned(host_shape, dtype, native_device)
    host = far.device() if native_device.kind == "cuda" else far.numpy()
    original, before = view.copy(), near.bytes.copy()
    order = rng.permutation(blocks)[: data.draw(st.integers(0, blocks))]
    places = rng.permutation(blocks + 2)[: len(order)]
    out_pairs = [(int(a), int(b)) for a, b in zip(order, places, strict=True)]
    in_pairs = [(int(b), int(a)) for a, b in zip(order[::-1], places, strict=True)]
    ops.swap_blocks(cache, host, out_pairs, **in_stream_of(native_device))
    ops.swap_blocks(host, cache, in_pairs, **in_stream_of(native_device))
    far.fence()
    far.wait()
    wait(native_device)
    out: Any = far.numpy()
    assert np.array_equal(out.view(view.dtype)[places], original[order])
    expected = original.copy()
    expected[order[::-1]] = original[order]
    assert np.array_equal(view, expected)
    near.view(shape, strides, dtype).view(view.dtype)[...] = original
    assert np.array_equal(near.bytes, before), "bytes between blocks were written"


def test_a_fence_says_when_swaps_are_done(native_device: _core.Device) -> None:
    """One of the pinned memory, in the stream of the calls."""
    dtype = np.dtype(np.float32)
    near = Storage(64 * 4096 * 4, native_device)
    near.bytes.view(np.float32)[:] = np.arange(64 * 4096)
    cache = near.array((64, 4096), (4096, 1), dtype)
    far = memory.pinned((64, 4096), dtype, native_device)
    host = far.device() if native_device.kind == "cuda" else far.numpy()
    mapping = [(block, 63 - block) for block in range(64)]
    for _ in range(20):
        ops.swap_blocks(cache, host, mapping, **in_stream_of(native_device))
    far.fence()
    far.wait()
    found: Any = far.numpy()
    assert np.array_equal(found[::-1], near.view((64, 4096), (4096, 1), dtype))


# --- infer_params -------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_infer_params_are_those_of_loops(
    native_device: _core.Device, data: st.DataObject, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    block_size, most = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    queries = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    starts = np.int32(np.cumsum([0, *queries]))
    room = most * block_size
    lens = [
        0 if rng.random() < 0.2 else int(rng.integers(min(query, room), room + 1))
        for query in queries
    ]
    table = rng.integers(0, 50, (len(queries), most)).astype(np.int32)
    tokens = int(starts[-1]) + data.draw(st.integers(0, 5))
    given_arrays = [stored(array, native_device) for array in (starts, np.int32(lens), table)]
    found = ops.infer_params(
        *given_arrays, block_size, num_tokens=tokens, **in_stream_of(native_device)
    )
    wait(native_device)
    host = [array_to_host(array, native_device) for array in found]
    positions, batch = np.zeros(tokens, np.int32), np.full(tokens, -1, np.int32)
    slots = np.full(tokens, -1, np.int32)
    for request, (start, end) in enumerate(itertools.pairwise(starts)):
        for token in range(start, end):
            position = lens[request] - end + token
            if lens[request] == 0 or position < 0:
                continue
            positions[token], batch[token] = position, request
            block = table[request, position // block_size]
            if block:
                slots[token] = block * block_size + position % block_size
    row = np.where(np.int32(lens) > 0, np.arange(len(lens)), -1)
    decodes = next((i for i, query in enumerate(queries) if query > 1), len(queries))
    counts = [len(queries), tokens, 0, decodes, len(queries) - decodes, 0]
    for got, expected in zip(host, (positions, batch, slots, row, counts), strict=True):
        assert got.dtype == np.int32 and np.array_equal(got, expected)


def array_to_host(array: Any, device: _core.Device) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    far = memory.pinned(array.shape, array.dtype, device)
    rows = [(i, i) for i in range(array.shape[0])]
    ops.swap_blocks(array, far.device(), rows, **in_stream_of(device))
    far.fence()
    far.wait()
    return far.numpy()


# --- refusals -----------------------------------------------------------------------------------


def plain(device: _core.Device, *shape: int, dtype: Any = np.float32) -> Any:
    return stored(np.zeros(shape, dtype), device)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a, _: ops.copy_blocks(a, a, [(1, 2)]), "value_cache overlaps key_cache"),
        (lambda a, b: ops.copy_blocks(a, b, [(0, 1)]), "block id 0 is outside"),
        (lambda a, b: ops.copy_blocks(a, b, [(1, 4)]), "block id 4 is outside"),
        (lambda a, b: ops.copy_blocks(a, b, [(1, 2), (3, 2)]), "block 2 is written"),
        (lambda a, b: ops.copy_blocks(a, b, [(1, 2), (2, 3)]), "block 2 is written"),
        (lambda a, b: ops.zero_blocks(a, b, [0, 4]), r"block_ids\[1\] is 4; must be in \[0, 4\)"),
        (lambda a, b: ops.zero_blocks(a, b, [-1]), r"block_ids\[0\] is -1"),
        (
            lambda a, b: ops.zero_blocks(a, b, [1], kv_cache_dtype="fp8_e4m3"),
            "key_cache is float32",
        ),
        (lambda a, b: ops.swap_blocks(a, a, [(0, 1)]), "target is source"),
        (lambda a, b: ops.swap_blocks(a, b, [(4, 0)]), r"block_mapping\[0\] reads block 4"),
        (lambda a, b: ops.swap_blocks(a, b, [(0, -1)]), r"block_mapping\[0\] writes block -1"),
        (lambda a, b: ops.swap_blocks(a, b, [(0, 1), (2, 1)]), "writes block 1 twice"),
    ],
)
def test_moves_refuse(native_device: _core.Device, call: Any, says: str) -> None:
    a, b = (plain(native_device, 4, 2, 1, 8) for _ in range(2))
    with pytest.raises(InvalidArgumentError, match=says):
        call(a, b)


def test_gather_refuses(native_device: _core.Device) -> None:
    a, b = (plain(native_device, 4, 2, 1, 8) for _ in range(2))
    ids = stored(np.int32([0, 3]), native_device)
    with pytest.raises(InvalidArgumentError, match="num_tokens = 5: must be at most 4"):
        ops.gather_blocks(a, b, ids, num_tokens=5)
    with pytest.raises(InvalidArgumentError, match="num_tokens = -1"):
        ops.gather_blocks(a, b, ids, num_tokens=-1)
    with pytest.raises(InvalidArgumentError, match="dtype = 'int32'"):
        ops.gather_blocks(a, b, ids, dtype="int32")
    codes = [plain(native_device, 4, 2, 1, 8, dtype=np.uint8) for _ in range(2)]
    scales = plain(native_device, 1, dtype=np.float32)
    with pytest.raises(InvalidArgumentError):  # a scale of 0
        ops.gather_blocks(
            *codes, ids, kv_cache_dtype="fp8_e4m3", k_scale=scales, v_scale=scales
        ) if native_device.kind == "cpu" else ops.gather_blocks(*codes, ids)
    ones = stored(np.ones(1, np.float32), native_device)
    with pytest.raises(InvalidArgumentError, match="dtype is missing; an FP8 cache"):
        ops.gather_blocks(*codes, ids, kv_cache_dtype="fp8_e4m3", k_scale=ones, v_scale=ones)
    out = plain(native_device, 4, 1, 8)
    held = Storage(4 * 2 * 8 * 4 + 4 * 8 * 4, native_device)
    inside = held.array((4, 1, 8), contiguous((4, 1, 8)), np.float32, 24)
    read = held.array((4, 2, 1, 8), contiguous((4, 2, 1, 8)), np.float32)
    with pytest.raises(InvalidArgumentError, match="key_out overlaps key_cache"):
        ops.gather_blocks(read, b, ids, key_out=inside)
    with pytest.raises(InvalidArgumentError, match="value_out is key_out"):
        ops.gather_blocks(a, b, ids, key_out=out, value_out=out)
    if native_device.kind == "cpu":
        with pytest.raises(InvalidArgumentError, match=r"block_ids\[1\] is 4"):
            ops.gather_blocks(a, b, np.int32([0, 4]))


def test_swap_refuses_other_shapes(native_device: _core.Device) -> None:
    a = plain(native_device, 4, 2, 8)
    for other, says in (
        (plain(native_device, 4, 2, 4), "blocks of another shape"),
        (plain(native_device, 4, 16), "blocks of another shape"),
        (plain(native_device, 4, 2, 8, dtype=np.int32), "another dtype"),
    ):
        with pytest.raises(InvalidArgumentError, match=says):
            ops.swap_blocks(a, other, [(0, 0)])
    storage = Storage(4 * 2 * 8 * 4, native_device)
    turned = storage.array((4, 2, 8), (16, 1, 2), np.float32)
    with pytest.raises(InvalidArgumentError, match="elements of a block must be contiguous"):
        ops.swap_blocks(a, turned, [(0, 0)])
