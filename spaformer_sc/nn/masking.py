"""Corruptions: what the network is shown of a field of view, and what it is asked for.

A corruption takes the counts of a whole FOV and returns a :class:`Corrupted` view of it. It acts on the FOV, not on
single cells, because a cell's expression also reaches other tokens through neighbours and attention: what is hidden
has to be hidden everywhere. Nothing is rescaled; depth is always estimated from what is visible.

A new corruption is a function with the signature of :func:`thinning` and one line in :data:`CORRUPTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseCounts:
    """Counts of a ``shape`` (cells, genes): ``values[i]`` of gene ``cols[i]`` in cell ``rows[i]``, 0 elsewhere.

    Places are in the order of cells, each there once; those of a FOV stay the same when some of its counts are hidden.
    """

    rows: Tensor
    cols: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, counts: sp.csr_matrix) -> SparseCounts:
        """Take the counts of a matrix (cells, genes)."""
        coo = counts.tocoo()
        rows, cols = (torch.from_numpy(index.astype(np.int64)) for index in (coo.row, coo.col))
        return cls(rows, cols, torch.from_numpy(coo.data.astype(np.float32)), counts.shape)

    def csr(self) -> sp.csr_matrix:
        """Return them as a matrix (cells, genes), float32."""
        starts = np.searchsorted(self.rows.numpy(), np.arange(self.shape[0] + 1))
        return sp.csr_matrix((self.values.numpy(), self.cols.numpy(), starts), shape=self.shape)

    def total(self) -> Tensor:
        """Total of each cell (cells,)."""
        return torch.zeros(self.shape[0]).index_add_(0, self.rows, self.values)

    def where(self, entries: Tensor) -> SparseCounts:
        """Keep the counts of some ``entries`` (cells, genes), 0 in place of the others."""
        return replace(self, values=self.values * entries[self.rows, self.cols])


@dataclass(frozen=True)
class Corrupted:
    """One corrupted view of a FOV.

    Attributes
    ----------
    counts
        Visible counts (cells, genes); 0 where hidden.
    visible
        Which entries are shown (cells, genes), or None when all are. An entry that was never measured is not visible.
    target
        Counts asked for (cells, genes).
    asked
        Which entries enter the loss (cells, genes), or None when all do.
    target_depth
        Depth at which ``target`` was drawn (cells,): the expected total of a cell over all genes.
    measured
        Which entries were measured (cells, genes), or None when all were.
    """

    counts: SparseCounts
    visible: Tensor | None
    target: SparseCounts
    asked: Tensor | None
    target_depth: Tensor
    measured: Tensor | None


def depth(total: Tensor, visible: Tensor | None, gene_share: Tensor) -> Tensor:
    """Estimate every cell's depth over all genes from the visible ones.

    The visible total divided by the share of all transcripts that the visible genes hold on average.

    Parameters
    ----------
    total
        Total of the visible counts of each cell (cells,).
    visible
        Boolean (cells, genes) or None when everything is visible.
    gene_share
        Mean share of each gene (genes,), sums to 1.

    Returns
    -------
    Depth (cells,), 0 for a cell of which nothing is visible.
    """
    if visible is None:
        return total
    return total / (visible.to(gene_share.dtype) @ gene_share).clamp(min=1e-6)


def thin(values: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Draw ``Binomial(values, probability)`` elementwise for integer-valued float counts."""
    kept = torch.rand(values.shape, generator=generator).lt_(probability).to(values.dtype)
    many = values > 1
    kept[many] = torch.binomial(values[many], torch.full_like(values[many], probability), generator=generator)
    return kept


@dataclass(frozen=True)
class MaskingRates:
    """Rates of the corruptions.

    Attributes
    ----------
    tokens
        Share of the cells that are touched by ``bilevel`` and ``tokens``.
    features
        Share of the genes hidden, on the touched cells (``bilevel``) or on all (``features``, ``genes``).
    thinning
        Range of the probability that a transcript stays visible; drawn uniformly for each FOV and epoch.
    """

    tokens: float = 0.5
    features: float = 0.5
    thinning: tuple[float, float] = (0.3, 0.7)


@dataclass(frozen=True)
class MaskingSchedule:
    """Rates over the course of training.

    Attributes
    ----------
    tokens, features
        As in :class:`MaskingRates`; a pair is the rate at the start and at the end of training, linear in between.
    thinning
        As in :class:`MaskingRates`.
    """

    tokens: float | tuple[float, float] = 0.5
    features: float | tuple[float, float] = 0.5
    thinning: tuple[float, float] = (0.3, 0.7)

    def at(self, progress: float) -> MaskingRates:
        """Rates when a share ``progress``, from 0 to 1, of the training is done."""

        def rate(value: float | tuple[float, float]) -> float:
            start, end = value if isinstance(value, tuple) else (value, value)
            return start + (end - start) * progress

        return MaskingRates(rate(self.tokens), rate(self.features), self.thinning)


Corruption = Callable[[SparseCounts, "Tensor | None", Tensor, MaskingRates, torch.Generator], Corrupted]


