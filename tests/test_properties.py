"""Laws that hold for inputs of any kind: of parts, of a fitted model, of a fit, and of what is written.

What is promised, for one machine and one version:

- Storage format, number type, chunks, shift of coordinates, order of fields of view and of genes in the data, names of
  fields of view, and batch mates: a fitted model gives the same to the last bit. So does a whole fit, but for the order
  of fields of view and genes.
- Order of cells within a field of view: the same up to rounding, as sums over cells run in another order.
- Unit and rotation of coordinates: the same as long as the graph is, with encodings that do not depend on them.
- Order of genes in a network: the same up to rounding, with weights permuted in the same way.
- A fit to cells or genes in another order holds out other transcripts and starts from other weights. It gives another
  model, as another `random_state` does, that is no less like the first one than such a model is.
"""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file
from scipy.special import gammaln

pytest.importorskip("hypothesis", reason="needs the extra `test`")
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import spaformer_sc as sf
from spaformer_sc import _checks, metrics
from spaformer_sc.data._fields import GraphConfig, Layout
from spaformer_sc.data._graph import given_graph, spatial_graph
from spaformer_sc.data._split import hold_out, hold_out_entries
from spaformer_sc.data._tiling import tile
from spaformer_sc.nn.gamma_poisson import posterior_share
from spaformer_sc.nn.likelihoods import (
    expected_log1p,
    gaussian_log_prob,
    nb_log_prob,
    poisson_log_prob,
    zinb_log_prob,
)
from spaformer_sc.nn.masking import CORRUPTIONS, WHOLE_FIELD, MaskingRates, SparseCounts, corrupt, thin
from spaformer_sc.training import posterior as posteriors
from spaformer_sc.training.posterior import LEVELS, Posterior
from tests.conftest import contents, plain, seal

settings.register_profile(
    "spaformer_sc",
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("spaformer_sc")
FEW = settings(max_examples=8)

SEEDS = st.integers(0, 2**32 - 1)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def some_counts(seed, n_cells=23, n_genes=9, mean=1.5):
    """Counts (cells, genes) of genes and cells of any size, some without any."""
    rng = np.random.default_rng(seed)
    rates = mean * rng.gamma(0.7, 2.0, (n_cells, 1)) * rng.gamma(0.7, 2.0, (1, n_genes))
    return sp.csr_matrix(rng.poisson(rates).astype(np.float32))


# --- likelihoods ------------------------------------------------------------------------------------------------------

MEANS, DISPERSIONS, LOGITS = st.floats(1e-3, 30), st.floats(0.2, 1e4), st.floats(-20, 20)


@given(MEANS, DISPERSIONS, LOGITS)
def test_probabilities_of_counts_sum_to_one(mean, dispersion, logit):
    x = torch.arange(20_000, dtype=torch.float64)
    mu, theta, pi = (torch.tensor(value, dtype=torch.float64) for value in (mean, dispersion, logit))
    for log_prob in (poisson_log_prob(x, mu), nb_log_prob(x, mu, theta), zinb_log_prob(x, mu, theta, pi)):
        assert log_prob.max() <= 1e-12
        assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-9)


@given(st.floats(-20, 20), st.floats(-3, 3))
def test_the_density_of_values_integrates_to_one(mean, log_scale):
    x = mean + np.exp(log_scale) * torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = gaussian_log_prob(x, torch.tensor(mean), torch.tensor(log_scale, dtype=torch.float64)).exp()
    assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=1e-6)


@given(
    st.sampled_from([0.0, 1.0, 3.0, 1e3, 1e6]),
    st.floats(0, 1e6, width=32),
    st.floats(-4, 8),
    st.floats(-1e3, 1e3, width=32),
)
def test_log_probabilities_and_their_gradients_are_finite(x, mean, log_dispersion, logit):
    count = torch.tensor([x])
    leaves = [torch.tensor([value], requires_grad=True) for value in (mean, 10**log_dispersion, logit)]
    for function, n in ((poisson_log_prob, 1), (nb_log_prob, 2), (zinb_log_prob, 3)):
        value = function(count, *leaves[:n])
        assert value.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(value.sum(), leaves[:n]))


