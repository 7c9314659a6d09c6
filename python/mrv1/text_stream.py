# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The text of a sample as its tokens come, without what stopped it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mrv1.tokenizer import IncrementalDetokenizer, StopMatcher, StreamPiece

if TYPE_CHECKING:
    from mrv1.sampling_params import SamplingParams
    from mrv1.tokenizer import Tokenizer


class TextStream:
    """An `IncrementalDetokenizer` that keeps stop sequences out of the text.

    Text of tokens that may turn out to begin a stop sequence is held back until that is known. Stop
    strings are found at once all the same: a string that is complete before a sequence wins.

    Args:
        tokenizer: The tokenizer.
        params: Of the request.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._shown = IncrementalDetokenizer(tokenizer, params)
        self._include_stop = params.include_stop_str_in_output
        self._matcher: StopMatcher[int] | None = None
        self._ahead: IncrementalDetokenizer | None = None
        self._state = 0
        # Tokens whose text is held back.
        self._held: deque[int] = deque()
        if params.stop_sequences and not self._include_stop:
            self._matcher = StopMatcher[int](params.stop_sequences)
            if params.stop:
                self._ahead = IncrementalDetokenizer(tokenizer, params)

    def push(self, token_id: int) -> StreamPiece:
        """Takes the next token; returns the text that is certain now, and the stop string.

        Raises:
            ClosedError: The text has ended, by a stop string or `finish`.
        """
        if self._matcher is None:
            return self._shown.push(token_id)
        self._held.append(token_id)
        if self._ahead is not None and self._ahead.push(token_id).stopped is not None:
            return self._show(0)
        self._state = self._matcher.step(self._state, token_id)
        return self._show(self._matcher.hold[self._state])

    def finish(self, stop_tokens: tuple[int, ...] = ()) -> StreamPiece:
        """Ends the text; returns what was held back. It may still hold a stop string.

        Args:
            stop_tokens: The stop token, or the stop sequence, that ended it. All but the last were
                pushed.

        Raises:
            ClosedError: The text has ended already.
        """
        if stop_tokens and self._include_stop:
            text, stopped = self._shown.push(stop_tokens[-1])
        else:
            for _ in stop_tokens[1:]:
                self._held.pop()
            text, stopped = self._show(0)
        if stopped is None:
            rest, stopped = self._shown.finish()
            text += rest
        return StreamPiece(text, stopped)

    def _show(self, hold: int) -> StreamPiece:
        """Lets go of all held tokens but the newest `hold`."""
        text = ""
        while len(self._held) > hold:
            piece, stopped = self._shown.push(self._held.popleft())
            text += piece
            if stopped is not None:
                return StreamPiece(text, stopped)
        return StreamPiece(text, None)
