"""A PyTorch checkpoint on disk: config, tokenizer files, and weights read one at a time, without PyTorch."""

import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmfast.bundle import COMPANIONS, read_json, sha256
from llmfast.errors import InputError, UnsafeInputError, UnsupportedError
from llmfast.export.architectures import supported_model_types
from llmfast.export.hub import resolve_folder
from llmfast.export.packed_checkpoint import PackedLayer, read_packing
from llmfast.export.pickle_checkpoint import PICKLES, refusal
from llmfast.export.safetensors_file import FLOATS, SafetensorsFile
from llmfast.preprocessor import PREPROCESSOR

# Fields that make transformers import code from the model's folder.
_CODE_FIELDS = (
    "auto_map",
    "trust_remote_code",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
)
# Models of texts and images whose part for texts is a decoder of the direct route, stored under one of these names.
TEXT_PARTS = ("gemma3",)
_TEXT_PREFIXES = ("language_model.model.", "model.language_model.")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
)
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Checkpoint(Protocol):
    """What the export stage needs of a checkpoint, whatever its file format."""

    path: Path
    config: Any
    """The `transformers` config, defaults filled in."""
    quantization: dict[str, Any] | None
    """How linear layers are stored as integer codes, None when all weights are floating point."""

    def read(self, name: str) -> np.ndarray:
        """Return a weight as float32, by its Hugging Face name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape without reading it."""

    def packed(self, layer: str) -> PackedLayer | None:
        """Return a linear layer that is stored as integer codes, None when its weight is floating point."""

    def names(self) -> Iterable[str]:
        """Return the names of all weights, as far as they are Hugging Face's."""

    def source(self) -> dict[str, Any]:
        """Return the manifest's source: id and hashes."""

    def load_reference(self) -> Any:
        """Return the PyTorch model in float32, as independent of `read` as the format allows."""

    def write_companions(self, folder: Path) -> None:
        """Write config, tokenizer and chat template into a bundle."""


