# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""`Engine`: requests in, text and tokens out, over the native scheduler."""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mrv1 import _core
from mrv1._closing import Closing
from mrv1.admission import check_bad_words, check_stops
from mrv1.errors import ClosedError, InternalError, InvalidArgumentError, Mrv1Error, RequestError
from mrv1.hub import find_model
from mrv1.loader import LoadedModel, RunnerKwargs, RunnerOptions, load_model
from mrv1.output_pump import FinishReason, OutputPump, Request, RequestUpdate
from mrv1.runner import make_row_spec
from mrv1.sampling_params import MAX_INT32, SamplingParams
from mrv1.structured_outputs import GrammarCompiler
from mrv1.text_stream import TextStream
from mrv1.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mrv1.output_pump import Callback

__all__ = ["Engine", "FinishReason", "RequestUpdate"]

# Time that steps in flight have to retire before an engine counts as not idle.
_IDLE_WAIT_S = 10.0
_IDLE_POLL_S = 0.0005


class Engine(Closing):
    """Continuous batching over one model; see docs/serving.md, and src/cpp/engine/README.md.

    A native thread schedules and launches steps. An output thread makes text, looks for stop
    strings and calls callbacks. Methods may be called from any thread, and from callbacks.

    With `background=False` there are no such threads: each `step` launches one step and does the
    rest on the thread that calls it.

    Args:
        model: A Hugging Face model directory, with tokenizer.json, or the name of a model in the
            local Hugging Face cache ("org/name").
        revision: Branch, tag or commit of a name; None is "main".
        progress: Whether to show a progress bar while loading; None shows it on a terminal.
        enable_prefix_caching: Whether equal beginnings of prompts share computed KV blocks.
        background: Whether threads of the engine's own run it.
        **options: Fields of `RunnerOptions`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        progress: bool | None = None,
        enable_prefix_caching: bool = True,
        background: bool = True,
        **options: Unpack[RunnerKwargs],
    ) -> None:
        native_options = _engine_options(enable_prefix_caching, background)
        root = find_model(model, revision)
        self.model: LoadedModel = load_model(root, RunnerOptions(**options), progress=progress)
        try:
            tokenizer = Tokenizer.from_dir(root, self.model.config.vocab_size)
        except Mrv1Error:
            _Release(None, self.model)()
            raise
        self._start(tokenizer, native_options)

    @classmethod
    def from_model(
        cls,
        model: LoadedModel,
        tokenizer: Tokenizer,
        *,
        enable_prefix_caching: bool = True,
        background: bool = True,
    ) -> Engine:
        """An engine over a model that is loaded already; closing the engine closes the model."""
        options = _engine_options(enable_prefix_caching, background)
        engine = cls.__new__(cls)
        engine.model = model
        engine._start(tokenizer, options)
        return engine

    def _start(self, tokenizer: Tokenizer, options: _core.EngineOptions) -> None:
        self.tokenizer = tokenizer
        self.background = options.background
        self._process = os.getpid()
        config = self.model.config
        self._grammars = GrammarCompiler(tokenizer, config.vocab_size, config.eos_token_ids)
        self._native = _core.Engine(self.model.runner, options)
        self._pump = OutputPump(self.model.data_runners, self._native, background=self.background)
        # For an engine that nobody closes, at the latest when the interpreter ends.
        self._finalizer = weakref.finalize(self, self._pump.abandon)

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        callback: Callback | None = None,
        cache_salt: str | None = None,
        skip_prefix_cache: bool = False,
        forced_token_ids: Sequence[int] = (),
        data_parallel_rank: int | None = None,
    ) -> list[int]:
        """Queues a request; returns its prompt's token ids.

        Args:
            request_id: The caller's name for it, unique among the requests whose last update
                was not delivered yet.
            prompt: Text, or token ids.
            params: Sampling parameters; the defaults if None.
            priority: A lower one is more urgent; equal ones run in order of arrival.
            callback: Takes each update of the request, in order, on the output thread; `step` does
                not return them then. An exception in it ends the request with an error. It should
                not take long, as all requests wait for it.
            cache_salt: Requests share cached blocks only where it is equal.
            skip_prefix_cache: Neither take blocks from the prefix cache nor leave any there.
            forced_token_ids: The first outputs of all samples, whatever is drawn; for testing, with
                `force_tokens`.
            data_parallel_rank: Which of the ranks with requests of their own takes it; None is the
                one with the fewest samples that are unfinished.

        Raises:
            RequestError: It cannot be admitted, now or ever; other requests are unhurt.
            ClosedError: The engine was closed.
        """
        if not isinstance(request_id, str):
            raise RequestError(field="request_id", value=request_id, allowed="a string")
        if params is None:
            params = SamplingParams()
        _check_arguments(request_id, params, priority, callback, cache_salt, skip_prefix_cache)
        ranks = self.model.data_parallel_size
        if data_parallel_rank is not None and (
            isinstance(data_parallel_rank, bool)
            or not isinstance(data_parallel_rank, int)
            or not 0 <= data_parallel_rank < ranks
        ):
            raise RequestError(
                request_id=request_id,
                field="data_parallel_rank",
                value=data_parallel_rank,
                allowed=f"None, or an integer in [0, {ranks - 1}]",
            )
        self._check_open()
        token_ids = self.check_prompt(request_id, prompt)
        model = self.model
        params.validate_for(
            model.config.vocab_size,
            model.max_model_len,
            request_id,
            max_speculative_tokens=model.num_speculative_tokens,
            max_logprobs=model.max_logprobs,
        )
        bad_words = self._bad_words(request_id, params)
        check_stops(params, self.tokenizer, request_id)
        if params.n > model.max_num_seqs:
            raise RequestError(
                request_id=request_id,
                field="n",
                value=params.n,
                allowed=f"at most max_num_seqs = {model.max_num_seqs}",
            )
        grammar = None
        if params.structured_outputs is not None:
            grammar = self._grammars.compile(params, request_id)
        texts = None
        if params.detokenize:
            texts = [TextStream(self.tokenizer, params) for _ in range(params.n)]
        try:
            spec = make_row_spec(
                token_ids,
                params,
                vocab_size=model.config.vocab_size,
                eos_token_ids=model.config.eos_token_ids,
                bad_words=bad_words,
                forced_token_ids=forced_token_ids,
            )
            self._pump.add(
                Request(request_id, params, callback, texts, self.tokenizer),
                spec,
                priority=int(priority),
                cache_salt=_salt_number(cache_salt),
                skip_prefix_cache=skip_prefix_cache,
                grammar=grammar,
                rank=data_parallel_rank,
            )
        except (RequestError, InvalidArgumentError) as error:
            raise RequestError(str(error), request_id=request_id) from None
        return token_ids

    def _bad_words(self, request_id: str, params: SamplingParams) -> list[tuple[int, ...]]:
        """The token sequences that params.bad_words forbid."""
        try:
            sequences = self.tokenizer.encode_bad_words(params.bad_words)
        except RequestError as error:
            raise RequestError(
                request_id=request_id, field=error.field, value=error.value, allowed=error.allowed
            ) from None
        check_bad_words(params, sequences, self.model.config.vocab_size, request_id)
        return sequences

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
        """Whether the last update of a request was not returned by `step`, or called back, yet.

        Without `background` also whether a step is still in flight.
        """
        native = self._check_open()
        return self._pump.has_unfinished or (native and not self.background)

    def abort(self, request_id: str, *, report: bool = True) -> bool:
        """Ends a request. False if it has ended, or there is none of that name.

        Args:
            request_id: Its name.
            report: Whether its last update, with finish_reason "abort", is still delivered. Without
                it the name is free at once; a callback that runs may still return after that.
        """
        self._check_open()
        return self._pump.abort(request_id, report=report)

    def step(self) -> list[RequestUpdate]:
        """Waits for news and returns them; [] at once if nothing is unfinished.

        The list may also be empty because callbacks, or other threads in `step`, got the news. A
        request's last update is `finished`. Ctrl-C ends the wait and loses nothing.

        Without `background`: launches the next step, and returns the news of the oldest one that
        was running.
        """
        self._check_open()
        return self._pump.wait() if self.background else self._pump.step()

    def _check_open(self) -> bool:
        """Whether the native engine has work; refuses a closed engine, and one of another process.

        No lock of this process is taken before: in a forked child it might be held for ever.
        """
        has_work = self._native.has_unfinished()
        if self._pump.stopping:
            raise ClosedError("engine is closed")
        return has_work

    def stats(self) -> dict[str, int]:
        """Counts by name, as of `_core.Engine.stats`."""
        return self._native.stats()

    def check_idle(self) -> None:
        """Checks that no request has left a row or block behind, once steps in flight have ended.

        Raises:
            InternalError: Something runs, or leaked.
        """
        self._check_open()
        if self._pump.has_unfinished:
            raise InternalError(f"unfinished requests: {', '.join(list(self._pump.requests)[:8])}")
        end = time.monotonic() + _IDLE_WAIT_S
        while self.background and self._native.has_unfinished() and time.monotonic() < end:
            time.sleep(_IDLE_POLL_S)
        self._native.check_idle()

    def close(self) -> None:
        """Ends all requests with an abort, delivers that, and frees memory and threads.

        Using the engine afterwards raises ClosedError. A callback may call it: the engine is then
        closed when the callback has returned.
        """
        if os.getpid() != self._process:
            _Release(self._native, self.model)()  # a forked child lets go of its parent's engine
            return
        self._pump.close(_Release(self._native, self.model))


class _Release:
    """Closes what an engine is made of; does not keep the engine itself alive."""

    def __init__(self, native: _core.Engine | None, model: LoadedModel) -> None:
        self._native = native
        self._model = model

    def __call__(self) -> None:
        if self._native is not None:
            self._native.close()
        self._model.close()


def _engine_options(enable_prefix_caching: object, background: object) -> _core.EngineOptions:
    for field, value in (
        ("enable_prefix_caching", enable_prefix_caching),
        ("background", background),
    ):
        if not isinstance(value, bool):
            raise InvalidArgumentError(field=field, value=value, allowed="True or False")
    return _core.EngineOptions(bool(enable_prefix_caching), bool(background))


def _check_arguments(
    request_id: str,
    params: object,
    priority: object,
    callback: object,
    cache_salt: object,
    skip_prefix_cache: object,
) -> None:
    """Checks the types of what `add_request` takes."""
    is_priority = isinstance(priority, int) and not isinstance(priority, bool)
    for field, value, good, allowed in (
        ("params", params, isinstance(params, SamplingParams), "SamplingParams"),
        (
            "priority",
            priority,
            is_priority and -MAX_INT32 <= priority <= MAX_INT32,  # type: ignore[operator]
            f"an integer in [-{MAX_INT32}, {MAX_INT32}]",
        ),
        ("callback", callback, callback is None or callable(callback), "None or a function"),
        (
            "cache_salt",
            cache_salt,
            cache_salt is None or (isinstance(cache_salt, str) and cache_salt),
            "None or a string that is not empty",
        ),
        (
            "skip_prefix_cache",
            skip_prefix_cache,
            isinstance(skip_prefix_cache, bool),
            "True or False",
        ),
    ):
        if not good:
            raise RequestError(request_id=request_id, field=field, value=value, allowed=allowed)


def _salt_number(salt: str | None) -> int:
    """64 bits for a salt; 0 for none."""
    if salt is None:
        return 0
    digest = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