@given(st.floats(1e-6, 1e4), st.floats(1e-3, 1e3), st.floats(0.01, 1e4))
def test_expected_logarithms_lie_below_those_of_the_mean_and_grow_with_it(mean, scale, dispersion):
    means = torch.tensor([[mean, 1.01 * mean]], dtype=torch.float64)
    factor, theta = torch.tensor([[scale]], dtype=torch.float64), torch.tensor([[dispersion]], dtype=torch.float64)
    counted = expected_log1p(means, factor, theta)
    assert 0 < counted[0, 0] < counted[0, 1]
    poisson = expected_log1p(means, factor)
    assert (counted <= poisson * (1 + 1e-6)).all()
    assert (poisson <= torch.log1p(factor * means) * (1 + 1e-6)).all()


# --- thinning and masks -----------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(0.01, 0.99), st.sampled_from([1, 2, 5, 40, 100_000]))
def test_thinned_counts_are_binomial(seed, share, count):
    kept = thin(torch.full((2000,), float(count)), share, generator(seed))
    assert torch.equal(kept, kept.round())
    assert bool(((kept >= 0) & (kept <= count)).all())
    variance = count * share * (1 - share)
    assert abs(float(kept.mean()) - count * share) < 5 * np.sqrt(variance / 2000) + 1e-6 * count
    # The variance of a sample variance is (μ₄ − σ⁴) / n, with μ₄ = σ² (1 + 3 σ² (1 − 2 / count)).
    spread = np.sqrt(max(variance * (1 + (2 - 6 / count) * variance), 1e-9) / 2000)
    assert abs(float(kept.double().var()) - variance) < 6 * spread + 1e-3 * variance


@given(SEEDS, st.sets(st.sampled_from(sorted(CORRUPTIONS)), min_size=1), st.booleans(), st.floats(0, 1))
def test_what_is_shown_and_what_is_asked_for_are_parts_of_what_there_is(seed, names, all_measured, rate):
    matrix = some_counts(seed)
    measured = None
    if not all_measured:
        measured = torch.rand(matrix.shape, generator=generator(seed)) < 0.8
        matrix = sp.csr_matrix(matrix.toarray() * measured.numpy())
    share = torch.full((matrix.shape[1],), 1 / matrix.shape[1])
    view = corrupt(
        sorted(names), SparseCounts.of(matrix), measured, share, MaskingRates(rate, rate, (0.2, 0.8)), generator(seed)
    )
    whole, shown, target = (counts.csr().toarray() for counts in (SparseCounts.of(matrix), view.counts, view.target))
    everywhere = np.ones(matrix.shape, dtype=bool)
    visible, asked, there = (
        everywhere if mask is None else mask.numpy() for mask in (view.visible, view.asked, measured)
    )
    assert not (visible & ~there).any()
    assert not (asked & ~there).any()
    assert ((visible | asked) == there).all()
    assert not shown[~visible].any()
    # An entry is shown whole, or hidden and asked for whole, or its transcripts are divided.
    divided = (visible & asked) & (shown + target == whole)
    assert (divided | (np.where(visible, whole, 0) == shown) & (target == whole)).all()
    assert bool(((view.target_depth >= 0) & view.target_depth.isfinite()).all())
    if view.visible is not None and names <= set(WHOLE_FIELD):
        hidden = ~visible & there
        assert (hidden.any(axis=0) <= (hidden | ~there).all(axis=0)).all()


# --- the posterior with a cell's own counts ---------------------------------------------------------------------------


