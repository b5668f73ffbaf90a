"""``sf.tl.attribution``: which neighbours and which genes moved the imputation of a gene in a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import dijkstra

from spaformer_sc._checks import _did_you_mean, _listing, check_adata, check_integer
from spaformer_sc._data_objects import takes_tables
from spaformer_sc.model import AS_FITTED, Loaded, SpaFormer, resolve_device

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from spaformer_sc.data._fields import FieldOfView
    from spaformer_sc.interpret._gradients import Integrated


@dataclass(frozen=True)
class Attribution:
    """What moved the imputed value of one gene in one cell; see :func:`~spaformer_sc.tl.attribution`.

    Attributes
    ----------
    cell, gene
        Name of the cell and of the gene.
    scale
        ``"log rate"``: the natural logarithm of the rate that is imputed, where contributions are log fold changes; or
        ``"lognorm"`` with the Gaussian decoder: its log-normalised value.
    baseline, value
        What the model imputes at the baseline and at the observed counts, on this scale.
    genes
        Contributions of the counts of each gene (genes × [``own``, ``neighbours``]): in the cell itself, and in all
        other cells together.
    neighbours
        All other cells whose counts could reach the value (cells × [``distance``, ``hops``, ``contribution``]), the
        nearest first: distance in the unit of the coordinates, steps in the spatial graph (inf where no path leads
        there), and the contribution of all counts of that cell. Indexed by name.
    """

    cell: str
    gene: str
    scale: str
    baseline: float
    value: float
    genes: pd.DataFrame
    neighbours: pd.DataFrame

    @property
    def own(self) -> pd.Series:
        """Contributions of the cell's own counts (genes,)."""
        return self.genes["own"]

    @property
    def total(self) -> float:
        """Sum of all contributions."""
        return float(self.genes.to_numpy().sum())

    @property
    def error(self) -> float:
        """Gap of the numerical integral, ``|total - (value - baseline)|``; 0 were it exact."""
        return abs(self.total - (self.value - self.baseline))

    def __repr__(self) -> str:
        own = self.own.sum()
        return (
            f"Attribution({self.gene} in {self.cell}, {self.scale}: baseline {self.baseline:.3f} + own {own:.3f} "
            f"+ neighbours {self.total - own:.3f} = {self.value:.3f}, error {self.error:.1e})"
        )


@overload
def attribution(  # type: ignore[overload-overlap]  # a str is a sequence of str
    adata: AnnData | SpatialData,
    model: SpaFormer,
    gene: str,
    cells: str | int,
    *,
    n_steps: int = 32,
    baseline: pd.Series | None = None,
    table_key: str | None = None,
    library_key: str | Sequence[str] | None = AS_FITTED,
    spatial_key: str = AS_FITTED,
    connectivity_key: str | None = AS_FITTED,
    layer: str | None = AS_FITTED,
    missing: str | None = AS_FITTED,
) -> Attribution: ...


@overload
def attribution(
    adata: AnnData | SpatialData,
    model: SpaFormer,
    gene: str,
    cells: Sequence[str] | Sequence[int] | NDArray[Any] | pd.Index,
    *,
    n_steps: int = 32,
    baseline: pd.Series | None = None,
    table_key: str | None = None,
    library_key: str | Sequence[str] | None = AS_FITTED,
    spatial_key: str = AS_FITTED,
    connectivity_key: str | None = AS_FITTED,
    layer: str | None = AS_FITTED,
    missing: str | None = AS_FITTED,
) -> list[Attribution]: ...


