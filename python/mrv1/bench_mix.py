# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figure `mix`: requests of many lengths, submitted at once, through the engine."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Final

from mrv1.bench import Timing
from mrv1.engine import Engine
from mrv1.errors import InternalError, InvalidArgumentError
from mrv1.llm import peak_memory_mb
from mrv1.loader import RunnerOptions
from mrv1.sampling_params import SamplingParams

NUM_REQUESTS: Final = 256
_LENGTHS: Final = (100, 1024)
_MAX_TOKEN_ID: Final = 10000
_TEMPERATURE: Final = 0.6
# Of the prompt and the output of the request before those that count.
_WARMUP_TOKENS: Final = 16


@dataclasses.dataclass(frozen=True)
class MixRequest:
    """One request of the workload: a prompt, and how many tokens follow it."""

    prompt_token_ids: list[int]
    max_tokens: int


def mix_requests(vocab_size: int, count: int = NUM_REQUESTS) -> list[MixRequest]:
    """The first requests of the workload that nano-vllm's benchmark draws with the seed 0.

    Lengths do not depend on the model: ids are drawn up to 10000, and wrapped where the vocabulary
    is smaller.

    Args:
        vocab_size: Of the model.
        count: How many, at most 256. All are drawn, so the first are the same for any count.

    Raises:
        InvalidArgumentError: There are not as many.
    """
    if not 1 <= count <= NUM_REQUESTS:
        raise InvalidArgumentError(
            field="requests", value=count, allowed=f"an integer in [1, {NUM_REQUESTS}]"
        )
    rng = random.Random(0)
    prompts = [
        [rng.randint(0, _MAX_TOKEN_ID) % vocab_size for _ in range(rng.randint(*_LENGTHS))]
        for _ in range(NUM_REQUESTS)
    ]
    lengths = [rng.randint(*_LENGTHS) for _ in range(NUM_REQUESTS)]
    drawn = [MixRequest(*pair) for pair in zip(prompts, lengths, strict=True)]
    return drawn[:count]


def mix_options(device: str | None, dtype: str, requests: Sequence[MixRequest]) -> RunnerOptions:
    """Options of a runner that runs as many of the requests at once as its KV cache holds."""
    return RunnerOptions(
        device=device,
        dtype=dtype,
        max_num_seqs=len(requests),
        max_model_len=max(len(r.prompt_token_ids) + r.max_tokens for r in requests),
    )


def measure_mix(engine: Engine, requests: Sequence[MixRequest]) -> Timing:
    """Measures the workload, from the submission of all requests to the end of the last.

    The step and host times are means over the steps.

    Args:
        engine: Idle.
        requests: The workload.
    """
    first = requests[0]
    # Of a prompt that none of them begins with, so that the prefix cache is of no use to them.
    length = min(len(first.prompt_token_ids), _WARMUP_TOKENS)
    warmup = MixRequest([0] * length, min(first.max_tokens, _WARMUP_TOKENS))
    _run(engine, [warmup])
    engine.check_idle()  # counts are complete
    steps = engine.stats()["steps"]
    host_ns = engine.model.runner.stats()["host_ns"]
    start = time.perf_counter()
    tokens = _run(engine, requests)
    seconds = time.perf_counter() - start
    engine.check_idle()
    steps = engine.stats()["steps"] - steps
    host_ns = engine.model.runner.stats()["host_ns"] - host_ns
    return Timing(
        len(requests),
        0,
        1e3 * seconds / steps,
        host_ns / 1e3 / steps,
        peak_memory_mb(),
        tokens=tokens / steps,
    )


def _run(engine: Engine, requests: Sequence[MixRequest]) -> int:
    """Submits requests and runs them to their ends; returns how many tokens they made."""
    for index, request in enumerate(requests):
        params = SamplingParams(
            temperature=_TEMPERATURE, ignore_eos=True, max_tokens=request.max_tokens
        )
        engine.add_request(str(index), request.prompt_token_ids, params)
    tokens = 0
    while engine.has_unfinished():
        for update in engine.step():
            if update.error is not None:
                raise InternalError(f"request {update.request_id} failed: {update.error}")
            tokens += len(update.token_ids)
    expected = sum(request.max_tokens for request in requests)
    if tokens != expected:
        raise InternalError(f"{tokens} tokens came, {expected} were asked for")
    return tokens