@given(SEEDS, st.floats(-6, 8), st.integers(0, 200), st.floats(0, 500))
def test_a_posterior_lies_between_prior_and_evidence(seed, log_concentration, count, others):
    """With one visible gene, the ratio of its share to that of a hidden one is not touched by normalisation."""
    assume(count + others > 0)
    logits = torch.randn((1, 6), generator=generator(seed), dtype=torch.float64)
    counts = torch.tensor([[count, 0, 0, 0, 0, 0]], dtype=torch.float64)
    visible = torch.tensor([[True, False, False, False, False, False]])
    depth = torch.tensor([count + others], dtype=torch.float64)
    concentration = torch.full((1, 6), log_concentration, dtype=torch.float64)
    prior = torch.softmax(logits, -1)[0]
    share = posterior_share(logits, concentration, counts, depth, visible)[0]
    assert float(share.sum()) == pytest.approx(1)
    found = float(prior[1] * share[0] / share[1])
    low, high = sorted([float(prior[0]), count / float(depth[0])])
    assert low * (1 - 1e-9) <= found <= high * (1 + 1e-9)


@given(SEEDS, st.integers(0, 5))
def test_a_posterior_grows_with_the_count_and_follows_the_surer_side(seed, gene):
    logits = torch.randn((1, 6), generator=generator(seed), dtype=torch.float64)
    counts = torch.poisson(torch.full((1, 6), 2.0, dtype=torch.float64), generator=generator(seed)) + 1
    more = counts.clone()
    more[0, gene] += 1
    depth = torch.tensor([40.0], dtype=torch.float64)
    zeros = torch.zeros((1, 6), dtype=torch.float64)
    before, after = (posterior_share(logits, zeros, x, depth, None)[0] for x in (counts, more))
    assert after[gene] > before[gene]
    sure, unsure = (posterior_share(logits, zeros + log_k, counts, depth, None) for log_k in (25, -25))
    torch.testing.assert_close(sure, torch.softmax(logits, -1), rtol=1e-6, atol=0)
    torch.testing.assert_close(unsure, counts / counts.sum(), rtol=1e-6, atol=0)


# --- intervals and their levels ---------------------------------------------------------------------------------------


@given(st.floats(1e-4, 300), st.floats(1e-2, 1e4), st.floats(0.01, 0.98), st.floats(0, 1))
def test_wider_intervals_hold_narrower_ones(mean, shape, level, further):
    higher = level + further * (0.999 - level)
    for function in (posteriors.count_interval, posteriors.mean_interval):
        (low, high), (lower, upper) = (function(np.array([mean]), np.array([shape]), x) for x in (level, higher))
        assert 0 <= lower <= low <= high <= upper
    (low, high) = posteriors.count_interval(np.array([mean]), np.array([shape]), level)
    x = np.arange(low[0], high[0] + 1)
    log_prob = gammaln(x + shape) - gammaln(shape) - gammaln(x + 1) - shape * np.log1p(mean / shape)
    mass = np.exp(log_prob + x * np.log(mean / (mean + shape))).sum()
    assert mass >= level - 1e-6


@given(st.floats(1e-4, 300), st.floats(1e-2, 1e4), st.floats(0, 50), st.floats(0, 50))
def test_more_depth_detects_more(mean, shape, capture, further):
    little, much = (float(posteriors.detection(mean, shape, c)) for c in (capture, capture + further))
    assert 0 <= little <= much <= 1


@given(st.lists(st.floats(0, 1), min_size=101, max_size=101), st.floats(0.01, 0.99), st.floats(0, 1))
def test_levels_grow_with_what_is_wanted_and_stay_where_intervals_are_calibrated(coverage, wanted, further):
    uneven = Posterior(coverage=tuple(sorted(coverage)), n_scored=10_000)
    more = wanted + further * (0.99 - wanted)
    assert 0 <= uneven.level_for(wanted) <= uneven.level_for(more) < 1
    assert Posterior(coverage=LEVELS, n_scored=10**9).level_for(wanted) == pytest.approx(wanted, abs=1e-6)
    assert Posterior().level_for(wanted) == wanted


# --- metrics and calibration ------------------------------------------------------------------------------------------


