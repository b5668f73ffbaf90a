"""What was counted in cells alike, as evidence on what networks say of a cell.

Networks that are stopped before they overfit leave structure behind that similar cells share. A Gamma-Poisson update
(SAVER: Huang et al. 2018, Nature Methods 15:539-542, eq. 2), as with the cell's own counts, but with those of other
cells: where they hold more transcripts of a gene than was expected of them, so will this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from spaformer_sc._memory import BLOCK
from spaformer_sc.nn.network import Network, Output, Tokens

from .mixing import Correction, HeldCounts, OfField, count_decoder, uncorrected
from .prediction import Said
from .scoring import log_ratios
from .sparse import dense_product

CONCENTRATIONS = (5.0, 10.0, 20.0, 50.0, 100.0)
"""Transcripts expected of a gene at which what was counted weighs as much as what was expected; to choose from."""

_TINY = 1e-12


def cells_alike(points: NDArray[np.floating], n: int, cells: NDArray[np.int64] | None = None) -> sp.csr_matrix:
    """Return which ``n`` cells (all others, where there are fewer) are nearest to some: CSR (some, cells), 1 or 0.

    Parameters
    ----------
    points
        Places of the cells, in the tissue or in the latent space (cells, dimensions).
    n
        How many; a cell is not among its own.
    cells
        Rows of the cells whose nearest ones are asked for; None for all.
    """
    from sklearn.neighbors import NearestNeighbors

    n_cells = len(points)
    cells = np.arange(n_cells) if cells is None else cells
    n, shape = min(n, n_cells - 1), (len(cells), n_cells)
    if n < 1 or not len(cells):
        return sp.csr_matrix(shape, dtype=np.float32)
    # One thread: with several, which of equally near cells are taken would depend on their number.
    with threadpool_limits(1):
        found = NearestNeighbors(n_neighbors=n + 1).fit(points).kneighbors(points[cells], return_distance=False)
    # Where cells lie on each other, a cell need not be the first of its own neighbours, or among them at all.
    itself = found == cells[:, None]
    itself[~itself.any(axis=1), -1] = True
    cols = found[~itself]
    rows = np.arange(0, len(cols) + 1, n)
    return sp.csr_matrix((np.ones(len(cols), dtype=np.float32), cols, rows), shape=shape)


@dataclass(frozen=True)
class Evidence:
    """What networks say of the cells of a FOV, and what was counted in cells alike.

    Attributes
    ----------
    share
        Mean share of the networks (cells, genes), rows sum to 1.
    shown
        The same, 0 where entries are hidden.
    counts
        Visible counts (cells, genes).
    near
        How often a cell is among those that count for another, 0, 1 or 2 (cells asked for, cells).
    scale
        By what ``shown`` is multiplied to give as many transcripts as were counted in a cell (cells,).
    """

    share: NDArray[np.float32]
    shown: NDArray[np.float32]
    counts: sp.csr_matrix
    near: sp.csr_matrix
    scale: NDArray[np.float32]

    @classmethod
    def of(cls, said: Said, weights: NDArray[np.float64], n: int, cells: NDArray[np.int64] | None = None) -> Evidence:
        """Take a FOV: ``n`` cells that are most alike, by the latent of the first network, and ``n`` in the tissue.

        Parameters
        ----------
        said
            What the networks say of the FOV.
        weights
            Their weights in the mean share.
        n
            Number of cells, of each kind; one that is both counts twice.
        cells
            Rows of the FOV that are asked for; None for all.
        """
        view = said.whole.view
        share = np.zeros(view.counts.shape, dtype=np.float32)
        latent = np.zeros((len(share), said.networks[0].config.n_latent), dtype=np.float32)

        def take(at: slice, _: Tokens, outputs: Iterator[Output]) -> None:
            for number, (network, output) in enumerate(zip(said.networks, outputs, strict=True)):
                if number == 0:
                    latent[at] = output.latent.cpu().numpy()
                share[at] += np.float32(weights[number]) * network.decoder.share(output.decoded).cpu().numpy()

        for _ in said.in_blocks(take):
            pass
        visible = view.masks["visible"]
        shown = share if visible is None else share * visible.numpy()
        counted = np.asarray(view.counts.sum(axis=1), dtype=np.float32).ravel()
        near = cells_alike(latent, n, cells) + cells_alike(view.fov.positions, n, cells)
        return cls(share, shown, view.counts, near, counted / np.maximum(shown.sum(axis=1), _TINY))

    def there(self, block: slice) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Transcripts counted and expected in the cells alike, of a block of those asked for (cells, genes each)."""
        near = self.near[block]
        counted = dense_product(near, self.counts)
        near.data = near.data * self.scale[near.indices]
        return counted, near @ self.shown


