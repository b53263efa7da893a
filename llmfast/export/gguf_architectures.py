"""What GGUF calls an architecture, and how its metadata becomes a `transformers` config.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llm. What llama.cpp's converter does to weights, and
what llama.cpp itself takes for granted, is here too, one entry in `ARCHITECTURES` for each architecture:
https://github.com/ggml-org/llama.cpp/tree/master/conversion and .../src/models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmfast.errors import InputError, UnsupportedError
from llmfast.export.gguf_file import GgufFile

# Keys, without `{architecture}.` in front, that change no logit.
_INERT = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_YARN = {
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_attn_factor": "attention_factor",
}


@dataclass(frozen=True)
class Architecture:
    """Where an architecture differs from Llama.

    Attributes:
        model_type: the config's.
        epsilon: the config's field for the norms' epsilon; RMS norms have another key in GGUF than LayerNorms.
        fields: further keys -> fields of the config. A key that no entry names is refused.
        constants: fields of the config that llama.cpp has in its code.
        adapt: reads what needs more than a name.
        optional: field of the config that says whether there are some weights -> one of them.
        interleaved: rows of queries and keys are stored in pairs, for llama.cpp's interleaved rotation.
        norm_offset: what the stored weights of norms are greater by.
        transposed: ends of modules' names whose weight the config's model has as `[in_features, out_features]`.
        by_head: fused queries, keys and values alternate by head in the config's model.
    """

    model_type: str
    epsilon: str = "rms_norm_eps"
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    adapt: Callable[["Metadata", dict[str, Any]], None] | None = None
    optional: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()
    by_head: bool = False


class Metadata:
    """The keys of one architecture in a file; it knows which of them were read.

    Raises (all methods):
        InputError: a key that is missing or no number of the kind that it must be.
    """

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self._prefix = f"{architecture}."
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return any value."""
        self._read.add(key)
        return self.file.metadata.get(self._prefix + key, default)

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray):
            if len(value) == 0 or (value != value[0]).any():
                raise UnsupportedError(f"`{self._prefix}{key}` of `{self.file.path}` differs from layer to layer")
            value = value[0].item()
        if type(value) is not int or not 0 < value < 1 << 31:
            raise InputError(f"`{self._prefix}{key}` of `{self.file.path}` is {value!r:.80}, not a size")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number, as the shortest decimal of its float32."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not np.isfinite(value):
            raise InputError(f"`{self._prefix}{key}` of `{self.file.path}` is {value!r:.80}, not a number")
        return float(str(np.float32(value)))

    def refuse_unread(self) -> None:
        """Refuse what nobody read, because it may change what the model computes.

        Raises:
            UnsupportedError: names the key.
        """
        for name, value in self.file.metadata.items():
            key = name.removeprefix(self._prefix)
            if key == name or key in self._read | _INERT or (key.startswith("expert_") and value == 0):
                continue
            raise UnsupportedError(f"`{name}` = {value!r:.80} in `{self.file.path}` is not supported")


