"""The traced route for encoders of images and sound, whose one input is float32.

`pixel_values` [batch, 3, height, width]: batches are free, height and width are those that preprocessor_config.json
makes of every image. `input_values` [batch, samples]: both are free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast import registry
from llmfast.audio import AudioProcessor
from llmfast.bundle import MODEL
from llmfast.errors import InputError, UnsupportedError
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.encoder import load_encoder
from llmfast.export.pooling import read_output
from llmfast.export.requirements import require_export_extra
from llmfast.export.traced import TracedExport, describe_classes, quiet, run_exporter
from llmfast.export.traced_graph import write_graph
from llmfast.export.traced_parity import Reference, prove_signals
from llmfast.image import ImageProcessor
from llmfast.preprocessor import PREPROCESSOR

if TYPE_CHECKING:
    import torch

# Each was exported and proven; the tests do it again for every entry.
_MODEL_TYPES = {"pixel_values": ("deit", "dinov2", "vit"), "input_values": ("hubert", "wav2vec2")}
_CTC = "automatic-speech-recognition"
_TASKS = {
    "pixel_values": ("image-classification", "image-feature-extraction"),
    "input_values": ("audio-classification", _CTC),
}
_CHANNELS = 3
_UNIT_VARIANCE = 3**0.5  # uniform numbers up to it have a variance of 1


@dataclass(frozen=True)
class Signal:
    """A model's input.

    Attributes:
        traced: the shape seen by the exporter, which takes 0 and 1 for constants.
        free: axis -> its name and smallest size.
        proven: the shapes at which ONNX Runtime is compared with PyTorch.
        example: the shape that bench and quantize draw random inputs of.
        facts: what the manifest's architecture says of it.
    """

    traced: tuple[int, ...]
    free: Mapping[int, tuple[str, int]]
    proven: tuple[tuple[int, ...], ...]
    example: tuple[int, ...]
    facts: dict[str, Any]


def supported_signal_model_types(name: str) -> list[str]:
    """List the encoders that are proven to export, by the name of their input."""
    return list(_MODEL_TYPES[name])


def signal_tasks(name: str) -> list[str]:
    """List the tasks that they are exported for, by the name of their input."""
    return list(_TASKS[name])


def write_traced_signals(source: Path, task: str, staged: Path, threads: int | None = None) -> TracedExport:
    """Trace an encoder of images or sound with its real weights, write model.onnx, and compare it with PyTorch.

    Args:
        source: a Hugging Face folder with safetensors weights and preprocessor_config.json.
        task: a task that has an `INPUT`.
        staged: the directory to write to.
        threads: threads of ONNX Runtime for the comparison.

    Raises:
        InputError: weights are truncated, missing or not finite, or the processor makes images of another size
            than the model takes.
        UnsupportedError: not an encoder of a proven type, a processor or tokenizer that is not understood, or no
            [export] extra.
        GateError: ONNX Runtime and PyTorch disagree.
    """
    require_export_extra()
    import torch

    plugin = registry.load("tasks", task)
    checkpoint = SafetensorsCheckpoint(source, has_tokenizer=False)
    known = supported_signal_model_types(plugin.INPUT)
    if checkpoint.config.model_type not in known or task not in signal_tasks(plugin.INPUT):
        raise UnsupportedError(
            f"`{source}`: a `{checkpoint.config.model_type}` can't be exported for {task}",
            f"encoders for it: {', '.join(known)}",
        )
    if not checkpoint.config.architectures:  # some types have two classes for a task
        raise InputError(f"no `architectures` in `{source / 'config.json'}`", "it names the model's class")
    describe = {"pixel_values": _describe_images, "input_values": _describe_sound}[plugin.INPUT]
    signal = describe(source, checkpoint.config)
    labels = _describe_answer(source, task, checkpoint.config)
    with quiet():
        model = load_encoder(source, checkpoint.config, plugin.AUTO_MODEL)
        axes = {axis: torch.export.Dim(name, min=smallest) for axis, (name, smallest) in signal.free.items()}
        module = _as_module(model, plugin.INPUT, plugin.OUTPUTS)
        examples = {plugin.INPUT: torch.zeros(signal.traced)}
        program = run_exporter(module, examples, {plugin.INPUT: axes}, plugin.OUTPUTS)
        write_graph(program.model, dict(model.named_parameters()), staged)
        reference = Reference(model, plugin.OUTPUTS, None)
        parity = prove_signals(reference, staged / MODEL, plugin.INPUT, signal.proven, threads)
    return TracedExport(
        graphs={"model": {"file": MODEL, "inputs": [plugin.INPUT], "outputs": list(plugin.OUTPUTS)}},
        architecture=describe_signal(model.config)
        | signal.facts
        | labels
        | {"example_inputs": {plugin.INPUT: describe_example(signal.example)}},
        parity=parity,
    )


def image_shape(source: Path, config: Any) -> tuple[int, int, int]:
    """Return the shape of an encoder's images, channels first.

    Args:
        source: the checkpoint's folder.
        config: of the encoder of images.

    Raises:
        InputError: preprocessor_config.json makes images of another size than the model takes.
        UnsupportedError: it leaves them their own, or they are not RGB.
    """
    size = ImageProcessor.load(source).output_size
    if size is None:
        raise UnsupportedError(
            f"`{source / PREPROCESSOR}`: images keep their own size", "supported: resizing or cropping to one size"
        )
    if config.num_channels != _CHANNELS:
        raise UnsupportedError(f"`{source}` takes images of {config.num_channels} channels", "supported: RGB")
    # DINOv2 interpolates its positions; the others refuse images of another size.
    expected = config.image_size
    expected = (expected, expected) if isinstance(expected, int) else tuple(expected)
    if config.model_type != "dinov2" and size != expected:
        raise InputError(
            f"`{source / PREPROCESSOR}` makes images of {size[0]}x{size[1]}, "
            f"config.json wants {expected[0]}x{expected[1]}"
        )
    return _CHANNELS, *size


def _describe_images(source: Path, config: Any) -> Signal:
    """Return the input of an encoder of images."""
    shape = image_shape(source, config)
    return Signal(
        traced=(2, *shape),
        free={0: ("batch", 1)},
        proven=tuple((batch, *shape) for batch in (1, 3, 4)),
        example=(1, *shape),
        facts={"image_size": list(shape[1:])},
    )


def _describe_sound(source: Path, config: Any) -> Signal:
    """Return the input of an encoder of sound."""
    rate = AudioProcessor.load(source).sampling_rate
    if getattr(config, "adapter_attn_dim", None):
        raise UnsupportedError(f"`{source}` has adapters for languages", "supported: a model of one vocabulary")
    shortest, step = 1, 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        shortest = (shortest - 1) * stride + kernel
        step *= stride
    return Signal(
        traced=(2, shortest + 20 * step),
        free={0: ("batch", 1), 1: ("samples", shortest)},
        proven=((1, shortest), (1, shortest + 7 * step + 1), (3, shortest + 50 * step - 1), (2, shortest + 200 * step)),
        example=(1, rate),
        facts={"sampling_rate": rate, "min_samples": shortest},
    )


def _describe_answer(source: Path, task: str, config: Any) -> dict[str, Any]:
    """Return what the model's answers are spelled with: classes, characters, or nothing where they are vectors."""
    if task == _CTC:
        return _describe_characters(source, config)
    return describe_classes(config) if "logits" in registry.load("tasks", task).OUTPUTS else {}


