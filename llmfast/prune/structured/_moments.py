"""Second moments between what a layer read before its input lost channels, and what it reads after."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmfast.prune.checkpoint.compensate import damp
from llmfast.prune.checkpoint.workpiece import Workpiece

if TYPE_CHECKING:
    import torch


@dataclass
class Moments:
    """Sums over tokens.

    Attributes:
        cross: sum of n m^T, float32 [d, k]; n is the input before, m the one after.
        after: sum of m m^T, float32 [k, k].
        tokens: how many.
    """

    cross: "torch.Tensor"
    after: "torch.Tensor"
    tokens: int = 0

    def refit(self, weight: "torch.Tensor", basis: "torch.Tensor") -> "torch.Tensor":
        """Return the weight [N, k] whose outputs on m are nearest to those of `weight`, float32 [N, d], on n.

        Where the text says little it stays at `weight` in the directions that are left, float32 [d, k].
        """
        import torch

        cross, after = self.cross.double() / self.tokens, self.after.double() / self.tokens
        # A norm over fewer channels gives larger ones.
        start = weight.double() @ basis.double() * ((basis * cross).sum() / after.trace())
        missed = weight.double() @ cross - start @ after
        return (start + torch.linalg.solve(damp(after), missed.T).T).float()

    def rescale(self, scale: "torch.Tensor", kept: "torch.Tensor") -> "torch.Tensor":
        """Return the scale [k] of m's channels, which are `kept` of n's, that is nearest to `scale` [d] of n's."""
        powers = self.after.diagonal().clamp(min=1e-30)
        alike = self.cross[kept].diagonal()
        result: torch.Tensor = scale[kept] * alike / powers
        return result


def rms_normalized(rows: "torch.Tensor", epsilon: float) -> "torch.Tensor":
    """Return rows [tokens, d] divided by their root mean square."""
    import torch

    result: torch.Tensor = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + epsilon)
    return result


def collect(workpiece: Workpiece, norms: Sequence[str], basis: "torch.Tensor", epsilon: float) -> "dict[str, Moments]":
    """Return the moments of RMS norms between their outputs n without a scale, and those m of x basis.

    Args:
        workpiece: the model and its samples.
        norms: names of the norms.
        basis: float32 [d, k], what becomes of the residual stream x.
        epsilon: of the norms.
    """
    import torch

    width, kept = basis.shape
    found = {name: Moments(torch.zeros(width, kept), torch.zeros(kept, kept)) for name in norms}

    def see(moments: Moments) -> "Callable[[torch.Tensor], None]":
        def add(rows: torch.Tensor) -> None:
            before, after = rms_normalized(rows, epsilon), rms_normalized(rows @ basis, epsilon)
            moments.cross.addmm_(before.T, after)
            moments.after.addmm_(after.T, after)
            moments.tokens += len(rows)

        return add

    workpiece.observe({name: see(moments) for name, moments in found.items()}, "calibrating")
    return found
