"""The simple methods of the benchmark, on a count matrix with planted structure and against brute force."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from spaformer_sc import metrics

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of this distribution")

SMALL = {
    "fov_gene_mean": None,
    "spatial_knn_mean": ([(20, "profiles"), (40, "counts")], [(10, "lognorm"), (40, "lognorm")]),
    "expression_knn": (
        [(3, 0.0, 30, "profiles"), (3, 0.0, 100, "counts")],
        [(3, 0.0, 30, "lognorm"), (3, 0.0, 60, "lognorm")],
    ),
    "joint_knn": ([(3, 1.0, 30, "profiles"), (3, 1.0, 60, "counts")], [(3, 1.0, 30, "lognorm")]),
    "truncated_svd": ([("depth", 3), ("poisson", 3)], [("lognorm", 2), ("lognorm", 10)]),
    "kl_nmf": ([(3, 60), (6, 30)], [(3, 60)]),
    "ridge": ([(6, 1.0), (6, 10.0)], [(6, 1.0), (6, 10.0)]),
    "poisson_glm": ([(10, 1.0, 60)], [(10, 1.0, 60)]),
}
"""Small grids, for rates and for log-normalised values; None leaves the method's own."""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that imports a module of the package `peers`, or the package itself."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda module="": importlib.import_module(f"peers.{module}" if module else "peers")


