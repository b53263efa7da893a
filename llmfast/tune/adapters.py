"""Low-rank adapters: W + B A * alpha / rank is trained in A and B alone, and merged into W at the end.

Gradients and optimizer state are as small as the adapters; a new head is trained whole.
Source: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685
"""

from typing import TYPE_CHECKING, Any

from llmfast.errors import UnsupportedError
from llmfast.export.encoder import first_line

if TYPE_CHECKING:
    import torch

# The update is scaled by alpha / rank; twice the rank is the usual choice.
_ALPHA_PER_RANK = 2


def add_adapters(model: Any, rank: int) -> Any:
    """Return the model with adapters beside all linear layers but its heads, which train whole; the rest is frozen.

    Raises:
        UnsupportedError: the model has no layer that adapters fit.
    """
    from peft import LoraConfig, get_peft_model

    heads = _heads(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=_ALPHA_PER_RANK * rank,
        target_modules="all-linear",
        exclude_modules=heads or None,
        modules_to_save=heads or None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UnsupportedError(f"--lora: {first_line(error)}", "train the whole model instead") from error


def _heads(model: Any) -> list[str]:
    """Return the modules on top of the pretrained model, without the one that gives a decoder's logits."""
    base, vocabulary = getattr(model, "base_model", model), getattr(model, "get_output_embeddings", lambda: None)()
    if base is model:
        return []
    on_top = ((name, part) for name, part in model.named_children() if part is not base and part is not vocabulary)
    return [name for name, part in on_top if next(part.parameters(), None) is not None]


def merge_adapters(model: Any) -> "torch.nn.Module":
    """Return the plain model, the adapters added to its weights."""
    merged: torch.nn.Module = model.merge_and_unload()
    return merged
