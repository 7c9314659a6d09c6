# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The sampler of each backend against the reference, token for token."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import reference_sampler as reference
from mrv1 import _core
from mrv1.config import MAX_VOCAB_SIZE
from mrv1.errors import InvalidArgumentError
from reference_sampler import ERROR_TOKEN, NO_TOKEN, RowParams
from sampling_runs import (
    INF,
    KINDS,
    NAN,
    VOCABS,
    Floats,
    check_draws,
    make_logits,
    row_params,
    run_batch,
    run_places,
    run_rows,
    spread_rows,
)


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_tokens_equal_the_reference(device: str, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from(VOCABS))
    kind = data.draw(st.sampled_from(KINDS))
    event(kind)
    logits = make_logits(kind, vocab, data.draw(st.integers(0, 2**32)))
    check_draws(device, logits, data.draw(row_params(vocab)), draws=24)


@pytest.mark.parametrize(
    ("vocab", "kind"),
    [
        (2**18, "normal"),
        (2**18 + 1, "normal"),
        (262_208, "normal"),
        (262_208, "ties"),
        (2**20 - 3, "steep"),
        # The largest sum of weights there is: 2**63.
        (MAX_VOCAB_SIZE, "equal"),
    ],
)
def test_large_vocabularies(device: str, vocab: int, kind: str) -> None:
    logits = make_logits(kind, vocab, 11)
    best = int(np.argmax(logits))
    for limits in (
        {"temperature": 0.0},
        {},
        {"top_k": 40},
        {"top_k": 700},  # more than a row of 2**18 has tiles
        {"top_k": 2000},
        {"top_p": 0.9},
        {"min_p": 0.02},
        {"top_k": 300, "top_p": 0.5},
        {"min_total_len": 9, "stop_ids": (best, vocab - 1)},
    ):
        params = dataclasses.replace(RowParams(temperature=1.0, seed=5), **limits)  # type: ignore[arg-type]
        check_draws(device, logits, params, draws=4)


def test_a_vocabulary_beyond_the_sums_is_refused(device: str) -> None:
    logits = np.zeros((1, MAX_VOCAB_SIZE + 1), np.float32)
    with pytest.raises(InvalidArgumentError, match="1048577 columns, expected 1 to 1048576"):
        run_rows(device, logits, [RowParams()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "limits",
    [{"top_k": 7}, {"top_p": 0.4}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.7, "min_p": 0.05}],
    ids=lambda limits: "+".join(limits),
)
def test_draws_cover_the_filtered_set(device: str, kind: str, limits: dict[str, float]) -> None:
    """At this temperature every kept token is likely, so 4,000 draws show the whole set.

    A kept set of n tokens has weights within a factor of e of each other, so a token is missed by
    all draws with a probability below (1 - 1 / (e n))^4000: under 1e-16 for n <= 39. The seeds are
    fixed, so the test does not flicker.
    """
    logits = np.clip(make_logits(kind, 40, 5), -1e4, 1e4)
    spread = float(logits.max() - logits.min())
    params = RowParams(temperature=max(spread, 1.0), **limits)  # type: ignore[arg-type]
    ids, _ = reference.kept_set(logits, params)
    rows = [dataclasses.replace(params, seed=seed) for seed in range(4000)]
    tokens = run_rows(device, np.tile(logits, (len(rows), 1)), rows)
    assert sorted(set(tokens)) == ids.tolist()


@functools.cache
def words_by_seed() -> npt.NDArray[np.uint64]:
    """The random words of position 1 for seeds from 0 on."""
    return np.array([_core.random_word(seed, 1) for seed in range(2**16)], np.uint64)


