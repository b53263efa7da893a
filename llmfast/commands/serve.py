"""`llmfast serve`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from llmfast.commands._options import NoTuned, Provider, Threads, given
from llmfast.errors import InputError

SUMMARY = "A bundle as an HTTP server with OpenAI's API: chat, completions, embeddings."


def serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Bundle to serve.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 is this machine alone.")] = None,
    port: Annotated[int | None, typer.Option(help="Port, 8000 by default; 0 takes a free one.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that requests must carry; or LLMFAST_API_KEY.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Requests answered at once; 32 by default, fewer if memory is short.")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Tokens of a prompt with its answer; the model's, up to 4096.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer, 1024 by default.")] = None,
    queue_size: Annotated[int | None, typer.Option(help="Requests that may wait, 64 by default.")] = None,
    queue_timeout: Annotated[float | None, typer.Option(help="Seconds that they may wait, 30 by default.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for an answer, 300 by default.")] = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    no_tuned: NoTuned = False,
) -> None:
    """Serve a model over HTTP, with the API that clients of OpenAI's speak, and a page to try it.

    Example: llmfast serve int4 --port 8000
    """
    from llmfast.serve.options import ServeOptions
    from llmfast.serve.stage import serve as run
    from llmfast.tuned import ignoring_tuned

    options = given(
        {
            "host": host,
            "port": port,
            "key": _read_key(api_key_file),
            "batch_size": batch_size,
            "context_length": context_length,
            "max_tokens": max_tokens,
            "queue_size": queue_size,
            "queue_timeout_s": queue_timeout,
            "timeout_s": timeout,
        }
    )
    with ignoring_tuned(no_tuned):
        run(model, ServeOptions(provider=provider, threads=threads, **options))


def _read_key(path: Path | None) -> str | None:
    """Return the key from a file or the environment: an option of the command line is in every process list."""
    if path is None:
        return os.environ.get("LLMFAST_API_KEY") or None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read `{path}`: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    if not key:
        raise InputError(f"empty key: `{path}`", "write the key into it")
    return key
