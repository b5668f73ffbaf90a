"""Three ways to hide part of a count matrix so that an imputation can be scored on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

Matrix: TypeAlias = NDArray[Any] | sparse.csr_matrix
"""A dense array or a scipy sparse matrix, cells × genes."""

_BLOCK_ENTRIES = 2**17


def row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """Yield consecutive row slices of about a hundred thousand entries each, so that dense temporaries stay small."""
    step = max(1, _BLOCK_ENTRIES // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def as_counts(counts: Matrix, name: str) -> sparse.csr_matrix:
    """Return counts as a new canonical CSR matrix of the same dtype, after checking that they are counts.

    Parameters
    ----------
    counts
        Dense or sparse matrix, cells × genes.
    name
        Name of the argument, for messages.

    Returns
    -------
    CSR copy with sorted indices, no duplicates and no stored zeros.

    Raises
    ------
    TypeError
        If the dtype is neither integer nor floating point.
    ValueError
        If the matrix is not two-dimensional, or holds values that are negative, not finite or not whole.
    """
    if np.ndim(counts) != 2:
        raise ValueError(f"`{name}` has {np.ndim(counts)} dimension(s); give a matrix of cells × genes.")
    matrix = sparse.csr_matrix(counts, copy=True)
    if matrix.dtype.kind not in "iuf":
        raise TypeError(f"`{name}` has dtype {matrix.dtype}; counts have to be integer or floating point numbers.")
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    data = matrix.data
    if not np.isfinite(data).all():
        raise ValueError(f"`{name}` holds NaN or infinite values; give raw counts.")
    if (data < 0).any():
        raise ValueError(f"`{name}` holds negative values (smallest: {data.min():g}); give raw counts.")
    if (data != np.floor(data)).any():
        example = data[data != np.floor(data)][0]
        raise ValueError(f"`{name}` holds values that are not whole numbers ({example:g}); give raw counts.")
    return matrix


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"`share={share!r}` has to lie strictly between 0 and 1.")


def _entry_rows(matrix: sparse.csr_matrix) -> NDArray[np.int64]:
    """Return the row of every stored entry."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def _with_data(matrix: sparse.csr_matrix, data: NDArray[Any]) -> sparse.csr_matrix:
    """Return a matrix with the sparsity pattern of `matrix` and other values, zeros removed."""
    result = sparse.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape, copy=True)
    result.eliminate_zeros()
    return result


@dataclass(frozen=True, eq=False)
class CountSplit:
    """Counts split in two by :func:`thin`.

    Parameters
    ----------
    train
        Counts to impute from, CSR, cells × genes.
    held
        Held-out counts, CSR, cells × genes; ``train + held`` are the original counts.
    """

    train: sparse.csr_matrix
    held: sparse.csr_matrix


def thin(counts: Matrix, share: float = 0.5, random_state: int | np.random.Generator = 0) -> CountSplit:
    r"""Split every count binomially into a training part and a held-out part.

    Each transcript goes to the training part with probability `share`, independently:
    :math:`\mathrm{train}_{ig} \sim \mathrm{Binomial}(x_{ig}, \mathrm{share})` and
    :math:`\mathrm{held}_{ig} = x_{ig} - \mathrm{train}_{ig}`. Given Poisson counts the two parts are independent, with
    means in the ratio share : 1 − share.

    Parameters
    ----------
    counts
        Raw counts, cells × genes, dense or sparse. Not changed.
    share
        Expected share of the counts that goes to the training part, strictly between 0 and 1.
    random_state
        Seed or generator.

    Returns
    -------
    The two parts as CSR matrices with the shape and dtype of `counts`, whose sum is exactly `counts`.

    Raises
    ------
    TypeError, ValueError
        If `counts` are not counts, or `share` is out of range.

    References
    ----------
    Batson, Royer and Webber (2019), "Molecular cross-validation for single-cell RNA-seq", bioRxiv 786269.
    Neufeld, Gao, Popp, Battle and Witten (2023), "Inference after latent variable estimation for single-cell RNA
    sequencing data", Biostatistics (Poisson count splitting).
    """
    _check_share(share)
    matrix = as_counts(counts, "counts")
    rng = np.random.default_rng(random_state)
    ones = matrix.data == 1
    kept = np.empty_like(matrix.data)
    kept[ones] = rng.random(int(ones.sum())) < share
    kept[~ones] = rng.binomial(matrix.data[~ones].astype(np.int64), share)
    return CountSplit(train=_with_data(matrix, kept), held=_with_data(matrix, matrix.data - kept))


@dataclass(frozen=True, eq=False)
class EntrySplit:
    """Single entries hidden by :func:`hide_entries`.

    Parameters
    ----------
    train
        Counts with the hidden entries set to zero, CSR, cells × genes.
    hidden
        True where an entry was hidden, zeros included; boolean array, cells × genes.
    truth
        Log-normalised value of the hidden entries, CSR, float32, cells × genes. A zero is stored nowhere: what it means
        (a hidden zero, or an entry that was not hidden) is said by `hidden`, which scores take as `mask`.
    """

    train: sparse.csr_matrix
    hidden: NDArray[np.bool_]
    truth: sparse.csr_matrix


