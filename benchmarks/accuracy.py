"""Score imputation methods on held-out data: data sets × protocols × methods × seeds.

    python benchmarks/accuracy.py --data a.h5ad b.h5ad simulated --library-key fov --out accuracy --threads 1 --jobs 2

Every run (data set, protocol, method, seed) has a process of its own. Splits are made once and handed to all methods.
Runs that the results file holds already, made by the same code, are skipped. `benchmarks/README.md` says what is
measured, what the columns mean and how to score a method of one's own.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import METHODS
from runs import Row, checksum, package_files, pinned_environment, read_rows, write_rows

HERE = Path(__file__).resolve().parent
SIMULATED = "simulated"
PROTOCOLS = ("thinning", "entries", "blocks")
TRUTH, CEILING = "truth", "ceiling"
SPECIAL = (TRUTH, CEILING)
OURS = "spaformer"

THINNING_SCORES = ("gain", "deviance_explained", "gene_pearson")
HIDDEN_SCORES = ("rmse", "rmse_nonzero", "pearson", "cosine", "gene_pearson")
COSTS = ("seconds", "cpu_seconds", "peak_mib")
KEY = ("data", "library_key", "protocol", "method", "seed", "threads", "code")
FACTS = ("n_cells", "n_genes", "n_fovs", "split")
SCORES = tuple(
    score + suffix for score in dict.fromkeys(THINNING_SCORES + HIDDEN_SCORES) for suffix in ("", "_calibrated")
)
COLUMNS = (*KEY, *FACTS, *SCORES, *COSTS)

# ------------------------------------------------------------------------------------------------------------ all runs


def label(method: str) -> str:
    """Name of a method in results: that of the registry, or ``file.py:function`` without the folder."""
    return method if method in METHODS or method in SPECIAL else Path(method).name


def sources(file: Path) -> set[Path]:
    """Return a module of the peers and all modules of the peers that it imports, directly or not."""
    found, new = {file}, [file]
    while new:
        for node in ast.walk(ast.parse(new.pop().read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("peers")):
                module = (node.module or "").removeprefix("peers").removeprefix(".")
                names = [module.split(".")[0]] if module else [alias.name for alias in node.names]
                files = {HERE / "peers" / f"{name}.py" for name in names}
                new += [path for path in files - found if path.exists()]
                found |= {path for path in files if path.exists()}
    return found


def code_version(method: str) -> str:
    """Return a checksum of all code that decides a run, so that changed code is run again.

    The protocols and, for ours, the whole package; for a peer, its module and those that it imports; for the blend, the
    modules of all methods that it draws on.
    """
    protocol = {HERE / "tasks.py", *(HERE.parent / "spaformer_sc" / "metrics").glob("*.py")}
    if method in SPECIAL:
        files = protocol | {HERE.parent / "spaformer_sc" / "datasets" / "_simulated.py"}
    elif method not in METHODS:
        files = protocol | {Path(method.rpartition(":")[0])}
    else:
        names = list(METHODS)
        drawn_on = names[: names.index("blend") + 1] if method == "blend" else [method]
        modules = {HERE / "peers" / f"{METHODS[name].split(':')[0]}.py" for name in drawn_on}
        modules = {source for module in modules if module.exists() for source in sources(module)}
        files = protocol | modules | {HERE / "peers" / "_tuning.py"}
        if method.startswith(OURS):
            files |= set(package_files())
    return checksum(file.read_bytes() for file in sorted(files) if file.exists())


def in_process(job: dict[str, Any], threads: int) -> dict[str, Any] | None:
    """Call a function of `tasks` in a new process with a fixed number of threads; None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, str(HERE / "accuracy.py"), "--job", json.dumps(job), str(answer)]
        if subprocess.run(command, env=pinned_environment(threads), check=False).returncode or not answer.exists():
            return None
        return dict(json.loads(answer.read_text()))


