# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The command `mrv1`: generate, chat, quantize, bench, env.

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
from typing import TYPE_CHECKING

from mrv1._version import __version__
from mrv1.bench_cli import add_bench
from mrv1.errors import InvalidArgumentError, Mrv1Error

if TYPE_CHECKING:
    from mrv1.llm import LLM, GenerationResult
    from mrv1.sampling_params import SamplingParams
    from mrv1.structured_outputs_params import StructuredOutputsParams

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
    _add_chat(commands.add_parser("chat", help="talk to a model"))
    _add_quantize(commands.add_parser("quantize", help="make a checkpoint with NVFP4 weights"))
    add_bench(commands.add_parser("bench", help="measure speed"), _add_device_options)
    env = commands.add_parser("env", help="print what a bug report needs")
    env.set_defaults(run=_run_env)
    return parser


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="auto, cpu or cuda (default: MRV1_DEVICE, else auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        help="auto (as --dtype), fp8_e4m3 or fp8_e5m2 (default: auto)",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="devices that compute each layer together (default: %(default)s)",
    )
    parser.add_argument(
        "--pipeline-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="stages that the layers are cut into, on devices of their own (default: %(default)s)",
    )
    parser.add_argument(
        "--pipeline-layers",
        type=_layer_counts,
        metavar="N,N,...",
        help="layers of each stage, 17,15 for example (default: balanced)",
    )
    parser.add_argument(
        "--expert-parallel",
        action="store_true",
        help="devices have whole experts of their own, instead of a part of each",
    )
    parser.add_argument(
        "--data-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="devices that have requests of their own and share the experts, with "
        "--expert-parallel (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens-per-rank",
        type=int,
        metavar="N",
        help="tokens that a device may send to experts of others in a step (default: all that a "
        "step may have)",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def _layer_counts(text: str) -> list[int]:
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        message = f"numbers of layers with commas between them, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None


# --- quantize ------------------------------------------------------------------------------------


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a model directory whose linear layers are quantised, and prints the error of each."
    )
    parser.add_argument("source", metavar="SRC", help="a model directory with plain weights")
    parser.add_argument("target", metavar="DST", help="the new directory")
    parser.add_argument("--format", choices=["nvfp4"], required=True, help="of the weights")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module that stays as it is, as the output head does; * stands for any characters; "
        "repeatable",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    parser.set_defaults(run=_run_quantize)


def _run_quantize(options: argparse.Namespace) -> int:
    from mrv1.quantize import quantize_checkpoint

    reports = quantize_checkpoint(
        options.source,
        options.target,
        exclude=options.exclude,
        progress=False if options.no_progress else None,
    )
    print(f"{'relative error':>14}  {'largest error':>13}  {'global scale':>12}  tensor")
    for report in reports:
        print(
            f"{report.relative_error:>14.5f}  {report.largest_error:>13.5g}  "
            f"{report.global_scale:>12.5g}  {report.name}"
        )
    print(f"wrote {options.target}: {len(reports)} matrices in NVFP4")
    return 0


