"""`llmfast export`: a PyTorch checkpoint becomes a bundle, its parity with PyTorch proven."""

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmfast
from llmfast import registry
from llmfast.bundle import (
    TEXT_GENERATION,
    Manifest,
    ModelBundle,
    Step,
    check_output,
    stage_output,
    write_manifest,
)
from llmfast.errors import OptionError
from llmfast.export.requirements import require_export_extra
from llmfast.graph.feeds import FEATURES
from llmfast.graph.model import OnnxModel, count_parameters, count_weight_bytes
from llmfast.graph.packed import allow_int8_kernels
from llmfast.lineage import read_lineage
from llmfast.report import note, progress
from llmfast.resources import require_disk

if TYPE_CHECKING:
    from llmfast.export.encoder_decoder import Spectrogram

_VERSIONED = ("onnx", "onnxruntime", "torch", "transformers")


@dataclass(frozen=True)
class ExportOptions:
    """Choices of an export.

    Attributes:
        task: a name in `llmfast.tasks`; None reads it from the checkpoint.
        threads: threads of ONNX Runtime for the parity runs; None takes the cores this process may use.
        overwrite: replace an existing bundle.
        context_length: positions that a decoder is exported for; None takes all that it was made for, or with
            longrope those that its short factors are for.
        allow_pickle: read weights from .bin and .pt files, tensors only, when there are no safetensors.
    """

    task: str | None = None
    threads: int | None = None
    overwrite: bool = False
    context_length: int | None = None
    allow_pickle: bool = False


def export(source: str, output: Path, options: ExportOptions | None = None) -> ModelBundle:
    """Export a checkpoint to a bundle.

    Args:
        source: a Hugging Face folder, a .gguf file, or a hub id.
        output: the bundle's directory.
        options: see `ExportOptions`.

    Raises:
        InputError: the checkpoint is missing, truncated or incomplete.
        UnsupportedError: its architecture or task can't be exported, or the [export] extra is missing.
        GateError: ONNX Runtime and PyTorch disagree; nothing is written.
        OutputExistsError: the output exists.
    """
    options = options or ExportOptions()
    if not (pickles := _find_pickles(source, output, options)):
        return _export(source, output, options)
    from llmfast.export.checkpoint import folder_source
    from llmfast.export.pickle_checkpoint import convert

    folder = pickles[0].parent
    with convert(folder, pickles, output.parent) as copy:
        return _export(str(copy), output, options, folder_source(folder, pickles))


def _find_pickles(source: str, output: Path, options: ExportOptions) -> list[Path]:
    """Return the pickles that weights come from: none where there are safetensors, or the user allows no pickles."""
    if not options.allow_pickle or Path(source).suffix == ".gguf":
        return []
    check_output(output, (Path(source),), options.overwrite)
    require_export_extra()
    from llmfast.export.hub import resolve_folder
    from llmfast.export.pickle_checkpoint import find_pickles

    folder = resolve_folder(source, allow_pickle=True)
    return [] if any(folder.glob("*.safetensors")) else find_pickles(folder)


def _export(source: str, output: Path, options: ExportOptions, recorded: dict[str, Any] | None = None) -> ModelBundle:
    task = _prepare(source, output, options)
    route: Callable[..., Manifest] = _export_traced
    if task == TEXT_GENERATION:
        route = _export_decoder
    elif _has_two_stacks(source, task):
        route = _export_encoder_decoder
    with stage_output(output, options.overwrite) as staged:
        manifest = route(source, task, staged, options)
        models = [OnnxModel.load(staged / graph["file"]) for graph in manifest.graphs.values()]
        parameters = count_parameters(models)
        architecture = {**manifest.architecture, "num_parameters": parameters}
        if "packing" in manifest.lineage[-1].options:
            manifest = replace(manifest, bits_per_weight=8 * count_weight_bytes(models) / parameters)
        origin = recorded or manifest.source
        lineage = (*read_lineage(Path(source)), *manifest.lineage)  # a checkpoint that llmfast wrote has steps
        write_manifest(staged, replace(manifest, architecture=architecture, source=origin, lineage=lineage))
    return ModelBundle.open(output)


