# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Random lives of requests over the native engine, against one request at a time.

Hypothesis adds requests that share prefixes, wants several samples of some, aborts, and steps,
over engines with few blocks, rows and tokens a step, with drafts and without, with grammars (that
allow everything) and without, with caches in float32 and in FP8, with graphs, in pieces and
without; layers see all positions, or some a window. Requests have penalties, biases, bad words,
allowed tokens, stop tokens and sequences, and want logprobs of outputs and prompts. Every token,
end and logprob must be that of the request alone, without drafts, bit for bit. After each rule
lists, rows and references to blocks are checked, at the end that all are back. On a GPU rows are
batch invariant, as they are on the CPU.

MRV1_TEST_STEPS sets how many engine steps are taken at least. MRV1_TEST_SEED draws other lives than
those of every run, and MRV1_TEST_COUNTS names a directory for what was counted, as JSON;
scripts/long_lives.py uses them to share many steps out among processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from mrv1 import _core
from mrv1.builder import Builder
from mrv1.errors import RequestError
from mrv1.logprobs import Logprob, token_logprobs
from mrv1.runner import ModelRunner, RowOutput, make_row_spec
from mrv1.sampling_params import SamplingParams
from serving_tools import (
    LLAMA,
    VOCAB,
    Listener,
    OpenExecutor,
    SlowReference,
    Tensors,
    copy_model,
    cut,
    ending_sequence,
    greedy,
    make_prompt,
    need_ranks,
    num_blocks,
    open_runner,
    seeded,
    tokens_of,
)

STEPS = int(os.environ.get("MRV1_TEST_STEPS", "20000"))
SEED = os.environ.get("MRV1_TEST_SEED")
COUNTS = os.environ.get("MRV1_TEST_COUNTS")
LEAST = 200  # of each rare event
RARE = (
    "preemption", "prefix hit", "chunk edge", "stop in flight", "abort in flight", "bound",
    "stop sequence", "edited", "logprobs", "scored prompt",
)  # fmt: skip
DRAFTING = ", drafting"  # ends the names of what engines with drafts count besides
FP8 = ", FP8 cache"  # and of those with FP8 caches
STEPS_AN_EXAMPLE = 50  # fewer than there are on average
WINDOW = 9
BLOCK_SIZES = (1, 4, 8)
MAX_TOKENS = 24
MAX_SAMPLES = 3
MOST_LIVES = 12

SHARED = make_prompt(30, 7)
PROMPTS = tuple(
    [SHARED[:length] for length in (1, 4, 7, 8, 13, 16, 24, 30)]
    + [
        [*SHARED[:shared], *make_prompt(own, 90 + own)]
        for shared, own in ((8, 3), (12, 9), (17, 1))
    ]
    + [make_prompt(length, 60 + length) for length in (5, 19)]
)
LONGEST = max(len(prompt) for prompt in PROMPTS) + MAX_TOKENS - 1  # tokens with a slot


@dataclasses.dataclass(frozen=True)
class Draws:
    """How tokens are drawn."""

    params: SamplingParams
    bad_words: tuple[tuple[int, ...], ...] = ()


def circle_words(every: int) -> tuple[tuple[int, ...], ...]:
    """Words that cut circles of `repeat_often` short: two tokens of some, one of another."""
    pairs = tuple((first + 1, first + 2) for first in range(0, VOCAB, 4 * every))
    return (*pairs, *((first,) for first in range(7, VOCAB, 4 * every)))


