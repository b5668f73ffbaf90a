"""What is written, in the hands of the packages that read it: scanpy, squidpy, scvi-tools, SpatialData, anndata."""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("MPLBACKEND", "agg")

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import kneighbors_graph

import spaformer_sc as sf
from spaformer_sc.data._graph import spatial_graph
from tests.conftest import contents, plain

pytestmark = [
    # scanpy's and squidpy's use of pandas 3, and squidpy's of anndata 0.13.
    pytest.mark.filterwarnings("ignore:The (inplace|copy) keyword .*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The method obs_vector is deprecated:FutureWarning"),
]
GENES = {"left": range(20), "right": range(20, 40)}
"""Columns of the genes that are expressed five times more in cells of that kind; the other twenty do not differ."""


def made(slide, seed):
    """Two FOVs of 80 cells, two kinds of cells side by side in each, 60 genes."""
    rng = np.random.default_rng(seed)
    where = rng.uniform(0, 100, (160, 2))
    kind = np.where(where[:, 0] < 50, "left", "right")
    rate = np.full((160, 60), 0.6)
    for name, genes in GENES.items():
        rate[np.ix_(kind == name, genes)] *= 5
    fov = np.repeat(["1", "2"], 80)
    where[fov == "2"] += 200
    return ad.AnnData(
        sp.csr_matrix(rng.poisson(rate).astype(np.float32)),
        obs=pd.DataFrame(
            {"fov": pd.Categorical(fov), "kind": pd.Categorical(kind), "slide": pd.Categorical([slide] * 160)},
            index=[f"{slide}_{i}" for i in range(160)],
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(60)]),
        obsm={"spatial": where},
    )


def impute(adata, **arguments):
    sf.tl.impute(adata, **{"library_key": "fov", "quality": "fast", "max_epochs": 24, "progress": False, **arguments})
    return adata


@pytest.fixture(scope="module")
def result():
    return impute(made("a", 0))


@pytest.fixture
def imputed(result):
    """A copy, to do anything with."""
    return result.copy()


def package(name):
    """A package, without the warnings that some raise when they are imported, about what they import themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture(scope="module")
def sc():
    return package("scanpy")


@pytest.fixture(scope="module")
def sq():
    return package("squidpy")


def same_kind(graph, adata):
    """Share of a graph's edges that join cells of the same kind."""
    edges = sp.coo_matrix(graph)
    kind = adata.obs["kind"].to_numpy()
    return (kind[edges.row] == kind[edges.col]).mean()


# --- scanpy -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysed(result, sc):
    """Principal components of the imputed layer, and neighbours in them; tests write other slots."""
    adata = result.copy()
    sc.pp.pca(adata, layer="spaformer", n_comps=10)
    sc.pp.neighbors(adata, use_rep="X_pca", random_state=0)
    return adata


def test_principal_components_are_of_the_imputed_layer(analysed):
    values = analysed.layers["spaformer"].astype(np.float64)
    variances = np.linalg.svd(values - values.mean(axis=0), compute_uv=False)[:10] ** 2 / (len(values) - 1)
    np.testing.assert_allclose(analysed.uns["pca"]["variance"], variances, rtol=0.01)
    assert same_kind(analysed.obsp["connectivities"], analysed) > 0.95


def test_leiden_finds_the_kinds_of_cells(analysed, sc):
    pytest.importorskip("igraph")
    pytest.importorskip("leidenalg")
    sc.tl.leiden(analysed, resolution=0.2, flavor="igraph", n_iterations=2, random_state=0)
    assert adjusted_rand_score(analysed.obs["leiden"], analysed.obs["kind"]) > 0.9


def test_genes_are_ranked_by_their_imputed_values(analysed, sc):
    sc.tl.rank_genes_groups(analysed, "kind", layer="spaformer", use_raw=False, method="t-test")
    for kind, genes in GENES.items():
        found = sc.get.rank_genes_groups_df(analysed, group=kind).set_index("names")
        own, even = found.loc[analysed.var_names[list(genes)]], found.loc[analysed.var_names[40:]]
        assert own["logfoldchanges"].min() > even["logfoldchanges"].abs().max()
        assert (own["scores"] > 10).all()
        assert (own["pvals_adj"] < 1e-6).all()


def test_umap_keeps_the_kinds_apart(analysed, sc):
    sc.tl.umap(analysed, random_state=0, maxiter=50)
    assert same_kind(kneighbors_graph(analysed.obsm["X_umap"], 5), analysed) > 0.95


def test_neighbours_in_the_latent_space(imputed, sc):
    sc.pp.neighbors(imputed, use_rep="X_spaformer", n_neighbors=10, random_state=0)
    assert same_kind(imputed.obsp["connectivities"], imputed) > 0.95


