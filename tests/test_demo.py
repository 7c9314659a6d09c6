# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The bundled demo model: ten prompts with committed greedy outputs, and its committed quality."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import mrv1
from mrv1 import LLM, SamplingParams

DEMO = Path(mrv1.__file__).parent / "demo"


@pytest.fixture(scope="module")
def llm(device: str) -> Iterator[LLM]:
    with LLM(DEMO, device=device, dtype="float32", progress=False, max_num_seqs=16) as model:
        yield model


def test_greedy_text_is_the_committed_one(llm: LLM, data_dir: Path) -> None:
    """float32 text of transformers; the same on every device."""
    golden = json.loads((data_dir / "demo_prompts.json").read_text())
    assert len(golden) == 10
    results = llm.generate(
        [entry["prompt"] for entry in golden], SamplingParams(temperature=0, max_tokens=64)
    )
    for entry, result in zip(golden, results, strict=True):
        assert result.token_ids == entry["token_ids"]
        assert result.text == entry["text"]


def test_model_is_small_enough_to_ship() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 8_000_000


def test_stories_end_by_themselves(llm: LLM) -> None:
    results = llm.generate(
        ["Once upon a time"] * 4,
        [SamplingParams(temperature=0.8, top_p=0.95, max_tokens=600, seed=n) for n in range(4)],
    )
    assert all(result.finish_reason == "stop" for result in results)
    assert len({result.text for result in results}) == 4
