# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The figure `profile`: where the time of a decode step on a GPU goes, op by op.

CUPTI gives the kernels of replayed steps. Which op a kernel belongs to follows from its place: the
kernels of a step come in the order of the program's ops, and a kernel's name tells its kind. A
kernel of no kind that is known (the end of a split product, a merge) belongs to the op before it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Final

from mrv1 import _core
from mrv1._cupti import Kernel, KernelTrace, short_name
from mrv1.bench import OpCost, Rates, Timing, floor_ms, format_columns
from mrv1.bench_decode import DecodeRun
from mrv1.errors import InternalError
from mrv1.llm import peak_memory_mb
from mrv1.loader import LoadedModel

# The first pattern that a kernel's short name matches is its kind.
_KINDS: Final = (
    ("apply", r"^apply"),
    ("infer_params", r"^infer"),
    ("plan_attention", r"plan"),
    ("sample", r"^sample|^scan_kernel|^no_tokens"),
    ("advance", r"^advance"),
    ("all_reduce", r"^one_shot|^two_shot|^meeting|AllReduce"),
    ("all_gather", r"^gather_packets|^gather_bulk|AllGather"),
    ("embedding", r"embedding"),
    ("norm", r"rms_norm"),
    ("qkv_prepare", r"qkv_prepare|^cache_"),
    ("attention", r"attention|^dead_rows|(Prefill|Decode)With"),
    ("gather_rows", r"gather_rows"),
    ("moe_route", r"^route"),
    ("moe_dispatch", r"^moe_dispatch"),
    ("moe_combine", r"^moe_combine|SendRecv"),
    ("moe_experts", r"^moe_|^(count|place|sum|down_few)_kernel"),
    ("linear", r"linear|mma_kernel|gemm|gemv|nvjet|cutlass|xmma|cublas"),
    ("gated_mul", r"gated"),
    ("soft_cap", r"soft_cap"),
    ("add", r"^add_"),
)
# Kinds of the program's ops, by name.
_OP_KINDS: Final = {
    "embedding": "embedding",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "add": "add",
    "linear": "linear",
    "linear_silu_mul": "linear",
    "linear_gelu_mul": "linear",
    "silu_mul": "gated_mul",
    "gelu_mul": "gated_mul",
    "soft_cap": "soft_cap",
    "qk_norm": "qkv_prepare",
    "rope": "qkv_prepare",
    "cache_write": "qkv_prepare",
    "qkv_prepare": "qkv_prepare",
    "paged_attention": "attention",
    "gather_rows": "gather_rows",
    "moe_route": "moe_route",
    "moe_experts": "moe_experts",
}
_FRONT: Final = ("apply", "infer_params", "plan_attention")
_BACK: Final = ("sample", "advance")
# Ops in a row that may have no kernel of their own.
_MAX_SKIPPED: Final = 3


@dataclasses.dataclass(frozen=True)
class StepOp:
    """An op or a phase of a step, as the table names it, and the kind of its kernels."""

    label: str
    kind: str


