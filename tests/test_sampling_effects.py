# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Each sampling parameter seen in what the demo model generates, against edits of its logits.

The raw logits of each place come from a runner of its own, which computes the text so far as a
prompt. On the CPU they are those of the engine bit for bit.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mrv1 import LLM, SamplingParams
from mrv1.errors import InvalidArgumentError, RequestError
from mrv1.logprobs import Logprob
from mrv1.runner import ModelRunner
from mrv1.shapes import demo_model
from mrv1.structured_outputs_params import StructuredOutputsParams
from serving_tools import BlockPool, greedy, num_blocks, run_to_end, seeded, tokens_of

PROMPT = "The engine runs the engine and the"
PROMPTS = [PROMPT, "A block table", "Each request has one row; each request has one"]
NUM = 24
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3}
# Logits of a GPU may differ by this much between a prefill and a decode step.
SLACK = {"cpu": 0.0, "cuda": 2e-2}

Floats = npt.NDArray[np.float32]
Edit = Callable[[Floats, list[int], list[int]], Floats]


def open_llm(device: str, **options: Any) -> LLM:
    sizes: dict[str, Any] = {"num_kv_blocks": 256, "max_num_seqs": 8, "num_threads": 1}
    # So that on a GPU, too, equal requests of different batches have equal logits.
    sizes["batch_invariant"] = True
    return LLM(demo_model(), device=device, dtype="float32", progress=False, **{**sizes, **options})


@pytest.fixture(scope="module")
def llm(device: str) -> Iterator[LLM]:
    with open_llm(device, max_logprobs=-1) as llm:
        yield llm


@pytest.fixture(scope="module")
def drafting(device: str) -> Iterator[LLM]:
    with open_llm(device, speculative_config=DRAFTS) as llm:
        yield llm


class RawLogits:
    """Logits of the token behind a text, without any parameter."""

    def __init__(self, device: str) -> None:
        self._runner = ModelRunner(
            demo_model(),
            device=device,
            dtype="float32",
            progress=False,
            num_kv_blocks=64,
            batch_invariant=True,  # as open_llm()'s
        )
        self.slack = SLACK[device]

    def __call__(self, token_ids: list[int]) -> Floats:
        blocks = range(1, 1 + num_blocks(len(token_ids) + 1, self._runner.model.block_size))
        row = self._runner.add_row(token_ids, greedy(1), block_ids=blocks)
        self._runner.execute([(row, len(token_ids))]).result()
        logits: Floats = self._runner.logits(0)
        self._runner.free_row(row)
        return logits

    def close(self) -> None:
        self._runner.close()


@pytest.fixture(scope="module")
def raw(device: str) -> Iterator[RawLogits]:
    logits = RawLogits(device)
    yield logits
    logits.close()


def check_greedy(llm: LLM, raw: RawLogits, params: SamplingParams, edit: Edit) -> list[list[int]]:
    """Checks that each token of greedy outputs is the best of the edited logits of its place."""
    outputs = []
    for result in llm.generate(PROMPTS, params):
        prompt, output = result.prompt_token_ids, result.token_ids
        for place, token in enumerate(output):
            edited = edit(raw(prompt + output[:place]).copy(), prompt, output[:place])
            assert edited[token] >= edited.max() - raw.slack, (place, token)
            if raw.slack == 0:
                assert token == int(edited.argmax())  # the lowest of equals
        outputs.append(output)
    return outputs


def plain(llm: LLM) -> list[list[int]]:
    return [result.token_ids for result in llm.generate(PROMPTS, greedy(NUM))]


# --- what edits logits ---------------------------------------------------------------------------


def penalised(presence: float, frequency: float, repetition: float) -> Edit:
    def edit(logits: Floats, prompt: list[int], output: list[int]) -> Floats:
        for token in {*prompt, *output}:
            value, factor = logits[token], np.float32(repetition)
            logits[token] = value / factor if value > 0 else value * factor
        for token, count in collections.Counter(output).items():
            # One rounding, as of a fused multiply and add.
            exact = float(logits[token]) - float(np.float32(frequency)) * count
            logits[token] = np.float32(exact) - np.float32(presence)
        return logits

    return edit


