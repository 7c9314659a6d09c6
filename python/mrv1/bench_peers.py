# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Figures of other engines, measured elsewhere, to set beside one's own.

docs/benchmarks.md describes the files.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mrv1.bench import Record
from mrv1.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class PeerFigure:
    """One figure of another engine.

    Attributes:
        name: The engine and its version.
        device: A part of the device's name.
        figure: "decode", "prefill" or "mix"; so are shape, batch, context, dtype and
            kv_cache_dtype what they are in a record.
        step_ms: Time of a step, or None if the rate stands for it.
        tokens_per_s: Rate, or None.
        weights: How linear layers are stored, as in a record.
    """

    name: str
    device: str
    figure: str
    shape: str
    batch: int
    context: int
    dtype: str
    kv_cache_dtype: str
    step_ms: float | None = None
    tokens_per_s: float | None = None
    weights: str = "bf16"


def read_peers(path: str | os.PathLike[str]) -> list[PeerFigure]:
    """Reads a file of figures.

    Raises:
        InvalidArgumentError: It cannot be read, or does not hold what it should.
    """

    def refuse(reason: object) -> InvalidArgumentError:
        return InvalidArgumentError(str(reason), field="peers", value=os.fspath(path))

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refuse(f"cannot be read: {error}") from None
    try:
        common = {"device": content["device"], "dtype": content["dtype"]}
        figures = [PeerFigure(**common, **entry) for entry in content["figures"]]
    except (KeyError, TypeError) as error:
        raise refuse(f"is not a file of peers: {error}") from None
    for peer in figures:
        if (peer.step_ms is None) == (peer.tokens_per_s is None):
            raise refuse(f"needs step_ms or tokens_per_s of {peer.figure} {peer.shape}, not both")
    return figures


def add_peers(records: Sequence[Record], peers: Sequence[PeerFigure]) -> None:
    """Adds to each record the best figure of the others that is about the same."""
    for record in records:
        same = [peer for peer in peers if _is_same(record, peer)]
        if not same:
            continue
        best = max(same, key=lambda peer: _speed(peer))
        record["peer_name"] = best.name
        if best.step_ms is not None:
            record["peer_step_ms"] = best.step_ms
            record["times_peer"] = round(best.step_ms / record["step_ms"], 3)
        elif best.tokens_per_s is not None:
            record["peer_tokens_per_s"] = best.tokens_per_s
            record["times_peer"] = round(record["tokens_per_s"] / best.tokens_per_s, 3)


def _is_same(record: Record, peer: PeerFigure) -> bool:
    mine: Mapping[str, object] = record
    names = ("figure", "shape", "batch", "context", "dtype", "kv_cache_dtype")
    # Figures of others are of one GPU.
    return (
        peer.device in record["device"]
        and not {"tp", "pp"} & record.keys()
        and record.get("weights", peer.weights) == peer.weights
        and all(mine.get(name) == getattr(peer, name) for name in names)
    )


def _speed(peer: PeerFigure) -> float:
    return peer.tokens_per_s or 1.0 / (peer.step_ms or 1.0)
