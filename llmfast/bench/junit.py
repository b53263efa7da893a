"""The gates of a run as JUnit XML, which CI services show as tests.

https://github.com/testmoapp/junitxml
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from llmfast.bundle import stage_file
from llmfast.verdict import NOT_MEASURED, spell

# What XML 1.0 can't hold, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(document: Mapping[str, Any]) -> bytes:
    """Return the XML: a test a gate and bundle, and one for each bundle that it could be measured at all.

    Args:
        document: of a run, or of a comparison.
    """
    failed = [row for row in document["rows"] if "error" in row]
    missed = [entry for entry in document["verdict"] if not entry["passed"]]
    names = list(dict.fromkeys(row["bundle"] for row in document["rows"]))
    counts = {
        "tests": str(len(names) + len(document["verdict"])),
        "failures": str(len(missed)),
        "errors": str(len(failed)),
    }
    root = ElementTree.Element("testsuites", {"name": "llmfast bench", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": "llmfast bench", **counts})
    errors = {row["bundle"]: row["error"] for row in failed}
    for name in names:
        case = ElementTree.SubElement(suite, "testcase", {"classname": _clean(name), "name": "measured"})
        if error := errors.get(name):
            details = {"message": _clean(error["message"]), "type": error["kind"]}
            ElementTree.SubElement(case, "error", details).text = _clean(error["hint"])
    for entry in document["verdict"]:
        sign = "at most" if entry["kind"] == "max" else "at least"
        title = f"{entry['figure']} {sign} {entry['limit']:.6g}"
        case = ElementTree.SubElement(suite, "testcase", {"classname": _clean(entry["bundle"]), "name": _clean(title)})
        if not entry["passed"]:
            kind = "missing" if entry["verdict"] == NOT_MEASURED else entry["verdict"].lower()
            ElementTree.SubElement(case, "failure", {"message": _clean(spell(entry)), "type": kind})
        ElementTree.SubElement(case, "system-out").text = _clean(spell(entry))
    ElementTree.indent(root)
    xml: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return xml + b"\n"


def write_junit(document: Mapping[str, Any], path: Path) -> None:
    """Write the XML, whole or not at all; an older file is replaced.

    Raises:
        ResourceError: it can't be written.
    """
    with stage_file(path, overwrite=True) as staged:
        staged.write_bytes(to_junit(document))


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
