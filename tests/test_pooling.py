"""Counts of cells alike as evidence on what networks say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import spaformer_sc as sf
from spaformer_sc._config import resolve
from spaformer_sc.training.mixing import HeldCounts
from spaformer_sc.training.pooling import CONCENTRATIONS, Evidence, cells_alike, correction, fit_concentration, ratio
from spaformer_sc.training.prediction import Said
from spaformer_sc.training.sequences import sequences


@pytest.mark.parametrize("dimensions", [2, 20])
def test_cells_alike_are_the_nearest_others(dimensions) -> None:
    points = np.random.default_rng(0).normal(size=(50, dimensions))
    found = cells_alike(points, 7)
    distance = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1)[:, :7]
    for row in range(50):
        assert set(found[row].indices) == set(nearest[row])
    assert set(found.data) == {1.0}
    some = np.array([40, 3, 17])
    assert (cells_alike(points, 7, some) != found[some]).nnz == 0


def test_a_cell_is_never_its_own_neighbour() -> None:
    in_one_place = cells_alike(np.zeros((30, 2)), 4)
    assert (np.diff(in_one_place.indptr) == 4).all()
    assert not in_one_place.diagonal().any()
    assert (cells_alike(np.zeros((3, 2)), 60).toarray() == 1 - np.eye(3)).all()
    assert cells_alike(np.zeros((1, 2)), 60).shape == (1, 1)
    assert cells_alike(np.zeros((1, 2)), 60).nnz == 0


@pytest.mark.parametrize("hidden", [False, True])
def test_evidence_is_what_was_counted_and_expected_in_cells_alike(fitted, shared_tissue, workers, hidden) -> None:
    loaded, _ = fitted._read(shared_tissue, fitted.keys)
    missing = np.random.default_rng(0).random(loaded.counts.shape) < 0.3 if hidden else None
    counts = loaded.counts.toarray() if missing is None else loaded.counts.toarray() * ~missing
    field = sequences(loaded.fields, sp.csr_matrix(counts), missing)[1]
    whole = fitted._sampler(torch.device("cpu")).open(field)
    found = Evidence.of(Said(fitted._networks, whole, workers), fitted._weights[0], 5)
    counted, predicted = found.there(slice(0, len(found.share)))
    with torch.inference_mode():
        outputs = [network(whole.tokens()) for network in fitted._networks]
        shares = [network.decoder.share(o.decoded).numpy() for network, o in zip(fitted._networks, outputs)]
    share = sum(weight * part for weight, part in zip(fitted._weights[0], shares))
    np.testing.assert_allclose(found.share, share, rtol=1e-4, atol=1e-8)
    own, seen = counts[field.fov.cells], np.ones(share.shape, bool) if missing is None else ~missing[field.fov.cells]
    expected = share * seen
    expected *= (own.sum(axis=1) / expected.sum(axis=1))[:, None]
    near = cells_alike(outputs[0].latent.numpy(), 5).toarray() + cells_alike(field.fov.positions, 5).toarray()
    np.testing.assert_allclose(counted, near @ own, rtol=1e-5)
    np.testing.assert_allclose(predicted, near @ expected, rtol=1e-3, atol=1e-6)
    assert counted.sum() == pytest.approx(predicted.sum(), rel=1e-4)
    np.testing.assert_allclose(ratio(counted, predicted, 20.0), (near @ own + 20) / (near @ expected + 20), rtol=1e-3)
    for some, every in zip(found.there(slice(3, 9)), (counted, predicted), strict=True):
        assert (some == every[3:9]).all()
    some = Evidence.of(Said(fitted._networks, whole, workers), fitted._weights[0], 5, np.arange(4, 60, 3))
    assert (some.there(slice(2, 10))[1] == predicted[10:34:3]).all()


@pytest.mark.parametrize("decoder", ["poisson", "nb", "zinb"])
def test_corrected_shares_are_shares(decoder, workers) -> None:
    tissue = sf.datasets.simulated_tissue(n_fovs=1, n_cells=60, n_genes=20)
    model = sf.SpaFormer(decoder=decoder, max_epochs=1, settings={"n_networks": 1, "n_pooled": 0}, progress=False)
    loaded, _ = model.fit(tissue)._read(tissue, model.keys)
    (network,) = model._networks
    whole = model._sampler(torch.device("cpu")).open(sequences(loaded.fields, loaded.counts, None)[0])
    said, of_field = Said([network], whole, workers), (np.ones(1), 5)
    with torch.inference_mode():
        output = network(whole.tokens())
        before = network.decoder.share(output.decoded).numpy()
        changed = correction(said, *of_field, 20.0)(slice(0, 60))(network, output)
        after = network.decoder.share(changed.decoded).numpy()
        some = correction(said, *of_field, 20.0, np.arange(60))(slice(0, 60))(network, output)
    expected = before * ratio(*Evidence.of(said, *of_field).there(slice(0, 60)), 20.0)
    np.testing.assert_allclose(after, expected / expected.sum(axis=1, keepdims=True), rtol=1e-5)
    assert abs(after - before).max() > 1e-3
    assert (network.decoder.share(output.decoded).numpy() == before).all()
    assert (some.decoded.expression == changed.decoded.expression).all()
    assert changed.latent is output.latent
    assert correction(said, *of_field, math.inf)(slice(0, 60))(network, output) is output


def two_kinds(strength: float, seed: int = 0):
    """Cells of two kinds, left and right, of which a network that is not trained knows nothing."""
    rng = np.random.default_rng(seed)
    tissue = sf.datasets.simulated_tissue(n_fovs=1, n_cells=400, n_genes=40)
    right = tissue.obsm["spatial"][:, 0] > np.median(tissue.obsm["spatial"][:, 0])
    tilt = rng.normal(size=40) * strength
    rate = np.exp(np.where(right[:, None], tilt, -tilt))
    rate *= 40 / rate.sum(axis=1, keepdims=True)
    tissue.X = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    return tissue, sp.csr_matrix(rng.poisson(rate).astype(np.float32))


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_what_is_held_out_says_how_much_cells_alike_count(strength, workers, monkeypatch) -> None:
    monkeypatch.setattr("spaformer_sc.training.pooling.BLOCK", 64)
    tissue, more = two_kinds(strength)
    model = sf.SpaFormer(max_epochs=1, settings={"n_networks": 1, "learning_rate": 1e-9, "mixing": False}).fit(tissue)
    loaded, _ = model._read(tissue, model.keys)
    sampler = model._sampler(torch.device("cpu"))
    held = HeldCounts(sequences(loaded.fields, loaded.counts, None), sampler, more, model._shares, workers)
    chosen = fit_concentration(model._networks, model._weights[0], held, 20)
    if strength:
        assert chosen == CONCENTRATIONS[0]
    else:
        assert chosen >= CONCENTRATIONS[-1]
    model.settings = sf.SpaFormer(settings={"n_networks": 1, "n_pooled": 20}).settings
    gains = []
    for model._concentration in (math.inf, chosen):
        rates = model.impute(tissue, output="rate", target_sum=1.0)
        gains.append(sf.metrics.poisson_gain(more, rates, tissue.X))
    if strength:
        assert gains[1] > gains[0] + 0.05
    else:
        assert gains[1] == pytest.approx(gains[0], abs=0.02)


def test_a_saved_model_keeps_it(tmp_path) -> None:
    tissue, _ = two_kinds(1.0)
    settings = {"n_networks": 2, "learning_rate": 1e-9, "n_pooled": 20}
    model = sf.SpaFormer(max_epochs=1, settings=settings, progress=False).fit(tissue)
    assert model._concentration in CONCENTRATIONS
    model.save(tmp_path / "model")
    loaded = sf.SpaFormer.load(tmp_path / "model")
    assert loaded._concentration == model._concentration
    imputed = model.impute(tissue)
    assert (loaded.impute(tissue) == imputed).all()
    model._concentration = math.inf
    assert abs(model.impute(tissue) - imputed).max() > 0.1


def test_it_can_be_left_out_and_needs_counts() -> None:
    tissue, _ = two_kinds(1.0)
    model = sf.SpaFormer(max_epochs=1, settings={"n_networks": 1, "n_pooled": 0}, progress=False).fit(tissue)
    assert math.isinf(model._concentration)
    choices = {"preset": "default", "quality": "default", "positional": "auto", "encoder": "auto"}
    choices |= {"variational": False, "masking": "auto", "n_latent": None, "max_epochs": None}
    assert resolve(decoder="auto", **choices).n_pooled
    assert not resolve(decoder="gaussian", **choices).n_pooled
    assert not resolve(decoder="auto", **choices | {"preset": "paper"}).n_pooled
    with pytest.raises(ValueError, match=r"n_pooled.*needs a decoder of counts"):
        resolve(decoder="gaussian", settings={"n_pooled": 5}, **choices)
