# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""How steps reach the device: sizes that are captured, what runs at which, and that it is one."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest

from mrv1 import _core
from mrv1.errors import InternalError, InvalidArgumentError
from mrv1.runner import ModelRunner
from mrv1.sampling_params import SamplingParams
from serving_tools import (
    BlockPool,
    greedy,
    make_prompt,
    num_blocks,
    open_runner,
    run_to_end,
    seeded,
    tokens_of,
)

MODES = ("eager", "piecewise", "full")
SIZES: dict[str, Any] = {"capture_sizes": [1, 2, 4, (2, 8)], "piecewise_sizes": [8, 16, 64]}
OUTPUTS = 60
REQUESTS = (
    (make_prompt(13, 1), greedy(OUTPUTS)),
    (make_prompt(30, 2), seeded(8, OUTPUTS)),
    (make_prompt(5, 3), seeded(9, OUTPUTS, top_k=7)),
)


def run_together(runner: ModelRunner, chunk: int) -> list[list[int]]:
    """Runs REQUESTS side by side, prompts in chunks, one step ahead; the tokens of each."""
    pool = BlockPool(runner)
    rows = [
        runner.add_row(prompt, params, block_ids=pool.take(num_blocks(len(prompt) + OUTPUTS)))
        for prompt, params in REQUESTS
    ]
    left = [len(prompt) for prompt, _ in REQUESTS]
    launched = [0] * len(rows)
    tokens: list[list[int]] = [[] for _ in rows]
    pending = []

    def take_in() -> None:
        for output in pending.pop(0).result():
            if output.token_id is not None:
                tokens[rows.index(output.row)].append(output.token_id)

    while True:
        batch = []
        for index, row in enumerate(rows):
            if left[index] > 0:
                count = min(chunk, left[index])
                left[index] -= count
                launched[index] += left[index] == 0
                batch.append((row, count))
            elif launched[index] < OUTPUTS:
                launched[index] += 1
                batch.append((row, 1))
        if not batch:
            break
        pending.append(runner.execute(batch))
        if len(pending) == 2:
            take_in()
    while pending:
        take_in()
    for row in rows:
        runner.free_row(row)
    return tokens


@pytest.fixture(scope="module")
def alone(device: str) -> list[list[int]]:
    runner = open_runner(device, graph_mode="eager", capture_sizes=[1])
    try:
        return [tokens_of(run_to_end(runner, prompt, params)) for prompt, params in REQUESTS]
    finally:
        runner.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mode_runs_and_draws_the_same_tokens(device: str, mode: str, dtype: str) -> None:
    """A mode changes how a step is launched, not what it computes: token for token."""
    runner = open_runner(device, graph_mode=mode, dtype=dtype, **SIZES)
    eager = open_runner(device, graph_mode="eager", dtype=dtype, **SIZES)
    try:
        if mode == "piecewise":
            # Steps in pieces run at sizes of their own; their eager twins have no others either.
            eager.close()
            eager = open_runner(
                device,
                graph_mode="eager",
                dtype=dtype,
                capture_sizes=[],
                piecewise_sizes=SIZES["piecewise_sizes"],
            )
        got = run_together(runner, chunk=11)
        assert got == run_together(eager, chunk=11)
        assert all(len(tokens) == OUTPUTS for tokens in got)
        stats = runner.stats()
        assert stats[f"steps_{mode}"] >= 50
        by_mode = [stats[f"steps_{each}"] for each in ("eager", "piecewise", "full")]
        assert sum(by_mode) == stats["batches"]
        if mode == "full":
            assert stats["steps_eager"] == 0 and stats["steps_piecewise"] > 0
        if mode == "eager":
            assert stats["graph_launches"] == 0
    finally:
        runner.close()
        eager.close()


