"""What held-out counts decide after and between trainings: mixtures, the form of further networks, their length."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import spaformer_sc as sf
from spaformer_sc import _config
from spaformer_sc._config import Settings, Training, in_form, n_weights
from spaformer_sc.metrics import mixture_weights
from spaformer_sc.training.mixing import HeldCounts, mix_in_own_counts
from spaformer_sc.training.sequences import sequences
from spaformer_sc.training.start import RING_SHARES, principal_components, start_from_components, token_components
from spaformer_sc.training.trainer import History, shortened

# --- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(fitted, shared_tissue, workers):
    """Counts that the model has not seen, drawn from the tissue's own rates."""
    loaded, _ = fitted._read(shared_tissue, fitted.keys)
    sampler = fitted._sampler(torch.device("cpu"))
    fields = sequences(loaded.fields, loaded.counts, None)
    rate = shared_tissue.layers["true_rate"]
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(rate / rate.sum(1, keepdims=True) * 50).astype(np.float32))
    return HeldCounts(fields, sampler, counts, fitted._shares, workers)


def log_likelihood(parts, weights, counts):
    return counts @ np.log(weights @ parts)


def test_parts_are_shares_of_network_own_counts_and_mean(fitted, shared_tissue, held):
    network = fitted._networks[0]
    before = network.decoder.mixture.clone()
    network.decoder.mixture.copy_(torch.tensor([1.0, 0.0, 0.0]))
    parts = held.parts(network)
    rates = fitted.impute(shared_tissue, output="rate", target_sum=1.0)
    network.decoder.mixture.copy_(before)
    rows = np.concatenate([field.fov.cells[part] for field, part in zip(held.fields, held._rows)])
    cols = np.concatenate(held._cols)
    library = np.asarray(shared_tissue.X.sum(axis=1)).ravel()
    own = shared_tissue.X.toarray() / np.maximum(library, 1)[:, None]
    expected = {(r, c): (rates[r, c], own[r, c] if library[r] else rates[r, c]) for r, c in zip(rows, cols)}
    assert len(held.counts) == len(expected)
    found = sorted(zip(parts[0], parts[1]))
    np.testing.assert_allclose(found, sorted(expected.values()), rtol=1e-4, atol=1e-7)
    assert set(np.round(parts[2], 6)) <= set(np.round(fitted._shares.astype(float), 6))


def test_the_mixture_is_set_to_the_most_likely_weights(fitted, held):
    network = fitted._networks[0]
    before = network.decoder.mixture.clone()
    network.decoder.mixture.copy_(torch.tensor([1.0, 0.0, 0.0]))
    parts = held.parts(network)
    mixed = mix_in_own_counts(network, held)
    weights = network.decoder.mixture.double().numpy()
    network.decoder.mixture.copy_(before)
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    assert (weights >= 0).all()
    best = log_likelihood(parts, weights, held.counts)
    assert best == pytest.approx(held.counts @ np.log(mixed), rel=1e-6)
    for other in np.random.default_rng(1).dirichlet([1, 1, 1], size=200):
        assert log_likelihood(parts, other, held.counts) <= best + 1e-3


def test_mixed_shares_sum_to_one_and_leave_hidden_entries_to_the_network(fitted):
    decoder = fitted._networks[0].decoder
    share = torch.softmax(torch.randn(4, 30, generator=torch.Generator().manual_seed(0)), -1)
    counts = torch.zeros(4, 30)
    counts[1, 3], counts[2, :5] = 2.0, 1.0
    visible = torch.ones(4, 30, dtype=torch.bool)
    visible[2, 10:] = False
    before = decoder.mixture.clone()
    decoder.mixture.copy_(torch.tensor([0.7, 0.2, 0.1]))
    mixed = decoder._mixed(share, counts, visible)
    everything = decoder._mixed(share[:2], counts[:2], None)
    decoder.mixture.copy_(before)
    mean = decoder.gene_share
    torch.testing.assert_close(mixed.sum(1), torch.ones(4))
    torch.testing.assert_close(mixed[0], 0.9 * share[0] + 0.1 * mean)  # without counts, the network speaks for them
    own = torch.zeros(30)
    own[3] = 1.0
    torch.testing.assert_close(mixed[1], 0.7 * share[1] + 0.2 * own + 0.1 * mean)
    torch.testing.assert_close(mixed[:2], everything)
    torch.testing.assert_close(mixed[2, 10:], share[2, 10:])
    own = torch.full((10,), 0.0)
    own[:5] = 0.2
    mass = share[2, :10].sum()
    torch.testing.assert_close(
        mixed[2, :10], 0.7 * share[2, :10] + mass * (0.2 * own + 0.1 * mean[:10] / mean[:10].sum())
    )