class SafetensorsCheckpoint:
    """A Hugging Face folder: config.json, tokenizer, one or more .safetensors files.

    Args:
        path: the folder.
        has_tokenizer: the model takes text, so there must be one.

    Raises:
        InputError: a part is missing or truncated.
        UnsafeInputError: weights come as a pickle, or a shard's name leaves the folder.
    """

    def __init__(self, path: Path, has_tokenizer: bool = True) -> None:
        self.path = path
        self.config = load_config(path)
        settings = self.config.__dict__.pop("quantization_config", None)
        self._packing = None if settings is None else read_packing(settings, str(path))
        self.quantization = self._packing.describe() if self._packing else None
        self._is_part = self.config.model_type in TEXT_PARTS
        self.config = text_config(self.config)
        self._shards = [SafetensorsFile(file) for file in _weight_files(path)]
        self._owners: dict[str, SafetensorsFile] = {}
        for shard in self._shards:
            for name in shard.entries:
                other = self._owners.setdefault(name, shard)
                if other is not shard:
                    raise InputError(f"tensor `{name}` is in `{other.path}` and in `{shard.path}`")
        _check_total(path, self._shards)
        if has_tokenizer and not any((path / name).is_file() for name in _TOKENIZER_FILES):
            raise InputError(f"no tokenizer in `{path}`", f"looked for {', '.join(_TOKENIZER_FILES)}")

    def read(self, name: str) -> np.ndarray:
        """Return a weight as float32.

        Raises:
            InputError: no weight of that name, or one that is not floating point.
        """
        if layer := self.packed(name.removesuffix(".weight")):
            return layer.read().dequantize()
        shard, stored = self._find(name)
        return shard.read(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape.

        Raises:
            InputError: no weight of that name.
        """
        shard, stored = self._find(name)
        return tuple(shard.entries[stored]["shape"])

    def has(self, name: str) -> bool:
        """Return whether a weight of that Hugging Face name is stored."""
        return self._stored_name(name) is not None

    def packed(self, layer: str) -> PackedLayer | None:
        """Return a linear layer that is stored as integer codes, None when its weight is floating point."""
        packing = self._packing
        if packing is None or f"{layer}.{packing.marker}" not in self._owners:
            return None

        def read(part: str) -> np.ndarray:
            shard, stored = self._find(f"{layer}.{part}")
            return shard.read_stored(stored)

        return PackedLayer(layer, packing, read)

    def names(self) -> Iterable[str]:
        """Return the names of all weights, of a model of texts and images those of its part for texts."""
        if not self._is_part:
            return self._owners
        pairs = [(name, prefix) for prefix in _TEXT_PREFIXES for name in self._owners if name.startswith(prefix)]
        return [f"model.{name.removeprefix(prefix)}" for name, prefix in pairs]

    @property
    def stored_type(self) -> str:
        """Which type most weights have, by its name in PyTorch."""
        types = [entry["dtype"] for shard in self._shards for entry in shard.entries.values()]
        most = max(sorted(set(types)), key=types.count)
        return str(FLOATS[most].name) if most in FLOATS else "float32"

    def source(self) -> dict[str, Any]:
        """Return the folder's name and the hash of each weight file."""
        return folder_source(self.path)

    def load_reference(self) -> Any:
        """Load the model as `transformers` does, its weights left in the files until they are needed."""
        from llmfast.export.reference import load_streamed

        if self._packing is not None:
            return self._load_dequantized()
        return load_streamed(self.path, self.config, _TEXT_PREFIXES[-1] if self._is_part else "model.")

    def _load_dequantized(self) -> Any:
        """Load a checkpoint of codes as floats, without the libraries that made it."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # tied ones once
                parameter.copy_(torch.from_numpy(np.array(self.read(name))))
        return model.eval()

    def write_companions(self, folder: Path) -> None:
        """Copy config and tokenizer; a tokenizer that is not in tokenizer.json form is converted to it."""
        copy_companions(self.path, folder)
        if self._is_part:
            self.config.save_pretrained(folder)
            (folder / PREPROCESSOR).unlink(missing_ok=True)

    def _find(self, name: str) -> tuple[SafetensorsFile, str]:
        stored = self._stored_name(name)
        if stored is None:
            raise InputError(f"weight `{name}` is missing from `{self.path}`", "the checkpoint is incomplete")
        return self._owners[stored], stored

    def _stored_name(self, name: str) -> str | None:
        # A base model saved without its head lacks the prefix, `model.` or `transformer.` for instance.
        candidates = [name, name.partition(".")[2]]
        if self._is_part:
            candidates = [f"{prefix}{name.removeprefix('model.')}" for prefix in _TEXT_PREFIXES]
            candidates += [name, f"language_model.{name}"]  # the head
        return next((candidate for candidate in candidates if candidate in self._owners), None)


def open_checkpoint(source: str) -> Checkpoint:
    """Open a Hugging Face folder, a .gguf file, or a hub id, which is downloaded.

    Raises:
        InputError: not found, or incomplete.
    """
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        from llmfast.export.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    return SafetensorsCheckpoint(resolve_folder(source))


def check_weights(path: Path) -> None:
    """Look for the weight files of a folder and read their headers, without PyTorch.

    Raises:
        InputError: one is missing, truncated or corrupt.
        UnsafeInputError: weights come as a pickle, or a shard's name leaves the folder.
    """
    for file in _weight_files(path):
        SafetensorsFile(file)


def load_config(path: Path) -> Any:
    """Read config.json with the defaults of its architecture filled in; code in the folder is never run.

    Raises:
        InputError: malformed.
        UnsupportedError: an architecture that `transformers` does not know.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # what matters is raised
    raw = read_json(path / "config.json")
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise InputError(f"no `model_type` in `{path / 'config.json'}`", "give the folder of a transformers model")
    raw = _without_code_fields(raw)
    model_type = raw.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **raw)
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise InputError(f"malformed `{path / 'config.json'}`: {error}") from error
        raise UnsupportedError(
            f"architecture `{model_type}` is not supported",
            f"decoders: {', '.join(supported_model_types())}; encoders as bert, roberta and distilbert; "
            "for anything else, --module FILE.py:FACTORY",
        ) from error
    except Exception as error:  # configs validate themselves with many kinds of exception
        raise InputError(f"malformed `{path / 'config.json'}`: {error}") from error


