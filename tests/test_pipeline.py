# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Pipelines: stages of a model give what the whole gives, bit for bit."""

from __future__ import annotations

import itertools
import logging
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_data import GOLDEN_NAMES, load_golden
from mrv1 import LLM, _core, cli
from mrv1.builder import Builder
from mrv1.config import ModelConfig
from mrv1.engine import Engine
from mrv1.errors import DeviceError, InvalidArgumentError, OutOfMemoryError
from mrv1.loader import RunnerOptions, load_model, wire_model, wire_ranks
from mrv1.models.experts import ExpertsConfig
from mrv1.runner import ModelRunner
from mrv1.tokenizer import Tokenizer
from published_configs import PUBLISHED
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
from test_models import forced, open_golden
from test_parallel import SIZES, WAIT_S, answers

MATRIX_BYTES = 2  # of bfloat16

# The options of a pipeline, or of a pipeline of ranks, and how many devices that takes.
Sizes = dict[str, int]
PIPELINES: tuple[Sizes, ...] = (
    {"pipeline_parallel_size": 2},
    {"pipeline_parallel_size": 4},
    {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
)


def _named(sizes: Sizes) -> str:
    return " x ".join(str(size) for size in sizes.values())


def _need(device: str, sizes: Sizes) -> None:
    need_ranks(device, math.prod(sizes.values()))


def _repeat_layers(tensors: Tensors) -> None:
    """Five layers, no two alike, of two."""
    for name, tensor in list(tensors.items()):
        for layer in range(2, 5):
            if f".{layer % 2}." in name:
                other = name.replace(f".{layer % 2}.", f".{layer}.")
                tensors[other] = np.flip(tensor, axis=0).copy() if layer < 4 else -tensor


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of five layers."""
    directory = tmp_path_factory.mktemp("deep") / "model"
    return copy_model(directory, config={"num_hidden_layers": 5}, change=_repeat_layers)


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_stages_give_the_bits_of_one(device: str, name: str, dtype: str) -> None:
    layers = ModelConfig.from_dir(load_golden(name).model_dir).num_hidden_layers
    need_ranks(device, layers)
    prompt = load_golden(name).prompts[-1]

    def logits(size: int) -> list[np.ndarray]:
        with open_golden(device, name, dtype=dtype, pipeline_parallel_size=size) as runner:
            return [forced(runner, prompt, chunk) for chunk in (len(prompt), 7)]

    for one, several in zip(logits(1), logits(layers), strict=True):
        np.testing.assert_array_equal(one, several)


@pytest.mark.parametrize("sizes", PIPELINES, ids=_named)
def test_stages_of_ranks_give_the_bits_of_one(device: str, deep: Path, sizes: Sizes) -> None:
    _need(device, sizes)
    prompt = make_prompt(40, 8)

    def logits(sizes: Sizes) -> list[np.ndarray]:
        with open_runner(device, deep, dtype="bfloat16", batch_invariant=True, **sizes) as runner:
            return [forced(runner, prompt, chunk) for chunk in (len(prompt), 7)]

    for one, several in zip(logits({}), logits(sizes), strict=True):
        np.testing.assert_array_equal(one, several)


@pytest.mark.parametrize("graph_mode", ["eager", "piecewise", "full"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3"])
def test_every_way_to_the_device_gives_the_same_tokens(
    device: str, deep: Path, graph_mode: str, kv_cache_dtype: str
) -> None:
    need_ranks(device, 3)
    prompt = make_prompt(37, 5)

    def tokens(size: int, mode: str) -> list[int]:
        with open_runner(
            device,
            deep,
            dtype="bfloat16",
            pipeline_parallel_size=size,
            graph_mode=mode,
            kv_cache_dtype=kv_cache_dtype,
        ) as runner:
            return tokens_of(run_to_end(runner, prompt, seeded(4, 24)))

    assert tokens(3, graph_mode) == tokens(1, "eager")


def _calibrate(tensors: Tensors) -> None:
    """Five layers with scales of keys and values, one a head and unlike each other."""
    _repeat_layers(tensors)
    for layer in range(5):
        for side in "kv":
            scales = np.array([0.01, 0.03], np.float32) * (1 + layer)
            tensors[f"model.layers.{layer}.self_attn.{side}_scale"] = scales


@pytest.mark.parametrize("sizes", [PIPELINES[1], PIPELINES[2]], ids=_named)
def test_calibrated_scales_follow_their_layers(device: str, tmp_path: Path, sizes: Sizes) -> None:
    _need(device, sizes)
    model = copy_model(tmp_path / "model", config={"num_hidden_layers": 5}, change=_calibrate)
    prompt = make_prompt(30, 3)

    def tokens(sizes: Sizes) -> list[int]:
        with open_runner(
            device, model, kv_cache_dtype="fp8_e4m3", batch_invariant=True, **sizes
        ) as runner:
            assert runner.model.kv_scales == "static"
            return tokens_of(run_to_end(runner, prompt, greedy(24)))

    assert tokens({}) == tokens(sizes)


# --- requests of all kinds -----------------------------------------------------------------------


DRAFTS: dict[str, Any] = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}


@pytest.fixture(scope="module")
def whole_answers(device: str, deep: Path) -> list[Any]:
    return answers(device, deep)


@pytest.mark.parametrize(
    "options",
    [{}, DRAFTS, {"background": False}, {"graph_mode": "full"}, {"num_kv_blocks": 22}],
    ids=["plain", "drafts", "stepped", "graphs", "preempted"],
)
@pytest.mark.parametrize("sizes", PIPELINES, ids=_named)
def test_requests_of_all_kinds_get_the_answers_of_one_stage(
    device: str, deep: Path, whole_answers: list[Any], sizes: Sizes, options: dict[str, Any]
) -> None:
    _need(device, sizes)
    assert answers(device, deep, **sizes, **options) == whole_answers


def test_what_a_runner_shows_is_that_of_one_stage(device: str, deep: Path) -> None:
    need_ranks(device, 3)

    def seen(size: int) -> list[np.ndarray]:
        with open_runner(
            device,
            deep,
            batch_invariant=True,
            pipeline_parallel_size=size,
            keep_hidden_states=True,
            infer_param_view=True,
        ) as runner:
            rows = [
                runner.add_row(
                    make_prompt(9, seed), greedy(4), block_ids=range(1 + 4 * seed, 5 + 4 * seed)
                )
                for seed in range(2)
            ]
            runner.execute([(row, 9) for row in rows]).result()
            # The second row goes on with the keys and values of the first, on all stages.
            runner.copy_blocks([(block, block + 4) for block in range(1, 5)])
            runner.execute([(row, 1) for row in rows]).result()
            found = [runner.hidden_states(1), runner.logits(0), runner.logits(1)]
            found += [values for _, values in sorted(runner.infer_params().items())]
            for row in rows:
                runner.free_row(row)
            assert runner.free_rows == 4
        return found

    for one, several in zip(seen(1), seen(3), strict=True):
        np.testing.assert_array_equal(one, several)


def test_windows_are_left_behind_on_every_stage(device: str) -> None:
    """Two layers with a window and one without, of which each stage has one."""
    need_ranks(device, 3)
    golden = load_golden("gemma3")

    def tokens(size: int) -> dict[str, list[int]]:
        sizes = {name: value for name, value in SIZES.items() if name != "progress"}
        options = RunnerOptions(device=device, pipeline_parallel_size=size, **sizes)
        model = load_model(golden.model_dir, options, progress=False)
        assert model.pipeline_layers == ((3,) if size == 1 else (1, 1, 1))
        tokenizer = Tokenizer.from_dir(golden.tokenizer_dir, model.config.vocab_size)
        with Engine.from_model(model, tokenizer) as engine:
            found: dict[str, list[int]] = {}
            for index in range(4):
                engine.add_request(str(index), make_prompt(9 + 15 * index, index), greedy(40))
            while engine.has_unfinished():
                for update in engine.step():
                    assert update.error is None
                    found.setdefault(update.request_id, []).extend(update.token_ids)
            engine.check_idle()
        return found

    assert tokens(3) == tokens(1)


# --- what is loaded ------------------------------------------------------------------------------


def test_stages_hold_and_read_their_layers(device: str, deep: Path) -> None:
    need_ranks(device, 2)
    with open_runner(device, deep) as one, open_runner(device, deep, **PIPELINES[0]) as two:
        assert two.model.pipeline_parallel_size == 2 and two.model.tensor_parallel_size == 1
        assert two.model.pipeline_layers == (3, 2)
        whole, parts = one.model.runner.memory_plan, two.model.runner.memory_plans
        assert sum(part["weights"] for part in parts) == whole["weights"]
        assert [part["per_block"] * 5 for part in parts] == [
            whole["per_block"] * layers for layers in (3, 2)
        ]
        loaded = [runner.model.startup_bytes["load weights"] for runner in (one, two)]
        assert loaded[0] == loaded[1]
        # The device that has the logits.
        assert two.model.device is two.model.devices[1]


def test_blocks_are_as_many_as_fit_the_fullest_stage(device: str, deep: Path) -> None:
    need_ranks(device, 2)
    budget = 40 * 4 * 4 * 2 * 128 * 4  # 40 blocks of 4 tokens of 4 layers, in float32

    def blocks(layers: list[int]) -> int:
        with open_runner(
            device,
            deep,
            kv_cache_memory=budget,
            num_kv_blocks=None,
            pipeline_layers=layers,
            **PIPELINES[0],
        ) as runner:
            assert runner.model.pipeline_layers == tuple(layers)
            return runner.model.num_kv_blocks

    assert blocks([1, 4]) == blocks([4, 1]) == 40
    assert blocks([3, 2]) == 53
    budget //= 40
    with pytest.raises(OutOfMemoryError, match=r"rank 1 \(stage 1\): the KV cache may take"):
        blocks([1, 4])


def test_the_log_says_what_each_stage_has(
    device: str, deep: Path, caplog: pytest.LogCaptureFixture
) -> None:
    need_ranks(device, 2)
    with caplog.at_level(logging.INFO, "mrv1"), open_runner(device, deep, **PIPELINES[0]):
        pass
    assert "stage 0, layers 0 to 2: weights" in caplog.text
    assert "stage 1, layers 3 to 4: weights" in caplog.text


def test_the_command_line_takes_stages(
    device: str, deep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_ranks(device, 3)
    shared = ["generate", "--model", str(deep), "--device", device, "--no-progress"]
    shared += ["--max-tokens", "8", "--temperature", "0", "--dtype", "float32", "a prompt"]
    assert cli.main(shared) == 0
    one = capsys.readouterr().out
    stages = ["--pipeline-parallel-size", "3", "--pipeline-layers", "1,3,1"]
    assert cli.main([*shared, *stages]) == 0
    assert capsys.readouterr().out == one
    assert cli.main([*shared, "--pipeline-layers", "2,3"]) != 0
    assert "pipeline_layers = [2, 3]" in capsys.readouterr().err


# --- what each stage has -------------------------------------------------------------------------


def _published(name: str) -> ModelConfig:
    return ModelConfig.from_values(PUBLISHED[name][0])


def _weight_bytes(program: _core.Program) -> int:
    return sum(
        cols * sum(rows for _, rows in segments) * (4 if is_vector else MATRIX_BYTES)
        for _, is_vector, cols, segments in program.weights
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_cut_at_every_layer(name: str) -> None:
    config = _published(name)
    whole = wire_model(config, "bfloat16", fusion=False)
    hidden = [("hidden", config.hidden_size, "bfloat16")]
    windows, places = whole.kv_layout
    # Programs of many experts are long: of those the first cuts, and the last.
    cuts = range(1, whole.num_layers)
    if isinstance(config, ExpertsConfig):
        cuts = [*cuts[:3], cuts[-1]]
    for first in cuts:
        front, back = whole.stage(0, first), whole.stage(first, whole.num_layers)
        assert not front.received and front.sent == back.received == hidden and not back.sent
        ops = [*front.op_names, *back.op_names]
        for crossing in ("stage_send", "stage_receive", "stage_release"):
            ops.remove(crossing)
        assert ops == whole.op_names
        names = [{weight[0] for weight in part.weights} for part in (front, back)]
        assert names[0] | names[1] == {weight[0] for weight in whole.weights}
        shared = [weight.endswith("embed_tokens.weight") for weight in names[0] & names[1]]
        assert shared == ([True] if config.tie_word_embeddings else [])
        for part, own in ((front, places[:first]), (back, places[first:])):
            part_windows, part_places = part.kv_layout
            assert part_windows == windows
            assert [group for group, _ in part_places] == [group for group, _ in own]
        back.fuse()
        # The residual is read for the last time where the layer's attention is added to it.
        assert back.op_names[back.op_names.index("stage_release") - 1] == "add_rms_norm"


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_heaviest_stage_is_as_light_as_can_be(name: str, size: int) -> None:
    whole = wire_model(_published(name), "bfloat16", fusion=False)
    costs = whole.layer_costs
    assert len(costs) == whole.num_layers
    counts = _core.balance_layers(costs, size)
    assert len(counts) == size and sum(counts) == len(costs) and min(counts) >= 1

    def heaviest(counts: list[int]) -> int:
        ends = itertools.accumulate(counts, initial=0)
        return max(sum(costs[first:last]) for first, last in itertools.pairwise(ends))

    # A layer more or less anywhere makes no stage that is heaviest lighter.
    for source, target in itertools.permutations(range(size), 2):
        other = list(counts)
        other[source] -= 1
        other[target] += 1
        if min(other) >= 1:
            assert heaviest(other) >= heaviest(counts)


def test_costs_are_the_weights_that_a_step_reads() -> None:
    for name in ("Qwen2.5-0.5B", "gemma-2-2b"):  # tied: the table is read once, as the head
        whole = wire_model(_published(name), "bfloat16", fusion=False)
        assert sum(whole.layer_costs) == _weight_bytes(whole)
        assert len(set(whole.layer_costs[:-1])) == 1
    # A step of many tokens reads all experts.
    for config in (ModelConfig.from_dir(LLAMA), _published("Mixtral-8x7B-v0.1")):
        whole = wire_model(config, "bfloat16", fusion=False)
        table = config.vocab_size * config.hidden_size * MATRIX_BYTES
        assert sum(whole.layer_costs) == _weight_bytes(whole) - table


@pytest.mark.parametrize("ranks", [1, 2])
def test_programs_are_those_of_ranks_in_order(ranks: int) -> None:
    config = ModelConfig.from_dir(MODELS / "gemma3")
    sizes = {"tensor_parallel_size": ranks, "pipeline_parallel_size": 3}
    wired = wire_ranks(config, "bfloat16", RunnerOptions(**sizes, fusion=False))
    assert len(wired.programs) == 3 * ranks and wired.ranks_per_stage == ranks
    assert wired.stages == ((0, 1), (1, 2), (2, 3))
    for rank, program in enumerate(wired.programs):
        stage = wired.stage_of(rank)
        assert stage == rank // ranks
        assert {
            weight[0].split(".")[2] for weight in program.weights if ".layers." in weight[0]
        } == {str(stage)}
        assert ("embedding" in program.op_names) == (stage == 0)
        assert ("gather_rows" in program.op_names) == (stage == 2)
        slices = program.weight_slices
        for weight, (name, *_) in enumerate(program.weights):
            if name.endswith("o_proj.weight"):
                _, _, cols, first_col = slices[weight][0]
                assert first_col == rank % ranks * cols // ranks


def test_layers_are_shared_out_as_asked() -> None:
    config = _published("Qwen2.5-0.5B")  # 24 layers, and a head like 4.6 of them
    balanced = wire_ranks(config, "bfloat16", RunnerOptions(pipeline_parallel_size=2))
    assert balanced.stages == ((0, 17), (17, 24))
    asked = RunnerOptions(pipeline_parallel_size=3, pipeline_layers=(5, 18, 1))
    assert wire_ranks(config, "bfloat16", asked).stages == ((0, 5), (5, 23), (23, 24))
    whole = wire_ranks(config, "bfloat16", RunnerOptions(pipeline_layers=[24]))
    assert whole.stages == ((0, 24),)
    assert not whole.programs[0].sent


def test_a_model_that_marks_no_layers_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Builder, "layer", lambda self, _, prefix: self.scope(prefix))
    config = _published("Qwen2.5-0.5B")
    assert wire_ranks(config, "bfloat16", RunnerOptions()).stages == ((0, 24),)
    with pytest.raises(InvalidArgumentError, match="does not mark its layers"):
        wire_ranks(config, "bfloat16", RunnerOptions(pipeline_parallel_size=2))


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2, None], ids=["first", "middle", "last", "all"])
@pytest.mark.usefixtures("nothing_left")
def test_a_stage_that_fails_ends_the_engine(device: str, deep: Path, rank: int | None) -> None:
    """Also where all fail alike: others count on what the step would have given them."""
    need_ranks(device, 3)
    with LLM(deep, device=device, pipeline_parallel_size=3, **SIZES) as llm:
        assert len(llm.generate([make_prompt(5, 1)], greedy(4), progress=False)) == 1
        chosen = {} if rank is None else {"rank": rank}
        llm.engine.model.runner.fail_next_step("as a test wants it", **chosen)
        start = time.monotonic()
        (result,) = llm.generate([make_prompt(6, 2)], greedy(30), progress=False)
        assert time.monotonic() - start < WAIT_S
        named = "rank . .stage .." if rank is None else rf"rank {rank} .stage {rank}."
        assert result.error is not None
        assert re.search(f"{named} failed in step .* as a test wants it", result.error)
        with pytest.raises(DeviceError, match=f"{named} failed"):
            llm.generate([make_prompt(5, 1)], greedy(4), progress=False)


@pytest.mark.usefixtures("nothing_left")
def test_an_engine_with_stages_is_closed_in_the_middle(device: str, deep: Path) -> None:
    need_ranks(device, 3)
    llm = LLM(deep, device=device, pipeline_parallel_size=3, **SIZES)
    stream = llm.stream([make_prompt(5, 1), make_prompt(9, 2)], greedy(60))
    next(stream)
    start = time.monotonic()
    llm.close()
    assert time.monotonic() - start < WAIT_S


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"pipeline_parallel_size": 0},
            r"size = 0: must be an integer in \[1, 8\]",
        ),
        ({"pipeline_parallel_size": 9}, r"integer in \[1, 8\]"),
        ({"pipeline_parallel_size": "2"}, r"integer in \[1, 8\]"),
        ({"pipeline_parallel_size": True}, r"integer in \[1, 8\]"),
        (
            {"pipeline_parallel_size": 3},
            "pipeline_parallel_size = 3: must be at most the model's num_hidden_layers = 2",
        ),
        (
            {"pipeline_parallel_size": 5, "tensor_parallel_size": 2},
            "pipeline_parallel_size = 5: must be at most 4 with tensor_parallel_size = 2",
        ),
        ({"pipeline_layers": [1, 1]}, "as many numbers as pipeline_parallel_size = 1"),
        ({"pipeline_parallel_size": 2, "pipeline_layers": [2]}, "as many numbers as"),
        ({"pipeline_parallel_size": 2, "pipeline_layers": [1, 2]}, "num_hidden_layers = 2"),
        ({"pipeline_parallel_size": 2, "pipeline_layers": [2, 0]}, "1 or more, for each stage"),
        ({"pipeline_parallel_size": 2, "pipeline_layers": [1, True]}, "1 or more, for each"),
        ({"pipeline_parallel_size": 2, "pipeline_layers": "11"}, "1 or more, for each"),
        ({"pipeline_parallel_size": 2, "pipeline_layers": 2}, "1 or more, for each"),
        ({"pipeline_parallel_size": 2, "stream": 1234}, "each rank has a stream"),
    ],
)
def test_what_stages_cannot_do_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgumentError, match=sentence) as refusal:
        ModelRunner(LLAMA, device="cpu", num_kv_blocks=8, progress=False, **options)
    assert "pipeline_" in str(refusal.value)


def test_stages_are_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRV1_TUNE", "1")
    with pytest.raises(InvalidArgumentError, match="must be False with pipeline_parallel_size > 1"):
        ModelRunner(LLAMA, device="cpu", num_kv_blocks=8, progress=False, pipeline_parallel_size=2)


def test_the_command_line_refuses_layers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(LLAMA), "--pipeline-layers", "1;1", "a prompt"]
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "numbers of layers with commas between them, not '1;1'" in capsys.readouterr().err


def test_a_figure_of_one_device_refuses_stages(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "op", "--model", str(LLAMA), "--pipeline-parallel-size", "2"]
    assert cli.main(command) != 0
    assert "--pipeline-parallel-size = 2: must be 1 for the figure op" in capsys.readouterr().err
