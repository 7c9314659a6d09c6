# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Layers with different windows: groups, places of their blocks, and what a row may hold."""

from __future__ import annotations

import pytest

from mrv1 import _core
from mrv1.errors import InvalidArgumentError


def program(windows: list[int], kv_heads: int = 1, last_kv_heads: int = 1) -> _core.Program:
    wired = _core.Program("float32")
    for layer, window in enumerate(windows):
        heads = last_kv_heads if layer == len(windows) - 1 else kv_heads
        qkv = wired.input(f"qkv{layer}", (2 + 2 * heads) * 8)
        wired.attention(
            qkv,
            num_heads=2,
            num_kv_heads=heads,
            head_dim=8,
            kv_layer=layer,
            scale=1.0,
            window=window,
        )
    return wired


@pytest.mark.parametrize(
    ("windows", "groups", "places"),
    [
        ([0, 0, 0], [0], [(0, 0), (0, 1), (0, 2)]),
        ([8, 8], [8], [(0, 0), (0, 1)]),
        ([8, 0, 8, 0], [8, 0], [(0, 0), (1, 0), (0, 1), (1, 1)]),
        # Five of one kind to one of the other: five groups of one layer each.
        ([4, 4, 4, 4, 4, 0], [4, 4, 4, 4, 4, 0], [(g, 0) for g in range(6)]),
        # The last group of a kind may be short.
        (
            [4, 4, 4, 0, 4, 4, 0],
            [4, 4, 4, 0],
            [(0, 0), (0, 1), (1, 0), (3, 0), (1, 1), (2, 0), (3, 1)],
        ),
    ],
)
def test_layers_share_groups_of_equal_size(
    windows: list[int], groups: list[int], places: list[tuple[int, int]]
) -> None:
    assert program(windows).kv_layout == (groups, places)


def test_layers_of_several_groups_have_equal_heads() -> None:
    assert program([0, 0], kv_heads=1, last_kv_heads=2).kv_layout[0] == [0]
    with pytest.raises(InvalidArgumentError, match="equal key/value heads, not 2 of 8 and 1 of 8"):
        _ = program([8, 0], kv_heads=1, last_kv_heads=2).kv_layout
