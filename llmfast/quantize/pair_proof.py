"""How far a quantized encoder-decoder's predictions moved: both graphs run, on pairs of sources and targets."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, UnsupportedError
from llmfast.graph.model import OnnxModel
from llmfast.infer.seq2seq import ROLES
from llmfast.quantize.comparison import Comparison
from llmfast.quantize.measure import SEQ_LEN, Proof, ProofText, RowsOf, input_rows
from llmfast.quantize.pairs import (
    Pair,
    decoder_feeds,
    encoder_feeds,
    feed_pairs,
    is_encoder_decoder,
    make_reader,
    run_encoder,
    takes_recordings,
)
from llmfast.quantize.workpiece import Workpiece
from llmfast.report import note, progress
from llmfast.residency import bounded_residency
from llmfast.runtime import open_session


class PairProof:
    """The comparison of a quantized encoder-decoder with its float one: predictions of given targets.

    Args:
        bundle: the float bundle.
        models: its graphs by role.
        text: the text to compare on.

    Attributes:
        text: what the manifest says of the text.

    Raises:
        InputError: too little text, no tokenizer, or no recordings.
        UnsupportedError: the model's sources are recordings, and the text is one that llmfast ships.
    """

    def __init__(self, bundle: ModelBundle, models: Mapping[str, OnnxModel], text: ProofText) -> None:
        reader = make_reader(bundle, models)
        corpus, chosen = text.choose(reader.read)
        self._pairs = reader.complete(chosen, SEQ_LEN, "compare")
        self.text = {**corpus.describe(), "num_samples": len(chosen)}
        self._folder = bundle.path
        # As they are now: transforms change them.
        self._graphs = [(models[role].path, models[role].proto.SerializeToString()) for role in ROLES]
        self._first = feed_pairs(models, self._pairs[:1])

    def inputs_of(self, role: str, workpiece: Workpiece) -> RowsOf:
        """Return what gives some rows of each layer's input, asked for in the graph's order, on the first pair."""
        return input_rows(workpiece, self._first[role])

    def compare(self, candidates: Mapping[str, OnnxModel]) -> dict[str, dict[str, float]]:
        """Run both models on the same pairs, each with its own encoder's states; return the figures, the decoder's."""
        start = time.perf_counter()
        # Weights as they lie in the file: ordered for speed they would take the float model's size in memory.
        theirs = [open_session(path, spin=False, graph=graph, prepack=False) for path, graph in self._graphs]
        ours = [open_session(candidates[role].path, spin=False) for role in ROLES]
        comparison = Comparison(["logits"], predicts_tokens=True)
        with bounded_residency(self._folder), progress("comparing with the float model", len(self._pairs)) as advance:
            for pair in self._pairs:
                assert pair.target is not None
                values = {"input_ids": pair.target[None]}
                comparison.add(values, [_predict(ours, pair)], [_predict(theirs, pair)])
                advance()
        seconds = time.perf_counter() - start
        note(f"compared with the float model on {len(self._pairs)} samples of {self.text['name']}: {seconds:.1f} s")
        return {"decoder": comparison.figures()}


def _predict(sessions: Sequence[Any], pair: Pair) -> np.ndarray:
    """Return what encoder and decoder say of a target's tokens behind the first, logits [1, n - 1, vocab]."""
    encoder, decoder = sessions
    encoded = run_encoder(encoder, encoder_feeds(encoder.get_inputs(), pair))
    logits: np.ndarray
    (logits,) = decoder.run(["logits"], decoder_feeds(decoder.get_inputs(), pair, encoded))
    return logits


def make_proof(
    bundle: ModelBundle, models: Mapping[str, OnnxModel], text: ProofText, by_all: bool = False
) -> Proof | PairProof:
    """Return the comparison that suits a bundle; of an encoder-decoder without recordings to hear, the encoder's alone.

    Args:
        bundle, models, text: as of both.
        by_all: an encoder's answers alone will not do.

    Raises:
        InputError, UnsupportedError: a text was named, and can't be used; or none can, and the encoder will not do.
    """
    if is_encoder_decoder(models):
        # Recordings that were all calibrated on leave none over, and llmfast ships none.
        is_named = text.data is not None if takes_recordings(models) else text.is_named
        try:
            return PairProof(bundle, models, text)
        except (InputError, UnsupportedError) as error:
            if is_named:
                raise
            if by_all:
                raise type(error)(
                    f"a budget compares what both graphs answer: {error.message}",
                    "name samples with --data, or leave some of the calibration's over with --num-samples",
                ) from error
            note(f"note: the encoder alone is compared: {error.message}")
            text = replace(text, calibration=replace(text.calibration, path=None))  # recordings are no text for it
    return Proof(bundle, models, text)
