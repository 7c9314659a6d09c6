# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Processors that edit logits, on each backend, against the reference, token for token."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import reference_sampler as reference
from mrv1.errors import InvalidArgumentError
from reference_sampler import ERROR_TOKEN, RowParams
from sampling_runs import (
    INF,
    KINDS,
    NAN,
    check_draws,
    draw_places,
    edited_params,
    few_ids,
    make_logits,
    raise_history,
    run_batch,
    run_rows,
    spread_rows,
)

VOCABS = (1, 2, 31, 33, 257, 999, 4097)


@given(data=st.data())
@settings(deadline=None, max_examples=250)
def test_all_edits_together_equal_the_reference(device: str, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from(VOCABS))
    kind = data.draw(st.sampled_from(KINDS))
    event(kind)
    params = data.draw(edited_params(vocab))
    logits = make_logits(kind, vocab, data.draw(st.integers(0, 2**32)))
    if data.draw(st.booleans()):
        logits = raise_history(logits, params)
    check_draws(device, logits, params, draws=16)


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_edits_with_drafts_equal_the_reference(device: str, data: st.DataObject) -> None:
    """A place sees the drafts before it as outputs, which no table counts."""
    vocab = data.draw(st.sampled_from((3, 33, 999)))
    count = data.draw(st.integers(2, 5))
    logits = np.stack(
        [make_logits(data.draw(st.sampled_from(KINDS)), vocab, i) for i in range(count)]
    )
    params = data.draw(edited_params(vocab, max_drafts=count - 1))
    logits[::2] = [raise_history(row, params) for row in logits[::2]]
    seeds = range(16)
    expected = [
        reference.sample_seeds(row, reference.at_place(params, place), seeds)
        for place, row in enumerate(logits)
    ]
    tokens = draw_places(device, logits, params, seeds)
    assert tokens == [list(row) for row in zip(*expected, strict=True)]


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_place_padding_and_batch_do_not_matter(device: str, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from((2, 257, 4097)))
    count = data.draw(st.integers(1, 5))
    logits = np.stack([make_logits(KINDS[i], vocab, i) for i in range(count)])
    params = [data.draw(edited_params(vocab)) for _ in range(count)]
    tokens, expected = spread_rows(data, device, logits, params)
    assert tokens == expected


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_history_is_counted_in_any_pieces(device: str, data: st.DataObject) -> None:
    """Tables grow from step to step; a prompt may end within a piece."""
    vocab = data.draw(st.sampled_from((5, 999)))
    params = data.draw(edited_params(vocab))
    params = dataclasses.replace(params, temperature=0.0, frequency_penalty=0.75)
    logits = make_logits("ties", vocab, data.draw(st.integers(0, 99)))[None]
    counted = data.draw(st.integers(0, params.total_len))
    tokens, _ = run_batch(
        device, logits, [params], logits_batch=[0], batch_row=[0], counted_len=[counted]
    )
    assert tokens == [reference.sample_row(logits[0], params)]


@pytest.mark.parametrize("vocab", [151_936, 262_144])
def test_edits_over_vocabularies_of_real_models(device: str, vocab: int) -> None:
    random = np.random.default_rng(vocab)
    logits = make_logits("normal", vocab, 4)
    order = np.argsort(-logits)
    history = tuple(random.choice(order[:300], 200).tolist())
    base = RowParams(
        temperature=0.8,
        seed=3,
        tokens=history,
        prompt_len=80,
        total_len=200,
        min_total_len=201,
        stop_ids=(int(order[0]), int(order[5])),
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        repetition_penalty=1.3,
        bias=((int(order[1]), -3.0), (int(order[200]), 4.5), (vocab - 1, 8.0)),
        bad_words=((int(order[2]),), (history[-1], int(order[3])), (0, int(order[4]))),
    )
    half = tuple(np.flatnonzero(random.random(vocab) < 0.5).tolist())
    for change in (
        {},
        {"temperature": 0.0},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
        {"top_p": 0.95},
        {"allowed": half},
        {"grammar": frozenset(half)},
        {"allowed": (7, vocab - 1), "top_k": 5},
        {"grammar": frozenset({vocab - 1})},
    ):
        check_draws(device, logits, dataclasses.replace(base, **change), draws=4)  # type: ignore[arg-type]


def greedy(device: str, logits: list[float], params: RowParams) -> int:
    return run_rows(device, np.array([logits], np.float32), [params])[0]


