# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Outputs that follow a grammar: what is drawn, whom it concerns, and what is refused.

On a GPU results are compared in batch-invariant mode, where a row does not depend on the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mrv1
from mrv1 import _core
from mrv1.engine import Engine
from mrv1.errors import ClosedError, InvalidArgumentError, RequestError
from mrv1.runner import ModelRunner
from mrv1.sampling_params import SamplingParams
from mrv1.structured_outputs import EXTRA, GrammarCompiler
from mrv1.structured_outputs_params import StructuredOutputsParams
from mrv1.tokenizer import Tokenizer
from serving_tools import (
    LLAMA,
    VOCAB,
    Listener,
    OpenExecutor,
    greedy,
    make_prompt,
    num_blocks,
    open_runner,
    seeded,
)

DEMO = Path(mrv1.__file__).parent / "demo"
PROMPT = "Once upon a time there was a little girl who liked to play with her dog."
Outcome = tuple[list[int], str, str, str | None]  # tokens, text, finish reason, error
Opened = Callable[..., Engine]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{2,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["old", "new"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def form(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


def drawn(seed: int, given: StructuredOutputsParams | None, **fields: Any) -> SamplingParams:
    defaults: dict[str, Any] = {"temperature": 1.0, "max_tokens": 60}
    return SamplingParams(seed=seed, structured_outputs=given, **{**defaults, **fields})


REGEX = form(regex=r"[a-z]{3,9} (\d{2}|dog)!?")


@pytest.fixture
def opened(device: str) -> Iterator[Opened]:
    """Opens engines over the demo model; all are closed at the end."""
    made: list[Engine] = []

    def start(**options: Any) -> Engine:
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "block_size": 4,
            "max_num_seqs": 8,
            "num_kv_blocks": 400,
            "num_threads": 2,
            "batch_invariant": True,
            "background": False,
        }
        made.append(Engine(DEMO, device=device, progress=False, **{**defaults, **options}))
        return made[-1]

    yield start
    for engine in made:
        engine.close()


def run(engine: Engine, wishes: dict[str, SamplingParams], **fields: Any) -> dict[str, Outcome]:
    """Outcome of each request, of its first sample; all of them together."""
    for name, params in wishes.items():
        engine.add_request(name, f"{name}. {PROMPT}", params, **fields)
    return drain(engine)


def drain(engine: Engine) -> dict[str, Outcome]:
    return {name: outcome for (name, _), outcome in drain_samples(engine).items()}


def drain_samples(engine: Engine) -> dict[tuple[str, int], Outcome]:
    tokens: dict[tuple[str, int], list[int]] = {}
    texts: dict[tuple[str, int], str] = {}
    ends: dict[tuple[str, int], tuple[str, str | None]] = {}
    while engine.has_unfinished():
        for update in engine.step():
            key = (update.request_id, update.index)
            tokens.setdefault(key, []).extend(update.token_ids)
            texts[key] = texts.get(key, "") + update.text
            if update.finish_reason is not None:
                ends[key] = (update.finish_reason, update.error)
    engine.check_idle()
    return {key: (tokens[key], texts[key], *ends[key]) for key in ends}


def follows_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags"]
        and re.fullmatch("[a-z]{2,8}", value["name"]) is not None
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"old", "new"}
    )


CHOICES = ("yes", "no", "perhaps tomorrow", 'said "é\n"')
GRAMMAR = """
start: sum
sum: term ("+" term)*
term: /[0-9]{1,3}/ | "(" sum ")"
"""
GBNF = 'root ::= "<" word (" " word)? ">"\nword ::= [a-f] [a-f]?\n'


def is_sum(text: str) -> bool:
    return re.fullmatch(r"[0-9+()]+", text) is not None and isinstance(
        eval(re.sub(r"\b0+(?=\d)", "", text)), int
    )


FORMS: dict[str, tuple[StructuredOutputsParams, Callable[[str], bool]]] = {
    "json": (form(json=SCHEMA), follows_schema),
    "json text": (form(json=json.dumps(SCHEMA)), follows_schema),
    "json_object": (form(json_object=True), lambda text: isinstance(json.loads(text), dict)),
    "regex": (REGEX, lambda text: re.fullmatch(r"[a-z]{3,9} (\d{2}|dog)!?", text) is not None),
    "anchored regex": (form(regex="^a[b-d]+$"), lambda text: bool(re.fullmatch("a[b-d]+", text))),
    "choice": (form(choice=CHOICES), lambda text: text in CHOICES),
    "grammar": (form(grammar=GRAMMAR), is_sum),
    "gbnf": (
        form(grammar=GBNF),
        lambda text: bool(re.fullmatch("<[a-f]{1,2}( [a-f]{1,2})?>", text)),
    ),
}


