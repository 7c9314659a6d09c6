# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Log probabilities of tokens, as results have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np


# Not frozen: there are many in a step, and frozen ones take three times as long to make.
@dataclass(slots=True)
class Logprob:
    """Log probability of a token at one place.

    Attributes:
        logprob: Natural logarithm of the token's probability by the model: at temperature 1, before
            biases, penalties and all else but structured outputs.
        rank: 1 + number of tokens that are more likely. Ranks of the most likely ones count up,
            equal ones by id.
        decoded_token: Text of the token alone; None for a request without detokenize.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


def token_logprobs(
    num_tokens: int,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    ranks: Sequence[int],
    decode: Callable[[int], str] | None,
) -> list[dict[int, Logprob]]:
    """Returns a mapping from token id to `Logprob` for each token: its own first, then by rank.

    Args:
        num_tokens: Number of tokens.
        token_ids: For each token a group of ids, all of one length: its own, then the most likely
            ones in order, its own among them if it is one.
        logprobs: Log probabilities of these.
        ranks: Ranks of these.
        decode: Gives the text of a token; None leaves it out.
    """
    result = []
    size = len(token_ids) // num_tokens if num_tokens else 0
    for start in range(0, num_tokens * size, size or 1):
        group: dict[int, Logprob] = {}
        part = slice(start, start + size)
        for token_id, logprob, rank in zip(
            token_ids[part], logprobs[part], ranks[part], strict=True
        ):
            if token_id not in group:
                text = None if decode is None else decode(token_id)
                group[token_id] = Logprob(logprob, rank, text)
        result.append(group)
    return result


def prompt_token_logprobs(
    token_ids: np.ndarray,
    logprobs: np.ndarray,
    ranks: np.ndarray,
    decode: Callable[[int], str] | None,
) -> list[dict[int, Logprob] | None]:
    """Returns, for each token of a prompt, what `token_logprobs` does: None for the first.

    Args:
        token_ids: [tokens - 1, group] as of `token_logprobs`.
        logprobs: Log probabilities of these.
        ranks: Ranks of these.
        decode: As of `token_logprobs`.
    """
    flat = [values.ravel().tolist() for values in (token_ids, logprobs, ranks)]
    return [None, *token_logprobs(len(token_ids), flat[0], flat[1], flat[2], decode)]
