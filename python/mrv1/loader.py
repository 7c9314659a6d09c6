# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""From a model directory to a native runner whose weights are loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import TypedDict

from mrv1 import _core, _libraries, envs, parallel, tuning
from mrv1._streams import Stream
from mrv1.builder import Builder
from mrv1.config import ModelConfig, model_root
from mrv1.errors import ConfigError, InvalidArgumentError, OutOfMemoryError, WeightError
from mrv1.kv_scales import KvScales, is_kv_scale, read_kv_scales
from mrv1.models import FAMILIES
from mrv1.parallel import Shard
from mrv1.progress import format_phases, is_shown, progress_bar
from mrv1.quantization import NVFP4_BLOCK, nvfp4_tensors
from mrv1.safetensors_reader import TensorInfo, read_checkpoint
from mrv1.sampling_params import MAX_INT32, WHOLE_VOCABULARY
from mrv1.speculation import NgramConfig

_LOG = logging.getLogger("mrv1")

# safetensors dtype -> the native loader's name.
LOADABLE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Of the tensors of an NVFP4 matrix, by what they are: dtype, and columns an element; 0 for a single
# scale.
_NVFP4_FORMS = {
    "nvfp4_codes": ("U8", 2),
    "nvfp4_block_scales": ("F8_E4M3", NVFP4_BLOCK),
    "nvfp4_global_scale": ("F32", 0),
    "nvfp4_input_scale": ("F32", 0),
}
# Share of the free memory that the KV cache takes where nothing says how much it may.
_KV_SHARE = 0.25
# Share of a GPU's memory that may be in use once the KV cache is there.
_GPU_SHARE = 0.9
# Memory that a captured size may take, and what libraries load with their kernels.
_GRAPH_BYTES = 4 << 20
_LIBRARY_BYTES = 512 << 20
_GRAPH_MODES = {
    "auto": _core.StepMode.FULL,
    "eager": _core.StepMode.EAGER,
    "piecewise": _core.StepMode.PIECEWISE,
    "full": _core.StepMode.FULL,
}
_BACKENDS = {
    "native": _core.AttentionBackend.NATIVE,
    "flashinfer": _core.AttentionBackend.FLASHINFER,
}
_TWO_BATCH_MODES = {
    "0": _core.TwoBatchMode.OFF,
    "1": _core.TwoBatchMode.ON,
    "auto": _core.TwoBatchMode.AUTO,
}
KV_CACHE_DTYPES = ("auto", "fp8_e4m3", "fp8_e5m2")


