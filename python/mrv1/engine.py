# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""`Engine`: requests in, text and tokens out, over the native scheduler."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from mrv1 import _core
from mrv1._closing import Closing
from mrv1.errors import InvalidArgumentError, Mrv1Error, RequestError
from mrv1.hub import find_model
from mrv1.loader import (
    LoadedModel,
    RunnerKwargs,
    RunnerOptions,
    load_model,
    report_notices,
)
from mrv1.runner import make_row_spec
from mrv1.sampling_params import SamplingParams
from mrv1.tokenizer import IncrementalDetokenizer, StreamPiece, Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

FinishReason = Literal["stop", "length", "abort", "error"]

_ENDS: dict[_core.RequestEnd, FinishReason] = {
    _core.RequestEnd.STOP: "stop",
    _core.RequestEnd.LENGTH: "length",
    _core.RequestEnd.ABORT: "abort",
    _core.RequestEnd.ERROR: "error",
}


@dataclasses.dataclass(frozen=True)
class RequestUpdate:
    """News of one request.

    Attributes:
        request_id: The request.
        text: Text that is new; may be empty, since text that could become a stop string, or half
            of a character, is held back.
        token_ids: Tokens that are new: none or one.
        finish_reason: Why the request ended with this update; None while it runs.
        stop_reason: What stopped it: a stop string, or a token id of stop_token_ids; None for EOS.
        error: What went wrong, with finish_reason "error".
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None


class _Request:
    def __init__(self, params: SamplingParams, detokenizer: IncrementalDetokenizer | None) -> None:
        self.params = params
        self.detokenizer = detokenizer


class Engine(Closing):
    """Continuous batching over one model; see src/cpp/engine/README.md for the rules.

    Methods may be called from several threads; one step runs at a time.

    Args:
        model: A Hugging Face model directory, with tokenizer.json, or the name of a model in the
            local Hugging Face cache ("org/name").
        revision: Branch, tag or commit of a name; None is "main".
        progress: Whether to show a progress bar while loading; None shows it on a terminal.
        **options: Fields of `RunnerOptions`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        progress: bool | None = None,
        **options: Unpack[RunnerKwargs],
    ) -> None:
        root = find_model(model, revision)
        self.model: LoadedModel = load_model(root, RunnerOptions(**options), progress=progress)
        try:
            tokenizer = Tokenizer.from_dir(root, self.model.config.vocab_size)
        except Mrv1Error:
            self.model.runner.close()
            self.model.device.close()
            raise
        self._start(tokenizer)

    @classmethod
    def from_model(cls, model: LoadedModel, tokenizer: Tokenizer) -> Engine:
        """An engine over a model that is loaded already; closing the engine closes the model."""
        engine = cls.__new__(cls)
        engine.model = model
        engine._start(tokenizer)
        return engine

    def _start(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        options = _core.EngineOptions(background=False)
        self._native = _core.Engine(self.model.runner, options)
        self._requests: dict[str, _Request] = {}
        self._lock = threading.RLock()

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
    ) -> list[int]:
        """Queues a request; returns its prompt's token ids.

        Args:
            request_id: The caller's name for it, unique among the requests whose last update
                `step` has not returned yet.
            prompt: Text, or token ids.
            params: Sampling parameters; the defaults if None.

        Raises:
            RequestError: It cannot be admitted, now or ever; other requests are unhurt.
        """
        if not isinstance(request_id, str):
            raise RequestError(field="request_id", value=request_id, allowed="a string")
        if params is None:
            params = SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RequestError(
                request_id=request_id, field="params", value=params, allowed="SamplingParams"
            )
        token_ids = self.check_prompt(request_id, prompt)
        model = self.model
        params.validate_for(model.config.vocab_size, model.max_model_len, request_id)
        spec = make_row_spec(
            token_ids,
            params,
            eos_token_ids=model.config.eos_token_ids,
        )
        detokenizer = IncrementalDetokenizer(self.tokenizer, params) if params.detokenize else None
        with self._lock:
            try:
                self._native.add_request(request_id, spec)
            except (RequestError, InvalidArgumentError) as error:
                raise RequestError(str(error), request_id=request_id) from None
            self._requests[request_id] = _Request(params, detokenizer)
        return token_ids

    def check_prompt(self, request_id: str, prompt: str | Sequence[int]) -> list[int]:
        """Returns the token ids of a prompt that the model can take.

        Raises:
            RequestError: It is empty, too long, no prompt at all, or has an id out of range.
        """
        vocab, limit = self.model.config.vocab_size, self.model.max_model_len
        if not isinstance(prompt, (str, Sequence)) and hasattr(prompt, "tolist"):
            prompt = prompt.tolist()  # a NumPy array
        if isinstance(prompt, str):
            token_ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
            token_ids = []
            for index, token in enumerate(prompt):
                if isinstance(token, bool) or not hasattr(token, "__index__"):
                    raise RequestError(
                        request_id=request_id,
                        field=f"prompt[{index}]",
                        value=token,
                        allowed="a token id",
                    )
                if not 0 <= int(token) < vocab:
                    raise RequestError(
                        request_id=request_id,
                        field=f"prompt[{index}]",
                        value=int(token),
                        allowed=f"in [0, {vocab})",
                    )
                token_ids.append(int(token))
        else:
            raise RequestError(
                request_id=request_id,
                field="prompt",
                value=prompt,
                allowed="a string or a sequence of token ids",
            )
        if not token_ids:
            raise RequestError(
                request_id=request_id, field="prompt", value=prompt, allowed="at least one token"
            )
        if len(token_ids) >= limit:
            raise RequestError(
                f"has {len(token_ids)} tokens",
                request_id=request_id,
                field="prompt",
                allowed=f"at most {limit - 1} tokens, one less than max_model_len = {limit}",
            )
        return token_ids

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        with self._lock:
            return self._native.has_unfinished()

    def abort(self, request_id: str) -> bool:
        """Ends a request; its last update comes with the next `step`. False if it has ended."""
        with self._lock:
            return self._native.abort(request_id)

    def step(self) -> list[RequestUpdate]:
        """Launches the next step and returns the news of the oldest one that was running.

        A request's last update has a finish_reason. The list may be empty.
        """
        with self._lock:
            updates = []
            for output in self._native.step():
                update = self._update(output)
                if update is not None:
                    updates.append(update)
                    if update.finish_reason is not None:
                        del self._requests[update.request_id]
            if not self._requests:
                # A stop string may have ended the last request: bring its row and blocks home.
                self._native.step()
            report_notices(self.model.runner)
            return updates

    def _update(self, output: _core.RequestOutput) -> RequestUpdate | None:
        request = self._requests.get(output.id)
        if request is None:
            return None
        reason = _ENDS.get(output.end)
        token_ids = tuple(output.token_ids)
        stop_reason: str | int | None = None
        if reason == "stop" and token_ids[-1] in request.params.stop_token_ids:
            stop_reason = token_ids[-1]
        text = ""
        if request.detokenizer is not None:
            pieces: list[StreamPiece] = []
            if token_ids and reason != "stop":
                pieces.append(request.detokenizer.push(token_ids[-1]))
            if reason is not None and not any(piece.stopped for piece in pieces):
                pieces.append(request.detokenizer.finish())
            text = "".join(piece.text for piece in pieces)
            stopped = next((piece.stopped for piece in pieces if piece.stopped is not None), None)
            if stopped is not None:
                if reason is None:
                    self._native.abort(output.id, report=False)
                if reason in (None, "length", "stop"):
                    reason, stop_reason = "stop", stopped
        return RequestUpdate(
            request_id=output.id,
            text=text,
            token_ids=token_ids,
            finish_reason=reason,
            stop_reason=stop_reason,
            error=output.error or None,
        )

    def stats(self) -> dict[str, int]:
        """Counts by name, as of `_core.Engine.stats`."""
        with self._lock:
            counts: dict[str, int] = self._native.stats()
            return counts

    def check_idle(self) -> None:
        """Checks that no request has left a row or block behind.

        Raises:
            InternalError: Something runs, or leaked.
        """
        with self._lock:
            self._native.check_idle()

    def close(self) -> None:
        """Frees memory and threads. Using the engine afterwards raises ClosedError."""
        with self._lock:
            self._native.close()
            self.model.runner.close()
            self.model.device.close()
