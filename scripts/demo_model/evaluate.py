# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Measures the demo model against its grammar, and writes the prompts of the greedy test.

* Perplexity of held-out stories, and its ratio to that of the generator's own choices.
* How many of 100 sampled continuations the grammar's parser accepts.
* ``--prompts-out``: ten prompts with greedy outputs, for the tests.

The perplexity needs torch (the model's logits); continuations come from torch or from mrv1::

    python scripts/demo_model/evaluate.py --engine torch
    python scripts/demo_model/evaluate.py --engine mrv1
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import importlib.metadata
import json
import math
import platform
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
import story_grammar

ROOT = Path(__file__).parents[2]
EOS = "<|endoftext|>"
# Training stories count up from seed 0 and stay far below these.
PERPLEXITY_SEED = 1_000_000_000
CONTINUATION_SEED = 2_000_000_000
TEMPERATURE = 0.8
TOP_P = 0.95
MAX_TOKENS = 128
GREEDY_TOKENS = 64
NUM_PROMPTS = 10
MIN_GAP = 1e-3
# Candidates for the greedy test; the ten with the clearest choices are kept.
PROMPTS = (
    "Once upon a time",
    "Once upon a time, there was a clever fox named",
    "Once upon a time, in a quiet valley, there lived",
    "Once upon a time, there was a kind girl named Ruby. She",
    "Long ago, there was a brave boy",
    "Long ago, in an old town with many bridges,",
    "There once was a patient hedgehog named Thistle who lived in",
    "This is the story of a curious mouse named Pip.",
    "In a lighthouse on a rocky coast lived",
    "In a cosy cabin near a lake lived a gentle otter named Olive. Olive owned a red kite",
    "There once was a cheerful girl named Alice who lived in a snug home under an oak tree.",
    "In a stone house on a hill lived a careful boy named Hugo. He had a golden trumpet, a gift",
    "One sunny Saturday, Leo took the tiny drum to the harbour. Suddenly,",
    "Once upon a time, there was an honest fox",
    "Hello, world!",
    "One misty morning, Nora took the lantern to the castle ruins to see the view.",
)


@dataclass(frozen=True)
class Continuation:
    """What an engine made of a prompt; ``finished`` if it ended with EOS."""

    text: str
    token_ids: list[int]
    finished: bool


def eos_id(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a story."""
    return int(tokenizer.encode(EOS).ids[0])


def held_out(first_seed: int, count: int) -> list[story_grammar.Story]:
    """The stories of ``count`` seeds."""
    return [story_grammar.generate(random.Random(first_seed + i)) for i in range(count)]


def beginnings(tokenizer: Tokenizer, count: int) -> list[str]:
    """Beginnings of held-out stories, each cut after 5 to 40 tokens."""
    rng = random.Random(CONTINUATION_SEED)
    return [
        tokenizer.decode(tokenizer.encode(story.text).ids[: rng.randint(5, 40)])
        for story in held_out(CONTINUATION_SEED, count)
    ]


def load_torch(model_dir: Path, device: str) -> Any:
    """The model by transformers, computing in float32 with the bf16 weights of the directory."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval().to(device)


def perplexity(model: Any, tokenizer: Tokenizer, stories: list[story_grammar.Story]) -> float:
    """Perplexity per token, EOS included; each story follows an EOS, as in training."""
    import torch
    from torch.nn import functional

    eos = eos_id(tokenizer)
    total, count = 0.0, 0
    for at in range(0, len(stories), 50):
        rows = [tokenizer.encode(story.text).ids for story in stories[at : at + 50]]
        width = max(map(len, rows)) + 1
        inputs = torch.full((len(rows), width), eos, device=model.device)
        targets = torch.full((len(rows), width), -100, device=model.device)
        for i, row in enumerate(rows):
            inputs[i, 1 : len(row) + 1] = torch.tensor(row)
            targets[i, : len(row) + 1] = torch.tensor([*row, eos])
            count += len(row) + 1
        with torch.inference_mode():
            logits = model(inputs).logits
        total += functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        ).item()
    return math.exp(total / count)


def generator_perplexity(tokenizer: Tokenizer, stories: list[story_grammar.Story]) -> float:
    """Perplexity per token of the generator's choices, over the same tokens."""
    tokens = sum(len(tokenizer.encode(story.text).ids) + 1 for story in stories)
    return math.exp(-sum(story.log_prob for story in stories) / tokens)


def continue_torch(
    model: Any, tokenizer: Tokenizer, prompts: list[str], seed: int
) -> list[Continuation]:
    """Samples one continuation of each prompt with transformers."""
    import torch

    eos = eos_id(tokenizer)
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    width = max(map(len, rows))
    # Rows are padded on the left, so that all of them continue at the same column.
    ids = torch.tensor([[eos] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device
    )
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    results = []
    for row in output[:, width:].tolist():
        finished = eos in row
        kept = row[: row.index(eos)] if finished else row
        results.append(Continuation(tokenizer.decode(kept), kept, finished))
    return results


def continue_mrv1(model_dir: Path, prompts: list[str], seed: int) -> list[Continuation]:
    """Samples one continuation of each prompt with mrv1."""
    from mrv1 import LLM, SamplingParams

    llm = LLM(str(model_dir))
    params = [
        SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=MAX_TOKENS, seed=seed + i)
        for i in range(len(prompts))
    ]
    return [
        Continuation(result.text, list(result.token_ids), result.finish_reason == "stop")
        for result in llm.generate(prompts, params)
    ]


def count_accepted(prompts: list[str], continuations: list[Continuation]) -> int:
    """Number of continuations that the parser accepts; prints the others."""
    accepted = 0
    for prompt, continuation in zip(prompts, continuations, strict=True):
        text = prompt + continuation.text
        result = story_grammar.parse(text, complete=continuation.finished)
        accepted += result.accepted
        if not result.accepted:
            print(f"rejected: {result.reason}\n  ...{text[max(0, result.offset - 300) :]!r}")
    return accepted


def greedy(model: Any, tokenizer: Tokenizer, prompt: str) -> dict[str, Any]:
    """Greedy output of a prompt, and the smallest gap between the two highest logits of a step."""
    import torch

    eos = eos_id(tokenizer)
    prompt_ids = tokenizer.encode(prompt).ids
    token_ids: list[int] = []
    gaps: list[float] = []
    with torch.inference_mode():
        while len(token_ids) < GREEDY_TOKENS and eos not in token_ids:
            inputs = torch.tensor([prompt_ids + token_ids], device=model.device)
            top = model(inputs).logits[0, -1].topk(2)
            token_ids.append(int(top.indices[0]))
            gaps.append(float(top.values[0] - top.values[1]))
    return {
        "prompt": prompt,
        "prompt_token_ids": prompt_ids,
        "text": tokenizer.decode(token_ids, skip_special_tokens=True),
        "token_ids": token_ids,
        "finish_reason": "stop" if eos in token_ids else "length",
        "min_top2_gap": round(min(gaps), 4),
    }


def write_prompts(model: Any, tokenizer: Tokenizer, path: Path) -> None:
    """Writes the ten candidates whose greedy choices are the clearest.

    Raises:
        ValueError: Fewer than ten candidates have a gap of at least ``MIN_GAP``.
    """
    outputs = [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
    outputs.sort(key=lambda output: -output["min_top2_gap"])
    for output in outputs:
        print(f"gap {output['min_top2_gap']}: {output['prompt']!r}")
    kept = [output for output in outputs[:NUM_PROMPTS] if output["min_top2_gap"] >= MIN_GAP]
    if len(kept) < NUM_PROMPTS:
        raise ValueError(f"only {len(kept)} prompts have a gap of at least {MIN_GAP}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        lines = ",\n".join(json.dumps(output) for output in kept)
        file.write(f"[\n{lines}\n]\n")


def _record(metric: str, engine: str, model: Path, values: dict[str, Any]) -> dict[str, Any]:
    versions = {
        f"{name}_version": importlib.metadata.version(name)
        for name in ("tokenizers", *(("torch", "transformers") if engine == "torch" else ("mrv1",)))
    }
    return {
        "figure": "demo_model",
        "metric": metric,
        "engine": engine,
        **values,
        "weights_sha256": hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest(),
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "machine": platform.machine(),
        "python_version": platform.python_version(),
        **versions,
    }


def _merge(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes the records; those of other metrics or engines stay in the file."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    new = {(record["metric"], record["engine"]) for record in records}
    kept = [record for record in old if (record["metric"], record["engine"]) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept + records, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Evaluates the demo model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "python" / "mrv1" / "demo")
    parser.add_argument("--engine", choices=("torch", "mrv1"), default="torch")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--stories", type=int, default=1000, help="held-out stories")
    parser.add_argument("--continuations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "quality.json",
        help="results file, updated in place",
    )
    parser.add_argument("--prompts-out", type=Path, help="file for the prompts of the greedy test")
    args = parser.parse_args()
    if args.prompts_out and args.engine != "torch":
        parser.error("--prompts-out needs --engine torch, the reference of the greedy test")

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    prompts = beginnings(tokenizer, args.continuations)
    records = []
    if args.engine == "torch":
        model = load_torch(args.model, args.device)
        stories = held_out(PERPLEXITY_SEED, args.stories)
        of_model = perplexity(model, tokenizer, stories)
        of_generator = generator_perplexity(tokenizer, stories)
        values = {
            "model_perplexity": round(of_model, 5),
            "generator_perplexity": round(of_generator, 5),
            "ratio": round(of_model / of_generator, 5),
            "ratio_limit": 1.15,
            "stories": args.stories,
            "first_seed": PERPLEXITY_SEED,
            "weight_bytes": (args.model / "model.safetensors").stat().st_size,
        }
        records.append(_record("perplexity", "torch", args.model, values))
        continuations = continue_torch(model, tokenizer, prompts, args.seed)
    else:
        continuations = continue_mrv1(args.model, prompts, args.seed)
    values = {
        "accepted": count_accepted(prompts, continuations),
        "accepted_limit": math.ceil(0.95 * args.continuations),
        "continuations": args.continuations,
        "finished": sum(continuation.finished for continuation in continuations),
        "max_tokens": MAX_TOKENS,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "first_seed": CONTINUATION_SEED,
        "sampling_seed": args.seed,
    }
    records.append(_record("continuations", args.engine, args.model, values))
    _merge(args.out, records)
    print(json.dumps(records, indent=2))
    if args.prompts_out:
        write_prompts(model, tokenizer, args.prompts_out)


if __name__ == "__main__":
    main()