PATHS = (
    Draws(greedy(MAX_TOKENS)),
    Draws(seeded(3, MAX_TOKENS, temperature=1.5)),
    Draws(seeded(40, MAX_TOKENS)),
)
EDITED = (
    Draws(
        greedy(
            MAX_TOKENS, repetition_penalty=1.2, frequency_penalty=0.02, presence_penalty=-0.01,
            logit_bias={9: 0.02, 200: -100.0},
        )
    ),
    Draws(
        seeded(
            12, MAX_TOKENS, temperature=1.2, top_k=40, min_p=0.01, frequency_penalty=1.5,
            allowed_token_ids=range(5, VOCAB, 1 + VOCAB // 200),
        ),
        circle_words(3),
    ),
    Draws(greedy(MAX_TOKENS), circle_words(1)),
)  # fmt: skip
ALL_PATHS = PATHS + EDITED
TOP = 2  # candidates beside each token in the reference

ENDS = {"stop": _core.RequestEnd.STOP, "length": _core.RequestEnd.LENGTH}


def open_windowed(windowed: bool, opener: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the opener gives; with `windowed` the first of the model's two layers sees a window."""
    attention = Builder.attention

    def with_window(self: Builder, *values: Any, kv_layer: int, **fields: Any) -> Any:
        window = WINDOW if kv_layer == 0 else 0
        return attention(self, *values, **{**fields, "kv_layer": kv_layer, "window": window})

    with pytest.MonkeyPatch.context() as patch:
        if windowed:
            patch.setattr(Builder, "attention", with_window)
        return opener(*args, batch_invariant=True, **options)


def repeat_often(tensors: Tensors) -> None:
    """The likely next token is one of four in a circle; how likely is up to the context.

    A model with random weights repeats nothing, so that no draft of it would be accepted.
    """
    embed, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    embed *= 100  # so that the token still shows after the layers
    unit = embed.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    ids = np.arange(len(head))
    following = ids - ids % 4 + (ids + 1) % 4
    head[following] += (0.7 * np.linalg.norm(head, axis=1).mean() * unit).astype(head.dtype)


class References:
    """What requests must generate, by model and block size; each path is computed once."""

    def __init__(self, device: str, repeating: Path, plain: Path = LLAMA) -> None:
        self._device = device
        self._repeating = repeating
        self._plain = plain
        self._opened: dict[tuple[bool, bool, int, str], SlowReference] = {}

    def model(self, repeats: bool) -> Path:
        return self._repeating if repeats else self._plain

    def of(
        self, repeats: bool, windowed: bool, block_size: int, kv_cache_dtype: str
    ) -> SlowReference:
        key = (repeats, windowed, block_size, kv_cache_dtype)
        if key not in self._opened:
            self._opened[key] = open_windowed(
                windowed,
                SlowReference,
                self._device,
                self.model(repeats),
                block_size=block_size,
                max_model_len=64,
                num_kv_blocks=2 * 64 + 1,
                kv_cache_dtype=kv_cache_dtype,
            )
        return self._opened[key]

    def close(self) -> None:
        for reference in self._opened.values():
            reference.close()


@dataclasses.dataclass(frozen=True)
class Wish:
    """A request that may be made. Its samples end at the earliest of what is given."""

    prompt: int  # which of PROMPTS
    path: int  # which of ALL_PATHS
    max_tokens: int
    stop_at: int | None  # the token here is a stop id, for all samples that of the first one's path
    sequence: tuple[int, int] | None  # so many tokens that end here are a stop sequence, as well
    min_tokens: int  # only with stop_at or sequence
    quit_at: int | None  # the consumer ends it after so many tokens, as a stop string does
    n: int
    priority: int
    salt: int
    skip_cache: bool
    bound: bool  # has matchers, which must hear its tokens
    drafts: int | None  # as num_speculative_tokens, at most the engine's; None is all of them
    logprobs: int | None
    prompt_logprobs: int | None


def sometimes(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.none(), values)


wishes = st.builds(
    Wish,
    prompt=st.integers(0, len(PROMPTS) - 1),
    path=st.integers(0, len(ALL_PATHS) - 1),
    max_tokens=st.sampled_from((MAX_TOKENS, 1, 2, 6, 15, MAX_TOKENS)),
    stop_at=st.one_of(st.none(), st.integers(0, MAX_TOKENS - 2)),
    sequence=sometimes(st.tuples(st.integers(1, 5), st.integers(0, MAX_TOKENS - 2))),
    min_tokens=st.sampled_from((0, 0, 0, 5, 11)),
    quit_at=sometimes(st.integers(1, MAX_TOKENS)),
    n=st.sampled_from((1, 1, 1, 2, MAX_SAMPLES)),
    priority=st.sampled_from((0, 0, 0, -1, 1)),
    salt=st.sampled_from((0, 0, 0, 0, 0, 1)),
    skip_cache=st.sampled_from((False, False, False, False, True)),
    bound=st.sampled_from((False, False, False, False, True)),
    drafts=st.sampled_from((None, None, None, 0, 1, 3)),
    logprobs=st.sampled_from((None, None, None, 0, TOP)),
    prompt_logprobs=st.sampled_from((None, None, None, None, None, 0, TOP)),
)


@dataclasses.dataclass
class Life:
    """A sample whose end was not heard yet."""

    wish: Wish
    tokens: tuple[int, ...]
    reason: str
    stop_sequence: int
    logprobs: list[dict[int, Logprob]]
    got: list[int] = dataclasses.field(default_factory=list)
    cached: int | None = None
    drafted: int = 0
    accepted: int = 0
    aborted: bool = False
    matcher: Listener | None = None


class EngineLives(RuleBasedStateMachine):
    """Nothing that is drawn depends on when the engine's thread does its work."""

    def __init__(
        self,
        device: str,
        references: References,
        counters: Counter[str],
        background: bool,
        ranks: int = 1,
        stages: int = 1,
    ) -> None:
        super().__init__()
        self.device, self.references = device, references
        self.ranks, self.stages = ranks, stages
        self.counters, self.background = counters, background
        self.lives: dict[tuple[str, int], Life] = {}
        self.known: list[tuple[int, str, list[int]]] = []  # salt, name, tokens that may be cached
        self.added = 0
        self.heard_prompts: set[str] = set()  # names whose prompts' logprobs have come
        self.half_heard: set[str] = set()  # names of which outputs were dropped
        self.runner: ModelRunner | None = None

    @initialize(
        repeats=st.booleans(),
        windowed=st.booleans(),
        block_size=st.sampled_from(BLOCK_SIZES),
        rows=st.integers(1, 5),
        budget=st.one_of(st.integers(5, 16), st.integers(5, 40)),
        room=st.one_of(st.integers(60, 130), st.integers(60, 240)),
        padded=st.booleans(),
        caching=st.sampled_from((True, True, True, True, True, False)),
        drafts=st.sampled_from((0, 4, 1, 0, 3, 7)),
        lookup=st.sampled_from(((1, 3), (1, 1), (2, 4))),
        kv_cache_dtype=st.sampled_from(("auto", "fp8_e4m3", "auto", "fp8_e5m2")),
        graph_mode=st.sampled_from(("full", "eager", "piecewise")),
    )
    def open(
        self,
        repeats: bool,
        windowed: bool,
        block_size: int,
        rows: int,
        budget: int,
        room: int,
        padded: bool,
        caching: bool,
        drafts: int,
        lookup: tuple[int, int],
        kv_cache_dtype: str,
        graph_mode: str,
    ) -> None:
        self.windows = [WINDOW, 0] if windowed else [0]
        self.drafts = drafts
        self.is_fp8 = kv_cache_dtype != "auto"
        least, most = lookup
        speculative_config = {
            "method": "ngram",
            "num_speculative_tokens": drafts,
            "prompt_lookup_min": least,
            "prompt_lookup_max": most,
        }
        self.block_size, self.rows, self.budget, self.caching = block_size, rows, budget, caching
        # In percent of what the longest request needs.
        self.total = max(2, len(self.windows) * num_blocks(LONGEST, block_size) * room // 100)
        self.reference = self.references.of(repeats, windowed, block_size, kv_cache_dtype)
        in_halves = self.stages == 1 and budget % 2 == 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MRV1_USE_TBO", "1" if in_halves else "0")
            self.runner = open_windowed(
                windowed,
                open_runner,
                self.device,
                self.references.model(repeats),
                block_size=block_size,
                max_model_len=64,
                max_num_seqs=rows,
                max_num_batched_tokens=budget,
                num_kv_blocks=self.total + 1,
                pad_requests=rows if padded else 0,
                pad_tokens=budget if padded else 0,
                tensor_parallel_size=self.ranks,
                pipeline_parallel_size=self.stages,
                speculative_config=speculative_config if drafts else None,
                kv_cache_dtype=kv_cache_dtype,
                graph_mode=graph_mode,
            )
        assert sorted(self.runner.kv_windows) == sorted(self.windows)
        options = _core.EngineOptions(enable_prefix_caching=caching, background=self.background)
        self.engine = _core.Engine(self.runner.model.runner, options)

    def count(self, name: str, happened: int = 1) -> None:
        self.counters[name] += happened
        if self.drafts:
            self.counters[name + DRAFTING] += happened
        if self.is_fp8:
            self.counters[name + FP8] += happened

    # --- what a request must give ----------------------------------------------------------------

    def asked(self, wish: Wish) -> SamplingParams:
        """The parameters of the request, whose first sample has its seed."""
        return dataclasses.replace(
            self.params(wish, 0),
            num_speculative_tokens=None if wish.drafts is None else min(wish.drafts, self.drafts),
            logprobs=wish.logprobs,
            prompt_logprobs=wish.prompt_logprobs,
        )

    def params(self, wish: Wish, index: int) -> SamplingParams:
        """Those of a sample by itself, without drafts."""
        path = ALL_PATHS[wish.path].params
        fields: dict[str, Any] = {"max_tokens": wish.max_tokens}
        if wish.stop_at is not None or wish.sequence is not None:
            fields["min_tokens"] = min(wish.min_tokens, wish.max_tokens)
            first = tokens_of(self.outputs(wish, dataclasses.replace(path, logprobs=TOP)))
            if wish.stop_at is not None:
                fields["stop_token_ids"] = [first[wish.stop_at]]
            if wish.sequence is not None:
                length, last = wish.sequence
                sequence = first[max(0, last + 1 - length) : last + 1]
                # Another one begins like it, and goes on otherwise.
                fields["stop_sequences"] = [[*sequence, VOCAB - 1 - sequence[-1]], sequence]
        if path.seed is not None:
            fields["seed"] = path.seed + index
        return dataclasses.replace(path, **fields)

    def outputs(self, wish: Wish, params: SamplingParams) -> list[RowOutput]:
        """The request alone."""
        return self.reference.outputs(PROMPTS[wish.prompt], params, ALL_PATHS[wish.path].bad_words)

    def life(self, wish: Wish, index: int) -> Life:
        params = dataclasses.replace(self.params(wish, index), logprobs=TOP)
        if params.min_tokens:
            # Stop ids are masked at first, so the path is another one, and sequences do not count.
            outputs = self.outputs(wish, params)
            tokens, reason = tuple(tokens_of(outputs)), outputs[-1].finish_reason
            assert reason is not None
            stop_sequence = outputs[-1].stop_sequence
            stop = -1 if stop_sequence is None else stop_sequence
        else:
            path = dataclasses.replace(
                params, max_tokens=MAX_TOKENS, stop_token_ids=[], stop_sequences=[], min_tokens=0
            )
            outputs = self.outputs(wish, path)
            tokens, reason = cut(tokens_of(outputs), params)
            stop = -1
            if reason == "stop" and tokens[-1] not in params.stop_token_ids:
                stop = ending_sequence(tokens, params)
        logprobs = [place for output in outputs for place in output.logprobs or ()]
        return Life(wish, tokens, reason, stop, logprobs[: len(tokens)])

    def fits(self, wish: Wish) -> bool:
        """Whether a request could ever run."""
        everything = num_blocks(len(PROMPTS[wish.prompt]) + wish.max_tokens - 1, self.block_size)
        reached = [
            min(everything, num_blocks(window, self.block_size) + 1) if window else everything
            for window in self.windows
        ]
        return sum(reached) <= self.total

    # --- rules -----------------------------------------------------------------------------------

    @rule(many=st.lists(wishes, min_size=1, max_size=6), again=st.integers(0, 9))
    def add_some(self, many: list[Wish], again: int) -> None:
        for wish in many:
            if len(self.lives) < MOST_LIVES:
                self.added += 1
                self.add(str(self.added), wish)
        if again == 0 and self.lives:
            self.add(next(iter(self.lives))[0], many[0])

    def add(self, name: str, wish: Wish) -> None:
        prompt = PROMPTS[wish.prompt]
        matchers = [Listener() for _ in range(wish.n)] if wish.bound else []

        def add_request() -> None:
            self.engine.add_request(
                name,
                make_row_spec(
                    prompt,
                    self.asked(wish),
                    eos_token_ids=(),
                    bad_words=ALL_PATHS[wish.path].bad_words,
                ),
                priority=wish.priority,
                n=wish.n,
                cache_salt=wish.salt,
                skip_prefix_cache=wish.skip_cache,
                grammar=_core.Grammar(OpenExecutor(), matchers) if matchers else None,
            )

        if not self.fits(wish):
            with pytest.raises(RequestError, match="KV blocks"):
                add_request()
            self.counters["too large"] += 1
        elif any(used == name for used, _ in self.lives):
            with pytest.raises(RequestError, match="id"):
                add_request()
            self.counters["id in use"] += 1
        else:
            for index in range(wish.n):
                life = self.life(wish, index)
                life.matcher = matchers[index] if matchers else None
                self.lives[name, index] = life
                if not wish.skip_cache and self.caching:
                    self.known.append((wish.salt, name, [*prompt, *life.tokens]))
            add_request()
            self.counters["fork"] += wish.n > 1

    @rule(count=st.integers(1, 25))
    def go_on(self, count: int) -> None:
        for _ in range(count):
            self.take(self.engine.wait_outputs(0.02) if self.background else self.engine.step())

    def take(self, outputs: list[_core.RequestOutput]) -> None:
        """News that was handed out; of those who quit there may be more in the same list."""
        quitters: set[tuple[str, int]] = set()
        for output in outputs:
            key = output.id, output.index
            if key in quitters:
                continue
            life = self.lives[key]
            if life.cached is None:
                self.check_cached(key, life, output.num_cached_tokens)
                life.cached = output.num_cached_tokens
            # What ends while it waits to be computed again keeps the count of its first admission.
            assert output.num_cached_tokens == life.cached
            self.check_drafts(life, output)
            self.check_logprobs(life, output)
            self.check_prompt_logprobs(life, output)
            life.got += output.token_ids
            assert tuple(life.got) == life.tokens[: len(life.got)], key
            if output.end != _core.RequestEnd.NONE:
                self.check_end(key, life, output)
            elif life.wish.quit_at is not None and len(life.got) >= life.wish.quit_at:
                quitters.add(key)
                del self.lives[key]
                # Its thread may have ended it by now.
                there = self.engine.abort(output.id, index=output.index, report=False)
                assert there != life.aborted or self.background
                self.counters["late abort"] += 1

    def check_cached(self, key: tuple[str, int], life: Life, cached: int) -> None:
        """Cached are whole blocks that begin other requests; samples share one prompt."""
        name, index = key
        prompt = PROMPTS[life.wish.prompt]
        assert 0 <= cached < len(prompt)
        if index > 0 or (not life.got and cached == 0):
            self.counters["shared prompt"] += cached == len(prompt) - 1 and index > 0
            return

        def common(tokens: list[int]) -> int:
            pairs = zip(prompt, tokens, strict=False)
            return next((at for at, (a, b) in enumerate(pairs) if a != b), len(prompt))

        assert cached % self.block_size == 0
        assert not (life.wish.skip_cache and cached)
        assert not (life.wish.prompt_logprobs is not None and cached)
        others = [
            common(tokens)
            for salt, owner, tokens in self.known
            if salt == life.wish.salt and owner != name
        ]
        assert cached <= max(others, default=0)

    def check_drafts(self, life: Life, output: _core.RequestOutput) -> None:
        """A step gives one token and what it accepts, of no more drafts than were asked for.

        What it accepts is all where a draft stops the row.
        """
        wish, most = life.wish, self.drafts
        most = most if wish.drafts is None else min(most, wish.drafts)
        most = 0 if wish.bound else most
        drafted = output.num_draft_tokens - life.drafted
        accepted = output.num_accepted_tokens - life.accepted
        assert 0 <= accepted <= drafted <= most
        count = len(output.token_ids)
        on_draft = output.end == _core.RequestEnd.STOP and count == accepted > 0
        assert count == 1 + accepted or on_draft or (not count and not drafted)
        self.counters["stop on a draft"] += on_draft
        self.counters["end among drafts"] += output.end in ENDS.values() and accepted > 0
        life.drafted, life.accepted = output.num_draft_tokens, output.num_accepted_tokens

    def check_logprobs(self, life: Life, output: _core.RequestOutput) -> None:
        asked, count = life.wish.logprobs, len(output.token_ids)
        if asked is None or not count:
            assert output.logprobs is None
            return
        assert output.logprobs is not None
        first = len(life.got)
        places = life.logprobs[first : first + count]
        if asked == 0:
            places = [
                {token: place[token]}
                for token, place in zip(life.tokens[first:], places, strict=False)
            ]
        assert token_logprobs(count, *output.logprobs, None) == places
        self.count("logprobs", count)

    def check_prompt_logprobs(self, life: Life, output: _core.RequestOutput) -> None:
        """Those of a request come once, with the first token of one of its samples."""
        asked, found = life.wish.prompt_logprobs, output.prompt_logprobs
        if found is None:
            if asked is not None and output.token_ids and output.id not in self.half_heard:
                assert output.id in self.heard_prompts
            return
        assert asked is not None and output.token_ids and not life.got
        assert output.id not in self.heard_prompts
        self.heard_prompts.add(output.id)
        prompt = PROMPTS[life.wish.prompt]
        assert [len(values) for values in found] == [len(prompt) - 1] * 3
        expected = self.reference.outputs(prompt, greedy(1, prompt_logprobs=asked))
        if len(prompt) > 1:
            wanted = expected[0].prompt_logprobs
            assert wanted is not None
            np.testing.assert_array_equal(found[0], wanted.token_ids)
            np.testing.assert_array_equal(found[1], wanted.logprobs)
            np.testing.assert_array_equal(found[2], wanted.ranks)
        self.count("scored prompt")

    def check_end(self, key: tuple[str, int], life: Life, output: _core.RequestOutput) -> None:
        del self.lives[key]
        assert output.error == ""
        if life.got:
            # Fewer steps than that could not compute what was not cached.
            computed = len(PROMPTS[life.wish.prompt]) - (life.cached or 0)
            self.count("chunk edge", computed > self.budget)
            self.count("prefix hit", key[1] == 0 and bool(life.cached))
        if output.end == _core.RequestEnd.ABORT:
            assert life.aborted
            self.counters["abort"] += 1
            return
        # With a thread the end may be on its way when the abort comes.
        assert not life.aborted or self.background
        assert output.end == ENDS[life.reason], key
        assert output.stop_sequence == life.stop_sequence, key
        assert tuple(life.got) == life.tokens, key
        if life.matcher is not None:
            # All but the token that ended it, each once.
            assert life.matcher.heard == life.got[:-1]
            self.count("bound")
        self.counters[life.reason] += 1
        self.count("stop sequence", life.stop_sequence >= 0)
        self.count("edited", life.wish.path >= len(PATHS))

    @rule(
        which=st.integers(0, MOST_LIVES - 1),
        index=st.sampled_from((-1, -1, *range(MAX_SAMPLES))),
        report=st.booleans(),
    )
    def abort(self, which: int, index: int, report: bool) -> None:
        names = list(dict.fromkeys(name for name, _ in self.lives))
        name = names[which] if which < len(names) else "nobody"
        keys = [key for key in self.lives if key[0] == name and index in (-1, key[1])]
        ended = self.engine.abort(name, index=index, report=report)
        alive = any(not self.lives[key].aborted for key in keys)
        assert ended == alive or (self.background and alive)
        for key in keys:
            if report:
                self.lives[key].aborted = True
            else:
                del self.lives[key]
                self.half_heard.add(name)

    def finish(self) -> None:
        turns = 0
        while self.engine.has_unfinished():
            self.go_on(1)
            turns += 1
            assert turns < 5000, "no end in sight"
        assert not self.lives

    # --- after every rule ------------------------------------------------------------------------

    @invariant()
    def balances(self) -> None:
        if self.runner is None:
            return
        self.engine.check_invariants()
        stats = self.engine.stats()
        assert 0 <= stats["free_blocks"] <= self.total
        assert 0 <= stats["cached_blocks"] <= self.total
        assert 0 <= stats["running"] <= self.rows
        if self.background:
            return
        alive = sum(not life.aborted for life in self.lives.values())
        assert stats["running"] + stats["waiting"] == alive
        if not self.engine.has_unfinished():
            assert stats["free_blocks"] == self.total
            self.engine.check_idle()
            self.counters["idle"] += 1

    def teardown(self) -> None:
        if self.runner is None:
            return
        try:
            self.finish()
            self.engine.check_idle()
            stats = self.engine.stats()
            assert (stats["free_blocks"], stats["running"]) == (self.total, 0)
            for name, stat in (
                ("steps", "steps"),
                ("preemption", "preemptions"),
                ("stop in flight", "masked_results"),
                ("abort in flight", "dropped_results"),
            ):
                self.count(name, stats[stat])
            modes = self.runner.stats()
            for mode in ("eager", "piecewise", "full"):
                self.counters[f"{mode} steps"] += modes[f"steps_{mode}"]
            self.counters["steps in halves"] += modes["steps_in_halves"]
            self.counters["accepted draft"] += stats["accepted_tokens"]
            self.counters["rejected draft"] += stats["draft_tokens"] - stats["accepted_tokens"]
            self.counters["windowed steps"] += stats["steps"] * (len(self.windows) > 1)
        finally:
            self.engine.close()
            self.runner.close()


# Long runs may be the least urgent of a machine, and a limit in the middle of a step loses outputs.
@pytest.mark.timeout(max(300, STEPS // 100) if SEED is None else 0)
@pytest.mark.parametrize("background", [False, True], ids=["stepped", "thread"])
def test_lives_over_the_native_engine(
    device: str, background: bool, report_line: Callable[[str], None], tmp_path: Path
) -> None:
    counters: Counter[str] = Counter()
    references = References(device, copy_model(tmp_path / "repeating", change=repeat_often))
    # The thread's turns differ from run to run, so it gets a fifth, and no minimum but steps.
    steps = STEPS // 5 if background else STEPS
    lives = seed(SEED) if SEED is not None else lambda factory: factory
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            lives(lambda: EngineLives(device, references, counters, background)),
            settings=settings(
                max_examples=max(20, steps // STEPS_AN_EXAMPLE),
                stateful_step_count=50,
                derandomize=SEED is None,
            ),
        )
    finally:
        references.close()
    kind = "thread" if background else "stepped"
    report_line(
        f"engine lives, {kind}: " + ", ".join(f"{n} {c}" for n, c in counters.most_common())
    )
    if COUNTS is not None:
        Path(COUNTS, f"{kind}.json").write_text(json.dumps(counters))
    assert counters["steps"] >= steps, counters
    if background:
        return
    for name in (*RARE, "accepted draft", "rejected draft", "piecewise steps", "full steps"):
        assert counters[name] >= LEAST, (name, counters)
    for name in RARE:
        assert counters[name + DRAFTING] >= LEAST // 4, (name, counters)
        assert counters[name + FP8] >= LEAST // 4, (name, counters)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("stages", "ranks", "background"),
    [(1, 2, True), (1, 4, False), (2, 1, False), (2, 1, True), (2, 2, False)],
    ids=["2-thread", "4", "2-stages", "2-stages-thread", "2-stages-of-2"],
)
def test_lives_over_several_devices(
    device: str,
    stages: int,
    ranks: int,
    background: bool,
    report_line: Callable[[str], None],
    tmp_path: Path,
) -> None:
    """Ranks and stages draw the tokens of one device, whatever befalls the requests."""
    need_ranks(device, stages * ranks)
    counters: Counter[str] = Counter()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    plain = copy_model(tmp_path / "plain", config=heads)
    repeating = copy_model(tmp_path / "repeating", config=heads, change=repeat_often)
    references = References(device, repeating, plain)
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            lambda: EngineLives(device, references, counters, background, ranks, stages),
            settings=settings(max_examples=30, stateful_step_count=40, derandomize=True),
        )
    finally:
        references.close()
    report_line(
        f"engine lives, {stages} stages of {ranks} ranks: "
        + ", ".join(f"{n} {c}" for n, c in counters.most_common())
    )
    assert (counters["steps in halves"] > 100) == (stages == 1), counters
    if not background:
        for name in (*RARE, "accepted draft", "rejected draft", "fork", "windowed steps"):
            assert counters[name] >= 3, (name, counters)