@pytest.mark.parametrize("kind", FORMS)
def test_outputs_have_the_form(opened: Opened, kind: str) -> None:
    given, has_form = FORMS[kind]
    wishes = {str(seed): drawn(seed, given, max_tokens=400) for seed in range(8)}
    outcomes = run(opened(num_kv_blocks=1000), wishes)
    finished = [text for _, text, reason, _ in outcomes.values() if reason == "stop"]
    assert len(finished) >= 4
    assert len(set(finished)) > 1
    for text in finished:
        assert has_form(text), text
    # What was cut off by its length begins such a text, as far as one can tell.
    assert all(reason in ("stop", "length") for _, _, reason, _ in outcomes.values())


def test_greedy_rows_take_the_best_allowed_token(opened: Opened) -> None:
    engine = opened()
    first = run(engine, {"a": drawn(1, form(choice=["dog", "cat"]), temperature=0)})
    second = run(engine, {"a": drawn(2, form(choice=["dog", "cat"]), temperature=0)})
    assert first == second
    assert first["a"][1] in ("dog", "cat")


def test_text_ends_with_an_end_of_sequence_token(opened: Opened) -> None:
    engine = opened()
    tokens, text, reason, _ = run(engine, {"a": drawn(5, form(regex="ab*c"))})["a"]
    assert re.fullmatch("ab*c", text)
    assert reason == "stop"
    assert tokens[-1] in engine.model.config.eos_token_ids


def test_log_probabilities_are_those_under_the_mask(opened: Opened) -> None:
    engine = opened()
    engine.add_request("a", PROMPT, drawn(1, form(regex="[x-z]"), logprobs=20))
    places = []
    while engine.has_unfinished():
        for update in engine.step():
            places += update.logprobs or []
    assert len(places) == 2
    first = {token: each.logprob for token, each in places[0].items()}
    likely = {token for token, logprob in first.items() if logprob > -math.inf}
    assert likely == {engine.tokenizer.encode(letter)[0] for letter in "xyz"}
    assert sum(math.exp(first[token]) for token in likely) == pytest.approx(1, abs=1e-6)
    # Nothing but the end may come.
    assert next(iter(places[1].values())).logprob == 0.0


def test_other_rows_draw_what_they_draw_without(opened: Opened) -> None:
    free = {f"free{index}": drawn(index, None, max_tokens=30) for index in range(3)}
    bound = {f"bound{index}": drawn(index, REGEX) for index in range(3)}
    alone = run(opened(), free)
    # In turns, so that rows are mixed in the table too.
    mixed = dict(pair for both in zip(free.items(), bound.items(), strict=True) for pair in both)
    together = run(opened(), mixed)
    assert {name: together[name] for name in free} == alone
    for name, params in bound.items():
        assert run(opened(), {name: params})[name] == together[name]


def test_each_sample_has_a_matcher(opened: Opened) -> None:
    engine = opened()
    engine.add_request("many", PROMPT, drawn(10, REGEX, n=4))
    samples = drain_samples(engine)
    assert len({text for _, text, _, _ in samples.values()}) > 1
    for index in range(4):
        engine.add_request("one", PROMPT, drawn(10 + index, REGEX))
        assert samples["many", index] == drain_samples(engine)["one", 0]


def test_preempted_requests_go_on_where_they_were(opened: Opened) -> None:
    given = form(regex="[a-z ]{40,50}")
    wishes = {str(seed): drawn(seed, given, max_tokens=100) for seed in range(4)}
    # About 20 tokens of prompt and 20 of output, each.
    small = opened(num_kv_blocks=29)
    outcomes = run(small, wishes)
    assert small.stats()["preemptions"] > 0
    for name, params in wishes.items():
        assert re.fullmatch("[a-z ]{40,50}", outcomes[name][1])
        assert run(opened(), {name: params})[name] == outcomes[name]


