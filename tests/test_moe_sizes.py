# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Experts and routers of every size that kernels treat apart, and rows by themselves."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from mrv1 import _core


class Sizes(NamedTuple):
    """Experts of a layer, and rows that choose top_k of the first `busy` of them each."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    rows: int
    busy: int


SIZES = (
    Sizes(256, 128, 8, 2, 1, 8),
    Sizes(256, 128, 8, 2, 16, 3),  # 32 pairs, the most that blocks sort by themselves
    Sizes(256, 128, 8, 2, 17, 8),
    Sizes(72, 40, 8, 3, 40, 8),  # columns and rows that end within a tile
    Sizes(200, 136, 4, 2, 300, 4),
    Sizes(64, 64, 4, 1, 600, 1),  # all rows to one expert, in several groups
    Sizes(64, 64, 3, 3, 257, 3),  # every expert has every row
    Sizes(72, 24, 16, 4, 700, 16),  # pairs that two blocks sort
    Sizes(100, 30, 8, 2, 33, 8),  # no multiples of 8
    Sizes(64, 12, 8, 2, 5, 8),
    Sizes(16, 8, 1024, 12, 30, 1024),
    Sizes(8, 8, 2, 1, 1, 2),
    Sizes(64, 32, 1, 1, 28, 1),  # an expert with many rows of few pairs
)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    return values.astype(np.float32).astype(kind).astype(np.float64)


class Layer:
    """The experts of a layer, and what goes into them."""

    def __init__(self, sizes: Sizes, dtype: str, first_expert: int = 0) -> None:
        rng = np.random.default_rng(sum(sizes))
        hidden, inter = sizes.hidden, sizes.intermediate
        self.sizes, self.dtype, self.first = sizes, dtype, first_expert
        self.x = rng.standard_normal((sizes.rows, hidden))
        self.gate_up = rng.standard_normal((sizes.experts, 2 * inter, hidden)) / np.sqrt(hidden)
        self.down = rng.standard_normal((sizes.experts, hidden, inter)) / np.sqrt(inter)
        order = rng.permuted(np.tile(np.arange(sizes.busy), (sizes.rows, 1)), axis=1)
        self.experts = order[:, : sizes.top_k] + first_expert
        self.weights = rng.uniform(0.1, 1.0, (sizes.rows, sizes.top_k)).astype(np.float32)

    def session(self, device: _core.Device, wide: bool = False) -> _core.ProgramSession:
        sizes = self.sizes
        program = _core.Program(self.dtype)
        inputs = (
            program.input("x", sizes.hidden),
            program.input("experts", sizes.top_k, dtype="int32"),
            program.input("weights", sizes.top_k, dtype="float32"),
        )
        matrices = []
        for name, values in (("gate_up", self.gate_up), ("down", self.down)):
            count, rows, cols = values.shape
            segments = [(f"{name} {e}", rows) for e in range(count)]
            matrices.append(program.weight(name, False, cols, segments, matrices=count))
        self.out = program.moe_experts(*inputs, *matrices, first_expert=self.first, wide=wide)
        program.output(self.out)
        session = _core.ProgramSession(device, program, max_tokens=sizes.rows)
        for weight, values in zip(matrices, (self.gate_up, self.down), strict=True):
            session.load_weight(weight, values.reshape(-1, values.shape[2]).astype(np.float32))
        self.inputs = inputs
        return session

    def run(self, session: _core.ProgramSession, rows: np.ndarray) -> np.ndarray:
        """The results of some rows, as a batch of their own."""
        for value, data in zip(self.inputs, (self.x, self.experts, self.weights), strict=True):
            session.set_value(value, data[rows].astype(np.float32))
        session.set_value(self.out, np.full(len(rows) * self.sizes.hidden, np.nan, np.float32))
        session.run(1, len(rows))
        return session.value(self.out, len(rows)).astype(np.float64)

    def expected(self) -> np.ndarray:
        x = _rounded(self.x, self.dtype)
        gate_up, down = _rounded(self.gate_up, self.dtype), _rounded(self.down, self.dtype)
        out = np.zeros_like(x)
        inter = self.sizes.intermediate
        for j in range(self.sizes.top_k):
            for e in range(self.sizes.experts):
                rows = np.flatnonzero(self.experts[:, j] == e + self.first)
                if not rows.size:
                    continue
                both = _rounded(x[rows] @ gate_up[e].T, self.dtype)
                gate, up = both[:, :inter], both[:, inter:]
                inner = _rounded(gate / (1.0 + np.exp(-gate)) * up, self.dtype)
                result = _rounded(inner @ down[e].T, self.dtype)
                out[rows] += self.weights[rows, j, None].astype(np.float64) * result
        return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_experts_of_all_sizes(native_device: _core.Device, sizes: Sizes, dtype: str) -> None:
    layer = Layer(sizes, dtype)
    session = layer.session(native_device)
    actual = layer.run(session, np.arange(sizes.rows))
    session.close()
    expected = layer.expected()
    error = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < (2e-6 if dtype == "float32" else 1.5e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES[1:8], ids=str)
def test_rows_do_not_depend_on_the_batch(
    native_device: _core.Device, sizes: Sizes, dtype: str
) -> None:
    layer = Layer(sizes, dtype)
    session = layer.session(native_device)
    session.set_options(batch_invariant=True)
    together = layer.run(session, np.arange(sizes.rows))
    for count in (1, 2, 15, 18, 100, 256):
        first = max(0, sizes.rows // 2 - count)
        rows = np.arange(first, min(first + count, sizes.rows))
        np.testing.assert_array_equal(layer.run(session, rows), together[rows])
    session.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [3, 90])
def test_experts_of_other_ranks_add_nothing(
    native_device: _core.Device, rows: int, dtype: str
) -> None:
    layer = Layer(Sizes(64, 32, 8, 3, rows, 8), dtype, first_expert=5)
    layer.experts[0] = -1
    layer.experts[1] = [4, 13, -1]
    layer.experts[2, 1:] = [1023, 3]
    session = layer.session(native_device, wide=True)
    actual = layer.run(session, np.arange(rows))
    session.close()
    expected = layer.expected()
    assert (actual[:2] == 0.0).all()
    error = np.linalg.norm(actual - expected, axis=1)[2:] / np.linalg.norm(expected, axis=1)[2:]
    assert error.max() < (2e-6 if dtype == "float32" else 1.5e-2)


def _run_router(
    device: _core.Device,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    *,
    fused: bool,
    **options: object,
) -> list[np.ndarray]:
    """Logits, experts and weights of a router that chooses 3."""
    program = _core.Program("bfloat16")
    value = program.input("x", x.shape[1])
    gate = program.weight("gate", False, x.shape[1], [("gate", len(weight))])
    shift = program.weight("bias", True, 1, [("bias", len(weight))]) if bias is not None else -1
    logits = program.linear(value, gate, wide=True)
    outputs = [logits, *program.moe_route(logits, top_k=3, bias=shift, scores="sigmoid")]
    for output in outputs:
        program.output(output)
    if fused:
        assert dict(program.fuse())["linear + moe_route"] == 1
        assert program.op_names == ["router"]
    session = _core.ProgramSession(device, program, max_tokens=len(x))
    session.load_weight(gate, weight.astype(np.float32))
    if bias is not None:
        session.load_weight(shift, bias.astype(np.float32))
    session.set_options(**options)
    session.set_value(value, x.astype(np.float32))
    session.run(1, len(x))
    results = [session.value(output, len(x)) for output in outputs]
    session.close()
    return results


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "hidden", "experts"),
    [(1, 2048, 128), (4, 4096, 8), (3, 72, 60), (5, 64, 16), (2, 36, 12), (1, 64, 300)],
)
def test_router_is_linear_and_route(
    native_device: _core.Device, rows: int, hidden: int, experts: int, with_bias: bool
) -> None:
    rng = np.random.default_rng(rows + experts)
    x, weight = rng.standard_normal((rows, hidden)), rng.standard_normal((experts, hidden))
    weight /= np.sqrt(hidden)
    bias = rng.uniform(-0.2, 0.2, experts) if with_bias else None
    parts = _run_router(native_device, x, weight, bias, fused=False, batch_invariant=True)
    whole = _run_router(native_device, x, weight, bias, fused=True, batch_invariant=True)
    for part, both in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(both, part)
    logits, chosen, shares = _run_router(native_device, x, weight, bias, fused=True)
    exact = _rounded(x, "bfloat16") @ _rounded(weight, "bfloat16").T
    np.testing.assert_allclose(logits, exact, atol=1e-5, rtol=1e-5)
    scores = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    order = np.argsort(-(scores + (0.0 if bias is None else bias)), axis=1, kind="stable")
    np.testing.assert_array_equal(chosen.astype(np.int64), order[:, :3])
    picked = np.take_along_axis(scores, order[:, :3], axis=1)
    np.testing.assert_allclose(shares, picked / picked.sum(axis=1, keepdims=True), rtol=1e-5)
