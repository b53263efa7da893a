"""Where the models that can be pruned keep their blocks, channels and heads; names are those of `transformers`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmfast.errors import UnsupportedError


@dataclass(frozen=True)
class Family:
    """Names of the parts of a model; those of a block without the block's prefix.

    Attributes:
        blocks: the list of blocks, below the base model.
        queries, keys, values, attention_output: linear layers of attention.
        mlp_inputs: linear layers that make the MLP's channels, in rows.
        mlp_output: the linear layer that reads them, in columns.
        intermediate_size: the config's name for the number of channels.
        has_head_size: the config says how wide a head is; otherwise it is hidden size / heads, and no head can go
            without hidden channels.
        norms: RMS norms of a block -> the linear layers that read them; empty when their scale can't be folded.
        final_norm: the RMS norm that the head reads.
        takes_width: the hidden size can be cut.
    """

    blocks: str
    queries: str
    keys: str
    values: str
    attention_output: str
    mlp_inputs: tuple[str, ...]
    mlp_output: str
    intermediate_size: str = "intermediate_size"
    has_head_size: bool = False
    norms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    final_norm: str = ""
    takes_width: bool = True


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA = Family(
    "layers",
    *_QKV,
    "self_attn.o_proj",
    _GATE_UP,
    "mlp.down_proj",
    has_head_size=True,
    norms={"input_layernorm": _QKV, "post_attention_layernorm": _GATE_UP},
    final_norm="norm",
)
# Norms after attention and MLP too, whose scales stay on the residual stream.
_GEMMA = Family(
    "layers",
    *_QKV,
    "self_attn.o_proj",
    _GATE_UP,
    "mlp.down_proj",
    has_head_size=True,
    takes_width=False,
)
_BERT = Family(
    "encoder.layer",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    ("intermediate.dense",),
    "output.dense",
)
_DISTILBERT = Family(
    "transformer.layer",
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    ("ffn.lin1",),
    "ffn.lin2",
    intermediate_size="hidden_dim",
)
_FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("bert", "camembert", "ernie", "roberta", "xlm-roberta"), _BERT),
    "distilbert": _DISTILBERT,
}
# Lists of a config with one entry per block.
PER_BLOCK = ("layer_types", "no_rope_layers")


def family_of(config: Any, source: str) -> Family:
    """Return the family of a model.

    Raises:
        UnsupportedError: of none.
    """
    if config.model_type not in _FAMILIES:
        raise UnsupportedError(
            f"`{source}`: a `{config.model_type}` can't be pruned",
            f"prune knows {', '.join(_FAMILIES)}; magnitude, wanda and sparsegpt take any exported bundle",
        )
    return _FAMILIES[config.model_type]


def num_kv_heads(config: Any) -> int:
    """Return how many key and value heads each block has."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_size(config: Any) -> int:
    """Return the width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
