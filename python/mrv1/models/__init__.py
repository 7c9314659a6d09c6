# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Model families: one file each, which reads a config, wires ops and registers itself.

docs/adding-a-model.md walks through one.
"""

from __future__ import annotations

from mrv1.models import (
    ernie4_5,
    ernie4_5_moe,
    gemma2,
    gemma3,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from mrv1.models.registry import FAMILIES, Family, register

__all__ = [
    "FAMILIES",
    "Family",
    "ernie4_5",
    "ernie4_5_moe",
    "gemma2",
    "gemma3",
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "register",
]
