"""What the direct route must know of a decoder, read from its Hugging Face config.

Architectures differ in data: one entry in `_VARIANTS` says where a `model_type` departs from Llama.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmfast.errors import UnsupportedError

# https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/contrib_ops/cpu/bert/group_query_attention_helper.h
_HEAD_SIZE_STEP = 16
# These frequencies depend on the length of the prompt, so no table can hold them.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder and the points where architectures differ.

    Attributes:
        inverse_frequencies: rotary angles per position, float32 [head_size / 2].
        rope_scale: factor on cosine and sine (YaRN's attention factor).
        sliding_windows: per layer, how many positions attention looks back; -1 is all of them.
        tied: the head is the embedding.
        qkv_bias, output_bias, mlp_bias: which linear layers have a bias.
        qk_norm: RMS norm over each head of queries and keys, before the rotation.
    """

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    norm_epsilon: float
    inverse_frequencies: np.ndarray
    rope_scale: float
    sliding_windows: tuple[int, ...]
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key heads together."""
        return self.num_key_value_heads * self.head_size


def _llama(decoder: Decoder, config: Any) -> Decoder:
    bias = config.attention_bias
    return replace(decoder, qkv_bias=bias, output_bias=bias, mlp_bias=config.mlp_bias)


def _mistral(decoder: Decoder, config: Any) -> Decoder:
    return replace(decoder, sliding_windows=(config.sliding_window or -1,) * decoder.num_hidden_layers)


def _qwen2(decoder: Decoder, config: Any) -> Decoder:
    return replace(decoder, qkv_bias=True, sliding_windows=_windows_by_layer(config))


def _qwen3(decoder: Decoder, config: Any) -> Decoder:
    bias = config.attention_bias
    windows = _windows_by_layer(config)
    return replace(decoder, qk_norm=True, qkv_bias=bias, output_bias=bias, sliding_windows=windows)


_VARIANTS: dict[str, Callable[[Decoder, Any], Decoder]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def supported_model_types() -> list[str]:
    """List the `model_type`s of the direct route."""
    return sorted(_VARIANTS)


def describe(config: Any) -> Decoder:
    """Read a decoder's sizes and differences from a `transformers` config.

    Raises:
        UnsupportedError: an architecture, activation or rotary scaling that the direct route lacks.
    """
    variant = _VARIANTS.get(config.model_type)
    if variant is None:
        raise UnsupportedError(
            f"architecture `{config.model_type}` is not supported for text generation",
            f"supported: {', '.join(supported_model_types())}",
        )
    if config.hidden_act != "silu":
        raise UnsupportedError(f"activation `{config.hidden_act}` in a `{config.model_type}` decoder is not supported")
    frequencies, scale = _rotary(config)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if len(frequencies) * 2 != head_size:
        raise UnsupportedError(f"partial rotary embedding in a `{config.model_type}` decoder is not supported")
    if head_size % _HEAD_SIZE_STEP:
        raise UnsupportedError(
            f"head size {head_size} is not supported: ONNX Runtime's attention needs a multiple of {_HEAD_SIZE_STEP}"
        )
    decoder = Decoder(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_size=head_size,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        inverse_frequencies=frequencies,
        rope_scale=scale,
        sliding_windows=(-1,) * config.num_hidden_layers,
        tied=config.tie_word_embeddings,
    )
    return variant(decoder, config)


def _windows_by_layer(config: Any) -> tuple[int, ...]:
    return tuple(config.sliding_window if kind == "sliding_attention" else -1 for kind in config.layer_types)


def _rotary(config: Any) -> tuple[np.ndarray, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
        return (1.0 / np.float32(rope["rope_theta"]) ** exponents).astype(np.float32), 1.0
    if kind in _LENGTH_DEPENDENT_ROPE or kind not in ROPE_INIT_FUNCTIONS:
        raise UnsupportedError(f"rotary scaling `{kind}` is not supported", "supported: default, linear, llama3, yarn")
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return frequencies.float().numpy(), float(scale)
