# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What goes wrong hits one request, with a typed error; the rest goes on with the right tokens."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrv1 import LLM, Engine, RequestUpdate
from mrv1.errors import Mrv1Error, OutOfMemoryError, RequestError
from serving_tools import LLAMA, SlowReference, Tensors, copy_model, greedy, make_prompt, seeded

WAIT = 30.0
# A token whose embedding is no number, in the model of these tests.
POISON = 7

SIZES: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 4,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 64,
    "num_kv_blocks": 200,
    "num_threads": 1,
    "progress": False,
}
BOTH = pytest.mark.parametrize("background", [True, False], ids=["threads", "stepped"])


def poison(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"][POISON] = np.nan


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_model(tmp_path_factory.mktemp("poisoned") / "model", change=poison)


@pytest.fixture(scope="module")
def reference(device: str) -> Iterator[SlowReference]:
    slow = SlowReference(device)
    yield slow
    slow.close()


def prompts_without_poison(count: int) -> list[list[int]]:
    return [
        [token if token != POISON else POISON + 1 for token in make_prompt(4 + index, index)]
        for index in range(count)
    ]


def run(engine: Engine) -> dict[str, list[RequestUpdate]]:
    found: dict[str, list[RequestUpdate]] = {}
    end = time.monotonic() + WAIT
    while engine.has_unfinished():
        assert time.monotonic() < end
        for update in engine.step():
            found.setdefault(update.request_id, []).append(update)
    return found


def tokens_of(updates: list[RequestUpdate]) -> list[int]:
    return [token for update in updates for token in update.token_ids]


@BOTH
def test_logits_that_are_no_numbers(
    device: str, poisoned: Path, reference: SlowReference, background: bool
) -> None:
    """They end their request, alone, and what it computed is given to nobody."""
    prompts = prompts_without_poison(5)
    bad = [*prompts[0][:4], POISON, *make_prompt(6, 99)]
    with Engine(poisoned, device=device, background=background, **SIZES) as engine:
        for turn in range(3):
            for index, prompt in enumerate(prompts):
                engine.add_request(str(index), prompt, greedy(12))
            engine.add_request("bad", bad, greedy(12))
            engine.add_request("bad samples", bad, seeded(1, 12, n=3))
            found = run(engine)
            for index, prompt in enumerate(prompts):
                assert tokens_of(found[str(index)]) == reference(prompt, greedy(12))[0]
            (only,) = found["bad"]
            assert (only.finish_reason, only.token_ids, only.finished) == ("error", (), True)
            assert "request" in (only.error or "") or "logits" in (only.error or "")
            # Its beginning was good, but a block that the error may have touched is not reused.
            assert turn == 0 or only.num_cached_tokens <= 4
            assert [u.finish_reason for u in found["bad samples"]] == ["error"] * 3
            engine.check_idle()


@pytest.mark.parametrize(
    "background, kind",
    [
        *[(True, kind) for kind in (ValueError, KeyError, Mrv1Error, SystemExit)],
        # Where the caller steps, one like SystemExit is the caller's own.
        *[(False, kind) for kind in (ValueError, KeyError, Mrv1Error)],
    ],
)
def test_exception_in_a_callback(
    device: str,
    reference: SlowReference,
    caplog: pytest.LogCaptureFixture,
    background: bool,
    kind: type[BaseException],
) -> None:
    prompts = prompts_without_poison(4)
    seen: list[RequestUpdate] = []
    done = threading.Event()

    def callback(update: RequestUpdate) -> None:
        seen.append(update)
        if update.finished:
            done.set()
        elif sum(len(update.token_ids) for update in seen) >= 3:
            raise kind("sparks")

    with Engine(LLAMA, device=device, background=background, **SIZES) as engine:
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), prompt, greedy(20))
        with caplog.at_level(logging.ERROR, logger="mrv1"):
            engine.add_request("bad", prompts[0], greedy(20), callback=callback)
            found = run(engine)
            assert done.wait(WAIT)
        for index, prompt in enumerate(prompts):
            assert tokens_of(found[str(index)]) == reference(prompt, greedy(20))[0]
        assert tokens_of(seen) == reference(prompts[0], greedy(20))[0][:3]
        assert seen[-1].finish_reason == "error" and "bad" not in found
        assert kind.__name__ in (seen[-1].error or "") and "sparks" in (seen[-1].error or "")
        (record,) = [record for record in caplog.records if record.name == "mrv1"]
        assert "'bad'" in record.getMessage() and record.exc_info is not None
        assert record.exc_info[0] is kind
        engine.check_idle()