@pytest.mark.parametrize("mode", MODES)
def test_float32_tokens_are_those_of_requests_run_alone(
    device: str, mode: str, alone: list[list[int]]
) -> None:
    runner = open_runner(device, graph_mode=mode, **SIZES)
    try:
        assert run_together(runner, chunk=7) == alone
    finally:
        runner.close()


def test_a_full_step_is_one_graph_launch(device: str) -> None:
    runner = open_runner(device, graph_mode="full", capture_sizes=[1, 4])
    try:
        prompt, params = REQUESTS[0]
        row = runner.add_row(prompt, params, block_ids=list(range(1, 20)))
        runner.execute([(row, len(prompt))]).result()
        before = runner.stats()
        for _ in range(20):
            runner.execute([(row, 1)]).result()
        after = runner.stats()
        grown = {name: after[name] - before[name] for name in after}
        assert grown["steps_full"] == grown["graph_launches"] == 20
        for name in ("kernel_launches", "waits", "allocations", "copies"):
            assert grown[name] == 0, name
        # A record of 256 bytes, 32 for the row, and no block ids, as none were added.
        assert grown["control_bytes"] <= 20 * (256 + 32)
        assert grown["output_bytes"] <= 20 * (256 + 32)
    finally:
        runner.close()


@pytest.mark.parametrize(
    "batch, size",
    [
        ([1], 1),
        ([1, 1], 2),
        ([1, 1, 1], 4),
        ([8, 8], 16),  # two places of eight tokens
        ([2, 1, 1], 4),  # four places of one token
        ([9, 1], 64),  # two requests, but three places of eight: in pieces
    ],
)
def test_a_batch_runs_at_the_smallest_size_that_holds_it(
    device: str, batch: list[int], size: int
) -> None:
    runner = open_runner(
        device, graph_mode="full", capture_sizes=[1, 2, 4, (2, 8)], piecewise_sizes=[64]
    )
    try:
        rows = []
        for index, tokens in enumerate(batch):
            rows.append(
                runner.add_row(
                    make_prompt(tokens + 1, index),
                    greedy(4),
                    block_ids=range(1 + 8 * index, 9 + 8 * index),
                )
            )
        runner.execute(list(zip(rows, batch, strict=True))).result()
        assert len(runner.infer_params()["token_ids"]) == size
    finally:
        runner.close()


