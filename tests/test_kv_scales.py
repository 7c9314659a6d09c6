# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Calibrated scales of an FP8 cache: where a checkpoint may hold them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mrv1.errors import ConfigError, InvalidArgumentError, WeightError
from mrv1.kv_scales import read_kv_scales
from mrv1.safetensors_reader import read_checkpoint
from serving_tools import Tensors, copy_model, greedy, make_prompt, open_runner, run_to_end

LAYERS, HEADS = 2, 2  # of the model that is copied
# What a tensor may be called behind "model.layers.<n>.self_attn.", for keys and values.
NAMES = (
    ("k_scale", "v_scale"),
    ("attn.k_scale", "attn.v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("qkv_proj.k_scale", "qkv_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("kv_scale", "kv_scale"),
)
SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def tensor_name(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.{name}"


def with_scales(
    names: tuple[str, str] = NAMES[0], make: Callable[[int, int], Any] | None = None
) -> Callable[[Tensors], None]:
    """Adds scales: make(layer, side), else 0.02 * (1 + layer) and half of it."""

    def change(tensors: Tensors) -> None:
        for layer in range(LAYERS):
            for side, name in enumerate(names):
                default = np.float32(0.02 * (1 + layer) / (1 + side))
                value = default if make is None else make(layer, side)
                tensors[tensor_name(layer, name)] = np.asarray(value)

    return change


def scales_of(model: Path) -> list[tuple[list[float], list[float]]]:
    return list(read_kv_scales(read_checkpoint(model), [HEADS] * LAYERS))


@pytest.mark.parametrize("names", NAMES, ids=[names[0] for names in NAMES])
def test_every_name_is_read(device: str, tmp_path: Path, names: tuple[str, str]) -> None:
    change = with_scales(names, lambda layer, side: np.float32(0.5 * (1 + layer)))
    model = copy_model(tmp_path / "model", change=change)
    assert scales_of(model) == [([0.5], [0.5]), ([1.0], [1.0])]
    with open_runner(device, model, kv_cache_dtype="fp8_e4m3") as runner:
        assert runner.model.kv_scales == "static"
    # They do not matter to a cache that has no scales.
    with open_runner(device, model) as runner:
        assert runner.model.kv_scales == "none"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (HEADS,), (HEADS, 1, 1)])
def test_shapes_and_dtypes(device: str, tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))

    def make(layer: int, side: int) -> Any:
        return (0.25 * (1 + layer + side + np.arange(count))).reshape(shape).astype(dtype)

    model = copy_model(tmp_path / "model", change=with_scales(make=make))
    assert scales_of(model) == [
        tuple((0.25 * (1 + layer + side + np.arange(count))).tolist() for side in range(2))
        for layer in range(LAYERS)
    ]
    with open_runner(device, model, kv_cache_dtype="fp8_e5m2") as runner:
        assert runner.model.kv_scales == "static"


