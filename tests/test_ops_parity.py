# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The parity table: every op of the program on the device under test against float64.

A row is an op: how to wire it, its float64 reference, the error it may make in each dtype. Shapes
and values are drawn by Hypothesis. Fused forms are compared with their parts bit for bit.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mrv1 import _core

Array = np.ndarray
DTYPES = ("float32", "bfloat16")
# Drawn for each test; fewer where a tool makes each of them slow.
EXAMPLES = int(os.environ.get("MRV1_TEST_EXAMPLES", "25"))


def rounded(values: Array, dtype: str) -> Array:
    """Values as the program holds them, as float64."""
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    return values.astype(np.float32).astype(kind).astype(np.float64)


@dataclasses.dataclass
class Case:
    """One drawn case of an op: its program, what to feed it, and what should come out.

    `inputs` are by value, `weights` by weight, `ints` by name of the infer parameter.
    """

    program: _core.Program
    inputs: dict[int, Array]
    weights: dict[int, Array]
    output: int
    expected: Array
    rows: int
    logits_rows: int = 0
    ints: dict[str, Array] = dataclasses.field(default_factory=dict)
    limits: dict[str, Any] = dataclasses.field(default_factory=dict)
    requests: int = 1
    cache: list[Array] = dataclasses.field(default_factory=list)  # keys, values; codes if FP8
    scales: list[Array] = dataclasses.field(default_factory=list)  # of an FP8 cache
    options: dict[str, object] = dataclasses.field(default_factory=dict)


def session_of(device: _core.Device, case: Case) -> _core.ProgramSession:
    """A session that holds what a case starts from."""
    session = _core.ProgramSession(
        device,
        case.program,
        **{"max_tokens": case.rows, "max_logits": max(1, case.logits_rows), **case.limits},
    )
    for weight, values in case.weights.items():
        session.load_weight(weight, values.astype(np.float32))
    session.set_options(**case.options)
    for value, data in case.inputs.items():
        session.set_value(value, data.astype(np.float32))
    for name, data in case.ints.items():
        session.set_ints(name, np.ascontiguousarray(data, dtype=np.int32))
    for side, data in enumerate(case.cache):
        session.set_cache(0, bool(side), data.astype(np.float32).reshape(-1))
    for side, data in enumerate(case.scales):
        session.set_cache_scales(0, bool(side), data.astype(np.float32).reshape(-1))
    return session


def run(device: _core.Device, case: Case) -> Array:
    """Runs a case; poisons the output buffer first, so that unwritten elements show."""
    session = session_of(device, case)
    session.set_value(case.output, np.full(case.expected.size, np.nan, np.float32))
    session.run(case.requests, case.rows, case.logits_rows)
    out = session.value(case.output, case.logits_rows or case.rows).astype(np.float64)
    session.close()
    return out


def check_close(actual: Array, expected: Array, tolerance: float) -> None:
    """Compares by ||a - e|| / ||e|| per row; NaN and infinities must stand where they should."""
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all() == np.isfinite(expected).all()
    scale = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(actual - expected, axis=-1)
    assert (error <= tolerance * scale + 1e-30).all(), (error / np.maximum(scale, 1e-30)).max()


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape)


# --- the rows -----------------------------------------------------------------------------------


def embedding(draw: st.DataObject, rng: np.random.Generator, dtype: str) -> Case:
    vocab, cols = draw.draw(st.integers(1, 70)), draw.draw(st.integers(1, 130))
    tokens = draw.draw(st.integers(1, 20))
    tied = draw.draw(st.booleans())
    scale = draw.draw(st.sampled_from([1.0, 0.3, 50.5]))
    program = _core.Program(dtype)
    table = program.weight("table", False, cols, [("table", vocab)])
    out = program.embedding(table, scale)
    program.output(out)
    if tied:  # packed for a linear that shares it
        program.output(program.linear(out, table))
    ids = rng.integers(0, vocab, tokens)
    values = normal(rng, vocab, cols)
    return Case(
        program,
        {},
        {table: values},
        out,
        # The product is made in float32.
        rounded(rounded(values, dtype).astype(np.float32)[ids] * np.float32(scale), dtype),
        tokens,
        ints={"token_ids": ids},
    )


