"""Imputation methods behind one call, each tuned on counts it is given and on nothing else.

Every method is a function ``impute(train, coords, fovs, random_state) -> (prediction, scale)``:

- ``train``: counts to impute from, CSR, cells × genes;
- ``coords``: position of every cell, cells × 2;
- ``fovs``: field of view of every cell, or None where there is none;
- ``prediction``: float32, cells × genes;
- ``scale``: ``"rate"`` (proportional to expected counts within each cell) or ``"lognorm"`` (log1p of such).

All peers are tuned in the same way. The training counts are thinned once more, 80 % to 20 %. Every setting in the
method's grid predicts from the 80 %, and the Poisson log-likelihood of the 20 % chooses the setting together with the
weights of a mixture, ``(1 - w) * method + w * gene mean``. The method then runs once more on all training counts with
what was chosen. The variants named ``…+own`` have a third part in the mixture, the cell's own counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import svds
from scipy.spatial import cKDTree

from spaformer_sc.metrics import thin

FloatArray = NDArray[Any]
Prediction = tuple[NDArray[np.float32], str]
Imputer = Callable[[sparse.csr_matrix, FloatArray, NDArray[Any] | None, int], Prediction]

_TUNING_CELLS = 5000
_BLOCK_ROWS = 1024
_NEGLIGIBLE = 1e-15


class Cells(NamedTuple):
    """What a method sees: counts (CSR, float32), positions (cells × 2), field of view of each cell (integers)."""

    counts: sparse.csr_matrix
    coords: FloatArray
    fovs: NDArray[np.intp]


Family = Callable[[Cells, list[tuple[Any, ...]], NDArray[np.intp], int], Iterator[tuple[tuple[Any, ...], FloatArray]]]
"""``family(cells, grid, rows, random_state)`` yields every setting of the grid, in an order of its own, with the rates
it predicts for the cells in ``rows``: non-negative, any scale per cell, zero throughout where it has nothing to say."""


# ------------------------------------------------------------------------------------------------------------- tuning


def gene_shares(counts: sparse.csr_matrix) -> FloatArray:
    """Share of each gene in all counts."""
    totals: FloatArray = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    totals /= totals.sum()
    return totals


def _shares(rates: FloatArray, mean: FloatArray) -> FloatArray:
    """Scale every cell's rates to sum one; a cell without any gets the gene mean."""
    sums = rates.sum(axis=1, keepdims=True)
    shares = np.asarray(rates / np.where(sums > 0, sums, 1), dtype=np.float32)
    shares[sums.ravel() == 0] = mean
    return shares


def best_weights(held: sparse.csr_matrix, parts: list[FloatArray]) -> tuple[FloatArray, float]:
    """Find the weights of a mixture of predictions that make held counts most likely.

    The Poisson log-likelihood with means scaled to the library size is, up to a constant, the sum of x · log(share),
    which is concave in the weights; expectation-maximisation climbs to its maximum.

    Parameters
    ----------
    held
        Counts to be predicted, cells × genes. Counts that no part gives a share to are left out.
    parts
        Shares of each gene in each cell as each part predicts them, cells × genes or, alike for all cells, genes.

    Returns
    -------
    The weights, which sum to one, and the log-likelihood (nats per held count, up to a constant).
    """
    counts = held.tocoo()
    shares = np.stack([np.broadcast_to(part, held.shape)[counts.row, counts.col] for part in parts]).astype(np.float64)
    possible = shares.any(axis=0)
    shares, x = shares[:, possible], counts.data[possible].astype(np.float64)
    x /= x.sum()
    weights = np.full(len(parts), 1 / len(parts))
    score = -np.inf
    for _ in range(1000):
        mixture = weights @ shares
        before, score = score, float(x @ np.log(mixture))
        if score - before < 1e-7:
            break
        weights = weights * (shares @ (x / mixture))
    return weights, score


