# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""benchmarks/kv_cache_accuracy.py: its maths, and its three measurements at a small size."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mrv1 import shapes
from mrv1.config import ModelConfig

_PATH = Path(__file__).parents[1] / "benchmarks" / "kv_cache_accuracy.py"


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kv_cache_accuracy", _PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kv_cache_accuracy"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


# --- maths --------------------------------------------------------------------------------------


def test_divergence_of_known_distributions(accuracy: ModuleType) -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    # Logits are logarithms up to a constant.
    found = accuracy.kl_divergence(np.log(p) + 3.0, np.log([q, p]) - 1000.0)
    np.testing.assert_allclose(found, [0.25 * np.log(2), 0.0], atol=1e-12)
    assert accuracy.perplexity(np.log([0.5, 0.125])) == pytest.approx(4.0)


def test_attention_averages_what_scores_say(accuracy: ModuleType) -> None:
    q = np.array([[2.0, 0.0], [0.0, 0.0]])
    keys = np.array([[[np.log(3.0) / np.sqrt(2.0), 9.0]], [[0.0, -9.0]]])
    values = np.array([[[4.0, 0.0]], [[0.0, 8.0]]])
    expected = [[3.0, 2.0], [2.0, 4.0]]  # weights 3 to 1, then equal ones
    np.testing.assert_allclose(accuracy.attention(q, keys, values), expected)


def test_a_needle_has_the_weight_that_was_asked_for(accuracy: ModuleType) -> None:
    rng = np.random.default_rng(0)
    q, keys = rng.standard_normal(64), rng.standard_normal((1000, 64))
    scores = np.append(keys, accuracy.needle_key(q, keys, 0.3)[None], 0) @ q / 8.0
    assert np.exp(accuracy.log_softmax(scores))[-1] == pytest.approx(0.3)


def test_outliers_leave_the_answer_alone(accuracy: ModuleType) -> None:
    plain, outliers = (accuracy.make_needle(500, 4, 2, 64, count, 3) for count in (0, 3))
    spread = np.abs(outliers.keys.astype(np.float32)).max((0, 1)) / np.abs(
        plain.keys.astype(np.float32)
    ).max((0, 1))
    assert (spread > 10).sum() in range(3, 7)
    # The values come before the outliers in the generator's sequence.
    np.testing.assert_array_equal(plain.values, outliers.values)


def test_static_scales_reach_the_largest_number(accuracy: ModuleType) -> None:
    values = np.array([[1.0, -896.0], [2.0, 0.0]], np.float32)
    assert accuracy.static_scale(values, "fp8_e4m3") == 2.0
    assert accuracy.static_scale(values, "fp8_e5m2") == 896.0 / 57344.0
    per_column = accuracy.static_scale(values, "fp8_e4m3", axis=(0,))
    np.testing.assert_array_equal(per_column, np.float32([2.0 / 448.0, 2.0]))
    assert accuracy.static_scale(np.zeros(3), "fp8_e4m3") == np.float32(2.0**-126)


# --- measurements -------------------------------------------------------------------------------


def measure(accuracy: ModuleType, tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    path = tmp_path / "records.json"
    accuracy.main([*arguments, "--json", str(path), "--commit", "none"])
    records: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    assert all(record["figure"] == "kv_accuracy" for record in records)
    return records


def test_needle_errors_are_those_of_the_formats(
    accuracy: ModuleType, device: str, tmp_path: Path
) -> None:
    records = measure(
        accuracy, tmp_path, "needle", "--device", device, "--context", "3000", "--heads", "4,2,64"
    )
    assert [record["outlier_channels"] for record in records] == [0] * 4 + [4] * 4
    for record in records:
        # Against what the cache holds, only the kernel's own roundings are left.
        assert record["kernel_error"] < 0.01, record
        bits = {"auto": 8, "fp8_e4m3": 4, "fp8_e5m2": 3}[record["kv_cache_dtype"]]
        assert record["error"] < 2.0**-bits, record
        if bits < 8:
            assert record["error"] > 2 * record["kernel_error"], record


def test_stories_score_alike_with_every_cache(
    accuracy: ModuleType, device: str, tmp_path: Path
) -> None:
    records = measure(
        accuracy, tmp_path, "perplexity", "--device", device, "--stories", "12", "--requests", "6"
    )
    assert len(records) == 8
    for record in records:
        assert 1.2 < record["perplexity"] < 1.4, record
        assert record["times_auto"] == pytest.approx(1.0, abs=0.01), record


def test_calibrated_scales_are_those_of_the_demo_model(accuracy: ModuleType) -> None:
    root = shapes.demo_model()
    tokenizer = accuracy.Tokenizer.from_dir(root)
    few = accuracy.calibrate(root, accuracy.story_tokens(tokenizer, 1, 2))
    more = accuracy.calibrate(root, accuracy.story_tokens(tokenizer, 1, 4))
    assert len(few) == 6
    assert (np.array(few) <= np.array(more)).all() and (np.array(few) > 1e-3).all()


def test_logits_of_a_model_with_outlier_keys(accuracy: ModuleType, device: str) -> None:
    _, values = shapes.shape_config("llama3.2-1b", 2)
    config = ModelConfig.from_values(
        {
            **values,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    )
    options = accuracy.parser().parse_args(
        f"logits --device {device} --context 96 --prompts 3 --outputs 4 --chunk 32".split()
    )
    records = list(accuracy.measure_logits(config, "small", options))
    found = {(record["kv_cache_dtype"], record["scale"]): record for record in records}
    assert len(found) == 3
    assert all(record["tokens"] == 15 for record in records)
    exact = found["auto", "none"]["kl_mean"]
    assert exact == 0.0 if device == "cpu" else exact < 1e-3
    fine, coarse = found["fp8_e4m3", "dynamic"], found["fp8_e5m2", "dynamic"]
    assert exact < fine["kl_mean"] < coarse["kl_mean"] < 0.1
