"""StarCoder2: LayerNorm, a plain MLP, biases, one window."""

from typing import Any

from llmfast.export.architectures import Decoder, one_window, read_decoder

_STORED = {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}


def describe(config: Any) -> Decoder:
    """Describe a StarCoder2."""
    bias = config.use_bias
    return read_decoder(
        config,
        norm="layer",
        norm_bias=True,
        norm_epsilon=config.norm_epsilon,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        gated=False,
        sliding_windows=one_window(config),
        stored=_STORED,
    )
