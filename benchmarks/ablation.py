"""What every part of the model is worth: each change from the default, on each data set, against the same default.

    python benchmarks/ablation.py --size small --out ablation
    python benchmarks/ablation.py --size full --data lung.h5ad brain.h5ad --library-key fov --out ablation --jobs 2

A run is a data set, a protocol, a seed and a variant. Runs of one data set, protocol and seed share a process, one
split and the seeds of all that is random, so that differences between them are paired. Runs that the results file holds
are skipped. `benchmarks/README.md` says what is measured and how the tables are read.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runs import Row, checksum, package_files, pinned_environment, read_rows, write_rows

SIMULATED = "simulated"
DEFAULT = "default"
TARGET_SUM = 250.0
PROTOCOLS = ("thinning", "entries", "blocks")
KEY = ("data", "library_key", "size", "protocol", "seed", "variant", "settings")
RESULTS = ("validation", "gain", "gene_pearson", "rmse", "steps", "cpu_seconds")
COLUMNS = (*KEY, "n_cells", "n_genes", "split", "code", *RESULTS)


@dataclass(frozen=True)
class Size:
    """Cells and genes kept of each data set, and how long a fit is trained."""

    cells: int
    genes: int
    settings: dict[str, Any]


ONE_NETWORK = {"n_networks": 1, "n_pooled": 0}
"""What all variants share: the first of the networks that the default averages, without the counts of cells alike."""

SIZES = {
    "small": Size(
        1000, 150, {"n_steps": 150, "tokens_per_step": 128, "n_validations": 6, "patience": 3, "warmup_steps": 15}
    ),
    "full": Size(4000, 10_000, {"n_steps": 400, "tokens_per_step": 256, "n_validations": 10, "patience": 3}),
    "whole": Size(10**9, 10**9, {}),
}


@dataclass(frozen=True)
class Variant:
    """One change: arguments of `SpaFormer`, and entries of its `settings`."""

    label: str
    choices: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


VARIANTS: dict[str, Variant] = {
    DEFAULT: Variant("default"),
    # Exchange between cells.
    "mlp": Variant("no attention", {"encoder": "mlp"}),
    "mlp_no_neighbours": Variant("no attention, no neighbours", {"encoder": "mlp"}, {"hops": 0}),
    "no_neighbours": Variant("no neighbours", {}, {"hops": 0}),
    "one_hop": Variant("one ring of neighbours", {}, {"hops": 1}),
    "performer_relu": Variant("Performer, ReLU features", {"encoder": "performer_relu"}),
    "exact": Variant("exact attention", {"encoder": "exact"}),
    "gat": Variant("graph attention (SpaGAT)", {"encoder": "gat"}),
    "windows": Variant("attention within windows", {"encoder": "performer"}, {"windows": True}),
    # Where a cell lies.
    **{
        name: Variant(name, {"positional": name})
        for name in (
            "patch", "linear", "sinusoidal", "fourier", "laplacian", "random_walk", "signnet",
            "conditional", "conditional_gat",
        )
    },
    "mlp_coordinates": Variant("mlp of the coordinates", {"positional": "mlp"}),
    "two_added": Variant("signnet + sinusoidal, added", {"positional": ["signnet", "sinusoidal"]}),
    "two_concatenated": Variant(
        "signnet + sinusoidal, concatenated",
        {"positional": ["signnet", "sinusoidal"]},
        {"positional_combine": "concat"},
    ),
    "signnet_no_neighbours": Variant("signnet, no neighbours", {"positional": "signnet"}, {"hops": 0}),
    # What training hides; without thinning there is no posterior.
    "thinning": Variant("thinning alone", {"masking": "thinning"}),
    "thinning_features": Variant("thinning or features", {"masking": ["thinning", "features"]}),
    "thinning_bilevel": Variant("thinning or bi-level", {"masking": ["thinning", "bilevel"]}),
    "bilevel": Variant("bi-level, 50 % × 50 %", {"masking": "bilevel"}),
    "bilevel_rising": Variant(
        "bi-level, 10 % rising to 60 %",
        {"masking": "bilevel"},
        {"masked_tokens": [0.1, 0.6], "masked_features": [0.1, 0.6]},
    ),
    "tokens": Variant("tokens (cells)", {"masking": "tokens"}),
    "features": Variant("features (genes)", {"masking": "features"}),
    "nothing_hidden": Variant("nothing hidden", {"masking": None}),
    # The autoencoder.
    "poisson": Variant("Poisson", {"decoder": "poisson"}),
    "nb_gene_fov": Variant("negative binomial, per gene and FOV", {"decoder": "nb"}, {"dispersion": "gene_fov"}),
    "nb_entry": Variant("negative binomial, per entry", {"decoder": "nb"}, {"dispersion": "entry"}),
    "zinb": Variant("zero-inflated NB", {"decoder": "zinb"}),
    "gaussian": Variant("Gaussian", {"decoder": "gaussian"}),
    "vae": Variant("variational", {"variational": True}),
    "no_posterior": Variant("thinning, no posterior", {}, {"posterior": False}),
    "no_mixing": Variant("nothing mixed in", {}, {"mixing": False}),
    "pooled": Variant("counts of cells alike", {}, {"n_pooled": 60}),
    # Size and training.
    "wide": Variant("wide path", {}, {"forms": ["wide"]}),
    "large": Variant("wide path, tokens twice the size, steps of a quarter", {}, {"forms": ["large"]}),
    "zero_fill": Variant("hidden entries 0 in the input", {}, {"typical_fill": False}),
    "random_start": Variant("random start", {}, {"pca_start": False}),
    "one_layer": Variant("one layer", {}, {"n_layers": 1}),
    "latent_20": Variant("20 latent dimensions", {"n_latent": 20}),
    "dropout": Variant("dropout 0.2", {}, {"dropout": 0.2}),
    "no_averaging": Variant("no averaging of weights", {}, {"averaging": 0.0}),
    # The paper's configuration, and what its parts are worth there.
    "paper": Variant("paper", {"preset": "paper"}),
    "paper_no_position": Variant("paper, no position", {"preset": "paper", "positional": None}),
    "paper_no_attention": Variant("paper, no attention", {"preset": "paper", "encoder": "mlp"}),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question, the variant that answers are compared with, and the variants that answer it."""

    title: str
    variants: tuple[str, ...]
    reference: str = DEFAULT
    percent: bool = True
    """Whether changes are shown in percent of the reference's score, or, where that may be near 0, in its own unit."""


