# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Two-batch overlap: steps that run as two halves give what whole ones give, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_data import load_golden
from mrv1 import LLM
from mrv1.errors import DeviceError, InvalidArgumentError, Mrv1Error
from mrv1.random_model import save_random_model
from mrv1.runner import ModelRunner
from serving_tools import (
    LLAMA,
    VOCAB,
    BlockPool,
    greedy,
    make_prompt,
    need_ranks,
    num_blocks,
    open_runner,
    run_to_end,
    seeded,
)
from test_expert_parallel import CONFIG
from test_models import forced, open_golden
from test_parallel import INVARIANT, SIZES, WAIT_S, answers


@pytest.fixture(autouse=True)
def _two_ranks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_ranks(device, 2)
    monkeypatch.delenv("MRV1_USE_TBO", raising=False)


@contextmanager
def halves(mode: str) -> Iterator[None]:
    """What is opened inside runs its steps as halves or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MRV1_USE_TBO", mode)
        yield


def open_two(device: str, mode: str, model: Path = LLAMA, **options: Any) -> ModelRunner:
    with halves(mode), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MRV1_TBO_PROCESSORS", "8")
        return open_runner(device, model, tensor_parallel_size=2, batch_invariant=True, **options)


# --- the same tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        {"graph_mode": "full", "dtype": "bfloat16"},
        {"graph_mode": "piecewise", "kv_cache_dtype": "fp8_e4m3", "background": False},
    ],
    ids=["eager", "drafts", "graphs", "pieces"],
)
def test_requests_of_all_kinds_get_the_answers_of_whole_steps(
    device: str, options: dict[str, Any]
) -> None:
    """Prompts in chunks, shared prefixes, penalties, logprobs of prompts, masks of grammars."""
    check_answers(device, LLAMA, tensor_parallel_size=2, **options)


def check_answers(device: str, model: Path, **options: Any) -> None:
    """Checks that requests of all kinds get the answers of whole steps from halves."""

    def run(mode: str) -> list[Any]:
        stats: dict[str, int] = {}
        with halves(mode):
            found = answers(device, model, stats, max_num_batched_tokens=23, **options)
        assert (stats["steps_in_halves"] > 0) == (mode == "1")
        return found

    assert run("1") == run("0")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with experts, whose sizes several ranks can share out in any way."""
    config = {**CONFIG, "vocab_size": VOCAB, "hidden_size": 64, "moe_intermediate_size": 32}
    return save_random_model(tmp_path_factory.mktemp("experts") / "model", config, seed=11)


@pytest.mark.parametrize("graph_mode", ["eager", "full"])
@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "expert_parallel": True},
        {"data_parallel_size": 2, "expert_parallel": True},
    ],
    ids=["parts of experts", "whole experts", "own requests"],
)
def test_experts_give_the_answers_of_whole_steps(
    device: str, experts: Path, options: dict[str, Any], graph_mode: str
) -> None:
    """With sums, and with tokens that travel to experts, between the pieces of halves."""
    check_answers(device, experts, graph_mode=graph_mode, **options)


@pytest.mark.parametrize("name", [name for name, ranks in INVARIANT if ranks == 2])
def test_every_family_gives_the_bits_of_whole_steps(device: str, name: str) -> None:
    """Windows and KV groups among them; a prompt whole, and in chunks of an odd length."""
    prompt = load_golden(name).prompts[-1]

    def logits(mode: str) -> list[bytes]:
        with (
            halves(mode),
            open_golden(device, name, batch_invariant=True, tensor_parallel_size=2) as runner,
        ):
            found = [forced(runner, prompt, chunk).tobytes() for chunk in (len(prompt), 7)]
            assert (runner.stats()["steps_in_halves"] > 0) == (mode == "1")
            return found

    assert logits("1") == logits("0")


