# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figure `decode`: one token a request and step, over a cache that is full already."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence

import numpy as np

from mrv1 import _core
from mrv1.bench import Timing
from mrv1.errors import InternalError
from mrv1.llm import peak_memory_mb
from mrv1.loader import LoadedModel, RunnerOptions
from mrv1.sampling_params import MAX_INT32

# Steps before those that count.
WARMUP = 4


def decode_options(
    device: str | None,
    dtype: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    block_size: int = RunnerOptions.block_size,
) -> RunnerOptions:
    """Options of a runner with exactly the memory that the measurements need."""
    length = max(max(contexts), WARMUP + 1) + steps + 1
    blocks = -(-length // block_size)
    return RunnerOptions(
        device=device,
        dtype=dtype,
        max_num_seqs=max(batches),
        max_num_batched_tokens=max(batches),
        max_model_len=length,
        block_size=block_size,
        num_kv_blocks=max(batches) * blocks + 1,
    )


class DecodeRun:
    """Decoding rows of one batch size. The cache holds random values: no prefill is needed.

    Launches run ahead by one step, as in the engine. Draws are greedy and nothing stops a row.

    Args:
        model: Made with `decode_options`.
        batch: Rows.
        context: Tokens in each row's cache in the first step that counts; at least 5.
    """

    def __init__(self, model: LoadedModel, batch: int, context: int) -> None:
        self._runner = model.runner
        blocks = -(-model.max_model_len // model.block_size)
        rng = np.random.default_rng(0)
        self._rows = []
        # Warm-up steps lengthen the rows to `context`, where it is long enough.
        length = max(1, context - WARMUP)
        for index in range(batch):
            spec = _core.RowSpec()
            spec.token_ids = rng.integers(0, model.config.vocab_size, length).tolist()
            spec.prompt_len = length
            spec.num_computed = length - 1
            spec.temperature = 0.0
            spec.max_tokens = MAX_INT32
            spec.block_ids = list(range(1 + index * blocks, 1 + (index + 1) * blocks))
            row, _ = self._runner.add_row(spec)
            self._rows.append(row)
        self._length = length
        self._host_ns: list[int] = []
        self._run(WARMUP)

    @property
    def length(self) -> int:
        """Tokens in each row's cache in the next step."""
        return self._length

    def _launch(self) -> int:
        step = self._runner.execute([(row, 1) for row in self._rows])
        self._host_ns.append(self._runner.stats()["host_ns"])
        return step

    def _run(self, steps: int) -> list[float]:
        """Runs steps; returns the seconds from the end of each to the end of the next."""
        ends = [time.perf_counter()]
        pending = self._launch()
        for index in range(steps):
            following = self._launch() if index + 1 < steps else 0
            output = self._runner.result(pending)
            ends.append(time.perf_counter())
            if output.error:
                raise InternalError(f"step {output.step} failed: {output.error}")
            if any(entry.finish_reason != _core.FinishReason.NONE for entry in output.entries):
                raise InternalError(f"a row ended in step {output.step}")
            pending = following
        self._length += steps
        return [end - start for start, end in itertools.pairwise(ends)]

    def measure(self, steps: int) -> tuple[list[float], list[float]]:
        """Runs steps; returns the milliseconds of each, and the host's microseconds for each."""
        self._host_ns = [self._runner.stats()["host_ns"]]
        milliseconds = [1e3 * seconds for seconds in self._run(steps)]
        spans = itertools.pairwise(self._host_ns)
        return milliseconds, [(end - start) / 1e3 for start, end in spans]

    def close(self) -> None:
        """Frees the rows."""
        for row in self._rows:
            self._runner.free_row(row)


def measure_decode(model: LoadedModel, batch: int, context: int, steps: int) -> Timing:
    """Measures one batch size at one context length: the median of `steps` steps."""
    run = DecodeRun(model, batch, context)
    try:
        length = run.length
        milliseconds, host_us = run.measure(steps)
    finally:
        run.close()
    return Timing(
        batch,
        length,
        statistics.median(milliseconds),
        statistics.median(host_us),
        peak_memory_mb(),
    )
