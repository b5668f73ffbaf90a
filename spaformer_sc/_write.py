"""The one place that writes: results into an AnnData, and AnnData to disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ._files import replacing
from ._keys import Keys
from ._logging import logger

if TYPE_CHECKING:
    from anndata import AnnData

SUFFIXES = (".h5ad", ".zarr")


def write_result(
    adata: AnnData,
    keys: Keys,
    *,
    expression: NDArray[np.float32],
    embedding: NDArray[np.float32],
    gene_scores: pd.DataFrame,
    cell_scores: pd.DataFrame,
    record: dict[str, Any],
    sd: NDArray[np.float32] | None = None,
) -> None:
    """Write everything that a fit gives into its slots, all of it or nothing, one logged line each.

    Parameters
    ----------
    adata
        Written to; a view becomes an AnnData of its own, as in scanpy, and what it was a view of stays as it is.
    keys
        Slot names.
    expression
        Layer (cells, genes).
    embedding
        Latent (cells, n_latent).
    gene_scores
        Scores (genes × scores).
    cell_scores
        Scores (cells × scores).
    record
        ``params``, ``history``, ``scores`` and others for ``uns``.
    sd
        Layer with the standard deviations of ``expression`` (cells, genes), or None.
    """
    values: dict[tuple[str, str], Any] = {
        ("layers", keys.layer): expression,
        ("obsm", keys.embedding): embedding,
    }
    if sd is not None:
        values["layers", keys.sd] = sd
    elif keys.sd in adata.layers:
        values["layers", keys.sd] = None  # of an earlier result
    _write_slots(adata, values | _slots_of_scores(keys, gene_scores, cell_scores, record))


def write_scores(
    adata: AnnData,
    keys: Keys,
    *,
    gene_scores: pd.DataFrame,
    cell_scores: pd.DataFrame,
    record: dict[str, Any],
    clear: Sequence[str] = (),
) -> None:
    """Write scores alone; arguments and promise as for :func:`write_result`. Columns of ``obs`` to ``clear`` go."""
    values: dict[tuple[str, str], Any] = {("obs", key): None for key in clear if key in adata.obs}
    _write_slots(adata, values | _slots_of_scores(keys, gene_scores, cell_scores, record))


def _slots_of_scores(
    keys: Keys, gene_scores: pd.DataFrame, cell_scores: pd.DataFrame, record: dict[str, Any]
) -> dict[tuple[str, str], Any]:
    return {
        **{("var", keys.var(score)): _plain(gene_scores[score]) for score in gene_scores},
        **{("obs", keys.obs(score)): _plain(cell_scores[score]) for score in cell_scores},
        ("uns", keys.uns): record,
    }


def _write_slots(adata: AnnData, values: dict[tuple[str, str], Any]) -> None:
    """Put each value into its slot (attribute, key), or empty the slot for None: all of it or nothing."""
    from anndata import ImplicitModificationWarning

    before = {(attribute, key): getattr(adata, attribute).get(key) for attribute, key in values}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImplicitModificationWarning)
            for (attribute, key), value in values.items():
                if value is None:
                    del getattr(adata, attribute)[key]
                else:
                    getattr(adata, attribute)[key] = value
    except BaseException:
        for (attribute, key), value in before.items():
            slots = getattr(adata, attribute)
            if value is not None:
                slots[key] = value
            elif key in slots:
                del slots[key]
        raise
    for (attribute, key), value in values.items():
        if isinstance(value, np.ndarray) and value.ndim == 2:
            logger.info("added %r, %s %s (adata.%s)", key, value.shape, value.dtype, attribute)
        elif isinstance(value, dict):
            logger.info("added %r: %s (adata.%s)", key, ", ".join(value), attribute)
        elif value is not None:
            logger.info("added %r (adata.%s)", key, attribute)


def _plain(column: pd.Series) -> Any:
    """Values of a column without its index: an array, or a categorical."""
    return column.array if isinstance(column.dtype, pd.CategoricalDtype) else column.to_numpy()


def check_path(name: str, path: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES) -> Path:
    """Check that a file to write has one of some endings and that its folder can be written to.

    Raises
    ------
    TypeError
        If it is no path.
    ValueError
        If the ending is none of these, or something else is in the way.
    FileNotFoundError, PermissionError
        If the folder does not exist or cannot be written to.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`{name}={path!r}` must be a path, not {type(path).__name__}.")
    if "\0" in os.fspath(path):
        raise ValueError(f"`{name}={os.fspath(path)!r}` holds a null character, which no path has.")
    target = Path(path)
    if target.suffix not in suffixes:
        ending = " or ".join(filter(None, [", ".join(suffixes[:-1]), suffixes[-1]]))
        raise ValueError(f"`{name}={os.fspath(path)!r}` must end in {ending}.")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"`{name}={os.fspath(path)!r}`: the folder {folder} does not exist; create it first.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"`{name}={os.fspath(path)!r}`: the folder {folder} cannot be written to.")
    if target.suffix == ".zarr" and target.exists() and not _is_zarr(target):
        raise ValueError(f"`{name}={os.fspath(path)!r}` exists and is not a zarr store; choose another path.")
    if target.suffix != ".zarr" and target.is_dir():
        raise ValueError(f"`{name}={os.fspath(path)!r}` is a folder; choose another path.")
    return target


