"""What all plots share: where to draw, what becomes of the figure, colours, and cells in space."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spaformer_sc import _checks
from spaformer_sc._files import replacing
from spaformer_sc._logging import logger
from spaformer_sc._write import check_path
from spaformer_sc.training.reliability import LEVELS

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.collections import Collection
    from matplotlib.figure import Figure, SubFigure

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8a")
"""Colours of Okabe and Ito (2008), which stay apart under the common kinds of colour blindness, and a grey."""
VERDICTS = {LEVELS[2]: (PALETTE[0], "o"), LEVELS[1]: (PALETTE[1], "^"), LEVELS[0]: (PALETTE[6], "x")}
"""Colour and marker of each verdict on a gene, from best to worst."""
SIGNED = "coolwarm"
"""Colour map of values that have a sign: blue to red over a grey that can still be seen on white."""
RULE = "0.55"
"""Colour of lines that only guide the eye, on light ground and dark."""


def axes_for(ax: Axes | None, figsize: tuple[float, float], save: str | os.PathLike[str] | None) -> Axes:
    """Axes to draw one plot on: those given, or of a new figure; ``save`` is checked before."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    _check_save(save)
    if ax is None:
        figure = figure_for(None, figsize, save)
        return figure.subplots()
    if not isinstance(ax, Axes):
        hint = " For several panels pass a figure, or one of `Figure.subfigures`." if isinstance(ax, Figure) else ""
        raise TypeError(f"`ax` must be the axes to draw on, or None, not {type(ax).__name__}.{hint}")
    return ax


def figure_for(
    fig: Figure | SubFigure | None, figsize: tuple[float, float], save: str | os.PathLike[str] | None
) -> Figure | SubFigure:
    """Figure to draw several panels on: the one given, or a new one; ``save`` is checked before."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import FigureBase

    _check_save(save)
    if fig is None:
        new: Figure = plt.figure(figsize=figsize, layout="constrained")
        return new
    if not isinstance(fig, FigureBase):
        raise TypeError(f"`fig` must be a figure or subfigure to draw on, or None, not {type(fig).__name__}.")
    return fig


def _check_save(save: str | os.PathLike[str] | None) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    if save is not None:
        check_path("save", save, tuple(f".{ending}" for ending in FigureCanvasBase.get_supported_filetypes()))


def finish(
    figure: Figure | SubFigure,
    show: bool | None,
    save: str | os.PathLike[str] | None,
    given: Axes | Figure | SubFigure | None,
) -> None:
    """Save and show a figure, as asked.

    Parameters
    ----------
    figure
        The figure that was drawn on.
    show
        None shows it where scanpy would (``scanpy.settings.autoshow``), but for one that was ``given`` or is saved.
    save
        File to save it to, or None.
    given
        What the user passed to draw on, or None.
    """
    whole = figure.canvas.figure
    if save is not None:
        with replacing(save) as fresh:
            whole.savefig(fresh, dpi=max(whole.dpi, 150))
    if show is None and given is None and save is None:
        from scanpy import settings

        show = settings.autoshow
    if show:
        import matplotlib.pyplot as plt

        plt.show()


def in_space(
    ax: Axes,
    places: NDArray[np.floating[Any]],
    values: NDArray[np.floating[Any]],
    title: str,
    *,
    size: float,
    cmap: str,
    low: float,
    high: float,
) -> Collection:
    """Draw cells in space by squidpy, those with large values (or, about 0, far from it) on top.

    Parameters
    ----------
    places
        Positions (cells × 2).
    values
        What gives the colour (cells,); NaN is drawn in grey.
    low, high
        Ends of the colour map.
    """
    from anndata import AnnData

    if not len(values):  # of which squidpy draws nothing, not even a title
        ax.set_title(title)
        return ax.scatter([], [], c=[], cmap=cmap, vmin=low, vmax=high)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of squidpy, about itself
        import squidpy as sq

    order = np.argsort(np.nan_to_num(np.abs(values) if low < 0 else values, nan=-np.inf), kind="stable")
    one = pd.Categorical(["all"] * len(values))  # squidpy warns where it is not told of one
    obs = pd.DataFrame({"value": values[order], "part": one}, index=np.arange(len(values)).astype(str))
    shown = AnnData(obs=obs, obsm={"spatial": np.asarray(places, dtype=np.float64)[order, :2]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # of matplotlib, for squidpy
        sq.pl.spatial_scatter(
            shown, color="value", shape=None, library_key="part", size=size, cmap=cmap, vmin=low, vmax=high,
            title=title, ax=ax, fig=ax.figure, frameon=False, colorbar=False,
        )  # fmt: skip
    return ax.collections[0]


def point_size(n_cells: int, size: float | None) -> float:
    """Area of a point in points²: as given, or so that cells fill a panel."""
    return float(np.clip(60000 / n_cells, 0.5, 60)) if size is None else _checks.check_positive("size", size)


def panel_height(places: NDArray[np.floating[Any]], width: float) -> float:
    """Height of a panel that shows these places, in inches, with room for a title."""
    extent = np.maximum(np.ptp(places, axis=0), 1e-9)
    return float(np.clip(0.8 * width * extent[1] / extent[0], 0.4 * width, 1.6 * width)) + 0.4


def apart(places: NDArray[np.floating[Any]], codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Move fields of view beside one another.

    Parameters
    ----------
    places
        Positions (cells × 2).
    codes
        Field of view of each cell, from 0.

    Returns
    -------
    Positions (cells × 2), the fields row by row in boxes of one size.
    """
    moved: NDArray[np.float64] = np.array(places, dtype=np.float64)
    fields = np.unique(codes)
    low = np.array([moved[codes == field].min(axis=0) for field in fields])
    step = 1.1 * np.max([np.ptp(moved[codes == field], axis=0) for field in fields], axis=0)
    columns = int(np.ceil(np.sqrt(len(fields))))
    for number, field in enumerate(fields):
        row, column = divmod(number, columns)
        moved[codes == field] += step * [column, row] - low[number]
    return moved


def places_of(
    adata: AnnData, params: dict[str, Any], fov: str | None, spatial_key: str | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows of the cells to draw, all or those of one field of view, and their places (cells × 2)."""
    from spaformer_sc.data._labels import field_codes

    places = _checks.check_coordinates(adata, params["spatial_key"] if spatial_key is None else spatial_key)[:, :2]
    key = params["library_key"]
    if key is None:
        if fov is not None:
            raise ValueError(f"`fov={fov!r}`: there are no fields of view; this was made without `library_key`.")
        return np.arange(adata.n_obs), places
    columns = [key] if isinstance(key, str) else list(key)
    _checks.check_in_obs(adata, columns)
    codes, names = field_codes(adata.obs, columns)
    if fov is None:
        if _checks.lie_on_each_other(places, codes):
            logger.warning(
                "fields of view are drawn beside one another, since positions start anew in each: pass `fov=` to draw "
                "one, or `spatial_key=` with global positions."
            )
            places = apart(places, codes)
        return np.arange(adata.n_obs), places
    if str(fov) not in names:
        raise KeyError(f"`fov={fov!r}` is none of the fields of view: {', '.join(names[:10])}.")
    cells = np.flatnonzero(codes == names.index(str(fov)))
    return cells, places[cells]
