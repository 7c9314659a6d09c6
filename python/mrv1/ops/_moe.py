# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The ops of a mixture of experts; see `mrv1.ops`."""

from __future__ import annotations

from typing import Any, Literal

from mrv1.ops._native import Array, PackedWeight, native


def moe_route(
    logits: Array,
    top_k: int,
    *,
    bias: Array | None = None,
    scores: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: bool = True,
    min_sum: float = 0.0,
    scale: float = 1.0,
    token_batch: Array | None = None,
    experts_out: Array | None = None,
    weights_out: Array | None = None,
    stream: object = None,
) -> tuple[Array, Array]:
    """Chooses the experts of each token, and their weights; returns (experts, weights).

    They are those of largest score + bias, by falling value, ties to lower experts, NaN below
    everything. Weights are the scores, without the bias: scale * score / max(sum, min_sum) with
    `renormalize`, else scale * score. A NaN among a token's logits makes its weights NaN. All
    devices give the same bits.

    Args:
        logits: float32 [..., E], E at most 1,024.
        top_k: Experts of a token, in [1, E].
        bias: float32 [E], or None (DeepSeek-V3's correction of the choice).
        scores: The softmax of a token's logits, or the sigmoid of each.
        renormalize: Whether a token's weights are divided by their sum.
        min_sum: What they are divided by at least.
        scale: Of the weights.
        token_batch: int32 [tokens], or None: tokens with -1 get experts -1 and weights 0.
        experts_out: int32 [..., top_k].
        weights_out: float32 [..., top_k].
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> experts, weights = ops.moe_route(np.float32([[0, 2, 1, 3]]), 2)
        >>> experts
        array([[3, 1]], dtype=int32)
    """
    pair: Any = native().moe_route(
        logits,
        top_k,
        bias,
        scores,
        renormalize,
        min_sum,
        scale,
        token_batch,
        experts_out,
        weights_out,
        stream,
    )
    return pair[0], pair[1]


def moe_experts(
    x: Array,
    experts: Array,
    weights: Array,
    gate_up: Array | PackedWeight,
    down: Array | PackedWeight,
    *,
    activation: Literal["silu", "gelu_tanh"] = "silu",
    first_expert: int = 0,
    out_dtype: str | None = None,
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """The weighted sum of the gated MLPs that each row goes through.

    out = sum over j of weights[j] * down_e (activation(gate_e x) * (up_e x)), e = experts[j]. Gate,
    up, their product and what comes of each down are rounded as by `linear`; the sum is made in
    float32, by ascending j, and rounded once.

    Args:
        x: [..., hidden].
        experts: int32 [..., top_k]. Those that gate_up does not have, such as -1, add nothing.
        weights: float32 [..., top_k].
        gate_up: [E, 2 * n, hidden] of x's dtype, gate over up; packed for this call if it lies on
            the CPU, or what `pack_linear` made of it.
        down: [E, hidden, n], likewise.
        activation: "silu" or "gelu_tanh".
        first_expert: The expert of the first matrices.
        out_dtype: "float32", or x's dtype, which is the default.
        out: As x.
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> x = np.ones((1, 4), np.float32)
        >>> chosen = np.int32([[1]]), np.float32([[1.0]])
        >>> gate_up, down = np.ones((2, 6, 4), np.float32), np.ones((2, 4, 3), np.float32)
        >>> ops.moe_experts(x, *chosen, gate_up, down).shape
        (1, 4)
    """
    return native().moe_experts(
        x, experts, weights, gate_up, down, activation, first_expert, out_dtype, out, stream
    )
