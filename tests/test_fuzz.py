# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Hostile safetensors files, configurations and sampling parameters.

Each input is accepted or refused with the typed error of its reader: any other exception fails the
test. Memory has a bound, time as well, and each test counts what it tried, so that it cannot pass
by trying nothing. What is accepted is compared with an independent reading.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import time
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golden_data import DATA_DIR
from model_files import GENERATION, LLAMA, QWEN3, safetensors_bytes
from mrv1.config import ModelConfig
from mrv1.errors import ConfigError, RequestError, WeightError
from mrv1.loader import wire_model
from mrv1.models.experts import ExpertsConfig
from mrv1.safetensors_reader import read_checkpoint, read_header
from mrv1.sampling_params import SamplingParams
from mrv1.structured_outputs_params import StructuredOutputsParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# The small ones, and one of each family with all of its fields.
CODES = {"num_bits": 4, "type": "float", "group_size": 16}
CONFIGS = (
    LLAMA,
    QWEN3,
    {
        **LLAMA,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "config_groups": {"group_0": {"weights": CODES, "targets": ["Linear"]}},
            "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            "ignore": ["lm_head", "model.layers.0.*"],
        },
    },
    *(
        json.loads((DATA_DIR / "models" / name / "config.json").read_text("utf-8"))
        for name in (
            *("qwen2", "mistral", "gemma2", "gemma3", "ernie4_5", "phi4-mini"),
            *("qwen3_moe", "mixtral", "ernie4_5_moe"),
        )
    ),
)
NUM_HEADERS = 2200
NUM_INDICES = 400
NUM_CONFIGS = 2200
NUM_PARAMS = 2200
NUM_DRAWN = 300

MAX_PEAK_BYTES = 32 << 20
# Far above what one input takes, also on a slow and busy machine: it is there to find hangs.
MAX_SECONDS = 10.0

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    2**31 - 1,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    10**40,
    0.5,
    1.0,
    -0.0,
    1e-320,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "a",
    "1",
    "\0",
    "\ud800",
    "../../etc/passwd",
    "F32",
    "llama3",
    "x" * 5000,
    [],
    [0],
    [0, 0],
    [-1, 2**62],
    [2**62] * 70,
    [None],
    [[[[]]]],
    {},
    {"": None},
    {"a": {"a": {"a": []}}},
)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Fails if Python objects ever take more than MAX_PEAK_BYTES above the start."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        assert tracemalloc.get_traced_memory()[1] - before < MAX_PEAK_BYTES
    finally:
        tracemalloc.stop()


def attempt(read: Callable[[], Any], refusal: type[Exception]) -> Any:
    """Returns what `read` gives, or None if it refuses; fails if that takes too long."""
    begin = time.monotonic()
    try:
        result = read()
    except refusal as error:
        message, result = str(error), None
    else:
        message = ""
    # The message must be printable wherever it goes, and of bounded length.
    assert len(message.encode("utf-8")) < 10_000
    assert time.monotonic() - begin < MAX_SECONDS
    return result