def read_config(file: GgufFile, name: str, architecture: Architecture) -> dict[str, Any]:
    """Return the fields of a `transformers` config.

    Raises:
        InputError: a key that is missing, or has a value that can't be.
        UnsupportedError: a key that is not known here.
    """
    metadata = Metadata(file, name)
    values: dict[str, Any] = {stored: metadata.size(key) for key, stored in _SIZES.items()}
    if values["num_hidden_layers"] > len(file.tensors):
        raise InputError(f"`{file.path}` declares {values['num_hidden_layers']} layers, more than it has tensors")
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = metadata.size("attention.head_count_kv", heads)
    head_size = metadata.size("attention.key_length", max(values["hidden_size"] // heads, 1))
    if metadata.size("attention.value_length", head_size) != head_size:
        raise UnsupportedError(f"keys and values of different lengths in `{file.path}` are not supported")
    values["head_dim"] = head_size
    kind = "rms_" if architecture.epsilon == "rms_norm_eps" else ""
    values[architecture.epsilon] = metadata.number(f"attention.layer_norm_{kind}epsilon")
    values["rope_parameters"] = _read_rope(metadata, head_size)
    if metadata.get("attention.causal", True) is not True:
        raise UnsupportedError(f"`{file.path}` is an encoder; text generation needs a decoder")
    for key, stored in architecture.fields.items():
        if metadata.get(key) is not None:
            values[stored] = metadata.number(key)
    values |= {stored: tensor in file.tensors for stored, tensor in architecture.optional.items()}
    values |= architecture.constants
    if architecture.adapt:
        architecture.adapt(metadata, values)
    metadata.refuse_unread()
    return values


def _read_rope(metadata: Metadata, head_size: int) -> dict[str, Any]:
    """Return a config's `rope_parameters`, as transformers/modeling_rope_utils.py documents them."""
    file = metadata.file
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base", 10000.0)}
    rotated = metadata.size("rope.dimension_count", head_size)
    if rotated != head_size:
        rope["partial_rotary_factor"] = rotated / head_size
    context = metadata.size("context_length")
    original = metadata.size("rope.scaling.original_context_length", context)
    attention_factor = metadata.number("rope.scaling.attn_factor", 1.0)
    # Older files have a key of their own for linear scaling.
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0)) or 1.0
    scaling = metadata.get("rope.scaling.type", "none" if factor == 1.0 else "linear")
    if scaling == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    elif scaling == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        if metadata.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
            raise UnsupportedError(f"YaRN with an extrapolation factor in `{file.path}` is not supported")
        for key, stored in _YARN.items():
            if metadata.get(key) is not None:
                rope[stored] = metadata.number(key)
    elif scaling not in ("none", "linear", "longrope"):
        raise UnsupportedError(f"rotary scaling `{scaling!s:.80}` in `{file.path}` is not supported")
    short, long = (_rotary_factors(file, f"rope_factors_{length}.weight") for length in ("short", "long"))
    # Llama 3.1's frequencies are a table in GGUF. Longrope with one table for all lengths is the same.
    if (table := _rotary_factors(file, "rope_freqs.weight")) is not None:
        short, long, original = table, table, context
    if short is not None and long is not None:
        if not len(short) == len(long) == rotated // 2 or rope["rope_type"] != "default":
            raise InputError(f"the rotary tables of `{file.path}` do not fit the model")
        rope |= {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": original,
            "attention_factor": attention_factor,
        }
    elif attention_factor != 1.0:
        raise UnsupportedError(f"`rope.scaling.attn_factor` with {scaling} scaling in `{file.path}` is not supported")
    elif scaling == "longrope":
        raise InputError(f"`{file.path}` lacks the tables of its rotary scaling", "the file is incomplete")
    return rope


def _rotary_factors(file: GgufFile, name: str) -> list[float] | None:
    """Return the divisors of the rotary frequencies in a tensor, None if it is absent."""
    if name not in file.tensors:
        return None
    factors = file.read(name).reshape(-1)
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise InputError(f"tensor `{name}` of `{file.path}` has values that are not positive")
    return [float(str(factor)) for factor in factors]


def _sliding_layers(metadata: Metadata, layers: int, period: int) -> list[str]:
    """Return `layer_types`: every `period`-th layer sees everything, unless the file has a pattern of its own."""
    pattern = metadata.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, np.ndarray):
        sliding = pattern.astype(bool).tolist()
        if len(sliding) != layers:
            raise InputError(f"the sliding window pattern of `{metadata.file.path}` does not fit its layers")
    else:
        period = metadata.size("attention.sliding_window_pattern", period)
        sliding = [(layer + 1) % period != 0 for layer in range(layers)]
    return ["sliding_attention" if one else "full_attention" for one in sliding]


def _gemma(values: dict[str, Any], layers_of_27b: int) -> None:
    width = values["hidden_size"] // values["num_attention_heads"]
    # Only the largest model of a family divides by another number, and no key says so.
    largest = values["num_hidden_layers"] == layers_of_27b
    values["query_pre_attn_scalar"] = width if largest else values["head_dim"]


def _gemma2(metadata: Metadata, values: dict[str, Any]) -> None:
    _gemma(values, 46)
    values["sliding_window"] = metadata.size("attention.sliding_window", 4096)
    values["layer_types"] = _sliding_layers(metadata, values["num_hidden_layers"], 2)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        values[key] = metadata.number(key, 50.0 if key.startswith("attn") else 30.0)


