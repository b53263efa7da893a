"""A PyTorch module from a user's own file: the function that makes it, its weights, what it takes and gives."""

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.errors import InputError, LlmfastError, UnsafeInputError, UnsupportedError
from llmfast.export.dynamic_axes import DynamicAxes, parse_dynamic_axes
from llmfast.export.encoder import first_line

if TYPE_CHECKING:
    import torch

_RETURNS = "return (module, example_inputs) or (module, example_inputs, dynamic_axes)"
# What torch.save writes: a zip archive, before PyTorch 1.6 a bare pickle.
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


@dataclass(frozen=True)
class UserModule:
    """A module ready to be traced: float32, on the CPU, not in training mode.

    Attributes:
        path: the user's file.
        module: what the factory made.
        inputs: name -> example, in the order of `forward`.
        by_name: the examples came as a dict, and go to `forward` as keywords.
        axes: which axes may have other sizes.
    """

    path: Path
    module: "torch.nn.Module"
    inputs: "Mapping[str, torch.Tensor]"
    by_name: bool
    axes: DynamicAxes

    def run(self, inputs: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """Call the module, and return its outputs by name."""
        result = self.module(**inputs) if self.by_name else self.module(*inputs.values())
        return flatten_outputs(result)


def load_user_module(path: Path, name: str, weights: Path | None) -> UserModule:
    """Run a user's file, call its factory, and load weights into the module it makes.

    Args:
        path: a Python file.
        name: a function of it without parameters.
        weights: a .safetensors file with every tensor of the module's state dict; None keeps what the factory gave.

    Raises:
        InputError: the file or the factory raises or returns something else; weights that do not fit, or are not
            finite.
        UnsafeInputError: the weights are a pickle.
    """
    import torch

    factory = _find_factory(path, name)
    torch.manual_seed(0)  # a factory that leaves random weights makes the same ones every time
    with explain(path, f"`{name}()`"):
        made = factory()
    module, examples, dynamic = _unpack(made, path, name)
    if weights is not None:
        _load_weights(module, weights, path, name)
    module = module.eval().to("cpu", torch.float32)
    for entry, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"weight `{entry}` of `{weights or f'{path}:{name}'}` has NaN or infinite values")
    by_name = isinstance(examples, Mapping)
    inputs = _name_inputs(module, examples, f"`{path}:{name}`")
    inputs = {key: _as_input(tensor) for key, tensor in inputs.items()}
    with explain(path, "`forward` on the example inputs"), torch.no_grad():
        given = module(**inputs) if by_name else module(*inputs.values())
        outputs = list(flatten_outputs(given))
    if clash := next((output for output in outputs if output in inputs), None):
        raise InputError(f"`{path}:{name}`: `{clash}` is an input and an output", "give the output another name")
    shapes = {key: tuple(tensor.shape) for key, tensor in inputs.items()}
    return UserModule(path, module, inputs, by_name, parse_dynamic_axes(dynamic, shapes, outputs, f"{path}:{name}"))


def flatten_outputs(result: Any, name: str = "output") -> "dict[str, torch.Tensor]":
    """Return what a module gave as tensors by name.

    Keys of a dict, fields of a dataclass or named tuple name their tensors; a lone tensor is `output`, those of a
    tuple `output_0`, `output_1` and so on; nested ones are `outer_inner`. None is left out.
    """
    import torch

    if isinstance(result, torch.Tensor):
        if result.is_complex():
            raise UnsupportedError(f"`forward` returns complex numbers as `{name}`", "torch.view_as_real makes floats")
        return {name: result}
    if isinstance(result, Mapping):
        parts = {str(key): value for key, value in result.items()}
    elif is_dataclass(result) and not isinstance(result, type):
        parts = {field.name: getattr(result, field.name) for field in fields(result)}
    elif hasattr(result, "_fields"):
        parts = dict(zip(result._fields, result, strict=True))
    elif isinstance(result, (tuple, list)):
        names = [name] if len(result) == 1 else [f"{name}_{index}" for index in range(len(result))]
        return _merge([flatten_outputs(value, own) for own, value in zip(names, result, strict=True)])
    elif result is None:
        return {}
    else:
        raise InputError(
            f"`forward` returns a `{type(result).__name__}` as `{name}`, which is no tensor",
            "return tensors only; a model of transformers does with config.use_cache = False",
        )
    prefix = "" if name == "output" else f"{name}_"
    return _merge([flatten_outputs(value, prefix + key) for key, value in parts.items()])


@contextmanager
def explain(path: Path, what: str) -> Iterator[None]:
    """Turn what a user's code raises into an error that names its line."""
    try:
        yield
    except LlmfastError:
        raise
    except (Exception, SystemExit) as error:
        is_missing = isinstance(error, ModuleNotFoundError)
        hint = "the file runs in llmfast's environment: install the package there" if is_missing else ""
        raise InputError(
            f"{what} of `{path.name}` fails at {user_line(error, path)}: {type(error).__name__}: {first_line(error)}",
            hint,
        ) from error


