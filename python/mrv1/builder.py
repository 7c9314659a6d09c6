# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Wiring a model: a typed layer over the native `Program`.

A model file calls a `Builder` once. Each call adds one native op and returns the value it makes;
nothing is computed here, and nothing of this runs in a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mrv1 import _core
from mrv1.rope import RopeConfig, rope_frequencies


@dataclasses.dataclass(frozen=True)
class Value:
    """A matrix that an op of the program writes: one row a token, or one a row that is sampled."""

    index: int


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of the program: one tensor of the checkpoint, or several stacked by rows."""

    index: int


@dataclasses.dataclass(frozen=True)
class Rope:
    """A table of rotary angles."""

    index: int


def round_to(dtype: str, value: float) -> float:
    """Rounds a number to "float32" or "bfloat16", to nearest and ties to even."""
    wide = np.float32(value)
    if dtype == "float32":
        return float(wide)
    bits = wide.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return float((nearest & np.uint32(0xFFFF0000)).view(np.float32))


class Builder:
    """Wires ops into a program.

    Names of weights are relative to the enclosing `scope`. Shapes are [out, in], as checkpoints
    store them. Errors are InvalidArgumentError, naming the op.

    Args:
        dtype: Of activations, matrices and KV cache: "float32" or "bfloat16".
    """

    def __init__(self, dtype: str) -> None:
        self.program = _core.Program(dtype)
        self._prefix = ""

    @property
    def dtype(self) -> str:
        """The dtype of activations."""
        return self.program.dtype

    @contextlib.contextmanager
    def scope(self, prefix: str) -> Iterator[None]:
        """Puts `prefix` before the weight names inside."""
        outer = self._prefix
        self._prefix = outer + prefix
        try:
            yield
        finally:
            self._prefix = outer

    @contextlib.contextmanager
    def layer(self, index: int, prefix: str) -> Iterator[None]:
        """Marks the ops inside as one decoder layer: the program can be cut before it."""
        self.program.begin_layer(index)
        with self.scope(prefix):
            yield
        self.program.end_layer()

    def matrix(self, name: str, rows: int, cols: int) -> Weight:
        """A weight [rows, cols] of the tensor `name`."""
        return self.fused(cols, (name, rows))

    def fused(self, cols: int, *segments: tuple[str, int]) -> Weight:
        """Tensors (name, rows) of `cols` columns each, stacked by rows into one weight."""
        return self._weight(False, cols, segments)

    def vector(self, name: str, size: int, *, offset: float = 0.0) -> Weight:
        """A weight [size] of the tensor `name`, in float32.

        `offset` is added to its values when they are loaded: an RMSNorm that multiplies by
        (1 + weight), as Gemma's do, takes an offset of 1.
        """
        return self.fused_vector((name, size), offset=offset)

    def fused_vector(self, *segments: tuple[str, int], offset: float = 0.0) -> Weight:
        """Tensors (name, size) joined into one vector; see `vector`."""
        return self._weight(True, 1, segments, offset)

    def _weight(
        self, is_vector: bool, cols: int, segments: Sequence[tuple[str, int]], offset: float = 0.0
    ) -> Weight:
        named = [(self._prefix + name, rows) for name, rows in segments]
        label = "+".join(name for name, _ in named)
        return Weight(self.program.weight(label, is_vector, cols, named, offset))

    def embedding(self, table: Weight, *, scale: float = 1.0) -> Value:
        """Rows of `table` [vocab, hidden] for the step's token ids, times scale: [tokens, hidden].

        The product is made in float32 and rounded to the dtype of activations. Where a model rounds
        its scale first, so should the caller.
        """
        return Value(self.program.embedding(table.index, scale))

    def rms_norm(self, x: Value, weight: Weight, eps: float) -> Value:
        """x / sqrt(mean(x^2) + eps) * weight, by row."""
        return Value(self.program.rms_norm(x.index, weight.index, eps))

    def linear(
        self,
        x: Value,
        weight: Weight,
        *,
        bias: Weight | None = None,
        residual: Value | None = None,
        row_parallel: bool = False,
    ) -> Value:
        """x weight^T (+ bias) (+ residual): [rows, in] -> [rows, out].

        Args:
            x: [rows, in].
            weight: [out, in].
            bias: [out].
            residual: [rows, out], added to the result.
            row_parallel: Marks a projection back into the residual stream, whose output is a sum
                over ranks when the model is sharded: a place where the program can be cut.
        """
        return Value(
            self.program.linear(
                x.index,
                weight.index,
                bias=-1 if bias is None else bias.index,
                residual=-1 if residual is None else residual.index,
                row_parallel=row_parallel,
            )
        )

    def add(self, a: Value, b: Value) -> Value:
        """a + b, [tokens, n] each."""
        return Value(self.program.add(a.index, b.index))

    def silu_mul(self, x: Value) -> Value:
        """silu(gate) * up of x = [gate | up]: [tokens, 2n] -> [tokens, n]."""
        return Value(self.program.silu_mul(x.index))

    def gelu_mul(self, x: Value) -> Value:
        """gelu(gate) * up, with GELU's tanh approximation: otherwise as `silu_mul`."""
        return Value(self.program.gelu_mul(x.index))

    def rope_table(
        self, frequencies: Sequence[float], *, factor: float = 1.0, interleaved: bool = False
    ) -> Rope:
        """A table of rotary angles for `attention`: position p turns pair i by p * frequencies[i].

        Args:
            frequencies: One for each pair of elements of a head, at most head_dim / 2. With fewer,
                a head is turned in part: elements past 2 * len(frequencies) pass through.
            factor: Multiplies sines and cosines.
            interleaved: Pairs are elements (2 i, 2 i + 1), instead of (i, i + len(frequencies)).
        """
        return Rope(
            self.program.rope_table([float(f) for f in frequencies], float(factor), interleaved)
        )

    def rope(self, config: RopeConfig, head_dim: int) -> Rope:
        """The table of rotary angles of a config: see `rope_table`."""
        return self.rope_table(
            rope_frequencies(config, head_dim).tolist(),
            factor=config.attention_factor,
            interleaved=config.interleaved,
        )

    def attention(
        self,
        qkv: Value,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kv_layer: int,
        rope: Rope | None = None,
        qk_norm: tuple[Weight, Weight] | None = None,
        eps: float = 0.0,
        scale: float | None = None,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Value:
        """Causal attention over the paged KV cache: [tokens, q | k | v] -> [tokens, heads * dim].

        Args:
            qkv: Packed projections, (num_heads + 2 * num_kv_heads) * head_dim columns.
            num_heads: Query heads, a multiple of num_kv_heads.
            num_kv_heads: Key and value heads.
            head_dim: A multiple of 8 up to 256.
            kv_layer: Which layer of the KV cache; each is used once.
            rope: Rotary angles, applied to q and k.
            qk_norm: RMSNorm weights [head_dim] of q and k heads, applied before rope.
            eps: Of qk_norm.
            scale: Of the scores; 1 / sqrt(head_dim) if None.
            window: Positions a token sees, itself included; 0 for all before it.
            softcap: Scores become softcap * tanh(score / softcap) before the softmax; 0 for none.
        """
        q_norm, k_norm = (-1, -1) if qk_norm is None else (qk_norm[0].index, qk_norm[1].index)
        return Value(
            self.program.attention(
                qkv.index,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                kv_layer=kv_layer,
                scale=head_dim**-0.5 if scale is None else scale,
                window=window,
                rope=-1 if rope is None else rope.index,
                q_norm=q_norm,
                k_norm=k_norm,
                eps=eps,
                softcap=softcap,
            )
        )

    def logits(self, x: Value, head: Weight, *, softcap: float = 0.0) -> Value:
        """Logits [sampled rows, vocab] in float32: the end of the program.

        With a softcap they become softcap * tanh(logit / softcap).
        """
        return Value(self.program.logits(x.index, head.index, softcap))
