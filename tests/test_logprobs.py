# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Log probabilities of tokens as results have them, from what a step reports."""

from __future__ import annotations

from mrv1.logprobs import Logprob, token_logprobs


def test_each_token_has_its_own_entry_first() -> None:
    ids = [7, 3, 7, 3, 3, 9]
    found = token_logprobs(2, ids, [-2.0, -0.5, -2.0, -0.1, -0.1, -4.0], [2, 1, 2, 1, 1, 2], None)
    assert found == [
        {7: Logprob(-2.0, 2), 3: Logprob(-0.5, 1)},
        {3: Logprob(-0.1, 1), 9: Logprob(-4.0, 2)},
    ]
    assert [list(group) for group in found] == [[7, 3], [3, 9]]


def test_of_a_tie_the_own_entry_keeps_its_rank() -> None:
    (group,) = token_logprobs(1, [5, 2, 5], [-1.0, -1.0, -1.0], [1, 1, 2], None)
    assert [entry.rank for entry in group.values()] == [1, 1]


def test_texts_and_no_tokens() -> None:
    (group,) = token_logprobs(1, [5], [-1.0], [1], "token {}".format)
    assert group == {5: Logprob(-1.0, 1, "token 5")}
    assert token_logprobs(0, [], [], [], None) == []