@takes_tables
def attribution(
    adata: AnnData | SpatialData,
    model: SpaFormer,
    gene: str,
    cells: Any,
    *,
    n_steps: int = 32,
    baseline: pd.Series | None = None,
    table_key: str | None = None,
    library_key: str | Sequence[str] | None = AS_FITTED,
    spatial_key: str = AS_FITTED,
    connectivity_key: str | None = AS_FITTED,
    layer: str | None = AS_FITTED,
    missing: str | None = AS_FITTED,
) -> Attribution | list[Attribution]:
    r"""Tell how the counts of a cell and of its neighbours moved the imputed value of a gene in the cell.

    Integrated gradients (Sundararajan et al. 2017, eq. 1) of the log of the imputed rate with respect to the counts of
    all cells of the field of view (FOV), through the whole model: normalisation, neighbour means, encodings that read
    expression, encoder, latent, decoder, and the posterior with the cell's own counts. Contributions add up to the
    difference between the imputed values at the observed counts :math:`x` and at a baseline :math:`b` in which every
    cell has its own depth and the same expression profile. All counts move from one to the other together,

    .. math:: a_i = (x_i - b_i) \int_0^1 \frac{\partial f}{\partial x_i}\bigl(b + t\,(x - b)\bigr)\, dt, \qquad
        \sum_i a_i = f(x) - f(b),

    where :math:`\exp f(x)` is what ``model.impute(adata, output="rate", target_sum=1)`` gives before the counts of
    cells alike come in (``settings={"n_pooled": 0}`` leaves them out); networks and tiles are averaged as there. With
    the Gaussian decoder :math:`f` is its log-normalised value before it is cut at 0. What the numbers do not show is in
    ``docs/interpretation.md``.

    Time grows with ``n_steps`` × cells of the FOV (or tile) × networks × cells asked for; cells of one FOV that are
    asked for together share the forward passes. Memory is that of one forward and backward pass over the whole FOV (or
    tile): some 30 matrices of cells × genes, float32, whatever ``n_steps`` is.

    Parameters
    ----------
    adata
        Counts and coordinates, as :meth:`~spaformer_sc.SpaFormer.impute` takes them; not changed.
    model
        A fitted model.
    gene
        Name of the gene.
    cells
        Name or position of a cell, or several of them.
    n_steps
        Points of the numerical integral (Gauss-Legendre); take more where ``error`` is not small.
    baseline
        Expression profile of the baseline: a Series over gene names, at least 0, in any unit, such as the mean counts
        of a cell type; genes of the model that it lacks are an error. None for the mean of the data of the fit.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    library_key, spatial_key, connectivity_key, layer, missing
        Where the data are; by default as in the fit.

    Returns
    -------
    An :class:`~spaformer_sc.interpret.Attribution` for one cell; a list of them, in order, where ``cells`` holds
    several.

    Raises
    ------
    KeyError
        If the model does not know the gene, or there is no such cell.
    TypeError
        If ``model`` is not a SpaFormer, or cells are neither names nor positions.
    ValueError
        If the model is not fitted, a position is out of range, a name belongs to several cells, or the baseline does
        not fit.

    Examples
    --------
    >>> model = sf.SpaFormer(library_key="fov").fit(adata)
    >>> found = sf.tl.attribution(adata, model, "EPCAM", adata.obs_names[0])
    >>> found.genes["own"].sort_values(key=abs, ascending=False).head()
    """
    check_fitted(model)
    check_adata(adata)
    steps = check_integer("n_steps", n_steps)
    column = gene_columns(model, "gene", [gene])[0]
    single = isinstance(cells, str | int | np.integer)
    rows = cell_rows(adata, [cells] if single else cells)
    profile = _profile(model, baseline)
    keys = model._keys_for(library_key, spatial_key, connectivity_key, layer, missing)
    loaded, _ = model._read(adata, keys)
    found = integrate(model, loaded, rows, [column] * len(rows), profile=profile, n_steps=steps)
    scale = "lognorm" if model.settings.decoder == "gaussian" else "log rate"
    names = adata.obs_names.astype(str)
    results = []
    for row, result in zip(rows, found, strict=True):
        others = result.cells != row
        distance, hops = around(loaded.fields, result.cells, row)
        neighbours = pd.DataFrame(
            {"distance": distance, "hops": hops, "contribution": result.by_cell}, index=names[result.cells]
        )[others]
        results.append(
            Attribution(
                cell=names[row],
                gene=gene,
                scale=scale,
                baseline=result.baseline,
                value=result.value,
                genes=pd.DataFrame({"own": result.own, "neighbours": result.neighbours}, index=model.var_names),
                neighbours=neighbours.sort_values("distance", kind="stable"),
            )
        )
    return results[0] if single else results


def check_fitted(model: SpaFormer) -> None:
    """Refuse what is not a fitted model.

    Raises
    ------
    TypeError, ValueError
        If ``model`` is not a SpaFormer, or not fitted.
    """
    if not isinstance(model, SpaFormer):
        raise TypeError(
            f"`model` must be a fitted SpaFormer, not {type(model).__name__}: sf.SpaFormer(…).fit(adata), or "
            "sf.SpaFormer.load(path)."
        )
    if model.var_names is None:
        raise ValueError("`model` is not fitted; call `.fit(adata)` first, or `SpaFormer.load(path)`.")


def gene_columns(model: SpaFormer, argument: str, genes: Sequence[str]) -> list[int]:
    """Find genes among those of the model.

    Raises
    ------
    KeyError, TypeError
        If one is not among them, or is not a name.
    """
    known = pd.Index([]) if model.var_names is None else model.var_names
    for gene in genes:
        if not isinstance(gene, str):
            raise TypeError(f"`{argument}` must be the name of a gene, not {type(gene).__name__}.")
        if gene not in known:
            raise KeyError(
                f"`{argument}={gene!r}` is not among the {len(known)} genes that the model was fitted on."
                f"{_did_you_mean(gene, known)}"
            )
    return [int(column) for column in known.get_indexer(list(genes))]


