"""Folders with the files of an instrument, as AnnData."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from spaformer_sc._logging import logger

COSMX_NSCLC_PIXEL_UM = 0.18  # "SMI Data File ReadMe" of the release: multiply pixels by 0.18 µm
NEGATIVE_PREFIX = "NegPrb"
ROWS_PER_CHUNK = 4096


def read_cosmx(folder: Path, slide: str) -> AnnData:
    """Read the flat files of one CosMx slide of NanoString's lung release.

    Parameters
    ----------
    folder
        Holds ``*_exprMat_file.csv`` and ``*_metadata_file.csv``.
    slide
        Name of the slide, for ``obs["slide"]`` and the names of the cells.

    Returns
    -------
    The cells that both files have, as described in :func:`spaformer_sc.datasets.cosmx_nsclc`, without ``uns``.

    Raises
    ------
    FileNotFoundError
        If one of the two files is not in `folder`.
    ValueError
        If a file lacks a column, lists a cell twice or holds counts that are not whole numbers of at least 0, or if
        `folder` holds several files of one kind.
    """
    counts_path = _find(folder, "*exprMat_file.csv")
    meta_path = _find(folder, "*metadata_file.csv")

    columns = pd.read_csv(counts_path, nrows=0).columns.tolist()
    _require(counts_path, columns, ["fov", "cell_ID"])
    negatives = [name for name in columns if name.startswith(NEGATIVE_PREFIX)]
    genes = [name for name in columns if name not in {"fov", "cell_ID", *negatives}]

    keys, counts, negative_counts = [], [], []
    dtypes = dict.fromkeys(genes + negatives, np.float32) | {"fov": np.int64, "cell_ID": np.int64}
    with pd.read_csv(counts_path, dtype=dtypes, chunksize=ROWS_PER_CHUNK) as reader:
        for chunk in reader:
            chunk = chunk[chunk["cell_ID"] != 0]  # 0 is what lies outside every cell
            keys.append(chunk[["fov", "cell_ID"]])
            counts.append(sparse.csr_matrix(_whole_numbers(counts_path, chunk[genes].to_numpy())))
            negative_counts.append(_whole_numbers(counts_path, chunk[negatives].to_numpy()).astype(np.int32))
    index = _cell_index(counts_path, pd.concat(keys))

    pixels = ["CenterX_global_px", "CenterY_global_px", "CenterX_local_px", "CenterY_local_px"]
    meta = pd.read_csv(meta_path)
    _require(meta_path, meta.columns.tolist(), ["fov", "cell_ID", *pixels])
    meta.index = _cell_index(meta_path, meta)

    rows = np.flatnonzero(index.isin(meta.index))
    if len(rows) < len(index) or len(rows) < len(meta):
        logger.warning(
            "%s: kept the %d cells that have both counts and metadata; left out %d without metadata, %d without counts",
            slide,
            len(rows),
            len(index) - len(rows),
            len(meta) - len(rows),
        )
    meta = meta.loc[index[rows]]

    fovs = np.unique(meta["fov"])
    obs = meta.drop(columns=["fov", *pixels])
    obs.insert(0, "fov", pd.Categorical.from_codes(np.searchsorted(fovs, meta["fov"]), [f"fov{fov}" for fov in fovs]))
    obs.insert(0, "slide", pd.Categorical([slide] * len(obs)))
    obs.index = pd.Index([f"{slide}_{fov}_{cell}" for fov, cell in meta.index])
    um = meta[pixels].to_numpy(dtype=np.float64) * COSMX_NSCLC_PIXEL_UM
    return AnnData(
        X=sparse.vstack(counts, format="csr")[rows],
        obs=obs,
        var=pd.DataFrame(index=pd.Index(genes)),
        obsm={
            "spatial": um[:, :2],
            "spatial_local": um[:, 2:],
            "negative_probes": pd.DataFrame(np.vstack(negative_counts)[rows], index=obs.index, columns=negatives),
        },
    )


def read_xenium(folder: Path) -> AnnData:
    """Read the cells and counts of one Xenium region.

    Parameters
    ----------
    folder
        Holds ``*cell_feature_matrix.h5`` and one of ``*cells.csv.gz`` and ``*cells.parquet``.

    Returns
    -------
    The cells, as described in :func:`spaformer_sc.datasets.xenium_mouse_brain`, without ``uns``.

    Raises
    ------
    FileNotFoundError
        If the matrix or the table of cells is not in `folder`.
    ValueError
        If the table of cells lacks a column or some of the cells of the matrix, or if `folder` holds several files of
        one kind.
    """
    import scanpy as sc

    matrix_path = _find(folder, "*cell_feature_matrix.h5")
    cells_path = _find(folder, "*cells.csv.gz", "*cells.parquet")
    adata = sc.read_10x_h5(matrix_path, gex_only=True)
    cells = pd.read_parquet(cells_path) if cells_path.suffix == ".parquet" else pd.read_csv(cells_path)
    _require(cells_path, cells.columns.tolist(), ["cell_id", "x_centroid", "y_centroid"])
    # Older Parquet files store the names as bytes, older CSV files as numbers.
    cells.index = pd.Index([c.decode() if isinstance(c, bytes) else str(c) for c in cells.pop("cell_id")])

    missing = int((~adata.obs_names.isin(cells.index)).sum())
    if missing:
        raise ValueError(
            f"{cells_path} lacks {missing} of the {adata.n_obs} cells of {matrix_path.name}; the two files have to "
            "come from one run."
        )
    cells = cells.loc[adata.obs_names]
    spatial = cells[["x_centroid", "y_centroid"]].to_numpy(dtype=np.float64)
    return AnnData(
        X=sparse.csr_matrix(adata.X, dtype=np.float32),
        obs=cells.drop(columns=["x_centroid", "y_centroid"]),
        var=adata.var[["gene_ids"]],
        obsm={"spatial": spatial},
    )


def _find(folder: Path, *patterns: str) -> Path:
    """The file in `folder` that matches the first pattern that any file matches."""
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{folder} holds several {pattern} files ({', '.join(p.name for p in found)}); leave one.")
        if found:
            return found[0]
    raise FileNotFoundError(f"{folder} holds no {' or '.join(patterns)} file.")


def _require(path: Path, columns: list[str], required: list[str]) -> None:
    missing = [name for name in required if name not in columns]
    if missing:
        raise ValueError(f"{path} lacks the columns {missing}; its first columns are {columns[:6]}.")


def _cell_index(path: Path, table: pd.DataFrame) -> pd.MultiIndex:
    index = pd.MultiIndex.from_frame(table[["fov", "cell_ID"]])
    if index.has_duplicates:
        fov, cell = index[index.duplicated()][0]
        raise ValueError(f"{path} lists cell {cell} of FOV {fov} more than once.")
    return index


def _whole_numbers(path: Path, values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not ((values >= 0) & (values == np.rint(values))).all():
        raise ValueError(f"{path} holds values that are not counts (whole numbers of at least 0).")
    return values
