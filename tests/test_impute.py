"""`sf.tl.impute`: what it writes and leaves alone, its scales, and that it learns."""

from __future__ import annotations

import logging
import random
import re
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

import spaformer_sc as sf
from spaformer_sc._config import DECODERS, ENCODERS, MASKINGS, POSITIONAL
from spaformer_sc.metrics import gene_pearson
from tests.conftest import contents, furnish, plain, sha256

QUICK = {"library_key": "fov", "quality": "fast", "max_epochs": 1, "progress": False}
SCORES = sf.tl._impute.SCORES
OF_GENES = (*SCORES, *sf.tl._impute.BACK)
SLOTS = {
    "layers/spaformer",
    "obsm/X_spaformer",
    "uns/spaformer",
    *(f"var/spaformer_{score}" for score in OF_GENES),
    *(f"obs/spaformer_{score}" for score in sf.tl._impute.OF_CELLS),
}
FOREIGN = {  # slot: how to fill it
    "layers": lambda adata: adata.layers.update(spaformer=adata.X.copy()),
    "obsm": lambda adata: adata.obsm.update(X_spaformer=np.ones((adata.n_obs, 2))),
    "var": lambda adata: adata.var.insert(0, "spaformer_gain", 1.0),
    "obs": lambda adata: adata.obs.insert(0, "spaformer_depth", 1.0),
    "layers with standard deviations": lambda adata: adata.layers.update(spaformer_sd=adata.X.copy()),
    "uns": lambda adata: adata.uns.update(spaformer={"params": {"of": "another program"}}),
}
"""Data of the user's that lie where results would go."""


WITH_LISTS = {"genes": ["EPCAM", "VIM"], "positional": ["laplacian"], "library_key": ["fov", "slide"]}


def impute(adata, **arguments):
    """`tl.impute` with `QUICK` arguments."""
    return sf.tl.impute(adata, **{**QUICK, **arguments})


def dense(matrix):
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def layer_of_missing(adata, cells, genes):
    missing = np.zeros(adata.shape, dtype=bool)
    missing[np.ix_(cells, genes)] = True
    adata.layers["not measured"] = missing
    return missing


# --- what is written --------------------------------------------------------------------------------------------------


def test_writes_the_documented_slots_and_nothing_else(tissue):
    furnish(tissue)
    before = contents(tissue)
    assert impute(tissue, n_latent=7) is None
    after = contents(tissue)
    assert after.keys() - before.keys() == SLOTS
    assert {place: after[place] for place in before} == before

    layer, latent = tissue.layers["spaformer"], tissue.obsm["X_spaformer"]
    assert (type(layer), layer.dtype, layer.shape) == (np.ndarray, np.float32, tissue.shape)
    assert (type(latent), latent.dtype, latent.shape) == (np.ndarray, np.float32, (tissue.n_obs, 7))
    assert np.isfinite(layer).all()
    assert np.isfinite(latent).all()
    assert layer.min() >= 0
    assert all(tissue.var[f"spaformer_{score}"].dtype == np.float64 for score in SCORES[:3])
    assert tissue.var["spaformer_pearson"].dropna().between(-1, 1).all()
    assert tissue.var["spaformer_held_out"].dtype == np.int64
    assert tissue.var["spaformer_held_out"].sum() == pytest.approx(0.05 * tissue.X.sum(), rel=0.3)
    assert list(tissue.uns["spaformer"]) == ["params", "history", "scores", "fovs", "posterior"]


def test_the_record_is_made_of_plain_values_and_says_what_was_done(tissue):
    impute(tissue, output="rate", genes=["EPCAM"], graph="delaunay", random_state=3)

    def check(value):
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            [check(inner) for inner in value.values()]
        elif isinstance(value, list):
            [check(inner) for inner in value]
        else:
            assert value is None or type(value) in (int, float, str, bool)

    record = tissue.uns["spaformer"]
    check(record)
    params = record["params"]
    said = {key: params[key] for key in ("output", "genes", "graph", "random_state", "library_key", "spaformer_sc")}
    assert said == {
        "output": "rate",
        "genes": ["EPCAM"],
        "graph": "delaunay",
        "random_state": 3,
        "library_key": "fov",
        "spaformer_sc": sf.__version__,
    }
    assert params["model"]["decoder"] == "nb"
    assert params["training"]["max_epochs"] == 1
    assert params["graph_summary"]["n_fovs"] == 3
    assert len({len(values) for values in record["history"].values()}) == 1
    assert {"gain", "deviance_explained", "median_pearson"} <= record["scores"].keys()


def test_a_copy_has_the_results_and_the_original_does_not(tissue):
    before = contents(furnish(tissue))
    result = impute(tissue, copy=True)
    assert contents(tissue) == before
    after = contents(result)
    assert after.keys() - before.keys() == SLOTS
    assert {place: after[place] for place in before} == before
    impute(tissue)
    assert contents(tissue) == after
    assert not np.shares_memory(result.X.data, tissue.X.data)


def test_key_added_names_all_slots(tissue):
    impute(tissue)
    first = contents(tissue)
    impute(tissue, key_added="second", output="counts")
    added = contents(tissue).keys() - first.keys()
    assert added == {place.replace("spaformer", "second") for place in SLOTS}
    assert {place: contents(tissue)[place] for place in first} == first


