"""`llmfast quantize`: a float bundle or .onnx file becomes a smaller one."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmfast import registry
from llmfast.bundle import (
    COMPANIONS,
    MANIFEST,
    PREFILL,
    ModelBundle,
    check_output,
    sha256,
    stage_output,
    write_manifest,
)
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.graph.feeds import graph_inputs, sequence_feeds
from llmfast.graph.floats import FloatFormat
from llmfast.graph.linear import Linear
from llmfast.graph.model import OnnxModel
from llmfast.graph.packed import Grid, QuantizedWeight
from llmfast.graph.weights import WeightFile
from llmfast.quantize import sensitivity
from llmfast.quantize.checkpoint import Checkpoint, kept_for_resuming
from llmfast.quantize.corpus import Corpus
from llmfast.quantize.fitting import Fitting, start_fitting
from llmfast.quantize.hybrid import make_plans, require_decoder
from llmfast.quantize.kv_cache import cached_values, measure_ranges, quantize_cache
from llmfast.quantize.measure import Proof, ProofText, require_measured, worst
from llmfast.quantize.options import MIXED_SCHEME, QuantizeOptions, is_calibrated
from llmfast.quantize.pair_proof import PairProof, make_proof
from llmfast.quantize.pairs import Values, check_data, feed_pairs, is_encoder_decoder, make_reader, takes_recordings
from llmfast.quantize.plan import DEFAULT_ROUNDING, Layers, Part, Plan, choose_layers, list_layers
from llmfast.quantize.rewrite import LayerReport, QuantizedGraph, RoundWeight, Weight, refuse_damaged_layers
from llmfast.quantize.summary import describe_graphs, make_manifest, slow_forms, summarize, versions
from llmfast.quantize.vocabulary import trimmed
from llmfast.quantize.workpiece import InputStatistics, Workpiece
from llmfast.report import note, progress
from llmfast.resources import require_disk
from llmfast.runtime import open_session, usable_cores
from llmfast.text import read_text
from llmfast.thirdparty import adopt, can_adopt
from llmfast.verdict import enforce, judge

_LOOSEN = "nothing was written; try --method gptq or a budget, or loosen the gate"


def quantize(source: Path, output: Path, options: QuantizeOptions) -> ModelBundle:
    """Quantize a model, and measure how far its answers moved.

    Args:
        source: a bundle, a directory that holds model.onnx, or a lone .onnx file.
        output: the new bundle's directory.
        options: see `QuantizeOptions`.

    Returns:
        The new bundle; its manifest says what was done to the layers of each role, and what was measured.

    Raises:
        OptionError: an unknown scheme, method or setting.
        InputError: the model is missing, truncated or has NaN weights; too little text.
        UnsupportedError: nothing to quantize, or already quantized.
        GateError: a gate or the budget was missed; nothing is left at `output`.
        OutputExistsError: the output exists.
    """
    if options.trim_vocabulary:
        check_output(output, (source,), options.overwrite)
        with trimmed(source, output, options.trim_vocabulary) as smaller:
            return quantize(smaller, output, replace(options, trim_vocabulary=None))
    bundle, parts = _prepare(source, output, options)
    if options.budget or any(part.plan.needs_calibration for part in parts.values()):
        for part in parts.values():
            refuse_damaged_layers(part.model, part.layers)  # before what takes long, and before it spreads
    states = {role: part.model.state() for role, part in parts.items()}
    samples = _samples(bundle, parts, options)
    proof = _prove(bundle, parts, options)
    checkpoint = None
    if options.resume or options.budget or any(part.plan.rounding.plugin.NEEDS_STATISTICS for part in parts.values()):
        checkpoint = Checkpoint(output, _facts(bundle, parts, options), options.resume)
    with kept_for_resuming(checkpoint), stage_output(output, options.overwrite) as staged:
        fitting = _start_fitting(bundle, parts, samples, options, checkpoint, staged) if options.budget else None
        workpieces = {role: _transform(part, samples.get(role, ())) for role, part in parts.items()}
        cache = _measure_cache(workpieces["model"]) if options.kv else None
        writers = {
            role: _prepare_writer(role, part.plan, workpieces[role], checkpoint, proof) for role, part in parts.items()
        }
        while True:
            chosen = fitting.layers() if fitting else {role: part.layers for role, part in parts.items()}
            after, reports = _write_graphs(staged, writers, chosen, cache)
            for written in after.values():
                _check_loads(written.path, source)
            compared = proof.compare(after) if proof else {}
            figures = worst(compared.values())
            if fitting is None or fitting.is_met(list(after.values()), figures):
                break
            for file in staged.glob("*.onnx*"):
                file.unlink()
        require_measured(figures, options.gates)
        verdict = judge([{"bundle": output.name, **figures}], "", options.gates)
        enforce(verdict, _LOOSEN)
        for name in COMPANIONS:
            if companion := bundle.companion(name):
                shutil.copyfile(companion, staged / name)
        for role, part in parts.items():
            part.model.require_unchanged(states[role])
        forms = slow_forms([part.model for part in parts.values()], after.values())
        measured = {
            **summarize(reports),
            **({"graphs": describe_graphs(parts, after, reports, compared)} if PREFILL in parts else {}),
            "slow_forms": forms,
            **({"kv": options.kv} if options.kv else {}),
            **figures,
            "gates": verdict,
            "text": proof and proof.text,
        }
        write_manifest(staged, make_manifest(bundle, parts, after, options, measured))
    return ModelBundle.open(output)


def _prove(bundle: ModelBundle, parts: Mapping[str, Part], options: QuantizeOptions) -> Proof | PairProof | None:
    if not options.measure:
        return None
    data = Corpus(options.data, options.calibration.field) if options.data else None
    models = {role: part.model for role, part in parts.items()}
    text = ProofText(data, options.calibration, is_calibrated(parts, options), options.data_samples)
    return make_proof(bundle, models, text, by_all=options.budget is not None)


def _start_fitting(
    bundle: ModelBundle,
    parts: Mapping[str, Part],
    samples: Mapping[str, Sequence[Values]],
    options: QuantizeOptions,
    checkpoint: Checkpoint | None,
    staged: Path,
) -> Fitting:
    assert options.budget is not None
    assert checkpoint is not None
    roundings = {}
    for role, part in parts.items():
        # Weights and activations as they are: what transforms do is no part of the probe.
        plain = replace(part.plan, transforms=())
        workpiece = Workpiece(part.model, part.layers, samples.get(role, ()))
        shares = not part.plan.transforms and not getattr(part.plan.rounding.options, "sequential", False)
        roundings[role] = _rounding(plain, workpiece, checkpoint, role if shares else f"probe {role}")
    return start_fitting(
        options.budget, options.calibration, options.sensitivity, bundle, parts, roundings, checkpoint, staged
    )


def _transform(part: Part, samples: Sequence[Values]) -> Workpiece:
    """Do what the plan's transforms do to one graph."""
    workpiece = Workpiece(part.model, part.layers, samples)
    for transform in part.plan.transforms:
        transform.plugin.transform(workpiece, transform.options)
    return workpiece


