"""A short measured search for the settings of a decoder's session.

Every candidate differs from the defaults in one setting. All take turns in interleaved rounds, whose order rotates,
each in a process of its own; processes begin anew between thirds of the rounds. Those that are proven faster are then
measured again, alone and all together, since the luckiest of many looks better than it is. What is not proven by these
new rounds is not taken: the defaults stay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmfast import report
from llmfast.bench.options import BenchOptions, numbers
from llmfast.bench.rounds import rotated
from llmfast.bench.statistics import Interval, decide, launch_interval, median, paired_ratios, simultaneous
from llmfast.bench.subject import Trial
from llmfast.bench.watch import Watch
from llmfast.bundle import TEXT_GENERATION, ModelBundle
from llmfast.errors import OptionError
from llmfast.report import Column
from llmfast.resources import available_memory
from llmfast.runtime import suit_provider, usable_cores
from llmfast.tuned import SessionSettings, keep_settings
from llmfast.worker import Worker

LAUNCHES = 3
# Rounds of each of the two passes when --rounds does not say.
DEFAULT_ROUNDS = 9
DEFAULT_PROMPT_TOKENS, DEFAULT_OUTPUT_TOKENS = 512, 64
_CHUNKS = (64, 128, 512)
_BLOCK_BASE = 4  # what ONNX Runtime's documentation of the setting names
_SHAPE = "request"
_BYTES_PER_STORED_BYTE = 2

# (settings, number of the round, launch) -> seconds of one request.
Measure = Callable[[SessionSettings, int, int], float]

COLUMNS = (
    Column("pass", "pass"),
    Column("settings", "spelled", align_right=False),
    Column("ms", "request_s", lambda value: f"{value * 1e3:.1f}"),
    Column("x", "ratio", "{:.3f}".format),
    Column("interval", "interval", lambda value: f"{value[0]:.3f} to {value[1]:.3f}" if value else "-"),
    Column("verdict", "verdict", align_right=False),
)


@dataclass(frozen=True)
class Score:
    """How settings did against the defaults in one pass: above 1 is faster."""

    settings: SessionSettings
    request_s: float
    ratio: float
    interval: Interval | None
    verdict: str


def candidates(cores: int) -> list[SessionSettings]:
    """Return settings that differ from the defaults in one thing."""
    default = SessionSettings(cores)
    threads = sorted({max(1, cores // 2), max(1, cores - 1)} - {cores})
    return [
        *(replace(default, threads=count) for count in threads),
        replace(default, spin=False),
        replace(default, block_base=_BLOCK_BASE),
        *(replace(default, chunk_tokens=count) for count in _CHUNKS),
    ]


def search(
    default: SessionSettings,
    tried: Sequence[SessionSettings],
    measure: Measure,
    rounds: int,
    margin: float,
    seed: int = 0,
) -> tuple[SessionSettings, list[list[Score]]]:
    """Return the settings to take, the defaults unless others are proven faster, and the scores of each pass.

    Args:
        default: what the others are compared with.
        tried: each differs from it in one setting.
        measure: see `Measure`; settings of one round are measured one after the other.
        rounds: of each pass.
        margin: smaller differences count as none.
        seed: of the bootstrap.
    """
    first = _compare(default, tried, measure, rounds, 0, margin, seed)
    winners = _best_of_each(default, first)
    if not winners:
        return default, [first]
    together = replace(default, **{name: getattr(one, name) for name, one in winners.items()})
    second = _compare(default, [*dict.fromkeys([*winners.values(), together])], measure, rounds, rounds, margin, seed)
    proven = [score for score in second if score.verdict == "better"]
    best = max(proven, key=lambda score: score.ratio, default=None)
    return best.settings if best else default, [first, second]


def _best_of_each(default: SessionSettings, scores: Sequence[Score]) -> dict[str, SessionSettings]:
    """Return, of each setting that some candidate proves worth changing, the best candidate."""
    winners: dict[str, Score] = {}
    for score in scores:
        ours, theirs = asdict(score.settings), asdict(default)
        (name,) = (name for name in ours if ours[name] != theirs[name])
        if score.verdict == "better" and (name not in winners or score.ratio > winners[name].ratio):
            winners[name] = score
    return {name: score.settings for name, score in winners.items()}


def _compare(
    default: SessionSettings,
    tried: Sequence[SessionSettings],
    measure: Measure,
    rounds: int,
    start: int,
    margin: float,
    seed: int,
) -> list[Score]:
    everyone = [default, *tried]
    seconds: dict[SessionSettings, list[float]] = {one: [] for one in everyone}
    launches = [start + number * LAUNCHES // rounds for number in range(rounds)]
    with report.progress("tuning", rounds * len(everyone)) as advance:
        for number, launch in enumerate(launches):
            for one in rotated(everyone, number):
                seconds[one].append(measure(one, start + number, launch))
                advance()
    scores = []
    for one in tried:
        ratios = paired_ratios(seconds[one], seconds[default], higher_is_better=False)
        interval = launch_interval(ratios, launches, seed, simultaneous(len(tried)))
        verdict = decide(median(ratios), interval, margin)
        scores.append(Score(one, median(seconds[one]), median(ratios), interval, verdict))
    return scores


class Requests:
    """Times requests, each settings in a process of its own that begins anew with every launch.

    Args:
        path: the bundle.
        provider: a name in `llmfast.providers`.
        trial: makes the prompt; of each round another one.
        one_at_a_time: memory holds no more processes than one.
    """

    def __init__(self, path: Path, provider: str, trial: Trial, one_at_a_time: bool) -> None:
        self._path, self._provider, self._trial, self._one_at_a_time = path, provider, trial, one_at_a_time
        self._workers: dict[SessionSettings, Worker] = {}
        self._launch: int | None = None

    def __enter__(self) -> "Requests":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def measure(self, settings: SessionSettings, number: int, launch: int) -> float:
        """Return the seconds from a prompt to its last token."""
        if launch != self._launch or self._one_at_a_time:
            self.close()
            self._launch = launch
        trial = replace(self._trial, seed=(*self._trial.seed, number))
        if settings not in self._workers:
            _, length = trial.shapes[_SHAPE]
            self._workers[settings] = Worker(
                "llmfast.bench.subject:Subject",
                self._path,
                self._provider,
                settings.threads,
                length + trial.output_tokens,
                settings=settings,
            )
            self._workers[settings].call("time_request", trial, _SHAPE)  # warm-up
        seconds: float = self._workers[settings].call("time_request", trial, _SHAPE)
        return seconds


def tune_session(models: Sequence[Path], options: BenchOptions) -> dict[str, Any]:
    """Search the session settings of a decoder on this machine, and keep those that are proven faster.

    Nothing is kept, and nothing that an earlier search kept is touched, where other programs take part of the machine:
    what is best beside them, fewer threads for instance, is not when they are gone.

    Returns:
        `bundle`, `model`, `settings`, `spelled`, `is_default`, `file` (None where nothing is kept), `prompt_tokens`,
        `output_tokens` and `rows`: the scores of both passes.

    Raises:
        OptionError: not one model and one provider, or a model that generates no text.
        UnsupportedError: the model was not written by llmfast.
        ResourceError: the settings can't be written.
    """
    if len(models) != 1:
        raise OptionError(f"--tune-session takes one model, not {len(models)}", "llmfast bench MODEL --tune-session")
    if len(options.providers) != 1:
        raise OptionError(f"--tune-session takes one provider, not {len(options.providers)}", "e.g. --provider cpu")
    (provider,) = options.providers
    bundle = ModelBundle.open(models[0])
    if bundle.manifest.task != TEXT_GENERATION:
        raise OptionError(f"--tune-session is for {TEXT_GENERATION}; `{models[0]}` is for {bundle.manifest.task}")
    digest = bundle.digest  # a model without one is refused before anything is measured
    suit_provider(bundle, provider)  # refuses one that runs it slowly
    length = (numbers(options.prompt_tokens) or (DEFAULT_PROMPT_TOKENS,))[0]
    output_tokens = options.output_tokens or DEFAULT_OUTPUT_TOKENS
    vocab_size = int(bundle.manifest.architecture.get("vocab_size", 1))
    trial = Trial((options.seed,), vocab_size, {_SHAPE: (1, length)}, output_tokens)
    watch = Watch.start()
    default, tried = SessionSettings(usable_cores()), candidates(usable_cores())
    needed, free = bundle.size_bytes * _BYTES_PER_STORED_BYTE * (1 + len(tried)), available_memory()
    with Requests(models[0], provider, trial, free is not None and needed > free) as requests:
        rounds = options.rounds or DEFAULT_ROUNDS
        found, passes = search(default, tried, requests.measure, rounds, options.precision, options.seed)
    disturbances = watch.finish([])  # all processes have ended: this one's counters have theirs
    for warning in disturbances:
        report.note(f"note: {warning}")
    rows = [
        {"pass": number, "spelled": str(score.settings), **asdict(score)}
        for number, scores in enumerate(passes, 1)
        for score in scores
    ]
    measured: Mapping[str, Any] = {"prompt_tokens": length, "output_tokens": output_tokens, "rows": rows}
    path = None
    if not disturbances:
        path = keep_settings(bundle, provider, found if found != default else None, measured)
    return {
        "bundle": bundle.name,
        "model": digest,
        "settings": asdict(found),
        "spelled": str(found),
        "is_default": found == default,
        "file": None if found == default or path is None else str(path),
        **measured,
    }


def print_tuning(document: Mapping[str, Any], output_format: str) -> None:
    """Print what a search found, in one of `report.FORMATS`."""
    if output_format == "json":
        report.out(report.to_json(document))
        return
    report.print_rows(document["rows"], COLUMNS, output_format)
    if document["is_default"]:
        report.note("nothing is proven faster than the defaults: they stay")
    elif document["file"] is None:
        report.note(
            f"best while others take part of the machine, not kept: {document['spelled']}; try again when it is quiet"
        )
    else:
        report.note(f"infer, serve and bench use from now on: {document['spelled']} (kept in `{document['file']}`)")