def check_split(params: dict[str, np.ndarray]) -> int:
    """What halves have, by what their tokens say; returns where the step is cut, 0 if it is not."""
    if "counts.half0" not in params:
        return 0
    tokens = len(params["token_batch"])
    cut = next(
        cut
        for cut in range(1, tokens)
        if np.array_equal(
            np.minimum(params["query_start_loc"], cut), params["query_start_loc.half0"]
        )
    )
    for half, (first, last) in enumerate([(0, cut), (cut, tokens)]):
        part = {
            name.removesuffix(f".half{half}"): values
            for name, values in params.items()
            if name.endswith(f".half{half}")
        }
        clipped = np.clip(params["query_start_loc"], first, last) - first
        np.testing.assert_array_equal(part["query_start_loc"], clipped)
        live = int(np.clip(params["counts"][1], first, last)) - first
        assert part["counts"].tolist() == [params["counts"][0], live, 0, *params["counts"][3:]]
        for batch, row in enumerate(params["row"]):
            own = first + np.flatnonzero(params["token_batch"][first:last] == batch)
            assert part["row"][batch] == (row if len(own) else -1)
            end = params["positions"][own[-1]] + 1 if len(own) else 0
            assert part["seq_lens"][batch] == end
    return cut


@pytest.mark.parametrize("graph_mode", ["eager", "full"])
def test_every_step_of_two_tokens_runs_as_halves(device: str, graph_mode: str) -> None:
    """Odd numbers of tokens, a half of one token, requests across the cut, rows that have ended."""
    lengths = (1, 2, 3, 8, 13)

    def run(mode: str) -> tuple[list[Any], list[int]]:
        seen: list[Any] = []
        cuts = []
        with open_two(
            device, mode, graph_mode=graph_mode, max_num_seqs=5, keep_hidden_states=True
        ) as runner:
            pool = BlockPool(runner)
            rows = [
                runner.add_row(
                    make_prompt(length, length),
                    greedy(9, stop_token_ids=range(VOCAB) if length == 2 else ()),
                    block_ids=[pool.take(num_blocks(length + 9))],
                )
                for length in lengths
            ]
            one, two, three, eight, most = rows
            batches = [
                [(one, 1)],
                [(two, 2)],
                [(three, 3)],
                [(one, 1), (eight, 5), (most, 1)],
                [(two, 1), (eight, 3), (three, 1), (most, 12)],  # the first has stopped
                *[[(row, 1) for row in rows]] * 4,
                [(one, 1), (most, 1)],
            ]
            for batch in batches:
                outputs = runner.execute(batch).result()
                seen += [(output.token_id, output.masked) for output in outputs]
                seen += [runner.hidden_states(item).tobytes() for item in range(len(batch))]
                seen += [runner.logits(item).tobytes() for item in range(len(batch))]
                cuts.append(check_split(runner.infer_params()))
            assert runner.stats()["steps_in_halves"] == sum(cut > 0 for cut in cuts)
            for row in rows:
                runner.free_row(row)
        return seen, cuts

    whole, none = run("0")
    assert none == [0] * 10
    parts, cuts = run("1")
    assert parts == whole
    assert cuts[:5] == [0, 1, 2, 4, 9] and all(cuts[1:])


def test_steps_ahead_of_their_outputs_are_masked_in_halves(device: str) -> None:
    """Rows that end or are freed while later steps with them are in flight."""

    def run(mode: str) -> list[Any]:
        with open_two(device, mode) as runner:
            pool = BlockPool(runner)
            rows = [
                runner.add_row(
                    make_prompt(3 + seed, seed),
                    seeded(seed, 8, stop_token_ids=range(VOCAB) if seed < 2 else ()),
                    block_ids=[pool.take(5)],
                )
                for seed in range(4)
            ]
            steps = [runner.execute([(row, 3 + seed) for seed, row in enumerate(rows)])]
            steps += [runner.execute([(row, 1) for row in rows]) for _ in range(2)]
            runner.free_row(rows[3])  # its steps keep their places
            last = runner.add_row(make_prompt(9, 9), greedy(1), block_ids=[pool.take(5)])
            steps.append(runner.execute([(last, 9), (rows[2], 1)]))
            outputs = [step.result() for step in steps]
            assert (runner.stats()["steps_in_halves"] > 0) == (mode == "1")
            return [
                (output.token_id, output.masked, output.finish_reason)
                for step in outputs
                for output in step
            ]

    assert run("1") == run("0")


