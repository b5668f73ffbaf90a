"""Decoders: shares, the Gamma-Poisson update, and the scales that are read out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from spaformer_sc.nn.decoders import DECODERS, CountDecoder

N, G, L = 7, 11, 5
COUNTS = ("poisson", "nb", "zinb")


def make(name: str, *, posterior: bool = False, dispersion: str = "gene", n_fovs: int = 0):
    share = torch.rand(G, generator=torch.Generator().manual_seed(0)) + 0.1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return DECODERS[name](
            L, 16, G, gene_share=share / share.sum(), posterior=posterior, target_sum=40.0, dispersion=dispersion,
            n_fovs=n_fovs,
        )  # fmt: skip


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn((N, L), generator=generator)
    counts = torch.poisson(torch.full((N, G), 3.0), generator=generator)
    return latent, counts, counts.sum(1), None


@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_shares_sum_to_one(name: str, posterior: bool, inputs) -> None:
    decoder = make(name, posterior=posterior)
    decoded = decoder(*inputs)
    torch.testing.assert_close(decoder.share(decoded).sum(1), torch.ones(N))
    assert bool((decoder.share(decoded) > 0).all())


def test_the_posterior_is_the_gamma_poisson_mean(inputs) -> None:
    latent, counts, depth, _ = inputs
    decoder = make("poisson", posterior=True)
    prior = make("poisson")
    prior.load_state_dict(decoder.state_dict(), strict=False)
    torch.nn.init.normal_(decoder.concentration.weight, generator=torch.Generator().manual_seed(3))
    share = prior(*inputs).expression
    concentration = (decoder.log_concentration + decoder.concentration(decoder.hidden(latent))).exp()
    # Posterior mean by numerical integration of Gamma(k, k / r) times Poisson(x | D rate) for a few entries.
    updated = torch.empty(N, G)
    for i in range(N):
        for g in range(G):
            k, r, x, d = (float(v.detach()) for v in (concentration[i, g], share[i, g], counts[i, g], depth[i]))
            rate = np.linspace(1e-9, 40 * (r + (x + 1) / d), 200_001)
            weight = np.exp(stats.gamma.logpdf(rate, k, scale=r / k) + stats.poisson.logpmf(x, d * rate))
            if k > 1:  # below 1 the density has a pole at 0 that this grid does not resolve
                updated[i, g] = float((weight * rate).sum() / weight.sum())
            else:
                updated[i, g] = (k + x) / (k / r + d)
    updated = updated / updated.sum(1, keepdim=True)
    torch.testing.assert_close(decoder(*inputs).expression.detach(), updated, rtol=2e-3, atol=1e-5)


def test_hidden_entries_keep_the_prior_up_to_normalisation(inputs) -> None:
    latent, counts, depth, _ = inputs
    decoder, prior = make("poisson", posterior=True), make("poisson")
    prior.load_state_dict(decoder.state_dict(), strict=False)
    visible = torch.ones((N, G), dtype=torch.bool)
    visible[:, :4] = False
    share = decoder(latent, counts * visible, depth, visible).expression
    ratio = share[:, :4] / prior(*inputs).expression[:, :4]
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-6)


def test_a_large_concentration_switches_the_posterior_off(inputs) -> None:
    decoder, prior = make("poisson", posterior=True), make("poisson")
    prior.load_state_dict(decoder.state_dict(), strict=False)
    with torch.no_grad():
        decoder.log_concentration.fill_(30.0)
    torch.testing.assert_close(decoder(*inputs).expression, prior(*inputs).expression, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", COUNTS)
def test_log_likelihood_is_that_of_scipy(name: str, inputs) -> None:
    decoder = make(name)
    decoded = decoder(*inputs)
    target = torch.poisson(torch.full((N, G), 2.0), generator=torch.Generator().manual_seed(8))
    got = decoder.log_likelihood(decoded, target, torch.full((N,), 25.0)).detach().double().numpy()
    mean = decoded.expression.detach().double().numpy() * 25.0
    x = target.numpy()
    if name == "poisson":
        want = stats.poisson.logpmf(x, mean)
    else:
        size = decoder.log_dispersion.exp().detach().double().numpy()
        want = stats.nbinom.logpmf(x, size, size / (size + mean))
        if name == "zinb":
            zero = torch.sigmoid(decoded.zero_logits).detach().double().numpy()
            want = np.log(zero * (x == 0) + (1 - zero) * np.exp(want))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", COUNTS)
def test_scales_agree_with_the_distribution(name: str, inputs) -> None:
    decoder = make(name)
    decoded = decoder(*inputs)
    depth, target_sum = torch.linspace(5, 60, N), 40.0
    mean = decoded.expression.detach().double().numpy() * depth.numpy()[:, None]
    k = np.arange(2000)[:, None, None]
    if name == "poisson":
        pmf = stats.poisson.pmf(k, mean)
    else:
        size = decoder.log_dispersion.exp().detach().double().numpy()
        pmf = stats.nbinom.pmf(k, size, size / (size + mean))
    if name == "zinb":
        zero = torch.sigmoid(decoded.zero_logits).detach().double().numpy()
        pmf = (1 - zero) * pmf
        pmf[0] += zero
    np.testing.assert_allclose((pmf * k).sum(0), decoder.counts(decoded, depth).detach().numpy(), rtol=1e-4)
    lognorm = (pmf * np.log1p(k * target_sum / depth.numpy()[:, None])).sum(0)
    np.testing.assert_allclose(lognorm, decoder.lognorm(decoded, depth, target_sum).detach().numpy(), rtol=1e-3)


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_cell_of_depth_zero_is_zero_and_finite(name: str, inputs) -> None:
    latent = inputs[0]
    decoder = make(name, posterior=name != "gaussian")
    decoded = decoder(latent, torch.zeros(N, G), torch.zeros(N), None)
    assert bool((decoder.lognorm(decoded, torch.zeros(N), 40.0) == 0).all())
    assert bool((decoder.counts(decoded, torch.zeros(N)) == 0).all())
    assert bool(torch.isfinite(decoder.share(decoded)).all())


def test_gaussian_moves_between_target_sums(inputs) -> None:
    decoder = make("gaussian")
    decoded = decoder(*inputs)
    depth = torch.full((N,), 10.0)
    same = decoder.lognorm(decoded, depth, 40.0)
    torch.testing.assert_close(same, decoded.expression.clamp(min=0))
    torch.testing.assert_close(
        torch.expm1(decoder.lognorm(decoded, depth, 80.0)), 2 * torch.expm1(same), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(decoder.counts(decoded, depth), decoder.share(decoded) * 10.0)
    torch.testing.assert_close(decoder.counts(decoded, depth).sum(1), depth)


def test_the_gaussian_likelihood_asks_for_log_normalised_values(inputs) -> None:
    decoder = make("gaussian")
    decoded = decoder(*inputs)
    target = torch.full((N, G), 2.0)
    got = decoder.log_likelihood(decoded, target, torch.full((N,), 8.0))
    want = stats.norm.logpdf(np.log1p(2.0 / 8.0 * 40.0), decoded.expression.detach().double().numpy(), 1.0)
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-4)


def test_every_count_decoder_starts_at_the_gene_means(inputs) -> None:
    for name in ("poisson", "nb"):
        decoder = make(name)
        assert isinstance(decoder, CountDecoder)
        with torch.no_grad():
            decoder.logits.weight.zero_()
        share = decoder(*inputs).expression
        torch.testing.assert_close(share, torch.softmax(decoder.logits.bias, 0).expand(N, G))


FOVS = torch.tensor([0, 0, 1, -1, 1, 2, -1])


def dispersed(name: str, dispersion: str):
    """A decoder with a dispersion that differs between genes, FOVs and entries, and what it says in float64."""
    decoder = make(name, dispersion=dispersion, n_fovs=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        decoder.log_dispersion.normal_(0.5, 1.0, generator=generator)
        if dispersion == "gene_fov":
            decoder.fov_log_dispersion.normal_(0.0, 1.0, generator=generator)
        if dispersion == "entry":
            decoder.entry_dispersion.normal_(0.0, 1.0, generator=generator)
    return decoder


@torch.no_grad()
def sizes(decoder, dispersion: str, latent: torch.Tensor) -> np.ndarray:
    """Inverse dispersion of every entry, one by one."""
    hidden = decoder.hidden(latent)
    found = np.empty((N, G))
    for i in range(N):
        for g in range(G):
            value = decoder.log_dispersion[g]
            if dispersion == "gene_fov" and FOVS[i] >= 0:
                value = value + decoder.fov_log_dispersion[FOVS[i], g]
            if dispersion == "entry":
                value = value + (hidden[i] * decoder.entry_dispersion[g]).sum()
            found[i, g] = float(value.exp())
    return found


@pytest.mark.parametrize("dispersion", ["gene", "gene_fov", "entry"])
@pytest.mark.parametrize("name", ["nb", "zinb"])
def test_likelihood_and_expectation_are_those_of_the_dispersion(name: str, dispersion: str, inputs) -> None:
    decoder = dispersed(name, dispersion)
    size = sizes(decoder, dispersion, inputs[0])
    assert (np.ptp(size, axis=0) > 0.1).all() == (dispersion != "gene")
    decoded = decoder(*inputs, FOVS)
    target = torch.poisson(torch.full((N, G), 2.0), generator=torch.Generator().manual_seed(8))
    depth, target_sum = torch.linspace(20, 40, N), 40.0
    mean = decoded.expression.detach().double().numpy() * depth.numpy()[:, None]
    zero = torch.sigmoid(decoded.zero_logits).detach().double().numpy() if name == "zinb" else np.zeros((N, G))
    x = target.numpy()
    want = np.log(zero * (x == 0) + (1 - zero) * stats.nbinom.pmf(x, size, size / (size + mean)))
    got = decoder.log_likelihood(decoded, target, depth).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    # Cut where even the broadest of these distributions has nothing left.
    k = np.arange(4000)[:, None, None]
    pmf = (1 - zero) * stats.nbinom.pmf(k, size, size / (size + mean))
    assert pmf.sum(0).min() > 0.999 * (1 - zero).min()
    lognorm = (pmf * np.log1p(k * target_sum / depth.numpy()[:, None])).sum(0)
    np.testing.assert_allclose(decoder.lognorm(decoded, depth, target_sum).detach().numpy(), lognorm, rtol=2e-3)


@pytest.mark.parametrize("dispersion", ["gene_fov", "entry"])
@pytest.mark.parametrize("name", ["nb", "zinb"])
def test_every_dispersion_starts_as_that_of_the_gene(name: str, dispersion: str, inputs) -> None:
    plain, decoder = make(name), make(name, dispersion=dispersion, n_fovs=3)
    for parameter, value in plain.state_dict().items():
        assert torch.equal(decoder.state_dict()[parameter], value), parameter
    target = torch.ones(N, G)
    depth = torch.full((N,), 25.0)
    want = plain.log_likelihood(plain(*inputs), target, depth)
    assert torch.equal(decoder.log_likelihood(decoder(*inputs, FOVS), target, depth), want)


def test_a_dispersion_per_fov_learns_from_its_own_fov(inputs) -> None:
    decoder = make("nb", dispersion="gene_fov", n_fovs=3)
    fov = torch.tensor([1, 1, 1, -1, -1, 1, 1])
    decoder.log_likelihood(decoder(*inputs, fov), torch.ones(N, G), torch.full((N,), 25.0)).sum().backward()
    gradient = decoder.fov_log_dispersion.grad
    assert bool((gradient[1] != 0).all())
    assert not bool(gradient[[0, 2]].any())


def test_a_dispersion_per_fov_needs_the_fov(inputs) -> None:
    with pytest.raises(ValueError, match="needs `fov`"):
        make("nb", dispersion="gene_fov", n_fovs=3)(*inputs)


def test_an_extreme_dispersion_per_entry_stays_finite(inputs) -> None:
    for weight in (-1e6, 1e6):
        decoder = make("nb", dispersion="entry")
        with torch.no_grad():
            decoder.entry_dispersion.fill_(weight)
        decoded = decoder(*inputs)
        assert bool(torch.isfinite(decoder.log_likelihood(decoded, torch.ones(N, G), torch.full((N,), 25.0))).all())
        assert bool(torch.isfinite(decoder.lognorm(decoded, torch.full((N,), 25.0), 40.0)).all())