def text_config(config: Any) -> Any:
    """Return the config of the part for texts, which ends them as the whole model does; the model's where it is all."""
    if config.model_type not in TEXT_PARTS:
        return config
    part = config.text_config
    part.architectures = None
    if config.eos_token_id is not None:
        part.eos_token_id = config.eos_token_id
    return part


def code_fields(path: Path) -> list[str]:
    """Return the fields of config.json, at any depth, that would make transformers run code of the model's folder."""
    places, found = [read_json(path / "config.json")], set()
    while places:
        place = places.pop()
        if isinstance(place, dict):
            found |= place.keys() & set(_CODE_FIELDS)
        places += place.values() if isinstance(place, dict) else place if isinstance(place, list) else []
    return sorted(found)


def _without_code_fields(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _without_code_fields(value) for key, value in document.items() if key not in _CODE_FIELDS}
    return [_without_code_fields(value) for value in document] if isinstance(document, list) else document


def copy_companions(source: Path, folder: Path, has_tokenizer: bool = True) -> None:
    """Copy tokenizer and config files; a tokenizer in an older form is converted to tokenizer.json, if there is one."""
    _copy_files(source, folder)
    if has_tokenizer and not (folder / "tokenizer.json").is_file():
        _check_template_names(source)
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as converted:  # it writes more than the companions
            AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(converted)
            _copy_files(Path(converted), folder)


def _copy_files(source: Path, folder: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _check_template_names(folder: Path) -> None:
    """Refuse chat templates whose names are paths: transformers writes each to a file of its name (CVE-2026-9856)."""
    path = folder / "tokenizer_config.json"
    templates = read_json(path).get("chat_template") if path.is_file() else None
    for entry in templates if isinstance(templates, list) else []:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not _TEMPLATE_NAME.fullmatch(name):
            raise UnsafeInputError(f"chat template {name!r:.100} of `{path}` has no plain name")


def folder_source(path: Path, files: Iterable[Path] | None = None) -> dict[str, Any]:
    """Return the manifest's source for a checkpoint folder: its name, revision in the hub's cache, and hashes.

    Args:
        path: the folder.
        files: its weights; None means its safetensors.
    """
    revision = path.name if path.parent.name == "snapshots" else None
    name = path.parent.parent.name.removeprefix("models--").replace("--", "/") if revision else path.resolve().name
    return {
        "id": name,
        "revision": revision,
        "sha256": {file.name: sha256(file) for file in files or _weight_files(path)},
    }


def _check_total(path: Path, shards: Sequence[SafetensorsFile]) -> None:
    """Refuse shards that do not hold as many bytes as their index says."""
    index = path / "model.safetensors.index.json"
    metadata = read_json(index).get("metadata") if index.is_file() else None
    declared = metadata.get("total_size") if isinstance(metadata, dict) else None
    held = {shard.path.name: shard.tensor_bytes for shard in shards}
    if declared is not None and declared != sum(held.values()):
        spelled = ", ".join(f"`{name}` {size}" for name, size in held.items())
        raise InputError(
            f"`{index}` declares {declared!r:.40} bytes, its shards hold {sum(held.values())}: {spelled:.400}",
            "download the folder again, or take total_size out of the index if you know better",
        )


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"malformed index: `{index}`") from error
    else:
        names = ["model.safetensors"]
    for name in names:
        if Path(name).name != name:
            raise UnsafeInputError(f"shard `{name}` of `{index}` leaves the folder")
    missing = [name for name in names if not (path / name).is_file()]
    if not missing:
        return [path / name for name in names]
    if pickle := next((file for pattern in PICKLES for file in path.glob(pattern)), None):
        raise refusal(str(pickle))
    raise InputError(f"weights missing from `{path}`: {', '.join(missing[:3])}", "download the folder again")
