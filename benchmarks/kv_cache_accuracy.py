# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What an FP8 KV cache costs in accuracy: three measurements, each with a command.

    python benchmarks/kv_cache_accuracy.py perplexity --device cpu --json perplexity.json
    python benchmarks/kv_cache_accuracy.py logits --shape llama3-8b --device cuda --json logits.json
    python benchmarks/kv_cache_accuracy.py needle --device cuda --json needle.json

perplexity: held-out stories of the demo model's grammar, of which every token is scored: as prompts
in chunks, and one token a step as decoding does. Beside the cache in the activation's dtype.

logits: Kullback-Leibler divergence from the distribution of tokens with a bfloat16 cache to that
with an FP8 one, at forced tokens after random prompts. Weights are random, but in the projection of
keys some channels are 20 to 50 times larger, outliers as trained models are known for, and in that
of queries as much smaller. The line "auto" has a bfloat16 cache too, and other chunks of prompts.

needle: one key among 65,536 random ones has half of the softmax's weight. The error of attention is
against float64, over the keys and values before they were rounded to the cache ("error") and over
those that the cache holds ("kernel_error"), as a share of the root mean square of the output.

Static scales are calibrated: the largest magnitude of a layer's keys, or values, over the largest
number of the format, for each layer (perplexity, on other stories) or head (needle).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mrv1 import _core, bench, memory, ops, shapes
from mrv1.config import ModelConfig
from mrv1.env_report import commit
from mrv1.loader import LoadedModel, RunnerOptions, load_model, wire_model
from mrv1.random_model import RANGE, random_runner
from mrv1.runner import make_row_spec
from mrv1.safetensors_reader import read_checkpoint
from mrv1.sampling_params import SamplingParams
from mrv1.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "demo_model"))
import story_grammar

