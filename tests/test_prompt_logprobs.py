# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Logprobs of prompts: against float64, and the same whatever the chunks, the batch and the life.

On a GPU rows are compared in batch-invariant mode, as they are on the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_data import GOLDEN_NAMES, load_golden
from mrv1 import _core
from mrv1.errors import InvalidArgumentError, RequestError
from mrv1.llm import LLM
from mrv1.output_pump import RequestUpdate
from mrv1.runner import ModelRunner, PromptLogprobs, RowHandle, RowOutput, make_row_spec
from mrv1.sampling_params import SamplingParams
from serving_tools import (
    LLAMA,
    MODELS,
    VOCAB,
    BlockPool,
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

Array = np.ndarray
# A pass over the output head takes 32 rows with so few sequences.
PASS_ROWS = 32
ROUNDING = 2.0**-20  # of a logprob in float32, beside float64


def scoring(count: int = 3, max_tokens: int = 4, **fields: Any) -> SamplingParams:
    return greedy(max_tokens, prompt_logprobs=count, **fields)


@dataclasses.dataclass
class Scores:
    """The parts that steps give of one prompt."""

    parts: list[PromptLogprobs] = dataclasses.field(default_factory=list)

    def add(self, output: RowOutput) -> None:
        if output.prompt_logprobs is not None:
            assert output.prompt_logprobs.first == 1 + sum(len(part.ranks) for part in self.parts)
            self.parts.append(output.prompt_logprobs)

    def joined(self) -> tuple[Array, Array, Array]:
        """Token ids, logprobs and ranks."""
        return tuple(  # type: ignore[return-value]
            np.concatenate([getattr(part, field) for part in self.parts])
            for field in ("token_ids", "logprobs", "ranks")
        )


def assert_equal(actual: Sequence[Array], expected: Sequence[Array]) -> None:
    for found, wanted in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def add(runner: ModelRunner, pool: BlockPool, prompt: list[int], params: SamplingParams) -> Any:
    count = num_blocks(len(prompt) + (params.max_tokens or 0), runner.model.block_size)
    return runner.add_row(prompt, params, block_ids=pool.take_groups(count))


def score(
    runner: ModelRunner, prompt: list[int], params: SamplingParams, chunk: int = 10**9
) -> tuple[Array, Array, Array]:
    """Scores a prompt alone, in chunks."""
    row = add(runner, BlockPool(runner), prompt, params)
    scores = Scores()
    for start in range(0, len(prompt), chunk):
        scores.add(runner.execute([(row, min(chunk, len(prompt) - start))]).result()[0])
    assert runner.execute([(row, 1)]).result()[0].prompt_logprobs is None
    runner.free_row(row)
    return scores.joined()


def step_logits(runner: ModelRunner, prompt: list[int]) -> Array:
    """Logits after each token of a prompt but the last, each by a row that ends with it."""
    logits = []
    for length in range(1, len(prompt)):
        row = add(runner, BlockPool(runner), prompt[:length], greedy(1))
        runner.execute([(row, length)]).result()
        logits.append(runner.logits(0))
        runner.free_row(row)
    return np.stack(logits)


def log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def expected_scores(logits: Array, targets: Sequence[int], count: int) -> tuple[Array, ...]:
    """Token ids, logprobs in float64 and ranks, by the rules of sampling/logprobs.h."""
    logprobs = log_softmax(logits)
    own = np.asarray(targets)[:, None]
    ids = np.concatenate([own, np.argsort(-logits, axis=-1, kind="stable")[:, :count]], axis=1)
    ranks = np.tile(np.arange(count + 1), (len(own), 1))
    ranks[:, :1] = 1 + (logits > np.take_along_axis(logits, own, 1)).sum(axis=-1, keepdims=True)
    return ids, np.take_along_axis(logprobs, ids, 1), ranks


@pytest.fixture(scope="module")
def runner(device: str) -> Iterator[ModelRunner]:
    opened = open_runner(device, batch_invariant=True, max_logprobs=-1)
    yield opened
    opened.close()


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_scores_are_those_of_transformers(device: str, name: str) -> None:
    golden = load_golden(name)
    runner = open_runner(
        device, golden.model_dir, max_model_len=golden.max_model_len, max_num_seqs=2,
        num_kv_blocks=2000, max_num_batched_tokens=64,
    )  # fmt: skip
    compared = 0
    for prompt, positions, logits in zip(
        golden.prompts, golden.positions, golden.logits, strict=True
    ):
        kept = [index for index, position in enumerate(positions) if position + 1 < len(prompt)]
        if not kept:
            continue
        _, logprobs, ranks = score(runner, prompt, scoring(0), chunk=64)
        for index in kept:
            position, wanted = positions[index], logits[index].astype(np.float64)
            target = prompt[position + 1]
            tolerance = 1e-4 * np.abs(wanted).max()
            assert abs(logprobs[position, 0] - log_softmax(wanted)[target]) < tolerance
            assert 1 + (wanted > wanted[target] + tolerance).sum() <= ranks[position, 0]
            assert ranks[position, 0] <= (wanted >= wanted[target] - tolerance).sum()
            compared += 1
    assert compared > 0
    runner.close()


@pytest.mark.parametrize("count", [0, 1, 20, -1])
def test_scores_match_float64(runner: ModelRunner, count: int) -> None:
    """All that is reported, on the very logits; ties of the rule are exact."""
    prompt = make_prompt(45, 5)
    ids, logprobs, ranks = score(runner, prompt, scoring(count))
    wanted = expected_scores(
        step_logits(runner, prompt), prompt[1:], VOCAB if count == -1 else count
    )
    np.testing.assert_array_equal(ids, wanted[0])
    np.testing.assert_allclose(logprobs, wanted[1], rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_array_equal(ranks, wanted[2])


def test_ties_are_ordered_by_token(device: str, tmp_path: Path) -> None:
    """Pairs of equal rows of the head: equal logits, equal ranks, the lower id first."""

    def pair_up(tensors: Tensors) -> None:
        head = tensors["lm_head.weight"]
        head[1::2] = head[::2]

    runner = open_runner(device, copy_model(tmp_path / "model", change=pair_up))
    prompt = make_prompt(20, 9)
    ids, logprobs, ranks = score(runner, prompt, scoring(10))
    assert (ranks[:, 0] % 2 == 1).all()
    assert (ids[:, 1::2] % 2 == 0).all()
    np.testing.assert_array_equal(ids[:, 1::2] + 1, ids[:, 2::2])
    np.testing.assert_array_equal(logprobs[:, 1::2], logprobs[:, 2::2])
    runner.close()


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 33, 64, 199])
def test_chunks_and_passes_do_not_matter(runner: ModelRunner, chunk: int) -> None:
    prompt = make_prompt(200, 6)
    assert len(prompt) > 6 * PASS_ROWS
    assert_equal(score(runner, prompt, scoring(), chunk), score(runner, prompt, scoring()))


