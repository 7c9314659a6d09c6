# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The sampler of each backend against the reference, token for token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

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

Floats = npt.NDArray[np.float32]
VOCABS = (1, 2, 3, 255, 256, 257, 999, 4097, 32_000)
INF = float("inf")
NAN = float("nan")


@functools.cache
def open_device(kind: str) -> _core.Device:
    return _core.Device(kind, num_threads=2)


def run_batch(
    device: str,
    logits: Floats,
    params: Sequence[RowParams],
    *,
    logits_batch: Sequence[int],
    batch_row: Sequence[int],
    logits_place: Sequence[int] | None = None,
) -> list[int]:
    """Samples a batch; `params` is the row table. One token a logits row."""

    def column(name: str, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        return np.array([getattr(p, name) for p in params], dtype)

    sampled = _core.sample(
        open_device(device),
        np.ascontiguousarray(logits, np.float32),
        logits_batch=np.array(logits_batch, np.int32),
        logits_place=np.array(logits_place or [0] * len(logits_batch), np.int32),
        batch_row=np.array(batch_row, np.int32),
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        seed=column("seed", np.uint64),
        total_len=column("total_len", np.int32),
        min_total_len=column("min_total_len", np.int32),
        stop_ids=[list(p.stop_ids) for p in params],
    )
    return [int(token) for token in sampled]


def run_rows(device: str, logits: Floats, params: Sequence[RowParams]) -> list[int]:
    """Samples with logits row = batch position = row."""
    order = range(len(params))
    return run_batch(device, logits, params, logits_batch=order, batch_row=order)


def make_logits(kind: str, vocab: int, seed: int) -> Floats:
    random = np.random.default_rng(seed)
    if kind == "normal":
        logits = random.normal(0, 3, vocab)
    elif kind == "peaked":
        logits = random.normal(0, 2, vocab)
        logits[random.integers(0, vocab, 5)] += 12
    elif kind == "ties":
        logits = random.integers(-3, 4, vocab).astype(np.float64)
    elif kind == "equal":
        logits = np.full(vocab, random.choice([0.0, -0.0, 7.25, -1e30]))
        logits[random.random(vocab) < 0.3] *= -1 if logits[0] == 0 else 1
    elif kind == "holes":
        logits = random.normal(0, 3, vocab)
        logits[random.random(vocab) < 0.7] = -INF
        logits[random.integers(vocab)] = 0
    elif kind == "one":
        logits = np.full(vocab, -INF)
        logits[random.integers(vocab)] = random.normal()
    elif kind == "bits":
        bits = random.integers(0, 2**32, vocab, dtype=np.uint32).view(np.float32)
        return np.where(np.isnan(bits), np.float32(0), bits)
    elif kind == "infinite":
        logits = random.normal(0, 3, vocab)
        logits[random.random(vocab) < 0.2] = INF
    else:
        # Weights on both sides of the smallest that is not 0.
        logits = random.uniform(-34, 0, vocab)
        logits[0] = 0
    return logits.astype(np.float32)


KINDS = ("normal", "peaked", "ties", "equal", "holes", "one", "bits", "infinite", "steep")


@st.composite
def row_params(draw: st.DrawFn, vocab: int) -> RowParams:
    near_vocab = st.integers(max(1, vocab - 1), vocab + 1)
    unit = st.floats(0.0, 1.0, width=32, exclude_min=True)
    return RowParams(
        temperature=draw(st.sampled_from([0.0, 0.6, 1.0, 1.0, 2.5, 1e-3, 1e-40, 50.0])),
        top_k=draw(st.one_of(st.just(0), st.integers(1, 40), near_vocab, st.just(2**31 - 1))),
        top_p=draw(st.one_of(st.just(1.0), unit, st.floats(0.5, 1.0, width=32))),
        min_p=draw(st.one_of(st.just(0.0), st.just(1.0), unit, st.just(2.0**-10))),
        seed=draw(st.integers(0, 2**64 - 1)),
        total_len=draw(st.integers(1, 2**20)),
        min_total_len=draw(st.sampled_from([0, 2**21])),
        stop_ids=tuple(draw(st.lists(st.integers(0, vocab - 1), max_size=5))),
    )


def check_draws(device: str, logits: Floats, params: RowParams, draws: int) -> None:
    """Many seeds over one row: a set that differs by one token moves some of the draws."""
    seeds = [(params.seed + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(draws)]
    rows = [dataclasses.replace(params, seed=seed) for seed in seeds]
    tokens = run_rows(device, np.tile(logits, (draws, 1)), rows)

    masked = reference.mask_stop_tokens(logits, params)
    if params.temperature == 0 or not np.any(masked > -INF):
        expected = [reference.sample_row(logits, params)] * draws
    else:
        expected = reference.draw(masked, params, seeds)
    assert tokens == expected


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
    stops = (1, 3, 3, 99, -7)  # ids outside the vocabulary are left alone
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
    alone = [run_rows(device, logits[i : i + 1], [params[i]])[0] for i in range(count)]

    # Spread the rows over a larger table, batch and logits matrix, in different orders.
    table_size, batch_size, num_logits = (count + data.draw(st.integers(0, 5)) for _ in range(3))
    rows = data.draw(st.permutations(range(table_size)))[:count]
    places = data.draw(st.permutations(range(batch_size)))[:count]
    lines = data.draw(st.permutations(range(num_logits)))[:count]
    table = [RowParams(temperature=1.0, seed=99)] * table_size
    batch_row = [NO_TOKEN] * batch_size
    logits_batch = [-1] * num_logits
    matrix = np.full((num_logits, vocab), NAN, np.float32)
    expected = [NO_TOKEN] * num_logits
    masked = data.draw(st.integers(0, count - 1))  # keeps its logits row, but its row is -1
    for i, (row, place, line) in enumerate(zip(rows, places, lines, strict=True)):
        table[row] = params[i]
        batch_row[place] = -1 if i == masked else row
        logits_batch[line] = place
        matrix[line] = logits[i]
        expected[line] = NO_TOKEN if i == masked else alone[i]
    tokens = run_batch(device, matrix, table, logits_batch=logits_batch, batch_row=batch_row)
    assert tokens == expected


def test_logits_rows_of_padding_get_no_token(device: str) -> None:
    logits = np.stack([make_logits("normal", 100, seed) for seed in range(3)])
    params = [RowParams(), RowParams()]
    tokens = run_batch(device, logits, params, logits_batch=[-1, 1, 2], batch_row=[0, 1, -1])
    assert tokens == [NO_TOKEN, int(np.argmax(logits[1])), NO_TOKEN]
    empty = np.zeros((0, 100), np.float32)
    assert run_batch(device, empty, params, logits_batch=[], batch_row=[1]) == []
    assert run_batch(device, empty, params, logits_batch=[], batch_row=[]) == []


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_place_is_drawn_as_by_a_row_that_is_longer(device: str, data: st.DataObject) -> None:
    """The rows of a request's drafts: each at its own position, with what applies there."""
    vocab = data.draw(st.sampled_from((7, 257, 4097)))
    count = data.draw(st.integers(1, 5))
    logits = np.stack([make_logits(KINDS[i], vocab, i) for i in range(count)])
    params = data.draw(row_params(vocab))
    # The length below which stop ids are masked lies among the places.
    params = dataclasses.replace(params, min_total_len=params.total_len + 2, stop_ids=(0, 1, 2))
    expected = [
        run_rows(
            device,
            logits[place : place + 1],
            [dataclasses.replace(params, total_len=params.total_len + place)],
        )[0]
        for place in range(count)
    ]
    places = list(range(count))
    got = run_batch(
        device, logits, [params], logits_batch=[0] * count, batch_row=[0], logits_place=places
    )
    assert got == expected


def test_draws_follow_the_distribution(device: str) -> None:
    """Chi-square over 20,000 draws of 20 tokens.

    With 19 degrees of freedom the statistic exceeds 58 with probability 8e-6, the rate of false
    alarms over the choice of seeds; the seeds here are fixed.
    """
    draws, vocab = 20_000, 20
    logits = np.linspace(-1.5, 1.5, vocab).astype(np.float32)
    rows = [RowParams(temperature=0.8, seed=i // 4, total_len=1 + i % 4) for i in range(draws)]
    tokens = run_rows(device, np.tile(logits, (draws, 1)), rows)
    exact = np.exp(logits.astype(np.float64) / 0.8)
    expected = draws * exact / exact.sum()
    counts = np.bincount(tokens, minlength=vocab)
    assert float(((counts - expected) ** 2 / expected).sum()) < 58.0


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
