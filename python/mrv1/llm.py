# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""`LLM`: a model directory in, text out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import numbers
import os
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, cast

from mrv1._closing import Closing
from mrv1.engine import Engine, FinishReason, RequestUpdate
from mrv1.errors import ClosedError, ForkError, InternalError, RequestError
from mrv1.loader import LoadedModel, RunnerKwargs
from mrv1.progress import progress_bar
from mrv1.sampling_params import SamplingParams
from mrv1.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack

    from mrv1.chat_template import ChatOptions, Conversation

    # A text or token ids, or several of either. One union of what a sequence holds, not one of
    # sequences: type checkers take a list of both kinds only so.
    Prompts: TypeAlias = (
        str
        | Sequence[int | str | Sequence[int] | npt.NDArray[np.integer[Any]]]
        | npt.NDArray[np.integer[Any]]
    )

# Batches from this size on get a progress bar.
_LONG_BATCH = 8


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """One finished request.

    Attributes:
        request_id: "llm-" and its number among this LLM's requests.
        prompt_token_ids: Of the prompt.
        text: What was generated, without EOS and stop tokens, up to the stop string that ended it;
            with it under include_stop_str_in_output. Empty without detokenize.
        token_ids: All tokens generated, the one that stopped the request included.
        finish_reason: "stop" (EOS, a stop token or a stop string), "length", "abort" or "error".
        stop_reason: The stop string, or the id of stop_token_ids, that ended it; None for EOS.
        error: What went wrong, with finish_reason "error".
        prompt_tokens_per_s: Prompt tokens over the time from submission to the first token,
            waiting included.
        generation_tokens_per_s: Tokens after the first over the time from the first to the last.
        peak_memory_mb: Highest resident memory of this process so far, in 10^6 bytes.
    """

    request_id: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    error: str | None
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    peak_memory_mb: float


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """What is new of one of the streamed prompts.

    Attributes:
        index: Which prompt.
        text: New text, possibly empty.
        token_ids: New tokens.
        result: The whole result, with a prompt's last chunk.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    result: GenerationResult | None = None


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, in 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class _Job:
    """One request on its way: what has come in, and what a consumer has not yet taken."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.prompt_token_ids: list[int] = []
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.unread: deque[RequestUpdate] = deque()
        self.start = time.perf_counter()
        self.first = self.last = 0.0
        self.end: RequestUpdate | None = None

    def take(self, update: RequestUpdate) -> None:
        if update.token_ids:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        self.text.append(update.text)
        self.token_ids.extend(update.token_ids)
        self.unread.append(update)
        if update.finish_reason is not None:
            self.end = update

    def result(self) -> GenerationResult:
        assert self.end is not None
        assert self.end.finish_reason is not None
        count = len(self.token_ids)
        waited, ran = self.first - self.start, self.last - self.first
        return GenerationResult(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            text="".join(self.text),
            token_ids=self.token_ids,
            finish_reason=self.end.finish_reason,
            stop_reason=self.end.stop_reason,
            error=self.end.error,
            prompt_tokens_per_s=len(self.prompt_token_ids) / waited if waited > 0 else 0.0,
            generation_tokens_per_s=(count - 1) / ran if ran > 0 else 0.0,
            peak_memory_mb=peak_memory_mb(),
        )


