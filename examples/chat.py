# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""A conversation, answered by the chat template of a model.

python examples/chat.py [model directory, or name of a model in the local Hugging Face cache]
"""

from __future__ import annotations

import argparse

from mrv1 import LLM, SamplingParams
from mrv1.shapes import demo_model

QUESTIONS = ["Who is Lily?", "What did she find?"]

# For models that come without a template, such as the demo model.
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def main() -> None:
    """Asks two questions, the second with the first answer before it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", nargs="?", default=demo_model(), help="model directory or name")
    model = parser.parse_args().model
    params = SamplingParams(temperature=0.0, max_tokens=32, stop="\n")
    with LLM(model) as llm:
        template = None if llm.tokenizer.has_chat_template else PLAIN
        messages = [{"role": "system", "content": "You tell stories about a girl named Lily."}]
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            (result,) = llm.chat(messages, params, chat_template=template)
            messages.append({"role": "assistant", "content": result.text.strip()})
            print(f"{question}\n  {result.text.strip()}")
            known = result.num_cached_tokens
            print(f"  [{result.usage.prompt_tokens} tokens, {known} of them cached]")


if __name__ == "__main__":
    main()
