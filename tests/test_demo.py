# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The bundled demo model: ten prompts with committed greedy outputs, and its committed quality."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mrv1
from mrv1 import LLM, SamplingParams
from mrv1.runner import ModelRunner

DEMO = Path(mrv1.__file__).parent / "demo"
# Logits of bfloat16 are off by up to this much: a gap below may be decided either way.
CLOSE = 0.15
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts" / "demo_model"


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


def test_bfloat16_leaves_the_greedy_text_only_where_it_is_close(
    device: str, data_dir: Path
) -> None:
    """bfloat16 draws the same tokens, up to the first whose two best logits nearly tie."""
    golden = json.loads((data_dir / "demo_prompts.json").read_text())
    with LLM(DEMO, device=device, dtype="bfloat16", progress=False, max_num_seqs=16) as rough:
        got = rough.generate(
            [entry["prompt"] for entry in golden], SamplingParams(temperature=0, max_tokens=64)
        )
    same = 0
    with contextlib.closing(
        ModelRunner(DEMO, device=device, dtype="float32", progress=False, num_kv_blocks=32)
    ) as exact:
        for entry, result in zip(golden, got, strict=True):
            pairs = zip(result.token_ids, entry["token_ids"], strict=False)
            at = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
            if at is None:
                same += len(result.token_ids) == len(entry["token_ids"])
                continue
            prefix = [*result.prompt_token_ids, *entry["token_ids"][:at]]
            row = exact.add_row(prefix, SamplingParams(temperature=0), block_ids=range(1, 17))
            exact.execute([(row, len(prefix))]).result()
            second, first = np.sort(exact.logits(0))[-2:]
            exact.free_row(row)
            assert first - second < CLOSE, (entry["prompt"], at)
    assert same >= 5


def test_model_is_small_enough_to_ship() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 8_000_000


def test_committed_quality_is_good_and_that_of_these_weights() -> None:
    records = json.loads((SCRIPTS / "quality.json").read_text())
    weights = hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()
    assert {record["weights_sha256"] for record in records} == {weights}
    (perplexity,) = (record for record in records if record["metric"] == "perplexity")
    assert perplexity["ratio"] <= 1.15
    continuations = [record for record in records if record["metric"] == "continuations"]
    assert {record["engine"] for record in continuations} == {"torch", "mrv1"}
    for record in continuations:
        assert record["continuations"] == 100
        assert record["accepted"] >= 95


def test_sampled_continuations_follow_the_grammar(llm: LLM) -> None:
    prompts = [
        "Once upon a time",
        "Long ago,",
        "There once was a",
        "In a lighthouse",
        "Long ago, there was",
    ]
    params = [
        SamplingParams(temperature=0.8, top_p=0.95, max_tokens=128, seed=seed) for seed in range(5)
    ]
    stories = [
        (prompt + result.text, result.finish_reason == "stop")
        for prompt, result in zip(prompts, llm.generate(prompts, params), strict=True)
    ]
    # In a process of its own: the grammar is a script beside the package.
    script = (
        "import json, sys, story_grammar\n"
        "for text, complete in json.load(sys.stdin):\n"
        "    result = story_grammar.parse(text, complete=complete)\n"
        "    print(result.accepted or f'{result.reason}: {text[:result.offset]!r}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(stories),
        cwd=SCRIPTS,
        env={"PYTHONPATH": str(SCRIPTS), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines() == ["True"] * 5


def test_stories_end_by_themselves(llm: LLM) -> None:
    results = llm.generate(
        ["Once upon a time"] * 4,
        [SamplingParams(temperature=0.8, top_p=0.95, max_tokens=600, seed=n) for n in range(4)],
    )
    assert all(result.finish_reason == "stop" for result in results)
    assert len({result.text for result in results}) == 4
