"""Score imputation methods on held-out counts: half of the counts in, the other half to be predicted.

    python benchmarks/heldout.py --data sample.h5ad --library-key fov --seeds 0 1 2 --out results.csv --threads 2

Every run (data set, method, seed) has a process of its own, which makes the split from the seed, imputes and scores.
Runs that the results file holds already, made by the same code, are skipped. `benchmarks/README.md` says what the
columns mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runs import Row, checksum, package_files, peak_mib, pinned_environment, read_rows, write_rows

TUNED = ("fov_gene_mean", "spatial_knn_mean", "expression_knn", "truncated_svd", "kl_nmf")
DEFAULT_METHODS = ("gene_mean", *TUNED, "spaformer")
VARIANTS = ("spaformer_no_attention", "spaformer_fast", "spaformer_best")
METHODS = (*DEFAULT_METHODS, *VARIANTS, *(f"{method}+own" for method in TUNED))
KEY = ("data", "library_key", "method", "seed", "threads", "code")
FACTS = ("n_cells", "n_genes", "n_fovs", "split")
SCORES = ("gain", "deviance_explained", "gene_pearson", "seconds", "cpu_seconds", "peak_mib")
COLUMNS = (*KEY, *FACTS, *SCORES)
TRAIN_SHARE = 0.5
SIMULATED = "simulated"

# ------------------------------------------------------------------------------------------ one run, in its own process


def load(data: str, library_key: str) -> tuple[Any, Any, Any]:
    """Return counts, positions and fields of view of all cells; None for the last if the file has no such key."""
    if data == SIMULATED:
        from spaformer_sc.datasets import simulated_tissue

        adata = simulated_tissue(random_state=0)
    else:
        import anndata as ad

        adata = ad.read_h5ad(data)
    if library_key and library_key not in adata.obs:
        print(f"{data} has no obs[{library_key!r}]: using positions without fields of view", file=sys.stderr)
    fovs = adata.obs[library_key].to_numpy() if library_key in adata.obs else None
    return adata.X, adata.obsm["spatial"], fovs


def split_checksum(split: Any) -> str:
    """Return a checksum of both parts of a split, equal for equal splits."""
    return checksum(
        array.tobytes() for part in (split.train, split.held) for array in (part.indptr, part.indices, part.data)
    )


def code_version(method: str) -> str:
    """Return a checksum of the code that a method consists of, so that changed code is run again."""
    package = package_files() if method.startswith("spaformer") else []
    return checksum(file.read_bytes() for file in [Path(__file__).resolve().parent / "peers.py", *package])


def run_once(data: str, method: str, seed: int, library_key: str) -> dict[str, Any]:
    """Split, impute and score; returns the columns of the results file that the parent does not know."""
    import numpy as np
    from peers import METHODS as IMPUTERS

    from spaformer_sc import metrics

    counts, coords, fovs = load(data, library_key)
    split = metrics.thin(counts, TRAIN_SHARE, random_state=seed)
    del counts
    start, cpu_start = time.perf_counter(), time.process_time()
    prediction, scale = IMPUTERS[method](split.train, coords, fovs, seed)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = peak_mib()
    rates = np.expm1(prediction) if scale == "lognorm" else prediction
    return {
        "n_cells": split.train.shape[0],
        "n_genes": split.train.shape[1],
        "n_fovs": 0 if fovs is None else len(np.unique(fovs)),
        "split": split_checksum(split),
        "gain": metrics.poisson_gain(split.held, rates, split.train),
        "deviance_explained": metrics.deviance_explained(split.held, rates, split.train),
        "gene_pearson": float(np.nanmedian(metrics.gene_pearson_lognorm(split.held, rates))),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_mib": round(peak, 1),
    }


# ------------------------------------------------------------------------------------------------------------ all runs


def run_in_process(data: str, method: str, seed: int, library_key: str, threads: int) -> dict[str, Any] | None:
    """Run one method in a new process with a fixed number of threads; None if it failed."""
    environment = pinned_environment(threads)
    job = json.dumps({"data": data, "method": method, "seed": seed, "library_key": library_key})
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--job", job, str(answer)]
        if subprocess.run(command, env=environment, check=False).returncode != 0 or not answer.exists():
            return None
        return dict(json.loads(answer.read_text()))


def _spread(values: list[float], digits: int) -> str:
    mean = f"{round(statistics.mean(values), digits) + 0.0:.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(rows: list[Row]) -> str:
    """Make one table per data set, methods ordered by their gain, mean ± standard deviation over seeds.

    Raises
    ------
    SystemExit
        If methods were scored on different splits of the same data set and seed.
    """
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        chosen = [row for row in rows if row["data"] == data]
        for seed in {row["seed"] for row in chosen}:
            if len({row["split"] for row in chosen if row["seed"] == seed}) > 1:
                raise SystemExit(f"{data}, seed {seed}: methods saw different splits; remove these rows and run again.")
        first = chosen[0]
        lines += [
            f"**{data}**: {first['n_cells']} cells × {first['n_genes']} genes, "
            f"{first['n_fovs']} fields of view, {first['threads']} thread(s)",
            "",
            "| method | seeds | nats per held count | deviance explained | median gene Pearson | seconds | CPU seconds "
            "| peak MiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        by_method = {
            method: {name: [float(row[name]) for row in chosen if row["method"] == method] for name in SCORES}
            for method in dict.fromkeys(row["method"] for row in chosen)
        }
        for method, values in sorted(by_method.items(), key=lambda item: -statistics.mean(item[1]["gain"])):
            lines.append(
                f"| {method} | {len(values['gain'])} | {_spread(values['gain'], 4)} "
                f"| {_spread(values['deviance_explained'], 4)} | {_spread(values['gene_pearson'], 3)} "
                f"| {statistics.mean(values['seconds']):.1f} | {statistics.mean(values['cpu_seconds']):.1f} "
                f"| {max(values['peak_mib']):.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help=f"h5ad files with raw counts in X, or {SIMULATED!r}")
    parser.add_argument(
        "--library-key",
        default="",
        help="column of obs with the field of view; without it, or where a file lacks "
        "it, positions are used without fields of view",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(DEFAULT_METHODS),
        help="default: all but …+own and the variants of spaformer",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="one split and run each (default: 0 1 2)"
    )
    parser.add_argument("--out", type=Path, required=True, help="results file (CSV); runs it holds are skipped")
    parser.add_argument("--threads", type=int, default=2, help="threads of each run (default: 2)")
    options = parser.parse_args(arguments)

    names = {SIMULATED if data == SIMULATED else Path(data).stem: data for data in dict.fromkeys(options.data)}
    if len(names) < len(set(options.data)):
        parser.error("--data: two files have the same name, which the results file tells them apart by; rename one")
    for data in names.values():
        if data != SIMULATED and not Path(data).is_file():
            parser.error(f"--data: there is no file {data}")

    rows = read_rows(options.out, COLUMNS)
    done = {tuple(row[column] for column in KEY) for row in rows}
    wanted = [
        (name, options.library_key, method, str(seed), str(options.threads), code_version(method))
        for name in names
        for seed in dict.fromkeys(options.seeds)
        for method in dict.fromkeys(options.methods)
    ]
    failed = 0
    for key in wanted:
        name, library_key, method, seed, *_ = key
        if key in done:
            continue
        print(f"{name}, {method}, seed {seed} …", file=sys.stderr, flush=True)
        result = run_in_process(names[name], method, int(seed), library_key, options.threads)
        if result is None:
            failed += 1
            print(f"{name}, {method}, seed {seed}: failed", file=sys.stderr)
            continue
        rows.append({column: str(value) for column, value in (dict(zip(KEY, key)) | result).items()})
        write_rows(options.out, COLUMNS, rows)
    print(markdown([row for row in rows if tuple(row[column] for column in KEY) in set(wanted)]))
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--job":
        Path(sys.argv[3]).write_text(json.dumps(run_once(**json.loads(sys.argv[2]))))
    else:
        sys.exit(main())
