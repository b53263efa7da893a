"""The part for texts of a model of texts and images: tokens against PyTorch's whole model, and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from llmfast.errors import InputError, UnsupportedError
from llmfast.export.stage import ExportOptions, export
from llmfast.infer.opening import open_decoder
from tests.conftest import make_tokenizer

_TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def save_gemma3(folder: Path, **settings: object) -> torch.nn.Module:
    """Save a random Gemma 3 of texts and images, norms included, and return it."""
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=_TEXT | settings, vision_config=_VISION, mm_tokens_per_image=4, eos_token_id=[1, 6]
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return model


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_tokens_equal_those_of_the_whole_model(tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    model = save_gemma3(source)
    tensors = load_file(source / "model.safetensors")
    assert "language_model.model.norm.weight" in tensors
    renamed = {name.replace("language_model.model.", prefix): tensor for name, tensor in tensors.items()}
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    (source / "preprocessor_config.json").write_text("{}")
    bundle = export(str(source), tmp_path / "bundle")
    assert "the part for texts is exported" in capsys.readouterr().err
    facts = bundle.manifest.architecture
    assert (bundle.manifest.task, facts["model_type"], facts["eos_token_id"]) == (
        "text-generation",
        "gemma3_text",
        [1, 6],
    )
    assert json.loads((bundle.path / "config.json").read_text())["model_type"] == "gemma3_text"
    assert not (bundle.path / "preprocessor_config.json").exists()
    prompt = np.random.default_rng(0).integers(7, 300, 20)
    with torch.no_grad():
        expected = model.generate(torch.from_numpy(prompt[None]), max_new_tokens=32, do_sample=False, eos_token_id=-1)
    engine = open_decoder(bundle)
    tokens = [int(engine.prefill(prompt).argmax())]
    while len(tokens) < 32:
        tokens.append(int(engine.decode(tokens[-1]).argmax()))
    assert tokens == expected[0, len(prompt) :].tolist()


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    save_gemma3(tmp_path / "source", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedError, match="`use_bidirectional_attention`"):
        export(str(tmp_path / "source"), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="a `gemma3_text` can't be exported for fill-mask"):
        export(str(tmp_path / "source"), tmp_path / "out", ExportOptions(task="fill-mask"))
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    save_file({name: one for name, one in tensors.items() if "layers.1.mlp" not in name}, tmp_path / "cut")
    (tmp_path / "cut").rename(tmp_path / "source" / "model.safetensors")
    path = tmp_path / "source" / "config.json"
    path.write_text(
        path.read_text().replace('"use_bidirectional_attention": true', '"use_bidirectional_attention": false')
    )
    with pytest.raises(InputError, match=r"weight `model\.layers\.1\.mlp"):
        export(str(tmp_path / "source"), tmp_path / "out")
