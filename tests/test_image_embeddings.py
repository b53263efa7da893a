"""Vectors of images, and CLIP: graphs and answers against PyTorch and transformers' pipelines, and bad input."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

pytest.importorskip("PIL", reason="images need Pillow: pip install 'llmfast[vision]'")

from transformers.image_utils import load_image
from typer.testing import CliRunner

from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import GateError, InputError, OptionError, UnsupportedError
from llmfast.export.stage import ExportOptions, export
from llmfast.export.traced_contrastive import contrastive_tasks, supported_contrastive_model_types
from llmfast.export.traced_signals import supported_signal_model_types
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.tasks import feature_extraction, image_feature_extraction, zero_shot_image_classification
from tests.tiny_images import save_clip, save_image_encoder, save_images

LABELS = ["cat", "a very small dog", "tree"]


@dataclass(frozen=True)
class Clip:
    """A CLIP as PyTorch has it, and its bundles."""

    model: Any
    source: Path
    bundle: Callable[[str], ModelBundle]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    folder = tmp_path_factory.mktemp("clip")
    model = save_clip(folder / "source")

    @functools.cache
    def get(task: str) -> ModelBundle:
        return export(str(folder / "source"), folder / task, ExportOptions(task=task))

    return Clip(model, folder / "source", get)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(path) for path in save_images(tmp_path_factory.mktemp("images"))]


def _pixels(source: Path, paths: list[str]) -> torch.Tensor:
    processor = transformers.AutoImageProcessor.from_pretrained(source, backend="pil")
    return torch.cat([processor(load_image(path), return_tensors="pt")["pixel_values"] for path in paths])


@pytest.mark.parametrize("model_type", supported_signal_model_types("pixel_values"))
def test_embedding_is_the_class_token(tmp_path: Path, images: list[str], model_type: str) -> None:
    settings = {"architectures": None, "num_hidden_layers": 1}
    model = save_image_encoder(tmp_path / "source", model_type, "AutoModel", **settings)
    bundle = export(str(tmp_path / "source"), tmp_path / "bundle")
    assert bundle.manifest.task == "image-feature-extraction"
    answers = image_feature_extraction.answer(bundle, images)
    with torch.no_grad():
        expected = model(_pixels(tmp_path / "source", images)).last_hidden_state[:, 0].numpy()
    assert [one["image"] for one in answers] == images
    np.testing.assert_allclose([one["embedding"] for one in answers], expected, rtol=1e-3, atol=1e-4)
    cosine = torch.cosine_similarity(*torch.from_numpy(expected[[0, 2]]), dim=0)
    np.testing.assert_allclose(answers[2]["cosine"], cosine, atol=1e-5)


@pytest.mark.parametrize("model_type", supported_contrastive_model_types())
def test_scores_equal_the_pipeline(clip: Clip, images: list[str], model_type: str) -> None:
    bundle = clip.bundle("zero-shot-image-classification")
    assert bundle.manifest.architecture["model_type"] == model_type
    pipeline = transformers.pipeline(
        "zero-shot-image-classification",
        clip.model,
        tokenizer=transformers.AutoTokenizer.from_pretrained(clip.source),
        image_processor=transformers.AutoImageProcessor.from_pretrained(clip.source, backend="pil"),
    )
    for template in ({}, {"hypothesis_template": "{}"}):
        answers = zero_shot_image_classification.answer(bundle, images, label=LABELS, **template)
        for path, one in zip(images, answers, strict=True):
            expected = pipeline(path, candidate_labels=LABELS, **template)
            assert one["image"] == path
            assert [label["label"] for label in one["labels"]] == [label["label"] for label in expected]
            scores = [label["score"] for label in expected]
            np.testing.assert_allclose([label["score"] for label in one["labels"]], scores, rtol=1e-3)
            assert (one["label"], one["score"]) == tuple(one["labels"][0].values())


def test_vectors_of_texts_and_images_equal_pytorch(clip: Clip, images: list[str]) -> None:
    texts = ["a photo of a cat", "cat", "photo photo, a dog!", "a photo of a very very very small cat, or a dog"]
    tokens = transformers.AutoTokenizer.from_pretrained(clip.source)(
        texts, padding=True, truncation=True, max_length=40, return_tensors="pt"
    )
    with torch.no_grad():
        of_texts = clip.model.get_text_features(**tokens).pooler_output.numpy()
        of_images = clip.model.get_image_features(_pixels(clip.source, images)).pooler_output.numpy()
    found = feature_extraction.answer(clip.bundle("feature-extraction"), texts)
    np.testing.assert_allclose([one["embedding"] for one in found], of_texts, rtol=1e-3, atol=1e-4)
    found = image_feature_extraction.answer(clip.bundle("image-feature-extraction"), images)
    np.testing.assert_allclose([one["embedding"] for one in found], of_images, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("task", contrastive_tasks())
def test_graph_holds_what_its_task_needs(clip: Clip, task: str) -> None:
    bundle = clip.bundle(task)
    graph = onnx.load(bundle.model).graph
    names = {tensor.name for tensor in graph.initializer}
    takes_text, takes_images = task != "image-feature-extraction", task != "feature-extraction"
    assert any(name.startswith("text_model") for name in names) == takes_text
    assert any(name.startswith("vision_model") for name in names) == takes_images
    assert (bundle.path / "tokenizer.json").is_file()
    assert {"IsNaN", "If", "Loop", "Where"}.isdisjoint(node.op_type for node in graph.node)
    assert bundle.manifest.measured["export"]["parity"]["max_abs_diff"] < 1e-4


def test_older_configs_end_texts_at_the_highest_id(tmp_path: Path) -> None:
    model = save_clip(tmp_path / "source", eos_token_id=2)
    bundle = export(str(tmp_path / "source"), tmp_path / "bundle", ExportOptions(task="feature-extraction"))
    session = onnxruntime.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
    ids = np.array([[98, 5, 99, 99, 99], [98, 7, 8, 9, 99]])
    feeds = {"input_ids": ids, "attention_mask": (np.arange(5) < [[3], [5]]).astype(np.int64)}
    with torch.no_grad():
        expected = model.get_text_features(**{name: torch.from_numpy(one) for name, one in feeds.items()})
    np.testing.assert_allclose(
        session.run(["sentence_embedding"], feeds)[0], expected.pooler_output.numpy(), rtol=1e-3, atol=1e-5
    )


def test_checkpoints_that_do_not_fit(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a `clip` can't be exported for fill-mask"):
        export(str(clip.source), tmp_path / "out", ExportOptions(task="fill-mask"))
    source = tmp_path / "source"
    save_clip(source)
    settings = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").write_text(json.dumps(settings | {"crop_size": {"height": 20, "width": 16}}))
    with pytest.raises(InputError, match=r"makes images of 20x16, config\.json wants 16x16"):
        export(str(source), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_parity_sees_another_model(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmfast.export import traced_contrastive

    other = save_clip(tmp_path / "source", layer_norm_eps=0.1)
    monkeypatch.setattr(traced_contrastive, "_Reference", lambda _, outputs: _Other(other, outputs))
    with pytest.raises(GateError, match="`logits_per_image` at 1x3 and 1x3x16x16"):
        export(str(clip.source), tmp_path / "out")


@dataclass(frozen=True)
class _Other:
    model: Any
    outputs: tuple[str, ...]

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            result = self.model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return [result[name].numpy() for name in self.outputs]


def test_infer_prints_labels_and_saves_vectors(clip: Clip, images: list[str], tmp_path: Path) -> None:
    bundle = str(clip.bundle("zero-shot-image-classification").path)
    arguments = ["infer", bundle, "--image", images[0]]
    result = CliRunner().invoke(app, [*arguments, "--label", "cat", "--label", "dog", "--top-k", "1"])
    assert result.exit_code == 0
    assert result.stdout.split()[0] in ("cat", "dog")
    vectors = str(clip.bundle("image-feature-extraction").path)
    result = CliRunner().invoke(app, ["infer", vectors, "--image", images[0], "-o", str(tmp_path / "v.npy")])
    assert result.exit_code == 0
    assert np.load(tmp_path / "v.npy").shape == (1, 24)
    result = CliRunner().invoke(app, ["infer", vectors, "--image", images[0], "--image", images[1]])
    assert result.stdout.splitlines()[0] == f"1.0000 {images[0]}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no labels to choose from"),
        ({"label": ["cat"]}, "no labels to choose from"),
        ({"label": ["cat", " "]}, "no labels to choose from"),
        ({"label": LABELS, "hypothesis_template": "a photo"}, "has no {}"),
        ({"label": LABELS, "top_k": 0}, "--top-k 0"),
    ],
)
def test_options_that_say_too_little(clip: Clip, images: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        zero_shot_image_classification.answer(clip.bundle("zero-shot-image-classification"), images, **options)


def test_quantized_clip_is_measured(
    clip: Clip, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp32 = clip.bundle("zero-shot-image-classification")
    int8 = quantize(fp32.path, tmp_path / "int8", QuantizeOptions("int8"))
    assert "compared on random inputs" in capsys.readouterr().err
    assert int8.manifest.measured["quantize"]["relative_error"] < 0.2
    first, second = bench([fp32.path, int8.path], BenchOptions(rounds=1, warmup=0)).document()["rows"]
    assert first["forward_s"] > 0
    assert first["output_error"] == 0 < second["output_error"] < 0.2
    ours, theirs = (zero_shot_image_classification.answer(one, images, label=LABELS) for one in (int8, fp32))
    assert all(abs(one["score"] - two["score"]) < 0.2 for one, two in zip(ours, theirs, strict=True))