@pytest.mark.parametrize(
    ("presence", "frequency", "repetition"),
    [(1.5, 0, 1), (0, 1.25, 1), (0, 0, 1.4), (-1.5, -0.75, 0.8), (0.5, 0.25, 1.2), (2, 2, 1e30)],
)
def test_penalties(
    llm: LLM, raw: RawLogits, presence: float, frequency: float, repetition: float
) -> None:
    params = greedy(
        NUM,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
    )
    outputs = check_greedy(llm, raw, params, penalised(presence, frequency, repetition))
    before = plain(llm)
    assert outputs != before
    repeats = [sum(len(o) - len(set(o)) for o in some) for some in (before, outputs)]
    if presence > 0 or frequency > 0 or repetition > 1:
        assert repeats[1] < repeats[0]
    else:
        assert repeats[1] > repeats[0]


def test_a_repetition_penalty_without_end_repeats_nothing(llm: LLM) -> None:
    (result,) = llm.generate(PROMPT, greedy(NUM, repetition_penalty=1e30, frequency_penalty=2))
    assert len(set(result.token_ids)) == NUM
    assert not set(result.token_ids) & set(result.prompt_token_ids)


def test_logit_bias(llm: LLM, raw: RawLogits) -> None:
    first = plain(llm)[0][0]
    biases = {first: -3.0, 40: 2.5, 300: 1.25, 7: -100.0}

    def edit(logits: Floats, *_: list[int]) -> Floats:
        for token, bias in biases.items():
            logits[token] += np.float32(bias)
        return logits

    check_greedy(llm, raw, greedy(NUM, logit_bias=biases), edit)
    (forced,) = llm.generate(PROMPT, seeded(3, NUM, logit_bias={123: 100}))
    assert forced.token_ids == [123] * NUM
    (without,) = llm.generate(PROMPT, seeded(3, NUM, logit_bias={first: -100}))
    assert first not in without.token_ids


def test_allowed_token_ids(llm: LLM, raw: RawLogits) -> None:
    allowed = [5, 44, 45, 46, 47, 250, 300, llm.model.config.vocab_size - 1]

    def edit(logits: Floats, *_: list[int]) -> Floats:
        kept = np.full_like(logits, -np.inf)
        kept[allowed] = logits[allowed]
        return kept

    outputs = check_greedy(llm, raw, greedy(NUM, allowed_token_ids=allowed), edit)
    assert {token for output in outputs for token in output} <= set(allowed)
    for seed in range(4):
        (result,) = llm.generate(PROMPT, seeded(seed, NUM, allowed_token_ids=allowed))
        assert set(result.token_ids) <= set(allowed)
    (single,) = llm.generate(PROMPT, seeded(1, 5, allowed_token_ids=[9]))
    assert single.token_ids == [9] * 5


def contains(output: list[int], sequence: tuple[int, ...]) -> bool:
    return any(tuple(output[at : at + len(sequence)]) == sequence for at in range(len(output) + 1))


def test_bad_words(llm: LLM, raw: RawLogits) -> None:
    """Words that would come do not: single tokens, words of several, and what follows them."""
    whole = llm.generate(PROMPTS, greedy(NUM))
    words = ["carried", "completely", "Hooray", "edge"]
    sequences = llm.tokenizer.encode_bad_words(words)
    assert {len(sequence) > 1 for sequence in sequences} == {True, False}
    assert sum(contains(result.token_ids, s) for result in whole for s in sequences) >= 4

    def edit(logits: Floats, _: list[int], output: list[int]) -> Floats:
        for sequence in sequences:
            begin = list(sequence[:-1])
            if not begin or output[-len(begin) :] == begin:
                logits[sequence[-1]] = -np.inf
        return logits

    outputs = check_greedy(llm, raw, greedy(NUM, bad_words=words), edit)
    outputs += [
        r.token_ids
        for seed in range(3)
        for r in llm.generate(PROMPTS, seeded(seed, NUM, bad_words=words))
    ]
    assert not any(contains(output, sequence) for output in outputs for sequence in sequences)


