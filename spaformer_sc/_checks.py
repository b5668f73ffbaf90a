"""Every check of what a user passes in, with its message.

The functions here run before any work is done. None changes what it is given: arrays that are handed back are copies.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import inspect
import numbers
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData
from scipy import sparse

from spaformer_sc._keys import Keys, encoding_key
from spaformer_sc._logging import logger
from spaformer_sc.data._counts import Counts, add_to, in_memory, sums
from spaformer_sc.training.ranks import being_started, launched

P = ParamSpec("P")
T = TypeVar("T")

#: Share of fractional values from which a matrix counts as fractional throughout.
_FRACTIONAL_THROUGHOUT = 0.99
#: log1p of any count in use stays below this (log1p(1e6) is 13.8, log2(1e6 + 1) is 19.9).
_LARGEST_LOG = 20.0
#: Cells that the search for a transformation looks at.
_CELLS_LOOKED_AT = 2000
#: Entries of a file that are checked at a time.
_SCANNED = 16_000_000
#: No cell has more transcripts of a gene than this.
_LARGEST_COUNT = 1e9
#: Below that there is little to learn from, and little to tell how good it is.
FEW_CELLS = 500
#: Positions beyond this, in whatever unit, are placeholders; next to one, the others would all fall in one place.
_LARGEST_POSITION = 1e15
#: From here on images lie on top of each other: 0 where they adjoin, 0.8 where each covers the others.
_OVERLAID = 0.15
#: Share of all neighbours that are of another image of the place from which images are refused, not warned of. Images
#: that overlap by a third on all sides stay below, and so do a few cells that have a label of their own.
_REFUSED = 0.25
#: How names of features begin that are no genes: controls of CosMx, Xenium and MERSCOPE.
_CONTROLS = re.compile(
    r"neg(ative)?[-_ ]?(prb|probe|control|ctrl)|negative(?=\d)|system[-_ ]?control|false[-_ ]?code|blank[-_](?=\d)"
    r"|(unassigned|deprecated)[-_ ]?code|antisense_|intergenic_",
    re.IGNORECASE,
)
#: Message where a table is named of what has none, with the name and what was found.
NO_TABLES = "`table_key={!r}` names a table of a SpatialData, but `adata` is {}; leave it out."
#: Larger weights of a graph cannot be added up in float32.
_LARGEST_WEIGHT = 1e30


# --- small helpers ----------------------------------------------------------------------------------------------------


def _listing(names: Iterable[Any], limit: int = 10) -> str:
    """Names in one line, cut after `limit`, "(none)" if there are none."""
    shown = [str(name) for name in names]
    if not shown:
        return "(none)"
    more = f", … ({len(shown)} in all)" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def _layers(adata: AnnData) -> list[str]:
    """Names of the layers, among which anndata 0.13 has ``X``, named None."""
    return [name for name in adata.layers if name is not None]


def _did_you_mean(name: str, options: Iterable[Any]) -> str:
    """Return " Did you mean 'x'?" for the option nearest to `name`, or an empty string."""
    options = [option for option in options if isinstance(option, str)]
    same = [option for option in options if option.lower() == name.lower()]
    near = same or difflib.get_close_matches(name, options, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _in_memory(array: Any) -> Any:
    """A backed, lazy or array-like matrix as numpy array or scipy sparse matrix; those two as they are."""
    if isinstance(array, np.ndarray) or sparse.issparse(array):
        return array
    for method in ("to_memory", "compute"):
        if hasattr(array, method):
            return _in_memory(getattr(array, method)())
    return np.asarray(array)


def explains_unknown_arguments(settings: Iterable[str]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function say what an argument may have meant that it does not have.

    Parameters
    ----------
    settings
        Names of choices that go into its argument ``settings``.
    """
    advanced = frozenset(settings)

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        known = [name for name in inspect.signature(function).parameters if name != "self"]
        title = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for name, value in kwargs.items():
                if name in advanced:
                    raise TypeError(f"`{title}` has no argument `{name}`: pass settings={{{name!r}: {value!r}}}.")
                if name not in known:
                    hint = _did_you_mean(name, known)
                    raise TypeError(f"`{title}` has no argument `{name}`.{hint} It has: {', '.join(known)}.")
            return function(*args, **kwargs)

        return call

    return decorate


def check_name(name: str, value: Any) -> None:
    """Check that an argument is the name of something, a string.

    Raises
    ------
    TypeError
        If it is anything else.
    """
    if not isinstance(value, str):
        raise TypeError(f"`{name}={value!r}` must be one name, a string, not {type(value).__name__}.")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Check that an argument is one of the allowed values.

    Raises
    ------
    ValueError
        If `value` is none of `allowed`.
    """
    alike = (option for option in allowed if type(value) is type(option) or isinstance(value, str))
    if not any(value is option or value == option for option in alike):
        hint = _did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise ValueError(f"`{name}={value!r}` is not allowed; choose one of {_listing(map(repr, allowed), 50)}.{hint}")


def check_flag(name: str, value: Any) -> bool:
    """Check that an argument is True or False, and return it as `bool`.

    Raises
    ------
    TypeError
        If it is anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}={value!r}` must be True or False, not {type(value).__name__}.")
    return bool(value)


def check_integer(name: str, value: Any, *, minimum: int = 1) -> int:
    """Check that an argument is a whole number of at least `minimum`, and return it as `int`.

    Raises
    ------
    TypeError
        If it is not a whole number (True and False are none).
    ValueError
        If it is below `minimum`.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}={value!r}` must be a whole number, not {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"`{name}={value}` must be at least {minimum}.")
    return int(value)


def check_devices(devices: Any) -> int:
    """Check a number of devices to train on, and that it is what torchrun or SLURM has started.

    Raises
    ------
    TypeError
        If it is not a whole number.
    ValueError
        If it is below 1, or is not the number of processes that have been started.
    ImportError
        If Lightning is needed and is not there.
    RuntimeError
        If this process is being started for a training, and has come here by reading the user's script.
    """
    number = check_integer("devices", devices)
    if number == 1:
        return number
    if importlib.util.find_spec("lightning") is None:
        raise ImportError(f"`devices={devices}` needs Lightning: pip install 'spaformer_sc[distributed]'.")
    found = launched()
    if found is not None and found[0] != devices:
        raise ValueError(
            f"`devices={devices}`, but {found[0]} processes have been started: pass devices={found[0]}, the number on "
            "all machines together, or start as many."
        )
    if being_started():
        raise RuntimeError(
            f"`devices={devices}` starts processes that read this script again: put what it does into a function, and "
            "call it under `if __name__ == '__main__':`."
        )
    return number


def check_kind_of_devices(devices: int, device: Any) -> None:
    """Check that training on several devices of a kind (``torch.device``) is possible on this machine.

    Raises
    ------
    ValueError
        If ``device`` is one in particular, is neither a CPU nor a CUDA GPU, or there are fewer GPUs.
    """
    if devices == 1:
        return
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise ValueError(f"`devices={devices}` needs `device='cpu'`, 'cuda' or 'auto', not {str(device)!r}.")
    found = launched()
    here = devices if found is None else found[1]
    if device.type == "cuda":
        import torch

        if here > torch.cuda.device_count():
            raise ValueError(
                f"`devices={devices}` asks for {here} GPUs on this machine, which shows {torch.cuda.device_count()}: "
                "pass fewer, or device='cpu'."
            )


def check_enough_cells(devices: int, n_cells: int) -> None:
    """Check that each device has a cell to train on.

    Raises
    ------
    ValueError
        If there are fewer cells.
    """
    if devices > n_cells:
        raise ValueError(f"`devices={devices}` are more than there are cells ({n_cells}); pass devices=1.")


