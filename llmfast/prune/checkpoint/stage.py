"""Pruning a PyTorch checkpoint: blocks, channels, heads, width and tokens, one method after the other."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llmfast
from llmfast.bundle import SEQ2SEQ_TASKS, Step, stage_output
from llmfast.errors import OptionError, UnsupportedError
from llmfast.export.checkpoint import SafetensorsCheckpoint
from llmfast.export.encoder_decoder import detect_seq2seq_task
from llmfast.export.hub import resolve_folder
from llmfast.export.requirements import require_export_extra
from llmfast.export.traced import detect_task
from llmfast.lineage import read_lineage, write_lineage
from llmfast.prune.checkpoint.families import family_of
from llmfast.prune.checkpoint.files import copy_settings, save_checkpoint, weight_bytes
from llmfast.prune.checkpoint.proof import Proof, choose_text
from llmfast.prune.checkpoint.sizes import Shrinker, Shrinking, choose_allocation, sizes_of
from llmfast.prune.checkpoint.speed import SpeedTest
from llmfast.prune.checkpoint.workpiece import Workpiece, as_bundle
from llmfast.prune.methods import resolved
from llmfast.prune.options import PruneOptions
from llmfast.prune.result import Pruned
from llmfast.quantize.comparison import damage_of
from llmfast.quantize.plan import Choice
from llmfast.report import note
from llmfast.verdict import Judgement, enforce, judge

_VERSIONED = ("numpy", "torch", "transformers")
# Of the calibration text, when several divisions of a target are tried.
_MOST_PROBE_SAMPLES, _PROVEN_SAMPLES = 8, 4
_ROUNDED = 0.005


def open_source(source: str) -> tuple[SafetensorsCheckpoint, str]:
    """Open a checkpoint and return it with its task.

    Raises:
        InputError: no checkpoint, or one without weights or tokenizer.
        UnsupportedError: an encoder-decoder, or no [export] extra.
    """
    require_export_extra()
    if source.endswith(".gguf"):
        raise UnsupportedError(f"`{source}`: a .gguf file can't be pruned", "prune the Hugging Face folder it is from")
    checkpoint = SafetensorsCheckpoint(resolve_folder(source))
    config = checkpoint.config.to_dict()
    task = detect_seq2seq_task(config) or detect_task(config, checkpoint.path)
    if task in SEQ2SEQ_TASKS:
        raise UnsupportedError(f"`{source}`: encoder-decoders can't be pruned yet", "prune the exported bundle")
    return checkpoint, task


def plan_shares(
    checkpoint: SafetensorsCheckpoint, task: str, choices: Sequence[Choice], options: PruneOptions
) -> Shrinking:
    """Return the shares that follow from the options, those of a measured allocation not among them."""
    shrinker = Shrinker(checkpoint.config, task, str(checkpoint.path), choices)
    shares = shrinker.fit(options.target_params) if options.target_params else shrinker.shrink(options.ratios)
    if not options.target_params:
        _note_rounding(checkpoint.config, shares, choices, str(checkpoint.path))
    return shares


def list_sizes(source: str, choices: Sequence[Choice], options: PruneOptions) -> list[dict[str, Any]]:
    """Return a row per method, and one for the parameters, of what the shares would make of a checkpoint."""
    checkpoint, task = open_source(source)
    shares = plan_shares(checkpoint, task, choices, options)
    family = family_of(checkpoint.config, source)
    rows = []
    for choice in (one for one in choices if one.plugin.TAKES_RATIO):
        field = choice.plugin.size_of(family)
        sizes = {"before": getattr(checkpoint.config, field), "after": getattr(shares.config, field)}
        rows.append({"method": choice.name, "of": field, **sizes})
    if len(rows) < len(choices):
        note("note: how many tokens stay follows from the text")
    before = sizes_of(checkpoint.config, task, source)
    counts = {"before": before.num_parameters, "after": shares.sizes.num_parameters}
    return [*rows, {"method": "all", "of": "parameters", **counts}]


def prune_checkpoint(source: str, output: Path, choices: Sequence[Choice], options: PruneOptions) -> Pruned:
    """Prune a checkpoint and compare it with the original.

    Args:
        source: a Hugging Face folder, or a hub id.
        output: the new checkpoint's folder.
        choices: methods in order.
        options: see `PruneOptions`.

    Raises:
        GateError: a gate was missed; nothing is left at `output`.
    """
    checkpoint, task = open_source(source)
    shares = plan_shares(checkpoint, task, choices, options)
    shrinker = Shrinker(checkpoint.config, task, source, choices)
    before = shrinker.shrink({}).sizes
    with stage_output(output, options.overwrite) as staged:
        copy_settings(checkpoint.path, staged)
        workpiece = Workpiece(checkpoint, task, staged, options.calibration.path)
        bundle = as_bundle(staged, task, workpiece.model)
        is_calibrated = any(choice.plugin.TAKES_RATIO for choice in choices)
        if is_calibrated:
            workpiece.samples, _ = options.calibration.split(bundle)
        if options.allocation == "sensitivity" and options.target_params:
            shares = _allocate(workpiece, checkpoint, shrinker, choices, options.target_params)
        proof = text = None
        if options.measure and is_calibrated:
            samples, text = choose_text(bundle, options)
            proof = Proof(checkpoint, task, samples)
        elif options.measure:
            note("note: not compared with the original: the logits of the tokens that stay are those of before")
        removed, figures = _prune(workpiece, choices, shares, proof)
        sizes = sizes_of(workpiece.config, task, source)
        size = save_checkpoint(workpiece.model, workpiece.dtype, staged)
        speeds = _measure_speed(checkpoint, task, staged, options.threads) if options.measure_speed else {}
        rows = _rows(
            (checkpoint.path.resolve().name, output.name),
            (before.num_parameters, sizes.num_parameters),
            (weight_bytes(checkpoint.path), size),
            {**sizes.expected_speedups(before), **speeds},
            figures,
        )
        verdict = judge([{"bundle": output.name, **rows[1]}], "", options.gates)
        enforce(verdict, "nothing was written; choose another share, or loosen the gate")
        gates = [Judgement(**entry) for entry in verdict]
        pruned = Pruned(output, rows[0], rows[1], gates, text if figures else None, dict(shares.ratios), removed)
        step = _step(choices, options, shares, removed)
        write_lineage(staged, (*read_lineage(checkpoint.path), step), {"prune": pruned.document()})
    return pruned


def _prune(
    workpiece: Workpiece, choices: Sequence[Choice], shares: Shrinking, proof: Proof | None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Run the methods; return what each removed, and the figures of the comparison.

    Predictions over another vocabulary compare with no other's, so they are compared before tokens go.
    """
    removed: dict[str, Any] = {}
    figures: dict[str, float] = {}
    takers = [choice for choice in choices if choice.plugin.TAKES_RATIO]
    for choice in takers:
        changes = choice.plugin.resize(workpiece.config, workpiece.family, shares.ratios[choice.name], choice.options)
        if changes:
            removed[choice.name] = choice.plugin.prune(workpiece, changes, choice.options)
    if proof:
        figures = proof.compare(workpiece.model)
    for choice in choices[len(takers) :]:
        removed[choice.name] = choice.plugin.prune(workpiece, {}, choice.options)
    return removed, figures


