"""Plots: what they show, and that they leave the data alone."""

from __future__ import annotations

import numpy as np
import pytest

import spaformer_sc as sf
from tests.conftest import contents

pytestmark = pytest.mark.usefixtures("unseen")


@pytest.fixture(scope="module")
def result():
    tissue = sf.datasets.simulated_tissue(n_fovs=2, n_cells=200, n_genes=80)
    settings = {"n_networks": 2, "dim": 16, "n_heads": 4}
    sf.tl.impute(tissue, library_key="fov", max_epochs=3, progress=False, settings=settings)
    return tissue


def values(ax) -> np.ndarray:
    return np.asarray(ax.collections[0].get_array())


def test_observed_and_imputed_side_by_side(result) -> None:
    before = contents(result)
    axes = sf.pl.imputed(result, ["EPCAM", "VIM"])
    assert axes.shape == (2, 3)
    library = np.maximum(np.asarray(result.X.sum(axis=1)).ravel(), 1)
    target_sum = result.uns["spaformer"]["params"]["target_sum"]
    for row, gene in zip(axes, ("EPCAM", "VIM")):
        column = result.var_names.get_loc(gene)
        observed = np.log1p(result.X[:, column].toarray().ravel() / library * target_sum)
        np.testing.assert_allclose(np.sort(values(row[0])), np.sort(observed), rtol=1e-5)
        np.testing.assert_allclose(np.sort(values(row[1])), np.sort(result.layers["spaformer"][:, column]), rtol=1e-6)
        assert gene in row[0].get_title()
        assert result.var["spaformer_reliability"].iloc[column] in row[1].get_title()
    assert contents(result) == before


def test_uncertainty_is_that_of_the_posterior(result) -> None:
    (row,) = sf.pl.imputed(result, "EPCAM")
    shown = np.sort(values(row[2]))
    draws = np.log1p(sf.tl.sample(result, "EPCAM", 400)[:, :, 0])
    empty = np.isnan(draws[0])
    assert np.isnan(shown).sum() == empty.sum()
    drawn = np.sort(draws[:, ~empty].std(axis=0))
    assert np.corrcoef(shown[: len(drawn)], drawn)[0, 1] > 0.95
    assert np.median(shown[: len(drawn)] / drawn) == pytest.approx(1, abs=0.3)
    given = result.copy()
    given.layers["spaformer_sd"] = np.full(result.shape, 0.5, np.float32)
    assert (values(sf.pl.imputed(given, "EPCAM")[0, 2]) == 0.5).all()
    given.uns["spaformer"]["posterior"] = None
    del given.layers["spaformer_sd"]
    assert sf.pl.imputed(given, "EPCAM").shape == (1, 2)


def test_changed_counts_are_not_drawn(result) -> None:
    changed = result.copy()
    changed.X = changed.X * 2
    with pytest.raises(ValueError, match="no longer holds the counts"):
        sf.pl.imputed(changed, "EPCAM")


def test_calibration_shows_each_stratum(result) -> None:
    ax = sf.pl.calibration(result)
    posterior = result.uns["spaformer"]["posterior"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["all", *posterior["strata"]]
    for line, covered in zip(ax.get_lines()[2:], posterior["strata"].values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), 100 * (np.array(covered) - posterior["levels"]), atol=1e-9)
    few = result.copy()
    few.uns["spaformer"]["posterior"]["n_scored"] = 0
    with pytest.raises(ValueError, match="too few transcripts"):
        sf.pl.calibration(few)
    few.uns["spaformer"]["posterior"] = None
    with pytest.raises(ValueError, match="Gaussian decoder"):
        sf.pl.calibration(few)


def test_a_single_field_of_view(result) -> None:
    name = result.obs["fov"].iloc[0]
    axes = sf.pl.imputed(result, "EPCAM", fov=name)
    assert len(values(axes[0, 0])) == (result.obs["fov"] == name).sum()
    with pytest.raises(KeyError, match="none of the fields of view"):
        sf.pl.imputed(result, "EPCAM", fov="nowhere")


def test_a_gene_that_was_not_imputed(result) -> None:
    some = result.copy()
    some.uns["spaformer"]["params"]["genes"] = ["VIM"]
    sf.pl.imputed(some, "VIM")
    with pytest.raises(ValueError, match="EPCAM were not imputed"):
        sf.pl.imputed(some, ["VIM", "EPCAM"])


def test_reliability_shows_every_gene_once(result) -> None:
    ax = sf.pl.reliability(result)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    counts = result.var["spaformer_reliability"].value_counts()
    assert sorted(labels) == sorted(f"{name}: {n} genes" for name, n in counts.items())


def test_history_has_a_line_for_each_network(result) -> None:
    ax = sf.pl.history(result)
    assert [text.get_text().split(":")[0] for text in ax.get_legend().get_texts()] == ["1", "2"]
    steps = np.asarray(result.uns["spaformer"]["history"]["step"])
    network = np.asarray(result.uns["spaformer"]["history"]["network"])
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), steps[network == 0])


@pytest.mark.parametrize("plot", ["reliability", "history"])
def test_without_a_result(plot: str) -> None:
    tissue = sf.datasets.simulated_tissue(n_fovs=1, n_cells=30, n_genes=12)
    with pytest.raises(KeyError, match=r"run `sf\.tl\.impute` first"):
        getattr(sf.pl, plot)(tissue)
