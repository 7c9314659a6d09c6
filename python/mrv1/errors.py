# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The exceptions of mrv1.

Every exception that mrv1 raises on purpose derives from `Mrv1Error` and from the built-in one of
its kind, so both `except Mrv1Error` and `except ValueError` do what one expects. Exceptions about a
value carry its field, the value and what is allowed, and format them as one sentence.
"""

from __future__ import annotations

import enum
import os
from typing import Final


class _Marker(enum.Enum):
    """Values that stand for the absence of one, where None is a value like any other."""

    UNSET = "unset"
    MISSING = "missing"


# The error is not about a value.
UNSET: Final = _Marker.UNSET
# The error is that there is no value.
MISSING: Final = _Marker.MISSING

_MAX_VALUE_CHARS = 80


def describe_value(value: object) -> str:
    """Returns `repr(value)`, cut to a length that fits a message; never raises.

    Args:
        value: Anything; a hostile value (an integer of a million digits, an object whose `repr`
            fails) gives a description instead.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes) and len(value) > _MAX_VALUE_CHARS:
        return f"{value[: _MAX_VALUE_CHARS // 2]!r}... ({len(value)} long)"
    if isinstance(value, list | tuple | dict | set | frozenset) and len(value) > 16:
        return f"a {type(value).__name__} of {len(value)} entries"
    try:
        text = repr(value)
    except Exception:
        # The error being reported matters more than the object that cannot describe itself.
        return f"an object of type {type(value).__name__}"
    return text if len(text) <= _MAX_VALUE_CHARS else text[:_MAX_VALUE_CHARS] + "..."


class Mrv1Error(Exception):
    """Root of all exceptions of mrv1."""


class _FieldError(Mrv1Error):
    """An error about one field of something: "subject: field = value: must be allowed".

    Attributes:
        field: Name of the field, or None.
        value: The refused value, or None.
        allowed: What would have been accepted, so that "must be " + allowed reads well, or None.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        field: str | None = None,
        value: object = UNSET,
        allowed: str | None = None,
        subject: str | None = None,
    ) -> None:
        parts = [] if subject is None else [subject]
        if field is not None:
            if value is MISSING:
                parts.append(f"{field} is missing")
            elif value is UNSET:
                parts.append(field)
            else:
                parts.append(f"{field} = {describe_value(value)}")
        elif not isinstance(value, _Marker):
            parts.append(describe_value(value))
        if message is not None:
            parts.append(message)
        if allowed is not None:
            parts.append(f"must be {allowed}")
        super().__init__(": ".join(parts))
        self.field = field
        self.value = None if isinstance(value, _Marker) else value
        self.allowed = allowed


class InvalidArgumentError(_FieldError, ValueError):
    """A value that the caller gave is not allowed."""


class RequestError(_FieldError, ValueError):
    """A request that cannot be admitted, or sampling parameters that no request may have.

    Attributes:
        request_id: The request, or None where there is none yet.
        field: Name of the refused field, or None.
        value: The refused value, or None.
        allowed: What would have been accepted, or None.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        request_id: str | None = None,
        field: str | None = None,
        value: object = UNSET,
        allowed: str | None = None,
    ) -> None:
        subject = None if request_id is None else f"request {describe_value(request_id)}"
        super().__init__(message, field=field, value=value, allowed=allowed, subject=subject)
        self.request_id = request_id


class ConfigError(_FieldError, ValueError):
    """A model directory whose configuration or tokenizer is damaged or not supported.

    Attributes:
        path: The file, or None.
        field: Name of the refused field; a dot leads into an object. Or None.
        value: The refused value, or None.
        allowed: What would have been accepted, or None.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        field: str | None = None,
        value: object = UNSET,
        allowed: str | None = None,
    ) -> None:
        name = None if path is None else os.fspath(path)
        super().__init__(message, field=field, value=value, allowed=allowed, subject=name)
        self.path = name


class WeightError(_FieldError, ValueError):
    """Weight files that are damaged or do not fit the model.

    Attributes:
        path: The file, or None.
        tensor: Name of the tensor, or None.
        field: Name of the refused field, or None.
        value: The refused value, or None.
        allowed: What would have been accepted, or None.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        field: str | None = None,
        value: object = UNSET,
        allowed: str | None = None,
    ) -> None:
        name = None if path is None else os.fspath(path)
        parts = [] if name is None else [name]
        if tensor is not None:
            parts.append(f"tensor {describe_value(tensor)}")
        subject = ": ".join(parts) or None
        super().__init__(message, field=field, value=value, allowed=allowed, subject=subject)
        self.path = name
        self.tensor = tensor


class OutOfMemoryError(Mrv1Error, MemoryError):
    """Too little memory for the part that the message names."""


class DeviceError(Mrv1Error, RuntimeError):
    """No such device, a build without it, or a launch that failed."""


class ClosedError(Mrv1Error, RuntimeError):
    """Use of something that was closed or has ended."""


class ForkError(Mrv1Error, RuntimeError):
    """Use of a parent process's object in a forked child."""


class InternalError(Mrv1Error, RuntimeError):
    """A broken invariant of mrv1: a bug, which no caller can cause."""