def test_a_bad_word_of_several_tokens_may_begin_with_the_prompt(llm: LLM) -> None:
    """Only the output counts: what the prompt ends with does not complete a word."""
    prompt = llm.tokenizer.encode(PROMPT)
    before = llm.generate([prompt], greedy(1))[0].token_ids
    word = llm.tokenizer.decode([prompt[-1], *before])
    if tuple(llm.tokenizer.encode(word, False)) != (prompt[-1], *before):
        word = llm.tokenizer.decode(prompt[-1:]) + llm.tokenizer.decode(before)
    sequences = llm.tokenizer.encode_bad_words([word])
    assert all(len(sequence) > 1 for sequence in sequences)
    assert llm.generate([prompt], greedy(1, bad_words=[word]))[0].token_ids == before


def test_the_order_of_edits(llm: LLM, raw: RawLogits) -> None:
    """Bias, allowed tokens, penalties, bad words: a penalty weighs the biased logit."""
    allowed = list(range(30, 400))
    word = "carried"
    sequences = llm.tokenizer.encode_bad_words([word])
    weigh = penalised(0.5, 0.25, 1.7)

    def edit(logits: Floats, prompt: list[int], output: list[int]) -> Floats:
        logits[50] += np.float32(4.0)
        logits[[*range(30), *range(400, len(logits))]] = -np.inf
        logits = weigh(logits, prompt, output)
        for sequence in sequences:
            begin = list(sequence[:-1])
            if not begin or output[-len(begin) :] == begin:
                logits[sequence[-1]] = -np.inf
        return logits

    params = greedy(
        NUM,
        logit_bias={50: 4.0},
        allowed_token_ids=allowed,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.7,
        bad_words=[word],
    )
    check_greedy(llm, raw, params, edit)


# --- log probabilities ---------------------------------------------------------------------------


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    shifted: npt.NDArray[np.float64] = wide - wide.max()
    return shifted - np.log(np.exp(shifted).sum())


def check_place(
    place: dict[int, Logprob], token: int, logits: Floats, count: int, slack: float
) -> None:
    """Checks the log probabilities of one place against its raw logits."""
    expected = log_softmax(logits)
    assert next(iter(place)) == token
    for other, found in place.items():
        assert found.logprob == pytest.approx(expected[other], abs=1e-5 + slack)
    order = -logits.astype(np.float64)
    if count > 1024:  # then by log probabilities, whose rounding makes more of them equal
        assert len(place) == len(logits)
        order = np.array([-place[other].logprob for other in range(len(logits))])
    best = np.lexsort((np.arange(len(logits)), order))[:count].tolist()
    if slack == 0:
        assert list(place) == list(dict.fromkeys([token, *best]))
        assert place[token].rank == 1 + int((logits > logits[token]).sum())
        others = [other for other in place if other != token]
        assert [place[other].rank for other in others] == [1 + best.index(o) for o in others]
    else:
        assert len(place) in (count, count + 1)


@pytest.mark.parametrize(
    "params",
    [
        greedy(12, logprobs=5),
        seeded(4, 12, logprobs=3),
        greedy(12, logprobs=0),
        # What edits logits does not change the log probabilities of the model.
        seeded(
            5,
            12,
            logprobs=4,
            repetition_penalty=1.5,
            logit_bias={60: 5},
            allowed_token_ids=range(20, 300),
            temperature=2.0,
            min_p=0.01,
        ),
    ],
)
def test_logprobs(llm: LLM, raw: RawLogits, params: SamplingParams) -> None:
    assert params.logprobs is not None
    for result in llm.generate(PROMPTS, params):
        output = result.outputs[0]
        assert result.logprobs == output.logprobs and output.logprobs is not None
        assert len(output.logprobs) == len(output.token_ids) == 12
        for at, (token, place) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            logits = raw(result.prompt_token_ids + output.token_ids[:at])
            check_place(place, token, logits, params.logprobs, raw.slack)
            for other, found in place.items():
                assert found.decoded_token == llm.tokenizer.decode([other], False)
        assert output.cumulative_logprob == pytest.approx(
            math.fsum(p[t].logprob for t, p in zip(output.token_ids, output.logprobs, strict=True))
        )
        if params.temperature == 0:
            assert all(
                p[t].rank == 1 for t, p in zip(output.token_ids, output.logprobs, strict=True)
            )


