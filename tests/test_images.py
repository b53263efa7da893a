"""Encoders of images: preprocessing, graphs and answers against transformers and PyTorch, and bad input."""

import functools
import json
import sys
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

from PIL import Image
from transformers.image_utils import load_image
from typer.testing import CliRunner

from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import GateError, InputError, OptionError, UnsupportedError
from llmfast.export.stage import ExportOptions, export
from llmfast.export.traced_parity import Reference, prove_signals
from llmfast.export.traced_signals import supported_signal_model_types
from llmfast.image import ImageProcessor, center_crop
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.tasks import image_classification
from tests.tiny_images import PROCESSORS, save_image_encoder, save_images


@dataclass(frozen=True)
class Exported:
    """A classifier of images as PyTorch has it, and its bundle."""

    model: Any
    source: Path
    bundle: ModelBundle


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Return a function that exports a classifier of a type, once; do not change the files."""

    @functools.cache
    def get(model_type: str) -> Exported:
        folder = tmp_path_factory.mktemp(model_type)
        model = save_image_encoder(folder / "source", model_type)
        return Exported(model, folder / "source", export(str(folder / "source"), folder / "bundle"))

    return get


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("model_type", supported_signal_model_types("pixel_values"))
def test_classifier_equals_pytorch_at_other_batches(exported: Callable[[str], Exported], model_type: str) -> None:
    found = exported(model_type)
    manifest = found.bundle.manifest
    assert manifest.task == "image-classification"
    assert manifest.architecture["labels"] == ["cat", "dog", "tree"]
    assert manifest.measured["export"]["parity"]["max_abs_diff"] < 1e-5
    assert manifest.measured["export"]["parity"]["argmax_agreement"] == 1
    session = onnxruntime.InferenceSession(found.bundle.model, providers=["CPUExecutionProvider"])
    assert [value.shape for value in session.get_inputs()] == [["batch", 3, 16, 16]]
    for batch in (1, 2, 5):
        pixels = np.random.default_rng(batch).standard_normal((batch, 3, 16, 16), np.float32)
        with torch.no_grad():
            expected = found.model(pixel_values=torch.from_numpy(pixels)).logits.numpy()
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(session.run(["logits"], {"pixel_values": pixels})[0], expected, rtol=1e-4, atol=1e-5)


def test_weights_keep_their_names(exported: Callable[[str], Exported]) -> None:
    found = exported("vit")
    proto = onnx.load(found.bundle.model)
    linear = {f"{name}.weight" for name, part in found.model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linear <= {tensor.name for tensor in proto.graph.initializer}
    assert {"IsNaN", "If", "Loop"}.isdisjoint(node.op_type for node in proto.graph.node)


def test_export_is_repeatable(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    found = exported("vit")
    again = export(str(found.source), tmp_path / "again")
    for name in ("model.onnx", "llmfast.json", "preprocessor_config.json"):
        assert (again.path / name).read_bytes() == (found.bundle.path / name).read_bytes()


def test_parity_sees_another_model(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    other = save_image_encoder(tmp_path, "vit", layer_norm_eps=0.1)
    with pytest.raises(GateError, match="`logits` at 1x3x16x16"):
        prove_signals(
            Reference(other, ("logits",), None), exported("vit").bundle.model, "pixel_values", [(1, 3, 16, 16)]
        )


@pytest.mark.parametrize("model_type", supported_signal_model_types("pixel_values"))
def test_answers_equal_the_pipeline(exported: Callable[[str], Exported], images: list[Path], model_type: str) -> None:
    found = exported(model_type)
    processor = transformers.AutoImageProcessor.from_pretrained(found.source, backend="pil")
    pipeline = transformers.pipeline("image-classification", found.model, image_processor=processor)
    answers = image_classification.answer(found.bundle, [str(path) for path in images], threads=1, top_k=2)
    for path, one in zip(images, answers, strict=True):
        expected = pipeline(str(path), top_k=2)
        assert one["image"] == str(path)
        assert [label["label"] for label in one["labels"]] == [label["label"] for label in expected]
        scores = [label["score"] for label in expected]
        np.testing.assert_allclose([label["score"] for label in one["labels"]], scores, rtol=1e-4)
        assert (one["label"], one["score"]) == tuple(one["labels"][0].values())


def test_several_labels_and_one_label_score_each_on_its_own(tmp_path: Path, images: list[Path]) -> None:
    for name, settings in (("several", {"problem_type": "multi_label_classification"}), ("one", {"num_labels": 1})):
        model = save_image_encoder(tmp_path / name, "vit", id2label=None, **settings)
        bundle = export(str(tmp_path / name), tmp_path / f"{name}-bundle")
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / name, backend="pil")
        [expected] = transformers.pipeline("image-classification", model, image_processor=processor)([str(images[0])])
        [found] = image_classification.answer(bundle, [str(images[0])])
        assert [one["label"] for one in found["labels"]] == [one["label"] for one in expected]
        np.testing.assert_allclose(found["score"], expected[0]["score"], rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_center_crop": True, "crop_size": {"height": 13, "width": 18}},
        {"do_center_crop": True, "crop_size": 31, "size": {"height": 20, "width": 26}},  # zeros all around
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [100, 120, 130], "image_std": [50, 60, 70]},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
        *({"resample": number, "size": {"height": 9, "width": 33}} for number in range(6)),
        {"size": {"shortest_edge": 21}, "do_center_crop": True, "crop_size": {"height": 20, "width": 20}},
        {"size": 24, "do_center_crop": True, "crop_size": 12, "do_convert_rgb": True},
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 25, "width": 10}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", sorted(PROCESSORS))
def test_pixels_equal_the_processor_of_transformers(
    images: list[Path], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind} | settings))
    reference = PROCESSORS[kind](**settings)
    processor = ImageProcessor.load(tmp_path)
    for path in images:
        expected = reference(load_image(str(path)), return_tensors="np")["pixel_values"][0]
        actual = processor.read(path)
        assert actual.dtype == np.float32
        assert processor.output_size in (None, actual.shape[1:])
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(PROCESSORS))
def test_saved_and_older_files_are_read(images: list[Path], tmp_path: Path, kind: str) -> None:
    PROCESSORS[kind]().save_pretrained(tmp_path)
    saved = ImageProcessor.load(tmp_path)
    older = {"feature_extractor_type": kind.replace("ImageProcessor", "FeatureExtractor")}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    np.testing.assert_array_equal(ImageProcessor.load(tmp_path).read(images[0]), saved.read(images[0]))
    assert saved.output_size == (224, 224)


@pytest.mark.parametrize("have", [(4, 7), (5, 6), (9, 8), (4, 9)])
@pytest.mark.parametrize("want", [(6, 6), (7, 7), (3, 12), (1, 1)])
def test_center_crop_equals_transformers(have: tuple[int, int], want: tuple[int, int]) -> None:
    from transformers.image_transforms import center_crop as reference

    values = np.arange(1, 1 + 3 * have[0] * have[1], dtype=np.float32).reshape(3, *have)
    np.testing.assert_array_equal(
        center_crop(values, want),
        reference(values, want, data_format="channels_first", input_data_format="channels_first"),
    )


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"image_processor_type": "DonutImageProcessor"}, UnsupportedError, "`DonutImageProcessor` is not supported"),
        ({}, UnsupportedError, "image processor `None`"),
        ({"image_processor_type": "ViTImageProcessor", "crop_pct": 0.9}, UnsupportedError, "`crop_pct` of 0.9"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, UnsupportedError, "`do_pad` of True"),
        (
            {"image_processor_type": "ViTImageProcessor", "data_format": "channels_last"},
            UnsupportedError,
            "data_format",
        ),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 9}}, InputError, "longest_edge"),
        ({"image_processor_type": "ViTImageProcessor", "size": 0}, InputError, "a size of 0"),
        ({"image_processor_type": "ViTImageProcessor", "size": "big"}, InputError, "malformed"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 9}, InputError, "`resample` 9"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [1, 2]}, InputError, "`image_mean`"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [1, 0, 1]}, InputError, "`image_std`"),
        ({"image_processor_type": "ViTImageProcessor", "do_center_crop": True}, InputError, "malformed"),
        ([], InputError, "not an object"),
    ],
)
def test_processor_that_is_not_understood(tmp_path: Path, config: Any, kind: type[Exception], message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=message):
        ImageProcessor.load(tmp_path)


def test_export_of_unfit_checkpoints(tmp_path: Path) -> None:
    save_image_encoder(tmp_path / "vit", num_hidden_layers=1)
    path = tmp_path / "vit" / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    for changed, kind, message in (
        ({"size": {"height": 20, "width": 16}}, InputError, "makes images of 20x16, config.json wants 16x16"),
        ({"size": {"shortest_edge": 16}}, UnsupportedError, "keep their own size"),
        ({"do_flip": True}, UnsupportedError, "`do_flip`"),
    ):
        path.write_text(json.dumps(settings | changed))
        with pytest.raises(kind, match=message):
            export(str(tmp_path / "vit"), tmp_path / "out")
    path.write_text(json.dumps(settings))
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config | {"architectures": None}))
    with pytest.raises(InputError, match="no `architectures`"):
        export(str(tmp_path / "vit"), tmp_path / "out", ExportOptions(task="image-classification"))
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    path.unlink()
    with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
        export(str(tmp_path / "vit"), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["vit"]


def test_text_encoder_is_no_classifier_of_images(tmp_path: Path) -> None:
    from tests.tiny_encoder import save_encoder

    save_encoder(tmp_path / "bert", "bert")
    with pytest.raises(UnsupportedError, match="a `bert` can't be exported for image-classification"):
        export(str(tmp_path / "bert"), tmp_path / "out", ExportOptions(task="image-classification"))


def test_infer_prints_labels_and_documents(exported: Callable[[str], Exported], images: list[Path]) -> None:
    bundle = str(exported("vit").bundle.path)
    result = CliRunner().invoke(app, ["infer", bundle, "--image", str(images[0]), "--top-k", "2"])
    assert result.exit_code == 0
    labels = [line.rpartition(" ")[0] for line in result.stdout.splitlines()]
    assert len(labels) == 2
    assert set(labels) < {"cat", "dog", "tree"}
    arguments = ["infer", bundle, "--format", "json", *(word for path in images for word in ("--image", str(path)))]
    answers = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert [one["image"] for one in answers] == [str(path) for path in images]
    listing = images[0].parent / "paths.txt"
    listing.write_text("\n".join(map(str, images)))
    listed = CliRunner().invoke(app, ["infer", bundle, "--input", str(listing), "--format", "json"])
    assert json.loads(listed.stdout) == answers


def test_images_that_can_not_be_read(
    exported: Callable[[str], Exported], images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported("vit").bundle
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(images[0].read_bytes()[:200])
    for name, message in (("text.png", "not an image"), ("cut.png", "not an image"), ("none.png", "not found")):
        with pytest.raises(InputError, match=f"{message}: `.*{name}`"):
            image_classification.answer(bundle, [str(images[0]), str(tmp_path / name)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match="not an image"):
        image_classification.answer(bundle, [str(images[0])])
    with pytest.raises(OptionError, match="--top-k 0"):
        image_classification.answer(bundle, [str(images[0])], top_k=0)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnsupportedError, match="need `pillow`") as caught:
        image_classification.answer(bundle, [str(images[0])])
    assert caught.value.hint == "pip install 'llmfast[vision]'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a cat"], "--prompt is for"),
        ([], "no image to run on"),
        (["--image", "a.png", "--input", "b.txt"], "--image and --input exclude each other"),
        (["--image", "a.png", "--max-tokens", "3"], "--max-tokens is for"),
    ],
)
def test_options_of_other_tasks(exported: Callable[[str], Exported], arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["infer", str(exported("vit").bundle.path), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_quantized_bundle_is_measured_on_random_images(
    exported: Callable[[str], Exported], images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp32 = exported("vit").bundle
    int8 = quantize(fp32.path, tmp_path / "int8", QuantizeOptions("int8"))
    assert "compared on random inputs" in capsys.readouterr().err
    assert 0 <= int8.manifest.measured["quantize"]["kld"] < 0.05
    convolutions = [node for node in onnx.load(int8.model).graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 1
    [ours], [theirs] = (image_classification.answer(one, [str(images[0])]) for one in (int8, fp32))
    named = {one["label"]: one["score"] for one in theirs["labels"]}
    assert ours["labels"] != theirs["labels"]
    assert all(abs(one["score"] - named[one["label"]]) < 0.1 for one in ours["labels"])
    document = bench([fp32.path, int8.path], BenchOptions(rounds=1, warmup=0)).document()
    first, second = document["rows"]
    assert "accuracy" not in first
    answers = image_classification.answer(fp32, [str(path) for path in images[:3]])
    labels = [answers[0]["label"], str(fp32.manifest.architecture["labels"].index(answers[1]["label"])), "cat"]
    right = 2 + (answers[2]["label"] == "cat")
    data = images[0].parent / "labels.txt"
    names = [images[0].name, str(images[1]), images[2].name]  # beside the file, or absolute
    data.write_text("".join(f"{label}\t{name}\n" for label, name in zip(labels, names, strict=True)))
    judged, other = bench([fp32.path, int8.path], BenchOptions(rounds=1, warmup=0, data=data)).document()["rows"]
    np.testing.assert_allclose(judged["accuracy"], right / 3)
    assert judged["flipped_labels"] == 0 <= other["flipped_labels"]
    for line, message in (("cat none.png", "malformed"), ("cat\tnone.png", "not found"), ("cow\twide.png", "no label")):
        data.write_text(line)
        with pytest.raises(InputError, match=message):
            bench([fp32.path], BenchOptions(rounds=1, warmup=0, data=data))
    assert first["forward_s"] > 0
    assert first["output_error"] == 0 < second["output_error"] < 0.2
