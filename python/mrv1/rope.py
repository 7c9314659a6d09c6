# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: what a config.json says about it, and the angles' frequencies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Final, Literal

import numpy as np

from mrv1.config_fields import Fields

RopeType = Literal["default", "linear", "llama3", "longrope"]

ROPE_TYPES: Final[tuple[RopeType, ...]] = ("default", "linear", "llama3", "longrope")
MAX_THETA: Final = 1e12
_MAX_FACTOR: Final = 1e6


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        type: "default" (Su et al. 2021, "RoFormer"), "linear" (frequencies divided by `factor`),
            "llama3" (frequencies scaled by wavelength, as published with Llama 3.1) or "longrope"
            (a factor for each frequency; Ding et al. 2024, "LongRoPE").
        theta: Base of the frequencies.
        factor: linear, llama3: by how much (low) frequencies are slowed down; 1 otherwise.
        low_freq_factor: llama3: wavelengths above original_max_position_embeddings divided by this
            are slowed down in full; 1 otherwise.
        high_freq_factor: llama3: wavelengths below original_max_position_embeddings divided by this
            are kept, and those between are interpolated; above low_freq_factor. 4 otherwise.
        original_max_position_embeddings: llama3, longrope: positions the model was trained with
            first; 0 otherwise.
        rotary_dim: Dimensions of a head that are rotated, the first ones; even. 0 for all.
        interleaved: Whether dimensions 2i and 2i + 1 turn together, not i and i + rotary_dim / 2.
        short_factors: longrope: a divisor for each frequency, rotary_dim / 2 of them, where no
            sequence exceeds original_max_position_embeddings.
        long_factors: longrope: the same where one may.
        attention_factor: longrope: factor of cosine and sine; 1 otherwise.
        max_length: Tokens that a sequence may have, by which longrope chooses; 0 if that is not
            decided yet, which counts as long.
    """

    type: RopeType
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    rotary_dim: int = 0
    interleaved: bool = False
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    max_length: int = 0


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequency of each pair of dimensions, [rotary_dim / 2] float32.

    frequency[i] = theta^(-2i / rotary_dim) (Su et al. 2021). "linear" divides all by `factor`.
    "llama3" divides frequencies whose wavelength exceeds original / low_freq_factor by `factor`,
    keeps those below original / high_freq_factor, and interpolates linearly in original /
    wavelength between them (the Llama 3.1 release). "longrope" divides each by its short or long
    factor.
    """
    dim = rope.rotary_dim or head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    periods = np.power(np.float32(rope.theta), exponents)
    if rope.type == "longrope":
        short = 0 < rope.max_length <= rope.original_max_position_embeddings
        factors = rope.short_factors if short else rope.long_factors
        periods = np.asarray(factors, np.float32) * periods
    frequencies: np.ndarray = (1.0 / periods).astype(np.float32)
    if rope.type == "linear":
        frequencies /= np.float32(rope.factor)
    if rope.type != "llama3":
        return frequencies
    turns = rope.original_max_position_embeddings * frequencies / (2.0 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    kept = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
    scaled: np.ndarray = ((1.0 - kept) / rope.factor + kept) * frequencies
    return scaled.astype(np.float32)


def read_rope(
    config: Fields,
    head_dim: int,
    max_positions: int,
    *,
    types: tuple[RopeType, ...] = ROPE_TYPES,
    aliases: Mapping[str, RopeType] | None = None,
    theta: float = 10000.0,
    partial: bool = False,
) -> RopeConfig:
    """Reads the rotary embedding, in the spelling of transformers 5 or the one before.

    Today: {"rope_parameters": {"rope_type", "rope_theta", ...}}. Before: "rope_theta" beside
    {"rope_scaling": {"rope_type" or "type", ...}}, with null for the default type.

    Args:
        config: The model's.
        head_dim: Width of a head.
        max_positions: The model's max_position_embeddings.
        types: Types that the family computes.
        aliases: Other names of types.
        theta: The family's default.
        partial: Whether the family can rotate a part of a head (partial_rotary_factor).
    """
    scaling = config.object("rope_scaling")
    parameters = config.object("rope_parameters")
    if scaling is not None and parameters is not None:
        raise config.error("rope_scaling", "absent where there are rope_parameters")
    theta = config.number("rope_theta", 1.0, MAX_THETA, default=theta)
    rope = scaling or parameters
    if rope is None:
        rope = Fields(config.path, {"rope_type": "default"}, "rope_parameters.")
    elif rope.has("rope_theta"):
        own_theta = rope.number("rope_theta", 1.0, MAX_THETA)
        if config.has("rope_theta") and own_theta != theta:
            raise rope.error("rope_theta", f"the same as the outer rope_theta = {theta:g}")
        theta = own_theta
    return read_rope_type(
        config, rope, theta, head_dim, max_positions, types=types, aliases=aliases, partial=partial
    )


def read_rope_type(
    config: Fields,
    rope: Fields,
    theta: float,
    head_dim: int,
    max_positions: int,
    *,
    types: tuple[RopeType, ...] = ROPE_TYPES,
    aliases: Mapping[str, RopeType] | None = None,
    partial: bool = False,
) -> RopeConfig:
    """Reads one object of rope parameters; arguments as those of `read_rope`."""
    name = "rope_type" if rope.has("rope_type") or not rope.has("type") else "type"
    spelled = rope.values.get(name)
    kind = (aliases or {}).get(spelled, spelled) if isinstance(spelled, str) else None
    if kind not in types:
        raise rope.error(name, f"one of {', '.join((*types, *(aliases or {})))}")
    result = RopeConfig(kind, theta, rotary_dim=_rotary_dim(config, rope, head_dim, partial))
    if kind == "default":
        return result
    if kind == "linear":
        return dataclasses.replace(result, factor=rope.number("factor", 1.0, _MAX_FACTOR))
    if kind == "longrope":
        return _read_longrope(config, rope, result, head_dim, max_positions)
    low = rope.number("low_freq_factor", 1e-3, 1e6)
    high = rope.number("high_freq_factor", 1e-3, 1e6)
    if high <= low:
        raise rope.error("high_freq_factor", f"above low_freq_factor = {low:g}")
    return dataclasses.replace(
        result,
        factor=rope.number("factor", 1.0, _MAX_FACTOR),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", 1, max_positions
        ),
    )


