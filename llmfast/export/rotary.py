"""Rotary position embeddings of a decoder: frequencies from its config, tables for the graph."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmfast.errors import UnsupportedError

# The attention kernel rotates pairs in groups of this many.
# https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/contrib_ops/cpu/bert/group_query_attention_helper.h
_PAIRS_STEP = 8
# Frequencies that grow with the prompt: no table can hold them.
_LENGTH_DEPENDENT = ("dynamic",)


@dataclass(frozen=True, eq=False)
class Rotary:
    """Angles by which pairs of channels are rotated; channel i is paired with i + pairs.

    Attributes:
        inverse_frequencies: angle per position, float32 [pairs]; 2 * pairs <= head size.
        scale: factor on cosine and sine (YaRN's attention factor).
        name: prefix of the tables in the graph.
        factors: which of longrope's two sets of factors was taken; empty where there are no two.
    """

    inverse_frequencies: np.ndarray
    scale: float = 1.0
    name: str = "rotary"
    factors: str = ""

    @property
    def pairs(self) -> int:
        """Number of rotated pairs of channels in a head."""
        return len(self.inverse_frequencies)

    @property
    def padded_pairs(self) -> int:
        """Pairs in the tables, as the kernel wants them; those added are rotated by nothing."""
        return -(-self.pairs // _PAIRS_STEP) * _PAIRS_STEP

    def cosine(self, length: int) -> np.ndarray:
        """Return the cosine table, float32 [length, padded_pairs]."""
        return self._table(np.cos, length, 1.0)

    def sine(self, length: int) -> np.ndarray:
        """Return the sine table, float32 [length, padded_pairs]."""
        return self._table(np.sin, length, 0.0)

    def head_order(self, head_size: int) -> np.ndarray | None:
        """Return the order of a head's channels that puts every pair where the padded tables have it.

        Queries and keys in the same order have the same products. None: they are in order already.
        """
        missing = self.padded_pairs - self.pairs
        if not missing:
            return None
        first, second, rest = np.split(np.arange(head_size), [self.pairs, 2 * self.pairs])
        return np.concatenate([first, rest[:missing], second, rest[missing:]])

    def _table(self, function: np.ufunc, length: int, added: float) -> np.ndarray:
        angles = np.outer(np.arange(length, dtype=np.float32), self.inverse_frequencies)
        table: np.ndarray = function(angles) * np.float32(self.scale)
        return np.pad(table, ((0, 0), (0, self.padded_pairs - self.pairs)), constant_values=added)


def use_long_factors(config: Any) -> None:
    """Make a longrope config rotate by its long factors whatever the prompt's length."""
    config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]


def read_rotary(config: Any, layer_type: str | None = None) -> Rotary:
    """Read rotary frequencies from a config.

    Args:
        config: with `rope_parameters` and the `context_length` that tables are made for.
        layer_type: the key in `rope_parameters` where layers differ; it becomes part of the tables' name.

    Raises:
        UnsupportedError: a scaling that depends on the prompt's length, or one that is not known.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    name = "rotary" if layer_type is None else f"rotary.{layer_type}"
    kind = rope.get("rope_type", "default")
    if kind == "default":
        size = int(config.head_size * rope.get("partial_rotary_factor", 1.0))
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        return Rotary((1.0 / np.float32(rope["rope_theta"]) ** exponents).astype(np.float32), 1.0, name)
    if kind in _LENGTH_DEPENDENT or kind not in ROPE_INIT_FUNCTIONS:
        raise UnsupportedError(
            f"rotary scaling `{kind}` is not supported", "supported: default, linear, llama3, yarn, longrope"
        )
    factors, arguments = "", {} if layer_type is None else {"layer_type": layer_type}
    if kind == "longrope":
        arguments["seq_len"] = config.context_length
        if rope["short_factor"] != rope["long_factor"]:  # GGUF has one table for Llama 3.1, whatever the length
            factors = "long" if config.context_length > config.original_context_length else "short"
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config.original, "cpu", **arguments)
    return Rotary(frequencies.float().numpy(), float(scale), name, factors)
