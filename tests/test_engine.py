# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The native engine over a real model, and what the runner does for it.

On a GPU results are compared in batch-invariant mode, where a row does not depend on the batch.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mrv1 import _core
from mrv1.errors import ClosedError, InvalidArgumentError, RequestError
from mrv1.runner import ModelRunner, make_row_spec
from mrv1.sampling_params import SamplingParams
from serving_tools import greedy, make_prompt, num_blocks, open_runner, seeded, tokens_of

Opened = Callable[..., tuple[ModelRunner, _core.Engine]]


@pytest.fixture
def opened(device: str) -> Iterator[Opened]:
    """Opens a runner and an engine over it; both are closed at the end."""
    made: list[tuple[ModelRunner, _core.Engine]] = []

    def start(
        *, caching: bool = True, background: bool = False, **options: Any
    ) -> tuple[ModelRunner, _core.Engine]:
        runner = open_runner(device, **{"batch_invariant": True, **options})
        native = _core.EngineOptions(enable_prefix_caching=caching, background=background)
        made.append((runner, _core.Engine(runner.model.runner, native)))
        return made[-1]

    yield start
    for runner, engine in made:
        engine.close()
        runner.close()


class Life:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.end = _core.RequestEnd.NONE
        self.error = ""
        self.cached = 0


Lives = dict[tuple[str, int], Life]


def take(lives: Lives, outputs: list[_core.RequestOutput]) -> None:
    for output in outputs:
        life = lives.setdefault((output.id, output.index), Life())
        assert life.end == _core.RequestEnd.NONE
        life.tokens += output.token_ids
        life.end, life.error, life.cached = output.end, output.error, output.num_cached_tokens


def drain(engine: _core.Engine) -> Lives:
    lives: Lives = {}
    while engine.has_unfinished():
        take(lives, engine.step())
        engine.check_invariants()
    engine.check_idle()
    return lives


def add(
    engine: _core.Engine, name: str, prompt: list[int], params: SamplingParams, **fields: Any
) -> None:
    engine.add_request(name, make_row_spec(prompt, params, eos_token_ids=()), **fields)


def alone(opened: Opened, prompt: list[int], params: SamplingParams) -> list[int]:
    _, engine = opened(caching=False)
    add(engine, "alone", prompt, params)
    return drain(engine)["alone", 0].tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_copied_blocks_hold_what_the_others_hold(device: str, dtype: str, block_size: int) -> None:
    """A row over copies gives the logits of the row over the originals, whatever comes later."""
    runner = open_runner(device, dtype=dtype, block_size=block_size, batch_invariant=True)
    prompt = make_prompt(37, 1)
    count = num_blocks(len(prompt) + 1, block_size)
    assert 2 * count < runner.model.num_kv_blocks
    originals = list(range(1, count + 1))
    copies = list(range(count + 1, 2 * count + 1))
    first = runner.add_row(prompt, greedy(4), block_ids=originals)
    runner.execute([(first, len(prompt))]).result()
    runner.copy_blocks(list(zip(originals, copies, strict=True)))
    runner.copy_blocks([])
    logits = []
    for blocks in (originals, copies):
        row = runner.add_row(prompt, greedy(4), block_ids=blocks, num_computed=len(prompt) - 1)
        runner.execute([(row, 1)]).result()
        logits.append(runner.logits(0))
        runner.free_row(row)
        # The originals are overwritten before the copies are read.
        other = runner.add_row(make_prompt(37, 2), greedy(4), block_ids=originals)
        runner.execute([(other, len(prompt))]).result()
        runner.free_row(other)
    np.testing.assert_array_equal(logits[0], logits[1])
    runner.close()


