# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The sampler once more, slow and obvious: whole sorts, exact integers, no shared code.

The rules are those of ``src/cpp/sampling/processors.h``.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
WEIGHT_BITS = 43
TILE = 1024
NO_TOKEN = -1
ERROR_TOKEN = -2


@dataclasses.dataclass(frozen=True)
class RowParams:
    """What the row table says about one row; defaults mean "off"."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    total_len: int = 1
    min_total_len: int = 0
    stop_ids: tuple[int, ...] = ()
    # Prompt, then outputs, total_len tokens in all; () if nothing asks for them.
    tokens: tuple[int, ...] = ()
    prompt_len: int = 0
    drafts: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] = ()  # () allows all
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: frozenset[int] | None = None  # ids that the grammar allows
    num_logprobs: int = -1


@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Logprobs of a token and of the most likely candidates; count -1: there are none."""

    token: int
    logprob: float
    rank: int
    count: int
    top_tokens: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


def fma32(a: Floats, b: Floats, c: Floats) -> Floats:
    """Multiply and add with one rounding, a * b + c.

    The product is exact in float64. The sum is rounded to odd there (53 bits), after which
    rounding to float32 (24 bits) gives the correctly rounded result. a * b must be finite.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = np.broadcast_to(c.astype(np.float64), product.shape)
    total = product + addend
    with np.errstate(invalid="ignore"):
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(np.int64).copy()
    inexact_even = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    away_from_zero = (error > 0) == (total > 0)
    bits += np.where(inexact_even, np.where(away_from_zero, 1, -1), 0)
    with np.errstate(over="ignore"):
        rounded: Floats = bits.view(np.float64).astype(np.float32)
    return rounded


def fixed_point_exp2(exponents: Floats) -> npt.NDArray[np.uint64]:
    """floor(2**43 * 2**(exponents + 1)) as integers, for float32 exponents <= -1."""

    def constant(text: str) -> Floats:
        return np.full(exponents.shape, np.float32(float.fromhex(text)))

    x = np.where(exponents > np.float32(-48), exponents, np.float32(-48))
    n = np.rint(x.astype(np.float64) + 1)  # of two that are as near the even one
    f = (x.astype(np.float64) + 1 - n).astype(np.float32)
    power = constant("0x1.41fbbcp-13")
    for coefficient in (
        "0x1.5f3e52p-10",
        "0x1.3b2d4cp-7",
        "0x1.c6aee8p-5",
        "0x1.ebfbdcp-3",
        "0x1.62e43p-1",
        "0x1p+0",
    ):
        power = fma32(power, f, constant(coefficient))
    scaled = np.floor(np.ldexp(power.astype(np.float64), n.astype(np.int64) + WEIGHT_BITS))
    result: npt.NDArray[np.uint64] = scaled.astype(np.uint64)
    return result


def weights(logits: Floats, temperature: float) -> npt.NDArray[np.uint64]:
    """Fixed-point weights of logits relative to their maximum; no NaN."""
    largest = np.max(logits)
    log2_e = float.fromhex("0x1.71547652b82fep+0")
    with np.errstate(all="ignore"):
        wide = np.float64(log2_e) / np.float64(np.float32(temperature))
        scale = np.float32(min(wide, float(np.finfo(np.float32).max)))
        distances = np.where(logits == largest, np.float32(0), logits - largest)
        exact = distances.astype(np.float64) * np.float64(scale)
        finite = np.where(exact > -1e6, distances, np.float32(0)).astype(np.float32)
        exponents = fma32(finite, np.full_like(finite, scale), np.full_like(finite, -1))
    exponents = np.where(exact > -1e6, exponents, np.float32(-np.inf)).astype(np.float32)
    return fixed_point_exp2(exponents)


def random_word(seed: int, position: int) -> int:
    """The first 64 bits of Philox4x32-10 with key `seed` at counter (position, 0, 0, 0)."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = position & mask, 0, 0, 0
    k0, k1 = seed & mask, seed >> 32
    for _ in range(10):
        p0 = 0xD2511F53 * c0
        p1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0 = (k0 + 0x9E3779B9) & mask
        k1 = (k1 + 0xBB67AE85) & mask
    return c1 << 32 | c0


