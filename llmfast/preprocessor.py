"""preprocessor_config.json, which says how images and sound become a model's input."""

from pathlib import Path
from typing import Any

from llmfast.bundle import read_json
from llmfast.errors import InputError

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
