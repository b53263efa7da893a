"""Whisper calibrated and compared on recordings, against PyTorch and plain computation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.export.stage import export
from llmfast.graph.model import OnnxModel
from llmfast.infer.seq2seq import Seq2SeqEngine
from llmfast.prune.options import PruneOptions
from llmfast.prune.stage import plan as prune_plan
from llmfast.prune.stage import prune
from llmfast.quantize import sensitivity
from llmfast.quantize.budget import Budget
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.corpus import Corpus
from llmfast.quantize.measure import SEQ_LEN
from llmfast.quantize.pairs import Pair, RecordingReader, feed_pairs
from llmfast.quantize.plan import Plan, choose_layers
from llmfast.quantize.stage import QuantizeOptions, plan_layers, quantize
from llmfast.quantize.workpiece import Workpiece
from llmfast.tasks import automatic_speech_recognition as speech
from tests.tiny_speech import make_sound, write_wav
from tests.tiny_whisper import IDS, save_whisper

# Layers of the graphs, and the PyTorch modules that are given the same inputs.
SAME = {
    "encoder.layers.1.fc2": "model.encoder.layers.1.fc2",
    "decoder.layers.1.encoder_attn.kv_proj": "model.decoder.layers.1.encoder_attn.k_proj",
    "decoder.layers.1.fc1": "model.decoder.layers.1.fc1",
}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelBundle]:
    """Return a Whisper as PyTorch has it, and its bundle."""
    folder = tmp_path_factory.mktemp("whisper")
    model = save_whisper(folder / "source")
    return model, export(str(folder / "source"), folder / "bundle")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of nine recordings, and a text among them."""
    folder = tmp_path_factory.mktemp("sounds")
    for number in range(9):
        write_wav(folder / f"{number}.wav", make_sound(3000 + 1400 * number))
    (folder / "notes.txt").write_text("not a recording\n", encoding="utf-8")
    return folder


def _pairs(bundle: ModelBundle, sounds: Path, seq_len: int = 30) -> list[Pair]:
    reader = RecordingReader(bundle)
    return reader.complete(reader.read(Corpus(sounds), seq_len), seq_len, "calibrate")


def test_targets_are_what_the_float_model_hears(whisper: Any, sounds: Path) -> None:
    _, bundle = whisper
    files = [str(sounds / f"{number}.wav") for number in range(9)]
    answers = speech.answer(bundle, files, max_tokens=27)
    for pair, answer in zip(_pairs(bundle, sounds), answers, strict=True):
        assert pair.target is not None
        start, language, no_times, *written = pair.target.tolist()
        assert (start, language) == (IDS["<|startoftranscript|>"], IDS[f"<|{answer['language']}|>"])
        assert no_times == IDS["<|notimestamps|>"]
        assert (pair.target[-1] == IDS["<|endoftext|>"]) == (answer["finish_reason"] == "eos")
        assert len([token for token in written if token != IDS["<|endoftext|>"]]) == answer["generated_tokens"]


def test_statistics_are_those_of_pytorch(whisper: Any, sounds: Path) -> None:
    model, bundle = whisper
    pairs = _pairs(bundle, sounds)[:4]
    models = {role: OnnxModel.load(path) for role, path in bundle.graphs.items()}
    samples, plan = feed_pairs(models, pairs), Plan.make("int4", "rtn", {})
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in SAME}
    hooks = [
        model.get_submodule(module).register_forward_pre_hook(lambda _, given, kept=seen[layer]: kept.append(given[0]))
        for layer, module in SAME.items()
    ]
    with torch.no_grad():
        for pair in pairs:
            features = torch.from_numpy(pair.source.read()[None])
            model(input_features=features, decoder_input_ids=torch.from_numpy(pair.target[None, :-1]))
    for hook in hooks:
        hook.remove()
    found = {}
    for role, one in models.items():
        workpiece = Workpiece(one, choose_layers(one, plan, "", ""), samples[role])
        inputs = {linear.name: linear.input for linear in workpiece.linears if linear.name in seen}
        statistics = dict(workpiece.measure(list(dict.fromkeys(inputs.values())), gram=True))
        found |= {layer: statistics[value] for layer, value in inputs.items()}
    assert found.keys() == seen.keys()
    for layer, parts in seen.items():
        rows = torch.cat([part[0] for part in parts]).double().numpy()
        assert found[layer].num_tokens == len(rows)
        np.testing.assert_allclose(found[layer].abs_max, np.abs(rows).max(0), rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(found[layer].gram, rows.T @ rows / len(rows), rtol=2e-2, atol=1e-2)


def test_figures_are_those_of_a_plain_computation(whisper: Any, sounds: Path, tmp_path: Path) -> None:
    """On the recordings that calibration left over, given what the float model hears."""
    _, bundle = whisper
    options = QuantizeOptions("int4", "gptq", calibration=Calibration(sounds, num_samples=6, seq_len=30))
    small = quantize(bundle.path, tmp_path / "int4", options)
    step, measured = small.manifest.lineage[-1], small.manifest.measured["quantize"]
    assert step.calibration["name"] == sounds.name
    assert measured["text"]["num_samples"] == 3
    engines = [Seq2SeqEngine(one, threads=1) for one in (bundle, small)]
    gaps = []
    for pair in _pairs(bundle, sounds, SEQ_LEN)[6:]:
        logs = []
        for engine in engines:
            engine.encode_features(pair.source.read()[None])
            scores = engine.score(pair.target[None])[0, :-1].astype(np.float64)
            logs.append(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))
        gaps.append((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1))
    assert measured["kld"] == pytest.approx(np.concatenate(gaps).mean(), rel=2e-2)