@BOTH
def test_callback_that_fails_to_the_end(
    device: str, caplog: pytest.LogCaptureFixture, background: bool
) -> None:
    """Also at the update that tells it of its failure, and at a last one."""

    def callback(update: RequestUpdate) -> None:
        raise ValueError(update.request_id)

    with Engine(LLAMA, device=device, background=background, **SIZES) as engine:
        for name, count in (("long", 50), ("short", 1)):
            engine.add_request(name, make_prompt(5, 1), greedy(count), callback=callback)
        engine.add_request("good", make_prompt(5, 1), greedy(9))
        assert len(tokens_of(run(engine)["good"])) == 9
        engine.check_idle()
    assert len([record for record in caplog.records if record.name == "mrv1"]) == 3


@BOTH
def test_request_that_can_never_fit(
    device: str, reference: SlowReference, background: bool
) -> None:
    sizes = {**SIZES, "num_kv_blocks": 9, "max_model_len": 200}
    with Engine(LLAMA, device=device, background=background, **sizes) as engine:
        prompt = prompts_without_poison(1)[0]
        engine.add_request("good", prompt, greedy(20))
        for bad, count in ((make_prompt(40, 1), 10), (make_prompt(5, 1), 60)):
            with pytest.raises(RequestError, match="request 'bad': .*KV blocks of 4 tokens"):
                engine.add_request("bad", bad, greedy(count))
        with pytest.raises(RequestError, match="request 'bad': prompt.*at most 199 tokens"):
            engine.add_request("bad", make_prompt(200, 1), greedy(1))
        found = run(engine)
        assert list(found) == ["good"]
        assert tokens_of(found["good"]) == reference(prompt, greedy(20))[0]
        engine.check_idle()


def test_a_start_that_cannot_be(device: str) -> None:
    """A typed error, and no thread that stays."""
    before = threading.active_count()
    for options, kind in (
        ({"num_kv_blocks": 10**8}, OutOfMemoryError),
        ({"max_num_batched_tokens": 2}, Mrv1Error),
    ):
        with pytest.raises(kind):
            Engine(LLAMA, device=device, **{**SIZES, **options})
    assert threading.active_count() == before


def test_failed_step_in_the_background(device: str, reference: SlowReference) -> None:
    prompt = prompts_without_poison(1)[0]
    with LLM(LLAMA, device=device, **SIZES) as llm:
        llm.model.runner.fail_next_step("sparks")
        failed = llm.generate([prompt] * 3, greedy(30))
        assert "error" in {result.finish_reason for result in failed}
        for result in failed:
            if result.finish_reason == "error":
                assert "sparks" in (result.error or "")
            else:
                assert result.token_ids == reference(prompt, greedy(30))[0]
        assert llm.generate([prompt], greedy(30))[0].token_ids == reference(prompt, greedy(30))[0]


def test_output_thread_that_fails_ends_every_wait(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever may happen there: requests end with an error, and later ones are refused."""
    with Engine(LLAMA, device=device, **SIZES) as engine:

        def fail(*_: object) -> None:
            raise OSError("out of paper")

        monkeypatch.setattr("mrv1.output_pump.report_notices", fail)
        engine.add_request("a", make_prompt(5, 1), greedy(400, n=3))
        ends = [update for update in run(engine)["a"] if update.finish_reason is not None]
        assert len(ends) == 3 and [update.finished for update in ends] == [False, False, True]
        for update in ends:
            assert update.finish_reason == "error"
            assert "OSError: out of paper" in (update.error or "")
        with pytest.raises(Mrv1Error, match="out of paper"):
            engine.add_request("c", make_prompt(5, 1), greedy(4))
    assert any("output thread" in record.getMessage() for record in caplog.records)


# --- Ctrl-C --------------------------------------------------------------------------------------

PRELUDE = """
import os, signal, sys, threading, time
from mrv1 import LLM, Engine, SamplingParams

MODEL, DEVICE = sys.argv[1:3]
SIZES = dict(device=DEVICE, dtype="float32", num_threads=1, max_num_seqs=4, num_kv_blocks=256)

def greedy(count):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)

