# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Defaults, accepted and refused values of the sampling parameters."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from mrv1.errors import Mrv1Error, RequestError
from mrv1.sampling_params import SamplingParams

NAN = float("nan")
INF = float("inf")


def test_defaults_are_those_of_vllm() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "detokenize": True,
        "num_speculative_tokens": None,
    }


def test_fields_and_parameters_are_the_same() -> None:
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    assert names == list(inspect.signature(SamplingParams).parameters)


@pytest.mark.parametrize(
    ("field", "given", "stored"),
    [
        ("n", np.int64(3), 3),
        ("temperature", 0, 0.0),
        ("temperature", 9e-6, 0.0),
        ("temperature", 1e-5, 1e-5),
        ("temperature", 2, 2.0),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.float16(0.25), 0.25),
        ("temperature", np.int64(3), 3.0),
        ("temperature", Fraction(1, 4), 0.25),
        ("top_p", 1, 1.0),
        ("top_p", np.float64(0.9), 0.9),
        ("top_p", 1e-9, 1e-9),
        ("top_k", -1, 0),
        ("top_k", 0, 0),
        ("top_k", np.int32(7), 7),
        ("top_k", np.uint8(7), 7),
        ("top_k", 2**31 - 1, 2**31 - 1),
        ("min_p", 0, 0.0),
        ("min_p", 1, 1.0),
        ("seed", None, None),
        ("seed", 0, 0),
        ("seed", np.uint64(2**64 - 1), 2**64 - 1),
        ("max_tokens", None, None),
        ("max_tokens", 1, 1),
        ("max_tokens", np.int64(2**31 - 1), 2**31 - 1),
        ("min_tokens", 16, 16),
        ("stop", "end", ("end",)),
        ("stop", ["a", "bc"], ("a", "bc")),
        ("stop", ("a",), ("a",)),
        ("stop", [], ()),
        ("stop", ["x" * 1024] * 64, ("x" * 1024,) * 64),
        ("stop_token_ids", [], ()),
        ("stop_token_ids", [0, np.int64(5)], (0, 5)),
        ("stop_token_ids", range(3), (0, 1, 2)),
        ("ignore_eos", True, True),
        ("include_stop_str_in_output", True, True),
        ("skip_special_tokens", False, False),
        ("detokenize", False, False),
    ],
)
def test_accepted(field: str, given: Any, stored: Any) -> None:
    params = SamplingParams(**{field: given})
    value = getattr(params, field)
    assert value == stored
    # Python's own type, so that nothing downstream meets a NumPy scalar.
    assert type(value) is type(stored)
    if isinstance(stored, tuple):
        assert [type(entry) for entry in value] == [type(entry) for entry in stored]


@pytest.mark.parametrize(
    ("field", "given", "named", "allowed"),
    [
        *[("n", v, "n", "an integer in [1,") for v in (0, -1, 2**31, 1.0, True, "2", None)],
        *[("temperature", v, "temperature", "in [0, 3.4e+38]") for v in (-0.1, -1, 1e39)],
        *[
            ("temperature", v, "temperature", "a finite number")
            for v in (NAN, INF, -INF, 10**400, True, np.True_, "1", None, 1j, np.float32(NAN))
        ],
        *[("top_p", v, "top_p", "in (0, 1]") for v in (0, 0.0, -0.5, 1.0000001, 2, NAN, False)],
        *[("top_k", v, "top_k", "an integer in [-1,") for v in (-2, 2**31, 1.0, True, "3", None)],
        *[("min_p", v, "min_p", "in [0, 1]") for v in (-1e-9, 1.1, NAN, True, None)],
        *[("seed", v, "seed", "None or an integer") for v in (-1, 2**64, 0.5, True)],
        *[
            ("max_tokens", v, "max_tokens", "None or an integer in [1,")
            for v in (0, -1, 2**31, 16.0, True, "16")
        ],
        *[("min_tokens", v, "min_tokens", "an integer in [0,") for v in (-1, 1.0, True, None)],
        ("min_tokens", 17, "min_tokens", "at most max_tokens = 16"),
        *[("stop", v, "stop", "list of strings") for v in (1, {"a"}, b"a", iter("a"))],
        *[("stop", [v], "stop[0]", "a string of 1 to") for v in ("", 1, None, b"a", "x" * 1025)],
        ("stop", "", "stop[0]", "a string of 1 to"),
        ("stop", ["a", ""], "stop[1]", "a string of 1 to"),
        ("stop", ["a"] * 65, "stop", "at most 64"),
        *[("stop_token_ids", v, "stop_token_ids", "a list of token ids") for v in (1, "1", {1})],
        *[
            ("stop_token_ids", [0, v], "stop_token_ids[1]", "an integer in [0,")
            for v in (-1, 1.0, True, "1", None, 2**31)
        ],
        ("stop_token_ids", [1] * 1025, "stop_token_ids", "at most 1024"),
        *[
            (name, v, name, "True or False")
            for name in (
                "ignore_eos",
                "include_stop_str_in_output",
                "skip_special_tokens",
                "detokenize",
            )
            for v in (0, 1, None, "yes")
        ],
    ],
)
def test_refused(field: str, given: Any, named: str, allowed: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: given})
    error = caught.value
    assert isinstance(error, Mrv1Error)
    assert isinstance(error, ValueError)
    assert error.field == named
    assert error.allowed is not None
    assert allowed in error.allowed
    assert str(error).startswith(f"{named} = ")
    assert error.request_id is None


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"])
def test_an_integer_too_long_to_print_is_refused(field: str) -> None:
    for value in (10**5000, -(10**5000)):
        with pytest.raises(RequestError, match=f"{field} = an integer of 16610 bits"):
            SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_unknown_or_positional_parameters_are_type_errors() -> None:
    for name in ("best_of", "presence_penalty", "max_new_tokens"):
        with pytest.raises(TypeError, match=name):
            SamplingParams(**{name: 1})  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[call-arg]


def test_stop_strings_need_text() -> None:
    with pytest.raises(RequestError, match="detokenize = False: must be True where stop"):
        SamplingParams(stop="a", detokenize=False)


def test_no_max_tokens_leaves_min_tokens_free() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=100_000).min_tokens == 100_000


def test_instances_are_values() -> None:
    params = SamplingParams(temperature=0.5, stop=["a"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 2.0  # type: ignore[misc]
    assert dataclasses.replace(params, top_p=0.5).temperature == 0.5
    with pytest.raises(RequestError):
        dataclasses.replace(params, top_p=1.5)
    assert pickle.loads(pickle.dumps(params)) == params
    assert len({params, SamplingParams(temperature=0.5, stop="a")}) == 1


def test_greedy() -> None:
    assert SamplingParams(temperature=0).temperature == 0
    assert SamplingParams(temperature=1e-6).temperature == 0
    assert SamplingParams(temperature=0.01).temperature == 0.01


def test_validate_for() -> None:
    params = SamplingParams(stop_token_ids=[3, 99], min_tokens=15)
    params.validate_for(vocab_size=100, max_model_len=16)
    with pytest.raises(RequestError) as caught:
        params.validate_for(vocab_size=99, max_model_len=16, request_id="r7")
    assert str(caught.value) == (
        "request 'r7': stop_token_ids[1] = 99: must be below the vocabulary size 99"
    )
    with pytest.raises(RequestError) as caught:
        params.validate_for(vocab_size=100, max_model_len=15, request_id="r7")
    assert str(caught.value) == ("request 'r7': min_tokens = 15: must be below the model length 15")
