"""Texts as sources and targets of an encoder-decoder, and the search for the targets of many sources."""

from collections.abc import Iterator, Sequence

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.infer.rules import Rules, read_rules
from llmfast.infer.search import Found, search
from llmfast.infer.seq2seq import Seq2SeqEngine
from llmfast.tokenizer import Tokenizer

# Sources of one search.
_BATCH_SIZE = 16


class PairEncoder:
    """Encodes sources and the targets that are given for them.

    Args:
        bundle: an encoder-decoder of texts.
        limit: most tokens of either; what is longer is cut.

    Attributes:
        limit: the same, but no more than the model has positions.
        rules: of the model's own search, greedily.

    Raises:
        InputError: no tokenizer, or settings that don't say how a target starts.
    """

    def __init__(self, bundle: ModelBundle, limit: int) -> None:
        context_length = bundle.manifest.architecture.get("context_length")
        self.limit = min(limit, context_length or limit)
        self.rules = read_rules(bundle.path, context_length, num_beams=1)
        self._sources = Tokenizer.load(bundle.path)
        self._targets = Tokenizer.load_target(bundle.path)

    def source(self, text: str) -> np.ndarray:
        """Return the tokens of a source, int64 [n]."""
        return np.array(self._sources.encode(text)[: self.limit], np.int64)

    def target(self, text: str) -> np.ndarray:
        """Return the tokens of a target from the start token to the end token, int64 [n]."""
        return self.framed(self._targets.encode(text, add_special_tokens=False), is_ended=True)

    def framed(self, ids: Sequence[int], is_ended: bool) -> np.ndarray:
        """Return tokens behind the start token, and before the end token if they are the whole target, int64 [n]."""
        end = self.rules.eos_token_ids[:1] if is_ended else ()
        return np.array([self.rules.decoder_start_token_id, *ids, *end][: self.limit], np.int64)


def search_sources(
    engine: Seq2SeqEngine, rules: Rules, sources: Sequence[Sequence[int] | np.ndarray]
) -> Iterator[tuple[int, Found]]:
    """Find a target for each source, in batches of like length; yield it with the source's number.

    Raises:
        InputError: a source that is empty or longer than the model's positions.
    """
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    for start in range(0, len(order), _BATCH_SIZE):
        chosen = order[start : start + _BATCH_SIZE]
        engine.encode(*pad_sources([sources[index] for index in chosen], rules.pad_token_id))
        yield from zip(chosen, search(engine, rules), strict=True)


def pad_sources(sources: Sequence[Sequence[int] | np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and mask of sources, int64 [batch, longest], padded on the right."""
    ids = np.full((len(sources), max(map(len, sources))), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, source in enumerate(sources):
        ids[row, : len(source)] = source
        mask[row, : len(source)] = 1
    return ids, mask
