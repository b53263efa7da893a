"""How `llmfast doctor` spells what it found."""

from typing import Any

from llmfast.report import Column, out, print_rows, to_json

_MACHINE = (Column("machine", "name", align_right=False), Column("", "value", align_right=False))
_PROVIDERS = (
    Column("provider", "name", align_right=False),
    Column("works", "works", lambda works: "yes" if works else "no", align_right=False),
    Column("what was found", "detail", align_right=False),
    Column("what to do", "remedy", align_right=False),
)
_EXTRAS = (
    Column("extra", "name", align_right=False),
    Column("installed", "installed", lambda works: "yes" if works else "no", align_right=False),
    Column("missing", "missing", ", ".join, align_right=False),
    Column("what to do", "remedy", align_right=False),
)


def print_document(document: dict[str, Any], output_format: str) -> None:
    """Print the document of a `Diagnosis` on stdout."""
    if output_format == "json":
        out(to_json(document))
        return
    if output_format == "csv":
        print_rows(document["providers"], _PROVIDERS, "csv")
        return
    print_rows(_machine_rows(document), _MACHINE, output_format)
    if document["clash"]:
        out(f"\nclash: several wheels of ONNX Runtime overwrite each other. Do: {document['clash']}\n")
    for rows, columns in ((document["providers"], _PROVIDERS), (document["extras"], _EXTRAS)):
        if output_format == "md":
            out("")
        print_rows(rows, columns, output_format)


def _machine_rows(document: dict[str, Any]) -> list[dict[str, str]]:
    machine = document["machine"]
    memory = [f"{machine[key] / 1e9:.1f} GB {what}" for key, what in _MEMORY.items() if machine[key]]
    load = machine["load_average"]
    facts = {
        "processor": machine["cpu"],
        "cores": f"{machine['cores']} usable of {machine['all_cores']}",
        "instruction sets": " ".join(machine["isa"]) or "none of those that kernels ask for",
        "int8": "multiplied as uint8, for without VNNI it would saturate" if machine["saturates_int8"] else None,
        "memory": ", ".join(memory),
        "read bandwidth": f"{machine['read_bytes_per_s'] / 1e9:.1f} GB/s on {machine['cores']} threads",
        "load": None if load is None else f"{load:.1f}, mean of the last minute",
        "system": f"{machine['os']}, Python {machine['python']}",
        "ONNX Runtime": ", ".join(f"{name} {version}" for name, version in document["wheels"].items()),
    }
    return [{"name": name, "value": value} for name, value in facts.items() if value]


_MEMORY = {"memory_bytes": "in all", "available_bytes": "available"}
