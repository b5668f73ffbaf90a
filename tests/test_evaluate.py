"""Scores of a prediction on counts of the user's own."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

import spaformer_sc as sf
from spaformer_sc import metrics
from tests.conftest import contents


@pytest.fixture(scope="module")
def halves():
    """A tissue imputed from half of its counts."""
    tissue = sf.datasets.simulated_tissue(n_fovs=2, n_cells=200, n_genes=60)
    split = metrics.thin(tissue.X, 0.5, random_state=0)
    tissue.X, tissue.layers["held"] = split.train, split.held
    sf.tl.impute(tissue, library_key="fov", quality="fast", max_epochs=20, progress=False)
    tissue.layers["truth"] = tissue.layers["true_rate"] * 1000
    tissue.layers["mean"] = np.tile(split.train.toarray().mean(axis=0), (tissue.n_obs, 1))
    return tissue


def test_a_result_is_scored_where_it_belongs(halves) -> None:
    tissue = halves.copy()
    before = contents(tissue)
    assert sf.tl.evaluate(tissue, "held") is None
    after = contents(tissue)
    name = "spaformer_evaluated"
    wanted = {f"var/{name}_{score}" for score in sf.tl._evaluate.EVALUATED}
    wanted |= {f"obs/{name}_{score}" for score in sf.tl._evaluate.EVALUATED_OF_CELLS} | {f"uns/{name}"}
    assert after.keys() - before.keys() == wanted
    assert {place: after[place] for place in before} == before
    held, train = tissue.layers["held"], tissue.X
    rates = np.expm1(tissue.layers["spaformer"])
    gain = tissue.uns[name]["scores"]["gain"]
    assert gain == pytest.approx(metrics.poisson_gain(held, rates, train), abs=0.03)
    np.testing.assert_array_equal(tissue.var[f"{name}_held_out"], np.asarray(held.sum(axis=0)).ravel())
    assert gain > 0.1
    sf.tl.evaluate(tissue, "held")


def test_the_truth_beats_the_mean(halves) -> None:
    tissue = halves.copy()
    for layer in ("truth", "mean"):
        sf.tl.evaluate(tissue, "held", prediction=layer, scale="rate")
    truth, mean = (tissue.uns[f"{layer}_evaluated"]["scores"] for layer in ("truth", "mean"))
    assert truth["gain"] > tissue.uns["spaformer"]["scores"]["gain"] > 0
    assert mean["gain"] == pytest.approx(0, abs=1e-3)
    assert truth["better_than_baseline"]
    assert not mean["better_than_baseline"]
    reliable = [(tissue.var[f"{layer}_evaluated_reliability"] == "reliable").sum() for layer in ("truth", "mean")]
    assert reliable[0] > 5 > reliable[1]
    assert "truth_evaluated_gain" not in tissue.obs
    sf.tl.evaluate(tissue, "held", prediction="truth", scale="rate", use_rep="X_spaformer", key_added="other")
    assert tissue.obs["other_gain"].notna().all()


def test_scales_are_told_apart(halves) -> None:
    tissue = halves.copy()
    tissue.layers["logged"] = np.log1p(tissue.layers["truth"]).astype(np.float32)
    sf.tl.evaluate(tissue, "held", prediction="logged", scale="lognorm")
    sf.tl.evaluate(tissue, "held", prediction="truth", scale="rate")
    gains = [tissue.uns[f"{layer}_evaluated"]["scores"]["gain"] for layer in ("logged", "truth")]
    assert gains[0] == pytest.approx(gains[1], rel=1e-3)


def test_entries_that_were_not_measured_are_not_scored(halves) -> None:
    tissue = halves.copy()
    tissue.layers["hidden"] = np.random.default_rng(0).random(tissue.shape) < 0.3
    tissue.layers["wrong"] = np.where(tissue.layers["hidden"], 1e4, tissue.layers["truth"])
    for layer in ("truth", "wrong"):
        sf.tl.evaluate(tissue, "held", prediction=layer, scale="rate", missing="hidden")
    gains = [tissue.uns[f"{layer}_evaluated"]["scores"]["gain"] for layer in ("truth", "wrong")]
    assert gains[0] == pytest.approx(gains[1])


def test_a_second_evaluation_leaves_nothing_of_the_first(halves) -> None:
    tissue = halves.copy()
    sf.tl.evaluate(tissue, "held", prediction="truth", scale="rate", use_rep="X_spaformer", key_added="mine")
    assert "mine_gain" in tissue.obs
    sf.tl.evaluate(tissue, "held", prediction="mean", scale="rate", key_added="mine")
    assert "mine_gain" not in tissue.obs
    with pytest.raises(ValueError, match="would overwrite"):
        sf.tl.impute(tissue, library_key="fov", key_added="mine", progress=False)


def test_fractions_and_sparse_layers(halves) -> None:
    tissue = halves.copy()
    tissue.layers["held"] = tissue.layers["held"].copy()
    tissue.layers["held"].data[::3] *= 0.9
    tissue.layers["sparse"] = sparse.csr_matrix(tissue.X.toarray() + tissue.layers["true_rate"])
    sf.tl.evaluate(tissue, "held", prediction="sparse", scale="counts")
    assert np.isfinite(tissue.uns["sparse_evaluated"]["scores"]["gain"])


def test_genes_with_nan_are_left_out(halves) -> None:
    tissue = halves.copy()
    tissue.layers["truth"][:, 3] = np.nan
    sf.tl.evaluate(tissue, "held", prediction="truth", scale="rate")
    assert np.isnan(tissue.var["truth_evaluated_pearson"].iloc[3])
    assert tissue.var["truth_evaluated_held_out"].iloc[3] == 0
    assert tissue.var["truth_evaluated_pearson"].drop(tissue.var_names[3]).notna().sum() > 40


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"held_out": "nothing"}, KeyError, "`held_out='nothing'` is not in"),
        ({"prediction": "truth"}, ValueError, "pass `scale=`"),
        ({"prediction": "truth", "scale": "log"}, ValueError, "`scale='log'` is not allowed"),
        ({"prediction": "nothing", "scale": "rate"}, KeyError, "`prediction='nothing'` is not in"),
        ({"use_rep": "X_pca"}, KeyError, "`use_rep='X_pca'`"),
        ({"key_added": "spaformer"}, ValueError, "would overwrite"),
        ({"scale": "rate"}, ValueError, "`scale='rate'`: it is known"),
        ({"layer": "held"}, ValueError, "`layer='held'`: it is known"),
        ({"random_state": -1}, ValueError, "`random_state=-1`"),
    ],
)
def test_bad_input_changes_nothing(halves, arguments, error, match) -> None:
    tissue = halves.copy()
    before = contents(tissue)
    with pytest.raises(error, match=match):
        sf.tl.evaluate(tissue, **{"held_out": "held"} | arguments)
    assert contents(tissue) == before
