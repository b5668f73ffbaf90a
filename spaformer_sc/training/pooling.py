"""What was counted in cells alike, as evidence on what networks say of a cell.

Networks that are stopped before they overfit leave structure behind that similar cells share. A Gamma-Poisson update
(SAVER: Huang et al. 2018, Nature Methods 15:539-542, eq. 2), as with the cell's own counts, but with those of other
cells: where they hold more transcripts of a gene than was expected of them, so will this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from spaformer_sc._memory import BLOCK
from spaformer_sc._threads import Workers
from spaformer_sc.nn.network import Network, Output, Tokens

from .mixing import Correction, HeldCounts, count_decoder, uncorrected
from .prediction import in_blocks
from .scoring import log_ratios
from .sequences import Whole

CONCENTRATIONS = (5.0, 10.0, 20.0, 50.0, 100.0)
"""Transcripts expected of a gene at which what was counted weighs as much as what was expected; to choose from."""

_TINY = 1e-12


def cells_alike(points: NDArray[np.floating], n: int) -> sp.csr_matrix:
    """Return which ``n`` cells (all others, where there are fewer) are nearest to each: CSR (cells, cells), 1 or 0.

    Parameters
    ----------
    points
        Places of the cells, in the tissue or in the latent space (cells, dimensions).
    n
        How many; a cell is not among its own.
    """
    from sklearn.neighbors import NearestNeighbors

    n_cells = len(points)
    n = min(n, n_cells - 1)
    if n < 1:
        return sp.csr_matrix((n_cells, n_cells), dtype=np.float32)
    # One thread: with several, which of equally near cells are taken would depend on their number.
    with threadpool_limits(1):
        found = NearestNeighbors(n_neighbors=n + 1).fit(points).kneighbors(points, return_distance=False)
    # Where cells lie on each other, a cell need not be the first of its own neighbours, or among them at all.
    itself = found == np.arange(n_cells)[:, None]
    itself[~itself.any(axis=1), -1] = True
    cols = found[~itself]
    rows = np.arange(0, len(cols) + 1, n)
    return sp.csr_matrix((np.ones(len(cols), dtype=np.float32), cols, rows), shape=(n_cells, n_cells))


@dataclass(frozen=True)
class Evidence:
    """What networks say of the cells of a FOV, and what was counted in cells alike.

    Attributes
    ----------
    share
        Mean share of the networks (cells, genes), rows sum to 1.
    counted, expected
        Transcripts in the cells that are most like a cell and in those that lie nearest to it, those that were counted
        and those that the networks expect of them (cells, genes).
    """

    share: NDArray[np.float32]
    counted: NDArray[np.float32]
    expected: NDArray[np.float32]

    @classmethod
    def of(
        cls, networks: Sequence[Network], weights: NDArray[np.float64], whole: Whole, n: int, workers: Workers
    ) -> Evidence:
        """Take a FOV: ``n`` cells that are most alike, by the latent of the first network, and ``n`` in the tissue.

        Parameters
        ----------
        networks, weights
            Networks, and their weights in the mean share.
        whole
            The FOV.
        n
            Number of cells, of each kind; one that is both counts twice.
        workers
            Threads to compute in.
        """
        n_cells, n_genes = whole.view.counts.shape
        share = np.zeros((n_cells, n_genes), dtype=np.float32)
        latent = np.zeros((n_cells, networks[0].config.n_latent), dtype=np.float32)

        def take(at: slice, _: Tokens, outputs: Iterator[Output]) -> None:
            for number, (network, output) in enumerate(zip(networks, outputs, strict=True)):
                if number == 0:
                    latent[at] = output.latent.cpu().numpy()
                share[at] += np.float32(weights[number]) * network.decoder.share(output.decoded).cpu().numpy()

        for _ in in_blocks(networks, whole, take, workers):
            pass
        visible = whole.view.masks["visible"]
        expected = share if visible is None else share * visible.numpy()
        counts = whole.view.counts
        depth = np.asarray(counts.sum(axis=1), dtype=np.float32).ravel()
        expected = expected * (depth / np.maximum(expected.sum(axis=1), _TINY))[:, None]
        near = cells_alike(latent, n) + cells_alike(whole.view.fov.positions, n)
        return cls(share, (near @ counts).toarray().astype(np.float32), near @ expected)

    def ratio(self, concentration: float) -> NDArray[np.float32]:
        """By what the shares of the networks are multiplied (cells, genes).

        With a share ``s``, ``x`` transcripts counted where ``m`` were expected, and the concentration ``k``, the
        posterior mean under ``rate ~ Gamma(k, k / s)``, ``x ~ Poisson(rate * m / s)`` is ``s * (x + k) / (m + k)``.
        """
        k = np.float32(concentration)
        found: NDArray[np.float32] = (self.counted + k) / (self.expected + k)
        return found


def fit_concentration(
    networks: Sequence[Network], weights: NDArray[np.float64], held: HeldCounts, n: int, workers: Workers
) -> float:
    """Choose, by held-out counts, how much the counts of cells alike weigh; infinity where they do not help.

    Parameters
    ----------
    networks, weights
        Networks, and their weights in the mean share.
    held
        Held-out counts, with the FOVs that hold the others.
    n
        Number of cells alike, as in :meth:`Evidence.of`.
    workers
        Threads to compute in.
    """
    candidates = (math.inf, *CONCENTRATIONS)
    gains = np.zeros(len(candidates))
    for whole, rows, cols, counts, measured in held.by_field():
        if not len(counts):
            continue
        evidence = Evidence.of(networks, weights, whole, n, workers)
        for number, concentration in enumerate(candidates):
            share = evidence.share
            if not math.isinf(concentration):
                share = share * evidence.ratio(concentration)
                share /= np.maximum(share.sum(axis=1, keepdims=True), _TINY)
            for start in range(0, len(share), BLOCK):
                at = slice(start, start + BLOCK)
                first, last = np.searchsorted(rows, [at.start, at.stop])
                here = None if measured is None else measured[at]
                places = rows[first:last] - start, cols[first:last]
                gains[number] += counts[first:last] @ log_ratios(share[at], *places, here, held.gene_share)
    return candidates[int(np.argmax(gains))]


def correction(
    networks: Sequence[Network],
    weights: NDArray[np.float64],
    whole: Whole,
    n: int,
    concentration: float,
    workers: Workers,
) -> Correction:
    """Return what corrects the output of networks for cells of a FOV by the counts of cells alike.

    Parameters
    ----------
    networks, weights, whole, n, workers
        As in :meth:`Evidence.of`.
    concentration
        How much the counts weigh, from :func:`fit_concentration`; with infinity nothing is corrected.
    """
    if math.isinf(concentration):
        return uncorrected
    ratio = Evidence.of(networks, weights, whole, n, workers).ratio(concentration)

    def corrected(rows: slice | NDArray[np.int64], network: Network, output: Output) -> Output:
        at = torch.from_numpy(ratio[rows]).to(output.decoded.expression)
        return Output(count_decoder(network).multiplied(output.decoded, at), output.latent, output.divergence)

    return corrected
