"""Mixtures of predictions, weighted by what is held out (stacked generalisation: Wolpert 1992, Neural Networks 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from spaformer_sc._threads import Workers
from spaformer_sc.metrics import mixture_weights
from spaformer_sc.nn.decoders import CountDecoder
from spaformer_sc.nn.network import Network, Output, Tokens

from .prediction import Said
from .ranks import ALONE, Ranks, largest_first
from .scoring import FLOOR, log_ratios
from .sequences import FieldCounts, Sampler, Whole

T = TypeVar("T")

LEAST_COUNTS = 200
"""Held-out transcripts below which nothing is fitted to them."""


class _Held:
    """What is held out of some FOVs, found block by block in what networks say of them.

    Parameters
    ----------
    fields
        FOVs with what is not held out.
    sampler
        Makes tokens of them.
    rows, cols
        Places of the held-out entries of each FOV, in the order of its cells.
    workers
        Threads to compute in.
    """

    counts: NDArray[np.float64]

    def __init__(
        self,
        fields: Sequence[FieldCounts],
        sampler: Sampler,
        rows: Sequence[NDArray[np.int64]],
        cols: Sequence[NDArray[np.int64]],
        workers: Workers,
    ) -> None:
        self.fields = fields
        self._sampler, self.workers = sampler, workers
        self._rows, self._cols = rows, cols
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in rows])])

    def opened(self) -> Iterator[Whole]:
        """Each FOV, one at a time."""
        return map(self._sampler.open, self.fields)

    def said(self, number: int, networks: Sequence[Network]) -> Said:
        """What networks say of a FOV."""
        return Said(networks, self._sampler.open(self.fields[number]), self.workers)

    def _per_count(self, parts: Sequence[float], ranks: Ranks) -> float:
        """Sum of all ranks' parts per held-out transcript; NaN when there is none, -inf when a part is not finite."""
        (gain,) = ranks.sum(sum(parts))
        total = float(self.counts.sum())
        if not total:
            return math.nan
        return gain / total if math.isfinite(gain) else -math.inf

    def _in_blocks(
        self, networks: Sequence[Network], function: Callable[[Block, Iterator[Output]], T], ranks: Ranks = ALONE
    ) -> list[T]:
        """Apply a function to blocks of cells that have held-out entries, and what networks say of them.

        Ranks take about equally many cells each, in whole FOVs.
        """
        whose = largest_first([sequence.fov.n_cells for sequence in self.fields], ranks.size)
        return [
            part
            for number in np.flatnonzero(whose == ranks.rank).tolist()
            for part in self._in_field(number, self.said(number, networks), function)
            if part is not None
        ]

    def _in_field(
        self, number: int, said: Said, function: Callable[[Block, Iterator[Output]], T]
    ) -> Iterator[T | None]:
        """Apply a function to the blocks of one FOV; None for one without held-out entries."""
        sequence, rows, cols = self.fields[number], self._rows[number], self._cols[number]
        start, measured = int(self._starts[number]), sequence.measured

        def in_block(at: slice, tokens: Tokens, outputs: Iterator[Output]) -> T | None:
            first, last = np.searchsorted(rows, [at.start, at.stop])
            if first == last:
                return None
            places = torch.from_numpy(rows[first:last] - at.start), torch.from_numpy(cols[first:last])
            of_block = None if measured is None else measured[at]
            return function(Block(at, tokens, places, slice(start + first, start + last), of_block), outputs)

        return said.in_blocks(in_block)


@dataclass(frozen=True)
class Block:
    """A block of cells with held-out entries.

    Attributes
    ----------
    cells
        Rows of the FOV that they are.
    tokens
        The cells.
    places
        Row and gene of each held-out entry (entries,).
    entries
        Which of all held-out entries they are.
    measured
        Which entries were measured (cells, genes), or None when all were.
    """

    cells: slice
    tokens: Tokens
    places: tuple[Tensor, Tensor]
    entries: slice
    measured: NDArray[np.bool_] | None


Correction = Callable[[slice], Callable[[Network, Output], Output]]
"""From a block of cells to what makes, of the output of a network for these, the output that counts."""


