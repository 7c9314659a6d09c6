# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Single ops on arrays of NumPy, torch, CuPy, JAX and whatever else has `__dlpack__`.

    y = mrv1.ops.rms_norm(x, weight, eps=1e-6)  # in memory of the CPU or of a GPU, as x is

These are the kernels that models run on, called through the same table. docs/ops.md has the rules
that hold for all of them: arrays, outputs, streams, errors. In the docstrings T counts tokens, B
requests, H query heads, K key/value heads, D head_dim; `Array` is any such array. Floats are
float32 or bfloat16, one of them within a call; all arithmetic is in float32 and a result is rounded
once. Every function raises InvalidArgumentError, naming op and argument, for what does not fit, and
has then launched nothing; DeviceError if the GPU refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mrv1 import _core
from mrv1.errors import InvalidArgumentError
from mrv1.ops._moe import moe_experts, moe_route
from mrv1.ops._native import Array, PackedWeight, set_num_threads
from mrv1.ops._native import native as _ops

__all__ = [
    "Array",
    "BatchParams",
    "PackedWeight",
    "PlannedAttention",
    "add",
    "add_rms_norm",
    "cache_write",
    "copy_blocks",
    "embedding",
    "gather_blocks",
    "gather_rows",
    "gelu_mul",
    "infer_params",
    "linear",
    "moe_experts",
    "moe_route",
    "ngram_propose",
    "pack_linear",
    "paged_attention",
    "plan_attention",
    "qk_norm",
    "qkv_prepare",
    "reshape_and_cache_flash",
    "rms_norm",
    "rope",
    "sample",
    "set_num_threads",
    "silu_mul",
    "slot_mapping",
    "soft_cap",
    "swap_blocks",
    "zero_blocks",
]

PlannedAttention = _core.PlannedAttention


class BatchParams(NamedTuple):
    """What kernels read about a batch; all int32.

    Attributes:
        positions: [T], of each token in its request.
        token_batch: [T], the request of a token; -1 for padding.
        slot_mapping: [T], as `slot_mapping` gives them; -1 writes nothing.
        row: [B], the request's own index; -1 where its length is 0.
        counts: [6]: requests, tokens, 0, those with at most one token before the first with more,
            the other requests, 0.
    """

    positions: Array
    token_batch: Array
    slot_mapping: Array
    row: Array
    counts: Array


