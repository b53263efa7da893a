"""The traced route, for encoders: PyTorch's exporter records the model, and the result is proven.

Attention is traced in its `eager` form and the padding mask as one additive [batch, 1, 1, seq]: both leave
nothing but MatMul, Add and Softmax, which ONNX Runtime fuses, where `sdpa` leaves IsNaN and Where.
"""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast import registry
from llmfast.bundle import MODEL
from llmfast.errors import InputError, UnsupportedError
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.encoder import as_module, context_length, first_line, load_encoder, token_types
from llmfast.export.pooling import Pooling, read_object, read_pooling
from llmfast.export.ranking import is_cross_encoder, is_ranker, read_activation
from llmfast.export.requirements import require_export_extra
from llmfast.export.traced_graph import write_graph
from llmfast.export.traced_parity import Reference, prove_traced

if TYPE_CHECKING:
    import torch

# Each was exported and proven; the tests do it again for every entry.
_MODEL_TYPES = (
    "albert",
    "bert",
    "camembert",
    "convbert",
    "data2vec-text",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "eurobert",
    "megatron-bert",
    "mobilebert",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roformer",
    "squeezebert",
    "xlm-roberta",
    "xlm-roberta-xl",
)
_OPSET = 21
_TRACED_SHAPE = (2, 8)  # batch and length seen by the exporter, which takes 0 and 1 for constants


@dataclass(frozen=True)
class TracedExport:
    """What the traced route wrote, in the manifest's terms.

    Attributes:
        graphs: `{"model": {"file", "inputs", "outputs"}}`.
        architecture: sizes; `pooling` and `normalize` of an embedding model, `labels` (and `problem_type`) of a
            classifier of texts or tokens, `activation` of a re-ranker.
        parity: `max_abs_diff`, `max_rel_diff`, `shapes`; `argmax_agreement` where there are classes.
    """

    graphs: Mapping[str, Mapping[str, Any]]
    architecture: Mapping[str, Any]
    parity: dict[str, Any]


def supported_model_types() -> list[str]:
    """List the encoders that are proven to export."""
    return list(_MODEL_TYPES)


def detect_task(config: Mapping[str, Any], source: Path) -> str:
    """Return what a checkpoint is for, by its class or its sentence-transformers files.

    Args:
        config: the contents of config.json.
        source: the checkpoint's folder.

    Raises:
        InputError: config.json names no class.
        UnsupportedError: a class that `transformers` does not have, or a task that llmfast does not.
    """
    if (source / "modules.json").is_file() and not is_cross_encoder(source):
        return "feature-extraction"
    require_export_extra()
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError(f"no `architectures` in `{source / 'config.json'}`", "say what the model is for with --task")
    with quiet():
        task = _task_of_class(names[0])
    if task == "text-classification" and is_ranker(source, config):
        task = "text-ranking"
    if task == "feature-extraction" and {"text_config", "vision_config"} <= set(config):
        task = "zero-shot-image-classification"
    elif task == "feature-extraction" and "image_size" in config:
        task = "image-feature-extraction"
    known = registry.names("tasks")
    if task not in known:
        raise UnsupportedError(
            f"`{source}` is a `{names[0]}`, whose task llmfast does not have",
            f"choose one with --task: {', '.join(known)}; feature-extraction leaves the head out",
        )
    return task


def write_traced(source: Path, task: str, staged: Path, threads: int | None = None) -> TracedExport:
    """Trace an encoder with its real weights, write model.onnx, and compare it with PyTorch.

    Args:
        source: a Hugging Face folder with safetensors weights.
        task: `feature-extraction`, `text-classification`, or another task of an encoder.
        staged: the directory to write to.
        threads: threads of ONNX Runtime for the comparison.

    Raises:
        InputError: weights are truncated, missing or not finite.
        UnsupportedError: not an encoder of a proven type, a pooling without a graph, or no [export] extra.
        GateError: ONNX Runtime and PyTorch disagree.
    """
    require_export_extra()
    checkpoint = SafetensorsCheckpoint(source)
    plugin = registry.load("tasks", task)
    if checkpoint.config.model_type not in _MODEL_TYPES or not hasattr(plugin, "AUTO_MODEL"):
        raise UnsupportedError(
            f"`{source}`: a `{checkpoint.config.model_type}` can't be exported for {task}",
            f"encoders: {', '.join(supported_model_types())}",
        )
    pooling = read_pooling(source) if "sentence_embedding" in plugin.OUTPUTS else None
    activation = read_activation(source, checkpoint.config.to_dict()) if task == "text-ranking" else None
    with quiet():
        model = load_encoder(source, checkpoint.config, plugin.AUTO_MODEL)
        module = as_module(model, plugin.OUTPUTS, pooling)
        limit = context_length(model)
        inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if token_types(model) > 1 else [])
        program = _trace(module, inputs, plugin.OUTPUTS, limit)
        write_graph(program.model, dict(model.named_parameters()), staged)
        parity = prove_traced(Reference(model, plugin.OUTPUTS, pooling), staged / MODEL, inputs, limit, threads)
    return TracedExport(
        graphs={"model": {"file": MODEL, "inputs": inputs, "outputs": list(plugin.OUTPUTS)}},
        architecture=describe_text(model.config, limit)
        | _describe_task(model.config, task, pooling, activation)
        | _describe_limit(source, pooling, limit),
        parity=parity,
    )


