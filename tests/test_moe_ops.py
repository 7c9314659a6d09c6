# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The ops of a mixture of experts on the device under test, against float64 and against themselves.

Sizes and values are drawn by Hypothesis: any number of experts, ties, rows without a token, experts
of other ranks, NaN.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_arrays import Storage, contiguous, in_stream_of, stored
from mrv1 import _core, ops, tuning
from mrv1.builder import Builder, Part, Value
from mrv1.errors import InvalidArgumentError
from mrv1.parallel import Shard

Array = np.ndarray
DTYPES = ("float32", "bfloat16")
ROW_COUNTS = (1, 2, 3, 8, 17, 40)
GATE_UP = ("gate", "up")
# Drawn for each test; fewer where a tool makes each of them slow.
EXAMPLES = int(os.environ.get("MRV1_TEST_EXAMPLES", "20"))


def rounded(values: Array, dtype: str) -> Array:
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    return values.astype(np.float32).astype(kind).astype(np.float64)


# --- moe_route --------------------------------------------------------------------------------


@dataclasses.dataclass
class Route:
    """A router, and the logits of a step."""

    logits: Array  # float32 [tokens, experts]
    top_k: int
    scores: str = "softmax"
    bias: Array | None = None
    renormalize: bool = True
    min_sum: float = 0.0
    scale: float = 1.0
    token_batch: Array | None = None

    def run(self, device: _core.Device) -> tuple[Array, Array]:
        """Experts and weights, [tokens, top_k]."""
        tokens, experts = self.logits.shape
        program = _core.Program("bfloat16")
        bias = -1
        if self.bias is not None:
            bias = program.weight("bias", True, 1, [("bias", experts)])
        logits = program.input("logits", experts, dtype="float32")
        out = program.moe_route(
            logits,
            top_k=self.top_k,
            bias=bias,
            scores=self.scores,
            renormalize=self.renormalize,
            min_sum=self.min_sum,
            scale=self.scale,
        )
        for value in out:
            program.output(value)
        session = _core.ProgramSession(device, program, max_tokens=max(tokens, 1))
        if self.bias is not None:
            session.load_weight(bias, self.bias)
        session.set_value(logits, self.logits)
        batch = np.zeros(tokens) if self.token_batch is None else self.token_batch
        session.set_ints("token_batch", batch.astype(np.int32))
        for value in out:  # so that what is not written shows
            session.set_value(value, np.full(max(tokens, 1) * self.top_k, -7, np.float32))
        session.run(1, tokens, 0)
        chosen, weights = (session.value(value, tokens) for value in out)
        session.close()
        return chosen.astype(np.int32), weights

    def reference_scores(self) -> Array:
        wide = self.logits.astype(np.float64)
        if self.scores == "sigmoid":
            return 1 / (1 + np.exp(-wide))
        powers = np.exp(wide - wide.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    def reference_weights(self, chosen: Array) -> Array:
        weights = np.take_along_axis(self.reference_scores(), chosen, -1)
        if self.renormalize:
            weights /= np.maximum(weights.sum(-1, keepdims=True), self.min_sum)
        return weights * self.scale


def draw_route(draw: st.DataObject, *, ties: bool) -> Route:
    rng = np.random.default_rng(draw.draw(st.integers(0, 2**32)))
    experts = draw.draw(st.sampled_from([1, 2, 5, 8, 31, 64, 100, 128, 257, 1024]))
    tokens = draw.draw(st.sampled_from(ROW_COUNTS))
    spread = draw.draw(st.sampled_from([0.01, 1.0, 30.0]))
    logits = rng.standard_normal((tokens, experts)) * spread
    if ties:
        logits = rng.integers(-2, 3, (tokens, experts))
    return Route(
        logits.astype(np.float32),
        draw.draw(st.one_of(st.integers(1, min(experts, 12)), st.just(experts))),
        scores=draw.draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalize=draw.draw(st.booleans()),
        min_sum=draw.draw(st.sampled_from([0.0, 1e-12, 0.5])),
        scale=draw.draw(st.sampled_from([1.0, 2.5])),
    )


@settings(max_examples=EXAMPLES)
@given(draw=st.data())
def test_router_chooses_by_logits(native_device: _core.Device, draw: st.DataObject) -> None:
    route = draw_route(draw, ties=draw.draw(st.booleans()))
    chosen, weights = route.run(native_device)
    np.testing.assert_array_equal(
        chosen, np.argsort(-route.logits, -1, kind="stable")[:, : route.top_k]
    )
    np.testing.assert_allclose(weights, route.reference_weights(chosen), rtol=1e-5, atol=1e-37)


@settings(max_examples=EXAMPLES)
@given(draw=st.data())
def test_router_chooses_with_a_bias(native_device: _core.Device, draw: st.DataObject) -> None:
    route = draw_route(draw, ties=False)
    rng = np.random.default_rng(route.logits.size)
    experts = route.logits.shape[1]
    route.bias = (rng.standard_normal(experts) * 0.1).astype(np.float32)
    chosen, weights = route.run(native_device)
    # Values that differ by rounding may change places.
    values = route.reference_scores() + route.bias
    ordered = np.take_along_axis(values, chosen, -1)
    best = -np.sort(-values, -1)[:, : route.top_k]
    np.testing.assert_allclose(ordered, best, atol=1e-6)
    assert all(len(set(row)) == route.top_k for row in chosen.tolist())
    np.testing.assert_allclose(weights, route.reference_weights(chosen), rtol=1e-5, atol=1e-37)


@settings(max_examples=EXAMPLES)
@given(draw=st.data())
def test_routers_of_all_devices_agree(native_device: _core.Device, draw: st.DataObject) -> None:
    """Bit for bit, with ties, biases, infinities and NaN."""
    route = draw_route(draw, ties=draw.draw(st.booleans()))
    rng = np.random.default_rng(route.logits.size)
    if draw.draw(st.booleans()):
        route.bias = rng.integers(-2, 3, route.logits.shape[1]).astype(np.float32)
    for special in draw.draw(st.lists(st.sampled_from([np.nan, -np.nan, np.inf, -np.inf, -0.0]))):
        route.logits.reshape(-1)[rng.integers(route.logits.size)] = special
    alone = tuning.make_device("cpu", num_threads=1)
    expected = route.run(alone)
    alone.close()
    for mine, other in zip(route.run(native_device), expected, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_router_orders_nan_last(native_device: _core.Device) -> None:
    logits = np.zeros((4, 6), np.float32)
    logits[1, :4] = np.nan
    logits[2, :] = np.nan
    logits[3, 0] = -np.inf
    for scores in ("softmax", "sigmoid"):
        chosen, weights = Route(logits, 3, scores=scores).run(native_device)
        np.testing.assert_array_equal(chosen, [[0, 1, 2], [4, 5, 0], [0, 1, 2], [1, 2, 3]])
        assert np.isnan(weights[1:3]).all()
        np.testing.assert_allclose(weights[[0, 3]], 1 / 3, rtol=1e-6)


def test_router_leaves_out_rows_without_a_token(native_device: _core.Device) -> None:
    logits = np.arange(20, dtype=np.float32).reshape(5, 4)
    logits[1] = np.nan
    chosen, weights = Route(logits, 2, token_batch=np.array([0, -1, 1, 2, -1])).run(native_device)
    np.testing.assert_array_equal(chosen, [[3, 2], [-1, -1], [3, 2], [3, 2], [-1, -1]])
    np.testing.assert_array_equal(weights[[1, 4]], 0)
    np.testing.assert_allclose(weights[[0, 2, 3]].sum(-1), 1, rtol=1e-6)


def test_router_of_an_empty_batch(native_device: _core.Device) -> None:
    chosen, _ = Route(np.zeros((0, 4), np.float32), 2).run(native_device)
    assert chosen.shape[0] == 0


# --- moe_experts ------------------------------------------------------------------------------


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


@dataclasses.dataclass
class Experts:
    """A layer's experts, and what goes through them."""

    x: Array  # [rows, hidden]
    experts: Array  # int [rows, top_k]
    weights: Array  # float32 [rows, top_k]
    gate_up: Array  # [matrices, 2 * intermediate, hidden]
    down: Array  # [matrices, hidden, intermediate]
    dtype: str
    activation: str = "silu"
    first_expert: int = 0
    num_experts: int = 0
    wide: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def session(self, device: _core.Device) -> tuple[_core.ProgramSession, list[int]]:
        count, hidden, intermediate = self.down.shape
        program = _core.Program(self.dtype)
        # Gate and up are tensors of their own, as checkpoints have them.
        halves = [(f"{e}.{half}", intermediate) for e in range(count) for half in GATE_UP]
        gate_up = program.weight("gate_up", False, hidden, halves, matrices=count)
        rows = [(f"{e}.down", hidden) for e in range(count)]
        down = program.weight("down", False, intermediate, rows, matrices=count)
        top_k = self.experts.shape[1]
        inputs = [
            program.input("x", hidden),
            program.input("experts", top_k, dtype="int32"),
            program.input("weights", top_k, dtype="float32"),
        ]
        out = program.moe_experts(
            *inputs,
            gate_up,
            down,
            activation=self.activation,
            first_expert=self.first_expert,
            num_experts=self.num_experts,
            wide=self.wide,
        )
        program.output(out)
        session = _core.ProgramSession(device, program, max_tokens=max(len(self.x), 1))
        session.set_options(**self.options)
        session.load_weight(gate_up, self.gate_up.astype(np.float32).reshape(-1, hidden))
        session.load_weight(down, self.down.astype(np.float32).reshape(-1, intermediate))
        return session, [*inputs, out]

    def run(self, device: _core.Device, *batches: Array) -> list[Array]:
        """What comes of the rows of each batch, or of all rows."""
        session, (*inputs, out) = self.session(device)
        results = []
        for rows in batches or (np.arange(len(self.x)),):
            for value, data in zip(inputs, (self.x, self.experts, self.weights), strict=True):
                session.set_value(value, data[rows].astype(np.float32))
            session.set_value(out, np.full(self.x.size, np.nan, np.float32))
            session.run(1, len(rows), 0)
            results.append(session.value(out, len(rows)).reshape(len(rows), self.x.shape[1]))
        session.close()
        return results

    def expected(self) -> Array:
        x = rounded(self.x, self.dtype)
        gate_up, down = rounded(self.gate_up, self.dtype), rounded(self.down, self.dtype)
        total = np.zeros_like(x)
        for row, (ids, weights) in enumerate(zip(self.experts, self.weights, strict=True)):
            for expert, weight in zip(ids - self.first_expert, weights, strict=True):
                if 0 <= expert < len(down):
                    gate, up = np.split(gate_up[expert] @ x[row], 2)
                    total[row] += weight * (
                        down[expert] @ (ACTIVATIONS[self.activation](gate) * up)
                    )
        return total


def make_experts(
    rng: np.random.Generator,
    dtype: str,
    *,
    rows: int,
    hidden: int,
    intermediate: int,
    count: int,
    top_k: int,
    spare: int = 0,
    **fields: Any,
) -> Experts:
    """Random ones; ids are of the experts, and of `spare` more that are elsewhere or nowhere."""
    first = fields.get("first_expert", 0)
    ids = [rng.permutation(count + spare)[:top_k] + first - spare // 2 for _ in range(rows)]
    experts = np.array(ids).reshape(rows, top_k)
    return Experts(
        rng.standard_normal((rows, hidden)),
        np.maximum(experts, -1),
        rng.random((rows, top_k), np.float32),
        rng.standard_normal((count, 2 * intermediate, hidden)) / np.sqrt(hidden),
        rng.standard_normal((count, hidden, intermediate)) / np.sqrt(intermediate),
        dtype,
        **fields,
    )


def draw_experts(draw: st.DataObject, dtype: str, **fields: Any) -> Experts:
    rng = np.random.default_rng(draw.draw(st.integers(0, 2**32)))
    count, spare = draw.draw(st.integers(1, 12)), draw.draw(st.sampled_from([0, 0, 3]))
    size = st.one_of(st.sampled_from([16, 32, 64, 128]), st.integers(1, 150))
    return make_experts(
        rng,
        dtype,
        rows=draw.draw(st.sampled_from(ROW_COUNTS)),
        hidden=draw.draw(size),
        intermediate=draw.draw(size),
        count=count,
        top_k=draw.draw(st.integers(1, count + spare)),
        spare=spare,
        first_expert=draw.draw(st.sampled_from([0, 0, 2, 5])),
        activation=draw.draw(st.sampled_from(list(ACTIVATIONS))),
        wide=draw.draw(st.booleans()),
        **fields,
    )


TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES)
@given(draw=st.data())
def test_experts_agree_with_float64(
    native_device: _core.Device, dtype: str, draw: st.DataObject
) -> None:
    case = draw_experts(draw, dtype)
    (actual,) = case.run(native_device)
    expected = case.expected()
    # Relative to the terms of a sum, which may cancel.
    scale = np.linalg.norm(case.weights, axis=-1) * np.sqrt(case.x.shape[1])
    error = np.linalg.norm(actual - expected, axis=-1)
    scale = np.maximum(scale, np.linalg.norm(expected, axis=-1))
    assert (error <= TOLERANCE[dtype] * scale).all(), (error / scale).max()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES)
@given(draw=st.data())
def test_rows_do_not_depend_on_the_batch(
    native_device: _core.Device, dtype: str, draw: st.DataObject
) -> None:
    case = draw_experts(draw, dtype, options={"batch_invariant": True})
    rows = np.arange(len(case.x))
    order = np.random.default_rng(case.x.size).permutation(rows)
    cut = len(rows) // 2
    whole, shuffled, *parts = case.run(
        native_device, rows, order, rows[:cut], rows[cut:], rows[-1:]
    )
    np.testing.assert_array_equal(shuffled, whole[order])
    np.testing.assert_array_equal(np.concatenate(parts[:2]), whole)
    np.testing.assert_array_equal(parts[2], whole[-1:])


@pytest.mark.parametrize("count", [8, 11, 19])
def test_sums_have_the_bits_of_one_rank(native_device: _core.Device, count: int) -> None:
    """In batch-invariant steps, where ranks have some of the experts each."""
    rng = np.random.default_rng(count)
    whole = make_experts(
        rng, "bfloat16", rows=9, hidden=136, intermediate=32, count=count, top_k=5, wide=True,
        options={"batch_invariant": True},
    )  # fmt: skip
    (expected,) = whole.run(native_device)
    for size in (1, 2, 4, 8):
        parts = []
        for rank in range(size):
            own = Shard(rank, size, expert_parallel=True).own_experts(count)
            part = dataclasses.replace(
                whole, gate_up=whole.gate_up[own], down=whole.down[own], first_expert=own.start,
                num_experts=count,
            )  # fmt: skip
            parts += part.run(native_device)
        while len(parts) > 1:  # as all_reduce adds them
            parts = [parts[i] + parts[i + 1] for i in range(0, len(parts), 2)]
        np.testing.assert_array_equal(parts[0], expected)


def test_rows_of_a_long_batch(native_device: _core.Device) -> None:
    """More rows than the scratch of one pass holds."""
    rng = np.random.default_rng(5)
    case = make_experts(
        rng, "bfloat16", rows=4100, hidden=8, intermediate=16, count=9, top_k=5, spare=2,
        options={"batch_invariant": True},
    )  # fmt: skip
    rows = np.arange(4100)
    whole, tail = case.run(native_device, rows, rows[-100:])
    np.testing.assert_array_equal(whole[-100:], tail)
    expected = case.expected()
    assert np.linalg.norm(whole - expected) <= 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_nobody_give_zeros(native_device: _core.Device, dtype: str) -> None:
    rng = np.random.default_rng(6)
    case = make_experts(rng, dtype, rows=6, hidden=48, intermediate=32, count=4, top_k=2)
    case.experts[[0, 3]] = -1
    case.experts[4] = [7, -1]  # of another rank
    case.weights[0] = np.nan  # whose weight is not read
    (some,) = case.run(native_device)
    np.testing.assert_array_equal(some[[0, 3, 4]], 0)
    assert (np.linalg.norm(some[[1, 2, 5]], axis=-1) > 0).all()
    case.experts[:] = -1
    (none,) = case.run(native_device)
    np.testing.assert_array_equal(none, 0)


def test_experts_of_an_empty_batch(native_device: _core.Device) -> None:
    rng = np.random.default_rng(7)
    case = make_experts(rng, "bfloat16", rows=3, hidden=32, intermediate=32, count=4, top_k=2)
    nothing, everything = case.run(native_device, np.arange(0), np.arange(3))
    assert nothing.size == 0
    assert np.isfinite(everything).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(native_device: _core.Device, dtype: str) -> None:
    rng = np.random.default_rng(8)
    case = make_experts(
        rng, dtype, rows=5, hidden=64, intermediate=32, count=3, top_k=2,
        options={"batch_invariant": True},
    )  # fmt: skip
    (clean,) = case.run(native_device)
    case.x[1, 5] = np.nan
    case.weights[3, 1] = np.nan
    (dirty,) = case.run(native_device)
    assert np.isnan(dirty[[1, 3]]).all()
    np.testing.assert_array_equal(dirty[[0, 2, 4]], clean[[0, 2, 4]])


# --- the program ------------------------------------------------------------------------------


def test_program_refuses_what_does_not_fit() -> None:
    program = _core.Program("bfloat16")
    x = program.input("x", 8)
    logits = program.input("logits", 4, dtype="float32")
    gate_up = program.weight("gate_up", False, 8, [("a", 24)], matrices=2)
    down = program.weight("down", False, 6, [("b", 16)], matrices=2)
    other = program.weight("other", False, 6, [("c", 8)])
    for top_k in (0, 5):
        with pytest.raises(InvalidArgumentError, match=r"moe_route.*top_k must be in \[1, 4\]"):
            program.moe_route(logits, top_k=top_k)
    with pytest.raises(InvalidArgumentError, match=r"moe_route.*float32"):
        program.moe_route(x, top_k=1)
    with pytest.raises(InvalidArgumentError, match=r"moe_route.*softmax or sigmoid"):
        program.moe_route(logits, top_k=1, scores="tanh")
    many = program.input("many", 1025, dtype="float32")
    with pytest.raises(InvalidArgumentError, match=r"moe_route.*at most 1024"):
        program.moe_route(many, top_k=1)
    experts, weights = program.moe_route(logits, top_k=2)
    with pytest.raises(InvalidArgumentError, match=r"moe_experts.*experts must be int32"):
        program.moe_experts(x, weights, experts, gate_up, down)
    with pytest.raises(InvalidArgumentError, match=r"moe_experts.*must be as many"):
        program.moe_experts(x, experts, weights, gate_up, other)
    with pytest.raises(InvalidArgumentError, match=r"moe_experts.*must be \[2 n, 8\]"):
        program.moe_experts(x, experts, weights, down, gate_up)
    with pytest.raises(InvalidArgumentError, match=r"moe_experts.*first_expert"):
        program.moe_experts(x, experts, weights, gate_up, down, first_expert=2, num_experts=3)
    with pytest.raises(InvalidArgumentError, match=r"moe_experts.*num_experts must be in"):
        program.moe_experts(x, experts, weights, gate_up, down, first_expert=1023)
    with pytest.raises(InvalidArgumentError, match=r"linear.*must be one matrix"):
        program.linear(x, gate_up)
    with pytest.raises(InvalidArgumentError, match=r"weight.*equal matrices"):
        program.weight("uneven", False, 8, [("d", 7)], matrices=2)
    assert program.weight_matrices == [2, 2, 1]
    out = program.moe_experts(x, experts, weights, gate_up, down, row_parallel=True)
    program.output(out)
    assert program.op_names == ["moe_route", "moe_experts"]
    assert program.cuts == [("collective", 2)]
    assert "moe_experts(%0, %" in program.dump()


# --- the builder ------------------------------------------------------------------------------


def wire(
    shard: Shard, experts: int = 5, *, stacked: bool = False, wide_sums: bool = False
) -> _core.Program:
    """A program of one layer of experts, as a rank has it; of one tensor for all, or of many."""
    hidden, intermediate = 16, 32
    builder = Builder("float32", shard=shard, wide_sums=wide_sums)
    x = Value(builder.program.input("x", hidden))
    if stacked:
        gates = [
            [Part("gate_up", 2 * intermediate, e * 2 * intermediate, experts * 2 * intermediate, 2)]
            for e in range(experts)
        ]
        downs = [[Part("down", hidden, e * hidden, experts * hidden)] for e in range(experts)]
    else:
        gates = [[(f"{e}.gate", intermediate), (f"{e}.up", intermediate)] for e in range(experts)]
        downs = [[(f"{e}.down", hidden)] for e in range(experts)]
    logits = builder.linear(x, builder.matrix("router", experts, hidden), wide=True)
    out = builder.experts(
        x,
        logits,
        builder.matrices(hidden, *gates, split="rows"),
        builder.matrices(intermediate, *downs, split="cols"),
        top_k=2,
    )
    builder.program.output(out.index)
    return builder.program


def test_one_rank_has_all_experts() -> None:
    program = wire(Shard())
    assert program.op_names == ["linear", "moe_route", "moe_experts"]
    assert program.weight_matrices == [1, 5, 5]
    name, _, cols, segments = program.weights[1]
    assert (name, cols, len(segments)) == ("0.gate and 9 others", 16, 10)
    # Rows that follow each other in a tensor are one segment.
    assert wire(Shard(), stacked=True).weights[1][3] == [("gate_up", 5 * 64)]


def test_ranks_have_a_part_of_each_expert() -> None:
    program = wire(Shard(1, 2))
    assert program.op_names == ["linear", "moe_route", "moe_experts", "all_reduce"]
    assert program.weight_matrices == [1, 5, 5]
    assert program.weights[1][2:] == (16, [(f"{e}.{h}", 16) for e in range(5) for h in GATE_UP])
    assert program.weights[2][2:] == (16, [(f"{e}.down", 16) for e in range(5)])
    assert program.weight_slices[1] == [(32, 16, 16, 0)] * 10
    assert program.weight_slices[2] == [(16, 0, 32, 16)] * 5


def test_ranks_have_experts_of_their_own() -> None:
    for rank, own in enumerate([range(2), range(2, 4), range(4, 5)]):
        program = wire(Shard(rank, 3, expert_parallel=True))
        assert program.op_names == ["linear", "moe_route", "moe_experts", "all_reduce"]
        assert program.weight_matrices == [1, len(own), len(own)]
        assert program.weights[1][3] == [(f"{e}.{half}", 32) for e in own for half in GATE_UP]
        assert program.weights[2][2:] == (32, [(f"{e}.down", 16) for e in own])
    with pytest.raises(InvalidArgumentError, match="5 experts cannot be shared out among 6 ranks"):
        wire(Shard(0, 6, expert_parallel=True))


def test_batch_invariant_ranks_have_whole_experts() -> None:
    program = wire(Shard(1, 2), 6, wide_sums=True)
    assert program.op_names == ["linear", "moe_route", "moe_experts", "all_reduce"]
    assert program.weight_matrices == [1, 3, 3]


# --- mrv1.ops ---------------------------------------------------------------------------------


def written(
    device: _core.Device, call: Callable[..., Any], *outs: tuple[str, Array]
) -> list[Array]:
    """What a call writes into outputs like these."""
    storages = [Storage(max(like.nbytes, 1), device) for _, like in outs]
    for storage in storages:
        storage.bytes[:] = 0xFF
    arrays = {
        name: storage.array(like.shape, contiguous(like.shape), like.dtype)
        for storage, (name, like) in zip(storages, outs, strict=True)
    }
    call(**arrays, **in_stream_of(device))
    for storage in storages:
        storage.wait()
    return [
        storage.view(like.shape, contiguous(like.shape), like.dtype)
        for storage, (_, like) in zip(storages, outs, strict=True)
    ]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_route_on_arrays_of_the_caller(native_device: _core.Device, scores: str) -> None:
    rng = np.random.default_rng(9)
    route = Route(
        rng.standard_normal((5, 40)).astype(np.float32), 6, scores=scores, renormalize=False,
        bias=rng.random(40, np.float32), scale=1.5, token_batch=np.array([0, 1, -1, 2, 3]),
    )  # fmt: skip
    expected = route.run(native_device)
    logits, bias, batch = (
        stored(array, native_device)
        for array in (route.logits, route.bias, route.token_batch.astype(np.int32))
    )
    got = written(
        native_device,
        lambda **options: ops.moe_route(
            logits, 6, bias=bias, scores=scores, renormalize=False, scale=1.5, token_batch=batch,
            **options,
        ),
        ("experts_out", expected[0]),
        ("weights_out", expected[1]),
    )  # fmt: skip
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_experts_on_arrays_of_the_caller(
    native_device: _core.Device, dtype: str, wide: bool
) -> None:
    """The bits of a program's, from arrays and from packed weights."""
    rng = np.random.default_rng(10)
    case = make_experts(
        rng, dtype, rows=7, hidden=48, intermediate=40, count=5, top_k=3, spare=2, wide=wide,
        first_expert=2, activation="gelu_tanh",
    )  # fmt: skip
    kind = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    (expected,) = case.run(native_device)
    x, experts, weights, gate_up, down = (
        stored(array.astype(to), native_device)
        for array, to in (
            (case.x, kind), (case.experts, np.int32), (case.weights, np.float32),
            (case.gate_up, kind), (case.down, kind),
        )
    )  # fmt: skip
    packed = [ops.pack_linear(array, **in_stream_of(native_device)) for array in (gate_up, down)]
    assert [weight.shape for weight in packed] == [(5, 80, 48), (5, 48, 40)]
    like = np.empty(expected.shape, np.float32 if wide else kind)
    for matrices in ((gate_up, down), packed):
        (got,) = written(
            native_device,
            lambda matrices=matrices, **options: ops.moe_experts(
                x, experts, weights, *matrices, activation="gelu_tanh", first_expert=2,
                out_dtype="float32" if wide else None, **options,
            ),
            ("out", like),
        )  # fmt: skip
        np.testing.assert_array_equal(got.astype(np.float32), expected)


def test_ops_refuse_what_does_not_fit() -> None:
    x, logits = np.ones((2, 4), np.float32), np.ones((2, 3), np.float32)
    experts, weights = ops.moe_route(logits, 2)
    np.testing.assert_array_equal(experts, [[0, 1], [0, 1]])
    gate_up, down = np.ones((3, 6, 4), np.float32), np.ones((3, 4, 3), np.float32)
    assert ops.moe_experts(x, experts, weights, gate_up, down).shape == (2, 4)
    assert ops.moe_experts(x[:0], experts[:0], weights[:0], gate_up, down).shape == (0, 4)
    one = ops.pack_linear(down[0])
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: ops.moe_route(logits, 4), r"\[moe_route\] top_k = 4: must be in \[1, 3\]"),
        (lambda: ops.moe_route(x.astype(np.float64), 1), r"\[moe_route\] logits is float64"),
        (lambda: ops.moe_route(logits, 1, bias=x[0]), r"\[moe_route\] bias has shape \[4\]"),
        (lambda: ops.moe_route(logits, 1, min_sum=-1.0), r"\[moe_route\] min_sum = -1"),
        (lambda: ops.moe_route(logits, 1, scale=np.inf), r"\[moe_route\] scale = inf"),
        (lambda: ops.moe_route(logits, 1, scores="tanh"), r"\[moe_route\] scores = 'tanh'"),
        (lambda: ops.moe_route(logits, 3, weights_out=logits), r"\[moe_route\] weights_out is log"),
        (
            lambda: ops.moe_experts(x, weights, weights, gate_up, down),
            r"\[moe_experts\] experts is float32; must be int32",
        ),
        (
            lambda: ops.moe_experts(x[:1], experts, weights, gate_up, down),
            r"\[moe_experts\] experts has shape \[2, 2\]; must be \[1, 2\]",
        ),
        (
            lambda: ops.moe_experts(x, experts, weights, gate_up, down[:2]),
            r"\[moe_experts\] gate_up has 3 matrices and down 2",
        ),
        (
            lambda: ops.moe_experts(x, experts, weights, down, gate_up),
            r"\[moe_experts\] matrices of gate_up are \[4, 3\]",
        ),
        (
            lambda: ops.moe_experts(x, experts, weights, gate_up[0], down),
            r"\[moe_experts\] gate_up has shape \[6, 4\]; must be",
        ),
        (
            lambda: ops.moe_experts(x, experts, weights, gate_up, down, activation="relu"),
            r"\[moe_experts\] activation = 'relu'",
        ),
        (
            lambda: ops.moe_experts(x, experts, weights, gate_up, down, first_expert=-1),
            r"\[moe_experts\] first_expert = -1",
        ),
        (
            lambda: ops.moe_experts(x, experts, weights, gate_up, down, out=x),
            r"\[moe_experts\] out is x",
        ),
        (
            lambda: ops.linear(x, ops.pack_linear(gate_up)),
            r"\[linear\] weight was packed as 3 matrices",
        ),
        (lambda: ops.moe_experts(x, experts, weights, gate_up, one), r"3 matrices and down 1"),
    ]
    for call, message in calls:
        with pytest.raises(InvalidArgumentError, match=message):
            call()
