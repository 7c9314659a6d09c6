# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Qwen3 dense (Yang et al. 2025): Llama's decoder with RMSNorm on every query and key head."""

from __future__ import annotations

import dataclasses

from mrv1.builder import Builder
from mrv1.config import ModelConfig, read_config
from mrv1.config_fields import Fields
from mrv1.models.decoder import wire_decoder
from mrv1.models.qwen2 import read_qwen_windows
from mrv1.models.registry import register


def read(fields: Fields) -> ModelConfig:
    """Reads the config."""
    # The width of a head is its own; it is not what the heads share of the hidden size.
    config = read_config(fields, head_dim=128)
    bias = fields.boolean("attention_bias", False)
    return dataclasses.replace(
        config,
        windows=read_qwen_windows(fields, config),
        attention_bias=bias,
        attention_output_bias=bias,
    )


def wire(p: Builder, config: ModelConfig) -> None:
    """Wires the model."""
    wire_decoder(p, config, qk_norm=True)


register("qwen3", architecture="Qwen3ForCausalLM", read=read, wire=wire)
