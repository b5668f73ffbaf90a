"""Protocols keep what they promise; scores agree with naive loops and scipy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from scipy import sparse, stats

from spaformer_sc import metrics
from spaformer_sc.metrics import _protocols


@pytest.fixture
def counts() -> sparse.csr_matrix:
    rng = np.random.default_rng(5)
    dense = rng.negative_binomial(0.4, 0.3, size=(60, 17)).astype(np.float32)
    dense[7] = 0
    dense[8] = 0
    dense[8, 3] = 4
    dense[:, 11] = 0
    return sparse.csr_matrix(dense)


@pytest.fixture
def prediction(counts: sparse.csr_matrix) -> np.ndarray:
    rng = np.random.default_rng(6)
    rates = rng.gamma(0.5, size=counts.shape)
    rates[rng.random(counts.shape) < 0.3] = 0
    rates[5] = 0
    return rates * rng.gamma(2, size=(counts.shape[0], 1))


@pytest.fixture(params=[False, True], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(_protocols, "_BLOCK_ENTRIES", 17 * 7)


# ---------------------------------------------------------------------------------------------------------- protocols


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint8])
@pytest.mark.parametrize(
    "as_format", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csr_matrix.toarray]
)
def test_thin_splits_exactly(counts: sparse.csr_matrix, dtype: type, as_format: Callable) -> None:
    given = as_format(counts.astype(dtype))
    before = given.copy()
    split = metrics.thin(given, 0.4, random_state=1)
    for part in (split.train, split.held):
        assert isinstance(part, sparse.csr_matrix)
        assert part.dtype == dtype
        assert (part.data > 0).all()
    np.testing.assert_array_equal((split.train + split.held).toarray(), counts.toarray())
    difference = given != before
    assert (difference.nnz if sparse.issparse(difference) else difference.sum()) == 0


def test_thin_is_binomial() -> None:
    values = np.repeat([1, 2, 7], 20000)
    split = metrics.thin(values.reshape(300, 200), 0.3, random_state=0)
    train = split.train.toarray().ravel()
    for size in (1, 2, 7):
        observed = np.bincount(train[values == size], minlength=size + 1)
        expected = stats.binom.pmf(np.arange(size + 1), size, 0.3) * 20000
        assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_thin_follows_its_seed_and_leaves_the_global_one(counts: sparse.csr_matrix) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (metrics.thin(counts, random_state=seed).train.toarray() for seed in (3, 3, 4))
    from_generator = metrics.thin(counts, random_state=np.random.default_rng(3)).train.toarray()
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, from_generator)
    assert (first != other).any()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_thin_adds_up_duplicate_entries() -> None:
    doubled = sparse.csr_matrix((np.array([2.0, 3.0]), np.array([1, 1]), np.array([0, 2])), shape=(1, 3))
    split = metrics.thin(doubled)
    np.testing.assert_array_equal((split.train + split.held).toarray(), [[0, 5, 0]])
    assert doubled.nnz == 2


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.array([[1.0, -1.0]]), ValueError, "negative values"),
        (np.array([[1.0, np.nan]]), ValueError, "NaN"),
        (np.array([[1.0, 0.5]]), ValueError, "not whole numbers"),
        (np.array([1.0, 2.0]), ValueError, "1 dimension"),
        (np.array([[True, False]]), TypeError, "dtype bool"),
    ],
)
@pytest.mark.parametrize("protocol", [metrics.thin, metrics.hide_entries, lambda x: metrics.hide_blocks(x, ["a"])])
def test_protocols_refuse_what_is_not_counts(
    protocol: Callable, bad: np.ndarray, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        protocol(bad)


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_protocols_refuse_a_share_out_of_range(counts: sparse.csr_matrix, share: float) -> None:
    labels = np.arange(60) % 3
    for call in (
        lambda: metrics.thin(counts, share),
        lambda: metrics.hide_entries(counts, share),
        lambda: metrics.hide_blocks(counts, labels, share),
    ):
        with pytest.raises(ValueError, match="between 0 and 1"):
            call()


@pytest.mark.usefixtures("blocks")
def test_hide_entries(counts: sparse.csr_matrix) -> None:
    split = metrics.hide_entries(counts, 0.4, random_state=2, target_sum=100)
    dense = counts.toarray()
    np.testing.assert_array_equal(split.train.toarray(), np.where(split.hidden, 0, dense))
    assert split.train.dtype == counts.dtype
    truth = np.zeros(dense.shape)
    for i, g in zip(*np.nonzero(split.hidden)):
        truth[i, g] = np.log1p(dense[i, g] / dense[i].sum() * 100)
    np.testing.assert_allclose(split.truth.toarray(), truth, rtol=1e-6)
    assert split.truth.dtype == np.float32
    assert not split.hidden[7].any()
    np.testing.assert_array_equal(np.asarray(split.train.sum(axis=1)).ravel() > 0, dense.sum(axis=1) > 0)


def test_hide_entries_hides_the_share_of_zeros_and_of_counts() -> None:
    dense = np.random.default_rng(0).poisson(0.5, size=(400, 100))
    hidden = metrics.hide_entries(dense, 0.3, random_state=1).hidden
    for kind in (dense == 0, dense > 0):
        assert stats.binomtest(int(hidden[kind].sum()), int(kind.sum()), 0.3).pvalue > 1e-4


def test_hide_entries_leaves_alone_cells_that_would_become_empty() -> None:
    dense = np.zeros((500, 4), dtype=int)
    dense[:, 1] = 3
    split = metrics.hide_entries(dense, 0.5, random_state=0)
    np.testing.assert_array_equal(split.train.toarray(), dense)
    untouched = ~split.hidden.any(axis=1)
    assert 200 < untouched.sum() < 400


def test_hide_entries_refuses_a_bad_target_sum(counts: sparse.csr_matrix) -> None:
    with pytest.raises(ValueError, match="target_sum=0"):
        metrics.hide_entries(counts, target_sum=0)


@pytest.mark.parametrize("n_fovs", [2, 3, 5])
def test_hide_blocks(counts: sparse.csr_matrix, n_fovs: int) -> None:
    labels = np.array([f"fov{i % n_fovs}" for i in range(60)])
    split = metrics.hide_blocks(counts, labels, share=0.45, random_state=0)
    dense = counts.toarray()
    assert split.missing.shape == (n_fovs, 17)
    np.testing.assert_array_equal(split.missing.sum(axis=1), round(0.45 * 17))
    assert not split.missing.all(axis=0).any()
    layer = split.layer()
    for i in range(60):
        np.testing.assert_array_equal(layer[i], split.missing[list(split.fovs).index(labels[i])])
    np.testing.assert_array_equal(split.train.toarray(), np.where(layer, 0, dense))
    np.testing.assert_array_equal(split.held.toarray(), np.where(layer, dense, 0))
    assert split.train.dtype == split.held.dtype == counts.dtype
    again = metrics.hide_blocks(counts, labels, share=0.45, random_state=0)
    np.testing.assert_array_equal(split.missing, again.missing)
    assert (split.missing != metrics.hide_blocks(counts, labels, share=0.45, random_state=1).missing).any()


def test_hide_blocks_refuses_what_it_cannot_do(counts: sparse.csr_matrix) -> None:
    labels = np.array([f"fov{i % 3}" for i in range(60)], dtype=object)
    with pytest.raises(ValueError, match="needs at least two"):
        metrics.hide_blocks(counts, ["one"] * 60)
    with pytest.raises(ValueError, match=r"allowed are 1 to 11"):
        metrics.hide_blocks(counts, labels, share=0.7)
    with pytest.raises(ValueError, match="hides 0 of 17"):
        metrics.hide_blocks(counts, labels, share=0.01)
    with pytest.raises(ValueError, match="one label for each of the 60"):
        metrics.hide_blocks(counts, labels[:5])
    labels[[4, 9]] = [None, np.nan]
    with pytest.raises(ValueError, match=r"missing for 2 cell"):
        metrics.hide_blocks(counts, labels)


# ------------------------------------------------------------------------------------------------------------- scores


def naive_means(
    held: np.ndarray, rates: np.ndarray, train: np.ndarray, floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means under the prediction, means under the null and the scored cells, one entry at a time."""
    n_cells, n_genes = held.shape
    scored = [i for i in range(n_cells) if train[i].sum() > 0]
    depth_ratio = held[scored].sum() / train[scored].sum()
    null = [max(train[:, g].sum() / train.sum(), floor) for g in range(n_genes)]
    mean, null_mean = np.zeros(held.shape), np.zeros(held.shape)
    for i in scored:
        share = [max(r / rates[i].sum(), floor) if rates[i].sum() > 0 else floor for r in rates[i]]
        for g in range(n_genes):
            mean[i, g] = share[g] / sum(share) * train[i].sum() * depth_ratio
            null_mean[i, g] = null[g] / sum(null) * train[i].sum() * depth_ratio
    return mean[scored], null_mean[scored], held[scored]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("floor", [1e-8, 1e-3])
