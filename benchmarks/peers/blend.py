"""A stacked blend of the simple methods."""

from __future__ import annotations

import sys

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from peers._cells import Cells, FloatArray
from peers._tuning import Tuned, Validation, as_shares, mix, mixture, split
from peers.knn import expression_knn, joint_knn
from peers.linear import poisson_glm, ridge
from peers.low_rank import kl_nmf, truncated_svd
from peers.means import fov_gene_mean, spatial_knn_mean

COMPONENTS: tuple[Tuned, ...] = (
    fov_gene_mean,
    spatial_knn_mean,
    expression_knn,
    joint_knn,
    truncated_svd,
    kl_nmf,
    ridge,
    poisson_glm,
)


def squared_error_weights(truth: FloatArray, parts: FloatArray) -> FloatArray:
    """Find weights of predictions that make the squared error least.

    All are non-negative (Breiman 1996, "Stacked regressions") but those of the first part, the gene mean, and of the
    constant, which comes last; non-negative least squares after Lawson and Hanson (1974).

    Parameters
    ----------
    truth
        Values of the scored entries.
    parts
        What each part predicts for them, parts × entries.

    Returns
    -------
    Weights of the parts and of the constant.
    """
    from scipy.optimize import nnls

    free = np.stack([parts[0], np.ones(parts.shape[1])])
    design = np.concatenate([parts, free[1:], -free]).astype(np.float64)
    q, r = np.linalg.qr(design.T)
    solution, _ = nnls(r, q.T @ truth)
    weights: FloatArray = solution[:-2].copy()
    weights[[0, -1]] -= solution[-2:]
    return weights


def _own(validation: Validation) -> NDArray[np.float32]:
    shares = as_shares(validation.cells.counts[validation.rows].toarray(), validation.cells.gene_mean)
    return np.asarray(shares[validation.entries], dtype=np.float32)


def blend(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """Impute by a weighted sum of the gene mean, all of :data:`COMPONENTS` and, for rates, the cell's own counts.

    Each component is tuned as it is alone. The weights are those that predict the validation part of the input best:
    weights of a mixture that maximise the likelihood of counts, or least squares of log-normalised values. The
    components then predict from the whole input. What they left in the scratch folder for the same input is read
    instead of computed again, and the seconds it took are written to ``adata.uns["task"]["seconds_before"]``.
    """
    task = adata.uns["task"]
    cells = Cells.of(adata)
    validation = split(cells, task["protocol"], int(task["random_state"]))
    rate = cells.output == "rate"
    parts, finals, seconds = [validation.mean()], [cells.gene_mean], 0.0
    for component in COMPONENTS:
        fit, computed = component.fit(cells, task, stored=True)
        seconds += 0.0 if computed else fit.seconds
        parts.append(fit.inner)
        finals.append(fit.final)
    if rate:
        parts.append(_own(validation))
        finals.append(as_shares(cells.counts.toarray(), cells.gene_mean))
    weights = (
        mixture(validation.truth, np.stack(parts))[0]
        if rate
        else squared_error_weights(validation.truth, np.stack(parts))
    )
    names = ["gene_mean", *(component.name for component in COMPONENTS), "own counts" if rate else "constant"]
    chosen = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(names, weights))
    print(f"blend: weights {chosen}", file=sys.stderr)
    task["seconds_before"] = seconds
    return mix(weights, finals, cells.output), cells.output
