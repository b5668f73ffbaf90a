"""Plots. All draw with matplotlib, those in space through squidpy, and give back their axes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from spaformer_sc import _checks
from spaformer_sc._data_objects import takes_tables
from spaformer_sc._keys import Keys
from spaformer_sc._logging import logger
from spaformer_sc._result import genes_of, known_of
from spaformer_sc.training.posterior import standard_deviation
from spaformer_sc.training.reliability import CLEARLY, LEAST_CORRELATION, LEVELS, SURELY

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from spatialdata import SpatialData

COLOURS = dict(zip(reversed(LEVELS), ("#2a7f62", "#d9a441", "#9a9a9a"), strict=True))


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
) -> NDArray[Any]:
    """Draw observed and imputed expression of genes, and what is uncertain of it, side by side in space.

    The observed counts are those that were imputed from, in the scale of the imputed layer; what was not measured is
    left out. The title of the imputed panel has the verdict of the gene. Uncertainty is the standard deviation of the
    posterior of each entry, in the same scale and, up to its own largest values, the same colours; it is left out where
    the result has none (the Gaussian decoder; ``zeros="keep"`` without ``sd=True``).

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
    import matplotlib.pyplot as plt
    from anndata import AnnData

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of squidpy, about itself
        import squidpy as sq

    keys = Keys(key_added)
    needed = [("layers", keys.layer), ("obs", keys.obs("depth")), ("var", keys.var("reliability"))]
    params = _checks.check_result(adata, keys.uns, needed)["params"]
    if size is not None:
        size = _checks.check_positive("size", size)
    columns = _checks.check_genes(adata, genes)
    names = list(adata.var_names[columns])
    _checks.check_imputed(names, genes_of(params))
    cells = _cells_of(adata, params, fov)
    places = _checks.check_coordinates(adata, params["spatial_key"] if spatial_key is None else spatial_key)
    if fov is None and params["library_key"] is not None:
        _say_if_overlaid(adata, places, params["library_key"])
    counts = _checks.counts_of_result(adata, params)
    observed = _scaled(counts, cells, columns, params["output"], float(params["target_sum"]))
    prediction = np.asarray(adata.layers[keys.layer][:, columns])[cells]
    missing = _checks.check_layer_of_missing(adata, params["missing"])
    if missing is not None:
        observed[missing[cells][:, columns]] = np.nan
    shown = AnnData(observed, var={"gene": names})
    shown.var_names = names
    shown.layers["imputed"] = prediction
    sd = _uncertainty(adata, names, key_added)
    panels: list[tuple[str | None, NDArray[np.float32]]] = [(None, observed), ("imputed", prediction)]
    if sd is not None:
        shown.layers["uncertainty"] = sd[cells]
        panels.append(("uncertainty", sd[cells]))
    shown.obs["part"] = pd.Categorical(["all"] * len(cells))  # squidpy warns where it is not told of one
    shown.obsm["spatial"] = places[cells][:, :2]
    size = float(np.clip(60000 / len(cells), 2, 60)) if size is None else size
    shape = len(names), len(panels)
    figure, axes = plt.subplots(*shape, figsize=(4.5 * shape[1], 3.8 * shape[0]), squeeze=False, layout="constrained")
    verdicts = adata.var[keys.var("reliability")]
    for row, gene, column in zip(axes, names, columns, strict=True):
        zeros = np.mean(observed[np.isfinite(observed[:, names.index(gene)]), names.index(gene)] == 0)
        titles = (
            f"{gene}: observed ({zeros:.0%} zeros)",
            f"{gene}: imputed, {params['output']} ({verdicts.iloc[column]})",
            f"{gene}: uncertainty (standard deviation)",
        )
        for ax, (layer, panel), title in zip(row, panels, titles, strict=False):
            values = panel[:, names.index(gene)]
            top = max(float(np.nanquantile(values, 0.995)), 1e-9) if np.isfinite(values).any() else 1.0
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PendingDeprecationWarning)  # of matplotlib, for squidpy
                warnings.filterwarnings("ignore", "The method obs_vector", FutureWarning)  # of anndata, for squidpy
                sq.pl.spatial_scatter(
                    shown, color=gene, layer=layer, shape=None, library_key="part", size=size, cmap=cmap,
                    vmin=0, vmax=top, title=title, ax=ax, fig=figure, frameon=False, colorbar=False,
                )  # fmt: skip
            figure.colorbar(ax.collections[0], ax=ax, shrink=0.6, pad=0.01)
    return np.asarray(axes)