@dataclasses.dataclass(frozen=True)
class RunnerOptions:
    """Sizes and choices of a runner. None takes the default.

    Attributes:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        dtype: "auto" (float32 checkpoints run in float32, all others in bfloat16), "float32" or
            "bfloat16".
        max_num_seqs: Requests that run at once; 64 on the CPU, 256 on a GPU.
        max_num_batched_tokens: Tokens of one step; 512 on the CPU, 8192 on a GPU, and at least
            max_num_seqs.
        max_model_len: Tokens of one request, prompt included; the model's own limit, less if the
            KV cache holds less. A model with longrope takes the frequencies for long sequences
            unless this is at most its original_max_position_embeddings.
        block_size: Tokens of one KV block.
        kv_cache_dtype: What the KV cache holds: "auto" (the dtype of activations), or "fp8_e4m3" or
            "fp8_e5m2", which take half the memory of bfloat16. Scales of FP8 are those that the
            checkpoint has, from a calibration; without any, each token and head has its own,
            computed when it is written.
        num_kv_blocks: KV blocks, the null block included; overrides kv_cache_memory.
        kv_cache_memory: Bytes of the KV cache; overrides gpu_memory_utilization. On the CPU a
            quarter of the free memory. Never more than max_num_seqs requests of max_model_len can
            use.
        gpu_memory_utilization: Share of the GPU's memory that may be in use, whoever uses it, once
            the KV cache is allocated; 0.9.
        stream: CUDA stream in which all steps run: an object with `__cuda_stream__`, or a handle,
            whose stream must outlive the runner. No default stream; None makes one.
        num_threads: CPU threads, of all ranks together; MRV1_NUM_THREADS, else the cores this
            process may use.
        tensor_parallel_size: Devices that compute the model together, each a part of every layer:
            as many GPUs, from the first on, or as many streams of the CPU. Memory and KV blocks
            are then those of each. See docs/parallel.md.
        pipeline_parallel_size: Stages that the layers are cut into, each on devices of its own, as
            many as tensor_parallel_size says: the first stage has the first devices. At most 8
            devices in all, and a layer or more for each stage. See docs/parallel.md.
        pipeline_layers: How many layers each stage has, their sum that of the model; None balances
            the bytes of weights that a step reads, the output head included.
        expert_parallel: Whether ranks have whole experts of their own, instead of a part of each.
        data_parallel_size: Ranks that have requests, rows and KV blocks of their own, each on a
            device: every rank has all of the model but experts, of which it has some, and sends
            tokens to those of others. Needs expert_parallel, and a size of 1 in tensor and pipeline
            parallelism. max_num_seqs and other limits are those of each. See docs/parallel.md.
        max_tokens_per_rank: Tokens that a rank may send to others at a time, which all have room
            for; a step has no more, so what does not fit waits for the next one. None is
            max_num_batched_tokens.
        fusion: Whether the fusion pass runs; MRV1_FUSION.
        graph_mode: Fastest way that steps may reach the device: "eager" (kernel by kernel),
            "piecewise" (graphs between the attention ops), "full" (one graph a step) or "auto"
            ("full" on a GPU, "eager" on the CPU); MRV1_GRAPH_MODE.
        capture_sizes: Sizes that whole steps are captured at: numbers of decoding requests, with
            speculation or without, or pairs (requests, tokens of each) for other steps. A step runs
            at the smallest that holds it.
        piecewise_sizes: Numbers of tokens that steps are captured at in pieces.
        attention_backend: Kernels of decode attention on a GPU, "native" or "flashinfer" (native
            again where the build or FlashInfer has no kernel for it); MRV1_ATTENTION_BACKEND.
        batch_invariant: Whether a row's results on a GPU must not depend, bit for bit, on what else
            is in the batch, nor, on any device, on tensor_parallel_size; MRV1_BATCH_INVARIANT.
        pad_requests: Steps are padded to at least this many requests; for testing.
        pad_tokens: Steps are padded to at least this many tokens; for testing.
        infer_param_view: Whether steps also compute the by-table-row view of the batch.
        speculative_config: Speculative decoding, as a mapping with vLLM's names: "method" ("ngram",
            the only one), "num_speculative_tokens" (draft tokens of a step, 1 to 15; 4 is a good
            start), "prompt_lookup_max" and "prompt_lookup_min" (tokens of the longest and the
            shortest n-gram that is looked up; 3 and 1). None is off. See `mrv1.speculation`.
        max_logprobs: Most that `SamplingParams.logprobs` and `prompt_logprobs` may ask for; -1 is
            the vocabulary. The output ring has 8 bytes for each, of all requests at once.
        keep_hidden_states: Whether `ModelRunner.hidden_states` can be read; takes memory.
        force_tokens: Whether rows may carry tokens that take the place of those drawn; for testing.
    """

    device: str | None = None
    dtype: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    num_kv_blocks: int | None = None
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float | None = None
    stream: Stream = None
    num_threads: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pipeline_layers: Sequence[int] | None = None
    expert_parallel: bool = False
    data_parallel_size: int = 1
    max_tokens_per_rank: int | None = None
    fusion: bool | None = None
    graph_mode: str | None = None
    capture_sizes: Sequence[int | tuple[int, int]] | None = None
    piecewise_sizes: Sequence[int] | None = None
    attention_backend: str | None = None
    batch_invariant: bool | None = None
    pad_requests: int = 0
    pad_tokens: int = 0
    infer_param_view: bool = False
    speculative_config: Mapping[str, object] | None = None
    max_logprobs: int = 20
    keep_hidden_states: bool = False
    force_tokens: bool = False


