# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Random lives of requests against a slow reference: tokens are equal and the pools balance.

Hypothesis drives two machines. One schedules over `ModelRunner` itself: chunks of any size, steps
that run ahead, preemption by recomputation, results read late or never, blocks held until no step
can write them. The other drives `Engine`. Both compare with one request at a time, prefilled whole.
CPU kernels are invariant to the batch bit for bit, so tokens must be equal exactly.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mrv1.engine import Engine
from mrv1.errors import RequestError
from mrv1.logprobs import Logprob
from mrv1.runner import PendingStep
from mrv1.sampling_params import SamplingParams
from mrv1.tokenizer import Tokenizer
from serving_tools import (
    LLAMA,
    VOCAB,
    BlockPool,
    SlowReference,
    cut,
    ending_sequence,
    greedy,
    make_prompt,
    num_blocks,
    open_runner,
    seeded,
    tokens_of,
)

PROMPT_LENGTHS = (1, 3, 4, 5, 8, 13, 22)
MAX_TOKENS = 14
BLOCK = 4

# Of logits; the penalties follow what a row has drawn, also before it was preempted.
EDITS: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.4,
    "presence_penalty": -0.1,
    "logit_bias": {11: 0.3, 12: -100},
    "allowed_token_ids": range(2, VOCAB, 2),
}

counters: Counter[str] = Counter()


@dataclasses.dataclass(frozen=True)
class Wish:
    """A request that may be made, and what must come of it."""

    prompt: tuple[int, ...]
    params: SamplingParams
    tokens: tuple[int, ...]
    reason: str
    text: str | None = None  # with a stop string: what is in front of it
    logprobs: tuple[dict[int, Logprob], ...] | None = None


@pytest.fixture(scope="module", params=["auto", "fp8_e4m3"])
def kv_cache_dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def cache_options(kv_cache_dtype: str) -> dict[str, Any]:
    """Options of a runner. Rounding to FP8 would make much of other sums in other batches."""
    return {"kv_cache_dtype": kv_cache_dtype, "batch_invariant": kv_cache_dtype != "auto"}


@pytest.fixture(scope="module")
def wishes(device: str, kv_cache_dtype: str) -> Iterator[list[Wish]]:
    """The menu: greedy, seeded and edited; ended by length, stop tokens, sequences and strings."""
    reference = SlowReference(device, **cache_options(kv_cache_dtype))
    tokenizer = Tokenizer.from_dir(LLAMA)
    menu: list[Wish] = []
    for length in PROMPT_LENGTHS:
        prompt = make_prompt(length, 500 + length)
        for path in (
            greedy(MAX_TOKENS),
            seeded(length, MAX_TOKENS, temperature=1.5, logprobs=1),
            greedy(MAX_TOKENS, logprobs=2, **EDITS),
            seeded(length, MAX_TOKENS, top_k=9, **EDITS),
        ):
            outputs = reference.outputs(prompt, path)
            tokens = tokens_of(outputs)
            places = tuple(place for output in outputs for place in output.logprobs or ())

            def wish(**fields: Any) -> SamplingParams:
                return dataclasses.replace(path, **fields)  # noqa: B023 - called at once

            def add(params: SamplingParams) -> None:
                ended, reason = cut(tokens, params)  # noqa: B023
                known = places[: len(ended)] or None  # noqa: B023
                menu.append(Wish(tuple(prompt), params, ended, reason, logprobs=known))  # noqa: B023

            for most in (1, 2, 9, MAX_TOKENS):
                add(wish(max_tokens=most))
            for stop_at in (0, 3, 8):
                add(wish(stop_token_ids=[tokens[stop_at]]))
            for first, last in ((0, 0), (1, 3), (5, 9)):
                sequence = tokens[first : last + 1]
                add(wish(stop_sequences=[[*sequence, 0], sequence]))
            # Stop tokens are masked below min_tokens, so the path is another one.
            params = wish(stop_token_ids=sorted(set(tokens[:4])), min_tokens=6)
            stopped, reason = reference(prompt, params)
            outputs = reference.outputs(prompt, params)
            known = tuple(place for output in outputs for place in output.logprobs or ()) or None
            menu.append(Wish(tuple(prompt), params, tuple(stopped), reason, logprobs=known))
            text = tokenizer.decode(tokens)
            stop = text[len(text) // 2 : len(text) // 2 + 2]
            params = wish(stop=stop)
            menu.append(
                Wish(tuple(prompt), params, tuple(tokens), "stop", text[: text.index(stop)])
            )
    yield menu
    reference.close()


# --- over the runner -----------------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    wish: Wish
    got: list[int] = dataclasses.field(default_factory=list)
    row: int = -1  # -1: waiting
    life: int = 0  # counts admissions
    generation: int = -1
    target: int = 0  # tokens known at admission
    launched: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)

    def can_step(self) -> bool:
        """Whether a further step would not run past max_tokens."""
        longest = len(self.wish.prompt) + (self.wish.params.max_tokens or 0) - 1
        return self.launched < max(longest, self.target)


