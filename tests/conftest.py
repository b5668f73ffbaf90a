"""What tests share: one thread, small simulated tissues, a fitted model, and a look at all that an AnnData holds."""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import spaformer_sc as sf

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def contents(adata):
    """Everything that an AnnData holds, by place: bytes, types and order, flat, for a comparison that names places."""
    found = {"X": described(adata.X)}
    for slot in ("obs", "var"):
        frame = getattr(adata, slot)
        found[f"{slot}_names"] = (list(frame.index), frame.index.name, str(frame.index.dtype))
        found.update({f"{slot}/{name}": described(column) for name, column in frame.items()})
    for slot in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
        values = {key: value for key, value in getattr(adata, slot).items() if key is not None}  # X, in anndata 0.13
        found.update({f"{slot}/{key}": described(value) for key, value in values.items()})
    if adata.raw is not None:
        found["raw"] = (described(adata.raw.X), described(adata.raw.var), list(adata.raw.var_names))
        found["raw.varm"] = {key: described(value) for key, value in adata.raw.varm.items()}
    return found


def arrays_of(adata):
    """The arrays of an AnnData in memory that is no view, by place: the objects themselves."""
    if adata.is_view or adata.isbacked:
        return {}
    found = {"X": adata.X}
    for slot in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
        found.update({f"{slot}/{key}": value for key, value in getattr(adata, slot).items()})
    return found


def _layout(array):
    """Where the bytes of an array lie, in which order, and whether they may be written to."""
    parts = [array.data, array.indices, array.indptr] if sparse.issparse(array) else [array]
    parts = [part for part in parts if isinstance(part, np.ndarray)]
    return [(part.__array_interface__["data"], part.strides, part.flags.writeable) for part in parts]


@contextmanager
def untouched(adata):
    """Check that an AnnData comes out as it went in: all it holds, in the same order and in the same arrays."""

    def looks():
        slots = ("obs", "var", "layers", "obsm", "varm", "obsp", "varp", "uns")
        order = [list(getattr(adata, slot)) for slot in slots]
        kind = adata.is_view, adata.isbacked, adata.filename, adata.isbacked and adata.file.is_open
        return contents(adata), order, kind, {place: _layout(array) for place, array in arrays_of(adata).items()}

    before, arrays = looks(), arrays_of(adata)
    yield
    assert looks() == before
    assert all(array is arrays[place] for place, array in arrays_of(adata).items())


def furnish(adata):
    """Put something into every slot of an AnnData, so that a change of any shows."""
    rng = np.random.default_rng(0)
    adata.raw = adata.copy()
    adata.raw.varm["loadings"] = rng.random((adata.n_vars, 2))
    adata.obs["text"] = np.where(np.arange(adata.n_obs) % 2, "a", "b").astype(object)
    adata.var["note"] = "as it is"
    adata.layers["other"] = rng.random(adata.shape)
    adata.obsm["frame"] = pd.DataFrame({"area": rng.random(adata.n_obs)}, index=adata.obs_names)
    adata.varm["loadings"] = rng.random((adata.n_vars, 2))
    adata.obsp["spatial_connectivities"] = sparse.random(adata.n_obs, adata.n_obs, 0.05, "csr", random_state=rng)
    adata.varp["correlation"] = rng.random((adata.n_vars, adata.n_vars))
    adata.uns["spatial"] = {"slide": {"scalefactors": {"spot": 1.0}, "images": [1, 2]}}
    adata.uns["fov_colors"] = ["#ff0000", "#00ff00", "#0000ff"]
    return adata


def described(value):
    """What `contents` says of one value."""
    if sparse.issparse(value):
        parts = [described(getattr(value, part)) for part in ("data", "indices", "indptr")]
        return (type(value).__name__, value.shape, parts)
    if isinstance(value, pd.DataFrame):
        return ("frame", list(value.index), [(name, described(column)) for name, column in value.items()])
    if isinstance(value, pd.Series):
        kind = repr(value.dtype) if isinstance(value.dtype, pd.CategoricalDtype) else str(value.dtype)
        return ("series", kind, described(value.to_numpy()))
    if np.ma.isMaskedArray(value):
        return ("masked", described(value.data), described(np.ma.getmaskarray(value)))
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


def seal(path, description):
    """Write the description of a saved model with the checksums that belong to it and to the weights beside it."""
    content = {name: value for name, value in description.items() if name != "sha256"}
    content["weights_sha256"] = hashlib.sha256((path / "weights.safetensors").read_bytes()).hexdigest()
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "model.json").write_text(json.dumps({**content, "sha256": checksum}))


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
def workers():
    """Threads to compute in."""
    import torch

    from spaformer_sc._threads import Workers

    with Workers(torch.device("cpu")) as some:
        yield some


@pytest.fixture
def unseen():
    """Draw without a screen, and show nothing unless asked to; figures are closed at the end."""
    import matplotlib
    import matplotlib.pyplot as plt
    from scanpy import settings

    matplotlib.use("Agg")
    before, settings.autoshow = settings.autoshow, False
    yield
    settings.autoshow = before
    plt.close("all")


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
