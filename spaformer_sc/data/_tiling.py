"""Cutting a large field of view into overlapping windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spaformer_sc._checks import check_integer, check_positive


@dataclass(frozen=True, eq=False)
class Tile:
    """One window of a field of view.

    Parameters
    ----------
    core
        Cells whose own tile this is, sorted. Every cell is in the core of one tile.
    context
        The core and all cells within the margin around its window, sorted.
    weight
        float32 over `context`: the share of this tile in the result of a cell. Over all tiles the shares of a cell
        sum to 1.
    """

    core: npt.NDArray[np.int64]
    context: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]


def tile(coordinates: npt.NDArray[Any], *, tile_size: int = 4000, margin: float) -> list[Tile]:
    r"""Cut a field of view into overlapping windows of about equally many cells.

    The cells are halved along the longer side of their bounding box, then each half again, until no window holds more
    than `tile_size` cells (a k-d tree; Bentley, *Commun. ACM* 18:509, 1975). Where that takes a number of windows that
    is no power of two, the cuts are placed so that the windows stay equal.

    A cut at c divides the weight of a cell at x between its two sides: the lower side gets

    .. math:: s(x) = \min(1, \max(0, \tfrac12 + (c - x) / m))

    and the upper side 1 − s(x), where m is the margin. The weight of a tile is the product over all its cuts, hence the
    weights of a cell sum to 1 over the tiles, change continuously across every cut, and are 1 in the middle of a tile
    and 0 from half a margin beyond its border on. All cells within a full margin are in the context (along each axis),
    so a cell with positive weight has everything within half a margin around itself in the same tile. Results of tiles,
    weighted and summed, have no seam.

    The tiles depend on where cells are, not on their order. Cells in the same place are never separated, so a tile is
    larger than `tile_size` where more cells than that share one place.

    Parameters
    ----------
    coordinates
        Positions, n × 2 or n × 3, finite; of three axes the first two are cut.
    tile_size
        Most cells in the core of a tile. Up to 1.5 times as many cells stay one tile.
    margin
        Width of the overlap on each side of a cut, in the unit of the coordinates; 0 for tiles that do not overlap.

    Returns
    -------
    list of Tile
        At least one, if there is a cell.

    Raises
    ------
    TypeError
        If `tile_size` or `margin` is not a number of the right kind.
    ValueError
        If `tile_size` is below 1, or `margin` negative or not finite.
    """
    tile_size = check_integer("tile_size", tile_size)
    margin = check_positive("margin", margin, allow_zero=True)
    points = np.asarray(coordinates, dtype=np.float64)[:, :2]
    tiles: list[Tile] = []

    def divide(core: npt.NDArray[np.int64], context: npt.NDArray[np.int64], weight: npt.NDArray[np.float64]) -> None:
        cut = _find_cut(points[core], tile_size) if core.size > tile_size else None
        if cut is None:
            tiles.append(Tile(core, context, weight.astype(np.float32)))
            return
        axis, last, first = cut
        middle = last + (first - last) / 2
        below = points[core, axis] <= last
        x = points[context, axis]
        if margin > 0:
            share = np.clip(0.5 + (middle - x) / margin, 0, 1)
            lower, upper = x <= middle + margin, x >= middle - margin
        else:
            lower, upper = x <= last, x >= first
            share = lower.astype(np.float64)
        divide(core[below], context[lower], (weight * share)[lower])
        divide(core[~below], context[upper], (weight * (1 - share))[upper])

    everyone = np.arange(len(points), dtype=np.int64)
    if everyone.size and not is_tiled(everyone.size, tile_size):
        return [Tile(everyone, everyone.copy(), np.ones(everyone.size, dtype=np.float32))]
    if everyone.size:
        divide(everyone, everyone, np.ones(everyone.size))
    return tiles


def is_tiled(n_cells: Any, tile_size: int) -> Any:
    """Whether so many cells (one number or an array) are more than one tile."""
    return 2 * n_cells > 3 * tile_size


def _find_cut(points: npt.NDArray[np.float64], tile_size: int) -> tuple[int, float, float] | None:
    """Find where to cut a window in two.

    Returns
    -------
    The axis and the two neighbouring coordinates on it between which the cut lies; None if all cells share one place.
    """
    axis = int(np.argmax(np.ptp(points, axis=0)))
    x = np.sort(points[:, axis])
    n_tiles = -(-x.size // tile_size)
    wanted = x.size * (n_tiles // 2) // n_tiles
    ends = np.searchsorted(x, x[wanted], side="left"), np.searchsorted(x, x[wanted], side="right")
    possible = [int(end) for end in ends if 0 < end < x.size]
    if not possible:
        return None
    upper = min(possible, key=lambda end: abs(end - wanted))
    return axis, float(x[upper - 1]), float(x[upper])
