"""Does imputing help biology? Cell types, spatially variable genes and borders between types, from half the counts.

    python benchmarks/biology.py --out biology
    python benchmarks/biology.py --data embryo.h5ad:cell_type cortex.h5ad:layer --library-key fov --out biology

A run is a data set with its labels, a method and a seed; runs that the results file holds are skipped.
`benchmarks/README.md` says what is measured and how the tables are read.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import Row, checksum, package_files, pinned_environment, read_rows, write_rows

SIMULATED = "simulated:cell_type"
KEY = ("data", "labels", "library_key", "method", "quality", "seed")
SCORES = {
    "ari": "ARI",
    "nmi": "NMI",
    "purity": "kNN purity",
    "border": "kNN purity at borders",
    "moran": "spatial genes, Spearman",
    "top": "spatial genes, shared of 50",
    "truth": "spatial genes, Spearman with the truth",
    "mixing": "towards the other type at borders (lower is better)",
}
COLUMNS = (*KEY, "code", "n_cells", "n_labels", *SCORES)
N_COMPONENTS, N_NEIGHBORS, N_TOP = 30, 15, 50
LEAST_CELLS = 20
"""Cells that a label needs to be scored."""


@dataclass
class Result:
    """What a method makes of counts: a representation (cells, dimensions), and log-normalised values (cells, genes)."""

    representation: Any
    values: Any


# ------------------------------------------------------------------------------------------------------------- methods


def lognorm(counts: Any) -> Any:
    """Return log1p of counts per median library size, dense (cells, genes)."""
    import numpy as np

    library = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    return np.log1p(np.asarray(counts.todense()) / library[:, None] * np.median(library))


def components(values: Any, seed: int) -> Any:
    """Principal components (cells, 30)."""
    from sklearn.decomposition import PCA

    n = min(N_COMPONENTS, *values.shape)
    return PCA(n, random_state=seed, svd_solver="randomized").fit_transform(values)


def observed(adata: Any, library_key: str, quality: str, seed: int) -> dict[str, Result]:
    """Half of the counts as they are."""
    values = lognorm(adata.X)
    return {"counts": Result(components(values, seed), values)}


def neighbours(adata: Any, library_key: str, quality: str, seed: int) -> dict[str, Result]:
    """Mean of each cell and its six neighbours in space: what smoothing over borders looks like."""
    import numpy as np
    from scipy import sparse

    graph = adata.obsp["near"] + sparse.eye(adata.n_obs)
    values = np.asarray((graph / graph.sum(axis=1)) @ lognorm(adata.X))
    return {"mean of neighbours in space": Result(components(values, seed), values)}


def spaformer(adata: Any, library_key: str, quality: str, seed: int) -> dict[str, Result]:
    """Impute; both the latent space and principal components of the imputed layer."""
    import spaformer_sc as sf

    sf.tl.impute(adata, library_key=library_key, quality=quality, random_state=seed, progress=False)
    values = adata.layers["spaformer"]
    return {
        "spaformer, latent space": Result(adata.obsm["X_spaformer"], values),
        "spaformer, PCA of the layer": Result(components(values, seed), values),
    }


def magic(adata: Any, library_key: str, quality: str, seed: int) -> dict[str, Result]:
    """Run MAGIC as its authors recommend: square roots of normalised counts, default settings."""
    import numpy as np
    from magic import MAGIC

    counts = np.asarray(adata.X.todense())
    library = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    roots = np.sqrt(counts / library * np.median(library))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smooth = MAGIC(random_state=seed, verbose=0).fit_transform(roots)
    values = np.log1p(np.square(np.maximum(smooth, 0)))
    return {"MAGIC, PCA": Result(components(values, seed), values)}


def scvi(adata: Any, library_key: str, quality: str, seed: int) -> dict[str, Result]:
    """scVI with its defaults."""
    import numpy as np
    from anndata import AnnData
    from scvi import settings
    from scvi.model import SCVI

    settings.verbosity = logging.ERROR
    settings.seed = seed
    full = np.asarray(adata.X.sum(axis=1)).ravel() > 0
    given = AnnData(adata.X[full].copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SCVI.setup_anndata(given)
        model = SCVI(given, gene_likelihood="nb")
        model.train(accelerator="cpu", enable_progress_bar=False, logger=False, early_stopping=True)
        target_sum = float(np.median(np.asarray(given.X.sum(axis=1))))
        rates = model.get_normalized_expression(library_size=target_sum, return_numpy=True)
        latent = model.get_latent_representation()
    found = np.zeros((adata.n_obs, latent.shape[1])), np.zeros(adata.shape)
    found[0][full], found[1][full] = latent, np.log1p(rates)
    return {"scVI, latent space": Result(*found)}


METHODS: dict[str, Callable[..., dict[str, Result]]] = {
    "counts": observed,
    "neighbours": neighbours,
    "spaformer": spaformer,
    "magic": magic,
    "scvi": scvi,
}


# -------------------------------------------------------------------------------------------------------------- scores


def load(data: str, labels: str, library_key: str, seed: int) -> tuple[Any, Any, Any]:
    """Half of the counts with positions, FOVs and neighbours; all counts; and the label of each cell as a number.

    Where the true rates are known, they are a layer of the first.
    """
    import anndata as ad
    import numpy as np
    import pandas as pd
    from scipy import sparse

    import spaformer_sc as sf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of squidpy, about itself
        import squidpy as sq

    given = sf.datasets.simulated_tissue(random_state=seed) if data == "simulated" else ad.read_h5ad(data)
    given = given[~given.obs[labels].isna()]
    obs = pd.DataFrame(index=given.obs_names)
    fovs = given.obs[library_key].astype(str) if library_key in given.obs else ["all"] * given.n_obs
    obs[library_key] = pd.Categorical(fovs)
    everything = sparse.csr_matrix(given.X).astype(np.float32)
    positions = np.asarray(given.obsm["spatial"])
    adata = ad.AnnData(everything, obs=obs, var=given.var[[]], obsm={"spatial": positions})
    near = sq.gr.spatial_neighbors_knn(adata, n_neighs=6, library_key=library_key, copy=True)
    adata.obsp["near"] = near.connectivities
    if "true_rate" in given.layers:
        adata.layers["true_rate"] = given.layers["true_rate"]
    adata.X = sf.metrics.thin(everything, 0.5, random_state=seed).train
    return adata, everything, given.obs[labels].astype("category").cat.codes.to_numpy()


def clusters(representation: Any, n: int, seed: int) -> Any:
    """Leiden clusters (cells,) at the resolution that gives about ``n`` of them."""
    import anndata as ad
    import numpy as np
    import scanpy as sc

    cells = ad.AnnData(np.asarray(representation, dtype=np.float32))
    sc.pp.neighbors(cells, n_neighbors=N_NEIGHBORS, use_rep="X", random_state=seed)
    low, high = 0.02, 5.0
    best = None
    for _ in range(10):
        resolution = float(np.sqrt(low * high))
        sc.tl.leiden(cells, resolution=resolution, flavor="igraph", n_iterations=2, random_state=seed)
        found = cells.obs["leiden"].astype(int).to_numpy()
        n_found = found.max() + 1
        if best is None or abs(n_found - n) < abs(best.max() + 1 - n):
            best = found
        if n_found == n:
            break
        low, high = (resolution, high) if n_found < n else (low, resolution)
    return best


def morans(values: Any, adata: Any) -> Any:
    """Moran's I of each gene (genes,), by squidpy; 0 for a gene without variation."""
    import anndata as ad
    import numpy as np
    import squidpy as sq

    shown = ad.AnnData(np.asarray(values, dtype=np.float32), obsp={"spatial_connectivities": adata.obsp["near"]})
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = sq.gr.spatial_autocorr(shown, mode="moran", n_perms=None, copy=True, show_progress_bar=False)
    return found["I"].reindex(shown.var_names).fillna(0).to_numpy()


