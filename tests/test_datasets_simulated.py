from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.stats import spearmanr

from spaformer_sc.datasets import simulated_tissue


@pytest.fixture(scope="module")
def small() -> ad.AnnData:
    return simulated_tissue(n_fovs=3, n_cells=150, n_genes=60, random_state=4)


@pytest.fixture(scope="module")
def wide() -> ad.AnnData:
    return simulated_tissue(n_fovs=2, n_cells=600, n_genes=960, random_state=1)


@pytest.fixture(scope="module")
def large() -> ad.AnnData:
    return simulated_tissue(n_fovs=4, n_cells=2500, n_genes=80, random_state=2)


def neighbour_share(adata: ad.AnnData, cell_type: str, radius: float) -> np.ndarray:
    """Share of `cell_type` among the cells within `radius`, by brute force over a list of neighbours."""
    xy = adata.obsm["spatial"]
    is_type = (adata.obs["cell_type"] == cell_type).to_numpy()
    lists = cKDTree(xy).query_ball_point(xy, radius)
    return np.array([(is_type[i].sum() - is_type[c]) / max(len(i) - 1, 1) for c, i in enumerate(lists)])


def test_shapes_dtypes_and_slots(small: ad.AnnData) -> None:
    assert small.shape == (450, 60)
    assert isinstance(small.X, sparse.csr_matrix)
    assert small.X.dtype == np.float32
    assert small.X.has_canonical_format
    assert (small.X.data >= 1).all()
    assert (small.X.data == np.rint(small.X.data)).all()
    assert small.layers["true_rate"].dtype == np.float32
    assert small.obsm["spatial"].shape == (450, 2)
    assert small.obsm["spatial"].dtype == np.float64
    for key in ("fov", "cell_type", "layer", "niche"):
        assert isinstance(small.obs[key].dtype, pd.CategoricalDtype)
    assert small.obs["fov"].value_counts().to_dict() == {"fov1": 150, "fov2": 150, "fov3": 150}
    assert list(small.obs["fov"].cat.categories) == ["fov1", "fov2", "fov3"]
    assert (small.obs["true_depth"] > 0).all()
    assert small.obs_names.is_unique
    assert small.var_names.is_unique
    assert small.var_names[0] == "EPCAM"
    assert {"CD3E", "COL1A1", "PECAM1", "MS4A1", "CD68", "KRT8"} <= set(small.var_names)
    assert small.var_names[-1] == "gene_0060"
    assert all(isinstance(value, int | float | str) for value in small.uns["simulation"].values())


