# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Small configurations and safetensors files for the tests of the readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]

QWEN3: Json = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": 5,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 160,
    "intermediate_size": 176,
    "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 512,
    "model_type": "qwen3",
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 384,
}

LLAMA: Json = {
    "architectures": ["LlamaForCausalLM"],
    "eos_token_id": [2, 3, 2],
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 208,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "float16",
    "vocab_size": 384,
}

GENERATION: Json = {"eos_token_id": [7, 9], "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def write_model(directory: Path, config: object, generation: object = None) -> Path:
    """Writes config.json and, unless None, generation_config.json; returns the directory."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return directory


def safetensors_bytes(header: object, buffer: bytes) -> bytes:
    """Returns a safetensors file with this header as JSON."""
    text = json.dumps(header).encode("utf-8")
    return len(text).to_bytes(8, "little") + text + buffer
