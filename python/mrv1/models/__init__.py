# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Model families: one file each, a `wire` function over the builder."""

from __future__ import annotations

from collections.abc import Callable

from mrv1.builder import Builder
from mrv1.config import ModelConfig
from mrv1.models import llama, qwen3

# Model type in config.json -> wiring.
FAMILIES: dict[str, Callable[[Builder, ModelConfig], None]] = {
    "llama": llama.wire,
    "qwen3": qwen3.wire,
}
