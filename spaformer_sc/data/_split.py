"""Counts and entries that the fit does not see: a part to stop on, and a part to score on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

ENTRIES_AT_A_TIME = 2**17
"""Counts taken at a time where each takes much more memory than in the matrix."""

LEAST_BLOCKS = 30
"""Genes hidden in a FOV that are enough to decide by."""


@dataclass(frozen=True)
class HeldOut:
    """Three parts of a count matrix (cells, genes, CSR each) that add up to it."""

    train: sp.csr_matrix
    validation: sp.csr_matrix
    test: sp.csr_matrix


def hold_out(counts: sp.csr_matrix, *, validation: float, test: float, rng: np.random.Generator) -> HeldOut:
    """Split every count at random into a part to train on, one to stop on and one to score on.

    Each transcript goes to one of the parts independently. The parts of a Poisson count are independent given its rate
    (Neufeld et al. 2023, count splitting), so a score on the held-out part is not flattered by fitting noise.

    Parameters
    ----------
    counts
        Integer-valued counts (cells, genes), canonical CSR.
    validation, test
        Share of the transcripts in the two held-out parts.
    rng
        Source of randomness.
    """
    held = _binomial(counts.data, validation + test, rng)
    scored = _binomial(held, test / (validation + test), rng)

    def part(data: NDArray[np.float32]) -> sp.csr_matrix:
        matrix = sp.csr_matrix((data, counts.indices.copy(), counts.indptr.copy()), shape=counts.shape)
        matrix.eliminate_zeros()
        return matrix

    return HeldOut(part(counts.data - held), part(held - scored), part(scored))


def _binomial(n: NDArray[np.float32], p: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw from Binomial(n, p) elementwise (entries,), for whole numbers."""
    drawn = np.empty(len(n), dtype=np.float32)
    for start in range(0, len(n), ENTRIES_AT_A_TIME):
        at = slice(start, start + ENTRIES_AT_A_TIME)
        drawn[at] = rng.binomial(n[at].astype(np.int64), p)
    return drawn


def hold_out_entries(
    counts: sp.csr_matrix, missing: NDArray[np.bool_], fovs: NDArray[np.int64], share: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Hide a share of the measured entries, in the way of those that are missing.

    Where most of what is missing is genes missing in a whole FOV (:func:`in_blocks`), these are whole FOVs of a gene,
    of genes that stay measured in another one: at least :data:`LEAST_BLOCKS`, if that is at most a quarter of those
    that there are. Otherwise they are single entries.

    Parameters
    ----------
    counts
        Counts (cells, genes), 0 where missing.
    missing
        Which entries were not measured (cells, genes).
    fovs
        Number of the FOV of each cell (cells,), from 0.
    share
        Share of the measured entries.
    rng
        Source of randomness.

    Returns
    -------
    Which entries are held out (cells, genes); none in a cell that would be left without counts.
    """
    if in_blocks(missing, fovs):
        measured = ~_whole_blocks(missing, fovs)
        eligible = measured.copy()
        stays = np.where(measured, rng.random(measured.shape), -1).argmax(axis=0)
        eligible[stays, np.arange(len(stays))] = False
        n_held = min(max(round(share * measured.sum()), LEAST_BLOCKS), eligible.sum() // 4)
        blocks = np.zeros(measured.shape, dtype=bool)
        blocks.ravel()[rng.choice(np.flatnonzero(eligible), size=n_held, replace=False)] = True
        held = blocks[fovs] & ~missing
    else:
        held = (rng.random(missing.shape, dtype=np.float32) < share) & ~missing
    held[np.asarray(counts.multiply(~held).sum(axis=1)).ravel() == 0] = False
    return np.asarray(held)


def in_blocks(missing: NDArray[np.bool_], fovs: NDArray[np.int64]) -> bool:
    """Whether most of the ``missing`` entries (cells, genes) are genes missing in whole FOVs, measured in others.

    Genes measured nowhere do not count: nothing can be learnt of them.
    """
    somewhere = ~missing.all(axis=0)
    blocks = _whole_blocks(missing, fovs)[:, somewhere]
    return 2 * int(np.bincount(fovs) @ blocks.sum(axis=1)) > int(missing.sum(axis=0)[somewhere].sum())


def _whole_blocks(missing: NDArray[np.bool_], fovs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which genes are missing in every cell of which FOV (FOVs, genes)."""
    return np.stack([missing[fovs == fov].all(axis=0) for fov in range(fovs.max() + 1)])


def typical_values(
    counts: sp.csr_matrix, missing: NDArray[np.bool_] | None, gene_share: NDArray[np.float32], target_sum: float
) -> NDArray[np.float32]:
    """Mean log-normalised expression of each gene over the cells that it was measured in.

    Parameters
    ----------
    counts
        Counts (cells, genes), 0 where missing.
    missing
        Which entries were not measured (cells, genes), or None.
    gene_share
        From :func:`gene_shares`; gives the depth of cells in which entries are missing.
    target_sum
        Depth to normalise to.

    Returns
    -------
    Mean of log1p(count / depth * target_sum), float32 (genes,).
    """
    library = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    n_measured = np.full(counts.shape[1], counts.shape[0])
    if missing is not None:
        library = library / np.maximum(~missing @ gene_share, 1e-6)
        n_measured = (~missing).sum(axis=0)
    total = np.zeros(counts.shape[1])
    n_rows = max(1, ENTRIES_AT_A_TIME // counts.shape[1])
    for start in range(0, counts.shape[0], n_rows):
        entries = counts[start : start + n_rows].tocoo()
        values = np.log1p(entries.data / library[start : start + n_rows][entries.row] * target_sum)
        total += np.bincount(entries.col, weights=values, minlength=counts.shape[1])
    return np.asarray(total / np.maximum(n_measured, 1), dtype=np.float32)


def gene_shares(counts: sp.csr_matrix, missing: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """Mean share of each gene in a cell's transcripts.

    The total of the gene over the total depth of the cells in which it was measured. Where entries are missing, a
    cell's depth over all genes is its measured total over the share that its measured genes hold, which the shares
    themselves give: a few fixed-point steps. Half a transcript is added per gene, so that no share is 0.

    Parameters
    ----------
    counts
        Counts (cells, genes), 0 where missing.
    missing
        Which entries were not measured (cells, genes), or None.

    Returns
    -------
    Shares (genes,), positive, sum 1.
    """
    total = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
    share = (total + 0.5) / (total + 0.5).sum()
    if missing is not None:
        library = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
        measured = ~missing
        for _ in range(20):
            depth = library / np.maximum(measured @ share, 1e-12)
            exposure = depth @ measured
            share = np.divide(total, exposure, out=np.zeros_like(total), where=exposure > 0) + 0.5 / depth.sum()
            share /= share.sum()
    return np.asarray(share, dtype=np.float32)
