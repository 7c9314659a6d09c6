# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The command `mrv1 bench`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mrv1.errors import DeviceError, InvalidArgumentError

if TYPE_CHECKING:
    from mrv1 import _core
    from mrv1._cupti import Kernel
    from mrv1.bench import Bandwidth, CacheFormat, Figure, Rates, Record, Timing
    from mrv1.bench_kv import Geometry
    from mrv1.bench_trace import StepLogs
    from mrv1.config import ModelConfig
    from mrv1.loader import LoadedModel, RunnerOptions


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


def _names(*allowed: str) -> Callable[[str], list[str]]:
    """A parser of lists of some of the names."""

    def parse(text: str) -> list[str]:
        values = text.split(",")
        for value in values:
            if value not in allowed:
                raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(allowed)}")
        return values

    return parse


# As bench_op has them, which is not imported before it is needed.
OPS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "logits", "experts", "attention")
LENGTHS = ("even", "log-uniform", "one-long")
BACKENDS = ("native", "flashinfer")
# As bench_kv has them.
LAYOUTS = ("NHD", "HND")
CACHES = (
    "auto",
    "fp8_e4m3/static",
    "fp8_e4m3/dynamic",
    "fp8_e5m2/static",
    "fp8_e5m2/dynamic",
)
WRITES = ("write", "rope_write")
LAUNCHES = ("overlapped", "plain")
# As bench_collectives has them.
KERNELS = ("auto", "one_shot", "two_shot", "nccl")
# As bench_sampler has them.
CASES = ("greedy", "temperature", "top_k_top_p", "all")

# Of the figures that run a whole model.
_SHAPE_DEFAULTS: Mapping[str, object] = {"layers": None, "save": None, "weights": None}
_GPU_BATCHES = (1, 8, 32, 64, 128, 256)
# The options that each figure has, with their defaults on the CPU.
_DEFAULTS: dict[Figure, dict[str, object]] = {
    "decode": {
        "batch": [1, 8],
        "context": [1024],
        "steps": 32,
        "read_mb": None,
        "trace": None,
        **_SHAPE_DEFAULTS,
    },
    "prefill": {
        "batch": [1, 8],
        "context": [1024],
        "steps": 3,
        "read_mb": None,
        **_SHAPE_DEFAULTS,
    },
    "mix": {
        "requests": 256,
        "max_num_seqs": None,
        "read_mb": None,
        "trace": None,
        **_SHAPE_DEFAULTS,
    },
    "op": {
        "batch": [1, 8],
        "context": [1024],
        "steps": 32,
        "read_mb": None,
        "ops": None,
        "lengths": ["even"],
        "backend": ["native"],
        "weights": None,
    },
    "profile": {
        "batch": [1],
        "context": [1024],
        "steps": 20,
        "read_mb": None,
        **_SHAPE_DEFAULTS,
    },
    "kv_write": {
        "tokens": [1, 64, 1024],
        "steps": 9,
        "read_mb": None,
        "kv_heads": [8],
        "group": [4],
        "head_dim": [128],
        "layout": ["HND"],
        "caches": ["auto", "fp8_e4m3/static", "fp8_e4m3/dynamic"],
        "writes": ["write", "rope_write"],
        "launches": ["overlapped"],
    },
    "decode_attention": {
        "batch": [1, 8],
        "context": [1024],
        "lengths": ["even"],
        "steps": 9,
        "read_mb": None,
        "kv_heads": [8],
        "group": [4],
        "head_dim": [128],
        "layout": ["HND"],
        "caches": ["auto", "fp8_e4m3/static", "fp8_e4m3/dynamic"],
    },
    "all_reduce": {
        "steps": 9,
        "ranks": None,
        "message_kb": [8, 64, 1024],
        "kernels": ["auto"],
    },
    "stage_send": {"steps": 9, "ranks": None, "message_kb": [8, 64, 1024]},
    "expert_exchange": {"steps": 9, "ranks": None, "tokens": [1, 16, 64], "blocks": [32]},
    "sampler": {
        "batch": [1, 8],
        "steps": 9,
        "read_mb": None,
        "cases": list(CASES),
        "vocab": [32000, 128256, 151936],
    },
}
# Figures of kernels by themselves, which have no model.
_WITHOUT_MODEL: tuple[Figure, ...] = (
    "kv_write",
    "decode_attention",
    "all_reduce",
    "stage_send",
    "expert_exchange",
    "sampler",
)
# What differs on a GPU.
_GPU_DEFAULTS: dict[Figure, dict[str, object]] = {
    "decode": {"batch": list(_GPU_BATCHES), "steps": 128},
    "prefill": {"batch": [256]},
    "mix": {},
    "op": {"batch": list(_GPU_BATCHES)},
    "profile": {"batch": [64]},
    "kv_write": {"tokens": [4**power for power in range(9)]},
    "decode_attention": {"batch": [64, 256], "context": [1024, 8192], "steps": 20},
    "all_reduce": {
        "message_kb": [8, 16, 64, 256, 1024, 16384, 65536],
        "kernels": list(KERNELS),
    },
    "stage_send": {"message_kb": [8, 16, 64, 256, 1024, 2048, 16384, 65536]},
    "expert_exchange": {"tokens": [1, 16, 64, 256, 1024, 4096, 16384]},
    "sampler": {"batch": [1, 32, 256], "steps": 20},
}
_OPTIONS = (
    "batch",
    "context",
    "steps",
    "read_mb",
    "requests",
    "max_num_seqs",
    "trace",
    "layers",
    "save",
    "weights",
    "ops",
    "lengths",
    "backend",
    "tokens",
    "kv_heads",
    "group",
    "head_dim",
    "layout",
    "caches",
    "writes",
    "launches",
    "ranks",
    "message_kb",
    "kernels",
    "blocks",
    "cases",
    "vocab",
)
# Bytes that a run of a single op reads at least: on a GPU several times what its caches hold.
_GPU_WORKING_SET = 512 << 20
_CPU_WORKING_SET = 64 << 20