@takes_tables
def reliability(
    adata: AnnData | SpatialData, *, table_key: str | None = None, key_added: str = "spaformer", ax: Axes | None = None
) -> Axes:
    """Draw what can be believed: each gene's gain over its own counts, and its estimated correlation with the truth.

    Colours are the verdicts (:func:`spaformer_sc.tl.impute`), lines what they ask for: the gain over the baseline in
    units of its standard error, and the correlation. Larger points have more held-out transcripts.

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

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        If there is no result of this name.
    """
    import matplotlib.pyplot as plt

    keys = Keys(key_added)
    shown = ("held_out", "true_correlation", "gain_over_baseline", "gain_over_baseline_se", "reliability")
    _checks.check_result(adata, keys.uns, [("var", keys.var(name)) for name in shown])
    held, value, gain, error, verdict = (adata.var[keys.var(name)] for name in shown)
    ax = plt.subplots(figsize=(6, 4), layout="constrained")[1] if ax is None else ax
    for name, colour in COLOURS.items():
        of = (verdict == name) & value.notna() & (error > 0)
        size = 2 + 4 * np.log10(np.maximum(held[of], 1)) ** 1.5
        ax.scatter(
            gain[of] / error[of], value[of], s=size, color=colour, alpha=0.7, linewidth=0,
            label=f"{name}: {int((verdict == name).sum())} genes",
        )  # fmt: skip
    for x in (CLEARLY, SURELY):
        ax.axvline(x, color="0.6", linewidth=0.8, linestyle=":")
    ax.plot(
        [SURELY, max(ax.get_xlim()[1], 2 * SURELY)], [LEAST_CORRELATION] * 2, color="0.6", linewidth=0.8, linestyle=":"
    )
    ax.set_xscale("symlog", linthresh=SURELY)
    ax.set_ylim(-0.3, 1.05)
    ax.set_xlabel("gain over the gene's own counts, in standard errors")
    ax.set_ylabel("estimated correlation with the truth")
    ax.legend(fontsize=8, frameon=False)
    return ax


@takes_tables
def calibration(
    adata: AnnData | SpatialData, *, table_key: str | None = None, key_added: str = "spaformer", ax: Axes | None = None
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
    import matplotlib.pyplot as plt

    posterior = _checks.check_result(adata, Keys(key_added).uns).get("posterior")
    if posterior is None or not posterior["n_scored"]:
        raise ValueError(
            f"`key_added={key_added!r}`: nothing is known of the coverage of intervals: "
            + ("the Gaussian decoder gives none." if posterior is None else "too few transcripts were held out.")
        )
    ax = plt.subplots(figsize=(4.5, 4), layout="constrained")[1] if ax is None else ax
    levels = np.asarray(posterior["levels"], dtype=float)
    ax.axhline(0, color="0.6", linewidth=0.8)
    for name, covered in {"all": posterior["coverage"], **posterior["strata"]}.items():
        ax.plot(100 * levels, 100 * (np.asarray(covered, dtype=float) - levels), label=name)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -5), max(high, 5))
    ax.set_xlabel("level of the intervals, %")
    ax.set_ylabel("held-out counts inside, minus level (points)")
    ax.legend(title="expected count", fontsize=8, frameon=False)
    return ax


@takes_tables
def history(
    adata: AnnData | SpatialData, *, table_key: str | None = None, key_added: str = "spaformer", ax: Axes | None = None
) -> Axes:
    """Draw the score on what was held out over the steps of training, a line for each network.

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

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        If there is no result of this name.
    """
    import matplotlib.pyplot as plt

    record = _checks.check_result(adata, Keys(key_added).uns)
    course = {name: np.asarray(values, dtype=float) for name, values in record["history"].items()}
    networks = record["params"]["networks"]
    ax = plt.subplots(figsize=(6, 4), layout="constrained")[1] if ax is None else ax
    for number, (form, weight) in enumerate(zip(networks["form"], networks["weight"], strict=True)):
        of = course["network"] == number
        step, score = course["step"][of], course["validation"][of]
        (line,) = ax.plot(step, score, label=f"{number + 1}: {form}, weight {weight:.2f}")
        if np.isfinite(score).any():
            best = int(np.nanargmax(score))
            ax.plot(step[best], score[best], "o", color=line.get_color(), markersize=5)
    ax.set_xlabel("step")
    ax.set_ylabel("held out: nats per transcript over gene means")
    ax.legend(title="network", fontsize=8, frameon=False)
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


def _cells_of(adata: AnnData, params: dict[str, Any], fov: str | None) -> NDArray[np.int64]:
    from spaformer_sc.data._labels import field_codes

    if fov is None:
        return np.arange(adata.n_obs)
    key = params["library_key"]
    if key is None:
        raise ValueError(f"`fov={fov!r}`: the result has no fields of view; it was made without `library_key`.")
    codes, names = field_codes(adata.obs, key if isinstance(key, str) else list(key))
    if str(fov) not in names:
        raise KeyError(f"`fov={fov!r}` is none of the fields of view: {', '.join(names[:10])}.")
    return np.flatnonzero(codes == names.index(str(fov)))


def _say_if_overlaid(adata: AnnData, places: NDArray[np.float64], library_key: Any) -> None:
    """Log that fields of view are drawn on top of each other."""
    from spaformer_sc.data._labels import field_codes

    codes, _ = field_codes(adata.obs, library_key if isinstance(library_key, str) else list(library_key))
    if _checks.lie_on_each_other(places, codes):
        logger.warning(
            "fields of view are drawn on top of each other, since positions start anew in each: pass `fov=` to draw "
            "one, or `spatial_key=` with global positions."
        )


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
