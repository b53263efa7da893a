"""GGUF files of tiny models, written as llama.cpp's converter does, with names and rules of its own."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.conftest import make_tokenizer

_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SANDWICH = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_OTHERS: dict[str, dict[str, str]] = {
    "olmo2": _SANDWICH,
    "gemma2": _SANDWICH | {"pre_feedforward_layernorm": "ffn_norm"},
    "gemma3": _SANDWICH | {"pre_feedforward_layernorm": "ffn_norm"},
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    "phi2": {
        "model.final_layernorm": "output_norm",
        "self_attn.dense": "attn_output",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    },
    "starcoder2": {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    "gpt2": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    "gptneox": {
        "gpt_neox.embed_in": "token_embd",
        "gpt_neox.final_layer_norm": "output_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
}


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    architecture: str,
    kind: str = "F32",
    extra: dict[str, Any] | None = None,
    tables: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a model.

    Args:
        model: of `transformers`.
        architecture: GGUF's name.
        kind: type of the matrices.
        extra: metadata that the architecture needs, without its name in front; None leaves a usual key out.
        tables: further tensors.
    """
    writer = gguf.GGUFWriter(path, architecture)
    add_model(writer, model.config, architecture, extra or {})
    add_tokenizer(writer)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = np.ascontiguousarray(_convert(architecture, model.config, name, parameter.numpy()))
        stored = _store(architecture, name)
        if array.ndim == 2:
            writer.add_tensor(stored, gguf.quants.quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(stored, array)
    for name, table in (tables or {}).items():
        writer.add_tensor(name, table)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    """Write everything to the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_model(writer: gguf.GGUFWriter, config: Any, architecture: str, extra: dict[str, Any]) -> None:
    """Write the sizes of a model, and what is particular to its architecture."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", 4 * config.hidden_size),
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", heads),
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "rope.dimension_count": head_size,
    }
    for field in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if hasattr(config, field):
            key = "attention.layer_norm_rms_epsilon" if "rms" in field else "attention.layer_norm_epsilon"
            values[key] = float(getattr(config, field))
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        values["rope.freq_base"] = float(rope["rope_theta"])
    for key, value in (values | extra).items():
        name = f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Write the tokenizer of `make_tokenizer`."""
    vocabulary = sorted(make_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")


def _store(architecture: str, name: str) -> str:
    names = _LLAMA | _OTHERS.get(architecture, {})
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)\.(.+)", stem)
    return f"blk.{match[1]}.{names[match[2]]}.{kind}" if match else f"{names[stem]}.{kind}"


def _convert(architecture: str, config: Any, name: str, array: np.ndarray) -> np.ndarray:
    if architecture in ("llama", "smollm3", "granite") and re.search(r"\.[qk]_proj\.", name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return array + np.float32(1)
    if architecture == "gpt2" and re.search(r"\.c_(attn|proj|fc)\.weight$", name):
        return array.T
    if "query_key_value" in name:
        by_head = array.reshape(config.num_attention_heads, 3, -1, *array.shape[1:])
        return np.concatenate([by_head[:, part].reshape(-1, *array.shape[1:]) for part in range(3)])
    return array