def places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) within a JSON value."""
    found: list[tuple[Any, Any]] = []
    keys: Any = ()
    if isinstance(value, dict):
        keys = value
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        found.append((value, key))
        found.extend(places(value[key]))
    return found


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Returns a copy of a JSON object with one to three changes at random places."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = places(value)
        if not found:
            return rng.choice(HOSTILE)
        container, key = rng.choice(found)
        kind = rng.randrange(6)
        old = container[key]
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(("", "a", "dtype", "__metadata__", key))] = old
        elif kind == 2 and isinstance(old, int) and not isinstance(old, bool):
            container[key] = old + rng.choice((-1, 1, 2, 8, -old, old, 2**32))
        elif kind == 3 and isinstance(old, list):
            old.append(copy.deepcopy(rng.choice(old) if old else rng.choice(HOSTILE)))
        else:
            container[key] = copy.deepcopy(rng.choice(HOSTILE))
    return value


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Returns `data` with one to four changes of its bytes."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(len(result) + 1)
        kind = rng.randrange(6)
        if kind == 0 and position < len(result):
            result[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del result[position:]
        elif kind == 2:
            del result[position : position + rng.randint(1, 8)]
        elif kind == 3:
            result[position:position] = rng.randbytes(rng.randint(1, 8))
        elif kind == 4:
            result[position:position] = rng.choice((b"[", b"{", b'"', b"\\u", b"9", b"-")) * 300
        else:
            begin = rng.randrange(len(result) + 1)
            result[position:position] = result[begin : begin + 40]
    return bytes(result)


def header_input(rng: random.Random) -> bytes:
    """A small safetensors file with changes in its JSON, its bytes or its length."""
    header: dict[str, Any] = {}
    if rng.random() < 0.3:
        header["__metadata__"] = {"format": "pt"}
    position = 0
    for index in range(rng.randint(0, 4)):
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        dtype, size = rng.choice((("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8), ("F8_E4M3", 1)))
        end = position + math.prod(shape) * size
        header[f"t{index}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    buffer = rng.randbytes(position)
    choice = rng.randrange(10)
    if choice < 4:
        return safetensors_bytes(mutate_json(rng, header), buffer)
    if choice < 8:
        return mutate_bytes(rng, safetensors_bytes(header, buffer))
    data = safetensors_bytes(header, buffer)
    if choice == 8:
        length = rng.choice((0, 1, 2, 2**31, 2**63, 2**64 - 1, 10**8, rng.randrange(400)))
        return length.to_bytes(8, "little") + data[8:]
    return data


def test_safetensors_headers(tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / "model.safetensors"
    accepted = refused = 0
    with bounded_memory():
        for _ in range(NUM_HEADERS):
            data = header_input(rng)
            path.write_bytes(data)
            found = attempt(lambda: read_header(path), WeightError)
            if found is None:
                refused += 1
                continue
            accepted += 1
            # The format's own reader must take it, and see the same bytes in the same tensors.
            expected = {
                name: (entry["dtype"], entry["shape"], bytes(entry["data"]))
                for name, entry in safetensors.deserialize(data)  # type: ignore[no-untyped-call]
            }
            assert expected == {
                info.name: (
                    info.dtype,
                    list(info.shape),
                    data[info.offset : info.offset + info.nbytes],
                )
                for info in found.values()
            }
    assert accepted + refused == NUM_HEADERS
    assert accepted >= 150
    assert refused >= 1000


def test_safetensors_indices(tmp_path: Path) -> None:
    rng = random.Random(2)
    entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors_bytes({name: entry}, b"xy"))
    index = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    path = tmp_path / "model.safetensors.index.json"
    accepted = refused = 0
    with bounded_memory():
        for round_ in range(NUM_INDICES):
            if round_ % 2:
                path.write_text(json.dumps(mutate_json(rng, index)))
            else:
                path.write_bytes(mutate_bytes(rng, json.dumps(index).encode()))
            found = attempt(lambda: read_checkpoint(tmp_path), WeightError)
            if found is None:
                refused += 1
            else:
                accepted += 1
                assert set(found) <= {"a", "b"}
                assert {info.path.parent for info in found.values()} <= {tmp_path}
    assert accepted + refused == NUM_INDICES
    assert accepted >= 40
    assert refused >= 150


def check_config(config: ModelConfig) -> None:
    """Asserts what the code that allocates by a configuration relies on."""
    for field, limit in (
        (config.vocab_size, 2**20),
        (config.hidden_size, 2**20),
        (config.intermediate_size, 2**22),
        (config.num_hidden_layers, 4096),
        (config.num_attention_heads, 2**14),
        (config.max_position_embeddings, 2**24),
        (config.head_dim, 256),
    ):
        assert type(field) is int
        assert 1 <= field <= limit
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.head_dim % 8 == 0
    assert 0 < config.rms_norm_eps <= 1
    assert len(config.windows) in (0, config.num_hidden_layers)
    assert all(0 <= window < config.max_position_embeddings for window in config.windows)
    assert 0 < config.rope.attention_factor <= 1e3
    assert 0 <= config.rope.rotary_dim <= config.head_dim and config.rope.rotary_dim % 2 == 0
    assert 1 <= config.rope.theta < math.inf
    assert config.rope.high_freq_factor > config.rope.low_freq_factor > 0
    assert all(0 <= token_id < config.vocab_size for token_id in config.eos_token_ids)
    if isinstance(config, ExpertsConfig):
        assert 1 <= config.num_experts_per_tok <= config.num_experts <= 1024
        assert 1 <= config.moe_intermediate_size <= 2**22
        assert config.num_experts * config.moe_intermediate_size <= 2**24
        assert config.num_shared_experts * config.moe_intermediate_size <= 2**24
        assert 0 <= config.norm_min <= 1
        assert len(config.sparse_layers) == config.num_hidden_layers
    if config.num_hidden_layers <= 8:
        # What is accepted can be wired; programs hold no weights, only their shapes. Only there is
        # it known whether the parts of a matrix are excluded from quantisation together.
        if config.quantization is None:
            assert wire_model(config, "float32").weights
        else:
            attempt(lambda: wire_model(config, "float32"), ConfigError)


def test_configs(tmp_path: Path) -> None:
    rng = random.Random(3)
    accepted = refused = 0
    with bounded_memory():
        for _ in range(NUM_CONFIGS):
            base = copy.deepcopy(rng.choice(CONFIGS))
            generation: Any = copy.deepcopy(GENERATION)
            if rng.random() < 0.3:
                generation = mutate_json(rng, generation)
            else:
                base = mutate_json(rng, base)
            text = json.dumps(base).encode()
            if rng.random() < 0.3:
                text = mutate_bytes(rng, text)
            (tmp_path / "config.json").write_bytes(text)
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
            config = attempt(lambda: ModelConfig.from_dir(tmp_path), ConfigError)
            if config is None:
                refused += 1
            else:
                accepted += 1
                check_config(config)
    assert accepted + refused == NUM_CONFIGS
    assert accepted >= 200
    assert refused >= 1000


class Odd:
    """Claims to be a number and fails when it is asked for its value."""

    def __index__(self) -> int:
        raise ValueError("no")

    def __float__(self) -> float:
        raise OverflowError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


PARAM_VALUES: tuple[Any, ...] = (
    *HOSTILE,
    10**5000,
    b"a",
    Odd(),
    1j,
    object(),
    {1},
    np.float32(0.5),
    np.float32("nan"),
    np.float16(1),
    np.int64(4),
    np.uint64(2**64 - 1),
    np.bool_(True),
    np.zeros(3),
    np.array(3),
    [np.int32(3)],
    ["a", "bc"],
    ("end",),
    [""],
    ["a"] * 100,
    [5] * 2000,
    [[5], [7, 8]],
    [[]],
    {},
    {5: 1.0},
    {"5": 1},
    {5: float("nan")},
    [" "],
    ["\ud800"],
    -2,
    StructuredOutputsParams(choice=["a"]),
    range(4),
    0.9,
    40,
    100,
)
GOOD_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (1, 3, np.int32(2)),
    "temperature": (0, 0.7, 1e-9, np.float32(2)),
    "top_p": (1, 0.5, np.float64(1e-300)),
    "top_k": (-1, 0, 50),
    "min_p": (0, 1, 0.1),
    "seed": (None, 0, 2**64 - 1),
    "max_tokens": (None, 1, 2**31 - 1),
    "min_tokens": (0, 1),
    "stop": (None, "a", ["b", "c"]),
    "stop_token_ids": (None, [1], (2, 3)),
    "stop_sequences": (None, [[1]], ((2, 3), range(4, 6))),
    "presence_penalty": (0, -2, 1.5),
    "frequency_penalty": (0, 2, np.float32(-0.5)),
    "repetition_penalty": (1, 1e-40, 1.2, 1e40),
    "logit_bias": (None, {5: 1e9}, {1: -1, np.int64(2): 0.5}),
    "allowed_token_ids": (None, [4], range(2, 9)),
    "bad_words": (None, ["a"], ("b", "c d")),
    "logprobs": (None, 0, -1, 20),
    "prompt_logprobs": (None, -1, 3),
    "structured_outputs": (None, StructuredOutputsParams(regex="a+")),
    "ignore_eos": (True, False),
    "include_stop_str_in_output": (True, False),
    "skip_special_tokens": (True, False),
    "detokenize": (True,),
}


def check_params(params: SamplingParams) -> None:
    """Asserts what the sampler and the detokenizer rely on."""
    assert type(params.temperature) is type(params.top_p) is type(params.min_p) is float
    assert params.temperature == 0 or 1e-5 <= params.temperature <= 3.5e38
    assert 0 < params.top_p <= 1
    assert 0 <= params.min_p <= 1
    assert 0 <= params.top_k < 2**31
    assert params.seed is None or 0 <= params.seed < 2**64
    assert params.max_tokens is None or 1 <= params.max_tokens < 2**31
    assert 0 <= params.min_tokens <= (params.max_tokens or 2**31)
    assert all(type(text) is str and text for text in params.stop)
    assert -2 <= params.presence_penalty <= 2
    assert -2 <= params.frequency_penalty <= 2
    assert 1e-30 <= params.repetition_penalty <= 1e30
    for ids in (
        params.stop_token_ids,
        [token_id for token_id, _ in params.logit_bias],
        params.allowed_token_ids or (0,),
        *params.stop_sequences,
    ):
        assert all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in ids)
    assert all(params.stop_sequences)
    assert all(type(bias) is float and -100 <= bias <= 100 for _, bias in params.logit_bias)
    assert params.allowed_token_ids is None or params.allowed_token_ids
    assert all(type(word) is str and word.strip() for word in params.bad_words)
    for count in (params.logprobs, params.prompt_logprobs):
        assert count is None or -1 <= count < 2**31
    with pytest.raises(RequestError):
        params.validate_for(vocab_size=2**31, max_model_len=params.min_tokens)
    params.validate_for(vocab_size=2**31, max_model_len=params.min_tokens + 1)


def test_sampling_params() -> None:
    rng = random.Random(4)
    accepted = refused = 0
    with bounded_memory():
        for _ in range(NUM_PARAMS):
            names = rng.sample(sorted(GOOD_VALUES), rng.randint(1, 6))
            given_values = {name: rng.choice(GOOD_VALUES[name]) for name in names}
            if rng.random() < 0.7:
                for name in rng.sample(names, rng.randint(1, min(2, len(names)))):
                    given_values[name] = rng.choice(PARAM_VALUES)
            params = attempt(functools.partial(SamplingParams, **given_values), RequestError)
            if params is None:
                refused += 1
            else:
                accepted += 1
                check_params(params)
    assert accepted + refused == NUM_PARAMS
    assert accepted >= 500
    assert refused >= 800


def test_at_least_5000_inputs() -> None:
    assert NUM_HEADERS + NUM_INDICES + NUM_CONFIGS + NUM_PARAMS >= 5000


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["F32", "llama", "default"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
drawn = settings(
    max_examples=NUM_DRAWN,
    deadline=None,
    # The directory is written anew by each example.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@drawn
@given(value=json_values, raw=st.binary(max_size=64), entry=json_values)
def test_drawn_headers(tmp_path: Path, value: Any, raw: bytes, entry: Any) -> None:
    path = tmp_path / "model.safetensors"
    shaped = {"w": {"dtype": "F32", "shape": value, "data_offsets": entry}}
    for data in (
        raw,
        len(raw).to_bytes(8, "little") + raw,
        safetensors_bytes(value, b""),
        safetensors_bytes({"w": entry}, raw),
        safetensors_bytes(shaped, raw),
    ):
        path.write_bytes(data)
        attempt(lambda: read_header(path), WeightError)


@drawn
@given(
    name=st.sampled_from(sorted({key for config in CONFIGS for key in config})), value=json_values
)
def test_drawn_configs(tmp_path: Path, name: str, value: Any) -> None:
    for base in (config for config in CONFIGS if name in config):
        (tmp_path / "config.json").write_text(json.dumps({**base, name: value}))
        config = attempt(lambda: ModelConfig.from_dir(tmp_path), ConfigError)
        if config is not None:
            check_config(config)


@drawn
@given(name=st.sampled_from(sorted(GOOD_VALUES)), value=json_values)
def test_drawn_sampling_params(name: str, value: Any) -> None:
    params = attempt(lambda: SamplingParams(**{name: value}), RequestError)
    if params is not None:
        check_params(params)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"[" * (4 << 20), "config.json"),
        (b'{"a":' * 20_000, "config.json"),
        (b'{"a": "' + "😀".encode() * 500_000 + b'"}', "config.json"),
        (b"[" + b"[]," * 1_300_000, "config.json"),
        (b'{"a": -' + b"1" * 4_000_000 + b"}", "config.json"),
        ((12 << 20).to_bytes(8, "little") + b"{" + b" " * (12 << 20), "model.safetensors"),
        ((9 << 20).to_bytes(8, "little") + b'{"a":[' + b"[]," * (3 << 20), "model.safetensors"),
    ],
)
def test_large_inputs_take_memory_in_proportion(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with bounded_memory():
        if name == "config.json":
            assert attempt(lambda: ModelConfig.from_dir(tmp_path), ConfigError) is None
        else:
            assert attempt(lambda: read_checkpoint(tmp_path), WeightError) is None
