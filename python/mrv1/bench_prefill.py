# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figure `prefill`: whole prompts, in chunks, until each has its first token."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from mrv1 import _core
from mrv1.bench import Timing, main_mode, ran_in_halves, row_blocks
from mrv1.bench_ranks import AllRanks
from mrv1.errors import InternalError
from mrv1.llm import peak_memory_mb
from mrv1.loader import LoadedModel, RunnerOptions


def prefill_options(
    device: str | None,
    dtype: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    block_size: int = RunnerOptions.block_size,
) -> RunnerOptions:
    """Options of a runner with exactly the cache that the measurements need."""
    length = max(contexts) + 1
    return RunnerOptions(
        device=device,
        dtype=dtype,
        max_num_seqs=max(batches),
        max_model_len=length,
        block_size=block_size,
        num_kv_blocks=max(batches) * -(-length // block_size) + 1,
    )


def prefill_chunks(batch: int, context: int, max_tokens: int) -> list[list[tuple[int, int]]]:
    """Steps that prefill prompts one after the other, as (prompt, tokens) pairs.

    Args:
        batch: Prompts.
        context: Tokens of each.
        max_tokens: Of a step. All steps but the last take as many.
    """
    steps: list[list[tuple[int, int]]] = [[]]
    room = max_tokens
    for prompt in range(batch):
        left = context
        while left:
            if not room:
                steps.append([])
                room = max_tokens
            count = min(left, room)
            steps[-1].append((prompt, count))
            left -= count
            room -= count
    return steps


def measure_prefill(model: LoadedModel, batch: int, context: int, repeats: int) -> Timing:
    """Measures the prefill of `batch` prompts of `context` random tokens: a step of the figure.

    One chunk warms up. The time is the median of `repeats`, from the admission of the rows to the
    first token of the last; the host's time is that of all launches together.

    Args:
        model: Made with `prefill_options`.
        batch: Prompts.
        context: Tokens of each.
        repeats: How often all of them are prefilled.
    """
    runner = model.runner
    ranks = AllRanks(model)
    blocks = -(-model.max_model_len // model.block_size)
    rng = np.random.default_rng(0)
    specs = []
    for index in range(batch):
        spec = _core.RowSpec()
        spec.token_ids = rng.integers(0, model.config.vocab_size, context).tolist()
        spec.prompt_len = context
        spec.temperature = 0.0
        spec.max_tokens = 1
        spec.block_ids = row_blocks(runner, index, blocks)
        specs.append(spec)
    chunks = prefill_chunks(batch, context, model.max_num_batched_tokens)
    before = runner.stats()
    ahead = 1 + model.pipeline_parallel_size
    _run(ranks, specs, chunks[:1], ahead)
    milliseconds, host_us = [], []
    for _ in range(repeats):
        host_ns = runner.stats()["host_ns"]
        seconds, tokens = _run(ranks, specs, chunks, ahead)
        if tokens != batch:
            raise InternalError(f"{tokens} of {batch} prompts got a token")
        milliseconds.append(1e3 * seconds)
        host_us.append((runner.stats()["host_ns"] - host_ns) / 1e3)
    return Timing(
        batch,
        context,
        statistics.median(milliseconds),
        statistics.median(host_us),
        peak_memory_mb(),
        tokens=batch * context,
        graph_mode=main_mode(before, runner.stats()),
        in_halves=ran_in_halves(before, runner.stats()),
    )


def _run(
    runner: AllRanks,
    specs: Sequence[_core.RowSpec],
    chunks: Sequence[Sequence[tuple[int, int]]],
    ahead: int,
) -> tuple[float, int]:
    """Runs steps, `ahead` in flight, as in the engine; returns seconds and tokens drawn."""
    rows: list[int] = []
    pending: deque[int] = deque()
    tokens = 0

    def take() -> int:
        output = runner.result(pending.popleft())
        return sum(entry.num_tokens > 0 for entry in output.entries)

    start = time.perf_counter()
    try:
        rows.extend(runner.add_row(spec) for spec in specs)
        for chunk in chunks:
            pending.append(runner.execute([(rows[index], count) for index, count in chunk]))
            if len(pending) == ahead:
                tokens += take()
        while pending:
            tokens += take()
        return time.perf_counter() - start, tokens
    finally:
        for row in rows:
            runner.free_row(row)
