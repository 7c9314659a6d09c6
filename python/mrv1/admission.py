# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Checks of a request that need tokens: limits of a deployment, and what leaves nothing to draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mrv1 import envs
from mrv1.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mrv1.envs import EnvVar
    from mrv1.sampling_params import SamplingParams
    from mrv1.tokenizer import Tokenizer

# Field of an error, and the number of tokens, of one entry that a limit is about.
_Entry = tuple[str, int]

_BAD_WORDS: Final = "bad_words"


def check_bad_words(
    params: SamplingParams,
    bad_words: Sequence[Sequence[int]],
    vocab_size: int,
    request_id: str | None = None,
) -> None:
    """Checks the token sequences of a request's bad words.

    Args:
        params: Of the request.
        bad_words: Sequences of token ids, none of them empty.
        vocab_size: Number of the model's token ids.
        request_id: The request that the error names.

    Raises:
        RequestError: There are more or longer ones than MRV1_MAX_BAD_WORDS_NUM and
            MRV1_BAD_WORDS_MAX_LEN allow, or they forbid each token that is allowed.
    """
    if not bad_words:
        return
    _check_limits(
        request_id,
        _BAD_WORDS,
        ((_BAD_WORDS, len(sequence)) for sequence in bad_words),
        len(bad_words),
        envs.MAX_BAD_WORDS_NUM,
        envs.BAD_WORDS_MAX_LEN,
    )
    forbidden = {sequence[0] for sequence in bad_words if len(sequence) == 1}
    allowed = params.allowed_token_ids
    if forbidden.issuperset(range(vocab_size) if allowed is None else allowed):
        raise RequestError(
            "forbid each token that is allowed",
            request_id=request_id,
            field=_BAD_WORDS,
            allowed="texts that leave a token to draw",
        )


def check_stops(
    params: SamplingParams, tokenizer: Tokenizer | None, request_id: str | None = None
) -> None:
    """Checks a request's stop strings and stop sequences.

    Args:
        params: Of the request.
        tokenizer: What gives the tokens of stop strings; None does not check their lengths.
        request_id: The request that the error names.

    Raises:
        RequestError: There are more or longer ones than MRV1_MAX_STOP_SEQS_NUM and
            MRV1_STOP_SEQS_MAX_LEN allow.
    """

    def entries() -> Iterable[_Entry]:
        if tokenizer is not None:
            for index, text in enumerate(params.stop):
                # A lone surrogate, which no text of a model has, counts as one character.
                valid = text.encode("utf-8", "replace").decode("utf-8")
                yield f"stop[{index}]", len(tokenizer.encode(valid, add_special_tokens=False))
        for index, sequence in enumerate(params.stop_sequences):
            yield f"stop_sequences[{index}]", len(sequence)

    _check_limits(
        request_id,
        "stop and stop_sequences",
        entries(),
        len(params.stop) + len(params.stop_sequences),
        envs.MAX_STOP_SEQS_NUM,
        envs.STOP_SEQS_MAX_LEN,
    )


def _check_limits(
    request_id: str | None,
    field: str,
    entries: Iterable[_Entry],
    number: int,
    max_num: EnvVar[int | None],
    max_len: EnvVar[int | None],
) -> None:
    """Checks the number of entries, and of the tokens of each, against two variables."""
    most = max_num.get()
    if most is not None and number > most:
        raise RequestError(
            f"has {number} entries",
            request_id=request_id,
            field=field,
            allowed=f"at most {most}, by {max_num.name}",
        )
    longest = max_len.get()
    if longest is None:
        return
    for name, length in entries:
        if length > longest:
            raise RequestError(
                f"has {length} tokens",
                request_id=request_id,
                field=name,
                allowed=f"at most {longest}, by {max_len.name}",
            )
