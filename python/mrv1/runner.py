# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""`ModelRunner`: rows in, batch in, `PendingStep` out, for authors of their own schedulers."""

from __future__ import annotations

import collections
import dataclasses
import operator
import os
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

from mrv1 import _core
from mrv1._closing import Closing
from mrv1._notices import report_notices
from mrv1.admission import check_bad_words, check_stops
from mrv1.errors import InternalError, InvalidArgumentError
from mrv1.hub import find_model
from mrv1.loader import (
    LoadedModel,
    RunnerKwargs,
    RunnerOptions,
    load_model,
)
from mrv1.logprobs import token_logprobs
from mrv1.sampling_params import MAX_INT32, SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

    from mrv1.logprobs import Logprob

# Block ids of a row: of the one KV group there is, or of each.
BlockIds: TypeAlias = "Sequence[int] | Sequence[Sequence[int]]"

_ANY_GENERATION = -1
_ENGINE_DRAFTS = -1
# Smaller ones would be 0 in float32; they keep one token all the same.
_MIN_TOP_P = 1e-37

FINISH_REASONS: dict[_core.FinishReason, Literal["stop", "length", "error"]] = {
    _core.FinishReason.STOP: "stop",
    _core.FinishReason.LENGTH: "length",
    _core.FinishReason.ERROR: "error",
}


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Log probabilities of tokens of a prompt, given the ones before each.

    Attributes:
        first: Position in the prompt of the first of these tokens.
        token_ids: [tokens, 1 + SamplingParams.prompt_logprobs] int32: of each token its own id,
            then those of the most likely ones, in order.
        logprobs: Of these; float32. NaN for tokens whose logits hold a NaN.
        ranks: Of these, 1 for the most likely; int32.
    """

    first: int
    token_ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray


@dataclasses.dataclass(frozen=True)
class RowOutput:
    """What a step did for one row of its batch.

    Attributes:
        row: The row.
        generation: Of the row; tells its requests apart.
        token_ids: New tokens: one and the drafts that were accepted before it; none for an
            unfinished prefill chunk and for a masked row.
        num_draft_tokens: Tokens that were proposed.
        num_accepted_tokens: Proposed tokens among the new ones.
        finish_reason: "stop" (EOS, a stop token or a stop sequence), "length" or "error" (the
            logits held no token to draw) when the row ended with this step.
        stop_sequence: Index of the one of stop_sequences that ended the row; None if none did.
        logprobs: For each new token a mapping from token id to `Logprob`, without texts: its own
            first, then those of the most likely ones; None without SamplingParams.logprobs.
        num_computed: Tokens in the cache now; 0 for a masked row.
        masked: Whether the row had ended before the step and computed nothing.
        prompt_logprobs: Of the prompt's tokens that the step has scored; None if it scored none.
    """

    row: int
    generation: int
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "error"] | None
    num_computed: int
    masked: bool
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    stop_sequence: int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def token_id(self) -> int | None:
        """The newest token; None if there is no new one."""
        return self.token_ids[-1] if self.token_ids else None


class RowHandle(int):
    """A row's index that knows which request it stands for.

    It can be used as the index it is; calls that get a handle refuse it once the row has been given
    to another request.

    Attributes:
        generation: Of the row; outputs carry it too.
    """

    generation: int

    def __new__(cls, row: int, generation: int) -> RowHandle:
        """Makes the handle of a row in its given generation."""
        handle = super().__new__(cls, row)
        handle.generation = generation
        return handle


def _generation(row: int) -> int:
    """The generation a row argument names; any if it is a plain index."""
    return row.generation if isinstance(row, RowHandle) else _ANY_GENERATION


def _index(field: str, value: object) -> int:
    """A 32-bit integer argument."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not -(2**31) <= number < 2**31:
        raise InvalidArgumentError(field=field, value=value, allowed="an integer of 32 bits")
    return number


