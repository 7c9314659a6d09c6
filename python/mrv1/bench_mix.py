# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figure `mix`: requests of many lengths, submitted at once, through the engine."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Final

from mrv1.bench import Timing, main_mode, ran_in_halves
from mrv1.bench_trace import StepLogs, logged_steps, stage_waits
from mrv1.engine import Engine
from mrv1.errors import InternalError, InvalidArgumentError
from mrv1.llm import peak_memory_mb
from mrv1.loader import RunnerOptions
from mrv1.sampling_params import SamplingParams

NUM_REQUESTS: Final = 256
MAX_REQUESTS: Final = 4096
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
        count: How many, at most 4096. Up to 256 they are the first of 256, which are drawn all, so
            the first are the same; more are drawn as that benchmark draws so many.

    Raises:
        InvalidArgumentError: There are not as many.
    """
    if not 1 <= count <= MAX_REQUESTS:
        raise InvalidArgumentError(
            field="requests", value=count, allowed=f"an integer in [1, {MAX_REQUESTS}]"
        )
    rng = random.Random(0)
    drawn_requests = max(count, NUM_REQUESTS)
    prompts = [
        [rng.randint(0, _MAX_TOKEN_ID) % vocab_size for _ in range(rng.randint(*_LENGTHS))]
        for _ in range(drawn_requests)
    ]
    lengths = [rng.randint(*_LENGTHS) for _ in range(drawn_requests)]
    drawn = [MixRequest(*pair) for pair in zip(prompts, lengths, strict=True)]
    return drawn[:count]


def mix_options(
    device: str | None,
    dtype: str,
    requests: Sequence[MixRequest],
    max_num_seqs: int | None = None,
) -> RunnerOptions:
    """Options of a runner that runs as many of the requests at once as its KV cache holds.

    With `max_num_seqs` no more than that.
    """
    return RunnerOptions(
        device=device,
        dtype=dtype,
        max_num_seqs=len(requests) if max_num_seqs is None else max_num_seqs,
        max_model_len=max(len(r.prompt_token_ids) + r.max_tokens for r in requests),
    )


def measure_mix(
    engine: Engine, requests: Sequence[MixRequest], trace: StepLogs | None = None
) -> Timing:
    """Measures the workload, from the submission of all requests to the end of the last.

    The step and host times are means over the steps.

    Args:
        engine: Idle.
        requests: The workload.
        trace: Gets all steps of each rank.
    """
    first = requests[0]
    # Of a prompt that none of them begins with, so that the prefix cache is of no use to them.
    length = min(len(first.prompt_token_ids), _WARMUP_TOKENS)
    warmup = MixRequest([0] * length, min(first.max_tokens, _WARMUP_TOKENS))
    _run(engine, [warmup])
    engine.check_idle()  # counts are complete
    steps = engine.stats()["steps"]
    runner = engine.model.runner
    with logged_steps(engine.model) as logs:
        before = runner.stats()
        start = time.perf_counter()
        tokens = _run(engine, requests)
        seconds = time.perf_counter() - start
        engine.check_idle()
    steps = engine.stats()["steps"] - steps
    after = runner.stats()
    host_ns = after["host_ns"] - before["host_ns"]
    if trace is not None:
        trace[:] = logs
    stages = engine.model.pipeline_parallel_size
    return Timing(
        len(requests),
        0,
        1e3 * seconds / steps,
        host_ns / 1e3 / steps,
        peak_memory_mb(),
        tokens=tokens / steps,
        graph_mode=main_mode(before, after),
        in_halves=ran_in_halves(before, after),
        stage_waits=stage_waits(logs, stages) if stages > 1 else (),
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
