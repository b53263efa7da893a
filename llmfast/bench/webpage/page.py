"""The page around the charts: one file, no foreign script, nothing fetched."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmfast.bench.table import make_columns, make_footer, spell_outcome, spell_row
from llmfast.bench.webpage.charts import draw_all
from llmfast.bundle import stage_file
from llmfast.errors import UnsupportedError
from llmfast.report import printable
from llmfast.verdict import spell

_FOLDER = Path(__file__).parent


def write_html(document: Mapping[str, Any], path: Path) -> None:
    """Write the report, whole or not at all; an older file is replaced.

    Raises:
        UnsupportedError: Plotly is not installed.
        ResourceError: it can't be written.
    """
    with stage_file(path, overwrite=True) as staged:
        staged.write_text(to_html(document), encoding="utf-8")


def check_plotly() -> None:
    """Raise when there is nothing to draw with, before hours are spent on measuring.

    Raises:
        UnsupportedError: Plotly is not installed.
    """
    _read_plotly()


def to_html(document: Mapping[str, Any]) -> str:
    """Return the report of a document made by `bench`.

    Scripts run only if their hash is in the page's Content Security Policy, https://www.w3.org/TR/CSP3/#csp-hash,
    and every text is escaped, so that a model named `<script>` stays a name.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["printable"] = printable
    columns = make_columns(document)
    charts = draw_all(document)
    scripts = [_read_plotly(), (_FOLDER / "page.js").read_text(encoding="utf-8")]
    return environment.get_template("page.html.jinja").render(
        document=document,
        outcome=spell_outcome(document),
        titles=[column.title for column in columns],
        cells=[list(spell_row(row, columns).values()) for row in document["rows"]],
        gates=[(entry, spell(entry)) for entry in document["verdict"]],
        footer=make_footer(document),
        charts=charts,
        figures=_to_script_json([{"name": one.name, "traces": one.traces, "layout": one.layout} for one in charts]),
        style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        scripts=scripts,
        hashes=" ".join(f"'sha256-{_hash(script)}'" for script in scripts),
    )


def _to_script_json(values: Any) -> str:
    """Return JSON that can stand inside a script element: no `<` could end it."""
    return json.dumps(values, allow_nan=False).replace("<", "\\u003c")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _read_plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        hint = "pip install 'llmfast[report]'"
        raise UnsupportedError("--html needs `plotly`, which is not installed", hint) from error
    source: str = get_plotlyjs()
    return source
