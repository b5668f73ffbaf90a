"""Spatial graphs: which cells are neighbours.

A graph is a symmetric sparse matrix of cells × cells without self-loops. It is made of one field of view at a time.
"""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.spatial import QhullError

from spaformer_sc._cache import remembered
from spaformer_sc._checks import check_choice, check_graph, check_integer, check_positive
from spaformer_sc._logging import logger

#: Neighbours whose distance is the local scale that long edges of a triangulation are compared with.
_SCALE_NEIGHBORS = 6
#: Edges of a triangulation that are longer than this many local scales are dropped.
_LONGEST_EDGE = 3.0


def spatial_graph(
    coordinates: npt.NDArray[Any],
    *,
    method: Literal["knn", "delaunay", "radius"] = "knn",
    n_neighbors: int = 6,
    radius: float | None = None,
) -> sparse.csr_matrix:
    """Build the graph of neighbouring cells in one field of view, with squidpy.

    squidpy's nearest neighbours are directed; here two cells are joined as soon as one is among the neighbours of the
    other.

    A Delaunay triangulation fills the convex hull of the cells and so joins cells along the border, and across holes
    and gaps in the tissue, that are far apart. Such edges are dropped: those longer than 3 times the distance to the
    sixth nearest neighbour, at whichever end that distance is larger. The limit follows the local density, so that
    sparse tissue next to dense tissue stays connected, and no cell loses its nearest neighbour. Beside an edge this
    long lies a circle without cells in which at least 13 would be expected if cells were scattered evenly, so inner
    edges of even tissue are practically never lost. Cells that a triangulation leaves out because another lies in the
    same place are joined to their nearest neighbours.

    Parameters
    ----------
    coordinates
        Positions, n × 2 or n × 3, finite, in any unit.
    method
        ``"knn"`` joins every cell to its nearest neighbours, ``"radius"`` to all cells within a distance,
        ``"delaunay"`` to its neighbours in the Delaunay triangulation. Where cells cannot be triangulated (all on one
        line, for instance), nearest neighbours are used and a warning is logged.
    n_neighbors
        Number of nearest neighbours, for ``"knn"``; n − 1 where there are fewer cells.
    radius
        Largest distance, in the unit of the coordinates, for ``"radius"``.

    Returns
    -------
    csr_matrix, n × n, float32
        1 for every edge; symmetric, without diagonal, indices sorted.

    Raises
    ------
    TypeError
        If `n_neighbors` or `radius` is not a number of the right kind.
    ValueError
        If `method` is unknown, `n_neighbors` is below 1, or `radius` is missing, not positive, or given for another
        method.
    """
    check_choice("method", method, ("knn", "delaunay", "radius"))
    n_neighbors = check_integer("n_neighbors", n_neighbors)
    if method == "radius":
        if radius is None:
            raise ValueError("`radius=None`: method='radius' needs a distance, in the unit of the coordinates.")
        radius = check_positive("radius", radius)
    elif radius is not None:
        raise ValueError(f"`radius={radius!r}` is only used by method='radius', not by method={method!r}.")

    points = np.asarray(coordinates, dtype=np.float64)
    n = len(points)
    if n < 2:
        return sparse.csr_matrix((n, n), dtype=np.float32)
    points = points - (points.min(axis=0) + points.max(axis=0)) / 2
    graph, is_triangulated = remembered(_graph, points, method, n_neighbors, radius)
    if method == "delaunay" and not is_triangulated:
        logger.warning(
            "%d cells on one line or in one place have no Delaunay triangulation: they are joined to their %d nearest "
            "neighbours.",
            n,
            min(_SCALE_NEIGHBORS, n - 1),
        )
    return graph


def _graph(
    points: npt.NDArray[np.float64], method: str, n_neighbors: int, radius: float | None
) -> tuple[sparse.csr_matrix, bool]:
    """Graph of two or more cells, and whether it is a triangulation."""
    is_triangulated = False
    if method == "knn":
        graph = _nearest(points, n_neighbors)[0]
    elif method == "radius":
        graph = _squidpy("spatial_neighbors_radius", points, radius=radius)[0]
    else:
        graph, is_triangulated = _delaunay(points)
    return _symmetric(graph), is_triangulated


