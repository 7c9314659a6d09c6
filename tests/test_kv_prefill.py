# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Attention of prompts over E4M3 caches, by kernels that dequantise them where there are any."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from mrv1 import _core

Array = np.ndarray

BLOCK_SIZE = 16
# Keys and values are rounded to bfloat16 once more, probabilities and outputs are in it.
TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Rows:
    """Cached tokens and tokens of the step of each request, those that decode first."""

    lengths: tuple[tuple[int, int], ...]
    heads: tuple[int, int, int] = (8, 2, 128)  # queries, keys and values, head_dim
    window: int = 0
    scales: str = "token"
    padding: int = 0


CASES = {
    "one prompt": Rows(((0, 300),)),
    "scale of a head": Rows(((0, 300),), scales="head"),
    "scale of a tensor": Rows(((0, 300),), scales="tensor"),
    "beside decode rows": Rows(
        ((500, 1), (40, 1), (700, 260), (0, 150), (33, 100)), padding=7, scales="token"
    ),
    "window": Rows(((600, 1), (900, 280), (20, 300), (0, 90)), window=100),
    "small heads": Rows(((130, 400),), heads=(4, 4, 64)),
    "wide heads": Rows(((5, 200), (90, 333)), heads=(6, 2, 256)),
    "many short prompts": Rows(tuple((i, 70 + i) for i in range(12)), heads=(16, 2, 64)),
}


