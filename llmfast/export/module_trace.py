"""Tracing a user's module: PyTorch's exporter records it, and what it can't record is said in the user's terms."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.errors import InputError, UnsupportedError
from llmfast.export.dynamic_axes import DynamicAxes
from llmfast.export.encoder import first_line
from llmfast.export.traced_graph import write_graph
from llmfast.export.user_module import UserModule, flatten_outputs, user_line
from llmfast.report import note

if TYPE_CHECKING:
    import torch

_OPSET = 21
# What `torch.export` says of axes that can't be as free as declared.
_CONSTANT = re.compile(r"You marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)")
_GUARD = re.compile(
    r"Not all values of (\w+) = (\S+) in the specified range.* satisfy the generated guard (.+?)\.?$", re.MULTILINE
)
_FIX = re.compile(r"^ {2}(\w+) = (.+)$", re.MULTILINE)
_RANGE = re.compile(r"Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)")
_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
# Operators that may turn weights into other weights; folded whatever the size, so that no layer's weight is computed
# at run time and each is found by quantization.
_WEIGHT_OPERATORS = frozenset({"Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose"})


def trace_module(user: UserModule, staged: Path) -> tuple[DynamicAxes, tuple[str, ...]]:
    """Trace a module with its weights and write model.onnx.

    Args:
        user: the module.
        staged: the directory to write to.

    Returns:
        The dynamic axes, narrowed to the sizes that the module takes, and the outputs' names.

    Raises:
        InputError: an axis declared free is fixed by the module.
        UnsupportedError: control flow that depends on values, or an operator that ONNX lacks.
    """
    import torch

    with _quiet(), torch.no_grad():
        outputs = list(user.run(user.inputs))
        program, axes = _export(user)
        attention = torch.ops.aten.scaled_dot_product_attention.default
        try:
            exported = torch.onnx.export(
                program.run_decompositions({attention: _attend}),
                input_names=list(user.inputs),
                output_names=outputs,
                opset_version=_OPSET,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise _unsupported(error, user) from error
        _fold_weights(exported.model)
        write_graph(exported.model, _weights_by_name(user.module), staged, _free_names(program, user, axes))
    for name, dimension in axes.dimensions.items():
        if dimension.largest != user.axes.dimensions[name].largest:
            note(f"note: `{name}` ({axes.where(name)}) is at most {dimension.largest}: the module takes no more")
        if dimension.smallest != user.axes.dimensions[name].smallest:
            note(f"note: `{name}` ({axes.where(name)}) is at least {dimension.smallest}: the module takes no less")
    return axes, tuple(outputs)


def _export(user: UserModule) -> "tuple[torch.export.ExportedProgram, DynamicAxes]":
    """Run `torch.export`, a second time with the ranges that it found the first time."""
    import torch

    adapter = _as_adapter(user)
    axes = user.axes
    while True:
        dims = {
            name: torch.export.Dim(name, min=None if size.smallest == 1 else size.smallest, max=size.largest)
            for name, size in axes.dimensions.items()
        }
        shapes = tuple(
            {axis: dims[own] for axis, own in axes.names.get(name, {}).items()} or None for name in user.inputs
        )
        try:
            return torch.export.export(
                adapter, tuple(user.inputs.values()), dynamic_shapes=(shapes,), strict=False
            ), axes
        except torch._dynamo.exc.UserError as error:
            narrower = _narrow(axes, str(error))
            if narrower is None:
                raise _misdeclared(error, user, axes) from error
            axes = narrower
        except Exception as error:  # what the user's code does under tracing may raise anything
            raise _untraceable(error, user) from error


def _as_adapter(user: UserModule) -> "torch.nn.Module":
    """Wrap a module so that it takes and returns plain tensors."""
    import torch

    class Adapter(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = user.module

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            named = dict(zip(user.inputs, tensors, strict=True))
            return tuple(flatten_outputs(self.model(**named) if user.by_name else self.model(*tensors)).values())

    return Adapter().eval()


def _attend(
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attn_mask: "torch.Tensor | None" = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> "torch.Tensor":
    """Compute `scaled_dot_product_attention` by MatMul, Softmax and MatMul, [..., query, head_size].

    The exporter's own form leaves IsNaN and Where over the whole [query, key] matrix, which only serve rows that may
    attend to nothing. Here a factor for each row makes those zero, as PyTorch does.
    """
    import torch

    if dropout_p:
        raise UnsupportedError(
            "attention with dropout outside of training can't be exported",
            "scaled_dot_product_attention(..., dropout_p=self.dropout if self.training else 0.0)",
        )
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if attn_mask is None:
        return torch.softmax(scores, -1) @ value
    lowest = torch.finfo(torch.float32).min
    if attn_mask.dtype == torch.bool:
        attends = attn_mask.any(-1, keepdim=True)
        bias = (1.0 - attn_mask.to(torch.float32)) * lowest
    else:
        attends = attn_mask.amax(-1, keepdim=True) > lowest
        bias = attn_mask.clamp(min=lowest)
    attended = torch.softmax(scores + bias, -1) @ value
    return attended if is_causal else attended * attends.to(torch.float32)


def _weights_by_name(module: Any) -> "dict[str, torch.Tensor]":
    """Return a module's weights, and the parts in which `torch.nn.MultiheadAttention` multiplies by its packed one."""
    import torch

    weights = dict(module.named_parameters())
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.MultiheadAttention) and part.in_proj_weight is not None:
            prefix = f"{name}." if name else ""
            packed = part.in_proj_weight
            query, key, value = packed.chunk(3)
            parts = {"in_proj": packed, "kv_proj": packed[part.embed_dim :]}
            parts |= {"q_proj": query, "k_proj": key, "v_proj": value}
            weights |= {f"{prefix}{role}.weight": tensor for role, tensor in parts.items()}
    return weights


