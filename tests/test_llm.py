# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""`LLM`: prompts of every kind, streams, stops, seeds, progress, and errors at the door."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_data import load_golden
from mrv1 import _core, progress
from mrv1.errors import (
    ClosedError,
    ConfigError,
    InvalidArgumentError,
    Mrv1Error,
    OutOfMemoryError,
    RequestError,
    WeightError,
)
from mrv1.llm import LLM, GenerationResult
from mrv1.loader import RunnerKwargs, RunnerOptions
from mrv1.sampling_params import SamplingParams
from serving_tools import LLAMA, MODELS, VOCAB, Tensors, copy_model, greedy, make_prompt, seeded

QWEN = MODELS / "qwen3-untied"

SIZES: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "num_kv_blocks": 128,
    "num_threads": 1,
}


def open_llm(device: str, model: Path = LLAMA, **options: Any) -> LLM:
    return LLM(model, device=device, **{**SIZES, **options})


@pytest.fixture(scope="module")
def shared(device: str) -> Iterator[LLM]:
    with open_llm(device) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """Whatever a test does, it leaves nothing behind."""
    yield shared
    gc.collect()
    assert not shared.engine.has_unfinished()
    shared.engine.check_idle()
    assert not shared.engine._pump.requests


# --- prompts and results -------------------------------------------------------------------------


def test_prompts_of_every_kind_give_the_same(llm: LLM) -> None:
    text = "The runner keeps one row"
    ids = llm.tokenizer.encode(text)
    assert len(ids) > 3
    (expected,) = llm.generate(text, greedy(8))
    assert expected.prompt_token_ids == ids and len(expected.token_ids) == 8
    for prompts in (
        ids,
        tuple(ids),
        np.array(ids),
        np.array(ids, np.int32),
        list(np.array(ids, np.uint16)),
        [text],
        (text,),
        [ids],
        [np.array(ids)],
        np.array([ids]),
        [tuple(ids)],
    ):
        results = llm.generate(prompts, greedy(8))  # type: ignore[arg-type]
        assert [(r.prompt_token_ids, r.token_ids, r.text) for r in results] == [
            (ids, expected.token_ids, expected.text)
        ]
        assert all(type(token) is int for token in results[0].prompt_token_ids)
    mixed = llm.generate([text, ids, np.array(ids), make_prompt(5, 1)], greedy(8))  # type: ignore[list-item]
    assert [r.token_ids for r in mixed[:3]] == [expected.token_ids] * 3
    assert mixed[3].token_ids != expected.token_ids
    assert llm.generate([]) == []


def test_results_have_all_fields(llm: LLM) -> None:
    results = llm.generate(["A block table", make_prompt(7, 2)], [greedy(9), greedy(1)])
    for result, count in zip(results, (9, 1), strict=True):
        assert isinstance(result, GenerationResult)
        assert result.finish_reason == "length"
        assert result.stop_reason is None and result.error is None
        assert len(result.token_ids) == count
        assert result.text == llm.tokenizer.decode(result.token_ids)
        assert result.prompt_tokens_per_s > 0 and result.peak_memory_mb > 10
        assert (result.generation_tokens_per_s > 0) == (count > 1)
    first, second = (result.request_id.removeprefix("llm-") for result in results)
    assert int(second) == int(first) + 1


@pytest.mark.parametrize("name", ["llama2", "qwen3-tied", "llama3-untied"])
def test_goldens_through_generate(device: str, name: str) -> None:
    """More prompts than rows, prefilled by chunks, among each other."""
    golden = load_golden(name)
    with open_llm(device, golden.model_dir, max_num_seqs=3, max_num_batched_tokens=24) as llm:
        results = llm.generate(golden.prompts, greedy(64))
        assert [r.token_ids for r in results] == golden.greedy
        llm.engine.check_idle()