class Interrupt:
    def __init__(self, wait):
        self.sender = threading.Thread(target=self.send, args=(wait,))
        self.sender.start()
    def send(self, wait):
        time.sleep(0.05 + wait)  # not while this thread is still being started
        os.kill(os.getpid(), signal.SIGINT)
"""

CAUGHT = {
    "step": """
engine = Engine(MODEL, **SIZES)
expected = None
for turn in range(25):
    for index in range(6):
        engine.add_request(str(index), [5, 6, 7 + index], greedy(400))
    found = {str(index): [] for index in range(6)}
    interrupt = Interrupt(0.002 * turn)
    hits = 0
    while engine.has_unfinished() or not hits:
        try:
            for update in engine.step():
                found[update.request_id].append(update)
            if not engine.has_unfinished():
                time.sleep(0.1 if not hits else 0)
        except KeyboardInterrupt:
            hits += 1
    interrupt.sender.join()
    engine.check_idle()
    # An interrupt in the wait loses nothing; one between the return and the caller's own code is
    # the caller's.
    lengths = [sum(len(u.token_ids) for u in updates) for updates in found.values()]
    print("whole" if lengths == [400] * 6 else lengths, flush=True)
""",
    "stream": """
llm = LLM(MODEL, **SIZES)
for turn in range(25):
    interrupt = Interrupt(0.002 * turn)
    try:
        for chunk in llm.stream([[5, 6, 7 + i] for i in range(50)], greedy(400)):
            pass
        print("not interrupted")
    except KeyboardInterrupt:
        pass
    interrupt.sender.join()
    llm.engine.check_idle()
    tokens = llm.generate([[5, 6, 7]], greedy(40))[0].token_ids
    print("whole" if len(tokens) == 40 else tokens, flush=True)
""",
}


def child(device: str, body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + body, str(LLAMA), device],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_interrupt_while_step_waits(device: str) -> None:
    done = child(device, CAUGHT["step"])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 25 and lines.count("whole") >= 23, lines


def test_interrupt_of_a_stream(device: str) -> None:
    done = child(device, CAUGHT["stream"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["whole"] * 25


@pytest.mark.parametrize(
    "wait",
    ["engine.step()", "list(llm.stream([[5, 6]], greedy(400)))", "engine.close(); sys.exit()"],
)
def test_interrupt_that_ends_the_process(device: str, wait: str) -> None:
    """With callbacks running and requests in flight; nothing hangs, nothing but its traceback."""
    body = f"""
llm = LLM(MODEL, **SIZES)
engine = llm.engine
def callback(update):
    if update.finished:
        engine.add_request(update.request_id, [5, 6, 7], greedy(300), callback=callback)
for index in range(6):
    engine.add_request(str(index), [5, 6, 7 + index], greedy(300), callback=callback)
print("ready", flush=True)
while True:
    {wait}
"""
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body, str(LLAMA), device],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        closes = "close" in wait
        if not closes:
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    if closes:
        # The callbacks that add a request while the engine closes are refused, and say so.
        assert process.returncode == 0 and "engine is closed" in errors
    else:
        assert process.returncode in (-2, 130), errors
        # The engine is closed on the way out, where callbacks may be refused, too.
        lines = errors.splitlines()
        assert "KeyboardInterrupt" in lines
        refused = "mrv1.errors.ClosedError: engine is closed"
        assert {line for line in lines if line.startswith("mrv1.errors")} <= {refused}
