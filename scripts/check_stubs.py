# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Compares python/mrv1/_core.pyi with the stub that the installed extension module gives.

python scripts/check_stubs.py            # exits with 1 and prints the difference
python scripts/check_stubs.py --write    # rewrites the file

Needs nanobind (the version of pyproject.toml) and an installed mrv1.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from pathlib import Path

from nanobind.stubgen import StubGen

MODULE = "mrv1._core"
STUB = Path(__file__).resolve().parent.parent / "python" / "mrv1" / "_core.pyi"


def generate() -> str:
    """Returns the text of the stub of the installed extension module."""
    module = importlib.import_module(MODULE)
    generator = StubGen(module=module, quiet=True)
    generator.put(module)
    text: str = generator.get()
    return text


def main() -> int:
    """Runs the check or the rewrite; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="rewrite the stub file")
    args = parser.parse_args()

    expected = generate()
    if args.write:
        STUB.write_text(expected, encoding="utf-8")
        return 0
    found = STUB.read_text(encoding="utf-8") if STUB.exists() else ""
    if found == expected:
        return 0
    sys.stdout.writelines(
        difflib.unified_diff(
            found.splitlines(keepends=True),
            expected.splitlines(keepends=True),
            fromfile=str(STUB),
            tofile=f"stub of {MODULE}",
        )
    )
    print(f"{STUB} is out of date: run python scripts/check_stubs.py --write", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
