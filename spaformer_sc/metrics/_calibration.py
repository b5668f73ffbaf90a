"""What a prediction scores once its trust in itself is set right, and how well any prediction could score."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from spaformer_sc.metrics._protocols import Matrix, as_counts, row_blocks, thin
from spaformer_sc.metrics._scores import _check_shapes, _dense

_FloatArray = NDArray[np.float64]

_EM_STEPS = 1000
_EM_TOLERANCE = 1e-8


def shares_of(rates: NDArray[Any], empty: _FloatArray) -> NDArray[np.float32]:
    """Scale the rates of every cell to sum 1; a cell without any gets `empty` (one share per gene)."""
    sums = rates.sum(axis=1, dtype=np.float64, keepdims=True)
    shares = (rates / np.where(sums > 0, sums, 1)).astype(np.float32)
    shares[sums.ravel() == 0] = empty
    return shares


def mixture_weights(shares: _FloatArray, counts: _FloatArray) -> _FloatArray:
    """Return the weights of a mixture of predictions that make counts most likely.

    Expectation-maximisation (Dempster, Laird and Rubin 1977, section 4.3) of :math:`\\sum_j x_j \\log \\sum_k w_k
    s_{kj}`, which is concave in the weights.

    Parameters
    ----------
    shares
        Share that each prediction gives to each count, predictions × counts. Counts without a share in any are left
        out.
    counts
        The counts :math:`x_j`.

    Returns
    -------
    Weights, not negative, of sum 1, one per prediction.
    """
    possible = shares.any(axis=0)
    shares, counts = shares[:, possible], counts[possible] / max(counts[possible].sum(), 1.0)
    weights = np.full(len(shares), 1 / len(shares))
    score = -np.inf
    for _ in range(_EM_STEPS if len(counts) else 0):
        mixture = weights @ shares
        before, score = score, float(counts @ np.log(mixture))
        if score - before < _EM_TOLERANCE:
            break
        weights = weights * (shares @ (counts / mixture))
    weights /= weights.sum()
    return weights


def calibrate_rates(
    rates: NDArray[Any], train: Matrix, validation: Matrix
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    r"""Mix predicted rates with the gene mean and with the cell's own counts, as validation counts ask for.

    .. math::
        s_{ig} = w_1 \frac{r_{ig}}{\sum_h r_{ih}} + w_2 \frac{\sum_j y_{jg}}{\sum_{jh} y_{jh}}
                 + w_3 \frac{y_{ig}}{\sum_h y_{ih}}, \qquad w \ge 0, \quad w_1 + w_2 + w_3 = 1

    with the predicted rates :math:`r` and the training counts :math:`y`. The weights maximise the Poisson
    log-likelihood of the validation counts with means proportional to these shares, which is, up to a constant, the sum
    of :math:`x_{ig} \log s_{ig}`. A method that is too sure of itself, or does not trust the cell's own counts enough,
    is set right by this; what is left is what it knows.

    Parameters
    ----------
    rates
        Prediction, cells × genes, not negative and, within each cell, proportional to expected counts. A cell without
        any is given the gene mean.
    train
        Counts that the prediction was made from, cells × genes, dense or sparse.
    validation
        Counts that the weights are fitted to, cells × genes, dense or sparse, independent of `train` given the true
        rates (:func:`thin`), and not those that are scored.

    Returns
    -------
    The shares :math:`s`, float32, cells × genes, and the three weights in the order above.

    Raises
    ------
    TypeError, ValueError
        If `train` or `validation` are not counts, shapes differ, `rates` are negative or not finite, or `train` is
        empty.

    References
    ----------
    Wolpert (1992), "Stacked generalization", Neural Networks 5:241.
    """
    train, validation = as_counts(train, "train"), as_counts(validation, "validation")
    _check_shapes(train.shape, "train", rates=rates, validation=validation)
    if not np.isfinite(rates).all() or (rates < 0).any():
        raise ValueError("`rates` hold values that are negative, NaN or infinite; give rates of at least 0.")
    if not train.nnz:
        raise ValueError("`train` holds no counts; there is no gene mean to mix the rates with.")
    mean = np.asarray(train.sum(axis=0, dtype=np.float64)).ravel()
    mean /= mean.sum()
    shares = shares_of(rates, mean)
    library = np.asarray(train.sum(axis=1, dtype=np.float64)).ravel()

    counts = validation.tocoo()
    cell, gene = counts.row, counts.col
    own = np.asarray(train.tocsr()[cell, gene], dtype=np.float64).ravel() / np.maximum(library[cell], 1)
    own = np.where(library[cell] > 0, own, mean[gene])
    weights = mixture_weights(
        np.stack([shares[cell, gene].astype(np.float64), mean[gene], own]), counts.data.astype(np.float64)
    )
    shares *= np.float32(weights[0])
    shares += (weights[1] * mean).astype(np.float32)
    for rows in row_blocks(train.shape):
        shares[rows] += weights[2] * shares_of(_dense(train, rows), mean)
    return shares, weights


def visible_means(train: Matrix, missing: NDArray[np.bool_], target_sum: float) -> _FloatArray:
    r"""Mean of the log-normalised visible entries of every gene.

    The library size of the whole cell is estimated as that of its visible entries divided by the share that the visible
    genes have in all counts.

    Parameters
    ----------
    train
        Visible counts, cells × genes, dense or sparse, zero where `missing`.
    missing
        True where an entry is hidden, boolean, cells × genes.
    target_sum
        Library size that values are scaled to.

    Returns
    -------
    One value per gene; 0 for a gene without visible entries.
    """
    train = as_counts(train, "train")
    n_genes = train.shape[1]
    library = np.asarray(train.sum(axis=1, dtype=np.float64)).ravel()
    n_visible = train.shape[0] - missing.sum(axis=0)
    exposure = library.sum() - library @ missing
    shares = np.asarray(train.sum(axis=0, dtype=np.float64)).ravel() / np.maximum(exposure, 1)
    shares /= max(shares.sum(), np.finfo(np.float64).tiny)
    covered = 1 - missing @ shares
    full = library / np.maximum(covered, np.finfo(np.float64).tiny)
    entries = train.tocoo()
    values = np.log1p(entries.data / full[entries.row] * target_sum)
    means: _FloatArray = np.bincount(entries.col, weights=values, minlength=n_genes) / np.maximum(n_visible, 1)
    return means


def calibrate_lognorm(
    prediction: NDArray[Any],
    truth: Matrix,
    validation: NDArray[np.bool_],
    train: Matrix,
    missing: NDArray[np.bool_],
    target_sum: float = 250.0,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    r"""Bring a log-normalised prediction to the scale of the truth, as validation entries ask for.

    The calibrated value is :math:`a\,p_{ig} + b\,m_g + c` with the prediction :math:`p` and the mean :math:`m_g` of the
    gene over visible entries, log-normalised with library sizes estimated from what is visible. :math:`a, b, c`
    minimise the squared error over validation entries (linear regression; where they are not determined, as for a
    prediction that is the gene mean itself, those of smallest norm).

    Parameters
    ----------
    prediction
        Predicted values of log1p(count / library size × `target_sum`), cells × genes.
    truth
        True values, cells × genes, dense or sparse; read where `validation` is True.
    validation
        Entries to fit to, boolean, cells × genes; hidden ones, and not those that are scored.
    train
        Visible counts that the prediction was made from, cells × genes, dense or sparse.
    missing
        All entries that were hidden, boolean, cells × genes.
    target_sum
        Library size that `truth` is scaled to, in counts.

    Returns
    -------
    The calibrated prediction, float32, cells × genes, and :math:`(a, b, c)`.

    Raises
    ------
    TypeError, ValueError
        If shapes differ, `validation` is empty, `train` are not counts, or a prediction to fit to is not finite.
    """
    _check_shapes(prediction.shape, "prediction", truth=truth, validation=validation, train=train, missing=missing)
    if not validation.any():
        raise ValueError("`validation` has no entry that is True; there is nothing to fit to.")
    means = visible_means(train, missing, target_sum)
    if sparse.issparse(truth):
        y = np.concatenate([_dense(truth, rows)[validation[rows]] for rows in row_blocks(truth.shape)])
    else:
        y = truth[validation].astype(np.float64)
    x = np.stack([prediction[validation], np.broadcast_to(means, prediction.shape)[validation]], axis=1)
    if not np.isfinite(x).all():
        raise ValueError("`prediction` holds NaN or infinite values where `validation` is True.")
    x = x.astype(np.float64)
    centre = x.mean(axis=0)
    slopes, *_ = np.linalg.lstsq(x - centre, y - y.mean(), rcond=1e-6)
    intercept = y.mean() - centre @ slopes
    calibrated = np.float32(slopes[0]) * prediction.astype(np.float32, copy=False)
    calibrated += (slopes[1] * means + intercept).astype(np.float32)
    return calibrated, np.array([*slopes, intercept])


def noise_ceiling(train: Matrix, held: Matrix, random_state: int | np.random.Generator = 0) -> NDArray[np.float64]:
    r"""Estimate the best correlation with held-out counts that any prediction could have, gene by gene.

    Held counts are noisy, so that even the true rates do not correlate with them perfectly. Let :math:`b_i` be the
    log-normalised held counts of a gene, as :func:`gene_pearson_lognorm` makes them, and :math:`a_i` the same of a part
    of the training counts that was thinned to the depth of the held ones. Given the true rates :math:`\lambda_i` of a
    cell the two are independent and alike, with the mean :math:`h(\lambda_i)`. Then
    :math:`\mathrm{cov}(a, b) = \mathrm{var}(h)`, and no prediction that does not know the noise of :math:`b` can
    correlate with it better than :math:`h` itself, by the Cauchy-Schwarz inequality:

    .. math::
        \mathrm{ceiling} = \mathrm{corr}(h, b) = \sqrt{\frac{\mathrm{var}(h)}{\mathrm{var}(b)}}
                         = \sqrt{\frac{\max(\mathrm{cov}(a, b), 0)}{\mathrm{var}(b)}}

    This holds for counts that are Poisson given their rates, whatever the rates are; variation of the rate from entry
    to entry (as in a negative binomial count) counts as signal, because the training counts carry it too. It does not
    for counts whose variance is below that of a Poisson variable, where thinned parts repel each other. The bound is
    out of reach where rates vary between cells in ways that nothing visible tells of, so that the true limit lies
    below. Depth is one of them: :math:`h` depends on the library size of a cell a little, which a prediction free of
    depth does not follow; with the depths of real data and genes that do not vary, ceilings of 0 to 0.1 come out. It is
    an estimate: with n cells, values below about :math:`n^{-1/4}` cannot be told from 0, and setting negative
    covariances to 0 favours rare genes; read the median over many genes.

    Parameters
    ----------
    train, held
        The two parts of the counts that :func:`thin` made, cells × genes, dense or sparse. The deeper one is thinned
        to the depth of the other; where that is `held`, the ceiling is that of the thinned counts.
    random_state
        Seed or generator of that thinning.

    Returns
    -------
    Correlations from 0 to 1, without unit, one per gene; NaN for genes without held counts.

    Raises
    ------
    TypeError, ValueError
        If `train` or `held` are not counts, shapes differ, or no cell has counts in both.

    References
    ----------
    Spearman (1910), "Correlation calculated from faulty data", British Journal of Psychology 3:271 (reliability of two
    halves; the correlation with what they measure is its square root).
    """
    train, held = as_counts(train, "train"), as_counts(held, "held")
    _check_shapes(held.shape, "held", train=train)
    detected = np.asarray(held.sum(axis=0)).ravel() > 0
    target_sum = float(np.median(library[library > 0])) if (library := _library(held)).any() else 1.0
    ratio = float(held.sum(dtype=np.float64)) / max(float(train.sum(dtype=np.float64)), 1.0)
    if ratio < 1:
        train = thin(train, ratio, random_state).train if ratio > 0 else train
    elif ratio > 1:
        held = thin(held, 1 / ratio, random_state).train
    cells = (_library(train) > 0) & (_library(held) > 0)
    if not cells.any():
        raise ValueError("No cell has counts in both `train` and `held`; there is nothing to correlate.")

    def lognorm(counts: sparse.csr_matrix) -> sparse.csr_matrix:
        return (sparse.diags_array(target_sum / _library(counts)) @ counts).log1p()

    a, b = lognorm(train[cells]), lognorm(held[cells])
    n_cells = b.shape[0]
    mean_a, mean_b = (np.asarray(part.mean(axis=0)).ravel() for part in (a, b))
    covariance = np.asarray(a.multiply(b).sum(axis=0)).ravel() / n_cells - mean_a * mean_b
    variance = np.asarray(b.multiply(b).sum(axis=0)).ravel() / n_cells - mean_b**2
    share = np.divide(np.maximum(covariance, 0), variance, out=np.zeros(len(variance)), where=variance > 1e-12)
    return np.where(detected, np.sqrt(np.minimum(share, 1)), np.nan)


def _library(counts: sparse.csr_matrix) -> _FloatArray:
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
