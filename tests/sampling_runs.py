# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Runs of a device's sampler beside the reference, and what to draw their rows from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

import reference_sampler as reference
from mrv1 import _core
from reference_sampler import NO_TOKEN, Logprobs, RowParams

Floats = npt.NDArray[np.float32]
INF = float("inf")
NAN = float("nan")
VOCABS = (1, 2, 3, 255, 256, 257, 999, 4097, 32_000)


@functools.cache
def open_device(kind: str) -> _core.Device:
    return _core.Device(kind, num_threads=2)


def make_spec(params: RowParams) -> _core.RowSpec:
    """All of a row's parameters but those that a call has beside its specs."""
    spec = _core.RowSpec()
    spec.token_ids, spec.prompt_len = list(params.tokens), params.prompt_len
    spec.min_tokens = max(0, params.min_total_len - params.prompt_len)
    for name in ("temperature", "top_k", "top_p", "min_p", "num_logprobs"):
        setattr(spec, name, getattr(params, name))
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        setattr(spec, name, getattr(params, name))
    spec.stop_ids = list(params.stop_ids)
    spec.logit_bias = list(params.bias)
    spec.allowed_token_ids = list(params.allowed)
    spec.bad_words = [list(word) for word in params.bad_words]
    return spec


def make_mask(params: RowParams, vocab: int) -> npt.NDArray[np.uint32] | None:
    """The grammar's mask as the device reads it; bits past the vocabulary are set."""
    if params.grammar is None:
        return None
    bits = np.ones(-(-vocab // 32) * 32, np.uint8)
    bits[:vocab] = 0
    bits[sorted(params.grammar)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def run_batch(
    device: str,
    logits: Floats,
    params: Sequence[RowParams],
    *,
    logits_batch: Sequence[int],
    batch_row: Sequence[int],
    logits_place: Sequence[int] | None = None,
    counted_len: Sequence[int] | None = None,
) -> tuple[list[int], list[Logprobs | None]]:
    """Samples a batch; `params` is the row table. Token and logprobs of each logits row."""
    specs: dict[RowParams, _core.RowSpec] = {}
    masks: dict[RowParams, npt.NDArray[np.uint32] | None] = {}
    plain = [dataclasses.replace(p, seed=0) for p in params]
    for p in plain:
        if p not in specs:
            specs[p], masks[p] = make_spec(p), make_mask(p, logits.shape[1])
    sampled, records = _core.sample(
        open_device(device),
        np.ascontiguousarray(logits, np.float32),
        [specs[p] for p in plain],
        logits_batch=np.array(logits_batch, np.int32),
        logits_place=np.array(logits_place or [0] * len(logits_batch), np.int32),
        batch_row=np.array(batch_row, np.int32),
        total_len=np.array([p.total_len for p in params], np.int32),
        seed=np.array([p.seed for p in params], np.uint64),
        drafts=[list(p.drafts) for p in params],
        grammar_masks=[masks[p] for p in plain],
        counted_len=None if counted_len is None else np.array(counted_len, np.int32),
    )
    return [int(token) for token in sampled], [read_record(record) for record in records]


def read_record(record: object) -> Logprobs | None:
    if record is None:
        return None
    token, logprob, rank, count, top_tokens, top_logprobs = record  # type: ignore[misc]
    return Logprobs(token, logprob, rank, count, tuple(top_tokens), tuple(top_logprobs))


def run_rows(device: str, logits: Floats, params: Sequence[RowParams]) -> list[int]:
    """Tokens, with logits row = batch position = row."""
    order = range(len(params))
    return run_batch(device, logits, params, logits_batch=order, batch_row=order)[0]


def run_places(
    device: str, logits: Floats, params: RowParams
) -> tuple[list[int], list[Logprobs | None]]:
    """Samples the places of one row, a logits row each."""
    count = len(logits)
    return run_batch(
        device,
        logits,
        [params],
        logits_batch=[0] * count,
        batch_row=[0],
        logits_place=range(count),
    )


def draw_places(
    device: str, logits: Floats, params: RowParams, seeds: Sequence[int]
) -> list[list[int]]:
    """The tokens that each seed draws at the places of one row, a logits row each."""
    count = len(logits)
    rows = [dataclasses.replace(params, seed=seed) for seed in seeds]
    tokens, _ = run_batch(
        device,
        np.tile(logits, (len(rows), 1)),
        rows,
        logits_batch=np.repeat(range(len(rows)), count).tolist(),
        batch_row=range(len(rows)),
        logits_place=list(range(count)) * len(rows),
    )
    return [tokens[i : i + count] for i in range(0, len(tokens), count)]


def check_draws(device: str, logits: Floats, params: RowParams, draws: int) -> None:
    """Many seeds over one row: a set that differs by one token moves some of the draws."""
    seeds = [(params.seed + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(draws)]
    rows = [dataclasses.replace(params, seed=seed) for seed in seeds]
    tokens = run_rows(device, np.tile(logits, (draws, 1)), rows)
    assert tokens == reference.sample_seeds(logits, params, seeds)


def spread_rows(
    data: st.DataObject, device: str, logits: Floats, params: Sequence[RowParams]
) -> tuple[list[int], list[int]]:
    """Tokens of rows alone, and of the same rows in a larger table, batch and logits matrix.

    There they stand in another order, with padding, and with one row that is masked.
    """
    count, vocab = logits.shape
    alone = [run_rows(device, logits[i : i + 1], [params[i]])[0] for i in range(count)]
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
    tokens, _ = run_batch(device, matrix, table, logits_batch=logits_batch, batch_row=batch_row)
    return tokens, expected


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


def raise_history(logits: Floats, params: RowParams) -> Floats:
    """The logits with those of the history and its drafts among the largest, so that they count."""
    raised = logits.copy()
    best = np.max(logits, where=logits < INF, initial=-1e30)
    for i, token in enumerate({*params.tokens, *params.drafts}):
        raised[token] = best + np.float32(0.75 * i)
    return raised


@st.composite
def row_params(draw: st.DrawFn, vocab: int) -> RowParams:
    """Parameters that need no history."""
    near_vocab = st.integers(max(1, vocab - 1), vocab + 1)
    unit = st.floats(0.0, 1.0, width=32, exclude_min=True)
    ids = st.integers(0, vocab - 1)
    return RowParams(
        temperature=draw(st.sampled_from([0.0, 0.6, 1.0, 1.0, 2.5, 1e-3, 1e-40, 50.0])),
        top_k=draw(st.one_of(st.just(0), st.integers(1, 40), near_vocab, st.just(2**31 - 1))),
        top_p=draw(st.one_of(st.just(1.0), unit, st.floats(0.5, 1.0, width=32))),
        min_p=draw(st.one_of(st.just(0.0), st.just(1.0), unit, st.just(2.0**-10))),
        seed=draw(st.integers(0, 2**64 - 1)),
        total_len=draw(st.integers(1, 2**20)),
        min_total_len=draw(st.sampled_from([0, 2**21])),
        stop_ids=tuple(draw(st.lists(ids, max_size=5, unique=True))),
    )


def few_ids(vocab: int) -> st.SearchStrategy[frozenset[int]]:
    """Ids that something is about: often a few, seldom all but a few."""
    ids = st.frozensets(st.integers(0, vocab - 1), min_size=1, max_size=6)
    return st.one_of(ids, ids, ids.map(lambda few: frozenset(range(vocab)) - few or few))


@st.composite
def edited_params(draw: st.DrawFn, vocab: int, max_drafts: int = 0) -> RowParams:
    """Parameters of every kind, with a history of few tokens, so that words occur and repeat."""
    pool = st.sampled_from(sorted(draw(st.sets(st.integers(0, vocab - 1), min_size=1, max_size=5))))
    prompt = draw(st.lists(pool, min_size=1, max_size=8))
    outputs = draw(st.lists(pool, max_size=12))
    drafts = draw(st.lists(pool, min_size=max_drafts, max_size=max_drafts))
    words = st.lists(pool, min_size=1, max_size=3).map(tuple)
    biases = st.floats(-100, 100, width=32)
    total_len = len(prompt) + len(outputs)
    often = draw(st.lists(st.booleans(), min_size=5, max_size=5))
    seldom = draw(st.lists(st.integers(0, 3), min_size=2, max_size=2))
    penalty = st.one_of(st.sampled_from([-2.0, 0.5, 2.0]), st.floats(-2.0, 2.0, width=32))
    params = draw(row_params(vocab))
    if draw(st.integers(0, 3)) > 0:
        # Filters leave few tokens: without them every edit moves some of the draws.
        off = RowParams(seed=params.seed, stop_ids=params.stop_ids)
        params = dataclasses.replace(off, temperature=draw(st.sampled_from([0.0, 1.0, 5.0, 20.0])))
    return dataclasses.replace(
        params,
        tokens=(*prompt, *outputs),
        prompt_len=len(prompt),
        drafts=tuple(drafts),
        total_len=total_len,
        min_total_len=draw(st.sampled_from([0, total_len, total_len + 1, 2**20])),
        presence_penalty=draw(penalty) if often[0] else 0.0,
        frequency_penalty=draw(penalty) if often[1] else 0.0,
        repetition_penalty=draw(st.floats(0.125, 8.0, width=32)) if often[2] else 1.0,
        bias=tuple(draw(st.dictionaries(pool, biases, max_size=3)).items()) if often[3] else (),
        allowed=tuple(sorted(draw(few_ids(vocab)))) if seldom[0] == 3 else (),
        grammar=draw(few_ids(vocab)) if seldom[1] == 3 else None,
        bad_words=tuple(draw(st.lists(words, max_size=3))),
        num_logprobs=draw(st.integers(0, 5)) if often[4] else -1,
    )
