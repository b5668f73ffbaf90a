"""Decoders: from the latent of a cell to the distribution of its expression.

Two families. The count decoders (``poisson``, ``nb``, ``zinb``) give the share of every gene in the cell's transcripts,
with the depth as a known offset; ``gaussian`` (the paper's vanilla decoder) gives log-normalised values directly.
Every decoder answers the same questions through the same methods; what differs is the likelihood.
A new decoder is a class here and one line in :data:`DECODERS`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gamma_poisson import posterior_share
from .likelihoods import expected_log1p, gaussian_log_prob, nb_log_prob, poisson_log_prob, zinb_log_prob

_TINY = 1e-12
_LOG_LIMIT = 12.0
_LEAST_LOG_DISPERSION = -9.0
"""The likelihoods are precise for dispersions down to 1e-4."""


@dataclass
class Decoded:
    """What a decoder says of a block of cells.

    Attributes
    ----------
    expression
        Count decoders: expected share of each gene in the cell's transcripts (cells, genes), rows sum to 1; for
        ``zinb`` the mean of the negative binomial part, so that rows sum to 1 after zero inflation. Gaussian: log1p of
        counts per ``target_sum`` (cells, genes).
    zero_logits
        Logit of the probability of an extra zero (cells, genes); ``zinb`` only.
    log_dispersion
        Logarithm of the inverse dispersion, (genes,) or (cells, genes); ``nb`` and ``zinb`` only.
    """

    expression: Tensor
    zero_logits: Tensor | None = None
    log_dispersion: Tensor | None = None


def at_least_float32(values: Tensor) -> Tensor:
    """Values in single precision where autocast has computed them in less; others as they are.

    Shares of genes are far smaller than 1, and what is summed over thousands of them needs more than three digits.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def full_depth(share: Tensor, counts: Tensor, measured: Tensor) -> Tensor:
    """Depth over all genes (cells,) of cells of which only ``measured`` entries (cells, genes) were counted.

    The counted total over the share of the cell's transcripts that the measured genes are predicted to hold.
    """
    return (counts * measured).sum(-1) / (share * measured).sum(-1).clamp(min=_TINY)


def _limited(log_dispersion: Tensor) -> Tensor:
    """Cut at the limits; hardly anything ever lies beyond them, and then no pass is spent on it."""
    least, most = log_dispersion.detach().aminmax()
    if least >= _LEAST_LOG_DISPERSION and most <= _LOG_LIMIT:
        return log_dispersion
    return log_dispersion.clamp(_LEAST_LOG_DISPERSION, _LOG_LIMIT)


def _hidden_layer(n_latent: int, dim: int, hidden: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(n_latent, dim), nn.GELU()) if hidden else nn.Identity()


def _shares_of(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True).clamp(min=_TINY)


