# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Prompts in, texts out.

python examples/generate.py [model directory]
"""

from __future__ import annotations

import argparse

from mrv1 import LLM, SamplingParams
from mrv1.shapes import demo_model

PROMPTS = ["Once upon a time", "The little dog", "One day, a girl named Lily"]


def main() -> None:
    """Generates for all prompts at once."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", nargs="?", default=demo_model(), help="model directory")
    model = parser.parse_args().model
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=48, seed=1)
    with LLM(model) as llm:
        for prompt, result in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
            print(f"{prompt}{result.text}\n  [{result.finish_reason}]")


if __name__ == "__main__":
    main()
