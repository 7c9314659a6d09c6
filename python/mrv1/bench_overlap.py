# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""How much of what ranks exchange travels while they compute, from the kernels of a GPU.

Figures and traces are made of the same spans (`spans_of`), so that they agree.
"""

from __future__ import annotations

import bisect
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

from mrv1 import _core
from mrv1._cupti import Kernel, short_name
from mrv1.bench_profile import kernel_kind
from mrv1.bench_trace import first_begin

# Kinds of kernels that wait for other ranks, as `bench_profile` names them.
COLLECTIVES = frozenset({"all_reduce", "all_gather", "moe_dispatch", "moe_combine"})

# Beginnings and ends, in nanoseconds.
Spans = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What one GPU did in some time.

    Attributes:
        collective_ms: In which kernels of collectives ran; those of a rank that waits count.
        hidden_ms: Of that, in which others ran, too.
        compute_ms: In which others ran.
    """

    collective_ms: float
    hidden_ms: float
    compute_ms: float

    @property
    def hidden_share(self) -> float:
        """Of the time of collectives; 0 if there were none."""
        return self.hidden_ms / self.collective_ms if self.collective_ms > 0 else 0.0


def merged(spans: Iterable[tuple[int, int]]) -> Spans:
    """The same times, each once, in order."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def within(times: Spans, start: int, end: int) -> Spans:
    """What lies between two times of spans that are merged."""
    first = bisect.bisect_right(times, start, key=lambda span: span[1])
    found: Spans = []
    for place in range(first, len(times)):
        if times[place][0] >= end:
            break
        found.append((max(start, times[place][0]), min(end, times[place][1])))
    return found


def common(first: Spans, second: Spans) -> Spans:
    """Times that are in both, which are merged each."""
    return [shared for span in first for shared in within(second, *span)]


def without(first: Spans, second: Spans) -> Spans:
    """Times that are in the first and not in the second, which are merged each."""
    found: Spans = []
    for start, end in first:
        for taken, free in within(second, start, end):
            found.append((start, taken))
            start = free
        found.append((start, end))
    return [(start, end) for start, end in found if start < end]


def duration(times: Spans) -> int:
    """Of spans that are merged."""
    return sum(end - start for start, end in times)


@dataclasses.dataclass(frozen=True)
class GpuSpans:
    """When the kernels of one GPU ran, each span once.

    Attributes:
        collectives: Kernels of collectives, in the order of their starts.
        others: All other kernels, too.
        travel: When any of the former ran.
        compute: When any of the latter ran.
    """

    collectives: list[Kernel]
    others: list[Kernel]
    travel: Spans
    compute: Spans

    @property
    def hidden(self) -> Spans:
        """When both ran."""
        return common(self.travel, self.compute)

    @property
    def exposed(self) -> Spans:
        """When collectives ran alone."""
        return without(self.travel, self.compute)


def spans_of(kernels: Iterable[Kernel]) -> GpuSpans:
    """Sorts one GPU's kernels into collectives and others."""
    sides: tuple[list[Kernel], list[Kernel]] = ([], [])
    is_other: dict[str, bool] = {}
    for kernel in sorted(kernels, key=lambda kernel: (kernel.start, kernel.end)):
        if kernel.name not in is_other:
            is_other[kernel.name] = kernel_kind(short_name(kernel.name)) not in COLLECTIVES
        sides[is_other[kernel.name]].append(kernel)
    travel, compute = (merged((kernel.start, kernel.end) for kernel in side) for side in sides)
    return GpuSpans(*sides, travel, compute)


def overlap_of(kernels: Iterable[Kernel]) -> Overlap:
    """Sets the collectives among one GPU's kernels against the others."""
    spans = spans_of(kernels)
    return Overlap(
        *(duration(times) / 1e6 for times in (spans.travel, spans.hidden, spans.compute))
    )


def kernel_events(
    kernels: Sequence[Kernel], logs: Sequence[Sequence[_core.StepTime]]
) -> list[Mapping[str, object]]:
    """Tracks of kernels for `bench_trace.write_trace`: of each rank a group, below its steps.

    The first track has the time of collectives, cut into what other kernels hid and what was
    exposed; then come the collectives, with how much of each that is, and the others, on as many
    tracks as run at once.

    Args:
        kernels: Of the last steps in `logs`, of all GPUs, which have the numbers of their ranks.
        logs: The steps of each rank.
    """
    begin = first_begin(logs)
    events: list[Mapping[str, object]] = []
    for rank, steps in enumerate(logs):
        own = [kernel for kernel in kernels if kernel.device == rank]
        if not own:
            continue
        spans = spans_of(own)
        shift = _clock_shift(spans.others, steps) - begin
        group = _Group(f"rank {rank}, kernels", 1 + rank, shift)
        for name, times in (("hidden", spans.hidden), ("exposed", spans.exposed)):
            for start, end in times:
                group.add("collectives: hidden or exposed", name, start, end)
        for title, side in (("collectives", spans.collectives), ("other kernels", spans.others)):
            ends: list[int] = []  # of each track
            for kernel in side:
                track = next((i for i, end in enumerate(ends) if end <= kernel.start), len(ends))
                ends[track : track + 1] = [kernel.end]
                arguments = {}
                if side is spans.collectives:
                    hidden = duration(within(spans.compute, kernel.start, kernel.end))
                    exposed = kernel.end - kernel.start - hidden
                    arguments = {"hidden_us": hidden / 1e3, "exposed_us": exposed / 1e3}
                name = short_name(kernel.name)
                title_of = title if track == 0 else f"{title} ({track + 1})"
                group.add(title_of, name, kernel.start, kernel.end, arguments)
        events += group.events
    return events


class _Group:
    """Events of the tracks of one rank, which are there from their first slice on."""

    def __init__(self, name: str, number: int, shift: float) -> None:
        self._place = {"pid": number}
        self._shift = shift
        self._tracks: dict[str, int] = {}
        self.events: list[Mapping[str, object]] = [
            {"ph": "M", "name": "process_name", **self._place, "args": {"name": name}}
        ]

    def add(
        self, track: str, name: str, start: int, end: int, arguments: Mapping[str, float] = {}
    ) -> None:
        """Adds a slice; times are those of CUPTI."""
        if track not in self._tracks:
            self._tracks[track] = len(self._tracks)
            place = {**self._place, "tid": self._tracks[track]}
            self.events.append({"ph": "M", "name": "thread_name", **place, "args": {"name": track}})
        self.events.append(
            {
                "ph": "X",
                "name": name,
                **self._place,
                "tid": self._tracks[track],
                "ts": (start + self._shift) / 1e3,
                "dur": (end - start) / 1e3,
                "args": dict(arguments),
            }
        )


def _clock_shift(kernels: Sequence[Kernel], steps: Sequence[_core.StepTime]) -> int:
    """What CUPTI's times are to be moved by: steps begin with the kernel that applies records."""
    starts = [kernel.start for kernel in kernels if kernel_kind(short_name(kernel.name)) == "apply"]
    count = min(len(starts), len(steps))
    if count == 0:
        return 0
    return round(
        statistics.median(
            step.begin_ns - start
            for step, start in zip(steps[-count:], starts[-count:], strict=True)
        )
    )
