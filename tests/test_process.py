# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What a process keeps of a model: nothing after close, nothing at exit, its own after a fork.

Each test runs in a process of its own, whose threads, memory, exit code and stderr it looks at.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving_tools import LLAMA, MODELS

PRELUDE = """
import gc, os, pathlib, sys, time
from mrv1 import LLM, Engine, ModelRunner, SamplingParams
from mrv1.errors import *

DEVICE, MODEL, OTHER = sys.argv[1:4]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SIZES = dict(device=DEVICE, dtype="float32", num_threads=2, max_num_seqs=4, num_kv_blocks=128)

def thread_names():
    return sorted(task.joinpath("comm").read_text().strip()
                  for task in pathlib.Path("/proc/self/task").iterdir())

def threads():
    # A thread that was joined is gone for Python, and a moment later for the system.
    before, names = None, thread_names()
    while names != before:
        time.sleep(0.01)
        before, names = names, thread_names()
    # On a GPU only our own, since the driver keeps its threads until the end.
    return len(names if DEVICE == "cpu" else [name for name in names if name.startswith("mrv1")])

def memory_kib():
    gc.collect()
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1])

def address_space_kib():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmSize")).split()[1])

def run(llm, prompt=(5, 6, 7, 8)):
    return llm.generate([list(prompt)], GREEDY)[0].token_ids
"""


def run_child(device: str, body: str, timeout: float = 60.0) -> str:
    """Runs PRELUDE and `body`; fails unless it exits with 0 and says nothing on stderr."""
    start = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-X", "dev", "-c", PRELUDE + body, device, str(LLAMA), str(qwen())],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        # Or each thread that loads to a GPU may reserve 64 MiB of addresses at any time.
        env={**os.environ, **({"MALLOC_ARENA_MAX": "1"} if device == "cuda" else {})},
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    assert time.perf_counter() - start < timeout
    return child.stdout


def qwen() -> Path:
    return MODELS / "qwen3-tied"


def test_open_and_close_many_times(device: str) -> None:
    run_child(
        device,
        """
base = threads()
with LLM(MODEL, **SIZES) as llm:
    first = run(llm)
    assert threads() > base or DEVICE != "cpu"
assert threads() == base, thread_names()
memory, space = memory_kib(), address_space_kib()
for round in range(20):
    with LLM(MODEL, **SIZES) as llm:
        assert run(llm) == first
    assert threads() == base, thread_names()
# Baseline, with slack for the allocator: a leaked model would be 20 times its 6 MB.
assert memory_kib() - memory < 4000, memory_kib() - memory
assert address_space_kib() - space < 20000, address_space_kib() - space
""",
    )


def test_memory_comes_back_without_close_too(device: str) -> None:
    """Objects that are dropped, and constructors that fail half way."""
    run_child(
        device,
        """
base = threads()
run(LLM(MODEL, **SIZES))
for kind in (Engine, ModelRunner):
    kind(MODEL, **SIZES)
gc.collect()
assert threads() == base, thread_names()
memory = memory_kib()
for round in range(10):
    run(LLM(MODEL, **SIZES))
    try:
        LLM(MODEL, **{**SIZES, "max_num_batched_tokens": 2})
        raise SystemExit("accepted")
    except InvalidArgumentError:
        pass
    try:
        LLM(MODEL, **{**SIZES, "num_kv_blocks": 10**8})
        raise SystemExit("accepted")
    except OutOfMemoryError:
        pass
gc.collect()
assert threads() == base, thread_names()
assert memory_kib() - memory < 4000, memory_kib() - memory
""",
    )


def test_kv_cache_and_weights_are_given_back(device: str) -> None:
    """A cache of 64 MB that was really written is gone after close."""
    run_child(
        device,
        """
memory = None
for round in range(3):
    runner = ModelRunner(MODEL, **{**SIZES, "num_kv_blocks": 2001, "max_num_batched_tokens": 511})
    for start in range(1, 2001, 32):
        row = runner.add_row([5 + start % 300] * 511, GREEDY, block_ids=range(start, start + 32)
                             if start + 32 <= 2001 else range(2001 - 32, 2001))
        runner.execute([(row, 511)]).result()
        runner.free_row(row)
    if DEVICE == "cpu":
        written = memory_kib()
    runner.close()
    runner.close()
    if memory is None:
        memory = memory_kib()
    if DEVICE == "cpu":
        assert written - memory_kib() > 55000, written - memory_kib()
    assert abs(memory_kib() - memory) < 4000
""",
    )


