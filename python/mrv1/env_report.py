# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What a bug report needs to say of the machine and the installation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from mrv1._version import __version__

_PACKAGES = ("numpy", "tokenizers", "nanobind-backend", "tqdm", "llguidance")


def package_version(name: str) -> str:
    """Version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """Name of the processor as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this package is in, "-dirty" if its code was changed."""
    package = Path(__file__).resolve().parent
    root = package.parent.parent
    if not (root / ".git").exists() or not (root / "python" / "mrv1").is_dir():
        return None

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )

    try:
        head = git("rev-parse", "HEAD")
        changed = git("diff", "--quiet", "HEAD", "--", "python", "src", "CMakeLists.txt")
    except OSError:  # there is no git
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")


def env_report() -> dict[str, str]:
    """Versions, machine, devices and MRV1_* variables, by name, in the order to print."""
    import mrv1._core as _core
    from mrv1 import envs, tuning

    report = {
        "mrv1": __version__,
        "commit": commit() or "not a checkout",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "package": str(Path(__file__).resolve().parent),
    }
    report.update({name: package_version(name) for name in _PACKAGES})
    device = _core.Device("cpu", num_threads=1)
    free, total = device.memory()
    device.close()
    report.update(
        {
            "system": platform.platform(),
            "libc": " ".join(platform.libc_ver()) or "unknown",
            "cpu": f"{cpu_model()} ({platform.machine()})",
            "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
            "cpu kernels": _core.cpu_isa(),
            "memory": f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB",
            "cuda built": "yes" if _core.cuda_built() else "no",
            "cuda": _core.cuda_describe(),
            "cublaslt": tuning.describe_library(),
        }
    )
    for name in envs.REGISTRY:
        report[name] = os.environ.get(name, "not set")
    return report


def format_report(report: dict[str, str]) -> str:
    """A report as aligned lines."""
    width = max(map(len, report))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in report.items())
