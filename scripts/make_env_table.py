# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Writes the table of environment variables in docs/environment.md from `mrv1.envs`.

python scripts/make_env_table.py            # rewrites the table
python scripts/make_env_table.py --check    # exits with 1 if the table is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mrv1 import envs

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "environment.md"
BEGIN = "<!-- begin: table by scripts/make_env_table.py -->"
END = "<!-- end: table by scripts/make_env_table.py -->"


def table() -> str:
    """Returns the table in Markdown, one row a variable."""
    lines = ["| Variable | Allowed | Default | What it does |", "|---|---|---|---|"]
    for variable in envs.REGISTRY.values():
        cells = (f"`{variable.name}`", variable.allowed, variable.default_text, variable.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def with_table(document: str) -> str:
    """Returns `document` with the text between the markers replaced by the table.

    Raises:
        ValueError: The document does not hold each marker exactly once, in order.
    """
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r} once each")
    head, rest = document.split(BEGIN)
    if END not in rest:
        raise ValueError(f"{END!r} stands before {BEGIN!r}")
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    parser = argparse.ArgumentParser(description="Writes the table of environment variables.")
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="the page to write to")
    options = parser.parse_args(arguments)
    before = options.document.read_text(encoding="utf-8")
    after = with_table(before)
    if options.check and before != after:
        print(f"{options.document} is out of date: run python scripts/make_env_table.py")
        return 1
    if before != after:
        options.document.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
