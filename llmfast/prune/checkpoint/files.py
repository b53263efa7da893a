"""Writing a pruned checkpoint: a folder that `transformers` loads, with what is beside the weights of the original."""

import json
import shutil
from pathlib import Path
from typing import Any

from llmfast.bundle import LINEAGE, read_json
from llmfast.errors import ResourceError
from llmfast.export.checkpoint import copy_companions

# Files of tokenizers and of sentence-transformers; weights, code and documents are left behind.
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".spm")
_LEFT_BEHIND = ("config.json", LINEAGE)
_MODULES = "modules.json"


def copy_settings(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation settings and sentence-transformers' modules of a checkpoint."""
    for file in sorted(source.iterdir()):
        is_setting = file.suffix in _SUFFIXES and not file.name.endswith(".index.json")
        if file.is_file() and is_setting and file.name not in _LEFT_BEHIND:
            shutil.copyfile(file, folder / file.name)
    if (source / _MODULES).is_file():
        for module in read_json(source / _MODULES):
            settings = source / str(module.get("path", "")) / "config.json"
            if module.get("path") and settings.is_file():
                (folder / module["path"]).mkdir(exist_ok=True)
                shutil.copyfile(settings, folder / module["path"] / "config.json")
    if not (folder / "tokenizer.json").is_file():
        copy_companions(source, folder)  # converts an older form
        (folder / "config.json").unlink(missing_ok=True)


def save_checkpoint(model: Any, dtype: Any, folder: Path) -> int:
    """Write config and weights in the type they had; return the bytes of the weights.

    Raises:
        ResourceError: the disk is full.
    """
    from safetensors import SafetensorError

    width = model.config.hidden_size
    try:
        model.to(dtype).save_pretrained(folder)
    except SafetensorError as error:  # which is no OSError
        raise ResourceError(f"cannot write the weights to `{folder.parent}`: {error}") from error
    for settings in folder.glob("*_Pooling/config.json"):
        document = read_json(settings)
        if document.get("word_embedding_dimension", width) != width:
            document["word_embedding_dimension"] = width
            settings.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return weight_bytes(folder)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
