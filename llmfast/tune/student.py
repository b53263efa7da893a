"""The model that is trained: read from a Hugging Face folder in float32, and written as one."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.errors import OptionError, UnsupportedError
from llmfast.export.checkpoint import SafetensorsCheckpoint, copy_companions, load_config
from llmfast.export.encoder import context_length, load_pretrained, token_types
from llmfast.export.hub import resolve_folder
from llmfast.report import note
from llmfast.tokenizer import Text, Tokenizer
from llmfast.tune.objective import Row

if TYPE_CHECKING:
    import torch

DECODER_CLASS = "AutoModelForCausalLM"
CLASSIFIER_CLASS = "AutoModelForSequenceClassification"
ENCODER_CLASS = "AutoModel"
# Files that make a folder a sentence encoder of sentence-transformers.
_SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def open_folder(source: str) -> Path:
    """Return the folder of a checkpoint that can be trained.

    Raises:
        InputError: not there, incomplete, or truncated.
        UnsafeInputError: its weights are a pickle.
        UnsupportedError: its weights are integer codes.
    """
    folder = resolve_folder(source)
    checkpoint = SafetensorsCheckpoint(folder)
    if checkpoint.quantization is not None:
        raise UnsupportedError(f"`{source}` holds integer codes, which can't be trained", "tune the float checkpoint")
    return folder


def model_class(config: Any) -> str:
    """Return the class of `transformers` that a checkpoint is made for: a decoder, a classifier or an encoder.

    Raises:
        UnsupportedError: it has both an encoder and a decoder.
    """
    if config.is_encoder_decoder:
        raise UnsupportedError(f"a `{config.model_type}` is an encoder and a decoder, which can't be trained yet")
    name = (config.architectures or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return DECODER_CLASS
    return CLASSIFIER_CLASS if name.endswith("ForSequenceClassification") else ENCODER_CLASS


def load_model(folder: Path, auto_model: str, config: Any = None, new_head: bool = False) -> Any:
    """Load a model in float32.

    Args:
        folder: the checkpoint's.
        auto_model: a class of `transformers`.
        config: what the model shall be; None takes the checkpoint's.
        new_head: weights of the head may be missing, or have another shape: they are made anew.

    Raises:
        InputError: weights are missing, do not fit, or are not finite.
        UnsupportedError: transformers has no such model.
    """

    def may_lack(model: Any, name: str) -> bool:
        return "pooler." in name or (new_head and not name.startswith(f"{model.base_model_prefix}."))

    return load_pretrained(
        folder, config or load_config(folder), auto_model, "--objective", may_lack, ignore_mismatched_sizes=new_head
    )


def check_length(model: Any, length: int) -> None:
    """Refuse rows that are longer than the model takes.

    Raises:
        OptionError: they are.
    """
    is_encoder = model_class(model.config) != DECODER_CLASS
    limit = context_length(model) if is_encoder else getattr(model.config, "max_position_embeddings", length)
    if length > limit:
        raise OptionError(f"--seq-len {length}: the model takes {limit} tokens", f"--seq-len {limit}, or fewer")


def encode(
    tokenizer: Tokenizer, texts: Sequence[Text], max_length: int, model: Any = None
) -> list[dict[str, list[int]]]:
    """Return the inputs of texts, each as long as it is; `token_type_ids` where the model tells types apart."""
    windows = tokenizer.encode_windows(texts, max_length)
    cut = sum(len(one) > 1 for one in windows)
    if cut:
        note(f"note: cut to {max_length} tokens: {cut} of {len(texts)} texts; --seq-len N takes longer ones")
    names = {"input_ids": "ids", "attention_mask": "attention_mask"}
    if model is not None and token_types(model) > 1:
        names["token_type_ids"] = "type_ids"
    return [{name: list(getattr(first[0], key)) for name, key in names.items()} for first in windows]


def collate(rows: Sequence[Row], pad_id: int, device: "torch.device") -> "dict[str, torch.Tensor]":
    """Return the inputs of rows, padded on the right to the longest: name -> int64 [rows, seq]."""
    return {
        name: pad([row.inputs[name] for row in rows], pad_id if name == "input_ids" else 0, device)
        for name in rows[0].inputs
    }


def pad(lists: Sequence[Sequence[int]], value: int, device: "torch.device") -> "torch.Tensor":
    """Return lists as one array, int64 [lists, longest], filled up with `value`."""
    import torch

    longest = max(map(len, lists))
    padded = [[*row, *[value] * (longest - len(row))] for row in lists]
    return torch.tensor(padded).to(device, non_blocking=True)


def pad_id(config: Any) -> int:
    """Return the token that pads; 0 of a model that has none, whose mask hides it."""
    found = getattr(config, "pad_token_id", None)
    return int(found) if found is not None else 0


def write_companions(source: Path, folder: Path, is_sentence_encoder: bool) -> None:
    """Copy what lies beside the weights: tokenizer, configs, and how a sentence encoder makes its vector."""
    copy_companions(source, folder)
    if not is_sentence_encoder or not (source / "modules.json").is_file():
        return
    for name in _SENTENCE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for module in source.glob("[0-9]*_*/config.json"):
        (folder / module.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(module, folder / module.parent.name / module.name)


def save_model(model: Any, folder: Path) -> None:
    """Write config.json and float32 weights as safetensors."""
    model.save_pretrained(folder)