def test_default_parameters_and_one_for_each(llm: LLM) -> None:
    (plain,) = llm.generate("Prefill reads")
    assert len(plain.token_ids) <= 16
    prompts = ["Prefill reads", "Every request"]
    both = llm.generate(prompts, [greedy(3), greedy(5)])
    assert [len(r.token_ids) for r in both] == [3, 5]
    with pytest.raises(RequestError, match="sampling_params: there are 1 for 2 prompts"):
        llm.generate(prompts, [greedy(3)])
    with pytest.raises(InvalidArgumentError, match="progress = 'yes'"):
        llm.generate(["Prefill reads"] * 8, greedy(3), progress="yes")  # type: ignore[arg-type]
    for bad in (5, {"temperature": 0}, "greedy"):
        with pytest.raises(RequestError, match="sampling_params|params"):
            llm.generate("Prefill reads", bad)  # type: ignore[arg-type]


def test_without_parameters_the_models_own_are_taken(device: str, tmp_path: Path) -> None:
    root = copy_model(tmp_path / "model")
    (root / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": 2}')
    prompts = [make_prompt(5, seed) for seed in range(4)]
    with open_llm(device, root) as llm:
        expected = [r.token_ids for r in llm.generate(prompts, SamplingParams(temperature=0))]
        assert [r.token_ids for r in llm.generate(prompts)] == expected
        streamed = [c.result.token_ids for c in llm.stream(prompts[0]) if c.result is not None]
        assert streamed == expected[:1]
        # Asked for, vLLM's defaults draw at temperature 1.
        assert [r.token_ids for r in llm.generate(prompts, SamplingParams())] != expected


def test_requests_of_the_engines_own_do_not_collide(llm: LLM) -> None:
    names = [str(number) for number in range(2000)]
    taken = int(llm.generate("abc", greedy(1))[0].request_id.removeprefix("llm-")) + 1
    llm.engine.add_request(names[taken], make_prompt(4, 1), greedy(30))
    (result,) = llm.generate("abc", greedy(2))
    assert result.request_id == f"llm-{taken}" and result.finish_reason == "length"
    while llm.engine.has_unfinished():
        llm.engine.step()


def test_max_tokens_none_runs_to_the_models_length(device: str) -> None:
    with open_llm(device, max_model_len=40) as llm:
        (result,) = llm.generate([make_prompt(6, 1)], greedy(None))
        assert len(result.token_ids) == 34 and result.finish_reason == "length"
        (longest,) = llm.generate([make_prompt(39, 1)], greedy(None))
        assert len(longest.token_ids) == 1
        (clipped,) = llm.generate([make_prompt(6, 1)], greedy(2**31 - 1, min_tokens=39))
        assert clipped.token_ids == result.token_ids


# --- streams -------------------------------------------------------------------------------------


def test_stream_equals_generate(llm: LLM) -> None:
    prompts: list[Any] = [
        "The graph is captured",
        make_prompt(30, 4),
        make_prompt(3, 5),
        "Numbers",
        "What",
    ]
    params = [greedy(12), seeded(3, 20), greedy(1), greedy(15, stop="e"), seeded(4, 7)]
    expected = llm.generate(prompts, params)
    texts = [""] * 5
    tokens: list[list[int]] = [[] for _ in range(5)]
    ended: dict[int, GenerationResult] = {}
    for chunk in llm.stream(prompts, params):
        assert chunk.index not in ended, "news after the end"
        texts[chunk.index] += chunk.text
        tokens[chunk.index] += chunk.token_ids
        if chunk.result is not None:
            ended[chunk.index] = chunk.result
    assert sorted(ended) == list(range(5))
    for index, result in enumerate(expected):
        final = ended[index]
        assert texts[index] == final.text == result.text
        assert tokens[index] == final.token_ids == result.token_ids
        assert (final.finish_reason, final.stop_reason) == (
            result.finish_reason,
            result.stop_reason,
        )


def test_streams_side_by_side_and_a_generate_between(llm: LLM) -> None:
    prompts = [make_prompt(4 + i, i) for i in range(3)]
    expected = [result.token_ids for result in llm.generate(prompts, greedy(10))]
    streams = [llm.stream(prompt, greedy(10)) for prompt in prompts]
    got: list[list[int]] = [[], [], []]
    for turn in range(4):
        for index, stream in enumerate(streams):
            got[index] += next(stream).token_ids
        if turn == 1:
            assert llm.generate([prompts[0]], greedy(10))[0].token_ids == expected[0]
    for index, stream in enumerate(streams):
        for chunk in stream:
            got[index] += chunk.token_ids
    assert got == expected


@pytest.mark.parametrize("read", [0, 1, 5])
def test_stream_that_is_left_aborts_its_requests(llm: LLM, read: int) -> None:
    free = llm.engine.stats()["free_blocks"]
    stream = llm.stream([make_prompt(5, i) for i in range(6)], greedy(200))
    for _ in range(read):
        next(stream)
    del stream
    gc.collect()
    assert not llm.engine.has_unfinished()
    llm.engine.check_idle()
    assert llm.engine.stats()["free_blocks"] == free


def test_stream_refuses_when_it_is_called(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"prompt\[0\] = 999"):
        llm.stream([[1, 2], [999]], greedy(4))


def test_threads_share_an_llm(llm: LLM) -> None:
    prompts = [make_prompt(3 + i, i) for i in range(6)]
    expected = [result.token_ids for result in llm.generate(prompts, greedy(20))]
    got: dict[int, list[int]] = {}

    def work(index: int) -> None:
        for _ in range(3):
            got[index] = llm.generate([prompts[index]], greedy(20))[0].token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[index] for index in range(6)] == expected


