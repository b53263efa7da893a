"""The tokens of one answer become its text, until an end token, a stop string or a limit."""

from collections.abc import Collection, Sequence
from typing import Literal

from llmfast.tokenizer import Tokenizer, TokenStream

FinishReason = Literal["stop", "length", "eos"]


class StopFilter:
    """Let text through up to the first stop string.

    Text that may be the beginning of a stop string is held back until it is known not to be. When
    several stop strings occur, the one that is complete first counts, so how the text was cut into
    pieces makes no difference.

    Args:
        stop: strings that end the text, none of them empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str) -> str:
        """Add text and return what can be shown; `found` says whether it ends there."""
        text = self._held + piece
        matches = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if matches:
            end, negative_length = min(matches)
            self.found = True
            self._held = ""
            return text[: end + negative_length]
        shown = len(text) - self._doubtful(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return the text held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _doubtful(self, text: str) -> int:
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for count in range(longest, 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop):
                return count
        return 0


class Answer:
    """An answer that grows token by token.

    Attributes:
        text: of the tokens so far, without the stop string.
        count: tokens so far, the end token not counted.
        finish_reason: None while it goes on.

    Args:
        tokenizer: decodes the tokens.
        prompt_ids: tokens that come before.
        limit: most tokens.
        stop: strings that end the answer and are not part of it.
        eos_ids: tokens that end the answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        limit: int,
        stop: Sequence[str] = (),
        eos_ids: Collection[int] = (),
    ) -> None:
        self.text = ""
        self.count = 0
        self.finish_reason: FinishReason | None = None
        self._stream = TokenStream(tokenizer, prompt_ids)
        self._filter = StopFilter(stop)
        self._limit = limit
        self._eos_ids = eos_ids

    def push(self, token: int) -> str:
        """Add a token and return the text that became certain, often empty or several words."""
        if token in self._eos_ids:
            self.finish_reason = "eos"
            piece = ""
        else:
            self.count += 1
            piece = self._filter.push(self._stream.push(token))
            if self._filter.found:
                self.finish_reason = "stop"
            elif self.count >= self._limit:
                self.finish_reason = "length"
        if self.finish_reason:
            piece += self._filter.flush()
        self.text += piece
        return piece