def test_prompts_in_chunks(opened: Opened) -> None:
    wishes = {str(seed): drawn(seed, REGEX) for seed in range(3)}
    whole = run(opened(), wishes)
    chunked = opened(max_num_batched_tokens=8)
    assert run(chunked, wishes) == whole
    assert chunked.stats()["steps"] > 8


def test_background_and_callers_steps_agree(opened: Opened) -> None:
    wishes = {str(seed): drawn(seed, REGEX if seed % 2 else None) for seed in range(6)}
    assert run(opened(background=True), wishes) == run(opened(), wishes)


def test_abort_while_a_step_is_in_flight(opened: Opened) -> None:
    wishes = {str(seed): drawn(seed, form(regex="[a-z]{30,40}")) for seed in range(3)}
    alone = run(opened(), wishes)
    engine = opened()
    for name, params in wishes.items():
        engine.add_request(name, f"{name}. {PROMPT}", params)
    engine.step()
    engine.step()
    assert engine.abort("1")
    # The slot and the row are taken by another one, while the step may still be in flight.
    engine.add_request("1b", f"1. {PROMPT}", wishes["1"])
    outcomes = drain(engine)
    assert outcomes["1"][2] == "abort"
    assert outcomes["1b"] == alone["1"]
    assert outcomes["0"][1:] == (alone["0"][1][-len(outcomes["0"][1]) :], *alone["0"][2:])


def test_other_rows_have_drafts(opened: Opened) -> None:
    config = {"method": "ngram", "num_speculative_tokens": 3}
    wishes = {
        "free": drawn(1, None, temperature=0.0, max_tokens=80),
        "bound": drawn(2, form(regex="(ab){10,20}")),
    }
    engine = opened(speculative_config=config)
    assert run(engine, wishes) == run(opened(), wishes)
    assert engine.stats()["draft_tokens"] > 0
    drafts = engine.stats()["draft_tokens"]
    run(engine, {"bound": wishes["bound"]})
    assert engine.stats()["draft_tokens"] == drafts


def test_end_of_sequence_is_repeated_up_to_min_tokens(opened: Opened) -> None:
    engine = opened()
    tokens, text, reason, _ = run(engine, {"a": drawn(1, form(choice=["no"]), min_tokens=12)})["a"]
    assert (text, reason) == ("no", "stop")
    assert len(tokens) == 13
    assert set(tokens[-10:]) <= set(engine.model.config.eos_token_ids)


@pytest.mark.parametrize("mode", ["piecewise", "full"])
def test_steps_in_graphs_draw_the_same(opened: Opened, mode: str) -> None:
    sizes: dict[str, Any] = {"capture_sizes": [1, 2, 4], "piecewise_sizes": [8, 16, 64]}
    wishes = {str(seed): drawn(seed, REGEX if seed != 1 else None) for seed in range(3)}
    eager = run(opened(graph_mode="eager", **sizes), wishes)
    engine = opened(graph_mode=mode, **sizes)
    assert run(engine, wishes) == eager
    assert engine.model.runner.stats()[f"steps_{mode}"] > 5
    # Again, with graphs that are there.
    assert run(engine, wishes) == eager


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (form(regex="[a"), "unclosed character class"),
        (form(regex=r"\bword"), "lookarounds"),
        (form(regex=r"[^\s\S]"), "there is no such text"),
        (form(json={"type": "number of things"}), "Invalid type"),
        (form(json={"$ref": "#/nowhere"}), "does not exist"),
        (form(json={"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable"),
        (form(grammar="start: undefined_rule"), "unknown name"),
        (form(grammar="root ::= undefined-rule"), "not found"),
        (form(grammar="%%%"), "name"),
    ],
)
def test_invalid_forms_are_refused(
    opened: Opened, given: StructuredOutputsParams, said: str
) -> None:
    engine = opened()
    with pytest.raises(RequestError, match=re.escape(said)) as caught:
        engine.add_request("mine", PROMPT, drawn(1, given))
    assert caught.value.request_id == "mine"
    assert caught.value.field == f"structured_outputs.{given.kind}"
    assert caught.value.value == getattr(given, given.kind)
    assert "\n" not in str(caught.value)
    assert not engine.has_unfinished()
    assert run(engine, {"next": drawn(1, form(choice=["no"]))})["next"][1] == "no"