def uncorrected(block: slice) -> Callable[[Network, Output], Output]:
    """Leave the output as it is."""
    return lambda network, output: output


class OfField(NamedTuple):
    """Number of a FOV; rows, columns and numbers of its held-out counts (entries,); what was measured of it."""

    number: int
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    counts: NDArray[np.float64]
    measured: NDArray[np.bool_] | None


class HeldCounts(_Held):
    """Held-out counts of some FOVs, with what predictions say of just these.

    Parameters
    ----------
    fields
        FOVs with the other counts.
    sampler
        Makes tokens of them.
    held
        Held-out counts of all cells (cells, genes).
    gene_share
        Mean share of each gene (genes,).
    workers
        Threads to compute in.
    """

    def __init__(
        self,
        fields: Sequence[FieldCounts],
        sampler: Sampler,
        held: sp.csr_matrix,
        gene_share: NDArray[np.float32],
        workers: Workers,
    ) -> None:
        self.gene_share = gene_share
        rows, cols, counts = [], [], []
        for sequence in fields:
            part = held[sequence.fov.cells].tocoo()
            own = sequence.fov.own[part.row]
            rows.append(part.row[own].astype(np.int64))
            cols.append(part.col[own].astype(np.int64))
            counts.append(part.data[own].astype(np.float64))
        self.counts = _joined(counts)
        super().__init__(fields, sampler, rows, cols, workers)

    @property
    def enough(self) -> bool:
        """Whether there are enough counts to fit weights to."""
        return float(self.counts.sum()) >= LEAST_COUNTS

    def gain(self, network: Network, ranks: Ranks = ALONE) -> float:
        """Poisson gain of a network over gene means, in nats per held-out transcript; ranks divide the FOVs."""

        def gain(block: Block, outputs: Iterator[Output]) -> float:
            (share,) = (network.decoder.share(output.decoded).cpu().numpy() for output in outputs)
            rows, cols = (index.numpy() for index in block.places)
            ratios = log_ratios(share, rows, cols, block.measured, self.gene_share)
            return float(self.counts[block.entries] @ ratios)

        return self._per_count(self._in_blocks([network], gain, ranks), ranks)

    def by_field(self) -> Iterator[OfField]:
        """Held-out counts of each FOV that has some, one at a time."""
        for number, sequence in enumerate(self.fields):
            at = slice(self._starts[number], self._starts[number + 1])
            if at.start < at.stop:
                yield OfField(number, self._rows[number], self._cols[number], self.counts[at], sequence.measured)

    def parts(self, network: Network) -> NDArray[np.float64]:
        """Shares of the held-out entries (3, entries) in the network, the cell's own counts, and the gene mean.

        Within the measured genes of the cell, since held-out counts tell of nothing else.
        """
        decoder = count_decoder(network)

        def parts(block: Block, outputs: Iterator[Output]) -> NDArray[np.float64]:
            (share,) = (decoder.share(output.decoded) for output in outputs)
            mixed = decoder.mixture_parts(share, block.tokens.counts, block.tokens.visible)
            return torch.stack([part[block.places] for part in mixed]).double().cpu().numpy()

        return np.concatenate(self._in_blocks([network], parts), axis=1)


