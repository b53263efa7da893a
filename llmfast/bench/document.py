"""The document of a run on disk: its schema, its hashes, saving and reading it again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmfast.bundle import ModelBundle, read_json, sha256, stage_file
from llmfast.errors import InputError
from llmfast.report import to_json

SCHEMA_VERSION = 3
# Documents of version 2 hold no tasks of lm-eval, and are read as such.
_READABLE = (2, SCHEMA_VERSION)
SCHEMA = Path(__file__).with_name("document.schema.json")


def read_schema() -> dict[str, Any]:
    """Return the JSON Schema that every document keeps."""
    schema: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return schema


def save_document(document: Mapping[str, Any], path: Path) -> None:
    """Write a document, whole or not at all; an older one is replaced.

    Raises:
        ResourceError: it can't be written.
        OutputExistsError: a directory is there.
    """
    with stage_file(path, overwrite=True) as staged:
        staged.write_text(to_json(document) + "\n", encoding="utf-8")


def load_document(path: Path) -> dict[str, Any]:
    """Read a document that `save_document` wrote.

    Raises:
        InputError: missing, not JSON, or no document of this version.
    """
    document = read_json(path)
    if not isinstance(document, dict) or "schema_version" not in document or "rows" not in document:
        raise InputError(f"not a document of llmfast bench: `{path}`", "make one with `llmfast bench --save FILE`")
    version = document["schema_version"]
    if version not in _READABLE:
        raise InputError(f"`{path}` has schema version {version}, this llmfast reads {SCHEMA_VERSION}", "measure again")
    required = {"machine": dict, "settings": dict, "baseline": str, "rows": list, "verdict": list}
    for key, kind in required.items():
        if not isinstance(document.get(key), kind):
            raise InputError(f"malformed document: `{path}`: no `{key}`", "measure again")
    for row in document["rows"]:
        if not isinstance(row, dict) or not isinstance(row.get("bundle"), str):
            raise InputError(f"malformed document: `{path}`: a row without `bundle`", "measure again")
        if not all(isinstance(row.get(key), dict) for key in ("samples", "verdict")):
            raise InputError(f"malformed document: `{path}`: `{row['bundle']}` has no `samples`", "measure again")
    return document


def hash_model(bundle: ModelBundle) -> dict[str, str]:
    """Return file -> SHA-256 of graphs and weights; a model without a manifest has its graph's only."""
    files = bundle.manifest.files
    if not files:
        return {bundle.model.name: sha256(bundle.model)}
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith((".onnx", ".data"))}