def _check_real(name: str, value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}={value!r}` must be a number, not {type(value).__name__}.")
    return float(value)


def check_positive(name: str, value: Any, *, allow_zero: bool = False) -> float:
    """Check that an argument is a finite number above zero (or zero, if allowed), and return it as `float`.

    Raises
    ------
    TypeError
        If it is not a number.
    ValueError
        If it is negative, NaN or infinite, or zero where zero is not allowed.
    """
    number = _check_real(name, value)
    if not (np.isfinite(number) and (number > 0 or (allow_zero and number == 0))):
        raise ValueError(f"`{name}={value!r}` must be a finite number {'of at least' if allow_zero else 'above'} 0.")
    return number


def check_effort(value: Any) -> float:
    """Check a share of the training steps of a fit, above 0 and at most 1, and return it as `float`.

    Raises
    ------
    TypeError
        If it is not a number.
    ValueError
        If it is NaN, infinite or outside the range.
    """
    effort = check_number("effort", value, 0.0, 1.0)
    if effort == 0:
        raise ValueError("`effort=0` would train nothing; use the model as it is.")
    return effort


def check_resume(value: Any, output_path: Any) -> bool:
    """Check whether to go on with an unfinished run, and return it as `bool`.

    Raises
    ------
    TypeError
        If it is neither True nor False.
    ValueError
        If it is True without an `output_path`.
    """
    resume = check_flag("resume", value)
    if resume and output_path is None:
        raise ValueError("`resume=True` needs `output_path=`: what an unfinished run has done lies beside it.")
    return resume


def check_share(name: str, value: Any) -> float:
    """Check that an argument lies between 0 and 1, both excluded, and return it as `float`.

    Raises
    ------
    TypeError
        If it is not a number.
    ValueError
        If it is NaN, infinite or outside the range.
    """
    number = _check_real(name, value)
    if not 0 < number < 1:
        raise ValueError(f"`{name}={value!r}` must lie between 0 and 1, such as 0.9.")
    return number


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """Check that an argument is a finite number from `low` to `high`, and return it as `float`.

    Raises
    ------
    TypeError
        If it is not a number.
    ValueError
        If it is NaN, infinite or outside the range.
    """
    number = _check_real(name, value)
    if not (np.isfinite(number) and low <= number <= high):
        limit = f"at least {low:g}" if np.isinf(high) else f"from {low:g} to {high:g}"
        raise ValueError(f"`{name}={value!r}` must be a finite number, {limit}.")
    return number


# --- the AnnData ------------------------------------------------------------------------------------------------------


def check_adata(adata: Any) -> None:
    """Check that `adata` is an AnnData with cells, genes and unique gene names.

    Duplicated cell names do no harm to the computation and are only logged.

    Raises
    ------
    TypeError
        If it is not an AnnData (says where that of a SpatialData, a MuData or a file is found), or gene names are not
        strings.
    ValueError
        If it has no cells or no genes, or if gene names or columns of ``obs`` or ``var`` occur more than once.
    """
    check_is_anndata(adata)
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"`adata` has {adata.n_obs} cells and {adata.n_vars} genes; at least one of each is needed.")
    for slot in ("obs", "var"):
        columns = getattr(adata, slot).columns
        if not columns.is_unique:
            raise ValueError(
                f"`adata.{slot}` holds columns more than once: {_listing(columns[columns.duplicated()].unique(), 5)}. "
                f"Keep one of each: adata.{slot} = adata.{slot}.loc[:, ~adata.{slot}.columns.duplicated()]"
            )
    strange = [name for name in adata.var_names if not isinstance(name, str)]
    if strange:
        raise TypeError(
            f"`adata.var_names` must be strings, but {len(strange)} of {adata.n_vars} are not: "
            f"{_listing(map(repr, strange), 5)}. Make them so: adata.var_names = adata.var_names.astype(str)"
        )
    if not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()].unique()
        raise ValueError(
            f"`adata.var_names` holds {len(twice)} gene names more than once: {_listing(twice, 5)}. "
            "Call adata.var_names_make_unique() first."
        )
    if not adata.obs_names.is_unique:
        twice = adata.obs_names[adata.obs_names.duplicated()].unique()
        logger.warning(
            "`adata.obs_names` holds %d cell names more than once: %s. Cells are told apart by their place; "
            "adata.obs_names_make_unique() avoids trouble elsewhere.",
            len(twice),
            _listing(twice, 5),
        )


def is_spatialdata(data: Any) -> bool:
    """Whether this is a SpatialData, without an import of spatialdata."""
    names = [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(data).__mro__]
    return ("spatialdata", "SpatialData") in names


def check_table_key(data: Any, table_key: str | None) -> str | None:
    """Find the table to work on.

    Parameters
    ----------
    data
        What was passed as `adata`: an AnnData, or a SpatialData.
    table_key
        Name of a table of a SpatialData; None for its only one.

    Returns
    -------
    str, or None
        The name of the table; None if `data` is no SpatialData.

    Raises
    ------
    KeyError
        If there is no such table.
    TypeError
        If `table_key` is not a name.
    ValueError
        If a table is named though `data` is no SpatialData, if there is no table, or if there are several and none is
        named.
    """
    if not is_spatialdata(data):
        if table_key is not None:
            raise ValueError(NO_TABLES.format(table_key, f"of type {type(data).__name__}"))
        return None
    return choose_table(list(data.tables), table_key)


def choose_table(tables: list[str], table_key: str | None) -> str:
    """Choose one of the tables of a SpatialData; errors as of `check_table_key`."""
    if not tables:
        raise ValueError(
            "`adata` is a SpatialData without tables, so no counts; sdata.aggregate makes them of transcripts."
        )
    if table_key is None:
        if len(tables) > 1:
            raise ValueError(
                f"`adata` is a SpatialData of {len(tables)} tables: {_listing(tables)}. Name the one with the counts: "
                f"table_key={tables[0]!r}."
            )
        return str(tables[0])
    check_name("table_key", table_key)
    if table_key not in tables:
        raise KeyError(
            f"`table_key={table_key!r}` is not in `sdata.tables`; there are: {_listing(tables)}."
            f"{_did_you_mean(table_key, tables)}"
        )
    return table_key


def check_annotation(sdata: Any, key: str | None) -> tuple[pd.Series, pd.Series]:
    """Find the elements of a SpatialData that a table annotates.

    Parameters
    ----------
    sdata
        The SpatialData.
    key
        The table; None where `check_table_key` found no SpatialData.

    Returns
    -------
    Name of the element, and name of the instance in it, of each row of the table; both numbered from 0.

    Raises
    ------
    KeyError
        If an element is gone.
    TypeError
        If `sdata` is no SpatialData.
    ValueError
        If the table annotates nothing.
    """
    if key is None:
        raise TypeError(f"`sdata` must be a SpatialData, not {type(sdata).__name__}.")
    table = sdata.tables[key]
    attrs = table.uns.get("spatialdata_attrs", {})
    if not (attrs.get("region_key") in table.obs and attrs.get("instance_key") in table.obs):
        raise ValueError(
            f"the table {key!r} annotates no element; sdata.set_table_annotates_spatialelement says which it does."
        )
    regions = pd.Series(table.obs[attrs["region_key"]].astype(str).to_numpy())
    gone = [region for region in regions.unique() if region not in sdata]
    if gone:
        raise KeyError(f"the table {key!r} annotates {_listing(gone)}, which the SpatialData does not hold.")
    return regions, pd.Series(table.obs[attrs["instance_key"]].to_numpy())


def check_view(adata: AnnData, copy: bool) -> None:
    """Check that results can be written into `adata`, unless they go into a copy; log that a view becomes one.

    Raises
    ------
    ValueError
        If it is a view of a file.
    """
    if adata.isbacked and adata.is_view and not copy:
        raise ValueError(
            "`adata` is a view of a file, which cannot be written to: pass copy=True, or adata.to_memory()."
        )
    if adata.is_view and not copy:
        logger.warning(
            "`adata` is a view; results are written to a copy of it. Keep the view in a variable to have them."
        )


def check_is_anndata(adata: Any) -> None:
    """Check that `adata` is an AnnData.

    Raises
    ------
    TypeError
        If it is not; says where that of a SpatialData, a MuData or a file is found.
    """
    if isinstance(adata, AnnData):
        return
    kind = type(adata).__name__
    hints = {
        "SpatialData": " Pass the table in it: sdata.tables['table'].",
        "MuData": " Pass one modality of it: mdata.mod['rna'].",
    }
    hint = hints.get(kind, "")
    if isinstance(adata, str | Path):
        hint = " Read the file first: anndata.read_h5ad(…)."
    elif isinstance(adata, pd.DataFrame | np.ndarray) or sparse.issparse(adata):
        hint = " Make one: anndata.AnnData(counts, obs=cells, var=genes, obsm={'spatial': positions})."
    raise TypeError(f"`adata` must be an AnnData, not {kind}.{hint}")


# --- counts -----------------------------------------------------------------------------------------------------------


def read_counts(
    adata: AnnData, layer: str | None = None, *, transformed: Literal["refuse", "warn"] = "refuse"
) -> sparse.csr_matrix:
    """Read the raw counts of all cells, checked.

    Takes dense and sparse matrices of any numeric type, in memory, backed by a file or lazy. Counts with a fraction, as
    they come out of ambient RNA removal, are passed on as they are, with a logged warning (see `is_whole` and
    `integerize`). What looks normalised or log-transformed is refused.

    Parameters
    ----------
    adata
        The data, as accepted by `check_adata`.
    layer
        Name of the layer that holds the counts; None for `adata.X`.
    transformed
        What to do with values that look normalised or log-transformed. A guess from few cells can be wrong, so cells
        given to a model that was fitted on fractional counts are taken with a logged warning.

    Returns
    -------
    csr_matrix, cells × genes, float32
        Sorted indices, no duplicates, no explicit zeros. A matrix that is like that is not copied; what is returned is
        read-only.

    Raises
    ------
    KeyError
        If there is no such layer.
    TypeError
        If the values are not numbers.
    ValueError
        If the matrix is missing, masked or empty, or holds NaN, infinite, negative, normalised or log-transformed
        values.
    """
    name, matrix = _matrix(adata, layer)
    counts = _as_csr(_in_memory(matrix), name)
    _check_values(adata, layer, counts)
    if counts.nnz == 0:
        raise ValueError(f"`{name}` has no counts: every entry is zero. {_where_counts_are(adata, layer)}")
    if not is_whole(counts):
        _check_fractions(adata, layer, counts, _fractional(counts.data).mean(), transformed)
    return counts


def scan_counts(
    adata: AnnData, layer: str | None = None, *, transformed: Literal["refuse", "warn"] = "refuse"
) -> Counts:
    """Check raw counts that lie in a file or lazy array, block by block, without taking them into memory.

    Arguments and errors as of `read_counts`. Values with fractions are judged by the first block that has some.

    Returns
    -------
    Counts that are read when they are needed.
    """
    name, matrix = _matrix(adata, layer)
    if getattr(matrix, "format", None) == "csc" or isinstance(matrix, np.ndarray) or sparse.issparse(matrix):
        # Rows of a CSC matrix can only be had by reading all of it.
        counts = read_counts(adata, layer, transformed=transformed)
        return in_memory(counts, not is_whole(counts))

    def read(rows: slice | npt.NDArray[np.int64]) -> sparse.csr_matrix:
        if isinstance(rows, np.ndarray) and len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
        return _as_csr(_in_memory(matrix[rows]), name)

    n_cells, n_genes = adata.shape
    per_cell, per_gene, n_filled = np.zeros(n_cells), np.zeros(n_genes), np.zeros(n_cells, dtype=np.int64)
    doubtful, n_fractional = None, 0
    checksum = hashlib.sha256()
    step = max(1, _SCANNED // n_genes)
    for start in range(0, n_cells, step):
        rows = slice(start, min(start + step, n_cells))
        block = read(rows)
        _check_values(adata, layer, block, start)
        per_cell[rows], of_genes = sums(block)
        per_gene += of_genes
        n_filled[rows] = np.diff(block.indptr)
        add_to(checksum, block)
        if not is_whole(block):
            doubtful = block if doubtful is None else doubtful
            n_fractional += int(_fractional(block.data).sum())
    if not per_cell.any():
        raise ValueError(f"`{name}` has no counts: every entry is zero. {_where_counts_are(adata, layer)}")
    if doubtful is not None:
        _check_fractions(adata, layer, doubtful, n_fractional / n_filled.sum(), transformed)
    shape = n_cells, n_genes
    return Counts(shape, per_cell, per_gene, n_filled, doubtful is not None, checksum.hexdigest, read)


def lies_outside_memory(adata: AnnData, layer: str | None) -> bool:
    """Whether the counts are in a file or a lazy array."""
    _, matrix = _matrix(adata, layer)
    return not isinstance(matrix, np.ndarray) and not sparse.issparse(matrix)


def _matrix(adata: AnnData, layer: str | None) -> tuple[str, Any]:
    """Find the matrix of counts, and its name in messages."""
    if layer is None:
        if adata.X is None:
            raise ValueError(f"`adata.X` is None. Pass `layer=`; there are: {_listing(_layers(adata))}.")
        return "adata.X", adata.X
    check_layer("layer", adata, layer, " Pass layer=None to use `adata.X`.")
    return f"adata.layers[{layer!r}]", adata.layers[layer]


def check_layer(name: str, adata: AnnData, value: Any, advice: str = "") -> None:
    """Check that an argument names a layer.

    Raises
    ------
    KeyError
        If there is no such layer.
    TypeError
        If it is not a name.
    """
    check_name(name, value)
    if value not in adata.layers:
        raise KeyError(
            f"`{name}={value!r}` is not in `adata.layers`; there are: {_listing(_layers(adata))}.{advice}"
            f"{_did_you_mean(value, _layers(adata))}"
        )


def _check_values(adata: AnnData, layer: str | None, counts: sparse.csr_matrix, start: int = 0) -> None:
    """Refuse values that no counts can have; ``counts`` are those of the cells from ``start`` on."""
    name = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    infinite = ~np.isfinite(counts.data)
    if infinite.any():
        raise ValueError(
            f"`{name}` holds {infinite.sum()} values that are NaN or infinite, the first "
            f"{_place(adata, counts, infinite, start)}. Raw counts have none: write 0 for no transcripts, and name the "
            "entries that were not measured in `missing=`."
        )
    negative = counts.data < 0
    if negative.any():
        raise ValueError(
            f"`{name}` holds {negative.sum()} negative values (lowest {counts.data.min():.4g}, the first "
            f"{_place(adata, counts, negative, start)}): it looks scaled or centred, and raw counts are needed. "
            f"{_where_counts_are(adata, layer)}"
        )
    large = counts.data > _LARGEST_COUNT
    if large.any():
        raise ValueError(
            f"`{name}` holds {large.sum()} values above {_LARGEST_COUNT:.0e} (largest {counts.data.max():.4g}, the "
            f"first {_place(adata, counts, large, start)}): no cell has so many transcripts of a gene, and raw counts "
            f"are needed. {_where_counts_are(adata, layer)}"
        )


def _check_fractions(
    adata: AnnData, layer: str | None, counts: sparse.csr_matrix, share: float, transformed: Literal["refuse", "warn"]
) -> None:
    """Refuse what looks transformed, and say that the rest is taken as counts."""
    name = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    looks = _transformation(counts)
    if looks is not None and transformed == "refuse":
        raise ValueError(f"`{name}` {looks}, and raw counts are needed. {_where_counts_are(adata, layer)}")
    if looks is not None:
        logger.warning(
            "`%s` %s, and raw counts are needed; the model was fitted on fractional counts too.", name, looks
        )
    logger.warning(
        "`%s` holds fractional values (%.1f %% of what is not zero). They are taken as counts, as corrected counts "
        "(ambient RNA removed) are; pass `layer=` if raw counts are elsewhere.",
        name,
        100 * share,
    )


def _as_csr(matrix: Any, name: str) -> sparse.csr_matrix:
    """A read-only float32 CSR matrix in canonical form without explicit zeros; a copy where it has to be."""
    if np.ma.isMaskedArray(matrix):
        raise ValueError(
            f"`{name}` is a masked array, and a mask is lost as soon as it is written to a file. Store "
            "`.filled(0)` in its place and the mask as a layer that `missing=` names."
        )
    if matrix.dtype.kind not in "buif":
        raise TypeError(
            f"`{name}` must hold numbers, but its dtype is {matrix.dtype}; if they are numbers: {name} = "
            f"{name}.astype('float32')"
        )
    with np.errstate(over="ignore"):
        if not sparse.issparse(matrix):
            matrix = np.asarray(matrix, dtype=np.float32)
        counts = sparse.csr_matrix(matrix, dtype=np.float32)
    if not counts.has_canonical_format or not counts.data.all():
        counts = counts.copy()
        counts.sum_duplicates()
        counts.eliminate_zeros()
    for part in ("data", "indices", "indptr"):
        shown = getattr(counts, part).view()
        shown.flags.writeable = False
        setattr(counts, part, shown)
    return counts


def _place(adata: AnnData, counts: sparse.csr_matrix, bad: npt.NDArray[np.bool_], start: int) -> str:
    """Say where the first entry marked in `bad` (over ``counts.data``, cells from ``start`` on) lies."""
    first = int(np.argmax(bad))
    cell = start + int(np.searchsorted(counts.indptr, first, side="right")) - 1
    gene = int(counts.indices[first])
    return f"in cell {adata.obs_names[cell]!r}, gene {adata.var_names[gene]!r}"


def _fractional(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    return np.asarray(values != np.rint(values))


def is_whole(counts: sparse.csr_matrix) -> bool:
    """Say whether every count is a whole number."""
    return not bool(_fractional(counts.data).any())


def integerize(counts: sparse.csr_matrix, rng: np.random.Generator) -> sparse.csr_matrix:
    """Round counts to whole numbers at random, without bias.

    A value x becomes ⌊x⌋ + 1 with probability x − ⌊x⌋ and ⌊x⌋ otherwise, so that its expectation stays x. For what
    needs whole counts, such as binomial thinning.

    Parameters
    ----------
    counts
        Counts, cells × genes, none negative.
    rng
        The generator that the rounding draws from.

    Returns
    -------
    csr_matrix, cells × genes, of the dtype of `counts`
        A new matrix without explicit zeros.
    """
    whole = counts.copy()
    floor = np.floor(counts.data)
    whole.data = floor + (rng.random(counts.nnz) < counts.data - floor).astype(counts.dtype)
    whole.eliminate_zeros()
    return whole


def _where_counts_are(adata: AnnData, layer: str | None) -> str:
    """Say which other matrices of `adata` hold whole numbers, and how to pass them."""
    found = [
        f"`adata.layers[{key!r}]` holds whole numbers: pass layer={key!r}."
        for key in _layers(adata)
        if key != layer and _holds_counts(adata.layers[key])
    ]
    if layer is not None and adata.X is not None and _holds_counts(adata.X):
        found.append("`adata.X` holds whole numbers: pass layer=None.")
    if adata.raw is not None and _holds_counts(adata.raw.X):
        found.append(
            "`adata.raw` holds whole numbers: set adata.layers['counts'] = adata.raw[:, adata.var_names].X "
            "and pass layer='counts'."
        )
    return " ".join(found) or (
        "Nothing else in `adata` holds whole numbers: go back to the raw data, and keep them with "
        "adata.layers['counts'] = adata.X.copy() before normalising."
    )


def _holds_counts(matrix: Any) -> bool:
    """Say whether the first cells of a matrix hold whole numbers of at least zero, not all of them zero."""
    matrix = _in_memory(matrix[:_CELLS_LOOKED_AT])
    values = matrix.data if sparse.issparse(matrix) else np.asarray(matrix).ravel()
    if values.dtype.kind not in "buif" or values.size == 0 or not np.isfinite(values).all():
        return False
    return bool(values.min() >= 0 and values.max() > 0 and not _fractional(values).any())


def _transformation(counts: sparse.csr_matrix) -> str | None:
    """Say how fractional values came about, as far as it shows; None if they may be counts."""
    share = float(_fractional(counts.data).mean())
    largest = float(counts.data.max())
    filled = np.flatnonzero(np.diff(counts.indptr))
    cells = filled[np.unique(np.linspace(0, filled.size - 1, min(filled.size, _CELLS_LOOKED_AT)).astype(int))]
    sample = counts[cells].astype(np.float64)

    if _same_totals(sample):
        return "looks normalised (every cell has the same total)"
    if share > 0.5 and _multiples_of_smallest(sample):
        return "looks normalised (in every cell the values are multiples of the smallest one)"
    squares = sample.data[_fractional(sample.data)] ** 2
    if squares.size >= 20 and np.mean(np.abs(squares - np.rint(squares)) < 0.01) > 0.9:
        return "looks like square roots (their squares are whole numbers)"
    if largest < _LARGEST_LOG:
        for base, log in ((np.e, "log1p"), (2.0, "log2(x + 1)"), (10.0, "log10(x + 1)")):
            undone = sample.copy()
            undone.data = np.expm1(sample.data * np.log(base))
            if _same_totals(undone):
                return f"looks log-transformed (without the {log}, every cell has the same total)"
            if share > 0.5 and _multiples_of_smallest(undone):
                return f"looks log-transformed (without the {log}, the values of a cell are multiples of the smallest)"
        if share >= _FRACTIONAL_THROUGHOUT:
            return (
                f"looks log-transformed ({100 * share:.0f} % of its values are fractional, none is above {largest:.3g})"
            )
    return None


def _same_totals(sample: sparse.csr_matrix) -> bool:
    """Say whether at least three cells have totals that agree within 1 % (19 of 20 of them)."""
    totals = np.asarray(sample.sum(axis=1)).ravel()
    return totals.size >= 3 and bool(np.quantile(np.abs(totals / np.median(totals) - 1), 0.95) < 0.01)


def _multiples_of_smallest(sample: sparse.csr_matrix) -> bool:
    """Say whether the values of a cell are whole multiples of its smallest one, as scaled counts are.

    Looks at ratios up to 50, beyond which rounding blurs them; about 4 % of arbitrary ratios would pass.
    """
    smallest = np.minimum.reduceat(sample.data, sample.indptr[:-1])
    ratios = sample.data / np.repeat(smallest, np.diff(sample.indptr))
    ratios = ratios[(ratios > 1.001) & (ratios < 50)]
    return ratios.size >= 20 and bool(np.mean(np.abs(ratios - np.rint(ratios)) < 0.02) > 0.8)


def describe_empty(counts: Counts) -> None:
    """Log how many cells and how many genes have no counts; both are allowed."""
    cells = int(np.sum(counts.per_cell == 0))
    genes = int(np.sum(counts.per_gene == 0))
    if cells:
        logger.warning(
            "%d of %d cells have no counts: their expression is imputed as 0; rates and embedding come from what "
            "is around them.",
            cells,
            counts.shape[0],
        )
    if genes:
        logger.warning("%d of %d genes have no counts: they stay near zero.", genes, counts.shape[1])


def describe_controls(adata: AnnData) -> None:
    """Log which features are no genes, by their name or type; they are taken as genes."""
    found = {name: _CONTROLS.match(str(name)) for name in adata.var_names}
    begin = {name: match.group() for name, match in found.items() if match}
    chosen = f"~adata.var_names.str.startswith({tuple(sorted(set(begin.values())))!r})"
    controls = list(begin)
    if "feature_types" in adata.var:  # as scanpy reads files of 10x Genomics
        genes = (adata.var["feature_types"].astype(str) == "Gene Expression").to_numpy()
        if genes.any() and not genes.all():
            chosen, controls = "adata.var['feature_types'] == 'Gene Expression'", list(adata.var_names[~genes])
    if controls:
        logger.warning(
            "%d of %d features are no genes by their name or type: %s. They are taken as genes, and count towards "
            "library sizes. To leave them out: adata = adata[:, %s].copy(). `genes=` leaves them out of the result "
            "only.",
            len(controls),
            adata.n_vars,
            _listing(controls, 5),
            chosen,
        )


def check_layer_of_missing(adata: AnnData, missing: str | None) -> npt.NDArray[np.bool_] | None:
    """Read the layer that marks the entries that were not measured.

    Parameters
    ----------
    adata
        The data.
    missing
        Name of a layer that is True (or 1) where a gene was not measured in a cell and False (or 0) elsewhere.

    Returns
    -------
    bool array, cells × genes, or None
        True where not measured; a copy. None if `missing` is None.

    Raises
    ------
    KeyError
        If there is no such layer.
    ValueError
        If it holds anything but True and False (1 and 0), or marks every entry.
    """
    if missing is None:
        return None
    check_layer("missing", adata, missing)
    layer = _in_memory(adata.layers[missing])
    if np.ma.isMaskedArray(layer):
        raise ValueError(f"`missing={missing!r}` is a masked array; fill it: adata.layers[{missing!r}].filled(True)")
    values = layer.data if sparse.issparse(layer) else np.asarray(layer)
    strange = values[(values != 0) & (values != 1)]
    if strange.size:
        raise ValueError(
            f"`missing={missing!r}` must be a layer of True (not measured) and False (measured), or 1 and 0; "
            f"found {strange.ravel().tolist()[0]!r} among {strange.size} other values."
        )
    mask = np.array(layer.toarray() if sparse.issparse(layer) else layer).astype(bool)
    if mask.all():
        raise ValueError(f"`missing={missing!r}` marks every entry as not measured; is it the wrong way round?")
    nowhere = np.flatnonzero(mask.all(axis=0))
    if nowhere.size:
        logger.warning(
            "`missing=%r` marks %d genes in every cell: %s. Nothing can be learnt of them.",
            missing,
            nowhere.size,
            _listing(adata.var_names[nowhere], 5),
        )
    return mask


# --- genes ------------------------------------------------------------------------------------------------------------


def check_genes(adata: AnnData, genes: Any) -> npt.NDArray[np.int64]:
    """Find genes by name.

    Parameters
    ----------
    adata
        The data, with unique gene names.
    genes
        A name, a sequence of names, a boolean mask over `adata.var_names`, or None for all genes.

    Returns
    -------
    int64 array
        Their columns, in the order asked for.

    Raises
    ------
    KeyError
        If genes are not in `adata.var_names`; names the first five.
    TypeError
        If they are neither names nor a mask.
    ValueError
        If there are none, if one is named twice, or if a mask does not fit.
    """
    if genes is None:
        return np.arange(adata.n_vars, dtype=np.int64)
    if isinstance(genes, set | frozenset):
        raise TypeError("`genes` is a set, which has no order; pass a list, such as sorted(genes).")
    if isinstance(genes, pd.Series) and pd.api.types.is_bool_dtype(genes) and not genes.index.equals(adata.var_names):
        raise ValueError("`genes` is a boolean Series whose index is not `adata.var_names`; take it from `adata.var`.")
    names = not isinstance(genes, str | bytes) and hasattr(genes, "__iter__")
    asked = np.asarray(pd.Index(genes) if names else [genes] if isinstance(genes, str) else genes)
    if asked.dtype == object and asked.ndim == 1 and {type(name) for name in asked} in ({bool}, {np.bool_}):
        asked = asked.astype(bool)
    strange = asked.dtype == object and not all(isinstance(name, str) for name in asked.ravel())
    if asked.ndim != 1 or asked.dtype.kind in "uifcS" or strange:
        raise TypeError(
            f"`genes` must be gene names or a boolean mask over `adata.var_names`, not {type(genes).__name__} of "
            f"{asked.dtype}; names of columns are adata.var_names[columns]."
        )
    if asked.dtype.kind == "b":
        if asked.size != adata.n_vars:
            raise ValueError(f"`genes` is a mask of {asked.size} values, but `adata` has {adata.n_vars} genes.")
        columns = np.flatnonzero(asked)
    else:
        columns = adata.var_names.get_indexer(asked)
        unknown = asked[columns < 0]
        if unknown.size:
            mask = isinstance(genes, str) and genes in adata.var and adata.var[genes].dtype == bool
            hint = (
                f" For the mask in `adata.var`, pass adata.var[{genes!r}]."
                if mask
                else _did_you_mean(str(unknown[0]), adata.var_names)
            )
            raise KeyError(f"`genes`: {unknown.size} not in `adata.var_names`: {_listing(unknown, 5)}.{hint}")
        twice = pd.Index(asked)[pd.Index(asked).duplicated()].unique()
        if len(twice):
            raise ValueError(f"`genes` names {len(twice)} genes more than once: {_listing(twice, 5)}.")
    if columns.size == 0:
        raise ValueError("`genes` names no gene; pass None for all of them.")
    return np.asarray(columns, dtype=np.int64)


# --- space ------------------------------------------------------------------------------------------------------------


def check_coordinates(
    adata: AnnData, spatial_key: str, codes: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.float64]:
    """Read the position of every cell.

    Parameters
    ----------
    adata
        The data.
    spatial_key
        Name of the positions in `adata.obsm`: an array or a DataFrame with two or three columns.
    codes
        The field of view of every cell as a number, to look at each by itself for cells in one place; None for one
        field.

    Returns
    -------
    float64 array, cells × 2 or cells × 3
        The positions, in the user's unit; a copy.

    Raises
    ------
    KeyError
        If there is no such entry.
    TypeError
        If the positions are not numbers.
    ValueError
        If there are not two or three columns, or positions are NaN, infinite or beyond all units in use.
    """
    check_name("spatial_key", spatial_key)
    if spatial_key not in adata.obsm:
        raise KeyError(
            f"`spatial_key={spatial_key!r}` is not in `adata.obsm`; there are: {_listing(adata.obsm)}. "
            "Positions of cells are needed there, as an array of cells × 2; from columns of `adata.obs`: "
            "adata.obsm['spatial'] = adata.obs[['x', 'y']].to_numpy()."
            + (
                " From the elements of a SpatialData: sf.pp.centroids(sdata)."
                if "spatialdata_attrs" in adata.uns
                else ""
            )
            + f"{_did_you_mean(str(spatial_key), adata.obsm)}"
        )
    name = f"adata.obsm[{spatial_key!r}]"
    found = adata.obsm[spatial_key]
    if isinstance(found, pd.DataFrame):
        strange = [column for column in found if not pd.api.types.is_numeric_dtype(found[column])]
        if strange:
            raise TypeError(
                f"`{name}` must hold numbers, but these columns do not: {_listing(strange)}. Leave them out, or "
                "convert them."
            )
        found = found.to_numpy(dtype=np.float64, na_value=np.nan)
    found = _in_memory(found)
    if np.ma.is_masked(found):
        raise ValueError(
            f"`{name}` is a masked array without the positions of some cells; leave these cells out, and store the "
            "rest as an array without a mask."
        )
    found = found.toarray() if sparse.issparse(found) else np.asarray(found)
    if found.ndim != 2 or found.shape[1] not in (2, 3):
        raise ValueError(
            f"`{name}` must have two or three columns (x, y and perhaps z), but its shape is {found.shape}. "
            "Name the positions of the cells in `spatial_key=`."
        )
    if found.dtype.kind not in "uif":
        raise TypeError(
            f"`{name}` must hold numbers, but its dtype is {found.dtype}; if they are numbers: {name} = "
            f"{name}.astype(float)"
        )
    coordinates = found.astype(np.float64)
    bad = ~np.isfinite(coordinates).all(axis=1)
    if bad.any():
        raise ValueError(
            f"`{name}` is NaN or infinite for {bad.sum()} of {adata.n_obs} cells: "
            f"{_listing((repr(cell) for cell in adata.obs_names[bad]), 5)}. Leave them out: "
            f"adata = adata[np.isfinite(adata.obsm[{spatial_key!r}]).all(axis=1)].copy()"
        )
    far = (np.abs(coordinates) > _LARGEST_POSITION).any(axis=1)
    if far.any():
        raise ValueError(
            f"`{name}` lies beyond {_LARGEST_POSITION:.0e} for {far.sum()} of {adata.n_obs} cells: "
            f"{_listing((repr(cell) for cell in adata.obs_names[far]), 5)}. If such numbers stand for missing "
            "positions, leave these cells out; otherwise give positions in another unit."
        )
    _report_cells_in_one_place(name, coordinates, np.zeros(adata.n_obs, np.int64) if codes is None else codes)
    return coordinates


def _report_cells_in_one_place(name: str, coordinates: npt.NDArray[np.float64], codes: npt.NDArray[np.int64]) -> None:
    """Log how many fields of two or more cells have all of them in one place."""
    extent = pd.DataFrame(coordinates).groupby(codes).agg(np.ptp).to_numpy().max(axis=1)
    flat = int(np.sum((extent == 0) & (np.unique(codes, return_counts=True)[1] > 1)))
    if flat:
        what = "all cells are" if len(extent) == 1 else f"in {flat} of {len(extent)} fields of view all cells are"
        logger.warning("`%s`: %s in one and the same place, so their neighbours mean nothing.", name, what)


def check_images_apart(
    adata: AnnData,
    spatial_key: str,
    coordinates: npt.NDArray[np.float64],
    codes: npt.NDArray[np.int64],
    library: list[str] | None,
) -> None:
    """Check that images which are taken as one field of view do not lie on top of each other.

    They do where positions count from the corner of each image, as in what ``squidpy.read.nanostring`` and
    ``spatialdata_io.cosmx`` put into ``obsm["spatial"]``. Judged by nearest neighbours that are of another image in a
    place that both cover (`spaformer_sc.data._overlap`).

    Parameters
    ----------
    adata
        The data.
    spatial_key
        Name of the positions.
    coordinates
        The positions (cells × 2 or 3).
    codes
        The field of view of each cell (cells,).
    library
        The columns of ``adata.obs`` that name it; None for one field.

    Warns
    -----
    UserWarning
        If images lie on top of each other that are told apart by a column of slides, samples or the like, or that do so
        in part.

    Raises
    ------
    ValueError
        If images lie on top of each other that are told apart by a column of fields of view, and a quarter of the
        neighbours are of another.
    """
    from spaformer_sc.data._labels import as_frame, field_codes, fov_columns, slide_columns, suggested_library_key
    from spaformer_sc.data._overlap import Neighbours

    near = Neighbours(coordinates, codes)
    fovs = fov_columns(adata.obs)
    given = library or []
    for column in dict.fromkeys([*fovs, *slide_columns(adata.obs), *_columns_of_images(adata)]):
        if column in given or as_frame(adata.obs, [column])[column].isna().any():
            continue
        images, names = field_codes(adata.obs, column)
        if near.overlaid(images) < _OVERLAID:
            continue
        suggested = suggested_library_key(adata.obs)
        columns = [*given, column] if library is not None or column not in suggested else suggested
        advice = f"library_key={(columns[0] if len(columns) == 1 else columns)!r}"
        others = [key for key in adata.obsm if key != spatial_key and _lies_apart(adata, key, codes, images)]
        if others:
            advice += f", or spatial_key={others[0]!r}, where they lie beside each other"
        message = (
            f"`spatial_key={spatial_key!r}`: the {len(names)} images that `adata.obs[{column!r}]` tells apart lie on "
            "top of each other, as where positions start anew in each, and cells of different images would be taken as "
            f"neighbours. Pass {advice}."
        )
        if column in fovs and near.mixed(images) >= _REFUSED:
            raise ValueError(f"{message} If they show one place (planes of a stack), rename the column.")
        warnings.warn(message, UserWarning, stacklevel=_stack_level())
        return


def lie_on_each_other(coordinates: npt.NDArray[np.float64], images: npt.NDArray[np.int64]) -> bool:
    """Whether images, given as a number for each cell, would lie on top of each other in one picture."""
    from spaformer_sc.data._overlap import Neighbours

    return Neighbours(coordinates, np.zeros(len(images), np.int64)).overlaid(images) >= _OVERLAID


def _columns_of_images(adata: AnnData) -> list[str]:
    """Columns that tell images apart by what squidpy or spatialdata recorded of them."""
    from spaformer_sc.data._labels import as_frame

    attrs = adata.uns.get("spatialdata_attrs")
    found = [attrs["region_key"]] if isinstance(attrs, Mapping) and attrs.get("region_key") in adata.obs.columns else []
    images = adata.uns.get("spatial")
    if isinstance(images, Mapping) and len(images) > 1:
        obs = as_frame(adata.obs)
        discrete = [column for column in obs if isinstance(obs[column].dtype, pd.CategoricalDtype)]
        found += [column for column in discrete if set(map(str, obs[column].cat.categories)) == set(images)]
    return found


def _lies_apart(adata: AnnData, key: str, codes: npt.NDArray[np.int64], images: npt.NDArray[np.int64]) -> bool:
    """Whether an entry of ``adata.obsm`` holds positions at which images lie beside each other."""
    from spaformer_sc.data._overlap import Neighbours

    found = adata.obsm[key]
    if key.startswith("X_") or not isinstance(found, np.ndarray) or found.ndim != 2 or found.shape[1] not in (2, 3):
        return False
    if found.dtype.kind not in "uif" or not np.isfinite(found).all():
        return False
    return Neighbours(found.astype(np.float64), codes).overlaid(images) < _OVERLAID


def check_representation(adata: AnnData, use_rep: Any) -> npt.NDArray[np.float32]:
    """Read a representation of the cells.

    Returns
    -------
    float32 array, cells × dimensions

    Raises
    ------
    KeyError
        If there is no such entry of `adata.obsm`.
    TypeError
        If it is not named by a string, or does not hold numbers.
    ValueError
        If values are NaN or infinite.
    """
    check_name("use_rep", use_rep)
    if use_rep not in adata.obsm:
        raise KeyError(
            f"`use_rep={use_rep!r}` is not in `adata.obsm`; there are: {_listing(adata.obsm)}."
            f"{_did_you_mean(use_rep, adata.obsm)}"
        )
    found = _in_memory(adata.obsm[use_rep])
    found = found.toarray() if sparse.issparse(found) else np.asarray(found)
    if found.dtype.kind not in "buif":
        raise TypeError(f"`use_rep={use_rep!r}` must hold numbers, but its dtype is {found.dtype}.")
    if not np.isfinite(found).all():
        raise ValueError(f"`use_rep={use_rep!r}` holds {np.sum(~np.isfinite(found))} values that are NaN or infinite.")
    return np.asarray(found, dtype=np.float32)


def _stack_level() -> int:
    """Return the `stacklevel` at which a warning points to the first line outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    return level


def check_library_key(adata: AnnData, library_key: str | Sequence[str] | None) -> list[str] | None:
    """Check the columns that tell fields of view apart.

    Parameters
    ----------
    adata
        The data.
    library_key
        One column of `adata.obs`, or several whose combination names a field of view, such as slide and fov. None
        takes all cells as one field.

    Returns
    -------
    list of str, or None
        The columns; None if `library_key` is None.

    Warns
    -----
    UserWarning
        If `library_key` is None though a column looks like one, or if the labels of the given column occur again on
        several slides.

    Raises
    ------
    KeyError
        If a column does not exist.
    TypeError
        If `library_key` is neither a name nor a sequence of names.
    ValueError
        If no column is named or one twice, if labels are missing, or if a column holds measurements.
    """
    from spaformer_sc.data._labels import as_frame, fov_columns, slide_columns, suggested_library_key

    if library_key is None:
        suggestion = suggested_library_key(adata.obs)
        if suggestion:
            call = suggestion[0] if len(suggestion) == 1 else suggestion
            warnings.warn(
                f"`library_key` is None, so all cells are taken as one field of view, but `adata.obs` has columns that "
                f"look as if there were several: {_listing(suggestion)}. Pass library_key={call!r} if so.",
                UserWarning,
                stacklevel=_stack_level(),
            )
        return None

    columns = check_library_columns(library_key)
    if not columns or len(set(columns)) < len(columns):
        raise ValueError(f"`library_key={library_key!r}` must name at least one column, and none twice.")
    check_in_obs(adata, columns)
    labels = as_frame(adata.obs, list(columns))
    for column in columns:
        _check_labels(column, labels[column])
    if len(columns) == 1 and columns[0] in fov_columns(adata.obs):
        for slide in slide_columns(adata.obs):
            both = as_frame(adata.obs, [slide, columns[0]])
            if both.groupby(columns[0], observed=True)[slide].nunique().max() > 1:
                warnings.warn(
                    f"`library_key={columns[0]!r}`: the same label occurs for several values of "
                    f"`adata.obs[{slide!r}]`, so cells of different slides share a field of view. Pass "
                    f"library_key={[slide, columns[0]]!r} if the labels start again on every slide.",
                    UserWarning,
                    stacklevel=_stack_level(),
                )
                break
    return list(columns)


def check_library_columns(library_key: Any) -> list[str]:
    """Check that a `library_key` is the name of a column or a list of such, and return the list.

    Raises
    ------
    TypeError
        If it is anything else.
    """
    columns = [library_key] if isinstance(library_key, str) else library_key
    if not isinstance(columns, Sequence) or not all(isinstance(column, str) for column in columns):
        raise TypeError(
            f"`library_key={library_key!r}` must be the name of a column of `adata.obs` or a list of names."
        )
    return list(columns)


def check_in_obs(adata: AnnData, columns: Iterable[str]) -> None:
    """Check that columns that name fields of view are there.

    Raises
    ------
    KeyError
        If one is not.
    """
    from spaformer_sc.data._labels import as_frame

    for column in columns:
        if column not in adata.obs.columns:
            obs = as_frame(adata.obs)
            discrete = [name for name in obs if isinstance(obs[name].dtype, pd.CategoricalDtype)]
            raise KeyError(
                f"`library_key={column!r}` is not in `adata.obs`; categorical columns are: {_listing(discrete)}."
                f"{_did_you_mean(column, adata.obs.columns)}"
            )


def check_some_left(n_counts: int) -> None:
    """Check that entries that were measured have counts.

    Raises
    ------
    ValueError
        If there are no counts.
    """
    if n_counts == 0:
        raise ValueError(
            "`missing` marks every entry that has counts, so that nothing is left to fit; is it the wrong way round? "
            "It is True where a gene was not measured."
        )


def _check_labels(column: str, labels: pd.Series) -> None:
    """Check that one column has a label for every cell and holds labels, not measurements."""
    missing = int(labels.isna().sum())
    if missing:
        raise ValueError(
            f"`library_key={column!r}`: {missing} of {len(labels)} cells have no label in `adata.obs[{column!r}]`. "
            f"Leave them out: adata = adata[adata.obs[{column!r}].notna()].copy(), or give them a label."
        )
    if labels.dtype.kind == "f" and _fractional(labels.to_numpy(dtype=np.float64)).any():
        raise ValueError(
            f"`library_key={column!r}`: `adata.obs[{column!r}]` holds measurements ({labels.nunique()} values of dtype "
            f"{labels.dtype}), not labels of fields of view; name the column that has them."
        )
    if not pd.api.types.is_numeric_dtype(labels):
        spelled = labels.astype(str).isin(["", "nan", "NaN", "None", "<NA>"]).sum()
        if spelled:
            logger.warning(
                "`library_key=%r`: the label of %d cells is an empty or missing value written as text; "
                "they are taken as one field of view. Leave them out, or give them labels, if they are not one.",
                column,
                spelled,
            )


def check_connectivities(adata: AnnData, connectivity_key: str) -> sparse.csr_matrix:
    """Read the user's own spatial graph.

    Parameters
    ----------
    adata
        The data.
    connectivity_key
        Name of the graph in `adata.obsp`, such as ``"spatial_connectivities"``.

    Returns
    -------
    csr_matrix, cells × cells, float32
        The weights of the edges as they are there; a copy.

    Raises
    ------
    KeyError
        If there is no such graph.
    ValueError
        If it holds distances or is no graph (see `check_graph`).
    """
    check_name("connectivity_key", connectivity_key)
    if connectivity_key not in adata.obsp:
        raise KeyError(
            f"`connectivity_key={connectivity_key!r}` is not in `adata.obsp`; there are: {_listing(adata.obsp)}."
            f"{_did_you_mean(str(connectivity_key), adata.obsp)}"
        )
    if connectivity_key.endswith("distances"):
        raise ValueError(
            f"`connectivity_key={connectivity_key!r}` names distances, but weights that are large for close cells are "
            f"needed; `adata.obsp` has: {_listing(adata.obsp)}."
        )
    return check_graph(adata.obsp[connectivity_key], adata.n_obs, f"adata.obsp[{connectivity_key!r}]")


def check_graph(graph: Any, n: int, name: str = "connectivities") -> sparse.csr_matrix:
    """Check that a matrix is the weights of a graph over `n` cells.

    Returns
    -------
    csr_matrix, n × n, float32
        Without explicit zeros; read-only, and not copied unless it has to be.

    Raises
    ------
    TypeError
        If it does not hold numbers.
    ValueError
        If its shape is not n × n, or a weight is negative, NaN or infinite.
    """
    graph = _in_memory(graph)
    if graph.shape != (n, n):
        raise ValueError(f"`{name}` must be a matrix of cells × cells, {n} × {n}, but its shape is {graph.shape}.")
    graph = _as_csr(graph, name)
    if not np.isfinite(graph.data).all():
        raise ValueError(
            f"`{name}` holds {np.sum(~np.isfinite(graph.data))} weights that are NaN or infinite; a "
            "weight is a number of at least 0."
        )
    if (graph.data > _LARGEST_WEIGHT).any():
        raise ValueError(f"`{name}` holds weights of up to {graph.data.max():.4g}; divide them by their mean.")
    if (graph.data < 0).any():
        raise ValueError(f"`{name}` holds {np.sum(graph.data < 0)} negative weights; a weight is at least 0.")
    if graph.nnz == 0:
        logger.warning("`%s` has no edges: every cell is by itself.", name)
    return graph


# --- what is written --------------------------------------------------------------------------------------------------


def check_key_added(
    adata: AnnData, key_added: Any, *, slots: Iterable[tuple[str, str]] = (), mark: str | None = None
) -> None:
    """Check the name that results are written under, and that nothing of the user's is in their place.

    What an earlier call of the same function wrote may be overwritten, as in scanpy. It is told by its record in
    ``adata.uns[key_added]["params"]``.

    Parameters
    ----------
    adata
        The data that will be written to.
    key_added
        The name.
    slots
        What will be written, as pairs of attribute and key, such as ``("layers", "spaformer")``. `key_added` in
        `adata.uns` need not be named.
    mark
        A parameter that this function always records and no other does. None if nothing is to be kept from overwriting.

    Raises
    ------
    TypeError
        If the name is not a string.
    ValueError
        If the name is empty or cannot be written to h5ad and zarr, or if other data would be overwritten.
    """
    if not isinstance(key_added, str):
        raise TypeError(f"`key_added={key_added!r}` must be a string, not {type(key_added).__name__}.")
    if not key_added.strip() or key_added in (".", "..") or {"/", "\0"} & set(key_added) or key_added.startswith("__"):
        raise ValueError(
            f"`key_added={key_added!r}` cannot be written to h5ad and zarr files: a name is not empty, is not '.' or "
            "'..', has no '/' (nor a null character) and does not start with '__'."
        )
    if mark is None:
        return
    again = mark in _params(adata, key_added)
    taken = [
        f"adata.{attribute}[{key!r}]"
        for attribute, key in [*slots, ("uns", key_added)]
        if key in getattr(adata, attribute) and not (again and (key == key_added or mark not in _params(adata, key)))
    ]
    if taken:
        raise ValueError(
            f"`key_added={key_added!r}` would overwrite {_listing(taken)}, which this function did not write under "
            "this name. Choose another name, or delete it first."
        )


def _params(adata: AnnData, key: str) -> Mapping[str, Any]:
    """Parameters that are recorded under a name; none where there is no such record."""
    record = adata.uns.get(key)
    params = record.get("params") if isinstance(record, Mapping) else None
    return params if isinstance(params, Mapping) else {}


def check_result(adata: AnnData, key: str, slots: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """Return what ``tl.impute`` recorded in ``adata.uns[key]``.

    Parameters
    ----------
    adata
        The data.
    key
        Name of the result.
    slots
        What else is needed of it, as pairs of attribute and key.

    Raises
    ------
    KeyError
        If there is no result of this name, or a slot is gone.
    TypeError
        If `adata` is not an AnnData, or `key` is not a name.
    ValueError
        If it is not a whole result.
    """
    check_is_anndata(adata)
    check_name("key_added", key)
    if "spaformer_sc" not in _params(adata, key):
        results = [name for name in adata.uns if "spaformer_sc" in _params(adata, name)]
        raise KeyError(
            f"`key_added={key!r}`: there is no such result in adata.uns (there are: {_listing(results)}); "
            "run `sf.tl.impute` first."
        )
    record = adata.uns[key]
    if "gain" not in record.get("scores", ()):
        raise ValueError(
            f"`key_added={key!r}`: adata.uns[{key!r}] is not a whole result of `sf.tl.impute`. Concatenating keeps "
            "only what several results have in common: read each before, or impute what was concatenated."
        )
    gone = [f"adata.{attribute}[{name!r}]" for attribute, name in slots if name not in getattr(adata, attribute)]
    if gone:
        raise KeyError(f"`key_added={key!r}`: {_listing(gone)} of this result is gone; run `sf.tl.impute` again.")
    return dict(record)


def check_posterior(key: str, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check that a result knows distributions of its entries, and return what it recorded of them.

    Raises
    ------
    ValueError
        If it was made with a Gaussian decoder, or without its zeros.
    """
    params = record["params"]
    if record.get("posterior") is None:
        raise ValueError(
            f"`key_added={key!r}`: the result was made with decoder={params['model']['decoder']!r}, which knows no "
            "distribution of counts; impute with decoder='nb', 'poisson' or 'zinb'."
        )
    if params["zeros"] != "impute":
        raise ValueError(
            f"`key_added={key!r}`: the result was made with zeros={params['zeros']!r}, which took away what was known "
            "of these zeros; impute with zeros='impute', under another `key_added` if both are needed."
        )
    return dict(record["posterior"])


def check_imputed(names: Sequence[str], imputed: Sequence[str] | None) -> None:
    """Check that genes are among those that were ``imputed``; None for all.

    Raises
    ------
    ValueError
        If some are not.
    """
    known = set(names if imputed is None else imputed)
    left_out = [name for name in names if name not in known]
    if left_out:
        raise ValueError(f"`genes`: {', '.join(left_out)} were not imputed; `sf.tl.impute(genes=)` left them out.")


def counts_of_result(adata: AnnData, params: Mapping[str, Any]) -> sparse.csr_matrix:
    """Read the counts that a result was made from.

    Returns
    -------
    csr_matrix, cells × genes, float32

    Raises
    ------
    KeyError
        If the layer is gone.
    ValueError
        If the values are no longer those, as far as can be told: cells and genes may have been left out since.
    """
    layer = params["layer"]
    name = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    if adata.X is None if layer is None else layer not in adata.layers:
        raise KeyError(f"{name}, which the result was made from, is gone; put the counts back.")
    counts = _as_csr(_in_memory(adata.X if layer is None else adata.layers[layer]), name)
    library = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    same = bool(params["fractional"]) or is_whole(counts)
    if same and params["missing"] is None and adata.n_vars == params["n_genes"]:
        depth = adata.obs[Keys(params["key_added"]).obs("depth")].to_numpy(dtype=np.float64)
        same = bool(np.allclose(library, depth, rtol=1e-3))
    if not same:
        raise ValueError(
            f"{name} no longer holds the counts that the result was made from (normalised since?). Put them back: keep "
            "a copy as a layer before you normalise, and pass `layer=` to `sf.tl.impute`."
        )
    return counts


# --- what is drawn ----------------------------------------------------------------------------------------------------


def check_encoding(adata: AnnData, name: str) -> tuple[str, dict[str, Any]]:
    """Find what ``pp.positional_encoding`` wrote, by the name of the encoding or by its key.

    Returns
    -------
    Its key, and what it was made with.

    Raises
    ------
    KeyError
        If it was not written.
    TypeError
        If `adata` is not an AnnData, or `name` is not a name.
    """
    check_is_anndata(adata)
    check_name("name", name)
    for key in (encoding_key(name), name):
        if "encoding" in _params(adata, key) and key in adata.obsm:
            return key, dict(_params(adata, key))
    written = [key for key in adata.uns if "encoding" in _params(adata, key)]
    raise KeyError(
        f"`name={name!r}`: there is no such encoding in `adata.obsm` (there are: {_listing(written)}); write it with "
        "`sf.pp.positional_encoding(adata, name)` first."
    )


def check_columns(name: str, value: Any, n: int, most: int) -> list[int]:
    """Check positions of columns out of `n`; None is all of them, and `most` at equal distances where there are more.

    Raises
    ------
    TypeError, ValueError
        If one is not a whole number from 0 to `n` - 1, or there is none.
    """
    if value is None:
        return [int(column) for column in np.linspace(0, n - 1, min(n, most)).round()]
    chosen = [check_integer(name, one, minimum=0) for one in (value if hasattr(value, "__iter__") else [value])]
    if not chosen:
        raise ValueError(f"`{name}` names no column; pass None for all of them.")
    if max(chosen) >= n:
        raise ValueError(f"`{name}`: {max(chosen)} is none of the {n} columns, which are counted from 0.")
    return chosen


def check_instance(name: str, value: Any, kind: type, made_by: str) -> None:
    """Check that an argument is what another function returns.

    Raises
    ------
    TypeError
        If it is anything else.
    """
    if not isinstance(value, kind):
        several = "; pass one of the list" if isinstance(value, list) else ""
        raise TypeError(f"`{name}` must be what {made_by} returns, not {type(value).__name__}{several}.")


def check_cells_of(adata: AnnData, cells: Sequence[str], name: str) -> npt.NDArray[np.int64]:
    """Find the cells that a result names.

    Raises
    ------
    KeyError
        If some are not in the data.
    TypeError
        If `adata` is not an AnnData.
    ValueError
        If names of cells are not unique.
    """
    check_is_anndata(adata)
    if not adata.obs_names.is_unique:
        raise ValueError(
            f"`{name}` names cells, but `adata.obs_names` are not unique; call `adata.obs_names_make_unique()` before "
            "the result is made."
        )
    rows = adata.obs_names.get_indexer(list(cells))
    if (rows < 0).any():
        absent = [cell for cell, row in zip(cells, rows, strict=True) if row < 0]
        raise KeyError(f"`{name}`: {len(absent)} of its cells are not in `adata.obs_names`: {_listing(absent, 5)}.")
    return np.asarray(rows, dtype=np.int64)