def _fold_weights(model: Any) -> None:
    """Compute weights that are made of other weights, whatever their size."""
    import onnx_ir
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    for node in [node for node in model.graph if node.op_type == "Split" and len(node.inputs) == 2]:
        weight, sizes = (onnx_ir.convenience.get_const_tensor(value) for value in node.inputs)
        if weight is not None and sizes is not None:
            axis = node.attributes.get_int("axis", 0)
            parts = np.split(weight.numpy(), np.cumsum(sizes.numpy())[:-1], axis)
            for output, part in zip(node.outputs, parts, strict=True):
                value = onnx_ir.val(f"{output.name}_part", const_value=onnx_ir.tensor(part))
                model.graph.register_initializer(value)
                output.replace_all_uses_with(value)
    fold_constants(model, should_fold=lambda node: node.op_type in _WEIGHT_OPERATORS or None)
    remove_unused_nodes(model)


def _free_names(program: Any, user: UserModule, axes: DynamicAxes) -> dict[str, str]:
    """Return symbol of the traced program -> the name that the user gave to the dimension."""
    given = [node for node in program.graph.nodes if node.op == "placeholder"][-len(user.inputs) :]
    return {
        str(node.meta["val"].shape[axis]): own
        for node, name in zip(given, user.inputs, strict=True)
        for axis, own in axes.names.get(name, {}).items()
    }


def _narrow(axes: DynamicAxes, message: str) -> DynamicAxes | None:
    """Return the axes within the ranges that a failure suggests, None when it suggests anything else."""
    fixes = _FIX.findall(message.partition("Suggested fixes:")[2])
    narrower = axes
    for name, suggested in fixes:
        bounds = _RANGE.fullmatch(suggested)
        if bounds is None or name not in axes.dimensions:
            return None
        smallest, largest = (int(bound) if bound else None for bound in bounds.groups())
        narrower = narrower.narrow(name, smallest, largest)
    return narrower if narrower != axes else None


def _misdeclared(error: Exception, user: UserModule, axes: DynamicAxes) -> Exception:
    """Say which axis is not as free as declared."""
    message = str(error)
    if constant := _CONSTANT.search(message):
        name, size = constant.groups()
        return InputError(
            f"`{name}` ({axes.where(name)}) can't be dynamic: `forward` of `{user.path.name}` works for {size} only",
            f"leave it out of the dynamic axes, or free `forward` of what holds for {size} only: "
            "an `if` on the shape, int(), a buffer of that size",
        )
    fixes = [f"`{name} = {suggested}`" for name, suggested in _FIX.findall(message.partition("Suggested fixes:")[2])]
    if fixes:
        return InputError(
            f"the dynamic axes of `{user.path.name}` are not as free as declared: PyTorch finds {', '.join(fixes)}",
            "give axes of equal size one name; a size that is a multiple of another can't be declared",
        )
    if guard := _GUARD.search(message):
        name, size, condition = guard.groups()
        return InputError(
            f"`{name}` ({axes.where(name)}) can't have every size from {axes.dimensions[name].smallest} on: "
            f"`{user.path.name}` needs `{condition.replace(size, name)}`",
            f'give it the range in which that holds: torch.export.Dim("{name}", min=...)',
        )
    return _untraceable(error, user)


def _untraceable(error: Exception, user: UserModule) -> Exception:
    if isinstance(error, (InputError, UnsupportedError)):
        return error
    where = user_line(error, user.path)
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return UnsupportedError(
            f"{where} can't be traced: which way it goes, or a size, depends on the values of a tensor",
            "torch.where or torch.cond choose inside the graph; an `if` on sizes or settings is fine",
        )
    return UnsupportedError(
        f"{where} can't be traced: {type(error).__name__}: {first_line(error)}",
        "inside `forward` use PyTorch operations only, no NumPy and no .item()",
    )


def _unsupported(error: Exception, user: UserModule) -> Exception:
    if operator := _OPERATOR.search(str(error)):
        return UnsupportedError(
            f"`{user.path.name}` uses `{operator[1]}`, for which there is no ONNX operator",
            "compute it from other operations",
        )
    cause = error.__cause__ or error
    return UnsupportedError(f"PyTorch can't write `{user.path.name}` as ONNX: {first_line(cause)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's logs and warnings, and what the module prints each time it is traced, off both streams."""
    import torch

    disabled, fast = logging.root.manager.disable, torch.backends.mha.get_fastpath_enabled()
    logging.disable(logging.CRITICAL)
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator without ONNX counterpart
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        torch.backends.mha.set_fastpath_enabled(fast)


def describe_inputs(inputs: "Mapping[str, torch.Tensor]") -> dict[str, dict[str, Any]]:
    """Return what the manifest says of the example inputs: dtype, shape, and the range of their finite values."""
    import torch

    described = {}
    for name, tensor in inputs.items():
        finite = tensor[torch.isfinite(tensor)] if tensor.is_floating_point() else tensor
        low, high = (finite.min().item(), finite.max().item()) if finite.numel() else (0, 0)
        dtype = str(tensor.dtype).removeprefix("torch.")
        described[name] = {"dtype": dtype, "shape": list(tensor.shape), "low": low, "high": high}
    return described
