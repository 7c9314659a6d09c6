# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Reads files and JSON that nobody has checked yet, in bounded memory.

What is wrong is raised as a `FileError`; the caller knows what the file is for and turns it into
the exception that its own caller expects.
"""

from __future__ import annotations

import json
import math
import os
import stat
from typing import IO, Final

# Longest number that a file may spell out: enough for 64-bit integers and any printed double.
_MAX_NUMBER_CHARS: Final = 32


class FileError(Exception):
    """A file cannot be read, or what it holds is not JSON as this project accepts it."""


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a regular file for unbuffered reading; symbolic links to one are followed.

    Raises:
        FileError: There is no such file, it cannot be opened, or it is a directory, a pipe or a
            device, which could block or never end.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileError("there is no such file") from None
    except (OSError, ValueError) as error:
        raise FileError(f"cannot be opened: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError("is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_exactly(file: IO[bytes], size: int) -> bytes:
    """Returns the next `size` bytes of `file`, which the caller knows to be an acceptable size.

    Raises:
        FileError: The file ends before, or reading fails.
    """
    parts: list[bytes] = []
    left = size
    while left > 0:
        try:
            part = file.read(left)
        except OSError as error:
            raise FileError(f"cannot be read: {error}") from None
        if not part:
            raise FileError(f"is truncated: {left} of {size} bytes are missing")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def read_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Returns the content of a regular file.

    Raises:
        FileError: The file cannot be read, or holds more than `max_bytes`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise FileError(f"holds {size} bytes, at most {max_bytes} are allowed")
        return read_exactly(file, size)


def parse_json(data: bytes, max_values: int) -> object:
    """Returns the value of a JSON text.

    Stricter than `json.loads`: UTF-8 only, no NaN or infinity in any spelling, no object with the
    same key twice, no overlong number, no lone surrogate, and no more values than `max_values`, so
    that memory stays in proportion.

    Args:
        data: The text.
        max_values: Upper bound of the number of values, and so of the memory they take. It is
            compared with a cheap overestimate that also counts punctuation inside strings.

    Raises:
        FileError: The text is refused.
    """
    if 1 + sum(data.count(mark) for mark in (b",", b":", b"[", b"{")) > max_values:
        raise FileError(f"is not accepted: more than {max_values} JSON values")
    try:
        value: object = json.loads(
            data.decode("utf-8"),
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_keys,
        )
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except FileError:
        raise
    except RecursionError:
        raise FileError("is not accepted: JSON nested too deeply") from None
    except UnicodeEncodeError:
        raise FileError("is not accepted: a JSON string holds a lone surrogate") from None
    except UnicodeDecodeError as error:
        raise FileError(f"is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise FileError(f"is not valid JSON: {error}") from None
    return value


def _parse_int(text: str) -> int:
    if len(text) > _MAX_NUMBER_CHARS:
        raise FileError(f"is not accepted: a number of {len(text)} characters")
    return int(text)


def _parse_float(text: str) -> float:
    if len(text) > _MAX_NUMBER_CHARS:
        raise FileError(f"is not accepted: a number of {len(text)} characters")
    value = float(text)
    if not math.isfinite(value):
        raise FileError(f"is not accepted: the number {text} is beyond float64")
    return value


def _refuse_constant(text: str) -> object:
    raise FileError(f"is not accepted: {text} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise FileError(f"is not accepted: the key {key[:80]!r} occurs twice")
            seen.add(key)
    return result
