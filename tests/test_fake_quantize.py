"""Quantization-aware training sees the weights that `quantize` writes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoConfig, AutoModelForCausalLM

from llmfast.export.stage import export
from llmfast.graph.linear import find_embeddings, find_linears
from llmfast.graph.model import OnnxModel
from llmfast.quantize.calibrate import summarize
from llmfast.quantize.plan import choose_layers
from llmfast.quantize.rounding import gptq
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.tune.fake_quantize import FakeQuantizer, parse_scheme
from tests.conftest import SIZES
from tests.tiny_tune import losses, run, weights, write_text


def _load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _stored(bundle: Path) -> dict[str, np.ndarray]:
    """Read every quantized weight of a bundle back, float32 [N, K], by the stem of its initializers."""
    model = onnx.load(bundle / "model.onnx")
    tensors = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            settings = {one.name: one.i for one in node.attribute}
            bits, rows, size = settings["bits"], settings["N"], settings["block_size"]
            packed = tensors[node.input[1]].reshape(rows, -1)
            codes = _unpack(packed, bits).reshape(rows, -1, size).astype(np.float32)
            scales = tensors.get(node.input[2], tensors.get(f"{node.input[2]}.half")).astype(np.float32)
            zeros = np.float32(1 << (bits - 1))
            if len(node.input) > 3 and node.input[3]:
                zeros = _unpack(tensors[node.input[3]].reshape(rows, -1), bits)[:, : codes.shape[1], None]
            values = (codes - zeros) * scales.reshape(rows, -1, 1)
            found[node.input[1].rpartition(".weight_q")[0]] = values.reshape(rows, -1)[:, : settings["K"]]
        elif node.op_type == "MatMulIntegerToFloat":
            codes, scales = tensors[node.input[1]].astype(np.float32), tensors[node.input[3]]
            found[node.input[1].rpartition(".weight_q")[0]] = codes.T * scales[:, None]
    return found


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    places = packed[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)
    return (places & ((1 << bits) - 1)).reshape(len(packed), -1)


@pytest.mark.parametrize(
    ("architecture", "scheme", "settings"),
    [
        ("llama-tied", "int4", {"head_bits": "32"}),
        ("llama", "int4", {"block_size": "16", "symmetric": "true", "head_bits": "32"}),
        ("llama", "int2", {"block_size": "32", "head_bits": "32"}),
        ("gpt2", "int4", {"head_bits": "32"}),
        ("llama-tied", "int4", {}),
        ("llama-tied", "w8", {}),
        ("llama", "int8", {}),
    ],
)
def test_rounded_weights_are_those_that_quantize_writes(
    checkpoints: Callable[[str], Path], tmp_path: Path, architecture: str, scheme: str, settings: dict[str, str]
) -> None:
    source = checkpoints(architecture)
    model = _load(source)
    typed = ",".join(f"{key}={value}" for key, value in settings.items())
    quantizer = FakeQuantizer(model, parse_scheme(f"{scheme}:{typed}" if typed else scheme))
    quantizer.start(lambda: model(torch.arange(1, 49).reshape(3, 16)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with quantizer.rounded():
        assert any(not torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    quantizer.settle()
    rounded = model.state_dict()
    shutil.copytree(source, tmp_path / "tuned")
    model.save_pretrained(tmp_path / "tuned")
    export(str(tmp_path / "tuned"), tmp_path / "fp32")
    quantize(tmp_path / "fp32", tmp_path / "small", QuantizeOptions(scheme, settings=settings, measure=False))
    stored = _stored(tmp_path / "small")
    assert stored
    candidates = {name: tensor.numpy() for name, tensor in rounded.items() if tensor.ndim == 2}
    for name, wanted in stored.items():
        _find(wanted, name, candidates)


def _find(wanted: np.ndarray, name: str, candidates: dict[str, np.ndarray]) -> None:
    """Find a stored weight among the model's; one that the graph joined is found row by row."""
    rows = [one for array in candidates.values() for one in (array, array.T) if one.shape[1] == wanted.shape[1]]
    distances = [np.abs(np.concatenate(rows) - row).max(-1).min() for row in wanted]
    assert max(distances) <= 1e-6 * np.abs(wanted).max(), name  # the last digit of a scale that is no float16


