"""A PyTorch encoder: loading it, its limits, and the form in which it is traced."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast.errors import InputError, UnsupportedError
from llmfast.export.pooling import Pooling, read_output

if TYPE_CHECKING:
    import torch


def load_encoder(source: Path, config: Any, auto_model: str) -> Any:
    """Load the PyTorch model in float32; a weight that it needs and does not get is an error."""
    # The pooler of a base model feeds none of our outputs, and some checkpoints come without it.
    # So it is with what training puts in place of sound that it masks.
    model = load_pretrained(
        source,
        config,
        auto_model,
        "--task",
        lambda _, name: name.startswith("pooler.") or name.endswith("masked_spec_embed"),
        attn_implementation="eager",
    )
    return model.eval()


def load_pretrained(
    source: Path,
    config: Any,
    auto_model: str,
    option: str,
    may_lack: Callable[[Any, str], bool],
    **settings: Any,
) -> Any:
    """Load a model in float32, all of whose weights are there and finite.

    Args:
        source: the checkpoint's folder.
        config: what the model shall be.
        auto_model: a class of `transformers`.
        option: of the command, that may ask for another model than the checkpoint's.
        may_lack: whether a model does without a weight, by the model and the weight's name.
        settings: further ones of `from_pretrained`.

    Raises:
        InputError: weights are missing, do not fit, or are not finite.
        UnsupportedError: transformers has no such model.
    """
    import torch
    import transformers

    factory = getattr(transformers, auto_model)
    if type(config) not in factory._model_mapping:
        raise UnsupportedError(f"`{source}`: transformers has no {auto_model} for a `{config.model_type}`")
    try:
        model, info = factory.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **settings,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"weights of `{source}` do not fit its config.json: {first_line(error)}") from error
    missing = sorted(name for name in info["missing_keys"] if not may_lack(model, name))
    if missing:
        raise InputError(
            f"`{source}` lacks {len(missing)} weights of {type(model).__name__}, the first is `{missing[0]}`",
            f"the checkpoint is incomplete, or made for another {option}",
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"weight `{name}` of `{source}` has NaN or infinite values")
    return model


def as_module(model: Any, outputs: tuple[str, ...], pooling: Pooling | None) -> "torch.nn.Module":
    """Wrap a model so that it takes the graph's inputs and returns the graph's outputs."""
    import torch

    # The functions that build a model's mask take one of four dimensions as it is. A model whose layers look
    # at windows of the text needs two masks, so it must build them itself.
    code = sys.modules[type(model).__module__]
    windowed = hasattr(code, "create_bidirectional_sliding_window_mask")
    takes_additive_mask = hasattr(code, "create_bidirectional_mask") and not windowed
    has_token_types = token_types(model) > 0
    positions = _position_embeddings(model)
    counts_positions = positions is not None and positions.padding_idx is None

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor, ...]:
            mask = attention_mask
            if takes_additive_mask:
                mask = (1.0 - mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min
            settings: dict[str, Any] = {}
            if has_token_types:
                # A single zero becomes a constant row; the models' own default is as long as the text.
                zero = torch.zeros(1, 1, dtype=torch.int64)
                settings["token_type_ids"] = zero if token_type_ids is None else token_type_ids
            if counts_positions:
                # The models cut theirs from a table, and through a Slice ONNX Runtime can't see that they are as
                # many as the tokens. This is 0, 1, 2, ... of the same length, made of operations that it sees through.
                settings["position_ids"] = input_ids.amax(0, keepdim=True).clamp(1, 1).cumsum(1) - 1
            result = self.model(input_ids=input_ids, attention_mask=mask, **settings)
            return tuple(read_output(result, name, attention_mask, pooling) for name in outputs)

    return Encoder().eval()


def token_types(model: Any) -> int:
    """Return how many types of tokens the model tells apart; 1, as in RoBERTa, makes the input say nothing."""
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        return 0
    return int(getattr(model.config, "type_vocab_size", 0))


def context_length(model: Any) -> int:
    """Return how many positions the model has; RoBERTa's begin behind its padding index."""
    table = _position_embeddings(model)
    if table is None:
        return int(model.config.max_position_embeddings)
    return int(table.num_embeddings) - (0 if table.padding_idx is None else table.padding_idx + 1)


def _position_embeddings(model: Any) -> "torch.nn.Embedding | None":
    import torch

    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return module
    return None


def first_line(error: BaseException) -> str:
    """Return what fits an error message of a library's own, which may be pages long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
