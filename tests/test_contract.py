# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The contract of the step, line by line: `test_line_<n>_...` is line n of docs/architecture.md.

What line 10 says of graphs is tested in test_graphs.py; here, that padding keeps the rules of
line 3 and changes no token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrv1 import _core
from mrv1.engine import Engine, RequestUpdate
from mrv1.errors import InternalError, InvalidArgumentError, Mrv1Error, RequestError
from mrv1.runner import ModelRunner, PendingStep
from mrv1.sampling_params import SamplingParams
from serving_tools import (
    VOCAB,
    BlockPool,
    SlowReference,
    Tensors,
    copy_model,
    greedy,
    make_prompt,
    num_blocks,
    open_runner,
    run_to_end,
    seeded,
    tokens_of,
)

Open = Callable[..., ModelRunner]


@pytest.fixture
def opened(device: str) -> Iterator[Open]:
    """Opens runners that are closed at the end of the test."""
    runners = []

    def open_one(**options: Any) -> ModelRunner:
        runners.append(open_runner(device, **options))
        return runners[-1]

    yield open_one
    for runner in runners:
        runner.close()


@pytest.fixture(scope="module")
def reference(device: str) -> Iterator[SlowReference]:
    slow = SlowReference(device)
    yield slow
    slow.close()


def open_engine(device: str, models_dir: Path, **options: Any) -> Engine:
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "num_kv_blocks": 65,
        "num_threads": 1,
        "background": False,  # each step is one step, of the test's own
    }
    return Engine(models_dir / "llama2", device=device, progress=False, **{**defaults, **options})


def drain(engine: Engine) -> dict[str, list[RequestUpdate]]:
    updates: dict[str, list[RequestUpdate]] = {}
    while engine.has_unfinished():
        for update in engine.step():
            updates.setdefault(update.request_id, []).append(update)
    return updates


def ids_of(updates: list[RequestUpdate]) -> list[int]:
    return [token for update in updates for token in update.token_ids]


# --- 1: stable rows, generations -----------------------------------------------------------------


def test_line_1_row_is_stable_and_outputs_are_in_batch_order(
    opened: Open, reference: SlowReference
) -> None:
    runner = opened()
    pool = BlockPool(runner)
    prompts = [make_prompt(length, seed=length) for length in (5, 9, 3)]
    rows = [runner.add_row(p, greedy(12), block_ids=pool.take(num_blocks(24))) for p in prompts]
    assert sorted(rows) == [0, 1, 2]
    runner.execute([])  # sends what is staged
    generations = [runner.row_state(row).generation for row in rows]
    got: dict[int, list[int]] = {row: [] for row in rows}
    first = True
    shuffle = random.Random(3)
    for _ in range(12):
        batch = [(row, len(p) if first else 1) for row, p in zip(rows, prompts, strict=True)]
        shuffle.shuffle(batch)
        outputs = runner.execute(batch).result()
        first = False
        assert [output.row for output in outputs] == [row for row, _ in batch]
        for output in outputs:
            assert output.generation == generations[rows.index(output.row)]
            assert output.token_id is not None
            got[output.row].append(output.token_id)
    for row, prompt in zip(rows, prompts, strict=True):
        assert got[row] == reference(prompt, greedy(12))[0]


def test_line_1_output_of_the_old_request_is_not_the_new_ones(
    opened: Open, reference: SlowReference
) -> None:
    """A row is given to another request while a step of the first one is in flight."""
    runner = opened(max_num_seqs=1)
    pool = BlockPool(runner)
    old, new = make_prompt(20, 1), make_prompt(6, 2)
    row = runner.add_row(old, greedy(4), block_ids=pool.take(6))
    in_flight = runner.execute([(row, 20)])
    decoding = runner.execute([(row, 1)])
    runner.free_row(row)
    again = runner.add_row(new, greedy(4), block_ids=pool.take(6))
    assert again == row
    # The old handle is refused, everywhere, and nothing happens to the new request.
    for call in (
        lambda: runner.execute([(row, 6)]),
        lambda: runner.append_blocks(row, [60]),
        lambda: runner.free_row(row),
    ):
        with pytest.raises(InvalidArgumentError, match="belongs to another request now"):
            call()
    step = runner.execute([(again, 6)])
    expected_old, expected_new = reference(old, greedy(4))[0], reference(new, greedy(4))[0]
    first, second, third = (pending.result()[0] for pending in (in_flight, decoding, step))
    assert (first.row, second.row, third.row) == (row, row, row)
    assert first.generation == second.generation
    assert third.generation == first.generation + 1
    assert [first.token_id, second.token_id] == expected_old[:2]
    assert third.token_id == expected_new[0]


def test_line_1_row_that_comes_and_goes_between_steps(
    opened: Open, reference: SlowReference
) -> None:
    """Added and freed with no step between: the device hears of both, in order."""
    runner = opened(max_num_seqs=1)
    row = runner.add_row(make_prompt(20, 1), greedy(4), block_ids=[9, 8, 7, 6, 5])
    runner.free_row(row)
    runner.execute([]).result()
    assert runner.row_state(row).phase == _core.RowPhase.FREE
    for seed in range(3):
        if seed:
            runner.free_row(row)
        row = runner.add_row(make_prompt(4 + seed, seed), greedy(4), block_ids=[3, 4])
    output = runner.execute([(row, 6)]).result()[0]
    assert output.token_id == reference(make_prompt(6, 2), greedy(4))[0][0]


