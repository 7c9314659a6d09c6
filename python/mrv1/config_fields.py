# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Fields of a JSON object, read one by one with checks.

The values of a config.json are trusted by the code that allocates, so nothing is taken from one but
through `Fields`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

from mrv1.errors import MISSING, ConfigError


class Fields:
    """The fields of one JSON object. null counts as missing, except for `with_defaults`.

    All methods that read raise ConfigError, which names the file, the field, its value and what is
    allowed. Without a default a field must be there.

    Args:
        path: File that errors name.
        values: The object.
        prefix: Where the object stands in the file, with a dot at its end, or "".
    """

    def __init__(self, path: Path, values: dict[str, object], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self.prefix = prefix

    def error(self, name: str, allowed: str, value: object = None) -> ConfigError:
        """Returns the error about a field; its own value unless one is given."""
        if value is None:
            value = self.values.get(name, MISSING)
        return ConfigError(path=self.path, field=self.prefix + name, value=value, allowed=allowed)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def with_defaults(self, values: dict[str, object]) -> Fields:
        """Returns the fields with values for those that are not there; null stays null."""
        return Fields(self.path, {**values, **self.values}, self.prefix)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"an integer in [{low}, {high}]")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not _is_number(value, low, high):
            raise self.error(name, f"a number in [{low:g}, {high:g}]")
        return float(cast("float", value))

    def numbers(self, name: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of `count` finite numbers in [low, high]."""
        values = self.values.get(name)
        allowed = f"a list of {count} numbers in [{low:g}, {high:g}]"
        if not isinstance(values, list) or len(values) != count:
            raise self.error(name, allowed)
        for place, value in enumerate(values):
            if not _is_number(value, low, high):
                raise self.error(f"{name}[{place}]", f"a number in [{low:g}, {high:g}]", value)
        return tuple(float(value) for value in values)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def object(self, name: str) -> Fields | None:
        """An object within this one, or None where there is none."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "an object or null")
        return Fields(self.path, cast("dict[str, object]", value), f"{self.prefix}{name}.")

    def expect(self, name: str, value: str | bool | None) -> None:
        """Refuses a field that says anything else than `value`; a missing one does not."""
        found = self.values.get(name)
        if found is None or (type(found) is type(value) and found == value):
            return
        raise self.error(name, json.dumps(value))


def _is_number(value: object, low: float, high: float) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )
