"""Means over the cells nearest in expression, or in expression and surroundings together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, product

import numpy as np
from numpy.typing import NDArray

from peers._cells import Cells, FloatArray, top_eigenvectors
from peers._tuning import Setting, Tuned

_SURROUNDINGS = 10


def principal_components(values: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Return the scores of the first `n` principal components of centred values, cells × n."""
    return values @ top_eigenvectors(values.T @ values, n)


def _neighbour_means(
    cells: Cells, grid: list[Setting], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[Setting, FloatArray]]:
    """Mean over the k cells nearest in a space of principal components, the cell itself included.

    Settings are ``(components, weight, k, what)``. The space is that of the log-normalised profiles and, multiplied by
    the weight, that of the mean log-normalised profiles of the ten cells nearest in space; as many components of each.
    """
    from sklearn.neighbors import NearestNeighbors

    most = max(n for n, *_ in grid)
    own = principal_components(cells.centred, most)
    spaces = [own]
    if any(weight for _, weight, *_ in grid):
        around = cells.around(_SURROUNDINGS)
        spaces.append(principal_components(around - around.mean(axis=0), most))
    for (n, weight), settings in groupby(sorted(grid), key=lambda setting: setting[:2]):
        pairs = [(k, what) for _, _, k, what in settings]
        space = np.hstack([own[:, :n], weight * spaces[1][:, :n]]) if weight else own[:, :n]
        k = min(max(k for k, _ in pairs), len(space))
        space = space.astype(np.float32)
        neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(space).kneighbors(space[rows])[1]
        whats = tuple(dict.fromkeys(what for _, what in pairs))
        for k, what, mean in cells.neighbour_averages(neighbours, [k for k, _ in pairs], whats):
            yield (n, weight, k, what), mean


_OWN = list(product((10, 20, 30, 50, 80, 120), (0.0,), (15, 30, 60, 100, 200, 400)))
_JOINT = list(product((20, 50), (0.5, 1.0, 2.0), (15, 30, 60, 100, 200, 400)))

expression_knn = Tuned(
    "expression_knn",
    _neighbour_means,
    rate=[(*setting, what) for setting, what in product(_OWN, ("profiles", "counts"))],
    lognorm=[(*setting, "lognorm") for setting in _OWN],
)
joint_knn = Tuned(
    "joint_knn",
    _neighbour_means,
    rate=[(*setting, what) for setting, what in product(_JOINT, ("profiles", "counts"))],
    lognorm=[(*setting, "lognorm") for setting in _JOINT],
)
