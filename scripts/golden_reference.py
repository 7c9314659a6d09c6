# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""A float64 forward pass of each model family in NumPy, and the mistakes it can make on purpose."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# The mistakes, to show that the goldens would catch them.
VARIANTS = (
    "rope_other_pairs",
    "rope_theta_wrong",
    "rope_low_band_unscaled",
    "rope_mid_band_unscaled",
    "rope_mid_band_not_smoothed",
    "rope_high_band_scaled",
    "rope_linear_unscaled",
    "rope_of_the_other_layers",
    "rope_of_the_whole_head",
    "rope_scale_left_out",
    "rope_other_factors",
    "qk_norm_left_out",
    "qk_norm_after_rope",
    "kv_heads_interleaved",
    "eps_wrong",
    "position_off_by_one_after_prompt_start",
    "window_left_out",
    "window_too_short",
    "window_too_long",
    "window_in_the_other_layers",
    "bias_left_out",
    "attention_scale_of_head_dim",
    "attention_cap_left_out",
    "logits_cap_left_out",
    "norm_offset_left_out",
    "embedding_unscaled",
    "silu_for_gelu",
    "gate_and_up_swapped",
    "post_norms_left_out",
    "experts_normalised_or_not",
    "experts_one_fewer",
    "experts_by_sigmoid",
    "shared_experts_left_out",
    "choice_uncorrected",
    "correction_in_the_weights",
)
# These move the logits less than the others do.
SUBTLE = ("eps_wrong",)


