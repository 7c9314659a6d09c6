# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Trains the demo model: a small Qwen3-architecture model of the stories of ``story_grammar``.

Makes the stories from their seeds, trains a byte-level BPE tokenizer on them, trains the model, and
writes a Hugging Face model directory with bf16 weights::

    python scripts/demo_model/train.py --out python/mrv1/demo
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
import story_grammar

if TYPE_CHECKING:
    from collections.abc import Iterator

EOS = "<|endoftext|>"
MAX_FILE_BYTES = 8_000_000
# Seeds of training stories count up from here; evaluation uses seeds far above them.
FIRST_SEED = 0
STORIES_PER_SHARD = 2000
# Words keep the space in front of them; digits stand alone; runs of line breaks are one piece.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model, in the terms of a Qwen3 ``config.json``."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


def eos_id(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a story."""
    return int(tokenizer.encode(EOS).ids[0])


def train_tokenizer(vocab_size: int, num_stories: int) -> Tokenizer:
    """Trains the byte-level BPE tokenizer; every UTF-8 text encodes, and nothing is normalised."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        story_grammar.generate(random.Random(FIRST_SEED + seed)).text for seed in range(num_stories)
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_json: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.from_str(tokenizer_json)


def _make_rows(task: tuple[int, int]) -> np.ndarray:
    """Rows of ``length`` + 1 tokens from the stories of one shard.

    Each row begins with a story, after an EOS in half of the rows, and each story ends with EOS.
    A story that does not fit is cut at the end of its row.
    """
    shard, length = task
    first = FIRST_SEED + shard * STORIES_PER_SHARD
    rng = random.Random(shard)
    stories = [
        story_grammar.generate(random.Random(first + i)).text for i in range(STORIES_PER_SHARD)
    ]
    eos = eos_id(_worker_tokenizer)
    rows: list[list[int]] = []
    row: list[int] = []
    for text in stories:
        if not row and rng.random() < 0.5:
            row.append(eos)
        row += [*_worker_tokenizer.encode(text).ids, eos]
        if len(row) > length:
            rows.append(row[: length + 1])
            row = []
    return np.array(rows, dtype=np.uint16)


def batches(
    tokenizer: Tokenizer, tokens_per_batch: int, max_length: int, workers: int
) -> Iterator[torch.Tensor]:
    """Yields int64 batches [rows, length + 1] without end, in an order that is always the same.

    Three batches of four have short rows (mostly one story); the fourth has rows of ``max_length``.
    """
    lengths = (256, 256, 256, max_length)

    def tasks() -> Iterator[tuple[int, int]]:
        shard = 0
        while True:
            yield shard, lengths[shard % len(lengths)]
            shard += 1

    context = multiprocessing.get_context("fork")
    pending: dict[int, list[np.ndarray]] = {length: [] for length in lengths}
    with context.Pool(workers, _start_worker, (tokenizer.to_str(),)) as pool:
        source = tasks()
        # A bounded number of shards is in flight, since Pool.imap would run ahead without end.
        flying = [pool.apply_async(_make_rows, (next(source),)) for _ in range(4 * workers)]
        step = 0
        while True:
            length = lengths[step % len(lengths)]
            need = tokens_per_batch // length
            while sum(map(len, pending[length])) < need:
                rows = flying.pop(0).get()
                flying.append(pool.apply_async(_make_rows, (next(source),)))
                pending[rows.shape[1] - 1].append(rows)
            rows = np.concatenate(pending[length])
            pending[length] = [rows[need:]]
            yield torch.from_numpy(rows[:need].astype(np.int64))
            step += 1


class _RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [batch, heads, length, head_dim]; cos and sin [length, head_dim]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)
        self.q_norm = _RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = _RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.config.head_dim)
        q = _rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), cos, sin)
        k = _rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: torch.Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return projected