def describe_export(source: str, output: Path, options: ExportOptions) -> str:
    """Check what `export` checks before it works, and say in one line what it would do.

    Pickles are not read for that, since reading them takes a copy.
    """
    pickles = _find_pickles(source, output, options)
    place = str(pickles[0].parent) if pickles else source  # the hub would be asked again without leave for pickles
    task = _prepare(place, output, options, pickles)
    if task != TEXT_GENERATION and _has_two_stacks(place, task):
        return f"would write an encoder and a decoder for {task} from `{source}` into `{output}`"
    if task != TEXT_GENERATION:
        return f"would trace `{source}` for {task} into `{output}`"
    from llmfast.export.architectures import describe
    from llmfast.export.checkpoint import load_config, open_checkpoint, text_config
    from llmfast.export.decoder import DecoderGraph

    if pickles:
        decoder = describe(text_config(load_config(Path(place))), options.context_length)
    else:
        checkpoint = open_checkpoint(source)
        decoder = describe(checkpoint.config, options.context_length)
        DecoderGraph(checkpoint, decoder)  # finds every weight
    return (
        f"would write a {decoder.model_type} decoder of {decoder.num_hidden_layers} layers, "
        f"{decoder.hidden_size} wide, from `{source}` into `{output}`"
    )


def _prepare(source: str, output: Path, options: ExportOptions, pickles: Sequence[Path] = ()) -> str:
    """Check output, packages, options and the form of the weights, which may be pickles; return the task."""
    check_output(output, (Path(source),), options.overwrite)
    require_export_extra()
    from llmfast.export.checkpoint import TEXT_PARTS, check_weights, code_fields, load_config
    from llmfast.export.encoder_decoder import detect_seq2seq_task
    from llmfast.export.hub import resolve_folder
    from llmfast.export.pickle_checkpoint import check_archive
    from llmfast.export.traced import detect_task

    if Path(source).suffix == ".gguf":
        task = options.task or TEXT_GENERATION
        if task != TEXT_GENERATION:
            raise OptionError(f"--task {task}: a .gguf file is exported for {TEXT_GENERATION}")
    else:
        folder = resolve_folder(source)
        for file in pickles:
            check_archive(file)
        if not pickles:
            check_weights(folder)
        config = load_config(folder).to_dict()
        if ignored := code_fields(folder):
            note(f"note: ignoring {', '.join(ignored)} of `{source}`: code in a model's folder is never run")
        is_part = config["model_type"] in TEXT_PARTS
        known = options.task or detect_seq2seq_task(config) or (TEXT_GENERATION if is_part else None)
        task = known or detect_task(config, folder)
        if is_part and task == TEXT_GENERATION:
            note(f"note: of `{source}` the part for texts is exported, which takes no images")
    if task not in registry.names("tasks"):
        raise OptionError(f"unknown task `{task}`", f"choose from: {', '.join(registry.names('tasks'))}")
    if options.context_length is not None and task != TEXT_GENERATION:
        raise OptionError(f"--context-length is for {TEXT_GENERATION}, not for {task}")
    return task


def _has_two_stacks(source: str, task: str) -> bool:
    """Return whether a folder's model is exported as an encoder and a decoder."""
    from llmfast.bundle import read_json
    from llmfast.export.encoder_decoder import is_seq2seq_task
    from llmfast.export.hub import resolve_folder

    return is_seq2seq_task(read_json(resolve_folder(source) / "config.json"), task)


def _export_decoder(source: str, task: str, staged: Path, options: ExportOptions) -> Manifest:
    from llmfast.export.architectures import describe
    from llmfast.export.checkpoint import open_checkpoint
    from llmfast.export.decoder import DecoderGraph
    from llmfast.export.parity import prove_decoder

    checkpoint = open_checkpoint(source)
    decoder = describe(checkpoint.config, options.context_length)
    if decoder.rotary_factors:
        note(
            f"note: `{source}` has rotary factors for short and for long contexts; took the {decoder.rotary_factors} "
            f"ones, for up to {decoder.context_length} tokens (--context-length chooses)"
        )
    layout = DecoderGraph(checkpoint, decoder)
    require_disk(staged, layout.weights.num_bytes, "the bundle")
    with progress("writing the graph", len(layout.weights)) as advance:
        graph = layout.write(staged, advance)
    checkpoint.write_companions(staged)
    packing = {"packing": checkpoint.quantization} if checkpoint.quantization else {}
    manifest = Manifest(
        task=task,
        source=checkpoint.source(),
        architecture={
            "model_type": decoder.model_type,
            "num_hidden_layers": decoder.num_hidden_layers,
            "hidden_size": decoder.hidden_size,
            "num_attention_heads": decoder.num_attention_heads,
            "num_key_value_heads": decoder.num_key_value_heads,
            "head_size": decoder.head_size,
            "vocab_size": decoder.vocab_size,
            "context_length": decoder.context_length,
            "eos_token_id": checkpoint.config.eos_token_id,
            **({"rotary_factors": decoder.rotary_factors} if decoder.rotary_factors else {}),
        },
        graphs={"model": graph},
        lineage=(make_step("direct", options, **packing),),
    )
    with progress("comparing with PyTorch", 2) as advance:
        parity = prove_decoder(source, staged, manifest, options.threads, advance)
    allow_int8_kernels(staged / graph["file"])
    return _with_parity(manifest, parity)


