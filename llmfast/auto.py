"""`llmfast quantize --auto`: try the few formats that suit this machine, measure each, keep the best.

It stands above the stages: each candidate is quantized by one and timed by another, against the float model.
"""

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmfast.bench.machine import describe_machine
from llmfast.bench.options import SPEED_RATIO, BenchOptions
from llmfast.bench.stage import bench, gates_of_run
from llmfast.bundle import SEQ2SEQ_TASKS, TEXT_GENERATION, UNKNOWN_TASK, ModelBundle, check_output, stage_output
from llmfast.errors import GateError, UnsupportedError
from llmfast.quantize.measure import require_measured
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize
from llmfast.report import Column, note, without_notes
from llmfast.verdict import Gate, judge, spell

# What is timed, where the model has room for it.
_PROMPT_TOKENS, _OUTPUT_TOKENS = 256, 32
_SHAPES = ((1, 32), (8, 128))

COLUMNS = (
    Column("candidate", "bundle", align_right=False),
    Column("MB", "size_bytes", lambda value: f"{value / 1e6:.1f}"),
    Column("speed x", "speed_ratio", "{:.2f}".format),
    Column("KLD", "kld", "{:.4f}".format),
    Column("cosine", "cosine", "{:.5f}".format),
    Column("verdict", "verdict", align_right=False),
)


@dataclass(frozen=True)
class Candidate:
    """A scheme and a method worth trying, with settings of theirs."""

    scheme: str
    method: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name in tables, and of its directory."""
        return f"{self.scheme}-{self.method.replace(',', '-')}"


@dataclass(frozen=True)
class AutoOptions:
    """What the best candidate must keep, and how candidates are made and timed.

    Attributes:
        quantize: of every candidate, its scheme, method and gates left out.
        gates: limits on figures of quality and, as `<speed>_ratio`, on speed.
        bench: how speed is measured; lengths that fit the model are chosen here.
    """

    quantize: QuantizeOptions
    gates: tuple[Gate, ...] = ()
    bench: BenchOptions = field(default_factory=lambda: BenchOptions(rounds=5))


def candidates(task: str, provider: str) -> list[Candidate]:
    """Return what is worth trying for a task on a provider, most promising first.

    Args:
        task: the bundle's.
        provider: a name in `llmfast.providers`.
    """
    if provider != "cpu":
        return [Candidate("fp16", "rtn", {"compute": "float16"}), Candidate("int4", "gptq")]
    if task == TEXT_GENERATION:
        return [Candidate("int8", "smoothquant"), Candidate("int4", "gptq"), Candidate("w8", "rtn")]
    return [Candidate("int8", "rtn")]


def quantize_best(
    source: Path, output: Path, options: AutoOptions, show: Callable[[list[dict[str, Any]]], None]
) -> ModelBundle:
    """Quantize in several ways, and keep the fastest that passes all gates.

    Args:
        source: a float bundle.
        output: the new bundle's directory.
        options: see `AutoOptions`.
        show: called with a row per candidate, also when none is kept: `bundle`, `size_bytes`, `speed_ratio` (geometric
            mean of its speeds against the float model's), figures of quality, `verdict`.

    Raises:
        GateError: no candidate passes and is faster than the float model; nothing is written.
        OptionError: a gate on a speed that is none of this model.
        UnsupportedError: the bundle does not say what it is for, so its speed can't be measured.
    """
    bundle = ModelBundle.open(source)
    if bundle.manifest.task == UNKNOWN_TASK:
        raise UnsupportedError(f"`{source}` does not say what its model is for", "choose a --scheme, or export it anew")
    check_output(output, (source,), options.quantize.overwrite)
    timing = _with_lengths(options.bench, bundle)
    speeds = tuple(gate for gate in options.gates if gate.kind == "min" and gate.figure.endswith("_ratio"))
    others = [gate for gate in options.gates if gate not in speeds]
    gates = [*others, *gates_of_run(bundle, replace(timing, gates=speeds))]
    machine = describe_machine()
    tried = candidates(bundle.manifest.task, timing.provider)
    note(
        f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['isa']) or 'no known instruction sets'}: "
        f"trying {', '.join(one.name for one in tried)}"
    )
    with stage_output(output, options.quantize.overwrite) as staged:
        made: dict[str, ModelBundle] = {}
        for one in tried:
            made[one.name] = _quantize(source, staged / one.name, one, options.quantize)
            require_measured(made[one.name].manifest.measured["quantize"], others)
        note("timing them beside the float model")
        with without_notes():
            measured = bench([source, *(small.path for small in made.values())], timing)
        rows = [_row(row.document(), made) for row in measured.rows if row.bundle in made]
        best = _best(rows, gates)
        show(rows)
        if best is None:
            reasons = "; ".join(f"`{row['bundle']}`: {row['verdict']}" for row in rows)
            hint = "loosen the gates" if gates else "a --scheme of your choice is made without a race"
            raise GateError(f"keep `{bundle.name}`: no candidate is better here: {reasons}", hint)
        for file in made[best].path.iterdir():
            os.rename(file, staged / file.name)
        for name in made:
            shutil.rmtree(staged / name)
    return ModelBundle.open(output)


def _with_lengths(options: BenchOptions, bundle: ModelBundle) -> BenchOptions:
    """Return what is timed: a prompt and an answer; of encoders a short text alone and a batch of longer ones."""
    room = bundle.manifest.architecture.get("context_length") or _PROMPT_TOKENS + _OUTPUT_TOKENS
    if bundle.manifest.task in (TEXT_GENERATION, *SEQ2SEQ_TASKS):
        output = min(_OUTPUT_TOKENS, room // 4)
        return replace(options, prompt_tokens=min(_PROMPT_TOKENS, room - output), output_tokens=output)
    return replace(options, shapes=",".join(f"{batch}x{min(length, room)}" for batch, length in _SHAPES))


def _quantize(source: Path, output: Path, candidate: Candidate, options: QuantizeOptions) -> ModelBundle:
    note(f"{candidate.name}:")
    scheme, method, settings = candidate.scheme, candidate.method, candidate.settings
    return quantize(source, output, replace(options, scheme=scheme, method=method, settings=settings, gates=()))


def _row(row: dict[str, Any], made: dict[str, ModelBundle]) -> dict[str, Any]:
    """Return a candidate's figures of speed and quality, and the mean of its speeds against the float model's."""
    measured = made[row["bundle"]].manifest.measured["quantize"]
    ratios = [value for key, value in row.items() if value and SPEED_RATIO.fullmatch(key)]
    speed = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
    quality = {key: value for key, value in measured.items() if isinstance(value, float)}
    return {"bundle": row["bundle"], "size_bytes": row["size_bytes"], "speed_ratio": speed, **quality, **row}


def _best(rows: list[dict[str, Any]], gates: Sequence[Gate]) -> str | None:
    """Return the fastest bundle that passes, None if none does, and write a verdict on each into its row."""
    passing = []
    for row in rows:
        missed = [spell(entry) for entry in judge([row], "", gates) if not entry["passed"]]
        if missed:
            row["verdict"] = "; ".join(line.partition("` ")[2] for line in missed)
        elif not row["speed_ratio"] or row["speed_ratio"] <= 1:
            speed = f"{row['speed_ratio']:.2f} x the speed" if row["speed_ratio"] else "speed not measured"
            row["verdict"] = f"{speed}, asked more than 1"
        else:
            row["verdict"] = "passed"
            passing.append(row)
    if not passing:
        return None
    best = max(passing, key=lambda row: float(row["speed_ratio"]))
    best["verdict"] = "kept"
    return str(best["bundle"])
