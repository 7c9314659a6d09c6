# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""docs/sampling.md says what the code does: parameters, defaults, limits, and its example runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mrv1 import SamplingParams, envs

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "sampling.md"


def parameter_rows() -> dict[str, list[str]]:
    """The cells of each row of the table of parameters, by parameter."""
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text.split("<!-- parameters -->")[1].split("<!-- end: parameters -->")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().split("\n")
    ]
    assert all(len(row) == 5 for row in rows)
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


def test_the_table_has_every_parameter_with_its_default() -> None:
    rows = parameter_rows()
    params = SamplingParams()
    assert sorted(rows) == sorted(field.name for field in dataclasses.fields(params))
    for name, (default, _, does, against) in rows.items():
        value = getattr(params, name)
        shown = "none" if value == () else f"{value:g}" if isinstance(value, float) else str(value)
        assert default == shown, name
        assert does and against, name


def test_parameters_that_are_not_here_are_refused() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    named = text.split("raise `TypeError`")[1].split("`skip_reading")[0]
    names = re.findall(r"`(\w+)`", named)
    assert len(names) >= 8
    for name in names:
        with pytest.raises(TypeError, match=name):
            SamplingParams(**{name: None})  # type: ignore[arg-type]


def test_the_limits_are_those_of_the_environment() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    named = set(re.findall(r"\| `(MRV1_\w+)` \|", text))
    assert named == {name for name in envs.REGISTRY if "BAD_WORDS" in name or "STOP_SEQS" in name}


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    example, structured = re.findall(
        r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S
    )
    names: dict[str, object] = {}
    exec(compile(example, str(DOCUMENT), "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2
    assert all(re.fullmatch(r".+: -?\d+\.\d\d, rank \d+", line) for line in lines[:-1])
    exec(compile(structured, str(DOCUMENT), "exec"), names)
    assert re.fullmatch(r"[a-z]{3,8}, (big|small)\n", capsys.readouterr().out)
    names["llm"].close()  # type: ignore[attr-defined]
