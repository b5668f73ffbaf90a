"""Landing probabilities of random walks on the spatial graph.

References
----------
Dwivedi et al. 2022, "Graph Neural Networks with Learnable Structural and Positional Representations", ICLR,
arXiv 2110.07875.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from spaformer_sc._cache import remembered
from spaformer_sc._geometric import Data
from spaformer_sc.positional._base import PositionalEncoding

_ROWS = 4096
"""Rows of matrix powers that are held at once."""
SCALE = 15.0
"""Landing probabilities times this are of order 1: on graphs of about 6 neighbours, with k = 10, their root mean square
is between 0.057 and 0.071 (nearest neighbours, Delaunay, radius; cells scattered or in rows)."""


def landing_probabilities(edge_index: Tensor, num_nodes: int, k: int, edge_weight: Tensor | None = None) -> Tensor:
    r"""Probabilities that a random walk is back where it began after 1, …, k steps.

    .. math:: (P_{ii}, (P^2)_{ii}, \dots, (P^k)_{ii}), \quad P = D^{-1} A

    (Dwivedi et al. 2022, eq. 2; the paper's :math:`A D^{-1}` has the same diagonals.) They are also those of the
    symmetric :math:`S = D^{-1/2} A D^{-1/2}`, and :math:`(S^{a+b})_{ii} = \sum_j (S^a)_{ij} (S^b)_{ij}`, so that no
    power beyond ⌈k/2⌉ is formed and each row is computed by itself: exact, at the cost of the cells within ⌈k/2⌉ steps
    of each cell. The first probability is 0 on a graph without self-loops, as those of fields of view are.

    Parameters
    ----------
    edge_index
        Edges, ``(2, E)`` int64, every edge in both directions.
    num_nodes
        Number n of cells.
    k
        Number of steps.
    edge_weight
        Positive weights, ``(E,)``, the same in both directions; None for 1.

    Returns
    -------
    Probabilities, ``(n, k)`` float32; 0 for a cell without neighbours.

    Raises
    ------
    ValueError
        If `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"`k={k}` must be at least 1: the number of steps.")
    source, target = edge_index.cpu().numpy()
    weight = np.ones(len(source)) if edge_weight is None else edge_weight.cpu().numpy().astype(np.float64)
    adjacency = sparse.csr_array((weight, (source, target)), shape=(num_nodes, num_nodes))
    degree = adjacency.sum(axis=1)
    root = sparse.diags_array(1 / np.sqrt(np.where(degree > 0, degree, 1)))
    walk = (root @ adjacency @ root).tocsr()
    start = sparse.eye_array(num_nodes, format="csr")
    result = np.zeros((num_nodes, k), dtype=np.float32)
    for begin in range(0, num_nodes, _ROWS):
        block = slice(begin, begin + _ROWS)
        power = start[block]
        for step in range(1, k + 1):
            previous = power
            if step % 2:
                power = power @ walk
            result[block, step - 1] = (power * previous).sum(axis=1)
    return torch.from_numpy(result)


class RandomWalkEncoding(PositionalEncoding):
    """Linear map of `SCALE` times the landing probabilities of a random walk on the spatial graph.

    See `landing_probabilities`. It tells how densely a cell's surroundings are joined, not where the cell lies. A cell
    without neighbours is encoded as 0.

    Parameters
    ----------
    dim
        Width of the encoding.
    k
        Number of steps.
    """

    name = "random_walk"
    feature_names = ("landing_probabilities",)
    options = ("k",)
    reads_components = True

    def __init__(self, dim: int, *, k: int = 10) -> None:
        super().__init__(dim)
        self.k = k
        self.linear = nn.Linear(k, dim, bias=False)

    def features(self, data: Data) -> dict[str, Tensor]:
        found = remembered(landing_probabilities, data.edge_index, data.num_nodes, self.k, data.edge_weight)
        return {"landing_probabilities": found}

    def forward(
        self,
        features: dict[str, Tensor],
        edge_index: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        lengths: Sequence[int] | None = None,
        token_features: Tensor | None = None,
    ) -> Tensor:
        encoding: Tensor = self.linear(SCALE * features["landing_probabilities"])
        return encoding
