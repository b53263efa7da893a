"""Size on disk: everything the bundle holds, and the stored bits per parameter, scales included."""

from llmfast.bench.subject import Subject
from llmfast.report import Column

ORDER = 10
KIND = "static"
TASKS: tuple[str, ...] = ()
NEEDS: tuple[str, ...] = ()
HIGHER_IS_BETTER = {"size_bytes": False, "bits_per_weight": False}
COLUMNS = (
    Column("MB", "size_bytes", lambda value: f"{value / 1e6:.1f}"),
    Column("bits/weight", "bits_per_weight", lambda value: f"{value:.2f}"),
)


def measure(subject: Subject) -> dict[str, float | None]:
    """Return bytes on disk, and bits per weight where the manifest states them."""
    bundle = subject.bundle
    has_manifest = bool(bundle.manifest.files)
    return {
        "size_bytes": bundle.size_bytes,
        "bits_per_weight": bundle.manifest.bits_per_weight if has_manifest else None,
    }
