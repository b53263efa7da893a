"""The model bundle: the directory that travels the pipeline, its manifest, and its atomic commit."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmfast import commit, registry
from llmfast.errors import InputError, OptionError, OutputExistsError, ResourceError, UnsupportedError
from llmfast.files import MAX_JSON_BYTES, parse_json, read_bounded
from llmfast.supervisor import tell_staged

FORMAT = 1
MANIFEST = "llmfast.json"
LINEAGE = "llmfast-lineage.json"  # of a checkpoint that llmfast wrote, see lineage.py
MODEL = "model.onnx"
UNKNOWN_TASK = "unknown"
TEXT_GENERATION = "text-generation"  # a decoder alone
PREFILL = "prefill"  # the role of a decoder's second graph, which reads prompts into the cache of the first
# An encoder and a decoder.
SEQ2SEQ_TASKS = ("summarization", "text2text-generation", "translation")
# Where a directory without a manifest has its graph: onnxruntime-genai, optimum, transformers.js.
FOREIGN_FOLDER = "onnx"
FOREIGN_MODELS = (
    MODEL,
    "decoder_model_merged.onnx",
    f"{FOREIGN_FOLDER}/{MODEL}",
    f"{FOREIGN_FOLDER}/decoder_model_merged.onnx",
    "decoder_with_past_model.onnx",
    "decoder_model.onnx",
)
# Tokens an encoder takes when its manifest says nothing; nearly all take this many.
ENCODER_TOKENS = 512

# Files beside the graph that belong to a model and travel with it unchanged.
COMPANIONS = (
    "tokenizer.json",
    "target_tokenizer.json",  # of a model whose target has another vocabulary
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",  # how an image or a recording becomes the model's input
)


@dataclass(frozen=True)
class Step:
    """One stage of a bundle's lineage. No timestamps, no absolute paths: same inputs, same bytes."""

    stage: str
    method: str
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int | None = None
    calibration: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Manifest:
    """What `llmfast.json` holds.

    Attributes:
        task: a name in `llmfast.tasks`, or `unknown`.
        source: where the weights come from: id, revision, sha256.
        architecture: sizes in the spellings of genai_config.json (`num_hidden_layers`, `head_size`, ...).
        graphs: role (`model`, and perhaps `prefill`; or `encoder` and `decoder`) -> `{file, inputs, outputs}`.
        bits_per_weight: stored bits of all weights, scales included, per parameter.
        sparsity: share of zeros among the parameters.
        lineage: the steps that made this bundle, oldest first.
        measured: what the stages measured (`export.parity`, ...).
        files: name -> `{sha256, bytes}`, filled in by `write_manifest`.
    """

    task: str
    source: Mapping[str, Any] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    graphs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bits_per_weight: float = 32.0
    sparsity: float = 0.0
    lineage: tuple[Step, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class ModelBundle:
    """A model on disk: only its place and its facts. Graph, engine and tokenizer are opened from it.

    Attributes:
        path: the bundle's directory, or the directory of a lone `.onnx` file.
        manifest: the facts; for a model that llmfast did not write, what can be said without reading it.
        model: the graph's path; the first one's of a model that has several.
    """

    path: Path
    manifest: Manifest
    model: Path

    @property
    def name(self) -> str:
        """The name to print: the directory's, or the file's when it is not one that every exporter uses."""
        is_usual = any(Path(name).name == self.model.name for name in FOREIGN_MODELS)
        return self.path.resolve().name if self.manifest.files or is_usual else self.model.name

    @property
    def graphs(self) -> dict[str, Path]:
        """Role -> path of every graph; a model that llmfast did not write has one, its `model`."""
        found = {role: self.path / graph["file"] for role, graph in self.manifest.graphs.items()}
        return found or {"model": self.model}

    @property
    def size_bytes(self) -> int:
        """Bytes on disk of everything the bundle holds, external weights included."""
        if self.manifest.files:
            return sum(int(entry["bytes"]) for entry in self.manifest.files.values())
        folder, name = self.model.parent, self.model.name
        data = [self.model, *folder.glob(f"{name}*data*"), *folder.glob(f"{self.model.stem}.*.data")]
        companions = [file for file in map(self.companion, COMPANIONS) if file]
        return sum(file.stat().st_size for file in {*data, *companions})

    @property
    def digest(self) -> str:
        """SHA-256 over the names and hashes of graphs and weights, as the manifest has them.

        Raises:
            UnsupportedError: there is no manifest.
        """
        if not self.manifest.files:
            raise UnsupportedError(
                f"`{self.path}` is no bundle of llmfast's", "run `llmfast export` or `quantize` first"
            )
        hashes = {name: entry["sha256"] for name, entry in self.manifest.files.items() if _is_model(name)}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def companion(self, name: str) -> Path | None:
        """Return the path of `tokenizer.json` or another companion, None when the model has none."""
        file = self.path / name
        return file if file.is_file() else None

    def longest_text(self, default: int = ENCODER_TOKENS) -> int:
        """Return how many tokens of a text an encoder takes, `default` when the manifest does not say."""
        limits = (self.manifest.architecture.get(key) for key in ("context_length", "max_seq_length"))
        return min((limit for limit in limits if limit), default=default)

    @classmethod
    def open(cls, path: Path) -> "ModelBundle":
        """Open a bundle directory, a directory that holds `model.onnx`, or a lone `.onnx` file.

        Raises:
            InputError: nothing there, a manifest that can't be read, a file missing or of another size.
        """
        if path.is_file():
            if path.suffix != ".onnx":
                raise InputError(f"not a model: `{path}`", "give a bundle directory or a .onnx file")
            return cls._without_manifest(path)
        if not path.is_dir():
            raise InputError(f"not found: `{path}`", "give a bundle directory or a .onnx file")
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path / MANIFEST)
            _check_sizes(path, manifest)
            return cls(path, manifest, path / next(iter(manifest.graphs.values()))["file"])
        for name in FOREIGN_MODELS:
            if (path / name).is_file():
                return cls._without_manifest(path / name)
        hint = f"looked for {MANIFEST}, {MODEL} and the names that other exporters use; or give the .onnx file"
        if (path / "config.json").is_file():
            hint = f"this looks like a PyTorch checkpoint: run `llmfast export {path} -o DIR` first"
        raise InputError(f"no model in `{path}`", hint)

    @classmethod
    def _without_manifest(cls, model: Path) -> "ModelBundle":
        from llmfast.thirdparty import describe  # it reads graphs; most commands open bundles only

        nested = model.parent.name == FOREIGN_FOLDER and not (model.parent / "tokenizer.json").is_file()
        folder = model.parent.parent if nested else model.parent
        return cls(folder, describe(folder, model), model)