def _allocate(
    workpiece: Workpiece,
    checkpoint: SafetensorsCheckpoint,
    shrinker: Shrinker,
    choices: Sequence[Choice],
    target: float,
) -> Shrinking:
    """Divide a target between the methods by what is lost, on two parts of the calibration text.

    Raises:
        OptionError: too few samples for two parts.
    """
    model, samples = workpiece.model, workpiece.samples
    if len(samples) <= _PROVEN_SAMPLES:
        raise OptionError(
            f"--allocation sensitivity: {len(samples)} samples of the calibration text do not make two parts",
            f"at least {_PROVEN_SAMPLES + 1} do: more --num-samples, a shorter --seq-len, or more text",
        )
    takers = [one for one in choices if one.plugin.TAKES_RATIO]
    proof = Proof(checkpoint, workpiece.task, samples[-_PROVEN_SAMPLES:])
    workpiece.samples = samples[:-_PROVEN_SAMPLES][:_MOST_PROBE_SAMPLES]

    def loss_of(candidate: Shrinking) -> float:
        _prune(workpiece, takers, candidate, None)
        figures = proof.compare(workpiece.model)
        workpiece.model = model
        if not figures:
            raise UnsupportedError("a division between methods is measured, which width makes impossible here")
        return damage_of(figures)[1]

    try:
        return choose_allocation(shrinker, takers[0].name, target, loss_of)
    finally:
        workpiece.model, workpiece.samples = model, samples


def _measure_speed(checkpoint: SafetensorsCheckpoint, task: str, staged: Path, threads: int | None) -> dict[str, float]:
    with SpeedTest(checkpoint.path, task, threads) as test:
        return test.measure(staged)


def _rows(
    names: tuple[str, str],
    parameters: tuple[int, int],
    sizes: tuple[int, int],
    speeds: Mapping[str, float],
    figures: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return what is known of the original, and of what became of it."""
    before, after = (
        {"checkpoint": name, "num_parameters": count, "weight_bytes": size}
        for name, count, size in zip(names, parameters, sizes, strict=True)
    )
    after |= {"parameters_ratio": parameters[1] / parameters[0], **speeds, **figures}
    if "baseline_perplexity" in after:
        before["perplexity"] = after.pop("baseline_perplexity")
    return [before, after]


def _note_rounding(config: Any, shares: Shrinking, choices: Sequence[Choice], source: str) -> None:
    """Say where whole blocks, heads and steps make a share another than was asked."""
    family = family_of(config, source)
    for choice in (one for one in choices if one.plugin.TAKES_RATIO):
        asked = shares.ratios[choice.name]
        field = choice.plugin.size_of(family)
        taken = 1 - getattr(shares.config, field) / getattr(config, field)
        if abs(taken - asked) > _ROUNDED:
            note(f"note: {choice.name}: {asked:.1%} is rounded to {taken:.1%} of `{field}`")


def _step(choices: Sequence[Choice], options: PruneOptions, shares: Shrinking, removed: Mapping[str, Any]) -> Step:
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED} | {"llmfast": llmfast.__version__}
    return Step(
        stage="prune",
        method=",".join(choice.name for choice in choices),
        options={"ratios": dict(shares.ratios), "removed": dict(removed), **resolved(choices)},
        versions=versions,
        seed=options.calibration.seed,
        calibration=options.calibration.describe(),
    )