QUESTIONS: dict[str, Question] = {
    "space": Question(
        "Does the spatial transformer beat the same model without attention, and without space?",
        ("mlp", "performer_relu", "exact", "windows", "gat", "one_hop", "no_neighbours", "mlp_no_neighbours"),
    ),
    "position": Question(
        "How should a cell's place be told (RQ1), and which encoding is best (RQ3)?",
        ("patch", "linear", "mlp_coordinates", "sinusoidal", "fourier", "laplacian", "random_walk", "signnet",
         "conditional", "conditional_gat", "windows", "two_added", "two_concatenated"),
    ),
    "position_alone": Question(
        "What is an encoding worth where neighbours' expression is not an input?",
        ("signnet_no_neighbours", DEFAULT),
        reference="no_neighbours",
    ),
    "masking": Question(
        "How to train for imputation (RQ2)?",
        ("thinning", "thinning_features", "thinning_bilevel", "bilevel", "no_posterior"),
    ),
    "bilevel": Question(
        "Does bi-level masking help (RQ5)? All without the posterior, which only thinning can teach.",
        ("bilevel", "bilevel_rising", "features", "tokens", "nothing_hidden"),
        reference="no_posterior",
    ),
    "autoencoder": Question(
        "Which autoencoder (RQ4)?",
        ("poisson", "nb_gene_fov", "nb_entry", "zinb", "gaussian", "vae", "no_mixing", "pooled"),
    ),
    "training": Question(
        "Size and training",
        ("wide", "large", "random_start", "zero_fill", "one_layer", "latent_20", "dropout", "no_averaging", "paper"),
    ),
    "paper": Question(
        "What are the parts worth in the paper's configuration? Changes in the unit of the score.",
        ("paper_no_position", "paper_no_attention", DEFAULT),
        reference="paper",
        percent=False,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------- runs, in a process of their own


def load(data: str, library_key: str, size: Size) -> Any:
    """Return counts and positions: from each field of view its middle cells, of the genes the most abundant."""
    import anndata as ad
    import numpy as np

    if data == SIMULATED:
        from spaformer_sc.datasets import simulated_tissue

        adata = simulated_tissue(random_state=0)
    else:
        adata = ad.read_h5ad(data)
    fovs = adata.obs[library_key].to_numpy().astype(str) if library_key in adata.obs else np.full(adata.n_obs, "all")
    share = min(1.0, size.cells / adata.n_obs)
    keep: list[int] = []
    for fov in np.unique(fovs):
        cells = np.flatnonzero(fovs == fov)
        position = adata.obsm["spatial"][cells][:, :2]
        from_middle = np.abs(position - np.median(position, axis=0)).max(axis=1)
        keep += cells[np.argsort(from_middle, kind="stable")[: round(share * len(cells))]].tolist()
    total = np.asarray(adata.X.sum(axis=0)).ravel()
    genes = np.sort(np.argsort(-total, kind="stable")[: size.genes])
    adata = adata[np.sort(keep)][:, genes].copy()
    adata.obs["fov"] = fovs[np.sort(keep)]
    return adata


def split_of(adata: Any, protocol: str, seed: int) -> tuple[Any, Any]:
    """Return the split, and the layer (cells × genes) of entries that are hidden, None under thinning."""
    from spaformer_sc import metrics

    if protocol == "thinning":
        return metrics.thin(adata.X, 0.5, random_state=seed), None
    if protocol == "entries":
        split = metrics.hide_entries(adata.X, 0.3, random_state=seed, target_sum=TARGET_SUM)
        return split, split.hidden
    labels = adata.obs["fov"].to_numpy()
    if len(set(labels)) < 2:
        labels = metrics.quarters(adata.obsm["spatial"])
    blocks = metrics.hide_blocks(adata.X, labels, 0.3, random_state=seed)
    return blocks, blocks.layer()


def scores(adata: Any, protocol: str, split: Any, hidden: Any, model: Any, observed: Any) -> dict[str, float]:
    """Score a fitted model under a protocol."""
    import numpy as np

    from spaformer_sc import metrics

    if protocol == "thinning":
        rates = model.impute(observed, output="rate", target_sum=1.0)
        return {
            "gain": metrics.poisson_gain(split.held, rates, split.train),
            "gene_pearson": float(np.nanmedian(metrics.gene_pearson_lognorm(split.held, rates))),
            "rmse": math.nan,
        }
    predicted = model.impute(observed, output="lognorm", target_sum=TARGET_SUM)
    library = np.asarray(adata.X.sum(axis=1)).reshape(-1, 1)
    truth = np.log1p(adata.X.toarray() / np.maximum(library, 1) * TARGET_SUM).astype(np.float32)
    return {
        "gain": math.nan,
        "gene_pearson": float(np.nanmedian(metrics.gene_pearson(truth, predicted, mask=hidden))),
        "rmse": metrics.rmse(truth, predicted, mask=hidden),
    }


def build(name: str, size: str, **arguments: Any) -> Any:
    """Return the model of a variant, not fitted."""
    import spaformer_sc as sf

    variant = VARIANTS[name]
    settings = {**ONE_NETWORK, **SIZES[size].settings, **variant.settings}
    return sf.SpaFormer(progress=False, settings=settings, **variant.choices, **arguments)


def fingerprint(name: str, size: str) -> str:
    """Return a checksum of all that a variant decides, so that runs of another default are not taken for this one's."""
    decided = build(name, size).settings.to_dict()
    return checksum([json.dumps(decided, sort_keys=True).encode()])


def run_group(
    data: str, library_key: str, size: str, protocol: str, seed: int, variants: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Fit and score variants on one split; yields the columns of the results file that the parent does not know."""
    import anndata as ad
    import numpy as np
    from scipy import sparse

    import spaformer_sc as sf
    from spaformer_sc._config import with_missing

    adata = load(data, library_key, SIZES[size])
    adata.X = sparse.csr_matrix(adata.X)
    split, hidden = split_of(adata, protocol, seed)
    observed = ad.AnnData(split.train.astype(np.float32), obs=adata.obs, var=adata.var[[]])
    observed.obsm["spatial"] = adata.obsm["spatial"]
    if hidden is not None:
        observed.layers["hidden"] = hidden
    parts = checksum(array.tobytes() for array in (split.train.indptr, split.train.indices, split.train.data))
    key = "fov" if adata.obs["fov"].nunique() > 1 else None
    # What is loaded and set up once in a process shall not count as the cost of the first variant.
    sf.SpaFormer(library_key=key, progress=False, settings={**ONE_NETWORK, **SIZES[size].settings, "n_steps": 2}).fit(
        observed
    )
    known: dict[Any, dict[str, Any]] = {}
    for name in variants:
        try:
            model = build(name, size, library_key=key, missing=None if hidden is None else "hidden", random_state=seed)
            same = replace(with_missing(model.settings, None if hidden is None else "features"), masking_is_auto=True)
            if same in known:  # a variant that is another one under this protocol
                yield known[same] | {"variant": name}
                continue
            start = time.process_time()
            model.fit(observed)
            seconds = time.process_time() - start
            known[same] = {
                "variant": name,
                "n_cells": adata.n_obs,
                "n_genes": adata.n_vars,
                "split": parts,
                "validation": model.scores["gain"],
                **scores(adata, protocol, split, hidden, model, observed),
                "steps": int(max(model.history["step"])),
                "cpu_seconds": round(seconds, 2),
            }
            yield known[same]
        except (ValueError, RuntimeError) as error:
            yield {"variant": name, "error": str(error)}


def run_groups(groups: list[dict[str, Any]], jobs: int, out: Path, rows: list[Row], names: dict[str, str]) -> int:
    """Run groups in ``jobs`` processes of one thread each, adding to the results file as they go; returns failures."""
    lock = threading.Lock()
    code = checksum(file.read_bytes() for file in package_files())
    total, done, failed = sum(len(group["variants"]) for group in groups), 0, 0

    def run(group: dict[str, Any]) -> None:
        nonlocal done, failed
        command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(group)]
        left = set(group["variants"])
        with subprocess.Popen(command, env=pinned_environment(1), stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                result = json.loads(line)
                left.discard(result["variant"])
                with lock:
                    done += 1
                    place = {"data": names[group["data"]]}
                    place |= {k: group[k] for k in ("library_key", "size", "protocol", "seed")}
                    place["settings"] = fingerprint(result["variant"], group["size"])
                    label = " ".join(map(str, (place["data"], group["protocol"], group["seed"], result["variant"])))
                    print(f"[{done}/{total}] {label}", file=sys.stderr)
                    if "error" in result:
                        failed += 1
                        print(f"  failed: {result['error']}", file=sys.stderr)
                        continue
                    rows.append({k: str(v) for k, v in (place | {"code": code} | result).items()})
                    write_rows(out, COLUMNS, rows)
        with lock:
            failed += len(left)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, groups))
    return failed


# ----------------------------------------------------------------------------------------------------- tables, figures


@dataclass(frozen=True)
class Change:
    """Change of a score against the reference; positive is better.

    Attributes
    ----------
    by_data
        Mean and standard deviation over seeds, by data set.
    mean, half_width
        Mean over data sets, and half the width of its 95 % interval: spread of paired differences over seeds, data sets
        taken as given, spreads not taken as equal (Satterthwaite 1946).
    """

    by_data: dict[str, tuple[float, float]]
    mean: float
    half_width: float

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if math.isnan(self.half_width):
            return "too few seeds"
        if self.mean > self.half_width:
            return "better"
        return "worse" if self.mean < -self.half_width else "no difference"


def change(
    rows: list[Row], protocol: str, variant: str, reference: str, score: str, *, percent: bool = True
) -> Change | None:
    """Compare a variant with the reference over the data sets and seeds that both were run on; None without any."""
    from scipy import stats

    def values(name: str) -> dict[tuple[str, str], float]:
        chosen = [row for row in rows if row["variant"] == name and row["protocol"] == protocol]
        return {(row["data"], row["seed"]): float(row[score]) for row in chosen}

    new, old = values(variant), values(reference)
    sign = -1.0 if score == "rmse" else 1.0
    by_data: dict[str, list[float]] = {}
    for data, seed in sorted(new.keys() & old.keys()):
        difference = sign * (new[data, seed] - old[data, seed])
        by_data.setdefault(data, []).append(100 * difference / old[data, seed] if percent else difference)
    if not by_data:
        return None
    summary = {
        data: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else math.nan) for data, v in by_data.items()
    }
    mean = statistics.mean(m for m, _ in summary.values())
    if any(len(v) < 2 for v in by_data.values()):
        return Change(summary, mean, math.nan)
    squared_errors = [statistics.variance(v) / len(v) for v in by_data.values()]
    spread = sum(e * e / (len(v) - 1) for e, v in zip(squared_errors, by_data.values(), strict=True))
    if not spread:
        return Change(summary, mean, 0.0)
    freedom = sum(squared_errors) ** 2 / spread
    error = math.sqrt(sum(squared_errors)) / len(by_data)
    return Change(summary, mean, float(stats.t.ppf(0.975, freedom)) * error)


def primary(protocol: str) -> str:
    """Return the score that a protocol is judged by."""
    return "gain" if protocol == "thinning" else "rmse"


def costs(rows: list[Row]) -> list[dict[str, str]]:
    """Processor time of a fit per training step over the default's: median over data sets, protocols and seeds."""
    by_run: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        run = by_run.setdefault((row["data"], row["protocol"], row["seed"]), {})
        run[row["variant"]] = float(row["cpu_seconds"]) / float(row["steps"])
    ratios: dict[str, list[float]] = {}
    for run in by_run.values():
        for variant, seconds in run.items():
            if DEFAULT in run:
                ratios.setdefault(variant, []).append(seconds / run[DEFAULT])
    return [
        {"variant": VARIANTS[v].label, "cost": f"{statistics.median(ratios[v]):.2f}"} for v in VARIANTS if v in ratios
    ]


def table(rows: list[Row], question: Question, protocol: str) -> list[dict[str, str]]:
    """One row for each variant of a question that has been run under a protocol; none if the reference has not."""
    score = primary(protocol)
    reference = [row for row in rows if row["variant"] == question.reference and row["protocol"] == protocol]
    if not reference:
        return []
    sets = sorted({row["data"] for row in reference})

    def value(data: str) -> str:
        found = [float(row[score]) for row in reference if row["data"] == data]
        spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
        return f"{statistics.mean(found):.4f}{spread}"

    unit = "nats" if score == "gain" else "RMSE"
    table_rows = [
        {"variant": f"{VARIANTS[question.reference].label} ({unit})", **{data: value(data) for data in sets}}
        | {"all": "", "verdict": "", "validation": "", "gene Pearson": ""}
    ]
    digits = 2 if question.percent else 4
    for name in question.variants:
        found, validation, pearson = (
            change(rows, protocol, name, question.reference, column, percent=percent)
            for column, percent in (
                (score, question.percent),
                ("validation", question.percent),
                ("gene_pearson", False),
            )
        )
        if name == question.reference or found is None or validation is None or pearson is None:
            continue

        def shown(value: float, spread: float) -> str:
            return f"{value:+.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")

        cells = {data: shown(*value) for data, value in found.by_data.items()}
        table_rows.append(
            {"variant": VARIANTS[name].label, **{data: cells.get(data, "") for data in sets}}
            | {
                "all": shown(found.mean, found.half_width),
                "verdict": found.verdict,
                "validation": f"{shown(validation.mean, validation.half_width)} ({validation.verdict})",
                "gene Pearson": f"{pearson.mean:+.4f} ± {pearson.half_width:.4f}".removesuffix(" ± nan"),
            }
        )
    return table_rows


def markdown(rows: list[dict[str, str]]) -> str:
    """Make a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows])


def draw(rows: list[Row], question: Question, protocols: Sequence[str], path: Path) -> None:
    """Draw the changes of a question: a point for each data set, a bar for the interval over all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
    sets = sorted({row["data"] for row in rows})
    names = [v for v in question.variants if v != question.reference and any(row["variant"] == v for row in rows)]
    figure, axes = plt.subplots(
        1, len(protocols), figsize=(3.2 + 3.4 * len(protocols), 2.0 + 0.34 * len(names)), sharey=True, squeeze=False
    )
    for axis, protocol in zip(axes[0], protocols, strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for place, name in enumerate(names):
            found = change(rows, protocol, name, question.reference, primary(protocol), percent=question.percent)
            if found is None:
                continue
            axis.errorbar(found.mean, place, xerr=found.half_width, color="black", capsize=3, marker="|", zorder=3)
            for data, (mean, _) in found.by_data.items():
                axis.plot(mean, place, "o", markersize=5, color=colours[sets.index(data) % len(colours)], alpha=0.8)
        straight = 1.0 if question.percent else 0.01
        axis.set_xscale("symlog", linthresh=straight)
        steps = [straight * step for step in (1, 3, 10, 30, 100, 300, 1000)]
        axis.xaxis.set_major_locator(FixedLocator([-step for step in reversed(steps)] + [0, *steps]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(f"{protocol} ({'nats' if primary(protocol) == 'gain' else 'RMSE'})", fontsize=10)
        unit = "%" if question.percent else "nats" if primary(protocol) == "gain" else "RMSE"
        reference = VARIANTS[question.reference].label
        axis.set_xlabel(
            f"change from “{reference}”, {unit}; right is better\n(logarithmic beyond ±{straight:g})", fontsize=9
        )
    axes[0][0].set_yticks(range(len(names)), [VARIANTS[name].label for name in names], fontsize=9)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=colours[i % len(colours)], label=data)
        for i, data in enumerate(sets)
    ]
    handles.append(plt.Line2D([], [], marker="|", color="black", label="mean, 95 % interval"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(textwrap.fill(question.title, int(10 * figure.get_figwidth())), fontsize=11)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(rows: list[Row], folder: Path) -> str:
    """Write tables (CSV) and figures (PNG) of every question, and a page with all tables (Markdown), which it returns.

    Raises
    ------
    SystemExit
        If variants were scored on different splits of the same data set, protocol and seed.
    """
    for place in {(row["data"], row["protocol"], row["seed"]) for row in rows}:
        if len({row["split"] for row in rows if (row["data"], row["protocol"], row["seed"]) == place}) > 1:
            raise SystemExit(f"{' '.join(place)}: variants saw different splits; remove these rows and run again.")
    facts = {row["data"]: f"{row['n_cells']} cells × {row['n_genes']} genes" for row in rows}
    codes = Counter(row["code"] for row in rows)
    lines = [
        "; ".join(f"**{data}** {fact}" for data, fact in sorted(facts.items())) + ".",
        "",
        f"Code: {', '.join(f'{code} ({n} runs)' for code, n in codes.items())}.",
        "",
        "Changes from the first row, positive where better, in percent unless the title says otherwise: mean ± "
        "standard deviation over seeds; `all` and the columns after it: mean over data sets ± half its 95 % interval.",
        "",
    ]
    for name, question in QUESTIONS.items():
        tables = {protocol: table(rows, question, protocol) for protocol in PROTOCOLS}
        tables = {protocol: found for protocol, found in tables.items() if len(found) > 1}
        if not tables:
            continue
        lines += [f"## {question.title}", "", f"![{question.title}]({name}.png)", ""]
        for protocol, found in tables.items():
            lines += [f"**{protocol}**", "", markdown(found), ""]
            write_rows(folder / f"{name}_{protocol}.csv", list(found[0]), found)
        draw(rows, question, list(tables), folder / f"{name}.png")
    if relative := costs(rows):
        lines += ["## Processor time of a fit per training step, relative to the default", "", markdown(relative), ""]
    page = "\n".join(lines)
    (folder / "tables.md").write_text(page)
    return page


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", default=[SIMULATED], help=f"h5ad files with raw counts in X (default: {SIMULATED})"
    )
    parser.add_argument(
        "--library-key", default="fov", help="column of obs with the field of view, where a file has it (default: fov)"
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="cells, genes and training steps")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=["thinning"], help="default: thinning")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of runs.csv, whose runs are skipped; tables and figures go to a folder in it, named by size",
    )
    options = parser.parse_args(arguments)

    names = {data: SIMULATED if data == SIMULATED else Path(data).stem for data in dict.fromkeys(options.data)}
    if len(set(names.values())) < len(names):
        parser.error("--data: two files have the same name, which the results tell them apart by; rename one")
    for data in names:
        if data != SIMULATED and not Path(data).is_file():
            parser.error(f"--data: there is no file {data}")
    path = options.out / "runs.csv"
    rows = read_rows(path, COLUMNS)
    code = checksum(file.read_bytes() for file in package_files())
    old = sum(row["code"] != code for row in rows)
    if old:
        print(f"{old} of {len(rows)} runs in {path} were made by other code; they are kept.", file=sys.stderr)
    have = {tuple(row[column] for column in KEY) for row in rows}
    variants = list(dict.fromkeys([DEFAULT, *options.variants]))
    settings = {variant: fingerprint(variant, options.size) for variant in VARIANTS}
    groups = []
    for protocol in dict.fromkeys(options.protocols):
        for seed in dict.fromkeys(options.seeds):
            for data, name in names.items():
                place = (name, options.library_key, options.size, protocol, str(seed))
                missing = [v for v in variants if (*place, v, settings[v]) not in have]
                if missing:
                    groups.append(
                        {"data": data, "library_key": options.library_key, "size": options.size, "protocol": protocol}
                        | {"seed": seed, "variants": missing}
                    )
    failed = run_groups(groups, options.jobs, path, rows, names)
    folder = options.out / options.size
    folder.mkdir(parents=True, exist_ok=True)
    today = [row for row in rows if row["size"] == options.size and row["library_key"] == options.library_key]
    print(report([row for row in today if row["settings"] == settings.get(row["variant"])], folder))
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--job":
        logging.getLogger("spaformer_sc").setLevel(logging.ERROR)
        for answer in run_group(**json.loads(sys.argv[2])):
            print(json.dumps(answer), flush=True)
    else:
        sys.exit(main())
