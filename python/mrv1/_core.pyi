"""Native core of mrv1: programs, state, the step and the engine."""

import collections
from collections.abc import Callable, Sequence
import enum
from typing import Annotated, Any, overload

import numpy
from numpy.typing import NDArray


class Device:
    """
    A compute device with one in-order stream.

    Args:
        kind: "cpu" or "cuda".
        num_threads: CPU threads; 0 takes the cores this process may use.
        ordinal: GPU number.
        stream: CUDA stream in which everything runs: an object with
            __cuda_stream__, which is kept alive, or a handle, which must
            outlive the device. None makes a stream.

    Raises:
        InvalidArgumentError: the stream is a default stream, which graphs
            cannot be captured from, or is of another GPU.
        DeviceError: no such device, or a build without CUDA.
    """

    def __init__(self, kind: str, num_threads: int = 0, ordinal: int = 0, stream: object = None) -> None: ...

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def num_threads(self) -> int: ...

    @property
    def ordinal(self) -> int: ...

    @property
    def stream(self) -> int:
        """Handle of the CUDA stream in which everything runs."""

    def __cuda_stream__(self) -> tuple[int, int]: ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""

    def synchronize(self) -> None: ...

    def configure_linear(self, *, libraries: Sequence[str], table_dirs: Sequence[str], use_library: bool = True, tune: bool = False) -> None:
        """
        Opens cuBLASLt and reads the tuning tables that linears are computed by, before the
        first step; without the call, the first linear opens what the loader finds. Does
        nothing on the CPU. mrv1.tuning has the arguments.

        Raises:
            InvalidArgumentError: a table is damaged.
            DeviceError: the library was not found; the message has every name tried.
        """

    def close(self) -> None: ...

def cuda_built() -> bool:
    """True if this build has a CUDA backend."""

def cuda_available() -> bool:
    """True if a driver and a GPU are there too."""

def cublaslt_describe(libraries: Sequence[str]) -> str:
    """
    Opens cuBLASLt, if it is not open yet; its version and the name it was found by.

    Raises:
        DeviceError: it was not found, or a build without CUDA.
    """

def cuda_describe() -> str:
    """One line on what was found of CUDA."""

def cpu_isa() -> str:
    """The instruction set the CPU kernels use here."""

class DeviceArray:
    """
    Memory that a device addresses, for libraries that take DLPack or the CUDA array interface.

    What they make of it keeps the memory alive, whoever else lets go of it.
    """

    def __dlpack__(self, *, stream: int | None = None, max_version: tuple[int, int] | None = None, dl_device: tuple[int, int] | None = None, copy: bool | None = None) -> object: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...

    @property
    def __cuda_array_interface__(self) -> dict[str, object]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """Name of the dtype, as NumPy or ml_dtypes gives it."""

    @property
    def nbytes(self) -> int: ...

    @property
    def ptr(self) -> int:
        """The address that kernels use."""

