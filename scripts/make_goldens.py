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
import filecmp
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from golden_reference import SUBTLE, Reference
from golden_specs import SPECS, ModelSpec

Array = npt.NDArray[Any]
Json = dict[str, Any]

REPO_ROOT = Path(__file__).resolve().parent.parent
PROMPT_LENGTHS = (1, 7, 16, 33, 100)
# The greedy path of this prompt meets an end-of-sequence id; those of the others do not.
EOS_PROMPT_LENGTH = 33
NUM_GREEDY = 64
DECODE_STEPS = (1, 31, 63)
# A greedy path with fewer different tokens has fallen into a loop too soon to test much.
MIN_DISTINCT = 20
# Between the last expert that a token goes through and the next, in logits of the router: rounding
# to bfloat16 may choose another where they are closer.
MIN_ROUTING_GAP = 0.15
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
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, ...],
    embed_std: float,
    norm_center: float,
) -> Array:
    """Draws one parameter in float32, so that every part of the model matters to the logits."""
    noise = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        return np.asarray(norm_center + 0.25 * noise, np.float32)
    if name.endswith(".bias"):
        return np.asarray(0.3 * noise, np.float32)
    if name.endswith("e_score_correction_bias"):
        return np.asarray(0.2 * noise, np.float32)
    if name.endswith("embed_tokens.weight"):
        return np.asarray(embed_std * noise, np.float32)
    # Attention averages its values over the context; the gains make up for that.
    gains = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"), 1.5)
    # A router's logits must be far apart, as rounding may else choose another expert.
    gains |= {"lm_head": 3.0, "experts": 2.0, "gate": 3.0}
    gain = gains.get(name.split(".")[-2], 1.25)
    return np.asarray(gain / math.sqrt(shape[-1]) * noise, np.float32)


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
    if spec.own_tokenizer:
        write_tokenizer(spec, directory)
    config = transformers.AutoConfig.from_pretrained(directory)
    auto_model: Any = transformers.AutoModelForCausalLM
    model = auto_model.from_config(config, dtype=spec.dtype)
    rng = np.random.Generator(np.random.PCG64(spec.seed))
    # Gemma's norms multiply by 1 + weight.
    norm_center = 0.0 if spec.config["model_type"].startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            shape = tuple(parameter.shape)
            value = draw_parameter(rng, name, shape, spec.embed_std, norm_center)
            parameter.copy_(torch.from_numpy(value))
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved, max_shard_size=spec.max_shard_bytes)
        for path in sorted(Path(saved).glob("*.safetensors*")):
            shutil.copyfile(path, directory / path.name)
    write_json(directory / "generation_config.json", generation_config)


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


def routing_gaps(model: Any, prompts: torch.Tensor) -> Array:
    """How clearly the experts of each prompt's last token are chosen, in logits of the router.

    Args:
        model: The float32 model, with experts or without.
        prompts: int64 of shape (batch, length).

    Returns:
        float32 of shape (batch,): the least of all layers, infinite without experts.
    """
    gaps = torch.full((len(prompts),), torch.inf)
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    if not routers:
        return gaps.numpy()
    logits = model(prompts, output_router_logits=True, logits_to_keep=1).router_logits
    for router, each in zip(routers, logits, strict=True):
        scores = each.view(len(prompts), -1, each.shape[-1])[:, -1]
        if hasattr(router, "moe_statics"):
            # A score falls by a quarter of what its logit does, at most.
            scores = 4 * (scores.softmax(-1) + router.moe_statics.e_score_correction_bias)
        best = scores.topk(router.top_k + 1).values
        gaps = torch.minimum(gaps, best[:, -2] - best[:, -1])
    return gaps.numpy()


def choose_prompt(spec: ModelSpec, model: Any, length: int, rng: np.random.Generator) -> Array:
    """The candidate prompt whose greedy path has the clearest choices, int64 of shape (length,)."""
    ordinary = np.setdiff1d(np.arange(spec.config["vocab_size"]), list(spec.special_ids))
    if length == 1:
        candidates = ordinary[:, None]
    else:
        candidates = rng.choice(ordinary, (spec.num_candidates, length))
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
    allowed &= routing_gaps(model, torch.from_numpy(candidates)) >= MIN_ROUTING_GAP
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


