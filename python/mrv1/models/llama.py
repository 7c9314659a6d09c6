# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024)."""

from __future__ import annotations

import dataclasses

from mrv1.config import ModelConfig, read_config, read_sliding_layers, read_windows
from mrv1.config_fields import Fields
from mrv1.models.decoder import wire_decoder
from mrv1.models.registry import register


def read(fields: Fields) -> ModelConfig:
    """Reads the config."""
    fields.expect("use_sliding_window", False)
    config = read_config(fields)
    count = config.num_hidden_layers
    read_windows(fields, config, read_sliding_layers(fields, count, lambda _: False), None)
    bias = fields.boolean("attention_bias", False)
    return dataclasses.replace(
        config,
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )


register("llama", architecture="LlamaForCausalLM", read=read, wire=wire_decoder)
