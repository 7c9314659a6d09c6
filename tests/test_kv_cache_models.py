# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""FP8 caches in every model family: near the exact logits, and the same tokens however computed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_data import GOLDEN_NAMES, load_golden, relative_error
from mrv1 import shapes
from mrv1.config import ModelConfig
from mrv1.llm import LLM
from mrv1.models.experts import ExpertsConfig
from mrv1.random_model import save_random_model
from mrv1.runner import ModelRunner
from mrv1.sampling_params import SamplingParams
from serving_tools import (
    LLAMA,
    BlockPool,
    greedy,
    make_prompt,
    num_blocks,
    open_runner,
    seeded,
)

golden = functools.lru_cache(load_golden)
FORMATS = ("fp8_e4m3", "fp8_e5m2")
# What rounding keys and values may change logits by, of the largest one, and their least
# correlation with exact ones. An element is off by 1/16 or 1/8 at most, 16 and 32 times as much as
# in bfloat16, which comes to 0.027 in these models of random weights.
BOUNDS = {"fp8_e4m3": (0.3, 0.97), "fp8_e5m2": (0.65, 0.9)}
# A value that is rounded otherwise may go through other experts, which is no small change.
NEAR = [
    name
    for name in GOLDEN_NAMES
    if not isinstance(ModelConfig.from_dir(golden(name).model_dir), ExpertsConfig)
]
WHOLE = 10**9


def open_golden(device: str, name: str, **options: Any) -> ModelRunner:
    defaults: dict[str, Any] = {
        "block_size": 8,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 512,
        "num_kv_blocks": 256,
        "max_model_len": golden(name).max_model_len,
        "batch_invariant": True,
    }
    return open_runner(device, golden(name).model_dir, **{**defaults, **options})


def draw(
    runner: ModelRunner,
    prompt: Sequence[int],
    params: SamplingParams,
    chunk: int = WHOLE,
    preempt_after: int = -1,
) -> list[int]:
    """The tokens of a request; preempted once when it has drawn so many."""
    block_size = runner.model.block_size
    pool = BlockPool(runner)
    tokens: list[int] = []
    while True:
        known = [*prompt, *tokens]
        most = len(prompt) + (params.max_tokens or 0)
        blocks = pool.take_groups(num_blocks(most, block_size))
        row = runner.add_row(known, params, block_ids=blocks, prompt_len=len(prompt))
        left = len(known)
        while len(tokens) != preempt_after:
            count = min(chunk, left) if left else 1
            left = max(0, left - count)
            output = runner.execute([(row, count)]).result()[0]
            tokens += output.token_ids
            if output.finish_reason is not None:
                runner.free_row(row)
                return tokens
        runner.free_row(row)
        preempt_after = -1


def prompt_logits(runner: ModelRunner, prompt: Sequence[int], chunk: int = WHOLE) -> np.ndarray:
    pool = BlockPool(runner)
    blocks = pool.take_groups(num_blocks(len(prompt), runner.model.block_size))
    row = runner.add_row(prompt, greedy(1), block_ids=blocks)
    for start in range(0, len(prompt), chunk):
        runner.execute([(row, min(chunk, len(prompt) - start))]).result()
    logits = runner.logits(0)
    runner.free_row(row)
    return logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
@pytest.mark.parametrize("name", NEAR)
def test_logits_are_near_those_of_an_exact_cache(
    device: str, name: str, kv_cache_dtype: str, dtype: str
) -> None:
    expected = golden(name)
    most, least = BOUNDS[kv_cache_dtype]
    errors = []
    with open_golden(device, name, dtype=dtype, kv_cache_dtype=kv_cache_dtype) as runner:
        for index, prompt in enumerate(expected.prompts):
            for chunk in (WHOLE, 13):
                logits = prompt_logits(runner, prompt, chunk)
                reference = expected.logits[index][-1]
                errors.append(relative_error(logits[None], reference[None]))
                assert np.corrcoef(logits, reference)[0, 1] > least
    assert 1e-3 < max(errors) < most


