"""Means of genes: over all cells, over the field of view, over the cells nearest in space."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from peers._cells import Cells, FloatArray
from peers._tuning import Setting, Tuned


def gene_mean(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """Impute the mean of each gene over visible entries, the same for every cell."""
    cells = Cells.of(adata)
    return np.broadcast_to(cells.gene_mean, cells.counts.shape).copy(), cells.output


def _fov_means(
    cells: Cells, grid: list[Setting], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[Setting, FloatArray]]:
    """Mean over the cells of the field of view; settings are ``(what,)``."""
    n_cells = len(cells.fovs)
    member = sparse.csr_matrix((np.ones(n_cells, np.float32), (cells.fovs, np.arange(n_cells))))
    for _, what, mean in cells.averages([member], tuple(what for (what,) in grid)):
        yield (what,), mean[cells.fovs[rows]]


def _spatial_means(
    cells: Cells, grid: list[Setting], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[Setting, FloatArray]]:
    """Mean over the k cells nearest in space within the field of view, the cell included; settings ``(k, what)``."""
    neighbours = cells.spatial_neighbours(max(k for k, _ in grid), include_self=True)[rows]
    whats = tuple(dict.fromkeys(what for _, what in grid))
    for k, what, mean in cells.neighbour_averages(neighbours, [k for k, _ in grid], whats):
        yield (k, what), mean


_K = (2, 3, 5, 10, 20, 40, 80, 160, 320)

fov_gene_mean = Tuned("fov_gene_mean", _fov_means, rate=[("counts",)], lognorm=[("lognorm",)])
spatial_knn_mean = Tuned(
    "spatial_knn_mean",
    _spatial_means,
    rate=list(product(_K, ("profiles", "counts"))),
    lognorm=list(product(_K, ("lognorm",))),
)
