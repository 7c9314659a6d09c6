# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The configuration of a model, read from a Hugging Face directory and checked.

Everything is checked here, once, with bounds that keep each product of sizes in 64 bits, so the
code that allocates by these numbers can trust them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, cast

from mrv1._files import FileError, parse_json, read_file
from mrv1.config_fields import Fields
from mrv1.errors import ConfigError, InvalidArgumentError, RequestError
from mrv1.quantization import QUANT_CONFIG_NAME, Quantization, read_quantization
from mrv1.rope import ROPE_TYPES, RopeConfig, RopeType, read_rope
from mrv1.sampling_params import SamplingParams

DTypeName = Literal["float32", "float16", "bfloat16"]

CONFIG_NAME: Final = "config.json"
GENERATION_CONFIG_NAME: Final = "generation_config.json"

DTYPES: Final = ("float32", "float16", "bfloat16")
LAYER_TYPES: Final = ("full_attention", "sliding_attention")

MAX_FILE_BYTES: Final = 4 << 20
MAX_JSON_VALUES: Final = 200_000
# What the sampler can draw from.
MAX_VOCAB_SIZE: Final = 2**20
MAX_HIDDEN_SIZE: Final = 2**20
MAX_INTERMEDIATE_SIZE: Final = 2**22
MAX_LAYERS: Final = 4096
MAX_HEADS: Final = 2**14
# Attention kernels take heads in whole vectors of 8, up to 256.
HEAD_DIM_STEP: Final = 8
MAX_HEAD_DIM: Final = 256
MAX_POSITIONS: Final = 2**24
MAX_EOS_IDS: Final = 256