def _nearest(points: npt.NDArray[np.float64], n_neighbors: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Directed graph and distances of the nearest neighbours, of n − 1 where that is fewer."""
    return _squidpy("spatial_neighbors_knn", points, n_neighs=min(n_neighbors, len(points) - 1))


def _delaunay(points: npt.NDArray[np.float64]) -> tuple[sparse.csr_matrix, bool]:
    """Delaunay graph without its overlong edges, and True; nearest neighbours, False, without a triangulation."""
    n = len(points)
    nearest, distances = _nearest(points, _SCALE_NEIGHBORS)
    axes = np.ptp(points, axis=0) > 0
    if n <= axes.sum() + 1:
        return nearest, True  # a single simplex: all cells are joined
    triangulated = _triangulate(points[:, axes])
    if triangulated is None:
        return nearest, False
    row, column = triangulated.row, triangulated.col
    scale = distances.max(axis=1).toarray().ravel()
    length = np.linalg.norm(points[row] - points[column], axis=1)
    kept = length <= _LONGEST_EDGE * np.maximum(scale[row], scale[column])
    left_out = np.ones(n, dtype=bool)
    left_out[row] = False
    graph = sparse.csr_matrix((np.ones(kept.sum(), np.float32), (row[kept], column[kept])), shape=(n, n))
    return graph + sparse.diags(left_out.astype(np.float32)) @ nearest, True


def _triangulate(points: npt.NDArray[np.float64]) -> sparse.coo_matrix | None:
    """Delaunay graph; None if the points do not span all axes, or there is but one axis."""
    if points.shape[1] < 2:
        return None
    try:
        return sparse.coo_matrix(_squidpy("spatial_neighbors_delaunay", points)[0])
    except QhullError:
        return None


def _squidpy(function: str, points: npt.NDArray[np.float64], **arguments: Any) -> tuple[Any, Any]:
    """Call one of squidpy's graph functions on an AnnData that holds nothing but the points."""
    with _quiet():
        state = None if "squidpy" in sys.modules else random.getstate()
        import squidpy
        from anndata import AnnData

        if state is not None:
            random.setstate(state)  # rich, which is loaded with squidpy, takes a number
        result = getattr(squidpy.gr, function)(AnnData(obsm={"spatial": points}), copy=True, **arguments)
    return result.connectivities, result.distances


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back warnings that squidpy and what it imports raise about themselves, and its line for every graph."""
    squidpy_logger = logging.getLogger("spatialdata._logging")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        squidpy_logger.addFilter(_above_info)
        try:
            yield
        finally:
            squidpy_logger.removeFilter(_above_info)


def _above_info(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO


def _symmetric(graph: Any) -> sparse.csr_matrix:
    """Join both directions of every edge, all with weight 1, and drop the diagonal."""
    both = sparse.coo_matrix(graph.maximum(graph.T))
    edge = (both.row != both.col) & (both.data != 0)
    result = sparse.csr_matrix((np.ones(edge.sum(), np.float32), (both.row[edge], both.col[edge])), shape=both.shape)
    result.sort_indices()
    return result


def given_graph(connectivities: Any, codes: npt.NDArray[np.int64]) -> sparse.csr_matrix:
    """Make the user's own graph one that the model can use.

    Weights are kept. Of two directions of an edge the larger weight counts; self-loops and edges between cells of
    different fields of view are dropped, the latter with a logged warning.

    Parameters
    ----------
    connectivities
        Weights of edges, n × n, at least zero, sparse or dense. Not changed.
    codes
        The field of view of every cell, as numbers.

    Returns
    -------
    csr_matrix, n × n, float32
        Symmetric, without diagonal and explicit zeros, indices sorted.

    Raises
    ------
    TypeError
        If `connectivities` does not hold numbers.
    ValueError
        If its shape is not n × n, or a weight is negative, NaN or infinite.
    """
    weights = check_graph(connectivities, len(codes))
    both = sparse.coo_matrix(weights.maximum(weights.T))
    across = codes[both.row] != codes[both.col]
    if across.any():
        logger.warning(
            "%d edges of the given graph join cells of different fields of view: they are left out.", across.sum() // 2
        )
    kept = ~across & (both.row != both.col)
    graph = sparse.csr_matrix((both.data[kept], (both.row[kept], both.col[kept])), shape=both.shape)
    graph.sort_indices()
    return graph


def typical_distance(coordinates: npt.NDArray[Any], graph: sparse.csr_matrix) -> float:
    """Median length of the edges of a graph, the unit of positional encodings.

    Edges of length zero (cells in the same place) do not count. Without an edge of positive length the result is 1.

    Parameters
    ----------
    coordinates
        Positions, n × 2 or n × 3.
    graph
        Symmetric graph over them, n × n.

    Returns
    -------
    float
        In the unit of the coordinates, above zero.
    """
    points = np.asarray(coordinates, dtype=np.float64)
    edges = sparse.triu(graph, k=1, format="coo")
    length = np.linalg.norm(points[edges.row] - points[edges.col], axis=1)
    length = length[length > 0]
    return float(np.median(length)) if length.size else 1.0


def n_components(graph: sparse.csr_matrix) -> int:
    """Number of connected components; a cell without neighbours is one."""
    return int(connected_components(graph, directed=False, return_labels=False))
