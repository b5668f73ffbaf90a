"""What is held out, by its exact rules: how much, of what, and the shares and typical values of genes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

from spaformer_sc.data import _split
from spaformer_sc.data._split import gene_shares, hold_out, hold_out_entries, in_blocks, typical_values


def poisson(mean: float, shape: tuple[int, int], seed: int = 0) -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(seed).poisson(mean, shape).astype(np.float32))


# --- transcripts ------------------------------------------------------------------------------------------------------


def test_parts_do_not_depend_on_how_many_counts_are_taken_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = poisson(3.0, (23, 9))
    given = counts.copy()
    found = []
    for at_a_time in (7, 10**6):
        monkeypatch.setattr(_split, "ENTRIES_AT_A_TIME", at_a_time)
        split = hold_out(counts, validation=0.2, test=0.3, rng=np.random.default_rng(1))
        found.append([part.toarray() for part in (split.train, split.validation, split.test)])
    np.testing.assert_array_equal(*found)
    assert (counts != given).nnz == 0
    assert all(part.dtype == np.float32 for part in found[0])


# --- entries ----------------------------------------------------------------------------------------------------------


def held_blocks(missing_blocks: NDArray[np.bool_], share: float, seed: int = 0) -> tuple[int, NDArray[np.bool_]]:
    """Hold out of a matrix with two cells in each FOV: how many blocks (FOVs, genes), and which."""
    fovs = np.repeat(np.arange(len(missing_blocks)), 2)
    missing = missing_blocks[fovs]
    counts = sp.csr_matrix(np.where(missing, 0, 1).astype(np.float32))
    held = hold_out_entries(counts, missing, fovs, share, np.random.default_rng(seed))
    np.testing.assert_array_equal(held[::2], held[1::2])
    assert not (held & missing).any()
    return int(held[::2].sum()), held[::2]


@pytest.mark.parametrize(
    ("n_fovs", "share", "expected"),
    [
        (40, 0.1, 40),  # a tenth of the 400 that are measured
        (40, 0.02, 30),  # at least 30
        (40, 0.9, 97),  # at most a quarter of those that may be hidden, one of each gene may not: (400 − 10) // 4
        (8, 0.2, 17),  # (80 − 10) // 4
    ],
)
def test_number_of_genes_hidden_in_fields_of_view(n_fovs: int, share: float, expected: int) -> None:
    missing = np.zeros((n_fovs, 11), bool)
    missing[: n_fovs // 2, :2] = True
    assert held_blocks(missing, share)[0] == expected


def test_a_gene_stays_measured_in_a_field_of_view_where_it_was() -> None:
    missing = np.random.default_rng(1).random((6, 40)) < 0.5
    missing[0, :3] = False
    missing[1:, :3] = True  # measured in but one
    missing[:, 3] = True  # in none
    for seed in range(5):
        _, held = held_blocks(missing, 1.0, seed)
        assert held.any()
        assert not held[:, :4].any()
        somewhere = ~missing.all(axis=0)
        assert (~missing & ~held).any(axis=0)[somewhere].all()


def test_most_of_what_is_missing_decides() -> None:
    fovs = np.repeat([0, 1], 4)
    missing = np.zeros((8, 6), bool)
    missing[:4, 0] = True
    missing[4:, 1] = [True, True, True, False]
    assert in_blocks(missing, fovs)  # 4 of 7
    missing[4, 2] = True
    assert not in_blocks(missing, fovs)  # 4 of 8
    missing[:, 5] = True
    assert not in_blocks(missing, fovs)  # measured nowhere


def test_the_last_counts_of_a_cell_are_given_back_and_only_these() -> None:
    counts = sp.csr_matrix(np.array([[1, 0], [1, 1], [0, 0], [2, 0]], np.float32).repeat(50, axis=0))
    nothing = np.zeros((200, 2), bool)
    held = hold_out_entries(counts, nothing, np.zeros(200, dtype=np.int64), 0.5, np.random.default_rng(0))
    dense = counts.toarray()
    assert (dense * ~held).sum(axis=1)[dense.any(axis=1)].all()
    assert (held[:50, 1] & ~held[:50, 0]).any()
    assert held[50:100].any(axis=0).all()
    assert not held[50:100].all(axis=1).any()
    assert not held[100:150].any()


# --- shares and typical values ----------------------------------------------------------------------------------------


def test_shares_are_totals_with_half_a_transcript_more() -> None:
    counts = sp.csr_matrix(np.array([[3, 0, 1], [5, 0, 0]], np.float32))
    np.testing.assert_allclose(gene_shares(counts, None), np.array([8.5, 0.5, 1.5]) / 10.5, rtol=1e-6)


@pytest.mark.parametrize("factor", [1, 1e-3])
def test_shares_where_entries_are_missing_are_the_fixed_point_of_their_definition(factor: float) -> None:
    counts = poisson(2.0, (60, 8)).toarray() * factor
    counts[:, 6] = 0
    missing = np.random.default_rng(1).random(counts.shape) < 0.3
    missing[:, 7] = True  # measured nowhere
    missing[0] = True  # nothing measured in the cell
    counts[missing] = 0
    found = gene_shares(sp.csr_matrix(counts), missing).astype(float)
    depth = counts.sum(axis=1)[1:] / (~missing[1:] @ found)
    exposure = depth @ ~missing[1:]
    expected = np.append(counts.sum(axis=0)[:7] / exposure[:7], 0) + 0.5 / depth.sum()
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-5)
    assert found.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("at_a_time", [1, 20, 1000])
def test_typical_values_in_parts_of_cells(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    monkeypatch.setattr(_split, "ENTRIES_AT_A_TIME", at_a_time)
    counts = poisson(1.0, (31, 6))
    share = gene_shares(counts, None)
    dense = counts.toarray()
    library = np.maximum(dense.sum(axis=1, keepdims=True), 1)
    expected = np.log1p(dense / library * 40.0).mean(axis=0)
    found = typical_values(counts, None, share, 40.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float32


def test_typical_values_of_genes_and_cells_without_a_measurement() -> None:
    counts = poisson(2.0, (12, 4)).toarray() + 1
    missing = np.zeros(counts.shape, bool)
    missing[:, 3] = True
    missing[0] = True
    missing[1:, 2] = True
    missing[5, 2] = False  # the only measurement of the gene
    counts[missing] = 0
    share = np.array([0.2, 0.3, 0.1, 0.4], np.float32)
    found = typical_values(sp.csr_matrix(counts), missing, share, 10.0)
    library = counts.sum(axis=1) / np.maximum(~missing @ share, 1e-6)
    values = np.log1p(counts / np.maximum(library, 1e-9)[:, None] * 10)
    np.testing.assert_allclose(found, [values[1:, 0].mean(), values[1:, 1].mean(), values[5, 2], 0], rtol=1e-5)
