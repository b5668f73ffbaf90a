"""From fields of view and counts to the ragged batches that the network takes."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from spaformer_sc._geometric import subgraph
from spaformer_sc.data._fields import FieldOfView
from spaformer_sc.nn.masking import Corrupted, MaskingRates, MaskingSchedule, SparseCounts, corrupt, depth, nothing
from spaformer_sc.nn.network import Network, Positions, Tokens

from .sparse import dense_product

BUFFER_BYTES = 96 * 2**20
"""Memory for the corrupted views of the FOVs that are shuffled together, about; at least one is."""


@dataclass(frozen=True)
class FieldCounts:
    """A FOV and where its counts are; they are taken when they are asked for.

    Attributes
    ----------
    fov
        The field of view.
    matrix
        Counts (cells, genes), CSR float32.
    missing
        Which entries of ``matrix`` were not measured (cells, genes), or None when all were.
    rows
        Rows of ``matrix`` that are the FOV's cells, in their order; None for all.
    """

    fov: FieldOfView
    matrix: sp.csr_matrix
    missing: NDArray[np.bool_] | None = None
    rows: NDArray[np.int64] | None = None

    @property
    def counts(self) -> sp.csr_matrix:
        """Counts of its cells (cells, genes), CSR float32."""
        return self.matrix if self.rows is None else self.matrix[self.rows]

    @property
    def measured(self) -> NDArray[np.bool_] | None:
        """Which entries were measured (cells, genes), or None when all were."""
        if self.missing is None:
            return None
        return ~self.missing if self.rows is None else ~self.missing[self.rows]


@dataclass(frozen=True)
class Batch:
    """Tokens and what the loss asks of them."""

    tokens: Tokens
    target: Tensor
    target_depth: Tensor
    asked: Tensor | None
    measured: Tensor | None


def sequences(
    fields: Sequence[FieldOfView], counts: sp.csr_matrix, missing: NDArray[np.bool_] | None
) -> list[FieldCounts]:
    """Give every FOV its rows of ``counts`` and of ``missing`` (cells, genes)."""
    return [FieldCounts(field, counts, missing, field.cells) for field in fields]


def stand_in(values: Tensor, visible: Tensor | None, typical: Tensor | None) -> Tensor:
    """Put the gene's typical value (genes,) where an entry of ``values`` (cells, genes) is hidden.

    A 0 would say that the gene is not expressed, which is evidence; the mean says nothing.
    """
    return values if visible is None or typical is None else torch.where(visible, values, typical)


def neighbour_values(
    values: sp.csr_matrix, visible: Tensor | None, ring: sp.csr_matrix, typical: Tensor | None = None
) -> Tensor:
    """Mean expression over a ring of neighbours (cells asked for, genes); hidden entries do not count in the mean.

    Parameters
    ----------
    values
        Normalised expression (cells, genes), CSR float32, 0 where hidden.
    visible
        Which entries are visible, 1 or True, (cells, genes), or None when everything is.
    ring
        Row-normalised averaging matrix (cells asked for, cells).
    typical
        What stands for the mean of a gene that is hidden in all of a cell's neighbours (genes,); None for 0.
    """
    mean = dense_product(ring, values)
    if visible is not None:
        seen = ring @ visible.numpy().astype(np.float32, copy=False)
        shown = seen > 1e-6
        np.divide(mean, seen, out=mean, where=shown)
        if typical is not None:
            has_neighbours = np.diff(ring.indptr) > 0
            np.copyto(mean, typical.numpy(), where=~shown & has_neighbours[:, None])
    return torch.from_numpy(mean)


@dataclass(frozen=True)
class View:
    """A corrupted FOV, of which batches take some cells; see :class:`Sampler`.

    Attributes
    ----------
    fov
        The field of view.
    counts, target, values
        Visible counts, counts asked for, and normalised expression (cells, genes), at the same places.
    shown
        1 where an entry is visible (cells, genes), or None when all are.
    depth, target_depth
        Depth estimated from the visible counts, and that of the target (cells,).
    masks
        ``visible``, ``asked`` and ``measured`` of :class:`~spaformer_sc.nn.masking.Corrupted`.
    typical
        Values (genes,) that stand for hidden entries; None for 0.
    """

    fov: FieldOfView
    counts: sp.csr_matrix
    target: sp.csr_matrix
    values: sp.csr_matrix
    shown: Tensor | None
    depth: Tensor
    target_depth: Tensor
    masks: dict[str, Tensor | None]
    typical: Tensor | None

    @classmethod
    def of(
        cls,
        fov: FieldOfView,
        corrupted: Corrupted,
        gene_share: Tensor,
        target_sum: float,
        typical: Tensor | None = None,
    ) -> View:
        """Take depth and normalised expression from what is visible."""
        counts, visible = corrupted.counts.csr(), corrupted.visible

        def at_the_same_places(numbers: Tensor) -> sp.csr_matrix:
            return sp.csr_matrix((numbers.numpy(), counts.indices, counts.indptr), shape=counts.shape, copy=False)

        target = at_the_same_places(corrupted.target.values)
        seen = depth(corrupted.counts.total(), visible, gene_share)
        scale = target_sum / seen.clamp(min=1e-6)
        values = at_the_same_places((corrupted.counts.values * scale[corrupted.counts.rows]).log1p_())
        shown = None if visible is None else visible.to(torch.float32)
        masks = {"visible": visible, "asked": corrupted.asked, "measured": corrupted.measured}
        return cls(fov, counts, target, values, shown, seen, corrupted.target_depth, masks, typical)

    def input(self, number: int, rows: Tensor) -> Tensor:
        """Expression of some cells (0), or its mean over one of their rings of neighbours (1, …), (cells, genes)."""
        if number:
            ring = self.fov.rings[number - 1][rows.numpy()]
            return neighbour_values(self.values, self.shown, ring, self.typical)
        visible = self.masks["visible"]
        return stand_in(_dense(self.values, rows), None if visible is None else visible[rows], self.typical)

    def inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Expression of some cells and its mean over each of their rings of neighbours (cells, genes each)."""
        return tuple(self.input(number, rows) for number in range(1 + len(self.fov.rings)))

    def mask(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of one of the masks (cells, genes)."""
        found = self.masks[name]
        return torch.ones((len(rows), self.counts.shape[1]), dtype=torch.bool) if found is None else found[rows]


def _positions(fov: FieldOfView, rows: Tensor, needs: str, device: torch.device) -> Positions:
    if needs == "graph":
        whole = {name: feature.to(device) for name, feature in fov.features.items()}
        return Positions(whole, fov.edge_index.to(device), rows.to(device))
    return Positions({name: feature[rows].to(device) for name, feature in fov.features.items()}, None, None)


def windows(
    positions: NDArray[np.float32], rows: NDArray[np.int64], n_parts: int, generator: torch.Generator
) -> list[Tensor]:
    """Cut cells into compact windows of about equal numbers, by halving along the longer side at a random angle.

    Parameters
    ----------
    positions
        Positions of all cells (cells, 2 or 3); the first two axes are used.
    rows
        Cells to divide.
    n_parts
        Number of windows.
    generator
        Draws the angle.
    """
    angle = float(torch.rand((), generator=generator)) * np.pi
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned = positions[:, :2] @ turn

    def halve(part: NDArray[np.int64], n: int) -> list[NDArray[np.int64]]:
        if n == 1:
            return [part]
        axis = int(np.ptp(turned[part], axis=0).argmax())
        ordered = part[np.argsort(turned[part, axis], kind="stable")]
        cut = len(part) * (n // 2) // n
        return halve(ordered[:cut], n // 2) + halve(ordered[cut:], n - n // 2)

    return [torch.from_numpy(part) for part in halve(rows, n_parts)]


def token_graph(pieces: Sequence[tuple[FieldOfView, Tensor]]) -> Tensor:
    """Spatial graph (2, edges) between the tokens of a batch: edges of a FOV whose two cells are both tokens.

    Parameters
    ----------
    pieces
        FOVs and the rows of each that are tokens, in the order of the tokens.
    """
    parts, start = [], 0
    for fov, rows in pieces:
        edges, _ = subgraph(rows, fov.edge_index, num_nodes=fov.n_cells)
        place = torch.empty(fov.n_cells, dtype=torch.int64)
        place[rows] = torch.arange(start, start + len(rows))
        parts.append(place[edges])
        start += len(rows)
    return torch.cat(parts, dim=1)


Pieces = Sequence[tuple[View, Tensor]]
"""Pairs of a view and the rows of it that become tokens."""


def _joined(parts: Iterable[Tensor], device: torch.device) -> Tensor:
    return torch.cat(list(parts)).to(device)


def _masks(pieces: Pieces, name: str, device: torch.device) -> Tensor | None:
    """Join masks; one masked FOV in the batch means that every FOV needs its mask."""
    if all(v.masks[name] is None for v, _ in pieces):
        return None
    return _joined((v.mask(name, rows) for v, rows in pieces), device)


def _dense(counts: sp.csr_matrix, rows: Tensor) -> Tensor:
    return torch.from_numpy(counts[rows.numpy()].toarray())


def tokens_of(
    pieces: Pieces, *, positional: str | None, graph: bool, device: torch.device, inputs: bool = True
) -> Tokens:
    """Join rows of several FOVs to ragged tokens on ``device``.

    Parameters
    ----------
    pieces
        Pairs of a view and the rows of it that become tokens.
    positional
        What the positional encodings need: ``"graph"`` (whole FOVs), ``"rows"`` (tokens alone), or None without any.
    graph
        Whether the network reads the spatial graph between the tokens.
    device
        Where the tokens go.
    inputs
        Whether to compute the input expression, ``values``, which is empty otherwise.
    """
    values = zip(*(v.inputs(rows) for v, rows in pieces), strict=True) if inputs else ()
    return Tokens(
        values=tuple(_joined(parts, device) for parts in values),
        counts=_joined((_dense(v.counts, rows) for v, rows in pieces), device),
        depth=_joined((v.depth[rows] for v, rows in pieces), device),
        visible=_masks(pieces, "visible", device),
        lengths=[len(rows) for _, rows in pieces],
        positions=None if positional is None else [_positions(v.fov, rows, positional, device) for v, rows in pieces],
        edge_index=token_graph([(v.fov, rows) for v, rows in pieces]).to(device) if graph else None,
        fovs=[v.fov.image for v, _ in pieces],
    )


def collate(pieces: Pieces, *, positional: str | None, graph: bool, device: torch.device) -> Batch:
    """Join rows of several FOVs to a batch on ``device``; arguments as in :func:`tokens_of`."""
    return Batch(
        tokens_of(pieces, positional=positional, graph=graph, device=device),
        _joined((_dense(v.target, rows) for v, rows in pieces), device),
        _joined((v.target_depth[rows] for v, rows in pieces), device),
        _masks(pieces, "asked", device),
        _masks(pieces, "measured", device),
    )


@dataclass(frozen=True)
class Whole:
    """A FOV with nothing hidden, whose cells become tokens a block at a time.

    Attributes
    ----------
    view
        All of it.
    positional, graph, device
        As in :func:`tokens_of`.
    """

    view: View
    positional: str | None
    graph: bool
    device: torch.device

    def tokens(self) -> Tokens:
        """Return all cells as tokens."""
        rows = torch.arange(self.view.fov.n_cells)
        return tokens_of([(self.view, rows)], positional=self.positional, graph=self.graph, device=self.device)

    def block(self, rows: Tensor, *, inputs: bool) -> Tokens:
        """Some cells as tokens, without their places, and without input expression unless asked for."""
        return tokens_of([(self.view, rows)], positional=None, graph=False, device=self.device, inputs=inputs)

    def exchange(self, network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`.Network.exchange` of all cells, embedded (cells, dim)."""
        fov, every = self.view.fov, torch.arange(len(x))
        places = None if self.positional is None else [_positions(fov, every, self.positional, self.device)]
        return network.exchange(x, [len(x)], places, fov.edge_index.to(self.device) if self.graph else None)


@dataclass(frozen=True)
class Sampler:
    """Draws the batches of an epoch.

    A large FOV is divided into sequences of about ``tokens_per_step`` cells, small FOVs are put together, so that the
    number of steps in an epoch depends on the number of cells and not on how the slide was imaged. Sequences are random
    subsets, because attention over a subset is an unbiased estimate of attention over the FOV, which is what prediction
    uses; or windows of cells that lie together, which keep the graph. Neighbour means always come from the whole FOV.

    Attributes
    ----------
    tokens_per_step
        Cells in a step; None for whole FOVs, one FOV a step.
    corruptions
        Names in :data:`~spaformer_sc.nn.masking.CORRUPTIONS`; drawn anew in each epoch
        (:func:`~spaformer_sc.nn.masking.corrupt`).
    rates
        Rates of the corruptions over the training.
    gene_share
        Mean share of each gene (genes,).
    target_sum
        Depth that expression is normalised to.
    positional, graph
        As in :func:`collate`.
    windows
        Divide a FOV into windows in place of random subsets.
    device
        Where the batches go.
    typical
        Values (genes,) that stand for hidden entries in the input; None for 0.
    """

    tokens_per_step: int | None
    corruptions: tuple[str, ...]
    rates: MaskingSchedule
    gene_share: Tensor
    target_sum: float
    positional: str | None
    graph: bool
    windows: bool
    device: torch.device
    typical: Tensor | None = None
    buffer_bytes: int = field(default=BUFFER_BYTES)

    def steps_per_epoch(self, data: Sequence[FieldCounts]) -> int:
        """Approximate number of batches of one epoch, at least 1."""
        if self.tokens_per_step is None:
            return len(data)
        return max(1, round(sum(int(s.fov.own.sum()) for s in data) / self.tokens_per_step))

    def epoch(
        self,
        data: Sequence[FieldCounts],
        generator: torch.Generator,
        progress: tuple[float, float] = (0.0, 0.0),
    ) -> Generator[Batch]:
        """Yield the batches of one epoch; every cell is a token once.

        Parameters
        ----------
        data
            The FOVs.
        generator
            Source of all that is random.
        progress
            Share of the training, from 0 to 1, that is done when the epoch starts and when it ends.
        """
        first, last = progress
        order = torch.randperm(len(data), generator=generator).tolist()
        done = 0
        for group in self._groups([data[i] for i in order]):
            at = [first + (last - first) * (done + i + 0.5) / len(data) for i in range(len(group))]
            done += len(group)
            yield from self._group(group, generator, [self.rates.at(value) for value in at])

    def _groups(self, data: Sequence[FieldCounts]) -> Iterator[list[FieldCounts]]:
        """Consecutive FOVs whose corrupted views fit into the buffer together; at least one."""
        group: list[FieldCounts] = []
        size = 0
        for sequence in data:
            cost = self._cost(sequence)
            if group and size + cost > self.buffer_bytes:
                yield group
                group, size = [], 0
            group.append(sequence)
            size += cost
        if group:
            yield group

    def _group(
        self, group: Sequence[FieldCounts], generator: torch.Generator, rates: Sequence[MaskingRates]
    ) -> Iterator[Batch]:
        pieces: list[tuple[View, Tensor]] = []
        for sequence, rate in zip(group, rates, strict=True):
            view = self._corrupted(sequence, rate, generator)
            own = torch.from_numpy(np.flatnonzero(sequence.fov.own))
            n_parts = 1 if self.tokens_per_step is None else max(1, round(len(own) / self.tokens_per_step))
            if self.windows:
                parts = windows(sequence.fov.positions, own.numpy(), n_parts, generator)
            else:
                parts = list(torch.tensor_split(own[torch.randperm(len(own), generator=generator)], n_parts))
            pieces += [(view, rows.sort().values) for rows in parts]
        order = [pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()]
        for batch in self._pack(order):
            yield collate(batch, positional=self.positional, graph=self.graph, device=self.device)

    def _corrupted(self, sequence: FieldCounts, rates: MaskingRates, generator: torch.Generator) -> View:
        counts, measured = self._read(sequence)
        shown = corrupt(self.corruptions, counts, measured, self.gene_share, rates, generator)
        return View.of(sequence.fov, shown, self.gene_share, self.target_sum, self.typical)

    def _pack(self, pieces: list[tuple[View, Tensor]]) -> Iterator[list[tuple[View, Tensor]]]:
        """Put consecutive pieces together to batches of about ``tokens_per_step`` cells."""
        sizes = np.array([len(rows) for _, rows in pieces])
        if self.tokens_per_step is None:
            numbers = np.arange(len(pieces))
        else:
            n_batches = max(1, round(sizes.sum() / self.tokens_per_step))
            middle = sizes.cumsum() - sizes / 2
            numbers = (middle * n_batches / sizes.sum()).astype(int)
        for number in np.unique(numbers):
            yield [piece for piece, n in zip(pieces, numbers, strict=True) if n == number]

    def open(self, sequence: FieldCounts) -> Whole:
        """Open one FOV with nothing hidden, for prediction."""
        counts, measured = self._read(sequence)
        shown = nothing(counts, measured, self.gene_share, self.rates.at(1.0), torch.Generator())
        view = View.of(sequence.fov, shown, self.gene_share, self.target_sum, self.typical)
        return Whole(view, self.positional, self.graph, self.device)

    def whole(self, sequence: FieldCounts) -> Tokens:
        """Return all cells of one FOV as tokens with nothing hidden."""
        return self.open(sequence).tokens()

    def some(self, data: Sequence[FieldCounts], generator: torch.Generator, most_cells: int) -> list[FieldCounts]:
        """FOVs drawn at random, as many as have no more cells together; at least one."""
        chosen: list[FieldCounts] = []
        cells = 0
        for i in torch.randperm(len(data), generator=generator).tolist():
            cells += int(data[i].fov.own.sum())
            if chosen and cells > most_cells:
                break
            chosen.append(data[i])
        return chosen

    @staticmethod
    def _read(sequence: FieldCounts) -> tuple[SparseCounts, Tensor | None]:
        """Counts of a FOV, and which entries were measured."""
        measured = sequence.measured
        return SparseCounts.of(sequence.counts), None if measured is None else torch.from_numpy(measured)

    @staticmethod
    def _cost(sequence: FieldCounts) -> int:
        """About the bytes of a corrupted view, were its values dense, and masked only where entries are missing."""
        n_cells, n_genes = sequence.fov.n_cells, sequence.matrix.shape[1]
        filled = np.diff(sequence.matrix.indptr)
        n_counts = filled.sum() if sequence.rows is None else filled[sequence.rows].sum()
        return int(n_cells * n_genes * (4 if sequence.missing is None else 11) + 12 * n_counts)
