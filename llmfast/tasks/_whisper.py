"""Speech recognition by an encoder and a decoder: what Whisper is told before it writes, and what it then writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmfast.bundle import ModelBundle
from llmfast.infer.recordings import Recording, SpokenPrompt, search_recordings
from llmfast.infer.seq2seq import Seq2SeqEngine
from llmfast.report import progress
from llmfast.spectrogram import SpectrogramProcessor
from llmfast.tokenizer import Tokenizer


def transcribe(
    bundle: ModelBundle,
    paths: Sequence[str],
    provider: str,
    threads: int | None,
    source_lang: str | None,
    max_tokens: int | None,
    min_tokens: int | None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Write down what is said in each recording.

    Args:
        bundle: the model.
        paths: of WAV files.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads.
        source_lang: the code of the language that is spoken; None lets a multilingual model hear it.
        max_tokens: most tokens of a text; None takes the model's limit.
        min_tokens: fewest.
        options: what the user says of the search, in the words of generation_config.json.

    Returns:
        `audio` (the path), `text`, `language` (a code, None of a model of one language), `generated_tokens` and
        `finish_reason` of each recording, in their order.

    Raises:
        InputError: a file that can't be read, is too long or of another sampling rate, or malformed settings.
        OptionError: a language that the model does not know, or a value out of range.
        UnsupportedError: settings that are not supported.

    Source: `WhisperForConditionalGeneration.generate` of transformers.
    """
    spoken = SpokenPrompt.load(bundle.path)
    language = None if source_lang is None else spoken.language_id(source_lang)
    processor = SpectrogramProcessor.load(bundle.path)
    tokenizer = Tokenizer.load(bundle.path)
    engine = Seq2SeqEngine(bundle, provider, threads)
    recordings = [Recording(Path(path), processor) for path in paths]
    options |= {"min_new_tokens": min_tokens}
    answers = []
    with progress("running", len(paths)) as advance:
        transcripts = search_recordings(engine, bundle.path, spoken, recordings, language, max_tokens, **options)
        for path, one in zip(paths, transcripts, strict=True):
            answers.append(
                {
                    "audio": path,
                    "text": tokenizer.decode(filter(spoken.is_text, one.found.ids)).strip(),
                    "language": spoken.language_of(one.prompt),
                    "generated_tokens": len(one.found.ids),
                    "finish_reason": one.found.finish_reason,
                }
            )
            advance(1)
    return answers
