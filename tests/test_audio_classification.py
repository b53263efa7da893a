"""Classifiers of sound: graphs and answers against transformers and PyTorch, and bad input."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from typer.testing import CliRunner

from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError, OptionError
from llmfast.export.stage import export
from llmfast.export.traced_signals import supported_signal_model_types
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.tasks import audio_classification
from tests.tiny_speech import SHORTEST, make_sound, save_speech_encoder, write_wav

LABELS = {0: "yes", 1: "no", 2: "stop", 3: "go"}


def save_classifier(folder: Path, model_type: str = "wav2vec2", **settings: Any) -> Any:
    settings = {"id2label": LABELS, "num_hidden_layers": 1, "classifier_proj_size": 16} | settings
    return save_speech_encoder(folder, model_type, "AutoModelForAudioClassification", **settings)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sounds")
    lengths = ((5000,), (801, 2), (SHORTEST, 1))
    return [str(write_wav(folder / f"{number}.wav", make_sound(*one))) for number, one in enumerate(lengths)]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    folder = tmp_path_factory.mktemp("classifier")
    save_classifier(folder / "source")
    return export(str(folder / "source"), folder / "bundle")


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        *((model_type, {}) for model_type in supported_signal_model_types("input_values")),
        ("wav2vec2", {"problem_type": "multi_label_classification", "use_weighted_layer_sum": True}),
    ],
)
def test_answers_equal_the_pipeline(
    tmp_path: Path, sounds: list[str], model_type: str, settings: dict[str, Any]
) -> None:
    model = save_classifier(tmp_path / "source", model_type, **settings)
    bundle = export(str(tmp_path / "source"), tmp_path / "bundle")
    assert bundle.manifest.task == "audio-classification"
    assert bundle.manifest.architecture["labels"] == list(LABELS.values())
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "source")
    pipeline = transformers.pipeline("audio-classification", model, feature_extractor=extractor)
    answers = audio_classification.answer(bundle, sounds, threads=1, top_k=3)
    for path, one in zip(sounds, answers, strict=True):
        with wave.open(path, "rb") as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
        expected = pipeline((samples.mean(1) / 32768).astype(np.float32), top_k=3)
        assert one["audio"] == path
        assert [label["label"] for label in one["labels"]] == [label["label"] for label in expected]
        scores = [label["score"] for label in expected]
        np.testing.assert_allclose([label["score"] for label in one["labels"]], scores, rtol=1e-3)
        assert (one["label"], one["score"]) == tuple(one["labels"][0].values())


def test_infer_prints_labels(fp32: ModelBundle, sounds: list[str]) -> None:
    arguments = ["infer", str(fp32.path), "--audio", sounds[0], "--audio", sounds[1], "--format", "json"]
    answers = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert [one["audio"] for one in answers] == sounds[:2]
    assert [len(one["labels"]) for one in answers] == [4, 4]


def test_recordings_and_options_that_do_not_fit(fp32: ModelBundle, tmp_path: Path) -> None:
    path = str(write_wav(tmp_path / "a.wav", make_sound(SHORTEST - 1)))
    with pytest.raises(InputError, match="29 samples, the model takes 30 or more"):
        audio_classification.answer(fp32, [path])
    with pytest.raises(OptionError, match="--top-k 0"):
        audio_classification.answer(fp32, [path], top_k=0)


def test_quantized_classifier_is_measured(fp32: ModelBundle, sounds: list[str], tmp_path: Path) -> None:
    int8 = quantize(fp32.path, tmp_path / "int8", QuantizeOptions("int8"))
    assert 0 < int8.manifest.measured["quantize"]["kld"] < 0.05
    answers = audio_classification.answer(fp32, sounds)
    data = tmp_path / "labels.txt"
    data.write_text("".join(f"{one['label']}\t{one['audio']}\n" for one in answers))
    first, second = bench([fp32.path, int8.path], BenchOptions(rounds=1, warmup=0, data=data)).document()["rows"]
    assert (first["accuracy"], first["flipped_labels"]) == (1, 0)
    assert first["forward_s"] > 0
    assert first["output_error"] == 0 < second["output_error"] < 0.2
    ours, theirs = (audio_classification.answer(one, sounds, top_k=1) for one in (int8, fp32))
    assert all(abs(one["score"] - two["score"]) < 0.1 for one, two in zip(ours, theirs, strict=True))
