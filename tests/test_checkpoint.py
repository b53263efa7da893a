"""Checkpoints: what is read from safetensors, and how damaged ones are refused."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmfast.errors import InputError, UnsafeInputError, UnsupportedError
from llmfast.export.architectures import describe
from llmfast.export.checkpoint import SafetensorsCheckpoint, open_checkpoint
from llmfast.export.decoder import DecoderGraph
from llmfast.export.hub import resolve_folder
from llmfast.export.stage import ExportOptions, describe_export, export
from llmfast.tokenizer import Tokenizer as LlmfastTokenizer
from tests.tiny_encoder import save_encoder


def test_weights_are_those_of_pytorch_in_one_file_and_in_shards(own_checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(own_checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    (tmp_path / "sharded" / "tokenizer.json").write_text("{}")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in (own_checkpoint, tmp_path / "sharded"):
        checkpoint = SafetensorsCheckpoint(folder)
        for name, parameter in model.named_parameters():
            np.testing.assert_array_equal(checkpoint.read(name), parameter.detach().numpy())


def test_a_damaged_file_is_refused_before_pytorch_loads(own_checkpoint: Path, tmp_path: Path) -> None:
    path = own_checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from llmfast.errors import InputError\n"
        "from llmfast.export.stage import export\n"
        "try:\n"
        "    export(sys.argv[1], Path(sys.argv[2]))\n"
        "except InputError as error:\n"
        "    print(error.message, sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    arguments = [sys.executable, "-c", code, str(own_checkpoint), str(tmp_path / "out")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"truncated or corrupt safetensors: `{path}`")
    assert result.stdout.endswith(" []\n")


def test_tokenizer_in_an_older_form_is_converted(own_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(own_checkpoint / "tokenizer.json"))
    tokenizer.model.save(str(own_checkpoint))  # vocab.json and merges.txt
    (own_checkpoint / "tokenizer.json").unlink()
    (own_checkpoint / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    bundle = export(str(own_checkpoint), tmp_path / "bundle")
    converted = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    assert converted.encode("née 42").ids == tokenizer.encode("née 42").ids
    assert not (bundle.path / "vocab.json").exists()


def test_code_fields_of_a_config_are_ignored_with_a_note(
    own_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}))
    (own_checkpoint / "evil.py").write_text("raise SystemExit(99)")
    assert export(str(own_checkpoint), tmp_path / "bundle").manifest.architecture["model_type"] == "llama"
    assert capsys.readouterr().err.count("auto_map") == 1


def test_weights_that_do_not_fit_the_config_are_refused(own_checkpoint: Path, tmp_path: Path) -> None:
    path = own_checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 80}))
    with pytest.raises(InputError, match=r"gate_proj\.weight` of .* is \[96, 64\], its config makes it \[80, 64\]"):
        export(str(own_checkpoint), tmp_path / "bundle")


@pytest.mark.parametrize("name", ["llama-biases", "gpt_neox", "gpt2", "opt-norm-after", "phi3", "qwen3_moe"])
def test_every_weight_of_another_shape_is_named(name: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = shutil.copytree(checkpoints(name), tmp_path / "checkpoint")
    weights = load_file(source / "model.safetensors")
    config = SafetensorsCheckpoint(source).config
    for weight, array in weights.items():
        wrong = np.zeros((array.shape[0] + 32, *array.shape[1:]), np.float32)
        save_file(weights | {weight: wrong}, source / "model.safetensors")
        reason = f"`{weight}` of `{source}` is {list(wrong.shape)}, its config makes it {list(array.shape)}"
        with pytest.raises(InputError, match=re.escape(reason)):
            DecoderGraph(SafetensorsCheckpoint(source), describe(config))


def test_weights_without_a_place_in_the_config_are_refused(own_checkpoint: Path) -> None:
    path = own_checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    checkpoint = SafetensorsCheckpoint(own_checkpoint)
    with pytest.raises(InputError, match=r"`model\.layers\.1\..*has no place"):
        DecoderGraph(checkpoint, describe(checkpoint.config))


def test_masks_beside_the_weights_and_a_base_models_names_are_understood(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoints("gpt2"), tmp_path / "checkpoint")
    weights = {
        name.removeprefix("transformer."): array for name, array in load_file(source / "model.safetensors").items()
    }
    save_file(weights | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}, source / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(source)
    DecoderGraph(checkpoint, describe(checkpoint.config))


def test_damaged_weights_are_named(own_checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(own_checkpoint)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(own_checkpoint)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        export(str(own_checkpoint), tmp_path / "bundle")


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("sixteenths", range(16))
def test_truncated_safetensors_are_named(own_checkpoint: Path, sixteenths: int) -> None:
    weights = own_checkpoint / "model.safetensors"
    _cut(weights, weights.stat().st_size * sixteenths // 16)
    with pytest.raises(InputError, match=r"truncated or corrupt safetensors: .*model\.safetensors"):
        SafetensorsCheckpoint(own_checkpoint)


@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), InputError, "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), InputError, "not a JSON file"),
        (lambda folder: (folder / "config.json").write_text("[]"), InputError, "no `model_type`"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t-rex"}'), UnsupportedError, "`t-rex`"),
        (lambda folder: (folder / "tokenizer.json").unlink(), InputError, "no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), InputError, r"weights missing .*model\.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            UnsafeInputError,
            "is a pickle",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../../secret.safetensors"}}'
            ),
            UnsafeInputError,
            "leaves the folder",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-00002.safetensors"}}'
            ),
            InputError,
            r"weights missing .*model-00002\.safetensors",
        ),
    ],
)
def test_damaged_folders_are_refused(own_checkpoint: Path, damage: Any, error: type, reason: str) -> None:
    damage(own_checkpoint)
    with pytest.raises(error, match=reason):
        open_checkpoint(str(own_checkpoint)).config  # noqa: B018


def test_incomplete_checkpoint_names_the_weight(own_checkpoint: Path, tmp_path: Path) -> None:
    path = own_checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"`model\.layers\.2\.input_layernorm\.weight` is missing"):
        export(str(own_checkpoint), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("source", ["nowhere", "no/such/folder", "./relative/id"])
def test_missing_sources_are_refused_without_a_network(source: str) -> None:
    with pytest.raises(InputError, match="not found"):
        resolve_folder(source)


@pytest.fixture
def hub(own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the repository `a/b` of a hub that lies on the disk; its weights are a pickle, another is in a folder."""
    state = load_file(own_checkpoint / "model.safetensors")
    (own_checkpoint / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, own_checkpoint / "pytorch_model.bin")
    (own_checkpoint / "old").mkdir()
    (own_checkpoint / "old" / "old.pt").touch()
    cache = tmp_path / "hub" / "models--a--b" / "snapshots" / "c0ffee"
    names = [str(file.relative_to(own_checkpoint)) for file in own_checkpoint.rglob("*") if file.is_file()]

    def snapshot_download(repository: str, revision: str | None = None, **patterns: Any) -> str:
        assert (repository, revision) in (("a/b", None), ("a/b", cache.name))
        for name in filter_repo_objects(names, **patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(own_checkpoint / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository, revision: names)
    return cache


def test_pickles_of_the_hub_are_downloaded_only_with_leave(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError, match=r"`a/b/pytorch_model\.bin` is a pickle") as caught:
        export("a/b", tmp_path / "bundle")
    assert "--allow-pickle" in caught.value.hint
    assert not list(hub.rglob("*.bin"))
    allowed = ExportOptions(allow_pickle=True, threads=1)
    plan = describe_export("a/b", tmp_path / "bundle", allowed)
    assert re.match(r"would write a llama decoder of \d layers, \d+ wide, from `a/b` into `", plan)
    with pytest.raises(UnsafeInputError, match="is a pickle"):
        describe_export(str(hub), tmp_path / "bundle", ExportOptions())
    assert not (tmp_path / "bundle").exists()
    bundle = export("a/b", tmp_path / "bundle", allowed)
    assert not list(hub.rglob("*.pt"))
    assert bundle.manifest.source["id"] == "a/b"
    assert bundle.manifest.source["revision"] == "c0ffee"
    assert list(bundle.manifest.source["sha256"]) == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("model_type", "name"), [("xlm-roberta", "sentencepiece.bpe.model"), ("deberta-v2", "spm.model")]
)
def test_a_sentencepiece_model_alone_is_a_tokenizer(model_type: str, name: str, tmp_path: Path) -> None:
    source, written = tmp_path / "source", io.BytesIO()
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=200, pad_id=3, minloglevel=2
    )
    save_encoder(source, model_type)
    for file in source.glob("tokenizer*.json"):
        file.unlink()
    (source / name).write_bytes(written.getvalue())
    bundle = export(str(source), tmp_path / "bundle", ExportOptions(task="feature-extraction", threads=1))
    expected = AutoTokenizer.from_pretrained(source)
    for line in lines[:20]:
        assert list(LlmfastTokenizer.load(bundle.path).encode(line)) == expected(line)["input_ids"]
