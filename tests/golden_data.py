# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Reads the golden outputs of the small random models; needs NumPy only.

`scripts/make_goldens.py` made them with transformers, in float32 on the CPU, from the model
directories under `tests/data/models`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

DATA_DIR = Path(__file__).resolve().parent / "data"
GOLDEN_NAMES: tuple[str, ...] = (
    "qwen3-tied",
    "qwen3-untied",
    "llama2",
    "llama3-tied",
    "llama3-untied",
    "qwen2",
    "mistral",
    "gemma2",
    "gemma3",
    "ernie4_5",
    "phi3",
    "phi4-mini",
    "phi4-mini-long",
    "qwen3_moe",
    "mixtral",
    "ernie4_5_moe",
)


@dataclasses.dataclass(frozen=True)
class Golden:
    """What transformers computes from one model directory.

    The lists `prompts`, `positions`, `logits`, `greedy`, `gaps`, `decode_logits` and
    `first_eos_step` have one entry per prompt.

    Attributes:
        name: Name of the golden.
        model_dir: The model directory.
        tokenizer_dir: Where the tokenizer is; some models have none of their own.
        max_model_len: Tokens that a sequence has at most, where the outputs depend on that.
        prompts: Token ids, without special tokens.
        positions: Prompt positions whose logits are kept, increasing; the last is the prompt's
            last position.
        logits: float32 (len(positions[i]), vocab_size).
        greedy: 64 token ids; end-of-sequence ids did not stop the generation.
        gaps: float32 (64,): at each greedy step the best logit less the second best, relative to
            the largest magnitude of the row.
        decode_steps: Greedy steps whose logits are kept. Step k chooses `greedy[i][k]`; step 0 is
            the last prompt position and is in `logits`.
        decode_logits: float32 (len(decode_steps), vocab_size).
        eos_token_ids: End-of-sequence ids of generation_config.json.
        first_eos_step: The first step of `greedy` that chose an end-of-sequence id, or None.
        metadata: The golden's JSON file: versions, seeds, and the measured errors.
    """

    name: str
    model_dir: Path
    tokenizer_dir: Path
    max_model_len: int | None
    prompts: list[list[int]]
    positions: list[list[int]]
    logits: list[npt.NDArray[np.float32]]
    greedy: list[list[int]]
    gaps: list[npt.NDArray[np.float32]]
    decode_steps: list[int]
    decode_logits: list[npt.NDArray[np.float32]]
    eos_token_ids: list[int]
    first_eos_step: list[int | None]
    metadata: dict[str, Any]


def load_golden(name: str) -> Golden:
    """Loads one of `GOLDEN_NAMES`.

    Raises:
        ValueError: There is no golden of that name.
    """
    if name not in GOLDEN_NAMES:
        raise ValueError(f"golden {name!r} is not one of {', '.join(GOLDEN_NAMES)}")
    metadata = json.loads((DATA_DIR / "goldens" / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(DATA_DIR / "goldens" / f"{name}.npz") as arrays:
        each = range(metadata["num_prompts"])
        model_dir = DATA_DIR / "models" / metadata["model"]
        has_tokenizer = (model_dir / "tokenizer.json").exists()
        return Golden(
            name=name,
            model_dir=model_dir,
            tokenizer_dir=model_dir if has_tokenizer else DATA_DIR / "models" / "qwen3-tied",
            max_model_len=metadata["max_model_len"],
            prompts=[arrays[f"prompt_{i}"].tolist() for i in each],
            positions=[arrays[f"positions_{i}"].tolist() for i in each],
            logits=[arrays[f"logits_{i}"] for i in each],
            greedy=[arrays[f"greedy_{i}"].tolist() for i in each],
            gaps=[arrays[f"gaps_{i}"] for i in each],
            decode_steps=arrays["decode_steps"].tolist(),
            decode_logits=[arrays[f"decode_logits_{i}"] for i in each],
            eos_token_ids=metadata["eos_token_ids"],
            first_eos_step=metadata["first_eos_step"],
            metadata=metadata,
        )


def relative_error(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Largest difference of two (rows, vocab_size) arrays, relative to the expected row's peak."""
    if actual.shape != expected.shape:
        raise ValueError(f"logits have shape {actual.shape}, not {expected.shape}")
    scale = np.abs(expected).max(axis=-1, keepdims=True)
    return float((np.abs(actual.astype(np.float64) - expected) / scale).max())