def test_gptq_is_nearer_than_rounding_and_a_list_is_as_good_as_a_folder(
    whisper: Any, sounds: Path, tmp_path: Path
) -> None:
    _, bundle = whisper
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{sounds / f'{number}.wav'}\n" for number in range(9)), encoding="utf-8")
    made = {
        name: quantize(
            bundle.path,
            tmp_path / name,
            QuantizeOptions("int4", method, calibration=Calibration(path, 6), data=sounds, data_samples=9),
        )
        for name, method, path in (("rtn", "rtn", None), ("folder", "gptq", sounds), ("list", "gptq", names))
    }
    kld = {name: one.manifest.measured["quantize"]["kld"] for name, one in made.items()}
    assert kld["folder"] == kld["list"] < kld["rtn"]
    for path in made["folder"].graphs.values():
        assert path.read_bytes() == (made["list"].path / path.name).read_bytes()
    digest = made["folder"].manifest.lineage[-1].calibration["sha256"]
    (copy := tmp_path / "copy").mkdir()
    for file in sounds.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert Corpus(copy).describe()["sha256"] == digest
    write_wav(copy / "3.wav", make_sound(2000))
    assert Corpus(copy).describe()["sha256"] != digest


def test_where_no_recording_is_left_the_encoder_is_compared(
    whisper: Any, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, bundle = whisper
    options = QuantizeOptions("int8", "smoothquant", calibration=Calibration(sounds, 9))
    measured = quantize(bundle.path, tmp_path / "out", options).manifest.measured["quantize"]
    assert "the encoder alone is compared: llmfast ships no recordings" in capsys.readouterr().err
    assert measured["relative_error"] < 0.2


def test_what_can_not_be_heard_is_refused(whisper: Any, sounds: Path, fp32_bundle: Path, tmp_path: Path) -> None:
    _, bundle = whisper
    output, empty, names = tmp_path / "out", tmp_path / "empty", tmp_path / "names.txt"
    empty.mkdir()
    names.write_text("nowhere.wav\n", encoding="utf-8")
    for path, kind, words in (
        (None, UnsupportedError, "llmfast ships no recordings"),
        (empty, InputError, r"no \.wav file in"),
        (names, InputError, r"no recording `.*nowhere\.wav`, which `.*names\.txt` lists"),
    ):
        options = QuantizeOptions("int4", "gptq", calibration=Calibration(path))
        for run in (quantize, plan_layers):
            with pytest.raises(kind, match=words):
                run(bundle.path, output, options)
    with pytest.raises(OptionError, match="--seq-len 1"):
        quantize(bundle.path, output, QuantizeOptions("int4", "gptq", calibration=Calibration(sounds, 2, 1)))
    for run in (quantize, plan_layers):
        with pytest.raises(InputError, match="cannot read"):  # a text is wanted
            run(fp32_bundle, output, QuantizeOptions("int4", "gptq", calibration=Calibration(sounds)))
    assert not output.exists()


def test_a_plan_to_prune_takes_the_recordings_that_pruning_takes(whisper: Any, sounds: Path, tmp_path: Path) -> None:
    _, bundle = whisper
    options = PruneOptions("magnitude", {"": 0.5}, data=sounds)
    rows = prune_plan(str(bundle.path), tmp_path / "out", options)
    pruned = prune(str(bundle.path), tmp_path / "out", options)
    assert rows == [{key: row[key] for key in rows[0]} for row in pruned.layers or ()]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.wav file in"):
        prune_plan(str(bundle.path), tmp_path / "other", replace(options, data=tmp_path / "empty"))


def test_budgets_are_by_what_both_graphs_do(whisper: Any, sounds: Path, tmp_path: Path) -> None:
    _, bundle = whisper
    uniform = quantize(bundle.path, tmp_path / "uniform", QuantizeOptions("int4", data=sounds))
    budget = Budget(max_bits=1.001 * uniform.manifest.bits_per_weight)
    calibration = Calibration(sounds, num_samples=6, seq_len=30)
    options = QuantizeOptions("int4", budget=budget, calibration=calibration, data=sounds)
    small = quantize(bundle.path, tmp_path / "small", options)
    assert small.manifest.bits_per_weight <= budget.max_bits
    klds = [one.manifest.measured["quantize"]["kld"] for one in (small, uniform)]
    assert klds[0] <= klds[1]
    ranking = json.loads((small.path / sensitivity.FILE).read_text())["layers"]
    assert {row["name"].split(".")[0] for row in ranking} >= {"encoder", "decoder"}
    assert max(row["damage"] for row in ranking) > 0


def test_budgets_need_recordings_to_measure_and_to_compare_on(whisper: Any, sounds: Path, tmp_path: Path) -> None:
    _, bundle = whisper
    output = tmp_path / "out"
    result = CliRunner().invoke(app, ["quantize", str(bundle.path), "-o", str(output), "--target-bits", "6"])
    assert result.exit_code == 5
    assert "llmfast ships no recordings" in result.stderr
    options = QuantizeOptions("int4", budget=Budget(max_bits=6.0), calibration=Calibration(sounds, 9))
    with pytest.raises(UnsupportedError, match="a budget compares what both graphs answer: llmfast ships no"):
        quantize(bundle.path, output, options)
    assert list(tmp_path.iterdir()) == []