def tuned(name: str, family: Family, grid: list[tuple[Any, ...]], own: bool = False) -> Imputer:
    """Turn a family of methods into an imputer that chooses its setting and its mixture weights by validation.

    Parameters
    ----------
    name
        Name for the line that says what was chosen.
    family
        Predicts with every setting of a grid.
    grid
        Settings to choose from.
    own
        Whether the mixture has the cell's own counts as a third part.
    """

    def parts(counts: sparse.csr_matrix, rows: NDArray[np.intp], rates: FloatArray) -> list[FloatArray]:
        mean = gene_shares(counts)
        mixed = [_shares(rates, mean), mean]
        return [*mixed, _shares(counts[rows].toarray(), mean)] if own else mixed

    def impute(
        train: sparse.csr_matrix, coords: FloatArray, fovs: NDArray[Any] | None, random_state: int
    ) -> Prediction:
        counts = train.astype(np.float32)
        n_cells = counts.shape[0]
        codes = np.zeros(n_cells, np.intp) if fovs is None else np.unique(np.asarray(fovs), return_inverse=True)[1]
        rng = np.random.default_rng(random_state)
        split = thin(counts, 0.8, random_state=rng)
        rows = np.sort(rng.choice(n_cells, size=min(n_cells, _TUNING_CELLS), replace=False))
        held = split.held[rows]
        best: tuple[float, tuple[Any, ...], FloatArray] | None = None
        for setting, rates in family(Cells(split.train, coords, codes), grid, rows, random_state):
            weights, score = best_weights(held, parts(split.train, rows, rates))
            if best is None or score > best[0]:
                best = score, setting, weights
        if best is None:
            raise ValueError(f"{name} has no setting to choose from")
        _, chosen, weights = best
        print(f"{name}: chose {chosen}, weights {np.round(weights, 3).tolist()}", file=sys.stderr)

        everyone = np.arange(n_cells)
        ((_, rates),) = family(Cells(counts, coords, codes), [chosen], everyone, random_state)
        prediction = np.zeros(counts.shape, np.float32)
        for weight, part in zip(weights, parts(counts, everyone, rates)):
            prediction += np.float32(weight) * part
        return prediction, "rate"

    return impute


# -------------------------------------------------------------------------------------------------------------- means


def gene_mean(train: sparse.csr_matrix, coords: FloatArray, fovs: NDArray[Any] | None, random_state: int) -> Prediction:
    """Share of each gene in all counts, the same for every cell."""
    return np.broadcast_to(gene_shares(train).astype(np.float32), train.shape).copy(), "rate"


def _fov_means(
    cells: Cells, grid: list[tuple[Any, ...]], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[tuple[Any, ...], FloatArray]]:
    """Share of each gene in all counts of the cell's field of view."""
    n_cells = len(cells.fovs)
    member = sparse.csr_matrix((np.ones(n_cells, np.float32), (cells.fovs, np.arange(n_cells))))
    yield grid[0], (member @ cells.counts).toarray()[cells.fovs[rows]]


# --------------------------------------------------------------------------------------------------------- neighbours


def _normalised(counts: sparse.csr_matrix, target_sum: float) -> sparse.csr_matrix:
    library = np.asarray(counts.sum(axis=1)).ravel()
    return sparse.diags_array(target_sum / np.maximum(library, 1)).astype(np.float32) @ counts


def _averages(
    counts: sparse.csr_matrix, neighbours: NDArray[np.intp], settings: list[tuple[int, str]]
) -> Iterator[tuple[tuple[int, str], FloatArray]]:
    """Average over the first neighbours of each cell.

    Parameters
    ----------
    counts
        Counts, cells × genes.
    neighbours
        Neighbours of each query, nearest first, −1 where there are no more; queries × neighbours.
    settings
        Number of neighbours, and what is averaged: ``"profiles"`` (counts / library size, every neighbour alike) or
        ``"counts"`` (the neighbours' counts added up, so that deeper cells weigh more).
    """
    for k, what in settings:
        source = counts if what == "counts" else _normalised(counts, 1.0)
        first = neighbours[:, :k]
        present = first >= 0
        indptr = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
        weights = sparse.csr_matrix(
            (np.ones(indptr[-1], np.float32), first[present], indptr), shape=(len(first), counts.shape[0])
        )
        yield (k, what), weights @ source.toarray()