def test_memory_does_not_follow_the_prompt(runner: ModelRunner) -> None:
    score(runner, make_prompt(40, 1), scoring(20))
    before = runner.stats()
    _, logprobs, _ = score(runner, make_prompt(250, 1), scoring(20))
    after = runner.stats()
    assert logprobs.shape == (249, 21)
    assert after["allocations"] == before["allocations"]
    # Nothing is read back inside of a step: a result is waited for, and that is all.
    assert after["copies"] == before["copies"]


def test_rows_share_passes_and_disturb_nobody(runner: ModelRunner) -> None:
    """Rows of several counts, with decoding rows, rows that are not scored and a step ahead."""
    plain = [(make_prompt(21, 30), greedy(12)), (make_prompt(9, 31), seeded(4, 12))]
    asked = [(make_prompt(50, 32), 3), (make_prompt(70, 33), 0)]
    alone = [tokens_of(run_to_end(runner, prompt, params)) for prompt, params in plain]
    scored = [score(runner, prompt, scoring(count)) for prompt, count in asked]
    first = [
        tokens_of(run_to_end(runner, prompt, scoring(count, 6)))[:6] for prompt, count in asked
    ]

    pool = BlockPool(runner)
    rows: list[RowHandle] = [add(runner, pool, prompt, params) for prompt, params in plain]
    tokens: dict[int, list[int]] = {row: [] for row in rows}
    scores: dict[int, Scores] = {}
    launched = dict.fromkeys(rows, 0)
    left = {row: len(prompt) for row, (prompt, _) in zip(rows, plain, strict=True)}
    pending = []
    step = 0
    while pending or any(launched[row] < 12 for row in rows[:2]):
        if step == 2:
            for prompt, count in asked:
                rows.append(add(runner, pool, prompt, scoring(count, 6)))
                tokens[rows[-1]], scores[rows[-1]] = [], Scores()
                left[rows[-1]], launched[rows[-1]] = len(prompt), 0
        batch = []
        for row in rows:
            if left[row] > 0:
                count = min(13 + 8 * int(row), left[row])
                left[row] -= count
                launched[row] += left[row] == 0
                batch.append((row, count))
            elif launched[row] < (6 if row in scores else 12):
                launched[row] += 1
                batch.append((row, 1))
        if batch:
            pending.append(runner.execute(batch))
        if len(pending) == 2 or not batch:
            for output in pending.pop(0).result():
                tokens[output.row] += output.token_ids
                if output.prompt_logprobs is not None:
                    scores[output.row].add(output)
        step += 1
    assert [tokens[row] for row in rows] == [*alone, *first]
    for row, wanted in zip(rows[2:], scored, strict=True):
        assert_equal(scores[row].joined(), wanted)
    for row in rows:
        runner.free_row(row)


