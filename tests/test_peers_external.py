"""ALRA, MAGIC, scVI, resolVI and the masked perceptrons, on counts with planted structure and against brute force."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats

from spaformer_sc import metrics

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of this distribution")

TARGET_SUM = 250.0


def needs(package: str) -> pytest.MarkDecorator:
    """Skip a test where a package of the extra `benchmark` is absent; looked up, not imported."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that imports a module of the package `peers`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda module: importlib.import_module(f"peers.{module}")


@pytest.fixture(scope="module")
def tissue() -> SimpleNamespace:
    """Three cell types in stripes, two fields of view, Poisson counts; one cell is empty."""
    rng = np.random.default_rng(11)
    n_cells, n_genes = 360, 60
    coords = rng.random((n_cells, 2)) * 100
    kind = (coords[:, 0] // 34).astype(int)
    programs = rng.gamma(0.5, size=(3, n_genes)) + 0.02
    rates = (programs / programs.sum(axis=1, keepdims=True))[kind]
    counts = rng.poisson(rates * rng.gamma(5, 16, size=(n_cells, 1))).astype(np.float32)
    counts[3] = 0
    fovs = np.where(coords[:, 1] < 50, "a", "b")
    return SimpleNamespace(counts=sparse.csr_matrix(counts), coords=coords, fovs=fovs, rates=rates)


def as_input(tissue: SimpleNamespace, protocol: str) -> tuple[ad.AnnData, Any]:
    """Make the input of a method, and the split that it comes from."""
    if protocol == "thinning":
        parts = metrics.thin(tissue.counts, random_state=0)
    elif protocol == "entries":
        parts = metrics.hide_entries(tissue.counts, random_state=0)
    else:
        parts = metrics.hide_blocks(tissue.counts, tissue.fovs, random_state=0)
    adata = ad.AnnData(
        parts.train.copy(),
        obs=pd.DataFrame({"fov": pd.Categorical(tissue.fovs)}, index=[f"c{i}" for i in range(len(tissue.fovs))]),
        obsm={"spatial": tissue.coords},
    )
    if protocol != "thinning":
        adata.layers["missing"] = parts.hidden if protocol == "entries" else parts.layer()
    adata.uns["task"] = {
        "protocol": protocol,
        "output": "rate" if protocol == "thinning" else "lognorm",
        "target_sum": TARGET_SUM,
        "random_state": 0,
        "scratch": None,
    }
    return adata, parts


def share_of_truth(tissue: SimpleNamespace, parts: Any, rates: np.ndarray) -> float:
    """Gain in likelihood of held counts over gene means, as a share of what the true rates gain."""
    return metrics.poisson_gain(parts.held, rates, parts.train) / metrics.poisson_gain(
        parts.held, tissue.rates, parts.train
    )


def truth_and_mean(tissue: SimpleNamespace, adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Log-normalised values of all entries, and the visible mean of the gene."""
    counts = tissue.counts.toarray()
    truth = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * TARGET_SUM)
    shown = ~adata.layers["missing"]
    return truth, np.broadcast_to((truth * shown).sum(axis=0) / np.maximum(shown.sum(axis=0), 1), truth.shape)


# -------------------------------------------------------------------------------------------------------------- ALRA


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_alra_rank_is_where_the_last_large_spacing_is(peers: Callable[[str], Any], rank: int) -> None:
    spacings = 1 + 0.1 * np.random.default_rng(rank).random(99)
    spacings[: rank - 1] += 0.05
    spacings[rank - 1] = 3
    assert peers("alra").chosen_rank(np.append(spacings[::-1].cumsum()[::-1], 0) + 5) == rank


def test_alra_rank_is_one_where_nothing_stands_out(peers: Callable[[str], Any]) -> None:
    assert peers("alra").chosen_rank(np.linspace(10, 1, 60)) == 1
    assert peers("alra").chosen_rank(np.array([3.0])) == 1


def test_alra_threshold_is_the_size_of_the_lowest_value_of_the_gene(
    peers: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alra = peers("alra")
    monkeypatch.setattr(alra, "_QUANTILE", 0.0)
    low_rank = np.array([[-1.0, 0.2], [0.9, -0.1], [1.0, 0.05], [1.1, 3.0]], np.float32)
    np.testing.assert_array_equal(
        alra.thresholded(low_rank), np.array([[0, 0.2], [0, 0], [0, 0], [1.1, 3.0]], np.float32)
    )


def test_alra_rescales_to_the_moments_of_observed_values_and_keeps_observations(peers: Callable[[str], Any]) -> None:
    rng = np.random.default_rng(0)
    values = rng.gamma(9, 1.0, (200, 3)) * (rng.random((200, 3)) < 0.6)
    kept = rng.gamma(9, 0.1, (200, 3)) * (rng.random((200, 3)) < 0.9)
    kept[:, 2] = 0.5
    result = peers("alra").rescaled(values.astype(np.float32), kept.astype(np.float32))
    for gene in (0, 1):
        observed, positive = values[values[:, gene] > 0, gene], kept[:, gene] > 0
        # The moments hold where no rescaled value has become negative, which these gammas keep rare.
        imputed = result[positive & (result[:, gene] > 0), gene]
        assert imputed.mean() == pytest.approx(observed.mean(), rel=0.05)
        assert imputed.std() == pytest.approx(observed.std(), rel=0.05)
    np.testing.assert_array_equal(result[:, 2], np.float32(0.5))
    back = (kept == 0) & (values > 0)
    assert back.any()
    np.testing.assert_allclose(result[back], values[back], rtol=1e-6)
    assert (result[(kept == 0) & (values == 0)] == 0).all()


@pytest.mark.parametrize("stage", ["rescaled", "thresholded"])
def test_alra_says_the_same_in_both_outputs(peers: Callable[[str], Any], tissue: SimpleNamespace, stage: str) -> None:
    cells = peers("_cells").Cells.of(as_input(tissue, "thinning")[0])
    rows = np.arange(len(cells.fovs))
    found = {}
    for output in ("rate", "lognorm"):
        ((_, found[output]),) = peers("alra")._approximations(
            replace(cells, output=output, target_sum=TARGET_SUM), [(stage, "log")], rows, 0
        )
    np.testing.assert_allclose(found["lognorm"], np.log1p(found["rate"] / 10_000 * TARGET_SUM), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------- planted structure


def quick(peers: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, method: str) -> Callable[..., Any]:
    """Return a method with few settings and epochs."""
    if method == "magic":
        module = peers("magic")
        monkeypatch.setattr(
            module,
            "magic",
            replace(module.magic, rate=[(15, 20, "profile", 3)], lognorm=[(15, 20, "lognorm", 3)]),
        )
        return module.magic
    if method.startswith("masked_mlp"):
        module = peers("mlp")
        for name, value in {
            "_SETTINGS": ((32, 0.0),),
            "_MOST_EPOCHS": 60,
            "_BATCH": 32,
            "_LEARNING_RATE": 3e-3,
        }.items():
            monkeypatch.setattr(module, name, value)
        return getattr(module, method)
    if method in ("scvi", "resolvi"):
        module = peers("scvi")
        monkeypatch.setattr(module, "_MOST_EPOCHS", 60)
        monkeypatch.setattr(module, "_MOST_RESOLVI_EPOCHS", 10)
        return getattr(module, method)
    return getattr(peers(method), method)


@pytest.mark.parametrize(
    ("method", "least"),
    [
        ("alra", 0.6),
        pytest.param("magic", 0.9, marks=needs("magic")),
        ("masked_mlp", 0.9),
        ("masked_mlp_neighbours", 0.9),
        pytest.param("scvi", 0.4, marks=needs("scvi")),
        pytest.param("resolvi", 0.05, marks=needs("scvi")),
    ],
)
def test_finds_planted_rates(
    peers: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tissue: SimpleNamespace, method: str, least: float
) -> None:
    adata, parts = as_input(tissue, "thinning")
    rates, scale = quick(peers, monkeypatch, method)(adata)
    assert (scale, rates.dtype, rates.shape) == ("rate", np.float32, adata.shape)
    assert (rates >= 0).all()
    assert least < share_of_truth(tissue, parts, rates) < 1


@pytest.mark.parametrize(
    ("method", "protocol", "most"),
    [
        ("alra", "entries", 0.9),
        pytest.param("magic", "entries", 0.8, marks=needs("magic")),
        pytest.param("magic", "blocks", 0.9, marks=needs("magic")),
        ("masked_mlp", "entries", 0.8),
        ("masked_mlp", "blocks", 0.85),
        ("masked_mlp_neighbours", "entries", 0.8),
        ("masked_mlp_neighbours", "blocks", 0.85),
        pytest.param("scvi", "blocks", 1.0, marks=needs("scvi")),
    ],
)
def test_hidden_values_are_found(
    peers: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tissue: SimpleNamespace,
    method: str,
    protocol: str,
    most: float,
) -> None:
    adata, _ = as_input(tissue, protocol)
    missing = adata.layers["missing"]
    values, scale = quick(peers, monkeypatch, method)(adata)
    assert (scale, values.dtype, values.shape) == ("lognorm", np.float32, adata.shape)
    truth, mean = truth_and_mean(tissue, adata)
    ratio = metrics.rmse(truth, values, mask=missing) / metrics.rmse(truth, mean, mask=missing)
    assert ratio < most


# --------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("near", [False, True])
def test_perceptron_sees_hidden_entries_as_the_mean(
    peers: Callable[[str], Any], tissue: SimpleNamespace, near: bool
) -> None:
    mlp = peers("mlp")
    cells = peers("_cells").Cells.of(as_input(tissue, "entries")[0])
    source = mlp._Source(cells, near)
    rows = np.array([7])
    counts, shown = cells.counts[rows].toarray(), ~cells.missing[rows]
    inputs = source.inputs(rows, counts, shown)
    n_genes = counts.shape[1]
    assert inputs.shape == (1, n_genes * (1 + near))
    assert (inputs[0, :n_genes].numpy()[~shown[0]] == 0).all()

    gene = np.flatnonzero(shown[0])[0]
    fewer = shown.copy()
    fewer[0, gene] = False
    after = source.inputs(rows, counts * fewer, fewer)
    assert after[0, gene] == 0
    torch.testing.assert_close(after[0, n_genes:], inputs[0, n_genes:])


@pytest.mark.parametrize("method", ["masked_mlp", "alra"])
def test_seed_decides_and_global_generators_stay(
    peers: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tissue: SimpleNamespace, method: str
) -> None:
    adata, _ = as_input(tissue, "entries")
    impute = quick(peers, monkeypatch, method)
    if method == "masked_mlp":
        monkeypatch.setattr(peers("mlp"), "_MOST_EPOCHS", 2)
    torch.manual_seed(5)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again = impute(adata)[0], impute(adata)[0]
    np.testing.assert_array_equal(first, again)
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_expected_lognorm_is_the_mean_over_the_negative_binomial(peers: Callable[[str], Any]) -> None:
    means = np.array([[0.01, 3.0, 40.0], [2.0, 0.0, 150.0]], np.float32)
    dispersion, depth = np.array([0.3, 2.0, 5.0]), np.array([100.0, 400.0])
    found = peers("scvi").expected_lognorm(means, dispersion, depth, TARGET_SUM)
    x = np.arange(5000)
    for cell, gene in np.ndindex(means.shape):
        theta, mean = dispersion[gene], float(means[cell, gene])
        expected = stats.nbinom.pmf(x, theta, theta / (theta + mean)) @ np.log1p(x * TARGET_SUM / depth[cell])
        assert found[cell, gene] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "package"), [("magic", "magic-impute"), ("scvi", "scvi-tools"), ("resolvi", "scvi-tools")]
)
def test_without_the_package_the_error_names_the_extra(
    peers: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tissue: SimpleNamespace, method: str, package: str
) -> None:
    impute = quick(peers, monkeypatch, method)
    monkeypatch.setitem(sys.modules, "magic", None)
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(ImportError, match=rf"{package}.*spaformer_sc\[benchmark\]"):
        impute(as_input(tissue, "thinning")[0])
