# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The story grammar: generator and parser agree, and tampered stories are rejected."""

from __future__ import annotations

import importlib.util
import math
import random
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

_PATH = Path(__file__).parents[1] / "scripts" / "demo_model" / "story_grammar.py"
_NUM_SEEDS = 2000


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("story_grammar", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["story_grammar"] = module
    spec.loader.exec_module(module)
    return module


grammar = _load()


@pytest.fixture(scope="module")
def stories() -> list:
    return [grammar.generate(random.Random(seed)) for seed in range(_NUM_SEEDS)]


def test_grammar_is_well_formed_and_unambiguous() -> None:
    assert grammar.check_grammar() == []


@pytest.mark.parametrize(
    "alternatives",
    [
        ("One {weather} day", "One {weather} night"),
        ("{He} ran", "{He} ran off"),
        ("He{home}", "{He} ran"),
        (" {weather}", " sunny day"),
    ],
)
def test_check_grammar_finds_ambiguity(
    alternatives: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grammar.RULES, "extra", grammar._alts(*alternatives))
    assert any(problem.startswith("extra:") for problem in grammar.check_grammar())


def test_check_grammar_finds_missing_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(grammar.RULES, "consequence.fog")
    assert any("consequence.fog" in problem for problem in grammar.check_grammar())


def test_round_trip(stories: list) -> None:
    for story in stories:
        result = grammar.parse(story.text, complete=True)
        assert result.accepted, result.reason
        assert result.derivation == story.derivation
        assert result.log_prob == pytest.approx(story.log_prob, abs=1e-9)
        assert result.offset == len(story.text)


def test_log_prob_is_the_log_of_the_choice_probabilities(stories: list) -> None:
    for story in stories[:200]:
        expected = 0.0
        for rule, index in story.derivation:
            weights = [alt.weight for alt in grammar.RULES[rule]]
            expected += math.log(weights[index] / sum(weights))
        assert story.log_prob == pytest.approx(expected, abs=1e-9)


def test_every_alternative_occurs(stories: list) -> None:
    used = {step for story in stories for step in story.derivation}
    for seed in range(_NUM_SEEDS, 3 * _NUM_SEEDS):
        used.update(grammar.generate(random.Random(seed)).derivation)
    every = {(rule, index) for rule, alts in grammar.RULES.items() for index in range(len(alts))}
    assert every - used == set()


def test_generation_is_deterministic(stories: list) -> None:
    assert grammar.generate(random.Random(7)) == stories[7]
    assert len({story.text for story in stories}) == _NUM_SEEDS


def test_every_beginning_is_viable_and_unfinished(stories: list) -> None:
    for story in stories[:2]:
        for end in range(len(story.text)):
            prefix = story.text[:end]
            assert grammar.parse(prefix, complete=False).accepted, prefix
            whole = grammar.parse(prefix, complete=True)
            # A story may also stop in front of its moral or of "The end."
            assert prefix.endswith(".") if whole.accepted else whole.offset == end, prefix


def test_beginnings_of_many_stories_are_viable(stories: list) -> None:
    rng = random.Random(1)
    for story in stories[:500]:
        prefix = story.text[: rng.randrange(len(story.text))]
        assert grammar.parse(prefix, complete=False).accepted, prefix


def _last(text: str, old: str, new: str, at_least: int = 2) -> str:
    """Replaces the last whole word ``old``, if it occurs at least ``at_least`` times."""
    matches = list(re.finditer(rf"\b{re.escape(old)}\b", text))
    if len(matches) < at_least:
        return text
    at = matches[-1]
    return text[: at.start()] + new + text[at.end() :]


def _swap_name(story: object) -> str:
    text: str = story.text  # type: ignore[attr-defined]
    name = re.search(r"named (\w+)", text)
    assert name is not None
    return _last(text, name.group(1), "Tom" if name.group(1) != "Tom" else "Leo")


def _swap_pronoun(story: object) -> str:
    text: str = story.text  # type: ignore[attr-defined]
    swaps = {"he": "she", "she": "he", "his": "her", "her": "his", "He": "She", "She": "He"}
    for old, new in swaps.items():
        changed = _last(text, old, new, at_least=1)
        if changed != text:
            return changed
    return text


def _swap_consequence(story: object) -> str:
    """Puts the consequence of another cause of the same scene in place of the story's own."""
    rules = dict(story.derivation)  # type: ignore[attr-defined]
    cause = next(rule.split(".")[1] for rule in rules if rule.startswith("consequence."))
    env = {
        slot: value
        for rule, index in story.derivation  # type: ignore[attr-defined]
        for slot, value in grammar.RULES[rule][index].sets.items()
    }
    other = next(
        alt.sets["cause"]
        for alt in grammar.RULES[f"cause.{env['scene']}"]
        if alt.sets["cause"] != cause
    )

    def fill(name: str, index: int) -> str:
        symbols = grammar.RULES[f"consequence.{name}"][index].symbols
        return "".join(s if isinstance(s, str) else env[s.name] for s in symbols)

    own = fill(cause, rules[f"consequence.{cause}"])
    text: str = story.text  # type: ignore[attr-defined]
    assert own in text
    return text.replace(own, fill(other, 0), 1)


def _swap_object(story: object) -> str:
    env = [grammar.RULES[rule][index].sets for rule, index in story.derivation]  # type: ignore[attr-defined]
    obj = next(sets["obj"] for sets in env if "obj" in sets)
    return _last(story.text, obj, "kite" if obj != "kite" else "drum")  # type: ignore[attr-defined]


@pytest.mark.parametrize("tamper", [_swap_name, _swap_pronoun, _swap_consequence, _swap_object])
def test_tampered_stories_are_rejected(tamper: object, stories: list) -> None:
    tampered = 0
    for story in stories[:300]:
        text = tamper(story)  # type: ignore[operator]
        if text == story.text:
            continue
        tampered += 1
        for complete in (True, False):
            result = grammar.parse(text, complete=complete)
            assert not result.accepted, text
            assert result.reason
            assert result.log_prob is None
            same = next(i for i, (a, b) in enumerate(zip(text, story.text, strict=False)) if a != b)
            assert result.offset >= same
    assert tampered > 250


@pytest.mark.parametrize(
    ("text", "complete", "offset"),
    [
        ("Twice upon a time", False, 1),
        ("Once upon a time, there was a brave boy named Lily", False, 47),
        ("Once upon a time, there was a brave girl named Lily. He ", False, 55),
        ("Once upon a time", True, 16),
        ("", True, 0),
        ("Once upon a time\x03", False, 16),
        ("Once upon a tim\ufffd", False, 15),
    ],
)
def test_rejections_name_the_offset(text: str, complete: bool, offset: int) -> None:
    result = grammar.parse(text, complete=complete)
    assert not result.accepted
    assert result.reason
    assert result.offset == offset


def test_text_after_the_end_is_rejected(stories: list) -> None:
    story = next(story for story in stories if story.text.endswith(" The end."))
    result = grammar.parse(story.text + " Once", complete=True)
    assert not result.accepted
    assert result.offset == len(story.text)
    assert not grammar.parse(story.text + " ", complete=False).accepted


def test_the_empty_text_begins_a_story() -> None:
    assert grammar.parse("", complete=False).accepted


def test_variety() -> None:
    rules = grammar.RULES
    assert sum(len(alts) for rule, alts in rules.items() if rule.startswith("name.")) >= 40
    assert len(rules["new_place"]) >= 30
    assert len(rules["object"]) >= 40
    assert sum(rule.startswith("consequence.") for rule in rules) >= 20
