# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""ERNIE 4.5, dense (Baidu 2025): Llama's decoder with rotary pairs side by side."""

from __future__ import annotations

import dataclasses

from mrv1.config import ModelConfig, read_config
from mrv1.config_fields import Fields
from mrv1.models.decoder import wire_decoder
from mrv1.models.registry import register


def read(fields: Fields) -> ModelConfig:
    """Reads the config. use_bias is about all projections."""
    config = read_config(fields, tied=True, rope_theta=500000.0)
    bias = fields.boolean("use_bias", False)
    return dataclasses.replace(
        config,
        rope=dataclasses.replace(config.rope, interleaved=True),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
    )


register("ernie4_5", architecture="Ernie4_5ForCausalLM", read=read, wire=wire_decoder)
