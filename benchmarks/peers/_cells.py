"""What the tuned methods see of a data set, and averages over cells that leave hidden entries out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

FloatArray = NDArray[Any]

_ROUNDS = 10


@dataclass(frozen=True, eq=False)
class Cells:
    """Counts with positions, and what is derived from them.

    Parameters
    ----------
    counts
        Visible counts, CSR, float32, cells × genes.
    coords
        Positions, cells × 2.
    fovs
        Field of view of each cell, integers.
    output
        Scale of predictions: ``"rate"`` or ``"lognorm"``.
    target_sum
        Depth that log-normalised values refer to, in counts.
    missing
        True where an entry is hidden, cells × genes; None if nothing is.
    reference
        Depth that :attr:`centred` refers to where rates are predicted; None for the typical one.
    """

    counts: sparse.csr_matrix
    coords: FloatArray
    fovs: NDArray[np.intp]
    output: str = "rate"
    target_sum: float = 250.0
    missing: NDArray[np.bool_] | None = None
    reference: float | None = None

    @classmethod
    def of(cls, adata: AnnData) -> Cells:
        """Read the input of a method."""
        task = adata.uns["task"]
        fovs = np.asarray(adata.obs["fov"].astype(str)) if "fov" in adata.obs else np.zeros(adata.n_obs)
        counts = sparse.csr_matrix(adata.X, dtype=np.float32)
        missing = adata.layers.get("missing")
        if missing is not None:
            counts = counts.multiply(~np.asarray(missing, dtype=bool)).tocsr()
            counts.eliminate_zeros()
        return cls(
            counts=counts,
            coords=np.asarray(adata.obsm["spatial"], dtype=np.float64),
            fovs=np.unique(fovs, return_inverse=True)[1],
            output=task["output"],
            target_sum=float(task["target_sum"]),
            missing=None if missing is None else np.asarray(missing, dtype=bool),
        )

    def hide(self, hidden: NDArray[np.bool_]) -> tuple[Cells, NDArray[np.bool_]]:
        """Hide further entries; returns what is left, and which entries were visible before and are hidden now."""
        if self.missing is not None:
            hidden = hidden & ~self.missing
        counts = self.counts.tocoo()
        kept = ~hidden[counts.row, counts.col]
        left = sparse.csr_matrix((counts.data[kept], (counts.row[kept], counts.col[kept])), shape=counts.shape)
        missing = hidden if self.missing is None else hidden | self.missing
        return replace(self, counts=left, missing=missing), hidden

    @cached_property
    def visible(self) -> NDArray[np.float32]:
        """1 where an entry is visible, 0 where not; cells × genes, or cells × 1 where nothing is hidden."""
        if self.missing is None:
            return np.ones((self.counts.shape[0], 1), np.float32)
        return (~self.missing).astype(np.float32)

    @cached_property
    def _shares_and_depth(self) -> tuple[FloatArray, FloatArray]:
        n_genes = self.counts.shape[1]
        totals = np.asarray(self.counts.sum(axis=1, dtype=np.float64)).ravel()
        by_gene = np.asarray(self.counts.sum(axis=0, dtype=np.float64)).ravel()
        shares = by_gene / max(by_gene.sum(), 1)
        if self.missing is None:
            return shares, totals
        depth = totals
        for _ in range(_ROUNDS):
            seen = self.visible @ shares.astype(np.float32)
            depth = np.divide(totals, seen, out=np.zeros_like(totals), where=seen > 0)
            exposure = depth.astype(np.float32) @ self.visible
            shares = np.divide(by_gene, exposure, out=np.zeros(n_genes), where=exposure > 0)
            shares /= max(shares.sum(), 1e-12)
        return shares, depth

    @property
    def shares(self) -> FloatArray:
        """Share of each gene in all counts; where entries are hidden, of the cells in which it is visible.

        Shares and depths that agree with each other are found by turns, as in iterative proportional fitting.
        """
        return self._shares_and_depth[0]

    @property
    def depth(self) -> FloatArray:
        """Counts of each cell over all genes: visible counts / share that its visible genes hold on average."""
        return self._shares_and_depth[1]

    @cached_property
    def typical_depth(self) -> float:
        """Median depth of the cells with counts."""
        return float(np.median(self.depth[self.depth > 0]))

    def lognorm(self, target_sum: float) -> NDArray[np.float32]:
        """Return log1p(count / depth × target_sum), dense, cells × genes; 0 where hidden."""
        scale = np.divide(target_sum, self.depth, out=np.zeros_like(self.depth), where=self.depth > 0)
        return (sparse.diags_array(scale.astype(np.float32)) @ self.counts).log1p().toarray()

    @cached_property
    def gene_mean(self) -> NDArray[np.float32]:
        """Mean of each gene in the scale of predictions, over visible entries."""
        if self.output == "rate":
            return self.shares.astype(np.float32)
        return self.column_means(self.lognorm(self.target_sum))

    def column_means(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean of each gene over the visible entries of cells with counts; `values` are 0 where hidden."""
        count = np.asarray((self.depth > 0).astype(np.float32) @ self.visible, dtype=np.float64)
        means: NDArray[np.float32] = (values.sum(axis=0, dtype=np.float64) / np.maximum(count, 1)).astype(np.float32)
        return means

    @cached_property
    def centred(self) -> NDArray[np.float32]:
        """Log-normalised values less the mean of the gene; 0 where hidden or the cell is empty.

        They refer to the depth that predictions refer to; where those are rates, to `reference`.
        """
        values = self.lognorm(self.target_sum if self.output == "lognorm" else self.reference or self.typical_depth)
        values -= self.column_means(values)
        values *= self.visible
        values[self.depth == 0] = 0
        return values

    def _values(self, what: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return values, 0 where hidden, and what they are divided by when averaged, dense or cells × 1."""
        present = (self.depth > 0).astype(np.float32)[:, None]
        if what == "counts":
            return self.counts.toarray(), self.depth.astype(np.float32)[:, None] * self.visible
        if what == "lognorm":
            return self.lognorm(self.target_sum), present * self.visible
        scale = np.divide(1, self.depth, out=np.zeros_like(self.depth), where=self.depth > 0).astype(np.float32)
        return (sparse.diags_array(scale) @ self.counts).toarray(), present * self.visible

    def averages(
        self, members: list[sparse.csr_matrix], whats: tuple[str, ...]
    ) -> Iterator[tuple[int, str, NDArray[np.float32]]]:
        """Average visible entries over sets of cells that grow step by step.

        Parameters
        ----------
        members
            Which cells enter at each step, queries × cells, 0 or 1.
        whats
            What is averaged: ``"profiles"`` (counts / depth, every cell alike), ``"counts"`` (counts added up, so that
            deeper cells weigh more) or ``"lognorm"`` (log-normalised values, every cell alike).

        Yields
        ------
        The step, what was averaged, and the averages, queries × genes; where no cell of the set has seen a gene, the
        mean of the gene.
        """
        for what in whats:
            values, exposure = self._values(what)
            total = np.zeros((members[0].shape[0], values.shape[1]), np.float32)
            weight = np.zeros((members[0].shape[0], exposure.shape[1]), np.float32)
            for step, member in enumerate(members):
                total += member @ values
                weight += member @ exposure
                mean = total / np.where(weight > 0, weight, 1)
                yield step, what, np.where(weight > 0, mean, self.gene_mean)

    def neighbour_averages(
        self, neighbours: NDArray[np.intp], ks: list[int], whats: tuple[str, ...]
    ) -> Iterator[tuple[int, str, NDArray[np.float32]]]:
        """Average over the first k neighbours for each k in `ks`, see :meth:`averages`.

        `neighbours` are the neighbours of each query, nearest first, −1 where there are no more.
        """
        ks = sorted(set(ks))
        steps = zip([0, *ks], ks)
        members = [indicator(neighbours[:, start:stop], len(self.fovs)) for start, stop in steps]
        for step, what, mean in self.averages(members, whats):
            yield ks[step], what, mean

    def spatial_neighbours(self, k: int, include_self: bool = False) -> NDArray[np.intp]:
        """Return the k cells nearest in space within the field of view, nearest first, padded with −1; cells × k."""
        skip = 0 if include_self else 1
        neighbours = np.full((len(self.fovs), k), -1, dtype=np.intp)
        for fov in np.unique(self.fovs):
            members = np.flatnonzero(self.fovs == fov)
            most = min(k + skip, len(members))
            _, found = cKDTree(self.coords[members]).query(self.coords[members], k=range(1, most + 1))
            if skip:
                found = _without_self(found)
            neighbours[members, : found.shape[1]] = members[found]
        return neighbours

    def around(self, k: int) -> NDArray[np.float32]:
        """Mean of :attr:`centred` over the k cells nearest in space, the cell itself left out; visible entries only."""
        member = indicator(self.spatial_neighbours(k), len(self.fovs))
        weight = member @ ((self.depth > 0).astype(np.float32)[:, None] * self.visible)
        mean: NDArray[np.float32] = (member @ self.centred) / np.maximum(weight, 1)
        return mean


def generator(random_state: int, purpose: str) -> np.random.Generator:
    """Return a generator for one purpose, independent of those that others derive from the same `random_state`.

    Whoever made the split may have drawn from ``default_rng(random_state)``: the same stream would hide again what is
    hidden already.
    """
    return np.random.default_rng([random_state, *purpose.encode()])


def indicator(chosen: NDArray[np.intp], n_cells: int) -> sparse.csr_matrix:
    """Return a 0/1 matrix, queries × cells, of the cells named in each row of `chosen`; −1 names none."""
    present = chosen >= 0
    indptr = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
    return sparse.csr_matrix((np.ones(indptr[-1], np.float32), chosen[present], indptr), shape=(len(chosen), n_cells))


def _without_self(found: NDArray[np.intp]) -> NDArray[np.intp]:
    """Drop row number i from row i, or the last entry where cells at the same place have pushed it out."""
    is_self = found == np.arange(len(found))[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    return found[~is_self].reshape(len(found), found.shape[1] - 1)


def top_eigenvectors(gram: FloatArray, n: int) -> NDArray[np.float32]:
    """Return the eigenvectors of the largest `n` eigenvalues of a symmetric matrix, largest first, as columns."""
    from scipy.linalg import eigh

    size = len(gram)
    n = min(n, size)
    _, vectors = eigh(gram.astype(np.float64), subset_by_index=(size - n, size - 1))
    return np.ascontiguousarray(vectors[:, ::-1], dtype=np.float32)
