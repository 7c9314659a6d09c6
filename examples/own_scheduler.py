# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""A scheduler of one's own over `ModelRunner`: chunked prefill next to decoding rows.

python examples/own_scheduler.py [model directory]
"""

from __future__ import annotations

import sys

from mrv1 import ModelRunner, SamplingParams
from mrv1.shapes import demo_model
from mrv1.tokenizer import Tokenizer

PROMPTS = ["Once upon a time there was a", "The little dog", "One day, a girl named Lily"]
MAX_TOKENS = 32
BLOCK_SIZE = 16
# Prefill tokens of one request in one step.
CHUNK = 4


def main() -> None:
    """Admits one prompt a step; each step batches whatever can go on."""
    model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
    tokenizer = Tokenizer.from_dir(model)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    blocks = [-(-(len(prompt) + MAX_TOKENS) // BLOCK_SIZE) for prompt in prompts]
    # Block 0 is the null block: ids count from 1.
    free = list(range(1, sum(blocks) + 1))
    waiting = list(range(len(prompts)))
    request_of: dict[int, int] = {}  # row -> which prompt
    left: dict[int, int] = {}  # row -> prompt tokens that are not launched yet
    texts: list[list[int]] = [[] for _ in prompts]

    with ModelRunner(model, num_kv_blocks=sum(blocks) + 1, block_size=BLOCK_SIZE) as runner:
        while waiting or request_of:
            if waiting and runner.free_rows:
                request = waiting.pop(0)
                own, free = free[: blocks[request]], free[blocks[request] :]
                params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
                row = runner.add_row(prompts[request], params, block_ids=own)
                request_of[row] = request
                left[row] = len(prompts[request])
            batch = [(row, max(1, min(CHUNK, left[row]))) for row in request_of]
            for output in runner.execute(batch).result():
                row = output.row
                left[row] = max(0, left[row] - CHUNK)
                if output.token_id is not None:
                    texts[request_of[row]].append(output.token_id)
                if output.finish_reason is not None:
                    runner.free_row(row)
                    del request_of[row], left[row]

    for prompt, token_ids in zip(PROMPTS, texts, strict=True):
        print(prompt + tokenizer.decode(token_ids))


if __name__ == "__main__":
    main()