class PinnedMemory:
    """See mrv1.memory.PinnedArray."""

    def __init__(self, device: Device, nbytes: int) -> None: ...

    @property
    def nbytes(self) -> int: ...

    def host(self) -> NDArray[numpy.uint8]:
        """The bytes as the host sees them."""

    def device(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """The bytes as the device sees them."""

    def fence(self, stream: object = None) -> None:
        """
        The memory is in use until the work queued so far in the stream has ended.
        """

    def is_free(self) -> bool: ...

    def wait(self) -> None: ...

    def close(self) -> None: ...

class Program:
    """
    A model's forward pass: a flat list of native ops over values and weights.

    Values and weights are named by the index their maker returns. Building
    methods raise InvalidArgumentError naming the op when shapes or dtypes do
    not fit. mrv1.builder wraps this class for wiring models.
    """

    def __init__(self, dtype: str) -> None: ...

    def weight(self, name: str, is_vector: bool, cols: int, segments: Sequence[tuple[str, int]], offset: float = 0.0, slices: Sequence[tuple[int, int, int, int]] = (), whole_rows: int = 0, matrices: int = 1, nvfp4: bool = False) -> int:
        """
        Declares a weight [sum of segment rows, cols]; segments are (tensor name, rows).
        `offset` is added to the values of a vector when they are loaded. `slices` say for each
        segment which part of its tensor it is: (rows of the tensor, first row, columns of the
        tensor, first column); without them segments are whole tensors. `whole_rows`: of all
        ranks together, where they share it out by rows. `matrices`: the rows are those of as
        many equal matrices. `nvfp4`: a matrix whose segments are each stored as codes, block
        scales, a global scale and a scale of activations.
        """

    def input(self, name: str, cols: int, logits_rows: bool = False, dtype: str | None = None) -> int: ...

    def output(self, value: int) -> None: ...

    def embedding(self, table: int, scale: float = 1.0, first_row: int = 0) -> int:
        """
        `first_row` is the token id of the table's first row; ids without a row give zeros.
        """

    def rms_norm(self, x: int, weight: int, eps: float) -> int: ...

    def add(self, a: int, b: int) -> int: ...

    def linear(self, x: int, weight: int, bias: int = -1, residual: int = -1, row_parallel: bool = False, wide: bool = False) -> int:
        """With `wide` the result stays in float32."""

    def all_reduce(self, x: int, bias: int = -1) -> int:
        """The sum over the ranks (+ bias), in the program's dtype."""

    def silu_mul(self, x: int) -> int: ...

    def gelu_mul(self, x: int) -> int: ...

    def moe_route(self, logits: int, *, top_k: int, bias: int = -1, scores: str = 'softmax', renormalize: bool = True, min_sum: float = 0.0, scale: float = 1.0) -> tuple[int, int]:
        """
        The experts of each token, int32, and their weights, float32: [tokens, top_k].
        """

    def moe_experts(self, x: int, experts: int, weights: int, gate_up: int, down: int, *, activation: str = 'silu', first_expert: int = 0, num_experts: int = 0, row_parallel: bool = False, wide: bool = False) -> int:
        """
        The weighted sum of what the tokens' experts make of x, [tokens, cols]. `num_experts`:
        of all ranks, 0 for those of gate_up and the ones before them.
        """

    def moe_exchange(self, x: int, experts: int, weights: int, gate_up: int, down: int, *, activation: str = 'silu', first_expert: int = 0, wide: bool = False, num_experts: int, ranks: int) -> int:
        """
        As moe_experts, over ranks with tokens of their own: moe_dispatch sends each token to the
        ranks that have its experts, moe_combine brings the sums back and adds them, in float32
        with `wide`.
        """

    def rope_table(self, inv_freq: Sequence[float], factor: float = 1.0, interleaved: bool = False) -> int: ...

    def attention(self, qkv: int, *, num_heads: int, num_kv_heads: int, head_dim: int, kv_layer: int, scale: float, window: int = 0, rope: int = -1, q_norm: int = -1, k_norm: int = -1, eps: float = 0.0, softcap: float = 0.0) -> int: ...

    def gather_rows(self, x: int) -> int: ...

    def logits(self, x: int, weight: int, softcap: float = 0.0, ranks: int = 1) -> int:
        """With `ranks` the weight is a rank's part of the head."""

    def begin_layer(self, layer: int) -> None: ...

    def end_layer(self) -> None: ...

    def fuse(self) -> list[tuple[str, int]]:
        """
        Runs each fusion pattern once over the list; returns (pattern, how many it replaced).
        """

    def stage(self, first: int, last: int) -> Program:
        """
        The program of layers [first, last), a stage of a pipeline. Comes before fuse().
        """

    def dump(self, format: str = 'text') -> str:
        """The op list as text, or as a Graphviz picture with format="dot"."""

    @property
    def dtype(self) -> str: ...

    @property
    def op_names(self) -> list[str]: ...

    @property
    def weights(self) -> list[tuple[str, bool, int, list[tuple[str, int]]]]:
        """(name, is_vector, cols, [(tensor, rows)]) of each weight."""

    @property
    def weight_matrices(self) -> list[int]:
        """How many equal matrices the rows of each weight are."""

    def is_route_bias(self, weight: int) -> bool:
        """
        Whether the weight corrects the choice of experts: random models have zeros there.
        """

    def is_expert_weight(self, weight: int) -> bool:
        """Whether experts multiply by the weight, however many there are."""

    @property
    def weight_is_nvfp4(self) -> list[bool]:
        """Whether each weight is stored in NVFP4."""

    @property
    def weight_bytes(self) -> list[int]:
        """Bytes of each weight, scales included."""

    @property
    def weight_slices(self) -> list[list[tuple[int, int, int, int]]]:
        """
        (rows of the tensor, first row, columns of the tensor, first column) of each segment of
        each weight.
        """

    @property
    def kv_layout(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Window of each KV group (0: none), and (group, slot) of each kv layer."""

    @property
    def num_layers(self) -> int: ...

    @property
    def layer_costs(self) -> list[int]:
        """
        Bytes of weights that a step reads in each layer, in the last one with the output head.
        """

    @property
    def received(self) -> list[tuple[str, int, str]]:
        """
        (key, columns, dtype) of the values that a stage takes from the one before.
        """

    @property
    def sent(self) -> list[tuple[str, int, str]]:
        """(key, columns, dtype) of the values that a stage gives to the next."""

    @property
    def cuts(self) -> list[tuple[str, int]]:
        """(kind, op index) of each place where the list can be cut."""

    def plan(self, max_tokens: int, max_logits: int) -> tuple[int, list[int]]:
        """
        Bytes of the activation arena at these limits, and each value's offset in it.
        """

    def live_ranges(self, max_tokens: int, max_logits: int) -> list[tuple[int, int, int]]:
        """
        (op that writes it, last op that reads it, bytes) of each value; -1 for none.
        """

def balance_layers(costs: Sequence[int], num_stages: int) -> list[int]:
    """
    How many of the layers that cost so much each stage of a pipeline takes, so that the stage
    that costs most costs as little as can be.
    """

class AttentionBackend(enum.Enum):
    """Kernels of decode attention."""

    NATIVE = 0

    FLASHINFER = 1

class ProgramSession:
    """
    Runs a program over inputs, infer_params and a KV cache set by hand: for testing single ops
    and fused forms on either backend. Floats cross as float32.
    """

    def __init__(self, device: Device, program: Program, *, max_requests: int = 1, max_tokens: int = 1, max_logits: int = 1, num_blocks: int = 1, block_size: int = 16, max_blocks: int = 1, max_position: int = 1, kv_cache_dtype: str = 'auto', kv_scales: str = 'token') -> None:
        """
        Args of the KV cache:
            kv_cache_dtype: "auto" (the program's dtype), "fp8_e4m3" or "fp8_e5m2".
            kv_scales: of an FP8 cache, "token" (one for each token and head, which the cache
                write computes), "head" or "tensor" (set_cache_scales sets them; 1 at first).
        """

    @overload
    def load_weight(self, weight: int, values: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]) -> None:
        """Sets a weight: float32 [rows, cols], its segments one after the other."""

    @overload
    def load_weight(self, weight: int, values: object) -> None:
        """
        From an array with __dlpack__ in memory that the device addresses: float32, bfloat16 or
        float16 [rows, cols].

        Raises:
            InvalidArgumentError: no such weight, or an array of another dtype, size or device.
        """

    def load_nvfp4(self, weight: int, codes: Annotated[NDArray[numpy.uint8], dict(order='C', device='cpu', writable=False)], block_scales: Annotated[NDArray[numpy.uint8], dict(order='C', device='cpu', writable=False)], global_scales: Sequence[float], input_scales: Sequence[float]) -> None:
        """
        Sets an NVFP4 weight: uint8 [rows, cols / 2] of two codes each, the even column low,
        uint8 [rows, cols / 16] of E4M3, and for each segment a global scale and one of
        activations.
        """

    @overload
    def set_value(self, value: int, data: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]) -> None:
        """
        Sets the first rows of a value: float32 [rows, cols], converted to its dtype.
        """

    @overload
    def set_value(self, value: int, data: object) -> None:
        """
        From an array with __dlpack__ in memory that the device addresses: [rows, cols] of the
        value's dtype.

        Raises:
            InvalidArgumentError: no such value, or an array of another dtype or device, or one
                that does not fit.
        """

    def value(self, value: int, rows: int) -> NDArray[numpy.float32]:
        """The first rows of a value: float32 [rows, cols], a copy."""

    def device_value(self, value: int, rows: int) -> DeviceArray:
        """
        As value, in memory of the device and in the value's dtype: [rows, cols], a copy that
        later runs leave alone.
        """

    def set_ints(self, name: str, data: Annotated[NDArray[numpy.int32], dict(order='C', device='cpu', writable=False)]) -> None: ...

    def set_cache(self, layer: int, values: bool, data: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]) -> None:
        """
        Keys (or values) of a layer: float32 [blocks, heads, block_size, head_dim], converted to
        the dtype of the cache; of an FP8 cache what its codes stand for, without scales.
        """

    def cache(self, layer: int, values: bool) -> NDArray[numpy.float32]:
        """Keys (or values) of a layer, as set_cache takes them."""

    def set_cache_scales(self, layer: int, values: bool, data: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]) -> None:
        """
        Scales of an FP8 layer's keys (or values): float32 [1], [heads], or [blocks, heads,
        block_size].
        """

    def cache_scales(self, layer: int, values: bool) -> NDArray[numpy.float32]:
        """As set_cache_scales takes them."""

    def run(self, num_requests: int, num_tokens: int, num_logits: int = 0) -> None: ...

    def set_options(self, *, batch_invariant: bool = False, eager_attention: bool = False, attention_backend: AttentionBackend = AttentionBackend.NATIVE) -> None:
        """
        Which kernels later runs may use.

        Args:
            batch_invariant: only those whose results for a row do not depend on the batch.
            eager_attention: those of attention whose launch sizes follow the batch, too.
            attention_backend: of decode attention, on a GPU.
        """

    def time_runs(self, num_requests: int, num_tokens: int, num_logits: int = 0, repeats: int = 1) -> list[float]:
        """
        Seconds of each of `repeats` runs, after one that warms up; on a GPU by its own clock,
        each run launched as one graph.
        """

    def fill_weight(self, weight: int, seed: int, range: float) -> None:
        """
        Fills a matrix with random values in (-range, range), a vector with such around 1.
        """

    def fill_cache(self, seed: int) -> None:
        """
        Fills the KV caches of all layers with random values in [-1, 1), an FP8 cache with random
        codes and scales.
        """

    def close(self) -> None: ...

NO_TOKEN: int = -1

ERROR_TOKEN: int = -2

def sample(device: Device, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], rows: Sequence[RowSpec], *, logits_batch: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], logits_place: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], batch_row: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], total_len: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], seed: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], drafts: Sequence[Sequence[int]] = [], grammar_masks: Sequence[Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None] = [], counted_len: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None) -> tuple[NDArray[numpy.int32], list[object]]:
    """
    Runs the device's sampler once over a batch that is described by hand.

    L logits rows, B batch positions, R rows of the row table. All but parameters of sampling
    and token_ids of a RowSpec is ignored.

    Args:
        device: where to run.
        logits: float32 [L, vocab]; left as it is.
        rows: R specs. token_ids is the history, which rows with penalties or bad words need.
        logits_batch: int32 [L], batch position of a logits row, -1 for padding.
        logits_place: int32 [L], how many of its row's drafts come before the token.
        batch_row: int32 [B], row of a batch position, -1 for padding and masked rows.
        total_len: int32 [R], tokens of the history.
        seed: uint64 [R], in place of the specs'.
        drafts: R lists of token ids, or none: no row has drafts.
        grammar_masks: of each row None, or uint32 [ceil(vocab / 32)], a bit for each id; or
            none: no row has a mask.
        counted_len: int32 [R], so many tokens of a history are counted on their own, before
            all of them are, as in an earlier step.

    Returns:
        (int32 [L]: token ids, NO_TOKEN or ERROR_TOKEN; for each logits row None, or (token,
        logprob, rank, count, top token ids, top logprobs)).
    """

def score(device: Device, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], targets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], num_logprobs: int) -> list[object]:
    """
    Logprobs of given tokens, by the device's kernel.

    Args:
        device: where to run.
        logits: float32 [L, vocab].
        targets: int32 [L], -1 for rows that are left out.
        num_logprobs: candidates of each token.

    Returns:
        As the second of sample().
    """

def fixed_point_weights(logits: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], temperature: float = 1.0) -> NDArray[numpy.uint64]:
    """
    exp((logits - max) / temperature) as integers of 2^-43 units, as the sampler takes it.

    Args:
        logits: float32 [n], without NaN.
        temperature: above 0.

    Returns:
        uint64 [n].
    """

def random_word(seed: int, position: int) -> int:
    """
    The 64 random bits of the token at `position` of a request with this seed.
    """

def sampling_processors() -> list[str]:
    """Names of the sampler's processors, in the order they run."""

class MappedFile:
    """A file mapped read-only."""

    def __init__(self, path: str) -> None: ...

    @property
    def size(self) -> int: ...

class TwoBatchMode(enum.Enum):
    """
    Whether steps run as two halves, each of which computes while the other meets other ranks.
    """

    OFF = 0

    AUTO = 1

    ON = 2

class StepMode(enum.Enum):
    """How a step reaches the device."""

    EAGER = 0

    PIECEWISE = 1

    FULL = 2

def capture_sizes(requests: Sequence[int], num_speculative_tokens: int = 0, max_tokens: int = 2147483647) -> list[tuple[int, int]]:
    """
    Sizes of whole steps, (requests, tokens per request), for these numbers of decoding requests:
    of one token each, and of 1 + num_speculative_tokens where that makes a difference and
    max_tokens allows it.
    """

def default_capture_requests(max_requests: int) -> list[int]:
    """Numbers of requests that leave little of a step unused."""

def default_piecewise_sizes(max_tokens: int) -> list[int]:
    """Numbers of tokens of steps in pieces, by the same rule."""

class RunnerConfig:
    @overload
    def __init__(self) -> None: ...

    @overload
    def __init__(self, other: RunnerConfig) -> None:
        """A copy."""

    @property
    def num_ranks(self) -> int:
        """
        Devices that compute the model together, each a part of it: ranks of the first
        stage, then those of the next.
        """

    @num_ranks.setter
    def num_ranks(self, arg: int, /) -> None: ...

    @property
    def num_stages(self) -> int:
        """Stages of a pipeline that the ranks form, of as many ranks each."""

    @num_stages.setter
    def num_stages(self, arg: int, /) -> None: ...

    @property
    def data_parallel(self) -> bool:
        """
        Whether each rank has requests of its own, and a runner that is called by itself.
        """

    @data_parallel.setter
    def data_parallel(self, arg: bool, /) -> None: ...

    @property
    def rank_timeout_ms(self) -> int:
        """How long a rank waits for the others before they all end."""

    @rank_timeout_ms.setter
    def rank_timeout_ms(self, arg: int, /) -> None: ...

    @property
    def collectives(self) -> str:
        """
        What carries collectives of GPUs: "auto", "one_shot", "two_shot" or "nccl".
        """

    @collectives.setter
    def collectives(self, arg: str, /) -> None: ...

    @property
    def nccl(self) -> list[str]:
        """
        Names to open NCCL by, in order, if GPUs do not reach each other's memory.
        """

    @nccl.setter
    def nccl(self, arg: Sequence[str], /) -> None: ...

    @property
    def max_num_seqs(self) -> int: ...

    @max_num_seqs.setter
    def max_num_seqs(self, arg: int, /) -> None: ...

    @property
    def max_num_batched_tokens(self) -> int: ...

    @max_num_batched_tokens.setter
    def max_num_batched_tokens(self, arg: int, /) -> None: ...

    @property
    def max_model_len(self) -> int: ...

    @max_model_len.setter
    def max_model_len(self, arg: int, /) -> None: ...

    @property
    def block_size(self) -> int: ...

    @block_size.setter
    def block_size(self, arg: int, /) -> None: ...

    @property
    def num_blocks(self) -> int: ...

    @num_blocks.setter
    def num_blocks(self, arg: int, /) -> None: ...

    @property
    def kv_cache_dtype(self) -> str:
        """"auto" (the dtype of activations), "fp8_e4m3" or "fp8_e5m2"."""

    @kv_cache_dtype.setter
    def kv_cache_dtype(self, arg: str, /) -> None: ...

    @property
    def kv_scales(self) -> list[tuple[list[float], list[float]]]:
        """
        Static scales of an FP8 cache: of each layer those of keys and of values, one or one a
        head. Empty: each token and head has its own, computed when it is written.
        """

    @kv_scales.setter
    def kv_scales(self, arg: Sequence[tuple[Sequence[float], Sequence[float]]], /) -> None: ...

    @property
    def max_logprobs(self) -> int:
        """
        Candidates that a row may report beside each token; -1: rows have no logprobs.
        """

    @max_logprobs.setter
    def max_logprobs(self, arg: int, /) -> None: ...

    @property
    def sampling_words(self) -> int:
        """
        Words of 4 bytes that the lists of rows get at first, and by which they grow.
        """

    @sampling_words.setter
    def sampling_words(self, arg: int, /) -> None: ...

    @property
    def pad_requests(self) -> int: ...

    @pad_requests.setter
    def pad_requests(self, arg: int, /) -> None: ...

    @property
    def pad_tokens(self) -> int: ...

    @pad_tokens.setter
    def pad_tokens(self, arg: int, /) -> None: ...

    @property
    def infer_param_view(self) -> bool: ...

    @infer_param_view.setter
    def infer_param_view(self, arg: bool, /) -> None: ...

    @property
    def graph_mode(self) -> StepMode: ...

    @graph_mode.setter
    def graph_mode(self, arg: StepMode, /) -> None: ...

    @property
    def capture_sizes(self) -> list[tuple[int, int]]:
        """Pairs (requests, tokens per request) that whole steps are captured at."""

    @capture_sizes.setter
    def capture_sizes(self, arg: Sequence[tuple[int, int]], /) -> None: ...

    @property
    def piecewise_sizes(self) -> list[int]: ...

    @piecewise_sizes.setter
    def piecewise_sizes(self, arg: Sequence[int], /) -> None: ...

    @property
    def attention_backend(self) -> AttentionBackend: ...

    @attention_backend.setter
    def attention_backend(self, arg: AttentionBackend, /) -> None: ...

    @property
    def num_speculative_tokens(self) -> int:
        """Drafts that a decoding row may have in a step; 0 is off."""

    @num_speculative_tokens.setter
    def num_speculative_tokens(self, arg: int, /) -> None: ...

    @property
    def ngram(self) -> tuple[int, int]:
        """Fewest and most tokens of the n-grams that drafts are looked up by."""

    @ngram.setter
    def ngram(self, arg: tuple[int, int], /) -> None: ...

    @property
    def force_tokens(self) -> bool:
        """For testing: rows may carry tokens that take the place of those drawn."""

    @force_tokens.setter
    def force_tokens(self, arg: bool, /) -> None: ...

    @property
    def keep_hidden_states(self) -> bool: ...

    @keep_hidden_states.setter
    def keep_hidden_states(self, arg: bool, /) -> None: ...

    @property
    def batch_invariant(self) -> bool: ...

    @batch_invariant.setter
    def batch_invariant(self, arg: bool, /) -> None: ...

    @property
    def sync_launches(self) -> bool: ...

    @sync_launches.setter
    def sync_launches(self, arg: bool, /) -> None: ...

    @property
    def two_batch(self) -> tuple[TwoBatchMode, int, int, int]:
        """
        Whether steps run as two halves, and from how many tokens on if that is AUTO: of steps with
        prompts, and of those without or that run as one graph; and the thread blocks of a GPU that
        collectives of halves take at most, 0 for as many as they like.
        """

    @two_batch.setter
    def two_batch(self, arg: tuple[TwoBatchMode, int, int, int], /) -> None: ...

class RowSpec:
    def __init__(self) -> None: ...

    @property
    def token_ids(self) -> list[int]: ...

    @token_ids.setter
    def token_ids(self, arg: Sequence[int], /) -> None: ...

    @property
    def prompt_len(self) -> int: ...

    @prompt_len.setter
    def prompt_len(self, arg: int, /) -> None: ...

    @property
    def num_computed(self) -> int: ...

    @num_computed.setter
    def num_computed(self, arg: int, /) -> None: ...

    @property
    def temperature(self) -> float: ...

    @temperature.setter
    def temperature(self, arg: float, /) -> None: ...

    @property
    def top_p(self) -> float: ...

    @top_p.setter
    def top_p(self, arg: float, /) -> None: ...

    @property
    def min_p(self) -> float: ...

    @min_p.setter
    def min_p(self, arg: float, /) -> None: ...

    @property
    def top_k(self) -> int: ...

    @top_k.setter
    def top_k(self, arg: int, /) -> None: ...

    @property
    def seed(self) -> int: ...

    @seed.setter
    def seed(self, arg: int, /) -> None: ...

    @property
    def max_tokens(self) -> int: ...

    @max_tokens.setter
    def max_tokens(self, arg: int, /) -> None: ...

    @property
    def min_tokens(self) -> int: ...

    @min_tokens.setter
    def min_tokens(self, arg: int, /) -> None: ...

    @property
    def num_speculative_tokens(self) -> int:
        """Drafts of a step at most; -1: as many as the runner allows."""

    @num_speculative_tokens.setter
    def num_speculative_tokens(self, arg: int, /) -> None: ...

    @property
    def forced_token_ids(self) -> list[int]:
        """
        Outputs, counted from prompt_len, whatever is drawn. Needs force_tokens.
        """

    @forced_token_ids.setter
    def forced_token_ids(self, arg: Sequence[int], /) -> None: ...

    @property
    def stop_ids(self) -> list[int]: ...

    @stop_ids.setter
    def stop_ids(self, arg: Sequence[int], /) -> None: ...

    @property
    def stop_sequences(self) -> list[list[int]]:
        """
        Token sequences that end the row once its outputs end with one of them.
        """

    @stop_sequences.setter
    def stop_sequences(self, arg: Sequence[Sequence[int]], /) -> None: ...

    @property
    def presence_penalty(self) -> float: ...

    @presence_penalty.setter
    def presence_penalty(self, arg: float, /) -> None: ...

    @property
    def frequency_penalty(self) -> float: ...

    @frequency_penalty.setter
    def frequency_penalty(self, arg: float, /) -> None: ...

    @property
    def repetition_penalty(self) -> float: ...

    @repetition_penalty.setter
    def repetition_penalty(self, arg: float, /) -> None: ...

    @property
    def logit_bias(self) -> list[tuple[int, float]]:
        """Pairs of a token id and what its logit gains."""

    @logit_bias.setter
    def logit_bias(self, arg: Sequence[tuple[int, float]], /) -> None: ...

    @property
    def allowed_token_ids(self) -> list[int]:
        """Empty: all."""

    @allowed_token_ids.setter
    def allowed_token_ids(self, arg: Sequence[int], /) -> None: ...

    @property
    def bad_words(self) -> list[list[int]]:
        """Token sequences that never come out whole."""

    @bad_words.setter
    def bad_words(self, arg: Sequence[Sequence[int]], /) -> None: ...

    @property
    def num_logprobs(self) -> int:
        """Candidates to report beside each token; -1: no logprobs."""

    @num_logprobs.setter
    def num_logprobs(self, arg: int, /) -> None: ...

    @property
    def grammar(self) -> bool:
        """
        A mask of the tokens that may come is set before each draw; there are no drafts.
        """

    @grammar.setter
    def grammar(self, arg: bool, /) -> None: ...

    @property
    def num_prompt_logprobs(self) -> int:
        """
        Candidates to report beside each token of the prompt but the first; -1: no logprobs of it.
        """

    @num_prompt_logprobs.setter
    def num_prompt_logprobs(self, arg: int, /) -> None: ...

    @property
    def num_scored(self) -> int:
        """
        Leading tokens after which the prompt's next one has been reported before.
        """

    @num_scored.setter
    def num_scored(self, arg: int, /) -> None: ...

    @property
    def block_ids(self) -> list[list[int]]: ...

    @block_ids.setter
    def block_ids(self, arg: Sequence[Sequence[int]], /) -> None: ...

class FinishReason(enum.Enum):
    NONE = 0

    STOP = 1

    LENGTH = 2

    ERROR = 3

class RowPhase(enum.Enum):
    FREE = 0

    PREFILL = 1

    EXTEND = 2

    DECODE = 3

    FINISHED = 4

class OutputEntry:
    """What a step says about one item of its batch."""

    @property
    def row(self) -> int: ...

    @property
    def generation(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """New tokens."""

    @property
    def finish_reason(self) -> FinishReason: ...

    @property
    def num_computed(self) -> int: ...

    @property
    def total_len(self) -> int: ...

    @property
    def num_drafts(self) -> int:
        """Tokens that were proposed."""

    @property
    def num_accepted(self) -> int:
        """Proposed tokens among the new ones."""

    @property
    def masked(self) -> bool: ...

    @property
    def stop_sequence(self) -> int:
        """Which of the row's stop_sequences stopped it, else -1."""

class RowState:
    """A row as the device holds it."""

    @property
    def generation(self) -> int: ...

    @property
    def phase(self) -> RowPhase: ...

    @property
    def prompt_len(self) -> int: ...

    @property
    def prefill_target(self) -> int: ...

    @property
    def num_computed(self) -> int: ...

    @property
    def total_len(self) -> int: ...

    @property
    def last_token(self) -> int: ...

    @property
    def num_drafts(self) -> int: ...

    @property
    def finish_reason(self) -> FinishReason: ...

class StepTime:
    """What a rank's device did with one step, by its own clock."""

    def __init__(self) -> None: ...

    @property
    def step(self) -> int: ...

    @step.setter
    def step(self, arg: int, /) -> None: ...

    @property
    def begin_ns(self) -> int: ...

    @begin_ns.setter
    def begin_ns(self, arg: int, /) -> None: ...

    @property
    def end_ns(self) -> int: ...

    @end_ns.setter
    def end_ns(self, arg: int, /) -> None: ...

    @property
    def waited_ns(self) -> int:
        """For other stages of a pipeline, since the step before had ended."""

    @waited_ns.setter
    def waited_ns(self, arg: int, /) -> None: ...

    @property
    def requests(self) -> int: ...

    @requests.setter
    def requests(self, arg: int, /) -> None: ...

    @property
    def tokens(self) -> int: ...

    @tokens.setter
    def tokens(self, arg: int, /) -> None: ...

    @property
    def mode(self) -> StepMode: ...

    @mode.setter
    def mode(self, arg: StepMode, /) -> None: ...

    @property
    def cut_token(self) -> int:
        """The first token of the second half, where the step ran as two; else 0."""

    @cut_token.setter
    def cut_token(self, arg: int, /) -> None: ...

class StepOutput:
    """A retired step: entries in the batch's order."""

    @property
    def step(self) -> int: ...

    @property
    def error(self) -> str: ...

    @property
    def mode(self) -> StepMode: ...

    @property
    def cut_token(self) -> int:
        """The first token of the second half, where the step ran as two; else 0."""

    @property
    def begin_ns(self) -> int:
        """Device clock when the step began."""

    @property
    def end_ns(self) -> int:
        """Device clock when it ended."""

    @property
    def entries(self) -> list[OutputEntry]: ...

    def tokens(self, entry: int) -> list[int]:
        """The new tokens of an entry."""

    def logprobs(self, entry: int) -> tuple[list[int], list[float], list[int]] | None:
        """
        Token ids, logprobs and ranks of an entry: for each new token a group of
        1 + num_logprobs, the token itself first. None without logprobs.
        """

    def prompt_logprobs(self, entry: int) -> tuple[int, tuple[NDArray[numpy.int32], NDArray[numpy.float32], NDArray[numpy.int32]]] | None:
        """
        Of the tokens of an entry's prompt that the step scored: the position of the first, and
        token ids, logprobs and ranks, [tokens, 1 + num_prompt_logprobs], each token's own
        first. NaN where the logits hold a NaN. None if it scored none.
        """

class ModelRunner:
    """See mrv1.runner.ModelRunner."""

    @overload
    def __init__(self, device: Device, program: Program, config: RunnerConfig) -> None: ...

    @overload
    def __init__(self, devices: Sequence[Device], programs: Sequence[Program], configs: Sequence[RunnerConfig]) -> None:
        """
        Ranks that compute one model together: a device, a program and a configuration of each.
        """

    def rank(self, rank: int) -> ModelRunner:
        """
        The runner of a rank, where each has requests of its own. All ranks must run as many
        steps: `execute([])` on those without anything to compute.
        """

    def execute_ranks(self, batches: Sequence[Sequence[tuple[int, int, int]]]) -> list[int]:
        """
        Launches a step on all ranks with requests of their own, of a batch each, at the same
        time; returns its number on each.
        """

    @staticmethod
    def plan_memory(program: Program, config: RunnerConfig, device: Device) -> dict[str, int]:
        """
        Bytes of weights, activations, state and of one KV block, before anything is allocated.
        """

    @property
    def memory_plan(self) -> dict[str, int]: ...

    @property
    def memory_plans(self) -> list[dict[str, int]]:
        """Of each rank."""

    @property
    def ranks_note(self) -> str:
        """What the log should say of how ranks reach each other; mostly nothing."""

    def load_tensors(self, file: MappedFile, tensors: Sequence[Sequence[tuple[int, int, int, str]]], progress: Callable[[int], object]) -> None:
        """
        Loads tensors of a file: a list for each rank, of (weight, segment, offset in bytes,
        kind). The kind is the dtype of a plain weight, and of NVFP4 which of a segment's
        tensors it is: "nvfp4_codes", "nvfp4_block_scales", "nvfp4_global_scale" or
        "nvfp4_input_scale". Ranks load what they need of theirs at the same time, each in a thread of its
        own. `progress` is called with the bytes that were done since its last call; what it
        raises ends the loading.

        Raises:
            InvalidArgumentError: there is not a list for each rank, or no such weight, segment or dtype.
            WeightError: the file has no such bytes, or a weight cannot have that dtype.
            DeviceError: the copy failed.
        """

    def fill_random(self, weight: int, seed: int, range: float, rank: int = 0) -> None: ...

    def fill_kv_random(self, seed: int) -> None:
        """Fills the KV cache with random values: timing without a prefill."""

    def log_steps(self, on: bool) -> None:
        """
        Whether all ranks note down what each of their steps takes, from the next one on. Call
        it, and `take_step_log`, while no step is in flight.
        """

    def take_step_log(self, rank: int) -> list[StepTime]:
        """
        The steps of a rank since then, or since the last call: those without a batch, too.
        """

    def check_weights(self) -> None: ...

    def add_row(self, spec: RowSpec) -> tuple[int, int]: ...

    def append_blocks(self, row: int, group: int, block_ids: Sequence[int], generation: int = -1) -> None: ...

    def drop_blocks(self, row: int, group: int, first: int, count: int, generation: int = -1) -> None: ...

    @property
    def kv_windows(self) -> list[int]:
        """Window of each KV group, 0 for none."""

    def free_row(self, row: int, generation: int = -1) -> None: ...

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """
        Makes KV blocks equal to others, pairs (source, target), in stream order.
        """

    def last_step(self, row: int) -> int: ...

    @overload
    def execute(self, batch: Sequence[tuple[int, int]]) -> int: ...

    @overload
    def execute(self, batch: Sequence[tuple[int, int, int]]) -> int: ...

    def result(self, step: int) -> StepOutput: ...

    def discard(self, step: int) -> None: ...

    def ready(self, step: int) -> bool: ...

    @property
    def retired_step(self) -> int: ...

    @property
    def free_rows(self) -> int: ...

    def logits(self, item: int) -> NDArray[numpy.float32]: ...

    def device_logits(self, item: int) -> DeviceArray:
        """
        As logits, float32 [vocab] in memory of the device: a copy that later steps leave alone.
        """

    def hidden_states(self, item: int) -> NDArray[numpy.float32]:
        """
        What the head reads, for each token of an item of the newest step: float32 [tokens, hidden].
        """

    def device_hidden_states(self, item: int) -> DeviceArray:
        """
        The same in memory of the device and in the model's dtype: a copy that later steps leave alone.
        """

    def infer_params(self) -> dict[str, NDArray[numpy.int32]]: ...

    def row_state(self, row: int) -> RowState: ...

    def stats(self) -> dict[str, int]: ...

    def capture_graphs(self) -> tuple[int, int, int]:
        """
        Records the graphs of all sizes; returns how many sizes were recorded as whole steps and
        in pieces, and the bytes of device memory they took.
        """

    def take_miss(self) -> tuple[str, bool]:
        """
        Why a step did not run in the mode that was asked for, each reason once, else empty;
        and whether it was one of decoding requests only.
        """

    @property
    def masked_items(self) -> list[int]:
        """Items of the newest step's batch that draw under a mask."""

    @property
    def cut_step(self) -> int:
        """Step that waits for masks; 0 if there is none."""

    def set_masks(self, masks: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> None:
        """
        Sets the masks of `masked_items`, uint32 [items, ceil(vocab / 32)], and launches the
        rest of `cut_step`. Waits for the step before.
        """

    def fail_next_step(self, message: str, rank: int = -1) -> None:
        """
        For testing: the next batch fails after its program, on all ranks (-1) or on one.
        """

    @property
    def num_ranks(self) -> int:
        """Devices that compute the model together."""

    @property
    def program(self) -> Program: ...

    def close(self) -> None: ...

def infer_param_view(device: Device, encoder: NDArray[numpy.int32], decoder: NDArray[numpy.int32], this_time: NDArray[numpy.int32], block_tables: NDArray[numpy.int32], block_size: int, query_per_decode: int = 1, max_tokens: int = 8192) -> dict[str, NDArray[numpy.int32]]:
    """
    Prefill and decode maps, cumulative lengths and slots by table row: the outputs of
    FastDeploy's get_infer_param, as int32 arrays by name.
    """

class Grammar:
    """What the outputs of a request must follow."""

    def __init__(self, executor: object, matchers: Sequence[object]) -> None:
        """
        Args:
            executor: With consume_token_par and unsafe_compute_mask_ptr, as llguidance's
                LLExecutor.
            matchers: One for each sample of the request, as llguidance's LLMatcher; nobody
                else may use them.
        """

class RequestEnd(enum.Enum):
    NONE = 0

    STOP = 1

    LENGTH = 2

    ABORT = 3

    ERROR = 4

class RequestOutput:
    """News of one sample of a request. Its last one has an end."""

    @property
    def id(self) -> str: ...

    @property
    def index(self) -> int:
        """Of the sample, below n."""

    @property
    def token_ids(self) -> list[int]:
        """New tokens, often one."""

    @property
    def logprobs(self) -> tuple[list[int], list[float], list[int]] | None:
        """
        Token ids, logprobs and ranks: for each token a group of 1 + num_logprobs, the token
        itself first. None for requests without logprobs.
        """

    @property
    def stop_sequence(self) -> int:
        """
        Index of the sequence of RowSpec.stop_sequences that stopped it, else -1.
        """

    @property
    def end(self) -> RequestEnd: ...

    @property
    def error(self) -> str: ...

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed for this sample."""

    @property
    def num_draft_tokens(self) -> int:
        """Of the request so far."""

    @property
    def num_accepted_tokens(self) -> int:
        """Of the request so far."""

    @property
    def prompt_logprobs(self) -> tuple[NDArray[numpy.int32], NDArray[numpy.float32], NDArray[numpy.int32]] | None:
        """
        Token ids, logprobs and ranks of the prompt's tokens but the first, [tokens, 1 +
        num_prompt_logprobs], each token's own first: once, with the first token of one of the
        samples. None otherwise.
        """

class EngineOptions:
    def __init__(self, enable_prefix_caching: bool = True, background: bool = True) -> None:
        """
        Args:
            enable_prefix_caching: Whether equal beginnings of prompts share computed blocks.
            background: Whether a native thread takes the steps, or whoever calls step().
        """

    @property
    def enable_prefix_caching(self) -> bool: ...

    @enable_prefix_caching.setter
    def enable_prefix_caching(self, arg: bool, /) -> None: ...

    @property
    def background(self) -> bool: ...

    @background.setter
    def background(self, arg: bool, /) -> None: ...

class Engine:
    """
    Requests over a runner: scheduling, prefix cache, outputs. Any thread may call any method.
    See src/cpp/engine/README.md.
    """

    def __init__(self, runner: ModelRunner, options: EngineOptions = ...) -> None: ...

    def add_request(self, id: str, row: RowSpec, *, priority: int = 0, n: int = 1, cache_salt: int = 0, skip_prefix_cache: bool = False, grammar: Grammar | None = None, rank: int | None = None) -> None:
        """
        Queues a request.

        Args:
            id: Unique among the requests whose last output was not returned yet.
            row: Prompt and parameters; block_ids, num_computed and prompt_len are not read.
            priority: Lower is more urgent; equal ones in order of arrival.
            n: Samples; they share the blocks of the prompt. Sample i draws with seed + i.
            cache_salt: Requests share cached blocks only where it is equal.
            skip_prefix_cache: Neither take blocks from the prefix cache nor leave any there.
            grammar: What the outputs must follow; None: anything.
            rank: Of ranks with requests of their own, the one that takes it; None: the one with
                the fewest unfinished samples.

        Raises:
            RequestError: the id is in use, or the request could never run.
            InvalidArgumentError: a field of row is out of range.
        """

    def abort(self, id: str, *, index: int = -1, report: bool = True) -> bool:
        """
        Ends one sample, or all with -1. Without `report` no output of it is returned from now
        on, and the id is free. False if there was nothing left to end.
        """

    def step(self) -> list[RequestOutput]:
        """
        Launches a step, takes in the one before it, and returns what is new. Only without
        `background`.
        """

    def step_into(self, sink: collections.deque[RequestOutput]) -> None:
        """
        The same into a deque: an interrupt that comes during the step finds what is new there.
        """

    def wait_outputs(self, timeout_s: float) -> list[RequestOutput]:
        """
        Waits for outputs and returns them; empty if nothing is unfinished, after the timeout
        and after wake(). Only with `background`.
        """

    def wake(self) -> None:
        """Makes one wait_outputs return, the next one if nobody waits."""

    def has_unfinished(self) -> bool:
        """Whether outputs are still to come, or something is left to bring home."""

    def stats(self) -> dict[str, int]:
        """
        Counts since the start, and what is there after the newest step. thread_cpu_ns is CPU
        time of scheduling, without waiting for the device.
        """

    def rank_stats(self, rank: int) -> dict[str, int]:
        """
        The same of one of several ranks with requests of their own; `stats` has their sums, but
        for steps, which are those of one.
        """

    def check_idle(self) -> None:
        """
        Raises InternalError if something runs, or a row or block was left behind.
        """

    def check_invariants(self) -> None:
        """
        Raises InternalError unless lists, rows and blocks agree. Slow: for tests.
        """

    def close(self) -> None:
        """
        Ends all requests with an abort, waits for the steps in flight and joins the thread.
        """

class ReadProbe:
    """
    A buffer that a device reads from end to end with all it has: measures read bandwidth.

    Args:
        device: Where it lies.
        bytes: Size of the buffer, at least 2**20.

    Raises:
        OutOfMemoryError: less memory is free.
    """

    def __init__(self, device: Device, bytes: int) -> None: ...

    @property
    def bytes(self) -> int: ...

    @property
    def checksum(self) -> int:
        """Sum of the 64-bit words that the last run read, modulo 2**64."""

    def run(self) -> float:
        """Reads the buffer once; returns the seconds it took."""

    def copy(self) -> float:
        """
        Copies the first half of the buffer over the second, so that as many bytes as the buffer
        has are read or written; returns the seconds it took.
        """

    def close(self) -> None: ...

class AttentionProbe:
    """
    Decode attention by itself: a bfloat16 token for each request over random caches.

    Args:
        device: Where it runs.
        lengths: Cached tokens of each request.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Of a head.
        kv_cache_dtype: auto (bfloat16), fp8_e4m3 or fp8_e5m2.
        scales: Of an FP8 cache: tensor, head or token; else none.
        tokens_first: Whether a block lies as [block_size, kv_heads, head_dim], not as
            [kv_heads, block_size, head_dim].
        block_size: Tokens of a block.
        copies: Caches that a run goes through, one call each.

    Raises:
        InvalidArgumentError: what cannot be.
        OutOfMemoryError: less memory is free.
    """

    def __init__(self, device: Device, lengths: Sequence[int], *, num_heads: int, num_kv_heads: int, head_dim: int, kv_cache_dtype: str = 'auto', scales: str = 'none', tokens_first: bool = False, block_size: int = 16, copies: int = 1) -> None: ...

    @property
    def read_bytes(self) -> int:
        """Keys, values and scales that a call must read."""

    def supports(self, backend: AttentionBackend) -> bool:
        """Whether the backend has kernels for it."""

    def time_runs(self, backend: AttentionBackend, repeats: int = 1) -> list[float]:
        """
        Seconds of a call, of each of `repeats` runs over all caches, after one that warms up;
        on a GPU by its own clock, each run launched as one graph.
        """

    def output(self) -> NDArray[numpy.float32]:
        """Of the last call, float32 [requests * heads * head_dim], a copy."""

    def close(self) -> None: ...

class SampleProbe:
    """
    Sampling by itself: the sampler of a step over random logits, normal with a standard
    deviation of 3.

    Args:
        device: Where it runs.
        batch: Rows.
        vocab_size: Logits of a row.
        spec: Tokens and sampling parameters of every row; the row's number is added to the
            seed.
        copies: Of the logits, all different; a run goes through them, one call each.

    Raises:
        InvalidArgumentError: what cannot be.
        OutOfMemoryError: less memory is free.
    """

    def __init__(self, device: Device, batch: int, vocab_size: int, spec: RowSpec, copies: int = 1) -> None: ...

    def time_runs(self, repeats: int = 1) -> list[float]:
        """
        Seconds of a call, of each of `repeats` runs over all copies, after one that warms up;
        on a GPU by its own clock, each run launched as one graph.
        """

    def time_reads(self, repeats: int = 1) -> list[float]:
        """The same for a plain read of a copy's logits; on a GPU only."""

    def tokens(self) -> NDArray[numpy.int32]:
        """Of the last call, int32 [batch], a copy."""

    def logits_address(self, copy: int) -> int:
        """
        Address on the device of a copy's float32 [batch, vocab_size] logits, valid until close().
        """

    def close(self) -> None: ...

class CacheWriteProbe:
    """
    Rows of keys and values and a paged cache to write them to: measures what that takes.

    Every launch of a run has rows and slots of its own, as long as `working_set` bytes, or 256
    launches, allow.

    Args:
        device: Where.
        tokens: Of a launch.
        num_heads: Query heads, which a rotary embedding turns too.
        num_kv_heads: Heads of the cache.
        head_dim: A multiple of 8 up to 256.
        dtype: Of the rows, "float32" or "bfloat16".
        kv_cache_dtype: "auto", "fp8_e4m3" or "fp8_e5m2".
        scale: "none", or of FP8 "static" for one, "dynamic" for one a token and head.
        layout: "NHD" or "HND": what lies between blocks and elements.
        block_size: Tokens of a block.
        working_set: Bytes.

    Raises:
        InvalidArgumentError: something is not what it must be.
        OutOfMemoryError: less memory is free.
    """

    def __init__(self, device: Device, tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, kv_cache_dtype: str = 'auto', scale: str = 'none', layout: str = 'HND', block_size: int = 16, working_set: int = 67108864) -> None: ...

    def time(self, part: str, repeats: int, overlap: bool = True) -> list[float]:
        """
        Seconds of a launch in each of several runs: "write", "rope_write" in one launch,
        or both in "separate" ones. On a GPU launches overlap as in a step, or wait for each
        other as single ops do. A run on a GPU is one graph of 8 launches or more, timed by
        the GPU's clock, with nothing in its caches before.
        """

    def close(self) -> None: ...

class StageSendProbe:
    """
    Values on their way through the stages of a pipeline by themselves: a graph of several
    messages on every rank. A message ends when the next stage has let go of it, and the next
    one begins.

    Args:
        devices: One a stage, all of one kind; GPUs are distinct.
        rows: Of a message.
        cols: Of a message.
        calls: Messages of a graph.
        dtype: "float32" or "bfloat16".
        copies: Whether devices copy to the next one's buffer instead, which tells nobody.

    Raises:
        InvalidArgumentError: something is not what it must be.
        DeviceError: GPUs do not reach each other's memory.
    """

    def __init__(self, devices: Sequence[Device], *, rows: int, cols: int, calls: int = 1, dtype: str = 'bfloat16', copies: bool = False) -> None: ...

    def set_values(self, values: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]) -> None:
        """Sets what the first stage sends, [calls, rows, cols]."""

    def run(self, launches: int = 1) -> None:
        """Runs the graph of every rank, `launches` times."""

    def received(self, rank: int) -> NDArray[numpy.float32]:
        """What has come last to a stage after the first: [rows, cols]."""

    def time(self, repeats: int, launches: int) -> list[float]:
        """
        Seconds of a message on the slowest rank, in each of `repeats` runs of `launches`
        graphs; by the clock of a GPU, else of the host.
        """

    def close(self) -> None: ...

class CollectiveProbe:
    """
    Collectives of a group of devices by themselves: a graph of several calls on every rank,
    each with values of its own. What collectives are tested and measured by.

    Args:
        devices: One a rank, all of one kind; GPUs are distinct.
        op: "all_reduce" or "all_gather".
        rows: Of a call.
        cols: Of one rank.
        calls: Of a graph.
        dtype: Of the values, "float32" or "bfloat16".
        out_dtype: Of sums; None is that of the values.
        in_place: Whether sums take the place of the values.
        with_bias: Whether a bias is added to sums.
        offset: Elements that arrays lie behind an aligned address.
        batch_invariant: Whether the order of sums may depend on nothing.
        delay: Seconds that a rank waits before a call at most, at random.
        kernels: Of GPUs: "auto", "one_shot", "two_shot" or "nccl".
        nccl: Names to open NCCL by, in order, for kernels="nccl".
        timeout: Seconds that a rank waits for others before the group ends.

    Raises:
        InvalidArgumentError: something is not what it must be.
        DeviceError: GPUs do not reach each other's memory, or NCCL was asked for and not found.
    """

    def __init__(self, devices: Sequence[Device], op: str, *, rows: int, cols: int, calls: int = 1, dtype: str = 'bfloat16', out_dtype: str | None = None, in_place: bool = False, with_bias: bool = False, offset: int = 0, batch_invariant: bool = False, delay: float = 0.0, kernels: str = 'auto', nccl: Sequence[str] = [], timeout: float = 8.0) -> None: ...

    def set_values(self, rank: int, values: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]) -> None:
        """Sets a rank's values, [calls, rows, cols], rounded to the dtype."""

    def set_bias(self, bias: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]) -> None:
        """Sets the bias of every rank, [cols]."""

    def run(self, launches: int = 1, absent: int | None = None) -> None:
        """
        Runs the graph of every rank, `launches` times; rank `absent` does not come.

        Raises:
            DeviceError: the group has ended; the message says why.
        """

    def result(self, rank: int) -> NDArray[numpy.float32]:
        """Of a rank: [calls, rows, columns]."""

    def time(self, repeats: int, launches: int) -> list[float]:
        """
        Seconds of a call on the slowest rank, in each of `repeats` runs of `launches` graphs;
        by the clock of a GPU, else of the host.
        """

    def abort(self, reason: str) -> None:
        """Ends the group, as a rank that fails does."""

    def close(self) -> None: ...

