# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Chat templates: the text that transformers makes, where templates come from, errors, `chat`."""

from __future__ import annotations

import enum
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrv1 import LLM, cli
from mrv1.chat_template import ChatTemplates
from mrv1.errors import ConfigError, RequestError
from mrv1.tokenizer import Tokenizer
from mrv1.tokenizer_config import TokenizerConfig
from serving_tools import LLAMA, MODELS, copy_model, greedy

CHAT = Path(__file__).parent / "data" / "chat"
EXPECTED = json.loads((CHAT / "expected.json").read_text(encoding="utf-8"))
# Arguments of transformers that are variables of the template here.
OPTIONS = {"add_generation_prompt", "continue_final_message", "tools"}
QWEN = MODELS / "qwen3-tied"
SOURCE = (CHAT / "qwen3.jinja").read_text(encoding="utf-8")
HELLO = [{"role": "user", "content": "Hello!"}]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def source_of(name: str) -> str:
    return (CHAT / f"{name}.jinja").read_text(encoding="utf-8")


def with_template(source: str | None = None, **named: str) -> ChatTemplates:
    templates = {**({"default": source} if source is not None else {}), **named}
    config = TokenizerConfig(EXPECTED["special_tokens"], {}, templates, Path("there.jinja"))
    return ChatTemplates(config, "dir")


# --- the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", EXPECTED["cases"], ids=lambda case: f"{case['template']}-{len(case['messages'])}"
)
def test_text_is_that_of_transformers(case: dict[str, Any]) -> None:
    before = json.dumps(case)
    options = {name: case["options"][name] for name in case["options"] if name in OPTIONS}
    others = {name: case["options"][name] for name in case["options"] if name not in OPTIONS}
    templates = with_template(source_of(case["template"]))

    def render() -> str:
        return templates.render(case["messages"], **options, chat_template_kwargs=others)

    if "error" in case:
        with pytest.raises(RequestError) as caught:
            render()
        assert str(caught.value).endswith(f"the chat template refuses them: {case['error']}")
        assert caught.value.field == "messages"
    else:
        assert render() == case["text"]
        assert render() == case["text"], "a template that was compiled before"
    assert json.dumps(case) == before, "the caller's messages were changed"


def test_expected_texts_reach_every_template_and_refusal() -> None:
    cases = EXPECTED["cases"]
    assert {case["template"] for case in cases} == {path.stem for path in CHAT.glob("*.jinja")}
    assert len(cases) > 80 and sum("error" in case for case in cases) >= 4
    assert any("🙂" in case.get("text", "") for case in cases)


def test_time_is_that_of_now() -> None:
    before = time.strftime("%Y-%m-%d %H")
    text = with_template("{{ strftime_now('%Y-%m-%d %H') }}").render(HELLO)
    assert text in (before, time.strftime("%Y-%m-%d %H"))


def test_tool_template_and_named_ones() -> None:
    templates = with_template("default", tool_use="tools", rag="rag {{ documents[0] }}")
    tools = [{"name": "f"}]
    assert templates.render(HELLO) == "default"
    assert templates.render(HELLO, tools=tools) == "tools"
    assert templates.render(HELLO, tools=tools, chat_template="default") == "default"
    given = {"documents": ["x"]}
    assert templates.render(HELLO, chat_template="rag", chat_template_kwargs=given) == "rag x"
    assert templates.render(HELLO, chat_template="own {{ eos_token }}") == "own </s>"
    with pytest.raises(ConfigError, match="no default chat template.*one of a, b"):
        with_template(a="1", b="2").render(HELLO)


