"""Attribution and reach: against finite differences of `impute`, against captum, and where the answer is known."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from scipy.sparse.csgraph import dijkstra
from scipy.spatial.distance import cdist

import spaformer_sc as sf
from spaformer_sc.data._graph import spatial_graph
from spaformer_sc.interpret._gradients import baseline_counts, tokens_of
from spaformer_sc.training.sequences import sequences
from tests.conftest import contents

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def model(settings=None, **arguments):
    """A small model that is fitted in two epochs; attention, which starts at zero, then does a little."""
    small = {"dim": 32, "n_heads": 4, "n_layers": 1, **(settings or {})}
    quick = {"library_key": "fov", "quality": "fast", "max_epochs": 2, "progress": False}
    return sf.SpaFormer(**{**quick, "settings": small, **arguments})


def one_image(tissue):
    """The tissue without a column of FOVs, so that it can be cut into tiles."""
    return AnnData(tissue.X, obs=tissue.obs[[]], var=tissue.var, obsm={"spatial": tissue.obsm["spatial"]})


def log_rates(fitted_model, adata):
    """What `impute` says before the counts of cells alike come in, as a log (cells × genes)."""
    networks = copy.copy(fitted_model)
    networks._concentration = math.inf
    return np.log(networks.impute(adata, output="rate", target_sum=1.0))


def at_baseline(adata, share):
    """Counts in which every cell has its own total and the same shares."""
    return np.asarray(adata.X.sum(1)) * share


def with_counts(adata, counts):
    return AnnData(counts.astype(np.float32), obs=adata.obs, var=adata.var, obsm={"spatial": adata.obsm["spatial"]})


@pytest.fixture(scope="module")
def trained(shared_tissue):
    """A model trained for longer, with sharper decisions than `fitted`; not to be changed."""
    return model(max_epochs=60).fit(shared_tissue)


# --- completeness and brute force -------------------------------------------------------------------------------------


CHOICES = {
    "performer": {},
    "exact": {"encoder": "exact"},
    "mlp": {"encoder": "mlp"},
    "two networks": {"settings": {"n_networks": 2}},
    "tiles": {"library_key": None, "tile_size": 50},
    "no posterior": {"settings": {"posterior": False}},
    "gat": {"encoder": "gat"},
    "nb by FOV": {"decoder": "nb", "settings": {"dispersion": "gene_fov"}},
    "zinb": {"decoder": "zinb"},
    "variational": {"variational": True},
    "positions": {"positional": ["laplacian", "signnet"]},
    "conditional": {"positional": "conditional"},
    "given graph": {"connectivity_key": "graph"},
}


@pytest.mark.parametrize("arguments", CHOICES.values(), ids=CHOICES)
def test_contributions_lead_from_the_baseline_to_the_imputed_value(tissue, arguments):
    together = spatial_graph(tissue.obsm["spatial"], method="delaunay")
    fov = tissue.obs["fov"].cat.codes.to_numpy()
    tissue.obsp["graph"] = together.multiply(fov[:, None] == fov[None, :]).tocsr()
    tissue = tissue if arguments.get("library_key", "fov") else one_image(tissue)
    fitted = model(**arguments, max_epochs=15).fit(tissue)
    cells = [0, 119]
    gene = tissue.var_names.get_loc("VIM")
    observed = log_rates(fitted, tissue)[cells, gene]
    # Graph networks have kinks (ReLU, leaky ReLU), at which the quadrature converges slowly.
    conditional = arguments.get("positional") == "conditional"
    kinks = conditional or arguments.get("encoder") == "gat"
    found = sf.tl.attribution(tissue, fitted, "VIM", cells, n_steps=40 if kinks else 12)
    for a, cell, value in zip(found, cells, observed, strict=True):
        assert (a.cell, a.gene, a.scale) == (tissue.obs_names[cell], "VIM", "log rate")
        assert a.value == pytest.approx(value, abs=1e-5)
        assert a.error < (1e-3 if conditional else 1e-4)
        assert a.own.abs().sum() > 0.01
        assert a.total == pytest.approx(a.own.sum() + a.neighbours["contribution"].sum(), abs=1e-9)
        assert a.genes["neighbours"].sum() == pytest.approx(a.neighbours["contribution"].sum(), abs=1e-9)


@pytest.mark.parametrize("tiles", [{}, {"library_key": None, "tile_size": 50}])
def test_baseline_is_what_is_imputed_from_mean_expression_at_each_cells_depth(shared_tissue, monkeypatch, tiles):
    tissue = one_image(shared_tissue) if tiles else shared_tissue
    fitted = model(**tiles).fit(tissue)
    monkeypatch.setattr(fitted, "fractional", True)
    expected = log_rates(fitted, with_counts(tissue, at_baseline(tissue, fitted._gene_share)))
    for cell in (3, 100):
        found = sf.tl.attribution(tissue, fitted, "CD68", cell, n_steps=1)
        assert found.baseline == pytest.approx(expected[cell, tissue.var_names.get_loc("CD68")], abs=1e-5)


@pytest.mark.parametrize("encoder", ["performer", "mlp"])
def test_one_step_is_the_slope_of_impute_half_way(shared_tissue, monkeypatch, encoder):
    """With one point of the path, a contribution is a directional derivative, which finite differences give too."""
    fitted = model(encoder=encoder, max_epochs=40).fit(shared_tissue)
    monkeypatch.setattr(fitted, "fractional", True)
    cell, gene = 20, shared_tissue.var_names.get_loc("EPCAM")
    start = at_baseline(shared_tissue, fitted._gene_share)
    change = shared_tissue.X.toarray() - start

    def slope(direction):
        """Central difference of fourth order, with steps of a tenth of the path."""
        values = [
            log_rates(fitted, with_counts(shared_tissue, start + 0.5 * change + h * direction))[cell, gene]
            for h in (-0.2, -0.1, 0.1, 0.2)
        ]
        return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / 1.2

    found = sf.tl.attribution(shared_tissue, fitted, "EPCAM", cell, n_steps=1)
    strongest = found.neighbours["contribution"].abs().sort_values(ascending=False).index
    for name in strongest[:3]:
        only = np.zeros_like(change)
        row = shared_tissue.obs_names.get_loc(name)
        only[row] = change[row]
        assert found.neighbours.loc[name, "contribution"] == pytest.approx(slope(only), rel=0.02, abs=2e-5)
    for name in found.own.abs().sort_values(ascending=False).index[:2]:
        column = shared_tissue.var_names.get_loc(name)
        only = np.zeros_like(change)
        only[cell, column] = change[cell, column]
        assert found.own[name] == pytest.approx(slope(only), rel=0.02, abs=2e-5)
        others = np.zeros_like(change)
        others[:, column] = change[:, column]
        others[cell] = 0
        assert found.genes.loc[name, "neighbours"] == pytest.approx(slope(others), rel=0.02, abs=2e-5)


def test_the_same_as_captum(shared_tissue, trained):
    from captum.attr import IntegratedGradients

    cell, column = 65, shared_tissue.var_names.get_loc("COL1A1")
    loaded, _ = trained._read(shared_tissue, trained.keys)
    sampler = trained._sampler(torch.device("cpu"))
    (sequence,) = (s for s in sequences(loaded.fields, loaded.counts, None) if cell in s.fov.cells)
    row = int(np.flatnonzero(sequence.fov.cells == cell)[0])
    template = sampler.whole(sequence)
    rings = [torch.from_numpy(ring.toarray()) for ring in sequence.fov.rings]
    (network,) = trained._networks

    def answer(counts):
        tokens = tokens_of(counts[0], template, rings, sampler.gene_share, sampler.target_sum)
        return network.decoder.share(network(tokens).decoded)[row, column].log()[None]

    start = baseline_counts(template.counts, None, sampler.gene_share)
    with torch.enable_grad():
        expected = IntegratedGradients(answer).attribute(
            template.counts[None], start[None], n_steps=24, method="gausslegendre", internal_batch_size=1
        )[0]
    found = sf.tl.attribution(shared_tissue, trained, "COL1A1", cell, n_steps=24)
    np.testing.assert_allclose(found.own, expected[row], **CLOSE)
    np.testing.assert_allclose(found.genes["neighbours"], expected.sum(0) - expected[row], **CLOSE)
    by_cell = pd.Series(expected.sum(1).numpy(), index=shared_tissue.obs_names[sequence.fov.cells])
    np.testing.assert_allclose(found.neighbours["contribution"], by_cell[found.neighbours.index], **CLOSE)


def test_tokens_are_those_of_prediction(shared_tissue, trained):
    """The differentiable way from counts to inputs is the ordinary one, also where entries were not measured."""
    missing = np.random.default_rng(0).random(shared_tissue.shape) < 0.3
    loaded, _ = trained._read(shared_tissue, trained.keys)
    sampler = trained._sampler(torch.device("cpu"))
    for hidden in (None, missing):
        counts = loaded.counts if hidden is None else loaded.counts.multiply(~hidden).tocsr()
        sequence = sequences(loaded.fields, counts, hidden)[1]
        expected = sampler.whole(sequence)
        rings = [torch.from_numpy(ring.toarray()) for ring in sequence.fov.rings]
        found = tokens_of(expected.counts, expected, rings, sampler.gene_share, sampler.target_sum, sampler.typical)
        torch.testing.assert_close(found.depth, expected.depth)
        assert len(found.values) == 3
        for ours, theirs in zip(found.values, expected.values, strict=True):
            torch.testing.assert_close(ours, theirs)


# --- where the answer is known ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hops", [0, 1, 2])
def test_without_attention_nothing_comes_from_beyond_the_rings(shared_tissue, hops):
    fitted = model({"hops": hops}, encoder="mlp").fit(shared_tissue)
    found = sf.tl.attribution(shared_tissue, fitted, "EPCAM", 30)
    contribution, steps = found.neighbours["contribution"], found.neighbours["hops"]
    assert (contribution[steps > hops] == 0).all()
    assert (contribution[steps <= hops] != 0).all()
    assert (found.genes["neighbours"] != 0).any() == (hops > 0)
    assert found.own.abs().sum() > 0
    reach = sf.tl.reach(shared_tissue, fitted, n_cells=5)
    if hops == 0:
        assert reach.own_share == 1
        assert np.isnan([reach.distance_50, reach.distance_90]).all()
        assert reach.curve.empty
    else:
        assert 0 < reach.own_share < 1
        assert reach.distance_50 <= reach.distance_90 < reach.curve["distance"].max()


def test_with_attention_every_cell_of_the_fov_can_contribute_and_no_other(shared_tissue, trained):
    found = sf.tl.attribution(shared_tissue, trained, "EPCAM", 30)
    fov = shared_tissue.obs["fov"]
    others = shared_tissue.obs_names[(fov == fov.iloc[30]).to_numpy()].drop(found.cell)
    assert set(found.neighbours.index) == set(others)
    filled = np.asarray(shared_tissue[others].X.sum(1)).ravel() > 0
    assert (found.neighbours.loc[others[filled], "contribution"] != 0).all()


def test_distances_and_hops(shared_tissue, trained):
    cell = 61
    fov = (shared_tissue.obs["fov"] == shared_tissue.obs["fov"].iloc[cell]).to_numpy()
    here, names = shared_tissue.obsm["spatial"][fov], shared_tissue.obs_names[fov]
    row = names.get_loc(shared_tissue.obs_names[cell])
    expected = pd.DataFrame({
        "distance": cdist(here[[row]], here)[0],
        "hops": dijkstra(spatial_graph(here), unweighted=True)[row],
    }, index=names)  # fmt: skip
    found = sf.tl.attribution(shared_tissue, trained, "EPCAM", cell).neighbours
    np.testing.assert_allclose(found[["distance", "hops"]], expected.loc[found.index], rtol=1e-5)
    assert found["distance"].is_monotonic_increasing


def test_genes_of_one_module_move_each_other():
    """Genes 0-5 are high in every other cell, 6-11 in the others, 12-23 are noise: these should move gene 0 least."""
    rng = np.random.default_rng(0)
    kind = np.arange(240) % 2
    rate = np.ones((240, 24))
    rate[kind == 0, :6] = rate[kind == 1, 6:12] = 8
    names = [f"g{i}" for i in range(24)]
    adata = AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), var=pd.DataFrame(index=names))
    adata.obsm["spatial"] = rng.random((240, 2)) * 200
    fitted = model({"tokens_per_step": 60, "learning_rate": 5e-3}, library_key=None, max_epochs=60).fit(adata)
    found = sf.tl.attribution(adata, fitted, "g0", range(6))
    own = np.mean([a.own.abs() for a in found], axis=0)
    assert own[:12].mean() > 3 * own[12:].mean()
    for cell, a in enumerate(found):
        assert np.sign(a.own[:6].sum()) == (1 if kind[cell] == 0 else -1)
        assert np.sign(a.value - a.baseline) == (1 if kind[cell] == 0 else -1)


def test_an_empty_cell_owes_all_to_its_neighbours(tissue):
    tissue.X = sp.diags((np.arange(180) != 5).astype(np.float32)) @ tissue.X
    fitted = model(max_epochs=10).fit(tissue)
    found = sf.tl.attribution(tissue, fitted, "EPCAM", 5)
    assert (found.own == 0).all()
    assert found.neighbours["contribution"].abs().sum() > 0
    assert found.error < 1e-4


def test_entries_not_measured_contribute_nothing(tissue):
    hidden = np.zeros(tissue.shape, dtype=bool)
    hidden[:60, 3:8] = True
    tissue.layers["missing"] = hidden
    fitted = model(missing="missing").fit(tissue)
    found = sf.tl.attribution(tissue, fitted, tissue.var_names[4], 10)
    assert (found.genes.iloc[3:8] == 0).all(axis=None)
    assert (found.genes.drop(index=tissue.var_names[3:8]) != 0).all(axis=None)
    assert found.error < 1e-4
    assert found.value == pytest.approx(log_rates(fitted, tissue)[10, 4], abs=1e-5)


def test_the_gaussian_decoder_is_explained_on_its_own_scale(shared_tissue):
    fitted = model(preset="paper", max_epochs=10).fit(shared_tissue)
    imputed = fitted.impute(shared_tissue, target_sum=fitted._model_sum)
    cell, column = np.argwhere(imputed > 0.2)[0]
    found = sf.tl.attribution(shared_tissue, fitted, shared_tissue.var_names[column], int(cell))
    assert found.scale == "lognorm"
    assert found.value == pytest.approx(imputed[cell, column], abs=1e-5)
    assert found.error < 1e-4


def test_another_baseline(shared_tissue, fitted):
    profile = pd.Series(fitted._gene_share * 7, index=shared_tissue.var_names)[::-1]
    ours, same = (sf.tl.attribution(shared_tissue, fitted, "VIM", 8, baseline=b) for b in (None, profile))
    np.testing.assert_allclose(same.genes, ours.genes, **CLOSE)
    flat = sf.tl.attribution(shared_tissue, fitted, "VIM", 8, baseline=profile * 0 + 1)
    assert flat.value == ours.value
    assert flat.baseline != ours.baseline
    assert flat.error < 1e-4


# --- reach ------------------------------------------------------------------------------------------------------------


def test_reach_is_the_mean_of_the_cells_attributions(shared_tissue, trained):
    reach = sf.tl.reach(shared_tissue, trained, n_cells=6, n_steps=5, random_state=3)
    assert len(reach.cells) == 6
    distances, shares, own = [], [], []
    for cell, drawn in reach.cells.iterrows():
        a = sf.tl.attribution(shared_tissue, trained, drawn["gene"], cell, n_steps=5)
        size, alone = a.neighbours["contribution"].abs(), abs(a.own.sum())
        distances.append(a.neighbours["distance"])
        shares.append(size / size.sum() / 6)
        own.append(alone / (alone + size.sum()))
        assert drawn["error"] == pytest.approx(a.error, abs=1e-6)
    np.testing.assert_allclose(reach.cells["own_share"], own, **CLOSE)
    assert reach.own_share == pytest.approx(np.mean(own), abs=1e-5)
    distance, share = np.concatenate(distances), np.concatenate(shares)
    for radius in (10, 20, 40):
        last = reach.curve[reach.curve["distance"] <= radius].iloc[-1]
        assert last["attribution"] == pytest.approx(share[distance <= radius].sum(), abs=1e-5)
        assert last["cells"] == pytest.approx((distance <= radius).mean(), abs=1e-3)
    for level, found in ((0.5, reach.distance_50), (0.9, reach.distance_90)):
        assert share[distance < found - 1e-3].sum() < level <= share[distance <= found + 1e-3].sum() + 1e-5
    assert reach.curve["attribution"].iloc[-1] == pytest.approx(1)


def test_reach_takes_cells_and_genes_at_random(shared_tissue, fitted):
    first, again, other = (
        sf.tl.reach(shared_tissue, fitted, n_cells=8, n_steps=1, random_state=seed) for seed in (0, 0, 1)
    )
    pd.testing.assert_frame_equal(first.curve, again.curve)
    pd.testing.assert_frame_equal(first.cells, again.cells)
    assert not first.cells.index.equals(other.cells.index)
    assert set(sf.tl.reach(shared_tissue, fitted, "VIM", n_cells=8, n_steps=1).cells["gene"]) == {"VIM"}
    one_fov = shared_tissue[:60]
    everyone = sf.tl.reach(one_fov, fitted, ["VIM", "EPCAM"], n_cells=999, n_steps=1)
    assert set(everyone.cells["gene"]) == {"VIM", "EPCAM"}
    assert len(everyone.cells) == (np.asarray(one_fov.X.sum(1)) > 0).sum()


# --- how it is called -------------------------------------------------------------------------------------------------


def test_order_of_cells_and_genes_does_not_matter(shared_tissue, trained):
    rng = np.random.default_rng(1)
    mixed = shared_tissue[rng.permutation(180)][:, rng.permutation(30)]
    cell = shared_tissue.obs_names[77]
    expected, found = (sf.tl.attribution(a, trained, "VIM", cell) for a in (shared_tissue, mixed))
    np.testing.assert_allclose(found.genes.loc[expected.genes.index], expected.genes, **CLOSE)
    np.testing.assert_allclose(found.neighbours.loc[expected.neighbours.index], expected.neighbours, **CLOSE)


def test_names_positions_one_and_several(shared_tissue, fitted):
    names = list(shared_tissue.obs_names[[4, 90]])
    by_name, by_position = (sf.tl.attribution(shared_tissue, fitted, "VIM", c, n_steps=2) for c in (names, [4, 90]))
    assert [a.cell for a in by_name] == [a.cell for a in by_position] == names
    for cell in (90, np.int64(90), names[1]):
        one = sf.tl.attribution(shared_tissue, fitted, "VIM", cell, n_steps=2)
        for expected in (by_name[1], by_position[1]):
            pd.testing.assert_frame_equal(one.genes, expected.genes)
            pd.testing.assert_frame_equal(one.neighbours, expected.neighbours)
    assert "VIM" in repr(by_name[0])


def test_saved_models_and_data_are_read_only(tissue, fitted, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = sf.SpaFormer.load(tmp_path / "model", device="cpu")
    before, state = contents(tissue), torch.get_rng_state()
    expected, found = (sf.tl.attribution(tissue, m, "VIM", 12, n_steps=3) for m in (fitted, loaded))
    pd.testing.assert_frame_equal(found.genes, expected.genes)
    assert repr(sf.tl.reach(tissue, loaded, n_cells=3)) == repr(sf.tl.reach(tissue, fitted, n_cells=3))
    assert contents(tissue) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in loaded._networks[0].parameters())


def test_data_named_differently(tissue, fitted):
    expected = sf.tl.attribution(tissue, fitted, "VIM", 12, n_steps=2)
    tissue.obsm["xy"], tissue.layers["raw"], tissue.obs["image"] = (
        tissue.obsm.pop("spatial"),
        tissue.X,
        tissue.obs["fov"],
    )
    tissue.X = None
    keys = {"spatial_key": "xy", "layer": "raw", "library_key": "image"}
    pd.testing.assert_frame_equal(sf.tl.attribution(tissue, fitted, "VIM", 12, n_steps=2, **keys).genes, expected.genes)
    assert len(sf.tl.reach(tissue, fitted, n_cells=2, n_steps=1, **keys).cells) == 2


def test_what_cannot_be_is_refused(tissue, fitted):
    for call in (lambda m: sf.tl.attribution(tissue, m, "VIM", 0), lambda m: sf.tl.reach(tissue, m)):
        with pytest.raises(ValueError, match="not fitted"):
            call(sf.SpaFormer())
        with pytest.raises(TypeError, match="must be a fitted SpaFormer, not str"):
            call("model")
    with pytest.raises(KeyError, match=r"`gene='vim'` is not among the 30 genes.*Did you mean 'VIM'"):
        sf.tl.attribution(tissue, fitted, "vim", 0)
    with pytest.raises(KeyError, match="`gene='GFP'`"):
        sf.tl.reach(tissue, fitted, ["VIM", "GFP"])
    with pytest.raises(ValueError, match="`gene` names no gene"):
        sf.tl.reach(tissue, fitted, [])
    with pytest.raises(TypeError, match="`gene` must be the name"):
        sf.tl.attribution(tissue, fitted, 3, 0)


@pytest.mark.parametrize(
    ("cells", "error", "message"),
    [(180, ValueError, "180 are not from 0 to 179"), (-1, ValueError, "from 0 to 179"), ([], ValueError, "no cell"),
     ("nobody", KeyError, "nobody"), (1.5, TypeError, "whole numbers"), (True, TypeError, "whole numbers"),
     (np.zeros(180, bool), TypeError, "flatnonzero")],
)  # fmt: skip
def test_cells_that_are_not_there(tissue, fitted, cells, error, message):
    with pytest.raises(error, match=message):
        sf.tl.attribution(tissue, fitted, "VIM", cells)


def test_a_name_of_several_cells(tissue, fitted):
    tissue.obs_names = ["same", "same", *tissue.obs_names[2:]]
    with pytest.raises(ValueError, match="several cells are named same; pass positions"):
        sf.tl.attribution(tissue, fitted, "VIM", "same")
    assert sf.tl.attribution(tissue, fitted, "VIM", 1, n_steps=1).cell == "same"


def test_baselines_that_do_not_fit(tissue, fitted):
    good = pd.Series(1.0, index=tissue.var_names)
    for baseline, error, message in (
        (np.ones(30), TypeError, "pandas Series"), (good.iloc[1:], ValueError, "lacks 1 of the 30"),
        (-good, ValueError, "at least 0"), (good * 0, ValueError, "not all of them 0"),
        (good * np.nan, ValueError, "finite"), (pd.concat([good, good]), ValueError, "more than once"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            sf.tl.attribution(tissue, fitted, "VIM", 0, baseline=baseline)
