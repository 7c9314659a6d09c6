# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Reading and refusing config.json and generation_config.json."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from model_files import GENERATION, LLAMA, QWEN3, Json, write_model
from mrv1.config import DefaultSampling, ModelConfig, RopeConfig
from mrv1.errors import ConfigError, InvalidArgumentError, Mrv1Error
from mrv1.sampling_params import SamplingParams

LLAMA3_ROPE = RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 64)


def changed(config: Json, **changes: Any) -> Json:
    """Returns a copy with fields replaced; Ellipsis removes one; a__b is b within a."""
    result = copy.deepcopy(config)
    for name, value in changes.items():
        target = result
        *outer, last = name.split("__")
        for key in outer:
            target = target[key]
        if value is ...:
            target.pop(last)
        else:
            target[last] = value
    return result


def test_qwen3(tmp_path: Path) -> None:
    assert ModelConfig.from_dir(write_model(tmp_path, QWEN3)) == ModelConfig(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        vocab_size=384,
        hidden_size=160,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-6,
        rope=RopeConfig("default", 1e6),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        dtype="bfloat16",
        eos_token_ids=(5,),
        default_sampling=DefaultSampling(),
    )


def test_llama_in_the_old_spelling(tmp_path: Path) -> None:
    assert ModelConfig.from_dir(str(write_model(tmp_path, LLAMA, GENERATION))) == ModelConfig(
        model_type="llama",
        architecture="LlamaForCausalLM",
        vocab_size=384,
        hidden_size=128,
        intermediate_size=208,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope=LLAMA3_ROPE,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        dtype="float16",
        eos_token_ids=(7, 9),
        default_sampling=DefaultSampling(temperature=0.6, top_p=0.95, top_k=20),
    )


NEW_ROPE = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
OLD_NAME = {("type" if k == "rope_type" else k): v for k, v in LLAMA["rope_scaling"].items()}


@pytest.mark.parametrize(
    ("config", "attribute", "value"),
    [
        (changed(LLAMA, rope_scaling=..., rope_theta=..., rope_parameters=NEW_ROPE),
         "rope", LLAMA3_ROPE),
        (changed(LLAMA, rope_scaling=..., rope_parameters=NEW_ROPE), "rope", LLAMA3_ROPE),
        (changed(LLAMA, rope_scaling=OLD_NAME), "rope", LLAMA3_ROPE),
        (changed(LLAMA, rope_scaling=None), "rope", RopeConfig("default", 500000.0)),
        (changed(LLAMA, rope_scaling=..., rope_theta=...), "rope", RopeConfig("default", 10000.0)),
        (changed(LLAMA, rope_scaling=None, rope_theta=10000), "rope", RopeConfig("default", 1e4)),
        (changed(QWEN3, rope_parameters__rope_theta=...), "rope", RopeConfig("default", 10000.0)),
        (changed(QWEN3, rope_parameters__partial_rotary_factor=1.0),
         "rope", RopeConfig("default", 1e6)),
        (changed(LLAMA, torch_dtype=...), "dtype", None),
        (changed(LLAMA, torch_dtype="torch.float32"), "dtype", "float32"),
        (changed(LLAMA, dtype="float16"), "dtype", "float16"),
        (changed(LLAMA, num_key_value_heads=...), "num_key_value_heads", 4),
        (changed(LLAMA, num_key_value_heads=None), "num_key_value_heads", 4),
        (changed(LLAMA, head_dim=48), "head_dim", 48),
        (changed(LLAMA, head_dim=None), "head_dim", 32),
        (changed(LLAMA, hidden_size=129, head_dim=48), "hidden_size", 129),
        (changed(QWEN3, head_dim=...), "head_dim", 128),
        (changed(LLAMA, eos_token_id=...), "eos_token_ids", ()),
        (changed(LLAMA, eos_token_id=None), "eos_token_ids", ()),
        (changed(LLAMA, eos_token_id=0), "eos_token_ids", (0,)),
        (LLAMA, "eos_token_ids", (2, 3)),
        (changed(LLAMA, attention_bias=True), "attention_bias", True),
        (changed(LLAMA, mlp_bias=True), "mlp_bias", True),
        (changed(LLAMA, hidden_act=...), "num_hidden_layers", 3),
        (changed(QWEN3, sliding_window=4096), "num_hidden_layers", 2),
        (changed(QWEN3, unknown_field={"a": [1]}), "num_hidden_layers", 2),
    ],
)  # fmt: skip
def test_accepted(config: Json, attribute: str, value: object, tmp_path: Path) -> None:
    assert getattr(ModelConfig.from_dir(write_model(tmp_path, config)), attribute) == value


