"""What T5 and its descendants share: names of weights, relative positions, and where their configs keep sizes."""

import re
from typing import Any

from llmfast.export.encoder_decoder import EncoderDecoder, RelativePositions, Stack

# BART's spelling of a layer's parts -> T5's; the place of a sublayer depends on the stack.
_PARTS = {
    "self_attn_layer_norm": "layer.0.layer_norm",
    "encoder_attn_layer_norm": "layer.1.layer_norm",
    "self_attn": "layer.0.SelfAttention",
    "encoder_attn": "layer.1.EncDecAttention",
}
_PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}
_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.*)\.(\w+)")


def describe_t5(config: Any, **differences: Any) -> EncoderDecoder:
    """Describe a model whose config and weights are spelled as T5's."""

    def spell(name: str) -> str:
        return _spell(name, config.is_gated_act)

    return EncoderDecoder(
        model_type=config.model_type,
        encoder=Stack(config.num_layers, config.num_heads, config.d_kv),
        decoder=Stack(config.num_decoder_layers, config.num_heads, config.d_kv),
        hidden_size=config.d_model,
        vocab_size=config.vocab_size,
        context_length=None,
        norm_epsilon=config.layer_norm_epsilon,
        spell=spell,
        relative_positions=_relative_positions(config),
        pre_norm=True,
        rms_norm=True,
        bias=False,
        scaled_attention=False,
        activation=config.dense_act_fn,
        gated=config.is_gated_act,
        **differences,
    )


def _relative_positions(config: Any) -> RelativePositions:
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    limit = config.relative_attention_max_distance
    distances = torch.arange(-limit, limit + 1)
    buckets = {
        stack: T5Attention._relative_position_bucket(
            distances, stack == "encoder", config.relative_attention_num_buckets, limit
        ).numpy()
        for stack in ("encoder", "decoder")
    }
    name = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return RelativePositions(buckets, {stack: name.format(stack) for stack in buckets})


def _spell(name: str, gated: bool) -> str:
    match = _LAYER.fullmatch(name)
    if match is None:
        return name.replace(".layer_norm.", ".final_layer_norm.")
    stack, layer, part, kind = match.groups()
    mlp = f"layer.{1 if stack == 'encoder' else 2}"
    parts = _PARTS | {"final_layer_norm": f"{mlp}.layer_norm"}
    dense = {"gate_proj": "wi_0", "fc1": "wi_1" if gated else "wi", "fc2": "wo"}
    module, _, projection = part.rpartition(".")
    if part in dense:
        spelled = f"{mlp}.DenseReluDense.{dense[part]}"
    elif part in parts:
        spelled = parts[part]
    else:
        spelled = f"{parts[module]}.{_PROJECTIONS[projection]}"
    return f"{stack}.block.{layer}.{spelled}.{kind}"
