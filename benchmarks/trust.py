"""Can intervals, verdicts and zeros be believed? Checks on counts that nothing was fitted to, and on known truth.

    python benchmarks/trust.py --out trust
    python benchmarks/trust.py --data lung.h5ad brain.h5ad simulated --library-key fov --out trust --jobs 2

A run is a part, a data set and a seed; runs that the results file holds are skipped. `benchmarks/README.md` says what
is measured and how the tables are read.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runs import Row, checksum, package_files, pinned_environment, read_rows, write_rows

SIMULATED = "simulated"
PARTS = ("halves", "missing", "shuffled", "tests")
LEVELS = (0.5, 0.8, 0.95)
CAPTURES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Upper ends of the bins of predicted probabilities of a count."""
KEY = ("part", "data", "library_key", "quality", "seed")
COLUMNS = (*KEY, "code", "score", "of", "value")
VERDICTS = ("reliable", "weak", "no better than baseline")
TESTED = ("counts", "imputed", "imputed rates", "posterior draws")
N_DRAWS = 20
ALPHA = 0.05


# ---------------------------------------------------------------------------------------------------------------- runs


def load(data: str, library_key: str, seed: int) -> Any:
    """Counts, positions and fields of view of a data set."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    from scipy import sparse

    import spaformer_sc as sf

    if data == SIMULATED:
        return sf.datasets.simulated_tissue(random_state=seed)
    given = ad.read_h5ad(data)
    obs = pd.DataFrame(index=given.obs_names)
    if library_key in given.obs:
        obs[library_key] = pd.Categorical(given.obs[library_key].astype(str))
    counts = sparse.csr_matrix(given.X).astype(np.float32)
    return ad.AnnData(counts, obs=obs, var=given.var[[]], obsm={"spatial": np.asarray(given.obsm["spatial"])})


def impute(adata: Any, library_key: str, quality: str, seed: int) -> None:
    """Impute as a user would; a layer ``missing`` marks what was not measured."""
    import spaformer_sc as sf

    key = library_key if library_key in adata.obs else None
    missing = "missing" if "missing" in adata.layers else None
    sf.tl.impute(adata, library_key=key, missing=missing, quality=quality, random_state=seed, progress=False)


def strata(values: Any, n: int) -> Any:
    """Number of the n equal parts, by rank, that each value is in."""
    import numpy as np

    return np.argsort(np.argsort(values, kind="stable"), kind="stable") * n // len(values)


def halves(data: str, library_key: str, quality: str, seed: int) -> list[tuple[str, str, float]]:
    """Impute from half of all transcripts; what was said of the result is held against the other half."""
    import numpy as np

    import spaformer_sc as sf
    from spaformer_sc.training.posterior import ranks

    adata = load(data, library_key, seed)
    split = sf.metrics.thin(adata.X, 0.5, random_state=seed)
    adata.X = split.train
    held = split.held.toarray()
    impute(adata, library_key, quality, seed)
    by = {
        "genes, rare to abundant": (1, strata(np.asarray(split.train.sum(axis=0)).ravel(), 5)),
        "cells, shallow to deep": (0, strata(adata.obs["spaformer_depth"].to_numpy(), 5)),
    }
    if library_key in adata.obs:
        by["fields of view"] = (0, adata.obs[library_key].cat.codes.to_numpy())
    found: list[tuple[str, str, float]] = []
    # Ranks are taken of the intervals that users have: levels go through the correction by held-out counts.
    known = sf._result.known_of(adata, None, "spaformer")
    rank = ranks(held, known.mean, known.shape, np.random.default_rng(seed))
    for level in LEVELS:
        limits = sf.tl.interval(adata, level=level)
        inside = (held >= limits.lower) & (held <= limits.upper)
        randomised = rank <= known.posterior.level_for(level)
        found += [(f"inside {level}", "all", inside.mean()), (f"randomised {level}", "all", randomised.mean())]
        for name, (axis, number) in by.items():
            shares = randomised.mean(axis=1 - axis)
            parts = [float(shares[number == part].mean()) for part in np.unique(number)]
            found += [(f"randomised {level}", f"{name}: lowest", min(parts))]
            found += [(f"randomised {level}", f"{name}: highest", max(parts))]
    chance = sf.tl.detection(adata)
    zero = split.train.toarray() == 0
    low = 0.0
    for high in CAPTURES:
        of = zero & (chance > low) & (chance <= high)
        if of.sum() >= 100:
            bin_name = f"({low:g}, {high:g}]"
            found += [("predicted", bin_name, float(chance[of].mean())), ("seen", bin_name, (held[of] > 0).mean())]
        low = high
    kept = zero & (chance < 0.05)
    found += [("kept zeros", "share of zeros", kept.sum() / zero.sum())]
    found += [("kept zeros", "counted in the other half", (held[kept] > 0).mean())]
    gain = sf.metrics.poisson_gain_per_gene(split.held, known.mean.astype(np.float32), split.train)
    verdict = adata.var["spaformer_reliability"].astype(str).to_numpy()
    for name in VERDICTS:
        of = (verdict == name) & np.isfinite(gain)
        found.append(("genes", name, float(of.sum())))
        if of.any():
            found.append(("better than the gene mean in the other half", name, float((gain[of] > 0).mean())))
            found.append(("median gain in the other half", name, float(np.median(gain[of]))))
    return found


def missing(data: str, library_key: str, quality: str, seed: int) -> list[tuple[str, str, float]]:
    """Hide 30 % of the entries, as not measured; their intervals are held against their counts."""
    import numpy as np

    import spaformer_sc as sf
    from spaformer_sc.training.posterior import ranks

    adata = load(data, library_key, seed)
    everything = adata.X.toarray()
    split = sf.metrics.hide_entries(adata.X, 0.3, random_state=seed)
    adata.X, adata.layers["missing"] = split.train, split.hidden
    impute(adata, library_key, quality, seed)
    known = sf._result.known_of(adata, None, "spaformer")
    hidden = split.hidden
    rank = ranks(everything[hidden], known.mean[hidden], known.shape[hidden], np.random.default_rng(seed))
    found = []
    for level in LEVELS:
        limits = sf.tl.interval(adata, level=level)
        inside = (everything >= limits.lower) & (everything <= limits.upper)
        found.append((f"inside {level}", "all", float(inside[hidden].mean())))
        found.append((f"randomised {level}", "all", float((rank <= known.posterior.level_for(level)).mean())))
    return found


def shuffled(data: str, library_key: str, quality: str, seed: int) -> list[tuple[str, str, float]]:
    """Shuffle the counts of a quarter of the genes among cells: none of these should be called reliable."""
    import numpy as np
    from scipy import sparse

    adata = load(data, library_key, seed)
    rng = np.random.default_rng(seed)
    genes = rng.choice(adata.n_vars, adata.n_vars // 4, replace=False)
    counts = adata.X.toarray()
    counts[:, genes] = rng.permuted(counts[:, genes], axis=0)
    adata.X = sparse.csr_matrix(counts)
    impute(adata, library_key, quality, seed)
    verdict = adata.var["spaformer_reliability"].astype(str).to_numpy()
    is_shuffled = np.isin(np.arange(adata.n_vars), genes)
    found = []
    for name, of in (("shuffled", is_shuffled), ("as they were", ~is_shuffled)):
        found.append(("genes", name, float(of.sum())))
        found += [(verdict_name, name, float((verdict[of] == verdict_name).mean())) for verdict_name in VERDICTS]
    return found


def tests(data: str, library_key: str, quality: str, seed: int) -> list[tuple[str, str, float]]:
    """Test genes for a difference between two groups of cells, where it is known that there is none.

    In a simulated tissue, a third of the genes are replaced by ones with the same share of the transcripts of every
    cell. Groups are pairs of cell types, and halves of the fields of view within a type. A difference in the mean of
    log-normalised values is tested (Welch's t-test) on counts, on the imputed layer, on log1p of imputed rates, which
    do not depend on depth, and on draws of these from the posterior, combined by Rubin's rules. Genes with a true
    difference of 0.5 or more (natural logarithm of the ratio of means) say what is found of those that are there.
    """
    import numpy as np
    from scipy import sparse, stats

    import spaformer_sc as sf

    adata = sf.datasets.simulated_tissue(n_fovs=4, n_cells=600, n_genes=300, random_state=seed)
    rng = np.random.default_rng(seed)
    null = rng.choice(adata.n_vars, adata.n_vars // 3, replace=False)
    true = np.array(adata.layers["true_rate"])
    counts = adata.X.toarray()
    share = true[:, null].mean(axis=0)
    depth = adata.obs["true_depth"].to_numpy()
    counts[:, null] = rng.poisson(depth[:, None] * share)
    true[:, null] = share
    adata.X = sparse.csr_matrix(counts.astype(np.float32))
    impute(adata, "fov", quality, seed)
    target_sum = adata.uns["spaformer"]["params"]["target_sum"]
    library = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    observed = np.log1p(counts / library * target_sum)
    draws = np.log1p(sf.tl.sample(adata, None, N_DRAWS, random_state=seed))
    known = sf._result.known_of(adata, None, "spaformer")
    rates = np.log1p(known.mean * known.per_count)
    full = (counts.sum(axis=1) > 0) & np.isfinite(draws[0]).all(axis=1)

    kind = adata.obs["cell_type"].astype(str).to_numpy()
    names = [name for name in np.unique(kind) if (full & (kind == name)).sum() >= 100]
    x = adata.obsm["spatial"][:, 0]
    pairs = []
    for i, first in enumerate(names):
        pairs += [("between cell types", kind == first, kind == second) for second in names[i + 1 :]]
        side = np.zeros(len(kind), dtype=bool)
        for fov in adata.obs["fov"].unique():
            inside = (adata.obs["fov"] == fov).to_numpy()
            side |= inside & (x > np.median(x[inside]))
        pairs.append(("between halves of the field", (kind == first) & side, (kind == first) & ~side))

    def welch(values: Any, one: Any, other: Any) -> tuple[Any, Any, Any]:
        """Difference of means, its variance, and degrees of freedom."""
        a, b = values[one & full].astype(float), values[other & full].astype(float)
        va, vb = (np.maximum(v.var(axis=0, ddof=1) / len(v), 1e-12) for v in (a, b))
        freedom = np.square(va + vb) / (np.square(va) / (len(a) - 1) + np.square(vb) / (len(b) - 1))
        return a.mean(axis=0) - b.mean(axis=0), va + vb, freedom

    def p_of(difference: Any, variance: Any, freedom: Any) -> Any:
        return 2 * stats.t.sf(np.abs(difference) / np.sqrt(variance), freedom)

    found: dict[tuple[str, str, str], list[float]] = {}
    is_null = np.isin(np.arange(adata.n_vars), null)
    for where, one, other in pairs:
        p = {
            "counts": p_of(*welch(observed, one, other)),
            "imputed": p_of(*welch(adata.layers["spaformer"], one, other)),
            "imputed rates": p_of(*welch(rates, one, other)),
        }
        parts = [welch(draw, one, other) for draw in draws]
        difference, within, freedom = (np.stack(values) for values in zip(*parts, strict=True))
        between = difference.var(axis=0, ddof=1) * (1 + 1 / N_DRAWS)
        p["posterior draws"] = p_of(difference.mean(axis=0), within.mean(axis=0) + between, freedom.mean(axis=0))
        with np.errstate(divide="ignore"):
            change = np.abs(np.log(true[one].mean(axis=0) / true[other].mean(axis=0)))
        for method, values in p.items():
            found.setdefault((where, method, "null"), []).extend(values[is_null] < ALPHA)
            found.setdefault((where, method, "changed"), []).extend(values[~is_null & (change >= 0.5)] < ALPHA)
    shares = []
    for (where, method, kind_of), values in found.items():
        name = f"{where}, {'no difference' if kind_of == 'null' else 'true difference'}"
        if values:
            shares += [(name, method, float(np.mean(values))), (name, "number", float(len(values)))]
    return shares


FUNCTIONS = {"halves": halves, "missing": missing, "shuffled": shuffled, "tests": tests}


# -------------------------------------------------------------------------------------------------------------- tables


def spread(values: Sequence[float], percent: bool) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return ""
    scale, digits = (100, 1) if percent else (1, 3)
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Make a Markdown table."""
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body, ""]


