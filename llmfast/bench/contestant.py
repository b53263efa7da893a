"""The bundles of one run: their names, their worker processes, and what was measured of each."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from llmfast import registry, report
from llmfast.bench.options import BenchOptions, numbers
from llmfast.bundle import UNKNOWN_TASK, ModelBundle
from llmfast.errors import InputError, LlmfastError, OptionError
from llmfast.runtime import resolve_threads, suit_provider, with_fallback
from llmfast.tuned import settings_for
from llmfast.worker import Worker, as_failure


@dataclass(eq=False)
class Contestant:
    """One bundle of the run on one provider with some threads, and what was measured so far.

    Attributes:
        label: its name in the document, unique in the run.
        path: as the user typed it.
        bundle: its facts.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads.
        is_baseline: the others are compared with it; a failure of it ends the run.
        same_tokens: it has the baseline's tokenizer, so that predictions compare token by token.
        own_items: metric -> the data in its own tokens, where they are not the baseline's.
        worker: the process that holds it, None before `start` and after `stop`.
        is_fresh: the process has measured nothing yet.
        vocab_size: token ids it accepts, None when unknown.
        placement: nodes per execution provider.
        energy_source: how its joules are counted.
        failure: why it takes no further part.
        figures: name -> figure, and `<name>_spread`, `<name>_ratio` where there are.
        samples: name -> one figure per round or unit.
        latencies: name -> seconds of single runs and tokens.
        verdict: name -> `better`, `worse`, `equal` or `inconclusive` against the baseline.
        profile: what `--profile` found.
    """

    label: str
    path: Path
    bundle: ModelBundle
    provider: str = "cpu"
    threads: int = 1
    is_baseline: bool = False
    same_tokens: bool = True
    own_items: dict[str, list[Any]] = field(default_factory=dict)
    worker: Worker | None = None
    is_fresh: bool = True
    vocab_size: int | None = None
    placement: dict[str, int] = field(default_factory=dict)
    energy_source: str = ""
    failure: LlmfastError | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    latencies: dict[str, list[float]] = field(default_factory=dict)
    verdict: dict[str, str] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """What the model is for."""
        return self.bundle.manifest.task

    def start(self, max_length: int | None, options: BenchOptions, **settings: Any) -> None:
        """Open the bundle in a worker process.

        Args:
            max_length: positions a text-generation model must hold, if its own tokens of the data need no more.
            options: of the run.
            **settings: further ones of `Subject`.

        Raises:
            LlmfastError: the bundle can't be opened; the message names it.
        """
        if max_length is not None:
            own = (len(item.ids) for items in self.own_items.values() for item in items)
            max_length = max([max_length, *own])
        settings |= {"threads": self.threads, "max_length": max_length, "watts_per_core": options.watts_per_core}
        with self._named():
            provider = suit_provider(self.bundle, with_fallback(self.provider, options.allow_fallback))
            self.worker = Worker("llmfast.bench.subject:Subject", self.path, provider=provider, **settings)
        self.is_fresh = True
        facts = self.call("facts")
        if facts["note"] and not self.placement:
            report.note(f"note: `{self.label}`: {facts['note']}")
        self.vocab_size, self.placement = facts["vocab_size"], facts["placement"]
        self.energy_source = facts["energy_source"]

    def stop(self) -> None:
        """End the worker process."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the subject in the worker process.

        Raises:
            LlmfastError: as raised there, or of the process's death; the message names the bundle.
        """
        assert self.worker is not None
        with self._named():
            return self.worker.call(method, *args, **kwargs)

    def attempt(self, work: Callable[[], None]) -> bool:
        """Do something with this bundle; when it fails, the others go on without it.

        Returns:
            Whether it succeeded.

        Raises:
            LlmfastError: this is the baseline, without which there is nothing to compare with.
        """
        try:
            work()
        except LlmfastError as error:
            self.stop()
            if self.is_baseline:
                raise
            report.note(f"note: {error.message}: the others go on without it")
            self.failure = error
            for found in (self.figures, self.samples, self.latencies):
                found.clear()
        return self.failure is None

    def lacks(self, metric: ModuleType) -> str:
        """Return what this bundle has not and the metric needs, empty when it can be measured."""
        if metric.TASKS and self.task == UNKNOWN_TASK and UNKNOWN_TASK not in metric.TASKS:
            return "its task"
        if "example_inputs" in metric.NEEDS and "example_inputs" not in self.bundle.manifest.architecture:
            return "what its inputs are like"
        reads_files = self.task != UNKNOWN_TASK and hasattr(registry.load("tasks", self.task), "read_input")
        if "tokenizer" in metric.NEEDS and not reads_files and self.bundle.companion("tokenizer.json") is None:
            return "its tokenizer"
        if "vocab_size" in metric.NEEDS and self.placement and self.vocab_size is None:
            return "its vocabulary size"
        return ""

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (LlmfastError, RuntimeError) as error:
            failure = as_failure(error) if isinstance(error, RuntimeError) else error
            raise type(failure)(f"cannot bench `{self.label}`: {failure.message}", failure.hint) from error


def line_up(
    models: Sequence[Path] | Mapping[str, Path], baseline: Path | None, options: BenchOptions
) -> tuple[list[Contestant], Contestant]:
    """Open the manifests of all bundles and find the baseline, the first one when none is named.

    Every bundle takes part once per provider and number of threads; the baseline runs on the first of both.

    Raises:
        OptionError: no model at all.
        InputError: a bundle that is missing or malformed, or bundles of different tasks.
    """
    named = models if isinstance(models, Mapping) else name_models(models, baseline)
    bundles = [ModelBundle.open(path) for path in named.values()]
    ways = list(product(options.providers, numbers(options.threads) or (None,)))
    contestants = [
        Contestant(
            f"{label}{_spell_way(provider, count, ways)}",
            path,
            bundle,
            provider,
            resolve_threads(settings_for(bundle, provider, count).threads),
        )
        for label, path, bundle in zip(named, named.values(), bundles, strict=True)
        for provider, count in ways
    ]
    tasks = {one.task: one for one in contestants if one.task != UNKNOWN_TASK}
    if len(tasks) > 1:
        spelled = ", ".join(f"`{one.label}` is {task}" for task, one in tasks.items())
        raise InputError(f"models of different tasks: {spelled}", "bench them in separate runs")
    first = baseline or next(iter(named.values()))
    reference = next(one for one in contestants if one.path.resolve() == first.resolve())
    reference.is_baseline = True
    return contestants, reference


def name_models(models: Sequence[Path], baseline: Path | None) -> dict[str, Path]:
    """Return the models of a run by their names in its document, the baseline among them.

    Raises:
        OptionError: there is none.
        InputError: a bundle that is missing or malformed.
    """
    paths = list(models)
    if baseline is not None and baseline.resolve() not in [path.resolve() for path in paths]:
        paths.insert(0, baseline)
    if not paths:
        raise OptionError("no model to bench", "llmfast bench MODEL...")
    labels = _labels(paths, [ModelBundle.open(path) for path in paths])
    return dict(zip(labels, paths, strict=True))


def note_lacks(metric: ModuleType, name: str, contestants: Sequence[Contestant]) -> list[Contestant]:
    """Return the contestants that the metric can measure; say on stderr which it can't, and why."""
    able = []
    for one in contestants:
        if lack := one.lacks(metric):
            report.note(f"note: `{one.label}` has no {name} figures: {lack} is unknown")
        else:
            able.append(one)
    return able


def _spell_way(provider: str, threads: int | None, ways: Sequence[tuple[str, int | None]]) -> str:
    """Return what tells a bundle's ways of running apart, empty when there is one."""
    parts = [provider] if len({name for name, _ in ways}) > 1 else []
    parts += [f"{threads} threads"] if len({count for _, count in ways}) > 1 else []
    return f" [{', '.join(parts)}]" if parts else ""


def _labels(paths: Sequence[Path], bundles: Sequence[ModelBundle]) -> list[str]:
    """Return unique names: the bundle's own, its path where two are alike, a number where these are too."""
    names = [bundle.name for bundle in bundles]
    labels = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    seen: Counter[str] = Counter()
    for index, label in enumerate(labels):
        seen[label] += 1
        if seen[label] > 1:
            labels[index] = f"{label} ({seen[label]})"
    return labels
