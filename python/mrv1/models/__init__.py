# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Model families: one file each, which reads a config, wires ops and registers itself.

docs/adding-a-model.md walks through one.
"""

from __future__ import annotations

from mrv1.models import ernie4_5, gemma2, gemma3, llama, mistral, phi3, qwen2, qwen3
from mrv1.models.registry import FAMILIES, Family, register

__all__ = [
    "FAMILIES",
    "Family",
    "ernie4_5",
    "gemma2",
    "gemma3",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "register",
]
