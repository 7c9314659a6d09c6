# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The configuration of a model, read from a Hugging Face directory and checked.

Everything is checked here, once, with bounds that keep each product of sizes in 64 bits, so the
code that allocates by these numbers can trust them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Final, Literal, cast

from mrv1._files import FileError, parse_json, read_file
from mrv1.errors import MISSING, ConfigError, InvalidArgumentError, RequestError
from mrv1.sampling_params import SamplingParams

ModelType = Literal["llama", "qwen3"]
DTypeName = Literal["float32", "float16", "bfloat16"]
RopeType = Literal["default", "llama3"]

CONFIG_NAME: Final = "config.json"
GENERATION_CONFIG_NAME: Final = "generation_config.json"

# Model type -> the architecture that is supported.
ARCHITECTURES: Final[dict[str, str]] = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPES: Final = ("float32", "float16", "bfloat16")
ROPE_TYPES: Final = ("default", "llama3")

MAX_FILE_BYTES: Final = 4 << 20
MAX_JSON_VALUES: Final = 200_000
# What the sampler can draw from.
MAX_VOCAB_SIZE: Final = 2**18
MAX_HIDDEN_SIZE: Final = 2**20
MAX_INTERMEDIATE_SIZE: Final = 2**22
MAX_LAYERS: Final = 4096
MAX_HEADS: Final = 2**14
# Attention kernels take heads in whole vectors of 8, up to 256.
HEAD_DIM_STEP: Final = 8
MAX_HEAD_DIM: Final = 256
MAX_POSITIONS: Final = 2**24
MAX_EOS_IDS: Final = 256