def add_bench(
    parser: argparse.ArgumentParser, add_device_options: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Adds the command's arguments."""
    from mrv1.shapes import NAMES

    parser.description = (
        "Measures a figure, prints a table and writes records; see docs/benchmarks.md."
    )
    parser.add_argument(
        "figure",
        choices=tuple(_DEFAULTS),
        help="decode: steps of one token a request; prefill: whole prompts; mix: requests of many "
        "lengths from first to last token; op: single ops of a decode step; profile: where the "
        "time of a decode step on a GPU goes; kv_write: writes to a paged KV cache; "
        "decode_attention: decode attention over one, by itself; all_reduce: sums over ranks, by "
        "themselves; stage_send: values from stage to stage, by themselves; expert_exchange: "
        "tokens to the ranks of their experts and back, by themselves; sampler: the draw of "
        "a token for each row, by itself",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="MODEL", help="a directory, or a name in the local cache")
    what.add_argument("--shape", choices=NAMES, help="sizes of a public model, random weights")
    parser.add_argument(
        "--batch",
        type=_positive_list,
        metavar="N[,N]",
        help="decode, prefill, op, profile, decode_attention, sampler: requests, of all ranks "
        "together (default: 1,8; "
        f"profile: 1; on a GPU {','.join(map(str, _GPU_BATCHES))}; prefill: 256; profile: 64; "
        "decode_attention: 64,256; sampler: 1,32,256)",
    )
    parser.add_argument(
        "--context",
        type=_positive_list,
        metavar="N[,N]",
        help="decode, op, profile, decode_attention: cached tokens; prefill: tokens of a prompt "
        "(default: 1024; decode_attention on a GPU: 1024,8192)",
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="decode, prefill, op, profile: steps that count (default: 32; decode on a GPU: 128; "
        "prefill: 3; profile: 20); kv_write, decode_attention, all_reduce, stage_send, "
        "sampler: runs (default: 9; decode_attention, sampler on a GPU: 20)",
    )
    parser.add_argument(
        "--requests",
        type=_positive,
        metavar="N",
        help="mix: the first N of its 256 requests, or that many drawn alike (default: 256)",
    )
    parser.add_argument(
        "--max-num-seqs",
        type=_positive,
        metavar="N",
        help="mix: requests that run at once, as far as the KV cache holds them (default: all)",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="decode, mix: write what each rank's device did when, for https://ui.perfetto.dev; of "
        "decode, the last batch at the last context, with kernels on GPUs that exchange values",
    )
    parser.add_argument(
        "--ops",
        type=_names(*OPS),
        metavar="OP[,OP]",
        help=f"op: which (default: {','.join(OPS)})",
    )
    parser.add_argument(
        "--lengths",
        type=_names(*LENGTHS),
        metavar="KIND[,KIND]",
        help="op, decode_attention: cached tokens of the requests for attention: even (--context "
        "each), log-uniform (1 to 32768), one-long (65536, the others 512) (default: even)",
    )
    parser.add_argument(
        "--backend",
        type=_names(*BACKENDS),
        metavar="NAME[,NAME]",
        help="op: kernels of attention, native or flashinfer (default: native)",
    )
    _add_kv_options(parser)
    _add_rank_options(parser)
    parser.add_argument(
        "--cases",
        type=_names(*CASES),
        metavar="NAME[,NAME]",
        help=f"sampler: which parameters the rows have (default: {','.join(CASES)})",
    )
    parser.add_argument(
        "--vocab",
        type=_positive_list,
        metavar="N[,N]",
        help="sampler: logits of a row (default: 32000,128256,151936)",
    )
    parser.add_argument(
        "--layers",
        type=_positive,
        metavar="N",
        help="decode, prefill, mix, profile: cut the shape to N layers; its name says so",
    )
    parser.add_argument(
        "--save",
        metavar="DIR",
        help="decode, prefill, mix, profile: write the shape as a model directory, and measure "
        "that",
    )
    parser.add_argument(
        "--weights",
        choices=("bf16", "nvfp4"),
        help="decode, prefill, mix, op, profile: how a shape's linear layers are stored, but for "
        "the output head (default: bf16)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the records")
    parser.add_argument(
        "--peers", metavar="FILE", help="set figures of other engines beside: benchmarks/peers"
    )
    parser.add_argument(
        "--commit",
        metavar="ID",
        help="commit that the records name, for a package outside of its checkout",
    )
    parser.add_argument(
        "--read-mb",
        type=_positive,
        metavar="N",
        help="buffer of the bandwidth measurement in MiB (default: 1024; on a GPU 8192)",
    )
    add_device_options(parser)
    parser.set_defaults(run=_run_bench, usage_error=parser.error)


def _add_kv_options(parser: argparse.ArgumentParser) -> None:
    both = "kv_write, decode_attention"
    for name, figures, default, text in (
        (
            "--tokens",
            "kv_write, expert_exchange",
            "1,64,1024; on a GPU 1,4,16,...,65536; expert_exchange: 1,16,64, on a GPU up to 16384",
            "tokens of a launch, or of a rank",
        ),
        ("--kv-heads", both, "8", "key heads"),
        ("--group", both, "4", "query heads of a key head"),
        ("--head-dim", both, "128", "elements of a head"),
    ):
        parser.add_argument(
            name,
            type=_positive_list,
            metavar="N[,N]",
            help=f"{figures}: {text} (default: {default})",
        )
    for name, figures, allowed, default, text in (
        ("--layout", both, LAYOUTS, "HND", "what lies between blocks and elements"),
        (
            "--caches",
            both,
            CACHES,
            "auto,fp8_e4m3/static,fp8_e4m3/dynamic",
            "what the cache holds, of " + ", ".join(CACHES),
        ),
        (
            "--writes",
            "kv_write",
            WRITES,
            ",".join(WRITES),
            "by itself, or with the rotary embedding",
        ),
        (
            "--launches",
            "kv_write",
            LAUNCHES,
            "overlapped",
            "as in a step, or each after the one before",
        ),
    ):
        parser.add_argument(
            name,
            type=_names(*allowed),
            metavar="NAME[,NAME]",
            help=f"{figures}: {text} (default: {default})",
        )


def _add_rank_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=_positive,
        metavar="N",
        help="all_reduce, expert_exchange: of the group; stage_send: of as many stages (default: "
        "all GPUs; 2 of the CPU)",
    )
    parser.add_argument(
        "--message-kb",
        type=_positive_list,
        metavar="N[,N]",
        help="all_reduce: KiB that a rank gives to a sum; stage_send: of a message (default: "
        "8,64,1024; on a GPU 8,16,64,256,1024,16384,65536; stage_send: 2048, too)",
    )
    parser.add_argument(
        "--blocks",
        type=_positive_list,
        metavar="N[,N]",
        help="expert_exchange: thread blocks of each kernel on a GPU, at most 64 (default: 32)",
    )
    parser.add_argument(
        "--kernels",
        type=_names(*KERNELS),
        metavar="NAME[,NAME]",
        help=f"all_reduce: how sums travel, of {', '.join(KERNELS)} (default: auto; on a GPU all)",
    )


