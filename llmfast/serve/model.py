"""What runs in the server's child process: the model, and the requests that are under way in it."""

import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmfast import registry
from llmfast.bundle import TEXT_GENERATION, UNKNOWN_TASK, ModelBundle
from llmfast.errors import LlmfastError, OptionError, UnsupportedError
from llmfast.infer.batch import Event
from llmfast.infer.decoder import context_length
from llmfast.infer.jsonl import Line
from llmfast.infer.lanes import Lanes
from llmfast.infer.opening import open_lanes
from llmfast.infer.requests import RequestReader
from llmfast.kept import keeping
from llmfast.runtime import suit_provider
from llmfast.tokenizer import Tokenizer

FEATURE_EXTRACTION = "feature-extraction"
# Positions of a row, for prompt and answer together, where the model would allow more.
DEFAULT_CONTEXT = 4096
# Requests answered at once, where nobody says how many: more would slow each other's tokens down.
DEFAULT_ROWS = 32
# A turn without news ends after so long, for requests that came meanwhile; one with news waits for more, since every
# turn costs time on the cores that compute. Nobody waits for the first or the last token of an answer, though.
_LONGEST_TURN_S, _GATHERING_S = 0.05, 0.02

Submitted = tuple[Hashable, Mapping[str, Any]]


@dataclass(frozen=True)
class Facts:
    """What the parent has to know of the model.

    Attributes:
        name: the bundle's.
        task: text-generation or feature-extraction.
        rows: requests answered at once.
        capacity: tokens of a prompt with its answer, or of a text.
        description: a line for people.
    """

    name: str
    task: str
    rows: int
    capacity: int
    description: str


class ServedModel:
    """A model that answers in turns.

    Args:
        path: the bundle.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads.
        batch_size: requests at once; None takes `DEFAULT_ROWS`, or as many as fit half of the free memory.
        context_length: tokens of a prompt with its answer; None takes the model's, up to `DEFAULT_CONTEXT`.

    Raises:
        OptionError: a context that the model does not have, or one for a model that has no batch.
        UnsupportedError: the model has another task, or the provider is known to run its number format slowly.
        ResourceError: the KV cache does not fit.
    """

    def __init__(
        self, path: Path, provider: str, threads: int | None, batch_size: int | None, context_length: int | None
    ) -> None:
        self._bundle = ModelBundle.open(path)
        self._provider, self._threads = suit_provider(self._bundle, provider), threads
        task = self._bundle.manifest.task
        self._task = TEXT_GENERATION if task == UNKNOWN_TASK else task
        self._kept = ExitStack()
        if self._task == FEATURE_EXTRACTION:
            for name, value in (("batch-size", batch_size), ("context-length", context_length)):
                if value is not None:
                    raise OptionError(f"--{name} is for text-generation; `{path}` is for {self._task}")
            self._tokenizer = Tokenizer.load(self._bundle.path)
            self._kept.enter_context(keeping())
            self.embed(["start"])  # opens the session, and finds what is wrong with it before anybody asks
        elif self._task == TEXT_GENERATION:
            self._open_decoder(batch_size, context_length)
        else:
            raise UnsupportedError(
                f"`{path}` can't be served: its task is {task}", "text-generation and feature-extraction can"
            )

    def describe(self) -> Facts:
        """Return what the parent has to know."""
        if self._task == FEATURE_EXTRACTION:
            return Facts(self._bundle.name, self._task, 1, self._bundle.longest_text(), "embeddings")
        return Facts(self._bundle.name, self._task, self._lanes.rows, self._lanes.capacity, str(self._plan))

    def turn(self, submitted: Sequence[Submitted], cancelled: Sequence[Hashable]) -> list[Event]:
        """Take requests in, drop others, and wait for what happens; the model goes on between two turns.

        Args:
            submitted: id and fields of a request, as `RequestReader` takes them.
            cancelled: ids of requests that nobody waits for any more.

        Returns:
            What happened, perhaps nothing yet; a request that is refused has an event with its error.
        """
        events = []
        for name in cancelled:
            self._lanes.cancel(name)
        for name, fields in submitted:
            try:
                reader = self._readers["messages" in fields]
                self._lanes.submit(replace(reader.read(Line(1, 0, fields)), id=name))
            except LlmfastError as error:
                events.append(Event(name, error=error))
        return events or self._gather()

    def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """Return the vector of each text, and the tokens that the model has read of them."""
        plugin = registry.load("tasks", FEATURE_EXTRACTION)
        answers = plugin.answer(self._bundle, texts, self._provider, self._threads)
        encoded = self._tokenizer.encode_windows(texts, self._bundle.longest_text())
        # Of a text that is longer the first window is read.
        return [answer["embedding"].tolist() for answer in answers], sum(len(windows[0]) for windows in encoded)

    def _gather(self) -> list[Event]:
        events = self._lanes.wait(_LONGEST_TURN_S)
        end = time.monotonic() + _GATHERING_S
        while events and not any(event.is_first or event.is_last for event in events):
            if (left := end - time.monotonic()) <= 0:
                break
            events += self._lanes.wait(left)
        return events

    def _open_decoder(self, batch_size: int | None, limit: int | None) -> None:
        longest = context_length(self._bundle)
        if limit is not None and not 2 <= limit <= longest:
            raise OptionError(f"--context-length {limit}: must be 2 to {longest}, the model's")
        capacity = limit or min(longest, DEFAULT_CONTEXT)
        tokenizer = Tokenizer.load(self._bundle.path)
        rows, self._plan = open_lanes(
            self._bundle,
            self._provider,
            self._threads,
            capacity,
            most_rows=batch_size or DEFAULT_ROWS,
            batch_size=batch_size,
            fast_alone=True,
        )
        # A prompt is gone on with as it is; messages go through the chat template.
        self._readers = {is_chat: RequestReader(tokenizer, raw=not is_chat) for is_chat in (False, True)}
        self._lanes = Lanes(rows, tokenizer)
