"""The model object: fit, impute, embed, save and load, on the data of the fit and on others."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import spaformer_sc as sf
from spaformer_sc._config import Training
from spaformer_sc._saved import SCHEMA
from spaformer_sc.data._graph import spatial_graph
from spaformer_sc.model import Start
from spaformer_sc.training.reliability import undecided
from tests.conftest import contents, seal, sha256

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def model(**arguments):
    """A model that is fitted in two epochs."""
    return sf.SpaFormer(**{"library_key": "fov", "quality": "fast", "max_epochs": 2, "progress": False, **arguments})


@pytest.fixture(scope="module")
def with_positions(shared_tissue):
    """A fitted model with every positional encoding, not to be changed."""
    return model(positional=["laplacian", "signnet"]).fit(shared_tissue)


@pytest.fixture(scope="module")
def pooling(shared_tissue):
    """A fitted model in which the counts of cells alike weigh, not to be changed."""
    pooled = model(settings={"n_pooled": 10}).fit(shared_tissue)
    pooled._concentration = 20.0
    return pooled


@pytest.fixture(params=["fitted", "with_positions", "pooling"])
def either(request):
    """The fitted models one after the other."""
    return request.getfixturevalue(request.param)


# --- fit, impute, embed -----------------------------------------------------------------------------------------------


def test_not_fitted(tissue, tmp_path):
    new = sf.SpaFormer()
    assert repr(new) == "SpaFormer, not fitted\n  choices: the defaults"
    for call in (new.impute, new.embed):
        with pytest.raises(ValueError, match=r"not fitted; call `\.fit"):
            call(tissue)
    with pytest.raises(ValueError, match=r"not fitted; there is nothing to save"):
        new.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_fit_reads_and_never_writes(tissue):
    before = contents(tissue)
    new = model()
    assert new.fit(tissue) is new
    new.impute(tissue)
    new.embed(tissue)
    assert contents(tissue) == before
    assert repr(new).startswith("SpaFormer, fitted to 180 cells × 30 genes in 3 fields of view\n")


def test_what_a_model_shows(fitted):
    head, choices, networks, gain, genes = repr(fitted).split("\n  ")
    assert head == "SpaFormer, fitted to 180 cells × 30 genes in 3 fields of view"
    assert choices == "choices: library_key='fov', forms=['wide'], n_networks=1, max_epochs=3"
    assert networks == "networks: 1, with their weights: wide 1.00"
    measured = fitted.scores["gain"], fitted.scores["gain_over_baseline"]
    assert [float(number) for number in re.findall(r"-?\d+\.\d+", gain)] == [round(value, 3) for value in measured]
    verdicts, few = fitted.gene_scores["reliability"].value_counts(), undecided(fitted.gene_scores).sum()
    said = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("reliable", "weak", "no better than baseline"))
    assert genes == f"genes: {said} ({few} of these have too few transcripts to tell)"


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        ({"preset": "paper"}, "preset='paper'"),
        ({"preset": "paper", "n_latent": 9, "layer": "raw"}, "preset='paper', layer='raw', n_latent=9"),
        ({"graph": "radius", "radius": 3, "random_state": 5}, "graph='radius', radius=3.0, random_state=5"),
        ({"library_key": ["slide", "fov"], "settings": {"hops": 0}}, "library_key=['slide', 'fov'], hops=0"),
        ({"encoder": "performer", "n_latent": 64}, "the defaults"),
    ],
)
def test_what_a_model_shows_of_its_choices(arguments, choices):
    assert repr(sf.SpaFormer(**arguments)) == f"SpaFormer, not fitted\n  choices: {choices}"


def test_the_model_gives_what_impute_writes(tissue):
    arguments = {"library_key": "fov", "quality": "fast", "max_epochs": 2, "progress": False}
    sf.tl.impute(tissue, **arguments, random_state=4, output="counts")
    new = model(random_state=4).fit(tissue)
    np.testing.assert_allclose(new.impute(tissue, output="counts"), tissue.layers["spaformer"], **CLOSE)
    np.testing.assert_allclose(new.embed(tissue), tissue.obsm["X_spaformer"], **CLOSE)
    assert new.scores == tissue.uns["spaformer"]["scores"]
    assert new.history == tissue.uns["spaformer"]["history"]
    np.testing.assert_array_equal(new.gene_scores["gain"], tissue.var["spaformer_gain"])
    assert new.gene_scores.index.equals(tissue.var_names)


@pytest.mark.parametrize("output", ["lognorm", "counts", "rate"])
def test_form_of_the_results(fitted, shared_tissue, output):
    expression, latent = fitted.impute(shared_tissue, output=output), fitted.embed(shared_tissue)
    assert (expression.dtype, expression.shape) == (np.float32, shared_tissue.shape)
    assert (latent.dtype, latent.shape) == (np.float32, (180, fitted.settings.n_latent))
    assert np.isfinite(expression).all()
    assert expression.min() >= 0


def test_imputing_again_gives_the_same(either, shared_tissue):
    np.testing.assert_array_equal(either.impute(shared_tissue), either.impute(shared_tissue))


def test_a_fov_does_not_depend_on_the_others(either, shared_tissue):
    everything, latent = either.impute(shared_tissue), either.embed(shared_tissue)
    for name in shared_tissue.obs["fov"].cat.categories:
        cells = (shared_tissue.obs["fov"] == name).to_numpy()
        np.testing.assert_allclose(either.impute(shared_tissue[cells]), everything[cells], **CLOSE)
        np.testing.assert_allclose(either.embed(shared_tissue[cells]), latent[cells], **CLOSE)


def test_permuting_the_cells_permutes_the_result(either, shared_tissue):
    order = np.random.default_rng(0).permutation(shared_tissue.n_obs)
    np.testing.assert_allclose(either.impute(shared_tissue[order]), either.impute(shared_tissue)[order], **CLOSE)
    np.testing.assert_allclose(either.embed(shared_tissue[order]), either.embed(shared_tissue)[order], **CLOSE)


def test_a_fov_moved_as_a_whole_gives_the_same(either, shared_tissue):
    moved = shared_tissue.copy()
    moved.obsm["spatial"] = moved.obsm["spatial"] * 5.5 + [1e4, -300]
    np.testing.assert_allclose(either.impute(moved), either.impute(shared_tissue), rtol=1e-3, atol=1e-4)


def test_depth_matters_to_counts_and_not_to_their_share(fitted, shared_tissue):
    rate, counts = (fitted.impute(shared_tissue, output=output) for output in ("rate", "counts"))
    library = np.asarray(shared_tissue.X.sum(axis=1)).ravel()
    np.testing.assert_allclose(counts.sum(axis=1), library, rtol=1e-4)
    np.testing.assert_allclose(rate.sum(axis=1), fitted.target_sum, rtol=1e-4)


def test_networks_are_averaged_in_the_scale_asked_for(shared_tissue):
    best = model(quality="default", max_epochs=1, settings={"n_pooled": 0}).fit(shared_tissue)
    everything = {output: best.impute(shared_tissue, output=output) for output in ("lognorm", "counts", "rate")}
    networks, weights, mean = best._networks, best._weights, dict.fromkeys(everything, 0.0)
    assert weights.shape == (2, len(networks)) == (2, 5)
    weights, best._weights = weights[0], np.ones((2, 1))
    for network, weight in zip(networks, weights):
        best._networks = [network]
        mean = {output: mean[output] + weight * best.impute(shared_tissue, output=output) for output in mean}
    for output, expression in everything.items():
        np.testing.assert_allclose(expression, mean[output], **CLOSE)


def test_a_failing_fit_does_not_leave_half_a_model(shared_tissue, monkeypatch):
    new = model().fit(shared_tissue)
    before = new.impute(shared_tissue)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("spaformer_sc.training.abreast.train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            new.fit(shared_tissue[:, 10:], library_key="fov")
    try:
        after = new.impute(shared_tissue)
    except ValueError as error:
        assert "not fitted" in str(error)  # noqa: PT017
    else:
        np.testing.assert_array_equal(after, before)


def test_a_first_fit_that_fails_leaves_the_model_not_fitted(shared_tissue, monkeypatch):
    new = model()
    with monkeypatch.context() as patch:
        patch.setattr("spaformer_sc.training.scoring.held_out_scores", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            new.fit(shared_tissue)
    with pytest.raises(ValueError, match="not fitted"):
        new.impute(shared_tissue)


def test_fitting_again_is_a_fit_from_the_start(shared_tissue):
    twice = model().fit(shared_tissue[:60]).fit(shared_tissue)
    once = model().fit(shared_tissue)
    np.testing.assert_array_equal(twice.impute(shared_tissue), once.impute(shared_tissue))
    assert len(twice.history["step"]) == len(once.history["step"])


# --- other data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_two(shared_tissue):
    """A model fitted to two of the three FOVs; not to be changed."""
    return model().fit(shared_tissue[:120])


def test_other_fovs(of_two, shared_tissue):
    found = of_two.impute(shared_tissue[120:])
    assert found.shape == (60, 30)
    np.testing.assert_allclose(found, of_two.impute(shared_tissue)[120:], **CLOSE)


def test_a_slide_that_names_things_differently(of_two, shared_tissue):
    wanted = of_two.impute(shared_tissue[120:])
    slide = ad.AnnData(
        np.zeros((60, 30), np.float32),
        var=shared_tissue.var,
        obsm={"xy": shared_tissue.obsm["spatial"][120:]},
        layers={"counts": shared_tissue.X[120:]},
    )
    with pytest.raises(KeyError, match="`library_key='fov'` is not in"):
        of_two.impute(slide, spatial_key="xy", layer="counts")
    found = of_two.impute(slide, library_key=None, spatial_key="xy", layer="counts")
    np.testing.assert_allclose(found, wanted, **CLOSE)
    np.testing.assert_allclose(
        of_two.embed(slide, library_key=None, spatial_key="xy", layer="counts"),
        of_two.embed(shared_tissue[120:]),
        **CLOSE,
    )
    slide.obs["slide"], slide.obs["number"] = pd.Categorical(["a"] * 60), pd.Categorical(["1"] * 60)
    keys = {"library_key": ["slide", "number"], "spatial_key": "xy", "layer": "counts"}
    np.testing.assert_allclose(of_two.impute(slide, **keys), wanted, **CLOSE)
    assert of_two.keys.library_key == "fov"
    assert of_two.keys.spatial_key == "spatial"


def test_the_same_fov_name_on_two_slides(fitted, shared_tissue):
    adata = shared_tissue.copy()
    adata.obs["slide"] = adata.obs["fov"].astype(str).astype("category")
    adata.obs["fov"] = pd.Categorical(["1"] * adata.n_obs)
    np.testing.assert_allclose(
        fitted.impute(adata, library_key=["slide", "fov"]), fitted.impute(shared_tissue), **CLOSE
    )
    joined = fitted.impute(adata)
    assert np.abs(joined - fitted.impute(shared_tissue)).max() > 1e-4


def test_genes_in_another_order(fitted, shared_tissue):
    order = np.random.default_rng(1).permutation(shared_tissue.n_vars)
    np.testing.assert_array_equal(fitted.impute(shared_tissue[:, order]), fitted.impute(shared_tissue)[:, order])
    np.testing.assert_array_equal(fitted.embed(shared_tissue[:, order]), fitted.embed(shared_tissue))


def test_missing_genes_are_named(fitted, shared_tissue):
    fewer = shared_tissue[:, [name not in ("EPCAM", "VIM") for name in shared_tissue.var_names]]
    for call in (fitted.impute, fitted.embed):
        with pytest.raises(ValueError, match=r"lacks 2 of the 30 genes .*: EPCAM, VIM\."):
            call(fewer)
    with pytest.raises(ValueError, match=r"lacks 20 of the 30 .*, …"):
        fitted.impute(shared_tissue[:, 20:])


def test_genes_that_the_model_does_not_know_are_nan(fitted, shared_tissue):
    other = ad.AnnData(
        sp.csr_matrix(np.full((180, 2), 7.0, np.float32)),
        obs=shared_tissue.obs,
        var=pd.DataFrame(index=["new1", "new2"]),
    )
    more = ad.concat([other[:, :1], shared_tissue, other[:, 1:]], axis=1, merge="same")
    more.obsm["spatial"] = shared_tissue.obsm["spatial"]
    found, wanted = fitted.impute(more), fitted.impute(shared_tissue)
    assert found.shape == (180, 32)
    assert np.isnan(found[:, [0, 31]]).all()
    np.testing.assert_array_equal(found[:, 1:31], wanted)
    chosen = fitted.impute(more, genes=["VIM", "new2", "EPCAM"])
    position = shared_tissue.var_names.get_indexer(["VIM", "EPCAM"])
    np.testing.assert_array_equal(chosen[:, [0, 2]], wanted[:, position])
    assert np.isnan(chosen[:, 1]).all()


def test_chosen_genes_come_in_the_order_asked_for(fitted, shared_tissue):
    everything = fitted.impute(shared_tissue)
    position = shared_tissue.var_names.get_indexer(["VIM", "EPCAM"])
    np.testing.assert_array_equal(fitted.impute(shared_tissue, genes=["VIM", "EPCAM"]), everything[:, position])
    assert fitted.impute(shared_tissue, genes="VIM").shape == (180, 1)
    with pytest.raises(KeyError, match="Did you mean 'VIM'"):
        fitted.impute(shared_tissue, genes="vim")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"output": "log"}, ValueError, "`output='log'` is not allowed"),
        ({"target_sum": -1}, ValueError, "`target_sum=-1` must be"),
        ({"library_key": "FOV"}, KeyError, "Did you mean 'fov'"),
        ({"layer": "counts"}, KeyError, "`layer='counts'` is not in"),
    ],
)
def test_bad_arguments_of_impute(fitted, shared_tissue, arguments, error, message):
    with pytest.raises(error, match=message):
        fitted.impute(shared_tissue, **arguments)


def test_cells_without_counts_and_fovs_of_one_cell(fitted, tissue):
    counts = tissue.X.toarray()
    counts[60] = 0
    tissue.X = sp.csr_matrix(counts)
    few = tissue[[0, 60, *range(120, 180)]]
    for output in ("lognorm", "counts", "rate"):
        found = fitted.impute(few, output=output)
        assert np.isfinite(found).all()
        assert found[1].any() == (output == "rate")


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slide():
    """One FOV of 800 cells, and a model fitted to it as a whole."""
    adata = sf.datasets.simulated_tissue(n_fovs=1, n_cells=800, n_genes=30)
    return adata, model(library_key=None, max_epochs=12).fit(adata)


def distance(one, other):
    """Total variation distance of every row of two matrices of shares."""
    return np.abs(one - other).sum(axis=1) / 2


def test_tiles_have_no_seam(slide, monkeypatch):
    adata, whole_model = slide
    monkeypatch.setattr(whole_model, "_concentration", math.inf)
    whole = whole_model.impute(adata, output="rate", target_sum=1)
    monkeypatch.setattr(whole_model, "tile_size", 200)
    tiled = whole_model.impute(adata, output="rate", target_sum=1)
    assert np.isfinite(tiled).all()
    np.testing.assert_allclose(tiled.sum(axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(
        whole_model.impute(adata, output="counts").sum(axis=1), adata.X.sum(axis=1).A1, rtol=1e-4
    )
    seam = distance(tiled, whole)
    monkeypatch.setattr("spaformer_sc.data._fields.MARGIN", 0.0)
    cut = distance(whole_model.impute(adata, output="rate", target_sum=1), whole)
    apart = distance(whole, whole[np.random.default_rng(0).permutation(len(whole))])
    # Measured: the worst cell is 0.004 away, 0.08 where tiles do not overlap; two cells at random are 0.2 apart.
    assert seam.max() < 0.1 * apart.mean()
    assert seam.max() < 0.3 * cut.max()


def test_cells_alike_of_a_tile_do_for_those_of_the_image(slide, monkeypatch):
    adata, model = slide
    monkeypatch.setattr(model, "_concentration", 20.0)
    whole = model.impute(adata, output="rate", target_sum=1)
    monkeypatch.setattr(model, "tile_size", 200)
    seam = distance(model.impute(adata, output="rate", target_sum=1), whole)
    monkeypatch.setattr(model, "_concentration", math.inf)
    without = distance(model.impute(adata, output="rate", target_sum=1), whole)
    assert seam.mean() < 0.5 * without.mean()


def test_tiles_that_disagree_are_blended(slide, monkeypatch):
    adata, whole_model = slide
    values = iter([0.0, 1.0, 1.0, 0.0])  # of four tiles, each of which borders on one that says otherwise
    monkeypatch.setattr(whole_model, "tile_size", 200)
    monkeypatch.setattr(
        sf.SpaFormer, "_scaled", staticmethod(lambda _, result, *__: torch.full((len(result.latent), 30), next(values)))
    )
    found = whole_model.impute(adata)[:, 0]
    assert next(values, None) is None
    graph = sp.coo_matrix(spatial_graph(adata.obsm["spatial"]))
    length = np.linalg.norm(adata.obsm["spatial"][graph.row] - adata.obsm["spatial"][graph.col], axis=1)
    near = length < 1.5 * np.median(length)
    # The margin is 8 typical distances wide, and a cell is near two cuts at most.
    assert np.abs(found[graph.row] - found[graph.col])[near].max() < 2 * 1.5 / 8 + 0.01
    assert (found.min(), found.max()) == (0, 1)


def test_a_fit_on_tiles_loses_no_cell():
    adata = sf.datasets.simulated_tissue(n_fovs=1, n_cells=300, n_genes=20)
    order = np.random.default_rng(0).permutation(300)
    result = sf.tl.impute(adata[order], tile_size=50, max_epochs=2, output="rate", progress=False, copy=True)
    assert result.uns["spaformer"]["params"]["graph_summary"]["n_tiles"] == 6
    assert np.isfinite(result.layers["spaformer"]).all()
    np.testing.assert_allclose(
        result.layers["spaformer"].sum(axis=1), result.uns["spaformer"]["params"]["target_sum"], rtol=1e-4
    )
    assert (result.obsm["X_spaformer"] != 0).any(axis=1).all()


# --- save and load ----------------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import sys
import anndata, numpy
import spaformer_sc

model = spaformer_sc.SpaFormer.load(sys.argv[1])
adata = anndata.read_h5ad(sys.argv[2])
numpy.savez(sys.argv[3], expression=model.impute(adata, output="counts"), latent=model.embed(adata))
"""


