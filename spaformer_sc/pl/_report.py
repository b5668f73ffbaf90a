"""One page that says what was done, how good it is, and what can be believed."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spaformer_sc import _checks
from spaformer_sc._files import replacing
from spaformer_sc._keys import Keys
from spaformer_sc._logging import logger
from spaformer_sc._result import genes_of
from spaformer_sc._write import check_path
from spaformer_sc.training.reliability import LEAST_HELD, LEVELS

from ._drawing import panel_height
from ._plots import Maps, calibration, history, maps_of, reliability

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

N_MAPS = 4
"""Genes that are drawn unless some are asked for."""
MOST_ROWS = 2000
"""Rows of the table of genes."""
FEW_CELLS = 500
CLASSES = dict(zip(LEVELS, ("none", "weak", "reliable"), strict=True))
THEMES = {"light": ("#1f2326", "#ffffff"), "dark": ("#e4e6e7", "#16191c")}
"""Colours of ink and ground, as in ``report.css``."""
PACKAGES = ("spaformer_sc", "anndata", "scanpy", "squidpy", "torch", "numpy", "matplotlib")
USES = (
    ("looking at a gene in the tissue, choosing genes to follow up", "yes, if it is reliable, with the counts beside it"),
    ("cell types, clusters, UMAP", "yes: principal components of the imputed layer, beside those of the counts"),
    ("layers, niches", "yes: the latent space, which knows a cell's neighbours"),
    ("testing whether a gene differs between groups of cells", "no: test the counts; tests of imputed values call most "
     "genes that do not differ"),
    ("correlations between genes, co-expression, ligand–receptor scores", "no: one gene is imputed from the others"),
    ("ranking genes by spatial autocorrelation", "with care: imputed values hardly have noise"),
    ("counting zeros, fractions of expressing cells", "no: use the counts, or sf.tl.detection"),
)  # fmt: skip
PAPER = (
    "Hongzhi Wen, Wenzhuo Tang, Wei Jin, Jiayuan Ding, Renming Liu, Xinnan Dai, Feng Shi, Lulu Shang, Hui Liu, Yuying "
    "Xie (2023). Single Cells Are Spatial Tokens: Transformers for Spatial Transcriptomic Data Imputation."
)


def report(
    adata: AnnData,
    path: str | os.PathLike[str],
    *,
    genes: str | Sequence[str] | None = None,
    key_added: str = "spaformer",
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
    genes
        Genes to draw in space; by default up to four reliable ones (or, if there are none, weak ones), those whose gain
        over their own counts is the largest in units of its standard error.
    key_added
        Name of the result.
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
    scores = ("held_out", "true_correlation", "gain_over_baseline", "gain_over_baseline_se", "reliability")
    slots = [("layers", keys.layer), ("obs", keys.obs("reliability")), *(("var", keys.var(score)) for score in scores)]
    record = _checks.check_result(adata, keys.uns, slots)
    table = _gene_table(adata, keys, genes_of(record["params"]))
    chosen = _best(table) if genes is None else list(adata.var_names[_checks.check_genes(adata, genes)])
    maps = maps_of(adata, chosen, key_added, fov) if chosen else None
    parts = [
        _head(adata, record, table, title),
        _done(adata, record),
        _quality(adata, keys, record, table),
        _trust(adata, keys, table),
        _shown(maps, genes is None, fov),
        _training(adata, keys, record),
        _use(),
        _cite(),
    ]
    page = _page(title, "\n".join(parts))
    with replacing(target) as fresh:
        fresh.write_text(page, encoding="utf-8")
    logger.info("wrote %s", os.fspath(path))
    return target


# --- parts of the page ------------------------------------------------------------------------------------------------


def _page(title: str, body: str) -> str:
    style = files("spaformer_sc.pl").joinpath("report.css").read_text(encoding="utf-8")
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    with_versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Page written {written} by sf.pl.report with Python {platform.python_version()}, {with_versions}. "
        "The result may have been made at another time, with other versions.</footer>\n</main>\n</body>\n</html>\n"
    )


def _head(adata: AnnData, record: Mapping[str, Any], table: pd.DataFrame, title: str) -> str:
    params, scores = record["params"], record["scores"]
    counts = table["reliability"].value_counts().reindex(LEVELS[::-1], fill_value=0)
    gain, over = float(scores["gain"]), float(scores["gain_over_baseline"])
    lead = "Too little was held out to say how good this imputation is."
    if math.isfinite(gain) and math.isfinite(over):
        lead = (
            f"Transcripts that the fit had not seen were {_times(gain)} as likely under this imputation as under each "
            f"gene's mean at the depth of the cell, and {_times(over)} as likely as under what each gene's own counts "
            f"tell (geometric means). {_number(counts['reliable'])} of {_number(len(table))} genes are reliable."
        )
    bar = "".join(
        f'<span style="flex:{count};background:var(--{CLASSES[level]})"></span>' for level, count in counts.items() if count
    )
    key = "".join(
        f'<li><span class="{CLASSES[level]}">{escape(level)}: {_number(count)} genes</span></li>'
        for level, count in counts.items()
    )
    fields = len(record["fovs"]["fov"])
    about = (
        f"{_number(adata.n_obs)} cells × {_number(len(table))} genes, {_number(fields)} "
        f"field{'s' if fields != 1 else ''} of view; result <code>{escape(params['key_added'])}</code> of spaformer_sc "
        f"{escape(str(params['spaformer_sc']))}"
    )
    warnings = _warnings(adata, record, counts)
    warned = ""
    if warnings:
        warned = '<div class="warn"><p><strong>Please note</strong></p>' + _list(warnings) + "</div>"
    return (
        f'<h1>{escape(title)}</h1>\n<p class="about">{about}</p>\n<p class="lead">{lead}</p>\n'
        f'<div class="bar" aria-hidden="true">{bar}</div>\n<ul class="key">{key}</ul>\n{warned}'
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
    if adata.n_obs < FEW_CELLS:
        said.append(f"There are only {adata.n_obs} cells: little to learn from, and little to judge by.")
    names, verdicts = [str(name) for name in fovs["fov"]], [str(verdict) for verdict in fovs["reliability"]]
    worse = [name for name, verdict in zip(names, verdicts, strict=True) if verdict != LEVELS[2]]
    if worse and len(names) > 1:
        said.append(f"{len(worse)} of {len(names)} fields of view are not reliable as a whole: {_some(worse)}.")
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
            f"Of network {_some(unfinished)} the score was best at the last step of training: more steps may help."
        )
    if params["zeros"] != "impute":
        said.append("Zeros that a second look would very likely find again were left at 0; there are no intervals.")
    if record.get("posterior") is None:
        said.append("The decoder is Gaussian: there are no intervals, and uncertainties are not known.")
    if params["missing"] is not None:
        said.append("Some entries were not measured; scores are of entries that were.")
    return [escape(sentence) for sentence in said]


def _still_rising(record: Mapping[str, Any]) -> list[str]:
    """Numbers of the networks whose last score is their best."""
    course = {name: np.asarray(values, dtype=float) for name, values in record["history"].items()}
    found = []
    for number in np.unique(course["network"]):
        score = course["validation"][course["network"] == number]
        if np.isfinite(score).any() and np.nanargmax(score) == len(score) - 1:
            found.append(str(int(number) + 1))
    return found


def _done(adata: AnnData, record: Mapping[str, Any]) -> str:
    params, model = record["params"], record["params"]["model"]
    fields = params["library_key"]
    networks = zip(params["networks"]["form"], params["networks"]["weight"], strict=True)
    graph = {
        "knn": f"{params['n_neighbors']} nearest neighbours",
        "delaunay": "Delaunay triangulation",
        "radius": f"all cells within {params['radius']}",
    }[params["graph"]]
    rows = {
        "counts": "adata.X" if params["layer"] is None else f"adata.layers[{params['layer']!r}]",
        "fields of view": "none given: one image" if fields is None else f"adata.obs: {_some(_listed(fields))}",
        "spatial graph": graph if params["connectivity_key"] is None else f"adata.obsp[{params['connectivity_key']!r}]",
        "typical distance of neighbours": f"{params['graph_summary']['typical_distance']:.3g}, in the unit of the "
        "coordinates",
        "model": f"encoder {model['encoder']}, decoder {model['decoder']}, positional encoding "
        f"{_some(_listed(model['positional'])) or 'none'}; preset {params['preset']}, quality {params['quality']}",
        "networks": _some([f"{form} (weight {weight:.2f})" for form, weight in networks]),
        "scale of the imputed layer": f"{params['output']}, target sum {params['target_sum']:g}",
        "seed": str(params["random_state"]),
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items())
    return (
        f"<h2>What was done</h2>\n<dl>{listed}</dl>\n<details><summary>All parameters</summary>"
        + _table(("parameter", "value"), [[_th(name), escape(value)] for name, value in _flat(params)], "All parameters")
        + "</details>"
    )


def _quality(adata: AnnData, keys: Keys, record: Mapping[str, Any], table: pd.DataFrame) -> str:
    scores, fovs = record["scores"], record["fovs"]
    held = int(table["held_out"].sum())
    error = scores["gain_over_baseline_se"]
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
            f"{scores['gain_over_baseline']:.3f} ± {error:.3f}",
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
    of_cells = "; ".join(f"{level}: {_number(cells.get(level, 0))}" for level in LEVELS[::-1])
    text = (
        "<h2>How good it is</h2>\n"
        f"<p>All scores rest on {_number(held)} transcripts, about a twentieth of those of the fit, that neither training "
        "nor the choice of networks has seen. They are of this data: they say nothing of other tissue.</p>"
        + _table(("score", "value", "what it is"), [[_th(a), (b, "n"), escape(c)] for a, b, c in rows], "Scores", "stack")
        + f"<p>Verdicts on cells, each judged with about 50 that are alike: {of_cells}.</p>"
    )
    if len(fovs["fov"]) > 1:
        by_field = [
            [
                _th(name),
                (_number(int(n)), "n"),
                (_number(int(held)), "n"),
                (_signed(gain, se), "n"),
                _verdict(str(verdict)),
            ]
            for name, n, held, gain, se, verdict in zip(
                *(
                    fovs[score]
                    for score in (
                        "fov",
                        "n_cells",
                        "held_out",
                        "gain_over_baseline",
                        "gain_over_baseline_se",
                        "reliability",
                    )
                ),
                strict=True,
            )
        ]
        head = ("field of view", "cells", "held-out transcripts", "gain over own counts", "verdict")
        text += "<h3>By field of view</h3>" + _table(head, by_field, "Scores of each field of view", "tall")
    posterior = record.get("posterior")
    if posterior is not None and posterior["n_scored"]:
        off = 100 * (np.asarray(posterior["coverage"], dtype=float) - np.asarray(posterior["levels"], dtype=float))
        most = f"{max(float(np.abs(off).max()), 0.1):.1f} points"
        text += "<h3>Do intervals hold?</h3>" + _chart(
            lambda ax: calibration(adata, key_added=keys.key_added, ax=ax),
            f"Line chart: coverage of intervals, minus their level; over all entries at most {most} apart.",
            f"Held-out counts inside intervals, minus the level of the intervals, for ranges of expected counts. Over all "
            f"entries the gap is at most {most}. Counts were at a twentieth of the depth of the cell.",
        )
    return text


def _trust(adata: AnnData, keys: Keys, table: pd.DataFrame) -> str:
    shown = table.iloc[:MOST_ROWS]
    rows = [
        [
            _th(gene),
            _verdict(of.reliability),
            (_signed(of.gain_over_baseline, of.gain_over_baseline_se), "n"),
            ("–" if pd.isna(of.true_correlation) else f"{of.true_correlation:.2f}", "n"),
            (_number(int(of.held_out)), "n"),
        ]
        for gene, of in zip(shown.index, shown.itertuples(index=False), strict=True)
    ]
    head = ("gene", "verdict", "gain over own counts", "estimated correlation with the truth", "held-out transcripts")
    cut = "" if len(shown) == len(table) else f" The first {_number(len(shown))} of {_number(len(table))} are listed."
    printed = '<p class="note printed">The first 40 rows are printed.</p>' if len(shown) > 40 else ""
    counts = table["reliability"].value_counts()
    summary = ", ".join(f"{int(counts.get(level, 0))} {level}" for level in LEVELS[::-1])
    return (
        "<h2>Which genes to trust</h2>\n"
        '<p><span class="reliable"><strong>reliable</strong></span>: better than the gene\'s own counts by more than 3 '
        "standard errors, and an estimated correlation with the truth of 0.5 or more. "
        '<span class="weak"><strong>weak</strong></span>: better, but not as surely. '
        '<span class="none"><strong>no better than baseline</strong></span>: not shown to be better, or fewer than '
        f"{LEAST_HELD} held-out transcripts; that is no proof that its values are useless. In shallow data many genes "
        "that are imputed well cannot be shown to be.</p>"
        + _chart(
            lambda ax: reliability(adata, key_added=keys.key_added, ax=ax),
            f"Scatter plot of all genes: gain over their own counts, and estimated correlation with the truth; {summary}.",
            "Each gene by its gain over its own counts and its estimated correlation with the true expression, which is "
            "cut at 1. Dotted lines are what the verdicts ask for; larger points have more held-out transcripts.",
        )
        + _table(head, rows, "Genes, best first", "tall long")
        + f'{printed}<p class="note">Sorted by verdict, then by gain in units of its standard error (±, in nats for each '
        f"held-out transcript).{cut} All scores: <code>adata.var</code>, columns <code>{escape(keys.key_added)}_…</code>"
        ".</p>"
    )


def _shown(maps: Maps | None, chosen: bool, fov: str | None) -> str:
    title = "<h2>Genes in the tissue</h2>\n"
    if maps is None:
        return title + "<p>No gene is reliable or weak, so none is drawn; <code>genes=</code> draws what you name.</p>"
    drawn = []
    for gene in maps.genes:
        captions = (f"observed {gene.zeros}", "imputed", "uncertainty (standard deviation)")
        panels = "".join(
            "<figure>"
            + _image(
                lambda ax, panel=panel: maps.draw(ax, panel, "", "viridis"),
                (4.2, panel_height(maps.places, 4.2)),
                f"Map of {gene.name} in the tissue, {caption}.",
                themes=("light",),
            )
            + f"<figcaption>{escape(caption)}</figcaption></figure>"
            for panel, caption in zip(gene.panels, captions, strict=False)
        )
        verdict = _verdict(gene.verdict)
        drawn.append(f'<h3>{escape(gene.name)} · {verdict}</h3>\n<div class="maps">{panels}</div>')
    why = ""
    if chosen:
        verdict = maps.genes[0].verdict
        why = f"The {verdict} genes whose gain over their own counts is the surest. They are examples, not a selection by "
        why += "biology. "
    where = "" if fov is None else f"Field of view {fov}. "
    return (
        f"{title}<p>{escape(where + why)}Each panel has its own colours, which end at the 99.5th percentile. See whether "
        "the pattern of the imputed values is in the counts as well, if faintly.</p>" + "\n".join(drawn)
    )


def _training(adata: AnnData, keys: Keys, record: Mapping[str, Any]) -> str:
    n = len(record["params"]["networks"]["form"])
    steps = int(np.max(np.asarray(record["history"]["step"], dtype=float), initial=0))
    return "<h2>Training</h2>\n" + _chart(
        lambda ax: history(adata, key_added=keys.key_added, ax=ax),
        f"Line chart: score on held-out transcripts of {n} network{'s' if n != 1 else ''} over up to {steps} steps.",
        "Score on transcripts held out for this (others than those of the scores above). Weights are those of the best "
        "score of each network, marked by a point.",
    )


def _use() -> str:
    rows = [[_th(use), escape(answer)] for use, answer in USES]
    return (
        "<h2>What imputed values may be used for</h2>\n<p>They are expectations, smoother than data: they show patterns "
        "and are not new measurements.</p>" + _table(("use", "advice"), rows, "Uses of imputed values", "stack")
    )


def _cite() -> str:
    return (
        f'<h2>How to cite</h2>\n<p>{escape(PAPER)} <a href="https://arxiv.org/abs/2302.03038">arXiv 2302.03038</a>.</p>\n'
        f"<p>spaformer_sc {escape(version('spaformer_sc'))}, an independent implementation of this method. Say which "
        "version was used, which genes were reliable, and that values are imputed.</p>"
    )


# --- pieces -----------------------------------------------------------------------------------------------------------


def _gene_table(adata: AnnData, keys: Keys, imputed: list[str] | None) -> pd.DataFrame:
    """Scores of the imputed genes, best first."""
    names = ("reliability", "gain_over_baseline", "gain_over_baseline_se", "true_correlation", "held_out")
    table = pd.DataFrame({name: adata.var[keys.var(name)] for name in names})
    table["reliability"] = table["reliability"].astype(str)
    if imputed is not None:
        table = table.loc[table.index.isin(imputed)]
    rank = table["reliability"].map(LEVELS.index)
    surety = (table["gain_over_baseline"] / table["gain_over_baseline_se"]).fillna(-np.inf)
    return table.iloc[np.lexsort((-surety, -rank))]


def _best(table: pd.DataFrame) -> list[str]:
    """Genes to draw: reliable ones, or weak ones if there are none."""
    for level in LEVELS[:0:-1]:
        names = list(table.index[table["reliability"] == level][:N_MAPS])
        if names:
            return names
    return []


def _chart(draw: Callable[[Axes], Any], alt: str, caption: str) -> str:
    return f"<figure>{_image(draw, (5.8, 4), alt)}<figcaption>{escape(caption)}</figcaption></figure>\n"


def _image(
    draw: Callable[[Axes], Any], size: tuple[float, float], alt: str, themes: Sequence[str] = tuple(THEMES)
) -> str:
    """A drawing as an image in the page, in the colours of each theme."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    encoded = {}
    for theme in themes:
        ink, ground = THEMES[theme]
        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        grounded = ("figure.facecolor", "axes.facecolor", "legend.facecolor", "savefig.facecolor")
        colours = dict.fromkeys(inked, ink) | dict.fromkeys(grounded, ground)
        with style.context({**colours, "axes.spines.top": False, "axes.spines.right": False}, after_reset=True):
            figure = Figure(size, layout="constrained")
            canvas = FigureCanvasAgg(figure)
            draw(figure.subplots())
            figure.set_dpi(144)
            canvas.draw()
        file = io.BytesIO()
        few = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256)  # a third of the size
        few.save(file, format="png", optimize=True)
        encoded[theme] = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    width, height = (round(96 * side) for side in size)
    dark = ""
    if "dark" in encoded:
        dark = f'<source srcset="{encoded["dark"]}" media="screen and (prefers-color-scheme: dark)">'
    kind = "" if dark else ' class="paper"'
    image = f'<img{kind} src="{encoded["light"]}" alt="{escape(alt)}" width="{width}" height="{height}">'
    return f"<picture>{dark}{image}</picture>" if dark else image


