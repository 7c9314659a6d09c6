# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The registry of the MRV1_* environment variables.

A variable is read when it is asked for, so a change takes effect for whatever is built afterwards.
An empty value counts as unset. `scripts/make_env_table.py` writes the table of docs/environment.md
from this registry.

    threads = envs.NUM_THREADS.get()  # int | None, known to the type checker
"""

from __future__ import annotations

import dataclasses
import os
import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from mrv1.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T_co = TypeVar("T_co", covariant=True)

MAX_THREADS: Final = 1024
MAX_PROCESSORS: Final = 64

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})


@dataclasses.dataclass(frozen=True)
class EnvVar(Generic[T_co]):
    """One environment variable.

    Attributes:
        name: Its name, MRV1_*.
        default: Value where it is unset or empty.
        default_text: The default as documentation shows it.
        allowed: What is accepted, so that "must be " + allowed reads well.
        help: What it does, one sentence.
        parse: Gives the value of a text, or raises ValueError if the text is not allowed.
    """

    name: str
    default: T_co
    default_text: str
    allowed: str
    help: str
    parse: Callable[[str], T_co]

    def get(self) -> T_co:
        """Returns the value that the environment holds now.

        Raises:
            InvalidArgumentError: The variable holds something that is not allowed.
        """
        text = os.environ.get(self.name, "")
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError:
            raise InvalidArgumentError(
                field=f"environment variable {self.name}", value=text, allowed=self.allowed
            ) from None


def _parse_threads(text: str) -> int:
    # int() alone would also take signs, spaces, underscores and other scripts' digits.
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MAX_THREADS:
        raise ValueError(text)
    return int(text)


def _parse_limit(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(text)
    return int(text)


def _parse_processors(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,2}", text) or int(text) > MAX_PROCESSORS:
        raise ValueError(text)
    return int(text)


def _limit(name: str, what: str) -> EnvVar[int | None]:
    return EnvVar[int | None](
        name=name,
        default=None,
        default_text="no limit",
        allowed="an integer in [0, 999999999]",
        help=what,
        parse=_parse_limit,
    )


def _parse_bool(text: str) -> bool:
    lowered = text.lower()
    if lowered not in _TRUE | _FALSE:
        raise ValueError(text)
    return lowered in _TRUE


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        for choice in choices:
            if text.lower() == choice.lower():
                return choice
        raise ValueError(text)

    return parse


_BOOL_ALLOWED: Final = "1, true, yes, on, 0, false, no or off"

NUM_THREADS: Final = EnvVar[int | None](
    name="MRV1_NUM_THREADS",
    default=None,
    default_text="all cores",
    allowed=f"an integer in [1, {MAX_THREADS}]",
    help="Threads of the CPU backend.",
    parse=_parse_threads,
)
DEVICE: Final = EnvVar[str](
    name="MRV1_DEVICE",
    default="auto",
    default_text="`auto`",
    allowed="auto, cpu or cuda",
    help="Device to run on where the caller names none; `auto` takes a GPU if there is one.",
    parse=_one_of("auto", "cpu", "cuda"),
)
LOG_LEVEL: Final = EnvVar[str | None](
    name="MRV1_LOG_LEVEL",
    default=None,
    default_text="as the program sets it",
    allowed="DEBUG, INFO, WARNING or ERROR",
    help="Level that loading a model gives to the logger `mrv1`.",
    parse=_one_of("DEBUG", "INFO", "WARNING", "ERROR"),
)
NO_PROGRESS: Final = EnvVar[bool](
    name="MRV1_NO_PROGRESS",
    default=False,
    default_text="`0`",
    allowed=_BOOL_ALLOWED,
    help="Whether progress bars are left out.",
    parse=_parse_bool,
)
FUSION: Final = EnvVar[bool](
    name="MRV1_FUSION",
    default=True,
    default_text="`1`",
    allowed=_BOOL_ALLOWED,
    help="Whether the fusion pass runs over a program; without it each op runs on its own.",
    parse=_parse_bool,
)
GRAPH_MODE: Final = EnvVar[str](
    name="MRV1_GRAPH_MODE",
    default="auto",
    default_text="`auto`",
    allowed="auto, eager, piecewise or full",
    help="Fastest way that steps may reach the device: kernel by kernel, graphs between the "
    "attention ops, or one graph; `auto` is `full` on a GPU and `eager` on the CPU.",
    parse=_one_of("auto", "eager", "piecewise", "full"),
)
ATTENTION_BACKEND: Final = EnvVar[str](
    name="MRV1_ATTENTION_BACKEND",
    default="native",
    default_text="`native`",
    allowed="native or flashinfer",
    help="Kernels that compute the attention of decoding rows on a GPU.",
    parse=_one_of("native", "flashinfer"),
)
BATCH_INVARIANT: Final = EnvVar[bool](
    name="MRV1_BATCH_INVARIANT",
    default=False,
    default_text="`0`",
    allowed=_BOOL_ALLOWED,
    help="Whether a row's results must be the same bit for bit whatever else is in the batch, "
    "which on the CPU they always are, and however many ranks compute the model; slower.",
    parse=_parse_bool,
)
SYNC: Final = EnvVar[bool](
    name="MRV1_SYNC",
    default=False,
    default_text="`0`",
    allowed=_BOOL_ALLOWED,
    help="Whether to wait after every kernel launch, so that an error names its kernel; steps then "
    "run eagerly.",
    parse=_parse_bool,
)
USE_TBO: Final = EnvVar[str](
    name="MRV1_USE_TBO",
    default="auto",
    default_text="`auto`",
    allowed="0, 1 or auto",
    help="Whether ranks run a step as two halves, each of which computes while the other meets the "
    "other ranks ([two-batch overlap](parallel.md#two-batch-overlap)): never, always, or from so "
    "many tokens on, but not with `data_parallel_size`.",
    parse=_one_of("0", "1", "auto"),
)
TBO_MIN_PREFILL_TOKENS: Final = EnvVar[int](
    name="MRV1_TBO_MIN_PREFILL_TOKENS",
    default=16384,
    default_text="`16384`",
    allowed="an integer in [0, 999999999]",
    help="Tokens of a step with prompts from which on `MRV1_USE_TBO=auto` runs it as two halves.",
    parse=_parse_limit,
)
TBO_MIN_DECODE_TOKENS: Final = EnvVar[int](
    name="MRV1_TBO_MIN_DECODE_TOKENS",
    default=16384,
    default_text="`16384`",
    allowed="an integer in [0, 999999999]",
    help="The same of a step without prompts, or that is captured as one graph.",
    parse=_parse_limit,
)
TBO_PROCESSORS: Final = EnvVar[int](
    name="MRV1_TBO_PROCESSORS",
    default=0,
    default_text="`0`",
    allowed=f"an integer in [0, {MAX_PROCESSORS}]",
    help="Processors of a GPU that collectives of a half take, and the other half leaves to them; "
    "`0` is as many as in whole steps, and leaves none.",
    parse=_parse_processors,
)
CHECK_SLOTS: Final = EnvVar[bool](
    name="MRV1_CHECK_SLOTS",
    default=False,
    default_text="`0`",
    allowed=_BOOL_ALLOWED,
    help="Whether single ops on a GPU check the slots that they write to, and static scales, "
    "before the launch, as those on the CPU always do; each call then waits for the GPU.",
    parse=_parse_bool,
)
CUBLASLT: Final = EnvVar[str | None](
    name="MRV1_CUBLASLT",
    default=None,
    default_text="found",
    allowed="a name or path of the library, or none",
    help="cuBLASLt to use on a GPU, instead of the one that the loader or a wheel has; `none` runs "
    "without it.",
    parse=str,
)
NCCL: Final = EnvVar[str | None](
    name="MRV1_NCCL",
    default=None,
    default_text="found",
    allowed="a name or path of the library, or none",
    help="NCCL for GPUs that do not reach each other's memory, and for `mrv1 bench all_reduce` to "
    "compare with, instead of the one that the loader or a wheel has; `none` is without.",
    parse=str,
)
COLLECTIVES: Final = EnvVar[str](
    name="MRV1_COLLECTIVES",
    default="auto",
    default_text="`auto`",
    allowed="auto or nccl",
    help="What carries what GPUs exchange within a stage: `auto` is memory of the peers, and NCCL "
    "where they do not reach it ([how](parallel.md#gpus-without-peer-access)).",
    parse=_one_of("auto", "nccl"),
)
TUNE: Final = EnvVar[bool](
    name="MRV1_TUNE",
    default=False,
    default_text="`0`",
    allowed=_BOOL_ALLOWED,
    help="Whether a GPU measures how to compute each new shape of a linear fastest, and writes it "
    "to a tuning table; see [tuning](tuning.md).",
    parse=_parse_bool,
)
TUNE_DIR: Final = EnvVar[str](
    name="MRV1_TUNE_DIR",
    default="~/.cache/mrv1/tuning",
    default_text="`~/.cache/mrv1/tuning`",
    allowed="a directory",
    help="Where tuning tables are written, and read before those of the package.",
    parse=str,
)
MAX_BAD_WORDS_NUM: Final = _limit(
    "MRV1_MAX_BAD_WORDS_NUM",
    "Token sequences that the `bad_words` of a request may have; a word has up to two.",
)
BAD_WORDS_MAX_LEN: Final = _limit("MRV1_BAD_WORDS_MAX_LEN", "Tokens that such a sequence may have.")
MAX_STOP_SEQS_NUM: Final = _limit(
    "MRV1_MAX_STOP_SEQS_NUM",
    "Entries that `stop` and `stop_sequences` of a request may have together.",
)
STOP_SEQS_MAX_LEN: Final = _limit(
    "MRV1_STOP_SEQS_MAX_LEN",
    "Tokens that such an entry may have; a stop string has those that the tokenizer gives it.",
)

# All variables by name, in the order of the documentation.
REGISTRY: Final[Mapping[str, EnvVar[object]]] = MappingProxyType(
    {
        NUM_THREADS.name: NUM_THREADS,
        DEVICE.name: DEVICE,
        LOG_LEVEL.name: LOG_LEVEL,
        NO_PROGRESS.name: NO_PROGRESS,
        FUSION.name: FUSION,
        GRAPH_MODE.name: GRAPH_MODE,
        ATTENTION_BACKEND.name: ATTENTION_BACKEND,
        BATCH_INVARIANT.name: BATCH_INVARIANT,
        SYNC.name: SYNC,
        USE_TBO.name: USE_TBO,
        TBO_MIN_PREFILL_TOKENS.name: TBO_MIN_PREFILL_TOKENS,
        TBO_MIN_DECODE_TOKENS.name: TBO_MIN_DECODE_TOKENS,
        TBO_PROCESSORS.name: TBO_PROCESSORS,
        CHECK_SLOTS.name: CHECK_SLOTS,
        CUBLASLT.name: CUBLASLT,
        NCCL.name: NCCL,
        COLLECTIVES.name: COLLECTIVES,
        TUNE.name: TUNE,
        TUNE_DIR.name: TUNE_DIR,
        MAX_BAD_WORDS_NUM.name: MAX_BAD_WORDS_NUM,
        BAD_WORDS_MAX_LEN.name: BAD_WORDS_MAX_LEN,
        MAX_STOP_SEQS_NUM.name: MAX_STOP_SEQS_NUM,
        STOP_SEQS_MAX_LEN.name: STOP_SEQS_MAX_LEN,
    }
)
