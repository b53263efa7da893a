"""Taking input channels from a linear layer: what each is worth, and how the others can stand in for it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# Of the mean of the diagonal; keeps the correction small where the text says little.
_DAMPING = 0.01


def damp(gram: "torch.Tensor") -> "torch.Tensor":
    """Return a matrix of second moments in float64, its diagonal raised a little."""
    import torch

    exact = gram.double()
    return exact + torch.eye(len(exact), dtype=torch.float64) * (_DAMPING * exact.diagonal().mean() + 1e-12)


def group_losses(weight: "torch.Tensor", gram: "torch.Tensor", size: int) -> "torch.Tensor":
    """Return what the output loses without each group of input channels when the others stand in as well as they can.

    That is tr(W_g (H^-1_gg)^-1 W_g^T) with H = E x x^T: for groups of one, the saliency of optimal brain surgeon
    (Hassibi and Stork 1992, https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html).

    Args:
        weight: float32 [N, K].
        gram: float32 [K, K], the mean of x x^T.
        size: channels that follow one another and go together.

    Returns:
        float64 [K / size].
    """
    import torch

    inverse = torch.linalg.inv(damp(gram))
    groups = len(inverse) // size
    blocks = torch.stack([inverse[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])
    columns = weight.double().reshape(len(weight), groups, size).permute(1, 2, 0)  # [groups, size, N]
    losses: torch.Tensor = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
    return losses


def group_outputs(weight: "torch.Tensor", gram: "torch.Tensor", size: int) -> "torch.Tensor":
    """Return the mean square of what each group of input channels adds to the output, float64 [K / size]."""
    import torch

    groups = len(gram) // size
    matrix, columns = gram.double(), weight.double()
    spans = [slice(g * size, (g + 1) * size) for g in range(groups)]
    return torch.stack([((columns[:, span] @ matrix[span, span]) * columns[:, span]).sum() for span in spans])


def keep_inputs(
    weight: "torch.Tensor", gram: "torch.Tensor", kept: Sequence[int] | np.ndarray, compensate: bool
) -> "torch.Tensor":
    """Return a linear layer's weight for fewer input channels.

    Args:
        weight: float32 [N, K].
        gram: float32 [K, K], the mean of x x^T.
        kept: the channels that stay, ascending.
        compensate: add what makes E |W x - W' x_kept|^2 the least; otherwise the columns stay as they are.

    Returns:
        float32 [N, len(kept)].
    """
    import torch

    chosen = torch.as_tensor(np.asarray(kept))
    columns = weight.index_select(1, chosen)
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[chosen] = False
    if not compensate or not gone.any():
        return columns
    damped = damp(gram)
    # The share of each channel that goes which the channels that stay predict, float64 [gone, kept].
    predicted = torch.linalg.solve(damped[chosen][:, chosen], gram.double()[chosen][:, gone]).T
    return (columns.double() + weight[:, gone].double() @ predicted).float()


def largest(scores: "torch.Tensor", count: int) -> np.ndarray:
    """Return the indices of the largest scores, ascending; of equal ones the first."""
    order = np.argsort(-scores.numpy(), kind="stable")
    return np.sort(order[:count])
