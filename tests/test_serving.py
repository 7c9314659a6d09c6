# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The engine as servers use it: its threads, callbacks, samples, stop strings, the prefix cache."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mrv1 import LLM, Engine, RequestUpdate, SamplingParams
from mrv1.errors import ClosedError, InvalidArgumentError, RequestError
from serving_tools import LLAMA, SlowReference, greedy, make_prompt, seeded

WAIT = 30.0

Open = Callable[..., Engine]


@pytest.fixture
def opened(device: str) -> Iterator[Open]:
    """Opens engines, and checks at the end that nothing was left behind."""
    engines: list[Engine] = []

    def open_engine(model: Path = LLAMA, **options: Any) -> Engine:
        defaults: dict[str, Any] = {
            "device": device,
            "dtype": "float32",
            "block_size": 4,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "num_kv_blocks": 400,
            "num_threads": 1,
            "progress": False,
        }
        engines.append(Engine(model, **{**defaults, **options}))
        return engines[-1]

    yield open_engine
    for engine in engines:
        try:
            engine.check_idle()
        except ClosedError:
            continue
        assert not engine.has_unfinished() and engine.step() == []
        engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "mrv1-output"]


@pytest.fixture(scope="module")
def reference(device: str) -> Iterator[SlowReference]:
    slow = SlowReference(device)
    yield slow
    slow.close()


class Taker:
    """A callback that keeps what it is given, and knows when the request has ended."""

    def __init__(self) -> None:
        self.updates: list[RequestUpdate] = []
        self.threads: set[str] = set()
        self.done = threading.Event()

    def __call__(self, update: RequestUpdate) -> None:
        assert not self.done.is_set(), "news after the end"
        self.updates.append(update)
        self.threads.add(threading.current_thread().name)
        if update.finished:
            self.done.set()

    def tokens(self, index: int = 0) -> list[int]:
        assert self.done.wait(WAIT)
        return [t for u in self.updates if u.index == index for t in u.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(u.text for u in self.updates if u.index == index)


def drain(engine: Engine) -> dict[str, list[RequestUpdate]]:
    found: dict[str, list[RequestUpdate]] = {}
    while engine.has_unfinished():
        for update in engine.step():
            found.setdefault(update.request_id, []).append(update)
    return found


def tokens_of(updates: list[RequestUpdate], index: int = 0) -> list[int]:
    return [token for u in updates if u.index == index for token in u.token_ids]


BOTH = pytest.mark.parametrize("background", [True, False], ids=["threads", "stepped"])


# --- updates -------------------------------------------------------------------------------------


@BOTH
def test_steps_and_callbacks_give_the_same(
    opened: Open, reference: SlowReference, background: bool
) -> None:
    engine = opened(background=background)
    prompts = [make_prompt(5 + 3 * i, i) for i in range(12)]
    params = [greedy(10 + i) if i % 2 else seeded(i, 10 + i) for i in range(12)]
    takers = [Taker() for _ in prompts]
    for index, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
        callback = takers[index] if index % 3 else None
        assert engine.add_request(str(index), prompt, chosen, callback=callback) == prompt
    found = drain(engine)
    assert sorted(found) == ["0", "3", "6", "9"]
    for index, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
        expected, reason = reference(prompt, chosen)
        updates = takers[index].updates if index % 3 else found[str(index)]
        assert tokens_of(updates) == expected
        assert updates[-1].finish_reason == reason and updates[-1].finished
        assert all(u.finish_reason is None and not u.finished for u in updates[:-1])
        assert "".join(u.text for u in updates) == engine.tokenizer.decode(expected)
        if index % 3:
            here = threading.current_thread().name
            assert takers[index].threads == {"mrv1-output" if background else here}


def test_step_returns_at_once_where_nothing_is_unfinished(opened: Open) -> None:
    engine = opened()
    start = time.perf_counter()
    for _ in range(100):
        assert engine.step() == []
    assert time.perf_counter() - start < 5


def test_step_waits_in_several_threads(opened: Open, reference: SlowReference) -> None:
    """Each update comes to exactly one of them, and none waits for ever."""
    engine = opened()
    lock = threading.Lock()
    found: list[RequestUpdate] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set() or engine.has_unfinished():
            for update in engine.step():
                with lock:
                    found.append(update)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    prompts = [make_prompt(6, i) for i in range(20)]
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, greedy(15))
    stop.set()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    for index, prompt in enumerate(prompts):
        mine = [update for update in found if update.request_id == str(index)]
        assert sum(update.finished for update in mine) == 1
        assert sorted(tokens_of(mine)) == sorted(reference(prompt, greedy(15))[0])