@pytest.fixture(scope="module")
def tissue() -> SimpleNamespace:
    """Three cell types in stripes, four fields of view, Poisson counts; one cell is empty."""
    rng = np.random.default_rng(7)
    n_cells, n_genes = 450, 60
    coords = rng.random((n_cells, 2)) * 100
    kind = (coords[:, 0] // 34).astype(int)
    programs = rng.gamma(0.5, size=(3, n_genes)) + 0.02
    rates = programs[kind] / programs.sum(axis=1)[kind][:, None]
    counts = rng.poisson(rates * rng.gamma(5, 12, size=(n_cells, 1))).astype(np.float32)
    counts[3] = 0
    fovs = np.array(["a", "b", "c", "d"])[(coords[:, 1] // 25).astype(int)]
    return SimpleNamespace(counts=sparse.csr_matrix(counts), coords=coords, fovs=fovs, rates=rates)


def make_input(tissue: SimpleNamespace, protocol: str, scratch: Path | None = None) -> tuple[ad.AnnData, Any]:
    """Split the counts; returns what methods are given, and the split."""
    layers = {}
    if protocol == "thinning":
        split: Any = metrics.thin(tissue.counts, random_state=0)
    elif protocol == "entries":
        split = metrics.hide_entries(tissue.counts, random_state=0)
        layers["missing"] = split.hidden
    else:
        split = metrics.hide_blocks(tissue.counts, tissue.fovs, random_state=0)
        layers["missing"] = split.layer()
    obs = pd.DataFrame({"fov": pd.Categorical(tissue.fovs)}, index=[f"c{i}" for i in range(len(tissue.fovs))])
    adata = ad.AnnData(split.train, obs=obs, obsm={"spatial": tissue.coords}, layers=layers)
    adata.uns["task"] = {
        "protocol": protocol,
        "output": "rate" if protocol == "thinning" else "lognorm",
        "target_sum": 250.0,
        "random_state": 0,
        "scratch": None if scratch is None else str(scratch),
    }
    return adata, split


def with_small_grid(method: Any) -> Any:
    grids = SMALL[method.name]
    return method if grids is None else replace(method, rate=grids[0], lognorm=grids[1])


def test_every_simple_method_loads_by_name(peers: Callable) -> None:
    package = peers()
    simple = {name for name, where in package.METHODS.items() if where.split(":")[0] in
              ("means", "knn", "low_rank", "linear", "blend")}  # fmt: skip
    assert simple == {*SMALL, "gene_mean", "blend"}
    for name in simple:
        assert callable(package.load(name))
    assert {component.name for component in peers("blend").COMPONENTS} == set(SMALL)


def test_a_method_of_ones_own_loads_from_its_file(peers: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def impute(adata):\n    return adata.X, 'counts'\n")
    assert peers().load(f"{tmp_path}/mine.py:impute")(SimpleNamespace(X=1)) == (1, "counts")
    with pytest.raises(ValueError, match="defines no 'other'"):
        peers().load(f"{tmp_path}/mine.py:other")
    with pytest.raises(ValueError, match="'nonsense' is not known; give one of gene_mean"):
        peers().load("nonsense")
    with pytest.raises(ValueError, match="file that exists"):
        peers().load(f"{tmp_path}/none.py:impute")


@pytest.mark.parametrize(
    ("method", "least"),
    [
        ("spatial_knn_mean", 0.65),
        ("expression_knn", 0.9),
        ("joint_knn", 0.9),
        ("truncated_svd", 0.85),
        ("kl_nmf", 0.85),
        ("ridge", 0.7),
        ("poisson_glm", 0.75),
    ],
)
def test_rates_recover_planted_structure(peers: Callable, tissue: SimpleNamespace, method: str, least: float) -> None:
    adata, split = make_input(tissue, "thinning")
    impute = with_small_grid(peers().load(method))
    prediction, scale = impute(adata)
    assert (split.train != adata.X).nnz == 0
    assert (scale, prediction.dtype, prediction.shape) == ("rate", np.float32, tissue.counts.shape)
    ceiling = metrics.poisson_gain(split.held, tissue.rates, split.train)
    gain = metrics.poisson_gain(split.held, prediction, split.train)
    assert least * ceiling < gain < ceiling
    np.testing.assert_array_equal(impute(adata)[0], prediction)


@pytest.mark.parametrize("protocol", ["entries", "blocks"])
@pytest.mark.parametrize("method", [name for name in SMALL if name != "fov_gene_mean"])
def test_hidden_entries_are_recovered(peers: Callable, tissue: SimpleNamespace, method: str, protocol: str) -> None:
    adata, _ = make_input(tissue, protocol)
    hidden = adata.layers["missing"]
    library = np.asarray(tissue.counts.sum(axis=1))
    truth = np.log1p(tissue.counts.toarray() / np.maximum(library, 1) * 250)
    by_gene = peers("means").gene_mean(adata)[0]
    prediction, scale = with_small_grid(peers().load(method))(adata)
    assert (scale, prediction.dtype, prediction.shape) == ("lognorm", np.float32, tissue.counts.shape)
    error, of_mean = (metrics.rmse(truth, array, mask=hidden) for array in (prediction, by_gene))
    if method == "spatial_knn_mean" and protocol == "blocks":
        assert error == pytest.approx(of_mean, rel=0.02)
    else:
        assert error < 0.9 * of_mean


def test_gene_mean_leaves_hidden_entries_out(peers: Callable) -> None:
    rng = np.random.default_rng(3)
    shares, depth = rng.dirichlet(np.full(12, 2.0)), rng.integers(50, 200, 40)
    expected = depth[:, None] * shares
    missing = rng.random(expected.shape) < 0.4
    counts = sparse.csr_matrix(np.where(missing, 0, expected))
    cells = peers("_cells").Cells(counts, np.zeros((40, 2)), np.zeros(40, int), "lognorm", 250.0, missing)
    np.testing.assert_allclose(cells.shares, shares, rtol=1e-3)
    np.testing.assert_allclose(cells.depth, depth, rtol=1e-3)
    np.testing.assert_allclose(cells.gene_mean, np.log1p(shares * 250), rtol=1e-3)


def test_gene_mean_gains_nothing(peers: Callable, tissue: SimpleNamespace) -> None:
    adata, split = make_input(tissue, "thinning")
    prediction, _ = peers("means").gene_mean(adata)
    assert metrics.poisson_gain(split.held, prediction, split.train) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("protocol", ["thinning", "entries", "blocks"])
def test_validation_hides_visible_entries_only(peers: Callable, tissue: SimpleNamespace, protocol: str) -> None:
    adata, _ = make_input(tissue, protocol)
    cells = peers("_cells").Cells.of(adata)
    validation = peers("_tuning").split(cells, protocol, 0)
    rows, genes = validation.entries
    held = cells.counts[validation.rows][rows, genes].A1 if protocol == "thinning" else None
    inner = validation.cells
    if protocol == "thinning":
        np.testing.assert_array_equal(inner.counts[validation.rows][rows, genes].A1 + validation.truth, held)
        assert inner.counts.sum() == pytest.approx(0.8 * cells.counts.sum(), rel=0.02)
        return
    share = (inner.missing & ~cells.missing).sum() / (~cells.missing).sum()
    assert share == pytest.approx(0.2, abs=0.02)
    assert not cells.missing[validation.rows[rows], genes].any()
    assert inner.missing[validation.rows[rows], genes].all()
    assert (inner.missing[validation.rows] & ~cells.missing[validation.rows])[cells.depth > 0].sum() == len(rows)
    counts = np.where(inner.missing, 0, cells.counts.toarray())
    np.testing.assert_array_equal(inner.counts.toarray(), counts)
    values = np.expm1(validation.truth) / 250 * cells.depth[validation.rows[rows]]
    np.testing.assert_allclose(values, cells.counts.toarray()[validation.rows[rows], genes], atol=1e-4)
    if protocol == "blocks":
        assert (~inner.missing).any(axis=0).all()
        for fov in range(4):
            assert (inner.missing[cells.fovs == fov] == inner.missing[cells.fovs == fov][0]).all()


def test_averages_stay_within_a_field_of_view_and_leave_hidden_entries_out(peers: Callable) -> None:
    rng = np.random.default_rng(0)
    missing = rng.random((30, 5)) < 0.3
    counts = np.where(missing, 0, rng.poisson(20, size=(30, 5)) + 1).astype(np.float32)
    coords, fovs = rng.random((30, 2)), np.repeat([0, 1, 2], [18, 11, 1])
    cells = peers("_cells").Cells(sparse.csr_matrix(counts), coords, fovs, "lognorm", 250.0, missing)
    values = np.log1p(counts / cells.depth[:, None] * 250)
    grid = [(2, "lognorm"), (12, "lognorm")]
    for (k, _), got in peers("means")._spatial_means(cells, grid, np.arange(30), 0):
        for i in range(30):
            same = np.flatnonzero(fovs == fovs[i])
            nearest = same[np.argsort(((coords[same] - coords[i]) ** 2).sum(axis=1))][:k]
            for g in range(5):
                seen = nearest[~missing[nearest, g]]
                assert got[i, g] == pytest.approx(values[seen, g].mean() if len(seen) else cells.gene_mean[g], rel=1e-4)


def test_surroundings_leave_the_cell_out(peers: Callable) -> None:
    coords = np.array([[0.0, 0], [0, 0], [0, 0], [5, 0], [6, 0], [9, 9]])
    cells = peers("_cells").Cells(sparse.csr_matrix(np.eye(6)), coords, np.array([0, 0, 0, 0, 0, 1]))
    neighbours = cells.spatial_neighbours(2)
    assert [set(row) for row in neighbours[:5]] == [
        {1, 2},
        {0, 2},
        {0, 1},
        {4, neighbours[3, 1]},
        {3, neighbours[4, 1]},
    ]
    assert (neighbours[5] == -1).all()


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_expression_means_equal_brute_force(peers: Callable, tissue: SimpleNamespace, weight: float) -> None:
    dense = tissue.counts.toarray().astype(float)
    library = dense.sum(axis=1)
    shares = dense / np.maximum(library, 1)[:, None]
    full = library > 0
    logged = np.log1p(shares * np.median(library[full]))
    logged -= logged[full].mean(axis=0)
    logged[~full] = 0
    distance = ((tissue.coords[:, None] - tissue.coords[None]) ** 2).sum(axis=2)
    near = np.argsort(distance, axis=1)[:, 1:11]
    around = np.stack([logged[[j for j in row if full[j]]].mean(axis=0) for row in near])

    def scores(values: np.ndarray) -> np.ndarray:
        u, s, _ = np.linalg.svd(values, full_matrices=False)
        return (u * s)[:, :4]

    space = np.hstack([scores(logged), weight * scores(around - around.mean(axis=0))])
    between = ((space[:, None] - space[None]) ** 2).sum(axis=2)
    cells = peers("_cells").Cells(tissue.counts, tissue.coords, np.zeros(450, int))
    rows = np.array([0, 17, 200])
    for what in ("profiles", "counts"):
        grid = [(4, weight, 6, what), (4, weight, 20, what)]
        for (_, _, k, _), got in peers("knn")._neighbour_means(cells, grid, rows, 0):
            for row, i in enumerate(rows):
                nearest = np.argsort(between[i])[:k]
                source = shares if what == "profiles" else dense
                expected = source[nearest].sum(axis=0) / source[nearest].sum()
                np.testing.assert_allclose(got[row], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scaling", ["depth", "poisson"])
def test_truncated_svd_of_full_rank_gives_back_the_counts(peers: Callable, scaling: str) -> None:
    rng = np.random.default_rng(0)
    low_rank = rng.integers(1, 4, size=(25, 3)) @ rng.integers(1, 4, size=(3, 12))
    cells = peers("_cells").Cells(sparse.csr_matrix(low_rank.astype(np.float32)), np.zeros((25, 2)), np.zeros(25, int))
    ((_, rates),) = peers("low_rank")._truncated_svds(cells, [(scaling, 3)], np.arange(25), 0)
    expected = low_rank / low_rank.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(rates / rates.sum(axis=1, keepdims=True), expected, rtol=1e-4)


def test_svd_fills_hidden_entries_of_a_low_rank_matrix(peers: Callable) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(200, 1)) @ rng.normal(size=(1, 30))).astype(np.float32)
    missing = rng.random(values.shape) < 0.2
    filled = peers("low_rank").low_rank(np.where(missing, np.float32(0), values), 1, missing)
    once = peers("low_rank").low_rank(np.where(missing, np.float32(0), values), 1, None)
    error, of_zeros = (np.square(array - values)[missing].mean() for array in (filled, once))
    assert error < 0.01 * of_zeros


def test_kl_nmf_equals_sklearn(peers: Callable, tissue: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.decomposition import non_negative_factorization

    low_rank = peers("low_rank")
    monkeypatch.setattr(low_rank, "_BLOCK_ROWS", 100)
    counts = tissue.counts[4:].astype(np.float64)
    rng = np.random.default_rng(0)
    w, h = rng.random((counts.shape[0], 4)), rng.random((4, counts.shape[1]))
    their_w, their_h, _ = non_negative_factorization(
        counts.toarray(), W=w.copy(), H=h.copy(), n_components=4, init="custom", solver="mu",
        beta_loss="kullback-leibler", max_iter=30, tol=0,
    )  # fmt: skip
    seen_w, seen_h = w.copy(), h.copy()
    low_rank.kl_nmf_updates(counts, w, h, 30)
    np.testing.assert_allclose(w @ h, their_w @ their_h, rtol=1e-6, atol=1e-9)
    low_rank.kl_nmf_updates(counts, seen_w, seen_h, 30, np.ones(counts.shape))
    np.testing.assert_allclose(seen_w @ seen_h, w @ h, rtol=1e-9)


def test_kl_nmf_fills_hidden_entries(peers: Callable) -> None:
    rng = np.random.default_rng(0)
    values = rng.random((80, 2)) @ rng.random((2, 30)) + 0.1
    visible = (rng.random(values.shape) > 0.3).astype(float)
    w, h = rng.random((80, 3)), rng.random((3, 30))
    peers("low_rank").kl_nmf_updates(sparse.csr_matrix(values * visible), w, h, 500, visible)
    np.testing.assert_allclose((w @ h)[visible == 0], values[visible == 0], atol=0.1)


def test_ridge_without_self_equals_one_regression_per_gene(peers: Callable) -> None:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(100, 4)) @ rng.normal(size=(4, 9)) + rng.normal(size=(100, 9))
    hidden = rng.random((100, 6)) < 0.3
    design = (mixed - mixed.mean(axis=0)).astype(np.float32)
    design[:, :6][hidden] = 0
    ((penalty, got),) = peers("linear").ridge_without_self(design, 1 - hidden.mean(axis=0), [0.5])
    strength = penalty * np.square(design).sum() / 9
    for gene in range(6):
        others = np.delete(np.arange(9), gene)
        features, seen = design[:, others].astype(float), ~hidden[:, gene]
        cross = features[seen].T @ design[seen, gene] / seen.mean()
        expected = np.linalg.solve(features.T @ features + strength * np.eye(8), cross)
        np.testing.assert_allclose(got[others, gene], expected, rtol=1e-3, atol=1e-5)
        assert got[gene, gene] == 0


def test_mixture_weights_are_the_maximum(peers: Callable, tissue: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    counts = tissue.counts.tocoo()
    mean = np.asarray(tissue.counts.sum(axis=0)).ravel() / tissue.counts.sum()
    noisy = rng.dirichlet(np.full(60, 0.5), size=450) * 0.7 + tissue.rates * 0.3
    parts = np.stack([noisy[counts.row, counts.col], mean[counts.col]])
    weights, score = peers("_tuning").mixture(counts.data, parts)
    grid = np.linspace(0.001, 0.999, 999)
    scores = [(counts.data / counts.data.sum()) @ np.log(v * parts[0] + (1 - v) * parts[1]) for v in grid]
    assert weights.sum() == pytest.approx(1)
    assert 0.01 < weights[0] < 0.99
    assert weights[0] == pytest.approx(grid[np.argmax(scores)], abs=0.01)
    assert score == pytest.approx(max(scores), abs=1e-5)


def test_squared_error_weights_find_the_planted_ones(peers: Callable) -> None:
    rng = np.random.default_rng(0)
    parts = rng.random((4, 500))
    planted = np.array([-0.5, 0.7, 0.3, 0.0, -0.2])
    truth = planted[:4] @ parts + planted[4]
    got = peers("blend").squared_error_weights(truth, parts)
    np.testing.assert_allclose(got, planted, atol=1e-8)
    against = peers("blend").squared_error_weights(truth - 0.4 * parts[3], parts)
    assert against[3] == 0
    assert (against[1:3] > 0).all()


@pytest.mark.parametrize("protocol", ["thinning", "entries"])
def test_blend_is_the_same_from_what_components_left(
    peers: Callable, tissue: SimpleNamespace, protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = peers("blend")
    components = tuple(with_small_grid(component) for component in module.COMPONENTS)
    monkeypatch.setattr(module, "COMPONENTS", components)
    adata, split = make_input(tissue, protocol)
    alone, scale = module.blend(adata)
    assert scale == adata.uns["task"]["output"]
    assert adata.uns["task"]["seconds_before"] == 0

    stored, _ = make_input(tissue, protocol, tmp_path)
    singles = [component(stored)[0] for component in components[1:]]
    monkeypatch.setattr(peers("_tuning").Store, "write", lambda store, fit: written.append(store.name))
    written: list[str] = []
    blended, _ = module.blend(stored)
    np.testing.assert_array_equal(blended, alone)
    assert written == ["fov_gene_mean"]
    assert stored.uns["task"]["seconds_before"] > 0
    assert not list(tmp_path.glob("*.tmp"))

    if protocol == "thinning":
        scores = [metrics.poisson_gain(split.held, array, split.train) for array in (*singles, blended)]
    else:
        scores = [-metrics.rmse(split.truth, array, mask=split.hidden) for array in (*singles, blended)]
    assert scores[-1] > max(scores[:-1]) - 0.01 * abs(max(scores[:-1]))


def test_results_of_another_input_are_not_read(peers: Callable, tissue: SimpleNamespace, tmp_path: Path) -> None:
    method = with_small_grid(peers("low_rank").truncated_svd)
    cells_of = peers("_cells").Cells.of
    adata, _ = make_input(tissue, "thinning", tmp_path)
    fit, computed = method.fit(cells_of(adata), adata.uns["task"])
    again, computed_again = method.fit(cells_of(adata), adata.uns["task"], stored=True)
    assert (computed, computed_again) == (True, False)
    np.testing.assert_array_equal(again.final, fit.final)
    np.testing.assert_array_equal(again.inner, fit.inner)
    assert (again.setting, again.seconds) == (fit.setting, fit.seconds)
    other = adata.copy()
    other.X = adata.X * 2
    assert method.fit(cells_of(other), other.uns["task"], stored=True)[1]
