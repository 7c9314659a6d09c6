# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Models with random weights: as a directory, or straight in a runner."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import numpy as np

from mrv1.config import CONFIG_NAME, GENERATION_CONFIG_NAME, ModelConfig
from mrv1.errors import InvalidArgumentError
from mrv1.loader import (
    LoadedModel,
    RunnerOptions,
    capture_graphs,
    make_runner,
    resolve_dtype,
    wire_model,
    wire_ranks,
)
from mrv1.progress import progress_bar
from mrv1.tokenizer import TOKENIZER_NAME

if TYPE_CHECKING:
    import tokenizers

# Matrices are uniform in (-RANGE, RANGE): a standard deviation of 0.02, as models are initialised.
RANGE: Final = 0.02 * 3**0.5
SHARD_BYTES: Final = 4 * 10**9
# Values that are drawn at a time, so that memory does not grow with the model.
_PIECE: Final = 1 << 22
_SPECIAL_IDS: Final = ("bos_token_id", "eos_token_id")
_END_OF_TEXT: Final = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    is_zero: bool

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return 2 * self.size


def random_runner(config: ModelConfig, options: RunnerOptions, seed: int = 0) -> LoadedModel:
    """Makes a runner with random weights, with no file involved.

    Raises:
        OutOfMemoryError: Memory for weights, buffers or one KV block is missing.
    """
    dtype = resolve_dtype(options.dtype, config)
    ranks = wire_ranks(config, dtype, options)
    model = make_runner(config, ranks, dtype, options, {})
    for rank, program in enumerate(ranks.programs):
        for weight in range(len(program.weights)):
            model.runner.fill_random(weight, seed, RANGE, rank)
    capture_graphs(model)
    return model


def save_random_model(
    directory: str | os.PathLike[str],
    values: dict[str, object],
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> Path:
    """Writes a model directory with random bfloat16 weights and a byte-level tokenizer.

    The tokenizer has one token a byte and one for the end of a text; its ids are the first of the
    model's. Weights are written as they are drawn, so that any size fits in memory.

    Args:
        directory: Made if there is none; it must be empty.
        values: The config.json.
        seed: Of the weights.
        shard_bytes: Size of a weight file from which on the next is begun.
        progress: Whether to show a progress bar; None shows it on a terminal.

    Raises:
        ConfigError: The config asks for something that is not supported.
        InvalidArgumentError: The directory is not empty, or cannot be written to.
    """
    root = Path(directory)
    config = ModelConfig.from_values(values)
    if config.vocab_size < 257:
        raise InvalidArgumentError(
            field="vocab_size", value=config.vocab_size, allowed="at least 257: the bytes and EOS"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise InvalidArgumentError(
                field="directory", value=os.fspath(root), allowed="new or empty"
            )
        _write_json(root / CONFIG_NAME, values)
        generation: dict[str, object] = {"do_sample": False}
        generation.update((key, values[key]) for key in _SPECIAL_IDS if key in values)
        _write_json(root / GENERATION_CONFIG_NAME, generation)
        _write_tokenizer(root)
        _write_weights(root, _tensors(config), seed, shard_bytes, progress)
    except OSError as error:
        raise InvalidArgumentError(
            f"cannot be written: {error}", field="directory", value=os.fspath(root)
        ) from None
    return root


def _tensors(config: ModelConfig) -> list[_Tensor]:
    """The checkpoint's tensors, in the order of the program."""
    program = wire_model(config, "bfloat16")
    return [
        _Tensor(name, (rows,) if is_vector else (rows, cols), program.is_route_bias(weight))
        for weight, (_, is_vector, cols, segments) in enumerate(program.weights)
        for name, rows in segments
    ]


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer of 257 ids: one a byte, and one for the end of a text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_END_OF_TEXT])
    return backend


def _write_tokenizer(root: Path) -> None:
    byte_tokenizer().save(str(root / TOKENIZER_NAME))
    _write_json(
        root / "tokenizer_config.json",
        {"eos_token": _END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"},
    )


def _write_weights(
    root: Path, tensors: list[_Tensor], seed: int, shard_bytes: int, progress: bool | None
) -> None:
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    total = sum(tensor.nbytes for tensor in tensors)
    rng = np.random.default_rng(seed)
    with progress_bar("Writing weights", total, unit="B", show=progress) as advance:
        for name, shard in zip(names, shards, strict=True):
            with (root / name).open("wb") as file:
                _write_header(file, shard)
                for tensor in shard:
                    for piece in _random_values(tensor, rng):
                        file.write(piece.data)
                        advance(piece.nbytes)
    if len(shards) > 1:
        places = {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        _write_json(
            root / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": places},
        )


def _write_header(file: IO[bytes], tensors: list[_Tensor]) -> None:
    """Writes what precedes the data: a length and a JSON object, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": "BF16",
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _random_values(tensor: _Tensor, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields a tensor's values in pieces, as bfloat16 bits: near 1 for vectors."""
    center, width = (1.0, 0.1) if len(tensor.shape) == 1 else (0.0, RANGE)
    if tensor.is_zero:
        center = width = 0.0
    for start in range(0, tensor.size, _PIECE):
        values = rng.random(min(_PIECE, tensor.size - start), dtype=np.float32)
        values = (values * 2.0 - 1.0) * np.float32(width) + np.float32(center)
        # The upper half of a float32 is a bfloat16, cut instead of rounded.
        yield (values.view(np.uint32) >> 16).astype(np.uint16)
