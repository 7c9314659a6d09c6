# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Limits that a deployment sets, and bad words that leave nothing to draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrv1.admission import check_bad_words, check_stops
from mrv1.errors import InvalidArgumentError, RequestError
from mrv1.sampling_params import SamplingParams
from mrv1.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parent / "data" / "models"
SEQUENCES = [(1,), (2, 3, 4), (5, 6)]
STOPS = SamplingParams(stop=["a", "The runner"], stop_sequences=[[1, 2, 3]])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(DATA / "llama2")


def test_there_is_no_limit_by_itself(tokenizer: Tokenizer) -> None:
    check_bad_words(SamplingParams(), [(1,) * 5000] * 5000, 99)
    check_stops(
        SamplingParams(stop=["x" * 3000] * 300, stop_sequences=[[1] * 3000] * 300), tokenizer
    )


def test_limits_of_bad_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRV1_MAX_BAD_WORDS_NUM", "3")
    monkeypatch.setenv("MRV1_BAD_WORDS_MAX_LEN", "3")
    check_bad_words(SamplingParams(), SEQUENCES, 99, "r7")
    monkeypatch.setenv("MRV1_MAX_BAD_WORDS_NUM", "2")
    with pytest.raises(RequestError) as caught:
        check_bad_words(SamplingParams(), SEQUENCES, 99, "r7")
    assert str(caught.value) == (
        "request 'r7': bad_words: has 3 entries: must be at most 2, by MRV1_MAX_BAD_WORDS_NUM"
    )
    monkeypatch.delenv("MRV1_MAX_BAD_WORDS_NUM")
    monkeypatch.setenv("MRV1_BAD_WORDS_MAX_LEN", "2")
    with pytest.raises(RequestError) as caught:
        check_bad_words(SamplingParams(), SEQUENCES, 99, "r7")
    assert str(caught.value) == (
        "request 'r7': bad_words: has 3 tokens: must be at most 2, by MRV1_BAD_WORDS_MAX_LEN"
    )
    monkeypatch.setenv("MRV1_BAD_WORDS_MAX_LEN", "two")
    with pytest.raises(InvalidArgumentError, match="MRV1_BAD_WORDS_MAX_LEN"):
        check_bad_words(SamplingParams(), SEQUENCES, 99)


def test_limits_of_stops(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop strings and stop sequences count together; a string has its tokens."""
    length = len(tokenizer.encode("The runner", add_special_tokens=False))
    assert length > 3
    monkeypatch.setenv("MRV1_MAX_STOP_SEQS_NUM", "3")
    monkeypatch.setenv("MRV1_STOP_SEQS_MAX_LEN", str(length))
    check_stops(STOPS, tokenizer, "r7")
    monkeypatch.setenv("MRV1_MAX_STOP_SEQS_NUM", "2")
    with pytest.raises(RequestError) as caught:
        check_stops(STOPS, tokenizer, "r7")
    assert str(caught.value) == (
        "request 'r7': stop and stop_sequences: has 3 entries: must be at most 2, by "
        "MRV1_MAX_STOP_SEQS_NUM"
    )
    monkeypatch.delenv("MRV1_MAX_STOP_SEQS_NUM")
    monkeypatch.setenv("MRV1_STOP_SEQS_MAX_LEN", str(length - 1))
    with pytest.raises(RequestError) as caught:
        check_stops(STOPS, tokenizer, "r7")
    assert str(caught.value) == (
        f"request 'r7': stop[1]: has {length} tokens: must be at most {length - 1}, by "
        "MRV1_STOP_SEQS_MAX_LEN"
    )
    monkeypatch.setenv("MRV1_STOP_SEQS_MAX_LEN", "2")
    with pytest.raises(RequestError, match=r"stop_sequences\[0\]: has 3 tokens"):
        check_stops(STOPS, None)
    check_stops(SamplingParams(stop="\ud800"), tokenizer)


@pytest.mark.parametrize(("allowed", "vocab"), [([7, 8], 99), (None, 2)])
def test_bad_words_that_leave_nothing(allowed: list[int] | None, vocab: int) -> None:
    params = SamplingParams(allowed_token_ids=allowed)
    first, second = allowed or range(2)
    check_bad_words(params, [(first,), (first, second)], vocab)
    check_bad_words(params, [], vocab)
    with pytest.raises(RequestError) as caught:
        check_bad_words(params, [(first,), (second,)], vocab, "r7")
    assert str(caught.value) == (
        "request 'r7': bad_words: forbid each token that is allowed: must be texts that leave a "
        "token to draw"
    )