# --- squidpy ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def near(result, sq):
    """With squidpy's graph of each FOV, and the kind of each cell as the imputed layer has it; not to be changed."""
    adata = result.copy()
    sq.gr.spatial_neighbors_knn(adata, n_neighs=6, library_key="fov")
    means = np.stack([adata.layers["spaformer"][:, genes].mean(axis=1) for genes in GENES.values()])
    adata.obs["found"] = pd.Categorical(np.array(list(GENES))[means.argmax(axis=0)])
    assert (adata.obs["found"] == adata.obs["kind"]).mean() > 0.97
    return adata


def test_a_given_graph_of_squidpy_is_used(near, sq):
    adata = near.copy()
    impute(adata, connectivity_key="spatial_connectivities", max_epochs=1)
    params = adata.uns["spaformer"]["params"]
    assert params["connectivity_key"] == "spatial_connectivities"
    own = near.uns["spaformer"]["params"]["graph_summary"]
    assert params["graph_summary"] == own


def test_neighbourhood_enrichment(near, sq):
    found = sq.gr.nhood_enrichment(
        near, cluster_key="found", library_key="fov", n_perms=50, seed=0, show_progress_bar=False, copy=True
    )[0]
    assert (np.diag(found) > 3).all()
    assert found[0, 1] < -3


def test_spatial_autocorrelation_of_imputed_genes(near, sq):
    imputed, counts = (
        sq.gr.spatial_autocorr(
            near, mode="moran", layer=layer, genes=list(near.var_names), copy=True, show_progress_bar=False
        )["I"][near.var_names].to_numpy()
        for layer in ("spaformer", None)
    )
    weights = near.obsp["spatial_connectivities"].toarray()
    weights /= weights.sum(axis=1, keepdims=True)
    centred = near.layers["spaformer"] - near.layers["spaformer"].mean(axis=0, dtype=np.float64)
    wanted = (centred * (weights @ centred)).sum(axis=0) / (centred**2).sum(axis=0)
    np.testing.assert_allclose(imputed, wanted, atol=1e-4)
    assert (imputed[:40] > counts[:40]).all()


def test_ripley(near, sq):
    one = near[near.obs["fov"] == "1"].copy()
    found = sq.gr.ripley(one, cluster_key="found", mode="L", n_simulations=2, n_steps=6, copy=True)["L_stat"]
    where = one.obsm["spatial"]
    for kind, of_kind in found.groupby("found", observed=True):
        distances = pdist(where[one.obs["found"] == kind])
        pairs = 2 * (distances[:, None] < of_kind["bins"].to_numpy()).sum(axis=0)
        np.testing.assert_allclose(of_kind["stats"], np.sqrt(pairs * ConvexHull(where).volume / (80**2 * np.pi)))


# squidpy's use of matplotlib.
@pytest.mark.filterwarnings("ignore:The set_bad function will be deprecated:PendingDeprecationWarning")
def test_spatial_scatter_draws_imputed_values(imputed, sq):
    axes = sq.pl.spatial_scatter(
        imputed, color="gene3", layer="spaformer", shape=None, library_key="fov", library_id=["1", "2"], return_ax=True
    )
    for ax, fov in zip(axes, ("1", "2"), strict=True):
        drawn = ax.collections[0]
        inside = imputed[imputed.obs["fov"] == fov]
        np.testing.assert_array_equal(drawn.get_array(), inside.layers["spaformer"][:, 3])
        np.testing.assert_allclose(drawn.get_offsets(), inside.obsm["spatial"])
    plt.close("all")


def test_squidpy_without_the_graph_function_that_it_deprecates(monkeypatch, sq):
    if hasattr(sq.gr, "spatial_neighbors"):
        monkeypatch.delattr(sq.gr, "spatial_neighbors")
    monkeypatch.setattr("spaformer_sc.data._graph.remembered", lambda function, *arguments: function(*arguments))
    points = np.random.default_rng(0).random((30, 2))
    for arguments in ({}, {"method": "delaunay"}, {"method": "radius", "radius": 0.3}):
        assert spatial_graph(points, **arguments).nnz


# --- scvi-tools -------------------------------------------------------------------------------------------------------


# Of scvi-tools and lightning, about each other and what they use.
@pytest.mark.filterwarnings("ignore::UserWarning:scvi", "ignore::UserWarning:lightning")
def test_scvi_takes_counts_and_imputed_results_stay(imputed):
    scvi = package("scvi")
    before = contents(imputed)
    scvi.model.SCVI.setup_anndata(imputed, batch_key="fov")
    model = scvi.model.SCVI(imputed, n_hidden=8, n_latent=2)
    registered = model.adata_manager.get_from_registry("X")
    assert (registered != imputed.X).nnz == 0
    assert model.summary_stats.n_batch == 2
    after = contents(imputed)
    assert {place: after[place] for place in before} == before