def test_layers_are_those_that_quantize_chooses(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """As many parameters are on a grid in PyTorch as in the graph."""
    source = checkpoints("llama-tied")
    export(str(source), tmp_path / "fp32")
    plan = parse_scheme("int4")
    graph = OnnxModel.load(tmp_path / "fp32" / "model.onnx")
    layers = choose_layers(graph, plan, "", "")
    linears = find_linears(graph)
    shapes = {one.weight: one.shape for one in (*linears, *find_embeddings(graph, linears))}
    quantizer = FakeQuantizer(_load(source), plan)
    wanted = sum(np.prod(shapes[weight]) for weight in layers.grids)
    assert sum(target.parameter.numel() for target in quantizer._targets) == wanted


def test_training_starts_at_what_gptq_makes(checkpoints: Callable[[str], Path]) -> None:
    model = _load(checkpoints("llama"))
    layer = model.model.layers[0].mlp.up_proj
    weight, inputs = layer.weight.detach().numpy().copy(), []
    layer.register_forward_pre_hook(lambda _, seen: inputs.append(seen[0].detach().numpy()))
    plan = parse_scheme("int4:block_size=16,damping=0.02")
    quantizer = FakeQuantizer(model, plan)
    quantizer.start(lambda: [model(torch.arange(1, 33).reshape(2, 16) + shift) for shift in (0, 5)])
    tokens = np.concatenate([one.reshape(-1, one.shape[-1]) for one in inputs])
    statistics = summarize([tokens], gram=True)
    wanted = gptq.quantize_weight(weight, plan.grid, gptq.Options(damping=0.02), statistics, "up_proj").dequantize()
    assert (
        np.isclose(layer.weight.detach().numpy(), wanted, atol=1e-6).mean() > 0.99
    )  # sums differ in their last digits
    with quantizer.rounded():
        assert torch.isclose(layer.weight, torch.from_numpy(wanted), atol=1e-3).float().mean() > 0.99


def test_scales_follow_the_weights(checkpoints: Callable[[str], Path]) -> None:
    model = _load(checkpoints("llama"))
    quantizer = FakeQuantizer(model, parse_scheme("int4:block_size=16"))
    quantizer.start(lambda: model(torch.arange(1, 33)[None]))
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(1.03)
    with quantizer.rounded(follow=False):
        once = weight.detach().clone()
    with quantizer.rounded():
        torch.testing.assert_close(weight, once)
    torch.testing.assert_close(once, weight, atol=1e-3, rtol=1e-3)  # the same codes, larger scales
    assert all(len(torch.unique(block)) <= 16 for block in once.reshape(-1, 16))


def test_int8_rounds_activations_per_token_and_gradients_go_straight_through(
    checkpoints: Callable[[str], Path],
) -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layer = model.model.layers[0].mlp.down_proj
    quantizer = FakeQuantizer(model, parse_scheme("int8"))
    quantizer.start(lambda: model(torch.arange(1, 33)[None]))
    hidden = torch.randn(2, 3, 96, requires_grad=True)
    plain = layer(hidden)
    with quantizer.rounded():
        weight = layer.weight.detach().clone()
        found = layer(hidden)
        found.sum().backward()
    scale = hidden.detach().abs().amax(-1, keepdim=True) / 127
    wanted = (hidden.detach() / scale).round() * scale @ weight.T
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-5)
    torch.testing.assert_close(hidden.grad, weight.sum(0).expand_as(hidden), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(hidden), plain)  # and nothing is rounded afterwards


def test_training_repairs_what_rounding_breaks(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """Distilled with rounded weights, the student's int4 is nearer to its teacher than the teacher's own int4."""
    source, text = checkpoints("llama-tied"), write_text(tmp_path)
    options = {"teacher": str(source), "seq_len": 32, "batch_size": 8, "max_steps": 40, "learning_rate": 2e-3}
    tuned = run(source, tmp_path / "out", text, **options, quantize_aware="int4:head_bits=32")
    # It starts at GPTQ's weights, which are nearer than those rounded to nearest.
    first, last = tuned.figures["validations"][0], tuned.figures["validations"][-1]
    assert last["validation_loss"] < 0.7 * first["validation_loss"]
    assert weights(tmp_path / "out").keys() == weights(source).keys()
    assert losses(tmp_path / "out")[0] > losses(tmp_path / "out")[-1]


def test_an_average_begins_at_what_gptq_makes(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source, text = checkpoints("llama-tied"), write_text(tmp_path)
    options = {"seq_len": 32, "batch_size": 8, "max_steps": 1, "quantize_aware": "int4:head_bits=32"}
    plain, averaged = (
        run(source, tmp_path / f"out-{average}", text, **options, average=average, objective="causal-lm")
        for average in (0.0, 0.9)
    )
    assert averaged.figures["validations"][0] == plain.figures["validations"][0]
