# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What of collectives runs beside other kernels, for kernels that are written by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from mrv1 import shapes
from mrv1._cupti import Kernel
from mrv1.bench_overlap import common, merged, overlap_of
from test_expert_parallel import CONFIG

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def kernel(name: str, start: float, end: float) -> Kernel:
    return Kernel(name, int(start * 1e6), int(end * 1e6), 1, 0, 0, (1, 1, 1), (1, 1, 1), 0)


def test_spans_are_merged_and_cut() -> None:
    assert merged([(5, 7), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 7)]
    assert common([(0, 4), (5, 7)], [(1, 2), (3, 6), (8, 9)]) == [(1, 2), (3, 4), (5, 6)]
    assert merged([]) == common([], [(0, 1)]) == []


def test_the_hidden_share_is_that_of_collectives() -> None:
    kernels = [
        kernel("linear_kernel", 0, 2),
        kernel("two_shot_kernel", 1, 4),  # half of what follows it, and the end of the linear
        kernel("rms_norm_kernel", 3.5, 5),
        kernel("one_shot_kernel", 5, 6),  # alone
        kernel("nvjet_tst_128x256", 7, 9),
        kernel("moe_wgmma_kernel", 9, 10),
        kernel("moe_dispatch_kernel", 10, 11),
        kernel("moe_combine_kernel", 11, 12),
    ]
    found = overlap_of(kernels)
    assert found.collective_ms == pytest.approx(6)
    assert found.hidden_ms == pytest.approx(1.5)
    assert found.compute_ms == pytest.approx(6.5)
    assert found.hidden_share == pytest.approx(1.5 / 6)
    assert overlap_of([]).hidden_share == 0


def test_records_name_the_commit_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("overlap", BENCHMARKS / "overlap.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(shapes, "shape_config", lambda *_: ("tiny", CONFIG))
    monkeypatch.setenv("MRV1_USE_TBO", "0")  # the script sets it
    file = tmp_path / "records.json"
    arguments = ["--device", "cpu", "--tokens", "8", "--repeats", "1", "--json", str(file)]
    script.main([*arguments, "--commit", "0123abc"])
    (record,) = json.loads(file.read_text())
    assert (record["commit"], record["shape"], record["tokens"]) == ("0123abc", "tiny", 8)


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_takes_a_commit(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert ('"--commit"' in text) == ('"--json"' in text)
