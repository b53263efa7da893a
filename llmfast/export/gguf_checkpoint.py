"""A GGUF file as a checkpoint: names, shapes and tokenizer turned into Hugging Face's."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import sha256
from llmfast.errors import InputError, UnsupportedError
from llmfast.export.gguf_architectures import ARCHITECTURES, read_config
from llmfast.export.gguf_file import GgufFile
from llmfast.export.gguf_tokenizer import GgufTokenizer
from llmfast.report import note

# Tensors that become part of the config.
_TABLES = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
_HEADS = ("lm_head.weight", "embed_out.weight")


class GgufCheckpoint:
    """One .gguf file; its weights are de-quantized to float32 as they are read.

    Raises:
        InputError: malformed, or a part is missing.
        UnsupportedError: an architecture or tokenizer that is not known.
    """

    quantization: dict[str, Any] | None = None  # all weights become floats

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        name = str(self._file.metadata.get("general.architecture", ""))
        if name not in ARCHITECTURES:
            raise UnsupportedError(
                f"architecture `{name:.80}` in `{path}` is not supported",
                f"supported in GGUF: {', '.join(sorted(ARCHITECTURES))}",
            )
        kind = self._file.metadata.get("general.type", "model")
        if kind != "model":
            raise UnsupportedError(f"`{path}` has the type `{kind!s:.80}`, it is no model")
        if not self._file.tensors:
            raise InputError(f"no weights in `{path}`, only a tokenizer", "choose the file of the whole model")
        self._architecture = ARCHITECTURES[name]
        values = read_config(self._file, name, self._architecture)
        self._names = _name_map(name, values["num_hidden_layers"])
        self._tokenizer = GgufTokenizer(path, self._file.metadata)
        self.config = self._build_config(values)

    def read(self, name: str) -> np.ndarray:
        """Return a weight as float32, by its Hugging Face name."""
        return self._arrange(name, self._stored_name(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight without reading it."""
        shape = self._file.tensors[self._stored_name(name)].shape
        return shape[::-1] if self._is_transposed(name) else shape

    def packed(self, layer: str) -> None:
        """Return None: GGUF's codes become floats, as MatMulNBits lacks their super-blocks."""

    def names(self) -> Iterable[str]:
        """Return nothing: GGUF's names are not Hugging Face's."""
        return ()

    def source(self) -> dict[str, Any]:
        """Return the file's name and hash."""
        return {"id": self.path.name, "revision": None, "sha256": {self.path.name: sha256(self.path)}}

    def load_reference(self) -> Any:
        """Build the PyTorch model from the config; its weights are de-quantized when they are needed.

        Raises:
            InputError: a weight of another shape than the metadata makes it.
            UnsupportedError: a tensor that the model has no use for.
        """
        import torch

        from llmfast.export.reference import build_streamed

        def read(name: str) -> torch.Tensor:
            return torch.from_numpy(np.array(self.read(name)))

        model = build_streamed(self.config, read)
        unused = set(self._file.tensors) - _TABLES
        for name, parameter in model.named_parameters():
            if self.shape(name) != tuple(parameter.shape):
                raise InputError(
                    f"weight `{name}` of `{self.path}` is {list(self.shape(name))}, its metadata makes it "
                    f"{list(parameter.shape)}"
                )
            unused.discard(self._stored_name(name))
        if unused:
            raise UnsupportedError(
                f"tensor `{min(unused)}` of `{self.path}` has no place in a {self.config.model_type} model"
            )
        return model

    def write_companions(self, folder: Path) -> None:
        """Write config, tokenizer and chat template, rebuilt from the metadata."""
        if self._tokenizer.has_default_split:
            note(
                f"note: `{self.path}` does not say how its tokenizer splits text; llama.cpp's default is taken, "
                "which may differ from the original model's"
            )
        self.config.save_pretrained(folder)
        self._tokenizer.write(folder, self.config.max_position_embeddings)

    def _build_config(self, values: dict[str, Any]) -> Any:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        tokenizer, rows = self._tokenizer, self._rows("token_embd.weight")
        if tokenizer.vocab_size > rows:
            raise InputError(f"`{self.path}` has {tokenizer.vocab_size} tokens and embeddings for {rows}")
        ends, model_type = tokenizer.end_ids, self._architecture.model_type
        try:
            config = AutoConfig.for_model(
                model_type,
                **values,
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
                vocab_size=rows,
                tie_word_embeddings="output.weight" not in self._file.tensors,
                bos_token_id=tokenizer.role_id("bos"),
                eos_token_id=ends[0] if len(ends) == 1 else ends or None,
                pad_token_id=tokenizer.role_id("pad"),
                dtype="float32",
            )
        except Exception as error:  # configs validate themselves with many kinds of exception
            raise InputError(f"malformed metadata in `{self.path}`: {str(error)[:200]}") from error
        return config

    def _rows(self, name: str) -> int:
        if name not in self._file.tensors:
            raise InputError(f"tensor `{name}` is missing from `{self.path}`", "the file is incomplete")
        return self._file.tensors[name].shape[0]

    def _stored_name(self, name: str) -> str:
        if name in _HEADS and self.config.tie_word_embeddings:
            return "token_embd.weight"
        stored = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None or stored not in self._file.tensors:
            raise InputError(f"weight `{name}` (`{stored}`) is missing from `{self.path}`", "the file is incomplete")
        return str(stored)

    def _arrange(self, name: str, stored: str) -> np.ndarray:
        array: np.ndarray = self._file.read(stored)
        architecture, config = self._architecture, self.config
        if architecture.interleaved and ".attn_q." in stored:
            array = _split_halves(array, config.num_attention_heads)
        elif architecture.interleaved and ".attn_k." in stored:
            array = _split_halves(array, config.num_key_value_heads)
        elif architecture.by_head and ".attn_qkv." in stored:
            by_head = array.reshape(3, config.num_attention_heads, -1, *array.shape[1:])
            array = by_head.swapaxes(0, 1).reshape(array.shape)
        elif architecture.norm_offset and name.endswith("norm.weight"):
            array = array - np.float32(architecture.norm_offset)
        return array.T if self._is_transposed(name) else array

    def _is_transposed(self, name: str) -> bool:
        return name.removesuffix(".weight").endswith(self._architecture.transposed) and name.endswith(".weight")


def _name_map(architecture: str, layers: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(kinds[architecture], layers)


def _split_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows from interleaved pairs to two halves, as Hugging Face rotates them."""
    head_size = len(array) // heads
    pairs = array.reshape(heads, head_size // 2, 2, *array.shape[1:])
    halves: np.ndarray = pairs.swapaxes(1, 2).reshape(array.shape)
    return halves