def test_a_saved_model_gives_the_same_in_a_new_process(shared_tissue, tmp_path):
    trained = model(positional=["laplacian", "signnet"], decoder="nb", quality="default").fit(shared_tissue[:120])
    others = shared_tissue[120:]
    trained.save(tmp_path / "model")
    others.copy().write_h5ad(tmp_path / "others.h5ad")
    arguments = [str(tmp_path / name) for name in ("model", "others.h5ad", "found.npz")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", OTHER_PROCESS, *arguments], check=True)
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["expression"], trained.impute(others, output="counts"), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["latent"], trained.embed(others), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"preset": "paper"},
        {"decoder": "zinb", "variational": True},
        {"graph": "radius", "radius": 15.0, "encoder": "exact"},
    ],
    ids=str,
)
def test_what_is_saved_comes_back(shared_tissue, tmp_path, arguments):
    trained = model(tile_size=77, random_state=5, max_epochs=1, **arguments).fit(shared_tissue)
    trained.save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "weights.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = sf.SpaFormer.load(tmp_path / "model", progress=False)
    np.testing.assert_array_equal(loaded.impute(shared_tissue), trained.impute(shared_tissue))
    np.testing.assert_array_equal(loaded.embed(shared_tissue), trained.embed(shared_tissue))
    for name in (
        "settings",
        "keys",
        "history",
        "graph_summary",
        "target_sum",
        "tile_size",
        "random_state",
        "graph",
        "radius",
    ):
        assert getattr(loaded, name) == getattr(trained, name)
    np.testing.assert_equal(loaded.scores, trained.scores)
    pd.testing.assert_frame_equal(loaded.gene_scores, trained.gene_scores)
    assert loaded.parameters().keys() == trained.parameters().keys()
    assert repr(loaded) == repr(trained)
    loaded.save(tmp_path / "again")
    assert sha256(tmp_path / "again") == sha256(tmp_path / "model")


