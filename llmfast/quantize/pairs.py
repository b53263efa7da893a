"""Samples of an encoder-decoder: sources with their targets, and what the two graphs are fed with.

The decoder is fed with targets (teacher forcing) and with what the float encoder makes of their sources. Where a
file gives no targets, the float model writes them greedily: it is calibrated on what it will read at run time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import OptionError, UnsupportedError
from llmfast.graph.feeds import CROSS, CROSS_MASK, FEATURES, graph_inputs, sequence_feeds
from llmfast.graph.model import OnnxModel
from llmfast.infer.seq2seq import ROLES, Seq2SeqEngine
from llmfast.infer.sources import PairEncoder, search_sources
from llmfast.quantize.corpus import Corpus
from llmfast.quantize.spool import Spool
from llmfast.report import note, progress
from llmfast.residency import bounded_residency
from llmfast.runtime import open_session

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pair:
    """A source and its target.

    Attributes:
        source: its tokens, int64 [m].
        target: from the start token on, int64 [n]; None when nobody has written it yet.
    """

    source: np.ndarray
    target: np.ndarray | None


def is_encoder_decoder(graphs: Mapping[str, Any]) -> bool:
    """Return whether graphs, by role, are those of an encoder-decoder."""
    return set(graphs) == set(ROLES)


class PairReader:
    """Reads pairs for one model.

    Args:
        bundle: a float encoder-decoder.
        models: its graphs by role.

    Raises:
        UnsupportedError: its sources are no texts.
    """

    def __init__(self, bundle: ModelBundle, models: Mapping[str, OnnxModel]) -> None:
        if any(one.name == FEATURES for one in graph_inputs(models["encoder"].proto.graph)):
            raise UnsupportedError(
                f"the sources of `{bundle.path}` are recordings, which no text stands for",
                "choose what needs no calibration, e.g. --method rtn",
            )
        self._bundle = bundle

    def read(self, corpus: Corpus, seq_len: int) -> list[Pair]:
        """Return all pairs of a text; a longer source or target than `seq_len` is cut.

        Raises:
            InputError: no tokenizer, or no text.
            OptionError: a length that leaves no token of a target.
        """
        if seq_len < 2:
            raise OptionError(f"--seq-len {seq_len}: a target has a start token and one more", "at least 2")
        encoder = PairEncoder(self._bundle, seq_len)
        return [
            Pair(encoder.source(source), encoder.target(target) if target else None)
            for source, target in corpus.pairs(self._bundle)
        ]

    def complete(self, pairs: Sequence[Pair], seq_len: int, purpose: str) -> list[Pair]:
        """Return the pairs with the targets that the float model writes where they have none.

        Args:
            pairs: some of those read.
            seq_len: most tokens of a target.
            purpose: what they are for, as a note says it.
        """
        waiting = [number for number, pair in enumerate(pairs) if pair.target is None]
        done = list(pairs)
        if not waiting:
            return done
        encoder = PairEncoder(self._bundle, seq_len)
        rules = replace(encoder.rules, max_length=min(encoder.rules.max_length, encoder.limit))
        engine = Seq2SeqEngine(self._bundle)
        note(f"note: {len(waiting)} sources to {purpose} on have no target: the float model writes one for each")
        with progress("writing targets", len(waiting)) as advance:
            for place, found in search_sources(engine, rules, [pairs[number].source for number in waiting]):
                target = encoder.framed(found.ids, is_ended=found.finish_reason == "eos")
                done[waiting[place]] = replace(pairs[waiting[place]], target=target)
                advance()
        return done


def feed_pairs(models: Mapping[str, OnnxModel], pairs: Sequence[Pair]) -> dict[str, list[Values]]:
    """Return what each graph is fed with: role -> the inputs of each sample; large ones lie on disk.

    Args:
        models: the float graphs, `encoder` and `decoder`.
        pairs: with their targets.
    """
    encoder, decoder = (models[role] for role in ROLES)
    sources: list[Values] = [encoder_feeds(graph_inputs(encoder.proto.graph), pair) for pair in pairs]
    inputs = graph_inputs(decoder.proto.graph)
    session = open_session(encoder.path, spin=False, graph=encoder.proto.SerializeToString(), prepack=False)
    spool = Spool()
    targets: list[Values] = []
    with bounded_residency(encoder.path.parent):
        for number, (pair, source) in enumerate(zip(pairs, sources, strict=True)):
            feeds = decoder_feeds(inputs, pair, run_encoder(session, source))
            for name, value in feeds.items():
                spool.put(number, name, value)
            targets.append(spool.row(number, list(feeds)))
    return {"encoder": sources, "decoder": targets}


def encoder_feeds(inputs: Sequence[Any], pair: Pair) -> dict[str, np.ndarray]:
    """Return the encoder's inputs for one source."""
    return sequence_feeds(inputs, pair.source[None])


def run_encoder(session: Any, source: Values) -> dict[str, np.ndarray]:
    """Return what an encoder's session makes of a source, by the names that the decoder takes."""
    names = [output.name for output in session.get_outputs() if output.name.startswith(CROSS)]
    return dict(zip(names, session.run(names, dict(source)), strict=True))


def decoder_feeds(inputs: Sequence[Any], pair: Pair, encoded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the decoder's inputs for one target, which has logits for all its tokens but the first.

    Args:
        inputs: of the decoder's graph.
        pair: its target is known.
        encoded: what `run_encoder` made of its source.
    """
    assert pair.target is not None
    own = [one for one in inputs if one.name not in encoded and one.name != CROSS_MASK]
    mask = np.ones((1, next(iter(encoded.values())).shape[2]), np.int64)
    return {**sequence_feeds(own, pair.target[None, :-1]), CROSS_MASK: mask, **encoded}
