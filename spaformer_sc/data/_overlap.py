"""Whether images lie beside each other or on top of each other."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.spatial import cKDTree

#: Nearest neighbours of a cell that are looked at.
_NEIGHBOURS = 6
#: Cells whose neighbours are looked at, spread evenly over the rows.
_LOOKED_AT = 20_000
#: Share of the cells of an image at either end of an axis that lie outside its middle.
_MARGIN = 0.05


class Neighbours:
    """Nearest neighbours of cells within their fields of view, found when first asked for.

    Parameters
    ----------
    coordinates
        Positions, cells × 2 or cells × 3, finite.
    codes
        The field of view of each cell, as a number.
    """

    def __init__(self, coordinates: npt.NDArray[np.float64], codes: npt.NDArray[np.int64]) -> None:
        self._coordinates, self.codes = coordinates, codes

    @cached_property
    def _pairs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Cells that are looked at, and their neighbours."""
        extent = np.ptp(self._coordinates, axis=0).max()
        # Fields are taken apart along an axis of their own.
        points = np.column_stack([self._coordinates, self.codes * (4 * extent + 1)])
        rows = np.unique(np.linspace(0, len(points) - 1, min(len(points), _LOOKED_AT)).astype(np.int64))
        found = cKDTree(points).query(points[rows], k=min(_NEIGHBOURS + 1, len(points)))[1].reshape(len(rows), -1)
        first, second = np.repeat(rows, found.shape[1]), found.ravel().astype(np.int64)
        same = (first != second) & (self.codes[first] == self.codes[second])
        return first[same], second[same]

    def overlaid(self, images: npt.NDArray[Any]) -> float:
        """How much the images of a field lie on top of each other.

        What is :meth:`mixed`, of what it would be if neighbours were drawn at random from the field: 0 where images
        adjoin, however few cells they have, and about 0.8 where they lie on top of each other in a plane.

        Parameters
        ----------
        images
            The image of each cell (cells,), as a number.
        """
        mixed, at_random = self._shares(images)
        return mixed / at_random if mixed else 0.0

    def mixed(self, images: npt.NDArray[Any]) -> float:
        """Share of the neighbours that are of another image, in a place that both images cover.

        An image covers its middle, the box between the 5 % and the 95 % quantile of its cells on each axis; a pair of
        neighbours counts where each lies in the middle of the other's image.
        """
        return self._shares(images)[0]

    def _shares(self, images: npt.NDArray[Any]) -> tuple[float, float]:
        """Share of the neighbours that are `mixed`, and that of another image were they drawn at random."""
        _, image = np.unique(images, return_inverse=True)
        # Parts of images, each in one field.
        _, first_of, number = np.unique(self.codes * (image.max() + 1) + image, return_index=True, return_inverse=True)
        if len(first_of) == len(np.unique(self.codes)):
            return 0.0, 0.0
        by_image = pd.DataFrame(self._coordinates).groupby(number)
        low, high = (by_image.quantile(share).to_numpy() for share in (_MARGIN, 1 - _MARGIN))
        first, second = self._pairs

        def covers(cells: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
            places, image = self._coordinates[cells], number[others]
            return np.asarray(((places >= low[image]) & (places <= high[image])).all(axis=1))

        mixed = (number[first] != number[second]) & covers(first, second) & covers(second, first)
        same = np.bincount(number) / np.bincount(self.codes)[self.codes[first_of]]
        return float(mixed.mean()) if len(mixed) else 0.0, float(1 - same[number].mean())