def test_a_loaded_model_can_be_fitted_again(fitted, shared_tissue, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = sf.SpaFormer.load(tmp_path / "model", progress=False).fit(shared_tissue)
    np.testing.assert_array_equal(loaded.impute(shared_tissue), fitted.impute(shared_tissue))


def test_saving_does_not_overwrite_unasked(fitted, of_two, shared_tissue, tmp_path):
    path = tmp_path / "deep" / "model"
    fitted.save(path)
    before = sha256(path)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        of_two.save(path)
    assert sha256(path) == before
    of_two.save(path, overwrite=True)
    loaded = sf.SpaFormer.load(path, progress=False)
    np.testing.assert_array_equal(loaded.impute(shared_tissue), of_two.impute(shared_tissue))
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_only_a_model_is_overwritten(fitted, tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    file.write_text("mine too")
    for path in (folder, file):
        with pytest.raises(FileExistsError, match="is not a saved model"):
            fitted.save(path, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert file.read_text() == "mine too"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["safetensors.torch.save", "os.fsync", "os.replace"])
def test_a_failing_save_leaves_the_old_model(fitted, of_two, tmp_path, monkeypatch, place, error):
    path = tmp_path / "model"
    fitted.save(path)
    before = sha256(path)
    replace, failed = os.replace, []

    def fail(*arguments, **_):
        if place == "os.replace" and (arguments[1] != path or failed):
            return replace(*arguments)
        failed.append(arguments)
        assert place == "os.replace" or sha256(path) == before
        raise error("on the way")

    monkeypatch.setattr(place, fail)
    monkeypatch.setattr("spaformer_sc._files._exchange", lambda *_: False)  # as where folders cannot change places
    with pytest.raises(error, match="on the way"):
        of_two.save(path, overwrite=True)
    assert sha256(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


class _Payload:
    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


def _edited(path, **values):
    seal(path, {**json.loads((path / "model.json").read_text()), **values})


def _truncated(name, share):
    def damage(path):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * share)])

    return damage


