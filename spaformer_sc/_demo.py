"""The demo: simulate a tissue, impute it, compare with the truth, draw it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ._logging import logger
from ._write import write_atomically

if TYPE_CHECKING:
    from anndata import AnnData

N_NEIGHBORS = 30
"""Cells averaged by the expression kNN baseline."""


def baselines(adata: AnnData) -> dict[str, NDArray[np.float64]]:
    """Shares (cells × genes) by plain means.

    ``"observed"``: the counts as they are. ``"spatial neighbours"``: counts pooled over the cell and its 6 nearest
    cells of the same FOV. ``"similar cells"``: counts pooled over the 30 nearest cells in 20 principal components of
    log-normalised expression.
    """
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    counts = adata.X
    observed = counts.toarray().astype(np.float64)
    library = np.maximum(observed.sum(axis=1, keepdims=True), 1.0)
    fov = adata.obs["fov"].cat.codes.to_numpy()[:, None] * 1e6
    place = np.hstack([adata.obsm["spatial"], fov])
    near = NearestNeighbors(n_neighbors=min(7, adata.n_obs)).fit(place).kneighbors_graph(place)
    logged = np.log1p(observed / library * np.median(library))
    components = min(20, *(np.array(adata.shape) - 1))
    latent = PCA(components, random_state=0).fit_transform(logged)
    alike = NearestNeighbors(n_neighbors=min(N_NEIGHBORS, adata.n_obs)).fit(latent).kneighbors_graph(latent)
    pooled = {"observed": observed, "spatial neighbours": near @ counts, "similar cells": alike @ counts}
    dense = {k: np.asarray(v.toarray() if hasattr(v, "toarray") else v, dtype=np.float64) for k, v in pooled.items()}
    return {k: v / np.maximum(v.sum(axis=1, keepdims=True), 1.0) for k, v in dense.items()}


def compare_with_truth(
    truth: NDArray[np.floating[Any]], shares: dict[str, NDArray[np.floating[Any]]], target_sum: float
) -> pd.DataFrame:
    """Score predicted shares (cells × genes) against true ones.

    Returns a data frame with a row per method: ``pearson``, the median over genes of the correlation over cells with
    the true share, and ``rmse`` of ``log1p(share * target_sum)`` over all entries.
    """
    from .metrics import gene_pearson

    rows = {}
    logged = np.log1p(truth * target_sum)
    for name, share in shares.items():
        error = np.log1p(share * target_sum) - logged
        rows[name] = {
            "pearson": float(np.nanmedian(gene_pearson(truth, share))),
            "rmse": float(np.sqrt(np.mean(np.square(error)))),
        }
    return pd.DataFrame(rows).T


def example_genes(truth: NDArray[np.floating[Any]], target_sum: float) -> list[int]:
    """Columns of a gene of high, middle and low abundance: of a fifth of the genes each, the one that varies most."""
    order = np.argsort(truth.mean(axis=0))
    variation = np.log1p(truth * target_sum).std(axis=0)
    genes = []
    for low in (0.8, 0.4, 0.1):
        start = int(low * len(order))
        tier = order[start : max(start + 1, int((low + 0.2) * len(order)))]
        genes.append(int(tier[np.argmax(variation[tier])]))
    return genes


def draw(adata: AnnData, genes: list[int], imputed: NDArray[np.floating[Any]], target_sum: float, path: Path) -> None:
    """Draw true, observed and imputed expression side by side in space, a row per gene, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    library = np.maximum(np.asarray(adata.X.sum(axis=1)).ravel(), 1.0)
    place = adata.obsm["spatial"]
    figure = Figure(figsize=(12, 2.9 * len(genes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(genes), 3, squeeze=False)
    size = float(np.clip(20000 / adata.n_obs, 0.6, 20))
    for row, gene, tier in zip(axes, genes, ("high", "middle", "low")):
        observed = np.asarray(adata.X[:, gene].todense()).ravel()
        columns = {
            "true": np.log1p(adata.layers["true_rate"][:, gene] * target_sum),
            f"observed ({np.mean(observed == 0):.0%} zeros)": np.log1p(observed / library * target_sum),
            "imputed": np.log1p(imputed[:, gene] * target_sum),
        }
        top = float(np.quantile(columns["true"], 0.995))
        for ax, (name, values) in zip(row, columns.items()):
            order = np.argsort(values)
            limit = max(float(np.quantile(values, 0.995)), 1e-9) if name.startswith("observed") else top
            points = ax.scatter(
                *place[order, :2].T,
                c=values[order],
                s=size,
                cmap="viridis",
                vmin=0,
                vmax=limit,
                linewidths=0,
                rasterized=True,
            )
            ax.set_aspect("equal")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_title(f"{adata.var_names[gene]} ({tier} abundance): {name}" if ax is row[0] else name, fontsize=10)
            figure.colorbar(points, ax=ax, shrink=0.75, pad=0.01)
    figure.savefig(path, dpi=130)


def run_demo(
    folder: Path,
    *,
    n_fovs: int,
    n_cells: int,
    n_genes: int,
    max_epochs: int | None,
    random_state: int,
    progress: bool,
) -> pd.DataFrame:
    """Simulate, impute, compare, and save ``demo.h5ad`` and ``demo.png`` in ``folder``; return the comparison."""
    from . import datasets, tl

    adata = datasets.simulated_tissue(n_fovs=n_fovs, n_cells=n_cells, n_genes=n_genes, random_state=random_state)
    folder.mkdir(parents=True, exist_ok=True)
    zeros = 1 - adata.X.nnz / (adata.n_obs * adata.n_vars)
    logger.info("simulated %d cells × %d genes in %d fields of view, %.0f%% zeros", *adata.shape, n_fovs, 100 * zeros)
    tl.impute(
        adata,
        library_key="fov",
        output="rate",
        max_epochs=max_epochs,
        random_state=random_state,
        progress=progress,
    )
    target_sum = adata.uns["spaformer"]["params"]["target_sum"]
    share = adata.layers["spaformer"] / target_sum
    truth = adata.layers["true_rate"]
    table = compare_with_truth(truth, {**baselines(adata), "spaformer_sc": share}, target_sum)
    genes = example_genes(truth, target_sum)
    draw(adata, genes, share, target_sum, folder / "demo.png")
    write_atomically(adata, folder / "demo.h5ad")
    print("Agreement with the simulated truth (cells × genes):\n")
    print("  method                median Pearson per gene   RMSE of log1p")
    for name, row in table.iterrows():
        print(f"  {name:<20}  {row['pearson']:23.3f}   {row['rmse']:13.3f}")
    print(f"\nSaved {folder / 'demo.h5ad'} and {folder / 'demo.png'}.")
    print("Next, in Python (.venv/bin/python):\n")
    print("  import anndata as ad, spaformer_sc as sf")
    print(f"  adata = ad.read_h5ad('{folder / 'demo.h5ad'}')")
    print("  sf.pl.imputed(adata, 'EPCAM', save='EPCAM.png')   # a plot")
    print("  sf.pl.report(adata, 'report.html')                # a page: how good it is, which genes to trust")
    return table
