# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Speculation: what is proposed, what of it is kept, and that output does not change."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrv1 import _core
from mrv1.engine import Engine
from mrv1.errors import InvalidArgumentError, RequestError
from mrv1.llm import LLM
from mrv1.logprobs import Logprob
from mrv1.runner import ModelRunner, RowHandle, RowOutput
from mrv1.sampling_params import SamplingParams
from mrv1.speculation import NgramConfig
from serving_tools import (
    LLAMA,
    VOCAB,
    BlockPool,
    greedy,
    make_prompt,
    num_blocks,
    open_runner,
    run_to_end,
    seeded,
    tokens_of,
)

DRAFTS = 4
MAX_LEN = 64
counters: collections.Counter[str] = collections.Counter()


def ngram(drafts: int = DRAFTS, most: int = 3, least: int = 1) -> dict[str, object]:
    return {
        "method": "ngram",
        "num_speculative_tokens": drafts,
        "prompt_lookup_max": most,
        "prompt_lookup_min": least,
    }


def reference_drafts(history: Sequence[int], most: int, n_max: int, n_min: int) -> list[int]:
    """Longest n-gram, most recent occurrence, not itself, and with a continuation."""
    history = list(history)
    for n in range(n_max, n_min - 1, -1):
        suffix = history[len(history) - n :]
        for start in range(len(history) - n - 1, -1, -1):
            if len(suffix) == n and history[start : start + n] == suffix:
                return history[start + n : start + n + most]
    return []


# --- what is proposed ----------------------------------------------------------------------------


def open_lookup(device: str, **config: Any) -> ModelRunner:
    return open_runner(
        device,
        speculative_config=ngram(**config),
        max_model_len=MAX_LEN,
        force_tokens=True,
        max_num_seqs=3,
    )


@pytest.fixture(scope="module")
def lookups(device: str) -> Iterator[dict[tuple[int, int, int], ModelRunner]]:
    runners = {
        sizes: open_lookup(device, drafts=sizes[0], most=sizes[1], least=sizes[2])
        for sizes in ((4, 3, 1), (2, 2, 2), (15, 5, 2), (1, 1, 1))
    }
    yield runners
    for runner in runners.values():
        runner.close()


def propose(runner: ModelRunner, history: Sequence[int], max_tokens: int, places: int) -> list[int]:
    """The drafts for a history, whose last token is a forced output: of one decode step."""
    prompt, last = list(history[:-1]), history[-1]
    params = greedy(max_tokens)
    blocks = list(range(1, 1 + num_blocks(MAX_LEN)))
    row = runner.add_row(prompt, params, block_ids=blocks, forced_token_ids=[last])
    try:
        output = runner.execute([(row, len(prompt))]).result()[0]
        assert output.token_ids == (last,)
        if output.finish_reason is not None:
            return []
        output = runner.execute([(row, places)]).result()[0]
        params_now = runner.infer_params()
        count = output.num_draft_tokens
        assert int(params_now["counts"][1]) == 1 + count
        drafts: list[int] = params_now["token_ids"][1 : 1 + count].tolist()
        assert params_now["token_ids"][0] == last
        assert (params_now["token_batch"][1 + count :] == -1).all()
        assert (params_now["slot_mapping"][1 + count :] == -1).all()
        return drafts
    finally:
        runner.free_row(row)


