"""ALRA: adaptively thresholded low-rank approximation, written from the paper.

Linderman, Zhao, Roulis, Bielecki, Flavell, Nadler and Kluger (2022), "Zero-preserving imputation of single-cell
RNA-seq data", Nature Communications 13:192.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd

from peers._cells import Cells
from peers._tuning import Setting, Tuned

_TARGET_SUM = 10_000.0
_MOST_SINGULAR_VALUES = 100
_NOISE_FROM = 0.8
_DEVIATIONS = 6.0
_POWER_ITERATIONS = 10
_FEW_ITERATIONS = 2
_QUANTILE = 0.001


def chosen_rank(singular_values: NDArray[Any]) -> int:
    r"""Choose the rank by the spacings of singular values (Methods, "Choice of k").

    The last fifth of the spacings :math:`s_i = \sigma_i - \sigma_{i+1}` is taken as noise with mean :math:`\mu` and
    standard deviation :math:`\nu`; the rank is the largest i with :math:`s_i > \mu + 6 \nu`.

    Parameters
    ----------
    singular_values
        The first hundred, or as many as there are, largest first.

    Returns
    -------
    The rank, at least 1.
    """
    spacings = singular_values[:-1] - singular_values[1:]
    noise = spacings[int(_NOISE_FROM * len(spacings)) :]
    large = np.flatnonzero(spacings > noise.mean() + _DEVIATIONS * noise.std(ddof=1)) if len(noise) > 1 else []
    return int(large[-1]) + 1 if len(large) else 1


def thresholded(low_rank: NDArray[np.float32]) -> NDArray[np.float32]:
    """Set to zero what noise can reach, gene by gene (Methods, "Adaptive thresholding").

    The error is taken to be symmetric around zero, so that the most negative value of a gene is the size that it
    reaches. As in the authors' program that is the 0.001 quantile, so that no single cell decides.

    Parameters
    ----------
    low_rank
        Low-rank approximation of log-normalised values, cells × genes.

    Returns
    -------
    Non-negative values, cells × genes.
    """
    return np.where(low_rank > np.abs(np.quantile(low_rank, _QUANTILE, axis=0)), low_rank, np.float32(0))


def rescaled(values: NDArray[np.float32], kept: NDArray[np.float32]) -> NDArray[np.float32]:
    """Give nonzero values the mean and standard deviation of those observed, gene by gene (Methods, "Rescaling").

    Observed values whose imputed value is zero or negative are put back. Genes with fewer than two different nonzero
    values, observed or imputed, are not rescaled.

    Parameters
    ----------
    values
        Log-normalised values, cells × genes.
    kept
        Imputed values after thresholding, cells × genes.

    Returns
    -------
    Non-negative values, cells × genes.
    """
    observed, positive = values > 0, kept > 0
    (mean, deviation), (mean_kept, deviation_kept) = _moments(values, observed), _moments(kept, positive)
    usable = (deviation > 0) & (deviation_kept > 0)
    slope = np.where(usable, deviation / np.where(usable, deviation_kept, 1), 1)
    shift = np.where(usable, mean - mean_kept * slope, 0)
    result = np.where(positive, kept * slope.astype(np.float32) + shift.astype(np.float32), np.float32(0))
    return np.where(observed & (result <= 0), values, np.maximum(result, 0))


def _moments(values: NDArray[np.float32], where: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and standard deviation of some of the entries of each gene."""
    count = where.sum(axis=0)
    mean = values.sum(axis=0, where=where, dtype=np.float64) / np.maximum(count, 1)
    squares = np.square(values - mean.astype(np.float32)).sum(axis=0, where=where, dtype=np.float64)
    return mean, np.sqrt(squares / np.maximum(count - 1, 1))


def _approximations(
    cells: Cells, grid: list[Setting], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[Setting, NDArray[np.float32]]]:
    """ALRA of counts per 10,000, logged; settings are ``(stage, reading)``.

    ``"rescaled"`` is the whole of ALRA, ``"thresholded"`` what it holds before nonzero values are rescaled, which gives
    them the size of an observed count and not of its expectation. ``"log"`` takes values back to rates by expm1;
    ``"proportional"`` reads them as rates, since means of logarithms are proportional to means of counts where nearly
    all counts are 0 or 1. Hidden entries hold the gene's visible mean when the low-rank approximation is made.
    """
    values = cells.lognorm(_TARGET_SUM)
    complete = values if cells.missing is None else np.where(cells.missing, cells.column_means(values), values)
    most = min(_MOST_SINGULAR_VALUES, min(values.shape) - 1)
    rank = chosen_rank(randomized_svd(complete, most, n_iter=_FEW_ITERATIONS, random_state=random_state)[1])
    left, sizes, right = randomized_svd(complete, rank, n_iter=_POWER_ITERATIONS, random_state=random_state)
    kept = thresholded(((left * sizes) @ right).astype(np.float32))
    for stage, reading in grid:
        imputed = (rescaled(values, kept) if stage == "rescaled" else kept)[rows]
        if reading == "proportional":
            yield (stage, reading), imputed
        elif cells.output == "rate":
            yield (stage, reading), np.expm1(imputed)
        else:
            yield (stage, reading), np.log1p(np.expm1(imputed) * np.float32(cells.target_sum / _TARGET_SUM))


alra = Tuned(
    "alra",
    _approximations,
    rate=[("rescaled", "log"), ("thresholded", "log"), ("thresholded", "proportional")],
    lognorm=[("rescaled", "log"), ("thresholded", "log")],
)
"""Impute with ALRA; whether values are rescaled, how they are read as rates, and mixture weights are tuned."""
