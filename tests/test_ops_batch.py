# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Ops of `mrv1.ops` on the integers of a batch, against plain Python, on the device under test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrv1 import _core, memory, ops
from mrv1.errors import InvalidArgumentError

Array = np.ndarray


class Board:
    """Arrays that ops take and the host sees: of NumPy, or pinned memory of a GPU."""

    def __init__(self, device: _core.Device) -> None:
        self._device = device
        self.on_cpu = device.kind == "cpu"
        self._outs: list[memory.PinnedArray] = []
        self.stream = None if self.on_cpu else device

    def put(self, values: Array) -> Any:
        """An array of these values."""
        if self.on_cpu:
            return np.ascontiguousarray(values)
        pinned = memory.pinned(values.shape, values.dtype, self._device)
        pinned.numpy()[...] = values
        return pinned.device()

    def out(self, *shape: int) -> tuple[Any, Array]:
        """An array of int32 for a result, and what the host sees of it after wait()."""
        if self.on_cpu:
            array = np.full(shape, -77, np.int32)
            return array, array
        pinned = memory.pinned(shape, np.int32, self._device)
        pinned.numpy()[...] = -77
        self._outs.append(pinned)
        return pinned.device(), pinned.numpy()

    def wait(self) -> None:
        """For what is in the stream."""
        for pinned in self._outs:
            pinned.fence()
            pinned.wait()
        self._outs.clear()


@pytest.fixture
def board(native_device: _core.Device) -> Board:
    return Board(native_device)


def drafts_of(history: Sequence[int], low: int, high: int, most: int) -> list[int]:
    """The rules of prompt lookup, by looking everywhere."""
    length = len(history)
    for n in range(min(high, length - 1), low - 1, -1):
        for end in range(length - 1, n - 1, -1):
            if history[end - n : end] == history[length - n :]:
                return list(history[end : end + most])
    return []


@given(data=st.data())
def test_ngram_propose_matches_its_rules(board: Board, data: st.DataObject) -> None:
    cols = data.draw(st.sampled_from([1, 5, 40, 3000]))
    requests = data.draw(st.integers(0, 6))
    high = data.draw(st.integers(1, 5))
    low = data.draw(st.integers(1, high))
    most = data.draw(st.sampled_from([1, 3, 17]))
    # Few different tokens, so that much occurs again.
    vocab = data.draw(st.sampled_from([1, 2, 4, 50]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    histories = rng.integers(0, vocab, (requests, cols)).astype(np.int32)
    lengths = rng.integers(0, cols + 1, requests).astype(np.int32)
    limits = rng.integers(0, most + 2, requests).astype(np.int32)
    limited = data.draw(st.booleans())
    out, drafts = board.out(requests, most)
    num_out, counts = board.out(requests)
    ops.ngram_propose(
        board.put(histories), board.put(lengths), most, ngram_min=low, ngram_max=high,
        limits=board.put(limits) if limited else None, out=out, num_out=num_out,
        stream=board.stream,
    )  # fmt: skip
    board.wait()
    for b in range(requests):
        allowed = min(most, int(limits[b])) if limited else most
        expected = drafts_of(histories[b, : lengths[b]].tolist(), low, high, allowed)
        assert counts[b] == len(expected)
        assert drafts[b].tolist() == expected + [-1] * (most - len(expected))


def test_ngram_propose_reads_rows_of_a_larger_table() -> None:
    table = np.zeros((2, 9), np.int32)
    table[:, :4] = [[7, 8, 9, 7], [1, 2, 3, 4]]
    drafts, counts = ops.ngram_propose(table[:, :6], np.int32([4, 4]), 2)
    assert drafts.tolist() == [[8, 9], [-1, -1]]
    assert counts.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_drafts": 0}, r"max_drafts = 0: must be in \[1, 1024\]"),
        ({"ngram_min": 0}, "ngram_min = 0"),
        ({"ngram_min": 4}, "ngram_min = 4.*ngram_max is 3"),
        ({"lengths": np.int32([5])}, r"lengths\[0\] is 5"),
        ({"lengths": np.int64([4])}, "lengths is int64"),
        ({"limits": np.int32([-1])}, r"limits\[0\] is -1"),
        ({"limits": np.int32([1, 1])}, r"limits has shape \[2\]"),
        ({"token_ids": np.zeros((4, 2), np.int32).T}, "must be contiguous|lengths has shape"),
        ({"out": np.zeros((1, 3), np.int32)}, r"out has shape \[1, 3\]; must be \[1, 2\]"),
    ],
)
def test_ngram_propose_refuses_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "token_ids": np.int32([[7, 8, 9, 7]]),
        "lengths": np.int32([4]),
        "max_drafts": 2,
        **change,
    }
    with pytest.raises(InvalidArgumentError, match=message):
        ops.ngram_propose(**arguments)