class ExpertProbe:
    """
    moe_dispatch and moe_combine of a group of devices by themselves: a graph of several of
    both on every rank, each with tokens of its own. What comes back of a token is, in place of
    what experts would make of it, itself from every rank that it was sent to, or what
    `set_partial` was given.

    Args:
        devices: One a rank, all of one kind; GPUs are distinct.
        tokens: Of each rank.
        hidden: Columns of a token.
        top_k: Experts of a token.
        num_experts: Of all ranks together.
        region_rows: Tokens that there is room for of each rank.
        calls: Of a graph.
        dtype: Of tokens, "float32" or "bfloat16".
        sum_dtype: Of what comes back; None is that of tokens.
        part: "both", or for timing "dispatch" or "combine" alone.
        delay: Seconds that a rank waits before a call at most, at random.
        blocks: Thread blocks of a GPU that each takes.
        kernels: Of GPUs: "auto", or "nccl", by which regions travel whole.
        nccl: Names to open NCCL by, in order, for kernels="nccl".
        timeout: Seconds that a rank waits for others before the group ends.

    Raises:
        InvalidArgumentError: something is not what it must be.
        DeviceError: GPUs do not reach each other's memory, or NCCL was asked for and not found.
    """

    def __init__(self, devices: Sequence[Device], *, tokens: Sequence[int], hidden: int, top_k: int, num_experts: int, region_rows: int, calls: int = 1, dtype: str = 'bfloat16', sum_dtype: str | None = None, part: str = 'both', delay: float = 0.0, blocks: int = 32, kernels: str = 'auto', nccl: Sequence[str] = [], timeout: float = 8.0) -> None: ...

    def set_tokens(self, rank: int, values: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], experts: Annotated[NDArray[numpy.int32], dict(order='C', device='cpu', writable=False)], weights: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]) -> None:
        """
        Sets a rank's tokens, [calls, tokens, hidden], rounded to the dtype, and their experts
        and weights, [calls, tokens, top_k]; an expert may be -1.
        """

    def set_partial(self, rank: int, values: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]) -> None:
        """
        Sets what a rank has computed of the tokens of all, [ranks, region_rows, hidden],
        rounded to sum_dtype; before the first run.
        """

    def run(self, launches: int = 1, absent: int | None = None) -> None:
        """
        Runs the graph of every rank, `launches` times; rank `absent` does not come.

        Raises:
            DeviceError: the group has ended; the message says why.
        """

    def result(self, rank: int) -> NDArray[numpy.float32]:
        """Of a rank: [calls, tokens, hidden]."""

    def received(self, rank: int) -> tuple[NDArray[numpy.float32], NDArray[numpy.int32], NDArray[numpy.float32], NDArray[numpy.int32], NDArray[numpy.int32]]:
        """
        Of a rank's last call: tokens [ranks, region_rows, hidden], experts and weights
        [ranks, region_rows, top_k] and counts [ranks] that have come to it, and the places
        [tokens, ranks] of its own tokens at others, -1 where they did not go.
        """

    def time(self, repeats: int, launches: int) -> list[float]:
        """
        Seconds of a call on the slowest rank, in each of `repeats` runs of `launches` graphs;
        by the clock of a GPU, else of the host.
        """

    def abort(self, reason: str) -> None:
        """Ends the group, as a rank that fails does."""

    def close(self) -> None: ...