def _run_bench(options: argparse.Namespace) -> int:
    from mrv1 import bench, bench_peers
    from mrv1.loader import resolve_device

    options.device = resolve_device(options.device)
    _set_defaults(options)
    peers = [] if options.peers is None else bench_peers.read_peers(options.peers)
    if options.json is not None:
        bench.check_writable(options.json)
    if options.trace is not None:
        bench.check_writable(options.trace, "trace")
    records = {
        "decode": _decode_records,
        "prefill": _prefill_records,
        "mix": _mix_records,
        "op": _op_records,
        "profile": _profile_records,
        "kv_write": _kv_write_records,
        "decode_attention": _decode_attention_records,
        "all_reduce": _rank_records,
        "stage_send": _rank_records,
        "expert_exchange": _rank_records,
        "sampler": _sampler_records,
    }[options.figure](options)
    if options.commit is not None:
        for record in records:
            record["commit"] = options.commit
    bench_peers.add_peers(records, peers)
    if options.figure != "profile":  # that has printed tables of its own
        print(bench.format_table(records))
    if options.json is not None:
        bench.write_json(options.json, records)
    return 0


def _set_defaults(options: argparse.Namespace) -> None:
    """Fills in what was not given, and refuses what the figure would ignore."""
    defaults = dict(_DEFAULTS[options.figure])
    given = options.model if options.model is not None else options.shape
    if given is None and options.figure not in _WITHOUT_MODEL:
        options.usage_error("one of the arguments --model --shape is required")
    if given is not None and options.figure in _WITHOUT_MODEL:
        raise InvalidArgumentError(
            field="--shape" if options.model is None else "--model",
            value=given,
            allowed=f"left out for the figure {options.figure}, which has no model",
        )
    if options.device == "cuda":
        defaults.update(_GPU_DEFAULTS[options.figure])
    for name in _OPTIONS:
        value = getattr(options, name)
        if value is None:
            setattr(options, name, defaults.get(name))
        elif name not in defaults:
            raise InvalidArgumentError(
                field=f"--{name.replace('_', '-')}",
                value=value,
                allowed=f"left out for the figure {options.figure}",
            )


