# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Tables of the documentation that scripts write: each lies between two markers of its page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in (header, *cells)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def with_table(document: str, script: str, table: str) -> str:
    """Returns `document` with the text between the markers of a script replaced by the table.

    Raises:
        ValueError: The document does not hold each marker exactly once, in order.
    """
    begin, end = (f"<!-- {which}: table by scripts/{script} -->" for which in ("begin", "end"))
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"expected the lines {begin!r} and {end!r} once each")
    head, rest = document.split(begin)
    if end not in rest:
        raise ValueError(f"{end!r} stands before {begin!r}")
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def main(
    script: str, page: Path, table: Callable[[], str], arguments: list[str] | None = None
) -> int:
    """Writes the table of a script, or compares it; returns the exit status."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    parser.add_argument("--document", type=Path, default=page, help="the page to write to")
    options = parser.parse_args(arguments)
    before = options.document.read_text(encoding="utf-8")
    after = with_table(before, script, table())
    if options.check and before != after:
        print(f"{options.document} is out of date: run python scripts/{script}")
        return 1
    if before != after:
        options.document.write_text(after, encoding="utf-8")
    return 0