class StageProbe:
    """
    Stages of a pipeline around the least model that tells values apart: x_v = table_v[token],
    each layer adds its shift_v, and the logits are the sum of all values that are float32 and
    have vocab_size columns. Layers are shared out evenly among the stages; tokens are drawn
    greedily. What the ops between stages are tested by.

    A step is a tuple: the newest step that the stages before the last must have adopted; freed
    rows (row, generation); new rows (row, generation, prompt, max_total_len, num_drafts); and
    the batch's entries (row, generation, num_tokens, samples).

    Args:
        devices: One a rank, in the order of stages; GPUs are distinct.
        num_stages: Of as many ranks each, which do the same.
        num_layers: Of the model, at least one a stage.
        values: Columns and dtype ("float32" or "bfloat16") of each value that crosses.
        num_rows: As many may be in a batch.
        max_tokens: Of a batch.
        max_model_len: Of a row, drafts included.
        num_drafts: Of a row at most.
        num_slots: Steps that are on their way at most.
        graphs: Whether steps with a batch are replays of one graph.
        delay: Seconds that a rank waits at each place where others wait for it, at random.
        slow_rank: The rank that does; None is all.
        timeout: Seconds that a rank waits for others before all end.
        seed: Of the model's numbers.

    Raises:
        InvalidArgumentError: something is not what it must be.
    """

    def __init__(self, devices: Sequence[Device], *, num_stages: int, num_layers: int, vocab_size: int, values: Sequence[tuple[int, str]], num_rows: int, max_tokens: int, max_model_len: int, num_drafts: int = 0, num_slots: int = 4, graphs: bool = False, delay: float = 0.0, slow_rank: int | None = None, timeout: float = 8.0, seed: int = 0) -> None: ...

    @property
    def next_step(self) -> int:
        """The step that run() begins with."""

    def table(self, value: int) -> NDArray[numpy.float32]:
        """Of a value: [vocab_size, cols], as it is in its dtype."""

    def shift(self, layer: int, value: int) -> NDArray[numpy.float32]:
        """What a layer adds to a value: [cols]."""

    def random_steps(self, count: int, seed: int) -> list[tuple[int, list[tuple[int, int]], list[tuple[int, int, list[int], int, int]], list[tuple[int, int, int, int]]]]:
        """Random lives of rows, for the next run()."""

    def run(self, steps: Sequence[tuple[int, Sequence[tuple[int, int]], Sequence[tuple[int, int, Sequence[int], int, int]], Sequence[tuple[int, int, int, int]]]], absent: int | None = None, absent_from: int = 0) -> None:
        """
        Runs steps; rank `absent` leaves out those from number `absent_from` on.

        Raises:
            DeviceError: the group has ended; the message says why.
        """

    def outputs(self, rank: int) -> list[dict[str, Any]]:
        """What a rank has put out in each step of the last run."""

    def row(self, rank: int, row: int) -> dict[str, Any]:
        """A row as a rank has it."""

    def received(self, rank: int, value: int) -> NDArray[numpy.float32]:
        """A value as it has last crossed to a rank: [max_tokens, cols]."""

    def abort(self, reason: str) -> None:
        """Ends the group, as a rank that fails does."""

    def close(self) -> None: ...