def model_root(directory: str | os.PathLike[str], field: str = "model") -> Path:
    """Returns a model directory as a path, which may not exist.

    Args:
        directory: The path.
        field: What errors call it.

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
            field=field, value=directory, allowed="the path of a model directory"
        )
    return Path(path)


@dataclasses.dataclass(frozen=True)
class DefaultSampling:
    """Sampling parameters that generation_config.json recommends; None where it is silent.

    Attributes:
        temperature: 0 where the file says do_sample = false, which means greedy.
        top_p: As `SamplingParams`.
        top_k: As `SamplingParams`.
        min_p: As `SamplingParams`.
        repetition_penalty: As `SamplingParams`.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def params(self) -> SamplingParams:
        """The recommended parameters; those of `SamplingParams` where the file is silent."""
        return SamplingParams(
            **{name: value for name, value in vars(self).items() if value is not None}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model directory says about its model. Families may derive classes with more fields.

    Attributes:
        model_type: Family of the model, which chooses the wiring; filled in by it.
        architecture: Class name of the model in Hugging Face transformers; filled in by the family.
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
        windows: Positions that a token sees in each layer, itself included; 0 for all before it.
            Empty if no layer has a window.
        attention_bias: Whether the projections to queries, keys and values have a bias.
        attention_output_bias: Whether the projection behind attention has one.
        mlp_bias: Whether the MLP projections have one.
        dtype: Dtype the weights were made for, or None where the file does not say.
        eos_token_ids: Tokens that end a sequence, in the file's order, without repeats; may be
            empty.
        default_sampling: Recommended sampling parameters.
        quantization: Which matrices are stored in NVFP4; None if none is.
    """

    model_type: str = ""
    architecture: str = ""
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
    windows: tuple[int, ...] = ()
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    dtype: DTypeName | None = None
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: DefaultSampling = DefaultSampling()
    quantization: Quantization | None = None

    def window(self, layer: int) -> int:
        """Positions that a token sees in a layer, itself included; 0 for all before it."""
        return self.windows[layer] if self.windows else 0

    @property
    def mlp_sizes(self) -> dict[str, int]:
        """Widths that ranks share out, by name: of the MLPs that the model has."""
        return {"intermediate_size": self.intermediate_size}

    def for_length(self, max_length: int) -> ModelConfig:
        """Returns the config of a model whose sequences have at most so many tokens.

        longrope has one set of frequencies for models whose sequences may exceed the length of the
        first training, and one for those whose never do; all requests of a runner use the same.
        """
        return dataclasses.replace(self, rope=dataclasses.replace(self.rope, max_length=max_length))

    @classmethod
    def from_dir(cls, directory: str | os.PathLike[str]) -> ModelConfig:
        """Reads config.json and, where they are, generation_config.json and hf_quant_config.json.

        Raises:
            InvalidArgumentError: `directory` is no path.
            ConfigError: A file is missing, damaged, or asks for something that is not supported.
        """
        root = model_root(directory)
        if not root.is_dir():
            raise ConfigError("is not a directory", path=root)
        config = _load(root / CONFIG_NAME)
        generation, quant_config = (
            _load(root / name) if os.path.lexists(root / name) else None
            for name in (GENERATION_CONFIG_NAME, QUANT_CONFIG_NAME)
        )
        return _parse(config, generation, quant_config)

    @classmethod
    def from_values(cls, config: dict[str, object]) -> ModelConfig:
        """Checks the values of a config.json that is not in a file.

        Raises:
            ConfigError: They ask for something that is not supported.
        """
        return _parse(Fields(Path(CONFIG_NAME), config))


def _load(path: Path) -> Fields:
    try:
        value = parse_json(read_file(path, MAX_FILE_BYTES), MAX_JSON_VALUES)
    except FileError as problem:
        raise ConfigError(str(problem), path=path) from None
    if not isinstance(value, dict):
        raise ConfigError("does not hold a JSON object", path=path)
    return Fields(path, value)


def _parse(
    config: Fields, generation: Fields | None = None, quant_config: Fields | None = None
) -> ModelConfig:
    # The families are written in terms of this module.
    from mrv1.models import FAMILIES

    model_type = config.values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise config.error("model_type", f"one of {', '.join(FAMILIES)}")
    architectures = config.values.get("architectures")
    if not isinstance(architectures, list) or architectures != [family.architecture]:
        raise config.error("architectures", f'["{family.architecture}"]')
    quantization = read_quantization(config, quant_config)
    parsed = family.read(config)
    return dataclasses.replace(
        parsed,
        model_type=family.model_type,
        architecture=family.architecture,
        dtype=_dtype(config) or parsed.dtype,
        eos_token_ids=_eos_token_ids(config, generation, parsed),
        default_sampling=_default_sampling(generation),
        quantization=quantization,
    )


def read_config(
    fields: Fields,
    *,
    head_dim: int | None = None,
    tied: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    rope_types: tuple[RopeType, ...] = ROPE_TYPES,
    rope_aliases: Mapping[str, RopeType] | None = None,
    rope_theta: float = 10000.0,
    partial_rotary: bool = False,
) -> ModelConfig:
    """Reads what the configs of all families have in common.

    A family changes what is its own with `dataclasses.replace`, or puts the values into a class
    derived from `ModelConfig`: `OwnConfig(**vars(read_config(fields)), own_field=...)`.

    Args:
        fields: The config.json, or the object in it that describes the text model.
        head_dim: Width of a head where the file does not say; None shares hidden_size among heads.
        tied: tie_word_embeddings where the file does not say.
        activation: Field that names the activation of the MLP, and the one that is computed.
        rope_types: Types of rotary embedding that the family can have.
        rope_aliases: Other names of such types.
        rope_theta: Base of the frequencies where the file does not say.
        partial_rotary: Whether a part of a head may be rotated.

    Raises:
        ConfigError: A field is missing or holds what is not supported.
    """
    fields.expect(*activation)
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    hidden_size = fields.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    max_positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS)
    width = _head_dim(fields, head_dim, hidden_size, num_heads)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB_SIZE),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_INTERMEDIATE_SIZE),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=_num_key_value_heads(fields, num_heads),
        head_dim=width,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0),
        rope=read_rope(
            fields,
            width,
            max_positions,
            types=rope_types,
            aliases=rope_aliases,
            theta=rope_theta,
            partial=partial_rotary,
        ),
        max_position_embeddings=max_positions,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", tied),
        dtype=_dtype(fields),
    )


def read_sliding_layers(
    fields: Fields, count: int, default: Callable[[int], bool]
) -> tuple[bool, ...]:
    """Returns which of `count` layers have a window: by layer_types, else by `default`."""
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        return tuple(default(layer) for layer in range(count))
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != count
        or any(name not in LAYER_TYPES for name in layer_types)
    ):
        allowed = " or ".join(f'"{name}"' for name in LAYER_TYPES)
        raise fields.error("layer_types", f"{allowed} for each of {count} layers")
    return tuple(name == LAYER_TYPES[1] for name in layer_types)


def read_windows(
    fields: Fields, config: ModelConfig, sliding: Sequence[bool], window: int | None
) -> tuple[int, ...]:
    """Returns the window of each layer, 0 for those that see all positions; empty without any.

    Args:
        fields: What errors name.
        config: For the sizes.
        sliding: Which layers have a window.
        window: Positions that a token sees in them, itself included. A window that no sequence can
            exceed is none.
    """
    if window is None:
        if any(sliding):
            allowed = f'"full_attention" for each of {len(sliding)} layers without a sliding_window'
            raise fields.error("layer_types", allowed)
        return ()
    width = window if window < config.max_position_embeddings else 0
    windows = tuple(width if slides else 0 for slides in sliding)
    return windows if any(windows) else ()


def read_sliding_window(fields: Fields) -> int | None:
    """Returns sliding_window, None where it is missing or null."""
    if not fields.has("sliding_window"):
        return None
    return fields.integer("sliding_window", 1, MAX_POSITIONS)


def _num_key_value_heads(config: Fields, num_heads: int) -> int:
    count = config.integer("num_key_value_heads", 1, num_heads, default=num_heads)
    if num_heads % count:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads = {num_heads}")
    return count


def _head_dim(config: Fields, default: int | None, hidden_size: int, num_heads: int) -> int:
    if default is None and not config.has("head_dim"):
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


def _dtype(config: Fields) -> DTypeName | None:
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


def _eos_token_ids(
    config: Fields, generation: Fields | None, parsed: ModelConfig
) -> tuple[int, ...]:
    """Returns generation_config.json's end-of-sequence ids, else those of config.json."""
    source, vocab_size = config, parsed.vocab_size
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


def _default_sampling(generation: Fields | None) -> DefaultSampling:
    if generation is None:
        return DefaultSampling()
    given = {
        name: value
        for name in (field.name for field in dataclasses.fields(DefaultSampling))
        if (value := generation.values.get(name)) is not None
    }
    try:
        params = SamplingParams(**given)  # type: ignore[arg-type]  # checked there
    except RequestError as error:
        raise ConfigError(
            path=generation.path, field=error.field, value=error.value, allowed=error.allowed
        ) from None
    recommended = DefaultSampling(**{name: getattr(params, name) for name in given})
    if not generation.boolean("do_sample", True):
        # Greedy, from logits that a penalty edits all the same.
        return DefaultSampling(temperature=0.0, repetition_penalty=recommended.repetition_penalty)
    return recommended
