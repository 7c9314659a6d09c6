# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""mrv1: a torch-free runner for language models, with all hot-path state in C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mrv1._version import __version__

if TYPE_CHECKING:
    from mrv1.engine import Engine
    from mrv1.llm import LLM, CompletionOutput, GenerationResult, StreamChunk
    from mrv1.loader import RunnerOptions
    from mrv1.output_pump import RequestUpdate
    from mrv1.runner import ModelRunner, PendingStep, RowHandle, RowOutput
    from mrv1.sampling_params import SamplingParams
    from mrv1.structured_outputs_params import StructuredOutputsParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "Engine",
    "GenerationResult",
    "ModelRunner",
    "PendingStep",
    "RequestUpdate",
    "RowHandle",
    "RowOutput",
    "RunnerOptions",
    "SamplingParams",
    "StreamChunk",
    "StructuredOutputsParams",
    "__version__",
]

# Public name -> module. Loaded on first use, so that importing the package costs nothing.
_HOMES = {
    "LLM": "mrv1.llm",
    "CompletionOutput": "mrv1.llm",
    "GenerationResult": "mrv1.llm",
    "StreamChunk": "mrv1.llm",
    "Engine": "mrv1.engine",
    "RequestUpdate": "mrv1.output_pump",
    "RunnerOptions": "mrv1.loader",
    "ModelRunner": "mrv1.runner",
    "PendingStep": "mrv1.runner",
    "RowHandle": "mrv1.runner",
    "RowOutput": "mrv1.runner",
    "SamplingParams": "mrv1.sampling_params",
    "StructuredOutputsParams": "mrv1.structured_outputs_params",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'mrv1' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