@dataclasses.dataclass
class Flight:
    step: PendingStep
    batch: list[tuple[Job, int, bool]]  # job, its life, whether a token is due


class RunnerMachine(RuleBasedStateMachine):
    ROWS = 3
    BLOCKS = 16
    BUDGET = 24

    def __init__(self, device: str, wishes: list[Wish], kv_cache_dtype: str) -> None:
        super().__init__()
        self.wishes = [wish for wish in wishes if wish.text is None]
        self.runner = open_runner(
            device,
            block_size=BLOCK,
            max_num_seqs=self.ROWS,
            num_kv_blocks=self.BLOCKS,
            max_num_batched_tokens=self.BUDGET,
            max_model_len=48,
            **cache_options(kv_cache_dtype),
        )
        self.pool = BlockPool(self.runner)
        self.jobs: list[Job] = []
        self.flights: list[Flight] = []
        self.held: list[tuple[int, list[int]]] = []  # last step that may write them, blocks
        self.read_step = 0  # newest step that was waited for

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.row >= 0]

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        if len(self.jobs) < 6:
            self.jobs.append(Job(data.draw(st.sampled_from(self.wishes))))

    @rule(count=st.integers(1, 6), data=st.data())
    def steps(self, count: int, data: st.DataObject) -> None:
        for _ in range(count):
            self.step(data)

    def step(self, data: st.DataObject) -> None:
        """Some of the rows, in any order, by chunks of any size; memory is made by preemption."""
        for job in [job for job in self.jobs if job.row < 0]:
            if self.runner.free_rows == 0:
                break
            self.admit(job, data.draw(st.integers(0, 2)))
        order = data.draw(st.permutations([job for job in self.running if job.can_step()]))
        batch: list[tuple[Job, int]] = []
        budget = self.BUDGET
        for job in order[: data.draw(st.integers(2, self.ROWS))]:
            if job.row < 0:
                continue  # it was preempted for one before it
            left = job.target - job.launched
            tokens = data.draw(st.integers(1, min(left, budget))) if left > 1 and budget > 1 else 1
            in_batch = [member for member, _ in batch]
            if budget < tokens or not self.cover(job, job.launched + tokens, in_batch):
                continue
            budget -= tokens
            batch.append((job, tokens))
        if batch:
            self.launch(batch)

    def admit(self, job: Job, first_blocks: int) -> None:
        self.release()
        blocks = self.pool.take(min(first_blocks, len(self.pool.free)))
        tokens = [*job.wish.prompt, *job.got]
        job.row = self.runner.add_row(
            tokens, job.wish.params, block_ids=blocks, prompt_len=len(job.wish.prompt)
        )
        job.blocks, job.target, job.launched = blocks, len(tokens), 0
        job.life += 1
        job.generation = -1
        counters["resumed"] += bool(job.got)

    def cover(self, job: Job, tokens: int, in_batch: list[Job]) -> bool:
        missing = num_blocks(tokens, BLOCK) - len(job.blocks)
        while missing > len(self.pool.free):
            self.release()
            if missing <= len(self.pool.free):
                break
            victims = [other for other in self.running if other is not job]
            victims = [other for other in victims if other not in in_batch]
            if victims:
                self.preempt(victims[-1])
            elif self.held:
                self.wait()
            else:
                return False
        if missing > 0:
            blocks = self.pool.take(missing)
            self.runner.append_blocks(job.row, blocks)
            job.blocks += blocks
        return True

    def launch(self, batch: list[tuple[Job, int]]) -> None:
        entries = []
        for job, tokens in batch:
            job.launched += tokens
            due = job.launched >= job.target
            counters["chunk edge"] += not due
            counters["decode"] += job.launched > job.target
            entries.append((job, job.life, due))
        counters["mixed"] += len({due for _, _, due in entries}) == 2
        step = self.runner.execute([(job.row, tokens) for job, tokens in batch])
        self.flights.append(Flight(step, entries))

    def leave(self, job: Job) -> bool:
        """Frees the job's row; true if a step with it was in flight."""
        last = self.runner.last_step(job.row)
        in_flight = any(
            job is member and job.life == life
            for flight in self.flights
            for member, life, _ in flight.batch
        )
        self.runner.free_row(job.row)
        self.held.append((last, job.blocks))
        job.row, job.blocks = -1, []
        return in_flight

    def preempt(self, job: Job) -> None:
        """Tokens that are still in flight are dropped: the resumed row draws them again."""
        counters["preempt in flight" if self.leave(job) else "preempt"] += 1

    def release(self) -> None:
        # By what was read, not by the clock: an example must go the same way each time.
        assert self.runner.retired_step >= self.read_step
        for last, blocks in [entry for entry in self.held if entry[0] <= self.read_step]:
            self.pool.give_back(blocks)
            self.held.remove((last, blocks))

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """Mostly the oldest step, but any that has no token due before it."""
        self.take_in(data.draw(st.integers(0, len(self.flights) - 1)))

    def take_in(self, index: int) -> None:
        # A job's tokens come in order, so the steps before are read first.
        for flight in self.flights[: index + 1]:
            self.read_step = flight.step.step
            for output, (job, life, due) in zip(flight.step.result(), flight.batch, strict=True):
                if life != job.life or job.row < 0:
                    counters["output of a gone row"] += 1
                    continue
                assert output.row == job.row
                if job.generation < 0:
                    job.generation = output.generation
                assert output.generation == job.generation
                assert not output.masked and (output.token_id is not None) == due
                if not due:
                    assert output.finish_reason is None
                    continue
                assert output.token_id == job.wish.tokens[len(job.got)]
                known = job.wish.logprobs
                assert output.logprobs == (None if known is None else [known[len(job.got)]])
                job.got.append(output.token_id)
                ended = len(job.got) == len(job.wish.tokens)
                assert output.finish_reason == (job.wish.reason if ended else None)
                if ended:
                    counters[job.wish.reason] += 1
                    sequence = ending_sequence(job.got, job.wish.params)
                    by_token = job.got[-1] in job.wish.params.stop_token_ids
                    assert output.stop_sequence == (None if sequence < 0 or by_token else sequence)
                    counters["stop sequence"] += output.stop_sequence is not None
                    later = self.flights[self.flights.index(flight) + 1 :]
                    ahead = any(job is member for f in later for member, _, _ in f.batch)
                    counters["stop in flight"] += ahead and job.wish.reason == "stop"
                    self.leave(job)
                    self.jobs.remove(job)
        del self.flights[: index + 1]

    @precondition(lambda self: self.running)
    @rule(dice=st.integers(0, 2), data=st.data())
    def preempt_one(self, dice: int, data: st.DataObject) -> None:
        if dice == 0:
            self.preempt(data.draw(st.sampled_from(self.running)))

    @precondition(lambda self: self.jobs)
    @rule(dice=st.integers(0, 1), data=st.data())
    def abort(self, dice: int, data: st.DataObject) -> None:
        if dice:
            return
        job = data.draw(st.sampled_from(self.jobs))
        self.jobs.remove(job)
        if job.row >= 0:
            counters["abort in flight" if self.leave(job) else "abort"] += 1

    @precondition(lambda self: self.flights and not self.running)
    @rule()
    def never_ask(self) -> None:
        """Nobody is left to hear of these steps."""
        counters["never asked"] += len(self.flights)
        self.flights.clear()
        self.wait()

    def wait(self) -> None:
        step = self.runner.execute([])  # it sends what is staged, too
        assert step.result() == []
        self.read_step = step.step

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def look_at_the_device(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.running))
        self.wait()
        state = self.runner.row_state(job.row)
        assert (state.prompt_len, state.prefill_target) == (len(job.wish.prompt), job.target)
        # The host's count is an upper bound; the device stops where the request stops.
        known = [*job.wish.prompt, *job.wish.tokens]
        assert state.num_computed == min(job.launched, len(known) - 1)
        if state.total_len > job.target:
            assert state.last_token == known[state.total_len - 1]
        assert state.total_len == max(job.target, min(job.launched + 1, len(known)))

    @invariant()
    def pool_balances(self) -> None:
        owned = [block for job in self.jobs for block in job.blocks]
        owned += [block for _, blocks in self.held for block in blocks]
        assert sorted([*owned, *self.pool.free]) == list(range(1, self.BLOCKS))
        assert self.runner.free_rows + len(self.running) == self.ROWS

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            self.runner.close()

    def finish(self) -> None:
        while self.flights:
            self.take_in(0)
        while self.jobs:
            job = self.jobs[0]
            for other in [other for other in self.running if other is not job]:
                self.preempt(other)
            if job.row < 0:
                self.admit(job, 0)
            left = job.target - job.launched
            tokens = min(max(left, 1), self.BUDGET)
            assert self.cover(job, job.launched + tokens, [])
            self.launch([(job, tokens)])
            self.take_in(0)
            self.pool_balances()
        self.wait()
        self.release()
        assert len(self.pool.free) == self.pool.total and self.runner.free_rows == self.ROWS


