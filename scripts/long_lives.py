# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Takes many steps of the engine's random lives, in shares of one process each.

    python scripts/long_lives.py --steps 1000000 --report lives.json
    python scripts/long_lives.py --steps 1000000 --report lives.json --device cuda --jobs 4

A share is one run of tests/test_engine_lifecycles.py with a seed of its own (1, 2, ...) and must
pass by itself. Shares run until the stepped engines have taken so many steps; engines with a thread
take a fifth on top. The report has what was counted, summed up, and time and memory of each share:
Hypothesis keeps what it has drawn, so a process grows with its steps, though the engine does not.
The first share that fails ends the run: its output is printed, and its seed repeats it. COMMIT=id
tells what the package was built from where there is no repository.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEST = "tests/test_engine_lifecycles.py"
KINDS = ("stepped", "thread")


def run_share(seed: int, steps: int, device: str) -> dict[str, Any]:
    """Runs the test once; its counts by kind, seconds and memory.

    Raises:
        RuntimeError: The test has failed; the message has its seed and output.
    """
    with tempfile.TemporaryDirectory() as directory:
        names = {"STEPS": str(steps), "SEED": str(seed), "COUNTS": directory}
        env = os.environ | {f"MRV1_TEST_{name}": value for name, value in names.items()}
        command = [sys.executable, "-m", "pytest", "-q", TEST, "--device", device]
        start = time.monotonic()
        with (
            tempfile.TemporaryFile("w+") as output,
            subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
            ) as process,
        ):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.monotonic() - start
            if process.returncode != 0:
                output.seek(0)
                raise RuntimeError(f"{output.read()}\nMRV1_TEST_SEED={seed} has failed")
        counts = {kind: json.loads(Path(directory, f"{kind}.json").read_text()) for kind in KINDS}
    return {
        "seed": seed,
        "counts": counts,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "max_rss_mb": round(usage.ru_maxrss / 1024, 1),
    }


def commit() -> str:
    """The commit of the tree, with a plus if it has changes that are in none."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]

    def git(*args: str) -> str:
        return subprocess.check_output(["git", *args], cwd=ROOT, text=True).strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def describe() -> dict[str, str]:
    """What a report speaks of."""
    return {
        "commit": commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, python "
        f"{platform.python_version()}",
    }


def summary(shares: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The part of the report that grows: sums over shares, and a line for each."""
    totals = {kind: Counter[str]() for kind in KINDS}
    for share in shares:
        for kind in KINDS:
            totals[kind].update(share["counts"][kind])
    return {
        "steps": totals["stepped"]["steps"],
        "thread_steps": totals["thread"]["steps"],
        "seconds": round(seconds, 1),
        "counts": {kind: dict(totals[kind].most_common()) for kind in KINDS},
        "shares": [
            {
                "seed": share["seed"],
                "steps": share["counts"]["stepped"]["steps"],
                **{name: share[name] for name in ("seconds", "cpu_seconds", "max_rss_mb")},
            }
            for share in sorted(shares, key=lambda share: int(share["seed"]))
        ],
    }


def main() -> int:
    """Exit code 0 if all shares have passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--share", type=int, default=20_000, help="MRV1_TEST_STEPS of a process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    about = {"figure": "engine lives", "device": args.device, **describe()}
    shares: list[dict[str, Any]] = []
    start, seed, steps = time.monotonic(), 0, 0
    with ThreadPoolExecutor(args.jobs) as pool:
        running: set[Future[dict[str, Any]]] = set()
        while running or steps < args.steps:
            while len(running) < args.jobs and steps < args.steps:
                seed += 1
                running.add(pool.submit(run_share, seed, args.share, args.device))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    shares.append(future.result())
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    return 1
                steps += shares[-1]["counts"]["stepped"]["steps"]
            # Whole after each share, so that a run that is ended early has a report too.
            report = about | summary(shares, time.monotonic() - start)
            args.report.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{steps} steps, {len(shares)} shares, {report['seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