def hide_entries(
    counts: Matrix, share: float = 0.3, random_state: int | np.random.Generator = 0, target_sum: float = 250.0
) -> EntrySplit:
    r"""Set a random share of all entries, zeros included, to zero.

    Each entry is hidden with probability `share`, independently. A cell whose counts would all be hidden, and a cell
    without counts, is left alone: none of its entries is hidden. The truth is
    :math:`\log(1 + \mathrm{target\_sum} \cdot x_{ig} / \sum_h x_{ih})` with the library size of the full cell.

    Parameters
    ----------
    counts
        Raw counts, cells × genes, dense or sparse. Not changed.
    share
        Probability that an entry is hidden, strictly between 0 and 1.
    random_state
        Seed or generator.
    target_sum
        Library size that the truth is scaled to, in counts.

    Returns
    -------
    The visible counts (dtype of `counts`), the mask of the hidden entries and their truth.

    Raises
    ------
    TypeError, ValueError
        If `counts` are not counts, or `share` or `target_sum` is out of range.

    References
    ----------
    Wen et al. (2023), "Single Cells Are Spatial Tokens: Transformers for Spatial Transcriptomic Data Imputation",
    arXiv 2302.03038 (evaluation).
    """
    _check_share(share)
    if not target_sum > 0:
        raise ValueError(f"`target_sum={target_sum!r}` has to be positive.")
    matrix = as_counts(counts, "counts")
    rng = np.random.default_rng(random_state)
    hidden = np.empty(matrix.shape, dtype=bool)
    for rows in row_blocks(matrix.shape):
        hidden[rows] = rng.random(hidden[rows].shape, dtype=np.float32) < share

    cells = _entry_rows(matrix)
    n_cells = matrix.shape[0]
    visible = ~hidden[cells, matrix.indices]
    hidden[np.bincount(cells[visible], minlength=n_cells) == 0] = False

    covered = hidden[cells, matrix.indices]
    library = np.bincount(cells, weights=matrix.data, minlength=n_cells)
    truth = np.where(covered, np.log1p(matrix.data / library[cells] * target_sum), 0).astype(np.float32)
    train = np.where(covered, matrix.dtype.type(0), matrix.data)
    return EntrySplit(train=_with_data(matrix, train), hidden=hidden, truth=_with_data(matrix, truth))


@dataclass(frozen=True, eq=False)
class BlockSplit:
    """Genes hidden in some fields of view by :func:`hide_blocks`.

    Parameters
    ----------
    train
        Counts with the hidden blocks set to zero, CSR, cells × genes.
    held
        The hidden counts, CSR, cells × genes; ``train + held`` are the original counts.
    missing
        True where a gene is hidden in a field of view; boolean array, fields of view × genes.
    fovs
        Name of the field of view of every row of `missing`.
    fov_index
        Row of `missing` that each cell belongs to, one integer per cell.
    """

    train: sparse.csr_matrix
    held: sparse.csr_matrix
    missing: NDArray[np.bool_]
    fovs: NDArray[Any]
    fov_index: NDArray[np.intp]

    def layer(self) -> NDArray[np.bool_]:
        """Return `missing` for every cell: boolean array, cells × genes."""
        return self.missing[self.fov_index]


def hide_blocks(
    counts: Matrix, labels: ArrayLike, share: float = 0.3, random_state: int | np.random.Generator = 0
) -> BlockSplit:
    """Hide whole genes in some fields of view, as when panels differ.

    Every gene is first given one field of view in which it stays visible, evenly over fields of view and at random;
    then each field of view hides ``round(share × genes)`` of the other genes at random. So every field of view hides
    the same number of genes and no gene is hidden everywhere. A cell may be left without visible counts.

    Parameters
    ----------
    counts
        Raw counts, cells × genes, dense or sparse. Not changed.
    labels
        Field of view of each cell, one label per cell.
    share
        Share of the genes hidden in each field of view, strictly between 0 and 1. With ``n`` fields of view at most
        about ``1 − 1 / n``, since each gene stays visible in one of them.
    random_state
        Seed or generator.

    Returns
    -------
    The visible and the hidden counts (dtype of `counts`) and the genes missing in each field of view.

    Raises
    ------
    TypeError, ValueError
        If `counts` are not counts; if `labels` have a wrong length, are missing for a cell or name fewer than two
        fields of view; if `share` is out of range, hides no gene, or leaves some gene visible nowhere.
    """
    _check_share(share)
    matrix = as_counts(counts, "counts")
    names = np.asarray(labels)
    n_cells, n_genes = matrix.shape
    if names.shape != (n_cells,):
        raise ValueError(f"`labels` has shape {names.shape}; give one label for each of the {n_cells} cells.")
    n_unlabelled = sum(1 for name in names if name is None or name != name)
    if n_unlabelled:
        raise ValueError(f"`labels` is missing for {n_unlabelled} cell(s); give every cell a label.")
    fovs, fov_index = np.unique(names, return_inverse=True)
    n_fovs = len(fovs)
    if n_fovs < 2:
        raise ValueError(
            f"`labels` name {n_fovs} field(s) of view; hiding whole genes needs at least two, so that each gene stays "
            "visible in one. Use `thin` or `hide_entries` for a single field of view."
        )
    n_hidden = round(share * n_genes)
    most = n_genes - -(-n_genes // n_fovs)
    if not 1 <= n_hidden <= most:
        raise ValueError(
            f"`share={share!r}` hides {n_hidden} of {n_genes} genes in each of {n_fovs} fields of view; allowed are 1 "
            f"to {most}, so that each gene stays visible in at least one."
        )

    rng = np.random.default_rng(random_state)
    home = rng.permutation(n_genes) % n_fovs
    missing = np.zeros((n_fovs, n_genes), dtype=bool)
    for fov in range(n_fovs):
        missing[fov, rng.choice(np.flatnonzero(home != fov), size=n_hidden, replace=False)] = True

    covered = missing[fov_index[_entry_rows(matrix)], matrix.indices]
    zero = matrix.dtype.type(0)
    return BlockSplit(
        train=_with_data(matrix, np.where(covered, zero, matrix.data)),
        held=_with_data(matrix, np.where(covered, matrix.data, zero)),
        missing=missing,
        fovs=fovs,
        fov_index=fov_index,
    )