def _rotary_dim(config: Fields, rope: Fields, head_dim: int, partial: bool) -> int:
    """Returns the rotated dimensions; 0 for all."""
    # The inner field counts where both are there, as in transformers.
    share = 1.0
    for fields in (config, rope):
        if not fields.has("partial_rotary_factor"):
            continue
        share = fields.number("partial_rotary_factor", 0.0, 1.0)
        dim = int(head_dim * share)
        if not partial and share != 1.0:
            raise fields.error("partial_rotary_factor", "1: partial rotation is not supported")
        if dim < 2 or dim % 2:
            raise fields.error(
                "partial_rotary_factor",
                f"an even number of dimensions, times head_dim = {head_dim}",
            )
    return 0 if share == 1.0 else int(head_dim * share)


def _read_longrope(
    config: Fields, rope: Fields, result: RopeConfig, head_dim: int, max_positions: int
) -> RopeConfig:
    # Phi keeps the original length beside the parameters, transformers 5 writes both.
    name = "original_max_position_embeddings"
    original = (config if config.has(name) else rope).integer(name, 2, max_positions)
    if rope.integer(name, 1, max_positions, default=original) != original:
        raise rope.error(name, f"the same as the outer {name} = {original}")
    factor = rope.number("factor", 1e-3, _MAX_FACTOR, default=max_positions / original)
    # Ding et al. 2024, section 4: sqrt(1 + ln(factor) / ln(original length)).
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    count = (result.rotary_dim or head_dim) // 2
    return dataclasses.replace(
        result,
        original_max_position_embeddings=original,
        short_factors=rope.numbers("short_factor", count, 1e-3, _MAX_FACTOR),
        long_factors=rope.numbers("long_factor", count, 1e-3, _MAX_FACTOR),
        attention_factor=rope.number("attention_factor", 1e-3, 1e3, default=scale),
    )
