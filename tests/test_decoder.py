"""The direct route against PyTorch: every architecture, whole prompts, cached decode, batches."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmfast.bundle import ModelBundle
from llmfast.errors import GateError, OptionError, UnsupportedError
from llmfast.export.architectures import Decoder, describe
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.decoder import DecoderGraph
from llmfast.export.rotary import Rotary
from llmfast.export.stage import ExportOptions, export
from llmfast.graph.linear import find_linears
from llmfast.graph.model import OnnxModel
from llmfast.infer.engine import Engine
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.runtime import open_session
from tests.conftest import ARCHITECTURES, write_checkpoint

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@dataclass
class Exported:
    """A decoder's graph in a session, and the PyTorch model it was written from."""

    folder: Path
    decoder: Decoder
    reference: torch.nn.Module
    session: onnxruntime.InferenceSession

    def run(self, ids: np.ndarray, past: list[np.ndarray], logits: int, lengths: list[int] | None = None) -> list:
        """Return logits and cache; `lengths` counts each row's tokens with its past, all alike if None."""
        total = past[0].shape[2] + ids.shape[1] if lengths is None else max(lengths)
        names = [value.name for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]
        feeds = {
            "input_ids": ids,
            "seqlens_k": np.array(lengths or [total] * len(ids), np.int32) - 1,
            "total_sequence_length": np.array(total, np.int32),
            "num_logits": np.array([logits], np.int64),
        }
        return self.session.run(None, feeds | dict(zip(names, past, strict=True)))

    def empty(self, batch: int) -> list[np.ndarray]:
        """Return a cache without positions."""
        shape = (batch, self.decoder.num_key_value_heads, 0, self.decoder.head_size)
        return [np.zeros(shape, np.float32)] * (2 * self.decoder.num_hidden_layers)

    def expected(self, ids: np.ndarray) -> np.ndarray:
        """Return PyTorch's logits."""
        with torch.no_grad():
            logits: np.ndarray = self.reference(torch.from_numpy(ids)).logits.numpy()
        return logits


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(
    request: pytest.FixtureRequest, checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    return _write(checkpoints(request.param), tmp_path_factory.mktemp("exported"))


def _write(source: Path, folder: Path) -> Exported:
    checkpoint = SafetensorsCheckpoint(source)
    decoder = describe(checkpoint.config)
    DecoderGraph(checkpoint, decoder).write(folder, lambda: None)
    reference = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    session = open_session(folder / "model.onnx")
    return Exported(folder, decoder, reference, session)


def test_logits_match_pytorch_in_batches_in_chunks_and_step_by_step(exported: Exported) -> None:
    ids = np.random.default_rng(1).integers(3, exported.decoder.vocab_size, (2, 40))
    expected = exported.expected(ids)
    whole, *_ = exported.run(ids, exported.empty(2), 40)
    np.testing.assert_allclose(whole, expected, **TOLERANCE)

    last, *past = exported.run(ids[:, :30], exported.empty(2), 1)
    np.testing.assert_allclose(last[:, 0], expected[:, 29], **TOLERANCE)
    for position in range(30, 40):
        step, *past = exported.run(ids[:, position : position + 1], past, 1)
        np.testing.assert_allclose(step[:, 0], expected[:, position], **TOLERANCE)

    past = exported.empty(1)
    for start, end in ((0, 7), (7, 25), (25, 40)):
        chunk, *past = exported.run(ids[:1, start:end], past, end - start)
        np.testing.assert_allclose(chunk, expected[:1, start:end], **TOLERANCE)


def test_rows_of_different_lengths_do_not_disturb_each_other(exported: Exported) -> None:
    rng = np.random.default_rng(2)
    rows = [rng.integers(3, exported.decoder.vocab_size, length + 3) for length in (25, 9, 18)]
    lengths = [len(row) - 3 for row in rows]
    ids = np.zeros((3, max(lengths)), np.int64)
    for line, row, length in zip(ids, rows, lengths, strict=True):
        line[:length] = row[:length]
    expected = [exported.expected(row[None])[0] for row in rows]
    logits, *past = exported.run(ids, exported.empty(3), max(lengths), lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row][:length], **TOLERANCE)
    past = [np.pad(array, ((0, 0), (0, 0), (0, 3), (0, 0))) for array in past]  # room for three steps
    for step in range(3):
        ids = np.stack([row[length + step] for row, length in zip(rows, lengths, strict=True)])[:, None]
        logits, *past = exported.run(ids, past, 1, [length + step + 1 for length in lengths])
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row, 0], expected[row][length + step], **TOLERANCE)


