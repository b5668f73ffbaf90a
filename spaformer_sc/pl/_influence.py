"""What moved an imputed value, around the cell; and from how far away."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spaformer_sc import _checks
from spaformer_sc._data_objects import takes_tables

from ._drawing import PALETTE, RULE, SIGNED, axes_for, figure_for, finish, in_space

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from spatialdata import SpatialData

    from spaformer_sc.interpret import Attribution, Reach


@takes_tables
def influence(
    adata: AnnData | SpatialData,
    attribution: Attribution,
    *,
    table_key: str | None = None,
    spatial_key: str = "spatial",
    radius: float | None = None,
    n_genes: int = 10,
    size: float | None = None,
    cmap: str = SIGNED,
    fig: Figure | SubFigure | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> NDArray[Any]:
    """Draw what moved an imputed value: the neighbours of the cell in space, and beside them the cell's own genes.

    Neighbours are coloured by the contribution of all their counts, from blue (lowers the value) through grey at 0 to
    red (raises it); direct neighbours in the spatial graph have an outline, and the cell itself is a black star. Beside
    them are the genes of the cell's own counts that contribute most, in either direction. The heading has the sum, and
    the title of the first panel how much of what all neighbours contribute, in absolute value, lies inside the panel.
    What the numbers do not show is in ``docs/interpretation.md``.

    Parameters
    ----------
    adata
        The data that were explained; not changed.
    attribution
        One result of :func:`spaformer_sc.tl.attribution`.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    spatial_key
        Coordinates in ``adata.obsm``.
    radius
        Half of the side of what is drawn around the cell, in the unit of the coordinates; by default a little more than
        the distance of the farthest cell within two steps of the spatial graph.
    n_genes
        Number of genes.
    size
        Area of a point, in points²; by default so that cells fill the panel.
    cmap
        Colour map; its middle is at 0.
    fig
        Figure or subfigure to draw the panels on; a new one by default.
    show
        Whether to show the figure; None does what scanpy is set to (``sc.settings.autoshow``), but for a figure that
        was passed or is saved.
    save
        File to save the figure to; its ending says in which format.

    Returns
    -------
    Two axes: neighbours, and genes.

    Raises
    ------
    KeyError
        If ``adata`` lacks the coordinates, or cells of the attribution.
    TypeError
        If ``attribution`` is not one result of :func:`spaformer_sc.tl.attribution`.
    ValueError
        If names of cells are not unique, or a number is out of range.

    Examples
    --------
    >>> found = sf.tl.attribution(adata, model, "EPCAM", adata.obs_names[0])
    >>> sf.pl.influence(adata, found)
    """
    from matplotlib import colormaps, rcParams
    from matplotlib.colors import to_hex
    from matplotlib.ticker import MaxNLocator

    from spaformer_sc.interpret import Attribution

    _checks.check_instance("attribution", attribution, Attribution, "sf.tl.attribution(adata, model, gene, cell)")
    around = attribution.neighbours
    rows = _checks.check_cells_of(adata, [attribution.cell, *around.index], "attribution")
    places = _checks.check_coordinates(adata, spatial_key)[rows, :2]
    places = places[1:] - places[0]
    contribution = around["contribution"].to_numpy(dtype=np.float64)
    distance, hops = np.abs(places).max(axis=1, initial=0), around["hops"].to_numpy()
    if radius is None:
        near = distance[hops <= 2]
        farthest = near.max() if near.size else np.sort(distance)[:20].max(initial=1)
        radius = 1.3 * float(farthest) or 1.0  # 0 where these lie in the place of the cell
    radius = _checks.check_positive("radius", radius)
    inside = distance <= radius
    total = np.abs(contribution).sum()
    share = np.abs(contribution[inside]).sum() / total if total else 1.0
    most = max(float(np.abs(contribution[inside]).max(initial=0)), 1e-12)
    size = (
        float(np.clip(100000 / max(inside.sum(), 1), 9, 1200)) if size is None else _checks.check_positive("size", size)
    )
    own = attribution.own
    top = own[own.abs().sort_values(ascending=False, kind="stable").index[: _checks.check_integer("n_genes", n_genes)]]

    figure = figure_for(fig, (10, 5), save)
    ax, bars = figure.subplots(1, 2, width_ratios=(1.35, 1))
    unit = "log rate" if attribution.scale == "log rate" else "log-normalised value"
    order = np.flatnonzero(inside)
    points = in_space(ax, places[order], contribution[order], "", size=size, cmap=cmap, low=-most, high=most)
    direct, ink = places[inside & (hops == 1)], rcParams["text.color"]
    ring = {"facecolors": "none", "edgecolors": ink, "linewidths": 1.2}
    ax.scatter(*direct.T, s=1.3 * size, marker=".", label="direct neighbour", **ring)  # "." as squidpy draws
    ax.scatter(0, 0, s=max(size / 3, 60), marker="*", color=ink, zorder=3, label="the cell")
    ax.legend(
        fontsize=8, framealpha=0.8, edgecolor="none", ncols=2, loc="upper left", markerscale=min(1, (150 / size) ** 0.5)
    )
    ax.set_title(f"neighbours ({share:.0%} of their influence in view)", fontsize=10)
    ax.set_axis_on()
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlim(-radius, radius)
    ax.set_ylim(radius, -radius)  # as squidpy has it: y grows downwards
    ax.set_aspect("equal")
    ax.set_xlabel("x from the cell, in the unit of the coordinates")
    ax.set_ylabel("y from the cell")
    figure.colorbar(points, ax=ax, shrink=0.8, pad=0.02, label=f"contribution to the {unit}")
    lower, upper = (to_hex(colormaps[cmap](end)) for end in (0.05, 0.95))
    bars.barh(np.arange(len(top)), top, color=[upper if value > 0 else lower for value in top])
    bars.set_yticks(np.arange(len(top)), [str(name) for name in top.index])
    bars.invert_yaxis()
    bars.axvline(0, color=RULE, linewidth=0.8)
    bars.spines[["top", "right", "left"]].set_visible(False)
    bars.tick_params(axis="y", length=0)
    bars.set_title("the cell's own counts, by gene", fontsize=10)
    bars.set_xlabel(f"contribution to the {unit}")
    parts = (attribution.baseline, own.sum(), attribution.total - own.sum(), attribution.value)
    numbers = [f"{part:+.2f}".replace("-", "\N{MINUS SIGN}") for part in parts]
    figure.suptitle(
        "{} in {}, {}: baseline {}, own counts {}, other cells {}, imputed {}".format(
            attribution.gene, attribution.cell, attribution.scale, *numbers
        ),
        fontsize=10,
    )
    finish(figure, show, save, fig)
    return np.asarray([ax, bars])


def reach(
    reach: Reach,
    *,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw from how far away counts have an influence: the share of it that lies within a distance.

    The dashed line is what the share would be if every cell weighed the same; points mark half and nine tenths.

    Parameters
    ----------
    reach
        Result of :func:`spaformer_sc.tl.reach`.
    ax
        Where to draw; a new figure by default.
    show
        Whether to show the figure; None does what scanpy is set to (``sc.settings.autoshow``), but for axes that were
        passed and a figure that is saved.
    save
        File to save the figure to; its ending says in which format.

    Returns
    -------
    The axes.

    Raises
    ------
    TypeError
        If ``reach`` is not such a result.
    ValueError
        If no other cell has any influence, so that there is nothing to draw.

    Examples
    --------
    >>> sf.pl.reach(sf.tl.reach(adata, model))
    """
    from spaformer_sc.interpret import Reach

    _checks.check_instance("reach", reach, Reach, "sf.tl.reach(adata, model)")
    if not len(reach.curve):
        raise ValueError("`reach`: no other cell has any influence on what is imputed; there is nothing to draw.")
    given, ax = ax, axes_for(ax, (6, 4), save)
    curve = reach.curve
    ax.plot(curve["distance"], 100 * curve["cells"], "--", color=PALETTE[6], label="if every cell weighed the same")
    ax.plot(curve["distance"], 100 * curve["attribution"], color=PALETTE[0], label="influence of other cells")
    for share, distance in ((50, reach.distance_50), (90, reach.distance_90)):
        ax.plot(distance, share, "o", color=PALETTE[0])
        text = f"{share} % within {distance:,.0f}" if distance >= 100 else f"{share} % within {distance:.3g}"
        ax.annotate(text, (distance, share), (8, -10), textcoords="offset points", fontsize=8)
    ax.set_xlim(0, None)
    ax.set_ylim(0, 102)
    ax.set_xlabel("distance from the cell, in the unit of the coordinates")
    ax.set_ylabel("share within this distance, %")
    ax.set_title(
        f"the cell itself: {reach.own_share:.0%} of all influence; mean of {len(reach.cells)} cells", fontsize=10
    )
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    finish(ax.figure, show, save, given)
    return ax
