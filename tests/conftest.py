"""What tests share: one thread, small simulated tissues, a fitted model, and a look at all that an AnnData holds."""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import spaformer_sc as sf

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def contents(adata):
    """Everything that an AnnData holds, by place: bytes, types and order, flat, for a comparison that names places."""
    found = {"X": described(adata.X), "obs_names": list(adata.obs_names), "var_names": list(adata.var_names)}
    for slot in ("obs", "var"):
        frame = getattr(adata, slot)
        found.update({f"{slot}/{column}": described(frame[column]) for column in frame})
    for slot in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
        values = {key: value for key, value in getattr(adata, slot).items() if key is not None}  # X, in anndata 0.13
        found.update({f"{slot}/{key}": described(value) for key, value in values.items()})
    if adata.raw is not None:
        found["raw"] = (described(adata.raw.X), described(adata.raw.var), list(adata.raw.var_names))
    return found


def described(value):
    """What `contents` says of one value."""
    if sparse.issparse(value):
        parts = [described(getattr(value, part)) for part in ("data", "indices", "indptr")]
        return (type(value).__name__, value.shape, parts)
    if isinstance(value, pd.DataFrame):
        return ("frame", list(value.index), {column: described(value[column]) for column in value})
    if isinstance(value, pd.Series):
        kind = repr(value.dtype) if isinstance(value.dtype, pd.CategoricalDtype) else str(value.dtype)
        return ("series", kind, described(value.to_numpy()))
    if isinstance(value, np.ndarray):
        held = repr(value.tolist()).encode() if value.dtype == object else np.ascontiguousarray(value).tobytes()
        return (str(value.dtype), value.shape, hashlib.sha256(held).hexdigest())
    if isinstance(value, dict):
        return {key: described(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return (type(value).__name__, [described(inner) for inner in value])
    if hasattr(value, "to_memory"):
        return described(value.to_memory())
    return (type(value).__name__, repr(value))


def plain(value):
    """A value with what files make of it undone: arrays as lists, numpy's numbers as Python's."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def sha256(path):
    """Hash of a file, or of all files in a folder with their names."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(str(f.relative_to(path)).encode() + f.read_bytes() for f in files)).hexdigest()


@pytest.fixture(scope="session")
def shared_tissue():
    """Three FOVs of 60 cells, 30 genes; tests that write take `tissue`."""
    return sf.datasets.simulated_tissue(n_fovs=3, n_cells=60, n_genes=30)


@pytest.fixture
def tissue(shared_tissue):
    """A copy of `shared_tissue` to do anything with."""
    return shared_tissue.copy()


@pytest.fixture(scope="session")
def fitted(shared_tissue):
    """A model fitted to `shared_tissue` in three epochs; not to be changed."""
    return sf.SpaFormer(library_key="fov", quality="fast", max_epochs=3, progress=False).fit(shared_tissue)


@pytest.fixture
def no_training(monkeypatch):
    """Let a test fail that comes to training."""

    def train(*_, **__):
        pytest.fail("training began")

    monkeypatch.setattr("spaformer_sc.training.abreast.train", train)


@pytest.fixture(scope="session")
def data_folder():
    """Folder of real data sets; skips where it is not there."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    return DATA