# --- stops ---------------------------------------------------------------------------------------


def test_stop_strings_across_token_boundaries(llm: LLM) -> None:
    prompt = make_prompt(9, 12)
    (whole,) = llm.generate([prompt], greedy(40))
    pieces = [llm.tokenizer.decode([token]) for token in whole.token_ids]
    assert len(whole.text) > 40
    crossed = 0
    for start in range(0, len(whole.text) - 4, 3):
        stop = whole.text[start : start + 4]
        at = whole.text.index(stop)
        crossed += not any(stop in piece for piece in pieces)
        for include in (False, True):
            params = greedy(40, stop=["never there", stop], include_stop_str_in_output=include)
            (result,) = llm.generate([prompt], params)
            assert result.text == whole.text[: at + (len(stop) if include else 0)]
            assert (result.finish_reason, result.stop_reason) == ("stop", stop)
            count = len(result.token_ids)
            assert result.token_ids == whole.token_ids[:count]
            assert stop in llm.tokenizer.decode(result.token_ids)
            if "\N{REPLACEMENT CHARACTER}" not in stop:  # those wait for the end of their run
                assert stop not in llm.tokenizer.decode(whole.token_ids[: count - 1])
            streamed = list(llm.stream([prompt], params))
            assert "".join(chunk.text for chunk in streamed) == result.text
    assert crossed > 5


def test_stop_token_ids(llm: LLM) -> None:
    prompt = make_prompt(6, 3)
    (whole,) = llm.generate([prompt], greedy(20))
    token = whole.token_ids[7]
    first = whole.token_ids.index(token)
    (result,) = llm.generate([prompt], greedy(20, stop_token_ids=[VOCAB - 1, token]))
    assert result.token_ids == whole.token_ids[: first + 1]
    assert (result.finish_reason, result.stop_reason) == ("stop", token)
    # The token that stopped the request is no text.
    assert result.text == llm.tokenizer.decode(whole.token_ids[:first])


def test_ignore_eos(device: str) -> None:
    golden = load_golden("qwen3-tied")
    index = next(i for i, step in enumerate(golden.first_eos_step) if step is not None)
    step = golden.first_eos_step[index]
    assert step is not None
    with open_llm(device, golden.model_dir) as llm:
        stopped, ignored = llm.generate(
            [golden.prompts[index]] * 2,
            [SamplingParams(temperature=0, max_tokens=64), greedy(64)],
        )
        assert stopped.token_ids == golden.greedy[index][: step + 1]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
        assert stopped.text == llm.tokenizer.decode(stopped.token_ids[:-1])
        assert ignored.token_ids == golden.greedy[index]


