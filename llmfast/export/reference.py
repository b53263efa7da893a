"""PyTorch's model of a checkpoint in bounded memory: a module has float32 weights only while it computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from llmfast.errors import InputError

_OPTIONS = {"attn_implementation": "eager", "trust_remote_code": False}


def load_streamed(path: Path, config: Any, prefix: str = "model.") -> Any:
    """Load a causal language model as `transformers` does, but leave its weights in the files.

    Args:
        path: the checkpoint's folder.
        config: its config, or that of its part for texts.
        prefix: what the names of the weights below the head begin with in the whole model.

    safetensors are mapped into memory, not read: the kernel may drop their pages at any time. Each module
    converts its own weights to float32 before it computes and forgets them after, so the largest single
    module bounds the memory that is really used. The model computes in float32, whatever the files hold.

    Raises:
        InputError: weights and config do not fit.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        stored = AutoModelForCausalLM.from_pretrained(path, dtype="auto", **_OPTIONS)
    except Exception as error:  # damaged folders make it raise many kinds
        raise InputError(
            f"PyTorch can't load `{path}`: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "weights and config.json do not belong together",
        ) from error
    # A model of its own for the float32 buffers: those of `stored` are rounded to the type of its weights.
    weights = stored.state_dict()
    return build_streamed(
        config, lambda name: weights[prefix + name.removeprefix("model.") if name.startswith("model.") else name]
    )


def build_streamed(config: Any, read: Callable[[str], Any]) -> Any:
    """Build the causal language model of a config, which takes its weights from `read(name)`."""
    import torch
    from transformers import AutoModelForCausalLM

    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **_OPTIONS)
    stream_weights(model, read)
    return model.eval()


def stream_weights(model: Any, read: Callable[[str], Any]) -> None:
    """Let every module of a model take its weights from `read(name)` when it computes, as float32."""
    for prefix, module in model.named_modules():
        names = [name for name, parameter in module.named_parameters(recurse=False)]
        if names:
            _stream_module(module, {name: f"{prefix}.{name}" if prefix else name for name in names}, read)


def _stream_module(module: Any, names: dict[str, str], read: Callable[[str], Any]) -> None:
    import torch

    absent = {name: getattr(module, name) for name in names}

    def fill(*_: Any) -> None:
        for name, stored in names.items():
            module._parameters[name] = torch.nn.Parameter(read(stored).float(), requires_grad=False)

    def forget(*_: Any) -> None:
        module._parameters.update(absent)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(forget, always_call=True)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Give modules made inside parameters without memory, and real buffers."""
    import torch

    register = torch.nn.Module.register_parameter

    def register_on_meta(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    with mock.patch.object(torch.nn.Module, "register_parameter", register_on_meta):
        yield
