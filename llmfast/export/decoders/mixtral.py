"""Mixtral: Mistral with experts in place of the MLP."""

from typing import Any

from llmfast.export.architectures import Decoder, Experts, one_window, read_decoder

_STORED = {
    "mlp.router": "block_sparse_moe.gate",
    "mlp.experts": "block_sparse_moe.experts",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}


def describe(config: Any) -> Decoder:
    """Describe a Mixtral."""
    return read_decoder(
        config,
        experts=Experts(config.num_local_experts, config.num_experts_per_tok, normalized=True),
        sliding_windows=one_window(config),
        stored=_STORED,
    )
