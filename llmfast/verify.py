"""Whether a bundle is what it was when it was written, and whether its source still gives the same."""

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmfast.bundle import MANIFEST, read_manifest, sha256
from llmfast.errors import GateError, InputError, OptionError, UnsafeInputError, UnsupportedError
from llmfast.files import MAX_JSON_BYTES, locate, read_bounded
from llmfast.report import progress

SIGNATURE = "model.sig"  # as the package model-signing names it
OK, CHANGED, MISSING, EXTRA = "ok", "changed", "missing", "not in the manifest"


def hash_files(bundle: Path) -> list[dict[str, Any]]:
    """Compare every file of a bundle with its manifest.

    Returns:
        A row per file: `file`, `bytes`, `sha256` as found (None when missing), `verdict`.

    Raises:
        InputError: no bundle, or a malformed manifest.
        UnsafeInputError: a file that is a link out of the bundle, or no regular file.
    """
    if not (bundle / MANIFEST).is_file():
        raise InputError(f"no {MANIFEST} in `{bundle}`", "verify needs a bundle that llmfast wrote")
    listed = read_manifest(bundle / MANIFEST).files
    found = {path.name for path in bundle.iterdir()} - {MANIFEST, SIGNATURE}
    rows = []
    with progress("hashing", len(listed)) as advance:
        for name in sorted({*listed, *found}):
            if name not in found:
                rows.append(_row(name, None, None, MISSING))
                continue
            path = locate(bundle, name, f"bundle `{bundle}`")
            digest = sha256(path)
            entry = listed.get(name)
            is_same = entry is not None and (entry["bytes"], entry["sha256"]) == (path.stat().st_size, digest)
            rows.append(_row(name, path.stat().st_size, digest, OK if is_same else EXTRA if entry is None else CHANGED))
            advance()
    return rows


def require_ok(bundle: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse a bundle with files that are not as its manifest says.

    Raises:
        InputError: the message names each file.
    """
    wrong = [f"`{row['file']}` is {row['verdict']}" for row in rows if row["verdict"] != OK]
    if wrong:
        raise InputError(f"`{bundle}` is not as it was written: {', '.join(wrong)}", "copy it again, or make it again")


def verify_hashes(bundle: Path) -> None:
    """Refuse a bundle whose files are not as its manifest says.

    Args:
        bundle: its directory.

    Raises:
        InputError: the message names each file.
        UnsafeInputError: a file that is a link out of the bundle, or no regular file.
    """
    require_ok(bundle, hash_files(bundle))


def verify_signature(bundle: Path, key: Path) -> None:
    """Refuse a bundle that the owner of a key did not sign, or that was changed since.

    Args:
        bundle: signed by `model_signing sign key`, with the signature in it.
        key: the public key, PEM, of an elliptic curve.

    Raises:
        InputError: the key can't be read.
        UnsafeInputError: there is no signature, or it does not hold.
        UnsupportedError: the package model-signing is not installed.
    """
    signature = bundle / SIGNATURE
    if not signature.is_file():
        raise UnsafeInputError(
            f"`{bundle}` is not signed: `{SIGNATURE}` is missing",
            f"model_signing sign key {bundle} --private_key KEY --signature {signature}",
        )
    read_bounded(key, MAX_JSON_BYTES)
    if importlib.util.find_spec("model_signing") is None:
        raise UnsupportedError("model-signing is not installed", "pip install 'llmfast[signing]'")
    from model_signing import hashing, verifying

    hashes = hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=False)
    config = verifying.Config().set_hashing_config(hashes)
    try:
        config.use_elliptic_key_verifier(public_key=key).verify(bundle, signature)
    except Exception as error:  # of the package, of cryptography, of protobuf
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UnsafeInputError(f"the signature of `{bundle}` does not hold: {reason}", "get it again") from error


def compare_with_source(bundle: Path, source: str) -> dict[str, Any]:
    """Export a bundle's source again, which proves parity with PyTorch anew, and compare the bytes.

    Args:
        bundle: what `llmfast export` wrote; nothing has changed it since.
        source: the checkpoint.

    Returns:
        The parity that was measured now.

    Raises:
        OptionError: the bundle was not made by `export` alone, from a checkpoint.
        InputError: the checkpoint is another one.
        GateError: ONNX Runtime and PyTorch disagree, or the bundle holds other weights or another graph.
    """
    from llmfast.export.stage import ExportOptions, export

    manifest = read_manifest(bundle / MANIFEST)
    stages = [step.stage for step in manifest.lineage]
    if stages != ["export"] or "module" in manifest.lineage[0].options:
        raise OptionError(
            f"`{bundle}` was made by {', '.join(stages) or 'another program'}: only what `export` made of a "
            "checkpoint equals it",
            "compare what was quantized with `llmfast bench`",
        )
    step = manifest.lineage[0]
    options = ExportOptions(
        task=manifest.task,
        context_length=step.options.get("context_length"),
        allow_pickle=bool(step.options.get("allow_pickle")),
    )
    with tempfile.TemporaryDirectory(prefix="llmfast-verify-") as folder:
        again = export(source, Path(folder) / "again", options).manifest
    if manifest.source["sha256"] != again.source["sha256"]:
        raise InputError(f"`{source}` is not the source of `{bundle}`: its weights have other hashes")
    graphs = [name for name in manifest.files if ".onnx" in name]
    differing = [name for name in graphs if manifest.files[name] != again.files.get(name)]
    if differing:
        changed = [
            f"{name} {version}, now {again.lineage[0].versions.get(name)}"
            for name, version in step.versions.items()
            if version != again.lineage[0].versions.get(name)
        ]
        raise GateError(
            f"`{bundle}` is not what `{source}` gives today: {', '.join(f'`{name}`' for name in differing)}",
            f"other versions made it: {'; '.join(changed)}" if changed else "it was changed, or another source made it",
        )
    parity: dict[str, Any] = again.measured["export"]["parity"]
    return parity


def _row(name: str, size: int | None, digest: str | None, verdict: str) -> dict[str, Any]:
    return {"file": name, "bytes": size, "sha256": digest, "verdict": verdict}