def test_an_engine_does_not_grow_with_its_steps(device: str) -> None:
    """Requests of many lengths, samples, aborts, drafts and preemptions leave no memory behind."""
    run_child(
        device,
        """
import random
from mrv1 import _core
from mrv1.runner import make_row_spec

drafts = {"method": "ngram", "num_speculative_tokens": 3}
small = {**SIZES, "block_size": 4, "num_kv_blocks": 18, "max_model_len": 64,
         "max_num_batched_tokens": 24}
runner = ModelRunner(MODEL, speculative_config=drafts, **small)
engine = _core.Engine(runner.model.runner, _core.EngineOptions(background=False))
draws = random.Random(1)
added = 0

def run_until(steps):
    global added
    while (stats := engine.stats())["steps"] < steps:
        if stats["waiting"] < 3:
            added += 1
            prompt = [5 + draws.randrange(40) % 7] * draws.randint(1, 30)
            params = SamplingParams(seed=added, max_tokens=draws.randint(1, 24), ignore_eos=True)
            spec = make_row_spec(prompt, params, eos_token_ids=())
            engine.add_request(str(added), spec, n=draws.choice((1, 1, 2)))
            if draws.randrange(8) == 0:
                engine.abort(str(added - 2))
        engine.step()

run_until(4000)
memory = memory_kib()
run_until(16000)
stats = engine.stats()
assert min(stats["preemptions"], stats["accepted_tokens"], stats["prefix_hit_tokens"]) > 40, stats
# A block of 64 bytes that each step, or each third one, forgets would be over 250.
grown = memory_kib() - memory
# A GPU's driver has memory of its own in the process.
assert grown < (200 if DEVICE == "cpu" else 4000), grown
""",
    )


def test_two_models_side_by_side(device: str) -> None:
    run_child(
        device,
        """
base = threads()
alone = []
for model in (MODEL, OTHER):
    with LLM(model, **SIZES) as llm:
        alone.append(run(llm))
one, two = LLM(MODEL, **SIZES), LLM(OTHER, **SIZES)
streams = [one.stream([[5, 6, 7, 8]], GREEDY), two.stream([[5, 6, 7, 8]], GREEDY)]
got = [[], []]
for _ in range(5):
    for tokens, stream in zip(got, streams):
        tokens += next(stream).token_ids
for tokens, stream in zip(got, streams):
    for chunk in stream:
        tokens += chunk.token_ids
assert got == alone and alone[0] != alone[1]
one.close()
assert run(two) == alone[1]
try:
    run(one)
    raise SystemExit("a closed model ran")
except ClosedError as error:
    assert "closed" in str(error)
two.close()
assert threads() == base, thread_names()
""",
    )


def test_load_while_another_runner_of_the_device_works(device: str) -> None:
    """Loading uses the threads of the device, which steps of another runner use too."""
    run_child(
        device,
        """
import dataclasses, threading
from mrv1 import _core
from mrv1.config import ModelConfig
from mrv1.loader import wire_model

shared = _core.Device(DEVICE, num_threads=4)
# A vocabulary that is large enough for loading to be shared among threads.
config = dataclasses.replace(ModelConfig.from_dir(MODEL), vocab_size=8192)
program = wire_model(config, "float32")
sizes = _core.RunnerConfig()
sizes.max_num_seqs, sizes.max_num_batched_tokens = 2, 128
sizes.max_model_len, sizes.num_blocks = 256, 40

def fill(runner):
    for index in range(len(program.weights)):
        runner.fill_random(index, 7, 0.2)

def generate(runner):
    tokens = []
    spec = _core.RowSpec()
    spec.token_ids = list(range(5, 105))
    spec.prompt_len, spec.max_tokens, spec.block_ids = 100, 100, [list(range(1, 17))]
    spec.temperature = 0.0
    row, _ = runner.add_row(spec)
    steps = [runner.execute([(row, 100)])]
    for _ in range(30):
        steps.append(runner.execute([(row, 1)]))
        tokens.append(runner.result(steps.pop(0)).tokens(0)[0])
    runner.result(steps.pop())
    runner.free_row(row)
    return tokens

first = _core.ModelRunner(shared, program, sizes)
fill(first)
alone = generate(first)
done = threading.Event()
loaded = []

def load():
    while not done.is_set():
        second = _core.ModelRunner(shared, program, sizes)
        fill(second)
        loaded.append(second)
        del loaded[:-1]

loader = threading.Thread(target=load)
loader.start()
try:
    while not loaded:
        assert generate(first) == alone
    for _ in range(10):
        assert generate(first) == alone
finally:
    done.set()
    loader.join()
assert generate(loaded[0]) == alone
""",
    )