def test_line_1_a_name_is_taken_until_its_last_update(device: str, models_dir: Path) -> None:
    with open_engine(device, models_dir) as engine:
        engine.add_request("a", make_prompt(5, 1), greedy(8))
        engine.step()
        assert engine.abort("a")
        with pytest.raises(RequestError, match="'a'.*unfinished request has this id"):
            engine.add_request("a", make_prompt(5, 2), greedy(8))
        (last,) = [update for update in engine.step() if update.finish_reason]
        assert (last.request_id, last.finish_reason) == ("a", "abort")
        engine.add_request("a", make_prompt(5, 2), greedy(8))
        updates = drain(engine)["a"]
        assert len(ids_of(updates)) == 8 and updates[-1].finish_reason == "length"
        engine.check_idle()


def test_line_1_a_name_is_free_after_a_stop_string(device: str, models_dir: Path) -> None:
    """The native request behind it is aborted in flight; its end must not reach the new one."""
    with open_engine(device, models_dir) as engine:
        prompt = make_prompt(5, 1)
        engine.add_request("a", prompt, greedy(12))
        text = "".join(update.text for update in drain(engine)["a"])
        stop = text[3:5]
        engine.add_request("a", prompt, greedy(12, stop=stop))
        updates: list[RequestUpdate] = []
        while not updates or updates[-1].finish_reason is None:
            updates += engine.step()
        assert updates[-1].finish_reason == "stop" and updates[-1].stop_reason == stop
        engine.add_request("a", make_prompt(7, 9), greedy(12))
        updates = drain(engine)["a"]
        assert len(ids_of(updates)) == 12 and updates[-1].finish_reason == "length"
        engine.check_idle()


# --- 2: the device holds the truth ---------------------------------------------------------------


def test_line_2_host_runs_ahead_of_a_row_that_stopped(
    opened: Open, reference: SlowReference
) -> None:
    runner = opened()
    prompt = make_prompt(7, 4)
    tokens = reference(prompt, greedy(12))[0]
    stop_at = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    params = greedy(12, stop_token_ids=[tokens[stop_at]])
    row = runner.add_row(prompt, params, block_ids=range(1, 9))
    pending = [runner.execute([(row, 7)])]
    pending += [runner.execute([(row, 1)]) for _ in range(11)]
    state = runner.row_state(row)
    # The host launched 7 + 11 tokens; the device computed up to the stop token and no further.
    assert state.num_computed == 7 + stop_at
    assert state.total_len == 7 + stop_at + 1
    assert state.last_token == tokens[stop_at]
    assert (state.prompt_len, state.prefill_target) == (7, 7)
    assert state.phase == _core.RowPhase.FINISHED
    assert state.finish_reason == _core.FinishReason.STOP
    outputs = [step.result()[0] for step in pending]
    assert [o.token_id for o in outputs[: stop_at + 1]] == tokens[: stop_at + 1]
    assert [o.masked for o in outputs] == [i > stop_at for i in range(12)]
    assert outputs[stop_at].finish_reason == "stop"
    for output in outputs[stop_at + 1 :]:
        assert (output.token_id, output.finish_reason) == (None, None)
        assert output.num_computed == 0
    with pytest.raises(InvalidArgumentError, match="has reached its length of 19"):
        runner.execute([(row, 1)])


def test_line_2_work_of_the_host_is_what_changed(opened: Open) -> None:
    """A steady decode step sends a header and one entry a row, whatever the rows hold."""
    runner = opened(num_kv_blocks=256)
    pool = BlockPool(runner)
    rows = [
        runner.add_row(make_prompt(n, n), greedy(40), block_ids=pool.take(num_blocks(n + 40)))
        for n in (4, 90, 120)
    ]
    runner.execute([(row, n) for row, n in zip(rows, (4, 90, 120), strict=True)]).result()
    sizes = []
    for _ in range(10):
        before = runner.stats()
        runner.execute([(row, 1) for row in rows]).result()
        after = runner.stats()
        sizes.append(
            (
                after["control_bytes"] - before["control_bytes"],
                after["output_bytes"] - before["output_bytes"],
                after["steps"] - before["steps"],
            )
        )
    assert len(set(sizes)) == 1
    control, output, steps = sizes[0]
    assert steps == 1 and control <= 128 + 16 * 3 and output == 64 + (32 + 4) * 3


# --- 3: slots and padding ------------------------------------------------------------------------


