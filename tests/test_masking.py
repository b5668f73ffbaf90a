"""Corruptions: what is hidden, what is asked for, and that nothing is rescaled or leaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spaformer_sc.nn.masking import CORRUPTIONS, MaskingRates, MaskingSchedule, SparseCounts, depth, thin

N, G = 400, 30


@pytest.fixture
def counts() -> SparseCounts:
    dense = torch.poisson(torch.full((N, G), 0.7), generator=torch.Generator().manual_seed(1))
    rows, cols = dense.nonzero(as_tuple=True)
    return SparseCounts(rows, cols, dense[rows, cols], (N, G))


SHARE = torch.full((G,), 1 / G)


def dense(counts: SparseCounts) -> torch.Tensor:
    return torch.from_numpy(counts.csr().toarray())


def corrupt(name: str, counts: SparseCounts, measured: torch.Tensor | None = None, seed: int = 0, **rates):
    return CORRUPTIONS[name](counts, measured, SHARE, MaskingRates(**rates), torch.Generator().manual_seed(seed))


def test_thinning_parts_add_up_and_follow_the_binomial(counts: SparseCounts) -> None:
    kept = torch.stack([dense(corrupt("thinning", counts, seed=s, thinning=(0.3, 0.3)).counts) for s in range(200)])
    full = dense(counts)
    view = corrupt("thinning", counts, seed=3, thinning=(0.3, 0.3))
    assert torch.equal(dense(view.counts) + dense(view.target), full)
    assert view.visible is None
    assert view.asked is None
    assert torch.equal(view.target_depth, dense(view.target).sum(1))
    many = full >= 2
    np.testing.assert_allclose(kept.mean(0)[many].mean(), 0.3 * full[many].mean(), rtol=0.02)
    variance = kept.var(0)
    np.testing.assert_allclose(variance[many].mean(), (0.21 * full[many]).mean(), rtol=0.05)


def test_thin_keeps_integers_between_zero_and_the_count() -> None:
    values = torch.tensor([1.0, 2.0, 7.0, 1e5]).repeat(500)
    kept = thin(values, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(kept, kept.round())
    assert bool((kept >= 0).all())
    assert bool((kept <= values).all())
    assert abs(float((kept / values)[3::4].mean()) - 0.5) < 1e-3


@pytest.mark.parametrize(("name", "share"), [("bilevel", 0.5 * 0.4), ("tokens", 0.5), ("features", 0.4)])
def test_masks_hide_the_stated_share_and_nothing_is_rescaled(counts: SparseCounts, name: str, share: float) -> None:
    view = corrupt(name, counts, tokens=0.5, features=0.4)
    full = dense(counts)
    hidden = ~view.visible
    assert float(hidden.float().mean()) == pytest.approx(share, abs=0.06)
    assert torch.equal(dense(view.counts), full * view.visible)
    assert torch.equal(view.asked, hidden)
    assert torch.equal(dense(view.target), full)
    np.testing.assert_allclose(view.target_depth, full.sum(1), rtol=1e-5)
    touched = hidden.any(1).float().mean()
    if name == "tokens":
        assert bool((hidden.all(1) == hidden.any(1)).all())
    if name == "bilevel":
        assert float(touched) == pytest.approx(0.5, abs=0.08)


def test_none_hides_nothing(counts: SparseCounts) -> None:
    view = corrupt("none", counts)
    assert torch.equal(dense(view.counts), dense(counts))
    assert torch.equal(dense(view.target), dense(counts))
    assert view.asked is None


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_unmeasured_entries_are_neither_shown_nor_asked_for(counts: SparseCounts, name: str) -> None:
    measured = torch.rand((N, G), generator=torch.Generator().manual_seed(5)) < 0.8
    full = dense(counts) * measured
    rows, cols = full.nonzero(as_tuple=True)
    view = corrupt(name, SparseCounts(rows, cols, full[rows, cols], (N, G)), measured)
    assert not bool((view.visible & ~measured).any())
    assert not bool((view.asked & ~measured).any())


def test_depth_is_unbiased_by_what_is_hidden() -> None:
    share = torch.rand(G, generator=torch.Generator().manual_seed(2))
    share = share / share.sum()
    expected = 50.0 * share.expand(N, G)
    visible = torch.rand((N, G), generator=torch.Generator().manual_seed(3)) < 0.4
    np.testing.assert_allclose(depth((expected * visible).sum(1), visible, share), torch.full((N,), 50.0), rtol=1e-4)
    assert torch.equal(depth(expected.sum(1), None, share), expected.sum(1))
    assert float(depth(torch.zeros(1), torch.zeros((1, G), dtype=torch.bool), share)) == 0.0


def test_a_schedule_moves_linearly_between_its_rates() -> None:
    schedule = MaskingSchedule(tokens=(0.2, 0.6), features=0.5)
    assert schedule.at(0.0) == MaskingRates(0.2, 0.5)
    assert schedule.at(0.5).tokens == pytest.approx(0.4)
    assert schedule.at(1.0) == MaskingRates(0.6, 0.5)
