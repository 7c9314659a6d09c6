# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Makes a checkpoint with NVFP4 weights from one with plain ones (docs/quantization.md)."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from mrv1 import _core
from mrv1._files import FileError, open_regular, parse_json, read_exactly, read_file
from mrv1._version import __version__
from mrv1.config import CONFIG_NAME, MAX_FILE_BYTES, MAX_JSON_VALUES, ModelConfig, model_root
from mrv1.errors import InvalidArgumentError, WeightError
from mrv1.loader import LOADABLE, match_tensors, wire_model
from mrv1.progress import is_shown, progress_bar
from mrv1.quantization import (
    MODULE_NAME,
    NVFP4,
    NVFP4_BLOCK,
    QUANT_CONFIG_NAME,
    Quantization,
    is_module_name,
    nvfp4_tensors,
)
from mrv1.safetensors_reader import INDEX_NAME, TensorInfo, read_checkpoint
from mrv1.safetensors_writer import SHARD_BYTES, NewTensor, write_checkpoint, write_json

_T = TypeVar("_T")

REPORT_NAME: Final = "nvfp4_report.json"
# Always plain: the head costs the most accuracy for its size.
_DEFAULT_EXCLUDE: Final = ("lm_head",)
# Largest magnitude of activations that the scale of activations allows for where no calibration has
# measured it. Only kernels that quantise activations too use it.
_INPUT_LARGEST: Final = 448.0
# Elements that are quantised at a time, by each thread.
_PIECE: Final = 1 << 22
# Projections that other programs fuse into one matrix with one global scale.
_FUSED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
# Weights in other formats, which the new checkpoint would otherwise have beside its own.
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5")


@dataclasses.dataclass
class TensorReport:
    """What quantisation changed of a tensor.

    Attributes:
        name: Of the tensor.
        shape: Of the matrix.
        global_scale: Its float32 scale.
        relative_error: Root of the sum of squared errors over that of squares.
        largest_error: The largest magnitude of an error.
    """

    name: str
    shape: tuple[int, ...]
    global_scale: float
    relative_error: float
    largest_error: float


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    exclude: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> list[TensorReport]:
    """Writes a model directory whose linear layers are NVFP4, as ModelOpt lays them out.

    Embeddings, routers, norms and the output head stay as they are; so do modules of `exclude`. The
    target appears only when it is complete.

    Args:
        source: A model directory with plain weights.
        target: Where to; it must not exist, or be empty.
        exclude: More modules that stay as they are; `*` stands for any characters. Each must be of
            the model.
        shard_bytes: Size of a weight file from which on the next is begun.
        progress: Whether to show a progress bar; None shows it on a terminal.

    Raises:
        ConfigError: The source's config is not supported, or it is quantised already.
        WeightError: The source's weights are damaged or not those of its config, or a value is not
            finite.
        InvalidArgumentError: The target is there already, or cannot be written to, or `exclude` has
            what is no module of the model.
    """
    is_shown(progress)
    _check_exclude(exclude)
    root = model_root(source, "source")
    # The directory itself is replaced, and not a link to it.
    goal = model_root(target, "target").resolve()
    config = ModelConfig.from_dir(root)
    if config.quantization is not None:
        raise InvalidArgumentError(
            field="source", value=os.fspath(root), allowed="a checkpoint with plain weights"
        )
    if os.path.lexists(goal) and not (goal.is_dir() and not any(goal.iterdir())):
        raise InvalidArgumentError(field="target", value=os.fspath(goal), allowed="new or empty")
    tensors = read_checkpoint(root)
    work = _Quantizer(config, tensors, exclude)
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{goal.name}.", dir=goal.parent))
    except OSError as error:
        raise _cannot_write(goal, error) from None
    try:
        work.write(root, partial, shard_bytes, progress)
        partial.chmod(0o755)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(goal)
        _sync(goal.parent)
    except OSError as error:
        raise _cannot_write(goal, error) from None
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
    return work.reports


def _cannot_write(goal: Path, error: OSError) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"cannot be written: {error}", field="target", value=os.fspath(goal)
    )


