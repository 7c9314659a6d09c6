# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Several devices: which part of a model each rank computes, and what that can be combined with.

A pipeline cuts a model between its layers, into stages; tensor parallelism cuts every layer of a
stage. With stages of T ranks each, rank number r is rank r % T of stage r // T. Data parallelism
cuts the requests: each rank has all of the model but most experts.

In tensor parallelism weights are cut as in Megatron-LM (Shoeybi et al. 2019): projections into
heads and into the MLP by rows (column-parallel, as their outputs are columns), those back into the
residual stream by columns (row-parallel), embedding and output head by the vocabulary.
docs/parallel.md describes both.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from mrv1 import _core, envs
from mrv1.errors import InvalidArgumentError
from mrv1.quantization import NVFP4_BLOCK

if TYPE_CHECKING:
    from mrv1.config import ModelConfig
    from mrv1.loader import RunnerOptions

MAX_RANKS: Final = 8
# Parts of the columns of a row-parallel weight that are summed apart in batch-invariant steps, and
# columns that go together; src/cpp/ops/linear.h.
_INVARIANT_PARTS: Final = 8
_PAIR: Final = 2
# The options that say how many ranks there are.
SIZES: Final = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of a model that a rank holds.

    Attributes:
        rank: In [0, size).
        size: Ranks.
        expert_parallel: Each rank has whole experts of its own, instead of a part of each.
        data_parallel: Each rank has requests of its own, and of the model all but experts.
    """

    rank: int = 0
    size: int = 1
    expert_parallel: bool = False
    data_parallel: bool = False

    @property
    def tensor_size(self) -> int:
        """Ranks among which layers are shared out."""
        return 1 if self.data_parallel else self.size

    def cut(self, units: int) -> tuple[int, int]:
        """The first of the rank's units, and how many it has.

        Units of which there are fewer than ranks are held by several ranks each.

        Raises:
            InvalidArgumentError: They cannot be shared out evenly.
        """
        if self.tensor_size == 1:
            return 0, units
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

    def own_experts(self, experts: int) -> range:
        """The experts that the rank has, of each all or a part.

        In expert parallelism rank r has the experts e with e * size // experts == r, which are as
        many on each rank, or one more.

        Raises:
            InvalidArgumentError: There are fewer experts than ranks that should have some.
        """
        if not self.expert_parallel:
            return range(experts)
        if experts < self.size:
            raise InvalidArgumentError(
                f"{experts} experts cannot be shared out among {self.size} ranks",
                field="expert_parallel",
                value=self.expert_parallel,
                allowed="False",
            )
        first, end = (-(-rank * experts // self.size) for rank in (self.rank, self.rank + 1))
        return range(first, end)


def stage_ranges(
    program: _core.Program, size: int, layers: Sequence[int] | None
) -> list[tuple[int, int]]:
    """The layers of each stage of a pipeline: the first, and the one behind the last.

    Args:
        program: Of the whole model, before it is fused.
        size: Stages.
        layers: How many layers each stage has; None balances them, so that the stage whose weights
            take a step longest to read takes as little time as can be. The output head counts for
            the last stage; of the embedding, a step reads next to nothing.

    Raises:
        InvalidArgumentError: There are fewer layers than stages, or `layers` does not fit them.
    """
    count = program.num_layers
    if size == 1 and layers is None:
        # Whether the wiring marks its layers or not.
        return [(0, max(count, len(program.kv_layout[1])))]
    if count == 0:
        raise InvalidArgumentError(
            "the model's wiring does not mark its layers (Builder.layer)",
            field="pipeline_parallel_size",
            value=size,
            allowed="1, without pipeline_layers",
        )
    if size > count:
        raise InvalidArgumentError(
            field="pipeline_parallel_size",
            value=size,
            allowed=f"at most the model's num_hidden_layers = {count}, as each stage has a layer",
        )
    if layers is None:
        layers = _core.balance_layers(program.layer_costs, size)
    elif len(layers) != size or sum(layers) != count:
        raise InvalidArgumentError(
            field="pipeline_layers",
            value=list(layers),
            allowed=f"as many numbers as pipeline_parallel_size = {size}, whose sum is the model's "
            f"num_hidden_layers = {count}",
        )
    return list(itertools.pairwise(itertools.accumulate(layers, initial=0)))


def check_sizes(
    config: ModelConfig, size: int, *, batch_invariant: bool, expert_parallel: bool = False
) -> None:
    """Refuses a number of ranks that the sizes of a model cannot be shared out among.

    With `expert_parallel`, as with `batch_invariant`, experts may have any width: none is cut.

    Raises:
        InvalidArgumentError: Naming the size of the model and what would be allowed.
    """
    if size == 1:
        return
    widths = dict(config.mlp_sizes)
    if expert_parallel or batch_invariant:
        widths.pop(getattr(config, "width_field", ""), None)
    for field, value in (
        ("num_attention_heads", config.num_attention_heads),
        *widths.items(),
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
    experts = getattr(config, "num_experts", size)
    if experts < size:
        field = getattr(config, "experts_field", "")
        raise _error(size, f"at most the model's {field} = {experts} with batch_invariant")
    step = _INVARIANT_PARTS * (_PAIR if config.quantization is None else NVFP4_BLOCK)
    for field, value in (
        ("num_attention_heads * head_dim", config.num_attention_heads * config.head_dim),
        *widths.items(),
    ):
        if value % step:
            raise _error(
                size,
                f"1 with batch_invariant, as the model's {field} = {value} is no multiple of "
                f"{step}",
            )


def check_experts(config: ModelConfig, size: int, *, batch_invariant: bool) -> None:
    """Refuses expert parallelism where a rank would have no expert, or sums no order for all.

    Raises:
        InvalidArgumentError: Naming what the model has.
    """
    experts = getattr(config, "num_experts", 0)
    if experts < size:
        raise InvalidArgumentError(
            f"each of {size} ranks needs an expert" if experts else "the model has no experts",
            field="expert_parallel",
            value=True,
            allowed=f"False with {size} ranks, as the model's "
            f"{getattr(config, 'experts_field', '')} = {experts}"
            if experts
            else "False",
        )
    if batch_invariant and _INVARIANT_PARTS % size:
        raise InvalidArgumentError(
            field="data_parallel_size", value=size, allowed="1, 2, 4 or 8 with batch_invariant"
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
        sizes: The options that say how many there are.
    """

    field: str
    value: Callable[[RunnerOptions], object]
    allowed: object
    reason: str
    sizes: tuple[str, ...] = SIZES


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
    Refusal(
        envs.USE_TBO.name,
        lambda _: "1" if envs.USE_TBO.get() == "1" else "0 or auto",
        "0 or auto",
        "what stages pass on is that of whole steps",
        sizes=("pipeline_parallel_size",),
    ),
)


