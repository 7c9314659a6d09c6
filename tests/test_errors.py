# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The exception classes and their sentences."""

from __future__ import annotations

import pickle

import pytest

from mrv1 import errors


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("InvalidArgumentError", ValueError),
        ("RequestError", ValueError),
        ("ConfigError", ValueError),
        ("WeightError", ValueError),
        ("OutOfMemoryError", MemoryError),
        ("DeviceError", RuntimeError),
        ("ClosedError", RuntimeError),
        ("ForkError", RuntimeError),
        ("InternalError", RuntimeError),
    ],
)
def test_each_class_is_of_its_kind_and_takes_a_plain_message(
    name: str, base: type[Exception]
) -> None:
    kind = getattr(errors, name)
    error = kind("[linear] 3 columns")
    assert isinstance(error, errors.Mrv1Error)
    assert isinstance(error, base)
    assert str(error) == "[linear] 3 columns"


def test_sentences() -> None:
    request = errors.RequestError(request_id="r1", field="top_p", value=1.5, allowed="in (0, 1]")
    assert str(request) == "request 'r1': top_p = 1.5: must be in (0, 1]"
    assert (request.request_id, request.field, request.value, request.allowed) == (
        "r1", "top_p", 1.5, "in (0, 1]",
    )  # fmt: skip
    assert str(errors.RequestError(field="seed", value=None)) == "seed = None"
    config = errors.ConfigError(
        path="m/config.json", field="vocab_size", value=errors.MISSING, allowed="an integer"
    )
    assert str(config) == "m/config.json: vocab_size is missing: must be an integer"
    assert config.value is None
    weights = errors.WeightError("is damaged", path="a.safetensors", tensor="w")
    assert str(weights) == "a.safetensors: tensor 'w': is damaged"
    assert (weights.path, weights.tensor, weights.field) == ("a.safetensors", "w", None)


def test_errors_survive_pickling() -> None:
    error = errors.RequestError(request_id="r1", field="top_k", value=-5, allowed="at least -1")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.request_id, copy.field, copy.value) == ("r1", "top_k", -5)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


def test_any_value_is_described_in_few_characters() -> None:
    huge = 10**100_000
    values = (huge, -huge, [huge], "x" * 10**6, b"x" * 10**6, Unprintable(), [0] * 10**6)
    for value in values:
        assert 0 < len(errors.describe_value(value)) < 200
