"""Where training starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from spaformer_sc._memory import BLOCK
from spaformer_sc.nn.network import Network

from .sequences import Whole

RING_SHARES = (5 / 16, 3 / 16)
"""Share of a token's dimensions that starts with each ring of neighbours."""

LEAST_VARIANCE = 1e-8
"""Variance below which a component is noise of rounding."""


@torch.no_grad()
def token_components(opened: Callable[[], Iterable[Whole]], dim: int, hops: int) -> list[tuple[Tensor, Tensor]]:
    """Principal components of the cells' own expression and of the mean expression of each ring of neighbours.

    Parameters
    ----------
    opened
        Gives the FOVs to compute the components from, one after the other, each time that it is called.
    dim
        Width of the widest token, which the inputs share: the rings as :data:`RING_SHARES` says, the cell itself the
        rest.
    hops
        Number of rings.

    Returns
    -------
    For each input its components (n, genes), at most as many as there are genes, and its mean (genes,).
    """

    def blocks(number: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        for whole in opened():
            for rows in torch.split(torch.arange(whole.view.fov.n_cells), BLOCK):
                visible = None if number else whole.view.masks["visible"]
                yield whole.view.input(number, rows), None if visible is None else visible[rows]

    return [principal_components(partial(blocks, number), size) for number, size in enumerate(_sizes(dim, hops))]


@torch.no_grad()
def start_from_components(network: Network, components: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set the embeddings of expression to principal components of the data.

    One part of the token's dimensions takes the leading components of the cells' own log-normalised expression, the
    others those of the mean expression of each ring of neighbours; the first component of each has unit variance. From
    there on they are trained like all weights. From a random start, a network of few cells overfits before it has found
    these directions.

    Parameters
    ----------
    network
        The network; its embeddings are changed.
    components
        From :func:`token_components`.
    """
    sizes = _sizes(network.config.dim, network.config.hops)
    network.embedding.bias.zero_()
    first = 0
    for layer, size, (found, mean) in zip([network.embedding, *network.neighbours], sizes, components, strict=True):
        found = found[:size]
        rows = slice(first, first + len(found))
        layer.weight.zero_()
        layer.weight[rows] = found.to(layer.weight)
        network.embedding.bias[rows] = -(found @ mean).to(layer.weight)
        first += size


def _sizes(dim: int, hops: int) -> list[int]:
    """Dimensions of a token that start with the cell itself, and with each ring."""
    rings = [int(share * dim) for share in RING_SHARES[:hops]]
    return [dim - sum(rings), *rings]


def principal_components(blocks: Callable[[], Iterable[tuple[Tensor, Tensor | None]]], n: int) -> tuple[Tensor, Tensor]:
    """Leading principal components of the rows of several matrices, scaled so that the first has unit variance.

    Parameters
    ----------
    blocks
        Gives pairs of values (cells, genes) and which of them are visible, None for all, each time that it is called.
        Others count as the mean.
    n
        Number of components; at most as many as there are genes are given.

    Returns
    -------
    Components (n, genes), float64, 0 beyond those that vary, and the mean of the visible values (genes,).
    """
    total: Tensor | float = 0.0
    count: Tensor | int = 0
    for block, visible in blocks():
        total = total + (block if visible is None else block * visible).sum(0, dtype=torch.float64).cpu()
        count = count + (torch.tensor(len(block)) if visible is None else visible.sum(0).cpu())
    mean = torch.as_tensor(total / torch.as_tensor(count).clamp(min=1))
    gram = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    n_cells = 0
    for block, visible in blocks():
        centred = block - mean.to(block)
        centred = centred if visible is None else centred * visible
        gram += (centred.T @ centred).double().cpu()
        n_cells += len(block)
    eigenvalues, vectors = torch.linalg.eigh(gram / max(1, n_cells))
    varies = (eigenvalues > LEAST_VARIANCE)[-n:].flip(0)
    scale = eigenvalues[-1].clamp(min=LEAST_VARIANCE).sqrt()
    return vectors[:, -n:].flip(1).T * varies[:, None] / scale, mean
