"""One page that says what was done, how good it is, and what can be believed."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spaformer_sc import _checks
from spaformer_sc._data_objects import takes_tables
from spaformer_sc._files import replacing
from spaformer_sc._keys import Keys
from spaformer_sc._logging import logger
from spaformer_sc._result import genes_of
from spaformer_sc._write import check_path
from spaformer_sc.training.reliability import LEAST_CORRELATION, LEAST_HELD, LEVELS, SURELY, WORTHWHILE, undecided

from ._drawing import panel_height
from ._html import chart, number, page, picture, signed, some, table
from ._plots import Maps, calibration, history, maps_of, reliability

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

SCORES = (
    "reliability",
    "gain_over_baseline",
    "gain_over_baseline_se",
    "true_correlation",
    "true_correlation_se",
    "held_out",
)
"""Scores of genes that the page shows."""
N_MAPS = 4
"""Genes that are drawn unless some are asked for."""
MOST_ROWS = 2000
"""Rows of the table of genes."""
CLASSES = dict(zip(LEVELS, ("none", "weak", "reliable"), strict=True))
PACKAGES = ("spaformer_sc", "anndata", "scanpy", "squidpy", "torch", "numpy", "matplotlib")
USES = {
    "looking at a gene in the tissue, choosing genes to follow up": "yes, if it is reliable; look at the counts too",
    "cell types, clusters, UMAP": "yes: principal components of the imputed layer, beside those of the counts",
    "layers, niches": "yes: the latent space, which knows a cell's neighbours",
    "testing whether a gene differs between groups of cells": "no: test the counts; tests of imputed values call most "
    "genes that do not differ",
    "correlations between genes, co-expression, ligand–receptor scores": "no: one gene is imputed from the others",
    "ranking genes by spatial autocorrelation": "with care: imputed values hardly have noise",
    "counting zeros, fractions of expressing cells": "no: use the counts, or sf.tl.detection",
}
PAPER = (
    "Hongzhi Wen, Wenzhuo Tang, Wei Jin, Jiayuan Ding, Renming Liu, Xinnan Dai, Feng Shi, Lulu Shang, Hui Liu, Yuying "
    "Xie (2023). Single Cells Are Spatial Tokens: Transformers for Spatial Transcriptomic Data Imputation."
)


@takes_tables
def report(
    adata: AnnData | SpatialData,
    path: str | os.PathLike[str],
    *,
    table_key: str | None = None,
    genes: str | Sequence[str] | None = None,
    key_added: str = "spaformer",
    spatial_key: str | None = None,
    fov: str | None = None,
    title: str = "Imputation report",
) -> Path:
    """Write a page about a result: what was done, how good it is, which genes to trust, and what not to use it for.

    The page is one HTML file that holds its images and needs no network. It says what the result itself records, and
    nothing of when or where it was made. Where a file of this name is there, the whole new one takes its place.

    Parameters
    ----------
    adata
        Result of :func:`spaformer_sc.tl.impute`; not changed.
    path
        File to write; its name ends in ``.html``.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    genes
        Genes to draw in space; by default up to four reliable ones (or, if there are none, weak ones), those whose gain
        over their own counts is the largest in units of its standard error.
    key_added
        Name of the result.
    spatial_key
        Positions to draw at; those of the result by default. Where they start anew in each field of view, name global
        ones here.
    fov
        Draw this field of view only; all cells by default. Scores are of all.
    title
        Heading of the page.

    Returns
    -------
    Path of the file.

    Raises
    ------
    KeyError
        If there is no result of this name, or no such gene or field of view.
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If a gene was not imputed, counts have changed since, or the name does not end in ``.html``.
    FileNotFoundError, PermissionError
        If the folder does not exist or cannot be written to.

    Examples
    --------
    >>> sf.pl.report(adata, "report.html")
    """
    _checks.check_name("title", title)
    target = check_path("path", path, (".html",))
    keys = Keys(key_added)
    slots = [("layers", keys.layer), ("obs", keys.obs("reliability")), *(("var", keys.var(score)) for score in SCORES)]
    record = _checks.check_result(adata, keys.uns, slots)
    judged = _judged(adata, keys, genes_of(record["params"]))
    chosen = _best(judged) if genes is None else list(adata.var_names[_checks.check_genes(adata, genes)])
    maps = maps_of(adata, chosen, key_added, fov, spatial_key) if chosen else None
    parts = [
        _head(adata, record, judged, title),
        _done(record),
        _quality(adata, keys, record, judged),
        _trust(adata, keys, judged),
        _shown(maps, genes is None, fov),
        _training(adata, keys, record),
        _last(),
    ]
    content = page(title, "\n".join(parts))
    with replacing(target) as fresh:
        fresh.write_text(content, encoding="utf-8")
    logger.info("wrote %s", os.fspath(path))
    return target


def _head(adata: AnnData, record: Mapping[str, Any], judged: pd.DataFrame, title: str) -> str:
    """Title, the result in a few sentences, and what a reader has to know first."""
    params, scores = record["params"], record["scores"]
    counts = judged["reliability"].value_counts().reindex(LEVELS[::-1], fill_value=0)
    gain, over = float(scores["gain"]), float(scores["gain_over_baseline"])
    lead = "Too little was held out to say how good this imputation is."
    if math.isfinite(gain) and math.isfinite(over):
        lead = (
            f"Transcripts that the fit had not seen were {math.exp(gain):.2f} times as likely under this imputation as "
            f"under each gene's mean at the depth of the cell, and {math.exp(over):.2f} times as likely as under what "
            f"each gene's own counts tell (geometric means). {number(counts[LEVELS[2]])} of {number(len(judged))} "
            "genes are reliable."
        )
        if few := int(undecided(judged).sum()):
            lead += f" Of {number(few)} other{'s' * (few != 1)} too few transcripts were held out to tell."
    bar, key = [], []
    for level, count in counts.items():
        bar.append(f'<span style="flex:{count};background:var(--{CLASSES[level]})"></span>' if count else "")
        key.append(f'<li><span class="{CLASSES[level]}">{escape(level)}: {number(count)} genes</span></li>')
    fields = len(record["fovs"]["fov"])
    about = (
        f"{number(adata.n_obs)} cells × {number(len(judged))} genes, {number(fields)} field{'s' * (fields != 1)} of "
        f"view; result <code>{escape(params['key_added'])}</code> of spaformer_sc {escape(str(params['spaformer_sc']))}"
    )
    notes = "".join(f"<li>{escape(sentence)}</li>" for sentence in _warnings(adata, record, counts))
    warned = f'<div class="warn"><p><strong>Please note</strong></p><ul>{notes}</ul></div>' if notes else ""
    return (
        f'<h1>{escape(title)}</h1>\n<p class="about">{about}</p>\n<p class="lead">{lead}</p>\n'
        f'<div class="bar" aria-hidden="true">{"".join(bar)}</div>\n<ul class="key">{"".join(key)}</ul>\n{warned}'
    )


def _warnings(adata: AnnData, record: Mapping[str, Any], counts: pd.Series) -> list[str]:
    """What a reader has to know before anything else, in sentences."""
    params, scores, fovs = record["params"], record["scores"], record["fovs"]
    said = []
    if not math.isfinite(float(scores["gain_over_baseline_se"])):
        said.append("Too few transcripts or cells to hold some out: nothing can be said of how good the result is.")
    elif not scores["better_than_baseline"]:
        said.append(
            "The imputation was not shown to be better than each gene's mean and own counts. Do not rely on it."
        )
    if not counts["reliable"]:
        said.append("No gene is reliable.")
    if adata.n_obs < _checks.FEW_CELLS:
        said.append(f"There are only {adata.n_obs} cells: little to learn from, and little to judge by.")
    names, verdicts = [str(name) for name in fovs["fov"]], [str(verdict) for verdict in fovs["reliability"]]
    worse = [name for name, verdict in zip(names, verdicts, strict=True) if verdict != LEVELS[2]]
    if worse and len(names) > 1:
        said.append(f"{len(worse)} of {len(names)} fields of view are not reliable as a whole: {some(worse)}.")
    n_fields = int(params["graph_summary"]["n_fovs"])
    if len(names) < n_fields:
        said.append(f"The model was fitted to, and scored on, {len(names)} of the {n_fields} fields of view.")
    if int(params["graph_summary"]["n_components"]) > 2 * int(params["graph_summary"]["n_tiles"]):
        said.append(
            f"The spatial graph falls into {params['graph_summary']['n_components']} parts: many cells have few or no "
            "neighbours that they are connected to."
        )
    unfinished = _still_rising(record)
    if unfinished:
        said.append(
            f"Of network {some(unfinished)} the score was best at the last step of training: more steps may help."
        )
    if params["zeros"] != "impute":
        said.append("Zeros that a second look would very likely find again were left at 0; there are no intervals.")
    if record.get("posterior") is None:
        said.append("The decoder is Gaussian: there are no intervals, and uncertainties are not known.")
    if params["missing"] is not None:
        said.append("Some entries were not measured; scores are of entries that were.")
    return said


def _still_rising(record: Mapping[str, Any]) -> list[str]:
    """Numbers of the networks whose last score is their best."""
    course = {name: np.asarray(values, dtype=float) for name, values in record["history"].items()}
    found = []
    for network in np.unique(course["network"]):
        score = course["validation"][course["network"] == network]
        if np.isfinite(score).any() and np.nanargmax(score) == len(score) - 1:
            found.append(str(int(network) + 1))
    return found


def _done(record: Mapping[str, Any]) -> str:
    """What the result records of how it was made."""
    params, model, summary = record["params"], record["params"]["model"], record["params"]["graph_summary"]
    networks = zip(params["networks"]["form"], params["networks"]["weight"], strict=True)
    graph = {
        "knn": f"{params['n_neighbors']} nearest neighbours",
        "delaunay": "Delaunay triangulation",
        "radius": f"all cells within {params['radius']}",
    }[params["graph"]]
    fields, positional = params["library_key"], some(_listed(model["positional"])) or "none"
    rows = {
        "counts": "adata.X" if params["layer"] is None else f"adata.layers[{params['layer']!r}]",
        "fields of view": "none given: one image" if fields is None else f"adata.obs: {some(_listed(fields))}",
        "spatial graph": graph if params["connectivity_key"] is None else f"adata.obsp[{params['connectivity_key']!r}]",
        "between neighbours, typically": f"{summary['typical_distance']:.3g} in the unit of the coordinates",
        "model": f"encoder {model['encoder']}, decoder {model['decoder']}, positional encoding {positional}; "
        f"preset {params['preset']}, quality {params['quality']}",
        "networks": some([f"{form} (weight {weight:.2f})" for form, weight in networks]),
        "scale of the imputed layer": f"{params['output']}, target sum {params['target_sum']:g}",
        "seed": params["random_state"],
    }
    listed = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>\n" for name, value in rows.items())
    parameters = table(("parameter", "value"), _flat(params), "All parameters")
    return (
        f"<h2>What was done</h2>\n<dl>{listed}</dl>\n<details><summary>All parameters</summary>{parameters}</details>"
    )


def _quality(adata: AnnData, keys: Keys, record: Mapping[str, Any], judged: pd.DataFrame) -> str:
    """Scores over all genes, of fields of view, and coverage of intervals."""
    scores, fovs, posterior = record["scores"], record["fovs"], record.get("posterior")
    rows = [
        (
            "gain over gene means",
            f"{scores['gain']:.3f}",
            "nats of log-likelihood for each held-out transcript, over library size times gene mean",
        ),
        (
            "the same of a neighbour baseline",
            f"{scores['gain_neighbours']:.3f}",
            "own counts, direct neighbours' counts and gene means, mixed",
        ),
        (
            "gain over own counts",
            signed(scores["gain_over_baseline"], scores["gain_over_baseline_se"]),
            "nats for each held-out transcript, over what each gene's own counts tell, with its standard error",
        ),
        ("deviance explained", f"{scores['deviance_explained']:.1%}", "of the Poisson deviance from gene means"),
        (
            "median correlation per gene",
            f"{scores['median_pearson']:.3f}",
            "with single held-out transcripts, whose noise keeps it low even for a perfect prediction",
        ),
    ]
    cells = adata.obs[keys.obs("reliability")].astype(str).value_counts()
    parts = [
        f"<h2>How good it is</h2>\n<p>All scores rest on {number(judged['held_out'].sum())} transcripts, about a "
        "twentieth of those of the fit, that neither training nor the choice of networks has seen. They are of this "
        "data: they say nothing of other tissue.</p>",
        table(("score", "value", "what it is"), rows, "Scores", "stack", numbers={1}),
        "<p>Verdicts on cells, each judged with about 50 that are alike: "
        + "; ".join(f"{level}: {number(cells.get(level, 0))}" for level in LEVELS[::-1])
        + ".</p>",
    ]
    if len(fovs["fov"]) > 1:
        head = ("field of view", "cells", "held-out transcripts", "gain over own counts", "verdict")
        of_fields = [
            (escape(str(of.fov)), number(of.n_cells), number(of.held_out), _gain(of), _verdict(of.reliability))
            for of in pd.DataFrame({name: list(values) for name, values in fovs.items()}).itertuples()
        ]
        parts.append("<h3>By field of view</h3>")
        parts.append(table(head, of_fields, "Scores of each field of view", "tall", numbers={1, 2, 3}))
    if posterior is not None and posterior["n_scored"]:
        off = np.asarray(posterior["coverage"], dtype=float) - np.asarray(posterior["levels"], dtype=float)
        most = f"{max(100 * float(np.abs(off).max()), 0.1):.1f} points"
        parts.append("<h3>Do intervals hold?</h3>")
        parts.append(
            chart(
                partial(_draw, calibration, adata, keys),
                f"Line chart: coverage of intervals, minus their level; over all entries at most {most} apart.",
                "Held-out counts inside intervals, minus the level of the intervals, for ranges of expected counts. "
                f"Over all entries the gap is at most {most}. Counts were at a twentieth of the depth of the cell.",
            )
        )
    return "\n".join(parts)


def _trust(adata: AnnData, keys: Keys, judged: pd.DataFrame) -> str:
    """What verdicts mean, and those of the genes."""
    shown, counts = judged.iloc[:MOST_ROWS], judged["reliability"].value_counts()
    summary = ", ".join(f"{number(counts.get(level, 0))} {level}" for level in LEVELS[::-1])
    rows = [
        (escape(str(of.Index)), _verdict(of.reliability, few), _gain(of), _correlation(of), number(of.held_out))
        for of, few in zip(shown.itertuples(), undecided(shown), strict=True)
    ]
    head = ("gene", "verdict", "gain over own counts", "estimated correlation with the truth", "held-out transcripts")
    cut = "" if len(shown) == len(judged) else f" The first {number(len(shown))} of {number(len(judged))} are listed."
    printed = '<p class="note printed">The first 40 rows are printed.</p>' if len(shown) > 40 else ""
    return "\n".join(
        (
            "<h2>Which genes to trust</h2>",
            '<p><span class="reliable"><strong>reliable</strong></span>: better than the gene\'s own counts by more '
            f"than {SURELY:g} standard errors, estimated correlation with the truth {LEAST_CORRELATION} or more. "
            '<span class="weak"><strong>weak</strong></span>: better, but not as surely. '
            '<span class="none"><strong>no better than baseline</strong></span>: not shown to be better; that is no '
            "proof that its values are useless. <em>too few</em> beside it: fewer than "
            f"{LEAST_HELD} transcripts were held out, or not enough to rule out that each is "
            f"{math.expm1(WORTHWHILE):.0%} more likely, so that nothing can be said. In shallow data many genes that "
            "are imputed well cannot be shown to be.</p>",
            chart(
                partial(_draw, reliability, adata, keys),
                f"Scatter plot of genes: gain over their own counts, estimated correlation with the truth; {summary}.",
                "Each gene by its gain over its own counts and its estimated correlation with the true expression, "
                "which is cut at 1. Dotted lines are what the verdicts ask for; larger points have more held-out "
                "transcripts.",
            ),
            table(head, rows, "Genes, best first", "tall long", numbers={2, 3, 4}),
            f'{printed}<p class="note">Sorted by verdict, then by gain in units of its standard error (±, in nats for '
            f"each held-out transcript).{cut} All scores: <code>adata.var</code>, columns "
            f"<code>{escape(keys.key_added)}_…</code>.</p>",
        )
    )


def _shown(maps: Maps | None, chosen: bool, fov: str | None) -> str:
    """Maps of genes; ``chosen`` here, or named by the user."""
    title = "<h2>Genes in the tissue</h2>\n"
    if maps is None:
        return title + "<p>No gene is reliable or weak, so none is drawn; <code>genes=</code> draws what you name.</p>"
    said = [] if fov is None else [f"Field of view {fov}."]
    if chosen:
        said.append(f"The {maps.genes[0].verdict} genes whose gain over their own counts is the surest:")
        said.append("they are examples, not a selection by biology.")
    said.append("Each panel has its own colours, which end at the 99.5th percentile.")
    said.append("See whether the pattern of the imputed values is in the counts as well, if faintly.")
    size, parts = (4.2, panel_height(maps.places, 4.2)), [f"{title}<p>{escape(' '.join(said))}</p>"]
    for gene in maps.genes:
        captions = (f"observed {gene.zeros}", "imputed", "uncertainty (standard deviation)")
        panels = "".join(
            picture(partial(maps.draw, panel), size, f"Map of {gene.name} in the tissue, {caption}.", caption)
            for panel, caption in zip(gene.panels, captions, strict=False)
        )
        parts.append(f'<h3>{escape(gene.name)} · {_verdict(gene.verdict)}</h3>\n<div class="maps">{panels}</div>')
    return "\n".join(parts)


def _training(adata: AnnData, keys: Keys, record: Mapping[str, Any]) -> str:
    n = len(record["params"]["networks"]["form"])
    steps = int(np.max(np.asarray(record["history"]["step"], dtype=float), initial=0))
    return "<h2>Training</h2>\n" + chart(
        partial(_draw, history, adata, keys),
        f"Line chart: score on held-out transcripts of {n} network{'s' * (n != 1)} over up to {number(steps)} steps.",
        "Score on transcripts held out for this, which are others than those of the scores above. The weights kept are "
        "those of the best score of each network, marked by a point.",
    )


def _last() -> str:
    """What to use it for, how to cite it, and what wrote the page."""
    uses = table(("use", "advice"), USES.items(), "Uses of imputed values", "stack")
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        "<h2>What imputed values may be used for</h2>\n<p>They are expectations, smoother than data: they show "
        f"patterns and are not new measurements.</p>\n{uses}"
        f'<h2>How to cite</h2>\n<p>{PAPER} <a href="https://arxiv.org/abs/2302.03038">arXiv 2302.03038</a>.</p>\n'
        f"<p>spaformer_sc {version('spaformer_sc')}, an independent implementation of this method. Say which version "
        "was used, which genes were reliable, and that values are imputed.</p>\n"
        f"<footer>Page written {escape(written)} by sf.pl.report with Python {platform.python_version()}, {versions}. "
        "The result may have been made at another time, with other versions.</footer>"
    )


# --- pieces -----------------------------------------------------------------------------------------------------------


def _judged(adata: AnnData, keys: Keys, imputed: list[str] | None) -> pd.DataFrame:
    """Scores of the imputed genes, best first."""
    judged = pd.DataFrame({name: adata.var[keys.var(name)] for name in SCORES})
    judged["reliability"] = judged["reliability"].astype(str)
    if imputed is not None:
        judged = judged.loc[judged.index.isin(imputed)]
    rank = judged["reliability"].map(LEVELS.index)
    surety = (judged["gain_over_baseline"] / judged["gain_over_baseline_se"]).fillna(-np.inf)
    return judged.iloc[np.lexsort((-surety, -rank))]


def _best(judged: pd.DataFrame) -> list[str]:
    """Genes to draw: reliable ones, or weak ones if there are none."""
    for level in LEVELS[:0:-1]:
        names = list(judged.index[judged["reliability"] == level][:N_MAPS])
        if names:
            return names
    return []


def _draw(plot: Any, adata: AnnData, keys: Keys, ax: Any) -> None:
    plot(adata, key_added=keys.key_added, ax=ax)


def _verdict(level: str, few: bool = False) -> str:
    return f'<span class="v {CLASSES[level]}">{escape(level)}</span>' + " (too few)" * few


def _gain(of: Any) -> str:
    return signed(of.gain_over_baseline, of.gain_over_baseline_se)


def _correlation(of: Any) -> str:
    if pd.isna(of.true_correlation):
        return "–"
    return f"{of.true_correlation:.2f}" + (f" ± {of.true_correlation_se:.2f}" if of.true_correlation_se >= 0 else "")


def _listed(value: Any) -> list[str]:
    """One name or several as a list; files give lists back as arrays."""
    return [value] if isinstance(value, str) else [str(one) for one in value]


def _flat(params: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested parameters as pairs of a name with dots and a value, as HTML."""
    found = []
    for name, value in params.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{before}{name}.")
        else:
            plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
            found.append((escape(f"{before}{name}"), escape(json.dumps(plain, ensure_ascii=False))))
    return found
