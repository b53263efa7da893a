"""Whisper: spectrograms, graphs and texts against transformers, and bad input."""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from llmfast.bench.options import BenchOptions
from llmfast.bench.stage import bench
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import GateError, InputError, OptionError, UnsupportedError
from llmfast.export import seq2seq_parity
from llmfast.export.stage import ExportOptions, export
from llmfast.infer.recordings import SpokenPrompt
from llmfast.quantize.stage import QuantizeOptions, quantize
from llmfast.spectrogram import SpectrogramProcessor
from llmfast.tasks import automatic_speech_recognition as speech
from tests.tiny_speech import RATE, make_sound, write_wav
from tests.tiny_whisper import IDS, MULTILINGUAL, SECONDS, save_whisper

ENGLISH = {"no_timestamps_token_id": IDS["<|notimestamps|>"], "suppress_tokens": [3], "begin_suppress_tokens": [52]}
# What checkpoints say in generation_config.json: newer ones, older ones, those of one language.
GENERATION: dict[str, dict[str, Any]] = {
    "heard": MULTILINGUAL,
    "told": MULTILINGUAL | {"language": "de", "task": "translate"},
    "forced": MULTILINGUAL | {"forced_decoder_ids": [[1, None], [2, IDS["<|transcribe|>"]]]},
    "forced-language": MULTILINGUAL | {"forced_decoder_ids": [[1, IDS["<|fr|>"]], [2, IDS["<|translate|>"]]]},
    "english": ENGLISH,
    "english-forced": ENGLISH | {"forced_decoder_ids": [[1, IDS["<|notimestamps|>"]]]},
}


@dataclass(frozen=True)
class Exported:
    """A Whisper as PyTorch has it, and its bundle."""

    model: Any
    source: Path
    bundle: ModelBundle


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Return a function that gives a Whisper with some settings of generation; do not change the files.

    It is exported once: the settings are a file that is copied beside the graphs.
    """

    @functools.cache
    def get(name: str = "heard") -> Exported:
        folder = tmp_path_factory.mktemp(name)
        model = save_whisper(folder / "source", GENERATION[name])
        if name == "heard":
            return Exported(model, folder / "source", export(str(folder / "source"), folder / "bundle"))
        heard = get("heard").bundle
        shutil.copytree(heard.path, folder / "bundle")
        shutil.copyfile(folder / "source" / "generation_config.json", folder / "bundle" / "generation_config.json")
        bundle = ModelBundle(folder / "bundle", heard.manifest, folder / "bundle" / heard.model.name)
        return Exported(model, folder / "source", bundle)

    return get


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return recordings of several lengths, more than one batch."""
    folder = tmp_path_factory.mktemp("sounds")
    lengths = ((RATE * SECONDS,), (9000,), (12000, 2), (700,), (3,), (5000,))
    return [str(write_wav(folder / f"{number}.wav", make_sound(*one))) for number, one in enumerate(lengths)]


def _features(found: Exported, paths: list[str]) -> torch.Tensor:
    processor = SpectrogramProcessor.load(found.source)
    return torch.from_numpy(np.stack([processor.read(Path(path)) for path in paths]))


@pytest.mark.parametrize("sizes", [{}, {"feature_size": 128}, {"chunk_length": 5, "hop_length": 128, "n_fft": 512}])
@pytest.mark.parametrize("length", [1, 4001, 5 * RATE])
def test_spectrogram_equals_transformers(tmp_path: Path, sizes: dict[str, int], length: int) -> None:
    extractor = transformers.WhisperFeatureExtractor(**sizes)
    extractor.save_pretrained(tmp_path)
    path = write_wav(tmp_path / "a.wav", make_sound(length))
    actual = SpectrogramProcessor.load(tmp_path).read(path)
    samples = make_sound(length).astype(np.float32) / 32768
    expected = extractor(samples, sampling_rate=RATE, return_tensors="np").input_features[0]
    assert (actual.dtype, actual.shape) == (np.float32, expected.shape)
    np.testing.assert_allclose(actual, expected, atol=2e-4)  # PyTorch's has float32 inside
    filled = np.zeros((1, extractor.n_samples), np.float32)
    filled[0, :length] = samples
    np.testing.assert_allclose(actual, extractor._np_extract_fbank_features(filled, "cpu")[0], atol=1e-5)


def test_graphs_equal_pytorch(tmp_path: Path) -> None:
    save_whisper(tmp_path / "source", init_std=0.2)
    manifest = export(str(tmp_path / "source"), tmp_path / "bundle").manifest
    assert manifest.task == "automatic-speech-recognition"
    assert manifest.measured["export"]["parity"]["max_abs_diff"] < 1e-4
    assert manifest.measured["export"]["parity"]["argmax_agreement"] == 1
    assert manifest.graphs["encoder"]["inputs"] == ["input_features"]


@pytest.mark.parametrize("name", GENERATION)
@pytest.mark.parametrize("num_beams", [1, 4])
def test_tokens_equal_generate(exported: Callable[..., Exported], sounds: list[str], name: str, num_beams: int) -> None:
    found = exported(name)
    _check_tokens(found, sounds, {"num_beams": num_beams}, {"num_beams": num_beams})


def test_language_that_the_user_names(exported: Callable[..., Exported], sounds: list[str]) -> None:
    texts = set()
    for name in ("heard", "told", "forced-language"):
        for code in ("fr", "<|en|>"):
            _check_tokens(exported(name), sounds, {"source_lang": code}, {"language": code})
            answers = speech.answer(exported(name).bundle, sounds[:1], source_lang=code)
            texts.add(answers[0]["text"])
            assert answers[0]["language"] == code.strip("<|>")
    assert len(texts) > 2


