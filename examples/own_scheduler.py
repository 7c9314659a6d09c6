# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""A scheduler of one's own over `ModelRunner`: chunked prefill, one step ahead, reused blocks.

python examples/own_scheduler.py [model directory]
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import deque

from mrv1 import ModelRunner, PendingStep, SamplingParams
from mrv1.shapes import demo_model
from mrv1.tokenizer import Tokenizer

PROMPTS = ["Once upon a time there was a", "The little dog", "One day, a girl named Lily"]
MAX_TOKENS = 32
BLOCK_SIZE = 16
# Prefill tokens of one request in one step.
CHUNK = 4


@dataclasses.dataclass
class Request:
    """A prompt on its way.

    Attributes:
        left: Tokens of the prompt that are not launched yet.
        draws: Launched steps that draw a token for it.
    """

    prompt: list[int]
    left: int
    draws: int = 0
    row: int = -1
    blocks: list[int] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False


def run(runner: ModelRunner, requests: list[Request], free: list[int]) -> None:
    """Runs all requests to their ends, over the KV blocks in `free`."""
    waiting = deque(requests)
    running: list[Request] = []
    ahead: tuple[PendingStep, list[Request]] | None = None
    # Blocks of requests that ended, with the newest step that may still write them.
    held: deque[tuple[int, list[int]]] = deque()

    while waiting or running or ahead:
        while held and held[0][0] <= runner.retired_step:
            free.extend(held.popleft()[1])
        # Whatever may come is reserved, so that no request ever has to wait for a block.
        if waiting and runner.free_rows:
            count = -(-(len(waiting[0].prompt) + MAX_TOKENS) // BLOCK_SIZE)
            if count <= len(free):
                request = waiting.popleft()
                request.blocks = [free.pop() for _ in range(count)]
                params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
                request.row = runner.add_row(request.prompt, params, block_ids=request.blocks)
                running.append(request)

        # The next step is launched before the tokens of the one before are read: the device has
        # them already. A row that turns out to have ended there is masked.
        launched: tuple[PendingStep, list[Request]] | None = None
        batched = [request for request in running if request.draws < MAX_TOKENS]
        if batched:
            sizes = [max(1, min(CHUNK, request.left)) for request in batched]
            rows = [request.row for request in batched]
            launched = runner.execute(list(zip(rows, sizes, strict=True))), batched
            for request in batched:
                request.left = max(0, request.left - CHUNK)
                request.draws += request.left == 0
        if ahead:
            step, earlier = ahead
            # In the order of the batch, so that a row's next request cannot be mistaken for it.
            for request, output in zip(earlier, step.result(), strict=True):
                if request.ended:
                    continue
                if output.token_id is not None:
                    request.token_ids.append(output.token_id)
                if output.finish_reason is not None:
                    request.ended = True
                    running.remove(request)
                    held.append((runner.last_step(request.row), request.blocks))
                    runner.free_row(request.row)
        ahead = launched


def main() -> None:
    """Continues all prompts, with blocks for two of them at a time."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", nargs="?", default=demo_model(), help="model directory")
    model = parser.parse_args().model
    tokenizer = Tokenizer.from_dir(model)
    requests = [Request(ids, len(ids)) for ids in map(tokenizer.encode, PROMPTS)]
    longest = max(len(request.prompt) for request in requests)
    blocks = 2 * -(-(longest + MAX_TOKENS) // BLOCK_SIZE)
    with ModelRunner(model, num_kv_blocks=blocks + 1, block_size=BLOCK_SIZE) as runner:
        # Block 0 is the null block: ids count from 1.
        run(runner, requests, list(range(1, blocks + 1)))
    for prompt, request in zip(PROMPTS, requests, strict=True):
        print(prompt + tokenizer.decode(request.token_ids))


if __name__ == "__main__":
    main()