@pytest.mark.parametrize("as_format", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_poisson_scores_equal_naive_sums(
    counts: sparse.csr_matrix, prediction: np.ndarray, floor: float, as_format: Callable
) -> None:
    split = metrics.thin(counts, 0.5, random_state=0)
    args = (split.held, as_format(prediction), split.train, floor)
    mean, null_mean, held = naive_means(
        split.held.toarray().astype(float), prediction, split.train.toarray().astype(float), floor
    )
    gain = stats.poisson.logpmf(held, mean) - stats.poisson.logpmf(held, null_mean)
    per_held = held.sum(axis=0)
    assert metrics.poisson_gain(*args) == pytest.approx(gain.sum() / held.sum(), rel=1e-9)
    detected = per_held > 0
    assert 0 < detected.sum() < 17
    per_gene = metrics.poisson_gain_per_gene(*args)
    np.testing.assert_allclose(per_gene[detected], gain.sum(axis=0)[detected] / per_held[detected], rtol=1e-9)
    assert np.isnan(per_gene[~detected]).all()

    def deviance(m: np.ndarray) -> np.ndarray:
        return 2 * (stats.poisson.logpmf(held, np.maximum(held, 1e-300)) - stats.poisson.logpmf(held, m))

    explained = 1 - deviance(mean).sum() / deviance(null_mean).sum()
    assert metrics.deviance_explained(*args) == pytest.approx(explained, rel=1e-9)
    explained_per_gene = metrics.deviance_explained_per_gene(*args)
    expected = 1 - deviance(mean).sum(axis=0)[detected] / deviance(null_mean).sum(axis=0)[detected]
    np.testing.assert_allclose(explained_per_gene[detected], expected, rtol=1e-8)
    assert np.isnan(explained_per_gene[~detected]).all()


def test_poisson_scores_at_their_landmarks(counts: sparse.csr_matrix, prediction: np.ndarray) -> None:
    split = metrics.thin(counts, 0.5, random_state=0)
    gene_mean = np.asarray(split.train.sum(axis=0)) * np.arange(1, 61)[:, None]
    assert metrics.poisson_gain(split.held, gene_mean, split.train) == pytest.approx(0, abs=1e-12)
    assert metrics.deviance_explained(split.held, gene_mean, split.train) == pytest.approx(0, abs=1e-12)
    per_cell = np.random.default_rng(0).gamma(1, size=(60, 1))
    expected = metrics.poisson_gain(split.held, prediction, split.train)
    assert metrics.poisson_gain(split.held, prediction * per_cell, split.train) == pytest.approx(expected, rel=1e-9)

    exact = np.random.default_rng(0).integers(1, 9, size=(30, 6))
    assert metrics.deviance_explained(exact, exact, exact) == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(metrics.deviance_explained_per_gene(exact, exact, exact), 1, rtol=1e-12)
    assert np.isnan(metrics.poisson_gain(np.zeros_like(exact), exact, exact))
    assert np.isnan(metrics.deviance_explained(np.zeros_like(exact), exact, exact))


def test_floor_bounds_the_cost_of_a_zero_rate() -> None:
    train = np.full((1, 2), 50)
    held = np.array([[1, 99]])
    rates = np.array([[0.0, 1.0]])
    shares = np.array([1e-8, 1.0]) / (1 + 1e-8)
    expected = (np.log(shares / 0.5) * held).sum() / 100
    assert metrics.poisson_gain(held, rates, train) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": np.full((3, 4), -1.0)}, "negative"),
        ({"rates": np.full((3, 4), np.nan)}, "NaN"),
        ({"rates": np.ones((3, 5))}, r"`rates` has shape \(3, 5\)"),
        ({"train": np.ones((2, 4))}, r"`train` has shape \(2, 4\)"),
        ({"train": np.zeros((3, 4))}, "`train` holds no counts"),
        ({"held": np.full((3, 4), 0.5)}, "`held` holds values that are not whole"),
        ({"floor": 0.0}, "floor=0.0"),
        ({"floor": 0.5}, "floor=0.5"),
        ({"rates": np.ones(4)}, "1 dimension"),
    ],
)
def test_poisson_scores_refuse_bad_input(change: dict, message: str) -> None:
    arguments = {"held": np.ones((3, 4)), "rates": np.ones((3, 4)), "train": np.ones((3, 4))} | change
    with pytest.raises(ValueError, match=message):
        metrics.poisson_gain(**arguments)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("as_format", [np.asarray, sparse.csc_matrix])