class LLM(Closing):
    """A language model that is ready to generate.

    Methods may be called from several threads; their requests share the steps.

    Attributes:
        engine: What runs the requests, to look at (`stats`). The LLM calls its `step`, and drops
            the updates of requests that someone else added.

    Args:
        model: A Hugging Face model directory: config.json, tokenizer.json, safetensors, and
            generation_config.json if there is one. Or the name of a model in the local Hugging
            Face cache ("org/name"); nothing is downloaded. A path that exists wins over a name.
        revision: Branch, tag or commit of a name; None is "main".
        progress: Whether to show progress bars for loading and long batches; None shows them on a
            terminal, unless MRV1_NO_PROGRESS is set.
        **options: Fields of `RunnerOptions`: device, dtype, max_num_seqs, max_model_len, ...

    Raises:
        InvalidArgumentError: An argument, or a variable of the environment, is not allowed.
        ConfigError, WeightError: The directory is damaged, not supported, or nowhere.
        OutOfMemoryError: Too little memory, saying for what.
        DeviceError: No such device.

    Example:
        >>> llm = LLM("path/to/model")
        >>> llm.generate("Once upon a time", SamplingParams(max_tokens=32))[0].text
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        progress: bool | None = None,
        **options: Unpack[RunnerKwargs],
    ) -> None:
        self._progress = progress
        self.engine = Engine(model, revision=revision, progress=progress, **options)
        self._numbers = itertools.count()
        self._jobs: dict[str, _Job] = {}
        # Held from a step until its updates have reached their jobs.
        self._lock = threading.RLock()

    @property
    def model(self) -> LoadedModel:
        """Config, device, resolved sizes and start-up times."""
        return self.engine.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The directory's tokenizer: `encode` and `decode`."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[GenerationResult]:
        """Generates for one prompt or many; waits for all.

        Args:
            prompts: A text; token ids as a sequence or a NumPy array; or a list of either, texts
                and ids mixed as one likes. A sequence of integers is one prompt.
            sampling_params: For all prompts, or one for each. None takes what the model's
                generation_config.json recommends, as vLLM does; `SamplingParams()` does not.
            progress: As for `LLM`, for this call.

        Returns:
            One result a prompt, in order. A single prompt gives a list of one.

        Raises:
            RequestError: A prompt or its parameters cannot be admitted; none of them was started.
            ClosedError: The LLM was closed.
        """
        jobs: list[_Job] = []
        try:
            self._submit(jobs, prompts, sampling_params)
            shown = progress if progress is not None else self._progress
            if len(jobs) < _LONG_BATCH and shown is None:
                shown = False
            done = 0
            with progress_bar("Generating", len(jobs), unit="request", show=shown) as advance:
                while done < len(jobs):
                    self._pump(jobs)
                    finished = sum(job.end is not None for job in jobs)
                    advance(finished - done)
                    done = finished
        finally:
            self._forget(jobs)
        return [job.result() for job in jobs]

    def stream(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[StreamChunk, None, None]:
        """Generates like `generate`, but yields what is new as it comes.

        Requests are submitted, and refused, when this is called. They go on while any call on this
        LLM waits; an iterator that is closed before its end aborts what still runs.

        Args:
            prompts: As for `generate`.
            sampling_params: As for `generate`.

        Yields:
            Chunks of any of the prompts, those of one prompt in order: the texts of a prompt's
            chunks joined are its result's text. The last chunk of each has the result.

        Raises:
            RequestError: A prompt or its parameters cannot be admitted; none of them was started.
            ClosedError: The LLM was closed.
        """
        jobs: list[_Job] = []
        try:
            self._submit(jobs, prompts, sampling_params)
            chunks = self._stream(jobs)
            # Up to its first yield, which says nothing: one that never ran could not clean up.
            next(chunks)
        except BaseException:
            self._forget(jobs)
            raise
        return chunks

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[GenerationResult]:
        """Generates the answer to a conversation or to many, by the directory's chat template.

        Args:
            messages: Messages with "role" and "content", or a list of such conversations.
            sampling_params: As for `generate`.
            progress: As for `generate`.
            **options: chat_template, add_generation_prompt, continue_final_message, tools and
                chat_template_kwargs, as for `ChatTemplates.render`.

        Returns:
            One result a conversation, in order. A single one gives a list of one.

        Raises:
            RequestError: The template refuses a conversation, or as `generate`; none was started.
            ConfigError: The directory has no chat template, or one that is not valid.
            ClosedError: The LLM was closed.

        Example:
            >>> llm.chat([{"role": "user", "content": "Who are you?"}])[0].text
        """
        # What is no list of conversations is one, or refused as one.
        several = (
            isinstance(messages, Sequence) and messages and isinstance(messages[0], list | tuple)
        )
        many = cast("Sequence[Conversation]", messages if several else [messages])
        prompts = [self.tokenizer.encode_chat(chat, **options) for chat in many]
        return self.generate(prompts, sampling_params, progress=progress)

    def _stream(self, jobs: list[_Job]) -> Generator[StreamChunk, None, None]:
        try:
            yield StreamChunk(0, "", ())
            while any(job.end is None or job.unread for job in jobs):
                if not any(job.unread for job in jobs):
                    self._pump(jobs)
                for index, job in enumerate(jobs):
                    while job.unread:
                        update = job.unread.popleft()
                        result = job.result() if update.finish_reason is not None else None
                        yield StreamChunk(index, update.text, update.token_ids, result)
        finally:
            self._forget(jobs)

    def _submit(
        self,
        jobs: list[_Job],
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> None:
        """Adds a job to `jobs` for each prompt; on an error the caller forgets them all."""
        many = _as_list(prompts)
        if sampling_params is None:
            params = [self.model.config.default_sampling.params()] * len(many)
        elif isinstance(sampling_params, SamplingParams):
            params = [sampling_params] * len(many)
        elif isinstance(sampling_params, Sequence):
            params = list(sampling_params)
        else:
            raise RequestError(
                field="sampling_params",
                value=sampling_params,
                allowed="SamplingParams, or one for each prompt",
            )
        if len(params) != len(many):
            raise RequestError(
                f"there are {len(params)} for {len(many)} prompts",
                field="sampling_params",
                allowed="one, or one for each prompt",
            )
        for prompt, chosen in zip(many, params, strict=True):
            # A job is there before its request is, so that an interrupt leaves no request behind.
            # The prefix keeps it apart from names that someone gives to requests of `engine`.
            job = _Job(f"llm-{next(self._numbers)}")
            jobs.append(job)
            self._jobs[job.request_id] = job
            job.prompt_token_ids = self.engine.add_request(job.request_id, prompt, chosen)

    def _pump(self, jobs: list[_Job]) -> None:
        """Takes one step, unless all of these jobs have ended."""
        with self._lock:
            if all(job.end is not None for job in jobs):
                return
            if not self.engine.has_unfinished():
                raise InternalError("the end of a request was lost, as by an interrupt in a step")
            self._step()

    def _step(self) -> None:
        for update in self.engine.step():
            job = self._jobs.get(update.request_id)
            if job is not None:
                job.take(update)

    def _forget(self, jobs: list[_Job]) -> None:
        """Lets go of jobs, aborting those that still run (an error, an interrupt)."""
        if sys.is_finalizing():
            return  # a stream that nobody closed: the process takes everything with it
        with self._lock:
            for job in jobs:
                self._jobs.pop(job.request_id, None)
            # An LLM that was closed, or left in the parent by a fork, has nothing to abort.
            with contextlib.suppress(ClosedError, ForkError):
                running = [job for job in jobs if job.end is None]
                # A sum, since each of them must be aborted.
                if sum(self.engine.abort(job.request_id) for job in running):
                    self._step()

    def close(self) -> None:
        """Frees memory and threads. Using the LLM afterwards raises ClosedError."""
        self.engine.close()


def _as_list(prompts: Prompts) -> list[str | Sequence[int]]:
    """A list of prompts from one prompt or several; a sequence of integers is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        if hasattr(prompts, "tolist"):  # a NumPy array
            return _as_list(prompts.tolist())
        raise RequestError(
            field="prompts",
            value=prompts,
            allowed="a string, token ids, or a list of either",
        )
    many = list(prompts)
    if not many:
        return []
    if all(isinstance(item, numbers.Integral) for item in many):
        return [many]  # type: ignore[list-item]
    return many  # type: ignore[return-value]