Cell = str | tuple[str, str]
"""What a cell of a table holds, in HTML; or that and its class."""


def _table(head: Iterable[str], rows: Sequence[Sequence[Cell]], name: str, kind: str = "") -> str:
    """Table that scrolls within its box; ``kind`` has further classes: tall, long (printed in part), stack (of prose)."""

    def cell(content: Cell) -> str:
        text, of = content if isinstance(content, tuple) else (content, "")
        if text.startswith("<th"):
            return text
        return f'<td class="{of}">{text}</td>' if of else f"<td>{text}</td>"

    first = rows[0] if rows else []
    kinds = [f' class="{one[1]}"' if isinstance(one, tuple) else "" for one in first]
    top = "".join(f'<th scope="col"{kind}>{escape(text)}</th>' for text, kind in zip(head, kinds, strict=False))
    body = "\n".join("<tr>" + "".join(cell(one) for one in row) + "</tr>" for row in rows)
    return (
        f'<div class="box {kind}" role="region" aria-label="{escape(name)}" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>\n"
    )


def _th(text: Any) -> str:
    return f'<th scope="row">{escape(str(text))}</th>'


def _verdict(level: str) -> str:
    return f'<span class="v {CLASSES[level]}">{escape(level)}</span>'


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{sentence}</li>" for sentence in sentences) + "</ul>"


def _times(gain: float) -> str:
    return f"{math.exp(gain):.2f} times"


def _number(value: int) -> str:
    return f"{value:,}"


def _signed(value: float, error: float) -> str:
    return "–" if not np.isfinite(value) else f"{value:+.3f} ± {error:.3f}".replace("-", "\N{MINUS SIGN}")


def _listed(value: Any) -> list[str]:
    """One name or several as a list; files give lists back as arrays."""
    return [value] if isinstance(value, str) else [str(one) for one in value]


def _some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _flat(params: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested parameters as pairs of a name with dots and a value."""
    found = []
    for name, value in params.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{before}{name}.")
        else:
            plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
            found.append((f"{before}{name}", json.dumps(plain, ensure_ascii=False)))
    return found
