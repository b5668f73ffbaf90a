r"""What is known of each entry beyond its mean: a posterior of the rate, calibrated on held-out counts.

The expected count of an entry, at the depth of its cell, has a gamma posterior of mean :math:`m` (what is imputed) and
shape

.. math:: a = \alpha m^\beta + \gamma y,

with the entry's own count :math:`y`; a new count at the same depth is negative binomial with mean :math:`m` and
dispersion :math:`a`. Were the network's expectation a gamma prior of shape :math:`k` and nothing else uncertain,
:math:`a` would be :math:`k + y` (SAVER: Huang et al. 2018, Nature Methods 15:539). How sure the networks, their mixture
and their disagreement leave one is taken from what they predict of counts that they have not seen: :math:`\alpha`,
:math:`\beta` and :math:`\gamma` make the validation counts most likely. Levels of intervals are then set by how often
intervals cover the test counts (split conformal prediction, with randomised ranks because counts are discrete: Vovk,
Gammerman & Shafer 2005, "Algorithmic Learning in a Random World", ch. 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import betainc, gammaincinv, gammaln

from spaformer_sc.metrics._protocols import row_blocks

FloatArray = NDArray[np.float64]

LEAST_COUNTS = 200
"""Held-out transcripts below which nothing is fitted to them."""
LEVELS = tuple(float(level) for level in np.linspace(0, 1, 101))
"""Levels at which coverage is recorded."""
STRATA = {"less than 0.02": 0.0, "0.02 to 0.2": 0.02, "more than 0.2": 0.2}
"""Held-out counts that are expected of an entry, for which coverage is recorded apart: name and lower end."""
LEAST_ENTRIES = 1000
"""Entries of a stratum below which nothing is said of it."""
MOST_ENTRIES = 2_000_000
"""Entries that coverage is measured on, those of cells drawn at random; the error is then below 0.001."""
LEAST_KNOWN = 10
"""Log-normalised values of a gene below which no dispersion is found from them."""
LEAST_SHAPE, LARGEST_SHAPE = 1e-3, 1e6
_LEAST_MEAN, _LEAST_PROB = 1e-9, 1e-12
_TYPICAL = np.array([0.7, 0.4, 0.0])
"""What (log α, β, log γ) is taken for before counts are seen."""
_SPREAD = np.array([1.0, 0.4, 0.7])
"""Standard deviation of the normal distribution of these around that."""
_N_MEANS, _N_COUNTS, _MEANS_PER_FOLD = 80, 61, 4.0


@dataclass(frozen=True)
class Posterior:
    """Posterior of the expected count of each entry, as a function of its mean and its own count.

    Attributes
    ----------
    log_level, slope, log_own
        Logarithm of α, β, and logarithm of γ, for entries that were measured.
    missing
        Logarithm of α and β for entries that were not.
    coverage
        Share of held-out counts inside their intervals, randomised, at each of :data:`LEVELS`.
    strata
        The same for each of :data:`STRATA`.
    n_scored
        Number of entries that ``coverage`` was measured on; 0 if it was not.
    """

    log_level: float = float(_TYPICAL[0])
    slope: float = float(_TYPICAL[1])
    log_own: float = float(_TYPICAL[2])
    missing: tuple[float, float] = (float(_TYPICAL[0]), float(_TYPICAL[1]))
    coverage: tuple[float, ...] = LEVELS
    strata: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    n_scored: int = 0

    def shape(self, mean: NDArray[Any], counts: NDArray[Any], missing: NDArray[np.bool_] | None = None) -> FloatArray:
        """Shape of the posterior of each entry.

        Parameters
        ----------
        mean
            Expected counts, any shape.
        counts
            Own counts of the entries, same shape.
        missing
            Which entries were not measured, same shape, or None.
        """
        log_mean = np.log(np.maximum(mean, _LEAST_MEAN), dtype=np.float64)
        shape = np.exp(self.log_level + self.slope * log_mean) + np.exp(self.log_own) * counts
        if missing is not None:
            shape = np.where(missing, np.exp(self.missing[0] + self.missing[1] * log_mean), shape)
        return np.asarray(np.clip(shape, LEAST_SHAPE, LARGEST_SHAPE))

    def entries(
        self,
        values: NDArray[np.float32],
        counts: NDArray[Any],
        missing: NDArray[np.bool_] | None,
        output: str,
        target_sum: float,
        depth: FloatArray,
        dispersion: FloatArray | None,
    ) -> tuple[FloatArray, FloatArray]:
        """Mean and shape of the posterior of entries of an imputed layer (cells, genes each).

        Parameters
        ----------
        values, output, target_sum, depth, dispersion
            The layer, as in :func:`expected_counts`.
        counts
            Own counts (cells, genes); not read where missing.
        missing
            Which entries were not measured (cells, genes), or None.
        """
        mean = expected_counts(values, output, target_sum, depth, dispersion, missing)
        return mean, self.shape(mean, counts, missing)

    def level_for(self, wanted: float) -> float:
        """Level of intervals that covers the share ``wanted`` of held-out counts (0 < wanted < 1)."""
        if not self.n_scored:
            return wanted
        aim = min(wanted * (self.n_scored + 1) / self.n_scored, 1.0)
        found = float(np.interp(aim, np.maximum.accumulate(self.coverage), LEVELS))
        return min(found, 1 - (1 - wanted) / 10)  # no counts can tell of levels so close to 1

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists of them, for files."""
        return {
            "log_level": self.log_level,
            "slope": self.slope,
            "log_own": self.log_own,
            "missing": list(self.missing),
            "levels": list(LEVELS),
            "coverage": list(self.coverage),
            "strata": {name: list(values) for name, values in self.strata.items()},
            "n_scored": self.n_scored,
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Posterior:
        """Inverse of :meth:`to_dict`.

        Raises
        ------
        KeyError, TypeError, ValueError
            If something lacks or is no number.
        """

        def numbers(values: Sequence[Any], n: int) -> tuple[float, ...]:
            if len(values) != n:
                raise ValueError(f"{n} numbers are needed, not {len(values)}")
            if not np.isfinite(found := tuple(float(value) for value in values)).all():
                raise ValueError("numbers must be finite")
            return found

        log_level, slope, log_own = numbers([given[name] for name in ("log_level", "slope", "log_own")], 3)
        level_where_missing, slope_where_missing = numbers(given["missing"], 2)
        return cls(
            log_level=log_level,
            slope=slope,
            log_own=log_own,
            missing=(level_where_missing, slope_where_missing),
            coverage=numbers(given["coverage"], len(LEVELS)),
            strata={str(name): numbers(values, len(LEVELS)) for name, values in given["strata"].items()},
            n_scored=int(given["n_scored"]),
        )


# --- calibration ------------------------------------------------------------------------------------------------------


def fit_shape(
    rates: NDArray[np.float32],
    depth: FloatArray,
    counts: sp.csr_matrix,
    held: sp.csr_matrix,
    measured: NDArray[np.bool_] | None = None,
) -> tuple[float, float, float]:
    r"""Find the :math:`\log\alpha, \beta, \log\gamma` under which held-out counts are most likely.

    A held-out count is negative binomial with mean :math:`\rho m` and dispersion :math:`a`, where :math:`\rho` is the
    ratio of all held-out counts to those that the means were predicted from. Entries are summed in bins of mean and
    own count, and the three numbers have weak normal priors, for data that say little.

    Parameters
    ----------
    rates
        Predicted shares (cells, genes).
    depth
        Depth of each cell (cells,), so that ``rates * depth`` are expected counts.
    counts
        Counts that were predicted from (cells, genes).
    held
        Held-out counts (cells, genes).
    measured
        Which entries to use (cells, genes), or None for all.

    Returns
    -------
    The three numbers; the typical ones where fewer than :data:`LEAST_COUNTS` transcripts are held out.
    """
    total = counts.sum(dtype=np.float64)
    if held.sum() < LEAST_COUNTS or not total:
        return float(_TYPICAL[0]), float(_TYPICAL[1]), float(_TYPICAL[2])
    ratio = held.sum(dtype=np.float64) / total
    size = _N_MEANS * _N_COUNTS
    entries, means, own = (np.zeros(size) for _ in range(3))
    bins, values = [], []
    for rows in row_blocks(held.shape):
        mean = np.maximum(rates[rows] * depth[rows][:, None], _LEAST_MEAN)
        own_counts = counts[rows].toarray()
        by_mean = np.clip((_MEANS_PER_FOLD * (np.log(mean) + 9)).astype(np.int64), 0, _N_MEANS - 1)
        folded = 8 + 4 * np.log2(np.maximum(own_counts, 8) / 8)
        by_count = np.where(own_counts < 8, own_counts, np.minimum(folded, _N_COUNTS - 1)).astype(np.int64)
        bin_of = by_mean * _N_COUNTS + by_count
        used = np.ones(mean.shape, dtype=bool) if measured is None else measured[rows]
        used = used & (depth[rows] > 0)[:, None]
        entries += np.bincount(bin_of[used], minlength=size)
        means += np.bincount(bin_of[used], weights=mean[used], minlength=size)
        own += np.bincount(bin_of[used], weights=own_counts[used], minlength=size)
        x = held[rows].tocoo()
        of = used[x.row, x.col] & (x.data > 0)
        bins.append(bin_of[x.row[of], x.col[of]])
        values.append(x.data[of].astype(np.float64))
    filled = entries > 0
    number = np.cumsum(filled) - 1
    n, mean, own = entries[filled], means[filled] / entries[filled], own[filled] / entries[filled]
    (at, value), times = _unique(number[np.concatenate(bins)], np.concatenate(values))
    return _most_likely(n, mean, ratio * mean, own, at, value, times)


def fit_shape_where_missing(mean: FloatArray, held: FloatArray) -> tuple[float, float] | None:
    r"""Find the :math:`\log\alpha, \beta` under which the counts of held-out entries are most likely.

    Parameters
    ----------
    mean
        Expected counts (entries,).
    held
        Counts of these entries (entries,), whole.

    Returns
    -------
    The two numbers; None where there are fewer than :data:`LEAST_COUNTS` transcripts.
    """
    if held.sum() < LEAST_COUNTS:
        return None
    mean = np.maximum(mean, _LEAST_MEAN)
    at = np.flatnonzero(held)
    once = np.ones_like(mean)
    level, slope, _ = _most_likely(once, mean, mean, np.zeros_like(mean), at, held[at], once[at])
    return level, slope


def _most_likely(
    n: FloatArray,
    mean: FloatArray,
    expected: FloatArray,
    own: FloatArray,
    at: NDArray[np.int64],
    value: FloatArray,
    times: FloatArray,
) -> tuple[float, float, float]:
    """Maximise the likelihood of ``n`` counts around each expected one: ``value`` occurs ``times`` around that ``at``,
    and all others are 0."""
    log_mean = np.log(mean)

    def loss(parameters: FloatArray) -> float:
        shape = np.exp(parameters[0] + parameters[1] * log_mean) + np.exp(parameters[2]) * own
        shape = np.clip(shape, LEAST_SHAPE, LARGEST_SHAPE)
        likelihood = -(n * shape * np.log1p(expected / shape)).sum()
        a, m = shape[at], expected[at]
        likelihood += times @ (gammaln(value + a) - gammaln(a) + value * np.log(m / (m + a)))
        return float(np.square((parameters - _TYPICAL) / _SPREAD).sum() / 2 - likelihood)

    found = minimize(loss, _TYPICAL, method="Nelder-Mead", options={"maxiter": 1000, "xatol": 1e-4, "fatol": 1e-4}).x
    return float(found[0]), float(found[1]), float(found[2])


def _unique(bins: NDArray[np.int64], values: FloatArray) -> tuple[tuple[NDArray[np.int64], FloatArray], FloatArray]:
    """Distinct pairs of bin and value, and how often each occurs."""
    pairs, times = np.unique(np.stack([bins.astype(np.float64), values]), axis=1, return_counts=True)
    return (pairs[0].astype(np.int64), pairs[1]), times.astype(np.float64)


def measure_coverage(
    posterior: Posterior,
    rates: NDArray[np.float32],
    depth: FloatArray,
    counts: sp.csr_matrix,
    held: sp.csr_matrix,
    measured: NDArray[np.bool_] | None,
    rng: np.random.Generator,
) -> Posterior:
    """Measure how often intervals cover held-out counts, at every level, by what count is expected.

    Parameters
    ----------
    posterior
        With its numbers fitted to other held-out counts.
    rates, depth, counts, held, measured
        As in :func:`fit_shape`.
    rng
        Draws the cells and breaks ties.

    Returns
    -------
    The posterior with its coverage.
    """
    n_genes = held.shape[1]
    total = counts.sum(dtype=np.float64)
    if held.sum() < LEAST_COUNTS or not total:
        return posterior
    ratio = held.sum(dtype=np.float64) / total
    some = rng.permutation(np.flatnonzero(depth > 0))[: max(1, MOST_ENTRIES // n_genes)]
    inside = np.zeros((len(STRATA), len(LEVELS)))
    size = np.zeros(len(STRATA))
    for rows in row_blocks((len(some), n_genes)):
        cells = some[rows]
        mean = rates[cells] * depth[cells][:, None]
        shape = posterior.shape(mean, counts[cells].toarray())
        used = np.ones(mean.shape, dtype=bool) if measured is None else measured[cells]
        expected = ratio * mean[used]
        rank = ranks(held[cells].toarray()[used], expected, shape[used], rng)
        of = np.searchsorted(list(STRATA.values()), expected, side="right") - 1
        for number in range(len(STRATA)):
            inside[number] += np.searchsorted(np.sort(rank[of == number]), LEVELS, side="right")
            size[number] += (of == number).sum()
    if not size.sum():
        return posterior
    shares = {
        name: tuple(float(share) for share in inside[number] / size[number])
        for number, name in enumerate(STRATA)
        if size[number] >= LEAST_ENTRIES
    }
    overall = tuple(float(share) for share in inside.sum(axis=0) / size.sum())
    return replace(posterior, coverage=overall, strata=shares, n_scored=int(size.sum()))


# --- negative binomial counts -----------------------------------------------------------------------------------------


def _log_prob(counts: FloatArray, mean: FloatArray, shape: FloatArray) -> FloatArray:
    """Log-probability of negative binomial counts; `nn.likelihoods.nb_log_prob` in double precision, in NumPy."""
    rising = gammaln(counts + shape) - gammaln(shape) - gammaln(counts + 1)
    return np.asarray(rising - shape * np.log1p(mean / shape) + counts * np.log(mean / (mean + shape)))


def _flat(*arrays: NDArray[Any]) -> tuple[list[FloatArray], tuple[int, ...]]:
    wide = np.broadcast_arrays(*arrays)
    return [np.array(array, dtype=np.float64).ravel() for array in wide], wide[0].shape


def _mode(mean: FloatArray, shape: FloatArray) -> FloatArray:
    return np.floor(np.maximum((shape - 1) / shape * mean, 0))


class _Walk:
    """Probabilities of counts next to one another, upwards or downwards from the mode, for many entries at once."""

    def __init__(self, count: FloatArray, prob: FloatArray, mean: FloatArray, shape: FloatArray, step: int) -> None:
        self.count, self.prob = count.copy(), prob.copy()
        self._odds, self._shape, self._step = mean / (mean + shape), shape, step

    def move(self, at: NDArray[np.int64]) -> None:
        """Go one count further in some entries; below 0 the probability is 0."""
        count, shape, odds = self.count[at], self._shape[at], self._odds[at]
        if self._step > 0:
            self.prob[at] *= (count + shape) / (count + 1) * odds
        else:
            lower = np.maximum(count - 1, 0)
            self.prob[at] *= np.where(count > 0, count / ((lower + shape) * odds), 0.0)
        self.count[at] += self._step


def ranks(counts: NDArray[Any], mean: NDArray[Any], shape: NDArray[Any], rng: np.random.Generator | None) -> FloatArray:
    """Level of the smallest interval that holds each count: uniform if counts are as predicted.

    The probability of all counts that are more likely than the given one, plus a part of its own: drawn uniformly, or
    none without ``rng`` (an interval that is not randomised holds the count when its level is above that).

    Parameters
    ----------
    counts, mean, shape
        Counts, and mean and dispersion of their negative binomial distributions; they broadcast.
    rng
        Draws the part, or None.
    """
    (x, mu, a), size = _flat(counts, np.maximum(mean, _LEAST_MEAN), shape)
    own = np.exp(_log_prob(x, mu, a))
    mode = _mode(mu, a)
    # Where 0 is the likeliest count, those more likely than a count are those below it.
    above = np.where(x > 0, betainc(a, np.maximum(x, 1), a / (a + mu)), 0.0)
    inside = np.flatnonzero(mode > 0)
    above[inside] = 0.0
    top = np.exp(_log_prob(mode, mu, a))
    least = np.maximum(own * (1 + 1e-9), _LEAST_PROB)
    for step in (1, -1):
        walk = _Walk(mode, top, mu, a, step)
        active = inside
        if step < 0:
            walk.move(active)
        while len(active := active[walk.prob[active] > least[active]]):
            above[active] += walk.prob[active]
            walk.move(active)
    part = 0.0 if rng is None else rng.random(len(x)) * own
    return np.asarray((above + part).reshape(size))


def count_interval(mean: NDArray[Any], shape: NDArray[Any], level: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Find the shortest interval that holds a count with a probability of at least ``level``.

    Parameters
    ----------
    mean, shape
        Mean and dispersion of negative binomial distributions; they broadcast.
    level
        Between 0 and 1.

    Returns
    -------
    Lower and upper ends, both inside, int32 in the shape of ``mean``.
    """
    (mu, a), size = _flat(np.maximum(mean, _LEAST_MEAN), shape)
    mode = _mode(mu, a)
    mass = np.exp(_log_prob(mode, mu, a))
    up, down = _Walk(mode, mass, mu, a, 1), _Walk(mode, mass, mu, a, -1)
    lower, upper = mode.copy(), mode.copy()
    everywhere = np.arange(len(mu))
    up.move(everywhere)
    down.move(everywhere)
    active = everywhere
    while len(active := active[(mass[active] < level) & (up.prob[active] + down.prob[active] > _LEAST_PROB)]):
        higher = up.prob[active] >= down.prob[active]
        rise, fall = active[higher], active[~higher]
        mass[rise] += up.prob[rise]
        upper[rise] = up.count[rise]
        mass[fall] += down.prob[fall]
        lower[fall] = down.count[fall]
        up.move(rise)
        down.move(fall)
    return lower.astype(np.int32).reshape(size), upper.astype(np.int32).reshape(size)


def mean_interval(mean: NDArray[Any], shape: NDArray[Any], level: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Central interval of gamma distributions of given mean and shape, with equal tails; arguments broadcast."""
    tail = (1 - level) / 2
    return tuple(np.asarray(gammaincinv(shape, q) * mean / shape) for q in (tail, 1 - tail))  # type: ignore[return-value]


def detection(mean: NDArray[Any], shape: NDArray[Any], capture: float = 1.0) -> FloatArray:
    r"""Probability of at least one count, :math:`1 - (1 + c m / a)^{-a}`, at ``capture`` times the depth."""
    return np.asarray(-np.expm1(-shape * np.log1p(capture * mean / shape)))


# --- back from log-normalised values ----------------------------------------------------------------------------------


def means_of_lognorm(values: NDArray[Any], scale: FloatArray, dispersion: FloatArray) -> FloatArray:
    """Find the expected counts whose log-normalised values have a given expectation.

    Newton's method: the expectation is a concave function of the mean, so that from below it comes ever closer.

    Parameters
    ----------
    values
        Expectations of log1p(count * scale) (cells, genes).
    scale
        Factor of the counts (cells,).
    dispersion
        Inverse dispersion of the counts around the mean, (genes,) or (cells, genes).

    Returns
    -------
    Expected counts (cells, genes).
    """
    import torch

    from spaformer_sc.nn.likelihoods import expected_log1p

    factor = torch.from_numpy(np.asarray(scale, dtype=np.float64))[:, None]
    theta = torch.from_numpy(np.broadcast_to(np.asarray(dispersion, dtype=np.float64), values.shape).copy())
    wanted = torch.from_numpy(np.asarray(values, dtype=np.float64))
    mean = torch.expm1(wanted) / factor.clamp(min=1e-300)  # too small, by Jensen's inequality
    mean[factor.ravel() <= 0] = 0.0
    for _ in range(30):
        value = expected_log1p(mean, factor, dispersion=theta)
        step = 1e-4 * mean + 1e-12
        slope = (expected_log1p(mean + step, factor, dispersion=theta) - value) / step
        change = (wanted - value) / slope.clamp(min=1e-300)
        change[(wanted <= 0) | (factor <= 0)] = 0.0
        mean = (mean + change).clamp(min=0.0)
        if bool((change.abs() <= 1e-5 * mean + 1e-10).all()):
            break
    return mean.numpy()


def dispersion_of_lognorm(mean: NDArray[Any], values: NDArray[Any], scale: FloatArray) -> FloatArray:
    """Find the dispersion of each gene under which means and log-normalised values belong together.

    Parameters
    ----------
    mean
        Expected counts (cells, genes).
    values
        Expectations of log1p(count * scale) (cells, genes), however they came about; NaN where not known.
    scale
        Factor of the counts (cells,).

    Returns
    -------
    Inverse dispersion (genes,) with which the sum of the expectations is that of ``values``, from 0.01 to 1e6; NaN for
    a gene of which fewer than :data:`LEAST_KNOWN` values are known.
    """
    import torch

    from spaformer_sc.nn.likelihoods import expected_log1p

    known = np.isfinite(values)
    wanted = np.where(known, values, 0.0).sum(axis=0, dtype=np.float64)
    mu = torch.from_numpy(np.where(known, mean, 0.0).astype(np.float32))
    factor = torch.from_numpy(np.asarray(scale, dtype=np.float32))[:, None]
    low, high = np.full(values.shape[1], np.log(1e-2)), np.full(values.shape[1], np.log(1e6))
    for _ in range(14):
        middle = (low + high) / 2
        theta = torch.from_numpy(np.exp(middle).astype(np.float32)).expand(values.shape)
        found = expected_log1p(mu, factor, dispersion=theta).sum(0, dtype=torch.float64).numpy()
        low, high = np.where(found < wanted, middle, low), np.where(found < wanted, high, middle)
    return np.where(known.sum(axis=0) >= LEAST_KNOWN, np.exp((low + high) / 2), np.nan)


# --- scales of a layer ------------------------------------------------------------------------------------------------


def expected_counts(
    values: NDArray[np.float32],
    output: str,
    target_sum: float,
    depth: FloatArray,
    dispersion: FloatArray | None,
    missing: NDArray[np.bool_] | None = None,
) -> FloatArray:
    """Take imputed values back to expected counts at each cell's own depth.

    Parameters
    ----------
    values
        Imputed expression (cells, genes).
    output, target_sum
        Its scale, as in :func:`spaformer_sc.tl.impute`.
    depth
        Depth over all genes (cells,).
    dispersion
        For ``"lognorm"``: from :func:`dispersion_of_lognorm`, (genes, 2), where measured and where not.
    missing
        Which entries were not measured (cells, genes), or None.

    Returns
    -------
    Expected counts (cells, genes); 0 in cells without counts.
    """
    if output == "counts":
        return values.astype(np.float64)
    if output == "rate":
        return values * (depth[:, None] / target_sum)
    if dispersion is None:
        raise ValueError("log-normalised values lead back to counts only with their dispersion")
    found = np.empty(values.shape)
    for rows in row_blocks(values.shape):
        theta = dispersion[:, 0] if missing is None else np.where(missing[rows], dispersion[:, 1], dispersion[:, 0])
        scale = np.where(depth[rows] > 0, target_sum / np.maximum(depth[rows], 1e-12), 0.0)
        found[rows] = means_of_lognorm(values[rows], scale, theta)
    return found


def standard_deviation(
    mean: FloatArray, shape: FloatArray, output: str, target_sum: float, depth: FloatArray
) -> NDArray[np.float32]:
    r"""Standard deviation of the posterior in the scale of a layer (cells, genes).

    That of the expected count is :math:`m / \sqrt{a}`; it is scaled like the mean, and for ``"lognorm"`` it is that of
    log1p(expected count * target_sum / depth), to first order. NaN in cells without counts.
    """
    sd = mean / np.sqrt(shape)
    if output != "counts":
        scale = target_sum / np.where(depth > 0, depth, np.nan)[:, None]
        sd = sd * scale if output == "rate" else sd * scale / (1 + mean * scale)
    return np.asarray(np.where((depth > 0)[:, None], sd, np.nan), dtype=np.float32)
