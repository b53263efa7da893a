"""An encoder-decoder under measurement: one source, one target, token by token, as a decoder's engine does it."""

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.infer.rules import read_rules
from llmfast.infer.seq2seq import Seq2SeqEngine


class Translator:
    """Takes prompts as sources; the prefill is the encoder and the first step of the decoder.

    Args:
        bundle: an encoder-decoder.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads.
        max_length: positions of a target.
    """

    note = ""  # nothing to say of how it runs

    def __init__(self, bundle: ModelBundle, provider: str, threads: int, max_length: int | None) -> None:
        self.engine = Seq2SeqEngine(bundle, provider, threads)
        rules = read_rules(bundle.path, self.engine.context_length, max_length)
        self.vocab_size = self.engine.vocab_size
        self.session = self.engine.session
        self.sessions = (self.engine.session, self.engine.encoder)
        self._capacity = rules.max_length
        self._start = rules.decoder_start_token_id

    def reset(self) -> None:
        """Do nothing: a prefill forgets what was before."""

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Encode a source, int64 [n], and return the logits of the target's first token, float32 [vocab]."""
        self.engine.encode(ids[None], np.ones((1, len(ids)), np.int64))
        self.engine.start(1, self._capacity)
        return self.decode(self._start)

    def decode(self, token: int) -> np.ndarray:
        """Append a token to the target and return the next one's logits, float32 [vocab]."""
        logits: np.ndarray = self.engine.decode(np.array([[token]]))[0]
        return logits

    def score_target(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Return the logits at every position of a target, int64 [n]: float32 [n, vocab]."""
        self.engine.encode(source[None], np.ones((1, len(source)), np.int64))
        logits: np.ndarray = self.engine.score(target[None])[0]
        return logits
