# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Mixtral (Jiang et al. 2024): Mistral's decoder with experts in all layers."""

from __future__ import annotations

import dataclasses
from typing import Final

from mrv1.builder import Builder, Value
from mrv1.config import read_config, read_sliding_window, read_windows
from mrv1.config_fields import Fields
from mrv1.models.decoder import wire_decoder
from mrv1.models.experts import (
    ExpertNames,
    ExpertsConfig,
    feed_forward,
    read_experts,
    read_num_experts,
)
from mrv1.models.registry import register

_NAMES: Final = ExpertNames(scope="block_sparse_moe.", gate="w1", up="w3", down="w2")


def read(fields: Fields) -> ExpertsConfig:
    """Reads the config. intermediate_size is that of an expert; a window is in all layers."""
    fields.expect("attention_bias", False)
    fields.expect("layer_types", None)
    config = read_config(fields, rope_theta=1e6)
    experts = read_experts(
        fields,
        config,
        read_num_experts(fields, "num_local_experts", "num_experts", default=8),
        lambda _: True,
        top_k=("num_experts_per_tok", 2),
        width=("intermediate_size", config.intermediate_size),
    )
    window = read_sliding_window(fields)
    sliding = [window is not None] * config.num_hidden_layers
    return dataclasses.replace(experts, windows=read_windows(fields, config, sliding, window))


def wire(p: Builder, config: ExpertsConfig) -> None:
    """Wires the model."""

    def experts(p: Builder, config: ExpertsConfig, index: int, x: Value, residual: Value) -> Value:
        return feed_forward(p, config, index, x, residual, _NAMES)

    wire_decoder(p, config, feed_forward=experts)


register("mixtral", architecture="MixtralForCausalLM", read=read, wire=wire)