def embedding(
    token_ids: Array,
    table: Array,
    *,
    scale: float = 1.0,
    dtype: str | None = None,
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """Rows of a table: out[t] = scale * table[token_ids[t]].

    Args:
        token_ids: int32 [T]; -1 gives a zero row.
        table: [vocab, cols].
        scale: Of the rows, multiplied in float32.
        dtype: Of the result, "float32" or "bfloat16"; the table's if None.
        out: [T, cols].
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> ops.embedding(np.int32([2, 0]), np.eye(3, dtype=np.float32))
    """
    return _ops().embedding(token_ids, table, scale, dtype, out, stream)


def rms_norm(
    x: Array, weight: Array, eps: float = 1e-6, *, out: Array | None = None, stream: object = None
) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight by row (Zhang & Sennrich 2019, as Llama uses it).

    Args:
        x: [..., cols].
        weight: float32 [cols].
        eps: Added to the mean.
        out: As x; may be x.
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> ops.rms_norm(np.ones((2, 8), np.float32), np.ones(8, np.float32))
    """
    return _ops().rms_norm(x, weight, eps, out, stream)


def add(a: Array, b: Array, *, out: Array | None = None, stream: object = None) -> Array:
    """a + b by element.

    Args:
        a: [..., cols].
        b: As a.
        out: As a; may be a or b.
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> ops.add(np.ones((2, 8), np.float32), np.ones((2, 8), np.float32))
    """
    return _ops().add(a, b, out, stream)


def add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    out: Array | None = None,
    sum_out: Array | None = None,
    stream: object = None,
) -> tuple[Array, Array]:
    """`add` and `rms_norm` of the sum in one kernel, with the same bits; returns (norm, sum).

    Args:
        x: [..., cols].
        residual: As x.
        weight: float32 [cols].
        eps: Added to the mean.
        out: Of the norm, as x; may be x or residual.
        sum_out: Of the sum, as x; may be the other of them.
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> x = np.ones((2, 8), np.float32)
        >>> normed, residual = ops.add_rms_norm(x, x.copy(), np.ones(8, np.float32))
    """
    pair: Any = _ops().add_rms_norm(x, residual, weight, eps, out, sum_out, stream)
    return pair[0], pair[1]


def silu_mul(x: Array, *, out: Array | None = None, stream: object = None) -> Array:
    """silu(gate) * up of rows [gate | up], silu(v) = v / (1 + exp(-v)).

    Args:
        x: [..., 2 * cols].
        out: [..., cols].
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> ops.silu_mul(np.ones((2, 8), np.float32)).shape
        (2, 4)
    """
    return _ops().gated_mul(x, "silu", out, stream)


def gelu_mul(x: Array, *, out: Array | None = None, stream: object = None) -> Array:
    """gelu(gate) * up of rows [gate | up]; GELU by tanh (Hendrycks & Gimelshein 2016).

    Args:
        x: [..., 2 * cols].
        out: [..., cols].
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> ops.gelu_mul(np.ones((2, 8), np.float32)).shape
        (2, 4)
    """
    return _ops().gated_mul(x, "gelu_tanh", out, stream)


def soft_cap(x: Array, cap: float, *, out: Array | None = None, stream: object = None) -> Array:
    """cap * tanh(x / cap) by element (Gemma 2).

    Args:
        x: float32 [..., cols].
        cap: Positive.
        out: As x; may be x.
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> ops.soft_cap(np.float32([[100.0]]), 30.0)
    """
    return _ops().soft_cap(x, cap, out, stream)


def gather_rows(
    x: Array, indices: Array, *, out: Array | None = None, stream: object = None
) -> Array:
    """out[l] = x[indices[l]].

    Args:
        x: [rows, cols].
        indices: int32 [L], each in [0, rows).
        out: [L, cols].
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> ops.gather_rows(np.eye(3, dtype=np.float32), np.int32([2, 2]))
    """
    return _ops().gather_rows(x, indices, out, stream)


def pack_linear(weight: Array, *, stream: object = None) -> PackedWeight:
    """Brings a weight into the layout that `linear` reads, for as many calls as one likes.

    On the CPU this is a copy, in panels of 16 rows. On a GPU `linear` reads rows as they lie: the
    result stands for the array itself, and keeps it.

    Args:
        weight: [out, in], or for `moe_experts` [matrices, out, in].
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> packed = ops.pack_linear(np.ones((16, 8), np.float32))
    """
    return _ops().pack_linear(weight, stream)


def linear(
    x: Array,
    weight: Array | PackedWeight,
    bias: Array | None = None,
    *,
    residual: Array | None = None,
    activation: str | None = None,
    out_dtype: str | None = None,
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """x weight^T (+ bias) (+ residual).

    The residual is added to the rounded product, as `add` does. With an activation the weight
    stacks gate over up, and the result is activation(gate) * up of the two rounded products, with
    the bits of `silu_mul` or `gelu_mul`.

    Args:
        x: [..., in].
        weight: [out, in] of x's dtype, packed for this call if it lies on the CPU; or what
            `pack_linear` made of it.
        bias: float32 [out], added before the product is rounded.
        residual: As the result; may be `out`.
        activation: None, "silu" or "gelu_tanh"; out must then be a multiple of 32.
        out_dtype: "float32", or x's dtype, which is the default.
        out: [..., out], or [..., out / 2] with an activation.
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> ops.linear(np.ones((2, 8), np.float32), np.ones((16, 8), np.float32))
    """
    return _ops().linear(x, weight, bias, residual, activation, out_dtype, out, stream)


def qk_norm(
    qkv: Array,
    q_norm: Array,
    k_norm: Array,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float = 1e-6,
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """`rms_norm` of each q head and each k head; v heads pass through.

    Args:
        qkv: [T, (H + 2 K) D]: q heads, k heads, v heads.
        q_norm: float32 [D].
        k_norm: float32 [D].
        num_heads: H.
        num_kv_heads: K.
        eps: Added to the mean.
        out: As qkv; may be qkv.
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> one = np.ones(8, np.float32)
        >>> ops.qk_norm(np.ones((1, 24), np.float32), one, one, num_heads=1, num_kv_heads=1)
    """
    return _ops().qkv_prepare(
        "qk_norm", qkv, num_heads, num_kv_heads, q_norm, k_norm, eps, out=out, stream=stream
    )


def rope(
    qkv: Array,
    cos_sin: Array,
    positions: Array,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """Turns q and k heads by the angles of their positions (Su et al. 2021).

    Elements a, b of pair i become a c[i] - b s[i] and b c[i] + a s[i]; the pair is (i, i + pairs),
    or (2 i, 2 i + 1) if interleaved. What is beyond 2 * pairs in a head passes through.

    Args:
        qkv: [T, (H + 2 K) D].
        cos_sin: float32 [max_position, 2 * pairs]: cosines, then sines.
        positions: int32 [T], each in [0, max_position).
        num_heads: H.
        num_kv_heads: K.
        interleaved: How elements pair up.
        out: As qkv; may be qkv.
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> table = np.tile(np.float32([1, 1, 0, 0]), (4, 1))  # turns nothing
        >>> ops.rope(np.ones((1, 24), np.float32), table, np.int32([3]), num_heads=1,
        ...          num_kv_heads=1)
    """
    return _ops().qkv_prepare(
        "rope",
        qkv,
        num_heads,
        num_kv_heads,
        cos_sin=cos_sin,
        positions=positions,
        interleaved=interleaved,
        out=out,
        stream=stream,
    )


def cache_write(
    qkv: Array,
    key_cache: Array,
    value_cache: Array,
    slot_mapping: Array,
    *,
    num_heads: int,
    kv_cache_dtype: str = "auto",
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    stream: object = None,
) -> None:
    """Writes the k and v heads of packed rows into a paged cache.

    Args:
        qkv: [T, (H + 2 K) D], float16 too.
        key_cache: As of `reshape_and_cache_flash`.
        value_cache: As key_cache.
        slot_mapping: [T] or fewer, as there.
        num_heads: H.
        kv_cache_dtype: As there, as are the next two.
        k_scale: As there.
        v_scale: As there.
        stream: Where it runs on a GPU; docs/ops.md has the default.
    """
    _ops().cache_write(
        qkv,
        num_heads,
        key_cache.shape[2],
        key_cache,
        value_cache,
        slot_mapping,
        kv_cache_dtype,
        k_scale,
        v_scale,
        stream,
    )


def qkv_prepare(
    qkv: Array,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Array | None = None,
    k_norm: Array | None = None,
    eps: float = 1e-6,
    cos_sin: Array | None = None,
    positions: Array | None = None,
    interleaved: bool = False,
    key_cache: Array | None = None,
    value_cache: Array | None = None,
    slot_mapping: Array | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """`qk_norm`, `rope` and `cache_write` in one kernel, each if its arrays are given.

    The result, the cache and its scales have the bits of the parts one after the other.

    Args:
        qkv: [T, (H + 2 K) D].
        num_heads: H.
        num_kv_heads: K.
        q_norm: As of `qk_norm`, with k_norm.
        k_norm: As q_norm.
        eps: As of `qk_norm`.
        cos_sin: As of `rope`, with positions.
        positions: As of `rope`.
        interleaved: As of `rope`.
        key_cache: As of `reshape_and_cache_flash`, with value_cache and slot_mapping.
        value_cache: As key_cache.
        slot_mapping: [T], as there.
        kv_cache_dtype: As there, as are the next two.
        k_scale: As there.
        v_scale: As there.
        out: As qkv; may be qkv.
        stream: Where it runs on a GPU; docs/ops.md has the default.
    """
    return _ops().qkv_prepare(
        "qkv_prepare",
        qkv,
        num_heads,
        num_kv_heads,
        q_norm,
        k_norm,
        eps,
        cos_sin,
        positions,
        interleaved,
        key_cache,
        value_cache,
        slot_mapping,
        kv_cache_dtype,
        k_scale,
        v_scale,
        out,
        stream,
    )


def reshape_and_cache_flash(
    key: Array,
    value: Array,
    key_cache: Array,
    value_cache: Array,
    slot_mapping: Array,
    kv_cache_dtype: str = "auto",
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    *,
    stream: object = None,
) -> None:
    """Writes keys and values into a paged cache: token t goes to slot slot_mapping[t].

    Slot s is token s % block_size of block s // block_size; -1 writes nothing. A cache of key's
    dtype gets the same bits. An FP8 cache (Micikevicius et al. 2022: E4M3 without infinity, or
    E5M2) gets the codes of value * (1 / scale) in float32, rounded to nearest even; what is out of
    range, infinite too, becomes the largest value, and NaN the code 0x7f.

    Args:
        key: [T, K, D] of float32, bfloat16 or float16; the heads of a token are contiguous, tokens
            may be any distance apart.
        value: As key, with a distance of its own.
        key_cache: [blocks, block_size, K, D] by shape. Blocks, tokens and heads may lie in any
            order (NHD or HND) by positive strides, of which each is past all that smaller ones
            reach; the last stride is 1.
        value_cache: As key_cache, with the same strides; the two share no element, but may be
            packed into one array.
        slot_mapping: int32 or int64 [T] or fewer, in [-1, blocks * block_size), no slot twice;
            tokens beyond its end are not written.
        kv_cache_dtype: "fp8_e4m3" or "fp8_e5m2" say what a cache of uint8 holds; "auto" takes the
            cache's dtype, which may be one of FP8 itself.
        k_scale: For an FP8 cache, float32: one for all keys, [] or [1]; one a head, [K]; or one for
            each token and head, [blocks, block_size, K] with positive strides. The first two are
            read, finite and at least 2**-126. The last is written, for each slot that is: the
            largest finite magnitude of the head, divided by that of the format (448 or 57,344),
            and at least 2**-126.
        v_scale: As k_scale, of values.
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> cache = np.zeros((2, 4, 2, 8), np.float32)
        >>> key = np.ones((3, 2, 8), np.float32)
        >>> ops.reshape_and_cache_flash(key, key, cache, cache.copy(), np.int32([4, -1, 5]))
    """
    _ops().reshape_and_cache_flash(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        kv_cache_dtype,
        k_scale,
        v_scale,
        stream,
    )


def slot_mapping(
    block_table: Array,
    positions: Array,
    query_start_loc: Array,
    block_size: int,
    *,
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """Slots of tokens: block_table[b, p // block_size] * block_size + p % block_size, int32 [T].

    -1 for tokens of no request and where the table holds block 0, the null block.

    Args:
        block_table: int32 [B, max_blocks].
        positions: int32 [T].
        query_start_loc: int32 [B + 1]: request b has tokens [b] to [b + 1]; begins at 0.
        block_size: Tokens of a block.
        out: int32 [T].
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> ops.slot_mapping(np.int32([[3]]), np.int32([0, 1]), np.int32([0, 2]), 4)
        array([12, 13], dtype=int32)
    """
    return _ops().slot_mapping(block_table, positions, query_start_loc, block_size, out, stream)


def infer_params(
    query_start_loc: Array,
    seq_lens: Array,
    block_table: Array,
    block_size: int,
    *,
    num_tokens: int,
    stream: object = None,
) -> BatchParams:
    """Works out from the lengths of requests what kernels read about each token.

    Request b has the tokens query_start_loc[b] to query_start_loc[b + 1], the last ones of the
    seq_lens[b] that it has: token t stands at seq_lens[b] - query_start_loc[b + 1] + t. Tokens of
    no request, and of one of length 0, are padding: token_batch -1, position 0, slot -1.

    Args:
        query_start_loc: int32 [B + 1], not decreasing, from 0 to at most num_tokens.
        seq_lens: int32 [B], tokens in the cache once those of this batch are there; 0 masks a
            request.
        block_table: int32 [B, max_blocks]. Block 0 is the null block: its tokens have slot -1, as
            have those beyond the table.
        block_size: Tokens of a block.
        num_tokens: Of the batch, padding included.
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> ops.infer_params(
        ...     np.int32([0, 2]), np.int32([5]), np.int32([[3, 7]]), 4, num_tokens=3
        ... ).slot_mapping
        array([15, 28, -1], dtype=int32)
    """
    arrays = _ops().infer_params(
        query_start_loc, seq_lens, block_table, num_tokens, block_size, stream
    )
    return BatchParams(*arrays)


def plan_attention(
    query_start_loc: Array,
    seq_lens: Array,
    block_table: Array,
    *,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_blocks: int,
    dtype: str,
    window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    stream: object = None,
) -> PlannedAttention:
    """Divides the attention of a batch over the device, for all layers of one geometry.

    The plan holds copies of the arrays. Calls that use it run in one stream, the plan's.

    Args:
        query_start_loc: As of `paged_attention`, as are the next two.
        seq_lens: As there.
        block_table: As there.
        num_tokens: T.
        num_heads: H.
        num_kv_heads: K.
        head_dim: D.
        block_size: Of the cache.
        num_blocks: Of the cache.
        dtype: Of q: "float32", "bfloat16" or "float16".
        window: As of `paged_attention`.
        softcap: As there.
        kv_cache_dtype: "auto" is dtype; else "fp8_e4m3" or "fp8_e5m2".
        stream: Where it runs on a GPU; docs/ops.md has the default.
    """
    return _ops().plan_attention(
        query_start_loc,
        seq_lens,
        block_table,
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        num_blocks,
        dtype,
        window,
        softcap,
        kv_cache_dtype,
        stream,
    )


def paged_attention(
    q: Array,
    key_cache: Array,
    value_cache: Array,
    block_table: Array | None = None,
    seq_lens: Array | None = None,
    query_start_loc: Array | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    plan: PlannedAttention | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """Causal attention over a paged cache, for decode and prefill rows alike; [T, H, D].

    Request b has tokens query_start_loc[b] to query_start_loc[b + 1] of q, the last of its
    seq_lens[b], whose keys and values are all in the cache. Query head h reads head h // (H / K).
    A score is scale * q k, with a soft cap softcap * tanh(score / softcap); softmax in float32.
    Tokens of no request, or of one with seq_len 0, give zero rows.

    Args:
        q: [T, H, D], float16 too; the heads of a token are contiguous, tokens may be any distance
            apart.
        key_cache: [blocks, block_size, K, D], as of `reshape_and_cache_flash`.
        value_cache: As key_cache.
        block_table: int32 [B, max_blocks].
        seq_lens: int32 [B].
        query_start_loc: int32 [B + 1], beginning at 0.
        scale: Of the scores; 1 / sqrt(D) if None.
        window: How many positions a token sees, its own included; 0 is no limit.
        softcap: 0 is none.
        plan: Instead of the three arrays: what `plan_attention` made of them.
        kv_cache_dtype: As of `reshape_and_cache_flash`, as are the next two.
        k_scale: As there.
        v_scale: As there.
        out: [T, H, D], contiguous.
        stream: Where it runs on a GPU; docs/ops.md has the default.
    """
    if scale is None:
        scale = float(q.shape[-1]) ** -0.5
    return _ops().paged_attention(
        q,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        query_start_loc,
        scale,
        window,
        softcap,
        plan,
        kv_cache_dtype,
        k_scale,
        v_scale,
        out,
        stream,
    )


def copy_blocks(
    key_cache: Array,
    value_cache: Array,
    block_mapping: Sequence[tuple[int, int]],
    *,
    kv_cache_dtype: str = "auto",
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    stream: object = None,
) -> None:
    """Copies whole blocks of a cache: block target becomes what block source is, byte by byte.

    Args:
        key_cache: As of `reshape_and_cache_flash`, as are those without a text here. Scales of
            tokens are part of a block; those of a tensor or of heads stay as they are.
        value_cache: As there.
        block_mapping: Pairs (source, target) in [1, blocks); a target is in no other pair.
        kv_cache_dtype: As there.
        k_scale: As there.
        v_scale: As there.
        stream: Where it runs on a GPU; docs/ops.md has the default.
    """
    _ops().copy_blocks(
        key_cache, value_cache, list(block_mapping), kv_cache_dtype, k_scale, v_scale, stream
    )


def zero_blocks(
    key_cache: Array,
    value_cache: Array,
    block_ids: Sequence[int],
    *,
    kv_cache_dtype: str = "auto",
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    stream: object = None,
) -> None:
    """Makes keys, values and scales of tokens of whole blocks 0, all bits.

    Args:
        key_cache: As of `copy_blocks`, as are those without a text here.
        value_cache: As there.
        block_ids: In [0, blocks).
        kv_cache_dtype: As there.
        k_scale: As there.
        v_scale: As there.
        stream: Where it runs on a GPU; docs/ops.md has the default.
    """
    _ops().zero_blocks(
        key_cache, value_cache, list(block_ids), kv_cache_dtype, k_scale, v_scale, stream
    )


def gather_blocks(
    key_cache: Array,
    value_cache: Array,
    block_ids: Array,
    *,
    num_tokens: int | None = None,
    dtype: str | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    key_out: Array | None = None,
    value_out: Array | None = None,
    stream: object = None,
) -> tuple[Array, Array]:
    """Copies the tokens of blocks into contiguous keys and values, [num_tokens, K, D] each.

    Token t is place t % block_size of block block_ids[t // block_size]. Elements of an FP8 cache
    become code * scale, in float32 and then rounded to `dtype`.

    Args:
        key_cache: As of `reshape_and_cache_flash`, as are those without a text here.
        value_cache: As there.
        block_ids: int32 [n] in [0, blocks); a block may be named several times.
        num_tokens: At most n * block_size, which None stands for.
        dtype: "float32", "bfloat16" or "float16"; None keeps that of the cache, but not FP8.
        kv_cache_dtype: As there.
        k_scale: As there.
        v_scale: As there.
        key_out: [num_tokens, K, D] of the dtype, contiguous.
        value_out: As key_out.
        stream: Where it runs on a GPU; docs/ops.md has the default.
    """
    if num_tokens is not None and num_tokens < 0:
        raise InvalidArgumentError(field="num_tokens", value=num_tokens, allowed="not negative")
    keys, values = _ops().gather_blocks(
        key_cache,
        value_cache,
        block_ids,
        -1 if num_tokens is None else num_tokens,
        "" if dtype is None else dtype,
        kv_cache_dtype,
        k_scale,
        v_scale,
        key_out,
        value_out,
        stream,
    )
    return keys, values


def swap_blocks(
    source: Array,
    target: Array,
    block_mapping: Sequence[tuple[int, int]],
    *,
    stream: object = None,
) -> None:
    """Copies blocks between two arrays, as to move them out of a GPU's memory and back.

    One call is for one array of a cache: keys, values, or the scales of either. On a GPU, either
    array may be memory of the host that the GPU addresses: `mrv1.memory.pinned(...).device()`. The
    copy then runs in `stream` while the host goes on; `PinnedArray.fence(stream)` marks its end.

    Args:
        source: [blocks, ...] of any dtype; the elements of a block are contiguous.
        target: The same dtype and shape of a block; it shares no element with source.
        block_mapping: Pairs (block of source, block of target); each target once.
        stream: Where it runs on a GPU; docs/ops.md has the default.
    """
    _ops().swap_blocks(source, target, list(block_mapping), stream)


def sample(
    logits: Array,
    *,
    temperature: float | Array = 1.0,
    top_k: int | Array = 0,
    top_p: float | Array = 1.0,
    min_p: float | Array = 0.0,
    seed: int | Array = 0,
    position: int | Array = 0,
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """Draws a token of each row, int32 [rows]; -2 where a row holds nothing to draw (NaN).

    Equal logits, parameters, seed and position give the same token, on every device and whatever
    the other rows are. src/cpp/sampling/processors.h has the rules.

    Args:
        logits: float32 [rows, vocab]; left as they are.
        temperature: 0 takes the largest, the lowest id of equal ones. A number or float32 [rows].
        top_k: Keeps so many; 0 is off. A number or int32 [rows].
        top_p: Keeps the shortest prefix of so much probability. A number or float32 [rows].
        min_p: Keeps what has this share of the largest's. A number or float32 [rows].
        seed: A number below 2**64, or uint64 or int64 [rows].
        position: Of the token to be drawn. A number or int32 [rows].
        out: int32 [rows].
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Example:
        >>> ops.sample(np.float32([[0, 1, 0]]), temperature=0.0)
        array([1], dtype=int32)
    """
    return _ops().sample(logits, temperature, top_k, top_p, min_p, seed, position, out, stream)


def ngram_propose(
    token_ids: Array,
    lengths: Array,
    max_drafts: int,
    *,
    ngram_min: int = 1,
    ngram_max: int = 3,
    limits: Array | None = None,
    out: Array | None = None,
    num_out: Array | None = None,
    stream: object = None,
) -> tuple[Array, Array]:
    """Drafts by prompt lookup (Saxena 2023): what followed a request's last tokens before.

    Of row b, the last n of lengths[b] tokens are looked for among the earlier ones, for the largest
    n from ngram_max down to ngram_min with which they occur and a token follows; the last tokens do
    not find themselves, and of several occurrences the latest counts. The drafts are the tokens
    that follow it, up to the end of the history. Speculation in `LLM` proposes the same.

    Args:
        token_ids: int32 [B, tokens]; the tokens of a row are contiguous, rows any distance apart.
        lengths: int32 [B], each in [0, tokens]; what lies beyond is not read.
        max_drafts: k, in [1, 1024].
        ngram_min: Tokens that must agree at least.
        ngram_max: The most that are looked for.
        limits: int32 [B], not negative: so many drafts at most for each request; k if None.
        out: int32 [B, k].
        num_out: int32 [B].
        stream: Where it runs on a GPU; docs/ops.md has the default.

    Returns:
        (drafts, num_drafts): int32 [B, k], with -1 after the last draft of a row, and int32 [B].

    Example:
        >>> ops.ngram_propose(np.int32([[7, 8, 9, 7]]), np.int32([4]), 2)
        (array([[8, 9]], dtype=int32), array([2], dtype=int32))
    """
    pair: Any = _ops().ngram_propose(
        token_ids, lengths, max_drafts, ngram_min, ngram_max, limits, out, num_out, stream
    )
    return pair[0], pair[1]
