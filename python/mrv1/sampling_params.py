# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""How a request's tokens are drawn and when it ends."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from mrv1.errors import RequestError
from mrv1.structured_outputs_params import StructuredOutputsParams

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_FLOAT32: Final = 3.4028234663852886e38
MAX_INT32: Final = 2**31 - 1
_MAX_SEED: Final = 2**64 - 1
# Below this a temperature means greedy, as in vLLM: dividing by it would overflow float32.
_MIN_TEMPERATURE: Final = 1e-5
# Beyond these a repetition penalty could take a logit out of float32, down to -inf.
_REPETITION_PENALTIES: Final = (1e-30, 1e30)
_MAX_LOGIT_BIAS: Final = 100.0
# `max_logprobs`, `logprobs` and `prompt_logprobs` for the whole vocabulary.
WHOLE_VOCABULARY: Final = -1


@dataclasses.dataclass(frozen=True, init=False)
class SamplingParams:
    """Sampling parameters of one request. Names and defaults are vLLM's; see docs/sampling.md.

    Keyword arguments only; an unknown keyword raises TypeError, so nothing is accepted and ignored.
    Numbers may be NumPy scalars; they are stored as Python's own. Instances can be shared. Nothing
    has a built-in limit of its number or length; docs/sampling.md names those that a deployment can
    set.

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
        presence_penalty: Subtracted from the logits of tokens that the output has. In [-2, 2].
        frequency_penalty: Subtracted from the logit of a token for each time the output has it.
            In [-2, 2].
        repetition_penalty: Divides the positive logits of tokens that the prompt or the output has,
            and multiplies the others; 1 is off. Above 0; values outside of [1e-30, 1e30] are stored
            as the nearer of these.
        logit_bias: Added to the logits of tokens: a mapping from token id to bias. Biases are
            clamped to [-100, 100]. Stored as a tuple of pairs, ids rising.
        allowed_token_ids: The only tokens that may be drawn; None is all. At least one; stored as a
            tuple without repetitions.
        bad_words: Texts that must not be generated: of the tokens that one has, with or without a
            space before it, the last is not drawn where the others came before. Each has more than
            white space; stored as a tuple without repetitions.
        structured_outputs: Form that the text must have; None is any.
        seed: Makes the draws repeatable; None lets the engine choose. In [0, 2**64).
        max_tokens: Tokens after which the request ends; None is up to the model's length. At
            least 1.
        min_tokens: Tokens before which nothing but max_tokens ends the request. At least 0.
        stop: Strings that end the request; the text is cut before the one that is complete
            first. One string or a list, none of them empty; stored as a tuple.
        stop_token_ids: Tokens that end the request, besides the model's end-of-sequence tokens.
            Stored as a tuple.
        stop_sequences: Sequences of token ids that end the request when the output ends with one.
            None of them empty; stored as a tuple of tuples. vLLM has no such parameter.
        ignore_eos: Whether the model's end-of-sequence tokens do not end the request.
        include_stop_str_in_output: Whether the text keeps what stopped it, at its end: the stop
            string, or the text of the stop token or the stop sequence.
        logprobs: Log probabilities to return for each token: its own and those of this many most
            likely ones; -1 is the whole vocabulary, None is none at all. At most the engine's
            max_logprobs.
        prompt_logprobs: The same for the tokens of the prompt.
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
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    allowed_token_ids: tuple[int, ...] | None
    bad_words: tuple[str, ...]
    structured_outputs: StructuredOutputsParams | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    stop_sequences: tuple[tuple[int, ...], ...]
    ignore_eos: bool
    include_stop_str_in_output: bool
    logprobs: int | None
    prompt_logprobs: int | None
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
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None,
        allowed_token_ids: Sequence[int] | None = None,
        bad_words: Sequence[str] | None = None,
        structured_outputs: StructuredOutputsParams | None = None,
        seed: int | None = None,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        stop_sequences: Sequence[Sequence[int]] | None = None,
        ignore_eos: bool = False,
        include_stop_str_in_output: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
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
        for field, penalty in (
            ("presence_penalty", presence_penalty),
            ("frequency_penalty", frequency_penalty),
        ):
            checked = _number(field, penalty, "in [-2, 2]")
            if not -2.0 <= checked <= 2.0:
                raise RequestError(field=field, value=penalty, allowed="in [-2, 2]")
            store(field, checked)
        checked = _number("repetition_penalty", repetition_penalty, "above 0")
        if checked <= 0.0:
            raise RequestError(
                field="repetition_penalty", value=repetition_penalty, allowed="above 0"
            )
        least_penalty, most_penalty = _REPETITION_PENALTIES
        store("repetition_penalty", min(max(checked, least_penalty), most_penalty))
        store("logit_bias", _logit_bias(logit_bias))
        allowed_ids = None
        if allowed_token_ids is not None:
            allowed_ids = tuple(dict.fromkeys(_token_ids("allowed_token_ids", allowed_token_ids)))
            if not allowed_ids:
                raise RequestError(
                    field="allowed_token_ids",
                    value=allowed_token_ids,
                    allowed="None or a list of at least one token id",
                )
        store("allowed_token_ids", allowed_ids)
        store("bad_words", _bad_words(bad_words))
        if structured_outputs is not None and not isinstance(
            structured_outputs, StructuredOutputsParams
        ):
            raise RequestError(
                field="structured_outputs",
                value=structured_outputs,
                allowed="None or StructuredOutputsParams",
            )
        store("structured_outputs", structured_outputs)
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
        store(
            "stop_token_ids",
            () if stop_token_ids is None else _token_ids("stop_token_ids", stop_token_ids),
        )
        store("stop_sequences", _stop_sequences(stop_sequences))
        for field, count in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
            store(
                field,
                None
                if count is None
                else _integer(field, count, WHOLE_VOCABULARY, MAX_INT32, "None or "),
            )
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
        max_logprobs: int = WHOLE_VOCABULARY,
    ) -> None:
        """Checks what depends on the model.

        Args:
            vocab_size: Number of the model's token ids.
            max_model_len: Tokens, prompt included, that a request may have.
            request_id: The request that the error names.
            max_speculative_tokens: Draft tokens that a step may propose, 0 without speculation.
            max_logprobs: Most that logprobs and prompt_logprobs may ask for; -1 is the vocabulary.

        Raises:
            RequestError: A token id is not in the vocabulary, min_tokens does not fit next to a
                prompt of one token, or more drafts or log probabilities are asked for than there
                can be.
        """
        if (self.num_speculative_tokens or 0) > max_speculative_tokens:
            raise RequestError(
                request_id=request_id,
                field="num_speculative_tokens",
                value=self.num_speculative_tokens,
                allowed=f"at most the engine's {max_speculative_tokens}"
                + ("" if max_speculative_tokens else " (it has no speculative_config)"),
            )
        for field, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", [token_id for token_id, _ in self.logit_bias]),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            *(
                (f"stop_sequences[{index}]", sequence)
                for index, sequence in enumerate(self.stop_sequences)
            ),
        ):
            for index, token_id in enumerate(ids):
                if token_id >= vocab_size:
                    raise RequestError(
                        request_id=request_id,
                        field=f"{field} token id" if field == "logit_bias" else f"{field}[{index}]",
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
        most = vocab_size if max_logprobs == WHOLE_VOCABULARY else max_logprobs
        for field, count in (
            ("logprobs", self.num_logprobs(vocab_size)),
            ("prompt_logprobs", self.num_prompt_logprobs(vocab_size)),
        ):
            if count > most:
                asked = getattr(self, field)
                raise RequestError(
                    request_id=request_id,
                    field=field,
                    value=asked,
                    allowed=f"at most the engine's max_logprobs = {most}"
                    + (f"; -1 means {count}" if asked == WHOLE_VOCABULARY else ""),
                )

    def num_logprobs(self, vocab_size: int) -> int:
        """Most likely tokens to report for each token; -1 for no log probabilities at all."""
        return _num_logprobs(self.logprobs, vocab_size)

    def num_prompt_logprobs(self, vocab_size: int) -> int:
        """As `num_logprobs`, for tokens of the prompt."""
        return _num_logprobs(self.prompt_logprobs, vocab_size)


def _num_logprobs(asked: int | None, vocab_size: int) -> int:
    if asked is None:
        return -1
    return vocab_size if asked == WHOLE_VOCABULARY else asked


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
    for index, text in enumerate(value):
        if not isinstance(text, str) or not text:
            raise RequestError(
                field=f"stop[{index}]", value=text, allowed="a string that is not empty"
            )
    return tuple(value)


def _token_ids(field: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | range):
        raise RequestError(field=field, value=value, allowed="None or a list of token ids")
    return tuple(
        _integer(f"{field}[{index}]", token_id, 0, MAX_INT32)
        for index, token_id in enumerate(value)
    )


def _stop_sequences(value: object) -> tuple[tuple[int, ...], ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise RequestError(
            field="stop_sequences", value=value, allowed="None or a list of lists of token ids"
        )
    sequences = []
    for index, sequence in enumerate(value):
        field = f"stop_sequences[{index}]"
        if not isinstance(sequence, list | tuple | range) or not sequence:
            raise RequestError(
                field=field, value=sequence, allowed="a list of at least one token id"
            )
        sequences.append(_token_ids(field, sequence))
    return tuple(sequences)


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    allowed = "None or a mapping from token id to bias"
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list | tuple):
        pairs = list(value)
    else:
        raise RequestError(field="logit_bias", value=value, allowed=allowed)
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RequestError(field="logit_bias", value=value, allowed=allowed)
        token_id = _integer("logit_bias token id", pair[0], 0, MAX_INT32)
        if token_id in biases:
            raise RequestError(
                field="logit_bias token id", value=token_id, allowed="given only once"
            )
        bias = _number(f"logit_bias[{token_id}]", pair[1], "to add to a logit")
        biases[token_id] = min(max(bias, -_MAX_LOGIT_BIAS), _MAX_LOGIT_BIAS)
    return tuple(sorted(biases.items()))


def _bad_words(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise RequestError(field="bad_words", value=value, allowed="None or a list of strings")
    for index, word in enumerate(value):
        if not isinstance(word, str) or not word.strip():
            raise RequestError(
                field=f"bad_words[{index}]",
                value=word,
                allowed="a string with more than white space",
            )
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError(
                field=f"bad_words[{index}]", value=word, allowed="text that UTF-8 can encode"
            ) from None
    return tuple(dict.fromkeys(value))