def model_root(directory: str | os.PathLike[str]) -> Path:
    """Returns a model directory as a path, which may not exist.

    Raises:
        InvalidArgumentError: It is empty, or no path at all.
    """
    try:
        path = os.fspath(directory)
    except TypeError:
        path = ""
    # An empty path would mean the working directory.
    if not isinstance(path, str) or not path:
        raise InvalidArgumentError(
            field="model", value=directory, allowed="the path of a model directory"
        )
    return Path(path)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        type: "default" (Su et al. 2021, "RoFormer") or "llama3" (the same with frequencies scaled
            by wavelength, as published with Llama 3.1).
        theta: Base of the frequencies.
        factor: llama3: by how much low frequencies are slowed down; 1 otherwise.
        low_freq_factor: llama3: wavelengths above original_max_position_embeddings divided by this
            are slowed down in full; 1 otherwise.
        high_freq_factor: llama3: wavelengths below original_max_position_embeddings divided by this
            are kept, and those between are interpolated; above low_freq_factor. 4 otherwise.
        original_max_position_embeddings: llama3: positions the model was trained with first; 0
            otherwise.
    """

    type: RopeType
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclasses.dataclass(frozen=True)
class DefaultSampling:
    """Sampling parameters that generation_config.json recommends; None where it is silent.

    Attributes:
        temperature: 0 where the file says do_sample = false, which means greedy.
        top_p: As `SamplingParams`.
        top_k: As `SamplingParams`.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def params(self) -> SamplingParams:
        """The recommended parameters; those of `SamplingParams` where the file is silent."""
        return SamplingParams(
            **{name: value for name, value in vars(self).items() if value is not None}
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a model directory says about its model.

    Attributes:
        model_type: Family of the model, which chooses the wiring.
        architecture: Class name of the model in Hugging Face transformers.
        vocab_size: Number of token ids, rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads; divides num_attention_heads.
        head_dim: Width of a head, a multiple of 8. num_attention_heads * head_dim may differ from
            hidden_size.
        rms_norm_eps: Added to the mean square in each RMSNorm.
        rope: Rotary position embedding.
        max_position_embeddings: Most tokens a sequence can have.
        tie_word_embeddings: Whether the output projection is the embedding.
        attention_bias: Whether the attention projections have a bias.
        mlp_bias: Whether the MLP projections have a bias.
        dtype: Dtype the weights were made for, or None where the file does not say.
        eos_token_ids: Tokens that end a sequence, in the file's order, without repeats; may be
            empty.
        default_sampling: Recommended sampling parameters.
    """

    model_type: ModelType
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: DTypeName | None
    eos_token_ids: tuple[int, ...]
    default_sampling: DefaultSampling

    @classmethod
    def from_dir(cls, directory: str | os.PathLike[str]) -> ModelConfig:
        """Reads config.json and, if there is one, generation_config.json.

        Raises:
            InvalidArgumentError: `directory` is no path.
            ConfigError: A file is missing, damaged, or asks for something that is not supported.
        """
        root = model_root(directory)
        if not root.is_dir():
            raise ConfigError("is not a directory", path=root)
        config = _load(root / CONFIG_NAME)
        generation = None
        if os.path.lexists(root / GENERATION_CONFIG_NAME):
            generation = _load(root / GENERATION_CONFIG_NAME)
        return _parse(config, generation)

    @classmethod
    def from_values(cls, config: dict[str, object]) -> ModelConfig:
        """Checks the values of a config.json that is not in a file.

        Raises:
            ConfigError: They ask for something that is not supported.
        """
        return _parse(_Fields(Path(CONFIG_NAME), config), None)


class _Fields:
    """The fields of one JSON object, read with checks; null counts as missing.

    Args:
        path: File that errors name.
        values: The object.
        prefix: Where the object stands in the file, with a dot at its end, or "".
    """

    def __init__(self, path: Path, values: dict[str, object], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self.prefix = prefix

    def error(self, name: str, allowed: str, value: object = None) -> ConfigError:
        """Returns the error about a field; its own value unless one is given."""
        if value is None:
            value = self.values.get(name, MISSING)
        return ConfigError(path=self.path, field=self.prefix + name, value=value, allowed=allowed)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"an integer in [{low}, {high}]")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
            or not low <= value <= high
        ):
            raise self.error(name, f"a number in [{low:g}, {high:g}]")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def object(self, name: str) -> _Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "an object or null")
        return _Fields(self.path, cast("dict[str, object]", value), f"{self.prefix}{name}.")


def _load(path: Path) -> _Fields:
    try:
        value = parse_json(read_file(path, MAX_FILE_BYTES), MAX_JSON_VALUES)
    except FileError as problem:
        raise ConfigError(str(problem), path=path) from None
    if not isinstance(value, dict):
        raise ConfigError("does not hold a JSON object", path=path)
    return _Fields(path, value)


def _parse(config: _Fields, generation: _Fields | None) -> ModelConfig:
    model_type = config.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise config.error("model_type", f"one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    architectures = config.values.get("architectures")
    if not isinstance(architectures, list) or architectures != [architecture]:
        raise config.error("architectures", f'["{architecture}"]')
    num_layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    vocab_size = config.integer("vocab_size", 1, MAX_VOCAB_SIZE)
    hidden_size = config.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_heads = config.integer("num_attention_heads", 1, MAX_HEADS)
    max_positions = config.integer("max_position_embeddings", 1, MAX_POSITIONS)
    _refuse_unsupported(config, num_layers)
    return ModelConfig(
        model_type=cast("ModelType", model_type),
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", 1, MAX_INTERMEDIATE_SIZE),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=_num_key_value_heads(config, num_heads),
        head_dim=_head_dim(config, model_type, hidden_size, num_heads),
        rms_norm_eps=config.number("rms_norm_eps", 1e-12, 1.0),
        rope=_rope(config, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        attention_bias=config.boolean("attention_bias", False),
        mlp_bias=config.boolean("mlp_bias", False),
        dtype=_dtype(config),
        eos_token_ids=_eos_token_ids(config, generation, vocab_size),
        default_sampling=_default_sampling(generation),
    )


def _refuse_unsupported(config: _Fields, num_layers: int) -> None:
    """Refuses what would change the model's output, but is not computed here."""
    if config.values.get("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", '"silu"')
    if config.has("quantization_config"):
        raise config.error("quantization_config", "absent: quantised weights are not supported")
    if config.boolean("use_sliding_window", False):
        raise config.error("use_sliding_window", "false: sliding windows are not supported")
    layer_types = config.values.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * num_layers:
        raise config.error("layer_types", f'"full_attention" for each of {num_layers} layers')


def _num_key_value_heads(config: _Fields, num_heads: int) -> int:
    count = config.integer("num_key_value_heads", 1, num_heads, default=num_heads)
    if num_heads % count:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads = {num_heads}")
    return count


def _head_dim(config: _Fields, model_type: str, hidden_size: int, num_heads: int) -> int:
    # Qwen3's head width is its own; for Llama it is what the heads share of the hidden size.
    default = 128
    if model_type == "llama" and not config.has("head_dim"):
        if hidden_size % num_heads:
            allowed = f"a multiple of num_attention_heads = {num_heads} where there is no head_dim"
            raise config.error("hidden_size", allowed)
        default = hidden_size // num_heads
    allowed = f"a multiple of {HEAD_DIM_STEP} in [{HEAD_DIM_STEP}, {MAX_HEAD_DIM}]"
    head_dim = config.values.get("head_dim")
    if head_dim is None:
        head_dim = default
    if not isinstance(head_dim, int) or isinstance(head_dim, bool):
        raise config.error("head_dim", allowed)
    if head_dim % HEAD_DIM_STEP or not HEAD_DIM_STEP <= head_dim <= MAX_HEAD_DIM:
        raise config.error("head_dim", allowed, head_dim)
    return head_dim


def _dtype(config: _Fields) -> DTypeName | None:
    """Returns the dtype, under its name of today or of before transformers 4.56."""
    found: str | None = None
    for name in ("dtype", "torch_dtype"):
        value = config.values.get(name)
        if value is None:
            continue
        text = value.removeprefix("torch.") if isinstance(value, str) else None
        if text not in DTYPES:
            raise config.error(name, f"one of {', '.join(DTYPES)}")
        if found is not None and text != found:
            raise config.error(name, f'the same as dtype = "{found}"')
        found = text
    return cast("DTypeName | None", found)


def _rope(config: _Fields, max_positions: int) -> RopeConfig:
    """Returns the rotary embedding, in the spelling of transformers 5 or the one before.

    Today: {"rope_parameters": {"rope_type", "rope_theta", ...}}. Before: "rope_theta" beside
    {"rope_scaling": {"rope_type" or "type", ...}}, with null for the default type.
    """
    scaling = config.object("rope_scaling")
    parameters = config.object("rope_parameters")
    if scaling is not None and parameters is not None:
        raise config.error("rope_scaling", "absent where there are rope_parameters")
    theta = config.number("rope_theta", 1.0, 1e12, default=10000.0)
    rope = scaling or parameters
    if rope is None:
        return RopeConfig("default", theta)
    name = "rope_type" if rope.has("rope_type") or not rope.has("type") else "type"
    kind = rope.values.get(name)
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise rope.error(name, f"one of {', '.join(ROPE_TYPES)}")
    if rope.has("rope_theta"):
        own_theta = rope.number("rope_theta", 1.0, 1e12)
        if config.has("rope_theta") and own_theta != theta:
            raise rope.error("rope_theta", f"the same as the outer rope_theta = {theta:g}")
        theta = own_theta
    for fields in (config, rope):
        if fields.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
            raise fields.error("partial_rotary_factor", "1: partial rotation is not supported")
    if kind == "default":
        return RopeConfig("default", theta)
    low = rope.number("low_freq_factor", 1e-3, 1e6)
    high = rope.number("high_freq_factor", 1e-3, 1e6)
    if high <= low:
        raise rope.error("high_freq_factor", f"above low_freq_factor = {low:g}")
    return RopeConfig(
        "llama3",
        theta,
        factor=rope.number("factor", 1.0, 1e6),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", 1, max_positions
        ),
    )


