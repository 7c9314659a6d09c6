# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The command `mrv1`, mostly as its users meet it: as a process."""

from __future__ import annotations

import ast
import inspect
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from mrv1 import LLM, SamplingParams, __version__, _core, cli, envs, ops
from mrv1.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "mrv1"]


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def model(models_dir: Path) -> str:
    return str(models_dir / "qwen3-tied")


def expected(model: str, prompts: list[str], params: SamplingParams) -> list[str]:
    with LLM(model, device="cpu") as llm:
        return [result.text for result in llm.generate(prompts, params)]


def test_generate_streams_what_llm_generates(model: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20)
    prompts = ["hello there", "abc", "One day"]
    first, *others = expected(model, prompts, params)
    options = ("--model", model, "--device", "cpu", "--temperature", "0", "--max-tokens", "20")
    one = run("generate", *options, prompts[0])
    assert (one.returncode, one.stdout) == (0, first + "\n")
    assert "tokens/s" in one.stderr
    assert "peak memory" in one.stderr
    # Several prompts run together; their texts come in order.
    many = run("generate", *options, *prompts)
    assert many.stdout == "\n\n".join([first, *others]) + "\n"
    piped = run("generate", *options, "-", stdin=prompts[0] + "\n")
    assert piped.stdout == first + "\n"


def test_sampling_options_reach_the_sampler(model: str) -> None:
    params = SamplingParams(
        temperature=1.5, top_p=0.9, top_k=40, min_p=0.01, seed=7, max_tokens=24, stop=["e"]
    )
    (text,) = expected(model, ["hello"], params)
    options = "--temperature 1.5 --top-p 0.9 --top-k 40 --min-p 0.01 --seed 7 --max-tokens 24"
    given = run("generate", "--model", model, *options.split(), "--stop", "e", "hello")
    assert given.stdout == text + "\n"


def test_options_that_edit_logits_reach_the_sampler(model: str) -> None:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=24,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        repetition_penalty=1.3,
        logit_bias={40: 2.5, 41: -3},
        allowed_token_ids=range(30, 200),
        bad_words=["th", "e"],
        stop_token_ids=[39],
        stop_sequences=[[38, 37], [300]],
    )
    (text,) = expected(model, ["hello"], params)
    options = "--temperature 0 --max-tokens 24 --presence-penalty 0.5 --frequency-penalty -0.25"
    options += " --repetition-penalty 1.3 --logit-bias 40:2.5 --logit-bias 41:-3 --bad-words th"
    options += " --bad-words e --stop-token-ids 39 --stop-sequences 38,37 --stop-sequences 300"
    options += " --allowed-token-ids "
    options += ",".join(map(str, range(30, 200)))
    given = run("generate", "--model", model, *options.split(), "hello")
    assert given.stdout == text + "\n"
    (plain,) = expected(model, ["hello"], SamplingParams(temperature=0.0, max_tokens=24))
    assert plain != text


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--regex", "[ab]{3}c"], "[ab]{3}c"),
        (["--choice", "yes", "--choice", "no"], "yes|no"),
        (["--json-schema", '{"enum": ["red", "green"]}'], '"(red|green)"'),
        (["--grammar", 'start: "x" start | "y"'], "x*y?"),
        (["--json-object"], r"\{.*"),
    ],
)
def test_the_form_of_the_text_reaches_the_sampler(options: list[str], pattern: str) -> None:
    """By the demo model, whose tokenizer has all the bytes."""
    given = run("generate", "--seed", "3", "--max-tokens", "20", *options, "The answer is ")
    assert given.returncode == 0, given.stderr
    assert re.fullmatch(pattern, given.stdout.removesuffix("\n"), re.DOTALL), given.stdout


def test_only_one_form_can_be_asked_for() -> None:
    refused = run("generate", "--regex", "a", "--json-object", "hello")
    assert refused.returncode == 1
    assert "regex and json_object given: must be exactly one of" in refused.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--logit-bias", "5"), ("--logit-bias", "a:1"), ("--allowed-token-ids", "1,,2")],
)
def test_options_of_token_ids_are_checked(option: str, value: str) -> None:
    refused = run("generate", option, value, "hello")
    assert refused.returncode == 2
    assert f"argument {option}: invalid" in refused.stderr


