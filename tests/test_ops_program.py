# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Each op of `mrv1.ops` beside the same op of a program, on the same values: bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from device_arrays import Storage, contiguous, stored
from mrv1 import _core, ops
from reference_sampler import RowParams
from sampling_runs import run_rows

Array = np.ndarray
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ROWS, COLS = 5, 64


class Bench:
    """Runs a program with an op, and the single op, on one device."""

    def __init__(self, device: _core.Device, dtype: str) -> None:
        self.device, self.dtype = device, dtype
        self.program = _core.Program(dtype)
        self.stream = None if device.kind == "cpu" else device
        self._rng = np.random.default_rng(7)
        self._inputs: dict[int, Array] = {}
        self._weights: dict[int, Array] = {}
        self._session: _core.ProgramSession | None = None

    def values(self, *shape: int) -> Array:
        """Values that the dtype holds."""
        return self._rng.standard_normal(shape).astype(DTYPES[self.dtype])

    def floats(self, *shape: int) -> Array:
        return self._rng.standard_normal(shape, np.float32)

    def input(self, data: Array) -> int:
        value = self.program.input(f"in{len(self._inputs)}", data.shape[1])
        self._inputs[value] = data
        return value

    def matrix(self, data: Array) -> int:
        name = f"w{len(self._weights)}"
        weight = self.program.weight(name, False, data.shape[1], [(name, data.shape[0])])
        self._weights[weight] = data
        return weight

    def vector(self, data: Array) -> int:
        name = f"w{len(self._weights)}"
        weight = self.program.weight(name, True, 1, [(name, data.shape[0])])
        self._weights[weight] = data
        return weight

    def run(self, out: int, rows: int = ROWS, **options: Any) -> Array:
        """What the program's op gives, as float32."""
        self.program.output(out)
        ints = options.pop("ints", {})
        requests, logits = options.pop("requests", 1), options.pop("logits", 0)
        session = _core.ProgramSession(
            self.device,
            self.program,
            max_requests=requests,
            max_tokens=rows,
            max_logits=max(logits, 1),
            **options,
        )
        for weight, data in self._weights.items():
            session.load_weight(weight, data.astype(np.float32))
        for value, data in self._inputs.items():
            session.set_value(value, data.astype(np.float32))
        for name, data in ints.items():
            session.set_ints(name, np.ascontiguousarray(data, np.int32))
        session.run(requests, rows, logits)
        self._session = session
        return session.value(out, logits or rows)

    def put(self, data: Array) -> Any:
        return stored(data, self.device)

    def call(
        self, op: Callable[..., Any], shape: tuple[int, ...], dtype: str | None = None
    ) -> Array:
        """Calls op(out=, stream=) and returns what it wrote, as float32."""
        kind = DTYPES[dtype or self.dtype]
        storage = Storage(int(np.prod(shape)) * kind.itemsize, self.device)
        storage.bytes[:] = 0xFF
        op(out=storage.array(shape, contiguous(shape), kind), stream=self.stream)
        storage.wait()
        return storage.view(shape, contiguous(shape), kind).astype(np.float32)


@pytest.fixture(params=list(DTYPES))
def bench(native_device: _core.Device, request: pytest.FixtureRequest) -> Bench:
    return Bench(native_device, request.param)


def test_embedding(bench: Bench) -> None:
    table, ids = bench.values(9, COLS), np.array([8, 0, 3, 3, 1], np.int32)
    weight = bench.matrix(table)
    expected = bench.run(bench.program.embedding(weight, 1.7), ints={"token_ids": ids})
    arrays = bench.put(ids), bench.put(table)
    got = bench.call(lambda **k: ops.embedding(*arrays, scale=1.7, **k), (ROWS, COLS))
    np.testing.assert_array_equal(got, expected)


def test_rms_norm(bench: Bench) -> None:
    x, gain = bench.values(ROWS, COLS), bench.floats(COLS)
    out = bench.program.rms_norm(bench.input(x), bench.vector(gain), 1e-5)
    expected = bench.run(out)
    arrays = bench.put(x), bench.put(gain)
    got = bench.call(lambda **k: ops.rms_norm(*arrays, 1e-5, **k), (ROWS, COLS))
    np.testing.assert_array_equal(got, expected)


def test_add(bench: Bench) -> None:
    a, b = bench.values(ROWS, COLS), bench.values(ROWS, COLS)
    expected = bench.run(bench.program.add(bench.input(a), bench.input(b)))
    arrays = bench.put(a), bench.put(b)
    got = bench.call(lambda **k: ops.add(*arrays, **k), (ROWS, COLS))
    np.testing.assert_array_equal(got, expected)


