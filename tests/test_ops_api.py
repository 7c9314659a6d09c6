# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""`mrv1.ops`: single ops on arrays of the caller."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrv1 import _core, memory, ops
from mrv1.errors import InvalidArgumentError

BF16 = np.dtype(ml_dtypes.bfloat16)
TOLERANCE = {np.dtype(np.float32): 2e-5, BF16: 2e-2}


class Other:
    """An array of another library on the CPU, which knows DLPack and nothing else."""

    def __init__(self, source: Any) -> None:
        self.array = np.from_dlpack(source) if not isinstance(source, np.ndarray) else source

    def __dlpack__(self, **options: Any) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __array_namespace__(self) -> object:
        return type("namespace", (), {"from_dlpack": staticmethod(Other)})


class Elsewhere(Other):
    """Says that it lies on a GPU."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 7


@pytest.fixture
def place(device: str, native_device: _core.Device) -> Any:
    """Takes values to the device under test, as an array that ops take."""

    def put(values: np.ndarray) -> Any:
        if device == "cpu":
            return values
        pinned = memory.pinned(values.shape, values.dtype, native_device)
        pinned.numpy()[...] = values
        return pinned.device()

    return put


@pytest.fixture
def fetch(native_device: _core.Device) -> Any:
    """What a result of floats holds."""

    def get(array: Any) -> np.ndarray:
        if isinstance(array, np.ndarray):
            return array.astype(np.float64)
        rows, cols = int(np.prod(array.shape[:-1])), array.shape[-1]
        program = _core.Program(array.dtype)
        x = program.input("x", cols)
        program.output(x)
        session = _core.ProgramSession(native_device, program, max_tokens=rows)
        session.set_value(x, array)
        return session.value(x, rows).reshape(array.shape).astype(np.float64)

    return get


def values(shape: tuple[int, ...], seed: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(np.float64)
    result: np.ndarray = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight
    return result


@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 40),
    dtype=st.sampled_from([np.dtype(np.float32), BF16]),
)
def test_rows_match_a_float64_reference(
    place: Any, fetch: Any, rows: int, cols: int, dtype: Any
) -> None:
    x, other = values((rows, cols), 1, dtype), values((rows, cols), 2, dtype)
    weight = values((cols,), 3)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    wide = x.astype(np.float64)
    got = fetch(ops.rms_norm(place(x), place(weight), 1e-5))
    np.testing.assert_allclose(got, norm(x, weight, 1e-5), **close)
    total = (x.astype(np.float32) + other.astype(np.float32)).astype(dtype)
    assert (fetch(ops.add(place(x), place(other))) == total.astype(np.float64)).all()
    normed, added = ops.add_rms_norm(place(x), place(other), place(weight), 1e-5)
    assert (fetch(added) == total.astype(np.float64)).all()
    assert (fetch(normed) == fetch(ops.rms_norm(place(total), place(weight), 1e-5))).all()
    gated = values((rows, 2 * cols), 4, dtype)
    gate, up = np.split(gated.astype(np.float64), 2, axis=-1)
    np.testing.assert_allclose(
        fetch(ops.silu_mul(place(gated))), gate / (1 + np.exp(-gate)) * up, **close
    )
    gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    np.testing.assert_allclose(fetch(ops.gelu_mul(place(gated))), gelu * up, **close)
    indices = np.arange(rows, dtype=np.int32)[::-1].copy()
    assert (fetch(ops.gather_rows(place(x), place(indices))) == wide[::-1]).all()
    assert (fetch(ops.embedding(place(indices), place(x))) == wide[::-1]).all()


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
def test_linear_with_all_its_parts(place: Any, fetch: Any, dtype: Any) -> None:
    x, weight = values((3, 24), 1, dtype), values((64, 24), 2, dtype)
    bias, residual = values((64,), 3), values((3, 64), 4, dtype)
    product = x.astype(np.float64) @ weight.astype(np.float64).T
    close = {"rtol": TOLERANCE[dtype], "atol": 5 * TOLERANCE[dtype]}
    got = ops.linear(place(x), place(weight), place(bias), residual=place(residual))
    np.testing.assert_allclose(fetch(got), product + bias + residual.astype(np.float64), **close)
    packed = ops.pack_linear(place(weight))
    assert packed.shape == (64, 24)
    plain = fetch(ops.linear(place(x), packed))
    assert (plain == fetch(ops.linear(place(x), place(weight)))).all()
    fused = ops.linear(place(x), packed, activation="silu")
    assert (fetch(fused) == fetch(ops.silu_mul(ops.linear(place(x), packed)))).all()


def attend(q: np.ndarray, keys: np.ndarray, vals: np.ndarray, lens: list[int]) -> np.ndarray:
    """One token a request; keys and vals are [B, positions, K, D]."""
    out = np.zeros(q.shape)
    group = q.shape[1] // keys.shape[2]
    for b, length in enumerate(lens):
        for h in range(q.shape[1]):
            scores = keys[b, :length, h // group] @ q[b, h] / np.sqrt(q.shape[2])
            share = np.exp(scores - scores.max())
            out[b, h] = (share / share.sum()) @ vals[b, :length, h // group]
    return out


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_cache_write_and_attention(device: str, layout: str) -> None:
    if device == "cuda":
        pytest.importorskip("torch", reason="strided views of GPU memory come from a library")
    block, kv_heads, dim, lens = 4, 2, 8, [7, 3]
    keys, vals = values((2, 8, kv_heads, dim), 1), values((2, 8, kv_heads, dim), 2)
    shape = (6, block, kv_heads, dim) if layout == "NHD" else (6, kv_heads, block, dim)

    def move(array: np.ndarray) -> Any:
        if device == "cpu":
            return array
        import torch

        return torch.from_numpy(array).cuda()

    def cache() -> Any:
        made = move(np.zeros(shape, np.float32))
        return made if layout == "NHD" else made.swapaxes(1, 2)

    key_cache, value_cache = cache(), cache()
    table = np.array([[1, 4], [2, 5]], np.int32)
    for b, length in enumerate(lens):
        slots = ops.slot_mapping(
            move(table[b : b + 1].copy()),
            move(np.arange(length, dtype=np.int32)),
            move(np.array([0, length], np.int32)),
            block,
        )
        ops.reshape_and_cache_flash(
            move(keys[b, :length]), move(vals[b, :length]), key_cache, value_cache, slots
        )
    q = values((2, 4, dim), 3)
    starts, lengths = np.array([0, 1, 2], np.int32), np.array(lens, np.int32)
    got = ops.paged_attention(
        move(q), key_cache, value_cache, move(table), move(lengths), move(starts)
    )
    got = got if device == "cpu" else got.cpu().numpy()
    np.testing.assert_allclose(got, attend(q, keys, vals, lens), rtol=1e-4, atol=1e-5)
    plan = ops.plan_attention(
        move(starts), move(lengths), move(table), num_tokens=2, num_heads=4,
        num_kv_heads=kv_heads, head_dim=dim, block_size=block, num_blocks=6, dtype="float32",
    )  # fmt: skip
    planned = ops.paged_attention(move(q), key_cache, value_cache, plan=plan)
    assert (np.asarray(planned if device == "cpu" else planned.cpu()) == got).all()


def test_fused_qkv_has_the_bits_of_its_parts(place: Any, fetch: Any) -> None:
    heads = {"num_heads": 2, "num_kv_heads": 1}
    qkv, q_norm, k_norm = values((3, 64), 1), values((16,), 2), values((16,), 3)
    angles = np.random.default_rng(4).uniform(0, 6, (8, 8)).astype(np.float32)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    positions = np.array([5, 0, 7], np.int32)
    fused = ops.qkv_prepare(
        place(qkv), q_norm=place(q_norm), k_norm=place(k_norm), cos_sin=place(table),
        positions=place(positions), **heads,
    )  # fmt: skip
    parts = ops.qk_norm(place(qkv), place(q_norm), place(k_norm), **heads)
    normed = fetch(parts)
    parts = ops.rope(parts, place(table), place(positions), **heads)
    assert (fetch(fused) == fetch(parts)).all()
    head = normed[0, :16]
    c, s = np.cos(angles[5].astype(np.float64)), np.sin(angles[5].astype(np.float64))
    turned = np.concatenate([head[:8] * c - head[8:] * s, head[8:] * c + head[:8] * s])
    np.testing.assert_allclose(fetch(fused)[0, :16], turned, rtol=1e-5, atol=1e-5)


def test_sample_and_copy_blocks_on_the_host() -> None:
    logits = values((4, 50), 1)
    before = logits.copy()
    greedy = ops.sample(logits, temperature=0.0)
    assert (greedy == logits.argmax(-1)).all() and (logits == before).all()
    assert (ops.sample(logits, top_k=1, seed=9) == greedy).all()
    seeds = np.arange(4, dtype=np.uint64)
    drawn = ops.sample(logits, seed=seeds, position=3)
    for row in range(4):
        alone = ops.sample(logits[row : row + 1].copy(), seed=row, position=3)
        assert alone[0] == drawn[row]
    cache = values((4, 2, 1, 8), 2)
    copy = cache.copy()
    ops.copy_blocks(cache, copy, [(1, 3)])
    assert (cache[3] == cache[1]).all() and (copy == cache).all()


def test_outputs_are_of_the_inputs_kind() -> None:
    x = values((2, 8), 1)
    assert isinstance(ops.add(x, x), np.ndarray)
    assert ops.add(x.astype(BF16), x.astype(BF16)).dtype == BF16
    result = ops.add(Other(x), x)
    assert isinstance(result, Other) and (result.array == x + x).all()
    frozen = x.copy()
    frozen.setflags(write=False)
    assert (ops.add(frozen, frozen) == x + x).all()
    out = np.empty_like(x)
    assert ops.add(x, x, out=out) is out and (out == x + x).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.add(x, x[:1]), r"\[add\] b has shape \[1, 8\]; must be \[4, 8\]"),
        (lambda x: ops.add(x, x.astype(np.float64)), r"\[add\] b is float64; must be float32"),
        (lambda x: ops.add(x[:, ::2], x), r"\[add\] a .*strides \[8, 2\].*contiguous"),
        (lambda x: ops.add(x, Elsewhere(x)), r"b lies on GPU 7 and a on the CPU"),
        (lambda x: ops.add(x, [1.0]), r"\[add\] b is of type"),
        (lambda x: ops.add(x, x, stream=5), r"\[add\] stream must be None"),
        (lambda x: ops.rms_norm(x, x[0], -1.0), r"eps = -1"),
        (lambda x: ops.gather_rows(x, np.int32([4])), r"indices\[0\] is 4"),
        (lambda x: ops.embedding(np.int32([-2]), x), r"token_ids\[0\] is -2"),
        (lambda x: ops.embedding(np.int64([0]), x), r"token_ids is int64; must be int32"),
        (lambda x: ops.linear(x, x, activation="relu"), r"activation = 'relu'"),
        (lambda x: ops.sample(x, temperature=-1.0), r"temperature = -1"),
        (lambda x: ops.add(x[:2], x[:2], out=x[1:3]), r"out overlaps a"),
    ],
)
def test_refusals_name_op_and_argument(call: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        call(values((4, 8), 1))


def test_slots_that_would_leave_the_cache_are_refused() -> None:
    cache, key = np.zeros((2, 4, 1, 8), np.float32), values((2, 1, 8), 1)
    for slots, message in (([8, 0], "is 8"), ([-2, 0], "is -2"), ([3, 3], "slot 3 twice")):
        with pytest.raises(InvalidArgumentError, match=message):
            ops.reshape_and_cache_flash(key, key, cache, cache.copy(), np.int32(slots))
    assert not cache.any()
    q, starts = values((1, 1, 8), 2), np.int32([0, 1])
    for table, length in (([[9]], 1), ([[1]], 5)):
        with pytest.raises(InvalidArgumentError, match="block_table|seq_lens"):
            ops.paged_attention(q, cache, cache, np.int32(table), np.int32([length]), starts)


def test_threads_may_call_at_the_same_time() -> None:
    x, weight = values((64, 64), 1), values((64, 64), 2)
    expected = ops.linear(x, weight)
    wrong = [0] * 4

    def work(index: int) -> None:
        for _ in range(20):
            if not (ops.linear(x, weight) == expected).all():
                wrong[index] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)


def test_torch_default_stream(device: str) -> None:
    """Its handle is 0, which must not be taken for a stream of mrv1's."""
    if device == "cpu":
        pytest.skip("for GPUs")
    torch = pytest.importorskip("torch")
    assert torch.cuda.current_stream().cuda_stream == 0
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.randn(512, 1024, device="cuda")
        weight = torch.randn(2048, 1024, device="cuda") / 32
        gain = torch.rand(1024, device="cuda")
        for _ in range(3):
            y = ops.silu_mul(ops.linear(ops.rms_norm(x, gain, eps=1e-6), weight))
            normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain
            gate, up = (normed @ weight.T).chunk(2, dim=1)
            torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up, atol=1e-3, rtol=1e-3)
            x = x.roll(1, 0) + y.repeat(1, 1)[:, :1024] * 0.01


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bfloat16_prompt_attends_to_itself(device: str, tokens: int, dim: int) -> None:
    """Queries by themselves are nearer to each other than in a packed row."""
    heads, kv_heads, block = 8, 2, 16
    rng = np.random.default_rng(tokens)
    q = rng.standard_normal((tokens, heads, dim), np.float32).astype(ml_dtypes.bfloat16)
    sides = [
        rng.standard_normal((4, block, kv_heads, dim), np.float32).astype(ml_dtypes.bfloat16)
        for _ in range(2)
    ]
    table = np.array([[3, 1, 2]], np.int32)
    lengths = np.array([tokens], np.int32), np.array([0, tokens], np.int32)
    if device == "cpu":
        out = ops.paged_attention(q, *sides, table, *lengths).astype(np.float64)
    else:
        torch = pytest.importorskip("torch")

        def on_gpu(array: np.ndarray) -> Any:
            if array.dtype == np.int32:
                return torch.from_numpy(array).cuda()
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda()

        arrays = [on_gpu(array) for array in (q, *sides, table, *lengths)]
        out = ops.paged_attention(*arrays).double().cpu().numpy()
    key, value = (side[table[0]].reshape(-1, kv_heads, dim)[:tokens] for side in sides)
    key, value = (np.repeat(s, heads // kv_heads, 1).astype(np.float64) for s in (key, value))
    scores = np.einsum("qhd,khd->hqk", q.astype(np.float64), key) / np.sqrt(dim)
    scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(out, expected, atol=0.02, rtol=0.02)