class Ops:
    """
    The backend table's ops on arrays of the caller. Use mrv1.ops, which documents them.

    Args:
        host: What the calls ask of Python, a mrv1.ops._host.Host.
        sync_launches: Whether to wait after every launch.
        check_slots: Whether to look at slots and scales on a GPU, too.
    """

    def __init__(self, host: object, sync_launches: bool = False, check_slots: bool = False) -> None: ...

    def pack_linear(self, weight: object, stream: object | None = None) -> PackedWeight: ...

    def add(self, a: object, b: object, out: object | None = None, stream: object | None = None) -> object: ...

    def rms_norm(self, x: object, weight: object, eps: float, out: object | None = None, stream: object | None = None) -> object: ...

    def add_rms_norm(self, x: object, residual: object, weight: object, eps: float, out: object | None = None, sum_out: object | None = None, stream: object | None = None) -> object: ...

    def gated_mul(self, x: object, activation: str, out: object | None = None, stream: object | None = None) -> object: ...

    def soft_cap(self, x: object, cap: float, out: object | None = None, stream: object | None = None) -> object: ...

    def gather_rows(self, x: object, indices: object, out: object | None = None, stream: object | None = None) -> object: ...

    def embedding(self, token_ids: object, table: object, scale: float = 1.0, dtype: str | None = None, out: object | None = None, stream: object | None = None) -> object: ...

    def linear(self, x: object, weight: object, bias: object | None = None, residual: object | None = None, activation: str | None = None, out_dtype: str | None = None, out: object | None = None, stream: object | None = None) -> object: ...

    def moe_route(self, logits: object, top_k: int, bias: object | None = None, scores: str = 'softmax', renormalize: bool = True, min_sum: float = 0.0, scale: float = 1.0, token_batch: object | None = None, experts_out: object | None = None, weights_out: object | None = None, stream: object | None = None) -> object: ...

    def moe_experts(self, x: object, experts: object, weights: object, gate_up: object, down: object, activation: str = 'silu', first_expert: int = 0, out_dtype: str | None = None, out: object | None = None, stream: object | None = None) -> object: ...

    def qkv_prepare(self, op: str, qkv: object, num_heads: int, num_kv_heads: int, q_norm: object | None = None, k_norm: object | None = None, eps: float = 0.0, cos_sin: object | None = None, positions: object | None = None, interleaved: bool = False, key_cache: object | None = None, value_cache: object | None = None, slot_mapping: object | None = None, kv_cache_dtype: str = 'auto', k_scale: object | None = None, v_scale: object | None = None, out: object | None = None, stream: object | None = None) -> object: ...

    def cache_write(self, qkv: object, num_heads: int, num_kv_heads: int, key_cache: object, value_cache: object, slot_mapping: object, kv_cache_dtype: str = 'auto', k_scale: object | None = None, v_scale: object | None = None, stream: object | None = None) -> None: ...

    def reshape_and_cache_flash(self, key: object, value: object, key_cache: object, value_cache: object, slot_mapping: object, kv_cache_dtype: str = 'auto', k_scale: object | None = None, v_scale: object | None = None, stream: object | None = None) -> None: ...

    def slot_mapping(self, block_table: object, positions: object, query_start_loc: object, block_size: int, out: object | None = None, stream: object | None = None) -> object: ...

    def infer_params(self, query_start_loc: object, seq_lens: object, block_table: object, num_tokens: int, block_size: int, stream: object | None = None) -> tuple[object, object, object, object, object]: ...

    def plan_attention(self, query_start_loc: object, seq_lens: object, block_table: object, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, num_blocks: int, dtype: str, window: int = 0, softcap: float = 0.0, kv_cache_dtype: str = 'auto', stream: object | None = None) -> PlannedAttention: ...

    def paged_attention(self, q: object, key_cache: object, value_cache: object, block_table: object | None = None, seq_lens: object | None = None, query_start_loc: object | None = None, scale: float = 1.0, window: int = 0, softcap: float = 0.0, plan: object | None = None, kv_cache_dtype: str = 'auto', k_scale: object | None = None, v_scale: object | None = None, out: object | None = None, stream: object | None = None) -> object: ...

    def copy_blocks(self, key_cache: object, value_cache: object, block_mapping: Sequence[tuple[int, int]], kv_cache_dtype: str = 'auto', k_scale: object | None = None, v_scale: object | None = None, stream: object | None = None) -> None: ...

    def zero_blocks(self, key_cache: object, value_cache: object, block_ids: Sequence[int], kv_cache_dtype: str = 'auto', k_scale: object | None = None, v_scale: object | None = None, stream: object | None = None) -> None: ...

    def gather_blocks(self, key_cache: object, value_cache: object, block_ids: object, num_tokens: int = -1, dtype: str = '', kv_cache_dtype: str = 'auto', k_scale: object | None = None, v_scale: object | None = None, key_out: object | None = None, value_out: object | None = None, stream: object | None = None) -> tuple[object, object]: ...

    def swap_blocks(self, source: object, target: object, block_mapping: Sequence[tuple[int, int]], stream: object | None = None) -> None: ...

    def sample(self, logits: object, temperature: object, top_k: object, top_p: object, min_p: object, seed: object, position: object, out: object | None = None, stream: object | None = None) -> object: ...

    def ngram_propose(self, token_ids: object, lengths: object, max_drafts: int, ngram_min: int, ngram_max: int, limits: object | None = None, out: object | None = None, num_out: object | None = None, stream: object | None = None) -> object: ...