def _gemma3(metadata: Metadata, values: dict[str, Any]) -> None:
    _gemma(values, 62)
    layers = values["num_hidden_layers"]
    values["layer_types"] = ["full_attention"] * layers
    local = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", 10000.0)}
    values["rope_parameters"] = {"full_attention": values["rope_parameters"], "sliding_attention": local}
    if metadata.get("attention.sliding_window"):
        values["sliding_window"] = metadata.size("attention.sliding_window")
        values["layer_types"] = _sliding_layers(metadata, layers, 6)


def _phi3(metadata: Metadata, values: dict[str, Any]) -> None:
    window = metadata.get("attention.sliding_window", 0)
    values["sliding_window"] = metadata.size("attention.sliding_window") if window else None
    context = values["max_position_embeddings"]
    values["original_max_position_embeddings"] = metadata.size("rope.scaling.original_context_length", context)


def _granite(metadata: Metadata, values: dict[str, Any]) -> None:
    # Here it says whether there are rotary positions at all.
    if metadata.get("rope.scaling.finetuned", True) is not True:
        raise UnsupportedError(f"a granite without rotary positions in `{metadata.file.path}` is not supported")


def _gptneox(metadata: Metadata, values: dict[str, Any]) -> None:
    values["use_parallel_residual"] = bool(metadata.get("use_parallel_residual", True))
    _rotated_whole(metadata, values)


def _rotated_whole(metadata: Metadata, values: dict[str, Any]) -> None:
    # These configs' own default is a part of the head.
    values["rope_parameters"].setdefault("partial_rotary_factor", 1.0)


def _stablelm(metadata: Metadata, values: dict[str, Any]) -> None:
    _rotated_whole(metadata, values)
    metadata.get("use_parallel_residual")  # the converter writes true for all of them; the second norm tells
    values["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in metadata.file.tensors


def _gpt2(metadata: Metadata, values: dict[str, Any]) -> None:
    del values["rope_parameters"], values["num_key_value_heads"], values["head_dim"]
    values["n_inner"] = values.pop("intermediate_size")


_GELU = {"hidden_act": "gelu_pytorch_tanh"}
_ATTENTION_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
_BIASES = _ATTENTION_BIAS | {"mlp_bias": "blk.0.ffn_up.bias"}
ARCHITECTURES = {
    "llama": Architecture("llama", optional=_BIASES, interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", optional=_ATTENTION_BIAS),
    "smollm3": Architecture("smollm3", optional=_BIASES, interleaved=True),
    "olmo2": Architecture("olmo2", optional=_ATTENTION_BIAS),
    "granite": Architecture(
        "granite",
        fields={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        optional=_BIASES,
        interleaved=True,
        adapt=_granite,
    ),
    "phi3": Architecture("phi3", adapt=_phi3),
    "gemma2": Architecture("gemma2", constants=_GELU, adapt=_gemma2, norm_offset=1.0),
    "gemma3": Architecture(
        "gemma3_text",
        fields={"final_logit_softcapping": "final_logit_softcapping"},
        constants=_GELU,
        adapt=_gemma3,
        norm_offset=1.0,
    ),
    "gpt2": Architecture(
        "gpt2",
        epsilon="layer_norm_epsilon",
        constants={"activation_function": "gelu_new"},
        adapt=_gpt2,
        transposed=("c_attn", "c_proj", "c_fc"),
    ),
    "gptneox": Architecture(
        "gpt_neox",
        epsilon="layer_norm_eps",
        constants={"hidden_act": "gelu"},
        adapt=_gptneox,
        optional={"attention_bias": "blk.0.attn_qkv.bias"},
        by_head=True,
    ),
    "phi2": Architecture("phi", epsilon="layer_norm_eps", constants={"hidden_act": "gelu_new"}, adapt=_rotated_whole),
    "stablelm": Architecture(
        "stablelm", epsilon="layer_norm_eps", optional={"use_qkv_bias": "blk.0.attn_q.bias"}, adapt=_stablelm
    ),
    "command-r": Architecture(
        "cohere",
        epsilon="layer_norm_eps",
        fields={"logit_scale": "logit_scale"},
        optional=_ATTENTION_BIAS | {"use_qk_norm": "blk.0.attn_q_norm.weight"},
    ),
    "starcoder2": Architecture(
        "starcoder2", epsilon="norm_epsilon", constants=_GELU, optional={"use_bias": "blk.0.attn_q.bias"}
    ),
}
