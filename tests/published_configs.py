# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The config.json of published checkpoints, with the fields that matter, and their parameters."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def _config(model_type: str, architecture: str, sizes: tuple[int, ...], **own: Any) -> Json:
    """Sizes: layers, hidden, heads, key/value heads, intermediate, vocabulary, positions."""
    names = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    )
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        **dict(zip(names, sizes, strict=True)),
        **own,
    }


_SILU: Json = {"hidden_act": "silu", "attention_dropout": 0.0}
_GEMMA: Json = {
    "attention_bias": False,
    "cache_implementation": "hybrid",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
}
_PHI: Json = {
    **_SILU,
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
}

# Name -> config.json and number of parameters.
PUBLISHED: dict[str, tuple[Json, int]] = {
    "Qwen2.5-0.5B": (
        _config(
            "qwen2",
            "Qwen2ForCausalLM",
            (24, 896, 14, 2, 4864, 151936, 32768),
            **_SILU,
            max_window_layers=24,
            rms_norm_eps=1e-06,
            rope_theta=1000000.0,
            sliding_window=32768,
            tie_word_embeddings=True,
            use_mrope=False,
            use_sliding_window=False,
        ),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        _config(
            "qwen3",
            "Qwen3ForCausalLM",
            (28, 1024, 16, 8, 3072, 151936, 40960),
            **_SILU,
            attention_bias=False,
            head_dim=128,
            max_window_layers=28,
            rms_norm_eps=1e-06,
            rope_scaling=None,
            rope_theta=1000000,
            sliding_window=None,
            tie_word_embeddings=True,
            use_sliding_window=False,
        ),
        596_049_920,
    ),
    "Llama-3.2-1B": (
        _config(
            "llama",
            "LlamaForCausalLM",
            (16, 2048, 32, 8, 8192, 128256, 131072),
            **_SILU,
            attention_bias=False,
            head_dim=64,
            mlp_bias=False,
            pretraining_tp=1,
            rms_norm_eps=1e-05,
            rope_scaling={
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            rope_theta=500000.0,
            tie_word_embeddings=True,
        ),
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        _config(
            "mistral",
            "MistralForCausalLM",
            (32, 4096, 32, 8, 14336, 32000, 32768),
            **_SILU,
            rms_norm_eps=1e-05,
            rope_theta=10000.0,
            sliding_window=4096,
            tie_word_embeddings=False,
        ),
        7_241_732_096,
    ),
    "Mistral-Nemo-Base-2407": (
        _config(
            "mistral",
            "MistralForCausalLM",
            (40, 5120, 32, 8, 14336, 131072, 128000),
            **_SILU,
            head_dim=128,
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
        12_247_782_400,
    ),
    "gemma-2-2b": (
        _config(
            "gemma2",
            "Gemma2ForCausalLM",
            (26, 2304, 8, 4, 9216, 256000, 8192),
            **_GEMMA,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            hidden_act="gelu_pytorch_tanh",
            rope_theta=10000.0,
            sliding_window=4096,
        ),
        2_614_341_888,
    ),
    "gemma-3-1b-pt": (
        _config(
            "gemma3_text",
            "Gemma3ForCausalLM",
            (26, 1152, 4, 1, 6912, 262144, 32768),
            **_GEMMA,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            rope_local_base_freq=10000,
            rope_scaling=None,
            rope_theta=1000000,
            sliding_window=512,
            sliding_window_pattern=6,
        ),
        999_885_952,
    ),
    # A vision tower is beside the text model, and most of its fields are left out: 262,208 tokens.
    "gemma-3-4b-it": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16",
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        },
        3_880_263_168,
    ),
    "ERNIE-4.5-0.3B-PT": (
        _config(
            "ernie4_5",
            "Ernie4_5ForCausalLM",
            (18, 1024, 16, 2, 3072, 103424, 131072),
            head_dim=128,
            hidden_act="silu",
            rms_norm_eps=1e-05,
            rope_scaling=None,
            rope_theta=500000.0,
            tie_word_embeddings=True,
            use_bias=False,
        ),
        360_748_032,
    ),
    "Phi-3-mini-4k-instruct": (
        _config(
            "phi3",
            "Phi3ForCausalLM",
            (32, 3072, 32, 32, 8192, 32064, 4096),
            **_PHI,
            original_max_position_embeddings=4096,
            rope_scaling=None,
            sliding_window=2047,
            tie_word_embeddings=False,
        ),
        3_821_079_552,
    ),
    # The factors of this and the next are not the published ones, which nothing here depends on.
    "Phi-3-mini-128k-instruct": (
        _config(
            "phi3",
            "Phi3ForCausalLM",
            (32, 3072, 32, 32, 8192, 32064, 131072),
            **_PHI,
            original_max_position_embeddings=4096,
            rope_scaling={
                "long_factor": [1.0 + i for i in range(48)],
                "short_factor": [1.0 + i / 50 for i in range(48)],
                "type": "longrope",
            },
            sliding_window=262144,
            tie_word_embeddings=False,
        ),
        3_821_079_552,
    ),
    "Phi-4-mini-instruct": (
        _config(
            "phi3",
            "Phi3ForCausalLM",
            (32, 3072, 24, 8, 8192, 200064, 131072),
            **_PHI,
            mlp_bias=False,
            original_max_position_embeddings=4096,
            partial_rotary_factor=0.75,
            rope_scaling={
                "long_factor": [1.0 + i for i in range(48)],
                "short_factor": [1.0] * 48,
                "type": "longrope",
            },
            sliding_window=262144,
            tie_word_embeddings=True,
        ),
        3_836_021_760,
    ),
    "phi-4": (
        _config(
            "phi3",
            "Phi3ForCausalLM",
            (40, 5120, 40, 10, 17920, 100352, 16384),
            **{**_PHI, "rope_theta": 250000},
            original_max_position_embeddings=16384,
            rope_scaling=None,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
        14_659_507_200,
    ),
    "Qwen3-30B-A3B": (
        _config(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            (48, 2048, 32, 4, 6144, 151936, 40960),
            **_SILU,
            attention_bias=False,
            decoder_sparse_step=1,
            head_dim=128,
            max_window_layers=48,
            mlp_only_layers=[],
            moe_intermediate_size=768,
            norm_topk_prob=True,
            num_experts=128,
            num_experts_per_tok=8,
            output_router_logits=False,
            rms_norm_eps=1e-06,
            rope_scaling=None,
            rope_theta=1000000.0,
            router_aux_loss_coef=0.001,
            sliding_window=None,
            tie_word_embeddings=False,
            use_sliding_window=False,
        ),
        30_532_122_624,
    ),
    "Mixtral-8x7B-v0.1": (
        _config(
            "mixtral",
            "MixtralForCausalLM",
            (32, 4096, 32, 8, 14336, 32000, 32768),
            **_SILU,
            num_experts_per_tok=2,
            num_local_experts=8,
            output_router_logits=False,
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            router_aux_loss_coef=0.02,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
        46_702_792_704,
    ),
    # Without the layer that predicts one token more.
    "ERNIE-4.5-21B-A3B-PT": (
        _config(
            "ernie4_5_moe",
            "Ernie4_5_MoeForCausalLM",
            (28, 2560, 20, 4, 12288, 103424, 131072),
            hidden_act="silu",
            moe_capacity=[64, 64, 64],
            moe_gate="topk",
            moe_intermediate_size=1536,
            moe_k=6,
            moe_layer_interval=1,
            moe_layer_start_index=1,
            moe_num_experts=64,
            moe_num_shared_experts=2,
            moe_use_aux_free=True,
            num_nextn_predict_layers=1,
            rms_norm_eps=1e-05,
            rope_theta=500000.0,
            tie_word_embeddings=True,
            use_bias=False,
        ),
        21_825_437_888,
    ),
}
