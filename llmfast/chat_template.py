"""Chat templates: foreign programs in Jinja, rendered in a sandbox that bounds their reach, time and memory."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from llmfast.errors import InputError, UnsafeInputError
from llmfast.files import read_bounded
from llmfast.sandbox import run_limited

MAX_TEMPLATE_BYTES = 1 << 20


def read_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the chat template of a model's folder, None when it has none.

    Args:
        folder: may hold chat_template.jinja.
        settings: what tokenizer_config.json says.

    Raises:
        InputError: unreadable or malformed.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"cannot read `{path}`: not UTF-8: byte {error.start}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        try:
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        except (KeyError, TypeError) as error:
            raise InputError(f"`{folder / 'tokenizer_config.json'}` has no chat template `default`") from error
    if template is not None and not isinstance(template, str):
        raise InputError(f"malformed chat template in `{folder / 'tokenizer_config.json'}`")
    return template


def render_template(source: str, values: Mapping[str, Any]) -> str:
    """Render a template.

    Raises:
        InputError: it is malformed, or refuses the conversation.
        UnsafeInputError: it reaches for what it may not have.
        ResourceError: it takes more time or memory than a template may.
    """
    import jinja2.sandbox  # noqa: F401 - here once, not in the child each time
    from jinja2.exceptions import SecurityError

    def render() -> str:
        try:  # compiled here too: the compiler computes constant expressions
            return str(_compile(source).render(tools=None, documents=None, **values))
        except SecurityError as error:
            raise UnsafeInputError(f"chat template: {error}") from error

    text: str = run_limited(render, "chat template")
    return text


def _compile(source: str) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what training looks at; here its body is plain text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML, which models never saw
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
