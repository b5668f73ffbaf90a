"""The one place that writes: into an AnnData, and to disk."""

from __future__ import annotations

import os
import stat

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from spaformer_sc import _files
from spaformer_sc._keys import Keys
from spaformer_sc._write import check_path, write_atomically, write_result
from tests.conftest import contents, sha256

SLOTS = {"layers/mine", "obsm/X_mine", "var/mine_pearson", "obs/mine_depth", "uns/mine"}


@pytest.fixture
def tissue(shared_tissue):
    """Counts, one column and coordinates: quick to write."""
    return ad.AnnData(
        shared_tissue.X.copy(), shared_tissue.obs[["fov"]].copy(), shared_tissue.var[[]], obsm=dict(shared_tissue.obsm)
    )


def results(adata, value=1.0):
    """Arguments of `write_result`."""
    return {
        "expression": np.full(adata.shape, value, np.float32),
        "embedding": np.full((adata.n_obs, 3), value, np.float32),
        "gene_scores": pd.DataFrame({"pearson": np.full(adata.n_vars, value)}, index=adata.var_names[::-1]),
        "cell_scores": pd.DataFrame({"depth": np.full(adata.n_obs, value)}, index=adata.obs_names[::-1]),
        "record": {"params": {"spaformer_sc": "0", "value": value}},
    }


def read(path):
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)


# --- into an AnnData --------------------------------------------------------------------------------------------------


def test_results_go_into_their_slots(tissue):
    before = contents(tissue)
    write_result(tissue, Keys("mine"), **results(tissue))
    after = contents(tissue)
    assert after.keys() - before.keys() == {
        "layers/mine",
        "obsm/X_mine",
        "var/mine_pearson",
        "obs/mine_depth",
        "uns/mine",
    }
    assert {place: after[place] for place in before} == before


def test_an_earlier_standard_deviation_does_not_outlive_its_result(tissue):
    write_result(tissue, Keys(), **results(tissue), sd=np.ones(tissue.shape, np.float32))
    assert "spaformer_sd" in tissue.layers
    write_result(tissue, Keys(), **results(tissue, 2.0))
    assert "spaformer_sd" not in tissue.layers


def test_scores_are_taken_by_place_not_by_name(tissue):
    given = results(tissue)
    given["cell_scores"]["depth"] = np.arange(tissue.n_obs, dtype=float)
    given["gene_scores"]["pearson"] = np.arange(tissue.n_vars, dtype=float)
    write_result(tissue, Keys(), **given)
    np.testing.assert_array_equal(tissue.var["spaformer_pearson"], np.arange(tissue.n_vars))
    np.testing.assert_array_equal(tissue.obs["spaformer_depth"], np.arange(tissue.n_obs))


def test_a_view_becomes_an_object_of_its_own(tissue):
    before = contents(tissue)
    view = tissue[:50]
    write_result(view, Keys(), **results(view))
    assert not view.is_view
    assert view.layers["spaformer"].shape == (50, 30)
    assert contents(tissue) == before


@pytest.mark.parametrize("wrong", ["expression", "embedding", "gene_scores", "cell_scores"])
@pytest.mark.parametrize("earlier", [False, True])
def test_all_or_nothing(tissue, wrong, earlier):
    if earlier:
        write_result(tissue, Keys(), **results(tissue))
    before = contents(tissue)
    given = results(tissue, 2.0)
    given[wrong] = given[wrong][:-1]
    with pytest.raises(ValueError, match=r"shape|[Ll]ength"):
        write_result(tissue, Keys(), **given)
    assert contents(tissue) == before


# --- where to ---------------------------------------------------------------------------------------------------------


def test_paths_that_can_be_written_to(tmp_path, tissue):
    for name in ("new.h5ad", "new.zarr"):
        assert check_path("out", tmp_path / name) == tmp_path / name
        write_atomically(tissue, tmp_path / name)
        assert check_path("out", str(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("out.csv", ValueError, r"`out='.*out\.csv'` must end in \.h5ad or \.zarr"),
        ("out", ValueError, "must end in"),
        ("nowhere/out.h5ad", FileNotFoundError, "the folder .*nowhere does not exist; create it first"),
        ("file/out.h5ad", FileNotFoundError, "does not exist"),
        ("folder.zarr", ValueError, "exists and is not a zarr store"),
        ("file.zarr", ValueError, "exists and is not a zarr store"),
        ("folder.h5ad", ValueError, "is a folder"),
    ],
)
def test_paths_that_cannot(tmp_path, name, error, message):
    for folder in ("folder.zarr", "folder.h5ad"):
        (tmp_path / folder).mkdir()
    for file in ("file", "file.zarr"):
        (tmp_path / file).write_text("mine")
    with pytest.raises(error, match=message):
        check_path("out", tmp_path / name)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    with pytest.raises(PermissionError, match="cannot be written to"):
        check_path("out", tmp_path / "out.h5ad")


# --- to disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(tissue):
    """An AnnData with something in every slot, text columns among them."""
    tissue.raw = tissue[:, :20].copy()
    tissue.obs["text"] = np.where(np.arange(tissue.n_obs) % 2, "b", "a").astype(object)
    tissue.obs["some text"] = [None if i % 3 else "x" for i in range(tissue.n_obs)]
    tissue.var["text"] = np.where(np.arange(tissue.n_vars) % 2, "b", "a").astype(object)
    tissue.raw.var["text"] = np.where(np.arange(20) % 2, "b", "a").astype(object)
    tissue.obsp["graph"] = sp.identity(tissue.n_obs, format="csr")
    tissue.varm["loadings"] = np.ones((tissue.n_vars, 2))
    tissue.varp["graph"] = sp.identity(tissue.n_vars, format="csc")
    tissue.uns["list"] = ["a", "b"]
    return tissue