def rms_norm(draw: st.DataObject, rng: np.random.Generator, dtype: str) -> Case:
    cols, rows = draw.draw(st.integers(1, 300)), draw.draw(st.integers(1, 9))
    residual = draw.draw(st.booleans())
    scale = draw.draw(st.sampled_from([1e-3, 1.0, 300.0]))
    offset = draw.draw(st.sampled_from([0.0, 1.0]))
    eps = 1e-6
    program = _core.Program(dtype)
    weight = program.weight("norm", True, 1, [("norm", cols)], offset)
    x = program.input("x", cols)
    data = normal(rng, rows, cols) * scale
    inputs = {x: data}
    exact = rounded(data, dtype)
    if residual:
        r = program.input("residual", cols)
        inputs[r] = normal(rng, rows, cols)
        x = program.add(x, r)
        exact = rounded(exact + rounded(inputs[r], dtype), dtype)
    out = program.rms_norm(x, weight, eps)
    program.output(out)
    if residual:
        program.output(x)
        assert dict(program.fuse())["residual + rms_norm"] == 1
    gain = 1 + 0.2 * normal(rng, cols)
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + eps)
    gain = gain.astype(np.float32)
    stored = gain + np.float32(offset)
    return Case(program, inputs, {weight: gain}, out, expected * stored, rows)


def add(draw: st.DataObject, rng: np.random.Generator, dtype: str) -> Case:
    cols, rows = draw.draw(st.integers(1, 300)), draw.draw(st.integers(1, 9))
    program = _core.Program(dtype)
    a, b = program.input("a", cols), program.input("b", cols)
    out = program.add(a, b)
    program.output(out)
    left, right = normal(rng, rows, cols), normal(rng, rows, cols)
    return Case(
        program, {a: left, b: right}, {}, out, rounded(left, dtype) + rounded(right, dtype), rows
    )


def linear(draw: st.DataObject, rng: np.random.Generator, dtype: str) -> Case:
    cols, size = draw.draw(st.integers(1, 200)), draw.draw(st.integers(1, 200))
    rows = draw.draw(st.sampled_from([1, 2, 3, 5, 8, 17, 33, 70]))
    segments = (
        [("a", size), ("b", draw.draw(st.integers(1, 40)))]
        if draw.draw(st.booleans())
        else [("a", size)]
    )
    total = sum(count for _, count in segments)
    program = _core.Program(dtype)
    weight = program.weight("w", False, cols, segments)
    bias = -1
    weights = {weight: normal(rng, total, cols) / np.sqrt(cols)}
    if draw.draw(st.booleans()):
        bias = program.weight("b", True, 1, [("bias", total)])
        weights[bias] = normal(rng, total)
    x = program.input("x", cols)
    out = program.linear(x, weight, bias=bias)
    program.output(out)
    data = normal(rng, rows, cols)
    expected = rounded(data, dtype) @ rounded(weights[weight], dtype).T
    if bias >= 0:
        expected = expected + weights[bias].astype(np.float32)
    return Case(program, {x: data}, weights, out, expected, rows)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    with np.errstate(over="ignore"):  # 1 + tanh(u), which float64 has few digits of where u < -10
        return 0.5 * x * np.where(u > -1, 1 + np.tanh(u), 2 / (1 + np.exp(-2 * u)))


ACTIVATIONS = {"silu_mul": silu, "gelu_mul": gelu_tanh}


def gated_mul(op: str) -> Callable[[st.DataObject, np.random.Generator, str], Case]:
    def make(draw: st.DataObject, rng: np.random.Generator, dtype: str) -> Case:
        cols, rows = draw.draw(st.integers(1, 150)), draw.draw(st.integers(1, 9))
        program = _core.Program(dtype)
        x = program.input("x", 2 * cols)
        out = getattr(program, op)(x)
        program.output(out)
        data = normal(rng, rows, 2 * cols) * draw.draw(st.sampled_from([1.0, 30.0]))
        gate, up = np.split(rounded(data, dtype), 2, axis=1)
        return Case(program, {x: data}, {}, out, ACTIVATIONS[op](gate) * up, rows)

    return make


