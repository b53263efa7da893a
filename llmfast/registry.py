"""A file in a plug-in folder is a plug-in: its file name is its name on the command line.

Adding a method, scheme, metric, task or provider creates one file and edits none. A plug-in may
define a frozen dataclass `Options`, which holds the only copy of its defaults.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from llmfast.errors import OptionError

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def names(folder: str) -> list[str]:
    """List the plug-ins of a folder without importing them.

    Args:
        folder: dotted path below `llmfast`, e.g. `quantize.schemes`.

    Returns:
        Names in alphabetical order, spelled with dashes.
    """
    spec = importlib.util.find_spec(f"llmfast.{folder}")
    if spec is None or spec.submodule_search_locations is None:
        raise LookupError(f"llmfast.{folder} is not a package")
    files = [file for place in spec.submodule_search_locations for file in Path(place).glob("*.py")]
    return sorted(file.stem.replace("_", "-") for file in files if not file.stem.startswith("_"))


def load(folder: str, name: str) -> ModuleType:
    """Import one plug-in.

    Raises:
        OptionError: no file of that name; the message lists those there are.
    """
    known = names(folder)
    if name not in known:
        raise unknown_name(folder.rpartition(".")[2].removesuffix("s"), name, known)
    return importlib.import_module(f"llmfast.{folder}.{name.replace('-', '_')}")


def unknown_name(kind: str, name: str, known: Sequence[str]) -> OptionError:
    """Return the error for a name that is none of `known`, with the nearest one or all of them as the hint."""
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"choose from: {', '.join(known)}"
    return OptionError(f"unknown {kind} `{name}`", hint)


def has_option(plugin: ModuleType, name: str) -> bool:
    """Return whether a plug-in has an option of that name."""
    return name in [field.name for field in dataclasses.fields(plugin.Options)]


def make_options(plugin: ModuleType, settings: Mapping[str, str]) -> Any:
    """Build a plug-in's `Options` from `KEY=VALUE` settings.

    Args:
        plugin: a module returned by `load`.
        settings: values as typed by the user; keys not named keep the defaults.

    Raises:
        OptionError: a key the plug-in does not have, or a value of the wrong type.
    """
    name = plugin.__name__.rpartition(".")[2].replace("_", "-")
    fields = {field.name: field for field in dataclasses.fields(plugin.Options)}
    values: dict[str, Any] = {}
    for key, text in settings.items():
        field = fields.get(key.replace("-", "_"))
        if field is None:
            raise OptionError(f"`{name}` has no option `{key}`", f"it has: {', '.join(fields) or 'no options'}")
        values[field.name] = _convert(text, type(field.default), f"{name}: {key}")
    return plugin.Options(**values)


def catalogue(*folders: str) -> list[dict[str, Any]]:
    """Return a row per plug-in: its `kind`, `name`, `summary` (the first line of its file), `options` with defaults."""
    rows = []
    for folder in folders:
        for name in names(folder):
            plugin = load(folder, name)
            summary = (plugin.__doc__ or "").splitlines()[0]
            options = {field.name: field.default for field in dataclasses.fields(plugin.Options)}
            rows.append({"kind": folder.rpartition(".")[2], "name": name, "summary": summary, "options": options})
    return rows


def describe(*folders: str) -> str:
    """Return what `--list` prints: each plug-in's first line, its options and their defaults."""
    lines: list[str] = []
    for row in catalogue(*folders):
        if f"{row['kind']}:" not in lines:
            lines.append(f"{row['kind']}:")
        lines.append(f"  {row['name']:12} {row['summary']}")
        lines += [f"  {'':12}   --set {key}={default}" for key, default in row["options"].items()]
    return "\n".join(lines)


def _convert(text: str, kind: type, what: str) -> Any:
    try:
        return _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        raise OptionError(f"{what}: `{text}` is not of type {kind.__name__}") from error
