"""Several tokens a step: drafts that the model verifies at once, without changing what it answers.

A drafter guesses the next tokens; one step gives the model's logits after each of them, and tokens are then chosen
from these one after the other, exactly as without drafts: with the same random numbers where there is sampling. A
draft only decides how many of them one step yields. So the answer is that of plain decoding, greedy or sampled, as long
as a row's logits have the same bits in a step of several rows as in a step of its own. That is what
`llmfast.graph.verify` is for, and it is checked here, on the first step of every size.

Whether it pays is judged from what was accepted so far and from how long steps took; drafts that cost nothing are
judged silently while they don't. Sources: https://arxiv.org/abs/2211.17192 (speculative decoding),
https://github.com/apoorvumang/prompt-lookup-decoding.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmfast.infer.decoder import Decoder
from llmfast.infer.engine import Engine

# How long a step of so many rows takes, in plain steps, until it is measured: int4 and int8 SmolLM2, 500 tokens.
_COST = {2: 1.4, 4: 2.0, 8: 3.2}
# A step is speculated when it promises this many times the tokens per second of plain decoding.
_WORTH = 1.05
# Weight of what was seen before against the newest draft.
_MEMORY = 0.9
# Plain steps after which a drafter that costs time is tried again.
_RETRY = 32


@dataclass(frozen=True)
class Draft:
    """Guessed tokens, and what kind of guess they are: kinds are judged apart."""

    tokens: list[int]
    kind: int = 0


class Drafter(Protocol):
    """What guesses tokens. `is_free`: guessing takes no time to speak of."""

    is_free: bool

    def begin(self) -> None:
        """Forget all tokens: the next ones are those of another prompt."""

    def propose(self, tokens: Sequence[int], count: int) -> Draft:
        """Return at most `count` tokens that may follow `tokens`, which only grow from call to call."""


class PromptLookup:
    """Guesses what followed the last tokens where they occurred before, in the prompt or in the answer."""

    is_free = True
    _sizes = (4, 3, 2)  # tokens that must agree; the longest that is found counts

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget all tokens."""
        self._ends: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in self._sizes}
        self._known = 0

    def propose(self, tokens: Sequence[int], count: int) -> Draft:
        """Return what followed the latest occurrence; a repetition goes on repeating."""
        for end in range(self._known, len(tokens) - 1):  # the last tokens themselves are no earlier occurrence
            for size, ends in self._ends.items():
                if end + 1 >= size:
                    ends[tuple(tokens[end + 1 - size : end + 1])] = end
        self._known = max(self._known, len(tokens) - 1)
        for size, ends in self._ends.items():
            end = ends.get(tuple(tokens[-size:]), -1) if len(tokens) >= size else -1
            if end >= 0:
                draft = list(tokens[end + 1 : end + 1 + count])
                while len(draft) < count:
                    draft.append(draft[len(draft) - (len(tokens) - end - 1)])
                return Draft(draft, size)
        return Draft([])


class DraftModel:
    """Guesses what a smaller model with the same tokenizer would say.

    Args:
        decoder: its context is overwritten.
        vocab_size: tokens that both models know.
    """

    is_free = False

    def __init__(self, decoder: Decoder, vocab_size: int) -> None:
        self._decoder = decoder
        self._vocab_size = vocab_size
        self.begin()

    def begin(self) -> None:
        """Forget all tokens."""
        self._read: list[int] = []  # what the decoder's context holds
        self._sure = 0  # how many of these are not its own guesses

    def propose(self, tokens: Sequence[int], count: int) -> Draft:
        """Return the small model's greedy answer, fewer tokens where its context ends."""
        decoder = self._decoder
        count = min(count, decoder.capacity - len(tokens))
        if count < 1:
            return Draft([])
        same = self._sure
        while same < min(len(self._read), len(tokens) - 1) and self._read[same] == tokens[same]:
            same += 1
        decoder.rollback(same)
        logits = decoder.prefill(np.array(tokens[decoder.length :], np.int64))
        draft = [int(logits[: self._vocab_size].argmax())]
        while len(draft) < count:
            draft.append(int(decoder.decode(draft[-1])[: self._vocab_size].argmax()))
        self._read, self._sure = [*tokens, *draft[:-1]], len(tokens) - 1
        return Draft(draft)