class PendingStep:
    """A step that was launched and may still be running.

    Attributes:
        step: Its number.
        masked_items: Items of its batch that draw under a mask (`add_row` with `grammar`). If there
            are any, the step waits before the draw until `set_masks` is called. Until then nothing
            that changes rows or launches another step is allowed.
    """

    def __init__(
        self, runner: _core.ModelRunner, step: int, unread: collections.deque[int]
    ) -> None:
        self._runner = runner
        self._unread = unread
        self._outputs: list[RowOutput] | None = None
        self._error: str | None = None
        self.step = step
        self.masked_items: tuple[int, ...] = ()
        if runner.cut_step == step:
            self.masked_items = tuple(runner.masked_items)

    def set_masks(self, masks: np.ndarray) -> None:
        """Tells which tokens the rows of `masked_items` may draw, and lets the step go on.

        Waits for the step before.

        Args:
            masks: [len(masked_items), ceil(vocab_size / 32)] uint32 or int32, a row an item, in
                order: bit i % 32 of word i / 32 is 1 if token i may be drawn.

        Raises:
            InvalidArgumentError: The array has another shape or dtype, or the step waits for none.
        """
        import numpy as np

        words = np.ascontiguousarray(masks)
        if words.ndim != 2 or words.dtype not in (np.uint32, np.int32):
            raise InvalidArgumentError(
                field="masks",
                value=f"{words.ndim} dimensions of {words.dtype}",
                allowed="a matrix of uint32 or int32",
            )
        if self._runner.cut_step != self.step:
            raise InvalidArgumentError(f"step {self.step} does not wait for masks")
        self._runner.set_masks(words.view(np.uint32))

    @property
    def ready(self) -> bool:
        """Whether `result` would return at once."""
        return self._outputs is not None or self._runner.ready(self.step)

    def result(self) -> list[RowOutput]:
        """Waits for the step; returns one output a row, in the order of the batch.

        Raises:
            InternalError: The step failed. Its rows are in an unknown state: free them.
            InvalidArgumentError: The step waits for masks.
        """
        if self._outputs is None:
            output = self._runner.result(self.step)
            if output.error:
                self._error = f"step {output.step} failed: {output.error}"
            self._outputs = [_row_output(output, index) for index in range(len(output.entries))]
        if self._error is not None:
            raise InternalError(self._error)
        return self._outputs

    def __del__(self) -> None:
        # Runs on any thread at any time, so the runner is only told at its next step.
        if self._outputs is None:
            self._unread.append(self.step)


def _row_output(output: _core.StepOutput, index: int) -> RowOutput:
    entry = output.entries[index]
    tokens = tuple(output.tokens(index))
    logprobs = output.logprobs(index)
    return RowOutput(
        row=entry.row,
        generation=entry.generation,
        token_ids=tokens,
        finish_reason=FINISH_REASONS.get(entry.finish_reason),
        num_computed=entry.num_computed,
        masked=entry.masked,
        num_draft_tokens=entry.num_drafts,
        num_accepted_tokens=entry.num_accepted,
        stop_sequence=None if entry.stop_sequence < 0 else entry.stop_sequence,
        logprobs=None if logprobs is None else token_logprobs(len(tokens), *logprobs, None),
        prompt_logprobs=_prompt_logprobs(output, index),
    )


def _prompt_logprobs(output: _core.StepOutput, index: int) -> PromptLogprobs | None:
    found = output.prompt_logprobs(index)
    if found is None or not len(found[1][0]):
        return None
    return PromptLogprobs(found[0], *found[1])


def _by_group(block_ids: BlockIds) -> Sequence[Sequence[int]]:
    """Block ids of one KV group, or of each."""
    if any(isinstance(item, Sequence) for item in block_ids):
        return cast("Sequence[Sequence[int]]", block_ids)
    return (cast("Sequence[int]", block_ids),)


