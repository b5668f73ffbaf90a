"""The preset of the paper: every shape and the number of parameters from the paper's numbers, and its training.

Wen et al. 2023, arXiv 2302.03038: 2 layers, 8 heads, 128 hidden units, a latent of 20, SignNet on 10 eigenvectors, a
Gaussian decoder, AdamW with 1e-3 and 5e-4, dropout 0.2, expression per 250 counts, half of the genes hidden on half of
the cells. The feed-forward block of a transformer is four times as wide as a token (Vaswani et al. 2017).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import spaformer_sc as sf
from spaformer_sc.nn.network import normalise
from spaformer_sc.training.sequences import sequences
from spaformer_sc.training.trainer import _optimizer, batch_loss, learning_rate_factor

GENES, HIDDEN, HEADS, LAYERS, LATENT, EIGENVECTORS, WIDER = 37, 128, 8, 2, 20, 10, 4
SIGNNET_WIDTH, SIGNNET_LAYERS = 16, 2


@pytest.fixture(scope="module")
def tissue():
    return sf.datasets.simulated_tissue(n_fovs=2, n_cells=80, n_genes=GENES)


@pytest.fixture(scope="module")
def fitted(tissue):
    return sf.SpaFormer(library_key="fov", preset="paper", max_epochs=12, progress=False).fit(tissue)


@pytest.fixture(scope="module")
def network(fitted):
    """The network of the preset before training."""
    return fitted._new_network(0, "plain")


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def paper_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {**linear("embedding", GENES, HIDDEN), **linear("depth", 1, HIDDEN), "hidden_token": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}"
        shapes |= norm(f"{layer}.attention_norm", HIDDEN) | linear(f"{layer}.attention.qkv", HIDDEN, 3 * HIDDEN)
        shapes |= linear(f"{layer}.attention.out", HIDDEN, HIDDEN) | norm(f"{layer}.feedforward_norm", HIDDEN)
        shapes |= linear(f"{layer}.feedforward.0", HIDDEN, WIDER * HIDDEN)
        shapes |= linear(f"{layer}.feedforward.3", WIDER * HIDDEN, HIDDEN)
    shapes |= norm("encoder.norm", HIDDEN) | linear("latent", HIDDEN, LATENT)
    shapes |= linear("decoder.hidden.0", LATENT, HIDDEN) | linear("decoder.output", HIDDEN, GENES)
    signnet, width = "positional.encodings.signnet", SIGNNET_WIDTH
    for i in range(SIGNNET_LAYERS):
        # The first layer takes the entry of the eigenvector and the spatial frequency.
        phi = f"{signnet}.phi.{i}.nn"
        shapes |= linear(f"{phi}.0", 2 if i == 0 else width, width) | norm(f"{phi}.1", width)
        shapes |= linear(f"{phi}.3", width, width)
    shapes |= norm(f"{signnet}.rho.0", EIGENVECTORS * width)
    shapes |= linear(f"{signnet}.rho.1", EIGENVECTORS * width, HIDDEN) | linear(f"{signnet}.rho.3", HIDDEN, HIDDEN)
    return shapes


def test_every_shape(network) -> None:
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == paper_shapes()


def test_the_number_of_parameters(network) -> None:
    tokens = (GENES * 128 + 128) + (128 + 128) + 128
    attention = 256 + (128 * 384 + 384) + (128 * 128 + 128)
    feedforward = 256 + (128 * 512 + 512) + (512 * 128 + 128)
    encoder = 2 * (attention + feedforward) + 256
    latent_and_decoder = (128 * 20 + 20) + (20 * 128 + 128) + (128 * GENES + GENES)
    phi = (2 * 16 + 16) + 32 + (16 * 16 + 16) + (16 * 16 + 16) + 32 + (16 * 16 + 16)
    rho = 320 + (160 * 128 + 128) + (128 * 128 + 128)
    total = tokens + encoder + latent_and_decoder + phi + rho
    assert total == 440_948 + 257 * GENES
    assert sum(p.numel() for p in network.parameters()) == total


def test_eight_heads_of_softmax_attention_and_a_dropout_of_a_fifth(network) -> None:
    for layer in network.encoder.layers:
        assert (layer.attention.n_heads, layer.attention.kernel) == (8, "softmax")
        assert layer.attention.features.shape[1] == 16
    rates = [module.p for module in network.encoder.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    assert rates == [0.2] * 4
    assert len(network.encoder.layers) == 2


def test_the_training_is_that_of_the_paper(fitted, network) -> None:
    config = fitted.settings.training
    optimizer = _optimizer(network, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    weights = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-4, 0.0}
    assert {id(p) for p in weights} == {id(p) for p in network.parameters() if p.ndim > 1}
    assert {learning_rate_factor(step, 1000, config) for step in (100, 500, 999)} == {1.0}
    assert (config.averaging, config.tokens_per_step) == (0.0, None)
    assert fitted.settings.masking == ("bilevel",)
    assert (fitted.settings.hops, fitted.settings.posterior, fitted.settings.variational) == (0, False, False)
    assert (fitted.settings.model_sum, fitted.settings.n_eigenvectors) == (250.0, 10)


@pytest.fixture(scope="module")
def batches(fitted, tissue):
    """Batches of twenty epochs of the preset's sampler."""
    loaded, _ = fitted._read(tissue, fitted.keys)
    sampler = fitted._sampler(torch.device("cpu"))
    data = sequences(loaded.fields, loaded.counts, None)
    generator = torch.Generator().manual_seed(0)
    return [batch for _ in range(20) for batch in sampler.epoch(data, generator)]


def test_half_of_the_genes_are_hidden_on_half_of_the_cells_of_a_whole_fov(batches) -> None:
    assert {tuple(b.tokens.lengths) for b in batches} == {(80,)}
    hidden = torch.cat([b.asked for b in batches]).double()
    touched = hidden.any(1)
    assert float(touched.double().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(hidden[touched].mean()) == pytest.approx(0.5, abs=0.02)


def test_the_input_is_log1p_of_250_counts_and_the_loss_the_squared_error_of_what_is_hidden(network, batches) -> None:
    batch = batches[0]
    (values,) = batch.tokens.values
    torch.testing.assert_close(values, normalise(batch.tokens.counts, batch.tokens.depth, 250.0))
    network.eval()
    with torch.no_grad():
        loss = batch_loss(network, batch, 1.0, torch.Generator())
        predicted = network(batch.tokens).decoded.expression
    truth = torch.log1p(batch.target / batch.target.sum(1, keepdim=True).clamp(min=1) * 250.0)
    asked = batch.asked & (batch.target.sum(1, keepdim=True) > 0)
    error = (predicted - truth)[asked].square().mean() / 2
    assert float(loss) == pytest.approx(float(error) + np.log(2 * np.pi) / 2, rel=1e-5)


def test_it_trains(fitted, network, tissue, batches) -> None:
    network.eval()
    with torch.no_grad():
        before, after = (
            float(torch.stack([batch_loss(net, b, 1.0, torch.Generator()) for b in batches[:4]]).mean())
            for net in (network, fitted._networks[0])
        )
    assert after < before - 0.05
    expression = fitted.impute(tissue)
    assert expression.shape == tissue.shape
    assert np.isfinite(expression).all()
    assert fitted.embed(tissue).shape == (tissue.n_obs, 20)