@dataclasses.dataclass
class OpTime:
    """What an op took in a step, all its places in the program together; microseconds.

    Attributes:
        label: Of the op.
        kernels: How many it launched.
        busy_us: Sum of its kernels' durations. Kernels of a step overlap: one may begin, and wait,
            while the one before it still runs.
        own_us: From the end of what came before it to its own end. These add up to the step.
        names: Of its kernels, and how many.
    """

    label: str
    kernels: float = 0.0
    busy_us: float = 0.0
    own_us: float = 0.0
    names: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Steps, taken apart. Times are means of a step, in microseconds.

    Attributes:
        ops: In the order of their first kernels.
        steps: How many were traced.
        span_us: From the first kernel's begin to the last one's end.
        gaps_us: Of this, when no kernel ran.
        between_us: From the end of a step to the begin of the next.
        plain_ms: Time of a step without tracing, which lengthens it.
    """

    ops: list[OpTime]
    steps: int
    span_us: float
    gaps_us: float
    between_us: float
    plain_ms: float


def kernel_kind(name: str) -> str | None:
    """Kind of a kernel by its short name, or None."""
    for kind, pattern in _KINDS:
        if re.search(pattern, name):
            return kind
    return None


def kernel_kinds(names: Sequence[str]) -> list[str | None]:
    """Kinds of a step's kernels, in order.

    One kernel multiplies NVFP4 weights of linears and, behind a router or other kernels of experts,
    those of experts. NCCL's kernel of messages carries tokens behind `moe_dispatch`, else their
    sums. A meeting of ranks is part of the collective that it precedes.
    """
    kinds: list[str | None] = []
    for name in names:
        kind = kernel_kind(name)
        if name.startswith("fp4_stream"):
            of_experts = bool(kinds) and kinds[-1] in ("moe_route", "moe_experts")
            kind = "moe_experts" if of_experts else "linear"
        elif name.startswith("meeting") or "SendRecv" in name:
            kind = "moe_dispatch" if kinds[-1:] == ["moe_dispatch"] else kind
        kinds.append(kind)
    for place in range(len(names) - 1):
        if names[place].startswith("meeting"):
            kinds[place] = kinds[place + 1]
    return kinds


def weight_label(name: str) -> str:
    """What tables call a weight: "qkv_proj" for the three that are stacked."""
    parts = [part.removesuffix(".weight").rsplit(".", 1)[-1] for part in name.split("+")]
    stems = [part.removesuffix("_proj") for part in parts]
    if len(parts) == 1:
        return parts[0]
    return ("" if all(len(stem) == 1 for stem in stems) else "_").join(stems) + "_proj"


def step_ops(program: _core.Program) -> list[StepOp]:
    """The phases of a step and the ops of its program, in order."""
    weights = [
        weight_label(name)
        for index, (name, is_vector, _, _) in enumerate(program.weights)
        if not is_vector
        and not program.is_expert_weight(index)
        and "embed_tokens" not in name
        and name != "lm_head.weight"
    ]
    names = [
        part
        for name in program.op_names
        for part in (("linear", "moe_route") if name == "router" else (name,))
    ]
    linears = [name for name in names if _OP_KINDS.get(name) == "linear"]
    # The head is the last, tied or not.
    if len(linears) != len(weights) + 1:
        raise InternalError(f"{len(linears)} products but {len(weights)} weights and a head")
    labels = iter([*weights, "logits"])
    ops = [StepOp(name, name) for name in _FRONT]
    for name in names:
        kind = _OP_KINDS.get(name, name)
        ops.append(StepOp(next(labels) if kind == "linear" else kind, kind))
    return ops + [StepOp(name, name) for name in _BACK]


def assign(ops: Sequence[StepOp], names: Sequence[str]) -> list[str]:
    """The label of the op that each kernel of a step belongs to.

    Where a run of ops of one kind has a number of kernels that cannot be divided among them, they
    share one label.

    Args:
        ops: Of the step, in order.
        names: Short names of its kernels, in order.
    """
    labels: list[str] = []
    op_runs = _runs([op.kind for op in ops])
    place = -1
    kinds = kernel_kinds(names)
    for begin, end in _kernel_runs(kinds):
        kind = kinds[begin]
        following = range(place + 1, min(place + 2 + _MAX_SKIPPED, len(op_runs)))
        found = next((run for run in following if ops[op_runs[run][0]].kind == kind), None)
        if found is None:
            # Part of the op before it, or of something that is not in the program.
            labels += [labels[-1] if labels else "other"] * (end - begin)
            continue
        place = found
        first, last = op_runs[found]
        labels += _divide([op.label for op in ops[first:last]], kinds[begin:end])
    return labels


def _runs(kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Where one kind follows itself: (begin, end) of each run."""
    bounds = [0] + [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]] + [len(kinds)]
    return [(begin, end) for begin, end in itertools.pairwise(bounds) if begin < end]


def _kernel_runs(kinds: Sequence[str | None]) -> list[tuple[int, int]]:
    """The same for kernels, where those of no kind go on with the run before them."""
    filled: list[str] = []
    for kind in kinds:
        filled.append(kind if kind is not None else (filled[-1] if filled else "other"))
    return _runs(filled)


def _divide(labels: Sequence[str], kinds: Sequence[str | None]) -> list[str]:
    """Divides a run of kernels among the ops of a run."""
    heads = [place for place, kind in enumerate(kinds) if kind is not None]
    if len(heads) % len(labels) != 0:
        return [" + ".join(labels)] * len(kinds)
    each = len(heads) // len(labels)
    starts = heads[::each]
    return [labels[sum(place >= start for start in starts) - 1] for place in range(len(kinds))]


