"""Measure imputation on counts it has not seen: protocols make a split, scores read a prediction.

Protocols hide counts in three ways: :func:`thin` splits every count binomially, :func:`hide_entries` sets single
entries to zero, :func:`hide_blocks` hides whole genes in some fields of view. Scores compare a prediction made from the
visible part with what was hidden. :func:`make_split` and :func:`score_prediction` put these together as the benchmark
does, with a validation part on which every prediction is calibrated in the same way.
"""

from __future__ import annotations

from spaformer_sc.metrics._benchmark import Split, convert, make_split, quarters, score_prediction
from spaformer_sc.metrics._calibration import calibrate_lognorm, calibrate_rates, mixture_weights, noise_ceiling
from spaformer_sc.metrics._protocols import BlockSplit, CountSplit, EntrySplit, hide_blocks, hide_entries, thin
from spaformer_sc.metrics._scores import (
    cosine,
    deviance_explained,
    deviance_explained_per_gene,
    gene_pearson,
    gene_pearson_lognorm,
    pearson,
    poisson_gain,
    poisson_gain_per_gene,
    rmse,
)

__all__ = [
    "BlockSplit",
    "CountSplit",
    "EntrySplit",
    "Split",
    "calibrate_lognorm",
    "calibrate_rates",
    "convert",
    "cosine",
    "deviance_explained",
    "deviance_explained_per_gene",
    "gene_pearson",
    "gene_pearson_lognorm",
    "hide_blocks",
    "hide_entries",
    "make_split",
    "mixture_weights",
    "noise_ceiling",
    "pearson",
    "poisson_gain",
    "poisson_gain_per_gene",
    "quarters",
    "rmse",
    "score_prediction",
    "thin",
]
