# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Checkpoints with NVFP4 weights: what their configs say, making them, and running them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from model_files import LLAMA, Json, safetensors_bytes, write_model
from mrv1 import LLM, SamplingParams, bench, cli, shapes
from mrv1.config import ModelConfig
from mrv1.errors import ConfigError, InvalidArgumentError, WeightError
from mrv1.loader import RunnerOptions, wire_model
from mrv1.quantization import RANDOM_NVFP4, Quantization
from mrv1.quantize import quantize_checkpoint
from mrv1.random_model import random_runner, save_random_model
from mrv1.runner import make_row_spec
from mrv1.safetensors_reader import read_checkpoint

# Small, and every size of each rank a multiple of 16 for two ranks.
SMALL: Json = {
    **LLAMA,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
MOE: Json = {
    **SMALL,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rope_scaling": None,
}
NVFP4: Json = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
PROMPTS = [[5, 9, 2, 44, 17], [301, 7], list(range(20, 60))]


def read_tensor(root: Path, name: str) -> np.ndarray:
    """A tensor of a checkpoint in its own dtype."""
    info = read_checkpoint(root)[name]
    kinds: dict[str, Any] = {
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "U8": np.uint8,
        "F32": np.float32,
    }
    with info.path.open("rb") as file:
        file.seek(info.offset)
        return np.frombuffer(file.read(info.nbytes), kinds[info.dtype]).reshape(info.shape)


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint of one file, with changes to {name: (dtype, shape, bytes)}."""
    shutil.copytree(source, target)
    tensors = {
        name: [info.dtype, list(info.shape), read_tensor(source, name).tobytes()]
        for name, info in read_checkpoint(source).items()
    }
    change(tensors)
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        span = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        data += raw
    (target / "model.safetensors").write_bytes(safetensors_bytes(header, data))
    return target


def dequantised(source: Path, target: Path) -> Path:
    """The plain checkpoint whose float32 weights are those of one in NVFP4."""

    def change(tensors: dict[str, Any]) -> None:
        for name in [each for each in tensors if each.endswith(".weight_scale")]:
            name = name.removesuffix("_scale")
            codes = read_tensor(source, name)
            values = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)
            wide = values.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
            wide = wide * np.repeat(read_tensor(source, f"{name}_scale").astype(np.float32), 16, 1)
            wide = wide * read_tensor(source, f"{name}_scale_2")
            tensors[name] = ["F32", list(wide.shape), wide.astype(np.float32).tobytes()]
            for extra in ("_scale", "_scale_2"):
                del tensors[name + extra]
            del tensors[name.removesuffix("weight") + "input_scale"]

    rewrite(source, target, change)
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    write_model(target, {**config, "torch_dtype": "float32"})
    (target / "hf_quant_config.json").unlink()
    return target


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "plain", SMALL, seed=3)


@pytest.fixture(scope="module")
def quantised(plain: Path) -> Path:
    target = plain.parent / "nvfp4"
    quantize_checkpoint(plain, target, progress=False)
    return target


@pytest.fixture(scope="module")
def experts(plain: Path) -> tuple[Path, Path]:
    """A model with experts in NVFP4, and its dequantised weights."""
    root = save_random_model(plain.parent / "experts", MOE, seed=5)
    quantize_checkpoint(root, plain.parent / "experts_nvfp4", progress=False)
    wide = dequantised(plain.parent / "experts_nvfp4", plain.parent / "experts_wide")
    return plain.parent / "experts_nvfp4", wide


def greedy(model: Path, **options: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with LLM(model, max_num_seqs=4, num_kv_blocks=40, progress=False, **options) as llm:
        results = llm.generate(PROMPTS, params)
    return [list(result.token_ids) for result in results]


# --- which weights are quantised ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "covered", "left"),
    [
        ((), ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"], []),
        (("lm_head",), ["model.lm_head.weight", "lm_heads.weight"], ["lm_head.weight"]),
        (
            ("model.layers.1.*",),
            ["model.layers.11.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"],
            ["model.layers.1.mlp.up_proj.weight"],
        ),
        (("model.layers.0*",), ["model.layers.1.a.weight"], ["model.layers.0.self_attn.q.weight"]),
        (("*.mlp.gate",), ["l.0.mlp.gate_proj.weight"], ["l.0.mlp.gate.weight"]),
        # A module excludes all that is inside of it.
        (("l.0.self_attn",), ["l.0.self_attn_2.q.weight"], ["l.0.self_attn.q.weight"]),
        # Dots are dots.
        (("l.0.q",), ["lx0.q.weight"], ["l.0.q.weight"]),
    ],
)
def test_patterns_name_modules(
    exclude: tuple[str, ...], covered: list[str], left: list[str]
) -> None:
    quantization = Quantization(exclude)
    assert all(map(quantization.covers, covered))
    assert not any(map(quantization.covers, left))


def formats(config: ModelConfig) -> dict[str, bool]:
    program = wire_model(config, "bfloat16", fusion=False)
    return {
        weight[0]: is_nvfp4
        for weight, is_nvfp4 in zip(program.weights, program.weight_is_nvfp4, strict=True)
    }


@pytest.mark.parametrize("place", ["config", "own file", "both"])
def test_both_files_are_read(tmp_path: Path, place: str) -> None:
    config = dict(SMALL)
    if place != "own file":
        config["quantization_config"] = {**NVFP4, "ignore": ["lm_head", "*.layers.0.self_attn*"]}
    root = write_model(tmp_path, config)
    if place != "config":
        section = {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head", "model.layers.0.self_attn.*"],
        }
        text = json.dumps({"producer": {"name": "modelopt"}, "quantization": section})
        (root / "hf_quant_config.json").write_text(text)
    found = formats(ModelConfig.from_dir(root))
    assert {name for name, is_nvfp4 in found.items() if is_nvfp4} == {
        "model.layers.0.mlp.gate_proj.weight+model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight+model.layers.1.self_attn.k_proj.weight"
        "+model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.gate_proj.weight+model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }


WEIGHTS = {"num_bits": 4, "type": "float", "group_size": 16}


@pytest.mark.parametrize(
    ("change", "field", "allowed"),
    [
        ({"quant_algo": "FP8"}, "quant_algo", '"NVFP4", the one format'),
        ({"quant_algo": "W4A8_AWQ"}, "quant_algo", '"NVFP4", the one format'),
        ({"quant_algo": "MIXED_PRECISION"}, "quant_algo", '"NVFP4", the one format'),
        ({"quant_algo": None}, "quant_algo", '"NVFP4", the one format'),
        ({"quant_method": "compressed-tensors"}, "quant_method", "modelopt or"),
        ({"quant_method": "fp8", "quant_algo": None}, "quant_method", "modelopt or"),
        ({"group_size": 32}, "group_size", r"an integer in \[16, 16\]"),
        ({"ignore": "lm_head"}, "ignore", "a list of at most 20000 names of modules"),
        ({"ignore": ["lm_head", 3]}, r"ignore\[1\]", "the name of a module"),
        ({"exclude_modules": ["re:.*"]}, r"exclude_modules\[0\]", "the name of a module"),
        ({"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo", '"FP8"'),
        ({"kv_cache_scheme": {"num_bits": 4}}, "kv_cache_scheme.num_bits", "8"),
        (
            {"config_groups": {"g": {"weights": {**WEIGHTS, "num_bits": 8}}}},
            "config_groups.g.weights.num_bits",
            r"an integer in \[4, 4\]",
        ),
        (
            {"config_groups": {"g": {"weights": WEIGHTS, "targets": ["q_proj"]}}},
            "config_groups.g.targets",
            "Linear",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    tmp_path: Path, change: Json, field: str, allowed: str
) -> None:
    root = write_model(tmp_path, {**SMALL, "quantization_config": {**NVFP4, **change}})
    with pytest.raises(ConfigError, match=f"quantization_config.{field}.*must be.*{allowed}"):
        ModelConfig.from_dir(root)


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    root = write_model(tmp_path, {**SMALL, "quantization_config": NVFP4})
    section = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    (root / "hf_quant_config.json").write_text(json.dumps({"quantization": section}))
    with pytest.raises(ConfigError, match=r"hf_quant_config.json.*same quant_algo"):
        ModelConfig.from_dir(root)


def test_a_matrix_is_excluded_whole_and_has_whole_blocks() -> None:
    config = ModelConfig.from_values(SMALL)

    def wired(exclude: tuple[str, ...], **values: Any) -> None:
        changed = dataclasses.replace(config, **values, quantization=Quantization(exclude))
        wire_model(changed, "bfloat16")

    with pytest.raises(ConfigError, match=r"k_proj.weight is excluded .*q_proj.weight is not"):
        wired(("*.k_proj",))
    with pytest.raises(ConfigError, match=r"down_proj.weight has 104 columns"):
        wired(("lm_head",), intermediate_size=104)
    wired(("lm_head", "*.down_proj"), intermediate_size=104)


# --- making one -----------------------------------------------------------------------------------


def test_a_quantised_checkpoint_is_laid_out_as_modelopt_does(plain: Path, quantised: Path) -> None:
    old, new = read_checkpoint(plain), read_checkpoint(quantised)
    name = "model.layers.1.mlp.down_proj.weight"
    rows, cols = old[name].shape
    assert (new[name].dtype, new[name].shape) == ("U8", (rows, cols // 2))
    assert (new[f"{name}_scale"].dtype, new[f"{name}_scale"].shape) == (
        "F8_E4M3",
        (rows, cols // 16),
    )
    for scale in (f"{name}_scale_2", "model.layers.1.mlp.down_proj.input_scale"):
        assert (new[scale].dtype, new[scale].shape) == ("F32", ())
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert new[name].dtype == "BF16"
        np.testing.assert_array_equal(read_tensor(plain, name), read_tensor(quantised, name))
    assert len(new) == len(old) + 3 * 14
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (quantised / file).read_bytes() == (plain / file).read_bytes()
    section = json.loads((quantised / "hf_quant_config.json").read_text())["quantization"]
    assert section["quant_algo"] == "NVFP4" and section["group_size"] == 16
    assert {"lm_head", "model.embed_tokens"} <= set(section["exclude_modules"])
    config = json.loads((quantised / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "NVFP4" and config["ignore"] == section["exclude_modules"]


def test_fused_projections_share_their_global_scale(plain: Path, quantised: Path) -> None:
    for layer in (0, 1):
        for group in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            parent, parts = group
            names = [f"model.layers.{layer}.{parent}.{part}_proj.weight" for part in parts]
            scales = {float(read_tensor(quantised, f"{name}_scale_2")) for name in names}
            largest = max(
                np.abs(read_tensor(plain, name).astype(np.float32)).max() for name in names
            )
            assert scales == {float(np.float32(largest) / np.float32(2688))}


def test_the_report_tells_each_error(plain: Path, quantised: Path) -> None:
    reports = json.loads((quantised / "nvfp4_report.json").read_text())
    assert len(reports) == 14
    again = dequantised(quantised, quantised.parent / "wide")
    for report in reports:
        before = read_tensor(plain, report["name"]).astype(np.float64)
        errors = read_tensor(again, report["name"]).astype(np.float64) - before
        relative = np.sqrt((errors**2).sum() / (before**2).sum())
        assert report["relative_error"] == pytest.approx(relative, rel=1e-5)
        assert report["largest_error"] == pytest.approx(np.abs(errors).max(), rel=1e-5)
        assert 0.05 < relative < 0.12


def test_command(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "deep" / "nvfp4"
    arguments = ["quantize", str(plain), str(target), "--format", "nvfp4", "--no-progress"]
    assert cli.main([*arguments, "--exclude", "*.layers.0.*"]) == 0
    out = capsys.readouterr().out
    assert "7 matrices in NVFP4" in out and "model.layers.1.mlp.down_proj.weight" in out
    assert read_checkpoint(target)["model.layers.0.mlp.down_proj.weight"].dtype == "BF16"
    assert ModelConfig.from_dir(target).quantization is not None
    assert cli.main(arguments) == 1
    assert "must be new or empty" in capsys.readouterr().err
    again = ["quantize", str(target), str(tmp_path / "again"), "--format", "nvfp4"]
    assert cli.main(again) == 1
    assert "must be a checkpoint with plain weights" in capsys.readouterr().err


def test_large_checkpoints_are_written_in_several_files(
    plain: Path, quantised: Path, tmp_path: Path
) -> None:
    # Two scales of the cache, which the new checkpoint keeps as they are.
    def add_scales(tensors: dict[str, Any]) -> None:
        for layer in (0, 1):
            for side in "kv":
                name = f"model.layers.{layer}.self_attn.{side}_proj.{side}_scale"
                tensors[name] = ["F32", [], np.float32(0.5).tobytes()]

    source = rewrite(plain, tmp_path / "source", add_scales)
    scheme = {"num_bits": 8, "type": "float", "dynamic": False}
    write_model(source, {**SMALL, "quantization_config": {"kv_cache_scheme": scheme}})
    target = tmp_path / "target"
    quantize_checkpoint(source, target, shard_bytes=30_000, progress=False)
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 2
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == scheme
    section = json.loads((target / "hf_quant_config.json").read_text())["quantization"]
    assert section["kv_cache_quant_algo"] == "FP8"
    one, several = read_checkpoint(quantised), read_checkpoint(target)
    assert one.keys() < several.keys()
    for name in one:
        raw = [read_tensor(root, name).tobytes() for root in (quantised, target)]
        assert raw[0] == raw[1]
    assert greedy(target, device="cpu") == greedy(quantised, device="cpu")
    greedy(target, device="cpu", kv_cache_dtype="fp8_e4m3")


def test_what_fails_leaves_nothing_behind(plain: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        dtype, shape, raw = tensors["model.layers.1.mlp.down_proj.weight"]
        values = np.frombuffer(raw, ml_dtypes.bfloat16).copy()
        values[7] = np.nan
        tensors["model.layers.1.mlp.down_proj.weight"] = [dtype, shape, values.tobytes()]

    source = rewrite(plain, tmp_path / "spoilt", spoil)
    with pytest.raises(WeightError, match=r"layers.1.mlp.down_proj.weight.*not finite"):
        quantize_checkpoint(source, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


@pytest.mark.parametrize(
    "shape", [[64, 80], [32, 96], [0, 96], [64, 0], None], ids=["cols", "rows", "0", "no", "gone"]
)
def test_a_source_must_fit_its_config(plain: Path, tmp_path: Path, shape: list[int] | None) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def change(tensors: dict[str, Any]) -> None:
        del tensors[name]
        if shape is not None:
            tensors[name] = ["BF16", shape, bytes(2 * math.prod(shape))]

    source = rewrite(plain, tmp_path / "source", change)
    with pytest.raises(WeightError, match=name):
        quantize_checkpoint(source, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "exclude", ["lm_head", [""], ["re:.*"], [3], ["model.layers.0.mpl"]], ids=str
)
def test_what_is_excluded_must_be_modules_of_the_model(
    plain: Path, tmp_path: Path, exclude: Any
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"exclude = .*module"):
        quantize_checkpoint(plain, tmp_path / "out", exclude=exclude, progress=False)
    assert not list(tmp_path.iterdir())


def test_experts_that_are_excluded_are_not_listed_one_by_one(
    experts: tuple[Path, Path], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    quantize_checkpoint(
        experts[0].parent / "experts", target, exclude=["*.experts"], progress=False
    )
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
    excluded = json.loads((target / "config.json").read_text())["quantization_config"]["ignore"]
    assert sorted(excluded) == sorted(["*.experts", "lm_head", "model.embed_tokens", *routers])
    assert greedy(target, device="cpu")


def test_a_target_may_be_a_link_to_a_directory(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    quantize_checkpoint(plain, tmp_path / "link", progress=False)
    assert ModelConfig.from_dir(tmp_path / "real").quantization is not None
    with pytest.raises(InvalidArgumentError, match="target = ''"):
        quantize_checkpoint(plain, "", progress=False)


# --- running one ----------------------------------------------------------------------------------


def test_tokens_are_those_of_the_dequantised_weights(device: str, quantised: Path) -> None:
    wide = quantised.parent / "dequantised"
    if not wide.exists():
        dequantised(quantised, wide)
    expected = greedy(wide, device=device, dtype="float32")
    assert greedy(quantised, device=device, dtype="float32") == expected


def test_experts_are_quantised_and_routers_are_not(device: str, experts: tuple[Path, Path]) -> None:
    quantised, wide = experts
    tensors = read_checkpoint(quantised)
    assert tensors["model.layers.1.mlp.experts.5.down_proj.weight"].dtype == "U8"
    assert tensors["model.layers.1.mlp.gate.weight"].dtype == "BF16"
    section = json.loads((quantised / "hf_quant_config.json").read_text())["quantization"]
    assert "model.layers.0.mlp.gate" in section["exclude_modules"]
    expected = greedy(wide, device=device, dtype="float32")
    assert greedy(quantised, device=device, dtype="float32") == expected


@pytest.mark.parametrize(
    "ranks",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "expert_parallel": True},
        {"data_parallel_size": 2, "expert_parallel": True},
    ],
)
def test_ranks_share_quantised_experts(experts: tuple[Path, Path], ranks: dict[str, Any]) -> None:
    expected = greedy(experts[0], device="cpu", dtype="float32")
    assert greedy(experts[0], device="cpu", dtype="float32", **ranks) == expected


def test_ranks_give_the_tokens_of_one(quantised: Path) -> None:
    one = greedy(quantised, device="cpu", dtype="float32")
    for sizes in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        assert greedy(quantised, device="cpu", dtype="float32", **sizes) == one


def test_batch_invariant_ranks_have_the_bits_of_one(quantised: Path, tmp_path: Path) -> None:
    # Eight parts of whole blocks need sizes that are multiples of 128.
    with pytest.raises(InvalidArgumentError, match="no multiple of 128"):
        greedy(quantised, device="cpu", batch_invariant=True, tensor_parallel_size=2)
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 256}
    save_random_model(tmp_path / "plain", {**SMALL, **sizes})
    quantize_checkpoint(tmp_path / "plain", tmp_path / "nvfp4", progress=False)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1)
    found = []
    for ranks in (1, 2, 4):
        with LLM(
            tmp_path / "nvfp4",
            device="cpu",
            max_num_seqs=4,
            num_kv_blocks=40,
            batch_invariant=True,
            tensor_parallel_size=ranks,
            progress=False,
        ) as llm:
            found.append([result.logprobs for result in llm.generate(PROMPTS, params)])
    assert found[0] == found[1] == found[2]


def test_ranks_must_have_whole_blocks(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "plain", {**SMALL, "intermediate_size": 48})
    quantize_checkpoint(model, tmp_path / "nvfp4", progress=False)
    with pytest.raises(InvalidArgumentError, match=r"down_proj.weight is in NVFP4 and has 48 col"):
        greedy(tmp_path / "nvfp4", device="cpu", tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("weight_scale", None, r"o_proj.weight_scale.*is missing"),
        ("weight_scale_2", None, r"o_proj.weight_scale_2.*is missing"),
        ("input_scale", None, r"o_proj.input_scale.*is missing"),
        ("weight_scale", ("F8_E4M3", [64, 2]), r"weight_scale.*shape = \[64, 2\].*\[64, 4\]"),
        ("weight_scale_2", ("F32", [2]), r"weight_scale_2.*shape = \[2\].*\[\] or \[1\]"),
        ("weight_scale", ("U8", [64, 4]), r"weight_scale.*dtype = 'U8'.*F8_E4M3"),
        ("weight", ("U8", [64, 64]), r"o_proj.weight.*shape = \[64, 64\].*\[64, 32\]"),
        ("weight", ("I8", [64, 32]), r"o_proj.weight.*dtype = 'I8'.*U8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    quantised: Path, tmp_path: Path, name: str, entry: tuple[str, list[int]] | None, message: str
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        full = f"model.layers.0.self_attn.o_proj.{name}"
        if entry is None:
            del tensors[full]
        else:
            dtype, shape = entry
            size = 4 if dtype == "F32" else 1
            tensors[full] = [dtype, shape, bytes(int(np.prod(shape)) * size)]

    with pytest.raises(WeightError, match=message):
        greedy(rewrite(quantised, tmp_path / "model", change), device="cpu")


def test_config_and_weights_must_agree_on_what_is_quantised(
    plain: Path, quantised: Path, tmp_path: Path
) -> None:
    config = json.loads((quantised / "config.json").read_text())
    copy = shutil.copytree(plain, tmp_path / "not_quantised")
    write_model(copy, config)
    with pytest.raises(WeightError, match=r"q_proj.weight': is not quantised, and exclude_modules"):
        greedy(copy, device="cpu")
    copy = shutil.copytree(quantised, tmp_path / "quantised")
    del config["quantization_config"]
    write_model(copy, config)
    (copy / "hf_quant_config.json").unlink()
    with pytest.raises(WeightError, match=r"q_proj.weight': is quantised, and the config says"):
        greedy(copy, device="cpu")


def test_the_plan_counts_what_nvfp4_takes(quantised: Path, plain: Path) -> None:
    sizes = []
    for model in (plain, quantised):
        with LLM(model, device="cpu", max_num_seqs=4, num_kv_blocks=40, progress=False) as llm:
            sizes.append(llm.engine.model.runner.memory_plans[0]["weights"])
    # 14 matrices of 64 to 192 rows, 4.5 bits instead of 16 and a scale a row.
    assert 0.3 < (sizes[0] - sizes[1]) / sizes[0] < 0.72


def test_the_demo_model_stays_itself(tmp_path: Path) -> None:
    target = tmp_path / "demo"
    reports = quantize_checkpoint(shapes.demo_model(), target, progress=False)
    assert max(report.relative_error for report in reports) < 0.12
    params = SamplingParams(temperature=0.0, max_tokens=12)
    texts = []
    for model in (shapes.demo_model(), target):
        with LLM(model, device="cpu", max_num_seqs=2, num_kv_blocks=40, progress=False) as llm:
            texts.append(llm.generate(["Once upon a time"], params)[0].text)
    assert texts[0][:8] == texts[1][:8]


# --- benchmarks -----------------------------------------------------------------------------------


def test_random_nvfp4_weights_have_the_spread_of_plain_ones() -> None:
    config = ModelConfig.from_values(SMALL)
    options = RunnerOptions(device="cpu", max_num_seqs=2, num_kv_blocks=20, force_tokens=True)
    spreads = []
    for quantization in (None, RANDOM_NVFP4):
        model = random_runner(dataclasses.replace(config, quantization=quantization), options)
        spec = make_row_spec(
            [5, 6, 7], SamplingParams(max_tokens=2), eos_token_ids=(), block_ids=[1, 2]
        )
        row, _ = model.runner.add_row(spec)
        model.runner.result(model.runner.execute([(row, 3)]))
        spreads.append(float(np.std(model.runner.logits(0))))
        model.close()
    assert 0.5 < spreads[1] / spreads[0] < 2


def test_costs_count_the_bytes_of_codes_and_scales() -> None:
    config = ModelConfig.from_values(SMALL)
    plain = bench.decode_costs(config, "bfloat16", 1, 16)
    small = bench.decode_costs(
        dataclasses.replace(config, quantization=RANDOM_NVFP4), "bfloat16", 1, 16
    )
    for before, after in zip(plain, small, strict=True):
        assert after.operations == before.operations
        if "_proj" in before.name:
            elements = before.read_bytes // 2
            rows = after.read_bytes - elements * 9 // 16
            assert 0 < rows <= 4 * 192 and rows % 4 == 0
        else:
            assert after == before


def test_bench_records_say_how_weights_are_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records.json"
    arguments = ["bench", "op", "--shape", "qwen3-0.6b", "--device", "cpu", "--read-mb", "1"]
    arguments += ["--ops", "o_proj", "--batch", "1", "--steps", "1", "--dtype", "bfloat16"]
    for weights in ("bf16", "nvfp4"):
        assert cli.main([*arguments, "--weights", weights, "--json", str(file)]) == 0
        (record,) = json.loads(file.read_text())
        assert record["weights"] == weights
    model = ["bench", "decode", "--model", str(tmp_path), "--weights", "nvfp4"]
    assert cli.main(model) == 1
    assert "--weights = 'nvfp4': must be left out" in capsys.readouterr().err


def test_accuracy_of_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(path))
    spec = importlib.util.spec_from_file_location("nvfp4_accuracy", path / "nvfp4_accuracy.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--stories", "2", "--requests", "2", "--json", str(tmp_path / "record.json")])
    (record,) = json.loads((tmp_path / "record.json").read_text())
    assert record["shape"] == "demo" and record["weights"] == "nvfp4"
    assert 1e-6 < record["kl_mean"] < 0.2 and record["same_top"] > 0.8
    assert 0.3 < record["kl_noise"] / record["kl_mean"] < 3
    assert 1 < record["perplexity_plain"] < record["perplexity"] * 1.05 < 10
