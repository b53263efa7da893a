"""Pruning an ONNX graph: zeros in the weights of its linear layers, which save no time and no memory."""

import importlib.metadata
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import llmfast
from llmfast.bundle import (
    COMPANIONS,
    MANIFEST,
    ModelBundle,
    Step,
    check_output,
    sha256,
    stage_output,
    write_manifest,
)
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.graph.builder import GraphBuilder
from llmfast.graph.feeds import graph_inputs, sequence_feeds
from llmfast.graph.linear import Linear, find_embeddings, find_linears
from llmfast.graph.model import OnnxModel, count_parameters, count_zeros, reads
from llmfast.graph.weights import WeightFile
from llmfast.prune.graph.allocate import Losses, allocate
from llmfast.prune.graph.inputs import Inputs, Share
from llmfast.prune.methods import ratio_of, resolved
from llmfast.prune.options import PruneOptions
from llmfast.prune.result import Pruned
from llmfast.quantize.corpus import Corpus
from llmfast.quantize.measure import ProofText, worst
from llmfast.quantize.pair_proof import make_proof
from llmfast.quantize.plan import HEAD_ROLE, Choice, refuse_quantized
from llmfast.quantize.replay import Replay
from llmfast.report import note, progress
from llmfast.thirdparty import adopt, can_adopt
from llmfast.verdict import Judgement, enforce, judge

_BLOCK_BYTES = 1 << 20


def open_graphs(
    source: Path, output: Path, choice: Choice, options: PruneOptions
) -> tuple[ModelBundle, dict[str, tuple[OnnxModel, list[Linear]]]]:
    """Open a model, and find the layers of each of its graphs that zeros are put into.

    Raises:
        InputError, UnsupportedError: no model, one that is quantized, or nothing to prune.
    """
    bundle = ModelBundle.open(source)
    inputs = (source, source.parent) if (source.parent / MANIFEST).is_file() else (source,)
    check_output(output, inputs, options.overwrite)
    models = {role: OnnxModel.load(path) for role, path in bundle.graphs.items()}
    if choice.plugin.NEEDS_INPUTS and len(models) > 1:
        raise UnsupportedError(f"{choice.name} can't be calibrated on an encoder-decoder yet", "choose magnitude")
    if can_adopt(bundle):
        bundle, models["model"] = adopt(bundle, models["model"])
    for model in models.values():
        refuse_quantized(model)
    found = {role: (model, _layers(model, options)) for role, model in models.items()}
    if not any(layers for _, layers in found.values()):
        raise UnsupportedError(
            f"nothing to prune in `{source}`", "it has no linear layers, or --include/--exclude leave none"
        )
    return bundle, found


def prune_graph(source: Path, output: Path, choice: Choice, options: PruneOptions) -> Pruned:
    """Put zeros into a model's weights and compare it with what it was.

    Args:
        source: a bundle, a directory that holds model.onnx, or a lone .onnx file.
        output: the new bundle's directory.
        choice: the method.
        options: see `PruneOptions`.

    Raises:
        GateError: a gate was missed; nothing is left at `output`.
    """
    bundle, graphs = open_graphs(source, output, choice, options)
    models = {role: model for role, (model, _) in graphs.items()}
    samples = options.calibration.split(bundle)[0] if choice.plugin.NEEDS_INPUTS else []
    proof = None
    if options.measure:
        data = Corpus(options.data, options.calibration.field) if options.data else None
        proof = make_proof(bundle, models, ProofText(data, options.calibration, bool(samples), options.data_samples))
    with stage_output(output, options.overwrite) as staged:
        weights = WeightFile(staged)
        layers: dict[tuple[str, str], tuple[Linear, int]] = {}
        protos = {}
        for role, (model, linears) in graphs.items():
            writer = _Writer(model, linears, choice, options, samples)
            protos[role] = writer.write(weights, f"pruning {role}")
            layers |= {(one.weight, one.role): (one, zeros) for one, zeros in writer.zeros}
        weights.save_all(protos) if len(protos) > 1 else weights.save(next(iter(protos.values())))
        after = {role: OnnxModel.load(staged / f"{role}.onnx") for role in protos}
        figures = worst(proof.compare(after).values()) if proof else {}
        rows = [_row(bundle.name, models, bundle), _row(output.name, after, None) | figures]
        verdict = judge([{**rows[1], "bundle": output.name}], "", options.gates)
        enforce(verdict, "nothing was written; take less, choose sparsegpt, or loosen the gate")
        for name in COMPANIONS:
            if companion := bundle.companion(name):
                shutil.copyfile(companion, staged / name)
        text = proof.text if proof else None
        by_role = _by_role(list(layers.values()))
        gates = [Judgement(**entry) for entry in verdict]
        pruned = Pruned(output, rows[0], rows[1], gates, text, layers=by_role)
        manifest = bundle.manifest
        write_manifest(
            staged,
            replace(
                manifest,
                source=manifest.source or {"id": bundle.model.name, "revision": None, "sha256": sha256(bundle.model)},
                architecture={**manifest.architecture, "num_parameters": rows[1]["num_parameters"]},
                graphs={role: _describe(model) for role, model in after.items()},
                sparsity=rows[1]["sparsity"],
                lineage=(*manifest.lineage, _step(choice, options)),
                measured={**manifest.measured, "prune": pruned.document()},
            ),
        )
    return pruned