def test_min_tokens_masks_every_stop(llm: LLM) -> None:
    prompt = make_prompt(6, 3)
    (whole,) = llm.generate([prompt], greedy(20))
    stops = sorted(set(whole.token_ids))
    for least in (0, 1, 5, 12):
        (result,) = llm.generate([prompt], greedy(20, stop_token_ids=stops, min_tokens=least))
        assert len(result.token_ids) > least or result.finish_reason == "length"
        assert not set(result.token_ids[:least]) & set(stops)
    text = whole.text[2:4]
    (early,) = llm.generate([prompt], greedy(20, stop=text))
    (late,) = llm.generate([prompt], greedy(20, stop=text, min_tokens=18))
    assert early.finish_reason == "stop" and len(early.token_ids) < 18 < len(late.token_ids)


def test_detokenize_off(llm: LLM) -> None:
    prompt = make_prompt(6, 3)
    (result,) = llm.generate([prompt], greedy(8, detokenize=False))
    assert result.text == "" and len(result.token_ids) == 8


# --- seeds ---------------------------------------------------------------------------------------


def test_seeds_repeat_and_do_not_depend_on_the_batch(device: str, llm: LLM) -> None:
    prompt = make_prompt(8, 8)
    alone = [
        llm.generate([prompt], seeded(seed, 12, temperature=1.5))[0].token_ids for seed in range(6)
    ]
    assert len({tuple(tokens) for tokens in alone}) == 6
    together = llm.generate(
        [prompt] * 6 + [make_prompt(20, i) for i in range(4)],
        [seeded(seed, 12, temperature=1.5) for seed in range(6)] + [seeded(1, 30)] * 4,
    )
    assert [result.token_ids for result in together[:6]] == alone
    with open_llm(device, max_num_seqs=7, max_num_batched_tokens=9, block_size=4) as other:
        again = other.generate([prompt] * 6, [seeded(s, 12, temperature=1.5) for s in range(6)])
        assert [result.token_ids for result in again] == alone


def test_without_a_seed_draws_differ(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True)
    drawn = llm.generate([make_prompt(8, 8)] * 6, params)
    assert len({tuple(result.token_ids) for result in drawn}) == 6


# --- progress ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_bar_unless_on_a_terminal_or_asked(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [make_prompt(4, i) for i in range(9)]
    with open_llm(device) as llm:
        llm.generate(prompts, greedy(4))
        written = capsys.readouterr()
        assert (written.out, written.err) == ("", "")
        llm.generate(prompts[:1], greedy(4), progress=True)
        written = capsys.readouterr()
        assert written.out == "" and "Generating" in written.err
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        llm.generate(prompts[:1], greedy(4))
        assert terminal.getvalue() == "", "a short batch needs no bar"
        llm.generate(prompts, greedy(4))
        assert "Generating" in terminal.getvalue()
        monkeypatch.setenv("MRV1_NO_PROGRESS", "1")
        quiet = Terminal()
        monkeypatch.setattr(sys, "stderr", quiet)
        llm.generate(prompts, greedy(4))
        assert quiet.getvalue() == ""
        assert not progress.is_shown(None)


