# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figure `op`: single ops of a decode step, each repeated over weights of its own."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import numpy as np

from mrv1 import _core
from mrv1.bench import (
    AUTO_CACHE,
    CacheFormat,
    OpCost,
    Timing,
    attention_cost,
    linear_cost,
    matrix_bytes,
)
from mrv1.config import ModelConfig
from mrv1.errors import InvalidArgumentError
from mrv1.llm import peak_memory_mb
from mrv1.loader import RunnerOptions
from mrv1.models.experts import ExpertsConfig
from mrv1.rope import rope_frequencies

Lengths = Literal["even", "log-uniform", "one-long"]
LENGTHS: Final[tuple[Lengths, ...]] = ("even", "log-uniform", "one-long")

_BLOCK_SIZE = RunnerOptions.block_size
_WEIGHT_RANGE: Final = 0.5
# Different weights or caches at most: ops so small that more were needed are in caches anyway.
_MAX_COPIES: Final = 256
_LOG_UNIFORM_MOST: Final = 32768
_ONE_LONG: Final = (65536, 512)

# Of the largest value, that the results of two backends in bfloat16 may differ by.
_TOLERANCE: Final = 0.05

_LINEARS: Final = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "logits")
ATTENTION: Final = "attention"
_EXPERTS: Final = "experts"
OPS: Final = (*_LINEARS, _EXPERTS, ATTENTION)
BACKENDS: Final = {
    "native": _core.AttentionBackend.NATIVE,
    "flashinfer": _core.AttentionBackend.FLASHINFER,
}


def request_lengths(kind: Lengths, batch: int, context: int) -> list[int]:
    """Cached tokens of each request.

    Args:
        kind: "even": `context` each; "log-uniform": drawn from 1 to 32,768 with a fixed seed;
            "one-long": 65,536 for the first, 512 for the others.
        batch: Requests.
        context: For "even".
    """
    if kind == "even":
        return [context] * batch
    if kind == "one-long":
        return [_ONE_LONG[0]] + [_ONE_LONG[1]] * (batch - 1)
    drawn = np.random.default_rng(0).uniform(0.0, np.log(_LOG_UNIFORM_MOST), batch)
    return [int(length) for length in np.exp(drawn)]