class CountDecoder(nn.Module):
    """Latent to gene shares: a hidden layer, where asked for, a softmax over genes, and the library size as offset.

    Parameters
    ----------
    n_latent, dim, n_genes
        Sizes of the latent, of the hidden layer and of the output.
    gene_share
        Mean share of each gene (genes,); the start of the output bias.
    posterior
        Combine the network's share with the cell's own visible counts in a Gamma-Poisson posterior whose
        concentration is learned (see :meth:`forward`).
    target_sum
        Not used by count decoders; part of the common signature.
    hidden
        Whether there is a hidden layer; without it the genes are linear in what is decoded, and ``dim`` is its size.
    dispersion, n_fovs
        Used by decoders with a dispersion; see :class:`NegativeBinomialDecoder`.

    Attributes
    ----------
    gene_share
        As given.
    mixture
        Weights (3,) of the network's share, of the cell's own counts and of the gene means in what is predicted:
        (1, 0, 0) until they are fitted to held-out counts, and never read in training.
    """

    gene_share: Tensor
    mixture: Tensor

    def __init__(
        self,
        n_latent: int,
        dim: int,
        n_genes: int,
        *,
        gene_share: Tensor,
        posterior: bool,
        target_sum: float,
        dispersion: str = "gene",
        n_fovs: int = 0,
        hidden: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("gene_share", gene_share.clone())
        self.register_buffer("mixture", torch.tensor([1.0, 0.0, 0.0]))
        self.hidden = _hidden_layer(n_latent, dim, hidden)
        self.logits = nn.Linear(dim, n_genes)
        with torch.no_grad():
            self.logits.weight.mul_(0.3)
            self.logits.bias.copy_(gene_share.clamp(min=_TINY).log())
        # From a small start a gene cannot switch the posterior off again.
        self.log_concentration = nn.Parameter(torch.full((n_genes,), 10.0).log()) if posterior else None
        self.concentration = nn.Linear(dim, n_genes) if posterior else None
        if self.concentration is not None:
            nn.init.zeros_(self.concentration.weight)
            nn.init.zeros_(self.concentration.bias)

    def forward(
        self,
        latent: Tensor,
        counts: Tensor,
        depth: Tensor,
        visible: Tensor | None,
        fov: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Decoded:
        """Decode, and update with the cell's own counts.

        With prior rate ``r`` (the network's share), concentration ``k`` and ``x`` transcripts of the gene seen at depth
        ``D``, the posterior mean of the rate under ``rate ~ Gamma(k, k / r)``, ``x ~ Poisson(D * rate)`` is
        ``(k + x) / (k / r + D)`` (SAVER: Huang et al. 2018, eq. 2). The concentration is the gene's own times a factor
        decoded for each entry: it says how sure the network is. Hidden entries keep the prior, under which their counts
        are negative binomial with the concentration as dispersion. Rows are normalised.

        Parameters
        ----------
        latent
            Latent (cells, n_latent).
        counts
            Visible counts (cells, genes), 0 where hidden.
        depth
            Depth estimated from the visible counts (cells,).
        visible
            Which entries are shown (cells, genes), or None when all are.
        fov
            Number of the FOV of each cell (cells,) int64, -1 for one that the fit did not know; needed by a dispersion
            per gene and FOV.
        offset
            Added to the logarithm of the shares (cells, genes), or None.
        """
        hidden = self.hidden(latent)
        logits = at_least_float32(self.logits(hidden))
        logits = logits if offset is None else logits + offset
        log_dispersion = self._log_dispersion(hidden, fov)
        if self.log_concentration is None or self.concentration is None:
            share = torch.softmax(logits, dim=-1)
        else:
            bias = self.concentration.bias + self.log_concentration
            log_concentration = _limited(at_least_float32(F.linear(hidden, self.concentration.weight, bias)))
            if visible is not None and log_dispersion is not None:
                log_dispersion = torch.where(visible, log_dispersion, log_concentration)
            share = posterior_share(logits, log_concentration, counts, depth, visible)
        zero_logits = self._zero_logits(hidden)
        keep = None if zero_logits is None else torch.sigmoid(-zero_logits)
        if keep is not None:
            # Extra zeros take transcripts away; the others make up for them, so that the cell keeps its depth.
            share = share / (share * keep).sum(-1, keepdim=True).clamp(min=_TINY)
        if not self.training and self.mixture[0] < 1:
            mixed = self._mixed(share if keep is None else share * keep, counts, visible)
            share = mixed if keep is None else mixed / keep.clamp(min=_TINY)
        return Decoded(share, zero_logits, log_dispersion)

    def mixture_parts(self, share: Tensor, counts: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What is mixed (cells, genes each): the network's shares, the cell's own counts, and the gene means.

        All three are shares within the visible genes of the cell, 0 elsewhere; in a cell without counts the network's
        shares stand for these.
        """
        mean = self.gene_share.expand_as(share)
        if visible is not None:
            share, mean = _shares_of(share * visible), _shares_of(mean * visible)
        total = counts.sum(-1, keepdim=True)
        return share, torch.where(total > 0, counts / total.clamp(min=_TINY), share), mean

    def _mixed(self, share: Tensor, counts: Tensor, visible: Tensor | None) -> Tensor:
        """Mix shares (cells, genes) with the cell's own counts and the gene means; hidden entries stay as they are."""
        mixed = sum(weight * part for weight, part in zip(self.mixture, self.mixture_parts(share, counts, visible)))
        if visible is None:
            return _shares_of(mixed)
        return torch.where(visible, mixed * (share * visible).sum(-1, keepdim=True), share)

    def _zero_logits(self, hidden: Tensor) -> Tensor | None:
        return None

    def _log_dispersion(self, hidden: Tensor, fov: Tensor | None) -> Tensor | None:
        return None

    def log_prob(self, target: Tensor, mean: Tensor, decoded: Decoded) -> Tensor:
        """Log-probability of every target count (cells, genes) under its mean and what else was decoded."""
        raise NotImplementedError

    def log_likelihood(
        self, decoded: Decoded, target: Tensor, target_depth: Tensor, measured: Tensor | None = None
    ) -> Tensor:
        """Log-likelihood (cells, genes) of ``target`` counts drawn at ``target_depth`` (cells,).

        Where entries are not measured, the depth is what makes the expected total over a cell's measured genes equal to
        the observed one, so that the likelihood tells about shares within these genes and about nothing else.
        """
        depth = target_depth if measured is None else full_depth(self.share(decoded), target, measured)
        return self.log_prob(target, decoded.expression * depth[:, None], decoded)

    def share(self, decoded: Decoded) -> Tensor:
        """Expected share of each gene in the cell's transcripts (cells, genes), rows sum to 1."""
        if decoded.zero_logits is None:
            return decoded.expression
        return decoded.expression * torch.sigmoid(-decoded.zero_logits)

    def multiplied(self, decoded: Decoded, ratio: Tensor) -> Decoded:
        """What was decoded, with its shares multiplied by a ratio (cells, genes) and rows normalised."""
        changed = replace(decoded, expression=decoded.expression * ratio)
        total = self.share(changed).sum(-1, keepdim=True).clamp(min=_TINY)
        return replace(changed, expression=changed.expression / total)

    def counts(self, decoded: Decoded, depth: Tensor) -> Tensor:
        """Expected counts (cells, genes) at the given depth (cells,)."""
        return self.share(decoded) * depth[:, None]

    def lognorm(self, decoded: Decoded, depth: Tensor, target_sum: float) -> Tensor:
        """Return E[log1p(count * target_sum / depth)] (cells, genes); 0 for a cell of depth 0, which is the limit."""
        scale = target_sum / depth.clamp(min=_TINY)[:, None]
        zero = None if decoded.zero_logits is None else torch.sigmoid(decoded.zero_logits)
        dispersion = None if decoded.log_dispersion is None else decoded.log_dispersion.exp()
        value = expected_log1p(decoded.expression * depth[:, None], scale, dispersion=dispersion, zero_probability=zero)
        return value.masked_fill((depth <= 0)[:, None], 0.0)


class PoissonDecoder(CountDecoder):
    """Poisson counts. With shares that sum to 1 this is the multinomial likelihood of the cell's transcripts."""

    def log_prob(self, target: Tensor, mean: Tensor, decoded: Decoded) -> Tensor:
        return poisson_log_prob(target, mean)


class NegativeBinomialDecoder(CountDecoder):
    r"""Negative binomial counts with an inverse dispersion θ: variance ``mean + mean² / θ``.

    ``dispersion="gene"`` learns one θ per gene. ``"gene_fov"`` adds to the gene's own log θ an offset for each FOV of
    the fit, which starts at 0 and is 0 for any other FOV. ``"entry"`` adds a linear map of the decoder's hidden layer,
    which starts at 0 (scvi-tools' ``"gene"``, ``"gene-batch"`` and ``"gene-cell"``: Lopez et al. 2018).

    Parameters
    ----------
    n_latent, dim, n_genes, gene_share, posterior, target_sum, hidden
        As in :class:`CountDecoder`.
    dispersion
        ``"gene"``, ``"gene_fov"`` or ``"entry"``.
    n_fovs
        Number of FOVs of the fit; read with ``"gene_fov"``.
    """

    def __init__(
        self, n_latent: int, dim: int, n_genes: int, *, dispersion: str = "gene", n_fovs: int = 0, **choices: Any
    ) -> None:
        super().__init__(n_latent, dim, n_genes, **choices)
        self.log_dispersion = nn.Parameter(torch.full((n_genes,), 10.0).log())
        by_fov, by_entry = dispersion == "gene_fov", dispersion == "entry"
        self.fov_log_dispersion = nn.Parameter(torch.zeros(n_fovs, n_genes)) if by_fov else None
        self.entry_dispersion = nn.Parameter(torch.zeros(n_genes, dim)) if by_entry else None

    def _log_dispersion(self, hidden: Tensor, fov: Tensor | None) -> Tensor:
        if self.fov_log_dispersion is not None:
            if fov is None:
                raise ValueError("a dispersion per gene and FOV needs `fov`, the number of the FOV of each cell")
            # The last row, which -1 takes, is the offset of unknown FOVs.
            return self.log_dispersion + F.pad(self.fov_log_dispersion, (0, 0, 0, 1))[fov]
        if self.entry_dispersion is not None:
            decoded = self.log_dispersion + F.linear(hidden, self.entry_dispersion)
            return _limited(decoded)
        return self.log_dispersion

    def log_prob(self, target: Tensor, mean: Tensor, decoded: Decoded) -> Tensor:
        if decoded.log_dispersion is None:
            raise ValueError("the negative binomial likelihood needs `decoded.log_dispersion`")
        return nb_log_prob(target, mean, decoded.log_dispersion.exp())


class ZeroInflatedDecoder(NegativeBinomialDecoder):
    """Zero-inflated negative binomial counts: an extra zero with a probability decoded per entry.

    Parameters as in :class:`NegativeBinomialDecoder`.
    """

    def __init__(self, n_latent: int, dim: int, n_genes: int, **choices: Any) -> None:
        super().__init__(n_latent, dim, n_genes, **choices)
        self.zeros = nn.Linear(dim, n_genes)
        nn.init.constant_(self.zeros.bias, -3.0)

    def _zero_logits(self, hidden: Tensor) -> Tensor:
        return at_least_float32(self.zeros(hidden))

    def log_prob(self, target: Tensor, mean: Tensor, decoded: Decoded) -> Tensor:
        if decoded.zero_logits is None or decoded.log_dispersion is None:
            raise ValueError("the zero-inflated likelihood needs `decoded.zero_logits` and `decoded.log_dispersion`")
        return zinb_log_prob(target, mean, decoded.log_dispersion.exp(), decoded.zero_logits)


class GaussianDecoder(nn.Module):
    """Latent to log-normalised values under a Gaussian of unit variance: the paper's vanilla decoder.

    Predicts ``log1p(count / depth * target_sum)``; means below 0 are cut at 0 when read out, not in the loss.
    """

    def __init__(
        self,
        n_latent: int,
        dim: int,
        n_genes: int,
        *,
        gene_share: Tensor,
        posterior: bool,
        target_sum: float,
        dispersion: str = "gene",
        n_fovs: int = 0,
        hidden: bool = True,
    ) -> None:
        super().__init__()
        self.hidden = _hidden_layer(n_latent, dim, hidden)
        self.output = nn.Linear(dim, n_genes)
        self.target_sum = target_sum

    def forward(
        self,
        latent: Tensor,
        counts: Tensor,
        depth: Tensor,
        visible: Tensor | None,
        fov: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Decoded:
        """Decode log-normalised values (cells, genes), plus ``offset``; the cell's counts are not used again."""
        output = at_least_float32(self.output(self.hidden(latent)))
        return Decoded(output if offset is None else output + offset)

    def log_likelihood(
        self, decoded: Decoded, target: Tensor, target_depth: Tensor, measured: Tensor | None = None
    ) -> Tensor:
        """Gaussian log-likelihood (cells, genes) of ``log1p(target / target_depth * target_sum)``."""
        value = torch.log1p(target / target_depth.clamp(min=1e-6)[:, None] * self.target_sum)
        return gaussian_log_prob(value, decoded.expression)

    def share(self, decoded: Decoded) -> Tensor:
        """Share of each gene (cells, genes): expm1 of the values, rows normalised to 1.

        The mean of a logarithm taken back, not the expectation of a share; use a count decoder for that.
        """
        linear = torch.expm1(decoded.expression.clamp(min=0.0))
        return linear / linear.sum(-1, keepdim=True).clamp(min=_TINY)

    def counts(self, decoded: Decoded, depth: Tensor) -> Tensor:
        """Counts (cells, genes) at the given depth, through :meth:`share`."""
        return self.share(decoded) * depth[:, None]

    def lognorm(self, decoded: Decoded, depth: Tensor, target_sum: float) -> Tensor:
        """Log-normalised values (cells, genes), moved to another ``target_sum`` through expm1 when it differs."""
        value = decoded.expression.clamp(min=0.0)
        if target_sum != self.target_sum:
            value = torch.log1p(torch.expm1(value) * (target_sum / self.target_sum))
        return value.masked_fill((depth <= 0)[:, None], 0.0)


Decoder = CountDecoder | GaussianDecoder

DECODERS: dict[str, type[CountDecoder] | type[GaussianDecoder]] = {
    "gaussian": GaussianDecoder,
    "poisson": PoissonDecoder,
    "nb": NegativeBinomialDecoder,
    "zinb": ZeroInflatedDecoder,
}
