"""SignNet: a learned encoding of Laplacian eigenvectors that does not depend on their signs.

References
----------
Lim et al. 2022, "Sign and Basis Invariant Networks for Spectral Graph Representation Learning", arXiv 2202.13013.
Xu et al. 2019, "How Powerful are Graph Neural Networks?", ICLR, arXiv 1810.00826.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spaformer_sc._geometric import Data, GINConv
from spaformer_sc.positional._base import PositionalEncoding
from spaformer_sc.positional.laplacian import LAPLACIAN_FEATURES, laplacian_features


class _GIN(GINConv):  # type: ignore[misc]
    """GIN layer (Xu et al. 2019, eq. 4.1) on ``(n, channels, width)``: neighbours are summed by one sparse product."""

    def message_and_aggregate(self, adj_t: Tensor, x: tuple[Tensor, Tensor]) -> Tensor:
        summed: Tensor = torch.sparse.mm(adj_t, x[0].flatten(1))
        return summed.view_as(x[0])


class SignNetEncoding(PositionalEncoding):
    r"""SignNet on the Laplacian eigenvectors, :math:`\rho([\phi(v_i) + \phi(-v_i)]_{i=1}^k)`.

    φ is a graph isomorphism network shared by all eigenvectors and both signs; its input is the entry of the
    eigenvector and the square root of the eigenvalue, that is the spatial frequency. Sums of φ are set to 0 where a
    component has no i-th eigenvector, concatenated over i and mapped by the perceptron ρ (Lim et al. 2022, Section 2).
    Layers are normalised row by row (LayerNorm), so that a FOV's encoding does not depend on its batch mates.

    Parameters
    ----------
    dim
        Width of the encoding.
    k
        Number of eigenvectors.
    width
        Width of φ for each eigenvector.
    n_layers
        Number of layers of φ.
    """

    name = "signnet"
    needs_graph = True
    feature_names = LAPLACIAN_FEATURES
    options = ("k",)
    reads_components = True

    def __init__(self, dim: int, *, k: int = 10, width: int = 16, n_layers: int = 2) -> None:
        super().__init__(dim)
        self.k = k
        self.phi = nn.ModuleList(
            _GIN(
                nn.Sequential(
                    nn.Linear(2 if layer == 0 else width, width),
                    nn.LayerNorm(width),
                    nn.ReLU(),
                    nn.Linear(width, width),
                ),
                node_dim=0,
            )
            for layer in range(n_layers)
        )
        self.rho = nn.Sequential(nn.LayerNorm(k * width), nn.Linear(k * width, dim), nn.ReLU(), nn.Linear(dim, dim))

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
        if edge_index is None:
            raise ValueError("`edge_index` is None, but SignNet needs the graph; pass its edges, shape (2, E).")
        vectors, values, mask = (features[name] for name in LAPLACIAN_FEATURES)
        with torch.autocast(vectors.device.type, enabled=False):  # sparse products have no half precision
            adjacency = torch.sparse_coo_tensor(
                edge_index.flip(0),
                vectors.new_ones(edge_index.shape[1]),
                (len(vectors), len(vectors)),
                check_invariants=False,
            ).coalesce()
            h = torch.stack([torch.cat([vectors, -vectors], 1), values.sqrt().repeat(1, 2)], dim=2)
            for layer, conv in enumerate(self.phi):
                h = conv(h.relu() if layer else h, adjacency)
        h = (h[:, : self.k] + h[:, self.k :]) * mask.unsqueeze(-1)
        encoding: Tensor = self.rho(h.flatten(1))
        return encoding
