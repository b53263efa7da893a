"""The texts that a quantization runs on: read from a file or the set that llmfast ships, then cut into samples.

A file is plain UTF-8 text (for encoders one sample a line), or JSON lines: an object a line whose field holds a
text or a conversation, a list of `{"role", "content"}` that the model's chat template renders. For encoder-decoders it
may be `source<TAB>target` a line, or a table with the columns `source` and `reference`; for those that hear, a folder
of WAV files or a list of them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llmfast.bundle import TEXT_GENERATION, ModelBundle, sha256
from llmfast.errors import InputError, UnsupportedError
from llmfast.records import Records, is_json_lines
from llmfast.text import cut_windows, read_lines, read_text
from llmfast.tokenizer import Tokenizer

_TEXTS = Path(__file__).parent / "texts"
# Written for llmfast: encyclopedic and conversational prose, instructions, code, mathematics, in several languages.
SHIPPED = _TEXTS / "calibration.txt"
# More of the same kind, which nothing is ever calibrated on.
SHIPPED_HELD_OUT = _TEXTS / "held_out.txt"

_CHAT_FIELD = "messages"
_WAVE = ".wav"

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Corpus:
    """A text on disk.

    Attributes:
        path: the file, or a folder of recordings.
        field: of its JSON lines; those without it may have `messages`.
    """

    path: Path
    field: str = "text"

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        shipped = " (shipped with llmfast)" if self.path.parent == _TEXTS else ""
        return {"name": (self.path.name or self.path.resolve().name) + shipped, "sha256": self._digest()}

    def samples(self, bundle: ModelBundle, seq_len: int) -> list[np.ndarray]:
        """Return all the samples of the text, int64 [seq] each, in its order.

        Decoders get windows of `seq_len` tokens that follow one another, each begun as a text is; encoders each line,
        cut at `seq_len`.

        Raises:
            InputError: no tokenizer, or not one sample.
            UnsupportedError: a conversation, and the model has no chat template.
        """
        tokenizer = Tokenizer.load(bundle.path)
        if bundle.manifest.task != TEXT_GENERATION:
            length = min(bundle.longest_text(seq_len), seq_len)
            lines = tokenizer.encode_windows(self._lines(tokenizer), length)
            return [np.array(windows[0].ids, np.int64) for windows in lines]
        texts = self._texts(tokenizer)
        seq_len = min(seq_len, bundle.manifest.architecture.get("context_length", seq_len))
        # The stream begins as a text does; a rendered conversation has the special tokens that it needs.
        begins = [number == 0 and not text.is_rendered for number, text in enumerate(texts)]
        encoded = [tokenizer.encode(text.value, begin) for text, begin in zip(texts, begins, strict=True)]
        ids = [token for part in encoded for token in part]
        windows = cut_windows(ids, seq_len, tokenizer.prefix)
        if len(windows) == 0:
            raise InputError(
                f"text too short: `{self.path}` has {len(ids)} tokens, one window needs {seq_len}",
                "give more text or a shorter --seq-len",
            )
        return list(windows)

    def pairs(self, bundle: ModelBundle) -> list[tuple[str, str]]:
        """Return sources and their targets, for an encoder-decoder; targets are empty where the file has none.

        Raises:
            InputError: no tokenizer, no text, or a line of pairs that is none.
        """
        if Records.fits(self.path, "source", "reference"):
            return [(source, target) for source, target in Records(self.path, "source", "reference")]
        return [(line, "") for line in self._lines(Tokenizer.load(bundle.path))]

    def recordings(self) -> list[Path]:
        """Return the WAV files of a folder in the order of their names, the file itself, or those that it lists.

        A list has a path on each line, relative to its own folder.

        Raises:
            InputError: none, or one that is not there.
            UnsupportedError: a text that llmfast ships.
        """
        if self.path.parent == _TEXTS:
            raise UnsupportedError(
                "llmfast ships no recordings", "--calibration and --data take a folder of .wav files, or a list of them"
            )
        if self.path.is_dir():
            files = sorted(file for file in self.path.iterdir() if file.suffix.lower() == _WAVE)
            if not files:
                raise InputError(f"no .wav file in `{self.path}`", "convert recordings to WAV first")
            return files
        if self.path.suffix.lower() == _WAVE and self.path.is_file():
            return [self.path]
        files = [self.path.parent / line for line in read_lines(self.path)]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise InputError(
                f"no recording `{missing}`, which `{self.path}` lists", "each line is the path of a .wav file"
            )
        return files

    def _digest(self) -> str:
        """Return the SHA-256 of the file, or of the names and contents of a folder's recordings."""
        if not self.path.is_dir():
            return sha256(self.path)
        lines = [f"{sha256(file)}  {file.name}\n" for file in self.recordings()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _lines(self, tokenizer: Tokenizer) -> list[str]:
        if not is_json_lines(self.path):
            return read_lines(self.path)
        return [text.value.strip() for text in self._texts(tokenizer)]

    def _texts(self, tokenizer: Tokenizer) -> list["_Text"]:
        text = read_text(self.path)
        if not is_json_lines(self.path):
            return [_Text(text)]
        return [self._record(line, number, tokenizer) for number, line in _numbered(text)]

    def _record(self, line: str, number: int, tokenizer: Tokenizer) -> "_Text":
        where = f"`{self.path}`: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {where}", "JSON lines hold one object a line") from error
        if not isinstance(record, dict):
            raise InputError(f"not a JSON object: {where}", "JSON lines hold one object a line")
        value = record.get(self.field, record.get(_CHAT_FIELD))
        if isinstance(value, str) and value.strip():
            return _Text(value + "\n\n")
        if value and isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value):
            return _Text(tokenizer.apply_chat_template(value, add_generation_prompt=False), is_rendered=True)
        raise InputError(
            f"no text in field `{self.field}`: {where}",
            f"--calibration-field names the field; this line has: {', '.join(map(str, record)) or 'none'}",
        )


@dataclass(frozen=True)
class _Text:
    """A text, and whether a chat template made it of a conversation."""

    value: str
    is_rendered: bool = False


def pick(samples: Sequence[Sample], count: int, seed: int | None) -> tuple[list[Sample], list[Sample]]:
    """Divide samples into `count` to be used and the rest.

    Args:
        samples: in the text's order, which is kept.
        count: how many to use, at most.
        seed: picks them at random; None takes the first ones.
    """
    order = np.arange(len(samples)) if seed is None else np.random.default_rng(seed).permutation(len(samples))
    chosen, rest = np.sort(order[:count]), np.sort(order[count:])
    return [samples[index] for index in chosen], [samples[index] for index in rest]


def _numbered(text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
