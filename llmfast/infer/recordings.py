"""Recordings as sources of an encoder-decoder: what a text begins with, and the search for what is said in many."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.bundle import read_json
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.infer.rules import read_rules
from llmfast.infer.search import Found, search
from llmfast.infer.seq2seq import Seq2SeqEngine
from llmfast.spectrogram import SpectrogramProcessor

# Recordings of one search.
_BATCH_SIZE = 4


@dataclass(frozen=True)
class Recording:
    """A WAV file, read when it is listened to.

    Attributes:
        path: the file.
        processor: makes the model's input of it.
    """

    path: Path
    processor: SpectrogramProcessor

    def read(self) -> np.ndarray:
        """Return its spectrogram, float32 [bands, frames]; raises what the processor's `read` does."""
        return self.processor.read(self.path)


@dataclass(frozen=True)
class Transcript:
    """What was found for one recording.

    Attributes:
        prompt: what the text was told to begin with, int64 [n].
        found: the rest.
        eos_token_ids: those that end a text.
    """

    prompt: np.ndarray
    found: Found
    eos_token_ids: tuple[int, ...]

    @property
    def tokens(self) -> np.ndarray:
        """All of it, the end token too where it has one, int64 [n]."""
        end = self.eos_token_ids[:1] if self.found.finish_reason == "eos" else ()
        return np.array([*self.prompt, *self.found.ids, *end], np.int64)


def search_recordings(
    engine: Seq2SeqEngine,
    folder: Path,
    spoken: "SpokenPrompt",
    recordings: Sequence[Recording],
    language: int | None = None,
    max_tokens: int | None = None,
    **overrides: Any,
) -> Iterator[Transcript]:
    """Find out what is said in each recording, in their order.

    Args:
        engine: of the model.
        folder: of its bundle.
        spoken: what a text begins with.
        recordings: a few at a time are in memory.
        language: the token of the one that is spoken; None lets the model hear it.
        max_tokens: most tokens of a text; None takes the model's limit.
        overrides: of the search, as `read_rules` takes them.

    Raises:
        InputError: a file that can't be read, is too long or of another sampling rate, or malformed settings.
        UnsupportedError: settings that are not supported.
    """
    for start in range(0, len(recordings), _BATCH_SIZE):
        engine.encode_features(np.stack([one.read() for one in recordings[start : start + _BATCH_SIZE]]))
        prompts = spoken.write(engine, language)
        rules = read_rules(
            folder,
            engine.context_length,
            max_tokens,
            prompts.shape[1],
            **overrides,
            decoder_start_token_id=spoken.start,
        )
        for prompt, found in zip(prompts, search(engine, rules, prompts), strict=True):
            yield Transcript(prompt, found, rules.eos_token_ids)


@dataclass(frozen=True)
class SpokenPrompt:
    """What a text begins with, of generation_config.json.

    Attributes:
        start: the start token.
        forced: the tokens behind it; None is the language's place.
        languages: `<|en|>` -> token, empty for a model of one language.
        language: the token of the one that the settings name.
        task: the token of the task that they name, None when they name none.
        tasks: `transcribe` and `translate` -> token.
        no_timestamps: the token that says that no times are wanted; times have higher ones.
    """

    start: int
    forced: tuple[int | None, ...]
    languages: dict[str, int]
    language: int | None
    task: int | None
    tasks: dict[str, int]
    no_timestamps: int | None

    @classmethod
    def load(cls, folder: Path) -> "SpokenPrompt":
        """Read the settings of a bundle.

        Raises:
            InputError: malformed settings.
            UnsupportedError: settings that are not supported.
            OptionError: they name a language that the model does not know.
        """
        path = folder / "generation_config.json"
        settings = read_json(path) if path.is_file() else {}
        config = read_json(folder / "config.json")
        if settings.get("return_timestamps"):
            raise UnsupportedError(f"`{path}` sets return_timestamps, which is not supported", "remove it")
        try:
            languages, tasks = dict(settings.get("lang_to_id") or {}), dict(settings.get("task_to_id") or {})
            named, task = settings.get("language"), settings.get("task")
            forced: list[int | None] = []
            if named is None and task is None:
                places = settings.get("forced_decoder_ids") or config.get("forced_decoder_ids") or []
                if [place for place, _ in places] != list(range(1, len(places) + 1)):
                    raise ValueError(f"forced_decoder_ids {places} have gaps")
                forced = [token for _, token in places]
            start = settings.get("decoder_start_token_id", config.get("decoder_start_token_id"))
            prompt = cls(
                int(start),
                tuple(forced),
                languages,
                None,
                None if task is None else tasks[task],
                tasks,
                settings.get("no_timestamps_token_id"),
            )
            return prompt if named is None else replace(prompt, language=prompt.language_id(named))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"malformed settings: `{path}`: {error}") from error

    def language_id(self, code: str) -> int:
        """Return the token of a language.

        Raises:
            OptionError: the model does not know it.
        """
        token = self.languages.get(code, self.languages.get(f"<|{code.lower()}|>"))
        if token is None:
            known = ", ".join(sorted(name.strip("<|>") for name in self.languages))
            raise OptionError(f"unknown language `{code}`", f"the model knows: {known or 'one, leave it out'}")
        return token

    def language_of(self, prompt: np.ndarray) -> str | None:
        """Return the code of a prompt's language."""
        return next((name.strip("<|>") for name, token in self.languages.items() if token in prompt[1:2]), None)

    def is_text(self, token: int) -> bool:
        """Return whether a token is none of the times."""
        return self.no_timestamps is None or token <= self.no_timestamps

    def write(self, engine: Seq2SeqEngine, language: int | None) -> np.ndarray:
        """Return what each text begins with, int64 [batch, n]; a language that nobody names is heard."""
        language = self.language if language is None else language
        columns = [] if language is not None else list(self.forced)
        if language is not None or (self.languages and not columns):
            columns.append(language)
        if self.task is not None:
            columns.append(self.task)
        elif language is not None and self.tasks:
            columns.append(self.tasks["transcribe"])
        if self.no_timestamps is not None and columns[-1:] != [self.no_timestamps]:
            columns.append(self.no_timestamps)
        heard = self._hear(engine) if self.languages and None in columns else None
        values = [heard if column is None else column for column in (self.start, *columns)]
        return np.stack([np.broadcast_to(one, engine.num_sources) for one in values if one is not None], axis=1)

    def _hear(self, engine: Seq2SeqEngine) -> np.ndarray:
        """Return the likeliest language of each source, int64 [batch]."""
        engine.start(engine.num_sources, 1)
        logits = engine.decode(np.full((engine.num_sources, 1), self.start))
        tokens = np.array(sorted(self.languages.values()))
        likeliest: np.ndarray = tokens[logits[:, tokens].argmax(-1)]
        return likeliest