def seeds_that_draw(ids: npt.NDArray[np.int64], q: npt.NDArray[np.uint64], token: int) -> list[int]:
    """A few seeds that draw the token from a set of ids with these weights."""
    ends = np.cumsum(q)
    place = int(np.searchsorted(ids, token))
    # Words below w draw what lies below w * total / 2^64, so the bounds are known to 2^-50.
    bounds = [float(ends[place] - q[place]), float(ends[place])]
    low, high = (bound / float(ends[-1]) for bound in bounds)
    words = words_by_seed() / 2.0**64
    return np.flatnonzero((words > low) & (words < high))[:4].tolist()


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_kept_sets_are_exact(device: str, data: st.DataObject) -> None:
    """By seeds that draw the last token of a set, and such as would draw the first one after it."""
    vocab = data.draw(st.sampled_from((2, 40, 257, 999, 4097)))
    kind = data.draw(st.sampled_from(["normal", "peaked", "ties", "equal", "holes"]))
    logits = make_logits(kind, vocab, data.draw(st.integers(0, 2**32)))
    params = dataclasses.replace(
        data.draw(row_params(vocab)),
        temperature=data.draw(st.sampled_from([2.0, 5.0, 30.0])),
        total_len=1,
        min_total_len=0,
    )
    ids, q = reference.kept_set(logits, params)
    order = np.lexsort((np.arange(vocab), -logits.astype(np.float64)))
    seeds = seeds_that_draw(ids, q, int(order[len(ids) - 1]))
    event(f"last token drawn: {len(seeds) > 0}")
    all_weights = reference.weights(logits, params.temperature)
    if len(ids) < vocab and all_weights[order[len(ids)]] > 0:
        more = np.sort(order[: len(ids) + 1])
        wrong = seeds_that_draw(more, all_weights[more], int(order[len(ids)]))
        event(f"next token would be drawn: {len(wrong) > 0}")
        seeds += wrong
    rows = [dataclasses.replace(params, seed=seed) for seed in seeds]
    if rows:
        tokens = run_rows(device, np.tile(logits, (len(rows), 1)), rows)
        assert tokens == reference.sample_seeds(logits, params, seeds)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_takes_the_lowest_of_the_largest(device: str, kind: str, vocab: int) -> None:
    logits = np.stack([make_logits(kind, vocab, seed) for seed in range(4)])
    # Filters do not apply to greedy rows.
    params = [RowParams(), RowParams(top_k=1), RowParams(top_p=0.1), RowParams(min_p=1.0)]
    expected = [int(np.flatnonzero(row == row.max())[0]) for row in logits]
    assert run_rows(device, logits, params) == expected


@pytest.mark.parametrize("vocab", [1, 2, 999, 4097])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [NAN, -NAN, -INF])
def test_error_token_for_the_bad_row_only(
    device: str, vocab: int, temperature: float, bad: float
) -> None:
    logits = np.stack([make_logits("normal", vocab, seed) for seed in range(3)])
    if np.isnan(bad):
        logits[1, vocab // 2] = np.copysign(np.float32(NAN), np.float32(bad))
        if np.signbit(np.float32(bad)):
            logits[1] = np.where(np.isnan(logits[1]), -np.float32(NAN), logits[1])
    else:
        logits[1] = bad
    params = [RowParams(temperature=temperature, top_k=5, top_p=0.9, seed=s) for s in range(3)]
    tokens = run_rows(device, logits, params)
    assert tokens[1] == ERROR_TOKEN
    assert tokens == reference.sample_rows(logits, params)
    assert tokens[0] >= 0
    assert tokens[2] >= 0


def test_nan_under_the_stop_mask_is_an_error(device: str) -> None:
    logits = make_logits("normal", 50, 0)[None]
    logits[0, 3] = NAN
    assert run_rows(device, logits, [RowParams(min_total_len=9, stop_ids=(3,))]) == [ERROR_TOKEN]


def test_infinite_logits_share_the_mass(device: str) -> None:
    logits = np.tile(make_logits("normal", 300, 1), (400, 1))
    logits[:, [7, 260]] = INF
    rows = [RowParams(temperature=0.7, seed=seed) for seed in range(400)]
    tokens = run_rows(device, logits, rows)
    assert set(tokens) == {7, 260}
    assert run_rows(device, logits[:1], [RowParams()]) == [7]


def test_filters_that_are_off_change_nothing(device: str) -> None:
    vocab = 4097
    logits = np.tile(make_logits("normal", vocab, 2), (64, 1))
    plain = [RowParams(temperature=1.0, seed=seed) for seed in range(64)]
    expected = run_rows(device, logits, plain)
    for change in ({"top_k": vocab}, {"top_k": vocab + 5}, {"top_p": 1.0}, {"min_p": 0.0}):
        rows = [dataclasses.replace(p, **change) for p in plain]  # type: ignore[arg-type]
        assert run_rows(device, logits, rows) == expected, change


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-30}, {"min_p": 1.0}])
def test_the_tightest_filters_are_greedy(device: str, limits: dict[str, float]) -> None:
    logits = np.stack([make_logits("normal", 999, seed) for seed in range(32)])
    rows = [RowParams(temperature=1.3, seed=s, **limits) for s in range(32)]  # type: ignore[arg-type]
    assert run_rows(device, logits, rows) == np.argmax(logits, axis=1).tolist()


