"""The benchmark command and its peers, on a count matrix with planted structure."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType, SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from spaformer_sc import metrics

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of this distribution")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    return peers


@pytest.fixture
def heldout(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import heldout

    return heldout


@pytest.fixture(scope="module")
def tissue() -> SimpleNamespace:
    """Three cell types in stripes, two fields of view, Poisson counts; one cell is empty."""
    rng = np.random.default_rng(0)
    n_cells, n_genes = 450, 60
    coords = rng.random((n_cells, 2)) * 100
    kind = (coords[:, 0] // 34).astype(int)
    programs = rng.gamma(0.5, size=(3, n_genes)) + 0.02
    rates = programs[kind] / programs.sum(axis=1)[kind][:, None]
    counts = rng.poisson(rates * rng.gamma(5, 12, size=(n_cells, 1))).astype(np.float32)
    counts[3] = 0
    fovs = np.where(coords[:, 0] < 50, "left", "right")
    return SimpleNamespace(counts=sparse.csr_matrix(counts), coords=coords, fovs=fovs, rates=rates)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("method", "grid", "least"),
    [
        ("fov_gene_mean", [()], 0.15),
        ("spatial_knn_mean", [(20, "profiles"), (40, "counts")], 0.65),
        ("expression_knn", [(3, 30, "profiles"), (3, 100, "counts")], 0.9),
        ("truncated_svd", [("depth", 3), ("poisson", 3), ("poisson", 6)], 0.85),
        ("kl_nmf", [(3, 60), (6, 30)], 0.85),
    ],
)
def test_peers_recover_planted_structure(
    peers: ModuleType, tissue: SimpleNamespace, method: str, grid: list, least: float, own: bool
) -> None:
    split = metrics.thin(tissue.counts, random_state=0)
    before = split.train.copy()
    impute = peers.tuned(method, peers.FAMILIES[method][0], grid, own)
    prediction, scale = impute(split.train, tissue.coords, tissue.fovs, 0)
    assert (split.train != before).nnz == 0
    assert (scale, prediction.dtype, prediction.shape) == ("rate", np.float32, tissue.counts.shape)
    ceiling = metrics.poisson_gain(split.held, tissue.rates, split.train)
    gain = metrics.poisson_gain(split.held, prediction, split.train)
    assert least * ceiling < gain < ceiling
    again, _ = impute(split.train, tissue.coords, tissue.fovs, 0)
    np.testing.assert_array_equal(prediction, again)


def test_gene_mean_gains_nothing(peers: ModuleType, tissue: SimpleNamespace) -> None:
    split = metrics.thin(tissue.counts, random_state=0)
    prediction, _ = peers.METHODS["gene_mean"](split.train, tissue.coords, None, 0)
    assert metrics.poisson_gain(split.held, prediction, split.train) == pytest.approx(0, abs=1e-6)


def test_spatial_means_stay_within_a_field_of_view(peers: ModuleType) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(2, size=(30, 5)).astype(np.float32)
    coords, fovs = rng.random((30, 2)), np.repeat([0, 1, 2], [18, 11, 1])
    cells = peers.Cells(sparse.csr_matrix(counts), coords, fovs)
    for (k, what), got in peers._spatial_means(cells, [(4, "profiles"), (12, "counts")], np.arange(30), 0):
        source = counts if what == "counts" else counts / counts.sum(axis=1, keepdims=True)
        for i in range(30):
            same = np.flatnonzero(fovs == fovs[i])
            nearest = same[np.argsort(((coords[same] - coords[i]) ** 2).sum(axis=1))][:k]
            np.testing.assert_allclose(got[i], source[nearest].sum(axis=0), rtol=1e-5)


def test_expression_means_equal_brute_force(peers: ModuleType, tissue: SimpleNamespace) -> None:
    dense = tissue.counts.toarray().astype(float)
    shares = dense / np.maximum(dense.sum(axis=1, keepdims=True), 1)
    logged = np.log1p(shares * np.median(dense.sum(axis=1)))
    u, s, _ = np.linalg.svd(logged - logged.mean(axis=0), full_matrices=False)
    space = (u * s)[:, :4]
    distance = ((space[:, None] - space[None]) ** 2).sum(axis=2)
    cells = peers.Cells(tissue.counts, tissue.coords, np.zeros(450, int))
    rows = np.array([0, 17, 200])
    for (_, k, _), got in peers._expression_means(cells, [(4, 6, "profiles"), (4, 20, "profiles")], rows, 0):
        for row, i in enumerate(rows):
            np.testing.assert_allclose(got[row], shares[np.argsort(distance[i])[:k]].sum(axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scaling", ["depth", "poisson"])
def test_truncated_svd_of_full_rank_gives_back_the_counts(peers: ModuleType, scaling: str) -> None:
    rng = np.random.default_rng(0)
    low_rank = rng.integers(1, 4, size=(25, 3)) @ rng.integers(1, 4, size=(3, 12))
    cells = peers.Cells(sparse.csr_matrix(low_rank.astype(np.float32)), np.zeros((25, 2)), np.zeros(25, int))
    ((_, rates),) = peers._truncated_svds(cells, [(scaling, 3)], np.arange(25), 0)
    np.testing.assert_allclose(
        rates / rates.sum(axis=1, keepdims=True), low_rank / low_rank.sum(axis=1, keepdims=True), rtol=1e-4
    )


def test_kl_nmf_equals_sklearn(peers: ModuleType, tissue: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.decomposition import non_negative_factorization

    monkeypatch.setattr(peers, "_BLOCK_ROWS", 100)
    counts = tissue.counts[4:].astype(np.float64)
    rng = np.random.default_rng(0)
    w, h = rng.random((counts.shape[0], 4)), rng.random((4, counts.shape[1]))
    their_w, their_h, _ = non_negative_factorization(
        counts.toarray(), W=w.copy(), H=h.copy(), n_components=4, init="custom", solver="mu",
        beta_loss="kullback-leibler", max_iter=30, tol=0,
    )  # fmt: skip

    def divergence(w: np.ndarray, h: np.ndarray) -> float:
        x, mean = counts.toarray(), w @ h
        return float((x * np.log(np.maximum(x, 1) / mean) - x + mean).sum())

    start = divergence(w, h)
    peers.kl_nmf_updates(counts, w, h, 30)
    assert divergence(w, h) == pytest.approx(divergence(their_w, their_h), rel=1e-9)
    np.testing.assert_allclose(w @ h, their_w @ their_h, rtol=1e-6, atol=1e-9)
    assert divergence(w, h) < 0.5 * start


def test_best_weights_are_the_maximum(peers: ModuleType, tissue: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    mean = peers.gene_shares(tissue.counts)
    noisy = rng.dirichlet(np.full(60, 0.5), size=450) * 0.7 + tissue.rates * 0.3
    weights, score = peers.best_weights(tissue.counts, [noisy, mean])
    grid = np.linspace(0.001, 0.999, 999)
    x = tissue.counts.toarray() / tissue.counts.sum()
    scores = [(x * np.log(v * noisy + (1 - v) * mean)).sum() for v in grid]
    assert weights.sum() == pytest.approx(1)
    assert 0.01 < weights[0] < 0.99
    assert weights[0] == pytest.approx(grid[np.argmax(scores)], abs=0.01)
    assert score == pytest.approx(max(scores), abs=1e-5)


def test_heldout_names_every_method(peers: ModuleType, heldout: ModuleType) -> None:
    assert set(heldout.METHODS) == set(peers.METHODS)


def test_heldout_command(
    heldout: ModuleType, tissue: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    obs = pd.DataFrame({"fov": pd.Categorical(tissue.fovs)}, index=[f"c{i}" for i in range(450)])
    ad.AnnData(tissue.counts, obs=obs, obsm={"spatial": tissue.coords}).write_h5ad(tmp_path / "stripes.h5ad")
    out = tmp_path / "results.csv"
    command = ["--data", str(tmp_path / "stripes.h5ad"), "--library-key", "fov", "--out", str(out), "--threads", "1"]
    assert heldout.main([*command, "--methods", "gene_mean", "truncated_svd", "--seeds", "0"]) == 0
    with out.open(newline="") as file:
        first = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["n_fovs"]) for row in first] == [
        ("gene_mean", "0", "2"),
        ("truncated_svd", "0", "2"),
    ]
    assert first[0]["split"] == first[1]["split"]
    assert float(first[0]["gain"]) == pytest.approx(0, abs=1e-6)
    assert float(first[1]["gain"]) > 0.2
    assert float(first[1]["gene_pearson"]) > 0.2
    assert float(first[1]["peak_mib"]) > 20
    capfd.readouterr()

    assert heldout.main([*command, "--methods", "truncated_svd", "--seeds", "0", "1"]) == 0
    with out.open(newline="") as file:
        second = list(csv.DictReader(file))
    assert second[:2] == first
    assert len(second) == 3
    printed = capfd.readouterr()
    assert "seed 0 …" not in printed.err
    mean = np.mean([float(row["gain"]) for row in second[1:]])
    assert f"| truncated_svd | 2 | {mean:.4f} ± " in printed.out
    assert "gene_mean" not in printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "stripes.h5ad"]


def test_heldout_refuses_what_it_cannot_do(heldout: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "results.csv"
    with pytest.raises(SystemExit):
        heldout.main(["--data", str(tmp_path / "none.h5ad"), "--out", str(out)])
    assert "there is no file" in capsys.readouterr().err
    out.write_text("a,b\n1,2\n")
    (tmp_path / "x.h5ad").touch()
    with pytest.raises(SystemExit, match="not a results file"):
        heldout.main(["--data", str(tmp_path / "x.h5ad"), "--out", str(out)])
    row = dict.fromkeys(heldout.COLUMNS, "1")
    with pytest.raises(SystemExit, match="different splits"):
        heldout.markdown([row | {"split": "a"}, row | {"split": "b"}])


def test_lognorm_correlation_leaves_depth_out(tissue: SimpleNamespace) -> None:
    depth = np.random.default_rng(0).gamma(1, size=(450, 1)).astype(np.float32)
    rates = tissue.rates.astype(np.float32)
    constant = np.ones_like(rates)

    def median(prediction: np.ndarray) -> float:
        return float(np.nanmedian(metrics.gene_pearson_lognorm(tissue.counts, prediction)))

    score = median(rates)
    assert score > 0.3
    assert median(rates * depth) == pytest.approx(score, abs=1e-4)
    assert median(constant) == 0
