"""Scores of a prediction on counts or entries that it has not seen. All of them work in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from spaformer_sc.metrics._protocols import Matrix, as_counts, row_blocks

_FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _PoissonSums:
    """Per-gene sums over the scored cells: log-likelihood gain (nats), held counts, deviance of the null."""

    gain: _FloatArray
    held: _FloatArray
    null_deviance: _FloatArray


def _dense(matrix: Matrix, rows: slice) -> _FloatArray:
    block: Any = matrix[rows]
    return np.asarray(block.toarray() if sparse.issparse(block) else block, dtype=np.float64)


def _sliceable(matrix: Matrix, name: str) -> Matrix:
    """Return a matrix that can be cut into blocks of rows: CSR if sparse, an array otherwise."""
    if np.ndim(matrix) != 2:
        raise ValueError(f"`{name}` has {np.ndim(matrix)} dimension(s); give a matrix of cells × genes.")
    if isinstance(matrix, _Lognorm):
        return matrix
    return sparse.csr_matrix(matrix) if sparse.issparse(matrix) else np.asarray(matrix)


def _check_shapes(expected: tuple[int, int], name: str, **others: Matrix) -> None:
    for other, matrix in others.items():
        if matrix.shape != expected:
            raise ValueError(f"`{other}` has shape {matrix.shape}, but `{name}` has shape {expected}; they must agree.")


def _floored(shares: _FloatArray, floor: float, measured: NDArray[np.bool_] | None = None) -> _FloatArray:
    floored: _FloatArray = np.maximum(shares, floor)
    if measured is not None:
        floored = floored * measured
    floored /= np.maximum(floored.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    return floored


def _poisson_sums(
    held: Matrix, rates: Matrix, train: Matrix, floor: float, measured: NDArray[np.bool_] | None
) -> _PoissonSums:
    held, train, rates = as_counts(held, "held"), as_counts(train, "train"), _sliceable(rates, "rates")
    _check_shapes(held.shape, "held", rates=rates, train=train)
    n_genes = held.shape[1]
    if not 0 < floor <= 1 / n_genes:
        raise ValueError(f"`floor={floor!r}` has to be positive and at most 1 / number of genes ({1 / n_genes:g}).")
    if measured is not None:
        _check_shapes(held.shape, "held", measured=measured)
        if (held.nnz and not measured[held.nonzero()].all()) or (train.nnz and not measured[train.nonzero()].all()):
            raise ValueError("`held` or `train` hold counts where `measured` is False; set these to zero first.")
    library = np.asarray(train.sum(axis=1, dtype=np.float64)).ravel()
    if not library.any():
        raise ValueError("`train` holds no counts; there is nothing that predicted rates could be scaled to.")
    scored = library > 0
    held_library = np.asarray(held.sum(axis=1, dtype=np.float64)).ravel()
    depth = library * held_library[scored].sum() / library.sum()
    exposure = library.sum() if measured is None else np.maximum(library @ measured, np.finfo(np.float64).tiny)
    null = _floored(np.asarray(train.sum(axis=0, dtype=np.float64)).ravel() / exposure, floor)

    gain, total, null_deviance = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)
    for rows in row_blocks(held.shape):
        shares = _dense(rates, rows)
        if not np.isfinite(shares).all():
            raise ValueError("`rates` hold NaN or infinite values; a score needs a prediction for every entry.")
        if (shares < 0).any():
            raise ValueError(f"`rates` hold negative values (smallest: {shares.min():g}); set them to zero first.")
        seen = None if measured is None else measured[rows]
        shares = shares if seen is None else shares * seen
        sums = shares.sum(axis=1, keepdims=True)
        shares = _floored(np.divide(shares, sums, out=np.zeros_like(shares), where=sums > 0), floor, seen)
        means = np.broadcast_to(null, shares.shape) if seen is None else _floored(null[None], floor, seen)

        counts = held[rows].tocoo()
        inside = scored[rows][counts.row]
        cell, gene, x = counts.row[inside], counts.col[inside], counts.data[inside].astype(np.float64)
        block_depth = depth[rows]
        null_total = block_depth @ means
        excess = block_depth @ shares - null_total
        log_ratio = np.log(shares[cell, gene] / means[cell, gene])
        block_total = np.bincount(gene, weights=x, minlength=n_genes)
        log_residual = x * np.log(x / (block_depth[cell] * means[cell, gene]))
        gain += np.bincount(gene, weights=x * log_ratio, minlength=n_genes) - excess
        total += block_total
        null_deviance += 2 * (np.bincount(gene, weights=log_residual, minlength=n_genes) - block_total + null_total)
    return _PoissonSums(gain=gain, held=total, null_deviance=null_deviance)


def poisson_gain(
    held: Matrix,
    rates: Matrix,
    train: Matrix,
    floor: float = 1e-8,
    *,
    measured: NDArray[np.bool_] | None = None,
) -> float:
    r"""Poisson log-likelihood of held-out counts, as gain over library size × gene mean.

    With :math:`r_{ig}` the predicted rates, :math:`y` the training counts and :math:`x` the held counts,

    .. math::
        s_{ig} &\propto \max\Bigl(\frac{r_{ig}}{\sum_h r_{ih}}, \mathrm{floor}\Bigr), \quad \sum_g s_{ig} = 1 \\
        m_{ig} &= s_{ig} \cdot \sum_h y_{ih} \cdot \frac{\sum_{jh} x_{jh}}{\sum_{jh} y_{jh}} \\
        \mathrm{gain} &= \frac{\sum_{ig} [\log P(x_{ig}; m_{ig}) - \log P(x_{ig}; m^0_{ig})]}{\sum_{ig} x_{ig}}

    where :math:`P` is the Poisson probability and :math:`m^0` the same with the gene mean
    :math:`\sum_j y_{jg} / \sum_{jh} y_{jh}` in place of the predicted rate. Only shares within a cell matter, so that
    `rates` may have any scale per cell, and no method gains or loses by its idea of the sequencing depth.

    A rate of zero for a count that turns out to exist has likelihood zero. The floor bounds what that costs, at
    log(share / floor) nats for each such count; it is the same for every method and for the gene mean. A cell for which
    all rates are zero is given equal shares. Cells without training counts are left out, since every method and the
    null expect nothing there.

    Parameters
    ----------
    held
        Held-out counts, cells × genes, dense or sparse.
    rates
        Prediction, cells × genes, dense or sparse: non-negative and, within each cell, proportional to expected counts.
    train
        Counts that the prediction was made from, cells × genes, dense or sparse.
    floor
        Smallest share of a cell's counts that a gene can be predicted to have, before shares are made to sum to one;
        positive, at most 1 / number of genes.
    measured
        Which entries were measured, cells × genes; None for all. Shares, predicted and of the gene means, then sum to
        one over the measured genes of each cell.

    Returns
    -------
    Nats per held count. Zero is as good as the gene mean; NaN where nothing is held.

    Raises
    ------
    TypeError, ValueError
        If `held` or `train` are not counts, shapes differ, `rates` are negative or not finite, `floor` is out of range
        or `train` is empty.

    References
    ----------
    Batson, Royer and Webber (2019), "Molecular cross-validation for single-cell RNA-seq", bioRxiv 786269
    (Poisson loss).
    """
    sums = _poisson_sums(held, rates, train, floor, measured)
    total = sums.held.sum()
    return float(sums.gain.sum() / total) if total > 0 else float("nan")


def poisson_gain_per_gene(
    held: Matrix,
    rates: Matrix,
    train: Matrix,
    floor: float = 1e-8,
    *,
    measured: NDArray[np.bool_] | None = None,
) -> _FloatArray:
    """Poisson log-likelihood gain of each gene over library size × gene mean.

    The sums of :func:`poisson_gain` taken gene by gene; their mean weighted by the held counts of the genes is the
    overall gain.

    Parameters
    ----------
    held
        Held-out counts, cells × genes, dense or sparse.
    rates
        Prediction, cells × genes, dense or sparse, as in :func:`poisson_gain`.
    train
        Counts that the prediction was made from, cells × genes, dense or sparse.
    floor, measured
        As in :func:`poisson_gain`.

    Returns
    -------
    Nats per held count of the gene, one value per gene; NaN for genes without held counts.

    Raises
    ------
    TypeError, ValueError
        As :func:`poisson_gain`.
    """
    sums = _poisson_sums(held, rates, train, floor, measured)
    return np.divide(sums.gain, sums.held, out=np.full_like(sums.gain, np.nan), where=sums.held > 0)


def deviance_explained(
    held: Matrix,
    rates: Matrix,
    train: Matrix,
    floor: float = 1e-8,
    *,
    measured: NDArray[np.bool_] | None = None,
) -> float:
    r"""Share of the Poisson deviance of the gene mean that a prediction explains.

    :math:`1 - D(m) / D(m^0)` with :math:`D(m) = 2 \sum_{ig} [x_{ig} \log(x_{ig} / m_{ig}) - (x_{ig} - m_{ig})]` and
    the means :math:`m` and :math:`m^0` of :func:`poisson_gain`. One is a prediction equal to every held count, which
    Poisson noise keeps out of reach; zero is as good as the gene mean; negative is worse.

    Parameters
    ----------
    held
        Held-out counts, cells × genes, dense or sparse.
    rates
        Prediction, cells × genes, dense or sparse, as in :func:`poisson_gain`.
    train
        Counts that the prediction was made from, cells × genes, dense or sparse.
    floor, measured
        As in :func:`poisson_gain`.

    Returns
    -------
    A share without unit, at most 1; NaN where nothing is held.

    Raises
    ------
    TypeError, ValueError
        As :func:`poisson_gain`.

    References
    ----------
    McCullagh and Nelder (1989), "Generalized Linear Models", section 2.3 (deviance).
    """
    sums = _poisson_sums(held, rates, train, floor, measured)
    deviance = sums.null_deviance.sum()
    return float(2 * sums.gain.sum() / deviance) if sums.held.any() and deviance > 0 else float("nan")


def deviance_explained_per_gene(
    held: Matrix,
    rates: Matrix,
    train: Matrix,
    floor: float = 1e-8,
    *,
    measured: NDArray[np.bool_] | None = None,
) -> _FloatArray:
    """Share of the Poisson deviance of the gene mean that a prediction explains, for each gene.

    Parameters
    ----------
    held
        Held-out counts, cells × genes, dense or sparse.
    rates
        Prediction, cells × genes, dense or sparse, as in :func:`poisson_gain`.
    train
        Counts that the prediction was made from, cells × genes, dense or sparse.
    floor, measured
        As in :func:`poisson_gain`.

    Returns
    -------
    Shares without unit, at most 1, one value per gene; NaN for genes without held counts.

    Raises
    ------
    TypeError, ValueError
        As :func:`poisson_gain`.
    """
    sums = _poisson_sums(held, rates, train, floor, measured)
    defined = (sums.held > 0) & (sums.null_deviance > 0)
    return np.divide(2 * sums.gain, sums.null_deviance, out=np.full_like(sums.gain, np.nan), where=defined)


def _paired_blocks(
    truth: Matrix, prediction: Matrix, mask: NDArray[np.bool_] | None, nonzero: bool = False
) -> Iterator[tuple[_FloatArray, _FloatArray, NDArray[np.bool_]]]:
    """Yield truth, prediction and the entries to score, dense, for one block of rows after the other."""
    truth, prediction = _sliceable(truth, "truth"), _sliceable(prediction, "prediction")
    _check_shapes(truth.shape, "truth", prediction=prediction)
    if mask is not None:
        _check_shapes(truth.shape, "truth", mask=mask)
        if mask.dtype != bool:
            raise TypeError(f"`mask` has dtype {mask.dtype}; give a boolean array, true where an entry is scored.")
    for rows in row_blocks(truth.shape):
        t, p = _dense(truth, rows), _dense(prediction, rows)
        use = np.ones(t.shape, dtype=bool) if mask is None else mask[rows].copy()
        if nonzero:
            use &= t != 0
        for name, block in (("truth", t), ("prediction", p)):
            if not np.isfinite(block[use]).all():
                raise ValueError(f"`{name}` holds NaN or infinite values among the entries to score.")
        yield t, p, use


def gene_pearson(truth: Matrix, prediction: Matrix, *, mask: NDArray[np.bool_] | None = None) -> _FloatArray:
    """Pearson correlation over cells, for each gene.

    Parameters
    ----------
    truth
        True values, cells × genes, dense or sparse: held counts, or log-normalised values.
    prediction
        Predicted values, cells × genes, dense or sparse.
    mask
        Entries to score, boolean, cells × genes; all of them if None.

    Returns
    -------
    Correlations without unit, one value per gene; NaN where truth or prediction is constant over the scored cells, or
    fewer than two cells are scored.

    Raises
    ------
    TypeError, ValueError
        If shapes differ, `mask` is not boolean, or a scored value is not finite.
    """
    n_genes = truth.shape[1]
    count, sum_t, sum_p = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)
    low = np.full((2, n_genes), np.inf)
    high = np.full((2, n_genes), -np.inf)
    for t, p, use in _paired_blocks(truth, prediction, mask):
        count += use.sum(axis=0)
        sum_t += t.sum(axis=0, where=use)
        sum_p += p.sum(axis=0, where=use)
        for i, block in enumerate((t, p)):
            low[i] = np.minimum(low[i], block.min(axis=0, where=use, initial=np.inf))
            high[i] = np.maximum(high[i], block.max(axis=0, where=use, initial=-np.inf))
    mean_t, mean_p = sum_t / np.maximum(count, 1), sum_p / np.maximum(count, 1)

    cross, square_t, square_p = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)
    for t, p, use in _paired_blocks(truth, prediction, mask):
        t, p = np.where(use, t - mean_t, 0), np.where(use, p - mean_p, 0)
        cross += np.einsum("ig,ig->g", t, p)
        square_t += np.einsum("ig,ig->g", t, t)
        square_p += np.einsum("ig,ig->g", p, p)
    varies = (high > low).all(axis=0)
    correlation = np.full(n_genes, np.nan)
    np.divide(cross, np.sqrt(square_t) * np.sqrt(square_p), out=correlation, where=varies)
    return correlation


class _Lognorm:
    """Log-normalised values of rates (cells, genes), computed when rows are asked for."""

    ndim = 2

    def __init__(
        self, rates: NDArray[Any], cells: NDArray[np.int64], measured: NDArray[np.bool_] | None, target_sum: float
    ) -> None:
        self.shape = (len(cells), rates.shape[1])
        self._rates, self._cells, self._measured, self._target_sum = rates, cells, measured, target_sum

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        shares: NDArray[Any] = self._rates[self._cells[rows]]
        within = True if self._measured is None else self._measured[rows]
        sums = shares.sum(axis=1, dtype=np.float64, keepdims=True, where=within)
        shares *= np.where(sums > 0, self._target_sum / np.where(sums > 0, sums, 1), 0)
        np.log1p(shares, out=shares)
        return shares


def gene_pearson_lognorm(
    held: Matrix, rates: NDArray[Any], *, measured: NDArray[np.bool_] | None = None
) -> _FloatArray:
    """Correlation over cells of log-normalised held-out counts with log-normalised rates, per gene.

    Both are brought to the median library size of the held-out counts within measured genes, so that depth plays no
    part and the gene mean scores 0. Cells without held-out counts are left out.

    Parameters
    ----------
    held
        Held-out counts, cells × genes, dense or sparse; at least one of them above 0.
    rates
        Prediction, cells × genes, non-negative and, within each cell, proportional to expected counts.
    measured
        Which entries were measured, cells × genes; None for all.

    Returns
    -------
    Pearson correlation of each gene, no unit; 0 where the prediction is constant, NaN for genes without held counts.

    Raises
    ------
    TypeError, ValueError
        If `held` are not counts or shapes differ.
    """
    held = as_counts(held, "held")
    _check_shapes(held.shape, "held", rates=rates)
    library = np.asarray(held.sum(axis=1, dtype=np.float64)).ravel()
    cells = library > 0
    target_sum = float(np.median(library[cells]))
    observed = (sparse.diags_array(target_sum / library[cells]) @ held[cells]).log1p()
    mask = None if measured is None else measured[cells]
    values: Any = _Lognorm(rates, np.flatnonzero(cells), mask, target_sum)
    correlations = gene_pearson(observed, values, mask=mask)
    detected = np.asarray(held.sum(axis=0)).ravel() > 0
    return np.where(detected, np.nan_to_num(correlations, nan=0.0), np.nan)


def rmse(truth: Matrix, prediction: Matrix, *, mask: NDArray[np.bool_] | None = None, nonzero: bool = False) -> float:
    """Root mean squared error, pooled over entries.

    Parameters
    ----------
    truth
        True values, cells × genes, dense or sparse, such as ``EntrySplit.truth``.
    prediction
        Predicted values in the same scale, cells × genes, dense or sparse.
    mask
        Entries to score, boolean, cells × genes, such as ``EntrySplit.hidden``; all of them if None.
    nonzero
        Score only entries whose truth is not zero.

    Returns
    -------
    The error in the unit of `truth`; NaN if there is no entry to score.

    Raises
    ------
    TypeError, ValueError
        If shapes differ, `mask` is not boolean, or a scored value is not finite.
    """
    count, square = 0, 0.0
    for t, p, use in _paired_blocks(truth, prediction, mask, nonzero):
        count += int(use.sum())
        square += float(((t[use] - p[use]) ** 2).sum())
    return float(np.sqrt(square / count)) if count else float("nan")


def pearson(
    truth: Matrix, prediction: Matrix, *, mask: NDArray[np.bool_] | None = None, nonzero: bool = False
) -> float:
    """Pearson correlation, pooled over entries.

    Most of it tells highly from lowly expressed genes; :func:`gene_pearson` is free of that.

    Parameters
    ----------
    truth
        True values, cells × genes, dense or sparse, such as ``EntrySplit.truth``.
    prediction
        Predicted values, cells × genes, dense or sparse.
    mask
        Entries to score, boolean, cells × genes, such as ``EntrySplit.hidden``; all of them if None.
    nonzero
        Score only entries whose truth is not zero.

    Returns
    -------
    A correlation without unit; NaN if truth or prediction is constant, or fewer than two entries are scored.

    Raises
    ------
    TypeError, ValueError
        If shapes differ, `mask` is not boolean, or a scored value is not finite.
    """
    count, sums = 0, np.zeros(2)
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for t, p, use in _paired_blocks(truth, prediction, mask, nonzero):
        if use.any():
            pair = np.stack([t[use], p[use]])
            count += pair.shape[1]
            sums += pair.sum(axis=1)
            low, high = np.minimum(low, pair.min(axis=1)), np.maximum(high, pair.max(axis=1))
    if not (high > low).all():
        return float("nan")
    products = np.zeros((2, 2))
    for t, p, use in _paired_blocks(truth, prediction, mask, nonzero):
        pair = np.stack([t[use], p[use]]) - (sums / count)[:, None]
        products += pair @ pair.T
    return float(products[0, 1] / np.sqrt(products[0, 0]) / np.sqrt(products[1, 1]))


def cosine(truth: Matrix, prediction: Matrix, *, mask: NDArray[np.bool_] | None = None, nonzero: bool = False) -> float:
    """Cosine similarity of truth and prediction as two long vectors, pooled over entries.

    Parameters
    ----------
    truth
        True values, cells × genes, dense or sparse, such as ``EntrySplit.truth``.
    prediction
        Predicted values, cells × genes, dense or sparse.
    mask
        Entries to score, boolean, cells × genes, such as ``EntrySplit.hidden``; all of them if None.
    nonzero
        Score only entries whose truth is not zero.

    Returns
    -------
    A similarity without unit; NaN if truth or prediction is zero in all scored entries.

    Raises
    ------
    TypeError, ValueError
        If shapes differ, `mask` is not boolean, or a scored value is not finite.
    """
    products = np.zeros((2, 2))
    for t, p, use in _paired_blocks(truth, prediction, mask, nonzero):
        pair = np.stack([t[use], p[use]])
        products += pair @ pair.T
    if products[0, 0] == 0 or products[1, 1] == 0:
        return float("nan")
    return float(products[0, 1] / np.sqrt(products[0, 0]) / np.sqrt(products[1, 1]))