def _task_of_class(name: str) -> str:
    import transformers
    from optimum.exporters.tasks import TasksManager

    model_class = getattr(transformers, name, None)
    if not inspect.isclass(model_class):
        raise UnsupportedError(
            f"model class `{name}` is not part of transformers", "code of a model's folder is never run"
        )
    try:
        return str(TasksManager.infer_task_from_model(model_class))
    except ValueError:  # optimum doesn't see classes that share a place, as DeiT's two for images do
        return "image-classification" if "ForImageClassification" in name else "unknown"


def run_exporter(
    module: "torch.nn.Module",
    examples: "Mapping[str, torch.Tensor]",
    axes: Mapping[str, Mapping[int, Any]],
    outputs: tuple[str, ...],
) -> Any:
    """Run PyTorch's exporter.

    Args:
        module: takes the examples in their order, returns the outputs as a tuple.
        examples: of sizes that are not 0 or 1 where they are free.
        axes: the free axes of each input, a `torch.export.Dim` each.
        outputs: their names.

    Raises:
        UnsupportedError: the module can't be traced.
    """
    import torch

    try:
        with torch.inference_mode():
            return torch.onnx.export(
                module,
                tuple(examples.values()),
                input_names=list(examples),
                output_names=list(outputs),
                dynamic_shapes=tuple(axes[name] for name in examples),
                opset_version=_OPSET,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedError(f"PyTorch can't trace this model: {first_line(error.__cause__ or error)}") from error


def _trace(module: "torch.nn.Module", inputs: list[str], outputs: tuple[str, ...], limit: int) -> Any:
    """Trace an encoder of text; batch and sequence stay free."""
    import torch

    shape = (_TRACED_SHAPE[0], min(_TRACED_SHAPE[1], limit))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=limit)}
    examples = {name: torch.ones(shape, dtype=torch.int64) for name in inputs}
    return run_exporter(module, examples, dict.fromkeys(inputs, axes), outputs)


def describe_text(config: Any, limit: int) -> dict[str, Any]:
    """Return the sizes of an encoder of text for the manifest."""
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "head_size": config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "context_length": limit,
    }


def _describe_task(config: Any, task: str, pooling: Pooling | None, activation: str | None) -> dict[str, Any]:
    if pooling:
        return {"pooling": "+".join(pooling.kinds), "normalize": pooling.normalize}
    if activation:
        return {"activation": activation}
    if task not in ("text-classification", "token-classification"):
        return {}
    described = describe_classes(config)
    return described if task == "text-classification" else {"labels": described["labels"]}


def describe_classes(config: Any) -> dict[str, Any]:
    """Return a classifier's `labels` and its `problem_type`."""
    labels = [str(config.id2label.get(index, f"LABEL_{index}")) for index in range(config.num_labels)]
    # What transformers' own pipeline takes when the checkpoint doesn't say.
    default = "single_label_classification" if config.num_labels > 1 else "multi_label_classification"
    return {"labels": labels, "problem_type": config.problem_type or default}


def _describe_limit(source: Path, pooling: Pooling | None, limit: int) -> dict[str, int]:
    """Return `max_seq_length` where sentence-transformers' files or the tokenizer's cut texts before the model must."""
    path = source / "tokenizer_config.json"
    length = pooling.max_seq_length if pooling else None
    if length is None and path.is_file():
        length = read_object(path).get("model_max_length")
    return {"max_seq_length": length} if isinstance(length, int) and 0 < length < limit else {}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' bars, logs and warnings off both streams."""
    from transformers.utils import logging as transformers_logging

    disabled, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()
