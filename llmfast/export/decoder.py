"""The direct route: a decoder's ONNX graph written from its config and weights, without tracing.

The graph follows the decoder contract: GroupQueryAttention with the rotation inside, packed
query-key-value and gate-up projections, residual sums fused into the norms, logits for the last
`num_logits` positions only. Weights are read, transposed and written one at a time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from llmfast.bundle import MODEL
from llmfast.errors import InputError
from llmfast.export.architectures import Decoder
from llmfast.export.checkpoint import Checkpoint
from llmfast.graph.builder import CONTRIB, GraphBuilder
from llmfast.graph.weights import WeightFile


def write_decoder(
    checkpoint: Checkpoint, decoder: Decoder, folder: Path, advance: Callable[[], None]
) -> dict[str, Any]:
    """Write `model.onnx` and its data into `folder`.

    Args:
        checkpoint: where the weights are read.
        decoder: sizes and differences of the architecture.
        folder: an empty staging directory.
        advance: called once per layer.

    Returns:
        The manifest's entry for the graph: file, inputs, outputs.
    """
    weights = WeightFile(folder)
    writer = _DecoderWriter(checkpoint, decoder, GraphBuilder(weights))
    model = writer.write(advance)
    weights.save(model)
    return {
        "file": MODEL,
        "inputs": [value.name for value in model.graph.input],
        "outputs": [value.name for value in model.graph.output],
    }


class _DecoderWriter:
    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, graph: GraphBuilder) -> None:
        self.checkpoint = checkpoint
        self.decoder = decoder
        self.graph = graph

    def write(self, advance: Callable[[], None]) -> onnx.ModelProto:
        graph, decoder = self.graph, self.decoder
        embedding = graph.weight("model.embed_tokens.weight", self._read("model.embed_tokens.weight"))
        residual = graph.op("Gather", [embedding, "input_ids"], "model.embed_tokens")
        self._write_rotary_tables()
        graph.constant("num_logits.axis", [1])
        graph.constant("num_logits.end", [np.iinfo(np.int64).max])
        start = graph.op("Neg", ["num_logits"], "num_logits.start")

        hidden = self._norm("model.layers.0.input_layernorm", residual)
        for layer in range(decoder.num_hidden_layers):
            name = f"model.layers.{layer}"
            attention = self._attention(layer, f"{name}.self_attn", hidden)
            if layer == decoder.num_hidden_layers - 1:
                # Nothing after the last attention mixes positions: go on with those that get logits.
                attention = self._last(attention, start)
                residual = self._last(residual, start)
            attention = self._linear(f"{name}.self_attn.o_proj", attention, decoder.output_bias)
            hidden, residual = self._skip_norm(f"{name}.post_attention_layernorm", residual, attention)
            hidden = self._mlp(f"{name}.mlp", hidden)
            following = f"model.layers.{layer + 1}.input_layernorm"
            if layer == decoder.num_hidden_layers - 1:
                following = "model.norm"
            hidden, residual = self._skip_norm(following, residual, hidden)
            advance()
        self._head(hidden, embedding)
        return graph.build("decoder", self._inputs(), self._outputs())

    def _read(self, *names: str) -> np.ndarray:
        """Read weights and stack them along their output features."""
        arrays = [self.checkpoint.read(name) for name in names]
        for name, array in zip(names, arrays, strict=True):
            if not np.isfinite(array).all():
                raise InputError(
                    f"weight `{name}` of `{self.checkpoint.path}` has values that are NaN or infinite",
                    "the checkpoint is damaged or its training diverged",
                )
        return np.concatenate(arrays)

    def _linear(self, name: str, hidden: str, bias: bool, parts: tuple[str, ...] = ()) -> str:
        """Multiply by the weight `[K, N]` of one projection, or of several that share their input."""
        sources = [f"{name.rpartition('.')[0]}.{part}" for part in parts] or [name]
        array = self._read(*[f"{source}.weight" for source in sources])
        weight = self.graph.weight(f"{name}.weight", array.T)
        output = self.graph.op("MatMul", [hidden, weight], name)
        if not bias:
            return output
        vector = self.graph.weight(f"{name}.bias", self._read(*[f"{source}.bias" for source in sources]))
        return self.graph.op("Add", [output, vector], f"{name}.biased")

    def _norm(self, name: str, hidden: str) -> str:
        weight = self.graph.weight(f"{name}.weight", self._read(f"{name}.weight"))
        epsilon = self.decoder.norm_epsilon
        return self.graph.op("SimplifiedLayerNormalization", [hidden, weight], name, axis=-1, epsilon=epsilon)

    def _skip_norm(self, name: str, residual: str, hidden: str) -> tuple[str, str]:
        """Return the norm of the sum, and the sum."""
        weight = self.graph.weight(f"{name}.weight", self._read(f"{name}.weight"))
        outputs = [name, "", "", f"{name}.residual"]
        self.graph.ops(
            "SkipSimplifiedLayerNormalization",
            [residual, hidden, weight],
            outputs,
            CONTRIB,
            epsilon=self.decoder.norm_epsilon,
        )
        return outputs[0], outputs[3]

    def _attention(self, layer: int, name: str, hidden: str) -> str:
        decoder = self.decoder
        qkv = self._linear(f"{name}.qkv_proj", hidden, decoder.qkv_bias, ("q_proj", "k_proj", "v_proj"))
        queries_keys_values = [qkv, "", ""]  # packed
        if decoder.qk_norm:
            queries_keys_values = self._normalize_heads(name, qkv)
        outputs = [name, f"present.{layer}.key", f"present.{layer}.value"]
        self.graph.ops(
            "GroupQueryAttention",
            [
                *queries_keys_values,
                f"past_key_values.{layer}.key",
                f"past_key_values.{layer}.value",
                "seqlens_k",
                "total_sequence_length",
                "rotary.cos",
                "rotary.sin",
            ],
            outputs,
            CONTRIB,
            num_heads=decoder.num_attention_heads,
            kv_num_heads=decoder.num_key_value_heads,
            do_rotary=1,
            local_window_size=decoder.sliding_windows[layer],
        )
        return name

    def _normalize_heads(self, name: str, qkv: str) -> list[str]:
        graph, decoder = self.graph, self.decoder
        sizes = graph.constant("qkv.sizes", [decoder.query_size, decoder.kv_size, decoder.kv_size])
        query, key, value = graph.ops("Split", [qkv, sizes], [f"{name}.{part}" for part in "qkv"], axis=-1)
        by_head = graph.constant("heads.split", [0, 0, -1, decoder.head_size])
        merged = graph.constant("heads.merge", [0, 0, -1])
        normalized = []
        for part, vector in (("q_norm", query), ("k_norm", key)):
            heads = graph.op("Reshape", [vector, by_head], f"{name}.{part}.heads")
            heads = self._norm(f"{name}.{part}", heads)
            normalized.append(graph.op("Reshape", [heads, merged], f"{name}.{part}.merged"))
        return [*normalized, value]

    def _mlp(self, name: str, hidden: str) -> str:
        graph, bias = self.graph, self.decoder.mlp_bias
        gate = self._linear(f"{name}.gate_proj", hidden, bias)
        up = self._linear(f"{name}.up_proj", hidden, bias)
        gate = graph.op("QuickGelu", [gate], f"{name}.act", CONTRIB, alpha=1.0)  # x * sigmoid(x): SiLU
        return self._linear(f"{name}.down_proj", graph.op("Mul", [gate, up], f"{name}.product"), bias)

    def _last(self, hidden: str, start: str) -> str:
        inputs = [hidden, start, "num_logits.end", "num_logits.axis"]
        return self.graph.op("Slice", inputs, f"{hidden}.last")

    def _head(self, hidden: str, embedding: str) -> None:
        if self.decoder.tied:
            # The one stored copy [vocab, hidden] serves both ends of the model.
            self.graph.op("FusedMatMul", [hidden, embedding], "logits", CONTRIB, transB=1)
        else:
            weight = self.graph.weight("lm_head.weight", self._read("lm_head.weight").T)
            self.graph.op("MatMul", [hidden, weight], "logits")

    def _write_rotary_tables(self) -> None:
        positions = np.arange(self.decoder.context_length, dtype=np.float32)
        angles = np.outer(positions, self.decoder.inverse_frequencies)
        scale = np.float32(self.decoder.rope_scale)
        self.graph.weight("rotary.cos", np.cos(angles) * scale)
        self.graph.weight("rotary.sin", np.sin(angles) * scale)

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
            helper.make_tensor_value_info("num_logits", TensorProto.INT64, [1]),
            *self._cache("past_key_values", "past"),
        ]

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        shape = ["batch", "logits", self.decoder.vocab_size]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
        return [logits, *self._cache("present", "total")]

    def _cache(self, prefix: str, length: str) -> list[onnx.ValueInfoProto]:
        shape = ["batch", self.decoder.num_key_value_heads, length, self.decoder.head_size]
        return [
            helper.make_tensor_value_info(f"{prefix}.{layer}.{part}", TensorProto.FLOAT, shape)
            for layer in range(self.decoder.num_hidden_layers)
            for part in ("key", "value")
        ]
