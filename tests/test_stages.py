# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What passes between the stages of a pipeline: on several GPUs, else on ranks of the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from device_arrays import rounded
from mrv1 import _core
from mrv1.errors import DeviceError, InvalidArgumentError
from rank_devices import RankDevices, open_ranks

_VOCAB, _ROWS, _LAYERS = 101, 6, 5
# Rows of 404, 404 and 26 bytes, so that no piece of 16 fits.
_VALUES = [(_VOCAB, "float32"), (_VOCAB, "float32"), (13, "bfloat16")]
_PHASE_FREE, _FINISH_LENGTH = 0, 2
_Step = tuple[int, list[Any], list[Any], list[Any]]


class Stages(RankDevices):
    """Devices of the stages of a pipeline, one each."""

    @property
    def num_stages(self) -> int:
        return self.size

    @contextlib.contextmanager
    def probe(self, **options: Any) -> Iterator[_core.StageProbe]:
        settings = {
            "num_layers": _LAYERS,
            "vocab_size": _VOCAB,
            "values": _VALUES,
            "num_rows": _ROWS,
            "max_tokens": 20,
            "max_model_len": 40,
            "seed": 3,
            **options,
        }
        probe = _core.StageProbe(self.devices, num_stages=self.num_stages, **settings)
        try:
            yield probe
        finally:
            probe.close()


@pytest.fixture(scope="module", params=[2, 3, 4])
def stages(request: pytest.FixtureRequest, device: str) -> Iterator[Stages]:
    """As many stages as there are GPUs; the CPU has any number."""
    made = open_ranks(Stages, device, request.param)
    yield made
    made.close()


class Model:
    """The probe's model by its definition, in NumPy."""

    def __init__(self, probe: _core.StageProbe, layers: int = _LAYERS) -> None:
        self.layers = layers
        self.tables = [probe.table(i) for i in range(len(_VALUES))]
        self.shifts = [[probe.shift(i, v) for v in range(len(_VALUES))] for i in range(layers)]

    def value(self, index: int, token: int, layers: int) -> np.ndarray:
        x = self.tables[index][token]
        for shifts in self.shifts[:layers]:
            x = rounded(x + shifts[index], _VALUES[index][1])
        return x

    def next_token(self, token: int) -> int:
        logits = self.value(0, token, self.layers) + self.value(1, token, self.layers)
        return int(np.argmax(logits))


@dataclasses.dataclass
class Life:
    """A row as a pipeline must have it, a step after the other."""

    generation: int
    tokens: list[int]
    max_total_len: int
    num_drafts: int
    num_computed: int = 0
    is_finished: bool = False

    def advance(self, model: Model, entry: list[int], got: dict[str, Any]) -> None:
        _, _, num_tokens, samples = entry
        is_prompt = self.num_computed < len(self.tokens) - 1 or not self.num_computed
        if is_prompt or self.num_drafts == 0:
            assert len(got["tokens"]) == samples
        else:
            assert 1 <= len(got["tokens"]) <= samples
            assert len(got["tokens"]) - got["num_accepted"] in (0, 1)
        for token in got["tokens"]:
            assert token == model.next_token(self.tokens[-1])
            assert not self.is_finished
            self.tokens.append(token)
            self.is_finished = len(self.tokens) == self.max_total_len
        if got["tokens"]:
            self.num_computed = len(self.tokens) - 1
        else:
            self.num_computed += num_tokens
        assert got["num_computed"] == self.num_computed
        assert got["total_len"] == len(self.tokens)
        assert got["finish_reason"] == (_FINISH_LENGTH if self.is_finished else 0)


