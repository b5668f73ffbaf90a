"""A learned vector for every patch of the field of view.

References
----------
Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR,
arXiv 2010.11929.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spaformer_sc._geometric import Data
from spaformer_sc.positional._base import PositionalEncoding
from spaformer_sc.positional.coordinate import positions

BIN_SIZE = 10.0
"""Side of a bin unless chosen, in typical distances between neighbours: about 100 µm where cells are 10 µm apart."""
N_BINS = 33
"""Bins along each axis."""


class PatchEncoding(PositionalEncoding):
    """Learned embedding of the bin of a square grid in which the cell lies (Dosovitskiy et al. 2021, eq. 1).

    The middle bin is centred on the mean of the field of view (FOV), so a bin means the same place relative to the
    centre in every FOV, seen in training or not. There are `N_BINS` × `N_BINS` bins; cells that lie beyond them,
    more than 16.5 bins from the centre along an axis, count to the outermost bins. The vectors start small, as those of
    bins without cells in training remain: there the encoding adds next to nothing.

    Parameters
    ----------
    dim
        Width of the encoding.
    patch_size
        Side of a bin in the unit of the coordinates; None for `BIN_SIZE` typical distances of each FOV.
    """

    name = "patch"
    feature_names = ("patch",)
    options = ("patch_size",)

    def __init__(self, dim: int, *, patch_size: float | None = None) -> None:
        super().__init__(dim)
        self.patch_size = patch_size
        self.embedding = nn.Embedding(N_BINS * N_BINS, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def features(self, data: Data) -> dict[str, Tensor]:
        """Return row (from y) and column (from x) of each cell's bin, ``(n, 2)`` int64 from 0 to `N_BINS` − 1."""
        side = BIN_SIZE if self.patch_size is None else self.patch_size / data.unit
        bins = (positions(data) / side + N_BINS / 2).floor().clamp(0, N_BINS - 1)
        return {"patch": bins.flip(1).long()}

    def forward(
        self,
        features: dict[str, Tensor],
        edge_index: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        lengths: Sequence[int] | None = None,
        token_features: Tensor | None = None,
    ) -> Tensor:
        row, column = features["patch"].unbind(1)
        encoding: Tensor = self.embedding(row * N_BINS + column)
        return encoding
