# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Checks a built wheel and the time that `import mrv1` takes.

    python scripts/check_package.py --wheel dist/mrv1-....whl [--cuda]
    python scripts/check_package.py --import-time

The wheel must carry the stable-ABI tag, hold the typing files and the demo model, and stay under
10 MB without the demo model. With --cuda, the module of the running environment must have been
built with CUDA and must import all the same where there is no driver.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

MAX_WHEEL_MB = 10.0
MAX_IMPORT_SECONDS = 0.3
ABI_TAG = "-cp310-abi3-"
DEMO = "mrv1/demo/"
REQUIRED = (
    "mrv1/_core.abi3.so",
    "mrv1/_core.pyi",
    "mrv1/py.typed",
    DEMO + "config.json",
    DEMO + "tokenizer.json",
)


def wheel_faults(path: Path) -> Iterator[str]:
    """Yields a sentence for each thing that is wrong with the wheel; prints its sizes."""
    if ABI_TAG not in path.name:
        yield f"{path.name}: the tag is not {ABI_TAG.strip('-')}"
    with zipfile.ZipFile(path) as wheel:
        sizes = {entry.filename: entry.compress_size for entry in wheel.infolist()}
    for name in REQUIRED:
        if name not in sizes:
            yield f"{path.name}: {name} is missing"
    demo_mb = sum(size for name, size in sizes.items() if name.startswith(DEMO)) / 1e6
    rest_mb = path.stat().st_size / 1e6 - demo_mb
    print(f"{path.name}: {rest_mb:.2f} MB and a demo model of {demo_mb:.2f} MB")
    if rest_mb >= MAX_WHEEL_MB:
        yield f"{path.name}: {rest_mb:.2f} MB without the demo model, allowed {MAX_WHEEL_MB} MB"


def import_faults() -> Iterator[str]:
    """Yields a sentence if a fresh interpreter takes too long to start and import mrv1."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import mrv1"], check=True)
        best = min(best, time.perf_counter() - start)
    print(f"import mrv1: {best:.3f} s with the interpreter's start, best of 5")
    if best >= MAX_IMPORT_SECONDS:
        yield f"import mrv1 takes {best:.3f} s, allowed {MAX_IMPORT_SECONDS} s"


def cuda_faults() -> Iterator[str]:
    """Yields a sentence if the installed module was built without CUDA."""
    import mrv1._core as _core

    if not _core.cuda_built():
        yield "the installed mrv1 was built without CUDA"
    print(f"CUDA here: {_core.cuda_describe()}")


def main() -> int:
    """Runs the checks asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--wheel", type=Path, help="the wheel to look into")
    parser.add_argument("--cuda", action="store_true", help="the installed mrv1 must have CUDA")
    parser.add_argument("--import-time", action="store_true", help="time `import mrv1`")
    args = parser.parse_args()
    faults: list[str] = []
    if args.wheel:
        faults += wheel_faults(args.wheel)
    if args.cuda:
        faults += cuda_faults()
    if args.import_time:
        faults += import_faults()
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
