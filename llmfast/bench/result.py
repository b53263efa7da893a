"""What a run of `bench` gives: a row for each bundle, and the verdict on each gate."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llmfast.bench.contestant import Contestant
from llmfast.bench.document import SCHEMA_VERSION, hash_model
from llmfast.bench.layers import describe_layers
from llmfast.verdict import Judgement

_SPREAD = "_spread"


@dataclass(frozen=True)
class Row:
    """One bundle on one provider with some threads.

    Attributes:
        bundle: its name, unique beside those of the other bundles.
        task: what its model is for.
        provider: the execution provider asked for.
        threads: intra-op threads.
        placement: nodes on each execution provider that really ran.
        energy_source: how joules were counted, None where they were not.
        model_sha256: of its graphs and weights, by file.
        layers: role, number format and size of each linear layer.
        figures: medians and figures over all data by name, with `<name>_ratio` (above 1 is better than the baseline)
            and `<name>_change` where there are; None is what could not be measured.
        spreads: 95 % intervals of figures by their names, None where one measurement has none.
        verdict: figure -> `better`, `worse`, `equal` or `inconclusive` against the baseline.
        samples: figure -> its value in each round, or of each unit of the data.
        latencies: name -> seconds of single runs and tokens.
        error: `kind`, `message`, `hint` and `exit_code` of what kept it from being measured, None otherwise.
        profile: time by operator, where it was asked for.
        node: of a cluster, where it was measured; None on this machine.
        processor: that node's.
    """

    bundle: str
    task: str
    provider: str
    threads: int
    placement: Mapping[str, int]
    energy_source: str | None
    model_sha256: Mapping[str, str]
    layers: Sequence[Mapping[str, Any]]
    figures: Mapping[str, float | None]
    spreads: Mapping[str, Sequence[float] | None]
    verdict: Mapping[str, str]
    samples: Mapping[str, Sequence[float]]
    latencies: Mapping[str, Sequence[float]]
    error: Mapping[str, Any] | None = None
    profile: Mapping[str, Any] = field(default_factory=dict)
    node: str | None = None
    processor: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the row as the document has it: figures, each with its interval as `<name>_spread`, beside facts."""
        facts = asdict(self)
        figures, spreads, last = (facts.pop(name) for name in ("figures", "spreads", "verdict"))
        measured = {name: facts.pop(name) for name in ("samples", "latencies")}
        flat: dict[str, Any] = {}
        for name, value in figures.items():
            flat[name] = value
            if name in spreads:
                flat[f"{name}{_SPREAD}"] = spreads[name] and list(spreads[name])
        optional = {name: facts.pop(name) for name in ("node", "processor", "error", "profile")}
        return facts | {name: value for name, value in optional.items() if value} | flat | {"verdict": last} | measured


@dataclass(frozen=True)
class Benchmark:
    """What a run measured.

    Attributes:
        machine: CPU, memory and versions, and how busy it was.
        settings: all options, resolved.
        warnings: why figures may be off.
        baseline: the `bundle` of the row that the others are compared with.
        rows: one for each bundle and way of running it.
        verdict: one entry for each gate and bundle.
        nodes: of a cluster, by name, what `machine` is of one; `machine` is the first node's.
    """

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    warnings: Sequence[str]
    baseline: str
    rows: Sequence[Row]
    verdict: Sequence[Judgement]
    nodes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether all gates did."""
        return all(entry.passed for entry in self.verdict)

    def row(self, bundle: str) -> Row:
        """Return the row of a bundle, the first one where it has several."""
        return next(row for row in self.rows if row.bundle == bundle)

    def document(self) -> dict[str, Any]:
        """Return what JSON can hold, as `llmfast/bench/document.schema.json` says."""
        nodes = {"nodes": {name: dict(node) for name, node in self.nodes.items()}} if self.nodes else {}
        return {
            "schema_version": SCHEMA_VERSION,
            "machine": dict(self.machine),
            **nodes,
            "settings": dict(self.settings),
            "warnings": list(self.warnings),
            "baseline": self.baseline,
            "rows": [row.document() for row in self.rows],
            "verdict": [asdict(entry) for entry in self.verdict],
        }


def make_row(one: Contestant) -> Row:
    """Return what was measured of a bundle."""
    spreads = {
        name.removesuffix(_SPREAD): value for name, value in one.figures.items() if name.endswith(_SPREAD)
    }  # fmt: skip
    error: dict[str, Any] | None = None
    if one.failure is not None:
        error = {"kind": type(one.failure).__name__, "message": one.failure.message, "hint": one.failure.hint}
        error["exit_code"] = one.failure.exit_code
    return Row(
        one.label,
        one.task,
        one.provider,
        one.threads,
        one.placement,
        one.energy_source or None,
        hash_model(one.bundle),
        describe_layers(one.bundle),
        {name: value for name, value in one.figures.items() if not name.endswith(_SPREAD)},
        spreads,
        one.verdict,
        one.samples,
        one.latencies,
        error,
        one.profile,
    )