def _describe_characters(source: Path, config: Any) -> dict[str, Any]:
    """Return the characters of a CTC head and how its tokenizer joins them."""
    import transformers

    with quiet():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, config=config, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"no tokenizer in `{source}`", "looked for vocab.json and tokenizer_config.json"
            ) from error
    if type(tokenizer).__name__ != "Wav2Vec2CTCTokenizer":
        raise UnsupportedError(
            f"`{source}`: tokenizer `{type(tokenizer).__name__}` is not supported", "supported: Wav2Vec2CTCTokenizer"
        )
    return {
        "labels": tokenizer.convert_ids_to_tokens(list(range(config.vocab_size))),
        "ctc": {
            "blank": tokenizer.pad_token,
            "word_delimiter": tokenizer.word_delimiter_token,
            "space": tokenizer.replace_word_delimiter_char,
            "lower_case": bool(tokenizer.do_lower_case),
            "clean_up_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        },
    }


def _as_module(model: Any, name: str, outputs: tuple[str, ...]) -> "torch.nn.Module":
    """Wrap a model so that it takes the graph's input and returns the graph's outputs."""
    import torch

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, signal: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result = self.model(**{name: signal})
            return tuple(read_output(result, output, None, None) for output in outputs)

    return Encoder().eval()


def describe_example(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return what `bench` and `quantize` draw random images and sounds like: normalized ones."""
    return {"dtype": "float32", "shape": list(shape), "low": -_UNIT_VARIANCE, "high": _UNIT_VARIANCE}


def describe_signal(config: Any) -> dict[str, Any]:
    """Return the sizes of an encoder of images or sound for the manifest."""
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "head_size": config.hidden_size // config.num_attention_heads,
    }
