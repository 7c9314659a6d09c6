# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: records, what the machine can do, and floors.

docs/benchmarks.md describes the records for their readers.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Literal, TypedDict

import numpy as np

from mrv1 import _core
from mrv1._version import __version__
from mrv1.config import ModelConfig
from mrv1.env_report import commit, cpu_model, package_version
from mrv1.errors import DeviceError, InvalidArgumentError

Figure = Literal["decode", "prefill", "mix", "op"]

# Bytes that the plain read covers, unless less memory is free.
READ_BYTES: Final = 1 << 30
_READS: Final = 10
# The matrix product that measures the arithmetic rate: tokens, and rows and columns of the weight.
_PRODUCT_TOKENS: Final = 256
_PRODUCT_SIZE: Final = 4096
_PRODUCTS: Final = 5


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
    read_share: float | None
    gflops: float | None


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
    """

    batch: int
    context: int
    step_ms: float
    host_us: float | None
    peak_memory_mb: float
    tokens: float | None = None


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the machine can do, measured in the same run as what is compared with it.

    Attributes:
        read_gb_s: Plain read of a buffer larger than the caches, in 10^9 bytes a second.
        gflops: A large matrix product through the linear kernel, in 10^9 operations a second.
    """

    read_gb_s: float
    gflops: float


@dataclasses.dataclass(frozen=True)
class OpCost:
    """What one op of a step must at least do.

    Attributes:
        name: Of its weight, or what it is.
        read_bytes: Weights, cache and table rows, each read once. Activations stay in cache.
        operations: Multiplications and additions.
    """

    name: str
    read_bytes: int
    operations: int


def check_measurable(device: str) -> None:
    """Checks that floors can be measured on a device.

    Raises:
        DeviceError: They cannot, yet.
    """
    if device != "cpu":
        raise DeviceError(
            f"[bench] read bandwidth is measured on the cpu only, not on {device}: "
            "pass --device cpu"
        )


