"""Scores of a fit on counts that it has not seen."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from spaformer_sc.metrics import (
    deviance_explained,
    deviance_explained_per_gene,
    gene_pearson_lognorm,
    poisson_gain,
    poisson_gain_per_gene,
)

from .reliability import GAINS, LEAST_HELD, LEVELS, reliability

FLOOR = 0.01
"""Smallest predicted share of a gene in the stopping score, relative to the gene's mean share."""


def log_ratios(
    share: NDArray[np.float32],
    rows: NDArray[np.int64],
    cols: NDArray[np.int64],
    measured: NDArray[np.bool_] | None,
    gene_share: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Logarithm of predicted shares over mean shares: what the score that training stops on is made of.

    With shares that sum to 1 in every cell, the log-likelihood ratio of a cell's held-out counts ``x`` against "depth
    times gene mean" is ``sum(x * log(share / gene_share))``; both are taken over measured genes only. Shares are kept
    above ``FLOOR * gene_share``, so that a decoder that says exactly zero (Gaussian) can be compared at all.

    Parameters
    ----------
    share
        Predicted shares (cells, genes), rows sum to 1.
    rows, cols
        Entries asked for (entries,).
    measured
        Which entries were measured (cells, genes), or None when all were.
    gene_share
        Mean share of each gene (genes,).

    Returns
    -------
    One number for each entry.
    """
    null = gene_share.astype(np.float64)
    share = np.maximum(share, FLOOR * null)
    within = share.sum(axis=1) if measured is None else np.where(measured, share, 0.0).sum(axis=1)
    null_within = np.ones(len(share)) if measured is None else measured @ null
    found: NDArray[np.float64] = np.log((share[rows, cols] / within[rows]) / (null[cols] / null_within[rows]))
    return found


def held_out_scores(
    held: sp.csr_matrix,
    rates: NDArray[np.float32],
    train: sp.csr_matrix,
    missing: NDArray[np.bool_] | None,
    rng: np.random.Generator,
) -> tuple[dict[str, float], pd.DataFrame, NDArray[np.float64]]:
    """Score predicted rates on held-out counts, over all genes, per gene and per cell.

    Parameters
    ----------
    held
        Held-out counts (cells, genes).
    rates
        Predicted shares (cells, genes), from ``train`` alone.
    train
        Counts that the prediction was made from (cells, genes).
    missing
        Which entries were not measured (cells, genes), or None; they are not scored.
    rng
        Draws the groups of cells that standard errors are estimated with.

    Returns
    -------
    Overall scores ``gain`` (nats per held-out transcript over gene means), ``deviance_explained``, ``median_pearson``
    (over genes), ``gain_over_baseline`` with its standard error, and whether it lies two of these above 0; a data
    frame with ``pearson``, ``deviance_explained``, ``gain``, ``held_out`` (transcripts) and what
    :func:`.reliability.reliability` says of each gene; and the gains of each cell (:data:`.reliability.GAINS`, cells).
    """
    measured = None if missing is None else ~missing
    held_out = np.asarray(held.sum(axis=0)).ravel().astype(np.int64)
    overall_names = ("gain", "deviance_explained", "median_pearson", "gain_over_baseline", "gain_over_baseline_se")
    if not held.nnz or not train.nnz:
        numbers = ("pearson", "deviance_explained", "gain", "true_correlation")
        over = "gain_over_baseline", "gain_over_baseline_se"
        with_errors = ("pearson_se", "deviance_explained_se", "true_correlation_se", *over)
        per_gene = pd.DataFrame({**dict.fromkeys((*numbers, *with_errors), math.nan), "held_out": held_out})
        codes = np.zeros(len(held_out), dtype=np.int8)
        per_gene["reliability"] = pd.Categorical.from_codes(codes, categories=list(LEVELS), ordered=True)
        nothing = np.full((len(GAINS), held.shape[0]), math.nan)
        return {**dict.fromkeys(overall_names, math.nan), "better_than_baseline": False}, per_gene, nothing
    judged, of_cells, gain, error = reliability(held, rates, train, missing, rng)
    per_gene = pd.DataFrame(
        {
            "pearson": gene_pearson_lognorm(held, rates, measured=measured),
            "deviance_explained": deviance_explained_per_gene(held, rates, train, measured=measured),
            "gain": poisson_gain_per_gene(held, rates, train, measured=measured),
            "held_out": held_out,
            **judged,
        }
    )
    known = per_gene["pearson"].dropna()
    overall = {
        "gain": poisson_gain(held, rates, train, measured=measured),
        "deviance_explained": deviance_explained(held, rates, train, measured=measured),
        "median_pearson": float(np.median(known)) if len(known) else math.nan,
        "gain_over_baseline": gain,
        "gain_over_baseline_se": error,
        "better_than_baseline": bool(held_out.sum() >= LEAST_HELD and gain > 2 * error),
    }
    return overall, per_gene, of_cells


def scores_of_neighbours(
    held: sp.csr_matrix, rates: NDArray[np.float32], train: sp.csr_matrix, missing: NDArray[np.bool_] | None
) -> tuple[dict[str, float], pd.DataFrame]:
    """Score the prediction of :func:`.reliability.neighbour_rates`; arguments as in :func:`held_out_scores`.

    Returns
    -------
    ``gain_neighbours`` over all genes; and a data frame with ``pearson_neighbours`` and
    ``deviance_explained_neighbours``.
    """
    measured = None if missing is None else ~missing
    if not held.nnz or not train.nnz:
        columns = dict.fromkeys(("pearson_neighbours", "deviance_explained_neighbours"), np.full(held.shape[1], np.nan))
        return {"gain_neighbours": math.nan}, pd.DataFrame(columns)
    per_gene = {
        "pearson_neighbours": gene_pearson_lognorm(held, rates, measured=measured),
        "deviance_explained_neighbours": deviance_explained_per_gene(held, rates, train, measured=measured),
    }
    return {"gain_neighbours": poisson_gain(held, rates, train, measured=measured)}, pd.DataFrame(per_gene)
