r"""Which genes can be believed: scores of each gene on counts that the fit has not seen, with standard errors.

A gene is judged against what its own counts tell without a look at other genes or other cells: its mean, the depth of
the cell, and its count there. Counts of some genes do not grow in proportion to the depth of a cell; a method that
knows the depth would beat a plain gene mean without knowing anything of the gene. And where counts vary more than
Poisson noise, one part of a cell's transcripts tells of the other, in a gene whose counts were shuffled among cells as
well as in any other. The baseline therefore expects :math:`m_{ig} = a_g D_i^{\beta_g - 1}` of the transcripts of a
cell of depth :math:`D_i` to be of the gene, with an exponent for each gene, and has seen its count :math:`y_{ig}`: the
mean of the posterior under the distribution of relative expression that makes the gene's counts most likely, whatever
its form (:func:`empirical_bayes`); or under a gamma one, :math:`m (1 + v y) / (1 + v D m)`, where :math:`v_g` is the
variance of the relative expression (Huang et al. 2018, SAVER, Nature Methods 15:539, with the gene's own mean as
prior); or just :math:`m` or the plain gene mean: whichever predicts the held-out counts best.

Standard errors are those of the delete-a-group jackknife over groups of cells drawn at random (Kott 2001, Journal of
Official Statistics 17:521): all scores are functions of sums over cells, so that leaving a group out costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from spaformer_sc.data._fields import FieldOfView
from spaformer_sc.data._split import gene_shares
from spaformer_sc.metrics import mixture_weights
from spaformer_sc.metrics._protocols import row_blocks

FloatArray = NDArray[np.float64]

N_GROUPS = 20
LEVELS = ("no better than baseline", "weak", "reliable")
"""Values of the reliability of a gene, from worst to best."""
LEAST_HELD = 10
"""Held-out transcripts of a gene below which nothing is claimed."""
CLEARLY, SURELY = 1.73, 3.0
"""Standard errors that a gene's gain must lie above 0 to be ``weak`` (5 % of Student's t with 19 degrees of freedom lie
above that) and ``reliable``."""
WORTHWHILE = 0.05
"""Gain over the baseline, in nats per held-out transcript, that would be worth having: 5 % more likely."""
LEAST_CORRELATION = 0.5
"""Least correlation of imputed with true relative expression of a ``reliable`` gene: a quarter of its variance."""
LEAST_DEPTH = 0.2
"""Depth, in that of the median cell, below which a cell is left out of the correlation with the truth: where it
has few transcripts, each makes a relative expression that outweighs all others."""
GAINS = ("gain", "gain_over_prior", "gain_over_posterior", "gain_over_mixture")
"""Log-likelihood gained over the gene mean, and over the other candidates for the baseline."""
ALIKE = 50
"""Number of cells that a cell is judged together with, about: one has too few held-out transcripts."""
_MOST_KINDS = 500
_N_BINS = 50
_EXPONENTS = np.arange(-0.5, 2.51, 0.05)
_FLOOR = 1e-8
_N_DEPTHS, _N_RATES, _N_ITERATIONS = 20, 48, 60
_FINE = 30
"""Counts above this are put together by their logarithm where distributions over cells are fitted."""


@dataclass(frozen=True)
class Sums:
    """Sums over the cells of each group, (groups, genes) each; see :func:`sums_of`."""

    held: FloatArray
    gain: FloatArray
    null_deviance: FloatArray
    gain_over_prior: FloatArray
    gain_over_posterior: FloatArray
    gain_over_mixture: FloatArray
    predicted: FloatArray
    predicted_square: FloatArray
    crossed: FloatArray
    expected: FloatArray
    seen: FloatArray
    seen_square: FloatArray
    held_rate: FloatArray
    cells: FloatArray
    truth: FloatArray
    truth_square: FloatArray
    guess: FloatArray
    guess_square: FloatArray
    product: FloatArray

    def total(self, without: int | None = None) -> dict[str, FloatArray]:
        """Sums over all groups, or all but one, by name."""
        return {
            name: value.sum(axis=0) - (0 if without is None else value[without]) for name, value in vars(self).items()
        }


def depth_exponents(counts: sp.csr_matrix, depth: FloatArray, measured: NDArray[np.bool_] | None = None) -> FloatArray:
    r"""Exponent of the depth that each gene's counts follow best.

    The one of :math:`\sum_i [y_{ig} \beta \log D_i] - y_g \log \sum_i D_i^\beta` (Poisson counts of mean
    :math:`a_g D_i^\beta`, :math:`a_g` profiled out) largest over a grid, with a normal prior of mean 1 and standard
    deviation 0.5. Cells are taken in groups of similar depth.

    Parameters
    ----------
    counts
        Counts (cells, genes).
    depth
        Depth of each cell over all genes (cells,); cells of depth 0 are left out.
    measured
        Which entries were measured (cells, genes), or None.

    Returns
    -------
    Exponents (genes,), 1 for counts in proportion to the depth.
    """
    cells = np.flatnonzero(depth > 0)
    order = cells[np.argsort(depth[cells], kind="stable")]
    parts = np.array_split(order, min(_N_BINS, len(order)))
    log_depth = np.log([depth[part].mean() for part in parts])
    binned = np.stack([np.asarray(counts[part].sum(axis=0), dtype=np.float64).ravel() for part in parts])
    sizes = np.stack([[len(part)] if measured is None else measured[part].sum(axis=0) for part in parts])
    normal = np.log(np.maximum(np.exp(np.outer(_EXPONENTS, log_depth)) @ sizes, 1e-300))
    likelihood = _EXPONENTS[:, None] * (log_depth @ binned) - normal * binned.sum(axis=0)
    best = (likelihood - 2 * np.square(_EXPONENTS - 1)[:, None]).argmax(axis=0)
    return np.asarray(_EXPONENTS[best])


def sums_of(
    held: sp.csr_matrix,
    rates: NDArray[np.float32],
    train: sp.csr_matrix,
    measured: NDArray[np.bool_] | None,
    groups: NDArray[np.int64],
) -> tuple[Sums, FloatArray]:
    r"""Sum over cells what the scores are made of.

    With :math:`x` the held-out counts, :math:`y` the counts of the fit, :math:`D` their sums over a cell, :math:`\rho`
    the ratio of all held-out counts to those of the fit, :math:`p` the predicted shares and :math:`m = a D^{\beta-1}`
    those of the baseline, the relative expression is :math:`p/m`, in the held-out counts :math:`x/(\rho D m)`, and each
    cell has the weight :math:`D m`, its expected count. The last six are for the correlation of log-normalised values
    (:func:`~spaformer_sc.metrics.gene_pearson_lognorm`).

    Parameters
    ----------
    held, rates, train
        As in :func:`~spaformer_sc.metrics.poisson_gain`.
    measured
        Which entries were measured (cells, genes), or None.
    groups
        Group of each cell (cells,), from 0.

    Returns
    -------
    The sums; and of :data:`GAINS` the sums over the genes of each cell (gains, cells).
    """
    n_groups, n_genes = int(groups.max()) + 1, held.shape[1]
    depth = np.asarray(train.sum(axis=1), dtype=np.float64).ravel()
    ratio = max(held[depth > 0].sum(dtype=np.float64) / depth.sum(), 1e-100)
    # Over all genes, so that cells with different panels can be compared.
    full = depth
    if measured is not None:
        full = depth / np.maximum(measured @ gene_shares(train, ~measured), 1e-6)
    median = float(np.median(full[full > 0]))
    exponent = depth_exponents(train, full, measured)
    log_depth = np.log(np.maximum(full, 1e-300))
    exposure, powers = np.zeros(n_genes), np.zeros(n_genes)
    for rows in row_blocks(held.shape):
        power = np.exp(np.outer(log_depth[rows], exponent))
        seen = (depth[rows] > 0)[:, None] & (True if measured is None else measured[rows])
        powers += (power * seen).sum(axis=0)
        exposure += depth[rows] @ seen
    total = np.asarray(train.sum(axis=0), dtype=np.float64).ravel()
    mean, level = total / np.maximum(exposure, 1e-300), total / np.maximum(powers, 1e-300)

    variance = _relative_variance(train, log_depth, level, exponent, measured)
    depth_bin, of_zeros, of_counts = empirical_bayes(train, full, level, exponent, measured)
    library = np.asarray(held.sum(axis=1), dtype=np.float64).ravel()
    target_sum = float(np.median(library[library > 0]))
    found = {name: np.zeros((n_groups, n_genes)) for name in Sums.__dataclass_fields__}
    by_cell = {name: np.zeros(held.shape[0]) for name in GAINS}

    def add(name: str, values: FloatArray, rows: slice) -> None:
        if name in by_cell:
            by_cell[name][rows] += values.sum(axis=1)
        members = np.ones(len(values)), (groups[rows], np.arange(len(values)))
        found[name] += sp.csr_matrix(members, (n_groups, len(values))) @ values

    def add_entries(name: str, matrix: sp.coo_matrix, values: FloatArray, rows: slice) -> None:
        if name in by_cell:
            by_cell[name][rows] += np.bincount(matrix.row, weights=values, minlength=matrix.shape[0])
        index = groups[rows][matrix.row] * n_genes + matrix.col
        found[name] += np.bincount(index, weights=values, minlength=n_groups * n_genes).reshape(n_groups, n_genes)

    for rows in row_blocks(held.shape):
        scored = depth[rows] > 0
        seen = np.broadcast_to(scored[:, None], rates[rows].shape)
        seen = seen if measured is None else seen & measured[rows]
        d = np.where(scored, depth[rows], 1.0)[:, None]
        share = _shares(np.where(seen, rates[rows], 0.0).astype(np.float64))
        in_held = (library[rows] > 0)[:, None] & seen
        guess = np.log1p(share * target_sum) * in_held
        share = _shares(np.where(seen, np.maximum(share, _FLOOR), 0.0))
        null = _shares(np.maximum(mean, _FLOOR) * seen)
        prior = np.maximum(level * np.exp(log_depth[rows][:, None] * exponent) / d, _FLOOR)
        posterior = prior * (1 + variance * train[rows].toarray()) / (1 + variance * d * prior)
        x, y = held[rows].tocoo(), train[rows].tocoo()
        relative = of_zeros[depth_bin[rows]]
        relative[y.row, y.col] = of_counts[rows].data
        mixture = prior * relative
        x = sp.coo_matrix((x.data.astype(np.float64) * scored[x.row], (x.row, x.col)), x.shape)
        at, own = (x.row, x.col), (y.row, y.col)
        scale = ratio * d
        logs = (np.log(np.maximum(value[at], _FLOOR)) for value in (share, null, prior, posterior, mixture))
        log_share, log_null, log_prior, log_posterior, log_mixture = logs
        add("gain", -scale * (share - null), rows)
        add_entries("gain", x, x.data * (log_share - log_null), rows)
        add("gain_over_prior", -scale * (share - prior) * seen, rows)
        add_entries("gain_over_prior", x, x.data * (log_share - log_prior), rows)
        add("gain_over_posterior", -scale * (share - posterior) * seen, rows)
        add_entries("gain_over_posterior", x, x.data * (log_share - log_posterior), rows)
        add("gain_over_mixture", -scale * (share - mixture) * seen, rows)
        add_entries("gain_over_mixture", x, x.data * (log_share - log_mixture), rows)
        add_entries("held", x, x.data, rows)
        add("null_deviance", 2 * scale * null, rows)
        log_count = np.log(np.maximum(x.data, 1) / scale[x.row, 0])
        add_entries("null_deviance", x, 2 * x.data * (log_count - log_null - 1), rows)
        deep = (full[rows] >= LEAST_DEPTH * median)[:, None]
        x_deep, y_deep = deep[x.row, 0], deep[y.row, 0]
        add("expected", d * prior * (seen & deep), rows)
        add("predicted", d * share * deep, rows)
        add("predicted_square", d * share**2 / prior * deep, rows)
        add_entries("held_rate", x, x.data / ratio * x_deep, rows)
        add_entries("crossed", x, x.data / ratio * share[at] / prior[at] * x_deep, rows)
        add_entries("seen", y, y.data.astype(np.float64) * y_deep, rows)
        truth = np.log1p(x.data * (target_sum / np.maximum(library[rows][x.row], 1)))
        add("cells", in_held.astype(np.float64), rows)
        add("guess", guess, rows)
        add("guess_square", guess**2, rows)
        add_entries("truth", x, truth, rows)
        add_entries("truth_square", x, truth**2, rows)
        add_entries("product", x, truth * guess[at], rows)
        add_entries("seen_square", y, _pairs(y, d[y.row, 0]) / (d[y.row, 0] * prior[own]) * y_deep, rows)
    return Sums(**found), np.stack(list(by_cell.values()))


def _pairs(counts: sp.coo_matrix, depth: FloatArray) -> FloatArray:
    """Square of each count, less what the noise of drawing ``depth`` transcripts of a cell adds to it on average.

    For counts :math:`y` of share :math:`p` among :math:`D` transcripts, :math:`E[y (y - 1)] = D (D - 1) p^2`.
    """
    return np.asarray(counts.data.astype(np.float64) * (counts.data - 1) * depth / np.maximum(depth - 1, 1))


def _relative_variance(
    counts: sp.csr_matrix,
    log_depth: FloatArray,
    level: FloatArray,
    exponent: FloatArray,
    measured: NDArray[np.bool_] | None,
) -> FloatArray:
    """Variance of the relative expression of each gene beyond Poisson noise (genes,), by moments; 0 for none."""
    n_genes = counts.shape[1]
    expected, square, total = (np.zeros(n_genes) for _ in range(3))
    library = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    for rows in row_blocks(counts.shape):
        mean = level * np.exp(exponent * log_depth[rows][:, None])
        seen = (library[rows] > 0)[:, None] & (True if measured is None else measured[rows])
        expected += (mean * seen).sum(axis=0)
        y = counts[rows].tocoo()
        square += np.bincount(y.col, _pairs(y, library[rows][y.row]) / np.maximum(mean[y.row, y.col], 1e-300), n_genes)
        total += np.bincount(y.col, y.data, n_genes)
    expected = np.maximum(expected, 1e-300)
    return np.asarray(np.maximum(square / expected - (total / expected) ** 2, 0))


def empirical_bayes(
    counts: sp.csr_matrix,
    depth: FloatArray,
    level: FloatArray,
    exponent: FloatArray,
    measured: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.int64], FloatArray, sp.csr_matrix]:
    r"""Expectation of an entry's relative expression, given its count and the distribution over cells of its gene.

    A count is Poisson with mean :math:`\lambda e`, where :math:`e = a_g D^{\beta_g}` is expected in a cell of that
    depth. The distribution of :math:`\lambda` over cells that makes all counts of the gene most likely is found on a
    grid, by expectation-maximisation (Kiefer and Wolfowitz 1956, Annals of Mathematical Statistics 27:887).

    Parameters
    ----------
    counts
        Counts (cells, genes), canonical CSR.
    depth
        Depth of each cell over all genes (cells,).
    level, exponent
        :math:`a_g` and :math:`\beta_g` (genes,).
    measured
        Which entries were measured (cells, genes), or None.

    Returns
    -------
    Number of the group of similar depth that each cell is in (cells,); the expectation for entries without counts
    (groups, genes), and for those with counts, as a matrix of the structure of ``counts``.
    """
    order = np.argsort(depth, kind="stable")
    group = np.zeros(len(depth), dtype=np.int64)
    parts = [part for part in np.array_split(order, _N_DEPTHS) if len(part)]
    for i, part in enumerate(parts):
        group[part] = i
    log_depth = np.log([max(depth[part].mean(), 1e-300) for part in parts])
    expected = np.maximum(level * np.exp(np.outer(log_depth, exponent)), 1e-12)
    size = np.stack([np.full(counts.shape[1], len(p)) if measured is None else measured[p].sum(axis=0) for p in parts])
    by_gene = counts.tocsc()
    of_zeros, of_counts = np.ones(expected.shape), np.ones(by_gene.nnz)
    fine = counts.data.max(initial=0) <= _FINE
    for gene in range(counts.shape[1]):
        own = slice(by_gene.indptr[gene], by_gene.indptr[gene + 1])
        y, at = by_gene.data[own].astype(np.float64), group[by_gene.indices[own]]
        if not len(y):
            continue
        rounded = y if fine else np.where(y <= _FINE, y, np.exp(np.round(10 * np.log(np.maximum(y, 1))) / 10))
        pairs, number, times = np.unique(np.stack([at, rounded]), axis=1, return_inverse=True, return_counts=True)
        pair_group = pairs[0].astype(np.int64)
        zeros = np.maximum(size[:, gene] - np.bincount(at, minlength=len(parts)), 0)
        value = np.concatenate([np.zeros(len(parts)), pairs[1]])
        mean = np.concatenate([expected[:, gene], expected[pair_group, gene]])
        weight = np.concatenate([zeros, times]).astype(np.float64)
        grid = np.geomspace(0.01, max(10.0, 1.5 * float((value / mean).max())), _N_RATES)
        log_prob = value[:, None] * np.log(mean[:, None] * grid) - mean[:, None] * grid
        occurs = weight > 0
        prob = np.exp(log_prob[occurs] - log_prob[occurs].max(axis=1, keepdims=True))
        share = np.full(_N_RATES, 1 / _N_RATES)
        for _ in range(_N_ITERATIONS):
            share *= (weight[occurs] / np.maximum(prob @ share, 1e-300)) @ prob
            share /= share.sum()
        log_prob += np.log(np.maximum(share, 1e-300))
        prob = np.exp(log_prob - log_prob.max(axis=1, keepdims=True))
        found = (prob @ grid) / prob.sum(axis=1)
        of_zeros[:, gene] = found[: len(parts)]
        of_counts[own] = found[len(parts) :][number.ravel()]
    return group, of_zeros, sp.csc_matrix((of_counts, by_gene.indices, by_gene.indptr), counts.shape).tocsr()


def _shares(values: FloatArray) -> FloatArray:
    return np.asarray(values / np.maximum(values.sum(axis=1, keepdims=True), 1e-300))


def true_correlation(sums: dict[str, FloatArray]) -> FloatArray:
    r"""Estimate the correlation of imputed with true relative expression, over cells, of each gene.

    Held-out counts are noisy, and no prediction correlates with them as it does with the truth. Their noise is
    independent of the prediction, so that the covariance of the two is that of prediction and truth; the variance of
    the truth is that of the counts of the fit less the noise of drawing transcripts, :math:`y (y - 1) D / (D - 1)` in
    place of :math:`y^2`. What varies beyond that noise counts as truth. Cells of less than :data:`LEAST_DEPTH` of the
    median depth are left out.

    Parameters
    ----------
    sums
        From :meth:`Sums.total`.

    Returns
    -------
    Correlations (genes,), by their noise also beyond 1; NaN where counts do not vary beyond noise, or the prediction
    does not.
    """
    weight = np.maximum(sums["expected"], 1e-100)
    covariance = sums["crossed"] / weight - sums["predicted"] * sums["held_rate"] / weight**2
    predicted = sums["predicted_square"] / weight - (sums["predicted"] / weight) ** 2
    truth = sums["seen_square"] / weight - (sums["seen"] / weight) ** 2
    varies = (predicted > 1e-9) & (truth > 1e-9)
    root = np.sqrt(np.where(varies, predicted * truth, 1.0))
    return np.where(varies, covariance / root, np.nan)


def pearson(sums: dict[str, FloatArray]) -> FloatArray:
    """Correlation of log-normalised held-out counts with log-normalised rates; see `gene_pearson_lognorm`."""
    n = np.maximum(sums["cells"], 1)
    truth, guess = sums["truth"] / n, sums["guess"] / n
    spread = (sums["truth_square"] / n - truth**2) * (sums["guess_square"] / n - guess**2)
    varies = spread > 1e-12
    correlation = (sums["product"] / n - truth * guess) / np.sqrt(np.where(varies, spread, 1.0))
    return np.where(sums["held"] > 0, np.where(varies, correlation, 0.0), np.nan)


def deviance_share(sums: dict[str, FloatArray]) -> FloatArray:
    """Share of the Poisson deviance of the gene mean that is explained (genes,); NaN where nothing is held out."""
    known = (sums["held"] > 0) & (sums["null_deviance"] > 0)
    share = np.full(len(known), np.nan)
    np.divide(2 * sums["gain"], sums["null_deviance"], out=share, where=known)
    return share


def gain_over_baseline(sums: dict[str, FloatArray]) -> FloatArray:
    """Log-likelihood gained over the baseline, nats per held-out transcript (genes,)."""
    held = sums["held"]
    gain = np.full(len(held), np.nan)
    np.divide(_over_better(sums), held, out=gain, where=held > 0)
    return gain


def _over_better(sums: dict[str, FloatArray]) -> FloatArray:
    """Gain over the best of gene mean, prior and posterior: exponent and variance may have been taken from noise."""
    return np.asarray(np.minimum.reduce([sums[name] for name in GAINS]))


def jackknife(sums: Sums, score: Callable[[dict[str, FloatArray]], FloatArray]) -> FloatArray:
    """Standard error of a score (genes,); NaN where it is not known without one of the groups, or these are too few."""
    n_groups = len(sums.held)
    if n_groups < N_GROUPS:
        return np.full_like(score(sums.total()), np.nan)
    without = np.stack([score(sums.total(group)) for group in range(n_groups)])
    return np.asarray(np.sqrt((n_groups - 1) / n_groups * np.square(without - without.mean(axis=0)).sum(axis=0)))


def reliability(
    held: sp.csr_matrix,
    rates: NDArray[np.float32],
    train: sp.csr_matrix,
    missing: NDArray[np.bool_] | None,
    rng: np.random.Generator,
) -> tuple[pd.DataFrame, FloatArray, float, float]:
    """Judge each gene by counts that the fit has not seen.

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
        Draws the groups of cells.

    Returns
    -------
    A data frame (genes) with ``gain_over_baseline`` and ``gain_over_baseline_se``, in nats per held-out transcript;
    ``pearson_se``, ``deviance_explained_se``; ``true_correlation`` (:func:`true_correlation`) and its
    ``true_correlation_se``; and ``reliability``, a categorical of :data:`LEVELS`.
    Then :data:`GAINS` of each cell (gains, cells), in nats; and the gain over the baseline over all genes, in nats per
    held-out transcript, with its standard error.
    """
    cells = np.flatnonzero(np.asarray(train.sum(axis=1)).ravel() > 0)
    groups = np.zeros(held.shape[0], dtype=np.int64)
    groups[cells] = rng.permutation(len(cells)) % N_GROUPS
    sums, of_cells = sums_of(held, rates, train, None if missing is None else ~missing, groups)
    total = sums.total()
    correlation, gain = true_correlation(total), gain_over_baseline(total)
    error = jackknife(sums, gain_over_baseline)
    enough = total["held"] >= LEAST_HELD
    level = (enough & (gain > CLEARLY * error)).astype(int)
    level += (level == 1) & (gain > SURELY * error) & (correlation >= LEAST_CORRELATION)
    genes = pd.DataFrame(
        {
            "gain_over_baseline": gain,
            "gain_over_baseline_se": error,
            "pearson_se": jackknife(sums, pearson),
            "deviance_explained_se": jackknife(sums, deviance_share),
            "true_correlation": np.clip(correlation, -1, 1),
            "true_correlation_se": jackknife(sums, true_correlation),
            "reliability": pd.Categorical.from_codes(level, categories=list(LEVELS), ordered=True),
        }
    )
    return genes, of_cells, float(overall_gain(total)), float(jackknife(sums, overall_gain))


def undecided(genes: pd.DataFrame) -> pd.Series:
    """Tell genes that are no better than the baseline from those of which too little was held out to tell.

    Of these a gain of :data:`WORTHWHILE` is not ruled out either, at a level of 5 %, or fewer than :data:`LEAST_HELD`
    transcripts were held out.

    Parameters
    ----------
    genes
        Scores as :func:`reliability` gives them, and ``held_out``.

    Returns
    -------
    True where there is too little to tell (genes,); False where the verdict is better than the lowest.
    """
    highest = genes["gain_over_baseline"] + CLEARLY * genes["gain_over_baseline_se"]
    ruled_out = (genes["held_out"] >= LEAST_HELD) & (highest < WORTHWHILE)
    return (genes["reliability"] == LEVELS[0]) & ~ruled_out


def groups_alike(embedding: NDArray[np.float32], seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Groups of about :data:`ALIKE` cells that lie together in the latent space, by k-means.

    Returns
    -------
    Group of each cell (cells,), and the centres (groups, n_latent).
    """
    from sklearn.cluster import MiniBatchKMeans

    n_groups = int(np.clip(len(embedding) // ALIKE, 1, _MOST_KINDS))
    means = MiniBatchKMeans(n_groups, random_state=seed % 2**32, n_init=1, reassignment_ratio=0.0)
    groups = np.asarray(means.fit_predict(embedding), dtype=np.int64)
    return groups, np.asarray(means.cluster_centers_, dtype=np.float32)


def closest(embedding: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.int64]:
    """Number of the centre (groups, n_latent) that each cell (cells, n_latent) is closest to (cells,)."""
    from sklearn.metrics import pairwise_distances_argmin

    return np.asarray(pairwise_distances_argmin(embedding, centres), dtype=np.int64)


def scores_of_groups(gains: FloatArray, held_out: FloatArray, groups: NDArray[np.int64]) -> pd.DataFrame:
    """Score groups of cells by counts that the fit has not seen.

    Parameters
    ----------
    gains
        :data:`GAINS` of each cell (gains, cells), in nats.
    held_out
        Held-out transcripts of each cell (cells,).
    groups
        Group of each cell (cells,), from 0.

    Returns
    -------
    A data frame (groups) with ``n_cells`` and ``held_out``; ``gain`` over the gene mean and ``gain_over_baseline``, in
    nats per held-out transcript, NaN without any, with standard errors ``…_se`` from the spread between cells, NaN for
    a single cell; and ``reliability``, a categorical of :data:`LEVELS`: a gain over the baseline of more than 1.73
    standard errors is ``weak``, of more than 3 ``reliable``.
    """
    n = np.bincount(groups)
    total = np.bincount(groups, weights=held_out)
    told = np.where(total > 0, total, np.nan)

    def score(values: FloatArray) -> tuple[FloatArray, FloatArray]:
        summed = np.bincount(groups, weights=values, minlength=len(n))
        with np.errstate(invalid="ignore"):
            share = summed / told
            rest = values - share[groups] * held_out
            spread = np.bincount(groups, weights=rest**2, minlength=len(n)) * n / np.where(n > 1, n - 1, np.nan)
            return share, np.sqrt(spread) / told

    (gain, gain_se), *others = (score(values) for values in gains)
    over, over_se = gain, gain_se
    for other, other_se in others:
        smaller = other < over
        over, over_se = np.where(smaller, other, over), np.where(smaller, other_se, over_se)
    level = (total >= LEAST_HELD) & (over > CLEARLY * over_se)
    level = level.astype(int) + (level & (over > SURELY * over_se))
    return pd.DataFrame(
        {
            "n_cells": n,
            "held_out": total.astype(np.int64),
            "gain": gain,
            "gain_se": gain_se,
            "gain_over_baseline": over,
            "gain_over_baseline_se": over_se,
            "reliability": pd.Categorical.from_codes(level, categories=list(LEVELS), ordered=True),
        }
    )


def overall_gain(sums: dict[str, FloatArray]) -> FloatArray:
    """Log-likelihood gained over the baseline over all genes, nats per held-out transcript (scalar).

    The same candidate for all genes: the best of each gene would be one that its held-out transcripts happen to favour.
    """
    return np.asarray(min(sums[name].sum() for name in GAINS) / np.maximum(sums["held"].sum(), 1))


def neighbour_rates(
    fields: Sequence[FieldOfView],
    train: sp.csr_matrix,
    validation: sp.csr_matrix,
    missing: NDArray[np.bool_] | None,
    gene_share: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Predict what can be said without a model: a mixture of own counts, direct neighbours' counts and gene means.

    Parameters
    ----------
    fields
        FOVs with their spatial graphs.
    train
        Counts to predict from (cells, genes).
    validation
        Counts that the weights are fitted to (cells, genes).
    missing
        Which entries were not measured (cells, genes), or None.
    gene_share
        Mean share of each gene (genes,).

    Returns
    -------
    Shares (cells, genes).
    """
    depth = np.asarray(train.sum(axis=1), dtype=np.float64).ravel()
    if missing is not None:
        depth /= np.maximum(~missing @ gene_share, 1e-6)
    around: NDArray[np.float32] = np.empty(train.shape, dtype=np.float32)
    for fov in fields:
        rows, columns = fov.edge_index.numpy()
        graph = sp.csr_matrix((np.ones(len(rows)), (rows, columns)), (fov.n_cells, fov.n_cells))[fov.own]
        seen = depth[fov.cells] if missing is None else depth[fov.cells][:, None] * ~missing[fov.cells]
        counts, own = train[fov.cells], fov.cells[fov.own]
        for block in row_blocks((len(own), train.shape[1])):
            exposure = (graph[block] @ seen)[:, None] if missing is None else graph[block] @ seen
            counted = (graph[block] @ counts).toarray() + gene_share  # one transcript of the average cell
            around[own[block]] = counted / (exposure + 1)
    entries = validation.tocoo()
    seen_there = np.asarray(train[entries.row, entries.col]).ravel() / np.maximum(depth[entries.row], 1)
    parts = np.stack([around[entries.row, entries.col], seen_there, gene_share[entries.col]]).astype(np.float64)
    weights = mixture_weights(parts, entries.data.astype(np.float64)) if entries.nnz else np.array([0.0, 0.0, 1.0])
    around *= np.float32(weights[0])
    around += np.float32(weights[2]) * gene_share
    rows, columns = train.nonzero()
    own_shares = np.asarray(train[rows, columns]).ravel() / np.maximum(depth[rows], 1)
    around[rows, columns] += (weights[1] * own_shares).astype(np.float32)
    return around
