"""Pruned checkpoints: what is written loads, runs and exports; and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from llmfast import registry
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError, OptionError, UnsafeInputError, UnsupportedError
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.stage import export
from llmfast.lineage import LINEAGE, read_lineage
from llmfast.prune.checkpoint.workpiece import Workpiece
from llmfast.prune.stage import plan, prune
from llmfast.tokenizer import Tokenizer
from tests.tiny_encoder import WORDS, save_encoder
from tests.tiny_prune import CALIBRATION, METHODS, options_of


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


@pytest.mark.parametrize("architecture", ["llama-biases", "qwen2", "qwen3", "gemma2", "smollm3", "granite-tied"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "vocabulary"])
def test_a_pruned_decoder_is_a_plain_checkpoint(
    architecture: str, method: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoints(architecture)
    options = options_of(method, ratios={"": 0.5})
    if (architecture, method) == ("gemma2", "width"):
        with pytest.raises(UnsupportedError, match="norms follow its layers"):
            prune(str(source), tmp_path / "pruned", options)
        return
    measured = prune(str(source), tmp_path / "pruned", options).document()
    before, after = measured["rows"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    field = registry.load("prune.structured", method).size_of(
        Workpiece(SafetensorsCheckpoint(source), "text-generation", tmp_path).family
    )
    assert getattr(model.config, field) == getattr(SafetensorsCheckpoint(source).config, field) // 2
    assert sum(one.numel() for one in model.parameters()) == after["num_parameters"] < before["num_parameters"]
    assert np.isfinite([after["kld"], after["perplexity"], before["perplexity"]]).all()
    assert after["perplexity"] / before["perplexity"] == pytest.approx(after["perplexity_ratio"])
    assert plan(str(source), tmp_path / "other", options)[-1]["after"] == after["num_parameters"]


@pytest.mark.parametrize("methods", ["layers,ffn", "heads,width", "ffn,vocabulary"])
def test_methods_go_together_and_their_result_exports(
    methods: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Parity with PyTorch is proven by the export, which knows the steps before it."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    source = checkpoints("llama-tied")
    calibration = replace(CALIBRATION, path=corpus)
    prune(str(source), tmp_path / "pruned", options_of(methods, ratios={"": 0.5}, calibration=calibration))
    bundle = export(str(tmp_path / "pruned"), tmp_path / "fp32")
    assert [(step.stage, step.method) for step in bundle.manifest.lineage] == [("prune", methods), ("export", "direct")]
    assert bundle.manifest.lineage[0].calibration["name"] == "corpus.txt"
    prune(str(tmp_path / "pruned"), tmp_path / "again", options_of("ffn", ratios={"": 0.2}, measure=False))
    assert [step.method for step in read_lineage(tmp_path / "again")] == [methods, "ffn"]


@pytest.mark.parametrize("method", ["layers", "ffn", "width"])
def test_a_pruned_encoder_is_a_plain_checkpoint(method: str, tmp_path: Path) -> None:
    for model_type in ("bert", "distilbert", "roberta"):
        source = tmp_path / model_type
        settings = {"n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 48} if model_type == "distilbert" else {}
        save_encoder(source, model_type, **(settings or {"num_hidden_layers": 2}))
        output = tmp_path / f"{model_type}-pruned"
        measured = prune(str(source), output, options_of(method, ratios={"": 0.5})).document()
        model, info = AutoModel.from_pretrained(output, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert sum(one.numel() for one in model.parameters()) == measured["rows"][1]["num_parameters"]
        assert ("cosine" in measured["rows"][1]) == (method != "width")


def test_a_pruned_classifier_exports_and_keeps_its_labels(tmp_path: Path) -> None:
    save_encoder(tmp_path / "bert", auto_model="AutoModelForSequenceClassification", num_labels=3)
    measured = prune(str(tmp_path / "bert"), tmp_path / "pruned", options_of("width,ffn", ratios={"": 0.5})).document()
    assert 0 <= measured["rows"][1]["flipped_labels"] <= 1
    bundle = export(str(tmp_path / "pruned"), tmp_path / "fp32")
    assert len(bundle.manifest.architecture["labels"]) == 3
    assert bundle.manifest.architecture["hidden_size"] == 16
    assert bundle.manifest.lineage[0].stage == "prune"


def test_scores_of_a_pruned_ranker_are_compared_by_their_error(tmp_path: Path) -> None:
    save_encoder(tmp_path / "bert", auto_model="AutoModelForSequenceClassification", num_labels=1)
    measured = prune(str(tmp_path / "bert"), tmp_path / "pruned", options_of("ffn", ratios={"": 0.5})).document()
    assert measured["rows"][1]["relative_error"] > 0
    assert "kld" not in measured["rows"][1]


def test_sentence_transformers_files_go_along(tmp_path: Path) -> None:
    source = tmp_path / "bert"
    save_encoder(source)
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    types = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]
    (source / "modules.json").write_text(json.dumps(types))
    (source / "model.py").write_text("raise SystemExit")
    prune(str(source), tmp_path / "pruned", options_of("width", ratios={"": 0.5}))
    kept = json.loads((tmp_path / "pruned" / "1_Pooling" / "config.json").read_text())
    assert kept == pooling | {"word_embedding_dimension": 16}
    assert (tmp_path / "pruned" / "modules.json").is_file()
    assert not (tmp_path / "pruned" / "model.py").exists()


def test_an_older_tokenizer_of_sentence_transformers_is_converted(tmp_path: Path) -> None:
    source = tmp_path / "bert"
    save_encoder(source)
    (source / "tokenizer.json").unlink()
    (source / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    templates = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]  # which get a folder
    settings = {"tokenizer_class": "BertTokenizer", "chat_template": templates}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (source / "modules.json").write_text(json.dumps([{"type": "a.Pooling", "path": "1_Pooling"}]))
    (source / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    prune(str(source), tmp_path / "pruned", options_of("ffn", ratios={"": 0.5}))
    assert Tokenizer.load(tmp_path / "pruned").encode("the cat") == [2, 4, 5, 3]
    names = ("1_Pooling/config.json", "modules.json", "sentence_bert_config.json")
    assert all((tmp_path / "pruned" / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert not (tmp_path / "pruned" / "additional_chat_templates").exists()
    bundle = export(str(tmp_path / "pruned"), tmp_path / "fp32")
    assert bundle.manifest.architecture["max_seq_length"] == 24


def test_the_same_options_give_the_same_bytes(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        options = options_of("layers,ffn,heads", target_params=0.6, calibration=replace(CALIBRATION, seed=5))
        prune(str(checkpoints("llama-tied")), tmp_path / name / "out", options)
    files = sorted(file.name for file in (tmp_path / "one" / "out").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", LINEAGE} <= set(files)
    for name in files:
        assert (tmp_path / "one" / "out" / name).read_bytes() == (tmp_path / "two" / "out" / name).read_bytes(), name


def test_weights_are_stored_in_the_type_they_had(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama-tied"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoints("llama-tied") / name, tmp_path / "half" / name)
    prune(str(tmp_path / "half"), tmp_path / "pruned", options_of("ffn", ratios={"": 0.25}))
    stored = SafetensorsCheckpoint(tmp_path / "pruned")
    assert stored.stored_type == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto").dtype == torch.bfloat16


def test_a_missed_gate_leaves_nothing(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    result = _run(
        checkpoints("llama-tied"), "-o", tmp_path / "out", "--method", "ffn", "--ratio", "0.5", "--num-samples", "4",
        "--seq-len", "48", "--max-kld", "0.0001", "--max-perplexity-ratio", "9"
    )  # fmt: skip
    assert result.exit_code == 7
    assert "kld" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    source = checkpoints("llama-tied")
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    result = _run(
        source, "-o", tmp_path / "out", "--method", "ffn", "--ratio", "0.5", "--no-measure",
        "--num-samples", "2", "--seq-len", "48"
    )  # fmt: skip
    assert result.exit_code == 6, result.output
    assert "No space left" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_one_document(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = [checkpoints("llama-tied"), "-o", tmp_path / "out", "--method", "layers,ffn", "--num-samples", "4"]
    arguments += ["--seq-len", "48"]
    result = _run(*arguments, "--ratio", "layers=0.5,ffn=0.25", "--format", "json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["ratios"] == {"layers": 0.5, "ffn": 0.25}
    assert document["rows"][1]["expected_prefill_speedup"] > 2
    assert "expected_speedup" not in document["rows"][1]
    assert _run(*arguments, "--ratio", "0.5").exit_code == 8
    result = _run(*arguments, "--ratio", "0.4", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "layers: 40.0% is rounded to 50.0%" in result.stderr
    assert "perplexity" in result.stdout
    assert _run(*arguments, "--ratio", "0.5", "--dry-run", "--overwrite").exit_code == 0


def test_only_what_llmfast_wrote_is_overwritten(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    foreign = Path(shutil.copytree(checkpoints("llama-tied"), tmp_path / "foreign"))
    result = _run(checkpoints("llama"), "-o", foreign, "--method", "ffn", "--ratio", "0.5", "--overwrite")
    assert result.exit_code == 8
    assert (foreign / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--method", "ffn", "--ratio", "1"], 2, "removes everything"),
        (["--method", "ffn", "--ratio", "-0.1"], 2, "not a share"),
        (["--method", "ffn", "--ratio", "nan"], 2, "not a share"),
        (["--method", "ffn", "--ratio", "half"], 2, "not a share"),
        (["--method", "ffn", "--ratio", "0.99"], 2, "removes all 96 channels"),
        (["--method", "layers", "--ratio", "0.9"], 2, "removes all 2 blocks"),
        (["--method", "heads", "--ratio", "0.9"], 2, "removes all 4 heads"),
        (["--method", "width", "--ratio", "0.99"], 2, "removes all 64 hidden channels"),
        (["--method", "fnn", "--ratio", "0.5"], 2, "did you mean `ffn`?"),
        (["--method", "ffn,ffn", "--ratio", "0.5"], 2, "one method of a kind"),
        (["--method", "ffn"], 2, "no share for ffn"),
        (["--method", "ffn", "--ratio", "layers=0.5"], 2, "not a method of this run"),
        (["--method", "ffn", "--ratio", "0.5", "--target-params", "50%"], 2, "contradict"),
        (["--method", "ffn", "--target-params", "few"], 2, "not a number of parameters"),
        (["--method", "ffn", "--target-params", "100%"], 2, "not below 100%"),
        (["--method", "ffn", "--target-speedup", "0.9x"], 2, "not a factor above 1"),
        (["--method", "ffn", "--ratio", "0.5", "--pattern", "2:4"], 2, "--pattern says what goes"),
        (["--method", "ffn", "--ratio", "0.5", "--set", "score=best"], 2, "unknown score"),
        (["--method", "ffn", "--ratio", "0.5", "--set", "skore=loss"], 2, "did you mean `score`?"),
        (["--method", "ffn", "--ratio", "0.5", "--allocation", "sensitivity"], 2, "divides --target-params"),
        (["--method", "ffn", "--ratio", "0.5", "--no-measure", "--max-kld", "1"], 2, "nothing to judge"),
        (["--method", "vocabulary"], 2, "--calibration FILE"),
        (["--method", "vocabulary", "--ratio", "0.5"], 2, "takes no share"),
        (["--method", "wanda", "--ratio", "0.5"], 2, "is a PyTorch checkpoint"),
        (["--method", "ffn,wanda", "--ratio", "0.5"], 2, "works on an ONNX graph"),
        (["--method", "ffn", "--ratio", "0.5", "--calibration", "missing.txt"], 3, "missing.txt"),
    ],
)
def test_bad_options_are_explained(
    arguments: list[str], code: int, words: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    result = _run(checkpoints("llama-tied"), "-o", tmp_path / "out", *arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.count("error: ") == 1
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_checkpoints_are_explained(own_checkpoint: Path, tmp_path: Path) -> None:
    options, output = options_of("ffn", ratios={"": 0.5}), tmp_path / "out"
    with pytest.raises(InputError, match="not found"):
        prune(str(tmp_path / "missing"), output, options)
    save_encoder(tmp_path / "convbert", "convbert")
    with pytest.raises(UnsupportedError, match="a `convbert` can't be pruned"):
        prune(str(tmp_path / "convbert"), output, options)
    save_encoder(tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="hidden size / heads"):
        prune(str(tmp_path / "bert"), output, options_of("heads", ratios={"": 0.5}))
    weights = own_checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="truncated"):
        prune(str(own_checkpoint), output, options)
    weights.rename(own_checkpoint / "pytorch_model.bin")
    with pytest.raises(UnsafeInputError, match="pickle"):
        prune(str(own_checkpoint), output, options)
    (own_checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="weights missing"):
        prune(str(own_checkpoint), output, options)
    (own_checkpoint / LINEAGE).write_text('{"format": 9, "lineage": []}')
    with pytest.raises(InputError, match="format 9"):
        read_lineage(own_checkpoint)
    assert not output.exists()


def test_a_bundle_is_no_checkpoint(fp32_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="works on a PyTorch checkpoint"):
        prune(str(fp32_bundle), tmp_path / "out", options_of("ffn", ratios={"": 0.5}))
    assert ModelBundle.open(fp32_bundle)
