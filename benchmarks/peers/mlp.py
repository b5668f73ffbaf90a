"""A plain masked autoencoder of single cells, without and with the mean profile of the nearest cells in space.

The counterpart of a spatial transformer that has no attention and no positional encoding: a multilayer perceptron that
predicts from what is left of a cell what was taken away. Denoising autoencoders: Vincent, Larochelle, Bengio and
Manzagol (2008), "Extracting and composing robust features with denoising autoencoders", ICML.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import nn

from peers._cells import Cells, generator
from peers._tuning import hide_more_entries
from spaformer_sc.metrics import thin

Setting = tuple[int, float]
"""Width of both hidden layers, and dropout after each."""

_SETTINGS: tuple[Setting, ...] = ((256, 0.2), (512, 0.2))
_VALIDATION_SHARE = 0.05
_THINNED_SHARE = 0.5
_HIDDEN_SHARES = (0.3, 0.5)
_NEIGHBOURS = 10
_BATCH = 128
_LEARNING_RATE = 1e-3
_MOST_EPOCHS = 150
_PATIENCE = 8


def masked_mlp(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """Impute with a masked multilayer perceptron on the cell's own expression.

    Output "rate": each step thins the counts of a cell by half, and a softmax over genes predicts the other half
    (multinomial likelihood). Output "lognorm": each step hides 30 to 50 % of a cell's visible entries, and their
    log-normalised values are predicted (squared error); entries that are missing count neither in depth nor in the loss
    and look to the network like the gene's mean. 5 % of the transcripts or visible entries stop the training and choose
    the width.

    Parameters
    ----------
    adata
        Visible counts, as in the interface of this package.

    Returns
    -------
    Prediction, cells × genes, and its scale, which is the output asked for.
    """
    return _impute(adata, "masked_mlp", near=False)


def masked_mlp_neighbours(adata: AnnData) -> tuple[NDArray[np.float32], str]:
    """Impute with the network of `masked_mlp` that is also given the mean profile of the ten nearest cells.

    The nearest cells in space within the field of view, the cell itself left out; their log-normalised values are
    averaged over those in which the gene is visible.

    Parameters
    ----------
    adata
        Visible counts, as in the interface of this package.

    Returns
    -------
    Prediction, cells × genes, and its scale, which is the output asked for.
    """
    return _impute(adata, "masked_mlp_neighbours", near=True)


@dataclass(frozen=True, eq=False)
class _Source:
    """Cells as a network sees them.

    Parameters
    ----------
    cells
        Counts to predict from.
    near
        Whether the mean profile of the nearest cells is part of the input.
    """

    cells: Cells
    near: bool

    @cached_property
    def _means(self) -> NDArray[np.float32]:
        return self.cells.column_means(self.cells.lognorm(self.cells.typical_depth))

    @cached_property
    def _around(self) -> NDArray[np.float32]:
        return self.cells.around(_NEIGHBOURS)

    def shown(self, rows: NDArray[np.intp]) -> NDArray[np.bool_] | None:
        """Return which entries of these cells are visible; None if all are."""
        return None if self.cells.missing is None else ~self.cells.missing[rows]

    def inputs(
        self, rows: NDArray[np.intp], counts: NDArray[np.float32], shown: NDArray[np.bool_] | None
    ) -> torch.Tensor:
        """Return centred log-normalised counts, 0 where not shown, and the profile of the nearest cells beside them."""
        depth = counts.sum(axis=1)
        if shown is not None:
            depth = depth / np.maximum(shown @ self.cells.shares, 1e-6)
        scale = self.cells.typical_depth / np.maximum(depth, 1)
        values = np.log1p(counts * scale[:, None]) - self._means
        if shown is not None:
            values *= shown
        parts = [values, self._around[rows]] if self.near else [values]
        return torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))

    def predict(self, network: nn.Module) -> NDArray[np.float32]:
        """Return shares or log-normalised values of all cells, cells × genes."""
        network.eval()
        blocks = []
        with torch.no_grad():
            for start in range(0, len(self.cells.fovs), 1024):
                rows = np.arange(start, min(start + 1024, len(self.cells.fovs)))
                output = network(self.inputs(rows, self.cells.counts[rows].toarray(), self.shown(rows)))
                blocks.append((output.softmax(1) if self.cells.output == "rate" else output).numpy())
        return np.concatenate(blocks)


@dataclass(frozen=True, eq=False)
class _Validation:
    """Entries that training does not see: their cells and genes, and held counts or log-normalised values."""

    entries: tuple[NDArray[np.intp], NDArray[np.intp]]
    truth: NDArray[np.float32]

    def loss(self, prediction: NDArray[np.float32], output: str) -> float:
        """Return the negative log-likelihood per held count, or the mean squared error."""
        predicted = prediction[self.entries].astype(np.float64)
        if output == "rate":
            return -float(self.truth @ np.log(np.maximum(predicted, 1e-12)) / self.truth.sum())
        return float(np.mean((predicted - self.truth) ** 2))


def _split(cells: Cells, rng: np.random.Generator) -> tuple[Cells, _Validation]:
    """Take a share of the counts, or of the visible entries, away for validation."""
    if cells.output == "rate":
        parts = thin(cells.counts, 1 - _VALIDATION_SHARE, random_state=rng)
        held = parts.held.tocoo()
        return replace(cells, counts=parts.train), _Validation((held.row, held.col), held.data)
    left, hidden = hide_more_entries(cells, _VALIDATION_SHARE, rng)
    entries = np.nonzero(hidden)
    return left, _Validation(entries, cells.lognorm(cells.target_sum)[entries])


def _network(source: _Source, setting: Setting) -> nn.Sequential:
    """Return two hidden layers and an output that is near the gene means to begin with."""
    width, dropout = setting
    n_genes = source.cells.counts.shape[1]
    layers: list[nn.Module] = []
    for size in (n_genes * (1 + source.near), width):
        layers += [nn.Linear(size, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(dropout)]
    last = nn.Linear(width, n_genes)
    mean = source.cells.gene_mean
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.copy_(torch.from_numpy(np.log(np.maximum(mean, 1e-7)) if source.cells.output == "rate" else mean))
    return nn.Sequential(*layers, last)


def _step_loss(
    network: nn.Module,
    source: _Source,
    rows: NDArray[np.intp],
    target: NDArray[np.float32] | None,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Take something away from a batch of cells and return the loss of predicting it."""
    cells, shown = source.cells, source.shown(rows)
    if target is None:
        batch = cells.counts[rows]
        kept = batch.copy()
        kept.data = rng.binomial(batch.data.astype(np.int64), _THINNED_SHARE).astype(np.float32)
        held = torch.from_numpy((batch - kept).toarray())
        logits = network(source.inputs(rows, kept.toarray(), shown))
        return -(held * logits.log_softmax(1)).sum() / held.sum().clamp(min=1)
    share = rng.uniform(*_HIDDEN_SHARES, size=(len(rows), 1)).astype(np.float32)
    hidden = rng.random(target[rows].shape, dtype=np.float32) < share
    visible = ~hidden if shown is None else shown & ~hidden
    scored = torch.from_numpy(hidden if shown is None else shown & hidden)
    predicted = network(source.inputs(rows, cells.counts[rows].toarray() * visible, visible))
    error = (predicted - torch.from_numpy(target[rows])).square()
    return (error * scored).sum() / scored.sum().clamp(min=1)