def check_padding(params: dict[str, np.ndarray], requests: int, tokens: int) -> None:
    """The rules of padding, beyond `requests` and `tokens`."""
    starts = params["query_start_loc"]
    assert starts[0] == 0 and (np.diff(starts) >= 0).all()
    assert (starts[requests:] == tokens).all()
    assert (params["seq_lens"][requests:] == 0).all()
    assert (params["row"][requests:] == -1).all()
    for name, value in (("slot_mapping", -1), ("token_batch", -1), ("token_ids", 0)):
        assert (params[name][tokens:] == value).all(), name
    assert (params["positions"][tokens:] == 0).all()
    logits = int(params["counts"][2])
    assert (params["logits_batch"][logits:] == -1).all()
    assert (params["logits_indices"][logits:] == 0).all()
    assert (params["logits_place"][logits:] == 0).all()
    assert (params["logits_start"][requests:] == -1).all()
    assert (params["sampled"][logits:] == -1).all()


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_line_3_slot_formula(opened: Open, block_size: int) -> None:
    runner = opened(block_size=block_size, num_kv_blocks=200)
    blocks = list(range(1, 200))
    random.Random(block_size).shuffle(blocks)
    tables: dict[int, list[int]] = {}
    lengths = {}
    for index, length in enumerate((5, 23, 17)):
        count = num_blocks(length + 4, block_size)
        table = [blocks.pop() for _ in range(count)]
        row = runner.add_row(make_prompt(length, index), greedy(4), block_ids=table[:1])
        runner.append_blocks(row, table[1:])
        tables[row], lengths[row] = table, length
    done = dict.fromkeys(tables, 0)
    for _ in range(6):
        batch = []
        for row, length in lengths.items():
            left = length - done[row]
            batch.append((row, min(left, 9) if left > 0 else 1))
        runner.execute(batch).result()
        params = runner.infer_params()
        sizes = dict(batch)
        for place, row in enumerate(params["row"]):
            first, last = params["query_start_loc"][place : place + 2]
            positions = np.arange(done[row], done[row] + sizes[row])
            assert last - first == sizes[row]
            assert params["positions"][first:last].tolist() == positions.tolist()
            expected = [
                tables[row][p // block_size] * block_size + p % block_size for p in positions
            ]
            assert params["slot_mapping"][first:last].tolist() == expected
            assert params["seq_lens"][place] == done[row] + sizes[row]
        for row, tokens in batch:
            done[row] += tokens
        if max(done[row] - lengths[row] for row in done) >= 3:
            break


def test_line_3_null_block_and_missing_blocks_are_refused(opened: Open) -> None:
    runner = opened(num_kv_blocks=16, graph_mode="eager")  # slots are looked at: no padding
    prompt = make_prompt(6, 1)
    for bad in (0, -1, 16):
        with pytest.raises(InvalidArgumentError, match=rf"block id {bad} is outside \[1, 16\)"):
            runner.add_row(prompt, greedy(4), block_ids=[1, bad])
    row = runner.add_row(prompt, greedy(4), block_ids=[1])
    with pytest.raises(InvalidArgumentError, match=rf"row {row} needs 2 blocks .* has 1"):
        runner.execute([(row, 6)])
    with pytest.raises(InvalidArgumentError, match="block id 0"):
        runner.append_blocks(row, [0])
    runner.append_blocks(row, [2])
    assert runner.execute([(row, 6)]).result()[0].token_id is not None
    assert runner.infer_params()["slot_mapping"].min() >= 4  # block 0 holds slots 0 to 3


def test_line_3_padding_and_masked_rows(opened: Open, reference: SlowReference) -> None:
    runner = opened(pad_requests=4, pad_tokens=32)
    stop = reference(make_prompt(5, 1), greedy(8))[0][0]
    pool = BlockPool(runner)
    stopped = runner.add_row(
        make_prompt(5, 1), greedy(8, stop_token_ids=[stop]), block_ids=pool.take(4)
    )
    running = runner.add_row(make_prompt(7, 2), greedy(8), block_ids=pool.take(4))
    output = runner.execute([(stopped, 5), (running, 7)]).result()
    assert output[0].finish_reason == "stop"
    check_padding(runner.infer_params(), 2, 12)
    output = runner.execute([(stopped, 1), (running, 1)]).result()
    assert output[0].masked and not output[1].masked
    params = runner.infer_params()
    check_padding(params, 2, 2)
    # The masked row keeps its place and looks like padding otherwise.
    assert params["row"][:2].tolist() == [-1, running]
    assert params["seq_lens"][:2].tolist() == [0, 8]
    assert params["query_start_loc"][:3].tolist() == [0, 1, 2]
    assert params["slot_mapping"][0] == -1 and params["slot_mapping"][1] > 0
    assert params["token_batch"][:2].tolist() == [-1, 1]
    assert params["logits_batch"][:2].tolist() == [-1, 1]
    assert params["sampled"][0] == -1
    assert len(runner.logits(0)) == 0 and len(runner.logits(1)) == VOCAB


# --- 4: chunks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 4, 16, 33])
def test_line_4_unfinished_chunk_yields_no_token(
    opened: Open, reference: SlowReference, chunk: int
) -> None:
    runner = opened()
    prompt = make_prompt(33, 8)
    row = runner.add_row(prompt, greedy(3), block_ids=range(1, 10))
    assert runner.row_state(row).phase == _core.RowPhase.FREE  # nothing was sent yet
    done = 0
    while done < len(prompt):
        tokens = min(chunk, len(prompt) - done)
        output = runner.execute([(row, tokens)]).result()[0]
        done += tokens
        state = runner.row_state(row)
        assert output.num_computed == state.num_computed == done
        if done < len(prompt):
            assert output.token_id is None and output.finish_reason is None
            assert runner.logits(0).size == 0
            assert (state.total_len, state.last_token) == (33, -1)
            assert state.phase == _core.RowPhase.EXTEND
    assert output.token_id == reference(prompt, greedy(3))[0][0]
    assert state.phase == _core.RowPhase.DECODE and state.total_len == 34
    with pytest.raises(InvalidArgumentError, match=f"row {row} decodes 1 token a step, not 2"):
        runner.execute([(row, 2)])
    assert runner.execute([(row, 1)]).result()[0].num_computed == 34


# --- 5: preemption, blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("params", [greedy(20), seeded(77, 20), greedy(20, min_tokens=15)])
def test_line_5_resume_gives_the_same_tokens(
    opened: Open, reference: SlowReference, params: SamplingParams
) -> None:
    runner = opened(max_num_seqs=2)
    prompt = make_prompt(11, 21)
    expected, reason = reference(prompt, params)
    # Dirty the blocks and the row with something else each time.
    for cut in (1, 5, 19):
        row = runner.add_row(prompt, params, block_ids=range(1, 9))
        got: list[int] = []
        for step in range(cut):
            output = runner.execute([(row, 11 if step == 0 else 1)]).result()[0]
            assert output.token_id is not None
            got.append(output.token_id)
        runner.free_row(row)
        run_to_end(runner, make_prompt(30, cut), greedy(4), blocks=range(1, 20))
        rest = run_to_end(
            runner,
            prompt + got,
            params,
            blocks=range(20, 40),
            chunk=4,
            prompt_len=len(prompt),
        )
        assert got + tokens_of(rest) == expected
        assert rest[-1].finish_reason == reason == "length"


def test_line_5_known_prefix_is_not_computed_again(opened: Open, reference: SlowReference) -> None:
    """num_computed at admission: blocks that another row filled are read, not written."""
    runner = opened(graph_mode="eager")  # sizes are looked at: no padding
    prompt = make_prompt(14, 5)
    first = runner.add_row(prompt, greedy(4), block_ids=[1, 2, 3, 4, 5])
    runner.execute([(first, 14)]).result()
    other = [*prompt[:12], *make_prompt(5, 6)]
    second = runner.add_row(other, greedy(4), block_ids=[1, 2, 3, 9, 10, 11], num_computed=12)
    assert runner.execute([(second, 5)]).result()[0].token_id == reference(other, greedy(4))[0][0]
    params = runner.infer_params()
    assert params["counts"].tolist() == [1, 5, 1, 0, 1, 0]  # an extend row
    assert params["positions"].tolist() == [12, 13, 14, 15, 16]
    with pytest.raises(InvalidArgumentError, match=r"num_computed 17 is outside \[0, 17\)"):
        runner.add_row(other, greedy(4), num_computed=17)


def test_line_5_last_step_and_retired_step(opened: Open) -> None:
    runner = opened(num_kv_blocks=128)
    row = runner.add_row(make_prompt(90, 1), greedy(60), block_ids=range(1, 40))
    assert runner.last_step(row) == 0
    pending = [runner.execute([(row, 90)])]
    seen = 0
    for _ in range(50):
        pending.append(runner.execute([(row, 1)]))
        assert runner.last_step(row) == pending[-1].step
        retired = runner.retired_step
        # Four slots: a step is launched when the fourth before it has finished.
        assert pending[-1].step - 4 <= retired <= pending[-1].step
        assert retired >= seen, "a step that had retired is running again"
        seen = retired
    for step in pending:
        step.result()
        assert runner.retired_step >= step.step
    assert runner.retired_step >= runner.last_step(row)


def test_line_5_blocks_of_an_aborted_request_wait_for_its_last_step(
    device: str, models_dir: Path, reference: SlowReference
) -> None:
    with open_engine(device, models_dir, max_num_seqs=2, num_kv_blocks=17) as engine:
        long, other, third = make_prompt(30, 1), make_prompt(6, 2), make_prompt(27, 3)
        engine.add_request("long", long, greedy(3))  # 8 blocks
        engine.add_request("other", other, greedy(20))  # 7 blocks
        engine.step()
        held = engine.stats()["free_blocks"]
        assert held <= 16 - 8
        assert engine.abort("long")
        engine.add_request("third", third, greedy(5))  # 8 blocks: those of "long"
        assert engine.stats()["free_blocks"] == held, "its step is still in flight"
        # This launch comes before the step that names "long" is taken in: nobody is admitted.
        engine.step()
        assert engine.stats()["waiting"] == 1
        assert engine.stats()["free_blocks"] > held, "that step has been taken in"
        updates = drain(engine)
        assert ids_of(updates["third"]) == reference(third, greedy(5))[0]
        assert engine.stats()["free_blocks"] == 16
        engine.check_idle()


# --- 6: the rings --------------------------------------------------------------------------------


def test_line_6_results_asked_late_or_never(opened: Open, reference: SlowReference) -> None:
    runner = opened(num_kv_blocks=64)
    prompt = make_prompt(5, 5)
    expected = reference(prompt, greedy(60))[0]
    row = runner.add_row(prompt, greedy(60), block_ids=range(1, 20))
    pending = [runner.execute([(row, 5 if i == 0 else 1)]) for i in range(60)]
    # Every third is never asked for; the others in a shuffled order, far beyond the ring.
    order = [i for i in range(60) if i % 3]
    random.Random(1).shuffle(order)
    for i in order:
        assert pending[i].ready or i >= 56
        assert tokens_of(pending[i].result()) == [expected[i]]
        assert tokens_of(pending[i].result()) == [expected[i]], "a second look"
    step = pending[1].step
    with pytest.raises(InvalidArgumentError, match=f"step {step} was never launched or its result"):
        runner.model.runner.result(step)
    with pytest.raises(InvalidArgumentError, match="step 1000 was never launched"):
        runner.model.runner.result(1000)


def test_line_6_thousand_steps_in_a_random_pattern(opened: Open, reference: SlowReference) -> None:
    """Rows come and go; results are read at once, late, or never."""
    runner = opened(num_kv_blocks=65)
    pool = BlockPool(runner)
    chance = random.Random(6)
    prompts = [make_prompt(n, 100 + n) for n in (3, 6, 9, 14)]
    live: dict[int, tuple[int, list[int], int]] = {}  # row -> prompt, blocks, tokens launched
    waiting: list[tuple[PendingStep, list[tuple[int, int, int]]]] = []
    checked = late = dropped = 0

    def check_oldest(index: int) -> None:
        nonlocal checked
        step, drawn = waiting.pop(index)
        for output, (row, prompt, place) in zip(step.result(), drawn, strict=True):
            assert output.row == row
            assert output.token_id == reference(prompts[prompt], greedy(24))[0][place]
            checked += 1

    steps = 0
    while steps < 1000:
        if runner.free_rows and chance.random() < 0.3 and len(pool.free) >= 10:
            choice = chance.randrange(len(prompts))
            blocks = pool.take(num_blocks(len(prompts[choice]) + 24))
            row = runner.add_row(prompts[choice], greedy(24), block_ids=blocks)
            live[row] = (choice, blocks, 0)
        batch, drawn = [], []
        for row, (choice, blocks, launched) in live.items():
            if chance.random() < 0.2:
                continue
            length = len(prompts[choice])
            tokens = length if launched == 0 else 1
            batch.append((row, tokens))
            drawn.append((row, choice, launched + tokens - length))
            live[row] = (choice, blocks, launched + tokens)
        if not batch:
            continue
        waiting.append((runner.execute(batch), drawn))
        steps += 1
        for row in [r for r, (c, _, n) in live.items() if n == len(prompts[c]) + 23]:
            # In-order steps make the reuse of its blocks safe: later steps write them later.
            pool.give_back(live.pop(row)[1])
            runner.free_row(row)
        action = chance.random()
        if action < 0.3 and waiting:
            check_oldest(len(waiting) - 1)
        elif action < 0.6 and len(waiting) > 8:
            late += waiting[-1][0].step - waiting[0][0].step > 4
            check_oldest(0)
        elif action < 0.7 and waiting:
            waiting.pop(chance.randrange(len(waiting)))
            dropped += 1
    while waiting:
        late += runner.retired_step - waiting[0][0].step > 4
        check_oldest(0)
    assert checked > 1000 and late > 100 and dropped > 50


# --- 7: sampling ---------------------------------------------------------------------------------


def test_line_7_token_does_not_depend_on_place_or_padding(
    opened: Open, reference: SlowReference
) -> None:
    prompt = make_prompt(9, 31)
    params = seeded(1234, 12, temperature=1.3, top_k=50)
    expected = reference(prompt, params)[0]
    assert len(set(expected)) > 4
    assert expected != reference(prompt, seeded(1235, 12, temperature=1.3, top_k=50))[0]
    for place in range(4):
        for padded in ({}, {"pad_requests": 4, "pad_tokens": 61}):
            runner = opened(**padded)
            pool = BlockPool(runner)
            rows = []
            for index in range(4):
                chosen = prompt if index == place else make_prompt(4 + index, 40 + index)
                other = params if index == place else seeded(index, 12, temperature=2.0)
                blocks = pool.take(num_blocks(len(chosen) + 12))
                rows.append((runner.add_row(chosen, other, block_ids=blocks), len(chosen)))
            tokens = [runner.execute(rows).result()[place].token_id]
            for _ in range(11):
                step = runner.execute([(row, 1) for row, _ in rows])
                tokens.append(step.result()[place].token_id)
            assert tokens == expected


def test_line_7_greedy_tie_goes_to_the_lowest_id(opened: Open, tmp_path: Path) -> None:
    plain = opened()
    prompt = make_prompt(8, 3)
    expected = tokens_of(run_to_end(plain, prompt, greedy(1)))[0]
    low, high = expected // 2, (expected + VOCAB) // 2
    assert low < expected < high

    def tie(tensors: Tensors) -> None:
        head = tensors["lm_head.weight"].copy()
        head[low] = head[high] = head[expected]
        tensors["lm_head.weight"] = head

    runner = opened(model=copy_model(tmp_path / "tied", change=tie), max_num_seqs=2)
    row = runner.add_row(prompt, greedy(1), block_ids=range(1, 4))
    assert runner.execute([(row, 8)]).result()[0].token_id == low
    logits = runner.logits(0)
    assert logits[low] == logits[expected] == logits[high] == logits.max()


# --- 8: admission --------------------------------------------------------------------------------


def bad_rows() -> list[Any]:
    prompt = make_prompt(5, 1)
    rows: list[tuple[str, dict[str, Any], str]] = [
        ("empty", {"token_ids": []}, "token_ids is empty"),
        ("high id", {"token_ids": [1, VOCAB]}, f"token id {VOCAB} is outside"),
        ("negative id", {"token_ids": [1, -1]}, "token id -1 is outside"),
        ("float id", {"token_ids": [1, 2.5]}, "hold integers"),
        ("text id", {"token_ids": ["7"]}, "hold integers"),
        ("huge id", {"token_ids": [2**40]}, "hold integers"),
        ("too long", {"token_ids": [5] * 512}, "at most 511 fit max_model_len 512"),
        ("prompt_len", {"token_ids": prompt, "prompt_len": 6}, r"prompt_len 6 is outside \[1, 5\]"),
        ("prompt_len 0", {"token_ids": prompt, "prompt_len": 0}, "prompt_len 0 is outside"),
        ("num_computed", {"token_ids": prompt, "num_computed": 5}, "num_computed 5 is outside"),
        ("negative num_computed", {"token_ids": prompt, "num_computed": -1}, "num_computed -1"),
        ("block", {"token_ids": prompt, "block_ids": [1, 999]}, "block id 999"),
        ("float block", {"token_ids": prompt, "block_ids": [1.0]}, "hold integers"),
        ("blocks", {"token_ids": prompt, "block_ids": [1] * 129}, "a row holds 128 blocks"),
        ("stop id", {"token_ids": prompt, "params": greedy(4, stop_token_ids=[VOCAB])}, "stop_tok"),
        ("min_tokens", {"token_ids": prompt, "params": greedy(None, min_tokens=512)}, "min_tokens"),
        ("done", {"token_ids": prompt, "params": greedy(2), "prompt_len": 3}, "2 outputs already"),
        ("params", {"token_ids": prompt, "params": {"temperature": 0}}, "SamplingParams"),
    ]
    return [pytest.param(arguments, message, id=name) for name, arguments, message in rows]


@pytest.mark.parametrize("arguments, message", bad_rows())
def test_line_8_refused_row_leaves_the_runner_as_it_was(
    opened: Open, reference: SlowReference, arguments: dict[str, Any], message: str
) -> None:
    runner = opened(num_kv_blocks=256)
    prompt = make_prompt(6, 2)
    row = runner.add_row(prompt, greedy(4), block_ids=[7, 3, 9])
    tokens = tokens_of(runner.execute([(row, 6)]).result())
    before = (runner.free_rows, runner.stats())
    with pytest.raises(Mrv1Error, match=message) as caught:
        runner.add_row(**arguments)
    assert isinstance(caught.value, ValueError)
    assert (runner.free_rows, runner.stats()) == before
    for _ in range(3):
        tokens += tokens_of(runner.execute([(row, 1)]).result())
    assert tokens == reference(prompt, greedy(4))[0]


def test_line_8_refused_batch_launches_nothing(opened: Open) -> None:
    runner = opened(max_num_batched_tokens=8, max_num_seqs=3)
    row = runner.add_row(make_prompt(9, 1), greedy(4), block_ids=[1, 2, 3])
    other = runner.add_row(make_prompt(2, 1), greedy(4), block_ids=[4, 5])
    before = runner.stats()
    for batch, message in (
        ([(row, 9)], "the batch has 9 tokens, max_num_batched_tokens is 8"),
        ([(row, 7), (other, 2)], "the batch has 9 tokens"),
        ([(row, 0)], "takes 1 to 9 prefill tokens, not 0"),
        ([(row, 10)], "takes 1 to 9 prefill tokens, not 10"),
        ([(row, -1)], "prefill tokens, not -1"),
        ([(row, 2), (row, 2)], f"row {row} is in the batch twice"),
        ([(2, 1)], "row 2 is free"),
        ([(3, 1)], r"row 3 is outside \[0, 3\)"),
        ([(-1, 1)], "row -1 is outside"),
        ([(row, 1)] * 4, "a batch holds 3 rows, not 4"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            runner.execute(batch)
    assert runner.stats() == before
    output = runner.execute([(row, 5), (other, 2)]).result()
    assert output[0].num_computed == 5 and output[1].token_id is not None
    runner.free_row(other)
    for call in (
        lambda: runner.free_row(other),
        lambda: runner.append_blocks(other, [6]),
        lambda: runner.free_row(99),
        lambda: runner.last_step(99),
        lambda: runner.row_state(99),
    ):
        with pytest.raises(InvalidArgumentError, match="row"):
            call()


def test_line_8_rows_and_stop_ids_are_used_up(opened: Open) -> None:
    runner = opened(max_num_seqs=2)
    prompt = make_prompt(3, 1)
    rows = [runner.add_row(prompt, greedy(4), block_ids=[1 + i]) for i in range(2)]
    with pytest.raises(InvalidArgumentError, match="all 2 rows are in use"):
        runner.add_row(prompt, greedy(4))
    for row in rows:
        runner.free_row(row)
    # Stop ids of many lives of a row fit: what a row held comes back with it.
    params = greedy(4, stop_token_ids=list(range(300)))
    for _ in range(5000):
        runner.free_row(runner.add_row(prompt, params))
    assert runner.free_rows == 2


def test_line_8_request_that_can_never_fit_is_refused(device: str, models_dir: Path) -> None:
    with open_engine(device, models_dir, num_kv_blocks=9, max_model_len=256) as engine:
        engine.add_request("good", make_prompt(5, 1), greedy(4))
        before = engine.stats()
        for prompt, params, message in (
            (make_prompt(20, 1), greedy(20), "request 'bad'.* need 10 KV blocks .* cache has 8"),
            (make_prompt(256, 1), greedy(1), "request 'bad'.*256 tokens.*at most 255"),
            ([], greedy(1), "request 'bad'.*at least one token"),
            ([1, VOCAB], greedy(1), r"request 'bad'.*prompt\[1\] = 328"),
            ([1, True], greedy(1), r"request 'bad'.*prompt\[1\] = True"),
            ([1, 2.0], greedy(1), r"request 'bad'.*prompt\[1\] = 2.0"),
            (b"ab", greedy(1), "request 'bad'.*prompt"),
            (None, greedy(1), "request 'bad'.*prompt"),
            ([1], greedy(1, stop_token_ids=[VOCAB]), r"request 'bad'.*stop_token_ids\[0\]"),
            ([1], greedy(None, min_tokens=300), "request 'bad'.*min_tokens"),
            ([1], {"temperature": 0}, "request 'bad'.*params"),
        ):
            with pytest.raises(RequestError, match=message):
                engine.add_request("bad", prompt, params)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="request 'good'.*unfinished"):
            engine.add_request("good", [1], greedy(1))
        with pytest.raises(RequestError, match="request_id"):
            engine.add_request(7, [1], greedy(1))  # type: ignore[arg-type]
        assert engine.stats() == before
        assert not engine.abort("bad")
        assert len(ids_of(drain(engine)["good"])) == 4
        engine.check_idle()


def test_line_8_lists_of_requests_never_fail_a_step(device: str, models_dir: Path) -> None:
    """Lists longer than the memory that rows have for them at first: it grows."""
    with open_engine(device, models_dir) as engine:
        native = _core.RunnerConfig()
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            setattr(native, name, getattr(engine.model, name))
        native.num_blocks, native.block_size, native.sampling_words = 65, 4, 4
        program = engine.model.runner.program
        runner = _core.ModelRunner(engine.model.device, program, native)
        for weight in range(len(program.weights)):
            runner.fill_random(weight, weight, 0.1)
        small = _core.Engine(runner, _core.EngineOptions(background=False))
        for index in range(6):
            spec = _core.RowSpec()
            spec.token_ids, spec.prompt_len = make_prompt(4, index), 4
            spec.temperature, spec.max_tokens, spec.min_tokens = 0.0, 5, 5
            spec.stop_ids = list(range(6 + index))
            spec.stop_sequences = [[index, 1, 2], [3]]
            small.add_request(str(index), spec)
        spec.stop_sequences = [[1], []]
        with pytest.raises(InvalidArgumentError, match=r"stop_sequences\[1\] is empty"):
            small.add_request("never", spec)
        ended = []
        while small.has_unfinished():
            ended += [o.id for o in small.step() if o.end != _core.RequestEnd.NONE]
        assert sorted(ended) == [str(index) for index in range(6)]
        small.check_idle()
        small.close()
        runner.close()


# --- 9: a failing step ---------------------------------------------------------------------------


def test_line_8_blocks_are_held_once_by_a_row(opened: Open) -> None:
    runner = opened(num_kv_blocks=256)
    with pytest.raises(InvalidArgumentError, match="block id 1 is in the row twice"):
        runner.add_row(make_prompt(30, 1), greedy(4), block_ids=[1, 2, 1])
    row = runner.add_row(make_prompt(30, 1), greedy(4), block_ids=[1, 2])
    with pytest.raises(InvalidArgumentError, match="block id 2 is in the row twice"):
        runner.append_blocks(row, [3, 2])
    runner.append_blocks(row, [3])
    # Two rows may share a block, as a common prefix does.
    runner.add_row(make_prompt(30, 1), greedy(4), block_ids=[1, 4])


def test_line_8_wrong_types_are_named(opened: Open) -> None:
    runner = opened(num_kv_blocks=256)
    row = runner.add_row(make_prompt(3, 1), greedy(4), block_ids=[1])
    wrong: list[tuple[Any, str]] = [
        (lambda: runner.execute([(row,)]), r"batch\[0\]"),
        (lambda: runner.execute([(row, "3")]), r"batch\[0\] tokens"),
        (lambda: runner.execute([("0", 3)]), r"batch\[0\] row"),
        (lambda: runner.free_row(None), "row"),
        (lambda: runner.append_blocks(row, [1.5]), r"block_ids\[0\] = 1.5"),
        (lambda: runner.add_row([1], greedy(1), prompt_len="a"), "prompt_len = 'a'"),
        (lambda: runner.add_row([1], greedy(1), num_computed=2**40), "num_computed"),
    ]
    for call, message in wrong:
        with pytest.raises(InvalidArgumentError, match=message):
            call()
    assert runner.execute([(row, 3)]).result()[0].token_id is not None


def test_line_9_runner_lives_on_after_a_failed_step(opened: Open, reference: SlowReference) -> None:
    runner = opened()
    prompt = make_prompt(6, 2)
    bad = runner.add_row(make_prompt(5, 1), greedy(8), block_ids=[1, 2, 3])
    good = runner.add_row(prompt, greedy(4), block_ids=[4, 5, 6])
    tokens = tokens_of(runner.execute([(good, 6)]).result())
    runner.model.runner.fail_next_step("out of luck")
    failed = runner.execute([(bad, 5)])
    after = runner.execute([(good, 1)])
    for _ in range(2):
        with pytest.raises(InternalError, match=f"step {failed.step} failed: .*out of luck"):
            failed.result()
    assert failed.ready
    runner.free_row(bad)
    tokens += tokens_of(after.result())
    for _ in range(2):
        tokens += tokens_of(runner.execute([(good, 1)]).result())
    assert tokens == reference(prompt, greedy(4))[0]


@pytest.mark.parametrize("when", range(6))
def test_line_9_failed_step_fails_its_requests_only(
    device: str, models_dir: Path, reference: SlowReference, when: int
) -> None:
    with open_engine(device, models_dir, max_num_seqs=2, num_kv_blocks=33) as engine:
        prompts = {name: make_prompt(4 + index, index) for index, name in enumerate("abcd")}
        for name, prompt in prompts.items():
            engine.add_request(name, prompt, greedy(9))
        updates: dict[str, list[RequestUpdate]] = {name: [] for name in prompts}
        steps = 0
        while engine.has_unfinished():
            if steps == when:
                engine.model.runner.fail_next_step("a broken device")
            steps += 1
            for update in engine.step():
                updates[update.request_id].append(update)
        # Two run at a time, so the step that failed had "a" and "b" in it, and no other.
        for name in "ab":
            last = updates[name][-1]
            assert last.finish_reason == "error" and "a broken device" in (last.error or "")
            assert ids_of(updates[name]) == reference(prompts[name], greedy(9))[0][:when]
        for name in "cd":
            assert updates[name][-1].finish_reason == "length"
            assert ids_of(updates[name]) == reference(prompts[name], greedy(9))[0]
        assert engine.stats()["free_blocks"] == 32
        engine.check_idle()


def test_line_9_nan_logits_end_the_request_and_no_other(
    opened: Open, tmp_path: Path, reference: SlowReference
) -> None:
    """Weights hold a NaN that one token's embedding brings in: an error of that row alone."""

    def poison(tensors: Tensors) -> None:
        table = tensors["model.embed_tokens.weight"].copy()
        table[300] = np.nan
        tensors["model.embed_tokens.weight"] = table

    runner = opened(model=copy_model(tmp_path / "nan", change=poison))
    prompt = [token for token in make_prompt(9, 3) if token != 300]
    expected = reference(prompt, greedy(4))[0]
    assert 300 not in expected
    good = runner.add_row(prompt, greedy(4), block_ids=range(1, 5))
    bad = runner.add_row([5, 300], greedy(4), block_ids=range(5, 8))
    first = runner.execute([(bad, 2), (good, len(prompt))]).result()
    assert (first[0].token_id, first[0].finish_reason) == (None, "error")
    tokens = tokens_of(first[1:])
    second = runner.execute([(bad, 1), (good, 1)]).result()
    assert second[0].masked
    tokens += tokens_of(second[1:])
    runner.free_row(bad)
    while len(tokens) < 4:
        tokens += tokens_of(runner.execute([(good, 1)]).result())
    assert tokens == expected


# --- 10: padding to a size -----------------------------------------------------------------------


@pytest.mark.parametrize("requests, tokens", [(1, 0), (3, 17), (4, 64), (0, 256), (4, 0)])
def test_line_10_padded_sizes_change_no_token(
    opened: Open, reference: SlowReference, requests: int, tokens: int
) -> None:
    runner = opened(pad_requests=requests, pad_tokens=tokens, graph_mode="eager")
    pool = BlockPool(runner)
    chosen = [(make_prompt(13, 1), greedy(10)), (make_prompt(30, 2), seeded(8, 10))]
    rows = [
        runner.add_row(prompt, params, block_ids=pool.take(num_blocks(len(prompt) + 10)))
        for prompt, params in chosen
    ]
    got: list[list[int]] = [[], []]
    done = [0, 0]
    while len(got[0]) < 10 or len(got[1]) < 10:
        batch = []
        for index, (prompt, _) in enumerate(chosen):
            if len(got[index]) < 10:
                batch.append((rows[index], min(11, max(1, len(prompt) - done[index]))))
        outputs = runner.execute(batch).result()
        params = runner.infer_params()
        total = sum(count for _, count in batch)
        assert params["counts"][:2].tolist() == [len(batch), total]
        assert len(params["seq_lens"]) == max(requests, len(batch))
        assert len(params["slot_mapping"]) == max(tokens, total)
        check_padding(params, len(batch), total)
        for output, (row, count) in zip(outputs, batch, strict=True):
            done[rows.index(row)] += count
            if output.token_id is not None:
                got[rows.index(row)].append(output.token_id)
    assert got == [reference(prompt, params)[0] for prompt, params in chosen]


def test_line_10_padding_beyond_the_limits_is_refused(device: str) -> None:
    for options in ({"pad_requests": 5}, {"pad_tokens": 257}):
        with pytest.raises(InvalidArgumentError, match="pad_"):
            open_runner(device, **options)


def test_empty_batch_is_a_step(opened: Open) -> None:
    runner = opened()
    row = runner.add_row(make_prompt(5, 1), greedy(4), block_ids=[1, 2])
    step = runner.execute([])
    assert step.result() == []
    # What was staged travelled with it.
    assert runner.row_state(row).phase == _core.RowPhase.PREFILL
    assert runner.execute([(row, 5)]).result()[0].token_id is not None


# --- changes that do not fit one control record --------------------------------------------------


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "long"
    return copy_model(directory, config={"max_position_embeddings": 200_000})


def read_back(runner: ModelRunner, prompt: list[int], blocks: list[int], start: int) -> None:
    """Compares the tokens and slots that the device has from `start` on with the prompt's."""
    row = runner.add_row(prompt, greedy(4), block_ids=blocks, num_computed=start)
    count = min(64, len(prompt) - start)
    runner.execute([(row, count)]).result()
    params = runner.infer_params()
    assert params["token_ids"].tolist() == prompt[start : start + count]
    expected = [blocks[p // 16] * 16 + p % 16 for p in range(start, start + count)]
    assert params["slot_mapping"].tolist() == expected
    runner.free_row(row)


def test_long_prompt_is_split_over_records(opened: Open, long_model: Path) -> None:
    """A record takes 256 KiB of changes, 65,536 ids; prompts of three times that arrive whole."""
    runner = opened(
        model=long_model, block_size=16, num_kv_blocks=12_600, max_num_seqs=2, graph_mode="eager"
    )
    prompt = make_prompt(199_000, 1)
    blocks = list(range(1, 12_600))
    random.Random(1).shuffle(blocks)
    blocks = blocks[: num_blocks(199_004, 16)]
    for start in (0, 32_740, 65_500, 131_050, 198_990):
        before = runner.stats()
        read_back(runner, prompt, blocks, start)
        after = runner.stats()
        assert after["steps"] - before["steps"] >= 4
        assert after["control_bytes"] - before["control_bytes"] >= 4 * 199_000


def test_many_long_rows_are_split_over_records(opened: Open, long_model: Path) -> None:
    runner = opened(model=long_model, block_size=16, num_kv_blocks=12_600, max_num_seqs=12)
    pool = BlockPool(runner)
    rows = []
    for index in range(12):
        prompt = make_prompt(9_000 + 700 * index, index)
        blocks = pool.take(num_blocks(len(prompt) + 4, 16))
        stop_ids = range(index * 20, index * 20 + 100)
        row = runner.add_row(
            prompt,
            greedy(4, stop_token_ids=stop_ids),
            block_ids=blocks[:3],
            num_computed=len(prompt) - 20,
        )
        runner.append_blocks(row, blocks[3:])
        rows.append((row, prompt, blocks, stop_ids))
        if index == 5:  # a free and a new row among the changes
            runner.free_row(rows.pop(2)[0])
    batch = [(row, 20) for row, *_ in rows]
    outputs = runner.execute(batch).result()
    params = runner.infer_params()
    for place, (row, prompt, blocks, stop_ids) in enumerate(rows):
        at = int(params["entry_batch"][place])
        first, last = params["query_start_loc"][at : at + 2]
        assert params["token_ids"][first:last].tolist() == prompt[-20:]
        positions = range(len(prompt) - 20, len(prompt))
        expected = [blocks[p // 16] * 16 + p % 16 for p in positions]
        assert params["slot_mapping"][first:last].tolist() == expected
        assert outputs[place].row == row and outputs[place].token_id is not None
        assert (outputs[place].finish_reason == "stop") == (outputs[place].token_id in stop_ids)
    assert len({output.finish_reason for output in outputs}) == 2, "both should occur"