@given(SEEDS)
def test_scores_do_not_depend_on_order_or_on_a_scale_for_each_cell(seed):
    rng = np.random.default_rng(seed)
    counts = some_counts(seed, 30, 7)
    assume(counts.nnz > 5)
    split = metrics.thin(counts, 0.5, seed)
    train, held = split.train, split.held
    assume(train.nnz > 0 < held.nnz)
    rates = rng.gamma(1.0, 1.0, counts.shape)
    cells, genes = rng.permutation(30), rng.permutation(7)
    scaled = rates * rng.gamma(2.0, 1.0, (30, 1))
    for score in (metrics.poisson_gain, metrics.deviance_explained):
        found = score(held, rates, train)
        assert score(held, scaled, train) == pytest.approx(found, rel=1e-9, abs=1e-9)
        assert score(held[cells][:, genes], rates[cells][:, genes], train[cells][:, genes]) == pytest.approx(
            found, rel=1e-9, abs=1e-9
        )
    for score in (metrics.poisson_gain_per_gene, metrics.deviance_explained_per_gene):
        found = score(held, rates, train)
        again = score(held[cells][:, genes], scaled[cells][:, genes], train[cells][:, genes])
        np.testing.assert_allclose(again, found[genes], rtol=1e-9, atol=1e-9)
    assert metrics.deviance_explained(held, rates, train) <= 1
    of_gene = metrics.gene_pearson(held, rates)
    np.testing.assert_allclose(metrics.gene_pearson(held[cells], rates[cells]), of_gene, atol=1e-12)
    assert (abs(of_gene[np.isfinite(of_gene)]) <= 1 + 1e-12).all()


@given(SEEDS, st.floats(0.01, 100), st.floats(-50, 50))
def test_pooled_scores_have_their_bounds_and_invariances(seed, factor, shift):
    rng = np.random.default_rng(seed)
    truth, prediction = rng.normal(size=(2, 11, 5))
    assert abs(metrics.pearson(truth, prediction)) <= 1 + 1e-12
    assert abs(metrics.cosine(truth, prediction)) <= 1 + 1e-12
    assert metrics.pearson(truth, factor * prediction + shift) == pytest.approx(metrics.pearson(truth, prediction))
    assert metrics.cosine(truth, factor * prediction) == pytest.approx(metrics.cosine(truth, prediction))
    assert metrics.rmse(truth, truth + shift) == pytest.approx(abs(shift))
    assert metrics.rmse(truth, prediction) == pytest.approx(metrics.rmse(prediction, truth))


@given(SEEDS)
def test_what_is_calibrated_stays_as_it_is_when_calibrated_again(seed):
    rng = np.random.default_rng(seed)
    counts = some_counts(seed, 60, 8, mean=3.0)
    split = metrics.thin(counts, 0.7, seed)
    assume(split.train.nnz > 20 < split.held.nnz)
    once, weights = metrics.calibrate_rates(rng.gamma(1.0, 1.0, counts.shape), split.train, split.held)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(once.sum(axis=1), 1, rtol=1e-5)
    twice, _ = metrics.calibrate_rates(once, split.train, split.held)
    x = split.held.tocoo()
    likelihoods = [float(x.data @ np.log(shares[x.row, x.col])) / x.data.sum() for shares in (once, twice)]
    assert likelihoods[1] == pytest.approx(likelihoods[0], abs=5e-4)

    hidden = metrics.hide_entries(counts, 0.3, seed)
    assume(hidden.hidden.sum() > 30)
    prediction = hidden.truth.toarray() + rng.normal(size=counts.shape)
    arguments = (hidden.truth, hidden.hidden, hidden.train, hidden.hidden)
    once, coefficients = metrics.calibrate_lognorm(prediction, *arguments)
    assume(abs(coefficients[0]) > 1e-2)
    _, coefficients = metrics.calibrate_lognorm(once, *arguments)
    np.testing.assert_allclose(coefficients, [1, 0, 0], atol=1e-3)