def logits(draw: st.DataObject, rng: np.random.Generator, dtype: str) -> Case:
    cols, vocab = draw.draw(st.integers(1, 90)), draw.draw(st.integers(1, 130))
    tokens = draw.draw(st.integers(1, 20))
    count = draw.draw(st.integers(1, tokens))
    softcap = draw.draw(st.sampled_from([0.0, 3.0, 30.0]))
    program = _core.Program(dtype)
    head = program.weight("head", False, cols, [("head", vocab)])
    x = program.input("x", cols)
    out = program.logits(x, head, softcap)
    data = normal(rng, tokens, cols)
    picked = np.sort(rng.choice(tokens, count, replace=False))
    weights = normal(rng, vocab, cols)
    expected = rounded(data, dtype)[picked] @ rounded(weights, dtype).T
    if softcap:
        expected = softcap * np.tanh(expected / softcap)
    return Case(
        program,
        {x: data},
        {head: weights},
        out,
        expected,
        tokens,
        logits_rows=count,
        ints={"logits_indices": picked},
    )


@dataclasses.dataclass
class Heads:
    num: int
    kv: int
    dim: int

    @property
    def cols(self) -> int:
        return (self.num + 2 * self.kv) * self.dim


def draw_heads(draw: st.DataObject) -> Heads:
    kv = draw.draw(st.integers(1, 3))
    group = draw.draw(st.sampled_from([1, 2, 3, 5, 8]))
    return Heads(kv * group, kv, draw.draw(st.sampled_from([8, 24, 64, 72, 80, 96, 128, 256])))


def split(packed: Array, heads: Heads) -> tuple[Array, Array, Array]:
    shaped = packed.reshape(len(packed), -1, heads.dim)
    q, kv = shaped[:, : heads.num], shaped[:, heads.num :]
    return q, kv[:, : heads.kv], kv[:, heads.kv :]


@dataclasses.dataclass
class Scores:
    """How attention comes to its scores, and which there are."""

    scale: float
    softcap: float
    window: int

    def first(self, position: int) -> int:
        return max(0, position - self.window + 1) if self.window else 0


def draw_scores(draw: st.DataObject, heads: Heads) -> Scores:
    # Large enough for a cap of 5 to matter.
    scale = heads.dim**-0.5 * draw.draw(st.sampled_from([1.0, 1.0, 4.0]))
    softcap = draw.draw(st.sampled_from([0.0, 0.0, 5.0, 50.0]))
    return Scores(scale, softcap, draw.draw(st.sampled_from([0, 0, 1, 7, 16, 64, 90, 1000])))


