# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Makes the small random models and the golden outputs that the parity tests read.

    pip install torch==2.13.0 transformers==5.23.0 numpy tokenizers safetensors
    python scripts/make_goldens.py            # rewrites tests/data/models and tests/data/goldens
    python scripts/make_goldens.py --check    # makes them elsewhere and compares

Each model directory has the layout of a Hugging Face checkpoint (config.json,
generation_config.json, tokenizer.json, tokenizer_config.json, safetensors). Each golden holds what
transformers computes from it in float32 on the CPU: logits at some positions of each prompt, 64
greedy tokens (end-of-sequence ids do not stop it), and the logits of some of those steps.

Before anything is written the script asserts, against a float64 forward pass in NumPy:
  * the float32 logits agree with float64, and the greedy tokens are the same in both;
  * every greedy choice is clear: the gap of the best two logits is wide at each step;
  * the goldens can tell right from wrong: each typical mistake (interleaved rotary halves, a
    forgotten frequency band, a norm left out, ...) moves the logits far more than the tolerance.

Weights are drawn with NumPy's PCG64, so a second run gives the same model files byte for byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

Array = npt.NDArray[Any]
Json = dict[str, Any]

REPO_ROOT = Path(__file__).resolve().parent.parent
PROMPT_LENGTHS = (1, 7, 16, 33, 100)
# The greedy path of this prompt meets an end-of-sequence id; those of the others do not.
EOS_PROMPT_LENGTH = 33
NUM_GREEDY = 64
DECODE_STEPS = (1, 31, 63)
NUM_CANDIDATES = 2048
# A greedy path with fewer different tokens has fallen into a loop too soon to test much.
MIN_DISTINCT = 20
# Both relative to the largest logit of the row.
MIN_GAP = 7e-3
MAX_FP32_ERROR = 2e-5
# 100 times the tolerance that the parity tests allow.
MIN_SENSITIVITY = 1e-2
MAX_MODEL_BYTES = 800_000
MAX_GOLDEN_BYTES = 500_000

