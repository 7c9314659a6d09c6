# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Logprobs of drawn and of given tokens, on each backend, against the reference, bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import reference_sampler as reference
from mrv1 import _core
from reference_sampler import ERROR_TOKEN, Logprobs, RowParams
from sampling_runs import (
    INF,
    KINDS,
    NAN,
    Floats,
    edited_params,
    make_logits,
    open_device,
    read_record,
    run_batch,
    run_places,
)

VOCABS = (1, 2, 33, 255, 257, 999, 1025, 4097)


def run_score(
    device: str, logits: Floats, targets: list[int], num_logprobs: int
) -> list[Logprobs | None]:
    records = _core.score(
        open_device(device), logits, np.array(targets, np.int32), num_logprobs=num_logprobs
    )
    return [read_record(record) for record in records]


def sorted_top(record: Logprobs | None) -> Logprobs | None:
    """More than 1,024 candidates come in any order."""
    if record is None or record.count <= 1024:
        return record
    pairs = sorted(
        zip(record.top_tokens, record.top_logprobs, strict=True), key=lambda pair: (-pair[1], pair)
    )
    tokens, logprobs = zip(*pairs, strict=True)
    return dataclasses.replace(record, top_tokens=tokens, top_logprobs=logprobs)


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_logprobs_of_drawn_tokens_equal_the_reference(device: str, data: st.DataObject) -> None:
    """Whatever the edits do: logprobs are of the logits before them, but for the grammar's mask."""
    vocab = data.draw(st.sampled_from(VOCABS))
    kind = data.draw(st.sampled_from(KINDS))
    event(kind)
    num_logprobs = data.draw(st.sampled_from([-1, 0, 1, 5, 20, vocab, vocab + 3]))
    count = data.draw(st.integers(1, 3))
    logits = np.stack([make_logits(kind, vocab, i) for i in range(count)])
    params = data.draw(edited_params(vocab, max_drafts=count - 1))
    params = dataclasses.replace(params, num_logprobs=num_logprobs)
    tokens, records = run_places(device, logits, params)
    for place in range(count):
        at_place = reference.at_place(params, place)
        assert tokens[place] == reference.sample_row(logits[place], at_place)
        expected = None
        if num_logprobs >= 0:
            raw = reference.raw_logits(logits[place], params)
            expected = sorted_top(reference.logprobs(raw, tokens[place], num_logprobs))
        assert sorted_top(records[place]) == expected


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_scores_of_given_tokens_equal_the_reference(device: str, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from(VOCABS))
    num_logprobs = data.draw(st.sampled_from([0, 1, 7, vocab, vocab + 1]))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    logits = np.stack([make_logits(kind, vocab, i) for i, kind in enumerate(kinds)])
    targets = [data.draw(st.integers(-1, vocab - 1)) for _ in kinds]
    records = run_score(device, logits, targets, num_logprobs)
    for row, target, record in zip(logits, targets, records, strict=True):
        expected = None if target < 0 else reference.logprobs(row, target, num_logprobs)
        assert sorted_top(record) == sorted_top(expected)


@pytest.mark.parametrize("vocab", [999, 4097, 151_936, 262_144])
@pytest.mark.parametrize("kind", ["normal", "ties", "peaked", "steep", "equal"])
def test_logprobs_are_those_of_float64(device: str, kind: str, vocab: int) -> None:
    """Within 2^-20 and the rounding to float32, the candidates and ranks exactly."""
    logits = make_logits(kind, vocab, 6)
    wide = logits.astype(np.float64)
    exact = wide - wide.max() - np.log(np.sum(np.exp(wide - wide.max())))
    target = vocab // 3
    record = run_score(device, logits[None], [target], 20)[0]
    assert record is not None
    order = np.lexsort((np.arange(vocab), -wide))[:20]
    assert record.top_tokens == tuple(order.tolist())
    assert record.rank == 1 + int(np.sum(logits > logits[target]))
    got = np.array([record.logprob, *record.top_logprobs])
    expected = np.array([exact[target], *exact[order]])
    assert np.all(np.abs(got - expected) <= 2.0**-20 + 2.0**-24 * np.abs(expected))