def without(logits: Floats, ids: Iterable[int]) -> Floats:
    """The logits with those of some ids at -inf, which a NaN does not become."""
    result = logits.copy()
    for i in ids:
        if not np.isnan(result[i]):
            result[i] = -np.inf
    return result


def raw_logits(logits: Floats, params: RowParams) -> Floats:
    """What raw logprobs are about: the grammar's mask has been applied, and nothing else."""
    if params.grammar is None:
        return logits
    return without(logits, (i for i in range(logits.size) if i not in params.grammar))


def mask_stop_tokens(logits: Floats, params: RowParams) -> Floats:
    """Sets stop tokens to -inf below the row's least length, unless that leaves nothing."""
    if params.total_len >= params.min_total_len or not params.stop_ids:
        return logits
    masked = without(logits, params.stop_ids)
    return masked if np.any(masked > -np.inf) else logits


def penalise(logits: Floats, params: RowParams) -> Floats:
    """Repetition, then frequency, then presence, each in float32."""
    prompt, outputs = params.tokens[: params.prompt_len], params.tokens[params.prompt_len :]
    result = logits.copy()
    repetition = np.float32(params.repetition_penalty)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for token in {*prompt, *outputs}:
            logit = result[token]
            logit = logit / repetition if logit > 0 else logit * repetition
            count = outputs.count(token)
            if count > 0:
                frequency = np.array([-np.float32(params.frequency_penalty)], np.float32)
                times = np.array([count], np.float32)
                logit = fma32(frequency, times, np.array([logit], np.float32))[0]
                logit = logit - np.float32(params.presence_penalty)
            result[token] = logit
    return result


def banned_tokens(params: RowParams) -> list[int]:
    """The last tokens of bad words whose other tokens the outputs end with."""
    outputs = params.tokens[params.prompt_len :]
    banned = []
    for *start, last in params.bad_words:
        if len(start) <= len(outputs) and list(outputs[len(outputs) - len(start) :]) == start:
            banned.append(last)
    return banned


def edited_logits(raw: Floats, params: RowParams) -> Floats:
    """What is drawn from, of what raw_logits() gives."""
    logits = raw.copy()
    for i, bias in params.bias:
        logits[i] = logits[i] + np.float32(bias)
    if params.allowed:
        logits = without(logits, set(range(logits.size)) - set(params.allowed))
    logits = mask_stop_tokens(logits, params)
    logits = penalise(logits, params)
    return without(logits, banned_tokens(params))


def at_place(params: RowParams, place: int) -> RowParams:
    """The row once so many of its drafts are outputs."""
    return dataclasses.replace(
        params,
        tokens=params.tokens + params.drafts[:place] if params.tokens else (),
        total_len=params.total_len + place,
        drafts=(),
    )


