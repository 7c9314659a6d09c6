# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Collectives between ranks: on GPUs where there are several, else on ranks of the CPU."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from device_arrays import rounded
from mrv1 import _core, _libraries
from mrv1.errors import DeviceError, InvalidArgumentError
from rank_devices import RankDevices, open_ranks

# Rows and columns: few, around a piece of 16 bytes and a warp of pieces, and some at random.
_SIZES = (
    *((1, 1), (1, 7), (3, 5), (1, 8), (5, 129), (1, 4096), (64, 4096), (37, 1001)),
    *map(tuple, np.random.default_rng(7).integers((1, 1), (40, 3000), (6, 2)).tolist()),
)
# What is left to see of NCCL, whose communicators take most of a test's time.
_NCCL_SIZES = ((1, 7), (37, 1001))
# More than ranks of two GPUs take at a time, and what is large for a test on the CPU.
_LARGE_SUMS = {"cuda": (1100, 8192), "cpu": (24, 8192)}
_LARGE_COLUMNS = {"cuda": (600, 8192), "cpu": (24, 8192)}
_KERNELS = ("auto", "one_shot", "two_shot", "nccl")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernels" in metafunc.fixturenames:
        on_gpus = metafunc.config.getoption("--device") == "cuda"
        metafunc.parametrize("kernels", _KERNELS if on_gpus else ("auto",))


class Ranks(RankDevices):
    """Devices of the ranks of a group."""

    @contextlib.contextmanager
    def probe(
        self, op: str, rows: int, cols: int, **options: object
    ) -> Iterator[_core.CollectiveProbe]:
        kernels = options.get("kernels", "auto")
        if self.kind == "cpu" and kernels != "auto":
            pytest.skip("ranks of the CPU have one way")
        if kernels == "nccl":
            options["nccl"] = _libraries.nccl_names()
        probe = _core.CollectiveProbe(self.devices, op, rows=rows, cols=cols, **options)
        try:
            yield probe
        finally:
            probe.close()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, device: str) -> Iterator[Ranks]:
    """Groups of GPUs as large as there are; the CPU has ranks of all sizes."""
    made = open_ranks(Ranks, device, request.param)
    yield made
    made.close()


def _sizes(kernels: str) -> tuple[tuple[int, int], ...]:
    return _NCCL_SIZES if kernels == "nccl" else _SIZES


def _values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values whose sums round, of many magnitudes."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal(shape, np.float32) * np.exp2(draw.integers(-6, 7, shape))
    return values.astype(np.float32)


def _sum(parts: list[np.ndarray], bias: np.ndarray | None, dtype: str) -> np.ndarray:
    """Neighbours first, in float32; then the bias; rounded once."""
    while len(parts) > 1:
        pairs = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[2 * len(pairs) :]
    return rounded(parts[0] if bias is None else parts[0] + bias, dtype)


