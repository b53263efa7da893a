"""Models that other exporters wrote: which file it is, what it is for, and decoders adopted where that is possible.

Folders of onnxruntime-genai's model builder, optimum, transformers.js, and lone .onnx files. Their JSON
files are hints from outside: the numbers in them are checked, the rest is not read.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

import llmfast
from llmfast.bundle import TEXT_GENERATION, UNKNOWN_TASK, Manifest, ModelBundle, Step, read_json
from llmfast.errors import InputError, UnsafeInputError
from llmfast.graph.adapt import adapt, context_length, is_adaptable
from llmfast.graph.model import OnnxModel
from llmfast.graph.skeleton import read_skeleton

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
_NATIVE_FIELDS = ("custom_ops_library", "optimized_model_filepath", "enable_profiling")
_SEQ2SEQ_INPUT = "encoder_hidden_states"


def describe(folder: Path, model: Path) -> Manifest:
    """Say what can be said of a model that has no manifest.

    Args:
        folder: where tokenizer and config lie.
        model: the graph, in the folder or below.

    Raises:
        InputError: a config file that is no JSON, or says something impossible.
    """
    try:
        graph = read_skeleton(model).graph
    except InputError:  # who opens the graph says what is wrong with it
        return Manifest(UNKNOWN_TASK)
    inputs, outputs = [value.name for value in graph.input], [value.name for value in graph.output]
    graphs = {"model": {"file": model.relative_to(folder).as_posix(), "inputs": inputs, "outputs": outputs}}
    config = _read(folder / "config.json")
    has_cache = any(name.startswith("past") for name in inputs)
    takes_text = "input_ids" in inputs and "logits" in outputs and _SEQ2SEQ_INPUT not in inputs
    if takes_text and (has_cache or _is_causal(config)):
        return Manifest(TEXT_GENERATION, architecture=_architecture(folder, config, graph), graphs=graphs)
    return Manifest(UNKNOWN_TASK, graphs=graphs)


def can_adopt(bundle: ModelBundle) -> bool:
    """Return whether a model without a manifest is a decoder that `adopt` rewrites; its weights are not read."""
    is_foreign = not bundle.manifest.files and bundle.manifest.task == TEXT_GENERATION
    return is_foreign and is_adaptable(read_skeleton(bundle.model).graph)


def adopt(bundle: ModelBundle, model: OnnxModel) -> tuple[ModelBundle, OnnxModel]:
    """Return a decoder for which `can_adopt` holds as if llmfast had exported it: lineage and graph.

    Raises:
        UnsupportedError: the graph lacks what llmfast's decoder graph needs.
    """
    step = Step(
        stage="import",
        method=model.proto.producer_name or "unknown",
        options={"producer_version": model.proto.producer_version},
        versions={"llmfast": llmfast.__version__},
    )
    return replace(bundle, manifest=replace(bundle.manifest, lineage=(step,))), adapt(model)


def _is_causal(config: dict[str, Any]) -> bool:
    classes = config.get("architectures")
    return isinstance(classes, list) and any(str(name).endswith("ForCausalLM") for name in classes)


def _architecture(folder: Path, config: dict[str, Any], graph: onnx.GraphProto) -> dict[str, Any]:
    """Return `context_length`, `eos_token_id` and `vocab_size`, where config files or the graph tell them."""
    settings = _read(folder / "genai_config.json")
    _refuse_libraries(folder / "genai_config.json", settings)
    genai = settings.get("model")
    genai = genai if isinstance(genai, dict) else {}
    found: dict[str, Any] = {}
    contexts = [genai.get("context_length"), *(config.get(key) for key in _CONTEXT_KEYS)]
    context = next((context for context in contexts if context is not None), None)
    if context is not None and (type(context) is not int or context < 1):
        raise InputError(f"the config files of `{folder}` say that the context holds {context!r} tokens")
    # Where the graph has no positions for it the context ends, whatever the config files say.
    limits = [limit for limit in (context, context_length(graph)) if limit is not None]
    if limits:
        found["context_length"] = min(limits)
    logits = next(value.type.tensor_type.shape.dim for value in graph.output if value.name == "logits")
    if len(logits) == 3 and logits[2].dim_value:
        found["vocab_size"] = logits[2].dim_value
    if "eos_token_id" in genai:
        found["eos_token_id"] = genai["eos_token_id"]
    return found


def _refuse_libraries(path: Path, settings: dict[str, Any]) -> None:
    """Refuse settings by which onnxruntime-genai loads native code of the folder, or writes files."""
    places: list[Any] = [settings]
    while places:
        place = places.pop()
        if isinstance(place, dict):
            if found := sorted(place.keys() & set(_NATIVE_FIELDS)):
                raise UnsafeInputError(
                    f"`{path}` has `{found[0]}`, which loads a native library or writes files",
                    "remove it, if you know what it is for; llmfast does without",
                )
            places += place.values()
        elif isinstance(place, list):
            places += place


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"malformed `{path}`: not a JSON object")
    return document