def kept_set(
    logits: Floats, params: RowParams
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """The ids that may be drawn, ascending, and their weights. Sums are at most 2**63."""
    q = weights(logits, params.temperature)
    order = np.lexsort((np.arange(logits.size), -logits.astype(np.float64)))
    limit = max(1, _ceil_scaled(float(np.float32(params.min_p)), WEIGHT_BITS))
    kept = order[q[order] >= np.uint64(limit)]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    if np.float32(params.top_p) < 1:
        scaled = int(float(np.float32(params.top_p)) * 2.0**63)
        running = np.cumsum(q[kept])
        target = max(1, -(-scaled * int(running[-1]) // 2**63))
        kept = kept[: 1 + int(np.searchsorted(running, np.uint64(target)))]
    ids = np.sort(kept)
    return ids, q[ids]


def sample_row(logits: Floats, params: RowParams) -> int:
    """The token of one row."""
    return sample_seeds(logits, params, [params.seed])[0]


def sample_seeds(logits: Floats, params: RowParams, seeds: Sequence[int]) -> list[int]:
    """The token of one row for each of some seeds."""
    if np.any(np.isnan(logits)):
        return [ERROR_TOKEN] * len(seeds)
    logits = edited_logits(raw_logits(logits, params), params)
    if not np.any(logits > -np.inf):
        return [ERROR_TOKEN] * len(seeds)
    if not params.temperature > 0:
        return [int(np.argmax(logits))] * len(seeds)
    return draw(logits, params, seeds)


def fixed_point_log(total: int) -> float:
    """ln(total / 2**43), each step rounded as the sampler's."""

    def fma(a: float, b: float, c: float) -> float:
        return float(Fraction(a) * Fraction(b) + Fraction(c))

    m, k = float(total) / 2.0**WEIGHT_BITS, 0
    while m > float.fromhex("0x1.6a09e667f3bcdp+0"):
        m, k = m / 2, k + 1
    s = (m - 1) / (m + 1)
    series = 1 / 21
    for term in range(9, -1, -1):
        series = fma(series, s * s, 1 / (2 * term + 1))
    return fma(float(k), float.fromhex("0x1.62e42fefa39efp-1"), 2 * s * series)


def logprobs(raw: Floats, token: int, count: int) -> Logprobs:
    """The record of a token, or of ERROR_TOKEN, and of so many candidates."""
    if token < 0 or np.any(np.isnan(raw)) or not np.any(raw > -np.inf):
        return Logprobs(token, 0.0, 0, -1)
    log_total = fixed_point_log(sum(tile_masses(raw, 1.0)))
    wide = raw.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        values = np.where(raw == raw.max(), 0.0, wide - wide.max()) - log_total
        rounded = values.astype(np.float32)
    order = np.lexsort((np.arange(raw.size), -wide))[: min(count, raw.size)]
    return Logprobs(
        token=token,
        logprob=float(rounded[token]),
        rank=1 + int(np.sum(raw > raw[token])),
        count=len(order),
        top_tokens=tuple(order.tolist()),
        top_logprobs=tuple(rounded[order].tolist()),
    )


def narrows(logits: Floats, params: RowParams) -> bool:
    """Whether something may take tokens out of the set besides their own weight."""
    has_top_k = 0 < params.top_k < logits.size
    return has_top_k or params.min_p > 0 or bool(np.float32(params.top_p) < 1)


def draw(logits: Floats, params: RowParams, seeds: Sequence[int]) -> list[int]:
    """The token of each seed, from edited logits with something to draw."""
    words = [random_word(seed, params.total_len) for seed in seeds]
    if not narrows(logits, params):
        return draw_by_tiles(logits, params.temperature, words)
    ids, q = kept_set(logits, params)
    ends = np.cumsum(q)
    targets = np.array([word * int(ends[-1]) >> 64 for word in words], np.uint64)
    # The first whose running sum exceeds the target.
    tokens: list[int] = ids[np.searchsorted(ends, targets, side="right")].tolist()
    return tokens


def tile_masses(logits: Floats, temperature: float) -> list[int]:
    """The mass of each tile of 1,024 ids, in units of 2**-43 of the largest logit's weight."""
    starts = range(0, logits.size, TILE)
    maxima = np.array([np.max(logits[start : start + TILE]) for start in starts], np.float32)
    shares = weights(maxima, temperature)
    return [
        int(weights(logits[start : start + TILE], temperature).sum()) * int(share) >> WEIGHT_BITS
        for start, share in zip(starts, shares, strict=True)
    ]


def draw_by_tiles(logits: Floats, temperature: float, words: Sequence[int]) -> list[int]:
    """The token of each random word, drawn from a whole row."""
    masses = tile_masses(logits, temperature)
    ends = list(itertools.accumulate(masses))
    tokens = []
    for word in words:
        target = word * ends[-1] >> 64
        tile = bisect.bisect_right(ends, target)
        rest = target - (ends[tile] - masses[tile])
        inside = logits[tile * TILE : (tile + 1) * TILE]
        share = int(weights(np.array([logits.max(), inside.max()]), temperature)[1])
        running = itertools.accumulate(weights(inside, temperature).tolist())
        token = next(i for i, w in enumerate(running) if w * share >> WEIGHT_BITS > rest)
        tokens.append(tile * TILE + token)
    return tokens


def sample_rows(logits: Floats, params: Sequence[RowParams]) -> list[int]:
    """The token of each row of [rows, vocab] logits."""
    return [sample_row(row, row_params) for row, row_params in zip(logits, params, strict=True)]


def _ceil_scaled(value: float, bits: int) -> int:
    scaled = value * 2.0**bits
    return int(scaled) + (int(scaled) < scaled)