def _source(options: argparse.Namespace) -> tuple[str, str | None, dict[str, object]]:
    """What --model, --shape, --layers and --save ask for: a name, and a directory or a config."""
    from mrv1 import shapes
    from mrv1.hub import find_model
    from mrv1.random_model import save_random_model

    if options.model is not None or options.shape == shapes.DEMO:
        for name in ("layers", "save", "weights"):
            if getattr(options, name) is not None:
                raise InvalidArgumentError(
                    field=f"--{name}",
                    value=getattr(options, name),
                    allowed="left out for a model that has weights of its own",
                )
        if options.model is None:
            return shapes.DEMO, str(shapes.demo_model()), {}
        # Records are published; where a directory lies is nobody's business.
        root = find_model(options.model)
        return Path(options.model).resolve().name, str(root), {}
    name, config = shapes.shape_config(options.shape, options.layers)
    if options.save is None:
        return name, None, config
    if options.weights == "nvfp4":
        raise InvalidArgumentError(
            field="--save",
            value=options.save,
            allowed="left out with --weights nvfp4; mrv1 quantize makes one of a saved model",
        )
    shown = False if options.no_progress else None
    return name, str(save_random_model(options.save, config, progress=shown)), config


def _load(
    options: argparse.Namespace,
    directory: str | None,
    config: dict[str, object],
    runner_options: RunnerOptions,
) -> LoadedModel:
    from mrv1.loader import load_model
    from mrv1.random_model import random_runner

    runner_options = dataclasses.replace(
        runner_options,
        kv_cache_dtype=options.kv_cache_dtype,
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        pipeline_layers=options.pipeline_layers,
        expert_parallel=options.expert_parallel,
        data_parallel_size=options.data_parallel_size,
        max_tokens_per_rank=options.max_tokens_per_rank,
    )
    if directory is None:
        return random_runner(_shape_config(options, config), runner_options)
    return load_model(directory, runner_options, progress=False if options.no_progress else None)


