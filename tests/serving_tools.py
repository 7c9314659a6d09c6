# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What the tests of runner, engine and LLM share: small runners, a block pool, a slow reference."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from mrv1 import _core
from mrv1.errors import DeviceError
from mrv1.runner import ModelRunner, RowOutput
from mrv1.sampling_params import SamplingParams

MODELS = Path(__file__).resolve().parent / "data" / "models"
LLAMA = MODELS / "llama2"  # 328 ids; one weight file; lm_head of its own
VOCAB = 328

Tensors = dict[str, npt.NDArray[Any]]


def open_runner(device: str, model: Path = LLAMA, **options: Any) -> ModelRunner:
    """A float32 runner with small tables; `options` go before the defaults."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "num_kv_blocks": 128,
        "num_threads": 1,
    }
    return ModelRunner(model, device=device, progress=False, **{**defaults, **options})


def need_ranks(device: str, count: int) -> None:
    """Skips a test for which the machine has too few GPUs; the CPU has ranks as it likes."""
    if device == "cuda":
        try:
            _core.Device(device, ordinal=count - 1).close()
        except DeviceError as error:
            pytest.skip(f"needs {count} GPUs: {error}")


def greedy(max_tokens: int | None = 16, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **{"ignore_eos": True, **fields})


def seeded(seed: int, max_tokens: int | None = 16, **fields: Any) -> SamplingParams:
    defaults: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True}
    return SamplingParams(seed=seed, max_tokens=max_tokens, **{**defaults, **fields})


def make_prompt(length: int, seed: int, vocab: int = VOCAB) -> list[int]:
    """Token ids without the low special ones."""
    ids: list[int] = np.random.default_rng(seed).integers(3, vocab, length).tolist()
    return ids


def num_blocks(tokens: int, block_size: int = 4) -> int:
    return -(-tokens // block_size)


class BlockPool:
    """Free KV block ids of a runner; block 0 is nobody's."""

    def __init__(self, runner: ModelRunner) -> None:
        self.total = runner.model.num_kv_blocks - 1
        self.free = list(range(self.total, 0, -1))
        self.num_groups = len(runner.kv_windows)

    def take(self, count: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]

    def take_groups(self, count: int) -> list[list[int]]:
        """`count` blocks for each KV group."""
        return [self.take(count) for _ in range(self.num_groups)]

    def give_back(self, blocks: Sequence[int]) -> None:
        self.free.extend(blocks)
        assert len(set(self.free)) == len(self.free) <= self.total, "a block came back twice"


def run_to_end(
    runner: ModelRunner,
    token_ids: Sequence[int],
    params: SamplingParams,
    *,
    blocks: Sequence[int] | None = None,
    chunk: int = 10**9,
    prompt_len: int | None = None,
    bad_words: Sequence[Sequence[int]] = (),
) -> list[RowOutput]:
    """Runs one request alone, a step at a time, and frees its row; outputs of drawn tokens."""
    limit = num_blocks(runner.model.max_model_len, runner.model.block_size)
    pool = BlockPool(runner)
    each = min(limit, pool.total // pool.num_groups)
    taken = pool.take_groups(each) if blocks is None else list(blocks)[:limit]
    row = runner.add_row(
        token_ids, params, block_ids=taken, prompt_len=prompt_len, bad_words_token_ids=bad_words
    )
    outputs: list[RowOutput] = []
    left = len(token_ids)
    while not outputs or outputs[-1].finish_reason is None:
        tokens = min(chunk, left) if left > 0 else 1
        left -= tokens
        output = runner.execute([(row, tokens)]).result()[0]
        if left <= 0:
            outputs.append(output)
        else:
            assert output.token_id is None and output.finish_reason is None
    runner.free_row(row)
    return outputs


def tokens_of(outputs: Sequence[RowOutput]) -> list[int]:
    assert all(output.token_id is not None for output in outputs)
    return [output.token_id for output in outputs if output.token_id is not None]


class SlowReference:
    """One request at a time, whole prefill, one step in flight: what a request must generate."""

    def __init__(self, device: str, model: Path = LLAMA, **options: Any) -> None:
        self._runner = open_runner(device, model, **{"max_num_seqs": 1, **options})
        self._known: dict[Any, list[RowOutput]] = {}

    def outputs(
        self, prompt: Sequence[int], params: SamplingParams, bad_words: Sequence[Sequence[int]] = ()
    ) -> list[RowOutput]:
        """What its steps say, those of the last of the prompt first."""
        assert params.temperature == 0 or params.seed is not None
        key = (tuple(prompt), params, tuple(map(tuple, bad_words)))
        if key not in self._known:
            self._known[key] = run_to_end(self._runner, prompt, params, bad_words=bad_words)
        return self._known[key]

    def __call__(self, prompt: Sequence[int], params: SamplingParams) -> tuple[list[int], str]:
        """Token ids and finish reason. `params` need a seed, or temperature 0."""
        outputs = self.outputs(prompt, params)
        reason = outputs[-1].finish_reason
        assert reason is not None
        return tokens_of(outputs), reason

    def close(self) -> None:
        self._runner.close()


class Listener:
    """A matcher of `_core.Grammar` that allows every token and notes those that it is told.

    Args:
        lifetime: Tokens after which it fails.
    """

    def __init__(self, lifetime: int = 10**9) -> None:
        self.lifetime = lifetime
        self.heard: list[int] = []

    def is_stopped(self) -> bool:
        return self.is_error()

    def is_error(self) -> bool:
        return len(self.heard) >= self.lifetime

    def get_error(self) -> str:
        return "worn out"


class OpenExecutor:
    """An executor for such matchers.

    Args:
        fails_in: The call for masks, counted from 1, that fails; 0 is none.
    """

    def __init__(self, fails_in: int = 0) -> None:
        self.fails_in = fails_in
        self.calls: list[list[int]] = []  # rows of each call for masks

    def consume_token_par(self, pairs: list[tuple[Listener, int]]) -> list[bool]:
        for matcher, token in pairs:
            matcher.heard.append(token)
        return [True] * len(pairs)

    def unsafe_compute_mask_ptr(
        self, pairs: list[tuple[Listener, int]], address: int, size: int, rows: int
    ) -> None:
        self.calls.append([row for _, row in pairs])
        if len(self.calls) == self.fails_in:
            raise RuntimeError("out of order")
        for _, row in pairs:
            assert 0 <= row < rows
            ctypes.memset(address + row * size, 0xFF, size)


def cut(tokens: Sequence[int], params: SamplingParams) -> tuple[tuple[int, ...], str]:
    """Where a path that nothing has stopped ends by stop tokens, stop sequences and max_tokens."""
    for end in range(1, len(tokens[: params.max_tokens]) + 1):
        if tokens[end - 1] in params.stop_token_ids or ending_sequence(tokens[:end], params) >= 0:
            return tuple(tokens[:end]), "stop"
    return tuple(tokens[: params.max_tokens]), "length"


def ending_sequence(tokens: Sequence[int], params: SamplingParams) -> int:
    """Index of the stop sequence that outputs end with, the first one if several do; else -1."""
    for index, sequence in enumerate(params.stop_sequences):
        if tuple(tokens[-len(sequence) :]) == sequence:
            return index
    return -1


def copy_model(
    directory: Path,
    *,
    source: Path = LLAMA,
    config: dict[str, Any] | None = None,
    change: Callable[[Tensors], None] | None = None,
) -> Path:
    """Copies a one-file model, with fields of its config and tensors changed."""
    shutil.copytree(source, directory)
    if config:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if change is not None:
        weights = directory / "model.safetensors"
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights)
    return directory
