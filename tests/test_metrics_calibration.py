"""Splits with a validation part, calibration, the noise ceiling, and scores of the benchmark: planted truths."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, sparse

from spaformer_sc import metrics


@pytest.fixture(scope="module")
def rates() -> np.ndarray:
    """True shares of 40 genes in 600 cells of three kinds."""
    rng = np.random.default_rng(0)
    programs = rng.gamma(0.6, size=(3, 40)) + 0.02
    kind = rng.integers(3, size=600)
    return (programs / programs.sum(axis=1, keepdims=True))[kind]


@pytest.fixture(scope="module")
def counts(rates: np.ndarray) -> sparse.csr_matrix:
    rng = np.random.default_rng(1)
    x = rng.poisson(rates * rng.gamma(5, 12, size=(600, 1))).astype(np.float32)
    x[7] = 0
    return sparse.csr_matrix(x)


LABELS = np.repeat(["a", "b", "c"], 200)


@pytest.mark.parametrize("protocol", ["thinning", "entries", "blocks"])
def test_splits_add_up_and_repeat(counts: sparse.csr_matrix, protocol: str) -> None:
    split = metrics.make_split(counts, protocol, LABELS, random_state=3)
    assert (split.train + split.validation + split.test != counts).nnz == 0
    again = metrics.make_split(counts, protocol, LABELS, random_state=3)
    other = metrics.make_split(counts, protocol, LABELS, random_state=4)
    assert (split.test != again.test).nnz == 0
    assert (split.validation != again.validation).nnz == 0
    assert (split.test != other.test).nnz > 0


def test_shares_of_the_parts_under_thinning(counts: sparse.csr_matrix) -> None:
    split = metrics.make_split(counts, "thinning", random_state=0)
    total = counts.sum()
    for part, share in ((split.train, 0.5), (split.validation, 0.05), (split.test, 0.45)):
        assert part.sum() / total == pytest.approx(share, abs=0.012)
    assert split.missing is None
    assert split.output == "rate"
    assert (split.train != metrics.thin(counts, 0.5, random_state=0).train).nnz == 0


def test_hidden_entries_are_for_the_test_or_for_validation(counts: sparse.csr_matrix) -> None:
    split = metrics.make_split(counts, "entries", random_state=0)
    assert split.test_mask.mean() == pytest.approx(0.3, abs=0.01)
    assert split.validation_mask.mean() == pytest.approx(0.03, abs=0.005)
    assert not (split.test_mask & split.validation_mask).any()
    np.testing.assert_array_equal(split.missing, split.test_mask | split.validation_mask)
    x = counts.toarray()
    np.testing.assert_array_equal(split.test.toarray(), np.where(split.test_mask, x, 0))
    np.testing.assert_array_equal(split.train.toarray(), np.where(split.missing, 0, x))
    library = np.maximum(x.sum(axis=1, keepdims=True), 1)
    truth = np.where(split.missing, np.log1p(x / library * 250), 0)
    np.testing.assert_allclose(split.truth().toarray(), truth, rtol=1e-6)


def test_hidden_blocks_are_whole_genes_of_a_field_of_view(counts: sparse.csr_matrix) -> None:
    split = metrics.make_split(counts, "blocks", LABELS, random_state=0)
    for fov in "abc":
        cells = fov == LABELS
        for mask, n_genes in ((split.test_mask, 11), (split.validation_mask, 1)):
            assert (mask[cells] == mask[cells][0]).all()
            assert mask[cells][0].sum() == n_genes
    assert not (split.test_mask & split.validation_mask).any()
    assert not split.missing.all(axis=0).any()


def test_split_refuses(counts: sparse.csr_matrix) -> None:
    with pytest.raises(ValueError, match="thinning, entries, blocks"):
        metrics.make_split(counts, "holes")
    with pytest.raises(ValueError, match="field of view of each cell"):
        metrics.make_split(counts, "blocks")
    with pytest.raises(ValueError, match="at least two"):
        metrics.make_split(counts[:, :3], "blocks", LABELS)


def test_quarters_cut_at_the_median() -> None:
    xy = np.array([[0.0, 0, 9], [1, 5, 9], [5, 0, 9], [6, 6, 9]])
    assert metrics.quarters(xy).tolist() == [0, 2, 1, 3]


def test_weights_of_the_mixture_are_the_best_there_are(counts: sparse.csr_matrix, rates: np.ndarray) -> None:
    split = metrics.make_split(counts, "thinning", random_state=0)
    rng = np.random.default_rng(2)
    method = 0.6 * rates + 0.4 * rng.dirichlet(np.full(40, 0.3), size=600)
    calibrated, weights = metrics.calibrate_rates(method * rng.gamma(1, size=(600, 1)), split.train, split.validation)

    y, x = split.train.toarray(), split.validation.toarray()
    mean = y.sum(axis=0) / y.sum()
    library = y.sum(axis=1, keepdims=True)
    own = np.where(library > 0, y / np.maximum(library, 1), mean)
    parts = np.stack([method, np.broadcast_to(mean, y.shape), own])

    def loss(free: np.ndarray) -> float:
        return -float((x * np.log(np.tensordot([free[0], free[1], 1 - free.sum()], parts, 1) + 1e-300)).sum())

    best = optimize.minimize(
        loss,
        [0.4, 0.3],
        bounds=[(0, 1)] * 2,
        constraints={"type": "ineq", "fun": lambda free: 1 - free.sum()},
        method="SLSQP",
    )
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert loss(weights[:2]) == pytest.approx(best.fun, rel=1e-5)
    np.testing.assert_allclose(weights[:2], best.x, atol=0.01)
    np.testing.assert_allclose(calibrated, np.tensordot(weights, parts, 1), atol=1e-6)


def test_calibration_leaves_the_truth_alone_and_drops_nonsense(counts: sparse.csr_matrix, rates: np.ndarray) -> None:
    split = metrics.make_split(counts, "thinning", random_state=0)
    _, weights = metrics.calibrate_rates(rates, split.train, split.validation)
    assert weights[0] > 0.9
    nonsense = np.random.default_rng(0).dirichlet(np.full(40, 0.1), size=600)
    calibrated, weights = metrics.calibrate_rates(nonsense, split.train, split.validation)
    assert weights[0] < 0.1
    assert metrics.poisson_gain(split.test, nonsense, split.train) < 0
    assert metrics.poisson_gain(split.test, calibrated, split.train) > 0


def test_calibrated_rates_of_empty_cells_are_the_gene_mean(counts: sparse.csr_matrix, rates: np.ndarray) -> None:
    split = metrics.make_split(counts, "thinning", random_state=0)
    given = rates.copy()
    given[7] = 0
    calibrated, _ = metrics.calibrate_rates(given, split.train, split.validation)
    mean = np.asarray(split.train.sum(axis=0)).ravel() / split.train.sum()
    np.testing.assert_allclose(calibrated[7], mean, atol=1e-6)
    with pytest.raises(ValueError, match="negative"):
        metrics.calibrate_rates(-rates, split.train, split.validation)


def test_lognorm_calibration_finds_the_planted_line(counts: sparse.csr_matrix) -> None:
    split = metrics.make_split(counts, "entries", random_state=0)
    prediction = np.random.default_rng(0).normal(size=counts.shape).astype(np.float32)
    nothing, means = metrics.calibrate_lognorm(
        np.zeros_like(prediction), split.truth(), split.validation_mask, split.train, split.missing
    )
    assert means[0] == 0
    m = (nothing[0] - means[2]) / means[1]  # the means of the genes
    planted = 0.7 * prediction + 0.5 * m - 0.2
    calibrated, line = metrics.calibrate_lognorm(prediction, planted, split.validation_mask, split.train, split.missing)
    np.testing.assert_allclose(line, [0.7, 0.5, -0.2], atol=1e-4)
    np.testing.assert_allclose(calibrated, planted, atol=1e-4)


def test_lognorm_calibration_is_least_squares_on_validation_entries_only(counts: sparse.csr_matrix) -> None:
    split = metrics.make_split(counts, "entries", random_state=0)
    truth = split.truth()
    prediction = (3 * truth.toarray() + 5).astype(np.float32)
    prediction[split.test_mask] = np.random.default_rng(0).normal(size=split.test_mask.sum())
    calibrated, line = metrics.calibrate_lognorm(prediction, truth, split.validation_mask, split.train, split.missing)
    np.testing.assert_allclose(line, [1 / 3, 0, -5 / 3], atol=1e-5)
    np.testing.assert_allclose(calibrated[split.validation_mask], truth.toarray()[split.validation_mask], atol=1e-4)
    with pytest.raises(ValueError, match="nothing to fit"):
        metrics.calibrate_lognorm(prediction, truth, np.zeros_like(split.missing), split.train, split.missing)


def test_visible_means_are_those_of_the_whole_where_depth_is_known(rates: np.ndarray) -> None:
    """All cells alike and deep: the mean over visible entries is the log-normalised rate."""
    x = np.round(np.broadcast_to(rates[:1] * 10_000, rates.shape))
    split = metrics.make_split(x, "entries", random_state=0)
    nothing, (_, slope, intercept) = metrics.calibrate_lognorm(
        np.zeros(x.shape, np.float32), split.truth(), split.validation_mask, split.train, split.missing
    )
    assert slope == pytest.approx(1, abs=1e-3)
    assert intercept == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(nothing, np.log1p(x / x.sum(axis=1, keepdims=True) * 250), atol=2e-3)


def test_noise_ceiling_is_what_the_true_rates_score() -> None:
    """Cells of one depth, so that the log-normalised rates are the best prediction there is."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(12, 3.0), size=20_000)
    counts = rng.poisson(shares * 200)
    split = metrics.make_split(counts, "thinning", random_state=0)
    ceiling = metrics.noise_ceiling(split.train, split.test)
    scores = metrics.gene_pearson_lognorm(split.test, shares)
    assert scores.min() > 0.4
    assert (scores < 0.95).all()
    np.testing.assert_allclose(ceiling, scores, atol=0.02)


