# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Models with random weights: as a directory, or straight in a runner."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

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
from mrv1.safetensors_writer import SHARD_BYTES, NewTensor, write_checkpoint, write_json
from mrv1.tokenizer import TOKENIZER_NAME

if TYPE_CHECKING:
    import tokenizers

# Matrices are uniform in (-RANGE, RANGE): a standard deviation of 0.02, as models are initialised.
RANGE: Final = 0.02 * 3**0.5
# Values that are drawn at a time, so that memory does not grow with the model.
_PIECE: Final = 1 << 22
_SPECIAL_IDS: Final = ("bos_token_id", "eos_token_id")
_END_OF_TEXT: Final = "<|endoftext|>"


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
        write_json(root / CONFIG_NAME, values)
        generation: dict[str, object] = {"do_sample": False}
        generation.update((key, values[key]) for key in _SPECIAL_IDS if key in values)
        write_json(root / GENERATION_CONFIG_NAME, generation)
        _write_tokenizer(root)
        tensors = _tensors(config, np.random.default_rng(seed))
        total = sum(tensor.nbytes for tensor in tensors)
        with progress_bar("Writing weights", total, unit="B", show=progress) as advance:
            write_checkpoint(root, tensors, advance, shard_bytes=shard_bytes)
    except OSError as error:
        raise InvalidArgumentError(
            f"cannot be written: {error}", field="directory", value=os.fspath(root)
        ) from None
    return root


def _tensors(config: ModelConfig, rng: np.random.Generator) -> list[NewTensor]:
    """The checkpoint's tensors, in the order of the program; their values are drawn as written."""
    tensors = []
    program = wire_model(config, "bfloat16")
    for weight, (_, is_vector, cols, segments) in enumerate(program.weights):
        width = 0.1 if is_vector else RANGE
        center = 1.0 if is_vector else 0.0
        if program.is_route_bias(weight):
            center = width = 0.0
        for name, rows in segments:
            shape = (rows,) if is_vector else (rows, cols)
            values = functools.partial(_random_values, shape, center, width, rng)
            tensors.append(NewTensor(name, "BF16", shape, values))
    return tensors


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
    write_json(
        root / "tokenizer_config.json",
        {"eos_token": _END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"},
    )


def _random_values(
    shape: tuple[int, ...], center: float, width: float, rng: np.random.Generator
) -> Iterator[memoryview]:
    """Yields a tensor's values in pieces, as bfloat16."""
    size = math.prod(shape)
    for start in range(0, size, _PIECE):
        values = rng.random(min(_PIECE, size - start), dtype=np.float32)
        values = (values * 2.0 - 1.0) * np.float32(width) + np.float32(center)
        # The upper half of a float32 is a bfloat16, cut instead of rounded.
        yield memoryview((values.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
