"""Reading an AnnData from disk, with its counts left there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData

ENTRIES_OF_A_CHUNK = 16_000_000
"""Entries, cells times genes, of a sparse store that are read together; adding many small parts to another is slow."""


def read_zarr(source: Path, table_key: str | None = None) -> AnnData:
    """Read a store, but leave the counts in it; those of an old or unusual one come into memory.

    Of the store of a SpatialData, read a table, by default the only one.
    """
    import anndata
    import zarr
    from anndata.experimental import read_elem_lazy
    from anndata.io import read_elem

    from ._checks import NO_TABLES, choose_table

    group = zarr.open_group(str(source), mode="r")
    if "tables" in group and "encoding-type" not in group.attrs:
        key = choose_table(list(group["tables"]), table_key)
        group, source = group["tables"][key], source / "tables" / key
    elif table_key is not None:
        raise ValueError(NO_TABLES.format(table_key, "an AnnData"))
    matrix = group.get("X")
    kinds = [dict(part.attrs).get("encoding-type") for part in (group, matrix) if part is not None]
    if kinds not in (["anndata", "csr_matrix"], ["anndata", "array"]):
        return anndata.read_zarr(source)
    chunks = None
    if kinds[1] == "csr_matrix":
        n_cells, n_genes = matrix.attrs["shape"]
        chunks = min(n_cells, max(1, ENTRIES_OF_A_CHUNK // max(1, n_genes))), n_genes
    rest = {name: read_elem(group[name]) for name in group if name != "X"}
    return anndata.AnnData(X=read_elem_lazy(matrix, chunks=chunks), **rest)
