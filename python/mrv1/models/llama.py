# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024)."""

from __future__ import annotations

from mrv1.builder import Builder, Rope, Value, Weight
from mrv1.config import ModelConfig


def wire(p: Builder, config: ModelConfig) -> None:
    """Wires the model: embedding, pre-norm decoder layers, final norm, head."""
    wire_decoder(p, config, qk_norm=False)


def wire_decoder(p: Builder, config: ModelConfig, *, qk_norm: bool) -> None:
    """Wires a decoder in the shape of Llama.

    Args:
        p: Where to.
        config: Sizes.
        qk_norm: Whether q and k heads are normalised before rope.
    """
    hidden = config.hidden_size
    embed = p.matrix("model.embed_tokens.weight", config.vocab_size, hidden)
    rope = p.rope(config.rope, config.head_dim)
    x = p.embedding(embed)
    for index in range(config.num_hidden_layers):
        with p.layer(index, f"model.layers.{index}."):
            x = _attention(p, config, x, index, rope, qk_norm)
            x = _mlp(p, config, x)
    x = p.rms_norm(x, p.vector("model.norm.weight", hidden), config.rms_norm_eps)
    tied = config.tie_word_embeddings
    p.logits(x, embed if tied else p.matrix("lm_head.weight", config.vocab_size, hidden))


def _attention(
    p: Builder, config: ModelConfig, x: Value, index: int, rope: Rope, qk_norm: bool
) -> Value:
    hidden, dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
    q_size, kv_size = config.num_attention_heads * dim, config.num_key_value_heads * dim
    normed = p.rms_norm(x, p.vector("input_layernorm.weight", hidden), eps)
    norms: tuple[Weight, Weight] | None = None
    with p.scope("self_attn."):
        sizes = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
        qkv = p.linear(
            normed,
            p.fused(hidden, *((f"{name}.weight", size) for name, size in sizes)),
            bias=p.fused_vector(*((f"{name}.bias", size) for name, size in sizes))
            if config.attention_bias
            else None,
        )
        if qk_norm:
            norms = p.vector("q_norm.weight", dim), p.vector("k_norm.weight", dim)
        mixed = p.attention(
            qkv,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=dim,
            kv_layer=index,
            rope=rope,
            qk_norm=norms,
            eps=eps,
        )
        return p.linear(
            mixed,
            p.matrix("o_proj.weight", hidden, q_size),
            bias=p.vector("o_proj.bias", hidden) if config.attention_bias else None,
            residual=x,
            row_parallel=True,
        )


def _mlp(p: Builder, config: ModelConfig, x: Value) -> Value:
    hidden, size = config.hidden_size, config.intermediate_size
    normed = p.rms_norm(x, p.vector("post_attention_layernorm.weight", hidden), config.rms_norm_eps)
    with p.scope("mlp."):
        gate_up = p.linear(
            normed,
            p.fused(hidden, ("gate_proj.weight", size), ("up_proj.weight", size)),
            bias=p.fused_vector(("gate_proj.bias", size), ("up_proj.bias", size))
            if config.mlp_bias
            else None,
        )
        return p.linear(
            p.silu_mul(gate_up),
            p.matrix("down_proj.weight", hidden, size),
            bias=p.vector("down_proj.bias", hidden) if config.mlp_bias else None,
            residual=x,
            row_parallel=True,
        )
