# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What a request's text must look like."""

from __future__ import annotations

import dataclasses
import json as json_module
from typing import TYPE_CHECKING, Final

from mrv1.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_KINDS: Final = ("json", "regex", "choice", "grammar", "json_object")
_EXACTLY_ONE: Final = f"exactly one of {', '.join(_KINDS[:-1])} and {_KINDS[-1]}"


@dataclasses.dataclass(frozen=True, init=False)
class StructuredOutputsParams:
    """The form that a request's text must have. Names are vLLM's; exactly one is given.

    What is checked here is what can be told without compiling it: that a schema is JSON, say, but
    not whether its keywords are known. Instances are values, and can be shared.

    Attributes:
        json: A JSON schema, an object as a dict or as its text; stored as text. The order of its
            properties is that of the output.
        regex: A regular expression that the whole text matches.
        choice: Texts of which the text is one; a list of at least one, stored as a tuple without
            repetitions.
        grammar: A context-free grammar in Lark's notation or in GBNF.
        json_object: True for any JSON object.
    """

    json: str | None
    regex: str | None
    choice: tuple[str, ...] | None
    grammar: str | None
    json_object: bool

    # Written out, since what is accepted is wider than what is stored.
    def __init__(
        self,
        *,
        json: str | dict[str, Any] | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        json_object: bool | None = None,
    ) -> None:
        """Checks and stores the form.

        Raises:
            RequestError: None or several are given, or one has the wrong type or is empty.
        """
        if json_object is not None and not isinstance(json_object, bool):
            raise _refusal("json_object", json_object, "None, True or False")
        given = [
            name
            for name, value in zip(
                _KINDS, (json, regex, choice, grammar, json_object or None), strict=True
            )
            if value is not None
        ]
        if len(given) != 1:
            raise RequestError(
                f"{' and '.join(given) or 'none'} given",
                field="structured_outputs",
                allowed=_EXACTLY_ONE,
            )
        for name, value in (
            ("json", None if json is None else _schema(json)),
            ("regex", None if regex is None else _text("regex", regex)),
            ("choice", None if choice is None else _choices(choice)),
            ("grammar", None if grammar is None else _text("grammar", grammar)),
            ("json_object", bool(json_object)),
        ):
            object.__setattr__(self, name, value)

    @property
    def kind(self) -> str:
        """Name of the one that is given."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))


def _refusal(field: str, value: object, allowed: str) -> RequestError:
    return RequestError(field=f"structured_outputs.{field}", value=value, allowed=allowed)


def _text(field: str, value: object) -> str:
    """Returns a string that is not empty and that UTF-8 can encode."""
    if not isinstance(value, str) or not value:
        raise _refusal(field, value, "a string that is not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _refusal(field, value, "text that UTF-8 can encode") from None
    return value


def _schema(value: object) -> str:
    """Returns a JSON schema as text, in the order in which it was given."""
    allowed = "a JSON schema, an object as a dict or as its text"
    try:
        schema = json_module.loads(value) if isinstance(value, str) else value
        # Refuses NaN and infinities, which are no JSON.
        text = json_module.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{type(error).__name__}: {error}",
            field="structured_outputs.json",
            value=value,
            allowed=allowed,
        ) from None
    if not isinstance(schema, dict):
        raise _refusal("json", value, allowed)
    return _text("json", text)


def _choices(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise _refusal("choice", value, "a list of at least one string")
    return tuple(dict.fromkeys(_text(f"choice[{index}]", text) for index, text in enumerate(value)))
