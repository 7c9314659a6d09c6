# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What NVFP4 weights cost in accuracy: the divergence of logits from those of the plain checkpoint.

    python benchmarks/nvfp4_accuracy.py --stories 50 --device cpu --json demo.json
    python benchmarks/nvfp4_accuracy.py --shape llama3-8b --layers 2 --device cpu --json shape.json

The checkpoint is quantised as `mrv1 quantize` does. Both then run the same tokens, of which all but
a prompt's are forced: held-out stories of the demo model's grammar, or random tokens of a model
with random weights. The record has the Kullback-Leibler divergence from the plain model's
distribution of tokens to the other's, in nats, how often both find the same token most likely, and
of stories the perplexity of both. `kl_noise` is the divergence of the plain model whose matrices
have Gaussian noise as large as their errors: what errors of that size cost whatever made them.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from kv_cache_accuracy import (
    BLOCK_SIZE,
    STORY_SEED,
    close,
    collect_logits,
    kl_divergence,
    log_softmax,
    perplexity,
    story_tokens,
)

from mrv1 import bench, shapes
from mrv1.env_report import commit
from mrv1.loader import RunnerOptions, load_model
from mrv1.quantize import TensorReport, quantize_checkpoint
from mrv1.random_model import save_random_model
from mrv1.safetensors_reader import TensorInfo, read_checkpoint
from mrv1.safetensors_writer import NewTensor, write_checkpoint
from mrv1.tokenizer import Tokenizer

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
PIECE = 1 << 22  # values that are read at a time


def logits_of(
    root: Path, rows: Rows, options: argparse.Namespace
) -> tuple[NDArray[np.float32], str]:
    """Logits after each prompt and each forced token, and the device."""
    longest = max(len(prompt) + len(forced) for prompt, forced in rows) + 1
    requests = min(options.requests, len(rows))
    model = load_model(
        root,
        RunnerOptions(
            device=options.device,
            max_num_seqs=requests,
            max_num_batched_tokens=requests * options.chunk,
            max_model_len=longest,
            num_kv_blocks=1 + requests * -(-longest // BLOCK_SIZE),
            force_tokens=True,
        ),
    )
    try:
        return collect_logits(model, rows, options.chunk), bench.describe_device(model.device)
    finally:
        close(model)


def noisy_values(info: TensorInfo, error: float, rng: np.random.Generator) -> Iterator[memoryview]:
    """Yields a tensor of bfloat16 with Gaussian noise, `error` times as large as its values."""
    bits = np.memmap(info.path, np.uint16, "r", info.offset, (info.nbytes // 2,))
    pieces = [bits[start : start + PIECE] for start in range(0, len(bits), PIECE)]

    def values_of(piece: NDArray[np.uint16]) -> NDArray[np.float32]:
        return (piece.astype(np.uint32) << 16).view(np.float32)

    squares = sum(float(np.sum(np.square(values_of(piece)))) for piece in pieces)
    size = np.float32(error * np.sqrt(squares / len(bits)))
    for piece in pieces:
        values = values_of(piece) + size * rng.standard_normal(len(piece), dtype=np.float32)
        yield memoryview(((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)).cast("B")


def save_noisy(root: Path, target: Path, reports: Sequence[TensorReport], seed: int) -> None:
    """Copies a plain checkpoint, with noise in the matrices that were quantised."""
    shutil.copytree(root, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    errors = {report.name: report.relative_error for report in reports}
    rng = np.random.default_rng(seed)
    tensors = [
        NewTensor(
            info.name,
            info.dtype,
            info.shape,
            functools.partial(noisy_values, info, errors.get(info.name, 0.0), rng),
        )
        for info in read_checkpoint(root).values()
    ]
    write_checkpoint(target, tensors, lambda _: None)


def measure(root: Path, name: str, rows: Rows, options: argparse.Namespace) -> dict[str, object]:
    """The record of a plain checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        quantised = Path(directory) / "nvfp4"
        reports = quantize_checkpoint(root, quantised)
        plain, device = logits_of(root, rows, options)
        logits, _ = logits_of(quantised, rows, options)
        shutil.rmtree(quantised)
        noisy = Path(directory) / "noisy"
        save_noisy(root, noisy, reports, options.seed)
        noisy_logits, _ = logits_of(noisy, rows, options)
    kl = kl_divergence(plain, logits)
    record: dict[str, object] = {
        "figure": "nvfp4_accuracy",
        "device": device,
        "shape": name,
        "weights": "nvfp4",
        "tokens": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "kl_noise": float(kl_divergence(plain, noisy_logits).mean()),
        "same_top": float((plain.argmax(-1) == logits.argmax(-1)).mean()),
        "relative_error_mean": float(np.mean([report.relative_error for report in reports])),
        "relative_error_max": max(report.relative_error for report in reports),
    }
    if options.shape is None:
        # Each row's logits are for its forced tokens, the last ones for what comes behind them.
        targets = np.concatenate([forced for _, forced in rows])
        ends = np.cumsum([1 + len(forced) for _, forced in rows]) - 1
        for field, values in (("perplexity_plain", plain), ("perplexity", logits)):
            scores = log_softmax(np.delete(values, ends, 0))[np.arange(len(targets)), targets]
            record[field] = perplexity(scores)
    return record


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = argparse.ArgumentParser(description="What NVFP4 weights cost in accuracy.")
    result.add_argument("--shape", choices=shapes.NAMES, help="random weights; default: demo model")
    result.add_argument("--layers", type=int, help="cut the shape to so many layers")
    result.add_argument("--stories", type=int, default=50, help="of the demo model's grammar")
    result.add_argument("--prompts", type=int, default=4, help="of a shape")
    result.add_argument("--context", type=int, default=128, help="tokens of the longest prompt")
    result.add_argument("--outputs", type=int, default=16, help="forced tokens of each prompt")
    result.add_argument("--requests", type=int, default=16, help="that run at once")
    result.add_argument("--chunk", type=int, default=64, help="prompt tokens of a step")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--json", type=Path, help="write the record")
    result.add_argument("--commit", help="what the record names, outside of a checkout")
    return result


def run(options: argparse.Namespace) -> dict[str, object]:
    """Makes the record that the options ask for."""
    if options.shape is None:
        root = shapes.demo_model()
        stories = story_tokens(Tokenizer.from_dir(root), STORY_SEED, options.stories)
        return measure(root, "demo", [(story[:1], story[1:]) for story in stories], options)
    name, values = shapes.shape_config(options.shape, options.layers)
    rng = np.random.default_rng(options.seed)
    vocab = values["vocab_size"]
    assert isinstance(vocab, int)
    lengths = np.linspace(options.context // 2, options.context, options.prompts).astype(int)
    rows = [
        (rng.integers(0, vocab, length).tolist(), rng.integers(0, vocab, options.outputs).tolist())
        for length in lengths
    ]
    with tempfile.TemporaryDirectory() as directory:
        root = save_random_model(Path(directory) / "plain", values, seed=options.seed)
        return measure(root, name, rows, options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the record and writes it."""
    options = parser().parse_args(arguments)
    record = {
        **run(options),
        "seed": options.seed,
        "versions": bench.versions(),
        "commit": options.commit or commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }
    print(json.dumps(record))
    if options.json is not None:
        options.json.write_text(json.dumps([record], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
