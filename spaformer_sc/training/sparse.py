"""Products of sparse matrices, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numba import njit
from numpy.typing import NDArray


def dense_product(left: sp.csr_matrix, right: sp.csr_matrix) -> NDArray[np.float32]:
    """Product of two matrices, CSR float32, as a dense one.

    SciPy makes a sparse matrix of such a product first, which takes several times as long.

    Raises
    ------
    ValueError
        If the columns of ``left`` are not as many as the rows of ``right``.
    """
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"matrices of {left.shape} and {right.shape} have no product")
    out = np.zeros((left.shape[0], right.shape[1]), dtype=np.float32)
    _add_product(left.indptr, left.indices, left.data, right.indptr, right.indices, right.data, out)
    return out


@njit(nogil=True)
def _add_product(
    left_starts: NDArray[Any],
    left_columns: NDArray[Any],
    left: NDArray[np.float32],
    right_starts: NDArray[Any],
    right_columns: NDArray[Any],
    right: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    for row in range(len(left_starts) - 1):
        for i in range(left_starts[row], left_starts[row + 1]):
            weight, at = left[i], left_columns[i]
            for j in range(right_starts[at], right_starts[at + 1]):
                out[row, right_columns[j]] += weight * right[j]
