# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""ERNIE 4.5 with experts (Baidu 2025): ERNIE's decoder, a corrected choice and shared experts."""

from __future__ import annotations

import dataclasses
from typing import Final

from mrv1.builder import Builder
from mrv1.config import MAX_LAYERS
from mrv1.config_fields import Fields
from mrv1.models import ernie4_5
from mrv1.models.decoder import wire_decoder
from mrv1.models.experts import (
    MAX_WIDTH,
    ExpertsConfig,
    feed_forward,
    read_experts,
    read_num_experts,
)
from mrv1.models.registry import register

# What training knows beside these, and what changes nothing that is computed, is not read.
_ONLY: Final[dict[str, str | bool]] = {
    "moe_gate": "topk",
    "moe_gate_act": "softmax",
    "moe_group_experts": False,
    "moe_norm_gate_logits": True,
    "moe_use_hard_gate": False,
    "scoring_func": "softmax",
}


def read(fields: Fields) -> ExpertsConfig:
    """Reads the config. moe_layer_end_index is the last layer with experts, -1 that of all."""
    for name, value in _ONLY.items():
        fields.expect(name, value)
    config = ernie4_5.read(fields)
    interval = fields.integer("moe_layer_interval", 1, MAX_LAYERS, default=1)
    first = fields.integer("moe_layer_start_index", 0, MAX_LAYERS, default=1)
    last = fields.integer("moe_layer_end_index", -1, MAX_LAYERS, default=-1)
    if last == -1:
        last = config.num_hidden_layers - 1
    experts = read_experts(
        fields,
        config,
        read_num_experts(fields, "moe_num_experts", "num_experts", default=64),
        lambda layer: first <= layer <= last and (layer + 1) % interval == 0,
        top_k=("moe_k", 6),
        width=("moe_intermediate_size", 1536),
    )
    # Where it is null there are none, unlike where it is missing.
    shared = fields.with_defaults({"moe_num_shared_experts": 2})
    most = MAX_WIDTH // experts.moe_intermediate_size
    return dataclasses.replace(
        experts,
        norm_min=fields.number("moe_norm_min", 0.0, 1.0, default=1e-12),
        correction_bias=fields.boolean("moe_use_aux_free", True),
        num_shared_experts=shared.integer("moe_num_shared_experts", 0, most, default=0),
    )


def wire(p: Builder, config: ExpertsConfig) -> None:
    """Wires the model."""
    wire_decoder(p, config, feed_forward=feed_forward)


# The layer that predicts one token more is not run.
register(
    "ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    read=read,
    wire=wire,
    other_tensors=("model.mtp_",),
)
