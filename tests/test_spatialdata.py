"""A SpatialData in the place of an AnnData: its table is worked on, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spaformer_sc as sf
from spaformer_sc.cli import main

from .conftest import contents, sha256, untouched

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sd = pytest.importorskip("spatialdata", reason="spatialdata is not installed")
    from spatialdata.models import Labels2DModel, PointsModel, ShapesModel, TableModel
    from spatialdata.transformations import Scale


def quietly(function, *args, **kwargs):
    """Call spatialdata without the warnings of what it calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def annotating(adata, region):
    """A table whose rows are the circles 5, 6, … of an element."""
    adata.obs = adata.obs.assign(region=pd.Categorical([region] * adata.n_obs), cell=np.arange(adata.n_obs) + 5)
    return TableModel.parse(adata, region=region, region_key="region", instance_key="cell")


def circles(adata, scale=1.0):
    index = np.arange(adata.n_obs) + 5
    places = Scale([scale, scale], axes=("x", "y"))
    return ShapesModel.parse(
        adata.obsm["spatial"], geometry=0, radius=3.0, index=index, transformations={"global": places}
    )


@pytest.fixture
def sdata(tissue):
    """Circles and a table of them."""
    shapes = {"cells": circles(tissue)}
    return quietly(sd.SpatialData, shapes=shapes, tables={"table": annotating(tissue, "cells")})


@pytest.fixture
def two(sdata, shared_tissue):
    """The same with a second table."""
    quietly(sdata.tables.__setitem__, "nuclei", annotating(shared_tissue.copy(), "cells"))
    return sdata


CHOICES = {"library_key": "fov", "quality": "fast", "max_epochs": 2, "progress": False}


def impute(data, **choices):
    return sf.tl.impute(data, **CHOICES, **choices)


def test_the_table_is_imputed_in_place(sdata):
    table, shapes = sdata.tables["table"], sdata.shapes["cells"]
    alone = table.copy()
    assert impute(sdata) is None
    impute(alone)
    assert sdata.tables["table"] is table
    assert sdata.shapes["cells"] is shapes
    assert contents(table) == contents(alone)


def test_a_copy_is_a_spatialdata_that_shares_the_rest(two):
    two.attrs["of"] = "mine"
    before = dict(two.tables.items())
    with untouched(before["table"]), untouched(before["nuclei"]):
        found = impute(two, table_key="nuclei", copy=True)
    assert isinstance(found, sd.SpatialData)
    assert found.shapes["cells"] is two.shapes["cells"]
    assert found.tables["table"] is two.tables["table"] is before["table"]
    assert two.tables["nuclei"] is before["nuclei"]
    assert found.attrs["of"] == "mine"
    assert "spaformer" in found.tables["nuclei"].layers
    written = found.tables["nuclei"]
    impute(two, table_key="nuclei")
    np.testing.assert_array_equal(written.layers["spaformer"], before["nuclei"].layers["spaformer"])
    for prepare, slot in ((sf.pp.tile, "obs"), (sf.pp.positional_encoding, "obsm")):
        args = () if slot == "obs" else ("linear",)
        copied = prepare(two, *args, table_key="table", library_key="fov", key_added="new", copy=True)
        assert "new" in getattr(copied.tables["table"], slot)
        assert "new" not in getattr(two.tables["table"], slot)


@pytest.mark.usefixtures("unseen")
def test_what_is_read_of_a_result_in_a_table(two, tmp_path):
    impute(two, table_key="table")
    table = two.tables["table"]
    gene = table.var_names[3]
    table.layers["held"] = table.X.copy()
    of = {"table_key": "table"}
    np.testing.assert_array_equal(sf.tl.interval(two, gene, **of).upper, sf.tl.interval(table, gene).upper)
    np.testing.assert_array_equal(sf.tl.sample(two, gene, 3, **of), sf.tl.sample(table, gene, 3))
    np.testing.assert_array_equal(sf.tl.detection(two, gene, **of), sf.tl.detection(table, gene))
    sf.tl.evaluate(two, "held", **of, key_added="a")
    sf.tl.evaluate(table, "held", key_added="b")
    np.testing.assert_array_equal(table.var["a_pearson"], table.var["b_pearson"])
    for data, choices in ((two, of), (table, {})):
        with pytest.raises(ValueError, match="nothing is known of the coverage"):
            sf.pl.calibration(data, **choices)
    for draw in (sf.pl.reliability, sf.pl.history):
        drawn, wanted = (draw(data, **choices) for data, choices in ((two, of), (table, {})))
        assert len(drawn.lines) == len(wanted.lines)
    assert sf.pl.imputed(two, gene, **of).shape == (1, 3)
    sf.pp.tile(two, **of, library_key="fov", tile_size=30)
    assert table.obs["tile"].nunique() > 3
    sf.pp.positional_encoding(two, "patch", **of, library_key="fov")
    assert table.obsm["X_pe_patch"].shape == (table.n_obs, 2)
    assert len(sf.pl.encodings(two, "patch", **of)) == 2
    page = sf.pl.report(two, tmp_path / "report.html", **of, genes=gene)
    assert gene in page.read_text(encoding="utf-8")


