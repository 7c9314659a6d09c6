# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What the engine itself takes: its thread in a decode step, adding a request, a shared prompt.

    python benchmarks/engine_overhead.py --shape qwen3-8b --device cuda --json overhead.json

- step: CPU time of the engine's thread for a decode step with --running requests (of a pipeline, of
  a micro-batch of them), the time it waits for the device left out. Outputs are taken by another
  thread meanwhile, as a server does.
- add: CPU time of adding a request whose token ids are native already, by blocks of its prompt: the
  median of 200. The engine takes it over at once, in the same thread.
- first_token: milliseconds from adding a request of --shared + --new tokens to its first token,
  with nothing in the prefix cache and with the shared tokens there; the medians of 5 in turns.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import time
from pathlib import Path

import numpy as np

from mrv1 import _core, bench, shapes
from mrv1.config import ModelConfig
from mrv1.env_report import commit
from mrv1.loader import LoadedModel, RunnerOptions
from mrv1.random_model import random_runner
from mrv1.runner import make_row_spec
from mrv1.sampling_params import SamplingParams

WARM_UP_STEPS = 50
ADDED_BLOCKS = (1, 64, 512)


def spec_of(model: LoadedModel, length: int, seed: int, max_tokens: int) -> _core.RowSpec:
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, length).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return make_row_spec(ids, params, eos_token_ids=())


def measure_step(model: LoadedModel, running: int, steps: int) -> float:
    """Microseconds of the engine's thread for one decode step."""
    engine = _core.Engine(model.runner, _core.EngineOptions(background=True))
    for index in range(running):
        spec = spec_of(model, 8, index, steps + 2 * WARM_UP_STEPS)
        engine.add_request(f"request-{index}", spec)

    def reach(step: int) -> dict[str, int]:
        while (stats := engine.stats())["steps"] < step:
            engine.wait_outputs(1.0)
        return stats

    reach(1)
    while engine.stats()["running"] < running or engine.stats()["waiting"] > 0:
        engine.wait_outputs(1.0)
    first = reach(engine.stats()["steps"] + WARM_UP_STEPS)
    last = reach(first["steps"] + steps)
    assert first["running"] == last["running"] == running
    engine.close()
    spent = last["thread_cpu_ns"] - first["thread_cpu_ns"]
    return spent / (last["steps"] - first["steps"]) / 1e3


def measure_add(model: LoadedModel, blocks: int) -> float:
    """Microseconds of adding one request."""
    engine = _core.Engine(model.runner, _core.EngineOptions(background=False))
    spec = spec_of(model, blocks * model.block_size, blocks, 1)
    times = []
    for index in range(220):
        name = f"request-{index}"
        start = time.thread_time_ns()
        engine.add_request(name, spec)
        times.append(time.thread_time_ns() - start)
    engine.close()
    return statistics.median(times[20:]) / 1e3


def measure_first_token(model: LoadedModel, shared: int, new: int) -> tuple[float, float]:
    """Milliseconds to the first token: nothing cached, and the shared tokens cached."""
    engine = _core.Engine(model.runner, _core.EngineOptions(background=True))
    times: dict[bool, list[float]] = {False: [], True: []}
    prompt = spec_of(model, shared, 0, 1).token_ids
    for turn in range(12):
        cached = turn % 2 == 1
        spec = spec_of(model, new, turn + 1, 1)
        spec.token_ids = prompt + spec.token_ids
        spec.prompt_len = shared + new
        start = time.perf_counter()
        # A salt of its own finds nothing; the one before has left the shared tokens.
        engine.add_request(str(turn), spec, cache_salt=turn // 2)
        outputs = []
        while engine.has_unfinished():
            outputs += engine.wait_outputs(60.0)
        times[cached].append((time.perf_counter() - start) * 1e3)
        assert len(outputs) == 1
        found = outputs[0].num_cached_tokens
        assert found == (shared // model.block_size * model.block_size if cached else 0), found
    engine.close()
    return statistics.median(times[False][1:]), statistics.median(times[True][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description="What the engine itself takes.")
    names = [name for name in shapes.NAMES if name != shapes.DEMO]
    parser.add_argument("--shape", choices=names, default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, help="cut the shape to so many layers")
    parser.add_argument(
        "--device", default=None, help="cpu or cuda (default: a GPU if there is one)"
    )
    parser.add_argument("--running", type=int, default=256, help="decoding requests (default: 256)")
    parser.add_argument("--steps", type=int, default=500, help="steps measured (default: 500)")
    parser.add_argument("--shared", type=int, default=8192, help="tokens (default: 8192)")
    parser.add_argument("--new", type=int, default=64, help="tokens (default: 64)")
    for kind, text in (("tensor", "devices of each layer"), ("pipeline", "stages")):
        parser.add_argument(
            f"--{kind}-parallel-size", type=int, default=1, help=f"{text} (default: 1)"
        )
    parser.add_argument("--json", help="write the record")
    parser.add_argument("--commit", help="what the record names, outside of a checkout")
    arguments = parser.parse_args()
    if arguments.json is not None:
        bench.check_writable(arguments.json)
    shape, config = shapes.shape_config(arguments.shape, arguments.layers)
    length = max(arguments.shared + arguments.new + 16, ADDED_BLOCKS[-1] * 16 + 16)
    blocks = max(
        arguments.running * -(-(8 + arguments.steps + 2 * WARM_UP_STEPS) // 16),
        2 * -(-length // 16),
    )
    options = RunnerOptions(
        device=arguments.device,
        dtype="bfloat16",
        max_num_seqs=arguments.running,
        max_model_len=length,
        num_kv_blocks=blocks + 1,
        tensor_parallel_size=arguments.tensor_parallel_size,
        pipeline_parallel_size=arguments.pipeline_parallel_size,
    )
    model = random_runner(ModelConfig.from_values(config), options)
    step_us = measure_step(model, arguments.running, arguments.steps)
    add_us = {blocks: measure_add(model, blocks) for blocks in ADDED_BLOCKS}
    cold_ms, cached_ms = measure_first_token(model, arguments.shared, arguments.new)
    device = bench.describe_device(model.device)
    model.close()
    record = {
        "figure": "engine_overhead",
        "shape": shape,
        "device": device,
        "versions": bench.versions(),
        "commit": arguments.commit or commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "running": arguments.running,
        "steps": arguments.steps,
        "thread_cpu_us_per_step": round(step_us, 2),
        "add_request_us_by_blocks": {str(key): round(us, 2) for key, us in add_us.items()},
        "shared_tokens": arguments.shared,
        "new_tokens": arguments.new,
        "first_token_cold_ms": round(cold_ms, 3),
        "first_token_cached_ms": round(cached_ms, 3),
    }
    if arguments.tensor_parallel_size > 1:
        record["tp"] = arguments.tensor_parallel_size
    if arguments.pipeline_parallel_size > 1:
        record["pp"] = arguments.pipeline_parallel_size
    text = json.dumps([record], indent=2)
    print(text)
    if arguments.json is not None:
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
