# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figure `decode`: one token a request and step, over a cache that is full already."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import statistics
import time
from collections.abc import Sequence

import numpy as np

from mrv1 import _core
from mrv1._cupti import Kernel, KernelTrace, open_cupti
from mrv1.bench import Timing, main_mode, ran_in_halves, row_blocks
from mrv1.bench_ranks import AllRanks
from mrv1.bench_trace import StepLogs, logged_steps, stage_waits
from mrv1.errors import DeviceError, InternalError
from mrv1.llm import peak_memory_mb
from mrv1.loader import LoadedModel, RunnerOptions
from mrv1.sampling_params import MAX_INT32

_LOG = logging.getLogger("mrv1")

# Steps before those that count.
WARMUP = 4
# On a GPU: runs whose median counts, and steps of the run that measures idle time.
RUNS = 3
IDLE_STEPS = 500
# Whose kernels a trace shows.
TRACED_STEPS = 8


def decode_options(
    device: str,
    dtype: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    block_size: int = RunnerOptions.block_size,
    stages: int = 1,
) -> RunnerOptions:
    """Options of a runner with exactly the memory and the graphs that the measurements need.

    Args:
        device: "cpu" or "cuda".
        dtype: As in `RunnerOptions`.
        batches: Sizes to measure.
        contexts: Cached tokens to measure at.
        steps: That count.
        block_size: As in `RunnerOptions`.
        stages: Of a pipeline, over which the requests are spread.
    """
    length = max(max(contexts), WARMUP + 1) + steps + 1
    if device == "cuda":
        idle = max(_idle_context(context, steps) for context in contexts) + IDLE_STEPS + 1
        length = max(length, idle)
    blocks = -(-length // block_size)
    sizes = {len(range(first, batch, stages)) for batch in batches for first in range(stages)}
    return RunnerOptions(
        device=device,
        dtype=dtype,
        max_num_seqs=max(batches),
        max_num_batched_tokens=max(batches),
        max_model_len=length,
        block_size=block_size,
        num_kv_blocks=max(batches) * blocks + 1,
        capture_sizes=sorted(sizes - {0}) if device == "cuda" else None,
        piecewise_sizes=[] if device == "cuda" else None,
    )


def _idle_context(context: int, steps: int) -> int:
    """Where the long run begins, so that its rows are as long on average as those timed."""
    return max(WARMUP + 1, context + (steps - IDLE_STEPS) // 2)


@dataclasses.dataclass
class _Run:
    """What consecutive steps took: one of each micro-batch."""

    ends: list[float] = dataclasses.field(default_factory=list)  # before the first, after each
    host_ns: list[int] = dataclasses.field(default_factory=list)
    device_ns: list[tuple[int, int]] = dataclasses.field(
        default_factory=list
    )  # of each micro-batch


class DecodeRun:
    """Decoding rows of one batch size. The cache holds random values: no prefill is needed.

    Launches run ahead as in the engine, by one step, or by as many as a pipeline has stages, over
    which the rows are spread in micro-batches: a step is one of each. Draws are greedy and nothing
    stops a row. Ranks with requests of their own have as many rows each.

    Args:
        model: Made with `decode_options`.
        batch: Rows.
        context: Tokens in each row's cache in the first step that counts; at least 5.
    """

    def __init__(self, model: LoadedModel, batch: int, context: int) -> None:
        self._ranks = AllRanks(model)
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
            spec.block_ids = row_blocks(self._runner, index, blocks)
            self._rows.append(self._ranks.add_row(spec))
        # As the engine spreads them over the stages of a pipeline.
        stages = model.pipeline_parallel_size
        self._ahead = 1 + stages
        self._batches = [
            [(row, 1) for row in self._rows[first::stages]] for first in range(min(batch, stages))
        ]
        self._length = length
        self._run(WARMUP)

    @property
    def runner(self) -> _core.ModelRunner:
        """The runner whose rows these are."""
        return self._runner

    @property
    def length(self) -> int:
        """Tokens in each row's cache in the next step."""
        return self._length

    def _run(self, steps: int) -> _Run:
        run = _Run(host_ns=[self._runner.stats()["host_ns"]])
        run.ends.append(time.perf_counter())
        launches = steps * len(self._batches)
        pending: collections.deque[int] = collections.deque()
        launched = ended = 0
        while ended < launches:
            if launched < launches:
                batch = self._batches[launched % len(self._batches)]
                pending.append(self._ranks.execute(batch))
                launched += 1
                if launched % len(self._batches) == 0:
                    run.host_ns.append(self._runner.stats()["host_ns"])
                if launched < launches and len(pending) < self._ahead:
                    continue
            output = self._ranks.result(pending.popleft())
            ended += 1
            if ended % len(self._batches) == 0:
                run.ends.append(time.perf_counter())
            run.device_ns.append((output.begin_ns, output.end_ns))
            if any(entry.finish_reason != _core.FinishReason.NONE for entry in output.entries):
                raise InternalError(f"a row ended in step {output.step}")
        self._length += steps
        return run

    def measure(self, steps: int) -> tuple[list[float], list[float]]:
        """Runs steps; returns the milliseconds of each, and the host's microseconds for each."""
        run = self._run(steps)
        milliseconds = [1e3 * (end - start) for start, end in itertools.pairwise(run.ends)]
        return milliseconds, [(end - start) / 1e3 for start, end in itertools.pairwise(run.host_ns)]

    def idle_share(self, steps: int) -> float:
        """Runs steps; returns the share of the time in which the device ran none, by its clock.

        Of a pipeline it is the last stage's device.
        """
        return idle_share(self._run(steps).device_ns)

    def close(self) -> None:
        """Frees the rows."""
        for row in self._rows:
            self._ranks.free_row(row)


def idle_share(spans: Sequence[tuple[int, int]]) -> float:
    """Share of the time between the first begin and the last end that no span covers.

    Args:
        spans: Begin and end of each step in turn.
    """
    busy = sum(end - begin for begin, end in spans)
    return 1.0 - busy / (spans[-1][1] - spans[0][0])


def measure_decode(
    model: LoadedModel,
    batch: int,
    context: int,
    steps: int,
    trace: StepLogs | None = None,
    kernels: list[Kernel] | None = None,
) -> Timing:
    """Measures one batch size at one context length.

    On the CPU the time of a step is the median of `steps` steps; on a GPU it is that of a run of
    `steps` steps by the host's clock, divided by their number, the median of `RUNS` runs.

    Args:
        model: Made with `decode_options`.
        batch: Requests.
        context: As of `DecodeRun`.
        steps: That count.
        trace: Gets the last steps that count, of each rank.
        kernels: Gets those of all GPUs in a few more steps, which `trace` then has, too, if there
            are several that exchange values in each layer, and CUPTI.
    """
    before = model.runner.stats()
    measure = _measure_runs if model.device.kind == "cuda" else _measure_steps
    timing, logs = measure(model, batch, context, steps)
    after = model.runner.stats()
    if trace is not None:
        trace[:] = logs
    if trace is not None and kernels is not None and _can_trace_kernels(model):
        traced, kernels[:] = _trace_kernels(model, batch, context)
        trace[:] = [[*own, *more] for own, more in zip(logs, traced, strict=True)]
    stages = model.pipeline_parallel_size
    return dataclasses.replace(
        timing,
        graph_mode=main_mode(before, after),
        in_halves=ran_in_halves(before, after),
        stage_waits=stage_waits(logs, stages) if stages > 1 else (),
    )


def _can_trace_kernels(model: LoadedModel) -> bool:
    if model.device.kind != "cuda" or len(model.devices) == model.pipeline_parallel_size:
        return False
    try:
        open_cupti()
    except DeviceError as error:
        _LOG.warning("the trace has no kernels: %s", error)
        return False
    return True


def _trace_kernels(model: LoadedModel, batch: int, context: int) -> tuple[StepLogs, list[Kernel]]:
    """Steps that tracing lengthens, and their kernels."""
    run = DecodeRun(model, batch, context)
    try:
        with KernelTrace() as trace, logged_steps(model) as logs:
            run.measure(TRACED_STEPS)
            for device in model.devices:
                device.synchronize()
    finally:
        run.close()
    if trace.dropped:
        raise InternalError(f"CUPTI had no room for {trace.dropped} records")
    return logs, trace.kernels


def _measure_steps(
    model: LoadedModel, batch: int, context: int, steps: int
) -> tuple[Timing, StepLogs]:
    run = DecodeRun(model, batch, context)
    try:
        length = run.length
        with logged_steps(model) as logs:
            milliseconds, host_us = run.measure(steps)
    finally:
        run.close()
    timing = Timing(
        batch,
        length,
        statistics.median(milliseconds),
        statistics.median(host_us),
        peak_memory_mb(),
    )
    return timing, logs


def _measure_runs(
    model: LoadedModel, batch: int, context: int, steps: int
) -> tuple[Timing, StepLogs]:
    means, host_us = [], []
    length = 0
    for _ in range(RUNS):
        # The first step's latency is not a step's time: the clock starts when it has ended.
        run = DecodeRun(model, batch, context - 1)
        try:
            length = run.length + 1
            milliseconds, launches = run.measure(1 + steps)
        finally:
            run.close()
        means.append(statistics.mean(milliseconds[1:]))
        host_us += launches[1:]
    run = DecodeRun(model, batch, _idle_context(context, steps))
    try:
        with logged_steps(model) as logs:
            idle = run.idle_share(IDLE_STEPS)
    finally:
        run.close()
    timing = Timing(
        batch,
        length,
        statistics.median(means),
        statistics.median(host_us),
        peak_memory_mb(),
        idle_share=idle,
    )
    return timing, logs