def attention_reference(
    q: Array, keys: list[Array], values: list[Array], positions: Array, batch: Array, how: Scores
) -> Array:
    """Causal attention in float64: q [tokens, heads, dim], keys by request [length, kv, dim]."""
    out = np.zeros_like(q)
    for token, (position, row) in enumerate(zip(positions, batch, strict=True)):
        if row < 0:
            continue
        first = how.first(position)
        k, v = keys[row][first : position + 1], values[row][first : position + 1]
        group = q.shape[1] // k.shape[1]
        for head in range(q.shape[1]):
            scores = k[:, head // group] @ q[token, head] * how.scale
            if how.softcap:
                scores = how.softcap * np.tanh(scores / how.softcap)
            weights = np.exp(scores - scores.max())
            out[token, head] = weights / weights.sum() @ v[:, head // group]
    return out


def paged_attention(
    draw: st.DataObject, rng: np.random.Generator, dtype: str, null_block: float = np.nan
) -> Case:
    """Attention over scattered blocks, of which those that a window has left may be given up.

    What lies in given up blocks is NaN, and they are the null block in the table, which holds
    `null_block`.
    """
    heads = draw_heads(draw)
    block_size = draw.draw(st.sampled_from([1, 4, 16, 32]))
    # Per request: cached tokens and query tokens.
    lengths = draw.draw(
        st.lists(st.tuples(st.integers(0, 90), st.integers(1, 12)), min_size=1, max_size=4)
    )
    lengths.sort(key=lambda length: length[1] > 1)  # decode rows come first
    decodes = sum(query == 1 for _, query in lengths)
    padding = draw.draw(st.integers(0, 3))
    how = draw_scores(draw, heads)
    drops = draw.draw(st.booleans())
    program = _core.Program(dtype)
    qkv = program.input("qkv", heads.cols)
    out = program.attention(
        qkv,
        num_heads=heads.num,
        num_kv_heads=heads.kv,
        head_dim=heads.dim,
        kv_layer=0,
        scale=how.scale,
        window=how.window,
        softcap=how.softcap,
    )
    program.output(out)

    needed = [-(-(context + query) // block_size) for context, query in lengths]
    max_blocks = max(needed)
    order = rng.permutation(sum(needed)) + 1  # block 0 is the null block
    table = np.zeros((len(lengths), max_blocks), np.int32)
    for row, count in enumerate(needed):
        table[row, :count], order = order[:count], order[count:]
    num_blocks = sum(needed) + 1
    tokens = sum(query for _, query in lengths) + padding
    data = normal(rng, tokens, heads.cols)
    exact = rounded(data, dtype)
    q, k, v = split(exact, heads)
    # The cache is poisoned where no request has written, [blocks, heads, block_size, dim].
    cache = [np.full((num_blocks, heads.kv, block_size, heads.dim), 1e4) for _ in range(2)]
    for side in cache:
        side[0] = null_block
    keys, values = [], []
    positions, batch, slots = [], [], []
    starts = [0]
    for row, (context, query) in enumerate(lengths):
        first = starts[-1]
        own = slice(first, first + query)
        sides = []
        for side, fresh in ((0, k), (1, v)):
            old = rounded(normal(rng, context, heads.kv, heads.dim), dtype)
            for position in range(context):
                block = table[row, position // block_size]
                cache[side][block, :, position % block_size] = old[position]
            sides.append(np.concatenate([old, fresh[own]]))
        keys.append(sides[0])
        values.append(sides[1])
        for position in range(context, context + query):
            positions.append(position)
            batch.append(row)
            slots.append(table[row, position // block_size] * block_size + position % block_size)
        starts.append(first + query)
        left = how.first(context) // block_size if drops else 0
        for side in cache:
            side[table[row, :left]] = np.nan
        table[row, :left] = 0
    positions += [0] * padding
    batch += [-1] * padding
    slots += [-1] * padding
    expected = attention_reference(
        q, keys, values, np.array(positions), np.array(batch), how
    ).reshape(tokens, -1)
    ints = {
        "counts": np.array([len(lengths), tokens - padding, 0, decodes, len(lengths) - decodes, 0]),
        "row": np.arange(len(lengths)),
        "query_start_loc": np.array(starts),
        "seq_lens": np.array([context + query for context, query in lengths]),
        "token_batch": np.array(batch),
        "positions": np.array(positions),
        "slot_mapping": np.array(slots),
        "block_table": table,
    }
    return Case(
        program, {qkv: data}, {}, out, expected, tokens, ints=ints, requests=len(lengths),
        limits={
            "max_requests": len(lengths), "num_blocks": num_blocks, "block_size": block_size,
            "max_blocks": max_blocks, "max_position": 128,
        },
        cache=cache,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table."""

    make: Callable[[st.DataObject, np.random.Generator, str], Case]
    tolerance: dict[str, float]


EXACT = {"float32": 0.0, "bfloat16": 0.0}
TABLE = {
    "embedding": Row(embedding, EXACT),
    "rms_norm": Row(rms_norm, {"float32": 2e-6, "bfloat16": 4e-3}),
    "add": Row(add, {"float32": 1e-7, "bfloat16": 4e-3}),
    "linear": Row(linear, {"float32": 3e-6, "bfloat16": 4e-3}),
    "silu_mul": Row(gated_mul("silu_mul"), {"float32": 2e-6, "bfloat16": 4e-3}),
    # Where the gate is far below 0 this is exp(z), and an error of z counts |z| times over.
    "gelu_mul": Row(gated_mul("gelu_mul"), {"float32": 2e-5, "bfloat16": 4e-3}),
    "logits": Row(logits, {"float32": 3e-6, "bfloat16": 3e-6}),
    "paged_attention": Row(paged_attention, {"float32": 5e-6, "bfloat16": 6e-3}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", TABLE)
@settings(max_examples=EXAMPLES)
@given(draw=st.data(), seed=st.integers(0, 2**32 - 1))
def test_op_matches_float64(
    native_device: _core.Device, op: str, dtype: str, draw: st.DataObject, seed: int
) -> None:
    row = TABLE[op]
    case = row.make(draw, np.random.default_rng(seed), dtype)
    check_close(run(native_device, case), case.expected, row.tolerance[dtype])


# Kernels that attention may be given to; on the CPU there is one, whatever is asked for.
ATTENTION_OPTIONS: dict[str, dict[str, object]] = {
    "captured": {},
    "eager": {"eager_attention": True},
    "flashinfer": {
        "eager_attention": True,
        "attention_backend": _core.AttentionBackend.FLASHINFER,
    },
    "batch_invariant": {"batch_invariant": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ATTENTION_OPTIONS)
@settings(max_examples=EXAMPLES)
@given(draw=st.data(), seed=st.integers(0, 2**32 - 1))
def test_attention_kernels_match_float64(
    native_device: _core.Device, kernels: str, dtype: str, draw: st.DataObject, seed: int
) -> None:
    # FlashInfer reads whole tiles of keys and values, and multiplies what is masked by 0.
    reads_null = "eager_attention" in ATTENTION_OPTIONS[kernels]
    null_block = 1e4 if reads_null else np.nan
    case = paged_attention(draw, np.random.default_rng(seed), dtype, null_block)
    case.options = ATTENTION_OPTIONS[kernels]
    tolerance = TABLE["paged_attention"].tolerance[dtype]
    check_close(run(native_device, case), case.expected, tolerance)


# --- QKV preparation and fused forms ------------------------------------------------------------


@dataclasses.dataclass
class Rope:
    inv_freq: Array
    factor: float
    interleaved: bool


def draw_rope(draw: st.DataObject, dim: int) -> Rope:
    pairs = draw.draw(st.sampled_from([dim // 2, dim // 2, 3 * dim // 8, dim // 4, dim // 8]))
    inv_freq = (1.0 / 10000 ** (np.arange(pairs) / pairs)).astype(np.float32)
    return Rope(inv_freq, draw.draw(st.sampled_from([1.0, 1.19])), draw.draw(st.booleans()))


def rope_reference(x: Array, positions: Array, rope: Rope) -> Array:
    """Rotation of pairs of elements of [tokens, heads, dim] in float64."""
    angles = positions[:, None].astype(np.float32) * rope.inv_freq
    angles = angles.astype(np.float64)[:, None, :]
    pairs = len(rope.inv_freq)
    if rope.interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    cos, sin = np.cos(angles) * rope.factor, np.sin(angles) * rope.factor
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def qkv_case(
    draw: st.DataObject, rng: np.random.Generator, dtype: str, fused: bool, qk_norm: bool
) -> tuple[Case, Heads, Rope, dict[str, Array]]:
    """QK-norm, RoPE and cache write of random tokens to random slots, some of them -1."""
    heads = draw_heads(draw)
    block_size = draw.draw(st.sampled_from([1, 4, 16]))
    tokens = draw.draw(st.integers(1, 12))
    num_blocks = -(-tokens // block_size) + 3
    rope = draw_rope(draw, heads.dim)
    program = _core.Program(dtype)
    weights = {}
    norms = {}
    if qk_norm:
        for name in ("q_norm", "k_norm"):
            norms[name] = program.weight(name, True, 1, [(name, heads.dim)])
            weights[norms[name]] = 1 + 0.2 * normal(rng, heads.dim)
    qkv = program.input("qkv", heads.cols)
    out = program.attention(
        qkv,
        num_heads=heads.num,
        num_kv_heads=heads.kv,
        head_dim=heads.dim,
        kv_layer=0,
        scale=1.0,
        rope=program.rope_table(rope.inv_freq.tolist(), rope.factor, rope.interleaved),
        eps=1e-6,
        **norms,
    )
    program.output(out)
    # The value attention reads stands right before its own.
    prepared = out - 1
    program.output(prepared)
    if fused:
        counts = dict(program.fuse())
        assert counts["qk_norm + rope + cache_write"] + counts["rope + cache_write"] == 1
    data = normal(rng, tokens, heads.cols)
    positions = rng.integers(0, 4000, tokens)
    slots = rng.permutation(num_blocks * block_size)[:tokens]
    slots[rng.random(tokens) < 0.2] = -1
    poison = np.full((num_blocks, heads.kv, block_size, heads.dim), 77.0)
    ints = {
        "token_batch": np.full(tokens, -1),  # attention itself has nothing to do here
        "positions": positions,
        "slot_mapping": slots,
    }
    case = Case(
        program, {qkv: data}, weights, prepared, np.zeros((tokens, heads.cols)), tokens, ints=ints,
        limits={
            "num_blocks": num_blocks, "block_size": block_size, "max_blocks": 1,
            "max_position": 4096,
        },
        cache=[poison, poison],
    )  # fmt: skip
    return case, heads, rope, {"slots": slots, "positions": positions}


def run_qkv(device: _core.Device, case: Case) -> tuple[Array, list[Array]]:
    session = session_of(device, case)
    session.run(1, case.rows)
    out = session.value(case.output, case.rows)
    caches = [session.cache(0, bool(side)).reshape(case.cache[0].shape) for side in range(2)]
    session.close()
    return out, caches


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES)
@given(draw=st.data(), seed=st.integers(0, 2**32 - 1), fused=st.booleans())
def test_qkv_prepare_matches_float64(
    native_device: _core.Device,
    dtype: str,
    qk_norm: bool,
    draw: st.DataObject,
    seed: int,
    fused: bool,
) -> None:
    case, heads, rope, extra = qkv_case(draw, np.random.default_rng(seed), dtype, fused, qk_norm)
    out, caches = run_qkv(native_device, case)
    (data,) = case.inputs.values()
    sides = list(split(rounded(data, dtype), heads))
    if qk_norm:
        gains = list(case.weights.values())
        for side in range(2):
            x = sides[side]
            normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
            sides[side] = rounded(normed * gains[side].astype(np.float32), dtype)
    for side in range(2):
        sides[side] = rope_reference(sides[side], extra["positions"], rope)
    expected = np.concatenate(sides, axis=1).reshape(case.rows, -1)
    tolerance = 3e-6 if dtype == "float32" else 6e-3
    check_close(out.astype(np.float64), expected, tolerance)

    # Each slot holds exactly what was prepared; slots that no token has are untouched.
    _, k, v = split(out, heads)
    block_size = case.limits["block_size"]
    for cache, fresh in zip(caches, (k, v), strict=True):
        want = case.cache[0].astype(np.float32).copy()
        for token, slot in enumerate(extra["slots"]):
            if slot >= 0:
                want[slot // block_size, :, slot % block_size] = fresh[token]
        np.testing.assert_array_equal(cache, want)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qkv_prepare_fused_equals_parts(
    native_device: _core.Device, dtype: str, qk_norm: bool
) -> None:
    @settings(max_examples=15)
    @given(draw=st.data(), seed=st.integers(0, 2**32 - 1))
    def check(draw: st.DataObject, seed: int) -> None:
        case, *_ = qkv_case(draw, np.random.default_rng(seed), dtype, False, qk_norm)
        parts = run_qkv(native_device, case)
        assert case.program.fuse()
        fused = run_qkv(native_device, case)
        np.testing.assert_array_equal(parts[0], fused[0])
        np.testing.assert_array_equal(parts[1], fused[1])

    check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ACTIVATIONS)
@settings(max_examples=20)
@given(
    cols=st.integers(1, 120),
    size=st.integers(1, 6).map(lambda n: 16 * n),
    rows=st.sampled_from([1, 2, 7, 8, 9, 40]),
    seed=st.integers(0, 2**32 - 1),
)
def test_linear_gated_mul_fused_equals_parts(
    native_device: _core.Device, op: str, dtype: str, cols: int, size: int, rows: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    gate_up = normal(rng, 2 * size, cols)
    data = normal(rng, rows, cols)
    outs = []
    for fused in (False, True):
        program = _core.Program(dtype)
        weight = program.weight("gate_up", False, cols, [("gate", size), ("up", size)])
        x = program.input("x", cols)
        out = getattr(program, op)(program.linear(x, weight))
        program.output(out)
        if fused:
            assert dict(program.fuse())["linear + gated_mul"] == 1
            assert program.op_names == [f"linear_{op}"]
        case = Case(program, {x: data}, {weight: gate_up}, out, np.zeros((rows, size)), rows)
        outs.append(run(native_device, case))
    np.testing.assert_array_equal(outs[0], outs[1])


# How a linear can be cut on a GPU; a tuning table asks for each. A CPU reads no tables.
CUTS = st.one_of(
    st.tuples(st.sampled_from([64, 128, 192, 256]), st.integers(1, 8), st.integers(2, 6)).map(
        lambda cut: f"skinny wgmma 1 {cut[1]} {cut[2]} {cut[0]}"
    ),
    st.tuples(
        st.sampled_from([64, 96, 112, 128, 192, 224]),
        st.sampled_from(
            [(1, 1), (2, 1), (3, 1), (8, 1), (1, 2), (2, 2), (3, 2), (4, 2), (1, 4), (2, 4)]
        ),
        st.integers(2, 6),
    ).map(lambda cut: f"skinny wide 1 {cut[1][0]} {cut[2]} {cut[0]} {cut[1][1]}"),
)


@settings(max_examples=4 * EXAMPLES)
@given(
    cut=CUTS,
    cols=st.integers(1, 160).map(lambda n: 8 * n),
    size=st.integers(1, 30),
    odd=st.integers(0, 15),
    rows=st.sampled_from(
        [1, 24, 40, 64, 65, 100, 128, 150, 192, 193, 200, 256, 257, 300, 400, 520]
    ),
    gated=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
# The fewest stages with the most groups, shares and tiles that hold nothing; and with one stage,
# which no kernel can run with more than one group: the default takes its place.
@example("skinny wide 1 1 2 112 4", 552, 18, 15, 400, False, False, 1)
@example("skinny wide 1 2 2 64 4", 1280, 30, 0, 520, True, False, 1)
@example("skinny wgmma 1 1 2 128", 1280, 18, 15, 400, False, False, 1)
@example("skinny wide 1 1 1 112 4", 552, 18, 15, 400, False, False, 1)
@example("skinny wgmma 1 1 1 128", 552, 18, 15, 400, False, False, 1)
def test_every_cut_of_a_linear(
    device: str, cut: str, cols: int, size: int, odd: int, rows: int, gated: bool, biased: bool,
    seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    total = 32 * size if gated else 16 * size + odd
    program = _core.Program("bfloat16")
    segments = [("gate", 16 * size), ("up", 16 * size)] if gated else [("w", total)]
    weight = program.weight("w", False, cols, segments)
    weights = {weight: normal(rng, total, cols) / np.sqrt(cols)}
    bias = -1
    if biased:
        bias = program.weight("b", True, 1, [("bias", total)])
        weights[bias] = normal(rng, total)
    x = program.input("x", cols)
    out = program.linear(x, weight, bias=bias)
    data = normal(rng, rows, cols)
    expected = rounded(data, "bfloat16") @ rounded(weights[weight], "bfloat16").T
    if biased:
        expected = expected + weights[bias].astype(np.float32)
    if gated:
        out = program.silu_mul(out)
        expected = silu(expected[:, : 16 * size]) * expected[:, 16 * size :]
    program.output(out)
    program.fuse()
    # A linear with a bias is not fused with its gate.
    kind = "bias" if biased else "silu_mul" if gated else "plain"
    line = f"{total} {cols} {max(2 * rows, 16)} bfloat16 bfloat16 {kind} -> {cut}\n"
    native = _core.Device(device)
    try:
        with tempfile.TemporaryDirectory() as directory:
            name = re.sub(r"[^a-z0-9]+", "-", native.name.lower()) + "-cublaslt-none.txt"
            Path(directory, name).write_text(line, encoding="utf-8")
            native.configure_linear(libraries=[], table_dirs=[directory], use_library=False)
        case = Case(program, {x: data}, weights, out, expected, rows)
        check_close(run(native, case), expected, 1e-2 if gated else 4e-3)
    finally:
        native.close()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)
@given(draw=st.data(), seed=st.integers(0, 2**32 - 1))
def test_add_rms_norm_fused_equals_parts(
    native_device: _core.Device, dtype: str, draw: st.DataObject, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    cols, rows = draw.draw(st.integers(1, 300)), draw.draw(st.integers(1, 9))
    a, b = normal(rng, rows, cols), normal(rng, rows, cols)
    gain = normal(rng, cols)
    outs = []
    for fused in (False, True):
        program = _core.Program(dtype)
        weight = program.weight("norm", True, 1, [("norm", cols)])
        left, right = program.input("a", cols), program.input("b", cols)
        total = program.add(left, right)
        normed = program.rms_norm(total, weight, 1e-5)
        program.output(total)
        program.output(normed)
        if fused:
            program.fuse()
            assert program.op_names == ["add_rms_norm"]
        case = Case(
            program, {left: a, right: b}, {weight: gain}, normed, np.zeros((rows, cols)), rows
        )
        outs.append(run(native_device, case))
    np.testing.assert_array_equal(outs[0], outs[1])


# --- batch invariance ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)
@given(
    cols=st.integers(1, 300), size=st.integers(1, 100), rows=st.integers(2, 70),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_linear_row_does_not_depend_on_the_batch(
    native_device: _core.Device, dtype: str, cols: int, size: int, rows: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights, data = normal(rng, size, cols), normal(rng, rows, cols)

    def linear_of(part: Array) -> Array:
        program = _core.Program(dtype)
        weight = program.weight("w", False, cols, [("w", size)])
        x = program.input("x", cols)
        out = program.linear(x, weight)
        program.output(out)
        expected = np.zeros((len(part), size))
        return run(
            native_device, Case(program, {x: part}, {weight: weights}, out, expected, len(part))
        )

    whole = linear_of(data)
    first = int(rng.integers(0, rows))
    np.testing.assert_array_equal(whole[first : first + 1], linear_of(data[first : first + 1]))
    np.testing.assert_array_equal(whole[: first + 1], linear_of(data[: first + 1]))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES)
@given(draw=st.data(), seed=st.integers(0, 2**32 - 1))
def test_attention_of_a_request_does_not_depend_on_batch_or_chunks(
    native_device: _core.Device, kv_cache_dtype: str, dtype: str, draw: st.DataObject, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    case = paged_attention(draw, rng, dtype)
    case.options = {"batch_invariant": True}
    if kv_cache_dtype != "auto":
        # What was cached before is taken for codes; the step's own tokens are quantised.
        case.limits["kv_cache_dtype"] = kv_cache_dtype
        case.scales = [np.exp2(rng.integers(-3, 3, side.shape[:3])) for side in case.cache]
    whole = run(native_device, case)
    starts, lengths = case.ints["query_start_loc"], case.ints["seq_lens"]
    row = draw.draw(st.integers(0, len(lengths) - 1))
    first, end = int(starts[row]), int(starts[row + 1])
    split = draw.draw(st.integers(first, end))
    ((qkv, data),) = case.inputs.items()
    session = session_of(native_device, case)
    parts = []
    # The request by itself, its tokens in two steps: the second reads what the first has written.
    for begin, stop in ((first, split), (split, end)):
        count = stop - begin
        if count == 0:
            continue
        session.set_value(qkv, data[begin:stop].astype(np.float32))
        ints = {
            "counts": [1, count, 0, int(count == 1), int(count > 1), 0],
            "row": [row],
            "query_start_loc": [0, count],
            "seq_lens": [lengths[row] - (end - stop)],
            "token_batch": [0] * count,
            "positions": case.ints["positions"][begin:stop],
            "slot_mapping": case.ints["slot_mapping"][begin:stop],
        }
        for name, values in ints.items():
            session.set_ints(name, np.asarray(values, dtype=np.int32))
        session.run(1, count)
        parts.append(session.value(case.output, count))
    session.close()
    np.testing.assert_array_equal(np.concatenate(parts), whole[first:end])