class _Writer:
    """Prunes one graph, layer by layer in its order.

    Attributes:
        zeros: each layer, and how many of its weights are zero now.
    """

    def __init__(
        self,
        model: OnnxModel,
        linears: Sequence[Linear],
        choice: Choice,
        options: PruneOptions,
        samples: Sequence[np.ndarray],
    ) -> None:
        self._model, self._choice = model, choice
        inputs = graph_inputs(model.proto.graph)
        self._samples = [sequence_feeds(inputs, ids[None]) for ids in samples]
        self._linears = list({linear.weight: linear for linear in reversed(linears)}.values())[::-1]
        self._shares = self._find_shares(options)
        self.zeros: list[tuple[Linear, int]] = []

    def write(self, weights: WeightFile, description: str) -> Any:
        """Write the weights, and return the graph that goes with them; later layers see what earlier ones became."""
        graph = GraphBuilder(weights, self._model.opset)
        replaced: dict[str, Any] = {}
        replay = Replay(self._model, self._samples, replaced)
        last: tuple[str, Inputs | None] = ("", None)
        plugin = self._choice.plugin
        with progress(description, len(self._linears)) as advance:
            for linear in self._linears:
                if plugin.NEEDS_INPUTS and linear.input != last[0]:
                    last = linear.input, Inputs.of(replay.until(linear.input), plugin.NEEDS_GRAM)
                weight = plugin.prune_weight(
                    self._read(linear), self._shares[linear.weight], self._choice.options, last[1], linear.name
                )
                stored = linear.as_stored(weight)
                graph.weight(linear.weight, stored)
                if plugin.NEEDS_INPUTS:
                    replaced[linear.weight] = _holding(stored)
                self.zeros.append((linear, int(weight.size - np.count_nonzero(weight))))
                advance()
        for node in self._model.proto.graph.node:
            for name in reads(node):
                if name in self._model.initializers:
                    graph.weight(name, self._model.read(self._model.initializers[name]))
            graph.keep(node)
        return graph.rewrite(self._model)

    def _find_shares(self, options: PruneOptions) -> dict[str, Share]:
        ratio = ratio_of(self._choice, options.ratios)
        if options.allocation == "uniform":
            return dict.fromkeys((one.weight for one in self._linears), Share(ratio, options.pattern))
        replay = Replay(self._model, self._samples, {})
        losses = {}
        for linear in self._linears:
            power = np.ones(linear.shape[1], np.float32)
            if self._choice.plugin.NEEDS_INPUTS:
                power = Inputs.of(replay.until(linear.input), gram=False).power
            losses[linear.weight] = Losses.of(self._read(linear), power)
        shares = allocate(losses, ratio)
        note(f"shares by sensitivity: from {min(shares.values()):.1%} to {max(shares.values()):.1%} of a layer")
        return {weight: Share(share) for weight, share in shares.items()}

    def _read(self, linear: Linear) -> np.ndarray:
        weight = linear.read(self._model)
        if not np.isfinite(weight).all():
            raise InputError(f"weight `{linear.weight}` of `{self._model.path}` has NaN or infinite values")
        return weight