@dataclass
class Task:
    """A split and the runs on it that are to be made; `facts` is None until it is made, and empty if that failed."""

    place: dict[str, Any]
    methods: list[str]
    folder: Path
    left: int
    facts: dict[str, Any] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Runner:
    """Makes runs, some at a time, and adds each to the results file as soon as it is done."""

    def __init__(self, path: Path, rows: list[Row], threads: int, total: int) -> None:
        self.path, self.rows, self.threads, self.total = path, rows, threads, total
        self.done = self.failed = 0
        self.not_installed: set[str] = set()
        self.lock = threading.Lock()

    def run_all(self, tasks: list[Task], jobs: int) -> None:
        """Make all runs. The blend starts when the methods before it are done, since it may use their predictions."""
        with ThreadPoolExecutor(jobs) as pool:
            try:
                every: list[Future[None]] = []
                for task in tasks:
                    futures: list[Future[None]] = []
                    for method in task.methods:
                        earlier = list(futures) if method == "blend" else []
                        futures.append(pool.submit(self.run, task, method, earlier))
                    every += futures
                for future in every:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def run(self, task: Task, method: str, earlier: list[Future[None]]) -> None:
        """Make one run, and its split before the first of the split; removes the split after the last."""
        wait(earlier)
        try:
            with task.lock:
                if task.facts is None:
                    task.facts = in_process({"function": "make_task"} | task.place, self.threads) or {}
            result = None
            if task.facts and method not in self.not_installed:
                job = {"function": "run_method", "method": method, "folder": task.place["folder"]}
                result = in_process(job, self.threads)
            with self.lock:
                self.record(task, method, result)
        finally:
            with task.lock:
                task.left -= 1
                if not task.left:
                    shutil.rmtree(task.folder, ignore_errors=True)

    def record(self, task: Task, method: str, result: dict[str, Any] | None) -> None:
        """Say how a run ended, and keep its row."""
        self.done += 1
        name = f"[{self.done}/{self.total}] " + " ".join(str(task.place[k]) for k in ("name", "protocol", "seed"))
        if method in self.not_installed or (result and "not_installed" in result):
            self.not_installed.add(method)
            message = f": {result['not_installed']}" if result else ""
            print(f"{name} {label(method)}: not installed{message}", file=sys.stderr, flush=True)
        elif result is None or not task.facts:
            self.failed += 1
            print(f"{name} {label(method)}: failed", file=sys.stderr, flush=True)
        else:
            key = key_of(task.place, method, self.threads)
            values = dict(zip(KEY, key)) | task.facts | result
            self.rows.append({column: str(values.get(column, "")) for column in COLUMNS})
            write_rows(self.path, COLUMNS, self.rows)
            seconds = f", {result['seconds']} s" if "seconds" in result else ""
            print(f"{name} {label(method)}: done{seconds}", file=sys.stderr, flush=True)


def key_of(place: dict[str, Any], method: str, threads: int) -> tuple[str, ...]:
    """What tells one run from another."""
    where = place["name"], place["library_key"], place["protocol"], label(method), str(place["seed"])
    return (*where, str(threads), code_version(method))


def possible(data: str, protocol: str, method: str) -> bool:
    """Whether a method can be run: the truth is known of simulated data only, and the ceiling is one of thinning."""
    return (method != TRUTH or data == SIMULATED) and (method != CEILING or protocol == "thinning")


# -------------------------------------------------------------------------------------------------------------- tables


