"""Print the reference of `llmfast.api` in Markdown, made of its signatures and docstrings.

python scripts/api_reference.py > docs/api.md
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

from llmfast import api

HEAD = """# Reference of `llmfast.api`

What can be imported from `llmfast.api`; [python.md](python.md) shows it at work. Written by
`python scripts/api_reference.py > docs/api.md` from the signatures and docstrings."""


def main() -> None:
    """Print the page."""
    print(reference())


def reference() -> str:
    """Return the page: functions, classes, and errors by their exit codes."""
    public = [getattr(api, name) for name in api.__all__]
    errors = sorted((one for one in public if _is_error(one)), key=lambda one: one.exit_code)
    parts = [HEAD, "## Functions"]
    parts += [part for one in public if inspect.isfunction(one) for part in _callable("###", one.__name__, one)]
    parts += ["## Classes"]
    parts += [part for one in public if inspect.isclass(one) and one not in errors for part in _class(one)]
    parts += ["## Errors", *(part for one in errors for part in _class(one))]
    return "\n\n".join(parts)


def _is_error(one: Any) -> bool:
    return inspect.isclass(one) and issubclass(one, Exception)


def _class(one: type) -> Iterator[str]:
    """Yield what a class's docstring says, then its properties, then its methods."""
    if "\nArgs:\n" in inspect.getdoc(one):
        yield from _callable("###", one.__name__, one)
    else:
        yield f"### {one.__name__}"
        fields = dataclasses.fields(one) if dataclasses.is_dataclass(one) else []
        yield from _text(inspect.getdoc(one), {field.name: _field(field) for field in fields})
    if _is_error(one):
        yield f"Exit code {one.exit_code}."
    getters = {
        name: getattr(member, "fget", None) or getattr(member, "func", None)  # of a property, of a cached one
        for name, member in vars(one).items()
        if not name.startswith("_")
    }
    properties = [
        f"- `{name}` (`{_type(inspect.signature(getter).return_annotation)}`): {_joined(inspect.getdoc(getter))}"
        for name, getter in getters.items()
        if getter
    ]
    if properties:
        yield "\n".join(["Properties:\n", *properties])
    for name, getter in getters.items():
        if not getter and inspect.isroutine(method := getattr(one, name)):
            yield from _callable("####", f"{one.__name__}.{name}", method)


def _callable(level: str, name: str, function: Any) -> Iterator[str]:
    """Yield a heading, the signature and what the docstring says."""
    signature = inspect.signature(function)
    words, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        if parameter.name != "self":
            words.append(_plain(str(parameter)))
    inside = ", ".join(words)
    if len(inside) > 80:
        inside = "\n    " + ",\n    ".join(words) + ",\n"
    result = "" if inspect.isclass(function) else f" -> {_type(signature.return_annotation)}"
    yield f"{level} {name}"
    yield f"```python\n{name.rpartition('.')[2]}({inside}){result}\n```"
    yield from _text(inspect.getdoc(function))


def _text(docstring: str, fields: dict[str, str] | None = None) -> Iterator[str]:
    """Yield the paragraphs of a docstring, its sections as lists; `fields` are types and defaults by name."""
    for paragraph in docstring.split("\n\n"):
        title, _, body = paragraph.partition("\n")
        if title == "Returns:":
            yield f"Returns: {_joined(dedent(body))}"
        elif title in ("Args:", "Attributes:", "Raises:"):
            items = [_joined(item) for item in re.split(r"\n(?! )", dedent(body))]
            named = (item.partition(": ") for item in items)
            lines = [f"- `{name}`{(fields or {}).get(name, '')}: {text}" for name, _, text in named]
            yield "\n".join(lines if title != "Raises:" else ["Raises:\n", *lines])
        else:
            yield _joined(paragraph)


def _field(field: dataclasses.Field) -> str:
    """Return type and default of a dataclass's field, as they stand behind its name."""
    default = ""
    if field.default is not dataclasses.MISSING:
        default = f" = {field.default!r}"
    elif field.default_factory is not dataclasses.MISSING:
        default = f" = {field.default_factory.__name__}()"
    return f" (`{_type(field.type)}{_plain(default)}`)"


def _type(annotation: Any) -> str:
    return _plain(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def _plain(text: str) -> str:
    """Return annotations and defaults without their modules: `Path`, not `pathlib.Path`."""
    text = re.sub(r"<(?:built-in )?function (\w+).*?>", r"\1", text).replace("<factory>", "...").replace("~", "")
    return re.sub(r"(?<!')\b(?:\w+\.)+(?=[A-Za-z])", "", text).replace("'", '"')


def _joined(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