def _shape_config(options: argparse.Namespace, values: dict[str, object]) -> ModelConfig:
    """The config of a shape whose weights are stored as --weights says."""
    from mrv1.config import ModelConfig
    from mrv1.quantization import RANDOM_NVFP4

    quantization = RANDOM_NVFP4 if options.weights == "nvfp4" else None
    return dataclasses.replace(ModelConfig.from_values(values), quantization=quantization)


def _refuse_ranks(options: argparse.Namespace) -> None:
    for kind in ("tensor", "pipeline", "data"):
        size = getattr(options, f"{kind}_parallel_size")
        if size != 1:
            raise InvalidArgumentError(
                field=f"--{kind}-parallel-size",
                value=size,
                allowed=f"1 for the figure {options.figure}, which is about one device",
            )


def _refuse_stages(options: argparse.Namespace) -> None:
    if options.pipeline_parallel_size != 1:
        raise InvalidArgumentError(
            field="--pipeline-parallel-size",
            value=options.pipeline_parallel_size,
            allowed=f"1 for the figure {options.figure}, which is about one GPU's kernels",
        )


def _cache(model: LoadedModel) -> CacheFormat:
    from mrv1.bench import CacheFormat

    return CacheFormat(model.kv_cache_dtype, model.kv_scales)


def _read_bytes(options: argparse.Namespace) -> int | None:
    return None if options.read_mb is None else options.read_mb << 20


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
        rates = bench.measure_rates(model.device, model.dtype, _read_bytes(options))
        return timings, rates, bench.describe_device(model.device)
    finally:
        model.close()


def _write_trace(
    options: argparse.Namespace, model: LoadedModel, logs: StepLogs, kernels: Sequence[Kernel] = ()
) -> None:
    from mrv1 import bench_overlap, bench_trace

    if options.trace is not None:
        events = bench_overlap.kernel_events(kernels, logs)
        bench_trace.write_trace(options.trace, logs, model.pipeline_parallel_size, events)


def _decode_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import bench, bench_decode, bench_ranks

    shape, directory, config = _source(options)
    options.batch = bench_ranks.share_out(options.batch, options.data_parallel_size)
    runner_options = bench_decode.decode_options(
        options.device,
        options.dtype,
        options.batch,
        options.context,
        options.steps,
        stages=options.pipeline_parallel_size,
    )
    model = _load(options, directory, config, runner_options)
    model.runner.fill_kv_random(0)
    logs: StepLogs = []
    kernels: list[Kernel] = []

    def measure(model: LoadedModel, batch: int, context: int, steps: int) -> Timing:
        # What comes after kernels were traced may be slower.
        last = (batch, context) == (options.batch[-1], options.context[-1])
        traced = kernels if last and options.trace is not None else None
        return bench_decode.measure_decode(model, batch, context, steps, logs, traced)

    timings, rates, device = _measure(options, model, measure)
    _write_trace(options, model, logs, kernels)
    cache = _cache(model)
    records = []
    for timing in timings:
        # Rows grow while they are measured.
        mean = timing.context + (options.steps - 1) / 2
        micro_batches = min(model.pipeline_parallel_size, timing.batch)
        batch = timing.batch * model.data_parallel_size
        costs = bench.decode_costs(model.config, model.dtype, batch, mean, cache, micro_batches)
        records.append(
            bench_ranks.model_record("decode", shape, device, model, timing, costs, rates)
        )
    return records


