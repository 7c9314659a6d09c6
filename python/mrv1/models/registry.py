# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The families that are known, by their model type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mrv1.builder import Builder
from mrv1.config import ModelConfig
from mrv1.config_fields import Fields
from mrv1.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: The config.json's model_type.
        architecture: The one entry of its architectures.
        read: Checks the config.json and returns what wiring needs: a `ModelConfig` or a class
            derived from it. All that it can say and that would change the model's output is either
            computed or refused by a ConfigError.
        wire: Wires the ops of the model that `read` described.
        other_tensors: Prefixes of tensors that a checkpoint may hold beside those of the model; all
            others that nothing uses are refused.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    wire: Callable[[Builder, Any], None]
    other_tensors: tuple[str, ...] = ()


# Model type in config.json -> family.
FAMILIES: dict[str, Family] = {}


def register(
    model_type: str,
    *,
    architecture: str,
    read: Callable[[Fields], ModelConfig],
    wire: Callable[[Builder, Any], None],
    other_tensors: tuple[str, ...] = (),
) -> Family:
    """Makes a family known to `LLM`, `Engine` and `ModelRunner`; arguments as those of `Family`.

    Raises:
        InvalidArgumentError: There is a family of this model type.
    """
    if model_type in FAMILIES:
        raise InvalidArgumentError(
            field="model_type", value=model_type, allowed=f"none of {', '.join(FAMILIES)}"
        )
    family = Family(model_type, architecture, read, wire, other_tensors)
    FAMILIES[model_type] = family
    return family
