"""Mixtures of predictions, weighted by what is held out (stacked generalisation: Wolpert 1992, Neural Networks 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from spaformer_sc.metrics import mixture_weights
from spaformer_sc.nn.decoders import CountDecoder
from spaformer_sc.nn.network import Network, Tokens

from .ranks import ALONE, Ranks, largest_first
from .scoring import FLOOR, GainSum
from .sequences import FieldCounts

LEAST_COUNTS = 200
"""Held-out transcripts below which nothing is fitted to them."""


class HeldCounts:
    """Held-out counts of some FOVs, with what predictions say of just these.

    Parameters
    ----------
    fields
        FOVs with their tokens, nothing hidden.
    held
        Held-out counts of all cells (cells, genes).
    gene_share
        Mean share of each gene (genes,).
    """

    def __init__(
        self, fields: Sequence[tuple[FieldCounts, Tokens]], held: sp.csr_matrix, gene_share: NDArray[np.float32]
    ) -> None:
        self.fields = fields
        self._held = held
        self._gene_share = gene_share
        self._entries: list[tuple[torch.Tensor, torch.Tensor]] = []
        counts = []
        for sequence, _ in fields:
            part = held[sequence.fov.cells].tocoo()
            own = sequence.fov.own[part.row]
            rows, cols = part.row[own].astype(np.int64), part.col[own].astype(np.int64)
            self._entries.append((torch.from_numpy(rows), torch.from_numpy(cols)))
            counts.append(part.data[own].astype(np.float64))
        self.counts: NDArray[np.float64] = np.concatenate(counts) if counts else np.zeros(0)

    @property
    def enough(self) -> bool:
        """Whether there are enough counts to fit weights to."""
        return float(self.counts.sum()) >= LEAST_COUNTS

    @torch.inference_mode()
    def gain(self, network: Network, ranks: Ranks = ALONE) -> float:
        """Poisson gain of a network over gene means, in nats per held-out transcript; ranks divide the FOVs."""
        total = GainSum(self._gene_share)
        for number in _of_rank(self.fields, ranks):
            sequence, tokens = self.fields[number]
            share = network.decoder.share(network(tokens).decoded).cpu().numpy()
            total.add(share, self._held[sequence.fov.cells], sequence.fov.own, sequence.measured)
        return total.over(ranks).value

    @torch.inference_mode()
    def parts(self, network: Network) -> NDArray[np.float64]:
        """Shares of the held-out entries (3, entries) in the network, the cell's own counts, and the gene mean.

        Within the measured genes of the cell, since held-out counts tell of nothing else.
        """
        decoder = _count_decoder(network)
        found = []
        for (_, tokens), (rows, cols) in zip(self.fields, self._entries, strict=True):
            share = decoder.share(network(tokens).decoded)
            parts = decoder.mixture_parts(share, tokens.counts, tokens.visible)
            found.append(torch.stack([part[rows, cols] for part in parts]).double().cpu().numpy())
        return np.concatenate(found, axis=1)


class HeldEntries:
    """Held-out entries of some FOVs, with what predictions say of just these.

    Parameters
    ----------
    fields
        FOVs with their tokens, held-out entries hidden in them.
    counts
        Counts of all cells (cells, genes).
    held
        Which entries were held out (cells, genes).
    gene_share
        Mean share of each gene (genes,).
    target_sum
        Depth that log-normalised values are taken at.
    """

    def __init__(
        self,
        fields: Sequence[tuple[FieldCounts, Tokens]],
        counts: sp.csr_matrix,
        held: NDArray[np.bool_],
        gene_share: NDArray[np.float32],
        target_sum: float,
    ) -> None:
        self.fields = fields
        self._target_sum = target_sum
        self._gene_share = torch.from_numpy(gene_share)
        self._entries: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._counts: list[torch.Tensor] = []
        self._null: list[torch.Tensor] = []
        values = []
        for sequence, tokens in fields:
            hidden = held[sequence.fov.cells]
            rows, cols = np.nonzero(hidden & sequence.fov.own[:, None])
            own = counts[sequence.fov.cells]
            count = own.toarray()[rows, cols]
            seen = hidden if sequence.measured is None else hidden | sequence.measured
            depth = np.asarray(own.sum(axis=1)).ravel() / np.maximum(seen @ gene_share, 1e-6)
            values.append(np.log1p(count / depth[rows] * target_sum))
            self._entries.append((torch.from_numpy(rows), torch.from_numpy(cols)))
            self._counts.append(torch.from_numpy(count))
            self._null.append(self._gene_share[cols] * tokens.depth.cpu()[rows])
        self.values: NDArray[np.float64] = np.concatenate(values).astype(np.float64) if values else np.zeros(0)

    @property
    def enough(self) -> bool:
        """Whether there are enough counts to decide by."""
        return sum(float(count.sum()) for count in self._counts) >= LEAST_COUNTS

    @torch.inference_mode()
    def gain(self, network: Network, ranks: Ranks = ALONE) -> float:
        """Poisson gain of a network over gene means, each with the depth that it infers, per held-out transcript.

        Ranks divide the FOVs.
        """
        gain = total = 0.0
        for number in _of_rank(self.fields, ranks):
            _, tokens = self.fields[number]
            (rows, cols), count, null = self._entries[number], self._counts[number], self._null[number]
            share = network.decoder.share(network(tokens).decoded)
            # As in GainSum: a decoder that says exactly 0 can be compared too.
            share = torch.maximum(share, FLOOR * self._gene_share.to(share))
            expected = (share * tokens.full_depth(share)[:, None])[rows, cols].cpu()
            ratio = torch.where(count > 0, torch.log(expected / null), 0.0)
            gain += float((count * ratio - expected + null).sum(dtype=torch.float64))
            total += float(count.sum(dtype=torch.float64))
        gain, total = ranks.sum(gain, total)
        return gain / total if total else math.nan

    @torch.inference_mode()
    def predicted(self, network: Network) -> NDArray[np.float64]:
        """Log-normalised values of the held-out entries (entries,), as a network predicts them."""
        found = []
        for (_, tokens), (rows, cols) in zip(self.fields, self._entries, strict=True):
            decoded = network(tokens).decoded
            depth = tokens.full_depth(network.decoder.share(decoded))
            found.append(network.decoder.lognorm(decoded, depth, self._target_sum)[rows, cols].double().cpu().numpy())
        return np.concatenate(found)

    @torch.inference_mode()
    def expected(self, networks: Sequence[Network], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Expected counts of the held-out entries (entries,), as the weighted mean of networks."""
        found = []
        for (_, tokens), (rows, cols) in zip(self.fields, self._entries, strict=True):
            total = np.zeros(len(rows))
            for network, weight in zip(networks, weights, strict=True):
                share = network.decoder.share(network(tokens).decoded)
                total += weight * (share * tokens.full_depth(share)[:, None])[rows, cols].double().cpu().numpy()
            found.append(total)
        return np.concatenate(found)

    @property
    def counts(self) -> NDArray[np.float64]:
        """Counts of the held-out entries (entries,)."""
        return np.concatenate([count.numpy() for count in self._counts]).astype(np.float64)

    def weights(self, predicted: NDArray[np.float64]) -> NDArray[np.float64]:
        """Shares of predictions (networks, entries) in their mean that give the least squared error of the values."""
        gram, moment = predicted @ predicted.T, predicted @ self.values
        # Minimise over the simplex: non-negative least squares with a row that all but forces the sum to be 1.
        scale = 1e3 * np.sqrt(np.trace(gram))
        root = np.linalg.cholesky(gram + 1e-9 * np.trace(gram) * np.eye(len(gram)))
        design = np.vstack([root.T, np.full(len(gram), scale)])
        target = np.append(np.linalg.solve(root, moment), scale)
        weights, _ = nnls(design, target)
        return np.asarray(weights / weights.sum())


def _of_rank(fields: Sequence[tuple[FieldCounts, Tokens]], ranks: Ranks) -> list[int]:
    """Numbers of the FOVs that are this rank's, about equally many cells each."""
    given = largest_first([sequence.fov.n_cells for sequence, _ in fields], ranks.size)
    found: list[int] = np.flatnonzero(given == ranks.rank).tolist()
    return found


def mix_in_own_counts(network: Network, held: HeldCounts) -> NDArray[np.float64]:
    """Fit how much of the cell's own counts and of the gene mean to mix into a network's shares, and set it.

    A network that is too sure of itself is corrected towards the gene mean, one that smooths too much towards the
    counts.

    Returns
    -------
    The shares of the held-out entries (entries,) in the mixture.
    """
    parts = held.parts(network)
    weights = mixture_weights(parts, held.counts)
    _count_decoder(network).mixture.copy_(torch.from_numpy(weights))
    return np.asarray(weights @ parts)


def _count_decoder(network: Network) -> CountDecoder:
    if not isinstance(network.decoder, CountDecoder):
        raise TypeError("only the shares of a decoder of counts can be mixed")
    return network.decoder
