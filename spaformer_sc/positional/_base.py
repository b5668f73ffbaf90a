"""What a positional encoding is, and several together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from spaformer_sc._geometric import Data

if TYPE_CHECKING:
    from spaformer_sc.nn.network import Positions

QUIET = 0.1
"""How large encodings start when they are concatenated, relative to adding them."""


class PositionalEncoding(nn.Module, ABC):
    """Where a cell lies in its field of view (FOV), as a vector that is combined with its token.

    An encoding has two stages. `features` is deterministic, has no learned part and is computed once per FOV; callers
    keep its result. `forward` is the learned part.

    To add an encoding, write a subclass in a file of its own and name it in ``positional.POSITIONAL``. Further
    arguments of its constructor are keywords with a default, named in `options`.

    Parameters
    ----------
    dim
        Width of the encoding.
    """

    name: ClassVar[str]
    """Name in the registry."""

    feature_names: ClassVar[tuple[str, ...]]
    """Names of the tensors that `features` gives. Encodings with the same names share the tensors."""

    options: ClassVar[tuple[str, ...]] = ()
    """Arguments of `build_positional` that the constructor takes."""

    needs_graph: ClassVar[bool] = False
    """Whether `forward` reads `edge_index`, so that its rows must be all cells of each FOV. Otherwise every row is
    encoded by itself, and callers may leave rows out."""

    needs_tokens: ClassVar[bool] = False
    """Whether `forward` reads `token_features`, and `edge_index` as the graph between the tokens. Its rows are then
    those of a whole batch."""

    reads_components: ClassVar[bool] = False
    """Whether the features of a cell are made of its whole connected component of the graph."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def features(self, data: Data) -> dict[str, Tensor]:
        """Compute what `forward` needs to know of one FOV.

        Parameters
        ----------
        data
            One FOV: `edge_index` ``(2, E)`` int64, every edge in both directions, `edge_weight` ``(E,)`` or None,
            `pos` ``(n, 2)`` in typical distances between neighbours, `unit` the typical distance in the user's unit,
            `num_nodes` n.

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
            Graph, ``(2, E)`` int64; for a batch block-diagonal, so that no edge joins two FOVs. Read if `needs_graph`
            or `needs_tokens`.
        generator
            Source, on the CPU, of what is random in training. Without it, and in evaluation, nothing is.
        lengths
            Number of rows of each FOV; None for one FOV.
        token_features
            Tokens before any encoding, ``(N, dim)``. Read if `needs_tokens`.

        Returns
        -------
        Encoding of each row, ``(N, dim)``.
        """


class CombinedEncodings(nn.Module):
    r"""One or more positional encodings, and how they join the token.

    Added, the result is :math:`x + \sum_i e_i` for the token x and the encodings :math:`e_i`. Concatenated, it is
    :math:`W [x, e_1, e_2, \dots] + b`. W starts as the identity on x and draws from :math:`N(0, s^2 / dim)` elsewhere,
    with s = `QUIET`, and b starts at 0: at first an encoding moves the token by about a tenth of what adding it does.

    Parameters
    ----------
    encodings
        One or more encodings of the same width, each name at most once.
    combine
        ``"add"`` or ``"concat"``.
    """

    def __init__(self, encodings: Iterable[PositionalEncoding], *, combine: str = "add") -> None:
        super().__init__()
        self.encodings = nn.ModuleDict({encoding.name: encoding for encoding in encodings})
        self.mix: nn.Linear | None = None
        if combine == "concat":
            dim = next(iter(self)).dim
            self.mix = nn.Linear(dim * (1 + len(self.encodings)), dim)
            with torch.no_grad():
                nn.init.normal_(self.mix.weight, std=QUIET / dim**0.5)
                nn.init.eye_(self.mix.weight[:, :dim])
                nn.init.zeros_(self.mix.bias)

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

    @property
    def reads_components(self) -> bool:
        """Whether any of the encodings is made of whole connected components."""
        return any(encoding.reads_components for encoding in self)

    def features(self, data: Data) -> dict[str, Tensor]:
        """Compute the features of all encodings for one FOV, once for those that share them."""
        merged: dict[str, Tensor] = {}
        for encoding in self:
            if not set(encoding.feature_names) <= merged.keys():
                merged.update(encoding.features(data))
        return merged

    def forward(
        self,
        tokens: Tensor,
        positions: Sequence[Positions],
        edge_index: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Combine the tokens of a batch with their encodings.

        Parameters
        ----------
        tokens
            Tokens before any encoding, ``(N, dim)``, one FOV after the other.
        positions
            For each FOV what `features` gave, and the graph if `needs_graph`.
        edge_index
            Graph between the tokens, ``(2, E)`` int64, without edges between FOVs. Read if `needs_tokens`.
        generator
            As in `PositionalEncoding.forward`.

        Returns
        -------
        Tokens with their place, ``(N, dim)``.
        """
        encoded = []
        for encoding in self:
            if encoding.needs_tokens:
                encoded.append(encoding({}, edge_index, generator, token_features=tokens))
            else:
                fovs = [(encoding(p.features, p.edge_index, generator), p.rows) for p in positions]
                encoded.append(torch.cat([values if rows is None else values[rows] for values, rows in fovs]))
        if self.mix is None:
            return tokens + torch.stack(encoded).sum(0)
        mixed: Tensor = self.mix(torch.cat([tokens, *encoded], dim=1))
        return mixed
