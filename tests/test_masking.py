"""Corruptions: what is hidden, what is asked for, and that nothing is rescaled or leaks."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from spaformer_sc.nn import masking
from spaformer_sc.nn.masking import CORRUPTIONS, WHOLE_FIELD, MaskingRates, MaskingSchedule, SparseCounts, depth, thin

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


def test_counts_come_back_from_their_sparse_form_with_cells_and_genes_without_any() -> None:
    matrix = np.array([[0, 0, 0, 0], [0, 2, 0, 1], [5, 0, 0, 0], [0, 0, 0, 0]], dtype=np.int64)
    counts = SparseCounts.of(sp.csr_matrix(matrix))
    assert counts.shape == (4, 4)
    assert (counts.values.dtype, counts.rows.dtype, counts.cols.dtype) == (torch.float32, torch.int64, torch.int64)
    np.testing.assert_array_equal(counts.csr().toarray(), matrix)
    assert counts.csr().dtype == np.float32
    assert counts.total().tolist() == [0, 3, 5, 0]
    shown = torch.ones(4, 4, dtype=torch.bool)
    shown[1, 3] = False
    left = counts.where(shown)
    np.testing.assert_array_equal(left.csr().toarray(), matrix * shown.numpy())
    assert torch.equal(left.rows, counts.rows)


def test_genes_are_hidden_in_all_cells_at_the_stated_share(counts: SparseCounts) -> None:
    views = [corrupt("genes", counts, seed=seed, features=0.3) for seed in range(40)]
    hidden = torch.stack([~view.visible for view in views])
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    assert float(hidden.float().mean()) == pytest.approx(0.3, abs=0.05)
    assert torch.equal(views[0].asked, hidden[0])
    assert torch.equal(dense(views[0].target), dense(counts))


def test_how_much_is_thinned_is_drawn_from_the_whole_range() -> None:
    whole = torch.full((2000,), 50.0)
    counts = SparseCounts(torch.arange(2000), torch.zeros(2000, dtype=torch.int64), whole, (2000, 1))
    shares = []
    for seed in range(60):
        view = CORRUPTIONS["thinning"](
            counts, None, torch.ones(1), MaskingRates(thinning=(0.2, 0.6)), torch.Generator().manual_seed(seed)
        )
        shares.append(float(view.counts.values.sum() / whole.sum()))
    assert 0.195 < min(shares) < 0.25
    assert 0.55 < max(shares) < 0.605
    assert np.mean(shares) == pytest.approx(0.4, abs=0.04)


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_depth_of_the_target_takes_in_what_was_not_measured(counts: SparseCounts, name: str) -> None:
    measured = torch.ones((N, G), dtype=torch.bool)
    measured[:, :10] = False
    view = corrupt(name, counts.where(measured), measured)
    torch.testing.assert_close(view.target_depth, view.target.total() * 1.5)
    assert view.measured is measured


def test_nothing_is_hidden_at_a_share_of_zero_and_all_at_one(counts: SparseCounts) -> None:
    for name in ("bilevel", "tokens", "features", "genes"):
        assert corrupt(name, counts, tokens=0.0, features=0.0).visible.all()
        assert not corrupt(name, counts, tokens=1.0, features=1.0).visible.any()


def test_each_cell_draws_one_of_several_corruptions_and_all_alike(counts: SparseCounts) -> None:
    rates = MaskingRates(tokens=1.0, features=0.5)
    view = masking.corrupt(("features", "none", "tokens"), counts, None, SHARE, rates, torch.Generator().manual_seed(0))
    n_visible = view.visible.sum(1)
    none, tokens = n_visible == G, n_visible == 0
    assert [float(kind.float().mean()) for kind in (none, tokens)] == pytest.approx([1 / 3, 1 / 3], abs=0.08)
    assert torch.equal(dense(view.counts), dense(counts) * view.visible)
    assert view.asked[none].all()
    assert torch.equal(view.asked[~none], ~view.visible[~none])


def test_corruptions_of_a_whole_field_are_drawn_as_often_as_the_others(counts: SparseCounts) -> None:
    assert set(WHOLE_FIELD) <= set(CORRUPTIONS)
    names, kinds = ("none", "genes", "tokens", "features"), []
    for seed in range(160):
        view = masking.corrupt(names, counts, None, SHARE, MaskingRates(1.0, 0.5), torch.Generator().manual_seed(seed))
        hidden = ~view.visible
        kinds.append(bool(hidden.any() and torch.equal(hidden, hidden[:1].expand_as(hidden))))
    assert np.mean(kinds) == pytest.approx(1 / 4, abs=0.1)


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


def test_a_schedule_left_alone_keeps_the_rates_of_a_masking_left_alone() -> None:
    for progress in (0.0, 0.4, 1.0):
        assert MaskingSchedule().at(progress) == MaskingRates()
    assert MaskingSchedule(thinning=(0.1, 0.2)).at(0.5).thinning == (0.1, 0.2)
