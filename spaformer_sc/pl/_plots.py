"""Plots of a result. All draw with matplotlib, those in space through squidpy, and give back their axes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from spaformer_sc import _checks
from spaformer_sc._data_objects import takes_tables
from spaformer_sc._keys import Keys
from spaformer_sc._result import genes_of, known_of
from spaformer_sc.training.posterior import STRATA, standard_deviation
from spaformer_sc.training.reliability import CLEARLY, LEAST_CORRELATION, SURELY

from ._drawing import (
    PALETTE,
    RULE,
    VERDICTS,
    axes_for,
    figure_for,
    finish,
    in_space,
    panel_height,
    places_of,
    point_size,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from spatialdata import SpatialData


@takes_tables
def imputed(
    adata: AnnData | SpatialData,
    genes: str | Sequence[str],
    *,
    table_key: str | None = None,
    key_added: str = "spaformer",
    spatial_key: str | None = None,
    fov: str | None = None,
    size: float | None = None,
    cmap: str = "viridis",
    fig: Figure | SubFigure | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> NDArray[Any]:
    """Draw observed and imputed expression of genes, and what is uncertain of it, side by side in space.

    The observed counts are those that were imputed from, in the scale of the imputed layer; what was not measured is
    left out. The title of the imputed panel has the verdict of the gene. Uncertainty is the standard deviation of the
    posterior of each entry, in the same scale and, up to its own largest values, the same colours; it is left out where
    the result has none (the Gaussian decoder; ``zeros="keep"`` without ``sd=True``). Fields of view that would lie on
    top of one another, since positions start anew in each, are drawn beside one another.

    Parameters
    ----------
    adata
        Result of :func:`spaformer_sc.tl.impute`; not changed.
    genes
        One name or several, a row of panels each.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    key_added
        Name of the result.
    spatial_key
        Positions to draw at; those of the result by default. Where they start anew in each field of view, name global
        ones here (``"spatial_fov"``, ``"global"`` for CosMx), or draw one ``fov``.
    fov
        Draw this field of view only, by its name in ``adata.obs``; all cells by default.
    size
        Area of a point, in points²; by default so that cells fill the panel.
    cmap
        Colour map.
    fig
        Figure or subfigure to draw the panels on; a new one by default.
    show
        Whether to show the figure; None does what scanpy is set to (``sc.settings.autoshow``), but for a figure that
        was passed or is saved.
    save
        File to save the figure to; its ending says in which format.

    Returns
    -------
    Axes (genes × 3, or × 2 without uncertainty).

    Raises
    ------
    KeyError
        If there is no result of this name, or no such gene or field of view.
    ValueError
        If a gene was not imputed, counts have changed since, or a field of view is asked for where the result knows of
        none.

    Examples
    --------
    >>> sf.pl.imputed(adata, ["EPCAM", "VIM"])
    """
    maps = maps_of(adata, genes, key_added, fov, spatial_key, size)
    shape, width = (len(maps.genes), len(maps.genes[0].panels)), 4.2
    figure = figure_for(fig, (width * shape[1], panel_height(maps.places, width) * shape[0]), save)
    axes = figure.subplots(*shape, squeeze=False)
    for row, gene in zip(axes, maps.genes, strict=True):
        heads = (f"observed {gene.zeros}", f"imputed, {gene.verdict}", "uncertainty")
        for ax, panel, head in zip(row, gene.panels, heads, strict=False):
            maps.draw(panel, ax, f"{gene.name}: {head}", cmap)
    finish(figure, show, save, fig)
    return np.asarray(axes)


@dataclass(frozen=True)
class Panel:
    """What one panel shows: a value of each cell, and what it is."""

    values: NDArray[np.float32]
    label: str


@dataclass(frozen=True)
class GeneMaps:
    """Panels of a gene: observed, imputed and, where known, its uncertainty."""

    name: str
    verdict: str
    zeros: str
    panels: list[Panel]


@dataclass(frozen=True)
class Maps:
    """Genes to draw in space, where the cells are (cells × 2), and the area of their points."""

    genes: list[GeneMaps]
    places: NDArray[np.floating[Any]]
    size: float

    def draw(self, panel: Panel, ax: Axes, title: str = "", cmap: str = "viridis") -> None:
        """Draw one panel, with a bar of its colours."""
        values, top = panel.values, 1.0
        if np.isfinite(values).any():
            top = max(float(np.nanquantile(values, 0.995)), 1e-9)
        points = in_space(ax, self.places, values, title, size=self.size, cmap=cmap, low=0, high=top)
        beyond = "max" if np.nanmax(values, initial=0) > top else "neither"
        ax.figure.colorbar(points, ax=ax, shrink=0.7, pad=0.01, label=panel.label, extend=beyond)


def maps_of(
    adata: Any,
    genes: str | Sequence[str],
    key_added: str,
    fov: str | None,
    spatial_key: str | None,
    size: float | None = None,
) -> Maps:
    """Read what :func:`imputed` draws; arguments and errors as there."""
    keys = Keys(key_added)
    needed = [("layers", keys.layer), ("obs", keys.obs("depth")), ("var", keys.var("reliability"))]
    params = _checks.check_result(adata, keys.uns, needed)["params"]
    columns = _checks.check_genes(adata, genes)
    names = list(adata.var_names[columns])
    _checks.check_imputed(names, genes_of(params))
    cells, places = places_of(adata, params, fov, spatial_key)
    size = point_size(len(cells), size)
    counts, output = _checks.counts_of_result(adata, params), str(params["output"])
    observed = _scaled(counts, cells, columns, output, float(params["target_sum"]))
    missing = _checks.check_layer_of_missing(adata, params["missing"])
    if missing is not None:
        observed[missing[cells][:, columns]] = np.nan
    shown = [observed, np.asarray(adata.layers[keys.layer][:, columns])[cells]]
    sd = _uncertainty(adata, names, key_added)
    if sd is not None:
        shown.append(sd[cells])
    labels = (output, output, f"standard deviation, {output}")
    found = []
    verdicts = adata.var[keys.var("reliability")].iloc[columns].astype(str)
    for number, (name, verdict) in enumerate(zip(names, verdicts, strict=True)):
        measured = observed[np.isfinite(observed[:, number]), number]
        zeros = f"({np.mean(measured == 0):.0%} zeros)" if len(measured) else "(not measured)"
        panels = [Panel(values[:, number], label) for values, label in zip(shown, labels, strict=False)]
        found.append(GeneMaps(name, verdict, zeros, panels))
    return Maps(found, places, size)


@takes_tables
def reliability(
    adata: AnnData | SpatialData,
    *,
    table_key: str | None = None,
    key_added: str = "spaformer",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw what can be believed: each gene's gain over its own counts, and its estimated correlation with the truth.

    Colours and markers are the verdicts (:func:`spaformer_sc.tl.impute`), lines what they ask for: the gain over the
    baseline in units of its standard error, and the correlation. Larger points have more held-out transcripts; genes
    with fewer than 10 are `no better than baseline` wherever they lie.

    Parameters
    ----------
    adata
        Result of :func:`spaformer_sc.tl.impute`; not changed.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    key_added
        Name of the result.
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
    KeyError
        If there is no result of this name.
    """
    keys = Keys(key_added)
    shown = ("held_out", "true_correlation", "gain_over_baseline", "gain_over_baseline_se", "reliability")
    _checks.check_result(adata, keys.uns, [("var", keys.var(name)) for name in shown])
    held, value, gain, error, verdict = (adata.var[keys.var(name)] for name in shown)
    given, ax = ax, axes_for(ax, (6.4, 4.4), save)
    for name, (colour, marker) in reversed(VERDICTS.items()):  # the best on top
        of = (verdict == name) & value.notna() & (error > 0)
        size = 4 + 5 * np.log10(np.maximum(held[of], 1)) ** 1.5
        ax.scatter(
            gain[of] / error[of], value[of], s=size, color=colour, marker=marker, alpha=0.75,
            linewidth=1 if marker == "x" else 0, label=f"{name}: {int((verdict == name).sum())} genes",
        )  # fmt: skip
    for x in (CLEARLY, SURELY):
        ax.axvline(x, color=RULE, linewidth=0.8, linestyle=":")
    ax.plot(
        [SURELY, max(ax.get_xlim()[1], 2 * SURELY)], [LEAST_CORRELATION] * 2, color=RULE, linewidth=0.8, linestyle=":"
    )
    ax.set_xscale("symlog", linthresh=SURELY)
    low, high = ax.get_xlim()
    ticks = [x for x in (-100, -30, -10, -3, 0, CLEARLY, SURELY, 10, 30, 100) if low <= x <= high]
    ax.set_xticks(ticks, [f"{x:g}".replace("-", "\N{MINUS SIGN}") for x in ticks])
    ax.set_xticks([], minor=True)
    ax.set_ylim(-0.3, 1.05)
    ax.set_xlabel("gain over the gene's own counts, in standard errors")
    ax.set_ylabel("estimated correlation with the truth (cut at 1)")
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        handles[::-1], labels[::-1], fontsize=8, frameon=False, ncols=3, columnspacing=1, handletextpad=0,
        loc="lower right", bbox_to_anchor=(1.01, 1),
    )  # fmt: skip
    finish(ax.figure, show, save, given)
    return ax


