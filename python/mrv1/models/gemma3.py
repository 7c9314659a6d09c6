# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Gemma 3 (Gemma Team 2025), the text model: Gemma 2's layers without soft caps, with QK-norm.

Layers with a window have a rotary embedding of their own. Of a checkpoint with a vision tower the
text model is loaded alone.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from mrv1.config import MAX_LAYERS
from mrv1.config_fields import Fields
from mrv1.models.gemma2 import GemmaConfig, read_gemma, wire
from mrv1.models.registry import register
from mrv1.rope import MAX_THETA, RopeConfig, read_rope_type

# Published files leave these out.
_DEFAULTS: Final[dict[str, object]] = {
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "vocab_size": 262208,
}
_GLOBAL_THETA: Final = 1e6
_LOCAL_THETA: Final = 1e4


def read(fields: Fields) -> GemmaConfig:
    """Reads the config of the text model alone. All layers but each sixth have a window."""
    fields = fields.with_defaults(_DEFAULTS)
    fields.expect("attn_logit_softcapping", None)
    pattern = fields.integer("sliding_window_pattern", 1, MAX_LAYERS, default=6)
    # The rotary embeddings are read below, in a spelling that is Gemma's own.
    plain = {**fields.values, "rope_parameters": None, "rope_scaling": None, "rope_theta": None}
    config = read_gemma(
        Fields(fields.path, plain, fields.prefix), lambda layer: (layer + 1) % pattern != 0
    )
    full, local = _read_ropes(fields, config)
    return dataclasses.replace(config, rope=full, local_rope=local, qk_norm=True)


def _read_ropes(fields: Fields, config: GemmaConfig) -> tuple[RopeConfig, RopeConfig]:
    """Returns the rotary embeddings of full and of sliding layers.

    Today: {"rope_parameters": {"full_attention": {...}, "sliding_attention": {...}}}. Before:
    rope_theta and rope_scaling of full layers, rope_local_base_freq of sliding ones.
    """
    both = fields.object("rope_parameters")
    scaling = fields.object("rope_scaling")
    if both is not None and scaling is not None:
        raise fields.error("rope_scaling", "absent where there are rope_parameters")
    ropes = []
    for kind, name, default in (
        ("full_attention", "rope_theta", _GLOBAL_THETA),
        ("sliding_attention", "rope_local_base_freq", _LOCAL_THETA),
    ):
        theta = fields.number(name, 1.0, MAX_THETA, default=default)
        rope = both.object(kind) if both is not None else scaling
        if both is not None and rope is None:
            raise both.error(kind, "an object")
        if rope is None or (both is None and kind == "sliding_attention"):
            rope = Fields(fields.path, {"rope_type": "default"}, fields.prefix)
        theta = rope.number("rope_theta", 1.0, MAX_THETA, default=theta)
        ropes.append(
            read_rope_type(fields, rope, theta, config.head_dim, config.max_position_embeddings)
        )
    return ropes[0], ropes[1]


def read_multimodal(fields: Fields) -> GemmaConfig:
    """Reads the config of a model that also sees images, of which the text model is run."""
    text = fields.object("text_config")
    if text is None:
        raise fields.error("text_config", "an object")
    text.expect("model_type", "gemma3_text")
    tied = fields.boolean("tie_word_embeddings", True)
    config = read(text.with_defaults({"tie_word_embeddings": tied}))
    return dataclasses.replace(config, prefix="language_model.")


register("gemma3_text", architecture="Gemma3ForCausalLM", read=read, wire=wire)
register(
    "gemma3",
    architecture="Gemma3ForConditionalGeneration",
    read=read_multimodal,
    wire=wire,
    other_tensors=("vision_tower.", "multi_modal_projector."),
)