def test_probabilities_add_up(device: str) -> None:
    logits = make_logits("normal", 300, 2)
    record = run_score(device, logits[None], [0], 300)[0]
    assert record is not None
    assert record.count == 300
    assert sorted(record.top_tokens) == list(range(300))
    assert abs(float(np.sum(np.exp(np.array(record.top_logprobs, np.float64)))) - 1) < 2.0**-20


def test_ties_have_the_best_rank_and_lower_ids_come_first(device: str) -> None:
    logits = np.array([[1, 3, 3, 2, 3]], np.float32)
    for target, rank in ((0, 5), (1, 1), (2, 1), (3, 4), (4, 1)):
        record = run_score(device, logits, [target], 4)[0]
        assert record is not None
        assert (record.token, record.rank) == (target, rank)
        assert record.top_tokens == (1, 2, 4, 3)


def test_infinite_logits_share_all_probability(device: str) -> None:
    logits = np.array([[INF, 3, INF, -INF]], np.float32)
    record = run_score(device, logits, [3], 4)[0]
    half = float(np.float32(np.log(0.5)))
    assert record == Logprobs(3, -INF, 4, 4, (0, 2, 1, 3), (half, half, -INF, -INF))


def test_rows_without_a_token_have_no_logprobs(device: str) -> None:
    logits = np.stack([make_logits("normal", 300, seed) for seed in range(4)])
    logits[1, 7] = NAN
    logits[2] = -INF
    records = run_score(device, logits, [0, 1, 2, 3], 2)
    assert [record.count for record in records if record is not None] == [2, -1, -1, 2]

    rows = [RowParams(num_logprobs=2, temperature=1.0, seed=seed) for seed in range(4)]
    order = range(4)
    tokens, records = run_batch(device, logits, rows, logits_batch=order, batch_row=order)
    assert tokens[1] == tokens[2] == ERROR_TOKEN
    assert [record.count for record in records if record is not None] == [2, -1, -1, 2]
    assert records[0] == reference.logprobs(logits[0], tokens[0], 2)


def test_only_rows_that_ask_get_logprobs(device: str) -> None:
    logits = np.stack([make_logits("normal", 300, seed) for seed in range(4)])
    rows = [RowParams(num_logprobs=n) for n in (-1, 0, 7, 2)]
    tokens, records = run_batch(
        device, logits, rows, logits_batch=[3, 0, -1, 2], batch_row=[0, 1, 2, 3]
    )
    assert tokens[2] == reference.NO_TOKEN
    assert records[1] is None
    assert records[2] is None
    assert records[0] == reference.logprobs(logits[0], tokens[0], 2)
    assert records[3] == reference.logprobs(logits[3], tokens[3], 7)


def test_many_candidates_of_a_large_vocabulary(device: str) -> None:
    logits = make_logits("ties", 151_936, 3)[None]
    for count in (1000, 5000):
        record = run_score(device, logits, [5], count)[0]
        expected = reference.logprobs(logits[0], 5, count)
        assert sorted_top(record) == sorted_top(expected)


def test_logprobs_are_of_the_logits_before_all_edits(device: str) -> None:
    """Of everything but the grammar, which takes probability away for others to share."""
    logits = np.array([[2, 1, 0, 3]], np.float32)
    params = RowParams(
        tokens=(3, 3),
        prompt_len=1,
        total_len=2,
        num_logprobs=4,
        repetition_penalty=4.0,
        presence_penalty=2.0,
        bias=((2, 9.0),),
        allowed=(1, 2),
        bad_words=((2,),),
    )
    tokens, records = run_places(device, logits, params)
    assert tokens == [1]
    assert records == [reference.logprobs(logits[0], 1, 4)]
    masked = dataclasses.replace(params, grammar=frozenset({0, 1}))
    tokens, records = run_places(device, logits, masked)
    assert tokens == [1]
    record = records[0]
    assert record is not None
    assert record.top_tokens == (0, 1, 2, 3)
    assert record.top_logprobs[2:] == (-INF, -INF)
    assert record.logprob == pytest.approx(-np.log1p(np.e), abs=1e-6)
    assert record.rank == 2