def make_row_spec(
    token_ids: Sequence[int],
    params: SamplingParams,
    *,
    eos_token_ids: Sequence[int],
    vocab_size: int = 0,
    bad_words: Sequence[Sequence[int]] = (),
    prompt_len: int | None = None,
    num_computed: int = 0,
    block_ids: BlockIds = (),
    forced_token_ids: Sequence[int] = (),
    num_scored: int = 0,
) -> _core.RowSpec:
    """Translates a request into what the native side takes.

    `vocab_size` is needed where params ask for log probabilities of the whole vocabulary.
    """
    spec = _core.RowSpec()
    try:
        spec.token_ids = [operator.index(token) for token in token_ids]
        spec.block_ids = [
            [operator.index(block) for block in blocks] for blocks in _by_group(block_ids)
        ]
        spec.forced_token_ids = [operator.index(token) for token in forced_token_ids]
    except (TypeError, OverflowError) as error:
        raise InvalidArgumentError(
            f"token_ids, block_ids and forced_token_ids hold integers of 32 bits: {error}"
        ) from None
    spec.prompt_len = (
        len(spec.token_ids) if prompt_len is None else _index("prompt_len", prompt_len)
    )
    spec.num_computed = _index("num_computed", num_computed)
    spec.num_scored = _index("num_scored", num_scored)
    spec.temperature = params.temperature
    spec.top_p = max(params.top_p, _MIN_TOP_P)
    spec.min_p = params.min_p
    spec.top_k = params.top_k
    spec.seed = secrets.randbits(64) if params.seed is None else params.seed
    spec.max_tokens = MAX_INT32 if params.max_tokens is None else params.max_tokens
    spec.min_tokens = params.min_tokens
    drafts = params.num_speculative_tokens
    spec.num_speculative_tokens = _ENGINE_DRAFTS if drafts is None else drafts
    eos = () if params.ignore_eos else tuple(eos_token_ids)
    spec.stop_ids = list(dict.fromkeys((*eos, *params.stop_token_ids)))
    spec.stop_sequences = [list(sequence) for sequence in params.stop_sequences]
    spec.presence_penalty = params.presence_penalty
    spec.frequency_penalty = params.frequency_penalty
    spec.repetition_penalty = params.repetition_penalty
    spec.logit_bias = list(params.logit_bias)
    spec.allowed_token_ids = list(params.allowed_token_ids or ())
    spec.bad_words = [list(sequence) for sequence in bad_words]
    spec.num_logprobs = params.num_logprobs(vocab_size)
    spec.num_prompt_logprobs = params.num_prompt_logprobs(vocab_size)
    return spec


def _items(batch: Sequence[tuple[int, int]], field: str) -> list[tuple[int, int, int]]:
    """The pairs (row, tokens) of a batch, and the generation that each names."""
    items = []
    for place, item in enumerate(batch):
        try:
            row, tokens = item
        except (TypeError, ValueError):
            raise InvalidArgumentError(
                field=f"{field}[{place}]", value=item, allowed="a pair (row, tokens)"
            ) from None
        items.append(
            (
                _index(f"{field}[{place}] row", row),
                _index(f"{field}[{place}] tokens", tokens),
                _generation(row),
            )
        )
    return items


