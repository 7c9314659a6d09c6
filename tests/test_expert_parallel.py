# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Expert parallelism: ranks with whole experts, and with requests of their own, are as one."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrv1 import LLM, Engine, cli
from mrv1.config import ModelConfig
from mrv1.errors import DeviceError, InvalidArgumentError, Mrv1Error, RequestError
from mrv1.loader import RunnerOptions
from mrv1.quantize import quantize_checkpoint
from mrv1.random_model import random_runner, save_random_model
from mrv1.runner import ModelRunner, RowHandle
from mrv1.structured_outputs_params import StructuredOutputsParams
from serving_tools import LLAMA, greedy, make_prompt, need_ranks, seeded

WAIT_S = 10.0
VOCAB = 300
# Experts that no number of ranks below divides.
EXPERTS = 7
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 20,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
    "eos_token_id": 256,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "torch_dtype": "float32",
}
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "max_model_len": 128,
    "num_kv_blocks": 80,
    "num_threads": 2,
    "progress": False,
}
DATA = {"expert_parallel": True}
EAGER: dict[str, Any] = {"graph_mode": "eager"}
pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with experts and random weights, large enough to choose tokens clearly."""
    directory = tmp_path_factory.mktemp("experts") / "model"
    return save_random_model(directory, CONFIG, seed=11)


def _open(device: str, model: Path, **options: Any) -> ModelRunner:
    return ModelRunner(model, device=device, **{**SIZES, **options})


def _prompts(count: int) -> list[list[int]]:
    return [make_prompt(3 + 5 * index % 31, index, VOCAB) for index in range(count)]


def _answers(device: str, model: Path, prompts: list[list[int]], **options: Any) -> list[Any]:
    """What requests of many kinds get."""
    params = [
        (greedy(9), seeded(index, 12), greedy(14, logprobs=2), seeded(index, 7, n=2))[index % 4]
        for index in range(len(prompts))
    ]
    with LLM(model, device=device, **{**SIZES, **options}) as llm:
        results = llm.generate(prompts, params)
        llm.engine.check_idle()
    assert [result.error for result in results] == [None] * len(prompts)
    return [[output.token_ids for output in result.outputs] for result in results]


@pytest.fixture(scope="module")
def answers_of_one(device: str, model: Path) -> list[Any]:
    return _answers(device, model, _prompts(9))


# --- the tokens of one rank ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {}),
        (4, {}),
        (
            2,
            {
                "graph_mode": "full",
                "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
            },
        ),
        (2, {"pipeline_parallel_size": 2}),
    ],
    ids=["2", "4", "drafts in graphs", "stages"],
)
def test_whole_experts_of_ranks_give_the_tokens_of_one(
    device: str, model: Path, answers_of_one: list[Any], ranks: int, options: dict[str, Any]
) -> None:
    need_ranks(device, ranks * options.get("pipeline_parallel_size", 1))
    options = {"tensor_parallel_size": ranks, "expert_parallel": True, **options}
    assert _answers(device, model, _prompts(9), **options) == answers_of_one


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {}),
        (3, {"background": False}),
        (4, {"max_tokens_per_rank": 5}),
        (2, {"graph_mode": "full", "capture_sizes": [1, 2, 4]}),
        (2, {"graph_mode": "piecewise"}),
        (3, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}),
        (2, {"enable_prefix_caching": False, "num_kv_blocks": 18, "max_model_len": 64}),
    ],
    ids=["2", "3 stepped", "4 small", "graphs", "pieces", "drafts", "preempted"],
)
def test_ranks_with_requests_of_their_own_give_the_tokens_of_one(
    device: str, model: Path, answers_of_one: list[Any], ranks: int, options: dict[str, Any]
) -> None:
    need_ranks(device, ranks)
    options = {"data_parallel_size": ranks, **DATA, **options}
    assert _answers(device, model, _prompts(9), **options) == answers_of_one


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("halves", "options"),
    [("0", {"graph_mode": "full", "capture_sizes": [1, 2, 4]}), ("1", {}), ("1", EAGER)],
    ids=["graphs", "halves in graphs", "eager halves"],
)
def test_tokens_that_nccl_carries_are_those_of_one(
    model: Path,
    answers_of_one: list[Any],
    ranks: int,
    halves: str,
    options: dict[str, Any],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As where GPUs do not reach each other; ranks of the CPU have one way in any case."""
    need_ranks(device, ranks)
    monkeypatch.setenv("MRV1_COLLECTIVES", "nccl")
    monkeypatch.setenv("MRV1_USE_TBO", halves)
    options = {"data_parallel_size": ranks, **DATA, **options}
    assert _answers(device, model, _prompts(9), **options) == answers_of_one
    assert ("carries what ranks exchange" in caplog.text) == (device == "cuda")