class _MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = _RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = _RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Qwen3(nn.Module):
    """The Qwen3 decoder with tied embeddings; its state dict has Hugging Face's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = _RMSNorm(config.hidden_size, config.rms_norm_eps)
        residual_std = 0.02 / math.sqrt(2 * config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if into_residual else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocab_size] of tokens [batch, length]."""
        dim = self.config.head_dim
        powers = torch.arange(0, dim, 2, device=tokens.device, dtype=torch.float32) / dim
        positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        angles = torch.outer(positions, self.config.rope_theta**-powers).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        # The residual stream and the logits stay in float32 under autocast.
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        with torch.autocast(tokens.device.type, enabled=False):
            return functional.linear(self.norm(x), self.embed_tokens.weight)


def train(model: Qwen3, data: Iterator[torch.Tensor], args: argparse.Namespace) -> int:
    """Trains until ``args.steps`` or ``args.minutes`` are over; returns the number of steps."""
    device = torch.device(args.device)
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    start = time.monotonic()
    step = 0
    while True:
        elapsed = time.monotonic() - start
        # Steps end the run as a rule (so it can be repeated); the clock is the bound.
        progress = max(step / args.steps, elapsed / (60 * args.minutes))
        if progress >= 1:
            return step
        warmup = min(1.0, (step + 1) / args.warmup)
        lr = args.lr * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = next(data).to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % args.log_every == 0:
            print(f"step {step} loss {loss.item():.4f} lr {lr:.2e} {elapsed:.0f} s", flush=True)
        step += 1


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save(model: Qwen3, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the model directory.

    Raises:
        ValueError: The weight file would be larger than ``MAX_FILE_BYTES``.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = model.config
    eos = eos_id(tokenizer)
    weights = {
        f"model.{name}": tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes the file readable by its owner only; it is to be packaged.
    (out / "model.safetensors").chmod(0o644)
    size = (out / "model.safetensors").stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"model.safetensors has {size} bytes; at most {MAX_FILE_BYTES} allowed")
    _write_json(
        out / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "dtype": "bfloat16",
            "eos_token_id": eos,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "max_window_layers": config.num_hidden_layers,
            "model_type": "qwen3",
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "pad_token_id": eos,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": config.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": config.vocab_size,
        },
    )
    _write_json(
        out / "generation_config.json",
        {
            "do_sample": True,
            "eos_token_id": eos,
            "pad_token_id": eos,
            "temperature": 0.8,
            "top_p": 0.95,
        },
    )
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": config.max_position_embeddings,
            "pad_token": EOS,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
    print(f"model.safetensors has {size} bytes", flush=True)


def main() -> None:
    """Trains the tokenizer and the model, and writes the model directory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--init", type=Path, help="model directory to go on from")
    parser.add_argument("--steps", type=int, default=11000, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=60.0, help="bound on the training time")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens of one step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps of warm-up")
    parser.add_argument("--vocab-size", type=int, default=1536, help="tokens, EOS included")
    parser.add_argument("--tokenizer-stories", type=int, default=30000, help="stories for the BPE")
    parser.add_argument("--workers", type=int, default=max(1, multiprocessing.cpu_count() - 2))
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    parser.add_argument("--log-every", type=int, default=200, help="steps between two log lines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    start = time.monotonic()
    if args.init:
        tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(args.vocab_size, args.tokenizer_stories)
    # Embedding rows come in multiples of 64, which suits matrix units.
    padded = -(-tokenizer.get_vocab_size() // 64) * 64
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens, {time.monotonic() - start:.0f} s")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = Qwen3(ModelConfig(vocab_size=padded))
    if args.init:
        weights = load_file(args.init / "model.safetensors")
        model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    data = batches(tokenizer, args.batch_tokens, model.config.max_position_embeddings, args.workers)
    # The first batch starts the workers, which must fork before the device is in use.
    data = itertools.chain([next(data)], data)
    start = time.monotonic()
    steps = train(model, data, args)
    seconds = time.monotonic() - start
    print(f"{steps} steps, {steps * args.batch_tokens / 1e6:.0f} M tokens, {seconds:.0f} s")
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