def _check_tokens(found: Exported, paths: list[str], ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare answers with what `generate` finds for all recordings in one batch."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(found.source / "tokenizer.json"))
    answers = speech.answer(found.bundle, paths, max_tokens=20, **ours)
    expected = found.model.generate(_features(found, paths), max_new_tokens=20, **theirs)
    end = IDS["<|endoftext|>"]
    for one, row in zip(answers, expected.tolist(), strict=True):
        ids = row[: row.index(end)] if end in row else row
        assert one["text"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert one["generated_tokens"] == len(ids)
        assert one["finish_reason"] == ("eos" if len(ids) < 20 else "length")


@pytest.mark.parametrize("name", ["heard", "told", "english"])
def test_texts_differ_and_some_end(exported: Callable[..., Exported], sounds: list[str], name: str) -> None:
    answers = speech.answer(exported(name).bundle, sounds, max_tokens=20)
    assert {one["finish_reason"] for one in answers} == {"eos", "length"}
    assert len({one["text"] for one in answers}) > 2
    assert {one["language"] for one in answers} <= {None if name == "english" else code for code in ("en", "de", "fr")}


def test_parity_sees_another_model(exported: Callable[..., Exported], tmp_path: Path) -> None:
    found = exported()
    save_whisper(tmp_path, activation_function="relu")
    manifest = found.bundle.manifest
    from llmfast.export.encoder_decoder import Spectrogram

    with pytest.raises(GateError, match="differs from PyTorch"):
        seq2seq_parity.prove_encoder_decoder(
            tmp_path, found.bundle.path, manifest, (62, 62), Spectrogram(12, 50), 1, lambda: None
        )


def test_infer_prints_what_was_said(exported: Callable[..., Exported], sounds: list[str]) -> None:
    arguments = ["infer", str(exported().bundle.path), "--audio", sounds[0], "--audio", sounds[1], "--max-tokens", "9"]
    answers = json.loads(CliRunner().invoke(app, [*arguments, "--format", "json"]).stdout)
    assert [one["audio"] for one in answers] == sounds[:2]
    assert CliRunner().invoke(app, arguments).stdout == "".join(f"{one['text']}\n" for one in answers)


def test_recordings_and_languages_that_do_not_fit(exported: Callable[..., Exported], tmp_path: Path) -> None:
    long = str(write_wav(tmp_path / "long.wav", make_sound(RATE * SECONDS + 1)))
    with pytest.raises(InputError, match=r"is 1\.0 seconds long, the model hears 1"):
        speech.answer(exported().bundle, [long])
    with pytest.raises(OptionError, match="unknown language `nl`") as caught:
        speech.answer(exported().bundle, [long], source_lang="nl")
    assert caught.value.hint == "the model knows: de, en, fr"
    with pytest.raises(OptionError, match="unknown language `en`"):
        speech.answer(exported("english").bundle, [long], source_lang="en")


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"return_timestamps": True}, UnsupportedError, "sets return_timestamps"),
        ({"forced_decoder_ids": [[2, 57]]}, InputError, "have gaps"),
        ({"forced_decoder_ids": 3}, InputError, "malformed settings"),
        ({"task": "sing"}, InputError, "malformed settings"),
        ({"lang_to_id": [1]}, InputError, "malformed settings"),
    ],
)
def test_settings_that_are_not_understood(
    tmp_path: Path, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(MULTILINGUAL | {"decoder_start_token_id": 53} | settings))
    with pytest.raises(kind, match=message):
        SpokenPrompt.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, UnsupportedError, "`Wav2Vec2FeatureExtractor`"),
        ({"dither": 0.5}, UnsupportedError, "`dither` of 0.5"),
        ({"hop_length": 0}, InputError, "`hop_length` 0"),
        ({"feature_size": 80}, InputError, "makes spectrograms of 80x100, config.json wants 12x100"),
    ],
)
def test_export_of_unfit_processors(tmp_path: Path, config: Any, kind: type[Exception], message: str) -> None:
    save_whisper(tmp_path / "source", encoder_layers=1, decoder_layers=1)
    path = tmp_path / "source" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(kind, match=message):
        export(str(tmp_path / "source"), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_whisper_is_for_speech_only(exported: Callable[..., Exported], tmp_path: Path) -> None:
    for task in ("translation", "audio-classification"):
        with pytest.raises(UnsupportedError, match=f"`whisper` can't be exported for {task}"):
            export(str(exported().source), tmp_path / "out", ExportOptions(task=task))


def test_quantized_whisper_is_measured(exported: Callable[..., Exported], sounds: list[str], tmp_path: Path) -> None:
    fp32 = exported().bundle
    int8 = quantize(fp32.path, tmp_path / "int8", QuantizeOptions("int8"))
    assert 0 < int8.manifest.measured["quantize"]["relative_error"] < 0.2
    assert all(one["text"] for one in speech.answer(int8, sounds, max_tokens=5))
    with pytest.raises(UnsupportedError, match="llmfast ships no recordings"):
        quantize(fp32.path, tmp_path / "gptq", QuantizeOptions("int8", "gptq"))
    first, second = bench([fp32.path, int8.path], BenchOptions(rounds=1, warmup=0)).document()["rows"]
    assert first["forward_s"] > 0
    assert first["output_error"] == 0 < second["output_error"] < 0.2
