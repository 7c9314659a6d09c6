# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Objects that are closed at the end of a with block."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class Closing(abc.ABC):
    """A base for what holds memory and threads until `close`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Gives back what the object holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