@pytest.mark.parametrize("decoder", ["poisson", "nb", "zinb"])
@pytest.mark.parametrize("hidden", [0.0, 0.3])
def test_what_is_fitted_is_what_is_predicted(decoder, hidden, workers):
    tissue = sf.datasets.simulated_tissue(n_fovs=2, n_cells=200, n_genes=60)
    tissue.layers["missing"] = np.random.default_rng(0).random(tissue.shape) < hidden
    arguments = {"quality": "fast", "missing": "missing", "settings": {"posterior": False, "mixing": False}}
    model = sf.SpaFormer(library_key="fov", decoder=decoder, max_epochs=4, progress=False, **arguments).fit(tissue)
    loaded, _ = model._read(tissue, model.keys)
    sampler = model._sampler(torch.device("cpu"))
    fields = sequences(loaded.fields, loaded.counts, loaded.missing)
    rate = tissue.layers["true_rate"] * ~tissue.layers["missing"]
    drawn = np.random.default_rng(1).poisson(rate / rate.sum(1, keepdims=True) * 20)
    counts = sp.csr_matrix(drawn.astype(np.float32))
    held, network = HeldCounts(fields, sampler, counts, model._shares, workers), model._networks[0]
    claimed = mix_in_own_counts(network, held)
    assert 0 < network.decoder.mixture[1] < 1
    np.testing.assert_allclose(held.parts(network)[0], claimed, rtol=1e-4)


def test_nothing_is_fitted_to_few_counts():
    tissue = sf.datasets.simulated_tissue(n_fovs=1, n_cells=30, n_genes=12)
    model = sf.SpaFormer(quality="default", max_epochs=1, progress=False).fit(tissue)
    assert tissue.X.sum() * 0.05 < 200
    np.testing.assert_array_equal(model._weights, np.full((2, 5), 0.2))
    assert all(network.decoder.mixture.tolist() == [1, 0, 0] for network in model._networks)


def test_mixing_can_be_switched_off():
    tissue = sf.datasets.simulated_tissue(n_fovs=1, n_cells=400, n_genes=100)
    arguments = {"library_key": "fov", "quality": "fast", "max_epochs": 2, "progress": False}
    mixed, plain = (
        sf.SpaFormer(**arguments, settings={"mixing": on, "posterior": False}).fit(tissue) for on in (True, False)
    )
    assert plain._networks[0].decoder.mixture.tolist() == [1, 0, 0]
    assert mixed._networks[0].decoder.mixture[0] < 1
    assert np.abs(mixed.impute(tissue) - plain.impute(tissue)).max() > 1e-4


def test_weights_of_networks_favour_the_better_one():
    rng = np.random.default_rng(0)
    good = rng.dirichlet(np.ones(20), size=300)
    counts = np.array([rng.multinomial(30, p) for p in good])
    noise = rng.dirichlet(np.ones(20), size=300)
    parts = np.stack([good[counts > 0], noise[counts > 0]])
    weights = mixture_weights(parts, counts[counts > 0].astype(float))
    assert weights[0] > 0.9


# --- training of further networks -------------------------------------------------------------------------------------


def test_further_networks_train_for_half_as_long_again():
    history = History(step=[80, 160, 240], epoch=[1, 2, 3], loss=[3.0, 2.0, 1.0], validation=[0.1, 0.3, 0.2])
    assert shortened(Training(n_steps=2000), history).n_steps == 240
    assert shortened(Training(n_steps=200), history).n_steps == 200
    assert shortened(Training(max_epochs=7), history) == Training(max_epochs=7)
    history.validation = [float("nan")] * 3
    assert shortened(Training(), history) == Training()


