# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""How a request's tokens are drawn and when it ends."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from typing import TYPE_CHECKING, Final

from mrv1.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_FLOAT32: Final = 3.4028234663852886e38
MAX_INT32: Final = 2**31 - 1
_MAX_SEED: Final = 2**64 - 1
# Below this a temperature means greedy, as in vLLM: dividing by it would overflow float32.
_MIN_TEMPERATURE: Final = 1e-5
_MAX_STOP_STRINGS: Final = 64
_MAX_STOP_CHARS: Final = 1024
_MAX_STOP_TOKEN_IDS: Final = 1024


@dataclasses.dataclass(frozen=True, init=False)
class SamplingParams:
    """Sampling parameters of one request. Names and defaults are vLLM's.

    Keyword arguments only; an unknown keyword raises TypeError, so nothing is accepted and ignored.
    Numbers may be NumPy scalars; they are stored as Python's own. Instances can be shared.

    Attributes:
        n: Samples of the prompt, each ended for itself; they share its computation. With a seed,
            sample i draws as with seed + i. At least 1, at most the engine's max_num_seqs.
        temperature: Divides the logits; 0 draws the most likely token (greedy). In
            [0, 3.4e38]. Values below 1e-5 are stored as 0.
        top_p: Keeps the smallest set of most likely tokens whose probabilities sum to at least
            this; 1 is off. In (0, 1].
        top_k: Keeps this many most likely tokens; 0 and -1 are off, -1 is stored as 0.
        min_p: Keeps tokens at least this likely relative to the most likely one; 0 is off.
            In [0, 1].
        seed: Makes the draws repeatable; None lets the engine choose. In [0, 2**64).
        max_tokens: Tokens after which the request ends; None is up to the model's length. At
            least 1.
        min_tokens: Tokens before which nothing but max_tokens ends the request. At least 0.
        stop: Strings that end the request; the text is cut before the one that is complete
            first. One string or a list of at most 64, of 1 to 1024 characters each; stored as a
            tuple.
        stop_token_ids: Tokens that end the request, besides the model's end-of-sequence tokens.
            At most 1024; stored as a tuple.
        ignore_eos: Whether the model's end-of-sequence tokens do not end the request.
        include_stop_str_in_output: Whether the text keeps the stop string at its end.
        skip_special_tokens: Whether the text leaves out special tokens.
        detokenize: Whether text is made at all. Stop strings need it.
        num_speculative_tokens: Draft tokens that a step may propose for this request, where the
            engine has a speculative_config; None is as many as the engine's, 0 is off. Output does
            not depend on it, but for rounding. At most the engine's number.
    """

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    max_tokens: int | None
    min_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    detokenize: bool
    num_speculative_tokens: int | None

    # Written out, since what is accepted is wider than what is stored.
    def __init__(
        self,
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        detokenize: bool = True,
        num_speculative_tokens: int | None = None,
    ) -> None:
        """Checks and stores the parameters.

        Raises:
            RequestError: A parameter has the wrong type or is out of range.
        """

        def store(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        store("n", _integer("n", n, 1, MAX_INT32))
        checked = _number("temperature", temperature, f"in [0, {_MAX_FLOAT32:.2g}]")
        if not 0.0 <= checked <= _MAX_FLOAT32:
            raise RequestError(
                field="temperature", value=temperature, allowed=f"in [0, {_MAX_FLOAT32:.2g}]"
            )
        store("temperature", 0.0 if checked < _MIN_TEMPERATURE else checked)
        checked = _number("top_p", top_p, "in (0, 1]")
        if not 0.0 < checked <= 1.0:
            raise RequestError(field="top_p", value=top_p, allowed="in (0, 1]")
        store("top_p", checked)
        store("top_k", max(0, _integer("top_k", top_k, -1, MAX_INT32)))
        checked = _number("min_p", min_p, "in [0, 1]")
        if not 0.0 <= checked <= 1.0:
            raise RequestError(field="min_p", value=min_p, allowed="in [0, 1]")
        store("min_p", checked)
        store("seed", None if seed is None else _integer("seed", seed, 0, _MAX_SEED, "None or "))
        most = None
        if max_tokens is not None:
            most = _integer("max_tokens", max_tokens, 1, MAX_INT32, "None or ")
        store("max_tokens", most)
        least = _integer("min_tokens", min_tokens, 0, MAX_INT32)
        if most is not None and least > most:
            raise RequestError(
                field="min_tokens", value=min_tokens, allowed=f"at most max_tokens = {most}"
            )
        store("min_tokens", least)
        store("stop", _stop_strings(stop))
        store("stop_token_ids", _stop_token_ids(stop_token_ids))
        drafts = num_speculative_tokens
        if drafts is not None:
            drafts = _integer("num_speculative_tokens", drafts, 0, MAX_INT32, "None or ")
        store("num_speculative_tokens", drafts)
        for field, flag in (
            ("ignore_eos", ignore_eos),
            ("include_stop_str_in_output", include_stop_str_in_output),
            ("skip_special_tokens", skip_special_tokens),
            ("detokenize", detokenize),
        ):
            if not isinstance(flag, bool):
                raise RequestError(field=field, value=flag, allowed="True or False")
            store(field, flag)
        if self.stop and not self.detokenize:
            raise RequestError(
                field="detokenize", value=False, allowed="True where stop strings are given"
            )

    def validate_for(
        self,
        vocab_size: int,
        max_model_len: int,
        request_id: str | None = None,
        *,
        max_speculative_tokens: int = 0,
    ) -> None:
        """Checks what depends on the model.

        Args:
            vocab_size: Number of the model's token ids.
            max_model_len: Tokens, prompt included, that a request may have.
            request_id: The request that the error names.
            max_speculative_tokens: Draft tokens that a step may propose, 0 without speculation.

        Raises:
            RequestError: A stop token is not in the vocabulary, min_tokens does not fit next to a
                prompt of one token, or num_speculative_tokens is more than there can be.
        """
        if (self.num_speculative_tokens or 0) > max_speculative_tokens:
            raise RequestError(
                request_id=request_id,
                field="num_speculative_tokens",
                value=self.num_speculative_tokens,
                allowed=f"at most the engine's {max_speculative_tokens}"
                + ("" if max_speculative_tokens else " (it has no speculative_config)"),
            )
        for index, token_id in enumerate(self.stop_token_ids):
            if token_id >= vocab_size:
                raise RequestError(
                    request_id=request_id,
                    field=f"stop_token_ids[{index}]",
                    value=token_id,
                    allowed=f"below the vocabulary size {vocab_size}",
                )
        if self.min_tokens >= max_model_len:
            raise RequestError(
                request_id=request_id,
                field="min_tokens",
                value=self.min_tokens,
                allowed=f"below the model length {max_model_len}",
            )


def _number(field: str, value: object, allowed: str) -> float:
    """Returns a finite number as a float; NumPy's scalars count, booleans do not."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            result = float(value)
        except (TypeError, ValueError, OverflowError):
            result = math.nan
        if math.isfinite(result):
            return result
    raise RequestError(field=field, value=value, allowed=f"a finite number {allowed}")


def _integer(field: str, value: object, low: int, high: int, otherwise: str = "") -> int:
    """Returns an integer in [low, high]; NumPy's integers count, booleans do not."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        try:
            result = operator.index(value)
        except (TypeError, ValueError):
            result = low - 1
        if low <= result <= high:
            return result
    raise RequestError(
        field=field, value=value, allowed=f"{otherwise}an integer in [{low}, {high}]"
    )


def _stop_strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise RequestError(field="stop", value=value, allowed="None, a string or a list of strings")
    if len(value) > _MAX_STOP_STRINGS:
        raise RequestError(
            field="stop", value=value, allowed=f"a list of at most {_MAX_STOP_STRINGS} strings"
        )
    for index, text in enumerate(value):
        if not isinstance(text, str) or not 0 < len(text) <= _MAX_STOP_CHARS:
            raise RequestError(
                field=f"stop[{index}]",
                value=text,
                allowed=f"a string of 1 to {_MAX_STOP_CHARS} characters",
            )
    return tuple(value)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple | range):
        raise RequestError(
            field="stop_token_ids", value=value, allowed="None or a list of token ids"
        )
    if len(value) > _MAX_STOP_TOKEN_IDS:
        raise RequestError(
            field="stop_token_ids",
            value=value,
            allowed=f"a list of at most {_MAX_STOP_TOKEN_IDS} token ids",
        )
    return tuple(
        _integer(f"stop_token_ids[{index}]", token_id, 0, MAX_INT32)
        for index, token_id in enumerate(value)
    )