class HeldEntries(_Held):
    """Held-out entries of some FOVs, with what predictions say of just these.

    Parameters
    ----------
    fields
        FOVs with the other entries.
    sampler
        Makes tokens of them.
    counts
        Counts of all cells (cells, genes).
    held
        Which entries were held out (cells, genes).
    gene_share
        Mean share of each gene (genes,).
    target_sum
        Depth that log-normalised values are taken at.
    workers
        Threads to compute in.
    """

    def __init__(
        self,
        fields: Sequence[FieldCounts],
        sampler: Sampler,
        counts: sp.csr_matrix,
        held: NDArray[np.bool_],
        gene_share: NDArray[np.float32],
        target_sum: float,
        workers: Workers,
    ) -> None:
        self._target_sum = target_sum
        self._gene_share = torch.from_numpy(gene_share)
        rows, cols = [], []
        for sequence in fields:
            row, col = np.nonzero(held[sequence.fov.cells] & sequence.fov.own[:, None])
            rows.append(row)
            cols.append(col)
        super().__init__(fields, sampler, rows, cols, workers)
        values, found, null = [], [], []
        for sequence, whole, row, col in zip(fields, self.opened(), rows, cols, strict=True):
            hidden = held[sequence.fov.cells]
            own = counts[sequence.fov.cells]
            count = own.toarray()[row, col]
            measured = sequence.measured
            seen = hidden if measured is None else hidden | measured
            depth = np.asarray(own.sum(axis=1)).ravel() / np.maximum(seen @ gene_share, 1e-6)
            values.append(np.log1p(count / depth[row] * target_sum))
            found.append(count)
            null.append(gene_share[col] * whole.view.depth.numpy()[row])
        self.values: NDArray[np.float64] = _joined(values)
        self.counts = _joined(found)
        self._null: NDArray[np.float64] = _joined(null)

    @property
    def enough(self) -> bool:
        """Whether there are enough counts to decide by."""
        return float(self.counts.sum()) >= LEAST_COUNTS

    def gain(self, network: Network, ranks: Ranks = ALONE) -> float:
        """Poisson gain of a network over gene means, each with the depth that it infers, per held-out transcript.

        Ranks divide the FOVs.
        """

        def gain(block: Block, outputs: Iterator[Output]) -> float:
            (share,) = (network.decoder.share(output.decoded) for output in outputs)
            # As for held-out counts: a decoder that says exactly 0 can be compared too.
            share = torch.maximum(share, FLOOR * self._gene_share.to(share))
            expected = _expected(share, block)
            count, null = self.counts[block.entries], self._null[block.entries]
            ratio = np.log(expected / null, out=np.zeros(len(count)), where=count > 0)
            return float((count * ratio - expected + null).sum())

        return self._per_count(self._in_blocks([network], gain, ranks), ranks)

    def predicted(self, network: Network) -> NDArray[np.float64]:
        """Log-normalised values of the held-out entries (entries,), as a network predicts them."""

        def predicted(block: Block, outputs: Iterator[Output]) -> NDArray[np.float64]:
            (decoded,) = (output.decoded for output in outputs)
            depth = block.tokens.full_depth(network.decoder.share(decoded))
            values = network.decoder.lognorm(decoded, depth, self._target_sum)
            return values[block.places].double().cpu().numpy()

        return np.concatenate(self._in_blocks([network], predicted))

    def expected(
        self, networks: Sequence[Network], weights: NDArray[np.float64], correction: Callable[[Said], Correction]
    ) -> NDArray[np.float64]:
        """Expected counts of the held-out entries (entries,), as the weighted mean of corrected networks."""
        parts = [
            part
            for number in range(len(self.fields))
            if len(self._rows[number])
            for part in self._expected_in_field(number, weights, self.said(number, networks), correction)
            if part is not None
        ]
        return _joined(parts)

    def _expected_in_field(
        self, number: int, weights: NDArray[np.float64], said: Said, correction: Callable[[Said], Correction]
    ) -> Iterator[NDArray[np.float64] | None]:
        corrected = correction(said)

        def expected(block: Block, outputs: Iterator[Output]) -> NDArray[np.float64]:
            total, correct = np.zeros(len(block.places[0])), corrected(block.cells)
            for network, weight, output in zip(said.networks, weights, outputs, strict=True):
                share = network.decoder.share(correct(network, output).decoded)
                total += weight * _expected(share, block)
            return total

        return self._in_field(number, said, expected)

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
    count_decoder(network).mixture.copy_(torch.from_numpy(weights))
    return np.asarray(weights @ parts)


def _expected(share: Tensor, block: Block) -> NDArray[np.float64]:
    """Expected counts of the held-out entries of a block, from shares (cells, genes)."""
    found: NDArray[np.float64] = (share * block.tokens.full_depth(share)[:, None])[block.places].double().cpu().numpy()
    return found


def _joined(parts: Sequence[NDArray[np.floating]]) -> NDArray[np.float64]:
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)


def count_decoder(network: Network) -> CountDecoder:
    """The decoder of a network, which has to be one of counts."""
    if not isinstance(network.decoder, CountDecoder):
        raise TypeError("only the shares of a decoder of counts can be mixed")
    return network.decoder