@pytest.mark.parametrize("form", ["memory", "h5ad"])
def test_a_second_call_overwrites_the_first(tissue, form, tmp_path):
    other = impute(tissue, output="counts", n_latent=5, random_state=1, copy=True)
    impute(tissue)
    if form == "h5ad":
        tissue.write_h5ad(tmp_path / "first.h5ad")
        tissue = ad.read_h5ad(tmp_path / "first.h5ad")
    impute(tissue, output="counts", n_latent=5, random_state=1)
    after, wanted = contents(tissue), contents(other)
    assert after.keys() == wanted.keys()
    assert {place: after[place] for place in SLOTS} == {place: wanted[place] for place in SLOTS}


@pytest.mark.parametrize("slot", FOREIGN)
def test_data_of_others_are_not_overwritten(tissue, slot, no_training):
    FOREIGN[slot](tissue)
    before = contents(tissue)
    with pytest.raises(ValueError, match=rf"would overwrite adata\.{slot.split()[0]}"):
        impute(tissue)
    assert contents(tissue) == before


def write_zarr(adata, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2 data", UserWarning)
        adata.write_zarr(path)


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
@pytest.mark.parametrize("arguments", [{}, WITH_LISTS], ids=["default", "lists"])
def test_results_survive_a_file(tissue, form, arguments, tmp_path):
    tissue.obs["slide"] = pd.Categorical(["one"] * tissue.n_obs)
    impute(tissue, **arguments)
    path = tmp_path / f"result.{form}"
    if form == "h5ad":
        tissue.write_h5ad(path)
        found = ad.read_h5ad(path)
    else:
        write_zarr(tissue, path)
        found = ad.read_zarr(path)
    np.testing.assert_equal(plain(found.uns["spaformer"]), plain(tissue.uns["spaformer"]))
    for place in SLOTS - {"uns/spaformer"}:
        assert contents(found)[place] == contents(tissue)[place]


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_output_path(tissue, form, tmp_path):
    furnish(tissue)
    before = contents(tissue)
    path = tmp_path / f"result.{form}"
    impute(tissue, output_path=path)
    assert {place: contents(tissue)[place] for place in before} == before
    found = ad.read_h5ad(path) if form == "h5ad" else ad.read_zarr(path)
    assert contents(found).keys() >= SLOTS
    np.testing.assert_array_equal(found.layers["spaformer"], tissue.layers["spaformer"])
    np.testing.assert_equal(plain(found.uns["spaformer"]), plain(tissue.uns["spaformer"]))
    assert found.raw.shape == tissue.raw.shape
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# --- failure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    "place",
    [
        "spaformer_sc.training.abreast.train",
        "spaformer_sc.training.scoring.held_out_scores",
        "spaformer_sc.model.SpaFormer._predict_field",
        "spaformer_sc.model.SpaFormer.parameters",
    ],
)
def test_a_failure_on_the_way_leaves_everything_as_it_was(tissue, monkeypatch, place, error):
    def fail(*_, **__):
        raise error("on the way")

    before = contents(furnish(tissue))
    monkeypatch.setattr(place, fail)
    with pytest.raises(error, match="on the way"):
        impute(tissue)
    assert contents(tissue) == before


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_while_writing_takes_back_what_was_written(tissue, monkeypatch, earlier, error):
    furnish(tissue)
    if earlier:
        impute(tissue)
    before = contents(tissue)
    insert = pd.DataFrame.__setitem__

    def fail_at_the_last_score(frame, key, value):
        if key == "spaformer_gain":
            monkeypatch.setattr(pd.DataFrame, "__setitem__", insert)
            raise error("in the middle")
        insert(frame, key, value)

    monkeypatch.setattr(pd.DataFrame, "__setitem__", fail_at_the_last_score)
    with pytest.raises(error, match="in the middle"):
        impute(tissue, random_state=1, n_latent=5)
    assert contents(tissue) == before


def test_a_failure_to_write_the_file_keeps_the_result_and_the_old_file(tissue, monkeypatch, tmp_path):
    path = tmp_path / "result.h5ad"
    path.write_bytes(b"an older file")

    def fail(*_, **__):
        raise OSError("no space left on device")

    before = contents(tissue)
    with monkeypatch.context() as patch:
        patch.setattr(ad.AnnData, "write_h5ad", fail)
        with pytest.raises(OSError, match="no space left"):
            impute(tissue, output_path=path)
    assert contents(tissue).keys() - before.keys() == SLOTS
    assert path.read_bytes() == b"an older file"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, f"{path.name}.partial"]
    impute(tissue, output_path=path, resume=True)
    assert "spaformer" in ad.read_h5ad(path).layers
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# --- bad input --------------------------------------------------------------------------------------------------------


def change(**slots):
    """A function that puts values into an AnnData."""

    def apply(adata):
        for slot, value in slots.items():
            setattr(adata, slot, value(adata))
        return adata

    return apply


def with_entry(value):
    def apply(adata):
        adata.X = adata.X.toarray()
        adata.X[3, 4] = value
        return adata

    return apply


