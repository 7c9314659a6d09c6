# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/chat/expected.json: what transformers makes of conversations.

pip install ".[bench]" && python scripts/make_chat_goldens.py

The templates beside it are written after those of public models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers

CHAT = Path(__file__).resolve().parent.parent / "tests" / "data" / "chat"
SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "image_token": "<image>",
}

HELLO = [{"role": "user", "content": "Hello!"}]
SYSTEM = [{"role": "system", "content": "  Be brief.\n"}, *HELLO]
TURNS = [
    {"role": "user", "content": " What is 2 + 2?\n"},
    {"role": "assistant", "content": "\n4. "},
    {"role": "user", "content": 'Sure? <b>&amp; "quoted" é 你好 🙂'},
]
ANSWERED = [*TURNS, {"role": "assistant", "content": "Yes, because"}]
TRIMMED = [*TURNS, {"role": "assistant", "content": "Yes, because "}]
THOUGHT = [
    *HELLO,
    {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHi."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "So.", "reasoning_content": "Say so."},
]
NONES = [{"role": "user", "content": "Hello!", "tool_calls": None, "name": None}]
BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather <now>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Köln", "Paris"]}},
                "required": ["city"],
            },
        },
    }
]
CALLED = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
        ],
    },
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "more rain"},
]
ODD = [
    {"role": "user", "content": "a"},
    {"role": "tool", "content": "skipped"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "end", "content": ""},
    {"role": "user", "content": "never"},
]

CASES: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    *[
        (template, messages, {"add_generation_prompt": asks})
        for template in ("llama3", "chatml", "qwen3", "gemma", "mistral", "phi")
        for messages in (HELLO, SYSTEM, TURNS, ANSWERED, NONES)
        for asks in (True, False)
    ],
    *[
        (template, messages, {"continue_final_message": True, "add_generation_prompt": False})
        for template in ("llama3", "chatml", "qwen3", "gemma", "mistral", "phi")
        for messages in (ANSWERED, TRIMMED)
    ],
    *[(template, CALLED, {"tools": TOOLS}) for template in ("llama3", "qwen3")],
    ("mistral", SYSTEM, {"tools": TOOLS}),
    ("mistral", CALLED, {}),
    ("gemma", [*HELLO, *HELLO], {}),
    ("llama3", HELLO, {"date_string": "1 Jan 2026", "bos_token": "<other>"}),
    ("qwen3", THOUGHT, {"add_generation_prompt": False}),
    ("qwen3", THOUGHT[:3], {"enable_thinking": False}),
    (
        "qwen3",
        THOUGHT,
        {"continue_final_message": "reasoning_content", "add_generation_prompt": False},
    ),
    ("chatml", BLOCKS, {}),
    ("chatml", BLOCKS, {"continue_final_message": True, "add_generation_prompt": False}),
    ("features", ODD, {}),
    ("features", ODD, {"documents": [{"title": "t", "text": "<x>"}]}),
    ("phi", [{"role": "system", "content": "s", "tools": "[]"}, *HELLO], {}),
]


def main() -> None:
    """Renders every case, or takes the words with which its template refuses it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    cases = []
    for template, messages, options in CASES:
        case = {"template": template, "messages": messages, "options": options}
        given = {"add_generation_prompt": True, **options}
        source = (CHAT / f"{template}.jinja").read_text(encoding="utf-8")
        try:
            case["text"] = tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, **given
            )
        except jinja2.TemplateError as error:
            case["error"] = str(error)
        cases.append(case)
    content = {
        "transformers": transformers.__version__,
        "special_tokens": SPECIAL,
        "cases": cases,
    }
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (CHAT / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