@pytest.mark.parametrize("name", ["new.h5ad", "new.zarr"])
def test_everything_is_written_and_the_object_not_changed(full, tmp_path, name):
    before = contents(full)
    write_atomically(full, tmp_path / name)
    assert contents(full) == before
    found = contents(read(tmp_path / name))
    assert found.keys() == before.keys()
    text = {"obs/text", "obs/some text", "var/text", "raw", "uns/list"}  # categorical or an array in a file
    for place in before.keys() - text:
        assert found[place] == before[place]
    assert read(tmp_path / name).obs["text"].tolist() == full.obs["text"].tolist()
    np.testing.assert_array_equal(read(tmp_path / name).raw.X.toarray(), full.raw.X.toarray())
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["new.h5ad", "new.zarr"])
def test_a_view_a_backed_and_an_unusual_object(full, tmp_path, name):
    write_atomically(full[10:60, 5:], tmp_path / name)
    assert contents(read(tmp_path / name))["X"] == contents(full[10:60, 5:].copy())["X"]

    full.write_h5ad(tmp_path / "own.h5ad")
    backed = ad.read_h5ad(tmp_path / "own.h5ad", backed="r")
    write_atomically(backed, tmp_path / name)
    assert backed.filename == tmp_path / "own.h5ad"
    assert backed.X[:].shape == full.shape
    backed.file.close()
    np.testing.assert_array_equal(read(tmp_path / name).X.toarray(), full.X.toarray())

    full.layers["counts"] = full.X
    full.X = None
    full.obs_names = ["same"] * full.n_obs
    write_atomically(full, tmp_path / name)
    with pytest.warns(UserWarning, match="not unique"):
        assert read(tmp_path / name).X is None


@pytest.mark.parametrize("name", ["new.h5ad", "new.zarr"])
def test_the_usual_permissions(tissue, tmp_path, name):
    (tmp_path / "usual").mkdir()
    write_atomically(tissue, tmp_path / name)
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    found = stat.S_IMODE((tmp_path / name).stat().st_mode)
    assert found == (usual if name.endswith("zarr") else usual & 0o666)


@pytest.mark.parametrize("name", ["old.h5ad", "old.zarr"])
def test_an_old_file_is_replaced_whole(full, tmp_path, name):
    path = tmp_path / name
    write_atomically(full, path)
    smaller = full[:50].copy()
    del smaller.obsm["spatial"], smaller.uns["list"]
    write_atomically(smaller, path)
    found = read(path)
    assert found.n_obs == 50
    assert not found.obsm
    assert "list" not in found.uns
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["old.h5ad", "old.zarr"])
@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("in the middle", OSError),
        ("in the middle", KeyboardInterrupt),
        ("at the end", OSError),
        ("when it takes its place", KeyboardInterrupt),
    ],
)
def test_a_failure_leaves_the_old_file(tissue, tmp_path, monkeypatch, name, place, error):
    path = tmp_path / name
    write_atomically(tissue, path)
    before = sha256(path)
    method = "write_h5ad" if name.endswith("h5ad") else "write_zarr"
    write, replace, calls = getattr(ad.AnnData, method), os.replace, []

    def fail(adata, target, **arguments):
        if place == "in the middle":
            os.makedirs(target) if name.endswith("zarr") else target.write_bytes(b"half a file")
        elif place == "at the end":
            write(adata, target, **arguments)
        raise error("no space left")

    def fail_to_replace(source, target):
        if target == path and not calls:
            calls.append(source)
            raise error("no space left")
        replace(source, target)

    if place == "when it takes its place":
        monkeypatch.setattr(os, "replace", fail_to_replace)
        monkeypatch.setattr(_files, "_exchange", lambda *_: False)
    else:
        monkeypatch.setattr(ad.AnnData, method, fail)
    with pytest.raises(error, match="no space left"):
        write_atomically(tissue[:50], path)
    assert bool(calls) == (place == "when it takes its place")
    assert sha256(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    monkeypatch.undo()
    assert read(path).n_obs == 180


def test_a_folder_is_replaced_in_one_step(tissue, tmp_path, monkeypatch):
    path = tmp_path / "out.zarr"
    write_atomically(tissue, path)
    if not _files._exchange(path / "obs", path / "var"):
        pytest.skip("this system or file system cannot exchange two folders")
    assert _files._exchange(path / "obs", path / "var")
    replace = os.replace

    def step_aside(source, target):
        assert path not in (source, target), "the folder stepped aside"
        replace(source, target)

    monkeypatch.setattr(os, "replace", step_aside)
    write_atomically(tissue[:50], path)
    assert read(path).n_obs == 50
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.zarr"]


def test_what_cannot_be_written_is_an_error_and_no_file(tissue, tmp_path):
    tissue.uns["thing"] = object()
    for name in ("new.h5ad", "new.zarr"):
        with pytest.raises(Exception, match=r"thing|object"):
            write_atomically(tissue, tmp_path / name)
    assert not list(tmp_path.iterdir())