def log_normalised(adata):
    adata.layers["raw counts"] = adata.X.copy()
    total = np.maximum(dense(adata.X).sum(axis=1, keepdims=True), 1)
    adata.X = np.log1p(dense(adata.X) / total * 100).astype(np.float32)
    return adata


def without_coordinates(adata):
    del adata.obsm["spatial"]
    return adata


def with_a_coordinate_of_nan(adata):
    adata.obsm["spatial"][5, 1] = np.nan
    return adata


def with_missing_labels(adata):
    adata.obs["fov"] = adata.obs["fov"].where(np.arange(adata.n_obs) > 4)
    return adata


def with_a_name_twice(adata):
    adata.var_names = ["EPCAM", *adata.var_names[:-1]]
    return adata


def with_distances(adata):
    adata.obsp["spatial_distances"] = sp.identity(adata.n_obs, format="csr")
    return adata


BAD = [
    ("negative", with_entry(-1.0), {}, ValueError, "`adata.X` holds 1 negative values"),
    ("nan", with_entry(np.nan), {}, ValueError, "`adata.X` holds 1 values that are NaN"),
    ("infinite", with_entry(np.inf), {}, ValueError, "`adata.X` holds 1 values that are NaN or infinite"),
    ("log", log_normalised, {}, ValueError, "log-transformed.*pass layer='raw counts'"),
    ("no coordinates", without_coordinates, {}, KeyError, "`spatial_key='spatial'` is not in `adata.obsm`"),
    ("nan coordinate", with_a_coordinate_of_nan, {}, ValueError, r"NaN or infinite for 1 of 180 cells"),
    ("no label", with_missing_labels, {}, ValueError, "`library_key='fov'`: 5 of 180 cells have no label"),
    ("same name", with_a_name_twice, {}, ValueError, "`adata.var_names` holds 1 gene names more than once"),
    ("no counts", change(X=lambda adata: sp.csr_matrix(adata.shape)), {}, ValueError, "every entry is zero"),
    ("no cells", lambda adata: adata[:0].copy(), {}, ValueError, "has 0 cells"),
    ("not an AnnData", lambda adata: adata.to_df(), {}, TypeError, "`adata` must be an AnnData, not DataFrame"),
    ("distances", with_distances, {"connectivity_key": "spatial_distances"}, ValueError, "names distances"),
    ("library_key", None, {"library_key": "FOV"}, KeyError, "`library_key='FOV'` is not in .*Did you mean 'fov'"),
    ("library_key list", None, {"library_key": ["fov", "x"]}, KeyError, "`library_key='x'` is not in"),
    ("library_key type", None, {"library_key": 5}, TypeError, "`library_key=5` must be the name of a column"),
    ("spatial_key", None, {"spatial_key": "X_umap"}, KeyError, "`spatial_key='X_umap'` is not in"),
    ("connectivity_key", None, {"connectivity_key": "graph"}, KeyError, "`connectivity_key='graph'` is not in"),
    ("layer", None, {"layer": "counts"}, KeyError, "`layer='counts'` is not in"),
    ("missing", None, {"missing": "mask"}, KeyError, "`missing='mask'` is not in"),
    ("genes", None, {"genes": ["EPCAM", "epcam", "x"]}, KeyError, "`genes`: 2 not in `adata.var_names`: epcam, x"),
    ("gene", None, {"genes": "epcam"}, KeyError, "Did you mean 'EPCAM'"),
    ("preset", None, {"preset": "papers"}, ValueError, "`preset='papers'` is not allowed.*'paper'"),
    ("quality", None, {"quality": "good"}, ValueError, "`quality='good'` is not allowed.*'best'"),
    ("positional", None, {"positional": "laplace"}, ValueError, "`positional='laplace'` is not allowed.*'laplacian'"),
    ("positional list", None, {"positional": ["signnet", "x"]}, ValueError, "`positional='x'` is not allowed"),
    ("positional twice", None, {"positional": ["signnet", "signnet"]}, ValueError, "twice"),
    ("encoder", None, {"encoder": "transformer"}, ValueError, "`encoder='transformer'` is not allowed.*'performer'"),
    ("decoder", None, {"decoder": "normal"}, ValueError, "`decoder='normal'` is not allowed.*'gaussian'"),
    ("variational", None, {"variational": "yes"}, TypeError, "`variational='yes'` must be True or False"),
    ("masking", None, {"masking": "bi-level"}, ValueError, "`masking='bi-level'` is not allowed.*'bilevel'"),
    ("n_latent", None, {"n_latent": 0}, ValueError, "`n_latent=0` must be at least 1"),
    ("max_epochs", None, {"max_epochs": 0}, ValueError, "`max_epochs=0` must be at least 1"),
    ("max_epochs type", None, {"max_epochs": 2.5}, TypeError, "`max_epochs=2.5` must be a whole number"),
    ("graph", None, {"graph": "KNN"}, ValueError, "`graph='KNN'` is not allowed.*Did you mean 'knn'"),
    ("n_neighbors", None, {"n_neighbors": 0}, ValueError, "`n_neighbors=0` must be at least 1"),
    ("no radius", None, {"graph": "radius"}, ValueError, "needs `radius=`"),
    ("radius", None, {"graph": "radius", "radius": -1.0}, ValueError, "`radius=-1.0` must be"),
    ("unused radius", None, {"radius": 5.0}, ValueError, "`radius=5.0`"),
    ("tile_size", None, {"tile_size": 1}, ValueError, "`tile_size=1` must be at least 50"),
    ("output", None, {"output": "log"}, ValueError, "`output='log'` is not allowed.*'lognorm'"),
    ("target_sum", None, {"target_sum": 0}, ValueError, "`target_sum=0` must be"),
    ("zeros", None, {"zeros": "remove"}, ValueError, "`zeros='remove'` is not allowed; choose one of 'impute', 'keep'"),
    ("sd", None, {"sd": 1}, TypeError, "`sd=1` must be True or False"),
    ("sd without counts", None, {"sd": True, "decoder": "gaussian"}, ValueError, "`sd=True` needs a distribution"),
    ("key_added", None, {"key_added": "a/b"}, ValueError, "`key_added='a/b'` cannot be written"),
    ("output_path", None, {"output_path": "out.csv"}, ValueError, r"must end in \.h5ad or \.zarr"),
    ("output folder", None, {"output_path": "no/such/out.h5ad"}, FileNotFoundError, "does not exist"),
    ("resume", None, {"resume": True}, ValueError, "`resume=True` needs `output_path=`"),
    ("resume type", None, {"resume": 1}, TypeError, "`resume=1` must be True or False"),
    ("devices", None, {"devices": 0}, ValueError, "`devices=0` must be at least 1"),
    ("devices type", None, {"devices": "2"}, TypeError, "`devices='2'` must be a whole number"),
    ("device", None, {"device": "abacus"}, ValueError, "`device='abacus'` cannot be used"),
    ("random_state", None, {"random_state": -1}, ValueError, "`random_state=-1` must be at least 0"),
    ("random_state type", None, {"random_state": None}, TypeError, "`random_state=None` must be a whole number"),
    ("progress", None, {"progress": 1}, TypeError, "`progress=1` must be True or False"),
    ("copy", None, {"copy": "yes"}, TypeError, "`copy='yes'` must be True or False"),
]


