# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Gemma 2 (Gemma Team 2024): soft caps, norms around both halves of a layer, windows in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from mrv1.builder import Builder, Rope, Value, Weight, round_to
from mrv1.config import (
    ModelConfig,
    read_config,
    read_sliding_layers,
    read_sliding_window,
    read_windows,
)
from mrv1.config_fields import Fields
from mrv1.models.decoder import (
    embedding_table,
    output_head,
    project_attention,
    project_down,
    project_gate_up,
    project_qkv,
)
from mrv1.models.registry import register
from mrv1.rope import RopeConfig

_MAX_CAP: Final = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(ModelConfig):
    """What Gemma has beside the fields of all models.

    Attributes:
        sliding: Which layers have a window; with one that no sequence exceeds, `windows` has none.
        attention_scale: Factor of the scores, 1 / sqrt(query_pre_attn_scalar).
        attention_softcap: Bound of the scores; 0 for none.
        logits_softcap: Bound of the logits; 0 for none.
        local_rope: Rotary embedding of sliding layers; None for that of the others.
        qk_norm: Whether q and k heads are normalised before rope.
        prefix: Of the names of the tensors.
    """

    sliding: tuple[bool, ...]
    attention_scale: float
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    local_rope: RopeConfig | None = None
    qk_norm: bool = False
    prefix: str = ""


def read(fields: Fields) -> GemmaConfig:
    """Reads the config. Layers with and without a window take turns."""
    fields = fields.with_defaults(
        {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        }
    )
    config = read_gemma(fields, lambda layer: layer % 2 == 0)
    return dataclasses.replace(
        config, attention_softcap=_read_cap(fields, "attn_logit_softcapping")
    )


def read_gemma(fields: Fields, slides: Callable[[int], bool]) -> GemmaConfig:
    """Reads what Gemma 2 and 3 have in common.

    Args:
        fields: The config.
        slides: Whether a layer has a window, where there are no layer_types.
    """
    fields.expect("use_bidirectional_attention", False)
    config = read_config(
        fields, head_dim=256, tied=True, activation=("hidden_activation", "gelu_pytorch_tanh")
    )
    sliding = read_sliding_layers(fields, config.num_hidden_layers, slides)
    bias = fields.boolean("attention_bias", False)
    values = {
        "windows": read_windows(fields, config, sliding, read_sliding_window(fields)),
        "attention_bias": bias,
        "attention_output_bias": bias,
    }
    return GemmaConfig(
        **{**vars(config), **values},
        sliding=sliding,
        attention_scale=fields.number("query_pre_attn_scalar", 1e-3, 1e6, default=256.0) ** -0.5,
        logits_softcap=_read_cap(fields, "final_logit_softcapping"),
    )


def _read_cap(fields: Fields, name: str) -> float:
    """Returns a soft cap; 0 where the field is null or missing."""
    return fields.number(name, 1e-3, _MAX_CAP) if fields.has(name) else 0.0


def wire(p: Builder, config: GemmaConfig) -> None:
    """Wires the model. Norms multiply by 1 + weight."""
    with p.scope(config.prefix):
        embed = embedding_table(p, config)
        rope = p.rope(config.rope, config.head_dim)
        local = p.rope(config.local_rope, config.head_dim) if config.local_rope else rope
        # The scale is rounded as a weight would be.
        x = p.embedding(embed, scale=round_to(p.dtype, config.hidden_size**0.5))
        for index in range(config.num_hidden_layers):
            with p.layer(index, f"model.layers.{index}."):
                y = _norm(p, config, x, "input_layernorm")
                y = _attention(p, config, y, index, local if config.sliding[index] else rope)
                x = p.add(x, _norm(p, config, y, "post_attention_layernorm"))
                y = _norm(p, config, x, "pre_feedforward_layernorm")
                with p.scope("mlp."):
                    y = project_down(p, config, p.gelu_mul(project_gate_up(p, config, y)))
                x = p.add(x, _norm(p, config, y, "post_feedforward_layernorm"))
        x = _norm(p, config, x, "model.norm")
        p.logits(x, output_head(p, config, embed), softcap=config.logits_softcap)


def _norm(p: Builder, config: GemmaConfig, x: Value, name: str) -> Value:
    weight = p.vector(f"{name}.weight", config.hidden_size, offset=1.0)
    return p.rms_norm(x, weight, config.rms_norm_eps)


def _attention(p: Builder, config: GemmaConfig, x: Value, index: int, rope: Rope) -> Value:
    dim = config.head_dim
    norms: tuple[Weight, Weight] | None = None
    with p.scope("self_attn."):
        qkv = project_qkv(p, config, x)
        if config.qk_norm:
            q_norm, k_norm = (p.vector(f"{name}_norm.weight", dim, offset=1.0) for name in "qk")
            norms = q_norm, k_norm
        mixed = p.attention(
            qkv,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=dim,
            kv_layer=index,
            rope=rope,
            qk_norm=norms,
            eps=config.rms_norm_eps,
            scale=config.attention_scale,
            window=config.window(index),
            softcap=config.attention_softcap,
        )
        return project_attention(p, config, mixed)


register("gemma2", architecture="Gemma2ForCausalLM", read=read, wire=wire)