class Results:
    """Scores of all runs: of runs that were made twice the later one, each with its gain over the gene mean.

    Raises
    ------
    SystemExit
        If methods were scored on different splits of the same data set, protocol and seed.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        newest = {(row["data"], row["protocol"], row["method"], row["seed"]): row for row in rows}
        splits: dict[tuple[str, str, str], str] = {}
        for (data, protocol, _, seed), row in newest.items():
            if splits.setdefault((data, protocol, seed), row["split"]) != row["split"]:
                raise SystemExit(
                    f"{data}, {protocol}, seed {seed}: methods saw different splits; remove these rows and run again."
                )
        self.rows = list(newest.values())
        self.scores: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
        for (data, protocol, method, seed), row in newest.items():
            numbers = {name: float(row[name]) for name in (*SCORES, *COSTS) if row[name] not in ("", "nan")}
            mean = newest.get((data, protocol, "gene_mean", seed))
            for suffix in ("", "_calibrated"):
                if mean and "rmse" + suffix in numbers:
                    reference = float(mean["rmse" + suffix])
                    numbers["rmse_gain" + suffix] = 100 * (reference - numbers["rmse" + suffix]) / reference
            self.scores.setdefault((data, protocol, method), {})[seed] = numbers

    def data(self, protocol: str) -> list[str]:
        """Data sets with runs under a protocol."""
        return sorted({data for data, p, method in self.scores if p == protocol})

    def methods(self, protocol: str, data: str | None = None) -> list[str]:
        """Methods with runs under a protocol, best first: by the mean rank in the main score over data sets."""
        ranks: dict[str, list[int]] = {}
        for name in self.data(protocol) if data is None else [data]:
            here = [m for d, p, m in self.scores if (d, p) == (name, protocol) and m != CEILING]
            sign = -1 if main_score(protocol) == "rmse" else 1
            for rank, method in enumerate(
                sorted(here, key=lambda m: -sign * self.mean(name, protocol, m, main_score(protocol)))
            ):
                ranks.setdefault(method, []).append(rank)
        return sorted(ranks, key=lambda method: statistics.mean(ranks[method]))

    def values(self, data: str, protocol: str, method: str, score: str) -> list[float]:
        """Return a score over seeds."""
        runs = self.scores.get((data, protocol, method), {}).values()
        return [run[score] for run in runs if score in run]

    def mean(self, data: str, protocol: str, method: str, score: str) -> float:
        """Mean of a score over seeds; NaN without any."""
        values = self.values(data, protocol, method, score)
        return statistics.mean(values) if values else math.nan


def main_score(protocol: str) -> str:
    """Name the score that methods are ordered by."""
    return "gain" if protocol == "thinning" else "rmse"


def lead_score(protocol: str) -> str:
    """Name the score that leads are taken of: gains over the gene mean."""
    return "gain" if protocol == "thinning" else "rmse_gain"


def is_peer(method: str) -> bool:
    """Whether a method is one that ours is compared with."""
    return method not in SPECIAL and (not method.startswith(OURS) or method == "spaformer_paper")


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Write mean ± standard deviation; nothing without values."""
    if not values:
        return ""
    mean = f"{round(statistics.mean(values), digits) + 0.0:{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Make a Markdown table."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
    ]


TITLES = {
    "gain": ("nats per held count", 4),
    "deviance_explained": ("deviance explained", 4),
    "rmse": ("RMSE", 4),
    "rmse_gain": ("gain over gene mean, %", 2),
    "rmse_nonzero": ("RMSE, nonzero", 4),
    "pearson": ("Pearson", 4),
    "cosine": ("cosine", 4),
    "gene_pearson": ("median gene Pearson", 3),
}
"""Name of each score in tables, and its digits."""


def data_table(results: Results, data: str, protocol: str) -> list[str]:
    """One data set under one protocol: all scores and costs of all methods, best first."""
    row = next(row for row in results.rows if (row["data"], row["protocol"]) == (data, protocol))
    threads = sorted({r["threads"] for r in results.rows if (r["data"], r["protocol"]) == (data, protocol)})
    shown = THINNING_SCORES if protocol == "thinning" else ("rmse", "rmse_gain", *HIDDEN_SCORES[1:])
    columns = ["method", "seeds"]
    for score in shown:
        columns += [TITLES[score][0], "calibrated"]
    lines = []
    for method in results.methods(protocol, data):
        line = [method, str(len(results.scores[data, protocol, method]))]
        for score in shown:
            for suffix in ("", "_calibrated"):
                line.append(spread(results.values(data, protocol, method, score + suffix), TITLES[score][1]))
        for cost, digits in (("seconds", 1), ("cpu_seconds", 1), ("peak_mib", 0)):
            line.append(f"{results.mean(data, protocol, method, cost):.{digits}f}")
        lines.append(line)
    page = [
        f"**{data}**, {protocol}: {row['n_cells']} cells × {row['n_genes']} genes, {row['n_fovs']} fields of view, "
        f"{' or '.join(threads)} thread(s)",
        "",
        *markdown([*columns, "seconds", "CPU seconds", "peak MiB"], lines),
    ]
    if ceiling := results.values(data, protocol, CEILING, "gene_pearson"):
        page += [f"Noise ceiling of the median gene Pearson: {spread(ceiling, 3)}.", ""]
    return page


def summary_table(results: Results, protocol: str, suffix: str) -> list[str]:
    """Methods × data sets, in the main score; the best of each data set in bold, the truth apart."""
    score, sets = main_score(protocol), results.data(protocol)
    methods = results.methods(protocol)
    best = min if score == "rmse" else max
    leaders = {
        data: best(
            (m for m in methods if m != TRUTH and results.values(data, protocol, m, score + suffix)),
            key=lambda m: results.mean(data, protocol, m, score + suffix),
            default=None,
        )
        for data in sets
    }
    lines = []
    for method in methods:
        cells = [spread(results.values(data, protocol, method, score + suffix), TITLES[score][1]) for data in sets]
        lines.append([method, *(f"**{c}**" if leaders[d] == method else c for d, c in zip(sets, cells))])
    title = f"**All data sets**, {protocol}: {TITLES[score][0]}" + (", calibrated" if suffix else "")
    return [title, "", *markdown(["method", *sets], lines)]