def _spatial_means(
    cells: Cells, grid: list[tuple[Any, ...]], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[tuple[Any, ...], FloatArray]]:
    """Mean over the k cells nearest in space within the field of view, the cell itself included."""
    largest = max(k for k, _ in grid)
    neighbours = np.full((len(cells.fovs), largest), -1, dtype=np.intp)
    for fov in np.unique(cells.fovs):
        members = np.flatnonzero(cells.fovs == fov)
        k = min(largest, len(members))
        _, found = cKDTree(cells.coords[members]).query(cells.coords[members], k=range(1, k + 1))
        neighbours[members, :k] = members[found]
    yield from _averages(cells.counts, neighbours[rows], grid)


def _expression_means(
    cells: Cells, grid: list[tuple[Any, ...]], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[tuple[Any, ...], FloatArray]]:
    """Mean over the k cells nearest in principal components of log-normalised counts, the cell itself included."""
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    library = np.asarray(cells.counts.sum(axis=1)).ravel()
    logged = _normalised(cells.counts, float(np.median(library))).log1p()
    most = min(max(n for n, _, _ in grid), min(logged.shape) - 1)
    components = PCA(most, svd_solver="arpack", random_state=random_state).fit_transform(logged).astype(np.float32)
    for n_components in sorted({n for n, _, _ in grid}):
        settings = [(k, what) for n, k, what in grid if n == n_components]
        space = components[:, :n_components]
        k = min(max(k for k, _ in settings), len(space))
        neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(space).kneighbors(space[rows])[1]
        for setting, rates in _averages(cells.counts, neighbours, settings):
            yield (n_components, *setting), rates


# ----------------------------------------------------------------------------------------------------- factorisations


def _truncated_svds(
    cells: Cells, grid: list[tuple[Any, ...]], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[tuple[Any, ...], FloatArray]]:
    """Low-rank approximation of scaled counts, taken back to rates, negative rates set to zero.

    ``"depth"`` scales counts by the library size; ``"poisson"`` by the square root of library size × gene share, which
    gives all entries unit variance under a Poisson gene-mean model (as in correspondence analysis).
    """
    library = np.maximum(np.asarray(cells.counts.sum(axis=1)).ravel(), 1)
    spread = np.sqrt(np.maximum(gene_shares(cells.counts), 1e-12))
    rng = np.random.default_rng(random_state)
    for scaling in sorted({scaling for scaling, _ in grid}):
        by_cell, by_gene = (np.sqrt(library), spread) if scaling == "poisson" else (library, np.ones_like(spread))
        scaled = sparse.diags_array(1 / by_cell) @ cells.counts.astype(np.float64) @ sparse.diags_array(1 / by_gene)
        ranks = [rank for name, rank in grid if name == scaling]
        largest = min(max(ranks), min(scaled.shape) - 1)
        u, s, vt = svds(scaled, k=largest, v0=rng.standard_normal(min(scaled.shape)))
        order = np.argsort(-s)
        left, right = (u * s)[rows][:, order].astype(np.float32), vt[order].astype(np.float32)
        for rank in ranks:
            yield (scaling, rank), np.maximum(left[:, :rank] @ right[:rank], 0) * by_gene.astype(np.float32)


def kl_nmf_updates(counts: sparse.csr_matrix, w: FloatArray, h: FloatArray, n_iter: int) -> None:
    r"""Multiplicative updates of a non-negative factorisation under Kullback-Leibler divergence, in place.

    Lee and Seung (2001), "Algorithms for non-negative matrix factorization", theorem 2: with
    :math:`R = X / (WH)`, first :math:`W \leftarrow W \cdot R H^\top / \sum_g H_{kg}`, then
    :math:`H \leftarrow H \cdot W^\top R / \sum_i W_{ik}`.
    :math:`R` is needed where counts are not zero only, and :math:`WH` is formed for a block of cells at a time, so that
    no dense cells × genes matrix is held. Factors below 1e-15 become zero: they are on their way there, and denormal
    numbers would slow the products down many times.

    Parameters
    ----------
    counts
        Counts, CSR, cells × genes.
    w, h
        Factors, cells × rank and rank × genes, floating point; changed.
    n_iter
        Number of updates of both factors.
    """
    tiny = _NEGLIGIBLE**2
    n_cells, n_genes = counts.shape
    blocks = []
    for start in range(0, n_cells, _BLOCK_ROWS):
        x = counts[start : start + _BLOCK_ROWS].astype(w.dtype)
        flat = np.repeat(np.arange(x.shape[0]) * n_genes, np.diff(x.indptr)) + x.indices
        blocks.append((slice(start, start + x.shape[0]), x.data, flat))

    for _ in range(n_iter):
        numerator = np.zeros_like(h)
        per_component = np.maximum(h.sum(axis=1), tiny)
        for rows, x, flat in blocks:
            part = w[rows]
            ratio = np.zeros((len(part), n_genes), w.dtype)
            ratio.ravel()[flat] = x / np.maximum((part @ h).ravel()[flat], tiny)
            part *= (ratio @ h.T) / per_component
            part[part < _NEGLIGIBLE] = 0
            ratio.ravel()[flat] = x / np.maximum((part @ h).ravel()[flat], tiny)
            numerator += part.T @ ratio
        h *= numerator / np.maximum(w.sum(axis=0), tiny)[:, None]
        h[h < _NEGLIGIBLE] = 0


