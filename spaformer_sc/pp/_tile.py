"""Windows of cells as a column of `adata.obs`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning

from spaformer_sc._checks import (
    check_adata,
    check_coordinates,
    check_images_apart,
    check_integer,
    check_key_added,
    check_library_key,
)
from spaformer_sc._data_objects import takes_tables
from spaformer_sc._logging import logger
from spaformer_sc.data._labels import field_codes
from spaformer_sc.data._tiling import tile as cut_into_tiles

if TYPE_CHECKING:
    from spatialdata import SpatialData


@takes_tables
def tile(
    adata: AnnData | SpatialData,
    *,
    table_key: str | None = None,
    spatial_key: str = "spatial",
    library_key: str | Sequence[str] | None = None,
    tile_size: int = 4000,
    key_added: str = "tile",
    copy: bool = False,
) -> AnnData | SpatialData | None:
    """Cut a slide into windows of about equally many cells.

    `spaformer_sc.tl.impute` does this by itself where a field of view is large; here the windows can be looked at, or
    used as `library_key` elsewhere. They are the cores: the overlaps that blend neighbouring windows are not written.

    Parameters
    ----------
    adata
        The data.
    table_key
        Of a SpatialData, the table; may be left out where there is only one.
    spatial_key
        Name of the positions in `adata.obsm`.
    library_key
        Column of `adata.obs` that tells fields of view apart, or a list of columns; each field is cut by itself. None
        takes all cells as one field.
    tile_size
        Most cells in a window. A field of up to 1.5 times as many stays whole.
    key_added
        Name of the column that is written. One written by an earlier call is replaced; any other is kept, with an
        error.
    copy
        Return a changed copy instead of changing `adata`; of a SpatialData, one that shares all but the table.

    Returns
    -------
    None, or the copy if `copy=True`. Written are:

    `adata.obs[key_added]` : categorical of str, one per cell
        The window: ``"0"``, ``"1"``, …, with a `library_key` ``"<field>/0"``, ``"<field>/1"``, ….
    `adata.uns[key_added]` : dict
        ``{"params": {"spatial_key", "library_key", "tile_size"}}``.

    Raises
    ------
    KeyError
        If `spatial_key` or `library_key` does not exist.
    TypeError
        If an argument is of the wrong type.
    ValueError
        If positions or labels are missing, `tile_size` is below 1, or `key_added` would overwrite other data.
    """
    check_adata(adata)
    columns = check_library_key(adata, library_key)
    check_integer("tile_size", tile_size)
    if columns is not None and key_added in columns:
        raise ValueError(
            f"`key_added={key_added!r}` is also in `library_key`, which would be lost; choose another name."
        )
    check_key_added(adata, key_added, slots=[("obs", key_added)], mark="tile_size")
    codes, names = field_codes(adata.obs, columns)
    coordinates = check_coordinates(adata, spatial_key, codes)
    check_images_apart(adata, spatial_key, coordinates, codes, columns)

    number = np.empty(adata.n_obs, dtype=np.int64)
    labels: list[str] = []
    for field, name in enumerate(names):
        cells = np.flatnonzero(codes == field)
        for k, window in enumerate(cut_into_tiles(coordinates[cells], tile_size=tile_size, margin=0)):
            number[cells[window.core]] = len(labels)
            labels.append(str(k) if columns is None else f"{name}/{k}")

    result = adata.copy() if copy else adata
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        result.obs[key_added] = pd.Categorical.from_codes(number, categories=labels)
    result.uns[key_added] = {
        "params": {"spatial_key": spatial_key, "library_key": columns, "tile_size": int(tile_size)},
    }
    logger.info("added `obs[%r]`: %d windows of up to %d cells", key_added, len(labels), int(np.bincount(number).max()))
    return result if copy else None