def _sync(path: Path) -> None:
    """Waits until a file, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Quantizer:
    """One checkpoint on its way.

    Attributes:
        reports: Of the tensors that have been quantised.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, TensorInfo], exclude: Sequence[str]
    ) -> None:
        self.reports: list[TensorReport] = []
        self._tensors = tensors
        match_tensors([wire_model(config, "bfloat16", fusion=False)], tensors, config)
        quantization = Quantization((*_DEFAULT_EXCLUDE, *exclude))
        quantised, plain = _split(config, quantization)
        matrices = [*quantised, *plain]
        for name in exclude:
            one = Quantization((name,))
            if name not in _DEFAULT_EXCLUDE and all(one.covers(each) for each in matrices):
                raise InvalidArgumentError(
                    "no matrix of the model is in it",
                    field="exclude",
                    value=name,
                    allowed=MODULE_NAME,
                )
        self._quantised = quantised
        # A list that names what its patterns do already would have all experts.
        modules = [name.removesuffix(".weight") for name in plain if quantization.covers(name)]
        self._exclude = list(dict.fromkeys((*quantization.exclude, *modules)))
        self._global_scales: dict[str, float] = {}

    def write(self, root: Path, partial: Path, shard_bytes: int, progress: bool | None) -> None:
        """Writes all files of the new directory."""
        _copy_others(root, partial)
        self._write_configs(root, partial)
        new = [tensor for info in self._tensors.values() for tensor in self._new_tensors(info)]
        total = sum(tensor.nbytes for tensor in new)
        with progress_bar("Quantising", total, unit="B", show=progress) as advance:
            write_checkpoint(partial, new, advance, shard_bytes=shard_bytes)
        write_json(partial / REPORT_NAME, [dataclasses.asdict(report) for report in self.reports])

    def _write_configs(self, root: Path, partial: Path) -> None:
        producer = {"name": "mrv1", "version": __version__}
        values = parse_json(read_file(root / CONFIG_NAME, MAX_FILE_BYTES), MAX_JSON_VALUES)
        assert isinstance(values, dict)
        # One that is there says how the KV cache is quantised, and nothing else.
        old = values.get("quantization_config") or {}
        codes = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_BLOCK}
        group = {"input_activations": codes, "weights": codes, "targets": ["Linear"]}
        values["quantization_config"] = {
            **{key: old[key] for key in ("kv_cache_scheme",) if key in old},
            "config_groups": {"group_0": group},
            "ignore": self._exclude,
            "quant_algo": NVFP4,
            "quant_method": "modelopt",
            "producer": producer,
        }
        write_json(partial / CONFIG_NAME, values)
        has_cache = old.get("kv_cache_scheme") is not None
        section = {
            "quant_algo": NVFP4,
            "kv_cache_quant_algo": "FP8" if has_cache else None,
            "group_size": NVFP4_BLOCK,
            "exclude_modules": self._exclude,
        }
        write_json(partial / QUANT_CONFIG_NAME, {"producer": producer, "quantization": section})

    def _new_tensors(self, info: TensorInfo) -> list[NewTensor]:
        """What is written for a tensor of the source."""
        if info.name not in self._quantised:
            return [NewTensor(info.name, info.dtype, info.shape, lambda: _read_pieces(info))]
        rows, cols = info.shape
        scales: list[NDArray[np.uint8]] = []
        input_scale = _core.nvfp4_global_scale(_INPUT_LARGEST)
        names = nvfp4_tensors(info.name)
        return [
            NewTensor(
                names["nvfp4_codes"], "U8", (rows, cols // 2), lambda: self._quantise(info, scales)
            ),
            NewTensor(
                names["nvfp4_block_scales"],
                "F8_E4M3",
                (rows, cols // NVFP4_BLOCK),
                lambda: (part.data.cast("B") for part in _taken(scales)),
            ),
            NewTensor(
                names["nvfp4_global_scale"],
                "F32",
                (),
                lambda: [_float_bytes(self._global_scale(info.name))],
            ),
            NewTensor(names["nvfp4_input_scale"], "F32", (), lambda: [_float_bytes(input_scale)]),
        ]

    def _quantise(self, info: TensorInfo, scales: list[NDArray[np.uint8]]) -> Iterator[memoryview]:
        """Yields the codes of a tensor; its block scales are appended to `scales`."""
        global_scale = self._global_scale(info.name)
        cols = info.shape[1]
        squared_errors = squares = largest = 0.0

        def quantise(
            data: NDArray[np.uint8],
        ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], float, float, float]:
            return _core.quantize_nvfp4(data, LOADABLE[info.dtype], cols, global_scale)

        for codes, block_scales, error, square, most in _in_threads(quantise, info):
            scales.append(block_scales)
            squared_errors += error
            squares += square
            largest = max(largest, most)
            yield codes.data.cast("B")
        relative = math.sqrt(squared_errors / squares) if squares > 0 else 0.0
        self.reports.append(TensorReport(info.name, info.shape, global_scale, relative, largest))

    def _global_scale(self, name: str) -> float:
        """The global scale of a tensor, and of those that are fused with it elsewhere."""
        if name not in self._global_scales:
            group = [each for each in _fused_with(name) if each in self._quantised]
            scale = _core.nvfp4_global_scale(
                max(_largest_magnitude(self._tensors[each]) for each in group)
            )
            self._global_scales.update((each, scale) for each in group)
        return self._global_scales[name]


def _split(config: ModelConfig, quantization: Quantization) -> tuple[set[str], list[str]]:
    """The tensors of matrices that are quantised, and of those that are not."""
    program = wire_model(
        dataclasses.replace(config, quantization=quantization), "bfloat16", fusion=False
    )
    quantised: set[str] = set()
    plain: list[str] = []
    for weight, is_nvfp4 in zip(program.weights, program.weight_is_nvfp4, strict=True):
        _, is_vector, _, segments = weight
        names = [name for name, _ in segments]
        if is_nvfp4:
            quantised.update(names)
        elif not is_vector:
            plain += names
    return quantised, plain


def _check_exclude(exclude: Sequence[str]) -> None:
    if isinstance(exclude, str) or not all(map(is_module_name, exclude)):
        raise InvalidArgumentError(
            field="exclude", value=exclude, allowed=f"a sequence, of which each is {MODULE_NAME}"
        )


def _fused_with(name: str) -> list[str]:
    """The tensors that share a global scale with this one, itself included."""
    parent, _, module = name.removesuffix(".weight").rpartition(".")
    for group in _FUSED:
        if module in group:
            return [f"{parent}.{each}.weight" for each in group]
    return [name]


def _copy_others(root: Path, partial: Path) -> None:
    """Copies the files that are neither weights nor rewritten: tokenizer, templates, licences."""
    rewritten = (CONFIG_NAME, QUANT_CONFIG_NAME, INDEX_NAME, REPORT_NAME)
    for path in sorted(root.iterdir()):
        is_weight = path.name.endswith((*_WEIGHT_SUFFIXES, ".index.json"))
        if path.is_file() and not is_weight and path.name not in rewritten:
            shutil.copyfile(path, partial / path.name)


def _read_pieces(info: TensorInfo, unit: int = 1) -> Iterator[memoryview]:
    """Yields the bytes of a tensor, each time a multiple of `unit`."""
    size = max(1, 2 * _PIECE // unit) * unit
    try:
        with open_regular(info.path) as file:
            file.seek(info.offset)
            for start in range(0, info.nbytes, size):
                yield memoryview(read_exactly(file, min(size, info.nbytes - start)))
    except FileError as problem:
        raise WeightError(str(problem), path=info.path, tensor=info.name) from None


def _in_threads(work: Callable[[NDArray[np.uint8]], _T], info: TensorInfo) -> Iterator[_T]:
    """Yields what `work` makes of pieces of whole rows, in order; several are worked on at once."""
    row_bytes = info.nbytes // info.shape[0]
    count = min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(count) as pool:
        waiting: list[Future[_T]] = []
        for piece in _read_pieces(info, row_bytes):
            waiting.append(pool.submit(work, np.frombuffer(piece, np.uint8)))
            if len(waiting) > count:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _largest_magnitude(info: TensorInfo) -> float:
    dtype = LOADABLE[info.dtype]
    largest = 0.0
    for value in _in_threads(lambda data: _core.largest_magnitude(data, dtype), info):
        if not math.isfinite(value):
            raise WeightError("holds a value that is not finite", path=info.path, tensor=info.name)
        largest = max(largest, value)
    return largest


def _taken(parts: list[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """Yields the parts and lets go of them."""
    while parts:
        yield parts.pop(0)


def _float_bytes(value: float) -> memoryview:
    return memoryview(np.array(value, "<f4").tobytes())