class Batch:
    """A session whose cache holds all keys and values, those of the step included, and queries."""

    def __init__(self, device: _core.Device, rows: Rows, seed: int) -> None:
        rng = np.random.default_rng(seed)
        num, kv, dim = rows.heads
        self.rows = rows
        contexts, counts = np.array(rows.lengths).T
        self.tokens = int(counts.sum()) + rows.padding
        needed = -(-(contexts + counts) // BLOCK_SIZE)
        num_blocks = 1 + int(needed.sum())
        program = _core.Program("bfloat16")
        self.qkv = program.input("qkv", (num + 2 * kv) * dim)
        self.out = program.attention(
            self.qkv,
            num_heads=num,
            num_kv_heads=kv,
            head_dim=dim,
            kv_layer=0,
            scale=dim**-0.5,
            window=rows.window,
        )
        program.output(self.out)
        self.session = _core.ProgramSession(
            device,
            program,
            max_requests=len(rows.lengths),
            max_tokens=self.tokens,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_blocks=int(needed.max()),
            max_position=int((contexts + counts).max()),
            kv_cache_dtype="fp8_e4m3",
            kv_scales=rows.scales,
        )
        order = rng.permutation(num_blocks - 1) + 1
        self.table = np.zeros((len(needed), needed.max()), np.int32)
        for row, count in enumerate(needed):
            self.table[row, :count], order = order[:count], order[count:]
        self.cache = [self._fill(side, num_blocks, rng) for side in (False, True)]
        self._set_ints(contexts, counts)
        data = rng.standard_normal((self.tokens, (num + 2 * kv) * dim)).astype(ml_dtypes.bfloat16)
        self.queries = data[:, : num * dim].reshape(-1, num, dim).astype(np.float64)
        self.session.set_value(self.qkv, data.astype(np.float32))

    def _fill(self, values: bool, num_blocks: int, rng: np.random.Generator) -> Array:
        """Codes and scales of a side; what they stand for: [blocks, heads, block_size, dim]."""
        _, kv, dim = self.rows.heads
        shape = {"token": (num_blocks, kv, BLOCK_SIZE), "head": (kv,), "tensor": (1,)}
        scales = rng.uniform(0.2, 2.0, shape[self.rows.scales]).astype(np.float32) / 448
        codes = rng.uniform(-448, 448, (num_blocks, kv, BLOCK_SIZE, dim))
        codes = codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        # What no token wrote is not read: scales of a token are poisoned with it.
        unused = np.setdiff1d(np.arange(num_blocks), self.table)
        codes[unused] = np.nan
        self.session.set_cache(0, values, codes.ravel())
        self.session.set_cache_scales(0, values, scales.ravel())
        if self.rows.scales == "head":
            scales = scales[None, :, None]
        return codes.astype(np.float64) * scales[..., None]

    def _set_ints(self, contexts: Array, counts: Array) -> None:
        rows, padding = self.rows, self.rows.padding
        decodes = int((counts == 1).sum())
        table = self.table.copy()
        for row, context in enumerate(contexts):
            if rows.window > 0:  # blocks that the window has left are given up
                table[row, : max(0, context - rows.window + 1) // BLOCK_SIZE] = 0
        self.batch = np.repeat(np.arange(len(counts)), counts)
        self.positions = np.concatenate(
            [context + np.arange(count) for context, count in rows.lengths]
        )
        ints = {
            "counts": [len(counts), self.tokens - padding, 0, decodes, len(counts) - decodes, 0],
            "row": np.arange(len(counts)),
            "query_start_loc": np.cumsum([0, *counts]),
            "seq_lens": contexts + counts,
            "token_batch": np.append(self.batch, [-1] * padding),
            "positions": np.append(self.positions, [0] * padding),
            "slot_mapping": [-1] * self.tokens,  # the cache is filled already
            "block_table": table,
        }
        for name, data in ints.items():
            self.session.set_ints(name, np.ascontiguousarray(data, np.int32))

    def run(
        self,
        *,
        eager: bool,
        backend: _core.AttentionBackend = _core.AttentionBackend.NATIVE,
    ) -> Array:
        self.session.set_options(eager_attention=eager, attention_backend=backend)
        self.session.run(len(self.rows.lengths), self.tokens)
        num, _, dim = self.rows.heads
        return self.session.value(self.out, self.tokens).reshape(-1, num, dim)

    def expected(self, token: int) -> Array:
        """Attention of a token in float64, [heads, dim]."""
        num, kv, dim = self.rows.heads
        row, end = self.batch[token], self.positions[token] + 1
        begin = max(0, end - self.rows.window) if self.rows.window > 0 else 0
        sides = []
        for side in self.cache:
            blocks = side[self.table[row, begin // BLOCK_SIZE : -(-end // BLOCK_SIZE)]]
            seen = blocks.transpose(1, 0, 2, 3).reshape(kv, -1, dim)
            first = begin // BLOCK_SIZE * BLOCK_SIZE
            sides.append(seen[:, begin - first : end - first].repeat(num // kv, 0))
        scores = np.einsum("hd,htd->ht", self.queries[token], sides[0]) * dim**-0.5
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        result: Array = np.einsum("ht,htd->hd", weights, sides[1])
        return result

    def check(self, out: Array, tokens: Array) -> None:
        expected = np.stack([self.expected(token) for token in tokens])
        error = np.abs(out[tokens] - expected).max((1, 2)) / np.abs(expected).max((1, 2))
        worst = int(error.argmax())
        assert error[worst] < TOLERANCE, (tokens[worst], error[worst])
        assert (out[len(self.batch) :] == 0).all()


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_prompts_over_fp8_match_float64(
    native_device: _core.Device, name: str, eager: bool
) -> None:
    batch = Batch(native_device, CASES[name], 1)
    batch.check(batch.run(eager=eager), np.arange(len(batch.batch)))


@pytest.mark.parametrize("prompt", [300, 20])
def test_decode_rows_read_the_cache_beside_prompts_in_scratch(
    native_device: _core.Device, prompt: int
) -> None:
    """By FlashInfer's decode kernel, where there is one; short prompts are not dequantised."""
    rows = Rows(((500, 1), (40, 1), (30, prompt), (0, prompt)), scales="tensor")
    batch = Batch(native_device, rows, 5)
    out = batch.run(eager=True, backend=_core.AttentionBackend.FLASHINFER)
    batch.check(out, np.arange(len(batch.batch)))


def test_keys_that_do_not_fit_at_once_are_cut_by_heads(
    device: str, native_device: _core.Device
) -> None:
    # 32 heads of 256 are 32 KiB a position in bfloat16; on a GPU there is room for 8,192 positions.
    context = 8100 if device == "cuda" else 100
    rows = Rows(((context, 300),), heads=(32, 32, 256))
    batch = Batch(native_device, rows, 3)
    batch.check(batch.run(eager=True), np.array([0, 1, 127, 128, 299]))