def test_threads_that_cannot_start_are_a_typed_error(device: str) -> None:
    """Without address space for a thread's stack: DeviceError, for one thread and for several."""
    run_child(
        device,
        """
import resource
from mrv1 import _core

base = threads()
used = address_space_kib() * 1024
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 20), hard))
for count in (1, 4):
    try:
        _core.Device("cpu", num_threads=count)
        raise SystemExit("started")
    except DeviceError as error:
        assert "cannot start" in str(error), error
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert threads() == base, thread_names()
_core.Device("cpu", num_threads=2).close()
""",
    )


EXITS = {
    "never closed": "llm = LLM(MODEL, **SIZES); run(llm)",
    "closed": "llm = LLM(MODEL, **SIZES); run(llm); llm.close()",
    "stream half read": "llm = LLM(MODEL, **SIZES); s = llm.stream([[5, 6]] * 8, GREEDY); next(s)",
    "steps in flight": """
runner = ModelRunner(MODEL, **SIZES)
row = runner.add_row([5] * 300, GREEDY, block_ids=range(1, 33))
steps = [runner.execute([(row, 100)]) for _ in range(3)]
""",
    "engine in flight": """
engine = Engine(MODEL, **SIZES)
engine.add_request("a", [5] * 300, GREEDY)
engine.step()
""",
    "engine thread in flight": "from mrv1 import _core"
    """
from mrv1.runner import make_row_spec
runner = ModelRunner(MODEL, **SIZES)
engine = _core.Engine(runner.model.runner)
for name in "abc":
    engine.add_request(name, make_row_spec([5] * 300, GREEDY, eos_token_ids=()), n=2)
""",
    "reference cycle": "llm = LLM(MODEL, **SIZES); run(llm); llm.me = llm; del llm",
    "in a thread": """
import threading
def work():
    global llm
    llm = LLM(MODEL, **SIZES)
    run(llm)
thread = threading.Thread(target=work)
thread.start()
thread.join()
""",
}


@pytest.mark.parametrize("name", EXITS)
def test_interpreter_exit(device: str, name: str) -> None:
    """Exit code 0, nothing on stderr, and it does not take long."""
    out = run_child(device, EXITS[name] + "\nprint('end', flush=True)", timeout=20)
    assert out == "end\n"
    quick = """
import time, atexit
atexit.register(lambda: print(time.time(), flush=True))
"""
    out = run_child(device, quick + EXITS[name], timeout=20)
    assert time.time() - float(out) < 5.0


@pytest.mark.parametrize("background", [True, False])
def test_exit_ends_an_engine_that_is_kept(device: str, background: bool) -> None:
    """What refers to it may never be torn down; its thread and its steps end all the same."""
    out = run_child(
        device,
        f"""
import builtins, weakref

class Witness:
    pass

def report():
    # Finalizers of later objects have run.
    assert "mrv1-engine" not in thread_names()
    try:
        builtins.kept._native.stats()
    except ClosedError:
        print("closed", flush=True)

builtins.witness = Witness()
weakref.finalize(builtins.witness, report)
builtins.kept = Engine(MODEL, background={background}, **SIZES)
for index in range(4):
    builtins.kept.add_request(str(index), [5 + index] * 300, GREEDY)
builtins.kept.step()
assert thread_names().count("mrv1-engine") == {background}
""",
        timeout=20,
    )
    assert out == "closed\n"


def test_error_leaves_by_its_own_way(device: str) -> None:
    """An exception that nobody catches ends the process with 1 and its traceback."""
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            PRELUDE + "llm = LLM(MODEL, **SIZES)\nrun(llm)\nllm.generate([[10**6]])",
            device,
            str(LLAMA),
            str(qwen()),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert child.returncode == 1
    assert "mrv1.errors.RequestError: request 'llm-1': prompt[0] = 1000000" in child.stderr


