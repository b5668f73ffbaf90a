"""MAGIC: Markov affinity-based graph imputation of cells, by its authors' package ``magic-impute``.

van Dijk, Sharma, Nainys et al. (2018), "Recovering gene interactions from single-cell data using data diffusion",
Cell 174:716-729.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import groupby, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers._cells import Cells
from peers._tuning import Setting, Tuned

_NEGLIGIBLE = 1e-6


def _operator(roots: NDArray[np.float32], neighbours: int, components: int, random_state: int) -> Any:
    """Diffusion operator of the package, sparse, cells × cells, rows summing to one."""
    with warnings.catch_warnings():
        # Deprecations within the package, and cells of few counts that are equal to each other.
        warnings.simplefilter("ignore")
        try:
            from magic import MAGIC
        except ImportError as error:
            raise ImportError(
                "the method 'magic' needs the package magic-impute: pip install 'spaformer_sc[benchmark]'"
            ) from error
        n_components = min(components, min(roots.shape) - 1)
        return MAGIC(knn=neighbours, n_pca=n_components, random_state=random_state, verbose=0).fit(roots).diff_op


def _diffusions(
    cells: Cells, grid: list[Setting], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[Setting, NDArray[np.float32]]]:
    """Values after t steps of diffusion; settings are ``(neighbours, components, what, t)``.

    The graph is that of square roots of depth-normalised counts, which the authors recommend. Diffused are
    ``"root"``, these square roots, squared afterwards, as the authors recommend; ``"profile"``, depth-normalised counts
    themselves, since the squared mean of roots is too small for rare genes; or ``"lognorm"``, log-normalised values.

    Where entries are hidden, they hold the gene's visible mean when the graph is made. Values and visibility are
    diffused and divided, so that an entry is the mean over the cells where the gene is visible, weighted by the
    diffusion; where no such cell is reached, the gene's mean.
    """
    profiles = np.expm1(cells.lognorm(cells.typical_depth))
    roots = np.sqrt(profiles)
    space = roots if cells.missing is None else np.where(cells.missing, cells.column_means(roots), roots)
    for (neighbours, components), same_graph in groupby(sorted(grid), key=lambda setting: setting[:2]):
        operator = _operator(space, neighbours, components, random_state)
        for what, same in groupby(same_graph, key=lambda setting: setting[2]):
            times = [setting[3] for setting in same]
            values = {"root": roots, "profile": profiles}.get(what)
            if values is None:
                values = cells.lognorm(cells.target_sum)
            means, weight = cells.column_means(values), cells.visible
            for time in range(1, max(times) + 1):
                values, weight = (operator @ values).astype(np.float32), (operator @ weight).astype(np.float32)
                if time in times:
                    reached = weight[rows] > _NEGLIGIBLE
                    mean = np.where(reached, values[rows] / np.maximum(weight[rows], _NEGLIGIBLE), means)
                    yield (neighbours, components, what, time), np.square(mean) if what == "root" else mean


_GRAPHS_AND_TIMES = ((5, 15, 30), (20, 100), (1, 2, 3, 5))

magic = Tuned(
    "magic",
    _diffusions,
    rate=[(k, n, what, t) for k, n, t in product(*_GRAPHS_AND_TIMES) for what in ("root", "profile")],
    lognorm=[(k, n, "lognorm", t) for k, n, t in product(*_GRAPHS_AND_TIMES)],
)
"""Impute with MAGIC; neighbours (package default 5), components (100), time (3) and what is diffused are tuned."""
