"""A field of view: the unit the network works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


def fields_of_view(
    coordinates: NDArray[np.float64],
    codes: NDArray[np.int64],
    names: list[str],
    *,
    graph: GraphConfig,
    given: sp.csr_matrix | None,
    n_rings: int,
    tile_size: int,
    encode: Callable[[Any], dict[str, Tensor]] | None,
) -> tuple[list[FieldOfView], dict[str, Any]]:
    """Cut a data set into FOVs, and large FOVs into overlapping tiles, each with its graph and positional features.

    Parameters
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

    Returns
    -------
    The fields of view, and a summary of the graphs (numbers and strings).
    """
    import torch
    from torch_geometric.data import Data

    fields: list[FieldOfView] = []
    components, edges, distances = 0, 0, []
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(names) + 1))
    for code, name in enumerate(names):
        cells = order[bounds[code] : bounds[code + 1]]
        here = coordinates[cells]
        if given is None:
            adjacency = spatial_graph(here, method=graph.method, n_neighbors=graph.n_neighbors, radius=graph.radius)
        else:
            adjacency = given[cells][:, cells].tocsr()
        unit = typical_distance(here, adjacency)
        components += n_components(adjacency)
        edges += adjacency.nnz // 2
        distances.append(unit)
        tiles = tile(here, tile_size=tile_size, margin=MARGIN * unit)
        for number, part in enumerate(tiles):
            local = part.context
            sub = adjacency if len(local) == len(cells) else adjacency[local][:, local].tocsr()
            coo = sub.tocoo()
            edge_index = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
            positions = ((here[local] - here.mean(axis=0)) / unit).astype(np.float32)
            features: dict[str, Tensor] = {}
            if encode is not None:
                pos = torch.from_numpy(positions)[:, :2]
                features = encode(Data(edge_index=edge_index, pos=pos, unit=unit, num_nodes=len(local)))
            fields.append(
                FieldOfView(
                    name=name if len(tiles) == 1 else f"{name}/tile{number}",
                    image=name,
                    cells=cells[local],
                    own=np.isin(local, part.core),
                    weight=part.weight,
                    rings=neighbour_rings(sub, n_rings),
                    edge_index=edge_index,
                    positions=positions,
                    unit=unit,
                    features=features,
                )
            )
    summary = {
        "n_fovs": len(names),
        "n_tiles": len(fields),
        "n_edges": int(edges),
        "n_components": int(components),
        "typical_distance": float(np.median(distances)),
    }
    return fields, summary