def tables(rows: list[Row]) -> str:
    """All tables of the results, in Markdown."""
    values: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        if row["value"] not in ("", "nan"):
            place = row["part"], row["data"], row["score"], row["of"]
            values.setdefault(place, []).append(float(row["value"]))
    seeds = sorted({row["seed"] for row in rows}, key=int)
    quality = sorted({row["quality"] for row in rows})
    over = "mean ± standard deviation over seeds" if len(seeds) > 1 else "one seed, no spread"
    page = [f'Seeds {", ".join(seeds)}; `quality="{", ".join(quality)}"`; {over}.', ""]

    def sets(part: str) -> list[str]:
        return sorted({data for p, data, _, _ in values if p == part})

    def cell(part: str, data: str, score: str, of: str, percent: bool = True) -> str:
        return spread(values.get((part, data, score, of), []), percent)

    def whole(part: str, data: str, score: str, of: str) -> str:
        found = values.get((part, data, score, of), [])
        error = f" ± {statistics.stdev(found):.0f}" if len(found) > 1 else ""
        return f"{statistics.mean(found):.0f}{error}" if found else ""

    if sets("halves"):
        page += ["**Coverage of counts of the other half, %**", ""]
        lines = []
        for data in sets("halves"):
            for level in LEVELS:
                line = [data, f"{100 * level:g}", *(cell("halves", data, f"{k} {level}", "all") for k in KINDS)]
                for name in STRATA:
                    ends = [cell("halves", data, f"randomised {level}", f"{name}: {end}") for end in ENDS]
                    line.append(" to ".join(end.split(" ")[0] for end in ends) if all(ends) else "")
                lines.append(line)
        page += markdown(("data", "level", "inside", "randomised", *STRATA), lines)
        page += [
            "**Observed zeros by predicted probability of a count in the other half: prediction / share seen, %**",
            "",
        ]
        bins = [f"({low:g}, {high:g}]" for low, high in zip((0.0, *CAPTURES), CAPTURES, strict=False)]
        page += markdown(
            ("data", *bins, "kept zeros, share", "counted in the other half"),
            [
                [data]
                + [
                    " / ".join(cell("halves", data, score, of).split(" ")[0] for score in ("predicted", "seen"))
                    for of in bins
                ]
                + [cell("halves", data, "kept zeros", of) for of in ("share of zeros", "counted in the other half")]
                for data in sets("halves")
            ],
        )
        page += ["**Verdicts on genes, and what the other half says of them**", ""]
        better, gain = "better than the gene mean in the other half", "median gain in the other half"
        page += markdown(
            ("data", "verdict", "genes", "better than the gene mean, %", "median gain, nats per count"),
            [
                [
                    data,
                    name,
                    whole("halves", data, "genes", name),
                    cell("halves", data, better, name),
                    cell("halves", data, gain, name, False),
                ]
                for data in sets("halves")
                for name in VERDICTS
            ],
        )
    if sets("missing"):
        page += ["**Coverage of counts of entries that were hidden as not measured, %**", ""]
        columns = [f"{kind}, {100 * level:g}" for level in LEVELS for kind in KINDS]
        page += markdown(
            ("data", *columns),
            [
                [data, *(cell("missing", data, f"{kind} {level}", "all") for level in LEVELS for kind in KINDS)]
                for data in sets("missing")
            ],
        )
    if sets("shuffled"):
        page += ["**Verdicts on genes whose counts were shuffled among cells, and on the others, %**", ""]
        page += markdown(
            ("data", "genes", "number", *VERDICTS),
            [
                [data, name, whole("shuffled", data, "genes", name).split(" ")[0]]
                + [cell("shuffled", data, verdict, name) for verdict in VERDICTS]
                for data in sets("shuffled")
                for name in ("shuffled", "as they were")
            ],
        )
    if sets("tests"):
        page += [f"**Genes found to differ between groups of cells at p < {ALPHA}, %**", ""]
        scores = sorted({score for p, _, score, _ in values if p == "tests"})
        page += markdown(
            ("groups", "number of tests", *TESTED),
            [
                [
                    score,
                    whole("tests", SIMULATED, score, "number").split(" ")[0],
                    *(cell("tests", SIMULATED, score, method) for method in TESTED),
                ]
                for score in scores
            ],
        )
    return "\n".join(page)


