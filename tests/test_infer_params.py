# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What a step derives from its batch, against slow references written from the definitions.

`infer_params` is compared with loops over rows and tokens; the by-table-row view of a batch with
loops over the definitions of PaddlePaddle FastDeploy's get_infer_param, and with the example of its
documentation.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrv1 import _core
from mrv1.errors import InvalidArgumentError
from mrv1.runner import ModelRunner
from serving_tools import BlockPool, greedy, make_prompt, num_blocks, open_runner

Ints = npt.NDArray[np.int32]
Params = dict[str, Ints]

BLOCK = 4
ROWS = 6
TOKENS = 48
MAX_LEN = 64

counters: Counter[str] = Counter()


@dataclasses.dataclass
class ReferenceRow:
    """What the host knows of a row by following it one step at a time."""

    row: int
    tokens: list[int]
    target: int  # tokens known at admission
    blocks: list[int]
    computed: int = 0
    stopped: bool = False

    @property
    def kind(self) -> int:
        """0 decode, 1 extend, 2 prefill: the batch order."""
        if self.stopped or self.computed >= self.target:
            return 0
        return 1 if self.computed > 0 else 2

    def slot(self, position: int) -> int:
        return self.blocks[position // BLOCK] * BLOCK + position % BLOCK


def reference_params(
    batch: list[tuple[ReferenceRow, int]], pad_requests: int, pad_tokens: int
) -> dict[str, list[int]]:
    """infer_params of a batch, before the step has run; "sampled" is left out."""
    order = sorted(range(len(batch)), key=lambda entry: batch[entry][0].kind)
    out: dict[str, list[int]] = {
        name: []
        for name in (
            "row",
            "seq_lens",
            "token_batch",
            "token_ids",
            "positions",
            "slot_mapping",
            "logits_indices",
            "logits_batch",
            "logits_start",
        )
    }
    out["query_start_loc"] = [0]
    out["entry_batch"] = [order.index(entry) for entry in range(len(batch))]
    for place, entry in enumerate(order):
        row, count = batch[entry]
        dead = row.stopped
        out["row"].append(-1 if dead else row.row)
        out["seq_lens"].append(0 if dead else row.computed + count)
        for position in range(row.computed, row.computed + count):
            out["token_batch"].append(-1 if dead else place)
            out["token_ids"].append(0 if dead else row.tokens[position])
            out["positions"].append(0 if dead else position)
            out["slot_mapping"].append(-1 if dead else row.slot(position))
        out["query_start_loc"].append(len(out["token_ids"]))
        draws = dead or row.computed + count >= row.target
        out["logits_start"].append(len(out["logits_indices"]) if draws else -1)
        if draws:
            out["logits_indices"].append(len(out["token_ids"]) - 1)
            out["logits_batch"].append(-1 if dead else place)
    total, logits = len(out["token_ids"]), len(out["logits_indices"])
    kinds = [row.kind for row, _ in batch]
    out["counts"] = [len(batch), total, logits, *(kinds.count(kind) for kind in range(3))]
    for name, fill in (("row", -1), ("seq_lens", 0), ("logits_start", -1)):
        out[name] += [fill] * (pad_requests - len(batch))
    out["query_start_loc"] += [total] * (pad_requests - len(batch))
    for name, fill in (
        ("token_batch", -1),
        ("token_ids", 0),
        ("positions", 0),
        ("slot_mapping", -1),
    ):
        out[name] += [fill] * (pad_tokens - total)
    out["logits_indices"] += [0] * (pad_requests - logits)
    out["logits_batch"] += [-1] * (pad_requests - logits)
    out["logits_place"] = [0] * max(pad_requests, logits)
    return out


def reference_view(
    encoder: list[int],
    decoder: list[int],
    this_time: list[int],
    tables: npt.NDArray[np.int32],
    block_size: int,
    per_decode: int,
    max_tokens: int,
) -> dict[str, list[int]]:
    """The view, from the definitions of its outputs; one list comprehension each."""
    rows = range(len(encoder))
    prefills = [r for r in rows if encoder[r] > 0]
    decodes = [r for r in rows if encoder[r] == 0 and decoder[r] > 0 and this_time[r] > 0]
    live = sorted(prefills + decodes)

    def slot(row: int, position: int) -> int:
        block = int(tables[row, position // block_size])
        return -1 if block <= 0 else block * block_size + position % block_size

    def fill(values: list[int], length: int, value: int = -1) -> list[int]:
        return values + [value] * (length - len(values))

    def lod(lengths: list[int]) -> list[int]:
        sums = [0, *np.cumsum(lengths, dtype=int).tolist()]
        return fill(sums, len(encoder) + 1, sums[-1])

    new = [encoder[r] for r in prefills]
    keys = [encoder[r] + decoder[r] for r in prefills]
    stride = -1
    packed: list[int] = []
    if any(decoder[r] > 0 for r in prefills):
        stride = -(-max(keys) // block_size)
        packed = [int(b) for r in prefills for b in tables[r, :stride]]
    count = len(encoder)
    contexts = [decoder[r] + this_time[r] for r in decodes]
    return {
        "encoder_batch_map": fill(prefills, count),
        "decoder_batch_map": fill(decodes, count),
        "encoder_batch_idx": fill([live.index(r) for r in prefills], count),
        "decoder_batch_idx": fill([live.index(r) for r in decodes], count),
        "encoder_seq_lod": lod(new),
        "decoder_seq_lod": lod([this_time[r] for r in decodes]),
        "encoder_kv_lod": lod(keys),
        "prefix_len": fill([decoder[r] for r in prefills], count),
        "decoder_context_len": fill(contexts, count),
        "decoder_context_len_cache": fill([decoder[r] for r in decodes], count),
        "prefix_block_tables": packed,
        "slot_mapping_enc": fill(
            [slot(r, decoder[r] + i) for r in prefills for i in range(encoder[r])], max_tokens
        ),
        "slot_mapping_dec": fill(
            [
                slot(r, decoder[r] + i) if i < this_time[r] else -1
                for r in decodes
                for i in range(per_decode)
            ],
            count * per_decode,
        ),
        "len_info": [
            len(prefills),
            len(decodes),
            sum(new),
            max(new, default=0),
            max(keys, default=0),
            stride,
            max(contexts, default=0),
        ],
    }


def check_same(actual: Params, expected: dict[str, list[int]]) -> None:
    for name, values in expected.items():
        got = actual[name].tolist()
        if name == "prefix_block_tables":
            got = got[: len(values)]  # the rest of the buffer is not part of the output
        assert got == values, name


# --- the runner ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runners(device: str) -> Iterator[dict[tuple[int, int], ModelRunner]]:
    """Runners with the view on, by padding."""
    opened = {
        padding: open_runner(
            device,
            block_size=BLOCK,
            max_num_seqs=ROWS,
            max_num_batched_tokens=TOKENS,
            max_model_len=MAX_LEN,
            num_kv_blocks=200,
            pad_requests=padding[0],
            pad_tokens=padding[1],
            infer_param_view=True,
            graph_mode="eager",  # no padding but the one asked for
        )
        for padding in ((0, 0), (ROWS, TOKENS), (3, 20))
    }
    yield opened
    for runner in opened.values():
        runner.close()


@pytest.fixture(scope="module")
def first_token(device: str) -> int:
    """What STOPPING generates first: as a stop token it ends the row while steps run ahead."""
    with open_runner(device) as runner:
        row = runner.add_row(STOPPING, greedy(1), block_ids=[1, 2])
        token = runner.execute([(row, len(STOPPING))]).result()[0].token_id
        assert token is not None
        return token


STOPPING = make_prompt(5, 77)

row_draws = st.tuples(
    st.sampled_from(["fresh", "prefix", "chunked", "decoding", "stopped"]),
    st.integers(1, 9),  # chunk of the compared step
    st.integers(0, 10**6),
)


@settings(max_examples=120)
@given(
    padding=st.sampled_from([(0, 0), (ROWS, TOKENS), (3, 20)]),
    draws=st.lists(row_draws, min_size=1, max_size=ROWS),
    shuffle=st.randoms(use_true_random=False),
)
def check_random_batch(
    runners: dict[tuple[int, int], ModelRunner],
    first_token: int,
    padding: tuple[int, int],
    draws: list[tuple[str, int, int]],
    shuffle: random.Random,
) -> None:
    runner = runners[padding]
    added: list[int] = []
    try:
        compare_batch(runner, first_token, padding, draws, shuffle, added)
    finally:
        for row in added:
            runner.free_row(row)


def compare_batch(
    runner: ModelRunner,
    first_token: int,
    padding: tuple[int, int],
    draws: list[tuple[str, int, int]],
    shuffle: random.Random,
    added: list[int],
) -> None:
    """Brings rows to where the draws say, then compares what a step over them derives."""
    pool = BlockPool(runner)
    np.random.default_rng(draws[0][2]).shuffle(pool.free)
    rows: list[tuple[ReferenceRow, int]] = []
    setup: list[tuple[ReferenceRow, int]] = []
    for kind, chunk, seed in draws:
        prompt = STOPPING if kind == "stopped" else make_prompt(chunk + 1 + seed % 8, seed)
        blocks = pool.take(num_blocks(len(prompt) + 8, BLOCK))
        stop = [first_token] if kind == "stopped" else []
        known = 1 + seed % (len(prompt) - 1) if kind == "prefix" else 0
        row = runner.add_row(
            prompt, greedy(8, stop_token_ids=stop), block_ids=blocks, num_computed=known
        )
        added.append(row)
        state = ReferenceRow(row, list(prompt), len(prompt), blocks, known)
        if kind == "chunked":
            setup.append((state, 1 + seed % (len(prompt) - 1)))
        elif kind in ("decoding", "stopped"):
            setup.append((state, len(prompt)))
        rows.append((state, chunk))
    for state, count in setup:
        output = runner.execute([(state.row, count)]).result()[0]
        state.computed = count
        state.stopped = output.finish_reason == "stop"
        if output.token_id is not None:
            state.tokens.append(output.token_id)
    rows = [(state, max(1, min(chunk, state.target - state.computed))) for state, chunk in rows]
    shuffle.shuffle(rows)
    while sum(count for _, count in rows) > TOKENS:
        rows.pop()
    outputs = runner.execute([(state.row, count) for state, count in rows]).result()
    params = runner.infer_params()
    check_same(params, reference_params(rows, *padding))

    # Tokens that were drawn are those that the outputs report, at the entry's logits row.
    places = params["entry_batch"]
    for entry, output in enumerate(outputs):
        start = params["logits_start"][places[entry]]
        drawn = -1 if start < 0 else params["sampled"][start]
        assert drawn == (-1 if output.token_id is None else output.token_id)
        assert output.masked == rows[entry][0].stopped

    encoder, decoder, this_time = [0] * ROWS, [0] * ROWS, [0] * ROWS
    tables = np.zeros((ROWS, num_blocks(MAX_LEN, BLOCK)), np.int32)
    for state, count in rows:
        tables[state.row, : len(state.blocks)] = state.blocks
        if not state.stopped:
            encoder[state.row] = count if state.kind else 0
            decoder[state.row] = state.computed
            this_time[state.row] = count
    check_same(params, reference_view(encoder, decoder, this_time, tables, BLOCK, 1, TOKENS))

    kinds = params["counts"][3:].tolist()
    counters["batches"] += 1
    counters["mixed"] += all(kinds)
    counters["masked"] += any(state.stopped for state, _ in rows)
    counters["reordered"] += places.tolist() != sorted(places.tolist())
    for draw, _, _ in draws:
        counters[draw] += 1


def test_random_batches(runners: dict[tuple[int, int], ModelRunner], first_token: int) -> None:
    counters.clear()
    check_random_batch(runners, first_token)
    for name, least in (("mixed", 20), ("masked", 30), ("reordered", 40)):
        assert counters[name] >= least, counters
    for kind in ("fresh", "prefix", "chunked", "decoding", "stopped"):
        assert counters[kind] >= 30, counters


def test_order_is_decode_extend_prefill_and_stable(
    runners: dict[tuple[int, int], ModelRunner],
) -> None:
    runner = runners[0, 0]
    pool = BlockPool(runner)
    prompts = [make_prompt(6, seed) for seed in range(6)]
    rows = [runner.add_row(p, greedy(8), block_ids=pool.take(4)) for p in prompts]
    runner.execute([(rows[1], 3), (rows[4], 6), (rows[5], 6), (rows[2], 5)]).result()
    order = [rows[i] for i in (0, 5, 1, 3, 4, 2)]
    runner.execute([(row, 1) for row in order]).result()
    params = runner.infer_params()
    expected = [rows[i] for i in (5, 4, 1, 2, 0, 3)]
    assert params["row"].tolist() == expected
    assert params["entry_batch"].tolist() == [expected.index(row) for row in order]
    assert params["counts"].tolist() == [6, 6, 3, 2, 2, 2]
    for row in rows:
        runner.free_row(row)


# --- the view by hand ----------------------------------------------------------------------------


def view_of(
    native_device: _core.Device,
    encoder: list[int],
    decoder: list[int],
    this_time: list[int],
    tables: npt.NDArray[np.int32],
    **sizes: int,
) -> Params:
    arrays: Params = _core.infer_param_view(
        native_device,
        np.array(encoder, np.int32),
        np.array(decoder, np.int32),
        np.array(this_time, np.int32),
        tables,
        **sizes,
    )
    return arrays


def test_view_of_the_documented_example(native_device: _core.Device) -> None:
    encoder, decoder, this_time = [100, 0, 0, 0, 300], [0, 5, 0, 25, 64], [100, 1, 0, 1, 300]
    tables = np.arange(1, 5 * 8 + 1, dtype=np.int32).reshape(5, 8)
    view = view_of(native_device, encoder, decoder, this_time, tables, block_size=64)
    assert view["encoder_batch_map"].tolist()[:2] == [0, 4]
    assert view["decoder_batch_map"].tolist()[:2] == [1, 3]
    assert view["encoder_batch_idx"].tolist()[:2] == [0, 3]
    assert view["decoder_batch_idx"].tolist()[:2] == [1, 2]
    assert view["encoder_seq_lod"].tolist()[:3] == [0, 100, 400]
    assert view["encoder_kv_lod"].tolist()[:3] == [0, 100, 464]
    assert view["decoder_seq_lod"].tolist() == [0, 1, 2, 2, 2, 2]
    assert view["prefix_len"].tolist()[:2] == [0, 64]
    assert view["decoder_context_len"].tolist()[:2] == [6, 26]
    assert view["decoder_context_len_cache"].tolist()[:2] == [5, 25]
    # The longest prefill row has 300 + 64 keys: six blocks of 64, and rows of six ids.
    assert view["len_info"].tolist() == [2, 2, 400, 300, 364, 6, 26]
    assert view["prefix_block_tables"].tolist()[:12] == [1, 2, 3, 4, 5, 6, 33, 34, 35, 36, 37, 38]
    assert view["slot_mapping_enc"].tolist()[:100] == list(range(64, 164))
    assert view["slot_mapping_enc"].tolist()[100:400] == list(range(34 * 64, 34 * 64 + 300))
    assert (view["slot_mapping_enc"][400:] == -1).all()
    assert view["slot_mapping_dec"].tolist() == [9 * 64 + 5, 25 * 64 + 25, -1, -1, -1]
    check_same(view, reference_view(encoder, decoder, this_time, tables, 64, 1, 8192))


@st.composite
def view_inputs(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], Ints, int, int]:
    block_size = draw(st.sampled_from([1, 2, 5, 16, 64]))
    per_decode = draw(st.integers(1, 4))
    blocks = draw(st.integers(1, 6))
    room = blocks * block_size
    encoder, decoder, this_time = [], [], []
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["prefill", "prefix", "decode", "idle", "empty"]))
        fresh = cached = query = 0
        if kind == "prefill":
            fresh = draw(st.integers(1, room))
        elif kind == "prefix" and room > 1:
            cached = draw(st.integers(1, room - 1))
            fresh = draw(st.integers(1, room - cached))
        elif kind == "decode" and room > 1:
            query = draw(st.integers(1, min(per_decode, room - 1)))
            cached = draw(st.integers(1, room - query))
        elif kind == "idle":  # known to the table, not in this step
            cached = draw(st.integers(0, room))
        encoder.append(fresh)
        decoder.append(cached)
        this_time.append(fresh or query)
    seed = draw(st.integers(0, 2**32 - 1))
    # With null and unset ids, which give no slot.
    tables = np.random.default_rng(seed).integers(-1, 50, (len(encoder), blocks), np.int32)
    return encoder, decoder, this_time, tables, block_size, per_decode


@settings(max_examples=300)
@given(inputs=view_inputs())
def check_random_view(
    native_device: _core.Device, inputs: tuple[list[int], list[int], list[int], Ints, int, int]
) -> None:
    encoder, decoder, this_time, tables, block_size, per_decode = inputs
    max_tokens = sum(encoder) + 3
    view = view_of(
        native_device,
        encoder,
        decoder,
        this_time,
        tables,
        block_size=block_size,
        query_per_decode=per_decode,
        max_tokens=max_tokens,
    )
    expected = reference_view(
        encoder, decoder, this_time, tables, block_size, per_decode, max_tokens
    )
    check_same(view, expected)
    prefills, decodes, *_, stride, _ = expected["len_info"]
    counters["prefix"] += stride > 0
    counters["no prefix"] += prefills > 0 and stride < 0
    counters["mixed"] += prefills > 0 and decodes > 0
    counters["empty"] += prefills + decodes == 0
    counters["null"] += -1 in expected["slot_mapping_enc"][: sum(encoder)]


def test_random_views(native_device: _core.Device) -> None:
    counters.clear()
    check_random_view(native_device)
    for name, least in (
        ("prefix", 50),
        ("no prefix", 20),
        ("mixed", 50),
        ("empty", 5),
        ("null", 20),
    ):
        assert counters[name] >= least, counters


def test_view_refuses_what_does_not_fit(native_device: _core.Device) -> None:
    tables = np.ones((2, 2), np.int32)
    good: dict[str, Any] = {
        "encoder": [4, 0],
        "decoder": [0, 3],
        "this_time": [4, 1],
        "tables": tables,
    }
    for change, sizes, message in (
        ({"encoder": [9, 0]}, {}, "row 0 is longer than its block table"),
        ({"decoder": [0, 8]}, {}, "row 1 is longer than its block table"),
        ({"decoder": [0, -1]}, {}, "row 1 has a negative length"),
        ({"this_time": [4, 2]}, {}, "row 1 decodes 2 tokens, at most 1"),
        ({"this_time": [4]}, {}, "one length a row"),
        ({"tables": np.ones((3, 2), np.int32)}, {}, "block_tables must be"),
        ({"tables": np.ones(4, np.int32)}, {}, "block_tables must be"),
        ({}, {"max_tokens": 3}, "4 prefill tokens exceed max_tokens 3"),
        ({}, {"block_size": 0}, "sizes must be positive"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            view_of(native_device, **{**good, **change}, **{"block_size": 4, **sizes})