def towards_neighbours(values: Any, reference: Any, labels: Any, near: Any, at_border: Any) -> float:
    """How far expression of cells at borders lies on the way from their own type to that of their neighbours.

    For a cell of one type with most neighbours of another: the position of its values along the line between the means
    of the two types away from borders, 0 at its own and 1 at the other. Both means are of the values themselves, so
    that shrinkage plays no part. The mean over cells; ``reference`` says which cells and types are used.
    """
    import numpy as np

    n = labels.max() + 1
    around = np.asarray(near @ np.eye(n)[labels])
    around[np.arange(len(labels)), labels] = 0
    other = around.argmax(axis=1)
    inner = ~at_border
    enough = np.bincount(labels[inner], minlength=n) >= LEAST_CELLS
    inside = [inner & (labels == kind) for kind in range(n)]
    means = np.stack([values[of].mean(axis=0) if enough[kind] else values[0] for kind, of in enumerate(inside)])
    used = np.flatnonzero(at_border & enough[labels] & enough[other] & reference)
    direction = means[other[used]] - means[labels[used]]
    position = ((values[used] - means[labels[used]]) * direction).sum(axis=1)
    return float((position / np.maximum(np.square(direction).sum(axis=1), 1e-12)).mean())


def score(found: Result, adata: Any, everything: Any, labels: Any, seed: int) -> dict[str, float]:
    """All scores of a representation and its values."""
    import numpy as np
    from scipy.stats import spearmanr
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.neighbors import NearestNeighbors

    near = adata.obsp["near"]
    rows, columns = near.nonzero()
    differs = np.bincount(rows, labels[rows] != labels[columns], len(labels)) / np.maximum(near.getnnz(axis=1), 1)
    at_border = differs > 0.5
    group = clusters(found.representation, labels.max() + 1, seed)
    index = NearestNeighbors(n_neighbors=N_NEIGHBORS + 1).fit(found.representation)
    alike = index.kneighbors(return_distance=False)[:, :N_NEIGHBORS]
    purity = (labels[alike] == labels[:, None]).mean(axis=1)
    true, mine = morans(lognorm(everything), adata), morans(found.values, adata)
    top = set(np.argsort(-true)[:N_TOP]) & set(np.argsort(-mine)[:N_TOP])
    full = np.asarray(adata.X.sum(axis=1)).ravel() > 0
    truth = float("nan")
    if "true_rate" in adata.layers:
        rates = np.log1p(adata.layers["true_rate"] * np.median(np.asarray(adata.X.sum(axis=1))))
        truth = float(spearmanr(morans(rates, adata), mine).statistic)
    return {
        "ari": adjusted_rand_score(labels, group),
        "nmi": normalized_mutual_info_score(labels, group),
        "purity": float(purity.mean()),
        "border": float(purity[at_border].mean()),
        "moran": float(spearmanr(true, mine).statistic),
        "top": len(top) / min(N_TOP, len(true)),
        "truth": truth,
        "mixing": towards_neighbours(found.values, full, labels, near, at_border),
    }


