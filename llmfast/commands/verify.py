"""`llmfast verify`."""

from pathlib import Path
from typing import Annotated

import typer

from llmfast import report
from llmfast.commands._options import Format, check_format

SUMMARY = "Whether a bundle is as it was written, and its bill of materials."


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to check.")],
    against: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Export SOURCE again and compare: parity, graph and weights.")
    ] = None,
    require_signature: Annotated[
        Path | None, typer.Option(metavar="KEY.pem", help="Refuse it unless the owner of this public key signed it.")
    ] = None,
    sbom: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the bill of materials, CycloneDX 1.6 JSON.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --sbom.")] = False,
    output_format: Format = "table",
) -> None:
    """Hash every file of a bundle and compare it with the manifest; exit code 3 when one is changed, missing or new.

    Example: llmfast verify int4 --sbom int4.cdx.json
    """
    check_format(output_format)
    from llmfast.bundle import MANIFEST, read_manifest, stage_file
    from llmfast.sbom import make_sbom
    from llmfast.verify import compare_with_source, hash_files, require_ok, verify_signature

    if require_signature is not None:
        verify_signature(bundle, require_signature)
    rows = hash_files(bundle)
    columns = [
        report.Column("file", "file", align_right=False),
        report.Column("bytes", "bytes", lambda size: f"{size:,}"),
        report.Column("sha256", "sha256", lambda digest: f"{digest:.16}", align_right=False),
        report.Column("verdict", "verdict", align_right=False),
    ]
    report.print_rows(rows, columns, output_format)
    require_ok(bundle, rows)
    if sbom is not None:
        document = make_sbom(bundle.resolve().name, read_manifest(bundle / MANIFEST))
        with stage_file(sbom, overwrite) as staged:
            staged.write_text(report.to_json(document) + "\n", encoding="utf-8")
    if against is not None:
        parity = compare_with_source(bundle, against)
        report.note(f"`{against}` gives the same graph and weights; parity: {parity['max_abs_diff']:.2g} at most")