def test_the_model(sdata, fitted):
    table = sdata.tables["table"]
    gene, cell = table.var_names[0], table.obs_names[0]
    with untouched(table):
        np.testing.assert_array_equal(fitted.impute(sdata), fitted.impute(table))
        np.testing.assert_array_equal(fitted.embed(sdata, table_key="table"), fitted.embed(table))
        tuned = fitted.fine_tune(sdata, effort=0.01)
        again = sf.SpaFormer(library_key="fov", quality="fast", max_epochs=1, progress=False).fit(sdata)
        found, wanted = (sf.tl.attribution(data, fitted, gene, cell, n_steps=2) for data in (sdata, table))
        assert found.value == wanted.value
        reached = sf.tl.reach(sdata, fitted, gene, n_cells=2, n_steps=2)
    assert list(tuned.var_names) == list(again.var_names) == list(table.var_names)
    assert len(reached.cells) == 2


def test_which_table(two, tissue, no_training):
    with pytest.raises(ValueError, match=r"2 tables: table, nuclei\. Name the one with the counts: table_key='table'"):
        impute(two)
    with pytest.raises(KeyError, match=r"`table_key='Nuclei'` is not in `sdata.tables`.* Did you mean 'nuclei'\?"):
        impute(two, table_key="Nuclei")
    with pytest.raises(TypeError, match="`table_key=3` must be one name"):
        sf.tl.interval(two, table_key=3)
    with pytest.raises(ValueError, match="SpatialData without tables"):
        sf.pl.history(sd.SpatialData())
    with pytest.raises(ValueError, match=r"`table_key='table'` names a table of a SpatialData, but `adata` is"):
        impute(tissue, table_key="table")
    with pytest.raises(TypeError, match="`adata` must be an AnnData, not dict"):
        impute({})


def test_a_file_is_not_changed_and_the_log_says_how_to(sdata, tmp_path, caplog):
    quietly(sdata.write, tmp_path / "sample.zarr")
    read = quietly(sd.read_zarr, tmp_path / "sample.zarr")
    caplog.set_level("INFO", "spaformer_sc")
    impute(read)
    assert "To save it: sdata.delete_element_from_disk('table'), then sdata.write_element('table')" in caplog.text
    assert "spaformer" not in quietly(sd.read_zarr, tmp_path / "sample.zarr").tables["table"].layers
    quietly(read.delete_element_from_disk, "table")
    quietly(read.write_element, "table")
    saved = quietly(sd.read_zarr, tmp_path / "sample.zarr")
    np.testing.assert_array_equal(saved.tables["table"].layers["spaformer"], read.tables["table"].layers["spaformer"])
    caplog.clear()
    impute(read, copy=True, key_added="other")
    sf.tl.interval(read)
    assert "To save it" not in caplog.text


def test_output_path_takes_the_table(sdata, tmp_path):
    impute(sdata, output_path=tmp_path / "table.h5ad")
    written, table = ad.read_h5ad(tmp_path / "table.h5ad"), sdata.tables["table"]
    np.testing.assert_array_equal(written.layers["spaformer"], table.layers["spaformer"])