@settings(max_examples=300)
@given(data=st.data())
def check_drafts(lookups: dict[tuple[int, int, int], ModelRunner], data: st.DataObject) -> None:
    sizes = data.draw(st.sampled_from(sorted(lookups)))
    drafts, n_max, n_min = sizes
    alphabet = data.draw(st.sampled_from([1, 2, 3, 8]))
    length = data.draw(st.one_of(st.integers(2, MAX_LEN - 1), st.just(MAX_LEN - 1)))
    history = data.draw(st.lists(st.integers(3, 2 + alphabet), min_size=length, max_size=length))
    max_tokens = data.draw(st.one_of(st.integers(1, 8), st.just(MAX_LEN)))
    places = data.draw(st.integers(1, 1 + drafts))
    # Of the history, the last token is the first output.
    room = min(MAX_LEN, length - 1 + max_tokens) - length - 1
    most = min(places - 1, max(0, room))
    expected = reference_drafts(history, most, n_max, n_min) if most > 0 else []
    assert propose(lookups[sizes], history, max_tokens, places) == expected
    whole = reference_drafts(history, drafts, n_max, n_min)
    counters["none"] += not whole
    counters["some"] += bool(expected)
    counters["cut at the length"] += 0 <= room < min(places - 1, len(whole))
    counters["short continuation"] += 0 < len(expected) < most
    counters["at max_model_len"] += length == MAX_LEN - 1


def test_drafts_are_those_of_the_definition(
    lookups: dict[tuple[int, int, int], ModelRunner],
) -> None:
    counters.clear()
    check_drafts(lookups)
    for name in ("none", "some", "cut at the length", "short continuation", "at max_model_len"):
        assert counters[name] >= 3, counters


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([5, 6, 7, 8], []),  # nothing came before
        ([5, 5], [5]),  # the last token is not its own occurrence
        ([9, 5, 6, 7, 20, 21, 22, 23, 24, 5, 6, 7], [20, 21, 22, 23]),
        ([5, 6, 7, 20, 6, 7, 30, 5, 6, 7], [20, 6, 7, 30]),  # the longer one is older
        ([7, 20, 7, 30, 7, 40, 7], [40, 7]),  # the most recent one, up to the history's end
        ([1, 7, 30, 31, 32, 33, 34, 2, 7], [30, 31, 32, 33]),
    ],
)
def test_drafts_by_hand(
    lookups: dict[tuple[int, int, int], ModelRunner], history: list[int], expected: list[int]
) -> None:
    assert reference_drafts(history, 4, 3, 1) == expected
    assert propose(lookups[4, 3, 1], history, MAX_LEN, 5) == expected


# --- output does not change ----------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    """A request of the driver below, and what has become of it."""

    prompt: list[int]
    params: SamplingParams
    forced: list[int] = dataclasses.field(default_factory=list)
    bad_words: Sequence[Sequence[int]] = ()
    row: RowHandle | None = None
    blocks: list[int] = dataclasses.field(default_factory=list)
    computing: int = 0  # tokens of the prefill that are launched
    target: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    reason: str | None = None
    last: RowOutput | None = None  # what ended it
    drafts: int = 0
    accepted: int = 0


