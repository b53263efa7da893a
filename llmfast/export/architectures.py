"""What the direct route must know of a decoder, and how it is read from a Hugging Face config.

Architectures differ in data: a file in `llmfast/export/decoders` says where one departs from Llama,
and `decoder.py` writes the graph of whatever is described.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmfast import registry
from llmfast.errors import OptionError, UnsupportedError
from llmfast.export.rotary import Rotary, read_rotary

_FOLDER = "export.decoders"
# Names in configs -> operator, domain, attributes.
ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "silu": ("QuickGelu", "com.microsoft", {"alpha": 1.0}),  # x * sigmoid(x)
    "gelu": ("Gelu", "", {}),
    "gelu_new": ("Gelu", "", {"approximate": "tanh"}),
    "gelu_fast": ("Gelu", "", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", "", {"approximate": "tanh"}),
    "relu": ("Relu", "", {}),
}
# https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/contrib_ops/cpu/bert/group_query_attention_helper.h
_HEAD_SIZE_STEP, _ROTARY_HEAD_SIZE_STEP = 8, 16
# Fields that say how a model is trained, sampled or labelled; they change no logit.
_INERT = re.compile(
    r"(\w+_)?(dropout|pdrop|layerdrop|token_id|initializer_range|init_std|use_cache|is_decoder)(_\w+)?"
    r"|summary_\w+|output_router_logits|router_aux_loss_coef|router_jitter_noise|reorder_and_upcast_attn"
    # The config itself computes `layer_types` and the like from these.
    r"|use_sliding_window|max_window_layers|no_rope_layer_interval"
)


@dataclass(frozen=True)
class Norms:
    """Where a layer normalizes; an empty name is a norm that it does not have.

    Attributes:
        before_attention, before_mlp: of the sum of all layers before, which itself goes on unnormalized.
        after_attention, after_mlp: of what attention or MLP gives, before it is added to the sum.
    """

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""


@dataclass(frozen=True)
class Experts:
    """MLPs of which a router chooses a few for every token.

    Attributes:
        num_experts: MLPs of a layer.
        per_token: how many of them a token goes through.
        normalized: the weights of those chosen sum to 1.
    """

    num_experts: int
    per_token: int
    normalized: bool


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder and the points where architectures differ; the defaults are Llama's.

    Attributes:
        embedding_size: width of the embedding; projected in and out where it is not the hidden size.
        norm: kind of the norms.
        norm_bias: norms have a bias.
        norm_offset: what is added to the norms' stored weights.
        norms: where a layer normalizes.
        final_norm: the head reads normalized sums.
        norms_the_sum: the norms after attention and MLP come after the addition, and their result goes on.
        parallel: attention and MLP read the same sum, and both are added to it. Norms of one name are one norm.
        rotary: per layer, how queries and keys are rotated; None is not at all.
        rotary_interleaved: channel 2i is paired with 2i + 1.
        position_offset: positions have an embedding; position 0 is this row of the table.
        sliding_windows: per layer, how many positions attention looks back; -1 is all of them.
        attention_scale: factor on query-key products; None is 1 / sqrt(head_size).
        attention_softcap, logits_softcap: x becomes cap * tanh(x / cap); 0 is no cap.
        qk_norm: norm of queries and keys before the rotation, over each head or all heads together.
        qkv_bias, output_bias, mlp_bias, head_bias: which linear layers have a bias.
        activation: a key of `ACTIVATIONS`.
        experts: there are several MLPs; None is one.
        gated: the MLP multiplies the activation with a second projection.
        embedding_scale, residual_scale, logits_scale: factors on embeddings, on what attention and MLP add,
            and on logits.
        tied: the head is the embedding.
        stored: names in the checkpoint where they are not Llama's, by parts of the name.
        stored_transposed: linear weights are `[in_features, out_features]`.
        qkv_layout: queries, keys and values are three weights, one, or one where each head has its own three.
        gate_up_packed: the MLP's first two projections are one weight.
    """

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    embedding_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    norm_epsilon: float
    rotary: tuple[Rotary | None, ...]
    sliding_windows: tuple[int, ...]
    activation: str
    tied: bool
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    norms: Norms = Norms()
    final_norm: bool = True
    norms_the_sum: bool = False
    parallel: bool = False
    rotary_interleaved: bool = False
    position_offset: int | None = None
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    qk_norm: Literal["", "head", "width"] = ""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    gated: bool = True
    experts: Experts | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    stored: Mapping[str, str] = field(default_factory=dict)
    stored_transposed: bool = False
    qkv_layout: Literal["split", "packed", "by_head"] = "split"
    gate_up_packed: bool = False

    @property
    def rotary_factors(self) -> str | None:
        """Which of longrope's two sets of factors were taken; None without longrope."""
        return next((rotary.factors for rotary in self.rotary if rotary and rotary.factors), None)

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key heads together."""
        return self.num_key_value_heads * self.head_size


class ConfigReader:
    """A `transformers` config that knows which of its fields were read.

    Attributes:
        original: the config.
        context_length: positions the export is made for.
        original_context_length: positions the model had before longrope stretched it.
    """

    def __init__(self, config: Any, context_length: int | None) -> None:
        self.original = config
        self.fields: set[str] = set()
        self.original_context_length: int = self.max_position_embeddings
        rope = getattr(config, "rope_parameters", None) or {}
        short = getattr(self, "original_max_position_embeddings", None)  # Phi-3 has it outside of the rope's own
        if rope.get("rope_type") == "longrope":
            self.original_context_length = int(rope.get("original_max_position_embeddings") or short or 0)
        self.context_length = context_length or self.original_context_length
        if self.context_length > self.max_position_embeddings:
            raise OptionError(
                f"--context-length {context_length}: the model was made for {self.max_position_embeddings} positions"
            )

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        size: int = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        return size

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.original, name)
        self.fields.update((name, self.original.attribute_map.get(name, name)))
        return value

    def skip(self, *fields: str) -> None:
        """Say that fields play no part in what is described."""
        self.fields.update(fields)

    def refuse_unread(self) -> None:
        """Refuse a field that nobody read and that is neither at its default nor known to change nothing."""
        common = {entry.name for entry in dataclasses.fields(_base_config())}
        for entry in dataclasses.fields(self.original):
            if entry.name in common | self.fields or _INERT.fullmatch(entry.name):
                continue
            value = getattr(self.original, entry.name)
            if value is not None and value != entry.default:
                raise UnsupportedError(
                    f"`{entry.name}` = {value!r} in a `{self.original.model_type}` decoder is not supported"
                )


# How Llama's config says it; a description overrides what its own config says otherwise.
_LLAMA: dict[str, Callable[[Any], Any]] = {
    "model_type": lambda config: config.model_type,
    "num_hidden_layers": lambda config: config.num_hidden_layers,
    "hidden_size": lambda config: config.hidden_size,
    "embedding_size": lambda config: config.hidden_size,
    "intermediate_size": lambda config: config.intermediate_size,
    "num_attention_heads": lambda config: config.num_attention_heads,
    "num_key_value_heads": lambda config: config.num_key_value_heads,
    "head_size": lambda config: config.head_size,
    "vocab_size": lambda config: config.vocab_size,
    "context_length": lambda config: config.context_length,
    "norm_epsilon": lambda config: config.rms_norm_eps,
    "rotary": lambda config: (read_rotary(config),) * config.num_hidden_layers,
    "sliding_windows": lambda config: (-1,) * config.num_hidden_layers,
    "activation": lambda config: config.hidden_act,
    "tied": lambda config: config.tie_word_embeddings,
}


def read_decoder(config: Any, **differences: Any) -> Decoder:
    """Read a decoder from a config as Llama's is read, apart from the differences."""
    values = {name: read(config) for name, read in _LLAMA.items() if name not in differences}
    return Decoder(**values, **differences)