def _prefill_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import bench, bench_prefill, bench_ranks

    shape, directory, config = _source(options)
    options.batch = bench_ranks.share_out(options.batch, options.data_parallel_size)
    runner_options = bench_prefill.prefill_options(
        options.device, options.dtype, options.batch, options.context
    )
    model = _load(options, directory, config, runner_options)
    timings, rates, device = _measure(options, model, bench_prefill.measure_prefill)
    cache = _cache(model)
    records = []
    for timing in timings:
        batch = timing.batch * model.data_parallel_size
        costs = bench.prefill_costs(model.config, model.dtype, batch, timing.context, cache)
        records.append(
            bench_ranks.model_record("prefill", shape, device, model, timing, costs, rates)
        )
    return records


def _mix_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import bench, bench_mix, bench_ranks
    from mrv1.config import ModelConfig
    from mrv1.engine import Engine
    from mrv1.random_model import byte_tokenizer
    from mrv1.tokenizer import Tokenizer

    shape, directory, values = _source(options)
    config = (
        ModelConfig.from_values(values) if directory is None else ModelConfig.from_dir(directory)
    )
    if directory is None:
        tokenizer = Tokenizer(byte_tokenizer())
    else:
        tokenizer = Tokenizer.from_dir(directory, config.vocab_size)
    requests = bench_mix.mix_requests(config.vocab_size, options.requests)
    runner_options = bench_mix.mix_options(
        options.device, options.dtype, requests, options.max_num_seqs
    )
    model = _load(options, directory, values, runner_options)
    with Engine.from_model(model, tokenizer) as engine:
        logs: StepLogs = []
        timing = bench_mix.measure_mix(engine, requests, logs)
        _write_trace(options, model, logs)
        device = bench.describe_device(model.device)
        rates = bench.measure_rates(model.device, model.dtype, _read_bytes(options))
    lengths = [(len(request.prompt_token_ids), request.max_tokens) for request in requests]
    tokens = sum(output for _, output in lengths)
    steps = round(tokens / (timing.tokens or 1))
    cache = _cache(model)
    costs = [
        dataclasses.replace(
            cost, read_bytes=cost.read_bytes // steps, operations=cost.operations // steps
        )
        for cost in bench.mix_costs(model.config, model.dtype, lengths, cache)
    ]
    return [
        bench_ranks.model_record("mix", shape, device, model, timing, costs, rates, of_all=True)
    ]


def _op_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import bench, bench_op, envs, tuning
    from mrv1.config import ModelConfig
    from mrv1.loader import resolve_dtype, resolve_kv_cache_dtype

    _refuse_ranks(options)
    shape, directory, values = _source(options)
    config = (
        _shape_config(options, values) if directory is None else ModelConfig.from_dir(directory)
    )
    limit = config.max_position_embeddings
    for context in options.context:
        if context > limit:
            raise InvalidArgumentError(
                field="--context",
                value=context,
                allowed=f"at most the model's max_position_embeddings = {limit}",
            )
    if options.device == "cpu" and options.backend != ["native"]:
        raise InvalidArgumentError(
            field="--backend", value=",".join(options.backend), allowed="native on the cpu"
        )
    dtype = resolve_dtype(options.dtype, config)
    weights = bench.weights_name(config, dtype)
    scales = "none" if options.kv_cache_dtype == "auto" else "dynamic"
    cache = bench.CacheFormat(resolve_kv_cache_dtype(options.kv_cache_dtype), scales)
    threads = envs.NUM_THREADS.get() or 0
    device = tuning.make_device(options.device, num_threads=threads)
    ops = bench_op.choose_ops(config, options.ops)
    try:
        rates = bench.measure_rates(device, dtype, _read_bytes(options))
        described = bench.describe_device(device)
        working_set = _read_bytes(options) or bench.READ_BYTES[options.device]
        if options.device == "cuda":
            working_set = _GPU_WORKING_SET

        def record(cost: bench.OpCost, timing: Timing) -> Record:
            made = bench.make_record(
                "op", shape, described, dtype, timing, [cost], rates, cache, weights=weights
            )
            made["op"] = cost.name
            return made

        records = [
            record(cost, timing)
            for cost, timing in bench_op.measure_products(
                device, config, dtype, options.batch, options.steps, working_set, ops
            )
        ]
        if bench_op.ATTENTION not in ops:
            return records
        for kind in options.lengths:
            for context in options.context if kind == "even" else options.context[:1]:
                for batch in options.batch:
                    lengths = bench_op.request_lengths(kind, batch, context)
                    for backend, cost, timing, fault in bench_op.measure_attention(
                        device,
                        config,
                        dtype,
                        lengths,
                        options.steps,
                        working_set,
                        options.backend,
                        cache,
                    ):
                        made = record(cost, timing)
                        if kind != "even":
                            made["lengths"] = kind
                        if options.device == "cuda":
                            made["backend"] = backend
                        if fault is not None:
                            made["counts"], made["fault"] = False, fault
                        records.append(made)
        return records
    finally:
        device.close()


