"""The bundles of one run: their names, their worker processes, and what was measured of each."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from llmfast import registry, report
from llmfast.bench.options import BenchOptions
from llmfast.bundle import UNKNOWN_TASK, ModelBundle
from llmfast.errors import InputError, LlmfastError, OptionError
from llmfast.runtime import resolve_threads, suit_provider
from llmfast.worker import Worker


@dataclass(eq=False)
class Contestant:
    """One bundle of the run, and what was measured so far.

    Attributes:
        label: its name in the document, unique in the run.
        path: as the user typed it.
        bundle: its facts.
        worker: the process that holds it, None before `start`.
        vocab_size: token ids it accepts, None when unknown.
        placement: nodes per execution provider.
        figures: name -> figure, and `<name>_spread`, `<name>_ratio` where there are.
        samples: name -> one figure per round or unit.
    """

    label: str
    path: Path
    bundle: ModelBundle
    worker: Worker | None = None
    vocab_size: int | None = None
    placement: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """What the model is for."""
        return self.bundle.manifest.task

    def start(self, stack: ExitStack, options: BenchOptions, max_length: int | None) -> None:
        """Open the bundle in a worker process that lives as long as `stack`.

        Args:
            stack: closes the process.
            options: of the run.
            max_length: positions a text-generation model must hold.

        Raises:
            LlmfastError: the bundle can't be opened; the message names it.
        """
        settings = {"threads": resolve_threads(options.threads), "max_length": max_length}
        with self._named():
            provider = suit_provider(self.bundle, options.provider)
            worker = Worker("llmfast.bench.subject:Subject", self.path, provider=provider, **settings)
        self.worker = stack.enter_context(worker)
        facts = self.call("facts")
        self.vocab_size, self.placement = facts["vocab_size"], facts["placement"]
        if facts["note"]:
            report.note(f"note: `{self.label}`: {facts['note']}")

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the subject in the worker process.

        Raises:
            LlmfastError: as raised there, or of the process's death; the message names the bundle.
        """
        assert self.worker is not None
        with self._named():
            return self.worker.call(method, *args, **kwargs)

    def lacks(self, metric: ModuleType) -> str:
        """Return what this bundle has not and the metric needs, empty when it can be measured."""
        if metric.TASKS and self.task == UNKNOWN_TASK and UNKNOWN_TASK not in metric.TASKS:
            return "its task"
        if "example_inputs" in metric.NEEDS and "example_inputs" not in self.bundle.manifest.architecture:
            return "what its inputs are like"
        reads_files = self.task != UNKNOWN_TASK and hasattr(registry.load("tasks", self.task), "read_input")
        if "tokenizer" in metric.NEEDS and not reads_files and self.bundle.companion("tokenizer.json") is None:
            return "its tokenizer"
        if "vocab_size" in metric.NEEDS and self.worker is not None and self.vocab_size is None:
            return "its vocabulary size"
        return ""

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except LlmfastError as error:
            raise type(error)(f"cannot bench `{self.label}`: {error.message}", error.hint) from error


def line_up(models: Sequence[Path], baseline: Path | None) -> tuple[list[Contestant], Contestant]:
    """Open the manifests of all bundles and find the baseline, the first one when none is named.

    Raises:
        OptionError: no model at all.
        InputError: a bundle that is missing or malformed, or bundles of different tasks.
    """
    paths = list(models)
    if baseline is not None and baseline.resolve() not in [path.resolve() for path in paths]:
        paths.insert(0, baseline)
    if not paths:
        raise OptionError("no model to bench", "llmfast bench MODEL...")
    bundles = [ModelBundle.open(path) for path in paths]
    contestants = [
        Contestant(label, path, bundle)
        for label, path, bundle in zip(_labels(paths, bundles), paths, bundles, strict=True)
    ]
    tasks = {one.task: one for one in contestants if one.task != UNKNOWN_TASK}
    if len(tasks) > 1:
        spelled = ", ".join(f"`{one.label}` is {task}" for task, one in tasks.items())
        raise InputError(f"models of different tasks: {spelled}", "bench them in separate runs")
    first = baseline or paths[0]
    return contestants, next(one for one in contestants if one.path.resolve() == first.resolve())


def check_lengths(contestants: Sequence[Contestant], lengths: dict[str, int]) -> None:
    """Refuse lengths that a bundle's context does not hold.

    Args:
        contestants: the bundles.
        lengths: flag as typed -> tokens.

    Raises:
        OptionError: a length over a bundle's context length.
    """
    for one in contestants:
        context = one.bundle.manifest.architecture.get("context_length")
        for flag, tokens in lengths.items():
            if context is not None and tokens > context:
                raise OptionError(f"{flag}: {tokens} tokens, `{one.label}` holds {context}", "ask for fewer")


def note_lacks(metric: ModuleType, name: str, contestants: Sequence[Contestant]) -> list[Contestant]:
    """Return the contestants that the metric can measure; say on stderr which it can't, and why."""
    able = []
    for one in contestants:
        if lack := one.lacks(metric):
            report.note(f"note: `{one.label}` has no {name} figures: {lack} is unknown")
        else:
            able.append(one)
    return able


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
