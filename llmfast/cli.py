"""The command line: its streams, signals and exit codes. The commands are the files of `llmfast.commands`."""

import io
import os
import re
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmfast import __version__, report
from llmfast.commands import _options, bench, doctor, export, infer, inspect, prune, quantize, serve, tune, verify
from llmfast.errors import LlmfastError, OptionError, ResourceError
from llmfast.files import ALLOW_HARDLINKS
from llmfast.resources import FORCE, allow_memory
from llmfast.supervisor import limit, supervise, tell_doing

_HELP = {"help_option_names": ["-h", "--help"]}
_UsageError: Any = typer.BadParameter.__base__  # of click, or of Typer's own copy of it


class _Group(TyperGroup):
    """Turns failures into messages and exit codes, for the shell and for a test's runner alike."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if not args:
            return super().make_context(info_name, args, parent, **extra)  # prints the help
        try:
            return super().make_context(info_name, args, parent, **extra)
        except _UsageError as error:
            report.complain(_misused(error, "llmfast"))
            raise typer.Exit(OptionError.exit_code) from error

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            report.complain(_misused(error, f"{ctx.command_path} {ctx.invoked_subcommand}"))
            raise typer.Exit(OptionError.exit_code) from error
        except LlmfastError as error:
            report.complain(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            report.note("interrupted")
            raise typer.Exit(128 + signal.SIGINT) from None
        except BrokenPipeError:
            sys.stdout = None  # the reader left; there is nobody to tell
            raise typer.Exit(0) from None


def _misused(error: Any, command: str) -> OptionError:
    """Return what is wrong with a command line, as all errors are spelled; `command` is used where it names none."""
    message = re.sub(r"'([^']*)'", r"`\1`", error.format_message()).rstrip(".")
    # As pydantic, which newer versions of Typer read numbers with, and as Click spell these two.
    message = re.sub(r"Input should be ([^,]*).*", r"must be \1", message)
    message = re.sub(r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)", r"unexpected argument: \1", message)
    named = error.ctx.command_path if error.ctx is not None else command
    return OptionError(message[:1].lower() + message[1:], f"{named} --help")


app = typer.Typer(
    cls=_Group,
    name="llmfast",
    context_settings=_HELP,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def main() -> None:
    """Run the command line; the exit codes are those of README.md."""
    _mend_streams()
    supervise(_run)


def _run() -> None:
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except MemoryError:
        error = ResourceError("ran out of memory", "free memory or use a smaller model")
        report.complain(error)
        sys.exit(error.exit_code)
    except OSError as error:  # what stages do not expect: the results' own file is full
        report.note(f"error: cannot go on: {error.strerror or error}")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or Python would try to flush the full one at its end
        sys.exit(ResourceError.exit_code)


def _mend_streams() -> None:
    """Let a program whose streams were closed, or can't spell every character, run as any other."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _print_version(wanted: bool) -> None:
    if wanted:
        report.out(f"llmfast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    allow_hardlinks: Annotated[
        bool,
        typer.Option("--allow-hardlinks", help="Take weights from files that have other names too (hard links)."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Begin although memory or disk look too small for it.")
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="End the command when it holds more, 4GB for instance: exit code 6."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="End the command when it takes longer: exit code 6.")
    ] = None,
) -> None:
    """Make Transformers small and fast on ONNX Runtime, with proof.

    llmfast export CHECKPOINT -o fp32, then llmfast quantize fp32 -o int4 --scheme int4,
    then llmfast bench fp32 int4 --data text.txt, then llmfast infer int4 --prompt "Hello".
    """
    if allow_hardlinks:
        os.environ[ALLOW_HARDLINKS] = "1"
    if force:
        os.environ[FORCE] = "1"
    if timeout is not None and not timeout > 0:
        raise OptionError(f"--timeout {timeout:g}: not above 0")
    max_bytes = None if max_memory is None else _options.parse_size(max_memory)
    if max_bytes is not None:
        if not 1 <= max_bytes < 2**63:
            raise OptionError(f"--max-memory {max_memory}: not above 0", "for example --max-memory 4GB")
        allow_memory(int(max_bytes))
    tell_doing(f"running `llmfast {ctx.invoked_subcommand}`")
    limit(timeout, max_bytes)


# As --help lists them: the order of the pipeline.
for _module in (export, prune, tune, quantize, bench, infer, serve, inspect, verify, doctor):
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name, short_help=_module.SUMMARY)(getattr(_module, _name))
