# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Pipelines: stages of a model give what the whole gives, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mrv1 import _core, cli
from mrv1.config import ModelConfig
from mrv1.errors import InvalidArgumentError
from mrv1.loader import RunnerOptions, wire_model, wire_ranks
from mrv1.runner import ModelRunner
from published_configs import PUBLISHED
from serving_tools import LLAMA, MODELS

MATRIX_BYTES = 2  # of bfloat16

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
    for first in range(1, whole.num_layers):
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
    config = ModelConfig.from_dir(LLAMA)
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