def test_aborts_in_flight_leave_the_others_their_tokens(device: str) -> None:
    def run(mode: str) -> list[list[int]]:
        with halves(mode), LLM(LLAMA, device=device, tensor_parallel_size=2, **SIZES) as llm:
            prompts = [make_prompt(4 + 5 * seed, seed) for seed in range(6)]
            tokens: dict[int, list[int]] = {}
            stream = llm.stream(prompts, [seeded(seed, 20) for seed in range(6)])
            for event in stream:
                tokens.setdefault(event.index, []).extend(event.token_ids)
                if event.index == 1 and len(tokens[1]) > 3:
                    break
            stream.close()  # whatever has not ended is aborted
            results = llm.generate(prompts[:3], greedy(12), progress=False)
            llm.engine.check_idle()
            runner = llm.engine.model.runner
            assert (runner.stats()["steps_in_halves"] > 0) == (mode == "1")
            return [list(result.outputs[0].token_ids) for result in results]

    assert run("1") == run("0")


# --- when -----------------------------------------------------------------------------------------


def test_auto_goes_by_the_tokens_of_a_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRV1_TBO_MIN_PREFILL_TOKENS", "12")
    monkeypatch.setenv("MRV1_TBO_MIN_DECODE_TOKENS", "3")
    cuts = []
    with open_two(device, "auto", graph_mode="eager", capture_sizes=[]) as runner:
        pool = BlockPool(runner)
        rows = [
            runner.add_row(make_prompt(12, seed), greedy(6), block_ids=[pool.take(5)])
            for seed in range(3)
        ]
        first, second, third = rows
        for batch in (
            [(first, 11)],
            [(first, 1), (second, 10)],
            [(second, 2), (third, 10)],
            [(third, 2)],
            [(first, 1), (second, 1)],
            [(row, 1) for row in rows],
        ):
            runner.execute(batch).result()
            cuts.append(check_split(runner.infer_params()))
    assert cuts == [0, 0, 6, 0, 0, 2]


