# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What happens to a runner at the edges: closed in use, sized absurdly, accounted for."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from mrv1 import ModelRunner, RunnerOptions, SamplingParams, _core
from mrv1.config import ModelConfig
from mrv1.errors import ClosedError, InvalidArgumentError
from mrv1.loader import wire_model


@pytest.mark.parametrize("delay", [0.0, 0.0005, 0.002])
def test_close_while_another_thread_waits(device: str, models_dir: Path, delay: float) -> None:
    """The waiting call ends with its result, later ones with ClosedError; nothing crashes."""
    runner = ModelRunner(models_dir / "llama3-tied", device=device, num_kv_blocks=64)
    row = runner.add_row(
        [1, 2, 3], SamplingParams(temperature=0, max_tokens=400), block_ids=range(1, 33)
    )
    errors: list[BaseException] = []

    def work() -> None:
        try:
            runner.execute([(row, 3)]).result()
            for _ in range(350):
                runner.execute([(row, 1)]).result()
        except ClosedError:
            pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    threading.Event().wait(delay)
    runner.close()
    thread.join(30)
    assert not thread.is_alive()
    assert not errors
    with pytest.raises(ClosedError):
        runner.execute([])


def test_steps_that_were_never_launched_are_not_ready(device: str, models_dir: Path) -> None:
    with ModelRunner(models_dir / "llama3-tied", device=device, num_kv_blocks=8) as runner:
        step = runner.execute([]).step
        for unknown in (0, step + 1, 999):
            with pytest.raises(InvalidArgumentError, match="was never launched"):
                runner.model.runner.ready(unknown)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 2**31 - 1),
        ("max_num_seqs", 2**31 - 1),
        ("max_num_batched_tokens", 2**31 - 1),
        ("block_size", 5000),
    ],
)
def test_absurd_sizes_are_refused_by_name(
    device: str, models_dir: Path, field: str, value: int
) -> None:
    with pytest.raises(InvalidArgumentError, match=field):
        ModelRunner(models_dir / "llama3-tied", device=device, **{field: value})  # type: ignore[arg-type]


def test_memory_plan_counts_the_view(models_dir: Path, native_device: _core.Device) -> None:
    config = ModelConfig.from_dir(models_dir / "llama3-tied")
    program = wire_model(config, "float32")
    native = _core.RunnerConfig()
    rows, tokens, length, block = 8, 64, 128, 16
    native.max_num_seqs, native.max_num_batched_tokens = rows, tokens
    native.max_model_len, native.num_blocks, native.block_size = length, 33, block
    without = _core.ModelRunner.plan_memory(program, native, native_device)["state"]
    native.infer_param_view = True
    extra = _core.ModelRunner.plan_memory(program, native, native_device)["state"] - without
    maps, lods = 8 * rows, 3 * (rows + 1)
    assert extra == 4 * (3 * rows + maps + lods + rows * length // block + tokens + 7)


def test_options_have_a_keyword_each() -> None:
    from mrv1.loader import RunnerKwargs

    fields = {field.name for field in dataclasses.fields(RunnerOptions)}
    assert fields == set(RunnerKwargs.__annotations__)