# --- SpatialData ------------------------------------------------------------------------------------------------------


# anndata, of its next default; ome-zarr, of its own classes.
@pytest.mark.filterwarnings(
    "ignore:zarr v3 autosharding will be the default:UserWarning", "ignore::DeprecationWarning:ome_zarr"
)
def test_table_of_spatialdata(tmp_path):
    sd = package("spatialdata")
    models = package("spatialdata.models")
    adata = made("a", 0)
    adata.obs = adata.obs.assign(region=pd.Categorical(["cells"] * adata.n_obs), cell=np.arange(adata.n_obs) + 5)
    circles = models.ShapesModel.parse(
        adata.obsm["spatial"], geometry=0, radius=3.0, index=adata.obs["cell"].to_numpy()
    )
    table = models.TableModel.parse(adata, region="cells", region_key="region", instance_key="cell")
    sdata = sd.SpatialData(shapes={"cells": circles}, tables={"table": table})
    impute(sdata.tables["table"], max_epochs=1)
    sdata.write(tmp_path / "sample.zarr")
    found = sd.read_zarr(tmp_path / "sample.zarr")

    written, wanted = found.tables["table"], sdata.tables["table"]
    np.testing.assert_array_equal(written.layers["spaformer"], wanted.layers["spaformer"])
    np.testing.assert_array_equal(written.obsm["X_spaformer"], wanted.obsm["X_spaformer"])
    pd.testing.assert_frame_equal(written.var, wanted.var, check_names=False)
    np.testing.assert_equal(plain(written.uns["spaformer"]), plain(wanted.uns["spaformer"]))
    of_circles = sd.get_values("gene3", sdata=found, element_name="cells", table_name="table", table_layer="spaformer")
    assert list(of_circles.index) == list(circles.index)
    np.testing.assert_array_equal(of_circles["gene3"], wanted.layers["spaformer"][:, 3])
    intervals = [sf.tl.interval(table, "gene3").upper for table in (written, wanted)]
    np.testing.assert_array_equal(*intervals)


# --- anndata ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uns_merge", ["same", "unique"])
def test_concatenated_results(result, uns_merge):
    other = impute(made("b", 1), max_epochs=1)
    both = ad.concat([result, other], merge="same", uns_merge=uns_merge)
    for slot, key in (("layers", "spaformer"), ("obsm", "X_spaformer")):
        parts = [getattr(part, slot)[key] for part in (result, other)]
        np.testing.assert_array_equal(getattr(both, slot)[key], np.concatenate(parts))
    verdicts = both.obs["spaformer_reliability"]
    assert list(verdicts) == [*result.obs["spaformer_reliability"], *other.obs["spaformer_reliability"]]
    assert verdicts.cat.categories.equals(result.obs["spaformer_reliability"].cat.categories)

    both.layers["held"] = both.X
    for read in (
        lambda: sf.tl.interval(both, "gene3"),
        lambda: sf.tl.sample(both, "gene3"),
        lambda: sf.tl.evaluate(both, "held"),
        lambda: sf.pl.history(both),
        lambda: sf.pl.calibration(both),
        lambda: sf.pl.imputed(both, "gene3"),
    ):
        with pytest.raises(ValueError, match=r"not a whole result of `sf\.tl\.impute`"):
            read()
    impute(both, library_key=["slide", "fov"], max_epochs=1)
    assert sf.tl.interval(both, "gene3").upper.shape == (320, 1)


@pytest.mark.parametrize("uns_merge", ["same", "unique"])
def test_parts_of_one_result_put_together_again_are_that_result(result, uns_merge):
    whole = ad.concat([result[::2], result[1::2]], merge="unique", uns_merge=uns_merge)[result.obs_names]
    for key in result.var:
        pd.testing.assert_series_equal(whole.var[key], result.var[key])
    np.testing.assert_equal(whole.uns["spaformer"], result.uns["spaformer"])
    for of in ("count", "rate"):
        found, wanted = (sf.tl.interval(adata, "gene3", of=of) for adata in (whole, result))
        np.testing.assert_array_equal(found.lower, wanted.lower)
        np.testing.assert_array_equal(found.upper, wanted.upper)


# anndata, of its next default.
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning", "ignore:zarr v3 autosharding:UserWarning")
@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_what_is_read_from_a_file_answers_as_before(result, form, tmp_path):
    path = tmp_path / f"result.{form}"
    getattr(result.copy(), f"write_{form}")(path)
    found = getattr(ad, f"read_{form}")(path)
    for ask in (
        lambda adata: sf.tl.interval(adata, "gene3").upper,
        lambda adata: sf.tl.sample(adata, "gene3", n=3),
        lambda adata: sf.tl.detection(adata, "gene3", capture=5),
    ):
        np.testing.assert_array_equal(ask(found), ask(result))