def test_lives_over_the_runner(device: str, wishes: list[Wish], kv_cache_dtype: str) -> None:
    # What is drawn depends on the process a little; the minimums leave room for that.
    counters.clear()
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: RunnerMachine(device, wishes, kv_cache_dtype),
        settings=settings(max_examples=200, stateful_step_count=50),
    )
    for name, least in (
        ("preempt", 10),
        ("preempt in flight", 40),
        ("resumed", 16),
        ("chunk edge", 80),
        ("mixed", 20),
        ("decode", 200),
        ("abort", 2),
        ("abort in flight", 20),
        ("stop", 20),
        ("length", 20),
        ("stop sequence", 8),
        ("stop in flight", 4),
        ("output of a gone row", 40),
        ("never asked", 2),
    ):
        assert counters[name] >= least, (name, dict(counters))


# --- over the engine -----------------------------------------------------------------------------


@dataclasses.dataclass
class EngineJob:
    wish: Wish
    got: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    aborted: bool = False


class EngineMachine(RuleBasedStateMachine):
    NAMES = ("a", "b", "c", "d", "e", "f", "g")

    def __init__(self, device: str, wishes: list[Wish], kv_cache_dtype: str) -> None:
        super().__init__()
        self.device, self.kv_cache_dtype = device, kv_cache_dtype
        self.wishes = wishes
        self.jobs: dict[str, EngineJob] = {}
        self.failed = False
        self.engine: Engine | None = None

    @initialize(
        rows=st.integers(1, 4),
        budget=st.integers(4, 40),
        blocks=st.integers(11, 32),
        padded=st.booleans(),
    )
    def open(self, rows: int, budget: int, blocks: int, padded: bool) -> None:
        self.total = blocks - 1
        self.engine = Engine(
            LLAMA,
            device=self.device,
            progress=False,
            dtype="float32",
            num_threads=1,
            block_size=BLOCK,
            max_model_len=64,
            max_num_seqs=rows,
            max_num_batched_tokens=budget,
            num_kv_blocks=blocks,
            pad_requests=rows if padded else 0,
            pad_tokens=budget if padded else 0,
            **cache_options(self.kv_cache_dtype),
            background=False,
        )

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def add(self, name: str, data: st.DataObject) -> None:
        assert self.engine is not None
        wish = data.draw(st.sampled_from(self.wishes))
        if name in self.jobs:
            with pytest.raises(RequestError, match=f"{name}.*unfinished"):
                self.engine.add_request(name, list(wish.prompt), wish.params)
            counters["name in use"] += 1
            return
        assert self.engine.add_request(name, list(wish.prompt), wish.params) == list(wish.prompt)
        self.jobs[name] = EngineJob(wish)
        counters["waited"] += self.engine.stats()["waiting"] > 1

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        assert self.engine is not None
        for _ in range(count):
            for update in self.engine.step():
                job = self.jobs[update.request_id]
                job.got += update.token_ids
                job.text += update.text
                assert tuple(job.got) == job.wish.tokens[: len(job.got)]
                if update.finish_reason is not None:
                    self.end(update.request_id, update.finish_reason)

    def end(self, name: str, reason: str) -> None:
        job = self.jobs.pop(name)
        counters[reason] += 1
        if reason == "error":
            assert self.failed
            return
        assert job.aborted == (reason == "abort")
        if reason == "abort":
            return
        assert reason == job.wish.reason
        if job.wish.text is None:
            assert tuple(job.got) == job.wish.tokens
        else:
            assert job.text == job.wish.text
            counters["stop string"] += 1

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        assert self.engine is not None
        name = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[name]
        # The engine runs one step ahead, so a request that has begun has a step in flight.
        counters["abort in flight"] += bool(job.got) and not job.aborted
        counters["abort early"] += not job.got and not job.aborted
        assert self.engine.abort(name) != job.aborted
        job.aborted = True

    @precondition(lambda self: self.jobs)
    @rule(dice=st.integers(0, 4))
    def break_a_step(self, dice: int) -> None:
        assert self.engine is not None
        if dice == 0:
            self.failed = True
            self.engine.model.runner.fail_next_step("broken on purpose")

    @invariant()
    def balances(self) -> None:
        if self.engine is None:
            return
        self.engine._native.check_invariants()
        stats = self.engine.stats()
        assert 0 <= stats["free_blocks"] <= self.total
        alive = sum(not job.aborted for job in self.jobs.values())
        assert stats["running"] + stats["waiting"] == alive
        assert stats["running"] <= self.engine.model.max_num_seqs
        if not self.engine.has_unfinished():
            assert not self.jobs
            self.engine.check_idle()
            assert stats["free_blocks"] == self.total
            counters["idle"] += 1

    def teardown(self) -> None:
        if self.engine is None:
            return
        try:
            steps = 0
            while self.engine.has_unfinished():
                self.step(1)
                steps += 1
                assert steps < 2000, "no end in sight"
            self.balances()
        finally:
            self.engine.close()


def test_lives_over_the_engine(device: str, wishes: list[Wish], kv_cache_dtype: str) -> None:
    counters.clear()
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: EngineMachine(device, wishes, kv_cache_dtype),
        settings=settings(max_examples=120, stateful_step_count=40),
    )
    for name, least in (
        ("stop", 40),
        ("stop string", 8),
        ("length", 40),
        ("abort", 40),
        ("abort in flight", 12),
        ("abort early", 12),
        ("error", 12),
        ("waited", 40),
        ("name in use", 20),
        ("idle", 40),
    ):
        assert counters[name] >= least, (name, dict(counters))
