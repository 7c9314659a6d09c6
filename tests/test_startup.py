# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""How weights get from files to the device, and what the start tells of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mrv1 import _core, loader
from mrv1.builder import Builder, Weight
from mrv1.errors import WeightError
from mrv1.loader import RunnerOptions, load_model
from mrv1.progress import format_phases
from serving_tools import LLAMA, Tensors, copy_model, greedy, make_prompt, open_runner, run_to_end

Array = np.ndarray
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_tensors(path: Path) -> Tensors:
    from safetensors.numpy import load_file

    return load_file(path)


def write_tensors(path: Path, tensors: Tensors, padding: int) -> None:
    """Writes a file whose header has any length, so that tensors begin anywhere."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + padding)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())


def first_logits(device: str, model: Path, dtype: str) -> np.ndarray:
    with open_runner(device, model, dtype=dtype) as runner:
        run_to_end(runner, make_prompt(9, 3), greedy(2))
        return runner.logits(0)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_and_places_of_tensors_do_not_matter(
    tmp_path: Path, device: str, dtype: str, padding: int
) -> None:
    """Values that all dtypes hold give the same model, however they are stored."""
    exact = {
        # Few bits of mantissa and magnitudes between those that halves hold.
        name: np.clip(tensor.astype(ml_dtypes.bfloat16).astype(np.float32), -8, 8)
        .astype(np.float16)
        .astype(ml_dtypes.bfloat16)
        .astype(np.float32)
        for name, tensor in read_tensors(LLAMA / "model.safetensors").items()
    }
    found = []
    for mixed in (False, True):
        root = copy_model(tmp_path / str(mixed))
        kinds = list(DTYPES.values())
        tensors = {
            name: tensor.astype(np.float16)
            .astype(np.float32)
            .astype(kinds[place % 3] if mixed else np.float32)
            for place, (name, tensor) in enumerate(exact.items())
        }
        write_tensors(root / "model.safetensors", tensors, padding if mixed else 0)
        found.append(first_logits(device, root, dtype))
    assert np.isfinite(found[0]).all() and found[0].std() > 0
    np.testing.assert_array_equal(found[0], found[1])


def test_many_files(tmp_path: Path, device: str) -> None:
    tensors = read_tensors(LLAMA / "model.safetensors")
    root = copy_model(tmp_path / "model")
    (root / "model.safetensors").unlink()
    shards = {name: f"model-{place % 3}.safetensors" for place, name in enumerate(tensors)}
    for shard in set(shards.values()):
        part = {name: tensor for name, tensor in tensors.items() if shards[name] == shard}
        write_tensors(root / shard, part, 0)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    np.testing.assert_array_equal(
        first_logits(device, root, "float32"), first_logits(device, LLAMA, "float32")
    )


def options(device: str) -> RunnerOptions:
    return RunnerOptions(device=device, dtype="float32", num_threads=1, num_kv_blocks=64)


def test_a_file_that_shrank_is_a_weight_error(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_model(tmp_path / "model")
    make_runner = loader.make_runner

    def shrink(*arguments: object) -> object:
        with (root / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        return make_runner(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "make_runner", shrink)
    with pytest.raises(WeightError, match="past the end of the file"):
        load_model(root, options(device), progress=False)


def test_what_progress_raises_ends_the_loading(device: str) -> None:
    with open_runner(device) as runner:
        native = runner.model.runner
        file = _core.MappedFile(str(LLAMA / "model.safetensors"))
        info = loader.read_checkpoint(LLAMA)[native.program.weights[0][3][0][0]]
        tensors = [[(0, 0, info.offset, loader.LOADABLE[info.dtype])]]

        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            native.load_tensors(file, tensors, interrupt)
        told: list[int] = []
        native.load_tensors(file, tensors, told.append)
        assert sum(told) == info.nbytes


@pytest.mark.parametrize("name", DTYPES)
def test_an_offset_is_added_when_a_vector_is_loaded(
    tmp_path: Path, native_device: _core.Device, name: str
) -> None:
    rng = np.random.default_rng(5)
    norms = rng.standard_normal(24).astype(DTYPES[name])
    config = _core.RunnerConfig()
    config.max_num_seqs = config.max_num_batched_tokens = 4
    config.max_model_len, config.num_blocks = 16, 3

    def logits(stored: Array, kind: str, offset: float) -> Array:
        # Two segments, at an odd place in the file.
        file = tmp_path / f"{offset}"
        file.write_bytes(b"?" + stored.tobytes())
        p = Builder("float32")
        table = p.matrix("embed", 30, 8)
        joined = p.fused_vector(("a", 8), ("b", 16), offset=offset)
        x = p.linear(p.embedding(table), p.matrix("up", 24, 8))
        x = p.attention(
            p.rms_norm(x, joined, 1e-6), num_heads=1, num_kv_heads=1, head_dim=8, kv_layer=0
        )
        p.logits(x, table)
        runner = _core.ModelRunner(native_device, p.program, config)
        for weight in (table, Weight(joined.index + 1)):
            runner.fill_random(weight.index, 1, 1.0)
        told: list[int] = []
        places = [(joined.index, 0, 1, kind), (joined.index, 1, 1 + 8 * stored.itemsize, kind)]
        runner.load_tensors(_core.MappedFile(str(file)), [places], told.append)
        runner.check_weights()
        assert sum(told) == stored.nbytes
        spec = _core.RowSpec()
        spec.token_ids, spec.prompt_len, spec.block_ids = [3, 4, 5], 3, [[1]]
        row, _ = runner.add_row(spec)
        assert not runner.result(runner.execute([(row, 3)])).error
        values = runner.logits(0)
        runner.close()
        return values

    kinds = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    added = norms.astype(np.float32) + np.float32(1.0)
    np.testing.assert_array_equal(logits(norms, kinds[name], 1.0), logits(added, "float32", 0.0))


def test_phases_of_a_start(device: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mrv1"):
        model = load_model(LLAMA, options(device), progress=False)
    phases = ["read headers and wire", "open device", "allocate", "load weights"]
    assert list(model.startup)[:4] == phases
    assert all(seconds >= 0 for seconds in model.startup.values())
    checkpoint = loader.read_checkpoint(LLAMA)
    assert model.startup_bytes["load weights"] == sum(info.nbytes for info in checkpoint.values())
    assert model.startup_bytes["allocate"] > model.startup_bytes["load weights"]
    for phase in phases:
        assert f"\n{phase}" in caplog.text
    model.runner.close()
    model.device.close()


def test_format_phases() -> None:
    assert format_phases({"read": 0.5, "a longer one": 2.0}, {"a longer one": 3_000_000_000}) == (
        "phase         seconds         MB    GB/s\n"
        "read             0.50\n"
        "a longer one     2.00     3000.0     1.5\n"
        "all              2.50"
    )
    assert "0.00" in format_phases({"instant": 0.0}, {"instant": 5})