@BOTH
def test_callbacks_may_use_the_engine(opened: Open, background: bool) -> None:
    """One adds a request of the same name, aborts others, and looks around."""
    engine = opened(background=background)
    long, again = Taker(), Taker()
    engine.add_request("long", make_prompt(5, 1), greedy(500), callback=long)
    second = [5, 6, 7]

    def callback(update: RequestUpdate) -> None:
        assert engine.stats()["steps"] > 0
        if update.finished:
            engine.add_request("first", second, greedy(6), callback=again)
            assert engine.abort("long") and not engine.abort("nobody")

    engine.add_request("first", make_prompt(4, 2), greedy(6), callback=callback)
    drain(engine)
    assert len(again.tokens()) == 6
    assert long.done.wait(WAIT) and long.updates[-1].finish_reason == "abort"
    assert len(long.tokens()) < 500


@BOTH
def test_abort_without_report_is_silent_and_frees_the_name(
    opened: Open, reference: SlowReference, background: bool
) -> None:
    engine = opened(background=background)
    for turn in range(30):
        engine.add_request("a", make_prompt(5, turn), greedy(100))
        if turn % 3:
            engine.step()
        engine.abort("a", report=False)  # it may have ended, untaken
        assert not engine.abort("a")
        prompt = make_prompt(6, turn)
        engine.add_request("a", prompt, greedy(5))
        assert tokens_of(drain(engine)["a"]) == reference(prompt, greedy(5))[0]


def test_a_name_is_taken_until_its_last_update_is(opened: Open) -> None:
    engine = opened()
    engine.add_request("a", make_prompt(5, 1), greedy(3))
    while not engine._pump._news or not engine._pump._news[-1][1].finished:
        time.sleep(0.001)
    with pytest.raises(RequestError, match="request 'a'.*unfinished"):
        engine.add_request("a", make_prompt(5, 1), greedy(3))
    assert engine.has_unfinished()
    assert engine.step()[-1].finished
    engine.add_request("a", make_prompt(5, 1), greedy(3))
    drain(engine)


def test_priorities(opened: Open) -> None:
    """With one row, the more urgent request runs first, whoever came first."""
    engine = opened(max_num_seqs=1, background=False)
    ended = []
    for name, priority in (("first", 0), ("late", 5), ("middle", 1), ("urgent", -3)):
        engine.add_request(name, make_prompt(4, 1), greedy(3), priority=priority)
    while engine.has_unfinished():
        ended += [update.request_id for update in engine.step() if update.finished]
    assert ended == ["urgent", "first", "middle", "late"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"priority": 1.5}, "priority = 1.5"),
        ({"priority": True}, "priority = True"),
        ({"priority": 2**31}, "priority = "),
        ({"callback": 3}, "callback = 3"),
        ({"cache_salt": ""}, "cache_salt = ''"),
        ({"cache_salt": 3}, "cache_salt = 3"),
        ({"skip_prefix_cache": 1}, "skip_prefix_cache = 1"),
        ({"params": SamplingParams(n=9)}, "n = 9.*at most max_num_seqs = 8"),
    ],
)
def test_arguments_that_cannot_be(opened: Open, arguments: dict[str, Any], named: str) -> None:
    engine = opened()
    with pytest.raises(RequestError, match=f"request 'a': {named}"):
        engine.add_request("a", [1, 2], **arguments)
    assert not engine.has_unfinished()