def _weights(change):
    def damage(path):
        from safetensors.torch import load_file, save_file

        weights = load_file(path / "weights.safetensors")
        change(weights)
        save_file(weights, path / "weights.safetensors")
        _edited(path)

    return damage


def _other_weights(write):
    def damage(path):
        write(path / "weights.safetensors")
        _edited(path)

    return damage


def _settings(**values):
    def damage(path):
        settings = json.loads((path / "model.json").read_text())["settings"]
        _edited(path, settings={**settings, **values})

    return damage


def _networks(**values):
    known = {"form": ["plain"], "weight": [1.0], "weight_where_missing": [1.0]}
    return lambda path: _edited(path, networks={**known, **values})


KEYS = {"library_key": "fov", "spatial_key": "spatial", "connectivity_key": None, "layer": None, "missing": None}
DAMAGE = {
    "empty description": _truncated("model.json", 0),
    "half a description": _truncated("model.json", 0.5),
    "a description of something else": lambda path: (path / "model.json").write_text('{"format": "another"}'),
    "a list": lambda path: (path / "model.json").write_text("[1, 2]"),
    "not text": lambda path: (path / "model.json").write_bytes(b"\xff\xfe\x00"),
    "a newer format": lambda path: _edited(path, schema=999),
    "no schema": lambda path: _edited(path, schema=None),
    "no names": lambda path: _edited(path, var_names=None),
    "fewer names": lambda path: _edited(path, var_names=["EPCAM"]),
    "no keys": lambda path: _edited(path, keys={}),
    "unknown encoder": _settings(encoder="oracle"),
    "unknown positional": _settings(positional=["oracle"]),
    "another width": _settings(dim=64),
    "unknown setting": _settings(colour="red"),
    "more networks": _networks(form=["plain", "plain"]),
    "weights of networks that are no shares": _networks(weight=[-3.0]),
    "no weights of networks": _networks(weight=[None]),
    "weights of missing entries that are no shares": _networks(weight_where_missing=[0.5]),
    "a network of no known form": _networks(form=["round"]),
    "a concentration without end": _networks(concentration=1e300),
    "a concentration that is no number": _networks(concentration="much"),
    "no weights": _truncated("weights.safetensors", 0),
    "half the weights": _truncated("weights.safetensors", 0.5),
    "nearly all weights": _truncated("weights.safetensors", 0.999),
    "pickled weights": _other_weights(lambda file: file.write_bytes(pickle.dumps(_Payload()))),
    "torch weights": _other_weights(lambda file: torch.save({"gene_share": torch.ones(3)}, file)),
    "layers without end": _settings(n_layers=10**9),
    "a very wide network": _settings(dim=2**30),
    "a number of no size": _settings(n_latent=10**400),
    "no target sum": lambda path: _edited(path, target_sum=float("nan")),
    "names that are no texts": lambda path: _edited(path, keys={**KEYS, "layer": ["counts"]}),
    "a gene twice": lambda path: _edited(path, var_names=["EPCAM"] * 30),
    "weights that are not finite": _weights(lambda weights: weights["typical"].fill_(float("nan"))),
    "double precision": _weights(lambda weights: weights.update(typical=weights["typical"].double())),
    "shares below 0": _weights(lambda weights: weights["gene_share"].neg_()),
    "a weight too few": _weights(lambda weights: weights.popitem()),
    "a weight too many": _weights(lambda weights: weights.update(extra=torch.ones(3))),
    "no gene shares": _weights(lambda weights: weights.pop("gene_share")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_no_model_is_refused(fitted, tmp_path, damage):
    path = tmp_path / "model"
    fitted.save(path)
    damage(path)
    with pytest.raises(ValueError, match=r"model.* is damaged or not a saved model: .") as caught:
        sf.SpaFormer.load(path)
    assert str(path) in str(caught.value)


def test_another_format_is_told_from_damage(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    for schema, word in ((SCHEMA + 1, "newer"), (SCHEMA - 1, "older")):
        _edited(tmp_path / "model", schema=schema, version="9.9.9")
        with pytest.raises(ValueError, match=rf"{word} .*9\.9\.9"):
            sf.SpaFormer.load(tmp_path / "model")


def test_a_bad_argument_of_load_is_not_taken_for_damage(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^`device='abacus'` cannot be used"):
        sf.SpaFormer.load(tmp_path / "model", device="abacus")
    with pytest.raises(TypeError, match=r"^`progress=1` must be True or False"):
        sf.SpaFormer.load(tmp_path / "model", progress=1)


@pytest.mark.parametrize("missing", ["model", "model/model.json", "model/weights.safetensors"])
def test_no_model_there(fitted, tmp_path, missing):
    fitted.save(tmp_path / "model")
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="holds no saved model"):
        sf.SpaFormer.load(tmp_path / "model")


def test_nothing_is_unpickled(fitted, tmp_path, monkeypatch):
    def fail(*_, **__):
        pytest.fail("something was unpickled")

    for place in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "numpy.load"):
        monkeypatch.setattr(place, fail)
    fitted.save(tmp_path / "model")
    sf.SpaFormer.load(tmp_path / "model")


def test_log_values_are_refused_by_a_fitted_model_too(fitted, tissue):
    sc_log = tissue.copy()
    library = np.maximum(np.asarray(sc_log.X.sum(axis=1)).ravel(), 1)
    sc_log.X = (sp.diags(100 / library) @ sc_log.X).tocsr().log1p()
    for call in (fitted.impute, fitted.embed):
        with pytest.raises(ValueError, match="raw counts are needed"):
            call(sc_log)


# --- going on with another slide --------------------------------------------------------------------------------------


def test_tuning_gives_a_new_model_that_starts_from_the_old_one(fitted, shared_tissue) -> None:
    other = sf.datasets.simulated_tissue(2, 60, 30, random_state=5, panel_state=0)[:, ::-1].copy()
    before = fitted.impute(shared_tissue, output="rate")
    tuned = fitted.fine_tune(other, effort=0.4)
    np.testing.assert_array_equal(fitted.impute(shared_tissue, output="rate"), before)
    assert list(tuned.var_names) == list(fitted.var_names)
    assert tuned.history["step"][-1] < fitted.history["step"][-1]
    old, new = (model._networks[0].state_dict() for model in (fitted, tuned))
    weights = [name for name in old if name.endswith(".weight")]
    moved = [float((new[name] - old[name]).norm() / old[name].norm().clamp(min=1e-6)) for name in weights]
    assert 0 < max(moved) < 1
    assert tuned.impute(other).shape == other.shape


def test_tuning_trains_as_a_fit_does_in_fewer_steps(fitted) -> None:
    usual = Training(n_steps=2000, n_validations=25, learning_rate=1e-3)
    tuned = [Start(fitted, effort).training(usual) for effort in (0.2, 0.8)]
    assert [(t.n_steps, t.n_validations, t.learning_rate) for t in tuned] == [(400, 10, 1e-3), (1600, 20, 1e-3)]
    few = replace(usual, n_validations=3, max_epochs=7)
    assert Start(fitted, 0.2).training(few) == replace(few, n_steps=400, max_epochs=1)


def test_what_is_tuned_in_vain_stays_as_it_is(fitted, shared_tissue, monkeypatch) -> None:
    scores = iter([0.5, 0.4, 0.3, *[0.2] * 20])
    monkeypatch.setattr("spaformer_sc.training.mixing.HeldCounts.gain", lambda *_, **__: next(scores))
    tuned = fitted.fine_tune(shared_tissue, effort=1.0)
    assert tuned.history["step"][0] == 0
    assert tuned.history["validation"][0] == max(tuned.history["validation"])
    old, new = (model._networks[0].state_dict() for model in (fitted, tuned))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed <= {"decoder.mixture", "decoder.gene_share"}


def test_tuning_starts_better_than_anew(fitted) -> None:
    other = sf.datasets.simulated_tissue(2, 60, 30, random_state=5, panel_state=0)
    arguments = {"library_key": "fov", "quality": "fast", "progress": False}
    long = sf.SpaFormer(max_epochs=60, **arguments).fit(sf.datasets.simulated_tissue(4, 100, 30, panel_state=0))
    tuned = long.fine_tune(other, effort=0.05)
    anew = sf.SpaFormer(max_epochs=3, **arguments).fit(other)
    assert tuned.history["step"][-1] == anew.history["step"][-1]
    assert max(tuned.history["validation"]) > max(anew.history["validation"])


def test_what_cannot_be_tuned(fitted, shared_tissue) -> None:
    with pytest.raises(ValueError, match="`effort=0` would train nothing"):
        fitted.fine_tune(shared_tissue, effort=0)
    with pytest.raises(ValueError, match="`effort=2"):
        fitted.fine_tune(shared_tissue, effort=2.0)
    with pytest.raises(ValueError, match="not fitted"):
        sf.SpaFormer(progress=False).fine_tune(shared_tissue)
    with pytest.raises(ValueError, match="lacks 1 of the 30 genes"):
        fitted.fine_tune(shared_tissue[:, 1:].copy())
    settings = {"dispersion": "gene_fov"}
    by_fov = sf.SpaFormer(library_key="fov", quality="fast", max_epochs=1, settings=settings, progress=False)
    with pytest.raises(ValueError, match="belongs to its fields of view"):
        by_fov.fit(shared_tissue).fine_tune(shared_tissue)