def _check_lives(
    model: Model, steps: list[_Step], outputs: list[dict[str, Any]]
) -> tuple[dict[int, Life], int]:
    """All outputs follow from the model. Returns the rows in use, and how many tokens there are."""
    lives: dict[int, Life] = {}
    drawn = 0
    assert len(outputs) == len(steps)
    for (_, freed, added, entries), output in zip(steps, outputs, strict=True):
        for row, _ in freed:
            del lives[row]
        for row, generation, prompt, max_total_len, num_drafts in added:
            lives[row] = Life(generation, list(prompt), max_total_len, num_drafts)
        assert len(output["entries"]) == len(entries)
        for entry, got in zip(entries, output["entries"], strict=True):
            assert (got["row"], got["generation"]) == tuple(entry[:2])
            life = lives[entry[0]]
            assert got["masked"] == life.is_finished
            if not got["masked"]:
                life.advance(model, entry, got)
            drawn += len(got["tokens"])
    return lives, drawn


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("num_slots", [2, 7])
@pytest.mark.parametrize("num_drafts", [0, 3])
def test_random_lives_give_the_tokens_of_the_model(
    stages: Stages, graphs: bool, num_slots: int, num_drafts: int
) -> None:
    """Tokens depend on all values that crossed and on all outputs that came back, in every step.

    Meanwhile rows are freed, reused, finished and chunked, and stages are late at random.
    """
    options = {"graphs": graphs, "num_slots": num_slots, "num_drafts": num_drafts, "delay": 20e-6}
    with stages.probe(**options) as probe:
        model = Model(probe)
        steps = probe.random_steps(150, seed=10 * stages.num_stages + num_slots + num_drafts)
        probe.run(steps)
        last = stages.num_stages - 1
        lives, drawn = _check_lives(model, steps, probe.outputs(last))
        assert drawn > 100
        assert len(lives) > 1
        for rank in range(stages.num_stages):
            outputs = probe.outputs(rank)
            waited = [output["waited_ns"] for output in outputs]
            assert waited == sorted(waited)
            assert rank == last or not any(output["entries"] for output in outputs)
            for number in range(_ROWS):
                row = probe.row(rank, number)
                if number not in lives:
                    assert row["phase"] == _PHASE_FREE
                    continue
                life = lives[number]
                assert row["generation"] == life.generation
                assert row["tokens"] == life.tokens
                assert row["num_computed"] == life.num_computed
                assert row["finish_reason"] == (_FINISH_LENGTH if life.is_finished else 0)
        assert sum(probe.outputs(rank)[-1]["waited_ns"] for rank in range(last + 1)) > 0


def _prompt(tokens: list[int], max_total_len: int) -> _Step:
    return (0, [], [(0, 1, tokens, max_total_len, 0)], [(0, 1, len(tokens), 1)])


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_row_alone_needs_no_host_and_its_values_arrive_whole(
    stages: Stages, graphs: bool
) -> None:
    with stages.probe(graphs=graphs) as probe:
        model = Model(probe)
        # Its prompt, then a token a step, each of which all stages must know before the next.
        first = probe.next_step
        steps = [_prompt([4, 5, 6], 33)]
        steps += [(first + i, [], [], [(0, 1, 1, 1)]) for i in range(29)]
        probe.run(steps)
        lives, drawn = _check_lives(model, steps, probe.outputs(stages.num_stages - 1))
        assert drawn == 30
        for rank in range(1, stages.num_stages):
            layers = rank * _LAYERS // stages.num_stages
            for value, (cols, _) in enumerate(_VALUES):
                received = probe.received(rank, value)
                assert received.shape == (20, cols)
                expected = model.value(value, lives[0].tokens[-2], layers)
                np.testing.assert_array_equal(received[0], expected)


def test_outputs_stay_until_a_slow_stage_has_adopted_them(stages: Stages) -> None:
    """Steps without a batch bring no values that the last stage would have to wait for."""
    num_slots = 3
    for slow in range(stages.num_stages - 1):
        options = {"num_slots": num_slots, "delay": 100e-6, "slow_rank": slow}
        with stages.probe(**options) as probe:
            model = Model(probe)
            steps = [_prompt([1, 2], 30)]
            while len(steps) < 100:
                newest = probe.next_step + len(steps) - 1
                steps.append((newest, [], [], [(0, 1, 1, 1)]))
                empty = range(newest + 2, newest + 12)
                steps += [(step - num_slots + 1, [], [], []) for step in empty]
            probe.run(steps)
            lives, drawn = _check_lives(model, steps, probe.outputs(stages.num_stages - 1))
            assert drawn == 10
            assert len(set(lives[0].tokens)) > 6