def _measure_cache(workpiece: Workpiece) -> dict[str, np.ndarray]:
    """Return the ranges of the keys and values that a transformed decoder caches."""
    return measure_ranges(cached_values(workpiece.model), workpiece.replay())


def _prepare_writer(
    role: str,
    plan: Plan,
    workpiece: Workpiece,
    checkpoint: Checkpoint | None,
    proof: Proof | PairProof | None,
) -> Callable[[Layers, WeightFile], QuantizedGraph]:
    """Return what quantizes one transformed graph, as often as its grids are chosen anew."""
    write_linear = plan.scheme.plugin.make_writer(workpiece, plan.scheme.options)

    def make(chosen: Layers, weights: WeightFile) -> QuantizedGraph:
        # Layers that a transform put in are in the workpiece's list only.
        grids = {**workpiece.layers.grids, **chosen.grids}
        rounding = _rounding(plan, workpiece, checkpoint, role)
        inputs = proof.inputs_of(role, workpiece) if proof else None
        layers = replace(workpiece.layers, grids=grids)
        return QuantizedGraph(workpiece.model, layers, workpiece.edits, weights, write_linear, rounding, inputs)

    return make


def _write_graphs(
    staged: Path,
    writers: Mapping[str, Callable[[Layers, WeightFile], QuantizedGraph]],
    layers: Mapping[str, Layers],
    cache: Mapping[str, np.ndarray] | None,
) -> tuple[dict[str, OnnxModel], dict[str, list[LayerReport]]]:
    """Write all graphs over one data file; return them with what was done to their layers, both by role.

    Args:
        staged: where to.
        writers: role -> what quantizes a graph.
        layers: role -> its layers with their grids.
        cache: ranges of keys and values that are stored as int8.
    """
    weights = WeightFile(staged)
    protos, reports = {}, {}
    for role, write in writers.items():
        graph = write(layers[role], weights)
        with progress(f"quantizing {role}", graph.num_nodes) as advance:
            protos[role] = graph.write(advance)
        if cache:
            quantize_cache(protos[role], cache)
        reports[role] = graph.reports
    if len(protos) == 1:
        weights.save(next(iter(protos.values())))
    else:
        weights.save_all(protos)
    return {role: OnnxModel.load(staged / f"{role}.onnx") for role in protos}, reports