def test_gene_pearson_equals_scipy(counts: sparse.csr_matrix, prediction: np.ndarray, as_format: Callable) -> None:
    prediction = prediction + 1e4
    prediction[:, 2] = 0.1
    mask = np.random.default_rng(1).random(counts.shape) < 0.5
    mask[:, 4] = False
    mask[:, 5] = np.arange(60) == 3
    for given in (None, mask):
        got = metrics.gene_pearson(counts, as_format(prediction), mask=given)
        for g in range(17):
            use = np.ones(60, dtype=bool) if given is None else given[:, g]
            t, p = counts.toarray()[use, g], prediction[use, g]
            if len(t) < 2 or np.ptp(t) == 0 or np.ptp(p) == 0:
                assert np.isnan(got[g])
            else:
                assert got[g] == pytest.approx(stats.pearsonr(t.astype(float), p).statistic, abs=1e-7)
        assert np.isnan(got[[2, 11]]).all()
    assert np.isnan(metrics.gene_pearson(counts, prediction, mask=mask)[[4, 5]]).all()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("nonzero", [False, True])
def test_pooled_scores_equal_numpy(counts: sparse.csr_matrix, prediction: np.ndarray, nonzero: bool) -> None:
    split = metrics.hide_entries(counts, random_state=0)
    use = split.hidden & (split.truth.toarray() > 0) if nonzero else split.hidden
    t, p = split.truth.toarray()[use].astype(float), prediction[use]
    assert 0 < use.sum() < use.size
    options = {"mask": split.hidden, "nonzero": nonzero}
    assert metrics.rmse(split.truth, prediction, **options) == pytest.approx(np.sqrt(np.mean((t - p) ** 2)))
    assert metrics.pearson(split.truth, prediction, **options) == pytest.approx(stats.pearsonr(t, p).statistic)
    expected = t @ p / np.linalg.norm(t) / np.linalg.norm(p)
    assert metrics.cosine(split.truth, prediction, **options) == pytest.approx(expected)
    assert metrics.rmse(split.truth, split.truth, **options) == 0


