# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""`ModelRunner`: rows in, batch in, `PendingStep` out, for authors of their own schedulers."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
import secrets
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from mrv1 import _core
from mrv1.errors import InternalError, InvalidArgumentError
from mrv1.loader import LoadedModel, RunnerKwargs, RunnerOptions, load_model
from mrv1.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

_MAX_INT32 = 2**31 - 1
# Smaller ones would be 0 in float32; they keep one token all the same.
_MIN_TOP_P = 1e-37

FINISH_REASONS: dict[_core.FinishReason, Literal["stop", "length", "error"]] = {
    _core.FinishReason.STOP: "stop",
    _core.FinishReason.LENGTH: "length",
    _core.FinishReason.ERROR: "error",
}


@dataclasses.dataclass(frozen=True)
class RowOutput:
    """What a step did for one row of its batch.

    Attributes:
        row: The row.
        generation: Of the row; tells its requests apart.
        token_id: The token drawn, or None: an unfinished prefill chunk, or a masked row.
        finish_reason: "stop" (EOS or a stop token), "length" or "error" (the logits held no token
            to draw) when the row ended with this step.
        num_computed: Tokens in the cache now; 0 for a masked row.
        masked: Whether the row had ended before the step and computed nothing.
    """

    row: int
    generation: int
    token_id: int | None
    finish_reason: Literal["stop", "length", "error"] | None
    num_computed: int
    masked: bool


class PendingStep:
    """A step that was launched and may still be running."""

    def __init__(self, runner: _core.ModelRunner, step: int) -> None:
        self._runner = runner
        self._outputs: list[RowOutput] | None = None
        self._error: str | None = None
        self.step = step

    @property
    def ready(self) -> bool:
        """Whether `result` would return at once."""
        return self._outputs is not None or self._runner.ready(self.step)

    def result(self) -> list[RowOutput]:
        """Waits for the step; returns one output a row, in the order of the batch.

        Raises:
            InternalError: The step failed. Its rows are in an unknown state: free them.
        """
        if self._outputs is None:
            output = self._runner.result(self.step)
            if output.error:
                self._error = f"step {output.step} failed: {output.error}"
            self._outputs = [
                RowOutput(
                    row=entry.row,
                    generation=entry.generation,
                    token_id=None if entry.token < 0 else entry.token,
                    finish_reason=FINISH_REASONS.get(entry.finish_reason),
                    num_computed=entry.num_computed,
                    masked=entry.masked,
                )
                for entry in output.entries
            ]
        if self._error is not None:
            raise InternalError(self._error)
        return self._outputs

    def __del__(self) -> None:
        if self._outputs is None:
            # The runner may be closed, or the interpreter going down.
            with contextlib.suppress(Exception):
                self._runner.discard(self.step)


def make_row_spec(
    token_ids: Sequence[int],
    params: SamplingParams,
    *,
    eos_token_ids: Sequence[int],
    prompt_len: int | None = None,
    num_computed: int = 0,
    block_ids: Sequence[int] = (),
) -> _core.RowSpec:
    """Translates a request into what the native side takes."""
    spec = _core.RowSpec()
    try:
        spec.token_ids = [operator.index(token) for token in token_ids]
        spec.block_ids = [operator.index(block) for block in block_ids]
    except (TypeError, OverflowError) as error:
        raise InvalidArgumentError(
            f"token_ids and block_ids hold integers of 32 bits: {error}"
        ) from None
    spec.prompt_len = len(spec.token_ids) if prompt_len is None else prompt_len
    spec.num_computed = num_computed
    spec.temperature = params.temperature
    spec.top_p = max(params.top_p, _MIN_TOP_P)
    spec.min_p = params.min_p
    spec.top_k = params.top_k
    spec.seed = secrets.randbits(64) if params.seed is None else params.seed
    spec.max_tokens = _MAX_INT32 if params.max_tokens is None else params.max_tokens
    spec.min_tokens = params.min_tokens
    eos = () if params.ignore_eos else tuple(eos_token_ids)
    spec.stop_ids = list(dict.fromkeys((*eos, *params.stop_token_ids)))
    return spec