@given(SEEDS, st.integers(1, 4))
def test_a_mixture_is_no_worse_than_its_parts_in_any_order(seed, n_parts):
    rng = np.random.default_rng(seed)
    shares, counts = rng.dirichlet(np.ones(12), n_parts), rng.poisson(2.0, 12).astype(float)
    assume(counts.sum() > 0)
    weights = metrics.mixture_weights(shares, counts)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    best = counts @ np.log(weights @ shares) / counts.sum()
    assert (best >= np.log(shares) @ counts / counts.sum() - 1e-4).all()
    order = rng.permutation(n_parts)
    again = counts @ np.log(metrics.mixture_weights(shares[order], counts) @ shares[order]) / counts.sum()
    assert again == pytest.approx(best, abs=1e-6)


# --- splits -----------------------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(0.01, 0.4), st.floats(0.01, 0.4))
def test_held_out_parts_add_up(seed, validation, test):
    counts = some_counts(seed)
    split = hold_out(counts, validation=validation, test=test, rng=np.random.default_rng(seed))
    parts = (split.train, split.validation, split.test)
    assert (sum(parts) != counts).nnz == 0
    assert all((part.data > 0).all() and (part.data == part.data.round()).all() for part in parts)


@given(SEEDS, st.booleans(), st.floats(0.02, 0.5))
def test_held_out_entries_were_measured_and_leave_no_cell_empty(seed, whole_genes, share):
    rng = np.random.default_rng(seed)
    counts, fovs = some_counts(seed, 24), np.repeat([0, 1, 2], 8)
    missing = rng.random((3, 9))[fovs] < 0.3 if whole_genes else rng.random(counts.shape) < 0.2
    counts = sp.csr_matrix(counts.toarray() * ~missing)
    held = hold_out_entries(counts, missing, fovs, share, rng)
    assert not (held & missing).any()
    left = counts.multiply(~held).sum(axis=1).A1
    assert (left[held.any(axis=1)] > 0).all()


# --- graphs and tiles -------------------------------------------------------------------------------------------------