def ratio(counted: NDArray[np.float32], expected: NDArray[np.float32], concentration: float) -> NDArray[np.float32]:
    """By what the shares of the networks are multiplied (cells, genes), from :meth:`Evidence.there`.

    With a share ``s``, ``x`` transcripts counted where ``m`` were expected, and the concentration ``k``, the posterior
    mean under ``rate ~ Gamma(k, k / s)``, ``x ~ Poisson(rate * m / s)`` is ``s * (x + k) / (m + k)``.
    """
    k = np.float32(concentration)
    found: NDArray[np.float32] = (counted + k) / (expected + k)
    return found


def fit_concentration(networks: Sequence[Network], weights: NDArray[np.float64], held: HeldCounts, n: int) -> float:
    """Choose, by held-out counts, how much the counts of cells alike weigh; infinity where they do not help.

    Parameters
    ----------
    networks, weights
        Networks, and their weights in the mean share.
    held
        Held-out counts, with the FOVs that hold the others.
    n
        Number of cells alike, as in :meth:`Evidence.of`.
    """
    candidates = (math.inf, *CONCENTRATIONS)
    gains = np.zeros(len(candidates))
    for of_field in held.by_field():
        for part in _gains(Evidence.of(held.said(of_field.number, networks), weights, n), of_field, held, candidates):
            gains += part
    return candidates[int(np.argmax(gains))]


def _gains(
    evidence: Evidence, of_field: OfField, held: HeldCounts, concentrations: Sequence[float]
) -> Iterator[list[float]]:
    """Gain of the held-out counts of a FOV with each concentration, block by block."""

    def gains(start: int) -> list[float]:
        at = slice(start, start + BLOCK)
        first, last = np.searchsorted(of_field.rows, [at.start, at.stop])
        measured = None if of_field.measured is None else of_field.measured[at]
        places = of_field.rows[first:last] - start, of_field.cols[first:last]
        there, found = evidence.there(at), []
        for concentration in concentrations:
            share = evidence.share[at]
            if not math.isinf(concentration):
                share = share * ratio(*there, concentration)
                share /= np.maximum(share.sum(axis=1, keepdims=True), _TINY)
            found.append(float(of_field.counts[first:last] @ log_ratios(share, *places, measured, held.gene_share)))
        return found

    return held.workers.map(gains, range(0, len(evidence.share), BLOCK))


def correction(
    said: Said,
    weights: NDArray[np.float64],
    n: int,
    concentration: float,
    cells: NDArray[np.int64] | None = None,
) -> Correction:
    """Return what corrects the output of networks for cells of a FOV by the counts of cells alike.

    Parameters
    ----------
    said, weights, n, cells
        As in :meth:`Evidence.of`; blocks are of the cells that are asked for.
    concentration
        How much the counts weigh, from :func:`fit_concentration`; with infinity nothing is corrected.
    """
    if math.isinf(concentration):
        return uncorrected
    evidence = Evidence.of(said, weights, n, cells)

    def corrected(block: slice) -> Callable[[Network, Output], Output]:
        found = torch.from_numpy(ratio(*evidence.there(block), concentration))

        def correct(network: Network, output: Output) -> Output:
            by = found.to(output.decoded.expression)
            return Output(count_decoder(network).multiplied(output.decoded, by), output.latent, output.divergence)

        return correct

    return corrected