def test_a_library_that_there_is_not_is_refused(
    model: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRV1_COLLECTIVES", "mpi")
    with pytest.raises(
        InvalidArgumentError, match="MRV1_COLLECTIVES = 'mpi': must be auto or nccl"
    ):
        LLM(model, device=device, **SIZES)


@pytest.mark.parametrize("background", [True, False])
def test_ranks_without_requests_go_along(device: str, model: Path, background: bool) -> None:
    """Fewer requests than ranks, one after the other, each on a rank of its own."""
    need_ranks(device, 3)
    prompts, tokens = _prompts(4), greedy(6)
    with LLM(model, device=device, **SIZES) as one:
        expected = [one.generate([prompt], tokens)[0].token_ids for prompt in prompts]
    with Engine(
        model, device=device, data_parallel_size=3, background=background, **DATA, **SIZES
    ) as engine:
        for index, prompt in enumerate(prompts):
            found: list[int] = []
            engine.add_request("a", prompt, tokens, data_parallel_rank=(2, 0, 1, 2)[index])
            while engine.has_unfinished():
                for update in engine.step():
                    found.extend(update.token_ids)
            assert found == expected[index]
        native = engine._native
        steps = [native.rank_stats(rank)["steps"] for rank in range(3)]
        assert max(steps) - min(steps) <= 1
        assert [native.rank_stats(rank)["decode_tokens"] > 0 for rank in range(3)] == [True] * 3
        with pytest.raises(RequestError, match="data_parallel_rank"):
            engine.add_request("b", prompts[0], tokens, data_parallel_rank=3)
        engine.check_idle()


def test_requests_are_spread(device: str, model: Path) -> None:
    need_ranks(device, 3)
    with LLM(model, device=device, data_parallel_size=3, **DATA, **SIZES) as llm:
        llm.generate(_prompts(12), greedy(5))
        stats = [llm.engine._native.rank_stats(rank) for rank in range(3)]
        total = llm.engine.stats()
    assert all(each["prefill_tokens"] > 0 for each in stats)
    assert sum(each["decode_tokens"] for each in stats) == total["decode_tokens"] == 12 * 4


def _scores(result: Any) -> list[float]:
    """Log probabilities of a prompt's own tokens but the first, if they were asked for."""
    places = (result.prompt_logprobs or [None])[1:]
    tokens = result.prompt_token_ids[1:]
    return [place[token].logprob for place, token in zip(places, tokens, strict=False)]


def test_grammars_and_scores_of_ranks(device: str, model: Path) -> None:
    need_ranks(device, 2)
    regex = StructuredOutputsParams(regex="[ab]{3,9}c")
    params = [
        greedy(12, ignore_eos=False, structured_outputs=regex),
        greedy(5, prompt_logprobs=2),
        greedy(12, ignore_eos=False, structured_outputs=regex),
        seeded(3, 9),
    ]

    def run(**options: Any) -> list[Any]:
        with LLM(model, device=device, **SIZES, **options) as llm:
            return llm.generate(_prompts(4), params)

    ranks, alone = run(data_parallel_size=2, **DATA), run()
    assert [result.token_ids for result in ranks] == [result.token_ids for result in alone]
    scores, expected = ([_scores(result) for result in results] for results in (ranks, alone))
    assert [len(each) for each in scores] == [0, len(_prompts(4)[1]) - 1, 0, 0]
    np.testing.assert_allclose(scores[1], expected[1], atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"data_parallel_size": 2},
        {"data_parallel_size": 3, "graph_mode": "full", "capture_sizes": [1, 2, 4]},
        {"tensor_parallel_size": 2},
    ],
    ids=["own requests", "in graphs", "shared requests"],
)
def test_halves_of_steps_that_overlap_give_the_same_tokens(
    device: str,
    model: Path,
    answers_of_one: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    need_ranks(device, max(options.get(f"{kind}_parallel_size", 1) for kind in ("data", "tensor")))
    monkeypatch.setenv("MRV1_USE_TBO", "1")
    assert _answers(device, model, _prompts(9), **DATA, **options) == answers_of_one
    # Ranks with one token, and with padding alone, go along in halves.
    with LLM(model, device=device, **DATA, **options, **SIZES) as llm:
        results = llm.generate(_prompts(4), greedy(9))
        assert results[0].token_ids == answers_of_one[0][0]
        assert llm.model.runner.stats()["steps_in_halves"] > 4


@pytest.mark.parametrize(("ranks", "dtype"), [(2, "float32"), (2, "bfloat16"), (4, "bfloat16")])
def test_invariant_ranks_give_the_bits_of_one(
    device: str, model: Path, ranks: int, dtype: str
) -> None:
    need_ranks(device, ranks)
    prompt = make_prompt(20, 3, VOCAB)

    def logits(**options: Any) -> list[np.ndarray]:
        options = {"dtype": dtype, "batch_invariant": True, **options}
        with _open(device, model, **options) as runner:
            rows = [
                rank.add_row(prompt[index:], greedy(3), block_ids=range(1, 9))
                for index, rank in enumerate(runner.ranks)
            ]
            batches = [[(row, 20 - index)] for index, row in enumerate(rows)]
            if len(runner.ranks) == 1:
                runner.execute(batches[0]).result()
            else:
                for step in runner.execute_ranks(batches):
                    step.result()
            return [rank.logits(0) for rank in runner.ranks]

    (one,) = logits()
    several = logits(data_parallel_size=ranks, **DATA)
    assert len(several) == ranks
    np.testing.assert_array_equal(several[0], one)
    assert not np.array_equal(several[1], one)


def test_experts_in_nvfp4_are_shared_out_whole(device: str, tmp_path: Path) -> None:
    need_ranks(device, 2)
    plain = save_random_model(tmp_path / "plain", {**CONFIG, "moe_intermediate_size": 32}, seed=5)
    quantize_checkpoint(plain, tmp_path / "nvfp4", progress=False)

    def run(**options: Any) -> list[Any]:
        return _answers(device, tmp_path / "nvfp4", _prompts(4), **options)

    one = run()
    assert run(data_parallel_size=2, **DATA) == one
    assert run(tensor_parallel_size=2, **DATA) == one


# --- runners by themselves -----------------------------------------------------------------------


def test_runners_of_ranks_are_called_in_turns(device: str, model: Path) -> None:
    """One rank computes, the others run empty batches; then two of them at a time."""
    need_ranks(device, 3)
    prompts = _prompts(3)

    def run(runner: ModelRunner, ranks: list[int]) -> list[list[int]]:
        rows: list[RowHandle] = [
            runner.ranks[rank].add_row(prompt, greedy(6), block_ids=range(1, 20))
            for rank, prompt in zip(ranks, prompts, strict=False)
        ]
        tokens: list[list[int]] = [[] for _ in rows]
        for step in range(6):
            pending = []
            for rank, other in enumerate(runner.ranks):
                mine = [place for place, own in enumerate(ranks) if own == rank]
                batch = [(rows[p], len(prompts[p]) if step == 0 else 1) for p in mine]
                pending.append((mine, other.execute(batch)))
            for mine, launched in pending:
                for place, output in zip(mine, launched.result(), strict=True):
                    assert output.token_id is not None
                    tokens[place].append(output.token_id)
        for row, rank in zip(rows, ranks, strict=True):
            runner.ranks[rank].free_row(row)
        return tokens

    with _open(device, model) as one:
        expected = [run(one, [0])[0]]
        prompts.insert(0, prompts.pop(1))
        expected.insert(1, run(one, [0])[0])
        prompts.insert(0, prompts.pop(1))
    with _open(device, model, data_parallel_size=3, **DATA) as runner:
        assert len(runner.ranks) == 3 and runner.ranks[0] is runner
        assert run(runner, [1]) == expected[:1]
        assert run(runner, [2, 0]) == expected
        row = runner.ranks[1].add_row(prompts[0], greedy(6), block_ids=range(1, 20))
        batch = [(row, len(prompts[0]))]
        with pytest.raises(InvalidArgumentError, match="row 3 is free"):
            runner.execute_ranks([[], batch, [(3, 1)]])
        with pytest.raises(InvalidArgumentError, match="one for each of 3 ranks"):
            runner.execute_ranks([[], batch])
        for step in range(3):
            outputs = [step.result() for step in runner.execute_ranks([[], batch, []])]
            assert outputs[0] == outputs[2] == []
            assert outputs[1][0].token_id == expected[0][step]
            batch = [(row, 1)]
        runner.ranks[1].free_row(row)
        batches = [rank.stats()["batches"] for rank in runner.ranks]
        assert len(set(batches)) == 1
        assert runner.ranks[1].free_rows == SIZES["max_num_seqs"]


def test_ranks_whose_batches_miss_the_sizes_say_so(
    device: str, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    need_ranks(device, 2)
    sizes = {"graph_mode": "full", "capture_sizes": [1], "piecewise_sizes": []}
    runner = _open(device, model, data_parallel_size=2, **DATA, **sizes)
    try:
        rows = [
            [
                rank.add_row([1, 2, 3], greedy(9), block_ids=[[2 * place + 1, 2 * place + 2]])
                for place in range(2)
            ]
            for rank in runner.ranks
        ]

        def run(*batches: list[tuple[RowHandle, int]]) -> list[str]:
            caplog.clear()
            for step in runner.execute_ranks(batches):
                step.result()
            return caplog.messages

        with caplog.at_level(logging.INFO, logger="mrv1"):
            prompts = [[(row, 3) for row in own] for own in rows]
            (said,) = run(*prompts)
            assert said.startswith("a batch of 2 requests with 6 tokens runs eager")
            decode = [(row, 1) for row in rows[1]]
            (said,) = run([], decode)
            assert said.startswith("rank 1: a batch of 2 requests with 2 tokens runs eager")
            assert run([], decode) == []
    finally:
        runner.close()


def test_each_rank_has_its_experts_only(device: str, model: Path) -> None:
    need_ranks(device, 3)

    def weights(**options: Any) -> tuple[list[int], int]:
        with _open(device, model, **options) as runner:
            plans = runner.model.runner.memory_plans
            return [plan["weights"] for plan in plans], runner.model.data_parallel_size

    (whole,), size = weights()
    assert size == 1
    parts, size = weights(data_parallel_size=3, **DATA)
    assert size == 3
    expert = 3 * CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"] * 4
    layers = CONFIG["num_hidden_layers"]
    # 3, 2 and 2 of 7, stored in panels of 16 rows, which take some more.
    saved = [(whole - part) / (layers * expert) for part in parts]
    assert saved[1] == saved[2]
    assert EXPERTS - 3 <= saved[0] < 1.6 * (EXPERTS - 3)
    assert saved[0] / (EXPERTS - 3) == pytest.approx(saved[1] / (EXPERTS - 2))


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "ranks", "most"),
    [
        # Pairs of a token and an expert, and pieces of 16 bytes of their sums.
        ({"num_experts": 128, "num_experts_per_tok": 128}, 1, (2**31 - 1) // 128),
        ({"num_experts": 96, "num_experts_per_tok": 96}, 2, (2**31 - 1) // (2 * 96)),
        ({"hidden_size": 256}, 2, (2**30 - 1) // 64),
    ],
    ids=["pairs", "pairs of ranks", "sums of ranks"],
)
def test_steps_larger_than_kernels_count_are_refused(
    changes: dict[str, Any], ranks: int, most: int
) -> None:
    config = {**CONFIG, "num_hidden_layers": 1, "moe_intermediate_size": 4, **changes}
    size = {"dtype": "float32", "max_num_seqs": 1, "num_kv_blocks": 8, "max_model_len": 16}
    if ranks > 1:
        size |= {"data_parallel_size": ranks, **DATA}
    options = RunnerOptions(device="cpu", max_num_batched_tokens=2**24, **size)
    field = "max_num_batched_tokens" + (" or max_tokens_per_rank" if ranks > 1 else "")
    match = rf"{field} must be in \[1, {most}\], not {2**24}: "
    with pytest.raises(InvalidArgumentError, match=match):
        random_runner(ModelConfig.from_values(config), options)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("background", [True, False])
def test_a_rank_that_fails_ends_all(device: str, model: Path, rank: int, background: bool) -> None:
    """Whether it has requests or not."""
    need_ranks(device, 2)
    with LLM(
        model, device=device, data_parallel_size=2, background=background, **DATA, **SIZES
    ) as llm:
        llm.generate(_prompts(2), greedy(3))
        llm.model.runner.fail_next_step("as a test wants it", rank=rank)
        start = time.monotonic()
        for result in llm.generate(_prompts(1), greedy(30)):
            assert result.error is not None
            assert f"rank {rank} failed in step" in result.error
            assert "as a test wants it" in result.error
        assert time.monotonic() - start < WAIT_S
        with pytest.raises(DeviceError, match=f"rank {rank} failed"):
            llm.generate(_prompts(1), greedy(4))
    with pytest.raises(Mrv1Error):
        llm.generate(_prompts(1), greedy(4))


def test_aborts_leave_the_other_ranks_alone(device: str, model: Path) -> None:
    need_ranks(device, 2)
    with Engine(
        model, device=device, data_parallel_size=2, background=False, **DATA, **SIZES
    ) as engine:
        for index, prompt in enumerate(_prompts(6)):
            engine.add_request(str(index), prompt, greedy(40), data_parallel_rank=index % 2)
        found: dict[str, list[int]] = {str(index): [] for index in range(6)}
        ends: dict[str, str] = {}
        aborted = False
        while engine.has_unfinished():
            for update in engine.step():
                found[update.request_id].extend(update.token_ids)
                if update.finish_reason is not None:
                    ends[update.request_id] = update.finish_reason
            if not aborted and all(len(found[name]) > 2 for name in ("0", "2", "1")):
                aborted = True
                # All of rank 0, which goes along with rank 1 from then on.
                for name in ("0", "2", "4"):
                    engine.abort(name)
        engine.check_idle()
        assert aborted
        assert {ends[name] for name in ("1", "3", "5")} == {"length"}
        assert {ends[name] for name in ("0", "2", "4")} == {"abort"}
        assert [len(found[name]) for name in ("1", "3", "5")] == [40, 40, 40]


@pytest.mark.parametrize("seed", [1, 2])
def test_requests_come_and_go_at_random(device: str, model: Path, seed: int) -> None:
    """On ranks that are full, empty and in between, with little memory."""
    need_ranks(device, 3)
    draw = np.random.default_rng(seed)
    prompts = [make_prompt(int(length), 7, VOCAB) for length in draw.integers(1, 40, 24)]
    params = [greedy(int(count)) for count in draw.integers(1, 25, 24)]
    with LLM(model, device=device, **SIZES) as one:
        expected = [result.token_ids for result in one.generate(prompts, params)]
    sizes = {**SIZES, "num_kv_blocks": 18, "max_model_len": 64}
    found: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    with Engine(
        model, device=device, data_parallel_size=3, background=False, **DATA, **sizes
    ) as engine:
        waiting = list(range(24))
        for turn in range(100_000):
            while waiting and draw.random() < 0.6:
                index = waiting.pop()
                rank = None if draw.random() < 0.5 else int(draw.integers(3))
                engine.add_request(
                    str(index), prompts[index], params[index], data_parallel_rank=rank
                )
                found[str(index)] = []
            running = [name for name in found if name not in ends]
            if running and draw.random() < 0.08:
                engine.abort(running[int(draw.integers(len(running)))])
            for update in engine.step():
                found[update.request_id].extend(update.token_ids)
                if update.finish_reason is not None:
                    ends[update.request_id] = update.finish_reason
            if turn % 8 == 0:
                engine._native.check_invariants()
            if not waiting and not engine.has_unfinished():
                break
        engine.check_idle()
        stats = engine.stats()
    # What it is there for has happened.
    assert set(ends.values()) == {"length", "abort"}
    assert stats["preemptions"] > 0 and stats["prefix_hit_tokens"] > 0
    for name, tokens in found.items():
        whole = expected[int(name)]
        assert tokens == (whole if ends[name] == "length" else whole[: len(tokens)])


def test_an_engine_of_ranks_is_closed_in_the_middle(device: str, model: Path) -> None:
    need_ranks(device, 3)
    llm = LLM(model, device=device, data_parallel_size=3, **DATA, **SIZES)
    stream = llm.stream(_prompts(2), greedy(90))
    next(stream)
    start = time.monotonic()
    llm.close()
    assert time.monotonic() - start < WAIT_S


# --- how much a rank may send --------------------------------------------------------------------


def test_a_step_has_no_more_tokens_than_there_is_room_for(device: str, model: Path) -> None:
    need_ranks(device, 2)
    options = {"data_parallel_size": 2, **DATA, "max_tokens_per_rank": 6}
    with _open(device, model, **options) as runner:
        assert runner.model.max_num_batched_tokens == 6
        row = runner.add_row(make_prompt(9, 1, VOCAB), greedy(4), block_ids=range(1, 9))
        with pytest.raises(InvalidArgumentError, match="max_num_batched_tokens is 6"):
            runner.execute([(row, 7)])
        pending = [rank.execute([(row, 6)] if rank is runner else []) for rank in runner.ranks]
        assert pending[0].result()[0].num_computed == 6
        for each in pending[1:]:
            assert each.result() == []


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data_parallel_size": 2}, "must be 1 without expert_parallel"),
        ({"data_parallel_size": 9, **DATA}, r"integer in \[1, 8\]"),
        ({"data_parallel_size": 8, **DATA}, "num_experts = 7"),
        (
            {"data_parallel_size": 3, **DATA, "batch_invariant": True},
            "data_parallel_size = 3: must be 1, 2, 4 or 8 with batch_invariant",
        ),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2, **DATA}, "tensor_parallel_size = 2"),
        (
            {"data_parallel_size": 2, "pipeline_parallel_size": 2, **DATA},
            "pipeline_parallel_size = 2",
        ),
        ({"expert_parallel": 1}, "True or False"),
        ({"max_tokens_per_rank": 8}, "None with data_parallel_size = 1"),
        ({"data_parallel_size": 2, **DATA, "max_tokens_per_rank": 3}, r"integer in \[4, "),
        ({"data_parallel_size": 2, **DATA, "max_tokens_per_rank": "many"}, "None or an integer"),
        ({"data_parallel_size": 2, **DATA, "stream": 1234}, "each rank has a stream"),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    model: Path, options: dict[str, Any], sentence: str
) -> None:
    before = threading.active_count()
    with pytest.raises(InvalidArgumentError, match=sentence):
        _open("cpu", model, **options)
    assert threading.active_count() == before


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="the model has no experts"):
        _open("cpu", LLAMA, tensor_parallel_size=2, expert_parallel=True)


def test_the_command_line_takes_ranks(
    device: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_ranks(device, 2)
    shared = ["generate", "--model", str(model), "--device", device, "--no-progress"]
    shared += ["--max-tokens", "8", "--temperature", "0", "--dtype", "float32", "a prompt", "b"]
    assert cli.main(shared) == 0
    one = capsys.readouterr().out
    two = ["--expert-parallel", "--data-parallel-size", "2", "--max-tokens-per-rank", "300"]
    assert cli.main([*shared, *two]) == 0
    assert capsys.readouterr().out == one
    assert cli.main([*shared, "--expert-parallel", "--tensor-parallel-size", "2"]) == 0
    assert capsys.readouterr().out == one
