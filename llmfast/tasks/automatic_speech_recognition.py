"""A recording becomes text: what was said, by a CTC head, with a character for every 20 ms or so, or by a decoder."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError
from llmfast.runtime import open_session
from llmfast.tasks._encoder import run_session
from llmfast.tasks._recordings import run_recordings
from llmfast.tasks._seq2seq import SEARCH_OPTIONS
from llmfast.tasks._whisper import transcribe

AUTO_MODEL = "AutoModelForCTC"
OUTPUTS = ("logits",)
INPUT = "input_values"
INFER_OPTIONS = ("source_lang", *SEARCH_OPTIONS)
TEXT_OPTION = "audio"

# What tokenizers put together again, when they say that they clean up spaces; in this order, as transformers does.
_CONTRACTIONS = ("n't", "'m", "'s", "'ve", "'re")


def answer(
    bundle: ModelBundle,
    texts: Sequence[str],
    provider: str = "cpu",
    threads: int | None = None,
    source_lang: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Write down what is said in each recording.

    Args:
        bundle: the model; its preprocessor_config.json says how sound becomes its input, its manifest how characters
            are joined, or its generation_config.json how a text begins.
        texts: paths of WAV files, 16-bit PCM at the model's sampling rate.
        provider: a name in `llmfast.providers`.
        threads: intra-op threads; None takes the cores this process may use.
        source_lang: for a model with a decoder, as the rest: the language that is spoken; None lets it be heard.
        max_tokens: most tokens of a text; None takes the model's limit.
        min_tokens: fewest.
        options: of the search, `num_beams` and the like.

    Returns:
        `audio` (the path) and `text` of each recording, in their order; of a model with a decoder also `language`,
        `generated_tokens` and `finish_reason`.

    Raises:
        OptionError: an option of the search for a model that has none, or a language that it does not know.
        InputError: a file that is missing, of another sampling rate, too short, or with samples that are not 16 bits
            wide; or no preprocessor_config.json.
        UnsupportedError: the graph is none of this task.

    Source: Graves et al. 2006, Connectionist Temporal Classification, https://doi.org/10.1145/1143844.1143891,
    and `AutomaticSpeechRecognitionPipeline` of transformers; for a decoder see `transcribe`.
    """
    if "decoder" in bundle.graphs:
        return transcribe(bundle, texts, provider, threads, source_lang, max_tokens, min_tokens, **options)
    asked = {"source_lang": source_lang, "max_tokens": max_tokens, "min_tokens": min_tokens} | options
    for name in (name for name, value in asked.items() if value is not None):
        raise OptionError(f"--{name.replace('_', '-')} is for models with a decoder; `{bundle.path}` has a CTC head")
    facts = bundle.manifest.architecture
    if "ctc" not in facts:
        raise InputError(f"`{bundle.path}` does not say what its characters are", "export it with llmfast")
    session = open_session(bundle.model, provider, threads)
    rows = run_recordings(bundle, texts, lambda values: run_session(session, OUTPUTS, {INPUT: values})[0])
    return [
        {"audio": path, "text": decode(row.argmax(-1), facts["labels"], facts["ctc"])}
        for path, row in zip(texts, rows, strict=True)
    ]


def spell(answer: dict[str, Any]) -> str:
    """Return an answer as a line for people."""
    return str(answer["text"])


def decode(ids: np.ndarray, labels: Sequence[str], ctc: Mapping[str, Any]) -> str:
    """Join the likeliest characters: repetitions are one, blanks none, delimiters spaces.

    Args:
        ids: int64 [frames].
        labels: the character of each id.
        ctc: `blank`, `word_delimiter`, `space`, `lower_case` and `clean_up_spaces`.
    """
    characters = [character for character, _ in groupby(labels[index] for index in ids) if character != ctc["blank"]]
    text = "".join(ctc["space"] if one == ctc["word_delimiter"] else one for one in characters).strip()
    if ctc["lower_case"]:
        text = text.lower()
    if ctc["clean_up_spaces"]:
        for mark in ".?!,":
            text = text.replace(f" {mark}", mark)
        text = text.replace(" ' ", "'")
        for contraction in _CONTRACTIONS:
            text = text.replace(f" {contraction}", contraction)
    return text