def test_logprobs_of_the_whole_vocabulary(llm: LLM, raw: RawLogits) -> None:
    (result,) = llm.generate(PROMPT, seeded(1, 3, logprobs=-1))
    assert result.logprobs is not None
    vocab = llm.model.config.vocab_size
    for at, (token, place) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
        assert len(place) == vocab
        assert sum(math.exp(found.logprob) for found in place.values()) == pytest.approx(1, 1e-5)
        logits = raw(result.prompt_token_ids + result.token_ids[:at])
        check_place(place, token, logits, vocab, raw.slack)


def test_logprobs_are_those_under_a_grammar(llm: LLM, raw: RawLogits) -> None:
    """The form of the text comes before log probabilities; other edits come behind them."""
    form = StructuredOutputsParams(regex="[ab]{2}")
    (result,) = llm.generate(
        PROMPT,
        SamplingParams(
            structured_outputs=form, logprobs=-1, seed=1, logit_bias={40: 9}, repetition_penalty=3
        ),
    )
    assert len(result.text) == 2 and set(result.text) <= set("ab")
    assert result.logprobs is not None
    for at, (token, place) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
        finite = {other: p.logprob for other, p in place.items() if p.logprob > -math.inf}
        assert token in finite and 1 <= len(finite) <= 6
        logits = raw(result.prompt_token_ids + result.token_ids[:at])
        masked = np.full_like(logits, -np.inf)
        masked[list(finite)] = logits[list(finite)]
        check_place(place, token, masked, len(logits), raw.slack)


def test_without_logprobs_there_are_none(llm: LLM) -> None:
    with_, without = llm.generate([PROMPT] * 2, [greedy(4, logprobs=1), greedy(4)])
    assert with_.token_ids == without.token_ids and with_.logprobs is not None
    assert without.logprobs is None and without.outputs[0].cumulative_logprob is None
    assert all(chunk.logprobs is None for chunk in llm.stream(PROMPT, greedy(4)))
    (silent,) = llm.generate(PROMPT, greedy(4, logprobs=1, detokenize=False))
    assert silent.logprobs is not None
    assert all(found.decoded_token is None for place in silent.logprobs for found in place.values())


def test_streamed_logprobs_are_those_of_the_result(llm: LLM) -> None:
    streamed: dict[int, list[dict[int, Logprob]]] = {0: [], 1: []}
    result = None
    for chunk in llm.stream(PROMPT, seeded(2, 9, n=2, logprobs=2)):
        assert chunk.logprobs is not None and len(chunk.logprobs) == len(chunk.token_ids)
        streamed[chunk.sample] += chunk.logprobs
        result = chunk.result or result
    assert result is not None
    assert [output.logprobs for output in result.outputs] == [streamed[0], streamed[1]]


def test_logprobs_end_where_a_stop_string_cuts_the_tokens(llm: LLM, drafting: LLM) -> None:
    (whole,) = llm.generate(PROMPT, greedy(40, logprobs=1))
    for at in range(4, len(whole.text) - 2, 5):
        stop = whole.text[at : at + 2]
        for each in (llm, drafting):
            (result,) = each.generate(PROMPT, greedy(40, logprobs=1, stop=stop))
            assert result.stop_reason == stop
            assert result.logprobs is not None and whole.logprobs is not None
            assert len(result.logprobs) == len(result.token_ids) < 40
            for place, token, before in zip(
                result.logprobs, result.token_ids, whole.logprobs, strict=False
            ):
                assert place[token].logprob == pytest.approx(before[token].logprob, abs=1e-3)


