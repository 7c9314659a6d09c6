# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The decoder that most families share, as in Llama, and the projections that all share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from mrv1.builder import Builder, Part, Rope, Value, Weight
from mrv1.config import ModelConfig

Config = TypeVar("Config", bound=ModelConfig)
# The second half of a layer, from its index, the normalised input and the residual.
FeedForward: TypeAlias = Callable[[Builder, Config, int, Value, Value], Value]


def wire_decoder(
    p: Builder,
    config: Config,
    *,
    qk_norm: bool = False,
    fused_tensors: bool = False,
    feed_forward: FeedForward[Config] | None = None,
) -> None:
    """Wires a decoder in the shape of Llama: embedding, pre-norm layers, final norm, head.

    Args:
        p: Where to.
        config: Sizes, windows and biases.
        qk_norm: Whether q and k heads are normalised before rope.
        fused_tensors: Whether the checkpoint holds qkv_proj and gate_up_proj, not their parts.
        feed_forward: Wires what stands behind a layer's second norm; None is a gated MLP.
    """
    embed = embedding_table(p, config)
    rope = p.rope(config.rope, config.head_dim)
    x = p.embedding(embed)
    for index in range(config.num_hidden_layers):
        with p.layer(index, f"model.layers.{index}."):
            normed = _norm(p, config, x, "input_layernorm")
            with p.scope("self_attn."):
                qkv = project_qkv(p, config, normed, fused_tensor=fused_tensors)
                mixed = _attention(p, config, qkv, index, rope, qk_norm)
                x = project_attention(p, config, mixed, residual=x)
            normed = _norm(p, config, x, "post_attention_layernorm")
            if feed_forward is not None:
                x = feed_forward(p, config, index, normed, x)
                continue
            with p.scope("mlp."):
                x = gated_mlp(p, config, normed, residual=x, fused_tensor=fused_tensors)
    x = _norm(p, config, x, "model.norm")
    p.logits(x, output_head(p, config, embed))


def _norm(p: Builder, config: ModelConfig, x: Value, name: str) -> Value:
    return p.rms_norm(x, p.vector(f"{name}.weight", config.hidden_size), config.rms_norm_eps)


def _attention(
    p: Builder, config: ModelConfig, qkv: Value, index: int, rope: Rope, qk_norm: bool
) -> Value:
    dim = config.head_dim
    norms = (p.vector("q_norm.weight", dim), p.vector("k_norm.weight", dim)) if qk_norm else None
    return p.attention(
        qkv,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=dim,
        kv_layer=index,
        rope=rope,
        qk_norm=norms,
        eps=config.rms_norm_eps,
        window=config.window(index),
    )


def embedding_table(p: Builder, config: ModelConfig) -> Weight:
    """The embedding [vocab, hidden], which ranks share out by the vocabulary."""
    return p.matrix(
        "model.embed_tokens.weight",
        config.vocab_size,
        config.hidden_size,
        split="rows",
        plain=True,
    )


def project_qkv(p: Builder, config: ModelConfig, x: Value, *, fused_tensor: bool = False) -> Value:
    """Queries, keys and values of all heads: [tokens, hidden] -> [tokens, q | k | v]."""
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    parts = [
        Part(f"{name}_proj", count * config.head_dim, units=count)
        for name, count in zip("qkv", heads, strict=True)
    ]
    if fused_tensor:
        parts = _in_one("qkv_proj", parts)
    return _project(p, x, config.hidden_size, parts, config.attention_bias)


def project_attention(
    p: Builder, config: ModelConfig, mixed: Value, *, residual: Value | None = None
) -> Value:
    """The projection of attention's output: [tokens, heads * dim] -> [tokens, hidden]."""
    return p.linear(
        mixed,
        p.matrix(
            "o_proj.weight",
            config.hidden_size,
            config.num_attention_heads * config.head_dim,
            split="cols",
        ),
        bias=p.vector("o_proj.bias", config.hidden_size) if config.attention_output_bias else None,
        residual=residual,
        row_parallel=True,
    )


def project_gate_up(
    p: Builder, config: ModelConfig, x: Value, *, fused_tensor: bool = False
) -> Value:
    """Both halves of a gated MLP: [tokens, hidden] -> [tokens, gate | up]."""
    parts = [Part(f"{name}_proj", config.intermediate_size) for name in ("gate", "up")]
    if fused_tensor:
        parts = _in_one("gate_up_proj", parts)
    return _project(p, x, config.hidden_size, parts, config.mlp_bias)


def project_down(
    p: Builder, config: ModelConfig, x: Value, *, residual: Value | None = None
) -> Value:
    """The MLP's way back: [tokens, intermediate] -> [tokens, hidden]."""
    return p.linear(
        x,
        p.matrix("down_proj.weight", config.hidden_size, config.intermediate_size, split="cols"),
        bias=p.vector("down_proj.bias", config.hidden_size) if config.mlp_bias else None,
        residual=residual,
        row_parallel=True,
    )


def gated_mlp(
    p: Builder,
    config: ModelConfig,
    x: Value,
    *,
    residual: Value | None = None,
    fused_tensor: bool = False,
) -> Value:
    """down(silu(gate x) * up x) (+ residual): [tokens, hidden] -> [tokens, hidden]."""
    gate_up = project_gate_up(p, config, x, fused_tensor=fused_tensor)
    return project_down(p, config, p.silu_mul(gate_up), residual=residual)


def output_head(p: Builder, config: ModelConfig, embed: Weight) -> Weight:
    """The weight [vocab, hidden] of the logits, which may be the embedding."""
    if config.tie_word_embeddings:
        return embed
    return p.matrix("lm_head.weight", config.vocab_size, config.hidden_size, split="rows")


def _in_one(name: str, parts: list[Part]) -> list[Part]:
    """The parts as they follow each other in one tensor."""
    total = sum(part.rows for part in parts)
    firsts = itertools.accumulate((part.rows for part in parts), initial=0)
    return [
        dataclasses.replace(part, name=name, first=first, total=total)
        for part, first in zip(parts, firsts, strict=False)
    ]


def _project(p: Builder, x: Value, cols: int, parts: list[Part], has_bias: bool) -> Value:
    """A column-parallel linear: ranks compute some of the outputs of each part."""

    def of(kind: str) -> list[Part]:
        return [dataclasses.replace(part, name=f"{part.name}.{kind}") for part in parts]

    return p.linear(
        x,
        p.fused(cols, *of("weight"), split="rows"),
        bias=p.fused_vector(*of("bias"), split="rows") if has_bias else None,
    )