@pytest.mark.parametrize(("prepare", "arguments", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_named_before_any_training(tissue, no_training, prepare, arguments, error, message):
    adata = tissue if prepare is None else prepare(tissue)
    before = contents(adata) if isinstance(adata, ad.AnnData) else None
    with pytest.raises(error, match=f"(?s){message}"):
        impute(adata, **arguments)
    assert before is None or contents(adata) == before


def test_an_unknown_argument_is_an_error(tissue):
    with pytest.raises(TypeError, match="n_epochs"):
        sf.tl.impute(tissue, n_epochs=3)
    with pytest.raises(TypeError, match="positional argument"):
        sf.tl.impute(tissue, "fov")


def test_a_column_of_fovs_that_is_not_named_is_pointed_out(tissue):
    with pytest.warns(UserWarning, match="Pass library_key='fov'"):
        impute(tissue, library_key=None)
    assert tissue.uns["spaformer"]["params"]["graph_summary"]["n_fovs"] == 1


# --- good input in every form -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(shared_tissue):
    """The result of `QUICK` on counts in CSR of float32."""
    return impute(shared_tissue, copy=True)


def same(adata, reference):
    np.testing.assert_array_equal(adata.layers["spaformer"], reference.layers["spaformer"])
    np.testing.assert_array_equal(adata.obsm["X_spaformer"], reference.obsm["X_spaformer"])
    np.testing.assert_equal(adata.uns["spaformer"]["scores"], reference.uns["spaformer"]["scores"])


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "uint16", "float32", "float64"])
def test_any_type_of_number(tissue, reference, dtype):
    tissue.X = tissue.X.astype(dtype)
    impute(tissue)
    same(tissue, reference)
    assert tissue.X.dtype == dtype


@pytest.mark.parametrize(
    "form", [np.asarray, np.asfortranarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array]
)
def test_any_form_of_matrix(tissue, reference, form):
    tissue.X = form(tissue.X.toarray())
    kind = type(tissue.X)
    impute(tissue)
    same(tissue, reference)
    assert type(tissue.X) is kind


def test_counts_in_a_layer(tissue, reference):
    log_normalised(tissue)
    impute(tissue, layer="raw counts")
    same(tissue, reference)
    del tissue.layers["spaformer"], tissue.X
    impute(tissue, layer="raw counts")
    same(tissue, reference)


def test_corrected_counts(tissue, caplog):
    rng = np.random.default_rng(0)
    tissue.X.data -= np.where(rng.random(tissue.X.nnz) < 0.3, rng.uniform(0.1, 0.9, tissue.X.nnz), 0).astype(np.float32)
    before = contents(tissue)
    first = impute(tissue, copy=True)
    assert "fractional values" in caplog.text
    assert contents(tissue) == before
    assert contents(impute(tissue, copy=True)) == contents(first)
    impute(first, output="counts")
    np.testing.assert_allclose(first.layers["spaformer"].sum(axis=1), tissue.X.sum(axis=1).A1, rtol=1e-4)


def test_a_view_is_imputed_and_its_parent_is_not(tissue):
    before = contents(tissue)
    cells, genes = np.arange(tissue.n_obs) % 3 > 0, slice(2, 25)
    view = tissue[cells, genes]
    impute(view)
    assert contents(tissue) == before
    alone = tissue[cells, genes].copy()
    impute(alone)
    assert contents(view) == contents(alone)


