"""The cell's own counts as evidence: a Gamma-Poisson posterior of gene shares, with its gradient in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["posterior_share"]


def posterior_share(
    logits: Tensor, log_concentration: Tensor, counts: Tensor, depth: Tensor, visible: Tensor | None
) -> Tensor:
    r"""Shares of genes, given a prior of shares and some of the cell's transcripts.

    With prior share :math:`p = \mathrm{softmax}(\text{logits})`, concentration k and x transcripts of the gene seen at
    depth D, the posterior mean under :math:`\text{rate} \sim \Gamma(k, k/p)`, :math:`x \sim \mathrm{Poisson}(D \cdot
    \text{rate})` is

    .. math:: u = \frac{k + x}{k/p + D} = p\,\frac{k + x}{k + Dp}

    (SAVER: Huang et al. 2018, eq. 2). Hidden entries keep the prior, :math:`u = p`. Rows are normalised.

    Parameters
    ----------
    logits
        Logarithm of the prior shares, up to a constant in each row (cells, genes).
    log_concentration
        Logarithm of k (cells, genes).
    counts
        Visible counts x (cells, genes).
    depth
        Depth D of the visible counts (cells,).
    visible
        Which entries are shown (cells, genes), or None when all are.

    Returns
    -------
    Posterior shares (cells, genes); rows sum to 1. First derivatives flow to all arguments but ``visible``.
    """
    share: Tensor = _PosteriorShare.apply(logits, log_concentration, counts, depth[:, None], visible)  # type: ignore[no-untyped-call]
    return share


class _PosteriorShare(torch.autograd.Function):
    """`posterior_share`, in as few passes over the entries as it takes; recording the operations takes three times."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, log_concentration: Tensor, counts: Tensor, depth: Tensor, visible: Tensor | None
    ) -> Tensor:
        prior = torch.softmax(logits, dim=-1)
        concentration = log_concentration.exp()
        evidence = concentration + counts
        scale = (prior * depth).add_(concentration)
        share = (evidence * prior).div_(scale)
        if visible is not None:
            share = torch.where(visible, share, prior)
        total = share.sum(-1, keepdim=True)
        share /= total
        ctx.save_for_backward(prior, concentration, evidence, scale, share, total, visible)
        return share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        r"""Chain rule through

        .. math::
            \partial_p u = \frac{(k+x)\,k}{(k+Dp)^2}, \quad \partial_k u = \frac{p\,(Dp-x)}{(k+Dp)^2}, \quad
            \partial_x u = \frac{p}{k+Dp}, \quad \partial_D u = -\frac{(k+x)\,p^2}{(k+Dp)^2}.
        """
        prior, concentration, evidence, scale, share, total, visible = ctx.saved_tensors
        of_share = grad - (grad * share).sum(-1, keepdim=True)
        of_share /= total
        kept = None
        if visible is not None:
            kept = of_share.masked_fill(visible, 0.0)
            of_share = of_share.masked_fill(~visible, 0.0)
        of_share /= scale
        of_counts = of_share * prior if ctx.needs_input_grad[2] else None
        of_share /= scale
        of_depth = None
        if ctx.needs_input_grad[3]:
            of_depth = (of_share * evidence).mul_(prior).mul_(prior).sum(-1, keepdim=True).neg_()
        of_share *= concentration
        # k ∂u/∂k: in Dp − x = (k + Dp) − (k + x) both sums are at hand.
        of_log = (scale - evidence).mul_(prior).mul_(of_share)
        of_prior = of_share.mul_(evidence)
        if kept is not None:
            of_prior += kept
        of_prior *= prior
        of_logits = of_prior.addcmul_(prior, of_prior.sum(-1, keepdim=True), value=-1)
        return of_logits, of_log, of_counts, of_depth, None