def test_greedy_tokens_are_those_of_transformers(exported: Exported) -> None:
    prompt = np.random.default_rng(3).integers(3, exported.decoder.vocab_size, 20)
    with torch.no_grad():
        generated = exported.reference.generate(
            torch.from_numpy(prompt[None]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    logits, *past = exported.run(prompt[None], exported.empty(1), 1)
    tokens = []
    while len(tokens) < 32:
        tokens.append(int(logits[0, -1].argmax()))
        logits, *past = exported.run(np.array([[tokens[-1]]]), past, 1)
    assert tokens == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_every_linear_layer_is_quantized(exported: Exported, scheme: str, tmp_path: Path) -> None:
    quantize(exported.folder / "model.onnx", tmp_path / "quantized", QuantizeOptions(scheme))
    model = OnnxModel.load(ModelBundle.open(tmp_path / "quantized").model)
    assert find_linears(model) == []
    ids = np.random.default_rng(1).integers(3, exported.decoder.vocab_size, (2, 24))
    session = open_session(model.path)
    logits, *_ = replace(exported, session=session).run(ids, exported.empty(2), 24)
    expected = exported.expected(ids)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < {"int8": 0.15, "int4": 0.6}[scheme]


def test_manifest_tells_sizes_and_parity(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoints("opt-norm-after")
    bundle = export(str(source), tmp_path / "bundle")
    reference = AutoModelForCausalLM.from_pretrained(source)
    facts = bundle.manifest.architecture
    unused = 2 * reference.config.hidden_size  # OPT's first two positions
    assert facts["num_parameters"] == sum(parameter.numel() for parameter in reference.parameters()) - unused
    assert facts["model_type"] == "opt"
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
        (tmp_path / name).mkdir()
        _write(checkpoints("qwen3"), tmp_path / name)
    assert (tmp_path / "one" / "model.onnx").read_bytes() == (tmp_path / "two" / "model.onnx").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_read(dtype: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", "llama", {})
    AutoModelForCausalLM.from_pretrained(source).to(getattr(torch, dtype)).save_pretrained(source)
    (tmp_path / "graph").mkdir()
    exported = _write(source, tmp_path / "graph")
    ids = np.arange(3, 23)[None]
    logits, *_ = exported.run(ids, exported.empty(1), 20)
    exported.reference.float()
    np.testing.assert_allclose(logits, exported.expected(ids), **TOLERANCE)


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


def test_long_rotary_factors_are_chosen_by_the_context(
    checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints("phi3-longrope")
    bundle = export(str(source), tmp_path / "long", ExportOptions(context_length=300))
    assert "took the long ones, for up to 300 tokens" in capsys.readouterr().err
    assert bundle.manifest.architecture["context_length"] == 300
    assert bundle.manifest.architecture["rotary_factors"] == "long"
    reference = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    ids = np.random.default_rng(4).integers(3, 320, 200)  # PyTorch takes the long factors beyond 64 tokens
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids[None])).logits[0].numpy()
    np.testing.assert_allclose(Engine(bundle).score(ids), expected, **TOLERANCE)
    assert describe(SafetensorsCheckpoint(source).config).rotary_factors == "short"
    with pytest.raises(OptionError, match="made for 512 positions"):
        describe(SafetensorsCheckpoint(source).config, 513)


def test_config_fields_that_no_description_reads_are_refused(checkpoints: Callable[[str], Path]) -> None:
    config = SafetensorsCheckpoint(checkpoints("gpt2")).config
    config.resid_pdrop = 0.3  # changes no logit
    describe(config)
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UnsupportedError, match="`scale_attn_by_inverse_layer_idx` = True in a `gpt2`"):
        describe(config)


def test_unknown_architecture_is_told_what_there_is(checkpoints: Callable[[str], Path]) -> None:
    config = SafetensorsCheckpoint(checkpoints("gpt2")).config
    config.model_type = "bloom"
    with pytest.raises(UnsupportedError, match="`bloom`") as refused:
        describe(config)
    assert "qwen3" in str(refused.value.hint)
    assert "--module" in str(refused.value.hint)
