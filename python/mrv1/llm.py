# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""`LLM`: a model directory in, text out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import numbers
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, cast

from mrv1._closing import Closing
from mrv1.engine import Engine
from mrv1.errors import ClosedError, ForkError, InternalError, RequestError
from mrv1.loader import LoadedModel, RunnerKwargs
from mrv1.output_pump import FinishReason, RequestUpdate, StopReason
from mrv1.progress import progress_bar
from mrv1.sampling_params import SamplingParams
from mrv1.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack

    from mrv1.chat_template import ChatOptions, Conversation
    from mrv1.logprobs import Logprob

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
class CompletionOutput:
    """One sample of a prompt.

    Attributes:
        index: Which sample, below the request's n.
        text: What was generated, up to the EOS, stop token, stop sequence or stop string that ended
            it; with that under include_stop_str_in_output. Empty without detokenize.
        token_ids: All tokens generated, the one that stopped the sample included. A stop string
            ends them with the token that completed it.
        finish_reason: "stop" (EOS, a stop token or a stop string), "length", "abort" or "error".
        stop_reason: The stop string, the id of stop_token_ids, or the tuple of stop_sequences, that
            ended it; None for EOS.
        error: What went wrong, with finish_reason "error".
        num_cached_tokens: Tokens of the prompt that were not computed for this sample.
        num_draft_tokens: Tokens that were drafted for it.
        num_accepted_tokens: Drafted tokens that turned out to be its tokens.
        logprobs: For each token a mapping from token id to `Logprob`: its own first, then those of
            the most likely ones; None without SamplingParams.logprobs.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: StopReason
    error: str | None
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    logprobs: list[dict[int, Logprob]] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the log probabilities of its tokens; None without SamplingParams.logprobs."""
        if self.logprobs is None:
            return None
        return sum(
            place[token].logprob for token, place in zip(self.token_ids, self.logprobs, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Attributes:
        prompt_tokens: Of the prompt, once whatever n is.
        completion_tokens: Of all samples; what a stop string cut off does not count.
    """

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """One finished request.

    Attributes:
        request_id: "llm-" and its number among this LLM's requests.
        prompt_token_ids: Of the prompt.
        text: Of the first sample, as are token_ids, finish_reason, stop_reason, error and
            logprobs; see `CompletionOutput`.
        token_ids: See text.
        finish_reason: See text.
        stop_reason: See text.
        error: See text.
        prompt_tokens_per_s: Prompt tokens over the time from submission to the first token,
            waiting included.
        generation_tokens_per_s: Tokens after the first over the time from the first to the last.
        peak_memory_mb: Highest resident memory of this process so far, in 10^6 bytes.
        outputs: All n samples, in order.
        usage: Tokens of the prompt and of all samples.
        num_cached_tokens: Tokens of the prompt that the prefix cache had.
        num_draft_tokens: Tokens that were drafted, for all samples.
        num_accepted_tokens: Drafted tokens that turned out to be tokens of their samples.
        logprobs: See text.
        prompt_logprobs: For each token of the prompt a mapping as `CompletionOutput.logprobs` has,
            None for the first. None without SamplingParams.prompt_logprobs, or if no token came.
    """

    request_id: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: StopReason
    error: str | None
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    peak_memory_mb: float
    outputs: list[CompletionOutput]
    usage: Usage
    num_cached_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafted tokens that were accepted; None where none was drafted."""
        if self.num_draft_tokens == 0:
            return None
        return self.num_accepted_tokens / self.num_draft_tokens


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """What is new of one of the streamed prompts.

    Attributes:
        index: Which prompt.
        text: New text, possibly empty.
        token_ids: New tokens.
        result: The whole result, with a prompt's last chunk.
        sample: Which sample of the prompt, below n.
        finish_reason: Why the sample ended, with its last chunk.
        logprobs: Of the new tokens, as in `CompletionOutput`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    result: GenerationResult | None = None
    sample: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[dict[int, Logprob]] | None = None


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, in 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class _Sample:
    __slots__ = ("last", "logprobs", "text", "token_ids")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None
        self.last: RequestUpdate | None = None

    def output(self) -> CompletionOutput:
        last = self.last
        assert last is not None
        assert last.finish_reason is not None
        return CompletionOutput(
            index=last.index,
            text="".join(self.text),
            token_ids=self.token_ids,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            error=last.error,
            num_cached_tokens=last.num_cached_tokens,
            num_draft_tokens=last.num_draft_tokens,
            num_accepted_tokens=last.num_accepted_tokens,
            logprobs=self.logprobs,
        )


class _Job:
    """One request on its way.

    Its updates are taken by the thread that makes them, so that an interrupt of whoever waits
    loses none.

    Args:
        request_id: Its name in the engine.
        index: Which prompt of its call it is.
        arrivals: Told of each update.
    """

    def __init__(
        self,
        request_id: str,
        index: int,
        arrivals: queue.SimpleQueue[tuple[_Job, RequestUpdate]],
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.prompt_token_ids: list[int] = []
        self.finished = False
        self._arrivals = arrivals
        self._samples: dict[int, _Sample] = {}
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._start = time.perf_counter()
        self._first = self._last = 0.0

    def take(self, update: RequestUpdate) -> None:
        """The callback of the request."""
        sample = self._samples.get(update.index)
        if sample is None:
            sample = self._samples[update.index] = _Sample()
        if update.token_ids:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            sample.token_ids.extend(update.token_ids)
        if update.prompt_logprobs is not None:
            self._prompt_logprobs = update.prompt_logprobs
        if update.logprobs is not None:
            if sample.logprobs is None:
                sample.logprobs = []
            sample.logprobs.extend(update.logprobs)
        if update.text:
            sample.text.append(update.text)
        if update.finish_reason is not None:
            sample.last = update
            self.finished = update.finished
        self._arrivals.put((self, update))

    def result(self) -> GenerationResult:
        outputs = [self._samples[index].output() for index in sorted(self._samples)]
        first = outputs[0]
        count = sum(len(output.token_ids) for output in outputs)
        waited, ran = self._first - self._start, self._last - self._first
        return GenerationResult(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            stop_reason=first.stop_reason,
            error=first.error,
            prompt_tokens_per_s=len(self.prompt_token_ids) / waited if waited > 0 else 0.0,
            generation_tokens_per_s=(count - 1) / ran if ran > 0 else 0.0,
            peak_memory_mb=peak_memory_mb(),
            outputs=outputs,
            usage=Usage(len(self.prompt_token_ids), count),
            num_cached_tokens=first.num_cached_tokens,
            num_draft_tokens=sum(output.num_draft_tokens for output in outputs),
            num_accepted_tokens=sum(output.num_accepted_tokens for output in outputs),
            logprobs=first.logprobs,
            prompt_logprobs=self._prompt_logprobs,
        )


class LLM(Closing):
    """A language model that is ready to generate.

    Methods may be called from several threads; their requests share the steps.

    Attributes:
        engine: What runs the requests; it can take requests of others too.

    Args:
        model: A Hugging Face model directory: config.json, tokenizer.json, safetensors, and
            generation_config.json if there is one. Or the name of a model in the local Hugging
            Face cache ("org/name"); nothing is downloaded. A path that exists wins over a name.
        revision: Branch, tag or commit of a name; None is "main".
        progress: Whether to show progress bars for loading and long batches; None shows them on a
            terminal, unless MRV1_NO_PROGRESS is set.
        enable_prefix_caching: As for `Engine`.
        background: As for `Engine`. Without it the threads that wait for results step the engine.
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
        enable_prefix_caching: bool = True,
        background: bool = True,
        **options: Unpack[RunnerKwargs],
    ) -> None:
        self._progress = progress
        self.engine = Engine(
            model,
            revision=revision,
            progress=progress,
            enable_prefix_caching=enable_prefix_caching,
            background=background,
            **options,
        )
        self._numbers = itertools.count()
        self._lock = threading.RLock()  # held by whoever steps, without `background`

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
        arrivals: queue.SimpleQueue[tuple[_Job, RequestUpdate]] = queue.SimpleQueue()
        try:
            self._submit(jobs, arrivals, prompts, sampling_params)
            shown = progress if progress is not None else self._progress
            if len(jobs) < _LONG_BATCH and shown is None:
                shown = False
            done = 0
            with progress_bar("Generating", len(jobs), unit="request", show=shown) as advance:
                while done < len(jobs):
                    _, update = self._next(arrivals)
                    if update.finished:
                        done += 1
                        advance(1)
            results = [job.result() for job in jobs]
        finally:
            self._forget(jobs)
        return results

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
        arrivals: queue.SimpleQueue[tuple[_Job, RequestUpdate]] = queue.SimpleQueue()
        try:
            self._submit(jobs, arrivals, prompts, sampling_params)
            chunks = self._stream(jobs, arrivals)
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

    def _stream(
        self, jobs: list[_Job], arrivals: queue.SimpleQueue[tuple[_Job, RequestUpdate]]
    ) -> Generator[StreamChunk, None, None]:
        try:
            yield StreamChunk(0, "", ())
            done = 0
            while done < len(jobs):
                job, update = self._next(arrivals)
                result = None
                if update.finished:
                    done += 1
                    result = job.result()
                yield StreamChunk(
                    job.index,
                    update.text,
                    update.token_ids,
                    result,
                    update.index,
                    update.finish_reason,
                    update.logprobs,
                )
        finally:
            self._forget(jobs)

    def _submit(
        self,
        jobs: list[_Job],
        arrivals: queue.SimpleQueue[tuple[_Job, RequestUpdate]],
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
        for index, (prompt, chosen) in enumerate(zip(many, params, strict=True)):
            # A job is there before its request is, so that an interrupt leaves no request behind.
            # The prefix keeps it apart from names that someone gives to requests of `engine`.
            job = _Job(f"llm-{next(self._numbers)}", index, arrivals)
            jobs.append(job)
            job.prompt_token_ids = self.engine.add_request(
                job.request_id, prompt, chosen, callback=job.take
            )

    def _next(
        self, arrivals: queue.SimpleQueue[tuple[_Job, RequestUpdate]]
    ) -> tuple[_Job, RequestUpdate]:
        """Waits for an update of the jobs that tell `arrivals`."""
        # Refuses where the engine was closed, and in a forked child, where nobody would answer.
        self.engine.has_unfinished()
        if self.engine.background:
            arrival = arrivals.get()
            if arrival[1].finish_reason == "abort":
                self.engine.has_unfinished()  # by a close() meanwhile
            return arrival
        while True:
            with contextlib.suppress(queue.Empty):
                return arrivals.get_nowait()
            with self._lock:
                if arrivals.empty():
                    if not self.engine.has_unfinished():
                        raise InternalError("a request was lost, as by an interrupt in a step")
                    self.engine.step()

    def _forget(self, jobs: list[_Job]) -> None:
        """Lets go of jobs, aborting those that still run (an error, an interrupt)."""
        if sys.is_finalizing():
            return  # a stream that nobody closed: the process takes everything with it
        # An LLM that was closed, or left in the parent by a fork, has nothing to abort.
        with contextlib.suppress(ClosedError, ForkError):
            left = [job for job in jobs if not job.finished]
            for job in left:
                self.engine.abort(job.request_id, report=False)
            if left and not self.engine.background:
                with self._lock:
                    self.engine.step()  # brings their rows and blocks home

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
