"""Continuous batching: requests come and go, and every step serves all that are under way.

A step is either one prompt, read into a free row, or one token for every row. Rows that answer are always the first
ones: when a row falls free and nobody waits, the last one moves into it, so no step computes an idle row.

A prompt that begins like one that a row still holds, an answered one too, is computed from where they part; the
common positions are copied. So a system prompt that all requests share is computed once.

Answers do not depend on the neighbours: in a kernel whose sums run over one row alone, in an order that the number of
rows does not change, a row of a batch gets the bits that it gets alone. ONNX Runtime's CPU kernels for float32 and int8
are such, with AVX-512 those for 4-bit blocks of 32 too; others use another kernel for two rows than for one.
As that depends on processor and version, it is not believed but audited: steps 1, 2, 4, 8, ... compute one of their
rows again, alone, and `exact` says whether all gave the same bits. So does the first prompt that begins with a copy.
"""

import time
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace

import numpy as np

from llmfast.errors import InputError, LlmfastError
from llmfast.infer.answer import Answer
from llmfast.infer.decoder import common_beginning
from llmfast.infer.generate import MAX_TOKENS, Generation, check_limits
from llmfast.infer.rows import Rows
from llmfast.infer.sampling import Sampling, sample
from llmfast.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it.

    Attributes:
        id: names the request in events; unique among those under way.
        prompt_ids: int64 [n].
        max_tokens: most tokens of the answer.
        sampling: how tokens are chosen.
        stop: strings that end the answer and are not part of it.
    """

    id: Hashable
    prompt_ids: np.ndarray
    max_tokens: int = MAX_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()


@dataclass(frozen=True)
class Event:
    """What a step did for a request: one token, or the reason why there is none.

    Attributes:
        id: of the request.
        text: what became certain, often empty.
        is_first: the prompt has been read.
        generation: the whole answer, with the last event of a request; `ttft_s` counts from `submit`.
        error: why there is no answer; the last event too.
    """

    id: Hashable
    text: str = ""
    is_first: bool = False
    generation: Generation | None = None
    error: LlmfastError | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing more happens to the request."""
        return self.generation is not None or self.error is not None


@dataclass
class _Active:
    """A request in a row."""

    request: Request
    answer: Answer
    rng: np.random.Generator
    seen: set[int]
    length: int  # positions of the cache
    token: int  # to append next
    submitted: float
    first: float  # when the first token was there


@dataclass
class Counts:
    """What a batch has done.

    Attributes:
        prompt_tokens: of the prompts read.
        shared_tokens: of these, how many were copied from another row.
        generated_tokens: chosen, end tokens not counted.
        steps: decode steps.
        audited: rows computed again, alone.
        differing: of these, how many gave other bits.
    """

    prompt_tokens: int = 0
    shared_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    audited: int = 0
    differing: int = 0

    @classmethod
    def total(cls, counts: Iterable["Counts"]) -> "Counts":
        """Return the sum of several."""
        return cls(*map(sum, zip(*map(astuple, [cls(), *counts]), strict=True)))