def load_model(model_dir: Path, *, always_long: bool) -> Any:
    """The model in float32.

    transformers chooses longrope's factors anew in each call, by the tokens so far. With
    `always_long` the short ones are replaced, so that it computes what a long sequence would see.
    """
    config = transformers.AutoConfig.from_pretrained(model_dir)
    if always_long:
        config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]
    auto_model: Any = transformers.AutoModelForCausalLM
    return auto_model.from_pretrained(
        model_dir, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def check_long(model: Any, model_dir: Path, rng: np.random.Generator) -> None:
    """Asserts that `model` computes what the model of the directory does with a long sequence."""
    length = model.config.rope_parameters["original_max_position_embeddings"] + 8
    ids = torch.from_numpy(rng.integers(0, 300, (1, length)))
    logits = load_model(model_dir, always_long=False)(ids).logits
    if not torch.equal(logits, model(ids).logits):
        raise AssertionError("a long sequence does not take the long factors")


def make_golden(spec: ModelSpec, model_dir: Path, golden_dir: Path, *, long: bool = False) -> None:
    """Computes, verifies and writes the golden of one model directory."""
    name = f"{spec.name}-long" if long else spec.name
    model = load_model(model_dir, always_long=long)
    max_model_len = None
    if spec.long_golden and not long:
        max_model_len = model.config.rope_parameters["original_max_position_embeddings"]
    config = transformers.AutoConfig.from_pretrained(model_dir)
    reference = Reference(config, read_weights(model_dir), long=long)
    rng = np.random.Generator(np.random.PCG64(spec.seed + 1))
    if long:
        check_long(model, model_dir, rng)
    arrays: dict[str, Array] = {"decode_steps": np.array(DECODE_STEPS, np.int32)}
    fp32_errors, chunked_errors, min_gaps, eos_at = [], [], [], []
    sensitivity = dict.fromkeys(reference.applicable_variants(), 0.0)
    for i, length in enumerate(PROMPT_LENGTHS):
        prompt = choose_prompt(spec, model, length, rng)
        tokens, gaps = greedy(model, torch.from_numpy(prompt[None]))
        full = np.concatenate([prompt, tokens[0]])
        ids = torch.from_numpy(full[None, :-1])
        logits = model(ids).logits[0].numpy()
        exact = reference.logits(full[:-1])
        steps = slice(length - 1, None)
        for kind, rows in (("float32", logits), ("float64", exact)):
            if not np.array_equal(rows[steps].argmax(-1), tokens[0]):
                raise AssertionError(f"{name}: greedy tokens differ in whole {kind} prefill")
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
        raise AssertionError(f"{name}: float32 is off: {fp32_errors}, {chunked_errors}")
    if min(min_gaps) < MIN_GAP:
        raise AssertionError(f"{name}: a greedy choice is not clear: {min_gaps}")
    for variant, error in sensitivity.items():
        # Ten times the tolerance is enough for the subtle ones.
        if error < (MIN_SENSITIVITY / 10 if variant in SUBTLE else MIN_SENSITIVITY):
            raise AssertionError(f"{name}: {variant} moves the logits by {error} only")

    # The array file has fixed time stamps, so equal arrays give equal bytes.
    np.savez_compressed(golden_dir / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    largest_logit = max(np.abs(arrays[key]).max() for key in arrays if "logits" in key)
    metadata: Json = {
        "chunked_prefill_max_relative_difference": float(f"{max(chunked_errors):.2g}"),
        "eos_token_ids": spec.eos_ids,
        "first_eos_step": eos_at,
        "float32_max_relative_error_against_float64": float(f"{max(fp32_errors):.2g}"),
        "largest_logit": float(f"{largest_logit:.4g}"),
        "max_model_len": max_model_len,
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
    write_json(golden_dir / f"{name}.json", metadata)
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
        if spec.long_golden:
            make_golden(spec, model_dir, golden_dir, long=True)
        model_bytes = sum(path.stat().st_size for path in model_dir.iterdir())
        golden_bytes = (golden_dir / f"{spec.name}.npz").stat().st_size
        print(f"  {spec.name}: model {model_bytes} bytes, golden {golden_bytes} bytes", flush=True)
        if model_bytes > MAX_MODEL_BYTES or golden_bytes > MAX_GOLDEN_BYTES:
            raise AssertionError(f"{spec.name} is too large to commit")


def compare_arrays(golden: str, new: dict[str, Array], kept: dict[str, Array]) -> list[str]:
    """What differs between the arrays of a golden, one line each."""
    if sorted(new) != sorted(kept):
        return [f"{golden}: other arrays"]
    problems = []
    for key, a in new.items():
        b = kept[key]
        close = a.dtype == np.float32 and a.shape == b.shape
        same = np.allclose(a, b, rtol=1e-4, atol=1e-4) if close else np.array_equal(a, b)
        if not same:
            problems.append(f"{golden}: {key} differs")
    return problems


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
    for golden in sorted(path.name for path in (made / "goldens").glob("*.npz")):
        with (
            np.load(made / "goldens" / golden) as new,
            np.load(committed / "goldens" / golden) as kept,
        ):
            problems += compare_arrays(golden, dict(new), dict(kept))
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
