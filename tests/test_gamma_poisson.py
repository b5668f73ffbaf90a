"""Posterior of gene shares: the formula, its derivatives, hidden entries, and extreme values."""

from __future__ import annotations

import pytest
import torch

from spaformer_sc.nn.gamma_poisson import posterior_share


@pytest.fixture
def arguments() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    logits, log_concentration = (torch.randn(4, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    counts = torch.poisson(torch.full((4, 5), 1.5, dtype=torch.float64), generator=generator)
    counts[3] = 0.0
    return logits, log_concentration, counts, counts.sum(1) + 0.5


def plain(logits, log_concentration, counts, depth, visible):
    prior, concentration = torch.softmax(logits, -1), log_concentration.exp()
    share = (concentration + counts) / (concentration / prior + depth[:, None])
    share = share if visible is None else torch.where(visible, share, prior)
    return share / share.sum(-1, keepdim=True)


@pytest.mark.parametrize("masked", [False, True])
def test_is_the_posterior_mean_of_the_paper(arguments, masked) -> None:
    visible = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    torch.testing.assert_close(posterior_share(*arguments, visible), plain(*arguments, visible))


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_in_every_argument(arguments, masked) -> None:
    visible = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    leaves = [tensor.clone().requires_grad_() for tensor in arguments]
    assert torch.autograd.gradcheck(lambda *a: posterior_share(*a, visible), leaves)


def test_derivatives_are_those_of_the_plain_formula_in_single_precision(arguments) -> None:
    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    found = []
    for function in (posterior_share, plain):
        leaves = [tensor.float().requires_grad_() for tensor in arguments]
        (function(*leaves, None) * weights).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("number", range(4))
def test_a_derivative_does_not_depend_on_which_others_are_wanted(arguments, number) -> None:
    visible = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    weights = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [tensor.clone().requires_grad_() for tensor in arguments]
    (posterior_share(*leaves, visible) * weights).sum().backward()
    alone = [tensor.clone().requires_grad_(at == number) for at, tensor in enumerate(arguments)]
    (posterior_share(*alone, visible) * weights).sum().backward()
    torch.testing.assert_close(alone[number].grad, leaves[number].grad)
    assert leaves[number].grad.abs().max() > 0


def test_shares_and_derivatives_stay_finite_at_extremes() -> None:
    logits = torch.tensor([[0.0, -200.0, 50.0], [0.0, 0.0, 0.0]], requires_grad=True)
    log_concentration = torch.tensor([[-9.0, 12.0, -9.0], [12.0, -9.0, 0.0]], requires_grad=True)
    counts = torch.tensor([[0.0, 100_000.0, 0.0], [0.0, 0.0, 0.0]])
    share = posterior_share(logits, log_concentration, counts, counts.sum(1), None)
    (share * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(share.sum(1), torch.ones(2))
    assert logits.grad.isfinite().all()
    assert log_concentration.grad.isfinite().all()