def test_the_largest_batch_crosses(stages: Stages) -> None:
    """Many values of other sizes than those of the random lives, all places of a batch used."""
    values = [(_VOCAB, "float32"), (4096, "bfloat16"), (1000, "float32"), (1, "bfloat16")]
    with stages.probe(values=values, max_tokens=100, max_model_len=101, num_layers=4) as probe:
        prompt = np.random.default_rng(5).integers(0, _VOCAB, 100).tolist()
        first = probe.next_step
        probe.run([_prompt(prompt, 101), (first, [], [], [])])
        for rank in range(1, stages.num_stages):
            for value, (_, dtype) in enumerate(values):
                x = probe.table(value)[prompt]
                for layer in range(rank * 4 // stages.num_stages):
                    x = rounded(x + probe.shift(layer, value), dtype)
                np.testing.assert_array_equal(probe.received(rank, value), x)


def test_a_stage_that_stops_is_named_and_all_end(stages: Stages) -> None:
    """Whatever the others wait for: values, credits or outputs."""
    for rank in range(stages.num_stages):
        with stages.probe(timeout=0.2) as probe:
            steps = probe.random_steps(60, seed=rank)
            start = time.monotonic()
            with pytest.raises(DeviceError, match=rf"rank {rank} .*did not") as error:
                probe.run(steps, absent=rank, absent_from=20)
            assert time.monotonic() - start < 10
            # For good, and for the one reason.
            with pytest.raises(DeviceError) as again:
                probe.run(probe.random_steps(3, seed=1))
            assert str(again.value) == str(error.value)


def test_a_long_way_through_steps_that_end_is_no_failure(stages: Stages) -> None:
    """All others wait longer than the limit for the first stage, which ends a step now and then."""
    with stages.probe(num_slots=7, delay=0.03, slow_rank=0, timeout=0.12) as probe:
        model = Model(probe)
        step = probe.next_step + 1
        steps = [_prompt([1, 2], 30), (step - 1, [], [], [(0, 1, 1, 1)])]
        steps += [(step - 1, [], [], [])] * 5  # in which the other stages do not need it
        steps += [(step, [], [], [(0, 1, 1, 1)])]
        probe.run(steps)
        last = stages.num_stages - 1
        assert _check_lives(model, steps, probe.outputs(last))[1] == 3
        waited = [output["waited_ns"] for output in probe.outputs(last)]
        assert waited[-1] - waited[-2] > 0.12e9


def test_an_abort_ends_whoever_waits(stages: Stages) -> None:
    with stages.probe(timeout=60.0) as probe:
        steps = probe.random_steps(60, seed=1)
        failures: list[str] = []

        def run() -> None:
            try:
                probe.run(steps, absent=0, absent_from=10)
            except DeviceError as error:
                failures.append(str(error))

        running = threading.Thread(target=run)
        running.start()
        time.sleep(0.1)
        assert running.is_alive()
        probe.abort("out of luck")
        running.join(10)
        assert not running.is_alive()
        assert len(failures) == 1
        assert "out of luck" in failures[0]


def test_what_a_probe_cannot_do_is_refused(stages: Stages) -> None:
    for options, message in (
        ({"num_layers": 1}, "num_layers"),
        ({"values": [(7, "float32")]}, "first value"),
        ({"values": _VALUES * 2}, "6 values"),
        ({"num_slots": 1}, "at least 2"),
        ({"num_drafts": 16}, "num_drafts"),
    ):
        with (
            pytest.raises(InvalidArgumentError, match=message),
            stages.probe(**options),
        ):
            pass
    with stages.probe() as probe:
        for step, message in (
            ((1, [], [], []), "older"),
            ((0, [], [(0, 1, [_VOCAB], 9, 0)], []), "vocabulary"),
            ((0, [], [], [(0, 1, 21, 1)]), "21 tokens"),
            ((0, [], [], [(0, 1, 1, 1), (0, 1, 1, 1)]), "twice"),
            ((0, [(6, 1)], [], []), "no row 6"),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                probe.run([step])
