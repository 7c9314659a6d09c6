# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What is accepted and refused as the form of a request's text."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
from typing import Any

import pytest

from mrv1.errors import RequestError
from mrv1.structured_outputs_params import StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "é"}}}


@pytest.mark.parametrize(
    ("field", "given", "stored"),
    [
        ("json", SCHEMA, json.dumps(SCHEMA, ensure_ascii=False)),
        ("json", json.dumps(SCHEMA, indent=2), json.dumps(SCHEMA, ensure_ascii=False)),
        ("json", {}, "{}"),
        ("regex", "[ab]+", "[ab]+"),
        ("choice", ["yes", "no", "yes"], ("yes", "no")),
        ("choice", ("yes",), ("yes",)),
        ("grammar", 'start: "a" start | "b"', 'start: "a" start | "b"'),
        ("json_object", True, True),
    ],
)
def test_accepted(field: str, given: Any, stored: Any) -> None:
    form = StructuredOutputsParams(**{field: given})
    assert form.kind == field
    assert getattr(form, field) == stored
    assert type(getattr(form, field)) is type(stored)
    others = {f.name for f in dataclasses.fields(form)} - {field}
    assert not any(getattr(form, other) for other in others)


@pytest.mark.parametrize(
    ("field", "given", "named", "allowed"),
    [
        *[("json", v, "json", "a JSON schema") for v in ([], "[]", "3", "{", "", 3, True, {1, 2})],
        *[("json", {"const": v}, "json", "a JSON schema") for v in (float("nan"), object(), b"a")],
        ("json", {"const": "\ud800"}, "json", "UTF-8"),
        *[(f, v, f, "not empty") for f in ("regex", "grammar") for v in ("", b"a", 3, ["a"])],
        *[(f, "\udfff", f, "UTF-8") for f in ("regex", "grammar")],
        *[("choice", v, "choice", "a list of at least one") for v in ([], "yes", {"yes"}, 3)],
        *[("choice", ["a", v], "choice[1]", "not empty") for v in ("", None, 3)],
        *[("json_object", v, "json_object", "True or False") for v in (1, "yes", {})],
    ],
)
def test_refused(field: str, given: Any, named: str, allowed: str) -> None:
    with pytest.raises(RequestError) as caught:
        StructuredOutputsParams(**{field: given})
    error = caught.value
    assert error.field == f"structured_outputs.{named}"
    assert allowed in (error.allowed or "")


def test_a_schema_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match=r"structured_outputs\.json"):
        StructuredOutputsParams(json=schema)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "none given"),
        ({"json_object": False}, "none given"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice given"),
        ({"json": {}, "json_object": True}, "json and json_object given"),
    ],
)
def test_exactly_one_is_given(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        StructuredOutputsParams(**given)
    assert str(caught.value) == (
        f"structured_outputs: {said}: must be exactly one of json, regex, choice, grammar and "
        "json_object"
    )


def test_instances_are_values() -> None:
    form = StructuredOutputsParams(json=SCHEMA)
    same = pickle.loads(pickle.dumps(form))
    assert same == form
    assert len({form, same, StructuredOutputsParams(json=json.dumps(SCHEMA))}) == 1
    assert dataclasses.replace(form) == form
    with pytest.raises(dataclasses.FrozenInstanceError):
        form.json = None  # type: ignore[misc]
    with pytest.raises(TypeError, match="whitespace_pattern"):
        StructuredOutputsParams(regex="a", whitespace_pattern=" ")  # type: ignore[call-arg]
    names = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    assert names == list(inspect.signature(StructuredOutputsParams).parameters)
