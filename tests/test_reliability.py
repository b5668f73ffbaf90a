"""Which genes can be believed: scores, their standard errors, and the verdict."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import spaformer_sc as sf
from spaformer_sc import metrics
from spaformer_sc.data._split import gene_shares
from spaformer_sc.training.reliability import (
    LEVELS,
    N_GROUPS,
    depth_exponents,
    deviance_share,
    empirical_bayes,
    jackknife,
    neighbour_rates,
    overall_gain,
    pearson,
    reliability,
    sums_of,
    undecided,
)

N, G = 1500, 60


@pytest.fixture(scope="module")
def drawn():
    """Counts of two types of cells: half of the genes differ between them, half vary at random, and depth varies."""
    rng = np.random.default_rng(0)
    kind = rng.random(N) < 0.4
    rate = np.ones((N, G))
    rate[:, : G // 2] = np.where(kind[:, None], rng.lognormal(0, 1, G // 2), rng.lognormal(0, 1, G // 2))
    rate[:, : G // 2] *= G // 2 / rate[:, : G // 2].sum(1, keepdims=True)  # the types do not show in the others' shares
    share = rate / rate.sum(1, keepdims=True)
    own = share * rng.gamma(4, 1 / 4, (N, G)) ** (np.arange(G) >= G // 2)  # known to nobody but the gene's own counts
    counts = rng.poisson(own * rng.lognormal(5, 0.5, N)[:, None])
    return share, sp.csr_matrix(counts.astype(np.float32))


def groups(rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(N) % N_GROUPS


@pytest.mark.parametrize("hidden", [False, True])
def test_sums_give_the_scores_of_metrics(drawn, hidden: bool) -> None:
    share, counts = drawn
    rng = np.random.default_rng(1)
    measured = rng.random((N, G)) < 0.7 if hidden else None
    seen = counts if measured is None else counts.multiply(measured).tocsr()
    split = metrics.thin(seen, 0.9, random_state=0)
    rates = (share * rng.lognormal(0, 0.5, (N, G))).astype(np.float32)
    sums = sums_of(split.held, rates, split.train, measured, groups(rng))[0].total()
    given = split.held, rates, split.train
    np.testing.assert_allclose(
        deviance_share(sums), metrics.deviance_explained_per_gene(*given, measured=measured), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        sums["gain"].sum() / sums["held"].sum(), metrics.poisson_gain(*given, measured=measured), rtol=1e-5
    )
    np.testing.assert_allclose(
        pearson(sums), metrics.gene_pearson_lognorm(split.held, rates, measured=measured), rtol=1e-3, atol=1e-4
    )


def test_exponents_of_depth() -> None:
    rng = np.random.default_rng(0)
    depth = rng.lognormal(5, 0.8, 4000)
    wanted = np.array([0.0, 0.5, 1.0, 1.5])
    counts = rng.poisson(5 * (depth[:, None] / depth.mean()) ** wanted)
    np.testing.assert_allclose(depth_exponents(sp.csr_matrix(counts), depth), wanted, atol=0.08)


def test_the_jackknife_of_a_mean_is_its_standard_error(drawn) -> None:
    share, counts = drawn
    split = metrics.thin(counts, 0.9, random_state=0)
    sums, _ = sums_of(split.held, share.astype(np.float32), split.train, None, groups(np.random.default_rng(0)))
    found = jackknife(sums, lambda total: total["held"] / total["cells"])
    x = split.held.toarray()[split.held.sum(axis=1).A1 > 0]
    assert np.median(found / (x.std(axis=0) / np.sqrt(len(x)))) == pytest.approx(1, abs=0.15)


def test_correlation_with_the_truth_is_free_of_noise() -> None:
    rng = np.random.default_rng(0)
    truth = rng.lognormal(0, 0.6, (4000, 40))
    truth /= truth.sum(1, keepdims=True)
    guess = truth * rng.lognormal(0, 0.5, truth.shape)
    guess /= guess.sum(1, keepdims=True)
    split = metrics.thin(sp.csr_matrix(rng.poisson(truth * 80).astype(np.float32)), 0.9, random_state=0)
    judged, _, _, _ = reliability(split.held, guess.astype(np.float32), split.train, None, rng)
    expected = metrics.gene_pearson(truth, guess)
    difference = judged["true_correlation"] - expected
    assert abs(difference.mean()) < 0.04
    assert difference.std() == pytest.approx(judged["true_correlation_se"].median(), rel=0.5)
    raw = metrics.gene_pearson_lognorm(split.held, guess.astype(np.float32))
    assert np.median(raw) < 0.6 * np.median(expected)


def test_planted_genes_are_reliable_and_those_with_counts_of_their_own_alone_are_not(drawn) -> None:
    share, counts = drawn
    split = metrics.thin(counts, 0.8, random_state=0)
    variance = np.where(np.arange(G) < G // 2, 0, 1 / 4)
    depth = split.train.sum(axis=1).A1[:, None]
    # As a good model would: the truth for genes that types of cells explain, the cell's own count for the others.
    rates = share * (1 + variance * split.train.toarray()) / (1 + variance * depth * share)
    judged, _, gain, error = reliability(
        split.held, rates.astype(np.float32), split.train, None, np.random.default_rng(0)
    )
    assert list(judged["reliability"].cat.categories) == list(LEVELS)
    strong = share.max(axis=0) > 3 * share.min(axis=0)
    assert 5 < strong.sum() < G // 2
    assert (judged["reliability"][strong] == "reliable").mean() > 0.8
    assert (judged["reliability"][G // 2 :] == "reliable").mean() <= 0.05
    assert (judged["reliability"][G // 2 :] == LEVELS[0]).mean() >= 0.8
    assert gain > 10 * error > 0
    mean = np.tile(counts.sum(axis=0).A1 / counts.sum(), (N, 1)).astype(np.float32)
    judged, _, gain, error = reliability(split.held, mean, split.train, None, np.random.default_rng(0))
    assert (judged["reliability"] == LEVELS[0]).mean() > 0.9
    assert gain < 2 * error
    whole = sums_of(split.held, mean, split.train, None, np.zeros(N, int))[0].total()
    assert float(overall_gain(whole)) == pytest.approx(gain)


def test_own_counts_are_read_whatever_the_distribution_of_the_gene() -> None:
    rng = np.random.default_rng(0)
    depth = rng.lognormal(5, 0.5, 4000)
    level, shape = np.array([0.01, 0.03, 0.01]), 2.0
    relative = np.stack([rng.gamma(shape, 1 / shape, 4000), rng.choice([0.1, 1.9], 4000), np.ones(4000)], axis=1)
    expected = depth[:, None] * level
    counts = sp.csr_matrix(rng.poisson(relative * expected).astype(np.float32))
    group, of_zeros, of_counts = empirical_bayes(counts, depth, level, np.ones(3), None)
    y = counts.toarray()
    found = of_zeros[group]
    found[counts.nonzero()] = of_counts[counts.nonzero()].A1
    gamma = (shape + y[:, 0]) / (shape + expected[:, 0])
    high, low = (np.exp(y[:, 1] * np.log(r) - r * expected[:, 1]) for r in (1.9, 0.1))
    two = (1.9 * high + 0.1 * low) / (high + low)
    for gene, wanted in enumerate((gamma, two, np.ones(4000))):
        assert np.abs(found[:, gene] - wanted).mean() < 0.06
    assert np.corrcoef(found[:, 1], two)[0, 1] > 0.99
    assert np.mean((found[:, 1] - relative[:, 1]) ** 2) < 0.9 * np.mean((gamma.mean() - relative[:, 1]) ** 2)


def test_genes_of_very_many_counts() -> None:
    rng = np.random.default_rng(0)
    mean = np.array([3.0, 1000.0, 20000.0])
    counts = sp.csr_matrix(rng.poisson(rng.lognormal(0, 0.5, (400, 1)) * mean).astype(np.float32))
    depth = counts.sum(axis=1).A1.astype(float)
    group, of_zeros, of_counts = empirical_bayes(counts, depth, mean / depth.mean(), np.ones(3), None)
    assert np.isfinite(of_zeros).all()
    assert np.isfinite(of_counts.data).all()
    relative = counts.toarray() / (depth[:, None] * mean / depth.mean())
    assert np.median(np.abs(of_counts.toarray()[:, 1:] / relative[:, 1:] - 1)) < 0.1
    assert len(of_zeros) == group.max() + 1


def test_a_gene_with_two_states_and_nothing_else_is_not_reliable() -> None:
    rng = np.random.default_rng(0)
    relative = rng.choice([0.1, 1.9], (4000, 10))
    share = np.full(10, 0.05) * relative
    rest = rng.dirichlet(np.ones(30), 4000) * (1 - share.sum(axis=1, keepdims=True))
    depth = rng.lognormal(6, 0.3, 4000)
    counts = rng.poisson(np.hstack([share, rest]) * depth[:, None]).astype(np.float32)
    split = metrics.thin(sp.csr_matrix(counts), 0.9, random_state=0)
    y, e = split.train.toarray()[:, :10], 0.05 * split.train.sum(axis=1).A1[:, None]
    # The best that can be said of a gene from its own count, which is no straight line.
    high, low = (np.exp(y * np.log(r) - r * e) for r in (1.9, 0.1))
    rates = np.hstack(
        [0.05 * (1.9 * high + 0.1 * low) / (high + low), np.tile(counts[:, 10:].mean(0) / 1000, (4000, 1))]
    )
    judged, _, _, _ = reliability(split.held, rates.astype(np.float32), split.train, None, rng)
    assert (judged["reliability"][:10] == LEVELS[0]).mean() >= 0.8


@pytest.mark.parametrize(("depth", "spread"), [(40, 0.25), (100, 0.4)])
def test_shallow_cells_do_not_look_more_alike(depth: int, spread: float) -> None:
    rng = np.random.default_rng(0)
    truth, other = (rng.lognormal(0, spread, (4000, 40)) for _ in range(2))
    guess = truth * other
    truth, guess = (value / value.sum(1, keepdims=True) for value in (truth, guess))
    split = metrics.thin(sp.csr_matrix(rng.poisson(truth * depth).astype(np.float32)), 0.9, random_state=0)
    judged, _, _, _ = reliability(split.held, guess.astype(np.float32), split.train, None, rng)
    expected = np.median(metrics.gene_pearson(truth, guess))
    assert judged["true_correlation"].median() == pytest.approx(expected, abs=0.12)


def test_other_panels_do_not_look_like_a_gain() -> None:
    rng = np.random.default_rng(0)
    mean = rng.gamma(1, 1, G)
    counts = rng.poisson(np.outer(rng.lognormal(4, 0.4, N), mean / mean.sum())).astype(np.float32)
    measured = np.ones((N, G), dtype=bool)
    measured[N // 2 :, : G // 3] = False
    split = metrics.thin(sp.csr_matrix(counts * measured), 0.9, random_state=0)
    share = gene_shares(split.train, ~measured)
    judged, _, gain, error = reliability(split.held, np.tile(share, (N, 1)), split.train, ~measured, rng)
    assert (judged["reliability"] == "reliable").sum() == 0
    assert (judged["reliability"] == LEVELS[0]).mean() > 0.9
    assert gain < 2 * error


def test_too_few_cells_say_nothing(drawn) -> None:
    share, counts = drawn
    split = metrics.thin(counts[:15], 0.9, random_state=0)
    judged, _, _, error = reliability(
        split.held, share[:15].astype(np.float32), split.train, None, np.random.default_rng(0)
    )
    assert (judged["reliability"] == LEVELS[0]).all()
    assert np.isnan(error)


def test_neighbours_tell_of_a_cell(shared_tissue) -> None:
    model = sf.SpaFormer(library_key="fov", quality="fast", max_epochs=1, progress=False)
    loaded = model._take(model._open(shared_tissue, model.keys))
    split = metrics.thin(loaded.counts, 0.8, random_state=0)
    share = (np.asarray(split.train.sum(axis=0)).ravel() + 0.5).astype(np.float32)
    share /= share.sum()
    rates = neighbour_rates(loaded.fields, split.train, split.held, None, share)
    np.testing.assert_allclose(np.median(rates.sum(axis=1)), 1, rtol=0.2)
    assert (rates > 0).all()
    test = sp.csr_matrix(np.random.default_rng(0).poisson(shared_tissue.layers["true_rate"] * 20).astype(np.float32))
    assert metrics.poisson_gain(test, rates, split.train) > 0.05


def test_random_counts_are_said_to_be_no_better(caplog) -> None:
    rng = np.random.default_rng(0)
    tissue = sf.datasets.simulated_tissue(n_fovs=2, n_cells=150, n_genes=40)
    tissue.X = sp.csr_matrix(rng.poisson(np.outer(rng.lognormal(0, 0.3, 300), rng.gamma(1, 1, 40))).astype(np.float32))
    with caplog.at_level(logging.WARNING, logger="spaformer_sc"):
        sf.tl.impute(tissue, library_key="fov", quality="fast", max_epochs=20, progress=False)
    assert "not shown to be better than" in caplog.text
    assert (tissue.var["spaformer_reliability"] == "reliable").mean() <= 0.05
    assert tissue.uns["spaformer"]["scores"]["better_than_baseline"] is False


def test_the_verdict_survives_files(tmp_path, shared_tissue) -> None:
    model = sf.SpaFormer(library_key="fov", quality="fast", max_epochs=1, progress=False).fit(shared_tissue)
    model.save(tmp_path / "model")
    pd.testing.assert_frame_equal(sf.SpaFormer.load(tmp_path / "model").gene_scores, model.gene_scores)
    assert isinstance(model.gene_scores["reliability"].dtype, pd.CategoricalDtype)


def test_too_few_transcripts_to_tell_from_no_gain() -> None:
    scores = pd.DataFrame(
        {
            "gain_over_baseline": [0.0, 0.0, -0.2, -0.2, np.nan, 0.3, 0.02, np.nan],
            "gain_over_baseline_se": [0.02, 0.04, 0.01, 0.01, np.nan, 0.01, 0.01, np.nan],
            "held_out": [1000, 1000, 10, 9, 0, 500, 5000, 50],
            "reliability": pd.Categorical(np.take(LEVELS, [0, 0, 0, 0, 0, 2, 1, 0]), LEVELS, ordered=True),
        }
    )
    assert undecided(scores).tolist() == [False, True, False, True, True, False, False, True]


def test_with_more_transcripts_a_verdict_of_no_gain_is_a_finding(drawn) -> None:
    _, counts = drawn
    found = []
    for kept in (0.5, 0.999):
        split = metrics.thin(counts, kept, random_state=1)
        mean = np.tile(counts.sum(axis=0).A1 / counts.sum(), (N, 1)).astype(np.float32)
        judged, _, _, _ = reliability(split.held, mean, split.train, None, np.random.default_rng(0))
        judged["held_out"] = split.held.sum(axis=0).A1
        found.append(undecided(judged).mean())
    assert found[0] < 0.2
    assert found[1] > 0.8
