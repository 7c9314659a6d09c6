# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Model families against transformers: logits and greedy tokens of small random models.

The goldens are float32; see scripts/make_goldens.py.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from golden_data import GOLDEN_NAMES, Golden, load_golden, relative_error
from mrv1.engine import Engine
from mrv1.loader import RunnerOptions, load_model
from mrv1.runner import ModelRunner
from mrv1.sampling_params import SamplingParams
from mrv1.tokenizer import Tokenizer
from serving_tools import num_blocks, open_runner

TOLERANCE = 1e-4
CHUNKS = {"whole": 10**9, "by 16": 16, "by 13": 13, "by 1": 1}

golden = functools.lru_cache(load_golden)
# Those with a greedy path that meets an end-of-sequence id.
EOS_NAMES = [
    name for name in GOLDEN_NAMES if any(step is not None for step in golden(name).first_eos_step)
]


def open_golden(device: str, name: str, **options: object) -> ModelRunner:
    return open_runner(
        device,
        golden(name).model_dir,
        **{
            "block_size": 8,
            "max_num_seqs": 5,
            "max_num_batched_tokens": 512,
            "num_kv_blocks": 256,
            "max_model_len": golden(name).max_model_len,
            **options,
        },
    )


def take_blocks(runner: ModelRunner, first: int, tokens: int) -> list[range]:
    """Block ids from `first` on for so many tokens, of each KV group."""
    count = num_blocks(tokens, runner.model.block_size)
    starts = [first + count * group for group in range(len(runner.kv_windows))]
    return [range(start, start + count) for start in starts]


def forced(runner: ModelRunner, token_ids: list[int], chunk: int) -> np.ndarray:
    """Logits behind token_ids, which are prefilled by chunks."""
    blocks = take_blocks(runner, 1, len(token_ids))
    row = runner.add_row(token_ids, SamplingParams(temperature=0), block_ids=blocks)
    for start in range(0, len(token_ids), chunk):
        runner.execute([(row, min(chunk, len(token_ids) - start))]).result()
    logits = runner.logits(0)
    runner.free_row(row)
    return logits


def check_logits(runner: ModelRunner, expected: Golden, chunk: int) -> None:
    for index, prompt in enumerate(expected.prompts):
        for place, position in enumerate(expected.positions[index]):
            logits = forced(runner, prompt[: position + 1], chunk)
            error = relative_error(logits[None], expected.logits[index][place][None])
            assert error < TOLERANCE, f"prompt {index}, position {position}: {error:.2e}"


@pytest.mark.parametrize("fusion", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("chunking", CHUNKS)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_float32_agrees_with_transformers(
    device: str, name: str, chunking: str, fusion: bool
) -> None:
    expected = golden(name)
    chunk = CHUNKS[chunking]
    with open_golden(device, name, fusion=fusion) as runner:
        assert ("add_rms_norm(" in runner.model.runner.program.dump()) == fusion
        check_logits(runner, expected, chunk)
        # All prompts together: 64 greedy tokens each, with the logits of some of the steps.
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        rows, left = [], []
        first = 1
        for prompt in expected.prompts:
            blocks = take_blocks(runner, first, len(prompt) + 64)
            rows.append(runner.add_row(prompt, params, block_ids=blocks))
            left.append(len(prompt))
            first = blocks[-1].stop
        tokens: list[list[int]] = [[] for _ in rows]
        while any(len(drawn) < 64 for drawn in tokens):
            members = [index for index in range(len(rows)) if len(tokens[index]) < 64]
            batch = [(rows[i], min(chunk, left[i]) if left[i] else 1) for i in members]
            outputs = runner.execute(batch).result()
            for item, (index, output) in enumerate(zip(members, outputs, strict=True)):
                left[index] -= min(left[index], batch[item][1])
                if output.token_id is None:
                    continue
                step = len(tokens[index])
                if step in expected.decode_steps:
                    place = expected.decode_steps.index(step)
                    reference = expected.decode_logits[index][place]
                    error = relative_error(runner.logits(item)[None], reference[None])
                    assert error < TOLERANCE, f"prompt {index}, step {step}: {error:.2e}"
                tokens[index].append(output.token_id)
        assert tokens == expected.greedy


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_bfloat16_is_near_float32(device: str, name: str) -> None:
    """Eight bits of mantissa through a few layers: far from 1e-4, and far from unrelated."""
    expected = golden(name)
    with open_golden(device, name, dtype="bfloat16") as runner:
        assert runner.model.dtype == "bfloat16"
        errors = []
        for index, prompt in enumerate(expected.prompts):
            for chunk in (10**9, 13):
                logits = forced(runner, prompt, chunk)
                reference = expected.logits[index][-1]
                errors.append(relative_error(logits[None], reference[None]))
                assert np.corrcoef(logits, reference)[0, 1] > 0.995
        assert TOLERANCE < max(errors) < 0.08


@pytest.mark.parametrize("fusion", [True, False], ids=["fused", "unfused"])
def test_chunking_changes_no_bit(device: str, fusion: bool) -> None:
    """Kernels compute a token the same way, whatever else is in the batch."""
    prompt = golden("qwen3-tied").prompts[-1]
    with open_golden(device, "qwen3-tied", fusion=fusion, batch_invariant=True) as runner:
        whole = forced(runner, prompt, 10**9)
        for chunk in (1, 7, 16):
            assert np.array_equal(forced(runner, prompt, chunk), whole)


@pytest.mark.parametrize("name", EOS_NAMES)
def test_end_of_sequence_ids_are_honoured(device: str, name: str) -> None:
    """Each id of generation_config.json ends a request, unless it says ignore_eos."""
    expected = golden(name)
    options = RunnerOptions(
        device=device,
        dtype="float32",
        max_num_seqs=4,
        max_model_len=expected.max_model_len,
        num_kv_blocks=128,
        num_threads=1,
    )
    model = load_model(expected.model_dir, options, progress=False)
    tokenizer = Tokenizer.from_dir(expected.tokenizer_dir, model.config.vocab_size)
    with Engine.from_model(model, tokenizer) as engine:
        assert sorted(engine.model.config.eos_token_ids) == sorted(expected.eos_token_ids)
        met = 0
        for index, (prompt, step) in enumerate(
            zip(expected.prompts, expected.first_eos_step, strict=True)
        ):
            params = {
                "eos": SamplingParams(temperature=0, max_tokens=64),
                "ignored": SamplingParams(temperature=0, max_tokens=64, ignore_eos=True),
            }
            for kind, chosen in params.items():
                engine.add_request(kind, prompt, chosen)
            tokens: dict[str, list[int]] = {"eos": [], "ignored": []}
            reasons = {}
            while engine.has_unfinished():
                for update in engine.step():
                    tokens[update.request_id] += update.token_ids
                    if update.finish_reason is not None:
                        reasons[update.request_id] = (update.finish_reason, update.stop_reason)
            assert tokens["ignored"] == expected.greedy[index]
            assert reasons["ignored"] == ("length", None)
            if step is None:
                assert tokens["eos"] == tokens["ignored"] and reasons["eos"] == ("length", None)
            else:
                met += 1
                assert tokens["eos"] == tokens["ignored"][: step + 1]
                assert tokens["eos"][-1] in expected.eos_token_ids
                assert reasons["eos"] == ("stop", None)
        assert met > 0, "no golden path meets an end-of-sequence id"
        engine.check_idle()
