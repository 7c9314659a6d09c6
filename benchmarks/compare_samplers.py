# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The sampler of mrv1 beside FlashInfer's and PyTorch's, on the same logits in the same run.

    python benchmarks/compare_samplers.py --device cuda --flashinfer DIR --json sampler.json

DIR is a directory with include/flashinfer and cccl as MRV1_FLASHINFER_DIR has them; its kernels are
compiled with nvcc, which needs cuRAND's headers, or come in a library that --build-only has left.
Without --flashinfer they are left out, as is PyTorch where it is not installed. What the others are
asked for:

- FlashInfer, for `temperature`: the draw from logits that have their temperature already; for
  `top_k_top_p` and `all`: softmax, then top_k and top_p together. It has nothing for the rest.
- PyTorch: argmax; softmax and the largest ratio to exponential noise; a sort for top_k and top_p;
  for `all` also biases, penalties, masks, min_p and logprobs. On a GPU as a graph.

The records are those of `mrv1 bench sampler`: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrv1 import _core, bench, bench_sampler, tuning

SOURCE = Path(__file__).resolve().parent.parent / "src/cuda/benchmarks/flashinfer_sampler.cc"
WARM_S = 0.1


def build(flashinfer: Path, library: Path) -> None:
    """Compiles flashinfer_sampler.cc for Hopper."""
    command = [
        "nvcc",
        "-x",
        "cu",
        "-O3",
        "-std=c++20",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-use_fast_math",
    ]
    command += ["--expt-relaxed-constexpr", "-gencode", "arch=compute_90a,code=sm_90a"]
    for include in ("cccl/libcudacxx/include", "cccl/cub", "cccl/thrust", "include"):
        command += ["-I", str(flashinfer / include)]
    subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)


class FlashInfer:
    def __init__(self, library: Path) -> None:
        self._time = ctypes.CDLL(str(library)).flashinfer_sampler_time

    def measure(
        self, case: str, spec: _core.RowSpec, logits: list[int], batch: int, vocab: int, runs: int
    ) -> float | None:
        """Microseconds of a call, or None for a case that it has nothing for."""
        if case == "greedy":
            return None
        seconds = (ctypes.c_double * runs)()
        tokens = (ctypes.c_int32 * batch)()
        status = self._time(
            (ctypes.c_uint64 * len(logits))(*logits),
            len(logits),
            batch,
            vocab,
            ctypes.c_float(spec.temperature),
            spec.top_k,
            ctypes.c_float(spec.top_p),
            runs,
            seconds,
            tokens,
        )
        if status != 0:
            raise RuntimeError(f"FlashInfer's sampler failed with CUDA error {status}")
        if not all(0 <= token < vocab for token in tokens):
            raise RuntimeError(f"FlashInfer drew {list(tokens)}")
        return 1e6 * statistics.median(seconds)