Floats = NDArray[np.float64]

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = {
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
# Held-out stories start at this seed (scripts/demo_model/evaluate.py), those that calibrate behind.
STORY_SEED = 1_000_000_000
CALIBRATION_SEED = 1_500_000_000
CALIBRATION_STORIES = 50
OUTLIER_FACTORS = (20.0, 50.0)
BLOCK_SIZE = 16
# The smallest scale that a cache has (src/cpp/ops/kv_cache.h).
MIN_SCALE = 2.0**-126


@dataclasses.dataclass(frozen=True)
class Cache:
    """A kind of KV cache: `RunnerOptions.kv_cache_dtype` and what its scales are of."""

    dtype: str
    scale: str  # "none", "static" or "dynamic"


CACHES = (
    Cache("auto", "none"),
    Cache("fp8_e4m3", "static"),
    Cache("fp8_e4m3", "dynamic"),
    Cache("fp8_e5m2", "dynamic"),
)


# --- maths --------------------------------------------------------------------------------------


def log_softmax(logits: NDArray[Any]) -> Floats:
    """Logarithms of the softmax over the last dimension, in float64."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    result: Floats = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return result


def kl_divergence(reference: NDArray[Any], logits: NDArray[Any]) -> Floats:
    """KL(softmax(reference) || softmax(logits)) over the last dimension, in nats."""
    p, q = log_softmax(reference), log_softmax(logits)
    result: Floats = (np.exp(p) * (p - q)).sum(-1)
    return result


def perplexity(log_probs: NDArray[Any]) -> float:
    """exp of the mean negative logarithm of the tokens' probabilities."""
    return math.exp(-float(np.mean(log_probs)))


def attention(q: Floats, keys: Floats, values: Floats) -> Floats:
    """Attention of one token to all keys: q [H, D], keys and values [T, K, D]; [H, D]."""
    group = q.shape[0] // keys.shape[1]
    keys, values = keys.repeat(group, 1), values.repeat(group, 1)
    scores = np.einsum("hd,thd->ht", q, keys) / math.sqrt(q.shape[1])
    weights = np.exp(log_softmax(scores))
    return np.einsum("ht,thd->hd", weights, values)


def relative_error(actual: Floats, expected: Floats) -> float:
    """Root mean square of the difference, over that of what is expected."""
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


def needle_key(q: Floats, keys: Floats, weight: float) -> Floats:
    """The key along q [D] that gets `weight` of the softmax beside keys [T, D]."""
    dim = q.shape[0]
    scores = keys @ q / math.sqrt(dim)
    largest = scores.max()
    others = largest + math.log(np.exp(scores - largest).sum())
    score = others + math.log(weight / (1.0 - weight))
    result: Floats = q * (score * math.sqrt(dim) / (q @ q))
    return result


def static_scale(values: NDArray[Any], dtype: str, axis: tuple[int, ...] | None = None) -> Any:
    """The largest magnitude over the largest number of an FP8 format, float32."""
    largest = float(ml_dtypes.finfo(FP8[dtype]).max)
    magnitude = np.abs(values.astype(np.float32)).max(axis=axis)
    return np.maximum(magnitude / np.float32(largest), np.float32(MIN_SCALE)).astype(np.float32)


# --- needle -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Needle:
    """One decode token and its context, all rounded to bfloat16."""

    q: NDArray[Any]  # [1, H, D]
    keys: NDArray[Any]  # [T, K, D]
    values: NDArray[Any]


def make_needle(
    context: int, heads: int, kv_heads: int, head_dim: int, outliers: int, seed: int
) -> Needle:
    """Random keys and values, and for each key/value head a needle that its first head looks for.

    Args:
        context: Keys.
        heads: Of the queries.
        kv_heads: Of keys and values.
        head_dim: Of both.
        outliers: Channels of each key/value head whose keys are 20 to 50 times larger, and the
            queries as much smaller, so that scores are what they were.
        seed: Of everything.
    """
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((heads, head_dim))
    keys = rng.standard_normal((context, kv_heads, head_dim))
    values = rng.standard_normal((context, kv_heads, head_dim))
    for head in range(kv_heads):
        first = head * (heads // kv_heads)
        keys[rng.integers(context), head] = needle_key(q[first], keys[:, head], 0.5)
        for channel in rng.choice(head_dim, outliers, replace=False):
            factor = rng.uniform(*OUTLIER_FACTORS)
            keys[:, head, channel] *= factor
            q[first : first + heads // kv_heads, channel] /= factor
    return Needle(q[None].astype(BF16), keys.astype(BF16), values.astype(BF16))


class OpDevice:
    """Takes arrays to where ops run, and results back."""

    def __init__(self, name: str) -> None:
        """Opens "cpu" or "cuda"."""
        self.native = _core.Device(name)
        self.on_cpu = name == "cpu"
        # Options of calls that `wait` waits for.
        self.stream: dict[str, Any] = {} if self.on_cpu else {"stream": self.native.stream}
        self._pinned: list[memory.PinnedArray] = []

    def put(self, array: NDArray[Any]) -> Any:
        """The array for ops to read and write: itself on the CPU, else pinned memory."""
        if self.on_cpu:
            return array
        pinned = memory.pinned(array.shape, array.dtype, self.native)
        pinned.numpy()[...] = array
        self._pinned.append(pinned)
        return pinned.device()

    def zeros(self, shape: Sequence[int], dtype: Any) -> tuple[Any, NDArray[Any]]:
        """An array for ops, and the same memory for the host, to be read after `wait`."""
        if self.on_cpu:
            array = np.zeros(shape, dtype)
            return array, array
        pinned = memory.pinned(tuple(shape), dtype, self.native)
        pinned.numpy()[...] = 0
        self._pinned.append(pinned)
        return pinned.device(), pinned.numpy()

    def wait(self) -> None:
        """Until all that was launched has ended."""
        self.native.synchronize()

    def close(self) -> None:
        """Frees what was put there."""
        for pinned in self._pinned:
            pinned.close()
        self.native.close()


def measure_needle(device: OpDevice, needle: Needle, cache: Cache) -> tuple[float, float]:
    """Error of attention over a cache, against what was written to it and against what it holds."""
    context, kv_heads, head_dim = needle.keys.shape
    blocks = -(-context // BLOCK_SIZE)
    shape = (blocks, BLOCK_SIZE, kv_heads, head_dim)
    fp8 = FP8.get(cache.dtype)
    # FP8 travels as bytes.
    stored = np.dtype(np.uint8) if fp8 is not None else BF16
    sides = [device.zeros(shape, stored) for _ in range(2)]
    scales: list[tuple[Any, NDArray[Any]]] = []
    if cache.scale == "dynamic":
        scales = [device.zeros(shape[:3], np.float32) for _ in range(2)]
    elif cache.scale == "static":
        for source in (needle.keys, needle.values):
            scale = static_scale(source, cache.dtype, axis=(0, 2))
            scales.append((device.put(scale), scale))
    options: dict[str, Any] = {"kv_cache_dtype": cache.dtype, **device.stream}
    if scales:
        options.update(k_scale=scales[0][0], v_scale=scales[1][0])
    slots = device.put(np.arange(context, dtype=np.int32))
    key, value = device.put(needle.keys), device.put(needle.values)
    ops.reshape_and_cache_flash(key, value, sides[0][0], sides[1][0], slots, **options)
    out, result = device.zeros(needle.q.shape, BF16)
    table = device.put(np.arange(blocks, dtype=np.int32)[None])
    lens = device.put(np.array([context], np.int32))
    starts = device.put(np.array([0, 1], np.int32))
    ops.paged_attention(
        device.put(needle.q), sides[0][0], sides[1][0], table, lens, starts, out=out, **options
    )
    device.wait()
    actual = result[0].astype(np.float64)
    held = []
    for side, (_, array) in enumerate(sides):
        codes = array if fp8 is None else array.view(fp8)
        wide = codes.reshape(-1, kv_heads, head_dim)[:context].astype(np.float64)
        if scales:
            scale = scales[side][1]
            if cache.scale == "dynamic":
                scale = scale.reshape(-1, kv_heads)[:context]
            wide *= scale[..., None].astype(np.float64)
        held.append(wide)
    q = needle.q[0].astype(np.float64)
    wanted = attention(q, needle.keys.astype(np.float64), needle.values.astype(np.float64))
    return relative_error(actual, wanted), relative_error(actual, attention(q, *held))


def run_needle(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Records of the figure `needle`."""
    heads, kv_heads, head_dim = options.heads
    for outliers in (0, options.outliers):
        needle = make_needle(options.context, heads, kv_heads, head_dim, outliers, options.seed)
        for cache in CACHES:
            device = OpDevice(options.device)
            try:
                error, kernel_error = measure_needle(device, needle, cache)
                yield {
                    "metric": "needle",
                    "device": bench.describe_device(device.native),
                    "heads": heads,
                    "kv_heads": kv_heads,
                    "head_dim": head_dim,
                    "context": options.context,
                    "outlier_channels": outliers,
                    "kv_cache_dtype": cache.dtype,
                    "scale": cache.scale,
                    "error": error,
                    "kernel_error": kernel_error,
                }
            finally:
                device.close()


# --- models -------------------------------------------------------------------------------------


def run_rows(
    model: LoadedModel,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    chunk: int,
    visit: Callable[[int, int], None],
) -> None:
    """Runs token sequences, as many at a time as the runner has rows.

    Args:
        model: With `force_tokens`.
        rows: A prompt each, and the tokens that take the place of those drawn after it.
        chunk: Prompt tokens of a row that a step computes.
        visit: Called with (row, its place in the step that has just run) for each row and step.
    """
    runner = model.runner
    per_row = (model.num_kv_blocks - 1) // model.max_num_seqs
    for first in range(0, len(rows), model.max_num_seqs):
        steps: dict[int, list[int]] = {}  # tokens of each step to come, by row
        handles = {}
        for place, (prompt, forced) in enumerate(rows[first : first + model.max_num_seqs]):
            params = SamplingParams(temperature=0.0, max_tokens=len(forced) + 1, ignore_eos=True)
            spec = make_row_spec(
                prompt,
                params,
                eos_token_ids=(),
                block_ids=range(1 + place * per_row, 1 + (place + 1) * per_row),
                forced_token_ids=forced,
            )
            handles[first + place] = runner.add_row(spec)[0]
            chunks = [min(chunk, len(prompt) - at) for at in range(0, len(prompt), chunk)]
            steps[first + place] = chunks + [1] * len(forced)
        while steps:
            batch = list(steps)
            result = runner.result(runner.execute([(handles[i], steps[i].pop(0)) for i in batch]))
            if result.error:
                raise SystemExit(result.error)
            for place, row in enumerate(batch):
                visit(row, place)
                if not steps[row]:
                    del steps[row]
        for handle in handles.values():
            runner.free_row(handle)


def read_tensor(root: Path, *names: str) -> NDArray[np.float32]:
    """The first of these tensors that a checkpoint has in bfloat16, as float32."""
    tensors = read_checkpoint(root)
    info = next(tensors[name] for name in names if name in tensors)
    raw = np.fromfile(info.path, BF16, math.prod(info.shape), offset=info.offset)
    return raw.reshape(info.shape).astype(np.float32)


def close(model: LoadedModel) -> None:
    """Frees a model."""
    model.runner.close()
    model.device.close()


# --- perplexity ---------------------------------------------------------------------------------


def story_tokens(tokenizer: Tokenizer, first_seed: int, count: int) -> list[list[int]]:
    """Stories of the demo model's grammar, each between two end-of-text tokens, as in training."""
    (end,) = tokenizer.encode("<|endoftext|>")
    stories = [story_grammar.generate(random.Random(first_seed + i)) for i in range(count)]
    return [[end, *tokenizer.encode(story.text), end] for story in stories]


def score_stories(
    model: LoadedModel, head: NDArray[np.float32], stories: Sequence[list[int]], chunk: int
) -> Floats:
    """Log probability of every token but the first of each story; chunk 0 is a token a step."""
    if chunk > 0:
        rows = [(story[:-1], story[:0]) for story in stories]
    else:
        rows = [(story[:1], story[1:-1]) for story in stories]
    scores: list[list[float]] = [[] for _ in stories]

    def visit(row: int, place: int) -> None:
        logits = model.runner.hidden_states(place) @ head.T
        done = scores[row]
        targets = stories[row][1 + len(done) :][: len(logits)]
        done += log_softmax(logits)[np.arange(len(targets)), targets].tolist()

    run_rows(model, rows, chunk or 1, visit)
    return np.concatenate([np.array(of_story) for of_story in scores])


def calibrate(root: Path, stories: Sequence[list[int]]) -> list[tuple[float, float]]:
    """Static scales for E4M3 of each layer's keys and values, from what these stories give."""
    config = ModelConfig.from_dir(root)
    program = wire_model(config, "float32", max_model_len=config.max_position_embeddings)
    lengths = [len(story) for story in stories]
    total, blocks = sum(lengths), -(-max(lengths) // BLOCK_SIZE)
    device = _core.Device("cpu")
    session = _core.ProgramSession(
        device,
        program,
        max_requests=len(stories),
        max_tokens=total,
        num_blocks=1 + blocks * len(stories),
        block_size=BLOCK_SIZE,
        max_blocks=blocks,
        max_position=max(lengths),
    )
    for weight, (_, _, _, segments) in enumerate(program.weights):
        values = [read_tensor(root, name).ravel() for name, _ in segments]
        session.load_weight(weight, np.concatenate(values))
    positions = np.concatenate([np.arange(length) for length in lengths])
    request = np.repeat(np.arange(len(stories)), lengths)
    ints = {
        "counts": [len(stories), total, 1, 0, 0, len(stories)],
        "row": range(len(stories)),
        "query_start_loc": np.cumsum([0, *lengths]),
        "seq_lens": lengths,
        "token_batch": request,
        "token_ids": np.concatenate(stories),
        "positions": positions,
        "slot_mapping": BLOCK_SIZE * (1 + blocks * request) + positions,
        "logits_indices": [0],
        "logits_batch": [0],
        "block_table": 1 + np.arange(blocks * len(stories)),
    }
    for name, array in ints.items():
        session.set_ints(name, np.asarray(array, np.int32))
    session.run(len(stories), total, 1)
    scales = [
        (
            float(static_scale(session.cache(layer, False), "fp8_e4m3")),
            float(static_scale(session.cache(layer, True), "fp8_e4m3")),
        )
        for layer in range(config.num_hidden_layers)
    ]
    session.close()
    device.close()
    return scales


def with_scales(root: Path, scales: Sequence[tuple[float, float]], to: Path) -> Path:
    """Writes a copy of a model directory whose checkpoint has scales of the KV cache."""
    for file in root.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, to)
    raw = (root / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    for layer, pair in enumerate(scales):
        for side, scale in zip("kv", pair, strict=True):
            name = f"model.layers.{layer}.self_attn.{side}_scale"
            span = [len(data), len(data) + 4]
            header[name] = {"dtype": "F32", "shape": [1], "data_offsets": span}
            data += np.float32(scale).tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (to / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return to


def run_perplexity(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Records of the metric `perplexity`."""
    root = shapes.demo_model()
    tokenizer = Tokenizer.from_dir(root)
    stories = story_tokens(tokenizer, STORY_SEED, options.stories)
    head = read_tensor(root, "lm_head.weight", "model.embed_tokens.weight")
    scales = calibrate(root, story_tokens(tokenizer, CALIBRATION_SEED, CALIBRATION_STORIES))
    longest = max(map(len, stories))
    expected: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        calibrated = with_scales(root, scales, Path(directory))
        for cache in CACHES:
            model = load_model(
                calibrated if cache.scale == "static" else root,
                RunnerOptions(
                    device=options.device,
                    dtype=options.dtype,
                    kv_cache_dtype=cache.dtype,
                    max_num_seqs=options.requests,
                    max_num_batched_tokens=options.requests * options.chunk,
                    max_model_len=longest,
                    num_kv_blocks=1 + options.requests * -(-longest // BLOCK_SIZE),
                    keep_hidden_states=True,
                    force_tokens=True,
                ),
            )
            try:
                for chunk in (options.chunk, 0):
                    result = perplexity(score_stories(model, head, stories, chunk))
                    expected.setdefault(chunk, result)
                    yield {
                        "metric": "perplexity",
                        "device": bench.describe_device(model.device),
                        "dtype": model.dtype,
                        "stories": options.stories,
                        "tokens": sum(map(len, stories)) - len(stories),
                        "chunk": chunk or 1,
                        "phase": "prefill" if chunk else "decode",
                        "kv_cache_dtype": cache.dtype,
                        "scale": cache.scale,
                        "perplexity": result,
                        "times_auto": result / expected[chunk],
                    }
            finally:
                close(model)


# --- logits -------------------------------------------------------------------------------------


def outlier_keys(model: LoadedModel, outliers: int, seed: int) -> None:
    """Draws the projections of queries and keys anew, with outliers among the channels of keys.

    In each key head some channels are 20 to 50 times larger, and in the queries that meet it as
    much smaller, so that scores are what they were. The two channels that RoPE turns together,
    half a head apart, have one factor.
    """
    rng = np.random.default_rng(seed)
    config = model.config
    half, heads = config.head_dim // 2, config.num_key_value_heads
    factors = np.ones((heads, 2, half), np.float32)
    for head in factors:
        chosen = rng.choice(half, outliers // 2, replace=False)
        head[:, chosen] = rng.uniform(*OUTLIER_FACTORS, len(chosen))
    group = config.num_attention_heads // heads
    by_name: dict[str, NDArray[np.float32]] = {
        "k_proj.weight": factors.reshape(-1, 1),
        "q_proj.weight": np.reciprocal(np.repeat(factors, group, axis=0)).reshape(-1, 1),
    }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "keys"
        tensors = []
        with path.open("wb") as file:
            for weight, (_, _, cols, segments) in enumerate(model.runner.program.weights):
                for segment, (name, rows) in enumerate(segments):
                    scale = by_name.get(".".join(name.split(".")[-2:]))
                    if scale is None:
                        continue
                    matrix = rng.uniform(-RANGE, RANGE, (rows, cols)).astype(np.float32)
                    tensors.append((weight, segment, file.tell(), "bfloat16"))
                    file.write((matrix * scale).astype(BF16).tobytes())
        if not tensors:
            raise SystemExit("the model has no k_proj.weight and q_proj.weight")
        model.runner.load_tensors(_core.MappedFile(str(path)), [tensors], lambda _: None)
        model.device.synchronize()


def collect_logits(
    model: LoadedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], chunk: int
) -> NDArray[np.float32]:
    """Logits after each prompt and each of its forced tokens but the last, in order of rows."""
    found: list[list[NDArray[np.float32]]] = [[] for _ in rows]

    def visit(row: int, place: int) -> None:
        logits = model.runner.logits(place)
        if logits.size > 0:
            found[row].append(logits)

    run_rows(model, rows, chunk, visit)
    return np.stack([logits for of_row in found for logits in of_row])


def run_logits(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Records of the metric `logits_kl`."""
    name, values = shapes.shape_config(options.shape, options.layers)
    yield from measure_logits(ModelConfig.from_values(values), name, options)


def measure_logits(
    config: ModelConfig, name: str, options: argparse.Namespace
) -> Iterator[dict[str, object]]:
    """The same for a model that is not a named shape."""
    rng = np.random.default_rng(options.seed)
    lengths = np.linspace(options.context // 2, options.context, options.prompts).astype(int)
    rows = [
        (
            rng.integers(0, config.vocab_size, length).tolist(),
            rng.integers(0, config.vocab_size, options.outputs).tolist(),
        )
        for length in lengths
    ]
    longest = options.context + options.outputs + 1
    reference: NDArray[np.float32] | None = None
    # The first is the reference; the second differs from it in the order of sums alone.
    for chunk, cache in [(options.chunk, CACHES[0]), *((options.chunk // 2, c) for c in CACHES)]:
        if cache.scale == "static":
            continue  # random weights have none
        model = random_runner(
            config,
            RunnerOptions(
                device=options.device,
                dtype="bfloat16",
                kv_cache_dtype=cache.dtype,
                max_num_seqs=options.prompts,
                max_num_batched_tokens=options.prompts * options.chunk,
                max_model_len=longest,
                num_kv_blocks=1 + options.prompts * -(-longest // BLOCK_SIZE),
                force_tokens=True,
            ),
        )
        try:
            outlier_keys(model, options.outliers, options.seed)
            logits = collect_logits(model, rows, chunk)
            device = bench.describe_device(model.device)
        finally:
            close(model)
        if reference is None:
            reference = logits
            continue
        kl = kl_divergence(reference, logits)
        yield {
            "metric": "logits_kl",
            "device": device,
            "shape": name,
            "context": options.context,
            "outlier_channels": options.outliers,
            "tokens": len(kl),
            "kv_cache_dtype": cache.dtype,
            "scale": cache.scale,
            "kl_mean": float(kl.mean()),
            "kl_max": float(kl.max()),
            "same_top": float((logits.argmax(-1) == reference.argmax(-1)).mean()),
        }


# --- command line -------------------------------------------------------------------------------


def head_counts(text: str) -> tuple[int, int, int]:
    """Parses "query heads, key/value heads, head_dim"."""
    heads, kv_heads, head_dim = (int(part) for part in text.split(","))
    if heads % kv_heads != 0:
        raise argparse.ArgumentTypeError("query heads must be a multiple of key/value heads")
    return heads, kv_heads, head_dim


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = argparse.ArgumentParser(description="What an FP8 KV cache costs in accuracy.")
    commands = result.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[..., object], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text)
        made.set_defaults(run=run)
        made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        made.add_argument("--seed", type=int, default=0)
        made.add_argument("--json", type=Path, help="write the records")
        made.add_argument("--commit", help="what the records name, outside of a checkout")
        return made

    of_stories = command("perplexity", run_perplexity, "of the demo model on held-out stories")
    of_stories.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    of_stories.add_argument("--stories", type=int, default=500)
    of_stories.add_argument("--requests", type=int, default=32, help="stories at a time")
    of_stories.add_argument("--chunk", type=int, default=64, help="tokens of a prompt in a step")

    of_logits = command("logits", run_logits, "divergence of tokens' distributions")
    of_logits.add_argument("--shape", choices=shapes.NAMES, default="llama3-8b")
    of_logits.add_argument("--layers", type=int, help="cut the shape to so many layers")
    of_logits.add_argument("--context", type=int, default=2048, help="tokens of the longest prompt")
    of_logits.add_argument("--prompts", type=int, default=8)
    of_logits.add_argument("--outputs", type=int, default=16, help="forced tokens of each prompt")
    of_logits.add_argument("--chunk", type=int, default=1024, help="tokens of a prompt in a step")
    of_logits.add_argument("--outliers", type=int, default=4, help="channels of each head's keys")

    of_needle = command("needle", run_needle, "attention's error around one key that matters")
    of_needle.add_argument("--context", type=int, default=65536)
    of_needle.add_argument(
        "--heads", type=head_counts, default=(8, 2, 128), help="queries, keys, head_dim (8,2,128)"
    )
    of_needle.add_argument("--outliers", type=int, default=4, help="channels of each head's keys")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the records and writes them."""
    options = parser().parse_args(arguments)
    records = []
    for values in options.run(options):
        record = {
            "figure": "kv_accuracy",
            **values,
            "seed": options.seed,
            "versions": bench.versions(),
            "commit": options.commit or commit(),
            "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        }
        print(json.dumps(record), flush=True)
        records.append(record)
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