def _kl_nmfs(
    cells: Cells, grid: list[tuple[Any, ...]], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[tuple[Any, ...], FloatArray]]:
    """Non-negative factorisation of the counts under Kullback-Leibler divergence, stopped after some updates."""
    counts = cells.counts
    for rank in sorted({rank for rank, _ in grid}):
        rng = np.random.default_rng(random_state)
        scale = np.sqrt(counts.mean() / rank)
        w = (scale * np.abs(rng.standard_normal((counts.shape[0], rank)))).astype(np.float32)
        h = (scale * np.abs(rng.standard_normal((rank, counts.shape[1])))).astype(np.float32)
        done = 0
        for n_iter in sorted(n for r, n in grid if r == rank):
            kl_nmf_updates(counts, w, h, n_iter - done)
            done = n_iter
            yield (rank, n_iter), w[rows] @ h


# ---------------------------------------------------------------------------------------------------------- spaformer


def spaformer(
    train: sparse.csr_matrix, coords: FloatArray, fovs: NDArray[Any] | None, random_state: int, **choices: Any
) -> Prediction:
    """`spaformer_sc.tl.impute` with its defaults, or with `choices`."""
    import anndata as ad
    import pandas as pd

    import spaformer_sc as sf

    obs = pd.DataFrame(index=pd.RangeIndex(train.shape[0]).astype(str))
    if fovs is not None:
        obs["fov"] = pd.Categorical(np.asarray(fovs))
    adata = ad.AnnData(train.copy(), obs=obs, obsm={"spatial": np.asarray(coords)})
    sf.tl.impute(
        adata,
        library_key=None if fovs is None else "fov",
        output="rate",
        random_state=random_state,
        progress=False,
        **choices,
    )
    return np.asarray(adata.layers["spaformer"], dtype=np.float32), "rate"


FAMILIES: dict[str, tuple[Family, list[tuple[Any, ...]]]] = {
    "fov_gene_mean": (_fov_means, [()]),
    "spatial_knn_mean": (
        _spatial_means,
        list(product((2, 3, 5, 10, 20, 40, 80, 160, 320), ("profiles", "counts"))),
    ),
    "expression_knn": (
        _expression_means,
        list(product((10, 20, 30, 50, 80, 120), (15, 30, 60, 100, 200, 400), ("profiles", "counts"))),
    ),
    "truncated_svd": (_truncated_svds, list(product(("depth", "poisson"), (5, 10, 15, 20, 30, 40, 60, 80)))),
    "kl_nmf": (_kl_nmfs, list(product((5, 10, 15, 20, 30, 40, 60), (50, 100, 200)))),
}

METHODS: dict[str, Imputer] = {
    "gene_mean": gene_mean,
    **{name: tuned(name, *family) for name, family in FAMILIES.items()},
    **{f"{name}+own": tuned(f"{name}+own", *family, own=True) for name, family in FAMILIES.items()},
    "spaformer": spaformer,
    "spaformer_no_attention": partial(spaformer, encoder="mlp"),
    "spaformer_fast": partial(spaformer, quality="fast"),
    "spaformer_best": partial(spaformer, quality="best"),
}
