"""Qwen3 MoE: Qwen3 with experts in place of the MLP."""

from typing import Any

from llmfast.errors import UnsupportedError
from llmfast.export.architectures import Decoder, Experts, one_window, read_decoder


def describe(config: Any) -> Decoder:
    """Describe a Qwen3 MoE whose layers all have experts."""
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise UnsupportedError("a `qwen3_moe` decoder with layers that have no experts is not supported")
    config.skip("intermediate_size")  # of layers that have no experts
    bias = config.attention_bias
    return read_decoder(
        config,
        experts=Experts(config.num_experts, config.num_experts_per_tok, normalized=config.norm_topk_prob),
        intermediate_size=config.moe_intermediate_size,
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
        sliding_windows=one_window(config),
        stored={"mlp.router": "mlp.gate"},
    )
