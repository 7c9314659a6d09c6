# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figure `op`: single ops of a decode step, each repeated over weights of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import numpy as np

from mrv1 import _core
from mrv1.bench import OpCost, Timing, attention_cost, linear_cost
from mrv1.builder import rope_frequencies
from mrv1.config import ModelConfig
from mrv1.llm import peak_memory_mb
from mrv1.loader import RunnerOptions

_BLOCK_SIZE = RunnerOptions.block_size
_WARMUP = 1


def measure_ops(
    device: _core.Device,
    config: ModelConfig,
    dtype: str,
    batch: int,
    context: int,
    repeats: int,
    working_set: int,
) -> Iterator[tuple[OpCost, Timing]]:
    """Times the ops of a decode step of one layer, and the logits, each on its own.

    As in a model, an op's weights or cache are not in the processor's caches: a run computes the op
    over as many different ones as `working_set` holds.

    Args:
        device: Where.
        config: Sizes.
        dtype: "float32" or "bfloat16".
        batch: Requests, one token each.
        context: Tokens that each attends to.
        repeats: Runs; their median is the time.
        working_set: Bytes that a run reads, at least.
    """
    hidden, dim, size = config.hidden_size, config.head_dim, 4 if dtype == "float32" else 2
    q_size, kv_size = config.num_attention_heads * dim, config.num_key_value_heads * dim
    linears = (
        ("qkv_proj", q_size + 2 * kv_size, hidden, False),
        ("o_proj", hidden, q_size, False),
        ("gate_up_proj", 2 * config.intermediate_size, hidden, True),
        ("down_proj", hidden, config.intermediate_size, False),
        ("logits", config.vocab_size, hidden, False),
    )

    def timed(session: _core.ProgramSession, copies: int) -> Timing:
        try:
            seconds = []
            for _ in range(_WARMUP + repeats):
                start = time.perf_counter()
                session.run(batch, batch)
                seconds.append((time.perf_counter() - start) / copies)
        finally:
            session.close()
        median = statistics.median(seconds[_WARMUP:])
        return Timing(batch, context, 1e3 * median, None, peak_memory_mb())

    for name, rows, cols, with_silu in linears:
        cost = linear_cost(name, rows, cols, size, batch)
        copies = -(-working_set // cost.read_bytes)
        session = _linear_session(device, dtype, rows, cols, with_silu, batch, copies)
        yield cost, timed(session, copies)
    cost = attention_cost(config, size, batch, context)
    copies = -(-working_set // cost.read_bytes)
    yield cost, timed(_attention_session(device, config, dtype, batch, context, copies), copies)


def _linear_session(
    device: _core.Device,
    dtype: str,
    rows: int,
    cols: int,
    with_silu: bool,
    batch: int,
    copies: int,
) -> _core.ProgramSession:
    program = _core.Program(dtype)
    x = program.input("x", cols)
    weights = [
        program.weight(f"weight {copy}", False, cols, [(f"weight {copy}", rows)])
        for copy in range(copies)
    ]
    for weight in weights:
        result = program.linear(x, weight)
        if with_silu:
            result = program.silu_mul(result)
    program.output(result)
    program.fuse()
    session = _core.ProgramSession(device, program, max_requests=batch, max_tokens=batch)
    rng = np.random.default_rng(0)
    values = rng.random((rows, cols), dtype=np.float32)
    values -= 0.5
    for weight in weights:
        session.load_weight(weight, values)
    session.set_value(x, rng.standard_normal((batch, cols), dtype=np.float32))
    return session


def _attention_session(
    device: _core.Device, config: ModelConfig, dtype: str, batch: int, context: int, copies: int
) -> _core.ProgramSession:
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    per_row = -(-context // _BLOCK_SIZE)
    program = _core.Program(dtype)
    qkv = program.input("qkv", (heads + 2 * kv_heads) * dim)
    rope = program.rope_table(rope_frequencies(config.rope, dim).tolist())
    for copy in range(copies):
        result = program.attention(
            qkv,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            kv_layer=copy,
            scale=dim**-0.5,
            rope=rope,
        )
    program.output(result)
    program.fuse()
    session = _core.ProgramSession(
        device,
        program,
        max_requests=batch,
        max_tokens=batch,
        num_blocks=batch * per_row + 1,
        block_size=_BLOCK_SIZE,
        max_blocks=per_row,
        max_position=context,
    )
    rng = np.random.default_rng(0)
    cache_size = (batch * per_row + 1) * kv_heads * _BLOCK_SIZE * dim
    cached = rng.standard_normal(cache_size, dtype=np.float32)
    for copy in range(copies):
        for is_value in (False, True):
            session.set_cache(copy, is_value, cached)
    session.set_value(
        qkv, rng.standard_normal((batch, (heads + 2 * kv_heads) * dim), dtype=np.float32)
    )
    rows = np.arange(batch, dtype=np.int32)
    table = 1 + np.arange(batch * per_row, dtype=np.int32)
    last = context - 1
    slots = table.reshape(batch, per_row)[:, last // _BLOCK_SIZE] * _BLOCK_SIZE + last % _BLOCK_SIZE
    for name, values in (
        ("row", rows),
        ("query_start_loc", np.arange(batch + 1, dtype=np.int32)),
        ("seq_lens", np.full(batch, context, np.int32)),
        ("token_batch", rows),
        ("positions", np.full(batch, last, np.int32)),
        ("slot_mapping", slots.astype(np.int32)),
        ("block_table", table),
    ):
        session.set_ints(name, values)
    return session