KINDS = ("inside", "randomised")
ENDS = ("lowest", "highest")
STRATA = ("genes, rare to abundant", "cells, shallow to deep", "fields of view")


def draw(rows: list[Row], path: Path) -> None:
    """Draw false and true findings of the tests, and zeros predicted against seen."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["data"] if row["part"] == "halves" else row["part"], row["score"], row["of"]), []).append(
            float(row["value"])
        )
    for data in sorted({row["data"] for row in rows if row["part"] == "halves"}):
        bins = [of for d, score, of in found if d == data and score == "predicted"]
        x, y = ([statistics.mean(found[data, score, of]) for of in bins] for score in ("predicted", "seen"))
        left.plot(x, y, "o-", markersize=4, label=data)
    left.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    left.set_xlabel("observed zeros: predicted probability of a count")
    left.set_ylabel("share counted in the other half")
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=7, frameon=False)
    scores = sorted({score for part, score, _ in found if part == "tests"})
    for number, method in enumerate(TESTED):
        heights = [100 * statistics.mean(found.get(("tests", score, method), [math.nan])) for score in scores]
        right.bar([i + 0.2 * number for i in range(len(scores))], heights, 0.18, label=method)
    right.axhline(100 * ALPHA, color="0.3", linewidth=0.8, linestyle="--")
    labels = [score.replace("between ", "between\n").replace(" of", "\nof").replace(", ", ",\n") for score in scores]
    right.set_xticks([i + 0.3 for i in range(len(scores))], labels, fontsize=7)
    right.set_ylabel(f"genes with p < {ALPHA}, %")
    right.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------- command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[SIMULATED], help="h5ad files with raw counts in X, or simulated")
    parser.add_argument("--library-key", default="fov", help="column of obs with the field of view (default: fov)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--quality", choices=("fast", "default", "best"), default="default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs.csv, tables.md and trust.png")
    options = parser.parse_args(arguments)
    for data in options.data:
        if data != SIMULATED and not Path(data).is_file():
            parser.error(f"--data: there is no file {data}")
    path = options.out / "runs.csv"
    rows = read_rows(path, COLUMNS)
    here = Path(__file__)
    package = here.parent.parent / "spaformer_sc"
    judging = (here, package / "_result.py", *sorted([*package.glob("training/*.py"), *package.glob("tl/*.py")]))
    code = checksum(file.read_bytes() for file in dict.fromkeys((*package_files(), *judging)))
    have = {tuple(row[column] for column in KEY) for row in rows if row["code"] == code}
    jobs = []
    for part in dict.fromkeys(options.parts):
        for seed in dict.fromkeys(options.seeds):
            for data in [SIMULATED] if part == "tests" else dict.fromkeys(options.data):
                name = SIMULATED if data == SIMULATED else Path(data).stem
                key = (part, name, options.library_key, options.quality, str(seed))
                if key not in have:
                    jobs.append((key, data))
    failed = 0

    def run(job: tuple[tuple[str, ...], str]) -> tuple[tuple[str, ...], str | None]:
        key, data = job
        call = {"data": data, "library_key": key[2], "quality": key[3], "seed": int(key[4])}
        command = [sys.executable, str(here), "--job", key[0], json.dumps(call)]
        done = subprocess.run(command, env=pinned_environment(options.threads), check=False, stdout=subprocess.PIPE)
        return key, None if done.returncode else done.stdout.decode().splitlines()[-1]

    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (key, answer) in enumerate(pool.map(run, jobs), 1):
            print(f"[{number}/{len(jobs)}] {' '.join(key)}: {'failed' if answer is None else 'done'}", file=sys.stderr)
            if answer is None:
                failed += 1
                continue
            rows = [row for row in rows if tuple(row[column] for column in KEY) != key]
            rows += [
                dict(zip(KEY, key, strict=True)) | {"code": code, "score": score, "of": of, "value": str(value)}
                for score, of, value in json.loads(answer)
            ]
            write_rows(path, COLUMNS, rows)
    asked = [r for r in rows if (r["library_key"], r["quality"]) == (options.library_key, options.quality)]
    old = sum(row["code"] != code for row in asked)
    if old:
        print(f"{old} of {len(asked)} rows were made by other code; they are kept.", file=sys.stderr)
    if asked:
        page = tables(asked)
        (options.out / "tables.md").write_text(page + "\n")
        draw(asked, options.out / "trust.png")
        print(page)
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--job":
        logging.getLogger("spaformer_sc").setLevel(logging.ERROR)
        answer = FUNCTIONS[sys.argv[2]](**json.loads(sys.argv[3]))
        print(json.dumps([(score, of, float(value)) for score, of, value in answer]), flush=True)
    else:
        sys.exit(main())