def run(data: str, labels: str, library_key: str, method: str, quality: str, seed: int) -> dict[str, Any]:
    """Score one method; several results if it has several representations."""
    adata, everything, codes = load(data, labels, library_key, seed)
    found = METHODS[method](adata, library_key, quality, seed)
    facts = {"n_cells": adata.n_obs, "n_labels": int(codes.max()) + 1}
    return {name: facts | score(result, adata, everything, codes, seed) for name, result in found.items()}


# -------------------------------------------------------------------------------------------------------------- tables


def tables(rows: list[Row]) -> str:
    """Make a table for each data set, in Markdown."""
    page = []
    for data, labels in sorted({(row["data"], row["labels"]) for row in rows}):
        here = [row for row in rows if (row["data"], row["labels"]) == (data, labels)]
        page += [f"**{data}**, {here[0]['n_cells']} cells, {here[0]['n_labels']} labels (`{labels}`)", ""]
        page += ["| method | " + " | ".join(SCORES.values()) + " |", "|" + "---|" * (len(SCORES) + 1)]
        for method in sorted({row["method"] for row in here}):
            cells = []
            for name in SCORES:
                values = [float(row[name]) for row in here if row["method"] == method and row[name] != "nan"]
                if not values:
                    cells.append("")
                    continue
                error = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{error}")
            page.append(f"| {method} | " + " | ".join(cells) + " |")
        page.append("")
    return "\n".join(page)