def test_templates_see_plain_values_only() -> None:
    class Role(str, enum.Enum):
        USER = "user"

        def secret(self) -> str:
            return "leaked"

    message = [{"role": Role.USER, "content": "x"}]
    assert with_template("{{ messages[0].role }}").render(message) == "user"
    with pytest.raises(RequestError, match="UndefinedError"):
        with_template("{{ messages[0].role.secret() }}").render(message)
    for source in (
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ):
        with pytest.raises(RequestError, match="the chat template fails on them"):
            with_template(source).render(HELLO)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages, named",
    [
        ([], r"messages = \[\]"),
        (None, "messages = None"),
        ("hello", "messages = 'hello'"),
        ({"role": "user"}, "messages"),
        ([3], r"messages\[0\] = 3"),
        ([{"content": "x"}], r"messages\[0\].*a role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\].*a role"),
        ([*HELLO, {"role": "user", "content": b"x"}], r"messages\[1\].content = b'x'"),
        ([{"role": "user", "content": [{"image": object()}]}], r"messages\[0\].content\[0\].image"),
        ([{"role": "user", "content": {1: "x"}}], r"messages\[0\].content"),
    ],
)
def test_what_are_no_messages(messages: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        with_template(CHATML).render(messages)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"add_generation_prompt": 1}, "add_generation_prompt = 1"),
        ({"continue_final_message": None}, "continue_final_message = None"),
        ({"continue_final_message": True}, "continue_final_message = True.*add_generation_prompt"),
        ({"tools": "f"}, "tools = 'f'"),
        ({"tools": [print]}, r"tools\[0\]"),
        ({"tools": [{"f": print}]}, r"tools\[0\].f"),
        ({"chat_template": 3}, "chat_template = 3"),
        ({"chat_template": "{% if %}"}, "chat_template: is not a valid Jinja template, line 1"),
        ({"chat_template": "{{ messages | nofilter }}"}, "chat_template: .*nofilter"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs = 3"),
        ({"chat_template_kwargs": {"messages": []}}, "messages is an argument of its own"),
        ({"chat_template_kwargs": {"x": object()}}, "chat_template_kwargs.x"),
        ({"chat_template": "{{ nothing.at.all }}"}, "UndefinedError"),
        ({"chat_template": "{{ 1 // 0 }}"}, "ZeroDivisionError"),
        ({"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}, "RecursionError"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        with_template(CHATML).render(HELLO, **options)


def test_a_message_that_cannot_be_continued() -> None:
    options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    templates = with_template(CHATML)
    for messages, source in (
        ([{"role": "user", "content": None}], None),
        ([{"role": "user", "content": [{"type": "image"}]}], None),
        ([{"role": "user", "content": 3}], None),
        (HELLO, "{{ messages[0].role }}"),
        (HELLO, "{{ messages[0].content | upper }}"),
        (HELLO, "{{ messages[0].content[:3] }}"),
    ):
        with pytest.raises(RequestError, match="continue_final_message"):
            templates.render(messages, chat_template=source, **options)
    with pytest.raises(RequestError, match="no 'thoughts' to continue"):
        templates.render(HELLO, continue_final_message="thoughts", add_generation_prompt=False)


# --- where templates and tokens come from --------------------------------------------------------


def edit_json(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


def test_files_that_hold_templates(tmp_path: Path) -> None:
    root = copy_model(tmp_path / "model")
    assert not Tokenizer.from_dir(root).has_chat_template
    with pytest.raises(ConfigError, match=r"model: has no chat template \(chat_template.jinja"):
        Tokenizer.from_dir(root).render_chat(HELLO)
    edit_json(root / "chat_template.json", chat_template="json {{ bos_token }}")
    assert Tokenizer.from_dir(root).has_chat_template
    assert Tokenizer.from_dir(root).render_chat(HELLO) == "json <s>"
    config = root / "tokenizer_config.json"
    edit_json(config, chat_template="config {{ eos_token }}")
    assert Tokenizer.from_dir(root).render_chat(HELLO) == "config </s>"
    edit_json(
        config,
        chat_template=[
            {"name": "default", "template": "listed"},
            {"name": "tool_use", "template": "tooled"},
        ],
        bos_token={"__type": "AddedToken", "content": "<s>", "lstrip": False},
        extra_special_tokens={"image_token": "<image>"},
        audio_token="<audio>",
    )
    tokenizer = Tokenizer.from_dir(root)
    assert tokenizer.render_chat(HELLO) == "listed"
    assert tokenizer.render_chat(HELLO, tools=[{}]) == "tooled"
    named = "{{ bos_token }}{{ image_token }}{{ audio_token }}{{ pad_token }}"
    assert tokenizer.render_chat(HELLO, chat_template=named) == "<s><image><audio>"
    (root / "chat_template.jinja").write_text("file\n")
    (root / "chat_templates").mkdir()
    (root / "chat_templates" / "short.jinja").write_text("short")
    tokenizer = Tokenizer.from_dir(root)
    assert tokenizer.render_chat(HELLO) == "file"
    assert tokenizer.render_chat(HELLO, chat_template="short") == "short"
    # The name of a template of the list that the files replace is a template now.
    assert tokenizer.render_chat(HELLO, chat_template="tool_use") == "tool_use"
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (root / name).unlink()
    (root / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    tokenizer = Tokenizer.from_dir(root)
    assert tokenizer.render_chat(HELLO, chat_template="{{ eos_token }}") == "</s>"
    with pytest.raises(ConfigError, match="short.jinja.*no default.*one of short"):
        tokenizer.render_chat(HELLO)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json.*not valid JSON"),
        ("tokenizer_config.json", b"[]", "does not hold a JSON object"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token = 3.*a token's text"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template = 3"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "name and template"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}', "added_tokens_decoder"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {"content": "y"}}}',
            "added_tokens_decoder.x",
        ),
        ("chat_template.jinja", b"\xff", "chat_template.jinja.*not UTF-8"),
        ("chat_template.json", b"{", "chat_template.json.*not valid JSON"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    root = copy_model(tmp_path / "model")
    (root / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.from_dir(root)


def test_template_of_the_directory_that_is_not_valid(tmp_path: Path) -> None:
    root = copy_model(tmp_path / "model")
    (root / "chat_template.jinja").write_text("{{ ok }}\n{% endfor %}")
    # It is in nobody's way who does not chat.
    tokenizer = Tokenizer.from_dir(root)
    with pytest.raises(
        ConfigError, match="chat_template.jinja.*not a valid Jinja template, line 2"
    ):
        tokenizer.render_chat(HELLO)


def test_tokens_that_only_the_config_knows(tmp_path: Path) -> None:
    root = copy_model(tmp_path / "model", source=QWEN)
    path = root / "tokenizer.json"
    content = json.loads(path.read_text())
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    content["added_tokens"] = []
    content["model"]["vocab"].pop("<|im_start|>", None)
    path.write_text(json.dumps(content))
    ids = [added[text] for text in ("<|im_start|>", "<|im_end|>")]
    whole = Tokenizer.from_dir(QWEN, 384)
    text = "<|im_start|>user\nabc<|im_end|>"
    assert len(Tokenizer.from_dir(root, 384).encode(text)) > len(whole.encode(text))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    decoder = {
        str(token_id): {"content": name, "special": True, **flags}
        for name, token_id in added.items()
    }
    edit_json(root / "tokenizer_config.json", added_tokens_decoder=decoder)
    tokenizer = Tokenizer.from_dir(root, 384)
    assert tokenizer.encode(text) == whole.encode(text)
    assert [token for token in tokenizer.encode(text) if token in ids] == ids
    assert tokenizer.decode(tokenizer.encode(text)) == "user\nabc"
    # One with a place that is taken, or that the model has no row for, is left out.
    for token_id in (7, 384, 400):
        decoder[str(token_id)] = {"content": f"<none{token_id}>", "special": True, **flags}
    edit_json(root / "tokenizer_config.json", added_tokens_decoder=decoder)
    assert Tokenizer.from_dir(root, 384).encode(text) == whole.encode(text)
    assert len(Tokenizer.from_dir(root, 384).encode("<none384>")) > 1


# --- LLM.chat ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    root = copy_model(tmp_path_factory.mktemp("chat") / "model", source=QWEN)
    (root / "chat_template.jinja").write_text(SOURCE)
    with LLM(root, device=device, dtype="float32", num_kv_blocks=128, num_threads=1) as opened:
        yield opened


def test_chat_generates_after_the_rendered_text(llm: LLM) -> None:
    text = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    (expected,) = llm.generate([ids], greedy(8))
    (result,) = llm.chat(HELLO, greedy(8))
    assert result.prompt_token_ids == ids
    assert (result.token_ids, result.text) == (expected.token_ids, expected.text)
    more = [*HELLO, {"role": "assistant", "content": "Hi"}]
    first, second = llm.chat([HELLO, tuple(more)], [greedy(8), greedy(3)])
    assert first.token_ids == expected.token_ids and len(second.token_ids) == 3
    (continued,) = llm.chat(
        more, greedy(1), continue_final_message=True, add_generation_prompt=False
    )
    assert llm.tokenizer.decode(continued.prompt_token_ids, False).endswith("\n\nHi")
    (other,) = llm.chat(HELLO, greedy(1), chat_template="abc")
    assert other.prompt_token_ids == llm.tokenizer.encode("abc")
    (silent,) = llm.chat(HELLO, greedy(1), chat_template_kwargs={"enable_thinking": False})
    assert llm.tokenizer.decode(silent.prompt_token_ids).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("messages", [[], None, "hello", [[]], [HELLO, []], 3, [3]])
def test_chat_refuses_and_starts_nothing(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        llm.chat(messages, greedy(8))
    assert not llm.engine.has_unfinished()


def test_bos_comes_once(device: str, tmp_path: Path) -> None:
    """This tokenizer begins every text with <s>, and so do templates of its family."""
    root = copy_model(tmp_path / "model")
    (root / "chat_template.jinja").write_text(source_of("mistral"))
    with LLM(root, device=device, dtype="float32", num_kv_blocks=16, num_threads=1) as llm:
        bos = llm.tokenizer.encode("")
        assert len(bos) == 1
        (result,) = llm.chat(HELLO, greedy(1))
        assert result.prompt_token_ids[:1] == bos
        assert result.prompt_token_ids.count(bos[0]) == 1
        with pytest.raises(RequestError, match="conversation roles must alternate"):
            llm.chat([*HELLO, *HELLO], greedy(1))


def test_directory_without_a_template(device: str) -> None:
    with (
        LLM(LLAMA, device=device, dtype="float32", num_kv_blocks=16, num_threads=1) as llm,
        pytest.raises(ConfigError, match="llama2: has no chat template"),
    ):
        llm.chat(HELLO)


# --- mrv1 chat -----------------------------------------------------------------------------------


@pytest.fixture
def command(device: str, tmp_path: Path) -> list[str]:
    root = copy_model(tmp_path / "model", source=QWEN)
    (root / "chat_template.jinja").write_text(SOURCE)
    sampling = ["--temperature", "0", "--max-tokens", "6", "--dtype", "float32"]
    return [
        sys.executable,
        "-m",
        "mrv1",
        "chat",
        "--model",
        str(root),
        "--device",
        device,
        *sampling,
    ]


def test_command_keeps_the_conversation(command: list[str], llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}]
    answers = []
    for line in ("Hello!", "More?"):
        messages.append({"role": "user", "content": line})
        (result,) = llm.chat(messages, greedy(6, ignore_eos=False))
        answers.append(result.text)
        messages.append({"role": "assistant", "content": result.text})
    done = subprocess.run(
        [*command, "--system", "Be brief."],
        input=b"Hello!\n\n  More?",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == "".join(f"{answer}\n" for answer in answers)
    assert done.stderr == b""


def test_command_refuses_in_one_line(command: list[str]) -> None:
    bad = subprocess.run(command, input=b"\xff\n", capture_output=True, timeout=60, check=False)
    assert bad.returncode == cli.EXIT_ERROR and b"stdin" in bad.stderr
    (Path(command[5]) / "chat_template.jinja").unlink()
    none = subprocess.run(command, input=b"hi\n", capture_output=True, timeout=60, check=False)
    assert none.returncode == cli.EXIT_ERROR and none.stdout == b""
    assert none.stderr.startswith(b"mrv1: error: ") and none.stderr.count(b"\n") == 1
    assert b"has no chat template" in none.stderr


@pytest.mark.parametrize("ending", ["end of input", "interrupt while it waits", "interrupt"])
def test_command_on_a_terminal(command: list[str], ending: str) -> None:
    """It asks on the terminal, and ends cleanly."""
    if ending == "interrupt":
        command = [*command, "--max-tokens", "400"]
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, start_new_session=True
        ) as process:
            os.close(theirs)
            assert process.stdout is not None
            said = b""
            while not said.endswith(b"> "):
                said += os.read(ours, 1000)
            os.write(ours, b"Hello!\n")
            assert process.stdout.read(1)
            if ending == "interrupt":
                process.send_signal(signal.SIGINT)
            else:
                said = b""
                while not said.endswith(b"> "):
                    said += os.read(ours, 1000)
                if ending == "end of input":
                    os.write(ours, b"\x04")
                else:
                    process.send_signal(signal.SIGINT)
            status = process.wait(30)
            said = os.read(ours, 1000)
    finally:
        os.close(ours)
    assert b"Traceback" not in said
    assert status == (0 if ending == "end of input" else cli.EXIT_INTERRUPTED)
