"""Checkpoints of integer codes: GPTQ, AWQ and compressed-tensors, packed here by their specifications."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, UnsupportedError
from llmfast.export.packed_checkpoint import read_packing
from llmfast.export.stage import export
from llmfast.graph.model import OnnxModel
from llmfast.infer.engine import Engine

GROUP = 32
PROMPT = np.random.default_rng(1).integers(0, 259, 24)
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
    "gptq-8": {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": False, "sym": False},
    "gptq-v2-symmetric": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": True,
        "checkpoint_format": "gptq_v2",
    },
    "gptq-channel": {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "compressed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True},
            }
        },
    },
}
CONFIGS["compressed-asymmetric"] = json.loads(json.dumps(CONFIGS["compressed"]))
CONFIGS["compressed-asymmetric"]["config_groups"]["group_0"]["weights"]["symmetric"] = False


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes along the last axis into int32 words, one after the other from the lowest bit."""
    per_word = 32 // bits
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // per_word), np.uint64)
    for index in range(codes.shape[-1]):
        shifted = codes[..., index].astype(np.uint64) << np.uint64(bits * (index % per_word))
        words[..., index // per_word] |= shifted
    return words.astype(np.uint32).view(np.int32)


def _pack_awq(codes: np.ndarray) -> np.ndarray:
    """AutoAWQ's order: nibble i of a word is column order[i]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return _pack(codes.reshape(len(codes), -1, 8)[:, :, order].reshape(codes.shape), 4)


def _quantize(name: str, weight: np.ndarray, config: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the stored tensors of a layer `[N, K]`, and the weight that they stand for."""
    rows, features = weight.shape
    weights = config.get("config_groups", {}).get("group_0", {}).get("weights", config)
    bits = weights.get("bits", weights.get("num_bits"))
    group = features if weights["group_size"] == -1 else GROUP
    middle = 1 << (bits - 1)
    rng = np.random.default_rng(len(name))
    blocks = weight.reshape(rows, -1, group)
    scales = (np.abs(blocks).max(-1) / (middle - 1)).astype(np.float16)
    zeros = np.full(scales.shape, middle)
    if not weights.get("sym", weights.get("symmetric", False)):
        zeros = rng.integers(middle - 2, middle + 3, scales.shape)
    codes = np.rint(blocks / scales.astype(np.float32)[..., None]) + zeros[..., None]
    codes = np.clip(codes, 0, 2 * middle - 1).astype(np.int64)
    value = ((codes - zeros[..., None]) * scales.astype(np.float32)[..., None]).reshape(rows, features)
    codes = codes.reshape(rows, features)
    if config["quant_method"] == "gptq":
        stored_zeros = zeros - (0 if config.get("checkpoint_format") == "gptq_v2" else 1)
        tensors = {
            "qweight": _pack(codes, bits).T,
            "qzeros": _pack(stored_zeros.T, bits),
            "scales": scales.T,
            "g_idx": (np.arange(features) // group).astype(np.int32),
        }
    elif config["quant_method"] == "awq":
        tensors = {"qweight": _pack_awq(codes.T), "qzeros": _pack_awq(zeros.T), "scales": scales.T}
    else:
        tensors = {
            "weight_packed": _pack(codes, bits),
            "weight_scale": scales,
            "weight_shape": np.array(weight.shape, np.int64),
        }
        if not weights["symmetric"]:
            tensors["weight_zero_point"] = _pack(zeros.T, bits).T
    return {f"{name}.{part}": np.ascontiguousarray(tensor) for part, tensor in tensors.items()}, value


@pytest.fixture
def packed(checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[[str], tuple[Path, Any]]:
    """Return a function that makes a checkpoint of codes, and the PyTorch model that it stands for."""

    def make(kind: str) -> tuple[Path, Any]:
        source, folder = checkpoints("llama-biases"), tmp_path / kind
        folder.mkdir()
        model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
        tensors = load_file(source / "model.safetensors")
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name != "lm_head":
                    stored, value = _quantize(name, tensors.pop(f"{name}.weight"), CONFIGS[kind])
                    tensors |= stored
                    module.weight.copy_(torch.from_numpy(value))
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[kind]}))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((source / name).read_bytes())
        return folder, model

    return make


@pytest.mark.parametrize("kind", CONFIGS)
def test_codes_are_taken_over_exactly(kind: str, packed: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder, model = packed(kind)
    bundle = export(str(folder), tmp_path / "bundle")
    assert bundle.manifest.measured["export"]["parity"]["max_abs_diff"] < 1e-3
    graph = OnnxModel.load(bundle.model).proto.graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 2 * 5  # qkv, o, gate, up, down
    assert all(attribute.i == 4 for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level")
    with torch.inference_mode():
        expected = model(torch.from_numpy(PROMPT)[None]).logits[0].numpy()
    actual = Engine(bundle, threads=1, max_length=64).score(PROMPT)
    assert np.abs(actual - expected).mean() < 0.02 * np.abs(expected).max()  # activations in 8 bits
    assert bundle.manifest.architecture["num_parameters"] == sum(one.numel() for one in model.parameters())
    assert bundle.manifest.bits_per_weight < 32


def test_act_order_is_refused(packed: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = packed("gptq")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.g_idx"
    save_file(tensors | {name: np.ascontiguousarray(tensors[name][::-1])}, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"up_proj`: quantized with act-order"):
        export(str(folder), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_tensors_that_do_not_fit_are_refused(packed: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = packed("compressed")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file(tensors | {name: np.ascontiguousarray(tensors[name][:-1])}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"up_proj`: 96 x 64 codes"):
        export(str(folder), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "3 bits"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "gemv"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "float-quantized"),
        ({"quant_method": "gptq"}, "bits"),
    ],
)
def test_other_forms_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        read_packing(settings, "model")


def test_the_bundle_says_that_it_is_quantized(packed: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = packed("awq")
    export(str(folder), tmp_path / "bundle")
    step = ModelBundle.open(tmp_path / "bundle").manifest.lineage[0]
    assert step.options["packing"] == {"method": "awq", "bits": 4, "group_size": GROUP}