def test_a_copy_of_a_view(tissue):
    view = tissue[:100]
    result = impute(view, copy=True)
    assert view.is_view
    assert not result.is_view
    assert "spaformer" not in view.layers


@pytest.mark.parametrize(("form", "mode"), [("csr", "r"), ("csr", "r+"), ("csc", "r"), ("dense", "r+")])
def test_backed_counts(tissue, reference, form, mode, tmp_path):
    path = tmp_path / "backed.h5ad"
    tissue.X = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": dense}[form](tissue.X)
    tissue.write_h5ad(path)
    before = sha256(path)
    backed = ad.read_h5ad(path, backed=mode)
    copied = impute(backed, copy=True)
    assert backed.isbacked
    assert not copied.isbacked
    assert not SLOTS & contents(backed).keys()
    same(copied, reference)
    impute(backed)
    same(backed, reference)
    backed.file.close()
    assert sha256(path) == before


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_a_backed_result_goes_to_a_file_and_stays_backed_by_its_own(tissue, reference, form, tmp_path):
    path, result = tmp_path / "backed.h5ad", tmp_path / f"result.{form}"
    tissue.write_h5ad(path)
    before = sha256(path)
    backed = ad.read_h5ad(path, backed="r")
    impute(backed, output_path=result)
    assert backed.filename == path
    backed.file.close()
    assert sha256(path) == before
    found = ad.read_h5ad(result) if form == "h5ad" else ad.read_zarr(result)
    same(found, reference)
    assert (dense(found.X) == dense(tissue.X)).all()


def test_a_view_of_backed_counts_is_refused_before_training(tissue, no_training, tmp_path):
    tissue.write_h5ad(tmp_path / "backed.h5ad")
    view = ad.read_h5ad(tmp_path / "backed.h5ad", backed="r")[:100]
    with pytest.raises(ValueError, match=r"to_memory"):
        impute(view)
    view.file.close()


def test_a_copy_of_a_view_of_backed_counts(tissue, tmp_path):
    tissue.write_h5ad(tmp_path / "backed.h5ad")
    view = ad.read_h5ad(tmp_path / "backed.h5ad", backed="r")[:100]
    result = impute(view, copy=True)
    view.file.close()
    np.testing.assert_array_equal(result.layers["spaformer"], impute(tissue[:100], copy=True).layers["spaformer"])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_small_fov_among_others(tissue, size):
    adata = tissue[: 60 + size].copy()
    adata.obs["fov"] = adata.obs["fov"].cat.rename_categories({"fov3": "unused"})
    impute(adata, positional=["laplacian", "signnet"])
    assert np.isfinite(adata.layers["spaformer"]).all()
    assert adata.uns["spaformer"]["params"]["graph_summary"]["n_fovs"] == 2


def test_a_single_cell(tissue):
    adata = tissue[[int(np.argmax(tissue.X.sum(axis=1)))]].copy()
    impute(adata)
    assert np.isfinite(adata.layers["spaformer"]).all()


@pytest.mark.parametrize("n_counts", [1, 5])
def test_hardly_any_counts(tissue, n_counts):
    counts = np.zeros(tissue.shape, dtype=np.float32)
    counts[np.arange(n_counts), np.arange(n_counts)] = 1
    tissue.X = sp.csr_matrix(counts)
    for random_state in range(4, 6):  # with 5, the only count is held out
        impute(tissue, random_state=random_state)
        assert np.isfinite(tissue.layers["spaformer"]).all()
        assert np.isnan(tissue.uns["spaformer"]["scores"]["gain"])


def test_a_single_gene(tissue):
    adata = tissue[:, ["EPCAM"]].copy()
    impute(adata, output="rate", target_sum=10)
    np.testing.assert_allclose(adata.layers["spaformer"], 10, rtol=1e-5)


@pytest.mark.parametrize("decoder", ["gaussian", "poisson", "nb", "zinb"])
def test_cells_and_genes_without_counts(tissue, decoder):
    counts = tissue.X.toarray()
    counts[[3, 70]] = 0
    counts[:, [2, 9]] = 0
    empty = counts.sum(axis=1) == 0
    tissue.X = sp.csr_matrix(counts)
    for output in ("lognorm", "counts"):
        impute(tissue, output=output, decoder=decoder)
        layer = tissue.layers["spaformer"]
        assert np.isfinite(layer).all()
        assert not layer[empty].any()
        assert layer[~empty].any(axis=1).all()
    impute(tissue, output="rate", decoder=decoder)
    layer = tissue.layers["spaformer"]
    np.testing.assert_allclose(layer.sum(axis=1), tissue.uns["spaformer"]["params"]["target_sum"], rtol=1e-4)
    assert decoder == "gaussian" or layer[:, [2, 9]].max() < layer.mean()
    assert tissue.var["spaformer_pearson"].iloc[[2, 9]].isna().all()


def test_coordinates_in_three_dimensions(tissue):
    tissue.obsm["spatial"] = np.column_stack([tissue.obsm["spatial"], np.arange(tissue.n_obs) % 3])
    impute(tissue, positional="laplacian")
    assert np.isfinite(tissue.layers["spaformer"]).all()


