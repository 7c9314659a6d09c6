# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Attention over every kind of cache, against float64: formats, scales, layouts, geometries.

The reference takes an element of an FP8 cache as its code times its scale, and all else exactly, so
that what is measured is the reader alone. Errors are held against the weighted sum of the values'
magnitudes, which is what a sum in floating point can be held to.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrv1 import ops

Array = np.ndarray
EXAMPLES = int(os.environ.get("MRV1_TEST_EXAMPLES", "25"))
ACTIVATIONS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
FORMATS = {
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
STORAGE = ("auto", *FORMATS)
SCALES = ("tensor", "head", "token")
# Results are rounded to the activations' dtype, and weights of tensor cores before the sum.
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}


def spread(shape: Sequence[int], order: Sequence[int], gaps: Sequence[int], offset: int) -> Strides:
    """Strides of dimensions that lie in `order`, the outermost first, with gaps after each."""
    strides = [0] * len(shape)
    step = 1
    for dim, gap in zip(reversed(order), reversed(gaps), strict=True):
        strides[dim] = step
        step = step * shape[dim] + gap
    return Strides(tuple(shape), tuple(strides), offset, offset + step)


@dataclasses.dataclass(frozen=True)
class Strides:
    """Where the elements of an array lie in a piece of memory."""

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int
    size: int

    def view(self, memory: Array) -> Array:
        # Not all dtypes of ml_dtypes have names by which NumPy makes such an array.
        bits = memory.view(f"u{memory.itemsize}")[self.offset :]
        steps = [step * memory.itemsize for step in self.steps]
        return np.lib.stride_tricks.as_strided(bits, self.shape, steps).view(memory.dtype)

    def place(self, device: str, values: Array) -> Any:
        """An array of these strides on a device, with poison between its elements."""
        size = self.size + 16
        poison = np.full(size * values.itemsize, 0xFF, np.uint8).view(values.dtype)
        self.view(poison)[...] = values
        return on_device(device, poison, self)


def on_device(device: str, memory: Array, strides: Strides | None = None) -> Any:
    """Memory of one dimension, or an array of it, as ops take it. FP8 goes as bytes."""
    if memory.dtype in FORMATS.values():
        memory = memory.view(np.uint8)
    if device == "cpu":
        return memory if strides is None else strides.view(memory)
    torch = pytest.importorskip("torch")
    bits = memory.view(np.int16) if memory.dtype == ACTIVATIONS["bfloat16"] else memory
    moved = torch.from_numpy(np.ascontiguousarray(bits)).cuda()
    if bits is not memory:
        moved = moved.view(torch.bfloat16)
    if strides is None:
        return moved
    return torch.as_strided(moved, strides.shape, strides.steps, strides.offset)


def fetched(array: Any) -> Array:
    """A result as float64."""
    host = array if isinstance(array, np.ndarray) else array.double().cpu().numpy()
    return np.asarray(host).astype(np.float64)