@takes_tables
def calibration(
    adata: AnnData | SpatialData,
    *,
    table_key: str | None = None,
    key_added: str = "spaformer",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw by how much intervals cover held-out counts more or less often than they should.

    A line for each range of counts that are expected of an entry (at the held-out depth, a twentieth of the cell's).
    Counts are discrete, and each end of an interval belongs to it with such a probability that its level is exact
    (randomised intervals): lines at 0 are right, below it intervals are too short. The counts were seen neither by
    training nor by the fit of the posterior; count intervals of :func:`spaformer_sc.tl.interval` are corrected by what
    is seen here over all entries.

    Parameters
    ----------
    adata
        Result of :func:`spaformer_sc.tl.impute`; not changed.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    key_added
        Name of the result.
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
    KeyError
        If there is no result of this name.
    ValueError
        If it has no intervals, or too few counts were held out to say how often they cover.
    """
    import matplotlib as mpl

    posterior = _checks.check_result(adata, Keys(key_added).uns).get("posterior")
    if posterior is None or not posterior["n_scored"]:
        raise ValueError(
            f"`key_added={key_added!r}`: nothing is known of the coverage of intervals: "
            + ("the Gaussian decoder gives none." if posterior is None else "too few transcripts were held out.")
        )
    given, ax = ax, axes_for(ax, (5.4, 4), save)
    levels = np.asarray(posterior["levels"], dtype=float)
    ax.axhline(0, color=RULE, linewidth=0.8)
    styles = [(mpl.rcParams["text.color"], "-"), (PALETTE[5], "--"), (PALETTE[0], "-."), (PALETTE[4], ":")]
    strata = {name: posterior["strata"][name] for name in STRATA if name in posterior["strata"]}  # files sort them
    for (name, covered), (colour, line) in zip({"all": posterior["coverage"], **strata}.items(), styles, strict=False):
        ax.plot(100 * levels, 100 * (np.asarray(covered, dtype=float) - levels), line, color=colour, label=name)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -5), max(high, 5))
    ax.set_xlabel("level of the intervals, %")
    ax.set_ylabel("held-out counts inside, minus level (points)")
    ax.legend(title="expected count", fontsize=8, frameon=False)
    finish(ax.figure, show, save, given)
    return ax


@takes_tables
def history(
    adata: AnnData | SpatialData,
    *,
    table_key: str | None = None,
    key_added: str = "spaformer",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw the score on what was held out over the steps of training, a line for each network.

    The best score of each, at which its weights were kept, has a point and the number of the network.

    Parameters
    ----------
    adata
        Result of :func:`spaformer_sc.tl.impute`; not changed.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    key_added
        Name of the result.
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
    KeyError
        If there is no result of this name.
    """
    record = _checks.check_result(adata, Keys(key_added).uns)
    course = {name: np.asarray(values, dtype=float) for name, values in record["history"].items()}
    networks = record["params"]["networks"]
    given, ax = ax, axes_for(ax, (6.4, 4), save)
    for number, (form, weight) in enumerate(zip(networks["form"], networks["weight"], strict=True)):
        of = course["network"] == number
        step, score = course["step"][of], course["validation"][of]
        colour, line = PALETTE[number % len(PALETTE)], ("-", "--", "-.", ":")[number % 4]
        ax.plot(step, score, line, color=colour, label=f"{number + 1}: {form}, weight {weight:.2f}")
        if np.isfinite(score).any():
            best = int(np.nanargmax(score))
            ax.plot(step[best], score[best], "o", color=colour, markersize=5)
            ax.annotate(
                str(number + 1), (step[best], score[best]), (0, 5), textcoords="offset points", ha="center", fontsize=8
            )
    ax.set_xlabel("training step")
    ax.set_ylabel("held out: nats per transcript over gene means")
    ax.legend(title="network", fontsize=8, frameon=False)
    ax.margins(y=0.1)
    finish(ax.figure, show, save, given)
    return ax


def _uncertainty(adata: AnnData, names: list[str], key_added: str) -> NDArray[np.float32] | None:
    """Standard deviation of each entry's posterior (cells × genes), None where the result has none."""
    keys = Keys(key_added)
    record = adata.uns[keys.uns]
    if keys.sd in adata.layers:
        return np.asarray(adata.layers[keys.sd][:, adata.var_names.get_indexer(names)], dtype=np.float32)
    if record.get("posterior") is None or record["params"]["zeros"] != "impute":
        return None
    known = known_of(adata, names, key_added)
    return standard_deviation(known.mean, known.shape, record["params"]["output"], known.target_sum, known.depth)


def _scaled(
    counts: Any, cells: NDArray[np.int64], columns: NDArray[np.int64], output: str, target_sum: float
) -> NDArray[np.float32]:
    """Counts of some cells and genes in the scale of the imputed layer."""
    chosen = counts[cells][:, columns]
    values = np.asarray(chosen.toarray() if sp.issparse(chosen) else chosen, dtype=np.float32)
    if output == "counts":
        return values
    library = np.asarray(counts[cells].sum(axis=1), dtype=np.float32).reshape(-1, 1)
    rates = values * (target_sum / np.maximum(library, 1))
    return np.asarray(np.log1p(rates) if output == "lognorm" else rates, dtype=np.float32)
