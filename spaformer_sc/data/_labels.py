"""Which field of view a cell belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

#: Names of columns of single fields of view, without case, blanks and punctuation.
_FOV_NAMES = frozenset({"fov", "fovs", "fovid", "fovname", "fovnumber", "fovnum", "fieldofview", "fieldofviewid"})
#: Names of columns of whole images, which hold one or more fields of view. "region" and "tissue" are left out: they
#: mostly name parts of one image.
_SLIDE_NAMES = frozenset(
    {
        *("slide", "slideid", "slidename", "slideidnumeric", "runtissuename", "puck", "puckid"),
        *("section", "sectionid", "brainsectionlabel", "image", "imageid", "imagename", "roi", "roiid"),
        *("sample", "sampleid", "samplename", "library", "libraryid", "batch", "batchid", "dataset"),
    }
)


def as_frame(obs: Any, columns: list[str] | None = None) -> pd.DataFrame:
    """Columns of `adata.obs` as a DataFrame in memory, also where the AnnData was opened lazily; None for all."""
    chosen = obs if columns is None else obs[columns]
    return chosen if isinstance(chosen, pd.DataFrame) else chosen.to_memory()


def field_codes(obs: pd.DataFrame, library_key: str | Sequence[str] | None) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Number the fields of view.

    Parameters
    ----------
    obs
        `adata.obs`.
    library_key
        One column, or several whose combination is the field of view, such as ``["slide", "fov"]``; no label may be
        missing. None takes all cells as one field.

    Returns
    -------
    codes : int64 array, one per cell
        0, …, k − 1; every number occurs. Fields are in the order of the categories, or of the sorted labels where the
        column is not categorical; with several columns, the first counts most.
    names : list of k str
        Their names, the labels joined with "/", no two alike.

    Raises
    ------
    ValueError
        If a label is missing.
    """
    if library_key is None:
        return np.zeros(obs.shape[0], dtype=np.int64), ["all"]
    columns = [library_key] if isinstance(library_key, str) else list(library_key)
    frame = as_frame(obs, columns)
    codes = np.zeros(obs.shape[0], dtype=np.int64)
    labels: list[tuple[str, ...]] = [()]
    for column in columns:
        level, level_names = _levels(frame[column])
        seen, codes = np.unique(codes * len(level_names) + level, return_inverse=True)
        labels = [(*labels[k // len(level_names)], level_names[k % len(level_names)]) for k in seen]
    return codes.astype(np.int64), _unique(["/".join(parts) for parts in labels])


def _levels(column: pd.Series) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Level of every cell in one column, and the names of the levels."""
    if not isinstance(column.dtype, pd.CategoricalDtype):
        try:
            values = pd.Index(column.unique()).sort_values()
        except TypeError:
            values = pd.Index(sorted(column.unique(), key=lambda value: (type(value).__name__, str(value))))
        column = column.astype(pd.CategoricalDtype(values.dropna()))
    if column.isna().any():
        raise ValueError(f"`adata.obs[{column.name!r}]` has no label for {column.isna().sum()} cells.")
    names = [
        str(int(level)) if isinstance(level, float) and level.is_integer() else str(level)
        for level in column.cat.categories
    ]
    return column.cat.codes.to_numpy().astype(np.int64), names


def _unique(names: list[str]) -> list[str]:
    """Names, with "-1", "-2", … added where one occurs again."""
    taken: dict[str, None] = {}
    for name in names:
        candidate, k = name, 0
        while candidate in taken:
            k += 1
            candidate = f"{name}-{k}"
        taken[candidate] = None
    return list(taken)


def fov_like_columns(obs: pd.DataFrame) -> list[str]:
    """Find columns that look as if they told separate images apart.

    A column does if its name is one in use for fields of view, slides, sections or samples (case, blanks and
    punctuation do not matter), and if it holds between two and n / 2 different labels for n cells.

    Parameters
    ----------
    obs
        `adata.obs`.

    Returns
    -------
    list of str
        Their names: fields of view first, then whole images, otherwise in the order of `obs`.
    """
    return [*fov_columns(obs), *slide_columns(obs)]


def fov_columns(obs: pd.DataFrame) -> list[str]:
    """Find columns that look like fields of view; see `fov_like_columns`."""
    return _columns_named(obs, _FOV_NAMES)


def slide_columns(obs: pd.DataFrame) -> list[str]:
    """Find columns that look like whole images (slides, sections, samples); see `fov_like_columns`."""
    return _columns_named(obs, _SLIDE_NAMES)


def _columns_named(obs: pd.DataFrame, names: frozenset[str]) -> list[str]:
    candidates = [column for column in obs.columns if re.sub(r"[\W_]+", "", str(column).lower()) in names]
    return [column for column in candidates if _is_discrete(as_frame(obs, [column])[column])]


def _is_discrete(column: pd.Series) -> bool:
    """Say whether a column holds labels, between two and n / 2 different ones."""
    if pd.api.types.is_float_dtype(column):
        values = column.dropna().to_numpy(dtype=np.float64)
        if np.any(values != np.rint(values)):
            return False
    return bool(2 <= column.nunique() <= len(column) / 2)


def suggested_library_key(obs: pd.DataFrame) -> list[str]:
    """Choose from `fov_like_columns` those that name the smallest images; empty if there are none.

    The first column of these is taken, and put behind each further one whose labels divide it: slide and fov where
    the labels of the fields start again on every slide, otherwise fov alone.
    """
    suggestion: list[str] = []
    n_fields = 1
    for column in fov_like_columns(obs):
        labelled = as_frame(obs, [column, *suggestion]).astype(str)
        n_divided = labelled.drop_duplicates().shape[0]
        if n_divided > n_fields:
            suggestion, n_fields = [column, *suggestion], n_divided
    return suggestion
