# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""A text as it comes.

python examples/stream.py [model directory]
"""

from __future__ import annotations

import argparse

from mrv1 import LLM, SamplingParams
from mrv1.shapes import demo_model


def main() -> None:
    """Streams one prompt, then prints how fast it was."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", nargs="?", default=demo_model(), help="model directory")
    model = parser.parse_args().model
    params = SamplingParams(temperature=0.0, max_tokens=64)
    with LLM(model) as llm:
        for chunk in llm.stream("Once upon a time", params):
            print(chunk.text, end="", flush=True)
            if chunk.result is not None:
                print(f"\n{chunk.result.generation_tokens_per_s:.0f} tokens/s")


if __name__ == "__main__":
    main()
