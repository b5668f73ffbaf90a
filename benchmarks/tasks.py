"""What one run of the accuracy benchmark does: make a split, hand it to a method, score what comes back.

A split lies in a folder: ``task.h5ad`` is all that a method is given, ``held`` what it is scored on, ``scratch`` a
place where methods of the same split may leave predictions for one another.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from peers import load as load_method
from runs import checksum, peak_mib
from scipy import sparse

from spaformer_sc import metrics
from spaformer_sc.datasets import simulated_tissue

SIMULATED = "simulated"
TARGET_SUM = 250.0
EXTRA = "spaformer_sc[benchmark]"


def load(data: str, library_key: str) -> tuple[sparse.csr_matrix, NDArray[Any], NDArray[Any] | None]:
    """Return counts, positions and fields of view of all cells; None for the last if the file has no such key."""
    adata = simulated_tissue(random_state=0) if data == SIMULATED else ad.read_h5ad(data)
    if library_key not in adata.obs:
        print(f"{data} has no obs[{library_key!r}]: using positions without fields of view", file=sys.stderr)
    fovs = adata.obs[library_key].to_numpy().astype(str) if library_key in adata.obs else None
    return sparse.csr_matrix(adata.X).astype(np.float32), np.asarray(adata.obsm["spatial"]), fovs


def make_task(data: str, library_key: str, protocol: str, seed: int, folder: str) -> dict[str, Any]:
    """Split a data set into a folder; returns the facts about it that go into the results file."""
    counts, coords, fovs = load(data, library_key)
    n_fovs = 0 if fovs is None else len(np.unique(fovs))
    if protocol == "blocks" and n_fovs < 2:
        fovs = np.char.add("quarter", metrics.quarters(coords).astype(str))
    split = metrics.make_split(counts, protocol, fovs, random_state=seed, target_sum=TARGET_SUM)

    place = Path(folder)
    (place / "held").mkdir(parents=True)
    (place / "scratch").mkdir()
    obs = pd.DataFrame(index=pd.RangeIndex(counts.shape[0]).astype(str))
    if fovs is not None:
        obs["fov"] = pd.Categorical(fovs)
    adata = ad.AnnData(split.train, obs=obs, obsm={"spatial": coords})
    if split.missing is not None:
        adata.layers["missing"] = split.missing
    adata.write_h5ad(place / "task.h5ad")
    parts = []
    for name in ("train", "validation", "test"):
        matrix = getattr(split, name)
        sparse.save_npz(place / "held" / f"{name}.npz", matrix, compressed=False)
        parts += [matrix.indptr, matrix.indices, matrix.data]
    for name in ("validation_mask", "test_mask"):
        if (mask := getattr(split, name)) is not None:
            np.save(place / "held" / f"{name}.npy", mask)
            parts.append(mask)
    facts = {
        "n_cells": counts.shape[0],
        "n_genes": counts.shape[1],
        "n_fovs": n_fovs,
        "split": checksum(part.tobytes() for part in parts),
    }
    (place / "task.json").write_text(json.dumps({"protocol": protocol, "random_state": seed}))
    return facts


def read_split(folder: Path, protocol: str) -> metrics.Split:
    """Read what predictions of a split are scored on."""
    counts = {name: sparse.load_npz(folder / "held" / f"{name}.npz") for name in ("train", "validation", "test")}
    masks = {
        name: None if protocol == "thinning" else np.load(folder / "held" / f"{name}.npy")
        for name in ("validation_mask", "test_mask")
    }
    return metrics.Split(protocol, **counts, **masks, target_sum=TARGET_SUM)


def run_method(method: str, folder: str) -> dict[str, Any]:
    """Impute and score; returns scores and costs, or ``{"not_installed": message}``."""
    place = Path(folder)
    task = json.loads((place / "task.json").read_text())
    protocol, seed = task["protocol"], task["random_state"]
    if method == "ceiling":
        split = read_split(place, protocol)
        ceiling = metrics.noise_ceiling(split.train, split.test, seed)
        return {"gene_pearson": float(np.nanmedian(ceiling))}

    adata = ad.read_h5ad(place / "task.h5ad")
    task |= {"output": "rate" if protocol == "thinning" else "lognorm", "target_sum": TARGET_SUM}
    adata.uns["task"] = task | {"scratch": str(place / "scratch")}
    try:
        impute = truth if method == "truth" else load_method(method)
        start, cpu_start = time.perf_counter(), time.process_time()
        prediction, scale = impute(adata)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        peak = round(peak_mib(), 1)
        before = float(adata.uns["task"].get("seconds_before", 0))  # what reused predictions took to make
    except ImportError as error:
        if EXTRA not in str(error):
            raise
        return {"not_installed": str(error)}
    costs = {"seconds": round(seconds + before, 2), "cpu_seconds": round(cpu_seconds + before, 2)}
    costs["peak_mib"] = peak
    return metrics.score_prediction(read_split(place, protocol), np.asarray(prediction), scale) | costs


def truth(adata: ad.AnnData) -> tuple[NDArray[np.float32], str]:
    r"""Predict for the simulated tissue as somebody would who knows all of it but the noise.

    With the expected counts :math:`m_{ig}` (true rate, depth and leakage) and the variance :math:`v_g` of the Gamma
    variable of each entry: under thinning the mean of the rate given the visible count :math:`y` of the half that is
    seen, :math:`m (1/v + y) / (1/v + m/2)` (conjugate Gamma posterior); otherwise the mean of
    :math:`\log(1 + T x / L)` over the negative binomial :math:`x`, where :math:`L` is the cell's visible library plus
    what is expected of its other hidden entries.
    """
    from spaformer_sc.datasets._simulated import TOUCHING_RADIUS, _adjacency, _expected_counts

    tissue = simulated_tissue(random_state=0)
    touching = _adjacency(tissue.obsm["spatial"], TOUCHING_RADIUS)
    rate, depth = tissue.layers["true_rate"], tissue.obs["true_depth"].to_numpy()
    expected = _expected_counts(rate, depth, touching, np.arange(tissue.n_obs))
    v = tissue.var["dispersion"].to_numpy()
    if adata.uns["task"]["output"] == "rate":
        posterior = expected * (1 + v * adata.X.toarray()) / (1 + v * expected / 2)
        return posterior.astype(np.float32), "rate"

    hidden = np.where(adata.layers["missing"], expected, 0).sum(axis=1, keepdims=True)
    others = np.maximum(np.asarray(adata.X.sum(axis=1)).reshape(-1, 1) + hidden - expected, 1)
    probability = np.exp(-np.log1p(expected * v) / v)
    mean, left, x = np.zeros_like(expected), 1 - probability, 0
    while left.max() > 1e-6 and x < 1000:
        probability *= (1 + x * v) / (x + 1) * expected / (1 + expected * v)
        x += 1
        mean += probability * np.log1p(x / (others + x) * TARGET_SUM)
        left -= probability
    return mean.astype(np.float32), "lognorm"
