# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The small random models of scripts/make_goldens.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One model: its config.json as it is written, and how its weights are drawn and stored.

    Attributes:
        name: Directory and golden name.
        seed: Seed of the weights; the prompts use seed + 1.
        config: The content of config.json, in the spelling that the directory shall show.
        eos: Content of generation_config.json's eos_token_id, one id or several.
        dtype: Dtype of the stored weights.
        max_shard_bytes: Largest safetensors file before the weights are split.
        embed_std: Standard deviation of the token embedding.
        special_tokens: Special tokens by id order; at the vocabulary's start or its end.
        own_tokenizer: Whether a tokenizer is written; without one the tests take that of
            qwen3-tied, which has as many tokens and the same special ones.
        long_golden: Whether there is a second golden, `name`-long, for sequences that may exceed
            original_max_position_embeddings; those of the first do not.
        special_first: Whether the special tokens have the lowest ids.
        bos: The token that the tokenizer puts in front of a text, if it does.
        num_candidates: Prompts of each length that are tried.
    """

    name: str
    seed: int
    config: Json
    eos: int | list[int]
    dtype: torch.dtype
    max_shard_bytes: int
    embed_std: float
    special_tokens: tuple[str, ...]
    own_tokenizer: bool = True
    long_golden: bool = False
    special_first: bool = False
    bos: str | None = None
    num_candidates: int = 2048

    @property
    def eos_ids(self) -> list[int]:
        """The end-of-sequence ids as a list."""
        return [self.eos] if isinstance(self.eos, int) else self.eos

    @property
    def special_ids(self) -> range:
        """Ids of the special tokens, in the order of `special_tokens`."""
        first = 0 if self.special_first else self.config["vocab_size"] - len(self.special_tokens)
        return range(first, first + len(self.special_tokens))


QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA2_SPECIAL = ("<unk>", "<s>", "</s>")
LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def _plain(
    name: str,
    seed: int,
    config: Json,
    *,
    embed_std: float,
    long_golden: bool = False,
    num_candidates: int = 2048,
) -> ModelSpec:
    """A bfloat16 model in one file, with the vocabulary of qwen3-tied."""
    shared = {
        "attention_dropout": 0.0,
        "bos_token_id": 381,
        "eos_token_id": 383,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
        "pad_token_id": None,
        "use_cache": True,
        "vocab_size": 384,
    }
    return ModelSpec(
        name=name,
        seed=seed,
        config={**shared, **config},
        eos=[383, 381],
        dtype=torch.bfloat16,
        max_shard_bytes=1_000_000,
        embed_std=embed_std,
        special_tokens=QWEN_SPECIAL,
        own_tokenizer=False,
        long_golden=long_golden,
        num_candidates=num_candidates,
    )


SPECS = (
    # Old spelling (rope_theta, rope_scaling, torch_dtype), num_heads * head_dim != hidden_size.
    ModelSpec(
        name="qwen3-tied",
        seed=1005,
        config={
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 381,
            "eos_token_id": 383,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 176,
            "max_position_embeddings": 512,
            "max_window_layers": 2,
            "model_type": "qwen3",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 384,
        },
        eos=[383, 381],
        dtype=torch.bfloat16,
        max_shard_bytes=1_000_000,
        embed_std=0.12,
        special_tokens=QWEN_SPECIAL,
    ),
    # New spelling (rope_parameters, dtype, layer_types), float32, two shards or more, 3:1 heads.
    ModelSpec(
        name="qwen3-untied",
        seed=2001,
        config={
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "dtype": "float32",
            "eos_token_id": 319,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 80,
            "initializer_range": 0.02,
            "intermediate_size": 104,
            "layer_types": ["full_attention", "full_attention"],
            "max_position_embeddings": 512,
            "max_window_layers": 2,
            "model_type": "qwen3",
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "pad_token_id": None,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": False,
            "transformers_version": transformers.__version__,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 320,
        },
        eos=[319, 317],
        dtype=torch.float32,
        max_shard_bytes=300_000,
        embed_std=0.02,
        special_tokens=QWEN_SPECIAL,
    ),
    # The oldest spelling: rope_theta, head_dim and the bias switches are left to their defaults.
    ModelSpec(
        name="llama2",
        seed=3001,
        config={
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 208,
            "max_position_embeddings": 512,
            "model_type": "llama",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.31.0",
            "use_cache": True,
            "vocab_size": 328,
        },
        eos=2,
        dtype=torch.float16,
        max_shard_bytes=1_000_000,
        embed_std=0.02,
        special_tokens=LLAMA2_SPECIAL,
        special_first=True,
        bos="<s>",
    ),
    # New spelling with llama3 scaling; 64 original positions put 164 tokens in all three bands.
    ModelSpec(
        name="llama3-tied",
        seed=4001,
        config={
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 380,
            "dtype": "bfloat16",
            "eos_token_id": [381, 382, 383],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 208,
            "max_position_embeddings": 512,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "pad_token_id": None,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
            "transformers_version": transformers.__version__,
            "use_cache": True,
            "vocab_size": 384,
        },
        eos=[381, 382, 383],
        dtype=torch.bfloat16,
        max_shard_bytes=1_000_000,
        embed_std=0.25,
        special_tokens=LLAMA3_SPECIAL,
        bos="<|begin_of_text|>",
    ),
    # Old spelling with llama3 scaling, untied, shards, no head_dim in the config.
    ModelSpec(
        name="llama3-untied",
        seed=5001,
        config={
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 380,
            "eos_token_id": [381, 382, 383],
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 160,
            "max_position_embeddings": 512,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0",
            "use_cache": True,
            "vocab_size": 384,
        },
        eos=[381, 382, 383],
        dtype=torch.bfloat16,
        max_shard_bytes=300_000,
        embed_std=0.02,
        special_tokens=LLAMA3_SPECIAL,
        bos="<|begin_of_text|>",
    ),
    # New spelling, biases on q, k and v; the second layer has a window.
    _plain(
        "qwen2",
        6001,
        {
            "architectures": ["Qwen2ForCausalLM"],
            "dtype": "bfloat16",
            "hidden_size": 128,
            "intermediate_size": 176,
            "layer_types": ["full_attention", "sliding_attention"],
            "max_window_layers": 1,
            "model_type": "qwen2",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_window": 8,
            "tie_word_embeddings": True,
            "transformers_version": transformers.__version__,
            "use_sliding_window": True,
        },
        embed_std=0.2,
    ),
    # Old spelling, a window in all layers, num_heads * head_dim != hidden_size.
    _plain(
        "mistral",
        7001,
        {
            "architectures": ["MistralForCausalLM"],
            "head_dim": 64,
            "hidden_size": 96,
            "intermediate_size": 176,
            "model_type": "mistral",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 8,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.0",
        },
        embed_std=0.02,
    ),
    # Old spelling; windows take turns by default, both caps are met, the scale is not head_dim's.
    _plain(
        "gemma2",
        8001,
        {
            "architectures": ["Gemma2ForCausalLM"],
            "attention_bias": False,
            "attn_logit_softcapping": 4.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 9.0,
            "head_dim": 32,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 96,
            "intermediate_size": 176,
            "model_type": "gemma2",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 20,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 8,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.4",
        },
        embed_std=0.3,
    ),
    # New spelling: two rotary embeddings, by type of layer.
    _plain(
        "gemma3",
        9001,
        {
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "dtype": "bfloat16",
            "final_logit_softcapping": None,
            "head_dim": 64,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 96,
            "intermediate_size": 144,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "model_type": "gemma3_text",
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 50,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {
                "full_attention": {
                    "factor": 8.0,
                    "rope_theta": 1000000.0,
                    "rope_type": "linear",
                },
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "sliding_window": 8,
            "tie_word_embeddings": True,
            "transformers_version": transformers.__version__,
            "use_bidirectional_attention": False,
        },
        embed_std=0.3,
    ),
    # Biases everywhere, rotary pairs side by side.
    _plain(
        "ernie4_5",
        10001,
        {
            "architectures": ["Ernie4_5ForCausalLM"],
            "head_dim": 32,
            "hidden_size": 96,
            "intermediate_size": 176,
            "model_type": "ernie4_5",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.54.0",
            "use_bias": True,
        },
        embed_std=0.25,
    ),
    # As Phi-3-mini-4k: fused projections and a window that is no multiple of anything.
    _plain(
        "phi3",
        11001,
        {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "hidden_size": 96,
            "intermediate_size": 144,
            "model_type": "phi3",
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "num_key_value_heads": 3,
            "original_max_position_embeddings": 512,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 11,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.2",
        },
        embed_std=0.02,
    ),
    # As Phi-4-mini: longrope over three quarters of a head.
    _plain(
        "phi4-mini",
        12001,
        {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "hidden_size": 128,
            "intermediate_size": 176,
            "model_type": "phi3",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 192,
            "partial_rotary_factor": 0.75,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "long_factor": [1, 1.2, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16, 20],
                "short_factor": [1, 1, 1, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.2, 2.5],
                "type": "longrope",
            },
            "rope_theta": 10000.0,
            "sliding_window": 2048,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0",
        },
        embed_std=0.2,
        long_golden=True,
    ),
    # Weights of a token's experts that are not normalised; the middle layer has none.
    _plain(
        "qwen3_moe",
        13004,
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 32,
            "hidden_size": 64,
            "intermediate_size": 96,
            "max_window_layers": 3,
            "mlp_only_layers": [1],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 32,
            "norm_topk_prob": False,
            "num_attention_heads": 4,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_sliding_window": False,
        },
        embed_std=0.02,
        num_candidates=512,
    ),
    # Two of few experts, whose weights are normalised, and a window.
    _plain(
        "mixtral",
        14001,
        {
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 48,
            "model_type": "mixtral",
            "num_attention_heads": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": 8,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.36.0",
        },
        embed_std=0.02,
        num_candidates=512,
    ),
    # A corrected choice among experts, an odd number of them, two shared ones; dense at first.
    _plain(
        "ernie4_5_moe",
        15004,
        {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "head_dim": 32,
            "hidden_size": 64,
            "intermediate_size": 96,
            "model_type": "ernie4_5_moe",
            "moe_capacity": [64, 64, 64],
            "moe_gate": "topk",
            "moe_intermediate_size": 32,
            "moe_k": 3,
            "moe_layer_interval": 1,
            "moe_layer_start_index": 1,
            "moe_num_experts": 11,
            "moe_num_shared_experts": 2,
            "moe_use_aux_free": True,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.54.0",
            "use_bias": False,
        },
        embed_std=0.25,
    ),
)