def check_options(options: RunnerOptions) -> None:
    """Refuses options that several ranks cannot have, and numbers of ranks that there are not.

    Raises:
        InvalidArgumentError: Naming the option.
    """
    sizes = {field: _size(field, getattr(options, field)) for field in SIZES}
    tensor, pipeline, _ = sizes.values()
    _check_expert_options(options, sizes)
    if tensor * pipeline > MAX_RANKS:
        raise InvalidArgumentError(
            field="pipeline_parallel_size",
            value=pipeline,
            allowed=f"at most {MAX_RANKS // tensor} with tensor_parallel_size = {tensor}, as there "
            f"are {MAX_RANKS} ranks at most",
        )
    _check_layers(options.pipeline_layers)
    for refusal in REFUSALS:
        value = refusal.value(options)
        for field, size in sizes.items():
            if field in refusal.sizes and size > 1 and value != refusal.allowed:
                raise InvalidArgumentError(
                    refusal.reason,
                    field=refusal.field,
                    value=value,
                    allowed=f"{refusal.allowed} with {field} > 1",
                )


def _check_expert_options(options: RunnerOptions, sizes: dict[str, int]) -> None:
    if not isinstance(options.expert_parallel, bool):
        raise InvalidArgumentError(
            field="expert_parallel", value=options.expert_parallel, allowed="True or False"
        )
    data = sizes["data_parallel_size"]
    most = options.max_tokens_per_rank
    if most is not None and (data == 1 or isinstance(most, bool) or not isinstance(most, int)):
        raise InvalidArgumentError(
            field="max_tokens_per_rank",
            value=most,
            allowed="None with data_parallel_size = 1" if data == 1 else "None or an integer",
        )
    if data == 1:
        return
    if not options.expert_parallel:
        raise InvalidArgumentError(
            "ranks with requests of their own share nothing but experts",
            field="data_parallel_size",
            value=data,
            allowed="1 without expert_parallel",
        )
    for field in ("tensor_parallel_size", "pipeline_parallel_size"):
        if sizes[field] > 1:
            raise InvalidArgumentError(
                "ranks with requests of their own have whole layers",
                field=field,
                value=sizes[field],
                allowed="1 with data_parallel_size > 1",
            )


def _size(field: str, size: object) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_RANKS:
        raise InvalidArgumentError(
            field=field, value=size, allowed=f"an integer in [1, {MAX_RANKS}]"
        )
    return size


def _check_layers(layers: object) -> None:
    if layers is None:
        return
    if (
        not isinstance(layers, Sequence)
        or isinstance(layers, str | bytes)
        or not all(type(count) is int and count >= 1 for count in layers)
    ):
        raise InvalidArgumentError(
            field="pipeline_layers",
            value=layers,
            allowed="None, or a number of layers, 1 or more, for each stage",
        )