def take_apart(ops: Sequence[StepOp], kernels: Sequence[Kernel], plain_ms: float) -> Profile:
    """Sorts the kernels of traced steps, one graph launch each, by op.

    Raises:
        InternalError: There is no graph launch among them.
    """
    launches: dict[int, list[Kernel]] = collections.defaultdict(list)
    for kernel in kernels:
        if kernel.graph != 0:
            launches[kernel.launch].append(kernel)
    steps = sorted(launches.values(), key=lambda step: min(kernel.start for kernel in step))
    if not steps:
        raise InternalError("no step ran as a graph while kernels were traced")
    times: dict[str, OpTime] = {}
    spans, gaps, between = [], [], []
    names: dict[str, str] = {}
    previous_end: int | None = None
    for step in steps:
        # Nodes are numbered in the order of capture.
        step.sort(key=lambda kernel: kernel.node)
        short = [names.setdefault(kernel.name, short_name(kernel.name)) for kernel in step]
        begin = min(kernel.start for kernel in step)
        reached = begin
        covered = 0
        for kernel, name, label in zip(step, short, assign(ops, short), strict=True):
            time = times.setdefault(label, OpTime(label))
            time.kernels += 1
            time.busy_us += (kernel.end - kernel.start) / 1e3
            time.own_us += max(0, kernel.end - reached) / 1e3
            time.names[name] += 1
            covered += max(0, kernel.end - max(reached, kernel.start))
            reached = max(reached, kernel.end)
        spans.append(reached - begin)
        gaps.append(reached - begin - covered)
        if previous_end is not None:
            between.append(begin - previous_end)
        previous_end = reached
    count = len(steps)
    for time in times.values():
        time.kernels /= count
        time.busy_us /= count
        time.own_us /= count
    return Profile(
        ops=list(times.values()),
        steps=count,
        span_us=statistics.mean(spans) / 1e3,
        gaps_us=statistics.mean(gaps) / 1e3,
        between_us=statistics.mean(between) / 1e3 if between else 0.0,
        plain_ms=plain_ms,
    )


def measure_profile(model: LoadedModel, batch: int, context: int, steps: int) -> Profile:
    """Traces decode steps of one batch size at one context length, on rank 0 of several.

    Args:
        model: Made with `decode_options`, on a GPU.
        batch: Rows.
        context: Tokens in each row's cache when the steps begin that are timed without tracing;
            those that are traced follow.
        steps: Of either kind.

    Raises:
        DeviceError: There is no CUPTI.
    """
    run = DecodeRun(model, batch, context)
    try:
        plain, _ = run.measure(steps)
        with KernelTrace() as trace:
            run.measure(steps)
            model.device.synchronize()
        if trace.dropped:
            raise InternalError(f"CUPTI had no room for {trace.dropped} records")
        own = [kernel for kernel in trace.kernels if kernel.device == model.device.ordinal]
        return take_apart(step_ops(model.runner.program), own, statistics.median(plain))
    finally:
        run.close()


def costs_by_label(costs: Sequence[OpCost]) -> dict[str, list[OpCost]]:
    """What the ops of each label must do, from `bench.decode_costs`."""
    found: dict[str, list[OpCost]] = collections.defaultdict(list)
    for cost in costs:
        label = weight_label(cost.name)
        if label in ("q_norm", "k_norm"):
            label = "qkv_prepare"
        elif label.endswith("norm"):
            label = "norm"
        found[label].append(cost)
    return dict(found)


def label_costs(label: str, costs: Mapping[str, list[OpCost]]) -> list[OpCost]:
    """The costs of a label, which may join several with " + "."""
    return [cost for part in label.split(" + ") for cost in costs.get(part, [])]


def op_timing(op: OpTime, batch: int, context: int) -> Timing:
    """An op's time of a step, to make a record of. An op that was hidden took the clock's grain."""
    return Timing(batch, context, max(op.own_us, 1e-3) / 1e3, None, peak_memory_mb())


def format_profile(profile: Profile, costs: Sequence[OpCost], rates: Rates) -> str:
    """A profile as a table for people."""
    by_label = costs_by_label(costs)
    titles = ["op", "kernels", "busy us", "own us", "share", "floor us", "x floor", "names"]
    columns: list[list[str]] = [[title] for title in titles]
    for op in profile.ops:
        floor_us = 1e3 * floor_ms(label_costs(op.label, by_label), rates)
        cells = [
            op.label,
            f"{op.kernels:g}",
            f"{op.busy_us:.1f}",
            f"{op.own_us:.1f}",
            f"{100 * op.own_us / profile.span_us:.1f} %",
            f"{floor_us:.1f}" if floor_us else "-",
            f"{op.own_us / floor_us:.2f}" if floor_us else "-",
            ", ".join(name for name, _ in op.names.most_common()),
        ]
        for column, cell in zip(columns, cells, strict=True):
            column.append(cell)
    lines = format_columns(columns[:-1], left=1)
    lines = [f"{line}  {name}" for line, name in zip(lines, columns[-1], strict=True)]
    total_us = 1e3 * floor_ms(costs, rates)
    lines.append(
        f"{profile.steps} steps: {profile.span_us:.1f} us a step traced, {profile.gaps_us:.1f} of "
        f"them without a kernel, {profile.between_us:.1f} between steps; "
        f"{1e3 * profile.plain_ms:.1f} us a step untraced; floor {total_us:.1f} us"
    )
    return "\n".join(lines)