class ModelRunner(Closing):
    """Runs batches of rows: state, step and sampler, with no scheduler on top.

    A row is a request from admission to its end. The caller chooses what a step computes, and owns
    the KV blocks: ids in [1, num_kv_blocks), each held by whoever it was given to until
    `retired_step` has reached `last_step(row)`. Steps run in order; `execute` returns when the
    step is queued, so the next can be launched before the tokens of this one are read. A row that
    stopped in a step is masked in later steps until it is freed. One thread at a time.

    Args:
        model: A Hugging Face model directory, or the name of a model in its local cache.
        revision: Branch, tag or commit of a name; None is "main".
        progress: Whether to show a progress bar while loading; None shows it on a terminal.
        **options: Fields of `RunnerOptions`.

    Example:
        >>> runner = ModelRunner("dir", num_kv_blocks=64)
        >>> row = runner.add_row([1, 2, 3], SamplingParams(temperature=0), block_ids=[1])
        >>> runner.execute([(row, 3)]).result()[0].token_id
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
        self._start(self.model.runner)
        self._ranks = (self, *(self._of_rank(each) for each in self.model.data_runners[1:]))

    def _start(self, native: _core.ModelRunner) -> None:
        self._native = native
        self._unread: collections.deque[int] = collections.deque()

    def _of_rank(self, native: _core.ModelRunner) -> ModelRunner:
        """The runner of another rank of the same model."""
        other = type(self).__new__(type(self))
        other.model = self.model
        other._start(native)
        other._ranks = (other,)
        return other

    @property
    def ranks(self) -> tuple[ModelRunner, ...]:
        """With data_parallel_size, a runner for each rank, this one the first; else this one alone.

        Each has rows and blocks of its own. All must run as many steps, as tokens travel between
        them in each: `execute([])` on a rank without anything to compute. A step of one rank ends
        when all have begun it. Ranks may be called in turns, or in a thread each. Closing this one
        closes all.
        """
        return self._ranks

    def _current(self) -> _core.ModelRunner:
        """The native runner, without steps that nobody can ask for any more: one may be cut."""
        while self._unread:
            self._native.discard(self._unread.popleft())
        return self._native

    @property
    def free_rows(self) -> int:
        """Rows that no request holds."""
        return self._native.free_rows

    @property
    def retired_step(self) -> int:
        """All steps up to this number have finished."""
        return self._native.retired_step

    def add_row(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        block_ids: BlockIds = (),
        prompt_len: int | None = None,
        num_computed: int = 0,
        bad_words_token_ids: Sequence[Sequence[int]] = (),
        forced_token_ids: Sequence[int] = (),
        grammar: bool = False,
        num_scored: int = 0,
    ) -> RowHandle:
        """Admits a request into a free row; nothing is computed yet.

        Args:
            token_ids: The prompt; to resume a preempted request, the prompt and its outputs.
            params: Of sampling and stopping; stop strings are the caller's to find. A row is one
                sample: n must be 1.
            block_ids: First KV blocks of the row; for a model with several KV groups, a sequence
                for each. 0 stands for a block below the group's window that was given back.
            prompt_len: How many of token_ids are the prompt; all if None.
            num_computed: Leading tokens whose KV blocks are filled already.
            bad_words_token_ids: Token sequences that the output must not contain; what
                `Tokenizer.encode_bad_words` makes of params.bad_words, as a runner has no
                tokenizer.
            forced_token_ids: Outputs, counted from prompt_len, whatever is drawn; for testing, with
                `force_tokens=True`.
            grammar: Whether the caller sets a mask of the tokens that may come before each draw:
                `PendingStep.set_masks`. Such a row has no drafts. `structured_outputs` of `params`
                must be None: `mrv1.structured_outputs.GrammarCompiler` makes matchers of it.
            num_scored: With params.prompt_logprobs, how many tokens `PromptLogprobs` has come for
                already, as to a row that was preempted. So many leading tokens may be computed.

        Raises:
            InvalidArgumentError: Something does not fit; the runner is as it was.
        """
        if params is None:
            params = SamplingParams()
        if not isinstance(params, SamplingParams):
            raise InvalidArgumentError(field="params", value=params, allowed="SamplingParams")
        if params.n != 1:
            raise InvalidArgumentError(
                field="params.n", value=params.n, allowed="1: a row is one sample"
            )
        if not isinstance(grammar, bool):
            raise InvalidArgumentError(field="grammar", value=grammar, allowed="True or False")
        if params.structured_outputs is not None:
            raise InvalidArgumentError(
                field="params.structured_outputs",
                value=params.structured_outputs,
                allowed="None: a runner knows no text; see grammar",
            )
        params.validate_for(
            self.model.config.vocab_size,
            self.model.max_model_len,
            max_speculative_tokens=self.model.num_speculative_tokens,
            max_logprobs=self.model.max_logprobs,
        )
        if params.bad_words and not bad_words_token_ids:
            raise InvalidArgumentError(
                field="params.bad_words",
                value=params.bad_words,
                allowed="empty, or given as bad_words_token_ids too: a runner has no tokenizer",
            )
        bad_words = [
            [_index(f"bad_words_token_ids[{place}]", token) for token in sequence]
            for place, sequence in enumerate(bad_words_token_ids)
        ]
        check_bad_words(params, bad_words, self.model.config.vocab_size)
        check_stops(params, None)
        spec = make_row_spec(
            token_ids,
            params,
            vocab_size=self.model.config.vocab_size,
            eos_token_ids=self.model.config.eos_token_ids,
            bad_words=bad_words,
            prompt_len=prompt_len,
            num_computed=num_computed,
            block_ids=block_ids,
            forced_token_ids=forced_token_ids,
            num_scored=num_scored,
        )
        spec.grammar = grammar
        return RowHandle(*self._current().add_row(spec))

    @property
    def kv_windows(self) -> list[int]:
        """Window of each KV group, 0 for none.

        Layers that see the same positions share a group. A row needs blocks of each group, from
        one pool of ids.
        """
        return self._native.kv_windows

    def append_blocks(self, row: int, block_ids: Sequence[int], group: int = 0) -> None:
        """Gives a row further KV blocks of a group.

        Raises:
            InvalidArgumentError: The row is not the handle's any more, or a block id is out of
                range or in the row already.
        """
        ids = [_index(f"block_ids[{place}]", block) for place, block in enumerate(block_ids)]
        self._current().append_blocks(
            _index("row", row), _index("group", group), ids, _generation(row)
        )

    def drop_blocks(self, row: int, first: int, count: int, group: int = 0) -> None:
        """Takes blocks from a row that lie wholly below its group's window.

        They may be reused once all steps up to `last_step(row)` have finished.

        Args:
            row: The row.
            first: Place of the first of them among the row's blocks of the group.
            count: How many.
            group: The KV group.

        Raises:
            InvalidArgumentError: A token that is still to be computed may see one of them.
        """
        self._current().drop_blocks(
            _index("row", row),
            _index("group", group),
            _index("first", first),
            _index("count", count),
            _generation(row),
        )

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Makes KV blocks equal to others, in all layers: before a row writes a shared block.

        The copies come after the steps launched before, and before those launched later.

        Args:
            copies: Pairs (source, target) of block ids. No target may be named twice or be a
                source.

        Raises:
            InvalidArgumentError: A block id is out of range, or a target is named elsewhere.
        """
        self._current().copy_blocks(
            [
                (
                    _index(f"copies[{place}] source", source),
                    _index(f"copies[{place}] target", target),
                )
                for place, (source, target) in enumerate(copies)
            ]
        )

    def free_row(self, row: int) -> None:
        """Ends a row, finished or not. It may be given to another request at once.

        Raises:
            InvalidArgumentError: The row is free, or not the handle's any more.
        """
        self._current().free_row(_index("row", row), _generation(row))

    def last_step(self, row: int) -> int:
        """Newest step that was launched with the row; 0 for none. The row may be free by now."""
        return self._native.last_step(_index("row", row))

    def execute(self, batch: Sequence[tuple[int, int]]) -> PendingStep:
        """Launches a step.

        Args:
            batch: (row, tokens) pairs, each row once. A row whose prefill is not complete takes up
                to what is left of it. A decoding row takes 1, or with `speculative_config` up to
                1 + num_speculative_tokens: its newest token and places for drafts, which the device
                proposes. Tokens are drawn for decoding rows, and one for rows whose prefill is
                complete with this step. Empty, it carries out what has changed; of a rank with
                requests of its own it also goes through a step that others run.

        A decoding row with places for drafts needs blocks for as many tokens as its steps in flight
        may compute, up to its length; results that are read lower this bound.

        Rows with prompt_logprobs score their prompts in the steps that compute them. A step has
        room for the log probabilities of max_num_batched_tokens tokens with max_logprobs each, or
        for 32 MiB of them, 8 bytes each.

        Raises:
            InvalidArgumentError: Something does not fit; nothing was launched.
        """
        step = self._current().execute(_items(batch, "batch"))
        report_notices(self.model.data_runners)
        return PendingStep(self._native, step, self._unread)

    def execute_ranks(self, batches: Sequence[Sequence[tuple[int, int]]]) -> list[PendingStep]:
        """Launches a step on all of `ranks` at the same time, of a batch each, as `execute` does.

        Several steps of many kernels that are launched one rank after the other may wait for each
        other on GPUs; these do not. It also decides whether the step runs as two halves.

        Raises:
            InvalidArgumentError: Something does not fit; nothing was launched on any rank.
        """
        items = [_items(batch, f"batches[{rank}]") for rank, batch in enumerate(batches)]
        current = [rank._current() for rank in self._ranks]
        steps = current[0].execute_ranks(items)
        report_notices(self.model.data_runners)
        return [
            PendingStep(native, step, rank._unread)
            for rank, native, step in zip(self._ranks, current, steps, strict=True)
        ]

    def logits(self, item: int) -> np.ndarray:
        """Logits of the newest step for one item of its batch: [vocab] float32; waits for it.

        As the sampler left them: the model's, unless the row's parameters edit logits. Of edits,
        those of stop tokens, biases, penalties and bad words are in them and masks may be. Empty if
        no token was drawn for the item.

        Raises:
            InvalidArgumentError: There is no such item, or no step yet.
        """
        return self._current().logits(item)

    def device_logits(self, item: int) -> _core.DeviceArray:
        """As `logits`, in memory of the device, for libraries that take DLPack; waits for the step.

        A copy, which later steps leave alone. Readers in other streams are made to wait for it.

        Raises:
            InvalidArgumentError: There is no such item, or no step yet.
        """
        return self._current().device_logits(item)

    def hidden_states(self, item: int) -> np.ndarray:
        """What the output head reads, for each token of one item of the newest step's batch.

        The output of the final norm, [tokens, hidden_size], copied out as float32; waits for the
        step. No rows if the item's row was masked. A decoding row has its newest token and the
        drafts that were proposed.

        Raises:
            InvalidArgumentError: The runner was made without `keep_hidden_states=True`, which it
                needs as the values take memory of their own; or there is no such item or step.
        """
        states: np.ndarray = self._current().hidden_states(item)
        return states

    def device_hidden_states(self, item: int) -> _core.DeviceArray:
        """As `hidden_states`, in memory of the device and in the model's dtype, for DLPack.

        A copy, which later steps leave alone. Readers in other streams are made to wait for it.

        Raises:
            InvalidArgumentError: As of `hidden_states`.
        """
        return self._current().device_hidden_states(item)

    def infer_params(self) -> dict[str, np.ndarray]:
        """The newest step's batch as the kernels saw it: int32 arrays by name; waits for it.

        Names and layouts are those of src/cpp/state/infer_params.h and, with
        `infer_param_view=True`, of src/cpp/state/infer_param_view.h.
        """
        arrays: dict[str, np.ndarray] = self._current().infer_params()
        return arrays

    def row_state(self, row: int) -> _core.RowState:
        """A row as the device holds it; waits for launched steps."""
        return self._native.row_state(row)

    def stats(self) -> dict[str, int]:
        """Counts since the start.

        steps (records sent, those that only change rows included), batches (steps that ran the
        program), steps_eager, steps_piecewise and steps_full (batches by how they reached the
        device), host_ns (host time inside execute, waiting aside), control_bytes and output_bytes
        (sent to and received from the device), mask_bytes (of host memory, for rows with a grammar:
        allocated with the first one, for all rows); of the whole device kernel_launches and
        graph_launches, waits (blocking calls), allocations and copies.
        """
        counts: dict[str, int] = self._native.stats()
        return counts

    def close(self) -> None:
        """Frees memory and threads. Using the runner afterwards raises ClosedError."""
        self.model.close()