def test_max_logprobs_is_checked(device: str, llm: LLM) -> None:
    vocab = llm.model.config.vocab_size
    assert llm.model.max_logprobs == vocab
    with open_llm(device) as usual:
        assert usual.model.max_logprobs == 20
        usual.generate(PROMPT, greedy(1, logprobs=20))
        for asked in (21, -1):
            with pytest.raises(RequestError, match=f"logprobs = {asked}: must be at most the eng"):
                usual.generate(PROMPT, greedy(1, logprobs=asked))
    for bad in (-2, True, 1.5, None):
        with pytest.raises(InvalidArgumentError, match="max_logprobs"):
            open_llm(device, max_logprobs=bad)
    with open_llm(device, max_logprobs=0) as chosen_only:
        (result,) = chosen_only.generate(PROMPT, greedy(2, logprobs=0))
        assert result.logprobs is not None and [len(place) for place in result.logprobs] == [1, 1]


@pytest.mark.parametrize("count", [0, 3, -1])
def test_prompt_logprobs(llm: LLM, raw: RawLogits, count: int) -> None:
    vocab = llm.model.config.vocab_size
    for result in llm.generate(PROMPTS, seeded(5, 4, n=2, prompt_logprobs=count, logprobs=1)):
        prompt, scored = result.prompt_token_ids, result.prompt_logprobs
        assert scored is not None and len(scored) == len(prompt)
        assert scored[0] is None
        for at in range(1, len(prompt)):
            place = scored[at]
            assert place is not None
            logits = raw(prompt[:at])
            check_place(place, prompt[at], logits, vocab if count < 0 else count, raw.slack)
            first = place[prompt[at]]
            assert first.decoded_token == llm.tokenizer.decode([prompt[at]], False)


def test_prompt_logprobs_in_pieces_and_again(device: str, llm: LLM) -> None:
    """Chunks change nothing, nor does a prefix that is cached: what is asked for is computed."""
    prompt = [*llm.tokenizer.encode(PROMPT), *range(30, 90)]
    (expected,) = llm.generate([prompt], greedy(4, prompt_logprobs=2))
    with open_llm(device, max_num_batched_tokens=16) as small:
        small.generate([prompt], greedy(4))
        for _ in range(2):
            (result,) = small.generate([prompt], greedy(4, prompt_logprobs=2))
            assert result.num_cached_tokens == 0
            assert result.token_ids == expected.token_ids
            assert result.prompt_logprobs is not None and expected.prompt_logprobs is not None
            assert len(result.prompt_logprobs) == len(prompt)
            if device == "cpu":
                assert result.prompt_logprobs == expected.prompt_logprobs
        (plain_result,) = small.generate([prompt], greedy(4))
        assert plain_result.prompt_logprobs is None and plain_result.num_cached_tokens > 0


def test_the_only_token_of_a_prompt_has_no_logprob(llm: LLM) -> None:
    (result,) = llm.generate([[40]], greedy(2, prompt_logprobs=2))
    assert result.prompt_logprobs == [None]


def test_prompt_logprobs_without_text(llm: LLM) -> None:
    (result,) = llm.generate(PROMPT, greedy(1, prompt_logprobs=1, detokenize=False))
    assert result.prompt_logprobs is not None
    for place in result.prompt_logprobs[1:]:
        assert place is not None
        assert all(found.decoded_token is None for found in place.values())


# --- stops ---------------------------------------------------------------------------------------


