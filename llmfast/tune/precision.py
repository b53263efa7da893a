"""Mixed precision: the forward pass in 16 bits, weights and gradients in float32.

Matrix products run in the narrow format, sums and norms in float32, as PyTorch's autocast decides. float16 gradients
underflow, so the loss is multiplied by a scale that grows while all gradients are finite and is halved when one is not;
such a step is left out. bfloat16 has float32's range and needs no scale.
Source: Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740
"""

from typing import TYPE_CHECKING, Any

from llmfast.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

_SMALLEST_SCALE = 2.0**-14


def choose_precision(asked: str | None, device: "torch.device") -> str:
    """Return the precision to compute in.

    Args:
        asked: fp32, bf16 or fp16; None takes bf16 where the device multiplies it, fp32 elsewhere.
        device: where.

    Raises:
        UnsupportedError: the device can't multiply the format.
    """
    import torch

    if device.type == "cuda":
        multiplies_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        multiplies_fp16 = True
    else:
        multiplies_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        multiplies_fp16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    best = "bf16" if multiplies_bf16 else "fp32"
    if asked == "fp16" and not multiplies_fp16:
        raise UnsupportedError(
            "--precision fp16: this CPU does not multiply float16", f"use --precision {best}, or a GPU"
        )
    if asked == "bf16" and device.type == "cuda" and not multiplies_bf16:
        raise UnsupportedError("--precision bf16: this GPU does not multiply bfloat16", "use --precision fp16")
    return asked or best


class Precision:
    """What the forward pass computes in, and how gradients get back from it.

    Args:
        name: fp32, bf16 or fp16.
        device: where.
    """

    def __init__(self, name: str, device: "torch.device") -> None:
        import torch

        self.name = name
        self._device = device
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self.skipped = 0
        """Steps left out because a float16 gradient was not finite."""

    @property
    def scale(self) -> float:
        """What the loss is multiplied by."""
        return float(self._scaler.get_scale())

    def autocast(self) -> Any:
        """Return the context in which the forward pass runs."""
        import torch

        return torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None)

    def backward(self, loss: "torch.Tensor") -> None:
        """Add to the gradients."""
        self._scaler.scale(loss).backward()

    def unscale(self, optimizer: Any) -> None:
        """Bring the gradients back to their own size."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: Any) -> bool:
        """Take a step of the optimizer, and return whether it was taken: all gradients were finite."""
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        taken = bool(self._scaler.get_scale() >= before)
        self.skipped += not taken
        return taken

    @property
    def is_exhausted(self) -> bool:
        """Whether the scale has fallen so far that the loss itself, not its scale, must be at fault."""
        return self._scaler.is_enabled() and self.scale < _SMALLEST_SCALE

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"scaler": self._scaler.state_dict(), "skipped": self.skipped}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self._scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]