def _export_encoder_decoder(source: str, task: str, staged: Path, options: ExportOptions) -> Manifest:
    from llmfast.export.checkpoint import SafetensorsCheckpoint
    from llmfast.export.encoder_decoder import describe
    from llmfast.export.hub import resolve_folder
    from llmfast.export.seq2seq_graphs import write_encoder_decoder
    from llmfast.export.seq2seq_parity import prove_encoder_decoder
    from llmfast.export.seq2seq_settings import check_spectrogram, read_languages, write_seq2seq_companions

    checkpoint = SafetensorsCheckpoint(resolve_folder(source))
    description = describe(checkpoint.config, task)
    if description.source is not None:
        check_spectrogram(checkpoint.path, description.source)
    with progress("writing the graphs", description.encoder.num_layers + description.decoder.num_layers) as advance:
        graphs = write_encoder_decoder(checkpoint, description, staged, advance)
    write_seq2seq_companions(checkpoint, staged)
    manifest = Manifest(
        task=task,
        source=checkpoint.source(),
        architecture={
            "model_type": description.model_type,
            "num_hidden_layers": description.decoder.num_layers,
            "num_encoder_layers": description.encoder.num_layers,
            "hidden_size": description.hidden_size,
            "num_attention_heads": description.decoder.num_heads,
            "num_key_value_heads": description.decoder.num_heads,
            "head_size": description.decoder.head_size,
            "vocab_size": description.vocab_size,
            "context_length": description.context_length,
            "eos_token_id": checkpoint.config.eos_token_id,
            "pad_token_id": checkpoint.config.pad_token_id,
            **(_describe_source(description.source) or {"languages": read_languages(staged)}),
        },
        graphs=graphs,
        lineage=(make_step("direct", options),),
    )
    vocab_sizes = checkpoint.config.vocab_size, description.vocab_size
    with progress("comparing with PyTorch", 2) as advance:
        parity = prove_encoder_decoder(
            checkpoint.path, staged, manifest, vocab_sizes, description.source, options.threads, advance
        )
    return _with_parity(manifest, parity)


def _describe_source(source: "Spectrogram | None") -> dict[str, Any]:
    """Return random inputs for an encoder that takes no tokens; nothing for one that does."""
    if source is None:
        return {}
    shape = [1, source.mel_bins, source.frames]
    return {"example_inputs": {FEATURES: {"dtype": "float32", "shape": shape, "low": -1, "high": 1}}}


def _export_traced(source: str, task: str, staged: Path, options: ExportOptions) -> Manifest:
    from llmfast.export.checkpoint import copy_companions, folder_source, load_config
    from llmfast.export.hub import resolve_folder
    from llmfast.export.traced import write_traced
    from llmfast.export.traced_contrastive import supported_contrastive_model_types, write_traced_contrastive
    from llmfast.export.traced_signals import write_traced_signals

    folder = resolve_folder(source)
    write = write_traced_signals if hasattr(registry.load("tasks", task), "INPUT") else write_traced
    if load_config(folder).model_type in supported_contrastive_model_types():
        write = write_traced_contrastive
    with progress("tracing and comparing with PyTorch"):
        traced = write(folder, task, staged, options.threads)
    copy_companions(folder, staged, has_tokenizer="input_ids" in traced.graphs["model"]["inputs"])
    manifest = Manifest(
        task=task,
        source=folder_source(folder),
        architecture=traced.architecture,
        graphs=traced.graphs,
        lineage=(make_step("traced", options),),
    )
    return _with_parity(manifest, traced.parity)


def make_step(route: str, options: ExportOptions, **more: Any) -> Step:
    """Return the step of an export for the manifest's lineage."""
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    chosen = {key: value for key, value in asdict(options).items() if key != "overwrite"}
    return Step("export", route, chosen | more, {"llmfast": llmfast.__version__} | versions)


def _with_parity(manifest: Manifest, parity: dict[str, Any]) -> Manifest:
    return replace(manifest, measured={"export": {"parity": parity}})
