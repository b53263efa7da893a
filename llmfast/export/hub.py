"""Where a checkpoint lies: a folder, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

from llmfast.bundle import MANIFEST
from llmfast.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_folder(source: str) -> Path:
    """Return the local folder of a checkpoint, downloading a hub id into the hub's cache.

    Raises:
        InputError: no such folder, a bundle, no config.json in it, or the hub can't be reached.
    """
    path = Path(source)
    if not path.exists():
        is_hub_id = _HUB_ID.fullmatch(source) and path.suffix != ".gguf"
        if not is_hub_id or (path.parent.is_dir() and path.parent != Path()):
            raise InputError(f"not found: `{source}`", "give a Hugging Face folder, a .gguf file or a hub id")
        path = _download(source)
    if not path.is_dir():
        raise InputError(f"not a checkpoint: `{source}`", "give a Hugging Face folder, a .gguf file or a hub id")
    if (path / MANIFEST).is_file():
        raise InputError(
            f"`{source}` is a bundle, no checkpoint", "it is exported already: quantize, bench, infer take it"
        )
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        hint = f"give the file: {files[0]}" if files else "give the folder that `save_pretrained` wrote"
        raise InputError(f"no config.json in `{source}`", hint)
    return path


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [
        "*.json",
        "*.safetensors",
        "*.jinja",
        "tokenizer.model",
        "spiece.model",
        "vocab.txt",
        "merges.txt",
        "*.spm",
        "sentencepiece.bpe.model",
    ]
    try:
        return Path(snapshot_download(repository, allow_patterns=[*wanted, "*_Pooling/*"]))
    except Exception as error:  # the hub client raises network, HTTP and its own exceptions
        raise InputError(
            f"not found: `{repository}`: no such folder, and the hub did not give it: {type(error).__name__}",
            "check the name and the network, or download it elsewhere and give the folder",
        ) from error