def test_true_rates_are_shares(small: ad.AnnData) -> None:
    rate = small.layers["true_rate"]
    assert (rate > 0).all()
    np.testing.assert_allclose(rate.sum(axis=1, dtype=np.float64), 1, atol=1e-5)
    np.testing.assert_allclose(small.var["mean_rate"], rate.mean(axis=0, dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize("n_genes", [40, 300, 960])
def test_zeros_as_in_cosmx_whatever_the_panel(n_genes: int) -> None:
    adata = simulated_tissue(n_fovs=2, n_cells=400, n_genes=n_genes, random_state=3)
    assert adata.X.nnz / np.prod(adata.shape) == pytest.approx(0.12, abs=0.03)


def test_depth_and_abundance_as_in_cosmx(wide: ad.AnnData) -> None:
    total = np.asarray(wide.X.sum(axis=1)).ravel()
    low, median, high = np.percentile(total, [5, 50, 95])
    assert 25 < low < 75
    assert 150 < median < 270
    assert 400 < high < 900
    mean = np.asarray(wide.X.mean(axis=0)).ravel()
    assert mean.max() / np.percentile(mean, 1) > 100
    assert np.corrcoef(np.log(total), np.log(wide.obs["true_depth"]))[0, 1] > 0.9


REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "cosmx_nsclc_lung5_rep3.h5ad"


@pytest.mark.skipif(not REAL.exists(), reason=f"needs real CosMx counts in {REAL}")
def test_marginals_are_those_of_real_counts(wide: ad.AnnData) -> None:
    real = ad.read_h5ad(REAL).X
    for axis in (0, 1):
        ours, theirs = (np.asarray(counts.mean(axis=axis)).ravel() for counts in (wide.X, real))
        at = [5, 25, 50, 75, 95]
        np.testing.assert_allclose(np.log(np.percentile(ours, at)), np.log(np.percentile(theirs, at)), atol=0.5)


def test_counts_have_the_documented_mean(large: ad.AnnData) -> None:
    touching = [
        np.setdiff1d(near, cell)
        for cell, near in enumerate(cKDTree(large.obsm["spatial"]).query_ball_point(large.obsm["spatial"], 12.0))
    ]
    own = large.layers["true_rate"] * large.obs["true_depth"].to_numpy()[:, None]
    share = large.uns["simulation"]["leak_per_neighbour"]
    received = share * np.array([own[near].sum(axis=0) for near in touching])
    kept = own * (1 - share * np.array([len(near) for near in touching]))[:, None]
    expected = kept + received
    np.testing.assert_allclose(large.X.sum(), expected.sum(), rtol=0.01)
    gene_total = np.asarray(large.X.sum(axis=0)).ravel()
    np.testing.assert_allclose(gene_total, expected.sum(axis=0), rtol=0.15)
    # The weight that counts give to the leaked part, by weighted least squares; without leakage it would be 0.
    counts = large.X.toarray()
    weight = received / expected
    assert ((counts - kept) * weight).sum() / (received * weight).sum() == pytest.approx(1, abs=0.2)
    # Variance of a Gamma-Poisson count: m + dispersion m². Plain Poisson counts would give a ratio of 0 here.
    excess = (counts - expected) ** 2 - expected
    planned = large.var["dispersion"].to_numpy() * expected**2
    abundant = expected.mean(axis=0) > 0.3
    assert abundant.sum() >= 8
    assert excess[:, abundant].sum(axis=0) / planned[:, abundant].sum(axis=0) == pytest.approx(1, abs=0.5)


def test_variance_exceeds_mean_given_the_rate(wide: ad.AnnData) -> None:
    total = np.asarray(wide.X.sum(axis=1))
    expected = wide.layers["true_rate"] * total
    abundant = expected.mean(axis=0) > 1
    assert abundant.sum() > 10
    pearson = ((wide.X.toarray() - expected) ** 2)[:, abundant].sum(axis=0) / expected[:, abundant].sum(axis=0)
    assert (pearson > 1.2).all()


def test_same_seed_same_tissue_and_global_state_untouched() -> None:
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = simulated_tissue(2, 100, 50, random_state=7)
    second = simulated_tissue(2, 100, 50, random_state=np.int64(7))
    other = simulated_tissue(2, 100, 50, random_state=8)
    drawn = simulated_tissue(2, 100, 50, random_state=np.random.default_rng(7))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002

    for again in (second, drawn):
        np.testing.assert_array_equal(first.X.toarray(), again.X.toarray())
        np.testing.assert_array_equal(first.layers["true_rate"], again.layers["true_rate"])
        np.testing.assert_array_equal(first.obsm["spatial"], again.obsm["spatial"])
        pd.testing.assert_frame_equal(first.obs, again.obs)
        pd.testing.assert_frame_equal(first.var, again.var)
    assert (first.X != other.X).nnz > 0
    assert not np.array_equal(first.obsm["spatial"], other.obsm["spatial"])


def test_the_panel_does_not_move_the_tissue() -> None:
    narrow, broad = simulated_tissue(1, 80, 10), simulated_tissue(1, 80, 200)
    np.testing.assert_array_equal(narrow.obsm["spatial"], broad.obsm["spatial"])
    assert (narrow.obs["cell_type"] == broad.obs["cell_type"]).all()


def test_cells_keep_their_distance_and_their_fov(large: ad.AnnData) -> None:
    xy = large.obsm["spatial"]
    nearest = cKDTree(xy).query(xy, k=2)[0][:, 1]
    assert np.percentile(nearest, 1) > 4
    assert 7 < np.median(nearest) < 11
    assert nearest.std() > 1  # not a lattice
    width, height = np.sqrt(2500 * 150 * np.array([1.5, 1 / 1.5]))
    for i, fov in enumerate(large.obs["fov"].cat.categories):
        inside = xy[large.obs["fov"] == fov]
        low = np.array([i % 2 * width, i // 2 * height])
        assert (inside >= low).all()
        assert (inside <= low + np.array([width, height])).all()
        assert (np.ptp(inside, axis=0) > 0.95 * np.array([width, height])).all()


def test_layers_niches_and_types_are_organised(large: ad.AnnData) -> None:
    xy = large.obsm["spatial"]
    nearest = cKDTree(xy).query(xy, k=7)[1][:, 1:]
    for key, at_least in (("layer", 0.85), ("niche", 0.75)):
        codes = large.obs[key].cat.codes.to_numpy()
        assert (codes[nearest] == codes[:, None]).mean() > at_least
    types = large.obs["cell_type"].cat.codes.to_numpy()
    chance = (np.bincount(types) / len(types)) @ (np.bincount(types) / len(types))
    assert (types[nearest] == types[:, None]).mean() > 2.5 * chance
    composition = pd.crosstab(large.obs["niche"], large.obs["cell_type"], normalize="index")
    assert composition.loc["follicle", "B cell"] > 0.3
    assert composition.loc["tumour nest", "tumour cell"] > 0.6
    assert composition.loc["vessel", "endothelial cell"] > 0.3
    assert (large.obs["cell_type"].value_counts() > 20).all()
    assert (large.obs["niche"].value_counts() > 20).all()


def test_layers_run_on_across_fovs(large: ad.AnnData) -> None:
    xy, fov, layer = large.obsm["spatial"], large.obs["fov"].to_numpy(), large.obs["layer"].to_numpy()
    pairs = cKDTree(xy).query_pairs(15, output_type="ndarray")
    across = pairs[fov[pairs[:, 0]] != fov[pairs[:, 1]]]
    assert len(across) > 50
    assert (layer[across[:, 0]] == layer[across[:, 1]]).mean() > 0.85


def test_markers_follow_their_types(large: ad.AnnData) -> None:
    rate = large.to_df("true_rate").groupby(large.obs["cell_type"], observed=True).mean()
    assert set(rate["EPCAM"].nlargest(2).index) == {"tumour cell", "epithelial cell"}
    for gene, cell_type in [("CD3E", "T cell"), ("MS4A1", "B cell"), ("PECAM1", "endothelial cell")]:
        assert rate[gene].idxmax() == cell_type
        assert rate[gene].max() > 3 * rate[gene].median()
        counts = large[:, gene].X.toarray().ravel()
        inside = (large.obs["cell_type"] == cell_type).to_numpy()
        assert counts[inside].mean() > 2 * counts[~inside].mean()


def test_leakage_from_touching_cells(large: ad.AnnData) -> None:
    # Within follicles the true rate of these genes in other types does not depend on which cells they touch.
    genes = ["MS4A1", "CD79A"]
    b_cell = (large.obs["cell_type"] == "B cell").to_numpy()
    bystander = ~b_cell & (large.obs["niche"] == "follicle").to_numpy()
    touching = neighbour_share(large, "B cell", 12.0) > 0
    counts = np.asarray(large[:, genes].X.sum(axis=1)).ravel() / large.obs["true_depth"].to_numpy()
    rate = large[:, genes].layers["true_rate"].sum(axis=1)
    assert rate[bystander & touching].mean() == pytest.approx(rate[bystander & ~touching].mean(), rel=0.2)
    assert counts[bystander & touching].mean() > 1.5 * counts[bystander & ~touching].mean()


def test_programs_that_neighbours_switch_on(large: ad.AnnData) -> None:
    genes = (large.var["program"] == "macrophage near tumour").to_numpy()
    assert genes.sum() >= 2
    macrophage = (large.obs["cell_type"] == "macrophage").to_numpy()
    share = neighbour_share(large, "tumour cell", 25.0)
    rate = large.layers["true_rate"][:, genes].sum(axis=1)
    counts = np.asarray(large.X[:, genes].sum(axis=1)).ravel()
    near, far = macrophage & (share > 0.4), macrophage & (share == 0)
    assert near.sum() > 50
    assert far.sum() > 50
    assert rate[near].mean() > 4 * rate[far].mean()
    assert counts[near].mean() > 3 * counts[far].mean()
    t_cell = (large.obs["cell_type"] == "T cell").to_numpy()
    assert rate[t_cell & (share > 0.4)].mean() < 2 * rate[t_cell & (share == 0)].mean()


def test_gradients_run_through_all_types(wide: ad.AnnData) -> None:
    genes = (wide.var["program"] == "gradient up").to_numpy()
    assert genes.sum() > 5
    rate = wide.layers["true_rate"][:, genes].sum(axis=1)
    y = wide.obsm["spatial"][:, 1]
    for cell_type in ("fibroblast", "T cell"):
        cells = (wide.obs["cell_type"] == cell_type).to_numpy()
        assert spearmanr(rate[cells], y[cells]).statistic > 0.3


def test_h5ad_round_trip(small: ad.AnnData, tmp_path: Path) -> None:
    small.write_h5ad(tmp_path / "tissue.h5ad")
    back = ad.read_h5ad(tmp_path / "tissue.h5ad")
    assert (back.X != small.X).nnz == 0
    np.testing.assert_array_equal(back.layers["true_rate"], small.layers["true_rate"])
    np.testing.assert_array_equal(back.obsm["spatial"], small.obsm["spatial"])
    pd.testing.assert_frame_equal(back.obs, small.obs, check_index_type=False)
    pd.testing.assert_frame_equal(back.var, small.var, check_index_type=False)
    assert dict(back.uns["simulation"]) == small.uns["simulation"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (1, 30, 3), (5, 1, 20), (2, 3, 38), (1, 2, 39)])
def test_small_tissues(shape: tuple[int, int, int]) -> None:
    adata = simulated_tissue(*shape)
    assert adata.shape == (shape[0] * shape[1], shape[2])
    assert np.isfinite(adata.obsm["spatial"]).all()
    assert np.isfinite(adata.obs["true_depth"]).all()
    np.testing.assert_allclose(adata.layers["true_rate"].sum(axis=1, dtype=np.float64), 1, atol=1e-5)
    assert adata.var_names[0] == "EPCAM"


@pytest.mark.parametrize("name", ["n_fovs", "n_cells", "n_genes"])
def test_bad_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}=0`: at least 1"):
        simulated_tissue(**{name: 0})
    for value in (2.0, "2", True, None):
        with pytest.raises(TypeError, match=f"`{name}` must be an integer"):
            simulated_tissue(**{name: value})


def test_bad_seeds() -> None:
    with pytest.raises(ValueError, match="`random_state=-1`"):
        simulated_tissue(random_state=-1)
    for value in (1.5, "0", None, np.random.RandomState(0)):
        with pytest.raises(TypeError, match="`random_state` must be"):
            simulated_tissue(random_state=value)  # type: ignore[arg-type]


def test_another_process_imports_little_and_gets_the_same_tissue(small: ad.AnnData) -> None:
    code = """if True:
        import sys
        from spaformer_sc.datasets import simulated_tissue
        print([name for name in ("torch", "scanpy", "squidpy", "pooch") if name in sys.modules])
        adata = simulated_tissue(3, 150, 60, random_state=4)
        print(float(adata.X.sum()), float(adata.layers["true_rate"][7].max()), float(adata.obsm["spatial"].sum()))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, values = done.stdout.splitlines()
    assert modules == "[]"
    expected = (small.X.sum(), small.layers["true_rate"][7].max(), small.obsm["spatial"].sum())
    assert values.split() == [repr(float(value)) for value in expected]