def lead(
    results: Results, data: str, protocol: str, score: str, relative: bool, over: str | None = None
) -> tuple[str, list[float]] | None:
    """Return the best peer in a score, and our lead over it, seed by seed; None if either is lacking.

    Leads are differences or, if `relative`, differences in percent of the peer's score, or of what that has beyond the
    score of the method `over`, where that is above 0.
    """
    peers = [m for m in results.methods(protocol, data) if is_peer(m) and results.values(data, protocol, m, score)]
    ours = results.scores.get((data, protocol, OURS), {})
    if not peers or not ours:
        return None
    peer = max(peers, key=lambda m: results.mean(data, protocol, m, score))
    theirs = results.scores[data, protocol, peer]
    simple = results.scores.get((data, protocol, over or ""), {})
    leads = []
    for seed in sorted(ours.keys() & theirs.keys()):
        least = simple.get(seed, {}).get(score) if over else 0.0
        if least is None or score not in ours[seed] or score not in theirs[seed]:
            continue
        difference = ours[seed][score] - theirs[seed][score]
        if not relative:
            leads.append(difference)
        elif theirs[seed][score] > least:
            leads.append(100 * difference / (theirs[seed][score] - least))
    return peer, leads


def lead_table(results: Results, protocol: str) -> list[str]:
    """The lead of our default over the best peer in each score, raw against raw and calibrated against calibrated.

    Calibration mixes the cell's own counts into every prediction, that of the gene mean too; the lead in percent of
    what the peer has beyond the gene mean that was treated alike stands beside that of its whole gain.
    """
    columns = ["data", "predictions", f"best peer by {TITLES[lead_score(protocol)][0].removesuffix(', %')}", "lead, %"]
    if protocol == "thinning":
        columns.append("of the gain over a gene mean treated alike, %")
    differences = ["gene_pearson"] if protocol == "thinning" else ["gene_pearson", "pearson"]
    for score in differences:
        columns += [f"best peer by {TITLES[score][0]}", "difference"]
    lines = []
    for data in results.data(protocol):
        for suffix in ("", "_calibrated"):
            line = [data, "calibrated" if suffix else "raw"]
            for score in (lead_score(protocol), *differences):
                relative = score == lead_score(protocol)
                found = lead(results, data, protocol, score + suffix, relative)
                line += ["", ""] if found is None else [found[0], spread(found[1], 1 if relative else 4, "+")]
                if relative and protocol == "thinning":
                    alike = lead(results, data, protocol, score + suffix, relative, over="gene_mean")
                    line.append("" if alike is None else spread(alike[1], 1, "+"))
            if any(line[2:]):
                lines.append(line)
    if not lines:
        return []
    title = f"**Lead of {OURS}** over the best peer, {protocol}: paired over seeds, positive where {OURS} is better"
    return [title, "", *markdown(columns, lines)]


def report(rows: Iterable[Row], folder: Path) -> str:
    """Write tables (Markdown) and figures (PNG) of all runs; returns the tables."""
    results = Results(rows)
    page: list[str] = []
    for protocol in PROTOCOLS:
        sets = results.data(protocol)
        if not any(results.methods(protocol, data) for data in sets):
            continue
        page += [f"## {protocol}", "", "Mean ± standard deviation over seeds.", ""]
        for data in sets:
            page += data_table(results, data, protocol)
        for suffix in ("", "_calibrated"):
            page += summary_table(results, protocol, suffix)
        page += lead_table(results, protocol)
        draw_scores(results, protocol, folder / f"{protocol}.png")
        draw_costs(results, protocol, folder / f"{protocol}_cost.png")
    text = "\n".join(page)
    (folder / "tables.md").write_text(text)
    return text


# ------------------------------------------------------------------------------------------------------------- figures

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999", "#000000")  # Okabe and Ito
MARKERS = "osD^v"
HIGHLIGHT = "#D55E00"
LEAST_SPAN = 0.01  # of an axis of gains, where no method gains anything


def drawn_title(protocol: str) -> str:
    """Say what figures show, which is the score that leads are taken of; higher is better."""
    unit = "nats per held count over the gene mean" if protocol == "thinning" else "RMSE saved over the gene mean, %"
    return f"{protocol}: {unit}"