def test_add_rms_norm(bench: Bench) -> None:
    x, residual, gain = bench.values(ROWS, COLS), bench.values(ROWS, COLS), bench.floats(COLS)
    total = bench.program.add(bench.input(x), bench.input(residual))
    bench.program.output(total)
    out = bench.program.rms_norm(total, bench.vector(gain), 1e-5)
    bench.program.output(out)
    assert dict(bench.program.fuse())["residual + rms_norm"] == 1
    expected = bench.run(out)
    arrays = bench.put(x), bench.put(residual), bench.put(gain)
    got = bench.call(lambda **k: ops.add_rms_norm(*arrays, 1e-5, **k), (ROWS, COLS))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("op", ["silu_mul", "gelu_mul"])
def test_gated_mul(bench: Bench, op: str) -> None:
    x = bench.values(ROWS, 2 * COLS)
    expected = bench.run(getattr(bench.program, op)(bench.input(x)))
    array = bench.put(x)
    got = bench.call(lambda **k: getattr(ops, op)(array, **k), (ROWS, COLS))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("rows", [1, ROWS, 130])
@pytest.mark.parametrize("parts", ["", "bias", "residual", "bias residual"])
def test_linear(bench: Bench, parts: str, rows: int) -> None:
    size = 96
    x, weight = bench.values(rows, COLS), bench.values(size, COLS)
    bias, residual = bench.floats(size), bench.values(rows, size)
    options, arrays = {}, {}
    source, matrix = bench.input(x), bench.matrix(weight)
    if "bias" in parts:
        options["bias"], arrays["bias"] = bench.vector(bias), bench.put(bias)
    if "residual" in parts:
        options["residual"], arrays["residual"] = bench.input(residual), bench.put(residual)
    expected = bench.run(bench.program.linear(source, matrix, **options), rows)
    operands = bench.put(x), bench.put(weight)
    got = bench.call(lambda **k: ops.linear(*operands, **arrays, **k), (rows, size))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_linear_with_an_activation(bench: Bench, activation: str) -> None:
    x, weight = bench.values(ROWS, COLS), bench.values(192, COLS)
    name = "silu_mul" if activation == "silu" else "gelu_mul"
    matrix = bench.program.weight("gate_up", False, COLS, [("gate", 96), ("up", 96)])
    bench._weights[matrix] = weight
    out = getattr(bench.program, name)(bench.program.linear(bench.input(x), matrix))
    bench.program.output(out)
    assert dict(bench.program.fuse())["linear + gated_mul"] == 1
    expected = bench.run(out)
    operands = bench.put(x), bench.put(weight)
    got = bench.call(lambda **k: ops.linear(*operands, activation=activation, **k), (ROWS, 96))
    np.testing.assert_array_equal(got, expected)


def test_logits(bench: Bench) -> None:
    """Rows gathered, a product in float32, a soft cap."""
    x, weight = bench.values(ROWS, COLS), bench.values(48, COLS)
    indices = np.array([4, 0, 0], np.int32)
    program = bench.program
    out = program.logits(bench.input(x), bench.matrix(weight), 3.0)
    expected = bench.run(out, ints={"logits_indices": indices}, logits=3)
    arrays = bench.put(x), bench.put(indices), bench.put(weight)
    stream = bench.stream

    def run(out: Any, **options: Any) -> None:
        rows = ops.gather_rows(*arrays[:2], stream=stream)
        product = ops.linear(rows, arrays[2], out_dtype="float32", stream=stream)
        ops.soft_cap(product, 3.0, out=out, **options)

    np.testing.assert_array_equal(bench.call(run, (3, 48), "float32"), expected)