def test_pooled_scores_without_a_value() -> None:
    truth, constant, nothing = np.array([[1.0, 2.0]]), np.full((1, 2), 0.1), np.zeros((1, 2), dtype=bool)
    assert np.isnan(metrics.pearson(truth, constant))
    assert np.isnan(metrics.cosine(truth, np.zeros((1, 2))))
    for score in (metrics.rmse, metrics.pearson, metrics.cosine):
        assert np.isnan(score(truth, truth, mask=nothing))


def test_scores_ignore_what_is_not_scored_and_refuse_the_rest() -> None:
    truth, mask = np.array([[1.0, 2.0], [3.0, 1.0]]), np.array([[True, False], [True, True]])
    prediction = np.array([[1.0, np.nan], [3.0, 1.0]])
    assert metrics.rmse(truth, prediction, mask=mask) == 0
    assert metrics.gene_pearson(truth, prediction, mask=mask)[0] == pytest.approx(1)
    for score in (metrics.rmse, metrics.pearson, metrics.cosine, metrics.gene_pearson):
        with pytest.raises(ValueError, match="`prediction` holds NaN"):
            score(truth, prediction)
        with pytest.raises(ValueError, match="`mask` has shape"):
            score(truth, prediction, mask=mask[:1])
        with pytest.raises(TypeError, match="`mask` has dtype int64"):
            score(truth, prediction, mask=mask.astype(np.int64))


