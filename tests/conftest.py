# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""One suite, run once per device: `pytest --device cpu` (the default) or `pytest --device cuda`."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mrv1 import _core, tuning

DATA = Path(__file__).parent / "data"

# Small machines are slow and noisy: no deadline per example, the same examples in every run.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda":
        # Python sees no signal while native code waits for a kernel that never ends.
        config.option.timeout_method = "thread"
    # A job in the background of a script starts with interrupts ignored, and so would its children.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where ops run")


_counts = pytest.StashKey[list[str]]()


@pytest.fixture
def report_line(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to the report at the end of the run."""
    return request.config.stash.setdefault(_counts, []).append


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    lines = config.stash.get(_counts, [])
    if lines:
        terminalreporter.section("what happened")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Name of the device under test."""
    name: str = request.config.getoption("--device")
    if name == "cuda" and not _core.cuda_available():
        pytest.exit(f"--device cuda: {_core.cuda_describe()}", returncode=2)
    return name


@pytest.fixture(scope="session")
def native_device(device: str) -> Iterator[_core.Device]:
    """A native device shared by tests of single ops."""
    native = tuning.make_device(device, num_threads=2)
    yield native
    native.close()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return DATA


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Small random models with goldens."""
    return DATA / "models"


def _native_threads() -> int:
    names = []
    for task in Path("/proc/self/task").iterdir():
        # A thread may have ended since.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.append(task.joinpath("comm").read_text().strip())
    return sum(name.startswith("mrv1-") for name in names)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Checks that a test leaves no native thread behind."""
    before = _native_threads()
    yield
    deadline = time.monotonic() + 10.0
    while _native_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _native_threads() == before
