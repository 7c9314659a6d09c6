# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Tests of what the linear op of a GPU gets from its surroundings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mrv1 import _core, tuning
from mrv1.errors import InvalidArgumentError

TABLES = sorted(Path(tuning.__file__).parent.glob("*.txt"))
LINE = re.compile(
    r"[0-9]+ [0-9]+ [0-9]+ (float32|bfloat16) (float32|bfloat16)"
    r" (plain|bias|silu_mul|silu_mul\+bias) -> "
    r"(tiled|skinny (default|(mma|wgmma)( [0-9]+){4}|wide( [0-9]+){5})|cublaslt( [0-9]+){9})"
)


def test_library_is_looked_for_on_the_loaders_path_and_then_in_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MRV1_CUBLASLT", raising=False)
    library = tmp_path / "nvidia" / "cu13" / "lib" / tuning.LIBRARY
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path), str(tmp_path / "none")])
    assert tuning.library_names() == [tuning.LIBRARY, str(library.resolve())]
    assert tuning.linear_options()["use_library"]


def test_the_environment_names_the_library_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRV1_CUBLASLT", "/opt/libcublasLt.so.13")
    assert tuning.library_names() == ["/opt/libcublasLt.so.13"]
    monkeypatch.setenv("MRV1_CUBLASLT", "none")
    assert tuning.library_names() == []
    assert not tuning.linear_options()["use_library"]


def test_tables_of_the_user_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRV1_TUNE_DIR", str(tmp_path))
    monkeypatch.setenv("MRV1_TUNE", "1")
    options = tuning.linear_options()
    assert options["table_dirs"] == [str(tmp_path), str(Path(tuning.__file__).resolve().parent)]
    assert options["tune"]


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_shipped_tables_are_well_formed(table: Path) -> None:
    assert re.fullmatch(r"[a-z0-9-]+-cublaslt-[0-9]+\.[0-9]+\.[0-9]+\.txt", table.name)
    lines = [line.partition("#")[0].strip() for line in table.read_text("utf-8").splitlines()]
    entries = [line for line in lines if line]
    assert entries
    for entry in entries:
        assert LINE.fullmatch(entry), entry
    shapes = [entry.partition(" -> ")[0] for entry in entries]
    assert len(set(shapes)) == len(shapes)


def test_a_cpu_device_takes_no_library() -> None:
    device = tuning.make_device("cpu", num_threads=1)
    device.configure_linear(libraries=["/nowhere"], table_dirs=["/nowhere"])
    device.close()


def test_a_missing_library_is_named(device: str, tmp_path: Path) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    # In a process of its own: one that has opened the library keeps it.
    missing = str(tmp_path / tuning.LIBRARY)
    script = "from mrv1 import tuning; tuning.make_device('cuda')"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MRV1_CUBLASLT": missing},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "DeviceError" in run.stderr and missing in run.stderr


def test_a_damaged_table_is_named(device: str, tmp_path: Path) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    native = _core.Device("cuda")
    native.configure_linear(libraries=[], table_dirs=[], use_library=False)
    name = re.sub(r"[^a-z0-9]+", "-", native.name.lower()) + "-cublaslt-none.txt"
    (tmp_path / name).write_text("# comment\n64 64 x\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=f"{name}:2"):
        native.configure_linear(libraries=[], table_dirs=[str(tmp_path)], use_library=False)
    native.close()
