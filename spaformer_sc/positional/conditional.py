"""Encodings that depend on the expression of neighbours: a small graph network on the tokens themselves.

References
----------
Brody et al. 2022, "How Attentive are Graph Attention Networks?", ICLR, arXiv 2105.14491.
Chu et al. 2021, "Conditional Positional Encodings for Vision Transformers", arXiv 2102.10882.
Wen et al. 2023, "Single Cells Are Spatial Tokens", arXiv 2302.03038.
Xu et al. 2019, "How Powerful are Graph Neural Networks?", ICLR, arXiv 1810.00826.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spaformer_sc._geometric import Data, GATv2Conv, GINConv
from spaformer_sc.positional._base import PositionalEncoding

N_LAYERS = 2
"""Layers, and so steps on the graph between a cell and the farthest cell that its encoding depends on."""
N_HEADS = 4
"""Attention heads of `ConditionalGATEncoding`."""


class _GraphNetworkEncoding(PositionalEncoding):
    r"""Graph network on the tokens before any encoding.

    Chu et al. 2021 (Section 3.3) let a token's encoding depend on the tokens next to it, by a convolution over the
    image; here cells lie on no grid, and the spatial graph takes the convolution's place (Wen et al. 2023, Section 3).
    From :math:`h^{(0)} = LN(x)` for the tokens x,

    .. math:: h^{(l)} = ReLU(LN(f^{(l)}(h^{(l - 1)}, G))), \quad e = W h^{(L)} + b

    for `N_LAYERS` layers f of the subclass over the graph G. LN normalises each token by itself. It depends on what is
    visible of a cell and of those within `N_LAYERS` steps, and on nothing else. A cell without neighbours is encoded
    from its own token. There is nothing to compute before training.

    Parameters
    ----------
    dim
        Width of the tokens and of the encoding.
    """

    feature_names = ()
    needs_tokens = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(self.layer(dim) for _ in range(N_LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(N_LAYERS))
        self.linear = nn.Linear(dim, dim)

    @staticmethod
    @abstractmethod
    def layer(dim: int) -> nn.Module:
        """Build a layer: tokens ``(N, dim)`` and edges ``(2, E)`` in, ``(N, dim)`` out."""

    def features(self, data: Data) -> dict[str, Tensor]:
        return {}

    def forward(
        self,
        features: dict[str, Tensor],
        edge_index: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        lengths: Sequence[int] | None = None,
        token_features: Tensor | None = None,
    ) -> Tensor:
        if edge_index is None or token_features is None:
            missing = "edge_index" if edge_index is None else "token_features"
            raise ValueError(
                f"`{missing}` is None, but a conditional encoding needs tokens, shape (N, dim), and the edges between "
                "them, shape (2, E)."
            )
        h = self.norm(token_features)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = norm(layer(h, edge_index)).relu()
        encoding: Tensor = self.linear(h)
        return encoding


class ConditionalEncoding(_GraphNetworkEncoding):
    r"""Graph isomorphism network on the tokens (GIN: Xu et al. 2019, eq. 4.1).

    .. math:: f(h)_i = MLP\Big((1 + \epsilon) h_i + \sum_{j \in N(i)} h_j\Big)

    with a learned ε that starts at 0 and a perceptron of one hidden layer. It sums over neighbours N(i), so that their
    number counts.

    Parameters
    ----------
    dim
        Width of the tokens and of the encoding.
    """

    name = "conditional"

    @staticmethod
    def layer(dim: int) -> nn.Module:
        perceptron = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        convolution: nn.Module = GINConv(perceptron, train_eps=True)
        return convolution


class _GAT(nn.Module):
    """GATv2 layer of any width: heads as wide as needed, mapped back by a linear layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = -(-dim // N_HEADS)
        self.attention = GATv2Conv(dim, width, heads=N_HEADS)
        self.linear = nn.Linear(N_HEADS * width, dim)

    def forward(self, h: Tensor, edge_index: Tensor) -> Tensor:
        mapped: Tensor = self.linear(self.attention(h, edge_index))
        return mapped


class ConditionalGATEncoding(_GraphNetworkEncoding):
    r"""Graph attention network on the tokens (GATv2: Brody et al. 2022, eqs. 3 and 7).

    For each of `N_HEADS` heads, whose results are concatenated and mapped by a linear layer,

    .. math:: f(h)_i = \sum_{j \in N(i) \cup \{i\}} \alpha_{ij} V h_j, \quad
        \alpha_{ij} = softmax_j\big(a \cdot LeakyReLU(U h_i + V h_j)\big)

    It averages over the cell and its neighbours N(i), so that their number does not count.

    Parameters
    ----------
    dim
        Width of the tokens and of the encoding.
    """

    name = "conditional_gat"

    @staticmethod
    def layer(dim: int) -> nn.Module:
        return _GAT(dim)
