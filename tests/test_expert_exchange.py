# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""moe_dispatch and moe_combine between ranks: on GPUs where there are several, else on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from device_arrays import rounded
from mrv1 import _core, _libraries
from mrv1.errors import DeviceError, InvalidArgumentError
from rank_devices import RankDevices, open_ranks


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernels" in metafunc.fixturenames:
        on_gpus = metafunc.config.getoption("--device") == "cuda"
        metafunc.parametrize("kernels", ("auto", "nccl") if on_gpus else ("auto",))


class Ranks(RankDevices):
    """Devices of the ranks of a group."""

    @contextlib.contextmanager
    def probe(self, tokens: Sequence[int], **options: object) -> Iterator[_core.ExpertProbe]:
        kernels = options.get("kernels", "auto")
        if self.kind == "cpu" and kernels != "auto":
            pytest.skip("ranks of the CPU have one way")
        if kernels == "nccl":
            options["nccl"] = _libraries.nccl_names()
        probe = _core.ExpertProbe(self.devices, tokens=list(tokens), **options)
        try:
            yield probe
        finally:
            probe.close()


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest, device: str) -> Iterator[Ranks]:
    made = open_ranks(Ranks, device, request.param)
    yield made
    made.close()


def _rank_of(num_experts: int, size: int) -> np.ndarray:
    """The rank of each expert: neighbours, as many on each rank or one more."""
    return np.arange(num_experts) * size // num_experts


@dataclasses.dataclass
class Tokens:
    """Of a rank: values [calls, tokens, hidden], experts and weights [calls, tokens, top_k]."""

    values: np.ndarray
    experts: np.ndarray
    weights: np.ndarray


def _draw(
    draw: np.random.Generator, calls: int, tokens: int, hidden: int, top_k: int, num_experts: int
) -> Tokens:
    shape = (calls, tokens)
    values = draw.standard_normal((*shape, hidden), np.float32)
    chosen = np.argsort(draw.random((*shape, num_experts)), axis=-1)[..., :top_k]
    experts = chosen.astype(np.int32)
    experts[draw.random(shape) < 0.1] = -1  # tokens of padding
    weights = draw.random((*shape, top_k), np.float32)
    return Tokens(values, experts, weights)


def _places(experts: np.ndarray, rank_of: np.ndarray, size: int) -> np.ndarray:
    """[tokens, size]: how many earlier tokens went to a rank; -1 where a token did not."""
    places = np.full((len(experts), size), -1)
    counts = [0] * size
    for token, chosen in enumerate(experts):
        for rank in sorted({int(rank_of[expert]) for expert in chosen if expert >= 0}):
            places[token, rank] = counts[rank]
            counts[rank] += 1
    return places


def _sum_in_order(parts: list[np.ndarray]) -> np.ndarray:
    """Neighbours first, in float32."""
    while len(parts) > 1:
        pairs = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _combined(rows: list[np.ndarray | None], dtype: str) -> np.ndarray | float:
    """Of one token: the sum of what the ranks that had it have made of it."""
    if all(row is None for row in rows):
        return 0.0
    there = next(row for row in rows if row is not None)
    return rounded(
        _sum_in_order([np.full_like(there, -0.0) if row is None else row for row in rows]), dtype
    )


