# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Qwen3 dense (Yang et al. 2025): Llama's decoder with RMSNorm on every query and key head."""

from __future__ import annotations

from mrv1.builder import Builder
from mrv1.config import ModelConfig
from mrv1.models.llama import wire_decoder


def wire(p: Builder, config: ModelConfig) -> None:
    """Wires the model."""
    wire_decoder(p, config, qk_norm=True)