def test_the_command_line_takes_the_table_of_a_store(two, tmp_path, capsys):
    quietly(two.write, tmp_path / "two.zarr")
    before = sha256(tmp_path / "two.zarr")
    options = ["--library-key", "fov", "--quality", "fast", "--max-epochs", "2", "--quiet"]

    def run(*arguments):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Writing zarr v2 data", UserWarning)
            return main(["impute", str(tmp_path / "two.zarr"), str(tmp_path / "out.h5ad"), *options, *arguments])

    assert run() != 0
    assert "2 tables: nuclei, table. Name the one with the counts" in capsys.readouterr().err
    assert run("--table-key", "nucleus") != 0
    said = capsys.readouterr().err
    assert "AnnData: `table_key='nucleus'` is not in" in said
    assert "Did you mean 'nuclei'?" in said
    assert run("--table-key", "table") == 0
    assert sha256(tmp_path / "two.zarr") == before
    impute(two, table_key="table")
    written, wanted = ad.read_h5ad(tmp_path / "out.h5ad"), two.tables["table"]
    np.testing.assert_allclose(written.layers["spaformer"], wanted.layers["spaformer"], rtol=1e-4, atol=1e-6)
    assert main(["impute", str(tmp_path / "out.h5ad"), str(tmp_path / "b.h5ad"), "--table-key", "table"]) != 0
    assert "`adata` is an AnnData; leave it out" in capsys.readouterr().err


# --- centroids --------------------------------------------------------------------------------------------------------


def test_centroids_are_those_of_the_instances(sdata, caplog):
    table = sdata.tables["table"]
    places = table.obsm.pop("spatial")
    sdata.shapes["cells"] = quietly(lambda: sdata.shapes["cells"].iloc[::-1])
    with pytest.raises(KeyError, match=r"From the elements of a SpatialData: sf\.pp\.centroids\(sdata\)"):
        impute(sdata)
    before = contents(table)
    sf.pp.centroids(sdata)
    after = contents(table)
    assert after.pop("obsm/spatial")[:2] == ("float64", places.shape)
    assert after == before
    np.testing.assert_allclose(table.obsm["spatial"], places)
    impute(sdata)


def test_centroids_of_several_elements_in_a_coordinate_system(tissue):
    places = tissue.obsm.pop("spatial")
    half = tissue.n_obs // 2
    ids = np.arange(tissue.n_obs) % half + 1
    tissue.obs = tissue.obs.assign(region=pd.Categorical(np.repeat(["a", "b"], half)), cell=ids)
    table = TableModel.parse(tissue, region=["a", "b"], region_key="region", instance_key="cell")
    points = pd.DataFrame(places[:half], columns=["x", "y"], index=ids[:half])
    doubled = {"global": Scale([2, 2], axes=("x", "y"))}
    image = np.zeros((400, 400), dtype=np.int32)
    corners = np.rint(places[half:]).astype(int)
    for number, (x, y) in zip(ids[half:], corners, strict=True):
        image[y, x] = number
    elements = {
        "points": {"a": quietly(PointsModel.parse, points, transformations=doubled)},
        "labels": {"b": quietly(Labels2DModel.parse, image, dims=("y", "x"))},
    }
    sdata = quietly(sd.SpatialData, **elements, tables={"table": table})
    sf.pp.centroids(sdata, key_added="centres")
    np.testing.assert_allclose(table.obsm["centres"][:half], 2 * places[:half])
    kept = np.isin(np.arange(half) + 1, image)
    np.testing.assert_allclose(table.obsm["centres"][half:][kept], corners[kept] + 0.5)


def test_centroids_refuse(sdata, tissue):
    with pytest.raises(TypeError, match="`sdata` must be a SpatialData, not AnnData"):
        sf.pp.centroids(tissue)
    with pytest.raises(ValueError, match="`key_added='spatial'` is already in the table's `obsm`"):
        sf.pp.centroids(sdata)
    with pytest.raises(ValueError, match="`coordinate_system='microns'` is none of those of 'cells': global"):
        sf.pp.centroids(sdata, coordinate_system="microns", key_added="new")
    table = sdata.tables["table"]
    table.obs["cell"] += 1
    with pytest.raises(ValueError, match="1 of 180 cells of the table are not in 'cells': 185"):
        sf.pp.centroids(sdata, key_added="new")
    shapes = sdata.shapes["cells"]
    del sdata.shapes["cells"]
    with pytest.raises(KeyError, match="annotates cells, which the SpatialData does not hold"):
        sf.pp.centroids(sdata, key_added="new")
    sdata.shapes["cells"] = shapes
    del table.uns["spatialdata_attrs"]
    with pytest.raises(ValueError, match="the table 'table' annotates no element"):
        sf.pp.centroids(sdata, key_added="new")


def test_spatialdata_is_not_imported_for_an_anndata():
    code = (
        "import spaformer_sc as sf, anndata, numpy, sys; adata = anndata.AnnData(numpy.ones((3, 2), 'float32'))\n"
        "try: sf.tl.interval(adata)\n"
        "except KeyError: print('spatialdata' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