CORPUS = (
    "The runner keeps one row for each request, from admission until it finishes or is preempted.",
    "A block table maps the positions of a row to the blocks of the cache that hold its keys.",
    "Prefill reads the whole prompt, or a chunk of it, and decode adds one token in each step.",
    "When the last token of the prompt has been read, the sampler draws the first new token.",
    "Every request that shares a prefix with an earlier request may read the same blocks again.",
    "The graph is captured once for each batch size, and replayed for as long as it fits.",
    "What the device computes, the device keeps; the host reads only the tokens that come back.",
    "Numbers such as 0, 1, 2, 3, 10, 64, 128 and 4096 are split into a few pieces.",
    "Na\u00efve caf\u00e9s serve cr\u00eapes; \u4f60\u597d, \u4e16\u754c; "
    "\u043f\u0440\u0438\u0432\u0435\u0442; \U0001f600.",
)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One model: its config.json as it is written, and how its weights are drawn and stored.

    Attributes:
        name: Directory and golden name.
        seed: Seed of the weights; the prompts use seed + 1.
        config: The content of config.json, in the spelling that the directory shall show.
        eos: Content of generation_config.json's eos_token_id, one id or several.
        dtype: Dtype of the stored weights.
        max_shard_bytes: Largest safetensors file before the weights are split.
        embed_std: Standard deviation of the token embedding.
        special_tokens: Special tokens by id order; at the vocabulary's start or its end.
        special_first: Whether the special tokens have the lowest ids.
        bos: The token that the tokenizer puts in front of a text, if it does.
    """

    name: str
    seed: int
    config: Json
    eos: int | list[int]
    dtype: torch.dtype
    max_shard_bytes: int
    embed_std: float
    special_tokens: tuple[str, ...]
    special_first: bool = False
    bos: str | None = None

    @property
    def eos_ids(self) -> list[int]:
        """The end-of-sequence ids as a list."""
        return [self.eos] if isinstance(self.eos, int) else self.eos

    @property
    def special_ids(self) -> range:
        """Ids of the special tokens, in the order of `special_tokens`."""
        first = 0 if self.special_first else self.config["vocab_size"] - len(self.special_tokens)
        return range(first, first + len(self.special_tokens))


QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA2_SPECIAL = ("<unk>", "<s>", "</s>")
LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

SPECS = (
    # Old spelling (rope_theta, rope_scaling, torch_dtype), num_heads * head_dim != hidden_size.
    ModelSpec(
        name="qwen3-tied",
        seed=1005,
        config={
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 381,
            "eos_token_id": 383,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 176,
            "max_position_embeddings": 512,
            "max_window_layers": 2,
            "model_type": "qwen3",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 384,
        },
        eos=[383, 381],
        dtype=torch.bfloat16,
        max_shard_bytes=1_000_000,
        embed_std=0.12,
        special_tokens=QWEN_SPECIAL,
    ),
    # New spelling (rope_parameters, dtype, layer_types), float32, two shards or more, 3:1 heads.
    ModelSpec(
        name="qwen3-untied",
        seed=2001,
        config={
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "dtype": "float32",
            "eos_token_id": 319,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 80,
            "initializer_range": 0.02,
            "intermediate_size": 104,
            "layer_types": ["full_attention", "full_attention"],
            "max_position_embeddings": 512,
            "max_window_layers": 2,
            "model_type": "qwen3",
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "pad_token_id": None,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": False,
            "transformers_version": transformers.__version__,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 320,
        },
        eos=[319, 317],
        dtype=torch.float32,
        max_shard_bytes=300_000,
        embed_std=0.02,
        special_tokens=QWEN_SPECIAL,
    ),
    # The oldest spelling: rope_theta, head_dim and the bias switches are left to their defaults.
    ModelSpec(
        name="llama2",
        seed=3001,
        config={
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 208,
            "max_position_embeddings": 512,
            "model_type": "llama",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.31.0",
            "use_cache": True,
            "vocab_size": 328,
        },
        eos=2,
        dtype=torch.float16,
        max_shard_bytes=1_000_000,
        embed_std=0.02,
        special_tokens=LLAMA2_SPECIAL,
        special_first=True,
        bos="<s>",
    ),
    # New spelling with llama3 scaling; 64 original positions put 164 tokens in all three bands.
    ModelSpec(
        name="llama3-tied",
        seed=4001,
        config={
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 380,
            "dtype": "bfloat16",
            "eos_token_id": [381, 382, 383],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 208,
            "max_position_embeddings": 512,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "pad_token_id": None,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
            "transformers_version": transformers.__version__,
            "use_cache": True,
            "vocab_size": 384,
        },
        eos=[381, 382, 383],
        dtype=torch.bfloat16,
        max_shard_bytes=1_000_000,
        embed_std=0.25,
        special_tokens=LLAMA3_SPECIAL,
        bos="<|begin_of_text|>",
    ),
    # Old spelling with llama3 scaling, untied, shards, no head_dim in the config.
    ModelSpec(
        name="llama3-untied",
        seed=5001,
        config={
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 380,
            "eos_token_id": [381, 382, 383],
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 160,
            "max_position_embeddings": 512,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0",
            "use_cache": True,
            "vocab_size": 384,
        },
        eos=[381, 382, 383],
        dtype=torch.bfloat16,
        max_shard_bytes=300_000,
        embed_std=0.02,
        special_tokens=LLAMA3_SPECIAL,
        bos="<|begin_of_text|>",
    ),
)


def write_json(path: Path, content: Json) -> None:
    """Writes `content` with sorted keys and a final newline."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tokenizer(spec: ModelSpec, directory: Path) -> None:
    """Writes a byte-level BPE tokenizer with exactly vocab_size tokens."""
    vocab_size = spec.config["vocab_size"]
    num_special = len(spec.special_tokens)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size if spec.special_first else vocab_size - num_special,
        special_tokens=list(spec.special_tokens) if spec.special_first else [],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(spec.special_tokens))
    if spec.bos is not None:
        bos_id = spec.special_ids[spec.special_tokens.index(spec.bos)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{spec.bos} $A",
            pair=f"{spec.bos} $A {spec.bos}:1 $B:1",
            special_tokens=[(spec.bos, bos_id)],
        )
    if tokenizer.get_vocab_size() != vocab_size:
        raise AssertionError(f"{spec.name}: {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    for token, token_id in zip(spec.special_tokens, spec.special_ids, strict=True):
        if tokenizer.token_to_id(token) != token_id:
            raise AssertionError(f"{spec.name}: {token} is {tokenizer.token_to_id(token)}")
    for text in CORPUS:
        if tokenizer.decode(tokenizer.encode(text).ids) != text:
            raise AssertionError(f"{spec.name}: {text!r} does not come back from its ids")
    tokenizer.save(str(directory / "tokenizer.json"))
    eos_token = tokenizer.id_to_token(spec.eos_ids[0])
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": spec.bos is not None,
            "bos_token": spec.bos,
            "clean_up_tokenization_spaces": False,
            "eos_token": eos_token,
            "model_max_length": spec.config["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def draw_parameter(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], embed_std: float
) -> Array:
    """Draws one parameter in float32, so that every part of the model matters to the logits."""
    noise = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        return np.asarray(1.0 + 0.25 * noise, np.float32)
    if name.endswith("embed_tokens.weight"):
        return np.asarray(embed_std * noise, np.float32)
    # Attention averages its values over the context; the gains make up for that.
    gains = {"q_proj": 1.5, "k_proj": 1.5, "v_proj": 1.5, "o_proj": 1.5, "lm_head": 3.0}
    gain = gains.get(name.split(".")[-2], 1.25)
    return np.asarray(gain / math.sqrt(shape[1]) * noise, np.float32)


def write_model(spec: ModelSpec, directory: Path) -> None:
    """Writes the whole model directory."""
    directory.mkdir(parents=True)
    write_json(directory / "config.json", spec.config)
    generation_config: Json = {
        "eos_token_id": spec.eos,
        "transformers_version": spec.config["transformers_version"],
    }
    if spec.config["bos_token_id"] is not None:
        generation_config["bos_token_id"] = spec.config["bos_token_id"]
    write_tokenizer(spec, directory)
    config = transformers.AutoConfig.from_pretrained(directory)
    auto_model: Any = transformers.AutoModelForCausalLM
    model = auto_model.from_config(config, dtype=spec.dtype)
    rng = np.random.Generator(np.random.PCG64(spec.seed))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            value = draw_parameter(rng, name, tuple(parameter.shape), spec.embed_std)
            parameter.copy_(torch.from_numpy(value))
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved, max_shard_size=spec.max_shard_bytes)
        for path in sorted(Path(saved).glob("*.safetensors*")):
            shutil.copyfile(path, directory / path.name)
    write_json(directory / "generation_config.json", generation_config)


