"""What `inspect` finds in a model."""

from dataclasses import asdict, dataclass
from typing import Any

from llmfast.bundle import Step

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class File:
    """A file of a model and its bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Value:
    """An input or output of a graph; of its shape, free axes have names or `?`."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class Stored:
    """How many weights are stored as a type, and their bytes."""

    dtype: str
    tensors: int
    bytes: int


@dataclass
class LayerGroup:
    """Linear layers of one role and number format.

    Attributes:
        role: what the exporter called them: `query`, `down_proj`.
        weights: their number format.
        bits: of a weight.
        block_size: input features that share a scale; 0 is one scale per row or for all, None no scale.
        symmetric: no zero points are stored; None where nothing is quantized.
        activations: how they are multiplied.
        layers: how many.
        num_parameters: of all.
        bytes: of all; what several share counts once.
    """

    role: str
    weights: str
    bits: int
    block_size: int | None
    symmetric: bool | None
    activations: str
    layers: int = 0
    num_parameters: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class CacheFacts:
    """A decoder's keys and values: tensors, and bytes of one sequence for a token and, where known, a full context."""

    tensors: int
    bytes_per_token: int
    context_length: int | None
    bytes_at_context: int | None


@dataclass(frozen=True)
class SlowForm:
    """A form of nodes that a kernel is slow or wrong with.

    Attributes:
        rule: its name.
        affects: what suffers.
        nodes: how many have it.
        example: the first one's name.
        reason: why.
        remedy: what to do.
    """

    rule: str
    affects: str
    nodes: int
    example: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class GraphFacts:
    """One graph.

    Attributes:
        role: `model`, `prefill`, `decoder`, ...
        file: its name.
        opset: of ONNX's own operators.
        producer: who exported it.
        inputs: of each run.
        outputs: of each run.
        operators: name -> nodes, most first.
        dtypes: what weights are stored as.
        layers: one entry per role and number format, in the graph's order.
        cache: None without one.
        findings: slow forms.
    """

    role: str
    file: str
    opset: int
    producer: str
    inputs: list[Value]
    outputs: list[Value]
    operators: dict[str, int]
    dtypes: list[Stored]
    layers: list[LayerGroup]
    cache: CacheFacts | None
    findings: list[SlowForm]


@dataclass(frozen=True)
class Inspection:
    """A model.

    Attributes:
        model: its name.
        task: what it is for.
        source: what it was made of.
        architecture: sizes, as its manifest has them.
        num_parameters: of the whole model.
        weight_bytes: of all weights, each once.
        bits_per_weight: None when the parameters are not known.
        size_bytes: of all files.
        files: all of them.
        lineage: the steps that made it.
        graphs: one entry a graph.
    """

    model: str
    task: str
    source: dict[str, Any]
    architecture: dict[str, Any]
    num_parameters: int
    weight_bytes: int
    bits_per_weight: float | None
    size_bytes: int
    files: list[File]
    lineage: list[Step]
    graphs: list[GraphFacts]

    def document(self) -> dict[str, Any]:
        """Return what JSON can hold: `schema_version`, and the attributes of this and what it holds by their names."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}
