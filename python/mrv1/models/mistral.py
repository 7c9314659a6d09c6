# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Mistral (Jiang et al. 2023): Llama's decoder with a sliding window, in all layers or in none."""

from __future__ import annotations

import dataclasses

from mrv1.config import ModelConfig, read_config, read_sliding_window, read_windows
from mrv1.config_fields import Fields
from mrv1.models.decoder import wire_decoder
from mrv1.models.registry import register


def read(fields: Fields) -> ModelConfig:
    """Reads the config. Without sliding_window there is one of 4096; null means none."""
    fields = fields.with_defaults({"sliding_window": 4096})
    fields.expect("attention_bias", False)
    fields.expect("layer_types", None)
    config = read_config(fields)
    window = read_sliding_window(fields)
    sliding = [window is not None] * config.num_hidden_layers
    return dataclasses.replace(config, windows=read_windows(fields, config, sliding, window))


register("mistral", architecture="MistralForCausalLM", read=read, wire=wire_decoder)
