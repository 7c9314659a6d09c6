# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Which weights of a checkpoint are quantised, as ModelOpt writes it down.

A checkpoint says so in config.json's quantization_config, in hf_quant_config.json, or in both. The
one format that is read is NVFP4 (docs/quantization.md); everything else is refused by name.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterable
from typing import Final

from mrv1.config_fields import Fields

QUANT_CONFIG_NAME: Final = "hf_quant_config.json"
NVFP4: Final = "NVFP4"
# Columns that share a scale.
NVFP4_BLOCK: Final = 16
# What a list of modules is of.
MODULE_NAME: Final = "the name of a module, in which * stands for any characters"
_METHODS: Final = ("modelopt", "modelopt_fp4")
_WEIGHT: Final = ".weight"
# Of a list; every matrix is compared with those that have wildcards.
_MAX_NAMES: Final = 20_000


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Matrices of linear layers are NVFP4, but for those of some modules.

    Attributes:
        exclude: Names of modules that are not quantised, nor those inside of them, with the
            wildcards of `fnmatch`: `*` stands for any characters.
    """

    exclude: tuple[str, ...] = ()

    def covers(self, tensor: str) -> bool:
        """Whether the matrix of this name is quantised, if it is one of a linear layer."""
        module = tensor.removesuffix(_WEIGHT)
        ends = [place for place, mark in enumerate(module) if mark == "."]
        around = [module[:end] for end in (*ends, len(module))]
        return not any(name in self._names or self._wild.match(name) for name in around)

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.exclude)

    @functools.cached_property
    def _wild(self) -> re.Pattern[str]:
        """Matches what an entry with wildcards names: one expression, as lists may be long."""
        wild = [fnmatch.translate(name) for name in self.exclude if set("*?[") & set(name)]
        return re.compile("|".join(wild) or r"(?!)")


# Of models with random weights: what `mrv1 quantize` would quantise.
RANDOM_NVFP4: Final = Quantization(("lm_head",))


def is_module_name(name: object) -> bool:
    """Whether it may stand in a list of modules that are not quantised: as `MODULE_NAME` says."""
    return isinstance(name, str) and name != "" and not name.startswith("re:")


def nvfp4_tensors(name: str) -> dict[str, str]:
    """The tensors of a quantised matrix `<module>.weight`: what each is, and its name."""
    module = name.removesuffix(_WEIGHT)
    return {
        "nvfp4_codes": name,
        "nvfp4_block_scales": f"{name}_scale",
        "nvfp4_global_scale": f"{name}_scale_2",
        "nvfp4_input_scale": f"{module}.input_scale",
    }


def read_quantization(config: Fields, quant_config: Fields | None) -> Quantization | None:
    """Reads which weights are quantised; None where all are plain.

    Args:
        config: config.json.
        quant_config: hf_quant_config.json, if there is one.

    Raises:
        ConfigError: The files disagree, or ask for what is not supported.
    """
    found = [
        _read_section(section)
        for section in (
            config.object("quantization_config"),
            None if quant_config is None else quant_config.object("quantization"),
        )
        if section is not None
    ]
    if not found:
        return None
    first = found[0]
    if len(found) == 2 and (first is None) != (found[1] is None):
        assert quant_config is not None
        raise quant_config.error(
            "quantization", "of the same quant_algo as config.json's quantization_config"
        )
    if first is None:
        return None
    return Quantization(tuple(dict.fromkeys(name for each in found if each for name in each)))


def _read_section(fields: Fields) -> list[str] | None:
    """Returns the names of the modules that are not quantised; None where none is."""
    nested = fields.object("quantization")
    if nested is not None:
        fields = nested
    algorithm = fields.values.get("quant_algo")
    has_cache = fields.has("kv_cache_scheme") or fields.has("kv_cache_quant_algo")
    _check_kv_cache(fields)
    if algorithm is None and not fields.values.get("config_groups") and has_cache:
        return None
    method = fields.values.get("quant_method")
    if method is not None and method not in _METHODS:
        raise fields.error("quant_method", f"{' or '.join(_METHODS)}, the formats that are read")
    if algorithm != NVFP4:
        raise fields.error("quant_algo", f'"{NVFP4}", the one format of weights that is read')
    fields.integer("group_size", NVFP4_BLOCK, NVFP4_BLOCK, default=NVFP4_BLOCK)
    groups = fields.object("config_groups")
    for name in groups.values if groups is not None else ():
        assert groups is not None
        _check_group(groups, name)
    return [*_names(fields, "exclude_modules"), *_names(fields, "ignore")]


def _check_group(groups: Fields, name: str) -> None:
    group = groups.object(name)
    if group is None:
        return
    if group.has("targets") and group.values["targets"] != ["Linear"]:
        raise group.error("targets", '["Linear"]')
    weights = group.object("weights")
    if weights is None:
        raise group.error("weights", "an object")
    weights.integer("num_bits", 4, 4)
    weights.expect("type", "float")
    weights.integer("group_size", NVFP4_BLOCK, NVFP4_BLOCK, default=NVFP4_BLOCK)


def _check_kv_cache(fields: Fields) -> None:
    """Scales of an FP8 KV cache are taken (mrv1.kv_scales); other caches are refused."""
    fields.expect("kv_cache_quant_algo", "FP8")
    scheme = fields.object("kv_cache_scheme")
    if scheme is not None:
        scheme.integer("num_bits", 8, 8)
        scheme.expect("type", "float")
        scheme.expect("symmetric", True)


def _names(fields: Fields, name: str) -> Iterable[str]:
    value = fields.values.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > _MAX_NAMES:
        raise fields.error(name, f"a list of at most {_MAX_NAMES} names of modules")
    for place, entry in enumerate(value):
        if not is_module_name(entry):
            raise fields.error(f"{name}[{place}]", MODULE_NAME, entry)
    return value
