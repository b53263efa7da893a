"""The model that lm-eval asks: texts become tokens here, and a bundle's process answers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmfast.bench.contestant import Contestant
from llmfast.bench.options import BenchOptions
from llmfast.errors import UnsupportedError
from llmfast.tokenizer import Tokenizer

# lm-eval's own default where a model does not say how long its context is.
_MAX_LENGTH = 2048
# Requests that go to the process at once: few enough for a progress bar that moves.
_AT_ONCE = 32

Item = TypeVar("Item")


class ContestantLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A bundle of the run as lm-eval sees it; tokens and cuts are those of lm-eval's own model for transformers.

    Args:
        contestant: the bundle; its process is started when something is asked, with a cache as long as that needs.
        options: of the run.
        report: takes how many requests are done, and of how many.
    """

    def __init__(self, contestant: Contestant, options: BenchOptions, report: Callable[[int, int], None]) -> None:
        super().__init__()
        self._contestant, self._options, self._report = contestant, options, report
        self._tokens = Tokenizer.load(contestant.bundle.path)
        self._capacity = 0
        self.max_length = int(contestant.bundle.manifest.architecture.get("context_length") or _MAX_LENGTH)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ids = [self._tokens.special_id("eos_token"), *self._tokens.eos_ids]
        found = next((one for one in ids if one is not None), None)
        if found is None:
            raise UnsupportedError(f"`{self._contestant.label}` has no end token, which lm-eval begins texts with")
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        begin = self._tokens.special_id("bos_token")
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return a text's tokens, by default with those that the model wants around it unless they are there."""
        begin = self._tokens.special_tokens.get("bos_token", "")
        is_begun = bool(begin) and string.startswith(begin)
        return self._tokens.encode(string, not is_begun if add_special_tokens is None else add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log p of continuations and whether greedy decoding would write them."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # no bar of its own
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        self._open(max((len(context) + len(continuation) for context, continuation in pairs), default=1))
        parts = [self._contestant.call("continuation_scores", part) for part in self._parts(pairs)]
        return [tuple(score) for part in parts for score in part]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log p of each whole text, in windows that fit the context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += score
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each prompt, up to a stop string, its end token or a limit."""
        prompts = []
        for request in requests:
            text, given = request.args
            settings = normalize_gen_kwargs(given)
            room = self.max_length - settings["max_gen_toks"]
            if room < 1:
                raise UnsupportedError(
                    f"a task wants {settings['max_gen_toks']} tokens of `{self._contestant.label}`, whose context "
                    f"holds {self.max_length}",
                    "leave the task out",
                )
            prompts.append((self.tok_encode(text)[-room:], settings))
        self._open(max((len(ids) + settings["max_gen_toks"] for ids, settings in prompts), default=1))
        return [text for part in self._parts(prompts) for text in self._contestant.call("continuations", part)]

    def _open(self, needed: int) -> None:
        """Start the bundle's process, anew where its cache is too short."""
        needed = min(needed, self.max_length)
        if self._contestant.worker is None or self._capacity < needed:
            self._contestant.stop()
            self._contestant.start(needed, self._options)
            self._capacity = needed

    def _parts(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        for start in range(0, len(items), _AT_ONCE):
            self._report(start, len(items))
            yield items[start : start + _AT_ONCE]