class ModelRunner:
    """Runs batches of rows: state, step and sampler, with no scheduler on top.

    A row is a request from admission to its end. The caller chooses what a step computes, and owns
    the KV blocks: ids in [1, num_kv_blocks), each held by whoever it was given to until
    `retired_step` has reached `last_step(row)`. Steps run in order; `execute` returns when the
    step is queued, so the next can be launched before the tokens of this one are read. A row that
    stopped in a step is masked in later steps until it is freed. One thread at a time.

    Args:
        model: A Hugging Face model directory.
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
        progress: bool | None = None,
        **options: Unpack[RunnerKwargs],
    ) -> None:
        self.model: LoadedModel = load_model(
            os.fspath(model), RunnerOptions(**options), progress=progress
        )
        self._native = self.model.runner

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
        block_ids: Sequence[int] = (),
        prompt_len: int | None = None,
        num_computed: int = 0,
    ) -> int:
        """Admits a request into a free row; nothing is computed yet.

        Args:
            token_ids: The prompt; to resume a preempted request, the prompt and its outputs.
            params: Of sampling and stopping; stop strings are the caller's to find.
            block_ids: First KV blocks of the row.
            prompt_len: How many of token_ids are the prompt; all if None.
            num_computed: Leading tokens whose KV blocks are filled already.

        Raises:
            InvalidArgumentError: Something does not fit; the runner is as it was.
        """
        if params is None:
            params = SamplingParams()
        if not isinstance(params, SamplingParams):
            raise InvalidArgumentError(field="params", value=params, allowed="SamplingParams")
        params.validate_for(self.model.config.vocab_size, self.model.max_model_len)
        spec = make_row_spec(
            token_ids,
            params,
            eos_token_ids=self.model.config.eos_token_ids,
            prompt_len=prompt_len,
            num_computed=num_computed,
            block_ids=block_ids,
        )
        row, _ = self._native.add_row(spec)
        return row

    def append_blocks(self, row: int, block_ids: Sequence[int]) -> None:
        """Gives a row further KV blocks."""
        self._native.append_blocks(row, list(block_ids))

    def free_row(self, row: int) -> None:
        """Ends a row, finished or not. It may be given to another request at once."""
        self._native.free_row(row)

    def last_step(self, row: int) -> int:
        """Newest step that was launched with the row; 0 for none."""
        return self._native.last_step(row)

    def execute(self, batch: Sequence[tuple[int, int]]) -> PendingStep:
        """Launches a step.

        Args:
            batch: (row, tokens) pairs, each row once. A row whose prefill is not complete takes up
                to what is left of it, a decoding row 1. A token is drawn for decoding rows and for
                rows whose prefill is complete with this step.

        Raises:
            InvalidArgumentError: Something does not fit; nothing was launched.
        """
        return PendingStep(self._native, self._native.execute(list(batch)))

    def logits(self, item: int) -> np.ndarray:
        """Logits of the newest step for one item of its batch: [vocab] float32; waits for it.

        Empty if no token was drawn for the item.
        """
        return self._native.logits(item)

    def infer_params(self) -> dict[str, np.ndarray]:
        """The newest step's batch as the kernels saw it: int32 arrays by name; waits for it.

        Names and layouts are those of src/cpp/state/infer_params.h and, with
        `infer_param_view=True`, of src/cpp/state/infer_param_view.h.
        """
        arrays: dict[str, np.ndarray] = self._native.infer_params()
        return arrays

    def row_state(self, row: int) -> _core.RowState:
        """A row as the device holds it; waits for launched steps."""
        return self._native.row_state(row)

    def stats(self) -> dict[str, int]:
        """Counts since the start: steps, batches, host_ns, control_bytes, output_bytes."""
        counts: dict[str, int] = self._native.stats()
        return counts

    def close(self) -> None:
        """Frees memory and threads. Using the runner afterwards raises ClosedError."""
        self._native.close()
        self.model.device.close()

    def __enter__(self) -> ModelRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
