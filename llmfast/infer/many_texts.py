"""Texts, images or recordings to labels, vectors and the like, in windows of lines."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from llmfast import registry
from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, LlmfastError, OptionError
from llmfast.infer.jsonl import Line
from llmfast.infer.stage import text_option
from llmfast.kept import keeping
from llmfast.tokenizer import require_bounded

# Lines that are sorted by length together, and at most lost when a run is cut off.
_WINDOW, _SEARCH_WINDOW = 512, 64
# What a line may say for itself; other options of a task are for all lines.
_LINE_OPTIONS = ("question", "query", "source_lang", "target_lang")


class Texts:
    """Answers lines with a model of any task but text generation.

    Args:
        bundle: the model.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads.
        options: of `infer` that hold for all lines.
    """

    def __init__(self, bundle: ModelBundle, provider: str, threads: int | None, **options: Any) -> None:
        self._bundle = bundle
        self._provider, self._threads = provider, threads
        self._options = options
        self._plugin = registry.load("tasks", bundle.manifest.task)
        self._text_field = text_option(bundle.manifest.task)
        if self._text_field == "document" and "top_k" in options:
            raise OptionError("--top-k: in a file of answers every document has one", "leave it out, sort by score")
        own = [name for name in _LINE_OPTIONS if name in self._plugin.INFER_OPTIONS]
        self.fields = ("id", self._text_field, *own)
        needed = self._plugin.needed_options(bundle) if hasattr(self._plugin, "needed_options") else ()
        self._needed = [name for name in needed if name not in options]
        # A search takes seconds for a line.
        self.window = _SEARCH_WINDOW if "num_beams" in self._plugin.INFER_OPTIONS else _WINDOW
        self._count = 0

    def check(self, line: Line) -> None:
        """Look at the form of a line, and at how long its texts are."""
        if self._text_field not in line.fields:
            raise InputError(f"`{self._text_field}` is missing")
        for name in self._needed:
            if name not in line.fields:
                raise InputError(f"`{name}` is missing, and so is --{name.replace('_', '-')}")
        for name in self.fields[1:]:
            text = line.fields.get(name, "")
            if not isinstance(text, str):
                raise InputError(f"`{name}` is not a text")
            require_bounded(text)

    @property
    def is_outgrown(self) -> bool:
        """False: nothing is kept open between windows that could be too small."""
        return False

    def run(
        self,
        lines: Iterator[Line | None],
        remaining: int,
        done: Callable[[Line, dict[str, Any]], None],
        failed: Callable[[Line, LlmfastError], None],
    ) -> None:
        """Answer lines; those of a window that have the same options go through the model together."""
        with keeping():
            while window := [line for line in islice(lines, self.window) if line is not None]:
                groups: dict[tuple[tuple[str, str], ...], list[Line]] = {}
                for line in window:
                    own = tuple((name, line.fields[name]) for name in self.fields[2:] if name in line.fields)
                    groups.setdefault(own, []).append(line)
                for own, group in groups.items():
                    self._answer(group, dict(own), done, failed)

    def speed(self, seconds: float) -> str:
        """Return how fast it goes, for people."""
        return f"{self._count / seconds:.0f} texts/s"

    def figures(self, seconds: float) -> dict[str, Any]:
        """Return counts and speed for the summary."""
        return {"texts_per_s": self._count / seconds}

    def _answer(
        self,
        lines: Sequence[Line],
        own: dict[str, str],
        done: Callable[[Line, dict[str, Any]], None],
        failed: Callable[[Line, LlmfastError], None],
    ) -> None:
        texts = [line.fields[self._text_field] for line in lines]
        try:
            answers = self._plugin.answer(
                self._bundle, texts, self._provider, self._threads, **{**self._options, **own}
            )
        except LlmfastError as error:
            is_of_lines = isinstance(error, InputError) or (own and isinstance(error, OptionError))
            if not is_of_lines:
                raise
            if len(lines) == 1:
                failed(lines[0], error)
                return
            half = len(lines) // 2  # until the line that it is about stands alone
            self._answer(lines[:half], own, done, failed)
            self._answer(lines[half:], own, done, failed)
            return
        for place, answer in enumerate(answers):
            self._count += 1
            # A ranking has another order, and says which line each answer is of.
            done(lines[answer.get("index", place)], _record(answer, self._text_field))


def _record(answer: dict[str, Any], text_field: str) -> dict[str, Any]:
    """Leave out what the input holds already, and what depends on the texts beside."""
    given = {"image", "audio", "index", "cosine", "question"}
    if text_field != "audio":  # of a recording, `text` is what was said
        given.add("text")
    return {name: value for name, value in answer.items() if name not in given}
