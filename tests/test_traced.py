import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from llmfast.errors import GateError, InputError, UnsafeInputError, UnsupportedError
from llmfast.export import requirements, traced_parity
from llmfast.export.pooling import Pooling, pool, read_pooling
from llmfast.export.stage import ExportOptions
from llmfast.export.stage import export as export_bundle
from llmfast.export.traced import TracedExport, detect_task, supported_model_types, write_traced
from llmfast.export.traced_parity import Reference, prove_traced
from llmfast.graph.model import OnnxModel
from tests.tiny_encoder import save_encoder
from tests.tiny_images import save_clip, save_image_encoder

CLASSIFIER = "AutoModelForSequenceClassification"
MEAN = {"pooling_mode_mean_tokens": True}


@dataclass(frozen=True)
class Exported:
    """An encoder as PyTorch has it and as llmfast wrote it."""

    model: Any
    source: Path
    traced: TracedExport
    staged: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Return a function that exports an encoder of a type for feature-extraction, once; do not change the files."""

    @functools.cache
    def get(model_type: str) -> Exported:
        source, staged = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("staged")
        model = save_encoder(source, model_type)
        return Exported(model, source, write_traced(source, "feature-extraction", staged), staged)

    return get


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """Return a checkpoint that a test may damage."""
    save_encoder(tmp_path / "bert", "bert", num_hidden_layers=1)
    return tmp_path / "bert"


def export(source: Path, task: str = "feature-extraction") -> tuple[TracedExport, Path]:
    staged = source.parent / "staged"
    staged.mkdir()
    return write_traced(source, task, staged), staged


def run(staged: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(staged / "model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, {name: feeds[name] for name in names}), strict=True))


def make_feeds(batch: int, length: int, types: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    mask = np.ones((batch, length), np.int64)
    mask[-1, (length + 1) // 2 :] = 0
    return {
        "input_ids": rng.integers(4, 40, (batch, length)),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, types, (batch, length)),
    }


def linear_weights(model: torch.nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def write_modules(source: Path, pooling: dict[str, object], *more: str, pooling_path: str = "1_Pooling") -> None:
    """Make a sentence-transformers folder of a checkpoint."""
    paths = {"Transformer": "", "Pooling": pooling_path} | {name: f"2_{name}" for name in more}
    entries = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in paths.items()]
    (source / "modules.json").write_text(json.dumps(entries))
    (source / "1_Pooling").mkdir(exist_ok=True)
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize("model_type", supported_model_types())
def test_encoder_equals_pytorch_at_other_shapes(exported: Callable[[str], Exported], model_type: str) -> None:
    encoder = exported(model_type)
    inputs = encoder.traced.graphs["model"]["inputs"]
    for shape in ((1, 3), (3, 5), (2, 37)):
        feeds = make_feeds(*shape, types=2)
        actual = run(encoder.staged, feeds)
        with torch.no_grad():
            hidden = encoder.model(**{name: torch.from_numpy(feeds[name]) for name in inputs}).last_hidden_state.numpy()
        np.testing.assert_allclose(actual["last_hidden_state"], hidden, rtol=1e-4, atol=1e-5)
        weight = feeds["attention_mask"][..., None]
        mean = (hidden * weight).sum(1) / weight.sum(1)
        np.testing.assert_allclose(actual["sentence_embedding"], mean, rtol=1e-4, atol=1e-5)
    assert encoder.traced.parity["max_abs_diff"] < 1e-5


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta"])
def test_classifier_equals_pytorch_and_keeps_the_names_of_weights(tmp_path: Path, model_type: str) -> None:
    model = save_encoder(tmp_path / "source", model_type, CLASSIFIER, id2label={0: "bad", 1: "so so", 2: "good"})
    traced, staged = export(tmp_path / "source", "text-classification")
    feeds = make_feeds(3, 29, types=2)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(feeds[name]) for name in traced.graphs["model"]["inputs"]}
        expected = model(**tensors).logits.numpy()
    np.testing.assert_allclose(run(staged, feeds)["logits"], expected, rtol=1e-4, atol=1e-5)
    assert traced.parity["argmax_agreement"] == 1.0
    assert traced.architecture["labels"] == ["bad", "so so", "good"]
    assert traced.architecture["problem_type"] == "single_label_classification"
    graph = OnnxModel.load(staged / "model.onnx")
    multiplied = {node.input[1] for node in graph.proto.graph.node if node.op_type in ("MatMul", "Gemm")}
    assert linear_weights(model) <= multiplied & set(graph.initializers)


def count_fused(path: Path, folder: Path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize(("model_type", "norms"), [("bert", 4), ("roberta", 3), ("distilbert", 2), ("mpnet", 3)])
def test_onnxruntime_fuses_what_it_can(
    exported: Callable[[str], Exported], tmp_path: Path, model_type: str, norms: int
) -> None:
    encoder = exported(model_type)
    fused = count_fused(encoder.staged / "model.onnx", tmp_path)
    layers = encoder.traced.architecture["num_hidden_layers"]
    assert (fused["SkipLayerNormalization"], fused["BiasGelu"]) == (norms, layers)


def test_shapes_can_be_inferred(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    proto = onnx.load(exported("bert").staged / "model.onnx")
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "model.onnx")
    assert count_fused(tmp_path / "model.onnx", tmp_path)["SkipLayerNormalization"] == 4


def test_graph_is_lean(exported: Callable[[str], Exported]) -> None:
    bert = exported("bert")
    proto = onnx.load(bert.staged / "model.onnx")
    operators = {node.op_type for node in proto.graph.node}
    assert not operators & {"IsNaN", "Where", "Expand", "Range", "GatherND", "Identity", "Shape", "Concat", "Slice"}
    assert {entry.version for entry in proto.opset_import if not entry.domain} == {21}
    assert b"site-packages" not in (bert.staged / "model.onnx").read_bytes()
    assert bert.traced.graphs == {
        "model": {
            "file": "model.onnx",
            "inputs": ["input_ids", "attention_mask", "token_type_ids"],
            "outputs": ["last_hidden_state", "sentence_embedding"],
        }
    }
    assert bert.traced.architecture == {
        "model_type": "bert",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "head_size": 8,
        "vocab_size": 40,
        "context_length": 40,
        "pooling": "mean",
        "normalize": False,
    }


def test_input_of_token_types_only_where_there_are_several(exported: Callable[[str], Exported]) -> None:
    traced = exported("roberta").traced
    assert traced.graphs["model"]["inputs"] == ["input_ids", "attention_mask"]
    assert traced.architecture["context_length"] == 38  # the two positions up to the padding index hold no text


def test_shared_layers_share_their_weights(exported: Callable[[str], Exported]) -> None:
    graph = OnnxModel.load(exported("albert").staged / "model.onnx")
    shared = "encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"
    assert sum(shared in node.input for node in graph.proto.graph.node) == 2
    large = [name for name, tensor in graph.initializers.items() if len(tensor.dims) == 2 and min(tensor.dims) > 1]
    assert not [name for name in large if name.startswith("val_")]


def test_export_is_silent_repeatable_and_leaves_nothing_else(
    exported: Callable[[str], Exported], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = exported("bert")
    capfd.readouterr()
    write_traced(first.source, "feature-extraction", tmp_path)
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == (first.staged / "model.onnx").read_bytes()


def test_own_pooling_of_the_checkpoint_is_in_the_graph(bert: Path) -> None:
    write_modules(bert, {"pooling_mode": ["cls", "mean_sqrt_len_tokens"]}, "Normalize")
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    traced, staged = export(bert)
    assert {key: traced.architecture[key] for key in ("pooling", "normalize", "max_seq_length", "context_length")} == {
        "pooling": "cls+mean_sqrt_len",
        "normalize": True,
        "max_seq_length": 24,
        "context_length": 40,
    }
    feeds = make_feeds(3, 11, types=2)
    actual = run(staged, feeds)
    hidden, mask = actual["last_hidden_state"].astype(np.float64), feeds["attention_mask"][..., None]
    joined = np.concatenate([hidden[:, 0], (hidden * mask).sum(1) / np.sqrt(mask.sum(1))], -1)
    expected = joined / np.linalg.norm(joined, axis=-1, keepdims=True)
    np.testing.assert_allclose(actual["sentence_embedding"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["cls", "max", "mean", "mean_sqrt_len"])
def test_pooling_equals_numpy(kind: str, normalize: bool) -> None:
    rng = np.random.default_rng(0)
    hidden, lengths = rng.normal(-3, 1, (3, 6, 5)), (6, 4, 1)
    mask = (np.arange(6) < np.array(lengths)[:, None]).astype(np.int64)
    rows = [row[:length] for row, length in zip(hidden, lengths, strict=True)]
    vectors = {
        "cls": [row[0] for row in rows],
        "max": [row.max(0) for row in rows],
        "mean": [row.mean(0) for row in rows],
        "mean_sqrt_len": [row.sum(0) / np.sqrt(len(row)) for row in rows],
    }
    expected = np.stack(vectors[kind])
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    tensor = torch.from_numpy(hidden.astype(np.float32))
    actual = pool(tensor, torch.from_numpy(mask), Pooling((kind,), normalize)).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (MEAN, ("mean",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, ("max", "mean")),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, ("mean_sqrt_len",)),
        ({}, ("mean",)),
    ],
)
def test_read_pooling(tmp_path: Path, config: dict[str, object], kinds: tuple[str, ...]) -> None:
    write_modules(tmp_path, config)
    assert read_pooling(tmp_path) == Pooling(kinds, normalize=False)


def test_read_pooling_without_sentence_transformers_files(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == Pooling(("mean",), normalize=False)


def test_pooling_that_would_change_the_embedding_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, {"pooling_mode_lasttoken": True})
    with pytest.raises(UnsupportedError, match="pooling `lasttoken`"):
        read_pooling(tmp_path)
    write_modules(tmp_path, MEAN, "Dense")
    with pytest.raises(UnsupportedError, match="module `Dense` at `2_Dense`"):
        read_pooling(tmp_path)
    write_modules(tmp_path, MEAN, pooling_path="../1_Pooling")
    with pytest.raises(UnsafeInputError, match="leaves the folder"):
        read_pooling(tmp_path)


def test_malformed_sentence_transformers_files(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text('[{"type": "Pooling"}]')
    with pytest.raises(InputError, match=r"malformed .*modules\.json"):
        read_pooling(tmp_path)
    write_modules(tmp_path, MEAN)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": "long"}')
    with pytest.raises(InputError, match="max_seq_length is `long`"):
        read_pooling(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        read_pooling(tmp_path)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("DistilBertForSequenceClassification", "text-classification"),
        ("LlamaForCausalLM", "text-generation"),
        ("ElectraForTokenClassification", "token-classification"),
        ("RobertaForQuestionAnswering", "question-answering"),
        ("DebertaV2ForMaskedLM", "fill-mask"),
    ],
)
def test_detect_task(tmp_path: Path, name: str, task: str) -> None:
    assert detect_task({"architectures": [name]}, tmp_path) == task


def test_detect_task_of_a_sentence_transformers_folder(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    assert detect_task({"architectures": ["BertForMaskedLM"]}, tmp_path) == "feature-extraction"


def test_detect_task_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no `architectures`"):
        detect_task({}, tmp_path)
    with pytest.raises(UnsupportedError, match="`MyOwnModel` is not part of transformers"):
        detect_task({"architectures": ["MyOwnModel"]}, tmp_path)
    with pytest.raises(UnsupportedError, match="BertForMultipleChoice") as caught:
        detect_task({"architectures": ["BertForMultipleChoice"]}, tmp_path)
    assert "--task" in caught.value.hint


def test_truncated_weights(bert: Path) -> None:
    file = bert / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        export(bert)


def test_weights_in_a_pickle(bert: Path) -> None:
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    with pytest.raises(UnsafeInputError, match="pickle"):
        export(bert)


def test_weights_for_another_task(bert: Path) -> None:
    with pytest.raises(InputError, match=r"lacks \d weights .* `classifier.bias`") as caught:
        export(bert, "text-classification")
    assert "--task" in caught.value.hint


def test_weights_that_do_not_fit_the_config(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(InputError, match=r"do not fit its config\.json"):
        export(bert)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "source")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match=r"`encoder\.layer\.1\.output\.dense\.weight` .* NaN"):
        export(tmp_path / "source")


def test_unsupported_model_type(tmp_path: Path) -> None:
    save_encoder(tmp_path / "source", "gpt2")
    with pytest.raises(UnsupportedError, match="`gpt2` can't be exported") as caught:
        export(tmp_path / "source")
    assert "distilbert" in caught.value.hint


def test_head_that_transformers_does_not_have(tmp_path: Path) -> None:
    save_encoder(tmp_path / "source", "nomic_bert")
    with pytest.raises(UnsupportedError, match="no AutoModelForQuestionAnswering for a `nomic_bert`"):
        export(tmp_path / "source", "question-answering")


def test_missing_extra(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(UnsupportedError, match="`torch`") as caught:
        export(bert)
    assert caught.value.hint == "pip install 'llmfast[export]'"


@pytest.mark.parametrize("wrong", [0.01, np.nan])
def test_a_difference_to_pytorch_is_a_missed_gate(exported: Callable[[str], Exported], wrong: float) -> None:
    bert = exported("bert")
    outputs = tuple(bert.traced.graphs["model"]["outputs"])

    class Wrong(Reference):
        def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            hidden, embedding = super().run(feeds)
            embedding[-1, -1] += wrong
            return [hidden, embedding]

    inputs = bert.traced.graphs["model"]["inputs"]
    assert prove_traced(Reference(bert.model, outputs, Pooling()), bert.staged / "model.onnx", inputs, 40)
    with pytest.raises(GateError, match=r"`sentence_embedding` at 1x1: .* allowed 0.0001 \+ 0.001"):
        prove_traced(Wrong(bert.model, outputs, Pooling()), bert.staged / "model.onnx", inputs, 40)
    with pytest.raises(GateError, match="can't run the exported model at 1x41"):
        prove_traced(Reference(bert.model, outputs, Pooling()), bert.staged / "model.onnx", inputs, 41)


@pytest.mark.parametrize("save", [save_encoder, lambda path: save_image_encoder(path, "vit"), save_clip])
def test_threads_are_those_of_the_comparison(
    save: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    opened = traced_parity.open_session

    def open_session(graph: Path, threads: int | None = None) -> onnxruntime.InferenceSession:
        session = opened(graph, threads=threads)
        asked.append((threads, session.get_session_options().intra_op_num_threads))
        return session

    monkeypatch.setattr(traced_parity, "open_session", open_session)
    save(tmp_path / "source")
    export_bundle(str(tmp_path / "source"), tmp_path / "bundle", ExportOptions(threads=3))
    assert asked == [(3, 3)]
