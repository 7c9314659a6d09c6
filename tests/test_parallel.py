# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: several ranks give what one gives, and end together."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_data import GOLDEN_NAMES, load_golden, relative_error
from mrv1 import LLM, cli, parallel
from mrv1.config import ModelConfig
from mrv1.errors import DeviceError, InvalidArgumentError, Mrv1Error, OutOfMemoryError
from mrv1.loader import RunnerOptions, wire_ranks
from mrv1.models.experts import ExpertsConfig
from mrv1.random_model import save_random_model
from mrv1.runner import ModelRunner
from mrv1.structured_outputs_params import StructuredOutputsParams
from serving_tools import (
    LLAMA,
    MODELS,
    Tensors,
    copy_model,
    greedy,
    make_prompt,
    need_ranks,
    open_runner,
    run_to_end,
    seeded,
    tokens_of,
)
from test_models import TOLERANCE, forced, open_golden

WAIT_S = 10.0


def _config(name: str) -> ModelConfig:
    return ModelConfig.from_dir(load_golden(name).model_dir)


def _fits(name: str, ranks: int, *, batch_invariant: bool) -> bool:
    try:
        parallel.check_sizes(
            _config(name),
            ranks,
            batch_invariant=batch_invariant,
        )
    except InvalidArgumentError:
        return False
    return True


# Every model of the goldens at the numbers of ranks that its sizes allow.
SHARED = [
    (name, ranks)
    for name in GOLDEN_NAMES
    for ranks in (2, 3, 4)
    if _fits(name, ranks, batch_invariant=False)
]
INVARIANT = [
    (name, ranks)
    for name in GOLDEN_NAMES
    for ranks in (2, 4)
    if _fits(name, ranks, batch_invariant=True)
]
EXPERTS = [name for name in GOLDEN_NAMES if isinstance(_config(name), ExpertsConfig)]


def test_every_family_has_a_model_that_is_shared_out() -> None:
    def families(models: list[tuple[str, int]]) -> set[str]:
        return {_config(name).model_type for name, _ in models}

    everything = {_config(name).model_type for name in GOLDEN_NAMES}
    assert families(SHARED) == everything
    assert families(INVARIANT) == everything
    assert families([(name, 4) for name in EXPERTS]) == {"qwen3_moe", "mixtral", "ernie4_5_moe"}
    assert {(name, ranks) for name in EXPERTS for ranks in (2, 4)} <= set(SHARED)
    # Among them tensors that hold several projections, and fewer key/value heads than ranks.
    assert ("phi4-mini", 4) in INVARIANT and ("llama3-tied", 4) in INVARIANT
    assert ("phi3", 3) in SHARED