def test_bar_while_loading(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with open_llm(device, progress=True):
        assert "Loading weights" in capsys.readouterr().err


@pytest.mark.parametrize("show", [None, False])
def test_bad_variables_are_refused_before_loading(
    device: str, show: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MRV1_NO_PROGRESS", "MRV1_LOG_LEVEL"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "maybe")
            with pytest.raises(InvalidArgumentError, match=f"{name} = 'maybe'"):
                open_llm(device, tmp_path / "nothing", progress=show)


def test_log_level_is_set_only_where_the_variable_is(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("mrv1")
    before = log.level
    try:
        log.setLevel(logging.ERROR)
        open_llm(device).close()
        assert log.level == logging.ERROR and caplog.messages == []
        monkeypatch.setenv("MRV1_LOG_LEVEL", "INFO")
        open_llm(device).close()
        assert log.level == logging.INFO
        assert any("KV cache" in message for message in caplog.messages)
    finally:
        log.setLevel(before)


# --- errors at the door: requests ----------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, message",
    [
        ("", "prompt.*at least one token"),
        ([[]], "prompt.*at least one token"),
        ([make_prompt(5, 1), []], "prompt.*at least one token"),
        ([[1, VOCAB]], rf"prompt\[1\] = {VOCAB}.*in \[0, {VOCAB}\)"),
        ([1, -1], r"prompt\[1\] = -1"),
        ([1, 10**30], r"prompt\[1\]"),
        ([[1, 2.5]], r"prompt\[1\] = 2.5.*token id"),
        ([1.5, 2.5], "prompt"),
        ([[1, None]], r"prompt\[1\] = None"),
        ([[1, "2"]], r"prompt\[1\] = '2'"),
        (np.array([1.0, 2.0]), "prompt"),
        ([True, False], r"prompt\[0\] = True"),
        ([make_prompt(512, 1)], "512 tokens.*at most 511.*max_model_len = 512"),
        (["good", 7], "prompt = 7.*a string or a sequence"),
        (b"bytes", "prompts"),
        ([b"bytes"], "prompt"),
        (None, "prompts"),
        (7, "prompts"),
        ({"a": 1}, "prompts"),
        ("lone \ud800", "prompt"),
    ],
    ids=lambda value: str(value)[:24].encode("ascii", "replace").decode(),
)
def test_bad_prompts_start_nothing(llm: LLM, prompts: Any, message: str) -> None:
    other = llm.stream(make_prompt(9, 9), greedy(20))
    tokens = list(next(other).token_ids)
    if isinstance(prompts, str) and not prompts:
        # This family's tokenizer begins every text with <s>, so that no text is empty.
        assert len(llm.generate("", greedy(1))[0].prompt_token_ids) == 1
    else:
        with pytest.raises(RequestError, match=message):
            llm.generate(prompts, greedy(4))
        # Nothing is left but the other one, which goes on by itself.
        assert len(llm.engine._pump.requests) <= 1
    for chunk in other:
        tokens += chunk.token_ids
    assert tokens == llm.generate([make_prompt(9, 9)], greedy(20))[0].token_ids


def test_empty_text_where_the_tokenizer_adds_nothing(device: str) -> None:
    with (
        open_llm(device, QWEN) as llm,
        pytest.raises(RequestError, match="prompt = '': must be at least one token"),
    ):
        llm.generate("")


@pytest.mark.parametrize(
    "field, value",
    [
        *[("temperature", value) for value in (-0.1, float("nan"), float("inf"), "1", None, True)],
        *[("top_p", value) for value in (0, 0.0, 1.1, -1, float("nan"), "0.5", None)],
        *[("top_k", value) for value in (-2, 1.5, "1", None, 2**31, True)],
        *[("min_p", value) for value in (-0.1, 1.1, float("nan"), "0")],
        *[("seed", value) for value in (-1, 2**64, 1.5, "1")],
        *[("max_tokens", value) for value in (0, -1, 1.5, "1", 2**31)],
        *[("min_tokens", value) for value in (-1, 17, 1.5, "1", None)],
        *[("stop", value) for value in (5, [5], "", ["a", ""])],
        *[("stop_token_ids", value) for value in (5, [-1], ["1"], [1.5])],
        *[("stop_sequences", value) for value in (5, [5], [[]], [[-1]], [[1.5]])],
        *[
            (name, value)
            for name in ("presence_penalty", "frequency_penalty")
            for value in (-2.1, 2.1, "1", None)
        ],
        *[("repetition_penalty", value) for value in (0, -1, float("nan"), "1", None)],
        *[("logit_bias", value) for value in (5, [5], {-1: 1}, {5: float("nan")}, {"5": 1})],
        *[("allowed_token_ids", value) for value in (5, [], [-1], [1.5])],
        *[("bad_words", value) for value in (5, "a", [""], [" "], [5])],
        *[
            (name, value)
            for name in ("logprobs", "prompt_logprobs")
            for value in (-2, 1.5, "1", True)
        ],
        *[("structured_outputs", value) for value in (5, {"regex": "a"}, "a")],
        *[
            (name, value)
            for name in (
                "ignore_eos",
                "include_stop_str_in_output",
                "skip_special_tokens",
                "detokenize",
            )
            for value in (1, None, "yes")
        ],
    ],
)
def test_bad_sampling_parameters_name_the_field(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field is not None and caught.value.field.startswith(field)
    assert caught.value.allowed


def test_parameters_that_the_model_cannot_take(llm: LLM) -> None:
    for params, message in (
        (greedy(4, stop_token_ids=[VOCAB]), rf"stop_token_ids\[0\] = {VOCAB}.*below the vocab"),
        (greedy(None, min_tokens=512), "min_tokens = 512.*below the model length 512"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            llm.generate([make_prompt(3, 1), make_prompt(4, 1)], [greedy(2), params])
        assert caught.value.request_id is not None


def test_request_that_the_cache_can_never_hold(device: str) -> None:
    with open_llm(device, num_kv_blocks=5, block_size=4, max_model_len=64) as llm:
        with pytest.raises(RequestError, match="need 5 KV blocks of 4 tokens; the cache has 4"):
            llm.generate([make_prompt(9, 1)], greedy(12))
        assert len(llm.generate([make_prompt(9, 1)], greedy(8))[0].token_ids) == 8


# --- errors at the door: model directories -------------------------------------------------------


def edit_config(**fields: Any) -> Callable[[Path], object]:
    def edit(root: Path) -> None:
        path = root / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def truncate(name: str, keep: float) -> Callable[[Path], object]:
    def cut(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: int(len(content) * keep)])

    return cut


def remove(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).unlink()


NORM = "model.layers.1.input_layernorm.weight"


def drop_tensor(tensors: Tensors) -> None:
    del tensors[NORM]


def add_tensor(tensors: Tensors) -> None:
    tensors["model.layers.2.input_layernorm.weight"] = tensors[NORM].copy()


def cut_tensor(tensors: Tensors) -> None:
    tensors[NORM] = tensors[NORM][:-1].copy()


def turn_tensor(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.copy()


def make_integers(tensors: Tensors) -> None:
    tensors[NORM] = tensors[NORM].astype(np.int32)


DAMAGE: list[tuple[str, Any, type[Mrv1Error], str]] = [
    ("no config", remove("config.json"), ConfigError, "config.json"),
    ("cut config", truncate("config.json", 0.5), ConfigError, "config.json"),
    ("no tokenizer", remove("tokenizer.json"), ConfigError, "tokenizer.json"),
    ("cut tokenizer", truncate("tokenizer.json", 0.5), ConfigError, "tokenizer.json.*not a valid"),
    ("cut generation", truncate("generation_config.json", 0.5), ConfigError, "generation_config"),
    ("no weights", remove("model.safetensors"), WeightError, "safetensors"),
    ("cut weights", truncate("model.safetensors", 0.9), WeightError, "model.safetensors"),
    ("cut header", truncate("model.safetensors", 0.001), WeightError, "model.safetensors"),
    ("empty weights", truncate("model.safetensors", 0), WeightError, "model.safetensors"),
    ("family", edit_config(model_type="gpt2"), ConfigError, "model_type = 'gpt2'.*llama.*qwen3"),
    ("more layers", edit_config(num_hidden_layers=3), WeightError, "layers.2.*missing"),
    ("fewer layers", edit_config(num_hidden_layers=1), WeightError, "layers.1.*disagree"),
    ("wider", edit_config(intermediate_size=224), WeightError, r"\[208, 128\].*\[224, 128\]"),
    ("more ids", edit_config(vocab_size=400), WeightError, r"shape = \[328, 128\].*\[400, 128\]"),
    ("no tensor", drop_tensor, WeightError, f"'{NORM}'.*missing"),
    ("one tensor more", add_tensor, WeightError, "layers.2.input_layernorm.*nothing in the model"),
    ("short tensor", cut_tensor, WeightError, rf"'{NORM}'.*shape = \[127\].*\[128\]"),
    ("turned tensor", turn_tensor, WeightError, r"'model.layers.0.mlp.up_proj.weight'.*\[128, 208"),
    ("integers", make_integers, WeightError, f"'{NORM}'.*dtype = 'I32'.*F32, BF16, F16"),
]


@pytest.mark.parametrize(
    "damage, kind, message", [pytest.param(*row[1:], id=row[0]) for row in DAMAGE]
)
def test_damaged_model_directories(
    device: str,
    tmp_path: Path,
    llm: LLM,
    damage: Any,
    kind: type[Mrv1Error],
    message: str,
) -> None:
    of_tensors = damage in (drop_tensor, add_tensor, cut_tensor, turn_tensor, make_integers)
    root = copy_model(tmp_path / "model", change=damage if of_tensors else None)
    if not of_tensors:
        damage(root)
    with pytest.raises(kind, match=message):
        open_llm(device, root)
    # A model that runs next to it is unhurt.
    assert len(llm.generate([make_prompt(3, 1)], greedy(4))[0].token_ids) == 4


def test_tokenizer_and_model_disagree(device: str, tmp_path: Path) -> None:
    root = copy_model(tmp_path / "model")
    content = (MODELS / "llama3-tied" / "tokenizer.json").read_bytes()
    (root / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match="tokenizer and model disagree.*vocab_size = 328"):
        open_llm(device, root)


@pytest.mark.parametrize("model", ["", None, 3, b"model"])
def test_what_is_no_path(device: str, model: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="model = .*path of a model directory"):
        LLM(model, device=device)


def test_sizes_that_leave_no_memory_for_the_cache(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core.Device, "memory", lambda _: (2_000_000, 10**9))
    message = (
        "weights .* activations .* state .* need more than the 2 MB that are free.*"
        "max_num_batched_tokens = 4096.*max_num_seqs = 4000"
    )
    with pytest.raises(OutOfMemoryError, match=message):
        open_llm(device, max_num_seqs=4000, max_num_batched_tokens=4096, num_kv_blocks=None)


def test_no_such_directory(device: str, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", LLAMA / "config.json", tmp_path):
        with pytest.raises(ConfigError, match=r"config\.json|is not a directory"):
            open_llm(device, path)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"device": "tpu"}, InvalidArgumentError, "device = 'tpu'.*auto, cpu or cuda"),
        ({"dtype": "float64"}, InvalidArgumentError, "dtype = 'float64'"),
        ({"max_num_seqs": 0}, InvalidArgumentError, "max_num_seqs = 0"),
        ({"max_num_seqs": 2.0}, InvalidArgumentError, "max_num_seqs = 2.0"),
        ({"max_num_seqs": 70_000}, InvalidArgumentError, "max_num_seqs|max_num_batched_tokens"),
        ({"max_num_batched_tokens": 3}, InvalidArgumentError, "max_num_batched_tokens"),
        ({"max_model_len": 513}, InvalidArgumentError, "max_model_len = 513.*at most.*512"),
        ({"max_model_len": -1}, InvalidArgumentError, "max_model_len = -1"),
        ({"max_model_len": 1}, InvalidArgumentError, "max_model_len = 1: must be at least 2"),
        ({"progress": "yes"}, InvalidArgumentError, "progress = 'yes'.*True or False"),
        ({"progress": 1}, InvalidArgumentError, "progress = 1"),
        ({"block_size": 0}, InvalidArgumentError, "block_size = 0"),
        ({"num_kv_blocks": 1}, InvalidArgumentError, "num_kv_blocks = 1.*at least 2"),
        ({"num_kv_blocks": True}, InvalidArgumentError, "num_kv_blocks = True"),
        ({"kv_cache_memory": -1, "num_kv_blocks": None}, InvalidArgumentError, "kv_cache_memory"),
        ({"pad_tokens": 65}, InvalidArgumentError, r"pad_tokens = 65.*\[0, 64\]"),
        ({"pad_requests": -1}, InvalidArgumentError, "pad_requests = -1"),
        ({"pad_requests": 1.5}, InvalidArgumentError, "pad_requests = 1.5"),
        ({"num_threads": -1}, InvalidArgumentError, "num_threads = -1"),
        ({"num_threads": 10**6}, InvalidArgumentError, "num_threads = 1000000"),
        ({"num_threads": "2"}, InvalidArgumentError, "num_threads = '2'"),
        ({"fusion": "yes"}, InvalidArgumentError, "fusion = 'yes'.*True or False"),
        # 32 KiB a block of 16 tokens in float32: room for one, and the null block needs another.
        (
            {"kv_cache_memory": 60_000, "num_kv_blocks": None},
            OutOfMemoryError,
            r"KV cache may take 0\.1 MB.*weights.*activations.*state",
        ),
        ({"kv_cache_memory": 0, "num_kv_blocks": None}, OutOfMemoryError, "one block of 16"),
        ({"num_kv_blocks": 100_000_000}, OutOfMemoryError, "needs .* MB but .*KV cache"),
    ],
)
def test_options_that_cannot_be(
    device: str, options: dict[str, Any], kind: type[Mrv1Error], message: str
) -> None:
    with pytest.raises(kind, match=message):
        LLM(LLAMA, **{"device": device, **SIZES, **options})


def test_options_and_keywords_have_the_same_fields() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(RunnerOptions)}
    keywords = {name: hint.__forward_arg__ for name, hint in RunnerKwargs.__annotations__.items()}
    assert keywords == fields


# --- a failing step ------------------------------------------------------------------------------


def test_failed_step_is_the_result_of_its_requests(device: str) -> None:
    with open_llm(device, background=False) as llm:
        stream = llm.stream([make_prompt(5, 1)], greedy(8))
        next(stream)
        llm.model.runner.fail_next_step("sparks")
        last = list(stream)[-1].result
        assert last is not None and last.finish_reason == "error"
        assert "sparks" in (last.error or "")
        assert llm.generate([make_prompt(5, 1)], greedy(8))[0].finish_reason == "length"
        llm.engine.check_idle()


def test_close_ends_everything(device: str) -> None:
    llm = open_llm(device)
    stream = llm.stream([make_prompt(5, 1)], greedy(50))
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(ClosedError, match="closed"):
        llm.generate("text")
    with pytest.raises(ClosedError, match="closed"):
        next(stream)


def test_stream_of_a_closed_llm_dies_quietly(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = open_llm(device)
    stream = llm.stream([make_prompt(5, 1)], greedy(50))
    next(stream)
    llm.close()
    del stream
    gc.collect()
    assert capsys.readouterr().err == ""


# --- Ctrl-C --------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys, threading, time
from mrv1.llm import LLM
from mrv1.sampling_params import SamplingParams

def tasks():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    # On a GPU only our own, since the driver keeps its threads until the end.
    return len([name for name in names if sys.argv[2] == "cpu" or name.startswith("mrv1")])

before = tasks()
llm = LLM(sys.argv[1], device=sys.argv[2], dtype="float32", num_threads=2, max_num_seqs=4,
          num_kv_blocks=256)
params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
expected = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8))[0].token_ids
for wait in (*(0.0005 * i for i in range(24)), 0.02, 0.1, 0.3):
    sent = []
    def interrupt():
        time.sleep(wait)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)
    sender = threading.Thread(target=interrupt)
    try:
        sender.start()
        llm.generate([[5, 6, 7 + i] for i in range(300)], params, progress=True)
        print("not interrupted")
    except KeyboardInterrupt:
        print("interrupted", time.perf_counter() - sent[0] < 2.0, flush=True)
    sender.join()
    # Nothing is left over, and the model goes on.
    assert not llm.engine.has_unfinished()
    llm.engine.check_idle()
    again = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8))[0].token_ids
    assert again == expected
llm.close()
del llm
time.sleep(0.05)  # a thread that was joined is gone for the system a moment later
print("threads", tasks() - before)
sys.stdout.flush()
llm = LLM(sys.argv[1], device=sys.argv[2], dtype="float32", num_threads=2, num_kv_blocks=256)
print("ready", flush=True)
while True:
    llm.generate([[5, 6, 7]] * 8, params)
"""


def test_interrupt_ends_generate(device: str) -> None:
    """Interrupts that are caught, at different times, and one that ends the process."""
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(LLAMA), device],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        assert child.stdout is not None
        lines = []
        for line in child.stdout:
            lines.append(line.strip())
            if line.startswith("ready"):
                break
        child.send_signal(2)
        try:
            _, errors = child.communicate(timeout=20)
        finally:
            child.kill()
    assert lines == ["interrupted True"] * 27 + ["threads 0", "ready"], (lines, errors)
    assert child.returncode in (-2, 130), errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    # What bars wrote is text and carriage returns: no escape sequence touched the terminal.
    assert "\x1b" not in errors