def turned(points, angle):
    """Points rotated about the origin."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, -s], [s, c]])


GRAPHS = st.sampled_from([{"method": "knn", "n_neighbors": 4}, {"method": "delaunay"}, {"method": "radius"}])


@FEW
@given(SEEDS, GRAPHS, st.integers(2, 40), st.floats(0.1, 1000), st.floats(0, 6.28), st.floats(-1e4, 1e4))
def test_graphs_are_symmetric_and_move_with_the_cells(seed, arguments, n, unit, angle, shift):
    rng = np.random.default_rng(seed)
    points = rng.random((n, 2)) * np.sqrt(n)
    radius = {"radius": 1.3} if arguments["method"] == "radius" else {}
    graph = spatial_graph(points, **arguments, **radius)
    assert (graph != graph.T).nnz == 0
    assert not graph.diagonal().any()
    assert set(np.unique(graph.data)) <= {1.0}
    order = rng.permutation(n)
    in_unit = {name: value * unit for name, value in radius.items()}
    moved = spatial_graph((turned(points, angle) * unit + shift * unit)[order], **arguments, **in_unit)
    assert (moved != graph[order][:, order]).nnz == 0


@FEW
@given(SEEDS, st.integers(1, 5), st.booleans())
def test_no_edge_joins_fields_of_view(seed, n_fovs, own_graph):
    rng = np.random.default_rng(seed)
    codes = np.sort(rng.integers(n_fovs, size=50))
    codes = np.unique(codes, return_inverse=True)[1][rng.permutation(50)].astype(np.int64)
    points = rng.random((50, 2))
    weights = sp.random(50, 50, 0.2, "csr", rng=rng)
    given_ = given_graph(weights, codes) if own_graph else None
    layout = Layout(points, codes, [str(i) for i in range(codes.max() + 1)], GraphConfig(), given_, 2, 4000, None)
    seen = []
    for (field,), _ in layout.fields():
        assert len(set(codes[field.cells])) == 1
        assert field.edge_index.numel() == 0 or int(field.edge_index.max()) < field.n_cells
        assert field.rings[0].shape == (field.n_cells, field.n_cells)
        np.testing.assert_allclose(field.rings[0].sum(axis=1).A1.round(5) % 1, 0)
        if given_ is not None:
            assert field.edge_index.shape[1] == given_[field.cells].nnz
        seen += list(field.cells)
    assert sorted(seen) == list(range(50))


@given(SEEDS, st.integers(1, 400), st.integers(10, 80), st.floats(0, 20), st.booleans())
def test_tiles_hold_each_cell_once(seed, n, tile_size, margin, on_a_grid):
    points = np.random.default_rng(seed).random((n, 2)) * 30
    points = points.round() if on_a_grid else points
    tiles = tile(points, tile_size=tile_size, margin=margin)
    assert sorted(np.concatenate([part.core for part in tiles])) == list(range(n))
    total = np.zeros(n)
    for part in tiles:
        assert np.isin(part.core, part.context).all()
        places = np.unique(points[part.core], axis=0)
        assert part.core.size <= (1.5 * tile_size if len(tiles) == 1 else tile_size) or len(places) == 1
        assert (part.weight >= 0).all()
        total[part.context] += part.weight
    np.testing.assert_allclose(total, 1, rtol=1e-5)


# --- a fitted model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph_reader(shared_tissue):
    """A model with the encodings that rotation and unit do not change; not to be changed."""
    return sf.SpaFormer(
        library_key="fov", quality="fast", max_epochs=2, positional=["laplacian", "random_walk"], progress=False
    ).fit(shared_tissue)


@pytest.fixture(params=["fitted", "graph_reader"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def found(shared_tissue):
    """What models predict of `shared_tissue` as it is, computed once for each."""
    known = {}

    def of(model):
        if id(model) not in known:
            known[id(model)] = model.impute(shared_tissue), model.embed(shared_tissue)
        return known[id(model)]

    return of


FORMATS = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "coo": sp.coo_matrix,
    "csr array": sp.csr_array,
    "dense": lambda x: x.toarray(),
    "fortran": lambda x: np.asfortranarray(x.toarray()),
}


def stored(adata, form, dtype):
    """The same data with counts in another form."""
    changed = adata.copy()
    counts = sp.csr_matrix(adata.X).astype(dtype)
    if form == "coo":
        # Unordered and with duplicates: every transcript an entry of its own.
        coo = counts.tocoo()
        row, col = (np.repeat(index, coo.data.astype(int))[::-1] for index in (coo.row, coo.col))
        counts = sp.csr_matrix((np.ones(len(row), dtype), (row, col)), shape=counts.shape)
    changed.X = counts if form == "coo" else FORMATS[form](counts)
    return changed


@FEW
@given(data=st.data(), seed=SEEDS)
def test_the_form_of_the_data_does_not_change_a_bit(either, found, shared_tissue, data, seed):
    """Storage, number type, order of fields of view and genes, names, place, batch mates, threads and blocks."""
    rng = np.random.default_rng(seed)
    form = data.draw(st.sampled_from(sorted(FORMATS)))
    dtype = data.draw(st.sampled_from(["float32", "float64", "int32", "int64", "uint8", "uint16"]))
    adata = stored(shared_tissue, form, dtype)
    fovs = rng.permutation(3)[: rng.integers(1, 4)]
    cells = np.concatenate([np.arange(60) + 60 * fov for fov in fovs])
    genes = rng.permutation(adata.n_vars)
    names = rng.permutation(["a", "b", "c"])
    adata = adata[cells][:, genes].copy()
    adata.obs["fov"] = np.repeat(names[: len(fovs)], 60)
    adata.obsm["spatial"] = adata.obsm["spatial"] + rng.integers(-(2**12), 2**12, 2)
    n_threads, block = data.draw(st.integers(1, 4)), 64 * data.draw(st.integers(1, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: n_threads)
        expression, latent = either.impute(adata), either.embed(adata)
        np.testing.assert_array_equal(expression, found(either)[0][cells][:, genes])
        np.testing.assert_array_equal(latent, found(either)[1][cells])
        patch.setattr("spaformer_sc.training.prediction.BLOCK", block // 8)
        np.testing.assert_allclose(either.impute(adata), expression, **CLOSE)


@FEW
@given(seed=SEEDS, unit=st.floats(1e-3, 1e3), angle=st.floats(0, 6.28), mirrored=st.booleans())
def test_order_of_cells_unit_and_rotation_do_not_matter(either, found, shared_tissue, seed, unit, angle, mirrored):
    order = np.random.default_rng(seed).permutation(shared_tissue.n_obs)
    adata = shared_tissue[order].copy()
    points = turned(adata.obsm["spatial"], angle) * unit
    adata.obsm["spatial"] = points[:, ::-1].copy() if mirrored else points
    np.testing.assert_allclose(either.impute(adata), found(either)[0][order], **CLOSE)
    np.testing.assert_allclose(either.embed(adata), found(either)[1][order], rtol=1e-3, atol=1e-4)


@FEW
@given(seed=SEEDS)
def test_a_network_with_its_genes_permuted_gives_the_genes_permuted(either, shared_tissue, tmp_path_factory, seed):
    """Weights are permuted in the saved model: along every axis that has one entry for each gene."""
    path, order = tmp_path_factory.mktemp("permuted") / "model", np.random.default_rng(seed).permutation(30)
    either.save(path)
    weights = load_file(path / "weights.safetensors")
    permuted = {}
    for name, tensor in weights.items():
        for axis, size in enumerate(tensor.shape):
            if size == len(order):
                tensor = tensor.index_select(axis, torch.from_numpy(order))
        permuted[name] = tensor.contiguous()
    assert sum(30 in tensor.shape for tensor in permuted.values()) >= 10
    save_file(permuted, path / "weights.safetensors")
    description = json.loads((path / "model.json").read_text())
    seal(path, {**description, "var_names": [description["var_names"][gene] for gene in order]})
    model = sf.SpaFormer.load(path, progress=False)
    assert list(model.var_names) != list(either.var_names)
    np.testing.assert_allclose(model.impute(shared_tissue), either.impute(shared_tissue), **CLOSE)
    np.testing.assert_allclose(model.embed(shared_tissue), either.embed(shared_tissue), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def files(shared_tissue, tmp_path_factory):
    """`shared_tissue` in files of several kinds."""
    folder = tmp_path_factory.mktemp("files")
    for form in ("csr", "csc", "dense"):
        stored(shared_tissue, form, "float32").write_h5ad(folder / f"{form}.h5ad")
    return folder


@FEW
@given(
    form=st.sampled_from(["csr", "csc", "dense", "dask", "sparse dask"]),
    scanned=st.integers(1, 6000),
    rows=st.integers(1, 200),
    columns=st.integers(1, 30),
)
def test_lazy_counts_give_the_same_however_they_are_chunked(
    fitted, found, files, shared_tissue, form, scanned, rows, columns
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_checks, "_SCANNED", scanned)
        if form in ("csr", "csc", "dense"):
            adata = ad.read_h5ad(files / f"{form}.h5ad", backed="r")
            try:
                expression = fitted.impute(adata)
            finally:
                adata.file.close()
        else:
            array = pytest.importorskip("dask.array")
            adata = shared_tissue.copy()
            if form == "dask":
                adata.X = array.from_array(adata.X.toarray(), chunks=(rows, columns))
            else:
                adata.X = array.from_array(adata.X, chunks=(rows, 30), asarray=False)
            expression = fitted.impute(adata)
    np.testing.assert_array_equal(expression, found(fitted)[0])


# --- a whole fit ------------------------------------------------------------------------------------------------------


def fit(adata, **arguments):
    """What a short fit imputes of its own cells."""
    arguments = {"library_key": "fov", "quality": "fast", "max_epochs": 6, "progress": False, **arguments}
    return sf.SpaFormer(**arguments).fit(adata).impute(adata)


@pytest.fixture(scope="module")
def of_a_fit(shared_tissue):
    return fit(shared_tissue)


@settings(max_examples=3)
@given(data=st.data(), seed=SEEDS)
def test_a_fit_does_not_depend_on_the_form_of_the_data(of_a_fit, shared_tissue, data, seed):
    rng = np.random.default_rng(seed)
    form = data.draw(st.sampled_from(sorted(FORMATS)))
    adata = stored(shared_tissue, form, data.draw(st.sampled_from(["float32", "float64", "int64"])))
    adata.obs["fov"] = adata.obs["fov"].cat.rename_categories(["a 1", "b 2", "c 3"]).astype(str)
    adata.obsm["spatial"] = turned(adata.obsm["spatial"], rng.uniform(0, 6)) * 2.5 + rng.normal(size=2) * 1000
    np.testing.assert_array_equal(fit(adata), of_a_fit)


def test_a_fit_to_another_order_is_as_another_seed(of_a_fit, shared_tissue):
    """Median over genes of the correlation of two fits: that of two seeds is the measure."""
    rng = np.random.default_rng(0)
    cells, genes = rng.permutation(shared_tissue.n_obs), rng.permutation(shared_tissue.n_vars)
    back = np.argsort(cells), np.argsort(genes)

    def alike(other):
        return np.median(metrics.gene_pearson(of_a_fit, other))

    seeds = [alike(fit(shared_tissue, random_state=seed)) for seed in (1, 2)]
    orders = [alike(fit(shared_tissue[cells])[back[0]]), alike(fit(shared_tissue[:, genes])[:, back[1]])]
    assert min(orders) > min(seeds) - 0.02


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(shared_tissue):
    """An AnnData with all that the package writes into one."""
    adata = shared_tissue.copy()
    split = metrics.thin(adata.X, 0.7, random_state=0)
    adata.X, adata.layers["held"] = split.train, split.held
    adata.layers["not measured"] = np.zeros(adata.shape, dtype=bool)
    adata.layers["not measured"][:50, 3:6] = True
    adata.X = sp.csr_matrix(adata.X.multiply(~adata.layers["not measured"]))
    sf.pp.tile(adata, library_key="fov", tile_size=50)
    for name in ("laplacian", "fourier"):
        sf.pp.positional_encoding(adata, name, library_key="fov")
    arguments = {"library_key": ["fov"], "quality": "fast", "max_epochs": 1, "progress": False}
    sf.tl.impute(adata, missing="not measured", sd=True, genes=list(adata.var_names[5:15]), **arguments)
    sf.tl.impute(adata, output="rate", key_added="second", **arguments)
    sf.tl.evaluate(adata, "held", prediction="second")
    return adata


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
def test_all_that_is_written_survives_files(written, tmp_path):
    wanted = {place: value for place, value in contents(written).items() if not place.startswith("uns/")}
    adata = written
    for number, form in enumerate(["h5ad", "h5ad", "zarr", "zarr"]):
        path = tmp_path / f"{number}.{form}"
        (adata.write_h5ad if form == "h5ad" else adata.write_zarr)(path)
        adata = (ad.read_h5ad if form == "h5ad" else ad.read_zarr)(path)
        assert {place: value for place, value in contents(adata).items() if not place.startswith("uns/")} == wanted
        np.testing.assert_equal(plain(adata.uns), plain(dict(written.uns)))
    before, after = (sf.tl.interval(x, written.var_names[5:8], level=0.8) for x in (written, adata))
    np.testing.assert_array_equal(after.lower, before.lower)
    np.testing.assert_array_equal(after.upper, before.upper)
