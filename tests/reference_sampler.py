# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The sampler once more, slow and obvious: whole sorts, exact integers, no shared code.

The rules are those of ``src/cpp/sampling/processors.h``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
WEIGHT_BITS = 43
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


def fma32(a: Floats, b: Floats, c: Floats) -> Floats:
    """Multiply and add with one rounding, a * b + c.

    The product is exact in float64. The sum is rounded to odd there (53 bits), after which
    rounding to float32 (24 bits) gives the correctly rounded result.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = np.broadcast_to(c.astype(np.float64), product.shape)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(np.int64).copy()
    inexact_even = (error != 0) & (bits & 1 == 0)
    away_from_zero = (error > 0) == (total > 0)
    bits += np.where(inexact_even, np.where(away_from_zero, 1, -1), 0)
    rounded: Floats = bits.view(np.float64).astype(np.float32)
    return rounded


def fixed_point_exp(exponents: Floats) -> npt.NDArray[np.uint64]:
    """exp(exponents) * 2**43 as integers, for float32 exponents <= 0."""

    def constant(text: str) -> Floats:
        return np.full(exponents.shape, np.float32(float.fromhex(text)))

    x = np.where(exponents > np.float32(-32), exponents, np.float32(-32))
    rounder = constant("0x1.8p+23")
    n = fma32(x, constant("0x1.715476p+0"), rounder) - rounder
    r = fma32(n, -constant("0x1.62e4p-1"), x)
    r = fma32(n, -constant("0x1.7f7d1cp-20"), r)
    series = constant("0x1.6a23d0p-10")
    for coefficient in ("0x1.123a20p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2"):
        series = fma32(series, r, constant(coefficient))
    fraction = fma32(r * r, series, r) * np.float32(2**26)
    mantissa = (2**26 + fraction.astype(np.int64)).astype(np.uint64)
    shift = (-n.astype(np.int64)).astype(np.uint64)
    result: npt.NDArray[np.uint64] = (mantissa << np.uint64(WEIGHT_BITS - 26)) >> shift
    return result


def weights(logits: Floats, temperature: float) -> npt.NDArray[np.uint64]:
    """Fixed-point weights of a row without NaN whose maximum is above -inf."""
    largest = np.max(logits)
    with np.errstate(all="ignore"):
        wide = 1.0 / float(np.float32(temperature))
        inverse = np.float32(min(wide, float(np.finfo(np.float32).max)))
        exponents = (logits - largest) * inverse
    exponents = np.where(logits == largest, np.float32(0), exponents).astype(np.float32)
    exponents = np.where(np.isnan(exponents), np.float32(-np.inf), exponents)
    return fixed_point_exp(exponents)


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


def mask_stop_tokens(logits: Floats, params: RowParams) -> Floats:
    """Sets stop tokens to -inf below the row's least length, unless that leaves nothing."""
    stops = sorted({i for i in params.stop_ids if 0 <= i < logits.size})
    if params.total_len >= params.min_total_len or not stops:
        return logits
    masked: Floats = logits.copy()
    masked[stops] = -np.inf
    if not np.any(masked > -np.inf):
        return logits
    return masked


def kept_set(logits: Floats, params: RowParams) -> tuple[npt.NDArray[np.int64], list[int]]:
    """The ids that may be drawn, ascending, and their integer weights."""
    q = [int(w) for w in weights(logits, params.temperature)]
    order = np.lexsort((np.arange(logits.size), -logits.astype(np.float64))).tolist()
    limit = max(1, _ceil_scaled(float(np.float32(params.min_p)), WEIGHT_BITS))
    kept = [i for i in order if q[i] >= limit]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    if np.float32(params.top_p) < 1:
        scaled = int(float(np.float32(params.top_p)) * 2.0**63)
        total = sum(q[i] for i in kept)
        target = max(1, -(-scaled * total // 2**63))
        running = 0
        for length, token in enumerate(kept, start=1):
            running += q[token]
            if running >= target:
                kept = kept[:length]
                break
    ids = np.sort(np.array(kept, dtype=np.int64))
    return ids, [q[i] for i in ids]


def sample_row(logits: Floats, params: RowParams) -> int:
    """The token of one row."""
    if np.any(np.isnan(logits)):
        return ERROR_TOKEN
    logits = mask_stop_tokens(logits, params)
    if not np.any(logits > -np.inf):
        return ERROR_TOKEN
    if not params.temperature > 0:
        return int(np.argmax(logits))
    ids, q = kept_set(logits, params)
    target = random_word(params.seed, params.total_len) * sum(q) >> 64
    for token, weight in zip(ids.tolist(), q, strict=True):
        if target < weight:
            return int(token)
        target -= weight
    raise AssertionError("the target lies below the sum of weights")


def sample_rows(logits: Floats, params: Sequence[RowParams]) -> list[int]:
    """The token of each row of [rows, vocab] logits."""
    return [sample_row(row, row_params) for row, row_params in zip(logits, params, strict=True)]


def _ceil_scaled(value: float, bits: int) -> int:
    scaled = value * 2.0**bits
    return int(scaled) + (int(scaled) < scaled)
