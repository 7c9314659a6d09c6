# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Texts of samples that stop tokens, stop sequences and stop strings end, against a slow rule."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrv1.errors import ClosedError
from mrv1.sampling_params import SamplingParams
from mrv1.text_stream import TextStream
from mrv1.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_dir(Path(__file__).resolve().parent / "data" / "models" / "llama2")
A, B, C = (TOKENIZER.encode(letter, add_special_tokens=False)[-1] for letter in "abc")
TEXTS = {token: TOKENIZER.decode([token]) for token in (A, B, C)}


def ended(
    tokens: list[int], params: SamplingParams
) -> tuple[int, tuple[int, ...] | str | None, str]:
    """How many tokens there are, what stopped them, and the text; slowly, from the start."""
    for count in range(params.min_tokens + 1, len(tokens) + 1):
        so_far = tokens[:count]
        for sequence in params.stop_sequences:
            if tuple(so_far[-len(sequence) :]) == sequence:
                kept = count if params.include_stop_str_in_output else count - len(sequence)
                text = TOKENIZER.decode(tokens[:kept])
                # In what is shown, a stop string may still be complete with the stop sequence.
                found = [stop for stop in params.stop if stop in text]
                if not params.include_stop_str_in_output or not found:
                    return count, sequence, text
        text = TOKENIZER.decode(so_far)
        stops = [(text.index(stop) + len(stop), -len(stop)) for stop in params.stop if stop in text]
        if stops:
            end, length = min(stops)
            shown = end if params.include_stop_str_in_output else end + length
            return count, text[end + length : end], text[:shown]
    return len(tokens), None, TOKENIZER.decode(tokens)


def streamed(
    tokens: list[int], params: SamplingParams
) -> tuple[int, tuple[int, ...] | str | None, str]:
    """The same by a `TextStream`, with the stop sequences told as a device would."""
    stream = TextStream(TOKENIZER, params)
    text = ""
    for count in range(1, len(tokens) + 1):
        if count > params.min_tokens:
            for sequence in params.stop_sequences:
                if tuple(tokens[:count][-len(sequence) :]) == sequence:
                    piece, stopped = stream.finish(sequence)
                    return count, sequence if stopped is None else stopped, text + piece
        piece, stopped = stream.push(tokens[count - 1])
        text += piece
        assert TOKENIZER.decode(tokens).startswith(text)
        if stopped is not None:
            with pytest.raises(ClosedError):
                stream.push(A)
            return count, stopped, text
    piece, stopped = stream.finish()
    return len(tokens), stopped, text + piece


tokens = st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=14)


@settings(max_examples=600, deadline=None)
@given(
    tokens,
    st.lists(st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=2),
    st.booleans(),
    st.integers(0, 3),
)
def test_texts_end_as_a_slow_rule_says(
    ids: list[int], sequences: list[list[int]], stop: list[str], include: bool, least: int
) -> None:
    # One of equal length at most: of several that end at once, a device tells one.
    unique = list({len(sequence): sequence for sequence in sequences}.values())[:1]
    params = SamplingParams(
        stop_sequences=unique,
        stop=[] if least else stop,  # what min_tokens does to strings is the detokenizer's
        include_stop_str_in_output=include,
        min_tokens=least,
        max_tokens=64,
    )
    assert streamed(ids, params) == ended(ids, params)


def test_text_is_held_back_only_while_it_may_begin_a_stop_sequence() -> None:
    stream = TextStream(TOKENIZER, SamplingParams(stop_sequences=[[A, B, C]]))
    pieces = [stream.push(token).text for token in (A, B, A, C, B, A, B)]
    assert pieces == ["", "", "ab", "ac", "b", "", ""]
    assert stream.finish() == ("ab", None)


def test_stop_tokens_are_text_only_if_wanted() -> None:
    for include, expected in ((False, "a"), (True, "ab")):
        stream = TextStream(TOKENIZER, SamplingParams(include_stop_str_in_output=include))
        assert stream.push(A).text + stream.finish((B,)).text == expected
    # Special ones only if those are.
    eos = TOKENIZER._backend.token_to_id("</s>")
    for skip, expected in ((True, "a"), (False, "a</s>")):
        params = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=skip)
        stream = TextStream(TOKENIZER, params)
        assert stream.push(A).text + stream.finish((eos,)).text == expected


def test_a_string_that_is_complete_before_a_sequence_wins() -> None:
    params = SamplingParams(stop=["b"], stop_sequences=[[A, B, C]])
    stream = TextStream(TOKENIZER, params)
    assert stream.push(A) == ("", None)
    assert stream.push(B) == ("a", "b")
