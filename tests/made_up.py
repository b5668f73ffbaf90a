"""A result, an attribution and a reach that nothing was trained for: the same everywhere, to test drawing with."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData

from spaformer_sc.interpret import Attribution, Reach
from spaformer_sc.training.posterior import LEVELS as PERCENT
from spaformer_sc.training.posterior import STRATA
from spaformer_sc.training.reliability import LEVELS

SIDE = 12
GENES = [f"gene{number}" for number in range(30)]


def result() -> AnnData:
    """Two fields of 12 × 12 cells beside one another, 30 genes: all that `sf.tl.impute` writes and plots read."""
    row, column = (axis.ravel() for axis in np.mgrid[:SIDE, : 2 * SIDE])
    n, genes = len(row), np.arange(len(GENES))
    wave = 1 + np.sin(row[:, None] / 3 + genes / 2) * np.cos(column[:, None] / 4 - genes / 3)
    counts = np.floor(wave + (row[:, None] * 7 + column[:, None] * 3 + genes) % 5 / 4).astype(np.float32)
    depth, names = counts.sum(axis=1), [f"cell{number}" for number in range(n)]
    adata = AnnData(counts, obs=pd.DataFrame({"fov": np.where(column < SIDE, "left", "right")}, index=names))
    adata.obs["fov"] = adata.obs["fov"].astype("category")
    adata.var_names = GENES
    adata.obsm["spatial"] = np.stack([10.0 * column, 10.0 * row], axis=1)
    adata.layers["spaformer"] = np.log1p(wave).astype(np.float32)
    adata.layers["spaformer_sd"] = (0.1 + 0.05 * wave).astype(np.float32)
    adata.obs["spaformer_depth"] = depth
    adata.obs["spaformer_reliability"] = pd.Categorical(np.take(LEVELS, row % 3), LEVELS)
    surety = (genes - 10.0) / 3
    verdict = np.where(surety > 3, LEVELS[2], np.where(surety > 1.73, LEVELS[1], LEVELS[0]))
    adata.var["spaformer_reliability"] = pd.Categorical(verdict, LEVELS)
    adata.var["spaformer_gain_over_baseline"] = 0.02 * surety
    adata.var["spaformer_gain_over_baseline_se"] = 0.02
    adata.var["spaformer_true_correlation"] = np.clip(0.3 + 0.1 * surety, -1, 1)
    adata.var["spaformer_true_correlation_se"] = 0.05
    adata.var["spaformer_held_out"] = 5 + 10 * genes
    levels = np.asarray(PERCENT)
    adata.uns["spaformer"] = {
        "params": {
            "spaformer_sc": "0.0.0", "output": "lognorm", "target_sum": float(np.median(depth)), "genes": "all",
            "key_added": "spaformer", "preset": "default", "quality": "fast", "zeros": "impute", "n_genes": len(GENES),
            "library_key": ["fov"], "spatial_key": "spatial", "connectivity_key": None, "layer": None, "missing": None,
            "graph": "knn", "n_neighbors": 6, "radius": None, "tile_size": 4000, "random_state": 0, "devices": 1,
            "fractional": False, "model": {"encoder": "performer", "decoder": "nb", "positional": []}, "training": {},
            "graph_summary": {"n_components": 2, "n_edges": 900, "n_fovs": 2, "n_tiles": 2, "typical_distance": 10.0},
            "networks": {"form": ["plain", "wide"], "weight": [0.6, 0.4], "weight_where_missing": [0.6, 0.4]},
        },
        "history": {
            "network": [0] * 5 + [1] * 5, "step": [80, 160, 240, 320, 400] * 2, "epoch": list(range(10)),
            "loss": [2.0] * 10, "validation": [0.30, 0.36, 0.38, 0.37, 0.35, 0.28, 0.35, 0.39, 0.40, 0.38],
        },
        "scores": {
            "gain": 0.4, "gain_neighbours": 0.25, "gain_over_baseline": 0.07, "gain_over_baseline_se": 0.01,
            "deviance_explained": 0.12, "median_pearson": 0.05, "better_than_baseline": True,
        },
        "fovs": {
            "fov": ["left", "right"], "n_cells": [n // 2, n // 2], "held_out": [2000, 2500], "gain": [0.4, 0.4],
            "gain_se": [0.01, 0.01], "gain_over_baseline": [0.08, -0.01], "gain_over_baseline_se": [0.01, 0.02],
            "reliability": [LEVELS[2], LEVELS[0]],
        },
        "posterior": {
            "levels": list(PERCENT), "n_scored": 1000, "coverage": list(levels + 0.01 * np.sin(np.pi * levels)),
            "strata": {name: list(levels + 0.02 * (i - 1) * np.sin(np.pi * levels)) for i, name in enumerate(STRATA)},
        },
    }  # fmt: skip
    return adata


def with_encodings() -> AnnData:
    """The same with an encoding that has a sign and one that has none, as `sf.pp.positional_encoding` writes them."""
    adata = result()
    x, y = adata.obsm["spatial"].T / 100
    waves = np.stack([np.cos(2 * x), np.cos(3 * y), np.cos(2 * x) * np.cos(3 * y)], axis=1)
    for name, values in (("laplacian", waves), ("random_walk", np.abs(waves[:, 1:]))):
        adata.obsm[f"X_pe_{name}"] = values.astype(np.float32)
        params = {"encoding": name, "library_key": ["fov"], "spatial_key": "spatial"}
        adata.uns[f"X_pe_{name}"] = {"params": params}
    return adata


def attribution(adata: AnnData) -> Attribution:
    """What moved `gene3` in a cell in the middle of the left field."""
    cell = adata.obs_names[6 * 2 * SIDE + 6]
    left = adata[(adata.obs["fov"] == "left") & (adata.obs_names != cell)]
    apart = left.obsm["spatial"] - adata[cell].obsm["spatial"]
    distance = np.linalg.norm(apart, axis=1)
    contribution = np.sin(apart[:, 0] / 15 + apart[:, 1] / 40) * np.exp(-distance / 20)
    around = {"distance": distance, "hops": np.ceil(distance / 15), "contribution": contribution}
    own = 0.3 * np.cos(np.arange(len(GENES)) * 1.3) / (1 + np.arange(len(GENES)))
    genes = pd.DataFrame({"own": own, "neighbours": contribution.sum() / len(GENES)}, index=GENES)
    neighbours = pd.DataFrame(around, index=left.obs_names).sort_values("distance", kind="stable")
    return Attribution(cell, "gene3", "log rate", -3.0, -3.0 + genes.to_numpy().sum(), genes, neighbours)


def reach() -> Reach:
    """A curve that rises fast and then slowly."""
    distance = np.linspace(5, 200, 100)
    rise = 1 - np.exp(-distance / 30)
    curve = pd.DataFrame({"distance": distance, "attribution": rise / rise[-1], "cells": (distance / 200) ** 2})
    cells = pd.DataFrame({"gene": ["gene1"] * 3, "own_share": [0.4, 0.5, 0.6], "error": [0.0] * 3}, index=list("abc"))
    return Reach(curve, 21.0, 69.0, 0.5, cells)
