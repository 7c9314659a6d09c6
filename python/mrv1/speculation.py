# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: several tokens of a request in one step.

The device proposes draft tokens for each decoding request, the step computes them together with the
request's newest token, and of what is drawn at each place the request keeps the tokens up to the
first that is not the next draft. Every kept token was drawn from the model's own distribution, by
the random word of its position: output is the same with speculation as without, greedy or sampled,
as far as logits are (token for token with `batch_invariant=True`). How drafts are found decides
about speed alone.

"ngram" is prompt lookup: the last tokens of the request, prompt_lookup_max of them down to
prompt_lookup_min, are looked for in its prompt and output, and what followed them the last time is
proposed. It pays where output repeats input: summaries, edits, code, extraction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from mrv1.errors import InvalidArgumentError

# As kMaxSpeculativeTokens of src/cpp/state/row_state.h.
MAX_SPECULATIVE_TOKENS: Final = 15
_MAX_LOOKUP: Final = 64
_FIELDS: Final = ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")


@dataclasses.dataclass(frozen=True)
class NgramConfig:
    """A checked speculative_config with method "ngram".

    Attributes:
        num_speculative_tokens: Draft tokens of a step, at most; 1 to 15.
        prompt_lookup_max: Tokens of the longest n-gram that is looked up; up to 64.
        prompt_lookup_min: Tokens of the shortest; at least 1.
    """

    num_speculative_tokens: int
    prompt_lookup_max: int = 3
    prompt_lookup_min: int = 1

    @classmethod
    def from_options(cls, values: Mapping[str, object] | None) -> NgramConfig | None:
        """Checks the option; None, for no speculation, stays None.

        Raises:
            InvalidArgumentError: It is no mapping, misses a field, or has one that is not known or
                out of range.
        """
        if values is None:
            return None
        if not isinstance(values, Mapping):
            raise InvalidArgumentError(
                field="speculative_config", value=values, allowed="None or a mapping"
            )
        for name in values:
            if name not in _FIELDS:
                raise InvalidArgumentError(
                    field="speculative_config",
                    value=name,
                    allowed=f"only the keys {', '.join(_FIELDS)}",
                )
        if values.get("method") != "ngram":
            raise InvalidArgumentError(
                field="speculative_config.method", value=values.get("method"), allowed='"ngram"'
            )
        drafts = _integer(values, "num_speculative_tokens", None, 1, MAX_SPECULATIVE_TOKENS)
        most = _integer(values, "prompt_lookup_max", cls.prompt_lookup_max, 1, _MAX_LOOKUP)
        least = _integer(values, "prompt_lookup_min", cls.prompt_lookup_min, 1, most)
        return cls(drafts, most, least)


def _integer(
    values: Mapping[str, object], name: str, default: int | None, low: int, high: int
) -> int:
    value = values.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidArgumentError(
            field=f"speculative_config.{name}",
            value=value,
            allowed=f"an integer in [{low}, {high}]",
        )
    return value