def _facts(bundle: ModelBundle, parts: Mapping[str, Part], options: QuantizeOptions) -> dict[str, Any]:
    """Return everything that rounded layers depend on, for the checkpoint's key."""
    models = [part.model for part in parts.values()]
    plans = {role: part.plan for role, part in parts.items()}
    external = {
        entry.value
        for model in models
        for tensor in model.initializers.values()
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [*(model.path for model in models), *(bundle.path / name for name in sorted(external))]
    return {
        "model": [sha256(file) for file in files],
        "plan": {role: [plan.scheme.name, plan.method, plan.options] for role, plan in plans.items()},
        "layers": [options.include, options.exclude],
        "budget": options.budget and asdict(options.budget),
        "sensitivity": options.sensitivity and sha256(sensitivity.file_of(options.sensitivity)),
        "calibration": [options.calibration.describe(), options.calibration.field, options.calibration.seed],
        "versions": versions(),
        "cores": usable_cores(),
    }


def _check_loads(model: Path, source: Path) -> None:
    """Refuse to write a model that ONNX Runtime can't open."""
    try:
        open_session(model)
    except InputError as error:
        raise UnsupportedError(f"`{source}`: the quantized graph does not load: {error.message}") from error


def plan_layers(source: Path, output: Path, options: QuantizeOptions) -> list[dict[str, Any]]:
    """Check everything `quantize` checks before it works, and return one row per role of what it would do."""
    if options.trim_vocabulary:
        note("note: embedding and head are listed as they are before the vocabulary is trimmed")
    parts = _prepare(source, output, options)[1]
    check_data((options.calibration.path, options.data), {role: part.model for role, part in parts.items()})
    if options.trim_vocabulary:
        read_text(options.trim_vocabulary)
    if PREFILL in parts:
        note(f"note: the second graph, for prompts: {parts[PREFILL].plan.scheme.name} {parts[PREFILL].plan.method}")
    return list_layers([part.layers for role, part in parts.items() if role != PREFILL])


def _prepare(source: Path, output: Path, options: QuantizeOptions) -> tuple[ModelBundle, dict[str, Part]]:
    """Check everything that can be checked before there is work; return the bundle, and its graphs by role."""
    plan, second = make_plans(options)
    if options.budget and plan.scheme.name != MIXED_SCHEME:
        raise OptionError(f"a budget chooses widths by itself, not `{plan.scheme.name}`", "leave out --scheme")
    bundle = ModelBundle.open(source)
    inputs = (source, source.parent) if (source.parent / MANIFEST).is_file() else (source,)
    check_output(output, inputs, options.overwrite)
    require_disk(output.parent, bundle.size_bytes // 8, "the smallest result, 4 bits of 32,")
    models = {role: OnnxModel.load(path) for role, path in bundle.graphs.items()}
    is_text_read = plan.needs_calibration or (options.budget and not options.sensitivity)
    if is_text_read and takes_recordings(models):
        options.calibration.corpus.recordings()  # refuses what is none
    adopted = can_adopt(bundle)
    if adopted:
        bundle, models["model"] = adopt(bundle, models["model"])
    if options.kv and is_encoder_decoder(models):
        raise UnsupportedError(f"the KV cache of `{source}`, an encoder-decoder, stays float", "leave out --kv")
    if options.kv:
        cached_values(next(iter(models.values())))  # refuses what has no such cache

    def part(plan: Plan, model: OnnxModel) -> Part:
        return Part(plan, model, choose_layers(model, plan, options.include, options.exclude))

    parts = {role: part(plan, model) for role, model in models.items()}
    if options.budget and len(models) > 1 and not is_encoder_decoder(models):
        raise UnsupportedError(
            f"`{source}` has the graphs {', '.join(models)}: a budget is for one, or an encoder with its decoder",
            "choose a --scheme",
        )
    if second is not None:
        require_decoder(bundle, models["model"])
        again = OnnxModel.load(bundle.model)  # transforms change what they work on
        parts[PREFILL] = part(second, adopt(bundle, again)[1] if adopted else again)
    return bundle, parts


def _samples(bundle: ModelBundle, parts: Mapping[str, Part], options: QuantizeOptions) -> dict[str, list[Values]]:
    """Return what graphs are calibrated on: role -> the inputs of each sample; nothing where none is."""
    if not (options.kv or any(part.plan.needs_calibration for part in parts.values())):
        return {}
    calibration = options.calibration
    models = {role: part.model for role, part in parts.items()}
    if is_encoder_decoder(models):
        reader = make_reader(bundle, models)
        pairs, _ = calibration.divide(reader.read(calibration.corpus, calibration.seq_len))
        return feed_pairs(models, reader.complete(pairs, calibration.seq_len, "calibrate"))
    ids, _ = calibration.split(bundle)
    inputs = {role: graph_inputs(model.proto.graph) for role, model in models.items()}
    return {role: [sequence_feeds(own, one[None]) for one in ids] for role, own in inputs.items()}


def _rounding(plan: Plan, workpiece: Workpiece, checkpoint: Checkpoint | None, key: str) -> RoundWeight:
    """Return the function that rounds a weight; embeddings and heads are rounded to nearest.

    Args:
        plan: the method.
        workpiece: the model after its transforms.
        checkpoint: holds layers that are rounded already, and gets the others.
        key: says in the checkpoint what the layers were rounded for.
    """
    nearest = registry.load("quantize.rounding", DEFAULT_ROUNDING)
    method = plan.rounding
    statistics_of = InputStatistics(workpiece, method.options.sequential) if method.plugin.NEEDS_STATISTICS else None

    def round_weight(weight: np.ndarray, grid: Grid | FloatFormat, linear: Linear | None) -> Weight:
        if isinstance(grid, FloatFormat):
            return grid.round(weight)
        if linear is None:
            quantized: QuantizedWeight = nearest.quantize_weight(weight, grid, nearest.Options())
            return quantized
        known = checkpoint.weight(f"{key} {linear.name}", grid) if checkpoint else None
        if known is not None:
            quantized = known
        elif statistics_of is None:
            quantized = method.plugin.quantize_weight(weight, grid, method.options)
        else:
            quantized = method.plugin.quantize_weight(weight, grid, method.options, statistics_of(linear), linear.name)
        if known is None and checkpoint:
            checkpoint.keep_weight(f"{key} {linear.name}", quantized)
        if statistics_of is not None:
            statistics_of.quantized(linear, quantized)
        return quantized

    return round_weight
