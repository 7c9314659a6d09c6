# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Checks a built or installed wheel and the time that `import mrv1` takes.

    python scripts/check_package.py --wheel dist/mrv1-....whl [--cuda]
    python scripts/check_package.py --installed --import-time

The wheel must carry the stable-ABI tag, hold the typing files and the demo model, nothing outside
of the package, and stay under 10 MB without the demo model. With --cuda, the module of the running
environment must have been built with CUDA and must import all the same where there is no driver.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
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
    DEMO + "generation_config.json",
    DEMO + "model.safetensors",
    DEMO + "tokenizer.json",
)


def content_faults(where: str, names: Iterable[str]) -> Iterator[str]:
    """Yields a sentence for each file that is missing, or is not the package's."""
    found = set(names)
    for name in REQUIRED:
        if name not in found:
            yield f"{where}: {name} is missing"
    for name in sorted(found):
        top = name.split("/", 1)[0]
        if top != "mrv1" and not (top.startswith("mrv1-") and top.endswith(".dist-info")):
            yield f"{where}: {name} is outside of mrv1/ and *.dist-info/"


def installed_faults() -> Iterator[str]:
    """Yields a sentence for each thing that is wrong with the wheel that was installed."""
    package = importlib.metadata.distribution("mrv1")
    if f"Tag: {ABI_TAG.strip('-')}-" not in (package.read_text("WHEEL") or ""):
        yield f"the installed mrv1: the tag is not {ABI_TAG.strip('-')}"
    # pip adds the command, and the bytecode where it compiles.
    names = [str(file) for file in package.files or ()]
    yield from content_faults(
        "the installed mrv1",
        (name for name in names if not name.endswith((".pyc", "/bin/mrv1"))),
    )


def wheel_faults(path: Path) -> Iterator[str]:
    """Yields a sentence for each thing that is wrong with the wheel; prints its sizes."""
    if ABI_TAG not in path.name:
        yield f"{path.name}: the tag is not {ABI_TAG.strip('-')}"
    with zipfile.ZipFile(path) as wheel:
        sizes = {entry.filename: entry.compress_size for entry in wheel.infolist()}
    yield from content_faults(path.name, sizes)
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
    parser.add_argument("--installed", action="store_true", help="look into the installed mrv1")
    parser.add_argument("--cuda", action="store_true", help="the installed mrv1 must have CUDA")
    parser.add_argument("--import-time", action="store_true", help="time `import mrv1`")
    args = parser.parse_args()
    faults: list[str] = []
    if args.wheel:
        faults += wheel_faults(args.wheel)
    if args.installed:
        faults += installed_faults()
    if args.cuda:
        faults += cuda_faults()
    if args.import_time:
        faults += import_faults()
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