class RunnerKwargs(TypedDict, total=False):
    """The fields of `RunnerOptions` as keyword arguments."""

    device: str | None
    dtype: str
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    max_model_len: int | None
    block_size: int
    kv_cache_dtype: str
    num_kv_blocks: int | None
    kv_cache_memory: int | None
    gpu_memory_utilization: float | None
    stream: Stream
    num_threads: int | None
    tensor_parallel_size: int
    pipeline_parallel_size: int
    pipeline_layers: Sequence[int] | None
    expert_parallel: bool
    data_parallel_size: int
    max_tokens_per_rank: int | None
    fusion: bool | None
    graph_mode: str | None
    capture_sizes: Sequence[int | tuple[int, int]] | None
    piecewise_sizes: Sequence[int] | None
    attention_backend: str | None
    batch_invariant: bool | None
    pad_requests: int
    pad_tokens: int
    infer_param_view: bool
    speculative_config: Mapping[str, object] | None
    max_logprobs: int
    keep_hidden_states: bool
    force_tokens: bool


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A runner that is ready, and what it was made from.

    Attributes:
        config: The model's.
        device: Where logits are; of several, the first of the last stage.
        devices: Of each rank, those of the first stage first.
        runner: The native runner.
        dtype: "float32" or "bfloat16".
        max_num_seqs: As `RunnerOptions`, resolved.
        max_num_batched_tokens: As `RunnerOptions`, resolved; at most max_tokens_per_rank.
        max_model_len: As `RunnerOptions`, resolved.
        block_size: As `RunnerOptions`.
        kv_cache_dtype: As `RunnerOptions`.
        kv_scales: Scales of the KV cache: "none", "static" (from the checkpoint) or "dynamic".
        num_kv_blocks: As `RunnerOptions`, resolved.
        num_speculative_tokens: Draft tokens of a step; 0 without speculation.
        max_logprobs: As `RunnerOptions`, resolved; at most the vocabulary size.
        pipeline_layers: As `RunnerOptions`, resolved: layers of each stage.
        expert_parallel: As `RunnerOptions`.
        data_runners: With data_parallel_size > 1, the native runner of each rank, else `runner`.
        startup: Seconds of each phase of the start, by name.
        startup_bytes: Bytes that a phase allocated, read or captured, for those that have some.
    """

    config: ModelConfig
    device: _core.Device
    devices: tuple[_core.Device, ...]
    runner: _core.ModelRunner
    dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    kv_cache_dtype: str
    kv_scales: str
    num_kv_blocks: int
    num_speculative_tokens: int
    max_logprobs: int
    pipeline_layers: tuple[int, ...]
    expert_parallel: bool
    data_runners: tuple[_core.ModelRunner, ...]
    startup: dict[str, float]
    startup_bytes: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def pipeline_parallel_size(self) -> int:
        """As `RunnerOptions`."""
        return len(self.pipeline_layers)

    @property
    def data_parallel_size(self) -> int:
        """As `RunnerOptions`."""
        return len(self.data_runners)

    @property
    def tensor_parallel_size(self) -> int:
        """As `RunnerOptions`."""
        return len(self.devices) // self.pipeline_parallel_size // self.data_parallel_size

    def close(self) -> None:
        """Frees memory and devices."""
        for runner in self.data_runners:
            runner.close()
        for device in self.devices:
            device.close()


def resolve_device(name: str | None) -> str:
    """Returns "cpu" or "cuda" for a device name; None asks MRV1_DEVICE."""
    chosen = envs.DEVICE.get() if name is None else name
    if chosen not in ("auto", "cpu", "cuda"):
        raise InvalidArgumentError(field="device", value=chosen, allowed="auto, cpu or cuda")
    if chosen == "auto":
        return "cuda" if _core.cuda_available() else "cpu"
    return chosen


def resolve_dtype(requested: str, config: ModelConfig) -> str:
    """Returns the dtype to run in. float16 checkpoints run as bfloat16 unless float32 is asked."""
    if requested not in ("auto", "float32", "bfloat16"):
        raise InvalidArgumentError(
            field="dtype", value=requested, allowed="auto, float32 or bfloat16"
        )
    if requested == "auto":
        return "float32" if config.dtype == "float32" else "bfloat16"
    return requested


def resolve_kv_cache_dtype(requested: str) -> str:
    """Returns what the KV cache is asked to hold, one of `KV_CACHE_DTYPES`."""
    if requested not in KV_CACHE_DTYPES:
        raise InvalidArgumentError(
            field="kv_cache_dtype", value=requested, allowed="auto, fp8_e4m3 or fp8_e5m2"
        )
    return requested


def resolve_max_model_len(options: RunnerOptions, config: ModelConfig) -> int:
    """Returns the tokens that a request may have, as long as the KV cache holds them."""
    limit = config.max_position_embeddings
    length = _positive("max_model_len", options.max_model_len, limit)
    if length < 2:
        allowed = "at least 2: a token of a prompt and one that follows"
        raise InvalidArgumentError(field="max_model_len", value=length, allowed=allowed)
    if length > limit:
        allowed = f"at most the model's max_position_embeddings = {limit}"
        raise InvalidArgumentError(field="max_model_len", value=length, allowed=allowed)
    return length


def resolve_batch_invariant(options: RunnerOptions) -> bool:
    """Returns whether steps are batch invariant."""
    invariant = options.batch_invariant
    if not (invariant is None or isinstance(invariant, bool)):
        raise InvalidArgumentError(
            field="batch_invariant", value=invariant, allowed="None, True or False"
        )
    return envs.BATCH_INVARIANT.get() if invariant is None else invariant


def wire_model(
    config: ModelConfig,
    dtype: str,
    *,
    fusion: bool | None = None,
    max_model_len: int | None = None,
    shard: Shard | None = None,
    wide_sums: bool = False,
) -> _core.Program:
    """Wires the program of a model.

    Args:
        config: The model's; its model_type chooses the wiring.
        dtype: "float32" or "bfloat16".
        fusion: Whether the fusion pass runs; None asks MRV1_FUSION.
        max_model_len: Tokens that a sequence may have; the model's own limit if None.
        shard: As `Builder`.
        wide_sums: As `Builder`.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(field="model_type", value=config.model_type, allowed=", ".join(FAMILIES))
    builder = Builder(dtype, shard=shard, wide_sums=wide_sums, quantization=config.quantization)
    limit = config.max_position_embeddings if max_model_len is None else max_model_len
    family.wire(builder, config.for_length(limit))
    if _resolve_fusion(fusion):
        builder.program.fuse()
    return builder.program


def _resolve_fusion(fusion: bool | None) -> bool:
    if not (fusion is None or isinstance(fusion, bool)):
        raise InvalidArgumentError(field="fusion", value=fusion, allowed="None, True or False")
    return envs.FUSION.get() if fusion is None else fusion