def test_import_is_light() -> None:
    code = (
        "import sys, spaformer_sc.metrics;"
        "print([m for m in ('torch', 'scanpy', 'squidpy', 'anndata', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_scores_over_measured_entries_are_those_of_a_smaller_panel() -> None:
    rng = np.random.default_rng(12)
    held, train = (rng.poisson(m, (40, 9)).astype(np.float64) for m in (1.0, 2.0))
    rates = rng.gamma(2.0, size=(40, 9))
    measured = np.ones((40, 9), dtype=bool)
    measured[:, 5:] = False
    held[:, 5:] = train[:, 5:] = 0
    for score in (metrics.poisson_gain, metrics.deviance_explained):
        assert score(held, rates, train, measured=measured) == pytest.approx(
            score(held[:, :5], rates[:, :5], train[:, :5]), rel=1e-6
        )
    everywhere = np.ones((40, 9), dtype=bool)
    assert metrics.poisson_gain(held, rates, train, measured=everywhere) == pytest.approx(
        metrics.poisson_gain(held, rates, train)
    )


def test_unmeasured_entries_do_not_matter() -> None:
    rng = np.random.default_rng(13)
    measured = rng.random((40, 9)) < 0.7
    held, train = (rng.poisson(m, (40, 9)) * measured for m in (1.0, 2.0))
    rates = rng.gamma(2.0, size=(40, 9))
    other = np.where(measured, rates, 100.0)
    assert metrics.poisson_gain(held, rates, train, measured=measured) == pytest.approx(
        metrics.poisson_gain(held, other, train, measured=measured)
    )
    share = rates * measured / (rates * measured).sum(1, keepdims=True)
    null = train.sum(0) / (train.sum(1) @ measured)
    null = null * measured / (null * measured).sum(1, keepdims=True)
    depth = train.sum(1) * held.sum() / train.sum()
    expected = sum(
        stats.poisson.logpmf(held[i, g], depth[i] * share[i, g])
        - stats.poisson.logpmf(held[i, g], depth[i] * null[i, g])
        for i in range(40)
        for g in range(9)
        if measured[i, g] and depth[i] > 0
    )
    assert metrics.poisson_gain(held, rates, train, measured=measured) == pytest.approx(expected / held.sum(), rel=1e-5)
    with pytest.raises(ValueError, match="measured"):
        metrics.poisson_gain(held + 1, rates, train, measured=measured)
