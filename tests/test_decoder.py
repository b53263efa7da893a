"""The direct route against PyTorch: every architecture, whole prompts, cached decode, batches."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmfast.bundle import ModelBundle
from llmfast.errors import GateError, UnsupportedError
from llmfast.export.architectures import describe
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.rotary import Rotary
from llmfast.export.stage import export
from llmfast.graph.model import OnnxModel
from tests.conftest import ARCHITECTURES, write_checkpoint

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(
    request: pytest.FixtureRequest, checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelBundle, torch.nn.Module]:
    source = checkpoints(request.param)
    bundle = export(str(source), tmp_path_factory.mktemp("exported") / "bundle")
    reference = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    return bundle, reference


def _run(session: onnxruntime.InferenceSession, ids: np.ndarray, past: list[np.ndarray], logits: int) -> list:
    names = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    total = past[0].shape[2] + ids.shape[1]
    feeds = {
        "input_ids": ids,
        "seqlens_k": np.full(len(ids), total - 1, np.int32),
        "total_sequence_length": np.array(total, np.int32),
        "num_logits": np.array([logits], np.int64),
    }
    return session.run(None, feeds | dict(zip(names, past, strict=True)))


def test_logits_match_pytorch_in_batches_and_step_by_step(exported: tuple[ModelBundle, torch.nn.Module]) -> None:
    bundle, reference = exported
    facts = bundle.manifest.architecture
    ids = np.random.default_rng(1).integers(3, facts["vocab_size"], (2, 40))
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    session = onnxruntime.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
    empty = np.zeros((2, facts["num_key_value_heads"], 0, facts["head_size"]), np.float32)

    whole, *_ = _run(session, ids, [empty] * (2 * facts["num_hidden_layers"]), 40)
    np.testing.assert_allclose(whole, expected, **TOLERANCE)

    last, *past = _run(session, ids[:, :30], [empty] * (2 * facts["num_hidden_layers"]), 1)
    np.testing.assert_allclose(last[:, 0], expected[:, 29], **TOLERANCE)
    for position in range(30, 40):
        step, *past = _run(session, ids[:, position : position + 1], past, 1)
        np.testing.assert_allclose(step[:, 0], expected[:, position], **TOLERANCE)


def test_manifest_tells_sizes_and_parity(exported: tuple[ModelBundle, torch.nn.Module]) -> None:
    bundle, reference = exported
    facts = bundle.manifest.architecture
    assert facts["num_parameters"] == sum(parameter.numel() for parameter in reference.parameters())
    assert facts["model_type"] == reference.config.model_type
    parity = bundle.manifest.measured["export"]["parity"]
    assert parity["argmax_agreement"] == 1.0
    assert 0 < parity["max_abs_diff"] < 1e-3
    assert bundle.manifest.bits_per_weight == 32


def test_tied_embedding_is_stored_once(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = export(str(checkpoints("llama-tied")), tmp_path / "bundle")
    model = OnnxModel.load(bundle.model)
    shape = [bundle.manifest.architecture["vocab_size"], bundle.manifest.architecture["hidden_size"]]
    assert [name for name, tensor in model.initializers.items() if sorted(tensor.dims) == sorted(shape)] == [
        "model.embed_tokens.weight"
    ]


def test_graph_keeps_the_contract(fp32_bundle: Path) -> None:
    graph = OnnxModel.load(ModelBundle.open(fp32_bundle).model).proto.graph
    assert [value.name for value in graph.input][:4] == [
        "input_ids",
        "seqlens_k",
        "total_sequence_length",
        "num_logits",
    ]
    operators = [node.op_type for node in graph.node]
    assert operators.count("GroupQueryAttention") == 2
    assert operators.count("MatMul") == 2 * 5  # packed QKV, output, gate, up, down
    assert "Concat" not in operators  # no cache is copied


def test_same_checkpoint_gives_the_same_bytes(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(str(checkpoints("qwen3")), tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_half_precision_weights_are_read(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        source = write_checkpoint(tmp_path / dtype, "llama", {})
        model = AutoModelForCausalLM.from_pretrained(source)
        model.to(getattr(torch, dtype)).save_pretrained(source)
        parity = export(str(source), tmp_path / f"{dtype}-bundle").manifest.measured["export"]["parity"]
        assert parity["max_abs_diff"] < 1e-3


def test_wrong_graph_is_refused_and_nothing_is_written(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rotary, "sine", Rotary.cosine)
    with pytest.raises(GateError, match="differs from PyTorch"):
        export(str(checkpoints("llama")), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_act": "mish"}, "activation `mish`"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling `dynamic`"),
    ],
)
def test_what_the_graph_cannot_say_is_refused(tmp_path: Path, settings: dict, reason: str) -> None:
    source = write_checkpoint(tmp_path, "llama", settings)
    with pytest.raises(UnsupportedError, match=reason):
        describe(SafetensorsCheckpoint(source).config)
