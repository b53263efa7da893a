"""Samples of an encoder-decoder: sources with their targets, and what the two graphs are fed with.

The decoder is fed with targets (teacher forcing) and with what the float encoder makes of their sources. Where a
file gives no targets, as with recordings, the float model writes them greedily: it is calibrated on what it will read
at run time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import OptionError
from llmfast.graph.feeds import CROSS, CROSS_MASK, FEATURES, graph_inputs, sequence_feeds
from llmfast.graph.model import OnnxModel
from llmfast.infer.recordings import Recording, SpokenPrompt, search_recordings
from llmfast.infer.seq2seq import ROLES, Seq2SeqEngine
from llmfast.infer.sources import PairEncoder, search_sources
from llmfast.quantize.corpus import Corpus
from llmfast.quantize.spool import Spool
from llmfast.report import note, progress
from llmfast.residency import bounded_residency
from llmfast.runtime import open_session
from llmfast.spectrogram import SpectrogramProcessor
from llmfast.text import read_text

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pair:
    """A source and its target.

    Attributes:
        source: its tokens, int64 [m], or a recording.
        target: from the start token on, int64 [n]; None when nobody has written it yet.
    """

    source: np.ndarray | Recording
    target: np.ndarray | None


def is_encoder_decoder(graphs: Mapping[str, Any]) -> bool:
    """Return whether graphs, by role, are those of an encoder-decoder."""
    return set(graphs) == set(ROLES)


def takes_recordings(models: Mapping[str, OnnxModel]) -> bool:
    """Return whether graphs, by role, are those of an encoder-decoder whose sources are spectrograms."""
    encoder = models.get("encoder")
    return encoder is not None and any(one.name == FEATURES for one in graph_inputs(encoder.proto.graph))


def check_data(files: Iterable[Path | None], models: Mapping[str, OnnxModel]) -> None:
    """Refuse files that are no texts, or no recordings where the graphs, by role, hear those.

    Raises:
        InputError: missing or malformed.
    """
    hears = takes_recordings(models)
    for file in filter(None, files):
        if hears:
            Corpus(file).recordings()
        else:
            read_text(file)


def make_reader(bundle: ModelBundle, models: Mapping[str, OnnxModel]) -> "PairReader | RecordingReader":
    """Return what reads the pairs of a float encoder-decoder, given its graphs by role."""
    return RecordingReader(bundle) if takes_recordings(models) else PairReader(bundle)


class PairReader:
    """Reads texts and their targets for one model.

    Args:
        bundle: a float encoder-decoder.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        self._bundle = bundle

    def read(self, corpus: Corpus, seq_len: int) -> list[Pair]:
        """Return all pairs of a text; a longer source or target than `seq_len` is cut.

        Raises:
            InputError: no tokenizer, or no text.
            OptionError: a length that leaves no token of a target.
        """
        _check_length(seq_len)
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
        sources = [pair.source for pair in pairs if pair.target is None and isinstance(pair.source, np.ndarray)]
        with progress("writing targets", len(waiting)) as advance:
            for place, found in search_sources(engine, rules, sources):
                target = encoder.framed(found.ids, is_ended=found.finish_reason == "eos")
                done[waiting[place]] = replace(pairs[waiting[place]], target=target)
                advance()
        return done


class RecordingReader:
    """Finds recordings for one model, and lets it write down what is said in them.

    Args:
        bundle: a float encoder-decoder of spectrograms.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        self._bundle = bundle

    def read(self, corpus: Corpus, seq_len: int) -> list[Pair]:
        """Return a pair without a target for each recording, none of which is opened yet.

        Raises:
            InputError: no recordings, or no preprocessor_config.json.
            OptionError: a length that leaves no token of a target.
            UnsupportedError: a text that llmfast ships, or a processor that is not understood.
        """
        _check_length(seq_len)
        files = corpus.recordings()
        processor = SpectrogramProcessor.load(self._bundle.path)
        return [Pair(Recording(file, processor), None) for file in files]

    def complete(self, pairs: Sequence[Pair], seq_len: int, purpose: str) -> list[Pair]:
        """Return the pairs with what the float model hears; arguments as those of `PairReader.complete`.

        Raises:
            InputError: a file that can't be read, is too long or of another sampling rate.
        """
        recordings = [pair.source for pair in pairs if isinstance(pair.source, Recording)]
        engine, folder = Seq2SeqEngine(self._bundle), self._bundle.path
        spoken = SpokenPrompt.load(folder)
        note(f"note: the float model writes down {len(recordings)} recordings to {purpose} on")
        done = []
        with progress("writing targets", len(recordings)) as advance:
            transcripts = search_recordings(engine, folder, spoken, recordings, num_beams=1)
            for recording, transcript in zip(recordings, transcripts, strict=True):
                done.append(Pair(recording, transcript.tokens[:seq_len]))
                advance()
        return done


def _check_length(seq_len: int) -> None:
    if seq_len < 2:
        raise OptionError(f"--seq-len {seq_len}: a target has a start token and one more", "at least 2")


def feed_pairs(models: Mapping[str, OnnxModel], pairs: Sequence[Pair]) -> dict[str, list[Values]]:
    """Return what each graph is fed with: role -> the inputs of each sample; large ones lie on disk.

    Args:
        models: the float graphs, `encoder` and `decoder`.
        pairs: with their targets.
    """
    encoder = models["encoder"]
    inputs = {role: graph_inputs(models[role].proto.graph) for role in ROLES}
    session = open_session(encoder.path, spin=False, graph=encoder.proto.SerializeToString(), prepack=False)
    spools = {role: Spool() for role in ROLES}
    rows: dict[str, list[Values]] = {role: [] for role in ROLES}
    with bounded_residency(encoder.path.parent):
        for number, pair in enumerate(pairs):
            source = encoder_feeds(inputs["encoder"], pair)
            target = decoder_feeds(inputs["decoder"], pair, run_encoder(session, source))
            for role, feeds in zip(ROLES, (source, target), strict=True):
                for name, value in feeds.items():
                    spools[role].put(number, name, value)
                rows[role].append(spools[role].row(number, list(feeds)))
    return rows


def encoder_feeds(inputs: Sequence[Any], pair: Pair) -> dict[str, np.ndarray]:
    """Return the encoder's inputs for one source."""
    if isinstance(pair.source, Recording):
        return {FEATURES: pair.source.read()[None]}
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
