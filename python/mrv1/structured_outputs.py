# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""From the form that a text must have to the masks of tokens that may come next, by llguidance."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Final

from mrv1 import _core
from mrv1.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    import llguidance

    from mrv1.sampling_params import SamplingParams
    from mrv1.structured_outputs_params import StructuredOutputsParams
    from mrv1.tokenizer import Tokenizer

# The extra of the package that brings llguidance.
EXTRA: Final = "structured-outputs"

_FIELD: Final = "structured_outputs"
_MAX_ERROR_CHARS: Final = 400
# Between two tokens of JSON. Enough to indent by; a model that has lost its way ends all the same.
_WHITESPACE: Final = r"[ \n\r\t]{1,40}"


class GrammarCompiler:
    """Makes matchers of the forms that requests ask for. Any thread may call it.

    The library is loaded, and tables of the tokenizer are made, when the first form comes.

    Args:
        tokenizer: What the tokens stand for.
        vocab_size: The model's ids. Those that the tokenizer has not are never allowed.
        eos_token_ids: The model's end-of-sequence tokens, which the end of a form allows.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._tables: llguidance.LLTokenizer | None = None
        self._executor: llguidance.LLExecutor | None = None

    def compile(self, params: SamplingParams, request_id: str | None = None) -> _core.Grammar:
        """Returns what the engine needs for a request with structured_outputs.

        Args:
            params: Of the request.
            request_id: The request that errors name.

        Raises:
            RequestError: As of `matchers`, or the request asks for what a form does not go with.
        """
        form = params.structured_outputs
        assert form is not None
        if params.ignore_eos:
            raise RequestError(
                request_id=request_id,
                field="ignore_eos",
                value=True,
                allowed=f"False with {_FIELD}, whose text ends with an end-of-sequence token",
            )
        matchers = self.matchers(form, params.n, request_id)
        with self._lock:
            if self._executor is None:
                self._executor = self._library(request_id).LLExecutor()
        return _core.Grammar(self._executor, matchers)

    def matchers(
        self, form: StructuredOutputsParams, count: int = 1, request_id: str | None = None
    ) -> list[llguidance.LLMatcher]:
        """Returns matchers at the beginning of a text, for as many texts.

        They share the states of their lexer, whose number llguidance bounds; those of two calls
        share nothing, so that no request can use up what another one needs.

        Args:
            form: What the text must look like.
            count: How many.
            request_id: The request that errors name.

        Raises:
            RequestError: The form is not valid or no text has it, llguidance is not installed or
                cannot use the tokenizer, or the model has no end-of-sequence token.
        """
        library = self._library(request_id)
        tables = self._tokenizer_tables(library, request_id)
        error = None
        try:
            matcher: llguidance.LLMatcher = library.LLMatcher(
                tables,
                _grammar(library, form),
                log_level=0,
                # An error is one line about the form, without the parser's state.
                limits=library.LLParserLimits(verbose_errors=False),
            )
            if not matcher.is_error():
                matcher.compute_bitmask()
            if matcher.is_error():
                error = matcher.get_error()
                if error.startswith("NoExtension"):
                    error = "there is no such text"
        except (ValueError, RecursionError) as caught:
            error = str(caught)
        if error is not None:
            line = " ".join(error.replace("<non-verbose/>", "").split())
            raise RequestError(
                line[:_MAX_ERROR_CHARS],
                request_id=request_id,
                field=f"{_FIELD}.{form.kind}",
                value=getattr(form, form.kind),
                allowed="a form that llguidance can compile",
            )
        return [matcher, *(matcher.deep_copy() for _ in range(count - 1))]

    def _library(self, request_id: str | None) -> ModuleType:
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                f"needs llguidance ({error}); it comes with the extra mrv1[{EXTRA}]",
                request_id=request_id,
                field=_FIELD,
            ) from None
        return llguidance

    def _tokenizer_tables(
        self, library: ModuleType, request_id: str | None
    ) -> llguidance.LLTokenizer:
        if not self._eos_token_ids:
            raise RequestError(
                "the model has no end-of-sequence token, which would end the text",
                request_id=request_id,
                field=_FIELD,
                allowed="None for this model",
            )
        with self._lock:
            if self._tables is None:
                try:
                    self._tables = library.LLTokenizer(
                        self._tokenizer.to_json(),
                        n_vocab=self._vocab_size,
                        eos_token=self._eos_token_ids,
                    )
                except ValueError as error:
                    raise RequestError(
                        f"llguidance cannot use the model's tokenizer: {error}",
                        request_id=request_id,
                        field=_FIELD,
                        allowed="None for this model",
                    ) from None
            return self._tables


def _grammar(library: ModuleType, form: StructuredOutputsParams) -> str:
    """Returns a form as llguidance takes it.

    Raises:
        ValueError: It is not valid.
    """
    if form.json is not None or form.json_object:
        schema = form.json or '{"type": "object"}'
        options = {"whitespace_pattern": _WHITESPACE}
        return str(library.LLMatcher.grammar_from_json_schema(schema, defaults=options))
    if form.regex is not None:
        return str(library.grammar_from("regex", form.regex))
    if form.choice is not None:
        return str(library.grammar_from("choice", json.dumps(form.choice)))
    return str(library.grammar_from("grammar", form.grammar))