def test_forms_end_with_eos(opened: Opened) -> None:
    engine = opened()
    with pytest.raises(RequestError, match="end-of-sequence") as caught:
        engine.add_request("mine", PROMPT, drawn(1, REGEX, ignore_eos=True))
    assert (caught.value.request_id, caught.value.field) == ("mine", "ignore_eos")
    without = GrammarCompiler(engine.tokenizer, engine.model.config.vocab_size, ())
    with pytest.raises(RequestError, match="no end-of-sequence token"):
        without.matchers(REGEX)


def test_without_the_library(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=re.escape(f"mrv1[{EXTRA}]")) as caught:
        engine.add_request("mine", PROMPT, drawn(1, REGEX))
    assert (caught.value.request_id, caught.value.field) == ("mine", "structured_outputs")
    assert run(engine, {"free": drawn(1, None)})["free"][2] in ("stop", "length")


def test_a_tokenizer_that_cannot_be_used() -> None:
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    compiler = GrammarCompiler(Tokenizer(words), 2, [1])
    with pytest.raises(RequestError, match="cannot use the model's tokenizer"):
        compiler.matchers(REGEX, 1, "mine")


def test_ids_past_the_tokenizers_are_never_allowed() -> None:
    tokenizer = Tokenizer.from_dir(LLAMA)
    compiler = GrammarCompiler(tokenizer, VOCAB + 100, [2, 5])
    matcher = compiler.matchers(form(regex=r"[\s\S]*"))[0]
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    assert bits[:VOCAB].sum() > VOCAB / 2
    assert bits[VOCAB:].sum() == 0
    # Ends of sequence, and no other special token.
    assert bits[:3].tolist() == [0, 0, 1]
    assert bits[5] == 1