@dataclasses.dataclass
class Batch:
    """Requests and what attention over their cache gives."""

    queries: list[int]  # tokens of each request
    lengths: list[int]  # cached tokens, the queries' included
    heads: int
    kv_heads: int
    dim: int
    block_size: int
    activation: str
    storage: str
    window: int = 0
    softcap: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        rng = self.rng = np.random.default_rng(self.seed)
        needed = [-(-length // self.block_size) for length in self.lengths]
        self.num_blocks = sum(needed) + 1
        order = rng.permutation(self.num_blocks - 1) + 1
        self.table = np.zeros((len(needed), max(needed)), np.int32)
        for row, count in enumerate(needed):
            self.table[row, :count], order = order[:count], order[count:]
        self.tokens = sum(self.queries)
        self.q = rng.standard_normal((self.tokens, self.heads, self.dim)).astype(
            ACTIVATIONS[self.activation]
        )
        self.scale = float(self.dim**-0.5)

    @property
    def element(self) -> np.dtype[Any]:
        return FORMATS.get(self.storage, ACTIVATIONS[self.activation])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.num_blocks, self.block_size, self.kv_heads, self.dim

    def sides(self, scales: list[Array] | None) -> list[Array]:
        """Keys and values [blocks, block_size, kv_heads, dim], about 1 in size with their scales.

        What no request has written is poisoned, scales of tokens included.
        """
        unwritten = np.ones(self.shape[:2], bool)
        for row, length in enumerate(self.lengths):
            for position in range(length):
                block = self.table[row, position // self.block_size]
                unwritten[block, position % self.block_size] = False
        sides = []
        for side in range(2):
            exact = self.rng.standard_normal(self.shape)
            if scales is not None:
                exact = exact / full_scales(scales[side], self.shape)[..., None]
                largest = float(ml_dtypes.finfo(self.element).max)
                exact = np.clip(exact, -largest, largest)
            stored = exact.astype(self.element)
            stored[unwritten] = np.nan
            sides.append(stored)
            if scales is not None and scales[side].ndim == 3:
                scales[side][unwritten] = np.nan
        return sides

    def run(
        self,
        device: str,
        sides: list[Array],
        scales: list[Array] | None = None,
        *,
        layout: Strides | None = None,
        scale_layout: Strides | None = None,
        planned: bool = False,
        gap: int = 0,
    ) -> Array:
        layout = layout or spread(self.shape, (0, 1, 2, 3), (0, 0, 0, 0), 0)
        caches = [layout.place(device, side) for side in sides]
        q_strides = spread(self.q.shape, (0, 1, 2), (gap, 0, 0), 0)
        q = q_strides.place(device, self.q)
        batch = [
            on_device(device, self.table.reshape(-1)).reshape(self.table.shape),
            on_device(device, np.array(self.lengths, np.int32)),
            on_device(device, np.cumsum([0, *self.queries]).astype(np.int32)),
        ]
        options: dict[str, Any] = {"window": self.window, "softcap": self.softcap}
        if scales is not None:
            options["kv_cache_dtype"] = self.storage
            names = ("k_scale", "v_scale")
            for name, side in zip(names, scales, strict=True):
                own = scale_layout or spread(side.shape, range(side.ndim), [0] * side.ndim, 0)
                options[name] = own.place(device, side)
        if planned:
            table, lengths, starts = batch
            options["plan"] = ops.plan_attention(
                starts, lengths, table, num_tokens=self.tokens, num_heads=self.heads,
                num_kv_heads=self.kv_heads, head_dim=self.dim, block_size=self.block_size,
                num_blocks=self.num_blocks, dtype=self.activation, window=self.window,
                softcap=self.softcap, kv_cache_dtype=self.storage,
            )  # fmt: skip
            batch = []
        return fetched(ops.paged_attention(q, *caches, *batch, scale=self.scale, **options))

    def expected(
        self, sides: list[Array], scales: list[Array] | None = None
    ) -> tuple[Array, Array]:
        """The result in float64, and the same with the values' magnitudes."""
        exact = [side.astype(np.float64) for side in sides]
        if scales is not None:
            exact = [
                side * full_scales(scale, self.shape)[..., None]
                for side, scale in zip(exact, scales, strict=True)
            ]
        out = np.zeros(self.q.shape)
        size = np.zeros(self.q.shape)
        token = 0
        for row, (queries, length) in enumerate(zip(self.queries, self.lengths, strict=True)):
            keys, values = (
                side[self.table[row]].reshape(-1, self.kv_heads, self.dim)[:length]
                for side in exact
            )
            for position in range(length - queries, length):
                first = max(0, position - self.window + 1) if self.window else 0
                for head in range(self.heads):
                    kv = head // (self.heads // self.kv_heads)
                    q = self.q[token, head].astype(np.float64)
                    scores = keys[first : position + 1, kv] @ q * self.scale
                    if self.softcap:
                        scores = self.softcap * np.tanh(scores / self.softcap)
                    weights = np.exp(scores - scores.max())
                    weights /= weights.sum()
                    seen = values[first : position + 1, kv]
                    out[token, head] = weights @ seen
                    size[token, head] = weights @ np.abs(seen)
                token += 1
        return out, size

    def check(self, got: Array, sides: list[Array], scales: list[Array] | None) -> None:
        expected, size = self.expected(sides, scales)
        assert np.isfinite(got).all()
        # The last term is the smallest number of bfloat16: results below it may be lost.
        error = np.abs(got - expected) - TOLERANCE[self.activation] * size - 2.0**-126
        assert error.max() <= 0, f"off by {np.abs(got - expected).max():.3g}, {self}"


def full_scales(scales: Array, shape: Sequence[int]) -> Array:
    """Scales of every [block, token, head], as float64."""
    return np.broadcast_to(scales.astype(np.float64), shape[:3])


def scales_of(batch: Batch, kind: str, low: float = -6, high: float = -2) -> list[Array]:
    """Scales of keys and of values, 2^low to 2^high in size."""
    shape = {"tensor": (1,), "head": (batch.kv_heads,), "token": batch.shape[:3]}[kind]
    return [np.exp2(batch.rng.uniform(low, high, shape)).astype(np.float32) for _ in range(2)]


def draw_batch(draw: st.DataObject, activation: str, storage: str) -> Batch:
    kv_heads = draw.draw(st.integers(1, 3), label="kv_heads")
    group = draw.draw(st.sampled_from([1, 2, 4, 5, 8, 17]), label="group")
    requests = draw.draw(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 150)), min_size=1, max_size=4),
        label="queries and context",
    )
    requests.sort(key=lambda request: request[0] > 1)  # decode rows come first
    return Batch(
        queries=[queries for queries, _ in requests],
        lengths=[queries + context for queries, context in requests],
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=draw.draw(st.sampled_from([8, 24, 48, 64, 72, 80, 96, 112, 128, 256]), label="dim"),
        block_size=draw.draw(st.sampled_from([1, 3, 8, 16, 32]), label="block_size"),
        activation=activation,
        storage=storage,
        window=draw.draw(st.sampled_from([0, 0, 1, 7, 16, 64, 90, 1000]), label="window"),
        softcap=draw.draw(st.sampled_from([0.0, 0.0, 2.0, 50.0]), label="softcap"),
        seed=draw.draw(st.integers(0, 2**32 - 1), label="seed"),
    )