def test_a_step_of_one_token_is_whole(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRV1_TBO_MIN_PREFILL_TOKENS", "0")
    monkeypatch.setenv("MRV1_TBO_MIN_DECODE_TOKENS", "0")
    with open_two(device, "auto") as runner:
        row = runner.add_row(make_prompt(3, 1), greedy(6), block_ids=[BlockPool(runner).take(2)])
        for tokens, halves_run in ((1, 0), (2, 1), (1, 1)):
            runner.execute([(row, tokens)]).result()
            assert runner.stats()["steps_in_halves"] == halves_run


def test_a_step_is_cut_between_the_places_of_requests(device: str) -> None:
    """Half of 12 places is 6, half of 4 is 2, but a request with drafts has 4."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    with open_two(device, "1", speculative_config=drafts) as runner:
        pool = BlockPool(runner)
        rows = [
            runner.add_row(make_prompt(5, seed), greedy(20), block_ids=[pool.take(8)])
            for seed in range(3)
        ]
        native = runner.model.runner
        native.log_steps(True)
        runner.execute([(row, 5) for row in rows]).result()
        runner.execute([(row, 4) for row in rows]).result()
        runner.execute([(rows[0], 4)]).result()
        steps = [native.take_step_log(rank) for rank in range(2)]
    for log in steps:
        assert [(step.tokens, step.cut_token) for step in log] == [(15, 8), (12, 8), (4, 2)]


def test_auto_leaves_ranks_with_requests_of_their_own_alone(
    device: str, experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRV1_TBO_MIN_PREFILL_TOKENS", "2")
    for options, is_there in (
        ({"tensor_parallel_size": 2}, True),
        ({"data_parallel_size": 2}, False),
    ):
        with open_runner(device, experts, expert_parallel=True, **options) as runner:
            assert (runner.model.runner.memory_plan["two_batch"] > 0) == is_there


@pytest.mark.parametrize(
    ("mode", "ranks", "tokens", "is_there"),
    [("0", 2, 256, False), ("1", 1, 256, False), ("1", 2, 256, True), ("auto", 2, 256, False)],
)
def test_halves_take_memory_where_steps_may_run_so(
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    ranks: int,
    tokens: int,
    is_there: bool,
) -> None:
    monkeypatch.setenv("MRV1_USE_TBO", mode)
    caplog.set_level("INFO", "mrv1")
    with open_runner(device, tensor_parallel_size=ranks, max_num_batched_tokens=tokens) as runner:
        plan = runner.model.runner.memory_plan
        assert (plan["two_batch"] > 0) == is_there
        assert ("halves of steps" in caplog.text) == is_there
        if is_there:
            # Arenas of half the tokens each, that have no logits.
            assert plan["two_batch"] < plan["activations"]
        before = runner.stats()["allocations"]
        run_to_end(runner, make_prompt(20, 1), greedy(4), chunk=7)
        assert runner.stats()["allocations"] == before


def test_a_steady_step_of_halves_is_one_launch(device: str) -> None:
    with open_two(device, "1", graph_mode="full", max_num_seqs=2, dtype="bfloat16") as runner:
        pool = BlockPool(runner)
        rows = [
            runner.add_row(make_prompt(5, seed), greedy(40), block_ids=[pool.take(12)])
            for seed in range(2)
        ]
        runner.execute([(row, 5) for row in rows]).result()
        before = runner.stats()
        for _ in range(20):
            runner.execute([(row, 1) for row in rows]).result()
        after = runner.stats()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["steps_full"] == grown["steps_in_halves"] == grown["graph_launches"] == 20
    assert (grown["waits"], grown["copies"], grown["allocations"]) == (0, 0, 0)
    assert device == "cpu" or grown["kernel_launches"] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MRV1_USE_TBO", "2"),
        ("MRV1_TBO_MIN_PREFILL_TOKENS", "-1"),
        ("MRV1_TBO_MIN_DECODE_TOKENS", "many"),
        ("MRV1_TBO_PROCESSORS", "65"),
    ],
)
def test_what_is_not_allowed_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgumentError, match=name):
        open_runner(device, tensor_parallel_size=2)


def test_stages_run_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRV1_USE_TBO", "1")
    with pytest.raises(InvalidArgumentError, match="MRV1_USE_TBO = '1': .* must be 0 or auto"):
        open_runner("cpu", pipeline_parallel_size=2)
    monkeypatch.setenv("MRV1_USE_TBO", "auto")
    monkeypatch.setenv("MRV1_TBO_MIN_PREFILL_TOKENS", "2")
    with open_runner("cpu", pipeline_parallel_size=2) as runner:
        run_to_end(runner, make_prompt(20, 1), greedy(4))
        assert runner.stats()["steps_in_halves"] == 0


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("nothing_left")
def test_a_rank_that_fails_in_a_half_ends_the_engine(device: str, rank: int) -> None:
    with halves("1"), LLM(LLAMA, device=device, tensor_parallel_size=2, **SIZES) as llm:
        llm.generate([make_prompt(5, 1)], greedy(4), progress=False)
        llm.engine.model.runner.fail_next_step("as a test wants it", rank=rank)
        start = time.monotonic()
        results = llm.generate([make_prompt(6, 2)], greedy(30), progress=False)
        assert time.monotonic() - start < WAIT_S
        assert results[0].error is not None
        assert f"rank {rank} failed in step" in results[0].error
        with pytest.raises(DeviceError, match=f"rank {rank} failed"):
            llm.generate([make_prompt(5, 1)], greedy(4), progress=False)
    with pytest.raises(Mrv1Error):
        llm.generate([make_prompt(5, 1)], greedy(4), progress=False)


@pytest.mark.usefixtures("nothing_left")
def test_a_step_of_halves_that_fails_everywhere_fails_alone(device: str) -> None:
    with halves("1"), LLM(LLAMA, device=device, tensor_parallel_size=2, **SIZES) as llm:
        expected = llm.generate([make_prompt(5, 1)], greedy(8), progress=False)
        llm.engine.model.runner.fail_next_step("once")
        failed = llm.generate([make_prompt(6, 2)], greedy(8), progress=False)
        assert failed[0].error is not None and "once" in failed[0].error
        again = llm.generate([make_prompt(5, 1)], greedy(8), progress=False)
        assert again[0].outputs[0].token_ids == expected[0].outputs[0].token_ids
        llm.engine.check_idle()