def first_end(output: list[int], sequence: tuple[int, ...], least: int = 0) -> int | None:
    """Tokens up to the end of the first whole sequence that ends behind `least` tokens."""
    for count in range(max(len(sequence), least + 1), len(output) + 1):
        if tuple(output[count - len(sequence) : count]) == sequence:
            return count
    return None


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_stop_sequences(llm: LLM, drafting: LLM, length: int) -> None:
    for prompt, whole in zip(PROMPTS, llm.generate(PROMPTS, greedy(40)), strict=True):
        for start in range(0, 40 - length, 7):
            sequence = tuple(whole.token_ids[start : start + length])
            for least in (0, start + length):
                end = first_end(whole.token_ids, sequence, least)
                for include in (False, True):
                    params = greedy(
                        40,
                        stop_sequences=[[5, 6, 7], sequence],
                        min_tokens=least,
                        include_stop_str_in_output=include,
                        logprobs=0,
                    )
                    for each in (llm, drafting):
                        (result,) = each.generate(prompt, params)
                        assert result.logprobs is not None
                        assert len(result.logprobs) == len(result.token_ids)
                        if end is None:
                            assert result.finish_reason == "length"
                            assert result.stop_reason is None and result.text == whole.text
                            continue
                        assert result.token_ids == whole.token_ids[:end]
                        assert (result.finish_reason, result.stop_reason) == ("stop", sequence)
                        shown = end if include else end - length
                        assert result.text == llm.tokenizer.decode(whole.token_ids[:shown])


def test_reasons_are_exact(llm: LLM) -> None:
    """What stopped a request, where several could have."""
    (whole,) = llm.generate(PROMPT, greedy(20))
    a, b, c = whole.token_ids[5:8]
    assert c not in whole.token_ids[:7]
    for params, reason in (
        (greedy(20, stop_sequences=[[a, b, c]]), (a, b, c)),
        (greedy(20, stop_token_ids=[c], stop_sequences=[[c, 5]]), c),
        (greedy(20, stop_token_ids=[c], stop_sequences=[[b, c]]), c),
        (greedy(20, stop_sequences=[[b, a], [b, c], [a, b, c]]), (b, c)),
        (greedy(8, stop_token_ids=[c]), c),  # with the last token that there may be
        (greedy(8, stop_sequences=[[b, c]]), (b, c)),
        (greedy(7, stop_sequences=[[b, c]]), None),
    ):
        (result,) = llm.generate(PROMPT, params)
        assert result.stop_reason == reason
        assert result.finish_reason == ("length" if reason is None else "stop")
        assert result.token_ids == whole.token_ids[: 7 if reason is None else 8]


def test_the_text_of_a_stop_token_can_be_included(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPT, greedy(20))
    token = whole.token_ids[6]
    count = whole.token_ids.index(token) + 1
    (result,) = llm.generate(
        PROMPT, greedy(20, stop_token_ids=[token], include_stop_str_in_output=True)
    )
    assert result.text == llm.tokenizer.decode(whole.token_ids[:count])
    assert result.stop_reason == token


# --- speculation, samples, runners ---------------------------------------------------------------

EDITS: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": -1.0, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    "bias": {"logit_bias": {45: 2.0, 300: -4.0}},
    "allowed": {"allowed_token_ids": range(10, 350)},
    "bad_words": {"bad_words": ["the", "e", "block t"]},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": range(40, 90)},
    "all": {
        "presence_penalty": 0.2,
        "frequency_penalty": -0.4,
        "repetition_penalty": 0.9,
        "logit_bias": {45: 2.0},
        "allowed_token_ids": range(10, 350),
        "bad_words": ["the", "block t"],
        "logprobs": 3,
        "top_k": 30,
        "min_p": 0.01,
    },
}


@pytest.mark.parametrize("name", EDITS)
def test_drafts_change_nothing(llm: LLM, drafting: LLM, name: str) -> None:
    for params in (greedy(40, **EDITS[name]), seeded(11, 40, n=2, **EDITS[name])):
        one = llm.generate(PROMPTS, params)
        two = drafting.generate(PROMPTS, params)
        for before, after in zip(one, two, strict=True):
            assert [o.token_ids for o in after.outputs] == [o.token_ids for o in before.outputs]
            if drafting.model.device.kind == "cpu":
                assert [o.logprobs for o in after.outputs] == [o.logprobs for o in before.outputs]
        if params.temperature == 0:
            assert sum(result.num_draft_tokens for result in two) > 0