def _kv_write_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import bench_kv

    dtype = "bfloat16" if options.dtype == "auto" else options.dtype
    records: list[Record] = []
    for device, geometry, cache, bandwidth in _kv_caches(options):
        records += bench_kv.measure_writes(
            device,
            dtype,
            geometry,
            cache,
            options.tokens,
            options.writes,
            options.launches,
            options.steps,
            _working_set(options),
            bandwidth,
        )
    return records


def _decode_attention_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import bench_kv, bench_op

    if options.dtype not in ("auto", "bfloat16"):
        raise InvalidArgumentError(
            field="--dtype", value=options.dtype, allowed="bfloat16 for the figure decode_attention"
        )
    records: list[Record] = []
    for device, geometry, cache, bandwidth in _kv_caches(options):
        for batch, kind in itertools.product(options.batch, options.lengths):
            for context in options.context if kind == "even" else options.context[:1]:
                lengths = bench_op.request_lengths(kind, batch, context)
                record = bench_kv.measure_attention(
                    device,
                    geometry,
                    cache,
                    lengths,
                    options.steps,
                    # A run of more calls hides how long its graph takes to start.
                    4 * _working_set(options),
                    bandwidth,
                )
                if kind != "even":
                    record["lengths"] = kind
                records.append(record)
    return records


def _rank_records(options: argparse.Namespace) -> list[Record]:
    """What passes between ranks: `all_reduce`, `stage_send` and `expert_exchange`."""
    from mrv1 import bench_collectives

    kernels = options.kernels
    if options.device == "cpu" and kernels not in (None, ["auto"]):
        raise InvalidArgumentError(
            field="--kernels", value=",".join(kernels), allowed="auto on the cpu"
        )
    if options.kv_cache_dtype != "auto":
        raise InvalidArgumentError(
            field="--kv-cache-dtype",
            value=options.kv_cache_dtype,
            allowed=f"left out for the figure {options.figure}, which has no cache",
        )
    dtype = "bfloat16" if options.dtype == "auto" else options.dtype
    devices = bench_collectives.open_ranks(options.device, options.ranks)
    try:
        if options.figure == "expert_exchange":
            return list(
                bench_collectives.measure_expert_exchange(
                    devices, dtype, options.tokens, options.blocks, options.steps
                )
            )
        sizes = [count << 10 for count in options.message_kb]
        if options.figure == "stage_send":
            return list(bench_collectives.measure_stage_send(devices, dtype, sizes, options.steps))
        return list(
            bench_collectives.measure_all_reduce(devices, dtype, sizes, kernels, options.steps)
        )
    finally:
        for device in devices:
            device.close()