def _eos_token_ids(config: _Fields, generation: _Fields | None, vocab_size: int) -> tuple[int, ...]:
    """Returns generation_config.json's end-of-sequence ids, else those of config.json."""
    source = config
    if generation is not None and generation.has("eos_token_id"):
        source = generation
    value = source.values.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    allowed = f"an integer in [0, {vocab_size - 1}] or a list of at most {MAX_EOS_IDS} of them"
    if len(ids) > MAX_EOS_IDS:
        raise source.error("eos_token_id", allowed)
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise source.error("eos_token_id", allowed)
        if not 0 <= token_id < vocab_size:
            raise source.error("eos_token_id", allowed)
    return tuple(dict.fromkeys(ids))


def _default_sampling(generation: _Fields | None) -> DefaultSampling:
    if generation is None:
        return DefaultSampling()
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k")
        if (value := generation.values.get(name)) is not None
    }
    try:
        params = SamplingParams(**given)  # type: ignore[arg-type]  # checked there
    except RequestError as error:
        raise ConfigError(
            path=generation.path, field=error.field, value=error.value, allowed=error.allowed
        ) from None
    if not generation.boolean("do_sample", True):
        return DefaultSampling(temperature=0.0)
    return DefaultSampling(**{name: getattr(params, name) for name in given})