def run_jobs(
    runner: ModelRunner,
    jobs: list[Job],
    *,
    drafts: int,
    chunk: int = 10**9,
    ahead: int = 2,
    preempt_every: int = 0,
) -> None:
    """Runs jobs side by side, some steps ahead, with as many places for drafts as each may have."""
    pool = BlockPool(runner)
    pending: collections.deque[tuple[Any, list[tuple[Job, RowHandle]]]] = collections.deque()

    def admit(job: Job) -> None:
        known = job.prompt + job.tokens
        limit = len(job.prompt) + (job.params.max_tokens or 0)
        blocks = num_blocks(min(limit, runner.model.max_model_len))
        job.blocks = pool.take(blocks)
        job.row = runner.add_row(
            known,
            job.params,
            block_ids=job.blocks,
            prompt_len=len(job.prompt),
            forced_token_ids=job.forced,
            bad_words_token_ids=job.bad_words,
        )
        job.computing, job.target = 0, len(known)

    def leave(job: Job) -> None:
        assert job.row is not None
        runner.free_row(job.row)
        pool.give_back(job.blocks)
        job.row = None

    def take_in() -> None:
        step, items = pending.popleft()
        for output, (job, row) in zip(step.result(), items, strict=True):
            if job.row is not row:
                continue
            if job.reason is not None:
                # It had stopped: nothing is drawn or drafted any more, and nothing reported.
                assert output.masked and output.token_ids == () and output.logprobs is None
                assert output.num_draft_tokens == 0 and output.stop_sequence is None
                counters["masked"] += 1
                continue
            job.tokens += output.token_ids
            job.logprobs += output.logprobs or ()
            job.last = output
            job.drafts += output.num_draft_tokens
            job.accepted += output.num_accepted_tokens
            job.reason = output.finish_reason

    for job in jobs:
        admit(job)
    turn = 0
    while any(job.reason is None for job in jobs):
        turn += 1
        if preempt_every and turn % preempt_every == 0:
            while pending:
                take_in()
            victim = jobs[turn // preempt_every % len(jobs)]
            if victim.reason is None and victim.computing >= victim.target:
                leave(victim)
                admit(victim)
                counters["preempted"] += 1
        batch: list[tuple[int, int]] = []
        items = []
        for job in jobs:
            if job.reason is not None:
                continue
            assert job.row is not None
            if job.computing < job.target:
                count = min(chunk, job.target - job.computing)
            else:
                own = job.params.num_speculative_tokens
                count = 1 + (drafts if own is None else min(own, drafts))
            batch.append((job.row, count))
            items.append((job, job.row))
        try:
            pending.append((runner.execute(batch), items))
        except InvalidArgumentError as error:
            # By what is known, steps in flight end one of the rows.
            if "has reached its length" not in str(error):
                raise
            counters["waited for the length"] += 1
            take_in()
            continue
        for (_, count), (job, _) in zip(batch, items, strict=True):
            job.computing += count if job.computing < job.target else 0
        if len(pending) >= ahead:
            take_in()
    while pending:
        take_in()
    for job in jobs:
        leave(job)


def repetitive(seed: int, length: int, alphabet: int = 6) -> list[int]:
    """A prompt that repeats itself."""
    rng = np.random.default_rng(seed)
    phrase = (3 + rng.integers(0, alphabet, 9)).tolist()
    return (phrase * length)[:length]


OUTPUTS = 110


def requests() -> list[tuple[list[int], SamplingParams]]:
    low = {"temperature": 0.3, "top_k": 4}
    return [
        (repetitive(1, 21), greedy(OUTPUTS)),
        (repetitive(2, 30), seeded(5, OUTPUTS, **low)),
        (make_prompt(17, 3), greedy(OUTPUTS, num_speculative_tokens=2)),
        (repetitive(4, 12), seeded(6, OUTPUTS, top_p=0.8, num_speculative_tokens=0)),
    ]


def check_equal(plain: list[Job], drafted: list[Job]) -> None:
    for one, other in zip(plain, drafted, strict=True):
        assert other.tokens == one.tokens
        assert other.logprobs == one.logprobs
        assert other.reason == one.reason
        assert one.last is not None and other.last is not None
        assert other.last.stop_sequence == one.last.stop_sequence


def jobs_of(wanted: list[tuple[list[int], SamplingParams]]) -> list[Job]:
    return [Job(list(prompt), params) for prompt, params in wanted]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def pair(device: str, dtype: str) -> Iterator[tuple[ModelRunner, ModelRunner]]:
    """A runner without speculation, and one with."""
    options: dict[str, Any] = {
        "dtype": dtype,
        "batch_invariant": True,
        "max_model_len": 256,
        "num_kv_blocks": 300,
    }
    plain = open_runner(device, **options)
    drafted = open_runner(device, speculative_config=ngram(), **options)
    yield plain, drafted
    plain.close()
    drafted.close()


def strip(wanted: list[tuple[list[int], SamplingParams]]) -> list[tuple[list[int], SamplingParams]]:
    return [
        (prompt, SamplingParams(**{**dataclasses.asdict(params), "num_speculative_tokens": None}))
        for prompt, params in wanted
    ]


@pytest.mark.parametrize("ahead", [1, 2, 4])
@pytest.mark.parametrize("chunk", [7, 10**9])
def test_tokens_are_those_without_speculation(
    pair: tuple[ModelRunner, ModelRunner], ahead: int, chunk: int
) -> None:
    plain, drafted = jobs_of(strip(requests())), jobs_of(requests())
    run_jobs(pair[0], plain, drafts=0)
    run_jobs(pair[1], drafted, drafts=DRAFTS, ahead=ahead, chunk=chunk)
    check_equal(plain, drafted)
    assert sum(job.accepted for job in drafted) >= 20
    assert sum(job.drafts - job.accepted for job in drafted) >= 20
    assert drafted[3].drafts == 0
    for job in drafted:
        assert job.accepted <= job.drafts


def test_preempted_requests_go_on_where_they_were(pair: tuple[ModelRunner, ModelRunner]) -> None:
    counters.clear()
    plain, drafted = jobs_of(strip(requests())), jobs_of(requests())
    run_jobs(pair[0], plain, drafts=0)
    run_jobs(pair[1], drafted, drafts=DRAFTS, preempt_every=4)
    check_equal(plain, drafted)
    assert counters["preempted"] >= 3


def test_stops_and_lengths_cut_accepted_runs(pair: tuple[ModelRunner, ModelRunner]) -> None:
    """A stop id, or the length, inside of what a step would accept ends the row there."""
    counters.clear()
    prompt = repetitive(1, 21)
    whole = jobs_of([(prompt, greedy(OUTPUTS))])
    run_jobs(pair[0], whole, drafts=0)
    for place in range(1, OUTPUTS, 7):
        stop = whole[0].tokens[place]
        for fields in (
            {"stop_token_ids": [stop]},
            {"stop_token_ids": [stop], "min_tokens": min(place + 3, OUTPUTS)},
            {"max_tokens": place},
        ):
            params = greedy(**{"max_tokens": OUTPUTS, **fields})
            plain, drafted = jobs_of([(prompt, params)]), jobs_of([(prompt, params)])
            run_jobs(pair[0], plain, drafts=0)
            run_jobs(pair[1], drafted, drafts=DRAFTS)
            check_equal(plain, drafted)
            counters[str(drafted[0].reason)] += drafted[0].accepted > 0
    assert counters["stop"] >= 5 and counters["length"] >= 5, counters


@pytest.fixture(scope="module")
def forcing(device: str) -> Iterator[ModelRunner]:
    opened = open_runner(
        device, speculative_config=ngram(), force_tokens=True, max_model_len=256, num_kv_blocks=300
    )
    yield opened
    opened.close()


@pytest.mark.parametrize("preempt_every", [0, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 30])
def test_stop_sequences_end_accepted_runs(
    forcing: ModelRunner, length: int, preempt_every: int
) -> None:
    """Within the tokens of a step, over several steps and over a preemption; four steps ahead."""
    counters.clear()
    prompt = make_prompt(23, 9)
    tokens = prompt * 4
    for end in range(length, len(tokens), 5):
        sequence = tokens[end - length : end]
        for least in (0, end - 2, end - 1):
            params = greedy(
                len(tokens), stop_sequences=[[*sequence, 0], sequence], min_tokens=max(0, least)
            )
            job = Job(prompt, params, forced=tokens)
            run_jobs(forcing, [job], drafts=DRAFTS, ahead=4, preempt_every=preempt_every)
            first = next(
                count
                for count in range(max(length, least + 1), len(tokens) + 1)
                if tokens[count - length : count] == sequence
            )
            assert job.tokens == tokens[:first]
            assert job.reason == "stop"
            assert job.last is not None and job.last.stop_sequence == 1
            counters["over drafts"] += job.last.num_accepted_tokens > 0
            counters["over steps"] += len(job.last.token_ids) < length
            counters["cut"] += 0 < job.last.num_accepted_tokens < job.last.num_draft_tokens
    assert counters["over drafts"] >= 10 and counters["cut"] >= 5, counters
    assert counters["over steps"] >= 5 or length == 1, counters
    assert counters["masked"] >= 10 and (counters["preempted"] >= 20) == (preempt_every > 0)


def edited_requests() -> list[Job]:
    """Like `requests`, with all that edits logits, and logprobs."""
    words = ([5, 6], [7], [3, 4, 5])
    wanted = [
        (repetitive(1, 21), greedy(OUTPUTS, repetition_penalty=1.02, logprobs=2)),
        (
            repetitive(2, 30),
            seeded(
                5, OUTPUTS, temperature=0.3, top_k=4, frequency_penalty=0.02, logprobs=0,
                allowed_token_ids=range(0, VOCAB, 2),
            ),
        ),
        (
            make_prompt(17, 3),
            greedy(OUTPUTS, presence_penalty=0.1, logit_bias={200: 0.2, 39: -0.1}, logprobs=1),
        ),
        (repetitive(4, 12), seeded(6, OUTPUTS, min_p=0.1, frequency_penalty=-0.05)),
    ]  # fmt: skip
    return [Job(list(prompt), params, bad_words=words) for prompt, params in wanted]


@pytest.mark.parametrize("preempt_every", [0, 4])
def test_edits_and_logprobs_are_those_without_speculation(
    pair: tuple[ModelRunner, ModelRunner], preempt_every: int
) -> None:
    """A place behind drafts sees them as outputs: in penalties and in bad words."""
    counters.clear()
    plain, drafted = edited_requests(), edited_requests()
    run_jobs(pair[0], plain, drafts=0, ahead=1)
    run_jobs(pair[1], drafted, drafts=DRAFTS, chunk=9, preempt_every=preempt_every)
    check_equal(plain, drafted)
    assert len(drafted[0].logprobs) == OUTPUTS and not drafted[3].logprobs
    assert sum(job.accepted for job in drafted) >= 8
    assert sum(job.drafts - job.accepted for job in drafted) >= 20
    assert (counters["preempted"] >= 3) == (preempt_every > 0)


@pytest.mark.parametrize("mode", ["eager", "piecewise", "full"])
def test_modes_give_the_same_tokens(device: str, mode: str, dtype: str) -> None:
    sizes: dict[str, Any] = {"capture_sizes": [1, 2, 4], "piecewise_sizes": [8, 16, 64]}
    options: dict[str, Any] = {
        "dtype": dtype,
        "batch_invariant": True,
        "max_model_len": 256,
        "num_kv_blocks": 300,
    }
    plain = open_runner(device, **options)
    drafted = open_runner(device, graph_mode=mode, speculative_config=ngram(), **sizes, **options)
    try:
        for expected, got in (
            (jobs_of(strip(requests())), jobs_of(requests())),
            (edited_requests(), edited_requests()),
        ):
            run_jobs(plain, expected, drafts=0)
            run_jobs(drafted, got, drafts=DRAFTS, chunk=11)
            check_equal(expected, got)
        stats = drafted.stats()
        assert stats[f"steps_{mode}"] >= 10
        if mode == "full":
            # A decode step is one graph, with drafts or without.
            assert stats["steps_eager"] == 0
    finally:
        plain.close()
        drafted.close()


def test_rows_of_the_length_of_the_model(pair: tuple[ModelRunner, ModelRunner]) -> None:
    """The device cuts drafts at the length; the host never refuses for its bound's sake."""
    counters.clear()
    for length in range(236, 256, 3):
        prompt = repetitive(7, length)
        wanted = [(prompt, greedy(None))]
        plain, drafted = jobs_of(wanted), jobs_of(wanted)
        for jobs in (plain, drafted):
            jobs[0].params = greedy(256 - length)
        run_jobs(pair[0], plain, drafts=0)
        run_jobs(pair[1], drafted, drafts=DRAFTS, ahead=3)
        check_equal(plain, drafted)
        assert drafted[0].reason == "length"
        assert len(drafted[0].tokens) == 256 - length


def test_a_steady_step_is_one_graph_and_waits_for_nothing(device: str) -> None:
    runner = open_runner(
        device,
        graph_mode="full",
        dtype="bfloat16",
        max_model_len=256,
        speculative_config=ngram(),
    )
    try:
        rows = [
            runner.add_row(
                repetitive(seed, 20),
                greedy(200),
                block_ids=list(range(1 + 60 * seed, 1 + 60 * (seed + 1))),
            )
            for seed in range(2)
        ]
        runner.execute([(row, 20) for row in rows]).result()
        batch = [(row, 1 + DRAFTS) for row in rows]
        for _ in range(4):
            runner.execute(batch).result()
        before = runner.stats()
        drafts = 0
        for _ in range(20):
            drafts += sum(each.num_draft_tokens for each in runner.execute(batch).result())
        after = runner.stats()
        grown = {name: after[name] - before[name] for name in after}
        assert drafts > 0
        assert (grown["steps"], grown["batches"], grown["steps_full"]) == (20, 20, 20)
        assert (grown["waits"], grown["copies"], grown["allocations"]) == (0, 0, 0)
        if device == "cuda":
            assert (grown["graph_launches"], grown["kernel_launches"]) == (20, 0)
    finally:
        runner.close()


# --- forced tokens -------------------------------------------------------------------------------


def test_forced_tokens_take_the_place_of_those_drawn(device: str) -> None:
    runner = open_runner(device, speculative_config=ngram(), force_tokens=True, max_model_len=256)
    try:
        prompt = make_prompt(40, 1)
        echo = Job(prompt, greedy(40), forced=prompt)
        random = Job(make_prompt(40, 2), greedy(40), forced=make_prompt(40, 3))
        some = Job(make_prompt(9, 4), greedy(12), forced=[7, 8])
        run_jobs(runner, [echo, random, some], drafts=DRAFTS)
        assert echo.tokens == prompt
        assert random.tokens == random.forced
        assert some.tokens[:2] == [7, 8] and len(some.tokens) == 12
        # All of what echoes is found: 40 tokens in 8 steps or so.
        assert echo.accepted >= 28 and random.accepted <= 8
        with pytest.raises(InvalidArgumentError, match="forced token id 9999 is outside"):
            runner.add_row(prompt, greedy(4), forced_token_ids=[9999])
        with pytest.raises(InvalidArgumentError, match="forced_token_ids has 217 tokens"):
            runner.add_row(prompt, greedy(4), forced_token_ids=[5] * 217)
    finally:
        runner.close()
    plain = open_runner(device)
    try:
        with pytest.raises(InvalidArgumentError, match="need a runner with force_tokens"):
            plain.add_row([3, 4], greedy(4), forced_token_ids=[5])
    finally:
        plain.close()


# --- sizes and options ---------------------------------------------------------------------------


def test_captured_sizes_come_in_pairs() -> None:
    assert _core.capture_sizes([1, 2, 3], 4, 10) == [(1, 1), (1, 5), (2, 1), (2, 5), (3, 1)]
    assert _core.capture_sizes([1, 2], 0, 10) == [(1, 1), (2, 1)]
    assert _core.capture_sizes([], 4, 10) == []


def test_users_give_requests_only(device: str) -> None:
    """Sizes are requests; only the ladder turns them into tokens, once."""
    for given_sizes in ([1, 4], None):
        runner = open_runner(
            device,
            graph_mode="full",
            capture_sizes=given_sizes,
            piecewise_sizes=[],
            speculative_config=ngram(),
        )
        try:
            params = greedy(40)
            job, other = Job(repetitive(1, 20), params), Job(repetitive(2, 20), params)
            run_jobs(runner, [job], drafts=DRAFTS, ahead=1)
            sizes = runner.infer_params()
            assert len(sizes["token_ids"]) == 1 + DRAFTS and len(sizes["row"]) == 1
            assert len(sizes["logits_batch"]) == 1 + DRAFTS
            # Two rows, one of which takes no drafts: the smallest pair that holds them.
            other.params = greedy(40, num_speculative_tokens=0)
            job = Job(repetitive(1, 20), params)
            run_jobs(runner, [job, other], drafts=DRAFTS, ahead=1)
            pool = list(range(1, 30))
            rows = [
                runner.add_row(
                    repetitive(row, 20), wanted, block_ids=[pool.pop() for _ in range(12)]
                )
                for row, wanted in ((1, params), (2, other.params))
            ]
            runner.execute([(row, 20) for row in rows]).result()
            runner.execute([(rows[0], 1 + DRAFTS), (rows[1], 1)]).result()
            requests = 4 if given_sizes else 2
            sizes = runner.infer_params()
            assert len(sizes["row"]) == requests
            assert len(sizes["token_ids"]) == requests * (1 + DRAFTS)
            # Without drafts at a step of one token each.
            runner.execute([(row, 1) for row in rows]).result()
            sizes = runner.infer_params()
            assert len(sizes["token_ids"]) == len(sizes["row"]) == requests
            for row in rows:
                runner.free_row(row)
        finally:
            runner.close()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ngram", "speculative_config"),
        ({"method": "eagle", "num_speculative_tokens": 2}, "method"),
        ({"num_speculative_tokens": 2}, "method"),
        ({"method": "ngram"}, "num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": 0}, r"\[1, 15\]"),
        ({"method": "ngram", "num_speculative_tokens": 16}, r"\[1, 15\]"),
        ({"method": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens"),
        (ngram(2, 0), "prompt_lookup_max"),
        (ngram(2, 2, 3), "prompt_lookup_min"),
        ({**ngram(), "draft_model": "x"}, "only the keys"),
    ],
)
def test_options_are_checked(value: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        NgramConfig.from_options(value)
    with pytest.raises(InvalidArgumentError, match=message):
        ModelRunner(LLAMA, device="cpu", progress=False, speculative_config=value)


def test_a_request_asks_for_no_more_than_there_is(device: str) -> None:
    for config, most in ((ngram(2), 2), (None, 0)):
        runner = open_runner(device, speculative_config=config)
        try:
            with pytest.raises(RequestError, match=f"at most the engine's {most}"):
                runner.add_row([3, 4], greedy(4, num_speculative_tokens=most + 1))
            row = runner.add_row(
                [3, 4], greedy(4, num_speculative_tokens=most), block_ids=[1, 2, 3]
            )
            runner.execute([(row, 2)]).result()
            with pytest.raises(InvalidArgumentError, match="decodes 1 "):
                runner.execute([(row, 2 + most)])
            runner.execute([(row, 1 + most)]).result()
        finally:
            runner.close()


# --- the engine ----------------------------------------------------------------------------------


def test_generated_text_is_the_same(device: str) -> None:
    options: dict[str, Any] = {
        "device": device,
        "progress": False,
        "dtype": "float32",
        "batch_invariant": True,
        "max_num_seqs": 4,
        "num_kv_blocks": 60,
        "max_model_len": 128,
    }
    prompts = [prompt for prompt, _ in requests()]
    params = [wanted for _, wanted in strip(requests())]
    with LLM(LLAMA, **options) as llm:
        expected = [result.token_ids for result in llm.generate(prompts, params)]
    with LLM(LLAMA, speculative_config=ngram(), **options) as llm:
        got = [result.token_ids for result in llm.generate(prompts, params)]
        stats = llm.engine.stats()
    assert got == expected
    assert stats["accepted_tokens"] >= 20
    assert stats["draft_tokens"] > stats["accepted_tokens"]


def test_engine_forces_tokens(device: str) -> None:
    """Also of requests that are preempted, of all samples, and only where that was asked for."""
    options: dict[str, Any] = {
        "device": device,
        "progress": False,
        "dtype": "float32",
        "block_size": 4,
        "max_num_seqs": 4,
        "num_kv_blocks": 40,
        "max_model_len": 128,
        "speculative_config": ngram(),
    }
    prompts = [make_prompt(20, seed) for seed in range(4)]
    # In the background the first requests may have ended when the last ones come.
    with Engine(LLAMA, force_tokens=True, background=False, **options) as engine:
        for index, prompt in enumerate(prompts):
            params = greedy(40, n=1 + index % 2)
            engine.add_request(str(index), prompt, params, forced_token_ids=prompt * 2)
        tokens: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
        while engine.has_unfinished():
            for update in engine.step():
                tokens[update.request_id, update.index] += update.token_ids
        assert len(tokens) == 6
        for (name, _), got in tokens.items():
            assert got == prompts[int(name)] * 2
        stats = engine.stats()
        assert stats["preemptions"] > 0 and stats["accepted_tokens"] > 60
        with pytest.raises(RequestError, match="request 'long': .*forced_token_ids has 109 tokens"):
            engine.add_request("long", prompts[0], greedy(4), forced_token_ids=[5] * 109)
        with pytest.raises(RequestError, match="request 'text': .*forced_token_ids"):
            engine.add_request("text", prompts[0], greedy(4), forced_token_ids=["5"])  # type: ignore[list-item]
    with (
        Engine(LLAMA, **options) as engine,
        pytest.raises(RequestError, match="request 'none': .*force_tokens"),
    ):
        engine.add_request("none", prompts[0], greedy(4), forced_token_ids=[5])


# --- logits and hidden states --------------------------------------------------------------------


def test_hidden_states_are_what_the_head_reads(device: str) -> None:
    runner = open_runner(device, keep_hidden_states=True, speculative_config=ngram())
    try:
        prompt = repetitive(1, 20)
        row = runner.add_row(prompt, greedy(20), block_ids=list(range(1, 12)))
        other = runner.add_row([3, 4, 5], greedy(20), block_ids=list(range(20, 30)))
        runner.execute([(row, 20), (other, 2)]).result()
        states = runner.hidden_states(0)
        hidden = runner.model.config.hidden_size
        assert states.shape == (20, hidden) and states.dtype == np.float32
        assert runner.hidden_states(1).shape == (2, hidden)
        # The logits are the head's product with the last row.
        from safetensors.numpy import load_file

        head = load_file(LLAMA / "model.safetensors")["lm_head.weight"].astype(np.float32)
        np.testing.assert_allclose(head @ states[-1], runner.logits(0), rtol=2e-3, atol=2e-3)
        output = runner.execute([(row, 1 + DRAFTS)]).result()[0]
        states = runner.hidden_states(0)
        assert states.shape == (1 + output.num_draft_tokens, hidden)
        np.testing.assert_allclose(head @ states[0], runner.logits(0), rtol=2e-3, atol=2e-3)
        array = runner.device_hidden_states(0)
        assert array.shape == states.shape
        if device == "cpu":
            np.testing.assert_array_equal(np.from_dlpack(array), states)
        with pytest.raises(InvalidArgumentError, match="item 1 is outside"):
            runner.hidden_states(1)
    finally:
        runner.close()
    plain = open_runner(device)
    try:
        plain.execute([(plain.add_row([3], greedy(4), block_ids=[1]), 1)]).result()
        with pytest.raises(InvalidArgumentError, match="keep_hidden_states"):
            plain.hidden_states(0)
    finally:
        plain.close()


def test_one_runner_gives_what_another_does(device: str) -> None:
    """The plain driver of other tests, which takes one token a step, works with speculation on."""
    runner = open_runner(device, speculative_config=ngram())
    plain = open_runner(device)
    try:
        prompt = make_prompt(20, 1, VOCAB)
        assert tokens_of(run_to_end(runner, prompt, greedy(12))) == tokens_of(
            run_to_end(plain, prompt, greedy(12))
        )
    finally:
        runner.close()
        plain.close()
