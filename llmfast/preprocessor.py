"""preprocessor_config.json, which says how images and sound become a model's input."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmfast.bundle import read_json
from llmfast.errors import InputError, UnsupportedError

PREPROCESSOR = "preprocessor_config.json"


def read_preprocessor(folder: Path, what: str) -> tuple[Path, dict[str, Any]]:
    """Return the file and its contents.

    Args:
        folder: of the model.
        what: it is about, for the hint.

    Raises:
        InputError: missing or malformed.
    """
    path = folder / PREPROCESSOR
    if not path.is_file():
        raise InputError(f"no {PREPROCESSOR} in `{folder}`", f"it says how {what} the model's input")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"malformed `{path}`: not an object")
    return path, config


def read_sound_settings(
    folder: Path, kind: str, defaults: Mapping[str, Any], without_effect: Collection[str]
) -> tuple[Path, dict[str, Any]]:
    """Return the file of an audio processor, and its settings over the defaults.

    Args:
        folder: of the model.
        kind: the one `feature_extractor_type` that the caller knows.
        defaults: the fields that are understood, and what holds where the file does not say.
        without_effect: fields that may say anything.

    Raises:
        InputError: missing or malformed.
        UnsupportedError: another processor, or a field that is not understood.
    """
    path, config = read_preprocessor(folder, "sound becomes")
    if config.get("feature_extractor_type") != kind:
        raise UnsupportedError(
            f"`{path}`: audio processor `{config.get('feature_extractor_type')}` is not supported here",
            f"supported: {kind}",
        )
    for key, value in config.items():
        if key not in (*defaults, *without_effect) and value not in (None, False):
            raise UnsupportedError(f"`{path}`: `{key}` of {value!r} is not supported")
    return path, {**defaults, **{key: value for key, value in config.items() if key in defaults}}