@pytest.mark.parametrize("option", ["enable_prefix_caching", "background"])
def test_options_that_cannot_be(opened: Open, option: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{option} = 'yes'.*True or False"):
        opened(**{option: "yes"})


# --- samples -------------------------------------------------------------------------------------


@BOTH
def test_samples_of_one_prompt(opened: Open, reference: SlowReference, background: bool) -> None:
    engine = opened(background=background)
    prompt = make_prompt(21, 4)
    taker = Taker()
    engine.add_request("n", prompt, seeded(11, 14, n=5), callback=taker)
    engine.add_request("one", prompt, seeded(13, 14))
    found = drain(engine)
    for index in range(5):
        assert taker.tokens(index) == reference(prompt, seeded(11 + index, 14))[0]
    assert sum(u.finish_reason is not None for u in taker.updates) == 5
    assert sum(u.finished for u in taker.updates) == 1 and taker.updates[-1].finished
    assert tokens_of(found["one"]) == taker.tokens(2)
    # The prompt was computed once: the others share its blocks.
    shared = {u.index: u.num_cached_tokens for u in taker.updates}
    assert min(shared[index] for index in range(1, 5)) >= 20 > shared[0]


def test_samples_of_llm(device: str) -> None:
    options: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 200, "num_threads": 1}
    with LLM(LLAMA, device=device, max_num_seqs=6, **options) as llm:
        prompt = make_prompt(9, 3)
        params = seeded(5, 8, n=3)
        alone = [llm.generate([prompt], seeded(5 + i, 8))[0] for i in range(3)]
        result, other = llm.generate([prompt, make_prompt(4, 2)], [params, greedy(4)])
        assert [output.index for output in result.outputs] == [0, 1, 2]
        assert [o.token_ids for o in result.outputs] == [r.token_ids for r in alone]
        assert [o.text for o in result.outputs] == [r.text for r in alone]
        assert (result.text, result.token_ids) == (alone[0].text, alone[0].token_ids)
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (9, 24)
        assert result.usage.total_tokens == 33
        assert [output.token_ids for output in other.outputs] == [other.token_ids]
        texts = ["", "", ""]
        ends = []
        for chunk in llm.stream([prompt], params):
            texts[chunk.sample] += chunk.text
            ends += [chunk.sample] if chunk.finish_reason is not None else []
        assert texts == [r.text for r in alone] and sorted(ends) == [0, 1, 2]
        with pytest.raises(RequestError, match="n = 7.*max_num_seqs = 6"):
            llm.generate([prompt], greedy(3, n=7))
        # Each sample ends for itself.
        stops = [alone[0].token_ids[2]]
        (mixed,) = llm.generate([prompt], seeded(5, 8, n=3, stop_token_ids=stops))
        assert len(mixed.outputs[0].token_ids) == 3
        assert mixed.outputs[0].finish_reason == "stop"
        assert mixed.usage.completion_tokens == sum(len(o.token_ids) for o in mixed.outputs)


# --- stop strings --------------------------------------------------------------------------------


@BOTH
def test_a_stop_string_is_a_late_abort(
    opened: Open, reference: SlowReference, background: bool
) -> None:
    """Text and tokens end where it is complete, whatever was computed beyond."""
    engine = opened(background=background)
    prompt = make_prompt(9, 12)
    whole = reference(prompt, greedy(40))[0]
    text = engine.tokenizer.decode(whole)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    needed = next(count for count in range(1, 41) if stop in engine.tokenizer.decode(whole[:count]))
    for turn in range(10):
        taker = Taker()
        engine.add_request(str(turn), prompt, greedy(400, stop=stop), callback=taker)
        drain(engine)
        assert taker.tokens() == whole[:needed]
        assert taker.text() == text[: text.index(stop)]
        last = taker.updates[-1]
        assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    engine.check_idle()


# --- the prefix cache ----------------------------------------------------------------------------


def cached(engine: Engine, name: str, prompt: list[int], **options: Any) -> int:
    engine.add_request(name, prompt, greedy(3), **options)
    return drain(engine)[name][-1].num_cached_tokens


def test_prefix_cache_and_salts(opened: Open) -> None:
    engine = opened()
    prompt = make_prompt(33, 7)
    assert cached(engine, "first", prompt) == 0
    assert cached(engine, "again", prompt) == 32
    assert cached(engine, "longer", [*prompt[:20], *make_prompt(9, 8)]) == 20
    assert cached(engine, "salted", prompt, cache_salt="tenant") == 0
    assert cached(engine, "salted again", prompt, cache_salt="tenant") == 32
    assert cached(engine, "other", prompt, cache_salt="other tenant") == 0
    assert cached(engine, "skipped", prompt, skip_prefix_cache=True) == 0
    off = opened(enable_prefix_caching=False)
    assert [cached(off, name, prompt) for name in ("first", "again")] == [0, 0]


