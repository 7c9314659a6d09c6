# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: records, what the machine can do, and floors.

docs/benchmarks.md describes the records for their readers.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TypedDict

import numpy as np

from mrv1 import _core
from mrv1._version import __version__
from mrv1.config import ModelConfig
from mrv1.env_report import commit, cpu_model, package_version
from mrv1.errors import InvalidArgumentError
from mrv1.models.experts import ExpertsConfig
from mrv1.quantization import NVFP4_BLOCK

Figure = Literal[
    "decode",
    "prefill",
    "mix",
    "op",
    "profile",
    "kv_write",
    "decode_attention",
    "all_reduce",
    "stage_send",
    "expert_exchange",
    "sampler",
]

# Bytes that the plain read covers, unless less memory is free.
READ_BYTES: Final = {"cpu": 1 << 30, "cuda": 8 << 30}
_READS: Final = 10
# The matrix product that measures the arithmetic rate: tokens, and rows and columns of the weight.
_PRODUCT: Final = {"cpu": (256, 4096), "cuda": (8192, 8192)}
_PRODUCTS: Final = 5
# A report in whose run the device read slower, or less than 8 GB, does not count: something else
# used the machine, or it is throttled. By a part of the device's name, in 10^9 bytes a second.
_LEAST_READ: Final = {"H200": 4200.0}
_LEAST_READ_BYTES: Final = 8 * 10**9


class _RequiredKeys(TypedDict):
    figure: Figure
    shape: str
    device: str
    batch: int
    context: int
    kv_cache_dtype: str
    step_ms: float
    floor_ms: float | None
    host_us: float | None
    tokens_per_s: float
    read_gb_s: float | None
    peak_memory_mb: float | None
    versions: str
    commit: str | None
    date: str


class Record(_RequiredKeys, total=False):
    """One measurement, flat, as it stands in the JSON files of benchmarks/results."""

    dtype: str
    peer: str
    op: str
    lengths: str
    backend: str
    scale: str
    weights: str
    kernels: int
    blocks: int
    tokens: int
    tp: int
    pp: int
    ep: int
    tbo: int
    graph_mode: str
    stage_waits: str
    experts: float
    message_bytes: int
    heads: int
    kv_heads: int
    head_dim: int
    layout: str
    cache_dtype: str
    us: float
    gb_s: float
    copy_gb_s: float
    launches: str
    separate_us: float
    flashinfer_us: float
    torch_us: float
    floor_us: float
    case: str
    vocab: int
    x_separate_bytes: float
    read_share: float | None
    gflops: float | None
    x_floor: float | None
    idle_share: float | None
    counts: bool
    fault: str
    peer_name: str
    peer_step_ms: float
    peer_tokens_per_s: float
    times_peer: float


REQUIRED_KEYS: Final = frozenset(Record.__required_keys__)
OPTIONAL_KEYS: Final = frozenset(Record.__optional_keys__)


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a benchmark measured, before it is set against the machine.

    Attributes:
        batch: Requests of a step.
        context: Tokens that each had in the cache.
        step_ms: Median time of a step.
        host_us: Host time of a step, or None where it was not measured.
        peak_memory_mb: Highest resident memory of the process so far, in 10^6 bytes.
        tokens: Of a step, for the rate; None is one a request.
        idle_share: Share of the time in which the device ran no step, or None where it was not
            measured.
        graph_mode: How most of the steps reached the device: "eager", "piecewise" or "full".
        stage_waits: Of each stage of a pipeline the share of the time in which it waited for
            others; empty where there is one.
        in_halves: Whether most of the steps ran as two halves.
    """

    batch: int
    context: int
    step_ms: float
    host_us: float | None
    peak_memory_mb: float
    tokens: float | None = None
    idle_share: float | None = None
    graph_mode: str | None = None
    stage_waits: Sequence[float] = ()
    in_halves: bool = False


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the machine can do, measured in the same run as what is compared with it.

    Attributes:
        read_gb_s: Plain read of a buffer larger than the caches, in 10^9 bytes a second.
        gflops: A large matrix product through the linear kernel, in 10^9 operations a second.
        counts: Whether the read shows the device at its usual speed; None where none is known.
    """

    read_gb_s: float
    gflops: float
    counts: bool | None = None


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """How fast the machine moves bytes, measured in the same run as what is compared with it.

    Attributes:
        read_gb_s: Plain read of a buffer larger than the caches, in 10^9 bytes a second.
        copy_gb_s: Copy of one half of it to the other, bytes read and bytes written.
        counts: As of `Rates`.
    """

    read_gb_s: float
    copy_gb_s: float
    counts: bool | None = None