def test_a_result_that_is_an_input_is_refused() -> None:
    lengths = np.int32([4])
    with pytest.raises(InvalidArgumentError, match="num_out is lengths"):
        ops.ngram_propose(np.int32([[7, 8, 9, 7]]), lengths, 2, num_out=lengths)


@given(data=st.data())
def test_slot_mapping_matches_its_rules(board: Board, data: st.DataObject) -> None:
    """`token_map` with positions, as callers of single ops have it."""
    requests = data.draw(st.sampled_from([0, 1, 2, 7, 300]))
    block_size = data.draw(st.sampled_from([1, 3, 16]))
    cols = data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    queries = rng.choice([0, 1, 1, 2, 9], requests)
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    tokens = int(starts[-1]) + data.draw(st.integers(0, 3))
    table = rng.integers(0, 50, (requests, cols)).astype(np.int32)
    positions = rng.integers(0, cols * block_size, tokens).astype(np.int32)
    out, slots = board.out(tokens)
    ops.slot_mapping(
        board.put(table), board.put(positions), board.put(starts), block_size,
        out=out, stream=board.stream,
    )  # fmt: skip
    board.wait()
    owner = np.repeat(np.arange(requests), queries)
    for token in range(tokens):
        block = 0
        if token < len(owner):
            block = int(table[owner[token], positions[token] // block_size])
        expected = block * block_size + int(positions[token]) % block_size if block > 0 else -1
        assert slots[token] == expected


@given(data=st.data())
def test_positions_of_attention_come_from_lengths(board: Board, data: st.DataObject) -> None:
    """`token_map` with lengths: what a plan works out is what a cache of one-hot values shows.

    Each position of a request has a key of its own and equal scores, so a token's result is the
    mean over the positions that it sees: 1 / (position + 1) in each of them.
    """
    block_size, dim = 4, 32
    requests = data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    lens = rng.integers(0, dim + 1, requests).astype(np.int32)
    queries = np.minimum(rng.choice([1, 1, 2, 6], requests), lens)
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    padding = data.draw(st.integers(0, 2))
    tokens = int(starts[-1]) + padding
    cols = dim // block_size
    table = (1 + rng.permutation(requests * cols)).reshape(requests, cols).astype(np.int32)
    value = np.zeros((requests * cols + 1, block_size, 1, dim), np.float32)
    for b in range(requests):
        for position in range(dim):
            value[table[b, position // block_size], position % block_size, 0, position] = 1
    if tokens == 0:
        return
    out = None
    pinned: Any = None
    if board.on_cpu:
        out = np.full((tokens, 1, dim), np.nan, np.float32)
    else:
        pinned = memory.pinned((tokens, 1, dim), np.float32, board.stream)
        out = pinned.device()
    ops.paged_attention(
        board.put(np.ones((tokens, 1, dim), np.float32)), board.put(np.zeros_like(value)),
        board.put(value), board.put(table), board.put(lens), board.put(starts),
        out=out, stream=board.stream,
    )  # fmt: skip
    if pinned is not None:
        pinned.fence()
        pinned.wait()
        out = pinned.numpy()
    expected = np.zeros((tokens, 1, dim))
    for b in range(requests):
        for token in range(starts[b], starts[b + 1]):
            position = lens[b] - starts[b + 1] + token
            expected[token, 0, : position + 1] = 1 / (position + 1)
    np.testing.assert_allclose(out, expected, atol=1e-6)
