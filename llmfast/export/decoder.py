"""The direct route: a decoder's ONNX graph written from its config and weights, without tracing.

The graph follows the decoder contract: GroupQueryAttention with the rotation inside, packed
query-key-value projections, logits for the last `num_logits` positions only. The nodes come first;
weights are then read, converted and written one at a time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from llmfast.bundle import MODEL
from llmfast.export.architectures import ACTIVATIONS, Decoder, Experts
from llmfast.export.checkpoint import Checkpoint
from llmfast.export.decoder_weights import DecoderWeights
from llmfast.export.rotary import Rotary
from llmfast.graph.builder import CONTRIB, GraphBuilder
from llmfast.graph.packed import HALF
from llmfast.graph.weights import WeightFile


class DecoderGraph:
    """The graph of a decoder, its weights found in the checkpoint but not yet read.

    Args:
        checkpoint: where the weights are read.
        decoder: sizes and differences of the architecture.

    Attributes:
        graph: its nodes.
        weights: its initializers.

    Raises:
        InputError: a weight is missing, or has another shape than the config makes it.
    """

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder) -> None:
        self.decoder = decoder
        self.weights = DecoderWeights(checkpoint, decoder)
        self.graph = GraphBuilder()
        self._build()
        self.weights.check()

    def write(self, folder: Path, advance: Callable[[], None]) -> dict[str, Any]:
        """Write `model.onnx` and its data into `folder`.

        Args:
            folder: an empty staging directory.
            advance: called once per weight.

        Returns:
            The manifest's entry for the graph: file, inputs, outputs.
        """
        file = WeightFile(folder)
        graph = GraphBuilder(file)
        for node in self.graph.nodes:
            graph.keep(node)
        self.weights.store(graph, advance)
        model = graph.build("decoder", self._inputs(), self._outputs())
        file.save(model)
        return {
            "file": MODEL,
            "inputs": [value.name for value in model.graph.input],
            "outputs": [value.name for value in model.graph.output],
        }

    def _build(self) -> None:
        decoder, weights, norms = self.decoder, self.weights, self.decoder.norms
        residual = self._embed()
        self._add_rotary_tables()
        weights.constant("num_logits.axis", [1])
        weights.constant("num_logits.end", [np.iinfo(np.int64).max])
        self.graph.op("Neg", ["num_logits"], "num_logits.start")

        branch = ""  # what is still to be added to the residual sum
        for layer in range(decoder.num_hidden_layers):
            name = f"model.layers.{layer}"
            hidden, residual = self._add_and_norm(name, norms.before_attention, residual, branch)
            attention = self._attention(layer, f"{name}.self_attn", hidden)
            if layer == decoder.num_hidden_layers - 1:
                # Nothing after the last attention mixes positions: go on with those that get logits.
                attention, residual = self._last(attention), self._last(residual)
                if decoder.parallel and norms.before_mlp == norms.before_attention:
                    hidden = self._last(hidden)
            attention = self._linear(
                f"{name}.self_attn.o_proj",
                attention,
                (decoder.hidden_size, decoder.query_size),
                decoder.output_bias,
                decoder.residual_scale,
            )
            if decoder.parallel:
                branch = self._parallel_mlp(name, hidden, residual, attention)
            else:
                residual, branch = self._mlp_after_attention(name, residual, attention)
        hidden, _ = self._add_and_norm("model", "norm" if decoder.final_norm else "", residual, branch)
        self._head(hidden)

    def _embed(self) -> str:
        graph, decoder = self.graph, self.decoder
        embedding = self.weights.table("model.embed_tokens", decoder.vocab_size, decoder.embedding_size)
        hidden = graph.op("Gather", [embedding, "input_ids"], "model.embed_tokens")
        if decoder.embedding_scale != 1.0:
            scale = self.weights.constant("embedding_scale", decoder.embedding_scale, np.float32)
            hidden = graph.op("Mul", [hidden, scale], "model.embed_tokens.scaled")
        if decoder.embedding_size != decoder.hidden_size:
            hidden = self._linear("model.project_in", hidden, (decoder.hidden_size, decoder.embedding_size))
        if decoder.position_offset is not None:
            hidden = graph.op("Add", [hidden, self._positions()], "model.embeddings")
        return hidden

    def _positions(self) -> str:
        """Embed positions: those of a row's new tokens end at its `seqlens_k`, and begin at 0 in a padded prompt."""
        graph, decoder, constant = self.graph, self.decoder, self.weights.constant
        length = graph.op("Shape", ["input_ids"], "positions.length", start=1, end=2)
        last = graph.op("Cast", ["seqlens_k"], "positions.last", to=TensorProto.INT64)
        total = graph.op("Add", [last, constant("positions.one", [1])], "positions.total")
        past = graph.op("Sub", [total, length], "positions.past")
        past = graph.op("Max", [past, constant("positions.zero", [0])], "positions.first")
        past = graph.op("Unsqueeze", [past, constant("positions.axis", [1])], "positions.column")
        count = graph.op("Squeeze", [length], "positions.count")
        bounds = constant("positions.start", 0), constant("positions.step", 1)
        steps = graph.op("Range", [bounds[0], count, bounds[1]], "positions.steps")
        positions = graph.op("Add", [past, steps], "positions")
        skipped = decoder.position_offset or 0
        name = "model.embed_positions"
        table = self.weights.table(name, decoder.context_length, decoder.hidden_size, skipped)
        return graph.op("Gather", [table, positions], name)

    def _mlp_after_attention(self, name: str, residual: str, attention: str) -> tuple[str, str]:
        """Return the residual sum after attention, and what the MLP adds to it."""
        norms = self.decoder.norms
        if self.decoder.norms_the_sum:
            residual, _ = self._add_and_norm(name, norms.after_attention, residual, attention)
            residual, _ = self._add_and_norm(name, norms.after_mlp, residual, self._mlp(f"{name}.mlp", residual))
            return residual, ""
        if norms.after_attention:
            attention = self._norm(f"{name}.{norms.after_attention}", attention)
        hidden, residual = self._add_and_norm(name, norms.before_mlp, residual, attention)
        mlp = self._mlp(f"{name}.mlp", hidden)
        return residual, self._norm(f"{name}.{norms.after_mlp}", mlp) if norms.after_mlp else mlp

    def _parallel_mlp(self, name: str, hidden: str, residual: str, attention: str) -> str:
        """Return what attention and MLP, which read the same sum, add to it."""
        norms = self.decoder.norms
        if norms.before_mlp != norms.before_attention:
            hidden = self._norm(f"{name}.{norms.before_mlp}", residual)
        return self.graph.op("Add", [attention, self._mlp(f"{name}.mlp", hidden)], f"{name}.branches")

    def _linear(self, name: str, hidden: str, shape: tuple[int, int], bias: bool = False, scale: float = 1.0) -> str:
        """Multiply by the weight of one projection, shape `(N, K)`."""
        packed = self.weights.packed(name, shape, scale)
        if packed is None:
            output = self.graph.op("MatMul", [hidden, self.weights.linear(name, shape, scale)], name)
        else:
            output = self._multiply_codes(name, hidden, *packed)
        if not bias:
            return output
        return self.graph.op("Add", [output, self.weights.bias(name, shape[0], scale)], f"{name}.biased")

    def _multiply_codes(self, name: str, hidden: str, stored: list[str], attributes: dict[str, int]) -> str:
        codes, scales, *zero_points = stored
        if scales.endswith(HALF):  # ONNX Runtime computes the Cast as it loads the model
            scales = self.graph.op("Cast", [scales], scales.removesuffix(HALF), to=TensorProto.FLOAT)
        return self.graph.op("MatMulNBits", [hidden, codes, scales, *zero_points], name, CONTRIB, **attributes)

    def _norm(self, name: str, hidden: str) -> str:
        operator, vectors = self._norm_operator(name)
        epsilon = self.decoder.norm_epsilon
        return self.graph.op(operator, [hidden, *vectors], name, axis=-1, epsilon=epsilon)

    def _add_and_norm(self, parent: str, norm: str, residual: str, branch: str) -> tuple[str, str]:
        """Add a branch, if there is one, to the residual sum; return the norm of the sum, and the sum.

        Without a norm the sum is returned twice.
        """
        name = f"{parent}.{norm}"
        if not branch:
            return (self._norm(name, residual) if norm else residual), residual
        # Two nodes on purpose: on the CPU SkipLayerNormalization takes ten times as long, the simplified one more too.
        total = self.graph.op("Add", [residual, branch], f"{name if norm else branch}.residual")
        return (self._norm(name, total) if norm else total), total

    def _norm_operator(self, name: str) -> tuple[str, list[str]]:
        """Return the operator of a norm, and its weight and bias."""
        decoder = self.decoder
        size, scale = decoder.hidden_size, 1.0
        part = name.rpartition(".")[2]
        if part in ("q_norm", "k_norm"):
            by_width = decoder.query_size if part == "q_norm" else decoder.kv_size
            size = decoder.head_size if decoder.qk_norm == "head" else by_width
        if name == "model.norm":
            scale = decoder.logits_scale / (decoder.logits_softcap or 1.0)
        vectors = [self.weights.vector(name, size, offset=decoder.norm_offset, scale=scale)]
        if decoder.norm == "rms":
            return "SimplifiedLayerNormalization", vectors
        if decoder.norm_bias:
            vectors.append(self.weights.vector(name, size, "bias", scale=scale))
        return "LayerNormalization", vectors

    def _attention(self, layer: int, name: str, hidden: str) -> str:
        decoder = self.decoder
        rotary = decoder.rotary[layer]
        size = decoder.query_size + 2 * decoder.kv_size
        qkv = self._linear(f"{name}.qkv_proj", hidden, (size, decoder.hidden_size), decoder.qkv_bias)
        queries_keys_values = [qkv, "", ""]  # packed
        if decoder.qk_norm:
            queries_keys_values = self._normalize_queries_and_keys(name, qkv)
        inputs = [
            *queries_keys_values,
            f"past_key_values.{layer}.key",
            f"past_key_values.{layer}.value",
            "seqlens_k",
            "total_sequence_length",
        ]
        attributes: dict[str, Any] = {}
        if rotary is not None:
            inputs += [f"{rotary.name}.cos", f"{rotary.name}.sin"]
        if decoder.rotary_interleaved:
            attributes["rotary_interleaved"] = 1
        if decoder.attention_scale is not None:
            attributes["scale"] = decoder.attention_scale
        if decoder.attention_softcap:
            attributes["softcap"] = decoder.attention_softcap
        self.graph.ops(
            "GroupQueryAttention",
            inputs,
            [name, f"present.{layer}.key", f"present.{layer}.value"],
            CONTRIB,
            num_heads=decoder.num_attention_heads,
            kv_num_heads=decoder.num_key_value_heads,
            do_rotary=int(rotary is not None),
            local_window_size=decoder.sliding_windows[layer],
            **attributes,
        )
        return name

    def _normalize_queries_and_keys(self, name: str, qkv: str) -> list[str]:
        graph, decoder, constant = self.graph, self.decoder, self.weights.constant
        sizes = constant("qkv.sizes", [decoder.query_size, decoder.kv_size, decoder.kv_size])
        query, key, value = graph.ops("Split", [qkv, sizes], [f"{name}.{part}" for part in "qkv"], axis=-1)
        if decoder.qk_norm == "width":
            return [self._norm(f"{name}.q_norm", query), self._norm(f"{name}.k_norm", key), value]
        by_head = constant("heads.split", [0, 0, -1, decoder.head_size])
        merged = constant("heads.merge", [0, 0, -1])
        normalized = []
        for part, vector in (("q_norm", query), ("k_norm", key)):
            heads = graph.op("Reshape", [vector, by_head], f"{name}.{part}.heads")
            heads = self._norm(f"{name}.{part}", heads)
            normalized.append(graph.op("Reshape", [heads, merged], f"{name}.{part}.merged"))
        return [*normalized, value]

    def _mlp(self, name: str, hidden: str) -> str:
        graph, decoder, bias = self.graph, self.decoder, self.decoder.mlp_bias
        if decoder.experts is not None:
            return self._experts(name, hidden, decoder.experts)
        wide = (decoder.intermediate_size, decoder.hidden_size)
        operator, domain, attributes = ACTIVATIONS[decoder.activation]
        gate = self._linear(f"{name}.gate_proj", hidden, wide, bias) if decoder.gated else ""
        up = self._linear(f"{name}.up_proj", hidden, wide, bias)
        inner = graph.op(operator, [gate or up], f"{name}.act", domain, **attributes)
        if gate:
            inner = graph.op("Mul", [inner, up], f"{name}.product")
        return self._linear(f"{name}.down_proj", inner, wide[::-1], bias, decoder.residual_scale)

    def _experts(self, name: str, hidden: str, experts: Experts) -> str:
        """Send every token through the MLPs that its router chooses; the operator has SiLU and product inside."""
        graph, decoder = self.graph, self.decoder
        scores = self._linear(f"{name}.router", hidden, (experts.num_experts, decoder.hidden_size))
        flat = self.weights.constant("router.flat", [-1, experts.num_experts])
        scores = graph.op("Reshape", [scores, flat], f"{name}.router.scores")
        wide, narrow = decoder.intermediate_size, decoder.hidden_size
        gate_up = self.weights.experts(f"{name}.experts", "gate_up_proj", experts.num_experts, (2 * wide, narrow))
        down = self.weights.experts(f"{name}.experts", "down_proj", experts.num_experts, (narrow, wide))
        return graph.op(
            "MoE",
            [hidden, scores, gate_up, "", down],
            name,
            CONTRIB,
            k=experts.per_token,
            normalize_routing_weights=int(experts.normalized),
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
        )

    def _last(self, hidden: str) -> str:
        inputs = [hidden, "num_logits.start", "num_logits.end", "num_logits.axis"]
        return self.graph.op("Slice", inputs, f"{hidden}.last")

    def _head(self, hidden: str) -> None:
        graph, decoder = self.graph, self.decoder
        shape = (decoder.vocab_size, decoder.embedding_size)
        if decoder.embedding_size != decoder.hidden_size:
            hidden = self._linear("model.project_out", hidden, (decoder.embedding_size, decoder.hidden_size))
        logits = "lm_head" if decoder.head_bias or decoder.logits_softcap else "logits"
        if decoder.tied:
            # The one stored copy [vocab, embedding] serves both ends of the model.
            embedding = self.weights.table("model.embed_tokens", *shape)
            graph.op("FusedMatMul", [hidden, embedding], logits, CONTRIB, transB=1)
        else:
            graph.op("MatMul", [hidden, self.weights.linear("lm_head", shape)], logits)
        if decoder.head_bias:
            graph.op("Add", [logits, self.weights.bias("lm_head", decoder.vocab_size)], "logits")
        if decoder.logits_softcap:
            # The division by the cap is part of the last norm.
            cap = self.weights.constant("logits.softcap", decoder.logits_softcap, np.float32)
            graph.op("Mul", [graph.op("Tanh", [logits], "logits.tanh"), cap], "logits")

    def _add_rotary_tables(self) -> None:
        for rotary in dict.fromkeys(self.decoder.rotary):
            if rotary is not None:
                self._add_rotary_table(rotary)

    def _add_rotary_table(self, rotary: Rotary) -> None:
        length = self.decoder.context_length
        self.weights.computed(f"{rotary.name}.cos", lambda: rotary.cosine(length))
        self.weights.computed(f"{rotary.name}.sin", lambda: rotary.sine(length))

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
