"""Checkpoints: what is read from safetensors and GGUF, and how damaged ones are refused."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from llmfast.errors import InputError, UnsafeInputError, UnsupportedError
from llmfast.export.checkpoint import SafetensorsCheckpoint, open_checkpoint, resolve_folder
from llmfast.export.gguf_checkpoint import GgufCheckpoint
from llmfast.export.gguf_file import GgufFile
from llmfast.export.stage import export
from llmfast.infer.engine import Engine
from tests.conftest import make_tokenizer, write_checkpoint


def test_weights_are_those_of_pytorch_in_one_file_and_in_shards(own_checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(own_checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    (tmp_path / "sharded" / "tokenizer.json").write_text("{}")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in (own_checkpoint, tmp_path / "sharded"):
        checkpoint = SafetensorsCheckpoint(folder)
        for name, parameter in model.named_parameters():
            np.testing.assert_array_equal(checkpoint.read(name), parameter.detach().numpy())


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


def _write_gguf(path: Path, model: torch.nn.Module, architecture: str, kind: gguf.GGMLQuantizationType) -> None:
    """Write a model as llama.cpp's converter does, with the package's own writer as the reference."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = sorted(make_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    kinds = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = parameter.numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if array.ndim == 2:
            writer.add_tensor(stored, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)])
def test_gguf_gives_the_logits_of_the_original(model_type: str, tied: bool, tmp_path: Path) -> None:
    settings = {"tie_word_embeddings": tied, "vocab_size": 260}
    source = write_checkpoint(tmp_path / "hf", model_type, settings)
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    path = tmp_path / "model.gguf"
    _write_gguf(path, model, model_type, gguf.GGMLQuantizationType.F32)
    bundle = export(str(path), tmp_path / "bundle")
    ids = np.random.default_rng(0).integers(3, 260, 30)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[None])).logits[0].numpy()
    np.testing.assert_allclose(Engine(bundle).score(ids), expected, rtol=1e-4, atol=1e-4)
    assert Tokenizer.from_file(str(bundle.path / "tokenizer.json")).encode("a1</s>").tokens[-1] == "</s>"
    assert (bundle.path / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"])
def test_gguf_is_dequantized_as_the_package_does(kind: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path / "hf", "llama", {"vocab_size": 260}))
    path = tmp_path / "model.gguf"
    _write_gguf(path, model, "llama", gguf.GGMLQuantizationType[kind])
    ours = GgufFile(path)
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.read(tensor.name).reshape(expected.shape), expected)


def _header(tensors: int = 0, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def _key(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        (b"", InputError, "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", InputError, "Git LFS pointer"),
        (b"<html>", InputError, "not a GGUF file"),
        (b"GGUF", InputError, "ends inside its header"),
        (_header(version=99), UnsupportedError, "version 99"),
        (_header(entries=2**63), InputError, "ends inside its header"),
        (_header(tensors=2**63), InputError, "ends inside its header"),
        (_header(entries=1) + struct.pack("<Q", 2**63), InputError, "a string of"),
        (_header(entries=1) + _key(b"a") + struct.pack("<IIQ", 9, 4, 2**62), InputError, "ends inside its header"),
        (_header(entries=1) + _key(b"a") + struct.pack("<IIQ", 9, 8, 2**63), InputError, "ends inside its header"),
        (_header(entries=1) + _key(b"a") + struct.pack("<IIQ", 9, 9, 1), InputError, "an array of type 9"),
        (_header(entries=1) + _key(b"a") + struct.pack("<I", 77), InputError, "value type 77"),
        (_header(entries=2) + 2 * (_key(b"a") + struct.pack("<IB", 0, 1)), InputError, "key `a` twice"),
        (_header(tensors=1) + _key(b"t") + struct.pack("<I", 5), InputError, "5 dimensions"),
        (_header(tensors=1) + _key(b"t") + struct.pack("<IQIQ", 1, 2**63, 0, 0), InputError, "truncated GGUF"),
        (_header(tensors=1) + _key(b"t") + struct.pack("<IQIQ", 1, 32, 9999, 0), UnsupportedError, "unknown type 9999"),
        (_header(tensors=1) + _key(b"t") + struct.pack("<IQIQ", 1, 31, 2, 0), InputError, "in blocks of 32"),
    ],
)
def test_malformed_gguf_is_refused_at_once(content: bytes, error: type, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=reason):
        GgufFile(path)


def test_gguf_of_another_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(_header(entries=1) + _key(b"general.architecture") + struct.pack("<I", 8) + _key(b"rwkv"))
    with pytest.raises(UnsupportedError, match="`rwkv`"):
        GgufCheckpoint(path)
