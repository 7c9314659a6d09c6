# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What n-gram speculation gains and costs, with one request and forced outputs.

    python benchmarks/speculation.py --shape qwen3-8b --device cuda --json speculation.json

Weights are random, so what a model would write says nothing. Outputs are forced instead, after each
has been drawn in full: `echo` repeats the prompt from its beginning, as an edited document would,
`random` has nothing that could be foreseen. Each is compared with the same output of a runner that
does not speculate, in the same run: the median of --repeats runs, from the first token to the last.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import time
from pathlib import Path

import numpy as np

from mrv1 import _core, bench, shapes
from mrv1.config import ModelConfig
from mrv1.env_report import commit
from mrv1.loader import LoadedModel, RunnerOptions
from mrv1.random_model import random_runner
from mrv1.runner import make_row_spec
from mrv1.sampling_params import SamplingParams


def measure(model: LoadedModel, prompt: list[int], forced: list[int]) -> dict[str, float]:
    """Runs one request; tokens a second after the first, and what became of the drafts."""
    params = SamplingParams(temperature=0.0, max_tokens=len(forced), ignore_eos=True)
    spec = make_row_spec(prompt, params, eos_token_ids=(), forced_token_ids=forced)
    engine = _core.Engine(
        model.runner, _core.EngineOptions(enable_prefix_caching=False, background=True)
    )
    engine.add_request("request", spec)
    tokens: list[int] = []
    first = 0.0
    last = None
    while engine.has_unfinished():
        for output in engine.wait_outputs(10.0):
            if output.error:
                raise SystemExit(output.error)
            if not tokens:
                first = time.perf_counter()
                first_count = len(output.token_ids)
            tokens.extend(output.token_ids)
            last = output
    seconds = time.perf_counter() - first
    engine.close()
    if tokens != forced or last is None:
        raise SystemExit("the outputs are not those that were forced")
    return {
        "tokens_per_s": (len(tokens) - first_count) / seconds,
        "drafted": last.num_draft_tokens,
        "accepted": last.num_accepted_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What n-gram speculation gains and costs.")
    parser.add_argument("--shape", choices=shapes.NAMES, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="cut the shape to so many layers")
    parser.add_argument(
        "--device", default=None, help="cpu or cuda (default: a GPU if there is one)"
    )
    parser.add_argument("--prompt", type=int, default=1024, help="tokens (default: 1024)")
    parser.add_argument("--outputs", type=int, default=512, help="tokens (default: 512)")
    parser.add_argument("--drafts", type=int, default=4, help="num_speculative_tokens (default: 4)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the records")
    parser.add_argument("--commit", help="what the records name, outside of a checkout")
    options = parser.parse_args()

    name, values = shapes.shape_config(options.shape, options.layers)
    config = ModelConfig.from_values(values)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, config.vocab_size, options.prompt).tolist()
    texts = {
        "echo": (prompt * (1 + options.outputs // len(prompt)))[: options.outputs],
        "random": rng.integers(0, config.vocab_size, options.outputs).tolist(),
    }
    speculative = {"method": "ngram", "num_speculative_tokens": options.drafts}
    rates: dict[tuple[str, int], dict[str, float]] = {}
    for drafts in (0, options.drafts):
        model = random_runner(
            config,
            RunnerOptions(
                device=options.device,
                max_num_seqs=1,
                max_num_batched_tokens=max(options.prompt, 16),
                max_model_len=options.prompt + options.outputs + 1,
                num_kv_blocks=(options.prompt + options.outputs) // 16 + 4,
                speculative_config=speculative if drafts else None,
                force_tokens=True,
            ),
        )
        try:
            for text, forced in texts.items():
                measure(model, prompt, forced[:64])
                runs = [measure(model, prompt, forced) for _ in range(options.repeats)]
                rates[text, drafts] = {
                    key: statistics.median(run[key] for run in runs) for key in runs[0]
                }
            device = bench.describe_device(model.device)
        finally:
            model.runner.close()
            model.device.close()
    records = [
        {
            "figure": "speculation",
            "shape": name,
            "device": device,
            "text": text,
            "prompt_tokens": options.prompt,
            "output_tokens": options.outputs,
            "num_speculative_tokens": options.drafts,
            "tokens_per_s": round(rates[text, options.drafts]["tokens_per_s"], 2),
            "plain_tokens_per_s": round(rates[text, 0]["tokens_per_s"], 2),
            "times_plain": round(
                rates[text, options.drafts]["tokens_per_s"] / rates[text, 0]["tokens_per_s"], 4
            ),
            "drafted": rates[text, options.drafts]["drafted"],
            "accepted": rates[text, options.drafts]["accepted"],
            "versions": bench.versions(),
            "commit": options.commit or commit(),
            "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        }
        for text in texts
    ]
    print(json.dumps(records, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
