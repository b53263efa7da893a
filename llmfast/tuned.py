"""Session settings that were found to be faster than the defaults, kept per machine, model and provider.

`llmfast bench --tune-session` measures and keeps them, in a JSON file below the user's cache directory
(https://specifications.freedesktop.org/basedir-spec/latest/); whoever opens a decoder takes them from there.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llmfast.bundle import ModelBundle, read_json, stage_file
from llmfast.errors import InputError, ResourceError
from llmfast.processor import processor_name
from llmfast.report import note
from llmfast.runtime import import_onnxruntime, resolve_threads, usable_cores

IGNORE = "LLMFAST_NO_TUNED"
_LIMITS = {"threads": (1, 1024), "block_base": (0, 1024), "chunk_tokens": (1, 1 << 20)}


@dataclass(frozen=True)
class SessionSettings:
    """How a decoder's session runs.

    Attributes:
        threads: intra-op threads; None takes the cores this process may use.
        spin: let idle threads spin.
        block_base: ONNX Runtime's `session.dynamic_block_base`: parts of an operator's work get smaller towards its
            end, which helps where cores are not equally free; 0 cuts it into equal parts.
        chunk_tokens: tokens of a prompt that go through the graph at once.
    """

    threads: int | None = None
    spin: bool = True
    block_base: int = 0
    chunk_tokens: int = 256

    def __str__(self) -> str:
        count = resolve_threads(self.threads)
        parts = [
            f"{count} thread{'s' if count > 1 else ''}",
            "spinning" if self.spin else "not spinning",
            f"blocks by {self.block_base}" if self.block_base else "equal blocks",
            f"chunks of {self.chunk_tokens} tokens",
        ]
        return ", ".join(parts)


def settings_for(
    bundle: ModelBundle, provider: str = "cpu", threads: int | None = None, tell: bool = True
) -> SessionSettings:
    """Return the settings to open a decoder with.

    Args:
        bundle: the model.
        provider: as for `open_session`.
        threads: asked for by the user; settings that were found for another number are not taken.
        tell: say so in a note where they are not the defaults.
    """
    default = SessionSettings(threads)
    if os.environ.get(IGNORE) or not bundle.manifest.files:
        return default
    path = settings_path(bundle, provider)
    try:
        found = _read(path) if path.is_file() else None
    except InputError as error:  # it is a cache: without it all is as before
        note(f"note: {error.message}; it is not used")
        return default
    if found is None or (threads is not None and found.threads != threads):
        return default
    if tell:
        note(f"note: `{bundle.name}` runs as `llmfast bench --tune-session` found best: {found} (--no-tuned: as usual)")
    return found


def settings_path(bundle: ModelBundle, provider: str) -> Path:
    """Return the file that the settings for a model on this machine are in.

    Args:
        bundle: the model.
        provider: as for `open_session`; of several the first, which they were found for.

    Raises:
        UnsupportedError: the model has no manifest.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    key = json.dumps([_machine(), bundle.digest, provider.partition(",")[0]], sort_keys=True)
    return folder / "llmfast" / "sessions" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def keep_settings(
    bundle: ModelBundle, provider: str, settings: SessionSettings | None, measured: Mapping[str, Any]
) -> Path:
    """Write settings, or with None remove those that an earlier search kept; return the file.

    Raises:
        ResourceError: it can't be written.
    """
    path = settings_path(bundle, provider)
    try:
        if settings is None:
            path.unlink(missing_ok=True)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot write `{path}`: {error.strerror}", "set XDG_CACHE_HOME") from error
    document = {
        "machine": _machine(),
        "bundle": bundle.name,
        "model": bundle.digest,
        "provider": provider,
        "settings": asdict(settings),
        "measured": dict(measured),
    }
    with stage_file(path, overwrite=True) as staged:
        staged.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


@contextmanager
def ignoring_tuned(ignore: bool) -> Iterator[None]:
    """Let this process, and those that it starts, open decoders with the defaults within the body."""
    before = os.environ.get(IGNORE)
    if ignore:
        os.environ[IGNORE] = "1"
    try:
        yield
    finally:
        if ignore and before is None:
            del os.environ[IGNORE]


def _read(path: Path) -> SessionSettings:
    document = read_json(path)
    try:
        settings = SessionSettings(**document["settings"])
        for entry in fields(settings):
            value = getattr(settings, entry.name)
            low, high = _LIMITS.get(entry.name, (False, True))
            if type(value) is not type(low) or not low <= value <= high:
                raise ValueError(f"`{entry.name}` is {value!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"malformed session settings: `{path}`: {error}", "remove it") from error
    return settings


def _machine() -> dict[str, Any]:
    """Return what settings hold for: the processor, the cores that may be used, the library."""
    return {
        "cpu": processor_name(),
        "cores": usable_cores(),
        "onnxruntime": import_onnxruntime().__version__,
    }