def choose_ops(config: ModelConfig, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Returns which of `OPS` to measure: those that are asked for, or all that the model has.

    Raises:
        InvalidArgumentError: A model has none of an op that is asked for.
    """
    missing = set()
    if not isinstance(config, ExpertsConfig):
        missing = {_EXPERTS}
    elif all(config.sparse_layers):
        missing = {"gate_up_proj", "down_proj"}
    if asked is None:
        return tuple(op for op in OPS if op not in missing)
    for op in asked:
        if op in missing:
            raise InvalidArgumentError(
                f"the model has no op {op}",
                field="--ops",
                value=op,
                allowed=", ".join(choose_ops(config, None)),
            )
    return tuple(asked)


def measure_products(
    device: _core.Device,
    config: ModelConfig,
    dtype: str,
    batches: Sequence[int],
    repeats: int,
    working_set: int,
    ops: Sequence[str],
) -> Iterator[tuple[OpCost, Timing]]:
    """Times the matrix products of one layer, its experts, and the logits, each on its own.

    As in a model, an op's weights are not in the processor's caches: a run computes the op over as
    many different ones as `working_set` holds, at most 256.

    Args:
        device: Where.
        config: Sizes.
        dtype: "float32" or "bfloat16".
        batches: Requests, one token each.
        repeats: Runs; their median is the time.
        working_set: Bytes that a run reads, at least.
        ops: Which of `OPS`; attention is not among these.

    Yields:
        For each op every batch size: what it must do, and its time.
    """
    hidden, dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * dim, config.num_key_value_heads * dim
    for name, rows, cols, with_silu in (
        ("qkv_proj", q_size + 2 * kv_size, hidden, False),
        ("o_proj", hidden, q_size, False),
        ("gate_up_proj", 2 * config.intermediate_size, hidden, True),
        ("down_proj", hidden, config.intermediate_size, False),
        ("logits", config.vocab_size, hidden, False),
    ):
        if name not in ops:
            continue
        is_nvfp4 = config.quantization is not None and name != "logits"
        nbytes = matrix_bytes(rows, cols, dtype, is_nvfp4)
        copies = _copies(working_set, nbytes)
        session = _linear_session(
            device, dtype, rows, cols, with_silu, max(batches), copies, is_nvfp4
        )
        try:
            for batch in batches:
                cost = linear_cost(name, rows * cols, nbytes, batch)
                yield cost, _timed(session, batch, 0, repeats, copies)
        finally:
            session.close()
    if _EXPERTS in ops:
        assert isinstance(config, ExpertsConfig)
        yield from _measure_experts(device, config, dtype, batches, repeats, working_set)


def _measure_experts(
    device: _core.Device,
    config: ExpertsConfig,
    dtype: str,
    batches: Sequence[int],
    repeats: int,
    working_set: int,
) -> Iterator[tuple[OpCost, Timing]]:
    """Times the experts of one layer, with the choice among them by logits that are random.

    A run computes as many different choices as read `working_set`, at most 256, over as many
    layers' weights as hold it. What is to be read are the experts that were chosen.
    """
    hidden, width, top_k = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts_per_tok,
    )
    is_nvfp4 = config.quantization is not None
    one = sum(
        matrix_bytes(rows, cols, dtype, is_nvfp4)
        for rows, cols in ((2 * width, hidden), (hidden, width))
    )
    layers = _copies(working_set, config.num_experts * one)
    for batch in batches:
        choices = _copies(working_set, top_k * one)
        session, inputs = _experts_session(device, config, dtype, batch, layers, choices)
        try:
            rng = np.random.default_rng(0)
            session.set_value(
                inputs[0], rng.standard_normal((batch, config.hidden_size), dtype=np.float32)
            )
            chosen = 0
            for logits in inputs[1:]:
                drawn = rng.standard_normal((batch, config.num_experts), dtype=np.float32)
                session.set_value(logits, drawn)
                chosen += len(np.unique(np.argpartition(drawn, -top_k, axis=1)[:, -top_k:]))
            read = chosen / choices
            operations = 2 * batch * top_k * 3 * hidden * width
            cost = OpCost(_EXPERTS, round(read * one), operations, read)
            yield cost, _timed(session, batch, 0, repeats, choices)
        finally:
            session.close()


def measure_attention(
    device: _core.Device,
    config: ModelConfig,
    dtype: str,
    lengths: Sequence[int],
    repeats: int,
    working_set: int,
    backends: Sequence[str] = ("native",),
    cache: CacheFormat = AUTO_CACHE,
) -> Iterator[tuple[str, OpCost, Timing, str | None]]:
    """Times the attention of one layer, with its rotary embedding and cache write.

    A run computes it over as many different caches as `working_set` holds, at most 256.

    Args:
        device: Where.
        config: Sizes.
        dtype: "float32" or "bfloat16".
        lengths: Cached tokens of each request; each attends to as many.
        repeats: Runs; their median is the time.
        working_set: Bytes that a run reads, at least.
        backends: Keys of `BACKENDS`.
        cache: What it holds; scales are dynamic.

    Yields:
        For each backend its name, what the op must do, its time, and what is wrong with its result
        if it is not that of the first.
    """
    cost = attention_cost(config, dtype, 1, sum(lengths), cache)
    copies = _copies(working_set, cost.read_bytes)
    session, output = _attention_session(
        device, config, dtype, lengths, copies, cache.kv_cache_dtype
    )
    first: np.ndarray | None = None
    try:
        for backend in backends:
            session.set_options(attention_backend=BACKENDS[backend])
            context = round(sum(lengths) / len(lengths))
            timing = _timed(session, len(lengths), context, repeats, copies)
            result = session.value(output, len(lengths))
            first = result if first is None else first
            off = float(np.abs(result - first).max())
            fault = None
            if not off <= _TOLERANCE * float(np.abs(first).max()):
                fault = f"attention by {backend} is off by {off:.3g} from that by {backends[0]}"
            yield backend, cost, timing, fault
    finally:
        session.close()


def _copies(working_set: int, read_bytes: int) -> int:
    return min(_MAX_COPIES, -(-working_set // read_bytes))


def _timed(
    session: _core.ProgramSession, batch: int, context: int, repeats: int, copies: int
) -> Timing:
    seconds = statistics.median(session.time_runs(batch, batch, repeats=repeats))
    return Timing(batch, context, 1e3 * seconds / copies, None, peak_memory_mb())


def _linear_session(
    device: _core.Device,
    dtype: str,
    rows: int,
    cols: int,
    with_silu: bool,
    max_batch: int,
    copies: int,
    is_nvfp4: bool,
) -> _core.ProgramSession:
    program = _core.Program(dtype)
    x = program.input("x", cols)
    weights = [
        program.weight(f"weight {copy}", False, cols, [(f"weight {copy}", rows)], nvfp4=is_nvfp4)
        for copy in range(copies)
    ]
    for weight in weights:
        result = program.linear(x, weight)
        if with_silu:
            result = program.silu_mul(result)
    program.output(result)
    program.fuse()
    session = _core.ProgramSession(device, program, max_requests=max_batch, max_tokens=max_batch)
    for weight in weights:
        session.fill_weight(weight, 0, _WEIGHT_RANGE)
    values = np.random.default_rng(0).standard_normal((max_batch, cols), dtype=np.float32)
    session.set_value(x, values)
    return session


def _experts_session(
    device: _core.Device,
    config: ExpertsConfig,
    dtype: str,
    batch: int,
    layers: int,
    choices: int,
) -> tuple[_core.ProgramSession, list[int]]:
    """A session, and its inputs: x, then the logits of each choice."""
    count, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    program = _core.Program(dtype)
    inputs = [program.input("x", hidden)]
    weights = [
        tuple(
            program.weight(
                f"{name} {layer}",
                False,
                cols,
                [(f"{name} {layer}", count * rows)],
                matrices=count,
                nvfp4=config.quantization is not None,
            )
            for name, rows, cols in (("gate_up", 2 * width, hidden), ("down", hidden, width))
        )
        for layer in range(layers)
    ]
    for choice in range(choices):
        inputs.append(program.input(f"logits {choice}", count, dtype="float32"))
        experts, shares = program.moe_route(
            inputs[-1],
            top_k=config.num_experts_per_tok,
            renormalize=config.norm_topk_prob,
            min_sum=config.norm_min,
        )
        result = program.moe_experts(inputs[0], experts, shares, *weights[choice % layers])
    program.output(result)
    session = _core.ProgramSession(device, program, max_requests=batch, max_tokens=batch)
    for pair in weights:
        for weight in pair:
            session.fill_weight(weight, 0, _WEIGHT_RANGE)
    return session, inputs


def _attention_session(
    device: _core.Device,
    config: ModelConfig,
    dtype: str,
    lengths: Sequence[int],
    copies: int,
    kv_cache_dtype: str,
) -> tuple[_core.ProgramSession, int]:
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    batch, longest = len(lengths), max(lengths)
    per_row = [-(-length // _BLOCK_SIZE) for length in lengths]
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
        num_blocks=sum(per_row) + 1,
        block_size=_BLOCK_SIZE,
        max_blocks=max(per_row),
        max_position=longest,
        kv_cache_dtype=kv_cache_dtype,
    )
    session.fill_cache(0)
    values = np.random.default_rng(0).standard_normal(
        (batch, (heads + 2 * kv_heads) * dim), dtype=np.float32
    )
    session.set_value(qkv, values)
    # Blocks of requests are mixed, as they are in a cache that has been used for a while.
    blocks = 1 + np.random.default_rng(1).permutation(sum(per_row)).astype(np.int32)
    table = np.zeros((batch, max(per_row)), np.int32)
    start = 0
    for index, count in enumerate(per_row):
        table[index, :count] = blocks[start : start + count]
        start += count
    rows = np.arange(batch, dtype=np.int32)
    last = np.asarray(lengths, np.int32) - 1
    slots = table[rows, last // _BLOCK_SIZE] * _BLOCK_SIZE + last % _BLOCK_SIZE
    for name, ints in (
        ("counts", np.asarray([batch, batch, 0, batch, 0, 0], np.int32)),
        ("row", rows),
        ("query_start_loc", np.arange(batch + 1, dtype=np.int32)),
        ("seq_lens", last + 1),
        ("token_batch", rows),
        ("positions", last),
        ("slot_mapping", slots.astype(np.int32)),
        ("block_table", table.ravel()),
    ):
        session.set_ints(name, ints)
    return session, result