@dataclasses.dataclass(frozen=True)
class WiredRanks:
    """The programs of all ranks.

    Attributes:
        programs: By rank, those of the first stage first.
        stages: Of each stage of a pipeline its first layer, and the one behind its last.
        data_parallel: Whether each rank has requests of its own.
    """

    programs: tuple[_core.Program, ...]
    stages: tuple[tuple[int, int], ...]
    data_parallel: bool = False

    def stage_of(self, rank: int) -> int:
        """The stage that a rank is in."""
        return rank // self.ranks_per_stage

    def name(self, rank: int) -> str:
        """How a sentence about a rank begins; not at all where there is one."""
        if len(self.programs) == 1:
            return ""
        where = f" (stage {self.stage_of(rank)})" if len(self.stages) > 1 else ""
        return f"rank {rank}{where}: "

    @property
    def ranks_per_stage(self) -> int:
        """Ranks that compute each layer together."""
        return len(self.programs) // len(self.stages)


def wire_ranks(config: ModelConfig, dtype: str, options: RunnerOptions) -> WiredRanks:
    """Wires the program of each rank.

    Raises:
        InvalidArgumentError: The model cannot be shared out among so many ranks, or an option does
            not go with several.
    """
    parallel.check_options(options)
    data, tensor = options.data_parallel_size, options.tensor_parallel_size
    invariant = resolve_batch_invariant(options)
    parallel.check_sizes(
        config, tensor, batch_invariant=invariant, expert_parallel=options.expert_parallel
    )
    size = max(data, tensor)
    if options.expert_parallel:
        parallel.check_experts(config, size, batch_invariant=invariant)
    # Of every layer, and cut before they are fused.
    wholes = [
        wire_model(
            config,
            dtype,
            fusion=False,
            max_model_len=resolve_max_model_len(options, config),
            shard=Shard(rank, size, options.expert_parallel, data > 1),
            wide_sums=invariant,
        )
        for rank in range(size)
    ]
    stages = parallel.stage_ranges(
        wholes[0], options.pipeline_parallel_size, options.pipeline_layers
    )
    if len(stages) == 1:
        programs = wholes
    else:
        programs = [whole.stage(first, last) for first, last in stages for whole in wholes]
    if _resolve_fusion(options.fusion):
        for program in programs:
            program.fuse()
    return WiredRanks(tuple(programs), tuple(stages), data > 1)


def load_model(
    directory: str | os.PathLike[str], options: RunnerOptions, *, progress: bool | None = None
) -> LoadedModel:
    """Reads a Hugging Face model directory into a runner.

    Args:
        directory: With config.json and safetensors; generation_config.json if there is one.
        options: Sizes and choices.
        progress: Whether to show a progress bar; None shows it on a terminal.

    Raises:
        InvalidArgumentError: `directory` is no path, or an option or a variable of the environment
            holds what is not allowed.
        ConfigError: config.json is missing, damaged or asks for something not supported.
        WeightError: Weight files are missing, damaged or do not fit the config.
        OutOfMemoryError: Memory for weights, buffers or one KV block is missing.
        DeviceError: No such device.
    """
    level = envs.LOG_LEVEL.get()
    if level is not None:
        _LOG.setLevel(level)
    is_shown(progress)  # refused here, before anything is read, if at all
    root = model_root(directory)
    start = time.perf_counter()
    config = ModelConfig.from_dir(root)
    tensors = read_checkpoint(root)
    dtype = resolve_dtype(options.dtype, config)
    ranks = wire_ranks(config, dtype, options)
    sources = match_tensors(ranks.programs, tensors, config)
    kv_scales: KvScales = []
    if resolve_kv_cache_dtype(options.kv_cache_dtype) != "auto":
        heads = [config.num_key_value_heads] * config.num_hidden_layers
        kv_scales = read_kv_scales(tensors, heads, FAMILIES[config.model_type].other_tensors)
    startup = {"read headers and wire": time.perf_counter() - start}

    model = make_runner(config, ranks, dtype, options, startup, kv_scales)
    start = time.perf_counter()
    total = sum(source.nbytes for own in sources for source in own)
    _load_weights(model.runner, sources, total, progress)
    startup["load weights"] = time.perf_counter() - start
    model.startup_bytes["load weights"] = total
    capture_graphs(model)
    _LOG.info(
        "%s on %s in %s, KV cache of %d blocks of %d tokens (%s): %s\n%s",
        root,
        model.device.name,
        dtype,
        model.num_kv_blocks,
        model.block_size,
        _describe_cache(model),
        _describe_memory(model, ranks),
        format_phases(startup, model.startup_bytes),
    )
    return model