@dataclasses.dataclass(frozen=True)
class OpCost:
    """What one op of a step must at least do.

    Attributes:
        name: Of its weight, or what it is.
        read_bytes: Weights, cache and table rows, each read once. Activations stay in cache.
        operations: Multiplications and additions.
        experts: Of how many experts of a layer weights are read; None of other ops.
    """

    name: str
    read_bytes: int
    operations: int
    experts: float | None = None


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """What a KV cache holds, as `LoadedModel` says it.

    Attributes:
        kv_cache_dtype: "auto", "fp8_e4m3" or "fp8_e5m2".
        kv_scales: "none", "static" or "dynamic".
    """

    kv_cache_dtype: str = "auto"
    kv_scales: str = "none"

    def head_bytes(self, head_dim: int, dtype: str) -> int:
        """Bytes of a key (or value) head of a token, its scale included, in a model of `dtype`."""
        if self.kv_cache_dtype == "auto":
            return head_dim * element_size(dtype)
        return head_dim + (4 if self.kv_scales == "dynamic" else 0)


AUTO_CACHE: Final = CacheFormat()


def main_mode(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """How most steps reached the device between two `_core.ModelRunner.stats()`."""
    modes = ("eager", "piecewise", "full")
    return max(modes, key=lambda mode: after[f"steps_{mode}"] - before[f"steps_{mode}"])


def ran_in_halves(before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """Whether most of the steps between two such counts ran as two halves."""
    name = "steps_in_halves"
    return 2 * (after[name] - before[name]) > after["batches"] - before["batches"]


def row_blocks(runner: _core.ModelRunner, index: int, count: int) -> list[list[int]]:
    """The block table of one of many rows of `count` blocks each, as `RowSpec.block_ids` has it.

    Raises:
        InvalidArgumentError: The model's layers have different windows: rows then need blocks of
            several KV groups, which only `mix` gives them.
    """
    if len(runner.kv_windows) > 1:
        raise InvalidArgumentError(
            "layers of this model see different windows",
            field="figure",
            allowed="mix or op for such a model",
        )
    return [list(range(1 + index * count, 1 + (index + 1) * count))]


def measure_rates(device: _core.Device, dtype: str, read_bytes: int | None = None) -> Rates:
    """Measures read bandwidth (best of 10) and arithmetic rate (best of 5) of a device.

    Args:
        device: Idle.
        dtype: Of the product.
        read_bytes: What is read, at most half of the free memory; None takes `READ_BYTES`.
    """
    rate, probe_bytes = _best_rate(device, read_bytes, _core.ReadProbe.run)
    return Rates(rate, _measure_gflops(device, dtype), read_counts(device.name, rate, probe_bytes))


def measure_bandwidth(device: _core.Device, read_bytes: int | None = None) -> Bandwidth:
    """Measures how fast a device reads and copies, best of 10 each.

    Args:
        device: Idle.
        read_bytes: As of `measure_rates`.
    """
    read, probe_bytes = _best_rate(device, read_bytes, _core.ReadProbe.run)
    copy, _ = _best_rate(device, read_bytes, _core.ReadProbe.copy)
    return Bandwidth(read, copy, read_counts(device.name, read, probe_bytes))


def _best_rate(
    device: _core.Device, read_bytes: int | None, move: Callable[[_core.ReadProbe], float]
) -> tuple[float, int]:
    """The best rate of moving a buffer once, in 10^9 bytes a second, and the buffer's bytes."""
    free, _ = device.memory()
    wanted = READ_BYTES[device.kind] if read_bytes is None else read_bytes
    probe = _core.ReadProbe(device, min(wanted, free // 2))
    try:
        return probe.bytes / min(move(probe) for _ in range(_READS)) / 1e9, probe.bytes
    finally:
        probe.close()


def read_counts(device_name: str, read_gb_s: float, read_bytes: int) -> bool | None:
    """Whether a plain read shows a device at its usual speed; None for a device not known."""
    for part, least in _LEAST_READ.items():
        if part in device_name:
            return read_gb_s >= least and read_bytes >= _LEAST_READ_BYTES
    return None


def _measure_gflops(device: _core.Device, dtype: str) -> float:
    tokens, size = _PRODUCT[device.kind]
    program = _core.Program(dtype)
    x = program.input("x", size)
    weight = program.weight("weight", False, size, [("weight", size)])
    program.output(program.linear(x, weight))
    session = _core.ProgramSession(device, program, max_tokens=tokens)
    try:
        rng = np.random.default_rng(0)
        session.load_weight(weight, rng.standard_normal((size, size), dtype=np.float32))
        session.set_value(x, rng.standard_normal((tokens, size), dtype=np.float32))
        seconds = session.time_runs(1, tokens, repeats=_PRODUCTS)
    finally:
        session.close()
    return 2.0 * tokens * size * size / min(seconds) / 1e9


def distinct_experts(num_experts: int, top_k: int, tokens: float) -> float:
    """Experts that are chosen by some of `tokens` tokens, which choose top_k each at random.

    The expected number. Each expert is missed by a token with probability 1 - top_k / num_experts.
    """
    return num_experts * (1.0 - math.pow(1.0 - top_k / num_experts, tokens))


def decode_costs(
    config: ModelConfig,
    dtype: str,
    batch: int,
    context: float,
    cache: CacheFormat = AUTO_CACHE,
    micro_batches: int = 1,
) -> list[OpCost]:
    """What the ops of a decode step must do at least.

    Of a layer's experts those are read that some token goes through: as many as are to be expected
    where tokens choose at random (`distinct_experts`), as they do with random weights.

    Args:
        config: The model's.
        dtype: The one it runs in, "float32" or "bfloat16".
        batch: Requests, one token each.
        context: Tokens that each attends to.
        cache: What the KV cache holds.
        micro_batches: That the requests are spread over; fewer experts are read for each.
    """
    attention = attention_cost(config, dtype, batch, context, cache)
    return _step_costs(config, dtype, batch, batch, attention, [batch / micro_batches])


def prefill_costs(
    config: ModelConfig, dtype: str, batch: int, context: int, cache: CacheFormat = AUTO_CACHE
) -> list[OpCost]:
    """What the prefill of whole prompts must do at least, as if it were one step.

    Args:
        config: The model's.
        dtype: The one it runs in, "float32" or "bfloat16".
        batch: Prompts. Logits are those of the last token of each.
        context: Tokens of each. Token i attends to i + 1 of them.
        cache: What the KV cache holds.
    """
    every = attention_cost(config, dtype, batch, context, cache)
    causal = dataclasses.replace(every, operations=every.operations * (context + 1) // 2)
    tokens = batch * context
    return _step_costs(config, dtype, tokens, batch, causal, [tokens])


def mix_costs(
    config: ModelConfig,
    dtype: str,
    requests: Iterable[tuple[int, int]],
    cache: CacheFormat = AUTO_CACHE,
) -> list[OpCost]:
    """What a workload must do at least, in whichever steps.

    Weights are read once for each token of the longest output, since no step draws two tokens of a
    request, and of experts those for the requests that have as many; a prompt's keys and values are
    read once, and for each further token those before it.

    Args:
        config: The model's.
        dtype: The one it runs in, "float32" or "bfloat16".
        requests: Tokens of the prompt and of the output of each.
        cache: What the KV cache holds.
    """
    pairs = list(requests)
    steps = max(output for _, output in pairs)
    draws = sum(output for _, output in pairs)
    # The last token of an output is drawn, but never computed.
    tokens = sum(prompt + output - 1 for prompt, output in pairs)
    read = attended = 0
    for prompt, output in pairs:
        total = prompt + output - 1
        read += prompt + (total * (total + 1) - prompt * (prompt + 1)) // 2
        attended += total * (total + 1) // 2
    attention = dataclasses.replace(
        attention_cost(config, dtype, 1, read, cache),
        operations=attention_cost(config, dtype, 1, attended, cache).operations,
    )
    # Tokens of each step, if all begin together.
    together = [sum(output > step for _, output in pairs) for step in range(steps)]
    together[0] += sum(prompt - 1 for prompt, _ in pairs)
    return [
        cost
        if cost.name in ("embedding", "attention")
        else dataclasses.replace(cost, read_bytes=cost.read_bytes * steps)
        for cost in _step_costs(config, dtype, tokens, draws, attention, together)
    ]


def element_size(dtype: str) -> int:
    """Bytes of an activation, "float32" or "bfloat16"."""
    return 4 if dtype == "float32" else 2


def _step_costs(
    config: ModelConfig,
    dtype: str,
    tokens: int,
    draws: int,
    attention: OpCost,
    steps: Sequence[float],
) -> list[OpCost]:
    """Steps of `tokens` tokens with logits for `draws` of them, and one layer's attention.

    `steps` has the tokens of each, for the experts that a step reads on average.
    """
    from mrv1.loader import wire_model

    size = element_size(dtype)
    costs = []
    program = wire_model(config, dtype)
    for index, ((name, is_vector, cols, segments), nbytes) in enumerate(
        zip(program.weights, program.weight_bytes, strict=True)
    ):
        rows = sum(count for _, count in segments)
        if program.is_expert_weight(index):
            assert isinstance(config, ExpertsConfig)
            costs.append(experts_cost(config, rows * cols, nbytes, tokens, steps))
        elif is_vector:
            costs.append(OpCost(name, nbytes, 0))
        elif "embed_tokens" in name:
            costs.append(OpCost("embedding", tokens * cols * size, 0))
            if config.tie_word_embeddings:
                costs.append(linear_cost("logits", rows * cols, nbytes, draws))
        elif name == "lm_head.weight":
            costs.append(linear_cost("logits", rows * cols, nbytes, draws))
        else:
            costs.append(linear_cost(name, rows * cols, nbytes, tokens))
    return costs + [attention] * config.num_hidden_layers


def experts_cost(
    config: ExpertsConfig, elements: int, nbytes: int, tokens: int, steps: Sequence[float]
) -> OpCost:
    """Products of `tokens` tokens with top_k each of the experts of a stacked weight.

    `steps` has the tokens of each step, of which the average counts.
    """
    count, top_k = config.num_experts, config.num_experts_per_tok
    read = statistics.fmean(distinct_experts(count, top_k, step) for step in steps)
    operations = 2 * tokens * top_k * (elements // count)
    return OpCost("moe_experts", round(read * nbytes / count), operations, read)


def linear_cost(name: str, elements: int, nbytes: int, batch: int) -> OpCost:
    """A product of `batch` rows with a weight of so many elements and bytes."""
    return OpCost(name, nbytes, 2 * batch * elements)


def matrix_bytes(rows: int, cols: int, dtype: str, is_nvfp4: bool) -> int:
    """Bytes of a matrix: of elements of the dtype, or of codes, block scales and row scales."""
    if is_nvfp4:
        return rows * cols // 2 + rows * cols // NVFP4_BLOCK + rows * 4
    return rows * cols * element_size(dtype)


def weights_name(config: ModelConfig, dtype: str) -> str | None:
    """How linear layers are stored: "bf16", "nvfp4", or None in float32."""
    if config.quantization is not None:
        return "nvfp4"
    return "bf16" if dtype == "bfloat16" else None


def attention_cost(
    config: ModelConfig, dtype: str, batch: int, context: float, cache: CacheFormat = AUTO_CACHE
) -> OpCost:
    """One layer's attention of `batch` tokens over `context` cached ones each."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cached = int(batch * context)
    read_bytes = cached * 2 * kv_heads * cache.head_bytes(dim, dtype)
    return OpCost("attention", read_bytes, cached * 4 * heads * dim)


def shared_costs(
    costs: Iterable[OpCost],
    ranks: int,
    micro_batches: int,
    once: bool = False,
    data_ranks: int = 1,
) -> list[OpCost]:
    """What each of a model's ranks must do of a step, on average.

    Ranks of a stage share all of it. Of `micro_batches` that are on their way through as many
    stages, each stage computes each in turn, with a part of the layers: so it has its part of all
    arithmetic and of what belongs to requests, but reads its weights for each micro-batch, which
    comes to as much as the whole model's once. Ranks with requests of their own share the requests
    and the experts out, and read all other weights each.

    Args:
        costs: Of the whole model and all requests.
        ranks: Of a stage.
        micro_batches: As many as stages, or fewer.
        once: Whether weights are read once in all, as for prompts.
        data_ranks: That have requests of their own.
    """
    shared = []
    for cost in costs:
        is_weight = cost.name not in ("embedding", "attention") and not once
        readers = ranks if is_weight else ranks * micro_batches
        if cost.experts is not None or cost.name in ("embedding", "attention"):
            readers *= data_ranks
        shared.append(
            dataclasses.replace(
                cost,
                read_bytes=cost.read_bytes // readers,
                operations=cost.operations // (ranks * micro_batches * data_ranks),
            )
        )
    return shared


def floor_ms(costs: Iterable[OpCost], rates: Rates) -> float:
    """The sum over ops of max(bytes / read bandwidth, operations / arithmetic rate)."""
    return 1e3 * sum(
        max(cost.read_bytes / (rates.read_gb_s * 1e9), cost.operations / (rates.gflops * 1e9))
        for cost in costs
    )


def make_record(
    figure: Figure,
    shape: str,
    device: str,
    dtype: str,
    timing: Timing,
    costs: Sequence[OpCost] = (),
    rates: Rates | None = None,
    cache: CacheFormat = AUTO_CACHE,
    ranks: int = 1,
    stages: int = 1,
    weights: str | None = None,
    data_ranks: int = 1,
) -> Record:
    """Sets a timing of mrv1 against what the machine can do, unless `rates` is None.

    `costs` are those of the whole model, `rates` of one device: `ranks` of them share each layer,
    `stages` of so many the layers, and `data_ranks` the requests (`shared_costs`). `weights` is as
    `weights_name` says.
    """
    once = figure == "prefill"
    micro_batches = stages if once else min(stages, timing.batch)
    costs = shared_costs(costs, ranks, micro_batches, once, data_ranks)
    seconds = timing.step_ms / 1e3
    tokens = timing.batch if timing.tokens is None else timing.tokens
    record: Record = {
        "figure": figure,
        "shape": shape,
        "device": device,
        "batch": timing.batch,
        "context": timing.context,
        "kv_cache_dtype": cache.kv_cache_dtype,
        "step_ms": round(timing.step_ms, 6),
        "floor_ms": None,
        "host_us": None if timing.host_us is None else round(timing.host_us, 2),
        "tokens_per_s": round(tokens / seconds, 2),
        "read_gb_s": None,
        "peak_memory_mb": round(timing.peak_memory_mb, 1),
        "versions": versions(),
        "commit": commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "dtype": dtype,
    }
    if rates is not None:
        record["read_gb_s"] = round(rates.read_gb_s, 2)
        record["gflops"] = round(rates.gflops, 1)
        if costs:
            floor, read_bytes = floor_ms(costs, rates), sum(cost.read_bytes for cost in costs)
            record["floor_ms"] = round(floor, 6)
            record["read_share"] = round(read_bytes / seconds / (rates.read_gb_s * 1e9), 4)
            record["x_floor"] = round(timing.step_ms / floor, 3)
        _set_counts(record, rates.counts)
    experts = [cost.experts for cost in costs if cost.experts is not None]
    if experts:
        record["experts"] = round(statistics.fmean(experts), 2)
    if weights is not None:
        record["weights"] = weights
    if cache.kv_scales != "none":
        record["scale"] = cache.kv_scales
    if ranks > 1:
        record["tp"] = ranks
        record["tbo"] = int(timing.in_halves)
    if stages > 1:
        record["pp"] = stages
    if timing.graph_mode is not None:
        record["graph_mode"] = timing.graph_mode
    if timing.stage_waits:
        record["stage_waits"] = ",".join(f"{share:.4f}" for share in timing.stage_waits)
    if timing.idle_share is not None:
        record["idle_share"] = round(timing.idle_share, 5)
    return record


def set_bandwidth(record: Record, bandwidth: Bandwidth) -> None:
    """Sets a record of a kernel that is bound by memory beside what the machine can do."""
    record["read_gb_s"] = round(bandwidth.read_gb_s, 2)
    record["copy_gb_s"] = round(bandwidth.copy_gb_s, 2)
    _set_counts(record, bandwidth.counts)


def _set_counts(record: Record, counts: bool | None) -> None:
    if counts is None:
        return
    record["counts"] = counts
    if not counts:
        record["fault"] = f"the plain read reached {record['read_gb_s']} GB/s only"


def describe_device(device: _core.Device) -> str:
    """A device in a line: "cpu: <model>, <threads> threads, <instruction set>"."""
    if device.kind != "cpu":
        return device.name
    return f"cpu: {cpu_model()}, {device.num_threads} threads, {_core.cpu_isa()}"


def versions(*packages: str) -> str:
    """Versions of mrv1, Python, NumPy and further packages, in a line."""
    parts = [f"mrv1 {__version__}", f"python {platform.python_version()}"]
    parts += [f"{name} {package_version(name)}" for name in ("numpy", *packages)]
    return ", ".join(parts)


def check_writable(path: str | os.PathLike[str], field: str = "json") -> None:
    """Checks that a file can be written, before minutes go into what it shall hold.

    Raises:
        InvalidArgumentError: It cannot be written.
    """
    target = Path(path)
    existed = os.path.lexists(target)
    try:
        # Appending keeps what is there.
        with target.open("a", encoding="utf-8"):
            pass
        if not existed:
            target.unlink()
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"cannot be written: {error}", field=field, value=os.fspath(path)
        ) from None


def write_json(path: str | os.PathLike[str], records: Sequence[Record]) -> None:
    """Writes records as a JSON list, a record a line.

    Raises:
        InvalidArgumentError: The file cannot be written.
    """
    lines = ",\n".join("  " + json.dumps(record) for record in records)
    try:
        Path(path).write_text(f"[\n{lines}\n]\n" if lines else "[]\n", encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(
            f"cannot be written: {error}", field="json", value=os.fspath(path)
        ) from None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def _shares(shares: str | None) -> str:
    return "-" if shares is None else ", ".join(_percent(float(s)) for s in shares.split(","))


def _kilobytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1024:g}"


# Columns that are left out of a table where no record has a value.
_COLUMNS: Final[tuple[tuple[str, Callable[[Record], str]], ...]] = (
    ("batch", lambda record: str(record["batch"])),
    ("context", lambda record: str(record["context"])),
    ("step ms", lambda record: _number(record["step_ms"], 3)),
    ("floor ms", lambda record: _number(record["floor_ms"], 3)),
    ("x floor", lambda record: _number(record.get("x_floor"), 2)),
    ("tokens/s", lambda record: _number(record["tokens_per_s"], 1)),
    ("host us", lambda record: _number(record["host_us"], 1)),
    ("idle", lambda record: _percent(record.get("idle_share"))),
    ("experts", lambda record: _number(record.get("experts"), 1)),
    ("stages wait", lambda record: _shares(record.get("stage_waits"))),
    ("peer ms", lambda record: _number(record.get("peer_step_ms"), 3)),
    ("peer tokens/s", lambda record: _number(record.get("peer_tokens_per_s"), 1)),
    ("x peer", lambda record: _number(record.get("times_peer"), 2)),
    ("message KB", lambda record: _kilobytes(record.get("message_bytes"))),
    ("us", lambda record: _number(record.get("us"), 2)),
    ("GB/s", lambda record: _number(record.get("gb_s"), 1)),
    ("read us", lambda record: _number(record.get("floor_us"), 2)),
    ("FlashInfer us", lambda record: _number(record.get("flashinfer_us"), 2)),
    ("torch us", lambda record: _number(record.get("torch_us"), 2)),
    ("apart us", lambda record: _number(record.get("separate_us"), 2)),
    ("read share", lambda record: _percent(record.get("read_share"))),
    ("read GB/s", lambda record: _number(record["read_gb_s"], 1)),
    ("copy GB/s", lambda record: _number(record.get("copy_gb_s"), 1)),
    ("GFLOP/s", lambda record: _number(record.get("gflops"), 0)),
    ("peak MB", lambda record: _number(record["peak_memory_mb"], 0)),
)


def format_table(records: Sequence[Record]) -> str:
    """Records as a table for people."""
    columns = [["figure"], ["what"]]
    for record in records:
        cache = record["kv_cache_dtype"]
        parts = (
            record["shape"],
            record.get("op"),
            record.get("case"),
            record.get("lengths"),
            record.get("backend"),
            record.get("launches"),
            record.get("layout"),
            f"tp {record['tp']}" if "tp" in record else None,
            f"pp {record['pp']}" if "pp" in record else None,
            "tbo" if record.get("tbo") else None,
            None if cache == "auto" else cache,
            record.get("scale") if "cache_dtype" in record and cache != "auto" else None,
        )
        columns[0].append(record["figure"])
        columns[1].append(" ".join(part for part in (*parts, record.get("peer")) if part))
    for title, text in _COLUMNS:
        cells = [text(record) for record in records]
        if any(cell != "-" for cell in cells):
            columns.append([title, *cells])
    lines = format_columns(columns, left=2)
    faults = dict.fromkeys(record["fault"] for record in records if "fault" in record)
    lines += [f"Does not count: {fault}." for fault in faults]
    return "\n".join(lines)


def format_columns(columns: Sequence[Sequence[str]], left: int) -> list[str]:
    """Columns as aligned lines, the first `left` of them to the left."""
    padded = []
    for place, cells in enumerate(columns):
        width = max(map(len, cells))
        padded.append([cell.ljust(width) if place < left else cell.rjust(width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