@pytest.mark.parametrize("lens", [[7, 3], [40, 1]])
@pytest.mark.parametrize("window", [0, 5])
def test_attention(bench: Bench, lens: list[int], window: int) -> None:
    """QK-norm, RoPE, cache write and attention; prompts of two requests, whole."""
    heads, kv_heads, dim, block, cols = 4, 2, 64, 16, 3
    rows = sum(lens)
    qkv = bench.values(rows, (heads + 2 * kv_heads) * dim)
    norms = bench.floats(dim), bench.floats(dim)
    # Of which all angles are exact.
    frequencies = 2.0 ** -(np.arange(dim // 2) % 12)
    program = bench.program
    out = program.attention(
        bench.input(qkv), num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, kv_layer=0,
        scale=0.125, window=window, rope=program.rope_table(frequencies.tolist()),
        q_norm=bench.vector(norms[0]), k_norm=bench.vector(norms[1]), eps=1e-6,
    )  # fmt: skip
    table = np.array([[3, 1, 5], [4, 2, 6]], np.int32)
    starts = np.array([0, lens[0], rows], np.int32)
    positions = np.concatenate([np.arange(n) for n in lens]).astype(np.int32)
    batch = np.repeat(np.arange(2), lens).astype(np.int32)
    slots = table[batch, positions // block] * block + positions % block
    prepared = out - 1  # what attention reads stands right before it
    program.output(prepared)
    expected = bench.run(
        out, rows, requests=2, num_blocks=8, block_size=block, max_blocks=cols, max_position=64,
        ints={
            "query_start_loc": starts, "seq_lens": lens, "positions": positions,
            "token_batch": batch, "slot_mapping": slots, "row": [0, 1], "block_table": table,
            "counts": [2, rows, 0, 0, 2, 0],
        },
    )  # fmt: skip
    assert bench._session is not None
    expected_qkv = bench._session.value(prepared, rows)
    expected_caches = [bench._session.cache(0, side) for side in (False, True)]

    angles = np.arange(64)[:, None] * frequencies
    cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    kind = DTYPES[bench.dtype]
    caches = []
    for _ in range(2):  # heads before tokens, as a runner has them
        shape, strides = (8, block, kv_heads, dim), (block * kv_heads * dim, dim, block * dim, 1)
        storage = Storage(8 * block * kv_heads * dim * kind.itemsize, bench.device)
        storage.bytes[:] = 0
        caches.append((storage, storage.array(shape, strides, kind)))
    gains = [bench.put(gain) for gain in norms]
    made_qkv = bench.call(
        lambda **k: ops.qkv_prepare(
            bench.put(qkv), num_heads=heads, num_kv_heads=kv_heads, q_norm=gains[0],
            k_norm=gains[1], eps=1e-6, cos_sin=bench.put(cos_sin), positions=bench.put(positions),
            key_cache=caches[0][1], value_cache=caches[1][1], slot_mapping=bench.put(slots), **k
        ),
        qkv.shape,
    )  # fmt: skip
    np.testing.assert_array_equal(made_qkv, expected_qkv)
    for (storage, _), want in zip(caches, expected_caches, strict=True):
        storage.wait()
        shape = (8, kv_heads, block, dim)
        got = storage.view(shape, contiguous(shape), kind).astype(np.float32)
        np.testing.assert_array_equal(got.reshape(want.shape)[1:], want[1:])
    queries = made_qkv[:, : heads * dim].astype(kind).reshape(rows, heads, dim)
    got = bench.call(
        lambda **k: ops.paged_attention(
            bench.put(queries), caches[0][1], caches[1][1], bench.put(table),
            bench.put(np.array(lens, np.int32)), bench.put(starts), scale=0.125, window=window, **k
        ),
        queries.shape,
    )  # fmt: skip
    np.testing.assert_array_equal(got.reshape(expected.shape), expected)


def test_sample(native_device: _core.Device) -> None:
    """The rows that parameters become are those that a step has."""
    rng = np.random.default_rng(3)
    rows = 12
    logits = rng.normal(0, 3, (rows, 1001)).astype(np.float32)
    parameters = {
        "temperature": rng.choice([0.0, 0.7, 1.5], rows).astype(np.float32),
        "top_k": rng.choice([0, 1, 20], rows).astype(np.int32),
        "top_p": rng.choice([1.0, 0.8], rows).astype(np.float32),
        "min_p": rng.choice([0.0, 0.05], rows).astype(np.float32),
        "seed": rng.integers(0, 2**64, rows, np.uint64),
    }
    position = rng.integers(0, 5000, rows).astype(np.int32)
    expected = run_rows(
        native_device.kind,
        logits,
        [
            RowParams(
                total_len=int(position[row]),
                **{name: values[row].item() for name, values in parameters.items()},
            )
            for row in range(rows)
        ],
    )
    stream = None if native_device.kind == "cpu" else native_device

    def draw(**given: Any) -> Array:
        storage = Storage(4 * rows, native_device)
        ops.sample(
            stored(logits, native_device),
            out=storage.array((rows,), (1,), np.int32),
            stream=stream,
            **given,
        )
        storage.wait()
        return storage.view((rows,), (1,), np.int32).copy()

    put = {
        name: stored(values.view(np.int64) if name == "seed" else values, native_device)
        for name, values in parameters.items()
    }
    assert draw(**put, position=stored(position, native_device)).tolist() == expected
    # Numbers are the same for all rows.
    for row in range(rows):
        given = {name: values[row].item() for name, values in parameters.items()}
        assert draw(**given, position=int(position[row]))[row] == expected[row]
