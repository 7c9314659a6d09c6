# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Writes the table of features in docs/parallel.md by wiring a model with each.

python scripts/make_parallel_table.py            # rewrites the table
python scripts/make_parallel_table.py --check    # exits with 1 if the table is out of date
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from document_table import main, markdown
from mrv1.config import ModelConfig
from mrv1.errors import InvalidArgumentError
from mrv1.loader import RunnerOptions, wire_ranks
from mrv1.shapes import shape_config

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "parallel.md"
SIZES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("2 ranks", {"tensor_parallel_size": 2}),
    ("3 ranks", {"tensor_parallel_size": 3}),
    ("4 ranks", {"tensor_parallel_size": 4}),
    ("8 ranks", {"tensor_parallel_size": 8}),
    ("2 stages", {"pipeline_parallel_size": 2}),
    ("4 stages", {"pipeline_parallel_size": 4}),
    ("2 stages of 2 ranks", {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}),
    ("4 stages of 2 ranks", {"pipeline_parallel_size": 4, "tensor_parallel_size": 2}),
)
# A model that they share out.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48000,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 24,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
}
LLAMA_3_8B = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
LLAMA_3_8B |= {"vocab_size": 128256}
_, QWEN3_30B = shape_config("qwen3-30b-a3b", 4)
FEATURES: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("24 heads, an MLP of 12,288 columns, 48,000 ids", {}, {}),
    ("the same with one key/value head, which all ranks have", {"num_key_value_heads": 1}, {}),
    ("the sizes of Llama 3 8B", LLAMA_3_8B, {}),
    ("layers with experts, in the sizes of Qwen3 30B-A3B", QWEN3_30B, {}),
    ("the same with `expert_parallel=True`", QWEN3_30B, {"expert_parallel": True}),
    ("a vocabulary of 50,257 ids", {"vocab_size": 50257}, {}),
    ("3 layers", {"num_hidden_layers": 3}, {}),
    ("`pipeline_layers=[17, 15]`", {}, {"pipeline_layers": [17, 15]}),
    ("`batch_invariant=True`", {}, {"batch_invariant": True}),
    ("`speculative_config`", {}, {"speculative_config": {"method": "ngram"}}),
    ('`kv_cache_dtype="fp8_e4m3"`', {}, {"kv_cache_dtype": "fp8_e4m3"}),
    ('`kv_cache_dtype="fp8_e5m2"`', {}, {"kv_cache_dtype": "fp8_e5m2"}),
    ('`graph_mode="full"`', {}, {"graph_mode": "full"}),
    ('`graph_mode="piecewise"`', {}, {"graph_mode": "piecewise"}),
    ("`keep_hidden_states=True`", {}, {"keep_hidden_states": True}),
    ("`max_logprobs=-1`", {}, {"max_logprobs": -1}),
    ("`stream=` of the caller", {}, {"stream": 1}),
    ("`MRV1_TUNE=1`", {}, {"environment": {"MRV1_TUNE": "1"}}),
    ("`MRV1_USE_TBO=1`", {}, {"environment": {"MRV1_USE_TBO": "1"}}),
)


def refusal(sizes: dict[str, Any], model: dict[str, Any], options: dict[str, Any]) -> str | None:
    """The sentence by which the checks at the start refuse it, if they do."""
    config = ModelConfig.from_values({**MODEL, **model})
    environment = options.get("environment", {})
    options = {name: value for name, value in options.items() if name != "environment"}
    os.environ.update(environment)
    try:
        wire_ranks(config, "bfloat16", RunnerOptions(**options, **sizes))
    except InvalidArgumentError as error:
        return str(error)
    finally:
        for name in environment:
            del os.environ[name]
    return None


def table() -> str:
    """Returns the table in Markdown, one row a feature, and the sentences of what is refused."""
    notes: list[str] = []

    def cell(sentence: str | None) -> str:
        if sentence is None:
            return "yes"
        if sentence not in notes:
            notes.append(sentence)
        return f"no ({notes.index(sentence) + 1})"

    rows = [
        (name, *(cell(refusal(sizes, model, options)) for _, sizes in SIZES))
        for name, model, options in FEATURES
    ]
    listed = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(notes, start=1))
    return f"{markdown(('', *(name for name, _ in SIZES)), rows)}\n\n{listed}"


if __name__ == "__main__":
    sys.exit(main("make_parallel_table.py", DOCUMENT, table))
