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
from mrv1.structured_outputs_params import StructuredOutputsParams

NAN = float("nan")
INF = float("inf")


def test_defaults_are_those_of_vllm() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": (),
        "allowed_token_ids": None,
        "bad_words": (),
        "structured_outputs": None,
        "seed": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": (),
        "stop_token_ids": (),
        "stop_sequences": (),
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "logprobs": None,
        "prompt_logprobs": None,
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
        ("stop", ["x" * 5000] * 300, ("x" * 5000,) * 300),
        ("stop_token_ids", [], ()),
        ("stop_token_ids", [0, np.int64(5)], (0, 5)),
        ("stop_token_ids", range(3), (0, 1, 2)),
        ("stop_token_ids", [7] * 5000, (7,) * 5000),
        ("stop_sequences", [[1, np.int32(2)], (3,), range(2)], ((1, 2), (3,), (0, 1))),
        ("stop_sequences", [], ()),
        ("stop_sequences", [[5] * 3000] * 100, ((5,) * 3000,) * 100),
        *[
            (name, given, stored)
            for name in ("presence_penalty", "frequency_penalty")
            for given, stored in ((-2, -2.0), (2, 2.0), (np.float32(0.5), 0.5), (0, 0.0))
        ],
        ("repetition_penalty", 1, 1.0),
        ("repetition_penalty", np.float64(1.3), 1.3),
        ("repetition_penalty", 1e-300, 1e-30),
        ("repetition_penalty", 1e300, 1e30),
        ("logit_bias", {}, ()),
        ("logit_bias", {7: 1, np.int64(3): -0.5}, ((3, -0.5), (7, 1.0))),
        ("logit_bias", {1: 1000, 2: -1e30}, ((1, 100.0), (2, -100.0))),
        ("logit_bias", ((7, 1.0), [3, 2]), ((3, 2.0), (7, 1.0))),
        ("allowed_token_ids", None, None),
        ("allowed_token_ids", [9, np.int32(2), 9], (9, 2)),
        ("allowed_token_ids", range(3), (0, 1, 2)),
        ("bad_words", [], ()),
        ("bad_words", ["no", " no", "no"], ("no", " no")),
        ("bad_words", [f"{i}" for i in range(3000)], tuple(f"{i}" for i in range(3000))),
        ("logprobs", None, None),
        ("logprobs", 0, 0),
        ("logprobs", -1, -1),
        ("logprobs", np.int64(20), 20),
        ("prompt_logprobs", -1, -1),
        ("prompt_logprobs", 5000, 5000),
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
        *[("stop", [v], "stop[0]", "a string that is not empty") for v in ("", 1, None, b"a")],
        ("stop", "", "stop[0]", "a string that is not empty"),
        ("stop", ["a", ""], "stop[1]", "a string that is not empty"),
        *[("stop_token_ids", v, "stop_token_ids", "a list of token ids") for v in (1, "1", {1})],
        *[
            ("stop_token_ids", [0, v], "stop_token_ids[1]", "an integer in [0,")
            for v in (-1, 1.0, True, "1", None, 2**31)
        ],
        *[
            ("stop_sequences", v, "stop_sequences", "a list of lists of token ids")
            for v in (1, "1", {1}, {1: 2})
        ],
        *[
            ("stop_sequences", [[1], v], "stop_sequences[1]", "a list of at least one token id")
            for v in ([], 1, "1", None, {1})
        ],
        *[
            ("stop_sequences", [[1, v]], "stop_sequences[0][1]", "an integer in [0,")
            for v in (-1, 1.0, True, None)
        ],
        *[
            (name, v, name, "in [-2, 2]")
            for name in ("presence_penalty", "frequency_penalty")
            for v in (-2.001, 3, NAN, INF, True, "1", None)
        ],
        *[
            ("repetition_penalty", v, "repetition_penalty", "above 0")
            for v in (0, -1, NAN, INF, True, None)
        ],
        *[
            ("logit_bias", v, "logit_bias", "a mapping from token id to bias")
            for v in (1, "1:2", {1}, [1], [(1, 2, 3)])
        ],
        *[
            ("logit_bias", {v: 1.0}, "logit_bias token id", "an integer in [0,")
            for v in (-1, "5", 1.5, None, True, 2**31)
        ],
        ("logit_bias", [(1, 2), (1, 3)], "logit_bias token id", "given only once"),
        *[
            ("logit_bias", {5: v}, "logit_bias[5]", "a finite number")
            for v in (NAN, INF, None, "1", True)
        ],
        *[
            ("allowed_token_ids", v, "allowed_token_ids", "a list of")
            for v in ([], (), range(0), 1, "1", {1})
        ],
        *[
            ("allowed_token_ids", [0, v], "allowed_token_ids[1]", "an integer in [0,")
            for v in (-1, 1.0, True, None)
        ],
        *[("bad_words", v, "bad_words", "a list of strings") for v in ("no", 1, {"no"})],
        *[
            ("bad_words", ["a", v], "bad_words[1]", "more than white space")
            for v in ("", " ", "\n\t", None, b"a", 1)
        ],
        ("bad_words", ["\ud800"], "bad_words[0]", "UTF-8"),
        *[
            (name, v, name, "None or an integer in [-1,")
            for name in ("logprobs", "prompt_logprobs")
            for v in (-2, 1.0, True, "1", 2**31)
        ],
        *[
            ("structured_outputs", v, "structured_outputs", "StructuredOutputsParams")
            for v in ({"regex": "a"}, "a", True)
        ],
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
    for name in ("best_of", "length_penalty", "max_new_tokens"):
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
    params = SamplingParams(
        temperature=0.5,
        stop=["a"],
        logit_bias={3: 1, 2: 0.5},
        allowed_token_ids=[1, 2],
        bad_words=["b"],
        stop_sequences=[[1, 2]],
        structured_outputs=StructuredOutputsParams(json={"type": "object"}),
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 2.0  # type: ignore[misc]
    assert dataclasses.replace(params, top_p=0.5).temperature == 0.5
    with pytest.raises(RequestError):
        dataclasses.replace(params, top_p=1.5)
    assert pickle.loads(pickle.dumps(params)) == params
    same = dataclasses.replace(params, stop="a", logit_bias={2: 0.5, 3: 1.0})
    assert len({params, same}) == 1


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


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"logit_bias": {99: 1.0}}, "logit_bias token id"),
        ({"allowed_token_ids": [1, 99]}, "allowed_token_ids[1]"),
        ({"stop_sequences": [[1], [2, 3, 99]]}, "stop_sequences[1][2]"),
    ],
)
def test_token_ids_are_those_of_the_model(fields: dict[str, Any], named: str) -> None:
    params = SamplingParams(**fields)
    params.validate_for(vocab_size=100, max_model_len=16)
    with pytest.raises(RequestError) as caught:
        params.validate_for(vocab_size=99, max_model_len=16, request_id="r7")
    assert str(caught.value) == f"request 'r7': {named} = 99: must be below the vocabulary size 99"


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
def test_log_probabilities_are_at_most_the_engines(field: str) -> None:
    def check(count: int | None, most: int) -> None:
        SamplingParams(**{field: count}).validate_for(  # type: ignore[arg-type]
            100, 16, "r7", max_logprobs=most
        )

    for count, most in ((None, 0), (0, 0), (20, 20), (-1, -1), (100, -1), (-1, 100)):
        check(count, most)
    for count, most, said in (
        (1, 0, f"{field} = 1: must be at most the engine's max_logprobs = 0"),
        (101, -1, f"{field} = 101: must be at most the engine's max_logprobs = 100"),
        (21, 20, f"{field} = 21: must be at most the engine's max_logprobs = 20"),
        (-1, 99, f"{field} = -1: must be at most the engine's max_logprobs = 99; -1 means 100"),
    ):
        with pytest.raises(RequestError) as caught:
            check(count, most)
        assert str(caught.value) == f"request 'r7': {said}"


def test_numbers_of_log_probabilities() -> None:
    params = SamplingParams(logprobs=-1, prompt_logprobs=3)
    assert (params.num_logprobs(100), params.num_prompt_logprobs(100)) == (100, 3)
    assert SamplingParams().num_logprobs(100) == SamplingParams().num_prompt_logprobs(100) == -1