def _fit(
    source: _Source, validation: _Validation, setting: Setting, rng: np.random.Generator
) -> tuple[float, nn.Sequential]:
    """Train until the validation loss has not fallen for some epochs; returns the lowest and its network."""
    cells = source.cells
    network = _network(source, setting)
    optimiser = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    target = None if cells.output == "rate" else cells.lognorm(cells.target_sum)
    filled = np.flatnonzero(cells.depth > 0)
    best, weights, waited = np.inf, network.state_dict(), 0
    for _ in range(_MOST_EPOCHS):
        network.train()
        order = rng.permutation(filled)
        for start in range(0, len(order), _BATCH):
            loss = _step_loss(network, source, order[start : start + _BATCH], target, rng)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        score = validation.loss(source.predict(network), cells.output)
        if score < best:
            best, weights, waited = score, copy.deepcopy(network.state_dict()), 0
        else:
            waited += 1
        if waited == _PATIENCE:
            break
    network.load_state_dict(weights)
    return best, network


def _impute(adata: AnnData, name: str, near: bool) -> tuple[NDArray[np.float32], str]:
    cells = Cells.of(adata)
    seed = int(adata.uns["task"]["random_state"])
    part, validation = _split(cells, generator(seed, "masked_mlp validation"))
    source = _Source(part, near)
    best: tuple[float, Setting, nn.Sequential] | None = None
    with torch.random.fork_rng(devices=[]):
        for setting in _SETTINGS:
            torch.manual_seed(seed)
            loss, network = _fit(source, validation, setting, generator(seed, "masked_mlp"))
            print(f"{name}: {setting}, validation loss {loss:.5f}", file=sys.stderr)
            if best is None or loss < best[0]:
                best = loss, setting, network
    _, (width, dropout), network = best
    print(f"{name}: chose width {width}, dropout {dropout}", file=sys.stderr)
    return _Source(cells, near).predict(network), cells.output