class PackedWeight:
    """
    A matrix, or several equal ones, in the layout that `linear` of a device reads; made by
    mrv1.ops.pack_linear.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) or (matrices, out, in)"""

    @property
    def dtype(self) -> str: ...

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""

class PlannedAttention:
    """
    How the attention of one batch is divided; made by mrv1.ops.plan_attention.
    """

def largest_magnitude(data: Annotated[NDArray[numpy.uint8], dict(order='C', device='cpu', writable=False)], dtype: str) -> float:
    """
    The largest magnitude of the values in `data`, uint8, or NaN if one is NaN.
    """

def nvfp4_global_scale(largest: float) -> float:
    """The global scale of a tensor whose largest magnitude is `largest`."""

def quantize_nvfp4(data: NDArray[numpy.uint8], dtype: str, cols: int, global_scale: float) -> tuple[NDArray[numpy.uint8], NDArray[numpy.uint8], float, float, float]:
    """
    Finite values, as uint8 in memory, in NVFP4: codes [rows, cols / 2], the even column in the
    low nibble; block scales [rows, cols / 16] as codes of E4M3; the sums of squared errors and
    of squares, and the largest error.
    """

def dequantize_nvfp4(codes: Annotated[NDArray[numpy.uint8], dict(order='C', device='cpu', writable=False)], block_scales: Annotated[NDArray[numpy.uint8], dict(order='C', device='cpu', writable=False)], cols: int, global_scale: float) -> NDArray[numpy.float32]:
    """
    The values of codes and block scales, as quantize_nvfp4 returns them: float32 [rows, cols].
    """
