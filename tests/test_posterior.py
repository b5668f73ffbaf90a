"""Intervals, draws and zeros: what is known of entries beyond their mean, against brute force and known truth."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

import spaformer_sc as sf
from spaformer_sc import metrics
from spaformer_sc.training.posterior import (
    LEVELS,
    STRATA,
    Posterior,
    count_interval,
    detection,
    dispersion_of_lognorm,
    expected_counts,
    fit_shape,
    fit_shape_where_missing,
    mean_interval,
    means_of_lognorm,
    measure_coverage,
    ranks,
    standard_deviation,
)
from tests.conftest import contents

MEANS = (0.003, 0.1, 0.7, 2.0, 9.0, 60.0)
SHAPES = (0.05, 0.6, 3.0, 40.0, 1e6)


def probabilities(mean: float, shape: float) -> np.ndarray:
    """Probability of every count that can occur."""
    counts = np.arange(int(mean + 60 * np.sqrt(mean + mean**2 / shape)) + 50)
    return stats.nbinom(shape, shape / (shape + mean)).pmf(counts)


# --- intervals and ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.05, 0.5, 0.8, 0.95, 0.999])
def test_the_interval_is_the_shortest_that_holds_the_level(level: float) -> None:
    for mean in MEANS:
        for shape in SHAPES:
            p = probabilities(mean, shape)
            total = np.concatenate([[0], np.cumsum(p)])
            (lower,), (upper,) = count_interval(np.array([mean]), np.array([shape]), level)
            assert total[upper + 1] - total[lower] >= level - 1e-9
            width = upper - lower
            shorter = total[width:] - total[: len(total) - width]
            assert width == 0 or shorter.max() < level + 1e-9


def test_ranks_are_the_probability_of_what_is_likelier() -> None:
    for mean in MEANS:
        for shape in SHAPES:
            p = probabilities(mean, shape)[:40]
            everything = probabilities(mean, shape)
            wanted = [everything[everything > value * (1 + 1e-9)].sum() for value in p]
            np.testing.assert_allclose(ranks(np.arange(len(p)), mean, shape, None), wanted, atol=1e-6)


def test_ranks_in_heavy_tails() -> None:
    counts, mean, shape = np.array([0, 3, 4000, 90000]), np.array([5.0, 400.0, 5.0, 2e4]), np.full(4, 1e-3)
    wanted = stats.nbinom(shape, shape / (shape + mean)).cdf(counts - 1)
    np.testing.assert_allclose(ranks(counts, mean, shape, None), wanted, rtol=1e-6)
    far = ranks(np.array([0, 5000]), np.full(2, 1000.0), np.full(2, 200.0), None)
    np.testing.assert_allclose(far, 1, atol=1e-9)


def test_randomised_ranks_of_counts_as_predicted_are_uniform() -> None:
    rng = np.random.default_rng(0)
    mean, shape = rng.lognormal(-1, 1.5, 20000), rng.lognormal(0, 1, 20000)
    counts = rng.poisson(rng.gamma(shape, mean / shape))
    found = ranks(counts, mean, shape, rng)
    assert stats.kstest(found, "uniform").pvalue > 0.01
    lower, upper = count_interval(mean, shape, 0.8)
    inside = (counts >= lower) & (counts <= upper)
    assert ((ranks(counts, mean, shape, None) < 0.8) == inside).mean() > 0.999
    wrong = ranks(counts, mean, np.full_like(mean, 1e6), rng)
    assert stats.kstest(wrong, "uniform").pvalue < 1e-6


def test_intervals_of_rates_have_equal_tails() -> None:
    mean, shape = np.array([0.2, 3.0, 50.0]), np.array([0.5, 4.0, 300.0])
    low, high = mean_interval(mean, shape, 0.9)
    gamma = stats.gamma(shape, scale=mean / shape)
    np.testing.assert_allclose(gamma.cdf(low), 0.05, rtol=1e-6)
    np.testing.assert_allclose(gamma.sf(high), 0.05, rtol=1e-6)


def test_detection_is_one_less_the_probability_of_zero() -> None:
    mean, shape = np.array([0.01, 0.5, 4.0]), np.array([0.2, 2.0, 1e6])
    for capture in (0.3, 1.0, 5.0):
        p = stats.nbinom(shape, shape / (shape + capture * mean)).pmf(0)
        np.testing.assert_allclose(detection(mean, shape, capture), 1 - p, rtol=1e-6)


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    """Shares with a posterior that is known: gamma around predicted ones, seen as counts."""
    rng = np.random.default_rng(0)
    n, g = 3000, 60
    predicted = rng.gamma(1.0, 1.0, (n, g)) + 0.02
    predicted /= predicted.sum(axis=1, keepdims=True)
    depth = rng.lognormal(5, 0.5, n)
    prior = predicted * depth[:, None]
    shape = np.exp(0.3) * prior**0.6
    rate = rng.gamma(shape, prior / shape)
    counts, held, test = (sp.csr_matrix(rng.poisson(rate * part).astype(np.float32)) for part in (1.0, 0.1, 0.1))
    after = (shape + counts.toarray()) / (shape / prior + 1)
    return rate, counts, held, test, after, shape, depth


def test_the_shape_is_found_again(drawn) -> None:
    _, counts, held, _, after, shape, depth = drawn
    found = Posterior(*fit_shape((after / depth[:, None]).astype(np.float32), depth, counts, held))
    ratio = found.shape(after, counts.toarray()) / (shape + counts.toarray())
    assert np.exp(np.abs(np.log(np.quantile(ratio, [0.1, 0.5, 0.9])))).max() < 1.5
    assert 0.6 < np.exp(found.log_own) < 1.5


def test_calibrated_intervals_cover_what_was_not_used(drawn) -> None:
    rate, counts, held, test, after, _, depth = drawn
    rates = (after / depth[:, None]).astype(np.float32)
    rng = np.random.default_rng(1)
    posterior = Posterior(*fit_shape(rates, depth, counts, held))
    posterior = measure_coverage(posterior, rates, depth, counts, test, None, rng)
    assert posterior.n_scored == counts.shape[0] * counts.shape[1]
    assert list(posterior.strata) == list(STRATA)
    np.testing.assert_allclose(posterior.coverage, LEVELS, atol=0.01)
    again = rng.poisson(rate)
    a = posterior.shape(after, counts.toarray())
    for level in (0.5, 0.8, 0.95):
        wanted = posterior.level_for(level)
        assert abs((ranks(again, after, a, rng) <= wanted).mean() - level) < 0.015
        lower, upper = count_interval(after, a, wanted)
        assert ((again >= lower) & (again <= upper)).mean() > level - 0.01
        low, high = mean_interval(after, a, level)
        assert abs(((rate >= low) & (rate <= high)).mean() - level) < 0.03


def test_wrong_means_show_in_the_coverage_and_are_corrected(drawn) -> None:
    _, counts, held, test, after, _, depth = drawn
    rates = (after / depth[:, None]).astype(np.float32)
    rng = np.random.default_rng(1)
    wrong = Posterior(log_level=12.0, slope=0.0, log_own=-12.0)
    wrong = measure_coverage(wrong, rates * 3, depth, counts, test, None, rng)
    assert abs(wrong.coverage[80] - 0.8) > 0.02
    ratio = held.sum() / counts.sum()
    mean = 3 * after * ratio
    covered = ranks(held.toarray(), mean, np.full(mean.shape, 1e5), rng) <= wrong.level_for(0.8)
    assert abs(covered.mean() - 0.8) < 0.01


def test_entries_that_are_not_measured_have_a_shape_of_their_own() -> None:
    rng = np.random.default_rng(0)
    mean = rng.lognormal(-0.5, 1.0, 60000)
    shape = np.exp(-0.5) * mean**0.3
    held = rng.poisson(rng.gamma(shape, mean / shape)).astype(float)
    level, slope = fit_shape_where_missing(mean, held)
    assert (level, slope) == (pytest.approx(-0.5, abs=0.1), pytest.approx(0.3, abs=0.1))
    found = Posterior(missing=(level, slope)).shape(mean, held, np.ones(len(mean), dtype=bool))
    np.testing.assert_allclose(found, shape, rtol=0.2)


def test_too_few_counts_leave_what_is_typical() -> None:
    nothing = sp.csr_matrix((5, 4), dtype=np.float32)
    few = sp.csr_matrix(np.ones((5, 4), dtype=np.float32))
    rates, depth = np.full((5, 4), 0.25, np.float32), np.full(5, 4.0)
    assert fit_shape(rates, depth, few, nothing) == (0.7, 0.4, 0.0)
    assert fit_shape(rates, depth, few, few) == (0.7, 0.4, 0.0)
    assert fit_shape_where_missing(np.ones(3), np.ones(3)) is None
    posterior = measure_coverage(Posterior(), rates, depth, few, nothing, None, np.random.default_rng(0))
    assert posterior.n_scored == 0
    assert posterior.level_for(0.8) == 0.8


def test_to_a_dictionary_and_back() -> None:
    given = Posterior(1.0, 0.5, -0.2, (0.3, 0.4), LEVELS[::-1], {"rare genes": LEVELS}, 7)
    assert Posterior.from_dict(given.to_dict()) == given
    with pytest.raises(ValueError, match="101 numbers are needed"):
        Posterior.from_dict(given.to_dict() | {"coverage": [0.0, 1.0]})


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispersion", [0.2, 2.0, 1e6])
def test_log_normalised_values_lead_back_to_counts(dispersion: float) -> None:
    import torch

    from spaformer_sc.nn.likelihoods import expected_log1p

    rng = np.random.default_rng(0)
    mean = rng.lognormal(-1, 2, (30, 8))
    mean[0] = 0
    scale = rng.lognormal(0, 1, 30)
    theta = torch.full(mean.shape, dispersion, dtype=torch.float64)
    values = expected_log1p(torch.from_numpy(mean), torch.from_numpy(scale)[:, None], dispersion=theta).numpy()
    found = means_of_lognorm(values.astype(np.float32), scale, np.full(8, dispersion))
    np.testing.assert_allclose(found, mean, rtol=1e-3, atol=1e-9)
    gene = dispersion_of_lognorm(mean, values, scale)
    if dispersion < 100:
        np.testing.assert_allclose(gene, dispersion, rtol=0.02)
    else:
        assert (gene > 100).all()


def test_every_scale_leads_to_the_same_counts() -> None:
    rng = np.random.default_rng(0)
    counts, depth = rng.gamma(1, 1, (10, 5)).astype(np.float32), rng.lognormal(4, 1, 10)
    rate = (counts / depth[:, None] * 100).astype(np.float32)
    np.testing.assert_allclose(expected_counts(rate, "rate", 100.0, depth, None), counts, rtol=1e-5)
    np.testing.assert_allclose(expected_counts(counts, "counts", 100.0, depth, None), counts)
    with pytest.raises(ValueError, match="only with their dispersion"):
        expected_counts(rate, "lognorm", 100.0, depth, None)


def test_standard_deviations_are_those_of_draws() -> None:
    rng = np.random.default_rng(0)
    mean, shape, depth = np.array([[3.0, 40.0]]), np.array([[30.0, 200.0]]), np.array([80.0])
    draws = rng.gamma(shape, mean / shape, (20000, 2))
    scaled = {"counts": draws, "rate": draws / 80 * 100, "lognorm": np.log1p(draws / 80 * 100)}
    for output, values in scaled.items():
        found = standard_deviation(mean, shape, output, 100.0, depth)
        np.testing.assert_allclose(found[0], values.std(axis=0), rtol=0.03)
    assert np.isnan(standard_deviation(mean, shape, "rate", 100.0, np.zeros(1))).all()


# --- of a result ------------------------------------------------------------------------------------------------------

QUICK = {"library_key": "fov", "quality": "fast", "max_epochs": 20, "progress": False}


@pytest.fixture(scope="module")
def halves():
    """A tissue imputed from half its counts in each scale, and the other half."""
    tissue = sf.datasets.simulated_tissue(n_fovs=2, n_cells=250, n_genes=60)
    split = metrics.thin(tissue.X, 0.5, random_state=0)
    tissue.X = split.train
    for output in ("lognorm", "counts", "rate"):
        sf.tl.impute(tissue, output=output, key_added=output, **QUICK)
    return tissue, split.held.toarray()


@pytest.mark.parametrize("output", ["lognorm", "counts", "rate"])
def test_new_counts_lie_in_their_intervals(halves, output: str) -> None:
    tissue, held = halves
    before = contents(tissue)
    for level in (0.5, 0.8, 0.95):
        found = sf.tl.interval(tissue, level=level, key_added=output)
        assert found.lower.shape == found.upper.shape == tissue.shape
        assert (found.lower.dtype, found.level, found.genes) == (np.int32, level, list(tissue.var_names))
        assert ((held >= found.lower) & (held <= found.upper)).mean() > level - 0.02
    wide, narrow = (sf.tl.interval(tissue, "EPCAM", level, key_added=output) for level in (0.99, 0.5))
    assert (wide.upper >= narrow.upper).all()
    assert (wide.upper > narrow.upper).any()
    assert contents(tissue) == before


def test_the_scale_of_the_layer_does_not_matter(halves) -> None:
    tissue, _ = halves
    by_scale = [sf.tl.interval(tissue, ["EPCAM", "VIM"], 0.9, of="rate", key_added=o) for o in ("lognorm", "counts")]
    np.testing.assert_allclose(by_scale[0].upper, by_scale[1].upper, rtol=0.05, atol=1e-3)


def test_draws_have_the_mean_and_spread_of_the_posterior(halves) -> None:
    tissue, _ = halves
    draws = sf.tl.sample(tissue, ["EPCAM", "VIM"], 600, key_added="rate")
    assert (draws.shape, draws.dtype) == ((600, tissue.n_obs, 2), np.float32)
    columns = tissue.var_names.get_indexer(["EPCAM", "VIM"])
    empty = tissue.obs["rate_depth"].to_numpy() == 0
    assert np.isnan(draws[:, empty]).all()
    mean = draws[:, ~empty].mean(axis=0)
    np.testing.assert_allclose(mean.mean(axis=0), tissue.layers["rate"][~empty][:, columns].mean(axis=0), rtol=0.02)
    limits = sf.tl.interval(tissue, ["EPCAM", "VIM"], 0.8, of="rate", key_added="rate")
    with np.errstate(invalid="ignore"):
        inside = (draws >= limits.lower) & (draws <= limits.upper)
    assert inside[:, ~empty].mean() == pytest.approx(0.8, abs=0.01)
    counts = sf.tl.sample(tissue, "EPCAM", 600, of="count", key_added="rate")
    assert (counts == np.round(counts)).all()
    assert (counts[:, empty] == 0).all()
    chance = sf.tl.detection(tissue, "EPCAM", key_added="rate")
    assert abs((counts > 0).mean(axis=0) - chance).max() < 0.1
    np.testing.assert_array_equal(draws, sf.tl.sample(tissue, ["EPCAM", "VIM"], 600, key_added="rate"))


def test_deeper_measurements_detect_more(halves) -> None:
    tissue, _ = halves
    chances = [sf.tl.detection(tissue, capture=capture, key_added="counts") for capture in (0.5, 1.0, 10.0)]
    deep = tissue.obs["counts_depth"].to_numpy() > 0
    assert all((b[deep] > a[deep]).all() for a, b in pairwise(chances))
    assert (chances[2][~deep] == 0).all()


def test_confident_zeros_stay_zero(halves) -> None:
    tissue, held = halves
    kept = sf.tl.impute(tissue, output="counts", zeros="keep", sd=True, copy=True, **QUICK)
    layer, everything = kept.layers["spaformer"], tissue.layers["counts"]
    chance = sf.tl.detection(tissue, key_added="counts")
    observed = tissue.X.toarray()
    np.testing.assert_array_equal((layer == 0) & (everything > 0), (observed == 0) & (chance < 0.05) & (everything > 0))
    changed = (layer == 0) & (everything > 0)
    assert 0.05 < changed.mean() < 0.95
    assert (held[changed] > 0).mean() < 0.05
    np.testing.assert_array_equal(layer[~changed], everything[~changed])
    assert kept.layers["spaformer_sd"].dtype == np.float32
    with pytest.raises(ValueError, match="zeros='keep'"):
        sf.tl.interval(kept)


def test_what_was_not_measured_has_intervals_too() -> None:
    tissue = sf.datasets.simulated_tissue(n_fovs=3, n_cells=150, n_genes=40)
    everything = tissue.X.toarray()
    missing = np.random.default_rng(0).random(tissue.shape) < 0.3
    tissue.layers["missing"] = missing
    sf.tl.impute(tissue, missing="missing", sd=True, **QUICK)
    found = sf.tl.interval(tissue, level=0.9)
    inside = (everything >= found.lower) & (everything <= found.upper)
    assert inside[missing].mean() > 0.87
    assert np.isfinite(tissue.layers["spaformer_sd"][tissue.obs["spaformer_depth"] > 0]).all()
    part = tissue[:100, ["VIM", "EPCAM"]].copy()
    np.testing.assert_array_equal(sf.tl.interval(part, "VIM").upper, sf.tl.interval(tissue, "VIM").upper[:100])


def test_files_and_parts_of_a_result(halves, tmp_path) -> None:
    import anndata

    tissue, _ = halves
    wanted = sf.tl.interval(tissue, "VIM", key_added="lognorm")
    for path in (tmp_path / "a.h5ad", tmp_path / "a.zarr"):
        sf.tl._impute.write_atomically(tissue, path)
        read = anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)
        np.testing.assert_array_equal(sf.tl.interval(read, "VIM", key_added="lognorm").upper, wanted.upper)
    part = tissue[50:80, ["EPCAM", "VIM"]]
    np.testing.assert_array_equal(sf.tl.interval(part, "VIM", key_added="lognorm").upper, wanted.upper[50:80])


def test_some_genes_read_back_from_a_file(shared_tissue, tmp_path) -> None:
    import anndata

    result = sf.tl.impute(shared_tissue, genes=["VIM", "EPCAM"], copy=True, **QUICK)
    sf.tl._impute.write_atomically(result, tmp_path / "a.h5ad")
    read = anndata.read_h5ad(tmp_path / "a.h5ad")
    names = [name for name in result.var_names if name in ("VIM", "EPCAM")]
    found = sf.tl.interval(read)
    assert found.genes == names
    np.testing.assert_array_equal(found.upper, sf.tl.interval(result).upper)
    assert sf.tl.interval(read[:, ["VIM"]]).genes == ["VIM"]


def test_few_entries_that_are_not_measured_and_a_sparse_layer_of_them() -> None:
    tissue = sf.datasets.simulated_tissue(n_fovs=2, n_cells=200, n_genes=30)
    missing = np.zeros(tissue.shape, dtype=bool)
    missing[[3, 250], 5] = True
    tissue.layers["missing"] = sp.csr_matrix(missing)
    for output in ("lognorm", "counts"):
        sf.tl.impute(tissue, missing="missing", output=output, key_added=output, sd=True, **QUICK)
    means = [sf._result.known_of(tissue, None, key).mean[[3, 250], 5] for key in ("lognorm", "counts")]
    np.testing.assert_allclose(means[0], means[1], rtol=0.15)
    assert np.isfinite(tissue.var[["lognorm_dispersion", "lognorm_dispersion_missing"]]).all(axis=None)
    tissue.layers["again"] = tissue.X
    sf.tl.evaluate(tissue, "again", prediction="lognorm")


def test_large_counts_and_levels_close_to_one() -> None:
    lower, upper = count_interval(np.array([1.0, 50.0, 1000.0]), np.full(3, 5.0), 1 - 1e-9)
    assert (upper > 5 * np.array([1, 50, 1000])).all()
    assert (lower <= np.array([0, 1, 100])).all()
    known = Posterior(n_scored=1000)
    assert 0.9999 < known.level_for(0.9999) < 1
    assert known.level_for(0.9) == pytest.approx(0.9 * 1001 / 1000)


def test_more_draws_than_memory_are_refused(halves, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spaformer_sc.tl._uncertainty.available_memory", lambda: 10_000)
    with pytest.raises(ValueError, match="name fewer `genes`"):
        sf.tl.sample(halves[0], key_added="lognorm")


def test_some_genes_only(shared_tissue) -> None:
    result = sf.tl.impute(shared_tissue, genes=["VIM"], sd=True, copy=True, **QUICK)
    assert sf.tl.interval(result).genes == ["VIM"]
    assert np.isnan(result.layers["spaformer_sd"][:, result.var_names != "VIM"]).all()
    with pytest.raises(ValueError, match="EPCAM were not imputed"):
        sf.tl.interval(result, "EPCAM")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"level": 1.0}, ValueError, "`level=1.0` must lie between 0 and 1"),
        ({"level": "high"}, TypeError, "`level='high'`"),
        ({"of": "counts"}, ValueError, "`of='counts'`"),
        ({"genes": ["nonsense"]}, KeyError, "nonsense"),
        ({"key_added": "nothing"}, KeyError, "no such result"),
    ],
)
def test_bad_arguments(halves, arguments, error, match) -> None:
    with pytest.raises(error, match=match):
        sf.tl.interval(halves[0], **{"key_added": "lognorm"} | arguments)


def test_bad_arguments_of_the_others(halves) -> None:
    with pytest.raises(ValueError, match="`n=0`"):
        sf.tl.sample(halves[0], "VIM", 0, key_added="lognorm")
    with pytest.raises(ValueError, match="`capture=-1`"):
        sf.tl.detection(halves[0], "VIM", capture=-1, key_added="lognorm")


def test_counts_that_were_normalised_since(halves) -> None:
    changed = halves[0].copy()
    changed.X = changed.X.multiply(1 / 3).tocsr()
    with pytest.raises(ValueError, match="no longer holds the counts"):
        sf.tl.interval(changed, "VIM", key_added="lognorm")


def test_no_intervals_without_a_distribution(shared_tissue) -> None:
    result = sf.tl.impute(shared_tissue, decoder="gaussian", copy=True, **QUICK)
    assert result.uns["spaformer"]["posterior"] is None
    with pytest.raises(ValueError, match="knows no distribution of counts"):
        sf.tl.interval(result, "VIM")
