"""Linear models of a gene on the expression of the cell and of its neighbours in space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers._cells import Cells, FloatArray, generator, top_eigenvectors
from peers._tuning import Setting, Tuned, hide_more_entries
from spaformer_sc.metrics import thin

_SURROUNDINGS = 10
_HIDDEN = 0.3
_BATCH = 256
_LEARNING_RATE = 1e-2
_LARGEST_LOGIT = 10.0


def features(cells: Cells, k: int) -> NDArray[np.float32]:
    """Return what a cell's rates are regressed on, cells × (2 · genes + 1).

    Log-normalised values of the cell, their mean over the k cells nearest in space (the cell itself left out), and the
    logarithm of depth; all of them centred, and 0 where hidden.
    """
    around = cells.around(k)
    depth = np.log(np.maximum(cells.depth, 1) / cells.typical_depth)
    blocks = [cells.centred, around - around.mean(axis=0), (depth - depth.mean())[:, None]]
    return np.hstack(blocks).astype(np.float32)


def _halves(cells: Cells, rng: np.random.Generator) -> tuple[Cells, Cells]:
    parts = thin(cells.counts, 0.5, random_state=rng)
    return replace(cells, counts=parts.train), replace(cells, counts=parts.held)


def _penalised(gram: NDArray[np.float32], penalty: float) -> FloatArray:
    """Add the penalty, in units of the mean square of the features, to the diagonal."""
    size = len(gram)
    return gram.astype(np.float64) + penalty * np.trace(gram) / size * np.eye(size)


def ridge_of_halves(
    cells: Cells, k: int, penalties: list[float], random_state: int
) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """Fit ridge regressions of rates; yields each penalty with the coefficients, features × genes.

    The counts are split binomially in two halves. Features come from one, the target, profiles of counts / depth less
    the gene mean, from the other, so that their noise is independent. Features of the half refer to its own typical
    depth, a single count thus to the same value as in the whole. Cells are weighted by their depth, the inverse of
    the variance of a Poisson share but for a constant.
    """
    from scipy.linalg import solve

    source, target = _halves(cells, generator(random_state, "ridge"))
    design = features(source, k)
    depth = np.asarray(target.depth, dtype=np.float32)[:, None]
    weights = depth / depth.mean()
    residual = target.counts.toarray() / np.maximum(depth, 1) - cells.gene_mean
    gram, cross = design.T @ (weights * design), design.T @ (weights * residual)
    for penalty in penalties:
        coefficients = solve(_penalised(gram, penalty), cross.astype(np.float64), assume_a="pos")
        yield penalty, coefficients.astype(np.float32)


def ridge_without_self(
    design: NDArray[np.float32], seen: FloatArray, penalties: list[float]
) -> Iterator[tuple[float, NDArray[np.float32]]]:
    r"""Fit ridge regressions of every gene on all features but itself; yields penalty and coefficients.

    With :math:`P = (F^\top F + \lambda I)^{-1}` the coefficients of gene g are :math:`-P_{hg} / P_{gg}` for
    :math:`h \neq g` (Steck 2019, "Embarrassingly shallow autoencoders for sparse data", equation 8). Features that are
    hidden are 0, their mean. The products with the target run over the cells in which the target is visible and are
    scaled up to all cells, so that hidden targets do not count as zeros.

    Parameters
    ----------
    design
        Centred features, cells × features; the first ones are the genes.
    seen
        Share of the cells in which each gene is visible.
    penalties
        Penalties in units of the mean square of the features.

    Yields
    ------
    The penalty, and the coefficients, features × genes.
    """
    from scipy.linalg import inv

    n_genes = len(seen)
    gram = design.T @ design
    for penalty in penalties:
        precision = inv(_penalised(gram, penalty))
        coefficients = -precision[:, :n_genes] / np.diag(precision)[:n_genes] / np.maximum(seen, 1e-12)
        np.fill_diagonal(coefficients, 0)
        yield penalty, coefficients.astype(np.float32)


def _ridges(
    cells: Cells, grid: list[Setting], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[Setting, FloatArray]]:
    """Ridge regression; settings are ``(neighbours in space, penalty)``.

    Rates are regressed on features of another half of the counts, and negative ones set to zero; log-normalised values
    on those of all other genes.
    """
    for k, settings in groupby(sorted(grid), key=lambda setting: setting[0]):
        penalties = [penalty for _, penalty in settings]
        design = features(cells, k)
        if cells.output == "rate":
            for penalty, coefficients in ridge_of_halves(cells, k, penalties, random_state):
                yield (k, penalty), np.maximum(design[rows] @ coefficients + cells.gene_mean, 0)
        else:
            seen = np.broadcast_to(cells.visible.mean(axis=0, dtype=np.float64), cells.counts.shape[1])
            for penalty, coefficients in ridge_without_self(design, seen, penalties):
                yield (k, penalty), design[rows] @ coefficients + cells.gene_mean


def _poisson_glms(
    cells: Cells, grid: list[Setting], rows: NDArray[np.intp], random_state: int
) -> Iterator[tuple[Setting, FloatArray]]:
    r"""Log-linear models; settings are ``(components, weight decay, training steps)``.

    The features are those of :func:`features` in their leading principal components, as many of the cell's own values
    and half as many of its neighbours'. Rates: logits :math:`b_g + \sum_h W_{hg} f_{ih}`, fitted to the counts of one
    half of a binomial split from features of the other (brought to the typical depth of the whole), the split drawn
    anew for every epoch. Given the depth of a
    cell, independent Poisson counts with log-linear means are multinomial with the softmax of the logits as shares
    (Baker 1994, "The multinomial-Poisson transformation"). Log-normalised values: means :math:`\exp` of the same
    logits, with the Poisson quasi-likelihood; in every epoch 30 % of the visible entries are hidden from the features
    at random, the others scaled up to keep their expectation, and only the hidden ones are fitted.
    """
    projections = {n: _Projection(cells, n) for n in {n for n, *_ in grid}}
    for (n, decay), settings in groupby(sorted(grid), key=lambda setting: setting[:2]):
        projection = projections[n]
        design = projection(cells)[rows]
        stops = [steps for *_, steps in settings]
        for steps, weight, bias in _log_linear_fits(cells, projection, decay, stops, random_state):
            logits = design @ weight + bias
            if cells.output == "rate":
                logits -= logits.max(axis=1, keepdims=True)
            yield (n, decay, steps), np.exp(np.minimum(logits, _LARGEST_LOGIT))


class _Projection:
    """Features in the principal components of `cells`, the first one of each kind scaled to unit variance.

    Calling it projects those of other cells; the part of the cell's own values is multiplied by `own_scale`.
    """

    def __init__(self, cells: Cells, n_components: int) -> None:
        full = features(cells, _SURROUNDINGS)
        n_genes = cells.counts.shape[1]
        self.loadings = []
        for columns, n in ((slice(0, n_genes), n_components), (slice(n_genes, 2 * n_genes), n_components // 2)):
            block = full[:, columns]
            vectors = top_eigenvectors(block.T @ block, n)
            spread = np.std(block @ vectors[:, 0])
            self.loadings.append((columns, vectors / np.float32(max(spread, 1e-6))))

    def __call__(self, cells: Cells, own_scale: float = 1.0) -> NDArray[np.float32]:
        full = features(cells, _SURROUNDINGS)
        own, around = (full[:, columns] @ vectors for columns, vectors in self.loadings)
        return np.hstack([np.float32(own_scale) * own, around, full[:, -1:]])


def _log_linear_fits(
    cells: Cells, projection: _Projection, decay: float, stops: list[int], random_state: int
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
    """Train by Adam on minibatches; yields steps, weights and biases after each number of steps in `stops`."""
    import torch

    rng = generator(random_state, "log-linear")
    n_cells, n_genes = cells.counts.shape
    rate = cells.output == "rate"
    weight = torch.zeros(projection(cells).shape[1], n_genes, requires_grad=True)
    bias = torch.tensor(np.log(np.maximum(cells.gene_mean, 1e-8)), requires_grad=True)
    optimiser: Any = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": decay}, {"params": [bias], "weight_decay": 0.0}], lr=_LEARNING_RATE
    )
    values = torch.from_numpy(cells.lognorm(cells.target_sum))
    step = 0
    while step < max(stops):
        if rate:
            source, held = _halves(cells, rng)
            source = replace(source, reference=cells.typical_depth)
            design, target = torch.from_numpy(projection(source)), torch.from_numpy(held.counts.toarray())
        else:
            source, hidden = hide_more_entries(cells, _HIDDEN, rng)
            design, fitted = torch.from_numpy(projection(source, 1 / (1 - _HIDDEN))), torch.from_numpy(hidden)
            target = values
        for batch in torch.from_numpy(rng.permutation(n_cells)).split(_BATCH):
            logits = design[batch] @ weight + bias
            if rate:
                loss = -(target[batch] * torch.log_softmax(logits, dim=1)).sum() / max(float(target[batch].sum()), 1)
            else:
                terms = logits.clamp(max=_LARGEST_LOGIT).exp() - target[batch] * logits
                loss = (fitted[batch] * terms).sum() / len(batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            if step in stops:
                yield step, weight.detach().numpy().copy(), bias.detach().numpy().copy()


_RIDGE = list(product((6, 20), (1.0, 3.0, 10.0, 30.0, 100.0)))

ridge = Tuned("ridge", _ridges, rate=_RIDGE, lognorm=_RIDGE)
poisson_glm = Tuned(
    "poisson_glm",
    _poisson_glms,
    rate=list(product((300,), (0.1, 0.3, 1.0), (300, 700))),
    lognorm=list(product((50,), (0.5, 1.0, 2.0), (150, 600))),
)
