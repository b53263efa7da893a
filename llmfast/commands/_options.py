"""Options and checks that commands share."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from llmfast import registry, report
from llmfast.errors import OptionError

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+\.?\d*) ?([KMG]i?B)", re.IGNORECASE)

_PLUGIN_COLUMNS = (
    report.Column("name", "name", "`{}`".format, align_right=False),
    report.Column("what it does", "summary", align_right=False),
    report.Column("options and their defaults", "options", align_right=False),
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Directory of the new bundle.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the input and print the plan; write nothing.")]
Provider = Annotated[str, typer.Option(help=f"Execution provider: {', '.join(registry.names('providers'))}.")]
AllowFallback = Annotated[
    bool, typer.Option("--allow-fallback", help="Go on with cpu where the provider is missing or takes no node.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Threads; the default is the cores this process may use.", callback=lambda count: check_threads(count)
    ),
]
NoTuned = Annotated[
    bool, typer.Option("--no-tuned", help="Leave the settings that bench --tune-session kept for this machine alone.")
]
Verify = Annotated[bool, typer.Option("--verify", help="First hash every file of a bundle; sizes are always checked.")]
Format = Annotated[str, typer.Option("--format", help=f"How results are printed: {', '.join(report.FORMATS)}.")]
CalibrationField = Annotated[
    str | None, typer.Option(metavar="NAME", help="Field of its JSON lines; `messages` holds conversations.")
]
NumSamples = Annotated[int | None, typer.Option(help="Windows, or an encoder's lines, of it to use.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per window.")]
SampleSeed = Annotated[int | None, typer.Option(help="Pick the samples at random; the default is the first ones.")]
DataSamples = Annotated[int | None, typer.Option(help="Windows, or an encoder's lines, of it to compare.")]
MaxDrop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METRIC=X", help="Gate: top1_agreement or flipped_labels in points, cosine or relative_error."
    ),
]


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the user did not say, so that each default stands in one place, the library."""
    return {key: value for key, value in values.items() if value is not None}


def check_threads(threads: int | None) -> int | None:
    """Return a number of threads; say so when there are not so many cores."""
    if threads is not None:
        from llmfast.runtime import resolve_threads, usable_cores

        cores = usable_cores()
        if resolve_threads(threads) > cores:
            few = f"{cores} core{'s' if cores > 1 else ''}"
            report.note(f"note: --threads {threads}, but this process may use {few}: it gets slower, not faster")
    return threads


def check_format(name: str) -> None:
    """Refuse a format that tables can't be printed in."""
    if name not in report.FORMATS:
        raise OptionError(f"unknown format `{name}`", f"choose from: {', '.join(report.FORMATS)}")


def check_engine(engine: str, cluster: dict[str, Any]) -> None:
    """Refuse an engine that there is not, and options of a cluster where there is none.

    Args:
        engine: as typed.
        cluster: the options that were typed, by their names in Python.
    """
    if engine not in ("local", "ray"):
        raise OptionError(f"unknown --engine `{engine}`", "choose from: local, ray")
    if cluster and engine != "ray":
        raise OptionError(f"--{next(iter(cluster)).replace('_', '-')} is for --engine ray")


def list_plugins(output_format: str, *folders: str) -> None:
    """Print the plug-ins of some folders with their options."""
    if output_format == "table":
        report.out(registry.describe(*folders))
        return
    rows = registry.catalogue(*folders)
    if output_format != "json":
        spell = ", ".join
        rows = [row | {"options": spell(f"{key}={value}" for key, value in row["options"].items())} for row in rows]
    report.print_rows(rows, _PLUGIN_COLUMNS, output_format)


def parse_settings(settings: list[str]) -> dict[str, str]:
    """Return the `KEY=VALUE` settings of --set."""
    pairs = [setting.partition("=") for setting in settings]
    for key, separator, _ in pairs:
        if not key or not separator:
            raise OptionError(f"--set `{key}`: not KEY=VALUE", "for example --set block_size=64")
    return {key: value for key, _, value in pairs}


def parse_size(text: str) -> float:
    """Return the bytes of a size such as `100MB` or `1.5GiB`.

    Raises:
        OptionError: no number with a unit.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise OptionError(f"not a size: `{text}`", "for example 100MB or 1.5GB")
    return float(match[1]) * _UNITS[match[2].upper()]
