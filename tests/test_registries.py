"""Every choice of every registry trains: the loss on data that stay the same falls, and what comes out is finite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import spaformer_sc as sf
from spaformer_sc._config import DISPERSED, DISPERSIONS, FORMS, GRAPHS
from spaformer_sc.nn.decoders import DECODERS
from spaformer_sc.nn.encoder import ENCODERS
from spaformer_sc.nn.masking import CORRUPTIONS
from spaformer_sc.positional import POSITIONAL
from spaformer_sc.training.sequences import sequences
from spaformer_sc.training.trainer import KL_WEIGHT, _optimizer, batch_loss

SMALL = {"dim": 32, "n_heads": 4, "tokens_per_step": 80, "learning_rate": 5e-3, "averaging": 0.0, "n_validations": 1}
TWO = ["laplacian", "linear"]
LONGER = 40
"""Epochs where cells are hidden whole or in large parts, which takes longer to learn from."""
ENTRIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({"encoder": name}, {}) for name in ENCODERS),
    *(({"decoder": name, "variational": variational}, {}) for name in DECODERS for variational in (False, True)),
    *(({"decoder": name}, {"dispersion": dispersion}) for name in DISPERSED for dispersion in DISPERSIONS),
    *(({"masking": name, "max_epochs": LONGER}, {}) for name in CORRUPTIONS),
    ({"masking": ["bilevel", "thinning"], "max_epochs": LONGER}, {}),
    ({"masking": "bilevel", "max_epochs": LONGER}, {"masked_tokens": (0.2, 0.8), "masked_features": (0.6, 0.3)}),
    *(({"positional": name}, {}) for name in (None, *POSITIONAL)),
    *(({"positional": TWO}, {"positional_combine": name}) for name in ("add", "concat")),
    *(({"graph": name, "radius": 15.0 if name == "radius" else None}, {}) for name in GRAPHS),
    *(({}, {"hops": hops}) for hops in (0, 1, 2)),
    *(({}, {name: value}) for name in ("posterior", "pca_start", "typical_fill") for value in (False, True)),
    *(({}, {"forms": [form]}) for form in FORMS if form != "perceptron"),
    ({}, {"forms": ["plain", "perceptron"], "n_networks": 2}),
    ({}, {"windows": True}),
    ({"preset": "paper"}, {}),
]
FALL = 0.01
"""Least fall of the loss, as a share of what it is before training."""


@pytest.fixture(scope="module")
def small_tissue():
    return sf.datasets.simulated_tissue(n_fovs=2, n_cells=120, n_genes=40)


def trained(tissue, arguments: dict[str, Any], settings: dict[str, Any]) -> sf.SpaFormer:
    """A model after about 36 steps, unless `arguments` say otherwise; the last weights are kept."""
    chosen = {"quality": "fast", "max_epochs": 12, "settings": SMALL | settings, **arguments}
    return sf.SpaFormer(library_key="fov", progress=False, **chosen).fit(tissue)


def fixed_loss(model: sf.SpaFormer, tissue, network) -> float:
    """Training loss of a network on one epoch of batches with the same corruption, without dropout or noise."""
    loaded, _ = model._read(tissue, model.keys)
    sampler = model._sampler(torch.device("cpu"))
    data = sequences(loaded.fields, loaded.counts, None)
    network.eval()
    with torch.inference_mode():
        losses = [
            batch_loss(network, batch, KL_WEIGHT, torch.Generator())
            for batch in sampler.epoch(data, torch.Generator().manual_seed(0), (0.5, 0.5))
        ]
    return float(torch.stack(losses).mean())


def fall(model: sf.SpaFormer, tissue) -> float:
    """By how much training lowered the loss of the last network, as a share of what it was at the initial weights."""
    last = len(model._forms) - 1
    before, after = (
        fixed_loss(model, tissue, network)
        for network in (model._new_network(last, model._forms[last]), model._networks[last])
    )
    return (before - after) / abs(before)


@pytest.mark.parametrize(
    ("arguments", "settings"), ENTRIES, ids=[",".join(f"{k}={v}" for k, v in (a | s).items()) for a, s in ENTRIES]
)
def test_every_entry_trains(small_tissue, arguments: dict[str, Any], settings: dict[str, Any]) -> None:
    model = trained(small_tissue, arguments, settings)
    assert fall(model, small_tissue) > FALL
    expression, latent = model.impute(small_tissue), model.embed(small_tissue)
    assert expression.shape == small_tissue.shape
    assert np.isfinite(expression).all()
    assert np.isfinite(latent).all()
    assert np.ptp(expression, axis=0).max() > 0


def test_without_learning_no_loss_falls(small_tissue) -> None:
    model = trained(small_tissue, {}, {"learning_rate": 1e-12, "pca_start": False})
    assert abs(fall(model, small_tissue)) < FALL / 100


# --- variational latents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_variational_latent_keeps_what_tells_about_hidden_counts(small_tissue, decoder: str) -> None:
    model = trained(small_tissue, {"decoder": decoder, "variational": True, "max_epochs": 60}, {"posterior": False})
    # With the weight of 1 of a plain evidence bound every decoder's latent ends at a spread of about 0.01.
    assert model.embed(small_tissue).std(0).max() > 0.05


def test_the_prior_does_not_pull_on_cells_of_which_nothing_is_asked(small_tissue) -> None:
    model = trained(small_tissue, {"variational": True, "masking": "bilevel", "max_epochs": 1}, {})
    network = model._networks[0]
    loaded, _ = model._read(small_tissue, model.keys)
    data = sequences(loaded.fields, loaded.counts, None)
    batch = next(model._sampler(torch.device("cpu")).epoch(data, torch.Generator().manual_seed(0)))
    asked = batch.asked.any(1) & (batch.target_depth > 0)
    assert 0 < int(asked.sum()) < len(asked)
    with torch.inference_mode():
        divergence = network(batch.tokens).divergence
        losses = [float(batch_loss(network, batch, weight, torch.Generator())) for weight in (0.0, 1.0)]
    size = float((batch.target * batch.asked).sum())
    assert losses[1] - losses[0] == pytest.approx(float(divergence[asked].sum()) / size, rel=1e-3)


# --- dispersion per FOV, from the data to the file --------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_fov(small_tissue):
    return trained(small_tissue, {"decoder": "nb"}, {"dispersion": "gene_fov"})


def test_a_dispersion_per_fov_is_that_of_the_named_fov(small_tissue, by_fov) -> None:
    names = list(small_tissue.obs["fov"].cat.categories)
    decoder = by_fov._networks[0].decoder
    assert by_fov._fovs == tuple(names)
    assert decoder.fov_log_dispersion.shape == (2, 40)
    assert bool((decoder.fov_log_dispersion[0] != decoder.fov_log_dispersion[1]).any())
    loaded, _ = by_fov._read(small_tissue, by_fov.keys)
    sampler = by_fov._sampler(torch.device("cpu"))
    for sequence in sequences(loaded.fields, loaded.counts, None):
        with torch.inference_mode():
            found = by_fov._networks[0](sampler.whole(sequence)).decoded.log_dispersion
        want = decoder.log_dispersion + decoder.fov_log_dispersion[names.index(sequence.fov.name)]
        assert torch.equal(found, want.expand_as(found))


def test_offsets_per_fov_learn_as_fast_as_the_dispersion_of_the_gene(by_fov) -> None:
    network = by_fov._networks[0]
    offsets = network.decoder.fov_log_dispersion
    (group,) = [
        g for g in _optimizer(network, by_fov.settings.training).param_groups if any(p is offsets for p in g["params"])
    ]
    assert group["lr"] == pytest.approx(10 * SMALL["learning_rate"])
    assert group["weight_decay"] == 0.0


def test_a_fov_that_the_fit_did_not_know_has_the_dispersion_of_the_gene(small_tissue, by_fov) -> None:
    other = small_tissue.copy()
    other.obs["fov"] = other.obs["fov"].cat.rename_categories(lambda name: f"new {name}")
    without = trained(small_tissue, {"decoder": "nb", "max_epochs": 1}, {})
    weights = by_fov._networks[0].state_dict()
    weights.pop("decoder.fov_log_dispersion")
    without._networks[0].load_state_dict(weights)
    np.testing.assert_allclose(by_fov.impute(other), without.impute(other), rtol=1e-6)
    assert np.abs(by_fov.impute(small_tissue) - without.impute(small_tissue)).max() > 1e-4


def test_tiles_have_the_dispersion_of_their_fov(small_tissue) -> None:
    model = trained(small_tissue, {"decoder": "nb", "tile_size": 50}, {"dispersion": "gene_fov"})
    loaded, _ = model._read(small_tissue, model.keys)
    assert len(loaded.fields) > 2
    assert model._fovs == tuple(small_tissue.obs["fov"].cat.categories)
    assert np.isfinite(model.impute(small_tissue)).all()


@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_a_saved_dispersion_is_read_back(small_tissue, tmp_path, dispersion: str) -> None:
    model = trained(small_tissue, {"decoder": "zinb", "max_epochs": 2}, {"dispersion": dispersion})
    model.save(tmp_path / "model")
    loaded = sf.SpaFormer.load(tmp_path / "model", progress=False)
    assert loaded.settings == model.settings
    np.testing.assert_array_equal(loaded.impute(small_tissue), model.impute(small_tissue))


def test_networks_with_a_dispersion_per_fov_want_names(small_tissue, by_fov) -> None:
    loaded, _ = by_fov._read(small_tissue, by_fov.keys)
    sequence = sequences(loaded.fields, loaded.counts, None)[0]
    tokens = replace(by_fov._sampler(torch.device("cpu")).whole(sequence), fovs=())
    with pytest.raises(ValueError, match=r"`tokens\.fovs` must name every FOV"):
        by_fov._networks[0](tokens)
