"""Where the time of a model goes, by operator and by role of the layer, from ONNX Runtime's own profile.

Every bundle runs alone, in a process of its own that writes a profile, which makes it a little slower than it is
under measurement. https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmfast import report
from llmfast.bench.contestant import Contestant
from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject, Trial
from llmfast.bench.workload import Workload
from llmfast.bundle import ModelBundle
from llmfast.errors import LlmfastError
from llmfast.graph.lint import lint
from llmfast.graph.model import OnnxModel
from llmfast.graph.parts import find_part, name_parts

_COPIES = ("MemcpyToHost", "MemcpyFromHost")
_KERNEL = "_kernel_time"
_ENCODER_RUNS = 5

Phase = tuple[str, int, int, int]  # name, start and end in ns of the profile's clock, units of work


def profile_all(contestants: Sequence[Contestant], options: BenchOptions, workload: Workload) -> None:
    """Profile every bundle that has not failed, and file what was found as `profile`; a note says where that fails."""
    for one in contestants:
        one.stop()  # a profile is no fair one while others hold memory and threads
    for one in contestants:
        if one.failure is not None:
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="llmfast-profile-") as folder:
                one.start(workload.max_length, options, profile=Path(folder) / "profile")
                trial = Trial((options.seed,), one.vocab_size or 1, workload.shapes, workload.output_tokens)
                one.profile = {"phases": one.call("profile", trial), "findings": find_slow_forms(one.bundle)}
        except LlmfastError as error:
            report.note(f"note: no profile of `{one.label}`: {error.message}")
        finally:
            one.stop()


def find_slow_forms(bundle: ModelBundle) -> list[dict[str, Any]]:
    """Return what the graph's lint says about speed: `graph`, `rule`, `nodes`, `reason`, `remedy`."""
    found = []
    for role, path in bundle.graphs.items():
        try:
            findings = lint(OnnxModel.load(path, any_opset=True))
        except LlmfastError as error:
            report.note(f"note: `{path}` was not searched for slow forms: {error.message}")
            continue
        for finding in findings:
            if finding.rule.affects == "speed":
                rule = {"rule": finding.rule.name, "reason": finding.rule.reason, "remedy": finding.rule.remedy}
                found.append({"graph": role, "nodes": len(finding.nodes)} | rule)
    return found


def profile_subject(subject: Subject, trial: Trial) -> list[dict[str, Any]]:
    """Run a subject that was opened with a profile, in the worker, and read the profile; a decoder on one sequence.

    Returns:
        One entry a phase (`prefill`, `decode` or `forward`): `phase`, `unit` (what the seconds are per: `prompt`,
        `token` or `run`), `seconds`, `operators` and `roles` (each `name`, `seconds`, `calls`, the slowest first),
        `copies` between devices, and `outside_s` that no kernel accounts for.
    """
    shape = next(iter(trial.shapes), "")
    clock = _profile_clock(subject.session)
    if subject.engine is None:
        return _profile_encoder(subject, trial, clock)
    subject.generate(trial, shape)  # warm-up
    _, length = trial.shapes[shape]
    prompt = trial.ids(length)
    subject.engine.reset()
    start = clock()
    token = int(subject.engine.prefill(prompt).argmax())
    middle = clock()
    for _ in range(trial.output_tokens - 1):
        token = int(subject.engine.decode(token).argmax())
    phases: list[Phase] = [("prefill", start, middle, 1), ("decode", middle, clock(), trial.output_tokens - 1)]
    return _summarize(subject, phases, {"prefill": "prompt", "decode": "token"})


def _profile_encoder(subject: Subject, trial: Trial, clock: Callable[[], int]) -> list[dict[str, Any]]:
    from llmfast.bench.encoding import make_run

    run = make_run(subject, trial)
    run()  # warm-up
    start = clock()
    for _ in range(_ENCODER_RUNS):
        run()
    return _summarize(subject, [("forward", start, clock(), _ENCODER_RUNS)], {"forward": "run"})


def _summarize(subject: Subject, phases: Sequence[Phase], units: Mapping[str, str]) -> list[dict[str, Any]]:
    first = subject.session.get_profiling_start_time_ns()
    events: list[dict[str, Any]] = []
    for session in subject.sessions:
        later = (session.get_profiling_start_time_ns() - first) / 1e3
        found = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        events += [{**event, "ts": event["ts"] + later} for event in found if "ts" in event]
    parts = _name_parts(subject.bundle)
    return [
        {"phase": name, "unit": units[name]}
        | summarize_events(events, parts, (start - first) / 1e3, (end - first) / 1e3, count)
        for name, start, end, count in phases
    ]


def _name_parts(bundle: ModelBundle) -> dict[str, str]:
    """Return node name -> its part of the model; what can't be read is named by its operators."""
    parts: dict[str, str] = {}
    for path in bundle.graphs.values():
        with contextlib.suppress(LlmfastError):
            parts |= name_parts(OnnxModel.load(path, any_opset=True))
    return parts


def summarize_events(
    events: Iterable[Mapping[str, Any]], parts: Mapping[str, str], start: float, end: float, count: int
) -> dict[str, Any]:
    """Return where the time of a phase went, per unit of work.

    Args:
        events: of ONNX Runtime's profile.
        parts: node name -> what it is part of, as `name_parts` returns it.
        start: of the phase, in the profile's microseconds.
        end: of the phase.
        count: units of work in it: tokens, prompts, runs.
    """
    operators: dict[str, list[float]] = {}
    roles: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_KERNEL) or not start <= event["ts"] < end:
            continue
        operator = event["args"].get("op_name", "unknown")
        role = find_part(parts, event["name"].removesuffix(_KERNEL), operator)
        for table, key in ((operators, operator), (roles, role)):
            table.setdefault(key, []).append(event["dur"] / 1e6)
    seconds = (end - start) / 1e6
    kernels = sum(map(sum, operators.values()))
    copies = [operators[name] for name in _COPIES if name in operators]
    return {
        "seconds": seconds / count,
        "operators": _sorted(operators, count),
        "roles": _sorted(roles, count),
        "copies": {"calls": sum(map(len, copies)) / count, "seconds": sum(map(sum, copies)) / count},
        "outside_s": (seconds - kernels) / count,
    }


def _sorted(table: Mapping[str, list[float]], count: int) -> list[dict[str, Any]]:
    rows = [{"name": name, "seconds": sum(times) / count, "calls": len(times) / count} for name, times in table.items()]
    return sorted(rows, key=lambda row: -float(row["seconds"]))


def _profile_clock(session: Any) -> Callable[[], int]:
    """Return the clock that ONNX Runtime's profile counts from: it differs from system to system."""
    origin = session.get_profiling_start_time_ns()
    clocks = (time.time_ns, time.monotonic_ns, time.perf_counter_ns)
    return min(clocks, key=lambda clock: abs(clock() - origin))