@pytest.mark.parametrize("hidden", [8, 33, 130, 1024])
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_tokens_come_once_and_sums_come_back(
    ranks: Ranks, dtypes: tuple[str, str], hidden: int, kernels: str
) -> None:
    """Against a slow and obvious model; experts that do not come out even, ranks without tokens."""
    dtype, sum_dtype = dtypes
    draw = np.random.default_rng(hidden)
    size, region_rows = ranks.size, 40
    for num_experts, top_k in ((2 * size + 1, 3), (size - 1, 1), (64, 8)):
        tokens = [*draw.integers(1, region_rows, size - 1).tolist(), 0]
        rank_of = _rank_of(num_experts, size)
        own = [_draw(draw, 1, count, hidden, top_k, num_experts) for count in tokens]
        partial = [
            draw.standard_normal((size, region_rows, hidden), np.float32) for _ in range(size)
        ]
        with ranks.probe(
            tokens,
            hidden=hidden,
            top_k=top_k,
            num_experts=num_experts,
            region_rows=region_rows,
            dtype=dtype,
            sum_dtype=sum_dtype,
            kernels=kernels,
        ) as probe:
            for rank in range(size):
                probe.set_tokens(rank, own[rank].values, own[rank].experts, own[rank].weights)
                probe.set_partial(rank, partial[rank])
            probe.run()
            got = [probe.received(rank) for rank in range(size)]
            results = [probe.result(rank) for rank in range(size)]
        for rank in range(size):
            places = _places(own[rank].experts[0], rank_of, size)
            np.testing.assert_array_equal(got[rank][4], places)
            for other in range(size):
                x, experts, weights, counts, _ = got[other]
                sent = np.flatnonzero(places[:, other] >= 0)
                assert counts[rank] == len(sent)
                np.testing.assert_array_equal(
                    x[rank, : len(sent)], rounded(own[rank].values[0, sent], dtype)
                )
                np.testing.assert_array_equal(
                    experts[rank, : len(sent)], own[rank].experts[0, sent]
                )
                np.testing.assert_array_equal(
                    weights[rank, : len(sent)], own[rank].weights[0, sent]
                )
            for token, row in enumerate(places):
                expected = _combined(
                    [
                        None if place < 0 else rounded(partial[other][rank, place], sum_dtype)
                        for other, place in enumerate(row)
                    ],
                    dtype,
                )
                np.testing.assert_array_equal(results[rank][0, token], expected)


def _check_echo(
    probe: _core.ExpertProbe, size: int, own: list[Tokens], num_experts: int, dtype: str
) -> None:
    """Without partial sums of its own, a token comes back once from every rank that had it."""
    rank_of = _rank_of(num_experts, size)
    for rank in range(size):
        values = rounded(own[rank].values, dtype)
        expected = np.zeros_like(values)
        for place in np.ndindex(values.shape[:2]):
            chosen = {int(rank_of[e]) for e in own[rank].experts[place] if e >= 0}
            rows = [values[place] if other in chosen else None for other in range(size)]
            expected[place] = _combined(rows, dtype)
        np.testing.assert_array_equal(probe.result(rank), expected)


def test_many_calls_of_late_ranks_do_not_meet(ranks: Ranks, kernels: str) -> None:
    """Graphs of many calls whose ranks come at random times, replayed with new tokens."""
    draw = np.random.default_rng(5)
    size = ranks.size
    calls, hidden, top_k, num_experts, rows = 12, 256, 4, 3 * size + 1, 24
    tokens = [rows, 1, *draw.integers(1, rows, size - 2).tolist()]
    with ranks.probe(
        tokens,
        hidden=hidden,
        top_k=top_k,
        num_experts=num_experts,
        region_rows=rows,
        calls=calls,
        delay=20e-6,
        kernels=kernels,
    ) as probe:
        for _ in range(3):
            own = [_draw(draw, calls, count, hidden, top_k, num_experts) for count in tokens]
            for rank, each in enumerate(own):
                probe.set_tokens(rank, each.values, each.experts, each.weights)
            probe.run(20 if ranks.kind == "cuda" else 2)
            _check_echo(probe, size, own, num_experts, "bfloat16")


