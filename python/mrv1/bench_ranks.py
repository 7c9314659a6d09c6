# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""A model's runner as benchmarks call it, whether or not ranks have requests of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mrv1 import _core, bench
from mrv1.errors import InternalError, InvalidArgumentError

if TYPE_CHECKING:
    from mrv1.bench import Figure, OpCost, Rates, Record, Timing
    from mrv1.loader import LoadedModel

_ANY_GENERATION = -1


class AllRanks:
    """Has all ranks with requests of their own do the same: each call is one of every rank.

    Rows and steps then have the same numbers on all of them. With one such rank it is its runner.

    Args:
        model: What to call.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._runners = model.data_runners

    @property
    def first(self) -> _core.ModelRunner:
        """The runner of the first rank."""
        return self._runners[0]

    def add_row(self, spec: _core.RowSpec) -> int:
        """Admits a request on every rank; returns its row."""
        rows = [runner.add_row(spec)[0] for runner in self._runners]
        if len(set(rows)) > 1:
            raise InternalError(f"ranks have given a request the rows {rows}")
        return rows[0]

    def free_row(self, row: int) -> None:
        """Ends a row on every rank."""
        for runner in self._runners:
            runner.free_row(row)

    def execute(self, batch: Sequence[tuple[int, int]]) -> int:
        """Launches a step with this batch on every rank; returns its number."""
        if len(self._runners) == 1:
            return self._runners[0].execute(batch)
        items = [(row, tokens, _ANY_GENERATION) for row, tokens in batch]
        steps = self._runners[0].execute_ranks([items] * len(self._runners))
        if len(set(steps)) > 1:
            raise InternalError(f"ranks are at the steps {steps}")
        return steps[0]

    def result(self, step: int) -> _core.StepOutput:
        """Waits for a step of every rank; returns the first one's output.

        Raises:
            InternalError: It failed on one of them.
        """
        outputs = [runner.result(step) for runner in self._runners]
        for output in outputs:
            if output.error:
                raise InternalError(f"step {output.step} failed: {output.error}")
        return outputs[0]


def share_out(batches: Sequence[int], ranks: int) -> list[int]:
    """The requests of each rank, for batches of all ranks with requests of their own together.

    Raises:
        InvalidArgumentError: They do not come out even.
    """
    for batch in batches:
        if ranks > 1 and batch % ranks:
            raise InvalidArgumentError(
                field="--batch",
                value=batch,
                allowed=f"a multiple of --data-parallel-size = {ranks}",
            )
    return [batch // max(ranks, 1) for batch in batches]


def model_record(
    figure: Figure,
    shape: str,
    device: str,
    model: LoadedModel,
    timing: Timing,
    costs: Sequence[OpCost],
    rates: Rates,
    *,
    of_all: bool = False,
) -> Record:
    """A record of steps of a model, of all ranks together.

    `costs` are those of all together; `timing` is of one rank with requests of its own, of which
    all do the same at the same time, or with `of_all` of all of them.
    """
    size = model.data_parallel_size
    if not of_all:
        tokens = None if timing.tokens is None else timing.tokens * size
        timing = dataclasses.replace(timing, batch=timing.batch * size, tokens=tokens)
    record = bench.make_record(
        figure,
        shape,
        device,
        model.dtype,
        timing,
        costs,
        rates,
        bench.CacheFormat(model.kv_cache_dtype, model.kv_scales),
        model.tensor_parallel_size,
        model.pipeline_parallel_size,
        bench.weights_name(model.config, model.dtype),
        size,
    )
    if model.expert_parallel:
        record["ep"] = len(model.devices) // model.pipeline_parallel_size
        record["tbo"] = int(timing.in_halves)
    return record