class Speculation:
    """Steps of a decoder that may yield several tokens each.

    Args:
        engine: opened with the rows that it can verify.
        drafter: what guesses.
        even_if_inexact: go on when several rows get other bits than one; answers may then differ at near ties.

    Attributes:
        drafted: tokens that were verified.
        accepted: those of them that the model chose too.
        is_exact: False once a row's logits depended on the rows beside it.
    """

    def __init__(self, engine: Engine, drafter: Drafter, even_if_inexact: bool = False) -> None:
        self.drafted = 0
        self.accepted = 0
        self.is_exact = True
        self._engine = engine
        self._drafter = drafter
        self._even_if_inexact = even_if_inexact
        self._proven: set[int] = set()
        self._step_s: dict[int, float] = {}
        self._draft_s = 0.0
        self._plain_steps = 0
        self._hits: dict[int, tuple[float, float]] = {}
        self._pending = Draft([])

    def begin(self) -> None:
        """Start with another prompt; what is known of the model's steps stays."""
        self._drafter.begin()
        self.drafted = self.accepted = self._plain_steps = 0
        self._hits = {}
        self._pending = Draft([])

    def step(self, tokens: Sequence[int], choose: Callable[[np.ndarray], int]) -> list[int]:
        """Append the last of the tokens to the engine's context, and return those that follow: one or more.

        Args:
            tokens: everything so far, prompt included; all but the last are in the engine's context.
            choose: takes the next token of logits, float32 [vocab]; called once for every token returned.
        """
        draft, rows = self._plan(tokens)
        if rows == 1:
            self._plain_steps += 1
            start = time.perf_counter()
            logits = self._engine.decode(tokens[-1])
            self._note_time(1, time.perf_counter() - start)
            following = [choose(logits)]
            self._judge_silently(draft, following[0])
            return following
        self._plain_steps = 0
        self._pending = Draft([])
        draft = Draft(draft.tokens[: rows - 1], draft.kind)
        ids = np.array([tokens[-1], *draft.tokens, *[tokens[-1]] * (rows - 1 - len(draft.tokens))], np.int64)
        follow = self._verify if rows in self._proven else self._prove
        following = follow(ids, draft.tokens, choose)
        self.drafted += len(draft.tokens)
        self.accepted += len(following) - 1
        self._judge(draft.kind, len(following) - 1, len(following) <= len(draft.tokens))
        return following

    def _verify(self, ids: np.ndarray, draft: list[int], choose: Callable[[np.ndarray], int]) -> list[int]:
        length = self._engine.length
        start = time.perf_counter()
        logits = self._engine.verify(ids)
        self._note_time(len(ids), time.perf_counter() - start)
        following: list[int] = []
        for index, row in enumerate(logits[: len(draft) + 1]):
            following.append(choose(row))
            if index < len(draft) and following[-1] != draft[index]:
                break
        self._engine.rollback(length + len(following))
        return following

    def _prove(self, ids: np.ndarray, draft: list[int], choose: Callable[[np.ndarray], int]) -> list[int]:
        """Do what `_verify` does, but choose from steps of one row, and compare the bits."""
        engine, following = self._engine, list[int]()
        length = engine.length
        logits = engine.verify(ids).copy()
        engine.rollback(length)
        for index, expected in enumerate(logits[: len(draft) + 1]):
            row = engine.decode(int(ids[index]))
            self.is_exact = self.is_exact and np.array_equal(row, expected)
            following.append(choose(row))
            if index < len(draft) and following[-1] != draft[index]:
                break
        self._proven.add(len(ids))
        return following

    def _plan(self, tokens: Sequence[int]) -> tuple[Draft, int]:
        """Return a draft and how many rows the step has; 1 row when the draft is only judged."""
        engine, drafter = self._engine, self._drafter
        room = engine.capacity - engine.length
        sizes = [rows for rows in engine.verify_rows if rows <= room]
        if not sizes or not (self.is_exact or self._even_if_inexact):
            return Draft([]), 1
        if not drafter.is_free:
            rows = self._best_rows(0, max(sizes) - 1, sizes)
            if rows == 1:
                if self._plain_steps < _RETRY:
                    return Draft([]), 1
                rows = sizes[0]
            start = time.perf_counter()
            draft = drafter.propose(tokens, rows - 1)
            if draft.tokens:
                self._draft_s = _mean(self._draft_s, (time.perf_counter() - start) / len(draft.tokens))
            return draft, rows if draft.tokens else 1
        draft = drafter.propose(tokens, max(sizes) - 1)
        return draft, self._best_rows(draft.kind, len(draft.tokens), sizes)

    def _best_rows(self, kind: int, available: int, sizes: Sequence[int]) -> int:
        """Return the number of rows that promises the most tokens per second."""
        hits, misses = self._hits.get(kind, self._prior)
        rate = hits / (hits + misses)
        plain_s = self._step_s.get(1)
        best, best_gain = 1, _WORTH
        for rows in sizes:
            drafted = min(rows - 1, available)
            if drafted < 1:
                break
            cost = _COST.get(rows, rows / 2)
            if plain_s is not None:
                step_s = self._step_s.get(rows, cost * plain_s)
                cost = (step_s + drafted * self._draft_s) / plain_s
            gain = sum(rate**i for i in range(drafted + 1)) / cost
            if gain > best_gain:
                best, best_gain = rows, gain
            if drafted < rows - 1:
                break
        return best

    @property
    def _prior(self) -> tuple[float, float]:
        """Accepted and refused tokens before anything was seen; a free drafter first has to show what it can."""
        return (1.0, 2.0) if self._drafter.is_free else (3.0, 1.0)

    def _judge_silently(self, draft: Draft, token: int) -> None:
        """Judge the draft that stands since some step by the token that came."""
        pending = self._pending if self._pending.tokens else draft
        if pending.tokens and pending.tokens[0] == token:
            self._judge(pending.kind, 1, False)
            self._pending = Draft(pending.tokens[1:], pending.kind)
        elif pending.tokens:
            self._judge(pending.kind, 0, True)
            self._pending = Draft([])

    def _judge(self, kind: int, accepted: int, is_refused: bool) -> None:
        hits, misses = self._hits.get(kind, self._prior)
        self._hits[kind] = (_MEMORY * hits + accepted, _MEMORY * misses + is_refused)

    def _note_time(self, rows: int, seconds: float) -> None:
        known = self._step_s.get(rows)
        # A step that the machine interrupted says nothing about the model.
        self._step_s[rows] = seconds if known is None else _mean(known, min(seconds, 2 * known))


def _mean(known: float, new: float) -> float:
    """Return a mean that forgets."""
    return new if known == 0 else 0.8 * known + 0.2 * new
