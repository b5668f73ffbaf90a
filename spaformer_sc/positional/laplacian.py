"""Laplacian eigenvectors of the spatial graph.

References
----------
Belkin & Niyogi 2003, "Laplacian Eigenmaps", Neural Computation 15.
Chung 1997, "Spectral Graph Theory", American Mathematical Society.
Dwivedi & Bresson 2021, "A Generalization of Transformer Networks to Graphs", arXiv 2012.09699.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from spaformer_sc._cache import remembered
from spaformer_sc._geometric import Data
from spaformer_sc.positional._base import PositionalEncoding

LAPLACIAN_FEATURES = ("laplacian_vectors", "laplacian_values", "laplacian_mask")
"""Features of the encodings that build on `laplacian_eigenvectors`: its three results."""

_DENSE = 256
"""Components of up to this many cells are solved densely, which is faster there."""
_SHIFT = -1e-3
"""The shifted Laplacian is positive definite, and the smallest eigenvalues become the largest of its inverse."""


def laplacian_eigenvectors(
    edge_index: Tensor, num_nodes: int, k: int, edge_weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Smoothest non-trivial eigenvectors of the normalised Laplacian of each connected component.

    .. math:: L = I - D^{-1/2} A D^{-1/2}

    (Chung 1997, Section 1.2). In each component the eigenvector of eigenvalue 0 is left out; the following k are kept,
    or as many as there are, and scaled to a mean square of 1 over the component's cells, whatever its size.
    The sign is chosen such that the entry of largest magnitude, the first one if there are several, is positive.
    The result depends on the arguments alone: ARPACK starts from a fixed vector.

    Parameters
    ----------
    edge_index
        Edges, ``(2, E)`` int64; directions and self-loops do not matter.
    num_nodes
        Number n of cells.
    k
        Number of eigenvectors.
    edge_weight
        Positive weights, ``(E,)``; None for 1.

    Returns
    -------
    Eigenvectors, ``(n, k)`` float32, eigenvalues of each cell's component, ``(n, k)`` float32 from 0 to 2, both 0
    where there is none, and where there is one, ``(n, k)`` bool.

    Raises
    ------
    ValueError
        If `k` is below 1 or a weight is not positive and finite.
    """
    if k < 1:
        raise ValueError(f"`k={k}` must be at least 1: the number of eigenvectors.")
    source, target = edge_index.cpu().numpy()
    weight = np.ones(len(source)) if edge_weight is None else edge_weight.cpu().numpy().astype(np.float64)
    if not (np.isfinite(weight) & (weight > 0)).all():
        raise ValueError(
            f"`edge_weight` must be positive and finite, found values from {weight.min()} to {weight.max()}; "
            "leave out edges without weight."
        )
    between = source != target
    adjacency = sparse.csr_array(
        (weight[between], (source[between], target[between])), shape=(num_nodes, num_nodes), dtype=np.float64
    )
    adjacency = adjacency.maximum(adjacency.T)
    degree = adjacency.sum(axis=1)
    root = sparse.diags_array(1 / np.sqrt(np.where(degree > 0, degree, 1)))
    laplacian = sparse.eye_array(num_nodes) - root @ adjacency @ root

    _, labels = connected_components(adjacency, directed=False)
    order = np.argsort(labels, kind="stable")
    laplacian = laplacian.tocsr()[order][:, order].tocsc()
    vectors = np.zeros((num_nodes, k), dtype=np.float32)
    values = np.zeros((num_nodes, k), dtype=np.float32)
    mask = np.zeros((num_nodes, k), dtype=bool)
    end = 0
    for size in np.bincount(labels):
        begin, end = end, end + size
        count = min(k, size - 1)
        if count:
            cells = order[begin:end]
            values[cells, :count], vectors[cells, :count] = _smoothest(laplacian[begin:end, begin:end], count)
            mask[cells, :count] = True
    return torch.from_numpy(vectors), torch.from_numpy(values), torch.from_numpy(mask)


def _smoothest(laplacian: sparse.csc_array, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues 1 … `count` of a connected component, ascending from the trivial 0, and their eigenvectors."""
    size = laplacian.shape[0]
    if size <= max(_DENSE, 4 * count):
        values, vectors = scipy.linalg.eigh(laplacian.toarray(), subset_by_index=[1, count])
    else:
        start = np.random.default_rng(0).standard_normal(size)
        values, vectors = eigsh(laplacian, k=count + 1, sigma=_SHIFT, v0=start)
        ascending = np.argsort(values, kind="stable")[1:]
        values, vectors = values[ascending], vectors[:, ascending]
    magnitude = np.abs(vectors)
    largest = np.argmax(magnitude >= (1 - 1e-6) * magnitude.max(axis=0), axis=0)
    signs = np.sign(vectors[largest, np.arange(count)])
    return values.clip(0, 2), vectors * (signs * np.sqrt(size))


def laplacian_features(data: Data, k: int) -> dict[str, Tensor]:
    """Return the `LAPLACIAN_FEATURES` of one FOV, each ``(n, k)``, see `laplacian_eigenvectors`."""
    results = remembered(laplacian_eigenvectors, data.edge_index, data.num_nodes, k, data.edge_weight)
    return dict(zip(LAPLACIAN_FEATURES, results))


class LaplacianEncoding(PositionalEncoding):
    """Linear map of the Laplacian eigenvectors, whose signs are flipped at random in training.

    The sign of an eigenvector is arbitrary, so a model has to learn not to depend on it: with a generator, training
    multiplies each eigenvector of each FOV by +1 or −1 (Dwivedi & Bresson 2021, Section 2.3). A cell without
    neighbours has no eigenvectors and is encoded as 0.

    Parameters
    ----------
    dim
        Width of the encoding.
    k
        Number of eigenvectors.
    """

    name = "laplacian"
    feature_names = LAPLACIAN_FEATURES
    options = ("k",)
    reads_components = True

    def __init__(self, dim: int, *, k: int = 10) -> None:
        super().__init__(dim)
        self.k = k
        self.linear = nn.Linear(k, dim, bias=False)

    def features(self, data: Data) -> dict[str, Tensor]:
        return laplacian_features(data, self.k)

    def forward(
        self,
        features: dict[str, Tensor],
        edge_index: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        lengths: Sequence[int] | None = None,
        token_features: Tensor | None = None,
    ) -> Tensor:
        vectors = features["laplacian_vectors"]
        if self.training and generator is not None:
            rows = torch.tensor([len(vectors)] if lengths is None else lengths)
            signs = 2 * torch.randint(2, (len(rows), self.k), generator=generator) - 1
            vectors = vectors * signs.repeat_interleave(rows, dim=0).to(vectors)
        encoding: Tensor = self.linear(vectors)
        return encoding