def draw(rows: list[Row], path: Path) -> None:
    """Draw all scores: a panel each, data sets side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    methods = sorted({row["method"] for row in rows})
    figure, axes = plt.subplots(2, 4, figsize=(15, 8), layout="constrained")
    for ax, (name, title) in zip(axes.ravel(), SCORES.items(), strict=True):
        scored = [row for row in rows if row[name] != "nan"]
        sets = sorted({(row["data"], row["labels"]) for row in scored})
        for number, method in enumerate(methods):
            heights = []
            for place in sets:
                of = [r for r in scored if (r["data"], r["labels"]) == place and r["method"] == method]
                heights.append(statistics.mean(float(r[name]) for r in of) if of else 0.0)
            offset = 0.8 * number / len(methods)
            ax.bar([i + offset for i in range(len(sets))], heights, 0.75 / len(methods), label=method)
        ax.set_title(title, fontsize=9)
        names = [f"{data[:16]}: {label}" for data, label in sets]
        ax.set_xticks([i + 0.35 for i in range(len(sets))], names, fontsize=7, rotation=20, ha="right")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside lower center", ncols=6
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[SIMULATED], help="FILE.h5ad:COLUMN, a column of obs with labels")
    parser.add_argument("--library-key", default="fov", help="column of obs with the field of view (default: fov)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--quality", choices=("fast", "default", "best"), default="default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs.csv, tables.md and biology.png")
    options = parser.parse_args(arguments)
    places = [tuple(data.rsplit(":", 1)) for data in dict.fromkeys(options.data)]
    for place in places:
        if len(place) != 2 or (place[0] != "simulated" and not Path(place[0]).is_file()):
            parser.error(f"--data: {':'.join(place)} is no FILE.h5ad:COLUMN of a file that is there")
    path = options.out / "runs.csv"
    rows = read_rows(path, COLUMNS)
    here = Path(__file__)
    ours = checksum(file.read_bytes() for file in (*package_files(), here))
    theirs = checksum([here.read_bytes()])
    jobs = []
    for seed in dict.fromkeys(options.seeds):
        for data, labels in places:
            for method in dict.fromkeys(options.methods):
                quality = options.quality if method == "spaformer" else ""
                code = ours if method == "spaformer" else theirs
                name = data if data == "simulated" else Path(data).stem
                key = (name, labels, options.library_key, quality, str(seed), code)
                have = [
                    row
                    for row in rows
                    if tuple(row[c] for c in ("data", "labels", "library_key", "quality", "seed", "code")) == key
                ]
                if not any(METHOD_NAMES[row["method"]] == method for row in have):
                    jobs.append((method, data, key))

    failed = 0

    def job(given: tuple[str, str, tuple[str, ...]]) -> tuple[str, tuple[str, ...], dict[str, Any] | None]:
        method, data, key = given
        call = {"data": data, "labels": key[1], "library_key": key[2], "method": method}
        call |= {"quality": options.quality, "seed": int(key[4])}
        command = [sys.executable, str(here), "--job", json.dumps(call)]
        done = subprocess.run(command, env=pinned_environment(options.threads), check=False, stdout=subprocess.PIPE)
        return method, key, None if done.returncode else json.loads(done.stdout.decode().splitlines()[-1])

    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (method, key, answer) in enumerate(pool.map(job, jobs), 1):
            state = "failed" if answer is None else "done"
            print(f"[{number}/{len(jobs)}] {key[0]} {key[1]} {method} {key[4]}: {state}", file=sys.stderr, flush=True)
            failed += answer is None
            for name, scores in (answer or {}).items():
                place = dict(zip(("data", "labels", "library_key", "quality", "seed", "code"), key, strict=True))
                same = place | {"method": name}
                rows = [row for row in rows if any(row[column] != same[column] for column in KEY)]
                rows.append(same | {column: str(value) for column, value in scores.items()})
            write_rows(path, COLUMNS, rows)
    asked = [r for r in rows if r["library_key"] == options.library_key and r["quality"] in ("", options.quality)]
    old = sum(row["code"] != (ours if row["quality"] else theirs) for row in asked)
    if old:
        print(f"{old} of {len(asked)} rows were made by other code; they are kept.", file=sys.stderr)
    if asked:
        page = tables(asked)
        (options.out / "tables.md").write_text(page)
        draw(asked, options.out / "biology.png")
        print(page)
    return int(failed > 0)


METHOD_NAMES = {
    "counts": "counts",
    "mean of neighbours in space": "neighbours",
    "spaformer, latent space": "spaformer",
    "spaformer, PCA of the layer": "spaformer",
    "MAGIC, PCA": "magic",
    "scVI, latent space": "scvi",
}
"""Method that each result is of."""


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--job":
        logging.getLogger("spaformer_sc").setLevel(logging.ERROR)
        print(json.dumps(run(**json.loads(sys.argv[2]))), flush=True)
    else:
        sys.exit(main())
