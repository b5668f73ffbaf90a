"""Positions of cells from the shapes or labels of a SpatialData."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pandas as pd
from anndata import ImplicitModificationWarning

from spaformer_sc._checks import check_annotation, check_key_added, check_name, check_table_key
from spaformer_sc._data_objects import say_how_to_save
from spaformer_sc._logging import logger

if TYPE_CHECKING:
    from spatialdata import SpatialData


def centroids(
    sdata: SpatialData,
    *,
    table_key: str | None = None,
    coordinate_system: str = "global",
    key_added: str = "spatial",
) -> None:
    """Write where the cells of a table lie: the centres of the shapes, labels or points that it annotates.

    For tables without positions in ``obsm``. The tables that spatialdata-io makes of CosMx, Xenium and MERSCOPE have
    them.

    Parameters
    ----------
    sdata
        The data.
    table_key
        The table; may be left out where there is only one.
    coordinate_system
        Coordinate system of the positions; all annotated elements need a transformation to it.
    key_added
        Name of what is written. What is there is not overwritten.

    Returns
    -------
    None. Written is:

    ``sdata.tables[table_key].obsm[key_added]`` : float64 array, cells × 2 or cells × 3
        Positions x, y, and z where all elements have it, in the unit of the coordinate system.

    Raises
    ------
    KeyError
        If there is no such table, or an element that it annotates is gone.
    TypeError
        If ``sdata`` is no SpatialData, or a name is not a string.
    ValueError
        If the table annotates nothing, there is something of the name ``key_added``, an element has no such coordinate
        system, or cells are in no element.

    Examples
    --------
    >>> sf.pp.centroids(sdata)
    >>> sf.tl.impute(sdata)
    """
    from spatialdata import get_centroids
    from spatialdata.transformations import get_transformation

    key = check_table_key(sdata, table_key)
    check_name("coordinate_system", coordinate_system)
    regions, instances = check_annotation(sdata, key)
    table = sdata.tables[key]
    check_key_added(table, key_added)
    if key_added in table.obsm:
        raise ValueError(f"`key_added={key_added!r}` is already in the table's `obsm`; choose another name.")
    found = []
    for region, cells in instances.groupby(regions, observed=True):
        element = sdata[region]
        systems = get_transformation(element, get_all=True)
        if coordinate_system not in systems:
            raise ValueError(
                f"`coordinate_system={coordinate_system!r}` is none of those of {region!r}: {', '.join(systems)}."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dask and others, in spatialdata
            centres = get_centroids(element, coordinate_system=coordinate_system).compute()
        lost = ~cells.isin(centres.index)
        if lost.any():
            raise ValueError(
                f"{lost.sum()} of {len(cells)} cells of the table are not in {region!r}: "
                f"{', '.join(map(repr, cells[lost][:5]))}. Leave them out of the table."
            )
        found.append(centres.loc[cells, [axis for axis in "xyz" if axis in centres]].set_index(cells.index))
    places = pd.concat(found, join="inner").loc[instances.index].to_numpy(dtype="float64")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        table.obsm[key_added] = places
    logger.info("added `obsm[%r]`: centres of %d cells in %r", key_added, len(places), coordinate_system)
    say_how_to_save(sdata, str(key))