def test_log_probabilities_are_printed(model: str) -> None:
    with LLM(model, device="cpu") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=1)
        (result,) = llm.generate(["hello"], params)
    options = "--temperature 0 --max-tokens 3 --logprobs 2 --prompt-logprobs 1 --device cpu"
    lines = run("generate", "--model", model, *options.split(), "hello").stderr.splitlines()
    assert result.logprobs is not None and result.prompt_logprobs is not None
    expected_lines = [
        f"{name} 1: "
        + "; ".join(f"{p.decoded_token!r} {p.logprob:.4f} (rank {p.rank})" for p in place.values())
        for name, places in (("prompt", result.prompt_logprobs), ("output", result.logprobs))
        for place in places
        if place is not None
    ]
    assert len(expected_lines) == len(result.prompt_token_ids) - 1 + 3
    assert [line for line in lines if "(rank" in line] == expected_lines


def test_the_cache_dtype_reaches_the_model(model: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24)
    with LLM(model, device="cpu", kv_cache_dtype="fp8_e5m2") as llm:
        assert llm.model.kv_cache_dtype == "fp8_e5m2" and llm.model.kv_scales == "dynamic"
        text = llm.generate(["hello there"], params)[0].text
    options = "--temperature 0 --max-tokens 24 --device cpu --kv-cache-dtype fp8_e5m2"
    given = run("generate", "--model", model, *options.split(), "hello there")
    assert given.stdout == text + "\n"
    assert (text,) != tuple(expected(model, ["hello there"], params))