# --- scales -----------------------------------------------------------------------------------------------------------


def expected_log1p(distribution, scale):
    """E[log1p(count * scale)], summed up term by term."""
    count = np.arange(400)
    return float(distribution.pmf(count) @ np.log1p(count * scale))


@pytest.mark.parametrize("decoder", ["gaussian", "poisson", "nb", "zinb"])
@pytest.mark.parametrize("target_sum", [None, 50.0])
def test_scales(shared_tissue, decoder, target_sum):
    library = np.asarray(shared_tissue.X.sum(axis=1)).ravel()
    model = sf.SpaFormer(**QUICK | {"max_epochs": 2, "decoder": decoder}).fit(shared_tissue)
    rate, counts, lognorm = (
        model.impute(shared_tissue, output=output, target_sum=target_sum).astype(float)
        for output in ("rate", "counts", "lognorm")
    )
    target_sum = target_sum or np.median(library[library > 0])
    np.testing.assert_allclose(rate.sum(axis=1), target_sum, rtol=1e-4)
    np.testing.assert_allclose(counts, rate / target_sum * library[:, None], rtol=1e-4, atol=1e-6)
    # Jensen: the expectation of a logarithm is below the logarithm of the expectation.
    assert decoder == "gaussian" or (lognorm <= np.log1p(rate) * (1 + 1e-4) + 1e-6).all()
    if decoder not in ("poisson", "nb"):
        return
    theta = model._networks[0].decoder.log_dispersion.detach().exp().numpy() if decoder == "nb" else None
    rng = np.random.default_rng(0)
    for cell, gene in zip(rng.choice(np.flatnonzero(library), 60), rng.integers(0, shared_tissue.n_vars, 60)):
        mean = counts[cell, gene]
        count = stats.poisson(mean) if theta is None else stats.nbinom(theta[gene], theta[gene] / (theta[gene] + mean))
        wanted = expected_log1p(count, target_sum / library[cell])
        assert lognorm[cell, gene] == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("output", ["lognorm", "counts", "rate"])
def test_the_scale_is_recorded(tissue, output):
    impute(tissue, output=output)
    library = np.asarray(tissue.X.sum(axis=1)).ravel()
    params = tissue.uns["spaformer"]["params"]
    assert params["output"] == output
    assert params["target_sum"] == np.median(library[library > 0])
    impute(tissue, output=output, target_sum=123)
    assert tissue.uns["spaformer"]["params"]["target_sum"] == 123.0


def test_genes_choose_what_is_written_and_change_nothing_else(tissue, reference):
    impute(tissue, genes=["VIM", "EPCAM"])
    chosen = tissue.var_names.get_indexer(["VIM", "EPCAM"])
    others = np.setdiff1d(np.arange(tissue.n_vars), chosen)
    full, layer = reference.layers["spaformer"], tissue.layers["spaformer"]
    np.testing.assert_array_equal(layer[:, chosen], full[:, chosen])
    assert np.isnan(layer[:, others]).all()
    np.testing.assert_array_equal(tissue.obsm["X_spaformer"], reference.obsm["X_spaformer"])
    assert tissue.uns["spaformer"]["params"]["genes"] == ["VIM", "EPCAM"]

    impute(tissue, genes="VIM")
    assert np.flatnonzero(~np.isnan(tissue.layers["spaformer"]).any(axis=0)).tolist() == [chosen[0]]
    np.testing.assert_array_equal(tissue.layers["spaformer"][:, chosen[0]], full[:, chosen[0]])
    impute(tissue, genes=tissue.var_names.isin(["VIM"]))
    np.testing.assert_array_equal(tissue.layers["spaformer"][:, chosen[0]], full[:, chosen[0]])


# --- randomness -------------------------------------------------------------------------------------------------------

EVERYTHING_RANDOM = {
    "preset": "paper",
    "decoder": "zinb",
    "variational": True,
    "masking": ["bilevel", "thinning"],
    "positional": ["laplacian", "signnet"],
}


@pytest.mark.parametrize("arguments", [{}, EVERYTHING_RANDOM], ids=["default", "everything random"])
def test_the_result_depends_on_random_state_alone(shared_tissue, arguments):
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    random.seed(1)
    states = np.random.get_state()[1].copy(), torch.get_rng_state(), random.getstate()  # noqa: NPY002
    first = impute(shared_tissue, copy=True, **arguments)
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[1])
    assert random.getstate() == states[2]
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    again = impute(shared_tissue, copy=True, **arguments)
    assert contents(first) == contents(again)
    other = impute(shared_tissue, copy=True, random_state=1, **arguments)
    assert np.abs(other.layers["spaformer"] - first.layers["spaformer"]).max() > 1e-3


# --- every choice -----------------------------------------------------------------------------------------------------

