# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Models with experts as wholes: checkpoints, random weights, the memory report."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from golden_data import load_golden
from mrv1 import _core
from mrv1.errors import WeightError
from mrv1.random_model import save_random_model
from serving_tools import Tensors, copy_model, open_runner
from test_models import forced

ERNIE = load_golden("ernie4_5_moe").model_dir
BIAS = "model.layers.1.mlp.moe_statics.e_score_correction_bias"


def test_a_checkpoint_without_what_was_trained_beside_it(device: str, tmp_path: Path) -> None:
    """A layer that predicts one token more is left out; a correction may be a vector."""

    def change(tensors: Tensors) -> None:
        assert tensors[BIAS].shape == (1, 11)
        tensors[BIAS] = tensors[BIAS][0]
        tensors["model.mtp_block.0.mlp.up_proj.weight"] = np.ones(2, ml_dtypes.bfloat16)

    prompt = load_golden("ernie4_5_moe").prompts[2]
    directory = copy_model(tmp_path / "model", source=ERNIE, change=change)
    with open_runner(device, ERNIE) as one, open_runner(device, directory) as two:
        np.testing.assert_array_equal(*(forced(runner, prompt, 16) for runner in (one, two)))


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("experts.10.up_proj.weight", None, "is missing"),
        ("experts.11.up_proj.weight", (32, 64), "nothing in the model uses it"),
        ("experts.3.down_proj.weight", (64, 31), r"shape = \[64, 31\].*\[64, 32\]"),
        ("moe_statics.e_score_correction_bias", (11, 1), r"shape = \[11, 1\]"),
        ("gate.weight", (10, 64), r"shape = \[10, 64\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, match: str
) -> None:
    name = f"model.layers.2.mlp.{name}"

    def change(tensors: Tensors) -> None:
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.zeros(shape, np.float32)

    directory = copy_model(tmp_path / "model", source=ERNIE, change=change)
    with pytest.raises(WeightError, match=match) as caught:
        open_runner("cpu", directory)
    assert name in str(caught.value)


def test_random_models_choose_at_random(native_device: _core.Device, tmp_path: Path) -> None:
    """With a random correction all tokens would go through the same experts."""
    values = json.loads((ERNIE / "config.json").read_text("utf-8"))
    directory = save_random_model(tmp_path / "model", values, progress=False)
    saved = load_file(directory / "model.safetensors")
    assert not saved[BIAS].any() and saved["model.layers.1.mlp.gate.weight"].any()
    # The same where weights are drawn without a file.
    program = _core.Program("float32")
    logits = program.input("logits", 64)
    bias = program.weight("bias", True, 1, [("bias", 64)])
    assert not program.is_route_bias(bias)
    experts, _ = program.moe_route(logits, top_k=4, bias=bias)
    assert program.is_route_bias(bias)
    program.output(experts)
    session = _core.ProgramSession(native_device, program, max_tokens=8)
    session.fill_weight(bias, 0, 0.02)
    drawn = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    session.set_value(logits, drawn)
    session.set_ints("token_batch", np.zeros(8, np.int32))
    session.run(1, 8)
    np.testing.assert_array_equal(session.value(experts, 8), np.argsort(-drawn, axis=1)[:, :4])
    session.close()


def test_one_expert_is_counted_as_experts(tmp_path: Path) -> None:
    values = json.loads((ERNIE / "config.json").read_text("utf-8"))
    values |= {"moe_num_experts": 1, "moe_k": 1}
    directory = save_random_model(tmp_path / "model", values, progress=False)
    with open_runner("cpu", directory) as runner:
        assert runner.model.runner.memory_plan["experts"] == 2 * 1 * 3 * 32 * 64 * 4


def test_the_log_says_what_experts_take(device: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mrv1"), open_runner(device, ERNIE) as runner:
        plan = runner.model.runner.memory_plan
        assert plan["experts"] == 2 * 11 * 3 * 32 * 64 * 4
        assert plan["experts"] < plan["weights"]
    assert f"(experts {plan['experts'] / 1e6:.0f} MB)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "mrv1"), open_runner(device) as runner:
        assert runner.model.runner.memory_plan["experts"] == 0
    assert "weights" in caplog.text and "experts" not in caplog.text
