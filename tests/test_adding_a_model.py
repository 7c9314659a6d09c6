# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""docs/adding-a-model.md: its blocks, run as they stand, make a family that computes right."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_data import relative_error
from mrv1.config import ModelConfig
from mrv1.errors import ConfigError, InvalidArgumentError
from mrv1.models import FAMILIES, register
from serving_tools import greedy, need_ranks, num_blocks, open_runner

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adding-a-model.md"
Json = dict[str, Any]


def blocks(language: str) -> list[str]:
    """The page's blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def page() -> Iterator[types.ModuleType]:
    """What the page's Python blocks define. The family is forgotten afterwards."""
    module = types.ModuleType("tandem")
    # Dataclasses look their module up.
    sys.modules["tandem"] = module
    try:
        for block in blocks("python"):
            exec(compile(block, str(PAGE), "exec"), module.__dict__)
        yield module
    finally:
        FAMILIES.pop("tandem", None)
        del sys.modules["tandem"]


@pytest.fixture(scope="module")
def values() -> Json:
    (block,) = blocks("json")
    loaded: Json = json.loads(block)
    return loaded


def reference(directory: Path, values: Json, token_ids: list[int]) -> np.ndarray:
    """Tandem in float64: the logits behind the last token."""
    w = {}
    # NumPy cannot read bfloat16 by itself: it is the upper half of a float32.
    data = (directory / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + place for place in entry["data_offsets"])
            bits = np.frombuffer(data[start:end], np.uint16).astype(np.uint32) << 16
            w[name] = bits.view(np.float32).astype(np.float64).reshape(entry["shape"])
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    count, dim = len(token_ids), values["hidden_size"] // heads
    angles = np.arange(count)[:, None, None] * values["rope_theta"] ** -(np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angles), np.sin(angles)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean = np.mean(x * x, axis=-1, keepdims=True)
        scaled: np.ndarray = x / np.sqrt(mean + values["rms_norm_eps"]) * w[name]
        return scaled

    def turn(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x.reshape(count, -1, dim), 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = w["model.embed_tokens.weight"][token_ids] * values["embedding_scale"]
    distance = np.arange(count)[:, None] - np.arange(count)
    for index in range(values["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        y = norm(x, f"{layer}norm.weight")
        q, k = turn(y @ w[f"{layer}q.weight"].T), turn(y @ w[f"{layer}k.weight"].T)
        v = (y @ w[f"{layer}v.weight"].T).reshape(count, kv_heads, dim)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(dim)
        window = values["sliding_window"] if index % 2 else count
        scores[:, (distance < 0) | (distance >= window)] = -np.inf
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", probs, v).reshape(count, -1)
        gate, up = y @ w[f"{layer}gate.weight"].T, y @ w[f"{layer}up.weight"].T
        x = x + mixed @ w[f"{layer}o.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{layer}down.weight"].T
    logits: np.ndarray = norm(x[-1], "model.norm.weight") @ w["lm_head.weight"].T
    return logits


@pytest.mark.parametrize("kind", [None, "tensor", "pipeline"], ids=["one", "ranks", "stages"])
@pytest.mark.parametrize("fusion", [True, False], ids=["fused", "unfused"])
def test_the_family_of_the_page_computes_what_it_says(
    device: str,
    page: types.ModuleType,
    values: Json,
    tmp_path: Path,
    fusion: bool,
    kind: str | None,
) -> None:
    sizes = {} if kind is None else {f"{kind}_parallel_size": 2}
    need_ranks(device, 1 + len(sizes))
    page.make_model(str(tmp_path / "model"), values)
    prompt = np.random.default_rng(0).integers(0, 256, 40).tolist()
    expected = reference(tmp_path / "model", values, prompt)
    with open_runner(device, tmp_path / "model", fusion=fusion, **sizes) as runner:
        count = num_blocks(len(prompt))
        groups = range(len(runner.kv_windows))
        assert len(groups) == 2
        blocks_of = [range(1 + count * group, 1 + count * (group + 1)) for group in groups]
        row = runner.add_row(prompt, greedy(), block_ids=blocks_of)
        for start in (0, 13, 26):
            tokens = 13 if start < 26 else len(prompt) - start
            runner.execute([(row, tokens)]).result()
        assert relative_error(runner.logits(0)[None], expected[None]) < 1e-4
    # A window of another length is another model.
    other = reference(tmp_path / "model", {**values, "sliding_window": 7}, prompt)
    assert relative_error(other[None], expected[None]) > 1e-3


def test_the_family_of_the_page_refuses_what_it_does_not_compute(
    page: types.ModuleType, values: Json
) -> None:
    assert isinstance(ModelConfig.from_values(values), page.TandemConfig)
    for name, value in (("attention_bias", True), ("embedding_scale", "3"), ("vocab_size", 0)):
        with pytest.raises(ConfigError, match=rf"config\.json: {name} "):
            ModelConfig.from_values({**values, name: value})
    with pytest.raises(InvalidArgumentError, match="model_type = 'tandem'"):
        register("tandem", architecture="X", read=page.read, wire=page.wire)
