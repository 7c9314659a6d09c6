# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Checks the rules of the tree that no off-the-shelf linter knows.

python scripts/check_house.py    # exits with 1 and names file and line of each offence
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 1000
NOTICE = "Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0"
NATIVE = {".h", ".cc", ".cu", ".cuh"}
GENERATED = {PurePosixPath("python/mrv1/_core.pyi")}

CUDA_INCLUDE = re.compile(
    r'\s*#\s*include\s*[<"](cuda|cublas|cub/|thrust/|cute/|cutlass|nccl|nvtx)'
)
CUDA_CONDITION = re.compile(r"\s*#\s*(if|elif|ifdef|ifndef)\b.*CUDA")
TORCH_IMPORT = re.compile(r"\s*(import|from)\s+(torch|transformers)\b")
LEFTOVER = re.compile(r"\b(TODO|FIXME|XXX)\b")
# A .cuh holds device code by the same rule, so that what includes one needs nvcc too.
DEVICE_CODE = re.compile(r'__global__|__device__|<<<|^\s*#\s*include\s*[<"][^>"]*\.cuh[>"]', re.M)
LINE_COMMENT = re.compile(r"//.*")


def source_files() -> Iterator[PurePosixPath]:
    """Yields the files that are tracked or that a commit would add, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in sorted(set(listed.split("\0")) - {""}):
        if (ROOT / name).is_file():
            yield PurePosixPath(name)


def offences(path: PurePosixPath, text: str) -> Iterator[tuple[int, str]]:
    """Yields (line number, sentence) for each rule that the file breaks."""
    lines = text.splitlines()
    in_cuda = path.is_relative_to("src/cuda")
    if len(lines) > MAX_LINES and path not in GENERATED:
        yield len(lines), f"the file is longer than {MAX_LINES} lines"
    if path not in GENERATED:
        head = lines[1:2] if lines and lines[0].startswith("#!") else lines[:1]
        if not head or NOTICE not in head[0]:
            yield 1, f"the first line does not hold {NOTICE!r}"
    if path.suffix in {".cu", ".cuh"}:
        if not in_cuda:
            yield 1, f"a {path.suffix} file outside src/cuda"
        if not DEVICE_CODE.search(LINE_COMMENT.sub("", text)):
            yield 1, f"a {path.suffix} file without device code"
    for number, line in enumerate(lines, 1):
        if path.suffix in NATIVE and not in_cuda:
            if CUDA_INCLUDE.match(line):
                yield number, "a CUDA header outside src/cuda"
            if CUDA_CONDITION.match(line) and path.name != "portable.h":
                yield number, "a condition on CUDA outside src/cuda and core/portable.h"
        if path.is_relative_to("python/mrv1") and TORCH_IMPORT.match(line):
            yield number, "the package imports neither torch nor transformers"
        if LEFTOVER.search(line) and path != PurePosixPath("scripts/check_house.py"):
            yield number, "unfinished work"


def main() -> int:
    """Prints the offences; returns the exit status."""
    count = 0
    for path in source_files():
        if path.suffix in NATIVE | {".py", ".pyi", ".sh", ".cmake"}:
            for number, sentence in offences(path, (ROOT / path).read_text(encoding="utf-8")):
                print(f"{path}:{number}: {sentence}")
                count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