def measure_rates(device: _core.Device, dtype: str, read_bytes: int = READ_BYTES) -> Rates:
    """Measures read bandwidth (best of 10) and arithmetic rate (best of 5) of a device."""
    free, _ = device.memory()
    probe = _core.ReadProbe(device, min(read_bytes, free // 2))
    probe_bytes = probe.bytes
    try:
        seconds = min(probe.run() for _ in range(_READS))
    finally:
        probe.close()
    return Rates(probe_bytes / seconds / 1e9, _measure_gflops(device, dtype))


def _measure_gflops(device: _core.Device, dtype: str) -> float:
    tokens, size = _PRODUCT_TOKENS, _PRODUCT_SIZE
    program = _core.Program(dtype)
    x = program.input("x", size)
    weight = program.weight("weight", False, size, [("weight", size)])
    program.output(program.linear(x, weight))
    session = _core.ProgramSession(device, program, max_tokens=tokens)
    try:
        rng = np.random.default_rng(0)
        session.load_weight(weight, rng.standard_normal((size, size), dtype=np.float32))
        session.set_value(x, rng.standard_normal((tokens, size), dtype=np.float32))
        seconds = []
        for _ in range(_PRODUCTS):
            start = time.perf_counter()
            session.run(1, tokens)
            seconds.append(time.perf_counter() - start)
    finally:
        session.close()
    return 2.0 * tokens * size * size / min(seconds) / 1e9


def decode_costs(config: ModelConfig, dtype: str, batch: int, context: float) -> list[OpCost]:
    """What the ops of a decode step must do at least.

    Args:
        config: The model's.
        dtype: The one it runs in, "float32" or "bfloat16".
        batch: Requests, one token each.
        context: Tokens that each attends to.
    """
    attention = attention_cost(config, _element_size(dtype), batch, context)
    return _step_costs(config, dtype, batch, batch, attention)


def prefill_costs(config: ModelConfig, dtype: str, batch: int, context: int) -> list[OpCost]:
    """What the prefill of whole prompts must do at least, as if it were one step.

    Args:
        config: The model's.
        dtype: The one it runs in, "float32" or "bfloat16".
        batch: Prompts. Logits are those of the last token of each.
        context: Tokens of each. Token i attends to i + 1 of them.
    """
    every = attention_cost(config, _element_size(dtype), batch, context)
    causal = dataclasses.replace(every, operations=every.operations * (context + 1) // 2)
    return _step_costs(config, dtype, batch * context, batch, causal)


def _element_size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _step_costs(
    config: ModelConfig, dtype: str, tokens: int, draws: int, attention: OpCost
) -> list[OpCost]:
    """A step of `tokens` tokens with logits for `draws` of them, and one layer's attention."""
    from mrv1.loader import wire_model

    size = _element_size(dtype)
    costs = []
    for name, is_vector, cols, segments in wire_model(config, dtype).weights:
        rows = sum(count for _, count in segments)
        if is_vector:
            costs.append(OpCost(name, rows * 4, 0))
        elif "embed_tokens" in name:
            costs.append(OpCost("embedding", tokens * cols * size, 0))
            if config.tie_word_embeddings:
                costs.append(linear_cost("logits", rows, cols, size, draws))
        elif name == "lm_head.weight":
            costs.append(linear_cost("logits", rows, cols, size, draws))
        else:
            costs.append(linear_cost(name, rows, cols, size, tokens))
    return costs + [attention] * config.num_hidden_layers


def linear_cost(name: str, rows: int, cols: int, size: int, batch: int) -> OpCost:
    """A product of `batch` rows with a weight [rows, cols] of `size` bytes an element."""
    return OpCost(name, rows * cols * size, 2 * batch * rows * cols)


def attention_cost(config: ModelConfig, size: int, batch: int, context: float) -> OpCost:
    """One layer's attention of `batch` tokens over `context` cached ones each."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cached = int(batch * context)
    return OpCost("attention", cached * 2 * kv_heads * dim * size, cached * 4 * heads * dim)


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
) -> Record:
    """Sets a timing of mrv1 against what the machine can do, unless `rates` is None."""
    seconds = timing.step_ms / 1e3
    tokens = timing.batch if timing.tokens is None else timing.tokens
    record: Record = {
        "figure": figure,
        "shape": shape,
        "device": device,
        "batch": timing.batch,
        "context": timing.context,
        "kv_cache_dtype": "auto",
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
        read_bytes = sum(cost.read_bytes for cost in costs)
        record["floor_ms"] = round(floor_ms(costs, rates), 6)
        record["read_gb_s"] = round(rates.read_gb_s, 2)
        record["read_share"] = round(read_bytes / seconds / (rates.read_gb_s * 1e9), 4)
        record["gflops"] = round(rates.gflops, 1)
    return record


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


def check_writable(path: str | os.PathLike[str]) -> None:
    """Checks that `write_json` can write a file, before minutes go into what it shall hold.

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
            f"cannot be written: {error}", field="json", value=os.fspath(path)
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


def format_table(records: Sequence[Record]) -> str:
    """Records as a table for people."""
    titles = ["figure", "what", "batch", "context", "step ms", "floor ms", "tokens/s"]
    titles += ["read share", "read GB/s", "GFLOP/s", "host us", "peak MB"]
    rows = [titles]
    for record in records:
        share = record.get("read_share")
        rows.append(
            [
                record["figure"],
                " ".join(
                    part
                    for part in (record["shape"], record.get("op"), record.get("peer"))
                    if part is not None
                ),
                str(record["batch"]),
                str(record["context"]),
                _number(record["step_ms"], 3),
                _number(record["floor_ms"], 3),
                _number(record["tokens_per_s"], 1),
                "-" if share is None else f"{100 * share:.0f} %",
                _number(record["read_gb_s"], 1),
                _number(record.get("gflops"), 0),
                _number(record["host_us"], 1),
                _number(record["peak_memory_mb"], 0),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