def test_further_networks_have_the_forms_in_turn_the_best_first(shared_tissue):
    model = sf.SpaFormer(library_key="fov", max_epochs=3, progress=False).fit(shared_tissue)
    forms = ["plain", "wide", "large", "perceptron"]
    assert model._forms[:4] == forms
    number, validation = np.array(model.history["network"]), np.array(model.history["validation"])
    assert model._forms[4] == forms[int(np.argmax([validation[number == i].max() for i in range(4)]))]
    wide = [network.wide is not None for network in model._networks]
    assert wide == [form in ("wide", "large") for form in model._forms]
    assert [network.config.perceptron for network in model._networks] == [f == "perceptron" for f in model._forms]
    assert [network.config.dim for network in model._networks[:4]] == [128, 128, 256, 512]
    settings = {"forms": forms[:2], "n_networks": 5}
    more = sf.SpaFormer(library_key="fov", max_epochs=3, settings=settings, progress=False).fit(shared_tissue)
    number, validation = np.array(more.history["network"]), np.array(more.history["validation"])
    best, other = sorted([0, 1], key=lambda i: -validation[number == i].max())
    assert more._forms[2:] == [forms[best], forms[other], forms[best]]
    settings = {"forms": ["wide"], "n_networks": 3}
    fixed = sf.SpaFormer(library_key="fov", max_epochs=1, settings=settings, progress=False).fit(shared_tissue)
    assert fixed._forms == ["wide"] * 3


def test_forms_of_a_network():
    s = Settings(training=Training(n_steps=100, tokens_per_step=512, learning_rate=2e-3, averaging=0.99))
    assert in_form(s, "plain") == s
    assert in_form(s, "wide") == replace(s, training=replace(s.training, learning_rate=1e-3))
    large = in_form(s, "large")
    assert (large.dim, large.n_latent) == (2 * s.dim, s.n_latent)
    t = large.training
    assert (t.n_steps, t.tokens_per_step, t.learning_rate, t.n_validations) == (400, 128, 1e-3, 50)
    assert t.averaging == pytest.approx(0.998)
    plain = replace(s, training=replace(s.training, tokens_per_step=None, averaging=0.0))
    assert in_form(plain, "large").training.tokens_per_step is None
    assert in_form(plain, "large").training.averaging == 0.0
    perceptron = in_form(replace(s, dropout=0.4), "perceptron")
    assert (perceptron.dim, perceptron.n_latent, perceptron.n_layers) == (4 * s.dim, 4 * s.dim, 0)
    assert (perceptron.posterior, perceptron.dropout, perceptron.training) == (False, 0.0, t)
    assert not in_form(replace(s, variational=True), "perceptron").variational


def test_a_perceptron_takes_more_steps_on_more_cells():
    s = Settings(training=Training(n_steps=100, tokens_per_step=512))
    steps = [in_form(s, "perceptron", n).training.n_steps for n in (0, 853, 1280, 10**6)]
    assert steps == [400, 400, 600, 800]  # 60 passes in steps of 128 cells, up to twice as many
    assert in_form(s, "large", 10**6).training.n_steps == 400
    whole = replace(s, training=replace(s.training, tokens_per_step=None))
    assert in_form(whole, "perceptron", 10**6).training.n_steps == 400


def test_many_cells_lengthen_the_training_of_a_perceptron(shared_tissue, monkeypatch):
    monkeypatch.setattr(_config, "PASSES", 10**6)
    settings = {"forms": ["plain", "perceptron"], "n_networks": 2, "n_steps": 20, "tokens_per_step": 64}
    model = sf.SpaFormer(library_key="fov", settings=settings | {"patience": 100}, progress=False).fit(shared_tissue)
    numbers, steps = np.array(model.history["network"]), np.array(model.history["step"])
    assert steps[numbers == 0].max() == pytest.approx(20, rel=0.5)
    assert steps[numbers == 1].max() == pytest.approx(160, rel=0.1)


