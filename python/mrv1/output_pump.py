# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""From the native engine's outputs to updates: text, stop strings, callbacks.

Everything here that waits can be interrupted by Ctrl-C. `threading.Condition` cannot: an interrupt
within its methods may leave its lock held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from mrv1 import _core
from mrv1._notices import report_notices
from mrv1.errors import ClosedError, InternalError, RequestError
from mrv1.logprobs import prompt_token_logprobs, token_logprobs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mrv1.logprobs import Logprob
    from mrv1.sampling_params import SamplingParams
    from mrv1.text_stream import TextStream
    from mrv1.tokenizer import Tokenizer

    Callback: TypeAlias = Callable[["RequestUpdate"], None]

FinishReason = Literal["stop", "length", "abort", "error"]
# A stop string, a stop token, or a stop sequence; None for EOS.
StopReason: TypeAlias = str | int | tuple[int, ...] | None

_LOG: Final = logging.getLogger("mrv1")
_NONE: Final = _core.RequestEnd.NONE
_ENDS: Final[dict[_core.RequestEnd, FinishReason]] = {
    _core.RequestEnd.STOP: "stop",
    _core.RequestEnd.LENGTH: "length",
    _core.RequestEnd.ABORT: "abort",
    _core.RequestEnd.ERROR: "error",
}
# The thread looks whether it is still wanted at least this often.
_LONGEST_WAIT_S: Final = 60.0
# At the interpreter's end, a callback that does not return is left behind after this.
_EXIT_WAIT_S: Final = 10.0


