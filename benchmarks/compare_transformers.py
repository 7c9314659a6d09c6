# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Decode speed of mrv1 beside Hugging Face transformers on torch, on the CPU, in the same run.

    pip install ".[bench]"
    python benchmarks/compare_transformers.py --json benchmarks/results/cpu_decode_qwen3_0.6b.json

Both load the same directory of random weights in bfloat16, each in a process of its own with the
same number of threads, and take turns: some steps of one, then as many of the other. A step feeds
one token a request and takes the most likely next one. Needs about 4 GB of memory and of disk, and
a few minutes. The records are described in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mrv1 import bench, shapes
from mrv1.config import ModelConfig
from mrv1.llm import peak_memory_mb
from mrv1.random_model import save_random_model

DTYPE = "bfloat16"
# A peer that takes longer than this for one answer is stuck.
TIMEOUT_S = 300


class Mrv1Peer:
    def __init__(self, arguments: argparse.Namespace) -> None:
        from mrv1 import bench_decode
        from mrv1.loader import load_model

        self.decode = bench_decode
        steps = arguments.rounds * arguments.steps
        options = bench_decode.decode_options(
            "cpu", DTYPE, arguments.batch, [arguments.context], steps
        )
        self.model = load_model(arguments.model, options, progress=False)
        self.model.runner.fill_kv_random(0)
        self.run: bench_decode.DecodeRun | None = None

    def start(self, batch: int, context: int) -> None:
        if self.run is not None:
            self.run.close()
        self.run = self.decode.DecodeRun(self.model, batch, context)

    def measure(self, steps: int) -> tuple[list[float], list[float] | None]:
        assert self.run is not None
        return self.run.measure(steps)

    def rates(self) -> tuple[bench.Rates, str]:
        return (
            bench.measure_rates(self.model.device, DTYPE),
            bench.describe_device(self.model.device),
        )


class TransformersPeer:
    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch
        import transformers

        self.torch = torch
        torch.set_num_threads(arguments.threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.bfloat16
        ).eval()
        self.cache: Any = None
        self.tokens: Any = None

    def start(self, batch: int, context: int) -> None:
        torch = self.torch
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(
            self.model.config.vocab_size, (batch, context - 1), generator=generator
        )
        with torch.inference_mode():
            output = self.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.tokens = output.logits[:, -1].argmax(-1, keepdim=True)

    def measure(self, steps: int) -> tuple[list[float], list[float] | None]:
        milliseconds = []
        with self.torch.inference_mode():
            for _ in range(steps):
                start = time.perf_counter()
                output = self.model(
                    input_ids=self.tokens, past_key_values=self.cache, use_cache=True
                )
                self.tokens = output.logits[:, -1].argmax(-1, keepdim=True)
                milliseconds.append(1e3 * (time.perf_counter() - start))
        return milliseconds, None


PEERS = {"mrv1": Mrv1Peer, "transformers": TransformersPeer}


def serve(peer: str, arguments: argparse.Namespace, connection: Connection) -> None:
    """Makes a peer and answers calls of its methods until the other end closes."""
    made = PEERS[peer](arguments)
    connection.send(None)
    while True:
        try:
            method, values = connection.recv()
        except EOFError:
            return
        connection.send(peak_memory_mb() if method == "memory" else getattr(made, method)(*values))


class Process:
    """A peer in a process of its own, so that its memory and threads are its own."""

    def __init__(self, peer: str, arguments: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.peer = peer
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(peer, arguments, other), daemon=True)
        self.process.start()
        other.close()
        self.receive()

    def receive(self) -> Any:
        if not self.connection.poll(TIMEOUT_S):
            sys.exit(f"{self.peer} gave no answer in {TIMEOUT_S} s")
        try:
            return self.connection.recv()
        except EOFError:
            sys.exit(f"{self.peer} failed")

    def call(self, method: str, *values: object) -> Any:
        self.connection.send((method, values))
        return self.receive()

    def close(self) -> None:
        self.connection.close()
        self.process.join(TIMEOUT_S)


def compare(arguments: argparse.Namespace, shape: str) -> list[bench.Record]:
    processes = [Process(peer, arguments) for peer in PEERS]
    timings = []
    for batch in arguments.batch:
        milliseconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
        host_us: dict[str, list[float]] = {peer: [] for peer in PEERS}
        for process in processes:
            process.call("start", batch, arguments.context)
        for _ in range(arguments.rounds):
            for process in processes:
                steps, host = process.call("measure", arguments.steps)
                # The first step finds the caches as the other peer left them, its threads asleep.
                milliseconds[process.peer] += steps[1:]
                host_us[process.peer] += host[1:] if host else []
        for process in processes:
            host = host_us[process.peer]
            timing = bench.Timing(
                batch,
                arguments.context,
                statistics.median(milliseconds[process.peer]),
                statistics.median(host) if host else None,
                process.call("memory"),
            )
            timings.append((process.peer, timing))
    processes[1].close()
    rates, device = processes[0].call("rates")
    processes[0].close()
    config = ModelConfig.from_dir(arguments.model)
    records = []
    for peer, timing in timings:
        mean = timing.context + (arguments.rounds * arguments.steps - 1) / 2
        costs = bench.decode_costs(config, DTYPE, timing.batch, mean)
        record = bench.make_record("decode", shape, device, DTYPE, timing, costs, rates)
        record["peer"] = peer
        if peer == "transformers":
            record["versions"] = bench.versions("torch", "transformers")
        if arguments.commit is not None:
            record["commit"] = arguments.commit
        records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description="mrv1 beside transformers: decode on the CPU.")
    names = [name for name in shapes.NAMES if name != shapes.DEMO]
    parser.add_argument("--shape", choices=names, default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, help="cut the shape to so many layers")
    parser.add_argument("--model", help="a saved directory of the shape; made if left out")
    parser.add_argument("--batch", default="1,8", help="batch sizes (default: 1,8)")
    parser.add_argument("--context", type=int, default=128, help="cached tokens (default: 128)")
    parser.add_argument("--steps", type=int, default=9, help="steps of a turn (default: 9)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each (default: 4)")
    parser.add_argument("--json", help="write the records")
    parser.add_argument("--commit", help="what the records name, outside of a checkout")
    arguments = parser.parse_args()
    arguments.batch = [int(part) for part in arguments.batch.split(",")]
    if arguments.steps < 2 or arguments.rounds < 1 or arguments.context < 8:
        parser.error("--steps must be at least 2, --rounds 1 and --context 8")
    arguments.threads = len(os.sched_getaffinity(0))
    os.environ["MRV1_NUM_THREADS"] = str(arguments.threads)
    shape, config = shapes.shape_config(arguments.shape, arguments.layers)
    with tempfile.TemporaryDirectory() as directory:
        if arguments.model is None:
            arguments.model = str(save_random_model(Path(directory) / "model", config))
        records = compare(arguments, shape)
    print(bench.format_table(records))
    if arguments.json is not None:
        bench.write_json(arguments.json, records)


if __name__ == "__main__":
    main()