class DeviceArray:
    """A float32 matrix at an address of the GPU, for `torch.as_tensor`."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": "<f4",
            "version": 3,
        }


class Torch:
    def __init__(self, device: str) -> None:
        import torch

        self.torch = torch
        self.device = device

    def matrix(self, address: int, batch: int, vocab: int) -> Any:
        if self.device == "cuda":
            return self.torch.as_tensor(DeviceArray(address, (batch, vocab)), device="cuda")
        buffer = (ctypes.c_float * (batch * vocab)).from_address(address)
        return self.torch.frombuffer(buffer, dtype=self.torch.float32).view(batch, vocab)

    def sampler(self, case: str, spec: _core.RowSpec, vocab: int) -> Callable[[Any], Any]:
        torch = self.torch
        if case == "greedy":
            return lambda logits: logits.argmax(-1)
        edit = self.edits(spec, vocab) if case == "all" else None

        def draw(logits: Any) -> Any:
            top = None
            if edit is not None:
                logprobs = logits.log_softmax(-1)
                top = logprobs.topk(spec.num_logprobs)
                logits = edit(logits)
            logits = logits / spec.temperature
            if case == "all":
                probs = logits.softmax(-1)
                least = spec.min_p * probs.amax(-1, keepdim=True)
                logits = logits.masked_fill(probs < least, -torch.inf)
            if spec.top_k > 0:
                ordered, order = logits.sort(-1)
                ordered[:, : vocab - spec.top_k] = -torch.inf
                below = ordered.softmax(-1).cumsum(-1) <= 1 - spec.top_p
                below[:, -1] = False
                logits = ordered.masked_fill(below, -torch.inf)
                tokens = self.noisy_argmax(logits.softmax(-1))
                tokens = order.gather(-1, tokens[:, None])[:, 0]
            else:
                tokens = self.noisy_argmax(logits.softmax(-1))
            if top is None:
                return tokens
            own = logprobs.gather(-1, tokens[:, None])
            return tokens, top, (logprobs > own).sum(-1)

        return draw

    def noisy_argmax(self, probs: Any) -> Any:
        return (probs / self.torch.empty_like(probs).exponential_()).argmax(-1)

    def edits(self, spec: _core.RowSpec, vocab: int) -> Callable[[Any], Any]:
        torch = self.torch

        def vector(pairs: list[tuple[int, float]], empty: float = 0.0) -> Any:
            values = torch.full((vocab,), empty)
            for token, value in pairs:
                values[token] = value
            return values.to(self.device)

        outputs = spec.token_ids[spec.prompt_len :]
        counts = vector([(token, float(outputs.count(token))) for token in set(outputs)])
        seen = vector([(token, 1.0) for token in spec.token_ids]) > 0
        bias = vector(list(spec.logit_bias))
        banned = [
            word[-1] for word in spec.bad_words if len(word) == 1 or word[:-1] == outputs[-1:]
        ]
        out = vector([(token, 1.0) for token in [*spec.stop_ids, *banned]]) > 0
        out |= vector([(token, 1.0) for token in spec.allowed_token_ids]) == 0

        def edit(logits: Any) -> Any:
            logits = logits + bias
            repeated = torch.where(
                logits > 0, logits / spec.repetition_penalty, logits * spec.repetition_penalty
            )
            logits = torch.where(seen, repeated, logits)
            logits = logits - spec.frequency_penalty * counts
            logits = logits - spec.presence_penalty * (counts > 0)
            return logits.masked_fill(out, -torch.inf)

        return edit

    def measure(
        self, case: str, spec: _core.RowSpec, logits: list[int], batch: int, vocab: int, runs: int
    ) -> float:
        """Microseconds of a call."""
        torch = self.torch
        matrices = [self.matrix(address, batch, vocab) for address in logits]
        sampler = self.sampler(case, spec, vocab)
        sampler(matrices[0])
        if self.device != "cuda":
            return 1e6 * statistics.median(
                self.wall(lambda: [sampler(matrix) for matrix in matrices]) / len(matrices)
                for _ in range(runs)
            )
        # What the calls of a graph keep is shared, as its memory is freed between them.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for matrix in matrices:
                sampler(matrix)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        spent: list[float] = []
        warm = 0.0
        while len(spent) < runs:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
            if warm < WARM_S:
                warm += seconds
            else:
                spent.append(seconds)
        return 1e6 * statistics.median(spent) / len(matrices)

    @staticmethod
    def wall(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256, 151936])
    parser.add_argument("--cases", nargs="+", choices=bench_sampler.CASES)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--working-set-mb", type=int, default=512)
    parser.add_argument("--flashinfer", type=Path, help="directory with FlashInfer's headers")
    parser.add_argument("--library", type=Path, default=Path("flashinfer_sampler.so"))
    parser.add_argument(
        "--build-only", action="store_true", help="leave the library, measure nothing"
    )
    parser.add_argument("--commit", help="what the records name, outside of a checkout")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    library = options.library.resolve()
    if options.flashinfer is not None and not library.exists():
        build(options.flashinfer, library)
    if options.build_only:
        return 0
    others: dict[str, Any] = {}
    if options.device == "cuda" and library.exists():
        others["flashinfer_us"] = FlashInfer(library)
    try:
        others["torch_us"] = Torch(options.device)
    except ImportError:
        print("torch is not installed", file=sys.stderr)
    device = tuning.make_device(options.device)
    bandwidth = bench.measure_bandwidth(device)
    records = []
    for vocab in options.vocab:
        for batch in options.batch:
            for case in options.cases or bench_sampler.CASES:
                working_set = options.working_set_mb << 20
                record = bench_sampler.measure_sampler(
                    device, case, batch, vocab, options.runs, working_set, bandwidth
                )
                copies = bench_sampler.num_copies(batch, vocab, working_set)
                spec = bench_sampler.case_spec(case, vocab)
                probe = _core.SampleProbe(device, batch, vocab, spec, copies)
                logits = [probe.logits_address(copy) for copy in range(copies)]
                for key, other in others.items():
                    us = other.measure(case, spec, logits, batch, vocab, options.runs)
                    if us is not None:
                        record[key] = round(us, 4)  # type: ignore[literal-required]
                probe.close()
                if options.commit is not None:
                    record["commit"] = options.commit
                records.append(record)
    device.close()
    print(bench.format_table(records))
    if options.json is not None:
        bench.write_json(options.json, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
