# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Single ops on torch tensors: keys and values into a paged cache, attention over it, a token.

    python examples/ops_torch.py [cpu | cuda]

Needs torch. On a GPU the ops run in torch's current stream.
"""

from __future__ import annotations

import sys

import torch

from mrv1 import ops

HEADS, KV_HEADS, DIM, BLOCK = 8, 2, 64, 16


def main() -> None:
    """Writes a cache, attends over it, compares with torch, and draws tokens."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    torch.manual_seed(0)
    length = 40  # one request: 40 tokens, in blocks 3, 1 and 2 of the cache
    make = {"device": device, "dtype": torch.bfloat16}
    q = torch.randn(length, HEADS, DIM, **make)
    key, value = (torch.randn(length, KV_HEADS, DIM, **make) for _ in range(2))
    key_cache, value_cache = (torch.zeros(4, BLOCK, KV_HEADS, DIM, **make) for _ in range(2))
    ints = {"device": device, "dtype": torch.int32}
    block_table = torch.tensor([[3, 1, 2]], **ints)
    query_start_loc = torch.tensor([0, length], **ints)

    slots = ops.slot_mapping(block_table, torch.arange(length, **ints), query_start_loc, BLOCK)
    ops.reshape_and_cache_flash(key, value, key_cache, value_cache, slots)
    mixed = ops.paged_attention(
        q, key_cache, value_cache, block_table, torch.tensor([length], **ints), query_start_loc
    )

    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float().transpose(0, 1),
        key.float().repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1),
        value.float().repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1),
        is_causal=True,
    ).transpose(0, 1)
    print("attention differs from torch by at most", (mixed.float() - expected).abs().max().item())

    logits = torch.randn(3, 1000, device=device)
    print("tokens", ops.sample(logits, temperature=0.8, top_k=50, top_p=0.9, seed=7).tolist())


if __name__ == "__main__":
    main()
