"""Losses over a vocabulary against PyTorch's own, in values and gradients."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from llmfast.tune import token_losses as module
from llmfast.tune.token_losses import token_losses


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    ours, theirs = (3 * torch.randn(4, 7, 33, generator=random) for _ in range(2))
    return ours.to(dtype), theirs.to(dtype), torch.randint(33, (4, 7), generator=random)


@pytest.mark.parametrize("rows", [1, 5, 28, 1000])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.0), (2.0, 0.0), (1.0, 0.3), (2.5, 0.3), (1.0, 1.0)])
def test_sum_and_gradient_are_those_of_pytorch(
    rows: int, temperature: float, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", 33 * rows)
    ours, theirs, targets = _inputs(torch.float32)
    wide = ours.double().requires_grad_()
    soft = [log_softmax(one / temperature, -1) for one in (wide, theirs.double())]
    losses = cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none")
    wanted = (1 - weight) * temperature**2 * kl_div(*soft, reduction="sum", log_target=True) + weight * losses.sum()
    (3 * wanted).backward()
    ours.requires_grad_()
    total, found = token_losses(ours, targets, None if weight == 1 else theirs, temperature, weight)
    (3 * total).backward()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(found.double(), losses.detach().view(4, 7), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_summed_in_float32_and_get_a_gradient_as_narrow(dtype: torch.dtype) -> None:
    ours, theirs, targets = _inputs(dtype)
    wide = ours.float().requires_grad_()
    wanted, _ = token_losses(wide, targets, theirs.float(), 1.0, 0.5)
    wanted.backward()
    ours.requires_grad_()
    total, found = token_losses(ours, targets, theirs, 1.0, 0.5)
    (total * 2.0**16).backward()
    assert total.dtype == found.dtype == torch.float32
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(
        ours.grad.float() / 2.0**16, wide.grad, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
    )


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    ours, theirs, targets = _inputs(torch.float32)
    with torch.no_grad():
        total, _ = token_losses(ours, targets, theirs, 1.0, 0.0)
    assert total.grad_fn is None