def test_ties_at_the_edge_go_to_lower_ids(device: str) -> None:
    logits = np.zeros((600, 700), np.float32)
    logits[:, 650] = 0.5
    by_k = [RowParams(temperature=1.0, top_k=4, seed=seed) for seed in range(600)]
    assert set(run_rows(device, logits, by_k)) == {0, 1, 2, 650}
    logits[:, 650] = 0.0
    # 700 equal weights: 3 of them are the first to reach 0.3 % of the sum.
    by_p = [RowParams(temperature=1.0, top_p=0.003, seed=seed) for seed in range(600)]
    assert set(run_rows(device, logits, by_p)) == {0, 1, 2}
    # Half of 8 equal weights is reached by 4 of them exactly.
    half = [RowParams(temperature=1.0, top_p=0.5, seed=seed) for seed in range(600)]
    assert set(run_rows(device, np.zeros((600, 8), np.float32), half)) == {0, 1, 2, 3}


def test_stop_tokens_wait_for_the_least_length(device: str) -> None:
    logits = np.tile(np.array([0, 9, 1, 8, -INF], np.float32), (4, 1))
    stops = (1, 3)
    params = [
        RowParams(total_len=5, min_total_len=6, stop_ids=stops),
        RowParams(total_len=6, min_total_len=6, stop_ids=stops),
        RowParams(total_len=5, min_total_len=6),
        # A mask that would leave nothing is not applied.
        RowParams(total_len=5, min_total_len=6, stop_ids=(3, 2, 1, 0)),
    ]
    assert run_rows(device, logits, params) == [2, 1, 1, 1]


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_place_padding_and_batch_do_not_matter(device: str, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from((2, 257, 4097)))
    count = data.draw(st.integers(1, 6))
    logits = np.stack([make_logits(KINDS[i], vocab, i) for i in range(count)])
    params = [data.draw(row_params(vocab)) for _ in range(count)]
    tokens, expected = spread_rows(data, device, logits, params)
    assert tokens == expected