@pytest.mark.parametrize("fusion", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_whole_chunked_and_preempted_draw_the_same_tokens(
    device: str, name: str, kv_cache_dtype: str, fusion: bool
) -> None:
    """All read what the cache holds, also the keys and values of the step itself."""
    prompt = golden(name).prompts[-1]
    options = {"kv_cache_dtype": kv_cache_dtype, "fusion": fusion}
    with open_golden(device, name, **options) as runner:
        for params in (greedy(20), seeded(5, 20, temperature=1.3)):
            whole = draw(runner, prompt, params)
            assert len(whole) == 20
            for chunk in (1, 13):
                assert draw(runner, prompt, params, chunk) == whole, chunk
            for preempted in (1, 9):
                assert draw(runner, prompt, params, preempt_after=preempted) == whole


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_whole_and_chunked_prompts_agree_bit_for_bit(device: str, kv_cache_dtype: str) -> None:
    prompt = golden("qwen3-tied").prompts[-1]
    for dtype in ("float32", "bfloat16"):
        options = {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype}
        with open_golden(device, "qwen3-tied", **options) as runner:
            whole = prompt_logits(runner, prompt)
            for chunk in (1, 7, 16):
                assert np.array_equal(prompt_logits(runner, prompt, chunk), whole)


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_every_graph_mode_draws_the_same_tokens(device: str, kv_cache_dtype: str) -> None:
    """Of a batch of a prompt in chunks and decoding rows."""
    prompts = [make_prompt(length, length) for length in (21, 5, 9)]
    found = []
    for mode in ("eager", "piecewise", "full"):
        with open_runner(
            device,
            dtype="bfloat16",
            graph_mode=mode,
            capture_sizes=[1, 2, 4, (4, 8)],
            piecewise_sizes=[8, 16, 32],
            batch_invariant=True,
            kv_cache_dtype=kv_cache_dtype,
        ) as runner:
            pool = BlockPool(runner)
            rows = [
                runner.add_row(prompt, seeded(index, 12), block_ids=pool.take_groups(9))
                for index, prompt in enumerate(prompts)
            ]
            left = [len(prompt) for prompt in prompts]
            tokens: list[list[int]] = [[] for _ in prompts]
            while any(len(drawn) < 12 for drawn in tokens):
                members = [index for index, drawn in enumerate(tokens) if len(drawn) < 12]
                batch = [(rows[i], min(6, left[i]) if left[i] else 1) for i in members]
                for index, (_, count) in zip(members, batch, strict=True):
                    left[index] = max(0, left[index] - count)
                outputs = runner.execute(batch).result()
                for index, output in zip(members, outputs, strict=True):
                    tokens[index] += output.token_ids
            found.append(tokens)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_samples_that_share_and_copy_blocks_are_those_of_requests_alone(
    device: str, kv_cache_dtype: str
) -> None:
    """The prefix cache, and copies of blocks and of their scales before a sample writes one."""
    prompts = [make_prompt(length, 3) for length in (22, 17, 30)]
    options: dict[str, Any] = {
        "device": device,
        "dtype": "float32",
        "block_size": 4,
        "max_num_seqs": 4,
        "max_model_len": 64,
        "max_num_batched_tokens": 16,
        "batch_invariant": True,
        "kv_cache_dtype": kv_cache_dtype,
        "progress": False,
    }
    alone = []
    with LLM(LLAMA, num_kv_blocks=200, enable_prefix_caching=False, **options) as llm:
        for prompt in prompts:
            samples = [llm.generate([prompt], seeded(11 + i, 10))[0] for i in range(3)]
            alone.append([sample.token_ids for sample in samples])
    # So few blocks that requests are preempted.
    with LLM(LLAMA, num_kv_blocks=14, **options) as llm:
        for _ in range(2):
            results = llm.generate(prompts, seeded(11, 10, n=3))
            assert [[sample.token_ids for sample in r.outputs] for r in results] == alone
        stats = llm.engine.stats()
        assert stats["preemptions"] > 0, stats
        assert any(result.num_cached_tokens > 0 for result in results)


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_prompts_beside_rows_with_drafts(device: str, kv_cache_dtype: str, tmp_path: Path) -> None:
    """Chunks of prompts long enough that a GPU dequantises what they see, in mixed steps."""
    values = {
        **shapes.shape_config("qwen3-0.6b", 2)[1],
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = save_random_model(tmp_path / "model", values, progress=False)
    prompts = [make_prompt(length, length, 500) for length in (30, 700, 450)]
    found = []
    for batch_invariant in (True, False):
        with open_runner(
            device,
            model,
            dtype="bfloat16",
            max_model_len=1024,
            max_num_batched_tokens=1024,
            num_kv_blocks=1024,
            speculative_config={"method": "ngram", "num_speculative_tokens": 3},
            batch_invariant=batch_invariant,
            kv_cache_dtype=kv_cache_dtype,
        ) as runner:
            pool = BlockPool(runner)
            rows = [
                runner.add_row(prompt, greedy(40), block_ids=pool.take_groups(200))
                for prompt in prompts
            ]
            runner.execute([(rows[0], 30)]).result()
            for counts in ((350, 150), (350, 300)):
                batch = [(rows[0], 4), *zip(rows[1:], counts, strict=True)]
                runner.execute(batch).result()
            found.append([runner.logits(item) for item in (1, 2)])
    for exact, other in zip(*found, strict=True):
        assert relative_error(other[None], exact[None]) < 0.03
