"""Losses over a whole vocabulary, in little memory.

A decoder's logits are its largest array: float32 probabilities of 2,048 tokens of 49,152 are 0.4 GB, and PyTorch's own
losses keep several such arrays until the backward pass. Here loss and gradient are computed together, some tokens at a
time, in a part that fits into the cache, and of all of it only the gradient is kept, as narrow as the logits are.
Source of the idea: Hsu et al. 2024, https://arxiv.org/abs/2410.10989
"""

from typing import Any

# An autograd function is a class, so this module is imported where a loss is computed, not before.
import torch  # noqa: TID253
from torch.nn.functional import log_softmax  # noqa: TID253

_ELEMENTS = 1 << 21  # of a part: 8 MB in float32


def token_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher_logits: torch.Tensor | None = None,
    temperature: float = 1.0,
    label_weight: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (1 - a) T^2 KL(teacher || student) + a cross-entropy, summed over tokens; a = label_weight.

    Args:
        logits: the student's, float [..., vocabulary].
        targets: the tokens that come next, int64 [...].
        teacher_logits: float [..., vocabulary]; None when a is 1.
        temperature: T; divides the logits of both in the divergence.
        label_weight: from 0 to 1.

    Returns:
        The sum, a float32 scalar with a gradient; and each token's cross-entropy, float32 [...], without.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    theirs = None if teacher_logits is None else teacher_logits.reshape(flat.shape)
    total, losses = _TokenLosses.apply(flat, theirs, targets.flatten(), temperature, label_weight)
    return total, losses.view(targets.shape)


class _TokenLosses(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        theirs: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        label_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # float16 would lose what is small: the scale of its loss is multiplied in later.
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=kept) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(logits), device=logits.device)
        total = torch.zeros((), device=logits.device)
        size = max(1, _ELEMENTS // logits.shape[1])
        for start in range(0, len(logits), size):
            part = slice(start, start + size)
            ours, expected = logits[part].float(), targets[part, None]
            likelihoods = log_softmax(ours, -1)
            losses[part] = -likelihoods.gather(1, expected).squeeze(1)
            total += label_weight * losses[part].sum()
            slope = torch.zeros_like(ours)
            if label_weight:
                slope = likelihoods.exp().mul_(label_weight)
                slope.scatter_add_(1, expected, slope.new_full(expected.shape, -label_weight))
            if theirs is not None and label_weight < 1:
                soft = likelihoods if temperature == 1 else log_softmax(ours.div_(temperature), -1)
                wanted = log_softmax(theirs[part].float().div_(temperature), -1)
                share = wanted.exp()
                total += (1 - label_weight) * temperature**2 * (share * (wanted - soft)).sum()
                slope.add_(soft.exp().sub_(share), alpha=(1 - label_weight) * temperature)
            if gradient is not None:
                gradient[part] = slope
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[0]).to(ctx.dtype), None, None, None, None