def test_a_batch_that_misses_the_sizes_says_so_once(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    runner = open_runner(device, graph_mode="full", capture_sizes=[1], piecewise_sizes=[])
    try:
        rows = [
            runner.add_row(
                make_prompt(4, index), greedy(8), block_ids=[2 * index + 1, 2 * index + 2]
            )
            for index in range(2)
        ]
        with caplog.at_level(logging.INFO, logger="mrv1"):
            runner.execute([(row, 4) for row in rows]).result()
            for _ in range(3):
                runner.execute([(row, 1) for row in rows]).result()
        said = [record.getMessage() for record in caplog.records]
        assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
        assert len(said) == 2  # one of prompts, one of decoding
        assert "2 requests with 8 tokens runs eager" in said[0]
        assert "2 requests with 2 tokens runs eager" in said[1]
        assert runner.stats()["steps_eager"] == 4
    finally:
        runner.close()


def test_a_failed_step_leaves_the_graphs_usable(device: str, alone: list[list[int]]) -> None:
    runner = open_runner(device, graph_mode="full", capture_sizes=[1, 2])
    try:
        prompt, params = REQUESTS[0]
        row = runner.add_row(prompt, params, block_ids=list(range(1, 20)))
        runner.execute([(row, len(prompt))]).result()
        runner.model.runner.fail_next_step("planted")
        with pytest.raises(InternalError, match="planted"):
            runner.execute([(row, 1)]).result()
        runner.free_row(row)
        assert tokens_of(run_to_end(runner, prompt, params)) == alone[0]
    finally:
        runner.close()


def test_default_sizes_are_dense_at_the_small_end() -> None:
    sizes = _core.capture_sizes(_core.default_capture_requests(256))
    assert sizes[:9] == [(n, 1) for n in (1, 2, 3, 4, 5, 6, 7, 8, 16)]
    assert sizes[-1] == (256, 1) and len(sizes) < 40
    assert len(_core.default_capture_requests(2**31 - 1)) < 120
    assert _core.default_capture_requests(3) == [1, 2, 3]
    assert _core.default_piecewise_sizes(200) == [64, 128, 192, 200]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"graph_mode": "fast"}, "graph_mode"),
        ({"capture_sizes": 4}, "capture_sizes = 4"),
        ({"gpu_memory_utilization": "x"}, "gpu_memory_utilization = 'x'"),
        ({"kv_cache_memory": "x"}, "kv_cache_memory = 'x'"),
        ({"infer_param_view": "yes"}, "infer_param_view = 'yes'"),
        ({"piecewise_sizes": "64"}, "piecewise_sizes = '64'"),
        ({"capture_sizes": [5]}, "max_num_seqs = 4"),
        ({"capture_sizes": [0]}, r"capture_sizes\[0\]"),
        ({"capture_sizes": [(2, 200)]}, "max_num_batched_tokens"),
        ({"capture_sizes": [(1, 2, 3)]}, r"capture_sizes\[0\]"),
        ({"piecewise_sizes": [300]}, "max_num_batched_tokens"),
        ({"attention_backend": "fastest"}, "attention_backend"),
        ({"attention_backend": ["native"]}, "attention_backend"),
        ({"batch_invariant": "yes"}, "batch_invariant"),
    ],
)
def test_bad_options_are_refused(device: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        open_runner(device, **{"graph_mode": "full", **options})


def test_params_of_every_kind_mix_in_a_graph(device: str) -> None:
    """Rows with any parameters in one captured step equal eager ones: tokens, ends and logprobs."""
    chosen = [
        greedy(20),
        seeded(1, 20, logprobs=20),
        seeded(2, 20, top_k=3, min_p=0.01),
        SamplingParams(temperature=1.1, seed=4, max_tokens=20, min_tokens=5),
        greedy(20, repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=0.2, logprobs=0),
        seeded(5, 20, logit_bias={7: 3.0, 9: -100.0}, allowed_token_ids=range(3, 200), logprobs=2),
        seeded(6, 20, top_p=0.7, frequency_penalty=-0.5, min_tokens=3, stop_token_ids=[50]),
    ]
    prompt = make_prompt(9, 5)
    words = [[7], [8, 9]]
    runs = []
    for mode in MODES:
        runner = open_runner(
            device,
            graph_mode=mode,
            max_num_seqs=8,
            capture_sizes=[8],
            piecewise_sizes=[8, 72],
            batch_invariant=True,
        )
        first = tokens_of(run_to_end(runner, prompt, greedy(20)))
        ended = greedy(20, stop_sequences=[first[4:9], [*first[:3], 5]], logprobs=1)
        pool = BlockPool(runner)
        rows = [
            runner.add_row(prompt, params, block_ids=pool.take(8), bad_words_token_ids=words)
            for params in chosen
        ]
        rows.append(runner.add_row(prompt, ended, block_ids=pool.take(8)))
        before = runner.stats()[f"steps_{mode}"]
        steps = [runner.execute([(row, 9) for row in rows]).result()]
        steps += [runner.execute([(row, 1) for row in rows]).result() for _ in range(15)]
        assert runner.stats()[f"steps_{mode}"] >= before + 15
        runs.append([[dataclasses.replace(output, generation=0) for output in s] for s in steps])
        last = [step[-1] for step in steps]
        assert [output.token_id for output in last[:9]] == first[:9]
        assert (last[8].finish_reason, last[8].stop_sequence) == ("stop", 0)
        assert all(output.masked for output in last[9:])
        runner.close()
    assert runs[1] == runs[0] and runs[2] == runs[0]