def test_results_tell_what_was_cached(device: str) -> None:
    options: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 64, "num_threads": 1}
    prompt = make_prompt(40, 1)
    with LLM(LLAMA, device=device, block_size=8, **options) as llm:
        first, again = (llm.generate([prompt], greedy(4))[0] for _ in range(2))
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 32)
        assert first.token_ids == again.token_ids
        assert (first.num_draft_tokens, first.acceptance_rate) == (0, None)
    with LLM(LLAMA, device=device, block_size=8, enable_prefix_caching=False, **options) as llm:
        assert [llm.generate([prompt], greedy(4))[0].num_cached_tokens for _ in range(2)] == [0, 0]


# --- the end -------------------------------------------------------------------------------------


@BOTH
def test_close_ends_what_runs_with_an_abort(opened: Open, background: bool) -> None:
    engine = opened(background=background, max_num_seqs=1)
    takers = [Taker() for _ in range(30)]  # work for seconds
    for index, taker in enumerate(takers):
        engine.add_request(str(index), make_prompt(5, index), greedy(400), callback=taker)
    engine.close()
    for taker in takers:
        assert taker.done.is_set()
    reasons = [taker.updates[-1].finish_reason for taker in takers]
    assert reasons[-5:] == ["abort"] * 5 and set(reasons) <= {"abort", "length"}
    for use in (
        lambda: engine.add_request("a", [1], greedy(1)),
        engine.step,
        engine.has_unfinished,
        engine.stats,
        lambda: engine.abort("0"),
    ):
        with pytest.raises(ClosedError, match="closed"):
            use()
    engine.close()


def test_close_while_another_thread_waits(opened: Open) -> None:
    engine = opened(max_num_seqs=1)
    got: list[str] = []

    def work() -> None:
        try:
            while True:
                got.extend(u.finish_reason or "" for u in engine.step())
                if not engine.has_unfinished():
                    got.append("idle")
                    return
        except ClosedError:
            got.append("closed")

    for index in range(30):
        engine.add_request(str(index), make_prompt(5, index), greedy(400))
    thread = threading.Thread(target=work)
    thread.start()
    engine.close()
    thread.join(WAIT)
    assert not thread.is_alive() and got[-1] == "closed"


def test_a_callback_may_close_the_engine(opened: Open) -> None:
    engine = opened(max_num_seqs=1)
    other, ready, done = Taker(), threading.Event(), threading.Event()

    def callback(update: RequestUpdate) -> None:
        assert ready.wait(WAIT)
        if not update.finished:
            engine.close()
        else:
            done.set()

    engine.add_request("closes", make_prompt(5, 1), greedy(400), callback=callback)
    for index in range(30):
        engine.add_request(str(index), make_prompt(5, 1), greedy(400))
    engine.add_request("other", make_prompt(5, 1), greedy(400), callback=other)
    ready.set()
    assert done.wait(WAIT) and other.done.wait(WAIT)
    assert other.updates[-1].finish_reason == "abort"
    engine.close()


def test_engine_that_is_dropped_ends_its_thread(opened: Open) -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    before = names().count("mrv1-output")
    engine = Engine(LLAMA, device="cpu", dtype="float32", num_kv_blocks=64, num_threads=1)
    engine.add_request("a", make_prompt(5, 1), greedy(400))
    assert names().count("mrv1-output") == before + 1
    del engine
    gc.collect()
    assert names().count("mrv1-output") == before
    assert opened is not None


def test_llm_closed_while_another_thread_generates(device: str) -> None:
    sizes: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 64, "num_threads": 1}
    llm = LLM(LLAMA, device=device, max_num_seqs=1, **sizes)
    started, ended = threading.Event(), []

    def work() -> None:
        stream = llm.stream([make_prompt(5, index) for index in range(30)], greedy(400))
        next(stream)
        started.set()
        try:
            for _ in stream:
                pass
            ended.append("read")
        except ClosedError:
            ended.append("closed")

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(WAIT)
    llm.close()
    thread.join(WAIT)
    assert not thread.is_alive() and ended == ["closed"]
