# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Progress bars for loading and long batches: on a terminal, unless a flag turns them off."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping

from mrv1 import envs
from mrv1.errors import InvalidArgumentError


def is_shown(show: bool | None) -> bool:
    """Whether a bar is drawn: as `show` says, else if stderr is a terminal and the user lets it.

    Raises:
        InvalidArgumentError: `show` is something else, or MRV1_NO_PROGRESS holds what is not
            allowed, even where it does not decide.
    """
    hidden = envs.NO_PROGRESS.get()
    if show is None:
        return sys.stderr.isatty() and not hidden
    if not isinstance(show, bool):
        raise InvalidArgumentError(field="progress", value=show, allowed="None, True or False")
    return show


def format_phases(seconds: Mapping[str, float], sizes: Mapping[str, int]) -> str:
    """A table of phases: what each took, and where bytes are known, how many and how fast."""
    lines = [("phase", "seconds", "MB", "GB/s")]
    for phase, duration in seconds.items():
        size = sizes.get(phase)
        rate = "" if size is None or duration <= 0 else f"{size / duration / 1e9:.1f}"
        lines.append((phase, f"{duration:.2f}", "" if size is None else f"{size / 1e6:.1f}", rate))
    total = sum(seconds.values())
    lines.append(("all", f"{total:.2f}", "", ""))
    width = max(len(line[0]) for line in lines)
    return "\n".join(
        f"{phase.ljust(width)}  {duration:>7}  {size:>9}  {rate:>6}".rstrip()
        for phase, duration, size, rate in lines
    )


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, *, unit: str, show: bool | None = None
) -> Iterator[Callable[[int], object]]:
    """Yields a function that advances the bar by a count of units.

    Args:
        title: What is going on.
        total: Units in all.
        unit: Name of a unit; "B" is scaled to kB, MB, ...
        show: Whether to draw; None decides by the terminal.
    """
    if not is_shown(show):
        yield lambda _: None
        return
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # else tqdm starts a thread, which would outlive the bar

    with Bar(
        total=total, desc=title, unit=unit, unit_scale=unit == "B", file=sys.stderr, leave=False
    ) as bar:
        yield bar.update