def random_params(rng: random.Random, text: str, tokens: list[int]) -> SamplingParams:
    """Any parameters together, with stops that `tokens` and their text have."""
    at = rng.randrange(len(tokens) - 3)
    fields: dict[str, Any] = {
        "temperature": rng.choice((0.0, 0.0, 0.7, 1.5)),
        "top_k": rng.choice((0, 5, 40)),
        "top_p": rng.choice((1.0, 0.8)),
        "min_p": rng.choice((0.0, 0.05)),
        "presence_penalty": rng.choice((0.0, -0.5, 0.5)),
        "frequency_penalty": rng.choice((0.0, -0.25)),
        "repetition_penalty": rng.choice((1.0, 0.9, 1.1)),
        "logit_bias": rng.choice((None, {rng.randrange(500): 2.0, tokens[at]: 1.0})),
        "allowed_token_ids": rng.choice((None, [*range(200, 800), *tokens])),
        "bad_words": rng.choice(([], ["the"], ["a small", "it"])),
        "stop": rng.choice(([], [text[at : at + 3]], ["\n", "zz"])),
        "stop_token_ids": rng.choice(([], [tokens[at]], [14])),
        "stop_sequences": rng.choice(([], [tokens[at : at + 2]], [[260, 5], tokens[at : at + 3]])),
        "min_tokens": rng.choice((0, 0, 6)),
        "include_stop_str_in_output": rng.random() < 0.5,
        "logprobs": rng.choice((None, 0, 2)),
        "n": rng.choice((1, 1, 2)),
        "ignore_eos": rng.random() < 0.5,
    }
    return SamplingParams(seed=rng.randrange(2**32), max_tokens=rng.choice((9, 40)), **fields)


def test_any_parameters_together_with_and_without_drafts(
    device: str, llm: LLM, drafting: LLM
) -> None:
    rng = random.Random(7)
    whole = llm.generate(PROMPTS, greedy(40))
    reasons: collections.Counter[str] = collections.Counter()
    drafts = 0
    for _ in range(80):
        prompt = rng.randrange(len(PROMPTS))
        params = random_params(rng, whole[prompt].text, whole[prompt].token_ids)
        (one,) = llm.generate(PROMPTS[prompt], params)
        (two,) = drafting.generate(PROMPTS[prompt], params)
        drafts += two.num_accepted_tokens
        for before, after in zip(one.outputs, two.outputs, strict=True):
            reasons[type(before.stop_reason).__name__] += 1
            if device == "cpu":
                assert dataclasses.replace(after, num_draft_tokens=0, num_accepted_tokens=0) == (
                    dataclasses.replace(before, num_cached_tokens=after.num_cached_tokens)
                ), params
            assert before.error is None and after.error is None
    assert drafts > 20
    assert all(reasons[kind] >= 2 for kind in ("NoneType", "int", "str", "tuple")), reasons


@pytest.mark.parametrize("name", EDITS)
def test_samples_draw_as_requests_of_their_own(llm: LLM, name: str) -> None:
    (several,) = llm.generate(PROMPT, seeded(21, NUM, n=3, **EDITS[name]))
    alone = llm.generate([PROMPT] * 3, [seeded(21 + i, NUM, **EDITS[name]) for i in range(3)])
    assert [o.token_ids for o in several.outputs] == [r.token_ids for r in alone]
    assert [o.logprobs for o in several.outputs] == [r.logprobs for r in alone]