# The mistakes that `Reference` can make on purpose, to show that the goldens would catch them.
VARIANTS = (
    "rope_interleaved",
    "rope_theta_wrong",
    "rope_low_band_unscaled",
    "rope_mid_band_unscaled",
    "rope_mid_band_not_smoothed",
    "rope_high_band_scaled",
    "qk_norm_left_out",
    "qk_norm_after_rope",
    "kv_heads_interleaved",
    "eps_wrong",
    "position_off_by_one_after_prompt_start",
)


class Reference:
    """A forward pass in float64 from the stored weights, independent of transformers' code."""

    def __init__(self, config: transformers.PreTrainedConfig, weights: dict[str, Array]) -> None:
        """Takes the parsed config and the weights by their names in the checkpoint."""
        self.config: Any = config
        self.weights = weights

    def _inv_freq(self, variant: str | None) -> Array:
        """Rotary frequencies, float64 of shape (head_dim / 2,)."""
        rope = self.config.rope_parameters
        head_dim = self.config.head_dim
        theta = rope["rope_theta"]
        if variant == "rope_theta_wrong":
            theta = 10000.0 if theta != 10000.0 else 500000.0
        inv_freq = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if rope["rope_type"] == "default":
            return np.asarray(inv_freq)
        factor, low, high = (rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
        # Periods that fit into the original context, as a multiple.
        cycles = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
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
        return np.asarray((1.0 - smooth) * inv_freq / factor + smooth * inv_freq)

    def _rope(self, x: Array, positions: Array, variant: str | None) -> Array:
        """Rotates x of shape (num_tokens, num_heads, head_dim)."""
        angle = positions[:, None, None] * self._inv_freq(variant)
        cos, sin = np.cos(angle), np.sin(angle)
        out = np.empty_like(x)
        half = x.shape[-1] // 2
        first, second = slice(None, half), slice(half, None)
        if variant == "rope_interleaved":
            first, second = slice(0, None, 2), slice(1, None, 2)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    def _norm(self, x: Array, name: str, variant: str | None) -> Array:
        """RMS norm over the last axis."""
        eps = self.config.rms_norm_eps
        if variant == "eps_wrong":
            eps = 1e-5 if eps == 1e-6 else 1e-6
        scale = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
        return np.asarray(x * scale * self.weights[name])

    def _attention(self, x: Array, prefix: str, variant: str | None) -> Array:
        """Causal attention of one layer over x of shape (num_tokens, hidden_size)."""
        num_tokens = x.shape[0]
        num_heads, num_kv = self.config.num_attention_heads, self.config.num_key_value_heads
        head_dim = self.config.head_dim
        q, k, v = (
            (x @ self.weights[f"{prefix}.{name}_proj.weight"].T).reshape(num_tokens, -1, head_dim)
            for name in "qkv"
        )
        positions = np.arange(num_tokens)
        if variant == "position_off_by_one_after_prompt_start":
            positions[1:] += 1
        qk_norm = f"{prefix}.q_norm.weight" in self.weights
        if qk_norm and variant not in ("qk_norm_left_out", "qk_norm_after_rope"):
            q = self._norm(q, f"{prefix}.q_norm.weight", variant)
            k = self._norm(k, f"{prefix}.k_norm.weight", variant)
        q, k = self._rope(q, positions, variant), self._rope(k, positions, variant)
        if qk_norm and variant == "qk_norm_after_rope":
            q = self._norm(q, f"{prefix}.q_norm.weight", variant)
            k = self._norm(k, f"{prefix}.k_norm.weight", variant)
        heads = np.arange(num_heads)
        group = num_heads // num_kv
        kv_heads = heads % num_kv if variant == "kv_heads_interleaved" else heads // group
        scores = np.einsum("ihd,jhd->hij", q, k[:, kv_heads]) / math.sqrt(head_dim)
        scores[:, np.triu(np.ones((num_tokens, num_tokens), bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probs = scores / scores.sum(axis=-1, keepdims=True)
        out = np.einsum("hij,jhd->ihd", probs, v[:, kv_heads]).reshape(num_tokens, -1)
        return np.asarray(out @ self.weights[f"{prefix}.o_proj.weight"].T)

    def logits(self, token_ids: Array, variant: str | None = None) -> Array:
        """Logits of every position, float64 of shape (num_tokens, vocab_size)."""
        w = self.weights
        x = w["model.embed_tokens.weight"][token_ids]
        for i in range(self.config.num_hidden_layers):
            layer = f"model.layers.{i}"
            normed = self._norm(x, f"{layer}.input_layernorm.weight", variant)
            x = x + self._attention(normed, f"{layer}.self_attn", variant)
            normed = self._norm(x, f"{layer}.post_attention_layernorm.weight", variant)
            gate = normed @ w[f"{layer}.mlp.gate_proj.weight"].T
            up = normed @ w[f"{layer}.mlp.up_proj.weight"].T
            x = x + (gate / (1.0 + np.exp(-gate)) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
        x = self._norm(x, "model.norm.weight", variant)
        return np.asarray(x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T)


def applicable_variants(spec: ModelSpec) -> Iterator[str]:
    """The mistakes that this model is able to show."""
    config = spec.config
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    num_kv = config["num_key_value_heads"]
    for variant in VARIANTS:
        if "_band_" in variant and rope.get("rope_type") != "llama3":
            continue
        if variant.startswith("qk_norm") and config["model_type"] != "qwen3":
            continue
        if variant == "kv_heads_interleaved" and num_kv in (1, config["num_attention_heads"]):
            continue
        # Epsilon is invisible at 1e-4 unless the embedding is small.
        if variant == "eps_wrong" and spec.embed_std > 0.1:
            continue
        yield variant


def read_weights(directory: Path) -> dict[str, Array]:
    """All tensors of the directory's safetensors files in float64."""
    weights: dict[str, Array] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            weights[name] = tensor.double().numpy()
    return weights


def greedy(model: Any, prompts: torch.Tensor) -> tuple[Array, Array]:
    """Greedy continuations with a KV cache.

    Args:
        model: The float32 model.
        prompts: int64 of shape (batch, length).

    Returns:
        Token ids, int64 (batch, NUM_GREEDY), and the gaps of the best two logits relative to the
        row's largest magnitude, float32 (batch, NUM_GREEDY).
    """
    tokens, gaps = [], []
    step, cache = prompts, None
    for _ in range(NUM_GREEDY):
        out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1]
        best = logits.topk(2)
        step = best.indices[:, :1]
        tokens.append(step[:, 0])
        gaps.append((best.values[:, 0] - best.values[:, 1]) / logits.abs().amax(-1))
    return torch.stack(tokens, 1).numpy(), torch.stack(gaps, 1).numpy()


def choose_prompt(spec: ModelSpec, model: Any, length: int, rng: np.random.Generator) -> Array:
    """The candidate prompt whose greedy path has the clearest choices, int64 of shape (length,)."""
    ordinary = np.setdiff1d(np.arange(spec.config["vocab_size"]), list(spec.special_ids))
    if length == 1:
        candidates = ordinary[:, None]
    else:
        candidates = rng.choice(ordinary, (NUM_CANDIDATES, length))
    parts = [greedy(model, torch.from_numpy(part)) for part in np.array_split(candidates, 4)]
    tokens = np.concatenate([part[0] for part in parts])
    score = np.concatenate([part[1] for part in parts]).min(axis=1)
    distinct = np.array([len(np.unique(path)) for path in tokens])
    if length == EOS_PROMPT_LENGTH:
        # The last id of the list, so that a reader that takes only the first one is found out.
        wanted = (tokens[:, 8:56] == spec.eos_ids[-1]).any(1)
        allowed = wanted & ~np.isin(tokens[:, :8], spec.eos_ids).any(1)
    else:
        allowed = ~np.isin(tokens, spec.eos_ids).any(1)
    score = np.where(allowed & (distinct >= MIN_DISTINCT), score, -1.0)
    best = int(score.argmax())
    print(
        f"  length {length:3d}: {int((score >= 0).sum()):4d} of {len(score)} candidates fit, "
        f"smallest gap {score[best]:.4f}, {distinct[best]} different tokens",
        flush=True,
    )
    return np.asarray(candidates[best])


def golden_positions(length: int) -> Array:
    """Prompt positions whose logits are kept: both ends, and around the edges of blocks of 16."""
    wanted = {0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 31, 32, 47, 48, 63, 64, 65, 96}
    wanted |= {length - 2, length - 1}
    if length > 7:
        wanted -= {2, 3, 4, 5, 6}
    return np.array(sorted(p for p in wanted if 0 <= p < length), np.int32)


def relative_error(actual: Array, expected: Array) -> float:
    """Largest difference, relative to the largest magnitude of the expected row."""
    scale = np.abs(expected).max(axis=-1, keepdims=True)
    return float((np.abs(actual - expected) / scale).max())


def make_golden(spec: ModelSpec, model_dir: Path, golden_dir: Path) -> None:
    """Computes, verifies and writes the golden of one model directory."""
    auto_model: Any = transformers.AutoModelForCausalLM
    model = auto_model.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    reference = Reference(model.config, read_weights(model_dir))
    rng = np.random.Generator(np.random.PCG64(spec.seed + 1))
    arrays: dict[str, Array] = {"decode_steps": np.array(DECODE_STEPS, np.int32)}
    fp32_errors, chunked_errors, min_gaps, eos_at = [], [], [], []
    sensitivity = dict.fromkeys(applicable_variants(spec), 0.0)
    for i, length in enumerate(PROMPT_LENGTHS):
        prompt = choose_prompt(spec, model, length, rng)
        tokens, gaps = greedy(model, torch.from_numpy(prompt[None]))
        full = np.concatenate([prompt, tokens[0]])
        ids = torch.from_numpy(full[None, :-1])
        logits = model(ids).logits[0].numpy()
        exact = reference.logits(full[:-1])
        steps = slice(length - 1, None)
        for name, rows in (("float32", logits), ("float64", exact)):
            if not np.array_equal(rows[steps].argmax(-1), tokens[0]):
                raise AssertionError(f"{spec.name}: greedy tokens differ in whole {name} prefill")
        fp32_errors.append(relative_error(logits, exact))

        cache, chunks = None, []
        for chunk in torch.split(ids, 13, dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            chunks.append(out.logits[0].numpy())
        chunked_errors.append(relative_error(np.concatenate(chunks), logits))

        for variant in sensitivity:
            error = relative_error(reference.logits(full[:-1], variant), exact)
            sensitivity[variant] = max(sensitivity[variant], error)
        min_gaps.append(float(gaps.min()))
        hits = np.flatnonzero(np.isin(tokens[0], spec.eos_ids))
        eos_at.append(int(hits[0]) if hits.size else None)

        positions = golden_positions(length)
        arrays[f"prompt_{i}"] = prompt.astype(np.int32)
        arrays[f"positions_{i}"] = positions
        arrays[f"logits_{i}"] = logits[positions]
        arrays[f"greedy_{i}"] = tokens[0].astype(np.int32)
        arrays[f"gaps_{i}"] = gaps[0]
        arrays[f"decode_logits_{i}"] = logits[steps][list(DECODE_STEPS)]

    if max(fp32_errors) > MAX_FP32_ERROR or max(chunked_errors) > MAX_FP32_ERROR:
        raise AssertionError(f"{spec.name}: float32 is off: {fp32_errors}, {chunked_errors}")
    if min(min_gaps) < MIN_GAP:
        raise AssertionError(f"{spec.name}: a greedy choice is not clear: {min_gaps}")
    for variant, error in sensitivity.items():
        # Epsilon moves the logits less than the others do; ten times the tolerance is enough.
        if error < (MIN_SENSITIVITY / 10 if variant == "eps_wrong" else MIN_SENSITIVITY):
            raise AssertionError(f"{spec.name}: {variant} moves the logits by {error} only")

    # The array file has fixed time stamps, so equal arrays give equal bytes.
    np.savez_compressed(golden_dir / f"{spec.name}.npz", **arrays)  # type: ignore[arg-type]
    largest_logit = max(np.abs(arrays[key]).max() for key in arrays if "logits" in key)
    metadata: Json = {
        "chunked_prefill_max_relative_difference": float(f"{max(chunked_errors):.2g}"),
        "eos_token_ids": spec.eos_ids,
        "first_eos_step": eos_at,
        "float32_max_relative_error_against_float64": float(f"{max(fp32_errors):.2g}"),
        "largest_logit": float(f"{largest_logit:.4g}"),
        "min_relative_top2_gap": [float(f"{gap:.3g}") for gap in min_gaps],
        "model": spec.name,
        "num_prompts": len(PROMPT_LENGTHS),
        "relative_to": "the largest magnitude of the row of logits",
        "seed_prompts": spec.seed + 1,
        "seed_weights": spec.seed,
        "sensitivity_of_the_logits": {k: float(f"{v:.2g}") for k, v in sensitivity.items()},
        "versions": {
            "numpy": np.__version__,
            "tokenizers": tokenizers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "weights_dtype": str(spec.dtype).removeprefix("torch."),
    }
    write_json(golden_dir / f"{spec.name}.json", metadata)
    print(json.dumps(metadata, indent=1), flush=True)


def make_all(root: Path, names: list[str]) -> None:
    """Makes models and goldens below `root`, replacing what is there under the same names."""
    golden_dir = root / "goldens"
    golden_dir.mkdir(parents=True, exist_ok=True)
    for spec in SPECS:
        if spec.name not in names:
            continue
        print(f"{spec.name}:", flush=True)
        model_dir = root / "models" / spec.name
        shutil.rmtree(model_dir, ignore_errors=True)
        write_model(spec, model_dir)
        make_golden(spec, model_dir, golden_dir)
        model_bytes = sum(path.stat().st_size for path in model_dir.iterdir())
        golden_bytes = (golden_dir / f"{spec.name}.npz").stat().st_size
        print(f"  {spec.name}: model {model_bytes} bytes, golden {golden_bytes} bytes", flush=True)
        if model_bytes > MAX_MODEL_BYTES or golden_bytes > MAX_GOLDEN_BYTES:
            raise AssertionError(f"{spec.name} is too large to commit")


def check(made: Path, committed: Path, names: list[str]) -> list[str]:
    """What differs between a fresh run and the committed files, one line each.

    Model directories and greedy tokens must be equal; logits may differ by the rounding of another
    CPU.
    """
    problems = []
    for name in names:
        fresh, old = made / "models" / name, committed / "models" / name
        files = sorted({path.name for root in (fresh, old) for path in root.glob("*")})
        _, different, missing = filecmp.cmpfiles(fresh, old, files, shallow=False)
        problems += [f"{name}/{file} differs or is missing" for file in different + missing]
        with (
            np.load(made / "goldens" / f"{name}.npz") as new,
            np.load(committed / "goldens" / f"{name}.npz") as kept,
        ):
            if sorted(new.files) != sorted(kept.files):
                problems.append(f"{name}.npz: other arrays")
                continue
            for key in new.files:
                a, b = new[key], kept[key]
                same = a.shape == b.shape and (
                    np.allclose(a, b, rtol=1e-4, atol=1e-4)
                    if a.dtype == np.float32
                    else np.array_equal(a, b)
                )
                if not same:
                    problems.append(f"{name}.npz: {key} differs")
    return problems


def main() -> int:
    """Runs the script; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=REPO_ROOT / "tests" / "data")
    parser.add_argument("--only", action="append", choices=[spec.name for spec in SPECS])
    parser.add_argument("--check", action="store_true", help="compare with --root, write nothing")
    args = parser.parse_args()
    names = args.only or [spec.name for spec in SPECS]
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    if not args.check:
        make_all(args.root, names)
        return 0
    with tempfile.TemporaryDirectory() as made:
        make_all(Path(made), names)
        problems = check(Path(made), args.root, names)
    print("\n".join(problems) or "the same files", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
