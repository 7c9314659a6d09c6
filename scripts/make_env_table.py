# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Writes the table of environment variables in docs/environment.md from `mrv1.envs`.

python scripts/make_env_table.py            # rewrites the table
python scripts/make_env_table.py --check    # exits with 1 if the table is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from document_table import main, markdown
from mrv1 import envs

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "environment.md"


def table() -> str:
    """Returns the table in Markdown, one row a variable."""
    return markdown(
        ("Variable", "Allowed", "Default", "What it does"),
        (
            (f"`{variable.name}`", variable.allowed, variable.default_text, variable.help)
            for variable in envs.REGISTRY.values()
        ),
    )


if __name__ == "__main__":
    sys.exit(main("make_env_table.py", DOCUMENT, table))