def test_logits_rows_of_padding_get_no_token(device: str) -> None:
    logits = np.stack([make_logits("normal", 100, seed) for seed in range(3)])
    params = [RowParams(), RowParams()]
    tokens, _ = run_batch(device, logits, params, logits_batch=[-1, 1, 2], batch_row=[0, 1, -1])
    assert tokens == [NO_TOKEN, int(np.argmax(logits[1])), NO_TOKEN]
    empty = np.zeros((0, 100), np.float32)
    assert run_batch(device, empty, params, logits_batch=[], batch_row=[1]) == ([], [])
    assert run_batch(device, empty, params, logits_batch=[], batch_row=[]) == ([], [])


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_place_is_drawn_as_by_a_row_that_is_longer(device: str, data: st.DataObject) -> None:
    """The rows of a request's drafts: each at its own position, with what applies there."""
    vocab = data.draw(st.sampled_from((7, 257, 4097)))
    count = data.draw(st.integers(1, 5))
    logits = np.stack([make_logits(KINDS[i], vocab, i) for i in range(count)])
    params = data.draw(row_params(vocab))
    # The length below which stop ids are masked lies among the places.
    params = dataclasses.replace(
        params, min_total_len=params.total_len + 2, stop_ids=(0, 1, 2), drafts=(3,) * (count - 1)
    )
    expected = [
        run_rows(
            device,
            logits[place : place + 1],
            [reference.at_place(params, place)],
        )[0]
        for place in range(count)
    ]
    got, _ = run_places(device, logits, params)
    assert got == expected


def chi_square(counts: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> float:
    """The statistic of counts against the probabilities, shares of their sum, none of them 0."""
    expected = counts.sum() * shares / shares.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.8}, {"top_k": 11}, {"min_p": 0.2}])
