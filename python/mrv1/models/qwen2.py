# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama's decoder with biases on queries, keys and values."""

from __future__ import annotations

import dataclasses

from mrv1.config import (
    MAX_LAYERS,
    ModelConfig,
    read_config,
    read_sliding_layers,
    read_sliding_window,
    read_windows,
)
from mrv1.config_fields import Fields
from mrv1.models.decoder import wire_decoder
from mrv1.models.registry import register


def read(fields: Fields) -> ModelConfig:
    """Reads the config."""
    config = read_config(fields)
    windows = read_qwen_windows(fields, config)
    return dataclasses.replace(config, windows=windows, attention_bias=True)


def read_qwen_windows(fields: Fields, config: ModelConfig) -> tuple[int, ...]:
    """Returns the layers' windows: with use_sliding_window, layers from max_window_layers on."""
    window = read_sliding_window(fields) if fields.boolean("use_sliding_window", False) else None
    first = fields.integer("max_window_layers", 0, MAX_LAYERS, default=28)
    sliding = read_sliding_layers(
        fields, config.num_hidden_layers, lambda layer: window is not None and layer >= first
    )
    return read_windows(fields, config, sliding, window)


register("qwen2", architecture="Qwen2ForCausalLM", read=read, wire=wire_decoder)