def test_temperature_comes_from_the_model_unless_given(model: str, tmp_path: Path) -> None:
    for source in Path(model).iterdir():
        (tmp_path / source.name).symlink_to(source)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.0, "top_k": 1}')
    (greedy,) = expected(model, ["hello"], SamplingParams(temperature=0.0, ignore_eos=True))
    given = run("generate", "--model", str(tmp_path), "--max-tokens", "16", "hello")
    assert given.stdout == greedy + "\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "--model", "no/such/dir", "hello"], "no/such/dir"),
        (["generate", "--model", "", "hello"], "model = ''"),
        (["bench", "decode", "--model", ""], "model = ''"),
        (["bench", "op", "--model", ""], "model = ''"),
        (["bench", "op", "--shape", "qwen3-0.6b", "--layers", "1"], "--layers"),
        (["bench", "op", "--shape", "qwen3-0.6b", "--save", "no/such/dir"], "--save"),
        (["bench", "op", "--shape", "qwen3-0.6b", "--context", "40961"], "--context"),
        (["bench", "decode", "--shape", "qwen3-0.6b", "--json", "no/such/dir/out"], "json"),
        (["generate", "--model", "MODEL", "--top-p", "2", "hello"], "top_p"),
        (["generate", "--model", "MODEL", ""], "prompt"),
        (["generate", "--model", "MODEL", "--dtype", "int8", "hello"], "dtype"),
        (["generate", "--model", "MODEL", "--device", "tpu", "hello"], "device"),
        (["generate", "--model", "MODEL", "--kv-cache-dtype", "fp8", "hello"], "kv_cache_dtype"),
        (
            ["bench", "decode", "--model", "MODEL", "--kv-cache-dtype", "int8", "--context", "9"],
            "kv_cache_dtype",
        ),
        (["bench", "decode", "--model", "MODEL", "--context", "1000000"], "max_model_len"),
        (["bench", "decode", "--model", "MODEL", "--layers", "1"], "--layers"),
        (["bench", "decode", "--shape", "qwen3-0.6b", "--layers", "29"], "layers"),
        (["bench", "prefill", "--model", "MODEL", "--context", "1000000"], "max_model_len"),
        (["bench", "prefill", "--model", "MODEL", "--requests", "2"], "--requests"),
        (["bench", "mix", "--shape", "qwen3-0.6b", "--steps", "1"], "--steps"),
        (["bench", "mix", "--shape", "qwen3-0.6b", "--requests", "4097"], "[1, 4096]"),
        (["bench", "mix", "--shape", "demo", "--requests", "1"], "max_model_len"),
    ],
)
def test_errors_are_one_line(arguments: list[str], named: str, model: str) -> None:
    failed = run(*(model if part == "MODEL" else part for part in arguments))
    assert failed.returncode == cli.EXIT_ERROR
    assert failed.stdout == ""
    assert failed.stderr.startswith("mrv1: error: ")
    assert failed.stderr.count("\n") == 1
    assert named in failed.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate"],
        ["bench", "decode"],
        ["bench", "nothing", "--shape", "qwen3-0.6b"],
        ["bench", "decode", "--shape", "no-such-shape"],
        ["bench", "decode", "--shape", "qwen3-0.6b", "--batch", "0"],
        ["bench", "decode", "--shape", "qwen3-0.6b", "--steps", "1,2"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: mrv1" in capsys.readouterr().err


def test_version() -> None:
    assert run("--version").stdout == f"mrv1 {__version__}\n"


def test_env_names_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRV1_NUM_THREADS", "3")
    report = run("env")
    assert report.returncode == 0
    lines = dict(line.split(maxsplit=1) for line in report.stdout.splitlines())
    assert lines["mrv1"] == __version__
    assert lines["MRV1_NUM_THREADS"] == "3"
    assert lines.keys() >= {"python", "numpy", "tokenizers", "system", "memory", *envs.REGISTRY}
    # Why it is not there, as the build printed it.
    assert _core.cuda_built() or lines["cuda"].removeprefix("built without CUDA: ").strip()
    assert _core.cuda_built() or lines["cuda"].startswith("built without CUDA: ")


def test_load_is_logged_where_the_variable_asks(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MRV1_LOG_LEVEL", raising=False)
    arguments = ("generate", "--model", model, "--device", "cpu", "--max-tokens", "2", "hello")
    assert "KV cache" not in run(*arguments).stderr
    monkeypatch.setenv("MRV1_LOG_LEVEL", "INFO")
    shown = run(*arguments)
    assert shown.returncode == 0
    (line,) = (line for line in shown.stderr.splitlines() if "KV cache" in line)
    assert line.startswith(f"mrv1: {model} on ")


def test_failed_request_is_a_failed_command(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = LLM.stream

    def failing(llm: LLM, *arguments: Any) -> Any:
        llm.model.runner.fail_next_step("sparks")
        return original(llm, *arguments)

    monkeypatch.setattr(LLM, "stream", failing)
    arguments = ["generate", "--model", model, "--device", "cpu", "hello", "there"]
    assert cli.main(arguments) == cli.EXIT_ERROR
    written = capsys.readouterr().err
    # The other one is in that step too, or in none that fails.
    assert "prompt 1 failed: " in written and "sparks" in written


@pytest.mark.parametrize("command", ["generate", "env"])
def test_full_disk_is_one_line(command: str, model: str) -> None:
    arguments = ["--model", model, "hello"] if command == "generate" else []
    with Path("/dev/full").open("w") as full:
        failed = subprocess.run(
            [*COMMAND, command, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert failed.returncode == cli.EXIT_ERROR
    assert failed.stderr.startswith("mrv1: error: ")
    assert "No space left" in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_stdin_that_is_no_text_is_named(model: str) -> None:
    failed = subprocess.run(
        [*COMMAND, "generate", "--model", model, "-"],
        input=b"ab\xff",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert failed.returncode == cli.EXIT_ERROR
    assert failed.stderr.startswith(b"mrv1: error: stdin")
    assert failed.stderr.count(b"\n") == 1


def test_a_terminal_gets_no_control_characters() -> None:
    shown = cli.for_terminal("a\x1b[31m\tb\n\x07\x9bé\x7f\r")
    assert shown == "a\ufffd[31m\tb\n\ufffd\ufffdé\ufffd\ufffd"


def test_ctrl_c_leaves_terminal_and_processes_as_they_were(model: str) -> None:
    parent, child = pty.openpty()
    before = termios.tcgetattr(child)
    # Long enough to be interrupted: many texts at once, up to the model's length.
    prompts = ["hello"] * 64
    process = subprocess.Popen(
        [*COMMAND, "generate", "--model", model, "--max-tokens", "500", *prompts],
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
        env={**os.environ, "MRV1_NUM_THREADS": "2"},
    )
    try:
        shown = os.read(parent, 1 << 16)
        while not shown:
            shown += os.read(parent, 1 << 16)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == cli.EXIT_INTERRUPTED
        # All of it has been written by now, and stands in the terminal's buffer.
        while select.select([parent], [], [], 0.1)[0]:
            shown += os.read(parent, 1 << 16)
        assert shown.endswith(b"\r\nmrv1: interrupted\r\n")
        assert b"Traceback" not in shown
        assert b"\x1b[?" not in shown  # no terminal mode was switched
        assert termios.tcgetattr(child) == before
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        process.kill()
        process.wait()
        os.close(parent)
        os.close(child)


def test_ctrl_c_leaves_no_thread(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> set[str]:
        return {
            name
            for task in Path("/proc/self/task").iterdir()
            if (name := (task / "comm").read_text().strip()).startswith("mrv1")
        }

    writes = 0

    def write(_: str) -> int:
        nonlocal writes
        writes += 1
        if writes == 3:
            assert threads(), "the model should be running here"
            raise KeyboardInterrupt
        return 0

    before = threads()
    monkeypatch.setattr(sys.stdout, "write", write)
    status = cli.main(["generate", "--model", model, "--max-tokens", "400", "hello", "abc"])
    monkeypatch.undo()
    assert status == cli.EXIT_INTERRUPTED
    assert writes >= 3
    assert threads() == before


def test_reader_that_goes_away_is_no_traceback(model: str) -> None:
    with subprocess.Popen(
        [*COMMAND, "generate", "--model", model, "--max-tokens", "400", *["hello"] * 8],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == cli.EXIT_ERROR
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    "name", ["generate", "stream", "chat", "server_loop", "own_scheduler", "interop"]
)
def test_examples_run(name: str, model: str) -> None:
    example = str(ROOT / "examples" / f"{name}.py")
    asked = subprocess.run(
        [sys.executable, example, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert asked.stdout.startswith("usage: ")
    command = [sys.executable, example, model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") >= 2


def test_the_example_of_single_ops_runs_with_torch() -> None:
    pytest.importorskip("torch")
    example = str(ROOT / "examples" / "ops_torch.py")
    done = subprocess.run(
        [sys.executable, example, "cpu"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    attention, tokens = done.stdout.splitlines()
    assert attention.startswith("attention differs from torch by at most ")
    assert float(attention.rpartition(" ")[2]) < 0.02
    assert all(0 <= token < 1000 for token in json.loads(tokens.removeprefix("tokens ")))


@pytest.mark.parametrize("name", ["ops_torch", "ops_cupy"])
def test_examples_of_single_ops_call_what_there_is(name: str) -> None:
    """Each call of an op names arguments that it has; the libraries need not be installed."""
    tree = ast.parse((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "ops"
    ]
    assert len(calls) >= 3
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
        inspect.signature(getattr(ops, call.func.attr)).bind(*call.args, **keywords)


def test_the_scheduler_of_the_example_gives_what_llm_gives(model: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "own_scheduler.py"), model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    prompts = ["Once upon a time there was a", "The little dog", "One day, a girl named Lily"]
    with LLM(model, device="cpu") as llm:
        results = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=32))
    tokenizer = Tokenizer.from_dir(model)
    texts = [tokenizer.decode(result.token_ids) for result in results]
    assert done.stdout == "".join(f"{p}{t}\n" for p, t in zip(prompts, texts, strict=True))