@dataclasses.dataclass(slots=True)
class RequestUpdate:
    """News of one sample of a request.

    Attributes:
        request_id: The request.
        text: Text that is new; may be empty, since text that could become a stop string, or half
            of a character, is held back.
        token_ids: Tokens that are new: none, one or several.
        finish_reason: Why the sample ended with this update; None while it runs.
        stop_reason: What stopped it: a stop string, a token id of stop_token_ids, or one of
            stop_sequences; None for EOS.
        error: What went wrong, with finish_reason "error".
        index: Which sample, below the request's n.
        finished: Whether this is the request's last update, of all its samples.
        num_cached_tokens: Tokens of the prompt that were there already, from the prefix cache or
            another sample, and were not computed for this one.
        num_draft_tokens: Tokens that were drafted for this sample so far.
        num_accepted_tokens: Drafted tokens that turned out to be its tokens.
        logprobs: For each new token a mapping from token id to `Logprob`: its own first, then those
            of the most likely ones; None without SamplingParams.logprobs.
        prompt_logprobs: The same for the tokens of the prompt, None for the first of them: with the
            first token of one of the samples. None in all other updates.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = None
    error: str | None = None
    index: int = 0
    finished: bool = False
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class Request:
    """A request on its way.

    Args:
        request_id: The caller's name for it.
        params: Its parameters.
        callback: Takes its updates; None leaves them to `OutputPump.take`.
        texts: One for each sample; None where no text is wanted.
        tokenizer: What gives the texts of tokens in `Logprob`.
    """

    __slots__ = (
        "callback",
        "dropped",
        "ended",
        "name",
        "num_running",
        "params",
        "request_id",
        "texts",
        "tokenizer",
    )

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        callback: Callback | None,
        texts: list[TextStream] | None,
        tokenizer: Tokenizer,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.callback = callback
        self.texts = texts
        self.tokenizer = tokenizer
        # Of the native engine, never used twice: an output cannot be taken for that of a later
        # request of the same id.
        self.name = ""
        self.ended = [False] * params.n
        self.num_running = params.n
        self.dropped = False


def _ticket(waiting: list[threading.Lock]) -> threading.Lock:
    """A held lock that `_wake` releases: acquiring it waits for that."""
    ticket = threading.Lock()
    ticket.acquire()
    waiting.append(ticket)
    return ticket


def _wake(waiting: list[threading.Lock]) -> None:
    while waiting:
        waiting.pop().release()


class OutputPump:
    """What an `Engine` shares with its output thread, which does not keep the engine alive.

    Args:
        runners: The native runners of the engine, of all ranks with requests of their own.
        native: The native engine.
        background: Whether a thread of its own drains the native engine; without it `step` does.
    """

    def __init__(
        self, runners: Sequence[_core.ModelRunner], native: _core.Engine, *, background: bool
    ) -> None:
        self.native = native
        self.requests: dict[str, Request] = {}
        self._runners = runners
        self._background = background
        self._names = itertools.count()
        # Native name -> request that may still have outputs.
        self._running: dict[str, Request] = {}
        self._outputs: deque[_core.RequestOutput] = deque()
        # Appended to without the lock, so this is always the same list.
        self._news: list[tuple[Request, RequestUpdate]] = []
        # Held for moments only: never while something waits, or runs code of users. It may be taken
        # twice: the collector may end an engine on any thread at any time.
        self._lock = threading.RLock()
        self._step_lock = threading.RLock()
        self._waiting: list[threading.Lock] = []
        self._idle: list[threading.Lock] = []
        self.stopping = self._abandoned = self._calls_last = False
        self._release: Callable[[], None] | None = None
        self._process = os.getpid()
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="mrv1-output", daemon=True)
            self._thread.start()

    # --- requests ---------------------------------------------------------------------------------

    def add(
        self,
        request: Request,
        row: _core.RowSpec,
        *,
        priority: int,
        cache_salt: int,
        skip_prefix_cache: bool,
        grammar: _core.Grammar | None = None,
        rank: int | None = None,
    ) -> None:
        """Queues a request.

        Raises:
            RequestError: Its id is in use, or it could never run.
            ClosedError: The engine is closing.
        """
        with self._lock:
            if self.stopping:
                raise ClosedError("engine is closed")
            if self._failure is not None:
                raise InternalError(self._failure)
            if request.request_id in self.requests:
                raise RequestError("an unfinished request has this id")
            request.name = str(next(self._names))
            try:
                self._running[request.name] = self.requests[request.request_id] = request
                self.native.add_request(
                    request.name,
                    row,
                    priority=priority,
                    n=request.params.n,
                    cache_salt=cache_salt,
                    skip_prefix_cache=skip_prefix_cache,
                    grammar=grammar,
                    rank=rank,
                )
            except BaseException:  # an interrupt may come at any point of it
                self._forget(request)
                _wake(self._waiting)
                self.native.abort(request.name, report=False)
                raise
            _wake(self._idle)

    def abort(self, request_id: str, *, report: bool) -> bool:
        """Ends a request; without `report` no update of it comes any more."""
        with self._lock:
            request = self.requests.get(request_id)
            if request is None:
                return False
            any_left = self.native.abort(request.name, report=report)
            if not report:
                self._forget(request)
                _wake(self._waiting)
            return any_left

    def _forget(self, request: Request) -> None:
        request.dropped = True
        self._running.pop(request.name, None)
        if self.requests.get(request.request_id) is request:
            del self.requests[request.request_id]

    @property
    def has_unfinished(self) -> bool:
        """Whether a last update was not taken yet, or its callback has not returned."""
        return bool(self.requests) or self._calls_last

    # --- whoever takes updates --------------------------------------------------------------------

    def wait(self) -> list[RequestUpdate]:
        """Waits for news and takes them; [] if nothing is unfinished, or the news were others'."""
        with self._lock:
            # A callback would wait for itself.
            if self._news or not self.has_unfinished or self._is_output_thread:
                return self._take()
            ticket = _ticket(self._waiting)
        ticket.acquire()
        with self._lock:
            return self._take()

    def step(self) -> list[RequestUpdate]:
        """Takes a step on this thread, and the news that it brings."""
        with self._step_lock:
            # What an interrupt left over goes first.
            self.native.step_into(self._outputs)
            self._deliver()
            if not self._running:
                # Nobody waits for anything any more: bring the last rows and blocks home.
                self.native.step_into(self._outputs)
                self._deliver()
            with self._lock:
                return self._take()

    def _take(self) -> list[RequestUpdate]:
        news = self._news[:]
        for request, update in news:
            if update.finished and self.requests.get(request.request_id) is request:
                del self.requests[request.request_id]
        updates = [update for request, update in news if not request.dropped]
        del self._news[: len(news)]
        return updates

    # --- whoever makes them -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                ticket = None
                with self._lock:
                    if self._abandoned or (self.stopping and not self._running):
                        return
                    if not self._running:
                        ticket = _ticket(self._idle)
                if ticket is not None:
                    ticket.acquire()
                    continue
                outputs = self.native.wait_outputs(_LONGEST_WAIT_S)
                if outputs:
                    self._outputs.extend(outputs)
                    self._deliver()
                else:
                    self._end_lost()
        except BaseException as error:
            if self._abandoned:
                return  # its callback took too long, and the native engine is closed
            _LOG.exception("the output thread failed")
            self._failure = f"the output thread failed: {type(error).__name__}: {error}"
            self._end_all(self._failure)
        finally:
            if self._release is not None:
                self._release()

    def _end_lost(self) -> None:
        """Ends requests that the native engine does not have, should an interrupt leave some."""
        with self._lock:
            lost = [] if self.native.has_unfinished() else list(self._running.values())
        for request in lost:
            self._end_with_error(request, "the request was lost by an interrupt")
        if lost:
            with self._lock:
                _wake(self._waiting)

    def _end_all(self, error: str) -> None:
        """Ends all requests, so that nobody waits for what will not come."""
        with self._lock:
            left = list(self._running.values())
        for request in left:
            self._end_with_error(request, error)
        with self._lock:
            _wake(self._waiting)

    def _deliver(self) -> None:
        """Turns outputs into updates, and hands them to callbacks or lays them out for `wait`."""
        outputs, running = self._outputs, self._running
        while outputs:
            output = outputs.popleft()
            request = running.get(output.id)
            if request is None:
                # Nobody may hear of it: the call that added it was interrupted.
                self.native.abort(output.id, report=False)
                continue
            index = output.index
            if request.ended[index]:
                continue
            try:
                update = self._update(request, output)
            except Exception as error:
                _LOG.exception("no update could be made for request %r", request.request_id)
                self._end_with_error(request, f"{type(error).__name__}: {error}")
                continue
            if update.finish_reason is not None:
                request.ended[index] = True
                request.num_running -= 1
                if request.num_running == 0:
                    update.finished = True
                    self._end(request)
            if request.callback is None:
                self._news.append((request, update))
            elif not request.dropped:
                self._call(request, request.callback, update)
                self._calls_last = False
        report_notices(self._runners)
        # Under the lock even if nobody seems to wait: somebody may be about to.
        with self._lock:
            _wake(self._waiting)

    def _end(self, request: Request) -> None:
        """A request has no more outputs; whoever gets its last update may use its id again."""
        with self._lock:
            self._running.pop(request.name, None)
            if request.callback is not None and self.requests.get(request.request_id) is request:
                self._calls_last = not request.dropped
                del self.requests[request.request_id]

    def _update(self, request: Request, output: _core.RequestOutput) -> RequestUpdate:
        end, token_ids, params = output.end, output.token_ids, request.params
        reason = None if end is _NONE else _ENDS[end]
        stop_reason: StopReason = None
        stop_tokens: tuple[int, ...] = ()
        if reason == "stop":
            stop_tokens = (token_ids[-1],)
            if output.stop_sequence >= 0:
                stop_reason = stop_tokens = params.stop_sequences[output.stop_sequence]
            elif token_ids[-1] in params.stop_token_ids:
                stop_reason = token_ids[-1]
        text = ""
        count = len(token_ids)
        if request.texts is not None:
            stream = request.texts[output.index]
            stopped = None
            # What stopped the request is not text by itself.
            for place in range(len(token_ids) - (reason == "stop")):
                piece, stopped = stream.push(token_ids[place])
                text += piece
                if stopped is not None:
                    count = place + 1
                    break
            if stopped is None and reason is not None:
                piece, stopped = stream.finish(stop_tokens)
                text += piece
            if stopped is not None:
                if reason is None:
                    self.native.abort(request.name, index=output.index, report=False)
                if reason != "abort" and reason != "error":
                    reason, stop_reason = "stop", stopped
        decode = request.tokenizer.decode_token if params.detokenize else None
        logprobs = None
        if params.logprobs is not None:
            found = output.logprobs
            logprobs = [] if found is None else token_logprobs(len(token_ids), *found, decode)
        prompt = output.prompt_logprobs
        return RequestUpdate(
            request.request_id,
            text,
            tuple(token_ids[:count]),
            reason,
            stop_reason,
            (output.error or None) if reason == "error" else None,
            output.index,
            False,
            output.num_cached_tokens,
            output.num_draft_tokens,
            output.num_accepted_tokens,
            None if logprobs is None else logprobs[:count],
            None if prompt is None else prompt_token_logprobs(*prompt, decode),
        )

    def _call(self, request: Request, callback: Callback, update: RequestUpdate) -> None:
        try:
            callback(update)
        except BaseException as error:
            if not self._background and not isinstance(error, Exception):
                raise  # Ctrl-C, on the thread of whoever steps
            _LOG.exception("the callback of request %r failed", request.request_id)
            if not update.finished:
                self._end_with_error(request, f"callback raised {type(error).__name__}: {error}")

    def _end_with_error(self, request: Request, error: str) -> None:
        """Ends all samples of a request; its last update says why, if anybody takes it."""
        running = [index for index, ended in enumerate(request.ended) if not ended]
        self.native.abort(request.name, report=False)
        self._end(request)
        for index in running:
            request.ended[index] = True
            update = RequestUpdate(
                request.request_id, "", (), "error", None, error, index, index == running[-1]
            )
            if request.callback is None:
                self._news.append((request, update))
            elif not request.dropped:
                try:
                    request.callback(update)
                except Exception:
                    _LOG.exception("the callback of request %r failed again", request.request_id)
        self._calls_last = False

    # --- the end ----------------------------------------------------------------------------------

    @property
    def _is_output_thread(self) -> bool:
        return self._thread is threading.current_thread()

    def close(self, release: Callable[[], None]) -> None:
        """Ends all requests with an abort, delivers their updates, and calls `release`.

        It waits for that, unless a callback calls it: then the output thread does it on its own.
        """
        with self._lock:
            self.stopping = True
            for request in self._running.values():
                self.native.abort(request.name)
            if self._is_output_thread:
                self._release = release
            _wake(self._idle)
        if self._is_output_thread:
            return
        if self._thread is not None:
            self._thread.join()
        elif self._running:
            with self._step_lock:
                self.native.step_into(self._outputs)
                self._deliver()
        with self._lock:
            _wake(self._waiting)
        release()

    def abandon(self) -> None:
        """Ends the thread, whatever is unfinished: nobody is left to hear of it."""
        if os.getpid() != self._process:
            return  # a forked child has no such thread, and its locks may be held for ever
        with self._lock:
            self.stopping = self._abandoned = True
            _wake(self._idle)
            _wake(self._waiting)
        if self._is_output_thread:
            return
        if self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(ClosedError):
                self.native.wake()
            self._thread.join(_EXIT_WAIT_S)
        # Also where something outlives the interpreter that refers to the engine: no step may be in
        # flight when the process, and a GPU's driver in it, is torn down.
        self.native.close()
