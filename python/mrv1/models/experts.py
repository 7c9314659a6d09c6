# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What families with a mixture of experts share: fields, and the feed-forward part of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from mrv1.builder import Builder, Value
from mrv1.config import MAX_INTERMEDIATE_SIZE, ModelConfig
from mrv1.config_fields import Fields
from mrv1.models.decoder import gated_mlp

# What a router can choose among.
MAX_EXPERTS: Final = 1024
# Widths of a layer's experts together, far above any model.
MAX_WIDTH: Final = 2**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig(ModelConfig):
    """What models with experts have beside the fields of all models.

    Their scores are a softmax over the experts.

    Attributes:
        num_experts: Experts of a layer that a router chooses among.
        num_experts_per_tok: How many of them a token goes through.
        moe_intermediate_size: Width of an expert.
        sparse_layers: Which layers have experts; the others have one MLP of intermediate_size.
        norm_topk_prob: Whether the weights of a token's experts are divided by their sum.
        norm_min: The least that they are divided by.
        correction_bias: Whether a bias of each expert is added to the scores that choose, not to
            the weights.
        num_shared_experts: Experts that all tokens go through, stored as one MLP of so many times
            moe_intermediate_size.
        experts_field: What config.json calls num_experts.
        width_field: What it calls moe_intermediate_size.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    sparse_layers: tuple[bool, ...]
    norm_topk_prob: bool = True
    norm_min: float = 0.0
    correction_bias: bool = False
    num_shared_experts: int = 0
    # A config is the same however its file spells it.
    experts_field: str = dataclasses.field(default="num_experts", compare=False)
    width_field: str = dataclasses.field(default="moe_intermediate_size", compare=False)

    @property
    def mlp_sizes(self) -> dict[str, int]:
        """As `ModelConfig`: of layers without experts, of experts, and of those for all tokens."""
        sizes = {} if all(self.sparse_layers) else super().mlp_sizes
        if any(self.sparse_layers):
            sizes[self.width_field] = self.moe_intermediate_size
        if any(self.sparse_layers) and self.num_shared_experts:
            width = self.num_shared_experts * self.moe_intermediate_size
            sizes["moe_num_shared_experts * moe_intermediate_size"] = width
        return sizes


def read_num_experts(fields: Fields, *names: str, default: int) -> tuple[str, int]:
    """Reads the number of experts, which goes by several names: all that are there must agree.

    Returns:
        The first of the names that is there, and the number.
    """
    present = [name for name in names if fields.has(name)] or [names[0]]
    count = fields.integer(present[0], 1, MAX_EXPERTS, default=default)
    for name in present[1:]:
        if fields.integer(name, 1, MAX_EXPERTS) != count:
            raise fields.error(name, f"the same as {present[0]} = {count}")
    return present[0], count


def read_experts(
    fields: Fields,
    config: ModelConfig,
    num_experts: tuple[str, int],
    sparse: Callable[[int], bool],
    *,
    top_k: tuple[str, int],
    width: tuple[str, int],
) -> ExpertsConfig:
    """Puts what the configs of all such families say into the config of one.

    Args:
        fields: The config.json.
        config: The fields of all models.
        num_experts: Field of `ExpertsConfig.num_experts`, and its value.
        sparse: Whether a layer has experts.
        top_k: Field of num_experts_per_tok, and its value where the file does not say.
        width: The same of moe_intermediate_size.
    """
    experts_field, count = num_experts
    widest = min(MAX_INTERMEDIATE_SIZE, MAX_WIDTH // count)
    return ExpertsConfig(
        **vars(config),
        num_experts=count,
        num_experts_per_tok=fields.integer(top_k[0], 1, count, default=top_k[1]),
        moe_intermediate_size=fields.integer(width[0], 1, widest, default=width[1]),
        sparse_layers=tuple(sparse(layer) for layer in range(config.num_hidden_layers)),
        experts_field=experts_field,
        width_field=width[0],
    )


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """Tensors of a layer's experts, as a checkpoint names them within the layer.

    Attributes:
        scope: Of all of them, with a dot at its end.
        gate: Of an expert, the projection that goes through the activation.
        up: The one that the activation is multiplied by.
        down: The one back into the residual stream.
    """

    scope: str = "mlp."
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


def feed_forward(
    p: Builder,
    config: ExpertsConfig,
    index: int,
    x: Value,
    residual: Value,
    names: ExpertNames = ExpertNames(),
) -> Value:
    """The second half of a layer: its experts, or its MLP where it has none.

    Args:
        p: Where to.
        config: The model's.
        index: Of the layer.
        x: The normalised input.
        residual: What the result is added to.
        names: Of the experts' tensors.
    """
    with p.scope(names.scope):
        if not config.sparse_layers[index]:
            return gated_mlp(p, config, x, residual=residual)
        out = _routed(p, config, x, names)
        if config.num_shared_experts:
            width = config.num_shared_experts * config.moe_intermediate_size
            with p.scope("shared_experts."):
                shared = dataclasses.replace(config, intermediate_size=width)
                out = p.add(out, gated_mlp(p, shared, x))
    return p.add(residual, out)


def _routed(p: Builder, config: ExpertsConfig, x: Value, names: ExpertNames) -> Value:
    """What comes of the experts that a router chooses for each token."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    scores = p.linear(x, p.matrix("gate.weight", config.num_experts, hidden, plain=True), wide=True)
    bias = None
    if config.correction_bias:
        bias = p.vector("moe_statics.e_score_correction_bias", config.num_experts)
    with p.scope("experts."):
        each = range(config.num_experts)
        gate_up = p.matrices(
            hidden,
            *(
                tuple((f"{expert}.{name}.weight", width) for name in (names.gate, names.up))
                for expert in each
            ),
            split="rows",
        )
        down = p.matrices(
            width,
            *(((f"{expert}.{names.down}.weight", hidden),) for expert in each),
            split="cols",
        )
    return p.experts(
        x,
        scores,
        gate_up,
        down,
        top_k=config.num_experts_per_tok,
        renormalize=config.norm_topk_prob,
        min_sum=config.norm_min,
        bias=bias,
    )
