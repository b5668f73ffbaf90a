"""Factorisations: truncated singular value decomposition, and non-negative factorisation with Poisson likelihood."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peers._cells import Cells, FloatArray, generator, top_eigenvectors
from peers._tuning import Setting, Tuned

_FILLS = 5
_BLOCK_ROWS = 1024
_NEGLIGIBLE = 1e-15


def low_rank(values: NDArray[np.float32], rank: int, missing: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """Approximate values by a matrix of low rank.

    Hidden entries start at 0 and are filled with the approximation five times, each time followed by a new
    decomposition (Troyanskaya et al. 2001, "Missing value estimation methods for DNA microarrays", SVDimpute).

    Parameters
    ----------
    values
        Values, cells × genes, 0 where hidden.
    rank
        Number of singular vectors kept.
    missing
        True where hidden; None if nothing is.
    """
    filled = values
    for _ in range(1 if missing is None else _FILLS + 1):
        vectors = top_eigenvectors(filled.T @ filled, rank)
        approximation: NDArray[np.float32] = (filled @ vectors) @ vectors.T
        filled = values if missing is None else np.where(missing, approximation, values)
    return approximation


def _truncated_svds(
    cells: Cells, grid: list[Setting], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[Setting, FloatArray]]:
    """Low-rank approximation; settings are ``(scaling, rank)``.

    ``"lognorm"`` approximates log-normalised values less the mean of the gene. The others approximate counts, and
    negative rates are set to zero: ``"depth"`` scales counts by the depth of the cell; ``"poisson"`` by the square root
    of depth × gene share, which gives all entries unit variance under a Poisson gene-mean model (as in correspondence
    analysis).
    """
    depth = np.maximum(cells.depth, 1)
    spread = np.sqrt(np.maximum(cells.shares, 1e-12))
    for scaling, rank in grid:
        if scaling == "lognorm":
            mean = cells.gene_mean
            values = (cells.lognorm(cells.target_sum) - mean) * cells.visible
            yield (scaling, rank), low_rank(values, rank, cells.missing)[rows] + mean
            continue
        by_cell, by_gene = (np.sqrt(depth), spread) if scaling == "poisson" else (depth, np.ones_like(spread))
        scaled = sparse.diags_array(1 / by_cell) @ cells.counts @ sparse.diags_array(1 / by_gene)
        approximation = low_rank(scaled.toarray().astype(np.float32), rank, cells.missing)[rows]
        yield (scaling, rank), np.maximum(approximation, 0) * by_gene.astype(np.float32)


def kl_nmf_updates(
    values: sparse.csr_matrix,
    w: FloatArray,
    h: FloatArray,
    n_iter: int,
    visible: NDArray[np.float32] | None = None,
) -> None:
    r"""Multiplicative updates of a non-negative factorisation under Kullback-Leibler divergence, in place.

    Lee and Seung (2001), "Algorithms for non-negative matrix factorization", theorem 2: with
    :math:`R = X / (WH)`, first :math:`W \leftarrow W \cdot R H^\top / \sum_g H_{kg}`, then
    :math:`H \leftarrow H \cdot W^\top R / \sum_i W_{ik}`. Where entries are hidden, both sums run over visible entries
    only, :math:`V H^\top` and :math:`W^\top V`.
    :math:`R` is needed where values are not zero only, and :math:`WH` is formed for a block of cells at a time, so that
    no further dense cells × genes matrix is held. Factors below 1e-15 become zero: they are on their way there, and
    denormal numbers would slow the products down many times.

    Parameters
    ----------
    values
        Non-negative values, CSR, cells × genes, 0 where hidden.
    w, h
        Factors, cells × rank and rank × genes, floating point; changed.
    n_iter
        Number of updates of both factors.
    visible
        1 where an entry is visible and 0 where it is hidden, cells × genes; None if nothing is hidden.
    """
    tiny = _NEGLIGIBLE**2
    n_cells, n_genes = values.shape
    blocks = []
    for start in range(0, n_cells, _BLOCK_ROWS):
        x = values[start : start + _BLOCK_ROWS].astype(w.dtype)
        flat = np.repeat(np.arange(x.shape[0]) * n_genes, np.diff(x.indptr)) + x.indices
        blocks.append((slice(start, start + x.shape[0]), x.data, flat))

    for _ in range(n_iter):
        numerator, denominator = np.zeros_like(h), np.zeros_like(h)
        for rows, x, flat in blocks:
            part = w[rows]
            seen = np.ones((1, n_genes), w.dtype) if visible is None else visible[rows]
            ratio = np.zeros((len(part), n_genes), w.dtype)
            ratio.ravel()[flat] = x / np.maximum((part @ h).ravel()[flat], tiny)
            part *= (ratio @ h.T) / np.maximum(seen @ h.T, tiny)
            part[part < _NEGLIGIBLE] = 0
            ratio.ravel()[flat] = x / np.maximum((part @ h).ravel()[flat], tiny)
            numerator += part.T @ ratio
            denominator += part.sum(axis=0)[:, None] if visible is None else part.T @ seen
        h *= numerator / np.maximum(denominator, tiny)
        h[h < _NEGLIGIBLE] = 0


def _kl_nmfs(
    cells: Cells, grid: list[Setting], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[Setting, FloatArray]]:
    """Non-negative factorisation of counts or log-normalised values, stopped after some updates.

    Settings are ``(rank, updates)``.
    """
    values = cells.counts if cells.output == "rate" else sparse.csr_matrix(cells.lognorm(cells.target_sum))
    visible = None if cells.missing is None else cells.visible
    for rank in sorted({rank for rank, _ in grid}):
        rng = generator(random_state, "factors")
        scale = np.sqrt(values.mean() / rank)
        w = (scale * np.abs(rng.standard_normal((values.shape[0], rank)))).astype(np.float32)
        h = (scale * np.abs(rng.standard_normal((rank, values.shape[1])))).astype(np.float32)
        done = 0
        for n_iter in sorted(n for r, n in grid if r == rank):
            kl_nmf_updates(values, w, h, n_iter - done, visible)
            done = n_iter
            yield (rank, n_iter), w[rows] @ h


truncated_svd = Tuned(
    "truncated_svd",
    _truncated_svds,
    rate=list(product(("depth", "poisson"), (5, 10, 15, 20, 30, 40, 60, 80))),
    lognorm=list(product(("lognorm",), (3, 5, 7, 10, 15, 20, 30))),
)
kl_nmf = Tuned(
    "kl_nmf",
    _kl_nmfs,
    rate=list(product((10, 15, 20, 30, 45), (50, 100))),
    lognorm=list(product((8, 12, 16, 24), (50, 100, 150))),
)
