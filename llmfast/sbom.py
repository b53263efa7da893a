"""A bundle's bill of materials: CycloneDX 1.6 with the fields for machine learning.

Specification: https://cyclonedx.org/docs/1.6/json/. Everything is taken from the manifest, so the same bundle gives
the same document, its serial number included.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from llmfast import __version__
from llmfast.bundle import Manifest

_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # of URLs, RFC 9562
_FIGURES = ("kld", "top1_agreement", "perplexity", "perplexity_ratio", "cosine", "max_abs_diff")


def make_sbom(name: str, manifest: Manifest) -> dict[str, Any]:
    """Return the document for a bundle.

    Args:
        name: the bundle's directory.
        manifest: its facts.
    """
    digests = "".join(str(entry["sha256"]) for _, entry in sorted(manifest.files.items()))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digests)}",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "llmfast", "version": __version__}]},
            "component": _model(name, manifest),
        },
        "components": [*_files(manifest), *_libraries(manifest)],
        "dependencies": [{"ref": "model", "dependsOn": [f"file:{file}" for file in sorted(manifest.files)]}],
    }


def _model(name: str, manifest: Manifest) -> dict[str, Any]:
    parameters = {"task": manifest.task}
    if "model_type" in manifest.architecture:
        parameters["modelArchitecture"] = str(manifest.architecture["model_type"])
    properties: dict[str, Any] = {"bits_per_weight": manifest.bits_per_weight, "sparsity": manifest.sparsity}
    properties |= {f"lineage.{index}": f"{step.stage} {step.method}" for index, step in enumerate(manifest.lineage)}
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "modelCard": {
            "modelParameters": parameters,
            "quantitativeAnalysis": {"performanceMetrics": _metrics(manifest.measured)},
        },
        "pedigree": {"ancestors": _ancestors(manifest)},
        "properties": [{"name": f"llmfast:{key}", "value": str(value)} for key, value in properties.items()],
    }


def _ancestors(manifest: Manifest) -> list[dict[str, Any]]:
    source = manifest.source
    if not source.get("id"):
        return []
    ancestor: dict[str, Any] = {"type": "machine-learning-model", "name": str(source["id"])}
    if source.get("revision"):
        ancestor["version"] = str(source["revision"])
    digests = source.get("sha256")
    if isinstance(digests, Mapping):
        ancestor["components"] = [
            {"type": "file", "name": file, "hashes": [_hash(digest)]} for file, digest in sorted(digests.items())
        ]
    elif digests:
        ancestor["hashes"] = [_hash(digests)]
    return [ancestor]


def _metrics(measured: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the figures of quality that the stages measured."""
    metrics = []
    for stage, figures in measured.items():
        found = {**figures, **figures.get("parity", {})} if isinstance(figures, Mapping) else {}
        metrics += [
            {"type": f"{stage}.{figure}", "value": repr(found[figure])}
            for figure in _FIGURES
            if isinstance(found.get(figure), int | float)
        ]
    return metrics


def _files(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [_hash(entry["sha256"])]}
        for name, entry in sorted(manifest.files.items())
    ]


def _libraries(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the packages that had a part in the bundle's making."""
    found = {(name, str(version)) for step in manifest.lineage for name, version in step.versions.items()}
    return [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version}",
        }
        for name, version in sorted(found)
    ]


def _hash(digest: object) -> dict[str, str]:
    return {"alg": "SHA-256", "content": str(digest)}