@pytest.mark.parametrize("fusion", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize(("name", "ranks"), SHARED)
def test_ranks_agree_with_transformers(device: str, name: str, ranks: int, fusion: bool) -> None:
    need_ranks(device, ranks)
    golden = load_golden(name)
    with open_golden(device, name, fusion=fusion, tensor_parallel_size=ranks) as runner:
        for index, prompt in enumerate(golden.prompts):
            for place, position in enumerate(golden.positions[index]):
                logits = forced(runner, prompt[: position + 1], 16)
                error = relative_error(logits[None], golden.logits[index][place][None])
                assert error < TOLERANCE, f"prompt {index}, position {position}: {error:.2e}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "ranks"), INVARIANT)
def test_invariant_ranks_give_the_bits_of_one(
    device: str, name: str, ranks: int, dtype: str
) -> None:
    need_ranks(device, ranks)
    prompt = load_golden(name).prompts[-1]

    def logits(size: int) -> list[np.ndarray]:
        with open_golden(
            device, name, dtype=dtype, batch_invariant=True, tensor_parallel_size=size
        ) as runner:
            return [forced(runner, prompt, chunk) for chunk in (len(prompt), 7)]

    for one, several in zip(logits(1), logits(ranks), strict=True):
        np.testing.assert_array_equal(one, several)


@pytest.mark.parametrize("ranks", [2, 4])
def test_invariant_ranks_give_the_bits_of_one_where_a_gpu_splits_columns(
    device: str, tmp_path: Path, ranks: int
) -> None:
    """Into how many parts follows from a weight's rows: 3072 here, of which ranks have some."""
    need_ranks(device, ranks)
    values = json.loads((LLAMA / "config.json").read_text())
    values |= {
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 3072,
    }
    directory = save_random_model(tmp_path / "model", values)

    def logits(size: int) -> np.ndarray:
        options = {"batch_invariant": True, "max_num_seqs": 2, "tensor_parallel_size": size}
        with ModelRunner(directory, device=device, **options) as runner:
            return forced(runner, make_prompt(20, 3), 20)

    np.testing.assert_array_equal(logits(1), logits(ranks))


@pytest.mark.parametrize("graph_mode", ["eager", "piecewise", "full"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3"])
def test_every_way_to_the_device_gives_the_same_tokens(
    device: str, graph_mode: str, kv_cache_dtype: str
) -> None:
    need_ranks(device, 2)
    prompt = make_prompt(37, 5)

    def tokens(size: int, mode: str) -> list[int]:
        with open_runner(
            device,
            dtype="bfloat16",
            batch_invariant=True,
            tensor_parallel_size=size,
            graph_mode=mode,
            kv_cache_dtype=kv_cache_dtype,
        ) as runner:
            return tokens_of(run_to_end(runner, prompt, seeded(4, 24)))

    assert tokens(2, graph_mode) == tokens(1, "eager")


def _calibrate(tensors: Tensors) -> None:
    """Scales of keys and values, one a head and unlike each other."""
    for layer in range(2):
        for side in "kv":
            scales = np.array([0.01, 0.03], np.float32) * (1 + layer)
            tensors[f"model.layers.{layer}.self_attn.{side}_scale"] = scales


def test_calibrated_scales_follow_their_heads(device: str, tmp_path: Path) -> None:
    need_ranks(device, 2)
    model = copy_model(tmp_path / "calibrated", change=_calibrate)
    prompt = make_prompt(30, 3)

    def tokens(size: int) -> list[int]:
        with open_runner(
            device,
            model,
            kv_cache_dtype="fp8_e4m3",
            batch_invariant=True,
            tensor_parallel_size=size,
        ) as runner:
            assert runner.model.kv_scales == "static"
            return tokens_of(run_to_end(runner, prompt, greedy(24)))

    assert tokens(1) == tokens(2)


# --- requests of all kinds -----------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "num_kv_blocks": 60,
    "num_threads": 1,
    "batch_invariant": True,
    "progress": False,
}
MIXED = (
    greedy(12),
    seeded(1, 20, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.3),
    seeded(2, 14, n=3, min_p=0.02, logit_bias={5: 2.0, 9: -4.0}),
    greedy(9, logprobs=4, prompt_logprobs=3),
    seeded(3, 16, bad_words=["a", "the"], stop_token_ids=[17], min_tokens=4),
    seeded(4, 12, allowed_token_ids=list(range(40, 90)), logprobs=2),
    greedy(24, ignore_eos=False, structured_outputs=StructuredOutputsParams(regex="[ab]{3,9}c")),
)


def answers(
    device: str, model: Path = LLAMA, stats: dict[str, int] | None = None, **options: Any
) -> list[Any]:
    """What requests of all kinds get, text and times aside; `stats` gets the runner's counts."""
    prompts = [make_prompt(5 + 7 * index, index) for index in range(len(MIXED))]
    with LLM(model, device=device, **{**SIZES, **options}) as llm:
        results = llm.generate(prompts, list(MIXED), progress=False)
        llm.engine.check_idle()
        if stats is not None:
            stats.update(llm.engine.model.runner.stats())
    for result in results:
        assert result.error is None
    return [
        [
            (output.token_ids, output.finish_reason, output.logprobs, result.prompt_logprobs)
            for output in result.outputs
        ]
        for result in results
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        {"background": False},
    ],
    ids=["plain", "drafts", "stepped"],
)
@pytest.mark.parametrize("ranks", [2])
def test_requests_of_all_kinds_get_the_answers_of_one_rank(
    device: str, ranks: int, options: dict[str, Any]
) -> None:
    need_ranks(device, ranks)
    assert answers(device, tensor_parallel_size=ranks, **options) == answers(device)


def test_all_ranks_hold_the_same_rows(device: str) -> None:
    need_ranks(device, 2)
    with open_runner(device, tensor_parallel_size=2, keep_hidden_states=True) as runner:
        rows = [
            runner.add_row(
                make_prompt(9, seed), greedy(4), block_ids=range(1 + 4 * seed, 5 + 4 * seed)
            )
            for seed in range(3)
        ]
        runner.execute([(row, 9) for row in rows]).result()
        assert runner.hidden_states(1).shape == (9, 128)
        assert runner.logits(2).shape == (328,)
        runner.copy_blocks([(1, 30)])
        pending = [runner.execute([(row, 1) for row in rows]) for _ in range(2)]
        for step in pending:
            assert all(output.token_id is not None for output in step.result())
        for row in rows:
            runner.free_row(row)
        assert runner.free_rows == 4


# --- what is loaded ------------------------------------------------------------------------------


def test_ranks_hold_and_read_their_part(device: str) -> None:
    need_ranks(device, 2)
    with open_runner(device) as one, open_runner(device, tensor_parallel_size=2) as two:
        whole, part = one.model.runner.memory_plan, two.model.runner.memory_plan
        # Norms, and rows that fill panels up, are all that ranks do not share out.
        assert 0.5 <= part["weights"] / whole["weights"] < 0.53
        assert part["per_block"] * 2 == whole["per_block"]
        loaded = [runner.model.startup_bytes["load weights"] for runner in (one, two)]
        norms = 5 * 128 * 2  # of float16
        assert loaded == [
            (LLAMA / "model.safetensors").stat().st_size - _header(),
            loaded[0] + norms,
        ]
        assert two.model.tensor_parallel_size == 2
        assert len({id(each) for each in two.model.devices}) == 2


def _header() -> int:
    with (LLAMA / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("llama2", {"tensor_parallel_size": 0}, r"integer in \[1, 8\]"),
        ("llama2", {"tensor_parallel_size": 9}, r"integer in \[1, 8\]"),
        ("llama2", {"tensor_parallel_size": True}, r"integer in \[1, 8\]"),
        ("llama2", {"tensor_parallel_size": 4}, "divisor of the model's num_attention_heads = 2"),
        ("qwen3-untied", {"tensor_parallel_size": 3}, "intermediate_size = 104"),
        ("phi3", {"tensor_parallel_size": 3, "batch_invariant": True}, "1, 2, 4 or 8"),
        ("llama2", {"tensor_parallel_size": 2, "stream": 1234}, "each rank has a stream"),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    model: str, options: dict[str, Any], sentence: str
) -> None:
    before = threading.active_count()
    with pytest.raises(InvalidArgumentError, match=sentence) as refusal:
        ModelRunner(MODELS / model, device="cpu", num_kv_blocks=8, progress=False, **options)
    assert "tensor_parallel_size" in str(refusal.value)
    assert threading.active_count() == before


def test_ranks_are_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRV1_TUNE", "1")
    with pytest.raises(InvalidArgumentError, match="MRV1_TUNE = True: .* must be False"):
        ModelRunner(LLAMA, device="cpu", num_kv_blocks=8, progress=False, tensor_parallel_size=2)


def test_memory_that_a_rank_lacks_names_the_rank(device: str) -> None:
    need_ranks(device, 2)
    with pytest.raises(OutOfMemoryError, match="rank 0: "):
        open_runner(device, tensor_parallel_size=2, num_kv_blocks=2**28 - 1)


def test_key_value_heads_must_go_into_ranks() -> None:
    config = {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96, "head_dim": 8}
    values = {**json.loads((LLAMA / "config.json").read_text()), **config}
    options = RunnerOptions(tensor_parallel_size=2)
    with pytest.raises(
        InvalidArgumentError, match="multiple of the model's num_key_value_heads = 3"
    ):
        wire_ranks(ModelConfig.from_values(values), "float32", options)
    odd = {**values, "num_key_value_heads": 12, "intermediate_size": 200, "num_attention_heads": 12}
    invariant = RunnerOptions(tensor_parallel_size=2, batch_invariant=True)
    with pytest.raises(InvalidArgumentError, match="intermediate_size = 200 is no multiple of 16"):
        wire_ranks(ModelConfig.from_values(odd), "float32", invariant)


def test_a_family_without_marks_is_refused_where_it_would_be_wrong() -> None:
    from mrv1.builder import Builder
    from mrv1.parallel import Shard

    p = Builder("float32", shard=Shard(0, 2))
    x = p.embedding(p.matrix("embed", 32, 16))
    with pytest.raises(InvalidArgumentError, match="split by cols"):
        p.linear(x, p.matrix("o", 16, 16), row_parallel=True)
    with pytest.raises(InvalidArgumentError, match="split by rows"):
        p.linear(x, p.matrix("o2", 16, 32, split="cols"))


def test_the_command_line_takes_ranks(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    need_ranks(device, 2)
    shared = ["generate", "--model", str(LLAMA), "--device", device, "--no-progress"]
    shared += ["--max-tokens", "8", "--temperature", "0", "--dtype", "float32", "a prompt"]
    assert cli.main([*shared, "--tensor-parallel-size", "2"]) == 0
    two = capsys.readouterr().out
    assert cli.main(shared) == 0
    assert capsys.readouterr().out == two
    assert cli.main([*shared, "--tensor-parallel-size", "3"]) != 0
    assert "tensor_parallel_size" in capsys.readouterr().err


def test_the_documented_table_is_that_of_the_checks() -> None:
    script = Path(__file__).resolve().parent.parent / "scripts" / "make_parallel_table.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("nothing_left")
def test_a_rank_that_fails_ends_the_engine(device: str, rank: int) -> None:
    need_ranks(device, 2)
    with LLM(LLAMA, device=device, tensor_parallel_size=2, **SIZES) as llm:
        assert len(llm.generate([make_prompt(5, 1)], greedy(4), progress=False)) == 1
        llm.engine.model.runner.fail_next_step("as a test wants it", rank=rank)
        start = time.monotonic()
        results = llm.generate([make_prompt(6, 2)], greedy(30), progress=False)
        assert time.monotonic() - start < WAIT_S
        for result in results:
            assert result.error is not None
            assert f"rank {rank} failed in step" in result.error
            assert "as a test wants it" in result.error
        with pytest.raises(DeviceError, match=f"rank {rank} failed"):
            llm.generate([make_prompt(5, 1)], greedy(4), progress=False)
    with pytest.raises(Mrv1Error):
        llm.generate([make_prompt(5, 1)], greedy(4), progress=False)


@pytest.mark.usefixtures("nothing_left")
def test_a_step_that_fails_everywhere_fails_alone(device: str) -> None:
    need_ranks(device, 2)
    with LLM(LLAMA, device=device, tensor_parallel_size=2, **SIZES) as llm:
        expected = llm.generate([make_prompt(5, 1)], greedy(8), progress=False)
        llm.engine.model.runner.fail_next_step("once")
        failed = llm.generate([make_prompt(6, 2)], greedy(8), progress=False)
        assert failed[0].error is not None and "once" in failed[0].error
        again = llm.generate([make_prompt(5, 1)], greedy(8), progress=False)
        assert again[0].outputs[0].token_ids == expected[0].outputs[0].token_ids
        llm.engine.check_idle()


@pytest.mark.usefixtures("nothing_left")
def test_an_engine_is_closed_in_the_middle(device: str) -> None:
    need_ranks(device, 2)
    llm = LLM(LLAMA, device=device, tensor_parallel_size=2, **SIZES)
    stream = llm.stream([make_prompt(5, 1), make_prompt(9, 2)], greedy(60))
    next(stream)
    start = time.monotonic()
    llm.close()
    assert time.monotonic() - start < WAIT_S
