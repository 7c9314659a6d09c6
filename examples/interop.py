# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Logits to another library without the host in between, and memory that host and device share.

python examples/interop.py [model directory]
"""

from __future__ import annotations

import argparse

import numpy as np

from mrv1 import ModelRunner, SamplingParams, memory
from mrv1.shapes import demo_model
from mrv1.tokenizer import Tokenizer

PROMPT = "Once upon a time there was a"
BLOCK_SIZE = 16
BEST = 5


def take_logits(runner: ModelRunner, prompt: list[int]) -> np.ndarray:
    """Runs a prompt and returns the logits of the token after it."""
    blocks = list(range(1, len(prompt) // BLOCK_SIZE + 2))
    params = SamplingParams(temperature=0.0, max_tokens=1)
    row = runner.add_row(prompt, params, block_ids=blocks)
    runner.execute([(row, len(prompt))]).result()
    # A copy that later steps leave alone, where the device has it. On a GPU a library such as
    # torch takes it there; NumPy takes memory of the CPU only.
    logits = runner.device_logits(0)
    on_cpu = runner.model.device.kind == "cpu"
    values = np.from_dlpack(logits) if on_cpu else runner.logits(0)
    runner.free_row(row)
    return values


def main() -> None:
    """Prints the likeliest next tokens, then passes values through pinned memory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", nargs="?", default=demo_model(), help="model directory")
    model = parser.parse_args().model
    tokenizer = Tokenizer.from_dir(model)
    with ModelRunner(model, num_kv_blocks=64, block_size=BLOCK_SIZE) as runner:
        logits = take_logits(runner, tokenizer.encode(PROMPT))
        weights = np.exp(logits - logits.max())
        for token in np.argsort(-logits)[:BEST]:
            print(f"{weights[token] / weights.sum():6.1%}  {tokenizer.decode([int(token)])!r}")

        # Three arrays, handed out in turn, each only once the device has done with it.
        with memory.PinnedRing(3, (4, BEST), "float32", runner.model.device) as ring:
            for turn in range(6):
                with ring.next() as buffer, buffer.write() as array:
                    array[:] = turn
                    # Here a kernel that takes buffer.device() would be launched.
    print("6 turns through", len(ring), "arrays")


if __name__ == "__main__":
    main()
