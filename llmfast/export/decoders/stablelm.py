"""StableLM: Llama with LayerNorm and rotation of a part of each head; some have one norm for attention and MLP."""

from typing import Any

from llmfast.export.architectures import Decoder, Norms, read_decoder


def describe(config: Any) -> Decoder:
    """Describe a StableLM."""
    parallel = config.use_parallel_residual
    return read_decoder(
        config,
        norm="layer",
        norm_bias=True,
        norm_epsilon=config.layer_norm_eps,
        norms=Norms(before_mlp="input_layernorm") if parallel else Norms(),
        parallel=parallel,
        qkv_bias=config.use_qkv_bias,
    )
