# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Configs of the families: published ones, both spellings, and what each refuses by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_data import DATA_DIR, load_golden
from mrv1.config import ModelConfig
from mrv1.errors import ConfigError, InvalidArgumentError
from mrv1.loader import wire_model
from mrv1.models.experts import ExpertsConfig
from mrv1.parallel import check_experts, check_sizes
from mrv1.rope import rope_frequencies
from published_configs import PUBLISHED
from serving_tools import open_runner

Json = dict[str, Any]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_parse_and_wire(name: str) -> None:
    values, parameters = PUBLISHED[name]
    config = ModelConfig.from_values(values)
    weights = wire_model(config, "bfloat16").weights
    found = sum(cols * rows for _, _, cols, segments in weights for _, rows in segments)
    assert found == parameters


def config_of(name: str) -> Json:
    loaded: Json = json.loads((DATA_DIR / "models" / name / "config.json").read_text("utf-8"))
    return loaded


OTHER_SPELLINGS: dict[str, Json] = {
    "qwen2": {"rope_parameters": ..., "rope_theta": 1e6, "layer_types": ...},
    "mistral": {
        "rope_theta": ...,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "gemma2": {
        "rope_theta": ...,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3": {
        "rope_parameters": ...,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "ernie4_5": {
        "rope_theta": ...,
        "rope_scaling": ...,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    },
    "phi3": {
        "rope_theta": ...,
        "rope_scaling": ...,
        "rope_parameters": {
            "partial_rotary_factor": 1.0,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
    },
    # As transformers 5 writes them.
    "qwen3_moe": {"num_experts": ..., "num_local_experts": 16, "decoder_sparse_step": ...},
    "mixtral": {
        "rope_theta": ...,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "num_local_experts": ...,
        "num_experts": 8,
    },
    "ernie4_5_moe": {"moe_layer_end_index": 2, "moe_layer_interval": ..., "moe_gate": ...},
}


@pytest.mark.parametrize("name", OTHER_SPELLINGS)
def test_both_spellings_say_the_same(name: str) -> None:
    values = config_of(name)
    respelled = {**values, **OTHER_SPELLINGS[name]}
    respelled = {key: value for key, value in respelled.items() if value is not ...}
    assert respelled != values
    assert ModelConfig.from_values(respelled) == ModelConfig.from_values(values)


def test_longrope_in_the_new_spelling() -> None:
    values = config_of("phi4-mini")
    scaling = values.pop("rope_scaling")
    outer = ("rope_theta", "partial_rotary_factor")
    moved = {key: values.pop(key) for key in outer}
    moved["original_max_position_embeddings"] = 192
    moved.update(rope_type=scaling.pop("type"), **scaling)
    respelled = ModelConfig.from_values({**values, "rope_parameters": moved})
    assert respelled == ModelConfig.from_values(config_of("phi4-mini"))
    assert respelled.rope.rotary_dim == 24


def test_longrope_takes_its_factors_by_the_length() -> None:
    config = ModelConfig.from_values(config_of("phi4-mini"))
    tables = {
        length: rope_frequencies(config.for_length(length).rope, config.head_dim)
        for length in (2, 192, 193, 512)
    }
    assert np.array_equal(tables[2], tables[192])
    assert np.array_equal(tables[193], tables[512])
    assert not np.array_equal(tables[192], tables[193])
    expected = np.sqrt(1 + np.log(512 / 192) / np.log(192))
    assert config.rope.attention_factor == pytest.approx(expected)


def test_windows_by_layer() -> None:
    windows = {name: ModelConfig.from_values(config_of(name)).windows for name in OTHER_SPELLINGS}
    assert windows == {
        "qwen2": (0, 8),
        "mistral": (8, 8),
        "gemma2": (8, 0),
        "gemma3": (8, 0, 8),
        "ernie4_5": (),
        "phi3": (11, 11),
        "qwen3_moe": (),
        "mixtral": (8, 8),
        "ernie4_5_moe": (),
    }
    mistral = config_of("mistral")
    mistral["max_position_embeddings"] = 8192
    del mistral["sliding_window"]
    assert ModelConfig.from_values(mistral).windows == (4096, 4096)
    mistral["sliding_window"] = None
    assert ModelConfig.from_values(mistral).windows == ()
    # Unlike in Qwen3, whichever layers max_window_layers names.
    moe = {**config_of("qwen3_moe"), "use_sliding_window": True, "sliding_window": 8}
    assert ModelConfig.from_values(moe).windows == (8, 8, 8)
    assert ModelConfig.from_values({**moe, "sliding_window": None}).windows == ()
    # The type of a layer chooses its rotary embedding, also where no sequence exceeds the window.
    gemma = ModelConfig.from_values({**config_of("gemma3"), "sliding_window": 512})
    assert gemma.windows == ()
    assert gemma.sliding == (True, False, True)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"sliding_window": 8.0}, "sliding_window"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ("qwen2", {"use_sliding_window": False}, "layer_types"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"sliding_window": None}, "layer_types"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.full_attention"),
        ("gemma3", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling"),
        ("ernie4_5", {"use_bias": 1}, "use_bias"),
        ("ernie4_5", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("phi3", {"rope_scaling": {"type": "llama3"}}, "rope_scaling.type"),
        ("phi3", {"partial_rotary_factor": 0.03}, "partial_rotary_factor"),
        ("phi4-mini", {"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
        ("phi4-mini", {"partial_rotary_factor": 1.0}, "rope_scaling.short_factor"),
        ("phi4-mini", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts"),
        ("qwen3_moe", {"num_experts": 1025}, "num_experts"),
        ("qwen3_moe", {"num_local_experts": 8}, "num_local_experts"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ("qwen3_moe", {"num_experts_per_tok": 17}, "num_experts_per_tok"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ("qwen3_moe", {"moe_intermediate_size": 2**20 + 1}, "moe_intermediate_size"),
        ("mixtral", {"intermediate_size": 2**21 + 1}, "intermediate_size"),
        ("ernie4_5_moe", {"moe_num_shared_experts": 2**19 + 1}, "moe_num_shared_experts"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": [True]}, "mlp_only_layers"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob"),
        ("qwen3_moe", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act"),
        ("mixtral", {"num_local_experts": "8"}, "num_local_experts"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("mixtral", {"sliding_window": 0}, "sliding_window"),
        ("ernie4_5_moe", {"moe_num_experts": [64, 64]}, "moe_num_experts"),
        ("ernie4_5_moe", {"num_experts": 12}, "num_experts"),
        ("ernie4_5_moe", {"moe_k": 12}, "moe_k"),
        ("ernie4_5_moe", {"moe_gate": "top2_fused"}, "moe_gate"),
        ("ernie4_5_moe", {"moe_gate_act": "sigmoid"}, "moe_gate_act"),
        ("ernie4_5_moe", {"moe_norm_gate_logits": False}, "moe_norm_gate_logits"),
        ("ernie4_5_moe", {"moe_group_experts": True}, "moe_group_experts"),
        ("ernie4_5_moe", {"moe_use_aux_free": 1}, "moe_use_aux_free"),
        ("ernie4_5_moe", {"moe_layer_interval": 0}, "moe_layer_interval"),
        ("ernie4_5_moe", {"moe_layer_start_index": [1, 1]}, "moe_layer_start_index"),
        ("ernie4_5_moe", {"moe_layer_end_index": -2}, "moe_layer_end_index"),
        ("ernie4_5_moe", {"moe_num_shared_experts": -1}, "moe_num_shared_experts"),
        ("ernie4_5_moe", {"moe_norm_min": -1.0}, "moe_norm_min"),
    ],
)
def test_refused_by_name(name: str, changes: Json, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_values({**config_of(name), **changes})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "changes", "sparse"),
    [
        ("qwen3_moe", {}, [True, False, True]),
        ("qwen3_moe", {"mlp_only_layers": None, "decoder_sparse_step": 2}, [False, True, False]),
        ("qwen3_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 2}, [False] * 3),
        ("mixtral", {}, [True, True]),
        ("ernie4_5_moe", {}, [False, True, True]),
        ("ernie4_5_moe", {"moe_layer_start_index": 0}, [True] * 3),
        ("ernie4_5_moe", {"moe_layer_end_index": 1}, [False, True, False]),
        ("ernie4_5_moe", {"moe_layer_interval": 3}, [False, False, True]),
        ("ernie4_5_moe", {"moe_layer_start_index": 3}, [False] * 3),
    ],
)
def test_layers_with_experts(name: str, changes: Json, sparse: list[bool]) -> None:
    """As transformers builds them, and the program has a router for each."""
    values = {**config_of(name), **changes}
    config = ModelConfig.from_values(values)
    assert isinstance(config, ExpertsConfig)
    assert list(config.sparse_layers) == sparse
    program = wire_model(config, "float32")
    assert program.op_names.count("moe_experts") == sum(sparse)
    assert sum(matrices > 1 for matrices in program.weight_matrices) == 2 * sum(sparse)


def test_sizes_of_experts_that_ranks_share_out() -> None:
    """Only of what the model has."""
    moe = ModelConfig.from_values(config_of("qwen3_moe"))
    assert moe.mlp_sizes == {"intermediate_size": 96, "moe_intermediate_size": 32}
    mixtral = ModelConfig.from_values(config_of("mixtral"))
    assert mixtral.mlp_sizes == {"intermediate_size": 48}
    dense = ModelConfig.from_values({**config_of("qwen3_moe"), "decoder_sparse_step": 4})
    assert dense.mlp_sizes == {"intermediate_size": 96}
    values = {**config_of("qwen3_moe"), "moe_intermediate_size": 33}
    with pytest.raises(InvalidArgumentError, match="moe_intermediate_size = 33"):
        check_sizes(ModelConfig.from_values(values), 2, batch_invariant=False)
    check_sizes(ModelConfig.from_values(values), 2, batch_invariant=True)
    few = ModelConfig.from_values({**values, "num_experts": 1, "num_experts_per_tok": 1})
    with pytest.raises(InvalidArgumentError, match="at most the model's num_experts = 1"):
        check_sizes(few, 2, batch_invariant=True)
    # Whole experts have any width, but not those for all tokens, which ranks share out.
    for width, invariant in ((33, False), (20, True)):
        values = {**config_of("ernie4_5_moe"), "moe_intermediate_size": width}
        shared = ModelConfig.from_values({**values, "moe_num_shared_experts": 1})
        with pytest.raises(InvalidArgumentError, match=rf"moe_num_shared_experts \* .* = {width}"):
            check_sizes(shared, 2, batch_invariant=invariant, expert_parallel=True)


@pytest.mark.parametrize(
    ("name", "width", "experts"),
    [
        ("mixtral", "intermediate_size", "num_local_experts"),
        ("mixtral", "intermediate_size", "num_experts"),
        ("ernie4_5_moe", "moe_intermediate_size", "moe_num_experts"),
        ("qwen3_moe", "moe_intermediate_size", "num_experts"),
    ],
)
def test_errors_name_the_fields_of_the_file(name: str, width: str, experts: str) -> None:
    values = config_of(name)
    for field in ("num_local_experts", "moe_num_experts", "num_experts"):
        values.pop(field, None)
    config = ModelConfig.from_values({**values, experts: 6, width: 66})
    assert isinstance(config, ExpertsConfig)
    with pytest.raises(InvalidArgumentError, match=f"the model's {width} = 66"):
        check_sizes(config, 4, batch_invariant=False)
    check_sizes(config, 4, batch_invariant=False, expert_parallel=True)
    with pytest.raises(InvalidArgumentError, match=f"the model's {experts} = 6"):
        check_experts(config, 8, batch_invariant=False)
    sizes = {"num_attention_heads": 8, "vocab_size": 320, "num_shared_experts": 0}
    even = dataclasses.replace(config, **sizes)
    with pytest.raises(InvalidArgumentError, match=f"the model's {experts} = 6 with batch"):
        check_sizes(even, 8, batch_invariant=True)


def test_ernie_without_what_it_may_lack() -> None:
    values = config_of("ernie4_5_moe")
    plain = wire_model(ModelConfig.from_values(values), "float32")
    names = {name for _, _, _, segments in plain.weights for name, _ in segments}
    without = {**values, "moe_use_aux_free": False, "moe_num_shared_experts": None}
    fewer = wire_model(ModelConfig.from_values(without), "float32")
    left = {name for _, _, _, segments in fewer.weights for name, _ in segments}
    assert left < names
    missing = {name for name in names if "e_score_correction_bias" in name or "shared" in name}
    assert len(missing) == 2 * (1 + 3) and names - left == missing
    assert {**values, "moe_num_shared_experts": 2} == values
    del values["moe_num_shared_experts"]
    assert ModelConfig.from_values(values).num_shared_experts == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [[], [1.0] * 11, [1.0] * 11 + ["2"], [0.0] * 12, "1", None])
@pytest.mark.parametrize("kind", ["short_factor", "long_factor"])
def test_refused_factors(kind: str, value: object) -> None:
    values = config_of("phi4-mini")
    values["rope_scaling"][kind] = value
    with pytest.raises(ConfigError, match=rf"rope_scaling\.{kind}"):
        ModelConfig.from_values(values)


def test_the_text_model_of_a_checkpoint_with_a_vision_tower(device: str, tmp_path: Path) -> None:
    """Gemma 3 as it is published in the larger sizes: nested config, prefixed tensors."""
    from safetensors.numpy import save_file

    golden = load_golden("gemma3")
    text = config_of("gemma3")
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 8},
    }
    data = (golden.model_dir / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = {
        name if name == "__metadata__" else f"language_model.{name}": entry
        for name, entry in header.items()
    }
    renamed = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(renamed).to_bytes(8, "little") + renamed + data[8 + length :]
    )
    (tmp_path / "config.json").write_text(json.dumps(outer), encoding="utf-8")
    prompt = golden.prompts[-1]
    logits = []
    for directory in (golden.model_dir, tmp_path):
        with open_runner(device, directory) as runner:
            groups = range(len(runner.kv_windows))
            blocks = [range(1 + 25 * group, 26 + 25 * group) for group in groups]
            row = runner.add_row(prompt, block_ids=blocks)
            runner.execute([(row, len(prompt))]).result()
            logits.append(runner.logits(0).copy())
    assert np.array_equal(*logits)
    # What belongs to the vision tower is left alone; what belongs to nothing is refused.
    tower = {"vision_tower.a": np.zeros(2, np.float32)}
    shutil.move(tmp_path / "model.safetensors", tmp_path / "model-00001-of-00002.safetensors")
    save_file(tower, tmp_path / "model-00002-of-00002.safetensors")
    names = [name for name in header if name != "__metadata__"]
    places = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    places["vision_tower.a"] = "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with open_runner(device, tmp_path) as runner:
        assert runner.model.config.model_type == "gemma3"
