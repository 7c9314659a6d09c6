# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Scales of an FP8 KV cache that a calibration left in a checkpoint.

The tensors are found by the names that vLLM reads in its own checkpoints and in those of
compressed-tensors, ModelOpt and Quark. Each holds one scale, or one a key/value head; an element of
the cache is its code times the scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

import numpy as np

from mrv1._files import FileError, open_regular, read_exactly
from mrv1.errors import WeightError
from mrv1.safetensors_reader import TensorInfo

# Suffixes after "...layers.<n>.self_attn."; the sides that a tensor is for.
_SUFFIXES: Final[Mapping[str, str]] = {
    "k_scale": "k",
    "v_scale": "v",
    "attn.k_scale": "k",
    "attn.v_scale": "v",
    "k_proj.k_scale": "k",
    "v_proj.v_scale": "v",
    "qkv_proj.k_scale": "k",
    "qkv_proj.v_scale": "v",
    "k_proj.output_scale": "k",
    "v_proj.output_scale": "v",
    "kv_scale": "kv",
}
# Scales of queries and probabilities, which are not quantised here.
_UNUSED: Final = (
    "q_scale",
    "attn.q_scale",
    "prob_scale",
    "attn.prob_scale",
    "q_proj.output_scale",
    "prob_output_scale",
)
_NAME: Final = re.compile(r".*\blayers\.(\d{1,5})\.self_attn\.([a-z_.]+)")
# The smallest scale whose inverse is finite.
_LEAST: Final = 2.0**-126
_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


# Of each layer the scales of keys and of values, one or one a head; empty for none at all.
KvScales: TypeAlias = Sequence[tuple[list[float], list[float]]]


def is_kv_scale(name: str) -> bool:
    """Whether a tensor of a checkpoint is a scale of attention, of use here or not."""
    match = _NAME.fullmatch(name)
    return match is not None and (match[2] in _SUFFIXES or match[2] in _UNUSED)


def read_kv_scales(
    tensors: Mapping[str, TensorInfo],
    num_kv_heads: Sequence[int],
    other_tensors: tuple[str, ...] = (),
) -> KvScales:
    """Reads the calibrated scales of a checkpoint: of each layer those of keys and of values.

    Args:
        tensors: Of the checkpoint, by name.
        num_kv_heads: Of each layer.
        other_tensors: Prefixes of tensors that are of no layer of the model.

    Raises:
        WeightError: A scale is not finite or too small, has another shape or dtype, is there twice,
            or some layers have scales and others lack them.
    """
    found: list[dict[str, TensorInfo]] = [{} for _ in num_kv_heads]
    for name, info in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in _SUFFIXES or name.startswith(other_tensors):
            continue
        layer = int(match[1])
        if layer >= len(found):
            raise WeightError(
                "is a scale of a layer that the config does not have", path=info.path, tensor=name
            )
        for side in _SUFFIXES[match[2]]:
            other = found[layer].setdefault(side, info)
            if other is not info:
                raise WeightError(f"is the same scale as {other.name}", path=info.path, tensor=name)
    if not any(found):
        return []
    for layer, sides in enumerate(found):
        for side in "kv":
            if side not in sides:
                raise WeightError(
                    "is missing from the checkpoint, which has scales of the KV cache for others",
                    tensor=f"layers.{layer}.self_attn.{side}_scale",
                )
    return [
        (_read(sides["k"], heads), _read(sides["v"], heads))
        for sides, heads in zip(found, num_kv_heads, strict=True)
    ]


def _read(info: TensorInfo, num_kv_heads: int) -> list[float]:
    # Of one element, or of one a head along a single dimension.
    sizes = tuple(size for size in info.shape if size != 1)
    if sizes not in ((), (num_kv_heads,)):
        raise WeightError(
            path=info.path,
            tensor=info.name,
            field="shape",
            value=list(info.shape),
            allowed=f"one scale, or one for each of {num_kv_heads} key/value heads",
        )
    stored = _DTYPES.get(info.dtype)
    if stored is None:
        raise WeightError(
            path=info.path,
            tensor=info.name,
            field="dtype",
            value=info.dtype,
            allowed=", ".join(_DTYPES),
        )
    try:
        with open_regular(info.path) as file:
            file.seek(info.offset)
            data = np.frombuffer(read_exactly(file, info.nbytes), stored)
    except FileError as problem:
        raise WeightError(str(problem), path=info.path, tensor=info.name) from None
    if info.dtype == "BF16":
        data = (data.astype(np.uint32) << 16).view(np.float32)
    scales = [float(scale) for scale in data]
    for place, scale in enumerate(scales):
        if not (np.isfinite(scale) and scale >= _LEAST):
            raise WeightError(
                path=info.path,
                tensor=info.name,
                field="scale" if len(scales) == 1 else f"scale of head {place}",
                value=scale,
                allowed="finite and at least 2**-126",
            )
    return scales