def _describe_memory(model: LoadedModel, ranks: WiredRanks) -> str:
    """What each part of the memory takes, a line for each stage of a pipeline."""
    size = ranks.ranks_per_stage
    lines = []
    for stage, plan in enumerate(model.runner.memory_plans[::size]):
        first, last = ranks.stages[stage]
        where = (
            f"\n  stage {stage}, layers {first} to {last - 1}: " if len(ranks.stages) > 1 else ""
        )
        each = f"of each of {size} ranks " if size > 1 else ""
        experts = f" (experts {plan['experts'] / 1e6:.0f} MB)" if plan["experts"] else ""
        lines.append(
            f"{where}{each}weights {plan['weights'] / 1e6:.0f} MB{experts}, activations "
            f"{plan['activations'] / 1e6:.0f} MB{_describe_halves(plan)}, state "
            f"{plan['state'] / 1e6:.0f} MB, KV cache "
            f"{plan['per_block'] * model.num_kv_blocks / 1e6:.0f} MB"
        )
    return "".join(lines)


def _describe_halves(plan: dict[str, int]) -> str:
    halves = plan["two_batch"]
    return f", halves of steps {halves / 1e6:.0f} MB" if halves > 0 else ""


def _describe_cache(model: LoadedModel) -> str:
    if model.kv_cache_dtype == "auto":
        return model.dtype
    return f"{model.kv_cache_dtype}, {model.kv_scales} scales"


def capture_graphs(model: LoadedModel) -> None:
    """Records the step's graphs, once weights are loaded; adds the time to `startup`."""
    start = time.perf_counter()
    full, piecewise, size = model.runner.capture_graphs()
    if full + piecewise > 0:
        model.startup["capture graphs"] = time.perf_counter() - start
        model.startup_bytes["capture graphs"] = size
        _LOG.info(
            "captured %d sizes as one graph and %d in pieces: %.1f MB", full, piecewise, size / 1e6
        )


def make_runner(
    config: ModelConfig,
    ranks: WiredRanks,
    dtype: str,
    options: RunnerOptions,
    startup: dict[str, float],
    kv_scales: KvScales = (),
) -> LoadedModel:
    """Resolves the sizes and allocates a runner for programs; weights are still to be set.

    `kv_scales` are static scales of an FP8 cache, of all layers and heads; without them each token
    and head has its own.
    """
    start = time.perf_counter()
    kind = resolve_device(options.device)
    threads = envs.NUM_THREADS.get() if options.num_threads is None else options.num_threads
    threads = _integer("num_threads", threads or 0, 0, envs.MAX_THREADS)
    devices = _open_devices(kind, len(ranks.programs), threads, options.stream)
    startup["open device"] = time.perf_counter() - start
    start = time.perf_counter()
    native = _core.RunnerConfig()
    default_seqs = 64 if kind == "cpu" else 256
    native.max_num_seqs = _positive("max_num_seqs", options.max_num_seqs, default_seqs)
    default_tokens = max(512 if kind == "cpu" else 8192, native.max_num_seqs)
    native.max_num_batched_tokens = _positive(
        "max_num_batched_tokens", options.max_num_batched_tokens, default_tokens
    )
    if options.max_tokens_per_rank is not None:
        most = _integer(
            "max_tokens_per_rank", options.max_tokens_per_rank, native.max_num_seqs, MAX_INT32
        )
        native.max_num_batched_tokens = min(native.max_num_batched_tokens, most)
    native.max_model_len = resolve_max_model_len(options, config)
    native.block_size = _positive("block_size", options.block_size, RunnerOptions.block_size)
    native.kv_cache_dtype = resolve_kv_cache_dtype(options.kv_cache_dtype)
    native.num_ranks, native.num_stages = len(ranks.programs), len(ranks.stages)
    native.data_parallel = ranks.data_parallel
    native.collectives = envs.COLLECTIVES.get()
    if kind == "cuda" and native.num_ranks > 1:
        native.nccl = _libraries.nccl_names()
    native.pad_requests = _integer("pad_requests", options.pad_requests, 0, native.max_num_seqs)
    native.pad_tokens = _integer("pad_tokens", options.pad_tokens, 0, native.max_num_batched_tokens)
    for field in ("infer_param_view", "keep_hidden_states", "force_tokens"):
        flag = getattr(options, field)
        if not isinstance(flag, bool):
            raise InvalidArgumentError(field=field, value=flag, allowed="True or False")
        setattr(native, field, flag)
    speculation = NgramConfig.from_options(options.speculative_config)
    if speculation is not None:
        native.num_speculative_tokens = speculation.num_speculative_tokens
        native.ngram = (speculation.prompt_lookup_min, speculation.prompt_lookup_max)
    asked = _integer("max_logprobs", options.max_logprobs, WHOLE_VOCABULARY, MAX_INT32)
    native.max_logprobs = (
        config.vocab_size if asked == WHOLE_VOCABULARY else min(asked, config.vocab_size)
    )
    _set_graphs(native, kind, options)
    backend = _choice(
        "attention_backend", options.attention_backend, envs.ATTENTION_BACKEND, _BACKENDS
    )
    native.attention_backend = _BACKENDS[backend]
    native.batch_invariant = resolve_batch_invariant(options)
    halves = envs.USE_TBO.get()
    native.two_batch = (
        # Nothing was found yet that it gains where tokens travel to experts.
        _TWO_BATCH_MODES["0" if halves == "auto" and ranks.data_parallel else halves],
        envs.TBO_MIN_PREFILL_TOKENS.get(),
        envs.TBO_MIN_DECODE_TOKENS.get(),
        envs.TBO_PROCESSORS.get(),
    )
    configs = [_of_rank(native, kv_scales, ranks, rank) for rank in range(native.num_ranks)]
    native.num_blocks = _num_blocks(ranks, configs, devices, options)
    if options.max_model_len is None:
        native.max_model_len = min(
            native.max_model_len, (native.num_blocks - 1) * native.block_size
        )
    for each in configs:
        each.num_blocks, each.max_model_len = native.num_blocks, native.max_model_len
    runner = _core.ModelRunner(devices, ranks.programs, configs)
    if runner.ranks_note:
        _LOG.warning("%s", runner.ranks_note)
    others = [
        runner.rank(rank) for rank in range(1, native.num_ranks if ranks.data_parallel else 1)
    ]
    startup["allocate"] = time.perf_counter() - start
    allocated = sum(
        plan["weights"]
        + plan["activations"]
        + plan["two_batch"]
        + plan["state"]
        + plan["per_block"] * native.num_blocks
        for plan in runner.memory_plans
    )
    return LoadedModel(
        config=config,
        device=devices[-ranks.ranks_per_stage],
        devices=tuple(devices),
        runner=runner,
        dtype=dtype,
        max_num_seqs=native.max_num_seqs,
        max_num_batched_tokens=native.max_num_batched_tokens,
        max_model_len=native.max_model_len,
        block_size=native.block_size,
        kv_cache_dtype=native.kv_cache_dtype,
        kv_scales=_kind_of_scales(configs[0]),
        num_kv_blocks=native.num_blocks,
        num_speculative_tokens=native.num_speculative_tokens,
        max_logprobs=native.max_logprobs,
        pipeline_layers=tuple(last - first for first, last in ranks.stages),
        expert_parallel=options.expert_parallel,
        data_runners=(runner, *others),
        startup=startup,
        startup_bytes={"allocate": allocated},
    )