@pytest.mark.parametrize(
    ("generation", "eos", "sampling"),
    [
        ({}, (2, 3), DefaultSampling()),
        ({"eos_token_id": None}, (2, 3), DefaultSampling()),
        ({"eos_token_id": 4, "top_p": 1}, (4,), DefaultSampling(top_p=1.0)),
        ({"eos_token_id": [4, 4, 1]}, (4, 1), DefaultSampling()),
        ({"temperature": 0, "top_k": None}, (2, 3), DefaultSampling(temperature=0.0)),
        ({"top_k": -1}, (2, 3), DefaultSampling(top_k=0)),
        ({"do_sample": True, "top_k": 3}, (2, 3), DefaultSampling(top_k=3)),
        ({"min_p": 0.1}, (2, 3), DefaultSampling(min_p=0.1)),
        ({"repetition_penalty": 1.05}, (2, 3), DefaultSampling(repetition_penalty=1.05)),
        (
            {"do_sample": False, "top_p": 0.9, "repetition_penalty": 1.05},
            (2, 3),
            DefaultSampling(temperature=0.0, repetition_penalty=1.05),
        ),
        ({"do_sample": None, "top_k": 3}, (2, 3), DefaultSampling(top_k=3)),
        ({"do_sample": False, "temperature": 0.6}, (2, 3), DefaultSampling(temperature=0.0)),
    ],
)
def test_generation_config(
    generation: Json, eos: tuple[int, ...], sampling: DefaultSampling, tmp_path: Path
) -> None:
    config = ModelConfig.from_dir(write_model(tmp_path, LLAMA, generation))
    assert config.eos_token_ids == eos
    assert config.default_sampling == sampling


INTEGERS = {
    "vocab_size": 2**20,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 4096,
    "num_attention_heads": 2**14,
    "max_position_embeddings": 2**24,
}


@pytest.mark.parametrize("name", INTEGERS)
def test_refused_integers(name: str, tmp_path: Path) -> None:
    values: tuple[Any, ...] = (
        ...,
        None,
        0,
        -1,
        INTEGERS[name] + 1,
        2**70,
        1.5,
        64.0,
        "64",
        True,
        [64],
        {},
    )
    for value in values:
        with pytest.raises(ConfigError, match=rf"config\.json: {name} .*must be an integer in"):
            ModelConfig.from_dir(write_model(tmp_path, changed(LLAMA, **{name: value})))


