"""Where a checkpoint lies: a folder, or a repository of the Hugging Face hub."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

from llmfast.bundle import MANIFEST
from llmfast.errors import InputError
from llmfast.export.pickle_checkpoint import PICKLES, refusal

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "vocab.txt",
    "merges.txt",
    "*.spm",
    "sentencepiece.bpe.model",
    "*_Pooling/*",
)
_IN_SUBFOLDERS = "*/*"


def resolve_folder(source: str, allow_pickle: bool = False) -> Path:
    """Return the local folder of a checkpoint, downloading a hub id into the hub's cache.

    Args:
        source: a folder or a hub id.
        allow_pickle: download weights in pickles too, where there are no safetensors.

    Raises:
        InputError: no such folder, a bundle, no config.json in it, or the hub can't be reached.
        UnsafeInputError: the hub has the weights as a pickle only.
    """
    path = Path(source)
    if not path.exists():
        is_hub_id = _HUB_ID.fullmatch(source) and path.suffix != ".gguf"
        if not is_hub_id or (path.parent.is_dir() and path.parent != Path()):
            raise InputError(f"not found: `{source}`", "give a Hugging Face folder, a .gguf file or a hub id")
        path = _download(source, allow_pickle)
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


def _download(repository: str, allow_pickle: bool) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download

    names: list[str] = []
    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(_WANTED)))
        has_weights = any(folder.glob("*.safetensors"))
        if allow_pickle and not has_weights:
            snapshot_download(
                repository, revision=folder.name, allow_patterns=list(PICKLES), ignore_patterns=_IN_SUBFOLDERS
            )
        elif not has_weights and not any(file for pattern in PICKLES for file in folder.glob(pattern)):
            names = list_repo_files(repository, revision=folder.name)
    except Exception as error:  # the hub client raises network, HTTP and its own exceptions
        raise InputError(
            f"not found: `{repository}`: no such folder, and the hub did not give it: {type(error).__name__}",
            "check the name and the network, or download it elsewhere and give the folder",
        ) from error
    if pickle := next((name for name in names if "/" not in name and _is_pickle(name)), None):
        raise refusal(f"{repository}/{pickle}")
    return folder


def _is_pickle(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in PICKLES)