ORDERS = [(*order, 3) for order in itertools.permutations(range(3))]


def draw_layout(draw: st.DataObject, shape: Sequence[int]) -> Strides:
    """NHD, HND and all other orders, packed or not, aligned or not."""
    order = draw.draw(st.sampled_from(ORDERS), label="order")
    unit = draw.draw(st.sampled_from([16, 16, 8, 1]), label="alignment")
    gaps = [unit * draw.draw(st.integers(0, 2), label="gap") for _ in range(3)]
    # The rows themselves: a gap after head_dim is one between rows.
    offset = unit * draw.draw(st.integers(0, 3), label="offset")
    return spread(
        shape, order, [*gaps, unit * draw.draw(st.integers(0, 1), label="row gap")], offset
    )


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@settings(max_examples=EXAMPLES)
@given(draw=st.data())
def test_every_cache_is_read(
    device: str, activation: str, storage: str, draw: st.DataObject
) -> None:
    batch = draw_batch(draw, activation, storage)
    scales = scale_layout = None
    if storage != "auto":
        kind = draw.draw(st.sampled_from(SCALES), label="scales")
        scales = scales_of(batch, kind)
        if kind == "token":
            order = draw.draw(st.permutations(range(3)), label="order of scales")
            gaps = [draw.draw(st.integers(0, 2), label="gap of scales") for _ in range(3)]
            scale_layout = spread(batch.shape[:3], order, gaps, 1)
    sides = batch.sides(scales)
    got = batch.run(
        device,
        sides,
        scales,
        layout=draw_layout(draw, batch.shape),
        scale_layout=scale_layout,
        planned=draw.draw(st.booleans(), label="planned"),
        gap=draw.draw(st.sampled_from([0, 8, 3]), label="gap of queries"),
    )
    batch.check(got, sides, scales)


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("activation", ["float32", "bfloat16"])
@settings(max_examples=EXAMPLES)
@given(draw=st.data())
def test_scales_of_any_size(
    device: str, activation: str, storage: str, draw: st.DataObject
) -> None:
    """From 2^-126, that of a token of zeros, to 2^100, beside each other."""
    batch = draw_batch(draw, activation, storage)
    batch.dim = draw.draw(st.sampled_from([64, 128]), label="aligned dim")
    batch.__post_init__()
    scales = scales_of(batch, "token")
    sides = batch.sides(scales)
    tokens = scales[1].shape
    low, high = draw.draw(st.sampled_from([(-126, 100), (-126, -124), (90, 100), (-40, 40)]))
    scales[1] = np.exp2(batch.rng.integers(low, high, tokens, endpoint=True)).astype(np.float32)
    zeros = batch.rng.random(tokens) < draw.draw(st.sampled_from([0.0, 0.3, 1.0]), label="zeros")
    sides[1][zeros] = 0
    scales[1][zeros] = 2.0**-126
    # Keys of no size, too: all scores are 0 there.
    flat = batch.rng.random(tokens) < 0.2
    sides[0][flat] = 0
    scales[0][flat] = 2.0**-126
    batch.check(batch.run(device, sides, scales), sides, scales)


