"""What a positional encoding is, and the sum of several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch_geometric.data import Data


class PositionalEncoding(nn.Module, ABC):
    """Where a cell lies in its field of view (FOV), as a vector that is added to its token.

    An encoding has two stages. `features` is deterministic, has no learned part and is computed once per FOV; callers
    keep its result. `forward` is the learned part.

    To add an encoding, write a subclass in a file of its own and name it in ``positional.POSITIONAL``.

    Parameters
    ----------
    dim
        Width of the encoding.
    k
        Number of features of each cell, for encodings that leave a choice: eigenvectors, steps, frequencies.
    """

    name: ClassVar[str]
    """Name in the registry."""

    feature_names: ClassVar[tuple[str, ...]]
    """Names of the tensors that `features` gives. Encodings with the same names share the tensors."""

    needs_graph: ClassVar[bool] = False
    """Whether `forward` reads `edge_index`, so that its rows must be all cells of each FOV. Otherwise every row is
    encoded by itself, and callers may leave rows out."""

    needs_tokens: ClassVar[bool] = False
    """Whether `forward` reads `token_features`, and `edge_index` as the graph between the tokens."""

    def __init__(self, dim: int, k: int = 10) -> None:
        super().__init__()
        self.dim = dim
        self.k = k

    @abstractmethod
    def features(self, data: Data) -> dict[str, Tensor]:
        """Compute what `forward` needs to know of one FOV.

        Parameters
        ----------
        data
            One FOV: `edge_index` ``(2, E)`` int64, every edge in both directions, `edge_weight` ``(E,)`` or None,
            `pos` ``(n, 2)`` in typical distances between neighbours, `num_nodes` n.

        Returns
        -------
        Tensors of n rows by name.
        """

    @abstractmethod
    def forward(
        self,
        features: dict[str, Tensor],
        edge_index: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        lengths: Sequence[int] | None = None,
        token_features: Tensor | None = None,
    ) -> Tensor:
        """Encode the cells of one FOV or of a batch of FOVs.

        Parameters
        ----------
        features
            Result of `features`; for a batch the rows of the FOVs one after the other. N rows in all.
        edge_index
            Graph, ``(2, E)`` int64; for a batch block-diagonal, so that no edge joins two FOVs. Read if `needs_graph`.
        generator
            Source, on the CPU, of what is random in training. Without it, and in evaluation, nothing is.
        lengths
            Number of rows of each FOV; None for one FOV.
        token_features
            Tokens before the encoding, ``(N, c)``, for encodings that depend on them.

        Returns
        -------
        Encoding of each row, ``(N, dim)``.
        """


class PositionalSum(nn.Module):
    """Sum of positional encodings.

    Parameters
    ----------
    encodings
        One or more encodings of the same width, each name at most once.
    """

    def __init__(self, encodings: Iterable[PositionalEncoding]) -> None:
        super().__init__()
        self.encodings = nn.ModuleDict({encoding.name: encoding for encoding in encodings})

    def __iter__(self) -> Iterator[PositionalEncoding]:
        return cast("Iterator[PositionalEncoding]", iter(self.encodings.values()))

    @property
    def needs_graph(self) -> bool:
        """Whether any of the encodings needs the graph of whole FOVs."""
        return any(encoding.needs_graph for encoding in self)

    @property
    def needs_tokens(self) -> bool:
        """Whether any of the encodings needs the tokens and the graph between them."""
        return any(encoding.needs_tokens for encoding in self)

    def features(self, data: Data) -> dict[str, Tensor]:
        """Compute the features of all encodings for one FOV, once for those that share them."""
        merged: dict[str, Tensor] = {}
        for encoding in self:
            if not set(encoding.feature_names) <= merged.keys():
                merged.update(encoding.features(data))
        return merged

    def forward(
        self,
        features: dict[str, Tensor],
        edge_index: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        lengths: Sequence[int] | None = None,
        token_features: Tensor | None = None,
    ) -> Tensor:
        """Add up the encodings; arguments and result as those of `PositionalEncoding.forward`."""
        encoded = [
            encoding(features, edge_index, generator, lengths=lengths, token_features=token_features)
            for encoding in self
        ]
        return torch.stack(encoded).sum(0)