def test_noise_ceiling_of_genes_that_do_not_vary_is_near_zero() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(np.full((20_000, 5), 4.0))
    counts[:, 4] = 0
    split = metrics.make_split(counts, "thinning", random_state=0)
    ceiling = metrics.noise_ceiling(split.train, split.test)
    # Shares of four genes repel each other, but not so the two parts of the counts.
    assert (ceiling[:4] < 0.2).all()
    assert np.isnan(ceiling[4])
    with pytest.raises(ValueError, match="nothing to correlate"):
        metrics.noise_ceiling(np.zeros((4, 2)), np.eye(4, 2))


def test_scales_are_converted() -> None:
    rates = np.array([[1.0, 3.0], [0, 0]])
    lognorm = metrics.convert(rates, "counts", "lognorm")
    np.testing.assert_allclose(lognorm, np.log1p([[62.5, 187.5], [0, 0]]), rtol=1e-6)
    np.testing.assert_allclose(metrics.convert(lognorm, "lognorm", "rate"), rates * 62.5, rtol=1e-5)
    assert metrics.convert(np.array([[-1.0, 2.0]]), "lognorm", "rate")[0, 0] == 0
    assert metrics.convert(np.array([[-1.0, 2.0]]), "lognorm", "lognorm")[0, 0] == -1
    with pytest.raises(ValueError, match="negative values"):
        metrics.convert(np.array([[-1.0, 2.0]]), "counts", "rate")
    with pytest.raises(ValueError, match="NaN"):
        metrics.convert(np.array([[np.nan, 2.0]]), "rate", "rate")
    with pytest.raises(ValueError, match="rate, counts, lognorm"):
        metrics.convert(rates, "log", "rate")