# --- generate ------------------------------------------------------------------------------------


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Continues each prompt. Text goes to stdout, all else to stderr."
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a text; - takes stdin")
    parser.add_argument(
        "--model", help="directory, or name in the local cache (default: the demo model)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=_MAX_TOKENS, help="tokens a prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="print the log probability of each token, and of the N most likely ones, to stderr",
    )
    parser.add_argument(
        "--prompt-logprobs", type=int, metavar="N", help="the same for the tokens of the prompts"
    )
    _add_sampling_options(parser)
    _add_device_options(parser)
    parser.set_defaults(run=_run_generate)


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a name (default: main)")
    parser.add_argument(
        "--temperature", type=float, help="0 is greedy (default: the model's, else 0.8)"
    )
    parser.add_argument("--top-p", type=float, help="(default: the model's, else 1)")
    parser.add_argument("--top-k", type=int, help="0 is off (default: the model's, else off)")
    parser.add_argument("--min-p", type=float, help="(default: the model's, else off)")
    parser.add_argument(
        "--presence-penalty", type=float, default=0.0, help="in [-2, 2] (default: off)"
    )
    parser.add_argument(
        "--frequency-penalty", type=float, default=0.0, help="in [-2, 2] (default: off)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, help="1 is off (default: the model's, else off)"
    )
    parser.add_argument(
        "--logit-bias",
        type=_logit_bias,
        action="append",
        metavar="ID:BIAS",
        help="added to the logit of a token; repeatable",
    )
    parser.add_argument(
        "--allowed-token-ids",
        type=_token_ids,
        metavar="ID,...",
        help="the only tokens that may be drawn (default: all)",
    )
    parser.add_argument(
        "--bad-words",
        action="append",
        metavar="STR",
        help="a text that must not be generated; repeatable",
    )
    form = parser.add_argument_group("form of the text, at most one of")
    form.add_argument("--json-schema", metavar="JSON", help="JSON by this schema")
    form.add_argument("--json-object", action="store_true", help="a JSON object")
    form.add_argument("--regex", metavar="RE", help="a match of a regular expression")
    form.add_argument(
        "--choice", action="append", metavar="STR", help="one of the given texts; repeatable"
    )
    form.add_argument("--grammar", metavar="LARK", help="a text of a grammar in Lark's notation")
    parser.add_argument("--seed", type=int, help="makes the output repeatable")
    parser.add_argument("--stop", action="append", metavar="STR", help="ends the text; repeatable")
    parser.add_argument(
        "--stop-token-ids", type=_token_ids, metavar="ID,...", help="tokens that end the text"
    )
    parser.add_argument(
        "--stop-sequences",
        type=_token_ids,
        action="append",
        metavar="ID,...",
        help="tokens that end the text when they come one after the other; repeatable",
    )


def _token_ids(text: str) -> list[int]:
    return [int(token_id) for token_id in text.split(",")]


def _logit_bias(text: str) -> tuple[int, float]:
    token_id, bias = text.split(":")
    return int(token_id), float(bias)


def _run_generate(options: argparse.Namespace) -> int:
    from mrv1.shapes import demo_model

    prompts = [_read_stdin() if prompt == "-" else prompt for prompt in options.prompts]
    clean = _make_clean()
    with _open_llm(demo_model() if options.model is None else options.model, options) as llm:
        params = _sampling_params(options, llm, options.logprobs, options.prompt_logprobs)
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
    _print_logprobs(ordered)
    _print_statistics(ordered)
    return EXIT_ERROR if any(result.error is not None for result in ordered) else 0


def _open_llm(model: str | os.PathLike[str], options: argparse.Namespace) -> LLM:
    from mrv1.llm import LLM

    return LLM(
        model,
        revision=options.revision,
        progress=False if options.no_progress else None,
        device=options.device,
        dtype=options.dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        pipeline_layers=options.pipeline_layers,
        expert_parallel=options.expert_parallel,
        data_parallel_size=options.data_parallel_size,
        max_tokens_per_rank=options.max_tokens_per_rank,
    )


def _make_clean() -> Callable[[str], str]:
    """Makes stdout take any text; returns what prepares a text for it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    return for_terminal if sys.stdout.isatty() else str


def _read_stdin() -> str:
    """All of stdin but a newline at its end, which a shell adds."""
    return _decode_input(sys.stdin.buffer.read()).removesuffix("\n")


def _decode_input(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            field="stdin", allowed=f"UTF-8: {error.reason} at byte {error.start}"
        ) from None


def for_terminal(text: str) -> str:
    """The text without control characters: a model's output must not steer the terminal."""
    return text.translate(_CONTROL_CHARACTERS)


def _sampling_params(
    options: argparse.Namespace,
    llm: LLM,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    from mrv1.sampling_params import SamplingParams

    model = llm.model.config.default_sampling

    def chosen(given: float | None, recommended: float | None, default: float) -> float:
        return next(value for value in (given, recommended, default) if value is not None)

    return SamplingParams(
        temperature=chosen(options.temperature, model.temperature, _TEMPERATURE),
        top_p=chosen(options.top_p, model.top_p, 1.0),
        top_k=int(chosen(options.top_k, model.top_k, 0)),
        min_p=chosen(options.min_p, model.min_p, 0.0),
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        repetition_penalty=chosen(options.repetition_penalty, model.repetition_penalty, 1.0),
        logit_bias=options.logit_bias,
        allowed_token_ids=options.allowed_token_ids,
        bad_words=options.bad_words,
        structured_outputs=_structured_outputs(options),
        seed=options.seed,
        max_tokens=options.max_tokens,
        stop=options.stop,
        stop_token_ids=options.stop_token_ids,
        stop_sequences=options.stop_sequences,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _structured_outputs(options: argparse.Namespace) -> StructuredOutputsParams | None:
    from mrv1.structured_outputs_params import StructuredOutputsParams

    given = {
        "json": options.json_schema,
        "regex": options.regex,
        "choice": options.choice,
        "grammar": options.grammar,
        "json_object": options.json_object or None,
    }
    if all(value is None for value in given.values()):
        return None
    return StructuredOutputsParams(**given)


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


def _print_logprobs(results: list[GenerationResult]) -> None:
    """A line a token of prompts and outputs: its log probability and the most likely tokens'."""
    for index, result in enumerate(results):
        for name, places in (
            ("prompt", result.prompt_logprobs),
            ("output", result.logprobs),
        ):
            for place in places or ():
                told = [
                    f"{found.decoded_token!r} {found.logprob:.4f} (rank {found.rank})"
                    for found in (place or {}).values()
                ]
                if told:  # nothing is before the first token of a prompt
                    print(f"{name} {index + 1}: {'; '.join(told)}", file=sys.stderr)


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


# --- chat ----------------------------------------------------------------------------------------


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answers each line of stdin, with the lines and answers before it, by the chat template of "
        "the model. Answers go to stdout, all else to stderr; ends with the input or Ctrl-C."
    )
    parser.add_argument("--model", required=True, help="directory, or name in the local cache")
    parser.add_argument("--system", metavar="TEXT", help="what the conversation begins with")
    parser.add_argument(
        "--max-tokens", type=int, help="tokens an answer (default: what the model's length leaves)"
    )
    _add_sampling_options(parser)
    _add_device_options(parser)
    parser.set_defaults(run=_run_chat)


def _run_chat(options: argparse.Namespace) -> int:
    clean = _make_clean()
    messages = []
    if options.system is not None:
        messages.append({"role": "system", "content": options.system})
    with _open_llm(options.model, options) as llm:
        params = _sampling_params(options, llm)
        for line in _lines():
            messages.append({"role": "user", "content": line})
            prompt = llm.tokenizer.encode_chat(messages)
            answer = None
            with contextlib.closing(llm.stream(prompt, params)) as chunks:
                for chunk in chunks:
                    sys.stdout.write(clean(chunk.text))
                    sys.stdout.flush()
                    answer = chunk.result
            assert answer is not None
            print(flush=True)
            if answer.error is not None:
                print(f"the answer failed: {answer.error}", file=sys.stderr)
                return EXIT_ERROR
            messages.append({"role": "assistant", "content": answer.text})
    return 0


def _lines() -> Generator[str, None, None]:
    """Yields the lines of stdin that are not blank; asks for each on a terminal."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        data = sys.stdin.buffer.readline()
        if not data:
            if asks:
                print(file=sys.stderr)
            return
        line = _decode_input(data).strip()
        if line:
            yield line


# --- env -----------------------------------------------------------------------------------------


def _run_env(_: argparse.Namespace) -> int:
    from mrv1.env_report import env_report, format_report

    print(format_report(env_report()))
    return 0
