# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama's decoder from fused projections."""

from __future__ import annotations

import dataclasses

from mrv1.builder import Builder
from mrv1.config import ModelConfig, read_config, read_sliding_window, read_windows
from mrv1.config_fields import Fields
from mrv1.models.decoder import wire_decoder
from mrv1.models.registry import register


def read(fields: Fields) -> ModelConfig:
    """Reads the config. "su" is what longrope was called first."""
    for name in ("attention_bias", "mlp_bias"):
        fields.expect(name, False)
    fields.expect("layer_types", None)
    config = read_config(
        fields,
        rope_types=("default", "longrope"),
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        partial_rotary=True,
    )
    window = read_sliding_window(fields)
    sliding = [window is not None] * config.num_hidden_layers
    return dataclasses.replace(config, windows=read_windows(fields, config, sliding, window))


def wire(p: Builder, config: ModelConfig) -> None:
    """Wires the model."""
    wire_decoder(p, config, fused_tensors=True)


register("phi3", architecture="Phi3ForCausalLM", read=read, wire=wire)
