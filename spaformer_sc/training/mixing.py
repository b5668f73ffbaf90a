"""Mixtures of predictions, weighted by held-out counts (stacked generalisation: Wolpert 1992, Neural Networks 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from spaformer_sc.metrics import mixture_weights
from spaformer_sc.nn.decoders import CountDecoder
from spaformer_sc.nn.network import Network, Tokens

from .scoring import GainSum
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
    def gain(self, network: Network) -> float:
        """Poisson gain of a network over gene means, in nats per held-out transcript."""
        total = GainSum(self._gene_share)
        for sequence, tokens in self.fields:
            share = network.decoder.share(network(tokens).decoded).cpu().numpy()
            total.add(share, self._held[sequence.fov.cells], sequence.fov.own, sequence.measured)
        return total.value

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
