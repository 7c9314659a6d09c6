# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The command `mrv1`: generate, bench, env.

Exit status: 0; 1 for an error that mrv1 names, as one line on stderr, or a request that failed; 2
for wrong usage; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mrv1._version import __version__
from mrv1.errors import InvalidArgumentError, Mrv1Error

if TYPE_CHECKING:
    from mrv1.bench import Figure, Rates, Record, Timing
    from mrv1.llm import LLM, GenerationResult
    from mrv1.loader import LoadedModel, RunnerOptions
    from mrv1.sampling_params import SamplingParams

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130

# Sampling where neither the user nor generation_config.json says anything.
_TEMPERATURE = 0.8
_MAX_TOKENS = 128

_CONTROL_CHARACTERS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\t\n"
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    log = logging.getLogger("mrv1")
    log.addHandler(handler)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except Mrv1Error as error:
        _print_error(error)
        return EXIT_ERROR
    except OSError as error:
        # What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # there, whoever read the output has gone
            _print_error(error)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("mrv1: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        log.removeHandler(handler)
    return status


def _print_error(error: Exception) -> None:
    print(f"mrv1: error: {' '.join(str(error).split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mrv1", description="Runs language models.")
    parser.add_argument("--version", action="version", version=f"mrv1 {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    _add_generate(commands.add_parser("generate", help="continue prompts with a model"))
    _add_bench(commands.add_parser("bench", help="measure speed"))
    env = commands.add_parser("env", help="print what a bug report needs")
    env.set_defaults(run=_run_env)
    return parser


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="auto, cpu or cuda (default: MRV1_DEVICE, else auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


# --- generate ------------------------------------------------------------------------------------


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Continues each prompt. Text goes to stdout, all else to stderr."
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a text; - takes stdin")
    parser.add_argument("--model", metavar="DIR", help="model directory (default: the demo model)")
    parser.add_argument(
        "--max-tokens", type=int, default=_MAX_TOKENS, help="tokens a prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, help="0 is greedy (default: the model's, else 0.8)"
    )
    parser.add_argument("--top-p", type=float, help="(default: the model's, else 1)")
    parser.add_argument("--top-k", type=int, help="0 is off (default: the model's, else off)")
    parser.add_argument("--min-p", type=float, default=0.0, help="(default: off)")
    parser.add_argument("--seed", type=int, help="makes the output repeatable")
    parser.add_argument("--stop", action="append", metavar="STR", help="ends the text; repeatable")
    _add_device_options(parser)
    parser.set_defaults(run=_run_generate)


def _run_generate(options: argparse.Namespace) -> int:
    from mrv1.llm import LLM
    from mrv1.shapes import demo_model

    prompts = [_read_stdin() if prompt == "-" else prompt for prompt in options.prompts]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    clean = for_terminal if sys.stdout.isatty() else str
    with LLM(
        demo_model() if options.model is None else options.model,
        progress=False if options.no_progress else None,
        device=options.device,
        dtype=options.dtype,
    ) as llm:
        params = _sampling_params(options, llm)
        results: dict[int, GenerationResult] = {}
        try:
            with contextlib.closing(_in_order(llm, prompts, params, results)) as texts:
                for text in texts:
                    sys.stdout.write(clean(text))
                    sys.stdout.flush()
        except KeyboardInterrupt:
            # The terminal's cursor stands behind half a line of text and "^C".
            print(flush=True)
            raise
    ordered = [results[index] for index in range(len(prompts))]
    _print_statistics(ordered)
    return EXIT_ERROR if any(result.error is not None for result in ordered) else 0


def _read_stdin() -> str:
    """All of stdin but a newline at its end, which a shell adds."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            field="stdin", allowed=f"UTF-8: {error.reason} at byte {error.start}"
        ) from None
    return text.removesuffix("\n")


def for_terminal(text: str) -> str:
    """The text without control characters: a model's output must not steer the terminal."""
    return text.translate(_CONTROL_CHARACTERS)


def _sampling_params(options: argparse.Namespace, llm: LLM) -> SamplingParams:
    from mrv1.sampling_params import SamplingParams

    model = llm.model.config.default_sampling

    def chosen(given: float | None, recommended: float | None, default: float) -> float:
        return next(value for value in (given, recommended, default) if value is not None)

    return SamplingParams(
        temperature=chosen(options.temperature, model.temperature, _TEMPERATURE),
        top_p=chosen(options.top_p, model.top_p, 1.0),
        top_k=int(chosen(options.top_k, model.top_k, 0)),
        min_p=options.min_p,
        seed=options.seed,
        max_tokens=options.max_tokens,
        stop=options.stop,
    )


def _in_order(
    llm: LLM, prompts: list[str], params: SamplingParams, results: dict[int, GenerationResult]
) -> Generator[str, None, None]:
    """Yields the texts of prompts that run together, one after the other, as they come.

    Args:
        llm: The model.
        prompts: Texts.
        params: For all of them.
        results: Takes the result of each prompt.
    """
    waiting: list[list[str]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    current = 0
    with contextlib.closing(llm.stream(prompts, params)) as chunks:
        for chunk in chunks:
            waiting[chunk.index].append(chunk.text)
            if chunk.result is not None:
                ended[chunk.index] = True
                results[chunk.index] = chunk.result
            while current < len(prompts):
                yield "".join(waiting[current])
                waiting[current].clear()
                if not ended[current]:
                    break
                current += 1
                yield "\n" if current == len(prompts) else "\n\n"


def _print_statistics(results: list[GenerationResult]) -> None:
    for index, result in enumerate(results):
        if result.error is not None:
            print(f"prompt {index + 1} failed: {result.error}", file=sys.stderr)
    prompt_tokens = sum(len(result.prompt_token_ids) for result in results)
    tokens = sum(len(result.token_ids) for result in results)
    # Requests run together: tokens of all over the time of the slowest.
    waited = max(_seconds(len(r.prompt_token_ids), r.prompt_tokens_per_s) for r in results)
    ran = max(_seconds(len(r.token_ids) - 1, r.generation_tokens_per_s) for r in results)
    prompt_rate = prompt_tokens / waited if waited else 0.0
    rate = (tokens - len(results)) / ran if ran else 0.0
    peak = max(result.peak_memory_mb for result in results)
    print(
        f"prompt: {prompt_tokens} tokens, {prompt_rate:.1f} tokens/s; "
        f"generation: {tokens} tokens, {rate:.1f} tokens/s; peak memory: {peak:.0f} MB",
        file=sys.stderr,
    )


def _seconds(count: int, rate: float) -> float:
    return count / rate if rate > 0 else 0.0


# --- bench ---------------------------------------------------------------------------------------


def _positive_list(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(text)
    return values


def _positive(text: str) -> int:
    (value,) = _positive_list(text)
    return value


_positive_list.__name__ = "list of positive integers"
_positive.__name__ = "positive integer"

# Of the figures that run a whole model.
_SHAPE_DEFAULTS: dict[str, object] = {"layers": None, "save": None}
# The options that each figure has, with their defaults.
_BENCH_DEFAULTS: dict[Figure, dict[str, object]] = {
    "decode": {
        "batch": [1, 8],
        "context": [1024],
        "steps": 32,
        "read_mb": 1024,
        **_SHAPE_DEFAULTS,
    },
    "prefill": {
        "batch": [1, 8],
        "context": [1024],
        "steps": 3,
        "read_mb": 1024,
        **_SHAPE_DEFAULTS,
    },
    "mix": {"requests": 256, **_SHAPE_DEFAULTS},
    "op": {"batch": [1, 8], "context": [1024], "steps": 32, "read_mb": 1024},
}


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from mrv1.shapes import NAMES

    parser.description = (
        "Measures a figure, prints a table and writes records; see docs/benchmarks.md."
    )
    parser.add_argument(
        "figure",
        choices=tuple(_BENCH_DEFAULTS),
        help="decode: steps of one token a request; prefill: whole prompts; mix: requests of many "
        "lengths from first to last token; op: single ops of a decode step",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="a model directory")
    what.add_argument("--shape", choices=NAMES, help="sizes of a public model, random weights")
    parser.add_argument(
        "--batch",
        type=_positive_list,
        metavar="N[,N]",
        help="decode, prefill, op: requests (default: 1,8)",
    )
    parser.add_argument(
        "--context",
        type=_positive_list,
        metavar="N[,N]",
        help="decode, op: cached tokens; prefill: tokens of a prompt (default: 1024)",
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="decode, prefill, op: steps that count (default: 32; prefill: 3)",
    )
    parser.add_argument(
        "--requests",
        type=_positive,
        metavar="N",
        help="mix: only the first N of its 256 requests (default: 256)",
    )
    parser.add_argument(
        "--layers",
        type=_positive,
        metavar="N",
        help="decode, prefill, mix: cut the shape to N layers; its name says so",
    )
    parser.add_argument(
        "--save",
        metavar="DIR",
        help="decode, prefill, mix: write the shape as a model directory, and measure that",
    )
    parser.add_argument("--json", metavar="FILE", help="write the records")
    parser.add_argument(
        "--read-mb",
        type=_positive,
        metavar="N",
        help="decode, prefill, op: buffer of the bandwidth measurement in MiB (default: 1024)",
    )
    _add_device_options(parser)
    parser.set_defaults(run=_run_bench)


def _run_bench(options: argparse.Namespace) -> int:
    from mrv1 import bench
    from mrv1.loader import resolve_device

    _set_bench_defaults(options)
    if options.json is not None:
        bench.check_writable(options.json)
    bench.check_measurable(resolve_device(options.device))
    records = {
        "decode": _decode_records,
        "prefill": _prefill_records,
        "mix": _mix_records,
        "op": _op_records,
    }[options.figure](options)
    print(bench.format_table(records))
    if options.json is not None:
        bench.write_json(options.json, records)
    return 0


def _set_bench_defaults(options: argparse.Namespace) -> None:
    """Fills in what was not given, and refuses what the figure would ignore."""
    defaults = _BENCH_DEFAULTS[options.figure]
    for name in ("batch", "context", "steps", "read_mb", "requests", "layers", "save"):
        value = getattr(options, name)
        if value is None:
            setattr(options, name, defaults.get(name))
        elif name not in defaults:
            raise InvalidArgumentError(
                field=f"--{name.replace('_', '-')}",
                value=value,
                allowed=f"left out for the figure {options.figure}",
            )


def _bench_source(options: argparse.Namespace) -> tuple[str, str | None, dict[str, object]]:
    """What --model, --shape, --layers and --save ask for: a name, and a directory or a config."""
    from mrv1 import shapes
    from mrv1.random_model import save_random_model

    if options.model is not None or options.shape == shapes.DEMO:
        for name in ("layers", "save"):
            if getattr(options, name) is not None:
                raise InvalidArgumentError(
                    field=f"--{name}",
                    value=getattr(options, name),
                    allowed="left out for a model that has weights of its own",
                )
        if options.model is None:
            return shapes.DEMO, str(shapes.demo_model()), {}
        # Records are published; where a directory lies is nobody's business.
        return Path(options.model).resolve().name, options.model, {}
    name, config = shapes.shape_config(options.shape, options.layers)
    if options.save is None:
        return name, None, config
    shown = False if options.no_progress else None
    return name, str(save_random_model(options.save, config, progress=shown)), config


def _load(
    options: argparse.Namespace,
    directory: str | None,
    config: dict[str, object],
    runner_options: RunnerOptions,
) -> LoadedModel:
    from mrv1.config import ModelConfig
    from mrv1.loader import load_model
    from mrv1.random_model import random_runner

    if directory is None:
        return random_runner(ModelConfig.from_values(config), runner_options)
    return load_model(directory, runner_options, progress=False if options.no_progress else None)


def _measure(
    options: argparse.Namespace,
    model: LoadedModel,
    measure: Callable[[LoadedModel, int, int, int], Timing],
) -> tuple[list[Timing], Rates, str]:
    """Measures every batch at every context, then the machine; closes the model."""
    from mrv1 import bench

    try:
        timings = [
            measure(model, batch, context, options.steps)
            for context in options.context
            for batch in options.batch
        ]
        # Last, since its buffer would count as memory of the model.
        rates = bench.measure_rates(model.device, model.dtype, options.read_mb << 20)
        return timings, rates, bench.describe_device(model.device)
    finally:
        model.runner.close()
        model.device.close()


def _decode_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import bench, bench_decode

    shape, directory, config = _bench_source(options)
    runner_options = bench_decode.decode_options(
        options.device, options.dtype, options.batch, options.context, options.steps
    )
    model = _load(options, directory, config, runner_options)
    model.runner.fill_kv_random(0)
    timings, rates, device = _measure(options, model, bench_decode.measure_decode)
    records = []
    for timing in timings:
        # Rows grow while they are measured.
        mean = timing.context + (options.steps - 1) / 2
        costs = bench.decode_costs(model.config, model.dtype, timing.batch, mean)
        records.append(
            bench.make_record("decode", shape, device, model.dtype, timing, costs, rates)
        )
    return records


def _prefill_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import bench, bench_prefill

    shape, directory, config = _bench_source(options)
    runner_options = bench_prefill.prefill_options(
        options.device, options.dtype, options.batch, options.context
    )
    model = _load(options, directory, config, runner_options)
    timings, rates, device = _measure(options, model, bench_prefill.measure_prefill)
    records = []
    for timing in timings:
        costs = bench.prefill_costs(model.config, model.dtype, timing.batch, timing.context)
        records.append(
            bench.make_record("prefill", shape, device, model.dtype, timing, costs, rates)
        )
    return records


def _mix_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import bench, bench_mix
    from mrv1.config import ModelConfig
    from mrv1.engine import Engine
    from mrv1.random_model import byte_tokenizer
    from mrv1.tokenizer import Tokenizer

    shape, directory, values = _bench_source(options)
    config = (
        ModelConfig.from_values(values) if directory is None else ModelConfig.from_dir(directory)
    )
    if directory is None:
        tokenizer = Tokenizer(byte_tokenizer())
    else:
        tokenizer = Tokenizer.from_dir(directory, config.vocab_size)
    requests = bench_mix.mix_requests(config.vocab_size, options.requests)
    runner_options = bench_mix.mix_options(options.device, options.dtype, requests)
    model = _load(options, directory, values, runner_options)
    with Engine.from_model(model, tokenizer) as engine:
        timing = bench_mix.measure_mix(engine, requests)
        device = bench.describe_device(model.device)
    return [bench.make_record("mix", shape, device, model.dtype, timing)]


def _op_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import _core, bench, bench_op, envs
    from mrv1.config import ModelConfig
    from mrv1.loader import resolve_device, resolve_dtype

    shape, directory, values = _bench_source(options)
    config = (
        ModelConfig.from_values(values) if directory is None else ModelConfig.from_dir(directory)
    )
    limit = config.max_position_embeddings
    for context in options.context:
        if context > limit:
            raise InvalidArgumentError(
                field="--context",
                value=context,
                allowed=f"at most the model's max_position_embeddings = {limit}",
            )
    dtype = resolve_dtype(options.dtype, config)
    threads = envs.NUM_THREADS.get() or 0
    device = _core.Device(resolve_device(options.device), num_threads=threads)
    try:
        rates = bench.measure_rates(device, dtype, options.read_mb << 20)
        records = []
        for context in options.context:
            for batch in options.batch:
                for cost, timing in bench_op.measure_ops(
                    device, config, dtype, batch, context, options.steps, options.read_mb << 20
                ):
                    record = bench.make_record(
                        "op", shape, bench.describe_device(device), dtype, timing, [cost], rates
                    )
                    record["op"] = cost.name
                    records.append(record)
    finally:
        device.close()
    return records


# --- env -----------------------------------------------------------------------------------------


def _run_env(_: argparse.Namespace) -> int:
    from mrv1.env_report import env_report, format_report

    print(format_report(env_report()))
    return 0