@pytest.mark.parametrize("form", ["plain", "wide", "large", "perceptron"])
@pytest.mark.parametrize("choice", [{}, {"decoder": "zinb"}, {"settings": {"dispersion": "entry", "hops": 1}}])
def test_weights_of_a_network_are_counted_for_memory(shared_tissue, form, choice):
    model = sf.SpaFormer(library_key="fov", max_epochs=1, quality="fast", progress=False, **choice).fit(shared_tissue)
    found = sum(weight.numel() for weight in model._new_network(0, form).parameters())
    assert n_weights(model.settings, form, shared_tissue.n_vars) == pytest.approx(found, rel=0.25)


# --- the start --------------------------------------------------------------------------------------------------------


def test_components_equal_a_singular_value_decomposition():
    rng = np.random.default_rng(3)
    values = rng.standard_normal((60, 5)) @ rng.standard_normal((5, 12)) + rng.random(12)
    blocks = [(torch.from_numpy(part), None) for part in (values[:25], values[25:])]
    components, mean = principal_components(lambda: blocks, 4)
    np.testing.assert_allclose(mean, values.mean(0))
    scores = ((torch.from_numpy(values) - mean) @ components.T).numpy()
    left, sizes, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(scores), np.abs(left[:, :4] * sizes[:4]) / (sizes[0] / np.sqrt(60)), atol=1e-8)
    assert np.square(scores[:, 0]).mean() == pytest.approx(1)


def test_components_leave_hidden_values_out():
    rng = np.random.default_rng(4)
    values, visible = torch.from_numpy(rng.standard_normal((40, 6))), torch.from_numpy(rng.random((40, 6)) < 0.7)
    found = principal_components(lambda: [(values, visible)], 3)
    other = principal_components(lambda: [(torch.where(visible, values, 99.0), visible)], 3)
    for one, two in zip(found, other, strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(found[1], (values * visible).sum(0) / visible.sum(0))


def test_components_that_do_not_vary_are_zero():
    values = torch.ones(10, 4)
    values[:, 0] = torch.arange(10.0)
    components, mean = principal_components(lambda: [(values, None)], 3)
    assert components[0].abs().argmax() == 0
    assert components[1:].abs().max() == 0
    assert mean.tolist() == [4.5, 1, 1, 1]


def test_tokens_start_at_components(fitted, shared_tissue):
    loaded, _ = fitted._read(shared_tissue, fitted.keys)
    sampler = fitted._sampler(torch.device("cpu"))
    wholes = [sampler.open(s) for s in sequences(loaded.fields, loaded.counts, None)]
    network = fitted._new_network(0, "plain")
    start_from_components(network, token_components(lambda: wholes, network.config.dim, 2))
    dim, n_genes = network.config.dim, network.config.n_genes
    first, second = (int(share * dim) for share in RING_SHARES)
    assert dim - first - second >= n_genes  # all components, and zeros behind them
    tokens = [whole.tokens() for whole in wholes]
    own = torch.cat([network.embedding(t.values[0]) + network.neighbours[0](t.values[1]) for t in tokens]).detach()
    assert own[:, 0].mean().abs() < 1e-4
    assert float(own[:, 0].var(unbiased=False)) == pytest.approx(1, rel=1e-3)
    ring = torch.cat([network.neighbours[0](t.values[1]) for t in tokens]).detach()
    assert ring[:, : dim - first - second].abs().max() == 0
    assert float(ring[:, dim - first - second].var(unbiased=False)) == pytest.approx(1, rel=1e-3)


def test_the_start_does_not_move_other_weights(fitted, shared_tissue):
    loaded, _ = fitted._read(shared_tissue, fitted.keys)
    sampler = fitted._sampler(torch.device("cpu"))
    wholes = [sampler.open(s) for s in sequences(loaded.fields, loaded.counts, None)]
    plain, started = (fitted._new_network(0, "wide") for _ in range(2))
    start_from_components(started, token_components(lambda: wholes, started.config.dim, 2))
    moved = {name for name, p in plain.named_parameters() if not torch.equal(p, started.get_parameter(name))}
    assert moved == {"embedding.weight", "embedding.bias", "neighbours.0.weight", "neighbours.1.weight"}
