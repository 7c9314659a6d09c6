# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Batch-invariant runners: what else is in a batch changes no bit of a row's logits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_arrays import rounded
from mrv1 import _core
from mrv1.runner import ModelRunner, RowHandle
from mrv1.sampling_params import SamplingParams
from serving_tools import (
    MODELS,
    BlockPool,
    greedy,
    make_prompt,
    num_blocks,
    open_runner,
    run_to_end,
    seeded,
    tokens_of,
)

OUTPUTS = 24
MODEL_NAMES = sorted(path.name for path in MODELS.iterdir() if path.is_dir())
LENGTHS = (3, 61, 17, 130, 40)


def vocab_of(model: Path) -> int:
    vocab: int = json.loads((model / "config.json").read_text())["vocab_size"]
    return vocab


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def runner(device: str, request: pytest.FixtureRequest) -> Iterator[ModelRunner]:
    opened = open_invariant(device, MODELS / "llama2", dtype=request.param)
    yield opened
    opened.close()


def open_invariant(device: str, model: Path, **options: Any) -> ModelRunner:
    defaults: dict[str, Any] = {"max_num_seqs": 6, "num_kv_blocks": 400, "dtype": "bfloat16"}
    return open_runner(device, model, batch_invariant=True, **{**defaults, **options})


def add(runner: ModelRunner, pool: BlockPool, prompt: Sequence[int]) -> RowHandle:
    blocks = pool.take(num_blocks(len(prompt) + OUTPUTS))
    return runner.add_row(prompt, greedy(OUTPUTS), block_ids=blocks)


def logits_alone(runner: ModelRunner, prompt: Sequence[int], steps: int) -> list[np.ndarray]:
    """Logits after the whole prompt in one step, then of decode steps, with nothing beside it."""
    row = add(runner, BlockPool(runner), prompt)
    logits = []
    runner.execute([(row, len(prompt))]).result()
    logits.append(runner.logits(0))
    for _ in range(steps):
        runner.execute([(row, 1)]).result()
        logits.append(runner.logits(0))
    runner.free_row(row)
    return logits


def test_logits_in_a_batch_are_those_of_the_row_alone(runner: ModelRunner) -> None:
    prompts = [make_prompt(length, length) for length in LENGTHS]
    alone = [logits_alone(runner, prompt, 6) for prompt in prompts]
    pool = BlockPool(runner)
    rows = [add(runner, pool, prompt) for prompt in prompts]
    batch = [(row, len(prompt)) for row, prompt in zip(rows, prompts, strict=True)]
    for step in range(7):
        runner.execute(batch).result()
        for item in range(len(rows)):
            np.testing.assert_array_equal(runner.logits(item), alone[item][step])
        batch = [(row, 1) for row in rows]
    for row in rows:
        runner.free_row(row)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunks_of_a_prompt_change_nothing(runner: ModelRunner, chunk: int) -> None:
    prompt = make_prompt(130, 9)
    whole = logits_alone(runner, prompt, 2)
    pool = BlockPool(runner)
    other = add(runner, pool, make_prompt(9, 1))
    runner.execute([(other, 9)]).result()
    row = add(runner, pool, prompt)
    left = len(prompt)
    decodes = 0
    while left > 0:
        count = min(chunk, left)
        left -= count
        batch = [(row, count)]
        if decodes < OUTPUTS - 2:
            batch.append((other, 1))
            decodes += 1
        runner.execute(batch).result()
    np.testing.assert_array_equal(runner.logits(0), whole[0])
    for step in (1, 2):
        runner.execute([(row, 1)]).result()
        np.testing.assert_array_equal(runner.logits(0), whole[step])
    runner.free_row(row)
    runner.free_row(other)