def user_line(error: BaseException, path: Path) -> str:
    """Return `file:line` of the innermost frame of an exception in the user's folder, the file itself without one."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"`{Path(error.filename).name}:{error.lineno}`"
    folder = path.resolve().parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if folder in file.parents and "site-packages" not in file.parts:
            source = f", `{frame.line}`" if frame.line else ""
            return f"`{file.relative_to(folder)}:{frame.lineno}`{source}"
    return f"`{path.name}`"


def _find_factory(path: Path, name: str) -> Any:
    if not path.is_file():
        raise InputError(f"not found: `{path}`", "--module takes a Python file and a function: path/to/file.py:factory")
    spec = importlib.util.spec_from_file_location(f"user_module_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"not a Python file: `{path}`", "--module takes path/to/file.py:factory")
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code  # dataclasses look their module up
    # As `python file.py` has it; then what the worker leaves out, last so that it hides no package of llmfast's.
    elsewhere = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [str(path.resolve().parent), *sys.path, *elsewhere, os.getcwd()]
    with explain(path, "running the code"):
        spec.loader.exec_module(code)
    factory = getattr(code, name, None)
    if callable(factory):
        return factory
    own = [key for key, value in vars(code).items() if inspect.isfunction(value) and value.__module__ == spec.name]
    close = get_close_matches(name, own, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"its functions: {', '.join(own) or 'none'}"
    raise InputError(f"no function `{name}` in `{path}`", hint)


def _unpack(made: Any, path: Path, name: str) -> tuple[Any, Any, Any]:
    import torch

    where = f"`{path}:{name}`"
    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
        kind = f"{len(made)} values" if isinstance(made, (tuple, list)) else f"a `{type(made).__name__}`"
        raise InputError(f"{where} returns {kind}", _RETURNS)
    module, examples, *dynamic = made
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"{where} returns a `{type(module).__name__}` as its module, not a torch.nn.Module", _RETURNS)
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    if not isinstance(examples, (tuple, list, Mapping)) or not examples:
        raise InputError(f"{where} returns no example inputs", "a tuple of tensors, or a dict of them by name")
    named = examples.items() if isinstance(examples, Mapping) else enumerate(examples)
    for key, value in named:
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{where}: example input `{key}` is a `{type(value).__name__}`, not a tensor",
                "a graph takes tensors; set everything else in the module's constructor",
            )
    return module, examples, dynamic[0] if dynamic else None


def _name_inputs(module: Any, examples: Any, where: str) -> dict[str, Any]:
    """Name the examples after the parameters of `forward`, and put those of a dict in their order."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(**examples) if isinstance(examples, Mapping) else signature.bind(*examples)
    except TypeError as error:
        raise InputError(
            f"{where}: the example inputs do not fit `forward{signature}`: {error}",
            "give one tensor for each parameter that has no default",
        ) from error
    inputs: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            inputs |= {f"{name}_{index}": tensor for index, tensor in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            inputs |= value
        else:
            inputs[name] = value
    return inputs


def _as_input(tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    tensor = tensor.detach().to("cpu")
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def _load_weights(module: Any, file: Path, path: Path, name: str) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise InputError(f"not found: `{file}`", "--weights takes a .safetensors file")
    with file.open("rb") as opened:
        head = opened.read(8)
    if head.startswith(_ZIP) or (file.suffix != ".safetensors" and head.startswith(_PICKLE)):
        raise UnsafeInputError(
            f"`{file}` is a pickle, which can run code when it is read",
            "convert it where you trust it: safetensors.torch.save_file(module.state_dict(), 'weights.safetensors')",
        )
    try:
        given = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"truncated or corrupt safetensors: `{file}`: {first_line(error)}") from error
    own = module.state_dict()
    # A file stores tensors that share memory once, under one of their names.
    places = {key: (tensor.data_ptr(), tensor.shape) for key, tensor in own.items()}
    covered = {places[key] for key in given if key in places}
    missing = [key for key in own if key not in given and places[key] not in covered]
    unexpected = [key for key in given if key not in own]
    if missing or unexpected:
        raise InputError(
            f"`{file}` does not fit `{path}:{name}`: {_list('missing', missing)}{_list('unexpected', unexpected)}",
            _prefix_hint(missing, unexpected) or "the weights belong to another module, or to other sizes of it",
        )
    for key, tensor in given.items():
        if tensor.shape != own[key].shape:
            raise InputError(
                f"`{file}`: weight `{key}` has shape {list(tensor.shape)}, "
                f"the module of `{path}:{name}` wants {list(own[key].shape)}",
                "make the module with the sizes it was trained with",
            )
    with torch.no_grad():
        for key, tensor in given.items():
            own[key].copy_(tensor)


def _list(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) "


def _prefix_hint(missing: list[str], unexpected: list[str]) -> str:
    """Say so when the file's names are the module's behind one prefix, as wrappers leave them."""
    for name in unexpected[:1]:
        tail = next((one for one in missing if name.endswith(f".{one}")), "")
        if tail:
            prefix = name.removesuffix(tail)
            return f"the file's names begin with `{prefix}`: save the state dict of the module inside the wrapper"
    return ""


def _merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: tensor for part in parts for name, tensor in part.items()}