def _is_zarr(path: Path) -> bool:
    return any((path / marker).exists() for marker in ("zarr.json", ".zgroup", ".zattrs"))


def write_streamed(
    adata: AnnData,
    path: str | os.PathLike[str],
    keys: Keys,
    *,
    layer_of: Callable[[slice, bool], NDArray[np.float32]],
    embedding: NDArray[np.float32],
    gene_scores: pd.DataFrame,
    cell_scores: pd.DataFrame,
    record: dict[str, Any],
    sd: bool,
) -> None:
    """Write an AnnData whose counts are in a file, with a result that is computed block by block.

    Either the old file or the whole new one is there; neither counts nor result are taken into memory as a whole.

    Parameters
    ----------
    adata
        Backed by a file or lazy; not changed.
    path
        File (``.h5ad``) or store (``.zarr``).
    keys, embedding, gene_scores, cell_scores, record
        As for :func:`write_result`.
    layer_of
        Gives the rows (cells, genes) of the layer, or with True those of its standard deviations.
    sd
        Whether to write the standard deviations.
    """
    import dask
    import dask.array as da
    from anndata.io import write_elem
    from dask.delayed import delayed

    ours = (keys.layer, keys.sd)
    shell = _shell(adata, without=ours)
    _write_slots(
        shell, {("obsm", keys.embedding): embedding} | _slots_of_scores(keys, gene_scores, cell_scores, record)
    )
    names = ours if sd else ours[:1]
    rows = max(1, BLOCK_BYTES // (4 * adata.n_vars))
    blocks = [slice(start, min(start + rows, adata.n_obs)) for start in range(0, adata.n_obs, rows)]
    with replacing(path) as fresh, dask.config.set(scheduler="synchronous"):
        _write_whole(shell, fresh)
        with _open_store(fresh) as store:
            for name in ("X", "raw"):  # written as nothing
                if name in store:
                    del store[name]
            _copy_counts(adata, store)
            for name, deviations in zip(names, (False, True), strict=False):
                parts = [
                    da.from_delayed(delayed(layer_of)(part, deviations), (part.stop - part.start, adata.n_vars), "f4")  # type: ignore[no-untyped-call]
                    for part in blocks
                ]
                layer = da.concatenate(parts)  # type: ignore[no-untyped-call]
                chunks = {"chunks": (min(rows, adata.n_obs, 1000), adata.n_vars)} if fresh.suffix == ".h5ad" else {}
                write_elem(store["layers"], name, layer, dataset_kwargs=chunks)
    for name in names:
        logger.info("wrote layer %r, (%d, %d) float32", name, *adata.shape)


BLOCK_BYTES = 64 * 2**20
"""Memory for the part of a layer that is computed and written at a time."""


@contextmanager
def _open_store(path: Path) -> Iterator[Any]:
    """Open a file or store that has been written, to add to it."""
    if path.suffix == ".h5ad":
        import h5py

        with h5py.File(path, "r+") as file:
            yield file
    else:
        import zarr

        # The store's summary of itself cannot be edited, only made again.
        yield zarr.open_group(str(path), mode="r+", use_consolidated=False)
        with warnings.catch_warnings():
            # The summary is no part of format 3, but anndata, which writes that from 0.13 on, makes it too.
            warnings.filterwarnings("ignore", "Consolidated metadata is currently not part", UserWarning)
            zarr.consolidate_metadata(str(path))


def _copy_counts(adata: AnnData, store: Any) -> None:
    """Copy ``X`` and ``raw`` from the file or lazy array that they are in."""
    import h5py
    from anndata.io import write_elem

    if not adata.isbacked:
        write_elem(store, "X", adata.X)
        if adata.raw is not None:
            write_elem(store, "raw", adata.raw)
        return
    source = adata.file._file
    if isinstance(store, h5py.File):
        for name in ("X", "raw"):
            if name in source and (name == "X" or adata.raw is not None):
                source.copy(source[name], store, name)
        return
    if "X" in source:
        _copy_matrix(source["X"], store, "X")
    if adata.raw is not None:
        raw = store.create_group("raw")
        raw.attrs.update({"encoding-type": "raw", "encoding-version": "0.1.0"})
        _copy_matrix(source["raw/X"], raw, "X")
        write_elem(raw, "var", adata.raw.var)
        write_elem(raw, "varm", dict(adata.raw.varm))


def _copy_matrix(source: Any, store: Any, name: str) -> None:
    """Copy a matrix, dense or sparse, from an HDF5 file to a store, array by array.

    Rows of a sparse one would have to be added one block after the other, which takes the square of their number.
    """
    import dask.array as da
    import h5py
    from anndata.io import write_elem

    if isinstance(source, h5py.Dataset):
        write_elem(store, name, da.from_array(source, chunks=f"{BLOCK_BYTES >> 20}MiB"))  # type: ignore[no-untyped-call]
        return
    group = store.create_group(name)
    group.attrs.update({key: np.asarray(value).tolist() for key, value in source.attrs.items()})
    for part in ("data", "indices", "indptr"):
        _copy_matrix(source[part], group, part)


def write_atomically(adata: AnnData, path: str | os.PathLike[str]) -> None:
    """Write an AnnData as ``.h5ad`` or ``.zarr`` so that either the old file or the whole new one is there.

    Written beside the target under a temporary name, then renamed; an ``.h5ad`` is flushed to disk before.

    Parameters
    ----------
    adata
        What to write; not changed.
    path
        File (``.h5ad``) or store (``.zarr``).
    """
    shell = _shell(adata)
    with replacing(path) as fresh:
        _write_whole(shell, fresh)


def _write_whole(shell: AnnData, path: Path) -> None:
    if path.suffix == ".h5ad":
        shell.write_h5ad(path, compression="gzip", compression_opts=1)
    else:
        with warnings.catch_warnings():
            # anndata announces its next default for every store that it writes.
            warnings.filterwarnings("ignore", "Writing zarr v2 data will no longer be the default", UserWarning)
            shell.write_zarr(path)


def _shell(adata: AnnData, without: Sequence[str] | None = None) -> AnnData:
    """Return an AnnData of the same arrays for anndata to write; or one without counts, and ``without`` some layers.

    Writing turns text columns of ``obs``, ``var`` and ``raw.var`` into categorical ones, and lets a backed AnnData
    point at the file just written.
    """
    from anndata import AnnData

    raw = None if without is not None else adata.raw
    slots = {slot: dict(getattr(adata, slot)) for slot in ("layers", "obsm", "varm", "obsp", "varp")}
    for name in (None, *(without or ())):  # None: X, in anndata 0.13
        slots["layers"].pop(name, None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* names are not unique", UserWarning)
        return AnnData(
            X=adata.X if without is None else None,
            obs=adata.obs.copy(),
            var=adata.var.copy(),
            uns=dict(adata.uns),
            **slots,
            raw=None if raw is None else {"X": raw.X, "var": raw.var.copy(), "varm": dict(raw.varm)},
        )