def grid_of_axes(n: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Make a figure with a panel for each of `n` data sets, at most three in a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n_columns = min(n, 3)
    n_rows = -(-n // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(1.6 + width * n_columns, 0.9 + height * n_rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:n])


def draw_scores(results: Results, protocol: str, path: Path) -> None:
    """Draw the main score of every method: a filled dot as predicted, an open one calibrated, lines over seeds."""
    import matplotlib.pyplot as plt

    score = lead_score(protocol)
    methods = [
        m
        for m in results.methods(protocol)
        if any(results.values(d, protocol, m, score) for d in results.data(protocol))
    ]
    sets = [d for d in results.data(protocol) if any(results.values(d, protocol, m, score) for m in methods)]
    if not sets:
        return
    figure, axes = grid_of_axes(len(sets), 3.6, 0.6 + 0.24 * len(methods))
    for axis, data in zip(axes, sets):
        means = [results.mean(data, protocol, m, score + s) for m in methods for s in ("", "_calibrated")]
        top = max(LEAST_SPAN, *(value for value in means if not math.isnan(value)))
        least = -0.15 * top
        for place, method in enumerate(methods):
            ours = method.startswith(OURS) and not is_peer(method)
            colour = HIGHLIGHT if ours else "#000000" if method == TRUTH else "#0072B2"
            for suffix, offset, fill in (("_calibrated", 0.16, "white"), ("", -0.16, colour)):
                values = results.values(data, protocol, method, score + suffix)
                if values and statistics.mean(values) < least:
                    axis.text(
                        least, place + offset, f"◂ {statistics.mean(values):.3g}", fontsize=6, va="center", color=colour
                    )
                elif values:
                    axis.plot([min(values), max(values)], [place + offset] * 2, color=colour, linewidth=1.5)
                    axis.plot(
                        statistics.mean(values), place + offset, "o", markersize=5, color=colour, markerfacecolor=fill
                    )
            if method == OURS:
                axis.axhspan(place - 0.5, place + 0.5, color=HIGHLIGHT, alpha=0.12, linewidth=0)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_xlim(least, top * 1.06)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.set_yticks(range(len(methods)), methods if axis in axes[::3] else [], fontsize=8)
        axis.grid(axis="both", color="0.93")
        axis.set_axisbelow(True)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(data, fontsize=9)
    handles = [
        plt.Line2D([], [], marker="o", color=HIGHLIGHT, label="spaformer, as predicted"),
        plt.Line2D([], [], marker="o", color="#0072B2", label="peer, as predicted"),
        plt.Line2D([], [], marker="o", color="0.3", markerfacecolor="white", label="calibrated"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"{drawn_title(protocol)}\n(mean and range over seeds)", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_costs(results: Results, protocol: str, path: Path) -> None:
    """Draw the main score of every method against its processor time."""
    import matplotlib.pyplot as plt

    score = lead_score(protocol)
    methods = [m for m in results.methods(protocol) if m not in SPECIAL]
    sets = [d for d in results.data(protocol) if any(results.values(d, protocol, m, score) for m in methods)]
    if not sets:
        return
    order = sorted(methods, key=lambda m: list(METHODS).index(m) if m in METHODS else len(METHODS))
    peers, own = [m for m in order if is_peer(m)], [m for m in order if not is_peer(m)]
    styles = {
        m: (MARKERS[i // len(COLOURS) % len(MARKERS)], COLOURS[i % len(COLOURS)], 5.0) for i, m in enumerate(peers)
    }
    styles |= {m: ("*PXdp"[i % 5], HIGHLIGHT, 13.0 if m == OURS else 8.0) for i, m in enumerate(own)}
    figure, axes = grid_of_axes(len(sets), 3.2, 3.0)
    for axis, data in zip(axes, sets):
        top = max(
            LEAST_SPAN,
            *(results.mean(data, protocol, m, score) for m in methods if results.values(data, protocol, m, score)),
        )
        for method in methods:
            marker, colour, size = styles[method]
            value = results.mean(data, protocol, method, score)
            seconds = max(results.mean(data, protocol, method, "cpu_seconds"), 0.01)
            below = value < -0.15 * top
            axis.plot(
                seconds, -0.15 * top if below else value, marker, color=colour, markersize=size,
                markerfacecolor="white" if below else colour, markeredgewidth=0.8,
            )  # fmt: skip
        axis.axhline(0, color="0.6", linewidth=1)
        axis.set_xscale("log")
        axis.set_ylim(-0.18 * top, top * 1.08)
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.set_title(data, fontsize=9)
        axis.set_xlabel("CPU seconds", fontsize=8)
    handles = [
        plt.Line2D(
            [], [], linestyle="", marker=styles[m][0], color=styles[m][1], markersize=styles[m][2] * 0.8, label=m
        )
        for m in methods
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"{drawn_title(protocol)}\n(up and left is better; open markers lie below the frame)", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------- command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", default=[SIMULATED], help=f"h5ad files with raw counts in X, or {SIMULATED!r} (default)"
    )
    parser.add_argument(
        "--library-key", default="fov", help="column of obs with the field of view, where a file has it (default: fov)"
    )
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help="default: all")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[*METHODS, *SPECIAL],
        help=f"default: all of {', '.join((*METHODS, *SPECIAL))}; or path/to/file.py:function",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="one split each, and shown in tables (default: 0 1 2)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of runs.csv, whose runs are skipped, tables.md and figures"
    )
    parser.add_argument("--tables-only", action="store_true", help="run nothing; make tables of the runs there are")
    options = parser.parse_args(arguments)

    names = {SIMULATED if data == SIMULATED else Path(data).stem: data for data in dict.fromkeys(options.data)}
    if len(names) < len(set(options.data)):
        parser.error("--data: two files have the same name, which the results tell them apart by; rename one")
    for data in names.values():
        if data != SIMULATED and not Path(data).is_file():
            parser.error(f"--data: there is no file {data}")
    for method in options.methods:
        if method not in METHODS and method not in SPECIAL and not Path(method.rpartition(":")[0]).is_file():
            parser.error(
                f"--methods: {method!r} is neither path/to/file.py:function of a file that exists nor one of "
                f"{', '.join((*METHODS, *SPECIAL))}"
            )
    order = {method: place for place, method in enumerate((*METHODS, *SPECIAL))}
    methods = sorted(dict.fromkeys(options.methods), key=lambda method: order.get(method, len(order)))
    if len({label(method) for method in methods}) < len(methods):
        parser.error("--methods: two methods have the same name, which the results tell them apart by; rename one")

    path = options.out / "runs.csv"
    rows = read_rows(path, COLUMNS)
    if not options.tables_only:
        options.out.mkdir(parents=True, exist_ok=True)
        failed = run_missing(options, names, methods, path, rows)
    else:
        failed = 0
    shown = [row for row in rows if int(row["seed"]) in options.seeds]
    if not shown:
        print(f"{path} holds no runs of these seeds; there is nothing to make tables of.", file=sys.stderr)
        return 1
    known = {method: code_version(method) for method in (*METHODS, *SPECIAL)}
    old = sum(row["code"] != known.get(row["method"], row["code"]) for row in rows)
    if old:
        print(f"{old} of {len(rows)} runs in {path} were made by other code; they are kept.", file=sys.stderr)
    print(report(shown, options.out))
    return int(failed > 0)


def run_missing(
    options: argparse.Namespace, names: dict[str, str], methods: list[str], path: Path, rows: list[Row]
) -> int:
    """Make the runs that are asked for and that the results file lacks; returns how many failed."""
    have = {tuple(row[column] for column in KEY) for row in rows}
    with tempfile.TemporaryDirectory(dir=options.out, prefix="splits-") as folder:
        tasks = []
        for seed in dict.fromkeys(options.seeds):
            for protocol in dict.fromkeys(options.protocols):
                for name, data in names.items():
                    place = {"data": data, "library_key": options.library_key, "protocol": protocol, "seed": seed}
                    place |= {"name": name, "folder": str(Path(folder).resolve() / str(len(tasks)))}
                    missing = [
                        method
                        for method in methods
                        if possible(data, protocol, method) and key_of(place, method, options.threads) not in have
                    ]
                    if missing:
                        tasks.append(Task(place, missing, Path(place["folder"]), len(missing)))
        runner = Runner(path, rows, options.threads, sum(len(task.methods) for task in tasks))
        runner.run_all(tasks, options.jobs)
    return runner.failed


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Do what a process was started for."""
    import tasks

    function = {"make_task": tasks.make_task, "run_method": tasks.run_method}[job.pop("function")]
    job.pop("name", None)
    return dict(function(**job))


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--job":
        Path(sys.argv[3]).write_text(json.dumps(run_job(json.loads(sys.argv[2]))))
    else:
        sys.exit(main())