def _holding(array: np.ndarray) -> Any:
    return lambda: array


def _layers(model: OnnxModel, options: PruneOptions) -> list[Linear]:
    """Return the layers to prune: heads, which share the embedding or name every token, are left whole."""
    try:
        wanted, unwanted = re.compile(options.include), re.compile(options.exclude or r"(?!)")
    except re.error as error:
        raise OptionError(f"not a regular expression: `{error.pattern!s}`: {error}") from error
    linears = find_linears(model)
    tables = {table.weight for table in find_embeddings(model, linears)}
    return [
        one
        for one in linears
        if one.weight not in tables
        and one.role != HEAD_ROLE
        and any(map(wanted.search, (one.name, one.role)))
        and not any(map(unwanted.search, (one.name, one.role)))
    ]


def _row(name: str, models: Mapping[str, OnnxModel], bundle: ModelBundle | None) -> dict[str, Any]:
    parameters = count_parameters(models.values())
    files = _files(models.values())
    return {
        "bundle": name,
        "num_parameters": parameters,
        "sparsity": count_zeros(models.values()) / parameters,
        "size_bytes": sum(file.stat().st_size for file in files),
        "zipped_bytes": _zipped_bytes(files),
    }


def _files(models: Iterable[OnnxModel]) -> list[Path]:
    """Return the files of graphs and of the weights beside them."""
    found: dict[Path, None] = {}
    for model in models:
        found[model.path] = None
        for tensor in model.proto.graph.initializer:
            found |= {
                model.path.parent / entry.value: None for entry in tensor.external_data if entry.key == "location"
            }
    return list(found)


def _zipped_bytes(files: Sequence[Path]) -> int:
    """Return the bytes of files deflated at the fastest level; the default takes a tenth off and five times as long."""
    total = 0
    with progress("compressing", sum(file.stat().st_size for file in files)) as advance:
        for file in files:
            packer = zlib.compressobj(level=1)
            with file.open("rb") as opened:
                while block := opened.read(_BLOCK_BYTES):
                    total += len(packer.compress(block))
                    advance(len(block))
            total += len(packer.flush())
    return total


def _by_role(layers: Sequence[tuple[Linear, int]]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for linear, zeros in layers:
        row = rows.setdefault(linear.role, {"role": linear.role, "layers": 0, "num_parameters": 0, "zeros": 0})
        row["layers"] += 1
        row["num_parameters"] += linear.shape[0] * linear.shape[1]
        row["zeros"] += zeros
    return [row | {"sparsity": row["zeros"] / row["num_parameters"]} for row in rows.values()]


def list_layers(graphs: Iterable[tuple[OnnxModel, list[Linear]]]) -> list[dict[str, Any]]:
    """Return one row per role of the layers that would be pruned."""
    linears = {linear.weight: linear for _, layers in graphs for linear in layers}
    rows = _by_role([(linear, 0) for linear in linears.values()])
    return [{key: row[key] for key in ("role", "layers", "num_parameters")} for row in rows]


def _describe(model: OnnxModel) -> dict[str, Any]:
    return {
        "file": model.path.name,
        "inputs": [value.name for value in model.proto.graph.input],
        "outputs": [value.name for value in model.proto.graph.output],
    }


def _step(choice: Choice, options: PruneOptions) -> Step:
    shares = {"pattern": str(options.pattern)} if options.pattern else {"ratio": ratio_of(choice, options.ratios)}
    return Step(
        stage="prune",
        method=choice.name,
        options={**shares, "allocation": options.allocation, "include": options.include, "exclude": options.exclude}
        | resolved((choice,)),
        versions={name: importlib.metadata.version(name) for name in ("numpy", "onnx")}
        | {"llmfast": llmfast.__version__},
        seed=options.calibration.seed,
        calibration=options.calibration.describe() if choice.plugin.NEEDS_INPUTS else None,
    )
