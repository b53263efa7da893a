"""What the direct route must know of an encoder-decoder, read from its Hugging Face config.

Architectures differ in data: one file in export/seq2seq says how a `model_type` is described.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from llmfast import registry
from llmfast.bundle import SEQ2SEQ_TASKS
from llmfast.errors import UnsupportedError

_FOLDER = "export.seq2seq"
# https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/contrib_ops/cpu/bert/group_query_attention_helper.h
_HEAD_SIZE_STEP = 8
# What classes of encoder-decoders with a head are called.
_CLASSES = ("ForConditionalGeneration", "MTModel")
ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "swish")


@dataclass(frozen=True)
class Stack:
    """Sizes of an encoder or a decoder."""

    num_layers: int
    num_heads: int
    head_size: int

    @property
    def width(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_size


@dataclass(frozen=True)
class RelativePositions:
    """T5's bias on attention scores, which depends on the bucket that the distance of two tokens falls into.

    Attributes:
        buckets: stack -> int64 [2 * max_distance + 1], bucket of key - query = -max_distance .. max_distance;
            beyond, the bucket does not change.
        weights: stack -> name of the weight [buckets, heads], which the layers share.
    """

    buckets: dict[str, np.ndarray]
    weights: dict[str, str]


@dataclass(frozen=True)
class Spectrogram:
    """A source that is no text: every recording's has the same size.

    Attributes:
        mel_bins: its bands.
        positions: of the encoder, each two of its frames.
    """

    mel_bins: int
    positions: int

    @property
    def frames(self) -> int:
        """Its frames."""
        return 2 * self.positions


@dataclass(frozen=True, eq=False)
class EncoderDecoder:
    """Sizes of an encoder-decoder and the points where architectures differ.

    Attributes:
        context_length: positions of the source, and of the target; None is any number.
        spell: a weight's name here (BART's, without `model.`) -> its name in the checkpoint.
        shared_embeddings: encoder and decoder look tokens up in one table.
        embedding_scale: factor on the embeddings.
        embedding_norm: a norm follows the embeddings.
        positions: float32 [context_length, hidden_size] added to the embeddings; None when learned, or relative.
        learned_positions: rows at the start of the learned table that belong to no position; None when not learned.
        relative_positions: T5's bias.
        pre_norm: norms stand before the sublayers, and one at the end; otherwise behind them.
        rms_norm: norms neither subtract the mean nor have a bias.
        bias: linear layers have a bias.
        key_bias: so do those that make an attention's keys.
        scaled_attention: scores are divided by the root of the head size.
        activation: of the MLP, one of `ACTIVATIONS`.
        gated: the MLP multiplies its activations by a second projection.
        logits_scale: factor on what the head multiplies.
        source: what the encoder takes instead of tokens; None is tokens.
    """

    model_type: str
    encoder: Stack
    decoder: Stack
    hidden_size: int
    vocab_size: int
    context_length: int | None
    norm_epsilon: float
    spell: Callable[[str], str]
    shared_embeddings: bool = True
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    positions: np.ndarray | None = None
    learned_positions: int | None = None
    relative_positions: RelativePositions | None = None
    pre_norm: bool = False
    rms_norm: bool = False
    bias: bool = True
    key_bias: bool = True
    scaled_attention: bool = True
    activation: str = "gelu"
    gated: bool = False
    logits_scale: float = 1.0
    source: Spectrogram | None = None


def supported_model_types() -> list[str]:
    """List the `model_type`s of encoder-decoders."""
    return [name.replace("-", "_") for name in registry.names(_FOLDER)]


def supported_tasks() -> set[str]:
    """Return what encoder-decoders are exported for."""
    return {*SEQ2SEQ_TASKS, *(str(_plugin(model_type).TASK) for model_type in supported_model_types())}


def detect_seq2seq_task(config: Mapping[str, Any]) -> str | None:
    """Return what an encoder-decoder checkpoint is for, None when it is no such checkpoint.

    Args:
        config: the contents of config.json.
    """
    names = config.get("architectures") or [""]
    if config.get("model_type") not in supported_model_types() or not str(names[0]).endswith(_CLASSES):
        return None
    if set(config.get("task_specific_params") or ()) == {"summarization"}:
        return "summarization"
    return str(_plugin(config["model_type"]).TASK)


def is_seq2seq_task(config: Mapping[str, Any], task: str) -> bool:
    """Return whether a task asks for an encoder and a decoder; for speech recognition the checkpoint decides.

    Args:
        config: the contents of config.json.
        task: a name in `llmfast.tasks`.
    """
    model_type = config.get("model_type")
    return task in SEQ2SEQ_TASKS or (model_type in supported_model_types() and task == _plugin(model_type).TASK)


def describe(config: Any, task: str) -> EncoderDecoder:
    """Read an encoder-decoder's sizes and differences from a `transformers` config.

    Args:
        config: of the checkpoint.
        task: what the bundle will be for.

    Raises:
        UnsupportedError: an architecture, activation or head size that the direct route lacks, or a task of texts
            for a model that hears.
    """
    if config.model_type not in supported_model_types():
        raise UnsupportedError(
            f"architecture `{config.model_type}` is not supported for sequence-to-sequence tasks",
            f"supported: {', '.join(supported_model_types())}",
        )
    plugin = _plugin(config.model_type)
    if task != plugin.TASK and not {task, plugin.TASK} <= set(SEQ2SEQ_TASKS):
        raise UnsupportedError(f"a `{config.model_type}` can't be exported for {task}", f"it is for {plugin.TASK}")
    description: EncoderDecoder = plugin.describe(config)
    if description.activation not in ACTIVATIONS:
        raise UnsupportedError(f"activation `{description.activation}` in `{config.model_type}` is not supported")
    if description.decoder.head_size % _HEAD_SIZE_STEP:
        raise UnsupportedError(
            f"head size {description.decoder.head_size} is not supported: "
            f"ONNX Runtime's attention needs a multiple of {_HEAD_SIZE_STEP}"
        )
    return description


def _plugin(model_type: str) -> ModuleType:
    return registry.load(_FOLDER, model_type.replace("_", "-"))
