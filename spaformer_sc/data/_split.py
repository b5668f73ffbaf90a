"""Counts that the fit does not see: a part to stop on, and a part to score on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray


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
    values = counts.data.astype(np.int64)
    held = rng.binomial(values, validation + test)
    scored = rng.binomial(held, test / (validation + test))

    def part(data: np.ndarray) -> sp.csr_matrix:
        matrix = sp.csr_matrix((data.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape, copy=True)
        matrix.eliminate_zeros()
        return matrix

    return HeldOut(part(values - held), part(held - scored), part(scored))


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