def test_each_edit_of_a_small_row(device: str) -> None:
    """What each parameter does, by hand."""
    logits = [1.0, 2.0, 3.0, 2.5]
    known = {"tokens": (2, 0, 2, 3, 2), "prompt_len": 2, "total_len": 5}  # outputs 2, 3, 2

    def token(**change: object) -> int:
        return greedy(device, logits, RowParams(**known | change))  # type: ignore[arg-type]

    assert token() == 2
    assert token(bias=((1, 1.25),)) == 1
    assert token(bias=((1, 1.0),)) == 1  # a tie goes to the lower id
    assert token(allowed=(0, 3)) == 3
    assert token(grammar=frozenset({0, 1})) == 1
    assert token(grammar=frozenset({0, 1}), allowed=(0, 2)) == 0
    assert token(stop_ids=(2, 3), min_total_len=6) == 1
    # Presence is the same for one use as for two, of outputs alone.
    assert token(presence_penalty=0.75) == 2
    assert token(presence_penalty=1.5) == 1
    assert token(presence_penalty=-2.0) == 2
    # Frequency is by uses: 2 was put out twice, 3 once.
    assert token(frequency_penalty=0.4) == 2
    assert token(frequency_penalty=0.6) == 1
    # Repetition divides, of prompt and outputs: 1 is in neither.
    assert token(repetition_penalty=2.0) == 1
    assert token(repetition_penalty=1.25) == 2
    # A bad word takes its last token out where the outputs end with the others.
    assert token(bad_words=((2,),)) == 3
    assert token(bad_words=((3, 2, 2),)) == 3
    assert token(bad_words=((2, 3, 2, 2),)) == 3
    assert token(bad_words=((0, 2, 3, 2, 2),)) == 2  # 0 belongs to the prompt
    assert token(bad_words=((3, 2),)) == 2
    assert token(bad_words=((2,), (3,), (2, 1))) == 0


def test_repetition_makes_negative_logits_smaller(device: str) -> None:
    params = RowParams(tokens=(0,), prompt_len=1, repetition_penalty=2.0)
    assert greedy(device, [-1.0, -1.5], params) == 1
    assert greedy(device, [-1.0, -2.5], params) == 0
    assert greedy(device, [-1.0, -1.5], dataclasses.replace(params, repetition_penalty=0.5)) == 0


def test_biases_come_before_penalties(device: str) -> None:
    """1 + 3 halved is 2, below 2.5; half of 1 and then 3 more would be above it."""
    params = RowParams(tokens=(0,), prompt_len=1, repetition_penalty=2.0, bias=((0, 3.0),))
    assert greedy(device, [1.0, 2.5], params) == 1


def test_penalties_come_before_the_temperature(device: str) -> None:
    """A penalty of 1 at temperature 1/2 takes a factor of e^2 off a token's odds.

    Of 2,000 draws 0.119 are expected to give the token, against 0.269 if it were a factor of e:
    300 lies over 4 standard deviations from the first and 10 from the second.
    """
    params = RowParams(temperature=0.5, tokens=(1, 0), prompt_len=1, total_len=2)
    params = dataclasses.replace(params, presence_penalty=1.0)
    rows = [dataclasses.replace(params, seed=seed) for seed in range(2000)]
    tokens = run_rows(device, np.zeros((2000, 2), np.float32), rows)
    assert 180 < tokens.count(0) < 300


def test_what_no_token_is_left_of_is_an_error(device: str) -> None:
    logits = make_logits("normal", 70, 0)
    known = {"tokens": (1, 2), "prompt_len": 1, "total_len": 2}
    for params in (
        RowParams(grammar=frozenset()),
        RowParams(grammar=frozenset({3}), allowed=(4, 69)),
        RowParams(allowed=(4,), bad_words=((4,),), **known),  # type: ignore[arg-type]
        RowParams(grammar=frozenset({4}), bad_words=((2, 4),), **known),  # type: ignore[arg-type]
    ):
        for temperature in (0.0, 1.0):
            row = dataclasses.replace(params, temperature=temperature)
            assert run_rows(device, logits[None], [row]) == [ERROR_TOKEN]


def test_min_tokens_gives_way_where_masks_leave_stop_tokens_only(device: str) -> None:
    logits = np.array([[3, 9, 1, 8]], np.float32)
    params = RowParams(total_len=5, min_total_len=6, stop_ids=(1, 3))
    assert run_rows(device, logits, [params]) == [0]
    for change in ({"allowed": (1, 3)}, {"grammar": frozenset({1, 3})}):
        assert run_rows(device, logits, [dataclasses.replace(params, **change)]) == [1]  # type: ignore[arg-type]
    # Bad words come later: what they leave nothing of is an error.
    words = dataclasses.replace(
        params, tokens=(0,) * 5, prompt_len=5, allowed=(0, 1), bad_words=((0,),)
    )
    assert run_rows(device, logits, [words]) == [ERROR_TOKEN]