def test_fork(device: str) -> None:
    """The child's copy raises ForkError, a new model works there, and the parent goes on."""
    if device == "cuda":
        # A CUDA context does not survive a fork; the typed error is all that a child can have.
        new_one = ""
    else:
        new_one = "with LLM(MODEL, **SIZES) as fresh: assert run(fresh) == expected"
    run_child(
        device,
        f"""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: what is tested here
base = threads()
llm = LLM(MODEL, **SIZES)
runner = ModelRunner(MODEL, **SIZES)
row = runner.add_row([5, 6, 7], GREEDY, block_ids=[1])
expected = run(llm)
stream = llm.stream([[5, 6, 7, 8]], GREEDY)
tokens = list(next(stream).token_ids)
step = runner.execute([(row, 3)])
child = os.fork()
if child == 0:
    try:
        for use in (lambda: run(llm), lambda: llm.engine.step(), lambda: next(stream),
                    lambda: runner.execute([(row, 1)]), lambda: step.result(),
                    lambda: runner.add_row([1], GREEDY), lambda: runner.free_rows,
                    lambda: llm.model.device.memory()):
            try:
                use()
                os._exit(3)
            except ForkError as error:
                assert "forked child" in str(error)
                assert isinstance(error, RuntimeError)
        assert threads() <= 1
        {new_one or "pass"}
        assert threads() <= 1, thread_names()
        llm.close()
        runner.close()
        del llm, runner, stream, step
        gc.collect()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(4)
    sys.exit(0)  # through the interpreter's own end
for chunk in stream:
    tokens += chunk.token_ids
assert tokens == expected
assert run(llm) == expected
assert step.result()[0].token_id is not None
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert run(llm) == expected
llm.close()
runner.close()
# NumPy's linear algebra ends its own threads at a fork.
assert threads() <= base and not [n for n in thread_names() if "mrv1" in n], thread_names()
""",
    )


def test_engine_thread_ends_with_its_engine(device: str) -> None:
    """By close, by being dropped, and not at all in a forked child."""
    run_child(
        device,
        """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
from mrv1 import _core
from mrv1.runner import make_row_spec

def engine_threads():
    return thread_names().count("mrv1-engine")

runner = ModelRunner(MODEL, **SIZES)
spec = make_row_spec([5] * 100, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True),
                     eos_token_ids=())
for way in ("close", "drop", "runner first"):
    engine = _core.Engine(runner.model.runner)
    assert engine_threads() == 1
    for name in "abcdef":
        engine.add_request(name, spec, n=2)
    engine.wait_outputs(5.0)
    child = os.fork()
    if child == 0:
        try:
            for use in (lambda: engine.step(), lambda: engine.add_request("z", spec),
                        lambda: engine.wait_outputs(1.0), lambda: engine.abort("a"),
                        lambda: engine.check_idle(), lambda: engine.stats()):
                try:
                    use()
                    os._exit(3)
                except ForkError:
                    pass
            engine.close()
            del engine
            gc.collect()
        except BaseException:
            os._exit(4)
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert engine.wait_outputs(5.0)
    if way == "close":
        engine.close()
    elif way == "runner first":
        runner.close()
        engine.close()
    del engine
    gc.collect()
    assert engine_threads() == 0
""",
    )


def test_fork_that_leaves_everything_to_the_exit(device: str) -> None:
    """Nothing is closed, in the parent or in the child."""
    run_child(
        device,
        """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
llm = LLM(MODEL, **SIZES)
expected = run(llm)
stream = llm.stream([[5, 6, 7, 8]], GREEDY)
next(stream)
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        sys.exit(0)
    children.append(child)
for child in children:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert run(llm) == expected
""",
    )


def test_import_starts_nothing(device: str) -> None:
    """No thread, no torch, and no library that is not needed yet."""
    run_child(
        device,
        """
with_mrv1 = threads()
import numpy  # its linear algebra may have threads of its own
assert threads() == with_mrv1, thread_names()
assert not [name for name in thread_names() if "mrv1" in name]
for name in ("torch", "transformers", "tokenizers", "tqdm", "jinja2"):
    assert name not in sys.modules, name
""",
    )