def test_a_row_goes_on_where_another_was_scored(runner: ModelRunner) -> None:
    """num_scored: as a scheduler resumes what it preempted, with blocks or without."""
    prompt = make_prompt(61, 12)
    whole = score(runner, prompt, scoring())
    for done, computed in ((17, 0), (24, 24), (60, 12)):
        blocks = BlockPool(runner).take(num_blocks(70))
        first = runner.add_row(prompt, scoring(), block_ids=blocks)
        if done:
            runner.execute([(first, done)]).result()
        runner.free_row(first)
        row = runner.add_row(
            prompt, scoring(), block_ids=blocks, num_computed=computed, num_scored=done
        )
        output = runner.execute([(row, len(prompt) - computed)]).result()[0]
        runner.free_row(row)
        if done == 60:
            assert output.prompt_logprobs is None
            continue
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs.first == done + 1
        np.testing.assert_array_equal(output.prompt_logprobs.logprobs, whole[1][done:])


def test_what_cannot_be_scored_is_refused(runner: ModelRunner) -> None:
    prompt = make_prompt(20, 1)
    blocks = list(range(1, 8))
    free = runner.free_rows
    for fields, message in (
        ({"num_computed": 8}, "num_computed 8 with num_prompt_logprobs: at most num_scored = 0"),
        ({"num_scored": 20}, r"num_scored 20 is outside \[0, prompt_len = 20\)"),
        ({"num_scored": -1}, r"num_scored -1 is outside \[0, prompt_len = 20\)"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            runner.add_row(prompt, scoring(), block_ids=blocks, **fields)  # type: ignore[arg-type]
    assert runner.free_rows == free


def test_one_token_has_none_before_it(runner: ModelRunner) -> None:
    row = add(runner, BlockPool(runner), [5], scoring())
    output = runner.execute([(row, 1)]).result()[0]
    assert output.prompt_logprobs is None and output.token_id is not None
    runner.free_row(row)


@pytest.mark.parametrize("mode", ["eager", "piecewise", "full"])
def test_every_mode_scores(device: str, runner: ModelRunner, mode: str) -> None:
    """A step that scores never runs as one graph; those before and after it do."""
    opened = open_runner(
        device, batch_invariant=True, graph_mode=mode, max_num_seqs=3, pad_requests=3,
        capture_sizes=[1, 2, (3, 8)], piecewise_sizes=[8, 64],
    )  # fmt: skip
    decoding = add(opened, BlockPool(opened), make_prompt(5, 3), greedy(20))
    opened.execute([(decoding, 5)]).result()
    prompt = make_prompt(40, 4)
    pool = BlockPool(opened)
    pool.take(8)
    row = add(opened, pool, prompt, scoring())
    scores, modes = Scores(), []
    for count in (1, 7, 32):
        pending = opened.execute([(decoding, 1), (row, count)])
        scores.add(pending.result()[1])
        modes.append(opened.stats())
    assert_equal(scores.joined(), score(runner, prompt, scoring()))
    assert modes[-1]["steps_full"] == modes[0]["steps_full"]
    opened.execute([(decoding, 1), (row, 1)]).result()
    after = opened.stats()
    assert after[f"steps_{mode}"] == modes[-1][f"steps_{mode}"] + 1
    opened.close()


def not_a_number(token: int) -> Callable[[Tensors], None]:
    """What reads this token knows nothing any more."""

    def change(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][token] = np.nan

    return change


def test_nan_shows_in_its_row_alone(device: str, tmp_path: Path, runner: ModelRunner) -> None:
    model = copy_model(tmp_path / "model", change=not_a_number(7))
    opened = open_runner(device, model, batch_invariant=True)
    good, bad = make_prompt(30, 40), make_prompt(30, 41)
    assert 7 not in good
    bad = [8 if token == 7 else token for token in bad]
    bad[20] = 7
    pool = BlockPool(opened)
    rows = [add(opened, pool, prompt, scoring()) for prompt in (good, bad)]
    outputs = opened.execute([(row, 30) for row in rows]).result()
    first, second = (output.prompt_logprobs for output in outputs)
    assert first is not None and second is not None
    np.testing.assert_array_equal(first.logprobs, score(runner, good, scoring())[1])
    nan = np.isnan(second.logprobs)
    assert not nan[:20].any() and nan[20:].all()
    assert outputs[1].finish_reason == "error"
    opened.close()


# --- records of a bounded size --------------------------------------------------------------------

WIDE = 20_000  # ids: a record of the whole vocabulary takes 160 kB, and a step has 32 MiB


@pytest.fixture(scope="module")
def wide(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRunner]:
    def widen(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = tensors[name]
            more = np.random.default_rng(1).standard_normal((WIDE - len(rows), rows.shape[1]))
            tensors[name] = np.concatenate([rows, (0.02 * more).astype(rows.dtype)])

    model = copy_model(
        tmp_path_factory.mktemp("wide") / "model", config={"vocab_size": WIDE}, change=widen
    )
    opened = open_runner(device, model, batch_invariant=True, max_logprobs=-1, max_num_seqs=2)
    yield opened
    opened.close()


def test_a_step_has_room_for_so_many_records(wide: ModelRunner) -> None:
    prompt = make_prompt(250, 2)
    row = add(wide, BlockPool(wide), prompt, scoring(-1))
    with pytest.raises(InvalidArgumentError, match="fewer tokens of rows with prompt logprobs"):
        wide.execute([(row, 250)])
    scores = Scores()
    for count in (200, 50):
        scores.add(wide.execute([(row, count)]).result()[0])
    wide.free_row(row)
    ids, logprobs, ranks = scores.joined()
    assert ids.shape == (249, WIDE + 1)
    few = score(wide, prompt, scoring(5))
    assert_equal((ids[:, :6], logprobs[:, :6], ranks[:, :6]), few)
    np.testing.assert_array_equal(np.sort(ids[:, 1:], axis=1), np.tile(np.arange(WIDE), (249, 1)))
    assert (np.diff(logprobs[:, 1:], axis=1) <= 0).all()
    np.testing.assert_allclose(np.exp(logprobs[:, 1:].astype(np.float64)).sum(axis=1), 1, 1e-5)


# --- lives ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Life:
    tokens: list[int] = dataclasses.field(default_factory=list)
    end: _core.RequestEnd = _core.RequestEnd.NONE
    error: str = ""
    cached: int = 0
    scores: tuple[Array, Array, Array] | None = None
    deliveries: int = 0


class Serving:
    """A native engine over a runner; `step` keeps what it says of each (id, sample)."""

    def __init__(self, runner: ModelRunner, caching: bool = True) -> None:
        self.runner = runner
        options = _core.EngineOptions(enable_prefix_caching=caching, background=False)
        self.native = _core.Engine(runner.model.runner, options)
        self.lives: dict[tuple[str, int], Life] = {}

    def add(self, name: str, prompt: list[int], params: SamplingParams, **fields: Any) -> None:
        vocab_size = self.runner.model.config.vocab_size
        row = make_row_spec(prompt, params, vocab_size=vocab_size, eos_token_ids=())
        self.native.add_request(name, row, **fields)

    def step(self) -> None:
        for output in self.native.step():
            life = self.lives.setdefault((output.id, output.index), Life())
            assert life.end == _core.RequestEnd.NONE
            if output.prompt_logprobs is not None:
                assert output.token_ids and not life.tokens
                life.scores = output.prompt_logprobs
                life.deliveries += 1
            life.tokens += output.token_ids
            life.end, life.error, life.cached = output.end, output.error, output.num_cached_tokens
        self.native.check_invariants()

    def drain(self) -> dict[tuple[str, int], Life]:
        while self.native.has_unfinished():
            self.step()
        self.native.check_idle()
        return self.lives

    def close(self) -> None:
        self.native.close()
        self.runner.close()


@pytest.fixture
def serve(device: str) -> Iterator[Callable[..., Serving]]:
    made: list[Serving] = []

    def start(model: Path = LLAMA, caching: bool = True, **options: Any) -> Serving:
        defaults: dict[str, Any] = {"batch_invariant": True, "max_logprobs": -1}
        made.append(Serving(open_runner(device, model, **{**defaults, **options}), caching))
        return made[-1]

    yield start
    for serving in made:
        serving.close()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
    "FP8 cache": {"kv_cache_dtype": "fp8_e4m3"},
    "windows": {"model": MODELS / "gemma3", "num_kv_blocks": 600},
    "soft cap": {"model": MODELS / "gemma2", "num_kv_blocks": 600},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_gives_what_a_row_alone_does(serve: Callable[..., Serving], kind: str) -> None:
    """Chunks of all sizes, beside requests that are not scored and whose tokens stay the same."""
    serving = serve(max_num_batched_tokens=11, **KINDS[kind])
    vocab = serving.runner.model.config.vocab_size
    prompts = [make_prompt(length, length, vocab) for length in (1, 2, 30, 47)]
    plain = [make_prompt(length, 7 * length, vocab) for length in (6, 25)]
    single = serve(max_num_seqs=1, **{**KINDS[kind], "speculative_config": None}).runner
    alone = [tokens_of(run_to_end(single, prompt, greedy(9))) for prompt in plain]
    for index, prompt in enumerate(plain):
        serving.add(f"plain {index}", prompt, greedy(9))
    for index, prompt in enumerate(prompts):
        serving.add(f"scored {index}", prompt, scoring(index, 5))
    lives = serving.drain()
    for index, tokens in enumerate(alone):
        life = lives[f"plain {index}", 0]
        assert life.scores is None and life.tokens == tokens
    for index, prompt in enumerate(prompts):
        life = lives[f"scored {index}", 0]
        assert life.scores is not None and life.deliveries == 1 and len(life.tokens) == 5
        assert life.scores[0].shape == (len(prompt) - 1, 1 + index)
        if len(prompt) > 1:
            assert_equal(life.scores, score(single, prompt, scoring(index)))


def test_a_prefix_hit_is_skipped(serve: Callable[..., Serving], runner: ModelRunner) -> None:
    """But what a scored request leaves in the cache serves others."""
    serving = serve()
    prompt, other = make_prompt(33, 3), make_prompt(29, 4)
    serving.add("first", prompt, greedy(3))
    serving.drain()
    serving.add("scored", prompt, scoring(2, 3))
    serving.add("new", other, scoring(2, 3))
    lives = serving.drain()
    serving.add("again", other, greedy(3))
    serving.drain()
    assert lives["scored", 0].cached == lives["new", 0].cached == 0
    assert lives["again", 0].cached == 28
    for name, scored in (("scored", prompt), ("new", other)):
        scores = lives[name, 0].scores
        assert scores is not None
        assert_equal(scores, score(runner, scored, scoring(2)))


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_prompts_miss_nothing(
    serve: Callable[..., Serving], runner: ModelRunner, caching: bool
) -> None:
    """Urgent requests come while prompts are scored in chunks, and when they have been."""
    serving = serve(caching=caching, num_kv_blocks=18, max_num_batched_tokens=8)
    prompts = {f"scored {index}": make_prompt(40 + index, 50 + index) for index in range(3)}
    for name, prompt in prompts.items():
        serving.add(name, prompt, scoring(2, 12), priority=1)
    hit_before = serving.native.stats()["prefix_hit_tokens"]
    for count in range(90):
        if count % 9 == 3:
            serving.add(f"urgent {count}", make_prompt(30, 70 + count), greedy(2))
        serving.step()
    lives = serving.drain()
    stats = serving.native.stats()
    assert stats["preemptions"] >= 3
    # A resumed prompt takes what it was scored from already out of the cache.
    assert (stats["prefix_hit_tokens"] > hit_before) == caching
    for name, prompt in prompts.items():
        life = lives[name, 0]
        assert life.deliveries == 1 and life.scores is not None
        assert_equal(life.scores, score(runner, prompt, scoring(2)))
        assert life.tokens == tokens_of(run_to_end(runner, prompt, greedy(12)))


def test_samples_share_the_logprobs_of_their_prompt(
    serve: Callable[..., Serving], runner: ModelRunner
) -> None:
    serving = serve(max_num_batched_tokens=16)
    prompt = make_prompt(40, 8)
    serving.add("three", prompt, scoring(2, 4), n=3)
    lives = serving.drain()
    tokens = tokens_of(run_to_end(runner, prompt, greedy(4)))
    for index in range(3):
        assert lives["three", index].end == _core.RequestEnd.LENGTH
        assert lives["three", index].tokens == tokens
    scores = [lives["three", index].scores for index in range(3)]
    assert scores[0] is not None and scores[1:] == [None, None]
    assert_equal(scores[0], score(runner, prompt, scoring(2)))


def test_another_sample_goes_on_with_the_prompt(
    serve: Callable[..., Serving], runner: ModelRunner
) -> None:
    """The first sample is aborted when half of the prompt has been scored."""
    serving = serve(max_num_batched_tokens=8)
    prompt = make_prompt(40, 8)
    serving.add("two", prompt, scoring(2, 4), n=2)
    for _ in range(4):
        serving.step()
    assert serving.native.abort("two", index=0)
    lives = serving.drain()
    assert lives["two", 0].end == _core.RequestEnd.ABORT and lives["two", 0].scores is None
    scores = lives["two", 1].scores
    assert scores is not None
    assert_equal(scores, score(runner, prompt, scoring(2)))


@pytest.mark.parametrize("steps", range(1, 6))
@pytest.mark.parametrize("report", [False, True])
def test_aborted_prompts_leave_nothing(
    serve: Callable[..., Serving], runner: ModelRunner, steps: int, report: bool
) -> None:
    serving = serve(max_num_batched_tokens=16)
    other = make_prompt(21, 4)
    serving.add("aborted", make_prompt(50, 3), scoring(2))
    serving.add("other", other, scoring(1))
    for _ in range(steps):
        serving.step()
    serving.native.abort("aborted", report=report)
    serving.add("next", other, scoring(1))  # the row is another's, with steps of it in flight
    lives = serving.drain()
    for name in ("other", "next"):
        scores = lives[name, 0].scores
        assert scores is not None
        assert_equal(scores, score(runner, other, scoring(1)))


def test_nan_ends_its_request_alone(serve: Callable[..., Serving], tmp_path: Path) -> None:
    serving = serve(copy_model(tmp_path / "model", change=not_a_number(7)))
    good, bad = ([token for token in make_prompt(30, seed) if token != 7] for seed in (40, 41))
    bad[20] = 7
    serving.add("bad", bad, scoring(1))
    serving.add("good", good, scoring(1))
    lives = serving.drain()
    assert lives["bad", 0].end == _core.RequestEnd.ERROR
    assert "token 21 of the prompt has no logprob" in lives["bad", 0].error
    assert lives["good", 0].end == _core.RequestEnd.LENGTH
    assert lives["good", 0].scores is not None


def test_a_failed_step_ends_its_requests_alone(serve: Callable[..., Serving]) -> None:
    serving = serve(max_num_batched_tokens=16)
    serving.add("failed", make_prompt(40, 3), scoring(1))
    serving.step()
    serving.runner.model.runner.fail_next_step("as a test wants")
    serving.step()
    lives = serving.drain()
    assert lives["failed", 0].end == _core.RequestEnd.ERROR
    serving.add("next", make_prompt(40, 3), scoring(1))
    assert serving.drain()["next", 0].scores is not None


def test_an_engine_gives_steps_no_more_than_they_hold(wide: ModelRunner) -> None:
    """209 records of the whole vocabulary fit: the rest of the prompt comes in another step."""
    serving = Serving(wide)
    prompt, other = make_prompt(250, 2), make_prompt(100, 3)
    serving.add("all", prompt, scoring(-1, 2))
    serving.add("few", other, scoring(4, 2))
    lives = serving.drain()
    serving.native.close()
    scores, few = lives["all", 0].scores, lives["few", 0].scores
    assert scores is not None and few is not None
    assert_equal([values[:, :6] for values in scores], score(wide, prompt, scoring(5)))
    assert_equal(few, score(wide, other, scoring(4)))


# --- in Python ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(device: str) -> Iterator[LLM]:
    opened = LLM(LLAMA, device=device, dtype="float32", num_threads=1, max_num_seqs=4)
    yield opened
    opened.close()


@pytest.mark.parametrize("n", [1, 3])
def test_results_have_a_mapping_for_each_token(llm: LLM, runner: ModelRunner, n: int) -> None:
    prompt = make_prompt(20, 5)
    (result,) = llm.generate([prompt], scoring(3, n=n))
    ids, logprobs, ranks = score(runner, prompt, scoring(3))
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == len(prompt) and result.prompt_logprobs[0] is None
    for place, token in enumerate(prompt[1:]):
        found = result.prompt_logprobs[place + 1]
        assert found is not None
        assert next(iter(found)) == token
        assert list(found) == list(dict.fromkeys(ids[place].tolist()))
        assert found[token].decoded_token == llm.tokenizer.decode_token(token)
        assert found[token].logprob == pytest.approx(float(logprobs[place, 0]), abs=1e-3)
        for candidate, rank in zip(ids[place, 1:].tolist(), ranks[place, 1:].tolist(), strict=True):
            assert found[candidate].rank == rank
    assert [output.finish_reason for output in result.outputs] == ["length"] * n


def test_results_without_them_have_none(llm: LLM) -> None:
    prompts = [make_prompt(9, 1), [5], make_prompt(12, 2)]
    params = [greedy(3), scoring(2), scoring(0, detokenize=False)]
    plain, one, bare = llm.generate(prompts, params)
    assert plain.prompt_logprobs is None
    assert one.prompt_logprobs == [None]
    assert bare.prompt_logprobs is not None
    for token, found in zip(prompts[2][1:], bare.prompt_logprobs[1:], strict=True):
        assert found is not None
        assert list(found) == [token] and found[token].decoded_token is None


def test_the_first_update_with_a_token_has_them(llm: LLM) -> None:
    updates: list[RequestUpdate] = []
    llm.engine.add_request("scored", make_prompt(20, 5), scoring(1), callback=updates.append)
    while llm.engine.has_unfinished():
        llm.engine.step()
    with_tokens = [update for update in updates if update.token_ids]
    assert [update.prompt_logprobs is not None for update in with_tokens] == [True] + [False] * 3


def test_more_than_the_engine_allows_is_refused(llm: LLM) -> None:
    for count, text in ((21, "at most the engine's max_logprobs = 20"), (-1, "-1 means 328")):
        with pytest.raises(RequestError, match=text) as caught:
            llm.generate([[5, 6]], scoring(count))
        assert caught.value.field == "prompt_logprobs"


def test_a_prompt_without_tokens_to_score_runs_as_one_graph(device: str) -> None:
    runner = open_runner(device, graph_mode="full", capture_sizes=[1], piecewise_sizes=[])
    row = runner.add_row([5], scoring(), block_ids=[1, 2])
    output = runner.execute([(row, 1)]).result()[0]
    assert output.token_id is not None and output.prompt_logprobs is None
    assert runner.stats()["steps_full"] == 1
    assert runner._native.take_miss()[0] == ""
    runner.close()