def test_min_tokens_with_a_vocabulary_of_stop_tokens(device: str) -> None:
    """Each of many ids is looked up among many, which takes no time that a step would feel."""
    vocab, last = 151_936, 151_000
    logits = np.random.default_rng(7).normal(0.0, 2.0, (2, vocab)).astype(np.float32)
    length = {"total_len": 5, "min_total_len": 6}
    rows = [
        RowParams(stop_ids=tuple(token for token in range(vocab) if token != last), **length),
        RowParams(stop_ids=tuple(range(vocab)), **length),  # so that there is nothing to keep
    ]
    start = time.perf_counter()
    assert run_rows(device, logits, rows) == [last, int(logits[1].argmax())]
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize("bad", [NAN, -NAN])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_nan_is_an_error_under_every_mask_and_edit(
    device: str, bad: float, temperature: float
) -> None:
    logits = np.stack([make_logits("normal", 300, seed) for seed in range(3)])
    logits[1, 40] = np.copysign(np.float32(NAN), np.float32(bad))
    known = {"tokens": (40, 40), "prompt_len": 1, "total_len": 2, "temperature": temperature}
    for change in (
        {"grammar": frozenset(range(39))},
        {"allowed": (1, 2, 3)},
        {"bias": ((40, -5.0),)},
        {"repetition_penalty": 2.0},
        {"frequency_penalty": 1.0},
        {"presence_penalty": 1.0},
        {"bad_words": ((40,),)},
        {"stop_ids": (40,), "min_total_len": 9},
    ):
        rows = [RowParams(seed=seed, **known | change) for seed in range(3)]  # type: ignore[arg-type]
        tokens = run_rows(device, logits, rows)
        assert tokens[1] == ERROR_TOKEN, change
        assert tokens == reference.sample_rows(logits, rows), change
        assert min(tokens[0], tokens[2]) >= 0, change


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_masks_let_no_other_token_through(device: str, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from(VOCABS))
    allowed = data.draw(few_ids(vocab))
    logits = np.tile(make_logits("normal", vocab, 1), (64, 1))
    grammar = data.draw(st.booleans())
    rows = [
        RowParams(
            temperature=20.0,
            seed=seed,
            grammar=allowed if grammar else None,
            allowed=() if grammar else tuple(allowed),
        )
        for seed in range(64)
    ]
    assert set(run_rows(device, logits, rows)) <= allowed


def test_infinite_logits_stay_infinite(device: str) -> None:
    """-inf under every edit; +inf unless it is taken out."""
    logits = [-INF, 1.0, INF, 0.0]
    known = RowParams(tokens=(0, 2, 0, 2), prompt_len=2, total_len=4)
    everything = dataclasses.replace(
        known,
        presence_penalty=-2.0,
        frequency_penalty=-2.0,
        repetition_penalty=0.125,
        bias=((0, 100.0), (2, -100.0)),
    )
    assert greedy(device, logits, everything) == 2
    assert greedy(device, logits, dataclasses.replace(everything, bad_words=((2,),))) == 1
    assert greedy(device, logits[:1], RowParams(bias=((0, 100.0),))) == ERROR_TOKEN


def test_a_row_without_edits_is_not_touched_by_its_neighbours(device: str) -> None:
    logits = np.tile(make_logits("normal", 999, 5), (3, 1))
    plain = RowParams(temperature=0.9, seed=4, total_len=6)
    edited = dataclasses.replace(
        plain, tokens=(1, 2, 3, 1, 2, 3), prompt_len=3, repetition_penalty=1.5, allowed=(1, 2)
    )
    alone = run_rows(device, logits[:1], [plain])[0]
    tokens = run_rows(device, logits, [edited, plain, edited])
    assert tokens[1] == alone
    assert tokens[0] == tokens[2] == reference.sample_row(logits[0], edited)


def test_draws_with_penalties_follow_the_distribution(device: str) -> None:
    """Chi-square over 20,000 draws of 20 tokens, under all penalties, a bias and top_p.

    With at most 19 degrees of freedom the statistic exceeds 58 with a probability of at most 8e-6,
    the rate of false alarms over the choice of seeds; the seeds here are fixed.
    """
    draws, vocab = 20_000, 20
    logits = np.linspace(-1.5, 1.5, vocab).astype(np.float32)
    params = RowParams(
        temperature=0.8,
        top_p=0.9,
        tokens=(3, 19, 18, 19, 19, 10),
        prompt_len=2,
        total_len=6,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        bias=((0, 1.0),),
    )
    exact = logits.astype(np.float64)
    exact[0] += 1.0
    for token in (3, 19, 18, 10):
        exact[token] = exact[token] / 1.2 if exact[token] > 0 else exact[token] * 1.2
    for token, count in ((18, 1), (19, 2), (10, 1)):
        exact[token] -= 0.4 + 0.3 * count
    weights = np.exp(exact / 0.8)
    order = np.argsort(-weights)
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= 0.9 * weights.sum()]] = 0
    expected = draws * weights / weights.sum()
    rows = [dataclasses.replace(params, seed=seed) for seed in range(draws)]
    tokens = run_rows(device, np.tile(logits, (draws, 1)), rows)
    counts = np.bincount(tokens, minlength=vocab)
    kept = expected > 0
    assert 5 < kept.sum() < vocab
    assert counts[~kept].sum() == 0
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 58.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (RowParams(bias=((9, 1.0),)), "logit_bias of token id 9 is outside|token id 9"),
        (RowParams(bias=((1, INF),)), "must be finite"),
        (RowParams(allowed=(9,)), "allowed token id 9"),
        (RowParams(bad_words=((),)), r"bad_words\[0\] is empty"),
        (RowParams(repetition_penalty=0.0), "repetition_penalty"),
        (RowParams(presence_penalty=NAN), "presence_penalty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lists_are_checked_before_anything_runs(
    device: str, params: RowParams, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        run_rows(device, np.zeros((1, 9), np.float32), [params])
