"""Which axes of a module's inputs may have other sizes than the examples: what users write, checked and named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from llmfast.errors import InputError

_EXAMPLE = 'for example {"x": {0: "batch", 1: "length"}}'
# Sizes beyond this are not told apart from "any".
UNBOUNDED = 1 << 31


@dataclass(frozen=True)
class Dimension:
    """A size that is free.

    Attributes:
        name: axes with the same name have the same size.
        size: in the examples.
        smallest: the smallest it may be.
        largest: the largest, None when the module sets no bound.
    """

    name: str
    size: int
    smallest: int = 1
    largest: int | None = None


@dataclass(frozen=True)
class DynamicAxes:
    """The free axes of a module's inputs.

    Attributes:
        names: input -> axis -> the dimension's name.
        dimensions: by name.
    """

    names: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    dimensions: Mapping[str, Dimension] = field(default_factory=dict)

    def where(self, name: str) -> str:
        """Spell the axes that a dimension is the size of."""
        places = [(given, axis) for given, axes in self.names.items() for axis, own in axes.items() if own == name]
        return ", ".join(f"axis {axis} of `{given}`" for given, axis in places)

    def narrow(self, name: str, smallest: int | None, largest: int | None) -> "DynamicAxes":
        """Return the axes with one dimension bounded further."""
        old = self.dimensions[name]
        bounds = [bound for bound in (old.largest, largest) if bound is not None]
        bounded = replace(old, smallest=max(old.smallest, smallest or 0), largest=min(bounds, default=None))
        return replace(self, dimensions={**self.dimensions, name: bounded})

    def sizes(self, shapes: Mapping[str, Sequence[int]], chosen: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return each input's shape with the dimensions at the chosen sizes."""
        return {
            given: tuple(
                chosen[self.names[given][axis]] if axis in self.names.get(given, {}) else size
                for axis, size in enumerate(shape)
            )
            for given, shape in shapes.items()
        }


def parse_dynamic_axes(
    dynamic: Any, shapes: Mapping[str, Sequence[int]], outputs: Sequence[str], where: str
) -> DynamicAxes:
    """Read dynamic axes as llmfast, `torch.onnx.export` or `torch.export` spell them.

    Args:
        dynamic: None; input -> axis -> name, or -> list of axes; or torch's `dynamic_shapes`, by name or position,
            whose entries are names, `torch.export.Dim`, `Dim.AUTO`, `Dim.DYNAMIC`, or None and `Dim.STATIC`.
        shapes: input -> shape of its example.
        outputs: names of the outputs, whose axes follow from the inputs' and may be named too.
        where: the factory, for messages.

    Raises:
        InputError: an unknown input, an axis that is not there, sizes that contradict each other.
    """
    if dynamic is None:
        return DynamicAxes()
    if not isinstance(dynamic, Mapping):
        if not isinstance(dynamic, Sequence) or isinstance(dynamic, str) or len(dynamic) > len(shapes):
            raise InputError(f"`{where}`: dynamic axes are a `{type(dynamic).__name__}`", f"give a dict, {_EXAMPLE}")
        dynamic = dict(zip(shapes, dynamic, strict=False))
    names: dict[str, dict[int, str]] = {}
    dimensions: dict[str, Dimension] = {}
    for given, entries in dynamic.items():
        if given in outputs:
            continue
        if given not in shapes:
            close = get_close_matches(str(given), list(shapes), n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"inputs: {', '.join(shapes)}"
            raise InputError(f"`{where}`: dynamic axes of `{given}`, which is no input", hint)
        for axis, entry in _by_axis(entries, given, where).items():
            rank = len(shapes[given])
            if not isinstance(axis, int) or not -rank <= axis < rank:
                raise InputError(f"`{where}`: dynamic axis {axis} of `{given}`, whose example has {rank} axes")
            found = _dimension(entry, f"{given}_{axis % rank}", shapes[given][axis], f"{where}`: `{given}")
            if found is None:
                continue
            known = dimensions.setdefault(found.name, found)
            if known.size != found.size:
                raise InputError(
                    f"`{where}`: `{found.name}` is {known.size} in one example input and {found.size} in `{given}`",
                    "axes of one name have one size: use two names, or examples that agree",
                )
            names.setdefault(given, {})[axis % rank] = found.name
    return DynamicAxes(names, dimensions)


def _by_axis(entries: Any, given: str, where: str) -> dict[Any, Any]:
    if entries is None:
        return {}
    if isinstance(entries, Mapping):
        return dict(entries)
    if isinstance(entries, Sequence) and not isinstance(entries, str):
        if all(isinstance(entry, int) for entry in entries):
            return {axis: f"{given}_{axis}" for axis in entries}
        return dict(enumerate(entries))
    raise InputError(f"`{where}`: dynamic axes of `{given}` are `{entries!r}`", _EXAMPLE)


def _dimension(entry: Any, default: str, size: int, where: str) -> Dimension | None:
    """Read one entry; None is an axis that stays as it is."""
    if entry is None or isinstance(entry, int) or _hint(entry) == "STATIC":
        return None
    if _hint(entry):
        return Dimension(default, size)
    if isinstance(entry, str):
        found = Dimension(entry, size)
    elif type(entry).__name__ == "Dim":
        largest = int(entry.max) if entry.max < UNBOUNDED else None
        found = Dimension(entry.__name__, size, max(1, int(entry.min)), largest)
    else:
        raise InputError(
            f"`{where}`: `{entry!r}` is no name and no torch.export.Dim", "sizes computed from others can't be declared"
        )
    if not found.name.isidentifier():
        raise InputError(f"`{where}`: `{found.name}` is no name for a dynamic axis", "letters, digits and _")
    if not found.smallest <= size <= (found.largest or UNBOUNDED):
        raise InputError(f"`{where}`: the example's size {size} is outside the range of `{found.name}`")
    return found


def _hint(entry: Any) -> str:
    """Return AUTO, DYNAMIC or STATIC for torch's hints, empty for anything else."""
    kind = getattr(entry, "type", None) if type(entry).__name__ == "_DimHint" else None
    return str(kind.name) if kind is not None else ""