@dataclass
class Batch:
    """Requests over the rows of one model.

    Args:
        rows: the model's.
        tokenizer: ids beyond its vocabulary are never chosen; its end tokens end answers.
        counts: what the batch has done, kept up to date.
    """

    rows: Rows
    tokenizer: Tokenizer
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._waiting: deque[tuple[Request, float]] = deque()
        self._active: list[_Active | None] = [None] * self.rows.count
        self._held = [np.zeros(0, np.int64)] * self.rows.count  # the prompt at the beginning of each row
        self._vocab_size = min(self.tokenizer.vocab_size, self.rows.vocab_size)
        self._has_shared = False

    @property
    def exact(self) -> bool:
        """Whether every row computed again gave the bits that it gave among the others."""
        return self.counts.differing == 0

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that have a row."""
        return sum(entry is not None for entry in self._active)

    def check(self, request: Request) -> None:
        """Refuse what can't be answered.

        Raises:
            OptionError: max_tokens below 1, or an empty stop string.
            InputError: the prompt is empty, too long, or of another model's tokens.
        """
        check_limits(request.max_tokens, request.stop)
        check_prompt(request.prompt_ids, self.rows.capacity, self.rows.vocab_size)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            OptionError, InputError: as `check`.
        """
        self.check(request)
        self._waiting.append((request, time.perf_counter()))

    def cancel(self, request_id: Hashable) -> bool:
        """Drop a request, waiting or under way; return whether there was one."""
        before = self.waiting + self.active
        self._waiting = deque(entry for entry in self._waiting if entry[0].id != request_id)
        self._active = [None if entry and entry.request.id == request_id else entry for entry in self._active]
        return self.waiting + self.active < before

    def step(self) -> list[Event]:
        """Read one prompt, or else append a token to every row; no event when there is nothing to do."""
        if self._waiting and None in self._active:
            return [self._admit(self._active.index(None), *self._waiting.popleft())]
        self._close_ranks()
        return self._decode() if self.active else []

    def _admit(self, row: int, request: Request, submitted: float) -> Event:
        ids = request.prompt_ids
        logits = self._prefill(row, ids)
        self._held[row] = ids
        self.counts.prompt_tokens += len(ids)
        limit = min(request.max_tokens, self.rows.capacity - len(ids))
        answer = Answer(self.tokenizer, ids.tolist(), limit, request.stop, self.tokenizer.eos_ids)
        rng = np.random.default_rng(request.sampling.seed)
        entry = _Active(request, answer, rng, set(ids.tolist()), len(ids), 0, submitted, 0.0)
        self._active[row] = entry
        event = self._choose(row, entry, logits)
        entry.first = time.perf_counter()
        return replace(event, is_first=True)

    def _prefill(self, row: int, ids: np.ndarray) -> np.ndarray:
        """Read a prompt into a row, copying what another row holds of it."""
        source, shared = self._longest_beginning(row, ids)
        if source != row:
            self.rows.copy(source, row, shared)
        logits = self.rows.prefill(row, ids, shared)
        self.counts.shared_tokens += shared
        if shared and not self._has_shared:
            self._has_shared = True
            logits = self._audit(logits, self.rows.prefill(row, ids))
        return logits

    def _longest_beginning(self, row: int, ids: np.ndarray) -> tuple[int, int]:
        """Return the row that holds most of a prompt's beginning, and how many positions of it."""
        if not self.rows.resumes_prompts:
            return row, 0
        lengths = [common_beginning(held, ids) for held in self._held]
        longest = max(lengths)
        source = row if lengths[row] == longest else lengths.index(longest)
        return source, longest

    def _close_ranks(self) -> None:
        """Move the last rows into free ones, until those that answer are the first."""
        count = self.active
        free = [row for row in range(count) if self._active[row] is None]
        for row in range(count, len(self._active)):
            entry = self._active[row]
            if entry is not None:
                target = free.pop()
                self.rows.copy(row, target, entry.length)
                self._active[target], self._active[row] = entry, None
                self._held[target] = self._held[row]

    def _decode(self) -> list[Event]:
        entries = [entry for entry in self._active if entry is not None]
        tokens, lengths = [entry.token for entry in entries], [entry.length for entry in entries]
        logits = self.rows.decode(tokens, lengths)
        self.counts.steps += 1
        steps = self.counts.steps
        if len(entries) > 1 and steps & (steps - 1) == 0:
            row = steps.bit_length() % len(entries)
            logits = logits.copy()
            logits[row] = self._audit(logits[row], self.rows.decode([tokens[row]], [lengths[row]], row)[0])
        events = []
        for row, entry in enumerate(entries):
            entry.seen.add(entry.token)
            entry.length += 1
            events.append(self._choose(row, entry, logits[row]))
        return events

    def _audit(self, together: np.ndarray, alone: np.ndarray) -> np.ndarray:
        self.counts.audited += 1
        self.counts.differing += not np.array_equal(together, alone)
        return alone

    def _choose(self, row: int, entry: _Active, logits: np.ndarray) -> Event:
        """Choose a request's next token; its row falls free with the last one."""
        request, answer = entry.request, entry.answer
        try:
            entry.token = sample(logits[: self._vocab_size], request.sampling, entry.rng, entry.seen)
        except LlmfastError as error:
            self._active[row] = None
            return Event(request.id, error=error)
        before = answer.count
        text = answer.push(entry.token)
        self.counts.generated_tokens += answer.count - before
        if answer.finish_reason is None:
            return Event(request.id, text)
        self._active[row] = None
        now = time.perf_counter()
        first = entry.first or now
        steps = entry.length - len(request.prompt_ids)
        speed = steps / (now - first) if steps else None
        generation = Generation(
            answer.text, len(request.prompt_ids), answer.count, first - entry.submitted, speed, answer.finish_reason
        )
        return Event(request.id, text, generation=generation)


def check_prompt(ids: np.ndarray, capacity: int, vocab_size: int) -> None:
    """Refuse a prompt that can't be answered.

    Args:
        ids: int64 [n].
        capacity: positions that prompt and answer may take together.
        vocab_size: tokens that the model knows.

    Raises:
        InputError: it has no token, leaves no room for an answer, or holds a token the model does not know.
    """
    if len(ids) == 0:
        raise InputError("empty prompt: it has no token")
    if len(ids) >= capacity:
        excess = len(ids) + 1 - capacity
        raise InputError(
            f"prompt too long: {len(ids)} tokens, the context holds {capacity} with the answer; {excess} too many",
            "shorten it",
        )
    if int(ids.max()) >= vocab_size:
        raise InputError(
            f"token {int(ids.max())} is not in the model: its vocabulary has {vocab_size}",
            "the tokenizer belongs to another model",
        )