@pytest.mark.parametrize("shape", [(), (HEADS,)], ids=["a tensor", "heads"])
def test_static_scales_are_used(device: str, tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Scales so large that all keys become 0 give other logits than those that fit."""
    prompt = make_prompt(12, 1)
    found = []
    for name, value in (("fits", 0.02), ("too large", 1e30)):
        scales = np.full(shape, value, np.float32)
        model = copy_model(tmp_path / name, change=with_scales(make=lambda *_, s=scales: s))
        with open_runner(device, model, kv_cache_dtype="fp8_e4m3") as runner:
            row = runner.add_row(prompt, greedy(), block_ids=range(1, 5))
            runner.execute([(row, len(prompt))]).result()
            found.append(runner.logits(0))
    with open_runner(device) as runner:
        row = runner.add_row(prompt, greedy(), block_ids=range(1, 5))
        runner.execute([(row, len(prompt))]).result()
        exact = runner.logits(0)
    assert np.corrcoef(found[0], exact)[0, 1] > 0.99
    assert np.isfinite(found[1]).all()
    assert np.abs(found[1] - exact).max() > 10 * np.abs(found[0] - exact).max()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.float32(0), "scale = 0.0: must be finite and at least 2\\*\\*-126"),
        (np.float32(-1), "scale = -1.0"),
        (np.float32(np.nan), "scale = nan"),
        (np.float32(np.inf), "scale = inf"),
        (np.float32(2.0**-130), "at least 2\\*\\*-126"),
        (np.asarray([1, 0], np.float32), "scale of head 1 = 0.0"),
        (np.ones(3, np.float32), "shape = \\[3\\]: must be one scale, or one for each of 2"),
        (np.ones((2, 2), np.float32), "shape"),
        (np.ones(0, np.float32), "shape"),
        (np.int32(1), "dtype = .I32.: must be F32, F16, BF16"),
        (np.float64(1), "dtype"),
    ],
)
def test_wrong_scales_are_refused(device: str, tmp_path: Path, value: Any, says: str) -> None:
    def make(layer: int, side: int) -> Any:
        return value if (layer, side) == (1, 1) else np.float32(1)

    model = copy_model(tmp_path / "model", change=with_scales(make=make))
    with pytest.raises(WeightError, match=says) as raised:
        open_runner(device, model, kv_cache_dtype="fp8_e4m3")
    assert raised.value.tensor == tensor_name(1, "v_scale")
    assert raised.value.path == str(model / "model.safetensors")


def drop(tensors: Tensors, name: str) -> None:
    del tensors[tensor_name(1, name)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: drop(t, "v_scale"), "layers.1.self_attn.v_scale.* is missing"),
        (lambda t: drop(t, "k_scale"), "layers.1.self_attn.k_scale.* is missing"),
        (
            lambda t: t.update({tensor_name(0, "kv_scale"): np.ones(1, np.float32)}),
            "the same scale as",
        ),
        (
            lambda t: t.update({tensor_name(LAYERS, "k_scale"): np.ones(1, np.float32)}),
            "a layer that the config does not have",
        ),
    ],
)
def test_incomplete_scales_are_refused(
    device: str, tmp_path: Path, change: Callable[[Tensors], None], says: str
) -> None:
    def both(tensors: Tensors) -> None:
        with_scales()(tensors)
        change(tensors)

    model = copy_model(tmp_path / "model", change=both)
    with pytest.raises(WeightError, match=says):
        open_runner(device, model, kv_cache_dtype="fp8_e4m3")


def test_scales_of_queries_are_ignored(device: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in ("q_scale", "attn.prob_scale", "q_proj.output_scale"):
            tensors[tensor_name(0, name)] = np.ones(1, np.float32)

    model = copy_model(tmp_path / "model", change=change)
    with open_runner(device, model, kv_cache_dtype="fp8_e4m3") as runner:
        assert runner.model.kv_scales == "dynamic"


def test_a_config_may_say_that_the_cache_is_quantised(device: str, tmp_path: Path) -> None:
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME}
    config = {"quantization_config": quantization}
    model = copy_model(tmp_path / "model", config=config, change=with_scales())
    with open_runner(device, model, kv_cache_dtype="fp8_e4m3") as runner:
        assert runner.model.kv_scales == "static"
    for place, (wrong, field) in enumerate(
        (
            ({"quant_method": "compressed-tensors"}, "quantization_config.quant_method"),
            (
                {**quantization, "config_groups": {"group_0": {}}},
                "quantization_config.quant_method",
            ),
            ({**quantization, "quant_algo": "FP8"}, "quantization_config.quant_method"),
            (
                {"kv_cache_scheme": {**SCHEME, "num_bits": 4}},
                "quantization_config.kv_cache_scheme.num_bits",
            ),
            (
                {"kv_cache_scheme": {**SCHEME, "type": "int"}},
                "quantization_config.kv_cache_scheme.type",
            ),
            (
                {"kv_cache_scheme": {**SCHEME, "symmetric": False}},
                "quantization_config.kv_cache_scheme.symmetric",
            ),
            ({"kv_cache_scheme": "static"}, "quantization_config.kv_cache_scheme"),
        )
    ):
        refused = copy_model(tmp_path / str(place), config={"quantization_config": wrong})
        with pytest.raises(ConfigError) as raised:
            open_runner(device, refused)
        assert raised.value.field == field


@pytest.mark.parametrize("name", ["fp8", "float8_e4m3fn", "", None, 8])
def test_other_cache_dtypes_are_refused(device: str, name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="auto, fp8_e4m3 or fp8_e5m2") as raised:
        open_runner(device, kv_cache_dtype=name)
    assert raised.value.field == "kv_cache_dtype"


def test_dynamic_scales_take_memory(device: str) -> None:
    """A block's bytes are those of its codes and, where tokens have scales, of these."""
    per_block = {}
    for name in ("auto", "fp8_e4m3", "fp8_e5m2"):
        with open_runner(device, kv_cache_dtype=name) as runner:
            config = runner.model.config
            per_block[name] = runner.model.runner.memory_plan["per_block"]
            run_to_end(runner, make_prompt(5, 1), greedy(2))
    heads = 2 * LAYERS * 4 * HEADS  # of a block of 4 tokens
    assert per_block["auto"] == heads * config.head_dim * 4
    assert per_block["fp8_e4m3"] == per_block["fp8_e5m2"] == heads * (config.head_dim + 4)


def test_static_scales_take_no_memory_of_blocks(device: str, tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model", change=with_scales())
    with open_runner(device, model, kv_cache_dtype="fp8_e4m3") as runner:
        plan = runner.model.runner.memory_plan
        assert plan["per_block"] == 2 * LAYERS * 4 * HEADS * runner.model.config.head_dim