def _check_sums(
    probe: _core.CollectiveProbe,
    size: int,
    shape: tuple[int, int, int],
    dtypes: tuple[str, str],
    seed: int,
    with_bias: bool = False,
    launches: int = 1,
) -> None:
    parts = [_values(shape, seed + rank) for rank in range(size)]
    bias = _values(shape[-1:], seed - 1) if with_bias else None
    for rank, values in enumerate(parts):
        probe.set_values(rank, values)
    if bias is not None:
        probe.set_bias(bias)
    probe.run(launches)
    expected = _sum([rounded(values, dtypes[0]) for values in parts], bias, dtypes[1])
    for rank in range(size):
        np.testing.assert_array_equal(probe.result(rank), expected, err_msg=f"rank {rank}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_are_exact_for_every_size(ranks: Ranks, dtype: str, kernels: str) -> None:
    if kernels == "nccl" and ranks.size > 2:
        pytest.skip("NCCL has an order of sums of its own")
    for seed, (rows, cols) in enumerate((*_sizes(kernels), _LARGE_SUMS[ranks.kind])):
        calls = 1 if (rows, cols) == _LARGE_SUMS[ranks.kind] else 3
        with ranks.probe(
            "all_reduce", rows, cols, dtype=dtype, calls=calls, kernels=kernels
        ) as probe:
            _check_sums(probe, ranks.size, (calls, rows, cols), (dtype, dtype), 100 * seed)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_sums_take_a_bias_any_address_and_a_narrower_dtype(
    ranks: Ranks, dtypes: tuple[str, str], offset: int, kernels: str
) -> None:
    if kernels == "nccl":
        pytest.skip("NCCL adds no bias and keeps the dtype")
    for rows, cols in ((5, 64), (7, 33)):
        with ranks.probe(
            "all_reduce",
            rows,
            cols,
            calls=2,
            dtype=dtypes[0],
            out_dtype=dtypes[1],
            with_bias=True,
            offset=offset,
            kernels=kernels,
        ) as probe:
            _check_sums(probe, ranks.size, (2, rows, cols), dtypes, 7 + cols, with_bias=True)


def test_repeated_sums_of_late_ranks_are_exact(ranks: Ranks, kernels: str) -> None:
    """Graphs of many calls whose ranks come at random times, replayed with new values."""
    if kernels == "nccl" and ranks.size > 2:
        pytest.skip("NCCL has an order of sums of its own")
    calls, rows, cols = (64, 4, 1024) if ranks.kind == "cuda" else (16, 4, 256)
    for in_place in (False, True):
        with ranks.probe(
            "all_reduce", rows, cols, calls=calls, in_place=in_place, delay=20e-6, kernels=kernels
        ) as probe:
            for seed in range(3):
                _check_sums(
                    probe,
                    ranks.size,
                    (calls, rows, cols),
                    ("bfloat16", "bfloat16"),
                    10 * seed,
                    launches=20 if ranks.kind == "cuda" else 3,
                )


def test_sizes_that_change_from_call_to_call_do_not_meet(ranks: Ranks) -> None:
    """Groups of one device after another: a call must not find what another one left behind."""
    for rows, cols in ((64, 4096), (1, 8), (64, 4096), (3, 5)):
        for kernels in ("auto",) if ranks.kind == "cpu" else ("one_shot", "two_shot"):
            with ranks.probe("all_reduce", rows, cols, kernels=kernels) as probe:
                for seed in (1, 2, 3):
                    _check_sums(probe, ranks.size, (1, rows, cols), ("bfloat16", "bfloat16"), seed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_columns_of_all_ranks_are_side_by_side(ranks: Ranks, dtype: str, kernels: str) -> None:
    for seed, (rows, cols) in enumerate((*_sizes(kernels), (3, 64128), _LARGE_COLUMNS[ranks.kind])):
        for offset in (0, 1) if cols < 8192 else (0,):
            with ranks.probe(
                "all_gather",
                rows,
                cols,
                calls=2,
                dtype=dtype,
                kernels=kernels,
                offset=offset,
                delay=10e-6,
            ) as probe:
                parts = [_values((2, rows, cols), 10 * seed + rank) for rank in range(ranks.size)]
                for rank, values in enumerate(parts):
                    probe.set_values(rank, values)
                probe.run(2)
                expected = rounded(np.concatenate(parts, axis=-1), dtype)
                for rank in range(ranks.size):
                    np.testing.assert_array_equal(probe.result(rank), expected)


@pytest.mark.parametrize("op", ["all_reduce", "all_gather"])
def test_a_rank_that_does_not_come_ends_the_group(ranks: Ranks, op: str, kernels: str) -> None:
    with ranks.probe(op, 4, 64, kernels=kernels, timeout=1.0) as probe:
        probe.run()
        start = time.monotonic()
        with pytest.raises(DeviceError, match=f"rank {ranks.size - 1} did not come"):
            probe.run(3, absent=ranks.size - 1)
        assert time.monotonic() - start < 9.0
        # For good, and at once.
        start = time.monotonic()
        with pytest.raises(DeviceError, match="did not come"):
            probe.run()
        assert time.monotonic() - start < 1.0
    # The devices are none the worse for it.
    with ranks.probe(op, 4, 64, kernels=kernels) as probe:
        probe.run()


def test_an_abort_ends_ranks_that_wait(ranks: Ranks, kernels: str) -> None:
    with ranks.probe("all_reduce", 4, 64, kernels=kernels, timeout=60.0) as probe:
        probe.run()
        failed: list[DeviceError] = []

        def run() -> None:
            try:
                probe.run(absent=0)
            except DeviceError as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.2)
        probe.abort("rank 0 has had enough")
        thread.join(10.0)
        assert not thread.is_alive()
        assert "rank 0 has had enough" in str(failed[0])


def test_one_rank_needs_no_group(device: str) -> None:
    """A group of one: sums are the values, with the bias and rounded."""
    ranks = Ranks(device, 1)
    try:
        for dtypes in (("float32", "bfloat16"), ("bfloat16", "bfloat16")):
            with ranks.probe(
                "all_reduce", 3, 5, dtype=dtypes[0], out_dtype=dtypes[1], with_bias=True
            ) as probe:
                _check_sums(probe, 1, (1, 3, 5), dtypes, 3, with_bias=True)
        with ranks.probe("all_gather", 3, 5) as probe:
            values = _values((1, 3, 5), 4)
            probe.set_values(0, values)
            probe.run()
            np.testing.assert_array_equal(probe.result(0), rounded(values, "bfloat16"))
    finally:
        ranks.close()


def test_what_does_not_fit_is_refused(ranks: Ranks) -> None:
    with pytest.raises(InvalidArgumentError, match="rows is 0"), ranks.probe("all_reduce", 0, 1):
        pass
    with pytest.raises(InvalidArgumentError, match="op = 'sum'"), ranks.probe("sum", 1, 1):
        pass
    with (
        pytest.raises(InvalidArgumentError, match="do not become wider"),
        ranks.probe("all_reduce", 1, 1, dtype="bfloat16", out_dtype="float32") as probe,
    ):
        probe.run()
    if ranks.kind == "cuda":
        with pytest.raises(InvalidArgumentError, match="there twice"):
            _core.CollectiveProbe([ranks.devices[0]] * 2, "all_reduce", rows=1, cols=1)
        with pytest.raises(DeviceError, match="no-such-library"):
            _core.CollectiveProbe(
                ranks.devices,
                "all_reduce",
                rows=1,
                cols=1,
                kernels="nccl",
                nccl=["no-such-library"],
            )


def test_time_is_that_of_a_call(ranks: Ranks) -> None:
    with ranks.probe("all_reduce", 4, 64, calls=4) as probe:
        seconds = probe.time(3, 2)
        assert len(seconds) == 3
        assert all(0.0 < second < 1.0 for second in seconds)