def one_window(config: Any) -> tuple[int, ...]:
    """Return the sliding windows of a decoder whose layers are alike."""
    layers: int = config.num_hidden_layers
    return (config.sliding_window or -1,) * layers


def windows_by_layer(config: Any) -> tuple[int, ...]:
    """Return the sliding windows of a decoder whose layers are of two kinds."""
    window = config.sliding_window
    return tuple(window if kind == "sliding_attention" else -1 for kind in config.layer_types)


def supported_model_types() -> list[str]:
    """List the `model_type`s of the direct route."""
    return sorted(name.replace("-", "_") for name in registry.names(_FOLDER))


def describe(config: Any, context_length: int | None = None) -> Decoder:
    """Describe the decoder of a `transformers` config.

    Args:
        config: of any architecture.
        context_length: positions to export it for; None takes all that it was made for.

    Raises:
        UnsupportedError: an architecture, or something in it, that the direct route lacks.
        OptionError: more positions than the model was made for.
    """
    model_type = config.model_type
    if model_type not in supported_model_types():
        raise UnsupportedError(
            f"architecture `{model_type}` is not supported for text generation",
            f"supported: {', '.join(supported_model_types())}; for anything else, --module FILE.py:FACTORY",
        )
    reader = ConfigReader(config, context_length)
    decoder: Decoder = registry.load(_FOLDER, model_type.replace("_", "-")).describe(reader)
    reader.refuse_unread()
    _check(decoder)
    return decoder


def _check(decoder: Decoder) -> None:
    """Refuse what the kernels of ONNX Runtime lack."""
    kind = decoder.model_type
    if decoder.activation not in ACTIVATIONS:
        raise UnsupportedError(f"activation `{decoder.activation}` in a `{kind}` decoder is not supported")
    rotaries = [rotary for rotary in decoder.rotary if rotary is not None]
    step = _ROTARY_HEAD_SIZE_STEP if rotaries else _HEAD_SIZE_STEP
    if decoder.experts and (decoder.activation != "silu" or not decoder.gated or decoder.mlp_bias):
        raise UnsupportedError(f"experts in a `{kind}` decoder that are no gated SiLU MLPs are not supported")
    if decoder.head_size % step:
        raise UnsupportedError(
            f"head size {decoder.head_size} is not supported: ONNX Runtime's attention needs a multiple of {step}"
        )
    for rotary in rotaries:
        moved = rotary.head_order(decoder.head_size) is not None
        if moved and (decoder.qk_norm or decoder.rotary_interleaved or len(set(decoder.rotary)) > 1):
            raise UnsupportedError(f"rotary size {2 * rotary.pairs} in a `{kind}` decoder is not supported")


def _base_config() -> type:
    from transformers import PretrainedConfig

    base: type = PretrainedConfig
    return base
