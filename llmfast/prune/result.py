"""What `prune` gives."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmfast.verdict import Judgement


@dataclass(frozen=True)
class Pruned:
    """A pruned model.

    Attributes:
        path: the new checkpoint or bundle.
        before: of the original: `checkpoint` or `bundle` (its name), `num_parameters` and sizes.
        after: the same of the new model, with the figures of the comparison, expected and measured speeds.
        gates: one entry for each gate.
        text: what both were compared on, None when they were not.
        ratios: of a checkpoint, method -> the share that it took.
        removed: of a checkpoint, method -> what it took.
        layers: of a graph, `role`, `layers`, `num_parameters` and `sparsity` of each role.
    """

    path: Path
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    gates: Sequence[Judgement]
    text: Mapping[str, Any] | None
    ratios: Mapping[str, float] | None = None
    removed: Mapping[str, Any] | None = None
    layers: Sequence[Mapping[str, Any]] | None = None

    def document(self) -> dict[str, Any]:
        """Return what JSON can hold, and the new model's manifest does: `rows` are before and after."""
        of_kind = {"ratios": self.ratios, "removed": self.removed, "layers": self.layers}
        return {
            "rows": [dict(self.before), dict(self.after)],
            **{name: value for name, value in of_kind.items() if value is not None},
            "gates": [asdict(entry) for entry in self.gates],
            "text": self.text,
        }
