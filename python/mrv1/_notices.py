# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What runners have to say about their steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from mrv1 import _core

_LOG: Final = logging.getLogger("mrv1")


def report_notices(runners: Sequence[_core.ModelRunner]) -> None:
    """Logs why a step did not run in the mode that was asked for; a rank has each reason once.

    Args:
        runners: Of all ranks with requests of their own. Ranks are named where not all say it.
    """
    found: dict[tuple[str, bool], list[str]] = {}
    for rank, runner in enumerate(runners):
        miss = runner.take_miss()
        if miss[0]:
            found.setdefault(miss, []).append(str(rank))
    for (notice, decode_only), ranks in found.items():
        if len(ranks) < len(runners):
            notice = f"rank {', '.join(ranks)}: {notice}"
        # Long prompts are meant to run so; decoding is not.
        _LOG.log(logging.WARNING if decode_only else logging.INFO, "%s", notice)
