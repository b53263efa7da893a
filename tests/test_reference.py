"""The streamed PyTorch model: the same function as the loaded one, without holding its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmfast.errors import InputError
from llmfast.export.reference import load_streamed
from tests.conftest import ARCHITECTURES, write_checkpoint

# 96 has no root in bfloat16: Gemma's factor on embeddings must not be rounded with the weights.
GEMMA = ("gemma3_text", ARCHITECTURES["gemma3_text"][1] | {"hidden_size": 96})


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [GEMMA, *(ARCHITECTURES[name] for name in ("llama-tied", "gpt_neox", "gpt2", "opt-norm-after"))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_streamed_model_is_the_float32_model(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, model_type, settings)
    AutoModelForCausalLM.from_pretrained(source).to(torch.bfloat16).save_pretrained(source)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    streamed = load_streamed(source, AutoConfig.from_pretrained(source))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        torch.testing.assert_close(streamed(ids).logits, loaded(ids).logits, rtol=0, atol=0)
    assert {parameter.device.type for parameter in streamed.parameters()} == {"meta"}


def test_what_pytorch_cannot_load_is_the_users_to_mend(own_checkpoint: Path) -> None:
    weights = own_checkpoint / "model.safetensors"
    weights.rename(own_checkpoint / "model-1.safetensors")
    (own_checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(InputError, match=r"PyTorch can't load .*KeyError"):
        load_streamed(own_checkpoint, None)
