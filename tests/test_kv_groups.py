# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Layers with different windows: groups, places of their blocks, and what a row may hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import test_ops_parity as parity
from mrv1 import _core
from mrv1.builder import Builder
from mrv1.errors import InvalidArgumentError


def program(windows: list[int], kv_heads: int = 1, last_kv_heads: int = 1) -> _core.Program:
    wired = _core.Program("float32")
    for layer, window in enumerate(windows):
        heads = last_kv_heads if layer == len(windows) - 1 else kv_heads
        qkv = wired.input(f"qkv{layer}", (2 + 2 * heads) * 8)
        wired.attention(
            qkv,
            num_heads=2,
            num_kv_heads=heads,
            head_dim=8,
            kv_layer=layer,
            scale=1.0,
            window=window,
        )
    return wired


@pytest.mark.parametrize(
    ("windows", "groups", "places"),
    [
        ([0, 0, 0], [0], [(0, 0), (0, 1), (0, 2)]),
        ([8, 8], [8], [(0, 0), (0, 1)]),
        ([8, 0, 8, 0], [8, 0], [(0, 0), (1, 0), (0, 1), (1, 1)]),
        # Five of one kind to one of the other: five groups of one layer each.
        ([4, 4, 4, 4, 4, 0], [4, 4, 4, 4, 4, 0], [(g, 0) for g in range(6)]),
        # The last group of a kind may be short.
        (
            [4, 4, 4, 0, 4, 4, 0],
            [4, 4, 4, 0],
            [(0, 0), (0, 1), (1, 0), (3, 0), (1, 1), (2, 0), (3, 1)],
        ),
    ],
)
def test_layers_share_groups_of_equal_size(
    windows: list[int], groups: list[int], places: list[tuple[int, int]]
) -> None:
    assert program(windows).kv_layout == (groups, places)


def test_layers_of_several_groups_have_equal_heads() -> None:
    assert program([0, 0], kv_heads=1, last_kv_heads=2).kv_layout[0] == [0]
    with pytest.raises(InvalidArgumentError, match="equal key/value heads, not 2 of 8 and 1 of 8"):
        _ = program([8, 0], kv_heads=1, last_kv_heads=2).kv_layout


# --- attention and cache write of several groups ------------------------------------------------

WINDOWS = ("w", "none", "w")  # two groups of one window, and one without


