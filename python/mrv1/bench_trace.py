# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What the devices of all ranks did step by step: shares of waiting, and traces to look at."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mrv1 import _core
from mrv1.errors import InvalidArgumentError
from mrv1.loader import LoadedModel

# The steps of each rank, ranks in the order of their numbers.
StepLogs = list[list[_core.StepTime]]


@contextlib.contextmanager
def logged_steps(model: LoadedModel) -> Iterator[StepLogs]:
    """Notes down what the block's steps take; no step may be in flight where it begins and ends.

    Yields:
        A list that the end of the block fills.
    """
    logs: StepLogs = []
    model.runner.log_steps(True)
    try:
        yield logs
        logs += [model.runner.take_step_log(rank) for rank in range(len(model.devices))]
    finally:
        model.runner.log_steps(False)


def wait_share(steps: Sequence[_core.StepTime]) -> float:
    """Share of the time of a rank's steps, but the first, in which it waited for other stages.

    The time is that between the ends of the first and the last step.
    """
    if len(steps) < 2:
        return 0.0
    return sum(step.waited_ns for step in steps[1:]) / (steps[-1].end_ns - steps[0].end_ns)


def stage_waits(logs: Sequence[Sequence[_core.StepTime]], stages: int) -> list[float]:
    """The share of each stage of a pipeline, the mean of its ranks."""
    size = len(logs) // stages
    shares = [wait_share(steps) for steps in logs]
    return [sum(shares[first : first + size]) / size for first in range(0, len(logs), size)]


def first_begin(logs: Sequence[Sequence[_core.StepTime]]) -> int:
    """When the first step of all began, in nanoseconds: 0 of a trace."""
    return min((steps[0].begin_ns for steps in logs if steps), default=0)


def trace_events(
    logs: Sequence[Sequence[_core.StepTime]], stages: int
) -> list[Mapping[str, object]]:
    """Events of Chrome's trace format: a track for each rank, and a slice for each step on it.

    Times are microseconds since the first step began, by the clock of each rank's device.

    Args:
        logs: The steps of each rank.
        stages: Of the pipeline that the ranks form.
    """
    size = len(logs) // stages
    start = first_begin(logs)
    events: list[Mapping[str, object]] = []
    for rank, steps in enumerate(logs):
        name = f"rank {rank}" if stages == 1 else f"rank {rank}, stage {rank // size}"
        track = {"pid": 0, "tid": rank}
        events.append({"ph": "M", "name": "thread_name", **track, "args": {"name": name}})
        for step in steps:
            duration = step.end_ns - step.begin_ns
            arguments = {
                "requests": step.requests,
                "tokens": step.tokens,
                "mode": step.mode.name.lower(),
                "waited_us": step.waited_ns / 1e3,
            }
            if step.cut_token > 0:
                # Tokens of each half; of a padded step the second may have fewer than its share.
                second = max(0, step.tokens - step.cut_token)
                arguments["halves"] = f"{step.tokens - second} + {second}"
            events.append(
                {
                    "ph": "X",
                    "name": f"step {step.step}",
                    **track,
                    "ts": (step.begin_ns - start) / 1e3,
                    "dur": duration / 1e3,
                    "args": arguments,
                }
            )
    return events


def write_trace(
    path: str | os.PathLike[str],
    logs: Sequence[Sequence[_core.StepTime]],
    stages: int,
    kernels: Sequence[Mapping[str, object]] = (),
) -> None:
    """Writes the events as a file that https://ui.perfetto.dev and chrome://tracing read.

    Args:
        path: Of the file.
        logs: As of `trace_events`.
        stages: As of `trace_events`.
        kernels: Further events, of `bench_overlap.kernel_events`.

    Raises:
        InvalidArgumentError: The file cannot be written.
    """
    events = [*trace_events(logs, stages), *kernels]
    trace = {"displayTimeUnit": "ns", "traceEvents": events}
    try:
        Path(path).write_text(json.dumps(trace), encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(
            f"cannot be written: {error}", field="trace", value=os.fspath(path)
        ) from None
