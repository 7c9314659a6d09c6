# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Wiring a model: a typed layer over the native `Program`.

A model file calls a `Builder` once. Each call adds one native op and returns the value it makes;
nothing is computed here, and nothing of this runs in a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

from mrv1 import _core
from mrv1.errors import ConfigError, InvalidArgumentError
from mrv1.parallel import Shard
from mrv1.quantization import NVFP4_BLOCK, Quantization
from mrv1.rope import RopeConfig, rope_frequencies

# Along what ranks share a weight out.
Split: TypeAlias = Literal["rows", "cols"] | None


@dataclasses.dataclass(frozen=True)
class Value:
    """A matrix that an op of the program writes: one row a token, or one a row that is sampled."""

    index: int


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of the program: one tensor of the checkpoint, or several stacked by rows.

    Attributes:
        index: Of the program.
        split: Along what ranks share it out: "rows", "cols", or None if each has all of it.
        shape: [rows, cols] of the whole weight.
        matrices: How many equal matrices these rows are, on all ranks together.
    """

    index: int
    split: Split = None
    shape: tuple[int, int] = (0, 0)
    matrices: int = 1


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of a tensor of the checkpoint.

    Attributes:
        name: Of the tensor.
        rows: How many rows the part has.
        first: The first of them.
        total: Rows of the tensor; None for those up to the end of the part.
        units: What ranks share out by whole ones: heads, for example; None for single rows.
    """

    name: str
    rows: int
    first: int = 0
    total: int | None = None
    units: int | None = None


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

    Names, sizes and heads are always those of the whole model. Where ranks share it, each wires a
    program of its own part: weights say along what they are split, and what needs the other ranks
    follows from that.

    Args:
        dtype: Of activations, matrices and KV cache: "float32" or "bfloat16".
        shard: The part of the model that is wired.
        wide_sums: Whether ranks add their parts of a sum before it is rounded to `dtype`, as
            batch-invariant steps do. Each has whole experts of a mixture then.
        quantization: Which matrices the checkpoint has in NVFP4.
    """

    def __init__(
        self,
        dtype: str,
        *,
        shard: Shard | None = None,
        wide_sums: bool = False,
        quantization: Quantization | None = None,
    ) -> None:
        self.program = _core.Program(dtype)
        self.shard = Shard() if shard is None else shard
        if wide_sums and self.shard.size > 1:
            # Sums over whole experts are the ones that have the same bits on any number of ranks.
            self.shard = dataclasses.replace(self.shard, expert_parallel=True)
        self._wide_sums = wide_sums
        self._quantization = quantization
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

    def matrix(
        self, name: str, rows: int, cols: int, *, split: Split = None, plain: bool = False
    ) -> Weight:
        """A weight [rows, cols] of the tensor `name`.

        Args:
            name: Of the tensor.
            rows: Of the whole tensor.
            cols: Of the whole tensor.
            split: "rows" where ranks compute some of the outputs each (a column-parallel linear, or
                a part of the vocabulary), "cols" where they see some of the inputs each (a
                row-parallel linear).
            plain: Whether the tensor is never quantised: an embedding, a router.
        """
        return self._weight(False, cols, [(name, rows)], split, plain=plain)

    def fused(self, cols: int, *segments: tuple[str, int] | Part, split: Split = None) -> Weight:
        """Tensors (name, rows), or parts, of `cols` columns each, stacked by rows into one weight.

        With several ranks and split="rows" each takes its share of every segment. Where the
        checkpoint has quantised matrices, either all or none of these are.
        """
        return self._weight(False, cols, segments, split)

    def matrices(
        self, cols: int, *matrices: Sequence[tuple[str, int] | Part], split: Split = None
    ) -> Weight:
        """Matrices of equal sizes in one weight: those of the experts of a layer.

        Args:
            cols: Of each.
            matrices: The tensors, or parts, that each is stacked from, as for `fused`.
            split: Along what ranks share out each of them. In expert parallelism they do not:
                each rank has some of the matrices.
        """
        own = [matrices[index] for index in self.shard.own_experts(len(matrices))]
        segments = list(itertools.chain(*own))
        if not self.shard.expert_parallel:
            return self._weight(False, cols, segments, split, matrices=len(own))
        weight = self._weight(False, cols, segments, None, matrices=len(own))
        rows = weight.shape[0] // len(own) * len(matrices)
        return Weight(weight.index, split, (rows, cols), len(matrices))

    def vector(self, name: str, size: int, *, offset: float = 0.0) -> Weight:
        """A weight [size] of the tensor `name`, in float32.

        `offset` is added to its values when they are loaded: an RMSNorm that multiplies by
        (1 + weight), as Gemma's do, takes an offset of 1.
        """
        return self.fused_vector((name, size), offset=offset)

    def fused_vector(
        self, *segments: tuple[str, int] | Part, offset: float = 0.0, split: Split = None
    ) -> Weight:
        """Tensors (name, size), or parts, joined into one vector; see `vector` and `fused`."""
        return self._weight(True, 1, segments, split, offset)

    def _weight(
        self,
        is_vector: bool,
        cols: int,
        segments: Sequence[tuple[str, int] | Part],
        split: Split,
        offset: float = 0.0,
        matrices: int = 1,
        plain: bool = False,
    ) -> Weight:
        parts = [each if isinstance(each, Part) else Part(*each) for each in segments]
        shape = (sum(part.rows for part in parts), cols)
        first_col, own_cols = self.shard.cut(cols) if split == "cols" else (0, cols)
        named: list[tuple[str, int]] = []
        slices: list[tuple[int, int, int, int]] = []
        for part in parts:
            first, rows = part.first, part.rows
            if split == "rows":
                units = part.rows if part.units is None else part.units
                start, count = self.shard.cut(units)
                first += start * (part.rows // units)
                rows = count * (part.rows // units)
            name = self._prefix + part.name
            total = part.first + part.rows if part.total is None else part.total
            if named and named[-1][0] == name and slices[-1][1] + named[-1][1] == first:
                named[-1] = (name, named[-1][1] + rows)  # it goes on in the same tensor
                continue
            named.append((name, rows))
            slices.append((total, first, cols, first_col))
        names = list(dict.fromkeys(name for name, _ in named))
        label = "+".join(names) if matrices == 1 else f"{names[0]} and {len(names) - 1} others"
        is_nvfp4 = not (is_vector or plain) and self._is_nvfp4(names)
        if is_nvfp4:
            self._check_blocks(names[0], cols, own_cols)
        index = self.program.weight(
            label,
            is_vector,
            own_cols,
            named,
            offset,
            slices,
            shape[0] if split == "rows" and matrices == 1 else 0,
            matrices,
            is_nvfp4,
        )
        return Weight(index, split, shape, matrices)

    def _is_nvfp4(self, names: Sequence[str]) -> bool:
        """Whether the matrix of these tensors is in NVFP4."""
        if self._quantization is None:
            return False
        covered = [self._quantization.covers(name) for name in names]
        if any(covered) and not all(covered):
            plain = next(name for name, is_in in zip(names, covered, strict=True) if not is_in)
            quantised = next(name for name, is_in in zip(names, covered, strict=True) if is_in)
            raise ConfigError(
                f"{plain} is excluded from quantisation and {quantised} is not, which are parts "
                "of one matrix here",
                field="exclude_modules",
                allowed="a list with all parts of it, or none",
            )
        return all(covered)

    def _check_blocks(self, name: str, cols: int, own_cols: int) -> None:
        """Refuses a matrix, or a rank's share of it, that has no whole blocks."""
        if cols % NVFP4_BLOCK:
            raise ConfigError(
                f"{name} has {cols} columns and cannot be in NVFP4",
                field="exclude_modules",
                allowed=f"a list with each matrix whose columns are no multiple of {NVFP4_BLOCK}",
            )
        if own_cols % NVFP4_BLOCK:
            raise InvalidArgumentError(
                f"{name} is in NVFP4 and has {cols} columns",
                field="tensor_parallel_size",
                value=self.shard.size,
                allowed=f"such that each rank gets a multiple of {NVFP4_BLOCK} of them",
            )

    def embedding(self, table: Weight, *, scale: float = 1.0) -> Value:
        """Rows of `table` [vocab, hidden] for the step's token ids, times scale: [tokens, hidden].

        The product is made in float32 and rounded to the dtype of activations. Where a model rounds
        its scale first, so should the caller.
        """
        if self.shard.tensor_size == 1 or table.split is None:
            return Value(self.program.embedding(table.index, scale))
        self._expect_split(table, "rows", "embedding")
        first, _ = self.shard.cut(table.shape[0])
        # Each rank has the rows of its own ids, and zeros for all others.
        return self._all_reduce(Value(self.program.embedding(table.index, scale, first)))

    def _all_reduce(self, x: Value, bias: Weight | None = None) -> Value:
        return Value(self.program.all_reduce(x.index, -1 if bias is None else bias.index))

    def _expect_split(self, weight: Weight, split: Split, op: str) -> None:
        if weight.split != split:
            raise InvalidArgumentError(
                f"{op}: with {self.shard.tensor_size} ranks the weight must be split by {split}",
                field="split",
                value=weight.split,
            )

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
        wide: bool = False,
    ) -> Value:
        """x weight^T (+ bias) (+ residual): [rows, in] -> [rows, out].

        Args:
            x: [rows, in].
            weight: [out, in].
            bias: [out].
            residual: [rows, out], added to the result.
            row_parallel: Marks a projection back into the residual stream, whose output is a sum
                over ranks when the model is sharded: a place where the program can be cut. Its
                weight is split by columns then.
            wide: Leaves the result in float32, as a router's; without a residual, and not
                row-parallel.
        """
        if wide and row_parallel:
            raise InvalidArgumentError(
                "linear: a row-parallel result is rounded after its sum over ranks",
                field="wide",
                value=wide,
            )
        if self.shard.tensor_size > 1 and row_parallel:
            self._expect_split(weight, "cols", "linear")
            partial = self.program.linear(
                x.index, weight.index, row_parallel=True, wide=self._wide_sums
            )
            total = self._all_reduce(Value(partial), bias)
            return total if residual is None else self.add(total, residual)
        if self.shard.tensor_size > 1 and weight.split == "cols":
            self._expect_split(weight, "rows", "linear")
        return Value(
            self.program.linear(
                x.index,
                weight.index,
                bias=-1 if bias is None else bias.index,
                residual=-1 if residual is None else residual.index,
                row_parallel=row_parallel,
                wide=wide,
            )
        )

    def experts(
        self,
        x: Value,
        router_logits: Value,
        gate_up: Weight,
        down: Weight,
        *,
        top_k: int,
        scores: Literal["softmax", "sigmoid"] = "softmax",
        bias: Weight | None = None,
        renormalize: bool = True,
        min_sum: float = 0.0,
        scale: float = 1.0,
        activation: Literal["silu", "gelu_tanh"] = "silu",
    ) -> Value:
        """A mixture of experts: of each token the weighted sum of `top_k` gated MLPs.

        The experts of a token are those of largest score + bias; ties go to lower ones. What they
        make of x, down (activation(gate x) * (up x)), is added with the scores as weights. Where
        ranks share the model, each has a part of every expert or some of the experts, and the sum
        is made over ranks. Where ranks have tokens of their own, these travel to the experts.

        Args:
            x: [tokens, hidden].
            router_logits: [tokens, experts] in float32: a `linear` with `wide`.
            gate_up: Of each expert gate over up, [2 * intermediate, hidden]: `matrices` split by
                rows.
            down: Of each expert [hidden, intermediate]: `matrices` split by columns.
            top_k: Experts a token has.
            scores: What a router's logits become: their softmax, or the sigmoid of each.
            bias: [experts], added to scores for the choice alone (DeepSeek-V3's
                e_score_correction_bias).
            renormalize: Whether a token's weights are divided by their sum.
            min_sum: What they are divided by at least.
            scale: Of the weights, after that.
            activation: Of gate.
        """
        is_shared = self.shard.tensor_size > 1
        if is_shared:
            self._expect_split(gate_up, "rows", "experts")
            self._expect_split(down, "cols", "experts")
        experts, weights = self.program.moe_route(
            router_logits.index,
            top_k=top_k,
            bias=-1 if bias is None else bias.index,
            scores=scores,
            renormalize=renormalize,
            min_sum=min_sum,
            scale=scale,
        )
        first = self.shard.own_experts(gate_up.matrices).start
        if self.shard.data_parallel and self.shard.size > 1:
            return Value(
                self.program.moe_exchange(
                    x.index,
                    experts,
                    weights,
                    gate_up.index,
                    down.index,
                    activation=activation,
                    first_expert=first,
                    wide=self._wide_sums,
                    num_experts=gate_up.matrices,
                    ranks=self.shard.size,
                )
            )
        total = Value(
            self.program.moe_experts(
                x.index,
                experts,
                weights,
                gate_up.index,
                down.index,
                activation=activation,
                first_expert=first,
                num_experts=gate_up.matrices,
                row_parallel=True,
                wide=is_shared and self._wide_sums,
            )
        )
        return self._all_reduce(total) if is_shared else total

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
        _, num_heads = self.shard.cut(num_heads)
        _, num_kv_heads = self.shard.cut(num_kv_heads)
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
        ranks = self.shard.tensor_size if head.split == "rows" else 1
        return Value(self.program.logits(x.index, head.index, softcap, ranks))