def _is_model(name: str) -> bool:
    return name.endswith((".onnx", ".data"))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: unreadable, not UTF-8, not JSON, or larger than a config may be; the message names file and line.
    """
    try:
        return parse_json(read_bounded(path, MAX_JSON_BYTES))
    except ValueError as error:
        raise InputError(f"not a JSON file: `{path}`: {error}") from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_output(output: Path, inputs: tuple[Path, ...], overwrite: bool) -> None:
    """Refuse an output that would destroy something, before any work is done.

    Raises:
        OptionError: the output is an input, inside one, or holds one.
        OutputExistsError: it exists and may not be overwritten, or is no bundle.
    """
    target = output.resolve()
    for source in (path.resolve() for path in inputs if path.exists()):
        if target == source or target in source.parents or (source.is_dir() and source in target.parents):
            raise OptionError(f"output `{output}` overlaps the input `{source}`", "choose another -o directory")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputExistsError(f"output exists: `{output}`", "choose another -o directory, or add --overwrite")
    is_empty = output.is_dir() and not any(output.iterdir())
    is_ours = any((output / name).is_file() for name in (MANIFEST, LINEAGE))
    if output.is_symlink() or not (is_empty or is_ours):
        raise OutputExistsError(
            f"output is not an llmfast bundle: `{output}`",
            "--overwrite replaces what llmfast wrote only; remove it yourself",
        )


@contextmanager
def stage_output(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory beside `output`; publish it by renaming when the body succeeds.

    Whatever the body raises, the staged directory is removed and `output` is as it was before.

    Raises:
        OutputExistsError: the output appeared while the body ran.
        ResourceError: it can't be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        commit.sweep(output)
        staged = commit.staging_path(output)
        staged.mkdir()
        tell_staged(staged)
    except OSError as error:
        raise ResourceError(f"cannot write to `{output.parent}`: {error.strerror}") from error
    try:
        yield staged
        commit.sync_tree(staged)
        if (staged / MANIFEST).is_file():
            _check_sizes(staged, read_manifest(staged / MANIFEST))
        commit.publish(staged, output, overwrite)
    except OSError as error:
        raise ResourceError(f"cannot write `{output}`: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def stage_file(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a path beside `output` to write to; publish it by renaming when the body succeeds.

    Raises:
        OutputExistsError: the output exists and may not be overwritten.
        ResourceError: it can't be written.
    """
    if os.path.lexists(output) and (output.is_dir() or not overwrite):
        raise OutputExistsError(f"output exists: `{output}`", "choose another --output, or add --overwrite")
    staged = commit.staging_path(output)
    try:
        commit.sweep(output)
        staged.touch(exist_ok=False)
        tell_staged(staged)
        yield staged
        commit.sync(staged)
        os.replace(staged, output)
        commit.sync(output.parent)
    except OSError as error:
        raise ResourceError(f"cannot write `{output}`: {error.strerror or error}") from error
    finally:
        staged.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `llmfast.json` for the files now in `folder`."""
    files = {
        file.name: {"sha256": sha256(file), "bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
    }
    document = {"format": manifest.format} | asdict(manifest) | {"files": files}
    (folder / MANIFEST).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Read `llmfast.json`; the files it lists are not looked at.

    Raises:
        InputError: unreadable or malformed.
    """
    document = read_json(path)
    try:
        version = document["format"]
        if version != FORMAT:  # before the rest: another format has other fields
            raise InputError(f"`{path}` has manifest format {version}, this llmfast reads {FORMAT}", "upgrade llmfast")
        _check_fields(document)
        steps = tuple(Step(**step) for step in document.pop("lineage"))
        manifest = Manifest(lineage=steps, **document)
        graph_files = [graph["file"] for graph in manifest.graphs.values()]
        if any(Path(name).name != name for name in [*manifest.files, *graph_files]):
            raise ValueError("a file name leaves the bundle")
        if any(graph["file"] != f"{role}.onnx" for role, graph in manifest.graphs.items()):
            raise ValueError("a graph's file is not named after its role")
        if not graph_files or not set(graph_files) <= set(manifest.files):
            raise ValueError("there is no graph, or `files` lacks a graph's file")
        if manifest.task not in (*registry.names("tasks"), UNKNOWN_TASK):
            raise ValueError(f"unknown task `{manifest.task}`")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"malformed manifest: `{path}`: {error}") from error
    return manifest


def _check_fields(document: dict[str, Any]) -> None:
    kinds = {"task": str, "bits_per_weight": float | int, "sparsity": float | int, "lineage": list}
    mappings = ("source", "architecture", "graphs", "measured", "files")
    known = {**kinds, **dict.fromkeys(mappings, dict), "format": int}
    for key, value in document.items():
        if key not in known:
            raise ValueError(f"unknown field `{key}`")
        if not isinstance(value, known[key]):
            raise ValueError(f"`{key}` is of type {type(value).__name__}")
    for name, entry in document["files"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
            raise ValueError(f"`files` does not say how many bytes `{name}` has")


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise InputError(f"bundle `{folder}` lacks `{name}`", "copy the whole directory, or make it again")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise InputError(
                f"`{file}` has {size} bytes, its manifest says {entry['bytes']}",
                "the file is truncated or changed",
            )