def test_preemption_chunks_and_cached_prompts_change_nothing(device: str, llm: LLM) -> None:
    """History that is computed again, in pieces, or not at all counts as it did before."""
    prompts = [[*llm.tokenizer.encode(PROMPTS[i % 3]), *range(30 + i, 70 + i)] for i in range(9)]
    params = [
        (seeded(i, 60, **EDITS["all"]) if i % 2 else greedy(60, logprobs=2, repetition_penalty=1.2))
        for i in range(9)
    ]
    expected = llm.generate(prompts, params)
    sizes = {"num_kv_blocks": 40, "block_size": 4, "max_num_batched_tokens": 16}
    with open_llm(device, **sizes) as small:
        for _ in range(2):
            results = small.generate(prompts, params)
            if device == "cpu":
                assert [r.token_ids for r in results] == [r.token_ids for r in expected]
                assert [r.logprobs for r in results] == [r.logprobs for r in expected]
        assert small.engine.stats()["preemptions"] > 0
        (again,) = small.generate(prompts[:1], params[0])
        (cached,) = small.generate(prompts[:1], params[0])
        assert cached.num_cached_tokens > 30
        assert (cached.token_ids, cached.logprobs) == (again.token_ids, again.logprobs)


def test_rows_of_a_runner_take_them_too(device: str, llm: LLM) -> None:
    prompt = llm.tokenizer.encode(PROMPT)
    words = ["the", "block t"]
    fields = {**EDITS["all"], "bad_words": words}
    (expected,) = llm.generate([prompt], seeded(3, NUM, **fields))
    with contextlib.closing(
        ModelRunner(
            demo_model(),
            device=device,
            dtype="float32",
            progress=False,
            num_kv_blocks=64,
            batch_invariant=True,
        )
    ) as runner:
        with pytest.raises(InvalidArgumentError, match=r"params\.bad_words"):
            runner.add_row(prompt, seeded(3, NUM, **fields))
        pool = BlockPool(runner)
        row = runner.add_row(
            prompt,
            seeded(3, NUM, **fields),
            block_ids=pool.take(8),
            bad_words_token_ids=llm.tokenizer.encode_bad_words(words),
        )
        outputs = [runner.execute([(row, len(prompt))]).result()[0]]
        while outputs[-1].finish_reason is None:
            outputs += runner.execute([(row, 1)]).result()
        runner.free_row(row)
        assert [output.token_id for output in outputs] == expected.token_ids
        assert expected.logprobs is not None
        for output, place in zip(outputs, expected.logprobs, strict=True):
            assert output.logprobs is not None and output.stop_sequence is None
            (found,) = output.logprobs
            assert list(found) == list(place)
            for token, entry in found.items():
                assert entry.logprob == pytest.approx(place[token].logprob, abs=SLACK[device])
                assert (entry.rank, entry.decoded_token) == (place[token].rank, None)
        whole = tokens_of(run_to_end(runner, prompt, greedy(NUM)))
        sequence = tuple(whole[3:5])
        stopped = run_to_end(runner, prompt, greedy(NUM, stop_sequences=[(1, 1), sequence]))
        assert tokens_of(stopped) == whole[: first_end(whole, sequence)]
        assert (stopped[-1].finish_reason, stopped[-1].stop_sequence) == ("stop", 1)


def test_requests_that_nothing_can_be_drawn_for_are_refused(llm: LLM) -> None:
    token = llm.tokenizer.encode_bad_words(["e"])[0]
    assert len(token) == 1
    with pytest.raises(RequestError, match="bad_words: forbid each token"):
        llm.generate(PROMPT, greedy(1, bad_words=["e"], allowed_token_ids=token))


def test_limits_of_a_deployment(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRV1_MAX_BAD_WORDS_NUM", "2")
    monkeypatch.setenv("MRV1_MAX_STOP_SEQS_NUM", "2")
    llm.generate(PROMPT, greedy(1, bad_words=["the"], stop=["x"], stop_sequences=[[1]]))
    for fields, named in (
        ({"bad_words": ["the", "block"]}, "MRV1_MAX_BAD_WORDS_NUM"),
        ({"stop": ["x", "y"], "stop_sequences": [[1]]}, "MRV1_MAX_STOP_SEQS_NUM"),
    ):
        with pytest.raises(RequestError, match=rf"request 'llm-\d+': .* by {named}"):
            llm.generate(PROMPT, greedy(1, **fields))
