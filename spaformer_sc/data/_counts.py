"""Checked raw counts of all cells, in memory or read row by row from a file or lazy array."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray


@dataclass(frozen=True)
class Counts:
    """Raw counts (cells, genes) that have been checked.

    Attributes
    ----------
    shape
        Cells and genes.
    per_cell, per_gene
        Sum of the counts of each cell (cells,) and of each gene (genes,).
    n_filled
        Number of entries of each cell that are not 0 (cells,).
    fractional
        Whether some counts have fractions.
    checksum
        Gives a checksum of all counts.
    read
        Gives rows, by an increasing array of their numbers, as canonical CSR float32 without explicit zeros.
    """

    shape: tuple[int, int]
    per_cell: NDArray[np.float64]
    per_gene: NDArray[np.float64]
    n_filled: NDArray[np.int64]
    fractional: bool
    checksum: Callable[[], str]
    read: Callable[[NDArray[np.int64]], sp.csr_matrix]

    def rows(self, cells: NDArray[np.int64]) -> sp.csr_matrix:
        """Counts of some cells (cells asked for, genes), in the order asked for; none twice."""
        order = np.argsort(cells, kind="stable")
        found = self.read(cells[order])
        if (order[1:] > order[:-1]).all():
            return found
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return found[back]

    def of(self, genes: NDArray[np.int64]) -> Counts:
        """Counts of some genes, in the order asked for. What is known per cell stays that over all genes."""
        n_cells, read = self.shape[0], self.read
        return Counts(
            (n_cells, len(genes)),
            self.per_cell,
            self.per_gene[genes],
            self.n_filled,
            self.fractional,
            self.checksum,
            lambda cells: read(cells)[:, genes],
        )


def sums(counts: sp.csr_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of counts per cell and per gene."""
    per_cell, per_gene = (np.asarray(counts.sum(axis=axis, dtype=np.float64)).ravel() for axis in (1, 0))
    return per_cell, per_gene


def add_to(checksum: hashlib._Hash, counts: sp.csr_matrix) -> hashlib._Hash:
    """Add counts to a checksum; in blocks of the same size the same counts give the same."""
    for part in (np.diff(counts.indptr), counts.indices, counts.data):
        checksum.update(np.ascontiguousarray(part).data)
    return checksum


def in_memory(counts: sp.csr_matrix, fractional: bool) -> Counts:
    """Counts that lie in memory (cells, genes)."""
    return Counts(
        counts.shape,
        *sums(counts),
        np.diff(counts.indptr).astype(np.int64),
        fractional,
        lambda: add_to(hashlib.sha256(), counts).hexdigest(),
        lambda cells: counts if len(cells) == counts.shape[0] else counts[cells],
    )