def test_many_tokens_find_their_places(ranks: Ranks, kernels: str) -> None:
    """More than threads of a block have at a time, and not the same number on all ranks."""
    draw = np.random.default_rng(6)
    size = ranks.size
    rows = 20000 if ranks.kind == "cuda" else 1500
    tokens = [rows, rows // 3, *[7] * (size - 2)]
    with ranks.probe(
        tokens,
        hidden=16,
        top_k=4,
        num_experts=4 * size,
        region_rows=rows,
        kernels=kernels,
    ) as probe:
        own = [_draw(draw, 1, count, 16, 4, 4 * size) for count in tokens]
        for rank, each in enumerate(own):
            probe.set_tokens(rank, each.values, each.experts, each.weights)
        probe.run()
        _check_echo(probe, size, own, 4 * size, "bfloat16")
        for rank, each in enumerate(own):
            places = _places(each.experts[0], _rank_of(4 * size, size), size)
            np.testing.assert_array_equal(probe.received(rank)[4], places)


def test_all_ranks_without_tokens(ranks: Ranks, kernels: str) -> None:
    with ranks.probe(
        [0] * ranks.size, hidden=16, top_k=2, num_experts=4, region_rows=8, kernels=kernels
    ) as probe:
        probe.run(2)
        assert all((probe.received(rank)[3] == 0).all() for rank in range(ranks.size))


def test_a_rank_that_does_not_come_ends_the_group(ranks: Ranks, kernels: str) -> None:
    sizes = {"hidden": 16, "top_k": 2, "num_experts": 4, "region_rows": 8, "kernels": kernels}
    with ranks.probe([4] * ranks.size, timeout=0.5, **sizes) as probe:
        probe.run()
        start = time.monotonic()
        with pytest.raises(DeviceError, match=f"rank {ranks.size - 1} did not come"):
            probe.run(3, absent=ranks.size - 1)
        assert time.monotonic() - start < 8.0
        with pytest.raises(DeviceError, match="did not come"):
            probe.run()
    with ranks.probe([4] * ranks.size, **sizes) as probe:
        probe.run()
        probe.abort("rank 0 has had enough")
        with pytest.raises(DeviceError, match="has had enough"):
            probe.run()


def test_time_is_that_of_a_call(ranks: Ranks, kernels: str) -> None:
    for part in ("both", "dispatch", "combine"):
        with ranks.probe(
            [4] * ranks.size,
            hidden=16,
            top_k=2,
            num_experts=4,
            region_rows=8,
            calls=3,
            part=part,
            kernels=kernels,
        ) as probe:
            seconds = probe.time(2, 2)
            assert len(seconds) == 2
            assert all(0.0 < second < 1.0 for second in seconds)


def test_one_rank_needs_no_group(device: str) -> None:
    ranks = Ranks(device, 1)
    draw = np.random.default_rng(8)
    try:
        with ranks.probe([9], hidden=24, top_k=2, num_experts=5, region_rows=9) as probe:
            own = _draw(draw, 1, 9, 24, 2, 5)
            probe.set_tokens(0, own.values, own.experts, own.weights)
            probe.run()
            _check_echo(probe, 1, [own], 5, "bfloat16")
    finally:
        ranks.close()


def test_what_does_not_fit_is_refused(ranks: Ranks) -> None:
    sizes = {"hidden": 16, "top_k": 2, "num_experts": 4, "region_rows": 8}
    for changed, match in (
        ({"top_k": 0}, "top_k is 0"),
        ({"region_rows": 3}, "a rank has 4 tokens"),
        ({"part": "half"}, "part = 'half'"),
        ({"dtype": "float32", "sum_dtype": "bfloat16"}, "do not become"),
    ):
        with (
            pytest.raises(InvalidArgumentError, match=match),
            ranks.probe([4] * ranks.size, **{**sizes, **changed}),
        ):
            pass
    with pytest.raises(InvalidArgumentError, match="kernels = 'mpi': must be auto, one_shot, "):
        _core.ExpertProbe(ranks.devices, tokens=[4] * ranks.size, kernels="mpi", **sizes)
    with (
        pytest.raises(InvalidArgumentError, match="tokens of 1 ranks"),
        ranks.probe([4], **sizes),
    ):
        pass
    with ranks.probe([4] * ranks.size, **sizes) as probe:
        tokens = _draw(np.random.default_rng(0), 1, 4, 16, 2, 4)
        with pytest.raises(InvalidArgumentError, match="there is no expert 4"):
            probe.set_tokens(0, tokens.values, np.full_like(tokens.experts, 4), tokens.weights)
        with pytest.raises(InvalidArgumentError, match="there is no rank"):
            probe.result(ranks.size)
    if ranks.kind == "cuda":
        with (
            pytest.raises(InvalidArgumentError, match="expert_blocks"),
            ranks.probe([4] * ranks.size, **sizes, blocks=65),
        ):
            pass
