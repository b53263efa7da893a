"""tokenizer.json, read within bounds: the library that parses it is native code, and so are its regular expressions."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from llmfast.errors import InputError, LlmfastError, ResourceError
from llmfast.files import GIT_LFS, MAX_TOKENIZER_BYTES, read_bounded

# What decides how a regular expression repeats: escapes, classes, groups, quantifiers, anything else.
_REGEX_TOKENS = re.compile(
    r"\\.|\[(?:\\.|\[:\w+:\]|[^\]\\])*\]|\(\?(?:<?[=!]|[a-z]*:|>)?|\(|\)|[*+?]|\{\d*,?\d*\}|.", re.DOTALL
)


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """Parse a tokenizer.json.

    Raises:
        InputError: unreadable, too large or malformed.
        ResourceError: a regular expression that can take forever.
    """
    content = read_bounded(path, MAX_TOKENIZER_BYTES)
    if content.startswith(GIT_LFS):
        raise InputError(f"Git LFS pointer, not the tokenizer: `{path}`", "run `git lfs pull`")
    with explained(f"malformed tokenizer: `{path}`"):
        backend = tokenizers.Tokenizer.from_buffer(content)
    if not backend.get_vocab_size():
        raise InputError(f"malformed tokenizer: `{path}`: it has no tokens", "download it again")
    for pattern in _patterns(backend):
        if is_explosive(pattern):
            raise ResourceError(
                f"`{path}` has a regular expression that may take forever: `{pattern:.60}`",
                "it repeats what it repeats already; write it without the inner or the outer repetition",
            )
    return backend


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever the library raises into an error of the input.

    Raises:
        InputError: with the library's reason after `what`.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, LlmfastError):
        raise
    except BaseException as error:  # it raises nothing narrower, and its panics are no `Exception`
        raise InputError(f"{what}: {str(error)[:200]}") from error


def _patterns(backend: tokenizers.Tokenizer) -> Iterator[str]:
    """Yield the regular expressions of a tokenizer, as the library understood them."""
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    places: list[Any] = [json.loads(part.__getstate__()) for part in parts if part is not None]
    while places:
        place = places.pop()
        if isinstance(place, list):
            places += place
        elif isinstance(place, dict):
            places += [value for key, value in place.items() if key != "Regex"]
            if isinstance(place.get("Regex"), str):
                yield place["Regex"]


def is_explosive(pattern: str) -> bool:
    """Return whether a regular expression repeats without bound what it repeats without bound already, as `(a+)+`.

    Such a pattern can take time that doubles with every character. No tokenizer that is in use has one.
    """
    groups = [False]  # of each open group: whether something in it is repeated
    closed = False  # whether what was read last is a group with a repetition inside
    for token in _REGEX_TOKENS.findall(pattern):
        if token.startswith("("):
            groups.append(False)
            closed = False
        elif token == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] |= closed
        elif token in ("*", "+") or (token.startswith("{") and token.endswith(",}")):
            if closed:
                return True
            groups[-1] = True
            closed = False
        elif not token.startswith("{") and token != "?":
            closed = False
    return False
