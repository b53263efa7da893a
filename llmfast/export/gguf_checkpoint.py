"""A GGUF file as a checkpoint: names, shapes and tokenizer turned into Hugging Face's."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import sha256
from llmfast.errors import InputError, UnsupportedError
from llmfast.export.gguf_file import GgufFile

# GGUF's names for metadata -> config.json's. `{arch}` is general.architecture.
_CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
}
_LAYER_NAMES = {
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
_MODEL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# llama.cpp stores these architectures' queries and keys for interleaved rotation.
_INTERLEAVED_ROTARY = ("llama",)

# How text is split before BPE, by `tokenizer.ggml.pre`; the patterns are those of the original tokenizers.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {"qwen2": rf"{_WORDS}|\p{{N}}|{_REST}", "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"}
_DIGITS_THEN_BYTES = ("smollm", "starcoder", "refact", "command-r")
_PLAIN_BYTES = ("default", "gpt-2")
_CONTROL, _USER_DEFINED = 3, 4  # token types that are never split


class GgufCheckpoint:
    """One .gguf file; its weights are de-quantized to float32 as they are read.

    Raises:
        InputError: malformed, or a part is missing.
        UnsupportedError: an architecture or tokenizer that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        metadata = self._file.metadata
        self._architecture: str = metadata.get("general.architecture", "")
        if self._architecture not in _ARCHITECTURES:
            raise UnsupportedError(
                f"architecture `{self._architecture}` in `{path}` is not supported",
                f"supported in GGUF: {', '.join(_ARCHITECTURES)}",
            )
        if "rope_freqs.weight" in self._file.tensors:
            raise UnsupportedError(
                f"`{path}` scales its rotary frequencies by a table, which is not supported in GGUF",
                "export the Hugging Face folder of the model instead",
            )
        self._tokenizer = _build_tokenizer(path, metadata)
        self.config = self._read_config()

    def read(self, name: str) -> np.ndarray:
        """Return a weight as float32, by its Hugging Face name."""
        stored = self._find(name)
        array = self._file.read(stored)
        if self._architecture in _INTERLEAVED_ROTARY and ".attn_q." in stored:
            return _split_halves(array, self.config.num_attention_heads)
        if self._architecture in _INTERLEAVED_ROTARY and ".attn_k." in stored:
            return _split_halves(array, self.config.num_key_value_heads)
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape, by its Hugging Face name."""
        return tuple(self._file.tensors[self._find(name)].shape)

    def source(self) -> dict[str, Any]:
        """Return the file's name and hash."""
        return {"id": self.path.name, "revision": None, "sha256": {self.path.name: sha256(self.path)}}

    def load_reference(self) -> Any:
        """Build the PyTorch model from the config and fill it with the de-quantized weights."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(np.array(self.read(name))))
        return model.eval()

    def write_companions(self, folder: Path) -> None:
        """Write config, tokenizer and chat template, rebuilt from the metadata."""
        metadata = self._file.metadata
        self.config.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str(), encoding="utf-8")
        tokens = metadata["tokenizer.ggml.tokens"]
        special = {
            f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
            for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if metadata.get(f"tokenizer.ggml.{key}_token_id", len(tokens)) < len(tokens)
        }
        document = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
        if template := metadata.get("tokenizer.chat_template"):
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    def _find(self, name: str) -> str:
        stored = _stored_name(name)
        if stored not in self._file.tensors:
            raise InputError(f"weight `{name}` (`{stored}`) is missing from `{self.path}`", "the file is incomplete")
        return stored

    def _read_config(self) -> Any:
        from transformers import AutoConfig

        metadata, prefix = self._file.metadata, f"{self._architecture}."
        values = {key: metadata[prefix + stored] for stored, key in _CONFIG_KEYS.items() if prefix + stored in metadata}
        missing = {"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"} - set(values)
        if missing or "token_embd.weight" not in self._file.tensors:
            raise InputError(f"`{self.path}` does not say its {', '.join(sorted(missing)) or 'embedding'}")
        scaling = metadata.get(f"{prefix}rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise UnsupportedError(f"rotary scaling `{scaling}` in `{self.path}` is not supported")
        rope = {"rope_type": "default", "rope_theta": metadata.get(f"{prefix}rope.freq_base", 10000.0)}
        if scaling == "linear":
            rope |= {"rope_type": "linear", "factor": metadata[f"{prefix}rope.scaling.factor"]}
        return AutoConfig.for_model(
            self._architecture,
            **values,
            vocab_size=self._file.tensors["token_embd.weight"].shape[0],
            rope_parameters=rope,
            tie_word_embeddings="output.weight" not in self._file.tensors,
            attention_bias="blk.0.attn_q.bias" in self._file.tensors,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
            pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
            architectures=[f"{self._architecture.capitalize()}ForCausalLM"],
            dtype="float32",
        )


def _stored_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _MODEL_NAMES:
        return f"{_MODEL_NAMES[stem]}.{kind}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if match is None or match[2] not in _LAYER_NAMES:
        raise InputError(f"weight `{name}` has no counterpart in GGUF")
    return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{kind}"


def _split_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows from interleaved pairs to two halves, as Hugging Face rotates them."""
    head_size = len(array) // heads
    pairs = array.reshape(heads, head_size // 2, 2, *array.shape[1:])
    halves: np.ndarray = pairs.swapaxes(1, 2).reshape(array.shape)
    return halves


def _build_tokenizer(path: Path, metadata: dict[str, Any]) -> Any:
    """Rebuild tokenizer.json from GGUF's token, merge and type lists."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = metadata.get("tokenizer.ggml.tokens")
    merges = metadata.get("tokenizer.ggml.merges")
    if not tokens:
        raise InputError(f"no tokenizer in `{path}`", "choose a GGUF file that has one")
    kind, splitter = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or merges is None or splitter not in (*_SPLITS, *_DIGITS_THEN_BYTES, *_PLAIN_BYTES):
        raise UnsupportedError(
            f"tokenizer `{kind}` ({splitter}) in `{path}` is not supported",
            "export the Hugging Face folder of the model instead",
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, [tuple(merge.split(" ", 1)) for merge in merges])
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise InputError(f"malformed tokenizer in `{path}`: {error}") from error
    tokenizer = Tokenizer(model)
    if splitter in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[splitter]), "isolated")
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    else:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if splitter in _DIGITS_THEN_BYTES else []
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    tokenizer.add_tokens(
        [
            AddedToken(token, special=token_type == _CONTROL, normalized=False)
            for token, token_type in zip(tokens, types, strict=False)
            if token_type in (_CONTROL, _USER_DEFINED)
        ]
    )
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token") and bos is not None and bos < len(tokens):
        first = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, bos)]
        )
    return tokenizer