class Reference:
    """A forward pass in float64 from the stored weights, independent of transformers' code."""

    def __init__(self, config: Any, weights: dict[str, Array], *, long: bool) -> None:
        """Takes transformers' config, the weights by name, and whether sequences may be long."""
        self.config = config
        self.weights = weights
        self.long = long
        self.gemma = config.model_type.startswith("gemma")

    def layer_window(self, layer: int, variant: str | None) -> int | None:
        """Positions that a token of a layer sees, itself included; None for all before it."""
        window: int | None = getattr(self.config, "sliding_window", None)
        if window is None or variant == "window_left_out":
            return None
        types = getattr(self.config, "layer_types", None)
        slides = types is None or types[layer] == "sliding_attention"
        if types is not None and variant == "window_in_the_other_layers":
            slides = not slides
        shift = {"window_too_short": -1, "window_too_long": 1}.get(variant or "", 0)
        return window + shift if slides else None

    def _rope_parameters(self, layer: int, variant: str | None) -> dict[str, Any]:
        rope: dict[str, Any] = self.config.rope_parameters
        if "full_attention" not in rope:
            return rope
        names = ["full_attention", "sliding_attention"]
        slides = self.config.layer_types[layer] == "sliding_attention"
        return dict(rope[names[slides != (variant == "rope_of_the_other_layers")]])

    def _head_dim(self) -> int:
        width = getattr(self.config, "head_dim", None)
        return int(width or self.config.hidden_size // self.config.num_attention_heads)

    def _inv_freq(self, rope: dict[str, Any], variant: str | None) -> tuple[Array, float]:
        """Rotary frequencies, float64 of shape (rotary_dim / 2,), and the scale of both waves."""
        share = rope.get("partial_rotary_factor") or 1.0
        dim = int(self._head_dim() * (1.0 if variant == "rope_of_the_whole_head" else share))
        theta = rope["rope_theta"]
        if variant == "rope_theta_wrong":
            theta = 10000.0 if theta != 10000.0 else 500000.0
        inv_freq = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        if rope["rope_type"] == "default":
            return np.asarray(inv_freq), 1.0
        if rope["rope_type"] == "linear":
            return np.asarray(inv_freq / (1.0 if variant == "rope_linear_unscaled" else 8.0)), 1.0
        original = rope["original_max_position_embeddings"]
        if rope["rope_type"] == "longrope":
            long = self.long != (variant == "rope_other_factors")
            factors = np.ones(dim // 2)
            given = rope["long_factor" if long else "short_factor"]
            factors[: len(given)] = given
            extension = self.config.max_position_embeddings / original
            scale = math.sqrt(1 + math.log(extension) / math.log(original))
            return np.asarray(
                inv_freq / factors
            ), 1.0 if variant == "rope_scale_left_out" else scale
        factor, low, high = (rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
        # Periods that fit into the original context, as a multiple.
        cycles = original * inv_freq / (2 * math.pi)
        smooth = np.clip((cycles - low) / (high - low), 0.0, 1.0)
        low_band, high_band = cycles < low, cycles > high
        mid_band = ~low_band & ~high_band
        if not (low_band.any() and mid_band.any() and high_band.any()):
            raise AssertionError("a frequency band is empty")
        if variant == "rope_low_band_unscaled":
            smooth[low_band] = 1.0
        elif variant == "rope_mid_band_unscaled":
            smooth[mid_band] = 1.0
        elif variant == "rope_mid_band_not_smoothed":
            smooth[mid_band] = 0.0
        elif variant == "rope_high_band_scaled":
            smooth[high_band] = 0.0
        return np.asarray((1.0 - smooth) * inv_freq / factor + smooth * inv_freq), 1.0

    def _rope(self, x: Array, positions: Array, layer: int, variant: str | None) -> Array:
        """Rotates x of shape (num_tokens, num_heads, head_dim)."""
        inv_freq, scale = self._inv_freq(self._rope_parameters(layer, variant), variant)
        angle = positions[:, None, None] * inv_freq
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        out: Array = x.copy()
        half = len(inv_freq)
        first, second = slice(None, half), slice(half, 2 * half)
        if self.config.model_type.startswith("ernie4_5") != (variant == "rope_other_pairs"):
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    def _norm(self, x: Array, name: str, variant: str | None) -> Array:
        """RMS norm over the last axis."""
        eps = self.config.rms_norm_eps
        if variant == "eps_wrong":
            eps = 1e-5 if eps == 1e-6 else 1e-6
        scale = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
        offset = 1.0 if self.gemma and variant != "norm_offset_left_out" else 0.0
        return np.asarray(x * scale * (self.weights[name] + offset))

    def _linear(self, x: Array, name: str, variant: str | None) -> Array:
        bias = self.weights.get(f"{name}.bias")
        y = x @ self.weights[f"{name}.weight"].T
        return np.asarray(y if bias is None or variant == "bias_left_out" else y + bias)

    def _qkv(self, x: Array, prefix: str, variant: str | None) -> list[Array]:
        """Queries, keys and values, each (num_tokens, heads, head_dim)."""
        if f"{prefix}.qkv_proj.weight" in self.weights:
            dim = self._head_dim()
            ends = np.cumsum([self.config.num_attention_heads, self.config.num_key_value_heads])
            parts = np.split(self._linear(x, f"{prefix}.qkv_proj", variant), ends * dim, axis=-1)
        else:
            parts = [self._linear(x, f"{prefix}.{name}_proj", variant) for name in "qkv"]
        return [part.reshape(len(x), -1, self._head_dim()) for part in parts]

    def _attention(self, x: Array, layer: int, variant: str | None) -> Array:
        """Causal attention of one layer over x of shape (num_tokens, hidden_size)."""
        num_tokens = x.shape[0]
        prefix = f"model.layers.{layer}.self_attn"
        num_heads, num_kv = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = self._qkv(x, prefix, variant)
        positions = np.arange(num_tokens)
        if variant == "position_off_by_one_after_prompt_start":
            positions[1:] += 1
        qk_norm = f"{prefix}.q_norm.weight" in self.weights
        if qk_norm and variant not in ("qk_norm_left_out", "qk_norm_after_rope"):
            q = self._norm(q, f"{prefix}.q_norm.weight", variant)
            k = self._norm(k, f"{prefix}.k_norm.weight", variant)
        q, k = (self._rope(part, positions, layer, variant) for part in (q, k))
        if qk_norm and variant == "qk_norm_after_rope":
            q = self._norm(q, f"{prefix}.q_norm.weight", variant)
            k = self._norm(k, f"{prefix}.k_norm.weight", variant)
        heads = np.arange(num_heads)
        group = num_heads // num_kv
        kv_heads = heads % num_kv if variant == "kv_heads_interleaved" else heads // group
        scale = self._head_dim() ** -0.5
        if self.gemma and variant != "attention_scale_of_head_dim":
            scale = self.config.query_pre_attn_scalar**-0.5
        scores = np.einsum("ihd,jhd->hij", q, k[:, kv_heads]) * scale
        cap = getattr(self.config, "attn_logit_softcapping", None)
        if cap is not None and variant != "attention_cap_left_out":
            scores = cap * np.tanh(scores / cap)
        distance = np.arange(num_tokens)[:, None] - np.arange(num_tokens)
        window = self.layer_window(layer, variant)
        hidden = (distance < 0) | (distance >= (num_tokens if window is None else window))
        scores[:, hidden] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probs = scores / scores.sum(axis=-1, keepdims=True)
        out = np.einsum("hij,jhd->ihd", probs, v[:, kv_heads]).reshape(num_tokens, -1)
        return self._linear(out, f"{prefix}.o_proj", variant)

    def _mlp(self, x: Array, prefix: str, variant: str | None) -> Array:
        """The gated MLP of one layer."""
        if f"{prefix}.gate_up_proj.weight" in self.weights:
            gate, up = np.split(self._linear(x, f"{prefix}.gate_up_proj", variant), 2, axis=-1)
        else:
            gate = self._linear(x, f"{prefix}.gate_proj", variant)
            up = self._linear(x, f"{prefix}.up_proj", variant)
        if variant == "gate_and_up_swapped":
            gate, up = up, gate
        z = gate
        if self.gemma and variant != "silu_for_gelu":
            # gelu(x) = x * sigmoid(2 z) with the tanh approximation's z.
            z = 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return self._linear(gate / (1.0 + np.exp(-z)) * up, f"{prefix}.down_proj", variant)

    def _experts(self, x: Array, layer: int, variant: str | None) -> Array:
        """The experts of one layer, as each token's router chooses them, and the shared ones."""
        config = self.config
        mixtral = config.model_type == "mixtral"
        prefix = f"model.layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}"
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        if variant == "gate_and_up_swapped":
            gate, up = up, gate
        logits = x @ self.weights[f"{prefix}.gate.weight"].T
        scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        if variant == "experts_by_sigmoid":
            scores = 1.0 / (1.0 + np.exp(-logits))
        ranked, weighed = scores, scores
        correction = self.weights.get(f"{prefix}.moe_statics.e_score_correction_bias")
        if correction is not None and variant != "choice_uncorrected":
            ranked = scores + correction
            weighed = ranked if variant == "correction_in_the_weights" else scores
        top_k = config.num_experts_per_tok - (variant == "experts_one_fewer")
        chosen = np.argsort(-ranked, axis=-1, kind="stable")[:, :top_k]
        weights = np.take_along_axis(weighed, chosen, axis=-1)
        normalised = getattr(config, "norm_topk_prob", True)
        if normalised != (variant == "experts_normalised_or_not"):
            weights = weights / weights.sum(axis=-1, keepdims=True)
        out = np.zeros_like(x)
        for token, experts in enumerate(chosen):
            for expert, weight in zip(experts, weights[token], strict=True):
                w = {
                    name: self.weights[f"{prefix}.experts.{expert}.{name}.weight"]
                    for name in (gate, up, down)
                }
                z = w[gate] @ x[token]
                out[token] += weight * (w[down] @ (z / (1.0 + np.exp(-z)) * (w[up] @ x[token])))
        shared = f"{prefix}.shared_experts"
        if f"{shared}.down_proj.weight" in self.weights and variant != "shared_experts_left_out":
            out += self._mlp(x, shared, variant)
        return np.asarray(out)

    def logits(self, token_ids: Array, variant: str | None = None) -> Array:
        """Logits of every position, float64 of shape (num_tokens, vocab_size)."""
        w = self.weights
        x = w["model.embed_tokens.weight"][token_ids]
        if self.gemma and variant != "embedding_unscaled":
            x = x * math.sqrt(self.config.hidden_size)
        for i in range(self.config.num_hidden_layers):
            layer = f"model.layers.{i}"
            y = self._norm(x, f"{layer}.input_layernorm.weight", variant)
            y = self._attention(y, i, variant)
            before_mlp = "post_attention_layernorm"
            if self.gemma:
                before_mlp = "pre_feedforward_layernorm"
                if variant != "post_norms_left_out":
                    y = self._norm(y, f"{layer}.post_attention_layernorm.weight", variant)
            x = x + y
            y = self._norm(x, f"{layer}.{before_mlp}.weight", variant)
            if any(name.startswith(f"{layer}.") and ".experts." in name for name in w):
                y = self._experts(y, i, variant)
            else:
                y = self._mlp(y, f"{layer}.mlp", variant)
            if self.gemma and variant != "post_norms_left_out":
                y = self._norm(y, f"{layer}.post_feedforward_layernorm.weight", variant)
            x = x + y
        x = self._norm(x, "model.norm.weight", variant)
        logits = x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is not None and variant != "logits_cap_left_out":
            logits = cap * np.tanh(logits / cap)
        return np.asarray(logits)

    def applicable_variants(self) -> list[str]:
        """The mistakes that this model is able to show."""
        return [variant for variant in VARIANTS if self._is_applicable(variant)]

    def _is_applicable(self, variant: str) -> bool:
        config = self.config
        rope = config.rope_parameters
        windows = [self.layer_window(i, None) for i in range(config.num_hidden_layers)]
        num_kv = config.num_key_value_heads
        if "_band_" in variant:
            return bool(rope.get("rope_type") == "llama3")
        if variant in ("rope_linear_unscaled", "rope_of_the_other_layers"):
            return "full_attention" in rope
        if variant in ("rope_scale_left_out", "rope_other_factors"):
            return bool(rope.get("rope_type") == "longrope")
        if variant == "rope_of_the_whole_head":
            return bool(rope.get("partial_rotary_factor", 1.0) != 1.0)
        if variant.startswith("qk_norm"):
            return "model.layers.0.self_attn.q_norm.weight" in self.weights
        if variant == "kv_heads_interleaved":
            return num_kv not in (1, config.num_attention_heads)
        if variant == "eps_wrong":
            # Epsilon is invisible at 1e-4 unless the embedding is small, or scaled.
            return not self.gemma and float(self.weights["model.embed_tokens.weight"].std()) < 0.1
        if variant == "window_in_the_other_layers":
            return None in windows and len({*windows}) > 1
        if variant.startswith("window"):
            # A window of the length of the context is none.
            return any(window is not None and window < 512 for window in windows)
        if variant == "bias_left_out":
            return any(name.endswith(".bias") for name in self.weights)
        if "_cap_" in variant:
            names = {"attention": "attn_logit_softcapping", "logits": "final_logit_softcapping"}
            return getattr(config, names[variant.split("_")[0]], None) is not None
        if "expert" in variant or "correct" in variant:
            part = {"shared": "shared_experts", "choice": "e_score", "correction": "e_score"}
            wanted = part.get(variant.split("_")[0], ".experts.")
            return any(wanted in name for name in self.weights)
        gemmas = ("norm_offset", "embedding_", "silu_for", "post_norms", "attention_scale")
        return self.gemma or not variant.startswith(gemmas)
