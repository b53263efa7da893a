"""Speech to text with CTC: sound, graphs and characters against transformers and PyTorch, and bad input."""

import functools
import json
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from typer.testing import CliRunner

from llmfast.audio import AudioProcessor
from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError, UnsupportedError
from llmfast.export.stage import export
from llmfast.export.traced_signals import supported_signal_model_types
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.tasks import automatic_speech_recognition as speech
from tests.tiny_prompts import infer_file, read_answers, write_lines
from tests.tiny_speech import RATE, SHORTEST, TOKENS, make_sound, save_speech_encoder, write_wav


@dataclass(frozen=True)
class Exported:
    """An encoder of sound as PyTorch has it, and its bundle."""

    model: Any
    source: Path
    bundle: ModelBundle


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Return a function that exports an encoder of a type, once; do not change the files."""

    @functools.cache
    def get(model_type: str = "wav2vec2") -> Exported:
        folder = tmp_path_factory.mktemp(model_type)
        model = save_speech_encoder(folder / "source", model_type)
        return Exported(model, folder / "source", export(str(folder / "source"), folder / "bundle"))

    return get


@pytest.mark.parametrize("model_type", supported_signal_model_types("input_values"))
def test_encoder_equals_pytorch_at_other_lengths(exported: Callable[..., Exported], model_type: str) -> None:
    found = exported(model_type)
    manifest = found.bundle.manifest
    assert manifest.task == "automatic-speech-recognition"
    assert manifest.architecture["labels"] == TOKENS
    assert manifest.architecture["min_samples"] == SHORTEST
    assert manifest.measured["export"]["parity"]["max_abs_diff"] < 1e-4
    session = onnxruntime.InferenceSession(found.bundle.model, providers=["CPUExecutionProvider"])
    assert [value.shape for value in session.get_inputs()] == [["batch", "samples"]]
    for shape in ((1, SHORTEST), (2, 333), (3, 4001)):
        values = np.random.default_rng(0).standard_normal(shape, np.float32)
        with torch.no_grad():
            expected = found.model(input_values=torch.from_numpy(values)).logits.numpy()
        assert np.ptp(expected) > 0.1
        actual = session.run(["logits"], {"input_values": values})[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_variant_of_the_large_models(tmp_path: Path) -> None:
    settings = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    model = save_speech_encoder(tmp_path / "source", lower_case=True, **settings)
    bundle = export(str(tmp_path / "source"), tmp_path / "bundle")
    _check_text(Exported(model, tmp_path / "source", bundle), write_wav(tmp_path / "a.wav", make_sound(3000)))


@pytest.mark.parametrize("model_type", supported_signal_model_types("input_values"))
def test_text_equals_transformers(exported: Callable[..., Exported], tmp_path: Path, model_type: str) -> None:
    for number, sound in enumerate((make_sound(5000), make_sound(801, 2), make_sound(SHORTEST, 1))):
        _check_text(exported(model_type), write_wav(tmp_path / f"{number}.wav", sound))


def _check_text(found: Exported, path: Path) -> None:
    """Compare an answer with what feature extractor, model and tokenizer of transformers make of the samples."""
    with wave.open(str(path), "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
    extractor = transformers.AutoFeatureExtractor.from_pretrained(found.source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.source)
    values = extractor(samples.mean(1) / 32768, sampling_rate=RATE, return_tensors="pt").input_values.float()
    np.testing.assert_allclose(AudioProcessor.load(found.bundle.path).read(path), values[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = tokenizer.decode(found.model(values).logits[0].argmax(-1))
    assert speech.answer(found.bundle, [str(path)], threads=1) == [{"audio": str(path), "text": expected}]


@pytest.mark.parametrize("lower_case", [False, True])
@pytest.mark.parametrize("clean_up", [False, True])
def test_characters_are_joined_as_the_tokenizer_does(tmp_path: Path, lower_case: bool, clean_up: bool) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(TOKENS)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(
        tmp_path / "vocab.json", do_lower_case=lower_case, clean_up_tokenization_spaces=clean_up
    )
    rules = {
        "blank": "<pad>",
        "word_delimiter": "|",
        "space": " ",
        "lower_case": lower_case,
        "clean_up_spaces": clean_up,
    }
    rng = np.random.default_rng(0)
    texts = set()
    for length in (0, 1, *range(2, 60)):
        ids = np.repeat(rng.integers(len(TOKENS), size=length), rng.integers(1, 3, size=length))
        texts.add(speech.decode(ids, TOKENS, rules))
        assert speech.decode(ids, TOKENS, rules) == tokenizer.decode(ids.tolist())
    assert len(texts) > 50
    fixed = [TOKENS.index(one) for one in (*"|TEA", "|", ".", "|", "'", "S", "|", "'", "|", "<pad>", *"NNOO<"[:4])]
    assert speech.decode(np.array(fixed), TOKENS, rules) == tokenizer.decode(fixed)


def test_infer_prints_what_was_said(exported: Callable[..., Exported], tmp_path: Path) -> None:
    paths = [str(write_wav(tmp_path / f"{length}.wav", make_sound(length))) for length in (2000, 3000)]
    bundle = str(exported().bundle.path)
    arguments = ["infer", bundle, "--audio", paths[0], "--audio", paths[1]]
    answers = json.loads(CliRunner().invoke(app, [*arguments, "--format", "json"]).stdout)
    assert [one["audio"] for one in answers] == paths
    assert CliRunner().invoke(app, arguments).stdout == "".join(f"{one['text']}\n" for one in answers)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda path: None, InputError, "not found"),
        (lambda path: path.write_bytes(b"RIFFnothing"), InputError, "not a WAV file of PCM samples"),
        (lambda path: path.write_bytes(b""), InputError, "not a WAV file of PCM samples"),
        (
            lambda path: write_wav(path, make_sound(900), 8000),
            InputError,
            "8000 samples a second, the model takes 16000",
        ),
        (lambda path: write_wav(path, make_sound(0)), InputError, "no sound in"),
        (lambda path: write_wav(path, make_sound(SHORTEST - 1)), InputError, "29 samples, the model takes 30 or more"),
        (lambda path: write_wav(path, make_sound(900), width=4), InputError, "samples of 32 bits"),
    ],
)
def test_recordings_that_can_not_be_read(
    exported: Callable[..., Exported],
    tmp_path: Path,
    make: Callable[[Path], object],
    kind: type[Exception],
    message: str,
) -> None:
    make(tmp_path / "a.wav")
    with pytest.raises(kind, match=message):
        speech.answer(exported().bundle, [str(tmp_path / "a.wav")])


def test_a_recording_that_can_not_be_read_is_a_bad_line(exported: Callable[..., Exported], tmp_path: Path) -> None:
    good = str(write_wav(tmp_path / "good.wav", make_sound(900)))
    wide = str(write_wav(tmp_path / "wide.wav", make_sound(900), width=4))
    source = write_lines(tmp_path / "sounds.jsonl", *({"audio": path} for path in (good, wide, good)))
    result = infer_file(exported().bundle.path, source, tmp_path / "texts.jsonl")
    assert result.exit_code == 3
    assert "line 2: `" in result.stderr
    assert "samples of 32 bits" in result.stderr
    (expected,) = speech.answer(exported().bundle, [good])
    assert [(one["id"], one["text"]) for one in read_answers(tmp_path / "texts.jsonl")] == [
        (1, expected["text"]),
        (3, expected["text"]),
    ]


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({}, UnsupportedError, "audio processor `None`"),
        ({"feature_extractor_type": "WhisperFeatureExtractor"}, UnsupportedError, "`WhisperFeatureExtractor`"),
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "dither": 0.5}, UnsupportedError, "`dither` of 0.5"),
        (
            {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": "x"},
            InputError,
            "`sampling_rate` 'x'",
        ),
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 80}, InputError, "`feature_size` 80"),
        ([], InputError, "not an object"),
    ],
)
def test_processor_that_is_not_understood(tmp_path: Path, config: Any, kind: type[Exception], message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=message):
        AudioProcessor.load(tmp_path)


def test_export_of_unfit_checkpoints(tmp_path: Path) -> None:
    save_speech_encoder(tmp_path / "source", adapter_attn_dim=4)
    with pytest.raises(UnsupportedError, match="adapters for languages"):
        export(str(tmp_path / "source"), tmp_path / "out")
    (tmp_path / "source" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
        export(str(tmp_path / "source"), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_quantized_bundle_is_measured_on_random_sound(
    exported: Callable[..., Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp32 = exported().bundle
    int8 = quantize(fp32.path, tmp_path / "int8", QuantizeOptions("int8"))
    assert "compared on random inputs" in capsys.readouterr().err
    assert 0 < int8.manifest.measured["quantize"]["kld"] < 0.05
    [answer] = speech.answer(int8, [str(write_wav(tmp_path / "a.wav", make_sound(4000)))])
    assert answer["text"]
    first, second = bench([fp32.path, int8.path], BenchOptions(rounds=1, warmup=0)).document()["rows"]
    assert first["forward_s"] > 0
    assert first["output_error"] == 0 < second["output_error"] < 0.2
