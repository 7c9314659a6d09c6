# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figure `sampler`: drawing a token for each row of a step."""

from __future__ import annotations

import statistics
from typing import Final

from mrv1 import _core, bench
from mrv1.bench import Bandwidth, Record, Timing
from mrv1.llm import peak_memory_mb

CASES: Final = ("greedy", "temperature", "top_k_top_p", "all")
# Tokens of each row, as penalties and bad words see them.
_PROMPT_TOKENS: Final = 512
_OUTPUT_TOKENS: Final = 128
_MAX_COPIES: Final = 256


def case_spec(case: str, vocab: int) -> _core.RowSpec:
    """What a row of a case is: its tokens and sampling parameters.

    Args:
        case: One of `CASES`.
        vocab: Size of the vocabulary.
    """
    spec = _core.RowSpec()
    # Numbers that repeat, as words do.
    tokens = [i * i * 7919 % vocab for i in range(_PROMPT_TOKENS + _OUTPUT_TOKENS)]
    spec.token_ids = tokens
    spec.prompt_len = _PROMPT_TOKENS
    spec.max_tokens = 2 * _OUTPUT_TOKENS
    spec.temperature = 0.0 if case == "greedy" else 0.8
    if case in ("top_k_top_p", "all"):
        spec.top_k, spec.top_p = 50, 0.9
    if case == "all":
        spec.min_p = 0.02
        spec.min_tokens = spec.max_tokens
        spec.stop_ids = _spread(4, vocab)
        spec.presence_penalty, spec.frequency_penalty = 0.5, 0.3
        spec.repetition_penalty = 1.1
        ids = _spread(64, vocab)
        spec.logit_bias = [(token, 2.0 * (-1) ** i) for i, token in enumerate(ids)]
        spec.bad_words = [[tokens[-1], token] for token in ids[:8]]
        spec.bad_words = spec.bad_words + [[token] for token in ids[8:16]]
        spec.allowed_token_ids = [token for token in range(vocab) if token % 8 != 7]
        spec.num_logprobs = min(5, vocab)
    return spec


def _spread(count: int, vocab: int) -> list[int]:
    """So many distinct token ids, or all of them."""
    count = min(count, vocab)
    return [i * vocab // count for i in range(count)]


def num_copies(batch: int, vocab: int, working_set: int) -> int:
    """Matrices of logits that hold so many bytes, at most 256."""
    return max(1, min(_MAX_COPIES, -(-working_set // (4 * batch * vocab))))


def measure_sampler(
    device: _core.Device,
    case: str,
    batch: int,
    vocab: int,
    repeats: int,
    working_set: int,
    bandwidth: Bandwidth,
) -> Record:
    """Times the sampler of a step by itself.

    Args:
        device: Where.
        case: One of `CASES`.
        batch: Rows.
        vocab: Logits of each.
        repeats: Runs; their median is the time.
        working_set: Bytes of logits that a run goes through, at least, unless that takes more than
            256 calls.
        bandwidth: Of the same run.
    """
    read_bytes = 4 * batch * vocab
    copies = num_copies(batch, vocab, working_set)
    probe = _core.SampleProbe(device, batch, vocab, case_spec(case, vocab), copies)
    try:
        seconds = statistics.median(probe.time_runs(repeats))
        floor_ms = read_bytes / bandwidth.read_gb_s / 1e6
        read_us = 1e3 * floor_ms
        if device.kind == "cuda":
            read_us = 1e6 * statistics.median(probe.time_reads(repeats))
    finally:
        probe.close()
    timing = Timing(batch, _PROMPT_TOKENS + _OUTPUT_TOKENS, 1e3 * seconds, None, peak_memory_mb())
    shape = f"vocabulary {vocab}"
    record = bench.make_record("sampler", shape, bench.describe_device(device), "float32", timing)
    bench.set_bandwidth(record, bandwidth)
    record["case"] = case
    record["vocab"] = vocab
    record["us"] = round(1e6 * seconds, 4)
    record["floor_us"] = round(read_us, 4)
    record["floor_ms"] = round(floor_ms, 6)
    record["x_floor"] = round(timing.step_ms / floor_ms, 3)
    return record