@pytest.mark.parametrize("dtype", parity.DTYPES)
@pytest.mark.parametrize("kernels", parity.ATTENTION_OPTIONS)
@settings(max_examples=parity.EXAMPLES)
@given(draw=st.data(), seed=st.integers(0, 2**32 - 1))
def test_each_group_reads_and_writes_its_own_blocks(
    native_device: _core.Device, kernels: str, dtype: str, draw: st.DataObject, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    heads = parity.draw_heads(draw)
    block_size = draw.draw(st.sampled_from([4, 16, 32]))
    window = draw.draw(st.sampled_from([1, 7, 16, 40, 100]))
    softcap = draw.draw(st.sampled_from([0.0, 5.0]))
    lengths = draw.draw(
        st.lists(st.tuples(st.integers(0, 90), st.integers(1, 12)), min_size=1, max_size=4)
    )
    lengths.sort(key=lambda length: length[1] > 1)  # decode rows come first
    rows, tokens = len(lengths), sum(query for _, query in lengths)
    windows = [window if kind == "w" else 0 for kind in WINDOWS]

    wired = _core.Program(dtype)
    values, outs = [], []
    for layer, seen in enumerate(windows):
        values.append(wired.input(f"qkv{layer}", heads.cols))
        outs.append(
            wired.attention(
                values[-1], num_heads=heads.num, num_kv_heads=heads.kv, head_dim=heads.dim,
                kv_layer=layer, scale=heads.dim**-0.5, window=seen, softcap=softcap,
            )
        )  # fmt: skip
        wired.output(outs[-1])
    groups, places = wired.kv_layout
    assert groups == [window, window, 0] and [group for group, _ in places] == [0, 2, 1]

    # One pool of ids. In the caches all is poison that a layer's own group has not written.
    needed = [-(-(context + query) // block_size) for context, query in lengths]
    num_blocks = len(groups) * sum(needed) + 1
    ids = iter(rng.permutation(num_blocks - 1) + 1)
    table = np.zeros((len(groups), rows, max(needed)), np.int32)
    for group in range(len(groups)):
        for row, count in enumerate(needed):
            table[group, row, :count] = [next(ids) for _ in range(count)]
    # FlashInfer reads the null block, and rows past the end, and multiplies them by 0.
    eager = "eager_attention" in parity.ATTENTION_OPTIONS[kernels]
    poison = 1e4 if eager else np.nan
    starts = np.cumsum([0] + [query for _, query in lengths])
    positions = np.concatenate([np.arange(c, c + q) for c, q in lengths])
    batch = np.repeat(np.arange(rows), [query for _, query in lengths])
    slots = table[:, batch, positions // block_size] * block_size + positions % block_size
    session = _core.ProgramSession(
        native_device, wired, max_requests=rows, max_tokens=tokens, num_blocks=num_blocks,
        block_size=block_size, max_blocks=table.shape[2],
    )  # fmt: skip
    session.set_options(**parity.ATTENTION_OPTIONS[kernels])
    expected, fresh = [], []
    dropped = table.copy()
    for layer, seen in enumerate(windows):
        how = parity.Scores(heads.dim**-0.5, softcap, seen)
        group = places[layer][0]
        data = rng.standard_normal((tokens, heads.cols))
        session.set_value(values[layer], data.astype(np.float32))
        q, *new = parity.split(parity.rounded(data, dtype), heads)
        fresh.append(new)
        known: list[list[np.ndarray]] = [[], []]
        for side in range(2):
            cache = np.full((num_blocks, heads.kv, block_size, heads.dim), poison)
            for row, (context, _) in enumerate(lengths):
                old = parity.rounded(rng.standard_normal((context, heads.kv, heads.dim)), dtype)
                at = np.arange(context)
                cache[table[group, row, at // block_size], :, at % block_size] = old
                own = slice(starts[row], starts[row + 1])
                known[side].append(np.concatenate([old, new[side][own]]))
                left = how.first(context) // block_size
                cache[table[group, row, :left]] = np.nan
                dropped[group, row, :left] = 0
            session.set_cache(layer, bool(side), cache.astype(np.float32).reshape(-1))
        expected.append(parity.attention_reference(q, *known, positions, batch, how))
    decodes = sum(query == 1 for _, query in lengths)
    ints = {
        "counts": np.array([rows, tokens, 0, decodes, rows - decodes, 0]),
        "row": np.arange(rows),
        "query_start_loc": starts,
        "seq_lens": np.array([context + query for context, query in lengths]),
        "token_batch": batch,
        "positions": positions,
        "slot_mapping": slots.reshape(-1),
        "block_table": dropped.reshape(-1),
    }
    for name, numbers in ints.items():
        session.set_ints(name, np.ascontiguousarray(numbers, dtype=np.int32))
    session.run(rows, tokens)
    for layer, out in enumerate(outs):
        actual = session.value(out, tokens).astype(np.float64)
        parity.check_close(
            actual,
            expected[layer].reshape(tokens, -1),
            parity.TABLE["paged_attention"].tolerance[dtype],
        )
        own = slots[places[layer][0]]
        for side in range(2):
            shape = (num_blocks, heads.kv, block_size, heads.dim)
            cache = session.cache(layer, bool(side)).reshape(shape)
            np.testing.assert_array_equal(
                cache[own // block_size, :, own % block_size], fresh[layer][side]
            )
    session.close()


# --- rows of the runner -------------------------------------------------------------------------

BLOCK, WINDOW, VOCAB = 4, 6, 50


def windowed_model(dtype: str) -> _core.Program:
    """Three layers, two of them with a window."""
    p = Builder(dtype)
    hidden, heads, dim = 32, 4, 8
    table = p.matrix("embed", VOCAB, hidden)
    rope = p.rope_table([0.5, 0.1], factor=1.2, interleaved=True)
    x = p.embedding(table, scale=3.0)
    for index, seen in enumerate((WINDOW, 0, WINDOW)):
        with p.layer(index, f"{index}."):
            normed = p.rms_norm(x, p.vector("norm", hidden, offset=1.0), 1e-6)
            qkv = p.linear(normed, p.fused(hidden, ("q", heads * dim), ("kv", heads * dim)))
            mixed = p.attention(
                qkv, num_heads=heads, num_kv_heads=2, head_dim=dim, kv_layer=index, rope=rope,
                window=seen, softcap=4.0,
            )  # fmt: skip
            x = p.linear(mixed, p.matrix("o", hidden, heads * dim), residual=x)
            gate_up = p.linear(x, p.fused(hidden, ("gate", 32), ("up", 32)))
            x = p.linear(p.gelu_mul(gate_up), p.matrix("down", hidden, 32), residual=x)
    p.logits(x, table, softcap=20.0)
    p.program.fuse()
    return p.program


def windowed_runner(device: _core.Device, dtype: str, num_blocks: int) -> _core.ModelRunner:
    config = _core.RunnerConfig()
    config.max_num_seqs, config.max_num_batched_tokens = 4, 64
    config.max_model_len, config.block_size = 64, BLOCK
    config.num_blocks, config.batch_invariant = num_blocks, True
    runner = _core.ModelRunner(device, windowed_model(dtype), config)
    for weight in range(len(runner.program.weights)):
        runner.fill_random(weight, 3, 0.3)
    assert runner.kv_windows == [WINDOW, WINDOW, 0]
    return runner


def row_spec(prompt: list[int], blocks: list[list[int]]) -> _core.RowSpec:
    spec = _core.RowSpec()
    spec.token_ids, spec.prompt_len, spec.max_tokens = prompt, len(prompt), 30
    spec.temperature, spec.block_ids = 0.0, blocks
    return spec


def step_logits(runner: _core.ModelRunner, *batch: tuple[int, int]) -> list[np.ndarray]:
    assert not runner.result(runner.execute(list(batch))).error
    return [runner.logits(item) for item in range(len(batch))]


@pytest.mark.parametrize("dtype", parity.DTYPES)
def test_dropped_blocks_may_serve_other_rows(native_device: _core.Device, dtype: str) -> None:
    prompt = [int(t) for t in np.random.default_rng(1).integers(0, VOCAB, 30)]
    other = [int(t) for t in np.random.default_rng(2).integers(0, VOCAB, 21)]

    runner = windowed_runner(native_device, dtype, 64)
    row, _ = runner.add_row(
        row_spec(prompt, [list(range(1 + 12 * g, 13 + 12 * g)) for g in (0, 1, 2)])
    )
    wanted = step_logits(runner, (row, 30))
    wanted += [step_logits(runner, (row, 1))[0] for _ in range(8)]
    runner.close()

    # The same in chunks, with blocks of the windows taken as they are needed and given back when
    # they are not; the other row writes over them.
    runner = windowed_runner(native_device, dtype, 30)
    free = list(range(1, 30))
    held: dict[int, list[list[int]]] = {}
    gone: dict[int, list[int]] = {}

    def grow(row: int, computed: int, count: int) -> None:
        for group in range(3):
            if group < 2:
                left = max(0, computed - WINDOW + 1) // BLOCK
                first = gone[row][group]
                if left > first:
                    runner.drop_blocks(row, group, first, left - first)
                    free.extend(held[row][group][first:left])
                    gone[row][group] = left
            missing = -(-(computed + count) // BLOCK) - len(held[row][group])
            if missing > 0:
                taken, free[:missing] = free[:missing], []
                assert len(taken) == missing
                runner.append_blocks(row, group, taken)
                held[row][group] += taken

    def add(tokens: list[int]) -> int:
        row, _ = runner.add_row(row_spec(tokens, []))
        held[row], gone[row] = [[], [], []], [0, 0, 0]
        return row

    row = add(prompt)
    actual, computed = [], 0
    for count in (7, 1, 12, 10):
        grow(row, computed, count)
        actual = step_logits(runner, (row, count))
        computed += count
    second = add(other)
    for step in range(8):
        grow(row, computed, 1)
        chunk = min(5, len(other) - 5 * step)
        if chunk > 0:
            grow(second, 5 * step, chunk)
        batch = [(row, 1), (second, chunk)] if chunk > 0 else [(row, 1)]
        actual.append(step_logits(runner, *batch)[0])
        computed += 1
    assert sum(gone[row]) >= 12 and sum(gone[second]) > 0
    for got, want in zip(actual, wanted, strict=True):
        np.testing.assert_array_equal(got, want)

    lowest = (computed - WINDOW + 1) // BLOCK
    for bad, message in (
        (lambda: runner.drop_blocks(row, 3, 0, 1), "KV group 3 is outside"),
        (lambda: runner.drop_blocks(row, 2, 0, 1), "still reads"),
        (lambda: runner.drop_blocks(row, 0, lowest, 1), "still reads"),
        (lambda: runner.drop_blocks(row, 0, 0, 99), "are outside the row's"),
        (lambda: runner.append_blocks(row, 0, [held[row][2][0]]), "in the row twice"),
        (lambda: runner.append_blocks(row, -1, [free[0]]), "KV group -1 is outside"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            bad()
    np.testing.assert_array_equal(step_logits(runner, (row, 1))[0].shape, (VOCAB,))
    runner.close()


def test_layers_of_a_slot_share_memory(native_device: _core.Device) -> None:
    config = _core.RunnerConfig()
    config.max_num_seqs = config.max_num_batched_tokens = 4
    config.max_model_len, config.block_size = 64, BLOCK
    plan = _core.ModelRunner.plan_memory(windowed_model("float32"), config, native_device)
    assert plan["per_block"] == 2 * BLOCK * 2 * 8 * 4  # of one layer