@pytest.mark.parametrize(
    ("base", "changes", "field", "allowed"),
    [
        (LLAMA, {"model_type": "bert"}, "model_type", "llama, mistral"),
        (LLAMA, {"model_type": ...}, "model_type", "llama, mistral"),
        (LLAMA, {"model_type": ["llama"]}, "model_type", "llama, mistral"),
        (LLAMA, {"architectures": ...}, "architectures", "LlamaForCausalLM"),
        (LLAMA, {"architectures": ["Qwen3ForCausalLM"]}, "architectures", "LlamaForCausalLM"),
        (LLAMA, {"architectures": "LlamaForCausalLM"}, "architectures", "LlamaForCausalLM"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads", "a divisor of"),
        (LLAMA, {"num_key_value_heads": 5}, "num_key_value_heads", "in [1, 4]"),
        (LLAMA, {"num_key_value_heads": 0}, "num_key_value_heads", "in [1, 4]"),
        (LLAMA, {"hidden_size": 130}, "hidden_size", "a multiple of num_attention_heads = 4"),
        *[(LLAMA, {"hidden_size": 4 * size}, "head_dim", "a multiple of 8 in [8, 256]")
          for size in (3, 36, 264, 2**18)],
        *[(QWEN3, {"head_dim": value}, "head_dim", "a multiple of 8 in [8, 256]")
          for value in (0, -8, 4, 33, 36, 264, 64.0, "64", True, [64])],
        (LLAMA, {"rms_norm_eps": ...}, "rms_norm_eps", "a number in"),
        (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps", "a number in"),
        (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps", "a number in"),
        (LLAMA, {"rms_norm_eps": True}, "rms_norm_eps", "a number in"),
        (LLAMA, {"rope_theta": 0.5}, "rope_theta", "a number in"),
        (LLAMA, {"rope_theta": 10**31}, "rope_theta", "a number in"),
        (LLAMA, {"rope_scaling": "llama3"}, "rope_scaling", "an object or null"),
        (LLAMA, {"rope_scaling": {}}, "rope_scaling.rope_type",
         "one of default, linear, llama3, longrope"),
        (LLAMA, {"rope_scaling__rope_type": "yarn"}, "rope_scaling.rope_type", "one of default"),
        (LLAMA, {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.type", "one of default"),
        (LLAMA, {"rope_scaling__factor": ...}, "rope_scaling.factor", "a number in"),
        (LLAMA, {"rope_scaling__factor": 0.5}, "rope_scaling.factor", "a number in"),
        (LLAMA, {"rope_scaling__high_freq_factor": 1.0}, "rope_scaling.high_freq_factor", "above"),
        (LLAMA, {"rope_scaling__low_freq_factor": 0}, "rope_scaling.low_freq_factor", "a number"),
        (LLAMA, {"rope_scaling__original_max_position_embeddings": 1024},
         "rope_scaling.original_max_position_embeddings", "an integer in [1, 512]"),
        (LLAMA, {"rope_scaling__rope_theta": 1e4}, "rope_scaling.rope_theta", "the same as"),
        (LLAMA, {"rope_parameters": {"rope_type": "default"}}, "rope_scaling", "absent"),
        (QWEN3, {"rope_parameters__partial_rotary_factor": 0.5},
         "rope_parameters.partial_rotary_factor", "1"),
        (QWEN3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "1"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act", "silu"),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}},
         "quantization_config.quant_method", "modelopt"),
        (LLAMA, {"use_sliding_window": True}, "use_sliding_window", "false"),
        (QWEN3, {"use_sliding_window": 1}, "use_sliding_window", "true or false"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types", "full_"),
        (QWEN3, {"layer_types": ["full_attention"]}, "layer_types", "each of 2 layers"),
        (QWEN3, {"tie_word_embeddings": 1}, "tie_word_embeddings", "true or false"),
        (QWEN3, {"attention_bias": "no"}, "attention_bias", "true or false"),
        (LLAMA, {"mlp_bias": 0}, "mlp_bias", "true or false"),
        (QWEN3, {"dtype": "int8"}, "dtype", "one of float32, float16, bfloat16"),
        (QWEN3, {"dtype": 16}, "dtype", "one of float32"),
        (QWEN3, {"torch_dtype": "float32"}, "torch_dtype", "the same as dtype"),
        *[(LLAMA, {"eos_token_id": value}, "eos_token_id", "an integer in [0, 383]")
          for value in (384, -1, "2", 2.0, True, [2, 384], [[2]], [None], list(range(257)))],
    ],
)  # fmt: skip
def test_refused(base: Json, changes: Json, field: str, allowed: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path, changed(base, **changes))
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dir(directory)
    error = caught.value
    assert isinstance(error, Mrv1Error)
    assert isinstance(error, ValueError)
    assert error.path == str(directory / "config.json")
    assert error.field == field
    assert error.allowed is not None
    assert allowed in error.allowed


@pytest.mark.parametrize(
    ("generation", "field"),
    [
        ({"eos_token_id": 384}, "eos_token_id"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"do_sample": False, "top_k": 1.5}, "top_k"),
        ({"do_sample": 1}, "do_sample"),
        ([], None),
    ],
)
def test_refused_generation_config(generation: Any, field: str | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: ") as caught:
        ModelConfig.from_dir(write_model(tmp_path, LLAMA, generation))
    assert caught.value.field == field


def test_recommended_parameters() -> None:
    assert DefaultSampling().params() == SamplingParams()
    recommended = DefaultSampling(temperature=0.6, top_k=20).params()
    assert recommended == SamplingParams(temperature=0.6, top_k=20)


@pytest.mark.parametrize("directory", ["", None, 3, b"model", ["model"]])
def test_what_is_no_path(directory: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="model = .*path of a model directory"):
        ModelConfig.from_dir(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
        (b'{"a": 1} x', "is not valid JSON"),
        (b'{"rms_norm_eps": NaN}', "NaN is not a JSON number"),
        (b'{"rope_theta": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"rope_theta": 1e999}', "beyond float64"),
        (b'{"vocab_size": 1, "vocab_size": 2}', "the key 'vocab_size' occurs twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
        (b'{"vocab_size": ' + b"9" * 100_000 + b"}", "a number of 100000 characters"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": [' + b"0," * 300_000 + b"0]}", "more than 200000 JSON values"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b" " * (4 << 20) + b"{}", "at most 4194304 are allowed"),
    ],
)
def test_refused_files(content: bytes, message: str, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        write_model(tmp_path, LLAMA)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            ModelConfig.from_dir(tmp_path)
        assert caught.value.path == str(tmp_path / name)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a directory"):
        ModelConfig.from_dir(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"config\.json: there is no such file"):
        ModelConfig.from_dir(tmp_path)
    config = tmp_path / "config.json"
    config.mkdir()
    with pytest.raises(ConfigError, match="is not a regular file"):
        ModelConfig.from_dir(tmp_path)
    config.rmdir()
    # Opening a pipe that nobody writes to must not wait.
    os.mkfifo(config)
    with pytest.raises(ConfigError, match="is not a regular file"):
        ModelConfig.from_dir(tmp_path)
    config.unlink()
    config.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is not a regular file"):
        ModelConfig.from_dir(tmp_path)
    write_model(tmp_path / "real", LLAMA)
    config.unlink()
    config.symlink_to("real/config.json")
    assert ModelConfig.from_dir(tmp_path).model_type == "llama"
    (tmp_path / "generation_config.json").symlink_to("nothing")
    with pytest.raises(ConfigError, match=r"generation_config\.json: there is no such file"):
        ModelConfig.from_dir(tmp_path)
