# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""How much of what ranks exchange travels while they compute, from the kernels of a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from mrv1._cupti import Kernel, short_name
from mrv1.bench_profile import kernel_kind

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


def common(first: Spans, second: Spans) -> Spans:
    """Times that are in both, which are merged each."""
    found: Spans = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            found.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def overlap_of(kernels: Sequence[Kernel]) -> Overlap:
    """Sets the collectives among one GPU's kernels against the others."""
    names = {kernel.name for kernel in kernels}
    meeting = {name for name in names if kernel_kind(short_name(name)) in COLLECTIVES}

    def spans(collective: bool) -> Spans:
        return merged(
            (kernel.start, kernel.end)
            for kernel in kernels
            if (kernel.name in meeting) == collective
        )

    def milliseconds(times: Spans) -> float:
        return sum(end - start for start, end in times) / 1e6

    collectives, compute = spans(True), spans(False)
    return Overlap(
        milliseconds(collectives), milliseconds(common(collectives, compute)), milliseconds(compute)
    )