CHOICES = [
    *({"encoder": encoder} for encoder in ENCODERS),
    *({"decoder": decoder, "variational": variational} for decoder in DECODERS for variational in (False, True)),
    *({"masking": masking} for masking in (*MASKINGS, None, ["bilevel", "thinning"])),
    *({"positional": positional} for positional in (*POSITIONAL, None, ["laplacian", "signnet"])),
    {"preset": "paper"},
    {"preset": "paper", "encoder": "exact", "decoder": "nb", "masking": "thinning", "positional": None},
    {"quality": "default"},
    {"quality": "best"},
    {"graph": "delaunay"},
    {"graph": "radius", "radius": 15.0},
    {"n_neighbors": 100},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: ",".join(f"{k}={v}" for k, v in choice.items()))
def test_every_choice_runs(shared_tissue, choice):
    result = impute(shared_tissue, copy=True, **choice)
    layer = result.layers["spaformer"]
    assert np.isfinite(layer).all()
    assert layer.min() >= 0
    assert layer.max() > 0
    assert np.isfinite(result.obsm["X_spaformer"]).all()
    model = result.uns["spaformer"]["params"]["model"]
    for name, value in choice.items():
        if name in ("encoder", "decoder", "variational"):
            assert model[name] == value
        elif name in ("masking", "positional"):
            empty = ["none"] if name == "masking" else []
            assert model[name] == (empty if value is None else [value] if isinstance(value, str) else value)
    assert model["n_networks"] == {"fast": 1, "default": 5, "best": 10}[choice.get("quality", "fast")]


def test_choices_matter(shared_tissue):
    choices = [
        {},
        {"encoder": "exact"},
        {"encoder": "mlp"},
        {"decoder": "gaussian"},
        {"decoder": "poisson"},
        {"decoder": "zinb"},
        {"variational": True},
        {"masking": "bilevel"},
        {"positional": "laplacian"},
        {"positional": "signnet"},
        {"n_neighbors": 2},
        {"graph": "delaunay"},
    ]
    # The form of which attention changes most in so few steps.
    plain = {"settings": {"forms": ["plain"]}}
    layers = [impute(shared_tissue, copy=True, **plain, **choice).layers["spaformer"] for choice in choices]
    for i, one in enumerate(layers):
        for other in layers[:i]:
            assert np.abs(one - other).max() > 1e-4


def test_the_default_averages_networks(tissue):
    impute(tissue, quality="default", output="rate")
    params, history = tissue.uns["spaformer"]["params"], tissue.uns["spaformer"]["history"]
    assert params["model"]["n_networks"] == 5
    assert set(history["network"]) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert params["networks"]["form"][:4] == ["plain", "wide", "large", "perceptron"]
    assert sum(params["networks"]["weight"]) == pytest.approx(1)
    np.testing.assert_allclose(tissue.layers["spaformer"].sum(axis=1), params["target_sum"], rtol=1e-4)


# --- the graph --------------------------------------------------------------------------------------------------------


def test_a_graph_of_ones_own(tissue, reference):
    from spaformer_sc.data._graph import spatial_graph

    graph = sp.block_diag([spatial_graph(tissue.obsm["spatial"][f]) for f in np.split(np.arange(180), 3)], "csr")
    tissue.obsp["connectivities"] = graph
    before = contents(tissue)["obsp/connectivities"]
    impute(tissue, connectivity_key="connectivities")
    np.testing.assert_allclose(tissue.layers["spaformer"], reference.layers["spaformer"], rtol=1e-5)
    assert contents(tissue)["obsp/connectivities"] == before

    shuffled = np.concatenate([np.random.default_rng(f).permutation(60) + 60 * f for f in range(3)])
    tissue.obsp["shuffled"] = graph[shuffled][:, shuffled]
    before = contents(tissue)["obsp/shuffled"]
    impute(tissue, connectivity_key="shuffled")
    assert np.abs(tissue.layers["spaformer"] - reference.layers["spaformer"]).max() > 1e-3
    assert contents(tissue)["obsp/shuffled"] == before
    assert tissue.uns["spaformer"]["params"]["connectivity_key"] == "shuffled"


def test_fovs_of_the_same_name_on_two_slides_are_different(tissue):
    adata = tissue[:120].copy()
    adata.obs["slide"] = adata.obs["fov"].astype(str).astype("category")
    adata.obs["number"] = pd.Categorical(["1"] * 120)
    impute(adata, library_key=["slide", "number"])
    alone = impute(tissue[:120], library_key="fov", copy=True)
    np.testing.assert_array_equal(adata.layers["spaformer"], alone.layers["spaformer"])
    assert adata.uns["spaformer"]["params"]["graph_summary"]["n_fovs"] == 2
    impute(adata, library_key="number")
    assert adata.uns["spaformer"]["params"]["graph_summary"]["n_fovs"] == 1
    assert np.abs(adata.layers["spaformer"] - alone.layers["spaformer"]).max() > 1e-4


# --- entries that were not measured -----------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{}, {"preset": "paper"}, {"decoder": "zinb", "masking": "features"}])
def test_what_is_under_missing_entries_does_not_matter(tissue, choice):
    missing = layer_of_missing(tissue, np.arange(70), [0, 5, 6])
    missing[100, :] = True
    missing[150, 3:] = True
    tissue.layers["not measured"] = missing
    other = tissue.copy()
    counts = other.X.toarray()
    counts[missing] = np.random.default_rng(0).poisson(30, missing.sum())
    other.X = sp.csr_matrix(counts)
    impute(tissue, missing="not measured", **choice)
    impute(other, missing="not measured", **choice)
    after, wanted = contents(other), contents(tissue)
    assert {place: after[place] for place in SLOTS} == {place: wanted[place] for place in SLOTS}
    assert np.isfinite(tissue.layers["spaformer"]).all()
    if choice.get("preset") != "paper":  # the Gaussian decoder may say exactly zero
        hidden = tissue.layers["spaformer"][:70, [0, 5, 6]]
        assert hidden[np.asarray(tissue.X[:70].sum(axis=1)).ravel() > 5].min() > 0