def tokens_together(
    runner: ModelRunner, requests: Sequence[tuple[list[int], SamplingParams]], ahead: int
) -> list[list[int]]:
    """The tokens of each request, run side by side with up to `ahead` steps in flight."""
    pool = BlockPool(runner)
    rows = [
        runner.add_row(
            prompt, params, block_ids=pool.take_groups(num_blocks(len(prompt) + OUTPUTS))
        )
        for prompt, params in requests
    ]
    tokens: list[list[int]] = [[] for _ in rows]
    pending = []

    def take_in() -> None:
        for output in pending.pop(0).result():
            if output.token_id is not None:
                tokens[rows.index(output.row)].append(output.token_id)

    batch = [(row, len(prompt)) for row, (prompt, _) in zip(rows, requests, strict=True)]
    for _ in range(OUTPUTS):
        pending.append(runner.execute(batch))
        if len(pending) >= ahead:
            take_in()
        batch = [(row, 1) for row in rows]
    while pending:
        take_in()
    for row in rows:
        runner.free_row(row)
    return tokens


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_tokens_do_not_depend_on_batch_or_run_ahead(device: str, name: str) -> None:
    model = MODELS / name
    runner = open_invariant(device, model)
    try:
        vocab = vocab_of(model)
        requests = [
            (
                make_prompt(length, length, vocab),
                greedy(OUTPUTS) if length % 2 else seeded(length, OUTPUTS),
            )
            for length in (4, 33, 90)
        ]
        alone = [tokens_of(run_to_end(runner, prompt, params)) for prompt, params in requests]
        for ahead in (1, 3):
            assert tokens_together(runner, requests, ahead) == alone
    finally:
        runner.close()


# --- row-parallel linears: one order of sums, however many ranks share the columns ----------------


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cols", [16, 48, 256, 1024, 4096])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_row_parallel_sums_are_those_of_eight_parts(
    native_device: _core.Device, rows: int, cols: int, dtype: str, with_bias: bool
) -> None:
    """The linear equals linears of its parts, neighbours added first, bit for bit."""
    rng = np.random.default_rng(cols + rows)
    outputs, parts = 72, 8
    x = rounded(rng.standard_normal((rows, cols), np.float32), dtype)
    weight = rounded(rng.standard_normal((outputs, cols), np.float32), dtype)
    bias = rng.standard_normal(outputs, np.float32) if with_bias else None

    def run(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, whole: bool) -> np.ndarray:
        program = _core.Program(dtype)
        value = program.input("x", x.shape[1])
        matrix = program.weight("w", False, x.shape[1], [("w", outputs)])
        vector = -1 if bias is None else program.weight("b", True, 1, [("b", outputs)])
        out = program.linear(value, matrix, vector, row_parallel=whole, wide=not whole)
        program.output(out)
        session = _core.ProgramSession(native_device, program, max_tokens=rows)
        session.set_options(batch_invariant=True)
        session.load_weight(matrix, weight)
        if bias is not None:
            session.load_weight(vector, bias)
        session.set_value(value, x)
        session.run(1, rows)
        result = session.value(out, rows)
        session.close()
        return result

    sums = [
        run(np.ascontiguousarray(a), np.ascontiguousarray(b), None, False)
        for a, b in zip(np.split(x, parts, 1), np.split(weight, parts, 1), strict=True)
    ]
    while len(sums) > 1:
        sums = [sums[i] + sums[i + 1] for i in range(0, len(sums), 2)]
    expected = sums[0] if bias is None else sums[0] + bias
    got = run(x, weight, bias, True)
    np.testing.assert_array_equal(got, rounded(expected, dtype))
    exact = x.astype(np.float64) @ weight.astype(np.float64).T + (0 if bias is None else bias)
    bound = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    assert np.all(np.abs(got - exact) <= bound * 1e-5 + np.abs(exact) * 2.0**-8)


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_that_a_rank_has_are_those_of_the_whole_weight(
    native_device: _core.Device, ranks: int
) -> None:
    """However few they are, columns are summed in the same order: here a GPU splits them."""
    rng = np.random.default_rng(ranks)
    outputs, cols = 3072, 1024
    x = rounded(rng.standard_normal((3, cols), np.float32), "bfloat16")
    weight = rounded(rng.standard_normal((outputs, cols), np.float32), "bfloat16")

    def run(weight: np.ndarray) -> np.ndarray:
        program = _core.Program("bfloat16")
        value = program.input("x", cols)
        own = [("w", len(weight))]
        matrix = program.weight("w", False, cols, own, whole_rows=outputs)
        out = program.linear(value, matrix, wide=True)
        program.output(out)
        session = _core.ProgramSession(native_device, program, max_tokens=3)
        session.set_options(batch_invariant=True)
        session.load_weight(matrix, weight)
        session.set_value(value, x)
        session.run(1, 3)
        result = session.value(out, 3)
        session.close()
        return result

    own = [run(part) for part in np.split(weight, ranks)]
    np.testing.assert_array_equal(np.concatenate(own, axis=1), run(weight))