def _sampler_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import bench, bench_sampler, tuning

    if options.dtype not in ("auto", "float32"):
        raise InvalidArgumentError(
            field="--dtype", value=options.dtype, allowed="float32 for the figure sampler"
        )
    if options.kv_cache_dtype != "auto":
        raise InvalidArgumentError(
            field="--kv-cache-dtype",
            value=options.kv_cache_dtype,
            allowed="left out for the figure sampler, which has no cache",
        )
    device = tuning.make_device(options.device)
    try:
        bandwidth = bench.measure_bandwidth(device, _read_bytes(options))
        return [
            bench_sampler.measure_sampler(
                device, case, batch, vocab, options.steps, _working_set(options), bandwidth
            )
            for vocab, batch, case in itertools.product(options.vocab, options.batch, options.cases)
        ]
    finally:
        device.close()


def _working_set(options: argparse.Namespace) -> int:
    return _GPU_WORKING_SET if options.device == "cuda" else _CPU_WORKING_SET


def _kv_caches(
    options: argparse.Namespace,
) -> Iterator[tuple[_core.Device, Geometry, CacheFormat, Bandwidth]]:
    """The caches that a figure of its kernels goes through, on a device that is open meanwhile."""
    from mrv1 import bench, bench_kv, tuning

    _refuse_ranks(options)
    if options.kv_cache_dtype != "auto":
        raise InvalidArgumentError(
            field="--kv-cache-dtype",
            value=options.kv_cache_dtype,
            allowed=f"left out for the figure {options.figure}, which takes --caches",
        )
    device = tuning.make_device(options.device)
    try:
        bandwidth = bench.measure_bandwidth(device, _read_bytes(options))
        for kv_heads, group, head_dim, layout, cache in itertools.product(
            options.kv_heads, options.group, options.head_dim, options.layout, options.caches
        ):
            geometry = bench_kv.Geometry(kv_heads, group, head_dim, layout)
            yield device, geometry, bench_kv.FORMATS[cache], bandwidth
    finally:
        device.close()


def _profile_records(options: argparse.Namespace) -> list[Record]:
    from mrv1 import _cupti, bench, bench_decode, bench_profile, bench_ranks

    _refuse_stages(options)
    if options.device != "cuda":
        raise DeviceError("[bench] a profile is of kernels on a GPU: pass --device cuda")
    _cupti.open_cupti()  # before minutes go into what cannot be traced
    shape, directory, config = _source(options)
    options.batch = bench_ranks.share_out(options.batch, options.data_parallel_size)
    runner_options = bench_decode.decode_options(
        options.device, options.dtype, options.batch, options.context, 2 * options.steps
    )
    model = _load(options, directory, config, runner_options)
    model.runner.fill_kv_random(0)
    try:
        cases = [
            (batch, context, bench_profile.measure_profile(model, batch, context, options.steps))
            for context in options.context
            for batch in options.batch
        ]
        rates = bench.measure_rates(model.device, model.dtype, _read_bytes(options))
        device = bench.describe_device(model.device)
    finally:
        model.close()
    records: list[Record] = []
    tensor, data = model.tensor_parallel_size, model.data_parallel_size
    for own_batch, context, profile in cases:
        batch = own_batch * data
        # Those traced come after as many that were not.
        mean = context + options.steps + (options.steps - 1) / 2
        costs = bench.decode_costs(model.config, model.dtype, batch, mean, _cache(model))
        print(f"{shape}, batch {batch}, context {round(mean)}, {device}:")
        shared = bench.shared_costs(costs, tensor, micro_batches=1, data_ranks=data)
        print(bench_profile.format_profile(profile, shared, rates))
        by_label = bench_profile.costs_by_label(costs)
        for op in profile.ops:
            record = bench.make_record(
                "profile",
                shape,
                device,
                model.dtype,
                bench_profile.op_timing(op, batch, round(mean)),
                bench_profile.label_costs(op.label, by_label),
                rates,
                _cache(model),
                tensor,
                weights=bench.weights_name(model.config, model.dtype),
                data_ranks=data,
            )
            if model.expert_parallel:
                record["ep"] = max(tensor, data)
            record["op"] = op.label
            record["kernels"] = round(op.kernels)
            records.append(record)
    return records
