# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figure `op`: single ops of a decode step, with weights and cache out of the caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from mrv1 import _core
from mrv1.bench import OpCost, Timing, attention_cost, linear_cost
from mrv1.builder import rope_frequencies
from mrv1.config import ModelConfig
from mrv1.llm import peak_memory_mb

_BLOCK_SIZE = 16


def measure_ops(
    device: _core.Device,
    config: ModelConfig,
    dtype: str,
    batch: int,
    context: int,
    repeats: int,
    evict: Callable[[], object],
) -> Iterator[tuple[OpCost, Timing]]:
    """Times the ops of a decode step of one layer, and the logits, each on its own.

    The time of submitting one op and waiting for it is included.

    Args:
        device: Where.
        config: Sizes.
        dtype: "float32" or "bfloat16".
        batch: Requests, one token each.
        context: Tokens that each attends to.
        repeats: Runs; their median is the time.
        evict: Called before each run, to empty the caches.
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

    def timed(session: _core.ProgramSession) -> Timing:
        try:
            seconds = []
            for _ in range(repeats):
                evict()
                start = time.perf_counter()
                session.run(batch, batch)
                seconds.append(time.perf_counter() - start)
        finally:
            session.close()
        return Timing(batch, context, 1e3 * statistics.median(seconds), None, peak_memory_mb())

    for name, rows, cols, with_silu in linears:
        yield (
            linear_cost(name, rows, cols, size, batch),
            timed(_linear_session(device, dtype, rows, cols, with_silu, batch)),
        )
    yield (
        attention_cost(config, size, batch, context),
        timed(_attention_session(device, config, dtype, batch, context)),
    )


def _linear_session(
    device: _core.Device, dtype: str, rows: int, cols: int, with_silu: bool, batch: int
) -> _core.ProgramSession:
    program = _core.Program(dtype)
    x = program.input("x", cols)
    weight = program.weight("weight", False, cols, [("weight", rows)])
    result = program.linear(x, weight)
    program.output(program.silu_mul(result) if with_silu else result)
    program.fuse()
    session = _core.ProgramSession(device, program, max_requests=batch, max_tokens=batch)
    rng = np.random.default_rng(0)
    values = rng.random((rows, cols), dtype=np.float32)
    values -= 0.5
    session.load_weight(weight, values)
    session.set_value(x, rng.standard_normal((batch, cols), dtype=np.float32))
    return session


def _attention_session(
    device: _core.Device, config: ModelConfig, dtype: str, batch: int, context: int
) -> _core.ProgramSession:
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    per_row = -(-context // _BLOCK_SIZE)
    program = _core.Program(dtype)
    qkv = program.input("qkv", (heads + 2 * kv_heads) * dim)
    rope = program.rope_table(rope_frequencies(config.rope, dim).tolist())
    program.output(
        program.attention(
            qkv,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            kv_layer=0,
            scale=dim**-0.5,
            rope=rope,
        )
    )
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
    for is_value in (False, True):
        session.set_cache(0, is_value, rng.standard_normal(cache_size, dtype=np.float32))
    session.set_value(qkv, rng.standard_normal((batch, (heads + 2 * kv_heads) * dim), np.float32))
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
