"""A field of view: the unit the network works on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ._graph import n_components, spatial_graph, typical_distance
from ._tiling import tile

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = 8.0
"""Width of the margin around a tile, in typical distances between neighbours."""


@dataclass(frozen=True)
class GraphConfig:
    """How spatial graphs are built: ``method`` is ``"knn"``, ``"delaunay"`` or ``"radius"``."""

    method: Literal["knn", "delaunay", "radius"] = "knn"
    n_neighbors: int = 6
    radius: float | None = None


@dataclass(frozen=True)
class FieldOfView:
    """One FOV, or one tile of a large FOV with a margin around it.

    Attributes
    ----------
    name
        Name of the FOV, or of the tile.
    image
        Name of the FOV, also of all its tiles.
    cells
        Rows of the AnnData (n,).
    own
        Which of them belong to this tile (n,); the others are its margin.
    weight
        Blending weight of each cell (n,); over all tiles a cell's weights sum to 1.
    rings
        Row-normalised CSR matrices (n, n) that average over direct neighbours and over neighbours of neighbours.
    edge_index
        Symmetric spatial graph (2, edges), int64.
    positions
        Coordinates (n, 2 or 3) from the mean of the FOV, in typical distances between its neighbouring cells.
    unit
        Typical distance between neighbouring cells of the FOV (median edge of its graph), in the user's unit.
    features
        Features of the positional encodings per cell.
    """

    name: str
    image: str
    cells: NDArray[np.int64]
    own: NDArray[np.bool_]
    weight: NDArray[np.float32]
    rings: tuple[sp.csr_matrix, ...]
    edge_index: Tensor
    positions: NDArray[np.float32]
    unit: float
    features: dict[str, Tensor]

    @property
    def n_cells(self) -> int:
        """Number of cells, margin included."""
        return len(self.cells)


def neighbour_rings(graph: sp.csr_matrix, n_rings: int) -> tuple[sp.csr_matrix, ...]:
    """Return averaging matrices over the first ``n_rings`` rings of neighbours (0, 1 or 2).

    The first ring is the graph itself, its weights kept; the second holds the cells at exactly two steps. Rows sum to
    1, or to 0 for a cell without neighbours in that ring.

    Parameters
    ----------
    graph
        Symmetric adjacency (n, n) without diagonal.
    n_rings
        Number of rings.
    """
    rings = [graph] if n_rings else []
    if n_rings > 1:
        direct = (graph != 0).astype(np.float32)
        reach = ((direct @ direct) != 0).astype(np.float32)
        # What is reached in two steps, less direct neighbours and the cell itself.
        second = (reach - reach.multiply(direct + sp.identity(graph.shape[0], dtype=np.float32, format="csr"))).tocsr()
        second.eliminate_zeros()
        rings.append(second)
    averages = []
    for ring in rings:
        total = np.asarray(ring.sum(axis=1)).ravel()
        inverse = np.divide(1.0, total, out=np.zeros_like(total, dtype=np.float64), where=total > 0)
        averages.append((sp.diags(inverse) @ ring).tocsr().astype(np.float32))
    return tuple(averages)


@dataclass(frozen=True)
class Layout:
    """How a data set is cut into FOVs, and large FOVs into overlapping tiles, each with its graph and features.

    Attributes
    ----------
    coordinates
        Positions (cells, 2 or 3), in any unit.
    codes, names
        FOV of each cell (cells,) and the FOVs' names.
    graph
        How to build graphs.
    given
        The user's own graph (cells, cells), symmetric and within FOVs, used in place of ``graph``.
    n_rings
        Number of neighbour rings to prepare.
    tile_size
        Largest number of cells of a tile.
    encode
        Maps a torch-geometric ``Data`` (``edge_index``, ``pos`` in typical distances, ``unit``) to positional features.
    """

    coordinates: NDArray[np.float64]
    codes: NDArray[np.int64]
    names: list[str]
    graph: GraphConfig
    given: sp.csr_matrix | None
    n_rings: int
    tile_size: int
    encode: Callable[[Any], dict[str, Tensor]] | None

    def fields(self, codes: Iterable[int] | None = None) -> Iterator[tuple[list[FieldOfView], dict[str, float]]]:
        """Build the FOVs one after the other.

        Parameters
        ----------
        codes
            Numbers of the FOVs to build; all by default.

        Yields
        ------
        The FOV, or its tiles; and the number of its edges, that of its connected components, and its typical distance
        between neighbours.
        """
        import torch

        from spaformer_sc._geometric import Data

        order = np.argsort(self.codes, kind="stable")
        bounds = np.searchsorted(self.codes[order], np.arange(len(self.names) + 1))
        place = np.full(len(self.codes), -1, dtype=np.int64)
        for code in range(len(self.names)) if codes is None else codes:
            name = self.names[code]
            cells = order[bounds[code] : bounds[code + 1]]
            here = self.coordinates[cells]
            if self.given is None:
                how = self.graph
                adjacency = spatial_graph(here, method=how.method, n_neighbors=how.n_neighbors, radius=how.radius)
            else:
                adjacency = _among(self.given, cells, place)
            unit = typical_distance(here, adjacency)
            tiles = tile(here, tile_size=self.tile_size, margin=MARGIN * unit)
            centre = here.mean(axis=0)
            fields = []
            for number, part in enumerate(tiles):
                local = part.context
                sub = adjacency if len(local) == len(cells) else _among(adjacency, local, place)
                coo = sub.tocoo()
                edge_index = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
                positions = ((here[local] - centre) / unit).astype(np.float32)
                features: dict[str, Tensor] = {}
                if self.encode is not None:
                    pos = torch.from_numpy(positions)[:, :2]
                    features = self.encode(Data(edge_index=edge_index, pos=pos, unit=unit, num_nodes=len(local)))
                fields.append(
                    FieldOfView(
                        name=name if len(tiles) == 1 else f"{name}/tile{number}",
                        image=name,
                        cells=cells[local],
                        own=np.isin(local, part.core),
                        weight=part.weight,
                        rings=neighbour_rings(sub, self.n_rings),
                        edge_index=edge_index,
                        positions=positions,
                        unit=unit,
                        features=features,
                    )
                )
            yield (
                fields,
                {"n_edges": adjacency.nnz // 2, "n_components": n_components(adjacency), "typical_distance": unit},
            )


def _among(adjacency: sp.csr_matrix, cells: NDArray[np.int64], place: NDArray[np.int64]) -> sp.csr_matrix:
    """Return the edges among some cells, in the order in which they are stored.

    Indexing the columns of a CSR matrix takes time for each of its columns, so that many FOVs or tiles of one graph
    would take the square of its cells. ``place`` is -1 for every cell of the graph, before and after.
    """
    rows = adjacency[cells]
    place[cells] = np.arange(len(cells))
    columns = place[rows.indices]
    place[cells] = -1
    kept = columns >= 0
    n_kept = np.concatenate([[0], np.cumsum(kept)])[rows.indptr]
    return sp.csr_matrix((rows.data[kept], columns[kept], n_kept), shape=(len(cells), len(cells)))


def fields_of_view(
    layout: Layout, codes: Iterable[int] | None = None, share: float = 1.0, rng: np.random.Generator | None = None
) -> tuple[list[FieldOfView], dict[str, int | float]]:
    """Build all FOVs of a layout, or those of some numbers, or of each that is cut into tiles a share of these.

    Parameters
    ----------
    layout
        The layout.
    codes
        Numbers of the FOVs to build; all by default.
    share
        Share of the cells of a tiled FOV to keep, about; at least one tile of each.
    rng
        Draws the tiles where the share is below 1.

    Returns
    -------
    The fields of view, and a summary of the graphs (numbers).
    """
    fields: list[FieldOfView] = []
    every: list[dict[str, float]] = []
    for parts, facts in layout.fields(codes):
        if rng is not None and share < 1 and len(parts) > 1:
            parts = _some_tiles(parts, share * sum(int(part.own.sum()) for part in parts), rng)
        fields += parts
        every.append(facts)
    summary = {
        "n_fovs": len(every),
        "n_tiles": len(fields),
        "n_edges": int(sum(facts["n_edges"] for facts in every)),
        "n_components": int(sum(facts["n_components"] for facts in every)),
        "typical_distance": float(np.median([facts["typical_distance"] for facts in every])),
    }
    return fields, summary


def _some_tiles(fields: Sequence[FieldOfView], most: float, rng: np.random.Generator) -> list[FieldOfView]:
    """Draw tiles at random until they hold enough cells, with their margins; in order."""
    order = rng.permutation(len(fields))
    enough = int(np.searchsorted(np.cumsum([fields[i].n_cells for i in order]), most)) + 1
    return [fields[i] for i in np.sort(order[:enough])]


def some_images(
    sizes: NDArray[np.int64],
    most: float,
    tiled: NDArray[np.bool_],
    measured: NDArray[np.bool_] | None,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Draw FOVs at random: all that are cut into tiles, and others until they hold their share of the cells.

    Parameters
    ----------
    sizes
        Number of cells of each FOV (FOVs,).
    most
        Number of cells that is enough, of all FOVs together.
    tiled
        Which FOVs are cut into tiles (FOVs,).
    measured
        Which genes were measured in some cell of which FOV (FOVs, genes): every gene that was measured anywhere is
        measured in a FOV that is drawn; None for all.
    rng
        Source of randomness.

    Returns
    -------
    Numbers of the FOVs, increasing.
    """
    order = rng.permutation(np.flatnonzero(~tiled))
    enough = int(np.searchsorted(sizes[order].cumsum(), most * sizes[order].sum() / sizes.sum())) + 1
    chosen = [*np.flatnonzero(tiled), *order[:enough]]
    if measured is not None:
        covered = measured[chosen].any(axis=0)
        for image in order[enough:]:
            if (measured[image] & ~covered).any():
                chosen.append(image)
                covered |= measured[image]
    return np.sort(np.asarray(chosen, dtype=np.int64))


def on_their_own(fields: Sequence[FieldOfView]) -> tuple[list[FieldOfView], NDArray[np.int64]]:
    """Make a data set of some tiles: their cells numbered anew, weights of a cell summing to 1 over just these.

    A cell in the margin of a tile whose own tile is left out belongs to one of those that are left.

    Returns
    -------
    The tiles, and the rows of their cells in the whole data set (cells,), increasing.
    """
    cells = np.unique(np.concatenate([field.cells for field in fields]))
    places = [np.searchsorted(cells, field.cells) for field in fields]
    total, times, owned = np.zeros(len(cells)), np.zeros(len(cells)), np.zeros(len(cells), dtype=bool)
    for field, place in zip(fields, places, strict=True):
        total[place] += field.weight
        times[place] += 1
        owned[place[field.own]] = True
    renumbered = []
    for field, place in zip(fields, places, strict=True):
        weight = np.where(total[place] > 0, field.weight / np.maximum(total[place], 1e-12), 1 / times[place])
        own = field.own | ~owned[place]
        owned[place] = True
        renumbered.append(replace(field, cells=place, own=own, weight=weight.astype(np.float32)))
    return renumbered, cells
