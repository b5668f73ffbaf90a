"""Likelihoods against scipy, sums over all counts against the expectation of log1p."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from spaformer_sc.nn import likelihoods
from spaformer_sc.nn.likelihoods import (
    expected_log1p,
    gaussian_log_prob,
    nb_log_prob,
    poisson_log_prob,
    zinb_log_prob,
)

COUNTS = [0, 1, 2, 3, 10, 100, 5000]
MEANS = [1e-8, 1e-3, 0.1, 1.0, 7.5, 200.0, 4000.0]
DISPERSIONS = [1e-4, 1e-2, 0.3, 1.0, 9.99, 40.0, 1e3, 1e5]
LOGITS = [-30.0, -3.0, 0.0, 3.0, 30.0]


def grid(*axes: list[float]) -> list[Tensor]:
    return [t.flatten() for t in torch.meshgrid(*(torch.tensor(a, dtype=torch.float64) for a in axes), indexing="ij")]


def scipy_nb(x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """`scipy.stats.nbinom.logpmf` with the logarithms of p and 1 − p taken where they do not cancel."""
    log_p, log_q = -torch.log1p(mean / theta), torch.log(mean) - torch.log(mean + theta)
    count, size = x.numpy(), theta.numpy()
    ways = torch.from_numpy(-special.betaln(count + 1, size) - np.log(count + size))
    return torch.where(x == 0, theta * log_p, ways + theta * log_p + x * log_q)


def tolerance(x: Tensor, mean: Tensor) -> Tensor:
    """What single precision allows: a few units in the last place of the largest term."""
    return 1e-6 * (1 + x * x.clamp_min(1).log() + x * mean.log().abs() + mean)


def test_poisson_against_scipy() -> None:
    x, mean = grid(COUNTS, MEANS)
    expected = torch.from_numpy(stats.poisson.logpmf(x, mean))
    torch.testing.assert_close(poisson_log_prob(x, mean), expected, rtol=1e-10, atol=1e-10)
    error = poisson_log_prob(x.int(), mean.float()).double() - expected
    assert (error.abs() <= tolerance(x, mean)).all()


def test_poisson_of_mean_zero() -> None:
    mean = torch.zeros(2, requires_grad=True)
    log_prob = poisson_log_prob(torch.tensor([0.0, 1.0]), mean)
    log_prob[0].backward()
    assert log_prob[0] == 0
    assert -80 < log_prob[1] < -60
    assert mean.grad[0] == -1


def test_nb_against_scipy() -> None:
    x, mean, theta = grid(COUNTS, MEANS, DISPERSIONS)
    ordinary = (mean / theta > 1e-5) & (theta <= 1e3)  # where scipy's 1 − p and Γ keep their digits
    expected = torch.from_numpy(stats.nbinom.logpmf(x, theta, theta / (theta + mean)))
    assert ordinary.sum() > 200
    torch.testing.assert_close(nb_log_prob(x, mean, theta)[ordinary], expected[ordinary], rtol=1e-8, atol=1e-8)


def test_nb_in_the_corners_of_the_grid() -> None:
    """Against products of rising factors: Γ(x+θ)/(Γ(θ) θˣ) = Π (1 + i/θ), i < x."""
    x, mean, theta = grid(COUNTS, MEANS, [*DISPERSIONS, 1e8])
    rising = torch.stack([torch.log1p(torch.arange(int(n), dtype=torch.float64) / t).sum() for n, t in zip(x, theta)])
    expected = x * mean.log() - torch.special.gammaln(x + 1) - (x + theta) * torch.log1p(mean / theta) + rising
    torch.testing.assert_close(nb_log_prob(x, mean, theta), expected, rtol=1e-9, atol=1e-8)
    error = nb_log_prob(x.int(), mean.float(), theta.float()).double() - expected
    limit = tolerance(x, mean) + 1e-6 * x * theta.log().abs()
    assert (error.abs() <= limit).all()


def test_the_series_of_gamma_err_by_less_than_1e_10() -> None:
    """Against sums over i < x of log(1 + i/θ) and of 1 / (θ + i): the rises of log Γ and ψ from θ to θ + x."""
    x, mean, theta = grid([1, 2, 3, 10], [0.3, 2.0], [1e-4, 1e-3, 0.05, 0.5, 2.0, 8.0, 50.0])
    steps = torch.arange(10, dtype=torch.float64)
    below = steps < x[:, None]
    rise = (torch.log1p(steps / theta[:, None]) * below).sum(1)
    expected = x * mean.log() - torch.special.gammaln(x + 1) - (x + theta) * torch.log1p(mean / theta) + rise
    theta.requires_grad_()
    found = nb_log_prob(x, mean, theta)
    (of_theta,) = torch.autograd.grad(found.sum(), theta)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-10)
    theta = theta.detach()
    digamma_rise = (below / (theta[:, None] + steps)).sum(1)
    expected = digamma_rise + 1 - (x + theta) / (mean + theta) - torch.log1p(mean / theta)
    torch.testing.assert_close(of_theta, expected, rtol=1e-12, atol=2e-10)


def test_nb_tends_to_poisson() -> None:
    x, mean = grid(COUNTS[:-1], MEANS[:-1])
    for dtype, atol in ((torch.float64, 1e-3), (torch.float32, 2e-3)):
        arguments = x.to(dtype), mean.to(dtype)
        nb = nb_log_prob(*arguments, torch.tensor(1e8, dtype=dtype))
        torch.testing.assert_close(nb, poisson_log_prob(*arguments), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("theta", [1e-2, 0.7, 30.0])
def test_nb_sums_to_one_with_the_stated_moments(theta: float) -> None:
    mean, x = 3.0, torch.arange(100_000, dtype=torch.float64)
    p = nb_log_prob(x, torch.tensor(mean), torch.tensor(theta)).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    assert (p * x).sum().item() == pytest.approx(mean, rel=1e-7)
    assert (p * (x - mean) ** 2).sum().item() == pytest.approx(mean + mean**2 / theta, rel=1e-6)


def test_nb_of_scalars_and_of_nothing() -> None:
    one = torch.tensor(1.0)
    assert nb_log_prob(one, one, one).item() == pytest.approx(stats.nbinom.logpmf(1, 1, 0.5))
    assert nb_log_prob(torch.zeros(0, 3), torch.zeros(0, 3), torch.ones(3)).shape == (0, 3)


def test_nb_gradient() -> None:
    x, mean, theta = grid([0, 1, 4, 60], [0.05, 1.0, 30.0], [0.05, 1.0, 20.0])
    assert torch.autograd.gradcheck(lambda m, t: nb_log_prob(x, m, t), (mean.requires_grad_(), theta.requires_grad_()))


def test_nb_gradient_of_broadcast_dispersion_is_summed() -> None:
    x = torch.tensor([[0.0, 2.0, 1.0], [4.0, 0.0, 0.0]], dtype=torch.float64)
    mean = torch.tensor([[0.5], [2.0]], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, t: nb_log_prob(x, m, t), (mean, theta))


def test_zinb_against_its_definition() -> None:
    x, mean, theta, logits = grid(COUNTS[:-1], MEANS, DISPERSIONS, LOGITS)
    zero = torch.special.expit(logits)
    nb = scipy_nb(x, mean, theta)
    expected = torch.where(x == 0, torch.log(zero + (1 - zero) * nb.exp()), -torch.log1p(logits.exp()) + nb)
    torch.testing.assert_close(zinb_log_prob(x, mean, theta, logits), expected, rtol=1e-8, atol=1e-6)
    sparse = (mean < 300) & (x <= 10)
    single = zinb_log_prob(x.float(), mean.float(), theta.float(), logits.float()).double()
    torch.testing.assert_close(single[sparse], expected[sparse], rtol=1e-4, atol=1e-4)


def test_zinb_without_inflation_is_nb() -> None:
    x, mean, theta = grid(COUNTS, MEANS, DISPERSIONS)
    torch.testing.assert_close(zinb_log_prob(x, mean, theta, torch.tensor(-1e4)), nb_log_prob(x, mean, theta))


def test_zinb_gradient() -> None:
    x, mean, theta, logits = grid([0, 1, 4], [0.05, 3.0], [0.05, 2.0], [-4.0, 0.0, 4.0])
    arguments = [t.requires_grad_() for t in (mean, theta, logits)]
    assert torch.autograd.gradcheck(lambda m, t, z: zinb_log_prob(x, m, t, z), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_at_the_extremes(dtype: torch.dtype) -> None:
    x, mean, theta, logits = (
        t.to(dtype)
        for t in grid([0, 1, 100, 1e6], [0.0, 1e-38, 1e-8, 1.0, 1e6], [1e-4, 1.0, 1e4, 1e8], [-1e3, -50, 0, 50, 1e3])
    )
    for function, names in ((nb_log_prob, 2), (zinb_log_prob, 3)):
        arguments = [t.clone().requires_grad_() for t in (mean, theta, logits)[:names]]
        value = function(x, *arguments)
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert all(torch.isfinite(a.grad).all() for a in arguments)


@pytest.mark.parametrize("log_scale", [None, -3.0, 0.0, 2.5])
def test_gaussian_against_scipy(log_scale: float | None) -> None:
    x, mean = grid([-5.0, 0.0, 0.3, 8.0], [-1.0, 0.0, 2.0])
    expected = stats.norm.logpdf(x, mean, np.exp(log_scale or 0.0))
    tensor = None if log_scale is None else torch.tensor(log_scale, dtype=torch.float64)
    torch.testing.assert_close(gaussian_log_prob(x, mean, tensor), torch.from_numpy(expected))


def test_half_precision_is_computed_in_single() -> None:
    mean = torch.tensor([0.5, 3.0], dtype=torch.bfloat16)
    x = torch.tensor([1, 4])
    for result in (
        poisson_log_prob(x, mean),
        nb_log_prob(x, mean, mean),
        zinb_log_prob(x, mean, mean, mean),
        gaussian_log_prob(x, mean),
        expected_log1p(mean[None], mean[:1]),
    ):
        assert result.dtype == torch.float32
    single = mean.float()
    for function, n in ((poisson_log_prob, 1), (nb_log_prob, 2), (zinb_log_prob, 3), (gaussian_log_prob, 1)):
        torch.testing.assert_close(function(x, *[mean] * n), function(x, *[single] * n))


def summed(mean: float, scale: float, theta: float | None) -> float:
    """E[log1p(scale · c)] by summing over all counts that matter, in double."""
    spread = np.sqrt(mean) * 12 + 40
    if theta is not None:
        spread += 50 * mean / np.sqrt(theta) + 50 * mean / theta
    c = np.arange(max(0, int(mean - spread)), int(mean + spread) + 1)
    if theta is None:
        log_p = stats.poisson.logpmf(c, mean)
    else:
        log_p = (
            special.gammaln(c + theta) - special.gammaln(theta) - special.gammaln(c + 1)
            + c * (np.log(mean) - np.log(mean + theta)) - theta * np.log1p(mean / theta)
        )  # fmt: skip
    return float(np.sum(np.exp(log_p) * np.log1p(scale * c)))


EXPECTED_MEANS = [1e-8, 1e-4, 0.02, 0.4, 1.0, 5.0, 100.0, 1e5]
EXPECTED_SCALES = [1e-3, 0.05, 1.0, 30.0, 1e4]


@pytest.mark.parametrize("theta", [None, 1e-4, 0.05, 1.0, 8.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expected_log1p_against_the_sum_over_counts(theta: float | None, dtype: torch.dtype) -> None:
    means = [m for m in EXPECTED_MEANS if theta is None or m / theta < 1e4]
    expected = torch.tensor([[summed(m, s, theta) for m in means] for s in EXPECTED_SCALES], dtype=dtype)
    mean = torch.tensor(means, dtype=dtype).expand_as(expected)
    scale = torch.tensor(EXPECTED_SCALES, dtype=dtype)[:, None]
    dispersion = None if theta is None else torch.full((len(means),), theta, dtype=dtype)
    together = expected_log1p(mean, scale, dispersion)
    rtol = 1e-6 if dtype == torch.float32 else 1e-7  # of rounding, of the rule itself
    torch.testing.assert_close(together, expected, rtol=rtol, atol=0)
    for j in range(len(means)):  # large scales beside small ones
        column = expected_log1p(mean[:, j : j + 1], scale, None if dispersion is None else dispersion[j])
        torch.testing.assert_close(column[:, 0], expected[:, j], rtol=rtol, atol=0)
    for i, j in np.ndindex(*expected.shape):  # alone, an entry is evaluated at other nodes
        alone = expected_log1p(mean[i : i + 1, j : j + 1], scale[i], None if dispersion is None else dispersion[j])
        torch.testing.assert_close(alone[0, 0], expected[i, j], rtol=rtol, atol=0)


def test_expected_log1p_of_large_overdispersed_means_is_the_gamma_limit() -> None:
    """For μ → ∞ the count is θ/μ times a Gamma variable: E log c = ψ(θ) + log(μ/θ)."""
    mean, theta = torch.tensor([[1e5]]), torch.tensor([[2.0]])
    expected = special.digamma(2.0) + np.log(1e5 / 2.0) + np.log(1e4)
    assert expected_log1p(mean, torch.tensor([[1e4]]), theta).item() == pytest.approx(expected, rel=1e-5)


def test_expected_log1p_broadcasts_and_crosses_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(300, 500, generator=generator) * 4
    scale = torch.rand(300, 1, generator=generator) * 3
    theta = torch.rand(500, generator=generator) + 0.1
    result = expected_log1p(mean, scale, theta)
    torch.testing.assert_close(expected_log1p(mean[260:], scale[260:], theta), result[260:], rtol=1e-6, atol=0)
    torch.testing.assert_close(expected_log1p(mean, scale.expand(300, 500), theta.expand(300, 500)), result)
    torch.testing.assert_close(expected_log1p(mean, torch.tensor(2.0)), expected_log1p(mean, torch.full((300, 1), 2.0)))


@pytest.mark.parametrize("block", [1, 4, 6, 7, 1000])
def test_expected_log1p_does_not_depend_on_how_many_rows_are_taken_at_a_time(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    mean, scale = torch.rand(5, 3, generator=generator) * 4, torch.rand(5, 1, generator=generator) * 3
    theta, zero = torch.rand(5, 3, generator=generator) + 0.1, torch.rand(5, 1, generator=generator)
    expected = torch.cat([expected_log1p(*(t[i : i + 1] for t in (mean, scale, theta, zero))) for i in range(5)])
    monkeypatch.setattr(likelihoods, "_BLOCK", block)
    torch.testing.assert_close(expected_log1p(mean, scale, theta, zero), expected, rtol=1e-6, atol=0)


def test_expected_log1p_with_zero_inflation() -> None:
    mean, theta = torch.tensor([[0.5, 2.0], [4.0, 0.1]]), torch.tensor([1.0, 3.0])
    scale, zero = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0, 0.25], [1.0, 0.9]])
    counted = expected_log1p(mean, scale, theta)
    torch.testing.assert_close(expected_log1p(mean, scale, theta, zero), counted * (1 - zero))


def test_expected_log1p_of_nothing_is_nothing() -> None:
    assert expected_log1p(torch.zeros(2, 3), torch.ones(2, 1)).eq(0).all()
    assert expected_log1p(torch.ones(2, 3), torch.tensor([[0.0], [0.0]]), torch.ones(3)).eq(0).all()
    assert expected_log1p(torch.zeros(0, 3), torch.ones(0, 1)).shape == (0, 3)
    assert expected_log1p(torch.zeros(3, 0), torch.ones(3, 1)).shape == (3, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_expected_log1p_refuses_means_that_are_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="`mean` must be finite"):
        expected_log1p(torch.tensor([[1.0, bad]]), torch.ones(1, 1))
