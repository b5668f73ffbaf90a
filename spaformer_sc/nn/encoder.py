"""The encoder: pre-norm transformer layers over the cells of a field of view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attention import ATTENTION, Attention, PerformerAttention
from .seeding import seeded

ENCODERS = (*ATTENTION, "mlp")

GRAPH_ENCODERS = frozenset({"gat"})
"""Encoders that read the spatial graph between tokens."""


class EncoderLayer(nn.Module):
    """One pre-norm layer: attention between the cells of a FOV, then a feed-forward block per cell.

    ``x = x + Attention(LN(x))``, ``x = x + FFN(LN(x))`` (Xiong et al. 2020, On Layer Normalization in the
    Transformer Architecture). With ``kind="gat"`` the attention is to neighbours in the spatial graph: SpaGAT, the
    baseline of Wen et al. 2023, sec. 4.1. With ``kind="mlp"`` it is left out, so that cells exchange nothing.

    Parameters
    ----------
    dim
        Width of a token.
    n_heads
        Number of attention heads; divides ``dim``.
    kind
        Name in :data:`ENCODERS`.
    feedforward
        Width of the hidden layer of the feed-forward block, as a multiple of ``dim``.
    dropout
        Dropout on the output of both blocks, in training only.
    """

    def __init__(self, dim: int, n_heads: int, *, kind: str, feedforward: int, dropout: float) -> None:
        super().__init__()
        # Attention takes one number of the random state whatever it is, so that the other weights do not depend on it.
        seed = int(torch.randint(2**62, ()))
        with seeded(seed):
            self.attention: Attention | None = None if kind == "mlp" else ATTENTION[kind](dim, n_heads)
            if self.attention is not None:
                # Every layer starts as the one without attention, which then has to earn its place.
                nn.init.zeros_(self.attention.out.weight)
                nn.init.zeros_(self.attention.out.bias)
        self.attention_norm = None if kind == "mlp" else nn.LayerNorm(dim)
        self.feedforward_norm = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(feedforward * dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Sequence[int], edge_index: Tensor | None = None) -> Tensor:
        """Map tokens (N, dim) of FOVs that lie one after the other, ``lengths`` cells each, to (N, dim)."""
        if self.attention is not None and self.attention_norm is not None:
            x = x + self.dropout(self.attention(self.attention_norm(x), lengths, edge_index))
        output: Tensor = x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        return output


class Encoder(nn.Module):
    """A stack of :class:`EncoderLayer` and a final layer norm."""

    def __init__(
        self,
        dim: int,
        n_layers: int,
        n_heads: int,
        *,
        kind: str = "performer",
        feedforward: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(dim, n_heads, kind=kind, feedforward=feedforward, dropout=dropout) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, lengths: Sequence[int], edge_index: Tensor | None = None) -> Tensor:
        """Map tokens (N, dim) to contextual tokens (N, dim).

        Parameters
        ----------
        x
            Tokens (N, dim), one FOV after the other.
        lengths
            Number of tokens of each FOV.
        edge_index
            Graph between the tokens (2, edges), without edges between FOVs; read by :data:`GRAPH_ENCODERS`.

        Raises
        ------
        ValueError
            If ``edge_index`` is None and the encoder reads it.
        """
        for layer in self.layers:
            x = layer(x, lengths, edge_index)
        output: Tensor = self.norm(x)
        return output

    def redraw(self, generator: torch.Generator) -> None:
        """Draw new random features in every layer that has them (Choromanski et al. 2021, sec. 4.2)."""
        for module in self.modules():
            if isinstance(module, PerformerAttention):
                module.redraw(generator)
