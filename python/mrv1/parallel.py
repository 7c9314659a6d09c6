# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: which part of a model each rank computes, and what it can be combined with.

Weights are cut as in Megatron-LM (Shoeybi et al. 2019): projections into heads and into the MLP by
rows (column-parallel, as their outputs are columns), those back into the residual stream by columns
(row-parallel), embedding and output head by the vocabulary. docs/parallel.md describes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mrv1 import envs
from mrv1.errors import InvalidArgumentError

if TYPE_CHECKING:
    from mrv1.config import ModelConfig
    from mrv1.loader import RunnerOptions

MAX_RANKS: Final = 8
# Parts of the columns of a row-parallel weight that are summed apart in batch-invariant steps, and
# columns that go together; src/cpp/ops/linear.h.
_INVARIANT_PARTS: Final = 8
_PAIR: Final = 2


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of a model that a rank holds.

    Attributes:
        rank: In [0, size).
        size: Ranks.
    """

    rank: int = 0
    size: int = 1

    def cut(self, units: int) -> tuple[int, int]:
        """The first of the rank's units, and how many it has.

        Units of which there are fewer than ranks are held by several ranks each.

        Raises:
            InvalidArgumentError: They cannot be shared out evenly.
        """
        if units % self.size == 0:
            count = units // self.size
            return self.rank * count, count
        if self.size % units == 0:
            return self.rank * units // self.size, 1
        raise InvalidArgumentError(
            f"{units} units cannot be shared out among {self.size} ranks",
            field="tensor_parallel_size",
            value=self.size,
        )


def check_sizes(config: ModelConfig, size: int, *, batch_invariant: bool) -> None:
    """Refuses a number of ranks that the sizes of a model cannot be shared out among.

    Raises:
        InvalidArgumentError: Naming the size of the model and what would be allowed.
    """
    if size == 1:
        return
    for field, value in (
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ):
        if value % size:
            raise _error(size, f"a divisor of the model's {field} = {value}")
    heads = config.num_key_value_heads
    if heads % size and size % heads:
        raise _error(size, f"a divisor or a multiple of the model's num_key_value_heads = {heads}")
    if not batch_invariant:
        return
    if _INVARIANT_PARTS % size:
        raise _error(size, "1, 2, 4 or 8 with batch_invariant")
    for field, value in (
        ("num_attention_heads * head_dim", config.num_attention_heads * config.head_dim),
        ("intermediate_size", config.intermediate_size),
    ):
        if value % (_INVARIANT_PARTS * _PAIR):
            raise _error(
                size,
                f"1 with batch_invariant, as the model's {field} = {value} is no multiple of "
                f"{_INVARIANT_PARTS * _PAIR}",
            )


def _error(size: int, allowed: str) -> InvalidArgumentError:
    return InvalidArgumentError(field="tensor_parallel_size", value=size, allowed=allowed)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A choice that several ranks cannot have.

    Attributes:
        field: Of `RunnerOptions`, or a variable of the environment.
        value: What is chosen.
        allowed: What must be.
        reason: Why.
    """

    field: str
    value: Callable[[RunnerOptions], object]
    allowed: object
    reason: str


REFUSALS: Final = (
    Refusal(
        "stream",
        lambda options: options.stream,
        None,
        "each rank has a stream on its own device, so one of the caller's cannot serve them all",
    ),
    Refusal(
        envs.TUNE.name,
        lambda _: envs.TUNE.get(),
        False,
        "ranks would wait for each other's measurements, and write one table",
    ),
)


def check_options(options: RunnerOptions) -> None:
    """Refuses options that several ranks cannot have, and numbers of ranks that there are not.

    Raises:
        InvalidArgumentError: Naming the option.
    """
    size = options.tensor_parallel_size
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_RANKS:
        raise InvalidArgumentError(
            field="tensor_parallel_size", value=size, allowed=f"an integer in [1, {MAX_RANKS}]"
        )
    if size == 1:
        return
    for refusal in REFUSALS:
        value = refusal.value(options)
        if value != refusal.allowed:
            raise InvalidArgumentError(
                refusal.reason,
                field=refusal.field,
                value=value,
                allowed=f"{refusal.allowed} with tensor_parallel_size > 1",
            )
