# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The decoder that most families share, as in Llama, and the projections that all share."""

from __future__ import annotations

from mrv1.builder import Builder, Rope, Value, Weight
from mrv1.config import ModelConfig


def wire_decoder(
    p: Builder, config: ModelConfig, *, qk_norm: bool = False, fused_tensors: bool = False
) -> None:
    """Wires a decoder in the shape of Llama: embedding, pre-norm layers, final norm, head.

    Args:
        p: Where to.
        config: Sizes, windows and biases.
        qk_norm: Whether q and k heads are normalised before rope.
        fused_tensors: Whether the checkpoint holds qkv_proj and gate_up_proj, not their parts.
    """
    embed = p.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
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
            with p.scope("mlp."):
                gate_up = project_gate_up(p, config, normed, fused_tensor=fused_tensors)
                x = project_down(p, config, p.silu_mul(gate_up), residual=x)
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


def project_qkv(p: Builder, config: ModelConfig, x: Value, *, fused_tensor: bool = False) -> Value:
    """Queries, keys and values of all heads: [tokens, hidden] -> [tokens, q | k | v]."""
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    parts = [("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)]
    if fused_tensor:
        parts = [("qkv_proj", q_size + 2 * kv_size)]
    return _project(p, x, config.hidden_size, parts, config.attention_bias)


def project_attention(
    p: Builder, config: ModelConfig, mixed: Value, *, residual: Value | None = None
) -> Value:
    """The projection of attention's output: [tokens, heads * dim] -> [tokens, hidden]."""
    return p.linear(
        mixed,
        p.matrix("o_proj.weight", config.hidden_size, config.num_attention_heads * config.head_dim),
        bias=p.vector("o_proj.bias", config.hidden_size) if config.attention_output_bias else None,
        residual=residual,
        row_parallel=True,
    )


def project_gate_up(
    p: Builder, config: ModelConfig, x: Value, *, fused_tensor: bool = False
) -> Value:
    """Both halves of a gated MLP: [tokens, hidden] -> [tokens, gate | up]."""
    size = config.intermediate_size
    parts = (
        [("gate_up_proj", 2 * size)] if fused_tensor else [("gate_proj", size), ("up_proj", size)]
    )
    return _project(p, x, config.hidden_size, parts, config.mlp_bias)


def project_down(
    p: Builder, config: ModelConfig, x: Value, *, residual: Value | None = None
) -> Value:
    """The MLP's way back: [tokens, intermediate] -> [tokens, hidden]."""
    return p.linear(
        x,
        p.matrix("down_proj.weight", config.hidden_size, config.intermediate_size),
        bias=p.vector("down_proj.bias", config.hidden_size) if config.mlp_bias else None,
        residual=residual,
        row_parallel=True,
    )


def output_head(p: Builder, config: ModelConfig, embed: Weight) -> Weight:
    """The weight [vocab, hidden] of the logits, which may be the embedding."""
    if config.tie_word_embeddings:
        return embed
    return p.matrix("lm_head.weight", config.vocab_size, config.hidden_size)


def _project(
    p: Builder, x: Value, cols: int, parts: list[tuple[str, int]], has_bias: bool
) -> Value:
    biases = [(f"{name}.bias", rows) for name, rows in parts]
    return p.linear(
        x,
        p.fused(cols, *((f"{name}.weight", rows) for name, rows in parts)),
        bias=p.fused_vector(*biases) if has_bias else None,
    )
