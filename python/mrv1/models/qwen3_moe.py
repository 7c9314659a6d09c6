# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Qwen3 with experts (Yang et al. 2025): Qwen3's decoder, experts in all layers or in some."""

from __future__ import annotations

import dataclasses

from mrv1.builder import Builder
from mrv1.config import MAX_LAYERS, read_config, read_sliding_window, read_windows
from mrv1.config_fields import Fields
from mrv1.models.decoder import wire_decoder
from mrv1.models.experts import ExpertsConfig, feed_forward, read_experts, read_num_experts
from mrv1.models.registry import register


def read(fields: Fields) -> ExpertsConfig:
    """Reads the config. A window, where there is one, is in all layers, unlike in Qwen3."""
    fields = fields.with_defaults({"sliding_window": 4096})
    fields.expect("layer_types", None)
    config = read_config(fields)
    count = config.num_hidden_layers
    slides = fields.boolean("use_sliding_window", False)
    window = read_sliding_window(fields) if slides else None
    step = fields.integer("decoder_sparse_step", 1, MAX_LAYERS, default=1)
    dense = _read_dense_layers(fields, count)
    experts = read_experts(
        fields,
        config,
        read_num_experts(fields, "num_experts", "num_local_experts", default=128),
        lambda layer: layer not in dense and (layer + 1) % step == 0,
        top_k=("num_experts_per_tok", 8),
        width=("moe_intermediate_size", 768),
    )
    bias = fields.boolean("attention_bias", False)
    return dataclasses.replace(
        experts,
        norm_topk_prob=fields.boolean("norm_topk_prob", False),
        windows=read_windows(fields, config, [window is not None] * count, window),
        attention_bias=bias,
        attention_output_bias=bias,
    )


def _read_dense_layers(fields: Fields, count: int) -> frozenset[int]:
    layers = fields.values.get("mlp_only_layers")
    if layers is None:
        return frozenset()
    if not isinstance(layers, list) or not all(
        type(layer) is int and 0 <= layer < count for layer in layers
    ):
        raise fields.error("mlp_only_layers", f"a list of layers in [0, {count - 1}]")
    return frozenset(layers)


def wire(p: Builder, config: ExpertsConfig) -> None:
    """Wires the model."""
    wire_decoder(p, config, qk_norm=True, feed_forward=feed_forward)


register("qwen3_moe", architecture="Qwen3MoeForCausalLM", read=read, wire=wire)