@pytest.mark.parametrize("size", [2.0**-120, 2.0**-20, 2.0**20, 2.0**110])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_queries_of_any_size(device: str, dim: int, size: float) -> None:
    """Scores stay what they are where large queries meet small keys, and the other way round."""
    batch = Batch([1, 1, 5], [40, 130, 70], 8, 2, dim, 16, "bfloat16", "fp8_e4m3")
    scales = scales_of(batch, "token")
    sides = batch.sides(scales)
    batch.q = (batch.q.astype(np.float64) * size).astype(batch.q.dtype)
    scales[0] = (scales[0].astype(np.float64) / size).astype(np.float32)
    scales[0] = np.maximum(scales[0], np.float32(2.0**-126))
    batch.check(batch.run(device, sides, scales), sides, scales)


@pytest.mark.parametrize("activation", ["float32", "bfloat16"])
@pytest.mark.parametrize("storage", FORMATS)
def test_nan_stays_in_its_request(device: str, activation: str, storage: str) -> None:
    batch = Batch([1, 1, 1], [50, 60, 70], 4, 2, 64, 16, activation, storage)
    scales = scales_of(batch, "token")
    sides = batch.sides(scales)
    before = batch.run(device, sides, scales)
    for side in range(2):
        poisoned = [s.copy() for s in sides]
        block, token = batch.table[1, 2], 40 % 16
        poisoned[side].view(np.uint8)[block, token, 1, 5] = 0x7F
        got = batch.run(device, poisoned, scales)
        # The query heads of key/value head 1 of the request: all of the row where it is a key.
        hit = got[1, 2:] if side == 0 else got[1, 2:, 5]
        assert np.isnan(hit).all()
        np.testing.assert_array_equal(got[[0, 2]], before[[0, 2]])
        np.testing.assert_array_equal(got[1, :2], before[1, :2])


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("scale_kind", SCALES)
def test_a_needle_in_a_long_context(device: str, storage: str, scale_kind: str) -> None:
    """One key of many thousand that fits, and then a flat sum of as many: no part is lost."""
    if storage == "auto" and scale_kind != "token":
        pytest.skip("has no scales")
    length = 20000
    batch = Batch([1, 1], [length, length], 4, 1, 128, 16, "bfloat16", storage)
    scales = None
    if storage != "auto":
        shape = {"tensor": (1,), "head": (1,), "token": batch.shape[:3]}[scale_kind]
        scales = [np.full(shape, 1 / 64, np.float32) for _ in range(2)]
    sides = batch.sides(scales)
    needle = 12345
    block, token = batch.table[0, needle // 16], needle % 16
    unit = 1.0 if scales is None else 1 / 64
    sides[0][block, token, 0] = (batch.q[0, 0].astype(np.float64) * 2 / unit).astype(batch.element)
    batch.q[1] = 0  # all weights are equal
    expected, size = batch.expected(sides, scales)
    got = batch.run(device, sides, scales)
    error = np.abs(got - expected)
    assert (error <= 8e-3 * size).all()
    # Errors of a flat sum cancel: the result is nearer than its parts.
    assert error[1].max() <= 2e-4 + 4e-3 * np.abs(expected[1]).max()


def test_a_plan_for_other_caches_is_refused(device: str) -> None:
    batch = Batch([1], [20], 2, 1, 64, 16, "bfloat16", "fp8_e4m3")
    scales = scales_of(batch, "token")
    sides = batch.sides(scales)
    table, lengths, starts = (
        on_device(device, self).reshape(shape)
        for self, shape in (
            (batch.table.reshape(-1), batch.table.shape),
            (np.array([20], np.int32), (1,)),
            (np.array([0, 1], np.int32), (2,)),
        )
    )
    plan = ops.plan_attention(
        starts, lengths, table, num_tokens=1, num_heads=2, num_kv_heads=1, head_dim=64,
        block_size=16, num_blocks=batch.num_blocks, dtype="bfloat16",
    )  # fmt: skip
    layout = spread(batch.shape, (0, 1, 2, 3), (0, 0, 0, 0), 0)
    own = spread(batch.shape[:3], (0, 1, 2), (0, 0, 0), 0)
    q = spread(batch.q.shape, (0, 1, 2), (0, 0, 0), 0).place(device, batch.q)
    with pytest.raises(ValueError, match="kv_cache_dtype"):
        ops.paged_attention(
            q, *(layout.place(device, side) for side in sides), plan=plan,
            kv_cache_dtype="fp8_e4m3", k_scale=own.place(device, scales[0]),
            v_scale=own.place(device, scales[1]),
        )  # fmt: skip
    with pytest.raises(ValueError, match="fp8_e5m2"):
        ops.plan_attention(
            starts, lengths, table, num_tokens=1, num_heads=2, num_kv_heads=1, head_dim=64,
            block_size=16, num_blocks=2, dtype="bfloat16", kv_cache_dtype="fp8",
        )  # fmt: skip


def test_a_plan_for_more_blocks_is_refused(device: str) -> None:
    """Its block table may name blocks that a smaller cache does not have."""
    cache = [on_device(device, np.zeros(2 * 4 * 8, np.float32)).reshape(2, 4, 1, 8)] * 2
    q = on_device(device, np.ones(8, np.float32)).reshape(1, 1, 8)
    plan = ops.plan_attention(
        on_device(device, np.int32([0, 1])), on_device(device, np.int32([4])),
        on_device(device, np.int32([7])).reshape(1, 1), num_tokens=1, num_heads=1, num_kv_heads=1,
        head_dim=8, block_size=4, num_blocks=8, dtype="float32",
    )  # fmt: skip
    with pytest.raises(ValueError, match="plan is for caches of 8 blocks; key_cache has 2"):
        ops.paged_attention(q, *cache, plan=plan)
    with pytest.raises(ValueError, match="plan must be what plan_attention made"):
        ops.paged_attention(q, *cache, plan=3)  # type: ignore[arg-type]


def test_too_many_heads_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="num_heads = 131072: must be at most 65536"):
        ops.plan_attention(
            on_device(device, np.int32([0, 1])), on_device(device, np.int32([4])),
            on_device(device, np.int32([7])).reshape(1, 1), num_tokens=1, num_heads=1 << 17,
            num_kv_heads=1, head_dim=8, block_size=4, num_blocks=8, dtype="float32",
        )  # fmt: skip


def test_queries_that_lie_at_one_place_are_refused(device: str) -> None:
    cache = [on_device(device, np.zeros(2 * 4 * 8, np.float32)).reshape(2, 4, 1, 8)] * 2
    row = on_device(device, np.ones(8, np.float32)).reshape(1, 1, 8)
    q = np.broadcast_to(row, (3, 1, 8)) if device == "cpu" else row.expand(3, 1, 8)
    table = on_device(device, np.int32([1])).reshape(1, 1)
    lengths = on_device(device, np.int32([3]))
    starts = on_device(device, np.int32([0, 3]))
    with pytest.raises(ValueError, match="tokens a positive stride apart"):
        ops.paged_attention(q, *cache, table, lengths, starts)