def test_a_gene_and_a_cell_of_which_nothing_was_measured(tissue):
    missing = layer_of_missing(tissue, np.arange(180), [4])
    missing[50] = True
    tissue.layers["not measured"] = missing
    for output in ("lognorm", "counts", "rate"):
        impute(tissue, missing="not measured", output=output)
        assert np.isfinite(tissue.layers["spaformer"]).all()
        assert tissue.layers["spaformer"][50].any() == (output == "rate")
    assert tissue.var["spaformer_held_out"].iloc[4] == 0
    assert np.isnan(tissue.var["spaformer_pearson"].iloc[4])


# --- it learns --------------------------------------------------------------------------------------------------------


def divergence(truth, share):
    """Mean Kullback-Leibler divergence (nats) of shares from the true ones."""
    return float((truth * np.log(truth / np.maximum(share, 1e-9))).sum(axis=1).mean())


def test_it_learns_what_there_is(shared_tissue):
    result = impute(shared_tissue, max_epochs=40, output="rate", target_sum=1, copy=True)
    truth = shared_tissue.layers["true_rate"].astype(float)
    mean = np.asarray(shared_tissue.X.sum(axis=0)).ravel() / shared_tissue.X.sum()
    share = result.layers["spaformer"]
    assert result.uns["spaformer"]["scores"]["gain"] > 0.15
    assert divergence(truth, share) < 0.85 * divergence(truth, np.broadcast_to(mean, truth.shape))
    assert np.nanmedian(gene_pearson(truth, share)) > 0.3
    history = result.uns["spaformer"]["history"]["validation"]
    assert max(history) > history[0] + 0.05


def test_it_claims_nothing_where_there_is_nothing(tissue):
    rng = np.random.default_rng(0)
    library = np.asarray(tissue.X.sum(axis=1)).ravel()
    mean = np.asarray(tissue.X.sum(axis=0)).ravel() / tissue.X.sum()
    tissue.X = sp.csr_matrix(rng.poisson(library[:, None] * mean).astype(np.float32))
    impute(tissue, max_epochs=40)
    assert abs(tissue.uns["spaformer"]["scores"]["gain"]) < 0.05


def test_a_gene_hidden_in_one_fov_is_recovered_from_the_others():
    adata = sf.datasets.simulated_tissue(n_fovs=6, n_cells=80, n_genes=60)
    genes = adata.var_names.get_indexer(["EPCAM", "VIM", "COL1A1", "KRT8", "PTPRC", "CEACAM6"])
    truth = adata.layers["true_rate"][:80, genes].astype(float)
    layer_of_missing(adata, np.arange(80), genes)
    counts = adata.X.toarray()
    counts[:80, genes] = 0
    adata.X = sp.csr_matrix(counts)
    arguments = {"max_epochs": 60, "output": "rate", "target_sum": 1, "settings": {"tokens_per_step": 100}}
    impute(adata, missing="not measured", **arguments)
    share = adata.layers["spaformer"][:80, genes]
    mean = counts[80:].sum(axis=0)[genes] / counts[80:].sum()
    error, error_of_mean = (np.square(np.sqrt(x) - np.sqrt(truth)).mean() for x in (share, mean))
    assert error < 0.9 * error_of_mean
    assert np.mean(gene_pearson(truth, share)) > 0.15


def test_the_progress_bar_shows_the_score_and_silence_is_silent(tissue, capfd):
    impute(tissue, progress=True)
    shown = capfd.readouterr()
    assert re.search(r"training.*held-out gain -?\d\.\d{3}", shown.err)
    impute(tissue)
    assert capfd.readouterr() == ("", "")


def test_one_line_is_logged_for_each_field(tissue, caplog):
    with caplog.at_level("INFO", logger="spaformer_sc"):
        impute(tissue)
    lines = [record.getMessage() for record in caplog.records]
    for place in SLOTS:
        slot, key = place.split("/")
        assert sum(f"'{key}'" in line and f"adata.{slot}" in line for line in lines) == 1


def test_too_little_memory_is_said_before_training(tissue, monkeypatch, no_training):
    before = contents(tissue)
    monkeypatch.setattr("spaformer_sc._memory.available_memory", lambda: -(10**9))
    with pytest.raises(MemoryError, match=r"takes about .* GiB of memory.*backed='r'"):
        impute(tissue)
    assert contents(tissue) == before


def test_memory_is_stated_with_the_result(tissue, caplog):
    caplog.set_level(logging.INFO)
    impute(tissue, genes=["EPCAM", "VIM"])
    (stated,) = (record for record in caplog.records if record.msg.startswith("memory:"))
    assert stated.args[0] > 900
    assert "of which 0 MiB for the result" in stated.getMessage()