def _open_devices(kind: str, count: int, threads: int, stream: Stream) -> list[_core.Device]:
    """A device for each rank; CPU ranks share the threads out."""
    if kind == "cpu" and count > 1:
        threads = max(1, (threads or len(os.sched_getaffinity(0))) // count)
    with contextlib.ExitStack() as opened:
        devices = []
        for rank in range(count):
            device = tuning.make_device(kind, num_threads=threads, ordinal=rank, stream=stream)
            opened.callback(device.close)
            devices.append(device)
        opened.pop_all()
    return devices


def _of_rank(
    native: _core.RunnerConfig, kv_scales: KvScales, ranks: WiredRanks, rank: int
) -> _core.RunnerConfig:
    """The configuration of a rank, with the scales of its own layers and key/value heads."""
    size = ranks.ranks_per_stage
    first_layer, last_layer = ranks.stages[ranks.stage_of(rank)]

    def own(scales: list[float]) -> list[float]:
        if len(scales) == 1:
            return scales
        shard = Shard(rank % size, size, data_parallel=ranks.data_parallel)
        first, count = shard.cut(len(scales))
        return scales[first : first + count]

    config = _core.RunnerConfig(native)
    config.kv_scales = [
        (own(keys), own(values)) for keys, values in kv_scales[first_layer:last_layer]
    ]
    return config


def _kind_of_scales(native: _core.RunnerConfig) -> str:
    if native.kv_cache_dtype == "auto":
        return "none"
    return "static" if native.kv_scales else "dynamic"


def _choice(
    field: str, value: str | None, variable: envs.EnvVar[str], choices: Mapping[str, object]
) -> str:
    chosen = variable.get() if value is None else value
    if not isinstance(chosen, str) or chosen not in choices:
        raise InvalidArgumentError(field=field, value=value, allowed=" or ".join(choices))
    return chosen


def _set_graphs(native: _core.RunnerConfig, kind: str, options: RunnerOptions) -> None:
    """Resolves how steps reach the device, and the sizes that are captured."""
    chosen = _choice("graph_mode", options.graph_mode, envs.GRAPH_MODE, _GRAPH_MODES)
    native.sync_launches = envs.SYNC.get()
    if chosen == "auto":
        chosen = "full" if kind == "cuda" else "eager"
    # A graph cannot wait between its kernels.
    mode = _core.StepMode.EAGER if native.sync_launches else _GRAPH_MODES[chosen]
    native.graph_mode = mode
    sizes = options.capture_sizes
    if sizes is None:
        captures = mode == _core.StepMode.FULL
        requests = _core.default_capture_requests(native.max_num_seqs) if captures else []
        native.capture_sizes = _decode_sizes(native, requests)
    else:
        _check_sequence("capture_sizes", sizes)
        native.capture_sizes = [
            pair
            for place, size in enumerate(sizes)
            for pair in _capture_size(native, f"capture_sizes[{place}]", size)
        ]
    tokens = options.piecewise_sizes
    if tokens is None:
        pieces = mode != _core.StepMode.EAGER
        native.piecewise_sizes = (
            _core.default_piecewise_sizes(native.max_num_batched_tokens) if pieces else []
        )
    else:
        _check_sequence("piecewise_sizes", tokens)
        native.piecewise_sizes = [
            _positive(f"piecewise_sizes[{place}]", size, 0) for place, size in enumerate(tokens)
        ]


def _check_sequence(field: str, value: object) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidArgumentError(field=field, value=value, allowed="a list of sizes")


def _decode_sizes(native: _core.RunnerConfig, requests: list[int]) -> list[tuple[int, int]]:
    return _core.capture_sizes(
        requests, native.num_speculative_tokens, native.max_num_batched_tokens
    )


def _capture_size(
    native: _core.RunnerConfig, field: str, size: int | tuple[int, int]
) -> list[tuple[int, int]]:
    if not isinstance(size, tuple):
        return _decode_sizes(native, [_positive(field, size, 0)])
    if len(size) != 2:
        raise InvalidArgumentError(
            field=field, value=size, allowed="a number of requests or a pair (requests, tokens)"
        )
    return [(_positive(field, size[0], 0), _positive(field, size[1], 0))]


def _integer(field: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidArgumentError(
            field=field, value=value, allowed=f"an integer in [{low}, {high}]"
        )
    return value


def _positive(field: str, value: int | None, default: int) -> int:
    return _integer(field, default if value is None else value, 1, MAX_INT32)


def _num_blocks(
    ranks: WiredRanks,
    configs: Sequence[_core.RunnerConfig],
    devices: Sequence[_core.Device],
    options: RunnerOptions,
) -> int:
    """KV blocks, the null block included, from what the options say or from free memory.

    All ranks have as many: what fits the one with least room for them.
    """
    budget = options.kv_cache_memory
    if budget is not None and (
        isinstance(budget, bool) or not isinstance(budget, int) or budget < 0
    ):
        raise InvalidArgumentError(
            field="kv_cache_memory", value=budget, allowed="a number of bytes, at least 0"
        )
    share = options.gpu_memory_utilization
    if share is not None and (
        isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1
    ):
        raise InvalidArgumentError(
            field="gpu_memory_utilization", value=share, allowed="a number in (0, 1]"
        )
    if options.num_kv_blocks is not None:
        blocks = _positive("num_kv_blocks", options.num_kv_blocks, 0)
        if blocks < 2:
            raise InvalidArgumentError(
                field="num_kv_blocks", value=blocks, allowed="at least 2 (block 0 is never used)"
            )
        return blocks
    plans = [
        _core.ModelRunner.plan_memory(*each)
        for each in zip(ranks.programs, configs, devices, strict=True)
    ]
    memory = [device.memory() for device in devices]
    if devices[0].kind == "cpu":  # they share the host's
        memory = [(free // len(devices), total) for free, total in memory]
    native = configs[0]
    usable = min(
        _usable_blocks(ranks.name(rank), plan, *free, native, devices[0].kind, budget, share)
        for rank, (plan, free) in enumerate(zip(plans, memory, strict=True))
    )
    per_request = -(-native.max_model_len // native.block_size)
    most = min(native.max_num_seqs * per_request, 2**31 // native.block_size - 2)
    return int(min(usable, most)) + 1


def _usable_blocks(
    name: str,
    plan: dict[str, int],
    free: int,
    total: int,
    native: _core.RunnerConfig,
    kind: str,
    budget: int | None,
    share: float | None,
) -> int:
    """KV blocks beside the null block that a rank has room for, by its plan of memory."""
    others = plan["weights"] + plan["activations"] + plan["two_batch"] + plan["state"]
    needs = (
        f"weights {plan['weights'] / 1e6:.0f} MB, activations "
        f"{plan['activations'] / 1e6:.0f} MB{_describe_halves(plan)}, "
        f"state {plan['state'] / 1e6:.0f} MB"
    )
    if others > free:
        raise OutOfMemoryError(
            f"{name}{needs} need more than the {free / 1e6:.0f} MB that are free; activations grow "
            f"with max_num_batched_tokens = {native.max_num_batched_tokens}, state with "
            f"max_num_seqs = {native.max_num_seqs} and max_model_len = {native.max_model_len}"
        )
    if budget is None and kind == "cuda":
        graphs = len(native.capture_sizes) + len(native.piecewise_sizes)
        reserve = graphs * _GRAPH_BYTES + _LIBRARY_BYTES
        allowed = (_GPU_SHARE if share is None else share) * total
        budget = int(max(0, allowed - (total - free) - others - reserve))
    elif budget is None:
        budget = int(max(0, free - others) * _KV_SHARE)
    per_block = plan["per_block"]
    usable = budget // per_block - 1
    if usable < 1:
        raise OutOfMemoryError(
            f"{name}the KV cache may take {budget / 1e6:.1f} MB, but the null block and one block "
            f"of {native.block_size} tokens need {2 * per_block / 1e6:.1f} MB "
            f"({free / 1e6:.0f} MB are free; {needs})"
        )
    return usable


@dataclasses.dataclass(frozen=True)
class _Source:
    """The tensor that a segment of a rank's weight is read from."""

    weight: int
    segment: int
    info: TensorInfo
    kind: str
    """Dtype, or what of an NVFP4 matrix it is, as the native loader names them."""
    nbytes: int
    """Of what the rank reads."""


def match_tensors(
    programs: Sequence[_core.Program], tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> list[list[_Source]]:
    """Pairs every segment of every weight of each rank with its tensor.

    Raises WeightError where a tensor is missing, has another shape or dtype, or is left over.
    """
    used: set[str] = set()
    sources = [_match_rank(program, tensors, used) for program in programs]
    for name, info in tensors.items():
        # The first two are computed, or shared, here; checkpoints may carry them all the same.
        # Scales of an FP8 cache are read apart.
        harmless = (
            name.endswith("rotary_emb.inv_freq")
            or (name.endswith("lm_head.weight") and config.tie_word_embeddings)
            or name.startswith(FAMILIES[config.model_type].other_tensors)
            or is_kv_scale(name)
        )
        if name not in used and not harmless:
            raise WeightError(
                "config and weights disagree: nothing in the model uses it",
                path=info.path,
                tensor=name,
            )
    return sources


def _match_rank(
    program: _core.Program, tensors: Mapping[str, TensorInfo], used: set[str]
) -> list[_Source]:
    sources = []
    slices = program.weight_slices
    is_nvfp4 = program.weight_is_nvfp4
    for weight, (_, is_vector, own_cols, segments) in enumerate(program.weights):
        for segment, (name, own_rows) in enumerate(segments):
            rows, _, cols, _ = slices[weight][segment]
            _check_stored(tensors, name, is_nvfp4[weight])
            if not is_nvfp4[weight]:
                # A vector may be stored as the one row of a matrix.
                shapes = [(rows,), (1, rows)] if is_vector else [(rows, cols)]
                info = _find(tensors, name, shapes, tuple(LOADABLE))
                nbytes = own_rows * own_cols * (info.nbytes // max(rows * cols, 1))
                sources.append(_Source(weight, segment, info, LOADABLE[info.dtype], nbytes))
                used.add(name)
                continue
            for kind, tensor in nvfp4_tensors(name).items():
                dtype, unit = _NVFP4_FORMS[kind]
                forms = [(rows, cols // unit)] if unit else [(), (1,)]
                info = _find(tensors, tensor, forms, (dtype,))
                nbytes = own_rows * own_cols // unit if unit else info.nbytes
                sources.append(_Source(weight, segment, info, kind, nbytes))
                used.add(tensor)
    return sources


def _check_stored(tensors: Mapping[str, TensorInfo], name: str, is_nvfp4: bool) -> None:
    """Refuses a matrix that is quantised where the config says that it is not, or the reverse."""
    info = tensors.get(name)
    if info is None or is_nvfp4 == (nvfp4_tensors(name)["nvfp4_block_scales"] in tensors):
        return
    if is_nvfp4 and info.dtype in LOADABLE:
        raise WeightError(
            "is not quantised, and exclude_modules (ignore in config.json) does not name it",
            path=info.path,
            tensor=name,
        )
    if not is_nvfp4 and info.dtype not in LOADABLE:
        raise WeightError(
            "is quantised, and the config says that it is not", path=info.path, tensor=name
        )


def _find(
    tensors: Mapping[str, TensorInfo],
    name: str,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
) -> TensorInfo:
    """Returns a tensor of one of the shapes and dtypes."""
    info = tensors.get(name)
    if info is None:
        raise WeightError("is missing from the checkpoint", tensor=name)
    if info.shape not in shapes:
        raise WeightError(
            "config and weights disagree",
            path=info.path,
            tensor=name,
            field="shape",
            value=list(info.shape),
            allowed=f"{' or '.join(str(list(shape)) for shape in shapes)} by config.json",
        )
    if info.dtype not in dtypes:
        raise WeightError(
            path=info.path,
            tensor=name,
            field="dtype",
            value=info.dtype,
            allowed=", ".join(dtypes),
        )
    return info


def _load_weights(
    runner: _core.ModelRunner,
    sources: Sequence[Sequence[_Source]],
    total: int,
    progress: bool | None,
) -> None:
    # By place in the files, so that each is read once from front to back.
    paths = sorted({str(source.info.path) for own in sources for source in own})
    with progress_bar("Loading weights", total, unit="B", show=progress) as advance:
        for path in paths:
            tensors = [
                [
                    (source.weight, source.segment, source.info.offset, source.kind)
                    for source in sorted(own, key=lambda source: source.info.offset)
                    if str(source.info.path) == path
                ]
                for own in sources
            ]
            runner.load_tensors(_core.MappedFile(path), tensors, advance)
    runner.check_weights()