def test_requests_of_a_form_do_not_use_up_one_anothers_states(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llguidance

    few = functools.partial(llguidance.LLParserLimits, max_lexer_states=3000)
    monkeypatch.setattr(llguidance, "LLParserLimits", few)
    engine = opened()
    compiler = GrammarCompiler(engine.tokenizer, engine.model.config.vocab_size, [0])
    letters = [engine.tokenizer.encode(letter)[0] for letter in "ab"]

    def outcome(matcher: llguidance.LLMatcher, seed: int) -> str:
        for choice in np.random.default_rng(seed).integers(0, 2, 400).tolist():
            matcher.compute_bitmask()
            if not matcher.consume_token(letters[choice]):
                return matcher.get_error()
        return ""

    # The states that an automaton of this expression may have are more than can be counted.
    states = form(regex="[ab]*a[ab]{30}c")
    assert [outcome(compiler.matchers(states)[0], seed) for seed in range(6)] == [""] * 6
    together = [outcome(matcher, seed) for seed, matcher in enumerate(compiler.matchers(states, 6))]
    assert "too many states" in together[-1]


# --- failures -------------------------------------------------------------------------------------


def test_a_matchers_failure_ends_its_request_alone(opened: Opened) -> None:
    wishes = {"free": drawn(1, None), "good": drawn(2, REGEX)}
    alone = run(opened(), wishes)
    engine = opened(force_tokens=True)
    # The grammar would never let a digit come first.
    digit = engine.tokenizer.encode("7")
    engine.add_request("bad", PROMPT, drawn(3, form(regex="[a-z]{9}")), forced_token_ids=digit)
    outcomes = run(engine, wishes)
    tokens, text, reason, error = outcomes.pop("bad")
    assert (tokens, text, reason) == (digit, "7", "error")
    assert error is not None and error.startswith("structured_outputs: ")
    assert outcomes == alone


def add_native(engine: Engine, name: str, executor: OpenExecutor, matchers: list[Listener]) -> None:
    """A request of the native engine with matchers of the test's own."""
    from mrv1.runner import make_row_spec

    spec = make_row_spec([5, 6, 7], seeded(1, 20), eos_token_ids=())
    grammar = _core.Grammar(executor, list(matchers))
    engine._native.add_request(name, spec, n=len(matchers), grammar=grammar)


def drain_native(engine: Engine) -> dict[tuple[str, int], tuple[int, _core.RequestEnd, str]]:
    counts: dict[tuple[str, int], int] = {}
    ends = {}
    while engine._native.has_unfinished():
        for output in engine._native.step():
            key = (output.id, output.index)
            counts[key] = counts.get(key, 0) + len(output.token_ids)
            if output.end != _core.RequestEnd.NONE:
                ends[key] = (counts[key], output.end, output.error)
        engine._native.check_invariants()
    engine._native.check_idle()
    return ends


def test_what_leaves_nothing_of_the_form_ends_the_request(opened: Opened) -> None:
    engine = opened()
    letters = [engine.tokenizer.encode(letter)[0] for letter in "xyz"]
    none = drawn(1, form(choice=["no"]), allowed_token_ids=letters)
    some = drawn(1, form(regex="[w-z]{5}"), allowed_token_ids=letters)
    outcomes = run(engine, {"none": none, "some": some})
    assert outcomes["none"] == ([], "", "error", "the logits hold no token to draw")
    # What is forbidden is also what would end it.
    tokens, text, reason, error = outcomes["some"]
    assert re.fullmatch("[xyz]{5}", text)
    assert (reason, error) == ("error", "the logits hold no token to draw")
    assert len(tokens) == 5


def test_one_call_a_step_for_all_rows(opened: Opened) -> None:
    engine = opened()
    executor = OpenExecutor()
    add_native(engine, "a", executor, [Listener()])
    add_native(engine, "b", executor, [Listener()])
    ends = drain_native(engine)
    assert ends == {(name, 0): (20, _core.RequestEnd.LENGTH, "") for name in "ab"}
    assert len(executor.calls) == 20
    assert all(len(rows) == 2 for rows in executor.calls)


def test_samples_fail_one_by_one(opened: Opened) -> None:
    engine = opened()
    add_native(engine, "a", OpenExecutor(), [Listener(), Listener(5), Listener()])
    ends = drain_native(engine)
    assert ends["a", 1] == (5, _core.RequestEnd.ERROR, "structured_outputs: worn out")
    assert ends["a", 0] == ends["a", 2] == (20, _core.RequestEnd.LENGTH, "")


@pytest.mark.parametrize("call", [1, 2, 7])
def test_an_executors_failure_ends_whoever_asked(opened: Opened, call: int) -> None:
    engine = opened()
    free = {"free": drawn(1, None)}
    alone = run(engine, free)
    add_native(engine, "a", OpenExecutor(fails_in=call), [Listener()])
    engine.add_request("free", f"free. {PROMPT}", free["free"])
    updates = []
    native_outputs = []
    while engine._native.has_unfinished():
        for output in engine._native.step():
            (native_outputs if output.id == "a" else updates).append(output)
    assert native_outputs[-1].end == _core.RequestEnd.ERROR
    assert "RuntimeError: out of order" in native_outputs[-1].error
    assert sum(len(output.token_ids) for output in native_outputs) == call - 1
    assert [token for output in updates for token in output.token_ids] == alone["free"][0]


def test_matchers_for_another_number_of_samples(opened: Opened) -> None:
    engine = opened()
    spec = _core.RowSpec()
    with pytest.raises(InvalidArgumentError, match="not for n = 2"):
        engine._native.add_request(
            "a", spec, n=2, grammar=_core.Grammar(OpenExecutor(), [Listener()])
        )


def test_an_engine_that_nobody_closes_ends_with_requests_in_it(device: str) -> None:
    """The thread wants the GIL for masks while whoever lets go of the engine holds it."""
    for _ in range(3):
        engine = Engine(DEMO, device=device, progress=False, num_kv_blocks=64)
        for seed in range(4):
            engine.add_request(str(seed), PROMPT, drawn(seed, form(regex="[a-z]+"), max_tokens=99))
        native = engine._native
        engine.step()
        del engine
        gc.collect()
        del native
        gc.collect()


def test_an_engine_that_its_own_thread_closes(opened: Opened) -> None:
    """As a finalizer of another object may do while masks are made."""
    engine = opened(background=True)
    runner = engine.model.runner

    class Closer(Listener):
        def is_error(self) -> bool:
            if len(self.heard) == 3:
                engine._native.close()
            return False

    def is_closed() -> bool:
        try:
            engine._native.stats()
        except ClosedError:
            return runner.free_rows == 8
        return False

    add_native(engine, "a", OpenExecutor(), [Closer()])
    deadline = time.monotonic() + 20
    while not is_closed():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_outputs_come_while_another_thread_holds_the_gil(opened: Opened) -> None:
    engine = opened(background=True)
    engine.add_request("a", PROMPT, drawn(1, REGEX))
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:  # takes turns with the engine's thread
        pass
    assert drain(engine)["a"][2] == "stop"


# --- the runner -----------------------------------------------------------------------------------

WORDS = (VOCAB + 31) // 32


def mask_of(*tokens: int) -> np.ndarray:
    bits = np.zeros(32 * WORDS, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


@pytest.fixture
def runner(device: str) -> Iterator[ModelRunner]:
    runner = open_runner(device, batch_invariant=True)
    yield runner
    runner.close()


def test_a_runner_draws_what_an_engine_draws(opened: Opened, device: str) -> None:
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    params = drawn(3, REGEX)
    tokens, text, _, _ = run(opened(), {"a": params})["a"]
    runner = open_runner(device, DEMO, batch_invariant=True)
    config = runner.model.config
    tokenizer = Tokenizer.from_dir(DEMO)
    compiler = GrammarCompiler(tokenizer, config.vocab_size, config.eos_token_ids)
    (matcher,) = compiler.matchers(REGEX)
    prompt = tokenizer.encode(f"a. {PROMPT}")
    free = dataclasses.replace(params, structured_outputs=None)
    row = runner.add_row(prompt, free, block_ids=range(1, 40), grammar=True)
    masks = allocate_token_bitmask(1, config.vocab_size)
    count, got = len(prompt), []
    while True:
        step = runner.execute([(row, count)])
        fill_next_token_bitmask(matcher, masks)
        step.set_masks(masks)
        (output,) = step.result()
        got += output.token_ids
        if output.finish_reason is not None:
            break
        matcher.consume_tokens(list(output.token_ids))
        count = 1
    runner.close()
    assert got == tokens
    assert tokenizer.decode(got) == text


def test_a_cut_step_waits_for_masks(runner: ModelRunner) -> None:
    free = runner.add_row(make_prompt(5, 1), greedy(9), block_ids=range(1, 5))
    bound = runner.add_row(make_prompt(7, 2), greedy(9), block_ids=range(5, 10), grammar=True)
    chunk = runner.execute([(bound, 4), (free, 5)])
    assert chunk.masked_items == ()
    chunk.result()
    step = runner.execute([(free, 1), (bound, 3)])
    assert step.masked_items == (1,)
    assert not step.ready
    for refused in (
        step.result,
        lambda: runner.execute([(free, 1)]),
        lambda: runner.add_row([1, 2], greedy(), block_ids=[20]),
        lambda: runner.append_blocks(free, [21]),
        lambda: runner.drop_blocks(free, 0, 0),
        lambda: runner.copy_blocks([(1, 22)]),
        lambda: runner.free_row(free),
        lambda: runner.logits(0),
        runner.infer_params,
    ):
        with pytest.raises(InvalidArgumentError, match=f"step {step.step} waits for the masks"):
            refused()
    for masks, said in (
        (np.zeros((2, WORDS), np.uint32), rf"\[2, {WORDS}\], not \[1, {WORDS}\]"),
        (np.zeros((1, WORDS + 1), np.uint32), rf"\[1, {WORDS + 1}\], not \[1, {WORDS}\]"),
        (np.zeros(WORDS, np.uint32), "a matrix of uint32 or int32"),
        (np.zeros((1, WORDS)), "a matrix of uint32 or int32"),
    ):
        with pytest.raises(InvalidArgumentError, match=said):
            step.set_masks(masks)
    step.set_masks(mask_of(17)[None])
    outputs = step.result()
    assert outputs[1].token_ids == (17,)
    assert len(outputs[0].token_ids) == 1
    with pytest.raises(InvalidArgumentError, match="does not wait for masks"):
        step.set_masks(mask_of(17)[None])
    step = runner.execute([(bound, 1), (free, 1)])
    assert step.masked_items == (0,)
    step.set_masks(mask_of(20).view(np.int32)[None])
    assert step.result()[0].token_ids == (20,)


def test_masks_of_a_row_that_another_one_had(runner: ModelRunner) -> None:
    """Nothing of the old mask is left, and steps in flight are waited for before it is written."""
    for token in (3, 40, 327):
        row = runner.add_row(make_prompt(6, 3), greedy(3), block_ids=[1, 2], grammar=True)
        steps = [runner.execute([(row, 6)])]
        steps[0].set_masks(mask_of(token)[None])
        for _ in range(2):
            steps.append(runner.execute([(row, 1)]))
            steps[-1].set_masks(mask_of(token)[None])
        assert [step.result()[0].token_ids for step in steps] == [(token,)] * 3
        runner.free_row(row)


def test_a_mask_that_allows_nothing_is_an_error_of_its_row(runner: ModelRunner) -> None:
    free = runner.add_row(make_prompt(5, 1), greedy(9), block_ids=range(1, 5))
    bound = runner.add_row(make_prompt(7, 2), greedy(9), block_ids=range(5, 10), grammar=True)
    step = runner.execute([(bound, 7), (free, 5)])
    step.set_masks(mask_of()[None])
    outputs = step.result()
    assert outputs[0].finish_reason == "error"
    assert outputs[1].finish_reason is None and outputs[1].token_id is not None


def test_a_cut_step_that_nobody_asks_for(runner: ModelRunner) -> None:
    row = runner.add_row(make_prompt(5, 1), greedy(9), block_ids=range(1, 5), grammar=True)
    runner.execute([(row, 5)])
    gc.collect()
    step = runner.execute([(row, 1)])  # the draw of the one before was free
    step.set_masks(mask_of(9)[None])
    output = step.result()[0]
    assert output.token_ids == (9,) and output.num_computed == 6


def test_rows_after_a_cut_step_that_nobody_asks_for(runner: ModelRunner) -> None:
    """What an error leaves between `execute` and `set_masks` keeps no row from being given back."""
    row = runner.add_row(make_prompt(5, 1), greedy(9), block_ids=range(1, 5), grammar=True)
    runner.execute([(row, 5)])
    gc.collect()
    runner.free_row(row)
    row = runner.add_row(make_prompt(5, 1), greedy(9), block_ids=range(1, 5), grammar=True)
    runner.execute([(row, 5)])
    gc.collect()
    runner.append_blocks(row, [7])
    assert len(runner.logits(0)) == VOCAB


def test_a_cut_step_that_fails(runner: ModelRunner) -> None:
    row = runner.add_row(make_prompt(5, 1), greedy(9), block_ids=range(1, 5), grammar=True)
    runner._native.fail_next_step("no luck")
    step = runner.execute([(row, 5)])
    step.set_masks(mask_of(9)[None])
    with pytest.raises(mrv1.errors.InternalError, match="no luck"):
        step.result()
    runner.free_row(row)
    row = runner.add_row(make_prompt(5, 1), greedy(9), block_ids=range(1, 5))
    assert runner.execute([(row, 5)]).result()[0].token_id is not None


def test_a_runner_takes_no_form(runner: ModelRunner) -> None:
    with pytest.raises(InvalidArgumentError, match="structured_outputs"):
        runner.add_row([1, 2], drawn(1, REGEX))
    with pytest.raises(InvalidArgumentError, match="grammar"):
        runner.add_row([1, 2], greedy(), grammar=1)  # type: ignore[arg-type]


def test_memory_for_masks_comes_with_the_first_row(runner: ModelRunner) -> None:
    row = runner.add_row([3, 4], greedy(), block_ids=[1])
    runner.free_row(row)
    assert runner.stats()["mask_bytes"] == 0
    taken = set()
    for _ in range(2):
        row = runner.add_row([3, 4], greedy(), block_ids=[1], grammar=True)
        runner.free_row(row)
        taken.add(runner.stats()["mask_bytes"])
    assert len(taken) == 1
    assert taken.pop() >= 4 * 4 * WORDS  # 4 rows, 4 bytes a word


def test_rows_with_a_grammar_take_one_token_a_step(device: str) -> None:
    runner = open_runner(
        device, speculative_config={"method": "ngram", "num_speculative_tokens": 3}
    )
    row = runner.add_row([3, 4], greedy(), block_ids=range(1, num_blocks(30)), grammar=True)
    runner.execute([(row, 2)]).set_masks(mask_of(9)[None])
    with pytest.raises(InvalidArgumentError, match="decodes 1 token a step"):
        runner.execute([(row, 2)])
    runner.close()
