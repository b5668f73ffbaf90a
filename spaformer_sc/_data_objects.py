"""What holds the data: an AnnData, or a SpatialData with one in a table, for which spatialdata is not imported."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ._checks import check_table_key
from ._logging import logger

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

P = ParamSpec("P")
T = TypeVar("T")


def takes_tables(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function of ``adata`` take a SpatialData as well, and work on its table ``table_key`` in place.

    The function has an argument ``table_key``, which it does not read. With ``copy=True`` the result is a SpatialData
    with a changed copy of the table, which shares all other elements with the one passed in.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which is refused in Python's own words
        data = bound.arguments["adata"]
        key = check_table_key(data, bound.arguments.get("table_key"))
        if key is None:
            return function(*args, **kwargs)
        bound.arguments["adata"] = data.tables[key]
        result: Any = function(*bound.args, **bound.kwargs)
        if bound.arguments.get("copy"):
            result = _with_table(data, key, result)
        elif result is None:  # what is returned by functions that write
            say_how_to_save(data, key)
        return result  # type: ignore[no-any-return]

    return call


def say_how_to_save(sdata: SpatialData, key: str) -> None:
    """Log, of a SpatialData that belongs to a file, that a table was changed in memory only."""
    if sdata.is_backed():
        logger.info(
            "the table %r is changed in memory, not in the file. To save it: sdata.delete_element_from_disk(%r), then "
            "sdata.write_element(%r); or sdata.write to another place.",
            *[key] * 3,
        )


def _with_table(sdata: SpatialData, key: str, table: AnnData) -> SpatialData:
    """A SpatialData of the same elements, one table replaced, that belongs to no file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of elements that a table names and that were left out
        return type(sdata)(
            images=dict(sdata.images),
            labels=dict(sdata.labels),
            points=dict(sdata.points),
            shapes=dict(sdata.shapes),
            tables={**sdata.tables, key: table},
            attrs=dict(sdata.attrs),
        )
