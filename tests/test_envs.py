# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The registry of environment variables and its table in the documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mrv1 import envs
from mrv1.errors import InvalidArgumentError, Mrv1Error

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = {
    "MRV1_NUM_THREADS": None,
    "MRV1_DEVICE": "auto",
    "MRV1_LOG_LEVEL": None,
    "MRV1_NO_PROGRESS": False,
    "MRV1_FUSION": True,
    "MRV1_GRAPH_MODE": "auto",
    "MRV1_ATTENTION_BACKEND": "native",
    "MRV1_BATCH_INVARIANT": False,
    "MRV1_USE_TBO": "auto",
    "MRV1_TBO_MIN_PREFILL_TOKENS": 16384,
    "MRV1_TBO_MIN_DECODE_TOKENS": 16384,
    "MRV1_TBO_PROCESSORS": 0,
    "MRV1_SYNC": False,
    "MRV1_CHECK_SLOTS": False,
    "MRV1_CUBLASLT": None,
    "MRV1_NCCL": None,
    "MRV1_COLLECTIVES": "auto",
    "MRV1_TUNE": False,
    "MRV1_TUNE_DIR": "~/.cache/mrv1/tuning",
    "MRV1_MAX_BAD_WORDS_NUM": None,
    "MRV1_BAD_WORDS_MAX_LEN": None,
    "MRV1_MAX_STOP_SEQS_NUM": None,
    "MRV1_STOP_SEQS_MAX_LEN": None,
}


@pytest.mark.parametrize("name", envs.REGISTRY)
@pytest.mark.parametrize("text", [None, ""])
def test_unset_or_empty_gives_the_default(
    name: str, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, text)
    variable = envs.REGISTRY[name]
    assert variable.name == name
    assert variable.get() == variable.default == DEFAULTS[name]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("MRV1_NUM_THREADS", "1", 1),
        ("MRV1_NUM_THREADS", "0016", 16),
        ("MRV1_NUM_THREADS", "1024", 1024),
        ("MRV1_DEVICE", "CPU", "cpu"),
        ("MRV1_DEVICE", "cuda", "cuda"),
        ("MRV1_DEVICE", "auto", "auto"),
        ("MRV1_LOG_LEVEL", "debug", "DEBUG"),
        ("MRV1_LOG_LEVEL", "ERROR", "ERROR"),
        ("MRV1_NO_PROGRESS", "1", True),
        ("MRV1_NO_PROGRESS", "Yes", True),
        ("MRV1_FUSION", "0", False),
        ("MRV1_FUSION", "off", False),
        ("MRV1_GRAPH_MODE", "Piecewise", "piecewise"),
        ("MRV1_ATTENTION_BACKEND", "FlashInfer", "flashinfer"),
        ("MRV1_BATCH_INVARIANT", "1", True),
        ("MRV1_SYNC", "on", True),
        ("MRV1_COLLECTIVES", "NCCL", "nccl"),
        ("MRV1_MAX_BAD_WORDS_NUM", "0", 0),
        ("MRV1_BAD_WORDS_MAX_LEN", "8", 8),
        ("MRV1_MAX_STOP_SEQS_NUM", "999999999", 999_999_999),
        ("MRV1_STOP_SEQS_MAX_LEN", "0010", 10),
    ],
)
def test_values(name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    result = envs.REGISTRY[name].get()
    assert result == value
    assert type(result) is type(value)


def test_a_value_is_read_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRV1_NUM_THREADS", "2")
    assert envs.NUM_THREADS.get() == 2
    monkeypatch.setenv("MRV1_NUM_THREADS", "3")
    assert envs.NUM_THREADS.get() == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[
            ("MRV1_NUM_THREADS", t)
            for t in ("0", "-1", "1.0", "1025", " 2", "1_0", "\uff19", "all")
        ],
        *[("MRV1_DEVICE", t) for t in ("gpu", "cuda:0", " cpu")],
        *[("MRV1_LOG_LEVEL", t) for t in ("TRACE", "10")],
        *[("MRV1_NO_PROGRESS", t) for t in ("2", "maybe")],
        *[("MRV1_MAX_STOP_SEQS_NUM", t) for t in ("-1", "1.5", "10000000000", "\uff19")],
        *[("MRV1_FUSION", t) for t in ("-1", "01", "none")],
        *[("MRV1_COLLECTIVES", t) for t in ("one_shot", "mpi", "1")],
    ],
)
def test_a_bad_value_names_variable_value_and_what_is_allowed(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(InvalidArgumentError) as caught:
        envs.REGISTRY[name].get()
    message = str(caught.value)
    assert isinstance(caught.value, Mrv1Error)
    assert isinstance(caught.value, ValueError)
    assert name in message
    assert repr(text) in message
    assert envs.REGISTRY[name].allowed in message


def run_table_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "scripts" / "make_env_table.py")
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_documented_table_is_up_to_date(tmp_path: Path) -> None:
    assert run_table_script("--check").returncode == 0
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    for name in envs.REGISTRY:
        assert f"| `{name}` |" in text
    stale = tmp_path / "environment.md"
    stale.write_text(re.sub(r"\| `MRV1_FUSION`.*\n", "", text), encoding="utf-8")
    checked = run_table_script("--check", "--document", str(stale))
    assert checked.returncode == 1
    assert "out of date" in checked.stdout
    assert run_table_script("--document", str(stale)).returncode == 0
    assert stale.read_text(encoding="utf-8") == text