def thinning(
    counts: SparseCounts, measured: Tensor | None, gene_share: Tensor, rates: MaskingRates, generator: torch.Generator
) -> Corrupted:
    """Binomial thinning: show a random part of every cell's transcripts and ask for the others.

    The two parts are independent given the true rate when counts are Poisson (Neufeld et al. 2023, eq. 2), so the
    target tells about the rate and nothing about the noise of the input; Batson et al. 2019 (molecular
    cross-validation).
    """
    low, high = rates.thinning
    probability = low + (high - low) * float(torch.rand((), generator=generator))
    kept = thin(counts.values, probability, generator)
    shown, target = replace(counts, values=kept), replace(counts, values=counts.values - kept)
    return Corrupted(shown, measured, target, measured, depth(target.total(), measured, gene_share), measured)


def _hide(counts: SparseCounts, measured: Tensor | None, gene_share: Tensor, hidden: Tensor) -> Corrupted:
    """Hide the entries (cells, genes) of ``hidden`` and ask for them."""
    asked = hidden if measured is None else hidden & measured
    visible = ~hidden if measured is None else measured & ~hidden
    at_depth = depth(counts.total(), measured, gene_share)
    return Corrupted(counts.where(visible), visible, counts, asked, at_depth, measured)


def bilevel(
    counts: SparseCounts, measured: Tensor | None, gene_share: Tensor, rates: MaskingRates, generator: torch.Generator
) -> Corrupted:
    """Bi-level masking: choose a share of the cells, hide a share of the genes on each (Wen et al. 2023, sec. 3.3)."""
    touched = torch.rand((counts.shape[0], 1), generator=generator) < rates.tokens
    return _hide(
        counts, measured, gene_share, touched & (torch.rand(counts.shape, generator=generator) < rates.features)
    )


def tokens(
    counts: SparseCounts, measured: Tensor | None, gene_share: Tensor, rates: MaskingRates, generator: torch.Generator
) -> Corrupted:
    """Hide a share of the cells whole; what is left of them is where they lie."""
    touched = torch.rand((counts.shape[0], 1), generator=generator) < rates.tokens
    return _hide(counts, measured, gene_share, touched.expand(counts.shape).contiguous())


def features(
    counts: SparseCounts, measured: Tensor | None, gene_share: Tensor, rates: MaskingRates, generator: torch.Generator
) -> Corrupted:
    """Hide a share of the genes, drawn anew for every cell."""
    return _hide(counts, measured, gene_share, torch.rand(counts.shape, generator=generator) < rates.features)


def genes(
    counts: SparseCounts, measured: Tensor | None, gene_share: Tensor, rates: MaskingRates, generator: torch.Generator
) -> Corrupted:
    """Hide a share of the genes in all cells of the FOV: neighbours do not tell of them either."""
    hidden = torch.rand((1, counts.shape[1]), generator=generator) < rates.features
    return _hide(counts, measured, gene_share, hidden.expand(counts.shape))


def nothing(
    counts: SparseCounts, measured: Tensor | None, gene_share: Tensor, rates: MaskingRates, generator: torch.Generator
) -> Corrupted:
    """Hide nothing and ask for everything: a plain autoencoder."""
    return Corrupted(counts, measured, counts, measured, depth(counts.total(), measured, gene_share), measured)


CORRUPTIONS: dict[str, Corruption] = {
    "bilevel": bilevel,
    "tokens": tokens,
    "features": features,
    "genes": genes,
    "thinning": thinning,
    "none": nothing,
}

WHOLE_FIELD = ("genes",)
"""Corruptions that act on a FOV as a whole: a gene that some of its cells show is not hidden in the others."""


def corrupt(
    names: Sequence[str],
    counts: SparseCounts,
    measured: Tensor | None,
    gene_share: Tensor,
    rates: MaskingRates,
    generator: torch.Generator,
) -> Corrupted:
    """Corrupt a FOV in one of several ways: each cell draws its own, or the whole FOV one of :data:`WHOLE_FIELD`.

    Parameters
    ----------
    names
        Names in :data:`CORRUPTIONS`, drawn with the same probability.
    counts, measured, gene_share, rates, generator
        As in a corruption.
    """
    drawn = names[int(torch.randint(len(names), (), generator=generator))]
    single = [name for name in names if name not in WHOLE_FIELD]
    if drawn in WHOLE_FIELD or len(single) == 1:
        return CORRUPTIONS[drawn](counts, measured, gene_share, rates, generator)
    result = CORRUPTIONS[single[0]](counts, measured, gene_share, rates, generator)
    choice = torch.randint(len(single), (counts.shape[0],), generator=generator)
    for number, name in enumerate(single[1:], start=1):
        other = CORRUPTIONS[name](counts, measured, gene_share, rates, generator)
        result = _either(choice == number, other, result)
    return result


def _either(first: Tensor, one: Corrupted, other: Corrupted) -> Corrupted:
    """Join the rows of ``one`` that are ``first`` (cells,) with those of the ``other`` that are not."""

    def joined(a: SparseCounts, b: SparseCounts) -> SparseCounts:
        return replace(a, values=torch.where(first[a.rows], a.values, b.values))

    def joined_masks(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None and b is None:
            return None
        every = torch.ones(one.counts.shape, dtype=torch.bool)
        return torch.where(first[:, None], every if a is None else a, every if b is None else b)

    return Corrupted(
        counts=joined(one.counts, other.counts),
        visible=joined_masks(one.visible, other.visible),
        target=joined(one.target, other.target),
        asked=joined_masks(one.asked, other.asked),
        target_depth=torch.where(first, one.target_depth, other.target_depth),
        measured=one.measured,
    )