def cell_rows(adata: AnnData, cells: Any) -> list[int]:
    """Find cells by name or by position.

    Raises
    ------
    KeyError, TypeError, ValueError
        As :func:`~spaformer_sc.tl.attribution`.
    """
    asked = list(cells) if hasattr(cells, "__iter__") else [cells]
    if not asked:
        raise ValueError("`cells` names no cell; pass names out of `adata.obs_names`, or positions.")
    if all(isinstance(cell, str) for cell in asked):
        names = adata.obs_names
        unknown = [cell for cell in asked if cell not in names]
        if unknown:
            raise KeyError(
                f"`cells`: {len(unknown)} not in `adata.obs_names`: {_listing(unknown, 5)}."
                f"{_did_you_mean(unknown[0], names)}"
            )
        twice = [cell for cell in asked if (names == cell).sum() > 1]
        if twice:
            raise ValueError(f"`cells`: several cells are named {_listing(twice, 5)}; pass positions.")
        return [int(names.get_loc(cell)) for cell in asked]
    if not all(isinstance(cell, int | np.integer) and not isinstance(cell, bool) for cell in asked):
        raise TypeError(
            "`cells` must be names out of `adata.obs_names` or positions (whole numbers), or a list of either; the "
            "positions of a mask are np.flatnonzero(mask)."
        )
    outside = [cell for cell in asked if not 0 <= cell < adata.n_obs]
    if outside:
        raise ValueError(f"`cells`: positions {_listing(outside, 5)} are not from 0 to {adata.n_obs - 1}.")
    return [int(cell) for cell in asked]


def _profile(model: SpaFormer, baseline: pd.Series | None) -> NDArray[np.float32]:
    if baseline is None:
        return model._shares
    if not isinstance(baseline, pd.Series):
        raise TypeError(
            f"`baseline` must be a pandas Series over gene names, or None, not {type(baseline).__name__}; for the mean "
            "of some cells: pd.Series(np.ravel(adata[cells].X.mean(axis=0)), index=adata.var_names)."
        )
    known = pd.Index([]) if model.var_names is None else model.var_names
    if not baseline.index.is_unique:
        raise ValueError("`baseline` holds genes more than once in its index; each is needed once.")
    absent = known.difference(baseline.index)
    if len(absent):
        raise ValueError(f"`baseline` lacks {len(absent)} of the {len(known)} genes of the model: {_listing(absent)}.")
    values = baseline.loc[known].to_numpy(dtype=np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.sum() == 0:
        raise ValueError("`baseline` must hold finite numbers of at least 0, not all of them 0.")
    shares: NDArray[np.float32] = (values / values.sum()).astype(np.float32)
    return shares


def integrate(
    model: SpaFormer,
    loaded: Loaded,
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    profile: NDArray[np.float32],
    n_steps: int,
) -> list[Integrated]:
    """Integrated gradients of gene ``columns[i]`` of the model in cell ``rows[i]`` of the data, for every i."""
    import torch

    from spaformer_sc.interpret._gradients import Target, integrated_gradients
    from spaformer_sc.training.sequences import sequences

    wanted = set(rows)
    fields = [field for field in loaded.fields if not wanted.isdisjoint(field.cells.tolist())]
    return integrated_gradients(
        model._networks,
        model._weights,
        model._sampler(resolve_device(model.device)),
        sequences(fields, loaded.counts, loaded.missing),
        [Target(row, column) for row, column in zip(rows, columns, strict=True)],
        profile=torch.from_numpy(profile),
        n_steps=n_steps,
    )


def around(
    fields: Sequence[FieldOfView], cells: NDArray[np.int64], row: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance of ``cells`` from the cell ``row`` in the unit of the coordinates, and steps in the spatial graph.

    Parameters
    ----------
    fields
        FOVs and tiles; those that hold the cell are used.
    cells
        Sorted rows of the data (n,), of one FOV.
    row
        One of them.
    """
    position = np.zeros((len(cells), fields[0].positions.shape[1]))
    edges = sp.csr_matrix((len(cells), len(cells)), dtype=np.float64)
    for field in fields:
        if row in field.cells and np.isin(field.cells, cells).all():
            at = np.searchsorted(cells, field.cells)
            position[at] = field.positions.astype(np.float64) * field.unit
            source, target = at[field.edge_index.numpy()]
            edges = edges + sp.csr_matrix((np.ones(len(source)), (source, target)), shape=edges.shape)
    here = int(np.searchsorted(cells, row))
    hops = dijkstra(edges, directed=False, indices=here, unweighted=True)
    return np.linalg.norm(position - position[here], axis=1), hops
