"""Positional encodings in space."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spaformer_sc import _checks
from spaformer_sc._data_objects import takes_tables

from ._drawing import SIGNED, figure_for, finish, in_space, panel_height, places_of, point_size

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure, SubFigure
    from spatialdata import SpatialData

MOST_PANELS = 12
"""Columns of an encoding that are drawn unless some are asked for."""


@takes_tables
def encodings(
    adata: AnnData | SpatialData,
    name: str,
    *,
    table_key: str | None = None,
    components: int | Sequence[int] | None = None,
    spatial_key: str | None = None,
    fov: str | None = None,
    ncols: int = 4,
    size: float | None = None,
    cmap: str | None = None,
    fig: Figure | SubFigure | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> NDArray[Any]:
    """Draw a positional encoding in space, a panel for each of its columns.

    Columns that have a sign are drawn from blue through grey at 0 to red; the others (return probabilities, bins) from
    their smallest value to their largest. Each panel has its own scale. Eigenvectors have the sign that was computed,
    which means nothing. Fields of view that would lie on top of one another, since positions start anew in each, are
    drawn beside one another.

    Parameters
    ----------
    adata
        Data with what :func:`spaformer_sc.pp.positional_encoding` writes; not changed.
    name
        Name of the encoding, such as ``"laplacian"``, or the ``key_added`` that it was written under.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    components
        Column to draw, or several, counted from 0; by default all, and 12 of equal distance where there are more.
    spatial_key
        Positions to draw at; those that were encoded by default. Where they start anew in each field of view, name
        global ones here.
    fov
        Draw this field of view only, by its name in ``adata.obs``; all cells by default.
    ncols
        Panels in a row.
    size
        Area of a point, in points²; by default so that cells fill the panel.
    cmap
        Colour map; by default one for values that have a sign, or ``"viridis"``.
    fig
        Figure or subfigure to draw the panels on; a new one by default.
    show
        Whether to show the figure; None does what scanpy is set to (``sc.settings.autoshow``), but for a figure that
        was passed or is saved.
    save
        File to save the figure to; its ending says in which format.

    Returns
    -------
    Axes, one for each panel.

    Raises
    ------
    KeyError
        If the encoding was not written, or there is no such field of view.
    TypeError, ValueError
        If there is no such column, or an argument is of the wrong kind.

    Examples
    --------
    >>> sf.pp.positional_encoding(adata, "laplacian", library_key="fov")
    >>> sf.pl.encodings(adata, "laplacian", fov="fov1")
    """
    from matplotlib.ticker import MaxNLocator

    key, params = _checks.check_encoding(adata, name)
    values = np.asarray(adata.obsm[key])
    ncols = _checks.check_integer("ncols", ncols)
    chosen = _checks.check_columns("components", components, values.shape[1], MOST_PANELS)
    cells, places = places_of(adata, params, fov, spatial_key)
    size, values = point_size(len(cells), size), values[cells]
    ncols = min(ncols, len(chosen))
    nrows, width = -(-len(chosen) // ncols), 3.4
    figure = figure_for(fig, (width * ncols, panel_height(places, width) * nrows), save)
    axes = figure.subplots(nrows, ncols, squeeze=False).ravel()
    for ax in axes[len(chosen) :]:
        ax.remove()
    signed = params["encoding"] not in ("random_walk", "patch")
    for ax, column in zip(axes, chosen, strict=False):
        shown = values[:, column]
        most = max(float(np.abs(shown).max()), 1e-9)
        low, high = (-most, most) if signed else (float(shown.min()), float(shown.max()))
        high = high if high > low else low + 1
        title = _title(params["encoding"], column, values.shape[1])
        points = in_space(
            ax, places, shown, title, size=size, cmap=cmap or (SIGNED if signed else "viridis"), low=low, high=high
        )
        whole = MaxNLocator(integer=True, nbins=5) if params["encoding"] == "patch" else None
        figure.colorbar(points, ax=ax, shrink=0.7, pad=0.01, ticks=whole)
    finish(figure, show, save, fig)
    return np.asarray(axes[: len(chosen)])


def _title(encoding: str, column: int, n_columns: int) -> str:
    """What a column of an encoding is; :func:`spaformer_sc.pp.positional_encoding` says more."""
    number = column + 1
    if encoding in ("laplacian", "signnet"):
        return f"eigenvector {number}"
    if encoding == "random_walk":
        return f"return after {number} step{'s' if column else ''}"
    if encoding == "patch":
        return ("row of the bin", "column of the bin")[column]
    if encoding in ("linear", "mlp"):
        return "xy"[column]
    if encoding == "sinusoidal":
        part, wave = divmod(column, n_columns // 4)
        return f"{('sin x', 'sin y', 'cos x', 'cos y')[part]}, wavelength {wave + 1} of {n_columns // 4}"
    if encoding == "fourier":
        part, wave = divmod(column, n_columns // 2)
        return f"{('cosine', 'sine')[part]} {wave + 1} of {n_columns // 2}"
    return f"output {number}, untrained"
