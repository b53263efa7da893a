"""Proof that a traced module computes what PyTorch does, at its example inputs and with free axes at other sizes.

The examples are cut or repeated along their free axes, so that integers, masks and lengths stay in the range that the
module expects; floating-point inputs without infinities are drawn anew.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmfast.errors import GateError, InputError, LlmfastError
from llmfast.export.dynamic_axes import Dimension, DynamicAxes
from llmfast.export.encoder import first_line
from llmfast.export.traced_parity import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE, compare
from llmfast.export.user_module import UserModule, user_line
from llmfast.runtime import open_session

_LONGEST = 1024  # a bound on a size is tried itself up to here
Arrays = dict[str, np.ndarray]


def prove_module(user: UserModule, graph: Path, axes: DynamicAxes, threads: int | None) -> dict[str, Any]:
    """Compare ONNX Runtime with PyTorch, output by output.

    Args:
        user: the PyTorch side, run as its users do.
        graph: the ONNX side.
        axes: which axes are free, and in what range.
        threads: threads of ONNX Runtime.

    Returns:
        `max_abs_diff`; `max_rel_diff`, over the largest value of the same output; `sizes`, the dimensions' sizes in
        each run.

    Raises:
        InputError: PyTorch itself fails at a size in the declared range, gives NaN, or something else each time.
        GateError: a difference over the tolerance.
    """
    session = open_session(graph, threads=threads)
    rng = np.random.default_rng(0)
    examples = {name: tensor.numpy() for name, tensor in user.inputs.items()}
    _check_repeatable(user, examples)
    max_abs, max_rel = 0.0, 0.0
    runs = choose_sizes(axes.dimensions)
    for number, sizes in enumerate(runs):
        where = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "the example inputs"
        shapes = axes.sizes({name: array.shape for name, array in examples.items()}, sizes)
        feeds = {name: _resize(rng, array, shapes[name], number > 0) for name, array in examples.items()}
        expected = _run_reference(user, feeds, where)
        try:
            actual = session.run(list(expected), feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise GateError(
                f"ONNX Runtime can't run the exported module at {where}: {first_line(error)}",
                _range_hint(axes.dimensions, sizes),
            ) from error
        for (name, theirs), got in zip(expected.items(), actual, strict=True):
            try:
                absolute, relative = compare(name, where, got, theirs)
            except GateError as error:
                raise GateError(error.message, _range_hint(axes.dimensions, sizes) or error.hint) from error
            max_abs, max_rel = max(max_abs, absolute), max(max_rel, relative)
    return {"max_abs_diff": max_abs, "max_rel_diff": max_rel, "sizes": runs}


def choose_sizes(dimensions: Mapping[str, Dimension]) -> list[dict[str, int]]:
    """Return sizes to try: the examples', the smallest, larger ones, the largest, and each dimension alone.

    Without free dimensions there are two runs at the examples' sizes, the second with other values.
    """
    example = {name: dimension.size for name, dimension in dimensions.items()}
    smallest = {name: dimension.smallest for name, dimension in dimensions.items()}
    other = {name: _within(dimension, dimension.size + 3) for name, dimension in dimensions.items()}
    largest = {
        name: dimension.largest if dimension.largest and dimension.largest <= _LONGEST else dimension.size
        for name, dimension in dimensions.items()
    }
    runs = [smallest, other, largest]
    runs += [example | {name: other[name]} for name in dimensions]
    runs += [example | {name: smallest[name]} for name in dimensions]
    unique: list[dict[str, int]] = []
    for run in runs:
        if run not in unique:
            unique.append(run)
    return [example, *unique]


def _within(dimension: Dimension, size: int) -> int:
    return size if dimension.largest is None else min(size, dimension.largest)


def _resize(rng: np.random.Generator, example: np.ndarray, shape: tuple[int, ...], vary: bool) -> np.ndarray:
    """Cut or repeat an example along its axes; draw floating-point values anew where that can't leave their range."""
    for axis, size in enumerate(shape):
        example = np.take(example, np.arange(size), axis, mode="wrap")
    is_continuous = example.dtype.kind == "f" and np.isfinite(example).all() and len(np.unique(example)) > 2
    if vary and is_continuous:
        drawn = rng.normal(example.mean(), example.std(), shape).astype(example.dtype)
        example = np.clip(drawn, example.min(), example.max())
    return np.ascontiguousarray(example)


def _run_reference(user: UserModule, feeds: Arrays, where: str) -> Arrays:
    import torch

    tensors: dict[str, torch.Tensor] = {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}
    try:
        with torch.inference_mode():
            outputs = {name: tensor.numpy() for name, tensor in user.run(tensors).items()}
    except LlmfastError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise InputError(
            f"{user_line(error, user.path)} fails at {where}, a size that the dynamic axes allow: "
            f"{type(error).__name__}: {first_line(error)}",
            'give the axis its range: torch.export.Dim("length", min=2, max=512) in place of a name',
        ) from error
    for name, array in outputs.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise InputError(
                f"output `{name}` of `{user.path.name}` is NaN in PyTorch itself, at {where}",
                "give example inputs, and weights, on which it is a number",
            )
    return outputs


def _check_repeatable(user: UserModule, examples: Arrays) -> None:
    first, second = (_run_reference(user, examples, "the example inputs") for _ in range(2))
    for name, array in first.items():
        if not np.allclose(array, second[name], rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE):
            raise InputError(
                f"output `{name}` of `{user.path.name}` is another each time: something in `forward` is random, or "
                "keeps a state",
                "functional.dropout(x, p, training=self.training) is off outside of training; without `training` it "
                "is on",
            )


def _range_hint(dimensions: Mapping[str, Dimension], sizes: Mapping[str, int]) -> str:
    """Return what to declare where a run at size 1 failed, which PyTorch's exporter may not tell from a constant."""
    ones = [name for name, size in sizes.items() if size == 1 and dimensions[name].size > 1]
    return f'if size 1 never occurs, say so: torch.export.Dim("{ones[0]}", min=2)' if ones else ""