def test_copies_that_cannot_be(device: str) -> None:
    runner = open_runner(device)
    blocks = runner.model.num_kv_blocks
    for copies, message in (
        ([(0, 1)], "block id 0 is outside"),
        ([(1, blocks)], f"block id {blocks} is outside"),
        ([(1, 2), (3, 2)], "block 2 is written by one copy"),
        ([(1, 2), (2, 3)], "block 2 is written by one copy"),
        ([(1, 1)], "block 1 is written by one copy"),
        ([(1, "2")], r"copies\[0\] target"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            runner.copy_blocks(copies)  # type: ignore[arg-type]
    runner.close()


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_requests_draw_the_same_tokens(opened: Opened, caching: bool) -> None:
    _, engine = opened(caching=caching, num_kv_blocks=25)
    wishes = {str(index): (make_prompt(10 + index, index), seeded(index, 50)) for index in range(4)}
    for name, (prompt, params) in wishes.items():
        add(engine, name, prompt, params)
    lives = drain(engine)
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert (stats["prefix_hit_tokens"] > 0) == caching
    for name, (prompt, params) in wishes.items():
        assert lives[name, 0].tokens == alone(opened, prompt, params)


def test_blocks_of_accepted_drafts_are_found_by_their_tokens(opened: Opened) -> None:
    """A block that drafts have filled enters the prefix cache under the tokens that they became."""
    config = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2}
    runner, engine = opened(speculative_config=config, force_tokens=True, max_model_len=256)
    prompt = make_prompt(24, 5)
    echo = prompt + prompt
    params = greedy(len(echo))
    row = make_row_spec(prompt, params, eos_token_ids=(), forced_token_ids=echo)
    engine.add_request("first", row)
    first = drain(engine)["first", 0]
    assert first.tokens == echo
    assert engine.stats()["accepted_tokens"] >= len(prompt)
    whole = prompt + first.tokens
    add(engine, "second", whole, greedy(1))
    # The last token of the first was never computed, and the block that it is in never filled.
    size = runner.model.block_size
    assert drain(engine)["second", 0].cached == (len(whole) - 1) // size * size


def test_prefix_hits_change_no_token_and_save_the_work(opened: Opened) -> None:
    _, engine = opened()
    shared = make_prompt(41, 1)
    first = seeded(1, 12)
    add(engine, "first", [*shared, 5], first)
    drain(engine)
    computed = engine.stats()["prefill_tokens"]
    for index in range(3):
        add(engine, str(index), [*shared, 6 + index, 9], seeded(index, 12))
    lives = drain(engine)
    assert engine.stats()["prefill_tokens"] - computed == 3 * (43 - 40)
    assert engine.stats()["prefix_hit_tokens"] == 3 * 40
    for index in range(3):
        life = lives[str(index), 0]
        assert life.cached == 40
        assert life.tokens == alone(opened, [*shared, 6 + index, 9], seeded(index, 12))
    add(engine, "salted", shared, first, cache_salt=7)
    add(engine, "skips", shared, first, skip_prefix_cache=True)
    lives = drain(engine)
    assert lives["salted", 0].cached == lives["skips", 0].cached == 0
    assert lives["salted", 0].tokens == lives["skips", 0].tokens


@pytest.mark.parametrize("length", [1, 15, 16, 50])
def test_samples_share_the_prompt(opened: Opened, length: int) -> None:
    _, engine = opened(caching=False, max_num_seqs=3)
    prompt, params = make_prompt(length, 3), seeded(20, 14)
    add(engine, "many", prompt, params, n=5)
    lives = drain(engine)
    assert engine.stats()["prefill_tokens"] == length + 4
    for index in range(5):
        assert lives["many", index].tokens == alone(opened, prompt, seeded(20 + index, 14))
        assert lives["many", index].cached == (0 if index == 0 else length - 1)


def test_one_sample_is_aborted_and_the_others_go_on(opened: Opened) -> None:
    _, engine = opened()
    prompt = make_prompt(20, 3)
    add(engine, "many", prompt, seeded(20, 14), n=3)
    lives: Lives = {}
    for _ in range(4):
        take(lives, engine.step())
    assert engine.abort("many", index=1)
    assert not engine.abort("many", index=1)
    assert not engine.abort("many", index=3)
    assert engine.abort("many", index=2, report=False)
    while engine.has_unfinished():
        take(lives, engine.step())
    engine.check_idle()
    assert lives["many", 0].tokens == alone(opened, prompt, seeded(20, 14))
    assert lives["many", 1].end == _core.RequestEnd.ABORT
    assert lives["many", 2].end == _core.RequestEnd.NONE


def test_steps_into_a_queue_leave_what_is_there(opened: Opened) -> None:
    _, engine = opened()
    prompt = make_prompt(20, 3)
    add(engine, "one", prompt, seeded(20, 14))
    outputs: collections.deque[_core.RequestOutput] = collections.deque()
    while engine.has_unfinished():
        engine.step_into(outputs)
    lives: Lives = {}
    take(lives, list(outputs))
    assert len(outputs) == 14
    assert lives["one", 0].tokens == alone(opened, prompt, seeded(20, 14))


def test_requests_that_are_refused_leave_nothing(opened: Opened) -> None:
    _, engine = opened(num_kv_blocks=9, max_model_len=256)
    before = engine.stats()
    for params, fields, message in (
        (greedy(40), {}, "need 11 KV blocks of 4 tokens; the cache has 8"),
        (greedy(4), {"n": 0}, "n is 0; allowed are 1 to 1024"),
        (greedy(4), {"n": 1025}, "n is 1025"),
    ):
        with pytest.raises(RequestError, match=message):
            add(engine, "bad", make_prompt(5, 1), params, **fields)
    spec = make_row_spec([10**6], greedy(4), eos_token_ids=())
    with pytest.raises(InvalidArgumentError, match="token id 1000000"):
        engine.add_request("bad", spec)
    assert engine.stats() == before
    assert not engine.has_unfinished()
    with pytest.raises(InvalidArgumentError, match="use step"):
        engine.wait_outputs(1.0)


def test_background_thread_gives_the_same_tokens(opened: Opened) -> None:
    _, engine = opened(background=True)
    with pytest.raises(InvalidArgumentError, match="use wait_outputs"):
        engine.step()
    for timeout in (-1.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match="timeout_s"):
            engine.wait_outputs(timeout)
    assert engine.wait_outputs(60.0) == []  # nothing to wait for
    wishes = {str(index): (make_prompt(5 + index, index), seeded(index, 20)) for index in range(9)}
    for name, (prompt, params) in wishes.items():
        add(engine, name, prompt, params)
    lives: Lives = {}
    while engine.has_unfinished():
        take(lives, engine.wait_outputs(60.0))
    engine.check_idle()
    for name, (prompt, params) in wishes.items():
        assert lives[name, 0].tokens == alone(opened, prompt, params)
    assert engine.stats()["thread_cpu_ns"] > 0


def test_failed_step_in_the_background_ends_its_requests_only(opened: Opened) -> None:
    runner, engine = opened(background=True)
    prompt = make_prompt(9, 1)
    for round_ in range(3):
        runner.model.runner.fail_next_step("broken on purpose")
        add(engine, "touched", prompt, greedy(5))
        lives: Lives = {}
        while engine.has_unfinished():
            take(lives, engine.wait_outputs(60.0))
        assert lives["touched", 0].end == _core.RequestEnd.ERROR, round_
        assert "broken on purpose" in lives["touched", 0].error
        assert engine.stats()["cached_blocks"] == 0
    add(engine, "after", prompt, greedy(5))
    lives = {}
    while engine.has_unfinished():
        take(lives, engine.wait_outputs(60.0))
    assert lives["after", 0].tokens == alone(opened, prompt, greedy(5))


def test_close_ends_whoever_waits(opened: Opened) -> None:
    _, engine = opened(background=True)
    add(engine, "long", make_prompt(9, 1), greedy(1000))
    ends: list[object] = []

    def consume() -> None:
        try:
            while True:
                outputs = engine.wait_outputs(60.0)
                ends.extend(o.end for o in outputs if o.end != _core.RequestEnd.NONE)
        except ClosedError as error:
            ends.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.05)
    start = time.perf_counter()
    engine.close()
    consumer.join(10.0)
    assert not consumer.is_alive() and time.perf_counter() - start < 5.0
    assert isinstance(ends[-1], ClosedError)
    with pytest.raises(ClosedError):
        add(engine, "more", [5], greedy(1))
    engine.close()


def test_wake_ends_a_wait(opened: Opened) -> None:
    _, engine = opened(background=True)
    add(engine, "long", make_prompt(9, 1), greedy(1000))
    engine.abort("long", report=False)
    engine.wake()
    start = time.perf_counter()
    engine.wait_outputs(60.0)
    assert time.perf_counter() - start < 30.0


def test_runner_and_tokens_of_both_are_equal(opened: Opened) -> None:
    """What the engine draws is what a row of the runner draws."""
    runner, engine = opened()
    prompt, params = make_prompt(21, 4), greedy(6)
    add(engine, "a", prompt, params)
    tokens = drain(engine)["a", 0].tokens
    row = runner.add_row(prompt, params, block_ids=range(40, 50))
    outputs = [runner.execute([(row, 21)]).result()[0]]
    outputs += [runner.execute([(row, 1)]).result()[0] for _ in range(5)]
    assert tokens_of(outputs) == tokens
    runner.free_row(row)