def test_scores_under_thinning_are_those_of_the_test_part(counts: sparse.csr_matrix, rates: np.ndarray) -> None:
    split = metrics.make_split(counts, "thinning", random_state=0)
    found = metrics.score_prediction(split, rates, "rate")
    assert found["gain"] == pytest.approx(metrics.poisson_gain(split.test, rates, split.train), rel=1e-5)
    assert found["gain_calibrated"] == pytest.approx(found["gain"], abs=0.01)
    assert found["gene_pearson"] == pytest.approx(
        np.nanmedian(metrics.gene_pearson_lognorm(split.test, rates)), abs=1e-5
    )
    mean = np.broadcast_to(np.asarray(split.train.sum(axis=0)), rates.shape)
    null = metrics.score_prediction(split, mean, "counts")
    assert null["gain"] == pytest.approx(0, abs=1e-5)
    assert null["gene_pearson"] == 0
    assert null["gain_calibrated"] > 0.05


@pytest.mark.parametrize("protocol", ["entries", "blocks"])
def test_scores_of_hidden_entries_equal_brute_force(
    counts: sparse.csr_matrix, rates: np.ndarray, protocol: str
) -> None:
    split = metrics.make_split(counts, protocol, LABELS, random_state=0)
    found = metrics.score_prediction(split, rates, "rate")
    x = counts.toarray()
    truth = np.log1p(x / np.maximum(x.sum(axis=1, keepdims=True), 1) * 250)
    prediction = np.log1p(rates * 250)
    mask = split.test_mask
    t, p = truth[mask], prediction[mask]
    assert found["rmse"] == pytest.approx(np.sqrt(((t - p) ** 2).mean()), rel=1e-4)
    assert found["rmse_nonzero"] == pytest.approx(np.sqrt(((t - p)[t > 0] ** 2).mean()), rel=1e-4)
    assert found["pearson"] == pytest.approx(np.corrcoef(t, p)[0, 1], rel=1e-4)
    assert found["cosine"] == pytest.approx(t @ p / np.linalg.norm(t) / np.linalg.norm(p), rel=1e-4)
    genes = [g for g in range(40) if truth[mask[:, g], g].any()]
    each = [np.corrcoef(truth[mask[:, g], g], prediction[mask[:, g], g])[0, 1] for g in genes]
    assert found["gene_pearson"] == pytest.approx(np.median(np.nan_to_num(each)), abs=1e-4)
    if protocol == "entries":  # three blocks are too few to calibrate on
        assert found["rmse_calibrated"] < found["rmse"]

    constant = metrics.score_prediction(split, np.ones_like(rates), "lognorm")
    assert constant["gene_pearson"] == 0
    assert np.isnan(constant["pearson"])
    with pytest.raises(ValueError, match="must agree"):
        metrics.score_prediction(split, rates[:5], "rate")
