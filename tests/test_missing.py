"""Entries that were not measured: what is held out, hidden, put in their place, and said of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import spaformer_sc as sf
from spaformer_sc._config import MASKINGS
from spaformer_sc._threads import Workers
from spaformer_sc.data._split import gene_shares, hold_out_entries, in_blocks, typical_values
from spaformer_sc.nn.decoders import NegativeBinomialDecoder
from spaformer_sc.nn.masking import CORRUPTIONS, MaskingRates, SparseCounts, corrupt, depth
from spaformer_sc.training.mixing import HeldEntries
from spaformer_sc.training.sequences import neighbour_values, sequences, stand_in

FOVS = np.repeat([0, 1, 2], 40)


@pytest.fixture
def counts() -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(0).poisson(1.0, (120, 30)).astype(np.float32))


def single(share: float = 0.3) -> np.ndarray:
    return np.random.default_rng(1).random((120, 30)) < share


def blocks() -> np.ndarray:
    missing = np.zeros((120, 30), bool)
    missing[:40, :10], missing[40:80, 10:20] = True, True
    missing[80:, 29] = True
    return missing


# --- what is held out -------------------------------------------------------------------------------------------------


def test_single_entries_are_held_out_among_the_measured(counts: sp.csr_matrix) -> None:
    missing = single()
    visible = counts.multiply(~missing).tocsr()
    held = hold_out_entries(visible, missing, FOVS, 0.2, np.random.default_rng(0))
    assert not in_blocks(missing, FOVS)
    assert not (held & missing).any()
    assert held.sum() == pytest.approx(0.2 * (~missing).sum(), rel=0.15)
    assert not any(held[fov == FOVS].all(axis=0).any() for fov in range(3))


def test_missing_genes_of_a_field_of_view_are_held_out_as_such(counts: sp.csr_matrix) -> None:
    missing = blocks()
    visible = counts.multiply(~missing).tocsr()
    held = hold_out_entries(visible, missing, FOVS, 0.4, np.random.default_rng(0))
    assert in_blocks(missing, FOVS)
    assert held.any()
    assert not (held & missing).any()
    for fov in range(3):
        inside = held[fov == FOVS]
        np.testing.assert_array_equal(inside.any(axis=0), inside.all(axis=0))
    seen = np.stack([(~(missing | held))[fov == FOVS].any(axis=0) for fov in range(3)])
    assert seen.any(axis=0).all()  # every gene stays measured somewhere
    few = hold_out_entries(visible, missing, FOVS, 0.01, np.random.default_rng(0))
    assert len({(fov, gene) for fov in range(3) for gene in np.flatnonzero(few[fov == FOVS].any(axis=0))}) == 9


def test_genes_that_are_measured_nowhere_are_no_pattern(counts: sp.csr_matrix) -> None:
    missing = single(0.1)
    missing[:, :10] = True
    assert not in_blocks(missing, FOVS)
    assert not in_blocks(missing, np.zeros(120, dtype=np.int64))
    held = hold_out_entries(counts, missing, np.zeros(120, dtype=np.int64), 0.2, np.random.default_rng(0))
    assert held[:, 10:].mean() > 0.1
    assert not held[:, :10].any()


def test_no_cell_loses_its_last_counts(counts: sp.csr_matrix) -> None:
    few = counts.toarray()
    few[:20] = 0
    few[:20, 3] = 1
    held = hold_out_entries(sp.csr_matrix(few), single(0.0), FOVS, 0.5, np.random.default_rng(0))
    left = (few * ~held).sum(axis=1)
    assert (left[few.sum(axis=1) > 0] > 0).all()


def test_typical_values_are_means_over_measured_cells(counts: sp.csr_matrix) -> None:
    missing = single()
    visible = counts.multiply(~missing).tocsr()
    share = gene_shares(visible, missing)
    library = np.asarray(visible.sum(axis=1)).ravel() / (~missing @ share)
    values = np.log1p(visible.toarray() / library[:, None] * 50)
    expected = [values[~missing[:, g], g].mean() for g in range(30)]
    np.testing.assert_allclose(typical_values(visible, missing, share, 50.0), expected, rtol=1e-5)
    values = np.log1p(counts.toarray() / np.maximum(counts.sum(axis=1).A1, 1)[:, None] * 50)
    np.testing.assert_allclose(typical_values(counts, None, share, 50.0), values.mean(axis=0), rtol=1e-5)


# --- what training hides ----------------------------------------------------------------------------------------------


def dense(counts: SparseCounts) -> torch.Tensor:
    return torch.from_numpy(counts.csr().toarray())


def test_each_cell_draws_its_corruption(counts: sp.csr_matrix) -> None:
    share, rates = torch.full((30,), 1 / 30), MaskingRates(features=0.5)
    names = ("thinning", "features")
    found = corrupt(names, SparseCounts.of(counts), None, share, rates, torch.Generator().manual_seed(0))
    full = torch.from_numpy(counts.toarray())
    hidden = ~found.visible
    masked = hidden.any(1)
    assert 0.3 < masked.float().mean() < 0.7
    # Masked cells show all of what is visible, and are asked for the rest; thinned cells are asked for everything.
    torch.testing.assert_close(dense(found.counts)[masked], (full * ~hidden)[masked])
    torch.testing.assert_close(dense(found.target)[masked], full[masked])
    torch.testing.assert_close(found.asked[masked], hidden[masked])
    torch.testing.assert_close((dense(found.counts) + dense(found.target))[~masked], full[~masked])
    assert found.asked[~masked].all()
    torch.testing.assert_close(found.target_depth, depth(found.target.total(), None, share))
    assert found.measured is None


def test_hidden_genes_are_hidden_in_the_whole_field_of_view(counts: sp.csr_matrix) -> None:
    share, rates = torch.full((30,), 1 / 30), MaskingRates(features=0.5)
    kinds = set()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        found = corrupt(("thinning", "genes"), SparseCounts.of(counts), None, share, rates, generator)
        if found.visible is None:
            kinds.add("thinning")
            continue
        kinds.add("genes")
        assert bool((found.visible == found.visible[0]).all())
        assert 5 < int(found.visible[0].sum()) < 25
    assert kinds == {"thinning", "genes"}
    assert set(CORRUPTIONS) == set(MASKINGS)


# --- what stands in their place ---------------------------------------------------------------------------------------


def test_hidden_values_are_typical_in_a_cell_and_around_it() -> None:
    values = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    visible = torch.tensor([[True, False], [False, False], [True, True]])
    typical = torch.tensor([5.0, 7.0])
    torch.testing.assert_close(stand_in(values, visible, typical), torch.tensor([[1.0, 7.0], [5.0, 7.0], [3.0, 0.0]]))
    assert stand_in(values, None, typical) is values
    ring = sp.csr_matrix(np.array([[0, 0.5, 0.5], [1, 0, 0], [0, 0, 0]], dtype=np.float32))
    mean = neighbour_values(sp.csr_matrix((values * visible).numpy()), visible, ring, typical)
    torch.testing.assert_close(mean, torch.tensor([[3.0, 0.0], [1.0, 7.0], [0.0, 0.0]]))


def test_hidden_counts_are_as_dispersed_as_the_prior() -> None:
    share = torch.full((6,), 1 / 6)
    decoder = NegativeBinomialDecoder(3, 8, 6, gene_share=share, posterior=True, target_sum=30.0)
    with torch.no_grad():
        decoder.log_concentration.copy_(torch.arange(6.0))
        decoder.log_dispersion.fill_(9.0)
    visible = torch.ones(4, 6, dtype=torch.bool)
    visible[:, 4:] = False
    latent, counts = torch.zeros(4, 3), torch.zeros(4, 6)
    decoded = decoder(latent, counts, torch.full((4,), 30.0), visible)
    torch.testing.assert_close(decoded.log_dispersion[0], torch.tensor([9.0, 9.0, 9.0, 9.0, 4.0, 5.0]))
    torch.testing.assert_close(
        decoder(latent, counts, torch.full((4,), 30.0), None).log_dispersion, torch.full((6,), 9.0)
    )


# --- what decides -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hidden_tissue():
    tissue = sf.datasets.simulated_tissue(n_fovs=2, n_cells=300, n_genes=150)
    tissue.layers["missing"] = np.random.default_rng(0).random(tissue.shape) < 0.3
    return tissue


@pytest.fixture(scope="module")
def with_hidden(hidden_tissue):
    settings = {"n_networks": 2, "dim": 32, "n_heads": 4, "tokens_per_step": 60}
    model = sf.SpaFormer(library_key="fov", missing="missing", max_epochs=30, progress=False, settings=settings)
    return model.fit(hidden_tissue)


@pytest.fixture
def held_entries(with_hidden, hidden_tissue):
    loaded, _ = with_hidden._read(hidden_tissue, with_hidden.keys)
    held = hold_out_entries(loaded.counts, loaded.missing, loaded.images, 0.2, np.random.default_rng(3))
    train = loaded.counts.multiply(~held).tocsr().astype(np.float32)
    sampler = with_hidden._sampler(torch.device("cpu"))
    fields = sequences(loaded.fields, train, loaded.missing | held)
    with Workers(torch.device("cpu")) as workers:
        yield HeldEntries(fields, sampler, loaded.counts, held, with_hidden._shares, 50.0, workers), held, loaded


def test_values_of_held_entries(held_entries, with_hidden) -> None:
    entries, held, loaded = held_entries
    library = np.asarray(loaded.counts.sum(axis=1)).ravel() / (~loaded.missing @ with_hidden._shares)
    expected = np.log1p(loaded.counts.toarray() / np.maximum(library, 1)[:, None] * 50)[held]
    np.testing.assert_allclose(entries.values, expected, rtol=1e-5)


def test_the_gain_of_gene_means_is_zero_and_a_network_does_better(held_entries, with_hidden) -> None:
    entries, *_ = held_entries
    network = with_hidden._new_network(0, "plain").eval()  # starts at the gene means
    with torch.no_grad():
        network.decoder.logits.weight.zero_()
    assert entries.gain(network) == pytest.approx(0, abs=2e-2)
    assert entries.gain(with_hidden._networks[0]) > 0.05
    predicted = np.stack([entries.predicted(n) for n in (with_hidden._networks[0], network)])
    error = ((predicted - entries.values) ** 2).mean(axis=1)
    assert error[0] < error[1]


def test_weights_of_least_squared_error(held_entries) -> None:
    entries, *_ = held_entries
    rng = np.random.default_rng(0)
    good, bad = (entries.values + rng.normal(0, s, entries.values.size) for s in (0.2, 0.4))
    weights = entries.weights(np.stack([good, bad]))
    np.testing.assert_allclose(weights, [0.8, 0.2], atol=0.03)  # inverse variances
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(entries.weights(np.stack([good, good - 9])), [1, 0], atol=1e-3)


def test_missing_entries_have_weights_of_their_own(with_hidden, hidden_tissue) -> None:
    model, missing = with_hidden, hidden_tissue.layers["missing"]
    before = model._weights, model._concentration
    described = model.parameters()["networks"]
    assert described["weight_where_missing"] == before[0][1].tolist()
    parts = []
    try:
        model._concentration = math.inf  # counts of cells alike are those of the weighted mean
        for number in range(2):
            model._weights = np.eye(2)[[number, number]]
            parts.append(model.impute(hidden_tissue))
        model._weights = np.array([[0.9, 0.1], [0.2, 0.8]])
        mixed = model.impute(hidden_tissue)
    finally:
        model._weights, model._concentration = before
    expected = np.where(missing, 0.2 * parts[0] + 0.8 * parts[1], 0.9 * parts[0] + 0.1 * parts[1])
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    rates = model.impute(hidden_tissue, output="rate", target_sum=7.0)
    np.testing.assert_allclose(rates.sum(axis=1), 7, rtol=1e-5)
    some = model.impute(hidden_tissue, output="rate", target_sum=7.0, genes=["EPCAM", "VIM"])
    columns = hidden_tissue.var_names.get_indexer(["EPCAM", "VIM"])
    np.testing.assert_allclose(some, rates[:, columns], rtol=1e-5)


def test_missing_entries_are_predicted_better_than_by_gene_means(with_hidden, hidden_tissue) -> None:
    missing = hidden_tissue.layers["missing"]
    library = np.asarray(hidden_tissue.X.sum(axis=1))
    truth = np.log1p(hidden_tissue.X.toarray() / np.maximum(library, 1).reshape(-1, 1) * with_hidden.target_sum)
    mean = np.where(missing, 0, truth).sum(axis=0) / (~missing).sum(axis=0)
    error, null = (
        np.sqrt(((p - truth)[missing] ** 2).mean())
        for p in (with_hidden.impute(hidden_tissue), np.broadcast_to(mean, truth.shape))
    )
    assert error < 0.97 * null


def test_genes_missing_in_fields_of_view_choose_masking_of_genes() -> None:
    tissue = sf.datasets.simulated_tissue(n_fovs=3, n_cells=150, n_genes=30)
    missing = np.zeros(tissue.shape, bool)
    missing[np.ix_(tissue.obs["fov"] == tissue.obs["fov"].iloc[0], np.arange(8))] = True
    tissue.layers["missing"] = missing
    settings = {"dim": 16, "n_heads": 4}
    model = sf.SpaFormer(
        library_key="fov", missing="missing", quality="fast", max_epochs=2, progress=False, settings=settings
    ).fit(tissue)
    assert model.settings.masking == ("thinning", "genes")
    assert np.isfinite(model.impute(tissue)).all()


def test_entries_too_few_to_hold_any_out() -> None:
    tissue = sf.datasets.simulated_tissue(2, 30, 4)
    tissue.layers["missing"] = np.zeros(tissue.shape, dtype=bool)
    tissue.layers["missing"][tissue.obs["fov"] == tissue.obs["fov"].iloc[0], 0] = True
    sf.tl.impute(tissue, library_key="fov", missing="missing", quality="fast", max_epochs=2, progress=False)
    assert np.isfinite(tissue.layers["spaformer"]).all()
