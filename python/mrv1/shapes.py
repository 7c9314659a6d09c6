# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Named shapes of public models, as the config.json that each would have.

A shape is what timing depends on: sizes, not weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mrv1.errors import InvalidArgumentError

# A shape that is a directory: the model that the package brings.
DEMO: Final = "demo"


def _qwen3(
    layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, *, tied: bool
) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def _llama3(
    layers: int,
    hidden: int,
    head_dim: int,
    intermediate: int,
    max_positions: int,
    *,
    tied: bool,
    rope_factor: float | None = None,
) -> dict[str, object]:
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "dtype": "bfloat16",
        "eos_token_id": 128001,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "vocab_size": 128256,
    }
    if rope_factor is not None:
        config["rope_scaling"] = {
            "factor": rope_factor,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    return config


def _shape(
    model_type: str,
    architecture: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    max_positions: int,
    **own: object,
) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_positions,
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab,
        **own,
    }


_CONFIGS: Final[dict[str, dict[str, object]]] = {
    "qwen3-0.6b": _qwen3(28, 1024, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 8, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 8, 12288, tied=False),
    "llama3.2-1b": _llama3(16, 2048, 64, 8192, 131072, tied=True, rope_factor=32.0),
    "llama3-8b": _llama3(32, 4096, 128, 14336, 8192, tied=False),
    "qwen2.5-0.5b": _shape(
        "qwen2",
        "Qwen2ForCausalLM",
        24,
        896,
        14,
        2,
        4864,
        151936,
        32768,
        rope_theta=1e6,
        tie_word_embeddings=True,
        eos_token_id=151643,
    ),
    "mistral-7b": _shape(
        "mistral",
        "MistralForCausalLM",
        32,
        4096,
        32,
        8,
        14336,
        32000,
        32768,
        sliding_window=4096,
        eos_token_id=2,
    ),
    "gemma-2-2b": _shape(
        "gemma2",
        "Gemma2ForCausalLM",
        26,
        2304,
        8,
        4,
        9216,
        256000,
        8192,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        eos_token_id=1,
    ),
    "gemma-3-1b": _shape(
        "gemma3_text",
        "Gemma3ForCausalLM",
        26,
        1152,
        4,
        1,
        6912,
        262144,
        32768,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        eos_token_id=1,
    ),
    "ernie-4.5-0.3b": _shape(
        "ernie4_5",
        "Ernie4_5ForCausalLM",
        18,
        1024,
        16,
        2,
        3072,
        103424,
        131072,
        head_dim=128,
        eos_token_id=2,
    ),
    "qwen3-30b-a3b": {
        **_qwen3(48, 2048, 32, 4, 6144, tied=False),
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "mixtral-8x7b": _shape(
        "mixtral",
        "MixtralForCausalLM",
        32,
        4096,
        32,
        8,
        14336,
        32000,
        32768,
        num_experts_per_tok=2,
        num_local_experts=8,
        rope_theta=1e6,
        eos_token_id=2,
    ),
    "ernie-4.5-21b-a3b": _shape(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        28,
        2560,
        20,
        4,
        12288,
        103424,
        131072,
        moe_intermediate_size=1536,
        moe_k=6,
        moe_layer_start_index=1,
        moe_num_experts=64,
        moe_num_shared_experts=2,
        eos_token_id=2,
    ),
    "phi-4-mini": _shape(
        "phi3",
        "Phi3ForCausalLM",
        32,
        3072,
        24,
        8,
        8192,
        200064,
        131072,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=4096,
        # Timing does not depend on the factors' values.
        rope_scaling={"type": "longrope", "long_factor": [2.0] * 48, "short_factor": [1.0] * 48},
        tie_word_embeddings=True,
        eos_token_id=199999,
    ),
}

NAMES: Final = (*_CONFIGS, DEMO)


def demo_model() -> Path:
    """The directory of the demo model in the package."""
    return Path(__file__).resolve().parent / "demo"


def shape_config(name: str, num_layers: int | None = None) -> tuple[str, dict[str, object]]:
    """Returns a shape's full name and its config.json.

    Args:
        name: One of `NAMES`, but not `DEMO`, which has a directory of its own.
        num_layers: Leaves only the first layers, for quick runs; the full name then says so.

    Raises:
        InvalidArgumentError: No such shape, or not that many layers.
    """
    found = _CONFIGS.get(name)
    if found is None:
        raise InvalidArgumentError(field="shape", value=name, allowed=f"one of {', '.join(NAMES)}")
    config = dict(found)
    if num_layers is None:
        return name, config
    most = config["num_hidden_layers"]
    assert isinstance(most, int)
    if not 1 <= num_layers <= most:
        raise InvalidArgumentError(
            field="layers", value=num_layers, allowed=f"in [1, {most}] for {name}"
        )
    config["num_hidden_layers"] = num_layers
    return f"{name}/{num_layers}-layers", config
