"""Integrated gradients through a whole fitted model, from the counts of a field of view to one imputed value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from spaformer_sc.nn.decoders import GaussianDecoder
from spaformer_sc.nn.masking import depth
from spaformer_sc.nn.network import Network, Tokens, normalise
from spaformer_sc.training.sequences import FieldCounts, Sampler, stand_in


@dataclass(frozen=True)
class Target:
    """A value to explain: gene ``column`` of the model in cell ``row`` of the data."""

    row: int
    column: int


@dataclass(frozen=True)
class Integrated:
    """Integrated gradients of one target, summed over genes or over cells.

    Attributes
    ----------
    cells
        Cells whose counts can reach the target (n,), as rows of the data, sorted; the target's own cell is one.
    by_cell
        Contribution of all counts of each of these cells (n,).
    own, neighbours
        Contribution of each gene (genes,) in the cell itself, and in all others.
    baseline, value
        What is explained, at the baseline and at the observed counts.
    """

    cells: NDArray[np.int64]
    by_cell: NDArray[np.float64]
    own: NDArray[np.float64]
    neighbours: NDArray[np.float64]
    baseline: float
    value: float


def baseline_counts(counts: Tensor, measured: Tensor | None, profile: Tensor) -> Tensor:
    """Spread the total of every cell over its measured genes in the proportions of ``profile``.

    Parameters
    ----------
    counts
        Counts (cells, genes), 0 where not measured.
    measured
        Boolean (cells, genes), or None when everything is.
    profile
        Relative expression of each gene (genes,), at least 0.
    """
    shares = profile.expand_as(counts) if measured is None else profile * measured
    return counts.sum(1, keepdim=True) * shares / shares.sum(1, keepdim=True).clamp(min=1e-12)


def tokens_of(
    counts: Tensor,
    template: Tokens,
    rings: Sequence[Tensor],
    gene_share: Tensor,
    target_sum: float,
    typical: Tensor | None = None,
) -> Tokens:
    """Compute all inputs of the network that depend on ``counts``, differentiably.

    The same as :meth:`~spaformer_sc.training.sequences.Sampler.whole`, which computes neighbour means in scipy.

    Parameters
    ----------
    counts
        Counts (cells, genes), 0 where not measured.
    template
        Tokens of the same cells, for all that does not depend on counts.
    rings
        Row-normalised sparse averaging matrices (cells, cells).
    gene_share, target_sum, typical
        As in :class:`~spaformer_sc.training.sequences.Sampler`.
    """
    seen = depth(counts.sum(1), template.visible, gene_share)
    values = normalise(counts, seen, target_sum)
    means = [torch.sparse.mm(ring, values) for ring in rings]
    if template.visible is not None:
        shown = [torch.sparse.mm(ring, template.visible.to(values.dtype)) for ring in rings]
        means = [torch.where(s > 1e-6, m / s.clamp(min=1e-6), m) for m, s in zip(means, shown, strict=True)]
        if typical is not None:
            near = [torch.sparse.mm(ring, torch.ones_like(values[:, :1])) > 0 for ring in rings]
            means = [torch.where((s <= 1e-6) & n, typical, m) for m, s, n in zip(means, shown, near, strict=True)]
    values = stand_in(values, template.visible, typical)
    return replace(template, values=(values, *means), counts=counts, depth=seen)


def is_logarithm(networks: Sequence[Network]) -> bool:
    """Whether the logarithm of a share is explained (count decoders), and not a log-normalised value (Gaussian)."""
    return not isinstance(networks[0].decoder, GaussianDecoder)


def integrated_gradients(
    networks: Sequence[Network],
    network_weights: NDArray[np.float64],
    sampler: Sampler,
    sequences: Sequence[FieldCounts],
    targets: Sequence[Target],
    *,
    profile: Tensor,
    n_steps: int,
) -> list[Integrated]:
    r"""Integrated gradients of imputed values with respect to all counts of the field of view.

    .. math:: a_i = (x_i - b_i) \int_0^1 \frac{\partial f}{\partial x_i}\bigl(b + t\,(x - b)\bigr)\, dt

    (Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks, eq. 1), the integral by Gauss-Legendre
    quadrature. With count decoders :math:`f = \log \sum_m w_m s_m`, where the sum runs over networks and tiles with
    their weights in the prediction and :math:`s_m` is the gene's share in the cell; so :math:`f` is the log of what
    :meth:`~spaformer_sc.SpaFormer.impute` gives as rate, and its gradient :math:`\sum_m w_m \nabla s_m / e^f`. With the
    Gaussian decoder :math:`f = \sum_m w_m y_m` of its values before they are cut at 0.

    Only sums over genes and over cells are kept, one point of the path, tile and network at a time.

    Parameters
    ----------
    networks, network_weights
        Networks that are averaged, and their weights (2, networks) in the prediction of measured and of missing
        entries.
    sampler
        Sampler of the model.
    sequences
        All FOVs or tiles, with counts.
    targets
        What to explain.
    profile
        Relative expression of each gene (genes,) at the baseline.
    n_steps
        Points of the quadrature.

    Returns
    -------
    One for each target, in order.
    """
    points, weights = np.polynomial.legendre.leggauss(n_steps)
    path = [0.0, *(points + 1) / 2, 1.0]
    step = np.array([0.0, *weights / 2, 0.0])
    logarithm = is_logarithm(networks)
    value = np.zeros((len(targets), len(path)))
    by_cell: list[dict[int, NDArray[np.float64]]] = [{} for _ in targets]
    by_gene = [np.zeros((2, len(path), len(profile))) for _ in targets]

    for number, sequence in enumerate(sequences):
        place = {int(cell): i for i, cell in enumerate(sequence.fov.cells)}
        inside = [(t, place[target.row]) for t, target in enumerate(targets) if target.row in place]
        inside = [(t, row) for t, row in inside if sequence.fov.weight[row] > 0]
        if not inside:
            continue
        template, measured = sampler.whole(sequence), sequence.measured
        gene_share = sampler.gene_share.to(sampler.device)
        typical = None if sampler.typical is None else sampler.typical.to(sampler.device)
        rings = [_sparse(ring, sampler.device) for ring in sequence.fov.rings]
        start = baseline_counts(template.counts, template.visible, profile.to(sampler.device))
        change = template.counts - start
        for t, _ in inside:
            by_cell[t][number] = np.zeros((len(path), sequence.fov.n_cells))
        for p, where in enumerate(path):
            slope = bool(step[p] > 0)
            for network, network_weight in zip(networks, network_weights.T, strict=True):
                with torch.set_grad_enabled(slope):
                    counts = (start + where * change).requires_grad_(slope)
                    tokens = tokens_of(counts, template, rings, gene_share, sampler.target_sum, typical)
                    decoded = network(tokens).decoded
                    answer = network.decoder.share(decoded) if logarithm else decoded.expression
                for i, (t, row) in enumerate(inside):
                    asked = answer[row, targets[t].column]
                    missing = measured is not None and not measured[row, targets[t].column]
                    weight = float(sequence.fov.weight[row]) * float(network_weight[int(missing)])
                    value[t, p] += weight * asked.item()
                    if not slope:
                        continue
                    (gradient,) = torch.autograd.grad(asked, counts, retain_graph=i + 1 < len(inside))
                    moved = (gradient * (change * weight)).cpu()
                    own = moved[row].double().numpy()
                    by_cell[t][number][p] += moved.sum(1, dtype=torch.float64).numpy()
                    by_gene[t][0, p] += own
                    by_gene[t][1, p] += moved.sum(0, dtype=torch.float64).numpy() - own

    results = []
    for t in range(len(targets)):
        factor = step / value[t] if logarithm else step
        cells, at = np.unique(np.concatenate([sequences[n].fov.cells for n in by_cell[t]]), return_inverse=True)
        contribution = np.zeros(len(cells))
        np.add.at(contribution, at, np.concatenate([factor @ rows for rows in by_cell[t].values()]))
        own, neighbours = factor @ by_gene[t][0], factor @ by_gene[t][1]
        ends = value[t, [0, -1]]
        before, after = np.log(ends) if logarithm else ends
        results.append(Integrated(cells, contribution, own, neighbours, float(before), float(after)))
    return results


def _sparse(ring: sp.csr_matrix, device: torch.device) -> Tensor:
    coo = ring.tocoo()
    places = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    values = torch.from_numpy(coo.data.astype(np.float32))
    return torch.sparse_coo_tensor(places, values, coo.shape, device=device, check_invariants=False).coalesce()
