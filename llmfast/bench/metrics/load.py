"""Opening and memory: seconds to open the model once, and the most memory its process held.

Memory is read after the speed rounds and before quality, whose logits and tokenizer are no part of
serving the model. One observation each; the first bundle may find a colder disk cache.
"""

from llmfast.bench.machine import peak_rss_bytes
from llmfast.bench.subject import Subject
from llmfast.report import Column

ORDER = 20
KIND = "static"
TASKS: tuple[str, ...] = ()
NEEDS: tuple[str, ...] = ()
HIGHER_IS_BETTER = {"load_s": False, "peak_rss_bytes": False}
COLUMNS = (
    Column("load s", "load_s", lambda value: f"{value:.2f}"),
    Column("peak MB", "peak_rss_bytes", lambda value: f"{value / 1e6:.0f}"),
)


def measure(subject: Subject) -> dict[str, float | None]:
    """Return the seconds it took to open the subject, and its process's peak memory in bytes."""
    return {"load_s": subject.load_s, "peak_rss_bytes": peak_rss_bytes()}
