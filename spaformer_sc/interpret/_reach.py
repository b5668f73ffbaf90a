"""``sf.tl.reach``: from how far the counts of other cells move what a model imputes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spaformer_sc._checks import check_adata, check_integer
from spaformer_sc._data_objects import takes_tables
from spaformer_sc.interpret._attribution import around, check_fitted, gene_columns, integrate
from spaformer_sc.model import AS_FITTED, SpaFormer, derived_seed

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


@dataclass(frozen=True)
class Reach:
    """Effective reach of a model; see :func:`~spaformer_sc.tl.reach`.

    Attributes
    ----------
    curve
        Cumulative curve (pairs of cells × [``distance``, ``attribution``, ``cells``]), distance rising: the share of
        the neighbours' attribution, and for comparison the share of the cells, up to this distance. Without rows where
        no other cell has any attribution.
    distance_50, distance_90
        Distance within which 50 % and 90 % of the neighbours' attribution lie; NaN where there is none.
    own_share
        Share of the cell itself in the attribution of all cells; NaN where there is none at all.
    cells
        The cells drawn (cells × [``gene``, ``own_share``, ``error``]): the gene that was asked for, the share of the
        cell itself, and the gap of the numerical integral. Indexed by name.
    """

    curve: pd.DataFrame
    distance_50: float
    distance_90: float
    own_share: float
    cells: pd.DataFrame

    def __repr__(self) -> str:
        return (
            f"Reach(50 % within {self.distance_50:.4g}, 90 % within {self.distance_90:.4g}; "
            f"the cell itself: {self.own_share:.0%}; {len(self.cells)} cells)"
        )


@takes_tables
def reach(
    adata: AnnData | SpatialData,
    model: SpaFormer,
    gene: str | Sequence[str] | None = None,
    *,
    n_cells: int = 50,
    n_steps: int = 8,
    random_state: int = 0,
    table_key: str | None = None,
    library_key: str | Sequence[str] | None = AS_FITTED,
    spatial_key: str = AS_FITTED,
    connectivity_key: str | None = AS_FITTED,
    layer: str | None = AS_FITTED,
    missing: str | None = AS_FITTED,
) -> Reach:
    r"""Measure from how far the counts of other cells move what a model imputes.

    The receptive field of a model with attention is the whole field of view (FOV); how much of it is used is the
    effective reach (after the effective receptive field of Luo et al. 2016). Cells with counts are drawn at random, a
    gene for each, and :func:`~spaformer_sc.tl.attribution` gives the contribution :math:`a_n` of every cell of the FOV.
    With :math:`r_n` the distance of cell n from the cell c that was drawn, its curve is

    .. math:: R_c(r) = \sum_{n \ne c,\, r_n \le r} |a_n| \Big/ \sum_{n \ne c} |a_n|,

    and the result is the mean over the cells drawn whose neighbours have any attribution. The share of the cell itself
    is :math:`|a_c| / \sum_n |a_n|`, on average. Contributions of a cell's genes are summed before the absolute value is
    taken, so that a cell whose genes pull in opposite directions counts for what is left.

    Time grows with ``n_cells`` × ``n_steps`` × cells of a FOV × networks.

    Parameters
    ----------
    adata
        Counts and coordinates, as :meth:`~spaformer_sc.SpaFormer.impute` takes them; not changed.
    model
        A fitted model.
    gene
        Name of a gene, several names, or None for all: each cell is asked for one of them, drawn at random.
    n_cells
        Number of cells drawn; all that have counts where there are fewer.
    n_steps
        Points of the numerical integral; ``cells["error"]`` of the result is what it misses.
    random_state
        Seed of the draw.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    library_key, spatial_key, connectivity_key, layer, missing
        Where the data are; by default as in the fit.

    Returns
    -------
    A :class:`~spaformer_sc.interpret.Reach`; distances are in the unit of the coordinates.

    Raises
    ------
    KeyError
        If the model does not know a gene.
    TypeError
        If ``model`` is not a SpaFormer.
    ValueError
        If the model is not fitted, or no gene is named.
    """
    check_fitted(model)
    check_adata(adata)
    wanted = check_integer("n_cells", n_cells)
    steps = check_integer("n_steps", n_steps)
    seed = check_integer("random_state", random_state, minimum=0)
    names = list(model.gene_scores.index if gene is None else [gene] if isinstance(gene, str) else gene)
    if not names:
        raise ValueError("`gene` names no gene; pass None for all of them.")
    choices = gene_columns(model, "gene", names)
    keys = model._keys_for(library_key, spatial_key, connectivity_key, layer, missing)
    loaded, _ = model._read(adata, keys)

    rng = np.random.default_rng(derived_seed(seed, "reach"))
    filled = np.flatnonzero(np.diff(loaded.counts.indptr))
    rows = np.sort(rng.choice(filled, size=min(wanted, len(filled)), replace=False))
    columns = rng.choice(choices, size=len(rows))
    found = integrate(model, loaded, rows.tolist(), columns.tolist(), profile=model._shares, n_steps=steps)
    parts, own_shares = [], []
    for row, result in zip(rows, found, strict=True):
        size = np.abs(result.by_cell)
        others = result.cells != row
        own_shares.append(size[~others].sum() / size.sum() if size.any() else np.nan)
        if size[others].any():
            distance, _ = around(loaded.fields, result.cells, row)
            parts.append((distance[others], size[others] / size[others].sum()))
    curve = _curve(parts)
    drawn = pd.DataFrame(
        {
            "gene": model.gene_scores.index[columns],
            "own_share": own_shares,
            "error": [abs(r.by_cell.sum() - (r.value - r.baseline)) for r in found],
        },
        index=adata.obs_names[rows].astype(str),
    )
    return Reach(curve, _within(curve, 0.5), _within(curve, 0.9), float(drawn["own_share"].mean()), drawn)


def _curve(parts: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> pd.DataFrame:
    """Mean cumulative curve of cells, each given as distances and shares of its neighbours."""
    if not parts:
        return pd.DataFrame({"distance": [], "attribution": [], "cells": []}, dtype=np.float64)
    distance = np.concatenate([d for d, _ in parts])
    share = np.concatenate([s for _, s in parts]) / len(parts)
    equal = np.concatenate([np.full(len(d), 1 / len(d)) for d, _ in parts]) / len(parts)
    order = np.argsort(distance, kind="stable")
    return pd.DataFrame(
        {"distance": distance[order], "attribution": share[order].cumsum(), "cells": equal[order].cumsum()}
    )


def _within(curve: pd.DataFrame, share: float) -> float:
    """Smallest distance within which at least ``share`` of the attribution lies."""
    reached = curve["distance"][curve["attribution"] >= share]
    return float(reached.iloc[0]) if len(reached) else float("nan")