def test_draws_follow_the_distribution(device: str, limits: dict[str, float]) -> None:
    """Chi-square over 20,000 draws of 20 tokens.

    With at most 19 degrees of freedom the statistic exceeds 58 with a probability of at most 8e-6,
    the rate of false alarms over the choice of seeds; the seeds here are fixed.
    """
    draws, vocab = 20_000, 20
    logits = np.random.default_rng(3).permutation(np.linspace(-1.5, 1.5, vocab)).astype(np.float32)
    params = RowParams(temperature=0.8, **limits)  # type: ignore[arg-type]
    rows = [dataclasses.replace(params, seed=i // 4, total_len=1 + i % 4) for i in range(draws)]
    tokens = run_rows(device, np.tile(logits, (draws, 1)), rows)
    exact = np.exp(logits.astype(np.float64) / 0.8)
    kept = float64_set(logits, params)
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[~kept].sum() == 0
    assert chi_square(counts[kept], exact[kept]) < 58.0


def test_draws_from_tiles_follow_the_distribution(device: str) -> None:
    """Chi-square over 8,000 draws of 5,000 tokens in 5 tiles, by 20 ranges of ids.

    The tiles differ in their largest logit and one has next to no mass. False alarms as above.
    """
    draws, vocab = 8_000, 5_000
    logits = np.random.default_rng(8).normal(0, 1, vocab).astype(np.float32)
    logits[:1024] -= 2
    logits[1024:2048] += 1
    logits[2048:3072] -= 30
    rows = [RowParams(temperature=0.9, seed=seed) for seed in range(draws)]
    tokens = []
    for first in range(0, draws, 500):
        tokens += run_rows(device, np.tile(logits, (500, 1)), rows[first : first + 500])
    weights = np.exp(logits.astype(np.float64) / 0.9)
    ranges = np.arange(vocab) // 250
    shares = np.bincount(ranges, weights)
    counts = np.bincount(ranges[tokens], minlength=len(shares))
    # The ranges without mass count as one with the next.
    rare = shares < 1e-3 * shares.sum()
    assert 2 <= rare.sum() <= 4
    assert counts[rare].sum() <= 1
    assert chi_square(counts[~rare], shares[~rare]) < 58.0


def float64_set(logits: Floats, params: RowParams) -> npt.NDArray[np.bool_]:
    """The kept set as probabilities in float64 have it: min_p, then top_k, then top_p."""
    wide = logits.astype(np.float64)
    weights = np.exp((wide - wide.max()) / float(np.float32(params.temperature)))
    kept = weights >= float(np.float32(params.min_p))
    order = np.lexsort((np.arange(logits.size), -wide))
    order = order[kept[order]]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        before = np.cumsum(weights[order]) - weights[order]
        order = order[before < float(np.float32(params.top_p)) * weights[order].sum()]
    result = np.zeros(logits.size, np.bool_)
    result[order] = True
    return result


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_kept_sets_differ_from_float64_at_the_edge_only(data: st.DataObject) -> None:
    """By tokens within 2^-20 of min_p's limit or top_p's sum, as shares of what they refer to.

    The device's sets are the reference's. Tokens of less than 2^-42 of the largest's weight may
    weigh nothing.
    """
    vocab = data.draw(st.sampled_from((1, 2, 999, 4097, 151_936)))
    kind = data.draw(st.sampled_from(["normal", "peaked", "ties", "equal", "holes", "steep"]))
    logits = make_logits(kind, vocab, data.draw(st.integers(0, 2**32)))
    params = dataclasses.replace(
        data.draw(row_params(vocab)), temperature=data.draw(st.floats(0.25, 4.0, width=32))
    )
    ids, _ = reference.kept_set(logits, params)
    ours = np.zeros(vocab, np.bool_)
    ours[ids] = True
    wide = logits.astype(np.float64)
    weights = np.exp((wide - wide.max()) / float(np.float32(params.temperature)))
    differ = (ours != float64_set(logits, params)) & (weights >= 2.0**-42)
    if not differ.any():
        return
    event("differs")
    near_limit = np.abs(weights - float(np.float32(params.min_p))) <= 2.0**-20
    order = np.lexsort((np.arange(vocab), -wide))
    order = order[weights[order] >= float(np.float32(params.min_p)) * (1 - 2.0**-20)]
    if params.top_k > 0:
        order = order[: params.top_k]
    total = weights[order].sum()
    before = np.full(vocab, np.inf)
    before[order] = (np.cumsum(weights[order]) - weights[order]) / total
    near_sum = np.abs(before - float(np.float32(params.top_p))) <= 2.0**-20
    assert np.all((near_limit | near_sum)[differ])


def test_a_whole_vocabulary_of_a_real_model(device: str) -> None:
    vocab = 151_936
    logits = np.stack([make_logits(kind, vocab, 3) for kind in ("normal", "ties", "peaked")])
    for change in ({}, {"top_k": 20}, {"top_k": 20, "top_p": 0.95}, {"top_p": 0.8}):
        rows = [RowParams(temperature=0.6, seed=s, **change) for s in range(3)]  # type: ignore[arg-type]
        assert run_rows(device, logits, rows) == reference.sample_rows(logits, rows), change


@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    temperature=st.floats(2.0**-149, 2.0**100, width=32),
)
@settings(deadline=None, max_examples=300)
def test_weights_equal_the_reference(values: list[float], temperature: float) -> None:
    logits = np.array(values, np.float32)
    if not np.any(logits > -INF):
        logits[0] = 0
    expected = reference.weights(logits, temperature)
    weights = _core.fixed_point_weights(logits, temperature)
    assert weights.tolist() == expected.tolist()
    assert int(weights.max()) == 2**43


def test_weights_equal_the_reference_over_the_range() -> None:
    exponents = np.sort(np.random.default_rng(0).uniform(-33, 0, 200_000)).astype(np.float32)
    exponents[-1] = 0
    weights = _core.fixed_point_weights(exponents)
    assert np.array_equal(weights, reference.weights(exponents, 1.0))


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**32 - 1))
def test_random_words_equal_the_reference(seed: int, position: int) -> None:
    assert _core.random_word(seed, position) == reference.random_word(seed, position)


def test_reference_random_word_is_philox() -> None:
    # The known answer that its authors publish for key 0 and counter 0.
    assert reference.random_word(0, 0) == 0xE169C58D6627E8D5


def test_the_order_of_processors_is_the_documented_one() -> None:
    assert _core.sampling_processors() == [
        "grammar",
        "raw_logprobs",
        "logit_bias",
        "allowed_token_ids",
        "min_tokens",
        "penalties",
        "bad_words",
        "temperature",
        "min_p",
        "top_k",
        "top_p",
    ]
